"""`raylign check` and `raylign env`: everything that can be found wrong before Ray starts or a model loads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylign.calibrate_config import Calibration
from raylign.config import EMBEDDED, RunConfig, check_devices
from raylign.errors import MissingDependencyError, ModelError
from raylign.runtime.phases import versions
from raylign.runtime.resources import ResourcePlan, describe_demand

BROKEN_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def check_config(config: RunConfig) -> list[str]:
    """Check what a configuration names: files, model directories, packages.

    Returns:
        One line per thing looked at.

    Raises:
        RaylignError: the first thing that cannot work, with its cure.
    """
    from raylign.data.sources import list_files
    from raylign.evaluation.prompts import load_prompts
    from raylign.models.forward import resolve_layers
    from raylign.models.loading import check_context, load_config, load_tokenizer, resolve_layout, resolve_model

    check_devices(config)
    for problem in conflicts():
        raise MissingDependencyError(problem)
    check_packages(config)
    model = resolve_model(config.policy.model)
    trust = config.policy.trust_remote_code
    tokenizer = load_tokenizer(model, trust_remote_code=trust)
    architecture = load_config(model, trust_remote_code=trust)
    check_context(architecture, config.data.max_length)
    layers = resolve_layers(config.features.layers, architecture.num_hidden_layers)
    layout = resolve_layout(config.train.layout, architecture)
    if not any(Path(model).glob("*.safetensors")):
        raise ModelError(f"{model} has no *.safetensors weights; convert the model, other formats are not read")
    files = list_files(config.data.path)
    prompts = load_prompts(config.evaluate.prompts)
    if config.evaluate.judge != EMBEDDED and not _is_model(config.evaluate.judge):
        raise ModelError(
            f"evaluate.judge={config.evaluate.judge} is neither a model directory nor a hub id such as org/name"
        )
    _check_reward(config, num_layers=len(layers), width=architecture.hidden_size)
    sampled = config.online.num_rounds * config.online.prompts_per_round * config.online.num_samples
    sampler = (
        f"{config.sampler.num_engines} engine(s), {sampled} responses of up to {config.sampler.max_new_tokens} tokens"
    )
    return [
        f"model    {model} ({len(tokenizer)} tokens, chat template found, {architecture.model_type}, layout {layout})",
        f"features layers {', '.join(map(str, layers))}",
        f"data     {len(files)} file(s), first {files[0]}",
        f"prompts  {len(prompts)} ({sum(p.harmful for p in prompts)} harmful)",
        f"method   {method_name(config)}, {config.policy.adapter}, {config.resources.num_workers} worker(s)",
        *([f"sampler  {sampler}"] if config.train.method != "offline" else []),
        *(f"demand   {line}" for line in describe_demand(ResourcePlan.from_config(config))),
    ]


def _check_reward(config: RunConfig, *, num_layers: int, width: int) -> None:
    """What a reward needs besides the policy: a classifier with one output to read, or few enough weights.

    Args:
        config: of the run.
        num_layers: kept layers.
        width: of their states.

    Raises:
        ModelError: the classifier is not there, or has several outputs and none is named.
        DataError: more weights than a Laplace posterior is made for.
    """
    from transformers import AutoConfig

    from raylign.models.classifiers import reward_column
    from raylign.models.loading import resolve_model
    from raylign.rewards.laplace import check_size

    if config.reward.kind == "external" and config.reward_model.model is not None:
        path = resolve_model(config.reward_model.model, key="reward_model.model")
        reward_column(AutoConfig.from_pretrained(path), config.reward_model.label, where=str(path))
    if config.reward.kind == "laplace":
        check_size(num_layers, width)


def check_calibration(calibration: Calibration) -> list[str]:
    """Check what a calibration names, as `check_config` does, and its prompts.

    Returns:
        One line per thing looked at, and one per reward.

    Raises:
        RaylignError: the first thing that cannot work, with its cure.
    """
    from raylign.runtime.candidates_job import harmful_prompts

    settings, seed = calibration.calibrate, calibration.calibrate.seeds[0]
    lines = [line for line in check_config(calibration.base) if not line.startswith("method ")]
    harmful_prompts(calibration.base, settings.num_prompts)
    for name in settings.trained:
        check_devices(calibration.trial(name, seed).config)
    fits = len(calibration.fits) * len(settings.flips) * len(settings.seeds)
    trainings = len(settings.trained) * len(settings.trained_flips) * len(settings.seeds)
    lines.append(
        f"fits     {len(calibration.fits)} models x {len(settings.flips)} shares of flips x {len(settings.seeds)} "
        f"seeds = {fits}, and {trainings} trainings"
    )
    for name in settings.rewards:
        config = calibration.trial(name, seed).config
        rule = "" if config.reward.kind == "hybrid" else f", rule {config.robust.rule}"
        lines.append(f"reward   {name}: {config.reward.kind}{rule}{', trained' if name in settings.trained else ''}")
    return lines


def check_packages(config: RunConfig) -> None:
    """Refuse a run whose optional packages are not installed, before any of its phases starts.

    Raises:
        MissingDependencyError: naming the extra that installs the package.
    """
    if config.tracking.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise MissingDependencyError("tracking.wandb needs wandb: pip install wandb")
    if config.train.method != "offline" and importlib.util.find_spec("vllm") is None:
        gpu = "pip install '.[gpu]' where raylign lies"
        cure = gpu if config.sampler.gpus_per_engine else "bash launch/setup.sh --vllm"
        raise MissingDependencyError(f"train.method={config.train.method} samples with vLLM; install it: {cure}")


def method_name(config: RunConfig) -> str:
    """The method in one or two words: the loss of stored pairs, or the online method with its loss."""
    train = config.train
    if train.method == "offline":
        return train.objective
    return f"online {train.objective}" if train.method == "online_dpo" else "policy gradient"


def _is_model(name: str) -> bool:
    return (Path(name) / "config.json").is_file() or (name.count("/") == 1 and not Path(name).exists())


def conflicts() -> Iterator[str]:
    """Known broken combinations of installed packages, each with its cure."""
    local = importlib.metadata.version("torch").partition("+")[2]
    for name in BROKEN_COMPANIONS:
        try:
            companion = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if local == "cpu" and "cpu" not in companion:
            yield (
                f"{name} {companion} is a CUDA build beside the CPU build of torch, which breaks transformers; "
                f"cure: pip uninstall -y {' '.join(BROKEN_COMPANIONS)}"
            )


def environment() -> dict[str, Any]:
    """What a bug report needs: versions, devices, cores, conflicts. No environment variables, no secrets."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": devices,
        "bfloat16": bool(devices) and torch.cuda.is_bf16_supported(),
        "conflicts": list(conflicts()),
    }
