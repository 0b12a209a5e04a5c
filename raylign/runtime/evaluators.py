"""What evaluation actors do: answer, judge, and score. Plain classes that also work without Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from raylign.config import EvaluateSection, PolicySection
from raylign.cost.flops import sequence_work
from raylign.cost.ledger import Ledger, measured
from raylign.cost.shapes import forward_flops
from raylign.errors import ConfigError
from raylign.evaluation.generation import GeneratedResponse, generate_responses
from raylign.evaluation.judges import SafetyJudge
from raylign.evaluation.prompts import EvaluationPrompt
from raylign.evaluation.refusal import LabelledResponse, is_refusal
from raylign.evaluation.scoring import RewardFn, score_responses
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer, resolve_layout, resolve_model
from raylign.models.numerics import Parallel, actor_device, compute_type
from raylign.types import Message

LABELS = ""  # in place of a model's name: rows of labelled answers that only the judge looks at


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorOptions:
    """What one evaluation actor is and loads.

    Attributes:
        num_actors: size of the pool.
        num_cpus: CPUs of one actor.
        num_gpus: GPUs of one actor.
        dtype: compute type of the policies.
        trust_remote_code: run code shipped inside model directories.
        adapter: `policy.adapter` and
        parallel: `train.parallel` of the training, which decide the number types of rewards.
        ledger: what actors and tasks of this size cost is recorded here, None not at all.
    """

    num_actors: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    trust_remote_code: bool = False
    adapter: Literal["full", "lora"] = "full"
    parallel: Parallel = "ddp"
    ledger: Ledger | None = None

    @property
    def devices(self) -> dict[str, float]:
        """Of one actor, by kind."""
        return {kind: amount for kind, amount in (("cpu", self.num_cpus), ("gpu", self.num_gpus)) if amount}

    @property
    def pool_devices(self) -> dict[str, float]:
        """Of all actors and of the CPU that reads and writes for them, by kind."""
        return {kind: self.num_actors * amount + (kind == "cpu") for kind, amount in self.devices.items()}

    @property
    def policy(self) -> PolicySection:
        """What decides number types and loading, as a section of the configuration."""
        return PolicySection(dtype=self.dtype, adapter=self.adapter, trust_remote_code=self.trust_remote_code)


class Evaluator:
    """Answers prompts with one policy at a time and judges the answers; a Ray Data actor.

    Args:
        models: name -> directory.
        prompts: all evaluation prompts; batches name them by index.
        config: judge and sampling.
        seed: of the sampling.
        options: dtype and trust.
        make_reward_fn: see `evaluate_models`.
        labels: answers with human labels, for the check of the judge.
        num_samples: answers kept of every prompt, by the policy alone; None keeps the best of `config.best_of`.
        make_cost_fn: gives the costs of the run's cost model; None leaves them nan.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, str],
        prompts: Sequence[EvaluationPrompt],
        config: EvaluateSection,
        seed: int,
        options: ActorOptions,
        make_reward_fn: Callable[[], RewardFn] | None,
        labels: Sequence[LabelledResponse] = (),
        num_samples: int | None = None,
        make_cost_fn: Callable[[], RewardFn] | None = None,
    ) -> None:
        _limit_threads(options)
        self._models = models
        self._prompts = prompts
        self._config = config
        self._seed = seed
        self._options = options
        self._judge = SafetyJudge(
            config.judge,
            device=actor_device(options.num_gpus),
            batch_size=config.batch_size,
            trust_remote_code=options.trust_remote_code,
        )
        self._reward_fn = make_reward_fn() if make_reward_fn is not None else None
        self._cost_fn = make_cost_fn() if make_cost_fn is not None else None
        self._labels = labels
        self._num_samples = num_samples
        self._loaded: tuple[str, Any, Any] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer and judge a batch of (model, index) rows."""
        parts = []
        for name in dict.fromkeys(batch["model"].tolist()):
            indices = batch["index"][batch["model"] == name].tolist()
            parts.append(self._judge_labels(indices) if name == LABELS else self._evaluate(name, indices))
        return {column: np.concatenate([part[column] for part in parts]) for column in parts[0]}

    def _judge_labels(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        rows = [self._labels[index] for index in indices]
        costs = self._judge.cost([row.prompt for row in rows], [row.response for row in rows])
        return {
            "model": np.array([LABELS] * len(rows), dtype=object),
            "index": np.array(indices),
            "sample": np.zeros(len(rows), np.int64),
            "response": np.array([row.response for row in rows], dtype=object),
            "num_tokens": np.zeros(len(rows), np.int64),
            "reached_end": np.ones(len(rows), bool),
            "cost": costs.astype(np.float64),
            "is_refusal": np.array([is_refusal(row.response) for row in rows]),
            "reward": np.full(len(rows), np.nan),
            "model_cost": np.full(len(rows), np.nan),
        }

    def _evaluate(self, name: str, indices: Sequence[int]) -> dict[str, np.ndarray]:
        model, tokenizer = self._policy(name)
        prompts = [self._prompts[index] for index in indices]
        with measured(self._options.ledger, "answer", self._options.devices) as entry:
            answers = generate_responses(
                model,
                tokenizer,
                [prompt.messages for prompt in prompts],
                max_new_tokens=self._config.max_new_tokens,
                temperature=self._config.temperature,
                batch_size=self._config.batch_size,
                seed=self._seed,
                num_samples=self._num_samples or self._config.best_of,
            )
            entry.add(**generation_counts(model, answers, batch_size=self._config.batch_size))
        with measured(self._options.ledger, "judge", self._options.devices) as entry:
            entry.add(num_items=len(answers))
            rewards = self._priced(self._reward_fn, prompts, answers)
            if self._num_samples is None:
                chosen = best_answers(rewards, self._config.best_of)
                answers, rewards = [answers[row] for row in chosen], rewards[chosen]
            model_costs = self._priced(self._cost_fn, prompts, answers)
            texts = [answer.text for answer in answers]
            asked = [prompts[answer.prompt_index].text for answer in answers]
            costs = self._judge.cost(asked, texts).astype(np.float64)
        return {
            "model": np.array([name] * len(texts), dtype=object),
            "index": np.array([indices[answer.prompt_index] for answer in answers]),
            "sample": np.array([answer.sample_index for answer in answers]),
            "response": np.array(texts, dtype=object),
            "num_tokens": np.array([len(answer.response_ids) for answer in answers]),
            "reached_end": np.array([answer.reached_end for answer in answers]),
            "cost": costs,
            "is_refusal": np.array([is_refusal(text) for text in texts]),
            "reward": rewards,
            "model_cost": model_costs,
        }

    def _priced(
        self, price: RewardFn | None, prompts: Sequence[EvaluationPrompt], answers: Sequence[GeneratedResponse]
    ) -> np.ndarray:
        """What a model of texts says of answers (N,), nan without one."""
        if price is None:
            return np.full(len(answers), np.nan)
        return price([prompts[answer.prompt_index].messages for answer in answers], [a.text for a in answers])

    def _policy(self, name: str) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # frees the other policy before this one is loaded
            self._loaded = (name, *_load(self._models[name], self._options))
        return self._loaded[1:]


def best_answers(rewards: np.ndarray, best_of: int) -> np.ndarray:
    """Best-of-n: rows of the answers with the highest reward of their prompt, the first of equal ones.

    Args:
        rewards: (P * best_of,) with the answers of a prompt in a row.
        best_of: n.

    Returns:
        (P,) int64.

    Raises:
        ConfigError: there is something to choose from, and no reward to choose by.
    """
    if best_of > 1 and np.isnan(rewards).any():
        raise ConfigError(
            f"evaluate.best_of={best_of} chooses by the run's reward, which this evaluation does not have; evaluate "
            "inside a run (raylign align), give make_reward_fn, or set evaluate.best_of=1"
        )
    by_prompt = rewards.reshape(-1, best_of)
    rows: np.ndarray = np.arange(len(by_prompt)) * best_of + (by_prompt.argmax(axis=1) if best_of > 1 else 0)
    return rows


class DriftScorer:
    """Holds reference and policy, samples from both and scores every sample under both.

    Args:
        reference_path: the policy before training.
        policy_path: the policy after it.
        prompts: conversations; batches name them by index.
        config: number of candidates, length limit.
        seed: of the sampling.
        options: dtype and trust.
    """

    def __init__(
        self,
        *,
        reference_path: str,
        policy_path: str,
        prompts: Sequence[Sequence[Message]],
        config: EvaluateSection,
        seed: int,
        options: ActorOptions,
    ) -> None:
        _limit_threads(options)
        self._reference, self._tokenizer = _load(reference_path, options)
        self._policy, _ = _load(policy_path, options)
        self._prompts = prompts
        self._config = config
        self._seed = seed
        self._options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Log-probabilities of K candidates and K fresh answers of each prompt, shapes (P, K)."""
        prompts = [self._prompts[index] for index in batch["index"].tolist()]
        with measured(self._options.ledger, "drift", self._options.devices) as entry:
            # another seed for the fresh answers: under the same noise they would be the candidates' twins
            candidates = self._sample(self._reference, prompts, self._seed)
            fresh = self._sample(self._policy, prompts, self._seed + 1)
            for model, answers in ((self._reference, candidates), (self._policy, fresh)):
                entry.add(**generation_counts(model, answers, batch_size=self._config.batch_size))
            scored_tokens = sum(len(answer.prompt_ids) + len(answer.response_ids) for answer in candidates + fresh)
            entry.add(forward_tokens=2 * scored_tokens)
            return {
                "index": batch["index"],
                "reference_mean_logps": self._score(self._reference, candidates, is_mean=True),
                "policy_mean_logps": self._score(self._policy, candidates, is_mean=True),
                "fresh_policy_logps": self._score(self._policy, fresh, is_mean=False),
                "fresh_reference_logps": self._score(self._reference, fresh, is_mean=False),
            }

    def _sample(self, model: Any, prompts: Sequence[Sequence[Message]], seed: int) -> list[GeneratedResponse]:
        return generate_responses(
            model,
            self._tokenizer,
            prompts,
            max_new_tokens=self._config.max_new_tokens,
            temperature=1.0,
            batch_size=self._config.batch_size,
            seed=seed,
            num_samples=self._config.drift_candidates,
        )

    def _score(self, model: Any, answers: Sequence[GeneratedResponse], *, is_mean: bool) -> np.ndarray:
        forward = PolicyForward(model)
        scored = score_responses(
            forward,
            [answer.prompt_ids for answer in answers],
            [answer.response_ids for answer in answers],
            layout=resolve_layout("auto", forward.causal_lm.config),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        values = scored.mean_logps if is_mean else scored.logps
        return values.reshape(-1, self._config.drift_candidates)


def generation_counts(model: Any, answers: Sequence[GeneratedResponse], *, batch_size: int) -> dict[str, int]:
    """What sampling took, for the ledger.

    Args:
        model: that sampled.
        answers: of one call of `generate_responses`.
        batch_size: of that call, which ran all steps of a batch until its longest answer ended.
    """
    flops = forward_flops(model)
    in_batches = sorted(answers, key=lambda answer: len(answer.prompt_ids))
    batches = [in_batches[start : start + batch_size] for start in range(0, len(answers), batch_size)]
    return {
        "num_items": len(answers),
        "prompt_tokens": sum(len(answer.prompt_ids) for answer in answers),
        "generated_tokens": sum(len(answer.response_ids) for answer in answers),
        "decode_steps": sum(max(len(answer.response_ids) for answer in batch) for batch in batches),
        "flops": sum(
            flops(
                sequence_work(len(answer.prompt_ids) + len(answer.response_ids), scored_tokens=len(answer.response_ids))
            )
            for answer in answers
        ),
    }


def _limit_threads(options: ActorOptions) -> None:
    """As many threads as CPUs were asked for: more than there are makes two actors an order of magnitude slower."""
    if not options.num_gpus:
        torch.set_num_threads(max(1, int(options.num_cpus)))


def _load(path: str, options: ActorOptions) -> tuple[Any, Any]:
    directory, device = resolve_model(path), actor_device(options.num_gpus)
    dtype = compute_type(options.dtype, device)
    model = load_policy(directory, dtype=dtype, trust_remote_code=options.trust_remote_code)
    return model.to(device), load_tokenizer(directory, trust_remote_code=options.trust_remote_code)
