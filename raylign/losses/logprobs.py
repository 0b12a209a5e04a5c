r"""Log-probabilities of given tokens from hidden states, without a (B, L, V) tensor.

Only the positions that score a response token reach the language-model head, and these in chunks: the backward pass
recomputes a chunk's logits from the saved hidden states instead of keeping them.

Shape letters: N scored tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from raylign.errors import ShapeError

DEFAULT_CHUNK_TOKENS = 1024
_DIRECT_ELEMENTS = 2**23  # up to so many logits (32 MiB in float32) keeping them is cheaper than recomputing


def token_logprobs(
    hidden_ND: torch.Tensor,
    lm_head_weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    bias: torch.Tensor | None = None,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    r"""Log-probability of each label under the next-token distribution of its hidden state.

    Definition: \(z = W h + b\), optionally \(z \leftarrow s \tanh(z / s)\); the result is \(z_y - \log\sum_v e^{z_v}\).

    Products are taken in the dtype of the hidden states (or autocast's); softmax, the sums over the vocabulary and the
    gradient of the head over chunks are float32 (float64 for float64 inputs).

    Args:
        hidden_ND: states after the final norm. Shape (N, D), floating.
        lm_head_weight_VD: head, frozen or not. Shape (V, D), floating.
        labels_N: token ids in [0, V). Shape (N,), int64.
        chunk_tokens: rows whose logits exist at the same time when there are too many to keep. At least 1.
        bias: head's bias. Shape (V,).
        logit_softcap: bound s of the logits (Gemma 2), None for none.

    Returns:
        Log-probabilities in nats. Shape (N,), float32 (float64 for float64 inputs).

    Raises:
        ShapeError: shapes that do not fit or `chunk_tokens` below 1.
    """
    if hidden_ND.dim() != 2 or lm_head_weight_VD.dim() != 2 or hidden_ND.shape[1] != lm_head_weight_VD.shape[1]:
        raise ShapeError(
            f"hidden {tuple(hidden_ND.shape)} and head {tuple(lm_head_weight_VD.shape)} must be (N, D) and (V, D)"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ShapeError(f"labels {tuple(labels_N.shape)} must be ({hidden_ND.shape[0]},), one per hidden state")
    if chunk_tokens < 1:
        raise ShapeError(f"chunk_tokens={chunk_tokens} must be at least 1")
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm_head_weight_VD.dtype
    hidden_ND, lm_head_weight_VD = hidden_ND.to(dtype), lm_head_weight_VD.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    # Autocast is not active in a backward pass, and both passes must round alike.
    with torch.autocast(device, enabled=False):
        if labels_N.shape[0] * lm_head_weight_VD.shape[0] <= _DIRECT_ELEMENTS:
            logits_NV = _logits(hidden_ND, lm_head_weight_VD, bias, logit_softcap)
            return -F.cross_entropy(logits_NV, labels_N, reduction="none")
        result: torch.Tensor = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden_ND, lm_head_weight_VD, bias, labels_N, chunk_tokens, logit_softcap
        )
        return result


def segment_sum(values_N: torch.Tensor, segments_N: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Sum of the values of each segment.

    Args:
        values_N: shape (N,), floating.
        segments_N: segment of each value in [0, num_segments). Shape (N,), int64.
        num_segments: number of sums; a segment without values sums to 0.

    Returns:
        Shape (num_segments,), dtype of the values.

    Raises:
        ShapeError: values and segments differ in shape.
    """
    if values_N.shape != segments_N.shape:
        raise ShapeError(f"values {tuple(values_N.shape)} and segments {tuple(segments_N.shape)} must be alike")
    return values_N.new_zeros(num_segments).index_add(0, segments_N, values_N)


def _logits(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    """(N, V) logits, float32 or wider."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


class _ChunkedLogprobs(torch.autograd.Function):
    """Keeps hidden states and one log-sum-exp per token; the backward pass rebuilds the logits chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias: torch.Tensor | None,
        labels_N: torch.Tensor,
        chunk_tokens: int,
        softcap: float | None,
    ) -> torch.Tensor:
        picked, normalizers = [], []
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits_cV = _logits(hidden_ND[rows], weight_VD, bias, softcap)
            picked.append(logits_cV.gather(1, labels_N[rows, None])[:, 0])
            normalizers.append(torch.logsumexp(logits_cV, dim=1))
        normalizer_N = torch.cat(normalizers)
        ctx.save_for_backward(hidden_ND, weight_VD, bias, labels_N, normalizer_N)
        ctx.chunk_tokens, ctx.softcap = chunk_tokens, softcap
        return torch.cat(picked) - normalizer_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias, labels_N, normalizer_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=grad_N.dtype) if needs_weight else None
        grad_bias_V = torch.zeros_like(bias, dtype=grad_N.dtype) if needs_bias else None
        for start in range(0, hidden_ND.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            logits_cV = _logits(hidden_ND[rows], weight_VD, bias, ctx.softcap)
            # d logp / d z = onehot(y) - softmax(z), times the incoming gradient of the token
            upstream_c1 = grad_N[rows, None]
            grad_cV = torch.exp(logits_cV - normalizer_N[rows, None]).mul_(-upstream_c1)
            grad_cV.scatter_add_(1, labels_N[rows, None], upstream_c1)
            if ctx.softcap is not None:
                grad_cV.mul_(1 - (logits_cV / ctx.softcap).square_())  # d tanh = 1 - tanh^2
            if grad_bias_V is not None:
                grad_bias_V += grad_cV.sum(0)
            low_cV = grad_cV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                torch.mm(low_cV, weight_VD, out=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
                if grad_weight_VD.dtype == low_cV.dtype:
                    grad_weight_VD.addmm_(low_cV.T, hidden_ND[rows])
                else:
                    grad_weight_VD += low_cV.T @ hidden_ND[rows]
        return (
            grad_hidden_ND,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias.dtype),
            None,
            None,
            None,
        )
