"""A run that was stopped, killed or damaged goes on to the weights of an unbroken one, bit for bit."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import MODEL, TINY, losses_of, write_text
from transformers import PreTrainedTokenizerFast

from prime_v2.data import preparation as prepare
from prime_v2.data.documents import read_documents
from prime_v2.data.preparation import SEALED
from prime_v2.data.sources import fingerprint_of
from prime_v2.output.locks import folder_lock
from prime_v2.output.seals import write_seal
from prime_v2.tokenization import plain_text
from prime_v2.tokenization.bpe import train_bpe
from prime_v2.training import run as training
from prime_v2.training.checkpoints import seal
from prime_v2.training.course import Holds, check_folder

ROOT = Path(__file__).resolve().parents[2]
# Dropout draws from the random states that a checkpoint must bring back.
OPTIONS = [*TINY.split(), *MODEL, "attention_dropout=0.1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def train(text: Path, folder: Path, *more: str) -> int:
    return training.main(["--data", str(text), "--output_dir", str(folder), *more, *OPTIONS])


def stop_at(monkeypatch, step: int) -> None:
    """Every later training step ends the process, as a second Ctrl-C does: without another checkpoint."""
    inner = training.DiffusionTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step >= step:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(training.DiffusionTrainer, "training_step", stopping)


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert train(text, folder) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory) -> Path:
    """Stopped in its sixth step, with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 5)
        assert train(text, folder) == 130
    assert sorted(each.name for each in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    return folder


@pytest.fixture
def broken(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def same_weights(first: Path, second: Path) -> bool:
    weights = [load_file(each / "model.safetensors") for each in (first, second)]
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(weights[0][k], weights[1][k]) for k in weights[0]
    )


@pytest.mark.parametrize("more", [[], ["--dataloader_num_workers", "2"]], ids=["same command", "two workers"])
def test_a_stopped_run_goes_on_to_the_same_weights_and_history(more, text, unbroken, broken, capsys):
    assert train(text, broken, *more) == 0
    assert "continuing from" in capsys.readouterr().out
    assert same_weights(broken, unbroken)
    assert losses_of(broken) == losses_of(unbroken)


def damage_file(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "torn":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 8
        path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "how"),
    [("optimizer.safetensors", "torn"), ("model.safetensors", "flipped"), ("scheduler.json", "missing")],
)
def test_a_damaged_checkpoint_costs_its_steps_alone(name, how, text, unbroken, broken, capsys):
    damage_file(broken / "checkpoint-4" / name, how)
    assert train(text, broken) == 0
    seen = capsys.readouterr()
    assert (
        f"checkpoint-4 is damaged ({name} is " in seen.err and "checkpoint-2" in seen.out.split("continuing from")[1]
    )
    assert (broken / "damaged-checkpoint-4").exists() and same_weights(broken, unbroken)


def test_without_a_whole_checkpoint_the_run_is_refused_and_left_as_it_is(text, broken, capsys):
    damage_file(broken / "checkpoint-4" / "optimizer.safetensors", "torn")
    damage_file(broken / "checkpoint-2" / "trainer_state.json", "missing")
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    assert train(text, broken) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "holds no whole checkpoint: checkpoint-4 (optimizer.safetensors is not as it was written), checkpoint-2"
        in line
    )
    assert {path: path.stat().st_mtime_ns for path in broken.rglob("*")} == before


def test_a_checkpoint_without_its_optimizer_is_refused_instead_of_starting_a_new_one(text, broken, capsys):
    for name in ("optimizer", "scheduler"):
        for path in (broken / "checkpoint-4").glob(f"{name}.*"):
            path.unlink()
    seal(broken / "checkpoint-4")
    assert train(text, broken) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("checkpoint-4 was written by FSDP, DeepSpeed or --save_only_model: the state of its opt", line)


def test_no_file_of_a_checkpoint_or_of_the_run_is_a_pickle(stopped, unbroken):
    files = [each for folder in (stopped, unbroken) for each in folder.rglob("*") if each.is_file()]
    names = {each.name for each in files}
    assert {"optimizer.safetensors", "optimizer.json", "scheduler.json", "random_0.safetensors"} <= names
    assert not {each.suffix for each in files} & {".bin", ".pt", ".pth", ".pkl"}
    # What torch.save and pickle begin their files with; a safetensors file begins with the length of its header.
    assert not [each for each in files if each.read_bytes()[:4] == b"PK\3\4" or each.read_bytes()[:1] == b"\x80"]
    state = json.loads((stopped / "checkpoint-4" / "optimizer.json").read_text())
    assert state["param_groups"][0]["betas"] == {"$tuple": [0.9, 0.95]}


