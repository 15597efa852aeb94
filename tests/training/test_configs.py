"""Every recipe under configs/: its options exist, its model is valid, and the published grid is the published one."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from prime_v2 import PrimeV2Config, PrimeV2ForMaskedDiffusion

ROOT = Path(__file__).parents[2]
VOCABULARY = {"gpt2": 50257, "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 32000}
FROM_TOKENIZER = {"vocab_size", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"}

# The published runs as their scripts are named, NAME_param_{N}M_iter_{STEPS}.sh: N in millions to steps. The file of
# the largest MDM-Prime-v2 run says 18000, but the script in it sets 14000.
PUBLISHED_STEPS = {
    "mdm": {
        14: 70000, 25: 80000, 36: 90000, 49: 40000, 64: 50000, 79: 125000, 106: 180000, 154: 125000, 201: 160000,
        252: 380000, 354: 270000, 413: 240000, 571: 170000, 771: 125000, 1107: 87500, 1529: 32000, 2359: 21000,
        3426: 18000,
    },
    "prime_v2": {
        14: 70000, 25: 80000, 36: 90000, 49: 70000, 64: 50000, 79: 125000, 106: 180000, 154: 125000, 201: 160000,
        252: 380000, 354: 270000, 413: 240000, 571: 170000, 771: 125000, 1107: 87500, 1529: 32000, 2359: 21000,
        3426: 14000,
    },
}  # fmt: skip
# Tokens, in billions, at the published isoFLOP point with the most tokens of each MDM size, budget / (6 N): a run must
# reach its last point, and these end within 5% of it (154M and 3426M go on for longer).
LAST_POINT = {
    14: 35.714, 25: 40.0, 36: 46.296, 49: 20.408, 64: 26.042, 79: 63.291, 106: 94.340, 201: 82.919, 252: 198.41,
    354: 141.24, 413: 121.07, 571: 87.566, 771: 64.851, 1107: 45.167, 1529: 32.701, 2359: 21.195,
}  # fmt: skip


def recipes() -> dict[str, dict[str, Any]]:
    """All recipes as train.py names them: a file, or FILE.yaml:NAME for an entry of a file that holds several."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        name, content = path.relative_to(ROOT).as_posix(), yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem in ("demo", "published", "tree"):
            found |= {f"{name}:{key}": entry for key, entry in content.items() if not key.startswith(".")}
        else:
            found[name] = content
    return found


RECIPES = recipes()


