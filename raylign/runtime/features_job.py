"""Feature extraction: one forward of the reference policy per pair, kept as parquet and never done twice.

A Ray Data pool of model-holding actors adds to every pair the hidden states at both end-of-response tokens and both
reference log-probabilities, from one shared-prompt forward. The result lives in a cache directory whose manifest
spells out everything it depends on; the directory appears by one rename, so it is whole or it is not there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylign.config import FeaturesSection, PolicySection
from raylign.cost.flops import Work, pair_work
from raylign.cost.ledger import Ledger, measured
from raylign.cost.rows import Cost, read_ledger, total_below
from raylign.data.states import states_from_column, states_to_column
from raylign.errors import CacheMismatchError, DataError, ModelError
from raylign.runtime.execution import execution
from raylign.types import FEATURE_COLUMNS, TOKEN_COLUMNS, Layout, TokenizedPair

if TYPE_CHECKING:
    import ray.data

    from raylign.models.numerics import Parallel

__all__ = [
    "FeatureExtractor",
    "features_key",
    "read_features",
    "run_features",
    "states_from_column",
    "states_to_column",
]

SCHEMA_VERSION = 2  # raise when the same inputs would give other features
MANIFEST = "manifest.json"
COST_FILE = "cost.json"
_ROWS = "rows"
_ROWS_PER_CALL = 128  # enough to sort by length, little enough to stream 7 B-sized states


class FeatureExtractor:
    """Adds `FEATURE_COLUMNS` to tables of tokenized pairs; holds the model, so it becomes an actor in the pool.

    Args:
        model_path: directory of the reference policy.
        config: layers, storage type and token budget.
        policy: number types, adapter and whether remote code may run.
        parallel: `train.parallel`, which has a say in the number types.
        ledger: what the forwards cost is recorded here, None not at all.
    """

    def __init__(
        self,
        model_path: str,
        config: FeaturesSection,
        policy: PolicySection,
        parallel: Parallel = "ddp",
        ledger: Ledger | None = None,
    ) -> None:
        import torch

        from raylign.cost.shapes import forward_flops
        from raylign.models.forward import resolve_layers, verify_logprobs
        from raylign.models.loading import load_tokenizer, resolve_layout
        from raylign.models.numerics import actor_device, load_reference

        if config.gpus_per_actor == 0:
            torch.set_num_threads(max(1, int(config.cpus_per_actor)))
        device = actor_device(config.gpus_per_actor)
        tokenizer = load_tokenizer(model_path, trust_remote_code=policy.trust_remote_code)
        self.forward = load_reference(model_path, policy, device, parallel=parallel)
        model_config = self.forward.causal_lm.config
        self.layout: Layout = resolve_layout("auto", model_config)
        verify_logprobs(self.forward.model, tokenizer, layout=self.layout)
        self.layers = resolve_layers(config.layers, self.forward.num_layers)
        self.width = int(model_config.hidden_size)
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.config = config
        self.device = device
        self.ledger = ledger
        self.flops = forward_flops(self.forward.model)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with four more columns, rows in their order.

        Raises:
            ModelError: a pair exceeds the model's context, or a log-probability or state is not finite (or too large
                for float16).
        """
        from raylign.models.loading import check_context

        pairs = pairs_from_table(table)
        check_context(self.forward.causal_lm.config, max(map(longest_sequence, pairs), default=0))
        with measured(self.ledger, "reference_forward", _actor_devices(self.config)) as entry:
            logps, states = self._forward(pairs)
            is_shared = self.layout == "shared"
            lengths = ((len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
            work = sum((pair_work(*pair, is_shared=is_shared) for pair in lengths), Work())
            entry.add(num_items=len(pairs), forward_tokens=work.tokens, flops=self.flops(work))
        self._check_finite(logps, states)
        added = [states_to_column(states[0]), states_to_column(states[1]), pa.array(logps[0]), pa.array(logps[1])]
        for name, column in zip(FEATURE_COLUMNS, added, strict=True):
            table = table.append_column(name, column)
        return table

    def _forward(self, pairs: Sequence[TokenizedPair]) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities (2, N) and the states (N, L, D) of both answers, chosen first."""
        import torch

        from raylign.data.packing import pack_pairs, pair_tokens, plan_micro_batches

        logps = np.empty((2, len(pairs)), np.float32)
        shape = (len(pairs), len(self.layers), self.width)
        states = np.empty(shape, self.config.dtype), np.empty(shape, self.config.dtype)
        tokens = [pair_tokens(pair, self.layout) for pair in pairs]
        [plan] = plan_micro_batches(tokens, batch_tokens=self.config.batch_tokens, num_workers=1)
        for micro_batch in plan:
            index = list(micro_batch.indices)
            batch = pack_pairs(
                [pairs[i] for i in index], layout=self.layout, pad_token_id=self.pad_token_id, pair_index=index
            )
            with torch.inference_mode():
                scores = self.forward(batch.to(self.device), layers=self.layers)
            halves = (scores.chosen_states, scores.rejected_states)
            with np.errstate(over="ignore"):  # reported below, with its cure
                for half, (kept, values) in enumerate(
                    zip(halves, (scores.chosen_logps, scores.rejected_logps), strict=True)
                ):
                    states[half][index] = kept.cpu().numpy()
                    logps[half, index] = values.cpu().numpy()
        return logps, states

    def _check_finite(self, logps: np.ndarray, states: Sequence[np.ndarray]) -> None:
        if not np.isfinite(logps).all():
            raise ModelError("the reference policy gives log-probabilities that are not finite; are its weights sound?")
        if not all(np.isfinite(half).all() for half in states):
            raise ModelError(
                f"hidden states are not finite as {self.config.dtype}; "
                "float16 ends at 65504, features.dtype=float32 does not"
            )


def pairs_from_table(table: pa.Table) -> list[TokenizedPair]:
    """Token ids of each row as views of the table's buffers.

    Raises:
        DataError: a token column is missing.
    """
    missing = [name for name in TOKEN_COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"pairs lack the columns {missing}; run ingest first")
    prompts, chosen, rejected = (_id_lists(table.column(name)) for name in TOKEN_COLUMNS)
    return [
        TokenizedPair(prompt_ids=p, chosen_ids=c, rejected_ids=r)
        for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]


def longest_sequence(pair: TokenizedPair) -> int:
    """Tokens of the prompt with the longer response."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def _id_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists: list[np.ndarray] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        ids = chunk.values.to_numpy(zero_copy_only=True)
        lists.extend(ids[start:stop] for start, stop in itertools.pairwise(offsets))
    return lists


def features_key(
    *,
    config: FeaturesSection,
    policy: PolicySection,
    model_path: str | Path,
    data_fingerprint: str,
    parallel: Parallel = "ddp",
) -> dict[str, Any]:
    """Everything that the features depend on; JSON-like, equal keys mean equal features.

    Args:
        config: `layers` and `dtype` count, budgets and resources do not.
        policy: the number types count.
        model_path: directory of the reference policy; its bytes count, its place does not.
        data_fingerprint: fingerprint of the ingested pairs.
        parallel: `train.parallel`, which has a say in the number types.
    """
    from raylign.models.forward import resolve_layers
    from raylign.models.loading import load_config, model_fingerprint, tokenizer_fingerprint
    from raylign.models.numerics import policy_numerics

    # the driver may lack the GPU that decides "auto"
    compute = "float32" if policy.dtype == "auto" and config.gpus_per_actor == 0 else policy.dtype
    numerics = policy_numerics(policy, compute, parallel=parallel)
    num_layers = load_config(model_path, trust_remote_code=policy.trust_remote_code).num_hidden_layers
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model_fingerprint(model_path),
        "tokenizer": tokenizer_fingerprint(model_path),
        "data": data_fingerprint,
        "layers": list(resolve_layers(config.layers, num_layers)),
        "dtype": config.dtype,
        "weights_dtype": numerics.weights,
        "autocast_dtype": numerics.autocast,
    }


def run_features(
    pairs: ray.data.Dataset,
    *,
    config: FeaturesSection,
    policy: PolicySection,
    model_path: str | Path,
    output_dir: str | Path,
    data_fingerprint: str,
    parallel: Parallel = "ddp",
    ledger: Ledger | None = None,
    show_progress: bool = False,
) -> ray.data.Dataset:
    """Add `FEATURE_COLUMNS` to every pair, or read them from the cache directory when it was made from the same inputs.

    Several jobs may want one directory: each works beside it, the first to finish fills it, the others read that. A job
    that fails leaves nothing behind.

    Args:
        pairs: ingested pairs, cheap to count (parquet or materialised). All their columns are kept.
        config: layers, storage type, token budget and actors.
        policy: number types of the policy in training, which the reference shares.
        model_path: directory of the reference policy, readable on every node.
        output_dir: cache directory of this key, on storage that every node sees.
        data_fingerprint: fingerprint of the pairs.
        parallel: `train.parallel`, which has a say in the number types.
        ledger: what it costs is recorded here; by default in `ledger/` of the cache directory.
        show_progress: Ray Data's progress bars.

    Returns:
        The pairs with features, in the order of `pairs`, read from the cache.

    Raises:
        CacheMismatchError: the directory holds features of other inputs, or something else.
        DataError: rows were lost on the way.
        ModelError: the model cannot be used.
    """
    from raylign.runtime.phases import write_json

    directory = Path(output_dir).expanduser().absolute()
    key = features_key(
        config=config, policy=policy, model_path=model_path, data_fingerprint=data_fingerprint, parallel=parallel
    )
    if _is_cached(directory, key):
        return read_features(directory)
    # a name of its own, because another run with the same key may be at work in the same storage
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        ledger = ledger or Ledger(partial / "ledger")
        with ledger.measure("extract", devices=held_devices(config)) as entry:
            extractor_args = (str(model_path), config, policy, parallel, ledger.below(entry))
            _extract(pairs, partial, key, config, extractor_args, show_progress)
        cost = total_below(read_ledger(ledger.directory), entry.id)
        write_json(partial / COST_FILE, {"ledger_entry": entry.id, "cost": dataclasses.asdict(cost)})
        _publish(partial, directory, key)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already unless the job failed or came second
    return read_features(directory)


def _extract(
    pairs: ray.data.Dataset,
    partial: Path,
    key: Mapping[str, Any],
    config: FeaturesSection,
    extractor_args: tuple[Any, ...],
    show_progress: bool,
) -> None:
    import ray.data

    from raylign.runtime.phases import versions, write_json

    num_pairs = pairs.count()
    start = time.monotonic()
    num_rows = max(1, min(_ROWS_PER_CALL, num_pairs // config.num_actors))  # of one call, so that every actor has one
    num_actors = max(1, min(config.num_actors, num_pairs // num_rows))
    # One block is work for one actor; data that came in one block must be cut first.
    blocks = pairs.repartition(target_num_rows_per_block=num_rows) if num_actors > 1 else pairs
    extracted = blocks.map_batches(
        FeatureExtractor,
        fn_constructor_args=extractor_args,
        batch_size=num_rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        udf_modifying_row_count=False,
    )
    with execution(extracted, show_progress=show_progress):
        # states do not repeat, so a dictionary of them only costs; the text columns are small
        extracted.write_parquet(str(partial / _ROWS), compression="zstd", use_dictionary=False)
    num_written = sum(pq.read_metadata(file).num_rows for file in _files(partial))
    if num_written != num_pairs:
        raise DataError(f"feature extraction was given {num_pairs} pairs and wrote {num_written}")
    facts = {"num_pairs": num_pairs, "seconds": time.monotonic() - start, "versions": versions()}
    write_json(partial / MANIFEST, {"key": key, **facts})


def held_devices(config: FeaturesSection) -> dict[str, float]:
    """Devices that extraction reserves, by kind: the actors', and the CPU that reads and writes for them."""
    each = _actor_devices(config)
    return {kind: config.num_actors * amount + (kind == "cpu") for kind, amount in each.items()}


def _actor_devices(config: FeaturesSection) -> dict[str, float]:
    held = {"cpu": config.cpus_per_actor, "gpu": config.gpus_per_actor}
    return {kind: amount for kind, amount in held.items() if amount}


def read_cost(directory: str | Path) -> tuple[str, Cost] | None:
    """What the features of a finished cache directory cost when they were made, and the ledger entry that says so.

    None for a cache whose maker kept no ledger.
    """
    try:
        content = json.loads((Path(directory) / COST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content["ledger_entry"], Cost.from_plain(content["cost"])


def _publish(partial: Path, directory: Path, key: Mapping[str, Any]) -> None:
    """Rename in one step; a finished one with the same key that came first stays.

    Raises:
        CacheMismatchError: somebody else's directory came first.
    """
    try:
        partial.rename(directory)  # replaces an empty directory
    except OSError:
        if not _is_cached(directory, key):
            raise


def read_features(directory: str | Path) -> ray.data.Dataset:
    """The pairs with features of a finished cache directory.

    Raises:
        CacheMismatchError: the directory holds no finished features.
    """
    import ray.data

    directory = Path(directory).expanduser().absolute()
    if not (directory / MANIFEST).is_file():
        raise CacheMismatchError(f"{directory} holds no finished features: {MANIFEST} is missing")
    return ray.data.read_parquet([str(file) for file in _files(directory)])


def _files(directory: Path) -> list[Path]:
    """By name; with several actors the pairs are in no particular order."""
    return sorted((directory / _ROWS).glob("*.parquet"))


def _is_cached(directory: Path, key: Mapping[str, Any]) -> bool:
    """Whether the directory holds the features of this key; False when there is nothing.

    Raises:
        CacheMismatchError: naming the parts of the key that differ.
    """
    if not directory.exists() or not any(directory.iterdir()):
        return False
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheMismatchError(
            f"{directory} is not empty and not a feature cache; remove it or name another"
        ) from error
    if found == key:
        return True
    names = sorted(name for name in {*found, *key} if found.get(name) != key.get(name))
    shown = "; ".join(f"{name}: was {found.get(name)!r}, now {key.get(name)!r}" for name in names)
    raise CacheMismatchError(
        f"features in {directory} were made from other inputs ({shown}); remove the directory or name another"
    )
