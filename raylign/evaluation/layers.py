"""How well each layer alone tells preferred from dispreferred answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raylign.errors import ShapeError
from raylign.evaluation.metrics import expected_calibration_error, pair_accuracy
from raylign.rewards.probes import fit_normalizer, ridge_probes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAccuracy:
    """A layer's ridge probe on held-out prompts.

    Attributes:
        position: index of the layer in the features, from 0.
        pair_accuracy: share of pairs with a higher score for the chosen answer.
        item_accuracy: share of answers on their side of zero.
        calibration_error: expected calibration error of sigmoid(chosen score - rejected score).
    """

    position: int
    pair_accuracy: float
    item_accuracy: float
    calibration_error: float


def layer_curve(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    test_chosen: torch.Tensor,
    test_rejected: torch.Tensor,
    ridge: float,
) -> tuple[LayerAccuracy, ...]:
    """Fit one ridge probe per layer and measure it on pairs of other prompts.

    Args:
        chosen: hidden states to fit on. Shape (N, L, D).
        rejected: likewise.
        test_chosen: hidden states of held-out prompts. Shape (M, L, D).
        test_rejected: likewise.
        ridge: penalty per pair, see `ridge_probes`.

    Returns:
        One record per layer, in the order of the features; nan without held-out pairs.

    Raises:
        ShapeError: shapes disagree.
        DataError: no pair to fit on.
    """
    if test_chosen.shape != test_rejected.shape or test_chosen.shape[1:] != chosen.shape[1:]:
        raise ShapeError(
            f"held-out features {tuple(test_chosen.shape)} and {tuple(test_rejected.shape)} must be alike and have "
            f"the layers and width of {tuple(chosen.shape)}"
        )
    layer_mean_LD, layer_rms_L = fit_normalizer(chosen, rejected)
    (weight_LD,) = ridge_probes(chosen, rejected, layer_mean=layer_mean_LD, layer_rms=layer_rms_L, ridge=ridge)

    def scores(states_MLD: torch.Tensor, layer: int) -> torch.Tensor:
        centred_MD = states_MLD[:, layer].float() - layer_mean_LD[layer]
        score_M: torch.Tensor = centred_MD @ weight_LD[layer] / layer_rms_L[layer]
        return score_M

    records = []
    for layer in range(chosen.shape[1]):
        chosen_score_M, rejected_score_M = scores(test_chosen, layer), scores(test_rejected, layer)
        right = torch.cat([chosen_score_M > 0, rejected_score_M < 0])
        records.append(
            LayerAccuracy(
                position=layer,
                pair_accuracy=pair_accuracy(chosen_score_M.cpu(), rejected_score_M.cpu()),
                item_accuracy=float(right.double().mean()),
                calibration_error=expected_calibration_error(
                    torch.sigmoid(chosen_score_M - rejected_score_M).cpu().numpy()
                ),
            )
        )
    return tuple(records)
