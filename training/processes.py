"""What the first process finds out for all processes of a run."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def from_first_process(work: Callable[[], Any]) -> Any:
    """What `work` returns on the first process, on all of them; a ValueError or OSError of it is raised on all."""
    found: list[Any] = [None, None]  # the result and the error
    if PartialState().is_main_process:
        try:
            found[0] = work()
        except (ValueError, OSError) as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
