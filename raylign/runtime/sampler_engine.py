"""One vLLM engine: started, asked for responses, given weights. A plain class; `SamplerPool` makes it an actor.

Weights come in one call as buckets (`apply_update`), or, with vLLM's own weight transfer, by `join_transfer` once and
`begin_transfer`, `receive_transfer` and `finish_transfer` for every update.

vLLM runs inside the actor's process (and, with several GPUs, in one more process per GPU), on the CPU build as on the
CUDA build. Tokens go in and come out; vLLM sees neither text nor the checkpoint's own sampling settings.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylign.errors import ModelError, RaylignError, SamplerError, StaleWeightsError
from raylign.runtime.sampler_settings import EngineSettings, dtype_name, end_ids, import_vllm, llm_arguments
from raylign.runtime.sampler_usage import EngineAnswer, ForwardCounter
from raylign.runtime.weight_sync import Bucket, EngineReport, UpdateHeader, unpack_bucket
from raylign.types import Rollout, SampleRequest

if TYPE_CHECKING:
    import torch

_HALF_UPDATED = -1  # version while an update is under way, and for good when it does not finish; must not sample


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What is known of an engine once it has started.

    Attributes:
        node: address of its node.
        pid: its process.
        context: longest sequence it takes, prompt and response, in tokens.
        dtype: number type that it computes in, "float32".
        vllm_version: version of vLLM.
    """

    node: str
    pid: int
    context: int
    dtype: str
    vllm_version: str


class EngineNotStartedError(RuntimeError):
    """`start` was not called in this process: the actor was restarted and has lost its weights."""


class HalfUpdatedError(RuntimeError):
    """An earlier update did not finish, and vLLM cannot begin another on what it left.

    Not a `RaylignError`, so that the pool takes it for a fault and replaces the process.
    """


