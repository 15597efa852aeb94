"""`--stage_passes`: checked with the options, saved with the model, and what `generate` and its law then do."""

import json

import pytest
import torch
from tiny_runs import MODEL, TINY, write_text

from prime_v2.eval.loading import load_model_and_tokenizer
from prime_v2.generation_config_prime_v2 import PrimeV2GenerationConfig
from prime_v2.samplers_prime_v2 import AncestralSamplerConfig
from prime_v2.training import run as training
from prime_v2.training.options import RaisingParser, parse_options

COARSE = ["reveal_order=coarse_first", "stage_digits=[3,9]", "num_subtokens=9", "objective=joint"]


def law(model, ids, shares=None) -> torch.Tensor:
    """Of ancestral sampling in four passes."""
    sampler = None if shares is None else AncestralSamplerConfig(stage_passes=shares)
    config = PrimeV2GenerationConfig(max_denoising_steps=4, sampler_config=sampler)
    options = {"method": "sampler", "num_samples": 2, "seed": 5}
    return model.log_likelihood(ids, generation_config=config, **options).value


def test_a_model_keeps_the_shares_that_it_was_trained_with(tmp_path):
    text, folder = write_text(tmp_path / "text.jsonl"), tmp_path / "run"
    arguments = ["--data", str(text), "--output_dir", str(folder), "--stage_passes", "0.75", "0.25", *TINY.split()]
    assert training.main([*arguments, "--sampler_passes", "4", *MODEL, *COARSE]) == 0
    saved = json.loads((folder / "generation_config.json").read_text())["sampler_config"]
    assert saved == {"_cls_name": "AncestralSamplerConfig", "stage_passes": [0.75, 0.25]}
    model, _ = load_model_and_tokenizer(str(folder))
    ids = torch.randint(300, (4, 16), generator=torch.Generator().manual_seed(0))
    own = law(model, ids)
    assert torch.equal(own, law(model, ids, (0.75, 0.25)))
    assert not torch.allclose(own, law(model, ids, (0.5, 0.5)))
    # A decode without draws puts the saved sampler, which draws, aside.
    greedy = model.generate(ids[:1, :4], do_sample=False, max_new_tokens=4)
    assert torch.equal(greedy, model.generate(ids[:1, :4], do_sample=False, max_new_tokens=4))
    model.generation_config.sampler_config = None
    assert torch.equal(greedy, model.generate(ids[:1, :4], do_sample=False, max_new_tokens=4))


def test_a_run_that_goes_on_from_a_model_may_change_its_orders(tmp_path):
    """The shares of passes stay with the order that they are of, and go with it."""
    text, folder = write_text(tmp_path / "text.jsonl"), tmp_path / "run"
    arguments = ["--data", str(text), *TINY.split()]
    coarse = [*arguments, "--output_dir", str(folder), "--stage_passes", "0.75", "0.25", *MODEL, *COARSE]
    assert training.main(coarse) == 0
    for name, fields in (("mixed", ["training_order=nested"]), ("nested", ["reveal_order=nested"])):
        options = ["--init_from", str(folder), "--output_dir", str(tmp_path / name), "--model", *fields]
        assert training.main([*arguments, *options]) == 0
        model, _ = load_model_and_tokenizer(str(tmp_path / name))
        assert model.generate(max_new_tokens=4, seed=0).shape[1] >= 4
        kept = model.generation_config.sampler_config
        assert (kept is None) == (name == "nested")
        assert model.config.to_dict().items() >= dict(each.split("=") for each in fields).items()


@pytest.mark.parametrize(
    ("shares", "model", "message"),
    [
        ("0.5 0.6", COARSE, "--stage_passes 0.5 0.6 must be shares above 0 that add up to 1; use 0.75 0.25"),
        ("0.5 0.25 0.25", COARSE, "has 3 shares for 2 stages; give one for each"),
        ("0.75 0.25", [], "is for models with reveal_order=coarse_first; leave it out"),
        ("much", COARSE, "invalid float value: 'much'"),
    ],
)
def test_shares_that_the_model_has_not_are_refused_before_anything_is_read(shares, model, message):
    arguments = ["--stage_passes", *shares.split(), *MODEL, *model]
    with pytest.raises(ValueError, match=message):
        parse_options(arguments, parser_class=RaisingParser)
