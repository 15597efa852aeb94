"""The lm-eval model `prime_v2`: `lm_eval --model prime_v2 --model_args pretrained=DIR --tasks sciq,boolq,arc_easy`.

Tokenisation of requests, chat templates, few-shot prompts, caching of answers and the batches of `generate_until` are
lm-eval's own (HFLM). Likelihoods are `prime_v2.eval.answers`, one fixed setting for all tasks (docs/lm_eval.md).
"""

import dataclasses
import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from prime_v2.eval.answers import Choice, ChoiceError, ChoiceScore, QuestionScore, padded, score_questions
from prime_v2.eval.lm_requests import Question, Request, check_ids, place_of, questions_of
from prime_v2.eval.lm_settings import (
    DEFAULT_ADAPTIVE,
    SAMPLER_ARGUMENTS,
    Report,
    ScoreFile,
    check_arguments,
    check_cache,
    check_shared,
    fingerprint,
    make_scoring,
    snapshot,
    tokens_of_a_pass,
    whole_number,
)
from prime_v2.eval.loading import check_same_table, choose_device, load_model_and_tokenizer, load_tokenizer
from prime_v2.eval.plugin import demo_model
from prime_v2.eval.published import published_score, published_settings
from prime_v2.families import bound_method
from prime_v2.likelihood_output_prime_v2 import NotFiniteError
from prime_v2.random_prime_v2 import Stream, hash64
from prime_v2.tokenization.plain_text import plain_ids
from prime_v2.validation_inputs_prime_v2 import SEEDS, checked_flag

log = logging.getLogger(__name__)
LM_EVAL_DEVICE = "cuda:0"  # of its command line without --device
MAX_TOKEN_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
CHOICES_PER_GREEDY_CALL = 512


