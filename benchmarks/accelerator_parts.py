"""What `accelerator.py` measures: its parts, each a list of measurements. One is added by one entry in a list."""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerator_setting import Measurement, Setting, free_memory, peak_memory, reset_peak
from generation import published
from timing import by_turns, products_alone, seconds_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from training_step import Case, Stepper, beside_products, build
from transformers.utils import is_flash_attn_2_available

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion
from prime_v2.chunked_loss_prime_v2 import token_nll
from prime_v2.output.records import read_record
from prime_v2.studies.compare.children import Stopped, progress_of
from prime_v2.studies.compare.config import Comparison, Run, read_comparison
from prime_v2.studies.compare.run import Running, run_comparison
from prime_v2.training.flops import count_parameters, measure_flops, peak_flops, six_n_d
from prime_v2.training.recipes import CONFIGS

WARM_UP_STEPS = 2


# --- a training step of the 1.1B model


def products(setting: Setting, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """The rate of nothing but square products. precision: of float32, "high" lets them run in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        side = setting.side
        run, flops = products_alone(side, side, side, 20 * 2 * side**3, setting.device, dtype)
        seconds = by_turns({"products": run}, setting.repeats)["products"]
    finally:
        torch.set_float32_matmul_precision(before)
    return {"side": side, "seconds": seconds, "flops_per_second": flops / statistics.median(seconds)}


def step(setting: Setting, attention: str = "sdpa", compiled: bool = False) -> dict[str, Any]:
    """A step of the 1.1B model, by turns with products."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise RuntimeError("flash_attn is not installed for this device")
    return halving(setting, partial(_step, attention=attention, compiled=compiled))


def halving(setting: Setting, work: Callable[[Setting, int], dict[str, Any]]) -> dict[str, Any]:
    """The row that `work` gives for the largest batch, of the setting's and its halves, that fits the memory."""
    batch, refused = setting.batch, []
    while True:
        try:
            return work(setting, batch) | {"batches_out_of_memory": refused}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        refused.append(batch)  # outside of `except`, which keeps the tensors of what has failed
        batch //= 2
        free_memory(setting)


def _step(setting: Setting, batch: int, attention: str, compiled: bool) -> dict[str, Any]:
    model = setting.model()
    stepper = Stepper(model, setting.ids(batch))
    # Counted before: the counter knows neither flash_attn's kernel nor compiled ones.
    flops, parameters = _counted(stepper), count_parameters(model)
    model.set_attn_implementation(attention)
    if compiled:
        model.model.compile(backend=setting.compiler)
    row = {"attention": attention, "compiler": setting.compiler if compiled else None}
    row |= _timed(stepper, flops, setting)
    flops_6nd = six_n_d(parameters["non_embedding"], stepper.ids.numel())
    peak = peak_flops(setting.device)
    taken = statistics.median(row["seconds_beside_products"]["step"])
    return row | {
        "parameters": parameters["total"],
        "parameters_non_embedding": parameters["non_embedding"],
        "flops_6nd": flops_6nd,
        "mfu": None if peak is None else flops / taken / peak,
        "mfu_6nd": None if peak is None else flops_6nd / taken / peak,
        "matrix_rate_of_data_sheet": peak,
    }


def _counted(stepper: Stepper) -> int:
    flops = measure_flops(stepper.loss)
    stepper.optimizer.zero_grad(set_to_none=True)
    return flops


def _timed(stepper: Stepper, flops: int, setting: Setting) -> dict[str, Any]:
    """Seconds, peak memory and rate of a step; its first call, which compiles, is apart."""
    reset_peak(setting)
    first = seconds_of(stepper.step)
    for _ in range(WARM_UP_STEPS):
        stepper.step()
    memory = peak_memory(setting)
    batch, length = stepper.ids.shape
    width = stepper.model.config.hidden_size
    sides = {"width": (batch * length, width, 4 * width), "square": (setting.side,) * 3}
    beside = beside_products(stepper, flops, sides, setting.repeats)
    seconds = beside["seconds_beside_products"]["step"]
    return {
        "batch": batch,
        "length": length,
        "first_step_seconds": first,
        "tokens_per_second": batch * length / statistics.median(seconds),
        **memory,
        "flops": flops,
        **beside,
    }


# --- the head


def head(setting: Setting, form: str, vocab_size: int) -> dict[str, Any]:
    """Loss and gradients of whole tokens from hidden states (N, D) in bf16, head in float32, as in a step.

    form: "full" computes the logits (N, V) at once, as Transformers' causal models do; "chunked" never holds them.
    """
    fields, device = setting.model_fields(), setting.device
    width, tokens = fields["hidden_size"], setting.batch * setting.length
    generator = torch.Generator(device).manual_seed(setting.seed)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden = draw(tokens, width).to(torch.bfloat16 if setting.on_accelerator else torch.float32).requires_grad_()
    weight = (draw(vocab_size, width) / width**0.5).requires_grad_()
    ids = torch.randint(vocab_size, (tokens,), generator=generator, device=device)
    ones, losses = torch.ones(tokens, device=device), []

    def run() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.on_accelerator):
            if form == "chunked":
                loss = token_nll(hidden, weight, ids, ones)[0]
            else:
                logits = torch.nn.functional.linear(hidden, weight).float()
                loss = torch.nn.functional.cross_entropy(logits, ids, reduction="sum")
        loss.backward()
        losses.append(loss.detach())

    before = torch.cuda.memory_allocated() if device.type == "cuda" else None
    reset_peak(setting)
    seconds = by_turns({"head": run}, setting.repeats)["head"]
    memory = peak_memory(setting)
    return {
        "form": form,
        "tokens": tokens,
        "hidden_size": width,
        "vocab_size": vocab_size,
        "nats_per_token": losses[-1].item() / tokens,
        "gradient_norm": weight.grad.norm().item(),
        "seconds": seconds,
        "tokens_per_second": tokens / statistics.median(seconds),
        **memory,
        "mib_before": None if before is None else before / 2**20,
    }


