"""Tokenizer training and the token rows of the embedded models' stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launch.asset_corpus import Messages
from raylign.errors import DataError, ModelError
from raylign.types import IGNORE_INDEX

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + (eos_token if m['role']=='assistant' else '') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(documents: Iterable[Messages | str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE with the role tokens and the chat template.

    Args:
        documents: training documents.
        vocab_size: entries including the special tokens; byte level needs at least 256 more than those.

    Returns:
        Tokenizer ready for `save_pretrained`.
    """
    specials = [PAD, BOS, EOS, *ROLE_TOKENS]
    if vocab_size < 256 + len(specials):
        raise DataError(f"vocab_size={vocab_size} must be >= {256 + len(specials)} for byte-level BPE")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for document in documents for text in _contents(document))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a model directory.

    Raises:
        ModelError: it lacks a chat template or the special tokens this recipe builds on.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory; expected a Hugging Face model directory with a tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    missing = [token for token in (PAD, BOS, EOS, *ROLE_TOKENS[1:]) if token not in tokenizer.get_vocab()]
    if missing or tokenizer.chat_template is None:
        found = f"tokens {missing} are missing" if missing else "there is no chat template"
        raise ModelError(f"{directory}: {found}; build one without --init, or start from a model this recipe made")
    return tokenizer


def document_rows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Messages | str]) -> list[list[int]]:
    """Token ids per document: chats through the chat template, plain text between the text tokens.

    Args:
        tokenizer: tokenizer with the chat template.
        documents: chats or plain texts.

    Returns:
        One list of ids per document.
    """
    texts = [BOS + d + EOS if isinstance(d, str) else render_chat(d) for d in documents]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def render_chat(messages: Messages) -> str:
    """Text of `CHAT_TEMPLATE` for these messages; the same string as the tokenizer renders, without jinja's cost.

    Raises:
        DataError: a message spells out a special token, which would forge a turn.
    """
    for message in messages:
        if any(token in message["content"] for token in (PAD, BOS, EOS, *ROLE_TOKENS)):
            raise DataError(f"a message contains a special token of the chat template: {message['content'][:80]!r}")
    turns = [f"<|{m['role']}|>{m['content']}{EOS if m['role'] == 'assistant' else ''}" for m in messages]
    return BOS + "".join(turns)


def assistant_rows(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], *, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels that score only what the assistant says, its closing token included.

    Args:
        tokenizer: tokenizer with the chat template.
        chats: conversations; those longer than `max_length` tokens are left out.
        max_length: longest row kept.

    Returns:
        (ids, labels) per kept chat, labels IGNORE_INDEX outside the answers.
    """
    roles = {tokenizer.convert_tokens_to_ids(token) for token in ROLE_TOKENS}
    assistant, eos = tokenizer.convert_tokens_to_ids([ROLE_TOKENS[2], EOS])
    rows = []
    for ids in document_rows(tokenizer, chats):
        if len(ids) > max_length:
            continue
        labels, is_answer = [], False
        for token in ids:
            labels.append(token if is_answer and token not in roles else IGNORE_INDEX)
            is_answer = token == assistant or (is_answer and token not in roles and token != eos)
        rows.append((ids, labels))
    return rows


def _contents(document: Messages | str) -> list[str]:
    return [document] if isinstance(document, str) else [message["content"] for message in document]
