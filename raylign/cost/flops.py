"""Floating-point operations by formula: what a forward, a backward, decoding and a reward head compute.

These are model FLOPs: two per multiply-add of every matrix product that real tokens need. Padding, element-wise work,
norms, the optimiser and recomputation inside attention kernels are left out, so that the number does not depend on how
a batch was cut. A formula is not a measurement: ledger rows carry FLOPs beside seconds, and no ratio is made of them.

Symbols: P matmul parameters (P_body without the LM head, P_head of it), L layers, d attention width
(heads x head width), T tokens, A attended (query, key) pairs of one layer, N tokens that get logits.

    forward(T)        2 P T + 2 L d T (T + 1)                  causal: T (T + 1) / 2 pairs of 4 d each
    forward(work)     2 P_body T + 2 P_head N + 4 L d A        the same for packs and shared prompts
    decode(G, T0)     forward(T0 + G) - forward(T0)            with a key-value cache
    backward          2 forward (all weights), 1 forward (frozen base with adapters), + 1 forward (checkpointing)
    head              2 L d + 2 L^2 + 3 L per response         hybrid reward, spec E1

Sliding windows are not subtracted: for models that have them the attention term is an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylign.errors import ModelError

# Families with query, key, value and output projections and a gated MLP of three matrices in every layer.
_GATED_FAMILIES = frozenset(
    {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How much a forward has to do, whatever the model.

    Attributes:
        tokens: real tokens that run through the layers (T).
        attention_pairs: (query, key) pairs that attention may look at, summed over sequences, in one layer (A).
        scored_tokens: positions that the LM head is applied to (N).
    """

    tokens: int = 0
    attention_pairs: int = 0
    scored_tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens,
            attention_pairs=self.attention_pairs + other.attention_pairs,
            scored_tokens=self.scored_tokens + other.scored_tokens,
        )


def sequence_work(num_tokens: int, *, scored_tokens: int | None = None) -> Work:
    """Work of one causal sequence.

    Args:
        num_tokens: T; 0 is an empty sequence.
        scored_tokens: positions with logits, None for all of them.
    """
    scored = num_tokens if scored_tokens is None else scored_tokens
    return Work(tokens=num_tokens, attention_pairs=num_tokens * (num_tokens + 1) // 2, scored_tokens=scored)


def pair_work(prompt: int, chosen: int, rejected: int, *, is_shared: bool) -> Work:
    """Work of one preference pair whose response tokens are scored.

    With a shared prompt (layout "shared") the prompt runs once and both responses attend to it; otherwise the pair is
    two sequences. Example: prompt 2, chosen 1, rejected 1 is 4 tokens and 3 + 3 + 3 = 9 pairs shared, 6 tokens and
    6 + 6 = 12 pairs otherwise.

    Args:
        prompt: prompt tokens.
        chosen: tokens of the chosen response.
        rejected: tokens of the rejected response.
        is_shared: the prompt is stored once.
    """
    if not is_shared:
        return sequence_work(prompt + chosen, scored_tokens=chosen) + sequence_work(
            prompt + rejected, scored_tokens=rejected
        )
    pairs = sequence_work(prompt).attention_pairs
    for response in (chosen, rejected):
        pairs += response * prompt + sequence_work(response).attention_pairs
    return Work(tokens=prompt + chosen + rejected, attention_pairs=pairs, scored_tokens=chosen + rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that the formulas read.

    Attributes:
        num_body_parameters: weights of matrix products outside the LM head (P_body); embeddings look up, they do not
            multiply.
        num_head_parameters: weights of the LM head (P_head), also when it is tied to the embeddings.
        num_layers: L.
        width: d, attention heads times head width, which need not be the hidden size.
    """

    num_body_parameters: int
    num_head_parameters: int
    num_layers: int
    width: int

    @property
    def num_matmul_parameters(self) -> int:
        """P with the LM head."""
        return self.num_body_parameters + self.num_head_parameters

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Count the matrices of a Llama-style model with grouped-query attention from its configuration.

        Args:
            config: as in `config.json`; `text_config` is read when there is one.

        Raises:
            ModelError: another kind of model, or a size is missing; `raylign.cost.shapes.shape_of` counts any model
                that is loaded.
        """
        config = config.get("text_config") or config
        family = str(config.get("model_type"))
        if family not in _GATED_FAMILIES:
            raise ModelError(
                f"model_type={family} is none of {', '.join(sorted(_GATED_FAMILIES))}, whose matrices can be counted "
                "from their configuration; load the model and use shape_of"
            )
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        missing = [name for name in names if not isinstance(config.get(name), int)]
        if missing:
            raise ModelError(f"the configuration lacks the sizes {', '.join(missing)}")
        hidden, inner, heads, layers, vocabulary = (int(config[name]) for name in names)
        head_width = int(config.get("head_dim") or hidden // heads)
        groups = int(config.get("num_key_value_heads") or heads)
        attention = hidden * head_width * (2 * heads + 2 * groups)  # query and output, key and value
        return cls(
            num_body_parameters=layers * (attention + 3 * hidden * inner),
            num_head_parameters=hidden * vocabulary,
            num_layers=layers,
            width=heads * head_width,
        )

    def forward(self, num_tokens: int) -> int:
        """FLOPs of one causal sequence with logits at every position: 2 P T + 2 L d T (T + 1)."""
        return self.forward_work(sequence_work(num_tokens))

    def forward_work(self, work: Work) -> int:
        """FLOPs of a forward: 2 P_body T + 2 P_head N + 4 L d A.

        Each attended pair costs a dot product of width d and a weighted sum of width d: 2 d + 2 d.
        """
        return (
            2 * self.num_body_parameters * work.tokens
            + 2 * self.num_head_parameters * work.scored_tokens
            + 4 * self.num_layers * self.width * work.attention_pairs
        )

    def decode(self, num_new: int, prefix: int) -> int:
        """FLOPs of decoding `num_new` tokens after a cached prefix: forward(prefix + num_new) - forward(prefix)."""
        return self.forward(prefix + num_new) - self.forward(prefix)

    def generate(self, num_new: int, prefix: int) -> int:
        """FLOPs of one response: the prompt without logits, then `decode`."""
        return self.forward_work(sequence_work(prefix, scored_tokens=0)) + self.decode(num_new, prefix)


def backward_factor(*, is_adapter: bool, has_checkpointing: bool) -> int:
    """FLOPs of a backward in forwards.

    Args:
        is_adapter: the base is frozen, so that only activations get gradients; those of the adapter are left out.
        has_checkpointing: the forward is computed again.
    """
    return (1 if is_adapter else 2) + (1 if has_checkpointing else 0)


def head_flops(num_layers: int, width: int) -> int:
    """FLOPs of the hybrid reward of one response (spec E1): probes 2 L d, vote 2 L^2, gate and weighted sum 3 L.

    Args:
        num_layers: layers that the head reads.
        width: hidden width of the states.
    """
    return 2 * num_layers * width + 2 * num_layers**2 + 3 * num_layers
