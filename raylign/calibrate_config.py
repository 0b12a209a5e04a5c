"""The configuration of a calibration: one base configuration, reward models that change some of its keys, and noise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from raylign.config import TEXT_REWARDS, RunConfig, Section, idle_keys, load_config, merge_config, without_idle
from raylign.errors import ConfigError

_VARIED = ("reward", "brme", "robust")
_OF_TRAINING = ("train", "online", "sampler", "policy_gradient", "resources", "tracking")  # read when one is trained
_EVALUATE = ("prompts", "judge", "max_new_tokens", "batch_size", "num_actors", "bootstrap_samples")  # what is read


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
    trained_flips: list[float] = Field(
        [0.0], description="those of calibrate.flips at which the rewards that are trained on are fitted", min_length=1
    )

    @field_validator("flips", "trained_flips")
    @classmethod
    def _ascending(cls, flips: list[float]) -> list[float]:
        return sorted(flips)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTrial:
    """One reward model with one seed.

    Attributes:
        name: of the reward model.
        seed: of flips and fits.
        config: resolved, of a run that maximises it; `run.name` is "<name>-seed<seed>" in letters fit for a directory.
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

    @property
    def fits(self) -> tuple[tuple[str, ...], ...]:
        """Names of rewards that are one model under several rules over its members, in order: fitted once for all."""
        alike: dict[str, list[str]] = {}
        for name in self.calibrate.rewards:
            config = self.trial(name, self.calibrate.seeds[0]).config
            alike.setdefault(f"{config.reward!r} {config.brme!r}", []).append(name)
        return tuple(tuple(names) for names in alike.values())


def load_calibration(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Calibration:
    """Read a calibration from a YAML file with a `calibrate` section and any sections of a run.

    Args:
        path: YAML file.
        overrides: "section.key=value" strings, "calibrate.seeds=[0,1]" among them.

    Raises:
        ConfigError: no `calibrate` section, a reward model that reads texts, a key that reward models must share, a
            key that a calibration does not read, or anything that `load_config` refuses.
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
    load_config(values={name: content for name, content in merged.items() if not isinstance(content, Mapping)})
    trials = tuple(
        RewardTrial(name=name, seed=seed, config=_trial_config(merged, name, keys, seed))
        for seed in calibrate.seeds
        for name, keys in calibrate.rewards.items()
    )
    _check_read(merged, calibrate, trials)
    return Calibration(base=_base_config(merged, calibrate), calibrate=calibrate, trials=trials)


def _check_section(calibrate: CalibrateSection) -> None:
    for name in ("seeds", "flips", "trained_flips"):
        values = getattr(calibrate, name)
        if len(set(values)) != len(values):
            raise ConfigError(f"calibrate.{name}={values} names a value twice, which is no second measurement")
    directories: dict[str, str] = {}
    for name in calibrate.rewards:
        other = directories.setdefault(directory_name(name), name)
        if not directory_name(name) or other != name:
            raise ConfigError(
                f"calibrate.rewards: {name!r} and {other!r} need directories of their own; tell their names apart by "
                "letters, digits, dots and underscores"
                if other != name
                else f"calibrate.rewards: the name {name!r} needs a letter or a digit"
            )
    unknown = sorted(set(calibrate.trained) - set(calibrate.rewards))
    if unknown:
        raise ConfigError(
            f"calibrate.trained names {', '.join(unknown)}, none of calibrate.rewards ({', '.join(calibrate.rewards)})"
        )
    if "trained_flips" in calibrate.model_fields_set and not calibrate.trained:
        raise ConfigError("calibrate.trained_flips is set but nothing is trained; name rewards in calibrate.trained")
    if calibrate.trained and not set(calibrate.trained_flips) <= set(calibrate.flips):
        raise ConfigError(
            f"calibrate.trained_flips={calibrate.trained_flips} must be among calibrate.flips={calibrate.flips}, "
            "where the same rewards are judged on test pairs"
        )


def _check_read(merged: Mapping[str, Any], calibrate: CalibrateSection, trials: Sequence[RewardTrial]) -> None:
    """Refuse a shared key that neither a reward model nor the calibration itself reads."""
    trained = [trial.config for trial in trials if trial.name in calibrate.trained]
    for section, content in merged.items():
        for field, value in content.items():
            key = f"{section}.{field}"
            if section == "cost":
                raise ConfigError(f"{key} is set but a calibration prices nothing; remove it")
            if key == "train.method" and value != "policy_gradient" and trained:
                raise ConfigError(
                    f"train.method={value} is set but calibrate.trained trains by policy_gradient; remove it"
                )
            if section == "evaluate" and field not in _EVALUATE:
                raise ConfigError(
                    f"{key} is set but a calibration does not read it; of evaluate it reads {', '.join(_EVALUATE)}"
                )
            if section in _OF_TRAINING and not trained:
                raise ConfigError(
                    f"{key} is set but nothing is trained; remove it or name rewards in calibrate.trained"
                )
            readers = trained if section in _OF_TRAINING else [trial.config for trial in trials]
            if all(key in idle_keys(config) for config in readers):
                raise ConfigError(f"{key} is set but none of calibrate.rewards reads it; remove it")


def _base_config(merged: Mapping[str, Any], calibrate: CalibrateSection) -> RunConfig:
    """What all rewards share; keys that only some of their kinds read are left to these."""
    values = {name: dict(content) for name, content in merged.items() if name not in ("brme", "robust")}
    shared = values.get("reward", {})
    values["reward"] = {name: shared[name] for name in ("max_pairs",) if name in shared}
    if calibrate.trained:
        values.setdefault("train", {})["method"] = "policy_gradient"  # as the trials, with its devices
    return load_config(values=without_idle(values))


def _trial_config(merged: Mapping[str, Any], name: str, keys: Mapping[str, Any], seed: int) -> RunConfig:
    values: dict[str, Any] = {section: dict(content) for section, content in merged.items()}
    for key, value in keys.items():
        section, _, field = key.partition(".")
        if not field or section not in _VARIED or key == "reward.max_pairs":
            raise ConfigError(
                f"calibrate.rewards.{name} sets {key}; reward models differ in keys of reward, brme and robust, for "
                "example reward.kind, and share everything else, the pairs (reward.max_pairs) too: set it once, "
                "outside of calibrate"
            )
        values.setdefault(section, {})[field] = value
    run = values.setdefault("run", {})
    run["storage"] = str(Path(run.get("storage", "runs")) / run.get("name", "default"))
    run["name"] = f"{directory_name(name)}-seed{seed}"
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


def directory_name(name: str) -> str:
    """The name of a reward model in letters that a directory may have, for example "brme-w-0.2"."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-")
