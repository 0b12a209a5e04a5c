r"""Weight averaging of reward models (WARM): M fine-tuned copies of one model become one model of the same cost.

Averages of weights mean something only among copies of one start: elsewhere the loss rises between the minima. So the
start of every member is hashed before training and the merge refuses strangers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from raylign.errors import DataError, ShapeError

StateDict = Mapping[str, torch.Tensor]


def weights_hash(state: StateDict) -> str:
    """Thirty-two hex digits of names, types, shapes and bytes of all tensors, in the order of the names.

    Args:
        state: tensors on any device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_start(start_hashes: Sequence[str]) -> None:
    """Refuse members that did not start from the same weights.

    Args:
        start_hashes: `weights_hash` of each member before training.

    Raises:
        DataError: no member, or two starts that differ; both hashes are named.
    """
    if not start_hashes:
        raise DataError("a weight average needs at least one member, got none")
    for member, found in enumerate(start_hashes):
        if found != start_hashes[0]:
            raise DataError(
                f"member {member} started from weights {found}, member 0 from {start_hashes[0]}: weights are averaged "
                "only among members of one start (same model, same seed of the new head); fit them again together"
            )


def average_weights(
    members: Iterable[StateDict], *, start_hashes: Sequence[str], weights: Sequence[float] | None = None
) -> dict[str, torch.Tensor]:
    r"""Weights of the merged model.

    Definition: \(\theta = \sum_m a_m \theta_m / \sum_m a_m\), uniform unless weights are given. Summed in float64.

    Args:
        members: whole weights of each member after training, adapters merged in (an average of LoRA factors is not the
            average of their products). Read once, one after the other, so that a generator holds one at a time.
        start_hashes: `weights_hash` of each member before training.
        weights: \(a\), at least 0 with a sum above 0.

    Returns:
        Merged tensors, in the types of the first member; tensors that are not floating must be equal in all members.

    Raises:
        DataError: no member, different starts, another number of members than hashes or weights, or bad weights.
        ShapeError: members differ in names or shapes.

    Source: Rame et al. (2024), arXiv:2401.12187, Eq. 2.
    """
    check_same_start(start_hashes)
    shares = [1.0] * len(start_hashes) if weights is None else list(weights)
    if len(shares) != len(start_hashes) or min(shares) < 0 or not sum(shares) > 0:
        raise DataError(f"weights {shares} must be one per member ({len(start_hashes)}), none below 0, some above")
    first: StateDict = {}
    total: dict[str, torch.Tensor] = {}
    num_members = 0
    for state in members:
        if num_members == len(shares):
            raise DataError(f"more members than the {len(shares)} start hashes")
        first = first or state
        _check_alike(first, state, num_members)
        share = shares[num_members] / sum(shares)
        for name, tensor in state.items():
            if tensor.is_floating_point():
                term = share * tensor.detach().double()
                total[name] = total[name] + term if name in total else term
        num_members += 1
    if num_members != len(shares):
        raise DataError(f"{num_members} members for {len(shares)} start hashes")
    return {name: total[name].to(tensor.dtype) if name in total else tensor.clone() for name, tensor in first.items()}


def _check_alike(first: StateDict, state: StateDict, member: int) -> None:
    if first.keys() != state.keys():
        odd = sorted(first.keys() ^ state.keys())[:5]
        raise ShapeError(f"member {member} and member 0 do not have the same tensors, for example {odd}")
    for name, tensor in state.items():
        if tensor.shape != first[name].shape:
            raise ShapeError(
                f"{name} is {tuple(tensor.shape)} in member {member} and {tuple(first[name].shape)} in member 0"
            )
        if not tensor.is_floating_point() and not torch.equal(tensor, first[name]):
            raise ShapeError(f"{name} holds {tensor.dtype} values that differ in member {member} and member 0")
