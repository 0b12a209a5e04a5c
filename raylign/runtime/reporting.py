"""The report phase: artefacts of the other phases in, one HTML file, one JSON and a model card out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.config import EMBEDDED, RunConfig, needs_cost, to_yaml
from raylign.cost.rows import money, read_ledger, total, total_reused, totals
from raylign.errors import DataError
from raylign.evaluation.drift import DriftReport
from raylign.evaluation.judges import SignCheck
from raylign.evaluation.refusal import RefusalValidation
from raylign.evaluation.safety import compare_summaries
from raylign.report.constraint_data import (
    ConstraintReport,
    EvaluatedPrompts,
    StoredLabels,
    cost_shares,
    evaluated_prompts,
    round_points,
    round_warnings,
    stored_points,
    stored_warnings,
)
from raylign.report.data import (
    ConfidenceFacts,
    CostFacts,
    LayerPoint,
    NotMeasured,
    ReportData,
    RewardQuality,
    report_json,
)
from raylign.report.html import render_html
from raylign.report.model_card import render_model_card
from raylign.report.sampled_data import SampledRun
from raylign.report.wording import comparison_table, sampling_sentence
from raylign.runtime.check import method_name
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.evaluate_job import COMPLETIONS_FILE, DRIFT_FILE, load_completions
from raylign.runtime.online_trainer import ROUNDS_DIR
from raylign.runtime.phases import ENVIRONMENT_FILE, Run, record_config, versions, write_json
from raylign.runtime.sample_job import sampled_run
from raylign.runtime.token_examples import read_token_examples
from raylign.runtime.tracking import read_records, record_summary
from raylign.runtime.trainer import METRICS_FILE
from raylign.training.constrained import multiplier_rule
from raylign.training.rounds import RoundStore
from raylign.types import Interval

EMBEDDED_MODEL_LICENSE = "The embedded base model was trained on non-commercial data: non-commercial research use only."
_CUT_SHARE = 0.05  # of all answers, from which on the report warns
EMBEDDED_DATA_LICENSE = "The embedded pairs are hh-rlhf rows (MIT)."


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """What the report phase leaves.

    Attributes:
        html: path of the self-contained report.
        data: everything it shows.
        table: before and after for a terminal.
    """

    html: Path
    data: ReportData
    table: str


def write_report(
    config: RunConfig, run: Run, *, facts: Mapping[str, Any], layers: tuple[int, ...], checkpoint: Path
) -> WrittenReport:
    """Collect the phases' results and write `report.html`, `report.json` and the checkpoint's model card.

    Args:
        config: of the run.
        run: whose directory gets the files.
        facts: manifest facts by phase: ingest, reward, cost (None when nothing was priced), rank (None when nothing was
            ranked), train, evaluate.
        layers: transformer layers of the features.
        checkpoint: directory of the trained policy; gets `README.md`.
    """
    record_config(config, run.directory)  # all phases agreed with it; a resume may have changed cost settings
    data = collect(config, run, facts=facts, layers=layers)
    html = run.directory / "report.html"
    html.write_text(render_html(data), encoding="utf-8")
    content = report_json(data)
    write_json(run.directory / "report.json", content)
    (checkpoint / "README.md").write_text(render_model_card(data), encoding="utf-8")
    record_summary(config, run.directory, _flat(content["comparison"]["after"]))
    return WrittenReport(html=html, data=data, table=comparison_table(data.comparison, data.sampling))


def collect(config: RunConfig, run: Run, *, facts: Mapping[str, Any], layers: tuple[int, ...]) -> ReportData:
    """The report's input from the run directory and the manifests."""
    evaluate = run.directory / "evaluate"
    training = read_records(run.directory / "train" / METRICS_FILE)
    completions = load_completions(evaluate / COMPLETIONS_FILE)
    environment = json.loads((run.directory / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    ingest = facts["ingest"]
    return ReportData(
        run_name=config.run.name,
        base_model=config.policy.model,
        dataset=config.data.path,
        objective=method_name(config),
        is_adapter=config.policy.adapter == "lora",
        comparison=compare_summaries(
            completions["before"],
            completions["after"],
            num_samples=config.evaluate.bootstrap_samples,
            seed=config.run.seed,
        ),
        before=completions["before"],
        after=completions["after"],
        judge_name=config.evaluate.judge,
        judge=SignCheck(**facts["evaluate"]["judge"]),
        refusal_detector=RefusalValidation(**facts["evaluate"]["refusal_detector"]),
        drift=read_drift(evaluate / DRIFT_FILE),
        reward=_reward_quality(config.reward.kind, facts["reward"], layers),
        confidence=_confidence(config, facts["rank"]),
        training=training,
        data_counts={
            "read": ingest["rows_read"],
            "used": ingest["used"],
            **ingest["splits"],
            "sampled out": ingest["sampled_out"],
            "answers cut at data.max_length": ingest["cut"],
            "contradictions": ingest["contradictions"],
        },
        quarantine=ingest["quarantined"],
        seconds=run.seconds,
        cost=cost_facts(config, run.directory / LEDGER_DIR),
        config_yaml=to_yaml(config),
        versions=versions(),
        git_commit=environment["git_commit"],
        license_note=license_note(config),
        warnings=_warnings(facts),
        constraint=constraint_report(
            config,
            run.directory,
            facts=facts,
            records=training,
            evaluated=evaluated_prompts(completions["before"], completions["after"]),
            sampled=sampled_run(config, run.directory),
        ),
        token_examples=read_token_examples(run.directory),
        sampling=sampling_sentence(
            temperature=config.evaluate.temperature,
            max_new_tokens=config.evaluate.max_new_tokens,
            best_of=config.evaluate.best_of,
        ),
    )


def _warnings(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What the data, the reward, the cost model and a constraint over stored pairs warned of."""
    constraint = None if facts["rank"] is None else facts["rank"].get("constraint")  # absent without one
    return cut_warnings(facts["ingest"]) + tuple(
        text for part in (facts["reward"], facts["cost"], constraint) if part is not None for text in part["warnings"]
    )


def cut_warnings(ingest: Mapping[str, Any]) -> tuple[str, ...]:
    """Says so when many answers end with an end-of-response token that their authors did not put there.

    Args:
        ingest: facts of the ingest phase.
    """
    share = ingest["cut"] / (2 * ingest["used"])
    if share <= _CUT_SHARE:
        return ()
    return (
        f"{share:.0%} of the answers were cut at data.max_length, and the policy learns to end there: raise "
        "data.max_length, or leave the long pairs out",
    )


def constraint_report(
    config: RunConfig,
    directory: Path,
    *,
    facts: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    evaluated: EvaluatedPrompts,
    sampled: SampledRun | None = None,
) -> ConstraintReport | NotMeasured:
    """What the constraint of a run did, from its rounds or from its ranked pairs.

    Args:
        config: of the run.
        directory: of the run.
        facts: see `write_report`; rank is read.
        records: of the training metrics.
        evaluated: what became of the evaluation prompts.
        sampled: several answers to each of them, None when they were not asked for.
    """
    if not needs_cost(config):
        return NotMeasured(reason="the run has no constraint (constraint.kind=none), and no response has a cost")
    if config.train.method != "offline":
        report = _sampled_constraint(config, directory / "train" / ROUNDS_DIR, records, evaluated)
    elif config.constraint.kind != "none":
        report = _stored_constraint(config, directory / "rank" / "ranked", facts["rank"]["constraint"], evaluated)
    elif sampled is not None:
        report = _unread_costs(evaluated)
    else:
        return NotMeasured(reason="stored pairs were priced (cost_model.source), and no constraint read the costs")
    return replace(report, sampled=sampled)


def _unread_costs(evaluated: EvaluatedPrompts) -> ConstraintReport:
    """Of a run over stored pairs without a constraint, whose costs are only reported."""
    return ConstraintReport(
        kind="none", bound=None, cap=None, points=(), stored=None, histograms=(), warnings=(), evaluated=evaluated
    )


def _sampled_constraint(
    config: RunConfig, rounds: Path, records: Sequence[Mapping[str, Any]], evaluated: EvaluatedPrompts
) -> ConstraintReport:
    """Of rounds, which are all on disk; the first and the last one's costs are drawn."""
    settings, points = config.constraint, round_points(records)
    is_moving = settings.kind not in ("none", "fixed_penalty")
    store, costs = RoundStore(rounds), {}
    for index in sorted({0, config.online.num_rounds - 1}):
        if points and store.has(index):
            costs[f"round {index + 1}"] = store.read(index).costs
    return ConstraintReport(
        kind=settings.kind,
        bound=multiplier_rule(settings).target if is_moving else None,
        cap=settings.multiplier_max if is_moving else None,
        points=points,
        stored=None,
        histograms=cost_shares(costs),
        warnings=round_warnings(points, kind=settings.kind, start=float(settings.multiplier)),
        evaluated=evaluated,
    )


def _stored_constraint(
    config: RunConfig, ranked: Path, facts: Mapping[str, Any], evaluated: EvaluatedPrompts
) -> ConstraintReport:
    """Of stored pairs; the costs of the answers that are preferred under one order after the other are drawn."""
    settings = config.constraint
    columns = ("chosen_cost", "rejected_cost", "chosen_reward", "rejected_reward", "label_confidence")
    table = pq.read_table(ranked, columns=["split", *columns])
    table = table.filter(pc.equal(table["split"], "train"))
    found = {name: table[name].to_numpy() for name in columns}
    orders = {
        "stored order": np.ones(len(table), bool),
        "order by reward": found["chosen_reward"] >= found["rejected_reward"],
        "order under the constraint": found["label_confidence"] >= 0.5,
    }
    names = {field.name for field in fields(StoredLabels)}
    return ConstraintReport(
        kind=settings.kind,
        bound=multiplier_rule(settings).target if facts["is_dual"] else None,
        cap=settings.multiplier_max if facts["is_dual"] else None,
        points=stored_points(facts),
        stored=StoredLabels(**{name: facts[name] for name in names}),
        histograms=cost_shares(
            {name: np.where(is_kept, found["chosen_cost"], found["rejected_cost"]) for name, is_kept in orders.items()}
        ),
        warnings=stored_warnings(facts),
        evaluated=evaluated,
    )


def cost_facts(config: RunConfig, ledger: Path) -> CostFacts | NotMeasured:
    """What a run cost, by its ledger.

    Args:
        config: of the run, for the prices.
        ledger: directory.
    """
    rows = read_ledger(ledger)
    if not rows:
        return NotMeasured(reason="the run kept no ledger")
    whole = total(rows)
    price: float | NotMeasured = NotMeasured(reason="no prices are given (cost.prices)")
    if config.cost.prices is not None:
        try:
            price = money(whole.device_s, config.cost.prices)
        except DataError as error:  # a missing price must not cost the report
            price = NotMeasured(reason=str(error))
    return CostFacts(
        stages=totals(rows, by="stage"),
        phases=totals(rows, by="phase"),
        total=whole,
        reused=total_reused(rows),
        num_killed=sum(not row.is_finished for row in rows),
        money=price,
        currency=config.cost.currency,
    )


def license_note(config: RunConfig) -> str:
    """What the weights and the data allow, each by itself."""
    model = (
        EMBEDDED_MODEL_LICENSE if config.policy.model == EMBEDDED else f"The licence of {config.policy.model} applies."
    )
    data = EMBEDDED_DATA_LICENSE if config.data.path == EMBEDDED else f"The licence of {config.data.path} applies."
    return f"{model} {data}"


def read_drift(file: Path) -> DriftReport:
    """Read what `evaluate_job.save_drift` wrote."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in ("kendall_tau", "rank_drift", "kl"):
        if content[name] is not None:
            content[name] = Interval(**content[name])
    return DriftReport(**content)


def _reward_quality(kind: str, metrics: Mapping[str, Any], layers: tuple[int, ...]) -> RewardQuality:
    return RewardQuality(
        kind=kind,
        test_accuracy=Interval(**metrics["test_accuracy"], num_items=metrics["num_test_pairs"]),
        out_of_fold_accuracy=metrics["out_of_fold_accuracy"],
        test_ece=metrics["test_ece"],
        test_brier=metrics["test_brier"],
        test_disagreement=metrics["test_disagreement"],
        num_train_pairs=metrics["num_train_pairs"],
        num_test_pairs=metrics["num_test_pairs"],
        layers=tuple(
            LayerPoint(
                layer=layers[record["position"]],
                pair_accuracy=record["pair_accuracy"],
                calibration_error=record["calibration_error"],
            )
            for record in metrics["layers"]
        ),
    )


def _confidence(config: RunConfig, facts: Mapping[str, Any] | None) -> ConfidenceFacts | NotMeasured:
    if facts is None:
        return NotMeasured(reason=f"train.method={config.train.method} samples its responses and reads no stored label")
    if config.train.objective != "label_confidence":
        return NotMeasured(reason=f"train.objective={config.train.objective} does not read label confidence")
    if config.confidence.source == "live":
        return NotMeasured(reason="it changes during a live run; see confidence/mean and flips under Training")
    names = {field.name for field in fields(ConfidenceFacts)}
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in facts.items() if name in names
    }
    return ConfidenceFacts(**known)


def _flat(summary: Mapping[str, Any]) -> dict[str, float | None]:
    return {f"eval/{name}": value["mean"] for name, value in summary.items() if value is not None}