def options_of_train() -> set[str]:
    """The fields of RunOptions, read from its source: importing it would load what is not needed here."""
    tree = ast.parse((ROOT / "training" / "options.py").read_text(encoding="utf-8"))
    (options,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RunOptions")
    return {node.target.id for node in options.body if isinstance(node, ast.AnnAssign)}


def config_of(options: dict[str, Any]) -> PrimeV2Config:
    """The model's config as train.py makes it, with the tokenizer's vocabulary from the table above."""
    vocab_size = VOCABULARY.get(options["tokenizer"]) or options["bpe_vocab_size"]
    return PrimeV2Config(
        **{"vocab_size": vocab_size, "max_position_embeddings": options["block_size"], **options["model"]}
    )


def non_embedding_parameters(config: PrimeV2Config) -> int:
    with torch.device("meta"):
        model = PrimeV2ForMaskedDiffusion(config)
    names = [name for name, _ in model.named_parameters()]
    assert {"model.embed_subtokens.table.weight", "lm_head.weight"} <= set(names)
    return sum(each.numel() for name, each in model.named_parameters() if "layers" in name or "norm" in name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_holds_only_known_options_of_the_right_type(name: str, tmp_path: Path):
    options = dict(RECIPES[name])
    model = options.pop("model", {})  # a fine-tuning has that of the folder that it starts from
    run_options = options_of_train()
    training = {key: value for key, value in options.items() if key not in run_options}
    assert set(training) <= {each.name for each in dataclasses.fields(TrainingArguments)}
    assert set(model) <= {each.name for each in dataclasses.fields(PrimeV2Config)} - FROM_TOKENIZER
    # YAML reads 2e-4, without a point, as text.
    assert [key for key, value in training.items() if isinstance(value, str)] in ([], ["lr_scheduler_type"])
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **training)


OF_THE_STUDY = {
    "tree.yaml:token": ("study_1e12", "MDM, tree embedding"),
    "tree.yaml:nested": ("study_1e12", "nested 6-11"),
    "tree.yaml:coarse_first": ("study_orders", "coarse-first, trained nested"),
    "demo.yaml:coarse_first": ("study_orders", "coarse-first, trained nested"),
    "demo.yaml:published": ("study_1e12", "MDM-Prime-v2"),
}


@pytest.mark.parametrize("name", OF_THE_STUDY)
def test_recipes_of_the_trees_and_the_demo_have_the_settings_of_the_study(name: str):
    """All but text, sizes and, in the larger network of tree.yaml, the rate."""
    recipe, run_name = OF_THE_STUDY[name]
    study = yaml.safe_load((ROOT / "configs" / "compare" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    run, options = study["runs"][run_name], RECIPES[f"configs/{name}"]
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads"}
    model = study["train"].pop("model") | run["model"]
    assert {key: options["model"][key] for key in options["model"].keys() - sizes} == {
        key: model[key] for key in model.keys() - sizes
    }
    others = {"data", "eval_sequences", "test_sequences", "sampler_passes"}
    chosen = study["train"] | run["train"]
    chosen |= {"learning_rate": 1e-3} if name.startswith("tree") else {}
    assert {key: options.get(key) for key in chosen.keys() - others} == {
        key: chosen[key] for key in chosen.keys() - others
    }


@pytest.mark.parametrize("name", [name for name, options in RECIPES.items() if "model" in options])
def test_recipe_makes_a_valid_model(name: str):
    options = RECIPES[name]
    config_of(options)  # raises for an impossible combination
    assert options["global_batch"] % options["per_device_train_batch_size"] == 0


def published() -> list[tuple[str, int, dict[str, Any]]]:
    entries = []
    for name, options in RECIPES.items():
        if name.startswith("configs/published.yaml:"):
            family, _, size = name.partition(":")[2].rpartition("_")
            entries.append((family, int(size.removesuffix("m")), options))
    return entries


def test_published_grid_holds_the_published_runs():
    steps = {family: {} for family in PUBLISHED_STEPS}
    for family, size, options in published():
        steps[family][size] = options["max_steps"]
    assert steps == PUBLISHED_STEPS


@pytest.mark.parametrize(("family", "size", "options"), published())
def test_published_shape_has_the_size_of_its_name(family: str, size: int, options: dict[str, Any]):
    """The published N is 12 D^2 layers, although SwiGLU of width 4 D makes a layer 16 D^2."""
    config = config_of(options)
    width, layers = config.hidden_size, config.num_hidden_layers
    assert round(12 * width**2 * layers / 1e6) == size
    assert config.intermediate_size == 4 * width
    assert config.head_dim == {154: 56}.get(size, 64 if size < 300 else 128)
    assert (config.num_subtokens, config.base) == ({"mdm": 1, "prime_v2": 16}[family], {"mdm": 50257}.get(family, 2))
    tokens = options["max_steps"] * options["global_batch"] * options["block_size"] / 1e9
    if family == "mdm" and size in LAST_POINT:
        assert 0.95 * tokens < LAST_POINT[size] <= tokens


def test_layer_of_the_published_shape_has_16_d_squared_weights():
    config = config_of(RECIPES["configs/published.yaml:prime_v2_14m"])
    width, layers = config.hidden_size, config.num_hidden_layers
    norms = (2 * layers + 1) * width + 2 * layers * config.head_dim
    assert non_embedding_parameters(config) == 16 * width**2 * layers + norms


def test_slimpajama_model_has_the_published_number_of_parameters():
    """The official training script counts 1027.677952 million without embedding and head, and so the steps."""
    options = RECIPES["configs/slimpajama_1b.yaml"]
    assert non_embedding_parameters(config_of(options)) == 1_027_677_952
    mean_length = 2048 * (1 - options["short_share"]) + (1 + 2048) / 2 * options["short_share"]
    assert options["max_steps"] == int(3300e18 / (6 * 1_027_677_952 * options["global_batch"] * mean_length))


def test_openwebtext_model_has_the_weights_of_the_published_shape():
    """12 layers of width 768 with 12 D^2 weights each, as attention and an MLP of width 4 D with two matrices have."""
    config = config_of(RECIPES["configs/owt.yaml"])
    norms = (2 * 12 + 1) * 768
    assert non_embedding_parameters(config) == 12 * 12 * 768**2 + norms
