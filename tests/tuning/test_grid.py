"""The vectorised grid equals a fit per setting, and keeps what the validation pairs favour."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raylign.config import RunConfig, load_config
from raylign.rewards.fit import predict
from raylign.runtime.pair_states import PairStates
from raylign.runtime.reward_job import Held, head_fitter
from tuning.grid import Quality, ScreenData, Screened, fit_sizes, quality, screen, survivors
from tuning.sweep_config import Trial, cheap_part, is_cheap

NUM_LAYERS, WIDTH = 2, 8


def pairs(num_pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, num_pairs, NUM_LAYERS, WIDTH, generator=generator)
    direction = 0.15 * torch.ones(WIDTH)
    return noise[0] + direction, noise[1] - direction


TRAIN, VALID, TEST = pairs(60, 0), pairs(30, 1), pairs(40, 2)
GROUPS = [f"p{i}" for i in range(60)]


def config(kind: str = "ensemble", num_heads: int | None = 3, **confidence: Any) -> RunConfig:
    reward = {"kind": kind, "epochs": 2, "batch_size": 16} | ({} if num_heads is None else {"num_heads": num_heads})
    return load_config(values={"reward": reward, "confidence": confidence})


def data() -> ScreenData:
    sides = [torch.cat([part[i] for part in (TRAIN, VALID, TEST)]) for i in (0, 1)]
    split = ["train"] * 60 + ["valid"] * 30 + ["test"] * 40
    keys = GROUPS + [f"v{i}" for i in range(70)]
    return ScreenData.of(PairStates(chosen=sides[0], rejected=sides[1], prompt_key=keys, split=split))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_first_replicate_of_every_size_is_the_fit_of_a_run(size: int) -> None:
    grid = fit_sizes(TRAIN, VALID, config(), [(1, True), (2, True), (4, True)], replicates=3)
    alone = head_fitter(TRAIN, GROUPS, VALID, config(num_heads=size))(torch.arange(60))
    got, want = (predict(head, TEST[0]) for head in (grid[size, True][0], alone))
    torch.testing.assert_close(got.head_rewards, want.head_rewards, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-4, atol=1e-4)


def test_replicates_are_different_members() -> None:
    heads = fit_sizes(TRAIN, VALID, config(), [(2, True), (2, False)], replicates=2)
    rewards = [predict(head, TEST[0]).head_rewards for head in heads[2, False]]
    assert float((rewards[0] - rewards[1]).abs().min(0).values.max()) > 1e-4
    assert not torch.equal(predict(heads[2, True][0], TEST[0]).mean, predict(heads[2, False][0], TEST[0]).mean)


def test_a_screened_setting_is_what_its_own_fit_says() -> None:
    settings = [
        ({"reward.num_heads": 2, "confidence.alpha": 3.0}, config(num_heads=2, alpha=3.0)),
        ({"reward.num_heads": 4, "confidence.alpha": 3.0}, config(num_heads=4, alpha=3.0)),
        ({"reward.kind": "hybrid"}, config("hybrid", None)),
    ]
    rows = screen(data(), settings, replicates=2)
    assert [(row.keys, row.num_heads, len(row.test)) for row in rows] == [
        (settings[0][0], 2, 2),
        (settings[1][0], 4, 2),
        (settings[2][0], 1, 2),
    ]
    for row, (_, one) in zip(rows, settings, strict=True):
        head = head_fitter(TRAIN, GROUPS, VALID, one)(torch.arange(60))
        center = Held.of(head, *VALID).mean_reward
        want = quality(Held.of(head, *TEST), one, center=center, temperature=1.0)
        got = row.test[0]
        assert (got.accuracy, got.flips) == (want.accuracy, want.flips)
        assert (got.ece, got.brier) == pytest.approx((want.ece, want.brier), abs=1e-4)


def test_ensembles_that_differ_in_what_no_fit_reads_are_still_one_fit() -> None:
    """The second replicate of a size is made of other members when the largest size is not in the same fit."""

    def rows(*folds: int) -> list[Screened]:
        rewards = [
            {"kind": "ensemble", "epochs": 2, "batch_size": 16, "num_heads": size, "folds": num, "max_pairs": 10 * num}
            for size, num in zip((2, 4), folds, strict=True)
        ]
        settings = [({"reward.num_heads": one["num_heads"]}, load_config(values={"reward": one})) for one in rewards]
        return screen(data(), settings, replicates=2)

    assert rows(2, 3) == rows(3, 3)


def test_a_floor_changes_flips_and_not_the_belief() -> None:
    settings = [({"confidence.floor": floor}, config(floor=floor)) for floor in (0.0, 0.5)]
    free, floored = (row.test[0] for row in screen(data(), settings, replicates=1))
    assert free.flips > 0
    assert floored.flips == 0
    assert (free.ece, free.brier) == (floored.ece, floored.brier)


def row(brier: float, accuracy: float, **keys: Any) -> Screened:
    one = Quality(accuracy=accuracy, ece=0.1, brier=brier, flips=0.0)
    two = Quality(accuracy=accuracy, ece=0.1, brier=brier + 0.02, flips=0.0)
    return Screened(keys={k.replace("_", ".", 1): v for k, v in keys.items()}, num_heads=1, valid=(one, two), test=())


def test_the_best_beliefs_survive_with_all_their_floors() -> None:
    scores = {1: (0.3, 0.9), 2: (0.1, 0.7), 3: (0.2, 0.8)}
    rows = [
        row(*of_alpha, confidence_alpha=alpha, confidence_floor=floor)
        for alpha, of_alpha in scores.items()
        for floor in (0.0, 0.5)
    ]
    assert [keys["confidence.alpha"] for keys in survivors(rows, keep=1, metric="brier")] == [2, 2]
    assert [keys["confidence.alpha"] for keys in survivors(rows, keep=2, metric="accuracy")] == [1, 1, 3, 3]
    assert len(survivors(rows, keep=9, metric="ece")) == 6


def test_cheap_is_what_shows_on_cached_states() -> None:
    keys = ("reward.kind", "brme.loss", "confidence.alpha", "confidence.source", "reward.max_pairs")
    assert [is_cheap(key, "brme") for key in keys] == [True, True, True, False, False]
    point = Trial(point="p", keys={"reward.num_heads": 2, "train.beta": 0.1}, seed=0, config=config())
    assert cheap_part(point) == {"reward.num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("hybrid", "folds", (2, 4)),
        ("ensemble", "folds", (2, 4)),
        ("brme", "folds", (2, 4)),
        ("laplace", "folds", (2, 4)),
        ("ensemble", "num_heads", (2, 4)),
        ("brme", "num_heads", (2, 4)),
        ("laplace", "num_heads", (2, 4)),
        ("ensemble", "max_pairs", (20, 30)),
    ],
)
def test_keys_are_cheap_for_the_kinds_that_they_change(kind: str, name: str, values: tuple[int, int]) -> None:
    rewards = [({"kind": kind} if kind == "laplace" else {"kind": kind, "epochs": 2}) | {name: one} for one in values]
    settings = [({f"reward.{name}": one[name]}, load_config(values={"reward": one})) for one in rewards]
    first, second = screen(data(), settings, replicates=1)
    assert is_cheap(f"reward.{name}", kind) == (first.valid != second.valid)


def test_where_no_confidence_is_read_the_belief_is_the_probability_of_the_order() -> None:
    online = load_config(values={"reward": {"kind": "hybrid"}, "train": {"method": "online_dpo"}})
    head = head_fitter(TRAIN, GROUPS, VALID, config("hybrid", None))(torch.arange(60))
    held = Held.of(head, *TEST)
    prob = torch.sigmoid((held.chosen.mean - held.rejected.mean) / 0.5)
    found = quality(held, online, center=0.0, temperature=0.5)
    assert found.brier == pytest.approx(float((1 - prob).square().mean()), rel=1e-5)
    assert found.flips == pytest.approx(1 - found.accuracy)
