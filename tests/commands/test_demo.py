"""`prime-v2 demo` on a few steps of training: what it prints, records and draws, and how it goes on."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from command_runs import of_command
from tiny_runs import write_text

from prime_v2.commands.generate import PICTURES
from prime_v2.eval.plugin import DEMO_RUNS
from prime_v2.output.records import read_record
from prime_v2.studies.compare.plan import cost_of
from prime_v2.training.options import RaisingParser, parse_options
from prime_v2.training.trainer import DiffusionTrainer

STEPS = (
    "--max_steps=4 --warmup_steps=1 --eval_steps=4 --save_steps=2 --logging_steps=1 --eval_sequences=4 "
    "--test_sequences=4 --num_generated=0 --dev_share=0.2 --test_share=0.2 --bpe_vocab_size=300 --block_size=32 "
    "--model hidden_size=16 num_attention_heads=2 num_subtokens=11"
)
run, refused = of_command("demo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """(Folder of a demo that has ended, its arguments)."""
    home = tmp_path_factory.mktemp("demo")
    arguments = ["--out", home / "demo", *STEPS.split(), "--data", write_text(home / "text.jsonl")]
    result = run(*arguments, "--json", "--output", home / "demo.json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == read_record(home / "demo.json")["results"]
    return home / "demo", arguments


def test_both_forms_are_measured_on_the_same_text_and_the_lower_bound_is_the_better(finished):
    folder, _ = finished
    results = read_record(folder.parent / "demo.json")["results"]
    runs = results["runs"]
    assert list(runs) == ["published", "coarse_first"]
    assert runs["published"]["bound"]["unigram_entropy"] == runs["coarse_first"]["bound"]["unigram_entropy"]
    assert runs[results["better"]]["bound"]["nats_per_token"] == min(
        r["bound"]["nats_per_token"] for r in runs.values()
    )
    for name, each in runs.items():
        record = read_record(folder / name / "results" / "train.json")["results"]
        assert each["bound"]["nats_per_token"] == record["evaluation"]["bound"]["nats_per_token"]
        assert each["bound"]["is_bound"]
        assert each["flops_measured"] == record["training"]["flops_measured"]
    assert not runs["published"]["paper_loss"]["is_bound"]
    assert "paper_loss" not in runs["coarse_first"]
    assert not list((folder / "coarse_first" / "data").glob("train*")), "the prepared text is shared"


def test_the_same_command_prints_one_table_the_sample_and_where_all_is(finished):
    folder, arguments = finished
    results = read_record(folder.parent / "demo.json")["results"]
    (folder / "denoising.svg").unlink()
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    lines = again.stdout.splitlines()
    table = lines[1:5]
    assert table[0].split()[:1] == ["held-out"]
    assert [line.split()[0] for line in table[1:]] == ["token", "published:", "coarse_first:"]
    assert f"{results['runs']['published']['paper_loss']['nats_per_token']:.3f} (no bound)" in table[2]
    assert f"<= {results['runs']['coarse_first']['bound']['nats_per_token']:.3f}" in table[3]
    for name, line in zip(results["runs"], table[2:], strict=True):
        assert f"{results['runs'][name]['flops_measured']:.2e}" in line.split()
    assert " ".join(results["sample"].translate(PICTURES).split()) in " ".join(again.stdout.split())
    assert f"how it denoised    {folder / 'denoising.svg'}" in lines
    description = ElementTree.parse(folder / "denoising.svg").find("{http://www.w3.org/2000/svg}desc")
    assert description.text.startswith("Return the number of")


def test_a_demo_that_was_stopped_goes_on_where_it_was(finished, monkeypatch):
    folder, arguments = finished
    other = folder.parent / "stopped"
    arguments = [other if each == folder else each for each in arguments]
    step, taken = DiffusionTrainer.training_step, []

    def stopping(self, *args, **kwargs):
        taken.append(self.state.global_step)
        if len(taken) == 3:  # in the first run, after its checkpoint at step 2
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionTrainer, "training_step", stopping)
    assert run(*arguments).exit_code == 130
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert taken == [0, 1, 2, 2, 3, 0, 1, 2, 3]
    runs, unbroken = json.loads(result.stdout)["runs"], read_record(folder.parent / "demo.json")["results"]["runs"]
    assert runs["published"]["bound"] == unbroken["published"]["bound"]


def test_both_runs_of_the_demo_plan_the_same_measured_flops():
    """Within 1%: the number of steps is whole, and a record's count is that of the same noise."""
    planned = {}
    for name in DEMO_RUNS:
        options, training, model = parse_options(["--config", f"demo:{name}"], parser_class=RaisingParser)
        cost = cost_of(options, training, model, options.bpe_vocab_size, True, name)
        planned[name] = cost.flops("measured") * training.max_steps * options.global_batch * options.block_size
    assert planned["coarse_first"] == pytest.approx(planned["published"], rel=0.01)


def test_what_the_demo_decides_and_what_train_py_does_not_know_are_refused(tmp_path):
    for option, sentence in {
        "--output_dir=x": "--output_dir is set by the demo for both runs; leave it out, or use train.py",
        "--learning_rat=1": "unknown option --learning_rat=1; did you mean --learning_rate?",
    }.items():
        result = run("--out", tmp_path / "demo", option)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"prime-v2 demo: error: {sentence}" in result.stderr
    assert not (tmp_path / "demo").exists()