def test_what_a_kill_leaves_of_run_json_does_not_lock_the_folder(tmp_path):
    (tmp_path / ".run.json.a1b2c3").write_text('{"see')
    (tmp_path / ".lock").write_text('{"pid')
    assert check_folder(tmp_path, {}) is Holds.nothing
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        check_folder(tmp_path, {})


def test_an_option_that_a_later_version_added_has_been_at_its_default(tmp_path):
    """run.json of before there was --example_template."""
    (tmp_path / "run.json").write_text('{"seed": 0}')
    (tmp_path / "checkpoint-1").mkdir()
    same = {"seed": 0, "example_template": "{prompt}\n{answer}", "lora": None}
    assert check_folder(tmp_path, same) is Holds.unfinished
    with pytest.raises(ValueError, match="a run with lora=None, not 8"):
        check_folder(tmp_path, {"seed": 0, "lora": 8})


@pytest.mark.parametrize("content", ["[]", "3", "", "[" * 100_000, "9" * 5000])
def test_options_of_the_run_that_cannot_be_read_are_a_sentence(content, text, broken, capsys):
    (broken / "run.json").write_text(content)
    assert train(text, broken) == 2
    assert "holds a run whose options cannot be read (run.json is damaged)" in capsys.readouterr().err


def test_a_look_at_a_folder_changes_nothing_even_where_another_run_gives_way(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 0}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").write_text("ids")
    assert check_folder(tmp_path, {"seed": 1}) is Holds.other
    assert (tmp_path / "data" / "train").read_text() == "ids"


def test_a_second_run_in_the_folder_is_refused_whatever_its_options(text, broken, capsys):
    """Before anything is looked at: neither the checkpoints nor run.json are touched."""
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    with folder_lock(broken, "--output_dir"):
        for more in ([], ["--learning_rate", "1"]):
            assert train(text, broken, *more) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"train.py: error: --output_dir {broken} is in use by process {os.getpid()} on ")
    assert {path: path.stat().st_mtime_ns for path in broken.rglob("*")} == before


