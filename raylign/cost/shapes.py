"""The sizes of a loaded model, counted from its own matrices, whatever the architecture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from raylign.cost.flops import ModelShape, Work
from raylign.errors import ModelError

logger = logging.getLogger(__name__)


def forward_flops(model: Any) -> Callable[[Work], int]:
    """Model FLOPs of a forward by the amount of work; 0, with a warning now, for a model that cannot be counted.

    Args:
        model: see `shape_of`.
    """
    try:
        return shape_of(model).forward_work
    except ModelError as error:
        logger.warning("FLOPs of this model are recorded as 0: %s", error)
        return lambda work: 0


def shape_of(model: Any) -> ModelShape:
    """Count the weights that multiply activations.

    Every parameter of two dimensions counts, embeddings apart; adapters count where they are, and so do depthwise
    convolutions. Stacks of experts (three dimensions) count with the share of experts that a token visits. Sharded
    parameters count whole.

    Args:
        model: transformers causal language model, or a peft model around one.

    Raises:
        ModelError: no linear head, or a configuration without layers, heads or the number of experts a token visits.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        raise ModelError(f"{type(base).__name__} has no linear head; only causal language models are counted")
    missing = [
        name for name in ("num_hidden_layers", "num_attention_heads", "hidden_size") if not hasattr(config, name)
    ]
    if missing:
        raise ModelError(f"the configuration of {type(base).__name__} has no {', '.join(missing)}")
    left_out = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(head.weight)}
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    body = 0
    for parameter in model.parameters():
        if (parameter.dim() == 2 and id(parameter) not in left_out) or id(parameter) in convolutions:
            body += parameter.numel()
        elif parameter.dim() == 3:
            body += _active_experts(parameter.numel(), parameter.shape[0], config)
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    return ModelShape(
        num_body_parameters=body,
        num_head_parameters=int(head.weight.numel()),
        num_layers=int(config.num_hidden_layers),
        width=heads * int(getattr(config, "head_dim", None) or hidden // heads),
    )


def _active_experts(num_parameters: int, num_experts: int, config: Any) -> int:
    active = getattr(config, "num_experts_per_tok", None)
    if active is None:
        raise ModelError(
            f"a parameter stacks {num_experts} matrices, but the configuration has no num_experts_per_tok; "
            "its FLOPs are unknown"
        )
    return num_parameters * int(active) // num_experts
