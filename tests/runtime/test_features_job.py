"""The features job against transformers' own hidden states, and the promises of its cache.

Real here: the embedded model and Ray Data. The pairs are random token ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raylign.config import FeaturesSection, PolicySection, RunConfig, TrainSection
from raylign.data.packing import pack_pairs, pair_tokens, plan_micro_batches
from raylign.errors import CacheMismatchError, DataError, ModelError
from raylign.models.loading import load_policy, resolve_model
from raylign.runtime import features_job
from raylign.runtime.features_job import (
    FeatureExtractor,
    features_key,
    pairs_from_table,
    read_features,
    run_features,
    states_from_column,
)
from raylign.runtime.train_worker import WorkerTask, load_policy_forward
from raylign.training.world import World
from raylign.types import FEATURE_COLUMNS

NUM_PAIRS = 40


@pytest.fixture(scope="module")
def model_path() -> str:
    return resolve_model("embedded")


def make_table(num_pairs: int = NUM_PAIRS) -> pa.Table:
    rng = np.random.default_rng(0)

    def ids() -> pa.Array:
        return pa.array([rng.integers(10, 4000, rng.integers(1, 40)) for _ in range(num_pairs)], pa.list_(pa.int32()))

    rows = {"row_id": [f"row-{i}" for i in range(num_pairs)], "source": ["test"] * num_pairs}
    return pa.table(rows | {name: ids() for name in ("prompt_ids", "chosen_ids", "rejected_ids")})


def options(model_path: str, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "config": FeaturesSection(batch_tokens=256),
        "policy": PolicySection(),
        "model_path": model_path,
        "output_dir": output_dir,
        "data_fingerprint": "pairs-1",
    } | changes


def to_table(dataset: Any) -> pa.Table:
    import ray

    return pa.concat_tables(ray.get(dataset.to_arrow_refs()))


def test_features_are_transformers_states_and_log_probabilities(model_path: str) -> None:
    table = make_table(6)
    config = FeaturesSection(layers=[1, 6], dtype="float32", batch_tokens=128)
    features = FeatureExtractor(model_path, config, PolicySection())(table)
    model = load_policy(model_path, dtype="float32")

    assert features.column_names == [*table.column_names, *FEATURE_COLUMNS]
    for half in ("chosen", "rejected"):
        states = states_from_column(features[f"{half}_states"])
        for row, pair in enumerate(pairs_from_table(table)):
            answer = pair.chosen_ids if half == "chosen" else pair.rejected_ids
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, answer]).astype(np.int64))[None]
            with torch.no_grad():
                output = model(ids, output_hidden_states=True)
            expected = np.stack([output.hidden_states[layer][0, -1].numpy() for layer in (1, 6)])
            np.testing.assert_allclose(states[row], expected, rtol=1e-4, atol=1e-4)
            logits = output.logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            expected_logps = logits.gather(1, ids[0, len(pair.prompt_ids) :, None]).sum().item()
            assert features[f"ref_{half}_logps"][row].as_py() == pytest.approx(expected_logps, rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_policy_starts_at_the_reference_in_bfloat16(model_path: str, adapter: Any, parallel: Any) -> None:
    """Delta = policy_logps - reference_logps of training's own policy before its first update is 0, not nearly 0."""
    policy = PolicySection(dtype="bfloat16", adapter=adapter)
    config = RunConfig(
        policy=policy,
        train=TrainSection(parallel=parallel, objective="dpo"),
        features=FeaturesSection(batch_tokens=256),
    )
    table = make_table(12)
    extractor = FeatureExtractor(model_path, config.features, policy, parallel)
    features = extractor(table)
    task = WorkerTask(config=config, pairs="", model=model_path, base=None, identity={}, reward=None, metrics="")
    forward = load_policy_forward(task, World(rank=0, size=1, device=torch.device("cpu"))).train()
    pairs = pairs_from_table(table)
    [plan] = plan_micro_batches([pair_tokens(p, extractor.layout) for p in pairs], batch_tokens=256, num_workers=1)
    for micro_batch in plan:
        index = list(micro_batch.indices)
        batch = pack_pairs(
            [pairs[i] for i in index], layout=extractor.layout, pad_token_id=extractor.pad_token_id, pair_index=index
        )
        scores = forward(batch)
        for half, logps in (("chosen", scores.chosen_logps), ("rejected", scores.rejected_logps)):
            reference = features[f"ref_{half}_logps"].to_numpy()[index]
            np.testing.assert_array_equal(logps.detach().numpy(), reference)


