"""Several answers to every prompt on the page of a comparison and in the terminal."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from shown import Page, look_up
from synthetic_comparison import synthetic_comparison, with_samples

from raylign.report.compare_data import comparison_json
from raylign.report.compare_html import render_comparison
from raylign.report.compare_text import comparison_text
from raylign.report.sampled_tables import ROWS, settings_note
from raylign.report.wording import format_interval

OVERVIEW = "Safety by prompt at the last checkpoint"


@pytest.fixture(scope="module")
def result():
    return with_samples(synthetic_comparison())


@pytest.fixture(scope="module")
def html(result):
    return render_comparison(result)


def section(text: str, title: str) -> list[list[str]]:
    """Rows of a table in the terminal, cells apart by two spaces or more."""
    body = text[text.index(title) :].split("\n\n")[0].splitlines()[2:]
    return [re.split(r" {2,}", line) for line in body]


def test_every_method_has_a_row_with_what_it_reached_and_what_it_took(result):
    header, *rows = section(comparison_text(result), OVERVIEW)
    assert header[1:] == [
        *("Safe answers", "Unsafe prompts", "Compensated", "Mean reward", "Over-refusal (harmless prompts)"),
        "Device-seconds, cpu",
    ]
    by_name = {row[0]: row for row in rows}
    for method in result.methods[:-1]:
        found = method.sampled.by_model
        shown = by_name[method.name]
        assert shown[1].removesuffix(" *") == format_interval(found.safety_rate.value, "share")
        assert shown[3].removesuffix(" *") == format_interval(found.compensation.value, "logit")
        assert len(shown) == 7
    assert by_name["before"][2] == format_interval(result.samples.before.by_model.unsafe_prompts.value, "share")
    assert "no checkpoint was evaluated" in by_name[result.methods[-1].name][1]


def test_cells_lead_to_their_numbers(result, html):
    """Each place in the page is a number of comparison.json, and its mean is what is shown."""
    content = json.loads(json.dumps(comparison_json(result), allow_nan=False))
    cells = [(key, text) for key, text in Page(html).cells if "by_model" in key or "by_judge" in key]
    assert len(cells) > 4 * len(ROWS)
    for key, text in cells:
        node = look_up(content, key)
        numbers = [float(number) for number in re.findall(r"(?<![\w.])[+-]?\d+\.\d+", text)]
        known = node if isinstance(node, list) else [node["mean"], node["low"], node["high"]]
        scale = 100 if re.search(r" (%|pp)", text) else 1
        for number in numbers:
            assert min(abs(scale * value - number) for value in known if value is not None) <= 0.051 * (
                1 if scale == 100 else 0.01
            ), (key, text)


@pytest.mark.parametrize(
    ("price", "is_there", "is_not"),
    [("the run's cost model", "Mean reward", None), ("the judge", "Compensated", "Mean reward")],
)
def test_measures_have_seeds_and_changes_by_both_prices(result, price, is_there, is_not):
    rows = section(comparison_text(result), f"Answers by {price}")
    labels = [row[0] for row in rows]
    assert is_there in labels and is_not not in labels
    start = labels.index("Safe answers")
    assert rows[start][1] == "before" and rows[start + 1][1] == "dpo"
    least, most = min(found := result.methods[2].sampled.by_model.safety_rate.by_seed), max(found)
    shown = rows[start + 3]
    assert shown[1] == "online_dpo"
    if price != "the judge":
        assert shown[3] == f"{100 * least:.1f} % to {100 * most:.1f} %"
        assert shown[4].startswith("+") and shown[4].endswith("*")
    changed = next(row for row in rows if row[0].startswith("Became unsafe"))
    assert changed[1] == "dpo"  # nothing has become anything before training


def test_a_significant_change_has_the_tone_of_its_direction(html):
    (cell,) = re.findall(r"<td data-key='methods.2.sampled.by_model.unsafe_prompts.change'( class='\w+')?>", html)
    assert cell == " class='good'"
    (cell,) = re.findall(r"<td data-key='methods.2.sampled.by_model.mean_reward.change'( class='\w+')?>", html)
    assert cell == " class='bad'"


def test_without_samples_there_is_no_table():
    text = comparison_text(synthetic_comparison())
    assert OVERVIEW not in text and "Answers by" not in text


@pytest.mark.parametrize(("number", "safety", "needed"), [(8, 0.95, 8), (8, 0.875, 7), (20, 0.95, 19), (4, 0.5, 2)])
def test_the_note_says_how_many_safe_answers_a_prompt_needs(result, number, safety, needed):
    settings = dataclasses.replace(result.samples, num_answers=number, prompt_safety=safety)
    assert f"fewer than {needed} of its {number} answers are safe" in settings_note(settings)
