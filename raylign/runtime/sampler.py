"""The pool of sampling engines: Ray actors that share out requests, take new weights, and are replaced when lost.

What to do is decided in `sampler_plan`, what an engine is in `sampler_engine`; here are the actors, the waits and their
limits. An engine that dies, hangs or fails is restarted by Ray under the same handle, started, given the last weights,
and asked again for what it alone had held.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from raylign.config import RunConfig
from raylign.errors import RaylignError, ResourceError, SamplerError, StaleWeightsError
from raylign.runtime.sampler_engine import (
    EngineFacts,
    EngineNotStartedError,
    SamplerEngine,
)
from raylign.runtime.sampler_plan import EngineFault, check_lengths, check_restart, split_requests
from raylign.runtime.sampler_settings import actor_options, engine_settings
from raylign.runtime.sampler_usage import EngineAnswer, SamplerUsage, side_by_side
from raylign.runtime.weight_sync import (
    EngineReport,
    SentUpdate,
    SyncReport,
    WeightUpdate,
    check_report,
)
from raylign.runtime.weight_transfer import TransferGroup
from raylign.types import Rollout, SampleRequest

_RETRY_S = 0.25  # between two calls to an actor that Ray is restarting

logger = logging.getLogger(__name__)


class SamplerPool:
    """Engines, and what they were last told.

    Picklable: a training worker uses the pool that the driver has started. Only one process may use it at a time, and
    the engines live as long as the driver that started them.

    Args:
        engines: actor handles of started `SamplerEngine`s.
        facts: of each engine.
        config: of the run.
    """

    def __init__(self, engines: Sequence[Any], facts: Sequence[EngineFacts], config: RunConfig) -> None:
        self._engines = list(engines)
        self._facts = list(facts)
        self._config = config.sampler
        self._last: SentUpdate | None = None
        self._is_broken = False  # engines may hold anything since the last sync
        self._num_restarts = 0
        self._transfer: TransferGroup | None = None
        self._transfer_restarts = 0  # engines replaced before that group was connected
        self._usage = SamplerUsage()

    def __getstate__(self) -> dict[str, Any]:
        """Without the connection of a transfer, which belongs to this process; another one connects anew."""
        return {**self.__dict__, "_transfer": None}

    @classmethod
    def start(cls, model_path: str, *, config: RunConfig) -> SamplerPool:
        """Start `sampler.num_engines` engines on the weights in `model_path`.

        Call it on the driver.

        Args:
            model_path: directory of the policy before training, readable on every node.
            config: of the run; sections sampler, policy and data are read.

        Raises:
            MissingDependencyError: vLLM is not installed.
            SamplerError: vLLM refuses the model, or an engine died while it loaded it.
            ResourceError: the engines were not placed and loaded within `sampler.start_timeout_s`.
        """
        settings = engine_settings(model_path, config)
        return cls._start(ray.remote(SamplerEngine), (settings,), config)

    @classmethod
    def _start(cls, actor_class: Any, arguments: tuple[Any, ...], config: RunConfig) -> SamplerPool:
        sampler = config.sampler
        engines = [actor_class.options(**actor_options(config)).remote(*arguments) for _ in range(sampler.num_engines)]
        try:
            facts = _await_start(engines, sampler.start_timeout_s)
        except BaseException:
            _kill(engines)
            raise
        return cls(engines, facts, config)

    @property
    def version(self) -> int:
        """Of the weights that the engines hold; 0 before the first sync."""
        return 0 if self._last is None else self._last.header.version

    @property
    def num_restarts(self) -> int:
        """Engines that this pool has replaced."""
        return self._num_restarts

    @property
    def usage(self) -> SamplerUsage:
        """What the last `generate` or `sync` of this process took; zeros before the first."""
        return self._usage

    def generate(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        """Sample one response per request, in the order of the requests.

        Raises:
            ModelError: a prompt leaves no room for a response of `sampler.max_new_tokens`.
            SamplerError: more engines were lost than `sampler.max_restarts`.
            StaleWeightsError: an engine holds other weights than this pool sent last, or the last sync failed.
        """
        self._check_running()
        if self._is_broken:
            raise StaleWeightsError(
                "the last sync of the sampling engines failed, what they hold is unknown; sync again"
            )
        limit = self._config.max_new_tokens
        check_lengths(requests, max_new_tokens=limit, context=min(facts.context for facts in self._facts))
        shares = split_requests(requests, len(self._engines), limit)

        def submit(engine: int) -> Any:
            return self._engines[engine].generate.remote([requests[i] for i in shares[engine]], self.version)

        held = {engine: len(share) for engine, share in enumerate(shares) if share}
        answers: dict[int, EngineAnswer] = self._call(submit, held, restores=True)
        self._usage = side_by_side(answer.usage for answer in answers.values())
        rollouts: list[Rollout | None] = [None] * len(requests)
        for engine in held:
            for position, rollout in zip(shares[engine], answers[engine].rollouts, strict=True):
                rollouts[position] = rollout
        return [rollout for rollout in rollouts if rollout is not None]

    def sync(self, update: WeightUpdate) -> SyncReport:
        """Give all engines new weights and prove that they have them.

        The bytes stay in the object store until the next update, for engines that are replaced in between. With
        sampler.weight_transfer=nccl the given tensors are kept instead and must not change until then.

        Raises:
            StaleWeightsError: an engine does not hold what was sent; no engine of this pool may sample any more.
            SamplerError: vLLM cannot load the weights, more engines were lost than `sampler.max_restarts`, or one was
                lost in the middle of a transfer.
            MissingDependencyError: sampler.weight_transfer=nccl without vLLM here.
        """
        self._check_running()
        start = time.monotonic()
        last = SentUpdate.of(update, dtype=self._facts[0].dtype)
        self._is_broken = True
        if self._transfers and update.adapter is None:
            reports = self._broadcast(last)
        else:
            last.stored()
            self._last = last
            reports = self._call(lambda engine: self._submit_update(engine, last), self._all(), restores=False)
        self._usage = side_by_side(report.usage for report in reports.values())
        try:
            differences = [self._check(engine, last, report) for engine, report in sorted(reports.items())]
        except StaleWeightsError:
            self._last = None  # no engine replaced from here on gets these weights
            raise
        self._is_broken = False
        return SyncReport(
            version=update.version,
            seconds=time.monotonic() - start,
            num_bytes=last.num_bytes * len(self._engines),
            probe_mean_difference=max(difference.mean for difference in differences),
            probe_max_difference=max(difference.largest for difference in differences),
            probe_kl=max(difference.kl for difference in differences),
        )

    def stop(self) -> None:
        """Kill the engines; a second call does nothing."""
        if self._transfer is not None:
            self._transfer.close()
        if ray.is_initialized():
            _kill(self._engines)
        self._engines, self._transfer, self._last = [], None, None

    def _check_running(self) -> None:
        if not self._engines:
            raise SamplerError("this sampler pool was stopped; start another with SamplerPool.start")

    def _all(self) -> dict[int, int]:
        """Engines to call that hold no prompts."""
        return dict.fromkeys(range(len(self._engines)), 0)

    @property
    def _transfers(self) -> bool:
        """Whether full weights come by vLLM's own weight transfer."""
        return self._config.weight_transfer != "object_store"

    def _connect(self) -> TransferGroup:
        group = TransferGroup(
            self._engines, num_processes=max(1, self._config.gpus_per_engine), timeout_s=self._config.timeout_s
        )
        group.connect()
        return group

    def _broadcast(self, update: SentUpdate) -> dict[int, EngineReport]:
        """Weights by vLLM's weight transfer. Engines lost before it are replaced, one lost during it ends the run.

        Raises:
            SamplerError: an engine was lost, or cannot take the weights.
        """
        self._last = None  # an engine replaced now gets its weights by this transfer
        self._call(lambda engine: self._engines[engine].check_ready.remote(), self._all(), restores=False)
        transfer, self._transfer = self._transfer, None  # after a fault its ranks wait for each other
        try:
            if transfer is None or self._transfer_restarts != self._num_restarts:
                if transfer is not None:
                    transfer.close()
                transfer = self._connect()
            reports = transfer.send(update.header, update.weights)
        except RayTaskError as error:
            raise _own(error, "take new weights") from error
        except RaylignError:
            raise
        except Exception as error:  # of Ray or of who carries the bytes, whichever sees it first
            raise SamplerError(
                f"the transfer of weights version {update.header.version} broke ({_one_line(error)}), mostly because a "
                "sampling engine died in the middle of it; continue from the last checkpoint with run.resume=true"
            ) from error
        self._transfer, self._transfer_restarts = transfer, self._num_restarts
        self._last = update
        return reports

    def _submit_update(self, engine: int, update: SentUpdate) -> Any:
        return self._engines[engine].apply_update.remote(update.header, update.stored())

    def _check(self, engine: int, update: SentUpdate, report: EngineReport) -> Any:
        name = f"sampling engine {engine} on node {self._facts[engine].node}"
        return check_report(report, engine=name, version=update.header.version, sent=update.sent, probe=update.probe)

    def _call(self, submit: Callable[[int], Any], held: Mapping[int, int], *, restores: bool) -> dict[int, Any]:
        """Call several engines at once; replace and ask again those that are lost.

        Args:
            submit: makes the call to an engine, returns its reference.
            held: prompts that each engine to call is asked for, 0 when it receives weights.
            restores: whether a replaced engine must first be given the last weights.

        Returns:
            What each engine answered.
        """
        answers: dict[int, Any] = {}
        pending = {submit(engine): engine for engine in held}
        deadlines = dict.fromkeys(held, time.monotonic() + self._config.timeout_s)
        while pending:
            first = min(pending, key=lambda reference: deadlines[pending[reference]])
            left = max(0.0, deadlines[pending[first]] - time.monotonic())
            # an answer in another node's store is one
            done, _ = ray.wait(list(pending), num_returns=1, timeout=left, fetch_local=False)
            reference = done[0] if done else first
            engine = pending.pop(reference)
            answer = self._outcome(engine, reference, held[engine], is_late=not done)
            if isinstance(answer, EngineFault):
                start = time.monotonic()
                self._replace(answer, restores=restores)
                spent_s = time.monotonic() - start  # nobody looked at the others
                deadlines = {other: deadline + spent_s for other, deadline in deadlines.items()}
                pending[submit(engine)] = engine
                deadlines[engine] = time.monotonic() + self._config.timeout_s
            else:
                answers[engine] = answer
        return answers

    def _outcome(self, engine: int, reference: Any, num_prompts: int, *, is_late: bool = False) -> Any:
        """What a call came to: its value, or the fault that makes the engine be replaced.

        Raises:
            RaylignError: the engine's own, which a new engine would repeat.
        """

        def fault(kind: Any, detail: str) -> EngineFault:
            node = self._facts[engine].node
            return EngineFault(engine=engine, node=node, kind=kind, num_prompts=num_prompts, detail=detail)

        if is_late:
            return fault("hung", f"no answer within sampler.timeout_s={self._config.timeout_s:g} s")
        try:
            return ray.get(reference, timeout=self._config.timeout_s)
        except GetTimeoutError:
            return fault("hung", "its answer could not be fetched")
        except RayActorError as error:
            return fault("died", _one_line(error))
        except RayTaskError as error:
            if isinstance(error.cause, RaylignError):
                raise error.cause from error
            if isinstance(error.cause, EngineNotStartedError):
                return fault("restarted", _one_line(error.cause))
            return fault("failed", _one_line(error.cause))

    def _replace(self, fault: EngineFault, *, restores: bool) -> None:
        """Have a new process behind the handle, started and, if asked, with the last weights.

        Raises:
            SamplerError: no restart is left, or the new process does not come up.
        """
        engine = fault.engine
        while True:
            message = check_restart(fault, num_restarts=self._num_restarts, max_restarts=self._config.max_restarts)
            logger.warning(message)
            self._num_restarts += 1
            is_alive = fault.kind in ("hung", "failed")
            if is_alive:
                ray.kill(self._engines[engine], no_restart=False)
            self._facts[engine] = self._restart(engine, is_killed=is_alive)
            if not restores or self._last is None:
                return
            pending = self._submit_update(engine, self._last)
            done, _ = ray.wait([pending], timeout=self._config.timeout_s)
            report = self._outcome(engine, pending, fault.num_prompts, is_late=not done)
            if not isinstance(report, EngineFault):
                self._check(engine, self._last, report)
                return
            fault = report

    def _restart(self, engine: int, *, is_killed: bool) -> EngineFacts:
        """Wait for the process that Ray starts and load the model in it; the old one is killed if it was not."""
        limit = self._config.start_timeout_s
        deadline = time.monotonic() + limit
        handle = self._engines[engine]
        lost = self._facts[engine].node, self._facts[engine].pid
        where = f"sampling engine {engine}, last on node {self._facts[engine].node},"
        while True:
            left = deadline - time.monotonic()
            try:
                facts: EngineFacts = ray.get(handle.start.remote(), timeout=max(0.0, left))
                if (facts.node, facts.pid) != lost:
                    return facts
                # ray.kill returns before the process is gone, and this was its last answer;
                # or Ray took it for lost while its node could not be reached
                if not is_killed:
                    ray.kill(handle, no_restart=False)
                    is_killed = True
            except ActorUnavailableError:
                pass
            except GetTimeoutError as error:
                raise SamplerError(
                    f"{where} did not come back within sampler.start_timeout_s={limit:g} s; see that its resources are "
                    "free, or raise the limit"
                ) from error
            except RayActorError as error:
                raise SamplerError(
                    f"{where} did not come back: {_one_line(error)}; give engines more memory (sampler.cache_mib)"
                ) from error
            except RayTaskError as error:
                raise _own(error) from error
            time.sleep(_RETRY_S)


