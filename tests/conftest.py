"""Fixtures shared by all tests: one small Ray for the session, and tokenizers made in code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of this session's own with two CPUs; `address="local"` keeps it apart from any other on the machine.

    Ray Train looks at its workers five times a second, also in drivers that a test starts.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Build a tokenizer of bytes, so that an ASCII text has as many tokens as characters.

    Arguments: `template` (None for none), `adds_bos` (the tokenizer itself prepends the begin token), `merges` (pairs
    of byte-level symbols that become one token), `specials` (further special tokens).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def build(
        template: str | None = PLAIN_TEMPLATE,
        *,
        adds_bos: bool = False,
        merges: tuple[tuple[str, str], ...] = (),
        specials: tuple[str, ...] = ("<|system|>", "<|user|>", "<|assistant|>"),
    ) -> Any:
        symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
        vocab = {symbol: index for index, symbol in enumerate(["<pad>", "<bos>", "<eos>", *symbols])}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(
            [AddedToken(token, special=True) for token in ("<pad>", "<bos>", "<eos>", *specials)]
        )
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return build
