"""Evaluation on Ray Data: answers and verdicts from a pool of actors, and the drift check.

Nothing here starts Ray. The actors are the plain classes of `raylign.runtime.evaluators`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raylign.config import EvaluateSection
from raylign.errors import DataError
from raylign.evaluation.drift import DriftReport, measure_drift
from raylign.evaluation.judges import SignCheck, check_sign, resolve_judge, sign_rows
from raylign.evaluation.prompts import EvaluationPrompt, load_prompts, prompts_file, select_prompts
from raylign.evaluation.refusal import (
    RefusalValidation,
    held_out_half,
    load_refusal_labels,
    validate_refusal_detector,
)
from raylign.evaluation.safety import SafetySummary, summarise
from raylign.evaluation.scoring import RewardFn
from raylign.models.loading import model_fingerprint, tokenizer_fingerprint
from raylign.runtime.evaluators import LABELS, ActorOptions, DriftScorer, Evaluator
from raylign.runtime.execution import execution
from raylign.runtime.phases import write_json
from raylign.types import Completion, Message

if TYPE_CHECKING:
    import ray.data

COMPLETIONS_FILE = "completions.jsonl"
DRIFT_FILE = "drift.json"
# of an evaluation's configuration, what says nothing about its answers
FREE_KEYS = frozenset({"num_actors", "batch_size", "constraint_samples"})
SAMPLE_COLUMNS = (
    *("policy", "prompt", "category", "harmful", "sample", "response", "num_tokens", "reached_end"),
    *("is_refusal", "reward", "model_cost", "cost"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One policy, judged.

    Attributes:
        completions: one per prompt, harmful prompts first, the same order for every policy.
        summary: means and intervals of these.
        judge: how the judge ranks human-labelled answers.
        refusal_detector: the detector on the labels it was not written on.
    """

    completions: tuple[Completion, ...]
    summary: SafetySummary
    judge: SignCheck
    refusal_detector: RefusalValidation


def evaluation_inputs(config: EvaluateSection) -> dict[str, str]:
    """Hashes of the files that an evaluation reads, so that its key changes with their content, not with their names.

    Args:
        config: names the prompts and the judge.

    Returns:
        "prompts" (bytes of the file), "judge" (config and weights) and "judge_tokenizer".

    Raises:
        DataNotFoundError: the prompts do not exist.
        ModelError: the judge does not exist or has no safetensors weights.
    """
    judge = resolve_judge(config.judge)
    return {
        "prompts": hashlib.blake2b(prompts_file(config.prompts).read_bytes(), digest_size=16).hexdigest(),
        "judge": model_fingerprint(judge),
        "judge_tokenizer": tokenizer_fingerprint(judge),
    }


def run_evaluation(
    model_path: str | Path,
    *,
    config: EvaluateSection,
    seed: int,
    options: ActorOptions | None = None,
    make_reward_fn: Callable[[], RewardFn] | None = None,
) -> Evaluation:
    """Judge one policy; see `evaluate_models`."""
    return evaluate_models(
        {"policy": model_path}, config=config, seed=seed, options=options, make_reward_fn=make_reward_fn
    )["policy"]


def evaluate_models(
    models: Mapping[str, str | Path],
    *,
    config: EvaluateSection,
    seed: int,
    options: ActorOptions | None = None,
    make_reward_fn: Callable[[], RewardFn] | None = None,
) -> dict[str, Evaluation]:
    """Let several policies answer the same prompts under the same sampling noise, and judge the answers.

    Args:
        models: name -> HF or peft directory. One pool of actors serves all, each actor holding one policy at a time.
        config: prompts, judge, length limit, temperature, intervals.
        seed: of the choice of prompts, the sampling and the bootstrap.
        options: the actors.
        make_reward_fn: called once per actor; gives the rewards of (conversations, answers). None leaves them nan.

    Raises:
        ModelError: a policy or the judge cannot be loaded, or the judge's sign is flipped.
        DataError: the prompts cannot be used.
    """
    options = options or ActorOptions()
    prompts = select_prompts(load_prompts(config.prompts), num=config.num_prompts, seed=seed)
    rows, sign = _answered(
        models, prompts, config=config, seed=seed, options=options, factories={"make_reward_fn": make_reward_fn}
    )
    detector = validate_refusal_detector(held_out_half(load_refusal_labels()))
    evaluations = {}
    for name in models:
        completions = tuple(_completion(row, prompts[row["index"]]) for row in rows if row["model"] == name)
        summary = summarise(completions, num_samples=config.bootstrap_samples, seed=seed)
        evaluations[name] = Evaluation(completions=completions, summary=summary, judge=sign, refusal_detector=detector)
    return evaluations


