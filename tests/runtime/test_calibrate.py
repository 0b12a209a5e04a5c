"""Fits of a calibration on made-up states. Ray is real where marked; states, answers and the judge are not."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from made_up_calibration import NUM_PROMPTS, made_up_calibration, made_up_outcome, made_up_result
from tiny_rounds import tiny_round

from raylign.errors import CacheMismatchError, DataError, OutputExistsError, ResourceError, TrainingError
from raylign.evaluation.calibration import FitOutcome
from raylign.report.calibrate_data import calibration_json
from raylign.runtime import calibrate as module
from raylign.runtime import reward_job, reward_trial
from raylign.runtime.calibrate import calibrate, trained_config, write_calibration
from raylign.runtime.candidates_job import Candidates
from raylign.runtime.pair_states import PairStates, reversed_pairs
from raylign.runtime.phases import Run
from raylign.runtime.reward_job import Held
from raylign.runtime.reward_trial import FitData, load_outcome, measure_fit, save_outcome
from raylign.runtime.round_judge import _outcome
from raylign.runtime.run_phases import Phases

NUM_LAYERS, WIDTH, PER_PROMPT = 2, 6, 8
FAST = {
    "rewards": {
        "single": {"reward.kind": "hybrid"},
        "mean": {"reward.kind": "ensemble", "robust.rule": "mean"},
        "min": {"reward.kind": "ensemble", "robust.rule": "min"},
        "brme": {"reward.kind": "brme", "brme.epochs": 2},
    },
    "num_candidates": PER_PROMPT,
}
REWARD = {"epochs": 1, "num_heads": 3, "folds": 2}


def made_up_states() -> tuple[PairStates, Candidates]:
    """Chosen states lie on one side of a random direction, which is also what gold is of."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(NUM_LAYERS, WIDTH)) / 2
    num_pairs = 300
    noise = rng.normal(size=(2, num_pairs, NUM_LAYERS, WIDTH))
    answers = rng.normal(size=(NUM_PROMPTS * PER_PROMPT, NUM_LAYERS, WIDTH))
    first = (np.arange(len(answers)) % PER_PROMPT) < 4
    states = PairStates(
        chosen=torch.from_numpy((noise[0] + direction / 2).astype(np.float16)),
        rejected=torch.from_numpy((noise[1] - direction / 2).astype(np.float16)),
        prompt_key=[f"{i // 2:04x}" for i in range(num_pairs)],
        split=[("train", "train", "train", "valid", "test")[(i // 2) % 5] for i in range(num_pairs)],
    )
    candidates = Candidates(
        gold=(answers * direction).sum((1, 2)).reshape(NUM_PROMPTS, PER_PROMPT),
        states=answers.astype(np.float16),
        familiar=answers[first].astype(np.float16),
        shuffled=(3 * answers[first]).astype(np.float16),
    )
    return states, candidates


@pytest.fixture(scope="module")
def data() -> FitData:
    return FitData.of(*made_up_states())


@pytest.fixture
def calibration(tmp_path):
    return made_up_calibration(tmp_path, calibrate=FAST, reward=REWARD)


def configs(calibration, *names: str, seed: int = 0):
    return {name: calibration.trial(name, seed).config for name in names}


def assert_equal(ours: FitOutcome, theirs: FitOutcome) -> None:
    """Alike bit for bit, but for the seconds."""
    for field in dataclasses.fields(FitOutcome):
        if field.name != "seconds":
            np.testing.assert_equal(getattr(ours, field.name), getattr(theirs, field.name))


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 10), (0.25, 26), (1.0, 103)])
def test_exactly_the_share_is_reversed(share, count):
    chosen, rejected = torch.zeros(103, 1, 1), torch.ones(103, 1, 1)
    first, second = reversed_pairs(chosen, rejected, share=share, seed=3)
    assert int(first.sum()) == count
    assert torch.equal(first + second, torch.ones(103, 1, 1))  # both sides of a pair, and no other pair's


