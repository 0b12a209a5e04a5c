"""The diversity of stacked matrices against singular values known by hand."""

from __future__ import annotations

import math

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses.diversity import lora_diversity, nuclear_norm


def test_the_norm_of_a_diagonal_is_its_trace():
    stack = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert float(nuclear_norm(stack, is_normalized=False)) == pytest.approx(7, abs=1e-12)
    assert float(nuclear_norm(stack)) == pytest.approx(7 / (5 * math.sqrt(2)), abs=1e-12)
    assert float(nuclear_norm(stack)) == pytest.approx(0.989949, abs=1e-6)


def test_equal_members_add_nothing_but_scale_and_orthogonal_ones_add_up():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    alone = nuclear_norm(a, is_normalized=False)
    twice = lora_diversity([[a, a]], is_normalized=False)
    torch.testing.assert_close(twice, math.sqrt(2) * alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(lora_diversity([[a, a]]), nuclear_norm(a), rtol=1e-12, atol=0)  # max(R, D) is 7 in both

    first, second = torch.zeros(2, 2), torch.zeros(2, 2)
    first[0, 0], second[1, 1] = 1, 1
    assert float(lora_diversity([[first, second]], is_normalized=False)) == pytest.approx(2, abs=1e-6)
    assert float(lora_diversity([[first, first]], is_normalized=False)) == pytest.approx(math.sqrt(2), abs=1e-6)
    assert float(lora_diversity([[first, second]])) > float(lora_diversity([[first, first]]))


@pytest.mark.parametrize("is_normalized", [True, False])
def test_only_the_raw_norm_rises_with_the_scale_alone(is_normalized):
    a = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio = float(nuclear_norm(5 * a, is_normalized=is_normalized) / nuclear_norm(a, is_normalized=is_normalized))
    assert ratio == pytest.approx(1.0 if is_normalized else 5.0, abs=1e-12)


def test_layers_of_different_widths_are_averaged():
    wide, narrow = torch.eye(2, 6), 3 * torch.eye(2, 3)
    assert float(lora_diversity([[wide], [narrow]], is_normalized=False)) == pytest.approx((2 + 6) / 2)


@pytest.mark.parametrize("is_normalized", [True, False])
def test_gradient(is_normalized):
    generator = torch.Generator().manual_seed(2)
    members = [torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *ms: lora_diversity([ms], is_normalized=is_normalized), members)


def test_climbing_the_normalised_norm_pulls_equal_members_apart():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, 8, generator=generator)
    members = [(start + 1e-3 * torch.randn(2, 8, generator=generator)).requires_grad_() for _ in range(3)]
    optimizer = torch.optim.SGD(members, lr=2.0)
    before = float(lora_diversity([members]).detach())
    for _ in range(200):
        optimizer.zero_grad()
        (-lora_diversity([members])).backward()
        optimizer.step()
    ends = [member.detach() for member in members]
    cosine = torch.cosine_similarity(ends[0].flatten(), ends[1].flatten(), dim=0)
    assert float(lora_diversity([ends])) > before + 0.2
    assert abs(float(cosine)) < 0.3


def test_zeros_are_finite_and_empty_or_uneven_stacks_are_refused():
    assert float(nuclear_norm(torch.zeros(2, 3))) == 0
    with pytest.raises(ShapeError, match="not empty"):
        nuclear_norm(torch.zeros(0, 3))
    with pytest.raises(ShapeError, match="at least one layer"):
        lora_diversity([])
    with pytest.raises(ShapeError, match="widths"):
        lora_diversity([[torch.eye(2), torch.eye(3)]])
