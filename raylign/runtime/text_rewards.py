"""Fitted or foreign reward models of texts, loaded where they score, and the Ray Data pool that scores stored pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from raylign.config import TOKEN_REWARDS, PolicySection, RewardModelSection, TokenRewardSection
from raylign.errors import CheckpointError, ModelError
from raylign.models.classifiers import (
    ClassifierForward,
    load_classifier,
    load_external,
    load_members,
    neutral_pad_id,
    reward_column,
)
from raylign.models.loading import load_policy, load_tokenizer, resolve_dtype, resolve_model
from raylign.models.numerics import ComputeType, actor_device, compute_type, policy_numerics
from raylign.models.reward_model import TextReward
from raylign.models.token_forward import TokenForm, TokenHeads, TokenRewardForward
from raylign.models.token_reward import TokenReward
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import pairs_from_table

if TYPE_CHECKING:
    import ray.data

REWARD_FILE = "text_reward.json"
MERGED = "merged"
HEAD_REWARD_COLUMNS = ("chosen_head_rewards", "rejected_head_rewards")
HEAD_SCALE_COLUMNS = ("chosen_head_scales", "rejected_head_scales")  # of members that state a sigma
_ROWS_PER_CALL = 128


def make_text_reward(
    model_path: str | Path,
    reward_model: RewardModelSection,
    *,
    directory: str | Path | None = None,
    options: ActorOptions | None = None,
    token_reward: TokenRewardSection | None = None,
) -> TextReward | TokenReward:
    """The run's reward of texts, in this process.

    Args:
        model_path: directory of the policy, whose token ids are scored.
        reward_model: `reward_model` section.
        directory: what `fit_members` wrote; None for the external classifier `reward_model.model`.
        options: size and number types of the actor.
        token_reward: credit of tokens, for kinds that reward tokens; their score is that of the fit.

    Raises:
        CheckpointError: the directory holds no finished reward model.
        ModelError: a classifier, tokenizer or label that cannot be used.
    """
    options = options or ActorOptions()
    facts = None if directory is None else read_facts(Path(directory))
    tokenizer = load_tokenizer(model_path, trust_remote_code=options.trust_remote_code)
    if facts is None or directory is None:
        return _external(tokenizer, reward_model, options)
    directory = Path(directory)
    if facts["kind"] in TOKEN_REWARDS:
        return _token_reward(
            facts,
            tokenizer,
            model_path=model_path,
            directory=directory,
            options=options,
            token_reward=token_reward or TokenRewardSection(),
            batch_tokens=reward_model.batch_tokens,
        )
    dtype = weights_dtype(options.policy, actor_device(options.num_gpus))
    if facts["kind"] == "warm":
        model: Any = load_external(directory / MERGED, dtype=dtype, trust_remote_code=options.trust_remote_code)
        names = []
    else:
        base = load_classifier(
            model_path,
            pad_token_id=neutral_pad_id(tokenizer),
            seed=facts["seed"],
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
        )
        names = facts["names"]
        model = load_members(base, [directory / name for name in names])
    return TextReward(
        on_device(model, options.policy, options.num_gpus),
        tokenizer,
        members=names,
        scale=None if facts["scale"] is None else torch.tensor(facts["scale"]),
        shift=None if facts["shift"] is None else torch.tensor(facts["shift"]),
        batch_tokens=reward_model.batch_tokens,
    )


def _token_reward(
    facts: dict[str, Any],
    tokenizer: Any,
    *,
    model_path: str | Path,
    directory: Path,
    options: ActorOptions,
    token_reward: TokenRewardSection,
    batch_tokens: int,
) -> TokenReward:
    """Members that reward tokens, in the credit that the run asks for."""
    form = TokenForm(**facts["form"])
    model = load_policy(
        model_path,
        dtype=weights_type(options.policy, actor_device(options.num_gpus)),
        trust_remote_code=options.trust_remote_code,
        attention="eager" if token_reward.credit == "attention" else "auto",  # fused kernels return no weights
    )
    vocab_size, width = model.get_output_embeddings().weight.shape
    directories = [directory / name for name in facts["names"]]
    heads = {path.name: TokenHeads(width, vocab_size, form).load(path) for path in directories}
    return TokenReward(
        tokens_on_device(load_members(model, directories), heads, form, options.policy, options.num_gpus),
        tokenizer,
        members=facts["names"],
        score=facts["score"],
        credit=token_reward.credit,
        dense_weight=token_reward.dense_weight,
        scale=None if facts["scale"] is None else torch.tensor(facts["scale"]),
        shift=None if facts["shift"] is None else torch.tensor(facts["shift"]),
        batch_tokens=batch_tokens,
    )


def _external(tokenizer: Any, reward_model: RewardModelSection, options: ActorOptions) -> TextReward:
    assert reward_model.model is not None  # refused by the configuration
    path = resolve_model(reward_model.model, key="reward_model.model")
    model, own = load_foreign(path, tokenizer, options, key="reward_model.model")
    return TextReward(
        on_device(model, options.policy, options.num_gpus),
        tokenizer,
        own_tokenizer=own,
        column=reward_column(model.config, reward_model.label, where=path),
        is_cost=reward_model.is_cost,
        batch_tokens=reward_model.batch_tokens,
    )


def load_foreign(path: str, tokenizer: Any, options: ActorOptions, *, key: str) -> tuple[Any, Any]:
    """Somebody's classifier on the CPU, and its tokenizer, None when it is the policy's.

    Args:
        path: directory of the classifier.
        tokenizer: of the policy.
        options: size and number types of the actor.
        key: configuration key that names the classifier.

    Raises:
        ModelError: a classifier or tokenizer that cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelError(f"classifier {path} ({key}) has no tokenizer that transformers can load: {error}") from error
    dtype = weights_dtype(options.policy, actor_device(options.num_gpus))
    model = load_external(path, dtype=dtype, trust_remote_code=options.trust_remote_code, key=key)
    is_same = own.chat_template == tokenizer.chat_template and own.get_vocab() == tokenizer.get_vocab()
    return model, None if is_same else own


