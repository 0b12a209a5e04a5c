"""What a sampling engine is started with, and vLLM's arguments, number type and end tokens that follow from it."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylign.assets import model_directory
from raylign.errors import MissingDependencyError, SamplerError

if TYPE_CHECKING:
    from raylign.config import RunConfig

_PROCESS_BYTES = 1280 * 2**20  # vLLM 0.29 for CPUs peaked at 870 MiB; half as much again
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is started with; see `SamplerSection` for what is not explained here.

    Attributes:
        model_path: directory of the policy before training, readable on the engine's node.
        dtype: `policy.dtype`.
        lora_rank: rank of adapters to come, None for full weights.
        trust_remote_code: `policy.trust_remote_code`.
        max_length: longest sequence that will be asked for, prompt and response, in tokens.
        max_new_tokens: length limit of a response.
        temperature: 0 is greedy.
        top_p: nucleus.
        num_gpus: tensor-parallel size, 0 on CPUs.
        cache_mib: key-value cache on CPUs.
        gpu_memory_utilization: share of a GPU.
        enforce_eager: skip compilation.
        transfer_backend: vLLM's name of what brings full weights, None where they come as buckets.
    """

    model_path: str
    dtype: Literal["auto", "float32", "bfloat16"]
    lora_rank: int | None
    trust_remote_code: bool
    max_length: int
    max_new_tokens: int
    temperature: float
    top_p: float
    num_gpus: int
    cache_mib: int
    gpu_memory_utilization: float
    enforce_eager: bool
    transfer_backend: str | None = None


def engine_environment(cpus: float) -> dict[str, str]:
    """Environment of an engine's process, which must be set before torch is loaded.

    Args:
        cpus: CPUs of the engine. Engines and trainer share cores, and more threads than that slow all of them down.
    """
    return {
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines would bind to the same core
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # half the memory and start-up time; one engine per actor anyway
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def engine_settings(model_path: str, config: RunConfig) -> EngineSettings:
    """What the engines of a run are started with."""
    sampler, policy, data = config.sampler, config.policy, config.data
    longest = max(data.max_length, data.prompt_limit + sampler.max_new_tokens)
    return EngineSettings(
        model_path=model_path,
        dtype=policy.dtype,
        lora_rank=policy.lora_rank if policy.adapter == "lora" else None,
        trust_remote_code=policy.trust_remote_code,
        max_length=longest + 1,  # a probe of data.max_length tokens needs one more
        max_new_tokens=sampler.max_new_tokens,
        temperature=sampler.temperature,
        top_p=sampler.top_p,
        num_gpus=sampler.gpus_per_engine,
        cache_mib=sampler.cache_mib,
        gpu_memory_utilization=sampler.gpu_memory_utilization,
        enforce_eager=sampler.gpus_per_engine == 0 if sampler.enforce_eager is None else sampler.enforce_eager,
        transfer_backend=None if sampler.weight_transfer == "object_store" else sampler.weight_transfer,
    )


def engine_memory(config: RunConfig) -> int:
    """Bytes of main memory that an engine takes: weights in its number type, cache, and a process with vLLM.

    0 where that is not known: on GPUs, which hold the weights, and for a model that is no directory here.
    """
    directory = model_directory(config.policy.model)
    if config.sampler.gpus_per_engine or directory is None:
        return 0
    weight_bytes = 2 if config.policy.dtype == "bfloat16" else 4
    return _num_weights(directory) * weight_bytes + config.sampler.cache_mib * 2**20 + _PROCESS_BYTES


@functools.cache
def _num_weights(directory: Path) -> int:
    """Elements of all tensors of a checkpoint, from the headers of its files."""
    from safetensors import safe_open

    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def actor_options(config: RunConfig) -> dict[str, Any]:
    """Ray's options of an engine's actor."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    sampler, memory = config.sampler, engine_memory(config)
    return {
        "num_cpus": sampler.cpus_per_engine,
        "num_gpus": sampler.gpus_per_engine,
        **({"memory": memory} if memory else {}),
        "max_restarts": sampler.max_restarts,
        "max_task_retries": 0,
        # Trainer, trial or script may run in a placement group that holds no room for engines.
        "scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=None),
        "runtime_env": {"env_vars": engine_environment(sampler.cpus_per_engine)},
    }


def llm_arguments(settings: EngineSettings, dtype: str) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`.

    Raises:
        SamplerError: vLLM has no adapter rank as large as the policy's.
    """
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": dtype,
        "max_model_len": _context(settings),
        "trust_remote_code": settings.trust_remote_code,
        "load_format": "safetensors",
        "enforce_eager": settings.enforce_eager,
        "worker_extension_cls": "raylign.runtime.sampler_worker.WeightReceiver",
        "seed": 0,
    }
    if settings.num_gpus:
        arguments |= {
            "tensor_parallel_size": settings.num_gpus,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
        }
    else:
        arguments |= {
            # without it the cache is sized from the memory of the machine
            "kv_cache_memory_bytes": settings.cache_mib * 2**20,
            # vLLM rewinds the random stream of a response whose prompt it cuts in two, which no CPU generator can do
            "enable_chunked_prefill": False,
            # with vLLM's own 128 a small cache holds fewer responses: 12 % fewer tokens per second were measured
            "block_size": 32,
        }
    if settings.transfer_backend is not None:
        arguments["weight_transfer_config"] = {"backend": settings.transfer_backend}
    if settings.lora_rank is not None:
        rank = next((rank for rank in _LORA_RANKS if rank >= settings.lora_rank), None)
        if rank is None:
            raise SamplerError(f"policy.lora_rank={settings.lora_rank} exceeds vLLM's largest, {_LORA_RANKS[-1]}")
        # one more than in use: at an update the old adapter leaves after the new one has come
        arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 2, "max_cpu_loras": 2}
    return arguments


