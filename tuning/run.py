"""`raylign sweep`, `python -m tuning.run`: shared phases once, cheap axes on cached states, trainings by Ray Tune."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from raylign.config import RunConfig, check_devices, idle_keys, needs_cost
from raylign.errors import (
    CacheMismatchError,
    ConfigError,
    MissingDependencyError,
    OutputExistsError,
    ResourceError,
    TrainingError,
)
from raylign.models.loading import resolve_model
from raylign.runtime.check import check_packages
from raylign.runtime.features_job import read_features
from raylign.runtime.identity import FREE_KEYS, method_identity
from raylign.runtime.pair_states import read_states
from raylign.runtime.phases import digest, renamed
from raylign.runtime.progress import phase_line
from raylign.runtime.run_phases import CACHES, Phases, check_demand, open_phases
from tuning.collect import REWARDS, SHARED, collect, evaluate_seed
from tuning.concurrency import trials_at_once
from tuning.grid import ScreenData, Screened, survivors, timed_screen
from tuning.placement_groups import live_groups, remove_left
from tuning.result import SweepResult
from tuning.search_space import Axis, PointKeys
from tuning.sweep_config import Sweep, SweepSection, Trial, cheap_part, check_differ
from tuning.trial import (
    IS_DONE,
    IS_REPLAYED,
    REWARD_SECTIONS,
    TRIAL_FILE,
    SharedPhases,
    TuneTrial,
    is_trained,
    mark_stopped,
    reward_group,
    stopped_at,
    stored_config,
)

TUNE = "tune"
_TRIAL_MEMORY = 2**29  # what Tune books for a trial's own process; the training reserves its devices itself
_NO_LIMIT = 10**9  # updates; a trial ends by itself
_SCREEN_TIMEOUT_S = 24 * 3600.0


def run_sweep(sweep: Sweep) -> SweepResult:
    """Run what has not been run yet, and collect the results; Ray must be initialised.

    Everything is written below `<run.storage>/<run.name>`: `shared/` with the phases that all trials read, `rewards/`
    with every distinct reward, and one run directory per trial below `trials/`; features alone are beside it, in the
    cache of all runs. A killed sweep goes on with run.resume=true: what is finished is kept, what was stopped stays
    stopped, what was at work continues from its newest checkpoint. Trials that fail are in the result as failed; when
    all do, that is an error.

    Raises:
        RaylignError: any of the leaves in `raylign.errors`, each naming the place and the cure.
    """
    base, directory = sweep.base, sweep.directory
    if directory.exists() and any(directory.iterdir()) and not base.run.resume:
        raise OutputExistsError(f"{directory} is in use; continue it with --resume or choose another run.name")
    trials = sweep.trials or tuple(sweep.trial(keys, sweep.sweep.seeds[0]) for keys in sweep.checked_points)
    if sweep.sweep.search == "optuna":
        _check_optuna()
        _check_seed(sweep)
    configs = [trial.config for trial in trials]
    for config in (base, *configs):
        check_devices(config)
        check_packages(config)
    num_trials = sweep.sweep.num_samples if sweep.sweep.search == "optuna" else len(trials)
    num_concurrent = trials_at_once(
        configs,
        [node["Resources"] for node in ray.nodes() if node["Alive"]],
        limit=min(num_trials, sweep.sweep.max_concurrent or num_trials),
    )
    for config in (base, *configs):
        check_demand(config)  # last: it writes below run.storage to see whether all nodes see it
    model = resolve_model(base.policy.model)
    shared = open_phases(renamed(base, storage=directory, name=SHARED), model, caches=directory.parent / CACHES)
    ingest, ingest_facts = shared.ingest()
    features, features_digest = shared.features(ingest, ingest_facts["fingerprint"])
    rows, screen_s = _screen(shared, sweep, features, features_digest)
    points = _kept(sweep, rows)
    planned = [sweep.trial(keys, seed) for seed in sweep.sweep.seeds for keys in points]
    rewards = {
        reward_group(config): _reward(sweep, config, features, features_digest, model)
        for config in {reward_group(config): config for config in (base, *(trial.config for trial in planned))}.values()
    }
    has_costs = any(needs_cost(trial.config) for trial in trials)
    for_trials = SharedPhases(
        model=model,
        ingest=ingest,
        fingerprint=ingest_facts["fingerprint"],
        features=features,
        features_digest=features_digest,
        rewards=rewards,
        cost=shared.cost(features, features_digest) if has_costs else None,
        num_concurrent=num_concurrent,
    )
    for trial in planned or known_trials(sweep):
        check_same(trial)
    started, failed = _train(sweep, planned, for_trials, num_concurrent)
    finished = [trial for trial in started if is_trained(trial.directory)]
    yardstick, yardstick_key = rewards[reward_group(base)]
    answers = {
        seed: evaluate_seed(shared, sweep, seed, finished, yardstick, yardstick_key) for seed in sweep.sweep.seeds
    }
    return collect(
        sweep, started, answers, failed=failed, screened=rows, screen_s=screen_s, num_concurrent=num_concurrent
    )


def _screen(shared: Phases, sweep: Sweep, features: Path, features_digest: str) -> tuple[tuple[Screened, ...], float]:
    """Cheap settings, judged on cached states in one task; nothing when no axis is cheap."""
    settings = sweep.cheap_settings
    if not settings:
        return (), 0.0
    key = {
        "features": features_digest,
        "settings": [dict(keys) for keys, _ in settings],
        "configs": [
            {section: getattr(config, section).model_dump() for section in (*REWARD_SECTIONS, "confidence")}
            for _, config in settings
        ],
        "replicates": sweep.sweep.replicates,
        "seed": sweep.base.run.seed,
    }

    def work(_: Path) -> dict[str, Any]:
        states = read_states(read_features(features), max_pairs=sweep.base.reward.max_pairs)
        task = ray.remote(timed_screen).options(num_cpus=1)
        ref = task.remote(ScreenData.of(states), settings, sweep.sweep.replicates)
        try:
            rows, seconds = ray.get(ref, timeout=_SCREEN_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(ref, force=True)
            raise ResourceError(
                f"{len(settings)} cheap settings were not judged within {_SCREEN_TIMEOUT_S:g} s: another job may hold "
                f"the CPUs; if not, lower sweep.replicates={sweep.sweep.replicates} or "
                f"reward.max_pairs={sweep.base.reward.max_pairs}, and continue with --resume"
            ) from error
        return {"rows": rows, "seconds": seconds}

    name = f"screen-{digest(key)[:8]}"  # a sweep that got more settings is screened anew
    shared.run.devices = {**shared.run.devices, name: {"cpu": 1.0}}
    _, facts = shared.run.phase(name, key, work)
    return tuple(Screened.from_plain(row) for row in facts["rows"]), facts["seconds"]


def _kept(sweep: Sweep, rows: Sequence[Screened]) -> list[PointKeys]:
    """Points to train: all, or those whose cheap part is among the best."""
    if sweep.sweep.keep is None or not rows:
        return list(sweep.points)
    kept = survivors(rows, keep=sweep.sweep.keep, metric=sweep.sweep.screen_metric)
    points = [keys for keys in sweep.points if cheap_part(sweep.trial(keys, sweep.base.run.seed)) in kept]
    phase_line("screen", f"{len(points)} of {len(sweep.points)} points are trained (sweep.keep={sweep.sweep.keep})")
    return points


def _reward(sweep: Sweep, config: RunConfig, features: Path, features_digest: str, model: str) -> tuple[Path, str]:
    """The fitted reward of all points that agree in it, and its key; confidence is no part of the fit."""
    own = sweep.base.model_copy(update={section: getattr(config, section) for section in REWARD_SECTIONS})
    phases = open_phases(renamed(own, storage=sweep.directory / REWARDS, name=reward_group(config)), model)
    reward, facts = phases.reward(features, features_digest)
    return reward, digest([features_digest, facts])


def _train(
    sweep: Sweep, planned: Sequence[Trial], shared: SharedPhases, num_concurrent: int
) -> tuple[list[Trial], dict[str, str]]:
    """Let Tune run the trials.

    Returns:
        All of them, and what some failed of by name.

    Raises:
        TrainingError: all failed, or the sweep was interrupted.
    """
    shutil.rmtree(sweep.directory / TUNE, ignore_errors=True)  # Tune's own notes; ours are in the trials
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints although verbose=0
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are told below; tracebacks are in error.txt
    settings = sweep.sweep
    search = _optuna(sweep) if settings.search == "optuna" else None
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TuneTrial, sweep=sweep, shared=shared),
            tune.PlacementGroupFactory([{"memory": _TRIAL_MEMORY}]),
        ),
        param_space={"keys": {axis.key: _domain(axis) for axis in sweep.space.axes}}
        if search is not None
        else {"trial": tune.grid_search([{"keys": dict(trial.keys), "seed": trial.seed} for trial in planned])},
        tune_config=tune.TuneConfig(
            metric=sweep.compared_metric,
            mode=None if sweep.compared_metric is None else settings.mode,
            search_alg=search,
            scheduler=_scheduler(settings),
            num_samples=settings.num_samples if search is not None else 1,
            max_concurrent_trials=num_concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: sweep.trial_of(trial.config).name,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(sweep.directory),
            verbose=0,
            callbacks=[TrialLog(sweep)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # Ray Train keeps them
        ),
    )
    earlier = live_groups()
    results = tuner.fit()
    remove_left(earlier)
    trials = known_trials(sweep) if search is not None else list(planned)
    # a trial's directory has its name, see trial_dirname_creator
    failed = {Path(result.path).name: _cause(result.error) for result in results if result.error is not None}
    # one that failed before it left anything is no point to show
    is_lost = not failed.keys() <= {trial.name for trial in trials}
    if failed and (is_lost or not any(is_trained(trial.directory) for trial in trials)):
        raise TrainingError(failure(failed.values(), sweep))
    unfinished = [
        trial.name
        for trial in trials
        if not is_trained(trial.directory) and stopped_at(trial.directory) is None and trial.name not in failed
    ]
    if unfinished:
        raise TrainingError(f"the sweep was interrupted with {len(unfinished)} trials to go; continue with --resume")
    check_differ(
        [
            (trial.keys, stored_config(trial.directory))
            for trial in trials
            if trial.seed == settings.seeds[0] and trial.name not in failed
        ],
        where=str(sweep.directory),
    )
    return trials, failed


def failure(causes: Iterable[str], sweep: Sweep) -> str:
    """What to tell of trials that failed.

    Args:
        causes: of each.
        sweep: that they are of.
    """
    causes = list(causes)
    told = "; ".join(dict.fromkeys(causes))
    return (
        f"{len(causes)} trial(s) failed ({told}); tracebacks are in {sweep.directory / TUNE}/*/error.txt; try them "
        "again with --resume"
    )


class TrialLog(tune.Callback):  # type: ignore[misc]
    """Writes down what the scheduler stopped, at once, so that a resumed sweep leaves it stopped.

    Args:
        sweep: whose trials they are.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune when a trial ends by itself or is stopped."""
        own, last = self._sweep.trial_of(trial.config), trial.last_result
        if not last.get(IS_DONE):
            mark_stopped(own.directory, last, self._sweep.sweep.metric)
        stopped = stopped_at(own.directory)
        phase_line("trial", f"{own.name} " + ("done" if stopped is None else f"stopped at update {stopped}"))


def check_same(trial: Trial) -> None:
    """Refuse to count a training of an earlier session that the sweep as it is now would not make.

    Raises:
        CacheMismatchError: with the keys that differ.
    """
    if not is_trained(trial.directory) and stopped_at(trial.directory) is None:
        return
    was, now = (_decides(config) for config in (stored_config(trial.directory), trial.config))
    names = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    if names:
        shown = "; ".join(f"{name}: was {was.get(name)!r}, now {now.get(name)!r}" for name in names[:4])
        raise CacheMismatchError(
            f"{trial.directory} was trained by another configuration ({shown}); resume with the old values or sweep "
            "under a new run.name"
        )


def _decides(config: RunConfig) -> dict[str, Any]:
    """What a training depends on, by dotted key: more than `method_identity`, which leaves the data to fingerprints."""
    sections = ("data", "features", *REWARD_SECTIONS, "confidence", "robust", "constraint", "cost_model")
    idle = idle_keys(config)
    keys = {
        f"{section}.{name}": value
        for section in sections
        for name, value in getattr(config, section).model_dump(mode="json").items()
        if f"{section}.{name}" not in idle
    }
    free = {"features.num_actors", "features.cpus_per_actor", "features.gpus_per_actor", "features.batch_tokens"}
    return {name: value for name, value in (keys | method_identity(config)).items() if name not in FREE_KEYS | free}


def known_trials(sweep: Sweep) -> list[Trial]:
    """Trials that were started, oldest first."""
    files = sorted((sweep.directory / "trials").glob(f"*/{TRIAL_FILE}"), key=lambda file: file.stat().st_ctime)
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [sweep.trial(content["keys"], content["seed"]) for content in contents]


class ResumedAsha(tune.schedulers.AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA that learns from records of an earlier session without deciding on them anew.

    They come in another order than the first time, so that a trial that it let pass could lag behind now.
    """

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune for every record."""
        decision: str = super().on_trial_result(controller, trial, result)
        return self.CONTINUE if result.get(IS_REPLAYED) else decision


def _scheduler(settings: SweepSection) -> Any:
    if settings.scheduler == "none":
        return None
    return ResumedAsha(
        time_attr="step",
        max_t=_NO_LIMIT,
        grace_period=settings.grace_steps,
        reduction_factor=settings.reduction_factor,
        stop_last_trials=False,
    )


def _domain(axis: Axis) -> Any:
    """An axis in Tune's words."""
    if axis.kind in ("grid", "choice"):
        return tune.choice(list(axis.values))
    low, high = axis.values
    if axis.kind == "randint":
        return tune.randint(low, high + 1)  # Tune leaves the upper end out
    return (tune.uniform if axis.kind == "uniform" else tune.loguniform)(low, high)


