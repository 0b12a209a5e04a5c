"""Evaluation prompts: every bad file is a named error, every choice is balanced and reproducible."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter

import pytest

from raylign.errors import DataError, DataNotFoundError
from raylign.evaluation.prompts import EvaluationPrompt, load_prompts, select_prompts


def make(num: int, *, harmful: bool, source: str = "s", category: str = "c") -> list[EvaluationPrompt]:
    kind = "harmful" if harmful else "benign"
    return [
        EvaluationPrompt(text=f"{source} {category} {kind} {i}", category=category, source=source, harmful=harmful)
        for i in range(num)
    ]


def test_embedded_prompts_have_both_kinds():
    prompts = load_prompts("embedded")
    num_harmful = sum(prompt.harmful for prompt in prompts)
    assert num_harmful >= 80
    assert len(prompts) - num_harmful >= 80
    assert prompts[0].messages[0].role == "user"


def test_half_of_the_choice_is_benign_and_it_ignores_the_order_of_the_file():
    prompts = load_prompts("embedded")
    chosen = select_prompts(prompts, num=161, seed=3)
    assert Counter(prompt.harmful for prompt in chosen) == {True: 81, False: 80}
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert select_prompts(shuffled, num=161, seed=3) == chosen
    assert select_prompts(prompts, num=161, seed=4) != chosen


def test_every_prefix_is_stratified():
    """Strata of 60, 30 and 10: among 20 chosen are 12, 6 and 2 of them."""
    prompts = make(60, harmful=True, source="a") + make(30, harmful=True, source="b")
    prompts += make(10, harmful=True, source="b", category="rare") + make(40, harmful=False)
    chosen = select_prompts(prompts, num=40, seed=0)
    assert Counter((p.source, p.category) for p in chosen if p.harmful) == {
        ("a", "c"): 12,
        ("b", "c"): 6,
        ("b", "rare"): 2,
    }


def test_a_short_kind_is_not_topped_up_from_the_other():
    chosen = select_prompts(make(50, harmful=True) + make(3, harmful=False), num=20, seed=0)
    assert Counter(prompt.harmful for prompt in chosen) == {True: 10, False: 3}


def test_gzip_and_missing_columns(tmp_path):
    file = tmp_path / "p.jsonl.gz"
    rows = [{"prompt": "a", "harmful": True}, {"prompt": "b", "harmful": False, "category": None, "extra": 1}]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert [(p.text, p.category, p.source) for p in load_prompts(file)] == [("a", "", ""), ("b", "", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "harmful": true}\n{"prompt"', r"p\.jsonl:2 is not valid JSON"),
        ("[1]", r"p\.jsonl:1 must be an object"),
        ('{"prompt": " ", "harmful": true}', r"p\.jsonl:1: prompt must be a non-empty string"),
        ('{"prompt": "a", "harmful": "yes"}', r"harmful must be true or false, found 'yes'"),
        ('{"prompt": "a", "harmful": true, "category": 3}', "category must be a string"),
        ('{"prompt": "a", "harmful": true}\n\n{"prompt": "a", "harmful": false}', "repeats the prompt of line 1"),
        ('{"prompt": "a", "harmful": true}', "1 harmful and 0 benign"),
        ("", "0 harmful and 0 benign"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        load_prompts(file)


def test_no_text_and_no_file(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"evaluate\.prompts"):
        load_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_prompts(tmp_path / "binary.jsonl")
