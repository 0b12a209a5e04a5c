"""What a call to the engines took: sequential forwards, counted where vLLM runs them, and peak memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from raylign.cost.ledger import peak_device_mib, peak_rss_mib
from raylign.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerUsage:
    """What one call took, of one engine or of a pool.

    Not seen: the steps and the memory of an engine that was lost and replaced during the call; with several GPUs per
    engine the memory of the processes that vLLM starts, one per GPU, which hold weights and cache: `peak_device_mib`
    is then far too low.

    Attributes:
        decode_steps: forwards of the model one after the other, prompts included; of a pool the most that one engine
            ran, since engines run side by side. A sync has those of its probe.
        peak_rss_mib: largest resident memory of an engine's process since it started, MiB.
        peak_device_mib: largest device memory that torch held in an engine's process since it started, MiB; 0 on CPUs.
    """

    decode_steps: int = 0
    peak_rss_mib: float = 0.0
    peak_device_mib: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAnswer:
    """What an engine sampled.

    Attributes:
        rollouts: one per request, in the order of the requests.
        usage: of the call.
    """

    rollouts: list[Rollout]
    usage: SamplerUsage


class ForwardCounter:
    """Counts the forwards of an engine.

    Where vLLM keeps several batches in flight, a step of `LLMEngine` may start a forward, collect one, or both. Hence
    the count is taken where the engine hands a batch to its executor, which is in the actor's process.

    Args:
        executor: `LLMEngine.model_executor`, whose method `execute_model` is wrapped.
    """

    def __init__(self, executor: Any) -> None:
        self._execute = executor.execute_model
        self._num_forwards = 0
        executor.execute_model = self._count

    def _count(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # a batch without tokens only tells the workers which responses have ended
        self._num_forwards += scheduler_output.total_num_scheduled_tokens > 0
        return self._execute(scheduler_output, *args, **kwargs)

    def take(self) -> SamplerUsage:
        """The usage of this process, with the forwards since the last `take`."""
        steps, self._num_forwards = self._num_forwards, 0
        return SamplerUsage(decode_steps=steps, peak_rss_mib=peak_rss_mib(), peak_device_mib=peak_device_mib())


def side_by_side(usages: Iterable[SamplerUsage]) -> SamplerUsage:
    """The usage of engines that worked at the same time: the largest of every figure, 0 of no engine."""
    found = [SamplerUsage(), *usages]
    return SamplerUsage(
        decode_steps=max(usage.decode_steps for usage in found),
        peak_rss_mib=max(usage.peak_rss_mib for usage in found),
        peak_device_mib=max(usage.peak_device_mib for usage in found),
    )
