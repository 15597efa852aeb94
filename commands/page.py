"""The page of a sample, or of two samplers on one seed, as `prime-v2 generate --page` writes it."""

from typing import Any

from prime_v2.families import label_of
from prime_v2.output.paths import short_names
from prime_v2.output.trace import Trace
from prime_v2.output.trace_page import PageModel, draw_page

TABLE_ELEMENTS = 2**24  # states x V that are compared with the code table at once


def beside_options(given: str, model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """What `--beside NAME[,OPTION=VALUE ...]` changes in a call of `generate`; ValueError for what cannot be."""
    from prime_v2.eval.samplers import LAW, named_config, parsed

    name, options = parsed(given, "beside")
    if model.config.causal:
        raise ValueError(f"--beside {given}: this model writes from left to right and has no samplers; leave it out")
    kept = {each: call[option] for each, option in LAW.items() if option in call}
    try:
        config = named_config(model, name, **{**kept, **options})
    except ValueError as error:
        raise ValueError(f"--beside {given}: {error}") from error
    changed = {LAW[each]: getattr(config, LAW[each]) for each in options if each in LAW}
    return {**changed, "sampler_config": config.sampler_config.to_dict()}


def sampler_label(model: Any, call: dict[str, Any]) -> str:
    """The sampler of a call of `generate` with its options, for people."""
    if model.config.causal:
        return "left to right"
    from prime_v2.eval.samplers import description, sentence
    from prime_v2.generation_config_prime_v2 import merge_options

    names = ("sampler_config", "max_denoising_steps", "temperature", "top_p", "block_length", "cache", "do_sample")
    options = {name: call[name] for name in names if name in call}
    if not options.get("do_sample", model.generation_config.do_sample is not False):
        merged = merge_options(model, None, options)
        return f"greedy, {merged.max_denoising_steps} steps at most"
    return sentence(description(model, model.generation_config_class(**options)))


def page_of(traces: dict[str, Trace], network: Any, tokenizer: Any, model: str, asked: dict[str, Any]) -> str:
    """The page of traces, by their samplers' labels, as HTML; asked: what the head says of the call, by name."""
    config = network.config
    vocab_size = config.vocab_size
    step = next(iter(traces.values())).steps[0]
    whole = len(step.digits[0]) == 1

    def candidates(states: list[list[int]]) -> list[int]:
        if whole:
            return [vocab_size if digits[0] == vocab_size else 1 for digits in states]
        import torch

        table = network.code_table
        parts = torch.tensor(states, device=network.device).split(max(1, TABLE_ELEMENTS // vocab_size))
        return [count for part in parts for count in table.consistent(part).sum(-1).tolist()]

    page = PageModel(
        decode=tokenizer.decode,
        base=vocab_size if whole else config.base,
        mask_id=vocab_size,
        candidates=candidates if vocab_size in step.ids else None,
    )
    facts = {"model": short_names([model])[0], "family": label_of(config), **asked}
    return draw_page(traces, page, [(name, str(value)) for name, value in facts.items() if value not in (None, "")])
