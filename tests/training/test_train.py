"""train.py from end to end on a few steps: records, resume, refusals, interruption."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_runs import MODEL, TINY, losses_of, write_text
from transformers import PreTrainedTokenizerFast

from prime_v2 import PrimeV2Tokenizer
from prime_v2.data import preparation as prepare
from prime_v2.data.documents import read_documents
from prime_v2.tokenization.bpe import train_bpe
from prime_v2.training import run as training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train():
    """What train.py calls."""
    return training


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def finished(train, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train.main(["--data", str(text), "--output_dir", str(folder), *TINY.split(), *MODEL]) == 0
    return folder


def run_script(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_a_run_leaves_a_complete_hub_folder_a_record_a_plot_and_a_card(finished):
    record = json.loads((finished / "results" / "train.json").read_text())
    bound = record["results"]["evaluation"]["bound"]
    assert bound["is_bound"] and bound["perplexity"] == pytest.approx(
        torch.tensor(bound["nats_per_token"]).exp().item()
    )
    assert "perplexity" not in record["results"]["evaluation"]["paper_loss"]
    assert record["results"]["training"]["tokens"] == 6 * 4 * 16
    assert f"{bound['nats_per_token']:.3f}"[:4] in (finished / "README.md").read_text()
    for name in ("config.json", "model.safetensors", "code_table.json", "modeling_prime_v2.py", "loss.png"):
        assert (finished / name).stat().st_size > 0
    assert not list(finished.glob("*.bin"))  # no pickle in the hub folder
    tokenizer = PrimeV2Tokenizer.from_pretrained(finished)
    codes = load_file(finished / "model.safetensors")["code_table.codes"]
    assert torch.equal(codes[:-1], torch.from_numpy(tokenizer.code_table))
    scored = [entry for entry in record["results"]["history"] if "eval_bound" in entry]
    assert [entry["step"] for entry in scored] == [3, 6]
    assert scored[0]["eval_perplexity"] == pytest.approx(math.exp(scored[0]["eval_bound"]))


def test_the_same_command_again_prints_the_results_and_changes_nothing(train, text, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train.main(["--data", str(text), "--output_dir", str(finished), *TINY.split(), *MODEL]) == 0
    assert "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_stopped_by_ctrl_c_continues_to_the_same_weights(train, text, finished, tmp_path, monkeypatch, capsys):
    """Stopped after step 3 by the signal, resumed by the same command: bit-identical to the unbroken run."""
    folder = tmp_path / "run"
    arguments = ["--data", str(text), "--output_dir", str(folder), *TINY.split(), *MODEL]
    step = train.DiffusionTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(train.DiffusionTrainer, "training_step", interrupted)
        # A second Ctrl-C in the same step (its other micro-batch) would stop at once: send only one.
        handle = train.StopOnSignal._handle
        patched.setattr(train.StopOnSignal, "_handle", lambda self, *each: self.received or handle(self, *each))
        assert train.main(arguments) == 128 + signal.SIGINT
    assert "the same command continues" in capsys.readouterr().out
    assert (folder / "checkpoint-3").exists() and not (folder / "results").exists()
    assert train.main(arguments) == 0
    expected, found = (load_file(each / "model.safetensors") for each in (finished, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_data_order_and_noise_do_not_depend_on_the_accumulation_split(train, text, finished, tmp_path):
    """Four sequences a step as 2 x 2 or as 1 x 4 give the same losses; another seed does not."""
    start = ["--data", str(text), *TINY.split()]
    split = ["--per_device_train_batch_size", "1", "--output_dir", str(tmp_path / "split"), *MODEL]
    seed = ["--seed", "1", "--output_dir", str(tmp_path / "seed"), *MODEL]
    assert train.main([*start, *split]) == 0
    assert train.main([*start, *seed]) == 0
    assert losses_of(tmp_path / "split") == pytest.approx(losses_of(finished), abs=1e-4)  # float32 sums
    assert abs(losses_of(tmp_path / "seed")[0] - losses_of(finished)[0]) > 1e-2


def test_two_processes_train_as_one_and_report_to_a_tracker(text, finished, tmp_path):
    """Through torchrun and gloo (accelerate launch starts several CPU processes by mpirun only): the losses and the
    bound of one process; TensorBoard's file is written."""
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [str(ROOT / "train.py"), "--data", str(text), "--output_dir", str(folder)]
    options = [*TINY.split(), "--report_to", "tensorboard", *MODEL]
    done = subprocess.run([*launch, *options], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 2 x cpu" in done.stdout
    assert losses_of(folder) == pytest.approx(losses_of(finished), abs=1e-4)
    bounds = [json.loads((each / "results" / "train.json").read_text()) for each in (folder, finished)]
    values = [each["results"]["evaluation"]["bound"]["nats_per_token"] for each in bounds]
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert list(folder.rglob("events.out.tfevents*"))


def test_a_stream_trains_and_a_finished_one_is_not_continued(train, text, tmp_path, monkeypatch):
    """A streamed set, its reading replaced by a local file: dev and test blocks are packed, training text is not."""
    base = train_bpe(read_documents(text), 300)
    PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|endoftext|>").save_pretrained(tmp_path / "base")

    def stream(source, *, streaming, **options):
        assert source == "a_hub_set" and streaming
        return read_documents(text)

    monkeypatch.setattr(prepare, "read_documents", stream)
    arguments = ["--data", "a_hub_set", "--streaming", "--tokenizer", str(tmp_path / "base"), *TINY.split()]
    arguments += ["--output_dir", str(tmp_path / "run"), *MODEL]
    assert train.main(arguments) == 0
    assert not (tmp_path / "run" / "data" / "train").exists()
    before = losses_of(tmp_path / "run")
    (tmp_path / "run" / "results" / "train.json").unlink()  # as if the final evaluation had been stopped
    assert train.main(arguments) == 0
    assert losses_of(tmp_path / "run") == before


def test_another_run_in_the_folder_is_refused(train, text, finished, capsys):
    before = (finished / "model.safetensors").read_bytes()
    assert train.main(["--data", str(text), "--output_dir", str(finished), *TINY.split(), "--seed", "1", *MODEL]) == 2
    assert "holds a run with seed=0, not 1" in capsys.readouterr().err
    assert (finished / "model.safetensors").read_bytes() == before


def test_a_folder_with_other_things_is_refused(train, text, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert train.main(["--data", str(text), "--output_dir", str(tmp_path), *TINY.split(), *MODEL]) == 2
    assert "is not empty and holds no run; use a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate", "1"], "unknown option --lerning_rate; did you mean --learning_rate?"),
        (["--config", "nothing.yaml"], "--config nothing.yaml is no file and no recipe; .* owt, .* tiny"),
        (["--global_batch", "3", "--per_device_train_batch_size", "2"], "is not a multiple of 2 .*; use 2 or 4"),
        (["--model", "hiden_size=3"], "--model hiden_size is no field of PrimeV2Config .*hidden_size"),
        (["--model", "hidden_size"], "--model hidden_size is not KEY=VALUE"),
        (
            ["--short_share", "2", "--block_size", "0"],
            r"--block_size 0 must be at least 1; use 512; --short_share 2.0 is outside \[0, 1\]; use 0.01",
        ),
        (["--config", "published"], "published holds several runs; add one of them, e.g. --config published:mdm_14m"),
        (["--model", "stage_digits=["], "the value is not YAML"),
        (["--fp16", "true"], "--fp16 True is not supported here .*; leave it at False"),
        (["--max_steps", "0"], "--max_steps 0 must be at least 1"),
        (
            ["--record", "/dev/null/runs/record.json"],
            "--record /dev/null/runs: /dev/null is not a folder; give another",
        ),
        (["--streaming"], "--streaming needs a hub data set"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_status_2(train, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty"), (b"ab\0cd" * 100, "byte"), (None, "does not exist|no such|cannot|neither")]
)
def test_bad_text_is_refused_and_leaves_nothing(train, content, message, capsys, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert train.main(["--data", str(path), "--output_dir", str(tmp_path / "run"), *TINY.split(), *MODEL]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("train.py: error:")
    assert not (tmp_path / "run").exists()


def test_impossible_models_are_refused_by_name_and_leave_nothing(train, text, capsys, tmp_path):
    options = ["--data", str(text), "--output_dir", str(tmp_path / "run"), *TINY.split()]
    assert train.main([*options, "--model", "base=2", "num_subtokens=3"]) == 2
    assert "does not fit in num_subtokens=3 digits of base 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("No space left"), RuntimeError("unexpected pos 64")],
    ids=["copy", "safetensors", "torch.save"],
)
def test_a_full_disk_in_a_checkpoint_keeps_the_last_good_one(train, text, error, tmp_path, monkeypatch, capsys):
    """Each writer has an error of its own for it."""
    folder = tmp_path / "run"
    save = train.DiffusionTrainer.save_model

    def full(self, output_dir=None, **kwargs):
        if self.state.global_step == 4:
            Path(output_dir).mkdir(parents=True)
            (Path(output_dir) / "model.safetensors").write_bytes(b"torn")
            raise error
        return save(self, output_dir, **kwargs)

    monkeypatch.setattr(train.DiffusionTrainer, "save_model", full)
    assert train.main(["--data", str(text), "--output_dir", str(folder), *TINY.split(), *MODEL]) == 2
    message = capsys.readouterr().err
    assert "checkpoint of step 4 could not be written" in message and "checkpoint-2" in message
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / ".incomplete").exists()


def test_a_run_without_a_checkpoint_gives_way_to_corrected_options(train, text, tmp_path, monkeypatch):
    arguments = ["--data", str(text), "--output_dir", str(tmp_path / "run"), *TINY.split()]
    with monkeypatch.context() as patched:
        patched.setattr(train, "make_trainer", lambda *_: (_ for _ in ()).throw(ValueError("no memory")))
        assert train.main([*arguments, *MODEL]) == 2
    assert train.main([*arguments, "--seed", "1", *MODEL]) == 0


def test_a_sample_fits_the_context_with_a_bos_token(train, text, tmp_path):
    """GPT-2's tokenizer has one, and its blocks may be shorter than a sample of 128 tokens."""
    base = train_bpe(read_documents(text), 300)
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=base, **special).save_pretrained(tmp_path / "base")
    arguments = ["--data", str(text), "--output_dir", str(tmp_path / "run"), *TINY.split()]
    assert train.main([*arguments, "--tokenizer", str(tmp_path / "base"), *MODEL]) == 0


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_samples(train, text, tmp_path, monkeypatch, capsys):
    """The second micro-batch of the fourth step: its two samples are named, of the four of the step."""
    compute, calls = train.DiffusionTrainer.compute_loss, []

    def broken(self, *args, **kwargs):
        calls.append(self.state.global_step)
        return compute(self, *args, **kwargs) * (torch.nan if calls.count(3) == 2 else 1)

    monkeypatch.setattr(train.DiffusionTrainer, "compute_loss", broken)
    options = [*TINY.split(), "--save_steps", "1"]
    assert train.main(["--data", str(text), "--output_dir", str(tmp_path / "run"), *options, *MODEL]) == 2
    error = capsys.readouterr().err
    message = r"the loss is nan at step 3 \(samples 14 to 15\); the last good checkpoint is .*checkpoint-3"
    assert re.search(message, " ".join(error.split()))
    check_finite(tmp_path / "run", 3)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(train, text, tmp_path, monkeypatch, capsys):
    """Its loss is finite, and the step would have been followed by a checkpoint of NaN."""
    step = train.DiffusionTrainer.training_step

    def broken(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            next(model.parameters()).grad[0] = torch.inf
        return loss

    monkeypatch.setattr(train.DiffusionTrainer, "training_step", broken)
    options = [*TINY.split(), "--save_steps", "1"]
    assert train.main(["--data", str(text), "--output_dir", str(tmp_path / "run"), *options, *MODEL]) == 2
    assert "the norm of the gradient is inf at step 3 (samples 12 to 15)" in capsys.readouterr().err
    check_finite(tmp_path / "run", 3)


def check_finite(folder: Path, step: int) -> None:
    assert max(int(each.name.split("-")[1]) for each in folder.glob("checkpoint-*")) == step
    weights = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
    assert all(each.isfinite().all() for each in weights.values())


def test_help_runs_as_a_script_and_sigterm_saves(text, tmp_path):
    assert "--bpe_vocab_size" in run_script("--help").stdout
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--data", str(text), "--output_dir", str(folder), *TINY.split()]
    command += ["--max_steps", "100000", "--save_steps", "100000", "--eval_steps", "100000", *MODEL]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    seen = ""
    while "loss" not in seen:  # the progress bar shows a loss: training runs
        character = process.stderr.read(1)
        assert character, seen  # the process ended
        seen += character
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command continues" in out and list(folder.glob("checkpoint-*"))
