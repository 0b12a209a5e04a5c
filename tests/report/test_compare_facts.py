"""What a comparison's numbers follow from: sums, differences and ratios that can be worked out by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
from synthetic_comparison import METHODS, synthetic_comparison, with_method

from raylign.cost.compare import MeasuredRatio, TargetReached
from raylign.cost.rows import Cost, Counts
from raylign.errors import ConfigError
from raylign.report.compare_data import comparison_json
from raylign.report.compare_facts import FOUND_READY, Spread, derive
from raylign.report.data import NotMeasured


def totals(*seconds: float, kind: str = "cpu") -> tuple[Cost, ...]:
    return tuple(Cost(device_s={kind: value}) for value in seconds)


@pytest.fixture(scope="module")
def result():
    return synthetic_comparison()


def by_hand(result):
    """Extra costs of whole runs: re-ranking 10, 11, 12.2; online DPO 100, 111, 122."""
    for name, seconds in (("dpo", (20, 21, 22)), ("rerank", (30, 32, 34.2)), ("online_dpo", (120, 132, 144))):
        result = with_method(result, name, totals=totals(*seconds))
    return result


def ratio(result, method: str, words: str):
    (row,) = [row for row in derive(result).ratios if row.online == method and words in row.accounting]
    return row


def test_extra_costs_are_paired_by_seed(result):
    facts = derive(by_hand(result))
    rerank = facts.costs[1]
    assert rerank.device_s["cpu"] == Spread(mean=pytest.approx(96.2 / 3), low=30, high=34.2)
    assert rerank.extra_device_s["cpu"] == Spread(mean=pytest.approx(33.2 / 3), low=10, high=pytest.approx(12.2))
    assert facts.costs[0].extra_device_s == {}


def test_the_overhead_ratio_is_extra_over_extra(result):
    row = ratio(by_hand(result), "online_dpo", "all reserved")
    assert isinstance(row.ratio, MeasuredRatio)
    assert row.ratio.value == pytest.approx(333 / 33.2)
    after = [m.points[-1].comparison.after for m in (result.methods[2], result.methods[1])]
    assert row.ratio.qualities == row.violation_rate == tuple(summary.violation_rate for summary in after)
    assert row.over_refusal == tuple(summary.over_refusal for summary in after)


def test_work_leaves_out_start_up(result):
    """Of the configured means, before seeds spread them: all of it, and all but extract and train."""
    facts = derive(result)
    for costs, (seconds, _) in zip(facts.costs, METHODS.values(), strict=True):
        idle = seconds["extract"] + seconds["train"]
        assert costs.work_device_s["cpu"].mean == pytest.approx(sum(seconds.values()) - idle, rel=0.03)
        assert costs.device_s["cpu"].mean == pytest.approx(sum(seconds.values()), rel=0.03)
    work = ratio(result, "online_dpo", "phases that work")
    extra = [costs.work_device_s["cpu"].mean - facts.costs[0].work_device_s["cpu"].mean for costs in facts.costs]
    assert work.ratio.value == pytest.approx(extra[2] / extra[1])


def test_only_online_methods_have_an_overhead(result):
    assert {row.online for row in derive(result).ratios} == {"online_dpo", "policy_gradient"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"totals": totals(20, 21, 22)}, "rerank cost nothing extra"),
        ({"totals": totals(19, 20, 21)}, "rerank cost nothing extra"),
        ({"fingerprint": "g"}, "different settings or devices"),
        ({"points": ()}, "the quality of rerank was not evaluated"),
    ],
)
def test_what_is_not_measured_has_no_ratio(result, changes, told):
    row = ratio(with_method(by_hand(result), "rerank", **changes), "online_dpo", "all reserved")
    assert isinstance(row.ratio, NotMeasured) and told in row.ratio.reason


def test_two_seeds_are_too_few(result):
    methods = tuple(
        dataclasses.replace(method, totals=method.totals[:2], phases=method.phases[:2]) for method in result.methods
    )
    row = ratio(dataclasses.replace(result, methods=methods, seeds=(0, 1)), "online_dpo", "all reserved")
    assert isinstance(row.ratio, NotMeasured) and "3 repeats are needed" in row.ratio.reason


def test_kinds_of_devices_are_never_added(result):
    mixed = with_method(
        by_hand(result),
        "online_dpo",
        totals=tuple(Cost(device_s={"cpu": 100.0 + seed, "H200": 7.0 + seed}) for seed in range(3)),
    )
    facts = derive(mixed)
    assert facts.kinds == ("cpu", "H200")
    assert facts.costs[2].device_s["H200"].mean == 8
    assert facts.costs[1].device_s["H200"] == Spread(mean=0, low=0, high=0)
    on_gpu = [row for row in facts.ratios if row.online == "online_dpo" and row.kind == "H200"]
    assert all(isinstance(row.ratio, NotMeasured) for row in on_gpu)  # re-ranking reserved none: nothing to divide by


def test_phases_add_up_to_the_run(result):
    facts = derive(result)
    for index, costs in enumerate(facts.costs):
        spent = sum(means[index] for means in facts.phases["cpu"].values())
        assert spent == pytest.approx(costs.device_s["cpu"].mean)
    assert FOUND_READY not in facts.phases["cpu"]


def test_what_was_found_ready_is_a_phase_of_its_own(result):
    reused = tuple(cost + Cost(device_s={"cpu": 5.0}) for cost in result.methods[0].totals)
    phases = derive(with_method(result, "dpo", totals=reused)).phases["cpu"]
    assert phases[FOUND_READY] == pytest.approx((5, 0, 0, 0))


def test_the_target_is_priced_at_the_checkpoint_that_reached_it(result):
    targets = {row.method: row.reached for row in derive(result).targets}
    reached = targets["rerank"]
    assert isinstance(reached, TargetReached)
    assert reached.device_s == pytest.approx(derive(result).costs[1].device_s["cpu"].mean)
    assert reached.rate == result.methods[1].points[-1].comparison.after.violation_rate
    assert isinstance(targets["dpo"], NotMeasured) and "was not reached" in targets["dpo"].reason


def test_a_target_that_training_did_not_have_to_reach_has_no_price(result):
    targets = derive(dataclasses.replace(result, target=0.6)).targets
    assert all(isinstance(row.reached, NotMeasured) and "before training" in row.reached.reason for row in targets)


def test_flops_that_nobody_counted_are_not_zero(result):
    costs = tuple(dataclasses.replace(cost, counts=Counts()) for cost in result.methods[0].totals)
    assert isinstance(derive(with_method(result, "dpo", totals=costs)).costs[0].flops, NotMeasured)


def test_an_unknown_size_is_refused(result):
    with pytest.raises(ConfigError, match="9B"):
        derive(dataclasses.replace(result, projections=("9B",)))


def test_comparison_json_is_json(result):
    content = json.loads(json.dumps(comparison_json(with_method(result, "rerank", fingerprint="g")), allow_nan=False))
    assert "different settings" in content["derived"]["ratios"][0]["ratio"]["not_measured"]
    assert content["methods"][1]["name"] == "rerank"
    assert {row["label"] for row in content["derived"]["projection"]} == {"projection"}


def test_money_is_the_price_of_whole_runs(result):
    """20, 21 and 22 cpu-seconds at 36 an hour: 0.01 a second."""
    facts = derive(dataclasses.replace(by_hand(result), prices={"cpu": 36.0}))
    assert facts.costs[0].money == Spread(mean=pytest.approx(0.21), low=pytest.approx(0.2), high=pytest.approx(0.22))
    assert derive(result).costs[0].money is None


def test_a_kind_without_a_price_has_no_money(result):
    mixed = with_method(by_hand(result), "online_dpo", totals=totals(1, 2, 3, kind="H200"))
    costs = derive(dataclasses.replace(mixed, prices={"cpu": 36.0})).costs
    assert isinstance(costs[2].money, NotMeasured) and "has no price for" in costs[2].money.reason
    assert isinstance(costs[1].money, Spread)
