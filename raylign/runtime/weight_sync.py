"""Weights on their way from the trainer to the engines: packed, counted, and proven to have arrived.

    WeightUpdate -> buckets, or a transfer of vLLM's -> engine -> EngineReport -> check_report -> SyncReport

Three things are compared after every update: the version that the engine states, a CRC-32 of every tensor as received
against the trainer's own tensor, and the log-probabilities of the probe under the loaded weights against those under
the trainer's. The checksum finds what was damaged on the way, the probe what was loaded wrongly or not at all.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylign.errors import ShapeError, StaleWeightsError
from raylign.runtime.sampler_usage import SamplerUsage

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 256 * 2**20
_ALIGNMENT_BYTES = 16  # so that a part of a bucket can be viewed as any number type

# Largest mean and largest single difference of a probe's log-probabilities, nats, by the engine's number type. Two
# implementations of one forward differ by about 1e-6 in float32 and 1e-2 in bfloat16.
PROBE_TOLERANCE: Mapping[str, tuple[float, float]] = {"float32": (1e-4, 2e-3), "bfloat16": (5e-2, 1.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A text whose log-probabilities tell one set of weights from another.

    The trainer computes it with the weights that it sends, in the number types that it trains in; a few hundred tokens
    of real text are enough. It must fit into the engine's context with one token to spare.

    Attributes:
        token_ids: T tokens.
        token_logps: (T - 1,) log-probability of token_ids[1:] given all tokens before, at temperature 1, nats, float32.
    """

    token_ids: tuple[int, ...]
    token_logps: np.ndarray

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2 or self.token_logps.shape != (len(self.token_ids) - 1,):
            raise ShapeError(
                f"a probe of T tokens needs T - 1 >= 1 log-probabilities, found {len(self.token_ids)} tokens and "
                f"log-probabilities of shape {self.token_logps.shape}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """New weights of the policy.

    Attributes:
        version: >= 1; engines state it with every response from now on.
        weights: tensors on the CPU by the names that `save_pretrained` writes; a tied output layer may be there or not.
            With an adapter, the adapter's tensors by the names of adapter_model.safetensors.
        adapter: None for full weights, else the content of peft's adapter_config.json.
        probe: log-probabilities under these very weights.
    """

    version: int
    weights: Mapping[str, torch.Tensor]
    adapter: Mapping[str, Any] | None
    probe: Probe

    def __post_init__(self) -> None:
        if self.version < 1:
            raise ValueError(f"version={self.version} must be >= 1; 0 is the model as the engines loaded it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where one tensor lies in a bucket.

    Attributes:
        name: of the tensor.
        dtype: torch name of its number type, "float32".
        shape: of the tensor.
        start: first byte in the bucket.
        num_bytes: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Some tensors as bytes.

    Attributes:
        parts: what is where.
        data: (num_bytes,) uint8. An array, which Ray's object store hands out without a copy.
    """

    parts: tuple[Part, ...]
    data: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateHeader:
    """What an engine is told of an update besides the tensors.

    Attributes:
        version: of the weights.
        adapter: see `WeightUpdate`.
        probe_ids: tokens of the probe.
    """

    version: int
    adapter: Mapping[str, Any] | None
    probe_ids: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class SentUpdate:
    """The last update of a pool, kept for engines that lose it: in the object store, or here until one does.

    Attributes:
        header: as sent.
        sent: CRC-32 of every tensor.
        probe: of the update.
        num_bytes: of all tensors.
        weights: the tensors, {} once they are stored.
        buckets: references to `Bucket`s, [] until then.
    """

    header: UpdateHeader
    sent: Mapping[str, int]
    probe: Probe
    num_bytes: int
    weights: Mapping[str, torch.Tensor]
    buckets: list[Any]

    @classmethod
    def of(cls, update: WeightUpdate, *, dtype: str) -> SentUpdate:
        """Nothing is stored yet.

        Args:
            update: what to send.
            dtype: number type that the engines compute in, "float32". Full weights in a wider one are sent in this one,
                which is what engines would make of them.
        """
        weights = update.weights if update.adapter is not None else _narrowed(update.weights, dtype)
        return cls(
            header=UpdateHeader(version=update.version, adapter=update.adapter, probe_ids=update.probe.token_ids),
            sent=checksums(weights),
            probe=update.probe,
            num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
            weights=weights,
            buckets=[],
        )

    def stored(self) -> list[Any]:
        """References to the buckets, which are put into Ray's object store the first time."""
        import ray

        if not self.buckets:
            self.buckets = [ray.put(bucket) for bucket in pack_buckets(self.weights)]
            self.weights = {}
        return self.buckets


def _narrowed(weights: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    import torch

    target: torch.dtype = getattr(torch, dtype)
    return {
        name: tensor.to(target) if tensor.is_floating_point() and tensor.element_size() > target.itemsize else tensor
        for name, tensor in weights.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What an engine found after an update.

    Attributes:
        version: that the engine now states.
        dtype: number type that it computes in, "float32".
        checksums: CRC-32 of every tensor as received, one mapping per process of the engine.
        not_loaded: parameters of the engine's model that no tensor of the update reached.
        probe_logps: (T - 1,) log-probabilities of the probe under the engine's weights, nats, float32.
        usage: of the update; its forwards are those of the probe.
    """

    version: int
    dtype: str
    checksums: tuple[Mapping[str, int], ...]
    not_loaded: tuple[str, ...]
    probe_logps: np.ndarray
    usage: SamplerUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One synchronisation of all engines.

    Attributes:
        version: of the weights that all engines hold now.
        seconds: from the call to the last checked engine.
        num_bytes: tensor bytes sent, summed over the engines.
        probe_mean_difference: mean |trainer - engine| log-probability of a probe token, nats; worst engine.
        probe_max_difference: largest such difference, nats; worst engine.
        probe_kl: mean of exp(d) - 1 - d over the probe's tokens, d = trainer - engine log-probability, nats; worst
            engine. It estimates KL(engine || trainer) when the engine sampled the probe (k3 of Schulman, "Approximating
            KL divergence", 2020), and is a non-negative distance of the two otherwise.
    """

    version: int
    seconds: float
    num_bytes: int
    probe_mean_difference: float
    probe_max_difference: float
    probe_kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeDifference:
    """How far an engine is from the trainer on the probe; see `SyncReport` for the three numbers."""

    mean: float
    largest: float
    kl: float


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor, shape (num_bytes,), uint8; no copy for a contiguous tensor on the CPU."""
    import torch

    data: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data


def checksums(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """CRC-32 of every tensor's bytes."""
    return {name: zlib.crc32(tensor_bytes(tensor).data) for name, tensor in weights.items()}


def pack_buckets(weights: Mapping[str, torch.Tensor], max_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Tensors as buckets of at most `max_bytes`, in the given order; a larger tensor has a bucket of its own."""
    held: list[tuple[str, torch.Tensor]] = []
    num_bytes = 0
    for name, tensor in weights.items():
        size = _aligned(tensor.numel() * tensor.element_size())
        if held and num_bytes + size > max_bytes:
            yield _pack(held, num_bytes)
            held, num_bytes = [], 0
        held.append((name, tensor))
        num_bytes += size
    if held:
        yield _pack(held, num_bytes)


def _pack(named: Sequence[tuple[str, torch.Tensor]], num_bytes: int) -> Bucket:
    data = np.zeros(num_bytes, np.uint8)
    parts = []
    start = 0
    for name, tensor in named:
        content = tensor_bytes(tensor)
        data[start : start + len(content)] = content
        dtype = str(tensor.dtype).removeprefix("torch.")
        parts.append(Part(name=name, dtype=dtype, shape=tuple(tensor.shape), start=start, num_bytes=len(content)))
        start += _aligned(len(content))
    return Bucket(parts=tuple(parts), data=data)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def unpack_bucket(bucket: Bucket) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Tensors of a bucket in memory of their own, and the CRC-32 of each as it arrived."""
    import torch

    data = bucket.data.copy()  # the object store's memory is read-only and may be given back
    tensors, found = {}, {}
    for part in bucket.parts:
        content = data[part.start : part.start + part.num_bytes]
        found[part.name] = zlib.crc32(content.data)
        tensors[part.name] = torch.from_numpy(content).view(getattr(torch, part.dtype)).reshape(part.shape)
    return tensors, found


def compare_probe(trainer_logps: np.ndarray, engine_logps: np.ndarray) -> ProbeDifference:
    """Differences of two sets of log-probabilities, both (T - 1,).

    Raises:
        ShapeError: the shapes differ.
    """
    if trainer_logps.shape != engine_logps.shape:
        raise ShapeError(f"probe log-probabilities have shapes {trainer_logps.shape} and {engine_logps.shape}")
    difference = trainer_logps.astype(np.float64) - engine_logps.astype(np.float64)
    return ProbeDifference(
        mean=float(np.abs(difference).mean()),
        largest=float(np.abs(difference).max()),
        kl=float((np.expm1(difference) - difference).mean()),
    )


def check_report(
    report: EngineReport, *, engine: str, version: int, sent: Mapping[str, int], probe: Probe
) -> ProbeDifference:
    """Compare what an engine holds with what the trainer sent.

    Args:
        report: of the engine.
        engine: its name in messages.
        version: of the update.
        sent: CRC-32 of every tensor of the update.
        probe: of the update.

    Raises:
        StaleWeightsError: another version, a damaged or missing tensor, or a probe beyond `PROBE_TOLERANCE`.
    """
    where = f"{engine}, weights version {version}"
    if report.version != version:
        raise StaleWeightsError(f"{where}: the engine states version {report.version} after the update")
    for rank, received in enumerate(report.checksums):
        for name in sorted(sent.keys() | received.keys()):
            if sent.get(name) != received.get(name):
                raise StaleWeightsError(
                    f"{where}: tensor {name} has checksum {_hex(received.get(name))} in process {rank} of the engine, "
                    f"the trainer sent {_hex(sent.get(name))}; the update was damaged on the way, sync again"
                )
    if report.not_loaded:
        raise StaleWeightsError(
            f"{where}: no tensor of the update reached {len(report.not_loaded)} parameters of the engine, "
            f"for example {report.not_loaded[0]}; send all weights under the names that save_pretrained writes"
        )
    difference = compare_probe(probe.token_logps, report.probe_logps)
    mean, largest = PROBE_TOLERANCE[report.dtype]
    # a nan must fail too, hence the negations
    if not difference.mean <= mean or not difference.largest <= largest:
        raise StaleWeightsError(
            f"{where}: the probe's log-probabilities differ from the trainer's by {difference.mean:.2g} nats on "
            f"average and {difference.largest:.2g} at most ({len(probe.token_logps)} tokens), allowed are {mean:g} and "
            f"{largest:g} in {report.dtype}; the tensors arrived but the engine computes with other weights"
        )
    return difference


def _hex(checksum: int | None) -> str:
    return "none (tensor missing)" if checksum is None else f"{checksum:08x}"