def _await_start(engines: Sequence[Any], timeout_s: float) -> list[EngineFacts]:
    try:
        facts: list[EngineFacts] = ray.get([engine.start.remote() for engine in engines], timeout=timeout_s)
        return facts
    except GetTimeoutError as error:
        free, total = ray.available_resources(), ray.cluster_resources()
        shown = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        raise ResourceError(
            f"{len(engines)} sampling engines were not placed and started within sampler.start_timeout_s="
            f"{timeout_s:g} s; free are {shown}; lower sampler.num_engines, sampler.cpus_per_engine or "
            "sampler.gpus_per_engine, or raise the limit (a large model loads slowly)"
        ) from error
    except RayActorError as error:
        raise SamplerError(
            f"a sampling engine died while it loaded the model: {_one_line(error)}; mostly the node ran out of memory: "
            "lower sampler.num_engines, sampler.cache_mib or sampler.gpu_memory_utilization"
        ) from error
    except RayTaskError as error:
        raise _own(error) from error


def _own(error: RayTaskError, what: str = "start") -> RaylignError:
    """The engine's error as raylign's own."""
    if isinstance(error.cause, RaylignError):
        return error.cause
    return SamplerError(f"a sampling engine cannot {what}: {_one_line(error.cause)}")


def _kill(engines: Sequence[Any]) -> None:
    for engine in engines:
        ray.kill(engine, no_restart=True)


def _one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
