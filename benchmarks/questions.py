"""Questions of an lm-eval task from JSONL folders, for the benchmarks: as lm-eval asks them, in the model's tokens."""

import tempfile
from pathlib import Path
from typing import Any

from prime_v2.eval.answers import Choice
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.offline_tasks import write_tasks
from prime_v2.random_prime_v2 import permutation


class TaskQuestions:
    """`number` questions of a task, drawn with the seed: requests, choices, and lm-eval's own metrics."""

    def __init__(self, lm: PrimeV2LM, task: str, data: Path, split: str, number: int | None, seed: int):
        from lm_eval.tasks import TaskManager, get_task_dict

        with tempfile.TemporaryDirectory() as folder:
            write_tasks(Path(folder) / "tasks", [task], {task: split}, data)
            manager = TaskManager(include_path=str(Path(folder) / "tasks"))
            self.task = get_task_dict([task], manager)[task]
            self.task.build_all_requests(limit=None, rank=0, world_size=1)
        documents = sorted({instance.doc_id for instance in self.task.instances})
        self.num_documents = len(documents)
        chosen = set(permutation(len(documents), seed).tolist()[:number])
        self.requests: list[Any] = [each for each in self.task.instances if each.doc_id in chosen]
        tokens = [
            (request.args, *lm._encode_pair(*request.args)) if request.args[0] else (request.args, [], [])
            for request in self.requests
        ]
        lm._instances = self.requests
        self.groups = lm._questions(tokens, self.requests)
        lm._instances = []

    @property
    def choices(self) -> list[list[Choice]]:
        return [group.choices for group in self.groups]

    def metrics(self, values: list[list[float]]) -> dict[str, list[float]]:
        """lm-eval's metrics of each question, from the values of its choices."""
        found: dict[str, list[float]] = {}
        for group, scores in zip(self.groups, values, strict=True):
            answers = [(scores[choice], False) for choice in group.choice_of]
            document = self.requests[group.requests[0]].doc
            for name, value in self.task.process_results(document, answers).items():
                found.setdefault(name, []).append(float(value))
        return found
