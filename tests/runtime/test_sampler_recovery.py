"""A pool of real engines: one is killed in the middle of its work, one stops answering."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from raylign.config import load_config
from raylign.runtime.weight_sync import Probe, WeightUpdate
from raylign.types import SampleRequest
from tests.sampler_models import VLLM, as_saved, build_model, perturb, prompts, save, token_logps

pytestmark = [*VLLM, pytest.mark.ray, pytest.mark.slow]
MAX_NEW = 200


def update_of(model: Any, version: int) -> WeightUpdate:
    ids = np.concatenate(prompts(seed=9))[:150]
    probe = Probe(token_ids=tuple(ids.tolist()), token_logps=token_logps(model, ids))
    return WeightUpdate(version=version, weights=as_saved(model), adapter=None, probe=probe)


def work(num_prompts: int) -> list[SampleRequest]:
    rng = np.random.default_rng(1)
    return [
        SampleRequest(
            prompt_index=i, sample_index=0, prompt_ids=rng.integers(5, 300, 20 + i % 7).astype(np.int32), seed=i
        )
        for i in range(num_prompts)
    ]


def test_killed_and_hung_engines_are_replaced_with_the_right_weights(
    ray_cluster, make_tokenizer, tmp_path, caplog, monkeypatch
):
    from raylign.runtime.sampler import SamplerPool

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = build_model(0)
    path = save(model, make_tokenizer(), tmp_path)
    sampler = {"num_engines": 2, "cpus_per_engine": 0.5, "cache_mib": 32, "max_new_tokens": MAX_NEW, "timeout_s": 120}
    config = load_config(values={"train": {"method": "policy_gradient"}, "sampler": sampler})
    pool = SamplerPool.start(str(path), config=config)
    try:
        perturb(model, 7)
        report = pool.sync(update_of(model, 1))
        assert report.probe_max_difference < 1e-4
        few = pool.generate(work(4))
        whole = pool.generate(work(400))
        assert [r.response_ids.tolist() for r in whole[:4]] == [r.response_ids.tolist() for r in few]

        # kill engine 1 while it samples
        victim = threading.Timer(0.4, os.kill, (pool._facts[1].pid, signal.SIGKILL))
        victim.start()
        again = pool.generate(work(400))
        victim.join()
        assert pool.num_restarts == 1
        assert "sampling engine 1" in caplog.text and "died while holding 200 prompts" in caplog.text
        assert [r.prompt_index for r in again] == list(range(400))
        assert {r.weight_version for r in again} == {1}
        assert [r.response_ids.tolist() for r in again] == [r.response_ids.tolist() for r in whole]
        for rollout in again[::37]:  # the replacement holds the synced weights, not those of the directory
            ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
            trainer = token_logps(model, ids)[len(rollout.prompt_ids) - 1 :]
            np.testing.assert_allclose(rollout.sampler_logps, trainer, atol=1e-4)

        # engine 0 stops answering; its process must be gone afterwards
        hung = pool._facts[0].pid
        os.kill(hung, signal.SIGSTOP)
        pool._config = pool._config.model_copy(update={"timeout_s": 15.0})
        start = time.monotonic()
        assert [r.response_ids.tolist() for r in pool.generate(work(4))] == [r.response_ids.tolist() for r in few]
        assert time.monotonic() - start < 180
        assert pool.num_restarts == 2
        assert "sampling engine 0" in caplog.text and "hung while holding 2 prompts" in caplog.text
        with pytest.raises(ProcessLookupError):
            os.kill(hung, 0)
    finally:
        pool.stop()
