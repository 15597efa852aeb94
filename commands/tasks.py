"""`prime-v2 tasks`: task files of lm-eval that read local questions."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prime_v2.commands.options import FOLDER, Json, TaskSplit

if TYPE_CHECKING:
    from prime_v2.eval.offline_tasks import WrittenTask


def tasks(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with a folder of JSONL files for each task.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the task files.", callback=FOLDER)],
    only: Annotated[
        str | None,
        typer.Option("--tasks", metavar="TASK,...", help="Tasks to write [default: all that DATA has files of]."),
    ] = None,
    split: TaskSplit = None,
    as_json: Json = False,
) -> None:
    """Write lm-eval task files that read JSONL folders.

    With lm_eval --include_path OUT they need no network. Names and prompts of the tasks are lm-eval's; docs/lm_eval.md
    has the form of DATA.
    """
    from prime_v2.eval.offline_tasks import expand_tasks, parse_splits, tasks_in, write_tasks

    splits = parse_splits(split or [])
    names = tasks_in(data, splits) if only is None else expand_tasks(name for name in only.split(",") if name)
    written = write_tasks(out, names, splits, data)
    print(json.dumps([asdict(each) for each in written]) if as_json else render_tasks(written))


def render_tasks(written: "Sequence[WrittenTask]") -> str:
    """A line for each task: its scored split, the number of questions, where few-shot examples would come from."""
    width = max((len(each.task) for each in written), default=0)
    lines = []
    for each in written:
        count = "" if each.num_questions is None else f"{each.num_questions:,} questions, "
        same = " (without the question itself)" if each.fewshot_split == each.scored_split else ""
        lines.append(
            f"{each.task:<{width}}  {each.scored_split}: {count}few-shot examples from {each.fewshot_split}{same}"
        )
    return "\n".join(lines)
