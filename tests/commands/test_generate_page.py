"""`prime-v2 generate --page`: what the page says is what was generated, of every family, and bad input is refused."""

import json
import os
import re

import pytest
import torch
from chromium import browser
from command_runs import DOCUMENTS, refused, run
from networks import TINY

from prime_v2 import build_tokenizer
from prime_v2.families import FAMILIES
from prime_v2.tokenization.bpe import train_bpe

HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'><!-- \u2028"
SHORT = ["--prompt", "the", "--max-new-tokens", 5, "--seed", 4]


def data_of(path) -> dict:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(block)


def saved(folder, family, documents=DOCUMENTS, **changes):
    """A random model of a family, and its tokenizer."""
    torch.manual_seed(0)
    digits = {"num_subtokens": 1} if changes.get("num_subtokens", 1) == 1 and family != "prime" else {}
    tokenizer = build_tokenizer(train_bpe(documents, 280), special_tokens={"eos_token": "<|endoftext|>"}, **digits)
    tokenizer.save_pretrained(folder)
    shape = TINY | {"vocab_size": 280, "max_position_embeddings": 256, "initializer_range": 0.5, "eos_token_id": 0}
    config = FAMILIES[family].config_class(**shape | {"bos_token_id": 0} | changes)
    FAMILIES[family].model_class(config).eval().save_pretrained(folder)
    return folder


def test_the_page_shows_the_text_that_is_printed_with_and_without_it(model_dir, tmp_path):
    page = tmp_path / "out.html"
    plain = run("generate", model_dir, *SHORT, "--json").stdout
    result = run("generate", model_dir, *SHORT, "--json", "--page", page)
    assert json.loads(result.stdout)["samples"][0]["text"] == json.loads(plain)["samples"][0]["text"]
    data = data_of(page)
    assert dict(data["facts"]) == {"model": "model", "family": "MDM-Prime-v2", "prompt": "the", "seed": "4"}
    (shown,) = data["runs"]
    assert shown["text"].startswith("the") and shown["name"] == "ancestral, 256 steps"
    assert len(shown["known"]) == json.loads(result.stdout)["samples"][0]["num_forward"] + 1
    generated = [each for each in shown["tokens"] if not each["given"]]
    assert len(generated) == 5 and all(len(each["predictions"]) >= 1 for each in generated)
    # A state of the code table: all tokens where nothing is visible, one where all is.
    assert all((each["changes"][0][3], each["changes"][-1][3]) == (280, 1) for each in generated)


def test_a_second_sampler_stands_beside_the_first_on_the_same_seed(model_dir, tmp_path):
    page = tmp_path / "two.html"
    run("generate", model_dir, *SHORT, "--steps", 6, "--page", page, "--beside", "margin,unit=digit,steps=4")
    first, second = data_of(page)["runs"]
    assert (first["name"], second["name"]) == ("ancestral, 6 steps", "margin, unit digit, 4 steps")
    assert len(second["known"]) == 5
    alone = tmp_path / "alone.html"
    options = ["--sampler", "margin", "--unit", "digit", "--steps", 4]
    run("generate", model_dir, *SHORT, *options, "--page", alone)
    assert data_of(alone)["runs"][0] | {"tokens": []} == second | {"tokens": []}


@pytest.mark.parametrize(("family", "name"), [("arm", "left to right"), ("uniform", "ancestral, 256 steps")])
def test_families_of_whole_tokens_have_pages_too(tmp_path, family, name):
    folder = saved(tmp_path / family, family)
    page = tmp_path / "page.html"
    options = [] if family == "arm" else ["--steps", 4]
    text = run("generate", folder, *SHORT, *options, "--page", page).stdout
    data = data_of(page)
    (shown,) = data["runs"]
    assert shown["name"] == name.replace("256", "4") and data["changing"] == (family == "uniform")
    assert len(shown["known"]) - 1 == (5 if family == "arm" else 4), text
    assert shown["known"][-1] == 1 and all(each is not None for each in shown["entropy"])
    if family == "arm":
        assert shown["revealed"] == [0, 1, 1, 1, 1, 1]


def test_watch_and_picture_and_page_go_together_and_greedy_needs_no_seed(model_dir, tmp_path):
    arguments = ["generate", model_dir, "--max-new-tokens", 3, "--greedy", "--watch"]
    result = run(*arguments, "--page", tmp_path / "a.html", "--picture", tmp_path / "a.svg")
    assert result.exit_code == 0 and (tmp_path / "a.svg").exists()
    data = data_of(tmp_path / "a.html")
    assert data["runs"][0]["name"] == "greedy, 256 steps at most" and "seed" not in dict(data["facts"])


def test_a_model_that_writes_markup_runs_nothing(tmp_path):
    """Its tokens are pieces of scripts, and so is its prompt."""
    folder = saved(tmp_path / "<b>model", "prime", documents=[HOSTILE] * 20)
    page = tmp_path / "page.html"
    run("generate", folder, "--prompt", HOSTILE, "--max-new-tokens", 8, "--seed", 1, "--page", page)
    with browser(tmp_path / "profile") as tab:
        tab.open(page, at="#3")
        assert tab.messages == [] and tab.evaluate("window.ran") is None
        assert tab.evaluate("[document.scripts.length, document.images.length]") == [2, 0]
        facts = tab.evaluate("[...document.querySelectorAll('#facts dd')].map((each) => each.textContent)")
        assert facts[0] == "<b>model" and HOSTILE in facts
        text = tab.evaluate("document.querySelector('#texts pre').textContent")
        assert text.startswith(HOSTILE) and "known" in tab.evaluate("document.getElementById('status').textContent")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--beside", "margin"], "--beside margin is shown on a page; add --page FILE, or leave --beside out"),
        (["--page", "P", "--num-samples", 2], "--page shows one sample, not --num-samples 2"),
        (
            ["--page", "P", "--beside", "margin", "--beside", "entropy"],
            "--beside is given 2 times, but a page shows one",
        ),
        (["--page", "P", "--beside", "margn"], "--beside margn is not one of ancestral, confidence, "),
        (["--page", "P", "--beside", "margin,digit"], "has 'digit'; write NAME,OPTION=VALUE"),
        (["--page", "P", "--beside", "margin,units=digit"], "units is no option of a sampler"),
        (
            ["--page", "P", "--beside", "threshold,threshold=2"],
            "--beside threshold,threshold=2: --sampler threshold: --threshold 2 is outside",
        ),
        (["--page", "P", "--beside", "margin,threshold=0.5"], "--threshold 0.5 is an option of the sampler threshold"),
        (["--page", "nowhere/P"], "the folder nowhere does not exist; make it first"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_printed(model_dir, tmp_path, options, sentence):
    given = [tmp_path / "page.html" if each == "P" else each for each in options]
    assert sentence in refused("generate", model_dir, *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_refused(model_dir, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written (Permission denied)" in refused("generate", model_dir, "--page", tmp_path / "page.html")


def test_an_unwritable_page_is_refused(model_dir, tmp_path):
    taken = tmp_path / "page.html"
    taken.write_text("mine")
    assert "exists; give another name, or delete it first" in refused("generate", model_dir, "--page", taken)
    assert taken.read_text() == "mine"
    assert "cannot be written" in refused("generate", model_dir, "--page", tmp_path / ("a" * 300))


def test_an_arm_has_no_sampler_to_stand_beside(tmp_path):
    folder = saved(tmp_path / "arm", "arm")
    sentence = refused("generate", folder, "--page", tmp_path / "page.html", "--beside", "margin")
    assert "this model writes from left to right and has no samplers" in sentence
