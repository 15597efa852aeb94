"""What a streamer that takes logits gets of each pass, whatever the family, held against the network's own output."""

import pytest
import torch
from networks import KINDS, VOCAB_SIZE, network, some_ids
from observers import Favour

from prime_v2 import ConfidenceSamplerConfig, RemaskingSamplerConfig
from prime_v2.output.trace import Trace

MASK = VOCAB_SIZE
MASKED = ["digits", "digits in base 3, tied", "tokens", "stages", "MDM"]


class LogitsTrace(Trace):
    """Keeps the logits themselves, too: a dictionary of (V,) by place for each pass."""

    def __init__(self):
        super().__init__(takes_logits=True)
        self.logits = [{}]

    def put_logits(self, places, logits):
        super().put_logits(places, logits)
        self.logits[-1] |= dict(zip(places.tolist(), logits, strict=True))

    def put_states(self, ids, digits):
        if self.steps:
            self.logits.append({})
        super().put_states(ids, digits)


def traced(model, **options) -> LogitsTrace:
    trace = LogitsTrace()
    options = {"max_new_tokens": 5, "seed": 3, **options}
    ids = model.generate(some_ids(1, 3), streamer=trace, **options)
    assert torch.equal(ids, model.generate(some_ids(1, 3), **options)), "being watched changes nothing"
    assert trace.result == ids[0].tolist()
    assert len(trace.predictions) == len(trace.steps) - 1
    return trace


def expected_logits(model, step) -> torch.Tensor:
    """Logits (T, V) of a state from one pass over all of it; what the visible digits exclude is -inf."""
    states = torch.tensor([step.digits])
    states = model.encode(torch.tensor([step.ids])) if states.shape[2] == 1 else states
    logits = model.token_logits(model.model(states).last_hidden_state, states)
    return logits.masked_fill(~model.code_table.consistent(states), -torch.inf)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_gives_predictions_and_the_text_stays_the_same(kind):
    model = network(kind)
    trace = traced(model)
    for number, (before, predicted) in enumerate(zip(trace.steps[:-1], trace.predictions, strict=True)):
        after = trace.steps[number + 1]
        changed = {i for i in range(8) if before.digits[i] != after.digits[i]}
        assert changed <= set(predicted) <= set(range(3, 8))
        for place in changed & {i for i in predicted if after.ids[i] != MASK}:
            assert trace.logits[number][place][after.ids[place]] > -torch.inf
        for place, each in predicted.items():
            probabilities = trace.logits[number][place].double().softmax(0)
            positive = probabilities[probabilities > 0]
            assert each.entropy == pytest.approx(float(-(positive * positive.log()).sum()), abs=1e-9)
            values = [value for _, value in each.likeliest]
            assert values == sorted(values, reverse=True) and len(values) == min(3, len(positive))
            assert values == pytest.approx([float(probabilities[token]) for token, _ in each.likeliest])


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("sampler", [None, ConfidenceSamplerConfig(score="margin"), RemaskingSamplerConfig(eta=0.3)])
def test_a_pass_of_masked_diffusion_scores_every_hidden_token_given_the_state_before_it(kind, sampler):
    model = network(kind)
    trace = traced(model, max_denoising_steps=6, **({} if sampler is None else {"sampler_config": sampler}))
    for before, logits in zip(trace.steps, trace.logits[:-1], strict=False):
        # A pass of remasking hides tokens first; the trace has them hidden in the state before it.
        assert set(logits) == {i for i, token in enumerate(before.ids) if token == MASK}
        expected = expected_logits(model, before).log_softmax(-1)
        for place, found in logits.items():
            # Two orders of summation in float32.
            torch.testing.assert_close(found.log_softmax(-1), expected[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_a_cache_only_what_the_pass_decides_on_is_scored(cache):
    model = network("digits")
    trace = traced(model, max_denoising_steps=8, block_length=2, cache=cache)
    scored = [sorted(each) for each in trace.predictions]
    assert scored and all(each and max(each) - min(each) < 2 for each in scored)


def test_processors_are_called_for_what_is_drawn_only():
    """Not for the other tokens that the streamer gets, whose logits they leave alone."""
    rows = []
    for watched in (False, True):
        favour = Favour([1], 5.0)
        options = {"streamer": Trace(takes_logits=True)} if watched else {}
        network("digits").generate(some_ids(1, 3), max_new_tokens=5, seed=3, logits_processor=[favour], **options)
        rows.append([shape for _, shape in favour.seen])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("kind", ["ARM", "ARM over digits"])
def test_an_arm_writes_its_states_from_left_to_right(kind):
    model = network(kind)
    trace = traced(model)
    for count, step in enumerate(trace.steps):
        assert step.ids == trace.result[: 3 + count] + [MASK] * (5 - count)
        assert step.digits == [[token] for token in step.ids]
    text = torch.tensor([[model.config.bos_token_id, *trace.result]])
    logits = model(text).logits[0]
    for count, found in enumerate(trace.logits[:-1]):
        assert list(found) == [3 + count]
        torch.testing.assert_close(found[3 + count], logits[3 + count].to(found[3 + count]), rtol=1e-4, atol=1e-4)


def test_a_streamer_that_does_not_take_logits_gets_none():
    trace = Trace()
    network("digits").generate(some_ids(1, 3), max_new_tokens=4, seed=0, streamer=trace)
    assert len(trace.predictions) == len(trace.steps) - 1 and not any(trace.predictions)
