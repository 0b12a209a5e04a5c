"""The policy fine-tuned as a cost model: LoRA members fitted to safety verdicts as tasks, and loaded where they price.

A directory of the cost phase holds the members of each fit (`full`, and with several folds `fold0`, ...) as plain peft
adapters, which load on top of `AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)`; the output is
the cost. Beside each adapter `<member>.json` says how it learned; it is written last, so that a member is done when it
is there.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from raylign.config import CostModelSection, PolicySection, RunConfig
from raylign.cost.ledger import measured_call
from raylign.errors import DataError
from raylign.models.classifiers import add_members, load_classifier, load_members, neutral_pad_id, save_member
from raylign.models.loading import load_tokenizer, resolve_layout
from raylign.models.numerics import actor_device
from raylign.models.reward_model import TextReward, score_pairs
from raylign.rewards.cross_fit import checked_folds, grouped_folds
from raylign.rewards.fit import member_weights
from raylign.rewards.fit_cost import PairVerdicts, check_verdicts, cost_losses
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.fitted_cost import FittedCost
from raylign.runtime.fitted_reward import FULL
from raylign.runtime.pair_states import VERDICT_COLUMNS, has_verdict
from raylign.runtime.phases import write_json
from raylign.runtime.text_reward_job import DEFAULT_TIMEOUT_S, wait_for_members
from raylign.runtime.text_rewards import on_device, weights_dtype
from raylign.training.cost_model import CostObjective
from raylign.training.reward_model import MemberTraining, train_members
from raylign.types import TOKEN_COLUMNS

if TYPE_CHECKING:
    import ray.data


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberTask:
    """What a task that fits one member needs besides the pairs.

    Attributes:
        cost_model: adapters, steps and loss.
        policy: number types and loading; its adapter does not count.
        model_path: directory of the policy.
        output_dir: of the fit.
        fold: left out of the training pairs, `FULL` for none.
        member: number of the member.
        seed: of folds, starts, orders and pairs.
        num_cpus: of the task.
        num_gpus: of the task.
    """

    cost_model: CostModelSection
    policy: PolicySection
    model_path: str
    output_dir: Path
    fold: int
    member: int
    seed: int
    num_cpus: float
    num_gpus: float

    @property
    def name(self) -> str:
        """Of the member, which is also its directory."""
        return f"member{self.member}"

    @property
    def facts_file(self) -> Path:
        """Written when the member is done."""
        return self.output_dir / f"{self.name}.json"

    @property
    def member_seed(self) -> int:
        """Of the member's start and order; the same in every fit."""
        return (self.seed * 1_000_003 + self.member) % 2**63


def fit_directory(directory: Path, fold: int) -> Path:
    """Where the members of a fit lie.

    Args:
        directory: of the cost phase.
        fold: that was left out, `FULL` for none.
    """
    return directory / ("full" if fold == FULL else f"fold{fold}")


