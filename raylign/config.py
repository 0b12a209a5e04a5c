"""The configuration of a run: typed, frozen, checked before Ray starts or a model loads.

A default lives here and nowhere else. Unknown keys are errors that name the nearest key; a key that the chosen
objective does not read is an error too (`check_effects`). No torch, no ray.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from raylign.config_ava import AvaSection, TokenRewardSection
from raylign.config_constraint import ConstraintSection
from raylign.config_cost_effects import cost_source, needs_cost
from raylign.config_cost_model import FINE_TUNED_DEFAULTS, CostModelSection
from raylign.config_effects import (
    TEXT_REWARDS,
    TOKEN_REWARDS,
    check_devices,
    check_effects,
    idle_keys,
)
from raylign.config_sections import (
    EMBEDDED,
    BrmeSection,
    ConfidenceSection,
    CostSection,
    DataSection,
    EvaluateSection,
    FeaturesSection,
    OnlineSection,
    PolicyGradientSection,
    PolicySection,
    ResourcesSection,
    RewardModelSection,
    RewardSection,
    RobustSection,
    RunSection,
    SamplerSection,
    Section,
    TrackingSection,
    TrainSection,
)
from raylign.errors import ConfigError

__all__ = [
    "EMBEDDED",
    "TEXT_REWARDS",
    "TOKEN_REWARDS",
    "AvaSection",
    "BrmeSection",
    "ConfidenceSection",
    "ConstraintSection",
    "CostModelSection",
    "CostSection",
    "DataSection",
    "EvaluateSection",
    "FeaturesSection",
    "OnlineSection",
    "PolicyGradientSection",
    "PolicySection",
    "ResourcesSection",
    "RewardModelSection",
    "RewardSection",
    "RobustSection",
    "RunConfig",
    "RunSection",
    "SamplerSection",
    "Section",
    "TokenRewardSection",
    "TrackingSection",
    "TrainSection",
    "check_devices",
    "check_effects",
    "cost_source",
    "idle_keys",
    "known_keys",
    "load_config",
    "merge_config",
    "needs_cost",
    "to_yaml",
    "without_idle",
]


class RunConfig(Section):
    """Everything one run of the main job reads."""

    run: RunSection = RunSection()
    policy: PolicySection = PolicySection()
    data: DataSection = DataSection()
    features: FeaturesSection = FeaturesSection()
    reward: RewardSection = RewardSection()
    brme: BrmeSection = BrmeSection()
    reward_model: RewardModelSection = RewardModelSection()
    token_reward: TokenRewardSection = TokenRewardSection()
    ava: AvaSection = AvaSection()
    robust: RobustSection = RobustSection()
    confidence: ConfidenceSection = ConfidenceSection()
    train: TrainSection = TrainSection()
    online: OnlineSection = OnlineSection()
    sampler: SamplerSection = SamplerSection()
    policy_gradient: PolicyGradientSection = PolicyGradientSection()
    cost_model: CostModelSection = CostModelSection()
    constraint: ConstraintSection = ConstraintSection()
    evaluate: EvaluateSection = EvaluateSection()
    resources: ResourcesSection = ResourcesSection()
    tracking: TrackingSection = TrackingSection()
    cost: CostSection = CostSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """A step that suits the model, a loss the method, folds and a rule the reward and the cost, unless given."""
        if not isinstance(values, Mapping):
            return values
        train, policy = values.get("train", {}), values.get("policy", {})
        if not isinstance(train, Mapping) or not isinstance(policy, Mapping):
            return values
        if policy.get("model", EMBEDDED) == EMBEDDED:
            step = 5e-5
        else:
            step = 1e-5 if policy.get("adapter") == "lora" else 1e-6
        defaults: dict[str, Any] = {"learning_rate": step}
        if train.get("method") == "online_dpo":
            defaults["objective"] = "dpo"
        filled = {**values, "train": {**defaults, **train}}
        cost_model = values.get("cost_model", {})
        if isinstance(cost_model, Mapping) and cost_model.get("source") == "fine_tuned":
            filled["cost_model"] = {**FINE_TUNED_DEFAULTS, **cost_model}
        reward, evaluate, robust = (values.get(name, {}) for name in ("reward", "evaluate", "robust"))
        if not all(isinstance(section, Mapping) for section in (reward, evaluate, robust)):
            return filled
        if reward.get("kind") in ("lora_ensemble", "warm"):
            filled["reward"] = {"folds": 2, **reward}
        if reward.get("kind") in TOKEN_REWARDS:
            filled["reward"] = {"folds": 2, "num_heads": 1, "head_data": "all", **reward}
        is_read = train.get("method", "offline") != "offline" or evaluate.get("best_of", 1) != 1
        if reward.get("kind") == "brme" and reward.get("num_heads") != 1 and is_read:
            filled["robust"] = {"rule": "brme", **robust}
        return filled

    @model_validator(mode="after")
    def _keys_have_effect(self) -> RunConfig:
        check_effects(self)
        return self


class _Unchecked(RunConfig):
    """A configuration whose keys may be without effect."""

    @model_validator(mode="after")
    def _keys_have_effect(self) -> _Unchecked:
        return self


def without_idle(values: Mapping[str, Any], *, keep: Collection[str] = ()) -> dict[str, Any]:
    """Nested values without the keys that the method they choose does not read.

    Args:
        values: sections of a configuration.
        keep: dotted keys that stay, so that checking the result refuses them when they are idle.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    idle = set(idle_keys(_validate(values, _Unchecked))) - set(keep)
    return {
        section: {name: value for name, value in content.items() if f"{section}.{name}" not in idle}
        for section, content in values.items()
    }


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys, for example "train.beta"."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys.extend(known_keys(annotation, f"{prefix}{name}."))
        else:
            keys.append(prefix + name)
    return keys


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Build a checked configuration from defaults, a YAML file, a mapping and dotted overrides, later ones winning.

    Args:
        path: YAML file with the sections of `RunConfig`.
        overrides: "section.key=value" strings; values are read as YAML.
        values: nested mapping, for use from Python.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), bad value, or a key without effect.
    """
    return _validate(merge_config(path, overrides, values))


def merge_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The sections of a file, a mapping and dotted overrides, merged and not yet checked; see `load_config`.

    Raises:
        ConfigError: unreadable file, or an override that is none.
    """
    merged: dict[str, Any] = _read_yaml(Path(path)) if path is not None else {}
    for section, content in (values or {}).items():
        if isinstance(content, Mapping):
            merged.setdefault(section, {}).update(content)
        else:
            merged[section] = content
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or "." not in key:
            raise ConfigError(f"override {override!r} must look like section.key=value, for example train.beta=0.1")
        section, _, name = key.partition(".")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
        if not isinstance(merged.setdefault(section, {}), dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
        merged[section][name] = value
    return merged


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-6 as a number, as YAML 1.2 and people do; quoted text stays text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as 'train:', found {type(content).__name__}")
    return content


def _validate(merged: Mapping[str, Any], model: type[RunConfig] = RunConfig) -> RunConfig:
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        sections = list(RunConfig.model_fields)
        candidates = known_keys() + sections
        near = [k for k in known_keys() if k.rpartition(".")[2] == key.rpartition(".")[2]]
        near = near or difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(sections)}"
        return f"unknown config key {key}: {hint}"
    if isinstance(item.get("ctx", {}).get("error"), ConfigError):
        return str(item["ctx"]["error"])
    return f"{key}={item['input']!r}: {item['msg']}"


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, every key that has an effect spelled out; `load_config` reads it back."""
    content = config.model_dump()
    for key in idle_keys(config):
        section, _, name = key.partition(".")
        del content[section][name]
    return yaml.safe_dump({k: v for k, v in content.items() if v}, sort_keys=False, allow_unicode=True)
