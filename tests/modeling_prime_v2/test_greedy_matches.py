"""The deterministic decode and `greedy_matches`, against a loop over one row, one token and one id at a time."""

import math
import random

import pytest
import torch
from networks import ORDERS, one_layer, prompts
from transformers import GenerationConfig, NoRepeatNGramLogitsProcessor

from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.greedy_matches_prime_v2 import most_confident, proposals

COARSE_FIRST = {"reveal_order": "coarse_first", "stage_digits": [2, 6]}
MASK = 50  # the mask token of the networks here, which have 50 tokens
NETWORKS = {
    "digit": {},
    "token": ORDERS["token"],
    "nested": {"reveal_order": "nested", "stage_digits": [2, 6]},
    "base 8": {"base": 8, "num_subtokens": 2},
    "base 4, no carry-over": {"base": 4, "num_subtokens": 3, "carry_over": False},
    "plain MDM": {"num_subtokens": 1},
}


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    return one_layer(**NETWORKS[request.param])


def nearest_known(ids: list[int]) -> list[int]:
    """What logits processors see: a hidden token copies the nearest known one to its left, else to its right."""
    known = [i for i, each in enumerate(ids) if each != MASK]
    sources = [max((k for k in known if k <= i), default=min(known, default=None)) for i in range(len(ids))]
    return [0 if source is None else ids[source] for source in sources]