def _check_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise MissingDependencyError("sweep.search=optuna needs Optuna: pip install 'raylign[sweep]'")


def _check_seed(sweep: Sweep) -> None:
    """Refuse to resume Optuna's search with another seed than that of its points, which would not be evaluated."""
    known = sorted({trial.seed for trial in known_trials(sweep)})
    if known not in ([], sweep.sweep.seeds):
        raise ConfigError(
            f"sweep.seeds={sweep.sweep.seeds}, but the points in {sweep.directory} have {known}: Optuna learns from "
            "one training per point; resume with the seed that they have, or sweep under a new run.name"
        )


def _optuna(sweep: Sweep) -> Any:
    """Optuna's search, which is shown the points of earlier sessions first; these are not trained again."""
    from ray.tune.search.optuna import OptunaSearch

    earlier = [{f"keys/{key}": value for key, value in trial.keys.items()} for trial in known_trials(sweep)]
    # points that are shown draw nothing: with the old seed the next ones would be the first ones again
    return OptunaSearch(seed=sweep.base.run.seed + len(earlier), points_to_evaluate=earlier or None)


def _cause(error: BaseException) -> str:
    """The first line of what a trial failed of, without Ray's wrapping."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1].strip() if lines else 'no message'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m tuning.run`: the same as `raylign sweep`."""
    from launch.cli import main as raylign

    raylign(["sweep", *(sys.argv[1:] if arguments is None else arguments)], prog_name="raylign")


if __name__ == "__main__":
    main()