def sample_models(
    models: Mapping[str, str | Path],
    *,
    config: EvaluateSection,
    seed: int,
    options: ActorOptions,
    make_reward_fn: Callable[[], RewardFn],
    make_cost_fn: Callable[[], RewardFn],
) -> pa.Table:
    """Let several policies answer the prompts of an evaluation `config.constraint_samples` times, and price it all.

    The first answer to a prompt is that of `evaluate_models` under the same settings, because they share its noise.

    Args:
        models: name -> HF or peft directory.
        config: prompts, judge, length limit, temperature, number of answers.
        seed: of the choice of prompts and the sampling.
        options: the actors.
        make_reward_fn: called once per actor; gives the rewards of (conversations, answers).
        make_cost_fn: likewise the costs by the cost model of the run.

    Returns:
        `SAMPLE_COLUMNS`, models in their order, the answers to a prompt in a row.

    Raises:
        ModelError: a policy or the judge cannot be loaded, or the judge's sign is flipped.
        DataError: the prompts cannot be used.
    """
    prompts = select_prompts(load_prompts(config.prompts), num=config.num_prompts, seed=seed)
    rows, _ = _answered(
        models,
        prompts,
        config=config,
        seed=seed,
        options=options,
        factories={"make_reward_fn": make_reward_fn, "make_cost_fn": make_cost_fn},
        num_samples=config.constraint_samples,
    )
    kept = [row for name in models for row in rows if row["model"] == name]
    asked = [prompts[row["index"]] for row in kept]
    return pa.table(
        {
            "policy": [row["model"] for row in kept],
            "prompt": [prompt.text for prompt in asked],
            "category": [prompt.category for prompt in asked],
            "harmful": [prompt.harmful for prompt in asked],
            **{name: [row[name] for row in kept] for name in SAMPLE_COLUMNS[4:]},
        }
    )


def _answered(
    models: Mapping[str, str | Path],
    prompts: Sequence[EvaluationPrompt],
    *,
    config: EvaluateSection,
    seed: int,
    options: ActorOptions,
    factories: Mapping[str, Callable[[], RewardFn] | None],
    num_samples: int | None = None,
) -> tuple[list[dict[str, Any]], SignCheck]:
    """Judged answers by prompt and sample, and how the judge ranks answers that people labelled.

    Raises:
        ModelError: the judge's sign is flipped.
        DataError: answers got lost.
    """
    from ray.data import ActorPoolStrategy, from_items

    known = sign_rows(load_refusal_labels())
    # by model, then by length, so that a batch needs one model and little padding
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].text))
    jobs = [{"model": name, "index": index} for name in models for index in by_length]
    jobs += [{"model": LABELS, "index": index} for index in range(len(known))]
    rows = _take(
        from_items(jobs, override_num_blocks=min(options.num_actors, len(jobs))).map_batches(
            Evaluator,
            fn_constructor_kwargs={
                "models": {name: str(path) for name, path in models.items()},
                "prompts": prompts,
                "config": config,
                "seed": seed,
                "options": options,
                "labels": known,
                "num_samples": num_samples,
                "make_reward_fn": None,
                **factories,
            },
            batch_size=config.batch_size,
            compute=ActorPoolStrategy(size=options.num_actors),
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
        )
    )
    num_answers = len(models) * len(prompts) * (num_samples or 1) + len(known)
    if len(rows) != num_answers:
        raise DataError(f"{num_answers} answers were asked for and {len(rows)} came back")
    rows.sort(key=lambda row: (row["index"], row["sample"]))
    costs = np.array([row["cost"] for row in rows if row["model"] == LABELS])
    return rows, check_sign(costs, [row.label == "full_compliance" for row in known], judge=config.judge)


