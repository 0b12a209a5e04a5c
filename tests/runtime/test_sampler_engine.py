"""A real vLLM engine: what it samples, and that new weights take effect, judged by transformers on the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from raylign.errors import SamplerError, StaleWeightsError
from raylign.runtime.sampler_engine import EngineNotStartedError, HalfUpdatedError, SamplerEngine
from raylign.runtime.weight_sync import Bucket
from tests.sampler_models import (
    ENDS,
    VLLM,
    as_saved,
    build_model,
    check_greedy,
    engine_process,
    greedy,
    perturb,
    prompts,
    requests,
    save,
    settings,
    started,
    sync,
    token_logps,
)

pytestmark = VLLM


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(0)


@pytest.fixture(scope="module")
def engine(model, make_tokenizer, tmp_path_factory) -> Iterator[SamplerEngine]:
    """Its checkpoint asks for a repetition penalty, which must not matter, and has a second end token."""
    directory = tmp_path_factory.mktemp("model")
    save(model, make_tokenizer(), directory, repetition_penalty=3.0, eos_token_id=list(ENDS))
    with started(SamplerEngine(settings(directory))) as engine:
        yield engine


def test_greedy_tokens_equal_transformers_after_every_change_of_the_weights(engine, model):
    check_greedy(engine, model, engine._version)
    before = [greedy(model, prompt) for prompt in prompts()]
    for version in (1, 2):
        perturb(model, 100 + version)
        # once under the names of state_dict, once as save_pretrained writes them
        weights = dict(model.state_dict()) if version == 1 else as_saved(model)
        difference = sync(engine, model, version, weights)
        assert difference.largest < 1e-4
        check_greedy(engine, model, version)
    after = [greedy(model, prompt) for prompt in prompts()]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_log_probs_are_of_temperature_one_and_untruncated(engine, model, monkeypatch):
    hot = dataclasses.replace(engine._settings, temperature=0.7, top_p=0.8)
    monkeypatch.setattr(engine, "_settings", hot)
    for rollout in engine.generate(requests(prompts(), num_samples=2), engine._version).rollouts:
        whole = np.concatenate([rollout.prompt_ids, rollout.response_ids])
        trainer = token_logps(model, whole)[len(rollout.prompt_ids) - 1 :]
        np.testing.assert_allclose(rollout.sampler_logps, trainer, atol=1e-4)


def test_responses_depend_on_their_seed_not_on_their_company(engine, monkeypatch):
    monkeypatch.setattr(engine, "_settings", dataclasses.replace(engine._settings, temperature=1.0))
    asked = requests(prompts(), num_samples=3)
    together = [rollout.response_ids.tolist() for rollout in engine.generate(asked, engine._version).rollouts]
    backwards = engine.generate(asked[::-1], engine._version).rollouts
    reverse = [rollout.response_ids.tolist() for rollout in backwards][::-1]
    alone = [engine.generate([request], engine._version).rollouts[0].response_ids.tolist() for request in asked[:4]]
    assert together == reverse
    assert together[:4] == alone
    assert together[0] != together[1]  # another seed
    moved = [dataclasses.replace(request, seed=request.seed + 1) for request in asked]
    assert [rollout.response_ids.tolist() for rollout in engine.generate(moved, engine._version).rollouts] != together


def test_responses_are_the_same_where_batch_and_cache_are_too_small_for_all(engine, monkeypatch):
    """More prompt tokens than one step of vLLM takes (4,096), and more responses than its cache holds."""
    monkeypatch.setattr(engine, "_settings", dataclasses.replace(engine._settings, temperature=1.0, max_new_tokens=150))
    rng = np.random.default_rng(5)
    asked = requests([rng.integers(5, 300, length).astype(np.int32) for length in range(40, 240, 4)])
    assert sum(len(request.prompt_ids) for request in asked) > 4096
    together = [rollout.response_ids.tolist() for rollout in engine.generate(asked, engine._version).rollouts]
    assert sum(map(len, together)) > 4096
    for request, response in list(zip(asked, together, strict=True))[::10]:
        assert engine.generate([request], engine._version).rollouts[0].response_ids.tolist() == response


def test_responses_end_with_any_end_token_or_at_the_limit(engine, monkeypatch):
    monkeypatch.setattr(engine, "_settings", dataclasses.replace(engine._settings, temperature=2.0, max_new_tokens=64))
    rollouts = engine.generate(requests(prompts()[:2], num_samples=40), engine._version).rollouts
    for rollout in rollouts:
        ids = rollout.response_ids.tolist()
        ends = [position for position, token in enumerate(ids) if token in ENDS]
        assert ends == ([len(ids) - 1] if rollout.reached_end else [])
        assert rollout.reached_end or len(ids) == 64
    assert {int(rollout.response_ids[-1]) for rollout in rollouts if rollout.reached_end} == set(ENDS)


def test_forwards_are_counted_one_by_one(engine, monkeypatch):
    """A response of n tokens needs n forwards, alone or with others; ends and limits of the settings do not count."""
    monkeypatch.setattr(engine, "_ends", [])
    for limit in (1, 7):
        monkeypatch.setattr(engine, "_settings", dataclasses.replace(engine._settings, max_new_tokens=limit))
        for asked in (requests(prompts()[:1]), requests(prompts()[:3], num_samples=2)):
            assert engine.generate(asked, engine._version).usage.decode_steps == limit


def test_responses_that_wait_for_each_other_take_more_forwards_than_the_longest(engine, monkeypatch):
    monkeypatch.setattr(engine, "_settings", dataclasses.replace(engine._settings, temperature=1.0, max_new_tokens=150))
    rng = np.random.default_rng(5)
    asked = requests([rng.integers(5, 300, 200).astype(np.int32) for _ in range(48)])  # 9,600 tokens, cache of 8,192
    answer = engine.generate(asked, engine._version)
    longest = max(len(rollout.response_ids) for rollout in answer.rollouts)
    assert longest + 1 < answer.usage.decode_steps < sum(len(rollout.response_ids) for rollout in answer.rollouts)
    assert answer.usage.peak_rss_mib > 100
    assert answer.usage.peak_device_mib == 0


def test_a_tensor_damaged_on_the_way_is_found_by_its_checksum(engine, model):
    def damage(buckets: list[Bucket]) -> None:
        buckets[2].data[5] ^= 4

    with pytest.raises(StaleWeightsError, match=r"engine 0, weights version 3: tensor model\.\S+ has checksum"):
        sync(engine, model, 3, as_saved(model), damage=damage)


def test_weights_that_vllm_did_not_load_are_found_by_the_probe(engine, model, monkeypatch):
    """The tensors arrive and vLLM says that it has loaded them, but one keeps its old values."""
    perturb(model, 200)
    network = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    load = network.load_weights
    stale = build_model(0).state_dict()

    def forgetful(pairs: Any) -> Any:
        name = "model.layers.1.mlp.down_proj.weight"
        return load((key, stale[key] if key == name else tensor) for key, tensor in pairs)

    with monkeypatch.context() as patch:
        patch.setattr(network, "load_weights", forgetful)
        with pytest.raises(StaleWeightsError, match=r"probe's log-probabilities differ .* in float32"):
            sync(engine, model, 4, as_saved(model))
    sync(engine, model, 5, as_saved(model))
    check_greedy(engine, model, 5)


def test_an_update_that_lacks_a_tensor_is_named(engine, model):
    weights = as_saved(model)
    del weights["model.layers.0.self_attn.o_proj.weight"]
    with pytest.raises(StaleWeightsError, match=r"1 parameters .* model\.layers\.0\.self_attn\.o_proj\.weight"):
        sync(engine, model, 6, weights)
    sync(engine, model, 7, as_saved(model))


def test_other_versions_and_new_processes_do_not_sample(engine):
    with pytest.raises(StaleWeightsError, match=r"holds weights version \d+, asked for was 77"):
        engine.generate(requests(prompts()), 77)
    with pytest.raises(EngineNotStartedError):
        SamplerEngine(engine._settings).generate(requests(prompts()), 0)


def test_the_context_is_the_least_of_the_models_and_the_settings(engine):
    assert engine.start().context == 400


def test_a_model_that_vllm_refuses_is_an_error_with_its_reason(make_tokenizer, tmp_path):
    directory = save(build_model(1, positions=8192), make_tokenizer(), tmp_path)
    too_long = settings(directory, max_length=8192, cache_mib=1)  # one sequence does not fit into the cache
    with engine_process(), pytest.raises(SamplerError, match=r"vLLM 0\..* cannot sample from .*: ValueError: .*cache"):
        SamplerEngine(too_long).start()


def test_an_adapter_needs_an_engine_that_takes_one(engine, model):
    with pytest.raises(SamplerError, match=r"policy\.adapter=lora"):
        sync(engine, model, 8, {}, adapter={"r": 4})


def test_after_an_update_of_another_shape_the_engine_takes_and_gives_nothing(engine, model):
    """Last, since vLLM cannot mend a half-loaded model."""
    weights = as_saved(model)
    weights["model.norm.weight"] = torch.ones(65)
    with pytest.raises(SamplerError, match="vLLM cannot load weights version 9"):
        sync(engine, model, 9, weights)
    with pytest.raises(StaleWeightsError, match="holds weights version -1"):
        engine.generate(requests(prompts()), 7)
    with pytest.raises(HalfUpdatedError, match="cannot take other weights"):
        sync(engine, model, 10, as_saved(model))
