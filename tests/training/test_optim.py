"""Optimiser groups and learning-rate schedules."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import tiny_model

from raylign.training.optim import build_optimizer, build_scheduler, learning_rate_scale


def test_norms_and_biases_are_not_decayed_and_frozen_weights_are_left_out() -> None:
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    matrices, vectors = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in matrices["params"] + vectors["params"]} == trained


def test_a_model_without_vectors_gets_one_group() -> None:
    optimizer = build_optimizer(torch.nn.Linear(3, 2, bias=False), learning_rate=1e-3, weight_decay=0.1)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.5, (1 + math.cos(math.pi * 7 / 8)) / 2), ("linear", 0.5, 1 / 8), ("constant", 1.0, 1.0)],
)
def test_schedules_warm_up_then_follow_their_formula(schedule: str, middle: float, last: float) -> None:
    scales = [learning_rate_scale(u, schedule=schedule, num_updates=10, num_warmup=2) for u in range(10)]
    assert scales[:3] == [0.5, 1.0, 1.0]
    assert scales[6] == pytest.approx(middle)
    assert scales[9] == pytest.approx(last)


def test_scheduler_scales_the_peak_and_every_update_moves() -> None:
    optimizer = build_optimizer(tiny_model(), learning_rate=2.0, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, schedule="linear", num_updates=4, warmup_fraction=0.25)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2.0, 2.0, 4 / 3, 2 / 3])