def test_flips_nest_and_depend_on_the_seed():
    pairs = torch.zeros(200, 1, 1), torch.ones(200, 1, 1)
    few, many = (reversed_pairs(*pairs, share=share, seed=1)[0].bool() for share in (0.1, 0.25))
    assert bool((many | ~few).all())
    assert not torch.equal(few, reversed_pairs(*pairs, share=0.1, seed=2)[0].bool())


def test_the_reward_that_is_trained_on_is_the_one_that_is_judged(data, calibration, monkeypatch):
    """Both reverse the same labels; temperatures differ, one is of validation pairs."""
    config = calibration.trial("min", 1).config
    monkeypatch.setattr(reward_job, "read_states", lambda *_, **__: made_up_states()[0])
    fitted = reward_job.fit_reward(None, config=config, flips=0.25)
    judged, noiseless = (measure_fit(data, {"min": config}, flip).margin_mean for flip in (0.25, 0.0))
    margin = Held.of(fitted.full, *map(torch.from_numpy, data.test)).margin.mean.numpy()
    np.testing.assert_allclose(margin, judged, rtol=1e-5, atol=1e-6)
    assert np.abs(margin - noiseless).max() > 0.01


def test_trainings_on_noisy_labels_have_directories_of_their_own(calibration):
    trial = calibration.trial("min", 1)
    assert trained_config(trial, 0.0).run == trial.config.run
    assert trained_config(trial, 0.25).run.name == f"{trial.config.run.name}-flips0.25"
    assert trained_config(trial, 0.25).run.storage == trial.config.run.storage


def test_a_fit_finds_the_direction_and_says_what_it_is(data, calibration):
    outcome = measure_fit(data, configs(calibration, "brme"), 0.0)
    assert (outcome.margin_mean > 0).mean() > 0.8
    assert outcome.proxies["brme"].shape == (NUM_PROMPTS, PER_PROMPT)
    assert np.corrcoef(outcome.proxies["brme"].ravel(), data.candidates.gold.ravel())[0, 1] > 0.7
    assert set(outcome.familiar) == set(outcome.shuffled) == {"disagreement", "least sigma"}
    assert outcome.familiar["disagreement"].shape == (NUM_PROMPTS, 4)
    assert outcome.shuffled["disagreement"].mean() > outcome.familiar["disagreement"].mean()
    assert outcome.num_heads == 3
    assert 0 <= outcome.floor_share <= 1
    single = measure_fit(data, configs(calibration, "single"), 0.0)
    assert (single.num_heads, single.familiar, single.floor_share, single.anchor_spread) == (1, {}, None, None)
    assert not single.margin_variance.any()


def test_rules_share_the_fit_and_differ_in_their_proxy(data, calibration):
    both = measure_fit(data, configs(calibration, "mean", "min"), 0.0)
    assert (both.proxies["min"] <= both.proxies["mean"] + 1e-6).all()
    assert (both.proxies["min"] < both.proxies["mean"]).any()
    alone = measure_fit(data, configs(calibration, "min"), 0.0)
    np.testing.assert_array_equal(alone.proxies["min"], both.proxies["min"])
    np.testing.assert_array_equal(alone.margin_mean, both.margin_mean)


def test_label_noise_costs_accuracy_and_certainty(data, calibration):
    clean, noisy = (
        [measure_fit(data, configs(calibration, "single", seed=seed), flip) for seed in (0, 1)] for flip in (0.0, 0.4)
    )
    accuracy = [np.mean([(one.margin_mean > 0).mean() for one in fits]) for fits in (clean, noisy)]
    assert accuracy[1] < accuracy[0] - 0.02
    certainty = [np.mean([np.abs(one.logits).mean() for one in fits]) for fits in (clean, noisy)]
    assert certainty[1] < 0.7 * certainty[0]


def test_a_fit_tells_what_it_was_warned_of(data, calibration, monkeypatch):
    fitter = reward_trial.head_fitter

    def warns(*args, **kwargs):
        for _ in range(2):
            warnings.warn("sigma lies on its floor", stacklevel=1)
        return fitter(*args, **kwargs)

    monkeypatch.setattr(reward_trial, "head_fitter", warns)
    assert measure_fit(data, configs(calibration, "single"), 0.0).warnings == ("sigma lies on its floor",)