@pytest.mark.slow
def test_both_processes_of_a_second_run_are_refused_in_one_sentence(text, broken):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "train.py"), "--data", str(text), "--output_dir", str(broken), *OPTIONS]
    with folder_lock(broken, "--output_dir"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode and done.stderr.count("train.py: error: --output_dir") == 1
    assert f"is in use by process {os.getpid()} on" in done.stderr
    assert done.stderr.count("Traceback (most") == 1  # torchrun's own, of processes that ended with a status


# Options that cannot change the course: as many of them as can be changed at once.
OTHERWISE = (
    "--logging_steps 2 --save_steps 3 --eval_steps 1 --save_total_limit 5 --dataloader_num_workers 1 "
    "--dataloader_prefetch_factor 3 --eval_on_start true --logging_first_step true --run_name x --label y "
    "--log_level error --gradient_checkpointing true --torch_empty_cache_steps 1 --disable_tqdm true"
)


def test_options_without_influence_are_changed_on_the_way_and_the_weights_are_the_same(text, unbroken, broken):
    arguments = ["--data", str(text), "--output_dir", str(broken), *TINY.split(), *OTHERWISE.split()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the name of gradient_checkpointing
        assert training.main([*arguments, *MODEL, "attention_dropout=0.1"]) == 0
    assert same_weights(broken, unbroken)


@pytest.mark.parametrize(
    "more",
    [
        ["--adam_beta1", "0.8"],
        ["--max_grad_norm", "0.1"],
        ["--neftune_noise_alpha", "5"],
        ["--accelerator_config", '{"even_batches": false}'],
        ["--per_device_train_batch_size", "1"],
    ],
    ids=lambda more: more[0],
)
def test_an_option_that_changes_the_course_is_refused_on_the_way(more, text, broken, capsys):
    arguments = ["--data", str(text), "--output_dir", str(broken), *TINY.split(), *more]
    assert training.main([*arguments, *MODEL, "attention_dropout=0.1"]) == 2
    assert f"holds a run with {more[0][2:]}=" in capsys.readouterr().err


# Text


@pytest.fixture
def own_text(text, broken) -> Path:
    """The text of a stopped run, which a test may change."""
    copy = Path(shutil.copy2(text, broken.parent / "own.jsonl"))
    run = json.loads((broken / "run.json").read_text())
    (broken / "run.json").write_text(json.dumps(run | {"data": str(copy)}))
    prepared = broken / "data" / "text.json"
    content = json.loads(prepared.read_text())
    content |= {"data": str(copy), "source": fingerprint_of(str(copy))}
    prepared.write_text(json.dumps(content))
    write_seal(broken / "data", "complete", ("train", "dev", "test", "train.json", "dev.json", "test.json", *SEALED))
    return copy


def test_text_that_has_changed_since_it_was_prepared_is_refused(own_text, broken, capsys):
    content = own_text.read_text()
    own_text.write_text(content.replace("cat", "dog", 1))
    assert train(own_text, broken) == 2
    assert re.search(
        r"has changed since the text in .* was prepared of it \(own.jsonl has another", capsys.readouterr().err
    )
    own_text.write_text(content)  # at another time, with the same content
    assert train(own_text, broken) == 0


def test_prepared_text_outlives_its_source(own_text, broken, unbroken):
    """There is no other text that could be meant."""
    own_text.unlink()
    assert train(own_text, broken) == 0
    assert same_weights(broken, unbroken)


@pytest.mark.parametrize("name", ["train", "train.json", "text.json", "tokenizer/code_table.json"])
def test_prepared_text_that_is_not_as_it_was_written_is_refused(name, text, broken, capsys):
    damage_file(broken / "data" / name, "flipped")
    assert train(text, broken) == 2
    found = name.split("/")[-1]
    assert f"is damaged ({found} is not as it was written); put a copy back" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source", [None, 3, {}, {"files": 3}, {"files": {"a": 3}}, {"revision": 3}, {"files": {}, "revision": None}]
)
def test_a_description_of_the_text_that_is_none_is_refused_though_it_is_sealed(source, own_text, broken, capsys):
    path = broken / "data" / "text.json"
    content = json.loads(path.read_text()) | {"source": source}
    path.write_text(json.dumps([] if source is None else content))
    write_seal(broken / "data", "complete", ("train", "dev", "test", "train.json", "dev.json", "test.json", *SEALED))
    assert train(own_text, broken) == 2
    assert "is damaged (text.json is damaged); put a copy back" in capsys.readouterr().err


# What happens to the folder meanwhile


def test_a_folder_that_is_deleted_during_the_run_ends_it_with_a_sentence(text, tmp_path, monkeypatch, capsys):
    inner, folder = training.DiffusionTrainer.training_step, tmp_path / "run"

    def deleting(self, *args, **kwargs):
        if self.state.global_step == 1:
            shutil.rmtree(folder, ignore_errors=True)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(training.DiffusionTrainer, "training_step", deleting)
    assert train(text, folder) == 2
    assert re.search(r"--output_dir .*run was deleted or replaced .* before step 2", capsys.readouterr().err)
    assert not folder.exists()


@pytest.mark.parametrize("moment", ["preparation", "checkpoint", "end"])
def test_a_full_disk_while_the_tokenizer_is_written_is_a_sentence(moment, text, tmp_path, monkeypatch, capsys):
    """tokenizers has no error of its own for it, but raises Exception itself."""
    inner = PreTrainedTokenizerFast.save_pretrained

    def full(self, folder, *args, **kwargs):
        place = str(folder)
        now = "preparation" if "data" in place else "checkpoint" if "checkpoint" in place else "end"
        if now == moment:
            raise Exception("No space left on device (os error 28)")
        return inner(self, folder, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    assert train(text, tmp_path / "run") == 2
    assert re.search(r"could not be written \(No space left on device \(os error 28\)\)", capsys.readouterr().err)
    monkeypatch.undo()
    assert train(text, tmp_path / "run") == 0


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_a_sentence(text, unbroken, tmp_path):
    """A real refusal of the system: no file may be as large as tokenizer.json, which is the largest by then."""
    prepared = unbroken / "data"
    whole = prepared / "tokenizer_of_whole_tokens" / "tokenizer.json"
    limit = whole.stat().st_size - 100
    assert max(each.stat().st_size for each in prepared.iterdir() if each.is_file()) < limit
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from prime_v2.training.run import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--data", str(text), "--output_dir", str(tmp_path / "run"), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert re.search(
        r"^train.py: error: the prepared text in .* could not be written \(File too large", done.stderr, re.M
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


# Streams


def test_a_stopped_stream_goes_on_to_the_same_weights_and_tokenises_only_what_is_left(
    text, tmp_path, monkeypatch, capsys
):
    """The stream is the local file; of each run the documents are noted that it tokenises while it trains."""
    base = train_bpe(read_documents(text), 300)
    PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|endoftext|>").save_pretrained(tmp_path / "base")
    monkeypatch.setattr(prepare, "read_documents", lambda source, *, streaming, **options: read_documents(text))
    monkeypatch.setattr(plain_text, "TEXTS_PER_BATCH", 2)
    plain_ids, seen = training.plain_ids, []
    noted = lambda tokenizer, texts: [seen.extend(texts), plain_ids(tokenizer, texts)][1]  # noqa: E731
    monkeypatch.setattr(training, "plain_ids", noted)
    run_from = training.DiffusionTrainer.run_from
    monkeypatch.setattr(
        training.DiffusionTrainer, "run_from", lambda *arguments: [seen.clear(), run_from(*arguments)][1]
    )

    def run(name: str, status: int = 0) -> list[str]:
        more = ["--data", "a_hub_set", "--streaming", "--tokenizer", str(tmp_path / "base")]
        assert training.main([*more, "--output_dir", str(tmp_path / name), *OPTIONS]) == status
        return list(seen)

    every = run("unbroken")
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        run("stopped", 130)
    rest = run("stopped")
    assert "checkpoint-4" in capsys.readouterr().out.split("continuing from")[1]
    assert same_weights(tmp_path / "stopped", tmp_path / "unbroken")
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "unbroken")
    # A start reads the first documents to measure a batch; then those of the last two of six steps are left.
    assert 0 < len(rest) < len(every) and rest == every[-len(rest) :]


@pytest.mark.slow
def test_two_processes_resume_a_stream_and_stop_together_at_a_loss_of_one(text, tmp_path):
    """A loss of NaN on the second process only: the first one tells its samples, and both stop."""
    base = train_bpe(read_documents(text), 300)
    PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|endoftext|>").save_pretrained(tmp_path / "base")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [str(ROOT / "tests" / "two_process_stream.py"), str(text), str(tmp_path / "base"), str(tmp_path)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from" in done.stdout and "checkpoint-4" in done.stdout.split("continuing from")[1]
    assert same_weights(tmp_path / "stopped", tmp_path / "unbroken")
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "unbroken")
    assert "the loss is nan at step 3 (samples 14 to 15); the last good checkpoint is" in done.stderr
    assert {"random_0.json", "random_1.json"} <= {each.name for each in tmp_path.glob("stopped/checkpoint-4/*")}


# Kills


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path):
    """Five SIGKILLs, one aimed at each phase of a run, two commands at once, and a folder that was tampered with;
    benchmarks/crash_test.py does the same a hundred times."""
    command = [sys.executable, str(ROOT / "benchmarks" / "crash_test.py"), "--kills", "5", "--steps", "8"]
    command += ["--pairs", "1", "--tampers", "2"]
    command += ["--folder", str(tmp_path / "runs"), "--output", str(tmp_path / "record.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    results = json.loads((tmp_path / "record.json").read_text())["results"]
    assert results["kills"] == sum(results["kills_by_phase"].values()) == 5
    assert (results["lost_runs"], results["runs_with_other_weights"]) == (0, 0)
    pairs, tampered = results["two_processes"], results["tampering"]
    assert (pairs["one_refused"] + pairs["one_after_the_other"], pairs["wrong"]) == (1, 0)
    assert (tampered["equal"] + tampered["refused"], tampered["other_weights"]) == (2, 0)
    runs = [each for each in (tmp_path / "runs").glob("run_*") if each.is_dir()]
    assert len(runs) == results["runs"] and any(results["kills_of_each_run"])
    assert all(same_weights(each, tmp_path / "runs" / "unbroken") for each in runs)
