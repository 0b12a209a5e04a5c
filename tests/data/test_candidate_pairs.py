from __future__ import annotations

import numpy as np
import pytest

from raylign.data.candidates import candidate_pairs
from raylign.errors import ShapeError


def test_better_half_meets_the_candidate_half_the_ranks_below():
    pairs = candidate_pairs([0.3, -1, 2, 0, 5, 4, -2, 1])  # ascending: 6 1 3 0 | 7 2 5 4
    assert pairs.tolist() == [[7, 6], [2, 1], [5, 3], [4, 0]]


def test_an_odd_number_drops_the_median():
    assert candidate_pairs([3.0, 1.0, 2.0, 5.0, 4.0]).tolist() == [[4, 1], [3, 2]]


def test_ties_keep_the_order_of_the_candidates():
    assert candidate_pairs(np.zeros(4)).tolist() == [[2, 0], [3, 1]]
    levels = np.arange(400) % 2  # many ties, where an unstable sort shows
    assert candidate_pairs(levels).tolist() == [[i + 1, i] for i in range(0, 400, 2)]


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_too_few_candidates_make_no_pair(scores):
    assert candidate_pairs(scores).shape == (0, 2)


def test_several_prompts_at_once_are_refused():
    with pytest.raises(ShapeError, match="one prompt"):
        candidate_pairs(np.zeros((2, 4)))
