"""Options of a training run: the command line and its YAML file, checked before anything is read or written."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, get_scheduler

from prime_v2.families import FAMILIES, family_named
from prime_v2.output.places import check_folder
from prime_v2.training.finetuning import TRAINING_FIELDS, check_start
from prime_v2.training.initialisation import check_initialisation
from prime_v2.training.option_checks import FOLLOWS_EVALUATION, check_values, refused_values
from prime_v2.training.recipes import CONFIGS, find_recipe, recipe_names
from prime_v2.training.stage_passes import check_stage_passes
from prime_v2.validation_keywords_prime_v2 import did_you_mean, nearest

# Options that decide the tokens and their first vectors: those of a trained folder are its own.
OF_THE_TOKENS = ("tokenizer", "bpe_vocab_size", "codes", "embedding_init")


@dataclass
class RunOptions:
    """What TrainingArguments does not hold."""

    config: str | None = field(
        default=None,
        metadata={"help": "YAML file with any of these options, or a recipe: tiny, published:mdm_14m, ..."},
    )
    family: str = field(
        default="prime",
        metadata={"help": "prime (MDM, MDM-Prime, MDM-Prime-v2: see --model), arm, uniform or interpolating."},
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Folder of a trained model: start from its weights, tokenizer and config."}
    )
    lora: int | None = field(
        default=None, metadata={"help": "Rank of LoRA adapters; only these are trained (with init_from)."}
    )
    label: str | None = field(default=None, metadata={"help": "Name of the run in records and plots."})
    data: str = field(
        default="docs",
        metadata={"help": "docs, a .txt/.jsonl/.parquet file, a folder of them, or a hub data set name[:config]."},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of the prepared text, to share it; by default each run has its own."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    text_field: str = field(default="text", metadata={"help": "Field of the text in .jsonl, .parquet, hub data."})
    prompt_field: str | None = field(
        default=None, metadata={"help": "Field of the question in a .jsonl of questions with answers (init_from)."}
    )
    answer_field: str | None = field(default=None, metadata={"help": "Field of its answer; only this is scored."})
    example_template: str = field(
        default="{prompt}\n{answer}", metadata={"help": "Text of an example; what precedes {answer} is the prompt."}
    )
    score_padding: bool = field(
        default=False, metadata={"help": "Read and score the EOS after an answer up to block_size, too."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read training text from the hub as it is needed."})
    max_documents: int | None = field(default=None, metadata={"help": "Read at most so many documents."})
    tokenizer: str = field(default="bpe", metadata={"help": "Name or folder of a fast tokenizer; bpe trains one."})
    codes: str = field(
        default="shuffle",
        metadata={
            "help": "shuffle, or codes made of the training text: similarity, clusters, frequency, .npy of vectors."
        },
    )
    embedding_init: str = field(
        default="random",
        metadata={"help": "random, or distributional: embedding and head begin with vectors from the training text."},
    )
    bpe_vocab_size: int = field(default=2048, metadata={"help": "Vocabulary of tokenizer=bpe, EOS included."})
    block_size: int = field(default=1024, metadata={"help": "Tokens per training sequence."})
    global_batch: int | None = field(default=None, metadata={"help": "Sequences per optimiser step, all processes."})
    short_share: float = field(default=0.0, metadata={"help": "Share of steps cut to a random length."})
    dev_share: float = field(default=0.02, metadata={"help": "Share of the documents for evaluation in training."})
    test_share: float = field(default=0.02, metadata={"help": "Share of the documents for the reported bound."})
    eval_sequences: int = field(default=256, metadata={"help": "Blocks of the dev split per evaluation."})
    test_sequences: int = field(default=1024, metadata={"help": "Blocks of the test split in the final evaluation."})
    eval_num_samples: int = field(default=8, metadata={"help": "Noise draws per sequence in evaluations."})
    sampler_passes: list[int] = field(
        default_factory=list,
        metadata={"help": "Passes at which the law of ancestral sampling is evaluated at the end, e.g. 64 8 4."},
    )
    sampler_sequences: int = field(default=160, metadata={"help": "Blocks of the test split for --sampler_passes."})
    stage_passes: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Of a coarse-first model, the share of generate's passes for each stage, such as 0.75 0.25."
        },
    )
    num_generated: int = field(default=3, metadata={"help": "Samples generated at the end."})
    record: str | None = field(default=None, metadata={"help": "A further place for the record of the run (JSON)."})


class Parser(HfArgumentParser):
    """HfArgumentParser that answers a bad option with one sentence, not with all of its options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class RaisingParser(Parser):
    """Raises ValueError for a bad option, for programs that start several runs."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_options(
    arguments: list[str], description: str | None = None, parser_class: type[Parser] = Parser
) -> tuple[RunOptions, TrainingArguments, dict[str, Any]]:
    """Command line (and its YAML file) to options; exits with status 2 and one sentence for a bad one.

    Without --config it is the recipe tiny.
    """
    kinds: Any = (RunOptions, TrainingArguments)
    # The file of an abbreviated --config would not be read here.
    parser = parser_class(kinds, prog="train.py", description=description, allow_abbrev=False)
    parser.add_argument("--model", nargs="*", default=[], metavar="KEY=VALUE", help="Fields of the family's config.")
    known = {action.dest for action in parser._actions} - {"help"}
    try:
        config, entry = _config_and_entry(arguments)
        config_path = find_recipe(config)
    except ValueError as error:
        parser.error(str(error))
    options = read_config(config_path, config, entry, known, parser)
    model_options = options.pop("model", None) or {}
    if not isinstance(model_options, dict):
        parser.error(f"--config {config}: model={model_options!r} must hold fields such as `hidden_size: 256`")
    name = entry or config_path.stem
    defaults: dict[str, Any] = {"output_dir": f"runs/{name}", "per_device_eval_batch_size": 8} | TRAINING_DEFAULTS
    parser.set_defaults(**defaults | options)
    if parser.parse_known_args(arguments)[0].init_from is not None:  # what a recipe says of tokens gives way, too
        parser.set_defaults(**{name: getattr(RunOptions, name) for name in OF_THE_TOKENS})
        for flag in (f"--{name}" for name in OF_THE_TOKENS if name != "bpe_vocab_size"):  # which is read of bpe only
            if any(each == flag or each.startswith(f"{flag}=") for each in arguments):
                parser.error(f"{flag} is decided by the folder of --init_from; leave {flag} out")
    run, training, extra, unknown = _parsed(parser, kinds, arguments)
    if unknown:
        flag = unknown[0]
        hint = did_you_mean(flag.lstrip("-").split("=")[0], known, "--") or "; see --help"
        parser.error(f"unknown option {flag}{hint}")
    if run.config is None and run.family in FAMILIES:  # what the default recipe says only of its own family
        fields = FAMILIES[run.family].fields() if run.init_from is None else ()
        model_options = {key: value for key, value in model_options.items() if key in fields}
    if run.init_from is not None and run.family in FAMILIES:  # sizes and codes of a recipe give way to the weights'
        decided = FAMILIES[run.family].fields() - TRAINING_FIELDS
        model_options = {key: value for key, value in model_options.items() if key not in decided}
    model_options |= _key_values(extra.model, parser)
    try:
        check_options(run, training, model_options)
    except ValueError as error:
        parser.error(str(error))
    return run, training, model_options


def _parsed(parser: HfArgumentParser, kinds: Any, arguments: list[str]) -> tuple[Any, Any, Any, list[str]]:
    """The two dataclasses, the rest and what is unknown; exits with one sentence for a value that cannot be."""
    values = vars(parser.parse_known_args(arguments)[0])  # before TrainingArguments computes with them
    problems = check_values(values, kinds)
    if problems:
        parser.error("; ".join(problems))
    parser.set_defaults(**{name: value for name, value in values.items() if type(value) is int})
    kind, given = values["lr_scheduler_type"], values["lr_scheduler_kwargs"]
    if kind != parser.get_default("lr_scheduler_type") and given == parser.get_default("lr_scheduler_kwargs"):
        parser.set_defaults(lr_scheduler_kwargs=None)  # those of a recipe are of its own schedule
    follows = kind in FOLLOWS_EVALUATION
    metric = values["metric_for_best_model"] or (
        "bound" if follows else None
    )  # by default eval_loss, which is not measured
    if metric is not None:  # all that is measured is better where it is lower
        parser.set_defaults(metric_for_best_model=metric, greater_is_better=values["greater_is_better"] or False)
    try:
        run, training, extra, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, KeyError, ImportError, OSError, NotImplementedError) as error:
        parser.error(f"the options do not go together: {' '.join(str(error).split())}")
    return run, training, extra, unknown


TRAINING_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "learning_rate": 2e-4,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "logging_strategy": "steps",
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "ddp_timeout": 24 * 3600,  # the first process prepares the text while the others wait
    "use_cpu": not torch.cuda.is_available(),  # Apple's accelerator has no float64, which the noise is drawn in
    "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    "report_to": "none",
    "seed": 0,
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    "train_sampling_strategy": "sequential",
    "ddp_find_unused_parameters": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def _config_and_entry(arguments: list[str]) -> tuple[str, str]:
    """The YAML file or recipe as it was given and, for FILE.yaml:NAME or RECIPE:NAME, the name of its entry."""
    given = str(CONFIGS / "tiny.yaml")
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            given = arguments[i + 1]
        elif argument.startswith("--config="):
            given = argument.split("=", 1)[1]
    file, separator, entry = given.rpartition(":")
    if separator and (file.endswith(".yaml") or file in recipe_names()):
        return file, entry
    return given, ""


def read_config(path: Path, given: str, entry: str, known: set[str], parser: HfArgumentParser) -> dict[str, Any]:
    """The options of a YAML file, which refusals call as it was `given`; exits with status 2 for bad YAML or an
    unknown option.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {given} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"--config {given} holds no options; write lines such as `learning_rate: 2.0e-4`")
    if entry:
        entries = {key: value for key, value in options.items() if not key.startswith(".")}
        if entry not in entries:
            parser.error(f"--config {given} has no entry {entry}; it has {', '.join(entries)}")
        options = entries[entry]
    elif any(key.startswith(".") for key in options):
        names = [key for key in options if not key.startswith(".")]
        parser.error(f"--config {given} holds several runs; add one of them, e.g. --config {given}:{names[0]}")
    for key in options:
        if key not in known:
            parser.error(f"--config {given}: unknown option {key}{did_you_mean(key, known)}")
    return options


