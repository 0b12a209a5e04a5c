"""What is particular to members that reward tokens, where they are fitted: start, objective, and what is said of them.

Shape letters: N pairs or, of tokens, response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from raylign.config_effects import AVA
from raylign.models.classifiers import add_adapters
from raylign.models.loading import load_policy
from raylign.models.numerics import actor_device
from raylign.models.token_forward import TokenForm, TokenHeads, TokenOutputs, TokenRewardForward
from raylign.models.token_reward import read_pairs, response_scores
from raylign.rewards.gaussian import share_at_floor
from raylign.runtime.text_rewards import tokens_on_device, weights_type
from raylign.training.token_objective import AvaObjective, BradleyTerryTokens, record_dicts
from raylign.types import TokenizedPair

if TYPE_CHECKING:
    from raylign.config import AvaSection
    from raylign.runtime.text_reward_job import FitTask


def token_form(kind: str, ava: AvaSection) -> TokenForm:
    """What members of a kind say of a token."""
    if kind not in AVA:
        return TokenForm(q_from=None)
    return TokenForm(q_from=ava.q_from, logit_scale=ava.logit_scale, sigma_floor=ava.sigma_floor)


def kind_facts(task: FitTask) -> dict[str, Any]:
    """What `text_reward.json` says of members that reward tokens, for those who load them."""
    return {"score": task.token_reward.score, "form": asdict(token_form(task.reward.kind, task.ava))}


def start_tokens(task: FitTask, members: Sequence[int]) -> tuple[TokenRewardForward, list[str | None]]:
    """Fresh members where they train; they are not averaged, so that no start has a hash.

    Args:
        task: of the fit.
        members: numbers of the members.
    """
    form = token_form(task.reward.kind, task.ava)
    model = load_policy(
        task.model_path,
        dtype=weights_type(task.policy, actor_device(task.num_gpus)),
        trust_remote_code=task.policy.trust_remote_code,
        gradient_checkpointing=task.policy.gradient_checkpointing,
    )
    vocab_size, width = model.get_output_embeddings().weight.shape
    names = [task.names[member] for member in members]
    seeds = [member_seed(task.seed, member) for member in members]
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    heads = {
        name: TokenHeads(width, vocab_size, form, seed=seed, std=std) for name, seed in zip(names, seeds, strict=True)
    }
    peft_model = add_adapters(
        model,
        names,
        rank=task.reward_model.lora_rank,
        alpha=task.reward_model.lora_alpha,
        seeds=seeds,
        task_type="CAUSAL_LM",
    )
    return tokens_on_device(peft_model, heads, form, task.policy, task.num_gpus), [None] * len(members)


def token_objective(task: FitTask) -> AvaObjective | BradleyTerryTokens:
    """What members of `reward.kind` learn from."""
    if task.reward.kind in AVA:
        return AvaObjective(task.ava, has_rejected=task.reward.kind == "ava_p")
    assert task.token_reward.score != "log_prob"  # refused by the configuration
    return BradleyTerryTokens(task.token_reward.score)


def judge_tokens(
    forward: TokenRewardForward,
    pairs: Sequence[TokenizedPair],
    task: FitTask,
    objective: AvaObjective | BradleyTerryTokens,
    **rows: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Scores of held-out pairs by the member that is active, and what is said of it.

    Args:
        forward: the members.
        pairs: N pairs that the member was not fitted to.
        task: of the fit.
        objective: that it was fitted with.
        rows: see `read_pairs`.

    Returns:
        Scores, chosen first, (2, N); and `token_facts` with the records of the objective.
    """
    outputs = read_pairs(forward, pairs, **rows)
    scores_2N = response_scores(outputs, task.token_reward.score)[0].reshape(2, -1)
    records = objective.records[forward.active] if isinstance(objective, AvaObjective) else []
    return scores_2N, token_facts(outputs, forward.form) | ({"terms": record_dicts(records)} if records else {})


def token_facts(outputs: TokenOutputs, form: TokenForm) -> dict[str, Any]:
    """How a member orders held-out pairs by every score, and what its sigma is worth.

    Args:
        outputs: of N pairs.
        form: of the member.

    Returns:
        `valid_accuracies` by score; and with sigma `sigma` with its mean, min and floor_share, the share of tokens
        whose sigma is at most twice its floor.
    """
    scores: tuple[Any, ...] = ("last", "sum", "mean") if form.q_from is None else ("last", "sum", "mean", "log_prob")
    facts: dict[str, Any] = {
        "valid_accuracies": {score: accuracy(response_scores(outputs, score)[0].reshape(2, -1)) for score in scores}
    }
    if outputs.sigma is not None:
        facts["sigma"] = {
            "mean": float(outputs.sigma.mean()),
            "min": float(outputs.sigma.min()),
            "floor_share": float(share_at_floor(outputs.sigma[:, None], form.sigma_floor)),
        }
    return facts


def accuracy(rewards_2N: torch.Tensor) -> float:
    """Share of pairs whose chosen response has more."""
    return float((rewards_2N[0] > rewards_2N[1]).double().mean())


def member_seed(seed: int, member: int) -> int:
    """Of a member's start and order of pairs."""
    return (seed * 1_000_003 + member) % 2**63
