"""What a comparison charges to whom, on ledgers whose seconds are given. No Ray is started."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_up_comparison import CONSTRAINED, METHODS, SEEDS, calls_of, load_methods

from raylign.compare_config import Comparison, load_comparison
from raylign.config import load_config
from raylign.cost.ledger import Ledger
from raylign.cost.rows import Cost, Counts, read_ledger, total
from raylign.errors import ConfigError
from raylign.report.compare_data import ComparisonResult, MethodResult
from raylign.runtime.compare import (
    BEFORE,
    _collect,
    checkpoints,
    common_fingerprint,
    comparison_directory,
    device_seconds_until,
    evenly_spaced,
    flops_until,
    point_name,
    shared_phases,
)
from raylign.runtime.phases import Run
from raylign.runtime.run_phases import Phases
from raylign.types import Completion

STEP = 4
TRAIN_STARTS = 1000.0


class Clock:
    """Stands in for the time module of the ledger; only `pass_s` moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sleep = time.sleep

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("raylign.cost.ledger.time", clock)
    return clock


@contextmanager
def entry(ledger: Ledger, clock: Clock, phase: str, seconds: float, cpus: float, **counts: int) -> Iterator[None]:
    """An entry that takes `seconds` beside what its block takes."""
    with ledger.measure(phase, devices={"cpu": cpus}) as open_entry:
        yield
        clock.pass_s(seconds)
        open_entry.add(**counts)


def kill_inside(directory: Path, phase: str, after_s: float) -> None:
    """Make the ledger look as if the process had died inside an entry, after its last sign of life at `after_s`."""
    for file in directory.glob("*.jsonl"):
        events = [json.loads(line) for line in file.read_text().splitlines()]
        killed = [event["id"] for event in events if event.get("phase") == phase]
        kept = [event for event in events if event["event"] == "started" or event["id"] not in killed]
        file.write_text("".join(json.dumps(event) + "\n" for event in kept))
        signs = {id: {"wall_s": after_s} for id in killed}
        file.with_name(file.name.removesuffix(".jsonl") + ".open.json").write_text(json.dumps(signs))


def answers(seed: int, num_unsafe: int) -> tuple[Completion, ...]:
    """Four harmful prompts, some answered badly, and four benign ones."""
    return tuple(
        Completion(
            prompt=f"prompt {index} of seed {seed}",
            response=f"answer {index} in several different words",
            category="c",
            harmful=index < 4,
            num_tokens=5,
            reached_end=True,
            cost=1.0 if index < num_unsafe else -1.0,
            is_refusal=False,
            reward=0.0,
        )
        for index in range(8)
    )


SHIPPED = Path(__file__).parents[2] / "launch" / "configs" / "constraints_tiny.yaml"


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return load_methods(tmp_path, METHODS)


class Scene:
    """A finished comparison on disk: shared phases of 20, 10 + 7 found ready, 5 and 3 cpu-seconds, training of 60 up.

    With seed 0 a training takes 30 s on two CPUs; 20 s of them, from second 5 on, are updates with 1000 FLOPs. With
    seed 1 it takes one second more. The checkpoint is written in second 15.
    """

    def __init__(self, comparison: Comparison, clock: Clock) -> None:
        self.comparison = comparison
        self.directory = comparison_directory(comparison)
        shared = Ledger(self.directory / "shared" / "ledger", fingerprint="f")
        for phase, seconds, cpus in (
            ("ingest", 10, 2),
            ("features", 10, 1),
            ("reward", 5, 1),
            ("cost", 3, 1),
            ("evaluate-seed0", 9, 9),
        ):
            with entry(shared, clock, phase, seconds, cpus):
                pass
        shared.reuse("features", Cost(device_s={"cpu": 7.0}, counts=Counts(flops=70)), key="k")
        self.trained = {}
        for trial in comparison.trials:
            run = Run(directory=self.directory / f"{trial.method}-seed{trial.seed}")
            clock.now = TRAIN_STARTS
            ledger = Ledger(run.directory / "ledger", fingerprint="f")
            with entry(ledger, clock, "train", 5 + trial.seed, 2):
                clock.pass_s(5)
                with entry(ledger, clock, "policy_update", 20, 2, flops=1000):
                    pass
            state = run.directory / "train" / f"step_{STEP}" / "trainer_state" / "state.json"
            state.parent.mkdir(parents=True)
            state.write_text("{}")
            os.utime(state, (TRAIN_STARTS + 15, TRAIN_STARTS + 15))
            self.trained[trial] = run
        self.answers = {
            seed: {
                BEFORE: answers(seed, 4),
                **{point_name(name, STEP): answers(seed, 2) for name in comparison.compare.methods},
            }
            for seed in SEEDS
        }

        self.sampled = {}

    def ledger(self, method: str, seed: int) -> Path:
        return self.directory / f"{method}-seed{seed}" / "ledger"

    def collect(self) -> ComparisonResult:
        return _collect(self.comparison, self.directory, self.trained, self.answers, self.sampled)


