"""`raylign compare`: methods and seeds on shared data, reward and evaluation, priced by one kind of ledger."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylign.compare_config import DRIFT_KEYS, Comparison, Trial
from raylign.config import RunConfig, check_devices, needs_cost
from raylign.cost.projection import ProjectionSettings
from raylign.cost.rows import LedgerRow, read_ledger, total, total_reused, totals
from raylign.errors import OutputExistsError
from raylign.evaluation.safety import compare_summaries, summarise
from raylign.models.loading import model_fingerprint, resolve_model
from raylign.report.compare_data import ComparisonResult, MethodResult, Point
from raylign.report.sampled_data import SampledMeasures
from raylign.report.wording import sampling_sentence
from raylign.runtime.check import check_packages
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.evaluate_job import (
    COMPLETIONS_FILE,
    FREE_KEYS,
    evaluate_models,
    evaluation_inputs,
    load_completions,
    save_completions,
)
from raylign.runtime.phases import Run, digest, renamed, write_json
from raylign.runtime.run_phases import POLICY_DIR, Phases, actor_options, check_demand, open_phases
from raylign.runtime.sample_job import SAMPLES_PHASE, measure_samples, sample_policies, sampled_settings
from raylign.types import Completion

SHARED = "shared"
# What larger models are projected at: the sizes of the experiment of arXiv:2503.10093.
PROJECTED = ProjectionSettings(num_prompts=4000, num_samples=8, prompt_tokens=30, response_tokens=256, num_pairs=1600)
BEFORE = "before"
_CHECKPOINT_STATE = "trainer_state/state.json"


def compare(comparison: Comparison) -> ComparisonResult:
    """Run what has not been run yet, and collect the results; Ray must be initialised.

    Everything is written below `<run.storage>/<run.name>`: `shared/` with the phases that all methods read, and one run
    directory per method and seed. A killed comparison goes on with run.resume=true.

    Raises:
        RaylignError: any of the leaves in `raylign.errors`, each naming the place and the cure.
    """
    base = comparison.base
    directory = comparison_directory(comparison)
    if directory.exists() and any(directory.iterdir()) and not base.run.resume:
        raise OutputExistsError(f"{directory} is in use; continue it with run.resume=true or choose another run.name")
    model = resolve_model(base.policy.model)
    for config in (base, *(trial.config for trial in comparison.trials)):
        check_devices(config)
        check_packages(config)
        check_demand(config)
    shared = open_phases(renamed(base, storage=directory, name=SHARED), model)
    devices = shared.run.devices["evaluate"]
    shared.run.devices = {**shared.run.devices, **{_evaluation(seed): devices for seed in comparison.compare.seeds}}
    ingest, ingest_facts = shared.ingest()
    features, features_digest = shared.features(ingest, ingest_facts["fingerprint"])
    reward, reward_facts = shared.reward(features, features_digest)
    reward_key = digest([features_digest, reward_facts])
    shared_cost = shared.cost(features, features_digest)
    trained: dict[Trial, Run] = {}
    for trial in comparison.trials:
        phases = open_phases(trial.config, model)
        cost = shared_cost if needs_cost(trial.config) else None
        if trial.config.train.method != "offline":
            phases.train_online(ingest, ingest_facts["fingerprint"], reward, reward_key, cost)
        elif trial.config.train.objective == "label_confidence":
            ranked, rank_facts = phases.rank(features, reward, reward_key, cost)
            phases.train(ranked, digest([reward_key, rank_facts]), reward)
        else:
            phases.train(features, features_digest, reward)
        trained[trial] = phases.run
    answers = {
        seed: _evaluate(
            shared, comparison, seed, {t: r for t, r in trained.items() if t.seed == seed}, reward, reward_key
        )
        for seed in comparison.compare.seeds
    }
    samples: dict[int, Path] = {}
    if base.evaluate.constraint_samples:
        assert shared_cost is not None  # refused by the configuration
        samples = {
            seed: sample_policies(
                shared,
                _last_policies(shared.model, {t: r for t, r in trained.items() if t.seed == seed}),
                seed=seed,
                reward=reward,
                reward_key=reward_key,
                cost=shared_cost,
                name=f"{SAMPLES_PHASE}-seed{seed}",
            )
            for seed in comparison.compare.seeds
        }
    sampled = measure_samples(
        list(samples.values()),
        [BEFORE, *comparison.compare.methods],
        prompt_safety=prompt_safety(comparison),
        num_samples=base.evaluate.bootstrap_samples,
        seed=base.run.seed,
    )
    return _collect(comparison, directory, trained, answers, sampled)


@dataclass(frozen=True, kw_only=True)
class WrittenComparison:
    """What `write_comparison` leaves.

    Attributes:
        html: path of the self-contained report; `comparison.json` lies beside it.
        text: the tables for a terminal.
    """

    html: Path
    text: str


def write_comparison(comparison: Comparison, result: ComparisonResult) -> WrittenComparison:
    """Write `comparison.html` and `comparison.json` into the comparison's directory."""
    from raylign.report.compare_data import comparison_json
    from raylign.report.compare_html import render_comparison
    from raylign.report.compare_text import comparison_text

    directory = comparison_directory(comparison)
    html = directory / "comparison.html"
    html.write_text(render_comparison(result), encoding="utf-8")
    write_json(directory / "comparison.json", comparison_json(result))
    return WrittenComparison(html=html, text=comparison_text(result))