def naive_pass(model, ids: list[int], processor=None) -> list[tuple[float, int, int]]:
    """(probability, column, id) of each hidden token's proposal, the most confident first, of equals the leftmost."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    found = []
    for column in (i for i, each in enumerate(ids) if each == MASK):
        scores = logits[column : column + 1].clone()
        if processor is not None:
            scores = processor(torch.tensor([nearest_known(ids)]), scores)
        weights = [math.exp(each) for each in scores[0].tolist()]
        best = max(range(len(weights)), key=lambda v: (weights[v], -v))
        found.append((weights[best] / sum(weights), column, best))
    equals: list[list[tuple[float, int, int]]] = []
    for each in sorted(found, reverse=True):
        if equals and equals[-1][-1][0] - each[0] <= 2**-16 * equals[-1][-1][0]:  # rounding
            equals[-1].append(each)
        else:
            equals.append([each])
    return [each for some in equals for each in sorted(some, key=lambda each: each[1])]


def naive_decode(model, ids, num_steps: int, eos=(), new: range = range(0), processor=None) -> tuple[list[int], int]:
    """(ids, passes) of one row without padding; after the first of `eos` among the columns `new` the mask token."""
    ids, passes = list(ids), 0
    num_steps = min(num_steps, ids.count(MASK))

    def kept() -> list[int]:
        end = min((i for i in new if ids[i] in eos), default=len(ids))
        return [i for i in range(len(ids)) if i <= end or i not in new]

    while any(ids[i] == MASK for i in kept()):
        for _, column, best in naive_pass(model, ids, processor)[: math.ceil(ids.count(MASK) / (num_steps - passes))]:
            ids[column] = best
        passes += 1
    return [each if i in kept() else MASK for i, each in enumerate(ids)], passes


def rows_to_fill() -> list[list[int]]:
    """Rows of different lengths and numbers of hidden tokens, in prompts and behind them."""
    full = prompts(4, 6).tolist()
    return [full[0][:4], [full[1][0], MASK, full[1][1], MASK, MASK, full[1][2]], full[2][:1], [MASK, full[3][0], MASK]]


# The decode


def naive_stages(model, ids: list[int]) -> tuple[list[int], int]:
    """(ids, passes) of a coarse-first model: in each phase one stage a pass, the surest first."""
    codes, base = model.code_table.codes[:-1], model.config.base
    state, passes = model.encode(torch.tensor([ids])), 0
    while (state == base).any():
        shown = (state[0] != base).sum(1)
        with torch.no_grad():
            q = model(subtoken_ids=state).logits[0].double().softmax(-1)
        end = min(end for end in model.config.stage_digits if end > int(shown.min()))
        best = None
        for column in (i for i in range(len(ids)) if shown[i] == shown.min()):
            sums: dict[tuple, float] = {}
            for v, code in enumerate(codes.tolist()):
                sums[tuple(code[:end])] = sums.get(tuple(code[:end]), 0) + float(q[column, v])
            if best is None or max(sums.values()) > best[0]:
                best = max(sums.values()), column, codes[int(q[column].argmax()), :end]
        state[0, best[1], :end] = best[2]  # the digits of the likeliest token
        passes += 1
    return model.decode(state)[0].tolist(), passes


def test_a_coarse_first_model_decodes_stage_by_stage_and_is_compared_so():
    model = one_layer(**COARSE_FIRST).double()
    for row in rows_to_fill()[1:]:
        given = [*row, MASK, MASK]
        expected, passes = naive_stages(model, given)
        out = model.generate(torch.tensor([row]), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        assert out.sequences[0].tolist() == expected and out.num_forward.item() == passes == 2 * given.count(MASK)
        hidden = torch.tensor([[each == MASK for each in given]])
        found = model.greedy_matches(torch.tensor([expected]), None, hidden)
        assert found.matches.item() and found.num_forward.item() == passes
        last = int(hidden.nonzero()[-1, 1])
        wrong = [(each + 1) % MASK if i == last else each for i, each in enumerate(expected)]
        found = model.greedy_matches(torch.tensor([wrong]), None, hidden)
        assert not found.matches.item() and found.num_forward.item() <= passes


@pytest.mark.parametrize("num_steps", [1, 4, 300])
def test_ids_and_passes_are_those_of_the_naive_loop_for_every_padding_and_batch(model, num_steps):
    rows, suffix, options = rows_to_fill(), [11, MASK], {"max_new_tokens": 5, "max_denoising_steps": num_steps}
    expected = [naive_decode(model, [*row, *[MASK] * 5, *suffix], num_steps) for row in rows]
    for side in ("left", "right", "both"):
        ids, mask = torch.full((4, 8), 999), torch.zeros(4, 8, dtype=torch.long)
        starts = [{"left": 8 - len(row), "right": 0, "both": 1}[side] for row in rows]
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), 1
        for turn in ([0, 1, 2, 3], [2, 0], [3]):
            out = model.generate(
                ids[turn],
                mask[turn],
                torch.tensor([suffix]).repeat(len(turn), 1),
                do_sample=False,
                return_dict_in_generate=True,
                **options,
            )
            for i, found, passes in zip(turn, out.sequences, out.num_forward.tolist(), strict=True):
                start, end = starts[i], starts[i] + len(rows[i])
                assert torch.equal(found[:8][mask[i] == 0], ids[i][mask[i] == 0])
                assert ([*found[start:end].tolist(), *found[8:].tolist()], passes) == expected[i]


def test_the_reveal_order_of_the_training_changes_nothing():
    made = [one_layer(**NETWORKS[name]).generate(prompts(2, 4), do_sample=False) for name in ("digit", "nested")]
    assert torch.equal(*made)


def test_hidden_tokens_are_spread_over_the_steps_the_larger_shares_first():
    left = []

    def count(ids, scores):
        left.append((ids == MASK).sum(1).tolist())
        return torch.zeros(len(ids), dtype=torch.bool)

    prompt = torch.tensor([[1, 2, 3], [1, MASK, MASK]])
    options = {"max_new_tokens": 8, "max_denoising_steps": 3, "do_sample": False, "return_dict_in_generate": True}
    out = one_layer().generate(prompt, stopping_criteria=[count], **options)
    assert left == [[5, 6], [2, 3], [0, 0]]
    assert out.num_forward.tolist() == [3, 3]
    assert out.tokens_per_forward.tolist() == [8 / 3, 10 / 3]


def test_equal_tokens_fall_to_the_lowest_id_and_equal_confidence_to_the_left():
    model, seen = one_layer(), []
    torch.nn.init.zeros_(model.lm_head.weight)

    def record(ids, scores):
        seen.append((ids[0, 1:] == MASK).tolist())
        return torch.tensor([False])

    ids = torch.tensor([[5, MASK, MASK, MASK]])
    out = model.generate(ids, max_length=4, do_sample=False, stopping_criteria=[record])
    assert out.tolist() == [[5, 0, 0, 0]]
    assert seen == [[False, True, True], [False, False, True], [False, False, False]]


def test_confidence_is_the_float64_probability_of_the_proposal():
    """Where float32 says 1 for both: 1 - 1e-12 against 1 - 1e-9."""
    logits = torch.tensor([[0.0, math.log(1e-9), -torch.inf], [math.log(1e-12), 0.0, -torch.inf]], dtype=torch.double)
    ids, confidence = proposals(logits)
    assert ids.tolist() == [0, 1]
    # Two roundings of a sum near 1.
    torch.testing.assert_close(1 - confidence, torch.tensor([1e-9, 1e-12], dtype=torch.double), rtol=0, atol=5e-16)
    chosen = most_confident(torch.tensor([[0.2, -1.0, 0.5, 0.5], [0.1, 0.1, 0.1, -1.0]]), torch.tensor([1, 2]))
    assert chosen.tolist() == [[False, False, True, False], [True, True, False, False]]
    equal = most_confident(torch.full((1, 40_000), 0.5), torch.tensor([9]))  # an unstable sort mixes so many
    assert equal.nonzero()[:, 1].tolist() == list(range(9))


def test_after_the_first_eos_comes_padding_though_tokens_to_its_left_may_be_known_later(model):
    prompt, num_new = prompts(12, 2), 10
    free = model.generate(prompt, max_new_tokens=num_new, do_sample=False)[:, 2:]
    eos = free.flatten().bincount().argsort(descending=True)[:2].tolist()  # so that some rows have several
    for num_steps in (4, 300):
        out = model.generate(
            prompt,
            suffix_ids=prompt[:, :1],
            max_new_tokens=num_new,
            max_denoising_steps=num_steps,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=3,
            return_dict_in_generate=True,
        )
        shorter = 0
        for row, found, passes in zip(prompt.tolist(), out.sequences.tolist(), out.num_forward.tolist(), strict=True):
            given = [*row, *[MASK] * num_new, row[0]]
            ids, expected_passes = naive_decode(model, given, num_steps, eos, range(2, 2 + num_new))
            assert (found, passes) == ([3 if each == MASK else each for each in ids], expected_passes)
            unstopped, all_passes = naive_decode(model, given, num_steps)
            assert ids == [MASK if each == MASK else free for each, free in zip(ids, unstopped, strict=True)]
            shorter += passes < all_passes
        assert shorter, "some rows stop before all is known"


def test_an_eos_known_first_waits_for_the_tokens_to_its_left():
    """A logits processor makes the third of five tokens the first to be known, as EOS."""
    model, drafts = one_layer(), []

    def eos_in_the_middle(ids, scores):
        if len(scores) == 5:
            scores[2, 7] += 40.0
        return scores

    def record(ids, scores):
        drafts.append(ids[0, 1:].tolist())
        return torch.tensor([False])

    options = {"max_new_tokens": 5, "do_sample": False, "logits_processor": [eos_in_the_middle]}
    free = model.generate(torch.tensor([[1]]), **options)[0, 1:].tolist()
    out = model.generate(torch.tensor([[1]]), eos_token_id=7, pad_token_id=3, stopping_criteria=[record], **options)
    assert drafts[0] == [MASK, MASK, 7, MASK, MASK] and 7 not in free[:2]
    assert out[0, 1:].tolist() == [*free[:3], 3, 3]
    assert MASK not in drafts[-1][:2] and all(MASK in draft[:2] for draft in drafts[:-1])


@pytest.mark.parametrize("processor", [NoRepeatNGramLogitsProcessor(1), NoRepeatNGramLogitsProcessor(2)])
def test_logits_processors_decide_ids_and_confidence(processor):
    model = one_layer()
    for row in rows_to_fill():
        given = [*row, *[MASK] * 5]
        expected, _ = naive_decode(model, given, 4, processor=processor)
        options = {"max_length": len(given), "max_denoising_steps": 4, "do_sample": False}
        assert model.generate(torch.tensor([given]), logits_processor=[processor], **options).tolist() == [expected]


def test_stopping_criteria_finish_their_rows_with_one_more_pass():
    model, prompt, seen = one_layer(), prompts(2, 4), []

    def second_row(ids, scores):
        seen.append(ids)
        return torch.tensor([False, True])

    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    free = model.generate(prompt, **options)
    out = model.generate(prompt, stopping_criteria=[second_row], **options)
    assert out.num_forward.tolist() == [10, 2]
    assert torch.equal(out.sequences[0], free.sequences[0])
    draft = seen[0][1]
    likeliest = model(draft[None]).logits[0].argmax(-1)
    assert torch.equal(out.sequences[1], torch.where(draft == MASK, likeliest, draft))


# Options


def test_sampling_options_are_ignored_below_do_sample_false_and_refused_beside_or_above_it():
    model, prompt = one_layer(), prompts(1, 4)
    greedy = model.generate(prompt, max_new_tokens=6, do_sample=False)
    model.generation_config = PrimeV2GenerationConfig(max_new_tokens=6, temperature=0.5, top_p=0.9, seed=3)
    sampled = model.generate(prompt)
    assert torch.equal(model.generate(prompt, do_sample=False), greedy)
    assert torch.equal(model.generate(prompt, generation_config=GenerationConfig(do_sample=False)), greedy)
    assert torch.equal(model.generate(prompt, do_sample=False, temperature=1.0, top_p=1.0, seed=None), greedy)
    assert torch.equal(model.generate(prompt, do_sample=None), sampled)
    with pytest.raises(
        ValueError, match="do_sample=False, the deterministic decode, has no use for seed=4; leave seed"
    ):
        model.generate(prompt, do_sample=False, seed=4)
    model.generation_config = PrimeV2GenerationConfig(max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(prompt), greedy)
    with pytest.raises(
        ValueError, match=r"has no use for temperature=0\.7; leave temperature out, or give do_sample=T"
    ):
        model.generate(prompt, temperature=0.7)
    options = {"temperature": 0.5, "top_p": 0.9, "seed": 3}
    for do_sample in (True, None):
        assert torch.equal(model.generate(prompt, do_sample=do_sample, **options), sampled)


# greedy_matches


def texts(model) -> tuple[list[list[int]], list[list[bool]]]:
    """Texts with targets inside and at the end: what the decode gives, and the same with one target changed."""
    rng, rows, targets = random.Random(0), [], []
    for length, count in ((3, 1), (9, 4), (12, 12), (7, 3), (12, 5)):
        hidden = rng.sample(range(length), count)
        given = [MASK if i in hidden else rng.randrange(50) for i in range(length)]
        decoded, _ = naive_decode(model, given, count)
        for changed in [None, *rng.sample(hidden, min(3, count))]:
            rows.append([(each + 1) % 50 if i == changed else each for i, each in enumerate(decoded)])
            targets.append([i in hidden for i in range(length)])
    return rows, targets


def naive_greedy_matches(model, row: list[int], target: list[bool]) -> tuple[bool, int]:
    """Whether the naive decode gives the row, and its pass that reveals the first wrong token, or the last one."""
    ids, passes = [MASK if hidden else each for each, hidden in zip(row, target, strict=True)], 0
    while MASK in ids:
        _, column, best = naive_pass(model, ids)[0]
        ids[column], passes = best, passes + 1
        if best != row[column]:
            return False, passes
    return True, passes


def pad(rows: list[list[int]], targets: list[list[bool]], width: int, before: int) -> tuple[torch.Tensor, ...]:
    """(ids, attention mask, target mask); padding is a target like any, and an id that no token has."""
    ids = torch.full((len(rows), width), -7)
    mask, target = torch.zeros(len(rows), width, dtype=torch.long), torch.ones(len(rows), width, dtype=torch.bool)
    for i, (row, hidden) in enumerate(zip(rows, targets, strict=True)):
        start = min(before, width - len(row))
        part = (i, slice(start, start + len(row)))
        ids[part], mask[part], target[part] = torch.tensor(row), 1, torch.tensor(hidden)
    return ids, mask, target


def test_greedy_matches_is_the_decode_and_a_comparison(model):
    rows, targets = texts(model)
    results = []
    for row, hidden in zip(rows, targets, strict=True):
        ids = torch.tensor([[MASK if each else token for token, each in zip(row, hidden, strict=True)]])
        out = model.generate(ids, max_length=len(row), do_sample=False, max_denoising_steps=300)
        results.append(out[0].tolist() == row)
    naive = [naive_greedy_matches(model, row, hidden) for row, hidden in zip(rows, targets, strict=True)]
    assert results == [each for each, _ in naive] and 5 <= sum(results) < len(results)
    for before in (0, 2, 13):
        found = model.greedy_matches(*pad(rows, targets, 13, before))
        assert found.matches.dtype == torch.bool and found.matches.tolist() == results
        assert found.num_forward.tolist() == [passes for _, passes in naive]


def test_rows_stop_at_their_first_wrong_token_and_share_passes_within_the_budget():
    model, seen = one_layer(), []
    rows, targets = texts(model)
    expected = model.greedy_matches(*pad(rows, targets, 12, 0))
    hook = model.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[:2]))
    for budget in (1, 30, 8192):
        seen.clear()
        found = model.greedy_matches(*pad(rows, targets, 12, 0), tokens_per_pass=budget)
        assert [each.tolist() for each in found] == [each.tolist() for each in expected]
        assert sum(batch for batch, _ in seen) == found.num_forward.sum()
        assert all(batch == 1 or batch * width <= budget for batch, width in seen)
        assert len(seen) >= found.num_forward.max() and (len(seen) == found.num_forward.max()) == (budget == 8192)
    hook.remove()


IDS, TARGET = torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]])