def step_of_head(setting: Setting, fields: dict[str, Any] | None) -> dict[str, Any]:
    """A step of a network with the head that `fields` of its configuration give it; None: the causal twin, Llama."""
    width, layers, batch, length, vocab_size, digits = setting.head_shape
    sizes = _Sizes(width, layers, max(1, width // 64), length)
    torch.manual_seed(setting.seed)
    with setting.device:
        if fields is None:
            model = build("causal", Case(vocab_size, digits, "joint"), sizes)
        else:
            shape = {"vocab_size": vocab_size, "hidden_size": width, "intermediate_size": 4 * width}
            shape |= {"num_hidden_layers": layers, "num_attention_heads": sizes.heads}
            model = PrimeV2ForMaskedDiffusion(PrimeV2Config(**shape, max_position_embeddings=length, **fields))
        ids = torch.randint(vocab_size, (batch, length))
    stepper = Stepper(model, ids)
    return _timed(stepper, _counted(stepper), setting)


@dataclass(frozen=True)
class _Sizes:
    """What `training_step.build` reads of the options."""

    hidden_size: int
    layers: int
    heads: int
    length: int


def _nested(setting: Setting, **fields: Any) -> dict[str, Any]:
    """Two stages of digits, with a tree embedding."""
    digits = setting.head_shape[-1]
    stages = {"reveal_order": "nested", "stage_digits": [digits // 2, digits], "subtoken_embedding": "ancestors"}
    return {"num_subtokens": digits, **stages, **fields}


# --- generation


@cache
def _generator(setting: Setting) -> PrimeV2ForMaskedDiffusion:
    """The 1.1B model, in bf16 on an accelerator."""
    model = setting.model().eval()
    return model.to(torch.bfloat16) if setting.on_accelerator else model


def generation(setting: Setting, blocks: bool = False, cache: str = "none") -> dict[str, Any]:
    """`generate`: all tokens at once, or in blocks with keys and values kept as `cache` says."""
    batch, new, steps, block = setting.generated
    start, outputs = torch.zeros(batch, 1, dtype=torch.long, device=setting.device), []

    def run() -> None:
        outputs.append(
            _generator(setting).generate(
                start,
                max_new_tokens=new,
                max_denoising_steps=steps,
                block_length=block if blocks else None,
                cache=cache,
                seed=len(outputs),
                eos_token_id=None,
                return_dict_in_generate=True,
            )
        )

    row = _generated(setting, run)
    passes = torch.stack([each.num_forward for each in outputs]).double().mean().item()
    return row | {"block_length": block if blocks else None, "cache": cache, "passes_per_sequence": passes}


def generation_as_published(setting: Setting) -> dict[str, Any]:
    """The reverse process step by step (`generation.published`), for the same tokens and steps."""
    batch, new, steps, _ = setting.generated
    return _generated(setting, lambda: published(_generator(setting), batch, new + 1, steps))


def _generated(setting: Setting, run: Callable[[], Any]) -> dict[str, Any]:
    batch, new, steps, _ = setting.generated
    _generator(setting)
    reset_peak(setting)
    seconds = by_turns({"generate": run}, max(1, setting.repeats // 3), warm_up=1)["generate"]
    rate = batch * new / statistics.median(seconds)
    shape = {"batch": batch, "new_tokens": new, "steps": steps}
    return shape | {"seconds": seconds, "tokens_per_second": rate, **peak_memory(setting)}


# --- FSDP2 in one process


def sharded_step(setting: Setting, batch: int) -> dict[str, Any]:
    """A step of the 1.1B model under FSDP2 as configs/accelerate/fsdp2.yaml and `training/sharding.py` have it.

    The first loss of the same weights, ids and noise stands beside that without FSDP2, in bf16 by autocast.
    """
    model, ids = setting.model(), setting.ids(batch)
    plain = Stepper(model, ids)
    flops, loss = _counted(plain), _first_loss(plain, setting)
    del plain
    accelerated = setting.on_accelerator
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerated else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if setting.device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
        )
        try:
            mesh = init_device_mesh(setting.device.type, (1,))
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            stepper = Stepper(model, ids)
            sharded_loss = _first_loss(stepper, setting)
            row = _timed(stepper, flops, setting)
        finally:
            torch.distributed.destroy_process_group()
    return {"loss": sharded_loss, "loss_without_sharding": loss} | row


def _first_loss(stepper: Stepper, setting: Setting) -> float:
    torch.manual_seed(setting.seed)
    with torch.no_grad():
        return stepper.loss().item()


def train_py(setting: Setting, sharded: bool) -> dict[str, Any]:
    """A short run of train.py, from text to record; sharded: in one process of `accelerate launch` with fsdp2.yaml."""
    if sharded and not setting.on_accelerator:
        raise RuntimeError("Accelerate shards on accelerators only")
    launcher = [sys.executable]
    if sharded:
        config = CONFIGS / "accelerate" / "fsdp2.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1"]
        launcher += ["--main_process_port", "0"]  # any that is free
    with tempfile.TemporaryDirectory() as folder:
        options = f"--data {setting.text()} --bpe_vocab_size 270 --block_size 32 --global_batch 8 --max_steps 6 "
        options += "--per_device_train_batch_size 4 --save_steps 3 --eval_steps 3 --logging_steps 1 --warmup_steps 0 "
        options += "--dev_share 0.2 --test_share 0.2 --eval_sequences 4 --test_sequences 4 --num_generated 1 "
        options += f"--learning_rate 0.01 --output_dir {folder}/run "
        options += "--model hidden_size=64 num_hidden_layers=2 num_attention_heads=2 intermediate_size=128"
        started = time.monotonic()
        done = subprocess.run(
            [*launcher, "-m", "prime_v2.training.run", *options.split()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
            raise RuntimeError(f"exit status {done.returncode}: {last[-1].strip()}")
        results = read_record(Path(folder) / "run" / "results" / "train.json")["results"]
    bound = results["evaluation"]["bound"]
    return {
        "wall_seconds": time.monotonic() - started,
        "losses": [each["loss"] for each in results["history"] if "loss" in each],
        "nats_per_token": bound["nats_per_token"],
    }


# --- the study


def arm(setting: Setting, comparison: Comparison, run: Run) -> dict[str, Any]:
    """One run of the study, by `prime-v2 compare`; a signal lets it save, and the next call goes on from there."""
    out = setting.out / "study"
    try:
        [(_, record)] = run_comparison(dataclasses.replace(comparison, runs=(run,)), out, Running())
    except Stopped as stopped:
        log = out / "logs" / f"{run.folder}.txt"
        reached = progress_of(log) if log.exists() else "the preparation of its text"
        stopped.args = (f"stopped at {reached}; the same command goes on from its last checkpoint",)
        raise
    training, bound = record["results"]["training"], record["results"]["evaluation"]["bound"]
    peak, rate = peak_flops(setting.device), training["flops_measured"] / training["seconds"]
    kept = ("parameters", "parameters_non_embedding", "steps", "tokens", "flops_6nd", "flops_measured", "seconds")
    return {
        **{name: training[name] for name in kept},
        "tokens_per_second": training["tokens"] / training["seconds"],
        "mfu": None if peak is None else rate / peak,
        "is_exact": bound["is_exact"],
        "nats_per_token": bound["nats_per_token"],
        "nats_per_token_interval_95": bound["nats_per_token_interval_95"],
        "unigram_entropy": bound["unigram_entropy"],
    }


def parts(setting: Setting) -> dict[str, list[Measurement]]:
    """The parts, in their order; ValueError for a study that is none."""
    study = read_comparison(setting.study)
    return {
        "step": [
            Measurement("products in bf16", 5, partial(products, dtype=torch.bfloat16, precision="highest")),
            Measurement("products in float32", 10, partial(products, dtype=torch.float32, precision="highest")),
            Measurement("products in TF32", 5, partial(products, dtype=torch.float32, precision="high")),
            Measurement("1.1B, eager", 20, step),
            Measurement("1.1B, flash_attn", 20, partial(step, attention="flash_attention_2")),
            Measurement("1.1B, torch.compile", 100, partial(step, compiled=True)),
        ],
        "head": [
            *(
                Measurement(f"{form}, V = {vocab_size:,}", 5, partial(head, form=form, vocab_size=vocab_size))
                for vocab_size in dict.fromkeys((setting.vocab_size, setting.head_shape[4]))
                for form in ("full", "chunked")
            ),
            Measurement("step, causal twin, full logits", 10, partial(step_of_head, fields=None)),
            Measurement("step, MDM, chunked", 10, partial(step_of_head, fields={"num_subtokens": 1})),
            Measurement("step, nested, chunked", 10, partial(step_of_head, fields=_nested(setting))),
            Measurement("step, nested, stages", 10, partial(step_of_head, fields=_nested(setting, head="stages"))),
        ],
        "generation": [
            Measurement("as published", 20, generation_as_published),
            Measurement("generate", 10, generation),
            Measurement("generate, blocks", 10, partial(generation, blocks=True)),
            Measurement("generate, blocks, cache prefix", 10, partial(generation, blocks=True, cache="prefix")),
            Measurement("generate, blocks, cache dual", 10, partial(generation, blocks=True, cache="dual")),
        ],
        "fsdp2": [
            Measurement("1.1B, fully_shard", 20, partial(halving, work=sharded_step)),
            Measurement("train.py", 30, partial(train_py, sharded=False)),
            Measurement("train.py, accelerate launch", 40, partial(train_py, sharded=True)),
        ],
        # A run takes what time is left and goes on later.
        "study": [Measurement(str(run), 40, partial(arm, comparison=study, run=run)) for run in study.runs],
    }
