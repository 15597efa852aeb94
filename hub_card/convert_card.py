"""The model card of a converted checkpoint: where it comes from, and no number that was not counted here."""

from typing import Any

from prime_v2.hub_card.card import fill_template

TEMPLATE = "converted_card.md.jinja"


def render_converted_card(
    config: dict[str, Any],
    *,
    model_name: str,
    source: str,
    sha256: str,
    permutation: str | None,
    parameters: int,
    dropped: int,
) -> str:
    """The card's text. config: of the converted model, as a dictionary.

    source, sha256: name and digest of the published file; permutation: the name of its file, None for whole tokens;
    parameters: their number; dropped: rows of the published head that had no token.
    """
    return fill_template(
        TEMPLATE,
        {"model_name": model_name},
        model_name=model_name,
        source=source,
        sha256=sha256,
        permutation=permutation,
        parameters=parameters,
        dropped=dropped,
        digits=config["num_subtokens"],
        get=config.__getitem__,
    )
