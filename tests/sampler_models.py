"""Models that vLLM takes, and what an engine must say of them, judged by transformers on the same weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylign.runtime.sampler_engine import SamplerEngine
from raylign.runtime.sampler_settings import EngineSettings, engine_environment
from raylign.runtime.weight_sync import (
    Bucket,
    Probe,
    ProbeDifference,
    UpdateHeader,
    check_report,
    checksums,
    pack_buckets,
)
from raylign.types import SampleRequest

VOCABULARY = 320
ENDS = (2, 9)  # the tokenizer's <eos>, and one that only generation_config.json names
BLOCK = 32  # tokens of a block of the engine's cache on CPUs
MAX_NEW = 12
NEAR_TIE = 1e-3  # difference of two logits that rounding can turn; other weights move logits by about 1
PROMPT_LENGTHS = (3, 20, BLOCK - 1, BLOCK, 4 * BLOCK + 9, 9 * BLOCK)

# vLLM, and the torch that it compiles with, warn of their own deprecations.
VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the vllm extra"),
    pytest.mark.filterwarnings("ignore"),
]


def settings(path: Path | str, **changes: Any) -> EngineSettings:
    base = EngineSettings(
        model_path=str(path),
        dtype="auto",
        lora_rank=None,
        trust_remote_code=False,
        max_length=400,
        max_new_tokens=MAX_NEW,
        temperature=0.0,
        top_p=1.0,
        num_gpus=0,
        cache_mib=4,  # 8,192 tokens, so that responses wait for each other and are preempted
        gpu_memory_utilization=0.5,
        enforce_eager=True,
    )
    return dataclasses.replace(base, **changes)


def build_model(seed: int, *, tied: bool = True, kind: str = "llama", positions: int = 512) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=ENDS[0],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    perturb(model, seed)
    return model


def perturb(model: Any, seed: int) -> None:
    """Move every tensor, far enough that greedy texts change."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def prompts(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCABULARY, length).astype(np.int32) for length in PROMPT_LENGTHS]


def requests(ids: list[np.ndarray], num_samples: int = 1) -> list[SampleRequest]:
    return [
        SampleRequest(prompt_index=prompt, sample_index=sample, prompt_ids=tokens, seed=1000 * prompt + sample)
        for prompt, tokens in enumerate(ids)
        for sample in range(num_samples)
    ]


@torch.no_grad()
def token_logps(model: Any, ids: np.ndarray) -> np.ndarray:
    """(T - 1,) log-probabilities of ids[1:]."""
    tokens = torch.from_numpy(ids).long()
    logps = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, tokens[1:, None])[:, 0].numpy()


@torch.no_grad()
def greedy(model: Any, prompt: np.ndarray) -> list[int]:
    """Transformers' greedy answer, one forward per token."""
    tokens = torch.from_numpy(prompt).long()[None]
    for _ in range(MAX_NEW):
        best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
        if int(best) in ENDS:
            break
    return tokens[0, len(prompt) :].tolist()


def check_greedy(engine: SamplerEngine, model: Any, version: int) -> None:
    """Equal answers, but for a token whose logit is so near the best that rounding decides."""
    ids = prompts()
    rollouts = engine.generate(requests(ids), version).rollouts
    assert {rollout.weight_version for rollout in rollouts} == {version}
    for prompt, rollout in zip(ids, rollouts, strict=True):
        found, wanted = rollout.response_ids.tolist(), greedy(model, prompt)
        place = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
        if place is None:
            assert found == wanted
        else:
            gap = greedy_gap(model, [*prompt.tolist(), *wanted[:place]], found[place])
            assert gap < NEAR_TIE, f"prompt of {len(prompt)} tokens, response token {place}, logits {gap:.2g} apart"


@torch.no_grad()
def greedy_gap(model: Any, ids: list[int], token: int) -> float:
    """How far the logit of `token` after `ids` is below the best one."""
    logits = model(torch.tensor(ids)[None]).logits[0, -1]
    return float(logits.max() - logits[token])


def sync(
    engine: SamplerEngine,
    model: Any,
    version: int,
    weights: dict[str, torch.Tensor],
    *,
    adapter: dict[str, Any] | None = None,
    max_bytes: int = 20_000,  # several buckets, some of one tensor
    damage: Callable[[list[Bucket]], None] | None = None,
) -> ProbeDifference:
    """What the pool does for one engine; `damage` changes the buckets on their way."""
    ids = np.concatenate(prompts(seed=9))[:170]
    probe = Probe(token_ids=tuple(ids.tolist()), token_logps=token_logps(model, ids))
    buckets = list(pack_buckets(weights, max_bytes))
    if damage is not None:
        damage(buckets)
    report = engine.apply_update(UpdateHeader(version=version, adapter=adapter, probe_ids=probe.token_ids), buckets)
    return check_report(report, engine="engine 0", version=version, sent=checksums(weights), probe=probe)


def as_saved(model: Any) -> dict[str, torch.Tensor]:
    """What `save_pretrained` writes: without the second name of a tied tensor."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


@contextmanager
def engine_process() -> Iterator[None]:
    """Let an engine run in the process of the tests: its environment, and what vLLM changes put back afterwards."""
    set_num_threads = torch.set_num_threads  # vLLM takes it away
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(1).items():
            patch.setenv(name, value)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
    torch.set_num_threads = set_num_threads


@contextmanager
def started(engine: SamplerEngine) -> Iterator[SamplerEngine]:
    """Start an engine in this process, and make room for another one at the end."""
    with engine_process():
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        engine.start()
        yield engine
        engine._llm.llm_engine.engine_core.shutdown()
        engine._llm = None
        cleanup_dist_env_and_memory()


def save(model: Any, tokenizer: Any, directory: Path, **generation: Any) -> Path:
    """Write a model beside a tokenizer, with further generation settings."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if generation:
        path = directory / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return directory
