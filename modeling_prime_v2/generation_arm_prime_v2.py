"""`generate` of autoregressive models: Transformers' own, after the start token, with draws that a seed fixes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .backbone_prime_v2 import evaluating
from .cache_name_prime_v2 import CACHE_NAME, CACHE_NAMES, one_cache
from .code_table_prime_v2 import check_ids
from .generation_clock_prime_v2 import NetworkClock
from .generation_config_prime_v2 import FLAGS, METADATA, SPECIAL_TOKENS, PrimeV2GenerationConfig, special_ids
from .generation_process_prime_v2 import num_new_tokens, until_eos
from .generation_start_prime_v2 import with_start, without_start
from .generation_states_prime_v2 import StatesOfStreamer, states_to_streamer
from .greedy_matches_prime_v2 import PrimeV2GreedyMixin, propose
from .likelihood_arm_prime_v2 import next_tokens, start_token_id
from .sampler_families_prime_v2 import check_family
from .samplers_prime_v2 import sampler_meant
from .validation_inputs_prime_v2 import (
    WITHOUT_PROMPT,
    check_embeds,
    check_mask,
    checked_seed,
    refuse_lone_mask,
    refuse_only_padding,
    token_inputs,
    whole_number,
)
from .validation_keywords_prime_v2 import arguments_of, refuse_unknown

# What `generate` passes on to `forward`, and what Transformers' own `generate` reads beside its options.
MODEL_INPUTS = ("position_ids", "inputs_embeds", *CACHE_NAMES, "tokenizer", "assistant_tokenizer", "trust_remote_code")


class PrimeV2ArmGenerationMixin(PrimeV2GreedyMixin, GenerationMixin):
    """The `generate` of `PrimeV2ForCausalLM`, called as that of the other families is."""

    @torch.no_grad()
    def generate(  # the other families' order of arguments; `inputs` is a keyword here
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        suffix_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: Any | None = None,
        max_denoising_steps: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Token ids (B, T) of prompt + new, or with return_dict_in_generate Transformers' own output, which then also
        holds the passes and times of `PrimeV2GenerationOutput`.

        input_ids (B, P): prompts without mask tokens, in any form of `token_inputs`. The network is fed the start
            token before a prompt that does not begin with it, as in training, so that samples follow `log_likelihood`
            given the prompt; neither the result nor what is called back here holds it. P = 0: unconditional. None: the
            same for one row, with the start token as its prompt.
        attention_mask (B, P): 0 for padding, on any side; padding is returned as it came.
        max_new_tokens: by default 256, or as many as max_position_embeddings leaves room for; max_length counts the
            prompt too. Past the first EOS there is padding.
        do_sample: by default True, and top_k=0: draws from the model itself. False: the most probable token each time.
        num_return_sequences: samples of each row, which follow one another, (B n, T) in all.
        streamer: as in Transformers; put_states and put_logits are called as of the other families, where a token that
            is not written yet has the id V.
        seed: of all draws of this call, which then leave torch's generators as they were; None draws from those.
        suffix_ids, max_denoising_steps: of other families, refused.
        With a cache (`cache`, or by its older name `past_key_values`) or inputs_embeds all is passed on as it is,
            without a start token.
        The other options are those of Transformers' generation.
        Raises ValueError for bad ids, shapes and lengths, and where the config names no start token.
        """
        refuse_filling_in(suffix_ids, max_denoising_steps)
        kwargs, generation_config = read_options(self, kwargs, generation_config, streamer)
        sources = [kwargs, vars(generation_config or GenerationConfig()), vars(self.generation_config)]
        for name in SPECIAL_TOKENS:
            special_ids(name, _first(sources, name), self.config.vocab_size)
        options = sampling_defaults(sources)
        check_seed(seed, _first([options, *sources], "do_sample"))
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        input_ids, attention_mask = token_inputs(self, input_ids, attention_mask)
        called = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, "streamer": streamer}
        with seeded(seed, self.device), evaluating(self):
            cache = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
            check_embeds(kwargs.get("inputs_embeds"), self.config)
            if cache is not None or kwargs.get("inputs_embeds") is not None:
                generation_config, kwargs = _with_options(generation_config, kwargs, options)
                kwargs |= {**called, "attention_mask": attention_mask}
                kwargs |= {} if cache is None else {CACHE_NAME: cache}
                return GenerationMixin.generate(self, input_ids, generation_config, **kwargs)
            prompt, real = read_prompt(self, input_ids, attention_mask)
            fed, fed_real = with_start(prompt, real, start_token_id(self.config))
            added = fed.shape[1] - prompt.shape[1]
            options |= lengths_to_feed(sources, prompt.shape[1], added, self.config.max_position_embeddings)
            generation_config, kwargs = _with_options(generation_config, kwargs, options)
            if hasattr(streamer, "put_states"):
                width = prompt.shape[1] + options["max_new_tokens"]
                called |= states_to_streamer(
                    logits_processor, StatesOfStreamer(streamer, width, self.config.vocab_size)
                )
            kwargs |= {**without_start(added, **called), "attention_mask": fed_real.long()}
            with NetworkClock(self, bool(_first(sources, "return_dict_in_generate"))) as clock:
                output: Any = GenerationMixin.generate(self, fed, generation_config, **kwargs)
        new = (output if isinstance(output, Tensor) else output.sequences)[:, fed.shape[1] :]
        sequences = torch.cat([prompt.repeat_interleave(len(new) // len(prompt), dim=0), new], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        generated = until_eos(new, special_ids("eos_token_id", _first(sources, "eos_token_id")))
        for name, value in clock.measured(generated).items():
            output[name] = value
        return output

    def reveal_targets(self: Any, ids: Tensor, hidden: Tensor, real: Tensor) -> tuple[Tensor, Tensor, int]:
        """All targets in one pass: each after the tokens of the text before it."""
        tokens = next_tokens(ids, hidden, start_token_id(self.config))
        hidden_states = self.model(tokens.inputs, use_cache=False).last_hidden_state[tokens.rows, tokens.columns]
        proposed, _ = propose(self, hidden_states)
        wrong = torch.zeros_like(ids[:, 0]).index_add_(0, tokens.rows, (proposed != tokens.ids).long())
        return wrong == 0, hidden, 1

    def check_targets(self, real: Tensor, targets: Tensor) -> None:
        """ValueError unless the targets of each row are its last tokens."""
        broken = (real & ~targets & (targets.cumsum(1) > 0)).any(1)
        if broken.any():
            raise ValueError(
                f"row {int(broken.nonzero()[0])} has targets followed by given tokens, but an autoregressive model "
                f"decodes left to right and cannot fill in; let the targets be the last tokens of the row"
            )


def refuse_filling_in(suffix_ids: Tensor | None, max_denoising_steps: int | None) -> None:
    """ValueError for options of families that fill in."""
    if suffix_ids is not None:
        raise ValueError(
            "an autoregressive model cannot fill in, so it has no use for suffix_ids; leave suffix_ids out"
        )
    if max_denoising_steps is not None:
        raise ValueError(
            f"max_denoising_steps={max_denoising_steps} is for diffusion models; an autoregressive model takes one "
            f"pass a token; leave it out"
        )


def read_options(model: Any, given: dict, generation_config: GenerationConfig | None, streamer: Any) -> tuple:
    """(keywords, generation_config) with numbers of numpy as Python's, and whole temperatures as the floats they are.

    ValueError for names that neither Transformers' `generate` nor this one reads, numbers that are none or out of
    range, and a streamer for several samples.
    """
    config = vars(generation_config or GenerationConfig())
    for each in (given, config, vars(model.generation_config)):
        sampler, block_length, cache = (each.get(name) for name in ("sampler_config", "block_length", "cache"))
        check_family(model, sampler, block_length, cache)
    options = [*vars(GenerationConfig()), *GenerationConfig._get_default_generation_params(), *METADATA]
    known = [*arguments_of(model.generate), *options, *arguments_of(GenerationMixin.generate), *MODEL_INPUTS]
    given = {name: value for name, value in given.items() if name != "token_type_ids" or value is not None}
    if isinstance(given.get("cache"), str):  # "none", as of the families with blocks
        del given["cache"]
    refuse_unknown("generate", given, known, _no_sampler)
    refuse_unknown("generation_config", {name: value for name, value in config.items() if value is not None}, options)
    sources = [given, config, vars(model.generation_config)]
    several = _first(sources, "num_return_sequences")
    if several is not None and whole_number("num_return_sequences", several, 1) > 1 and streamer is not None:
        raise ValueError(f"a streamer takes one sequence, not num_return_sequences={several}; leave one of them out")
    if _first(sources, "do_sample") is not False:
        PrimeV2GenerationConfig(**{name: _first(sources, name) for name in ("temperature", "top_p", *FLAGS)})
    if generation_config is not None:
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(**python_numbers(config))
    return given | python_numbers(given), generation_config


def _no_sampler(name: str, value: Any) -> str | None:
    return None if sampler_meant(name, value) is None else "an autoregressive model has no samplers; leave it out"


def python_numbers(given: dict) -> dict[str, Any]:
    """Those of the options that are numpy's numbers, or whole where Transformers asks for a float, as Python's own."""
    found = {name: value.item() for name, value in given.items() if isinstance(value, np.generic)}
    for name in ("temperature", "top_p"):
        value = found.get(name, given.get(name))
        if value is not None:
            found[name] = float(value)
    return found


def _first(sources: list[dict], name: str) -> Any:
    """The option where it is first set: in the call, its generation_config or the model's."""
    return next((each[name] for each in sources if each.get(name) is not None), None)


def _with_options(generation_config: GenerationConfig | None, kwargs: dict, options: dict) -> tuple:
    """(generation_config, keywords) with these options in one of them: Transformers wants no mixture."""
    if generation_config is None:
        return None, kwargs | options
    generation_config = copy.deepcopy(generation_config)
    generation_config.update(**options)
    return generation_config, {name: value for name, value in kwargs.items() if name not in options}


def sampling_defaults(sources: list[dict]) -> dict[str, Any]:
    """What is not set: draws, as the other families do, from all tokens; Transformers' top_k is 50.

    Without a token that ends a row, `eos_token_id=[]`, nothing is padded, but Transformers asks for a padding token.
    """
    options: dict[str, Any] = {"do_sample": True} if _first(sources, "do_sample") is None else {}
    if _first([options, *sources], "do_sample") and _first(sources, "top_k") is None:
        options["top_k"] = 0
    if _first(sources, "eos_token_id") in ([], ()) and _first(sources, "pad_token_id") is None:
        options["pad_token_id"] = 0
    return options


def lengths_to_feed(sources: list[dict], width: int, added: int, limit: int) -> dict[str, Any]:
    """The lengths as Transformers is to count them, which sees `added` columns more than the prompt's `width`.

    The first of `sources` that sets a length decides on it. ValueError where `limit` has no room for the new tokens.
    """
    lengths = [{name: each.get(name) for name in ("max_new_tokens", "max_length")} for each in sources]
    given = next((each for each in lengths if any(value is not None for value in each.values())), {})
    checked = PrimeV2GenerationConfig(**given)
    count = num_new_tokens(checked.max_new_tokens, checked.max_length, width, 0, limit)
    least = _first(sources, "min_length")
    return {"max_new_tokens": count, "max_length": None} | ({"min_length": least + added} if least else {})


def check_seed(seed: Any, do_sample: bool | None) -> None:
    """ValueError for a seed that is no integer, or that nothing would read."""
    if seed is None:
        return
    checked_seed(seed)
    if not do_sample:
        raise ValueError(
            f"do_sample=False, the deterministic decode, has no use for seed={seed}; leave seed out, or give "
            f"do_sample=True"
        )


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and of `device` start from the seed, and are put back; None leaves them be."""
    if seed is None:
        yield
        return
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type):
        # Not torch.manual_seed, which seeds the generators of every device.
        torch.default_generator.manual_seed(int(seed))
        for each in accelerators:
            state = torch.Generator(each).manual_seed(int(seed)).get_state()
            torch.get_device_module(each).set_rng_state(state, each)
        yield


def read_prompt(model: Any, input_ids: Tensor | None, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, which are no padding) of the prompts, both (B, P), on the model's device; ValueError as `generate`."""
    if input_ids is None:
        refuse_lone_mask(attention_mask)
        input_ids = torch.tensor([[start_token_id(model.config)]])
    if input_ids.dim() != 2 or len(input_ids) == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; give token ids (B, tokens) with at least one row"
        )
    check_mask("attention_mask", attention_mask, tuple(input_ids.shape))
    ids = input_ids.to(model.device)
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device).bool()
    refuse_only_padding(real, WITHOUT_PROMPT)
    check_ids(ids[real], model.config.vocab_size, "and an autoregressive model fills in no mask tokens")
    return ids.long(), real
