"""Policies made of others without training: an adapter merged into its base, and the average of two policies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from raylign.errors import ConfigError, OutputExistsError
from raylign.models.loading import adapter_base, load_config, load_policy, load_tokenizer
from raylign.rewards.merge import average_weights, weights_hash


def average_policies(
    start: str | Path, trained: str | Path, output: str | Path, *, trained_share: float, trust_remote_code: bool = False
) -> Path:
    r"""Write the policy of weights \((1 - a)\,\theta_{start} + a\,\theta_{trained}\).

    P-SACPO takes the policy of its first, helpful stage as the start and that of its second, safe stage as the trained
    one: a between 0 and 1 trades one for the other without training. Adapters are merged into their base first.

    Args:
        start: model or adapter directory that training of the other started from. Averages of models that were not
            trained from one another are as a rule worse than both; which model a run started from is in its resolved
            configuration, and cannot be told from weights.
        trained: model or adapter directory.
        output: new directory for the average and the tokenizer of `trained`.
        trained_share: a in [0, 1].
        trust_remote_code: run code shipped inside the model directories.

    Returns:
        The output directory, a plain HF model in the types of the start.

    Raises:
        ConfigError: a share outside of [0, 1].
        OutputExistsError: the output is there already.
        ModelError: a directory that holds no usable model.
        ShapeError: two architectures.

    Source: Wachi et al. (2024), arXiv:2404.11049 (P-SACPO), linear interpolation.
    """
    output = Path(output)
    if not 0 <= trained_share <= 1:
        raise ConfigError(f"trained_share={trained_share:g} must be in [0, 1], 0 the start and 1 the trained policy")
    if output.exists():
        raise OutputExistsError(f"{output} exists: name a new directory for the averaged policy")
    model = _merged(start, trust_remote_code)
    common = weights_hash(model.state_dict())

    def members() -> Iterator[dict[str, torch.Tensor]]:
        yield model.state_dict()
        yield _merged(trained, trust_remote_code).state_dict()

    shares = (1 - trained_share, trained_share)
    model.load_state_dict(average_weights(members(), start_hashes=[common, common], weights=shares))
    model.save_pretrained(output)
    load_tokenizer(trained, trust_remote_code=trust_remote_code).save_pretrained(output)
    return output


def merge_adapter(adapter: str | Path, output: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Write the policy that an adapter makes of its base model, as a plain HF directory in the base's number type.

    Args:
        adapter: checkpoint of a run with policy.adapter=lora, or any peft adapter of a causal language model.
        output: new directory for the model and the adapter's tokenizer.
        trust_remote_code: run code shipped inside the model directories.

    Returns:
        The output directory.

    Raises:
        OutputExistsError: the output is there already.
        ModelError: no adapter, or one whose base cannot be loaded.
    """
    output = Path(output)
    if output.exists():
        raise OutputExistsError(f"{output} exists: name a new directory for the merged policy")
    kind = load_config(adapter_base(adapter), trust_remote_code=trust_remote_code).dtype or torch.float32
    model = _merged(adapter, trust_remote_code)
    model.to(kind).save_pretrained(output)
    load_tokenizer(adapter, trust_remote_code=trust_remote_code).save_pretrained(output)
    return output


def _merged(path: str | Path, trust_remote_code: bool) -> Any:
    """A policy without adapter."""
    model: Any = load_policy(path, dtype="float32", trust_remote_code=trust_remote_code)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
