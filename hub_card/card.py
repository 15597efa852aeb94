"""The model card: a README.md whose every number is read from the record of the run."""

import math
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from prime_v2.hub_card.files import file_hashes, hub_files
from prime_v2.output.atomic import write_text
from prime_v2.output.numbers import duration
from prime_v2.output.paths import without_places
from prime_v2.validation_config_prime_v2 import read_mapping

TEMPLATE = "model_card.md.jinja"
LICENSE_ID = "apache-2.0"
TAGS = ("prime_v2", "masked-diffusion", "diffusion-language-model", "sub-tokens", "custom_code")
DEFAULT_RECORD = Path("results") / "train.json"
# Fields in which the model beside the card must agree with the record's.
SHAPE = (
    "model_type",
    "vocab_size",
    "base",
    "num_subtokens",
    "shuffle_seed",
    "shuffle_ratio",
    "shuffle_domain",
    "objective",
    "reveal_order",
    "training_order",
    "head",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def write_card(model_dir: str | os.PathLike[str], record: dict[str, Any]) -> Path:
    """Write README.md, the card that the Hub shows, into a folder that holds a model; an earlier one is replaced.

    It names the SHA-256 of the model's files where the folder is a whole one, with its tokenizer.

    record: as `make_record` makes it, with `results` of train.py. Raises ValueError for a folder without config.json,
    a record of another model, and what `render_card` refuses; nothing is written then.
    """
    folder, record = Path(model_dir), without_places(record)
    try:
        config = read_mapping(folder / "config.json")
    except FileNotFoundError:
        raise ValueError(f"{folder} has no config.json; give the folder of a saved model") from None
    recorded = look_up(record, "results.config")
    for name in SHAPE:
        if name in config and name in recorded and config[name] != recorded[name]:
            raise ValueError(
                f"the record is of another model than {folder}: {name} is {recorded[name]!r} there and "
                f"{config[name]!r} here; give the record of this model"
            )
    plot = "loss.png" if (folder / "loss.png").is_file() else None
    try:
        hashes = file_hashes(folder, hub_files(folder))
    except ValueError:  # a folder that cannot be loaded as it is
        hashes = None
    content = render_card(record, model_name=folder.resolve().name, plot=plot, hashes=hashes)
    return write_text(folder / "README.md", content)


def find_record(model_dir: str | os.PathLike[str]) -> Path:
    """The record that train.py leaves in a run's folder; ValueError where there is none."""
    path = Path(model_dir) / DEFAULT_RECORD
    if not path.is_file():
        raise ValueError(f"{model_dir} has no {DEFAULT_RECORD}; name the record of the run with --record FILE")
    return path


def render_card(
    record: dict[str, Any], *, model_name: str, plot: str | None = None, hashes: dict[str, str] | None = None
) -> str:
    """The card's text. plot: a picture of the training run beside the card; hashes: SHA-256 of the model's files.

    Raises ValueError for a value that the record lacks, a number that is not finite, a bound that is none, and a
    perplexity beside a loss that is not a bound.
    """
    check_score(look_up(record, "results.evaluation.bound"), "results.evaluation.bound")
    # Only MDM-Prime models have the paper's loss, and of these only the ones that read any set of visible digits.
    loss, config = look_up(record, "results.evaluation").get("paper_loss"), look_up(record, "results.config")
    has_none = config.get("model_type") != "prime_v2" or config.get("subtoken_embedding") == "ancestors"
    if loss is not None:
        check_score(loss, "results.evaluation.paper_loss")
    elif not has_none:
        raise ValueError("the record has no results.evaluation.paper_loss; write the card from a complete record")
    exact = bool(record["results"]["evaluation"]["bound"].get("is_exact"))
    return fill_template(
        TEMPLATE,
        {"license": LICENSE_ID, "model_name": model_name},
        model_name=model_name,
        plot=plot,
        hashes=hashes,
        kind=look_up(record, "results.config.model_type"),
        exact=exact,
        get=lambda path: look_up(record, path),
        has=lambda path: _has(record, path),
    )


def fill_template(name: str, metadata: dict[str, Any], **facts: Any) -> str:
    """The text of a card from the template of this name. metadata: of the block at its top; facts: its variables."""
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Environment, StrictUndefined

    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=list(TAGS), **metadata)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"fence": _fence, "pm": _plus_minus, "perplexity": _perplexity, "bits": _bits}
    forms = {"count": "{:,}", "number": "{:.4f}", "scientific": "{:.2e}"}
    environment.filters |= {key: form.format for key, form in forms.items()} | {"duration": duration}
    template = environment.from_string(files(__package__).joinpath("templates", name).read_text(encoding="utf-8"))
    text = template.render(card_data=data.to_yaml(), **facts)
    ModelCard(text)  # raises where the metadata block cannot be read back
    return text


def look_up(record: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; ValueError, with the path, where it is missing or a number that is not finite."""
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"the record has no {path}; write the card from a record that train.py wrote")
        value = value[key]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the record has {path}={value}, which is no result; run the evaluation again")
    return value


def _has(record: dict[str, Any], path: str) -> bool:
    try:
        return look_up(record, path) is not None
    except ValueError:
        return False


def check_score(score: dict[str, Any], path: str) -> None:
    """ValueError unless a `score_windows` result is labelled rightly: only a bound has a perplexity."""
    is_bound = look_up(score, "is_bound") if isinstance(score, dict) and "is_bound" in score else None
    if not isinstance(is_bound, bool):
        raise ValueError(f"the record has no {path}.is_bound; write the card from a record that train.py wrote")
    if path.endswith(".bound") and not is_bound:
        raise ValueError(f"{path} of the record is not a bound (method {score.get('method')!r}); evaluate a bound")
    if not is_bound and any(key.startswith(("perplexity", "bits_per_byte")) for key in score):
        raise ValueError(f"{path} of the record has a perplexity, but is no bound; it must not be reported as one")


def _plus_minus(score: dict[str, Any]) -> str:
    """Nats per token with the standard error, where there is one."""
    nats, stderr = look_up(score, "nats_per_token"), look_up(score, "stderr")
    return f"{nats:.4f}" if stderr is None else f"{nats:.4f} ± {stderr:.4f}"


def _perplexity(score: dict[str, Any]) -> str:
    interval = look_up(score, "perplexity_interval_95")
    upper = f"{_sign(score)} {look_up(score, 'perplexity'):.2f}"
    return upper if interval is None else f"{upper} (95% interval {interval[0]:.2f} to {interval[1]:.2f})"


def _bits(score: dict[str, Any]) -> str:
    return f"{_sign(score)} {look_up(score, 'bits_per_byte'):.4f}"


def _sign(score: dict[str, Any]) -> str:
    return "=" if score.get("is_exact") else "≤"


def _fence(text: str) -> str:
    """Text as a Markdown code block whose fence no run of back-ticks in it can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}text\n{text}\n{ticks}"
