"""Metric windows: a checkpoint in the middle of one continues it, in the format that checkpoints have."""

from __future__ import annotations

import pytest
import torch

from raylign.training.gradient import SUMS, GradientSummary
from raylign.training.gradient_metrics import GradientWindow
from raylign.training.metrics import MetricWindow
from raylign.training.offline import COLUMNS, UpdateSummary


def pairs(scale: float) -> UpdateSummary:
    values = torch.tensor([0.25, 0.75]) * scale
    return UpdateSummary(
        columns=dict.fromkeys(COLUMNS, values), num_tokens=20, num_slots=32, grad_norm=scale, learning_rate=0.5
    )


def responses(scale: float) -> GradientSummary:
    sums = {name: scale * (index + 1.0) for index, name in enumerate(SUMS)}
    return GradientSummary(sums=sums | {"tokens": 20.0}, num_responses=2, grad_norm=scale, learning_rate=0.5)


WINDOWS = [(lambda: MetricWindow(has_confidence=True), pairs), (GradientWindow, responses)]


def untimed(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not name.endswith("per_second")}


@pytest.mark.parametrize(("build", "update"), WINDOWS)
def test_a_restored_window_goes_on_where_the_saved_one_was(build, update):
    whole, first, second = build(), build(), build()
    whole.add(update(1.0))
    whole.add(update(2.0))
    first.add(update(1.0))
    second.load_state_dict(first.state_dict())
    second.add(update(2.0))
    assert untimed(second.record(step=2, epoch=1.0)) == untimed(whole.record(step=2, epoch=1.0))
    assert second.record(step=2, epoch=1.0)["num_tokens"] == 40
    assert second.record(step=2, epoch=1.0)["grad_norm"] == 1.5  # over two updates


@pytest.mark.parametrize(("build", "update"), WINDOWS)
def test_the_next_window_starts_empty_but_counts_all_tokens(build, update):
    window, fresh = build(), build()
    window.add(update(1.0))
    window.clear()
    window.add(update(2.0))
    fresh.add(update(2.0))
    found = untimed(window.record(step=2, epoch=1.0))
    assert found == untimed(fresh.record(step=2, epoch=1.0)) | {"num_tokens": 40}


@pytest.mark.parametrize(("build", "update"), WINDOWS)
def test_the_state_is_plain_and_not_the_window_itself(build, update):
    window = build()
    window.add(update(1.0))
    state = window.state_dict()
    assert set(state) == {"sums", "num_tokens_seen"}
    assert {"grad_norm", "learning_rate", "updates", "seconds"} < set(state["sums"])
    restored = build()
    restored.load_state_dict(state)
    window.add(update(2.0))
    restored.add(update(2.0))
    assert state["sums"]["updates"] == 1


@pytest.mark.parametrize(("build", "update"), WINDOWS)
def test_the_clock_counts_from_its_restart(build, update, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    window = build()
    now[0] += 50.0
    window.restart_clock()
    now[0] += 4.0
    window.add(update(1.0))
    record = window.record(step=1, epoch=1.0)
    [rate] = [record[name] for name in record if name.endswith("tokens_per_second")]
    assert rate == 20 / 4.0
