"""The configuration of a sweep: a base configuration, a space, how it is searched, and what every trial runs.

No torch, no ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from raylign.compare_config import DRIFT_KEYS, shared_config
from raylign.config import (
    TEXT_REWARDS,
    RunConfig,
    Section,
    idle_keys,
    load_config,
    merge_config,
    without_idle,
)
from raylign.errors import ConfigError
from tuning.search_space import PointKeys, Space, corner_points, grid_points, random_points, read_space

TRIALS = "trials"
_SHARED = ("run", "policy", "data", "features", "cost_model", "evaluate", "resources", "tracking", "cost")
CHEAP_KEYS = frozenset(
    {"confidence.alpha", "confidence.floor", "confidence.center", "confidence.squash", "confidence.temperature"}
)
_CHEAP_SECTIONS = ("reward.", "brme.")
# of the reward, what only some kinds show on cached states: the base says how many pairs are read, BRME alone fits its
# targets by folds, and draws are not what a Laplace posterior is judged by
_CHEAP_FOR: dict[str, tuple[str, ...]] = {
    "reward.max_pairs": (),
    "reward.folds": ("brme",),
    "reward.num_heads": ("ensemble", "brme"),
}
_SECTION = "sweep"
_TURNING_SECTIONS = ("confidence.", "constraint.")  # of the labels that a training reads
_NOT_MEASURED = (*DRIFT_KEYS, "constraint_samples")
_MAX_NAME = 80


class SweepSection(Section):
    """How a space is searched, and what is stopped early or not tried at all."""

    search: Literal["grid", "random", "optuna"] = Field("grid", description="every point, or num_samples of them")
    num_samples: int = Field(16, ge=1, description="points of a random or an Optuna search")
    seeds: list[int] = Field([0], description="seeds of training and evaluation prompts, each for every point")
    keep: int | None = Field(
        None, ge=1, description="cheap settings (reward, confidence) that are trained, chosen on cached states"
    )
    screen_metric: Literal["brier", "ece", "accuracy"] = Field(
        "brier", description="of validation pairs, by which cheap settings are kept"
    )
    replicates: int = Field(4, ge=1, description="independent fits behind every number of the cheap settings")
    scheduler: Literal["none", "asha"] = Field("none", description="asha stops trials that lag behind")
    metric: str = Field(
        "rewards/accuracies", description="training metric that asha compares, and Optuna maximises or minimises"
    )
    mode: Literal["max", "min"] = Field("max", description="which values of the metric are good")
    grace_steps: int = Field(5, ge=1, description="updates before asha may stop a trial")
    reduction_factor: float = Field(3.0, gt=1, description="asha keeps about one of so many trials at every rung")
    target: float = Field(
        0.2, ge=0, le=1, description="violation rate on harmful prompts that the exported point should not exceed"
    )
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; default: as many as fit the cluster")


_COMPARES = (("scheduler", "asha"), ("search", "optuna"))
_READ_BY: dict[str, tuple[tuple[str, str], ...]] = {
    "num_samples": (("search", "random"), ("search", "optuna")),
    "grace_steps": (("scheduler", "asha"),),
    "reduction_factor": (("scheduler", "asha"),),
    "metric": _COMPARES,
    "mode": _COMPARES,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """One training of one point with one seed.

    Attributes:
        point: name of the point.
        keys: swept keys of the point.
        seed: of the training.
        config: resolved; its directory is `<sweep>/trials/<point>-seed<seed>`.
    """

    point: str
    keys: PointKeys
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.config.run.name

    @property
    def directory(self) -> Path:
        """Of the run, absolute."""
        return Path(self.config.run.storage).expanduser().absolute() / self.config.run.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A checked sweep.

    Attributes:
        base: configuration of the phases that all points share; it has no constraint, and names the source of costs
            when a point needs them.
        sweep: search, seeds, scheduler.
        space: axes and fixed keys.
        values: nested values that all points share, not yet a configuration.
        points: swept keys of each point; () when the search finds them as it goes (Optuna).
        directory: `<run.storage>/<run.name>`, absolute: trials are opened by processes that Ray Tune gives directories
            of their own.
    """

    base: RunConfig
    sweep: SweepSection
    space: Space
    values: Mapping[str, Mapping[str, Any]]
    points: tuple[PointKeys, ...]
    directory: Path

    def trial(self, keys: PointKeys, seed: int) -> Trial:
        """What a point runs with one seed.

        Raises:
            ConfigError: the keys do not make a configuration, or one of them has no effect in it.
        """
        name = point_name(keys)
        values: dict[str, Any] = {section: dict(content) for section, content in self.values.items()}
        for key, value in keys.items():
            section, _, field = key.partition(".")
            values.setdefault(section, {})[field] = value
        run = values.setdefault("run", {})
        # a trial that Ray Tune or a resumed sweep starts again goes on; the sweep's own directory is checked for use
        run |= {"storage": str(self.directory / TRIALS), "name": f"{name}-seed{seed}", "seed": seed, "resume": True}
        try:
            config = load_config(values=without_idle(values, keep=keys))
        except ConfigError as error:
            raise ConfigError(f"space {self.space.name}, point {_shown(keys)}: {error}") from None
        return Trial(point=name, keys=keys, seed=seed, config=config)

    def trial_of(self, config: Mapping[str, Any]) -> Trial:
        """The trial that Ray Tune's configuration of it names; one that Optuna found has no seed of its own."""
        content = config.get("trial", config)
        return self.trial(content["keys"], content.get("seed", self.sweep.seeds[0]))

    @property
    def checked_points(self) -> tuple[PointKeys, ...]:
        """All points, or for a search that finds them as it goes, what shows the ends of every axis."""
        return self.points or tuple(corner_points(self.space.axes))

    @property
    def cheap_settings(self) -> tuple[tuple[PointKeys, RunConfig], ...]:
        """Distinct cheap parts of the points, each with a configuration that has it and the seed of the sweep."""
        found: dict[str, tuple[PointKeys, RunConfig]] = {}
        for keys in self.points:
            trial = self.trial(keys, self.base.run.seed)
            if part := cheap_part(trial):
                found.setdefault(repr(part), (part, trial.config))
        settings = tuple(found.values())
        return settings if len(settings) > 1 and all(can_screen(config) for _, config in settings) else ()

    @property
    def compared_metric(self) -> str | None:
        """Training metric that decides something, None when nothing does."""
        return self.sweep.metric if self.sweep.scheduler != "none" or self.sweep.search == "optuna" else None

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All that are known before the search starts; seeds outermost."""
        return tuple(self.trial(keys, seed) for seed in self.sweep.seeds for keys in self.points)


def is_cheap(key: str, kind: str) -> bool:
    """Whether what a key changes shows on cached states, before anything is trained, for a reward of this kind."""
    if key in _CHEAP_FOR:
        return kind in _CHEAP_FOR[key]
    return key in CHEAP_KEYS or key.startswith(_CHEAP_SECTIONS)


def cheap_part(trial: Trial) -> dict[str, Any]:
    """The cheap keys of a point."""
    return {key: value for key, value in trial.keys.items() if is_cheap(key, trial.config.reward.kind)}


def reads_confidence(config: RunConfig) -> bool:
    """Whether a run turns its reward into a label confidence."""
    return config.train.method == "offline" and config.train.objective == "label_confidence"


def can_screen(config: RunConfig) -> bool:
    """Whether a run reads a reward that is fitted to cached states."""
    is_read = config.train.method != "offline" or reads_confidence(config)
    return is_read and config.reward.kind not in TEXT_REWARDS


def load_sweep(
    space: str, path: str | Path | None = None, overrides: Sequence[str] = (), *, is_resumed: bool = False
) -> Sweep:
    """Read and check a sweep. Later sources win: config file, fixed keys of the space, overrides.

    Args:
        space: file or shipped name.
        path: YAML file with any sections of a run, and optionally a section sweep.
        overrides: "section.key=value" strings, "sweep.seeds=[0,1]" among them.
        is_resumed: the sweep's directory may be in use.

    Raises:
        ConfigError: anything that `load_config` or `read_space` refuses, a key that points must share, a swept key
            without effect or that does not come out different, or a key that nothing reads.
    """
    found = read_space(space)
    merged = merge_config(path)
    load_config(values={name: content for name, content in merged.items() if not isinstance(content, Mapping)})
    for key, value in found.fixed.items():
        section, _, field = key.partition(".")
        merged.setdefault(section, {})[field] = value
    merged = merge_config(None, overrides, merged)
    if is_resumed:
        merged.setdefault("run", {})["resume"] = True
    settings = _settings(merged.pop(_SECTION, {}))
    for axis in found.axes:
        _check_axis(found, axis.key, merged)
    place = load_config(values={"run": merged.get("run", {})})
    points: tuple[PointKeys, ...] = ()
    if settings.search == "grid":
        points = tuple(grid_points(found.axes))
    elif settings.search == "random":
        points = tuple(random_points(found.axes, num=settings.num_samples, seed=place.run.seed))
    directory = Path(place.run.storage).expanduser().absolute() / place.run.name
    draft = Sweep(base=place, sweep=settings, space=found, values=merged, points=points, directory=directory)
    trials = [draft.trial(keys, settings.seeds[0]) for keys in draft.checked_points]
    check_differ([(trial.keys, trial.config) for trial in trials], where=f"space {found.name}")
    _check_read(merged, trials)
    _check_metric(draft, trials)
    for name in ("keep", "replicates"):
        if name in settings.model_fields_set and not draft.cheap_settings:
            raise ConfigError(
                f"sweep.{name} is set but no axis of space {found.name} can be judged on cached states (what a reward "
                "is fitted by and label confidence, unless the reward reads texts or nobody reads it); remove it"
            )
    base = shared_config(merged, [trial.config for trial in trials])
    return dataclasses.replace(draft, base=base)


def _settings(section: Any) -> SweepSection:
    try:
        settings = SweepSection.model_validate(section)
    except ValidationError as error:
        found = "; ".join(
            f"{_SECTION}.{'.'.join(map(str, item['loc']))}={item.get('input')!r}: {item['msg']}"
            + (f" (keys are {', '.join(SweepSection.model_fields)})" if item["type"] == "extra_forbidden" else "")
            for item in error.errors()
        )
        raise ConfigError(found) from None
    for key, readers in _READ_BY.items():
        if key in settings.model_fields_set and all(getattr(settings, name) != value for name, value in readers):
            cure = " or ".join(f"sweep.{name}={value}" for name, value in readers)
            raise ConfigError(f"sweep.{key} is set but has no effect here; remove it or set {cure}")
    if settings.keep is None and "screen_metric" in settings.model_fields_set:
        raise ConfigError("sweep.screen_metric is set but has no effect here; remove it or set sweep.keep")
    if not settings.seeds or len(set(settings.seeds)) != len(settings.seeds):
        raise ConfigError(f"sweep.seeds={settings.seeds} needs one seed or more, each once")
    if settings.scheduler == "asha" and len(settings.seeds) > 1:
        raise ConfigError(
            f"sweep.seeds={settings.seeds}: asha stops each training by itself, and a point counts when it has all of "
            "its seeds, so that none may be left; use sweep.seeds='[0]', then train the survivors with more seeds"
        )
    if settings.search == "optuna":
        if len(settings.seeds) > 1:
            raise ConfigError(
                f"sweep.seeds={settings.seeds}: Optuna learns from one training per point; use one seed, and train "
                "the points it finds with more seeds in a grid"
            )
        if settings.keep is not None:
            raise ConfigError("sweep.keep chooses among points that are known beforehand; use search=grid or random")
    return settings


def _check_axis(space: Space, key: str, merged: Mapping[str, Any]) -> None:
    section, _, field = key.partition(".")
    if section in (*_SHARED, _SECTION):
        raise ConfigError(
            f"space {space.name} sweeps {key}, which all points share; sweep keys of what is fitted or trained, and "
            "give this one a single value" + (" (seeds are sweep.seeds)" if key == "run.seed" else "")
        )
    if field in merged.get(section, {}):
        raise ConfigError(f"space {space.name} sweeps {key}, which is set as well; remove one of the two")


def check_differ(points: Sequence[tuple[PointKeys, RunConfig]], *, where: str) -> None:
    """Assert that what was swept is different in what is run.

    Args:
        points: swept keys of every point, and the configuration that came of them.
        where: of the message.

    Raises:
        ConfigError: two points run alike, or a key has fewer values in the configurations than in the points.
    """
    seen: dict[str, PointKeys] = {}
    for keys, config in points:
        for key, value in keys.items():
            if _get(config, key) != value:
                raise ConfigError(f"{where}: {key} was to be {value!r}, a trial runs with {_get(config, key)!r}")
        identity = json.dumps(config.model_dump(exclude={"run"}), sort_keys=True, default=str)
        other = seen.setdefault(identity, keys)
        if other is not keys:
            raise ConfigError(f"{where}: {_shown(keys)} and {_shown(other)} run alike; swept keys must really differ")
    for key in {key for keys, _ in points for key in keys}:
        asked = {repr(keys[key]) for keys, _ in points if key in keys}
        found = {repr(_get(config, key)) for _, config in points}
        if len(found) < len(asked):
            raise ConfigError(f"{where}: {key} was swept over {len(asked)} values, trials have {len(found)}")


def _check_read(merged: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Refuse keys that nothing reads: swept ones that only the shared evaluation would, and set ones without effect."""
    for trial in trials:
        for key in trial.keys:
            if key.startswith("robust.") and trial.config.train.method == "offline":
                raise ConfigError(
                    f"{key} is swept, but train.method=offline never maximises the reward that it makes; use "
                    "train.method=policy_gradient or online_dpo, or raylign calibrate, which compares rules"
                )
    for name in _NOT_MEASURED:
        if name in merged.get("evaluate", {}):
            raise ConfigError(f"evaluate.{name} is set but a sweep does not measure that; remove it")
    for section, content in merged.items():
        for name in content:
            if all(f"{section}.{name}" in idle_keys(trial.config) for trial in trials):
                raise ConfigError(f"{section}.{name} is set but no point of the sweep reads it; remove it")


