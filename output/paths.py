"""Text that is passed on names files and folders, and never says where on a machine they lie."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

GENERATED = ("samples",)  # text of a model, which is no text of ours
# A path from the root, the home folder or a folder above: in quotes, and otherwise up to what ends a word or an item.
QUOTED_PLACE = re.compile(r"""(["'])((?:~[\w-]*|\.\.)?/[^"'\n]+)\1""")
# After a short option (-o/home), too, and after a colon, but for the // of an address (https://host).
PLACE = re.compile(
    r"""file://\S+|(?:(?<![\w/.~-])|(?<=^-\w)|(?<=[\s"'=,:]-\w))(?!(?<=:)//)(?:~[\w-]*|\.\.)?/[^\s,"'=;:()\[\]{}]+"""
)
# What may stand before a path in one word: name= and name:, several times, and a short option.
BEFORE = re.compile(r"(?:[\w-]+(?:=|:(?!//)))*(?:-\w(?=(?:~[\w-]*|\.\.)?/))?")


def without_places(content: Any) -> Any:
    """Strings, lists and dictionaries with the last part of each path that says where something lies on a machine.

    The keys of dictionaries are treated alike. Relative paths below the working folder stay, and so does the text that
    a model generated.
    """
    if isinstance(content, dict):
        kept: dict[Any, Any] = {}
        for key, each in content.items():
            name, number = without_places(key), 1
            while name in kept:  # two places whose last parts are equal
                number += 1
                name = f"{without_places(key)} ({number})"
            kept[name] = each if key in GENERATED else without_places(each)
        return kept
    if isinstance(content, list | tuple):
        return [without_places(each) for each in content]
    if not isinstance(content, str) or "/" not in content:
        return content
    try:
        words = shlex.split(content)
    except ValueError:  # an apostrophe: not a command
        words = []
    if shlex.join(words) != content:  # not a command
        return _last_part(content)
    return shlex.join(_last_part(word) for word in words)


def _last_part(text: str) -> str:
    """A path by its last part; of other text, each path in it. An option with its value is --name=value or -o/path."""
    found = BEFORE.match(text)
    before = found[0] if found else ""
    text = text[len(before) :]
    if re.match(r"(~[\w-]*|\.\.)?/[^\n,]*$", text):
        return before + (PurePath(text).name or text)
    text = QUOTED_PLACE.sub(lambda found: f"{found[1]}{PurePath(found[2]).name}{found[1]}", text)
    return before + PLACE.sub(lambda found: PurePath(found[0]).name or found[0], text)


def short_names(places: Sequence[str]) -> list[str]:
    """Names that tell models apart in a record: a folder's own, with as many folders above it as that takes.

    places: folders, or names on the Hub, which stay. Raises ValueError for one that is given twice.
    """
    paths = [Path(os.path.abspath(Path(each).expanduser())) for each in places]
    parts = [path.parts if path.exists() else (name,) for path, name in zip(paths, places, strict=True)]
    for number, each in enumerate(parts):
        if each in parts[:number]:
            raise ValueError(f"{places[number]} is given twice; once will do")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names
