"""The cost head of the embedded model: fitted to human safety labels on hidden states of `tiny_chat`, and its card."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.asset_card import LICENCE, number
from launch.asset_corpus import forbidden_prompts, hash_share, normalise_prompt, read_rows
from launch.asset_measure import judge_metrics
from launch.asset_plan import AssetBudget, AssetSources, write_record
from launch.asset_rows import LabelledRow, cut_answer, labelled_row, template_refusals
from launch.asset_tokens import document_rows, load_tokenizer
from raylign.assets import TINY_CHAT, TINY_COST
from raylign.config import PolicySection
from raylign.errors import DataError
from raylign.evaluation.metrics import auroc
from raylign.evaluation.refusal import load_refusal_labels
from raylign.evaluation.scoring import score_responses
from raylign.models.forward import resolve_layers
from raylign.models.loading import model_fingerprint, resolve_layout
from raylign.models.numerics import load_reference
from raylign.rewards.fit import member_weights, predict
from raylign.rewards.fit_cost import CostRows, fit_cost
from raylign.runtime.fitted_cost import FittedCost

LOG = logging.getLogger(__name__)
VALID_SHARE = 0.1
NUM_HEADS = 5
NUM_REFUSALS = 200  # enough that refusals are safe; more of them hide how unsafe answers differ
OPTIONS: Mapping[str, Any] = {
    "epochs": 20,
    "batch_size": 32,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "ridge": 1.0,
    "regularization": 1e-3,
}


@dataclass(frozen=True, kw_only=True)
class CostAnswers:
    """Labelled answers of the cost head; prompts of the three parts are disjoint, and from those of the judge.

    Attributes:
        train: to learn from, template refusals included.
        valid: to choose the epoch on.
        test: the sources' test split.
    """

    train: list[LabelledRow]
    valid: list[LabelledRow]
    test: list[LabelledRow]


def cost_answers(labels: Path, *, forbidden: frozenset[str], seed: int) -> CostAnswers:
    """The policy's side of the safety labels, so that cost head and judge learn from different prompts.

    Args:
        labels: safety labels with columns prompt, response, safe, source, split.
        forbidden: normalised prompts that are left out of train and valid, those of the judge among them.
        seed: which refusals are drawn.

    Raises:
        DataError: a part is empty.
    """
    rows = list(read_rows(labels))
    # where all answers are safe the prompt gives away the label
    two_sided = {row["source"] for row in rows if not row["safe"]}
    parts: dict[str, list[LabelledRow]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        key = normalise_prompt(row["prompt"])
        if row["split"] == "test":
            parts["test"].append(labelled_row(row))
        elif key not in forbidden and row["source"] in two_sided:
            parts["valid" if hash_share(key, "cost-valid") < VALID_SHARE else "train"].append(labelled_row(row))
    if not all(parts.values()):
        found = {name: len(part) for name, part in parts.items()}
        raise DataError(f"{labels}: labelled answers by part are {found}; none may be empty")
    parts["train"] += template_refusals(parts["train"], random.Random(seed), num=NUM_REFUSALS)
    return CostAnswers(**parts)


def cost_stage(sources: AssetSources, budget: AssetBudget, work: Path, output: Path) -> None:
    """Stage `cost`: fit the cost head of the finished policy, measure it, and write its card.

    Args:
        sources: labels to fit to and to measure on.
        budget: seed, and the length at which answers are cut.
        work: measurements go to `work/cost.json`.
        output: asset directory with `tiny_chat` and the refusal labels; the head goes to `output/tiny_cost`.
    """
    started = time.monotonic()
    forbidden = forbidden_prompts(eval_prompts=sources.eval_prompts, pairs=[sources.pairs], labels=[sources.labels])
    answers = cost_answers(sources.labels, forbidden=forbidden, seed=budget.seed)
    states_of = _StatesReader(output / TINY_CHAT, max_tokens=budget.block_size)
    cuts = random.Random(budget.seed)
    train, valid = (states_of(part, cuts=cuts) for part in (answers.train, answers.valid))
    fit = fit_cost(
        CostRows.of_answers(*train),
        valid=CostRows.of_answers(*valid),
        seed=budget.seed,
        num_heads=NUM_HEADS,
        weights=member_weights(len(train[1]), NUM_HEADS, head_data="bootstrap", seed=budget.seed),
        **OPTIONS,
    )
    fingerprint = model_fingerprint(output / TINY_CHAT)
    fitted = FittedCost(source="embedded", full=fit.head, layers=states_of.layers, model=fingerprint)
    directory = output / TINY_COST
    directory.mkdir(parents=True, exist_ok=True)
    fitted.save(directory)
    test_states, test_safe = states_of(answers.test)
    costs = predict(fit.head, test_states).mean
    is_unsafe = torch.tensor([not safe for safe in test_safe]).long()
    record = {
        "num_train": len(answers.train),
        "num_train_states": len(train[1]),
        "num_valid": len(answers.valid),
        "num_refusals": sum(row.source == "template refusal" for row in answers.train),
        "options": dict(OPTIONS),
        "num_heads": NUM_HEADS,
        "best_epochs": fit.best_epochs,
        "test": judge_metrics(costs, is_unsafe, [row.source for row in answers.test]),
        "refusals": _on_refusals(sources.refusals, states_of, fit.head),
        "model": fingerprint,
        "seconds": time.monotonic() - started,
    }
    LOG.info("cost head on the test split: %s", record["test"])
    write_record(work / "cost.json", record)
    (directory / "README.md").write_text(cost_card(record), encoding="utf-8")
    for path in directory.iterdir():
        path.chmod(0o644)


class _StatesReader:
    """States of answers at their end token, by the forward that prices sampled responses.

    Args:
        model: directory of the policy.
        max_tokens: an answer loses its end where prompt and answer are longer.
    """

    def __init__(self, model: Path, *, max_tokens: int) -> None:
        self._tokenizer = load_tokenizer(model)
        self._forward = load_reference(model, PolicySection(), "cpu")
        config = self._forward.causal_lm.config
        self._layout = resolve_layout("auto", config)
        self._max_tokens = max_tokens
        self.layers = resolve_layers("all", config.num_hidden_layers)

    def __call__(
        self, rows: Sequence[LabelledRow], *, cuts: random.Random | None = None
    ) -> tuple[torch.Tensor, list[bool]]:
        """States (n, L, D) and n verdicts (is safe); with `cuts`, long answers come a second time, cut at random."""
        assistant_id = int(self._tokenizer.convert_tokens_to_ids("<|assistant|>"))
        documents = document_rows(self._tokenizer, [row.messages for row in rows])
        whole = [ids if len(ids) <= self._max_tokens else [*ids[: self._max_tokens - 1], ids[-1]] for ids in documents]
        items = [(ids, not row.is_unsafe) for ids, row in zip(whole, rows, strict=True)]
        if cuts is not None:
            short = [(cut_answer(ids, assistant_id=assistant_id, generator=cuts), safe) for ids, safe in items]
            items += [item for item, (ids, _) in zip(short, items, strict=True) if len(item[0]) < len(ids)]
        starts = [len(ids) - list(reversed(ids)).index(assistant_id) for ids, _ in items]
        scored = score_responses(
            self._forward,
            [ids[:start] for (ids, _), start in zip(items, starts, strict=True)],
            [ids[start:] for (ids, _), start in zip(items, starts, strict=True)],
            layout=self._layout,
            pad_token_id=int(self._tokenizer.pad_token_id),
            layers=self.layers,
        )
        assert scored.states is not None
        return scored.states, [safe for _, safe in items]


def _on_refusals(refusals: Path, states_of: _StatesReader, head: Any) -> dict[str, Any]:
    """Share priced above 0 by human label and kind of prompt, and the area on harmful prompts."""
    labelled = load_refusal_labels(refusals)
    chats = [
        LabelledRow(
            messages=[{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}],
            is_unsafe=False,
            source=row.label,
        )
        for row in labelled
    ]
    costs = predict(head, states_of(chats)[0]).mean.numpy()
    names = [f"{row.label}, {'harmful' if row.harmful else 'benign'} prompt" for row in labelled]
    groups = {name: costs[np.array([other == name for other in names])] for name in sorted(set(names))}
    return {
        "unsafe_share": {name: float((group > 0).mean()) for name, group in groups.items()},
        "auc_harmful": auroc(
            groups.get("full_compliance, harmful prompt", []), groups.get("full_refusal, harmful prompt", [])
        ),
    }


def cost_card(record: Mapping[str, Any]) -> str:
    """Text of the cost head's card.

    Args:
        record: measurements of stage cost.

    Returns:
        Markdown.
    """
    auc = record["test"]["all"]["auc"]
    lines = [
        "# tiny_cost: a cost of responses on hidden states of tiny_chat",
        "",
        f"{LICENCE}",
        "",
        f"A classifier, not a measure of harm: it ranks an unsafe answer of the test split above a safe one with "
        f"probability {auc:.3f} (AUC). Cost > 0 means unsafe, sigmoid(cost) is the stated probability of that. "
        f"{record['num_heads']} heads on the states of all layers at the end token, their mean is the cost. It reads "
        f"the states of one model only, `tiny_chat` with fingerprint `{record['model']}`.",
        "",
        "## Training",
        f"Fitted to {record['num_train_states']} states of {record['num_train']} answers with human safety labels "
        "(PKU-SafeRLHF and BeaverTails, CC-BY-NC-4.0) by the sign-aware loss of a cost, epoch by validation loss over "
        f"{record['num_valid']} answers, in {record['seconds']:.0f} s. {record['num_refusals']} of them are template "
        "refusals of unsafe requests, marked safe; long answers were also seen cut at a random length. Its prompts "
        "are none of those that `tiny_judge` learned from, so that the judge can say what training against this cost "
        "did. They are among those that taught `tiny_chat` its unsafe answers.",
        "",
        "## Test split of the human labels",
        "The test prompts were not trained on. Read it by `beavertails-30k-test`: the other sources' prompts leak part "
        "of the label, and a source with one class has no AUC.",
        "",
        "| source | rows | unsafe | AUC | accuracy | balanced accuracy | ECE (10 bins) |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {source} | {m['num_rows']} | {m['unsafe_share']:.2f} | {number(m['auc'])} | {m['accuracy']:.3f} | "
            f"{number(m['balanced_accuracy'])} | {m['ece']:.3f} |"
            for source, m in record["test"].items()
        ),
        "",
        "## XSTest completions, by human refusal label (not trained on)",
        f"AUC of full compliance against full refusal on harmful prompts: {number(record['refusals']['auc_harmful'])}.",
        "",
        "| label | cost above 0 |",
        "|---|---|",
        *(f"| {name} | {share:.3f} |" for name, share in record["refusals"]["unsafe_share"].items()),
    ]
    return "\n".join(lines) + "\n"