def check_drift(
    reference_path: str | Path,
    policy_path: str | Path,
    prompts: Sequence[Sequence[Message]],
    *,
    config: EvaluateSection,
    seed: int,
    options: ActorOptions | None = None,
) -> DriftReport:
    """Sample candidates from the reference, see what training did to their order and their distribution.

    Candidates and fresh answers are sampled at temperature 1, where sampling distribution and log-probabilities agree.
    The KL takes one fresh answer of the policy per candidate.

    Args:
        reference_path: the policy before training.
        policy_path: the trained HF or peft directory.
        prompts: held-out conversations; the first `config.drift_prompts` are used.
        config: numbers of prompts and candidates, length limit, intervals.
        seed: of the sampling and the bootstrap.
        options: the actors.

    Raises:
        DataError: no prompt.
    """
    from ray.data import ActorPoolStrategy, from_items

    options = options or ActorOptions()
    used = [tuple(prompt) for prompt in prompts[: config.drift_prompts]]
    if not used:
        raise DataError("the drift check needs at least one held-out prompt")
    rows = _take(
        from_items(
            [{"index": index} for index in range(len(used))], override_num_blocks=min(options.num_actors, len(used))
        ).map_batches(
            DriftScorer,
            fn_constructor_kwargs={
                "reference_path": str(reference_path),
                "policy_path": str(policy_path),
                "prompts": used,
                "config": config,
                "seed": seed,
                "options": options,
            },
            batch_size=max(1, config.batch_size // config.drift_candidates),
            compute=ActorPoolStrategy(size=options.num_actors),
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
        )
    )
    rows.sort(key=lambda row: row["index"])
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0] if name != "index"}
    return measure_drift(
        columns["reference_mean_logps"],
        columns["policy_mean_logps"],
        num_samples=config.bootstrap_samples,
        generator=np.random.default_rng(seed),
        fresh_policy_logps=columns["fresh_policy_logps"],
        fresh_reference_logps=columns["fresh_reference_logps"],
    )


def save_completions(path: Path, completions: Mapping[str, Iterable[Completion]]) -> None:
    """Write one JSON line per answer, with the name of its policy; a reward that is not there is null."""
    with path.open("w", encoding="utf-8") as stream:
        for name, answers in completions.items():
            for answer in answers:
                row = {"policy": name, **dataclasses.asdict(answer)}
                row["reward"] = None if np.isnan(answer.reward) else answer.reward
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_completions(path: Path) -> dict[str, tuple[Completion, ...]]:
    """Read what `save_completions` wrote."""
    completions: dict[str, list[Completion]] = {}
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            row["reward"] = float("nan") if row["reward"] is None else row["reward"]
            completions.setdefault(row.pop("policy"), []).append(Completion(**row))
    return {name: tuple(answers) for name, answers in completions.items()}


def save_drift(path: Path, report: DriftReport) -> None:
    """Write the drift report as JSON."""
    write_json(path, dataclasses.asdict(report))


def _take(dataset: ray.data.Dataset) -> list[dict[str, Any]]:
    with execution(dataset, show_progress=sys.stderr.isatty()):
        rows: list[dict[str, Any]] = dataset.take_all()
    return rows


def _completion(row: Mapping[str, Any], prompt: EvaluationPrompt) -> Completion:
    return Completion(
        prompt=prompt.text,
        response=str(row["response"]),
        category=prompt.category,
        harmful=prompt.harmful,
        num_tokens=int(row["num_tokens"]),
        reached_end=bool(row["reached_end"]),
        cost=float(row["cost"]),
        is_refusal=bool(row["is_refusal"]),
        reward=float(row["reward"]),
    )