def test_token_budget_does_not_change_features(model_path: str) -> None:
    table = make_table()
    one_by_one, together = (
        FeatureExtractor(model_path, FeaturesSection(dtype="float32", batch_tokens=n), PolicySection())(table)
        for n in (64, 8192)
    )
    for name in ("chosen_states", "rejected_states"):
        np.testing.assert_allclose(
            states_from_column(one_by_one[name]), states_from_column(together[name]), rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(one_by_one["ref_chosen_logps"], together["ref_chosen_logps"], rtol=1e-5)


def test_rows_of_a_sliced_table_stay_theirs() -> None:
    table = make_table()
    sliced = pairs_from_table(pa.concat_tables([table.slice(7, 3), table.slice(0, 2)]))
    whole = pairs_from_table(table)

    for pair, row in zip(sliced, [7, 8, 9, 0, 1], strict=True):
        assert pair.rejected_ids.tolist() == whole[row].rejected_ids.tolist()
    with pytest.raises(DataError, match=r"lack the columns \['chosen_ids'\]"):
        pairs_from_table(table.drop_columns("chosen_ids"))


def test_states_too_large_for_float16_are_refused(model_path: str) -> None:
    extractor = FeatureExtractor(model_path, FeaturesSection(), PolicySection())
    with torch.no_grad():
        extractor.forward.decoder_layers()[2].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(ModelError, match=r"features\.dtype=float32"):
        extractor(make_table(2))


def test_pairs_beyond_the_context_are_refused_before_the_forward(model_path: str) -> None:
    """The embedded model has 1024 positions; past them a forward would go on in silence."""
    extractor = FeatureExtractor(model_path, FeaturesSection(), PolicySection())
    rows = [np.arange(1000) % 100 + 10, np.arange(3) + 10, np.arange(25) + 10]
    columns = {
        name: pa.array([ids], pa.list_(pa.int32()))
        for name, ids in zip(("prompt_ids", "chosen_ids", "rejected_ids"), rows, strict=True)
    }
    with pytest.raises(ModelError, match=r"sequences of 1025 tokens.*data\.max_length.*1024 positions"):
        extractor(pa.table(columns))


def test_no_pair_has_no_features(model_path: str) -> None:
    extractor = FeatureExtractor(model_path, FeaturesSection(), PolicySection())
    empty = extractor(make_table(3).slice(0, 0))

    assert empty.schema == extractor(make_table(3)).schema
    assert empty.num_rows == 0


def test_key_names_what_features_depend_on(model_path: str, tmp_path: Path) -> None:
    inputs = {k: v for k, v in options(model_path, tmp_path).items() if k != "output_dir"}
    key = features_key(**inputs)

    def changed(**changes: Any) -> set[str]:
        other = features_key(**(inputs | changes))
        return {name for name in key if key[name] != other[name]}

    assert changed(config=FeaturesSection(batch_tokens=999, num_actors=2, layers=[1, 2, 3, 4, 5, 6])) == set()
    assert changed(config=FeaturesSection(layers=[3])) == {"layers"}
    assert changed(config=FeaturesSection(dtype="float32")) == {"dtype"}
    assert changed(policy=PolicySection(dtype="bfloat16")) == {"autocast_dtype"}
    lora = PolicySection(dtype="bfloat16", adapter="lora")
    assert changed(policy=lora) == {"autocast_dtype", "weights_dtype"}
    assert changed(policy=lora, parallel="fsdp") == {"autocast_dtype"}
    assert changed(policy=PolicySection(adapter="lora")) == set()
    assert changed(policy=PolicySection(dtype="float32")) == set()
    assert changed(data_fingerprint="pairs-2") == {"data"}
    copy = Path(shutil.copytree(model_path, tmp_path / "copy"))
    assert changed(model_path=copy) == set()
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert changed(model_path=copy) == {"tokenizer"}


@pytest.mark.ray
def test_job_equals_the_plain_path_and_is_not_done_twice(
    ray_cluster: None, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    table, cache = make_table(), tmp_path / "cache"
    dataset = ray.data.from_arrow([table.slice(0, 13), table.slice(13)])
    two_actors = FeaturesSection(batch_tokens=256, num_actors=2, cpus_per_actor=0.5)
    job = to_table(run_features(dataset, **options(model_path, cache, config=two_actors))).sort_by("row_id")
    table = table.sort_by("row_id")  # Ray Data cuts and reads the blocks of two actors in any order

    assert job.column_names == [*table.column_names, *FEATURE_COLUMNS]
    assert job.select(table.column_names).equals(table), "rows changed"
    plain = FeatureExtractor(model_path, FeaturesSection(batch_tokens=256), PolicySection())(table)
    for name in ("chosen_states", "rejected_states"):
        ours, theirs = states_from_column(job[name]), states_from_column(plain[name])
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=2e-3, atol=2e-3)  # float16 steps
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(job[name], plain[name], rtol=1e-5)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["num_pairs"] == NUM_PAIRS
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]

    monkeypatch.setattr(dataset, "count", lambda: pytest.fail("the cached features were computed again"))
    again = run_features(dataset, **options(model_path, cache, config=FeaturesSection(batch_tokens=512)))
    assert to_table(again).sort_by("row_id").equals(job)


