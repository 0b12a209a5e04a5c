"""Every row format to one canonical pair, and every refusal by its reason."""

from __future__ import annotations

import pytest

from raylign.data.schema import content_key, parse_row
from raylign.errors import RowError
from raylign.types import Message

QUESTION = Message(role="user", content="Hi?")
GOOD = {"prompt": "Hi?", "chosen": "Hello", "rejected": "Go away"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


ONE_PAIR_SIX_WAYS = {
    "strings": GOOD,
    "messages": {"prompt": [user("Hi?")], "chosen": [assistant("Hello")], "rejected": [assistant("Go away")]},
    "implicit prompt": {
        "chosen": [user("Hi?"), assistant("Hello")],
        "rejected": [user("Hi?"), assistant("Go away")],
    },
    "prompt repeated in the answers": {
        "prompt": "Hi?",
        "chosen": [user("Hi?"), assistant("Hello")],
        "rejected": [user("Hi?"), assistant("Go away")],
    },
    "transcripts": {"chosen": transcript("Hi?", "Hello"), "rejected": transcript("Hi?", "Go away")},
    "transcript prompt": {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": "Hello", "rejected": "Go away"},
}


@pytest.mark.parametrize("row", ONE_PAIR_SIX_WAYS.values(), ids=ONE_PAIR_SIX_WAYS)
def test_formats_agree(row):
    pair = parse_row(row)
    assert pair.prompt == (QUESTION,)
    assert (pair.chosen, pair.rejected) == ("Hello", "Go away")
    assert (pair.source, pair.split, pair.chosen_safe) == ("", None, None)
    assert pair.row_id == parse_row(GOOD).row_id


def test_transcript_keeps_the_common_turns():
    pair = parse_row(
        {"chosen": transcript("a", "b", "c", "good  \n"), "rejected": transcript("a", "b", "c", "bad")}, format="hh"
    )
    assert [(m.role, m.content) for m in pair.prompt] == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert (pair.chosen, pair.rejected) == ("good", "bad")


@pytest.mark.parametrize(
    ("prefer", "chosen", "safe"), [("safer", "No.", (True, False)), ("better", "Sure:", (False, True))]
)
def test_pku_label_is_chosen_by_prefer(prefer, chosen, safe):
    row = {
        "prompt": "How?",
        "response_0": "Sure:",
        "response_1": "No.",
        "is_response_0_safe": False,
        "is_response_1_safe": True,
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    pair = parse_row(row, prefer=prefer)
    assert pair.chosen == chosen
    assert (pair.chosen_safe, pair.rejected_safe) == safe


def test_optional_columns_are_kept():
    row = GOOD | {"id": 7, "source": "here", "split": "validation", "chosen_safe": True, "rejected_safe": False}
    pair = parse_row(row)
    assert (pair.row_id, pair.source, pair.split) == ("7", "here", "valid")
    assert (pair.chosen_safe, pair.rejected_safe) == (True, False)
    assert parse_row(row | {"row_id": "mine"}).row_id == "mine"


def test_null_columns_are_missing_columns():
    """Arrow fills the columns that a row of another format lacks."""
    row = GOOD | dict.fromkeys(
        ["id", "source", "split", "chosen_safe", "response_0", "response_1", "safer_response_id"]
    )
    assert parse_row(row) == parse_row(GOOD)


def test_content_key_tells_turns_and_answers_apart():
    keys = {
        content_key((QUESTION,), "a", "b"),
        content_key((QUESTION,), "b", "a"),
        content_key((QUESTION,), "ab", ""),
        content_key((Message(role="system", content="Hi?"),), "a", "b"),
    }
    assert len(keys) == 4


REFUSED = [
    ("missing_field", {"prompt": "Hi?", "chosen": "Hello"}),
    ("missing_field", {"chosen": "Hello", "rejected": "Go away"}),
    ("missing_field", GOOD | {"rejected": None}),
    ("missing_field", {"prompt": "Hi?", "response_0": "a", "response_1": "b"}),
    ("wrong_type", []),
    ("wrong_type", GOOD | {"chosen": 3}),
    ("wrong_type", GOOD | {"prompt": {"role": "user", "content": "Hi?"}}),
    ("wrong_type", GOOD | {"prompt": [{"role": "user"}]}),
    ("wrong_type", GOOD | {"prompt": [{"role": 1, "content": "Hi?"}]}),
    ("wrong_type", GOOD | {"chosen": [{"role": "assistant", "content": ["parts"]}]}),
    ("wrong_type", GOOD | {"chosen_safe": "yes"}),
    ("wrong_type", GOOD | {"source": 1}),
    ("wrong_type", GOOD | {"id": 1.5}),
    ("wrong_type", {"prompt": "Hi?", "response_0": "a", "response_1": "b", "safer_response_id": 2}),
    ("wrong_type", {"prompt": "Hi?", "response_0": "a", "response_1": "b", "safer_response_id": True}),
    ("unknown_split", GOOD | {"split": "holdout"}),
    ("not_utf8", GOOD | {"chosen": "half \ud83d"}),
    ("not_utf8", GOOD | {"id": "\ud83d"}),
    ("empty_text", GOOD | {"prompt": " \n"}),
    ("empty_text", GOOD | {"chosen": ""}),
    ("empty_text", GOOD | {"prompt": []}),
    ("empty_text", {"chosen": transcript("a", ""), "rejected": transcript("a", "b")}),
    ("chosen_equals_rejected", GOOD | {"rejected": "Hello"}),
    ("chosen_equals_rejected", {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}),
    ("prompt_mismatch", {"chosen": transcript("a", "b"), "rejected": transcript("c", "d")}),
    ("prompt_mismatch", {"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "e")}),
    ("prompt_mismatch", {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}),
    ("bad_role_order", {"chosen": transcript("a", "b", "c"), "rejected": transcript("a", "b", "d")}),
    ("bad_role_order", GOOD | {"prompt": [user("a"), assistant("b")]}),
    ("bad_role_order", GOOD | {"prompt": [user("a"), user("b")]}),
    ("bad_role_order", GOOD | {"prompt": [user("a"), {"role": "system", "content": "b"}, user("c")]}),
    ("bad_role_order", GOOD | {"prompt": [{"role": "tool", "content": "b"}]}),
    ("bad_role_order", GOOD | {"chosen": [user("Hello")]}),
    ("multi_message_answer", GOOD | {"chosen": [assistant("a"), user("b"), assistant("c")]}),
    ("multi_message_answer", {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                              "rejected": [user("a"), assistant("e"), user("c"), assistant("d")]}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), REFUSED)
def test_refused(reason, row):
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert caught.value.reason == reason
    assert caught.value.detail


def test_explicit_hh_refuses_other_text():
    with pytest.raises(RowError, match="bad_role_order"):
        parse_row(GOOD, format="hh")
