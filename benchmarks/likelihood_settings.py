"""Which method and draws answer questions best: measured only on training splits, to choose the one default.

    python benchmarks/likelihood_settings.py runs/tiny --data JSONL_FOLDERS --output results/likelihood_settings.json

The rule, stated before the numbers: of the settings whose mean accuracy over the tasks is within two paired standard
errors of the best, the one with the fewest token passes.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from questions import TaskQuestions
from timing import add_output

from prime_v2.eval.answers import Settings, score_questions
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record

TASKS = ("arc_easy", "openbookqa", "boolq")  # of the paper's tasks, those with a training split at hand
SETTINGS = {
    "chain": Settings("chain"),
    "token, 128 draws, z = 3": Settings("token", 128, adaptive=3.0),
    "subtoken, 128 draws, z = 3": Settings("subtoken", 128, adaptive=3.0),
    "subtoken, 128 draws, z = 2": Settings("subtoken", 128, adaptive=2.0),
    "subtoken, 32 draws, z = 3": Settings("subtoken", 32, adaptive=3.0),
    "subtoken, 128 draws": Settings("subtoken", 128),
}


def measure(lm: PrimeV2LM, questions: TaskQuestions, settings: Settings) -> dict[str, Any]:
    started = time.perf_counter()
    scores = dict(score_questions(lm.model, questions.choices, settings))
    seconds = time.perf_counter() - started
    ordered = [scores[number] for number in range(len(questions.choices))]
    values = [[choice.value for choice in score.choices] for score in ordered]
    passes = sum(choice.token_passes for score in ordered for choice in score.choices)
    return {
        "metrics": questions.metrics(values),
        "best": [each.index(max(each)) for each in values],
        "token_passes_per_question": passes / len(ordered),
        "mean_stderr_of_lead": statistics.fmean(score.lead_stderr for score in ordered),
        "seconds": seconds,
    }


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def choose(rows: list[dict[str, Any]], accuracies: dict[str, list[float]]) -> str:
    """The rule of the file's head; accuracies: 0 or 1 of each question, all tasks together (as many of each)."""
    best = max(accuracies, key=lambda name: statistics.fmean(accuracies[name]))
    near = []
    for row in rows:
        differences = [a - b for a, b in zip(accuracies[best], accuracies[row["setting"]], strict=True)]
        mean, stderr = mean_and_stderr(differences)
        row["accuracy_below_best"], row["accuracy_below_best_stderr"] = mean, stderr
        if mean <= 2 * stderr:
            near.append(row)
    return min(near, key=lambda row: row["token_passes_per_question"])["setting"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folders TASK/train.jsonl")
    parser.add_argument("--questions", type=int, default=150, help="of each task (default: 150)")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    args = parser.parse_args()
    code = code_version()
    lm = PrimeV2LM(pretrained=args.model)
    sets = {task: TaskQuestions(lm, task, args.data, "train", args.questions, args.seed) for task in TASKS}
    rows, accuracies = [], {}
    for name, settings in SETTINGS.items():
        found = {task: measure(lm, questions, settings) for task, questions in sets.items()}
        accuracies[name] = [value for each in found.values() for value in each["metrics"]["acc"]]
        tasks = {
            task: {
                **{metric: mean_and_stderr(values) for metric, values in each["metrics"].items()},
                **{key: value for key, value in each.items() if key not in ("metrics", "best")},
            }
            for task, each in found.items()
        }
        rows.append(
            {
                "setting": name,
                "accuracy": mean_and_stderr(accuracies[name])[0],
                "token_passes_per_question": statistics.fmean(
                    each["token_passes_per_question"] for each in found.values()
                ),
                "mean_stderr_of_lead": statistics.fmean(each["mean_stderr_of_lead"] for each in found.values()),
                "seconds": sum(each["seconds"] for each in found.values()),
                "tasks": tasks,
            }
        )
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "tasks"}), file=sys.stderr)
    results = {
        "model": Path(args.model).name,
        "split": "train",
        "questions_per_task": args.questions,
        "tasks": list(TASKS),
        "chosen": choose(rows, accuracies),
        "rows": rows,
    }
    print(json.dumps(results, indent=1))
    if args.output is not None:
        write_json(args.output, make_record("likelihood_settings", results, seed=args.seed, code=code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
