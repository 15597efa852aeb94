"""Two processes train as one: DDP on two "machines" by torchrun's rendezvous, and FSDP2; configs of accelerate launch.

Each launch makes all runs that its tests look at, since starting two processes takes longer than the runs.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from sharded_runs import CONFIGS, MODEL, ROOT, ROWS, TINY, check_same_run, cut, record_of

from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.training import run as training

# What every process runs: a list of runs, each after a copy of another run's folder, back at its first checkpoint.
WORKER = """
import json, os, sys
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

start = AcceleratorState.__init__

def shard_on_cpus(self, *args, fsdp_plugin=None, **kwargs):  # Accelerate takes FSDP for accelerators only
    start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)

AcceleratorState.__init__ = shard_on_cpus

from prime_v2 import modeling_prime_v2
from prime_v2.training.run import main
sys.path.insert(0, os.environ["TESTS"])
from sharded_runs import cut

draw_noise, seen = modeling_prime_v2.draw_noise, set()

def spy(scored, order, keys, levels, *rest):
    seen.add(str(levels.dtype))
    return draw_noise(scored, order, keys, levels, *rest)

modeling_prime_v2.draw_noise = spy
for run in json.loads(sys.argv[1]):
    if "cut" in run:
        if PartialState().is_main_process:
            cut(*run["cut"])
        PartialState().wait_for_everyone()
    status = main(run["options"])
    assert status == run.get("status", 0), (run, status)