def comparison_directory(comparison: Comparison) -> Path:
    """`<run.storage>/<run.name>` of the shared configuration, absolute."""
    run = comparison.base.run
    return Path(run.storage).expanduser().absolute() / run.name


def checkpoints(training: Path) -> dict[int, Path]:
    """Policies of a training by update, first to last."""
    found = {
        int(file.parents[1].name.rpartition("_")[2]): file.parents[1]
        for file in training.glob(f"step_*/{_CHECKPOINT_STATE}")
    }
    return {step: found[step] for step in sorted(found)}


def evenly_spaced(steps: Sequence[int], num: int) -> list[int]:
    """`num` of the steps (all, when there are fewer), the last among them."""
    num = min(num, len(steps))
    return [steps[-(-(position + 1) * len(steps) // num) - 1] for position in range(num)]


def _evaluate(
    shared: Phases,
    comparison: Comparison,
    seed: int,
    trained: Mapping[Trial, Run],
    reward: Path,
    reward_key: str,
) -> dict[str, tuple[Completion, ...]]:
    """Judged answers of one seed, by "before" and "<method>@<step>": one pool of actors, one set of prompts."""
    models: dict[str, str | Path] = {BEFORE: shared.model}
    for trial, run in trained.items():
        found = checkpoints(run.directory / "train")
        for step in evenly_spaced(list(found), comparison.compare.num_points):
            models[point_name(trial.method, step)] = found[step] / POLICY_DIR
    config = comparison.base.evaluate
    key = {
        "models": {name: model_fingerprint(model) for name, model in models.items()},
        "evaluate": config.model_dump(exclude={*FREE_KEYS, *DRIFT_KEYS}),
        **evaluation_inputs(config),
        "reward": reward_key,
        "robust": comparison.base.robust.model_dump(),  # with it the best of several answers is chosen
        "seed": seed,
    }

    def work(directory: Path) -> dict[str, Any]:
        options = dataclasses.replace(actor_options(comparison.base), ledger=shared.ledger)
        evaluations = evaluate_models(
            models, config=config, seed=seed, options=options, make_reward_fn=shared.reward_scorer(reward)
        )
        save_completions(directory / COMPLETIONS_FILE, {name: e.completions for name, e in evaluations.items()})
        return {"judge": dataclasses.asdict(next(iter(evaluations.values())).judge)}

    directory, _ = shared.run.phase(_evaluation(seed), key, work)
    return load_completions(directory / COMPLETIONS_FILE)


def _last_policies(model: str, trained: Mapping[Trial, Run]) -> dict[str, str | Path]:
    """The policy before training, and of every method the last checkpoint."""
    models: dict[str, str | Path] = {BEFORE: model}
    for trial, run in trained.items():
        found = list(checkpoints(run.directory / "train").values())
        if found:
            models[trial.method] = found[-1] / POLICY_DIR
    return models


def prompt_safety(comparison: Comparison) -> float:
    """Share of safe answers that makes a prompt safe: the strictest of the methods with a constraint, or with costs."""
    found = [trial.config.constraint for trial in comparison.trials if needs_cost(trial.config)]
    constraints = [constraint for constraint in found if constraint.kind != "none"] or found
    default = comparison.base.constraint.prompt_safety
    return max((constraint.prompt_safety for constraint in constraints), default=default)


def _evaluation(seed: int) -> str:
    """Name of the phase that evaluates one seed."""
    return f"evaluate-seed{seed}"


def point_name(method: str, step: int) -> str:
    """Name of a checkpoint in an evaluation."""
    return f"{method}@{step}"


def _collect(
    comparison: Comparison,
    directory: Path,
    trained: Mapping[Trial, Run],
    answers: Mapping[int, Mapping[str, tuple[Completion, ...]]],
    sampled: Mapping[str, SampledMeasures],
) -> ComparisonResult:
    seeds = tuple(comparison.compare.seeds)
    shared = read_ledger(directory / SHARED / LEDGER_DIR)
    before = tuple(answer for seed in seeds for answer in answers[seed][BEFORE])
    methods = []
    for name in comparison.compare.methods:
        trials = [next(t for t in trained if (t.method, t.seed) == (name, seed)) for seed in seeds]
        ledgers = [read_ledger(trained[trial].directory / LEDGER_DIR) for trial in trials]
        needed = [row for row in shared if row.stage in shared_phases(trials[0].config)]
        runs = [[*needed, *rows] for rows in ledgers]
        steps = sorted({int(key.partition("@")[2]) for key in answers[seeds[0]] if key.startswith(f"{name}@")})
        points = tuple(
            Point(
                step=step,
                comparison=compare_summaries(
                    before,
                    tuple(answer for seed in seeds for answer in answers[seed][point_name(name, step)]),
                    num_samples=comparison.base.evaluate.bootstrap_samples,
                    seed=comparison.base.run.seed,
                ),
                device_s=tuple(
                    device_seconds_until(rows, moment)
                    for rows, moment in zip(runs, _written_at(trials, trained, step), strict=True)
                ),
                flops=tuple(
                    flops_until(rows, moment)
                    for rows, moment in zip(runs, _written_at(trials, trained, step), strict=True)
                ),
            )
            for step in steps
        )
        methods.append(
            MethodResult(
                name=name,
                kind=trials[0].config.train.method,
                points=points,
                totals=tuple(total(rows) + total_reused(rows) for rows in runs),
                phases=tuple(totals(rows, by="phase") for rows in runs),
                fingerprint=common_fingerprint(row for rows in runs for row in rows),
                num_killed=len({row.id for rows in runs for row in rows if not row.is_finished}),
                sampled=sampled.get(name),
            )
        )
    return ComparisonResult(
        name=comparison.base.run.name,
        methods=tuple(methods),
        seeds=seeds,
        before=summarise(before, num_samples=comparison.base.evaluate.bootstrap_samples, seed=comparison.base.run.seed),
        baseline=comparison.compare.baseline,
        rerank=comparison.compare.rerank,
        target=comparison.compare.target,
        projections=tuple(comparison.compare.projections),
        projection_settings=PROJECTED,
        sampling=sampling_sentence(
            temperature=comparison.base.evaluate.temperature,
            max_new_tokens=comparison.base.evaluate.max_new_tokens,
            best_of=comparison.base.evaluate.best_of,
        ),
        prices=comparison.base.cost.prices,
        currency=comparison.base.cost.currency,
        samples=sampled_settings(comparison.base, prompt_safety=prompt_safety(comparison), before=sampled[BEFORE])
        if sampled
        else None,
    )


def common_fingerprint(rows: Iterable[LedgerRow]) -> str:
    """What all rows were measured on; "" when they differ, or when one does not say."""
    found = {row.fingerprint for row in rows}
    return found.pop() if len(found) == 1 else ""


def shared_phases(config: RunConfig) -> frozenset[str]:
    """Shared phases that a method could not do without, and is charged with.

    Plain preference losses need the reference log-probabilities of the features phase; whatever reads the reward needs
    the reward phase as well, and a constraint the cost phase. Costs that are only reported (`cost_model.source` without
    a constraint) are not charged.
    """
    train = config.train
    reads_reward = train.method != "offline" or train.objective == "label_confidence"
    reads_cost = config.constraint.kind != "none"
    return frozenset({"ingest", "features", *(["reward"] if reads_reward else []), *(["cost"] if reads_cost else [])})


def device_seconds_until(rows: Sequence[LedgerRow], moment: float) -> dict[str, float]:
    """Reserved device-seconds by kind up to a moment (seconds since 1970).

    An entry counts as reserved what it holds or what those nested in it hold together, whichever is more.
    """
    nested: dict[str, list[LedgerRow]] = {}
    for row in rows:
        nested.setdefault(row.parent, []).append(row)

    def reserved(row: LedgerRow) -> dict[str, float]:
        wall_s = min(row.wall_s, max(0.0, moment - row.started_at))
        own = {kind: count * wall_s for kind, count in row.devices.items()}
        below = _added(reserved(other) for other in nested.get(row.id, []))
        held = {kind: max(own.get(kind, 0.0), below.get(kind, 0.0)) for kind in {**own, **below}}
        return _added([held] if row.reused is None else [held, row.reused.device_s])

    return _added(reserved(row) for row in nested.get("", []))


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sums by kind."""
    total: dict[str, float] = {}
    for part in parts:
        for kind, seconds in part.items():
            total[kind] = total.get(kind, 0.0) + seconds
    return total


def flops_until(rows: Sequence[LedgerRow], moment: float) -> int:
    """Model FLOPs counted up to a moment; an entry that was open then counts by its share of time."""
    spent = 0.0
    for row in rows:
        elapsed = max(0.0, moment - row.started_at)
        share = min(1.0, elapsed / row.wall_s) if row.wall_s else float(elapsed > 0)
        spent += share * row.cost.counts.flops + (row.reused.counts.flops if row.reused is not None else 0)
    return round(spent)


def _written_at(trials: Sequence[Trial], trained: Mapping[Trial, Run], step: int) -> list[float]:
    """When the checkpoint of each trial was finished, seconds since 1970."""
    directories = (checkpoints(trained[trial].directory / "train")[step] for trial in trials)
    return [_finished_at(directory / _CHECKPOINT_STATE) for directory in directories]


def _finished_at(state: Path) -> float:
    """What the state of a checkpoint says, for one from before it did the time of the file, which a copy may lose."""
    found = json.loads(state.read_text(encoding="utf-8")).get("finished_at")
    return state.stat().st_mtime if found is None else float(found)
