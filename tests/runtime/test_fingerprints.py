"""What the fingerprint of ingested pairs sees; features are cached by it."""

from __future__ import annotations

import pyarrow as pa
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PAIRS = {
    "row_id": ["a", "b", "c"],
    "prompt_key": ["p", "p", "q"],
    "split": ["train", "train", "test"],
    "prompt_ids": [[1, 2], [1, 2], [3]],
    "chosen_ids": [[4], [5, 6], [7]],
    "rejected_ids": [[8], [9], [10, 11]],
    "source": ["x", "x", "x"],
}
VERDICTS = {"chosen_safe": [True, None, False], "rejected_safe": [False, None, None]}


def fingerprint(columns, *, num_blocks=1):
    import ray.data

    from raylign.runtime.fingerprints import pairs_fingerprint

    return pairs_fingerprint(ray.data.from_arrow(pa.table(columns)).repartition(num_blocks))


def test_it_follows_what_later_phases_read_and_nothing_else():
    whole = PAIRS | VERDICTS
    same = fingerprint(whole)
    assert fingerprint(whole, num_blocks=3) == same
    assert fingerprint(whole | {"source": ["y", "y", "y"]}) == same
    changes = [
        {"row_id": ["a", "b", "d"]},
        {"split": ["train", "train", "train"]},
        {"chosen_ids": [[4], [5], [6, 7]]},
        {"chosen_safe": [True, None, True]},
        {"rejected_safe": [False, False, None]},
    ]
    found = [fingerprint(whole | change) for change in changes] + [fingerprint(PAIRS)]
    assert len({same, *found}) == 1 + len(changes) + 1