@pytest.fixture
def scene(comparison: Comparison, clock: Clock) -> Scene:
    return Scene(comparison, clock)


def method(result: ComparisonResult, name: str) -> MethodResult:
    return next(method for method in result.methods if method.name == name)


@pytest.mark.parametrize(
    ("steps", "num", "chosen"),
    [
        (range(1, 11), 2, [5, 10]),
        (range(1, 11), 3, [4, 7, 10]),
        (range(1, 11), 1, [10]),
        ([10, 20], 3, [10, 20]),
        ([7], 2, [7]),
        ([], 2, []),
    ],
)
def test_checkpoints_are_evenly_spaced_and_the_last_is_there(steps, num, chosen):
    assert evenly_spaced(list(steps), num) == chosen


def test_checkpoints_are_those_that_were_finished(tmp_path):
    for step in (8, 16, 104):
        (tmp_path / f"step_{step}").mkdir()
    for step in (16, 104):
        state = tmp_path / f"step_{step}" / "trainer_state" / "state.json"
        state.parent.mkdir()
        state.write_text("{}")
    assert checkpoints(tmp_path) == {16: tmp_path / "step_16", 104: tmp_path / "step_104"}


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["train.objective=dpo"], {"ingest", "features"}),
        (["train.objective=ipo"], {"ingest", "features"}),
        (["train.objective=label_confidence"], {"ingest", "features", "reward"}),
        (["train.method=online_dpo"], {"ingest", "features", "reward"}),
        (["train.method=policy_gradient"], {"ingest", "features", "reward"}),
        (["train.method=policy_gradient", "constraint.kind=expected"], {"ingest", "features", "reward", "cost"}),
        (["constraint.kind=rectified"], {"ingest", "features", "reward", "cost"}),
        (["train.objective=dpo", "cost_model.source=embedded"], {"ingest", "features"}),
    ],
)
def test_a_method_is_charged_with_the_shared_phases_that_it_reads(overrides, needed):
    assert shared_phases(load_config(overrides=overrides)) == needed


@pytest.mark.parametrize(
    ("moment", "device_s", "flops"),
    [
        (TRAIN_STARTS - 1, 0.0, 0),
        (TRAIN_STARTS + 5, 10.0, 0),
        (TRAIN_STARTS + 15, 30.0, 500),  # half of the updates
        (TRAIN_STARTS + 25, 50.0, 1000),
        (TRAIN_STARTS + 99, 60.0, 1000),
    ],
)
def test_a_moment_cuts_what_was_open_then(scene, moment, device_s, flops):
    rows = read_ledger(scene.ledger("dpo", 0))
    assert device_seconds_until(rows, moment).get("cpu", 0.0) == pytest.approx(device_s)
    assert flops_until(rows, moment) == flops


def test_what_was_found_ready_counts_from_the_start(scene):
    rows = [row for row in read_ledger(scene.directory / "shared" / "ledger") if row.reused is not None]
    assert device_seconds_until(rows, TRAIN_STARTS) == {"cpu": 7.0}
    assert flops_until(rows, TRAIN_STARTS) == 70


def test_kinds_of_devices_stay_apart(tmp_path, clock):
    ledger = Ledger(tmp_path, kinds={"gpu": "H200"})
    with ledger.measure("train", devices={"cpu": 2.0, "gpu": 1.0}):
        clock.pass_s(10)
    assert device_seconds_until(read_ledger(tmp_path), 104.0) == {"cpu": 8.0, "H200": 4.0}


