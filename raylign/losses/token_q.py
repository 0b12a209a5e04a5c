r"""Values of tokens from a policy's own logits: the pretrained Q of variational inverse reinforcement learning.

Shape letters: N scored tokens, D hidden width, V vocabulary, c rows of a chunk.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from raylign.errors import ConfigError
from raylign.losses.logprobs import DEFAULT_CHUNK_TOKENS, token_logprobs


def policy_q(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, *, q_from: Literal["logits", "probs"], logit_scale: float
) -> torch.Tensor:
    r"""Value of each label: \(q = \log\mathrm{softmax}(s u)_y\), u the policy's logits or its probabilities.

    From logits at scale 1 q is the log-probability. From probabilities, as printed, q spreads by at most s over the
    vocabulary: a scale of order log V or more is needed to tell tokens apart.

    Args:
        logits_NV: of the policy. Shape (N, V), floating.
        labels_N: token ids in [0, V). Shape (N,), int64.
        q_from: what u is.
        logit_scale: s, above 0.

    Returns:
        At most 0. Shape (N,), float32 (float64 for float64 logits).

    Raises:
        ConfigError: another q_from.

    Source: arXiv:2411.09341, Eq. 12, where u are probabilities; logits are a choice of this project.
    """
    if q_from not in ("logits", "probs"):
        raise ConfigError(
            f"q_from={q_from!r} must be logits or probs for a value from the policy (config key ava.q_from)"
        )
    values_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if q_from == "probs":
        values_NV = values_NV.softmax(-1)
    return -F.cross_entropy(logit_scale * values_NV, labels_N, reduction="none")  # Eq. 12


def token_q(
    hidden_ND: torch.Tensor,
    lm_head_weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    q_from: Literal["logits", "probs"],
    logit_scale: float,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    r"""`policy_q` from hidden states, chunk by chunk: the backward pass computes a chunk's logits again.

    Args:
        hidden_ND: states after the final norm that predict the tokens. Shape (N, D), floating.
        lm_head_weight_VD: head. Shape (V, D), floating.
        labels_N: token ids in [0, V). Shape (N,), int64.
        q_from: as for `policy_q`; "logits" at scale 1 is `token_logprobs`.
        logit_scale: likewise.
        chunk_tokens: rows whose logits exist at the same time.
        bias: head's bias. Shape (V,).
        logit_softcap: bound of the logits (Gemma 2), None for none.

    Returns:
        Shape (N,), float32 (float64 for float64 inputs).

    Raises:
        ConfigError: another q_from.
        ShapeError: shapes that do not fit (of `token_logprobs`).
    """
    if q_from == "logits" and logit_scale == 1:
        return token_logprobs(
            hidden_ND, lm_head_weight_VD, labels_N, chunk_tokens=chunk_tokens, bias=bias, logit_softcap=logit_softcap
        )

    def chunk_q(hidden_cD: torch.Tensor, labels_c: torch.Tensor) -> torch.Tensor:
        logits_cV = F.linear(hidden_cD, lm_head_weight_VD, bias)
        if logit_softcap is not None:
            logits_cV = logits_cV.to(torch.promote_types(logits_cV.dtype, torch.float32))
            logits_cV = logit_softcap * torch.tanh(logits_cV / logit_softcap)
        return policy_q(logits_cV, labels_c, q_from=q_from, logit_scale=logit_scale)

    rows = range(0, max(hidden_ND.shape[0], 1), chunk_tokens)
    chunks = [(hidden_ND[start : start + chunk_tokens], labels_N[start : start + chunk_tokens]) for start in rows]
    return torch.cat([checkpoint(chunk_q, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])
