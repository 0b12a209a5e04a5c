"""`PolicyForward` below DDP and FSDP2: two gloo processes give the gradients of one."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.data.packing import pack_pairs
from raylign.models.forward import PolicyForward
from raylign.types import TokenizedPair

WORLD_SIZE = 2
LAYERS = (1, 2)


def make_policy(*, gradient_checkpointing: bool = False) -> PolicyForward:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    if gradient_checkpointing:
        model._activation_checkpointing_enable({"use_reentrant": False})
    return PolicyForward(model)


def make_pairs(num_pairs: int) -> list[TokenizedPair]:
    rng = np.random.default_rng(0)

    def ids() -> np.ndarray:
        return rng.integers(1, 64, rng.integers(2, 12)).astype(np.int32)

    return [TokenizedPair(prompt_ids=ids(), chosen_ids=ids(), rejected_ids=ids()) for _ in range(num_pairs)]


def run(policy: torch.nn.Module, pairs: list[TokenizedPair]) -> tuple[torch.Tensor, torch.Tensor | None]:
    scores = policy(pack_pairs(pairs, layout="shared", pad_token_id=0), layers=LAYERS)
    return torch.nn.functional.softplus(scores.rejected_logps - scores.chosen_logps).sum(), scores.chosen_states


def work(rank: int, wrap: str, gradient_checkpointing: bool, directory: str) -> None:
    policy = make_policy(gradient_checkpointing=gradient_checkpointing)
    if wrap == "ddp":
        wrapped: torch.nn.Module = DistributedDataParallel(policy)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (WORLD_SIZE,))
        for layer in policy.decoder_layers():
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(policy, mesh=mesh)
    pairs = make_pairs(6)
    loss, states = run(wrapped, pairs[rank::WORLD_SIZE])
    loss.backward()
    gradients = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in policy.named_parameters()
    }
    torch.save({"gradients": gradients, "states": states}, f"{directory}/{rank}.pt")


def worker(rank: int, wrap: str, gradient_checkpointing: bool, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    try:
        work(rank, wrap, gradient_checkpointing, directory)
    finally:
        gc.collect()  # DDP's reducer, destroyed after its group, waits for a thread that waits for Python
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("wrap", "gradient_checkpointing"), [("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_two_workers_give_the_gradients_of_one(tmp_path: Path, wrap: str, gradient_checkpointing: bool) -> None:
    mp.spawn(worker, args=(wrap, gradient_checkpointing, str(tmp_path)), nprocs=WORLD_SIZE, daemon=True)
    policy, pairs = make_policy(), make_pairs(6)
    loss, _ = run(policy, pairs)
    (loss / WORLD_SIZE).backward()  # DDP and FSDP average over workers
    for rank in range(WORLD_SIZE):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6)
        _, states = run(policy, pairs[rank::WORLD_SIZE])
        torch.testing.assert_close(found["states"], states, rtol=1e-4, atol=1e-5)
