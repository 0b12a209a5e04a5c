"""What larger models would compute, by formula: a table of its own that says on every row that it is a projection.

Nothing here was measured, and no seconds follow from it: decoding is bound by memory, scoring by arithmetic, and FLOPs
say nothing about that. Sequential decode steps and bytes stand beside the FLOPs for this reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from raylign.cost.flops import ModelShape, backward_factor, head_flops, pair_work, sequence_work
from raylign.cost.rows import Counts, Status
from raylign.errors import ConfigError

_LLAMA = {"model_type": "llama", "vocab_size": 32_000}
# Llama 2 (arXiv:2307.09288), the family of the paper's models.
SIZES: Mapping[str, Mapping[str, object]] = {
    "7B": {
        **_LLAMA,
        **{"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32, "num_hidden_layers": 32},
    },
    "13B": {
        **_LLAMA,
        **{"hidden_size": 5120, "intermediate_size": 13_824, "num_attention_heads": 40, "num_hidden_layers": 40},
    },
    "70B": {
        **_LLAMA,
        **{"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_hidden_layers": 80},
        "num_key_value_heads": 8,
    },
}
_BYTES_PER_WEIGHT = 2  # bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionSettings:
    """One refresh of the training data and one pass over it.

    Attributes:
        num_prompts: prompts that the online method samples for.
        num_samples: responses per prompt (K).
        prompt_tokens: of every prompt.
        response_tokens: of every response.
        num_pairs: pairs that the policy is trained on, on both sides.
        is_adapter: the base is frozen.
        has_checkpointing: activations are computed again in the backward.
    """

    num_prompts: int
    num_samples: int
    prompt_tokens: int
    response_tokens: int
    num_pairs: int
    is_adapter: bool = False
    has_checkpointing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionRow:
    """One phase of one side at one size.

    Attributes:
        model: size.
        side: "online" or "rerank".
        phase: as in the ledger.
        counts: FLOPs, tokens, decode steps and bytes.
        status: always "computed".
        label: what must be printed with the row.
    """

    model: str
    side: Literal["online", "rerank"]
    phase: str
    counts: Counts
    status: Status = field(default="computed", init=False)
    label: str = field(default="projection", init=False)


def project(models: Sequence[str], settings: ProjectionSettings) -> list[ProjectionRow]:
    """Rows of both sides for each size.

    The online side samples K responses to every prompt, all at once, scores each with one forward of the reference,
    sends the weights once, and trains on pairs. Re-ranking takes one forward of the policy over each stored pair,
    applies the hybrid head to both answers, and trains on the same number of pairs. Prompts of pairs are computed once.

    Args:
        models: names in `SIZES`.
        settings: of one refresh.

    Raises:
        ConfigError: a size is not known.
    """
    unknown = [name for name in models if name not in SIZES]
    if unknown:
        raise ConfigError(f"sizes {', '.join(unknown)} are not known; projections exist for {', '.join(SIZES)}")
    return [row for name in models for row in _rows(name, ModelShape.from_config(SIZES[name]), settings)]


def _rows(name: str, shape: ModelShape, settings: ProjectionSettings) -> list[ProjectionRow]:
    prompt, response, num_pairs = settings.prompt_tokens, settings.response_tokens, settings.num_pairs
    num_responses = settings.num_prompts * settings.num_samples
    pair = pair_work(prompt, response, response, is_shared=True)
    score = sequence_work(prompt + response, scored_tokens=response)
    factor = 1 + backward_factor(is_adapter=settings.is_adapter, has_checkpointing=settings.has_checkpointing)
    update = Counts(
        num_items=num_pairs,
        forward_tokens=num_pairs * pair.tokens,
        backward_tokens=num_pairs * pair.tokens,
        flops=num_pairs * factor * shape.forward_work(pair),
    )
    num_weights = shape.num_matmul_parameters + shape.num_head_parameters  # the embeddings are as large as the head
    online = {
        "generate": Counts(
            num_items=num_responses,
            prompt_tokens=num_responses * prompt,
            generated_tokens=num_responses * response,
            decode_steps=response,
            flops=num_responses * shape.generate(response, prompt),
        ),
        "score": Counts(
            num_items=num_responses,
            forward_tokens=num_responses * score.tokens,
            flops=num_responses * shape.forward_work(score),
        ),
        "weight_sync": Counts(num_items=1, synced_bytes=_BYTES_PER_WEIGHT * num_weights),
        "policy_update": update,
    }
    rerank = {
        "feature_forward": Counts(
            num_items=num_pairs, forward_tokens=num_pairs * pair.tokens, flops=num_pairs * shape.forward_work(pair)
        ),
        "reward_head": Counts(num_items=num_pairs, flops=2 * num_pairs * head_flops(shape.num_layers, shape.width)),
        "policy_update": update,
    }
    sides: dict[Literal["online", "rerank"], dict[str, Counts]] = {"online": online, "rerank": rerank}
    return [
        ProjectionRow(model=name, side=side, phase=phase, counts=counts)
        for side, phases in sides.items()
        for phase, counts in phases.items()
    ]
