"""The comparison in the terminal and in HTML: the numbers of comparison.json, and nothing that was not measured."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from shown import Page, assert_drawn, look_up
from synthetic_comparison import METHODS, synthetic_comparison, with_method

from raylign.cost.rows import Cost
from raylign.report import compare_plots
from raylign.report.compare_data import comparison_json
from raylign.report.compare_facts import derive
from raylign.report.compare_html import render_comparison
from raylign.report.compare_text import comparison_text

EVIL = "</td><script>alert('http://evil.example/x.js')</script>"
_UNITS = (1.0, 100.0, 1e-6, 1e-9)  # plain, per cent, megabytes, gigabytes


@pytest.fixture(scope="module")
def result():
    return synthetic_comparison()


@pytest.fixture(scope="module")
def html(result):
    return render_comparison(result)


def leaves(node) -> list[float]:
    if isinstance(node, dict):
        return [leaf for value in node.values() for leaf in leaves(value)]
    if isinstance(node, list):
        return [leaf for value in node for leaf in leaves(value)]
    return [node] if isinstance(node, (int, float)) else []


def shown_numbers(text: str) -> list[tuple[float, float]]:
    """Numbers in a cell, each with half a unit of its last digit."""
    found = []
    for match in re.finditer(r"(?<![\w.])[+-]?\d[\d,]*(?:\.(\d+))?(?:e([+-]\d+))?", text):
        power = int(match[2] or 0) - len(match[1] or "")
        digits = re.sub(r"\D", "", match[0].partition("e")[0])
        half = 0.5 * 10.0**power
        if len(digits) == 3 and "." not in match[0] and not match[2]:
            half = 0.51  # three significant digits of a larger whole number read like this
        found.append((float(match[0].replace(",", "")), half * 1.01))
    return found


def assert_numbers_are_those_of(page: Page, content) -> None:
    for key, text in page.cells:
        node = look_up(content, key)
        if isinstance(node, dict) and "not_measured" in node:
            assert node["not_measured"] in text
            continue
        numbers = shown_numbers(text.replace("95 %", ""))
        assert numbers or node is None, (key, text)
        for number, half in numbers:
            known = [abs(leaf * unit - number) for leaf in leaves(node) for unit in _UNITS]
            assert min(known) <= half, (key, text, number)


def test_every_number_is_that_of_comparison_json(html, result):
    page = Page(html)
    assert len(page.cells) > 150
    assert_numbers_are_those_of(page, json.loads(json.dumps(comparison_json(result), allow_nan=False)))


def test_the_check_above_sees_a_wrong_number(html, result):
    content = comparison_json(result)
    content["derived"]["costs"][2]["device_s"]["cpu"]["mean"] += 0.2
    with pytest.raises(AssertionError, match=r"derived.costs.2.device_s.cpu"):
        assert_numbers_are_those_of(Page(html), content)


def test_the_terminal_shows_what_the_page_shows(html, result):
    text = " ".join(comparison_text(result).split())
    for key, cell in Page(html).cells:
        assert " ".join(cell.split()) in text, (key, cell)


def test_all_that_was_promised_is_there(html, result):
    keys = {key for key, _ in Page(html).cells}
    for index, _ in enumerate(METHODS):
        for metric in ("attack_success", "violation_rate", "over_refusal", "degenerate", "mean_reward"):
            assert f"methods.{index}.points.1.comparison.after.{metric}" in keys
            assert f"methods.{index}.points.1.comparison.difference.{metric}" in keys
        for cost in ("device_s.cpu", "generated_tokens", "decode_steps", "passed_tokens", "flops", "synced_bytes"):
            assert f"derived.costs.{index}.{cost}" in keys
    assert {f"derived.ratios.{index}.ratio" for index in range(4)} <= keys
    text = comparison_text(result)
    assert " ".join(text.split()).count("start-up and idle time included") == 2
    assert text.count("quality below: rerank: violations") == 4
    assert len(re.findall("^projection  ", text, re.MULTILINE)) == 14
    assert "was not reached" in text


def test_prices_are_shown_per_run(result):
    priced = dataclasses.replace(result, prices={"cpu": 40.0}, currency="EUR")
    page = Page(render_comparison(priced))
    assert_numbers_are_those_of(page, json.loads(json.dumps(comparison_json(priced), allow_nan=False)))
    assert sum(key.endswith(".money") for key, _ in page.cells) == len(METHODS)
    assert re.search(r"^Price, EUR +1\.\d\d \[", comparison_text(priced), re.MULTILINE)
    assert "Price" not in comparison_text(result)
    unpriced = comparison_text(dataclasses.replace(result, prices={"H200": 4.0}, currency="EUR"))
    assert "not measured: cost.prices has no price for cpu (it names H200); add one per device-hour" in unpriced


@pytest.mark.parametrize("render", [comparison_text, lambda result: Page(render_comparison(result)).text])
def test_killed_sessions_are_told(result, render):
    assert "killed sessions" not in render(result)
    text = " ".join(render(with_method(result, "online_dpo", num_killed=3)).split())
    assert "Ledger rows of killed sessions, over all seeds: online_dpo 3." in text


@pytest.mark.parametrize("render", [comparison_text, lambda result: Page(render_comparison(result)).text])
def test_the_interval_says_what_it_leaves_out(result, render):
    text = " ".join(render(result).split())
    assert "enter every seed as the same number: the interval does not hold their variation" in text


@pytest.mark.parametrize("render", [comparison_text, lambda result: Page(render_comparison(result)).text])
def test_a_comparison_says_how_answers_were_sampled_and_what_is_not_counted(result, render):
    text = " ".join(render(result).split())
    assert "Judged: one answer per prompt at temperature 0.7, at most 64 tokens." in text
    assert "fits of rewards and cost models, and what those of texts read, are in the device-seconds alone" in text


def test_significant_changes_are_marked(result):
    lines = comparison_text(result).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Over-refusal"))
    rerank, gradient = lines[start + 2], lines[start + 4]
    assert "rerank" in rerank and rerank.endswith(" *")
    assert "policy_gradient" in gradient and not gradient.endswith("*")


@pytest.mark.parametrize("render", [comparison_text, lambda result: Page(render_comparison(result)).text])
def test_what_is_missing_says_why(result, render):
    result = with_method(result, "rerank", points=(), fingerprint="g")
    for method in result.methods:
        result = with_method(result, method.name, totals=tuple(Cost(device_s=c.device_s) for c in method.totals))
    text = " ".join(render(result).split())
    assert "not measured: no checkpoint was evaluated" in text
    assert "not measured: the sides ran on different settings" in text
    assert "not measured: FLOPs of this model were not counted" in text
    assert "no policy was evaluated" in text


def test_without_online_methods_there_is_no_ratio(result):
    text = comparison_text(dataclasses.replace(result, methods=result.methods[:2]))
    assert "not measured: no online method was compared" in text


@pytest.mark.parametrize("spread", [0.0, 5.0])
def test_nothing_is_divided_by_a_denominator_that_may_be_zero(result, spread):
    """Re-ranking as dear as the baseline: no number; dearer or cheaper by seed: a lower bound at most."""
    base = [cost.device_s["cpu"] for cost in result.methods[0].totals]
    costs = tuple(Cost(device_s={"cpu": s + spread * sign}) for s, sign in zip(base, (-1, 0, 1.5), strict=True))
    text = " ".join(comparison_text(with_method(result, "rerank", totals=costs)).split())
    shown = re.findall(r"idle time included ratio: (\S+ \S+)", text)
    assert len(shown) == 2
    assert all(ratio.startswith(">= " if spread else "not measured") for ratio in shown)
    assert not re.search(r"\b(inf|nan)\b", text)


def test_the_papers_ratio_is_nowhere(html, result):
    assert "300x" not in (html + comparison_text(result)).lower()


def test_the_page_is_whole_and_harmless(result):
    evil = dataclasses.replace(result, name=EVIL)
    html = render_comparison(evil)
    page = Page(html)
    assert "<script" not in html and EVIL in page.text
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.tags.count("img") == 3
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith("data:image/png;base64,")


def test_every_checkpoint_has_a_marker_with_its_interval(result):
    figure = compare_plots.rates_by_device_seconds(result, "cpu")
    assert_drawn(figure)
    for axes, name in zip(figure.axes, ("violation_rate", "attack_success", "over_refusal"), strict=True):
        drawn = {container.get_label(): container for container in axes.containers}
        assert list(drawn) == list(METHODS)
        for method in result.methods:
            line, _, bars = drawn[method.name]
            x, y = line.get_data()
            rates = [getattr(point.comparison.after, name) for point in method.points]
            assert list(y) == [rate.mean for rate in rates]
            costs = [[d["cpu"] for d in point.device_s] for point in method.points]
            assert list(x) == pytest.approx([sum(cost) / 3 for cost in costs])
            ends = [segment[:, 1] for segment in bars[1].get_segments()]
            assert np.allclose(ends, [(rate.low, rate.high) for rate in rates])
        assert axes.get_xscale() == "log"


def test_bars_end_at_the_cost_of_the_run(result):
    facts = derive(result)
    figure = compare_plots.phase_bars(result.methods, facts.phases["cpu"], "cpu")
    assert_drawn(figure)
    ends = [max(bar.get_x() + bar.get_width() for bar in bars) for bars in zip(*figure.axes[0].containers, strict=True)]
    assert ends == pytest.approx([costs.device_s["cpu"].mean for costs in facts.costs])


@pytest.mark.parametrize(
    "draw",
    [
        lambda r: compare_plots.rates_by_flops(r),
        lambda r: compare_plots.rates_by_device_seconds(r, "H200"),
        lambda r: compare_plots.rates_by_flops(dataclasses.replace(r, methods=r.methods[:1])),
        lambda r: compare_plots.phase_bars(r.methods, {}, "cpu"),
        lambda r: compare_plots.phase_bars(r.methods[:1], {"train": (3.0,)}, "cpu"),
    ],
)
def test_edge_figures(result, draw):
    assert_drawn(draw(result))


def test_costs_over_several_decades(result):
    points = tuple(
        dataclasses.replace(point, device_s=tuple({"cpu": 1e4 * 30**i} for _ in range(3)))
        for i, point in enumerate(result.methods[2].points)
    )
    assert_drawn(compare_plots.rates_by_device_seconds(with_method(result, "online_dpo", points=points), "cpu"))
