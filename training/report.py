"""What train.py says before and after training: cost, held-out bound, samples, record, plot and card."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prime_v2.data.packing import PackedBlocks
from prime_v2.data.preparation import measured_of, prepared_source
from prime_v2.data.supervised import Examples
from prime_v2.data.token_vectors import costs_in
from prime_v2.eval.intervals import UPPER_END, plus_minus
from prime_v2.eval.perplexity import score_windows, unigram_entropy
from prime_v2.eval.windows import Windows
from prime_v2.families import bound_method, label_of
from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.hub_card.card import write_card
from prime_v2.output.atomic import write_json
from prime_v2.output.numbers import duration
from prime_v2.output.records import make_record
from prime_v2.tokenization.plain_text import not_kept
from prime_v2.training.finetuning import answers, merge_adapter, scored_ids
from prime_v2.training.flops import COUNTED_BATCHES, count_parameters, flops_per_token, peak_flops, six_n_d
from prime_v2.training.loss_plot import plot_training
from prime_v2.training.sharding import whole
from prime_v2.training.trainer import TRACE, DiffusionTrainer


def score_held_out(
    model, tokenizer, blocks: torch.Tensor | Examples, bytes_per_token: float | None, **options: Any
) -> dict[str, Any]:
    """The result of `score_windows`, its work shared by all processes; of examples also nats_per_answer.

    bytes_per_token: of all text; the sequences share the bytes as their decoded texts have them. None where the bytes
    do not count (`bytes_held`).
    """
    groups = blocks.windows() if isinstance(blocks, Examples) else [(blocks, None)]
    text_bytes: Any = None
    if bytes_per_token is not None:
        text_bytes, sizes = max(1, round(bytes_per_token * len(scored_ids(blocks)))), _decoded_bytes(tokenizer, groups)
        text_bytes = sizes * (text_bytes / sizes.sum()) if sizes.any() else text_bytes
    result = score_windows(
        model,
        groups,
        text_bytes=text_bytes,
        eos_token_id=tokenizer.eos_token_id,
        shared=True,
        **options,
    )
    if isinstance(blocks, Examples):
        result["nats_per_answer"] = result["nats_per_token"] * result["num_tokens"] / result["num_sequences"]
    return result


def bytes_held(blocks: PackedBlocks | Examples) -> float | None:
    """Bytes of text a token, None where the tokens do not hold the text: nats of them are of another one."""
    return blocks.bytes_per_token if blocks.tokenizer_loss is None else None


def _decoded_bytes(tokenizer, groups: Sequence[Windows]) -> np.ndarray:
    """UTF-8 bytes of the scored tokens of each sequence, (N,) float64; special tokens have none."""
    scored = [
        (row if mask is None else row[~mask[place]]).tolist() for ids, mask in groups for place, row in enumerate(ids)
    ]
    texts = tokenizer.batch_decode(scored, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return np.array([len(text.encode("utf-8", "replace")) for text in texts], dtype=np.float64)


def score_dev(
    model, tokenizer, blocks: torch.Tensor | Examples, draws: int, bytes_per_token: float | None
) -> dict[str, float]:
    """The valid bound on the dev blocks in the units that trackers plot, beside the tokens' unigram entropy."""
    options = {"method": bound_method(model.config), "num_samples": draws, "seed": 0}
    result = score_held_out(whole(model), tokenizer, blocks, bytes_per_token, **options)
    return {
        "eval_bound": result["nats_per_token"],
        # None for one sequence.
        **{f"eval_bound_{name}": result[name] for name in ("stderr", "degrees") if result[name] is not None},
        "eval_perplexity": result["perplexity"],
        **({"eval_bits_per_byte": result["bits_per_byte"]} if "bits_per_byte" in result else {}),
        "eval_unigram_entropy": result["unigram_entropy"],
        **({"eval_nats_per_answer": result["nats_per_answer"]} if isinstance(blocks, Examples) else {}),
    }


