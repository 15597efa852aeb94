"""The options of train.py: every number in its range, every option compared, refused or known to change nothing."""

import dataclasses
import json
import re
from typing import Any

import pytest
import yaml
from tiny_runs import MODEL, TINY, write_text
from transformers import TrainingArguments

from prime_v2.training import run as training
from prime_v2.training.course import EVALUATION, MACHINE_OPTIONS, NO_INFLUENCE, course_of, differences, draws
from prime_v2.training.option_checks import REFUSED, RULES, USUAL, is_numeric, kinds_of
from prime_v2.training.options import RunOptions, parse_options

KINDS = (RunOptions, TrainingArguments)
NUMBERS = sorted(
    name for kind in KINDS for name, types in kinds_of(kind).items() if is_numeric(types) and name not in REFUSED
)
OTHERS = sorted({name for kind in KINDS for name in kinds_of(kind)} - set(NUMBERS) - set(REFUSED))
VALUES = ["0", "-1", "-4", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "-" + "9" * 30, "text", "", "1,5", "[1]"]
NEEDED = {"dataloader_prefetch_factor": ["--dataloader_num_workers", "1"], "lora": ["--init_from", "model"]}
START = ["--output_dir", "nowhere", "--per_device_train_batch_size", "2"]


def outcome(arguments: list[str], capsys: Any) -> Any:
    """The options, or the sentence of a refusal, which has status 2 and one line."""
    try:
        return parse_options(arguments)
    except SystemExit as stopped:
        assert stopped.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train.py: error: ") and len(line) < 1000
        return line


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_taken_in_its_range_only_and_else_refused_in_a_sentence(name, capsys):
    """On the command line and in a file; what is taken is a finite number that its rule holds for."""
    rule = RULES.get(name, USUAL)
    whole = float not in {**kinds_of(RunOptions), **kinds_of(TrainingArguments)}[name]
    for value in VALUES:
        found = outcome([*START, f"--{name}", value], capsys)
        if isinstance(found, str):
            assert f"--{name}" in found
            try:
                number = int(value) if whole else float(value)
            except ValueError:
                continue
            assert not rule.holds(number) or "multiple" in found, found  # or NaN, of which no rule holds
        else:
            taken = getattr(found[0], name, None) if hasattr(found[0], name) else getattr(found[1], name)
            assert isinstance(taken, int | float) and rule.holds(taken)
    assert not isinstance(outcome([*START, *NEEDED.get(name, []), f"--{name}", str(rule.use)], capsys), str)


@pytest.mark.parametrize("name", [*NUMBERS, *OTHERS])
@pytest.mark.parametrize("value", [True, 1.5, [1], {"a": 1}, -3], ids=str)
def test_every_value_of_a_file_is_of_its_kind_or_refused_in_a_sentence(name, value, capsys, tmp_path):
    """YAML has types of its own, which the command line's conversions do not see."""
    if name == "config":
        return
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({name: value}), encoding="utf-8")
    found = outcome(["--config", str(path), *START[:2]], capsys)
    kinds = {**kinds_of(RunOptions), **kinds_of(TrainingArguments)}[name]
    if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, kinds)):
        assert isinstance(found, str) and f"--{name}" in found


@pytest.mark.parametrize("name", REFUSED)
def test_what_breaks_a_promise_is_refused_whatever_else_is_given(name, capsys):
    if name not in kinds_of(TrainingArguments):
        pytest.skip("this Transformers does not have it")
    wanted, reason = REFUSED[name]
    other = {False: "true", True: "false"}.get(wanted, "2") if not isinstance(wanted, list) else "loss"
    other = {"train_sampling_strategy": "random", "liger_kernel_config": '{"rope":true}'}.get(name, other)
    if name == "liger_kernel_config":  # of a file only: the command line makes no dict of it
        return
    assert re.search(f"--{name} .* is not supported here|{name}", outcome([*START, f"--{name}", other], capsys))


@pytest.mark.parametrize("value", [[0], [4, True], [2.5], "64", 4, [[8]]], ids=str)
def test_passes_are_whole_numbers_of_at_least_one(value, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"sampler_passes": value}), encoding="utf-8")
    found = outcome(["--config", str(path), *START[:2]], capsys)
    assert "--sampler_passes" in found and "must be whole numbers of at least 1; use 64 8 4" in found


def test_problems_of_several_options_are_reported_at_once(capsys):
    sentence = outcome([*START, "--global_batch", "-4", "--learning_rate", "nan", "--logging_steps", "0"], capsys)
    for part in (
        "--global_batch -4 must be at least 1; use 8",
        "--learning_rate nan is not finite; use 0.0002",
        "--logging_steps 0.0 must be above 0; use 500",
    ):
        assert part in sentence


def test_an_abbreviated_option_is_no_option(capsys, tmp_path):
    """`--conf FILE` would have been taken by the parser, and the file have been left out."""
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 7\n", encoding="utf-8")
    assert "unknown option --conf; did you mean --config?" in outcome(["--conf", str(path)], capsys)


