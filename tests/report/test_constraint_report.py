"""What a report says of a safety constraint: numbers of the JSON, figures with something on them, warnings in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shown import Page, assert_drawn, look_up
from synthetic_comparison import sampled as priced_samples

from raylign.config import load_config
from raylign.constraints.violations import violations
from raylign.report import constraint_plots
from raylign.report.constraint_data import (
    ConstraintPoint,
    ConstraintReport,
    StoredLabels,
    cost_shares,
    evaluated_prompts,
    round_points,
    round_warnings,
    stored_points,
    stored_warnings,
)
from raylign.report.constraint_section import MAX_ROWS, constraint_section
from raylign.report.data import NotMeasured, report_json
from raylign.report.html import render_html
from raylign.report.sampled_data import SampledRun, SampledSettings
from raylign.report.sampled_tables import ROWS
from raylign.report.wording import format_interval
from raylign.runtime.reporting import constraint_report
from raylign.training.rounds import RoundStore
from raylign.types import Completion, Interval, Rollout, ScoredRollout


def measured(mean_cost: float = 0.5, safety_rate: float = 0.25) -> dict[str, float]:
    return {
        "mean_cost": mean_cost,
        "rectified_cost": 0.75,
        "safety_rate": safety_rate,
        "prompt_safety_rate": 0.125,
        "cvar": 2.5,
        "under": 0.625,
        "over": 0.0625,
        "compensation": 0.0625,
    }


def point(index: int, multiplier: float | None, *, is_at_cap: bool = False, safety_rate: float = 0.25):
    facts = measured(safety_rate=safety_rate)
    return ConstraintPoint(name=f"round {index}", multiplier=multiplier, is_at_cap=is_at_cap, **facts)


def judged(*answers: tuple[str, float, float]) -> list[Completion]:
    """Answers by category, cost and reward."""
    return [
        Completion(
            prompt=f"p{index}",
            response="r",
            category=category,
            harmful=True,
            num_tokens=1,
            reached_end=True,
            cost=cost,
            is_refusal=False,
            reward=reward,
        )
        for index, (category, cost, reward) in enumerate(answers)
    ]


EVALUATED = evaluated_prompts(
    judged(("a", 1.0, 0.5), ("a", -1.0, 1.5), ("b", 0.0, 2.5), ("a", 2.0, 0.0)),
    judged(("a", -1.0, 0.5), ("a", 3.0, 1.0), ("b", -2.0, 0.5), ("a", 2.0, 9.0)),
)


def sampled(**changes: object) -> ConstraintReport:
    report = ConstraintReport(
        kind="rectified",
        bound=0.125,
        cap=5.0,
        points=(point(1, 1.5), point(2, 5.0, is_at_cap=True)),
        stored=None,
        histograms=cost_shares({"round 1": np.array([1.0, -0.5]), "round 2": np.array([-2.0, 0.0])}),
        warnings=("Mind the <cap>.",),
        evaluated=EVALUATED,
    )
    return dataclasses.replace(report, **changes)


@pytest.fixture
def stored() -> ConstraintReport:
    return sampled(
        points=stored_points(FACTS),
        stored=StoredLabels(**{field.name: FACTS[field.name] for field in dataclasses.fields(StoredLabels)}),
    )


FACTS = {
    "kind": "rectified",
    "labels": "confidence",
    "multiplier": 17.5,
    "is_dual": True,
    "is_at_cap": False,
    "num_pairs": 1277,
    "share_turned": 0.25,
    "share_both_safe": 0.5,
    "share_mixed": 0.375,
    "share_both_unsafe": 0.125,
    "before": {**measured(), "statistic": 0.3, "num_prompts": 9},
    "after": {**measured(mean_cost=-0.5), "statistic": 0.1, "beta": 1.0},
    "warnings": [],
}


def test_records_give_one_point_per_round_and_the_last_record_of_a_round_counts():
    facts = {f"constraint/{name}": value for name, value in measured().items()}
    records = [
        {"step": 1, "round": 1, "loss": 0.0},
        {"step": 2, "round": 1, **facts, "constraint/multiplier": 9.0, "constraint/at_cap": 0.0},
        {"step": 2, "round": 1, **facts, "constraint/multiplier": 2.0, "constraint/at_cap": 0.0},
        {"step": 4, "round": 2, **facts, "constraint/multiplier": 5.0, "constraint/at_cap": 1.0},
    ]
    assert round_points(records) == (point(1, 2.0), point(2, 5.0, is_at_cap=True))
    (bare,) = round_points([{"round": 1, **facts}])
    assert bare.multiplier is None


def test_stored_pairs_give_the_reference_and_the_optimum_where_it_is_known():
    before, after = stored_points(FACTS)
    assert (before.multiplier, after.multiplier) == (0.0, 17.5)
    assert (before.mean_cost, after.mean_cost) == (0.5, -0.5)
    assert len(stored_points({**FACTS, "after": None})) == 1


def test_histograms_share_one_scale_with_0_as_an_edge():
    first, second = cost_shares({"a": np.array([0.0, 3.0]), "none": np.array([]), "b": np.array([-0.1])}, num_bins=6)
    assert first.edges == second.edges == (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    assert first.shares == (0, 0, 0.5, 0, 0, 0.5)
    assert (first.name, first.num_responses, second.name) == ("a", 2, "b")
    assert cost_shares({}) == ()
    assert cost_shares({"a": np.zeros(3)})[0].edges[-1] == 1


def test_prompts_that_changed_sides_and_categories_are_counted():
    change = EVALUATED.change
    assert (change.num_safe_before, change.num_unsafe_before) == (2, 2)
    assert (change.became_unsafe, change.became_safe) == (0.5, 0.5)
    assert (change.reward_before, change.reward_after) == (2.0, 0.75)
    shown = [(c.category, c.num_prompts, c.unsafe_before, c.unsafe_after) for c in EVALUATED.categories]
    assert [row[:2] for row in shown] == [("a", 3), ("b", 1)]
    np.testing.assert_allclose([row[2:] for row in shown], [(2 / 3, 2 / 3), (0, 0)])


def test_answers_without_a_reward_have_no_reward_on_safe_prompts():
    found = evaluated_prompts(judged(("a", -1.0, float("nan"))), judged(("a", -1.0, float("nan"))))
    assert (
        "not measured"
        in dict(Page(constraint_section(sampled(evaluated=found))).cells)["constraint.evaluated.change.reward_after"]
    )


@pytest.mark.parametrize(
    ("points", "kind", "words"),
    [
        ((point(1, 1.1), point(2, 1.3)), "rectified", None),
        ((point(1, 1.3), point(2, 5.0, is_at_cap=True)), "rectified", "at its cap in 1 of 2 rounds, first in round 2"),
        ((point(1, 1.0), point(2, 1.0)), "expected", "never moved from 1 in 2 rounds"),
        ((point(1, 1.0), point(2, 1.0)), "fixed_penalty", None),
        ((point(1, None), point(2, None)), "none", None),
        ((point(1, 1.1, safety_rate=1.0), point(2, 1.2, safety_rate=1.0)), "rectified", "No sampled response was unsa"),
        ((point(1, 1.1, safety_rate=1.0), point(2, 1.2)), "rectified", None),
        ((point(1, 1.1), point(2, 1.2, safety_rate=0.0)), "rectified", "unsafe in 1 of 2 rounds, first in round 2"),
        ((), "rectified", None),
    ],
)
def test_what_a_user_would_not_expect_is_said(points, kind, words):
    warnings = round_warnings(points, kind=kind, start=1.0)
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]


@pytest.mark.parametrize(("safety_rate", "words"), [(0.5, None), (1.0, "No stored answer"), (0.0, "All stored answ")])
def test_stored_answers_of_one_side_are_said(safety_rate, words):
    warnings = stored_warnings({**FACTS, "before": measured(safety_rate=safety_rate)})
    assert [text.startswith(words or "") for text in warnings] == [True] * (words is not None)


@pytest.mark.parametrize("is_stored", [False, True])
def test_cells_show_the_numbers_of_the_json(report_data, replace, stored, is_stored):
    report = stored if is_stored else sampled()
    data = replace(report_data, constraint=report)
    content, page = report_json(data), Page(constraint_section(report))
    json.dumps(content)
    cells = dict(page.cells)
    assert len(cells) == 9 * 2 + 6 * is_stored + 4 + 3 * 2
    for key, text in cells.items():
        value = look_up(content, key)
        if isinstance(value, float):
            is_share = any(word in key for word in ("rate", "share", "became", "unsafe"))
            assert text == (f"{100 * value:.1f} %" if is_share else f"{value:.3f}"), key
        else:
            assert text == (f"{value:,}" if isinstance(value, int) else value)
    assert page.tags.count("img") == 2 - is_stored


def test_the_page_has_the_section_and_its_warnings_in_full(report_data, replace):
    report = sampled()
    html = render_html(replace(report_data, constraint=report))
    assert constraint_section(report) in html
    assert "Mind the &lt;cap&gt;." in html
    assert "hold the mean max(cost, 0) to 0.125" in html
    assert "no constraint, and no response has a cost" in constraint_section(report_data.constraint)


def test_several_answers_are_shown_by_both_prices(report_data, replace):
    settings = SampledSettings(num_answers=4, temperature=0.7, prompt_safety=0.75, before=priced_samples())
    report = sampled(sampled=SampledRun(settings=settings, after=priced_samples(-0.5)))
    html = constraint_section(report)
    content = report_json(replace(report_data, constraint=report))
    cells = [(key, text) for key, text in Page(html).cells if ".sampled." in key]
    assert {key.split(".")[-1] for key, _ in cells} == {"value", "by_seed", "change"}
    assert {key.split(".")[2] for key, _ in cells} == {"settings", "after"}
    for key, text in cells:
        if key.endswith("value"):
            assert text == shown_value(key, look_up(content, key))
    assert "4 answers of the final policy" in html and "The same answers by the judge</summary>" in html
    bare = constraint_section(dataclasses.replace(report, points=(), histograms=()))
    assert "<img" not in bare and "Safe answers" in bare


def shown_value(key: str, node: dict) -> str:
    row = next(row for row in ROWS if f".{row.name}." in key)
    return format_interval(Interval(**node), row.unit, is_difference=row.is_change)


def test_a_split_constraint_is_not_said_to_be_divided_always():
    text = Page(constraint_section(sampled(kind="split"))).text
    assert "divided by 1 + multiplier unless constraint.split_normalise=none" in text


def test_many_rounds_are_folded_away():
    points = tuple(point(index + 1, 1.0) for index in range(MAX_ROWS + 1))
    assert "All 13 rounds" in constraint_section(sampled(points=points))
    assert "rounds</summary>" not in constraint_section(sampled(points=points[:MAX_ROWS]))


def test_paths_are_drawn_over_rounds_with_the_cap_and_the_bound_marked():
    figure = constraint_plots.constraint_paths(sampled())
    assert_drawn(figure)
    multiplier, costs, tail, safety, pays, _ = figure.axes
    np.testing.assert_array_equal(multiplier.lines[0].get_xydata(), [[1, 1.5], [2, 5.0]])
    np.testing.assert_array_equal(multiplier.lines[1].get_xydata(), [[2, 5.0]])
    assert [line.get_label() for line in costs.lines] == ["mean C", "mean max(C, 0)", "bound of mean max(C, 0)"]
    assert set(costs.lines[2].get_ydata()) == {0.125}
    assert [line.get_ydata()[0] for line in safety.lines] == [0.25, 0.125]
    assert (tail.lines[0].get_ydata()[0], len(pays.lines)) == (2.5, 3)
    of_mean = constraint_plots.constraint_paths(sampled(kind="expected")).axes[1]
    assert of_mean.lines[2].get_label() == "bound of mean C"


def test_costs_without_a_constraint_have_no_multiplier_and_no_bound():
    figure = constraint_plots.constraint_paths(sampled(kind="none", bound=None, cap=None, points=(point(1, None),)))
    assert_drawn(figure)
    assert [len(axes.lines) for axes in figure.axes[:2]] == [0, 2]
    assert figure.axes[0].texts[0].get_text() == "no constraint"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: constraint_plots.constraint_paths(sampled(points=())),
        lambda: constraint_plots.constraint_paths(sampled(points=(point(1, 0.0),))),
        lambda: constraint_plots.cost_shares_figure(()),
        lambda: constraint_plots.cost_shares_figure(sampled().histograms),
        lambda: constraint_plots.cost_shares_figure(cost_shares({"a": np.zeros(1)})),
    ],
)
def test_edge_inputs_are_drawn_or_named_as_missing(draw):
    assert_drawn(draw())


def response(prompt: int, sample: int, cost: float) -> ScoredRollout:
    rollout = Rollout(
        prompt_index=prompt,
        sample_index=sample,
        prompt_ids=np.array([1], np.int32),
        response_ids=np.array([2], np.int32),
        sampler_logps=np.array([-1.0], np.float32),
        reached_end=True,
        weight_version=0,
    )
    return ScoredRollout(
        rollout=rollout, reward=0.0, reward_variance=0.0, reference_token_logps=np.array([-1.0], np.float32), cost=cost
    )


def test_sampled_rounds_are_read_from_the_run(tmp_path: Path):
    store = RoundStore(tmp_path / "train" / "rounds")
    costs = [[3.0, -1.0, 1.0, -1.0], [-2.0, -1.0, 0.0, -1.0], [0.5, 1.0, 1.0, 1.0]]
    records = []
    for index, of_round in enumerate(costs):
        store.write(index, [response(i // 2, i % 2, cost) for i, cost in enumerate(of_round)], {})
        found = dataclasses.asdict(violations(np.array(of_round), np.array([0, 0, 1, 1])))
        facts = {f"constraint/{name}": found[name] for name in measured()}
        records.append({"round": index + 1, **facts, "constraint/multiplier": 1.0 + index, "constraint/at_cap": 0.0})
    overrides = ["train.method=policy_gradient", "constraint.kind=rectified", "online.num_rounds=3"]
    config = load_config(overrides=[*overrides, "constraint.tolerance=0.25"])
    report = constraint_report(
        config, tmp_path, facts={"cost": None, "rank": None}, records=records, evaluated=EVALUATED
    )
    assert isinstance(report, ConstraintReport)
    assert (report.kind, report.bound, report.cap, report.stored) == ("rectified", 0.25, 20.0, None)
    assert [found.multiplier for found in report.points] == [1.0, 2.0, 3.0]
    assert [found.safety_rate for found in report.points] == [0.5, 1.0, 0.0]
    assert [shares.name for shares in report.histograms] == ["round 1", "round 3"]
    assert sum(report.histograms[0].shares[12:]) == 0.5 and sum(report.histograms[1].shares[12:]) == 1
    assert len(report.warnings) == 1 and "first in round 3" in report.warnings[0]
    assert_drawn(constraint_plots.constraint_paths(report))


def test_stored_pairs_are_read_from_the_rank_phase(tmp_path: Path):
    directory = tmp_path / "rank" / "ranked"
    directory.mkdir(parents=True)
    table = pa.table(
        {
            "split": ["train", "train", "test"],
            "chosen_cost": pa.array([1.0, -1.0, 9.0], pa.float32()),
            "rejected_cost": pa.array([-2.0, 2.0, 9.0], pa.float32()),
            "chosen_reward": [0.0, 0.0, 0.0],
            "rejected_reward": [-1.0, 1.0, 0.0],
            "label_confidence": pa.array([0.25, 0.75, 0.5], pa.float32()),
        }
    )
    pq.write_table(table, directory / "part.parquet")
    config = load_config(
        overrides=["confidence.squash=none", "constraint.kind=rectified", "constraint.multiplier=dual"]
    )
    report = constraint_report(
        config, tmp_path, facts={"cost": None, "rank": {"constraint": FACTS}}, records=[], evaluated=EVALUATED
    )
    assert isinstance(report, ConstraintReport)
    assert report.stored is not None and report.stored.num_pairs == 1277
    by_name = {shares.name: shares for shares in report.histograms}
    unsafe = {name: sum(shares.shares[12:]) for name, shares in by_name.items()}
    assert unsafe == {"stored order": 0.5, "order by reward": 1.0, "order under the constraint": 0.0}
    assert (report.bound, report.cap) == (0.0, 20.0)
    fixed = load_config(overrides=["constraint.kind=rectified"])
    found = constraint_report(
        fixed, tmp_path, facts={"rank": {"constraint": {**FACTS, "is_dual": False}}}, records=[], evaluated=EVALUATED
    )
    assert isinstance(found, ConstraintReport) and (found.bound, found.cap) == (None, None)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [([], "no constraint"), (["train.objective=dpo", "cost_model.source=embedded"], "no constraint read the costs")],
)
def test_a_run_without_a_constraint_says_so(tmp_path, overrides, reason):
    report = constraint_report(
        load_config(overrides=overrides), tmp_path, facts={"rank": {}}, records=[], evaluated=EVALUATED
    )
    assert isinstance(report, NotMeasured) and reason in report.reason


def test_costs_that_no_constraint_read_are_shown_when_answers_were_sampled(tmp_path):
    config = load_config(overrides=["train.objective=dpo", "cost_model.source=embedded"])
    settings = SampledSettings(num_answers=4, temperature=0.7, prompt_safety=0.75, before=priced_samples())
    found = constraint_report(
        config,
        tmp_path,
        facts={"rank": {}},
        records=[],
        evaluated=EVALUATED,
        sampled=SampledRun(settings=settings, after=priced_samples(-0.5)),
    )
    assert isinstance(found, ConstraintReport) and found.sampled is not None
    text = Page(constraint_section(found)).text
    assert "No constraint" in text and "Became unsafe, of prompts that were safe" in text
