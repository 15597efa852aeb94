"""The command `prime-v2 analyze`: arguments, record, figures, and one sentence with status 2 for bad input."""

import json
import math
import shutil
import struct
from pathlib import Path
from statistics import fmean

import pytest
import torch
from command_runs import DOCUMENTS, of_command
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion, build_tokenizer
from prime_v2.commands.analyze import name_arguments
from prime_v2.eval.loading import load_scorer
from prime_v2.eval.windows import encode_documents
from prime_v2.output.records import read_record
from prime_v2.studies.analysis.attention import STATISTICS, measure_attention
from prime_v2.studies.analysis.plots import plot_attention, plot_spectra
from prime_v2.studies.analysis.report import render
from prime_v2.studies.analysis.spectra import gaussian_spectrum
from prime_v2.tokenization.bpe import train_bpe

WINDOW = 32
ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("analysis_attention.png", "analysis_spectra.png")
run, refused = of_command("analyze")


def analyzed(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A masked-diffusion model and a GPT-2, random, with one BPE."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    bpe = train_bpe(DOCUMENTS, 280)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": WINDOW}
    prime = PrimeV2ForMaskedDiffusion(PrimeV2Config(vocab_size=280, eos_token_id=0, initializer_range=0.3, **shape))
    prime.save_pretrained(folder / "prime")
    build_tokenizer(bpe, special_tokens={"eos_token": "<|endoftext|>"}).save_pretrained(folder / "prime")
    shape = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=280, eos_token_id=0, bos_token_id=0, **shape)).save_pretrained(
        folder / "gpt2"
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder / "gpt2")
    return {"prime": folder / "prime", "gpt2": folder / "gpt2"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def both(models, text) -> dict:
    return analyzed(models["prime"], models["gpt2"], text, "--max-windows", 5)


def test_numbers_are_those_of_the_models_measured_on_the_texts_windows(models, both):
    assert both["text"] | {"documents_sha256": ""} == {
        "source": both["text"]["source"],
        "split": None,
        "num_documents": both["text"]["num_documents"],
        "documents_sha256": "",
        "window": WINDOW,
        "max_windows": 5,
    }
    for result, name in zip(both["models"], ("prime", "gpt2"), strict=True):
        model, tokenizer = load_scorer(models[name], "cpu")
        ids = encode_documents(tokenizer, DOCUMENTS, model.config.eos_token_id).ids
        windows = ids[: 5 * WINDOW].view(5, WINDOW)
        shares = [None] if name == "gpt2" else [0.0, 0.5, 0.9]
        assert result["attention"] == [measure_attention(model, windows, share) for share in shares]
        assert result["name"] == name
    kinds = [each["kind"] for each in both["models"][1]["matrices"]]
    assert kinds == ["q", "k", "v", "o", "up", "down"] * 3 + ["embedding"]
    assert both["models"][1]["has_head"] is False and both["models"][0]["has_head"] is True
    assert both["models"][1]["not_measured"] == ["transformer.wpe.weight"]
    shapes = {(each["rows"], each["columns"]) for model in both["models"] for each in model["matrices"]}
    assert both["gaussian"] == [gaussian_spectrum(*shape, 0) for shape in sorted(shapes)]


def test_documents_are_read_until_the_windows_are_full(models, text):
    few = analyzed(models["prime"], text, "--max-windows", 1, "--masked-share", 0.5)
    assert few["text"]["num_documents"] < 12
    assert [each["num_windows"] for each in few["models"][0]["attention"]] == [1]
    all_of_it = analyzed(models["prime"], text, "--max-windows", 1000, "--window", 16, "--masked-share", 0.5)
    tokens = len(encode_documents(load_scorer(models["prime"], "cpu")[1], DOCUMENTS)[0])
    assert all_of_it["text"]["num_documents"] == 12
    assert [each["num_windows"] for each in all_of_it["models"][0]["attention"]] == [tokens // 16]


def test_a_text_shorter_than_a_window_is_one_window(models, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the quick brown fox jumps over")
    result = analyzed(models["prime"], path, "--masked-share", 0.5)
    tokens = len(encode_documents(load_scorer(models["prime"], "cpu")[1], [path.read_text()])[0])
    assert 8 <= tokens == result["text"]["window"] < WINDOW
    assert result["models"][0]["attention"][0]["statistics"]["entropy"]["stderr"] is None


def test_masked_shares_are_those_asked_for_and_the_seed_draws_the_masks(models, text):
    options = [models["prime"], text, "--masked-share", 0.9, "--masked-share", 0.25, "--masked-share", 0.9]
    result = analyzed(*options)
    assert result["masked_shares"] == [0.25, 0.9]
    assert [each["masked_share"] for each in result["models"][0]["attention"]] == [0.25, 0.9]
    other = analyzed(*options, "--seed", 1)
    assert other["models"][0]["attention"] != result["models"][0]["attention"]
    assert other["models"][0]["matrices"] == result["models"][0]["matrices"]


def test_a_run_repeats_itself_to_the_last_digit(models, text, both):
    again = analyzed(models["prime"], models["gpt2"], text, "--max-windows", 5)
    for results in (again, both):
        for model in results["models"]:
            model.pop("seconds", None)
    assert again == both


def test_record_figures_and_table_are_written(models, text, tmp_path):
    output, figures = tmp_path / "analysis.json", tmp_path / "new" / "figures"
    result = run(models["prime"], models["gpt2"], text, "--output", output, "--figure-dir", figures)
    assert result.exit_code == 0, result.output
    record = read_record(output)
    assert (record["name"], record["seed"]) == ("analysis", 0)
    assert sorted(each.name for each in figures.iterdir()) == list(FIGURES)
    for name in FIGURES:
        content = (figures / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", content[16:24])) > 600
    printed = result.stdout.replace(str(text), text.name)  # a record holds no path of the machine
    assert printed == render(record["results"]) + "\n"
    lines = [line.split() for line in result.stdout.splitlines()]
    prime, gpt2 = record["results"]["models"]
    ranks = [
        fmean(each[name] for each in prime["matrices"] if each["kind"] == "q")
        for name in ("stable_rank", "effective_rank")
    ]
    assert ["q", "prime", "16", "x", "16", *(f"{each:.1f}" for each in ranks)] in [line[:7] for line in lines]
    means = gpt2["attention"][0]["statistics"]["entropy"]["mean"]  # (layers, heads)
    row = next(line for line in lines if line[:2] == ["causal", "gpt2"])
    assert row[8] == f"{torch.tensor(means).mean():.3f}"
    assert [line[0] for line in lines if line[1:2] == ["prime"] and len(line) == 11] == ["0", "0.5", "0.9"]


def test_figures_are_drawn_from_the_record_alone(both, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: saved.append(figure))
    results = json.loads(json.dumps(both))
    plot_spectra(results, tmp_path / "spectra.png")
    plot_attention(results, tmp_path / "attention.png")
    spectra, attention = saved
    titles = [axes.get_title() for axes in spectra.axes if axes.get_title()]
    assert titles == ["q", "k", "v", "o", "gate", "up", "down", "embedding, head"]
    curves = [line for line in spectra.axes[0].lines if line.get_linestyle() == "-"]
    q = [each for each in results["models"][0]["matrices"] if each["kind"] == "q"]
    assert len(curves) == 2 + 3  # layers of prime and of gpt2
    for curve, each in zip(curves[:2], q, strict=True):
        expected = [value / each["singular_values"][0] for value in each["singular_values"]]
        assert curve.get_ydata().tolist() == pytest.approx(expected)
    titles = [axes.get_title() for axes in attention.axes if axes.get_title()]
    assert titles == ["clean text", "masked share 0.5", "masked share 0.9"]  # gpt2 is in the first
    first = attention.axes[0]
    for model, line in zip(
        results["models"], [line for line in first.lines if line.get_linestyle() == "-"], strict=True
    ):
        heads = model["attention"][0]["statistics"]["first_position_mass"]["mean"]
        assert line.get_ydata().tolist() == pytest.approx([fmean(each) for each in heads])
    assert set(STATISTICS) == set(results["statistics"])


def test_figures_of_one_causal_model_have_one_column(models, text, tmp_path):
    run(models["gpt2"], text, "--figure-dir", tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == list(FIGURES)


def test_arguments_are_told_apart(tmp_path, models, text):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text("one")
    prime, gpt2 = str(models["prime"]), str(models["gpt2"])
    assert name_arguments(prime, None, None) == ([prime], "docs")
    for second in ("docs", str(text), "missing.txt", str(texts)):
        assert name_arguments(prime, second, None) == ([prime], second)
    for second in (gpt2, "openai-community/gpt2", str(tmp_path)):
        assert name_arguments(prime, second, None) == ([prime, second], "docs")
    assert name_arguments(prime, gpt2, "someone/data") == ([prime, gpt2], "someone/data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--masked-share", 1.5], "--masked-share 1.5 must be between 0 (clean text) and 1 (all masked); use 0.5"),
        (["--masked-share", "nan"], "--masked-share nan must be between 0"),
        (["--masked-share", 0.5, "--masked-share", -1], "--masked-share -1.0 must be between 0"),
        (["--window", 4], "windows of at least 8 tokens, but --window 4; use --window 8"),
        (["--window", 33], "--window 33 must be between 1 and max_position_embeddings=32"),
        (["--device", "nowhere"], "--device nowhere cannot be used; here are cpu"),
        (["--dtype", "int8"], "--dtype int8 is not a floating-point type"),
        (["--max-windows", 0], "'--max-windows'"),
        (["--text-field", "body"], "has no field 'body'"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(models, text, tmp_path, options, message):
    output = ["--output", tmp_path / "analysis.json", "--figure-dir", tmp_path / "figures"]
    assert message in refused(models["prime"], text, *options, *output)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_analyzed_are_refused_and_nothing_is_written(models, text, tmp_path):
    written = tmp_path / "written"
    output = ["--output", written / "analysis.json", "--figure-dir", written / "figures"]
    written.mkdir()
    foreign = tmp_path / "bert"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=280, **shape)).save_pretrained(foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    assert "bert holds a model of type 'vit'; only " in refused(foreign, text, *output)
    assert "is a file; give a folder" in refused(text, text, *output)
    assert "does not exist; give a folder" in refused(models["prime"], tmp_path / "nowhere", *output)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json; give the folder of a saved model" in refused(models["prime"], empty, text, *output)
    assert "is given twice; once will do" in refused(models["prime"], models["prime"], text, *output)
    message = "--masked-share 0.5 is for diffusion models; leave it out for causal ones"
    assert message in refused(models["gpt2"], text, "--masked-share", 0.5, *output)
    assert list(written.iterdir()) == []


def test_texts_that_are_missing_empty_or_too_short_are_refused(models, tmp_path):
    written = tmp_path / "written"
    written.mkdir()
    output = ["--output", written / "analysis.json", "--figure-dir", written]
    path = tmp_path / "text.txt"
    assert "text.txt does not exist; give a file" in refused(models["prime"], path, *output)
    path.write_text("")
    assert "text.txt is empty: it holds no text" in refused(models["prime"], path, *output)
    path.write_text("fox")
    number = len(encode_documents(load_scorer(models["prime"], "cpu")[1], ["fox"])[0])
    message = f"on windows of at least 8 tokens, but the text has {number}; use a longer text"
    assert message in refused(models["prime"], path, *output)
    assert list(written.iterdir()) == []


def test_what_is_there_is_not_overwritten(models, text, tmp_path):
    output, figure = tmp_path / "analysis.json", tmp_path / FIGURES[0]
    output.write_text("kept")
    assert "analysis.json exists; give another name" in refused(models["prime"], text, "--output", output)
    figure.write_text("kept")
    message = "analysis_attention.png exists there; give another folder, or delete it first"
    assert message in refused(models["prime"], text, "--figure-dir", tmp_path)
    assert "is not a folder; give a folder, which may be new" in refused(models["prime"], text, "--figure-dir", output)
    assert [output.read_text(), figure.read_text()] == ["kept", "kept"]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(models, text, tmp_path):
    broken = shutil.copytree(models["gpt2"], tmp_path / "gpt2")
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=90, eos_token_id=0, bos_token_id=0, **shape)).save_pretrained(broken)
    assert isinstance(load_scorer(broken, "cpu")[1], PreTrainedTokenizerFast)
    assert "is not below vocab_size=90; use the model's own tokenizer" in refused(broken, text)


def test_a_split_is_that_of_the_model_that_train_py_wrote(models, tmp_path):
    """The other one has no run.json; the text is the documents of that side alone."""
    run_folder = shutil.copytree(models["prime"], tmp_path / "run")
    (run_folder / "run.json").write_text(json.dumps({"seed": 3, "dev_share": 0.3, "test_share": 0.4}))
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in DOCUMENTS))
    result = analyzed(models["gpt2"], run_folder, path, "--split", "test", "--masked-share", 0.5)
    assert result["text"]["split"] == "test"
    assert 0 < result["text"]["num_documents"] < 12
    assert "--split needs" in refused(models["gpt2"], path, "--split", "test")


