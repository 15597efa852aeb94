"""Files of others and the lit_gpt layout: what is read, what is refused, and the sentence of each refusal."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prime_v2.hub_card.convert import Sizes, check_rows, codes_of, our_weights, sizes_of, split_fused
from prime_v2.hub_card.convert_files import read_permutation, read_tensors

D, FFN, ROWS, DIGITS = 8, 12, 20, 5


def checkpoint(table=3 * DIGITS, width=D, layers=2, groups=2) -> dict[str, torch.Tensor]:
    """Two heads of size 4; every value differs."""
    shapes = {"transformer.wte.weight": (table, width), "transformer.ln_f.weight": (D,), "lm_head.weight": (ROWS, D)}
    for i in range(layers):
        layer = {"norm_1": (D,), "norm_2": (D,), "attn.attn": (D + 8 * groups, D), "attn.proj": (D, D)}
        layer |= {"mlp.swiglu.w1": (FFN, D), "mlp.swiglu.w2": (FFN, D), "mlp.swiglu.w3": (D, FFN)}
        shapes |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in layer.items()}
    tensors, first = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = torch.arange(first, first + size, dtype=torch.float32).reshape(shape)
        first += size
    return tensors


def sentence(error) -> str:
    return str(error.value)


def refusal(tensors, base=2, coded=True, num_heads=2) -> str:
    with pytest.raises(ValueError) as error:
        sizes_of(tensors, base, coded, num_heads)
    return sentence(error)


def test_sizes_are_read_from_the_shapes():
    found = sizes_of(checkpoint(), base=2, coded=True, num_heads=2)
    assert found == Sizes(ROWS, D, FFN, 2, 2, 2, 2, DIGITS, "sum")
    assert sizes_of(checkpoint(groups=1), 2, True, 2).num_key_value_heads == 1
    # 6 values a digit of base 5; one vector a token and one for the mask.
    assert sizes_of(checkpoint(table=12), base=5, coded=True, num_heads=2).num_subtokens == 2
    whole = sizes_of(checkpoint(table=ROWS + 1), base=2, coded=False, num_heads=2)
    assert (whole.base, whole.num_subtokens) == (ROWS, 1)
    assert sizes_of(checkpoint(table=12, width=2), 2, True, 2).embedding == "concat"


def test_unknown_and_missing_names_are_named():
    tensors = checkpoint()
    tensors["transformer.h.1.attn.attn.bias"] = torch.zeros(1)
    del tensors["transformer.h.0.norm_2.weight"]
    found = refusal(tensors)
    assert "unknown transformer.h.1.attn.attn.bias; missing transformer.h.0.norm_2.weight" in found
    assert "missing lm_head.weight" in refusal({"something": torch.zeros(2)})
    tensors = checkpoint(layers=3)
    tensors = {name: tensor for name, tensor in tensors.items() if ".h.1." not in name}
    assert re.search(r"unknown transformer.h.2.*and 4 more; missing transformer.h.1.*and 4 more", refusal(tensors))


def test_shapes_that_do_not_fit_are_named_with_the_shape_that_would():
    tensors = checkpoint()
    tensors["transformer.h.1.mlp.swiglu.w3.weight"] = torch.zeros(FFN, D)
    tensors["transformer.h.0.attn.proj.weight"] = torch.zeros(D)
    found = refusal(tensors)
    assert "transformer.h.1.mlp.swiglu.w3.weight (12, 8) instead of (8, 12)" in found
    assert "transformer.h.0.attn.proj.weight (8,) instead of (8, 8)" in found
    tensors = checkpoint()
    tensors["lm_head.weight"] = torch.zeros(())
    assert "lm_head.weight () instead of (0, 8)" in refusal(tensors)


@pytest.mark.parametrize(
    ("tensors", "options", "part"),
    [
        (checkpoint(), {"num_heads": None}, "give it, e.g. --num-heads 1"),
        (checkpoint(), {"num_heads": 3}, "--num-heads 3 does not divide the hidden size 8"),
        (checkpoint(groups=1), {"num_heads": 1}, "give the model's own --num-heads"),
        (checkpoint(table=16), {}, "has 16 rows, which are no 3 values"),
        (checkpoint(table=3 * 4000), {}, "which are no 3 values for each of a few digits"),
        (checkpoint(table=9, width=2), {}, "zeros, which this network cannot express"),
        (checkpoint(width=3), {}, "has width 3; 5 digits of base 2 need the hidden size 8"),
        (checkpoint(table=ROWS), {"coded": False}, "this is an autoregressive model"),
        (checkpoint(), {"coded": False}, "so vectors of 5 digits of base 2; give the file of the permutation"),
        (checkpoint(table=ROWS + 1, width=4), {"coded": False}, "is (21, 4); a model of whole tokens has (21, 8)"),
    ],
)
def test_what_cannot_be_expressed_is_said(tensors, options, part):
    assert part in refusal(tensors, **options)


def test_a_fused_projection_holds_groups_of_queries_a_key_and_a_value():
    """Rows named by hand: two groups of two query heads of size 2."""
    sizes = Sizes(ROWS, D, FFN, 1, 4, 2, 2, DIGITS)
    rows = ["q0", "q0", "q1", "q1", "k0", "k0", "v0", "v0", "q2", "q2", "q3", "q3", "k1", "k1", "v1", "v1"]
    weight = torch.arange(16.0)[:, None].expand(16, D)
    parts = split_fused(weight, sizes)
    for name, part in parts.items():
        found = [rows[int(row)] for row in part[:, 0]]
        assert found == sorted(row for row in rows if row.startswith(name))


def test_every_value_arrives_once_in_one_type():
    tensors = checkpoint()
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"].to(torch.float64)
    sizes = sizes_of(tensors, 2, True, 2)
    ours = our_weights(tensors, sizes, ROWS)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float64}
    values = torch.cat([tensor.flatten() for tensor in ours.values()])
    assert values.sort().values.tolist() == list(range(len(values)))
    assert len(values) == sum(tensor.numel() for tensor in tensors.values())
    assert our_weights(tensors, sizes, 18)["lm_head.weight"].shape == (18, D)
    tensors["lm_head.weight"][3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"lm_head\.weight has values that are not finite"):
        our_weights(tensors, sizes, ROWS)


def test_rows_without_a_token_are_dropped_only_when_asked():
    sizes = sizes_of(checkpoint(), 2, True, 2)
    check_rows(sizes, ROWS, drop_padding=False)
    check_rows(sizes, 18, drop_padding=True)
    with pytest.raises(ValueError, match="--drop-padding if the last 2 rows are padding"):
        check_rows(sizes, 18, drop_padding=False)
    with pytest.raises(ValueError, match="the tokenizer has 21 tokens"):
        check_rows(sizes, 21, drop_padding=True)


def test_codes_are_the_digits_of_the_permuted_id():
    sizes = sizes_of(checkpoint(), 2, True, 2)
    permutation = torch.arange(31, -1, -1)
    assert codes_of(permutation, sizes, ROWS)[[0, 1, 19]].tolist() == [[1] * 5, [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]
    assert torch.equal(codes_of(permutation[:ROWS], sizes, ROWS), codes_of(permutation, sizes, ROWS))
    for wrong in (permutation[:-1], permutation + 1, torch.arange(64)):
        with pytest.raises(
            ValueError, match=r"it must have 32 values, or one for each of the 20 tokens, in \[0, 31\]"
        ):
            codes_of(wrong, sizes, ROWS)
    with pytest.raises(ValueError, match="the tokenizer has 33 tokens, more than the 32 codes"):
        codes_of(permutation, sizes, 33)


@pytest.mark.parametrize("name", ["perm.pt", "perm.npy", "perm.json"])
def test_permutations_are_read_and_a_doubled_value_is_named(tmp_path, name):
    path = tmp_path / name

    def write(values):
        if name.endswith(".pt"):
            torch.save(torch.tensor(values), path)
        elif name.endswith(".npy"):
            np.save(path, np.array(values))
        else:
            path.write_text(json.dumps(values))

    write([4, 2, 0, 1, 3])
    assert read_permutation(path).tolist() == [4, 2, 0, 1, 3]
    write([4, 2, 0, 2, 3])
    with pytest.raises(ValueError, match="has the value 2 twice, for the tokens 1 and 3"):
        read_permutation(path)
    write([0.0, 1.0])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_permutation(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [('{"a": 1}', "JSON list of integers"), ("[true, 1]", "JSON list"), ("[1,", "JSON list"), ("[]", "one row of")],
)
def test_json_that_is_no_row_of_integers_is_refused(tmp_path, content, part):
    (tmp_path / "perm.json").write_text(content)
    with pytest.raises(ValueError, match=part):
        read_permutation(tmp_path / "perm.json")
    with pytest.raises(ValueError, match="is not a file; give a .pt"):
        read_permutation(tmp_path / "other.json")


def test_tensors_are_read_from_every_kind_of_file(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save({"model": tensors, "iter_num": 7}, tmp_path / "training.pth")
    torch.save(tensors, tmp_path / "bare.pth")
    torch.save({"state_dict": tensors}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "model.safetensors")
    for path in tmp_path.iterdir():
        found = read_tensors(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_files_without_tensors_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    for content, part in (
        ([1, 2], "holds list and no tensors by name"),
        ({}, "holds dict and no tensors by name"),
        ({"a": 3}, "a is int; it must be a tensor"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "a is torch.int64; it must be a tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=part):
            read_tensors(path)
    for junk in (b"", b"junk that is no archive", b"PK\x03\x04junk"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="is no file that can be read without running code of it"):
            read_tensors(path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"is no \.safetensors file"):
        read_tensors(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a file; give the checkpoint"):
        read_tensors(tmp_path)
