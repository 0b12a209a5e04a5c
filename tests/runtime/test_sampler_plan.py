"""Who samples what, and when a lost engine ends the run."""

from __future__ import annotations

import numpy as np
import pytest

from raylign.errors import ModelError, SamplerError
from raylign.runtime.sampler_plan import EngineFault, check_lengths, check_restart, split_requests
from raylign.types import SampleRequest


def requests(lengths: list[int], num_samples: int = 1) -> list[SampleRequest]:
    """Samples interleaved, as a caller may order them."""
    return [
        SampleRequest(prompt_index=prompt, sample_index=sample, prompt_ids=np.ones(length, np.int32), seed=0)
        for sample in range(num_samples)
        for prompt, length in enumerate(lengths)
    ]


def fault(kind: str = "died", num_prompts: int = 7) -> EngineFault:
    return EngineFault(engine=3, node="10.0.0.9", kind=kind, num_prompts=num_prompts, detail="exit code 137")


@pytest.mark.parametrize("num_engines", [1, 2, 3, 5])
def test_every_request_goes_to_one_engine(num_engines):
    asked = requests([5, 9, 2, 30], num_samples=3)
    shares = split_requests(asked, num_engines, 8)
    assert len(shares) == num_engines
    assert sorted(position for share in shares for position in share) == list(range(len(asked)))


def test_all_responses_to_a_prompt_are_sampled_on_one_engine():
    asked = requests([5, 9, 2, 30], num_samples=3)
    owners = [{asked[position].prompt_index for position in share} for share in split_requests(asked, 2, 8)]
    assert not owners[0] & owners[1]


def test_shares_are_balanced_by_tokens_not_by_number():
    # works are 100 + 10 and five of 10 + 10: one engine takes the long prompt, the other all short ones
    shares = split_requests(requests([100, 10, 10, 10, 10, 10]), 2, 10)
    assert shares == [[0], [1, 2, 3, 4, 5]]


def test_the_split_depends_only_on_the_requests():
    asked = requests([7] * 6, num_samples=2)
    assert split_requests(asked, 2, 4) == split_requests(list(asked), 2, 4)


def test_a_fault_within_the_limit_is_told_and_survived():
    message = check_restart(fault(), num_restarts=1, max_restarts=2)
    assert "engine 3 on node 10.0.0.9 died while holding 7 prompts (exit code 137)" in message
    assert "restart 2 of 2" in message


@pytest.mark.parametrize(("kind", "cure"), [("died", "memory"), ("hung", "sampler.timeout_s"), ("failed", "message")])
def test_one_fault_too_many_ends_the_run(kind, cure):
    with pytest.raises(SamplerError, match="engine 3 on node") as caught:
        check_restart(fault(kind), num_restarts=2, max_restarts=2)
    message = str(caught.value)
    assert f"{kind} while holding 7 prompts" in message
    assert "all 2 restarts (sampler.max_restarts)" in message
    assert cure in message


def test_a_fault_during_a_sync_does_not_speak_of_prompts():
    assert "died while receiving weights" in fault(num_prompts=0).describe()


def test_prompts_must_leave_room_for_the_response():
    check_lengths(requests([4, 12]), max_new_tokens=4, context=16)
    with pytest.raises(ModelError, match=r"longest prompt \(13 tokens\) and a response of 4 exceed.* 16"):
        check_lengths(requests([4, 13]), max_new_tokens=4, context=16)


def test_a_prompt_must_not_be_empty():
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        check_lengths(requests([4, 0]), max_new_tokens=4, context=16)