class SamplerEngine:
    """A copy of the policy that samples.

    Args:
        settings: what to start.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._version = 0
        self._llm: Any = None
        self._counter: ForwardCounter | None = None
        self._ends: list[int] = []
        self._lora: Any = None
        self._num_adapters = 0
        self._dtype = ""
        self._header: UpdateHeader | None = None  # of the transfer under way

    def start(self) -> EngineFacts:
        """Load the model; not in the constructor, whose errors Ray would turn into text.

        Raises:
            MissingDependencyError: vLLM is not installed or cannot be imported.
            SamplerError: vLLM refuses the model, or would take a GPU that nobody reserved for it.
        """
        vllm = import_vllm(self._settings.num_gpus)
        if self._llm is None:
            self._dtype = dtype_name(self._settings)
            self._ends = end_ids(self._settings)
            try:
                self._llm = vllm.LLM(**llm_arguments(self._settings, self._dtype))
            except Exception as error:  # vLLM has no common root of its errors
                raise SamplerError(
                    f"vLLM {vllm.__version__} cannot sample from {self._settings.model_path}: {_reason(error)}"
                ) from error
            self._counter = ForwardCounter(self._llm.llm_engine.model_executor)
        return EngineFacts(
            node=_node(),
            pid=os.getpid(),
            context=int(self._llm.llm_engine.model_config.max_model_len),
            dtype=self._dtype,
            vllm_version=str(vllm.__version__),
        )

    def generate(self, requests: Sequence[SampleRequest], version: int) -> EngineAnswer:
        """Sample one response per request, in the order of the requests.

        Args:
            requests: prompts that fit, see `check_lengths`.
            version: of the weights that must be loaded.

        Raises:
            EngineNotStartedError: the process is new.
            StaleWeightsError: other weights are loaded.
        """
        counter = self._started()
        if self._version != version:
            raise StaleWeightsError(
                f"the engine on {_node()} holds weights version {self._version}, asked for was {version}; sync first"
            )
        counter.take()  # what a call that failed has left
        outputs = self._llm.generate(
            [{"prompt_token_ids": _ints(request.prompt_ids)} for request in requests],
            [self._sampling(request) for request in requests],
            lora_request=self._lora,
            use_tqdm=False,
        )
        rollouts = [self._rollout(request, output) for request, output in zip(requests, outputs, strict=True)]
        return EngineAnswer(rollouts=rollouts, usage=counter.take())

    def _started(self) -> ForwardCounter:
        if self._counter is None:
            raise EngineNotStartedError(f"process {os.getpid()} has not started its engine")
        return self._counter

    def _sampling(self, request: SampleRequest) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=int(request.seed),
            max_tokens=self._settings.max_new_tokens,
            stop_token_ids=self._ends,
            ignore_eos=True,  # the end tokens are all in stop_token_ids
            logprobs=0,  # of the sampled token alone; vLLM takes them before temperature and nucleus
            flat_logprobs=True,
            detokenize=False,
        )

    def _rollout(self, request: SampleRequest, output: Any) -> Rollout:
        completion = output.outputs[0]
        response_ids = np.asarray(completion.token_ids, np.int32)
        return Rollout(
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            prompt_ids=np.asarray(request.prompt_ids, np.int32),
            response_ids=response_ids,
            sampler_logps=_token_logps(completion.logprobs, response_ids),
            reached_end=int(response_ids[-1]) in self._ends,
            weight_version=self._version,
        )

    def apply_update(self, header: UpdateHeader, buckets: Sequence[Any]) -> EngineReport:
        """Load new weights in place and tell what arrived.

        Args:
            header: of the update.
            buckets: `Bucket`s, or Ray references to them, which are fetched one at a time.

        Raises:
            EngineNotStartedError: the process is new.
            HalfUpdatedError: an earlier update did not finish.
            SamplerError: vLLM cannot load the tensors.
        """
        self.check_ready()
        if header.adapter is not None and self._settings.lora_rank is None:
            raise SamplerError(
                "the update holds an adapter but the engine was started without; set policy.adapter=lora"
            )
        self._begin()
        with _load_errors(header):
            if header.adapter is None:
                received, not_loaded = self._load_weights(buckets)
            else:
                received, not_loaded = self._load_adapter(header, buckets), ()
        return self._finish(header, received, not_loaded)

    def check_ready(self) -> None:
        """Whether the engine can take an update.

        Raises:
            EngineNotStartedError: the process is new.
            HalfUpdatedError: an earlier update did not finish.
        """
        self._started()
        if self._version == _HALF_UPDATED:
            raise HalfUpdatedError(
                f"process {os.getpid()} cannot take other weights: it holds a part of an update that did not finish"
            )

    def join_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Connect to the trainer; returns once all engines have.

        Args:
            init_info: of vLLM's weight transfer, with the rank of this engine's first process.

        Raises:
            EngineNotStartedError: the process is new.
            SamplerError: vLLM cannot connect.
        """
        self._started()
        try:
            self._llm.collective_rpc("raylign_leave")
            self._llm.init_weight_transfer_engine({"init_info": dict(init_info)})
        except Exception as error:
            raise SamplerError(f"the engine on {_node()} cannot join the trainer: {_reason(error)}") from error

    def begin_transfer(self, header: UpdateHeader) -> None:
        """Prepare for full weights that come by vLLM's weight transfer; `receive_transfer`, `finish_transfer` follow.

        Args:
            header: of the update.

        Raises:
            EngineNotStartedError: the process is new.
            HalfUpdatedError: an earlier update did not finish.
            SamplerError: vLLM cannot take weights.
        """
        self.check_ready()
        self._begin()
        self._header = header
        with _load_errors(header):
            self._llm.collective_rpc("raylign_watch")
            self._llm.start_weight_update()

    def receive_transfer(self, update_info: Any) -> None:
        """Take part in the broadcast and load what comes.

        Args:
            update_info: of vLLM's weight transfer.

        Raises:
            SamplerError: vLLM cannot load the tensors.
        """
        assert self._header is not None
        with _load_errors(self._header):
            self._llm.update_weights({"update_info": update_info})

    def finish_transfer(self) -> EngineReport:
        """Put the weights to work and tell what arrived; raises what `apply_update` does."""
        assert self._header is not None
        with _load_errors(self._header):
            self._llm.finish_weight_update()
            found = self._llm.collective_rpc("raylign_watched")
        not_loaded = tuple(sorted({name for _, names in found for name in names}))
        return self._finish(self._header, tuple(received for received, _ in found), not_loaded)

    def _begin(self) -> None:
        self._started().take()
        self._version = _HALF_UPDATED

    def _finish(
        self, header: UpdateHeader, received: tuple[Mapping[str, int], ...], not_loaded: tuple[str, ...]
    ) -> EngineReport:
        """Forget what belongs to the old weights, and probe the new ones."""
        if not self._llm.reset_prefix_cache():  # keys and values of the old weights
            raise SamplerError(f"vLLM kept its prefix cache at weights version {header.version}: requests are running")
        probe_logps = self._probe(header.probe_ids)
        self._version = header.version
        return EngineReport(
            version=self._version,
            dtype=self._dtype,
            checksums=received,
            not_loaded=not_loaded,
            probe_logps=probe_logps,
            usage=self._started().take(),
        )

    def _load_weights(self, buckets: Sequence[Any]) -> tuple[tuple[Mapping[str, int], ...], tuple[str, ...]]:
        self._llm.collective_rpc("raylign_begin")
        received: list[dict[str, int]] = []
        for reference in buckets:
            found = self._llm.collective_rpc("raylign_receive", args=(_fetch(reference),))
            received = received or [{} for _ in found]
            for process, names in zip(received, found, strict=True):
                process.update(names)
        not_loaded = self._llm.collective_rpc("raylign_finish")
        return tuple(received), tuple(sorted({name for names in not_loaded for name in names}))

    def _load_adapter(self, header: UpdateHeader, buckets: Sequence[Any]) -> tuple[Mapping[str, int], ...]:
        """Only the adapter travels; a new id every time, since vLLM keeps serving the old tensors under a known id."""
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        assert header.adapter is not None
        tensors: dict[str, torch.Tensor] = {}
        received: dict[str, int] = {}
        for reference in buckets:
            unpacked, found = unpack_bucket(_fetch(reference))
            tensors |= unpacked
            received |= found
        self._num_adapters += 1
        engine = self._llm.llm_engine
        with tempfile.TemporaryDirectory(prefix="raylign-adapter-") as directory:
            save_file(tensors, str(Path(directory) / "adapter_model.safetensors"))
            content = json.dumps(dict(header.adapter), default=_plain)
            (Path(directory) / "adapter_config.json").write_text(content, encoding="utf-8")
            lora = LoRARequest(f"policy-{self._num_adapters}", self._num_adapters, directory)
            if not engine.add_lora(lora):
                raise SamplerError(f"vLLM did not take the adapter of weights version {header.version}")
        if self._lora is not None:
            engine.remove_lora(self._lora.lora_int_id)
        self._lora = lora
        return (received,)

    def _probe(self, token_ids: Sequence[int]) -> np.ndarray:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        (output,) = self._llm.generate(
            [{"prompt_token_ids": _ints(token_ids)}], sampling, lora_request=self._lora, use_tqdm=False
        )
        return _token_logps(output.prompt_logprobs, token_ids)[1:]


