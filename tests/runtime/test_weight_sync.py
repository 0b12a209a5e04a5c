"""Weights as buckets, and the checks after an update."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from raylign.errors import ShapeError, StaleWeightsError
from raylign.runtime.sampler_usage import SamplerUsage
from raylign.runtime.weight_sync import (
    EngineReport,
    Probe,
    SentUpdate,
    WeightUpdate,
    check_report,
    checksums,
    compare_probe,
    pack_buckets,
    unpack_bucket,
)

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.0),
    "strided": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "ids": torch.tensor([1, 2, 3]),
}
PROBE = Probe(token_ids=(5, 6, 7), token_logps=np.array([-1.0, -2.0], np.float32))


def report(**changes) -> EngineReport:
    good = EngineReport(
        version=3,
        dtype="float32",
        checksums=({"a": 1, "b": 2},),
        not_loaded=(),
        probe_logps=PROBE.token_logps.copy(),
        usage=SamplerUsage(),
    )
    return dataclasses.replace(good, **changes)


def check(found: EngineReport) -> object:
    return check_report(found, engine="engine 1", version=3, sent={"a": 1, "b": 2}, probe=PROBE)


@pytest.mark.parametrize("max_bytes", [1, 40, 64, 10**6])
def test_tensors_come_out_of_buckets_as_they_went_in(max_bytes):
    tensors, found = {}, {}
    for bucket in pack_buckets(WEIGHTS, max_bytes):
        unpacked, sums = unpack_bucket(pickle.loads(pickle.dumps(bucket, protocol=5)))
        tensors |= unpacked
        found |= sums
    assert list(tensors) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert tensors[name].dtype == tensor.dtype
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    assert found == checksums(WEIGHTS)


def test_buckets_keep_their_limit_and_large_tensors_travel_alone():
    weights = {str(i): torch.zeros(8) for i in range(5)} | {"large": torch.zeros(100)}
    sizes = [(len(bucket.parts), len(bucket.data)) for bucket in pack_buckets(weights, 64)]
    assert sizes == [(2, 64), (2, 64), (1, 32), (1, 400)]


def test_unpacked_tensors_do_not_share_memory_with_the_bucket():
    (bucket,) = pack_buckets({"a": torch.ones(4)})
    bucket.data.setflags(write=False)  # as Ray's object store hands it out
    tensors, _ = unpack_bucket(bucket)
    tensors["a"] += 1
    assert bucket.data.view(np.float32).tolist() == [1, 1, 1, 1]


def test_one_flipped_bit_changes_the_checksum_of_its_tensor_alone():
    (bucket,) = pack_buckets(WEIGHTS)
    bucket.data[bucket.parts[1].start] ^= 1
    _, found = unpack_bucket(bucket)
    sent = checksums(WEIGHTS)
    assert {name for name in sent if sent[name] != found[name]} == {"b"}


def test_a_faithful_engine_passes():
    difference = check(report())
    assert (difference.mean, difference.largest, difference.kl) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "engine 1, weights version 3: the engine states version 2"),
        ({"checksums": ({"a": 1, "b": 9},)}, "tensor b has checksum 00000009 .* sent 00000002"),
        ({"checksums": ({"a": 1},)}, "tensor b has checksum none"),
        ({"checksums": ({"a": 1, "b": 2, "c": 3},)}, "tensor c .* sent none"),
        ({"checksums": ({"a": 1, "b": 2}, {"a": 4, "b": 2})}, "tensor a .* process 1"),
        ({"not_loaded": ("x", "y")}, "reached 2 parameters of the engine, for example x"),
        ({"probe_logps": PROBE.token_logps + 2e-3}, "differ .* by 0.002 nats"),
        ({"probe_logps": PROBE.token_logps * np.nan}, "differ .* by nan"),
        ({"probe_logps": PROBE.token_logps + 0.2, "dtype": "bfloat16"}, "allowed are 0.05 and 1 in bfloat16"),
    ],
)
def test_an_engine_with_other_weights_is_found_out(changes, message):
    with pytest.raises(StaleWeightsError, match=message):
        check(report(**changes))


def test_one_far_token_is_enough_however_long_the_probe():
    probe = Probe(token_ids=tuple(range(1001)), token_logps=np.zeros(1000, np.float32))
    found = np.zeros(1000, np.float32)
    found[17] = 0.05  # mean 5e-5 is within the limit
    with pytest.raises(StaleWeightsError, match=r"0\.05 at most"):
        check_report(report(probe_logps=found), engine="e", version=3, sent={"a": 1, "b": 2}, probe=probe)


def test_number_types_have_tolerances_of_their_own():
    shifted = PROBE.token_logps + 0.02
    check(report(probe_logps=shifted, dtype="bfloat16"))
    with pytest.raises(StaleWeightsError, match="float32"):
        check(report(probe_logps=shifted))


def test_probe_differences_by_hand():
    difference = compare_probe(np.log([0.5, 0.1]), np.log([0.25, 0.4]))
    assert difference.mean == pytest.approx(1.5 * np.log(2))
    assert difference.largest == pytest.approx(2 * np.log(2))
    # exp(d) - 1 - d with d = log 2 and d = -log 4
    assert difference.kl == pytest.approx(((2 - 1 - np.log(2)) + (0.25 - 1 + np.log(4))) / 2)


def test_a_probe_needs_one_log_probability_less_than_tokens():
    with pytest.raises(ShapeError, match=r"found 3 tokens .* \(3,\)"):
        Probe(token_ids=(1, 2, 3), token_logps=np.zeros(3, np.float32))
    with pytest.raises(ShapeError):
        compare_probe(np.zeros(2), np.zeros(3))


def test_version_zero_is_the_model_as_loaded():
    with pytest.raises(ValueError, match="version=0"):
        WeightUpdate(version=0, weights={}, adapter=None, probe=PROBE)


@pytest.mark.parametrize("adapter", [None, {"r": 8}])
def test_full_weights_travel_in_the_number_type_of_the_engines(adapter):
    update = WeightUpdate(version=1, weights=WEIGHTS, adapter=adapter, probe=PROBE)
    assert SentUpdate.of(update, dtype="float32").weights.keys() == WEIGHTS.keys()
    sent = SentUpdate.of(update, dtype="bfloat16")
    wide = {name for name, tensor in WEIGHTS.items() if tensor.dtype == torch.float32}
    for name, tensor in WEIGHTS.items():
        expected = tensor.bfloat16() if name in wide and adapter is None else tensor
        assert sent.weights[name].dtype == expected.dtype
        assert torch.equal(sent.weights[name], expected)
    assert sent.sent == checksums(sent.weights)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in WEIGHTS.values())
    saved = sum(WEIGHTS[name].numel() * 2 for name in wide) if adapter is None else 0
    assert sent.num_bytes == whole - saved
