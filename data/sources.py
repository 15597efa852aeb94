"""Whether a source of text still is what was read: a fingerprint of its files, its revision, or its packages."""

from pathlib import Path
from typing import Any

from prime_v2.data.docs_corpus import docs_versions
from prime_v2.data.documents import folder_files
from prime_v2.output.seals import sha256_of


def fingerprint_of(source: str) -> dict[str, Any]:
    """JSON-ready: of files their sizes, times and SHA-256; of a hub data set its revision; of docs the versions."""
    if source == "docs":
        return {"versions": docs_versions()}
    path = Path(source).expanduser()
    if path.is_dir():
        return {"files": {each.relative_to(path).as_posix(): _state_of(each) for each in folder_files(path)}}
    if path.exists():
        return {"files": {path.name: _state_of(path)}}
    return {"revision": _revision(source)}


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """The same of a trained model: of the weights, tokenizer and configuration in its folder."""
    return {"files": {path.name: _state_of(path) for path in model_files(folder)}}


def model_files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_file() and each.suffix in (".safetensors", ".json"))


def is_fingerprint(value: Any) -> bool:
    """Whether this has the form of what `fingerprint_of` or `model_fingerprint` returns."""
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, content),) = value.items()
    if kind == "revision":
        return isinstance(content, str | None)
    of_kind = {"versions": str, "files": dict}.get(kind)
    return of_kind is not None and isinstance(content, dict) and all(isinstance(v, of_kind) for v in content.values())


def _state_of(path: Path) -> dict[str, Any]:
    return {**_times_of(path), "sha256": sha256_of(path)}


def _times_of(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _revision(source: str) -> str | None:
    """What names this state of a hub data set; None when it cannot be had now, e.g. without a network."""
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset_builder(name, config or None).hash
    except Exception:
        # Its kind differs by the reason; whoever reads the text itself meets the same error, and says it.
        return None


def change_of(stored: dict[str, Any], source: str) -> str | None:
    """What is different in a source since `fingerprint_of` was stored, a clause; None for nothing, as far as known.

    Files of the same size and time are taken as the same; of others the content decides, which is read. A source that
    is not there any more is no other text: what was read of it is kept.
    """
    path = Path(source).expanduser()
    if "versions" in stored:
        return None  # an update of the packages is no other choice of text; `prepare` says that there was one
    if "revision" in stored:
        now = None if stored["revision"] is None else _revision(source)
        return None if now in (None, stored["revision"]) else f"its revision is {now}, not {stored['revision']}"
    if not path.exists():
        return None
    return files_change(
        stored, folder_files(path) if path.is_dir() else [path], path if path.is_dir() else path.parent
    )


def files_change(stored: dict[str, Any], files: list[Path], root: Path) -> str | None:
    """`change_of` for these files, named from `root`."""
    now = {each.relative_to(root).as_posix(): each for each in files if each.exists()}
    known = stored["files"]
    for name in sorted(known.keys() ^ now.keys()):
        return f"{name} is {'missing' if name in known else 'new'}"
    for name, path in now.items():
        if not isinstance(known[name], dict):
            return f"{name} has another content"
        same_times = all(known[name].get(key) == value for key, value in _times_of(path).items())
        if not same_times and _state_of(path)["sha256"] != known[name].get("sha256"):
            return f"{name} has another content"
    return None
