"""vLLM's weight transfer between a trainer and real engines, with gloo where NCCL has no GPU.

Calls, offsets of ranks, checks and what is done about faults are those of NCCL. Connection, buckets and who carries the
bytes are not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch

from raylign.config import load_config
from raylign.errors import ConfigError, MissingDependencyError, SamplerError, StaleWeightsError
from raylign.runtime import sampler, weight_transfer
from raylign.runtime.sampler_engine import SamplerEngine
from raylign.runtime.sampler_settings import engine_settings, llm_arguments
from raylign.runtime.weight_sync import Probe, WeightUpdate
from raylign.types import SampleRequest
from tests.sampler_models import VLLM, as_saved, build_model, perturb, prompts, save, settings, token_logps

BACKEND = "gloo"
GPUS = [
    "sampler.gpus_per_engine=1",
    "sampler.scorer_gpus=1",
    "resources.gpus_per_worker=1",
    "features.gpus_per_actor=1",
]


class GlooGroup:
    """What vLLM calls of its NCCL communicator: as there, a lost rank shows in nothing but that no call returns."""

    disabled = False

    def __init__(self, address: str, port: int, rank: int, num_ranks: int) -> None:
        timeout = timedelta(seconds=60)
        store = torch.distributed.TCPStore(address, port, num_ranks, is_master=rank == 0, timeout=timeout)
        self.group = torch.distributed.ProcessGroupGloo(store, rank, num_ranks, timeout)
        self.is_destroyed = threading.Event()

    def broadcast(self, tensor: torch.Tensor) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        try:
            self.group.broadcast([tensor], options).wait()
        except RuntimeError:
            self.is_destroyed.wait()
            raise

    def destroy(self) -> None:
        self.is_destroyed.set()


def register_receiver() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    class Receiver(NCCLWeightTransferEngine):
        def init_transfer_engine(self, info: Any) -> None:
            rank = info.rank_offset + self.parallel_config.rank
            self.model_update_group = GlooGroup(info.master_address, info.master_port, rank, info.world_size)

        def update_weights(self, update_info: Any) -> None:  # without the accelerator's synchronize
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, info: Any) -> None:
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self.model_update_group.broadcast(weight)
                self.model.load_weights([(name, weight)])

    WeightTransferEngineFactory.register_engine(BACKEND, Receiver)


class Engine(SamplerEngine):
    """Dies when it shall receive weights while the file `die` is there."""

    def start(self) -> Any:
        if self._llm is None:
            register_receiver()
        return super().start()

    def receive_transfer(self, update_info: Any) -> None:
        if os.path.exists(f"{self._settings.model_path}/die"):
            os._exit(1)
        super().receive_transfer(update_info)


@pytest.fixture
def gloo(monkeypatch):
    """Replaces NCCL by gloo on the trainer's side; the init info that this gives goes to `TransferGroup`."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory, nccl_engine

    class Sender(nccl_engine.NCCLTrainerWeightTransferEngine):
        def _broadcast(self, source: Any, meta: Any) -> None:
            for _, tensor in self._checked_iter(source, meta):
                self.model_update_group.broadcast(tensor.contiguous())

    class Info(nccl_engine.NCCLTrainerInitInfo):
        backend = BACKEND

    def open_endpoint(info: Any) -> GlooGroup:
        return GlooGroup(info.master_address, info.master_port, 0, info.world_size)

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", open_endpoint)
    monkeypatch.setitem(WeightTransferTrainerFactory._registry, BACKEND, lambda: Sender)
    make_group = weight_transfer.TransferGroup

    def make_info(address: str, port: int, num_ranks: int) -> Any:
        return Info(master_address=address, master_port=port, world_size=num_ranks, rank=0)

    monkeypatch.setattr(sampler, "TransferGroup", lambda *a, **options: make_group(*a, make_info=make_info, **options))


def update_of(model: Any, version: int) -> WeightUpdate:
    ids = np.concatenate(prompts(seed=9))[:150]
    probe = Probe(token_ids=tuple(ids.tolist()), token_logps=token_logps(model, ids))
    weights = {name: tensor.clone() for name, tensor in as_saved(model).items()}
    return WeightUpdate(version=version, weights=weights, adapter=None, probe=probe)


