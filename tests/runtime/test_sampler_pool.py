"""The pool against engines that die, hang, fail and lie as told; no vLLM."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylign.config import load_config
from raylign.errors import ModelError, ResourceError, SamplerError, StaleWeightsError
from raylign.runtime.sampler_engine import EngineFacts, EngineNotStartedError, HalfUpdatedError
from raylign.runtime.sampler_usage import EngineAnswer, SamplerUsage
from raylign.runtime.weight_sync import EngineReport, Probe, WeightUpdate, unpack_bucket
from raylign.types import Rollout, SampleRequest

pytestmark = pytest.mark.ray

CONTEXT = 64


class FakeEngine:
    """Answers with its weight "w"; every process takes its orders from a line of the file `lives`.

    Orders: ok, die, hang, fail, refuse (a raylign error), corrupt, die_in_sync, stumble (a raylign error halfway
    through an update), refuse_start, slow_start. Its forwards are three per request, its memory 100 MiB per request.
    """

    def __init__(self, directory: str, lives: tuple[str, ...]) -> None:
        # engines of one pool take their numbers in the order they start; a restarted one keeps its own
        self.root = Path(directory)
        self.lives = lives
        self.version: int | None = None
        self.weight = 0.0

    def start(self) -> EngineFacts:
        with open(self.root / "starts", "a") as file:
            file.write(f"{os.getpid()}\n")
        number = len((self.root / "starts").read_text().split()) - 1
        self.order = self.lives[min(number, len(self.lives) - 1)]
        if self.order == "refuse_start":
            raise SamplerError("vLLM refuses this")
        if self.order == "slow_start":
            time.sleep(60)
        self.version = 0
        return EngineFacts(node="fake", pid=os.getpid(), context=CONTEXT, dtype="float32", vllm_version="0")

    def generate(self, requests: list[SampleRequest], version: int) -> EngineAnswer:
        if self.version is None:
            raise EngineNotStartedError("new process")
        if version != self.version:
            raise StaleWeightsError(f"holds {self.version}, asked {version}")
        with open(self.root / "asked", "a") as file:
            file.write(f"{len(requests)}\n")
        if self.order == "die":
            os._exit(1)
        if self.order == "hang":
            time.sleep(60)
        if self.order == "fail":
            raise KeyError("out of luck")
        if self.order == "refuse":
            raise ModelError("no such prompt")
        rollouts = [
            Rollout(
                prompt_index=request.prompt_index,
                sample_index=request.sample_index,
                prompt_ids=request.prompt_ids,
                response_ids=np.array([request.seed], np.int32),
                sampler_logps=np.array([self.weight], np.float32),
                reached_end=True,
                weight_version=self.version,
            )
            for request in requests
        ]
        return EngineAnswer(rollouts=rollouts, usage=usage(3 * len(requests), 100.0 * len(requests)))

    def apply_update(self, header: Any, buckets: list[Any]) -> EngineReport:
        import ray

        if self.order == "die_in_sync":
            os._exit(1)
        if self.version == -1:
            raise HalfUpdatedError("a part of an earlier update")
        if self.order == "stumble":
            self.version = -1
            raise SamplerError("vLLM cannot load this")
        tensors, found = unpack_bucket(ray.get(buckets[0]))
        self.weight = float(tensors["w"])
        self.version = header.version
        if self.order == "corrupt":
            found["w"] ^= 1
        logps = np.full(len(header.probe_ids) - 1, -self.weight, np.float32)
        return EngineReport(
            version=header.version,
            dtype="float32",
            checksums=(found,),
            not_loaded=(),
            probe_logps=logps,
            usage=usage(1, 50.0),
        )

    def end_process(self) -> None:
        os._exit(1)


def usage(steps: int, mib: float) -> SamplerUsage:
    return SamplerUsage(decode_steps=steps, peak_rss_mib=mib, peak_device_mib=mib / 10)


def update(version: int, weight: float) -> WeightUpdate:
    probe = Probe(token_ids=(1, 2, 3), token_logps=np.full(2, -weight, np.float32))
    return WeightUpdate(version=version, weights={"w": torch.tensor(weight)}, adapter=None, probe=probe)


def requests(num_prompts: int = 5, num_samples: int = 2, length: int = 4) -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt_index=prompt, sample_index=sample, prompt_ids=np.ones(length, np.int32), seed=10 * prompt + sample
        )
        for sample in range(num_samples)
        for prompt in range(num_prompts)
    ]


@pytest.fixture
def start(ray_cluster, tmp_path):
    """Start a pool of fakes: start(lives, **sampler settings)."""
    import ray

    from raylign.runtime.sampler import SamplerPool

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test files
    pools = []

    def build(*lives: str, **sampler: Any) -> SamplerPool:
        settings = {"cpus_per_engine": 0.25, "timeout_s": 20, "max_new_tokens": 8} | sampler
        config = load_config(values={"train": {"method": "policy_gradient"}, "sampler": settings})
        pools.append(SamplerPool._start(ray.remote(FakeEngine), (str(tmp_path), lives), config))
        return pools[-1]

    yield build
    for pool in pools:
        pool.stop()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def answers(rollouts: list[Rollout]) -> list[tuple[int, int, int, float]]:
    return [(r.prompt_index, r.sample_index, int(r.response_ids[0]), float(r.sampler_logps[0])) for r in rollouts]


def expected(weight: float) -> list[tuple[int, int, int, float]]:
    return [(r.prompt_index, r.sample_index, r.seed, weight) for r in requests()]


def test_rollouts_come_in_the_order_of_the_requests_with_the_last_version(start):
    pool = start("ok", num_engines=2)
    assert {r.weight_version for r in pool.generate(requests())} == {0}
    report = pool.sync(update(4, 0.5))
    rollouts = pool.generate(requests())
    assert answers(rollouts) == expected(0.5)
    assert {r.weight_version for r in rollouts} == {4}
    assert (report.version, report.num_bytes) == (4, 8)
    assert report.probe_max_difference == 0
    assert pool.generate([]) == []


def test_usage_is_that_of_the_engine_with_the_most_in_the_last_call(start):
    pool = start("ok", num_engines=2)
    assert pool.usage == SamplerUsage()
    pool.generate(requests())  # shares of 6 and 4
    assert pool.usage == usage(18, 600.0)
    pool.sync(update(1, 0.5))
    assert pool.usage == usage(1, 50.0)


def test_a_pool_works_where_it_was_sent(start):
    import ray

    pool = start("ok")
    pool.sync(update(1, 0.25))

    @ray.remote(num_cpus=0)
    def elsewhere(pool: Any) -> Any:
        before = pool.generate(requests())
        pool.sync(update(2, 0.75))
        return before, pool.generate(requests())

    before, after = ray.get(elsewhere.remote(pool), timeout=60)
    assert answers(before) == expected(0.25)
    assert answers(after) == expected(0.75)


@pytest.mark.parametrize("fate", ["die", "hang", "fail"])
def test_a_lost_engine_is_replaced_and_only_its_prompts_are_asked_again(start, fate, tmp_path, caplog):
    # the third start is the replacement; which of the first two engines gets the order does not matter
    pool = start("ok", fate, "ok", num_engines=2, timeout_s=4)
    pool.sync(update(1, 0.5))
    assert answers(pool.generate(requests())) == expected(0.5)
    assert pool.num_restarts == 1
    asked = [int(line) for line in (tmp_path / "asked").read_text().split()]
    assert sorted(asked) == [4, 4, 6] or sorted(asked) == [4, 6, 6]
    kind = {"die": "died", "hang": "hung", "fail": "failed"}[fate]
    assert f"{kind} while holding" in caplog.text
    assert "restart 1 of 2" in caplog.text


def test_losses_beyond_the_limit_end_the_run(start):
    pool = start("die", max_restarts=1)
    with pytest.raises(SamplerError, match=r"engine 0 on node fake died while holding 10 prompts.*all 1 restarts"):
        pool.generate(requests())
    assert pool.num_restarts == 1


def test_an_engine_that_died_while_idle_gets_its_weights_back(start):
    import ray

    pool = start("ok")
    pool.sync(update(3, 0.5))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(pool._engines[0].end_process.remote(), timeout=30)
    rollouts = pool.generate(requests())
    assert answers(rollouts) == expected(0.5)
    assert {r.weight_version for r in rollouts} == {3}


def test_an_engine_that_dies_in_a_sync_is_replaced(start):
    pool = start("die_in_sync", "ok")
    assert pool.sync(update(1, 0.5)).version == 1
    assert answers(pool.generate(requests())) == expected(0.5)


def test_an_engine_that_holds_half_an_update_is_replaced_at_the_next(start, caplog):
    pool = start("stumble", "ok")
    with pytest.raises(SamplerError, match="vLLM cannot load this"):
        pool.sync(update(1, 0.25))
    assert pool.num_restarts == 0
    before = pool._facts[0].pid
    pool.sync(update(2, 0.5))
    assert (pool.num_restarts, pool._facts[0].pid == before) == (1, False)
    assert "failed while receiving weights (HalfUpdatedError" in caplog.text
    assert answers(pool.generate(requests())) == expected(0.5)


def test_an_engine_that_received_something_else_stops_the_run(start):
    pool = start("corrupt")
    with pytest.raises(StaleWeightsError, match="engine 0 on node fake, weights version 1: tensor w has checksum"):
        pool.sync(update(1, 0.5))
    for _ in range(2):  # the second time with a new process, which holds version 0, the weights before training
        with pytest.raises(StaleWeightsError, match="last sync of the sampling engines failed"):
            pool.generate(requests())
        os.kill(pool._facts[0].pid, signal.SIGKILL)
    assert pool.num_restarts == 0


def test_an_engine_that_was_taken_for_lost_and_still_answers_is_replaced(start):
    """Its node could not be reached for a while: waiting for a process that Ray never starts would end the run."""
    pool = start("ok")
    before = pool._facts[0].pid
    assert pool._restart(0, is_killed=False).pid != before


def test_errors_of_raylign_come_through_without_a_restart(start):
    pool = start("refuse")
    with pytest.raises(ModelError, match="no such prompt"):
        pool.generate(requests())
    assert pool.num_restarts == 0


def test_prompts_that_do_not_fit_are_refused_before_they_are_sent(start, tmp_path):
    pool = start("ok")
    with pytest.raises(ModelError, match=r"57 tokens.*response of 8.*64"):
        pool.generate(requests(length=57))
    assert not (tmp_path / "asked").exists()


def test_a_refused_model_is_told_in_the_words_of_the_engine(start):
    with pytest.raises(SamplerError, match="vLLM refuses this"):
        start("refuse_start")


def test_engines_that_do_not_start_in_time_are_an_error_with_the_free_resources(start):
    with pytest.raises(ResourceError, match=r"start_timeout_s=3 s; free are .* of 2 CPU.*sampler.num_engines"):
        start("slow_start", start_timeout_s=3)


def test_engines_that_fit_nowhere_are_an_error(start):
    with pytest.raises(ResourceError, match="2 sampling engines were not placed"):
        start("ok", num_engines=2, cpus_per_engine=2, start_timeout_s=3)


def test_stop_gives_the_resources_back_and_may_be_called_twice(start):
    import ray

    pool = start("ok", cpus_per_engine=2)
    pool.stop()
    pool.stop()
    with pytest.raises(SamplerError, match="stopped"):
        pool.generate(requests())
    start("ok", cpus_per_engine=2, start_timeout_s=30)
    assert ray.available_resources().get("CPU", 0) < 2


def test_engines_stay_out_of_the_callers_placement_group(start):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 0.5}])
    ray.get(group.ready(), timeout=30)

    @ray.remote(num_cpus=0.5)
    def inside() -> bool:
        from raylign.runtime.sampler import SamplerPool

        config = load_config(values={"train": {"method": "policy_gradient"}, "sampler": {"cpus_per_engine": 1}})
        pool = SamplerPool._start(ray.remote(Placed), (), config)
        found = ray.get(pool._engines[0].has_group.remote(), timeout=30)
        pool.stop()
        return found

    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    assert ray.get(inside.options(scheduling_strategy=strategy).remote(), timeout=60) is False
    remove_placement_group(group)


class Placed:
    """Tells whether it lives in a placement group."""

    def start(self) -> EngineFacts:
        return EngineFacts(node="fake", pid=0, context=CONTEXT, dtype="float32", vllm_version="0")

    def has_group(self) -> bool:
        from ray.util.placement_group import get_current_placement_group

        return get_current_placement_group() is not None
