"""Spaces: what is read, what is refused, and the points that searches take."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylign.errors import ConfigError
from tuning.search_space import Axis, corner_points, find_space, grid_points, random_points, read_space

GRID = (Axis(key="a.x", kind="grid", values=(1, 2)), Axis(key="b.y", kind="grid", values=("u", "v", "w")))
MIXED = (Axis(key="a.x", kind="grid", values=(1, 2, 3)), Axis(key="b.y", kind="loguniform", values=(1e-6, 1e-2)))


def write(directory: Path, text: str) -> str:
    file = directory / "own.yaml"
    file.write_text(text)
    return str(file)


def test_plain_values_are_fixed_and_mappings_are_axes(tmp_path: Path) -> None:
    space = read_space(
        write(tmp_path, "train.beta: {loguniform: [1e-3, 1]}\ntrain.epochs: 2\nsweep.seeds: [0, 1]\ndata.path: x")
    )
    assert space.name == "own"
    assert space.fixed == {"train.epochs": 2, "sweep.seeds": [0, 1], "data.path": "x"}
    assert space.axes == (Axis(key="train.beta", kind="loguniform", values=(1e-3, 1)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.beta: 1", "has no axis"),
        ("beta: {grid: [1, 2]}", "'beta' must look like section.key"),
        ("train.beta: {gird: [1, 2]}", "found gird; did you mean grid"),
        ("train.beta: {grid: [1, 2], choice: [1, 2]}", "exactly one of grid, choice"),
        ("train.beta: {grid: 3}", r"train\.beta\.grid must be a list, found 3"),
        ("train.beta: {grid: [1]}", "two values or more, each once"),
        ("train.beta: {grid: [1, 1.0]}", "two values or more, each once"),
        ("train.beta: {uniform: [2, 1]}", "low below high"),
        ("train.beta: {uniform: [1, 2, 3]}", "low below high"),
        ("train.beta: {loguniform: [0, 1]}", "must be above 0"),
        ("train.epochs: {randint: [1, 2.5]}", "whole numbers"),
    ],
)
def test_what_is_no_space_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_space(write(tmp_path, text))


def test_a_space_that_is_not_there_names_those_that_ship() -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor one that ships .*multipliers"):
        find_space("multiplier")
    assert find_space("multipliers") == find_space("multipliers.yaml")


def test_a_grid_is_every_combination_in_order() -> None:
    assert [tuple(point.values()) for point in grid_points(GRID)] == [
        (1, "u"), (1, "v"), (1, "w"), (2, "u"), (2, "v"), (2, "w"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"b\.y has none"):
        grid_points(MIXED)


def test_random_points_are_distinct_within_their_ranges_and_a_prefix_of_more() -> None:
    points = random_points(MIXED, num=40, seed=3)
    assert len({tuple(point.values()) for point in points}) == 40
    assert {point["a.x"] for point in points} == {1, 2, 3}
    assert all(1e-6 <= point["b.y"] <= 1e-2 for point in points)
    below_middle = sum(point["b.y"] < 1e-4 for point in points)  # the middle of the logarithms
    assert 10 <= below_middle <= 30
    assert random_points(MIXED, num=7, seed=3) == points[:7]
    assert random_points(MIXED, num=7, seed=4) != points[:7]


def test_whole_numbers_reach_both_ends() -> None:
    axis = (Axis(key="a.x", kind="randint", values=(2, 4)),)
    assert sorted(point["a.x"] for point in random_points(axis, num=3, seed=0)) == [2, 3, 4]
    with pytest.raises(ConfigError, match="has about 3"):
        random_points(axis, num=4, seed=0)


def test_corners_show_every_listed_value_and_both_ends() -> None:
    corners = corner_points(MIXED)
    assert {point["a.x"] for point in corners} == {1, 2, 3}
    assert {point["b.y"] for point in corners} == {1e-6, 1e-2}
