"""Settings of the lm-eval model: arguments and what they mean, the report of a run, the file of scores, cache keys."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prime_v2 import validation_inputs_prime_v2 as validation_inputs_prime_v2
from prime_v2.eval.answers import QuestionScore, Settings
from prime_v2.eval.perplexity import EXACT_METHODS
from prime_v2.eval.published import PublishedSettings, mask_unit_schedule
from prime_v2.eval.samplers import description, named_config
from prime_v2.families import FAMILY_OF_TYPE, bound_method, check_method, label_of, methods_of
from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.likelihood_frame_prime_v2 import TOKENS_PER_PASS
from prime_v2.output.atomic import write_text
from prime_v2.output.places import check_new_file
from prime_v2.validation_keywords_prime_v2 import did_you_mean, one_of

log = logging.getLogger(__name__)

# One setting for all tasks, chosen only on training splits (benchmarks/likelihood_settings.py, docs/lm_eval.md).
DEFAULT_METHOD = "chain"
DEFAULT_SAMPLES, DEFAULT_ROLLING_SAMPLES = 128, 16
DEFAULT_ADAPTIVE = 3.0
TOKENS_PER_PASS_ACCELERATOR = 2**17
# Arguments of HFLM that mean the same here.
SHARED_ARGUMENTS = (
    "add_bos_token",
    "prefix_token_id",
    "peft",
    "chat_template_args",
    "enable_thinking",
    "think_end_token",
    "truncation",
)
NOT_FOR_BOUNDS = {"cfg": 0.0, "temperature": 1.0, "mask_unit": "1"}
# Of method=sampler, beside `temperature`; lm-eval passes some values on as text.
SAMPLER_ARGUMENTS: dict[str, Callable[[str, Any], Any]] = {
    "sampler": lambda name, value: value,
    "steps": lambda name, value: whole_number(name, value, 1, 64),
    "unit": lambda name, value: value,
    "score": lambda name, value: value,
    "threshold": lambda name, value: _real_number(name, value, 0.9),
    "entropy_bound": lambda name, value: _real_number(name, value, 0.1),
    "stage_passes": lambda name, value: value,
    "block_length": lambda name, value: whole_number(name, value, 1, 32),
    "cache": lambda name, value: value,
    "top_p": lambda name, value: _real_number(name, value, 1.0),
}
CACHE_KEY = "prime_v2 settings"


def check_arguments(given: dict[str, Any], own: list[str]) -> None:
    """ValueError for a name that is neither in `own` nor in SHARED_ARGUMENTS, with one that is near."""
    known = sorted((*own, *SHARED_ARGUMENTS))
    for name, value in given.items():
        if name not in SHARED_ARGUMENTS:
            raise ValueError(
                f"{name}={value!r} is no argument of the model prime_v2{did_you_mean(name, known)} "
                f"(all: {', '.join(known)})"
            )


def whole_number(name: str, value: Any, least: int, example: int, most: int | None = None) -> int:
    """An integer in [least, most], also written as text, which lm-eval passes on; ValueError otherwise."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value)
    return validation_inputs_prime_v2.whole_number(name, value, least, most, use=example)


def check_shared(given: dict[str, Any]) -> None:
    """ValueError for a value of HFLM's flags that is neither True nor False; None is their default."""
    for name in ("add_bos_token", "enable_thinking", "truncation"):
        if given.get(name) is not None:
            validation_inputs_prime_v2.checked_flag(name, given[name])
    template = given.get("chat_template_args")
    if template is not None and not isinstance(template, dict):
        raise ValueError(f"chat_template_args={template!r} must be a mapping; use {{'enable_thinking': False}}")


