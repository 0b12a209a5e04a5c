"""`raylign calibrate`: reward models on the same cached states, under label noise, and driven to their maximum."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from raylign.calibrate_config import Calibration
from raylign.config import RunConfig, check_devices
from raylign.errors import OutputExistsError, RaylignError, ResourceError, TrainingError
from raylign.evaluation.calibration import (
    RoundOutcome,
    TrialOutcome,
    best_of_n_points,
    noisy_quality,
    round_points,
    unfamiliar,
)
from raylign.models.loading import model_fingerprint, resolve_model
from raylign.report.calibrate_data import CalibratedReward, CalibrationResult
from raylign.rewards.confidence import fit_temperature
from raylign.rewards.fit import predict
from raylign.rewards.gaussian import GaussianHeads, share_at_floor
from raylign.rewards.member_facts import anchor_spread
from raylign.rewards.posterior import RewardPosterior
from raylign.runtime.candidates_job import Candidates, harmful_prompts, make_candidates, read_candidates
from raylign.runtime.check import check_packages
from raylign.runtime.evaluate_job import evaluation_inputs
from raylign.runtime.features_job import read_features
from raylign.runtime.pair_states import PairStates, read_states
from raylign.runtime.phases import digest, renamed
from raylign.runtime.pipeline import Phases, actor_options, check_demand, open_phases
from raylign.runtime.reward_job import Held, head_fitter
from raylign.runtime.robust import robust_rewards
from raylign.runtime.round_judge import judge_rounds

SHARED = "shared"
_FIT_TIMEOUT_S = 3600.0


def calibrate(calibration: Calibration) -> CalibrationResult:
    """Fit, judge and optimise every reward; Ray must be initialised.

    Everything is written below `<run.storage>/<run.name>`: `shared/` with the phases that all rewards read, and one run
    directory per trained reward and seed. A killed calibration goes on with run.resume=true.

    Raises:
        RaylignError: any of the leaves in `raylign.errors`, each naming the place and the cure.
    """
    base, settings, directory = calibration.base, calibration.calibrate, calibration.directory
    if directory.exists() and any(directory.iterdir()) and not base.run.resume:
        raise OutputExistsError(f"{directory} is in use; continue it with run.resume=true or choose another run.name")
    trained = [trial for trial in calibration.trials if trial.name in settings.trained]
    for config in (base, *(trial.config for trial in trained)):
        check_devices(config)
        check_packages(config)
        check_demand(config)
    model = resolve_model(base.policy.model)
    shared = open_phases(renamed(base, storage=directory, name=SHARED), model)
    ingest, ingest_facts = shared.ingest()
    features, features_digest = shared.features(ingest, ingest_facts["fingerprint"])
    candidates = _candidates(shared, calibration)
    states = read_states(read_features(features), max_pairs=base.reward.max_pairs)
    outcomes = _measure(states, candidates, calibration)
    rounds: dict[str, list[tuple[RoundOutcome, ...]]] = {}
    for trial in trained:
        phases = open_phases(trial.config, model)
        reward, reward_facts = phases.reward(features, features_digest)
        reward_key = digest([features_digest, reward_facts])
        phases.train_online(ingest, ingest_facts["fingerprint"], reward, reward_key)
        rounds.setdefault(trial.name, []).append(judge_rounds(phases))
    return CalibrationResult(
        name=base.run.name,
        rewards=tuple(
            _collect(name, outcomes, candidates, calibration, rounds.get(name, [])) for name in settings.rewards
        ),
        flips=tuple(settings.flips),
        seeds=tuple(settings.seeds),
        num_train_pairs=states.split.count("train"),
        num_valid_pairs=states.split.count("valid"),
        num_test_pairs=states.split.count("test"),
        num_prompts=settings.num_prompts,
        num_candidates=settings.num_candidates,
    )


def _candidates(shared: Phases, calibration: Calibration) -> Candidates:
    """Judged answers with states, from the shared run's phase."""
    config, settings = shared.config, calibration.calibrate
    prompts = harmful_prompts(config, settings.num_prompts)
    key = {
        "model": model_fingerprint(shared.model),
        "layers": shared.layers,
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

    directory, _ = shared.run.phase("candidates", key, work)
    return read_candidates(
        directory / "answers", num_prompts=settings.num_prompts, num_candidates=settings.num_candidates
    )


Outcomes = dict[tuple[str, float], list[TrialOutcome]]  # by name and share of flips, one per seed


def _measure(states: PairStates, candidates: Candidates, calibration: Calibration) -> Outcomes:
    """Every reward under every share of flips and every seed, as Ray tasks of one CPU."""
    shared = ray.put((states, candidates))
    run = ray.remote(measure_trial).options(num_cpus=1)
    jobs = {
        (trial.name, flip, trial.seed): run.remote(shared, trial.config, flip)
        for flip in calibration.calibrate.flips
        for trial in calibration.trials
    }
    outcomes: Outcomes = {}
    for (name, flip, seed), reference in jobs.items():
        try:
            outcome = ray.get(reference, timeout=_FIT_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise ResourceError(
                f"reward {name!r} with {flip:.0%} flips and seed {seed} was not fitted within {_FIT_TIMEOUT_S:g} s: "
                "another job may hold the CPUs"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaylignError):
                raise error.cause from error
            raise TrainingError(f"fitting reward {name!r}, {flip:.0%} flips, seed {seed}: {error.cause}") from error
        outcomes.setdefault((name, flip), []).append(outcome)
    return outcomes


def measure_trial(shared: tuple[PairStates, Candidates], config: RunConfig, flip: float) -> TrialOutcome:
    """Fit one reward to partly reversed pairs, and apply it to the test pairs and the candidates.

    Args:
        shared: states of pairs and of candidates.
        config: of the reward; its seed is that of the flips too.
        flip: share of training and validation pairs that are reversed; the same pairs for every reward.
    """
    torch.set_num_threads(1)
    states, candidates = shared
    chosen, rejected, groups = states.part("train")
    train = reversed_pairs(chosen, rejected, share=flip, seed=config.run.seed)
    valid = reversed_pairs(*states.part("valid")[:2], share=flip, seed=config.run.seed + 1)
    start = time.monotonic()
    head = head_fitter(train, groups, valid, config)(torch.arange(len(groups)))
    seconds = time.monotonic() - start
    temperature = fit_temperature(Held.of(head, *valid).margin)
    test = Held.of(head, *states.part("test")[:2])
    of_candidates = predict(head, candidates.states)
    answers = torch.cat([test.chosen.head_rewards, test.rejected.head_rewards])
    scales = test.chosen.head_scales
    margin = test.margin
    return TrialOutcome(
        num_heads=head.num_heads,
        margin_mean=margin.mean.double().numpy(),
        margin_variance=margin.variance.double().numpy(),
        preference_prob=margin.preference_prob(temperature).double().numpy(),
        temperature=temperature,
        proxy=robust_rewards(of_candidates, config.robust).double().numpy().reshape(candidates.gold.shape),
        familiar=_signals(predict(head, candidates.familiar)),
        shuffled=_signals(predict(head, candidates.shuffled)),
        floor_share=float(share_at_floor(scales, head.sigma_floor).mean())
        if scales is not None and isinstance(head, GaussianHeads)
        else None,
        anchor_spread=anchor_spread(answers) if head.num_heads > 1 else None,
        seconds=seconds,
    )


def reversed_pairs(
    chosen: torch.Tensor, rejected: torch.Tensor, *, share: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs with the order of exactly round(share x N) of them reversed, chosen by the seed.

    Args:
        chosen: (N, L, D).
        rejected: likewise.
        share: in [0, 1].
        seed: pairs reversed at a smaller share are reversed at a larger one too.
    """
    num_pairs = len(chosen)
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
    is_reversed = torch.zeros(num_pairs, dtype=torch.bool)
    is_reversed[order[: round(share * num_pairs)]] = True
    mask = is_reversed[:, None, None]
    return torch.where(mask, rejected, chosen), torch.where(mask, chosen, rejected)


def _signals(belief: RewardPosterior) -> dict[str, Any]:
    """What may tell unfamiliar input, higher the stranger."""
    found: dict[str, Any] = {}
    if belief.num_heads > 1:
        found["disagreement"] = belief.disagreement.double().numpy()
    if belief.head_scales is not None:
        found["least sigma"] = belief.head_scales.double().amin(-1).numpy()
    return found


def _collect(
    name: str,
    outcomes: Outcomes,
    candidates: Candidates,
    calibration: Calibration,
    rounds: list[tuple[RoundOutcome, ...]],
) -> CalibratedReward:
    settings, samples = calibration.calibrate, calibration.base.evaluate.bootstrap_samples
    config = calibration.trial(name, settings.seeds[0]).config
    by_flips = [outcomes[name, flip] for flip in settings.flips]
    clean, seed = by_flips[0], calibration.base.run.seed
    every = [outcome for group in by_flips for outcome in group]
    return CalibratedReward(
        name=name,
        kind=config.reward.kind,
        num_heads=clean[0].num_heads,
        rule=config.robust.rule,
        by_flips=tuple(
            noisy_quality(flip, group, num_samples=samples, seed=seed)
            for flip, group in zip(settings.flips, by_flips, strict=True)
        ),
        best_of_n=tuple(
            best_of_n_points([outcome.proxy for outcome in group], candidates.gold, num_samples=samples, seed=seed)
            for group in by_flips
        ),
        policy_gradient=round_points(rounds, num_samples=samples, seed=seed),
        signals=unfamiliar(clean),
        floor_share=clean[0].floor_share,
        anchor_spread=clean[0].anchor_spread,
        fit_s=sum(outcome.seconds for outcome in every) / len(every),
    )
