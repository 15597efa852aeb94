"""Corrector steps of uniform-state diffusion on two small laws: distance of the sampler's texts from the law, exact.

    python benchmarks/corrector.py --output results/corrector.json    # under a minute

The network is the optimal one of each law, and the law of the sampler's texts is enumerated, a transition matrix for
each pass: no number is drawn. The defaults `t_on=0.2` and one corrector step are those of the configuration.
"""

import argparse
import itertools
from typing import Any

import torch
from timing import add_output
from torch import Tensor

from prime_v2 import PredictorCorrectorSamplerConfig
from prime_v2.diffusion_uniform_prime_v2 import reverse_step
from prime_v2.generation_uniform_process_prime_v2 import steps_from_noise, with_correctors
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record


def random_law(states: Tensor) -> Tensor:
    """(Z,) float64: exp of normals, every token depends on all others."""
    weights = torch.randn(len(states), generator=torch.Generator().manual_seed(2), dtype=torch.double)
    return (1.5 * weights).softmax(0)


def markov_chain(states: Tensor, stays: float) -> Tensor:
    """(Z,) float64: the first token is uniform, each later one is the one before with probability `stays`."""
    vocab_size = int(states.max()) + 1
    same = (states[:, 1:] == states[:, :-1]).double()
    return (stays * same + (1 - stays) / (vocab_size - 1) * (1 - same)).prod(1) / vocab_size


def estimates(law: Tensor, states: Tensor, t: float, vocab_size: int) -> Tensor:
    """p (Z, L, V): the posterior of each clean token given the noised ones elsewhere."""
    same = states[:, None] == states[None]
    chances = (1 - t) * same.double() + t / vocab_size  # (Z noised, Z clean, L)
    is_token = torch.nn.functional.one_hot(states, vocab_size).double()
    columns = range(states.shape[1])
    elsewhere = [chances[..., [k for k in columns if k != i]].prod(-1) * law for i in columns]
    joint = torch.stack([each @ is_token[:, i] for i, each in enumerate(elsewhere)], 1)
    return joint / joint.sum(-1, keepdim=True)


def transition(law: Tensor, states: Tensor, t: float, s: float, vocab_size: int, redrawn: int) -> Tensor:
    """(Z, Z) of one pass from t to s; s = t is a corrector step that redraws `redrawn` tokens."""
    length = states.shape[1]
    p, corrects = estimates(law, states, t, vocab_size), s == t
    now = torch.full((states.numel(),), 0.0 if corrects else 1 - t, dtype=torch.double)
    weights = reverse_step(p.flatten(0, 1), states.flatten(), now, torch.full_like(now, 1 - s)).view_as(p)
    weights = weights / weights.sum(-1, keepdim=True)
    each = torch.stack([weights[:, i][:, states[:, i]] for i in range(length)], -1)  # (Z, Z, L)
    if not corrects:
        return each.prod(-1)
    same = (states[:, None] == states[None]).double()
    sets = list(itertools.combinations(range(length), redrawn))
    chosen = [torch.tensor([i in some for i in range(length)]) for some in sets]
    return sum(torch.where(some, each, same).prod(-1) for some in chosen) / len(sets)


def distance(law: Tensor, states: Tensor, plan: list[tuple[float, float]], vocab_size: int, redrawn: int) -> float:
    """Total variation between the law and that of the texts after the passes of `plan`."""
    found = torch.full_like(law, 1 / len(law))
    for t, s in plan:
        found = found @ transition(law, states, t, s, vocab_size, redrawn)
    return float((found - law).abs().sum()) / 2


def measure(name: str, law: Tensor, states: Tensor, vocab_size: int, passes: list[int]) -> list[dict[str, Any]]:
    """A row for each sampler: its distances at so many passes."""
    config, about = PredictorCorrectorSamplerConfig(), {"law": name, "passes": passes}
    plans = [steps_from_noise(each) for each in passes]
    rows = [about | {"redrawn": 0, "distances": [distance(law, states, plan, vocab_size, 0) for plan in plans]}]
    plans = [with_correctors(config, each) for each in passes]
    for redrawn in (1, 2):
        found = [distance(law, states, plan, vocab_size, redrawn) for plan in plans]
        rows.append(about | {"redrawn": redrawn, "distances": found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--stays", type=float, default=0.9, help="chance that a token of the chain repeats the last")
    add_output(parser)
    options = parser.parse_args()
    code = code_version()
    rows = []
    for vocab_size, length in ((3, 3), (2, 8)):
        states = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))
        if length == 3:
            name, law = "three strongly dependent tokens, V = 3", random_law(states)
        else:
            name, law = "Markov chain of eight tokens, V = 2", markov_chain(states, options.stays)
        rows += measure(name, law, states, vocab_size, options.passes)
    for row in rows:
        print(row["law"], row["redrawn"], *(f"{each:.3f}" for each in row["distances"]))
    if options.output:
        record = make_record("corrector", {"stays": options.stays, "rows": rows}, seed=2, code=code)
        print(f"record: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
