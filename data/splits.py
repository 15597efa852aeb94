"""Which documents are repeated, the side of the split that each is on, and the name of a sequence of them.

All are pure functions of the texts: the same documents give the same sides on every machine.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _normalised(document: str) -> str:
    return " ".join(document.casefold().split())


def deduplicate(documents: Iterable[str], on_repeat: Callable[[], object] | None = None) -> Iterator[str]:
    """The documents without those equal to an earlier one up to case and whitespace; in order, 16 bytes each held.

    on_repeat is called for each that is left out.
    """
    seen = set()
    for document in documents:
        key = _digest(_normalised(document))
        if key not in seen:
            seen.add(key)
            yield document
        elif on_repeat is not None:
            on_repeat()


def split_of(document: str, *, seed: int = 0, dev_share: float = 0.02, test_share: float = 0.02) -> str:
    """The side of a document: "train", "dev" or "test", with these probabilities over documents.

    A pure function of the seed and of the text up to case and whitespace, so that equal documents are on one side on
    every machine. The test side does not depend on `dev_share`. ValueError for shares outside [0, 1) or a sum >= 1.
    """
    if not (0 <= dev_share < 1 and 0 <= test_share < 1 and dev_share + test_share < 1):
        raise ValueError(
            f"dev_share={dev_share} and test_share={test_share} must be at least 0 and leave a share for training, "
            "e.g. 0.02 and 0.02"
        )
    position = int.from_bytes(_digest(f"{seed}\n{_normalised(document)}")[:8], "big") / 2**64
    if position < test_share:
        return "test"
    return "dev" if position >= 1 - dev_share else "train"


class Fingerprint:
    """SHA-256 over a sequence of documents, added one by one; it depends on their order and boundaries."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: str) -> None:
        data = document.encode()
        self._hash.update(len(data).to_bytes(8, "big") + data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def corpus_fingerprint(documents: Iterable[str]) -> str:
    """64 hexadecimal digits that name a sequence of documents, for the record of a run."""
    fingerprint = Fingerprint()
    for document in documents:
        fingerprint.add(document)
    return fingerprint.hexdigest()
