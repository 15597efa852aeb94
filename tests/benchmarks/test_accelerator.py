"""benchmarks/accelerator.py with tiny sizes on the CPU: its record, its time budget, what fails and what goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = FOLDER / "accelerator.py"


@pytest.fixture
def benchmark(monkeypatch):
    """The module, found as its own script finds its neighbours."""
    monkeypatch.syspath_prepend(FOLDER)
    import accelerator

    return accelerator


@pytest.fixture
def options(benchmark, tmp_path):
    return benchmark.parse(["--device", "cpu", "--tiny", "--out", str(tmp_path)])


@pytest.fixture
def setting(benchmark, options):
    return benchmark.make_setting("cpu", 0, Path(options.out), tiny=True)


def run(out: Path, *arguments: str) -> dict:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out), *arguments]
    # torch.compile itself does what PyTorch calls deprecated, which the suite makes an error.
    env = os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "accelerator.json").read_text())


@pytest.mark.slow
def test_all_of_it_runs_with_tiny_sizes_and_goes_on_with_its_record(tmp_path):
    record = run(tmp_path)
    parts = record["results"]["parts"]
    rows = {row["name"]: row for part in parts.values() for row in part["rows"]}
    assert [part["ended"] for part in parts.values()] == ["whole"] * 5
    without_numbers = {name for name, row in rows.items() if "failed" in row or "not_begun" in row}
    assert without_numbers <= {"1.1B, flash_attn", "train.py, accelerate launch"}
    # float32 sums in another order
    chunked, full = rows["chunked, V = 64"], rows["full, V = 64"]
    assert chunked["nats_per_token"] == pytest.approx(full["nats_per_token"], rel=1e-5)
    assert chunked["gradient_norm"] == pytest.approx(full["gradient_norm"], rel=1e-5)
    sharded = rows["1.1B, fully_shard"]
    assert sharded["loss"] == pytest.approx(sharded["loss_without_sharding"], rel=1e-5)
    eager, compiled = rows["1.1B, eager"], rows["1.1B, torch.compile"]
    assert (eager["compiler"], compiled["compiler"]) == (None, "aot_eager") and eager["flops"] == compiled["flops"]
    assert eager["mfu"] is None and set(eager["share_of_matrix_rate"]) == {"width", "square"}
    arms = parts["study"]["rows"]
    assert [row["name"].split(",")[0] for row in arms] == ["MDM", "nested 6-11"]
    assert all(row["flops_measured"] <= 3e7 for row in arms)
    assert str(tmp_path) not in json.dumps(record)

    again = run(tmp_path, "--parts", "head", "study")["results"]["parts"]
    assert again == parts


def test_a_failure_is_a_sentence_and_the_next_measurement_is_made(benchmark, options, setting, capsys):
    def fail(error):
        def work(setting):
            raise error

        return work

    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")
    measurements = [
        benchmark.Measurement("no package", 0, fail(RuntimeError("flash_attn is\nnot installed"))),
        benchmark.Measurement("too large", 0, fail(memory)),
        benchmark.Measurement("long", 0, fail(KeyError("x" * 5000))),
        benchmark.Measurement("not a number", 0, lambda setting: {"tokens_per_second": float("nan")}),
        benchmark.Measurement("good", 0, lambda setting: {"tokens_per_second": 1234.0}),
    ]
    benchmark.begin(options)
    benchmark.measure(setting, "step", measurements, options.output, time.time() + 60)
    rows = {row.pop("name"): row for row in benchmark.rows_of(options.output, "step")}
    assert rows["no package"] == {"failed": "flash_attn is not installed"}
    assert rows["too large"] == {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"}
    assert len(rows["long"]["failed"]) < 330
    assert rows["not a number"]["failed"].startswith("ValueError: Out of range float values")
    assert rows["good"] == {"tokens_per_second": 1234.0}
    assert "step: good: 1,234 tokens/s" in capsys.readouterr().out
    assert [each.name for each in benchmark.missing(options.output, "step", measurements)] == [
        "no package", "too large", "long", "not a number",
    ]  # fmt: skip


def test_a_signal_ends_a_part_after_the_run_of_the_study_has_saved(benchmark, options, setting, monkeypatch):
    import accelerator_parts

    def stopped(comparison, out, running):
        raise benchmark.Stopped(signal.SIGTERM)

    monkeypatch.setattr(accelerator_parts, "run_comparison", stopped)
    benchmark.begin(options)
    with pytest.raises(benchmark.Stopped):
        benchmark.measure(setting, "study", benchmark.parts(setting)["study"], options.output, time.time() + 60)
    (row,) = benchmark.rows_of(options.output, "study")
    assert row["failed"] == (
        "stopped at the preparation of its text; the same command goes on from its last checkpoint"
    )


def test_each_row_is_in_the_record_before_the_next_one_begins(benchmark, options, setting):
    seen = []
    count = lambda setting: seen.append(len(benchmark.rows_of(options.output, "head"))) or {"seconds": []}  # noqa: E731
    benchmark.begin(options)
    measurements = [benchmark.Measurement(f"{number}", 0, count) for number in range(3)]
    benchmark.measure(setting, "head", measurements, options.output, time.time() + 60)
    assert seen == [0, 1, 2]


def test_what_takes_longer_than_the_time_that_is_left_is_not_begun(benchmark, options, setting):
    made = []
    short = benchmark.Measurement("short", 5, lambda setting: {"made": made.append(1)})
    long = benchmark.Measurement("long", 100, lambda setting: {"made": made.append(1)})
    benchmark.begin(options)
    benchmark.measure(setting, "step", [long, short], options.output, time.time() + 60)
    rows = benchmark.rows_of(options.output, "step")
    assert made == [1] and rows[1] == {"name": "short", "made": None}
    assert rows[0]["not_begun"].endswith("s were left, it takes about 100 s")
    # Nor is a process begun for it.
    benchmark.run_part("head", [long], options, time.time() + 60)
    assert benchmark.rows_of(options.output, "head") == [{"name": "long", "not_begun": "the time was over"}]


def test_a_process_is_stopped_at_its_end_with_what_it_started(benchmark, tmp_path):
    command = f"sleep 600 & echo $! > {tmp_path / 'pid'}; wait"
    process = subprocess.Popen(["sh", "-c", command], start_new_session=True)
    assert benchmark.wait(process, time.time() + 1) is None
    benchmark.stop(process)
    assert process.returncode != 0
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # until its new parent has taken notice of its end
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the process that it started goes on")


def test_a_batch_too_large_for_the_memory_is_halved(benchmark, setting):
    from accelerator_parts import halving

    def work(setting, batch, largest):
        if batch > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"batch": batch}

    setting = dataclasses.replace(setting, batch=8)
    assert halving(setting, partial(work, largest=8)) == {"batch": 8, "batches_out_of_memory": []}
    assert halving(setting, partial(work, largest=2)) == {"batch": 2, "batches_out_of_memory": [8, 4]}
    with pytest.raises(torch.OutOfMemoryError):
        halving(setting, partial(work, largest=0))


def test_the_model_is_the_published_one_with_1_1_billion_weights(benchmark):
    with torch.device("meta"):
        model = dataclasses.replace(benchmark.make_setting("cpu", 0, Path("x")), device=torch.device("meta")).model()
    layers = sum(weight.numel() for weight in model.model.layers.parameters()) + model.config.hidden_size
    assert layers == 1_027_677_952  # N of the recipe
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(1.1e9, rel=0.03)


def test_the_study_is_mdm_and_digits_at_equal_measured_flops(benchmark):
    names = [each.name for each in benchmark.parts(benchmark.make_setting("cpu", 0, Path("x")))["study"]]
    assert names == ["MDM, 1e16 FLOPs, seed 0", "nested 6-11, 1e16 FLOPs, seed 0"]


def test_a_record_of_something_else_is_refused(benchmark, options):
    benchmark.begin(options)
    benchmark.begin(options)
    with pytest.raises(ValueError, match=r"accelerator.json has seed 0, but this is 1; give another --output"):
        benchmark.begin(SimpleNamespace(**vars(options) | {"seed": 1}))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cpu"], "--device cpu: the sizes are those of a GPU; add --tiny"),
        (["--device", "cuda"], "--device cuda: PyTorch sees no GPU; use --device cpu --tiny"),
        (["--minutes", "0"], "0 must be minutes above 0 and up to 1440, e.g. 8"),
        (["--minutes", "nan"], "nan must be minutes above 0"),
        (["--device", "cpu", "--tiny", "--study", "isoflop"], "--study isoflop with --tiny, which has a study of its"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(benchmark, arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert sentence in capsys.readouterr().err
