"""Decisions of the sampler pool, as functions: who samples what, what fits, and whether a lost engine ends the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raylign.errors import ModelError, SamplerError
from raylign.types import SampleRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFault:
    """An engine that has to be replaced.

    Attributes:
        engine: number of the engine.
        node: where it ran.
        kind: "died" (its process ended), "hung" (no answer in time), "failed" (an error that is not raylign's own) or
            "restarted" (it died while nobody was looking, and lost its weights).
        num_prompts: responses it was asked for and did not deliver; 0 when it was receiving weights.
        detail: one line on the cause.
    """

    engine: int
    node: str
    kind: Literal["died", "hung", "failed", "restarted"]
    num_prompts: int
    detail: str

    def describe(self) -> str:
        """One sentence for a message."""
        held = f"holding {self.num_prompts} prompts" if self.num_prompts else "receiving weights"
        return f"sampling engine {self.engine} on node {self.node} {self.kind} while {held} ({self.detail})"


def check_restart(fault: EngineFault, *, num_restarts: int, max_restarts: int) -> str:
    """Whether a fault may be survived.

    Args:
        fault: the latest.
        num_restarts: engines replaced so far.
        max_restarts: `sampler.max_restarts`.

    Returns:
        What to tell the user about the replacement.

    Raises:
        SamplerError: no restart is left.
    """
    if num_restarts < max_restarts:
        return f"{fault.describe()}; replacing it (restart {num_restarts + 1} of {max_restarts})"
    cures = {
        "died": "give engines more memory (lower sampler.cache_mib or sampler.gpu_memory_utilization, fewer engines)",
        "hung": "raise sampler.timeout_s or lower sampler.max_new_tokens or online.prompts_per_round",
        "failed": "see the engine's own message",
        "restarted": "give engines more memory (lower sampler.cache_mib or sampler.gpu_memory_utilization)",
    }
    raise SamplerError(
        f"{fault.describe()}, and all {max_restarts} restarts (sampler.max_restarts) are used up; {cures[fault.kind]}, "
        "or raise sampler.max_restarts"
    )


def split_requests(requests: Sequence[SampleRequest], num_engines: int, max_new_tokens: int) -> list[list[int]]:
    """Which engine samples which requests: all responses to a prompt on one engine, work balanced by tokens.

    The prompts go one after the other, longest work first, to the engine with the least. A prompt is computed once for
    all its responses, and a response is taken as long as it may become.

    Args:
        requests: what is asked for.
        num_engines: number of shares.
        max_new_tokens: length limit of a response.

    Returns:
        Positions in `requests`, one ascending list per engine, some perhaps empty.
    """
    positions: dict[int, list[int]] = defaultdict(list)
    for position, request in enumerate(requests):
        positions[request.prompt_index].append(position)
    work = {
        prompt: len(requests[members[0]].prompt_ids) + len(members) * max_new_tokens
        for prompt, members in positions.items()
    }
    loads = [0] * num_engines
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    for prompt in sorted(work, key=lambda prompt: (-work[prompt], prompt)):
        engine = min(range(num_engines), key=lambda index: loads[index])
        loads[engine] += work[prompt]
        shares[engine] += positions[prompt]
    return [sorted(share) for share in shares]


def check_lengths(requests: Sequence[SampleRequest], *, max_new_tokens: int, context: int) -> None:
    """Refuse what an engine could not finish.

    Raises:
        ModelError: the longest prompt and a response of `max_new_tokens` exceed the context, or a prompt is empty.
    """
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    if longest + max_new_tokens > context:
        raise ModelError(
            f"the longest prompt ({longest} tokens) and a response of {max_new_tokens} exceed the engine's context of "
            f"{context}, the least of the model's own and of what data.max_length and data.max_prompt_length with "
            "sampler.max_new_tokens allow; lower sampler.max_new_tokens or leave that prompt out"
        )
    for request in requests:
        if not len(request.prompt_ids):
            raise ModelError(f"prompt {request.prompt_index} has no tokens; the sampler needs at least one")
