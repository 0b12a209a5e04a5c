"""One trial of a sweep: a run's own phases after those that are shared, in an actor that can be told to stop.

Ray Tune ends a trial by ending its actor. The controller of Ray Train dies with it, but the placement group of its
workers does not: a placement group lives until its job ends, and the helper of Ray Train that would remove it asks the
dashboard, which a local Ray has not. Therefore the work is done by an actor beside (`TrialRunner`), which is told to
stop and ends its controller in good order; only then does Tune's actor go, unless the sweep is over and Tune does not
wait for it (`tuning.placement_groups`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train.v2._internal.execution.callback import ControllerCallback  # has no public name in 2.60
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylign.config import RunConfig, load_config, needs_cost
from raylign.errors import ConfigError
from raylign.runtime.phases import CONFIG_FILE, MANIFEST, digest, write_json
from raylign.runtime.run_phases import CostPhase, open_phases
from raylign.runtime.trainer import METRICS_FILE
from tuning.sweep_config import Sweep, Trial

TRIAL_FILE = "trial.json"
STOPPED_FILE = "stopped.json"
IS_DONE = "is_done"
IS_REPLAYED = "is_replayed"
REWARD_SECTIONS = ("reward", "brme", "reward_model", "token_reward", "ava")

_CALLBACKS = "RAY_TRAIN_CALLBACKS"  # Ray Train makes these on its own, whoever builds the trainer
_LOCK = ".lock"
_POLL_S = 0.5
_STOP_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SharedPhases:
    """What all trials read, made once.

    Attributes:
        model: directory of the policy before training.
        ingest: tokenized pairs.
        fingerprint: of these pairs.
        features: hidden states and reference log-probabilities.
        features_digest: of what they are made of.
        rewards: by `reward_group`: directory of the fitted reward, and its key.
        cost: what prices responses, None when no point needs it.
        num_concurrent: trials at a time, which share the CPUs that no actor reserves.
    """

    model: str
    ingest: Path
    fingerprint: str
    features: Path
    features_digest: str
    rewards: Mapping[str, tuple[Path, str]]
    cost: CostPhase | None
    num_concurrent: int


def reward_group(config: RunConfig) -> str:
    """What the fitted reward of a run depends on, within a sweep: points with the same share one fit."""
    return digest({section: getattr(config, section).model_dump() for section in REWARD_SECTIONS})


def run_phases(trial: Trial, shared: SharedPhases) -> dict[str, Any]:
    """The phases of a trial that others do not share: reward, unless it is there, then rank and train.

    Returns:
        Facts of the train phase.
    """
    config = trial.config
    phases = open_phases(config, shared.model)
    ranking = {kind: amount / shared.num_concurrent for kind, amount in phases.run.devices["rank"].items()}
    phases.run.devices = {**phases.run.devices, "rank": ranking}
    write_json(trial.directory / TRIAL_FILE, {"point": trial.point, "keys": dict(trial.keys), "seed": trial.seed})
    cost = shared.cost if needs_cost(config) else None
    reward, reward_key = shared.rewards.get(reward_group(config), (None, ""))
    is_read = config.train.method != "offline" or config.train.objective == "label_confidence"
    if not is_read:
        return phases.train(shared.features, shared.features_digest, reward or shared.features)[1]
    if reward is None:
        reward, reward_facts = phases.reward(shared.features, shared.features_digest)
        reward_key = digest([shared.features_digest, reward_facts])
    if config.train.method != "offline":
        return phases.train_online(shared.ingest, shared.fingerprint, reward, reward_key, cost)[1]
    ranked, rank_facts = phases.rank(shared.features, reward, reward_key, cost)
    return phases.train(ranked, digest([reward_key, rank_facts]), reward)[1]


class ControllerLink(ControllerCallback):  # type: ignore[misc]
    """Tells the actor that starts a training which actor controls it; made by name, see `TrialRunner`."""

    def __init__(self) -> None:
        self._runner = ray.get_runtime_context().current_actor

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs in the controller."""
        self._runner.adopt.remote(ray.get_runtime_context().current_actor)


class TrialRunner:
    """Runs trials, one after the other, until told to stop; an actor with several threads at the call site."""

    def __init__(self) -> None:
        os.environ[_CALLBACKS] = f"{ControllerLink.__module__}.{ControllerLink.__qualname__}"
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        self._lock = threading.Lock()
        self._controller: Any = None
        self._is_stopped = False

    def run(self, trial: Trial, shared: SharedPhases) -> bool:
        """Do what the trial has not done yet.

        Returns:
            Whether it is finished; False after `stop`.

        Raises:
            RaylignError: what ended it.
        """
        with self._lock:
            self._controller, self._is_stopped = None, False
        try:
            with _only_one(trial.directory):
                run_phases(trial, shared)
        except ray.exceptions.RayActorError:
            if not self._is_stopped:
                raise
        return not self._is_stopped

    def adopt(self, controller: Any) -> None:
        """Know the controller of the training at work."""
        with self._lock:
            self._controller = controller
            is_late = self._is_stopped
        if is_late:
            _abort(controller)

    def stop(self) -> None:
        """End the training in good order: its workers, its placement group and its helpers go before it does."""
        with self._lock:
            self._is_stopped = True
            controller = self._controller
        if controller is not None:
            _abort(controller)


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Wait for whoever runs the same trial: Optuna may name a point twice. The lock goes with its process."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _abort(controller: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayActorError):  # it ends itself, or has ended
        ray.get(controller.abort.remote(), timeout=_STOP_S)


