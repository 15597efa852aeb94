"""Makes lm-eval know the model `prime_v2`; nothing of the model is imported until lm-eval asks for it."""

MODEL_NAME = "prime_v2"
MODEL_CLASS = "prime_v2.eval.lm:PrimeV2LM"


def register() -> None:
    """Register the model; harmless when it is registered already, by hand or as a plugin that lm-eval discovered."""
    # First: lm-eval imports its own models only while the registry is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=MODEL_CLASS)


__all__ = ["MODEL_CLASS", "MODEL_NAME", "register"]
