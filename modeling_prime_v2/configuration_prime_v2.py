"""Configuration of an MDM-Prime-v2 network."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_backbone_prime_v2 import PrimeV2CodedConfig
from .diffusion_prime_v2 import KINDS, STAGED
from .validation_keywords_prime_v2 import one_of

MODEL_CLASS = "modeling_prime_v2.PrimeV2ForMaskedDiffusion"
CHOICES = {
    "objective": ("joint", "marginal"),
    "loss_weight": ("elbo", "low_variance"),
    "noise_form": ("count", "time"),
    "reveal_order": KINDS,
}
# As output/records.py has them for records: neither imports the other.
EARLIER_OBJECTIVES = {"token": "joint", "subtoken": "marginal"}


@strict
class PrimeV2Config(PrimeV2CodedConfig):
    """Shape, code table and objective of an MDM-Prime-v2 network (arXiv:2603.16077).

    Args:
        vocab_size: V, the number of tokens that can be predicted. The mask token has the id V.
        num_subtokens: S, the digits of a token (the paper's l); None means ceil(log_base V). 1 is plain MDM.
        subtoken_embedding: also "ancestors", for every reveal_order but "digit": a vector for each node of the code
            tree at the stages' ends, and of a state the sum of those from the root to its node.
        tree_levels: digit counts at which "ancestors" has vectors, the stages' ends among them; None is those ends.
        head_ancestors: a token's row of the head is the sum of its own and one for each of its nodes at tree_levels.
        carry_over: filter the tokens that contradict a visible digit out of the softmax.
        objective: "joint", the paper's loss -log q(x_i) (no bound on the likelihood for S > 1), or "marginal", the
            negative evidence lower bound of the training order from the marginals of the digits.
        loss_weight: "elbo" or "low_variance" (weight 1, no bound).
        noise_form: "count" (hide k of n units, k uniform) or "time" (hide each unit with probability t, t uniform).
        reveal_order: the unit that is hidden and revealed: each "digit" (published), the whole "token", or stages of
            leading digits that end at the counts in `stage_digits`, e.g. [6, 11]. Stages of all tokens are revealed in
            any order ("nested"), first stages of all tokens first ("coarse_first"), or each stage within its window of
            time ("windows", e.g. stage_windows=[[0, 0.8], [0.2, 1]]); of equal windows that is "nested".
        training_order: the order of the training loss's noise, where that is not `reveal_order`, which bounds and
            samplers take; both must be orders of stages. "nested" draws the states of all three, though those of
            "coarse_first" rarely; a network that never saw the states of `reveal_order` has a poor bound.
        whole_token_above: hide whole tokens when the masked share exceeds this (the published 1.1B recipe uses 0.5).
        mask_token_id: always `vocab_size`.
        The other fields are those of `PrimeV2CodedConfig` and `PrimeV2BackboneConfig`.

    Raises `StrictDataclassClassValidationError` (a ValueError's text inside) for impossible combinations.
    """

    model_type = "prime_v2"
    carry_over: bool = True
    objective: str = "joint"
    loss_weight: str = "elbo"
    noise_form: str = "count"
    reveal_order: str = "digit"
    training_order: str | None = None
    stage_digits: list[int] | None = None
    stage_windows: list[list[int | float]] | None = None
    head_ancestors: bool = False
    whole_token_above: int | float | None = None
    mask_token_id: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """As in the class above; saved folders may hold the earlier names of `objective`."""
        saved = config_dict.get("objective")
        if isinstance(saved, str):
            config_dict = {**config_dict, "objective": EARLIER_OBJECTIVES.get(saved, saved)}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        if self.auto_map is None:
            self.auto_map = {
                "AutoConfig": "configuration_prime_v2.PrimeV2Config",
                "AutoModel": MODEL_CLASS,
                "AutoModelForMaskedLM": MODEL_CLASS,
            }
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: refuse every impossible combination by name, value and a value that works."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        super().validate_architecture()
        self._check_objective()
        self._check_training_order()
        self._check_stages()
        self._check_embedding()
        self.check_head()

    def _check_objective(self):
        if self.whole_token_above is not None:
            if not 0 <= self.whole_token_above <= 1:
                raise ValueError(f"whole_token_above={self.whole_token_above} is outside [0, 1]; use 0.5 or None")
            if self.reveal_order != "digit":
                raise ValueError(
                    f"whole_token_above={self.whole_token_above} needs reveal_order='digit', "
                    f"not {self.reveal_order!r}; leave it out"
                )

    def _check_stages(self):
        if (self.reveal_order in STAGED) != (self.stage_digits is not None):
            staged = self.reveal_order if self.reveal_order in STAGED else STAGED[0]
            raise ValueError(
                f"reveal_order={self.reveal_order!r} with stage_digits={self.stage_digits}: {', '.join(STAGED)} need "
                f"the digit counts at which their stages end, the others take none; use e.g. reveal_order={staged!r} "
                f"and stage_digits=[{(self.num_subtokens + 1) // 2}, {self.num_subtokens}]"
            )
        if self.stage_digits is not None:
            stages = [0, *self.stage_digits]
            rising = all(a < b for a, b in zip(stages, stages[1:], strict=False))
            if not rising or stages[-1] != self.num_subtokens:
                raise ValueError(
                    f"stage_digits={self.stage_digits} must rise from at least 1 to num_subtokens="
                    f"{self.num_subtokens}; use e.g. [{self.num_subtokens}]"
                )
        self._check_windows()

    def _check_training_order(self):
        if self.training_order is None:
            return
        one_of(f"training_order={self.training_order!r}", self.training_order, STAGED)
        if self.reveal_order not in STAGED:
            raise ValueError(
                f"training_order={self.training_order!r} with reveal_order={self.reveal_order!r}, which has no "
                f"stages; use e.g. reveal_order='coarse_first', or leave training_order out"
            )

    def _check_windows(self):
        windows, stages = self.stage_windows, len(self.stage_digits or ())
        if ("windows" in (self.reveal_order, self.training_order)) != (windows is not None):
            field = "training_order" if self.training_order == "windows" else "reveal_order"
            raise ValueError(
                f"{field}={getattr(self, field)!r} with stage_windows={windows}: 'windows' needs them, the others "
                f"take none; use e.g. {field}='windows' and stage_windows={[[0, 1]] * max(1, stages)}"
            )
        if windows is None:
            return
        if len(windows) != stages or not all(len(each) == 2 and 0 <= each[0] < each[1] <= 1 for each in windows):
            raise ValueError(
                f"stage_windows={windows} must have a pair [a, b] with 0 <= a < b <= 1 for each of {stages} stages; "
                f"use e.g. {[[0, 1]] * stages}"
            )

    @property
    def order_ends(self) -> tuple[int, ...]:
        return tuple(self.stage_digits or ())

    def _check_embedding(self):
        form = self.subtoken_embedding
        if self.tree_levels is not None:
            self.check_ends("tree_levels")
            if form != "ancestors" and not self.head_ancestors:
                raise ValueError(
                    f"tree_levels={self.tree_levels} is for subtoken_embedding='ancestors' and head_ancestors=true; "
                    f"leave it out"
                )
        if self.head_ancestors and len(self.levels) < 2:
            raise ValueError(
                f"head_ancestors=True needs a level above the tokens, but there is {list(self.levels)}; use e.g. "
                f"tree_levels=[{(self.num_subtokens + 1) // 2}, {self.num_subtokens}]"
            )
        if self.head_ancestors and self.tie_word_embeddings:
            raise ValueError("head_ancestors=True with tie_word_embeddings=True: a tied head has no rows of its own")
        if form == "ancestors":
            self._check_ancestors()

    def _check_ancestors(self):
        if self.reveal_order == "digit":
            raise ValueError(
                "subtoken_embedding='ancestors' has vectors for leading digits only, but reveal_order='digit' shows "
                "any digits; use reveal_order='nested' or 'token', or subtoken_embedding='sum'"
            )
        self.check_nodes("subtoken_embedding='ancestors'", (0, *self.levels))

    def check_head(self):
        super().check_head()
        if self.head == "full":
            return
        if self.reveal_order == "digit" and self.num_subtokens > 1:
            raise ValueError(
                "head='stages' predicts leading digits first, but reveal_order='digit' shows any digits; use "
                "reveal_order='nested', 'coarse_first' or 'token', or head='full'"
            )
        if self.head_ancestors:
            raise ValueError(
                "head='stages' with head_ancestors=True: a stage has its own row for each node; leave it out"
            )
        if not self.carry_over:
            raise ValueError("head='stages' with carry_over=False: it predicts within what is visible; use True")


# So that save_pretrained copies this file and those it imports into the folder.
PrimeV2Config.register_for_auto_class()