assert seen == {"torch.float64"}, seen  # no mixed precision rounds the noise levels
torch.distributed.destroy_process_group()
"""


def launch(folder: Path, runs: list[dict[str, Any]], env: dict[str, str], machines: int = 1) -> str:
    """Run `WORKER` in two processes, on one machine or one on each of two; what they print."""
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines)]
    command += ["--nproc_per_node", str(2 // machines), "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{port}", str(worker), json.dumps(runs)]
    env = {**os.environ, **env, "TESTS": str(ROOT / "tests")}
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(machines)
    ]
    texts = [process.communicate(timeout=240) for process in started]
    assert not any(process.returncode for process in started), texts[0][1][-3000:] + texts[-1][1][-3000:]
    return "".join(out for out, _ in texts)


def accelerate_arguments(name: str, *more: str) -> Any:
    """What `accelerate launch --config_file` makes of a file, checked by itself."""
    return _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), *more, "train.py"])
    )[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def options(runs) -> list[str]:
    text = runs / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{q} {a}. " * 4}) + "\n" for q, a in ROWS), encoding="utf-8")
    return ["--data", str(text), *TINY.split(), *MODEL]


@pytest.fixture(scope="module")
def questions(runs, one) -> list[str]:
    """Options of LoRA on questions whose answers have different lengths."""
    sums = runs / "sums.jsonl"
    sums.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ROWS), encoding="utf-8")
    fields = ["--prompt_field", "question", "--answer_field", "answer", "--lora", "2", "--init_from", str(one)]
    tiny = TINY.split()
    return ["--data", str(sums), *fields, *tiny[2:], "--block_size", "24"]


@pytest.fixture(scope="module")
def one(runs, options) -> Path:
    """The run of one process."""
    assert training.main([*options, "--output_dir", str(runs / "one")]) == 0
    return runs / "one"


@pytest.fixture(scope="module")
def ddp(runs, options, questions, one) -> Path:
    assert training.main([*questions, "--output_dir", str(runs / "one_lora")]) == 0
    text = launch(
        runs,
        [
            {"options": [*options, "--output_dir", str(runs / "ddp")]},
            {
                "options": [*options, "--output_dir", str(runs / "one_to_ddp")],
                "cut": [str(one), str(runs / "one_to_ddp")],
            },
            {"options": [*questions, "--output_dir", str(runs / "ddp_lora")]},
        ],
        {},
        machines=2,
    )
    assert "on 2 x cpu" in text and f"continuing from {runs / 'one_to_ddp' / 'checkpoint-3'}" in text
    return runs / "ddp"


@pytest.fixture(scope="module")
def fsdp(runs, options, one) -> Path:
    env = prepare_multi_gpu_env(accelerate_arguments("fsdp2.yaml", "--main_process_port", "0"))  # any that is free
    bf16 = [*options, "--bf16", "true", "--max_steps", "3"]
    assert training.main([*bf16, "--output_dir", str(runs / "one_bf16")]) == 0
    text = launch(
        runs,
        [
            {"options": [*options, "--output_dir", str(runs / "fsdp")]},
            {
                "options": [*options, "--output_dir", str(runs / "fsdp_again")],
                "cut": [str(runs / "fsdp"), str(runs / "fsdp_again")],
            },
            {"options": [*bf16, "--output_dir", str(runs / "fsdp_bf16")]},
        ],
        {key: value for key, value in env.items() if key.startswith(("ACCELERATE_USE", "FSDP_"))},
    )
    assert f"continuing from {runs / 'fsdp_again' / 'checkpoint-3'}" in text
    return runs / "fsdp"


# DDP


def test_two_machines_train_as_one_process(ddp, one):
    check_same_run(ddp, one)


def test_two_processes_continue_the_checkpoint_of_one(ddp, runs, one):
    check_same_run(runs / "one_to_ddp", one)


def test_one_process_continues_the_checkpoint_of_two(ddp, runs, options, one, capsys):
    cut(ddp, runs / "ddp_to_one")
    assert training.main([*options, "--output_dir", str(runs / "ddp_to_one")]) == 0
    assert "checkpoint-3" in capsys.readouterr().out
    check_same_run(runs / "ddp_to_one", one)


def test_answers_of_unequal_lengths_and_an_adapter_on_two_processes(ddp, runs):
    """Each process has other numbers of scored tokens: the divisor is that of both."""
    check_same_run(runs / "ddp_lora", runs / "one_lora")
    name = Path("adapter", "adapter_model.safetensors")
    found, expected = (load_file(runs / each / name) for each in ("ddp_lora", "one_lora"))
    assert found.keys() == expected.keys()


# FSDP2


def test_sharded_processes_train_as_one(fsdp, one):
    check_same_run(fsdp, one)


def test_sharded_processes_continue_their_checkpoint(fsdp, runs, one):
    check_same_run(runs / "fsdp_again", one)


def test_the_weights_of_a_sharded_checkpoint_load_in_one_process(fsdp, one):
    """Weights, configuration and code are those that one process writes."""
    for name in ("checkpoint-3", "."):
        files, others = ({each.name for each in (folder / name).glob("*.py")} for folder in (fsdp, one))
        assert files == others
        assert (fsdp / name / "config.json").read_text() == (one / name / "config.json").read_text()
    model, _ = load_model_and_tokenizer(fsdp / "checkpoint-3", "cpu")
    weights = load_file(one / "checkpoint-3" / "model.safetensors")
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-3)


def test_one_process_refuses_to_continue_a_sharded_checkpoint(fsdp, runs, options, capsys):
    cut(fsdp, runs / "fsdp_to_one")
    assert training.main([*options, "--output_dir", str(runs / "fsdp_to_one")]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-3 was written by FSDP, DeepSpeed or" in error and len(error.strip().splitlines()) == 1


def test_mixed_precision_shards_train_nearly_as_one_process(fsdp, runs):
    """bfloat16 has 8 bits; the noise is the same (`WORKER` looks at its levels), or the loss would be another."""
    found, expected = (
        [entry["loss"] for entry in record_of(runs / each)["history"] if "loss" in entry]
        for each in ("fsdp_bf16", "one_bf16")
    )
    assert found == pytest.approx(expected, rel=0.02)


# The files


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_file_and_knows_every_key(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= known
    assert config.mixed_precision == "bf16"


def test_ddp_and_fsdp2_are_what_they_are_called():
    assert accelerate_arguments("ddp.yaml").multi_gpu and not accelerate_arguments("ddp.yaml").use_fsdp
    env = prepare_multi_gpu_env(accelerate_arguments("fsdp2.yaml", "--main_process_port", "0"))  # any that is free
    assert env["ACCELERATE_USE_FSDP"] == "true" and env["FSDP_VERSION"] == "2"
    assert env["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"  # stops at a persistent buffer
    assert env["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_two_machines_meet_by_rendezvous():
    arguments = accelerate_arguments("multi_node.yaml", "--machine_rank", "1", "--main_process_ip", "10.1.2.3")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "10.1.2.3:29500")


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_configs_name_their_stage(stage):
    config = load_config_from_file(str(CONFIGS / f"zero{stage}.yaml"))
    assert config.distributed_type == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == stage
