"""`raylign calibrate`: reward models on the same cached states, under label noise, and driven to their maximum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raylign.calibrate_config import Calibration, RewardTrial, directory_name
from raylign.config import RunConfig, check_devices
from raylign.config_effects import RULE_KEYS
from raylign.errors import OutputExistsError, RaylignError, ResourceError, TrainingError
from raylign.evaluation.calibration import (
    FitOutcome,
    RoundOutcome,
    best_of_n_points,
    gold_gain,
    noisy_quality,
    round_points,
    unfamiliar,
)
from raylign.evaluation.metrics import bootstrap_mean
from raylign.models.loading import model_fingerprint, resolve_model
from raylign.report.calibrate_data import CalibratedModel, CalibratedReward, CalibrationResult
from raylign.runtime.candidates_job import harmful_prompts, make_candidates, read_candidates, read_gold
from raylign.runtime.check import check_packages
from raylign.runtime.evaluate_job import evaluation_inputs
from raylign.runtime.features_job import read_features
from raylign.runtime.pair_states import read_states
from raylign.runtime.phases import digest, renamed, write_json
from raylign.runtime.progress import progress_bar
from raylign.runtime.reward_trial import FitData, load_outcome, measure_fit, save_outcome
from raylign.runtime.round_judge import judge_rounds
from raylign.runtime.run_phases import CACHES, Phases, actor_options, check_demand, open_phases

SHARED = "shared"
_FIT_TIMEOUT_S = 3600.0

FitKey = tuple[tuple[str, ...], float, int]  # names of rewards that are fitted alike, share of flips, seed
Rounds = Mapping[tuple[str, float], Sequence[tuple[RoundOutcome, ...]]]  # by name and flips, one training per seed


def calibrate(calibration: Calibration) -> CalibrationResult:
    """Fit, judge and optimise every reward; Ray must be initialised.

    Everything is written below `<run.storage>/<run.name>`: `shared/` with the phases that all rewards read, and one run
    directory per trained reward and seed. A killed calibration goes on with run.resume=true; finished fits are kept.

    Raises:
        RaylignError: any of the leaves in `raylign.errors`, each naming the place and the cure.
    """
    base, settings, directory = calibration.base, calibration.calibrate, calibration.directory
    if directory.exists() and any(directory.iterdir()) and not base.run.resume:
        raise OutputExistsError(f"{directory} is in use; continue it with run.resume=true or choose another run.name")
    trained = [
        (trial.name, flip, trained_config(trial, flip))
        for flip in settings.trained_flips
        for trial in calibration.trials
        if trial.name in settings.trained
    ]
    for config in (base, *(config for *_, config in trained)):
        check_devices(config)
        check_packages(config)
        check_demand(config)
    harmful_prompts(base, settings.num_prompts)  # too few are better known before the features than after
    model = resolve_model(base.policy.model)
    shared = open_phases(renamed(base, storage=directory, name=SHARED), model, caches=directory.parent / CACHES)
    ingest, ingest_facts = shared.ingest()
    features, features_digest = shared.features(ingest, ingest_facts["fingerprint"])
    answers, answers_digest = _candidates(shared, calibration)
    fits, facts = _fits(shared, calibration, features, answers, digest([features_digest, answers_digest]))
    rounds: dict[tuple[str, float], list[tuple[RoundOutcome, ...]]] = {}
    for name, flip, config in trained:
        phases = open_phases(config, model)
        reward, reward_facts = phases.reward(features, features_digest, flips=flip)
        reward_key = digest([features_digest, reward_facts])
        cost = phases.cost(features, features_digest)
        checkpoint, _ = phases.train_online(ingest, ingest_facts["fingerprint"], reward, reward_key, cost)
        rounds.setdefault((name, flip), []).append(judge_rounds(phases, checkpoint))
    gold = read_gold(answers, num_prompts=settings.num_prompts)
    return collect(calibration, {key: load_outcome(path) for key, path in fits.items()}, gold, facts, rounds)


def trained_config(trial: RewardTrial, flip: float) -> RunConfig:
    """The configuration of a run that maximises a reward; a directory for each share of reversed labels."""
    config = trial.config
    name = config.run.name if flip == 0 else f"{config.run.name}-flips{flip:g}"
    return renamed(config, storage=Path(config.run.storage), name=name)


@dataclass(frozen=True, kw_only=True)
class WrittenCalibration:
    """What `write_calibration` leaves.

    Attributes:
        html: path of the self-contained report; `calibration.json` lies beside it.
        text: the tables for a terminal.
    """

    html: Path
    text: str


def write_calibration(calibration: Calibration, result: CalibrationResult) -> WrittenCalibration:
    """Write `calibration.html` and `calibration.json` into the calibration's directory."""
    from raylign.report.calibrate_data import calibration_json
    from raylign.report.calibrate_html import render_calibration
    from raylign.report.calibrate_text import calibration_text

    html = calibration.directory / "calibration.html"
    html.write_text(render_calibration(result), encoding="utf-8")
    write_json(calibration.directory / "calibration.json", calibration_json(result))
    return WrittenCalibration(html=html, text=calibration_text(result))


