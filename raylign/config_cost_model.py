"""The section of a configuration that chooses what prices responses. No torch, no ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raylign.config_sections import Section


class CostModelSection(Section):
    """What says how unsafe a response is, cost > 0 unsafe: heads, the policy fine-tuned, or a classifier of yours."""

    source: Literal["auto", "labels", "fine_tuned", "embedded", "external"] = Field(
        "auto",
        description="from the safety verdicts of your pairs heads on cached states (labels) or LoRA members of the "
        "policy (fine_tuned), the head that ships for the embedded model, or a classifier of texts; auto is embedded "
        "for the embedded model, else labels, once a constraint reads costs; the others give costs to look at without "
        "a constraint too",
    )
    model: str | None = Field(None, description="HF sequence classifier (directory or hub id), source external")
    label: str | None = Field(
        None, description="its output that means unsafe; unless set, all whose names say so; one output is the cost"
    )
    batch_tokens: int = Field(4096, ge=64, description="token budget of one forward of the classifier")
    pair_order: Literal["verdicts", "chosen"] = Field(
        "verdicts",
        description="which answer of a pair is safer: known where verdicts differ, or always the chosen one elsewhere",
    )
    num_heads: int = Field(
        1, ge=1, description="heads or members, several each fitted to a bootstrap sample; the cost is their mean"
    )
    folds: int = Field(
        5,
        ge=1,
        description="each pair is priced by what was fitted on the other folds, 1 by what saw it; unless set, 2 for "
        "fine_tuned",
    )
    max_pairs: int = Field(20_000, ge=8, description="pairs with verdicts that are fitted to; bounds memory")
    lora_rank: int = Field(8, ge=1, description="rank of a member's adapter")
    lora_alpha: int = Field(16, ge=1, description="scale of the adapter is lora_alpha / lora_rank")
    epochs: int = Field(
        10, ge=0, description="passes over the pairs, of heads after the ridge start; unless set, 1 for fine_tuned"
    )
    batch_size: int = Field(32, ge=1, description="pairs of one step; unless set, 16 for fine_tuned")
    learning_rate: float = Field(
        1e-4, gt=0, description="AdamW step, of members the peak before a linear decay; unless set, 1e-3 for fine_tuned"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    ridge: float = Field(1.0, gt=0, description="penalty of the ridge start, per pair")
    regularization: float = Field(1e-3, ge=0, description="weight of the squared cost in the loss")


# What suits members: fits take long, and a second pass over the pairs makes costs overconfident.
FINE_TUNED_DEFAULTS = {"folds": 2, "epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
FINE_TUNED_KEYS = ("lora_rank", "lora_alpha")  # of members alone
