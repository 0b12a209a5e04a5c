"""Responses coloured by the rewards of their tokens: steps, legend, and texts that try to break out."""

from __future__ import annotations

import re

import pytest
from shown import Page

from raylign.report import plots
from raylign.report.data import report_json
from raylign.report.html import render_html
from raylign.report.token_section import MAX_TOKENS, TOKEN_STYLE, TokenExample, token_section

EVIL = "</span><script>alert('x')</script>"


def example(
    tokens: tuple[str, ...] = ("Hi", " there", "<eos>"),
    means: tuple[float, ...] = (-1.0, 0.0, 1.0),
    sigmas: tuple[float, ...] | None = (0.1, 0.5, 0.9),
    prompt: str = "Say hello",
    label: str = "chosen",
) -> TokenExample:
    return TokenExample(prompt=prompt, label=label, tokens=tokens, means=means, sigmas=sigmas)


def spans(html: str) -> list[tuple[str, str, str]]:
    """Class, tooltip and text of every token."""
    return re.findall(r"<span class='([^']*)' title='([^']*)'>([^<]*)</span>", html)


def test_means_are_colours_and_sigmas_lines_with_both_numbers_in_the_tooltip():
    tokens, means, sigmas = tuple("abcde"), (-2.0, -1.0, 0.0, 1.0, 2.0), (0.0, 1.0, 2.0, 3.0, 3.0)
    found = spans(token_section([example(tokens, means, sigmas)]))
    assert [text for _, _, text in found] == list("abcde")
    assert found[1][1] == "-1.000, sigma 1.000"
    assert [css for css, _, _ in found] == ["n4 u0", "n2 u1", "z u2", "p2 u3", "p4 u3"]
    defined = set(re.findall(r"\.([pnu]\d) ", TOKEN_STYLE))
    assert {name for css, _, _ in found for name in css.split()} - defined == {"z", "u0"}  # white, and no line


def test_the_legend_has_every_step_and_says_what_it_is():
    html = token_section([example(means=(-1.0, -1.0, 1.0), sigmas=(0.5, 0.5, 2.0))])
    legend = html[html.index("class='legend'") : html.index("<p class='note'>")]
    assert [css for css in re.findall(r"class='(\w\d?)'", legend)] == [
        *("n4", "n3", "n2", "n1", "z", "p1", "p2", "p3", "p4"),
        *("u0", "u1", "u2", "u3"),
    ]
    for text in ("-0.25", "\u2264 -1", "\u2265 +1", "sigma"):
        assert text in legend


def test_without_a_stated_sigma_there_is_no_line():
    html = token_section([example(sigmas=None)])
    assert "sigma" not in html
    assert [css for css, _, _ in spans(html)] == ["n4", "z", "p4"]


def test_one_outlier_does_not_bleach_the_others():
    means = (*[0.5] * 99, 50.0)
    found = spans(token_section([example(("a",) * 100, means, None)]))
    assert {css for css, _, _ in found} == {"p4"}


@pytest.mark.parametrize("means", [(0.0, 0.0, 0.0), (1e-30, -1e-30, 0.0)], ids=str)
def test_rewards_without_size_are_drawn(means):
    found = spans(token_section([example(means=means, sigmas=(0.5, 0.5, 0.5))]))
    assert len(found) == 3
    assert all(css.endswith("u0") for css, _, _ in found)


def test_responses_to_one_prompt_stand_side_by_side():
    html = token_section(
        [example(), example(label="rejected"), example(prompt="Other"), example(prompt="Other", label="rejected")]
    )
    assert html.count("<details>") == html.count("class='pair'") == 2
    assert re.findall(r"<h4>(\w+)</h4>", html) == ["chosen", "rejected"] * 2
    assert "sum +0.00; mean +0.00; last +1.00; 3 tokens" in html


def test_long_responses_are_cut_and_say_so():
    num = MAX_TOKENS + 7
    html = token_section([example(("a",) * num, (1.0,) * num, None)])
    assert len(spans(html)) == MAX_TOKENS
    assert f"sum +{num:.2f}" in html  # of all tokens
    assert f"{num} tokens, {MAX_TOKENS} shown" in html


def test_hostile_tokens_prompts_and_labels_are_text():
    html = token_section([example(tokens=(EVIL, "'\" onclick='x", "\n"), prompt=EVIL, label=EVIL)])
    page = Page(html)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count(EVIL) == 3
    assert "\u21b5\n" in page.text
    assert page.tags.count("span") == 3 + 9 + 4  # tokens and legend


def test_the_report_has_the_section_where_tokens_are_rewarded(report_data, replace, monkeypatch):
    monkeypatch.setattr(plots, "to_data_uri", lambda figure: "data:,")  # drawing takes seconds
    plain = render_html(report_data)
    assert "Rewards of tokens" not in plain and ".tokens" not in plain
    data = replace(report_data, token_examples=(example(tokens=(EVIL, "b", "c")),))
    html = render_html(data)
    assert TOKEN_STYLE in html
    assert EVIL in Page(html).text and "<script" not in html
    assert "token_examples" not in report_json(data)