def _candidates(shared: Phases, calibration: Calibration) -> tuple[Path, str]:
    """Directory of judged answers with states, and what they were made of, from the shared run's phase."""
    config, settings = shared.config, calibration.calibrate
    prompts = harmful_prompts(config, settings.num_prompts)
    key = {
        "model": model_fingerprint(shared.model),
        "layers": shared.layers,
        "dtype": [config.policy.dtype, config.features.dtype, config.features.gpus_per_actor > 0],
        **evaluation_inputs(config.evaluate),
        "max_new_tokens": config.evaluate.max_new_tokens,
        "num_prompts": settings.num_prompts,
        "num_candidates": settings.num_candidates,
        "seed": config.run.seed,
    }

    def work(directory: Path) -> dict[str, Any]:
        make_candidates(
            prompts,
            model_path=shared.model,
            config=config,
            layers=shared.layers,
            num_candidates=settings.num_candidates,
            options=replace(actor_options(config), ledger=shared.ledger),
            output_dir=directory / "answers",
        )
        return {}

    shared.run.devices = {**shared.run.devices, "candidates": shared.run.devices["evaluate"]}
    directory, _ = shared.run.phase("candidates", key, work)
    return directory / "answers", digest(key)


def _fits(
    shared: Phases, calibration: Calibration, features: Path, answers: Path, inputs: str
) -> tuple[dict[FitKey, Path], dict[str, Any]]:
    """Files with every outcome, and facts of the test pairs, from the shared run's phase.

    The states live in this function alone, so that the driver is rid of them when trainings start.
    """
    settings = calibration.calibrate
    keys: list[FitKey] = [
        (names, flip, seed) for names in calibration.fits for flip in settings.flips for seed in settings.seeds
    ]
    configs = {name: calibration.trial(name, settings.seeds[0]).config for name in settings.rewards}
    key = {
        "inputs": inputs,
        "rewards": {
            name: {section: getattr(config, section).model_dump() for section in ("reward", "brme", "robust")}
            for name, config in configs.items()
        },
        "flips": settings.flips,
        "seeds": settings.seeds,
    }

    def path_of(directory: Path, key: FitKey) -> Path:
        names, flip, seed = key
        return directory / f"{directory_name(min(names))}-flips{flip}-seed{seed}.npz"  # whatever their order

    def work(directory: Path) -> dict[str, Any]:
        states = read_states(read_features(features), max_pairs=calibration.base.reward.max_pairs)
        candidates = read_candidates(answers, num_prompts=settings.num_prompts, num_candidates=settings.num_candidates)
        missing = [key for key in keys if not path_of(directory, key).exists()]
        facts = {
            "num_train_pairs": states.split.count("train"),
            "num_valid_pairs": states.split.count("valid"),
            "test_prompts": states.part("test")[2],
        }
        done = _run_fits(FitData.of(states, candidates), calibration, missing)
        del states, candidates
        for fit, outcome in progress_bar(done, label="fits", total=len(missing)):
            save_outcome(outcome, path_of(directory, fit))
        return facts

    shared.run.devices = {**shared.run.devices, "fits": {"cpu": ray.cluster_resources().get("CPU", 0.0)}}
    directory, facts = shared.run.phase("fits", key, work)
    return {fit: path_of(directory, fit) for fit in keys}, facts


def _run_fits(data: FitData, calibration: Calibration, fits: Sequence[FitKey]) -> Iterator[tuple[FitKey, FitOutcome]]:
    """Outcomes of Ray tasks of one CPU, as they finish; what is left is cancelled when one fails."""
    kinds = {names: calibration.trial(names[0], seed).config.reward.kind for names, _, seed in fits}
    memory = {names: _check_memory(data.fit_bytes(kind), kind) for names, kind in kinds.items()}
    shared = ray.put(data)
    del data  # the object store holds it now
    run = ray.remote(measure_fit)
    running = {
        run.options(num_cpus=1, memory=memory[names]).remote(
            shared, {name: calibration.trial(name, seed).config for name in names}, flip
        ): (names, flip, seed)
        for names, flip, seed in fits
    }
    try:
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=_FIT_TIMEOUT_S)
            if not done:
                raise ResourceError(
                    f"none of {len(running)} fits was done within {_FIT_TIMEOUT_S:g} s: another job may hold the CPUs; "
                    "continue with run.resume=true"
                )
            names, flip, seed = running.pop(done[0])
            try:
                yield (names, flip, seed), ray.get(done[0], timeout=_FIT_TIMEOUT_S)
            except ray.exceptions.RayTaskError as error:
                where = f"reward {names[0]!r} with {flip:.0%} flips and seed {seed}"
                if isinstance(error.cause, RaylignError):
                    error.cause.add_note(f"in {where}")
                    raise error.cause from error
                raise TrainingError(f"fitting {where}: {error.cause}") from error
    finally:
        for reference in running:
            ray.cancel(reference)


