r"""Keeping the members of a LoRA ensemble apart: the nuclear norm of their stacked down-projections.

Members that share a frozen backbone and all start at zero drift to one function unless something rewards difference.
Rows of different members that point the same way add nothing to the rank of the stack.

Shape letters: M members, r rank of an adapter, D input width of a layer, R = M r rows of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raylign.errors import ShapeError


def nuclear_norm(stack_RD: torch.Tensor, *, is_normalized: bool = True) -> torch.Tensor:
    r"""How many directions a stack of matrices spans, softly counted.

    Definition: \(\lVert S \rVert_*\), the sum of singular values; normalised
    \(\lVert S \rVert_* / (\lVert S \rVert_F \sqrt{\max(R, D)})\), which does not depend on the scale of S. The raw norm
    grows with the weights, so that scaling them alone raises it.

    Args:
        stack_RD: \(S\), matrices of all members one above the other. Shape (R, D).
        is_normalized: False gives the raw norm.

    Returns:
        Scalar; normalised in [0, 1], 0 for a stack of zeros.

    Raises:
        ShapeError: not a matrix with at least one row and column.

    Source: Zhai et al. (2024), arXiv:2401.00243; the normalisation is ours.
    """
    if stack_RD.dim() != 2 or not stack_RD.numel():
        raise ShapeError(f"stack {tuple(stack_RD.shape)} must be a matrix (R, D) that is not empty")
    norm: torch.Tensor = torch.linalg.svdvals(stack_RD).sum()
    if not is_normalized:
        return norm
    size: torch.Tensor = torch.linalg.vector_norm(stack_RD) * math.sqrt(max(stack_RD.shape))
    return norm / size.clamp(min=torch.finfo(stack_RD.dtype).tiny)


def lora_diversity(layers: Sequence[Sequence[torch.Tensor]], *, is_normalized: bool = True) -> torch.Tensor:
    r"""Mean over layers of the nuclear norm of the members' stacked A matrices; training adds it with a minus sign.

    Args:
        layers: for each adapted layer, the A matrices of the M members, each (r, D).
        is_normalized: see `nuclear_norm`.

    Returns:
        Scalar with gradient.

    Raises:
        ShapeError: no layer, a layer without members, or members of one layer with different widths.

    Source: Zhai et al. (2024), arXiv:2401.00243.
    """
    if not layers or not all(len(members) for members in layers):
        raise ShapeError(f"diversity needs at least one layer with at least one member, got {len(layers)} layers")
    for members in layers:
        shapes = sorted({tuple(matrix.shape) for matrix in members})
        if len({shape[1:] for shape in shapes}) != 1:
            raise ShapeError(f"members of one layer have A matrices of shapes {shapes}; their widths must be alike")
    norms = [nuclear_norm(torch.cat(list(members)), is_normalized=is_normalized) for members in layers]
    return torch.stack(norms).mean()
