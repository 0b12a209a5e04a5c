"""Weights from the trainer's GPU to the engines' by vLLM's own weight transfer, an NCCL broadcast.

vLLM packs the tensors into buckets, sends them and loads them. It leaves open who has which rank, how long to wait, and
what to do about an engine that is lost; that is here. The trainer is rank 0 of the group, the processes of the engines
follow in the order of the engines.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch

from raylign.errors import MissingDependencyError, SamplerError
from raylign.runtime.weight_sync import EngineReport, UpdateHeader

MakeInfo = Callable[[str, int, int], Any]


class TransferGroup:
    """The trainer and all engines, connected once, for one broadcast after the other.

    Whatever fails in a call leaves processes that wait for each other, so that the group is of no more use. A call
    runs in a thread of its own, because a broadcast without a receiver never returns.

    Args:
        engines: actor handles of `SamplerEngine`s that were started with the same backend.
        num_processes: of one engine, its tensor-parallel size.
        timeout_s: longest wait for the connection, and for one update.
        make_info: address, port and number of ranks to the init info of vLLM's backend; NCCL where there is none.
    """

    def __init__(
        self, engines: Sequence[Any], *, num_processes: int, timeout_s: float, make_info: MakeInfo | None = None
    ) -> None:
        self._client = _Client(engines, num_processes)
        self._source: Any = _Source()
        self._timeout_s = timeout_s
        self._make_info = make_info or _nccl_info
        self._num_ranks = 1 + len(engines) * num_processes
        self._trainer: Any = None

    def connect(self) -> None:
        """Have all engines join.

        Raises:
            MissingDependencyError: vLLM cannot be imported by the trainer.
            SamplerError: an engine was lost or refuses, or one did not join in time.
        """
        info = self._make_info(ray.util.get_node_ip_address(), _free_port(), self._num_ranks)
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        self._trainer = self._run(
            lambda: WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source),
            "connect to the trainer",
        )

    def send(self, header: UpdateHeader, weights: Mapping[str, torch.Tensor]) -> dict[int, EngineReport]:
        """Give all engines new weights.

        Args:
            header: of the update.
            weights: tensors by the names that `save_pretrained` writes; they pass through this process' GPU one bucket
                at a time.

        Returns:
            What each engine found.

        Raises:
            RaylignError: an engine's own.
            SamplerError: an engine was lost, or the update took too long.
        """
        self._client.header = header
        self._source.weights = weights
        try:
            self._run(self._trainer.send_weights, f"take weights version {header.version}")
        finally:
            self._source.weights = {}
        return dict(enumerate(self._client.reports))

    def _run(self, work: Callable[[], Any], what: str) -> Any:
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a new thread begins at the first
                outcome.put((work(), None))
            except BaseException as error:
                outcome.put((None, error))

        threading.Thread(target=run, name="raylign-weight-transfer", daemon=True).start()
        try:
            value, error = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            raise SamplerError(
                f"the sampling engines did not {what} within sampler.timeout_s={self._timeout_s:g} s; can their nodes "
                "reach the trainer's? Raise the limit, or set sampler.weight_transfer=object_store"
            ) from None
        if error is not None:
            raise error
        return value


class _Client:
    """What vLLM's trainer side calls to steer the engines; the names are vLLM's."""

    def __init__(self, engines: Sequence[Any], num_processes: int) -> None:
        self._engines = engines
        self._num_processes = num_processes
        self.header: UpdateHeader | None = None
        self.reports: list[EngineReport] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        ray.get(
            [
                engine.join_transfer.remote({**init_info, "rank_offset": 1 + number * self._num_processes})
                for number, engine in enumerate(self._engines)
            ]
        )

    def start_weight_update(self) -> None:
        ray.get([engine.begin_transfer.remote(self.header) for engine in self._engines])

    def update_weights(self, update_info: Any) -> None:
        ray.get([engine.receive_transfer.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.reports = ray.get([engine.finish_transfer.remote() for engine in self._engines])


class _Source:
    """The tensors of one update as vLLM's trainer side reads them."""

    def __init__(self) -> None:
        self.weights: Mapping[str, torch.Tensor] = {}

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, tensor in self.weights.items():
            yield name, tensor.to(device)


def _nccl_info(address: str, port: int, num_ranks: int) -> Any:
    try:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    except ImportError as error:
        raise MissingDependencyError(
            f"sampler.weight_transfer=nccl needs vLLM in the trainer's environment, too, where it cannot be imported: "
            f"{error}; pip install 'raylign[gpu]', or set sampler.weight_transfer=object_store"
        ) from error
    return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=num_ranks, rank=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
