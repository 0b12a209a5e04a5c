"""The one forward that training, feature extraction and evaluation share.

A causal language model runs once over a `PackedBatch`; the head is applied only where a response token is scored, and
hidden states are kept only where a response ends.

Shape letters as in `raylign.types`: B pairs, L layers, D hidden width, N scored tokens, S row length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from raylign.data.packing import pack_pairs
from raylign.errors import ModelError
from raylign.losses.logprobs import DEFAULT_CHUNK_TOKENS, segment_sum, token_logprobs
from raylign.types import Layout, PackedBatch, PairScores, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE_TEXT = "A short text whose log-probabilities are computed twice, once by raylign and once by the model itself."


class PolicyForward(nn.Module):
    """A causal language model as a function from packed pairs to log-probabilities.

    Ready for DDP, and for FSDP2 with `fully_shard` on every one of `decoder_layers()` and on this module: parameters
    are only touched inside `forward`.

    Args:
        model: transformers causal language model, or a peft model around one.
        chunk_tokens: scored tokens whose logits exist at the same time.
        autocast_dtype: runs the forward in mixed precision, None in the dtype of the weights.
        num_values: value heads (H): linear functions, zero at first, of the detached state that predicts a token. They
            belong to the trainer, not to the model: its gradient and its saved weights do not know them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        autocast_dtype: torch.dtype | None = None,
        num_values: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.autocast_dtype = autocast_dtype
        self._check()
        self.value_heads: nn.Linear | None = None
        if num_values:
            self.value_heads = nn.Linear(self.causal_lm.get_output_embeddings().weight.shape[1], num_values)
            nn.init.zeros_(self.value_heads.weight)
            nn.init.zeros_(self.value_heads.bias)

    @property
    def causal_lm(self) -> Any:
        """The transformers model below peft."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def num_layers(self) -> int:
        """L of the whole model."""
        return int(self.causal_lm.config.num_hidden_layers)

    def decoder_layers(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        for module in self.causal_lm.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise ModelError(f"found no list of {self.num_layers} layers in {type(self.causal_lm).__name__}")

    def _check(self) -> None:
        lm = self.causal_lm
        head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
        if getattr(head, "weight", None) is None or lm.base_model is lm:
            raise ModelError(f"{type(lm).__name__} is no causal language model with a decoder and a linear head")
        self.decoder_layers()

    def forward(self, batch: PackedBatch, *, layers: tuple[int, ...] | None = None) -> PairScores:
        """Score B pairs, and keep their end-of-response states when layers are named.

        Args:
            batch: micro-batch on the device of the model.
            layers: transformer layers to keep, from 1, in this order; None keeps no states. The last layer's states are
                after the final norm, as in transformers' `output_hidden_states`.

        Returns:
            Summed log-probabilities with gradient; states detached, float32, (B, len(layers), D).
        """
        with self._autocast():
            with _states_at(self.decoder_layers(), layers or (), batch.end_positions) as states:
                hidden_SD = self._decode(batch)
            logps_N = self._score(hidden_SD, batch)
            values_NH = None
            if self.value_heads is not None:
                values_NH = self.value_heads(_gather(hidden_SD, batch.score_from)).float()
        chosen_states, rejected_states = None, None
        if layers is not None:
            states[self.num_layers] = _gather(hidden_SD, batch.end_positions)
            stacked = torch.stack([states[layer] for layer in layers], dim=1).float()
            chosen_states, rejected_states = stacked[: batch.num_pairs], stacked[batch.num_pairs :]
        return PairScores(
            **self._totals(logps_N, batch),
            chosen_states=chosen_states,
            rejected_states=rejected_states,
            token_values=values_NH,
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision of the forward, where it is wanted."""
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def _totals(self, logps_N: torch.Tensor, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Fields of `PairScores` that come from the tokens' log-probabilities."""
        num_pairs = batch.num_pairs
        logps = segment_sum(logps_N, batch.score_sequence, 2 * num_pairs)
        lengths = torch.bincount(batch.score_sequence, minlength=2 * num_pairs)
        return {
            # clones, because FSDP2 hooks the outputs and hooks on views break under in-place use
            "chosen_logps": logps[:num_pairs].clone(),
            "rejected_logps": logps[num_pairs:].clone(),
            "chosen_lengths": lengths[:num_pairs],
            "rejected_lengths": lengths[num_pairs:],
            "token_logps": logps_N.clone(),
        }

    def _decode(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states after the final norm, all rows in one line: (rows * S, D)."""
        lm = self.causal_lm
        mask = batch.attention_mask
        if mask.dtype == torch.bool:
            # Additive once here, not once per layer inside the attention kernel; "eager" attention needs it anyway.
            dtype = self.autocast_dtype or lm.get_input_embeddings().weight.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        output = lm.base_model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)

    def _score(self, hidden_SD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        lm = self.causal_lm
        head = lm.get_output_embeddings()
        return token_logprobs(
            hidden_SD.index_select(0, batch.score_from),
            head.weight,
            batch.score_labels,
            chunk_tokens=self.chunk_tokens,
            bias=getattr(head, "bias", None),
            logit_softcap=getattr(lm.config, "final_logit_softcapping", None),
        )


def _gather(hidden_SD: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return hidden_SD.detach().index_select(0, positions)


@contextmanager
def _states_at(
    decoder_layers: nn.ModuleList, layers: Sequence[int], positions: torch.Tensor
) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the outputs of the named layers (but the last) at flat positions while the decoder runs.

    The hooks are gone before the backward pass, so that gradient checkpointing does not collect a second time.
    """
    last = len(decoder_layers)
    unknown = sorted(set(layers) - set(range(1, last + 1)))
    if unknown:
        raise ModelError(f"features.layers={unknown} do not exist: the model has layers 1 to {last}")
    states: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[layer] = _gather(hidden.flatten(0, 1), positions)

        return hook

    handles = [decoder_layers[layer - 1].register_forward_hook(keep(layer)) for layer in set(layers) - {last}]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def resolve_layers(layers: Sequence[int] | str, num_layers: int) -> tuple[int, ...]:
    """Layer numbers of a `features.layers` value, where "all" means 1 to `num_layers`.

    Raises:
        ModelError: none, a repeated or an unknown layer.
    """
    if isinstance(layers, str):
        return tuple(range(1, num_layers + 1))
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(1, num_layers + 1)):
        raise ModelError(f"features.layers={list(layers)} must be distinct layers of 1 to {num_layers}")
    return tuple(layers)


@torch.no_grad()
def verify_logprobs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layout: Layout = "shared",
    tolerance: float = 1e-3,
) -> None:
    """Compare `PolicyForward` with the logits of the model itself on one short pair.

    Catches heads that scale or bend their logits in ways that are not implemented, and attention that ignores the mask.

    Args:
        model: what `PolicyForward` wraps, on any device; its mode is left as found.
        tokenizer: of the model.
        layout: layout that will be used.
        tolerance: largest difference per token in nats for float32; thirty times as much is granted to bfloat16.

    Raises:
        ModelError: naming the architecture and both numbers.
    """
    ids = np.asarray(tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"], np.int32)
    if len(ids) < 4:
        raise ModelError(f"the tokenizer turns a sentence into {len(ids)} tokens; is it the model's own?")
    third = len(ids) // 4
    pair = TokenizedPair(
        prompt_ids=ids[: 2 * third], chosen_ids=ids[2 * third : 3 * third], rejected_ids=ids[3 * third :]
    )
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        batch = pack_pairs([pair], layout=layout, pad_token_id=0).to(device)
        scores = PolicyForward(model)(batch)
        plain = [_plain_logps(model, pair.prompt_ids, ids_, device) for ids_ in (pair.chosen_ids, pair.rejected_ids)]
    finally:
        model.train(was_training)
    allowed = tolerance if next(model.parameters()).dtype == torch.float32 else 30 * tolerance
    for ours, theirs, length in zip(
        (scores.chosen_logps, scores.rejected_logps), plain, (len(pair.chosen_ids), len(pair.rejected_ids)), strict=True
    ):
        difference = abs(float(ours) - theirs) / length
        if not difference <= allowed:
            raise ModelError(
                f"{type(PolicyForward(model).causal_lm).__name__} with layout {layout!r}: log-probability "
                f"{float(ours):.6f} differs from {theirs:.6f} of the model's own logits by {difference:.2g} per token; "
                "the architecture scales its logits or its attention in a way that is not supported"
            )


def _plain_logps(model: nn.Module, prompt_ids: np.ndarray, response_ids: np.ndarray, device: torch.device) -> float:
    """Summed log-probability of a response from the model's own logits."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids]).astype(np.int64)).to(device)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt_ids) :, None]).sum())
