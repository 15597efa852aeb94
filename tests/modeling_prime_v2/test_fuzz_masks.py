"""Any padding, prompt mask, labels and mask ids: each row as if it stood alone without padding, or a refusal."""

import pytest
import torch
from fuzzing import Refusal, attempt, cases
from hypothesis import given
from hypothesis import strategies as st
from networks import KINDS, LIMIT, VOCAB_SIZE, network

TOLERANCE = 1e-4  # float32 logits: the shape of a batch changes the order of sums
MASK_TYPES = [torch.long, torch.bool, torch.int32, torch.float32, torch.uint8]
ID_TYPES = [torch.long, torch.long, torch.int32, torch.int16, torch.uint8, torch.float32]
PADDING = [0, 5, VOCAB_SIZE, VOCAB_SIZE + 1, -100, 10**9]


@st.composite
def batches(draw, most_rows=3, most_columns=LIMIT + 1):
    """(ids, which are real, which of these are given), lists of rows; mostly right, and one time in eight not."""
    rows, columns = draw(st.integers(1, most_rows)), draw(st.integers(1, most_columns))
    grid = st.lists(
        st.lists(st.integers(0, 9), min_size=columns, max_size=columns), min_size=rows, max_size=rows
    )  # of digits, from which choices follow
    ids = [[draw(st.integers(0, VOCAB_SIZE - 1)) for _ in range(columns)] for _ in range(rows)]
    padded, prompt = draw(st.sampled_from([0, 3, 5])), draw(st.sampled_from([0, 3, 8]))
    real = [[digit >= padded for digit in row] for row in draw(grid)]
    given_ = [[digit < prompt for digit in row] for row in draw(grid)]
    if not draw(st.integers(0, 7)):
        ids[draw(st.integers(0, rows - 1))][draw(st.integers(0, columns - 1))] = draw(st.sampled_from(PADDING))
    return ids, real, given_


def tensors(case, fill, mask_type, id_type):
    """ids with `fill` where there is padding, the attention mask and the prompt mask."""
    ids, real, given_ = case
    bounds = torch.iinfo(id_type) if not id_type.is_floating_point else torch.finfo(id_type)
    fill = int(min(max(fill, bounds.min), bounds.max))
    filled = [[each if keep else fill for each, keep in zip(*row, strict=True)] for row in zip(ids, real, strict=True)]
    filled = [[int(min(max(each, bounds.min), bounds.max)) for each in row] for row in filled]
    return (
        torch.tensor(filled).to(id_type),
        torch.tensor(real).to(mask_type),
        torch.tensor(given_).to(mask_type),
    )


def row_of(case, row):
    """(ids, given) of a row without its padding."""
    ids, real, given_ = (each[row] for each in case)
    kept = [i for i, keep in enumerate(real) if keep]
    return [ids[i] for i in kept], [given_[i] for i in kept]


def is_right(case, kind) -> bool:
    """Whether there is a likelihood of every row."""
    for row in range(len(case[0])):
        ids, given_ = row_of(case, row)
        if not ids or all(given_) or len(ids) > LIMIT or not all(0 <= each < VOCAB_SIZE for each in ids):
            return False
    return True


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_likelihood_of_a_row_is_that_of_the_row_alone(kind):
    model = network(kind)

    @cases(8, 250)
    @given(
        batches(),
        st.sampled_from(PADDING),
        st.sampled_from(MASK_TYPES),
        st.sampled_from(ID_TYPES),
        st.sampled_from(model.likelihood_methods),
        st.integers(1, 40),
    )
    def check(case, fill, mask_type, id_type, method, tokens_per_pass):
        ids, real, given_ = tensors(case, fill, mask_type, id_type)
        options = {"method": method, "num_samples": 3, "seed": 7}
        found = attempt(
            f"likelihood of {kind}",
            lambda: model.log_likelihood(ids, real, given_, tokens_per_pass=tokens_per_pass, **options),
        )
        if isinstance(found, Refusal):
            assert not is_right(case, kind) or id_type not in (torch.long, torch.int32), found
            return
        assert is_right(case, kind)
        for row in range(len(ids)):
            alone, prompt = (torch.tensor([each]) for each in row_of(case, row))
            expected = model.log_likelihood(alone, prompt_mask=prompt, **options)
            assert found.num_scored[row] == (~prompt).sum()
            assert found.value[row].item() == pytest.approx(expected.value.item(), abs=TOLERANCE * alone.numel() * 4)

    check()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uniform"])
def test_the_logits_of_a_row_are_those_of_the_row_alone(kind):
    """Masked tokens anywhere; logits at padding may be anything. Positions are given, as Transformers wants it."""
    model = network(kind)
    most = VOCAB_SIZE - 1 if kind.startswith("ARM") else VOCAB_SIZE

    @cases(6, 150)
    @given(batches(), st.sampled_from(PADDING[:3]), st.sampled_from(MASK_TYPES), st.sampled_from(ID_TYPES))
    def check(case, fill, mask_type, id_type):
        ids, real, _ = tensors(case, min(fill, most), mask_type, id_type)
        places = (real.long().cumsum(1) - 1).clamp(min=0)
        found = attempt(f"logits of {kind}", lambda: model(ids, real, position_ids=places).logits)
        rows = [row_of(case, row)[0] for row in range(len(ids))]
        right = all(rows) and ids.shape[1] <= LIMIT and all(0 <= each <= most for row in rows for each in row)
        if isinstance(found, Refusal):
            assert not right or id_type not in (torch.long, torch.int32), found
            return
        assert right
        for row, alone in enumerate(rows):
            expected = model(torch.tensor([alone])).logits[0]
            torch.testing.assert_close(found[row][real[row].bool()], expected, rtol=0, atol=TOLERANCE * 10)

    check()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "interpolating"])