def test_the_smallest_numbers_that_are_taken_train(tmp_path):
    """Each option is at the lower end of its range, as far as a run of a few steps has room for it."""
    text = write_text(tmp_path / "text.jsonl")
    needed = {"block_size", "bpe_vocab_size", "max_documents", "dev_share", "test_share", "lora", "local_rank"}
    low = [
        f"--{name}={RULES[name].low if not RULES[name].is_open[0] else 0.5 if 'steps' in name else 1e-3}"
        for name in NUMBERS
        if name in RULES and name not in needed | {"ddp_bucket_cap_mb", "dataloader_prefetch_factor", "ddp_timeout"}
    ]
    options = [*TINY.split(), *low, "--max_steps", "2", "--data", str(text), "--output_dir", str(tmp_path / "run")]
    assert training.main([*options, *MODEL]) == 0


# The course of a run


def parsed(*arguments: str) -> dict[str, Any]:
    return course_of(*parse_options([*START, *arguments]))


def test_every_option_is_compared_refused_or_listed_as_without_influence():
    """A field that a later Transformers adds is compared, without anyone's doing."""
    course = parsed()
    for kind in KINDS:
        for each in dataclasses.fields(kind):
            if each.init:
                assert (each.name in course) != (each.name in NO_INFLUENCE | MACHINE_OPTIONS), each.name
    assert not NO_INFLUENCE & set(REFUSED)


def test_a_new_field_of_transformers_at_its_default_is_no_other_course_and_set_it_is():
    """run.json of an older Transformers has no word of it."""
    course = parsed()
    before = {key: value for key, value in course.items() if key != "adam_beta1"}
    assert differences(before, course) == []
    assert differences(before, parsed("--adam_beta1", "0.8")) == ["adam_beta1"]


@pytest.mark.parametrize(
    ("more", "are_compared"),
    [
        ([], False),
        (["--model", "attention_dropout=0.1"], True),
        (["--model", "attention_dropout=0.0"], False),
        (["--neftune_noise_alpha", "5"], True),
    ],
)
def test_the_split_of_a_batch_is_compared_where_the_model_draws_as_it_trains(more, are_compared):
    first = parsed("--global_batch", "8", "--per_device_train_batch_size", "4", *more)
    second = parsed("--global_batch", "8", "--per_device_train_batch_size", "2", *more)
    assert bool(differences(first, second)) == are_compared


def test_dropout_of_the_model_that_is_tuned_counts_too(tmp_path):
    training = parse_options(START)[1]
    for dropout in (0.0, 0.1):
        (tmp_path / "config.json").write_text(json.dumps({"attention_dropout": dropout}))
        assert draws(RunOptions(init_from=str(tmp_path)), training, {}) == bool(dropout)
    assert not draws(RunOptions(init_from=str(tmp_path)), training, {"attention_dropout": 0.0})


def test_a_field_that_is_gone_is_another_course_unless_it_was_off():
    course = parsed()
    assert differences(course | {"new_in_6_0": False, "other": None}, course) == []
    assert differences(course | {"new_in_6_0": 0.5}, course) == ["new_in_6_0"]


def test_a_key_that_a_dependency_adds_to_its_own_settings_is_no_other_course():
    course = parsed()
    before = course | {
        "accelerator_config": {k: v for k, v in course["accelerator_config"].items() if k != "even_batches"}
    }
    assert differences(before, course) == []
    other = course | {"accelerator_config": {**course["accelerator_config"], "even_batches": False}}
    assert differences(other, course) == ["accelerator_config"]


def test_evaluations_decide_the_course_where_the_schedule_follows_them():
    assert not EVALUATION & parsed().keys()
    assert parsed("--lr_scheduler_type", "reduce_lr_on_plateau").keys() >= EVALUATION


def test_a_schedule_that_follows_evaluations_follows_the_bound_or_what_is_measured(capsys):
    """Transformers would look for an eval_loss, and end in a KeyError at the first evaluation."""
    start = [*START, "--lr_scheduler_type", "greedy"]
    for more, metric in (([], "bound"), (["--metric_for_best_model", "perplexity"], "perplexity")):
        _, training, _ = parse_options([*start, *more])
        assert (training.metric_for_best_model, training.greater_is_better) == (metric, False)
        assert training.lr_scheduler_kwargs is None  # min_lr_rate of the recipe is of its own schedule
    sentence = outcome([*start, "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'], capsys)
    assert "--lr_scheduler_type greedy with {'min_lr_rate': 0.1} is no schedule: " in sentence
    sentence = outcome([*start, "--metric_for_best_model", "loss"], capsys)
    assert "--metric_for_best_model loss is not measured; use one of bound, perplexity" in sentence


def test_true_is_not_one():
    assert differences({**parsed(), "average_tokens_across_devices": 1}, parsed()) == ["average_tokens_across_devices"]