def _check_metric(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Refuse metrics of pairs where nothing is trained on pairs, and the default where axes turn pairs round."""
    metric = sweep.compared_metric
    by_gradient = [trial.point for trial in trials if trial.config.train.method == "policy_gradient"]
    if metric is not None and metric.startswith("rewards/") and by_gradient:
        raise ConfigError(
            f"sweep.metric={metric} is one of pairs, which train.method=policy_gradient has none of (point "
            f"{by_gradient[0]}): use one that it records at the end of a round, such as critic/score/mean or "
            "constraint/mean_cost"
        )
    turning = [axis.key for axis in sweep.space.axes if axis.key.startswith(_TURNING_SECTIONS)]
    if metric is not None and turning and "metric" not in sweep.sweep.model_fields_set:
        raise ConfigError(
            f"sweep.metric={metric}, the default, counts pairs in stored order, and {turning[0]} decides which of them "
            "are trained on turned round: points with more of these score lower by construction; set sweep.metric to "
            f"what points are to be compared by ({metric} is possible), or sweep.scheduler=none and sweep.search=grid "
            "or random"
        )


def point_name(keys: PointKeys) -> str:
    """Name of a point, fit for a directory: its values by the last part of their keys, "multiplier-0.5_beta-0.1"."""
    fields = [key.partition(".")[2] for key in keys]
    labels = [field if fields.count(field) == 1 else key for key, field in zip(keys, fields, strict=True)]
    name = "_".join(f"{label}-{_text(value)}" for label, value in zip(labels, keys.values(), strict=True))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    is_exact = all(float(_text(value)) == value for value in keys.values() if isinstance(value, float))
    if safe == name and len(name) <= _MAX_NAME and is_exact:
        return name
    whole = json.dumps(dict(keys), sort_keys=True, default=str)
    return f"{safe[:_MAX_NAME]}-{hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(keys: PointKeys) -> str:
    return ", ".join(f"{key}={value}" for key, value in keys.items())


def _get(config: RunConfig, key: str) -> Any:
    section, _, field = key.partition(".")
    return getattr(getattr(config, section), field)
