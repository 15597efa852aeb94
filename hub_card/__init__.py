"""Model cards written from recorded results."""

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {"render_card": "card", "write_card": "card"}
__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from prime_v2.hub_card.card import render_card as render_card
    from prime_v2.hub_card.card import write_card as write_card


def __getattr__(name: str) -> Any:
    """Import on first use: `import prime_v2.hub_card` alone loads nothing heavy."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
