"""Forwards counted at the executor, what an engine does with half an update, and the usage of several engines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raylign.cost.ledger import peak_rss_mib
from raylign.errors import RaylignError, SamplerError
from raylign.runtime.sampler_engine import HalfUpdatedError, SamplerEngine
from raylign.runtime.sampler_usage import ForwardCounter, SamplerUsage, side_by_side
from raylign.runtime.weight_sync import UpdateHeader
from tests.sampler_models import settings

HEADER = UpdateHeader(version=2, adapter=None, probe_ids=(1, 2, 3))


class FakeExecutor:
    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> tuple[int, bool]:
        return scheduler_output.total_num_scheduled_tokens, non_block


class FakeLLM:
    """Takes updates, of which some fail at the given worker call."""

    def __init__(self, fails_at: str | None) -> None:
        self.fails_at = fails_at
        self.calls: list[str] = []
        self.executor = FakeExecutor()

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method)
        if method == self.fails_at:
            raise ValueError("no such layer")
        return [()]

    def reset_prefix_cache(self) -> bool:
        return self.fails_at != "reset"

    def generate(self, *_: Any, **__: Any) -> list[Any]:
        if self.fails_at == "probe":
            raise ValueError("no forward")
        self.executor.execute_model(SimpleNamespace(total_num_scheduled_tokens=3))
        entries = SimpleNamespace(
            start_indices=[0, 0, 1], end_indices=[0, 1, 2], token_ids=[2, 3], logprobs=[-1.0, -2.0]
        )
        return [SimpleNamespace(prompt_logprobs=entries)]


def engine_on(llm: FakeLLM) -> SamplerEngine:
    engine = SamplerEngine(settings("nowhere"))
    engine._llm, engine._dtype, engine._counter = llm, "float32", ForwardCounter(llm.executor)
    return engine


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one name that a probe takes from vLLM."""
    import sys

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))


def test_batches_with_tokens_are_counted_and_passed_on():
    executor = FakeExecutor()
    counter = ForwardCounter(executor)
    for tokens in (5, 1, 0, 1):
        found = executor.execute_model(SimpleNamespace(total_num_scheduled_tokens=tokens), non_block=True)
        assert found == (tokens, True)
    usage = counter.take()
    assert usage.decode_steps == 3
    assert 10 < usage.peak_rss_mib <= peak_rss_mib()
    assert counter.take().decode_steps == 0


def test_engines_work_at_the_same_time():
    usages = [
        SamplerUsage(decode_steps=3, peak_rss_mib=9, peak_device_mib=1),
        SamplerUsage(decode_steps=5, peak_rss_mib=4, peak_device_mib=2),
    ]
    assert side_by_side(usages) == SamplerUsage(decode_steps=5, peak_rss_mib=9, peak_device_mib=2)
    assert side_by_side([]) == SamplerUsage()


def test_an_update_has_the_forwards_of_its_probe(vllm):
    engine = engine_on(FakeLLM(None))
    report = engine.apply_update(HEADER, [])
    assert (report.version, report.usage.decode_steps) == (2, 1)
    np.testing.assert_array_equal(report.probe_logps, np.array([-1, -2], np.float32))


@pytest.mark.parametrize("fails_at", ["raylign_begin", "raylign_finish", "reset", "probe"])
def test_after_half_an_update_no_other_is_begun(vllm, fails_at):
    llm = FakeLLM(fails_at)
    engine = engine_on(llm)
    with pytest.raises((SamplerError, ValueError)):
        engine.apply_update(HEADER, [])
    llm.fails_at, llm.calls = None, []
    with pytest.raises(HalfUpdatedError, match="cannot take other weights"):
        engine.apply_update(HEADER, [])
    assert not llm.calls
    assert not issubclass(HalfUpdatedError, RaylignError)  # which the pool would not survive


def test_a_refused_adapter_leaves_the_engine_as_it_was(vllm):
    engine = engine_on(FakeLLM(None))
    with pytest.raises(SamplerError, match=r"policy\.adapter=lora"):
        engine.apply_update(UpdateHeader(version=1, adapter={"r": 4}, probe_ids=(1, 2, 3)), [])
    assert engine.apply_update(HEADER, []).version == 2