def test_the_loss_of_a_batch_is_the_sum_over_its_rows_alone(kind):
    """Over the scored tokens, with the noise of each row given by its key."""
    model = network(kind)

    @cases(8, 250)
    @given(batches(), st.sampled_from(PADDING[:3]), st.integers(0, 2**62), st.floats(0.01, 0.99))
    def check(case, fill, key, level):
        ids, real, given_ = tensors(case, min(fill, VOCAB_SIZE - 1), torch.long, torch.long)
        labels = ids.masked_fill((real == 0) | (given_ == 1), -100)
        keys = torch.arange(len(ids)) + key
        levels = torch.full((len(ids),), level, dtype=torch.double)
        noise = {"noise_keys": keys, "noise_levels": levels}
        if not kind.startswith("ARM"):  # which moves padding behind the text itself
            noise["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
        found = attempt(f"loss of {kind}", lambda: model(ids, real, labels=labels, **noise).loss)
        rows = [row_of(case, row) for row in range(len(ids))]
        scored = sum(not each for _, prompt in rows for each in prompt)
        most = VOCAB_SIZE - 1 if kind.startswith("ARM") or kind == "uniform" else VOCAB_SIZE
        allowed = all(
            0 <= each <= (most if is_given else VOCAB_SIZE - 1)
            for row in rows
            for each, is_given in zip(*row, strict=True)
        )
        if isinstance(found, Refusal):
            assert not (scored and allowed and all(row[0] for row in rows) and ids.shape[1] <= LIMIT), found
            return
        assert scored and allowed
        total = 0.0
        for row, (alone, prompt) in enumerate(rows):
            if all(prompt):
                continue
            targets = [-100 if is_given else each for each, is_given in zip(alone, prompt, strict=True)]
            noise = {"noise_keys": keys[row : row + 1], "noise_levels": levels[row : row + 1]}
            total += model(
                torch.tensor([alone]), labels=torch.tensor([targets]), num_items_in_batch=1, **noise
            ).loss.item()
        assert found.item() * scored == pytest.approx(total, abs=TOLERANCE * ids.numel() * 10)

    check()


NOT_MASKS = [float("-inf"), float("inf"), float("nan"), -1.0, 0.5, 2.0, -1e-9, -3.4028234663852886e38, 255.0]
MASKS = ["attention_mask", "prompt_mask", "target_mask", "loss", "forward", "generate"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.long, torch.int8]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_mask_of_another_convention_is_refused_and_one_of_zeros_and_ones_means_what_it_says(kind):
    """Every public function that takes a mask, with one wrong value anywhere in it or none."""
    model, ids = network(kind), torch.tensor([[1, 2, 3], [4, 5, 6]])
    times = {"times": torch.full((2,), 0.5)} if kind == "uniform" else {}
    noise = {"noise_keys": torch.arange(2), "noise_levels": torch.full((2,), 0.5, dtype=torch.double)}

    scored = {"method": model.bound_method, "num_samples": 2}

    @cases(15, 250)
    @given(
        st.lists(st.booleans(), min_size=6, max_size=6),
        st.sampled_from(NOT_MASKS),
        st.integers(0, 5),
        st.sampled_from(DTYPES),
        st.sampled_from(MASKS),
        st.booleans(),
    )
    def check(drawn, value, place, dtype, where, is_wrong):
        real = torch.tensor(drawn).view(2, 3)
        real[:, -1] = True  # no row of only padding, and something to score
        last = torch.arange(3) == 2  # the targets of an ARM are the last tokens
        mask = {"prompt_mask": ~real, "target_mask": last.expand(2, 3)}.get(where, real)
        labels = ids.masked_fill(~real, -100)
        call = {
            "attention_mask": lambda each: model.log_likelihood(ids, each, **scored).value,
            "prompt_mask": lambda each: model.log_likelihood(ids, prompt_mask=each, **scored).value,
            "target_mask": lambda each: model.greedy_matches(ids, real, each).matches,
            "loss": lambda each: model(ids, each, labels=labels, **noise).loss,
            "forward": lambda each: model(ids, each, **times).logits[real],
            "generate": lambda each: model.generate(ids, each, max_new_tokens=2, seed=0),
        }[where]
        numbers = mask.to(dtype)
        if is_wrong:
            numbers[place // 3, place % 3] = value if dtype.is_floating_point else 2
        wrong = ((numbers != 0) & (numbers != 1)).any().item()  # float16 rounds the smallest value to 0
        found = attempt(f"mask of {where} of {kind}", lambda: call(numbers))
        if isinstance(found, Refusal):
            assert wrong and "but a mask is bool, or 1 for what counts and 0 for the rest" in found.sentence, found
            return
        assert not wrong
        expected = call(mask)
        if not is_wrong:
            assert torch.equal(found, expected)

    check()
