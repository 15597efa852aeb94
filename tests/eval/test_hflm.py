"""lm-eval's own model for Transformers, HFLM, on every family: refused, but for causal ones, which it scores rightly.

HFLM reads the logits of a place as those of the token after it.
"""

import warnings

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from prime_v2 import build_tokenizer
from prime_v2.eval.lm import PrimeV2LM
from prime_v2.families import FAMILIES
from prime_v2.tokenization.bpe import train_bpe

TEXT = "the quick brown fox jumps over the lazy dog"
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CAUSAL = [name for name, family in FAMILIES.items() if family.config_class.causal]
OTHERS = [name for name in FAMILIES if name not in CAUSAL]


@pytest.fixture(scope="module")
def tokenizers() -> dict[bool, object]:
    """By whether a token is split into digits."""
    base = train_bpe([TEXT] * 3, 262)
    special = {"special_tokens": {"eos_token": "<|endoftext|>"}}
    return {True: build_tokenizer(base, **special), False: build_tokenizer(base, num_subtokens=1, **special)}


@pytest.fixture
def pair(request, tokenizers):
    """A random model of a family, with its tokenizer."""
    family = FAMILIES[request.param]
    tokenizer = tokenizers[family.name == "prime"]
    torch.manual_seed(0)
    options = {"vocab_size": len(tokenizer.code_table), "max_position_embeddings": 64, "eos_token_id": 0}
    return family.model_class(family.config_class(**SHAPE, **options)).eval(), tokenizer


def requests(kind: str) -> list[Instance]:
    if kind == "loglikelihood_rolling":
        return [Instance(kind, {}, (TEXT,), 0, ("x", 0, 1))]
    return [Instance(kind, {}, ("the quick", each), i, ("x", 0, 1)) for i, each in enumerate([" brown fox", " lazy"])]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
@pytest.mark.parametrize("pair", OTHERS, indirect=True)
def test_a_model_that_is_not_causal_is_refused_with_the_class_that_is_right(pair, kind):
    """A family that comes later falls under it: it is said by `config.causal` and where every `forward` begins."""
    model, tokenizer = pair
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="is not causal, so lm-eval's .* use --model prime_v2, .*:PrimeV2LM"):
        getattr(lm, kind)(requests(kind), disable_tqdm=True)


@pytest.mark.parametrize("pair", OTHERS, indirect=True)
def test_its_folder_is_refused_too_with_the_code_in_it(pair, tmp_path):
    """By the model, or before: AutoModelForCausalLM need not know it."""
    for each in pair:
        each.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="is not causal, so lm-eval's|for this kind of AutoModel: AutoModelForCausalLM"
    ):
        HFLM(str(tmp_path / "model"), device="cpu", trust_remote_code=True).loglikelihood(requests("loglikelihood"))


@pytest.mark.parametrize("pair", OTHERS, indirect=True)
def test_elsewhere_the_same_model_answers_while_lm_eval_is_loaded(pair):
    model, tokenizer = pair
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    options = {"times": torch.zeros(1)} if model.config.model_type == "prime_v2_uniform" else {}
    with torch.no_grad():
        assert model(ids, **options).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    scores = PrimeV2LM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests("loglikelihood"), True)
    assert all(value < 0 for value, _ in scores)


@pytest.mark.parametrize("pair", CAUSAL, indirect=True)
def test_a_causal_model_has_the_same_likelihood_of_whole_texts_there(pair):
    """To 1e-4 nats: both are float32."""
    model, tokenizer = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (theirs,) = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu").loglikelihood_rolling(
            requests("loglikelihood_rolling"), disable_tqdm=True
        )
    (ours,) = PrimeV2LM(pretrained=model, tokenizer=tokenizer).loglikelihood_rolling(
        requests("loglikelihood_rolling"), True
    )
    assert theirs == pytest.approx(ours, abs=1e-4)


@pytest.mark.parametrize("pair", CAUSAL, indirect=True)
def test_a_causal_model_is_given_no_start_token_before_a_context_there(pair):
    """HFLM scores log p(answer | context) of a text that begins in mid-air; ours begins as in training."""
    model, tokenizer = pair
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu").loglikelihood(requests("loglikelihood"), True)
    ours = PrimeV2LM(pretrained=model, tokenizer=tokenizer).loglikelihood(requests("loglikelihood"), True)
    for request, (their_value, _), (our_value, _) in zip(requests("loglikelihood"), theirs, ours, strict=True):
        context, text = (tokenizer(each).input_ids for each in (request.args[0], "".join(request.args)))
        for start, value in (([], their_value), ([0], our_value)):
            ids = torch.tensor([[*start, *text]])
            with torch.no_grad():
                log_probs = model(ids).logits.log_softmax(-1)[0]
            known = len(start) + len(context)
            expected = log_probs[known - 1 : -1].gather(-1, ids[0, known:, None]).sum()
            assert value == pytest.approx(float(expected), abs=1e-4)  # float32
