"""`prime-v2 quality` from end to end on small models, and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from command_runs import DOCUMENTS, of_command

from prime_v2 import PrimeV2ArmConfig, PrimeV2ForCausalLM, build_tokenizer
from prime_v2.commands.quality import Study
from prime_v2.data.splits import split_of
from prime_v2.output.paths import without_places
from prime_v2.output.records import read_record
from prime_v2.studies.quality import run as study_run
from prime_v2.tokenization.bpe import train_bpe

quality, _ = of_command("quality")
SMALL = ["--samples", 17, "--length", 12, "--passes", 4, "--temperature", 0.7, "--device", "cpu"]


def refused(*arguments: object) -> str:
    """The sentence of a refusal, which stands alone but for the line that a study begins with."""
    result = quality(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    *before, line = result.stderr.splitlines()
    assert len(before) <= 1 and all(each.startswith("reading configurations; ") for each in before)
    command, sentence = line.split(": error: ", 1)
    assert command == "prime-v2 quality"
    return sentence


@pytest.fixture(scope="module")
def arm_dir(tmp_path_factory, model_dir):
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = PrimeV2ArmConfig(vocab_size=280, bos_token_id=0, eos_token_id=0, pad_token_id=0, num_subtokens=1, **shape)
    folder = tmp_path_factory.mktemp("quality") / "arm"
    PrimeV2ForCausalLM(config).save_pretrained(folder)
    whole = train_bpe(DOCUMENTS, 280)
    build_tokenizer(whole, special_tokens={"eos_token": "<|endoftext|>"}, base=280, num_subtokens=1).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def study(model_dir, arm_dir, text_file, tmp_path):
    return [model_dir, "--also", arm_dir, "--text", text_file, *SMALL, "--out", tmp_path / "parts"]


def test_quality_prints_tables_records_the_numbers_and_draws_them(study, text_file, tmp_path):
    output, figure = tmp_path / "record.json", tmp_path / "quality.png"
    result = quality(*study, "--training-text", text_file, "--output", output, "--figure", figure)
    assert result.exit_code == 0, result.output
    record = read_record(output)
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert len(list((tmp_path / "parts" / "cells").iterdir())) == 6
    found = record["results"]
    assert [each["name"] for each in found["models"]] == ["MDM-Prime-v2", "ARM"]
    assert [(each["model"], each["sampler"], each["temperature"]) for each in found["cells"]] == [
        ("MDM-Prime-v2", "ancestral", 1.0),
        ("MDM-Prime-v2", "margin", 1.0),
        ("MDM-Prime-v2", "ancestral", 0.7),
        ("MDM-Prime-v2", "margin", 0.7),
        ("ARM", "left to right", 1.0),
        ("ARM", "left to right", 0.7),
    ]
    assert found["reference"]["0"]["copied"]["value"] > 0.3, "text of the training text itself"
    for words in ("real text", "= exact, ≤ a bound", "no --judge was given, so the first ARM judges",
                  "The judge ARM is one of the models", "generative frontier", "none left out"):  # fmt: skip
        assert words in result.stdout
    again = quality(*study, "--training-text", text_file, "--json")
    assert without_places(json.loads(again.stdout)) == found, "from the finished parts"


@pytest.mark.parametrize("side", ["test", "dev"])
def test_held_out_is_a_side_of_what_the_model_was_trained_on(tmp_path, side):
    texts = [f"document {i} of words {i * i}" for i in range(60)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in [*texts, texts[0]]))
    shares = {"seed": 3, "dev_share": 0.3, "test_share": 0.3}
    (tmp_path / "run.json").write_text(json.dumps({"data": str(path), "text_field": "text", **shares}))
    study = Study([str(tmp_path)], None, None, side == "dev", None, False, tmp_path, None, None, "code")
    held, training, about = study._texts()
    assert held == [each for each in texts if split_of(each, **shares) == side] and len(held) > 5
    assert training == [each for each in texts if split_of(each, **shares) == "train"]
    assert about["source"].endswith(f"{side} side")


def test_prompts_are_continued_and_a_law_needs_no_judge(study, model_dir, text_file, tmp_path):
    result = quality(*study, "--prompts", 4)
    assert "sampled texts, 4 tokens given" in result.stdout
    only = [model_dir, "--text", text_file, *SMALL[:6], "--law-only", "--sampler", "margin"]
    result = quality(*only, "--sampler", "margin,unit=digit", "--out", tmp_path / "laws")
    assert "passes that digits take" in result.stdout
    assert "Judge" not in result.stdout


def test_bad_input_ends_with_a_sentence_before_anything_is_sampled(study, model_dir, arm_dir, text_file, tmp_path):
    alone = [model_dir, "--text", text_file, *SMALL, "--out", tmp_path / "parts"]
    laws = [model_dir, "--text", text_file, *SMALL[:6], "--law-only"]
    for arguments, words in (
        (alone, "the samples need a causal model as their judge; add one by --judge"),
        ([*alone, "--judge", model_dir], "a bound of a text's likelihood only; use a causal model"),
        ([*study, "--sampler", "margn"], "did you mean margin"),
        ([*study, "--sampler", "margin,unit=stage"], "no model has the sampler margin,unit=stage"),
        ([*study, "--samples", 9], "self-BLEU needs at least 17 samples, not 9"),
        ([*study, "--passes", 13], "--passes 13 are more than the 12 tokens"),
        ([*study, "--temperature", 0], "must be positive and finite"),
        ([*study, "--length", 65], "max_position_embeddings=64"),
        ([*laws, "--mauve"], "--mauve is about samples, which --law-only draws none of"),
        ([*laws, "--temperature", 0.5], "--temperature is about samples, which --law-only draws none"),
        ([*laws, "--frontier-passes", 4], "--frontier-passes is about samples, which --law-only draws"),
        ([*study, "--frontier-passes", 13], "--frontier-passes 13 are more than the 12 tokens"),
        ([*study, "--dev"], "--dev is a side of what MODEL was trained on, not of --text"),
        ([model_dir, "--also", arm_dir, *SMALL], "does not exist, which says what"),
        ([model_dir, "--also", arm_dir, *SMALL, "--training-text", text_file], "goes with --text SOURCE"),
    ):
        assert words in refused(*arguments), words
    result = quality(*study, "--samples", 1000)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[1:3] == ["loading the judge, ARM", "reading the text"]
    assert "fewer than --samples 1000; give a longer text" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "parts").exists()


def test_what_is_finished_is_said_and_kept_where_a_run_is_stopped(study, tmp_path, monkeypatch):
    """Without a terminal; the second part is cut off, and the same command does not repeat the first."""
    real, done = study_run.run_cell, []

    def stopped(bench, model, cell, progress):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(cell)
        return real(bench, model, cell, progress)

    monkeypatch.setattr(study_run, "run_cell", stopped)
    result = quality(*study)
    assert (result.exit_code, result.stdout) == (130, "")
    said = result.stderr.splitlines()
    cells = tmp_path / "parts" / "cells"
    assert said[:5] == [
        f"reading configurations; finished parts are kept in {cells}",
        "loading the judge, ARM", "reading the text", "loading MDM-Prime-v2", "MDM-Prime-v2: 4 parts",
    ]  # fmt: skip
    assert re.match(
        r"\[1/4\] MDM-Prime-v2: ancestral, 4 passes: ≤ [\d.]+ nats/token, generative perplexity \d+, ", said[5]
    )
    assert said[6] == f"stopped; the same command goes on from what is in {cells}"
    (part,) = cells.iterdir()
    kept = json.loads(part.read_text())
    assert kept["cell"]["model"] == "MDM-Prime-v2" and kept["cell"]["sampler"] == "ancestral"
    part.write_text(json.dumps({name: kept[name] for name in ("law", "samples")}))  # as earlier versions wrote it

    monkeypatch.setattr(study_run, "run_cell", real)
    result = quality(*study, "--json")
    assert "MDM-Prime-v2: 4 parts, 1 of them finished before" in result.stderr.splitlines()
    assert result.stderr.count("[4/4] MDM-Prime-v2: ") == 1 and "[1/4] MDM-Prime-v2" not in result.stderr
    first = json.loads(result.stdout)["cells"][0]
    assert (first["law"], first["samples"]) == (kept["law"], kept["samples"])
    assert "cell" not in first


def test_models_of_other_tokens_are_not_compared_but_may_judge(study, arm_dir, model_dir, text_file, tmp_path):
    folder = shutil.copytree(arm_dir, tmp_path / "other")
    tokenizer = build_tokenizer(
        train_bpe(["other texts entirely", *DOCUMENTS[:1]], 280),
        special_tokens={"eos_token": "<|endoftext|>"},
        base=280,
        num_subtokens=1,
    )
    tokenizer.save_pretrained(folder)
    assert "has other tokens than" in refused(*study, "--also", folder)
    result = quality(model_dir, "--judge", folder, "--text", text_file, *SMALL, "--out", tmp_path / "parts")
    assert result.exit_code == 0, result.output
    assert "The judge has another tokenizer: samples and real text are decoded and encoded anew" in result.stdout
