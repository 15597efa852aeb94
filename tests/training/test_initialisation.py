"""Vectors from the text as first weights: what each token's vector and row of the head then are, in every family."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import MODEL, TINY, write_text

from prime_v2 import PrimeV2Tokenizer
from prime_v2.data.packing import PackedBlocks, TrainingOrder
from prime_v2.families import family_named
from prime_v2.tokenization.codes import neighbour_vectors
from prime_v2.training import run as training
from prime_v2.training.initialisation import RMS, set_vectors

V, D, K = 13, 12, 8
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
WHOLE = {"num_subtokens": 1}
TREE = {"num_subtokens": 4, "subtoken_embedding": "ancestors", "tree_levels": [2, 4], "reveal_order": "token"}
TREE_OF_ARM = {"num_subtokens": 4, "base": 2, "subtoken_embedding": "ancestors", "tree_levels": [2, 4]}
# Whose tokens' vectors are exactly the given ones, by family and form.
EXACT = {
    "prime, whole": ("prime", WHOLE),
    "prime, tree": ("prime", TREE),
    "prime, nested": ("prime", TREE | {"reveal_order": "nested", "stage_digits": [2, 4]}),
    "prime, tree, shared rows": ("prime", TREE | {"head_ancestors": True}),
    "prime, head in stages": ("prime", TREE | {"reveal_order": "nested", "stage_digits": [2, 4], "head": "stages"}),
    "arm, tree": ("arm", TREE_OF_ARM),
    "prime, tied": ("prime", WHOLE | {"tie_word_embeddings": True}),
    "interpolating, tree": ("interpolating", TREE_OF_ARM),
    "arm": ("arm", {}),
    "arm, tied": ("arm", {"tie_word_embeddings": True}),
    "uniform": ("uniform", {}),
    "interpolating": ("interpolating", {}),
}


def made(family: str, options: dict):
    torch.manual_seed(0)
    chosen = family_named(family)
    return chosen.model_class(chosen.config_class(**SIZES | options))


@pytest.fixture
def vectors() -> torch.Tensor:
    """Of which token 3 does not occur."""
    found = torch.nn.functional.normalize(torch.randn(V, K, generator=torch.Generator().manual_seed(1)).double())
    found[3] = 0
    return found


def scaled(vectors: torch.Tensor) -> torch.Tensor:
    occurring = vectors[vectors.abs().sum(1) > 0]
    return (vectors * (RMS / occurring.square().mean().sqrt())).float()


def rows_of_tokens(model) -> torch.Tensor:
    """The head (V, D); of one in stages, the sum of a token's rows in all of them."""
    if not model.is_staged:
        return model.head()
    levels = model.head().tree.levels
    return sum(model.lm_head.weight[level.first + level.node] for level in levels)


@pytest.mark.parametrize("form", EXACT)
def test_the_vector_and_the_row_of_each_token_are_those_of_the_text(form, vectors):
    model = made(*EXACT[form])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    set_vectors(model, vectors)
    expected = scaled(vectors)
    for found in (model.model.all_embeddings(), rows_of_tokens(model)):
        torch.testing.assert_close(found[:, :K], expected)
    for name, weight in model.state_dict().items():  # dimensions beyond K, and the layers, as they were drawn
        vectors_of = ("embed" in name and "time" not in name) or name.startswith(("lm_head", "head_nodes"))
        kept = (weight[:, K:], before[name][:, K:]) if vectors_of else (weight, before[name])
        assert torch.equal(*kept), name