def test_outcomes_survive_the_disk(tmp_path):
    outcome = made_up_outcome(("brme w=0", "b"), np.zeros((NUM_PROMPTS, 8)), seed=0, warnings=("w", "v"))
    save_outcome(outcome, tmp_path / "fit.npz")
    back = load_outcome(tmp_path / "fit.npz")
    assert_equal(back, outcome)
    assert back.seconds == outcome.seconds
    assert list(back.proxies) == ["brme w=0", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["fit.npz"]


def test_a_killed_calibration_fits_what_is_missing(data, calibration, tmp_path, monkeypatch):
    """Real: phase, files, keys. Faked: the states and the fits, the first of which is followed by a kill."""
    asked = []

    def run_fits(_, calibration, fits):
        asked.append(len(fits))
        for index, (names, flip, seed) in enumerate(fits):
            if index == 1 and len(asked) == 1:
                raise KeyboardInterrupt
            yield (names, flip, seed), made_up_outcome(names, data.candidates.gold, seed=seed, flip=flip)

    states = PairStates(
        chosen=torch.zeros(3, 1, 1),
        rejected=torch.zeros(3, 1, 1),
        prompt_key=["a", "b", "c"],
        split=["train", "valid", "test"],
    )
    monkeypatch.setattr(module, "read_features", lambda _: None)
    monkeypatch.setattr(module, "read_states", lambda *_, **__: states)
    monkeypatch.setattr(module, "read_candidates", lambda *_, **__: data.candidates)
    monkeypatch.setattr(module, "_run_fits", run_fits)
    monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": 2.0})
    shared = Phases(calibration.base, Run(tmp_path / "shared"), "model")
    with pytest.raises(KeyboardInterrupt):
        module._fits(shared, calibration, tmp_path, tmp_path, "inputs")
    fits, facts = module._fits(shared, calibration, tmp_path, tmp_path, "inputs")
    assert asked == [12, 11]  # three models, two shares, two seeds
    assert len({path.name for path in fits.values()}) == 12
    assert all(path.exists() for path in fits.values())
    assert facts == {"num_train_pairs": 1, "num_valid_pairs": 1, "test_prompts": ["c"]}
    module._fits(shared, calibration, tmp_path, tmp_path, "inputs")
    assert asked == [12, 11]
    with pytest.raises(CacheMismatchError, match="inputs: was 'inputs', now 'others'"):
        module._fits(shared, calibration, tmp_path, tmp_path, "others")


@pytest.mark.ray
@pytest.mark.slow
def test_the_whole_calibration_and_its_resume(ray_cluster, tmp_path):
    """On the embedded model and data; about 40 seconds."""
    small = {
        "data": {"max_pairs": 240},
        "evaluate": {"max_new_tokens": 8, "bootstrap_samples": 100},
        "reward": REWARD,
        "calibrate": {
            "rewards": {name: FAST["rewards"][name] for name in ("single", "mean", "min")},
            "num_prompts": 4,
            "num_candidates": 5,
        },
    }
    calibration = made_up_calibration(tmp_path, **small)
    first = calibrate(calibration)
    assert [(model.rewards, model.num_heads) for model in first.models] == [(("single",), 1), (("mean", "min"), 3)]
    assert [point.step for point in first.rewards[1].best_of_n[0]] == [1, 2, 4, 5]
    assert first.num_train_pairs + first.num_valid_pairs + first.num_test_pairs == 240
    assert len(first.models[1].signals[0].familiar) == 16
    with pytest.raises(OutputExistsError):
        calibrate(calibration)
    again = calibrate(made_up_calibration(tmp_path, **small, run={"resume": True}))
    assert calibration_json(again) == calibration_json(first)
    small["calibrate"]["rewards"] = {name: FAST["rewards"][name] for name in ("single", "min", "mean")}
    reordered = calibrate(made_up_calibration(tmp_path, **small, run={"resume": True}))
    assert [reward.best_of_n for reward in reordered.rewards] == [first.rewards[i].best_of_n for i in (0, 2, 1)]
    assert "Held-out pairs" in write_calibration(calibration, first).text


@pytest.mark.ray
def test_tasks_say_what_plain_calls_say(ray_cluster, data, calibration):
    fits = [(("mean", "min"), 0.25, 1), (("brme",), 0.0, 0)]
    found = dict(module._run_fits(data, calibration, fits))
    assert set(found) == set(fits)
    for (names, flip, seed), outcome in found.items():
        assert outcome.warnings == ()
        assert_equal(outcome, measure_fit(data, configs(calibration, *names, seed=seed), flip))


@pytest.mark.ray
def test_a_failing_fit_is_named(ray_cluster, data, calibration):
    states = data.train[0].copy()
    states[3] = np.nan
    broken = dataclasses.replace(data, train=(states, data.train[1]))
    with pytest.raises((DataError, TrainingError)) as caught:
        list(module._run_fits(broken, calibration, [(("single",), 0.25, 1)]))
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "reward 'single' with 25% flips and seed 1" in told
    shapeless = dataclasses.replace(data, test=(data.test[0][:, :1], data.test[1][:, :1]))
    with pytest.raises(Exception, match="must be") as caught:
        list(module._run_fits(shapeless, calibration, [(("single",), 0.0, 0)]))
    assert caught.value.__notes__ == ["in reward 'single' with 0% flips and seed 0"]


@pytest.mark.ray
def test_fits_that_no_node_can_hold_are_refused(ray_cluster):
    with pytest.raises(ResourceError, match=r"laplace needs about 1048576\.0 GiB, .* lower reward\.max_pairs"):
        module._check_memory(2**50, "laplace")
    assert module._check_memory(1000, "hybrid") == 1000


def test_a_fit_of_a_full_covariance_asks_for_its_matrices(data):
    num_weights = NUM_LAYERS * WIDTH
    more = data.fit_bytes("laplace") - data.fit_bytes("ensemble")
    assert more > 4 * 8 * num_weights**2


def test_a_directory_in_use_is_refused_before_anything_starts(tmp_path):
    calibration = made_up_calibration(tmp_path)
    calibration.directory.mkdir()
    (calibration.directory / "file").write_text("")
    with pytest.raises(OutputExistsError, match=r"run\.resume=true"):
        calibrate(calibration)


def test_what_is_written_can_be_read(tmp_path):
    calibration = made_up_calibration(tmp_path)
    calibration.directory.mkdir()
    result = made_up_result(tmp_path)
    written = write_calibration(calibration, result)
    assert written.html == tmp_path / "made-up" / "calibration.html"
    content = json.loads((tmp_path / "made-up" / "calibration.json").read_text())
    assert [reward["name"] for reward in content["rewards"]] == ["single", "brme w=0", "brme w=0.5"]
    assert len(content["models"][0]["by_flips"][0]["curve"]["counts"]) == 10
    assert "Held-out pairs" in written.text


def test_collected_facts_are_the_worst_of_all_fits(tmp_path):
    result = made_up_result(tmp_path)
    single, brme = result.models
    assert (single.rewards, brme.rewards) == (("single",), ("brme w=0", "brme w=0.5"))
    assert [reward.rule for reward in result.rewards] == ["", "brme, w_nominal=0", "brme, w_nominal=0.5"]
    assert [reward.w_nominal for reward in result.rewards] == [None, 0, 0.5]
    assert [reward.model for reward in result.rewards] == [0, 1, 1]
    assert (brme.fit_s, brme.floor_share, brme.anchor_spread) == (2.5, 0.2, 0.4)
    assert [noisy.flip_rate for noisy in brme.by_flips] == [0, 0.25]


def test_rounds_keep_their_prompts_apart():
    round_ = tiny_round(3, 4)
    gold = np.arange(12.0)
    outcome = _outcome(round_, gold)
    assert outcome.gold.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    np.testing.assert_array_equal(outcome.proxy.ravel(), round_.rewards)
    ratios = [float(item.rollout.sampler_logps.sum() - item.reference_token_logps.sum()) for item in round_.scored]
    assert outcome.kl == pytest.approx(np.mean(ratios), abs=1e-6)
