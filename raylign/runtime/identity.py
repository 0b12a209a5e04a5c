"""What a checkpoint belongs to, so that a run is only ever continued by the run that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raylign.config import EMBEDDED, RunConfig, idle_keys
from raylign.config_effects import AVA

# Settings that may change between a run and its continuation: they move cost and floating-point order, not the method.
FREE_KEYS = frozenset(
    {
        "policy.model",  # its fingerprint counts, not its path
        "policy.gradient_checkpointing",
        "policy.trust_remote_code",
        "train.batch_tokens",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.log_every",
        "train.max_failures",
        "train.parallel",
        "sampler.num_engines",
        "sampler.cpus_per_engine",
        "sampler.gpus_per_engine",
        "sampler.scorer_cpus",
        "sampler.scorer_gpus",
        "sampler.cache_mib",
        "sampler.gpu_memory_utilization",
        "sampler.enforce_eager",
        "sampler.weight_transfer",
        "sampler.start_timeout_s",
        "sampler.timeout_s",
        "sampler.max_restarts",
        "constraint.prompt_safety",
        "constraint.cvar_level",
    }
)


def run_identity(
    config: RunConfig, *, model: str | Path, reward: str | Path | None, cost: str | Path | None = None
) -> dict[str, Any]:
    """What a checkpoint belongs to, the pairs apart: everything that decides the weights, by dotted config key.

    Args:
        config: of the run.
        model: directory of the policy before training; its bytes count.
        reward: directory of the reward phase, or None.
        cost: directory of the cost phase, or None; it counts where a constraint reads the costs.
    """
    from raylign.models.loading import artefact_fingerprint, model_fingerprint

    read = {"heads": reward, "cost": cost if config.constraint.kind != "none" else None}
    fingerprints = {name: artefact_fingerprint(path) for name, path in read.items() if path is not None}
    return method_identity(config) | fingerprints | {"model": model_fingerprint(model)}


def method_identity(config: RunConfig) -> dict[str, Any]:
    """The part of `run_identity` that the configuration alone tells, by dotted key; reads no file.

    Args:
        config: of the run; keys that its method does not read and `FREE_KEYS` are left out.
    """
    is_live = config.train.objective == "label_confidence" and config.confidence.source == "live"
    # keys of sections that the method does not read are idle
    sections = ["policy", "train", "online", "sampler", "policy_gradient", "confidence"]
    sections += ["reward", "brme", "features"] if is_live else []
    is_variational = config.train.method == "offline" and config.train.objective in AVA
    sections += ["ava"] if is_variational else []  # a reward model may read the section as well
    sections += ["robust"] if config.train.method != "offline" else []
    # without a constraint its section says nothing, and checkpoints from before there were constraints go on
    sections += ["constraint"] if config.constraint.kind != "none" else []
    # likewise the credit of tokens
    by_token = config.train.method == "policy_gradient" and config.policy_gradient.credit == "token"
    sections += ["token_reward"] if by_token else []
    idle = idle_keys(config)
    keys = {
        f"{section}.{name}": value
        for section in sections
        for name, value in getattr(config, section).model_dump().items()
        if f"{section}.{name}" not in idle and f"{section}.{name}" not in FREE_KEYS
    }
    if not by_token:
        keys.pop("policy_gradient.credit", None)
    return keys | {"run.seed": config.run.seed}


def base_model_name(name: str, path: str) -> str | None:
    """What an adapter calls its base: the hub id, which means the same on every machine, or the directory.

    None for a model that is an adapter itself, which has a base already.

    Args:
        name: policy.model as configured.
        path: directory that it was resolved to.
    """
    if (Path(path) / "adapter_config.json").is_file():
        return None
    is_directory = name == EMBEDDED or Path(name).expanduser().is_dir()
    return path if is_directory else name
