"""Sequence classifiers: the policy with a new one-output head, LoRA members on top of it, and classifiers of others.

A decoder's reward is read where its sequence ends. Transformers finds that place by looking for the last token that is
not the pad token, which goes wrong as soon as rows are padded with another token, or end with the pad token. Here the
place is found before padding, and only the states at these places meet the head, in float32.

Shape letters: n sequences, B pairs, M members, C outputs, S row length, D hidden width.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from raylign.data.tokenization import end_of_response_id
from raylign.errors import ModelError
from raylign.models.loading import load_config, without_renaming_warnings
from raylign.types import PackedBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD = "score"  # of transformers' decoders with a classification head, and peft's name for what it trains whole
_LOAD_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError)


class ClassifierForward(nn.Module):
    """A sequence classifier as a function from token ids to float32 outputs.

    Args:
        model: transformers sequence classifier, or a peft model with one adapter per member around one.
        autocast_dtype: runs the backbone in mixed precision, None in the dtype of the weights. The head is float32.

    Raises:
        ModelError: a classifier that does not read its linear head at the last token.
    """

    def __init__(self, model: nn.Module, *, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.is_decoder: bool = isinstance(getattr(self.classifier, HEAD, None), nn.Module)
        if self.is_decoder:
            getattr(self.classifier, HEAD).float()
            self._check()

    @property
    def classifier(self) -> Any:
        """The transformers model below peft."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def activate(self, member: str) -> None:
        """Let this adapter and its head answer from now on; in training mode, they alone require gradients."""
        model: Any = self.model
        model.set_adapter(member, inference_mode=not model.training)

    def forward(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Outputs of n sequences, padded on the right.

        Args:
            sequences: token ids, each at least one.

        Returns:
            Shape (n, C), float32, on the device of the model.
        """
        config = self.classifier.config.get_text_config()
        width = max(map(len, sequences))
        filler = config.pad_token_id or 0
        ids_nS = torch.tensor([[*ids, *[filler] * (width - len(ids))] for ids in sequences], device=self.device)
        mask_nS = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=self.device)
        with self._autocast():
            if not self.is_decoder:
                logits: torch.Tensor = self.model(input_ids=ids_nS, attention_mask=mask_nS).logits
                return logits.float()
            output = self.classifier.base_model(input_ids=ids_nS, attention_mask=mask_nS, use_cache=False)
        rows = torch.arange(len(sequences), device=self.device)
        last = torch.tensor([end_position(ids, config.pad_token_id) for ids in sequences], device=self.device)
        return self._head(output.last_hidden_state[rows, last])

    def forward_pairs(self, batch: PackedBatch) -> torch.Tensor:
        """Outputs of a decoder at the end of both responses of B pairs, from one forward of any layout.

        Args:
            batch: on the device of the model; see `resolve_layout` for layouts that the model can do.

        Returns:
            Shape (2, B, C), float32, chosen first, with gradient.
        """
        mask = batch.attention_mask
        with self._autocast():
            if mask.dtype == torch.bool:  # additive, once for all layers
                dtype = self.autocast_dtype or self.classifier.get_input_embeddings().weight.dtype
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            output = self.classifier.base_model(
                input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
            )
        states = output.last_hidden_state.flatten(0, 1).index_select(0, batch.end_positions)
        return self._head(states).reshape(2, batch.num_pairs, -1)

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        # outside of autocast: bfloat16 outputs would have three digits, too few to tell good answers apart
        outputs: torch.Tensor = getattr(self.classifier, HEAD)(states.float())
        return outputs

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    @torch.no_grad()
    def _check(self) -> None:
        """Compare with the model's own forward on one short sequence."""
        was_training = self.model.training
        self.model.eval()
        try:
            pad = self.classifier.config.get_text_config().pad_token_id
            ids = [token for token in range(1, 8) if token != pad]
            ours = self([ids])
            with self._autocast():
                theirs = self.classifier(input_ids=torch.tensor([ids], device=self.device)).logits.float()
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:
            raise ModelError(f"{type(self.classifier).__name__} is no decoder with a linear head: {error}") from error
        finally:
            self.model.train(was_training)
        allowed = 1e-3 if self.autocast_dtype is None else 3e-2
        if not torch.allclose(ours, theirs, atol=allowed, rtol=allowed):
            raise ModelError(
                f"{type(self.classifier).__name__} does not read its head at the last token: its own forward gives "
                f"{theirs[0].tolist()}, the head at the last token {ours[0].tolist()}"
            )


def end_position(ids: Sequence[int], pad_token_id: int | None) -> int:
    """Where a decoder reads a sequence before padding: at its last token that is not the pad token, if there is one.

    Transformers' own rule. A classifier whose pad token also ends responses was trained to read the token before that.
    """
    for position in range(len(ids) - 1, -1, -1):
        if pad_token_id is None or int(ids[position]) != pad_token_id:
            return position
    return 0


def load_classifier(
    path: str | Path,
    *,
    pad_token_id: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """The weights of a causal language model under a new head with one output, on the CPU, in evaluation mode.

    Args:
        path: directory of the policy.
        pad_token_id: no sequence may end with it, see `neutral_pad_id`.
        seed: of the head, N(0, initializer_range); the global generator is left as it was.
        dtype: type of the weights; the head is float32.
        trust_remote_code: run code shipped inside the model directory.
        gradient_checkpointing: recompute activations in the backward pass, in training mode.

    Raises:
        ModelError: no causal language model, no classifier of its architecture, or weights that lack more than the
            head.
    """
    directory = Path(path)
    load_config(directory, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]), _expecting_a_new_head():
        model, report = _from_pretrained(
            directory,
            key="policy.model",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            num_labels=1,
            pad_token_id=pad_token_id,
        )
    if set(report["missing_keys"]) != {f"{HEAD}.weight"}:
        raise ModelError(f"{directory}: expected weights that lack {HEAD}.weight, they lack {report['missing_keys']}")
    if gradient_checkpointing:
        with without_renaming_warnings():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _draw_head(model.score.float(), model.config, seed)
    return model


def load_external(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    key: str = "reward_model.model",
) -> PreTrainedModel:
    """Somebody's sequence classifier, whole, on the CPU, in evaluation mode.

    Args:
        path: directory with `config.json` and safetensors weights.
        dtype: type of the weights.
        trust_remote_code: run code shipped inside the model directory.
        key: configuration key that names it.

    Raises:
        ModelError: not loadable, or weights without a head, which would be drawn at random.
    """
    model, report = _from_pretrained(Path(path), key=key, dtype=dtype, trust_remote_code=trust_remote_code)
    if report["missing_keys"]:
        raise ModelError(f"{path} is no trained sequence classifier, its weights lack {sorted(report['missing_keys'])}")
    return model


def reward_column(config: PretrainedConfig, label: str | None, *, where: str) -> int:
    """Which output of a classifier is the reward.

    Args:
        config: of the classifier.
        label: `reward_model.label`; may be left out for a classifier with one output.
        where: the classifier, for the message.

    Raises:
        ModelError: several outputs and no label, or an unknown label; the labels are listed.
    """
    labels = {str(name): int(column) for column, name in config.id2label.items()}
    if label is None and len(labels) == 1:
        return 0
    if label not in labels:
        found = "reward_model.label is not set" if label is None else f"reward_model.label={label} is none of them"
        raise ModelError(f"reward model {where} has the outputs {list(labels)} and {found}; name the one to use")
    return labels[label]


def neutral_pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A pad token that ends no response: the tokenizer's own, else another special one, else any other.

    Plain transformers reads a padded row at the last token that is not the pad token; where the pad token is the
    end token, as it is for tokenizers without one, that would be the token before the end.
    """
    end_id = end_of_response_id(tokenizer)
    candidates = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, 0, 1]
    return int(next(token for token in candidates if token is not None and token != end_id))


def add_members(
    model: PreTrainedModel,
    names: Sequence[str],
    *,
    rank: int,
    alpha: int,
    seeds: Sequence[int],
    head_seeds: Sequence[int],
) -> PeftModel:
    """Fresh LoRA members around one frozen classifier: an adapter on all linear layers and a head for each.

    Args:
        model: of `load_classifier`.
        names: of the M members.
        rank: of each adapter.
        alpha: the scale of an adapter is alpha / rank.
        seeds: of each member's adapter.
        head_seeds: of each member's head; equal ones where the members shall be averaged.

    Returns:
        The peft model; B matrices are zero, so that every member starts as the classifier with its head.
    """
    wrapped = add_adapters(model, names, rank=rank, alpha=alpha, seeds=seeds, task_type="SEQ_CLS")
    for name, head_seed in zip(names, head_seeds, strict=True):
        _draw_head(model.score.modules_to_save[name], model.config, head_seed)
    return wrapped


def add_adapters(
    model: PreTrainedModel,
    names: Sequence[str],
    *,
    rank: int,
    alpha: int,
    seeds: Sequence[int],
    task_type: Literal["SEQ_CLS", "CAUSAL_LM"],
) -> PeftModel:
    """Fresh LoRA adapters on all linear layers of one frozen model but its head.

    Args:
        model: classifier or causal language model.
        names: of the M adapters.
        rank: of each.
        alpha: the scale of an adapter is alpha / rank.
        seeds: of each.
        task_type: peft's name of what the model is; with SEQ_CLS each adapter has a copy of the head.

    Returns:
        The peft model in evaluation mode; B matrices are zero.
    """
    from peft import LoraConfig, get_peft_model

    wrapped: Any = None
    for name, seed in zip(names, seeds, strict=True):
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="all-linear",
            task_type=task_type,
        )
        with torch.random.fork_rng(devices=[]), without_renaming_warnings():
            torch.manual_seed(seed)  # peft draws from the global generator
            if wrapped is None:
                wrapped = get_peft_model(model, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
    return wrapped.eval()


def save_member(
    wrapped: PeftModel, name: str, directory: Path, *, more: Callable[[Path], object] | None = None
) -> None:
    """Write one adapter to `directory / name`, whole or not at all.

    Peft also writes a card beside the adapter, which members that finish together would contend for.

    Args:
        wrapped: peft model.
        name: of the adapter.
        directory: of the members; an adapter of that name is replaced.
        more: writes what belongs to the member besides into the directory that it is given.
    """
    staging = directory / f".{name}"
    wrapped.save_pretrained(str(staging), selected_adapters=[name])
    if more is not None:
        more(staging / name)
    shutil.rmtree(directory / name, ignore_errors=True)
    (staging / name).rename(directory / name)
    shutil.rmtree(staging)


def load_members(model: PreTrainedModel, directories: Sequence[Path]) -> PeftModel:
    """Members that `PeftModel.save_pretrained` wrote, each under the name of its directory, frozen.

    Raises:
        ModelError: an adapter is missing or belongs to another model.
    """
    from peft import PeftModel

    wrapped: Any = None
    for directory in directories:
        if not (directory / "adapter_model.safetensors").is_file():
            raise ModelError(f"{directory} holds no adapter_model.safetensors; fit the reward model again")
        try:
            with without_renaming_warnings():
                if wrapped is None:
                    wrapped = PeftModel.from_pretrained(model, directory, adapter_name=directory.name)
                else:
                    wrapped.load_adapter(directory, directory.name)
        except _LOAD_ERRORS as error:
            raise ModelError(f"cannot load the member in {directory}: {error}") from error
    return wrapped.eval()


def _from_pretrained(directory: Path, *, key: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} has no *.safetensors weights (config key {key}); other formats are not read")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory, use_safetensors=True, output_loading_info=True, **options
        )
    except _LOAD_ERRORS as error:
        raise ModelError(f"cannot load {directory} as a sequence classifier (config key {key}): {error}") from error
    return model, report


def _draw_head(head: nn.Linear, config: PretrainedConfig, seed: int) -> None:
    std = getattr(config.get_text_config(), "initializer_range", 0.02)
    with torch.no_grad():
        head.weight.normal_(0, std, generator=torch.Generator(head.weight.device).manual_seed(seed))


@contextmanager
def _expecting_a_new_head() -> Iterator[None]:
    """Transformers reports at length that the head is new, which is what was asked for; the caller checks the rest."""

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)