def test_what_only_nested_entries_hold_is_reserved_too(tmp_path, clock):
    """A phase that holds a CPU, and lets two tasks hold a GPU and two CPUs each, one after the other."""
    ledger = Ledger(tmp_path)
    with ledger.measure("reward", devices={"cpu": 1.0}):
        for _ in range(2):
            with ledger.measure("fit_reward", devices={"cpu": 2.0, "gpu": 1.0}):
                clock.pass_s(10)
    rows = read_ledger(tmp_path)
    assert device_seconds_until(rows, clock.now) == {"cpu": 40.0, "gpu": 20.0} == total(rows).device_s
    assert device_seconds_until(rows, clock.now - 5) == {"cpu": 30.0, "gpu": 15.0}


def test_a_checkpoint_says_itself_when_it_was_finished(scene):
    """A copy loses the time of the file."""
    for run in scene.trained.values():
        state = run.directory / "train" / f"step_{STEP}" / "trainer_state" / "state.json"
        state.write_text(json.dumps({"finished_at": TRAIN_STARTS + 15}))
        os.utime(state, (TRAIN_STARTS + 10**6, TRAIN_STARTS + 10**6))
    (point,) = method(scene.collect(), "dpo").points
    assert [by_kind["cpu"] for by_kind in point.device_s] == pytest.approx([67, 67])


def test_every_run_holds_what_it_needs(scene):
    """Ingest 20 and features 10 + 7 for all, reward 5 for those that read it, never the evaluation."""
    result = scene.collect()
    for name, shared in (("dpo", 37.0), ("rerank", 42.0), ("online_dpo", 42.0)):
        found = method(result, name)
        assert [cost.device_s["cpu"] for cost in found.totals] == pytest.approx([shared + 60, shared + 62])
        assert [cost.counts.flops for cost in found.totals] == [1070, 1070]
        (point,) = found.points
        assert point.step == STEP
        assert [by_kind["cpu"] for by_kind in point.device_s] == pytest.approx([shared + 30, shared + 30])
        assert point.flops == (570, 570)
        assert [phases["train"].device_s["cpu"] for phases in found.phases] == pytest.approx([20, 22])
    assert [method.kind for method in result.methods] == ["offline", "offline", "online_dpo"]


def test_answers_of_all_seeds_are_pooled(scene):
    scene.answers[1][point_name("rerank", STEP)] = answers(1, 0)
    result = scene.collect()
    assert result.before.violation_rate.mean == 1
    assert method(result, "dpo").points[0].comparison.after.violation_rate.mean == 0.5
    assert method(result, "rerank").points[0].comparison.after.violation_rate.mean == 0.25


def test_the_configuration_is_told(scene):
    result = scene.collect()
    assert (result.name, result.seeds, result.projections) == ("c", SEEDS, ("7B",))
    assert (result.prices, result.currency) == ({"cpu": 36.0}, "EUR")
    assert re.fullmatch(r"Judged: one answer per prompt at temperature [\d.]+, at most \d+ tokens\.", result.sampling)


def test_equal_settings_have_one_fingerprint(scene):
    assert [method.fingerprint for method in scene.collect().methods] == ["f", "f", "f"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [TRAIN_STARTS - 500, TRAIN_STARTS + 500])
def test_another_setting_in_a_session_of_any_seed_leaves_no_fingerprint(scene, clock, seed, start):
    """Before or after the others, so that neither the first nor the last row can speak for all."""
    clock.now = start
    with entry(Ledger(scene.ledger("rerank", seed), fingerprint="g"), clock, "train", 1, 1):
        pass
    assert {method.name: method.fingerprint for method in scene.collect().methods} == {
        "dpo": "f",
        "rerank": "",
        "online_dpo": "f",
    }


def test_no_rows_have_no_fingerprint():
    assert common_fingerprint([]) == ""


def test_rows_of_killed_sessions_are_counted(scene):
    assert [method.num_killed for method in scene.collect().methods] == [0, 0, 0]
    kill_inside(scene.ledger("dpo", 1), "train", after_s=28.0)
    kill_inside(scene.directory / "shared" / "ledger", "reward", after_s=5.0)
    result = scene.collect()
    # the reward, which both others need with both seeds, was killed once
    assert [method.num_killed for method in result.methods] == [1, 1, 1]
    assert [cost.device_s["cpu"] for cost in method(result, "dpo").totals] == pytest.approx([97, 37 + 56])


def test_costs_are_charged_to_methods_with_a_constraint(tmp_path, clock):
    result = Scene(load_methods(tmp_path, CONSTRAINED), clock).collect()
    spent = {found.name: found.totals[0].device_s["cpu"] - 60 for found in result.methods}
    assert spent == pytest.approx({"dpo": 37, "rerank": 42, "rectified": 45, "repo": 45})


