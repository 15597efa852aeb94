"""Text that is passed on names files and folders, and never says where on a machine they lie."""

import re
import shlex
from pathlib import PurePath
from typing import Any

GENERATED = ("samples",)  # text of a model, which is no text of ours
# A path from the root, the home folder or a folder above: in quotes, and otherwise up to what ends a word or an item.
QUOTED_PLACE = re.compile(r"""(["'])((?:~[\w-]*|\.\.)?/[^"'\n]+)\1""")
PLACE = re.compile(r"""file://\S+|(?<![\w/.:~-])(?:~[\w-]*|\.\.)?/[^\s,"'=;:()\[\]{}]+""")


def without_places(content: Any) -> Any:
    """Strings, lists and dictionaries with the last part of each path that says where something lies on a machine.

    Relative paths below the working folder stay, and so does the text that a model generated.
    """
    if isinstance(content, dict):
        return {key: each if key in GENERATED else without_places(each) for key, each in content.items()}
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
    """A path by its last part; of other text, each path in it. An option with its value is --name=value."""
    name, sign, value = text.partition("=")
    if sign and re.fullmatch(r"[\w-]+", name):
        return f"{name}={_last_part(value)}"
    if re.match(r"(~[\w-]*|\.\.)?/[^\n,]*$", text):
        return PurePath(text).name or text
    text = QUOTED_PLACE.sub(lambda found: f"{found[1]}{PurePath(found[2]).name}{found[1]}", text)
    return PLACE.sub(lambda found: PurePath(found[0]).name or found[0], text)


__all__ = ["without_places"]
