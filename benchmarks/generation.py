"""Tokens/s of `generate` against the published algorithm: every step, whole batch, all positions; equal steps.

    python benchmarks/generation.py                             # V = 2,048 and 50,257, 64 steps, batches of 8
    python benchmarks/generation.py --output results/generation.json

Both draw from the same process (docs/derivation.md). The reference is the plain reverse process: at each step run the
network on the whole batch, draw a token for every position by `torch.distributions.Categorical`, and reveal each
hidden digit with probability (alpha_s - alpha_t) / (1 - alpha_t). `generate` draws all reveal times first, runs the
network at the steps at which a sequence reveals something, and computes last feed-forward network, head and softmax
only for the tokens of that step. Calls alternate.

    python benchmarks/generation.py --model FOLDER              # blocks and caches of a trained model as well

In the same run: blocks with a cache of keys and values against none at equal steps, with the deviation of the exact
nats a token beside it (random weights, and those of --model, whose context is cut into 16 blocks); and the share of
the time that `generate` spends outside network and head, for each sampler and unit at V = 50,257.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from timing import HEAD_DIM, add_output, add_sizes, by_turns, ratio

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, PrimeV2GenerationConfig
from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.eval.samplers import named_sampler
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record

CASES = ((2048, 11, 128), (50257, 16, 32), (2048, 11, 16))  # V, S, new tokens

CACHES = ("none", "prefix", "dual")
UNITS = {"ancestral": ("digit",), "remasking": ("digit",)}  # of the others token, digit and stage
SAMPLERS = ("ancestral", "remasking", "probability", "margin", "entropy", "threshold", "entropy-bound")


@torch.no_grad()
def published(model: PrimeV2ForMaskedDiffusion, batch: int, length: int, steps: int) -> torch.Tensor:
    """Token ids (batch, length) by the reverse process step by step, alpha = 1 - t."""
    config = model.config
    states = torch.full((batch, length, config.num_subtokens), config.base, device=model.device)
    for step in range(steps):
        logits = model(subtoken_ids=states).logits  # (B, L, V)
        ids = torch.distributions.Categorical(logits=logits).sample()
        reveal = torch.rand(states.shape, device=model.device) < 1 / (steps - step)
        states = torch.where(reveal & (states == config.base), model.encode(ids), states)
    return model.decode(states)


def measure(vocab_size: int, num_subtokens: int, new: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    model = network(vocab_size, num_subtokens, new + 1, options.hidden_size, options.layers)
    start = torch.zeros(options.batch, 1, dtype=torch.long)
    outputs = []

    def ours() -> None:
        outputs.append(
            model.generate(
                start,
                max_new_tokens=new,
                max_denoising_steps=options.steps,
                seed=len(outputs),
                eos_token_id=None,
                return_dict_in_generate=True,
            )
        )

    reference = lambda: published(model, options.batch, new + 1, options.steps)  # noqa: E731
    seconds = by_turns({"generate": ours, "published": reference}, options.repeats, warm_up=1)
    times = ratio(seconds, "published", "generate")
    tokens = options.batch * new
    return {
        "vocab_size": vocab_size,
        "num_subtokens": num_subtokens,
        "new_tokens": new,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / statistics.median(each) for name, each in seconds.items()},
        "speedup": times["median"],
        "speedup_range": times["range"],
        "passes_per_sequence": torch.stack([each.num_forward for each in outputs]).double().mean().item(),
        "most_passes": int(torch.stack([each.num_forward for each in outputs]).max()),
    }


def network(vocab_size: int, num_subtokens: int, length: int, hidden_size: int, layers: int, **more: Any) -> Any:
    config = PrimeV2Config(
        vocab_size=vocab_size,
        num_subtokens=num_subtokens,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        max_position_embeddings=length,
        **more,
    )
    return PrimeV2ForMaskedDiffusion(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def measure_blocks(
    model: Any, name: str, prompt: int, block: int, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens/s of each cache behind a prompt of so many tokens, and what it adds to the exact nats a token."""
    torch.manual_seed(options.seed)
    length = model.config.max_position_embeddings
    new = length - prompt
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=model.device)
    same = {"sampler_config": named_sampler("margin"), "block_length": block, "max_denoising_steps": new // 4}
    configs = {cache: PrimeV2GenerationConfig(**same, cache=cache) for cache in CACHES}
    written: dict[str, Any] = {}

    def way(cache: str) -> Any:
        def run() -> None:
            written[cache] = model.generate(
                ids, generation_config=configs[cache], max_new_tokens=new, seed=0, eos_token_id=None
            )

        return run

    seconds = by_turns({cache: way(cache) for cache in CACHES}, options.repeats, warm_up=1)
    given = (torch.arange(length) < prompt).long().expand(batch, -1)
    scored = {
        cache: model.log_likelihood(
            written["none"], prompt_mask=given, method="sampler", generation_config=config
        ).value.cpu()
        for cache, config in configs.items()
    }
    deviations = {cache: (scored["none"] - scored[cache]) / new for cache in CACHES[1:]}
    speedups = {cache: ratio(seconds, "none", cache) for cache in CACHES[1:]}
    return {
        "model": name,
        "prompt": prompt,
        "new_tokens": new,
        "block": block,
        "batch": batch,
        "steps": new // 4,
        "seconds": seconds,
        "tokens_per_second": {cache: batch * new / statistics.median(each) for cache, each in seconds.items()},
        "speedup": {cache: each["median"] for cache, each in speedups.items()},
        "speedup_range": {cache: each["range"] for cache, each in speedups.items()},
        "nats_per_token": {cache: float(-each.mean() / new) for cache, each in scored.items()},
        "deviation": {cache: float(each.mean()) for cache, each in deviations.items()},
        "deviation_stderr": {
            cache: float(each.std() / len(each) ** 0.5) if len(each) > 1 else None
            for cache, each in deviations.items()
        },
    }


def blocks_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Random weights at `--block-tokens`, and `--model` at its own context; half of it a prompt, or none of it."""
    torch.manual_seed(options.seed)
    random = network(2048, 11, options.block_tokens, options.hidden_size, options.layers)
    cases = [(random, "random weights", options.block, options.block_batch)]
    if options.model:
        trained, _ = load_model_and_tokenizer(options.model, random.device)
        block = max(1, trained.config.max_position_embeddings // 16)
        cases.append((trained, Path(options.model).name, block, options.model_batch))
    return [
        measure_blocks(model, name, prompt, block, batch, options)
        for model, name, block, batch in cases
        for prompt in (0, model.config.max_position_embeddings // 2)
    ]


def measure_shares(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The share of `generate` outside network and head, for each sampler and unit, the median of the repeats."""
    rows = []
    shape = (options.share_vocab, 16, options.share_tokens + 1, options.share_hidden_size, options.share_layers)
    torch.manual_seed(options.seed)
    models = {"digit": network(*shape)}
    models |= {"token": models["digit"], "stage": network(*shape, reveal_order="nested", stage_digits=[8, 16])}
    start = torch.zeros(options.share_batch, 1, dtype=torch.long)
    for sampler in SAMPLERS:
        for unit in UNITS.get(sampler, ("token", "digit", "stage")):
            config = named_sampler(sampler, models[unit], unit=None if sampler in UNITS else unit)
            outputs = [
                models[unit].generate(
                    start,
                    max_new_tokens=options.share_tokens,
                    max_denoising_steps=max(1, options.share_tokens // 2),
                    sampler_config=config,
                    seed=seed,
                    eos_token_id=None,
                    return_dict_in_generate=True,
                )
                for seed in range(options.repeats + 1)
            ][1:]
            shares = [each.sampling_seconds / (each.sampling_seconds + each.network_seconds) for each in outputs]
            row = {"sampler": sampler, "unit": unit, "share": statistics.median(shares)}
            row["share_range"] = [min(shares), max(shares)]
            rows.append({**row, "network_seconds": statistics.median(each.network_seconds for each in outputs)})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden_size=256, layers=4, batch=8, steps=64, repeats=3, seed=0)
    # Blocks: L = 512, half of it a prompt or none of it. Shares: the shape of GPT-2, whose vocabulary it is.
    add_sizes(parser, block_tokens=512, block=32, block_batch=2)
    add_sizes(parser, share_vocab=50257, share_hidden_size=768, share_layers=12, share_batch=4, share_tokens=32)
    add_sizes(parser, model_batch=16)
    parser.add_argument("--model", help="a trained model whose blocks and caches are measured as well")
    add_output(parser)
    options = parser.parse_args(arguments)
    code = code_version()
    rows = []
    for case in CASES:
        row = measure(*case, options)
        rows.append(row)
        low, high = row["speedup_range"]
        print(
            f"V = {row['vocab_size']:,}, {options.batch} x {row['new_tokens']} tokens, {options.steps} steps: "
            f"{row['tokens_per_second']['generate']:,.0f} tokens/s, published "
            f"{row['tokens_per_second']['published']:,.0f}; {row['speedup']:.2f}x ({low:.2f} to {high:.2f}); "
            f"{row['passes_per_sequence']:.1f} passes a sequence",
            flush=True,
        )
    blocks = blocks_of(options)
    for row in blocks:
        for cache in CACHES[1:]:
            low, high = row["speedup_range"][cache]
            print(
                f"{row['model']}, prompt {row['prompt']}, blocks of {row['block']}, cache {cache}: "
                f"{row['tokens_per_second'][cache]:,.0f} tokens/s, {row['speedup'][cache]:.2f}x ({low:.2f} to "
                f"{high:.2f}) of no cache; nats/token {row['deviation'][cache]:+.4f}",
                flush=True,
            )
    shares = measure_shares(options)
    for row in shares:
        print(f"{row['sampler']}, {row['unit']}: {row['share']:.1%} outside network and head", flush=True)
    if options.output:
        shape = {key: value for key, value in vars(options).items() if key not in ("output", "model")}
        results = {"shape": shape, "rows": rows, "blocks": blocks, "shares": shares}
        record = make_record("generation", results, seed=options.seed, code=code)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