def _context(settings: EngineSettings) -> int:
    from raylign.models.loading import context_length, load_config

    context = context_length(load_config(settings.model_path, trust_remote_code=settings.trust_remote_code))
    return settings.max_length if context is None else min(context, settings.max_length)


def import_vllm(num_gpus: int) -> Any:
    """The module, when it can be imported and serves the devices that an engine asks for.

    vLLM takes what its build is for: it asks the driver, and CUDA_VISIBLE_DEVICES does not change its mind.

    Raises:
        MissingDependencyError: it is not installed, or its installation is broken.
        SamplerError: it would take a GPU that nobody reserved.
    """
    cure = "pip install '.[gpu]' where raylign lies" if num_gpus else "bash launch/setup.sh --vllm"
    try:
        import vllm
        from vllm.platforms import current_platform

        vllm.LLM  # noqa: B018  # loaded on first use, where a broken installation shows
    except ImportError as error:
        raise MissingDependencyError(
            f"the online methods sample with vLLM, which cannot be imported: {error}; {cure}"
        ) from error
    device = current_platform.device_type
    if num_gpus == 0 and device != "cpu":
        raise SamplerError(
            f"sampler.gpus_per_engine=0, but this vLLM is built for {device} and would take a device that nobody "
            "reserved: set sampler.gpus_per_engine=1, or install the CPU build (bash launch/setup.sh --vllm)"
        )
    return vllm


def dtype_name(settings: EngineSettings) -> str:
    """Torch name of the number type that the engine computes in, "float32"."""
    from raylign.models.loading import resolve_dtype

    return str(resolve_dtype(settings.dtype, "cuda" if settings.num_gpus else "cpu")).removeprefix("torch.")


def end_ids(settings: EngineSettings) -> list[int]:
    """As evaluation finds them, from the checkpoint's files instead of a loaded model."""
    from types import SimpleNamespace

    from transformers import GenerationConfig

    from raylign.evaluation.generation import end_token_ids
    from raylign.models.loading import load_config, load_tokenizer

    try:
        generation = GenerationConfig.from_pretrained(settings.model_path)
    except OSError:  # no generation_config.json: transformers falls back to the model's own, too
        config = load_config(settings.model_path, trust_remote_code=settings.trust_remote_code)
        generation = GenerationConfig.from_model_config(config)
    tokenizer = load_tokenizer(settings.model_path, trust_remote_code=settings.trust_remote_code)
    return end_token_ids(SimpleNamespace(generation_config=generation), tokenizer)
