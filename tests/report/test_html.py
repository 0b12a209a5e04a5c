"""The HTML report: one file, no way out, and the numbers of report.json."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from shown import Page, look_up

from raylign.report.data import NotMeasured, report_json
from raylign.report.html import EXAMPLES_PER_KIND, render_html
from raylign.report.wording import METRIC_ROWS, format_interval, format_number
from raylign.types import Interval


@pytest.fixture(scope="module")
def html(report_data):
    return render_html(report_data)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def cells(page):
    return dict(page.cells)


def test_nothing_is_loaded_from_anywhere(page, html):
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith("data:image/png;base64,"), (name, value[:60])
    assert not re.search(r"url\(|@import|\son\w+=", html.partition("</style>")[0])
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_texts_are_escaped(page, html):
    """Prompts and answers hold "</pre><script>...": it is shown, and is no tag."""
    assert "<script" not in html
    assert "</pre><script>alert(" in page.text


def test_numbers_are_those_of_report_json(cells, report_data):
    values = json.loads(json.dumps(report_json(report_data), allow_nan=False))
    for part, is_difference in (("before", False), ("after", False), ("difference", True)):
        for row in METRIC_ROWS:
            interval = Interval(**values["comparison"][part][row.name])
            shown = cells[f"comparison.{part}.{row.name}"]
            assert shown == format_interval(interval, row.unit, is_difference=is_difference)
    assert cells["reward.test_accuracy"] == format_interval(Interval(**values["reward"]["test_accuracy"]), "share")
    assert cells["drift.js_divergence"] == format_number(values["drift"]["js_divergence"], "logit")
    assert cells["seconds.train"] == f"{values['seconds']['train']:.1f} s"
    assert cells["quarantine.invalid_json"] == str(values["quarantine"]["invalid_json"])
    for key in cells:
        look_up(values, key)  # every shown key exists in the file


def test_missing_values_say_why(report_data, replace):
    content = render_html(
        replace(
            report_data,
            drift=NotMeasured(reason="evaluation was skipped"),
            reward=NotMeasured(reason="objective dpo reads no reward"),
            confidence=NotMeasured(reason="objective dpo reads no <confidence>"),
            training=[],
            seconds={},
            quarantine={},
        )
    )
    page = Page(content)
    for reason in ("evaluation was skipped", "objective dpo reads no reward", "objective dpo reads no <confidence>"):
        assert f"not measured: {reason}" in page.text
    assert "No row was quarantined" in page.text


def test_a_missing_number_is_said_to_be_missing(cells, report_data):
    """The fixture has no recall and a Brier score that is nan; no KL was sampled."""
    assert cells["refusal_detector.recall"].startswith("not measured")
    assert cells["reward.test_brier"].startswith("not measured")
    assert cells["drift.kl"] == "not measured: no fresh samples"
    assert report_json(report_data)["reward"]["test_brier"] is None


def test_examples_are_collapsed_behind_a_warning(page, html):
    assert "Content warning" in page.text
    assert page.tags.count("details") == 2 * EXAMPLES_PER_KIND + 3  # and costs, configuration, versions
    assert "open" not in {name for name, _ in page.attributes}
    assert html.index("Content warning") < html.index("harmful prompt 0")


def test_headline_names_over_refusal_beside_safety(page):
    header = page.text[: page.text.index("Before and after")]
    assert "attacks succeed" in header
    assert "Over-refusal" in header
    assert "Degenerate" in header


def test_warnings_stand_in_the_headline_and_in_the_json(report_data):
    warned = dataclasses.replace(report_data, warnings=("cost & judge are one model",))
    header = render_html(warned).split("</header>")[0]
    assert "<p class='warning'>cost &amp; judge are one model</p>" in header
    assert report_json(warned)["warnings"] == ["cost & judge are one model"]
    assert "class='warning'" not in render_html(report_data).split("</header>")[0]
