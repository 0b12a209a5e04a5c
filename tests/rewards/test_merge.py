"""Weight averaging: exact for linear heads, the identity for one member, refused for strangers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raylign.errors import DataError, ShapeError
from raylign.rewards.merge import average_weights, check_same_start, weights_hash

HASH = "0" * 32


def heads(num_members: int) -> list[nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    members = [nn.Linear(6, 1, dtype=torch.float64) for _ in range(num_members)]
    for member in members:
        nn.init.normal_(member.weight, generator=generator)
        nn.init.normal_(member.bias, generator=generator)
    return members


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.0]])
def test_merged_linear_heads_predict_the_mean_prediction(weights):
    members, features = heads(3), torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    merged = nn.Linear(6, 1, dtype=torch.float64)
    merged.load_state_dict(average_weights((m.state_dict() for m in members), start_hashes=[HASH] * 3, weights=weights))
    predictions = torch.stack([m(features)[:, 0] for m in members], dim=1)
    shares = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(merged(features)[:, 0], predictions @ (shares / shares.sum()), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_member_is_itself_to_the_bit(dtype):
    state = {"w": torch.randn(9, 4).to(dtype), "steps": torch.tensor(7)}
    merged = average_weights([state], start_hashes=[HASH])
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], state[name]) and merged[name].dtype == state[name].dtype for name in state)


def test_members_of_different_starts_are_refused_by_both_hashes():
    start = {"backbone": torch.ones(3), "head": torch.zeros(2)}
    other = start | {"head": torch.tensor([0.0, 1e-7])}
    same, strange = weights_hash(start), weights_hash(other)
    check_same_start([same, weights_hash({name: start[name].clone() for name in reversed(start)})])
    with pytest.raises(DataError) as error:
        average_weights([start, other], start_hashes=[same, strange])
    assert same in str(error.value) and strange in str(error.value)


def test_the_hash_sees_names_types_shapes_and_bytes():
    base = {"w": torch.arange(6.0)}
    variants = [
        {"v": torch.arange(6.0)},
        {"w": torch.arange(6.0).reshape(2, 3)},
        {"w": torch.arange(6.0).to(torch.float64)},
        {"w": torch.arange(6.0).roll(1)},
        {"w": torch.arange(6.0), "scale": torch.tensor(1.0)},
    ]
    assert len({weights_hash(state) for state in [base, *variants]}) == 6
    assert weights_hash({"w": torch.arange(12.0)[::2] / 2}) == weights_hash(base)  # strides do not count


def test_uneven_members_are_refused():
    state = {"w": torch.ones(2)}
    with pytest.raises(ShapeError, match="same tensors"):
        average_weights([state, {"v": torch.ones(2)}], start_hashes=[HASH] * 2)
    with pytest.raises(ShapeError, match=r"w is \(3,\) in member 1"):
        average_weights([state, {"w": torch.ones(3)}], start_hashes=[HASH] * 2)
    with pytest.raises(ShapeError, match="differ in member 1"):
        average_weights([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}], start_hashes=[HASH] * 2)
    with pytest.raises(DataError, match="1 members for 2"):
        average_weights([state], start_hashes=[HASH] * 2)
    with pytest.raises(DataError, match="more members"):
        average_weights([state, state], start_hashes=[HASH])
    with pytest.raises(DataError, match="weights"):
        average_weights([state, state], start_hashes=[HASH] * 2, weights=[1.0, -1.0])
    with pytest.raises(DataError, match="got none"):
        average_weights([], start_hashes=[])
