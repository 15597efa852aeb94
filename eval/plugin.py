"""Makes lm-eval know the model `prime_v2`; nothing of the model is imported until lm-eval asks for it."""

import sys
from pathlib import Path

MODEL_NAME = "prime_v2"
DEMO = Path("runs") / "tiny"  # where `make demo` leaves its model
MODEL_CLASS = "prime_v2.eval.lm:PrimeV2LM"


def register() -> None:
    """Register the model; harmless when it is registered already, by hand or as a plugin that lm-eval discovered."""
    # First: lm-eval imports its own models only while the registry is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_CLASS)


def has_demo() -> bool:
    """Whether the working folder has the model of `make demo`, whole."""
    return all((DEMO / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def demo_model() -> str:
    """The folder of the model of `make demo`, and a line on stderr that it is taken."""
    print(f"prime_v2: no model was named; taking {DEMO}, the model of make demo", file=sys.stderr)
    return str(DEMO)


__all__ = ["MODEL_CLASS", "MODEL_NAME", "demo_model", "has_demo", "register"]
