"""The online training loop of one worker, without Ray: rounds are opened by a callback, updates are plain steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from raylign.config import RunConfig
from raylign.constraints.multipliers import MultiplierState
from raylign.training.constrained import cost_facts, multiplier_facts, open_multiplier, round_constraint
from raylign.training.gradient import RoundTargets, gradient_update, round_targets
from raylign.training.gradient_metrics import GradientWindow
from raylign.training.loop import CheckpointCallback, RecordCallback
from raylign.training.micro_batches import Packing
from raylign.training.offline import offline_update
from raylign.training.online_pairs import choose_pairs, couple_responses, preference_batch
from raylign.training.rounds import Round, RoundSchedule
from raylign.training.state import TrainerState
from raylign.training.update_costs import UpdateCosts
from raylign.training.world import World
from raylign.types import TokenizedPair

OpenRound = Callable[[int, TrainerState], Round]
ShapeRewards = Callable[[Round], np.ndarray]


def train_online(
    state: TrainerState,
    open_round: OpenRound,
    schedule: RoundSchedule,
    *,
    config: RunConfig,
    packing: Packing,
    world: World | None = None,
    on_record: RecordCallback = lambda record: None,
    on_checkpoint: CheckpointCallback = lambda state, record: None,
    costs: UpdateCosts | None = None,
    shape_rewards: ShapeRewards | None = None,
) -> dict[str, float]:
    """Run the updates that `state` has not finished yet.

    Args:
        state: changed in place; `state.update` says where to start, in the middle of a round as well. With a
            multiplier, that moves when a round is opened.
        open_round: gives round `index`, from 0: the stored one, or one sampled from the state's weights. Called on
            every worker, at the first update of a round and after a resume.
        schedule: which prompts a round and an update take.
        config: of the run.
        packing: how micro-batches are cut.
        world: this worker.
        on_record: gets the metrics of every `train.log_every` updates and of the last one of every round, the latter
            with the facts of the round.
        on_checkpoint: called after the last update of every round and every `train.checkpoint_every` updates.
        costs: what the updates cost is recorded here; what opening a round costs is up to `open_round`.
        shape_rewards: gives the rewards (n,) that the round's updates maximise, before a constraint weighs the costs
            against them; called once whenever a round is opened, and again after a resume, so it must not change its
            own state. None takes the rewards of the responses.

    Returns:
        The record of the last update; empty when there was nothing left to do.

    Raises:
        TrainingError: the loss or the gradient is not finite, or a constraint misses the cost of a response.
        CheckpointError: `state` and the rounds do not belong together.
    """
    settings = config.train
    record: dict[str, float] = {}
    current: _OpenRound | None = None
    with costs or UpdateCosts() as costs:
        while state.update < schedule.num_updates:
            index = state.update // schedule.updates_per_round
            if current is None or current.round_.index != index:
                round_ = open_round(index, state)
                if shape_rewards:
                    round_ = round_.with_rewards(shape_rewards(round_))
                if state.multiplier is not None:
                    state.multiplier = open_multiplier(state.multiplier, round_, settings=config.constraint)
                current = _OpenRound(round_, config, state.multiplier)
                state.window.restart_clock()
            costs.begin()
            costs.count(current.update(state, schedule.batch(state.update), packing=packing, world=world))
            state.update += 1
            is_end = state.update % schedule.updates_per_round == 0
            is_logged = is_end or state.update % settings.log_every == 0
            is_checkpoint = is_end or state.update % settings.checkpoint_every == 0
            if is_logged or is_checkpoint:
                costs.end()
                record = state.window.record(step=state.update, epoch=state.update / schedule.updates_per_round)
                record |= {"round": index + 1, **(current.facts if is_end else {})}
            if is_logged:
                on_record(record)
                state.window.clear()
            if is_checkpoint:
                on_checkpoint(state, record)
                state.window.restart_clock()
    return record


class _OpenRound:
    """A round and what its updates read, computed once."""

    def __init__(self, round_: Round, config: RunConfig, multiplier: MultiplierState | None) -> None:
        self.round_ = round_
        self._config = config
        self._multiplier = multiplier
        self._pairs: list[tuple[int, int]] = []
        self._targets: RoundTargets | None = None
        if config.train.method == "policy_gradient":
            constraint = None
            if multiplier is not None:
                constraint = round_constraint(round_, multiplier, settings=config.constraint)
            self._targets = round_targets(round_, settings=config.policy_gradient, constraint=constraint)
        else:
            self._pairs = choose_pairs(round_, rule=config.online.pairs, seed=config.run.seed)

    @property
    def facts(self) -> dict[str, float]:
        """Numbers of the round for its last record."""
        constraint = self._config.constraint
        facts = {**self.round_.facts, **(self._targets.facts if self._targets is not None else {})}
        facts |= cost_facts(self.round_, settings=constraint)
        if self._multiplier is not None:
            facts |= multiplier_facts(self._multiplier, settings=constraint)
        if self._pairs:
            rewards = self.round_.rewards
            margins = np.array([rewards[chosen] - rewards[rejected] for chosen, rejected in self._pairs])
            facts["online/reward_margin"] = float(margins.mean())
            facts["online/tied_pairs"] = int((margins == 0).sum())
        return facts

    def update(
        self, state: TrainerState, prompts: np.ndarray, *, packing: Packing, world: World | None
    ) -> Sequence[TokenizedPair]:
        """One update; returns the pairs or couples that went forward and backward."""
        config = self._config
        if self._targets is None:
            batch = preference_batch(self.round_, self._pairs, prompts, reference=config.online.reference)
            assert not isinstance(state.window, GradientWindow)
            state.window.add(
                offline_update(
                    state.policy,
                    state.optimizer,
                    state.scheduler,
                    batch,
                    update=state.update,
                    settings=config.train,
                    packing=packing,
                    seed=config.run.seed,
                    world=world,
                )
            )
            return batch.tokens
        assert isinstance(state.window, GradientWindow)
        state.window.add(
            gradient_update(
                state.policy,
                state.optimizer,
                state.scheduler,
                self.round_,
                self._targets,
                prompts,
                update=state.update,
                settings=config.train,
                gradient=config.policy_gradient,
                packing=packing,
                seed=config.run.seed,
                world=world,
            )
        )
        return couple_responses(self.round_, prompts).tokens
