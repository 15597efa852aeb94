"""The model card of a converted checkpoint: where it comes from, and no number that was not counted here."""

from importlib.resources import files
from typing import Any

from prime_v2.hub_card.card import TAGS
from prime_v2.validation_keywords_prime_v2 import refuse_unknown

TEMPLATE = "converted_card.md.jinja"


def render_converted_card(config: dict[str, Any], **facts: Any) -> str:
    """The card's text. config: of the converted model, as a dictionary.

    facts: model_name; source, layout and sha256 of the file; permutation, the name of its file; parameters, their
    number; dropped, rows of the published head that had no token.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Environment, StrictUndefined, meta

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        model_name=facts["model_name"],
    )
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    source = files(__package__).joinpath("templates", TEMPLATE).read_text(encoding="utf-8")
    refuse_unknown(
        "render_converted_card", facts, ["model_name", *meta.find_undeclared_variables(environment.parse(source))]
    )
    template = environment.from_string(source)
    text = template.render(card_data=data.to_yaml(), digits=config["num_subtokens"], get=config.__getitem__, **facts)
    ModelCard(text)  # raises where the metadata block cannot be read back
    return text


__all__ = ["render_converted_card"]
