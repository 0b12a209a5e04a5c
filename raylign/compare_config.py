"""The configuration of a comparison: one base configuration, methods that change a few of its keys, and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from raylign.config import (
    RunConfig,
    Section,
    cost_source,
    idle_keys,
    load_config,
    merge_config,
    needs_cost,
    without_idle,
)
from raylign.cost.projection import SIZES
from raylign.errors import ConfigError

_OWN_KEYS = (
    "run.",
    "policy.",
    "data.",
    "features.",
    "reward.",
    "cost_model.",
    "evaluate.",
    "resources.",
    "tracking.",
    "cost.",
)
DRIFT_KEYS = ("drift_prompts", "drift_candidates")


class CompareSection(Section):
    """What is compared with what."""

    methods: dict[str, dict[str, Any]] = Field(
        description="name -> dotted keys of that method; everything else is shared", min_length=2
    )
    seeds: list[int] = Field([0, 1, 2], description="seeds of training, sampling and evaluation prompts", min_length=1)
    baseline: str = Field("dpo", description="offline method whose cost the others' extra cost is counted from")
    rerank: str = Field("rerank", description="method whose extra cost is the denominator of the overhead ratio")
    num_points: int = Field(2, ge=1, description="checkpoints of every run that are evaluated, the last among them")
    target: float = Field(0.2, gt=0, lt=1, description="violation rate on harmful prompts whose cost is looked up")
    projections: list[str] = Field(["7B", "70B"], description="model sizes that FLOPs are projected to")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """One training of one method with one seed.

    Attributes:
        method: name of the method.
        seed: of the trial.
        config: resolved; `run.name` is "<comparison>/<method>-seed<seed>" in its last part.
    """

    method: str
    seed: int
    config: RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A checked comparison.

    Attributes:
        base: configuration of the phases that all methods share; it has no constraint, and names the source of costs
            when a method needs them.
        compare: methods, seeds, target.
        trials: methods in order, for every seed; seeds outermost.
    """

    base: RunConfig
    compare: CompareSection
    trials: tuple[Trial, ...]


def load_comparison(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison from a YAML file with a `compare` section and any sections of a run.

    Args:
        path: YAML file.
        overrides: "section.key=value" strings, "compare.seeds=[0,1]" among them.

    Raises:
        ConfigError: no `compare` section, an unknown method, a key that would make methods unequal, or anything that
            `load_config` refuses.
    """
    merged = merge_config(path, overrides)
    section = merged.pop("compare", None)
    if not isinstance(section, Mapping):
        raise ConfigError("a comparison needs a section compare with methods (see the shipped compare_tiny.yaml)")
    try:
        compare = CompareSection.model_validate(section)
    except ValidationError as error:
        found = "; ".join(f"compare.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(found) from None
    _check_section(compare)
    load_config(values={name: content for name, content in merged.items() if not isinstance(content, Mapping)})
    trials = tuple(
        Trial(method=method, seed=seed, config=_trial_config(merged, method, keys, seed))
        for seed in compare.seeds
        for method, keys in compare.methods.items()
    )
    _check_shared(merged, trials)
    kinds = {trial.method: trial.config.train.method for trial in trials}
    if kinds[compare.baseline] != "offline":
        raise ConfigError(
            f"compare.baseline={compare.baseline!r} has train.method={kinds[compare.baseline]}; extra costs are "
            "counted from a method with train.method=offline"
        )
    return Comparison(base=shared_config(merged, [trial.config for trial in trials]), compare=compare, trials=trials)


def shared_config(merged: Mapping[str, Any], configs: Sequence[RunConfig]) -> RunConfig:
    """The configuration of the phases that several runs share.

    Constraints belong to the runs, what prices responses to all of them.

    Args:
        merged: nested values that the runs share.
        configs: of the runs.
    """
    values = {name: section for name, section in merged.items() if name != "constraint"}
    sources = {cost_source(config) for config in configs if needs_cost(config)}
    if sources:
        (source,) = sources  # follows from sections that no run may change
        values["cost_model"] = {**values.get("cost_model", {}), "source": source}
    return load_config(values=without_idle(values))


def _check_section(compare: CompareSection) -> None:
    """Refuse names and numbers that contradict each other."""
    for role in ("baseline", "rerank"):
        if getattr(compare, role) not in compare.methods:
            raise ConfigError(
                f"compare.{role}={getattr(compare, role)!r} is none of compare.methods ({', '.join(compare.methods)})"
            )
    if compare.baseline == compare.rerank:
        raise ConfigError(
            f"compare.baseline and compare.rerank are both {compare.rerank!r}, which costs nothing more than itself; "
            "name two methods"
        )
    repeated = sorted({seed for seed in compare.seeds if compare.seeds.count(seed) > 1})
    if repeated:
        raise ConfigError(
            f"compare.seeds={compare.seeds} names {', '.join(map(str, repeated))} more than once; a run that is "
            "counted twice is no second measurement"
        )
    unknown = [size for size in compare.projections if size not in SIZES]
    if unknown:
        raise ConfigError(
            f"compare.projections: sizes {', '.join(unknown)} are not known; projections exist for {', '.join(SIZES)}"
        )


def _check_shared(merged: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Refuse a shared key that neither a method nor the comparison itself reads."""
    for name in DRIFT_KEYS:
        if name in merged.get("evaluate", {}):
            raise ConfigError(f"evaluate.{name} is set but a comparison measures no drift; remove it")
    for section, content in merged.items():
        for name in content:
            if all(f"{section}.{name}" in idle_keys(trial.config) for trial in trials):
                raise ConfigError(f"{section}.{name} is set but none of compare.methods reads it; remove it")


def _trial_config(merged: Mapping[str, Any], method: str, keys: Mapping[str, Any], seed: int) -> RunConfig:
    values: dict[str, Any] = {name: dict(section) for name, section in merged.items()}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if not name:
            raise ConfigError(
                f"compare.methods.{method}: {key!r} must look like section.key, for example train.objective"
            )
        if key.startswith(_OWN_KEYS):
            raise ConfigError(
                f"compare.methods.{method} sets {key}, which all methods must share; set it once, outside of compare"
            )
        values.setdefault(section, {})[name] = value
    values.setdefault("train", {}).setdefault("keep_checkpoints", 10_000)  # those to evaluate are chosen at the end
    run = values.setdefault("run", {})
    run["storage"] = str(Path(run.get("storage", "runs")) / run.get("name", "default"))
    run["name"] = f"{method}-seed{seed}"
    run["seed"] = seed
    try:
        return load_config(values=without_idle(values, keep=keys))
    except ConfigError as error:
        raise ConfigError(f"compare.methods.{method}: {error}") from None
