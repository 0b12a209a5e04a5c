r"""Normalised states and closed-form linear probes: what every head over hidden states starts from.

Features stay in the dtype they come in (float16 on disk) and are widened one layer at a time.

Shape letters: N pairs, I items (answers, two a pair), M members, L layers, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raylign.errors import DataError, ShapeError


def fit_normalizer(*sides: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Centre and scale of each layer over all answers, such as both answers of all pairs.

    Definition: \(\mu_l\) the mean state, \(\rho_l\) the root mean square of the coordinates of \(h_l - \mu_l\); 1 for a
    layer whose states are all equal.

    Args:
        sides: hidden states, for example of chosen and of rejected answers. Shape (N, L, D) each, N at least 1.

    Returns:
        layer_mean (L, D) and layer_rms (L,), float32.

    Raises:
        ShapeError: shapes differ or are not (N, L, D).
        DataError: no pair, or states that are not finite.
    """
    check_sides(*sides)
    means, scales = [], []
    for layer in range(sides[0].shape[1]):
        items_ID = torch.cat([side[:, layer] for side in sides]).double()
        mean_D = items_ID.mean(0)
        rms = (items_ID - mean_D).square().mean().sqrt()
        means.append(mean_D)
        scales.append(torch.where(rms == 0, 1.0, rms))
    layer_mean_LD, layer_rms_L = torch.stack(means).float(), torch.stack(scales).float()
    if not bool(torch.isfinite(layer_rms_L).all()):
        raise DataError("hidden states hold nan or infinity; float16 storage overflows beyond 65504")
    return layer_mean_LD, layer_rms_L


def ridge_probes(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    layer_mean: torch.Tensor,
    layer_rms: torch.Tensor,
    ridge: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Closed-form linear probes of each layer, target +1 for chosen and -1 for rejected answers.

    Definition: \(w_{ml} = \arg\min_w \sum_i a_{im} (w \cdot z_{il} - y_i)^2 + N \lambda |w|^2\) on normalised states.
    The weighted targets sum to zero and the states are centred on these pairs, so without weights the best bias is 0.

    Args:
        chosen: hidden states. Shape (N, L, D), N at least 1.
        rejected: likewise.
        layer_mean: of `fit_normalizer` on the same pairs. Shape (L, D).
        layer_rms: likewise. Shape (L,).
        ridge: \(\lambda\), penalty per pair, above 0.
        weights: \(a\), weight of each pair for each of M members, shared by its two answers. Shape (N, M); None is one
            member to which all pairs count alike.

    Returns:
        Probe weights on normalised states. Shape (M, L, D), float32.

    Raises:
        ShapeError: shapes differ or are not (N, L, D).
        DataError: no pair.

    Source: Hoerl and Kennard (1970); the start of the heads in docs/math.md.
    """
    check_pairs(chosen, rejected)
    num_pairs = len(chosen)
    target_I = torch.ones(2 * num_pairs, dtype=torch.float64, device=chosen.device)
    target_I[num_pairs:] = -1
    return ridge_fit(
        (chosen, rejected),
        target_I,
        layer_mean=layer_mean,
        layer_rms=layer_rms,
        penalty=num_pairs * ridge,
        weights=None if weights is None else weights.repeat(2, 1),
    )


def ridge_fit(
    sides: Sequence[torch.Tensor],
    targets: torch.Tensor,
    *,
    layer_mean: torch.Tensor,
    layer_rms: torch.Tensor,
    penalty: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Closed-form linear probes of each layer for any targets, without a bias.

    Definition: \(w_{ml} = \arg\min_w \sum_i a_{im} (w \cdot z_{il} - y_i)^2 + p |w|^2\) on normalised states.

    Solved in float64 by Cholesky, in the D normal equations or, when there are fewer items than coordinates, in their
    dual of size I.

    Args:
        sides: hidden states of the items, one part after the other. Shape (N, L, D) each.
        targets: \(y\), float64. Shape (I,), I answers in the order of the sides.
        layer_mean: see `fit_normalizer`. Shape (L, D).
        layer_rms: likewise. Shape (L,).
        penalty: \(p\), above 0.
        weights: \(a\), of each item for each of M members. Shape (I, M); None is one member to which all count alike.

    Returns:
        Probe weights on normalised states. Shape (M, L, D), float32.

    Raises:
        ShapeError: sides that differ in shape, or not one target per item.
        DataError: no item.

    Source: Hoerl and Kennard (1970).
    """
    check_sides(*sides)
    num_layers, width = sides[0].shape[1:]
    if targets.shape != (sum(map(len, sides)),):
        raise ShapeError(f"targets {tuple(targets.shape)} must be one per item, {sum(map(len, sides))}")
    # The square root of the weights on both sides turns the weighted problem into the plain one.
    roots = [None] if weights is None else list(weights.double().sqrt().T)
    probes = torch.empty(len(roots), num_layers, width, device=sides[0].device)
    for layer in range(num_layers):
        states_ID = torch.cat([side[:, layer] for side in sides]).double()
        states_ID = (states_ID - layer_mean[layer]) / layer_rms[layer]
        for member, root_I in enumerate(roots):
            left_ID, right_I = (
                (states_ID, targets) if root_I is None else (states_ID * root_I[:, None], targets * root_I)
            )
            if len(targets) < width:
                dual_I = _solve_ridge(left_ID @ left_ID.T, right_I, penalty)
                probes[member, layer] = left_ID.T @ dual_I
            else:
                probes[member, layer] = _solve_ridge(left_ID.T @ left_ID, left_ID.T @ right_I, penalty)
    return probes


def check_pairs(chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Refuse features that are not N pairs, N at least 1.

    Raises:
        ShapeError: shapes differ or are not (N, L, D).
        DataError: no pair.
    """
    if chosen.dim() != 3 or chosen.shape != rejected.shape:
        raise ShapeError(
            f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} features must both be (N, L, D)"
        )
    if len(chosen) == 0:
        raise DataError("a reward head needs at least one training pair and one validation pair")


def check_sides(*sides: torch.Tensor) -> None:
    """Refuse features that are not K parts of N answers, N at least 1.

    Raises:
        ShapeError: shapes differ or are not (N, L, D).
        DataError: no answer.
    """
    if not sides or sides[0].dim() != 3 or any(side.shape != sides[0].shape for side in sides):
        raise ShapeError(f"features {[tuple(side.shape) for side in sides]} must all be (N, L, D) and alike")
    if len(sides[0]) == 0:
        raise DataError("a head on hidden states needs at least one answer to be fitted to")


def _solve_ridge(gram: torch.Tensor, right: torch.Tensor, penalty: float) -> torch.Tensor:
    """Solution of (gram + penalty I) x = right, by Cholesky; overwrites the diagonal of gram."""
    gram.diagonal().add_(penalty)
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(gram))[:, 0]