@contextmanager
def _load_errors(header: UpdateHeader) -> Iterator[None]:
    """VLLM's errors as one of ours."""
    try:
        yield
    except RaylignError:
        raise
    except Exception as error:
        raise SamplerError(f"vLLM cannot load weights version {header.version}: {_reason(error)}") from error


def _token_logps(flat: Any, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """(T,) log-probability of each token, 0 where vLLM gives none (the first of a prompt).

    vLLM lists the token itself first at every position, whatever else it lists.
    """
    logps = np.zeros(len(token_ids), np.float32)
    for position, start in enumerate(flat.start_indices):
        if start < flat.end_indices[position]:
            if flat.token_ids[start] != int(token_ids[position]):
                raise SamplerError(
                    f"vLLM gives the log-probability of token {flat.token_ids[start]} at position {position}, where "
                    f"token {int(token_ids[position])} stands"
                )
            logps[position] = flat.logprobs[start]
    return logps


def _fetch(reference: Any) -> Bucket:
    import ray

    bucket: Bucket = reference if isinstance(reference, Bucket) else ray.get(reference)
    return bucket


def _node() -> str:
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "this machine"


def _ints(token_ids: Sequence[int] | np.ndarray) -> list[int]:
    return [int(token) for token in token_ids]


def _plain(value: Any) -> Any:
    """JSON of what peft keeps in sets."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise ModelError(f"adapter config holds {value!r}, which is not JSON; pass what adapter_config.json holds")


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
