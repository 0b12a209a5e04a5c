"""Search spaces: dotted config keys with what each may be, read from YAML, and the points that a search takes of them.

    constraint.kind: rectified                              # a plain value holds for all points
    constraint.multiplier: {grid: [0.25, 0.5, 1, 2]}        # an axis: every value
    train.learning_rate: {loguniform: [1e-6, 1e-4]}         # an axis: drawn (search random or optuna)

No torch, no ray.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from raylign.config import merge_config
from raylign.errors import ConfigError

Kind = Literal["grid", "choice", "uniform", "loguniform", "randint"]
PointKeys: TypeAlias = Mapping[str, Any]  # dotted config key -> value

KINDS: tuple[Kind, ...] = get_args(Kind)
SPACES = Path(__file__).parent / "spaces"
_LISTED = ("grid", "choice")
_MAX_DRAWS = 1000  # tries per point before a random search gives up finding a new one


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What one key may be.

    Attributes:
        key: dotted config key.
        kind: grid (every value), choice (one of the values), uniform, loguniform, or randint, both ends included.
        values: those listed, or low and high.
    """

    key: str
    kind: Kind
    values: tuple[Any, ...]

    def draw(self, generator: np.random.Generator) -> Any:
        """One value; listed ones are equally likely."""
        if self.kind in _LISTED:
            return self.values[int(generator.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(generator.integers(low, high, endpoint=True))
        if self.kind == "uniform":
            return float(generator.uniform(low, high))
        return math.exp(generator.uniform(math.log(low), math.log(high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A search space.

    Attributes:
        name: of the file, without its suffix.
        fixed: keys that are the same for all points; `sweep.*` keys among them.
        axes: in the order of the file.
    """

    name: str
    fixed: PointKeys
    axes: tuple[Axis, ...]


def find_space(name: str) -> Path:
    """The file of a space: a path, or the name of one that ships.

    Raises:
        ConfigError: neither exists.
    """
    shipped = SPACES / f"{Path(name).stem}.yaml"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    names = sorted(path.stem for path in SPACES.glob("*.yaml"))
    raise ConfigError(f"space {name!r} is neither a file nor one that ships ({', '.join(names)})")


def read_space(name: str) -> Space:
    """Read a search space.

    Args:
        name: path of a YAML file, or name of a shipped space.

    Raises:
        ConfigError: no such file, no axis, or an entry that is neither a value nor an axis.
    """
    path = find_space(name)
    content = merge_config(path)
    axes, fixed = [], {}
    for key, value in content.items():
        section, _, field = str(key).partition(".")
        if not section or not field:
            raise ConfigError(f"space {path.name}: {key!r} must look like section.key, for example train.beta")
        if isinstance(value, Mapping):
            axes.append(_axis(path.name, str(key), value))
        else:
            fixed[str(key)] = value
    if not axes:
        raise ConfigError(
            f"space {path.name} has no axis; give at least one key several values, "
            "for example train.beta: {grid: [0.1, 0.2]}"
        )
    return Space(name=path.stem, fixed=fixed, axes=tuple(axes))


def _axis(where: str, key: str, content: Mapping[str, Any]) -> Axis:
    kind = next((kind for kind in KINDS if kind in content), None)
    if len(content) != 1 or kind is None:
        found = ", ".join(map(str, content)) or "nothing"
        near = difflib.get_close_matches(found, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"for example {key}: {{grid: [1, 2]}}"
        raise ConfigError(f"space {where}: {key} needs exactly one of {', '.join(KINDS)}, found {found}; {hint}")
    values = content[kind]
    if not isinstance(values, list):
        raise ConfigError(f"space {where}: {key}.{kind} must be a list, found {values!r}")
    if kind in _LISTED:
        if len(values) < 2 or any(values.count(value) > 1 for value in values):
            raise ConfigError(f"space {where}: {key}.{kind}={values} needs two values or more, each once")
    else:
        _check_range(where, key, kind, values)
    return Axis(key=key, kind=kind, values=tuple(values))


def _check_range(where: str, key: str, kind: Kind, values: Sequence[Any]) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if len(values) != 2 or not numbers or not values[0] < values[1]:
        raise ConfigError(f"space {where}: {key}.{kind}={list(values)} must be [low, high] with low below high")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise ConfigError(f"space {where}: {key}.randint={list(values)} must be whole numbers")
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"space {where}: {key}.loguniform={list(values)} must be above 0")


def grid_points(axes: Sequence[Axis]) -> list[PointKeys]:
    """Every combination of the listed values, the last axis fastest.

    Raises:
        ConfigError: an axis that has no list of values to go through.
    """
    drawn = [axis.key for axis in axes if axis.kind != "grid"]
    if drawn:
        raise ConfigError(
            f"sweep.search=grid goes through listed values, {', '.join(drawn)} has none; give it {{grid: [...]}} or "
            "use sweep.search=random"
        )
    return [
        dict(zip((axis.key for axis in axes), values, strict=True))
        for values in itertools.product(*(axis.values for axis in axes))
    ]


def random_points(axes: Sequence[Axis], *, num: int, seed: int) -> list[PointKeys]:
    """Distinct random points; the first ones of a larger number are those of a smaller one.

    Args:
        axes: each drawn by itself.
        num: how many.
        seed: of the draws.

    Raises:
        ConfigError: the space has fewer points.
    """
    generator = np.random.default_rng(seed)
    points: list[PointKeys] = []
    for _ in range(num):
        for _ in range(_MAX_DRAWS):
            point = {axis.key: axis.draw(generator) for axis in axes}
            if point not in points:
                points.append(point)
                break
        else:
            raise ConfigError(f"sweep.num_samples={num} points are asked for, the space has about {len(points)}")
    return points


def corner_points(axes: Sequence[Axis]) -> list[PointKeys]:
    """Points that together show every listed value and both ends of every range, for checks before a search."""
    longest = max(len(axis.values) for axis in axes)
    return [{axis.key: axis.values[min(row, len(axis.values) - 1)] for axis in axes} for row in range(longest)]
