"""What `greedy_matches` promises whatever the family. A new entry of `FAMILIES` falls under all of it."""

import pytest
import torch
from networks import KINDS, LIMIT, VOCAB_SIZE, network, padded, some_ids

MASK = VOCAB_SIZE
IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture(params=list(KINDS))
def model(request):
    return network(request.param)


def decoded(model, row: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The row with its targets decoded one at a time."""
    if not target.any():
        return row
    if model.config.causal:
        return model.generate(row[~target][None], max_new_tokens=int(target.sum()), do_sample=False)[0]
    return model.generate(row.masked_fill(target, MASK)[None], max_length=len(row), do_sample=False)[0]


def texts(model) -> tuple[list[torch.Tensor], list[torch.Tensor], list[bool]]:
    """Texts with targets (inside too, where the model fills in): what the decode gives, and with one token changed."""
    rows, targets, expected = [], [], []
    inside = [] if model.config.causal else [(8, [1, 3, 4]), (5, [0, 1, 2, 3, 4])]
    for length, places in [(3, [2]), (8, [5, 6, 7]), (6, []), *inside]:
        target = torch.zeros(length, dtype=torch.bool).index_fill(0, torch.tensor(places, dtype=torch.long), True)
        row = decoded(model, some_ids(1, length, seed=length)[0], target)
        for changed in (None, *places):
            rows.append(row.clone())
            if changed is not None:
                rows[-1][changed] = (row[changed] + 1) % VOCAB_SIZE
            targets.append(target)
            expected.append(changed is None)
    return rows, targets, expected


def test_greedy_matches_is_the_decode_and_a_comparison(model):
    rows, targets, expected = texts(model)
    for side in ("left", "right", "both"):
        ids, mask = padded(rows, side, 9, fill=99)
        target = padded([each.long() for each in targets], side, 9, fill=1)[0].bool()  # padding is no target
        before = ids.clone()
        for tokens_per_pass in (1, 20, 8192):
            seen = []
            hook = model.model.register_forward_hook(lambda module, args, output, seen=seen: seen.append(len(args[0])))
            found = model.greedy_matches(ids, mask, target, tokens_per_pass=tokens_per_pass)
            hook.remove()
            assert found.matches.dtype == torch.bool and found.matches.tolist() == expected
            assert [each > 0 for each in found.num_forward.tolist()] == [bool(each.any()) for each in targets]
            assert tokens_per_pass > 1 or (len(seen) >= found.num_forward.sum() and set(seen) == {1})
        assert torch.equal(ids, before)


BAD_TEXTS = {
    "one axis": ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\); give \(B, L\)"),
    "target": ({"target_mask": torch.ones(1, 2)}, r"target_mask has shape \(1, 2\), but input_ids \(1, 3\)"),
    "mask": ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\), but input_ids \(1, 3\)"),
    "mask token": ({"input_ids": torch.tensor([[1, MASK, 3]])}, r"token ids span \[1, 11\]"),
    "too long": (
        {"input_ids": some_ids(1, LIMIT + 1), "target_mask": torch.arange(LIMIT + 1)[None] > 2},
        "13 tokens, but max_position_embeddings=12",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_texts_that_cannot_be_compared_are_refused(model, case):
    arguments, message = BAD_TEXTS[case]
    with pytest.raises(ValueError, match=message):
        model.greedy_matches(**{"input_ids": IDS, "attention_mask": None, "target_mask": IDS == 3, **arguments})
