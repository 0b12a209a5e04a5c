"""Copies of a policy on several workers: whole (DDP) or in shards (FSDP2)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from raylign.models.forward import PolicyForward
from raylign.training.world import World


def distribute(policy: PolicyForward, *, parallel: Literal["ddp", "fsdp"], world: World) -> nn.Module:
    """Put the policy on this worker's device.

    Args:
        policy: with the same weights on every worker.
        parallel: "ddp" keeps all weights on every worker; "fsdp" shards each layer, its gradients and its optimizer
            state over the workers.
        world: this worker. A replica of its own needs no wrapper, and no process group.

    Returns:
        What the update calls in place of the policy.
    """
    if parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        precision = MixedPrecisionPolicy(param_dtype=policy.autocast_dtype, reduce_dtype=torch.float32)
        # Layer by layer first: a model that fits no single device is moved in shards.
        for layer in policy.decoder_layers():
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(policy, mesh=mesh, mp_policy=precision)
        return policy
    policy = policy.to(world.device)
    if world.size == 1:
        return policy
    # Buffers (rotary frequencies) are constants and alike on all workers.
    return DistributedDataParallel(policy, broadcast_buffers=False)


def unwrap(policy: nn.Module) -> PolicyForward:
    """The `PolicyForward` inside DDP; FSDP2 changes modules in place and needs no unwrapping."""
    return cast(PolicyForward, policy.module if isinstance(policy, DistributedDataParallel) else policy)


def is_sharded(policy: nn.Module) -> bool:
    """Whether the parameters are shards."""
    return isinstance(policy, FSDPModule)