@pytest.mark.parametrize("head_digits", [[2, 4], [1, 2, 4], [4]])
def test_the_row_of_a_stage_is_the_mean_of_the_tokens_below_it_beside_its_parent_s(head_digits, vectors):
    """Each node's row and those above it sum to the mean, so that a cluster is told from others as its mean is."""
    fields = TREE | {"subtoken_embedding": "ancestors", "head": "stages", "head_digits": head_digits}
    model = made("prime", fields)
    set_vectors(model, vectors)
    codes, expected, above = model.code_table.codes[:-1], scaled(vectors), torch.zeros(V, K)
    for level, end in zip(model.head().tree.levels, head_digits, strict=True):
        above = above + model.lm_head.weight[level.first + level.node, :K]
        for token in range(V):
            below = (codes[:, :end] == codes[token, :end]).all(1)
            torch.testing.assert_close(above[token], expected[below].mean(0))


@pytest.mark.parametrize("form", ["prime, whole", "prime, tree", "prime, nested"])
def test_a_masked_or_partly_known_token_is_the_mean_of_those_that_it_may_be(form, vectors):
    model = made(*EXACT[form])
    set_vectors(model, vectors)
    table, expected = model.code_table, scaled(vectors)
    states = [table.codes[-1]]
    if "whole" not in form:
        states += [torch.cat([code[:2], torch.full((2,), table.base)]) for code in table.codes[:-1]]
    for state in states:
        found = model.model.embed_subtokens(state.view(1, 1, -1))[0, 0, :K]
        torch.testing.assert_close(found, expected[table.consistent(state)].mean(0))


def test_a_row_beside_the_tokens_is_the_mean_of_all(vectors):
    model = made("interpolating", {})
    set_vectors(model, vectors)
    torch.testing.assert_close(model.model.embed_tokens.weight[V, :K], scaled(vectors).mean(0))


@pytest.mark.parametrize("family", ["prime", "arm"])
def test_digits_that_are_summed_are_the_closest_of_a_full_code(family, vectors):
    """Codes that use all of 2**4: the least squares fit of sums of digits to the tokens' vectors, found otherwise."""
    full = torch.nn.functional.normalize(torch.randn(16, K, generator=torch.Generator().manual_seed(2)).double())
    model = made(family, {"num_subtokens": 4, "subtoken_embedding": "sum", "vocab_size": 16})
    set_vectors(model, full)
    expected = scaled(full).double()
    design = model.model.code_table.one_hot(torch.double)
    fit = design @ torch.linalg.lstsq(design, expected, driver="gelsd").solution
    torch.testing.assert_close(model.model.all_embeddings()[:, :K].double(), fit, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.lm_head.weight[:, :K].double(), expected, atol=1e-6, rtol=1e-5)
    if family == "prime":
        masked = model.model.embed_subtokens(model.code_table.codes[-1].view(1, 1, -1))[0, 0, :K]
        torch.testing.assert_close(masked, scaled(full).mean(0))


def test_digits_that_are_concatenated_have_the_means_of_their_tokens(vectors):
    model = made("prime", {"num_subtokens": 4, "subtoken_embedding": "concat"})
    set_vectors(model, vectors)
    codes, expected = model.code_table.codes[:-1], scaled(vectors)
    found = model.model.embed_subtokens(codes[5].view(1, 1, -1))[0, 0]
    for position in range(4):
        part = slice(3 * position, min(3 * position + 3, K))
        mean = expected[codes[:, position] == codes[5, position]].mean(0)
        torch.testing.assert_close(found[part], mean[part])


def options(folder: Path, text: Path, *more: str) -> list[str]:
    return ["--data", str(text), "--output_dir", str(folder), *TINY.split(), *more]