def fit_cost_members(
    features: ray.data.Dataset,
    *,
    config: RunConfig,
    model_path: str,
    model: str,
    directory: Path,
    options: ActorOptions,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> FittedCost:
    """Fine-tune members on the verdicts of the training pairs, without each fold and on all.

    Members are one task each, as many at a time as the cluster has room for. Those that an interrupted call finished
    are kept; the caller promises that the directory is of the same inputs.

    Args:
        features: pairs with token ids, verdicts and splits; pairs without a verdict are left out.
        config: sections cost_model and policy, and the seed.
        model_path: directory of the policy, readable on every node.
        model: its fingerprint.
        directory: of the phase, on storage that every node sees.
        options: a member is fitted with the CPUs and GPUs of one of these actors.
        timeout_s: longest wait for the next member to finish.

    Returns:
        What prices responses; the members lie in the directory.

    Raises:
        DataError: no training or validation pair with a verdict, verdicts that are all alike, or too few prompts for
            the folds.
        ModelError: the policy cannot become a classifier.
        TrainingError: a loss that is not finite, or a member that took too long.
    """
    import ray

    settings, seed = config.cost_model, config.run.seed
    train, valid = _labelled_pairs(features, settings)
    folds = [FULL, *(range(settings.folds) if settings.folds > 1 else ())]
    checked_folds(train["prompt_key"].to_pylist(), settings.folds, seed)
    for fold in folds:
        check_verdicts(_verdicts(_without(train, fold, settings.folds, seed), settings).signs)
    tasks = [
        MemberTask(
            cost_model=settings,
            policy=config.policy,
            model_path=model_path,
            output_dir=fit_directory(directory, fold),
            fold=fold,
            member=member,
            seed=seed,
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
        )
        for fold in folds
        for member in range(settings.num_heads)
    ]
    shared = ray.put((train, valid))
    fit = ray.remote(measured_call).options(num_cpus=options.num_cpus, num_gpus=options.num_gpus, max_retries=0)
    wait_for_members(
        [
            fit.remote(options.ledger, "fit_cost", options.devices, fit_member, shared, task)
            for task in tasks
            if not task.facts_file.exists()
        ],
        timeout_s,
    )
    return FittedCost(
        source="fine_tuned",
        members=tuple(task.name for task in tasks if task.fold == FULL),
        num_folds=len(folds) - 1,
        fold_seed=seed,
        model=model,
    )


def member_facts(directory: Path, fitted: FittedCost) -> list[dict[str, Any]]:
    """How each member of each fit learned.

    Args:
        directory: of the cost phase.
        fitted: what `fit_cost_members` returned.
    """
    files = [
        (fold, fit_directory(directory, fold) / f"{name}.json")
        for fold in (FULL, *range(fitted.num_folds))
        for name in fitted.members
    ]
    return [
        {"fold": None if fold == FULL else fold, **json.loads(file.read_text(encoding="utf-8"))} for fold, file in files
    ]


def _labelled_pairs(features: ray.data.Dataset, settings: CostModelSection) -> tuple[pa.Table, pa.Table]:
    """Token ids and verdicts of training and validation pairs, in the order of their prompts' hashes."""
    columns = ["row_id", "prompt_key", "split", *VERDICT_COLUMNS, *TOKEN_COLUMNS]
    batches = features.select_columns(columns).iter_batches(batch_format="pyarrow", batch_size=1024)
    table = pa.concat_tables([batch.filter(has_verdict(batch)) for batch in batches])
    table = table.sort_by([("prompt_key", "ascending"), ("row_id", "ascending")])
    found = [table.filter(pc.equal(table["split"], split)).slice(0, settings.max_pairs) for split in ("train", "valid")]
    for split, part in zip(("train", "valid"), found, strict=True):
        if not len(part):
            raise DataError(
                f"no pair with a safety verdict (chosen_safe, rejected_safe) in the {split!r} split: give more, or use "
                "cost_model.source=external"
            )
    return found[0], found[1]


def _without(train: pa.Table, fold: int, num_folds: int, seed: int) -> pa.Table:
    """The training pairs of the other folds."""
    folds = grouped_folds(train["prompt_key"].to_pylist(), num_folds, seed)
    return train.filter(pa.array([int(own) != fold for own in folds], pa.bool_()))


def _verdicts(table: pa.Table, settings: CostModelSection) -> PairVerdicts:
    chosen, rejected = (table[name].to_pylist() for name in VERDICT_COLUMNS)
    return PairVerdicts.of_pairs(chosen, rejected, is_chosen_safer=settings.pair_order == "chosen")


def fit_member(pairs: tuple[pa.Table, pa.Table], task: MemberTask) -> None:
    """Train one member, save it, and say how it does on the validation pairs.

    Args:
        pairs: labelled training and validation pairs.
        task: what to fit, and where to.
    """
    started_s = time.monotonic()
    if not task.num_gpus:
        torch.set_num_threads(max(1, int(task.num_cpus)))
    settings = task.cost_model
    train = _without(pairs[0], task.fold, settings.folds, task.seed)
    forward = on_device(_start(task), task.policy, task.num_gpus)
    rows: dict[str, Any] = {
        "layout": resolve_layout("auto", forward.classifier.config),
        "pad_token_id": int(forward.classifier.config.pad_token_id),
        "batch_tokens": settings.batch_tokens,
    }
    num = settings.num_heads
    weights = member_weights(len(train), num, head_data="bootstrap", seed=task.seed) if num > 1 else None
    losses_1U = train_members(
        forward,
        [task.name],
        pairs_from_table(train),
        options=MemberTraining(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            anchor_weight=0.0,
            diversity_weight=0.0,
            **rows,
        ),
        seeds=[task.member_seed],
        weights=None if weights is None else weights[:, [task.member]],
        backward=CostObjective(verdicts=_verdicts(train, settings), regularization=settings.regularization),
    )
    costs_2N = score_pairs(forward, pairs_from_table(pairs[1]), **rows)
    verdicts = _verdicts(pairs[1], settings)
    losses_N1 = cost_losses(list(costs_2N[:, :, None]), verdicts, regularization=settings.regularization)
    known_2N = verdicts.signs.T != 0
    is_right_2N = (costs_2N > 0) == (verdicts.signs.T < 0)
    save_member(forward.model, task.name, task.output_dir)
    facts = {
        "member": task.member,
        "num_pairs": len(train),
        "num_updates": losses_1U.shape[1],
        "last_loss": float(losses_1U[0, -10:].mean()),
        "valid_loss": float(losses_N1.mean()),
        "valid_accuracy": float(is_right_2N[known_2N].double().mean()),
        "seconds": time.monotonic() - started_s,
    }
    write_json(task.facts_file, facts)


def _start(task: MemberTask) -> Any:
    """A fresh member."""
    tokenizer = load_tokenizer(task.model_path, trust_remote_code=task.policy.trust_remote_code)
    model = load_classifier(
        task.model_path,
        pad_token_id=neutral_pad_id(tokenizer),
        seed=task.seed,
        dtype=weights_dtype(task.policy, actor_device(task.num_gpus)),
        trust_remote_code=task.policy.trust_remote_code,
        gradient_checkpointing=task.policy.gradient_checkpointing,
    )
    return add_members(
        model,
        [task.name],
        rank=task.cost_model.lora_rank,
        alpha=task.cost_model.lora_alpha,
        seeds=[task.member_seed],
        head_seeds=[task.member_seed],
    )


def load_cost_members(
    model_path: str,
    fitted: FittedCost,
    directory: Path,
    *,
    cost_model: CostModelSection,
    options: ActorOptions,
) -> TextReward:
    """Members of one fit in this process, as a reward of texts, which is minus the cost.

    Args:
        model_path: directory of the policy.
        fitted: what the cost phase fitted.
        directory: of the fit, see `fit_directory`.
        cost_model: token budget.
        options: size and number types of the actor.

    Raises:
        ModelError: an adapter is missing or belongs to another model.
    """
    tokenizer = load_tokenizer(model_path, trust_remote_code=options.trust_remote_code)
    model = load_classifier(
        model_path,
        pad_token_id=neutral_pad_id(tokenizer),
        seed=fitted.fold_seed,
        dtype=weights_dtype(options.policy, actor_device(options.num_gpus)),
        trust_remote_code=options.trust_remote_code,
    )
    members = load_members(model, [directory / name for name in fitted.members])
    return TextReward(
        on_device(members, options.policy, options.num_gpus),
        tokenizer,
        members=fitted.members,
        is_cost=True,
        batch_tokens=cost_model.batch_tokens,
    )
