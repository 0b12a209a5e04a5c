"""Full weights from the trainer to the engines by vLLM's own weight transfer, an NCCL broadcast between GPUs.

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
from raylign.runtime.weight_sync import BUCKET_BYTES, EngineReport, UpdateHeader

MakeInfo = Callable[[str, int, int], Any]


class TransferGroup:
    """The trainer and all engines, connected once, for one broadcast after the other.

    After an error ranks wait for each other: the connection is broken off and the group is of no more use. Calls run in
    a thread of their own, because a broadcast without a receiver does not return, and the first error of either side
    ends the wait.

    Args:
        engines: actor handles of `SamplerEngine`s that were started with the same backend.
        num_processes: of one engine, its tensor-parallel size.
        timeout_s: longest wait for the connection, and for one update.
        make_info: address, port and number of ranks to the init info of vLLM's backend.
    """

    def __init__(
        self, engines: Sequence[Any], *, num_processes: int, timeout_s: float, make_info: MakeInfo | None = None
    ) -> None:
        self._client = _Client(engines, num_processes, timeout_s)
        self._source: Any = _Source()
        self._timeout_s = timeout_s
        self._make_info = make_info or _nccl_info
        self._num_ranks = 1 + len(engines) * num_processes
        self._trainer: Any = None

    def connect(self) -> None:
        """Have all engines join.

        Raises:
            RaylignError: an engine's own.
            SamplerError: an engine did not join in time, or NCCL cannot be loaded here.
            RayError: an engine was lost.
        """
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        info = self._make_info(ray.util.get_node_ip_address(), _free_port(), self._num_ranks)
        self._trainer = self._run(
            lambda: WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source),
            "connect to the trainer",
        )
        if self._trainer.model_update_group.disabled:
            raise SamplerError(
                "vLLM cannot load NCCL in the trainer's process: is its library installed, and VLLM_DISABLE_PYNCCL "
                "unset? Else set sampler.weight_transfer=object_store"
            )

    def send(self, header: UpdateHeader, weights: Mapping[str, torch.Tensor]) -> dict[int, EngineReport]:
        """Give all engines new weights.

        Args:
            header: of the update.
            weights: tensors by the names that `save_pretrained` writes, on any device. They pass through this process'
                GPU, where buckets of `BUCKET_BYTES` come and go: about four of them, and twice the largest tensor.

        Returns:
            What each engine found.

        Raises:
            RaylignError: an engine's own.
            SamplerError: the update took too long.
            RayError: an engine was lost.
        """
        self._client.header = header
        self._source.weights = weights
        self._run(self._trainer.send_weights, f"take weights version {header.version}")
        self._source.weights = {}
        return dict(enumerate(self._client.reports))

    def close(self) -> None:
        """Break off the connection; what waits in it on this side is let go."""
        self._source.is_closed = True  # before the thread that sends could use what is destroyed next
        group = getattr(self._trainer, "model_update_group", None)
        if group is not None:
            group.destroy()

    def _run(self, work: Callable[[], Any], what: str) -> Any:
        outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a new thread begins at the first
                outcomes.put((work(), None))
            except BaseException as error:
                outcomes.put((None, error))

        # vLLM looks at what engines answer only when its own side is through, which may be never
        self._client.on_error = lambda error: outcomes.put((None, error))
        threading.Thread(target=run, name="raylign-weight-transfer", daemon=True).start()
        try:
            value, error = outcomes.get(timeout=self._timeout_s)
        except queue.Empty:
            value = None
            error = SamplerError(
                f"the sampling engines did not {what} within sampler.timeout_s={self._timeout_s:g} s; can their nodes "
                "reach the trainer's? Raise the limit or set sampler.weight_transfer=object_store, and continue "
                "with run.resume=true"
            )
        if error is not None:
            self.close()
            raise error
        return value


def check_transfer() -> None:
    """Whether this process can send weights by vLLM's weight transfer.

    Raises:
        MissingDependencyError: vLLM cannot be imported.
    """
    try:
        import vllm.distributed.weight_transfer.nccl_engine  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"sampler.weight_transfer=nccl needs vLLM in the trainer's environment, too, where it cannot be imported: "
            f"{error}; pip install '.[gpu]' where raylign lies, or set sampler.weight_transfer=object_store"
        ) from error


class _Client:
    """What vLLM's trainer side calls to steer the engines; the names are vLLM's."""

    def __init__(self, engines: Sequence[Any], num_processes: int, timeout_s: float) -> None:
        self._engines = engines
        self._num_processes = num_processes
        self._timeout_s = timeout_s
        self.header: UpdateHeader | None = None
        self.reports: list[EngineReport] = []
        self.on_error: Callable[[BaseException], None] = lambda _: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [{**init_info, "rank_offset": 1 + number * self._num_processes} for number in range(len(self._engines))]
        self._get([engine.join_transfer.remote(info) for engine, info in zip(self._engines, infos, strict=True)])

    def start_weight_update(self) -> None:
        self._get([engine.begin_transfer.remote(self.header) for engine in self._engines])

    def update_weights(self, update_info: Any) -> None:
        self._get([engine.receive_transfer.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.reports = self._get([engine.finish_transfer.remote() for engine in self._engines])

    def _get(self, references: list[Any]) -> list[Any]:
        pending = list(references)
        try:
            while pending:  # one after the other as they come: the first to fail is not the first of the list
                done, pending = ray.wait(pending, timeout=self._timeout_s)
                if not done:
                    raise TimeoutError(f"no answer of a sampling engine within {self._timeout_s:g} s")
                ray.get(done, timeout=self._timeout_s)
            answers: list[Any] = ray.get(references, timeout=self._timeout_s)
            return answers
        except BaseException as error:
            self.on_error(error)
            raise


class _Source:
    """The tensors of one update as vLLM's trainer side reads them."""

    def __init__(self) -> None:
        self.weights: Mapping[str, torch.Tensor] = {}
        self.is_closed = False

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, tensor in self.weights.items():
            if self.is_closed:
                raise RuntimeError("the transfer was broken off")
            yield name, tensor.to(device)


def _nccl_info(address: str, port: int, num_ranks: int) -> Any:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        master_address=address,
        master_port=port,
        world_size=num_ranks,
        rank=0,
        packed_buffer_size_bytes=BUCKET_BYTES,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
