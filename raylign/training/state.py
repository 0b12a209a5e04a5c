"""Exact save and restore of a training run.

A checkpoint is a directory:

    policy/                 HF or PEFT directory (safetensors, tokenizer), loadable by plain transformers or peft
    token_heads/            heads.safetensors of ava_p and ava_d, see `TokenHeads`
    trainer_state/
        state.json          schema, updates done, the settings and data it belongs to, sizes of all files
        training.pt         optimizer, scheduler, metric window, confidence and value heads, multiplier, scale of TD
                            errors; read with weights_only=True

Weights are stored in the type they are trained in (float32 master weights for full training, float32 adapters), so
`policy/` alone restores them to the bit. Data order and dropout are functions of (seed, update, rank), so no generator
state is stored. Optimizer state is stored whole, under parameter names: a run may be resumed with another number of
workers, or with DDP instead of FSDP.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from raylign.constraints.multipliers import MultiplierState
from raylign.errors import CheckpointError
from raylign.models.token_forward import HEADS_FILE
from raylign.models.variational_policy import VariationalPolicy
from raylign.training.gradient_metrics import GradientWindow
from raylign.training.live_confidence import LiveConfidence
from raylign.training.metrics import MetricWindow
from raylign.training.parallel import is_sharded, unwrap
from raylign.training.variational import Variational
from raylign.training.world import World

SCHEMA = 1
POLICY = "policy"
_STATE = "trainer_state"
_CARD = "README.md"  # peft's, which a run replaces by its own
TOKEN_HEADS = "token_heads"
_VALUES = "value_heads."
_TOKEN_HEADS = f"{TOKEN_HEADS}."
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainerState:
    """Everything that changes while a policy trains.

    Attributes:
        policy: `PolicyForward`, plain or wrapped in DDP or FSDP2.
        optimizer: over its trainable parameters.
        scheduler: of the optimizer.
        window: metric sums since the last record.
        live: confidence heads, None when gamma comes from the data.
        update: updates finished; the only cursor into the data.
        multiplier: of a safety constraint, None without one.
        variational: objective of ava_p and ava_d, None for the others.
    """

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    window: MetricWindow | GradientWindow
    live: LiveConfidence | None = None
    update: int = 0
    multiplier: MultiplierState | None = None
    variational: Variational | None = None


def save_checkpoint(
    directory: Path,
    state: TrainerState,
    *,
    tokenizer: Any,
    identity: Mapping[str, Any],
    base: str | None = None,
    world: World | None = None,
) -> None:
    """Write a checkpoint; all workers call it, the first one writes.

    Args:
        directory: empty or absent; only the first worker's is used.
        state: to be saved.
        tokenizer: saved beside the weights.
        identity: JSON-like facts the run is made of (settings, data, model); a resume with others is refused.
        base: what an adapter calls its base model; None keeps the directory that it was loaded from.
        world: this worker.
    """
    world = world or World()
    # Both are collectives for a sharded policy.
    optimizer_state = get_optimizer_state_dict(state.policy, state.optimizer, options=_FULL)
    weights = full_weights(state.policy) if is_sharded(state.policy) else None
    values = value_weights(state.policy)
    heads = token_heads(state.policy)
    if world.rank != 0:
        return
    (directory / _STATE).mkdir(parents=True, exist_ok=True)
    model: Any = unwrap(state.policy).model
    model.save_pretrained(directory / POLICY, state_dict=weights)
    adapter = directory / POLICY / "adapter_config.json"
    if base is not None and adapter.is_file():
        # Set before, a hub id would make peft ask the hub about it at every checkpoint.
        content = json.loads(adapter.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        adapter.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(directory / POLICY)
    if heads is not None:
        (directory / TOKEN_HEADS).mkdir()
        save_file(heads, directory / TOKEN_HEADS / HEADS_FILE)
    training = {
        "optimizer": optimizer_state,
        "scheduler": state.scheduler.state_dict(),
        "window": state.window.state_dict(),
        "live": None if state.live is None else state.live.state_dict(),
        "values": values,
        "multiplier": None if state.multiplier is None else state.multiplier.state_dict(),
        "variational": None if state.variational is None else state.variational.state_dict(),
    }
    torch.save(training, directory / _STATE / "training.pt")
    files = (file for file in sorted(directory.rglob("*")) if file.is_file() and file.name != _CARD)
    record = {
        "schema": SCHEMA,
        "update": state.update,
        "finished_at": time.time(),
        "identity": dict(identity),
        "sizes": {str(file.relative_to(directory)): file.stat().st_size for file in files},
    }
    (directory / _STATE / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_checkpoint(directory: Path, identity: Mapping[str, Any], *, unknown: Collection[str] = ()) -> None:
    """Make sure that a checkpoint is whole and belongs to this run, before a model is loaded from it.

    Args:
        directory: of the checkpoint.
        identity: as given to `save_checkpoint`.
        unknown: names in it that the caller cannot tell and that are not compared.

    Raises:
        CheckpointError: naming what is missing, damaged or different, and the cure.
    """
    file = directory / _STATE / "state.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is no trainer checkpoint: {_STATE}/state.json is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {_CURE}") from error
    if record.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{directory} has checkpoint schema {record.get('schema')}, this version reads {SCHEMA}; finish the run "
            "with the version that started it, or start a new run from its policy/ directory"
        )
    for name, size in record["sizes"].items():
        found = (directory / name).stat().st_size if (directory / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"{directory}: {name} {state}; {_CURE}")
    have, want = record["identity"], json.loads(json.dumps(dict(identity)))
    _check_identity(directory, *({k: v for k, v in facts.items() if k not in unknown} for facts in (have, want)))


def load_training(directory: Path, state: TrainerState) -> None:
    """Restore everything but the weights, which `restore_weights` or loading from `policy/` put in place.

    Raises:
        CheckpointError: unreadable or foreign state.
    """
    file = directory / _STATE / "training.pt"
    try:
        # mapped, not read: workers of one node share the pages, and shards are all that each of them copies
        training = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        record = json.loads((directory / _STATE / "state.json").read_text(encoding="utf-8"))
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {_CURE}") from error
    if (training["live"] is None) != (state.live is None):
        raise CheckpointError(f"{directory} was made with another confidence.source; resume with the same setting")
    set_optimizer_state_dict(
        state.policy, state.optimizer, training["optimizer"], options=StateDictOptions(full_state_dict=True)
    )
    state.scheduler.load_state_dict(training["scheduler"])
    state.window.load_state_dict(training["window"])
    if (training["values"] is None) != (unwrap(state.policy).value_heads is None):
        raise CheckpointError(
            f"{directory} was made with another policy_gradient.advantage; resume with the same setting"
        )
    if training["values"] is not None:
        restore_values(state.policy, training["values"])
    if state.live is not None:
        state.live.load_state_dict(training["live"])
    multiplier = training.get("multiplier")  # checkpoints from before there were constraints have none
    if (multiplier is None) != (state.multiplier is None):
        raise CheckpointError(f"{directory} was made with another constraint.kind; resume with the same setting")
    state.multiplier = None if multiplier is None else MultiplierState.from_state_dict(multiplier)
    _load_variational(directory, state, training.get("variational"))  # absent from older checkpoints
    state.update = record["update"]


def _load_variational(directory: Path, state: TrainerState, saved: Mapping[str, Any] | None) -> None:
    if (saved is None) != (state.variational is None):
        raise CheckpointError(f"{directory} was made with another train.objective; resume with the same setting")
    if state.variational is None or saved is None:
        return
    file = directory / TOKEN_HEADS / HEADS_FILE
    try:
        heads = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {_CURE}") from error
    restore_values(state.policy, {f"{_TOKEN_HEADS}{name}": tensor for name, tensor in heads.items()})
    state.variational.load_state_dict(dict(saved))


def restore_adapter(directory: Path, model: nn.Module) -> None:
    """Put the adapter weights of a checkpoint into a peft model whose base is already loaded.

    Raises:
        CheckpointError: unreadable weights, or weights of another adapter.
    """
    from peft import set_peft_model_state_dict

    file = directory / POLICY / "adapter_model.safetensors"
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); {_CURE}") from error
    result = set_peft_model_state_dict(model, weights)
    if result.unexpected_keys:
        raise CheckpointError(f"{file} holds {result.unexpected_keys[0]}, which the model lacks; {_CURE}")


def full_weights(policy: nn.Module) -> dict[str, torch.Tensor]:
    """Whole trainable tensors of the model inside `PolicyForward`, by its own names; a collective for shards.

    Args:
        policy: what training calls, wrapped or not.

    Returns:
        Tensors on the CPU; of an adapter only its own. A tied matrix appears once. Empty but on the first worker.
    """
    model = unwrap(policy).model
    is_adapter = hasattr(model, "get_base_model")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_adapter)
    weights = _whole_tensors(policy, options)
    # Gathering copies a tied matrix once per name, which hides from transformers that one file entry is enough.
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    named = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    return {name: tensor for name, tensor in named.items() if name not in tied}


def value_weights(policy: nn.Module) -> dict[str, torch.Tensor] | None:
    """Whole tensors of the value heads on the CPU, None without any; a collective for shards."""
    if unwrap(policy).value_heads is None:
        return None
    weights = _whole_tensors(policy, _FULL)
    return {name: tensor for name, tensor in weights.items() if name.startswith(_VALUES)}


def token_heads(policy: nn.Module) -> dict[str, torch.Tensor] | None:
    """Whole tensors of the heads of tokens on the CPU by their names there, or None; a collective for shards."""
    if not isinstance(unwrap(policy), VariationalPolicy):
        return None
    weights = _whole_tensors(policy, _FULL)
    return {
        name.removeprefix(_TOKEN_HEADS): tensor.contiguous()
        for name, tensor in weights.items()
        if name.startswith(_TOKEN_HEADS)
    }


def _whole_tensors(policy: nn.Module, options: StateDictOptions) -> dict[str, torch.Tensor]:
    """What `get_model_state_dict` gives with `full_state_dict`, of modules whose whole state is tensors."""
    return cast(dict[str, torch.Tensor], get_model_state_dict(policy, options=options))


def restore_values(policy: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Put saved heads in place, leaving the model as it is."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(policy, dict(values), options=options)


_CURE = "restore it from a backup, or start under a new run.name"


def _check_identity(directory: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    names = sorted(name for name in {*have, *want} if have.get(name) != want.get(name))
    if names:
        shown = "; ".join(f"{n}: was {have.get(n)!r}, now {want.get(n)!r}" for n in names[:4])
        raise CheckpointError(
            f"{directory} belongs to another run ({shown}); resume with the old values or use a new run.name"
        )