def _check_memory(fit_bytes: int, kind: str) -> int:
    """Memory that a fit of a kind reserves, so that no more run at once than fit.

    Raises:
        ResourceError: no node has that much.
    """
    largest = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if fit_bytes > largest:
        raise ResourceError(
            f"one fit of reward.kind={kind} needs about {fit_bytes / 2**30:.1f} GiB, the largest node has "
            f"{largest / 2**30:.1f} GiB: lower reward.max_pairs or features.layers"
        )
    return fit_bytes


def collect(
    calibration: Calibration,
    outcomes: Mapping[FitKey, FitOutcome],
    gold: np.ndarray,
    facts: Mapping[str, Any],
    rounds: Rounds,
) -> CalibrationResult:
    """What the report shows.

    Args:
        calibration: names, seeds, flips.
        outcomes: of every fit.
        gold: (P, N) of the candidates.
        facts: `num_train_pairs`, `num_valid_pairs` and `test_prompts`, the prompt of each test pair.
        rounds: of the trained rewards.
    """
    base, settings = calibration.base, calibration.calibrate
    samples, seed = base.evaluate.bootstrap_samples, base.run.seed
    fitted = {
        (names, flip): [outcomes[names, flip, seed] for seed in settings.seeds]
        for names in calibration.fits
        for flip in settings.flips
    }
    models = []
    for names in calibration.fits:
        config = calibration.trial(names[0], settings.seeds[0]).config
        by_flips = [fitted[names, flip] for flip in settings.flips]
        every = [outcome for group in by_flips for outcome in group]
        models.append(
            CalibratedModel(
                rewards=names,
                kind=config.reward.kind,
                loss=config.brme.loss if config.reward.kind == "brme" else None,
                num_heads=every[0].num_heads,
                by_flips=tuple(
                    noisy_quality(flip, group, facts["test_prompts"], num_samples=samples, seed=seed)
                    for flip, group in zip(settings.flips, by_flips, strict=True)
                ),
                signals=unfamiliar(by_flips[0], num_samples=samples, seed=seed),
                floor_share=max((o.floor_share for o in every if o.floor_share is not None), default=None),
                anchor_spread=max((o.anchor_spread for o in every if o.anchor_spread is not None), default=None),
                fit_s=sum(outcome.seconds for outcome in every) / len(every),
                warnings=tuple(dict.fromkeys(warning for outcome in every for warning in outcome.warnings)),
            )
        )
    model_of = {name: index for index, names in enumerate(calibration.fits) for name in names}
    proxies = {
        name: [[o.proxies[name] for o in fitted[calibration.fits[model_of[name]], flip]] for flip in settings.flips]
        for name in settings.rewards
    }
    first, num_candidates = next(iter(settings.rewards)), gold.shape[1]

    def against_first(name: str, flip: int) -> Any:
        mine, other = (gold_gain(proxies[one][flip], gold, num_candidates) for one in (name, first))
        return bootstrap_mean(mine - other, num_samples=samples, generator=np.random.default_rng(seed))

    return CalibrationResult(
        name=base.run.name,
        judge=base.evaluate.judge,
        policy=base.policy.model,
        data=base.data.path,
        models=tuple(models),
        rewards=tuple(
            CalibratedReward(
                name=name,
                model=model_of[name],
                rule=_rule(calibration.trial(name, settings.seeds[0]).config),
                w_nominal=_w_nominal(calibration.trial(name, settings.seeds[0]).config),
                best_of_n=tuple(best_of_n_points(one, gold, num_samples=samples, seed=seed) for one in proxies[name]),
                against_first=tuple(against_first(name, flip) for flip in range(len(settings.flips)))
                if name != first
                else (),
                policy_gradient=tuple(
                    round_points(rounds[name, flip], num_samples=samples, seed=seed)
                    for flip in settings.trained_flips
                    if (name, flip) in rounds
                ),
            )
            for name in settings.rewards
        ),
        flips=tuple(settings.flips),
        trained_flips=tuple(settings.trained_flips),
        seeds=tuple(settings.seeds),
        num_train_pairs=facts["num_train_pairs"],
        num_valid_pairs=facts["num_valid_pairs"],
        num_test_pairs=len(facts["test_prompts"]),
        num_prompts=settings.num_prompts,
        num_candidates=settings.num_candidates,
    )


def _rule(config: RunConfig) -> str:
    """The rule over members with what turns it, for people; "" for a single reward."""
    robust = config.robust
    if config.reward.kind == "hybrid":
        return ""
    parts: list[str] = [robust.rule]
    if robust.rule in RULE_KEYS:
        parts.append(f"{RULE_KEYS[robust.rule]}={getattr(robust, RULE_KEYS[robust.rule]):g}")
    if robust.set_type == "heads_global" and robust.rule in ("min", "brme"):
        parts.append("over heads_global")
    return ", ".join(parts)


def _w_nominal(config: RunConfig) -> float | None:
    return config.robust.w_nominal if config.reward.kind == "brme" and config.robust.rule == "brme" else None
