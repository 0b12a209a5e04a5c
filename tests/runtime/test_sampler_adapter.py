"""A real vLLM engine that takes adapters: only the adapter travels, and every version takes effect."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from raylign.errors import ModelError, StaleWeightsError
from raylign.runtime.sampler_engine import SamplerEngine, _plain
from raylign.runtime.weight_sync import Bucket
from tests.sampler_models import (
    VLLM,
    build_model,
    check_greedy,
    greedy,
    prompts,
    save,
    settings,
    started,
    sync,
)

pytestmark = VLLM
RANK = 4


@pytest.fixture(scope="module")
def policy() -> Any:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = build_model(3, tied=False, kind="qwen2")  # untied and with biases, unlike the model of the full updates
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(base, lora).eval()


@pytest.fixture(scope="module")
def engine(policy, make_tokenizer, tmp_path_factory) -> Iterator[SamplerEngine]:
    directory = tmp_path_factory.mktemp("base")
    base = build_model(3, tied=False, kind="qwen2")  # built again, without the names that peft gives
    save(base, make_tokenizer(), directory)
    with started(SamplerEngine(settings(directory, lora_rank=RANK))) as engine:
        yield engine


def perturb_adapter(policy: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def adapter_of(policy: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings as in adapter_model.safetensors and adapter_config.json."""
    from peft import get_peft_model_state_dict

    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(policy).items()}
    return tensors, policy.peft_config["default"].to_dict()


def test_every_version_of_the_adapter_takes_effect(engine, policy):
    check_greedy(engine, policy, 0)
    answers = [[greedy(policy, prompt) for prompt in prompts()]]
    # the trainer may resume from an earlier version, so versions may come again with other weights
    for turn, version in enumerate((1, 2, 2, 1)):
        perturb_adapter(policy, turn)
        weights, adapter = adapter_of(policy)
        assert sync(engine, policy, version, weights, adapter=adapter).largest < 1e-3
        check_greedy(engine, policy, version)
        answers.append([greedy(policy, prompt) for prompt in prompts()])
    assert all(old != new for old, new in pairwise(answers))
    assert engine._llm.llm_engine.list_loras() == {4}  # older ones are gone


def test_a_damaged_adapter_is_found_by_its_checksum(engine, policy):
    def damage(buckets: list[Bucket]) -> None:
        buckets[0].data[2] ^= 8

    weights, adapter = adapter_of(policy)
    with pytest.raises(StaleWeightsError, match=r"tensor base_model.* has checksum"):
        sync(engine, policy, 5, weights, adapter=adapter, damage=damage)


def test_an_adapter_under_a_known_id_is_stale_and_found_by_the_probe(engine, policy):
    """What vLLM does when an id comes again: it keeps the old tensors and says that all is well."""
    weights, adapter = adapter_of(policy)
    sync(engine, policy, 6, weights, adapter=adapter)
    perturb_adapter(policy, 50)
    weights, adapter = adapter_of(policy)
    engine._num_adapters -= 1
    engine._lora, kept = None, engine._lora
    with pytest.raises(StaleWeightsError, match="probe's log-probabilities"):
        sync(engine, policy, 7, weights, adapter=adapter)
    engine._lora = kept
    sync(engine, policy, 8, weights, adapter=adapter)
    check_greedy(engine, policy, 8)


def test_adapter_config_must_be_json():
    assert _plain({"b", "a"}) == ["a", "b"]
    with pytest.raises(ModelError, match="not JSON"):
        _plain(object())
