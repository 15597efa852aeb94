"""Makes lm-eval know the model `prime_v2`; nothing of the model is imported until lm-eval asks for it."""

import json
import sys
from pathlib import Path

MODEL_NAME = "prime_v2"
DEMO = Path("runs") / "demo"  # where `make demo` leaves its models
DEMO_RUNS = ("published", "coarse_first")
MODEL_CLASS = "prime_v2.eval.lm:PrimeV2LM"


def register() -> None:
    """Register the model; harmless when it is registered already, by hand or as a plugin that lm-eval discovered."""
    # First: lm-eval imports its own models only while the registry is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_CLASS)


def better_demo() -> Path | None:
    """The folder of the model of `make demo` with the lower bound, None where the working folder has none.

    A run counts once it is finished, which its record says, and while its model is whole.
    """
    bounds: dict[Path, float] = {}
    for folder in (DEMO / name for name in DEMO_RUNS):
        if not all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")):
            continue
        try:
            record = json.loads((folder / "results" / "train.json").read_text(encoding="utf-8"))
            bounds[folder] = float(record["results"]["evaluation"]["bound"]["nats_per_token"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return min(bounds, key=bounds.__getitem__, default=None)


def demo_model() -> str | None:
    """The folder of `better_demo`, with a line on stderr that it is taken; None where there is none."""
    folder = better_demo()
    if folder is None:
        return None
    print(f"prime_v2: no model was named; taking {folder}, the better model of make demo", file=sys.stderr)
    return str(folder)
