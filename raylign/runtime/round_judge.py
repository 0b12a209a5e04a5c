"""What the judge says of the responses that an online training sampled, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from raylign.config import EvaluateSection, RunConfig
from raylign.cost.ledger import measured
from raylign.data.conversations import ConversationReader
from raylign.errors import RaylignError, ResourceError, TrainingError
from raylign.evaluation.calibration import RoundOutcome
from raylign.evaluation.judges import SafetyJudge
from raylign.models.loading import load_tokenizer, model_fingerprint
from raylign.models.numerics import actor_device
from raylign.runtime.evaluate_job import evaluation_inputs
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.identity import method_identity
from raylign.runtime.online_trainer import ROUNDS_DIR
from raylign.runtime.run_phases import Phases, actor_options
from raylign.training.rounds import Round, RoundStore

_TIMEOUT_S = 3600.0


def judge_rounds(phases: Phases, checkpoint: Path) -> tuple[RoundOutcome, ...]:
    """Reward, gold and distance from the reference of every round of a finished training.

    Args:
        phases: of the run, whose training sampled its own responses.
        checkpoint: that it ended in.

    Raises:
        CacheMismatchError: the rounds judged here are those of another training, or another judge's.
        CheckpointError: a round is missing.
    """
    config, directory = phases.config, phases.run.directory
    options = replace(actor_options(config), ledger=phases.ledger)
    key = rounds_key(config, model_fingerprint(checkpoint))

    def work(_: Path) -> dict[str, Any]:
        task = ray.remote(_judge).options(num_cpus=options.num_cpus, num_gpus=options.num_gpus)
        store = directory / "train" / ROUNDS_DIR
        reference = task.remote(phases.model, str(store), config.online.num_rounds, config.evaluate, options)
        try:
            rounds = ray.get(reference, timeout=_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise ResourceError(
                f"the rounds of {directory} were not judged within {_TIMEOUT_S:g} s: another job may hold the CPUs"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaylignError):
                raise error.cause from error
            raise TrainingError(f"judging the rounds of {directory}: {error.cause}") from error
        return {"rounds": [{name: np.asarray(v).tolist() for name, v in asdict(one).items()} for one in rounds]}

    _, facts = phases.run.phase("judge_rounds", key, work)
    return tuple(
        RoundOutcome(kl=one["kl"], proxy=np.array(one["proxy"]), gold=np.array(one["gold"])) for one in facts["rounds"]
    )


def rounds_key(config: RunConfig, checkpoint: str) -> dict[str, Any]:
    """What judged rounds depend on: the training that sampled them, by its settings and by its end, and the judge.

    Args:
        config: of the run.
        checkpoint: fingerprint of the policy that the training ended in, which data and rewards count in too.
    """
    return {"checkpoint": checkpoint, **method_identity(config), **evaluation_inputs(config.evaluate)}


def _judge(
    model_path: str, rounds: str, num_rounds: int, evaluate: EvaluateSection, options: ActorOptions
) -> list[RoundOutcome]:
    if not options.num_gpus:
        torch.set_num_threads(max(1, int(options.num_cpus)))
    reader = ConversationReader(load_tokenizer(model_path, trust_remote_code=options.trust_remote_code))
    judge = SafetyJudge(
        evaluate.judge,
        device=actor_device(options.num_gpus),
        batch_size=evaluate.batch_size,
        trust_remote_code=options.trust_remote_code,
    )
    store = RoundStore(rounds)
    outcomes = []
    for index in range(num_rounds):
        round_ = store.read(index)
        items = [item.rollout for item in round_.scored]
        with measured(options.ledger, "judge", options.devices) as entry:
            entry.add(num_items=len(items))
            # the judge reads one question and one answer; of a conversation that is its last turn
            prompts = [reader.conversation(item.prompt_ids)[-1].content for item in items]
            costs = judge.cost(prompts, [reader.response(item.response_ids) for item in items])
        outcomes.append(_outcome(round_, -costs.astype(np.float64)))
    return outcomes


def _outcome(round_: Round, gold: np.ndarray) -> RoundOutcome:
    ratios = [item.rollout.sampler_logps.sum() - item.reference_token_logps.sum() for item in round_.scored]
    groups: Sequence[list[int]] = round_.by_prompt
    return RoundOutcome(
        kl=float(np.mean(ratios)),
        proxy=np.stack([round_.rewards[rows] for rows in groups]).astype(np.float64),
        gold=np.stack([gold[rows] for rows in groups]),
    )
