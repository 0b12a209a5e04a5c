"""What runs inside one Ray Train worker of the online methods.

The loop is `raylign.training.online_loop`; this file opens rounds for it: the first worker sends the weights to the
engines, lets them sample, has the responses scored and writes the round; then all workers read it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import ray.train.collective

from raylign.cost.flops import sequence_work
from raylign.cost.ledger import Entry, measured
from raylign.cost.shapes import forward_flops
from raylign.errors import RaylignError, SamplerError, TrainingError
from raylign.runtime.prompts import read_prompts
from raylign.runtime.reporter import Reporter
from raylign.runtime.sampler import SamplerPool
from raylign.runtime.train_worker import WorkerTask, final_error, load_policy_forward, start_worker, update_costs
from raylign.runtime.weight_sync import Probe, SyncReport, WeightUpdate
from raylign.types import Rollout, SampleRequest, ScoredRollout, TokenizedPair

if TYPE_CHECKING:
    from raylign.training.micro_batches import Packing
    from raylign.training.rounds import Round, RoundSchedule, RoundStore
    from raylign.training.state import TrainerState
    from raylign.training.world import World

_MESSAGE_CHARACTERS = 700  # Ray Train broadcasts up to about a kilobyte
_PROBE_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineTask(WorkerTask):
    """What the driver tells every worker of an online run; `pairs` is the file of prompts.

    Attributes:
        rounds: directory of the rounds.
        sampler: engines that the driver started.
        scorer: actor handle of a `ResponseScorer`.
    """

    rounds: str
    sampler: SamplerPool
    scorer: Any


def online_worker(loop_config: Mapping[str, Any]) -> TrainingError | None:
    """Train function of Ray Train; see `raylign.runtime.train_worker.train_worker`.

    Args:
        loop_config: {"task": OnlineTask}.
    """
    return final_error(lambda: _train(loop_config["task"]))


def _train(task: OnlineTask) -> None:
    from raylign.training.online_loop import train_online
    from raylign.training.rounds import RoundStore
    from raylign.training.state import check_checkpoint, load_training

    config = task.config
    world = start_worker(config)
    prompts = read_prompts(task.pairs)
    schedule = round_schedule(task, len(prompts))
    identity = task.identity | {"prompts": prompts_fingerprint(prompts)}
    reporter = Reporter(task, world, identity)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        state, packing = build_online_state(task, schedule, world)
    else:
        with checkpoint.as_directory() as path:
            directory = Path(path)
            check_checkpoint(directory, identity)
            state, packing = build_online_state(task, schedule, world, checkpoint=directory)
            load_training(directory, state)
    reporter.start(state.update)
    opener = RoundOpener(
        task, prompts=prompts, schedule=schedule, store=RoundStore(task.rounds), packing=packing, world=world
    )
    train_online(
        state,
        opener,
        schedule,
        config=config,
        packing=packing,
        world=world,
        on_record=reporter.record,
        on_checkpoint=reporter.checkpoint,
        costs=update_costs(task, state, packing, world),
    )


def round_schedule(task: OnlineTask, num_prompts: int) -> RoundSchedule:
    """Rounds and updates of a run."""
    from raylign.training.rounds import RoundSchedule

    online = task.config.online
    return RoundSchedule(
        num_prompts=num_prompts,
        prompts_per_round=online.prompts_per_round,
        num_rounds=online.num_rounds,
        batch_size=task.config.train.batch_size,
        round_epochs=online.round_epochs,
        seed=task.config.run.seed,
    )


def prompts_fingerprint(prompts: Sequence[np.ndarray]) -> str:
    """Hash of the token ids of all prompts."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in prompts:
        digest.update(np.int64(len(ids)).tobytes())
        digest.update(ids.astype(np.int32).tobytes())
    return digest.hexdigest()


def build_online_state(
    task: OnlineTask, schedule: RoundSchedule, world: World, *, checkpoint: Path | None = None
) -> tuple[TrainerState, Packing]:
    """Policy, value heads, optimizer and schedule of one worker; see `train_worker.build_state`."""
    from raylign.models.loading import load_tokenizer, resolve_layout
    from raylign.training.gradient_metrics import GradientWindow
    from raylign.training.metrics import MetricWindow
    from raylign.training.micro_batches import Packing
    from raylign.training.optim import build_optimizer, build_scheduler
    from raylign.training.parallel import distribute, unwrap
    from raylign.training.state import TrainerState

    config = task.config
    train, gradient = config.train, config.policy_gradient
    is_gradient = train.method == "policy_gradient"
    num_values = 1 if is_gradient and gradient.advantage == "gae" else 0
    policy = load_policy_forward(task, world, checkpoint=checkpoint, num_values=num_values)
    tokenizer = load_tokenizer(task.model, trust_remote_code=config.policy.trust_remote_code)
    packing = Packing(
        layout=resolve_layout(train.layout, policy.causal_lm.config),
        pad_token_id=tokenizer.pad_token_id,
        batch_tokens=train.batch_tokens,
    )
    module = distribute(policy, parallel=train.parallel, world=world)
    optimizer = build_optimizer(
        module,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        value_heads=unwrap(module).value_heads,
        value_learning_rate=gradient.value_learning_rate,
    )
    scheduler = build_scheduler(
        optimizer, schedule=train.schedule, num_updates=schedule.num_updates, warmup_fraction=train.warmup_fraction
    )
    window = GradientWindow() if is_gradient else MetricWindow(has_confidence=False)
    return TrainerState(policy=module, optimizer=optimizer, scheduler=scheduler, window=window), packing