class PrimeV2LM(HFLM):
    """lm-eval model of a PrimeV2ForMaskedDiffusion. Arguments after those of lm-eval's HFLM that are listed above:

    pretrained: folder or Hub repository (or the model itself, with `tokenizer`). device, dtype: by default CUDA with
        bfloat16 where there is one, else the CPU with float32.
    method: of `log_likelihood`, for answers by default "chain" and for rolling likelihoods the bound of the model's
        reveal order; "paper_loss" is the published score (`prime_v2.eval.published`), which is no likelihood.
    num_samples, seed, adaptive: see `prime_v2.eval.answers.Settings`; adaptive=off draws num_samples always.
    sampler, steps, unit, score, threshold, entropy_bound, stage_passes (0.75:0.25), block_length, cache, temperature,
        top_p: of method="sampler", the law of what `generate` writes (`eval.samplers`); generate_until draws so too.
    cfg, temperature (1), mask_unit: only of the published score. published=true: its settings of each task, which were
        tuned on the test sets.
    batch_size: rows of max_length tokens that share a pass; 1, lm-eval's default, and auto mean tokens_per_pass, by
        default 8,192 tokens on a CPU and 131,072 elsewhere. No value depends on it.
    max_denoising_steps: of generate_until, by default one token a step. scores: a JSONL file to write for each choice
        its value, standard error, draws and passes.
    Raises ValueError for anything unknown or impossible, naming it.
    """

    AUTO_MODEL_CLASS = None
    add_bos_token: bool | None

    def __init__(
        self,
        pretrained: Any = None,
        tokenizer: Any = None,
        revision: str = "main",
        subfolder: str = "",
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = None,
        method: str | None = None,
        num_samples: int | None = None,
        seed: int = 0,
        adaptive: float | str | bool | None = DEFAULT_ADAPTIVE,
        cfg: float = 0.0,
        temperature: float | None = None,
        mask_unit: str | int = "1",
        published: bool = False,
        tokens_per_pass: int | None = None,
        max_denoising_steps: int | None = None,
        scores: str | None = None,
        **kwargs: Any,
    ) -> None:
        own = [name for name in inspect.signature(PrimeV2LM.__init__).parameters if name not in ("self", "kwargs")]
        of_sampler = {name: kwargs.pop(name, None) for name in SAMPLER_ARGUMENTS}
        check_arguments(kwargs, [*own, *SAMPLER_ARGUMENTS])
        if method == "sampler" and max_denoising_steps is not None:
            raise ValueError(f"method=sampler generates with its own steps; use steps={max_denoising_steps}")
        check_shared(kwargs)
        published = checked_flag("published", published)
        self.seed = whole_number("seed", seed, SEEDS[0], 0, SEEDS[1])
        if max_length is not None:
            max_length = whole_number("max_length", max_length, 2, 512)
        prefix = kwargs.pop("prefix_token_id", None)
        pretrained = demo_model() if pretrained is None else pretrained
        if pretrained is None:
            raise ValueError(
                "no model was named; add --model_args pretrained=DIR, a folder of a saved model or its name on the Hub"
            )
        if device in ("cuda", LM_EVAL_DEVICE) and not torch.cuda.is_available():
            device = None  # lm-eval's command line names it when nobody has
        device = str(choose_device(device))
        self._dtype_asked = None if dtype in (None, "auto") else dtype
        place = pretrained if not isinstance(pretrained, str) else snapshot(pretrained, revision, subfolder)
        super().__init__(
            place, backend="causal", tokenizer=tokenizer, device=device, max_length=max_length, batch_size=1, **kwargs
        )
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None:  # HFLM counts processes only on several GPUs
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        limit = self.config.max_position_embeddings
        if max_length is not None:
            whole_number("max_length", max_length, 2, limit, limit)
        if prefix is not None:
            last = self.config.vocab_size - 1
            self.custom_prefix_token_id = whole_number("prefix_token_id", prefix, 0, min(last, 1), last)
        self.max_denoising_steps = max_denoising_steps
        if max_denoising_steps is not None:
            self.max_denoising_steps = whole_number("max_denoising_steps", max_denoising_steps, 1, 256)
        self.tokens_per_pass = tokens_of_a_pass(batch_size, tokens_per_pass, self.max_length, self.device.type)
        self.batch_size_per_gpu = max(1, self.tokens_per_pass // self.max_length)  # of HFLM's generate_until
        guidance = {"cfg": cfg, "temperature": temperature, "mask_unit": mask_unit}
        self.scoring = make_scoring(
            self.model, method, num_samples, self.seed, adaptive, published, guidance, of_sampler, self.tokens_per_pass
        )
        if published and self.add_bos_token is None:
            self.add_bos_token = False  # as the published script encodes
        self.scores = None if scores is None else ScoreFile(scores, self.rank, self.world_size)
        self._report = Report(self.scoring, self.is_likelihood(self.scoring.answers.method))
        if not self._report.is_likelihood:
            log.warning(
                "method=%s is neither the likelihood of this model nor a bound on it: its scores rank answers and "
                "nothing more, and tasks that make a perplexity of them are refused.",
                self.scoring.answers.method,
            )
        self._instances: Sequence[Instance] = []

    # Loading, in place of HFLM's own: the package's classes, no code of the checkpoint

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        self._model, self._own_tokenizer = load_model_and_tokenizer(pretrained, self._device, self._dtype_asked)
        self._config = self._model.config

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        elif tokenizer is None:
            tokenizer = getattr(self, "_own_tokenizer", None)
        if tokenizer is None:
            raise ValueError("a model object needs its tokenizer; give tokenizer=, a PrimeV2Tokenizer")
        check_same_table(self._model, tokenizer, str(getattr(tokenizer, "name_or_path", "tokenizer")))
        self.tokenizer = tokenizer

    @property
    def model(self) -> Any:
        """The model itself; HFLM unwraps what Accelerate put around it, this also what peft did."""
        model = super().model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _create_model(self, pretrained: str, peft: str | None = None, **kwargs: Any) -> None:
        if peft is not None:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, peft).eval()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Takes lm-eval's cache, unless it holds scores of another model or other settings (ValueError)."""
        if cache_hook.dbdict is not None:
            tokens = [self.max_length, self.add_bos_token, self.prefix_token_id, self.max_denoising_steps]
            check_cache(cache_hook.dbdict, fingerprint(self._model, self.scoring.describe(), tokens))
        super().set_cache_hook(cache_hook)

    # Likelihoods

    def is_likelihood(self, method: str) -> bool:
        """Whether the scores of a method are log-likelihoods of this model or bounds on them."""
        if self.scoring.published is not None:
            return False
        try:
            one, options = torch.zeros(1, 1).long(), self.scoring.answers.of_method()
            return bool(self.model.log_likelihood(one, method=method, num_samples=1, **options).is_bound)
        except NotFiniteError:  # every request is refused then, by its number
            return True

    def check_tasks(self, tasks: Mapping[str, Any]) -> None:
        """ValueError for a task of lm-eval that makes a perplexity of scores that are no likelihoods."""
        if self._report.is_likelihood:
            return
        for name, task in tasks.items():
            for metric in task.aggregation():
                if "perplexity" in metric or metric == "bits_per_byte":
                    raise ValueError(self._no_perplexity(f"the task {name} reports {metric}"))

    def _no_perplexity(self, what: str) -> str:
        return (
            f"{what}, but {self.scoring.answers.method} is no likelihood of this model, so no perplexity follows from "
            f"it; use method={bound_method(self.config)}"
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation given the context in nats, whether it is the deterministic decode).

        A context that does not fit beside the longest continuation of its question loses its oldest tokens, for all
        its continuations alike. ValueError for an empty continuation, and for one longer than max_length.
        """
        for number, request in enumerate(requests):
            if not request.args[1]:
                raise ValueError(f"{place_of(requests, number)} has an empty continuation, which has no likelihood")
        if any(not request.args[0].strip() for request in requests) and self.prefix_token_id is None:
            raise ValueError("a context is empty, and the tokenizer has no BOS or EOS token; give prefix_token_id=")
        self._instances = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._instances = []

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        instances = self._instances if len(self._instances) == len(requests) else []
        for number, request in enumerate(requests):
            check_ids(request, place_of(instances, number), self.config.vocab_size, self.tokenizer.mask_token)
        questions = questions_of(requests, instances, self.prefix_token_id, self.max_length)
        for question in questions:
            self._report.add_context(question.is_truncated)
        if not self._report.is_likelihood:
            self._check_single_answers(instances)
        if self.scoring.published_by_task:
            for question in questions:
                published_settings(question.task or "")
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        total = sum(len(question.choices) for question in questions)
        with tqdm(total=total, disable=disable_tqdm or self.rank != 0, desc="Scoring choices") as bar:
            try:
                for found in self._scored(questions, bar.update):
                    self._answer(found, questions, requests, answers)
            except ChoiceError as error:
                number = questions[error.question].requests[questions[error.question].choice_of.index(error.choice)]
                raise ValueError(f"{place_of(instances, number)}: {error}") from None
        self._report.log(self.max_length)
        if self.scores is not None:
            self.scores.write()
        return answers

    def _check_single_answers(self, instances: Sequence[Instance]) -> None:
        """`check_tasks` for lm-eval's own command, which shows the model requests and no metrics.

        Answers of a question are numbered. Where a task has no second one, there is nothing to compare.
        """
        last: dict[str, int] = {}
        for each in instances:
            if each.task_name is not None:
                last[each.task_name] = max(each.idx, last.get(each.task_name, 0))
        for task, number in last.items():
            if number == 0:
                what = f"the task {task} asks for the likelihood of single answers, as for a perplexity"
                raise ValueError(self._no_perplexity(what))

    def _scored(self, questions: list[Question], progress: Any) -> Iterator[list[tuple[int, QuestionScore]]]:
        """Questions with their scores, in bunches that are large enough for the deterministic decode."""
        if self.scoring.published is None:
            choices = [question.choices for question in questions]
            scores = score_questions(self.model, choices, self.scoring.answers, progress)
        else:
            scores = ((n, self._published_question(n, question, progress)) for n, question in enumerate(questions))
        found: list[tuple[int, QuestionScore]] = []
        for number, score in scores:
            found.append((number, score))
            if sum(len(score.choices) for _, score in found) >= CHOICES_PER_GREEDY_CALL:
                yield found
                found = []
        if found:
            yield found

    def _published_question(self, number: int, question: Question, progress: Any) -> QuestionScore:
        settings = self.scoring.published
        if self.scoring.published_by_task:
            settings = published_settings(question.task or "", self.seed)
        scores = []
        for index, choice in enumerate(question.choices):
            draws = published_score(self.model, torch.tensor(choice.ids), choice.num_context, settings)
            if not draws.isfinite().all():
                raise ChoiceError(number, index, "the network's logits are not finite")
            num_forward = len(draws) * (2 if settings.cfg > 0 else 1)
            stderr = float(draws.std() / len(draws) ** 0.5) if len(draws) > 1 else float("nan")
            scores.append(
                ChoiceScore(float(draws.mean()), stderr, len(draws), num_forward, num_forward * len(choice.ids), draws)
            )
            progress(1)
        return QuestionScore(scores)

    def _answer(self, found, questions: list[Question], requests: Sequence[Request], answers: list) -> None:
        """Fills in the answers of some questions, caches and counts them."""
        choices = [choice for number, _ in found for choice in questions[number].choices]
        greedy = self._are_greedy(choices)
        settings = self.scoring.answers
        for number, score in found:
            question, here = questions[number], [next(greedy) for _ in score.choices]
            for each in score.choices:
                each.draws = each.levels = torch.zeros(0)
            tokens = sum(len(each.ids) - each.num_context for each in question.choices)
            self._report.add(score, tokens, sum(passes for _, passes in here))
            for request, choice in zip(question.requests, question.choice_of, strict=True):
                answers[request] = (score.choices[choice].value, here[choice][0])
                texts = requests[request][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[request])
                if self.scores is not None:
                    each = score.choices[choice]
                    line = {"task": question.task, "request": texts, "method": settings.method, "seed": self.seed}
                    line |= {k: v for k, v in asdict(each).items() if k not in ("draws", "levels")}
                    line |= {"lead": score.lead, "lead_stderr": score.lead_stderr, "is_greedy": here[choice][0]}
                    self.scores.add(line)

    def _are_greedy(self, choices: list[Choice]) -> Iterator[tuple[bool, int]]:
        """(Whether the deterministic decode gives the continuation, token passes that it took) of each choice."""
        ids, mask, prompt = padded(choices)
        result = self.model.greedy_matches(ids, mask, mask & ~prompt, tokens_per_pass=self.tokens_per_pass)
        for choice, is_greedy, passes in zip(
            choices, result.matches.tolist(), result.num_forward.tolist(), strict=True
        ):
            yield is_greedy, passes * len(choice.ids)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, or its bound: windows of max_length tokens, each scored on its own.

        The windows of `prime-v2 ppl`: disjoint, nothing given. ValueError for a text without a token and for the
        published score, from which lm-eval would compute a perplexity.
        """
        if not self.is_likelihood(self.scoring.method_of_texts):
            raise ValueError(self._no_perplexity(f"{place_of(requests, 0)} is a text to be scored whole"))
        totals = []
        for number, request in enumerate(tqdm(requests, disable=disable_tqdm or self.rank != 0, desc="Scoring texts")):
            (text,) = request.args
            (ids,) = plain_ids(self.tokenizer, [text])
            if not ids:
                raise ValueError(f"{place_of(requests, number)} is a text without a token, which has no likelihood")
            try:
                totals.append(self._log_likelihood_of_text(ids))
            except ValueError as error:
                raise ValueError(f"{place_of(requests, number)}: {error}") from None
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _log_likelihood_of_text(self, ids: list[int]) -> float:
        total = 0.0
        for start in range(0, len(ids), self.max_length):
            output = self.model.log_likelihood(
                torch.tensor([ids[start : start + self.max_length]]),
                method=self.scoring.method_of_texts,
                num_samples=self.scoring.samples_of_texts,
                seed=self.seed,
                tokens_per_pass=self.tokens_per_pass,
                **self.scoring.answers.of_method(),
            )
            total += float(output.value)
        if total == -math.inf:
            raise ValueError("top_p excludes a token of it, so the sampler never writes it; use top_p=1.0")
        return total

    # Generation

    @property
    def max_gen_toks(self) -> int:
        """lm-eval's 256, or half of what the model takes."""
        return min(256, self.max_length // 2)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts, by HFLM; equal requests draw different samples, whatever batches they fall into.

        An empty context is the BOS token, or EOS where there is none. ValueError for more new tokens than fit.
        """
        batches: dict[int, list[int]] = {}  # by how often the same request came before
        seen: dict[str, int] = {}
        prepared = []
        for number, request in enumerate(requests):
            context, options = request.args
            new_tokens = next((options[name] for name in MAX_TOKEN_NAMES if options.get(name)), self.max_gen_toks)
            if int(new_tokens) >= self.max_length:
                raise ValueError(
                    f"{place_of(requests, number)} asks for max_gen_toks={new_tokens} new tokens, but the model takes "
                    f"{self.max_length} with the context; use {self.max_length // 2}"
                )
            if not self.tok_encode(context):  # a tokenizer that adds BOS does so here too
                context = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
            self._report.add_context(len(self.tok_encode(context)) > self.max_length - int(new_tokens))
            place = f"{context} {options}"
            batches.setdefault(seen.get(place, 0), []).append(number)
            seen[place] = seen.get(place, 0) + 1
            prepared.append(dataclasses.replace(request, arguments=(context, options)))
        texts = [""] * len(requests)
        for repeat, numbers in batches.items():
            self._seed_of_batch = self.seed if repeat == 0 else int(hash64(self.seed, Stream.REPEAT, repeat))
            found = super().generate_until([prepared[number] for number in numbers], disable_tqdm=disable_tqdm)
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
        self._report.log(self.max_length)
        return texts

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """`generate` on left-padded contexts; do_sample=False or temperature 0 is the deterministic decode."""
        options = {name: value for name, value in kwargs.items() if value is not None}
        if options.get("do_sample") is False or options.get("temperature") == 0:
            for name in ("temperature", "top_p"):
                options.pop(name, None)
            options["do_sample"] = False
        else:
            options.setdefault("seed", self._seed_of_batch)
            if self.scoring.law is not None:
                options["generation_config"] = self.scoring.answers.generation_config
                options.setdefault("max_denoising_steps", self.scoring.law["steps"])
        steps = options.pop("max_denoising_steps", self.max_denoising_steps) or max_length - context.shape[1]
        if not self.config.causal:
            options["max_denoising_steps"] = int(steps)
        try:
            return self.model.generate(context, max_length=max_length, **options)
        except ValueError as error:
            text = self.tok_decode(context[0][options["attention_mask"][0].bool()].tolist())
            raise ValueError(f"the batch whose first context ends in {text[-60:]!r}: {error}") from None

    # What was done

    def draws_report(self) -> dict[str, Any]:
        """Method, draws and token passes of all likelihoods so far; see `Report`."""
        return self._report.as_dict()

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, with the device that is used and the settings of the likelihoods and what they took."""
        return {**super().get_model_info(), "model_device": str(self.device), "likelihood": self.draws_report()}