INIT = ("--embedding_init", "distributional")
CODES = ("--codes", "similarity")
NESTED = ("reveal_order=nested", "stage_digits=[4, 9]", "subtoken_embedding=ancestors", "head=stages")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """Two steps of three blocks of a text of many more."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    more = [*INIT, *CODES, "--max_steps", "2", "--save_steps", "1", *MODEL, *NESTED]
    assert training.main(options(folder, text, *more)) == 0
    return folder


def test_vectors_and_codes_are_made_of_the_blocks_that_the_run_trains_on(finished):
    train = PackedBlocks(finished / "data" / "train")
    order = TrainingOrder(train, 8, 0)
    read = np.stack([order[number]["input_ids"].numpy() for number in range(8)])
    assert len(train) > 8
    tokenizer = PrimeV2Tokenizer.from_pretrained(finished)
    vectors, _ = neighbour_vectors(read, len(tokenizer.code_table), 32)
    kept = np.load(finished / "data" / "vectors" / "vectors.npy")
    np.testing.assert_allclose(kept @ kept.T, vectors @ vectors.T, atol=1e-9)
    unread = np.setdiff1d(np.arange(len(vectors)), read)
    assert len(unread) and not kept[unread].any()


def test_the_record_says_what_vectors_and_codes_cost(finished):
    record = json.loads((finished / "results" / "train.json").read_text())["results"]["training"]
    made = record["made_from_text"]
    assert set(made) == {"codes", "vectors"}
    for cost in made.values():
        assert cost["tokens"] == 2 * 4 * 16 and cost["seconds"] >= 0
        assert 2 * cost["tokens"] < cost["flops"] < 1e9


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(text, finished, tmp_path, monkeypatch):
    """Stopped before its first step, and again after one."""
    folder, inner = tmp_path / "run", training.DiffusionTrainer.training_step
    more = [*INIT, *CODES, "--max_steps", "2", "--save_steps", "1", *MODEL, *NESTED]
    for stop in (0, 1):
        with monkeypatch.context() as patched:

            def stopping(self, *args, stop=stop, **kwargs):
                if self.state.global_step >= stop:
                    raise KeyboardInterrupt
                return inner(self, *args, **kwargs)

            patched.setattr(training.DiffusionTrainer, "training_step", stopping)
            assert training.main(options(folder, text, *more)) == 130
    assert training.main(options(folder, text, *more)) == 0
    expected, found = (load_file(each / "model.safetensors") for each in (finished, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_arm_has_codes_of_the_text_for_a_head_in_stages(text, tmp_path):
    folder, codes = tmp_path / "run", ["num_subtokens=9", "base=2", "subtoken_embedding=ancestors", "head=stages"]
    more = ["--family", "arm", *INIT, *CODES, "--max_steps", "1", *MODEL, *codes]
    assert training.main(options(folder, text, *more)) == 0
    record = json.loads((folder / "results" / "train.json").read_text())["results"]
    assert record["family"] == "ARM, head in stages" and record["evaluation"]["bound"]["is_exact"]
    tokenizer = PrimeV2Tokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["model.code_table.codes"][:-1], torch.from_numpy(tokenizer.code_table))
    assert weights["lm_head.weight"].shape == (2**5 + 300, 32)


def test_damaged_vectors_are_refused_by_the_name_of_the_file(text, tmp_path, capsys):
    more = [*INIT, "--max_steps", "1", *MODEL]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.DiffusionTrainer, "training_step", stop)
        assert training.main(options(tmp_path / "run", text, *more)) == 130
    path = tmp_path / "run" / "data" / "vectors" / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    assert training.main(options(tmp_path / "run", text, *more)) == 2
    assert "are damaged (vectors.npy is not as it was written)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, why",
    [
        ([*INIT, "--init_from", "somewhere"], "--embedding_init is decided by the folder of --init_from"),
        ([*INIT, "--streaming", "true"], "--embedding_init distributional reads the training text before training"),
        ([*CODES, "--streaming", "true"], "--codes similarity reads the training text before training"),
        (["--embedding_init", "ppmi"], "--embedding_init ppmi is not one of random, distributional"),
        ([*INIT, "--model", "subtoken_embedding=concat_shared"], "has one for all; use sum or concat"),
    ],
)
def test_what_cannot_begin_with_such_vectors_is_refused_in_a_sentence(more, why, text, tmp_path, capsys):
    assert pytest.raises(SystemExit, training.main, options(tmp_path / "run", text, *more)).value.code == 2
    assert why in capsys.readouterr().err
