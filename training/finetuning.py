"""Runs that start from a trained folder: its weights, tokenizer and configuration; LoRA; questions with answers."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments

from prime_v2.data.preparation import TextOptions, prepare_text
from prime_v2.data.sources import files_change, is_fingerprint, model_files, model_fingerprint
from prime_v2.data.supervised import Examples, Supervision, read_splits, render
from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.families import FAMILY_OF_TYPE
from prime_v2.output.atomic import write_json
from prime_v2.output.seals import Damaged, read_json
from prime_v2.training.stage_passes import drop_stage_passes

# The projections of attention and MLP.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Fields of the configuration that a run may change in a trained model: neither weights nor codes depend on them.
TRAINING_FIELDS = {"objective", "loss_weight", "attention_dropout", "whole_token_above"}
TRAINING_FIELDS |= {"reveal_order", "training_order", "stage_windows"}  # orders of the model's own units
ADAPTER = "adapter"  # folder of the adapter beside the merged model


def check_start(run: Any) -> list[str]:
    """What is wrong with the options of a run that starts from a trained folder or reads questions."""
    problems = []
    if run.init_from is None:
        for name in ("lora", "prompt_field", "answer_field"):
            if getattr(run, name) is not None:
                problems.append(f"--{name} {getattr(run, name)} needs a trained model; add --init_from DIR")
    for engine in ("FSDP", "DeepSpeed"):
        if run.lora is not None and os.environ.get(f"ACCELERATE_USE_{engine.upper()}") == "true":
            problems.append(f"--lora does not run with {engine} here; use configs/accelerate/ddp.yaml")
    if (run.prompt_field is None) != (run.answer_field is None):
        problems.append("--prompt_field and --answer_field belong together; give both")
    elif run.prompt_field is None:
        if run.score_padding:
            problems.append("--score_padding is of questions with answers; add --prompt_field and --answer_field")
    else:
        if run.streaming or run.short_share or run.data_dir is not None:
            problems.append("--streaming, --short_share and --data_dir are not for questions with answers; leave out")
        try:
            render(run.example_template, "", "")
        except ValueError as error:
            problems.append(str(error))
    return problems


def start_from(
    run: Any, training: TrainingArguments, model_options: dict[str, Any], text: TextOptions, folder: Path
) -> tuple[Any, Any, dict[str, Any]]:
    """(model, its tokenizer, the splits of the data) of a run with `--init_from`; ValueError for what does not fit."""
    if not Path(run.init_from).is_dir():
        raise ValueError(f"--init_from {run.init_from} is no folder; give one that train.py or save_pretrained wrote")
    _same_start(run.init_from, folder / "data" / "init_from.json")
    model, tokenizer = load_model_and_tokenizer(run.init_from, "cpu", "float32")
    config, family = model.config, FAMILY_OF_TYPE[model.config.model_type]
    if family.name != run.family:
        raise ValueError(f"--init_from {run.init_from} holds a model of --family {family.name}, not {run.family}")
    if run.block_size > config.max_position_embeddings:
        raise ValueError(
            f"--block_size {run.block_size} is more than max_position_embeddings={config.max_position_embeddings} of "
            f"--init_from {run.init_from}; use {config.max_position_embeddings}"
        )
    for key, value in model_options.items():
        if key not in TRAINING_FIELDS and value == getattr(config, key):
            continue
        if key not in TRAINING_FIELDS:
            raise ValueError(
                f"--model {key}={value} is fixed at {getattr(config, key)} by the weights of --init_from; only "
                f"{', '.join(sorted(TRAINING_FIELDS & family.fields()))} can be changed"
            )
        setattr(config, key, value)
    config.validate()
    if getattr(config, "reveal_order", "coarse_first") != "coarse_first":
        drop_stage_passes(model)
    data: dict[str, Any]
    if run.prompt_field is None:
        shared = None if run.data_dir is None else Path(run.data_dir)
        text = dataclasses.replace(text, tokenizer=str(run.init_from))
        data = prepare_text(text, {"num_subtokens": 1}, folder / "data", shared)[1]
    else:
        data = _questions(run, training, tokenizer, folder / "data" / "examples.json")
    transformers.set_seed(training.seed)
    return (model if run.lora is None else with_lora(model, run.lora)), tokenizer, data


def _same_start(init_from: str, path: Path) -> None:
    """Note in `path` what the trained folder holds; ValueError when it holds something else than at the beginning.

    A continued run reads it again: its configuration, its tokenizer and, for LoRA, its weights.
    """
    if not path.exists():
        if PartialState().is_main_process:
            write_json(path, model_fingerprint(Path(init_from)))
        return
    change = files_change({"files": _noted(path, "files")}, model_files(Path(init_from)), Path(init_from))
    if change is not None:
        raise ValueError(
            f"--init_from {init_from} has changed since this run began ({change}); put it back, or use a new "
            f"--output_dir"
        )


def _noted(path: Path, key: str) -> Any:
    """What a file of the run's data/ noted under a key when the run began; ValueError for a file that is damaged."""
    try:
        noted = read_json(path)
        is_right = isinstance(noted, dict) and isinstance(noted.get(key), dict)
        if not is_right or (key == "files" and not is_fingerprint(noted)):
            raise Damaged(f"{path.name} is damaged")
    except Damaged as error:
        raise ValueError(
            f"what this run began with cannot be read from {path.parent} ({error}); put a copy of {path.name} back, "
            f"or use a new --output_dir"
        ) from None
    return noted[key]


