"""Fitting reward models that read texts: members as Ray tasks, merged if asked for.

A directory of `fit_members` holds one plain peft adapter per member (`member0`, ...), which loads with peft on top of
`AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)`, for kinds that reward tokens on top of
`AutoModelForCausalLM.from_pretrained(policy)`, its heads beside it in `heads.safetensors`; for reward.kind=warm also
`merged`, a plain sequence classifier. `text_reward.json` is written last and says what is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from raylign.config import (
    TOKEN_REWARDS,
    AvaSection,
    PolicySection,
    RewardModelSection,
    RewardSection,
    TokenRewardSection,
)
from raylign.cost.ledger import Ledger, measured_call
from raylign.errors import DataError, TrainingError
from raylign.models.classifiers import (
    HEAD,
    ClassifierForward,
    add_members,
    load_classifier,
    load_members,
    neutral_pad_id,
    save_member,
)
from raylign.models.loading import load_tokenizer, resolve_layout
from raylign.models.numerics import actor_device
from raylign.models.reward_model import score_pairs
from raylign.rewards.cross_fit import grouped_folds
from raylign.rewards.fit import member_weights
from raylign.rewards.merge import average_weights, weights_hash
from raylign.rewards.posterior import standardization
from raylign.runtime.execution import own_errors
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.phases import write_json
from raylign.runtime.text_rewards import MERGED, REWARD_FILE, on_device, weights_dtype
from raylign.runtime.token_members import (
    accuracy,
    judge_tokens,
    kind_facts,
    member_seed,
    start_tokens,
    token_objective,
)
from raylign.training.reward_model import MemberTraining, bradley_terry_backward, train_members
from raylign.types import TOKEN_COLUMNS

if TYPE_CHECKING:
    import ray.data

ANCHOR_WEIGHT = 0.1  # enough to give members one zero; the pair loss decides the order
DEFAULT_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FitTask:
    """What a task that fits members needs besides the pairs.

    Attributes:
        reward: number of members, their pairs, whether they are standardised.
        reward_model: adapters and steps.
        policy: number types and loading; its adapter does not count.
        token_reward: score, of kinds that reward tokens.
        ava: objective of reward.kind=ava_p and ava_d.
        model_path: directory of the policy.
        output_dir: gets the members.
        seed: of starts, orders and pairs.
        num_cpus: of the task.
        num_gpus: of the task.
    """

    reward: RewardSection
    reward_model: RewardModelSection
    policy: PolicySection
    token_reward: TokenRewardSection = field(default_factory=TokenRewardSection)
    ava: AvaSection = field(default_factory=AvaSection)
    model_path: str
    output_dir: Path
    seed: int
    num_cpus: float
    num_gpus: float

    @property
    def names(self) -> list[str]:
        """Of the members, which are also their directories."""
        return [f"member{member}" for member in range(self.reward.num_heads)]


def fit_members(
    pairs: ray.data.Dataset,
    *,
    reward: RewardSection,
    reward_model: RewardModelSection,
    policy: PolicySection,
    model_path: str | Path,
    output_dir: str | Path,
    seed: int,
    token_reward: TokenRewardSection | None = None,
    ava: AvaSection | None = None,
    excluded_folds: Sequence[int] = (),
    num_cpus: float = 1,
    num_gpus: float = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """Fine-tune the members of a reward of texts from the policy, and merge those of reward.kind=warm.

    Members are one Ray task each, as many at a time as the cluster has room for; with a diversity weight they are one
    task. Scoring every training pair by members that never saw its prompt takes one call per fold with
    `excluded_folds=[fold]` besides the call without: reward.folds + 1 fits of all members, where probes on cached
    states pay one forward for all of their fits.

    Args:
        pairs: ingested pairs with `TOKEN_COLUMNS`, row_id, prompt_key and split; those of split train are fitted to,
            those of split valid standardise the members. At most reward.max_pairs of each, by the prompts' hashes.
        reward: `reward` section.
        reward_model: `reward_model` section.
        policy: `policy` section.
        model_path: directory of the policy, readable on every node.
        output_dir: gets what the module says, on storage that every node sees; what an earlier call left is replaced.
        seed: of folds, starts, orders and pairs.
        token_reward: `token_reward` section, of kinds that reward tokens; its credit does not count.
        ava: `ava` section, of reward.kind=ava_p and ava_d.
        excluded_folds: of `grouped_folds(prompt_key, reward.folds, seed)`, left out of the training pairs.
        num_cpus: of one task.
        num_gpus: of one task.
        timeout_s: longest wait for the next member to finish.
        ledger: what the tasks cost is recorded here, None not at all.

    Returns:
        What `text_reward.json` says: names, validation accuracy and final training loss of each member, scale and
        shift, counts, seconds and start hashes; of kinds that reward tokens also score and form, and what
        `token_facts` and the objective say of each member.

    Raises:
        DataError: no training or no validation pair left.
        ModelError: the policy cannot become a classifier.
        TrainingError: a loss that is not finite, or a member that took too long.
    """
    import ray

    directory = Path(output_dir).expanduser().absolute()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / REWARD_FILE).unlink(missing_ok=True)
    task = FitTask(
        reward=reward,
        reward_model=reward_model,
        policy=policy,
        token_reward=token_reward or TokenRewardSection(),
        ava=ava or AvaSection(),
        model_path=str(model_path),
        output_dir=directory,
        seed=seed,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    train, valid = _read_pairs(pairs, reward, seed, excluded_folds)
    is_joint = reward_model.diversity_weight > 0
    groups = [list(range(reward.num_heads))] if is_joint else [[member] for member in range(reward.num_heads)]
    shared = ray.put((train, valid))
    run = ray.remote(measured_call).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=0)
    entry = (ledger, "fit_reward", {"cpu": num_cpus, **({"gpu": num_gpus} if num_gpus else {})})
    fitted = wait_for_members([run.remote(*entry, fit_group, shared, task, group) for group in groups], timeout_s)
    records = [record for group_records in fitted for record in group_records]
    rewards_nM = torch.stack([record.pop("valid_rewards").flatten() for record in records], dim=1)
    if reward.kind == "warm":
        hashes = [record["start_hash"] for record in records]
        [merged_valid] = wait_for_members([run.remote(*entry, _merge, shared, task, hashes)], timeout_s)
        quality = {"merged_valid_accuracy": accuracy(merged_valid)}
    else:
        quality = {}
    mean_2N = rewards_nM.mean(1).reshape(2, -1)
    is_standardized = reward.standardize and reward.kind != "warm"
    scale_M, shift_M = standardization(rewards_nM) if is_standardized else (None, None)
    facts = {
        "kind": reward.kind,
        "names": task.names,
        "scale": None if scale_M is None else scale_M.tolist(),
        "shift": None if shift_M is None else shift_M.tolist(),
        "members": records,
        "mean_valid_accuracy": accuracy(mean_2N),
        **quality,
        **(kind_facts(task) if reward.kind in TOKEN_REWARDS else {}),
        "num_train_pairs": len(train),
        "num_valid_pairs": len(valid),
        "excluded_folds": list(excluded_folds),
        "seed": seed,
    }
    write_json(directory / REWARD_FILE, facts)
    return facts


def _read_pairs(
    pairs: ray.data.Dataset, reward: RewardSection, seed: int, excluded_folds: Sequence[int]
) -> tuple[pa.Table, pa.Table]:
    """Token ids of the training and the validation pairs, in the order of their prompts' hashes."""
    columns = ["row_id", "prompt_key", "split", *TOKEN_COLUMNS]
    tables = pairs.select_columns(columns).iter_batches(batch_format="pyarrow", batch_size=1024)
    table = pa.concat_tables([batch.filter(pc.not_equal(batch["split"], "test")) for batch in tables])
    table = table.sort_by([("prompt_key", "ascending"), ("row_id", "ascending")])
    found = {split: table.filter(pc.equal(table["split"], split)) for split in ("train", "valid")}
    folds = grouped_folds(found["train"]["prompt_key"].to_pylist(), reward.folds, seed)
    is_kept = [int(fold) not in set(excluded_folds) for fold in folds]
    found["train"] = found["train"].filter(pa.array(is_kept, pa.bool_()))
    for split, part in found.items():
        if not len(part):
            raise DataError(
                f"no {split} pair to fit a reward model with (reward.folds={reward.folds}, left out: "
                f"{list(excluded_folds)}); give more prompts"
            )
    return found["train"].slice(0, reward.max_pairs), found["valid"].slice(0, reward.max_pairs)


