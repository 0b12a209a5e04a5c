"""What engines are started with, and what happens where vLLM is missing; no engine is started."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from raylign.config import load_config
from raylign.errors import MissingDependencyError, SamplerError
from raylign.models.loading import resolve_model
from raylign.runtime.sampler_engine import SamplerEngine
from raylign.runtime.sampler_settings import EngineSettings, engine_environment, engine_settings, llm_arguments


def settings(**sections: dict[str, Any]) -> EngineSettings:
    values = {"train": {"method": "policy_gradient"}} | sections
    return engine_settings(resolve_model("embedded"), load_config(values=values))


@pytest.mark.parametrize(("num_gpus", "extra"), [(0, r"launch/setup\.sh --vllm"), (2, r"'\.\[gpu\]'")])
def test_a_missing_vllm_is_an_error_that_names_the_extra(monkeypatch, num_gpus, extra):
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = SamplerEngine(settings(sampler={"gpus_per_engine": num_gpus}))
    with pytest.raises(MissingDependencyError, match=extra):
        engine.start()


def test_the_context_holds_any_prompt_with_its_response_and_a_probe():
    assert settings(data={"max_length": 512}, sampler={"max_new_tokens": 64}).max_length == 513
    # prompts of 384 tokens and long answers
    long = settings(data={"max_length": 512}, sampler={"max_new_tokens": 400})
    assert long.max_length == 384 + 400 + 1
    assert llm_arguments(long, "float32")["max_model_len"] == 785
    beyond = settings(data={"max_length": 4096})
    assert llm_arguments(beyond, "float32")["max_model_len"] == 1024  # the embedded model's own


def test_full_weights_take_no_adapters():
    assert "enable_lora" not in llm_arguments(settings(), "float32")


@pytest.mark.parametrize(("rank", "largest"), [(1, 1), (4, 8), (16, 16), (65, 128)])
def test_adapter_ranks_are_rounded_up_to_those_of_vllm(rank, largest):
    arguments = llm_arguments(settings(policy={"adapter": "lora", "lora_rank": rank}), "float32")
    assert arguments["max_lora_rank"] == largest
    assert arguments["max_loras"] == 2


def test_a_rank_beyond_vllms_largest_is_refused():
    with pytest.raises(SamplerError, match=r"policy\.lora_rank=513 exceeds vLLM's largest, 512"):
        llm_arguments(settings(policy={"adapter": "lora", "lora_rank": 513}), "float32")


def test_cpus_get_a_cache_of_fixed_size_and_gpus_a_share():
    cpu = llm_arguments(settings(sampler={"cache_mib": 8}), "float32")
    assert cpu["kv_cache_memory_bytes"] == 8 * 2**20
    assert "gpu_memory_utilization" not in cpu
    gpu = llm_arguments(settings(sampler={"gpus_per_engine": 2, "gpu_memory_utilization": 0.3}), "bfloat16")
    assert (gpu["tensor_parallel_size"], gpu["gpu_memory_utilization"]) == (2, 0.3)
    assert "kv_cache_memory_bytes" not in gpu


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, "1"), (1, "1"), (3, "3")])
def test_engines_have_one_thread_per_cpu(cpus, threads):
    environment = engine_environment(cpus)
    assert environment["OMP_NUM_THREADS"] == threads
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