def check_samples(pool: Any, model: Any, version: int) -> None:
    """Both engines sample from the model as it is."""
    asked = [
        SampleRequest(prompt_index=i, sample_index=0, prompt_ids=ids, seed=i) for i, ids in enumerate(prompts(seed=2))
    ]
    rollouts = pool.generate(asked)
    assert {rollout.weight_version for rollout in rollouts} == {version}
    for rollout in rollouts:
        whole = np.concatenate([rollout.prompt_ids, rollout.response_ids])
        trainer = token_logps(model, whole)[len(rollout.prompt_ids) - 1 :]
        np.testing.assert_allclose(rollout.sampler_logps, trainer, atol=1e-4)


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
@VLLM[1]
@VLLM[2]
def test_weights_reach_every_engine_whatever_happens_to_one(ray_cluster, make_tokenizer, tmp_path, monkeypatch, gloo):
    import ray

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    model = build_model(0)
    save(model, make_tokenizer(), tmp_path)
    values = {"num_engines": 2, "cpus_per_engine": 0.5, "timeout_s": 90, "max_restarts": 3, "max_new_tokens": 12}
    config = load_config(values={"train": {"method": "policy_gradient"}, "sampler": values})
    config = config.model_copy(
        update={"sampler": config.sampler.model_copy(update={"weight_transfer": "nccl"})}  # refused without GPUs
    )
    started = replace(settings(tmp_path), transfer_backend=BACKEND)
    pool = sampler.SamplerPool._start(ray.remote(Engine), (started,), config)
    try:
        perturb(model, 1)
        report = pool.sync(update_of(model, 1))
        assert report.probe_max_difference < 1e-4
        assert report.num_bytes == 2 * sum(t.numel() * t.element_size() for t in as_saved(model).values())
        check_samples(pool, model, 1)
        perturb(model, 2)
        pool.sync(update_of(model, 2))  # over the same connection
        check_samples(ray.cloudpickle.loads(ray.cloudpickle.dumps(pool)), model, 2)

        # an engine that is lost between two transfers comes back with the last weights
        os.kill(pool._facts[0].pid, signal.SIGKILL)
        check_samples(pool, model, 2)
        assert pool.num_restarts == 1
        perturb(model, 3)
        pool.sync(update_of(model, 3))  # over a new connection
        check_samples(pool, model, 3)

        # a tensor that is damaged on the way is found, and nothing is sampled from it
        clean = update_of(model, 4)
        with monkeypatch.context() as patch:
            patch.setattr(weight_transfer._Source, "__iter__", damaged)
            with pytest.raises(StaleWeightsError, match=r"weights version 4: tensor model\.norm\.weight has checksum"):
                pool.sync(clean)
        with pytest.raises(StaleWeightsError, match="last sync of the sampling engines failed"):
            check_samples(pool, model, 4)
        pool.sync(replace(clean, version=5))
        check_samples(pool, model, 5)

        # lost in the middle: the update ends with what to do, and the next one finds new engines
        (tmp_path / "die").touch()
        begun = time.monotonic()
        with pytest.raises(SamplerError, match=r"weights version 6 broke \(Actor.* run\.resume=true"):
            pool.sync(update_of(model, 6))
        assert time.monotonic() - begun < values["timeout_s"] / 2
        (tmp_path / "die").unlink()
        pool.sync(update_of(model, 7))
        check_samples(pool, model, 7)
        assert pool.num_restarts == 3
    finally:
        pool.stop()
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def damaged(source: Any) -> Any:
    for name, tensor in source.weights.items():
        yield name, tensor + 1 if name == "model.norm.weight" else tensor


def test_the_engine_is_told_of_the_backend(tmp_path, make_tokenizer):
    save(build_model(0), make_tokenizer(), tmp_path)
    config = load_config(None, ["train.method=policy_gradient", "sampler.weight_transfer=nccl", *GPUS])
    told = llm_arguments(engine_settings(str(tmp_path), config), "bfloat16")
    assert told["weight_transfer_config"] == {"backend": "nccl"}
    config = load_config(None, ["train.method=policy_gradient", *GPUS])
    assert "weight_transfer_config" not in llm_arguments(engine_settings(str(tmp_path), config), "bfloat16")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], r"found sampler\.gpus_per_engine=0 and resources\.gpus_per_worker=0: give both GPUs"),
        ([*GPUS, "resources.gpus_per_worker=0", "policy.dtype=bfloat16"], r"found resources\.gpus_per_worker=0"),
        ([*GPUS, "policy.adapter=lora"], "has an adapter to send"),
    ],
)
def test_a_transfer_without_gpus_or_of_an_adapter_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        load_config(None, ["train.method=online_dpo", "sampler.weight_transfer=nccl", *keys])


def test_a_trainer_without_vllm_is_told_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_engine", None)
    with pytest.raises(MissingDependencyError, match="in the trainer's environment, too"):
        weight_transfer.check_transfer()


def test_a_call_that_never_returns_ends_with_the_limit():
    group = weight_transfer.TransferGroup([], num_processes=1, timeout_s=0.05)
    with pytest.raises(SamplerError, match=r"did not answer within sampler\.timeout_s=0\.05 s.*object_store"):
        group._run(threading.Event().wait, "answer")