def _key_values(pairs: list[str], parser: HfArgumentParser) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            parser.error(f"--model {pair} is not KEY=VALUE; use e.g. --model num_subtokens=1")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            parser.error(f"--model {pair}: the value is not YAML; use e.g. --model stage_digits='[6, 11]'")
    return values


def _has_it(key: str, but: str) -> str:
    """The families that have an option, where this one does not."""
    others = [family.name for family in FAMILIES.values() if family.name != but and key in family.fields()]
    return f" (it belongs to --family {' and '.join(others)})" if others else ""


def _schedule_problems(training: TrainingArguments) -> list[str]:
    """What Transformers says, else only after the preparation, of a schedule with arguments that are not its own."""
    kind = training.to_dict()["lr_scheduler_type"]
    kwargs: Any = training.lr_scheduler_kwargs  # a dictionary or None: text has been read
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = {"num_warmup_steps": 0, "num_training_steps": training.max_steps}
    try:
        get_scheduler(kind, optimizer, **steps, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError) as error:
        return [f"--lr_scheduler_type {kind} with {kwargs} is no schedule: {error}"]
    return []


def check_options(run: RunOptions, training: TrainingArguments, model_options: dict[str, Any]) -> None:
    """Check everything that can be checked before data and model exist; ValueError with all problems at once."""
    problems = []
    family = family_named(run.family)
    fields = family.fields()
    for key in model_options:
        if key not in fields:
            problems.append(
                f"--model {key} is no field of {family.config_class.__name__} that can be set"
                f"{_has_it(key, family.name)}; try {nearest(key, fields) or ', '.join(sorted(fields))}"
            )
    if run.dev_share + run.test_share >= 1:
        problems.append(f"--dev_share {run.dev_share} and --test_share {run.test_share} must sum below 1; use 0.02")
    if training.n_gpu > 1:
        problems.append(f"one process sees {training.n_gpu} GPUs; start one for each with accelerate launch")
    problems += refused_values(training)
    problems += check_start(run)
    problems += check_initialisation(run, model_options)
    problems += check_stage_passes(run, model_options)
    problems += _schedule_problems(training)
    if run.record is not None:
        try:
            check_folder(Path(run.record).parent, "--record")
        except ValueError as error:
            problems.append(str(error))
    if run.streaming and (run.data == "docs" or (run.tokenizer == "bpe" and run.init_from is None)):
        problems.append("--streaming needs a hub data set and a ready tokenizer; use e.g. --tokenizer gpt2")
    micro = training.per_device_train_batch_size * training.world_size
    if run.global_batch is None:
        run.global_batch = micro * training.gradient_accumulation_steps
    elif run.global_batch % micro:
        down, up = run.global_batch // micro * micro, -(-run.global_batch // micro) * micro
        problems.append(
            f"--global_batch {run.global_batch} is not a multiple of {micro} ({training.world_size} processes x "
            f"{training.per_device_train_batch_size}); use {' or '.join(str(each) for each in (down, up) if each)}"
        )
    else:
        training.gradient_accumulation_steps = run.global_batch // micro
    if problems:
        raise ValueError("; ".join(problems))
