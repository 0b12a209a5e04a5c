"""The section of a configuration that chooses what prices responses. No torch, no ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raylign.config_sections import Section


class CostModelSection(Section):
    """What says how unsafe a response is, cost > 0 unsafe: heads on hidden states, or a safety classifier of yours."""

    source: Literal["auto", "labels", "embedded", "external"] = Field(
        "auto",
        description="heads fitted to the safety verdicts of your pairs, the head that ships for the embedded model, or "
        "a classifier of texts; auto is embedded for the embedded model, else labels, once a constraint reads costs; "
        "the others give costs to look at without a constraint too",
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
    num_heads: int = Field(1, ge=1, description="heads, each fitted to a bootstrap sample; the cost is their mean")
    folds: int = Field(
        5, ge=1, description="each pair is priced by what was fitted on the other folds, 1 by what saw it"
    )
    max_pairs: int = Field(20_000, ge=8, description="pairs with verdicts that heads are fitted on; bounds memory")
    epochs: int = Field(10, ge=0, description="passes over the pairs after the ridge start")
    batch_size: int = Field(32, ge=1, description="pairs of one step")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW step")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay")
    ridge: float = Field(1.0, gt=0, description="penalty of the ridge start, per pair")
    regularization: float = Field(1e-3, ge=0, description="weight of the squared cost in the loss")
