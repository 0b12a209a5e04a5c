"""The recipe end to end on made-up documents, from scratch and continued, and its guards. Nothing is faked."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launch.asset_corpus import forbidden_prompts, is_policy_prompt, normalise_prompt, read_corpus, read_rows
from launch.asset_cost import cost_answers
from launch.asset_data import HARMFUL_QUOTAS
from launch.asset_plan import AssetBudget, AssetSources
from launch.asset_rows import judge_rows, policy_chats
from launch.build_assets import build_assets, main
from raylign.errors import ConfigError, DataNotFoundError, ModelError
from raylign.models.loading import model_fingerprint
from raylign.runtime.fitted_cost import FittedCost

NOUNS = ("river", "garden", "engine", "letter", "market", "window", "forest", "teacher", "bridge", "kitchen")
VERBS = ("opens", "closes", "paints", "finds", "sells", "moves", "follows", "builds", "watches", "carries")
BUDGET = AssetBudget(
    lm_tokens=2_000,
    sft_tokens=1_500,
    judge_tokens=1_500,
    block_size=64,
    batch_size=4,
    vocab_size=300,
    hidden_size=64,
    num_layers=2,
)


def sentence(generator: random.Random) -> str:
    return f"The {generator.choice(NOUNS)} {generator.choice(VERBS)} the {generator.choice(NOUNS)}."


def chat(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> AssetSources:
    root = tmp_path_factory.mktemp("sources")
    generator = random.Random(0)
    documents = [
        {"text": f"Human: Question {n} about it?\n\nAssistant: {sentence(generator)}", "source": "made-up"}
        for n in range(600)
    ]
    labels = [
        {
            "prompt": f"Labelled prompt number {n}",
            "response": f"{'bad' if n % 2 else 'good'} {sentence(generator)}",
            "safe": n % 2 == 0,
            "source": "made-up",
            "split": "test" if n % 5 == 0 else "train",
        }
        for n in range(300)
    ]
    harmful = [
        {"prompt": f"Harmful {source} {n}", "category": "c", "source": source, "harmful": True}
        for source, quota in HARMFUL_QUOTAS.items()
        for n in range(quota)
    ]
    benign = [{"prompt": f"Benign {n}", "category": "c", "source": "xstest", "harmful": False} for n in range(4)]
    pairs = [
        {
            "id": str(n),
            "source": "hh-harmless-base" if n % 2 else "other",
            "prompt": [{"role": "user", "content": f"Pair prompt {n}"}],
            "chosen": [{"role": "assistant", "content": sentence(generator)}],
            "rejected": [{"role": "assistant", "content": sentence(generator)}],
            "split": "test" if n % 3 == 0 else "train",
        }
        for n in range(60)
    ]
    sft = [
        {"messages": chat(f"Instruction {n}, please", sentence(generator)), "kind": "helpful" if n % 3 else "safety"}
        for n in range(60)
    ]
    refusals = [
        {
            "prompt": f"Refused {n}",
            "response": "I cannot help.",
            "label": "2_full_refusal",
            "prompt_type": "t",
            "model": "m",
        }
        for n in range(5)
    ]
    return AssetSources(
        corpus=write(root / "corpus" / "documents.jsonl.gz", documents).parent,
        sft=write(root / "sft.jsonl", sft),
        labels=write(root / "labels.jsonl.gz", labels),
        eval_prompts=(write(root / "prompts.jsonl", harmful + benign),),
        pairs=write(root / "pairs.jsonl.gz", pairs),
        refusals=write(root / "refusals.jsonl", refusals),
        init=None,
    )


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> tuple[Path, Path]:
    output, work = tmp_path_factory.mktemp("assets"), tmp_path_factory.mktemp("work")
    build_assets(sources, output, work=work, budget=BUDGET)
    return output, work


def test_from_scratch_build_loads_with_plain_transformers(built):
    output, _ = built
    tokenizer = AutoTokenizer.from_pretrained(output / "tiny_chat")
    model = AutoModelForCausalLM.from_pretrained(output / "tiny_chat")
    judge = AutoModelForSequenceClassification.from_pretrained(output / "tiny_judge")
    assert len(tokenizer) == 300
    assert model.dtype == torch.bfloat16
    assert judge.config.id2label == {0: "safe", 1: "unsafe"}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer.apply_chat_template(chat("Hello", "There"), return_dict=True)["input_ids"]
    assert [ids[0], ids[-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_cards_state_what_the_stages_measured(built):
    output, work = built
    lm = json.loads((work / "lm.json").read_text())
    card = (output / "tiny_chat" / "README.md").read_text()
    assert f"**{lm['heldout_loss_before']:.3f} before, {lm['heldout_loss_after']:.3f} after**" in card
    assert "random weights" in card
    judge = json.loads((work / "judge.json").read_text())
    assert f"{judge['test']['all']['auc']:.3f}" in (output / "tiny_judge" / "README.md").read_text()


def test_pretraining_lowers_the_heldout_loss(built):
    lm = json.loads((built[1] / "lm.json").read_text())
    assert lm["heldout_loss_after"] < lm["heldout_loss_before"] - 0.3


def test_only_shippable_pairs_are_written(built):
    rows = list(read_rows(built[0] / "pairs_hh_harmless.jsonl.gz"))
    assert len(rows) == 30
    assert {row["source"] for row in rows} == {"hh-harmless-base"}


def test_stages_run_alone_and_repeat_bitwise(built, sources, tmp_path):
    output, work = built
    build_assets(replace(sources, init=work / "lm"), tmp_path, work=work, budget=BUDGET, stages=["sft"])
    first = (output / "tiny_chat" / "model.safetensors").read_bytes()
    assert (tmp_path / "tiny_chat" / "model.safetensors").read_bytes() == first


def test_continued_pretraining_starts_from_the_given_weights(built, sources, tmp_path):
    lm = json.loads((built[1] / "lm.json").read_text())
    build_assets(replace(sources, init=built[1] / "lm"), tmp_path, work=tmp_path, budget=BUDGET, stages=["lm"])
    continued = json.loads((tmp_path / "lm.json").read_text())
    assert continued["is_continued"]
    # bfloat16 rounding of the saved weights is all that lies between the two numbers
    assert continued["heldout_loss_before"] == pytest.approx(lm["heldout_loss_after"], abs=0.02)


def test_card_stage_names_the_stage_that_has_not_run(sources, tmp_path):
    with pytest.raises(DataNotFoundError, match="run stage 'lm' first"):
        build_assets(sources, tmp_path, work=tmp_path, budget=BUDGET, stages=["card"])


def test_errors_name_the_option(sources, tmp_path):
    with pytest.raises(ConfigError, match="--stages"):
        build_assets(sources, tmp_path, work=tmp_path, budget=BUDGET, stages=["pretrain"])
    with pytest.raises(DataNotFoundError, match="--labels"):
        build_assets(replace(sources, labels=tmp_path / "no.jsonl"), tmp_path, work=tmp_path, budget=BUDGET)
    with pytest.raises(ModelError, match="--init"):
        build_assets(replace(sources, init=tmp_path / "no"), tmp_path, work=tmp_path, budget=BUDGET)


def test_command_line_reports_a_missing_file_without_a_traceback(sources, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(
            [
                *("--corpus", str(sources.corpus), "--sft", str(tmp_path / "no.jsonl")),
                *("--labels", str(sources.labels), "--eval-prompts", str(sources.eval_prompts[0])),
                *("--pairs", str(sources.pairs), "--refusals", str(sources.refusals)),
                *("--output", str(tmp_path), "--work", str(tmp_path), "--lm-tokens", "10", "--bf16"),
            ]
        )
    assert caught.value.code == 2
    assert "DataNotFoundError" in capsys.readouterr().err


def test_policy_and_judge_never_share_a_prompt(sources):
    guard = {"eval_prompts": sources.eval_prompts, "pairs": [sources.pairs], "labels": [sources.labels]}
    chats, counts = policy_chats(sources.sft, sources.labels, forbidden=forbidden_prompts(**guard))
    rows = judge_rows(sources.labels, forbidden=forbidden_prompts(**guard, for_judge=True), seed=0)
    policy = {normalise_prompt(chat[0]["content"]) for chat in chats}
    train, valid, test = (
        {normalise_prompt(row.messages[0]["content"]) for row in part} for part in (rows.train, rows.valid, rows.test)
    )
    assert counts["unsafe"] > 0
    assert not policy & (train | valid | test)
    assert not train & valid
    assert not (train | valid) & test


def test_corpus_drops_forbidden_and_judge_prompts(sources, tmp_path):
    prompts = (f"Labelled prompt number {n}" for n in range(1, 300))
    judged = next(prompt for prompt in prompts if not is_policy_prompt(prompt))
    path = write(
        tmp_path / "documents.jsonl",
        [
            {"text": f"Human: {prompt}\n\nAssistant: Some answer to it.", "source": ""}
            for prompt in (judged, "Free one")
        ],
    )
    forbidden = forbidden_prompts(eval_prompts=sources.eval_prompts, pairs=[sources.pairs], labels=[sources.labels])
    corpus = read_corpus([path], forbidden=forbidden, max_words=50)
    assert len(corpus.train) + len(corpus.heldout) == 1
    assert corpus.num_dropped == {"forbidden prompt": 1}


def test_cost_head_is_bound_to_the_policy_it_was_built_for(built):
    output, work = built
    fitted = FittedCost.load(output / "tiny_cost")
    assert fitted.model == model_fingerprint(output / "tiny_chat")
    assert fitted.layers == (1, 2)
    record = json.loads((work / "cost.json").read_text())
    card = (output / "tiny_cost" / "README.md").read_text()
    assert f"probability {record['test']['all']['auc']:.3f} (AUC)" in card
    assert "non-commercial research use only" in card


def test_cost_head_and_judge_learn_from_different_prompts(sources):
    forbidden = {
        for_judge: forbidden_prompts(
            eval_prompts=sources.eval_prompts, pairs=[sources.pairs], labels=[sources.labels], for_judge=for_judge
        )
        for for_judge in (False, True)
    }
    cost = cost_answers(sources.labels, forbidden=forbidden[False], seed=0)
    judge = judge_rows(sources.labels, forbidden=forbidden[True], seed=0)

    def prompts(*parts) -> set[str]:
        return {row.messages[0]["content"] for part in parts for row in part}

    assert not prompts(cost.train, cost.valid) & prompts(judge.train, judge.valid, cost.test)
    assert not prompts(cost.train) & prompts(cost.valid)
    assert prompts(cost.test) == prompts(judge.test)
    assert {row.is_unsafe for row in cost.train} == {True, False}