def estimate(trainer: DiffusionTrainer, run: Any) -> dict[str, float]:
    """Count and time the first micro-batches, and print what the run will take."""
    training = trainer.args
    model: Any = trainer.model
    first = itertools.islice(trainer.get_train_dataloader(), COUNTED_BATCHES)
    batches = [{key: value.to(training.device) for key, value in each.items() if key not in TRACE} for each in first]

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with trainer.accelerator.autocast():
            return model(**batch).loss

    model.train()
    measured = flops_per_token(step, batches)
    started = time.time()
    step(batches[0]).backward()
    if training.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.time() - started
    model.zero_grad(set_to_none=True)
    tokens = training.max_steps * run.global_batch * run.block_size
    counts = count_parameters(model)
    numbers = {
        "parameters": counts["total"],
        "parameters_non_embedding": counts["non_embedding"],
        "parameters_trained": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "steps": training.max_steps,
        "tokens": tokens,
        "flops_6nd": six_n_d(counts["non_embedding"], tokens),
        "flops_measured": measured * tokens,
    }
    trainer.flops_per_token = measured
    expected = seconds * tokens / batches[0]["input_ids"].numel() / training.world_size
    if not trainer.is_world_process_zero():
        return numbers
    print(
        f"model: {counts['total']:,} parameters, {counts['non_embedding']:,} without embeddings and head; "
        f"{label_of(model.config)}, {_digits(model.config)} for {model.config.vocab_size:,} tokens\n"
        f"run: {training.max_steps:,} steps x {run.global_batch} x {run.block_size} = {tokens:,} tokens, "
        f"{numbers['flops_6nd']:.2e} FLOPs by 6ND, {numbers['flops_measured']:.2e} measured, about "
        f"{duration(expected)} on {training.world_size} x {training.device.type}",
        flush=True,
    )
    peak = peak_flops(training.device)
    if peak:
        print(f"device: {peak:.2e} FLOP/s of bf16 matrix products at most")
    return numbers


def _digits(config) -> str:
    digits = getattr(config, "num_subtokens", 1)
    return "whole tokens" if digits == 1 else f"{digits} digits of base {config.base}"


def generate_samples(model, tokenizer, run: Any, test: PackedBlocks | Examples, seed: int) -> list[str]:
    """Documents from their start: the prompt is the EOS that ends the document before, as in the training blocks.

    Where the test split holds questions with answers: answers to its first questions.
    """
    if isinstance(test, Examples):
        return answers(model, tokenizer, test, run.num_generated, seed)
    model.eval()
    start = torch.tensor([[tokenizer.eos_token_id]], device=model.device)
    length = min(run.block_size, 128) - 1
    options = {"max_new_tokens": length, "eos_token_id": None, "do_sample": True}
    if not model.config.causal:
        options["max_denoising_steps"] = length
    return [
        tokenizer.decode(model.generate(start, seed=seed + i, **options)[0, 1:], skip_special_tokens=True)
        for i in range(run.num_generated if length else 0)
    ]


def final_evaluation(model, tokenizer, run: Any, test: PackedBlocks | Examples, seed: int) -> dict[str, Any]:
    """The reported numbers, on the test split: the valid bound, and the paper's loss beside it.

    With --sampler_passes also "sampler", a bound for each number of passes: on the law of `generate` with as many, of
    families whose samplers have one.
    """
    blocks = test.first(run.test_sequences)
    options = {"num_samples": run.eval_num_samples, "seed": seed, "keep_sequences": True}
    methods = {"bound": bound_method(model.config)}
    if "paper_loss" in model.likelihood_methods:
        methods["paper_loss"] = "paper_loss"
    found = {
        name: score_held_out(model, tokenizer, blocks, bytes_held(test), method=method, **options)
        | ({} if test.tokenizer_loss is None else {"tokenizer_loss": test.tokenizer_loss})
        for name, method in methods.items()
    }
    if "sampler" not in model.likelihood_methods or not run.sampler_passes:
        return found
    first, passes = test.first(run.sampler_sequences), {str(each): each for each in run.sampler_passes}
    found["sampler"] = {
        name: score_held_out(
            model,
            tokenizer,
            first,
            bytes_held(test),
            method="sampler",
            generation_config=PrimeV2GenerationConfig(max_denoising_steps=steps),
            **options,
        )
        for name, steps in passes.items()
    }
    return found


def _versions_read(run: Any, blocks: PackedBlocks | Examples) -> dict[str, Any]:
    """The versions of the packages whose documentation was read when the text was prepared; {} for other sources."""
    return prepared_source(blocks.path.parent) if run.data == "docs" and isinstance(blocks, PackedBlocks) else {}


