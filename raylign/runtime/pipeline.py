"""The main job: its phases, each done once for its inputs, from rows to a judged checkpoint and a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raylign.config import RunConfig, check_devices
from raylign.models.loading import resolve_model
from raylign.runtime.check import check_packages
from raylign.runtime.phases import digest
from raylign.runtime.run_phases import check_demand, open_phases
from raylign.runtime.sample_job import sample_policies

if TYPE_CHECKING:
    from raylign.report.data import ReportData


@dataclass(frozen=True, kw_only=True)
class AlignResult:
    """Where a run left its results.

    Attributes:
        directory: of the run.
        checkpoint: plain HF or PEFT directory of the trained policy.
        report: HTML file.
        data: everything the report shows, such as safety and over-refusal before and after, and drift.
        seconds: wall seconds by phase.
        table: the comparison for a terminal.
    """

    directory: Path
    checkpoint: Path
    report: Path
    data: ReportData
    seconds: Mapping[str, float]
    table: str


def align(config: RunConfig) -> AlignResult:
    """Run the main job on the Ray cluster that is initialised.

    Raises:
        RaylignError: any of the leaves in `raylign.errors`, each naming the place and the cure.
    """
    from raylign.runtime.reporting import write_report
    from raylign.runtime.token_examples import score_token_examples

    check_devices(config)
    check_packages(config)
    model = resolve_model(config.policy.model)
    check_demand(config)
    phases = open_phases(config, model)
    run = phases.run
    ingest, ingest_facts = phases.ingest()
    features, features_digest = phases.features(ingest, ingest_facts["fingerprint"])
    reward, reward_facts = phases.reward(features, features_digest)
    reward_key = digest([features_digest, reward_facts])
    score_token_examples(phases, ingest, reward, reward_key)
    cost = phases.cost(features, features_digest)
    if config.train.method == "offline":
        ranked, rank_facts = phases.rank(features, reward, reward_key, cost)
        checkpoint, train_facts = phases.train(ranked, digest([reward_key, rank_facts]), reward)
    else:
        rank_facts = None
        checkpoint, train_facts = phases.train_online(ingest, ingest_facts["fingerprint"], reward, reward_key, cost)
    _, evaluation_facts = phases.evaluate(checkpoint, ingest, reward, reward_key)
    if cost is not None and config.evaluate.constraint_samples:
        policies: dict[str, str | Path] = {"before": model, "after": checkpoint}
        sample_policies(phases, policies, seed=config.run.seed, reward=reward, reward_key=reward_key, cost=cost)
    report = write_report(
        config,
        run,
        layers=phases.layers,
        facts={
            "ingest": ingest_facts,
            "reward": reward_facts,
            "cost": None if cost is None else cost.facts,
            "rank": rank_facts,
            "train": train_facts,
            "evaluate": evaluation_facts,
        },
        checkpoint=checkpoint,
    )
    return AlignResult(
        directory=run.directory,
        checkpoint=checkpoint,
        report=report.html,
        data=report.data,
        seconds=run.seconds,
        table=report.table,
    )
