"""Which keys of constraints and cost models have an effect together. No torch, no ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from raylign.assets import EMBEDDED
from raylign.config_constraint import ConstraintSection
from raylign.config_cost_model import FINE_TUNED_KEYS, CostModelSection
from raylign.errors import ConfigError

if TYPE_CHECKING:
    from raylign.config import RunConfig


_LEVELS = ("prompt_safety", "cvar_level")  # of what is reported of costs, with a constraint or without


def needs_cost(config: RunConfig) -> bool:
    """Whether a run prices responses: a constraint reads the costs, or a source of costs is named."""
    return config.constraint.kind != "none" or config.cost_model.source != "auto"


def cost_source(config: RunConfig) -> Literal["labels", "fine_tuned", "embedded", "external"]:
    """What prices responses where a run needs costs."""
    if config.cost_model.source != "auto":
        return config.cost_model.source
    return "embedded" if config.policy.model == EMBEDDED else "labels"


def check_cost_model(config: RunConfig) -> None:
    """Refuse sources of costs that cannot be, and samples that are all alike."""
    source, cost_model = cost_source(config), config.cost_model
    if not needs_cost(config):
        return
    if config.evaluate.constraint_samples > 1 and config.evaluate.temperature == 0:
        raise ConfigError(
            f"evaluate.constraint_samples={config.evaluate.constraint_samples} needs evaluate.temperature above 0: "
            "greedy answers are all alike"
        )
    if source == "fine_tuned" and cost_model.epochs == 0:
        raise ConfigError(
            "cost_model.epochs=0 leaves the head of a member as it was drawn: use 1 or more, or "
            "cost_model.source=labels"
        )
    if source == "external" and cost_model.model is None:
        raise ConfigError("cost_model.source=external needs cost_model.model, the directory of a safety classifier")
    if source == "embedded" and config.policy.model != EMBEDDED:
        raise ConfigError(
            f"cost_model.source=embedded reads hidden states of the embedded model, not of policy.model="
            f"{config.policy.model}: use labels, when your pairs have safety verdicts, or external"
        )
    if source == "embedded" and config.features.layers != "all":
        raise ConfigError(
            f"cost_model.source=embedded reads all layers, features.layers={config.features.layers} keeps some: use "
            "features.layers=all or cost_model.source=labels"
        )


def check_constraint(config: RunConfig) -> None:
    """Refuse a multiplier that could not move, and constraints that stored pairs cannot keep."""
    constraint = config.constraint
    if constraint.kind == "none":
        return
    if config.train.method == "offline":
        _check_offline_constraint(config)
    elif constraint.multiplier == "dual":
        raise ConfigError(
            "constraint.multiplier=dual is solved for over stored responses, of sampled ones it moves from round to "
            "round: give its start, a number, or set train.method=offline"
        )
    if constraint.kind == "fixed_penalty" or constraint.multiplier == "dual":
        return
    if config.train.method != "offline" and constraint.multiplier_space == "log" and constraint.multiplier == 0:
        raise ConfigError(
            "constraint.multiplier=0 never moves in log space: start above 0, or set constraint.multiplier_space=linear"
        )
    if constraint.multiplier > constraint.multiplier_max:
        raise ConfigError(
            f"constraint.multiplier={constraint.multiplier:g} is above its cap "
            f"constraint.multiplier_max={constraint.multiplier_max:g}: lower the one or raise the other"
        )


def _check_offline_constraint(config: RunConfig) -> None:
    """Refuse what stored pairs, or the label confidence of this run, cannot express."""
    kind, confidence = config.constraint.kind, config.confidence
    if kind not in ("rectified", "expected"):
        raise ConfigError(
            f"constraint.kind={kind} is of sampled responses: over stored pairs (train.method=offline) use rectified "
            "or expected, whose multiplier is fixed when constraint.multiplier is a number"
        )
    if confidence.source == "live":
        raise ConfigError(
            "confidence.source=live reads the reward of current states and no cost, so constraint.kind="
            f"{kind} would have no effect: use confidence.source=fixed"
        )
    if config.constraint.multiplier == "dual" and confidence.squash == "sigmoid":
        raise ConfigError(
            "confidence.squash=sigmoid bounds what a cost can take off a reward, so that no multiplier may reach the "
            "constraint: set confidence.squash=none, or constraint.multiplier to a number"
        )


def add_idle_constraint(config: RunConfig, reads: Callable[[bool, str, Sequence[str], str], None]) -> None:
    """Keys of the constraint, and of the confidence under it, that the method and its kind do not read."""
    kind, keys, method = config.constraint.kind, list(ConstraintSection.model_fields), config.train.method
    is_gradient, is_offline = method == "policy_gradient", method == "offline"
    is_read = is_gradient or (is_offline and config.train.objective == "label_confidence")
    has_costs = config.cost_model.source != "auto" or (is_read and kind != "none")
    reads(has_costs, "constraint", _LEVELS, "set constraint.kind=rectified or cost_model.source=labels")
    keys = [key for key in keys if key not in _LEVELS]
    cure = "set train.objective=label_confidence or " if is_offline else ""
    reads(is_read, "constraint", keys, f"{cure}set train.method=policy_gradient")
    reads(kind != "none", "constraint", keys[1:], "set constraint.kind=rectified")
    reads(is_offline, "constraint", ["labels"], "set train.method=offline")
    moves = [key for key in keys if key.startswith("multiplier_")]
    reads(kind != "fixed_penalty", "constraint", moves, "use another constraint.kind than fixed_penalty")
    steps = [key for key in moves if key != "multiplier_max"]
    reads(is_gradient, "constraint", steps, "set train.method=policy_gradient")
    reads(kind in ("expected", "rectified_mean"), "constraint", ["threshold"], "set constraint.kind=expected")
    reads(kind in ("rectified", "split"), "constraint", ["tolerance"], "set constraint.kind=rectified")
    is_dual = config.constraint.multiplier == "dual"
    reads(is_gradient or is_dual, "constraint", ["threshold", "tolerance"], "set constraint.multiplier=dual")
    if kind != "none" and config.constraint.labels == "hard":
        reads(False, "confidence", ["floor", "alpha", "center"], "set constraint.labels=confidence")
        reads(is_dual, "confidence", ["squash", "temperature"], "set constraint.labels=confidence")
    reads(kind == "split", "constraint", ["split_normalise", "split_reduction"], "set constraint.kind=split")


def add_idle_cost_model(config: RunConfig, reads: Callable[[bool, str, Sequence[str], str], None]) -> None:
    """Keys of the cost model that nobody, or its source, does not read."""
    keys, source = list(CostModelSection.model_fields), cost_source(config)
    cure = "set constraint.kind=rectified or cost_model.source=labels"
    reads(needs_cost(config), "cost_model", keys[1:], cure)
    reads(needs_cost(config), "evaluate", ["constraint_samples"], cure)
    reads(source == "external", "cost_model", ["model", "label"], "set cost_model.source=external")
    reads(source in ("external", "fine_tuned"), "cost_model", ["batch_tokens"], "set cost_model.source=fine_tuned")
    reads(source == "fine_tuned", "cost_model", FINE_TUNED_KEYS, "set cost_model.source=fine_tuned")
    reads(source == "labels", "cost_model", ["ridge", "weight_decay"], "set cost_model.source=labels")
    fitted = [key for key in keys[1:] if key not in ("model", "label", "batch_tokens", *FINE_TUNED_KEYS)]
    reads(source in ("labels", "fine_tuned"), "cost_model", fitted, "set cost_model.source=labels")
    has_steps = config.cost_model.epochs > 0 or source == "fine_tuned"  # which refuses to have none
    steps = ["batch_size", "learning_rate", "weight_decay", "regularization"]
    reads(has_steps, "cost_model", steps, "set cost_model.epochs above 0")
