"""The part of an engine that runs inside vLLM's workers: it writes buckets of weights into the model.

vLLM mixes this class into its worker (`worker_extension_cls`) and calls its methods by name (`collective_rpc`), with
one worker or with one per GPU. The steps are those of vLLM's own weight-transfer backends: its layerwise reload puts
checkpoint-shaped parameters in place of packed ones, collects the tensors of a layer, packs them anew and copies them
into the memory that compiled code and CUDA graphs know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from raylign.runtime.weight_sync import Bucket, checksums, unpack_bucket

if TYPE_CHECKING:
    import torch


class WeightReceiver:
    """Methods for vLLM's worker; what is declared here is the worker's own."""

    if TYPE_CHECKING:
        model_runner: Any
        model_config: Any
        vllm_config: Any
        weight_transfer_engine: Any

    def raylign_begin(self) -> None:
        """Prepare the model for new weights; until `raylign_finish` it cannot sample."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self._raylign_expect_all()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)

    def _raylign_expect_all(self) -> Any:
        """Note all parameters as not loaded; returns the model."""
        model = self.model_runner.get_model()
        # taken now, while a tied output layer still is the embedding and counts once
        self._raylign_missing = {name for name, _ in model.named_parameters()}
        return model

    def _raylign_loaded(self, names: Iterable[str] | None) -> None:
        # a model that does not say what it loaded is not blamed; the probe still judges it
        self._raylign_missing = set() if names is None else self._raylign_missing - set(names)

    def raylign_receive(self, bucket: Bucket) -> dict[str, int]:
        """Load one bucket; returns the CRC-32 of every tensor as received."""
        from vllm.config import set_current_vllm_config

        tensors, found = unpack_bucket(bucket)
        with set_current_vllm_config(self.vllm_config):
            self._raylign_loaded(self.model_runner.get_model().load_weights(tensors.items()))
        return found

    def raylign_finish(self) -> tuple[str, ...]:
        """Put the loaded layers to work; returns the parameters that nothing was loaded into."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.model_config)  # type: ignore[no-untyped-call]
            _pack_output_layers(model)
        return tuple(sorted(self._raylign_missing))

    def raylign_leave(self) -> None:
        """Give up the connection of vLLM's weight transfer, which would not do so for another one."""
        engine = self.weight_transfer_engine
        group, engine.model_update_group = engine.model_update_group, None
        if group is not None:
            group.destroy()

    def raylign_watch(self) -> None:
        """Note what vLLM's own weight transfer loads from now on, until `raylign_watched`."""
        model = self._raylign_expect_all()
        self._raylign_received: dict[str, int] = {}
        load = model.load_weights

        def watched(weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
            held = list(weights)
            self._raylign_received |= checksums(dict(held))
            names = load(held)
            self._raylign_loaded(names)
            return names

        model.load_weights = watched

    def raylign_watched(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """CRC-32 of every tensor as received, and the parameters that nothing was loaded into."""
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        del model.load_weights
        with set_current_vllm_config(self.vllm_config):
            _pack_output_layers(model)
        return self._raylign_received, tuple(sorted(self._raylign_missing))


def _pack_output_layers(model: torch.nn.Module) -> None:
    """Pack output layers again, which matters on CPUs when one is tied and so was not part of the update.

    Its parameter is the embedding and new by now, but on CPUs vLLM multiplies with a packed copy, which layerwise
    reloading leaves as it was unless the layer itself is loaded.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)
