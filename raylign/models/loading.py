"""Models and tokenizers from directories: found, checked, loaded, and told apart by their bytes."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raylign.assets import model_directory
from raylign.errors import ModelError
from raylign.types import Layout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_ADAPTER_CONFIG = "adapter_config.json"
_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.py"]
_TOKENIZER_FILES = (
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model"),
)

# Decoders seen (tests/models/test_forward.py) to honour a 4-D mask and restarting positions.
_FULL_ATTENTION_DECODERS = frozenset(
    {"gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
_MASKED_ATTENTION = frozenset({"sdpa", "eager"})


def resolve_model(name: str, *, key: str = "policy.model") -> str:
    """Directory that holds a model: the embedded one, a local one, or a hub repository downloaded to the local cache.

    Args:
        name: "embedded" (the chat model that ships), a directory, or a hub id.
        key: config key that the name comes from, for the message.

    Raises:
        ModelError: neither a directory nor a repository that can be downloaded.
    """
    directory, path = model_directory(name), Path(name).expanduser()
    if directory is not None:
        return str(directory)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ModelError(f"model directory {name} does not exist (config key {key})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {name!r} is no directory here and no hub repository within reach (config key {key}): {error}"
        ) from error


def resolve_dtype(dtype: Literal["auto", "float32", "bfloat16"], device: torch.device | str = "cuda") -> torch.dtype:
    """Compute type: "auto" is bfloat16 on GPUs that have it and float32 elsewhere.

    Args:
        dtype: `policy.dtype`.
        device: where the forward runs, which a visible GPU does not tell.
    """
    if dtype == "auto":
        is_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
        return torch.bfloat16 if is_gpu and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def load_policy(
    path: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    adapter: Literal["full", "lora"] = "full",
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    seed: int = 0,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
    attention: str = "auto",
) -> PreTrainedModel | PeftModel:
    """Load a causal language model on the CPU, in evaluation mode, optionally with a fresh LoRA adapter.

    A directory with an adapter (`adapter_config.json`) loads its base model and that adapter, trainable.

    Args:
        path: directory with `config.json` and safetensors weights, or a peft adapter; see `resolve_model` for names.
        dtype: type of the weights; for mixed precision load float32 and give `PolicyForward` an autocast type.
        adapter: "lora" freezes the weights and adds an adapter to all linear layers but the head.
        lora_rank: rank of the adapter.
        lora_alpha: scale of the adapter is lora_alpha / lora_rank.
        lora_dropout: dropout inside the adapter.
        seed: seed of the adapter's weights; the global generator is left as it was.
        trust_remote_code: run code shipped inside the model directory.
        gradient_checkpointing: recompute activations in the backward pass, in training mode.
        attention: transformers' attention implementation; "auto" is "sdpa", and "eager" for models that bend their
            attention scores (Gemma 2), which "sdpa" cannot.

    Raises:
        ModelError: no usable config or weights, no causal language model, or weights with missing tensors.
    """
    directory = Path(path)
    if (directory / _ADAPTER_CONFIG).is_file():
        return _load_adapter(
            directory,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            gradient_checkpointing=gradient_checkpointing,
            attention=attention,
        )
    config = load_config(directory, trust_remote_code=trust_remote_code)
    if attention == "auto":
        attention = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} has no *.safetensors weights; convert the model, other formats are not read")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=resolve_dtype(dtype),
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise ModelError(f"cannot load {directory} as a causal language model: {error}") from error
        if report["missing_keys"]:
            raise ModelError(f"{directory}: the weights lack {_some(report['missing_keys'])}")
        if gradient_checkpointing:
            with without_renaming_warnings():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapter == "full":
            return model
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(directory),
        )
        with without_renaming_warnings():
            return get_peft_model(model, lora).eval()


def adapter_base(directory: str | Path) -> str:
    """Directory of the model that an adapter belongs to.

    Raises:
        ModelError: no adapter, or one that does not name its base, or a base that is out of reach.
    """
    file = Path(directory) / _ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(f"{directory} holds no adapter: {_ADAPTER_CONFIG} is missing")
    base = _read_json(file).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{file} does not name its base model (base_model_name_or_path)")
    return resolve_model(base)


def _load_adapter(directory: Path, **base_options: Any) -> PeftModel:
    from peft import PeftModel

    base = adapter_base(directory)
    model = load_policy(base, **base_options)
    try:
        with without_renaming_warnings():
            return PeftModel.from_pretrained(model, directory, is_trainable=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load the adapter in {directory} onto {base}: {error}") from error


@contextmanager
def without_renaming_warnings() -> Iterator[None]:
    """Transformers 5.23 renamed "gradient" to "activation" checkpointing; 5.20 and peft know the old names only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a chat template and an end token; without a pad token it pads with the end token.

    Raises:
        ModelError: no tokenizer, no chat template, or no end token.
    """
    directory = Path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelError(f"{directory} holds no tokenizer that transformers can load: {error}") from error
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {directory} has no chat template; add chat_template.jinja or use a chat model"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {directory} names no eos_token, which ends every answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the model configuration of a directory that must hold a causal language model.

    Raises:
        ModelError: no directory, no config, or another kind of model.
    """
    directory = Path(path)
    if not (directory / "config.json").is_file():
        if (directory / _ADAPTER_CONFIG).is_file():
            raise ModelError(f"{directory} holds an adapter; merge it first: raylign merge {directory} NEW_DIRECTORY")
        reason = "has no config.json" if directory.is_dir() else "does not exist"
        raise ModelError(f"model directory {directory} {reason}")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"cannot read {directory / 'config.json'}: {error}") from error
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise ModelError(f"{directory} holds {', '.join(kinds)}, expected a causal language model")
    return config


