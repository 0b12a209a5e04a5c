"""The sections of a configuration about rewards of tokens. No torch, no ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from raylign.config_sections import Section


class TokenRewardSection(Section):
    """How rewards of tokens become that of a response, and what each token gets where tokens train a policy."""

    score: Literal["last", "sum", "mean", "log_prob"] = Field(
        "last",
        description="reward of a response: of its last token, of all tokens, their mean, or the log-probability that "
        "the reward model's own policy gives it (ava_p, ava_d); token_bt is trained on it",
    )
    credit: Literal["own", "differences", "attention"] = Field(
        "own",
        description="reward of a token: its own, the change of the score with it (RED, arXiv:2411.08302), or the "
        "score's share by the last token's attention (ABC, arXiv:2402.00782); read by policy_gradient.credit=token",
    )
    dense_weight: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of that credit against the score at the last token; unless set, 0.5 for attention",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_weight(cls, values: Any) -> Any:
        """The published share of the credit, unless it was given."""
        if isinstance(values, Mapping) and values.get("credit") == "attention":
            return {"dense_weight": 0.5, **values}
        return values


class AvaSection(Section):
    """Approximate variational alignment (arXiv:2411.09341), as a reward model or as the objective of the trainer."""

    td_weight: float = Field(
        0.5, ge=0, description="weight of log N(TD error; mu, sigma^2); from 1 on sigma collapses to its floor"
    )
    discount: float = Field(0.95, ge=0, le=1, description="of the value of the next token in the TD error")
    logit_scale: float = Field(1.0, gt=0, description="factor of logits or probabilities before the softmax of q")
    likelihood_weight: float = Field(1.0, ge=0, description="weight of the tokens' log-likelihood")
    irl_weight: float = Field(0.1, ge=0, description="weight of KL and TD terms together; 0 leaves inverse RL out")
    cer_weight: float = Field(1.0, ge=0, description="weight of the contrastive expected return (ava_p); 0 drops it")
    cer: Literal["log_sigmoid", "sigmoid"] = Field(
        "log_sigmoid", description="form of that term; sigmoid is printed, and ignores pairs that are badly ranked"
    )
    q_from: Literal["logits", "probs", "q_head"] = Field(
        "logits",
        description="q of a token: log softmax of the policy's logits, of its probabilities (as printed), or an output "
        "of its own (a reward model's)",
    )
    negative: Literal["unlikelihood", "raw", "none"] = Field(
        "unlikelihood", description="term of rejected tokens: log(1 - p), bounded; -q as printed, unbounded; or none"
    )
    terminal: Literal["zero", "drop"] = Field(
        "zero", description="the last token's next value is 0, or its TD error is left out, as AVRIL does"
    )
    standardize_td: bool = Field(True, description="divide TD errors by their running deviation; the prior is N(0, 1)")
    detach_q: bool = Field(False, description="keep the gradient of the TD term from q, hence from the policy")
    head_learning_rate: float = Field(
        1e-3, gt=0, description="AdamW step of the new reward head beside a trained policy (train.objective)"
    )
    sigma_floor: float = Field(1e-2, ge=0, description="smallest standard deviation of a token's reward")
