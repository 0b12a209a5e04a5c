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

from raylign.config_sections import (
    EMBEDDED,
    ConfidenceSection,
    CostSection,
    DataSection,
    EvaluateSection,
    FeaturesSection,
    OnlineSection,
    PolicyGradientSection,
    PolicySection,
    ResourcesSection,
    RewardSection,
    RunSection,
    SamplerSection,
    Section,
    TrackingSection,
    TrainSection,
)
from raylign.errors import ConfigError

__all__ = [
    "EMBEDDED",
    "ConfidenceSection",
    "CostSection",
    "DataSection",
    "EvaluateSection",
    "FeaturesSection",
    "OnlineSection",
    "PolicyGradientSection",
    "PolicySection",
    "ResourcesSection",
    "RewardSection",
    "RunConfig",
    "RunSection",
    "SamplerSection",
    "Section",
    "TrackingSection",
    "TrainSection",
    "check_devices",
    "check_effects",
    "idle_keys",
    "known_keys",
    "load_config",
    "merge_config",
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
    confidence: ConfidenceSection = ConfidenceSection()
    train: TrainSection = TrainSection()
    online: OnlineSection = OnlineSection()
    sampler: SamplerSection = SamplerSection()
    policy_gradient: PolicyGradientSection = PolicyGradientSection()
    evaluate: EvaluateSection = EvaluateSection()
    resources: ResourcesSection = ResourcesSection()
    tracking: TrackingSection = TrackingSection()
    cost: CostSection = CostSection()

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """A step that suits the model and a loss that suits the method, unless they were given."""
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
        return {**values, "train": {**defaults, **train}}

    @model_validator(mode="after")
    def _keys_have_effect(self) -> RunConfig:
        check_effects(self)
        return self


def check_effects(config: RunConfig) -> None:
    """Refuse keys that were set but that the chosen method never reads.

    Raises:
        ConfigError: naming the key, the choice that makes it idle, and the choice that would read it.
    """
    for key, cure in idle_keys(config).items():
        section, _, name = key.partition(".")
        if name in getattr(config, section).model_fields_set:
            raise ConfigError(f"{key} is set but has no effect here; remove it or {cure}")
    if config.data.prompt_limit >= config.data.max_length:
        raise ConfigError(
            f"data.max_prompt_length={config.data.max_prompt_length} leaves no room for an answer "
            f"within data.max_length={config.data.max_length}"
        )
    if config.resources.gpus_per_worker not in (0, 1):
        raise ConfigError(
            f"resources.gpus_per_worker={config.resources.gpus_per_worker:g} must be 0 or 1: "
            "one process drives one GPU; use more workers (resources.num_workers)"
        )
    if config.train.method == "online_dpo" and config.train.objective == "label_confidence":
        raise ConfigError(
            "train.objective=label_confidence weighs stored labels; pairs sampled online are ordered by the reward "
            "itself: use dpo, cdpo, rdpo or ipo, or train.method=offline"
        )
    if config.train.method == "policy_gradient" and (config.sampler.temperature, config.sampler.top_p) != (1.0, 1.0):
        raise ConfigError(
            f"sampler.temperature={config.sampler.temperature:g} and sampler.top_p={config.sampler.top_p:g} must both "
            "be 1 for train.method=policy_gradient: other values sample from another policy than the trained one"
        )
    if config.evaluate.best_of > 1 and config.evaluate.temperature == 0:
        raise ConfigError(
            f"evaluate.best_of={config.evaluate.best_of} needs evaluate.temperature above 0: "
            "greedy answers are all alike"
        )
    if config.data.valid_fraction + config.data.test_fraction >= 1:
        raise ConfigError("data.valid_fraction + data.test_fraction must leave pairs to train on")


def idle_keys(config: RunConfig) -> dict[str, str]:
    """Keys that the chosen method does not read, each with the change that would make it read."""
    train, confidence, policy = config.train, config.confidence, config.policy
    idle: dict[str, str] = {}

    def reads(is_read: bool, section: str, names: Sequence[str], cure: str) -> None:
        if not is_read:
            idle.update({f"{section}.{name}": cure for name in names if f"{section}.{name}" not in idle})

    is_offline, is_gradient = train.method == "offline", train.method == "policy_gradient"
    uses_confidence = train.objective == "label_confidence" and is_offline
    online = "set train.method=online_dpo or policy_gradient"
    reads(not is_offline, "online", list(OnlineSection.model_fields), online)
    reads(not is_offline, "sampler", list(SamplerSection.model_fields), online)
    reads(not is_gradient, "train", ["objective", "beta"], "use policy_gradient.beta, or another train.method")
    reads(is_gradient, "policy_gradient", list(PolicyGradientSection.model_fields), "set train.method=policy_gradient")
    reads(train.method == "online_dpo", "online", ["reference", "pairs"], "set train.method=online_dpo")
    has_values = config.policy_gradient.advantage == "gae"
    value_keys = ["gae_lambda", "value_learning_rate", "value_clip"]
    reads(has_values, "policy_gradient", value_keys, "set policy_gradient.advantage=gae")
    reads(not has_values, "policy_gradient", ["group_scale"], "set policy_gradient.advantage=group")
    reads(is_offline, "train", ["epochs", "max_steps"], "use online.num_rounds and online.round_epochs")
    on_gpu = config.sampler.gpus_per_engine > 0
    reads(on_gpu, "sampler", ["gpu_memory_utilization"], "set sampler.gpus_per_engine above 0")
    reads(not on_gpu, "sampler", ["cache_mib"], "set sampler.gpus_per_engine=0")
    reads(train.objective in ("cdpo", "rdpo"), "train", ["label_smoothing"], "set train.objective=cdpo or rdpo")
    reads(train.objective == "ipo", "train", ["ipo_tau"], "set train.objective=ipo")
    reads(train.objective != "ipo", "train", ["beta"], "use train.ipo_tau, which is what ipo reads")
    reads(uses_confidence, "confidence", list(ConfidenceSection.model_fields), "set train.objective=label_confidence")
    live = confidence.source == "live"
    reads(live, "confidence", ["level", "track"], "set confidence.source=live")
    reads(live and confidence.track != "none", "confidence", ["track_learning_rate"], "set confidence.track=anchor")
    reads(live and confidence.track == "anchor", "confidence", ["track_batch_size"], "set confidence.track=anchor")
    squashed = confidence.squash == "sigmoid"
    reads(not squashed, "confidence", ["temperature"], "set confidence.squash=none")
    reads(squashed, "confidence", ["alpha", "center"], "set confidence.squash=sigmoid")
    has_ema = live and squashed and confidence.center == "ema"
    reads(has_ema, "confidence", ["center_decay"], "set confidence.source=live and confidence.center=ema")
    reads(config.data.format in ("auto", "pku"), "data", ["prefer"], "set data.format=auto or pku")
    has_steps = config.reward.epochs > 0
    head_steps = ["batch_size", "learning_rate"]
    reads(has_steps, "reward", head_steps, "set reward.epochs above 0")
    reads(policy.adapter == "lora", "policy", ["lora_rank", "lora_alpha", "lora_dropout"], "set policy.adapter=lora")
    reads(config.tracking.wandb != "off", "tracking", ["project"], "set tracking.wandb=offline")
    reads(config.cost.prices is not None, "cost", ["currency"], "set cost.prices")
    return idle


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


def check_devices(config: RunConfig) -> None:
    """Refuse a whole run whose parts would compute in different number types.

    Raises:
        ConfigError: some run on GPUs, some do not, and the type is left to each.
    """
    sampler = config.sampler
    gpus = {
        "features.gpus_per_actor": config.features.gpus_per_actor,
        "resources.gpus_per_worker": config.resources.gpus_per_worker,
    }
    if config.train.method != "offline":
        gpus |= {"sampler.gpus_per_engine": sampler.gpus_per_engine, "sampler.scorer_gpus": sampler.scorer_gpus}
    if len({number > 0 for number in gpus.values()}) > 1 and config.policy.dtype == "auto":
        shown = ", ".join(f"{key}={number:g}" for key, number in gpus.items())
        raise ConfigError(
            f"parts of the run are on different devices ({shown}), where policy.dtype=auto would mean two number "
            "types; set policy.dtype=float32 or bfloat16"
        )