def with_lora(model: Any, rank: int) -> Any:
    """The model in a PeftModel with fresh adapters of this rank, scaled by 2; only these are trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS)))


def merge_adapter(model: Any, folder: Path, save: bool) -> Any:
    """The model with its adapter added to its weights; `save` keeps the adapter and writes the merged model."""
    if not hasattr(model, "merge_and_unload"):
        return model
    if save:
        model.save_pretrained(folder / ADAPTER)
    merged = model.merge_and_unload()
    if save:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink(missing_ok=True)
        merged.save_pretrained(folder)
    return merged


def _questions(run: Any, training: TrainingArguments, tokenizer: Any, path: Path) -> dict[str, Examples]:
    """The splits of a file of questions, said and noted in `path`; ValueError when the file is not what it was."""
    values = {each.name: getattr(run, each.name) for each in dataclasses.fields(Supervision) if each.name != "seed"}
    data = read_splits(Supervision(**values, seed=training.seed), tokenizer)
    counts = {
        split: {"examples": len(part), "dropped": part.dropped, "fingerprint": part.fingerprint}
        for split, part in data.items()
    }
    state = PartialState()
    if path.exists():
        if {split: _noted(path, split) for split in counts} != counts:
            raise ValueError(f"--data {run.data} has changed since this run began; use a new --output_dir")
        return data
    state.wait_for_everyone()  # nobody writes before everybody has looked
    if state.is_main_process:
        write_json(path, counts)
        dropped = sum(part.dropped for part in data.values())
        sizes = ", ".join(f"{len(part):,} {split}" for split, part in data.items())
        print(f"examples: {sizes}; {dropped:,} dropped as longer than --block_size {run.block_size} tokens")
    return data


def answers(model: Any, tokenizer: Any, examples: Examples, count: int, seed: int) -> list[str]:
    """Sampled answers to the first prompts, each behind its prompt, as many tokens as the prompt leaves room for."""
    model.eval()
    texts = []
    for index in range(min(count, len(examples))):
        prompt = examples.ids[index, : examples.prompt_lengths[index]].unsqueeze(0).to(model.device)
        room = (examples.block_size if examples.score_padding else int(examples.lengths[index])) - prompt.shape[1]
        options = {} if model.config.causal else {"max_denoising_steps": room}
        ids = model.generate(prompt, seed=seed + index, max_new_tokens=room, do_sample=True, **options)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def scored_ids(blocks: Any) -> torch.Tensor:
    """(T,) int64: the ids that an evaluation of blocks (N, L), or of examples, is about."""
    if not isinstance(blocks, Examples):
        return blocks.flatten()
    return torch.cat([ids[~mask] for ids, mask in blocks.windows()])