def print_summary(record: dict[str, Any], folder: Path) -> None:
    results = record["results"]
    bound, loss = results["evaluation"]["bound"], results["evaluation"].get("paper_loss")
    interval = bound["perplexity_interval_95"] or [bound["perplexity"]] * 2
    name, at_most = ("log-likelihood", "") if bound["is_exact"] else ("bound", "<= ")
    print(
        f"\nheld-out text, {bound['num_tokens']:,} tokens\n"
        f"  unigram entropy   {bound['unigram_entropy']:.4f} nats/token\n"
        f"  {name:<17} {_with_error(bound)} nats/token, perplexity {at_most}"
        f"{bound['perplexity']:.1f} [{interval[0]:.1f}, {interval[1]:.1f}], {_bits_per_byte(bound)}"
    )
    if loss is not None:
        not_bound = "" if loss["is_bound"] else " (not a bound on the likelihood)"
        print(f"  the paper's loss  {_with_error(loss)} nats/token{not_bound}")
    for passes, law in results["evaluation"].get("sampler", {}).items():
        print(f"  sampled in {passes:<6} {_with_error(law)} nats/token, a bound ({law['num_sequences']} sequences)")
    if bound["nats_per_token_interval_95"] is not None:
        draws, end = ("", "") if bound["is_exact"] else (" and draws", f"\n  {UPPER_END}")
        over = bound.get("interval_over", "sequences")  # as records of earlier versions have it
        print(f"  intervals are 95%, over {over}{draws}{end}")
    if "nats_per_answer" in bound:
        print(f"  an answer         {bound['nats_per_answer']:.2f} nats given its question ({bound['num_sequences']})")
    print()
    if results["samples"]:
        print(f"a sample:\n  {' '.join(results['samples'][0].split())[:600]}\n")
    print(
        f"model, tokenizer and card: {folder}/ (AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True))\n"
        f"record: {folder}/results/train.json   plot: {folder}/loss.png\n"
        f"more: prime-v2 generate {folder} --watch"
    )


def _bits_per_byte(bound: dict[str, Any]) -> str:
    if "bits_per_byte" in bound:
        return f"{bound['bits_per_byte']:.3f} bits/byte"
    return f"no bits/byte: {not_kept(bound['tokenizer_loss'])}"


def _with_error(result: dict[str, Any]) -> str:
    return f"{result['nats_per_token']:.4f}{plus_minus(result, 4, '+-')}"


def finish(
    trainer: DiffusionTrainer, run: Any, tokenizer, data, numbers: dict[str, Any], folder: Path, code: dict
) -> dict[str, Any] | None:
    """Save the model, evaluate it on the test split, sample, and write record, plot and card.

    Returns the record, None on all processes but the first.
    """
    training = trainer.args
    trainer.save_model(str(folder))
    model = merge_adapter(
        whole(trainer.accelerator.unwrap_model(trainer.model)), folder, trainer.is_world_process_zero()
    )
    if trainer.is_world_process_zero():
        print("evaluating on the test split ...", flush=True)
    evaluation = final_evaluation(model, tokenizer, run, data["test"], training.seed)
    if not trainer.is_world_process_zero():
        return None
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    sizes = {f"{split}_tokens": blocks.tokens for split, blocks in data.items()}
    sizes |= {f"{split}_documents": blocks.documents for split, blocks in data.items()}
    sizes |= {f"{split}_dropped": part.dropped for split, part in data.items() if isinstance(part, Examples)}
    sizes.setdefault("train_tokens", numbers["tokens"])  # of a stream: what was read
    results = {
        "family": label_of(model.config),
        "label": run.label or label_of(model.config),
        "config": model.config.to_dict(),
        "training": {
            **numbers,
            "seconds": sum(
                run.global_batch * run.block_size * training.logging_steps / each["tokens_per_second"]
                for each in losses
            ),
            "device": training.device.type,
            "objective": getattr(model.config, "objective", None),
            "loss_is_bound": model.loss_is_bound,
            "made_from_text": costs_in(folder / "data"),
        },
        "options": json.loads((folder / "run.json").read_text(encoding="utf-8")),
        "data": {
            "source": Path(run.data).name if Path(run.data).exists() else run.data,
            **_versions_read(run, data["dev"]),
            "fingerprints": {split: blocks.fingerprint for split, blocks in data.items()},
            **sizes,
            **(measured_of(data["dev"].path.parent) if isinstance(data["dev"], PackedBlocks) else {}),
        },
        "evaluation": evaluation,
        "history": trainer.state.log_history,
        "samples": generate_samples(model, tokenizer, run, data["test"], training.seed),
    }
    record = json.loads(json.dumps(make_record("train", results, seed=training.seed, code=code), default=str))
    plot_training(
        trainer.state.log_history,
        folder / "loss.png",
        unigram_entropy=unigram_entropy(scored_ids(data["dev"].first(run.eval_sequences)).bincount()),
        title=f"{folder.name} (dev split)",
        loss_is_bound=results["training"]["loss_is_bound"],
    )
    write_card(folder, record)
    for path in filter(None, (run.record, folder / "results" / "train.json")):  # the last one marks the run finished
        write_json(path, record)
    return record