def context_length(config: PretrainedConfig) -> int | None:
    """Positions that a model has, None when its positions are not numbered."""
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context


def check_context(config: PretrainedConfig, max_length: int) -> None:
    """Whether sequences of `max_length` tokens fit into a model; beyond its positions a forward fails or is noise.

    Args:
        config: of the model, see `load_config`.
        max_length: tokens of the longest prompt with one response, or the limit `data.max_length`.

    Raises:
        ModelError: naming both numbers and their config keys.
    """
    context = context_length(config)
    if context is not None and max_length > context:
        raise ModelError(
            f"sequences of {max_length} tokens (config key data.max_length) exceed the {context} positions of the "
            f"model (config key policy.model; max_position_embeddings={context} in its config.json): set "
            f"data.max_length to at most {context}, or choose a model with a longer context"
        )


def supports_shared_prompt(config: PretrainedConfig) -> bool:
    """Whether a decoder honours a 4-D attention mask with restarting positions, which shared and packed rows need.

    True for decoders with full attention that were tested; sliding-window, linear and recurrent layers look at their
    neighbours whatever the mask says.
    """
    if config.model_type not in _FULL_ATTENTION_DECODERS:
        return False
    if (getattr(config, "_attn_implementation", None) or "sdpa") not in _MASKED_ATTENTION:
        return False
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return set(layer_types) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)


def resolve_layout(layout: Literal["auto", "shared", "packed", "padded"], config: PretrainedConfig) -> Layout:
    """Layout to use: "auto" shares the prompt where the architecture allows it and pads elsewhere.

    Raises:
        ModelError: "shared" or "packed" is asked for and the architecture cannot do it.
    """
    if supports_shared_prompt(config):
        return "shared" if layout == "auto" else layout
    if layout in ("shared", "packed"):
        raise ModelError(
            f"train.layout={layout} needs full attention under an explicit mask, which model type "
            f"{config.model_type!r} as configured is not known to honour; use train.layout=auto or padded"
        )
    return "padded"


def model_fingerprint(path: str | Path) -> str:
    """Hash over the config and the bytes of the safetensors files (and of an adapter and its base's name).

    Raises:
        ModelError: no weights in the directory.
    """
    directory = Path(path)
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{directory} has no *.safetensors weights to fingerprint")
    configs = [directory / name for name in ("config.json", _ADAPTER_CONFIG)]
    return _digest([file for file in configs if file.is_file()] + weights)


def artefact_fingerprint(path: str | Path) -> str:
    """Hash over the weights below a directory of the reward or cost phase and over the facts beside them.

    Members of a reward of texts lie in directories of their own; an external model leaves its facts alone, which hold
    what it said of the pairs.
    """
    directory = Path(path)
    facts = [directory / name for name in ("reward.json", "cost.json")]
    return _digest([file for file in facts if file.is_file()] + sorted(directory.rglob("*.safetensors")))


def tokenizer_fingerprint(path: str | Path) -> str:
    """Hash over the tokenizer's files, chat template included."""
    directory = Path(path)
    return _digest(sorted({file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern)}))


def file_fingerprint(path: Path) -> str:
    """Hash over the name and the bytes of one file."""
    return _digest([path])


def _digest(files: Iterable[Path]) -> str:
    """Hash over names, sizes and bytes; files that have not changed are read once per process."""
    stats = [(file, file.stat()) for file in files]
    return _digest_of(tuple((file.absolute(), stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@functools.lru_cache(maxsize=256)
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file, size, _ in files:
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _some(names: Iterable[str], limit: int = 5) -> str:
    listed = sorted(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
