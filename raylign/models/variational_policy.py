"""A policy that states a reward of every response token from its own last hidden states, while it is trained.

The reward of a token is read from the state that has seen it, its q from the state before, which predicts it. The head
belongs to the trainer, not to the model: the model's saved weights do not know it.

Shape letters as in `raylign.types`: B pairs, N scored tokens, D hidden width, S row length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from raylign.errors import ModelError
from raylign.losses.logprobs import DEFAULT_CHUNK_TOKENS
from raylign.losses.token_q import token_q
from raylign.models.forward import PolicyForward
from raylign.models.token_forward import TokenForm, TokenHeads, reward_positions
from raylign.types import PackedBatch, PairScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores(PairScores):
    """What one forward of a `VariationalPolicy` says about B pairs.

    Attributes:
        token_q: (N,) value of every scored token in the order of the batch, nats, with gradient; its log-probability
            unless logits are scaled or probabilities are read.
        token_mu: (N,) mean of its reward, float32 or wider, with gradient.
        token_sigma: (N,) standard deviation of its reward, likewise.
        token_sequence: (N,) int64 in [0, 2B), its sequence; chosen responses come first.
        trunk_states: (rows * S, D) last hidden states of all rows, with gradient.
    """

    token_q: torch.Tensor
    token_mu: torch.Tensor
    token_sigma: torch.Tensor
    token_sequence: torch.Tensor
    trunk_states: torch.Tensor


class VariationalPolicy(PolicyForward):
    """A causal language model with a float32 head for the mean and the deviation of its tokens' rewards.

    Args:
        model: transformers causal language model, or a peft model around one.
        form: where q comes from, and the floor of sigma.
        seed: of the head's weights.
        chunk_tokens: scored tokens whose logits exist at the same time.
        autocast_dtype: runs the trunk in mixed precision, None in the dtype of the weights.

    Raises:
        ModelError: a form whose q is not the policy's own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        form: TokenForm,
        seed: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, chunk_tokens=chunk_tokens, autocast_dtype=autocast_dtype)
        if form.q_from not in ("logits", "probs"):
            raise ModelError(f"q_from={form.q_from} is no value of the policy itself; use logits or probs")
        self.form = form
        vocab_size, width = self.causal_lm.get_output_embeddings().weight.shape
        self.token_heads = TokenHeads(width, vocab_size, form, seed=seed)

    def forward(self, batch: PackedBatch, *, layers: tuple[int, ...] | None = None) -> TokenScores:
        """Score B pairs and their tokens.

        Args:
            batch: micro-batch on the device of the model.
            layers: None; states of responses are not kept.

        Raises:
            ModelError: layers are named.
        """
        if layers is not None:
            raise ModelError(f"layers={list(layers)}: a policy with rewards of tokens keeps no states of responses")
        with self._autocast():
            hidden_SD = self._decode(batch)
            logps_N = self._score(hidden_SD, batch)
            q_N = self._q(hidden_SD, batch, logps_N)
        _, read_at_N = reward_positions(batch)
        with torch.autocast(hidden_SD.device.type, enabled=False):
            # FSDP2 gathers the head in the type of the forward: bfloat16 products would leave rewards three digits
            head = self.token_heads.reward
            wide = torch.promote_types(head.weight.dtype, torch.float32)
            said_N2 = F.linear(hidden_SD.index_select(0, read_at_N).to(wide), head.weight.to(wide), head.bias.to(wide))
        return TokenScores(
            **self._totals(logps_N, batch),
            # clones, as in `PolicyForward.forward`
            token_q=q_N.clone(),
            token_mu=said_N2[:, 0].clone(),
            token_sigma=F.softplus(said_N2[:, 1]) + self.form.sigma_floor,
            token_sequence=batch.score_sequence,
            trunk_states=hidden_SD,
        )

    def _q(self, hidden_SD: torch.Tensor, batch: PackedBatch, logps_N: torch.Tensor) -> torch.Tensor:
        if self.form.q_from == "logits" and self.form.logit_scale == 1:
            return logps_N
        assert self.form.q_from in ("logits", "probs")
        lm: Any = self.causal_lm
        head = lm.get_output_embeddings()
        return token_q(
            hidden_SD.index_select(0, batch.score_from),
            head.weight,
            batch.score_labels,
            q_from=self.form.q_from,
            logit_scale=self.form.logit_scale,
            chunk_tokens=self.chunk_tokens,
            bias=getattr(head, "bias", None),
            logit_softcap=getattr(lm.config, "final_logit_softcapping", None),
        )