def _real_number(name: str, value: Any, example: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be a number; use {example}") from None


def tokens_of_a_pass(batch_size: Any, tokens_per_pass: Any, max_length: int, device_type: str) -> int:
    """lm-eval's default batch size of 1, and auto, leave it to us; more are rows of `max_length` tokens."""
    if tokens_per_pass is not None:
        return whole_number("tokens_per_pass", tokens_per_pass, 1, TOKENS_PER_PASS)
    if not str(batch_size).startswith("auto"):
        rows = whole_number("batch_size", batch_size, 1, 32)
        if rows > 1:
            return rows * max_length
    return TOKENS_PER_PASS if device_type == "cpu" else TOKENS_PER_PASS_ACCELERATOR


@dataclass(frozen=True)
class Scoring:
    """How answers and texts are scored. published: settings of the published score, where that is the method.

    law: `samplers.description`, where the method is "sampler".
    """

    answers: Settings
    method_of_texts: str
    samples_of_texts: int
    published: PublishedSettings | None
    published_by_task: bool
    law: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """All of it that a score depends on, JSON-ready."""
        apart = ("answers", "law", "tokens_per_pass", "generation_config")
        found = {key: value for key, value in asdict(self).items() if key not in apart}
        found |= {key: value for key, value in asdict(self.answers).items() if key not in apart}
        return found | (self.law or {})


def make_scoring(
    model: Any,
    method: str | None,
    num_samples: Any,
    seed: int,
    adaptive: Any,
    published: bool,
    given: dict[str, Any],
    of_sampler: dict[str, Any],
    tokens_per_pass: int,
) -> Scoring:
    """given: cfg, temperature, mask_unit; of_sampler: `SAMPLER_ARGUMENTS`; of these and temperature None is not given.

    Raises ValueError for what is unknown, impossible or has no effect.
    """
    config = model.config
    methods = methods_of(config)
    if method is not None and method not in FAMILY_OF_TYPE[config.model_type].methods:
        one_of(f"method={method!r}", method, methods)
    temperature = given["temperature"]
    if temperature is not None:
        temperature = _real_number("temperature", temperature, 1.0)
    given = {
        "cfg": _real_number("cfg", given["cfg"], 0.5),
        "temperature": NOT_FOR_BOUNDS["temperature"] if temperature is None else temperature,
        "mask_unit": str(given["mask_unit"]),
    }
    law, generation_config = None, None
    if method == "sampler":
        generation_config = _generation_config(model, num_samples, {**of_sampler, "temperature": temperature})
        law, given["temperature"] = description(model, generation_config), NOT_FOR_BOUNDS["temperature"]
    elif unused := [name for name, value in of_sampler.items() if value is not None]:
        raise ValueError(f"{unused[0]} is an option of method=sampler; add that, or leave {unused[0]} out")
    if published:
        _check_published(method, num_samples, given)
        if "paper_loss" not in methods:
            raise ValueError(f"published=true is for MDM-Prime models, not {label_of(config)}; leave it out")
        method = "paper_loss"
    of_answers = method or (DEFAULT_METHOD if DEFAULT_METHOD in methods else bound_method(config))
    check_method(config, of_answers)
    if of_answers != "paper_loss":
        for name, off in NOT_FOR_BOUNDS.items():
            if given[name] != off:
                raise ValueError(
                    f"{name}={given[name]} changes only the published score, and method={of_answers} is a "
                    f"likelihood; leave it out, or use method=paper_loss"
                )
    mask_unit_schedule(given["mask_unit"], getattr(config, "num_subtokens", 1))
    count = None if num_samples is None else whole_number("num_samples", num_samples, 1, DEFAULT_SAMPLES)
    if of_answers in EXACT_METHODS and count is not None:
        log.warning(
            "num_samples=%d is only for texts: answers are scored by %s, which draws nothing.", count, of_answers
        )
    samples = DEFAULT_SAMPLES if count is None else count
    return Scoring(
        Settings(
            of_answers,
            samples,
            seed,
            _standard_errors(adaptive),
            tokens_per_pass=tokens_per_pass,
            generation_config=generation_config,
        ),
        method or bound_method(config),
        DEFAULT_ROLLING_SAMPLES if count is None else count,
        PublishedSettings(samples, seed=seed, **given) if of_answers == "paper_loss" else None,
        published,
        law,
    )


def _generation_config(model: Any, num_samples: Any, given: dict[str, Any]) -> PrimeV2GenerationConfig:
    """The sampler of the scores; ValueError for what is no sampler, and for draws of one that is scored exactly."""
    for name, convert in SAMPLER_ARGUMENTS.items():
        if given[name] is not None:
            given[name] = convert(name, given[name])
    config = named_config(model, **given)
    if num_samples is not None and description(model, config)["unit"] is not None:
        raise ValueError(
            f"num_samples={num_samples} is of draws, but {description(model, config)['sampler']} is scored exactly, "
            f"without any; leave it out"
        )
    return config


def _check_published(method: str | None, num_samples: Any, given: dict[str, Any]) -> None:
    if method not in (None, "paper_loss"):
        raise ValueError(f"published=true is method=paper_loss; leave method={method} out")
    named = [name for name, off in NOT_FOR_BOUNDS.items() if given[name] != off]
    named += ["num_samples"] * (num_samples is not None)
    if named:
        raise ValueError(f"published=true takes {named[0]} from the published settings; leave one of the two out")
    log.warning(
        "published=true takes settings that were tuned for each task on its test set, and a score that is no "
        "likelihood: only for reproducing the published accuracies."
    )


def _standard_errors(adaptive: Any) -> float | None:
    if adaptive is True or str(adaptive).lower() in ("true", "on"):
        return DEFAULT_ADAPTIVE
    if adaptive in (None, False, 0) or str(adaptive).lower() in ("off", "none", "false"):
        return None
    return _real_number("adaptive", adaptive, DEFAULT_ADAPTIVE)


@dataclass
class Report:
    """Counts over the likelihoods of a run (of this process)."""

    scoring: Scoring
    is_likelihood: bool  # or a bound on it
    choices: int = 0
    draws: int = 0
    summed: int = 0
    contexts: int = 0
    truncated: int = 0
    excluded: int = 0
    tokens: int = 0
    passes: float = 0.0
    token_passes: int = 0
    token_passes_is_greedy: int = 0
    lead_stderrs: list[float] = field(default_factory=list, repr=False)

    def add(self, score: QuestionScore, tokens: int, greedy_token_passes: int) -> None:
        """Count a question, whose choices have so many tokens in all."""
        self.choices += len(score.choices)
        self.tokens += tokens
        self.passes += sum(choice.num_forward / (choice.num_draws or 1) for choice in score.choices)
        self.excluded += sum(choice.value == -math.inf for choice in score.choices)
        self.draws += sum(choice.num_draws for choice in score.choices)
        self.summed += sum(choice.num_draws == 0 for choice in score.choices)
        self.token_passes += sum(choice.token_passes for choice in score.choices)
        self.token_passes_is_greedy += greedy_token_passes
        if math.isfinite(score.lead_stderr):
            self.lead_stderrs.append(score.lead_stderr)

    def add_context(self, truncated: bool) -> None:
        self.contexts += 1
        self.truncated += truncated

    def as_dict(self) -> dict[str, Any]:
        number = len(self.lead_stderrs)
        of_sampler: dict[str, Any] = {}
        if self.scoring.law is not None:
            of_sampler["is_exact"] = self.scoring.law["unit"] is not None
            of_sampler["passes_per_token"] = self.passes / self.tokens if self.tokens else 0.0
            of_sampler["choices_never_written"] = self.excluded
        return {
            **self.scoring.describe(),
            **of_sampler,
            "is_likelihood_or_bound": self.is_likelihood,
            "choices": self.choices,
            "choices_without_draws": self.summed,
            "draws_per_choice": self.draws / self.choices if self.choices else 0.0,
            "token_passes": self.token_passes,
            "token_passes_is_greedy": self.token_passes_is_greedy,
            "contexts": self.contexts,
            "contexts_truncated": self.truncated,
            "mean_stderr_of_lead": sum(self.lead_stderrs) / number if number else None,
        }

    def log(self, max_length: int) -> None:
        """What the likelihoods took; a warning where contexts did not fit."""
        log.info("%s", json.dumps(self.as_dict()))
        if self.excluded:
            log.warning(
                "%d of %d choices have a token that top_p excludes: the sampler never writes them, and their "
                "log-likelihood is -inf; questions with such choices only are decided by their order.",
                self.excluded,
                self.choices,
            )
        if self.truncated:
            log.warning(
                "%d of %d contexts lost their oldest tokens to fit into the %d that the model takes.",
                self.truncated,
                self.contexts,
                max_length,
            )


class ScoreFile:
    """The JSONL file of `scores=`: a line for each answer, written when all are scored."""

    def __init__(self, path: str, rank: int, world_size: int):
        self.path = Path(path)
        if world_size > 1:
            self.path = self.path.with_suffix(f".rank{rank}{self.path.suffix}")
        check_new_file(self.path, "scores")
        self.lines: list[str] = []

    def add(self, line: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(json.dumps(finite, ensure_ascii=False) + "\n")

    def write(self) -> None:
        """Write the file; where that fails, an error in the log: the results that follow must not be lost with it."""
        try:
            write_text(self.path, "".join(self.lines))
        except OSError as error:
            log.error("scores %s could not be written (%s); the results follow without it.", self.path, error.strerror)


def fingerprint(model: Any, *settings: Any) -> str:
    """Hash of a model's configuration and weights (sums of each tensor) and of all else that a score depends on."""
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
    digest.update(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in model.state_dict().items():
        values = tensor.detach().double()
        digest.update(
            f"{name} {tuple(tensor.shape)} {float(values.sum())!r} {float(values.square().sum())!r}".encode()
        )
    return digest.hexdigest()


def check_cache(database: Any, mark: str) -> None:
    """lm-eval keys its cache only by the requests' texts: ValueError unless this one holds scores of this `mark`."""
    if CACHE_KEY not in database:
        if len(database):
            raise ValueError(f"--use_cache {database.filename} holds scores of something else; give another name")
        database[CACHE_KEY] = mark
        database.commit()
    elif database[CACHE_KEY] != mark:
        raise ValueError(
            f"--use_cache {database.filename} holds scores of another model or other settings; give another name"
        )


def snapshot(pretrained: str, revision: str, subfolder: str) -> str:
    """The folder of a revision or a part of a Hub repository; others as they are."""
    if Path(pretrained).is_dir():
        return str(Path(pretrained) / subfolder) if subfolder else pretrained
    if str(revision) == "main" and not subfolder:
        return pretrained
    from huggingface_hub import snapshot_download

    return str(Path(snapshot_download(pretrained, revision=str(revision))) / subfolder)