def wait_for_members(references: Sequence[Any], timeout_s: float) -> list[Any]:
    """Results of tasks in their order; the others are cancelled when one fails or none finishes in time.

    Args:
        references: of tasks that fit members.
        timeout_s: longest wait for the next one to finish.

    Raises:
        TrainingError: none finished in time.
        RaylignError: what a task raised.
    """
    import ray

    pending = list(references)
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=timeout_s)
            if not done:
                raise TrainingError(
                    f"no member finished within {timeout_s:g} s, {len(pending)} are left: has the cluster the CPUs or "
                    "GPUs that one asks for (features.cpus_per_actor, features.gpus_per_actor), or does the fit need "
                    "longer?"
                )
            with own_errors():
                ray.get(done, timeout=timeout_s)
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)  # an interrupt alone can be lost while a worker starts
    results: list[Any] = ray.get(list(references), timeout=timeout_s)
    return results


def fit_group(pairs: tuple[pa.Table, pa.Table], task: FitTask, members: Sequence[int]) -> list[dict[str, Any]]:
    """Train some members in one process, save them, and say how they do on the validation pairs.

    Args:
        pairs: training and validation pairs, with `TOKEN_COLUMNS`.
        task: of the fit.
        members: their numbers.

    Returns:
        Facts of each member, among them `valid_rewards` (2, N).
    """
    started_s = time.monotonic()
    if not task.num_gpus:
        torch.set_num_threads(max(1, int(task.num_cpus)))
    train, valid = (pairs_from_table(table) for table in pairs)
    section, names = task.reward_model, [task.names[member] for member in members]
    fits_tokens = task.reward.kind in TOKEN_REWARDS
    forward: Any
    forward, start_hashes = start_tokens(task, members) if fits_tokens else _start_members(task, members)
    config = forward.model.get_base_model().config
    rows: dict[str, Any] = {
        "layout": resolve_layout("auto", config),
        "pad_token_id": int(config.pad_token_id or 0),
        "batch_tokens": section.batch_tokens,
    }
    options = MemberTraining(
        epochs=section.epochs,
        batch_size=section.batch_size,
        learning_rate=section.learning_rate,
        anchor_weight=ANCHOR_WEIGHT,
        diversity_weight=section.diversity_weight,
        **rows,
    )
    weights_NM = member_weights(len(train), task.reward.num_heads, head_data=task.reward.head_data, seed=task.seed)
    objective = token_objective(task) if fits_tokens else None
    losses_MU = train_members(
        forward,
        names,
        train,
        options=options,
        seeds=[member_seed(task.seed, member) for member in members],
        weights=None if weights_NM is None else weights_NM[:, list(members)],
        backward=bradley_terry_backward if objective is None else objective,
    )
    seconds = time.monotonic() - started_s
    records = []
    for position, (member, name) in enumerate(zip(members, names, strict=True)):
        save_member(forward.model, name, task.output_dir, more=forward.heads[name].save if fits_tokens else None)
        forward.activate(name)
        if objective is not None:
            rewards_2N, more = judge_tokens(forward, valid, task, objective, **rows)
        else:
            rewards_2N, more = score_pairs(forward, valid, **rows), {}
        records.append(
            {
                "member": member,
                "valid_rewards": rewards_2N,
                "valid_accuracy": accuracy(rewards_2N),
                "last_loss": float(losses_MU[position, -10:].mean()),
                "num_updates": losses_MU.shape[1],
                "seconds": seconds / len(members),
                "start_hash": start_hashes[position],
                **more,
            }
        )
    return records


