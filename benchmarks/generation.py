"""Tokens/s of `generate` against the published algorithm: every step, whole batch, all positions; equal steps.

    python benchmarks/generation.py                             # V = 2,048 and 50,257, 64 steps, batches of 8
    python benchmarks/generation.py --output results/generation.json

Both draw from the same process (docs/derivation.md). The reference is the plain reverse process: at each step run the
network on the whole batch, draw a token for every position by `torch.distributions.Categorical`, and reveal each
hidden digit with probability (alpha_s - alpha_t) / (1 - alpha_t). `generate` draws all reveal times first, runs the
network at the steps at which a sequence reveals something, and computes last feed-forward network, head and softmax
only for the tokens of that step. Calls alternate.
"""

import argparse
import statistics
from typing import Any

import torch
from timing import HEAD_DIM, add_sizes, by_turns, ratio

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.output.atomic import write_json
from prime_v2.output.records import make_record

CASES = ((2048, 11, 128), (50257, 16, 32), (2048, 11, 16))  # V, S, new tokens


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
    config = PrimeV2Config(
        vocab_size=vocab_size,
        num_subtokens=num_subtokens,
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // HEAD_DIM,
        max_position_embeddings=new + 1,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PrimeV2ForMaskedDiffusion(config).to(device).eval()
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, hidden_size=256, layers=4, batch=8, steps=64, repeats=3, seed=0)
    parser.add_argument("--output", help="write the record here (JSON)")
    options = parser.parse_args(arguments)
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
    if options.output:
        shape = {key: value for key, value in vars(options).items() if key != "output"}
        record = make_record("generation", {"shape": shape, "rows": rows}, seed=options.seed)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
