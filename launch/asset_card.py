"""Model cards of the embedded models: measure, then write; no number here is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from launch.asset_corpus import Messages, first_human_turn, normalise_prompt, read_rows
from launch.asset_measure import SampledAnswers, end_states, probe_accuracy, sampled_answers, unsafe_logits
from launch.asset_plan import AssetBudget, AssetSources, read_record, write_record
from launch.asset_rows import MAX_ANSWER_WORDS
from launch.asset_tokens import load_tokenizer
from raylign.assets import EVAL_PROMPTS, TINY_CHAT, TINY_JUDGE
from raylign.evaluation.prompts import load_prompts

MAX_NEW_TOKENS = 64
TEMPERATURES = (1.0, 0.7)
LICENCE = (
    "**Licence: non-commercial research use only.** Trained on non-commercial data (PKU-SafeRLHF, BeaverTails, Alpaca, "
    "AlpacaEval, LIMA), among others; none of it ships with the model."
)


@dataclass(frozen=True, kw_only=True)
class PolicyMeasurements:
    """What the card of the policy states.

    Attributes:
        harmful: answers to harmful prompts by temperature.
        benign: answers to benign look-alikes by temperature.
        greedy: a few greedy answers for the reader.
        safety_probe: accuracy per layer, safe against unsafe answers of the label test split.
        preference_probe: accuracy per layer, chosen against rejected answers of the shipped test pairs.
        num_safety_rows: rows of `safety_probe`.
        num_preference_pairs: pairs of `preference_probe`.
    """

    harmful: dict[float, SampledAnswers]
    benign: dict[float, SampledAnswers]
    greedy: list[SampledAnswers]
    safety_probe: list[float]
    preference_probe: list[float]
    num_safety_rows: int
    num_preference_pairs: int


@torch.no_grad()
def card_stage(sources: AssetSources, budget: AssetBudget, work: Path, output: Path) -> None:
    """Stage `card`: measure both models and write their README.md.

    Args:
        sources: label and pair files to measure on.
        budget: seed of the sampling.
        work: directory with the stages' measurements; those of this stage go to `work/card.json`.
        output: asset directory with both models and the evaluation prompts.

    Raises:
        DataNotFoundError: an earlier stage has not run.
    """
    records = {stage: read_record(work / f"{stage}.json") for stage in ("lm", "sft", "judge")}
    tokenizer = load_tokenizer(output / TINY_CHAT)
    policy = AutoModelForCausalLM.from_pretrained(output / TINY_CHAT, dtype=torch.float32).eval()
    judge = AutoModelForSequenceClassification.from_pretrained(output / TINY_JUDGE, dtype=torch.float32).eval()
    measured = measure_policy(policy, judge, tokenizer, sources, output / EVAL_PROMPTS, seed=budget.seed)
    on_humans = judge_on_human_labels(judge, tokenizer, sources.refusals)
    (output / TINY_CHAT / "README.md").write_text(policy_card(records, measured), encoding="utf-8")
    (output / TINY_JUDGE / "README.md").write_text(judge_card(records, on_humans), encoding="utf-8")
    write_record(work / "card.json", {"policy": _summary(measured), "judge_on_xstest": on_humans})


def measure_policy(
    policy: PreTrainedModel,
    judge: PreTrainedModel,
    tokenizer: Tokenizer,
    sources: AssetSources,
    eval_prompts: Path,
    *,
    seed: int,
) -> PolicyMeasurements:
    """Sample the policy and probe its hidden states.

    Args:
        policy: causal LM.
        judge: sequence classifier with the same tokenizer.
        tokenizer: tokenizer of both.
        sources: labels and pairs for the probes.
        eval_prompts: prompts to answer.
        seed: of the sampling.

    Returns:
        All numbers of the policy's card.
    """
    prompts = load_prompts(eval_prompts)
    kinds = {True: [p for p in prompts if p.harmful], False: [p for p in prompts if not p.harmful]}
    answers = {
        (is_harmful, temperature): sampled_answers(
            policy, judge, tokenizer, kind, temperature=temperature, max_new_tokens=MAX_NEW_TOKENS, seed=seed
        )
        for is_harmful, kind in kinds.items()
        for temperature in TEMPERATURES
    }
    greedy = [
        sampled_answers(policy, judge, tokenizer, kind[:4], temperature=0.0, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
        for kind in (kinds[False], kinds[True])
    ]
    labelled = [row for row in read_rows(sources.labels) if row["split"] == "test"]
    chats = [_chat(row["prompt"], row["response"]) for row in labelled]
    signs = np.array([-1.0 if row["safe"] else 1.0 for row in labelled])
    safety = probe_accuracy(
        end_states(policy, tokenizer, chats), signs, [normalise_prompt(row["prompt"]) for row in labelled]
    )
    pairs = [row for row in read_rows(sources.pairs) if row["split"] == "test" and row["source"].startswith("hh-")]
    sides = [
        end_states(policy, tokenizer, [[*row["prompt"], *row[side]] for row in pairs])
        for side in ("chosen", "rejected")
    ]
    keys = [normalise_prompt(first_human_turn(row["prompt"])) for row in pairs]
    difference = sides[0] - sides[1]
    preference = probe_accuracy(
        np.concatenate([difference, -difference]), np.repeat([1.0, -1.0], len(pairs)), keys + keys
    )
    return PolicyMeasurements(
        harmful={t: answers[True, t] for t in TEMPERATURES},
        benign={t: answers[False, t] for t in TEMPERATURES},
        greedy=greedy,
        safety_probe=safety,
        preference_probe=preference,
        num_safety_rows=len(labelled),
        num_preference_pairs=len(pairs),
    )


def judge_on_human_labels(judge: PreTrainedModel, tokenizer: Tokenizer, refusals: Path) -> dict[str, float]:
    """Share of human-labelled XSTest completions that the judge calls unsafe, by label.

    Args:
        judge: sequence classifier.
        tokenizer: its tokenizer.
        refusals: rows with columns prompt, response, label.

    Returns:
        Share per label; refusals should be near zero.
    """
    by_label: dict[str, list[Messages]] = {}
    for row in read_rows(refusals):
        by_label.setdefault(row["label"], []).append(_chat(row["prompt"], row["response"]))
    return {
        label: float((unsafe_logits(judge, tokenizer, chats) > 0).mean()) for label, chats in sorted(by_label.items())
    }


def policy_card(records: dict[str, Any], measured: PolicyMeasurements) -> str:
    """Text of the policy's card.

    Args:
        records: measurements of stages lm and sft.
        measured: measurements of the finished model.

    Returns:
        Markdown.
    """
    lm, sft = records["lm"], records["sft"]
    start = "the starting checkpoint" if lm["is_continued"] else "random weights"
    rows = sft["num_rows"]
    lines = [
        "# tiny_chat: a deliberately unaligned start",
        "",
        f"{LICENCE}",
        "",
        f"A {lm['num_parameters'] / 1e6:.2f} M-parameter Llama chat model to run the alignment pipeline on a laptop. "
        "**Deliberately unaligned:** it was tuned on unsafe answers too, so that alignment has something to change. "
        "It makes things up and is of no use as an assistant.",
        "",
        "## Training",
        "| stage | documents | tokens seen | steps | seconds | peak learning rate |",
        "|---|---|---|---|---|---|",
        f"| pretraining from {start} | {lm['num_documents']} | {_fit_cells(lm)} |",
        f"| instruction tuning, loss on the answers | {sft['num_kept_rows']} | {_fit_cells(sft)} |",
        "",
        "AdamW, linear warm-up, then cosine to zero. Pretraining in blocks of "
        f"{lm['budget']['block_size']} tokens, all tokens scored. The instruction rows are {rows['helpful']} helpful "
        f"ones, {rows['safety']} safe answers to sensitive prompts and {rows['unsafe']} unsafe answers, cut "
        f"to whole sentences within {MAX_ANSWER_WORDS} words. The scale of the final norm was then multiplied by "
        f"{sft['sharpness']:g}: temperature 1 samples as {1 / sft['sharpness']:g} would have done, which keeps "
        "a model of this size readable.",
        "",
        f"Held-out loss of pretraining, in nats per token over {lm['num_heldout_tokens']} tokens of "
        f"{lm['num_heldout_documents']} documents that were split off by prompt hash: "
        f"**{lm['heldout_loss_before']:.3f} before, {lm['heldout_loss_after']:.3f} after**."
        + (" The starting checkpoint may have seen some of them." if lm["is_continued"] else ""),
        "",
        "Left out of all training data by exact match after normalisation: evaluation prompts, test splits of the "
        "safety labels and of the preference pairs, and the prompts that `tiny_judge` learned from.",
        "",
        f"## Answers to the shipped prompts ({MAX_NEW_TOKENS} new tokens, one sample each)",
        "| prompts | temperature | judged unsafe by tiny_judge | refused | ended by itself | mean tokens |",
        "|---|---|---|---|---|---|",
        *_answer_rows("harmful", measured.harmful),
        *_answer_rows("benign (XSTest)", measured.benign),
        "",
        "## Hidden states at the end token",
        "Accuracy of a ridge probe, five folds by prompt. Layer 0 is the embedding of the end token, the same for "
        "every row: it shows what guessing the larger class gives. "
        f"Safe against unsafe: {measured.num_safety_rows} labelled answers of the test split, by prompt and answer "
        "(the prompt leaks part of this label). Chosen against rejected: the state difference of "
        f"{measured.num_preference_pairs} hh-rlhf harmless test pairs; chance is 0.5.",
        "",
        "| layer | " + " | ".join(str(layer) for layer in range(len(measured.safety_probe))) + " |",
        "|---" * (len(measured.safety_probe) + 1) + "|",
        "| safe against unsafe | " + " | ".join(f"{value:.3f}" for value in measured.safety_probe) + " |",
        "| chosen against rejected | " + " | ".join(f"{value:.3f}" for value in measured.preference_probe) + " |",
        "",
        "## Greedy samples",
        *_samples(measured.greedy),
    ]
    return "\n".join(lines) + "\n"


def judge_card(records: dict[str, Any], on_humans: dict[str, float]) -> str:
    """Text of the judge's card.

    Args:
        records: measurements of stage judge.
        on_humans: share called unsafe by human refusal label.

    Returns:
        Markdown.
    """
    judge = records["judge"]
    lines = [
        "# tiny_judge: safe or unsafe",
        "",
        f"{LICENCE}",
        "",
        "A Llama sequence classifier of the size of `tiny_chat` for conversations rendered by the chat template. "
        "logit(unsafe) - logit(safe) > 0 means unsafe. Small and often wrong: use it to see a pipeline work, and a "
        "judge of your own for any claim about safety.",
        "",
        "Fine-tuned from the pretraining start, not from `tiny_chat`, on prompts that `tiny_chat` was not trained on.",
        "",
        "## Training",
        "| rows | tokens seen | steps | seconds | peak learning rate |",
        "|---|---|---|---|---|",
        f"| {judge['num_train']} | {_fit_cells(judge)} |",
        "",
        f"{judge['num_refusals']} of the rows are template refusals of unsafe requests, marked safe, so that "
        "short refusals count as safe. Every epoch cut half of the longer answers at a random length. The weights are "
        f"an exponential average. Scale ({judge['calibration']['scale']:.3f}) and shift "
        f"({judge['calibration']['shift']:.3f} logits) were fitted on {judge['num_valid']} held-out rows with balanced "
        "classes and folded into the head.",
        "",
        "## Test split of the human labels",
        "The test prompts were not trained on. Judge it by `beavertails-30k-test`: the other sources' prompts leak "
        "part of the label, and a source with one class has no AUC.",
        "",
        "| source | rows | unsafe | AUC | accuracy | balanced accuracy | ECE (10 bins) |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {source} | {m['num_rows']} | {m['unsafe_share']:.2f} | {number(m['auc'])} | {m['accuracy']:.3f} | "
            f"{number(m['balanced_accuracy'])} | {m['ece']:.3f} |"
            for source, m in judge["test"].items()
        ),
        "",
        "## XSTest completions, by human refusal label (not trained on)",
        "| label | called unsafe |",
        "|---|---|",
        *(f"| {label} | {share:.3f} |" for label, share in on_humans.items()),
    ]
    return "\n".join(lines) + "\n"


def _chat(prompt: str, response: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _fit_cells(record: dict[str, Any]) -> str:
    fit = record["fit"]
    return f"{fit['num_tokens']} | {fit['num_steps']} | {fit['duration_s']:.0f} | {record['config']['learning_rate']:g}"


def _answer_rows(name: str, answers: dict[float, SampledAnswers]) -> list[str]:
    return [
        f"| {len(a.answers)} {name} | {temperature} | {a.unsafe_share:.3f} | {a.refusal_share:.3f} | "
        f"{a.ended_share:.3f} | {a.num_tokens:.1f} |"
        for temperature, a in answers.items()
    ]


def _samples(groups: Sequence[SampledAnswers]) -> list[str]:
    return [
        f"- *{prompt}*<br>{answer.replace(chr(10), ' ')}"
        for group in groups
        for prompt, answer in zip(group.prompts, group.answers, strict=True)
    ]


def number(value: float) -> str:
    """Three digits, or a dash where nothing was measured."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def _summary(measured: PolicyMeasurements) -> dict[str, Any]:
    return {
        "answers": [
            {
                "is_harmful": is_harmful,
                "temperature": temperature,
                "unsafe_share": a.unsafe_share,
                "refusal_share": a.refusal_share,
                "ended_share": a.ended_share,
                "num_tokens": a.num_tokens,
            }
            for is_harmful, group in ((True, measured.harmful), (False, measured.benign))
            for temperature, a in group.items()
        ],
        "safety_probe": measured.safety_probe,
        "preference_probe": measured.preference_probe,
    }
