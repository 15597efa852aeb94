"""What a SciQ run costs beside the published protocol, in the same process: token passes, seconds, standard errors.

    python benchmarks/sciq_protocol.py runs/tiny --data JSONL_FOLDERS --output results/sciq_protocol.json

Published: 256 draws of each choice, classifier-free guidance (two passes a draw), one request at a time, by this code.
It is run on a random part of the questions, on which everything else is run too; the default is also run on all
of them. The standard error is that of the difference between the best choice and the runner-up. Token passes at equal
standard error scale the draws by the ratio of variances. What each part brings: only that part is switched off.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from questions import TaskQuestions
from timing import add_output

from prime_v2.eval.answers import Choice, QuestionScore, Settings, score_questions
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.eval.published import ROWS_PER_BATCH, published_score, published_settings
from prime_v2.output.atomic import write_json
from prime_v2.output.records import code_version, make_record
from prime_v2.random_prime_v2 import hash64

Cost = dict[str, Any]


def rms(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def published(lm: PrimeV2LM, questions: list[list[Choice]], seed: int) -> Cost:
    settings, passes, errors = published_settings("sciq", seed), 0, []
    started = time.perf_counter()
    for choices in questions:
        found = []
        for choice in choices:
            draws = published_score(lm.model, torch.tensor(choice.ids), choice.num_context, settings)
            batches = draws.view(-1, ROWS_PER_BATCH).mean(1)  # independent of each other
            found.append((float(draws.mean()), float(batches.var() / len(batches))))
            passes += 2 * len(draws) * len(choice.ids)
        best, second = sorted(found, reverse=True)[:2]
        errors.append(math.sqrt(best[1] + second[1]))
    return {"draws": settings.num_samples, **cost(questions, passes, started), "stderr": rms(errors)}


def cost(questions: list[list[Choice]], passes: int, started: float) -> Cost:
    seconds = time.perf_counter() - started
    return {"token_passes": passes / len(questions), "seconds": seconds / len(questions)}


def ours(lm: PrimeV2LM, questions: list[list[Choice]], settings: Settings) -> Cost:
    started = time.perf_counter()
    scores = dict(score_questions(lm.model, questions, settings))
    choices = [choice for score in scores.values() for choice in score.choices]
    passes = sum(choice.token_passes for choice in choices)
    return {
        "draws": statistics.fmean(choice.num_draws for choice in choices),
        **cost(questions, passes, started),
        "stderr": rms([score.lead_stderr for score in scores.values()]),
        "best": [best_of(scores[number]) for number in range(len(questions))],
    }


def best_of(score: QuestionScore) -> int:
    values = [choice.value for choice in score.choices]
    return values.index(max(values))


def unstratified(lm: PrimeV2LM, questions: list[list[Choice]], settings: Settings) -> Cost:
    """`num_samples` independent draws: each is a sequence of its own with one draw."""
    started, passes, errors = time.perf_counter(), 0, []
    for number, choices in enumerate(questions):
        values = []
        for index, choice in enumerate(choices):
            ids = torch.tensor([choice.ids]).expand(settings.num_samples, -1)
            prompt = (torch.arange(ids.shape[1]) < choice.num_context).long().expand_as(ids)
            place = 0 if settings.common_masks else index + 1
            keys = hash64(settings.seed, number, place, torch.arange(settings.num_samples))
            found = lm.model.log_likelihood(
                ids, None, prompt, settings.method, num_samples=1, keys=keys, exhaustive=False
            )
            values.append(found.value)
            passes += ids.numel()
        best, second = sorted(values, key=lambda draws: -float(draws.mean()))[:2]
        errors.append(float((best - second).std()) / math.sqrt(settings.num_samples))
    return {"draws": settings.num_samples, **cost(questions, passes, started), "stderr": rms(errors)}


def batching(lm: PrimeV2LM, questions: list[list[Choice]], settings: Settings) -> list[Cost]:
    """Seconds for a million token passes: rows of all questions together, of one request, and one row at a time."""
    alone = [[choice] for choices in questions for choice in choices]

    def one_request(settings: Settings) -> float:
        started, passes = time.perf_counter(), 0
        for each in alone:
            (score,) = dict(score_questions(lm.model, [each], settings)).values()
            passes += score.choices[0].token_passes
        return 1e6 * (time.perf_counter() - started) / passes

    together = ours(lm, questions, settings)
    return [
        {"rows of a pass": "of many questions", "seconds": 1e6 * together["seconds"] / together["token_passes"]},
        {"rows of a pass": "of one request", "seconds": one_request(settings)},
        {"rows of a pass": "one", "seconds": one_request(replace(settings, tokens_per_pass=1))},
    ]


def all_questions(lm: PrimeV2LM, sciq: TaskQuestions) -> Cost:
    """The default setting as lm-eval runs it, `is_greedy` included."""
    started = time.perf_counter()
    answers = lm.loglikelihood(sciq.requests, disable_tqdm=True)
    seconds = time.perf_counter() - started
    report = lm.draws_report()
    values = []
    for group in sciq.groups:
        scores = dict(zip(group.choice_of, (answers[request][0] for request in group.requests), strict=True))
        values.append([scores[number] for number in range(len(group.choices))])
    metrics = {
        name: {"value": statistics.fmean(each), "stderr": statistics.stdev(each) / math.sqrt(len(each))}
        for name, each in sciq.metrics(values).items()
    }
    count = len(sciq.groups)
    passes = report["token_passes"] + report["token_passes_is_greedy"]
    return {"questions": count, "token_passes": passes / count, "seconds": seconds / count, "metrics": metrics}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder with sciq/validation.jsonl")
    parser.add_argument("--questions", type=int, default=24, help="of the part that all are run on (default: 24)")
    parser.add_argument("--draws", type=int, default=64, help="of the settings that are compared (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    add_output(parser)
    args = parser.parse_args()
    code = code_version()
    lm = PrimeV2LM(pretrained=args.model)
    part = TaskQuestions(lm, "sciq", args.data, "validation", args.questions, args.seed).choices
    drawn = Settings("subtoken", args.draws, args.seed)
    runs: dict[str, Callable[[], Cost]] = {
        "published protocol": lambda: published(lm, part, args.seed),
        "default (chain)": lambda: ours(lm, part, lm.scoring.answers),
        "token, adaptive": lambda: ours(lm, part, Settings("token", 128, args.seed, adaptive=3.0)),
        "subtoken, adaptive": lambda: ours(lm, part, Settings("subtoken", 128, args.seed, adaptive=3.0)),
        "subtoken, all 128 draws": lambda: ours(lm, part, Settings("subtoken", 128, args.seed)),
        f"subtoken, {args.draws} draws": lambda: ours(lm, part, drawn),
        "without common masks": lambda: ours(lm, part, replace(drawn, common_masks=False)),
        "without stratification": lambda: unstratified(lm, part, drawn),
        "without both": lambda: unstratified(lm, part, replace(drawn, common_masks=False)),
    }
    rows = []
    for name, run in runs.items():
        rows.append({"setting": name, **run()})
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "best"}), file=sys.stderr)
    first = rows[0]
    for row in rows:
        row["token_passes_at_equal_stderr"] = row["token_passes"] * (row["stderr"] / first["stderr"]) ** 2
        if row["stderr"] == 0:  # nothing is drawn, so fewer passes are not to be had
            row["token_passes_at_equal_stderr"] = row["token_passes"]
    full = all_questions(lm, TaskQuestions(lm, "sciq", args.data, "validation", None, args.seed))
    by_name = {row["setting"]: row for row in rows}
    adaptive, every = by_name["subtoken, adaptive"], by_name["subtoken, all 128 draws"]
    results = {
        "model": Path(args.model).name,
        "questions": len(part),
        "choices_per_question": len(part[0]),
        "mean_tokens": statistics.fmean(len(choice.ids) for choices in part for choice in choices),
        "rows": [{key: value for key, value in row.items() if key != "best"} for row in rows],
        "adaptive_same_best_share": statistics.fmean(
            a == b for a, b in zip(adaptive["best"], every["best"], strict=True)
        ),
        "batching": batching(lm, part, replace(drawn, num_samples=8)),
        "all_questions": full,
        "ratio_token_passes": first["token_passes"] / full["token_passes"],
        "ratio_seconds": first["seconds"] / full["seconds"],
    }
    print(json.dumps(results, indent=1))
    if args.output is not None:
        write_json(args.output, make_record("sciq_protocol", results, seed=args.seed, code=code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
