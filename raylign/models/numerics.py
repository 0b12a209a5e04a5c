"""Which number types a policy computes in, decided in one place for training, features and rewards.

At step 0 the policy is the reference, so its log-ratio must be 0. That holds only where both round alike: the same type
of the weights and the same autocast type. Weights read as bfloat16 and float32 weights under bfloat16 autocast differ
by tenths of a nat per response.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from raylign.config import PolicySection
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, resolve_dtype

ComputeType = Literal["auto", "float32", "bfloat16"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Number types of one policy, by name; "auto" stands for what a GPU not yet seen will choose.

    Attributes:
        weights: type of the frozen or full weights. LoRA adapters are float32.
        autocast: type of the forward's matrix products, None without mixed precision.
    """

    weights: ComputeType
    autocast: ComputeType | None


def policy_numerics(policy: PolicySection, compute: ComputeType, *, parallel: Parallel = "ddp") -> Numerics:
    """Float32 weights under mixed precision, or LoRA over weights of the compute type.

    Args:
        policy: the adapter counts, its dtype is replaced by `compute`.
        compute: see `compute_type`.
        parallel: `train.parallel`; FSDP2 wants one dtype per group of parameters, and adapters are float32.
    """
    keeps_compute_type = policy.adapter == "lora" and parallel == "ddp"
    return Numerics(
        weights=compute if keeps_compute_type else "float32", autocast=None if compute == "float32" else compute
    )


def actor_device(num_gpus: float) -> Literal["cpu", "cuda"]:
    """Device of an actor: a GPU only if it asked for one, because Ray leaves the others' GPUs visible to it."""
    return "cuda" if num_gpus > 0 else "cpu"


def compute_type(dtype: ComputeType, device: torch.device | str) -> Literal["float32", "bfloat16"]:
    """Compute type on a device of this machine; "auto" is bfloat16 on GPUs that have it and float32 elsewhere."""
    return "bfloat16" if resolve_dtype(dtype, device) == torch.bfloat16 else "float32"


def load_reference(
    path: str | Path, policy: PolicySection, device: torch.device | str, *, parallel: Parallel = "ddp"
) -> PolicyForward:
    """The frozen reference on its device, in the number types that training gives the policy.

    Args:
        path: directory of the reference.
        policy: compute type, adapter of the policy in training, and whether remote code may run.
        device: where to compute; "auto" follows it.
        parallel: `train.parallel`.

    Raises:
        ModelError: see `load_policy`.
    """
    numerics = policy_numerics(policy, compute_type(policy.dtype, device), parallel=parallel)
    model = load_policy(path, dtype=numerics.weights, trust_remote_code=policy.trust_remote_code)
    autocast = None if numerics.autocast is None else resolve_dtype(numerics.autocast, device)
    return PolicyForward(model, autocast_dtype=autocast).to(device).eval()