def _start_members(task: FitTask, members: Sequence[int]) -> tuple[ClassifierForward, list[str | None]]:
    """Fresh members where they train, and for members that will be averaged the hash of each one's weights."""
    tokenizer = load_tokenizer(task.model_path, trust_remote_code=task.policy.trust_remote_code)
    model = load_classifier(
        task.model_path,
        pad_token_id=neutral_pad_id(tokenizer),
        seed=task.seed,
        dtype=weights_dtype(task.policy, actor_device(task.num_gpus)),
        trust_remote_code=task.policy.trust_remote_code,
        gradient_checkpointing=task.policy.gradient_checkpointing,
    )
    names = [task.names[member] for member in members]
    seeds = [member_seed(task.seed, member) for member in members]
    state = model.state_dict()  # by the names that they have before peft wraps the layers
    is_warm = task.reward.kind == "warm"
    peft_model = add_members(
        model,
        names,
        rank=task.reward_model.lora_rank,
        alpha=task.reward_model.lora_alpha,
        seeds=seeds,
        # averaged members start at one head, members of an ensemble at their own
        head_seeds=[task.seed] * len(members) if is_warm else seeds,
    )
    hashes: list[str | None] = [None] * len(members)
    if is_warm:  # an adapter adds nothing yet, so that the classifier with the member's head is the start
        heads = model.get_submodule(HEAD).modules_to_save
        hashes = [weights_hash(state | {f"{HEAD}.weight": heads[name].weight}) for name in names]
    return on_device(peft_model, task.policy, task.num_gpus), hashes


def _merge(pairs: tuple[pa.Table, pa.Table], task: FitTask, start_hashes: Sequence[str]) -> torch.Tensor:
    """Average the members' whole weights, save the classifier, and reward the validation pairs (2, N) by it.

    In float32, because an adapter's change of a weight is often below what bfloat16 can tell.
    """
    if not task.num_gpus:
        torch.set_num_threads(max(1, int(task.num_cpus)))
    tokenizer = load_tokenizer(task.model_path, trust_remote_code=task.policy.trust_remote_code)
    pad_token_id = neutral_pad_id(tokenizer)

    def load() -> Any:
        return load_classifier(
            task.model_path,
            pad_token_id=pad_token_id,
            seed=task.seed,
            trust_remote_code=task.policy.trust_remote_code,
        )

    def weights() -> Iterator[dict[str, torch.Tensor]]:
        for name in task.names:
            peft_model: Any = load_members(load(), [task.output_dir / name])
            yield peft_model.merge_and_unload().state_dict()

    model = load()
    model.load_state_dict(average_weights(weights(), start_hashes=start_hashes))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    model.save_pretrained(task.output_dir / MERGED)
    tokenizer.save_pretrained(task.output_dir / MERGED)
    return score_pairs(
        on_device(model, task.policy, task.num_gpus),
        pairs_from_table(pairs[1]),
        layout=resolve_layout("auto", model.config),
        pad_token_id=pad_token_id,
        batch_tokens=task.reward_model.batch_tokens,
    )