def test_the_example_of_the_docs_is_the_record():
    record = read_record(ROOT / "results" / "analysis_tiny.json")
    results, page = record["results"], (ROOT / "docs" / "analysis.md").read_text()
    assert f"    {record['command']}\n" in page
    assert "".join(f"    {line}\n" if line else "\n" for line in render(results).splitlines()) in page

    said = " ".join(page[page.index("**Weights.**") :].split())
    tiny, mdm = results["models"]
    layers = [each for model in (tiny, mdm) for each in model["matrices"] if each["layer"] is not None]
    gaussian = {(each["rows"], each["columns"]): each for each in results["gaussian"]}
    references = [gaussian[each["rows"], each["columns"]] for each in layers]
    ranks = [[each["stable_rank"] for each in found] for found in (layers, references)]
    (low, high), (least, most) = ((min(each), max(each)) for each in ranks)
    assert f"falls to between {low:.0f} and {high:.0f} (Gaussian: {least:.0f} to {most:.0f})" in said
    kept = [one["effective_rank"] / other["effective_rank"] for one, other in zip(layers, references, strict=True)]
    assert f"keeps {min(kept):.2f} to {max(kept):.2f} of its Gaussian value" in said
    values = [each["tail"]["exponent"] for each in layers]
    error = max(each["tail"]["stderr"] for each in layers)
    assert f"from {min(values):.1f} to {max(values):.1f}, each ± {error:.2f} at most" in said
    values = [each["tail"]["exponent"] for each in references]
    assert f"(Gaussian: {min(values):.0f} to {max(values):.0f})" in said
    half = len(layers) // 2
    for one, other in zip(layers[:half], layers[half:], strict=True):
        spread = math.hypot(one["tail"]["stderr"], other["tail"]["stderr"])
        assert abs(one["tail"]["exponent"] - other["tail"]["exponent"]) < 2 * spread
    table = next(each for each in tiny["matrices"] if each["kind"] == "embedding")
    head = next(each for each in mdm["matrices"] if each["kind"] == "head")
    assert f"stable rank of {table['stable_rank']:.1f} and" in said and f"one of {head['stable_rank']:.1f}." in said

    states = [state for model in (tiny, mdm) for state in model["attention"]]
    tops = [max(map(max, state["statistics"]["top_position_mass"]["mean"])) for state in states]
    assert f"no head puts more than {max(tops):.3f} on any one position" in said
    sink = mdm["attention"][2]["statistics"]["top_in_window_mass"]
    assert sink["mean"][0][1] == max(map(max, sink["mean"]))
    assert f"puts {sink['mean'][0][1]:.3f} ± {sink['stderr'][0][1]:.3f} (standard error)" in said
    assert all(max(state["statistics"]["neighbour_mass"]["mean"][0]) > 0.99 for state in tiny["attention"])
    hidden = [model["attention"][2]["masked_tokens"] for model in (mdm, tiny)]
    assert f"at 0.9, {hidden[0]:.0%} of the tokens of `tiny_mdm` are fully masked and {hidden[1]:.0%} of" in said
    assert f"{states[0]['num_windows']} windows of {results['text']['num_documents']} documents" in said
