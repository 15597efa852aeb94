"""Suites of texts and the tables of `prime-v2 ppl` over them: eval/suites.py, commands/ppl.py."""

import json
import math
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from command_runs import of_command
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.commands.ppl import render_table
from prime_v2.data.splits import corpus_fingerprint
from prime_v2.eval.loading import load_scorer
from prime_v2.eval.perplexity import score_text
from prime_v2.eval.suites import SUITES, TextSet, local_source, read_suite, sets_trained_on
from prime_v2.output.records import read_record
from prime_v2.studies.compare.differences import paired
from prime_v2.tokenization.bpe import train_bpe

PTB = [f"the quick brown fox number {i} jumps over a lazy dog" for i in range(9)]
ARXIV = ["a long paper about the foxes that jump over the dogs\n\nand the dogs", "a short paper"]
run, refused = of_command("ppl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "ptb.txt").write_text("".join(f" {line} \n" for line in PTB) + "\n")
    (folder / "arxiv.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ARXIV))
    return folder


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(PTB + ARXIV, 280)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory, bpe) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=280, eos_token_id=0, pad_token_id=0, **shape))
    folder = tmp_path_factory.mktemp("a") / "model"
    model.save_pretrained(folder)
    build_tokenizer(bpe, special_tokens={"eos_token": "<|endoftext|>"}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arm(tmp_path_factory, bpe) -> Path:
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    folder = tmp_path_factory.mktemp("b") / "model"
    GPT2LMHeadModel(GPT2Config(vocab_size=280, **shape)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------- the sets


def test_the_zero_shot_suite_has_the_published_sets():
    names = [text_set.name for text_set in SUITES["zero-shot"]]
    assert names == ["openwebtext", "lambada", "wikitext", "ptb", "lm1b", "ag_news", "arxiv"]
    for text_set in SUITES["zero-shot"]:
        assert text_set.hub.count("/") == 1
        assert text_set.published
        # Of a split that is also trained on, only its end.
        assert not text_set.split.startswith("train") or text_set.split.endswith(":]")


def test_hub_sets_are_loaded_by_name_and_streamed_unless_they_are_a_range(monkeypatch):
    import datasets

    calls = {}

    def load_dataset(path, name, **options):
        calls[path] = (name, options)
        field = next(text_set.field for text_set in SUITES["zero-shot"] if text_set.hub == path)
        return iter([{field: f"first of {path}"}, {field: " \n"}, {field: "second"}, {field: "third"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, skipped = read_suite("zero-shot", max_documents=2)
    assert skipped == []
    assert [each.documents for each in found] == [
        [f"first of {text_set.hub}", "second"] for text_set in SUITES["zero-shot"]
    ]
    plain = {"revision": None, "data_dir": None}
    assert calls["Salesforce/wikitext"] == (
        "wikitext-103-raw-v1",
        {"split": "validation", "streaming": True, **plain},
    )
    assert calls["Skylion007/openwebtext"] == (None, {"split": "train[-100000:]", "streaming": False, **plain})
    converted = {"revision": "refs/convert/parquet", "data_dir": "penn_treebank"}
    assert calls["ptb-text-only/ptb_text_only"] == (None, {"split": "validation", "streaming": True, **converted})
    assert found[2].source == "Salesforce/wikitext:wikitext-103-raw-v1, validation"
    assert found[3].source == "ptb-text-only/ptb_text_only:penn_treebank, validation"


def test_hub_sets_that_cannot_be_reached_are_skipped_while_one_can(monkeypatch):
    import datasets

    def load_dataset(path, name, **options):
        if path != "dvruette/lm1b":
            raise RuntimeError("Dataset scripts are no longer supported\nmore")
        return [{"text": "a"}, {"body": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found, skipped = read_suite("zero-shot", max_documents=1)
    assert [each.name for each in found] == ["lm1b"]
    assert len(skipped) == 6
    assert skipped[3]["name"] == "ptb"
    assert skipped[3]["reason"].endswith("Dataset scripts are no longer supported)")
    with pytest.raises(ValueError, match=r"dvruette/lm1b row 2 has no field 'text'"):
        read_suite("zero-shot")
    with pytest.raises(
        ValueError, match=r"no set of zero-shot can be read \(ptb: .*\); give copies of them in a folder"
    ):
        read_suite("zero-shot", only=["ptb"])


def test_the_hubs_own_layout_of_a_converted_set_is_read(tmp_path):
    """As `refs/convert/parquet` has it: the split is a folder, which `load_dataset` must find by `data_dir`."""
    import datasets

    for split in ("train", "validation", "test"):
        folder = tmp_path / "set" / "penn_treebank" / split
        folder.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table({"sentence": [f"{split} 1"]}), folder / "0000.parquet")
    options = {"data_dir": "penn_treebank", "split": "validation", "streaming": True}
    assert list(datasets.load_dataset(str(tmp_path / "set"), None, **options)) == [{"sentence": "validation 1"}]


def test_local_copies_are_read_as_the_hub_has_their_rows(tmp_path):
    (tmp_path / "wikitext.txt").write_text(" \n = Title = \n \n A line\u2028with a separator . \n")
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "2.jsonl").write_text('{"sentence": "third", "text": "no"}\n')
    (tmp_path / "ptb" / "1.txt").write_text(" first \n\n second\n")
    (tmp_path / "ptb" / ".hidden.txt").write_text("no")
    pyarrow.parquet.write_table(pyarrow.table({"article": ["paper"]}), tmp_path / "arxiv.parquet")
    (tmp_path / "lambada.txt").write_text("One passage\nof two lines")
    found, skipped = read_suite("zero-shot", tmp_path)
    assert {each.name: each.documents for each in found} == {
        "lambada": ["One passage\nof two lines"],
        "wikitext": [" = Title = \n", " A line\u2028with a separator . \n"],
        "ptb": ["first", "second", "third"],
        "arxiv": ["paper"],
    }
    assert [each.source for each in found] == ["lambada.txt", "wikitext.txt", "ptb/", "arxiv.parquet"]
    assert [each["name"] for each in skipped] == ["openwebtext", "lm1b", "ag_news"]
    assert skipped[1]["reason"] == f"neither lm1b.txt, .jsonl, .parquet nor a folder lm1b is in {tmp_path.name}"


def test_large_files_of_lines_keep_every_line(tmp_path):
    """A .txt beyond 64 KiB is read in pieces."""
    lines = [f"sentence {i} " + "word " * 30 for i in range(900)]
    (tmp_path / "lm1b.txt").write_text("\n".join(lines))
    found, _ = read_suite("zero-shot", tmp_path)
    assert found[0].documents == [line.strip() for line in lines]


def test_the_description_of_a_set_has_no_folder_and_a_fingerprint(data):
    (ptb, _), _ = read_suite("zero-shot", data, max_documents=3)
    assert ptb.description() == {
        "name": "ptb",
        "source": "ptb.txt",
        "num_documents": 3,
        "text_bytes": sum(map(len, PTB[:3])),
        "fingerprint": corpus_fingerprint(PTB[:3]),
    }


def test_damaged_and_ambiguous_copies_are_refused(tmp_path):
    (tmp_path / "ptb.jsonl").write_text('{"sentence": "a"}\n\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="ptb.jsonl line 3 has no field 'sentence'; its fields are text"):
        read_suite("zero-shot", tmp_path)
    (tmp_path / "ptb.jsonl").write_text('{"sentence": " "}\n')
    with pytest.raises(ValueError, match="ptb.jsonl is empty: it holds no text"):
        read_suite("zero-shot", tmp_path)
    (tmp_path / "ptb").mkdir()
    with pytest.raises(ValueError, match="holds ptb.jsonl and ptb; leave one for the set ptb"):
        local_source(tmp_path, "ptb")
    (tmp_path / "ptb.jsonl").unlink()
    with pytest.raises(ValueError, match="ptb holds no file that ends in .txt, .jsonl, .parquet"):
        read_suite("zero-shot", tmp_path)
    (tmp_path / "ptb").rmdir()
    with pytest.raises(ValueError, match=r"no set of zero-shot can be read \(.*, ...\); give at least one of them"):
        read_suite("zero-shot", tmp_path)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="--suite zeroshot is not one of zero-shot; did you mean zero-shot\\?"):
        read_suite("zeroshot")
    with pytest.raises(ValueError, match="--only wikitext2 is not one of .*; did you mean wikitext\\?"):
        read_suite("zero-shot", only=["wikitext2"])


def test_sets_are_frozen():
    with pytest.raises(AttributeError):
        TextSet("a", "b/c", "test", "text", "none").name = "d"


# ------------------------------------------------------------------------------------------------- the table


def test_a_table_has_each_model_on_the_same_windows_of_each_set(diffusion, arm, data, tmp_path):
    output = tmp_path / "record.json"
    arguments = [diffusion, "--suite", "zero-shot", "--data", data, "--also", arm, "--num-samples", 2, "--seed", 3]
    result = run(*arguments, "--json", "--output", output, "--device", "cpu")
    printed = json.loads(result.stdout)
    rows = {(row["set"], row["model"]): row for row in printed["rows"]}
    # The folders have one name, so more of their paths is shown; the window is the smaller model's.
    names = [f"{each.parent.name}/model" for each in (diffusion, arm)]
    assert list(rows) == [("ptb", names[0]), ("ptb", names[1]), ("arxiv", names[0]), ("arxiv", names[1])]
    assert (printed["window"], printed["stride"], printed["suite"]) == (32, 32, "zero-shot")
    for name, folder, method in zip(names, (diffusion, arm), ("subtoken", "causal"), strict=True):
        scorer, tokenizer = load_scorer(folder, "cpu")
        for set_name, documents in (("ptb", PTB), ("arxiv", ARXIV)):
            expected = score_text(
                scorer, tokenizer, documents, method=method, num_samples=2, seed=3, window=32, stride=32
            )
            row = rows[set_name, name]
            assert {key: row[key] for key in expected} == expected
            assert all(isinstance(row[name], float | int | str | bool | list) for name in expected)
            assert paired(row, rows[set_name, names[0]])["nats_per_token"] == pytest.approx(
                row["nats_per_token"] - rows[set_name, names[0]]["nats_per_token"], abs=1e-3
            )
    assert [each["method"] for each in printed["models"]] == ["subtoken", "causal"]
    assert [each["name"] for each in printed["sets"]] == ["ptb", "arxiv"]
    assert [each["name"] for each in printed["skipped"]] == ["openwebtext", "lambada", "wikitext", "lm1b", "ag_news"]
    record = read_record(output)
    assert (record["name"], record["seed"], record["results"]) == ("ppl_table", 3, printed)
    assert str(tmp_path.parent) not in json.dumps(record["results"])

    lines = run(*arguments, "--device", "cpu").stdout.splitlines()
    assert lines[0].split() == ["set", "model", "nats/token", "perplexity", "bits/byte", "tokens", "draws", "method"]
    row = rows["ptb", names[0]]
    error = row["nats_per_token_interval_95"][1] - row["nats_per_token"]
    assert f"≤ {row['nats_per_token']:.4f} ± {error:.4f}  ≤ {row['perplexity']:,.2f} [" in lines[1]
    assert lines[1].split()[-2:] == ["2", "subtoken"]
    assert f"= {rows['ptb', names[1]]['nats_per_token']:.4f} ±" in lines[2]
    assert lines[2].split()[-2:] == ["none", "causal"]
    assert "windows of 32 tokens; = exact, ≤ bound" in lines[6]
    assert sum(line.startswith("skipped ") for line in lines) == 5


def test_a_source_has_a_table_for_several_models_too(diffusion, arm, data):
    arguments = [arm, data / "ptb.txt", "--also", diffusion, "--window", 16, "--stride", 5, "--num-samples", 1]
    printed = json.loads(run(*arguments, "--json").stdout)
    assert [row["set"] for row in printed["rows"]] == ["ptb.txt"] * 2
    assert printed["suite"] is None
    assert {(row["window"], row["stride"]) for row in printed["rows"]} == {(16, 5)}
    assert "windows of 16 tokens, the last 5 of them scored" in run(*arguments).stdout


def test_a_causal_model_alone_is_scored_as_any_other(arm, data):
    scorer, tokenizer = load_scorer(arm, "cpu")
    expected = score_text(scorer, tokenizer, ARXIV, method="causal")
    arguments = [arm, data / "arxiv.jsonl", "--device", "cpu"]
    printed = json.loads(run(*arguments, "--json").stdout)
    assert printed["evaluation"] == expected
    assert json.loads(run(*arguments, "--json", "--method", "causal").stdout)["evaluation"] == expected
    plain = run(*arguments).stdout
    assert f"causal           {expected['nats_per_token']:.4f} ± " in plain
    assert "nats/token (exact, left to right)" in plain
    assert "perplexity       = " in plain
    assert "draws" not in plain


def test_what_is_no_bound_has_no_perplexity_in_a_table(diffusion, arm, data):
    """The method is the diffusion model's; the causal model keeps its own."""
    arguments = [diffusion, "--suite", "zero-shot", "--data", data, "--only", "arxiv", "--also", arm]
    arguments += ["--method", "paper_loss"]
    printed = json.loads(run(*arguments, "--json").stdout)
    loss, exact = printed["rows"]
    assert not any("perplexity" in name or "bits" in name for name in loss)
    assert (exact["method"], "perplexity" in exact) == ("causal", True)
    assert printed["skipped"] == []
    line = run(*arguments).stdout.splitlines()[1]
    assert line.split()[-3:] == ["paper_loss", "(no", "bound)"]
    assert "≤" not in line
    assert line.count("  -  ") == 2
    rows = json.loads(run(*arguments, "--method", "causal", "--json").stdout)["rows"]
    assert [row["method"] for row in rows] == ["subtoken", "causal"]


def test_a_model_without_the_methods_order_keeps_its_own(diffusion, data, tmp_path):
    """Both are of one family; only one has stages."""
    staged = shutil.copytree(diffusion, tmp_path / "staged")
    config = json.loads((staged / "config.json").read_text())
    (staged / "config.json").write_text(json.dumps(config | {"reveal_order": "nested", "stage_digits": [4, 9]}))
    arguments = [staged, "--suite", "zero-shot", "--data", data, "--only", "arxiv", "--also", diffusion]
    arguments += ["--method", "coarse_first", "--num-samples", 1]
    rows = json.loads(run(*arguments, "--json").stdout)["rows"]
    assert [row["method"] for row in rows] == ["coarse_first", "subtoken"]


def test_a_set_that_a_run_read_is_named(diffusion, arm, data, tmp_path):
    """train.py holds documents out all over its text, and not the last 100,000 of OpenWebText."""
    read = {"data": "Skylion007/openwebtext", "data_split": "train"}
    assert sets_trained_on("zero-shot", read) == ["openwebtext"]
    assert sets_trained_on("zero-shot", {**read, "data_split": "train[:-100000]"}) == []
    wikitext = {"data": "Salesforce/wikitext:wikitext-103-raw-v1", "data_split": "train"}
    assert sets_trained_on("zero-shot", wikitext) == sets_trained_on("zero-shot", {}) == []
    assert sets_trained_on("zero-shot", {**wikitext, "data_split": "validation"}) == ["wikitext"]

    run_folder = shutil.copytree(diffusion, tmp_path / "run")
    (run_folder / "run.json").write_text(json.dumps(read))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "openwebtext.txt").write_text(ARXIV[0])
    arguments = [run_folder, "--suite", "zero-shot", "--data", tmp_path / "data", "--also", arm, "--num-samples", 1]
    printed = json.loads(run(*arguments, "--json").stdout)
    assert [each["trained_on"] for each in printed["models"]] == [["openwebtext"], []]
    assert "run was trained on openwebtext, which is not held out for it" in run(*arguments).stdout


def test_models_with_other_tokenizers_are_compared_by_bytes():
    row = {"set": "a", "model": "x", "method": "chain", "is_bound": True, "is_exact": True, "stderr": None}
    row |= {"nats_per_token": math.log(8), "nats_per_token_interval_95": None, "num_tokens": 9, "num_samples": 0}
    row |= {"interval_over": "documents", "monte_carlo_stderr": 0.0}
    row |= {"perplexity": 8.0, "perplexity_interval_95": None, "bits_per_byte": 1.5, "bits_per_byte_interval_95": None}
    results = {
        "window": 4,
        "stride": 4,
        "models": [],
        "sets": [{}],
        "skipped": [],
        "rows": [row, {**row, "model": "y"}],
    }
    shown = render_table(results).splitlines()
    assert shown[1] == "a    x      = 2.0794    = 8.00      = 1.5000   9       none   chain"
    assert "tokenizers differ" not in "\n".join(shown)
    results["rows"][1]["num_tokens"] = 7
    assert "the models' tokenizers differ: compare bits/byte" in render_table(results)


# ------------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(diffusion, arm, data, tmp_path):
    output = tmp_path / "record.json"
    suite = ["--suite", "zero-shot", "--data", data, "--output", output]
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "t5"}')
    (strange / "model.safetensors").touch()
    for arguments, message in (
        ([diffusion, *suite, "--method", "subtokn"], "--method subtokn is not one of causal, chain, "),
        ([diffusion, *suite, "--method", "subtokn"], "; did you mean subtoken?"),
        ([arm, *suite, "--method", "token"], f"--method token is for other models; {arm} has causal"),
        (
            [diffusion, *suite, "--method", "causal"],
            f"is for other models; {diffusion} has subtoken, ",
        ),
        ([diffusion, *suite, "--also", arm, "--method", "nested"], "needs a config with stage_digits"),
        ([diffusion, *suite, "--num-samples", 0], "'--num-samples'"),
        ([diffusion, *suite, "--window", 65], "--window 65 must be between 1 and max_position_embeddings=64"),
        ([diffusion, *suite, "--window", 8, "--stride", 9], "--stride 9 must be between 1 and --window 8"),
        ([diffusion, *suite, "--also", tmp_path / "nowhere"], "does not exist; give a folder"),
        ([diffusion, *suite, "--also", strange], "holds a model of type 't5'; only prime_v2, "),
        ([diffusion, *suite, "--also", diffusion], "is given twice; once will do"),
        ([diffusion, *suite, "--only", "pbt"], "did you mean ptb?"),
        ([diffusion, "docs", *suite], "give either a SOURCE or --suite NAME"),
        ([diffusion, "--output", output], "Missing argument 'SOURCE', or --suite"),
        ([diffusion, "docs", "--data", data], "--data and --only belong to a suite"),
        ([diffusion, *suite, "--text-field", "body"], "--split and --text-field belong to a SOURCE"),
        ([diffusion, "--suite", "zero-shot", "--data", tmp_path / "no", "--output", output], "is not a folder"),
        (
            [diffusion, "--suite", "zero-shot", "--data", strange, "--output", output],
            "no set of zero-shot can be read",
        ),
    ):
        assert message in refused(*arguments)
        assert not output.exists()


def test_logits_that_are_no_numbers_are_refused_and_nothing_is_written(arm, data, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(arm)
    model.transformer.ln_f.weight.data[0] = torch.nan
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for file in arm.glob("tokenizer*"):
        (broken / file.name).write_bytes(file.read_bytes())
    output = tmp_path / "record.json"
    sentence = refused(broken, "--suite", "zero-shot", "--data", data, "--output", output)
    reason = "the log-likelihood of sequence 0 of 8 is no number: the network's logits are not finite"
    assert sentence == f"broken on ptb: {reason}"
    assert reason in refused(broken, data / "ptb.txt", "--output", output)
    assert not output.exists()
