"""Models of every family and in every form, and a Llama of the same shape, to which tests attach what others write."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from prime_v2.families import FAMILIES

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Fields of a configuration: every family with and without tied weights, and the ways in which tokens are embedded.
FIELDS = {name: {} for name in FAMILIES}
FIELDS |= {f"{name}, digits": {"num_subtokens": 5} for name, each in FAMILIES.items() if each.digits}
FIELDS |= {f"{case}, tied": fields | {"tie_word_embeddings": True} for case, fields in FIELDS.items()}
FIELDS["prime, nested"] = {
    "num_subtokens": 5,
    "reveal_order": "nested",
    "stage_digits": [2, 5],
    "subtoken_embedding": "ancestors",
    "head_ancestors": True,
}
FIELDS["prime, coarse-first"] = {"num_subtokens": 5, "reveal_order": "coarse_first", "stage_digits": [2, 5]}
FIELDS["prime, head in stages"] = {
    "num_subtokens": 5,
    "reveal_order": "coarse_first",
    "stage_digits": [2, 5],
    "head": "stages",
}
FIELDS["interpolating, tree"] = {"num_subtokens": 5, "subtoken_embedding": "ancestors", "head": "stages"}
UNTIED = [case for case in FIELDS if "tied" not in case]


def network(case: str):
    """A random model of a family, or Llama."""
    torch.manual_seed(0)
    if case == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    family = FAMILIES[case.split(",")[0]]
    defaults = {"num_subtokens": 1} if family.digits else {}
    return family.model_class(family.config_class(**SHAPE | defaults | FIELDS[case])).eval()


def some_ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 30, (rows, 8), generator=torch.Generator().manual_seed(1))


def loss_of(model) -> torch.Tensor:
    """The training loss, with the same noise in each call."""
    torch.manual_seed(1)
    return model(input_ids=some_ids(), labels=some_ids()).loss


def value_of(model) -> torch.Tensor:
    if isinstance(model, LlamaForCausalLM):
        return loss_of(model).detach()
    return model.log_likelihood(some_ids(), num_samples=4).value


def train(case: str, folder: Path, **options) -> float:
    """The loss of a step of a plain Trainer, SGD without a learning rate."""
    data = [{"input_ids": each, "labels": each} for each in some_ids(4)]
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=4, report_to="none", save_strategy="no", use_cpu=True,
        disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    return Trainer(network(case), arguments, train_dataset=data).train().training_loss
