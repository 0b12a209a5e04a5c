"""The configuration of a calibration: one base configuration, reward models that change some of its keys, and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from raylign.config import TEXT_REWARDS, RunConfig, Section, load_config, merge_config, without_idle
from raylign.errors import ConfigError

_VARIED = ("reward.", "brme.", "robust.")


class CalibrateSection(Section):
    """Which reward models are compared, on which noise, and how far their maximum is driven."""

    rewards: dict[str, dict[str, Any]] = Field(
        description="name -> dotted keys of the sections reward, brme and robust", min_length=1
    )
    seeds: list[int] = Field([0, 1, 2], description="seeds of label flips and of fits", min_length=1)
    flips: list[Annotated[float, Field(ge=0, lt=0.5)]] = Field(
        [0.0, 0.1, 0.25], description="shares of training and validation pairs whose order is reversed", min_length=1
    )
    num_prompts: int = Field(40, ge=2, description="harmful prompts whose answers rewards choose among")
    num_candidates: int = Field(32, ge=2, description="answers of the policy to each of them")
    trained: list[str] = Field([], description="names that a policy gradient maximises as well, with every seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTrial:
    """One reward model with one seed.

    Attributes:
        name: of the reward model.
        seed: of flips and fits.
        config: resolved, of a run that maximises it; `run.name` ends in "<name>-seed<seed>".
    """

    name: str
    seed: int
    config: RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A checked calibration.

    Attributes:
        base: configuration of the phases that all reward models share.
        calibrate: names, seeds, flips.
        trials: reward models in order, for every seed; seeds outermost.
    """

    base: RunConfig
    calibrate: CalibrateSection
    trials: tuple[RewardTrial, ...]

    @property
    def directory(self) -> Path:
        """`<run.storage>/<run.name>`, absolute."""
        return Path(self.base.run.storage).expanduser().absolute() / self.base.run.name

    def trial(self, name: str, seed: int) -> RewardTrial:
        """The trial of a name and a seed."""
        return next(trial for trial in self.trials if (trial.name, trial.seed) == (name, seed))


def load_calibration(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Calibration:
    """Read a calibration from a YAML file with a `calibrate` section and any sections of a run.

    Args:
        path: YAML file.
        overrides: "section.key=value" strings, "calibrate.seeds=[0,1]" among them.

    Raises:
        ConfigError: no `calibrate` section, a reward model that reads texts, a key that reward models must share, or
            anything that `load_config` refuses.
    """
    merged = merge_config(path, overrides)
    section = merged.pop("calibrate", None)
    if not isinstance(section, Mapping):
        raise ConfigError("a calibration needs a section calibrate with rewards (see the shipped calibrate_tiny.yaml)")
    try:
        calibrate = CalibrateSection.model_validate(section)
    except ValidationError as error:
        found = "; ".join(f"calibrate.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(found) from None
    _check_section(calibrate)
    trials = tuple(
        RewardTrial(name=name, seed=seed, config=_trial_config(merged, name, keys, seed))
        for seed in calibrate.seeds
        for name, keys in calibrate.rewards.items()
    )
    return Calibration(base=load_config(values=without_idle(merged)), calibrate=calibrate, trials=trials)


def _check_section(calibrate: CalibrateSection) -> None:
    for name in ("seeds", "flips"):
        values = getattr(calibrate, name)
        if len(set(values)) != len(values):
            raise ConfigError(f"calibrate.{name}={values} names a value twice, which is no second measurement")
    unknown = sorted(set(calibrate.trained) - set(calibrate.rewards))
    if unknown:
        raise ConfigError(
            f"calibrate.trained names {', '.join(unknown)}, none of calibrate.rewards ({', '.join(calibrate.rewards)})"
        )


def _trial_config(merged: Mapping[str, Any], name: str, keys: Mapping[str, Any], seed: int) -> RunConfig:
    values: dict[str, Any] = {section: dict(content) for section, content in merged.items()}
    for key, value in keys.items():
        section, _, field = key.partition(".")
        if not field or not key.startswith(_VARIED):
            raise ConfigError(
                f"calibrate.rewards.{name} sets {key}; reward models differ in keys of reward, brme and robust, for "
                "example reward.kind, and share everything else"
            )
        values.setdefault(section, {})[field] = value
    run = values.setdefault("run", {})
    run["storage"] = str(Path(run.get("storage", "runs")) / run.get("name", "default"))
    run["name"] = f"{name}-seed{seed}"
    run["seed"] = seed
    # every reward model is put to the use that reads all of its keys
    values.setdefault("train", {})["method"] = "policy_gradient"
    try:
        config = load_config(values=without_idle(values, keep=keys))
    except ConfigError as error:
        raise ConfigError(f"calibrate.rewards.{name}: {error}") from None
    if config.reward.kind in TEXT_REWARDS:
        raise ConfigError(
            f"calibrate.rewards.{name}: reward.kind={config.reward.kind} is fine-tuned for minutes per fit; a "
            "calibration refits every reward on cached states, see raylign align for its held-out quality"
        )
    return config
