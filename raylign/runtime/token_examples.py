"""Held-out pairs with the reward of every token, for the report: a phase of runs whose reward is one of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from raylign.config import TOKEN_REWARDS, RewardModelSection
from raylign.errors import RaylignError, ResourceError, TrainingError
from raylign.report.token_section import TokenExample
from raylign.runtime.ingest_job import read_pairs
from raylign.runtime.phases import write_json
from raylign.runtime.run_phases import actor_options

if TYPE_CHECKING:
    from raylign.models.token_reward import TokenReward
    from raylign.rewards.posterior import RewardPosterior
    from raylign.runtime.evaluators import ActorOptions
    from raylign.runtime.run_phases import Phases

PHASE = "token_examples"
EXAMPLES_FILE = "examples.json"
NUM_PAIRS = 8
_TIMEOUT_S = 1800.0


def score_token_examples(phases: Phases, ingest: Path, reward: Path, reward_key: str) -> None:
    """Reward every token of some held-out pairs; nothing where the reward is one of responses.

    Args:
        phases: of the run.
        ingest: directory of the ingest phase.
        reward: directory of the reward phase.
        reward_key: of all that the reward is made of.

    Raises:
        ResourceError: no resources within half an hour.
        RaylignError: what the reward refuses.
    """
    config = phases.config
    if config.reward.kind not in TOKEN_REWARDS:
        return
    options = replace(actor_options(config), ledger=phases.ledger)

    def work(directory: Path) -> dict[str, Any]:
        task = ray.remote(_score).options(num_cpus=options.num_cpus, num_gpus=options.num_gpus)
        pairs = _held_out_pairs(ingest, NUM_PAIRS)
        reference = task.remote(phases.model, str(reward / "full"), pairs, config.reward_model, options)
        try:
            examples = ray.get(reference, timeout=_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise ResourceError(
                f"{len(pairs)} pairs were not rewarded within {_TIMEOUT_S:g} s: another job may hold the CPUs"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaylignError):
                raise error.cause from error
            raise TrainingError(f"rewarding the tokens of {len(pairs)} pairs: {error.cause}") from error
        write_json(directory / EXAMPLES_FILE, [asdict(example) for example in examples])
        return {"num_examples": len(examples)}

    phases.run.phase(PHASE, {"reward": reward_key, "num_pairs": NUM_PAIRS}, work)


def read_token_examples(directory: Path) -> tuple[TokenExample, ...]:
    """What `score_token_examples` left in the directory of a run; nothing where it left nothing."""
    file = directory / PHASE / EXAMPLES_FILE
    if not file.is_file():
        return ()
    return tuple(_example(row) for row in json.loads(file.read_text(encoding="utf-8")))


def _example(row: Mapping[str, Any]) -> TokenExample:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return TokenExample(**values)


def token_examples(
    reward: TokenReward, tokenizer: Any, prompts: Sequence[str], pairs: Sequence[dict[str, Any]]
) -> list[TokenExample]:
    """Chosen and rejected response of each pair, as a reward of tokens sees them.

    Args:
        reward: in the credit "own".
        tokenizer: of the policy.
        prompts: last user turn of each pair.
        pairs: rows with prompt_ids, chosen_ids and rejected_ids; responses end with the end-of-response token.
    """
    prompt_ids = [row["prompt_ids"] for row in pairs for _ in range(2)]
    responses = [row[name] for row in pairs for name in ("chosen_ids", "rejected_ids")]
    means = reward.token_rewards(prompt_ids, responses)
    sigmas = reward.token_rewards(prompt_ids, responses, rule=total_sigma)
    has_sigma = any(bool(values.any()) for values in sigmas)
    return [
        TokenExample(
            prompt=prompts[row // 2],
            label=("chosen", "rejected")[row % 2],
            tokens=tuple(token_texts(tokenizer, ids)),
            means=tuple(means[row].tolist()),
            sigmas=tuple(sigmas[row].tolist()) if has_sigma else None,
        )
        for row, ids in enumerate(responses)
    ]


def total_sigma(belief: RewardPosterior) -> torch.Tensor:
    """Standard deviation of the members' mixture: what they state, and what they disagree about. Shape (n,)."""
    stated = 0.0 if belief.head_scales is None else belief.head_scales.square().mean(-1)
    return (belief.variance + stated).sqrt()


def token_texts(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Text that each token adds; a character made of several tokens is that of the last of them.

    Args:
        tokenizer: of the ids.
        ids: one response. Shape (T,).
    """
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(
            [int(token) for token in ids[:end]], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        is_open = text.endswith("\ufffd") and end < len(ids)
        texts.append("" if is_open else text[len(shown) :])
        shown = shown if is_open else text
    return texts


def _held_out_pairs(ingest: Path, num: int) -> list[dict[str, Any]]:
    """The first test pairs in the order of their prompts' keys, which are hashes; one of each prompt."""
    columns = ["prompt_key", "split", "prompt", "prompt_ids", "chosen_ids", "rejected_ids"]
    found: dict[str, dict[str, Any]] = {}
    for row in read_pairs(ingest).select_columns(columns).iter_rows():
        if row["split"] == "test":
            found.setdefault(row["prompt_key"], row)
    return [found[key] for key in sorted(found)[:num]]


def _score(
    model_path: str, members: str, pairs: list[dict[str, Any]], reward_model: RewardModelSection, options: ActorOptions
) -> list[TokenExample]:
    from raylign.models.loading import load_tokenizer
    from raylign.models.token_reward import TokenReward
    from raylign.runtime.text_rewards import make_text_reward

    if not options.num_gpus:
        torch.set_num_threads(max(1, int(options.num_cpus)))
    reward = make_text_reward(model_path, reward_model, directory=members, options=options)
    assert isinstance(reward, TokenReward)
    prompts = [row["prompt"][-1]["content"] for row in pairs]
    return token_examples(
        reward, load_tokenizer(model_path, trust_remote_code=options.trust_remote_code), prompts, pairs
    )
