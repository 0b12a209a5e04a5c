"""Sample answers with transformers, reproducibly: an answer depends on its prompt and the seed, not on its batch.

Sampling is the Gumbel-max trick with one random stream per answer: the token that maximises logit / temperature +
Gumbel noise is a sample of softmax(logit / temperature). Since the noise belongs to (seed, prompt, sample number), the
order and the size of the batches do not matter, and two policies that are compared answer under the same noise, which
makes the paired difference sharper. What is left is rounding: another batch shape can turn a near tie.

Shape letters: B answers of one batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from raylign.data.tokenization import end_of_response_id, render
from raylign.errors import ModelError
from raylign.models.loading import context_length
from raylign.types import Message

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedResponse:
    """One sampled answer.

    Attributes:
        prompt_index: position of the prompt in the caller's list.
        sample_index: number of the sample of that prompt, from 0.
        text: decoded answer without special tokens, surrounding white space removed.
        prompt_ids: templated prompt, ends with the generation prompt.
        response_ids: generated tokens up to and including the end-of-response token, if it came.
        reached_end: False when the length limit cut the answer.
    """

    prompt_index: int
    sample_index: int
    text: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reached_end: bool


class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Turns greedy decoding into sampling with one random stream per row.

    Args:
        seeds: one seed per row.
        temperature: divides the logits, > 0.
        device: where the logits are.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, device: torch.device) -> None:
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Noisy logits (B, V), whose arg max is a sample."""
        exponential_BV = torch.empty_like(scores, dtype=torch.float32)
        for row, stream in zip(exponential_BV, self._streams, strict=True):
            row.exponential_(generator=stream)
        # -log of a standard exponential is a standard Gumbel variable
        noisy_BV: torch.Tensor = scores.float() / self._temperature - exponential_BV.log()
        return noisy_BV


@torch.no_grad()
def generate_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
    num_samples: int = 1,
) -> list[GeneratedResponse]:
    """Answer every prompt `num_samples` times.

    Args:
        model: causal language model (or a peft model around one) on its device; its mode is left as found.
        tokenizer: of the model, see `load_tokenizer`.
        prompts: conversations that end with a user turn.
        max_new_tokens: length limit of an answer.
        temperature: 0 is greedy, and then all samples of a prompt are equal.
        batch_size: answers generated together.
        seed: of all random streams; torch's global generator is neither read nor moved.
        num_samples: answers per prompt.

    Returns:
        len(prompts) * num_samples answers, the samples of a prompt in a row, prompts in the caller's order.

    Raises:
        ModelError: the longest prompt and an answer of `max_new_tokens` do not fit into the model's context.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    _check_context(model, longest=max(map(len, encoded), default=0), max_new_tokens=max_new_tokens)
    jobs = [(index, sample) for index in range(len(prompts)) for sample in range(num_samples)]
    jobs.sort(key=lambda job: len(encoded[job[0]]))
    was_training = model.training
    model.eval()
    answers: list[GeneratedResponse] = []
    try:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            seeds = [_stream_seed(seed, encoded[index], sample) for index, sample in batch]
            rows = [encoded[index] for index, _ in batch]
            generated = _generate(model, tokenizer, rows, seeds, max_new_tokens, temperature)
            for (index, sample), (ids, reached_end) in zip(batch, generated, strict=True):
                answers.append(
                    GeneratedResponse(
                        prompt_index=index,
                        sample_index=sample,
                        text=tokenizer.decode(ids, skip_special_tokens=True).strip(),
                        prompt_ids=tuple(encoded[index]),
                        response_ids=tuple(ids),
                        reached_end=reached_end,
                    )
                )
    finally:
        model.train(was_training)
    answers.sort(key=lambda answer: (answer.prompt_index, answer.sample_index))
    return answers


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Token ids of a conversation under the chat template, with the generation prompt at the end."""
    text = render(tokenizer, prompt, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _check_context(model: Any, *, longest: int, max_new_tokens: int) -> None:
    context = context_length(model.config)
    if context is not None and longest + max_new_tokens > context:
        raise ModelError(
            f"the longest prompt ({longest} tokens) and an answer of {max_new_tokens} exceed the model's context "
            f"of {context}; lower evaluate.max_new_tokens or leave that prompt out"
        )


def _stream_seed(seed: int, prompt_ids: Sequence[int], sample: int) -> int:
    content = f"{seed}:{sample}:{','.join(map(str, prompt_ids))}"
    # 63 bits, because torch seeds are signed
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") >> 1


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
) -> Iterator[tuple[list[int], bool]]:
    device = next(model.parameters()).device
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    input_ids_BL = torch.tensor(
        [[tokenizer.pad_token_id] * num + list(row) for num, row in zip(padding, rows, strict=True)]
    )
    mask_BL = torch.tensor([[0] * num + [1] * len(row) for num, row in zip(padding, rows, strict=True)])
    ends = end_token_ids(model, tokenizer)
    noise = [GumbelNoise(seeds, temperature=temperature, device=device)] if temperature > 0 else []
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    with _own_settings(model, settings):
        output_BL = model.generate(
            input_ids=input_ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(noise),
        )
    for ids in output_BL[:, width:].tolist():
        end = next((position for position, token in enumerate(ids) if token in ends), None)
        yield (ids, False) if end is None else (ids[: end + 1], True)


@contextmanager
def _own_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Hide the checkpoint's generation settings: transformers fills what is not set from them (repetition_penalty)."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    stored = causal_lm.generation_config
    causal_lm.generation_config = settings
    try:
        yield
    finally:
        causal_lm.generation_config = stored


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the template's end-of-response token and those that model and tokenizer name."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    return sorted({end_of_response_id(tokenizer), tokenizer.eos_token_id, *listed})
