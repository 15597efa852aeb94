"""Any options of train.py, in a new run and on the way of one: the same course, another one, or a sentence."""

from typing import Any

import pytest
from fuzzing import Refusal, attempt, cases
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from prime_v2.output.atomic import write_json
from prime_v2.training.course import (
    EVALUATION,
    MACHINE_OPTIONS,
    NO_INFLUENCE,
    SPLIT,
    Holds,
    check_folder,
    course_of,
    differences,
)
from prime_v2.training.option_checks import REFUSED, RULES, USUAL, is_numeric, kinds_of
from prime_v2.training.options import RaisingParser, RunOptions, parse_options

KINDS = {**kinds_of(RunOptions), **kinds_of(TrainingArguments)}
# Not drawn: what names places and files, what would look for hardware, engines or services.
LEFT_OUT = {"config", "output_dir", "record", "init_from", "deepspeed", "fsdp", "fsdp_config", "report_to", "use_cpu"}
LEFT_OUT |= {"bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "ddp_backend"}
LEFT_OUT |= {"parallelism_config", "trackio_space_id", "log_level", "log_level_replica", "debug", "push_to_hub"}
LEFT_OUT |= {"dataloader_multiprocessing_context", "local_rank", "hub_token", "full_determinism"}
NAMES = sorted(KINDS.keys() - LEFT_OUT)
NUMBERS = ["0", "1", "2", "3", "-1", "0.5", "0.25", "1e-3", "nan", "inf", "-inf", "1e300", "9" * 25, "x", "", "1.5"]
TEXTS = [
    "",
    "x",
    "no",
    "steps",
    "epoch",
    "linear",
    "constant",
    "reduce_lr_on_plateau",
    "sgd",
    "adafactor",
    "text",
    "{}",
]
TEXTS += ['{"a": 1}', "{", "[1]", "sequential", "random", "shuffle", "similarity", "arm", "prime", "{prompt} {answer}"]
SWITCHES = ["true", "false", "1", "x"]
START = ["--output_dir", "nowhere", "--per_device_train_batch_size", "2"]


def values_of(name: str) -> list[str]:
    kinds = KINDS[name]
    if is_numeric(kinds):
        return [*NUMBERS, str(RULES.get(name, USUAL).use)]
    return SWITCHES if bool in kinds else TEXTS


@st.composite
def options(draw) -> dict[str, str]:
    names = draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    return {name: draw(st.sampled_from(values_of(name))) for name in names}


def parsed(given_: dict[str, str]) -> tuple[RunOptions, TrainingArguments, dict[str, Any]]:
    arguments = [*START, *(f"--{name}={value}" for name, value in given_.items())]
    return parse_options(arguments, parser_class=RaisingParser)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that Transformers will drop
def test_options_on_the_way_continue_the_same_course_or_are_refused_by_name(tmp_path):
    """Beside a run of one draw of options, with a checkpoint: another draw."""

    @cases(40, 4000)
    @given(options(), options())
    def check(first, more):
        begun = attempt("options of a new run", lambda: parsed(first))
        if isinstance(begun, Refusal):
            return
        course = course_of(*begun)
        write_json(tmp_path / "run.json", course)
        (tmp_path / "checkpoint-2").mkdir(exist_ok=True)
        assert check_folder(tmp_path, course) is Holds.unfinished
        second = attempt(None, lambda: parsed(first | more))
        if isinstance(second, Refusal):
            return
        now = course_of(*second)
        found = attempt("options on the way", lambda: check_folder(tmp_path, now))
        before, after = ({**vars(each[0]), **vars(each[1])} for each in (begun, second))
        changed = {name for name in KINDS if before.get(name) != after.get(name)}
        decides = changed - MACHINE_OPTIONS - (NO_INFLUENCE - EVALUATION)
        if "reduce_lr_on_plateau" not in (str(now["lr_scheduler_type"]), str(course["lr_scheduler_type"])):
            decides -= EVALUATION
        decides |= changed & SPLIT & now.keys() & course.keys()  # of models that draw as they train
        if isinstance(found, Refusal):
            assert differences(course, now)[0] in decides and differences(course, now)[0] in found.sentence
        else:
            assert found is Holds.unfinished and not decides, decides

    check()


def test_what_is_refused_for_every_run_is_never_part_of_a_course_with_another_value():
    @cases(20, 1500)
    @given(st.sampled_from(sorted(REFUSED.keys() & set(NAMES))), st.sampled_from([*NUMBERS, *TEXTS, *SWITCHES]))
    def check(name, value):
        found = attempt("refused options", lambda: parsed({name: value}))
        if not isinstance(found, Refusal):
            assert getattr(found[1], name) == REFUSED[name][0]

    check()