def read_records(file: Path) -> list[dict[str, Any]]:
    """Records of a training in their order; a line in the making is left out."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def next_record(
    records: list[dict[str, Any]], *, after: float, until: float, metric: str | None = None
) -> dict[str, Any] | None:
    """The first record of a later update; a resumed training repeats some, which are not shown again.

    Args:
        records: of the training, in order.
        after: update of the last one that was shown.
        until: last update to show.
        metric: that a record must have; online some are only in the last record of a round.
    """
    shown = (record for record in records if after < record["step"] <= until)
    return next((record for record in shown if metric is None or metric in record), None)


def check_metric(records: list[dict[str, Any]], metric: str | None, *, has_rounds: bool) -> None:
    """Refuse to compare trials by a metric that their training does not record.

    Args:
        records: so far.
        metric: that is compared.
        has_rounds: whether later records may hold more than the first ones.

    Raises:
        ConfigError: with the metrics that it records.
    """
    if metric is None or not records or has_rounds or any(metric in record for record in records):
        return
    known = dict.fromkeys(name for record in records for name in record)
    raise ConfigError(f"sweep.metric={metric} is not recorded by this training; it records {', '.join(known)}")


class TuneTrial(tune.Trainable):  # type: ignore[misc]
    """What Ray Tune sees of a trial: its training records, one per iteration.

    Records of an earlier session are told again, so that a scheduler that starts anew decides from what it had decided
    from; they are marked, because it did let these trials pass.
    """

    def setup(self, config: dict[str, Any], sweep: Sweep, shared: SharedPhases) -> None:
        """Called by Tune."""
        self._sweep, self._shared = sweep, shared
        self._runner: Any = None
        self._begin(config)

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._trial = self._sweep.trial_of(config)
        self._last: dict[str, Any] = {"step": 0}
        stopped = stopped_at(self._trial.directory)
        self._until = float("inf") if stopped is None else stopped
        earlier = read_records(self._file)
        self._replayed = earlier[-1]["step"] if earlier else 0
        self._work: Any = None
        if stopped is None and not is_trained(self._trial.directory):
            self._runner = self._runner or self._start_runner()
            self._work = self._runner.run.remote(self._trial, self._shared)

    @property
    def _file(self) -> Path:
        return self._trial.directory / "train" / METRICS_FILE

    @staticmethod
    def _start_runner() -> Any:
        # outside of Tune's placement group, which would catch samplers and scorers
        return (
            ray.remote(TrialRunner)
            .options(
                num_cpus=0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=None),
            )
            .remote()
        )

    def step(self) -> dict[str, Any]:
        """The next record, when there is one, or the last one when training is over."""
        metric, is_online = self._sweep.compared_metric, self._trial.config.train.method != "offline"
        while True:
            is_over = self._work is None or bool(ray.wait([self._work], timeout=0)[0])
            if is_over and self._work is not None:
                ray.get(self._work)
            records = read_records(self._file)
            record = next_record(records, after=self._last["step"], until=self._until, metric=metric)
            if record is not None:
                self._last = record
                return {**record, IS_DONE: False, IS_REPLAYED: record["step"] <= self._replayed}
            check_metric(records, metric, has_rounds=is_online and not is_over)
            if is_over:
                self._work = None
                return {**self._last, IS_DONE: True, "done": True}
            ray.wait([self._work], timeout=_POLL_S)

    def _halt(self) -> None:
        """Stop what is at work; returns when it has ended."""
        if self._work is None:
            return
        ray.get(self._runner.stop.remote(), timeout=_STOP_S)
        ray.wait([self._work], timeout=_STOP_S)
        self._work = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial into the same processes, which saves seconds of start-up."""
        self._halt()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Called by Tune at the end of this actor, also when the scheduler stopped its trial."""
        self._halt()
        if self._runner is not None:
            ray.kill(self._runner)


def mark_stopped(directory: Path, result: Mapping[str, Any], metric: str) -> None:
    """Write down that a scheduler stopped a trial, unless it is finished or was stopped before: the first word counts.

    Args:
        directory: of the trial.
        result: the last one that the scheduler saw.
        metric: that it compared.
    """
    if stopped_at(directory) is None and not is_trained(directory):
        write_json(directory / STOPPED_FILE, {"step": result["step"], metric: result.get(metric)})


def is_trained(directory: Path) -> bool:
    """Whether the train phase of a trial is finished and no scheduler had dropped the trial before."""
    manifest = train_manifest(directory)
    return manifest is not None and manifest["status"] == "done" and stopped_at(directory) is None


def train_manifest(directory: Path) -> dict[str, Any] | None:
    """What the train phase of a trial says of itself, None before it started."""
    try:
        content: dict[str, Any] = json.loads((directory / "train" / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def stopped_at(directory: Path) -> int | None:
    """Update at which a scheduler stopped a trial, None when none did."""
    try:
        return int(json.loads((directory / STOPPED_FILE).read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return None


def stored_config(directory: Path) -> RunConfig:
    """The resolved configuration that a trial wrote down."""
    return load_config(directory / CONFIG_FILE)
