"""Invented questions in the schemas of the Hub's data sets, as the JSONL folders that `prime-v2 eval --data` reads."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """lm-eval's loader converts these files in here, not in the user's cache."""
    folder = str(tmp_path_factory.mktemp("datasets_cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)
        yield


def _choices(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": ["A", "B", "C", "D"][: len(texts)]}


def _targets(labels: list[int]) -> dict[str, list[Any]]:
    return {"choices": [f"answer {number}" for number in range(len(labels))], "labels": labels}


def _row(folder: str, number: int) -> dict[str, Any]:
    """Question `number` of a data set; no two are alike."""
    question = f"which of the dogs has jumped over {number} foxes"
    distractors = {f"distractor{each}": f"the brown dog {each}" for each in (1, 2, 3)}
    return {
        "sciq": {"question": question, **distractors, "correct_answer": "the fox", "support": f" Dog {number} jumps."},
        "social_iqa": {
            "context": f"Dog {number} is lazy.",
            "question": question,
            **{f"answer{each}": f"fox {each}" for each in "ABC"},
            "label": str(number % 3 + 1),
        },
        "mc_taco": {"sentence": f"{number} foxes jump.", "question": question, "answer": "dog", "label": number % 2},
        "truthfulqa_mc": {
            "question": question,
            "mc1_targets": _targets([1, 0, 0]),
            "mc2_targets": _targets([1, 1, 0, 0]),
        },
        "boolq": {"question": question, "passage": f"Foxes -- {number} of them jump.", "label": number % 2},
        "anli": {"premise": f"Dog {number} sleeps.", "hypothesis": "A fox jumps.", "label": number % 3},
        "arc_easy": {"question": question, "choices": _choices("fox", "dog", "both"), "answerKey": "ABC"[number % 3]},
        "openbookqa": {"question_stem": question, "choices": _choices("fox", "dog"), "answerKey": "AB"[number % 2]},
        "piqa": {"goal": question, "sol1": "ask the fox", "sol2": "ask the dog", "label": number % 2},
        "gsm8k": {"question": question, "answer": f"One and {number} more.\n#### {number + 1}"},
    }[folder]


# Files beside validation.jsonl, or instead of it.
FILES = {
    "anli": ("dev_r1", "dev_r2", "dev_r3"),
    "arc_easy": ("train", "validation", "test"),
    "boolq": ("train", "validation"),
    "gsm8k": ("train",),
}
FOLDERS = (
    "sciq",
    "social_iqa",
    "mc_taco",
    "truthfulqa_mc",
    "boolq",
    "anli",
    "arc_easy",
    "openbookqa",
    "piqa",
    "gsm8k",
)


def write_questions(data: Path, folders: tuple[str, ...] = FOLDERS, questions: int = 3) -> Path:
    """Fill `data` with DATA/<folder>/<split>.jsonl; the questions of all files of a folder differ."""
    for folder in folders:
        (data / folder).mkdir(parents=True)
        for place, split in enumerate(FILES.get(folder, ("validation",))):
            rows = [_row(folder, 100 * place + number) for number in range(questions)]
            write_rows(data / folder / f"{split}.jsonl", rows)
    return data


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
