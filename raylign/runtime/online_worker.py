"""What runs inside one Ray Train worker of the online methods.

The loop is `raylign.training.online_loop`; this file opens rounds for it: the first worker sends the weights to the
engines, lets them sample, has the responses scored and writes the round; then all workers read it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import ray.train.collective

from raylign import errors
from raylign.cost.flops import Work
from raylign.cost.ledger import Entry, measured
from raylign.cost.shapes import forward_flops
from raylign.errors import CheckpointError, RaylignError, SamplerError, TrainingError
from raylign.runtime.prompts import read_prompts
from raylign.runtime.reporter import Reporter
from raylign.runtime.round_facts import forward_work, round_facts, sample_requests, sampling_counts, sampling_flops
from raylign.runtime.sampler import SamplerPool
from raylign.runtime.train_worker import WorkerTask, final_error, load_policy_forward, start_worker, update_costs
from raylign.runtime.weight_sync import Probe, WeightUpdate
from raylign.runtime.weight_transfer import check_transfer
from raylign.types import Rollout, ScoredRollout, TokenizedPair

if TYPE_CHECKING:
    from raylign.training.micro_batches import Packing
    from raylign.training.rounds import Round, RoundSchedule, RoundStore
    from raylign.training.state import TrainerState
    from raylign.training.world import World

_MESSAGE_CHARACTERS = 700  # Ray Train broadcasts up to about a kilobyte
_PROBE_TOKENS = 256
_CHECKED_PROMPTS = 8  # of a round, whose responses tell how far trainer and sampler are apart


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
    if config.sampler.weight_transfer == "nccl":
        check_transfer()
    world = start_worker(config)
    prompts = read_prompts(task.pairs)
    schedule = round_schedule(task, len(prompts))
    identity = task.identity
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


def build_online_state(
    task: OnlineTask, schedule: RoundSchedule, world: World, *, checkpoint: Path | None = None
) -> tuple[TrainerState, Packing]:
    """Policy, value heads, optimizer and schedule of one worker; see `train_worker.build_state`."""
    from raylign.models.loading import load_tokenizer, resolve_layout
    from raylign.training.constrained import start_multiplier
    from raylign.training.gradient_metrics import GradientWindow
    from raylign.training.metrics import MetricWindow
    from raylign.training.micro_batches import Packing
    from raylign.training.optim import build_optimizer, build_scheduler
    from raylign.training.parallel import distribute, unwrap
    from raylign.training.state import TrainerState

    config = task.config
    train, gradient = config.train, config.policy_gradient
    is_gradient = train.method == "policy_gradient"
    multiplier = start_multiplier(config.constraint) if is_gradient else None
    num_values = 0
    if is_gradient and gradient.advantage == "gae":
        num_values = 1 if multiplier is None else 2  # of the reward, and of the cost
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
        heads=unwrap(module).value_heads,
        head_learning_rate=gradient.value_learning_rate,
    )
    scheduler = build_scheduler(
        optimizer, schedule=train.schedule, num_updates=schedule.num_updates, warmup_fraction=train.warmup_fraction
    )
    window = GradientWindow(has_cost_values=num_values > 1) if is_gradient else MetricWindow(has_confidence=False)
    state = TrainerState(policy=module, optimizer=optimizer, scheduler=scheduler, window=window, multiplier=multiplier)
    return state, packing


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
        is_start = state.update == index * self._schedule.updates_per_round
        if self._agree(lambda: not self._store.has(index)):
            self._require(is_start, index, "the responses")
            with self._measure("weight_sync"):
                update = self._weight_update(state, version=index + 1)
            self._agree(lambda: self._sample(index, update, forward_flops(unwrapped(state))))
        round_ = self._store.read(index)
        if self._reads_policy and round_.policy_logps is None:
            self._require(is_start, index, "the trainer's log-probabilities")
            return self._add_policy(round_, state)
        if not self._reads_policy and is_start and "importance/difference_max" not in round_.facts:
            return self._add_importance(round_, state)
        return round_

    def _require(self, is_start: bool, index: int, what: str) -> None:
        """Weights in the middle of a round are not those that its responses and numbers must come from."""
        if not is_start:
            raise CheckpointError(
                f"{what} of round {index + 1} are missing from {self._task.rounds}, and the newest checkpoint lies in "
                "the middle of that round; restore them from a backup, or start under a new run.name"
            )

    @property
    def _shares_prompts(self) -> bool:
        return self._packing.layout == "shared"

    @property
    def _scorer_shares_prompts(self) -> bool:
        """The scorer chooses its layout itself."""
        from raylign.models.loading import load_config, resolve_layout

        reference = load_config(self._task.model, trust_remote_code=self._config.policy.trust_remote_code)
        return resolve_layout("auto", reference) == "shared"

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
                kind = type(error).__name__
                known = kind if hasattr(errors, kind) else TrainingError.__name__
                outcome = (known, str(error)[:_MESSAGE_CHARACTERS])
        kind, value = ray.train.collective.broadcast_from_rank_zero(outcome)
        if kind == "done":
            return value
        raise getattr(errors, kind)(value)

    def _weight_update(self, state: TrainerState, *, version: int) -> WeightUpdate | None:
        """The policy's weights and the proof of them; None on all workers but the first."""
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

            model = unwrapped(state)
            weights = get_peft_model_state_dict(model, state_dict=weights)
            adapter = model.peft_config["default"].to_dict()
        probe = Probe(token_ids=tuple(probe_ids.tolist()), token_logps=logps[: len(probe_ids) - 1])
        return WeightUpdate(version=version, weights=weights, adapter=adapter, probe=probe)

    def _probe_ids(self) -> np.ndarray:
        """The longest prompt, cut: real text that needs no response."""
        longest = max(range(len(self._prompts)), key=lambda row: len(self._prompts[row]))
        return self._prompts[longest][:_PROBE_TOKENS]

    def _sample(self, index: int, update: WeightUpdate | None, flops: Callable[[Work], int]) -> None:
        """Weights out, responses in, scored and stored; on the first worker only."""
        assert update is not None
        sampler = self._task.sampler
        with self._measure("weight_sync") as entry:
            sync = sampler.sync(update)
            entry.add(synced_bytes=sync.num_bytes)
            entry.saw_peak(sampler.usage.peak_rss_mib, sampler.usage.peak_device_mib)
        requests = sample_requests(self._prompts, self._schedule.prompts(index), index, self._config)
        start = time.monotonic()
        with self._measure("generate") as entry:
            rollouts = sampler.generate(requests)
            usage = sampler.usage
            entry.saw_peak(usage.peak_rss_mib, usage.peak_device_mib)
            entry.add(
                **sampling_counts(rollouts), decode_steps=usage.decode_steps, flops=sampling_flops(rollouts, flops)
            )
        sampling_s = time.monotonic() - start
        start = time.monotonic()
        with self._measure("score") as entry:
            scored = self._score(rollouts)
            entry.saw_peak(*ray.get(self._task.scorer.peak_memory.remote(), timeout=self._config.sampler.timeout_s))
            work = forward_work(rollouts, is_shared=self._scorer_shares_prompts)
            entry.add(num_items=len(rollouts), forward_tokens=work.tokens, flops=flops(work))
        facts = round_facts(scored, sync) | {
            "timing_s/generate": sampling_s,
            "timing_s/score": time.monotonic() - start,
        }
        self._store.write(index, scored, facts)

    def _measure(self, phase: str) -> AbstractContextManager[Entry]:
        """An entry of the ledger, written by the first worker for all."""
        if self._world.rank:
            return nullcontext(Entry())
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
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaylignError):
                raise error.cause from error
            raise SamplerError(
                f"the scorer failed on {len(rollouts)} responses: {type(error.cause).__name__}: {error.cause}"
            ) from error
        return scored

    def _add_policy(self, round_: Round, state: TrainerState) -> Round:
        """What the trainer says of a round at its start, kept beside it."""
        from raylign.training.response_logps import round_logps

        with self._measure("policy_forward") as entry:
            logps, values = round_logps(state.policy, round_, packing=self._packing, world=self._world)
            work = forward_work([item.rollout for item in round_.scored], is_shared=self._shares_prompts)
            flops = forward_flops(unwrapped(state))(work)
            entry.add(num_items=len(round_.scored), forward_tokens=work.tokens, flops=flops)
        self._agree(lambda: self._store.write_policy(round_.index, logps, values))
        return round_.with_policy(logps, values)

    def _add_importance(self, round_: Round, state: TrainerState) -> Round:
        """How far trainer and sampler are from each other, on the responses to the first prompts of the round."""
        from raylign.training.gradient import importance_facts
        from raylign.training.response_logps import round_logps

        first = {position for members in round_.by_prompt[:_CHECKED_PROMPTS] for position in members}
        part = replace(round_, scored=tuple(item for position, item in enumerate(round_.scored) if position in first))
        with self._measure("policy_forward") as entry:
            logps, values = round_logps(state.policy, part, packing=self._packing, world=self._world)
            work = forward_work([item.rollout for item in part.scored], is_shared=self._shares_prompts)
            flops = forward_flops(unwrapped(state))(work)
            entry.add(num_items=len(part.scored), forward_tokens=work.tokens, flops=flops)
        facts = importance_facts(part.with_policy(logps, values), cap=math.inf)
        self._agree(lambda: self._store.add_facts(round_.index, facts))
        return replace(round_, facts={**round_.facts, **facts})


def unwrapped(state: TrainerState) -> Any:
    """The model below the trainer's wrappers."""
    from raylign.training.parallel import unwrap

    return unwrap(state.policy).model