def write_features(partial: Path, key: dict[str, Any], writer: str) -> None:
    (partial / "rows").mkdir()
    (partial / "rows" / "0.parquet").write_text(writer)
    (partial / "manifest.json").write_text(json.dumps({"key": key}))


def test_two_jobs_of_one_key_do_not_touch_each_other(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second job starts and finishes in the middle of the first: it wins, and the first takes its features."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(features_job, "read_features", lambda directory: (directory / "rows/0.parquet").read_text())

    def extract(pairs: Any, partial: Path, key: dict[str, Any], *_: Any) -> None:
        write_features(partial, key, writer=pairs)
        if pairs == "first":
            assert run_features("second", **options(model_path, cache)) == "second"
            assert (partial / "rows" / "0.parquet").read_text() == "first"

    monkeypatch.setattr(features_job, "_extract", extract)
    assert run_features("first", **options(model_path, cache)) == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_failed_job_removes_only_what_it_wrote(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / ".cache.another.partial"
    other.mkdir()

    def extract(pairs: Any, partial: Path, *_: Any) -> None:
        (partial / "rows").mkdir()
        raise DataError("lost")

    monkeypatch.setattr(features_job, "_extract", extract)
    with pytest.raises(DataError, match="lost"):
        run_features(None, **options(model_path, tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == [other]


def test_other_inputs_are_refused_by_name(model_path: str, tmp_path: Path) -> None:
    key = features_key(**{k: v for k, v in options(model_path, tmp_path).items() if k != "output_dir"})
    (tmp_path / "manifest.json").write_text(json.dumps({"key": key}))
    with pytest.raises(CacheMismatchError, match="data: was 'pairs-1', now 'pairs-2'"):
        run_features(None, **options(model_path, tmp_path, data_fingerprint="pairs-2"))


def test_a_directory_with_something_else_is_left_alone(model_path: str, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not delete")
    with pytest.raises(CacheMismatchError, match="is not empty and not a feature cache"):
        run_features(None, **options(model_path, tmp_path))
    with pytest.raises(CacheMismatchError, match="holds no finished features"):
        read_features(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.ray
def test_a_failed_job_leaves_no_cache_and_keeps_the_type_of_the_error(
    ray_cluster: None, model_path: str, tmp_path: Path
) -> None:
    import ray.data

    bad = make_table().slice(0, 3)
    bad = bad.set_column(2, "prompt_ids", pa.array([[11], [], [12]], pa.list_(pa.int32())))
    with pytest.raises(DataError, match="pair 1 has 0 prompt"):
        run_features(ray.data.from_arrow(bad), **options(model_path, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.ray
def test_a_lost_row_is_an_error(
    ray_cluster: None, model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    dataset = ray.data.from_arrow(make_table(4))
    monkeypatch.setattr(dataset, "count", lambda: 5)
    with pytest.raises(DataError, match="given 5 pairs and wrote 4"):
        run_features(dataset, **options(model_path, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