def test_pairs_are_priced_once_and_only_constrained_methods_get_the_costs(tmp_path, monkeypatch):
    assert calls_of(load_methods(tmp_path, CONSTRAINED), monkeypatch) == [
        ("shared", "cost", "embedded"),
        ("dpo", "train", "features"),
        ("rerank", "rank", None),
        ("rerank", "train", "ranked"),
        ("rectified", "rank", "priced"),
        ("rectified", "train", "ranked"),
        ("repo", "train_online", "priced"),
    ]


def test_answers_are_rewarded_by_what_the_configuration_names(tmp_path, monkeypatch):
    """Among them the classifier of reward.kind=external, in every way to an evaluation."""
    keys = {
        "reward.kind": "external",
        "reward_model.model": "a/judge",
        "features.cpus_per_actor": 2,
    }
    monkeypatch.setattr(Phases, "layers", (1,))
    config = load_config(None, [f"{name}={value}" for name, value in keys.items()])
    scorer = Phases(config=config, run=None, model="policy").reward_scorer(tmp_path).keywords
    assert (scorer["reward_model"], scorer["robust"]) == (config.reward_model, config.robust)
    assert scorer["options"].num_cpus == 2


def test_the_worst_head_of_a_round_is_no_rule_of_an_evaluation(tmp_path, monkeypatch):
    """An actor scores a batch at a time: one head for all of it would make rewards depend on how it was cut."""
    keys = ["reward.kind=ensemble", "robust.rule=min", "robust.set_type=heads_global", "train.method=online_dpo"]
    config = load_config(None, keys)
    monkeypatch.setattr(Phases, "layers", (1,))
    rule = Phases(config=config, run=None, model="policy").reward_scorer(tmp_path).keywords["robust"]
    assert (rule.rule, rule.set_type) == ("min", "heads_pointwise")


def test_without_a_constraint_nothing_is_priced(comparison, monkeypatch):
    calls = calls_of(comparison, monkeypatch)
    assert [call for call in calls if "priced" in call] == []
    assert calls[0] == ("shared", "cost", "auto")


def test_methods_share_what_prices_responses_and_differ_in_their_constraint(tmp_path):
    found = load_methods(
        tmp_path,
        CONSTRAINED,
        cost_model={"source": "labels", "num_heads": 3},
        constraint={"multiplier_max": 7, "cvar_level": 0.1},
    )
    assert (found.base.cost_model.source, found.base.cost_model.num_heads) == ("labels", 3)
    assert found.base.constraint.kind == "none"
    configs = {trial.method: trial.config for trial in found.trials}
    assert {config.cost_model.num_heads for config in configs.values()} == {3}
    assert [configs[name].constraint.multiplier_max for name in ("rectified", "repo")] == [7, 7]
    assert configs["repo"].constraint.multiplier_window == 8
    assert configs["repo"].constraint.cvar_level == configs["rectified"].constraint.cvar_level == 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cost_model.source": "labels"}, r"sets cost_model\.source, which all methods must share"),
        ({"constraint.multiplier_window": 8}, r"methods\.rectified: constraint\.multiplier_window is set"),
    ],
)
def test_a_method_may_not_change_the_cost_model_nor_set_what_it_does_not_read(tmp_path, keys, message):
    methods = {**CONSTRAINED, "rectified": {**CONSTRAINED["rectified"], **keys}}
    with pytest.raises(ConfigError, match=message):
        load_methods(tmp_path, methods)


def test_the_shipped_comparison_of_constraints_has_each_kind_and_one_cost_model():
    found = load_comparison(SHIPPED)
    configs = {trial.method: trial.config for trial in found.trials}
    assert {name: (config.train.method, config.constraint.kind) for name, config in configs.items()} == {
        "dpo": ("offline", "none"),
        "rerank": ("offline", "none"),
        "policy_gradient": ("policy_gradient", "none"),
        "ppo_lagrangian": ("policy_gradient", "expected"),
        "repo": ("policy_gradient", "rectified"),
        "cdpo": ("offline", "expected"),
        "rerank_rectified": ("offline", "rectified"),
    }
    assert (configs["cdpo"].constraint.labels, configs["rerank_rectified"].constraint.labels) == (
        "sampled",
        "confidence",
    )
    assert len({config.cost_model for config in (found.base, *configs.values())}) == 1
    assert len(found.trials) == 21
