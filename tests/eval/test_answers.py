"""`score_questions`: against single likelihoods, what a score does not depend on, and when draws stop."""

import math

import pytest
import torch
from networks import small_model

from prime_v2.eval.answers import Choice, ChoiceError, Settings, score_questions
from prime_v2.likelihood_prime_v2 import METHODS

# float32 network: rows of different length and batches of different shape round differently, 1e-6 a logit, times n/k.
NETWORK = 1e-4


@pytest.fixture(scope="module")
def model():
    return small_model(seed=2, vocab_size=11, reveal_order="nested", stage_digits=[2, 4])


@pytest.fixture(scope="module")
def questions():
    """Six questions of two to four choices, contexts of one to eight tokens and continuations of one to six."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(11, (length,), generator=generator).tolist())

    found = []
    for number in range(6):
        context = ids(1 + (3 * number) % 8)
        choices = [ids(1 + (number + 2 * each) % 6) for each in range(2 + number % 3)]
        found.append([Choice((*context, *each), len(context), 1.0 + len(each)) for each in choices])
    return found


def scores_of(model, questions, settings):
    scores = dict(score_questions(model, questions, settings))
    return [scores[number] for number in range(len(questions))]


def values_of(model, questions, settings):
    return [[choice.value for choice in score.choices] for score in scores_of(model, questions, settings)]


def flat(values):
    return torch.tensor([value for each in values for value in each])


@pytest.mark.parametrize("method", METHODS)
def test_a_score_is_the_likelihood_of_the_continuation_given_the_context(model, questions, method):
    """Within 5 standard errors of another estimate with 2,000 draws; exactly where nothing is drawn."""
    if method == "windows":  # the windows are fields of the model
        windows = {"reveal_order": "windows", "stage_windows": [[0, 0.75], [0.25, 1]]}
        model = small_model(seed=2, vocab_size=11, stage_digits=[2, 4], **windows)
    settings = Settings(method, num_samples=300)
    for question, score in zip(questions, scores_of(model, questions, settings), strict=True):
        for choice, found in zip(question, score.choices, strict=True):
            ids = torch.tensor([choice.ids])
            prompt = (torch.arange(len(choice.ids)) < choice.num_context).long().unsqueeze(0)
            # 300 as above where that is enough for every mask, so that both are the same sum.
            num_samples = 300 if found.num_draws == 0 else 2000
            alone = model.log_likelihood(ids, prompt_mask=prompt, method=method, num_samples=num_samples)
            assert abs(alone.value.item() - found.value) <= 5 * math.hypot(alone.stderr, found.stderr) + NETWORK
            assert found.token_passes == found.num_forward * len(choice.ids)


@pytest.mark.parametrize("method", ["subtoken", "token", "chain"])
@pytest.mark.parametrize("adaptive", [None, 2.0])
def test_scores_do_not_depend_on_other_questions_order_or_batches(model, questions, method, adaptive):
    settings = Settings(method, num_samples=24, adaptive=adaptive)
    expected = values_of(model, questions, settings)
    alone = [values_of(model, [question], settings)[0] for question in questions]
    torch.testing.assert_close(flat(alone), flat(expected), rtol=0, atol=NETWORK)
    backwards = values_of(model, questions[::-1], settings)[::-1]
    torch.testing.assert_close(flat(backwards), flat(expected), rtol=0, atol=NETWORK)
    for tokens_per_pass in (1, 50, 10**6):
        batched = values_of(model, questions, Settings(method, 24, adaptive=adaptive, tokens_per_pass=tokens_per_pass))
        torch.testing.assert_close(flat(batched), flat(expected), rtol=0, atol=NETWORK)


def test_the_order_of_the_choices_changes_no_value(model, questions):
    settings = Settings(num_samples=24)
    turned = [question[::-1] for question in questions]
    expected, found = values_of(model, questions, settings), values_of(model, turned, settings)
    torch.testing.assert_close(flat(each[::-1] for each in found), flat(expected), rtol=0, atol=NETWORK)


def test_seeds_reproduce_and_differ(model, questions):
    first, again, other = (values_of(model, questions, Settings(num_samples=8, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


# Standard errors


def test_common_masks_make_the_lead_surer(model):
    """Twenty questions whose choices differ in one of six tokens."""
    generator = torch.Generator().manual_seed(3)
    questions = []
    for _ in range(20):
        ids = torch.randint(11, (9,), generator=generator).tolist()
        other = [*ids[:6], (ids[6] + 1) % 11, *ids[7:]]
        questions.append([Choice(tuple(ids), 3), Choice(tuple(other), 3)])
    variances = [
        sum(
            score.lead_stderr**2
            for score in scores_of(model, questions, Settings(num_samples=64, common_masks=common))
        )
        for common in (True, False)
    ]
    assert variances[0] < 0.7 * variances[1]


def test_draws_in_rounds_are_stratified_as_if_drawn_at_once(model):
    """Two equal choices never decide, so all rounds run; their union has the error of one round of as many draws."""
    questions = [[Choice((1, 2, 3, number, 5, 6, 7), 1)] * 2 for number in range(11)]
    stderrs = []
    for adaptive in (None, 3.0):
        scores = scores_of(model, questions, Settings(num_samples=64, adaptive=adaptive))
        assert {choice.num_draws for score in scores for choice in score.choices} == {64}
        for score in scores:
            strata = (score.choices[0].levels * 64).floor().tolist()
            assert strata == list(range(64))
        stderrs.append(sum(score.choices[0].stderr ** 2 for score in scores) ** 0.5)
    assert stderrs[1] == pytest.approx(stderrs[0], rel=0.3)  # eleven estimates of each, 15% off or so


# Draws that stop


def test_rounds_double_up_to_the_number_of_draws():
    assert Settings(num_samples=128, adaptive=3.0).rounds() == [8, 8, 16, 32, 64]
    assert Settings(num_samples=100, adaptive=3.0).rounds() == [25, 25, 50]
    assert Settings(num_samples=15, adaptive=3.0).rounds() == [15]
    assert Settings(num_samples=128).rounds() == [128]
    assert Settings("chain", 128, adaptive=3.0).rounds() == [128]
    assert Settings("orders", 4, adaptive=3.0).rounds() == [4]


def test_draws_stop_when_the_best_choice_leads_clearly(model, questions):
    settings = Settings(num_samples=512, adaptive=3.0)
    full = scores_of(model, questions, Settings(num_samples=512))
    stopped = 0
    for question, score, whole in zip(questions, scores_of(model, questions, settings), full, strict=True):
        drawn = {choice.num_draws for choice in score.choices}
        assert max(drawn) <= 512
        if max(drawn) < 512:
            stopped += 1
            assert score.lead > 3 * score.lead_stderr
            values, lengths = [each.value for each in score.choices], [each.length for each in question]
            reference = [each.value for each in whole.choices]
            assert values.index(max(values)) == reference.index(max(reference))
            normalised = [a / b for a, b in zip(reference, lengths, strict=True)]
            found = [a / b for a, b in zip(values, lengths, strict=True)]
            assert found.index(max(found)) == normalised.index(max(normalised))
    assert stopped >= 2, "of six questions, by nats and by nats per length alike"


def test_equal_choices_draw_all_there_is_to_draw(model):
    ids = (1, 2, 3, 4, 5)
    (score,) = scores_of(model, [[Choice(ids, 1), Choice(ids, 1)]], Settings(num_samples=40, adaptive=3.0))
    assert [choice.num_draws for choice in score.choices] == [40, 40]
    assert (score.lead, score.lead_stderr) == (0.0, 0.0), "common masks"


def test_a_single_choice_is_drawn_in_full(model):
    (score,) = scores_of(model, [[Choice((1, 2, 3, 4), 1)]], Settings(num_samples=20, adaptive=3.0))
    assert score.choices[0].num_draws == 20
    assert math.isnan(score.lead)


def test_few_masks_are_summed_over_as_soon_as_a_round_has_as_many(model):
    """Four whole tokens have 15 masks: 8 draws, then, undecided, all of them instead of 16 draws in all."""
    ids = (1, 2, 3, 4, 5)
    (score,) = scores_of(model, [[Choice(ids, 1), Choice(ids, 1)]], Settings("token", 128, adaptive=3.0))
    assert [choice.num_draws for choice in score.choices] == [0, 0]
    assert [choice.num_forward for choice in score.choices] == [23, 23]
    assert [choice.stderr for choice in score.choices] == [0, 0]


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1; use 128"),
        ({"adaptive": 0.0}, "adaptive=0.0 must be a positive number of standard errors, or off; use 3"),
        ({"adaptive": math.nan}, "adaptive=nan must be a positive number"),
        ({"tokens_per_pass": 0}, "tokens_per_pass=0 must be an integer of at least 1; use 8192"),
        ({"adaptive": True}, "adaptive=True must be a positive number"),
        ({"adaptive": "3"}, "adaptive='?3'? must be a positive number"),
        *(
            ({name: value}, f"{name}={value!r} must be an integer")
            for name in ("seed", "num_samples", "tokens_per_pass")
            for value in (8.5, "8", True, None)
        ),
        ({"common_masks": "false"}, "common_masks='false' must be True or False"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings(**fields)


def test_logits_that_are_not_finite_name_the_choice(questions):
    model = small_model(seed=2, vocab_size=11)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ChoiceError, match="not finite") as caught:
        list(score_questions(model, questions[2:3], Settings("chain")))
    assert (caught.value.question, caught.value.choice) == (0, 0)
