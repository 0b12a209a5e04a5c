"""A calibration in the terminal and in HTML: the numbers of calibration.json, and warnings where they belong."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from made_up_calibration import NUM_CANDIDATES, made_up_result
from shown import Page, look_up

from raylign.report.calibrate_data import CalibrationResult, calibration_json
from raylign.report.calibrate_findings import calibration_sentences, optimisation_sentences, warnings_of
from raylign.report.calibrate_html import render_calibration
from raylign.report.calibrate_text import calibration_text

EVIL = "</td><script>alert('http://evil.example/x.js')</script>"


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> CalibrationResult:
    return made_up_result(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="module")
def html(result) -> str:
    return render_calibration(result)


def with_model(result, index: int, **changed) -> CalibrationResult:
    models = list(result.models)
    models[index] = dataclasses.replace(models[index], **changed)
    return dataclasses.replace(result, models=tuple(models))


def with_quality(result, index: int, **changed) -> CalibrationResult:
    first, *rest = result.models[index].by_flips
    first = dataclasses.replace(first, quality=dataclasses.replace(first.quality, **changed))
    return with_model(result, index, by_flips=(first, *rest))


def assert_numbers_are_those_of(page: Page, content) -> None:
    for key, text in page.cells:
        node = look_up(content, key)
        shown = [(float(m[0]), 0.5 * 10.0 ** -len(m[1] or "")) for m in re.finditer(r"-?\d+(?:\.(\d+))?", text)]
        known = [node[name] for name in ("mean", "low", "high")] if isinstance(node, dict) else [node]
        assert len(shown) == len(known), (key, text)
        for (number, half), value in zip(shown, known, strict=True):
            assert min(abs(value - number), abs(100 * value - number)) <= 1.001 * half, (key, text, value)


def test_every_number_is_that_of_calibration_json(html, result):
    page = Page(html)
    assert len(page.cells) > 60
    assert_numbers_are_those_of(page, json.loads(json.dumps(calibration_json(result), allow_nan=False)))


def test_the_check_above_sees_a_wrong_number(html, result):
    content = calibration_json(result)
    content["rewards"][1]["best_of_n"][0][-1]["gap"]["mean"] += 0.02
    with pytest.raises(AssertionError, match=r"rewards\.1\.best_of_n\.0\.3\.gap"):
        assert_numbers_are_those_of(Page(html), content)


def test_the_terminal_shows_what_the_page_shows(html, result):
    text = " ".join(calibration_text(result).split())
    for key, cell in Page(html).cells:
        assert " ".join(cell.split()) in text, (key, cell)
    assert max(len(line) for line in calibration_text(result).splitlines()) <= 130


def test_all_that_was_promised_is_there(html, result):
    keys = {key for key, _ in Page(html).cells}
    for model in (0, 1):
        for flip in (0, 1):
            for name in ("accuracy", "calibration_error", "calibration_limit", "brier", "log_likelihood"):
                assert f"models.{model}.by_flips.{flip}.quality.{name}" in keys
    for reward in (0, 1, 2):
        for flip in (0, 1):
            assert {f"rewards.{reward}.best_of_n.{flip}.{place}" for place in ("2.gold", "3.gold", "3.gap")} <= keys
    assert {"rewards.1.against_first.0", "rewards.2.policy_gradient.0.2.gap", "models.1.signals.0.auroc"} <= keys
    assert "rewards.0.against_first.0" not in keys


def test_the_page_says_what_gold_is(html, result):
    for text in (Page(html).text, " ".join(calibration_text(result).split())):
        assert "Gold is minus the cost that the embedded judge gives an answer: a model itself" in text
        assert "not human judgement" in text


def test_the_page_is_whole_and_harmless(result):
    html = render_calibration(dataclasses.replace(result, name=EVIL))
    page = Page(html)
    assert "<script" not in html
    assert EVIL in page.text
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    # reliability and best-of-n at both shares of flips, accuracy, weights, training, signals
    assert page.tags.count("img") == 8
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith("data:image/png;base64,")


def test_what_was_not_done_is_left_out(tmp_path):
    result = made_up_result(tmp_path, is_trained=False, familiar={}, shuffled={})
    page = Page(render_calibration(result))
    assert page.tags.count("img") == 6
    assert "Policy gradient" not in page.text
    assert "Signs of unfamiliar input" not in page.text


def test_a_sound_calibration_has_no_warning(result):
    assert warnings_of(result) == ()
    assert "Warnings" not in calibration_text(result)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"floor_share": 0.51}, "51.0 % of the test answers (variance collapse)"),
        ({"floor_share": 0.9, "loss": "mse_reparam"}, "is least at sigma 0 whatever the noise; take gaussian_nll"),
        ({"floor_share": 0.9, "loss": "purm"}, "Lower brme.sigma_floor"),
        ({"anchor_spread": 0.51}, "brme w=0, brme w=0.5 mostly take the member with the lowest one"),
        ({"warnings": ("head 3 diverged",)}, "brme: while fitting: head 3 diverged"),
    ],
)
def test_warnings_name_the_model_the_trouble_and_the_cure(result, changed, words):
    changed = with_model(result, 1, **changed)
    (warning,) = warnings_of(changed)
    assert words in warning
    assert warning.startswith("brme: ")
    assert " ".join(warning.split()) in " ".join(calibration_text(changed).split())


def test_warnings_stand_at_the_top_of_the_page(result):
    changed = with_model(result, 1, floor_share=0.9, warnings=(EVIL,))
    page = Page(render_calibration(changed))
    assert page.attributes.count(("class", "warning")) == 2
    assert all(warning in page.text for warning in warnings_of(changed))
    assert "script" not in page.tags


@pytest.mark.parametrize("changed", [{"floor_share": 0.5}, {"anchor_spread": 0.5}])
def test_limits_themselves_are_no_trouble(result, changed):
    assert warnings_of(with_model(result, 1, **changed)) == ()


def test_a_mean_does_not_care_for_zeros(result):
    rewards = tuple(dataclasses.replace(reward, rule="mean") if reward.model else reward for reward in result.rewards)
    assert warnings_of(dataclasses.replace(with_model(result, 1, anchor_spread=9.0), rewards=rewards)) == ()


def test_chance_is_told_of_one_model_and_of_all(result):
    coin = dataclasses.replace(result.models[0].by_flips[0].quality.accuracy, mean=0.53, low=0.49, high=0.57)
    one = with_quality(result, 0, accuracy=coin)
    (warning,) = warnings_of(one)
    assert "hybrid: orders 53.0 % of the test pairs as labelled, which a coin may do as well" in warning
    *_, last = warnings_of(with_quality(one, 1, accuracy=coin))
    assert last.startswith("No reward model orders test pairs better than a coin")


def test_few_prompts_are_told(result):
    (warning,) = warnings_of(dataclasses.replace(result, num_prompts=19))
    assert "19 prompts: below 20" in warning


def test_calibration_error_within_noise_is_said_to_be_noise(result):
    def of(first: float, second: float) -> str:
        changed = result
        for index, limit in ((0, first), (1, second)):
            by_flips = tuple(
                dataclasses.replace(noisy, quality=dataclasses.replace(noisy.quality, calibration_limit=limit))
                for noisy in result.models[index].by_flips
            )
            changed = with_model(changed, index, by_flips=by_flips)
        return " ".join(calibration_sentences(changed))

    assert of(1.0, 1.0).startswith("Calibration error below its noise limit: hybrid at 0 % flips, hybrid at 25 %")
    assert "above" not in of(1.0, 1.0)
    assert "above its noise limit: all." in of(0.0, 0.0)
    assert "above its noise limit: brme at 0 % flips, brme at 25 % flips." in of(1.0, 0.0)


def test_a_gain_within_noise_and_a_fall_are_told(result):
    assert optimisation_sentences(result) == ()
    reward = result.rewards[0]
    points = list(reward.best_of_n[0])
    points[-1] = dataclasses.replace(
        points[-1], gold=dataclasses.replace(points[-1].gold, mean=0.1, low=-0.2, high=0.4)
    )
    changed = dataclasses.replace(reward, best_of_n=(tuple(points), reward.best_of_n[1]))
    no_gain, fall = optimisation_sentences(dataclasses.replace(result, rewards=(changed, *result.rewards[1:])))
    assert no_gain == (
        f"With 0 % of the labels reversed, the judge sees no gain beyond noise in the best of {NUM_CANDIDATES} by "
        "single."
    )
    assert f"gold is highest before n = {NUM_CANDIDATES} for single (at n = 4)" in fall