def read_facts(directory: Path) -> dict[str, Any]:
    """What `fit_members` says of its directory.

    Raises:
        CheckpointError: it never finished there.
    """
    try:
        facts: dict[str, Any] = json.loads((directory / REWARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} holds no finished reward model ({error}); rerun the reward phase"
        ) from error
    return facts


class PairScorer:
    """Adds each member's rewards to tables of tokenized pairs; holds the models, so it becomes an actor in the pool.

    The columns are `HEAD_REWARD_COLUMNS` and, where members state a sigma, `HEAD_SCALE_COLUMNS`.

    Args:
        model_path: directory of the policy.
        reward_model: `reward_model` section.
        directory: what `fit_members` wrote, None for an external classifier.
        options: size and number types of the actor.
    """

    def __init__(
        self, model_path: str, reward_model: RewardModelSection, directory: str | None, options: ActorOptions
    ) -> None:
        if not options.num_gpus:
            torch.set_num_threads(max(1, int(options.num_cpus)))
        self._reward = make_text_reward(model_path, reward_model, directory=directory, options=options)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with two more columns, lists of M float32 each; with four where members state a sigma."""
        beliefs = self._reward.posterior_of_pairs(pairs_from_table(table))
        for name, scale_name, belief in zip(HEAD_REWARD_COLUMNS, HEAD_SCALE_COLUMNS, beliefs, strict=True):
            table = table.append_column(name, _lists(belief.head_rewards))
            if belief.head_scales is not None:
                table = table.append_column(scale_name, _lists(belief.head_scales))
        return table


def _lists(values_nM: torch.Tensor) -> pa.Array:
    return pa.array(list(values_nM.numpy()), pa.list_(pa.float32()))


def score_dataset(
    pairs: ray.data.Dataset,
    *,
    model_path: str | Path,
    reward_model: RewardModelSection,
    directory: str | Path | None = None,
    options: ActorOptions | None = None,
) -> ray.data.Dataset:
    """Add what `PairScorer` adds, each member's reward of both responses, to every pair; lazy.

    Args:
        pairs: with `TOKEN_COLUMNS`; all columns are kept.
        model_path: directory of the policy, readable on every node.
        reward_model: `reward_model` section.
        directory: what `fit_members` wrote, None for an external classifier.
        options: size and number of the actors.
    """
    import ray.data

    options = options or ActorOptions()
    blocks = pairs.repartition(target_num_rows_per_block=_ROWS_PER_CALL) if options.num_actors > 1 else pairs
    return blocks.map_batches(
        PairScorer,
        fn_constructor_args=(str(model_path), reward_model, None if directory is None else str(directory), options),
        batch_size=_ROWS_PER_CALL,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=options.num_actors),
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        udf_modifying_row_count=False,
    )


def weights_type(policy: PolicySection, device: str) -> ComputeType:
    """The compute type, as for a LoRA policy: the backbone is frozen, adapters and heads are float32."""
    lora = policy.model_copy(update={"adapter": "lora"})
    return policy_numerics(lora, compute_type(policy.dtype, device)).weights


def weights_dtype(policy: PolicySection, device: str) -> torch.dtype:
    """`weights_type`, as torch names it."""
    return resolve_dtype(weights_type(policy, device), device)


def on_device(model: Any, policy: PolicySection, num_gpus: float) -> ClassifierForward:
    """A classifier where it computes, in the number types of the run, in evaluation mode."""
    device = actor_device(num_gpus)
    return ClassifierForward(model.to(device), autocast_dtype=_autocast(policy, device)).eval()


def tokens_on_device(
    model: Any, heads: dict[str, TokenHeads], form: TokenForm, policy: PolicySection, num_gpus: float
) -> TokenRewardForward:
    """Members that reward tokens where they compute, in the number types of the run, in evaluation mode."""
    device = actor_device(num_gpus)
    forward = TokenRewardForward(model, heads, form=form, autocast_dtype=_autocast(policy, device))
    return forward.to(device).eval()


def _autocast(policy: PolicySection, device: str) -> torch.dtype | None:
    dtype = resolve_dtype(policy.dtype, device)
    return None if dtype == torch.float32 else dtype
