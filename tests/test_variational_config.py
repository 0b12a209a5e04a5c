"""Objectives without a reference: which keys they read, and what is refused beside them."""

from __future__ import annotations

import pytest

from raylign.config import load_config
from raylign.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft", "train.beta=0.1"], r"train\.beta is set but has no effect"),
        (["ava_p", "train.beta=0.1"], r"train\.beta is set but has no effect"),
        (["ava_p", "train.ipo_tau=0.1"], r"train\.ipo_tau is set but has no effect"),
        (["sft", "ava.discount=0.9"], r"ava\.discount is set but has no effect"),
        (["sft", "confidence.alpha=2"], r"confidence\.alpha is set but has no effect"),
        (["ava_p", "confidence.source=live"], r"confidence\.source is set but has no effect"),
        (["ava_d", "ava.cer_weight=2"], r"ava\.cer_weight is set but has no effect"),
        (["ava_d", "ava.negative=raw"], r"ava\.negative is set but has no effect"),
        (["ava_p", "ava.irl_weight=0", "ava.discount=0.9"], r"ava\.discount is set but has no effect"),
        (["ava_p", "constraint.kind=rectified"], r"constraint\.kind is set but has no effect"),
        (["ava_p", "ava.q_from=q_head"], r"ava\.q_from=q_head is a reward model's.*use logits or probs"),
        (["ava_d", "ava.td_weight=1"], r"ava\.td_weight=1 outweighs the KL"),
        (["ava_p", "train.method=online_dpo"], r"train\.objective=ava_p reads stored pairs"),
        (["sft", "train.method=online_dpo"], r"train\.objective=sft reads stored pairs"),
    ],
)
def test_what_does_not_fit_an_objective_is_refused(overrides: list[str], message: str) -> None:
    objective, *others = overrides
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[f"train.objective={objective}", *others])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ava.q_from=probs"], r"ava\.q_from=probs and ava\.logit_scale=1 would sum what is no log-probability"),
        (["ava.logit_scale=4"], r"ava\.logit_scale=4 would sum what is no log-probability"),
        (["train.method=online_dpo", "reward.num_heads=3", "robust.rule=brme"], r"robust\.rule=brme needs a sigma"),
        (["train.method=policy_gradient", "policy_gradient.credit=token"], r"policy_gradient\.credit=sequence"),
    ],
)
def test_log_probabilities_as_a_score_are_refused_where_they_are_none(overrides: list[str], message: str) -> None:
    scored = ["reward.kind=ava_p", "token_reward.score=log_prob"]
    assert load_config(overrides=scored).token_reward.score == "log_prob"
    assert load_config(overrides=[*scored, "ava.q_from=q_head", "ava.logit_scale=4"]).ava.logit_scale == 4
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[*scored, *overrides])


def test_what_fits_is_taken() -> None:
    ava = ["train.objective=ava_p", "ava.q_from=probs", "ava.logit_scale=20", "ava.negative=raw", "ava.cer=sigmoid"]
    assert load_config(overrides=ava).ava.logit_scale == 20
    # the section of a reward model is read beside any objective
    assert (
        load_config(overrides=["train.objective=sft", "reward.kind=ava_p", "ava.q_from=q_head"]).ava.q_from == "q_head"
    )
    accepted = ["train.objective=ava_d", "ava.td_weight=1.5", "ava.sigma_floor=0.1"]
    assert load_config(overrides=accepted).ava.td_weight == 1.5