class RoundOpener:
    """Gives the loop its rounds: from disk, or sampled from the weights at hand.

    Args:
        task: from the driver.
        prompts: token ids of all prompts.
        schedule: which prompts a round takes.
        store: where rounds are kept.
        packing: of forwards.
        world: this worker.
    """

    def __init__(
        self,
        task: OnlineTask,
        *,
        prompts: Sequence[np.ndarray],
        schedule: RoundSchedule,
        store: RoundStore,
        packing: Packing,
        world: World,
    ) -> None:
        self._task = task
        self._config = task.config
        self._prompts = prompts
        self._schedule = schedule
        self._store = store
        self._packing = packing
        self._world = world

    def __call__(self, index: int, state: TrainerState) -> Round:
        """Round `index`; all workers call it together."""
        from raylign.training.parallel import unwrap

        is_new = self._agree(lambda: not self._store.has(index))
        if is_new:
            update = self._weight_update(state, version=index + 1)
            self._agree(lambda: self._sample(index, update, response_flops(unwrap(state.policy).model)))
        round_ = self._store.read(index)
        if self._reads_policy and round_.policy_logps is None:
            round_ = self._add_policy(round_, state)
        return round_

    @property
    def _reads_policy(self) -> bool:
        config = self._config
        return config.train.method == "policy_gradient" or config.online.reference == "previous_round"

    def _agree(self, work: Callable[[], Any]) -> Any:
        """Do something on the first worker; all get its (small) result, or its error."""
        outcome: Any = None
        if self._world.rank == 0:
            try:
                outcome = ("done", work())
            except RaylignError as error:
                outcome = (type(error).__name__, str(error)[:_MESSAGE_CHARACTERS])
        kind, value = ray.train.collective.broadcast_from_rank_zero(outcome)
        if kind == "done":
            return value
        from raylign import errors

        raise getattr(errors, kind)(value)

    def _weight_update(self, state: TrainerState, *, version: int) -> WeightUpdate | None:
        """The policy's weights and the proof of them; None on all workers but the first."""
        from raylign.training.parallel import unwrap
        from raylign.training.response_logps import pair_token_logps
        from raylign.training.state import full_weights

        weights = full_weights(state.policy)
        probe_ids = self._probe_ids()
        pair = TokenizedPair(prompt_ids=probe_ids[:1], chosen_ids=probe_ids[1:], rejected_ids=probe_ids[1:2])
        logps, _ = pair_token_logps(state.policy, [pair], packing=self._packing, world=self._world)
        if self._world.rank != 0:
            return None
        adapter: dict[str, Any] | None = None
        if self._config.policy.adapter == "lora":
            from peft import get_peft_model_state_dict

            model = unwrap(state.policy).model
            weights = get_peft_model_state_dict(model, state_dict=weights)
            adapter = model.peft_config["default"].to_dict()
        probe = Probe(token_ids=tuple(probe_ids.tolist()), token_logps=logps[: len(probe_ids) - 1])
        return WeightUpdate(version=version, weights=weights, adapter=adapter, probe=probe)

    def _probe_ids(self) -> np.ndarray:
        """The longest prompt, cut: real text that needs no response."""
        longest = max(range(len(self._prompts)), key=lambda row: len(self._prompts[row]))
        return self._prompts[longest][:_PROBE_TOKENS]

    def _sample(self, index: int, update: WeightUpdate | None, flops: Callable[[Rollout], int]) -> None:
        """Weights out, responses in, scored and stored; on the first worker only."""
        assert update is not None
        with self._measure("weight_sync") as entry:
            sync = self._task.sampler.sync(update)
            entry.add(synced_bytes=sync.num_bytes)
        requests = sample_requests(self._prompts, self._schedule.prompts(index), index, self._config)
        start = time.monotonic()
        with self._measure("generate") as entry:
            rollouts = self._task.sampler.generate(requests)
            entry.add(**sampling_counts(rollouts), flops=sum(map(flops, rollouts)))
        sampling_s = time.monotonic() - start
        start = time.monotonic()
        with self._measure("score") as entry:
            scored = self._score(rollouts)
            entry.add(num_items=len(rollouts), forward_tokens=num_tokens(rollouts), flops=sum(map(flops, rollouts)))
        facts = round_facts(scored, sync) | {
            "timing_s/generate": sampling_s,
            "timing_s/score": time.monotonic() - start,
        }
        self._store.write(index, scored, facts)

    def _measure(self, phase: str) -> AbstractContextManager[Entry]:
        return measured(self._task.ledger, phase, self._task.devices)

    def _score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        timeout = self._config.sampler.timeout_s
        try:
            scored: list[ScoredRollout] = ray.get(self._task.scorer.score.remote(list(rollouts)), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise SamplerError(
                f"the scorer did not score {len(rollouts)} responses within sampler.timeout_s={timeout:g}; raise it, "
                "or give the scorer more CPUs or a GPU (sampler.scorer_cpus, sampler.scorer_gpus)"
            ) from error
        except ray.exceptions.RayActorError as error:
            raise SamplerError(
                f"the scorer died while it scored {len(rollouts)} responses ({error}); finished rounds are kept, "
                "continue with run.resume=true"
            ) from error
        return scored

    def _add_policy(self, round_: Round, state: TrainerState) -> Round:
        """What the trainer says of a round at its start, kept beside it."""
        from raylign.training.response_logps import round_logps

        work = nullcontext(Entry()) if self._world.rank else self._measure("policy_forward")
        with work as entry:
            logps, values = round_logps(state.policy, round_, packing=self._packing, world=self._world)
            entry.add(
                forward_tokens=sum(len(s.rollout.prompt_ids) + len(s.rollout.response_ids) for s in round_.scored)
            )
        self._agree(lambda: self._store.write_policy(round_.index, logps, values))
        return round_.with_policy(logps, values)


def sample_requests(prompts: Sequence[np.ndarray], rows: np.ndarray, index: int, config: Any) -> list[SampleRequest]:
    """K requests for each prompt of a round, prompts in a row.

    Args:
        prompts: token ids of all prompts.
        rows: of the prompts of the round. Shape (P,).
        index: of the round; the same prompt in another round gets other random streams.
        config: of the run, for the number of samples and the seed.
    """
    requests = []
    for position, row in enumerate(rows):
        for sample in range(config.online.num_samples):
            name = f"{config.run.seed}:{index}:{row}:{sample}".encode()
            # 31 bits, which every random generator takes
            seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1
            requests.append(
                SampleRequest(prompt_index=position, sample_index=sample, prompt_ids=prompts[row], seed=seed)
            )
    return requests


def sampling_counts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Counts of one call for responses, for the ledger.

    `decode_steps` counts sequential forwards as if one engine ran all requests at once: the longest response.
    """
    return {
        "prompt_tokens": sum(len(rollout.prompt_ids) for rollout in rollouts),
        "generated_tokens": sum(len(rollout.response_ids) for rollout in rollouts),
        "decode_steps": max(len(rollout.response_ids) for rollout in rollouts),
        "num_items": len(rollouts),
    }


def num_tokens(rollouts: Sequence[Rollout]) -> int:
    """Prompt and response tokens, each response with a prompt of its own."""
    return sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)


def response_flops(model: Any) -> Callable[[Rollout], int]:
    """Model FLOPs of sampling or scoring one response: its prompt, and logits for its own tokens only.

    Prompts that an engine's cache or a shared layout computes once for several responses are counted with each.
    """
    forward = forward_flops(model)
    return lambda rollout: forward(
        sequence_work(len(rollout.prompt_ids) + len(rollout.response_ids), scored_tokens=len(rollout.response_ids))
    )


def round_facts(scored: Sequence[ScoredRollout], sync: SyncReport) -> dict[str, float]:
    """Metrics of a round under the names of the field."""
    rewards = np.array([item.reward for item in scored])
    lengths = np.array([len(item.rollout.response_ids) for item in scored])
    logps = np.array([item.rollout.sampler_logps.sum() for item in scored])
    reference = np.array([item.reference_token_logps.sum() for item in scored])
    return {
        "critic/score/mean": float(rewards.mean()),
        "critic/score/std": float(rewards.std()),
        "response_length/mean": float(lengths.mean()),
        "response_length/clip_ratio": float(np.mean([not item.rollout.reached_end for item in scored])),
        "sampler/reference_kl": float((logps - reference).mean()),
        "sync/seconds": sync.seconds,
        "sync/bytes": sync.num_bytes,
        "sync/version": sync.version,
        "sync/probe_kl": sync.probe_kl,
    }
