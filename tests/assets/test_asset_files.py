"""What ships: loadable models, allowed licences, and evaluation prompts that no pair opens with."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launch.asset_corpus import first_human_turn, normalise_prompt, read_rows
from launch.asset_rows import REFUSALS
from raylign.assets import (
    EVAL_PROMPTS,
    PAIRS,
    REFUSAL_LABELS,
    TINY_CHAT,
    TINY_COST,
    TINY_JUDGE,
    AssetNotFoundError,
    asset_path,
)
from raylign.config import CostModelSection
from raylign.errors import ModelError, RaylignError
from raylign.evaluation.cost_quality import cost_quality
from raylign.evaluation.judges import sign_rows
from raylign.evaluation.refusal import load_refusal_labels
from raylign.models.loading import model_fingerprint
from raylign.runtime.cost_scorer import make_cost_scorer
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.fitted_cost import embedded_cost
from raylign.types import Message


def read_pairs() -> list[dict]:
    return list(read_rows(asset_path(PAIRS)))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(asset_path(TINY_CHAT))


@pytest.mark.parametrize("name", ["no_such_asset", "", ".", "../errors.py", "/etc/hostname"])
def test_asset_path_names_what_there_is_when_an_asset_is_missing(name):
    with pytest.raises(AssetNotFoundError, match=EVAL_PROMPTS) as caught:
        asset_path(name)
    assert isinstance(caught.value, RaylignError)
    assert isinstance(caught.value, FileNotFoundError)


def test_assets_stay_small():
    root = asset_path(PAIRS).parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) < 20e6


def test_only_hh_rlhf_pairs_ship():
    pairs = read_pairs()
    assert all(pair["source"].startswith("hh-") for pair in pairs)
    assert {frozenset(pair) for pair in pairs} == {frozenset({"id", "source", "prompt", "chosen", "rejected", "split"})}
    assert Counter(pair["split"] for pair in pairs) == {"train": 1479, "test": 500}
    assert "Anthropic" in asset_path("LICENSE.hh-rlhf").read_text(encoding="utf-8")


def test_pairs_are_split_by_first_human_turn():
    keys = {split: set() for split in ("train", "test")}
    for pair in read_pairs():
        keys[pair["split"]].add(normalise_prompt(first_human_turn(pair["prompt"])))
    assert not keys["train"] & keys["test"]


def test_no_eval_prompt_opens_a_pair():
    prompts = {normalise_prompt(row["prompt"]) for row in read_rows(asset_path(EVAL_PROMPTS))}
    assert not prompts & {normalise_prompt(first_human_turn(pair["prompt"])) for pair in read_pairs()}


def test_eval_prompts_come_from_licensed_sources_in_their_quotas():
    rows = list(read_rows(asset_path(EVAL_PROMPTS)))
    assert all(set(row) == {"prompt", "category", "source", "harmful"} for row in rows)
    assert Counter((row["source"], row["harmful"]) for row in rows) == {
        ("advbench", True): 40,
        ("harmbench", True): 40,
        ("strongreject", True): 40,
        ("jailbreakbench", True): 30,
        ("xstest", False): 188,
    }


def test_refusal_labels_keep_all_three_classes():
    labels = Counter(row["label"] for row in read_rows(asset_path(REFUSAL_LABELS)))
    assert set(labels) == {"1_full_compliance", "2_full_refusal", "3_partial_refusal"}


def test_notice_names_every_file():
    root = asset_path(PAIRS).parent
    notice = (root / "NOTICE.md").read_text(encoding="utf-8")
    for entry in root.iterdir():
        if entry.name not in ("NOTICE.md", "__init__.py", "__pycache__"):
            assert f"`{entry.name}" in notice


@pytest.mark.parametrize("name", [TINY_CHAT, TINY_COST, TINY_JUDGE])
def test_model_cards_state_the_licence(name):
    card = (asset_path(name) / "README.md").read_text(encoding="utf-8")
    assert "non-commercial research use only" in card
    assert "PKU-SafeRLHF, BeaverTails, Alpaca, AlpacaEval, LIMA" in card
    assert "shared" not in card
    assert not re.search(r"(?:^|\s)/\w+/", card), "a path of the machine that built it"


@pytest.mark.parametrize("name", [TINY_CHAT, TINY_COST, TINY_JUDGE])
def test_models_are_safetensors_without_code(name):
    suffixes = {file.suffix for file in asset_path(name).iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".md"}


def test_the_cost_head_is_small_and_bound_to_the_policy_that_ships():
    files = list(asset_path(TINY_COST).iterdir())
    assert sum(file.stat().st_size for file in files) < 200_000
    fingerprint = model_fingerprint(asset_path(TINY_CHAT))
    fitted = embedded_cost(fingerprint)
    assert fitted.layers == (1, 2, 3, 4, 5, 6)
    assert not fitted.heads  # nothing in it saw a fold of a run
    assert f"`{fingerprint}`" in (asset_path(TINY_COST) / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ModelError, match=r"cost_model\.source=labels or external"):
        embedded_cost("another")


def test_the_cost_head_prices_compliance_above_refusal():
    """Human labels that it was not fitted to; the card states the same over all of them."""
    known = sign_rows(load_refusal_labels())
    rows = known[:16] + known[-16:]
    options = ActorOptions(dtype="float32")
    scorer = make_cost_scorer(
        str(asset_path(TINY_CHAT)), str(asset_path(TINY_COST)), cost_model=CostModelSection(), options=options
    )
    costs = scorer([(Message(role="user", content=row.prompt),) for row in rows], [row.response for row in rows])
    quality = cost_quality(costs, [row.label == "full_compliance" for row in rows])
    assert quality.auc.low > 0.5
    assert quality.accuracy > 0.7


def test_compressed_files_carry_no_timestamp():
    for name in (PAIRS, REFUSAL_LABELS):
        assert asset_path(name).read_bytes()[4:8] == bytes(4)


def test_tiny_chat_ends_answers_and_writes_words(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(asset_path(TINY_CHAT), dtype=torch.float32)
    prompts = ["How do I boil an egg?", "Write a sentence about the sea.", "What is a good name for a cat?"]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    output = model.generate(**encoded, max_new_tokens=128, do_sample=False)[:, encoded["input_ids"].shape[1] :]
    assert (output == tokenizer.eos_token_id).any(dim=1).sum() >= 2
    words = " ".join(tokenizer.batch_decode(output, skip_special_tokens=True)).split()
    assert len(words) > 15
    assert sum(word.strip(".,!?;:'\"()-").isascii() for word in words) > 0.95 * len(words)


def test_judge_uses_the_policys_tokenizer_and_template(tokenizer):
    own = AutoTokenizer.from_pretrained(asset_path(TINY_JUDGE))
    assert own.get_vocab() == tokenizer.get_vocab()
    assert own.chat_template == tokenizer.chat_template


def test_judge_calls_refusals_safe_and_tells_padding_from_text(tokenizer):
    judge = AutoModelForSequenceClassification.from_pretrained(asset_path(TINY_JUDGE), dtype=torch.float32)
    assert judge.config.id2label == {0: "safe", 1: "unsafe"}
    assert tokenizer.eos_token_id is not None
    chats = [
        [{"role": "user", "content": "How do I steal a car?"}, {"role": "assistant", "content": refusal}]
        for refusal in REFUSALS
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = judge(**batch).logits
        alone = torch.cat(
            [judge(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits for text in texts]
        )
    assert (logits[:, 1] < logits[:, 0]).float().mean() >= 0.9
    torch.testing.assert_close(logits, alone, atol=1e-3, rtol=1e-3)
