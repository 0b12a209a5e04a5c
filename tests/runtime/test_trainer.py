"""Training through Ray Train: what it writes, what it survives, and what it says when it cannot go on.

Real here: Ray, its workers and storage, the kills (a worker by os._exit, a driver by SIGKILL), a two-layer model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import HIDDEN, NUM_LAYERS, save_tiny_model, tiny_table, write_pairs

from raylign.config import RunConfig, load_config
from raylign.cost.rows import read_ledger, total
from raylign.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DataNotFoundError,
    OutputExistsError,
    ResourceError,
    TrainingError,
)

pytestmark = pytest.mark.ray

NUM_PAIRS = 18
NUM_UPDATES = 10  # two epochs of five updates, the last of each with two pairs


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("ranked") / "pairs", tiny_table(NUM_PAIRS, num_valid=6))


def make_config(*overrides: str) -> RunConfig:
    fixed = ["train.batch_size=4", "train.epochs=2", "train.learning_rate=0.005", "train.batch_tokens=64"]
    return load_config(overrides=[*fixed, "train.checkpoint_every=3", "train.log_every=2", *overrides])


def run(config: RunConfig, model_dir: Path, pairs: Any, storage: Path, name: str = "train", **options: Any) -> Any:
    from raylign.runtime.trainer import run_training

    return run_training(pairs, config=config, model_path=model_dir, storage_path=storage, name=name, **options)


def weights(result: Any) -> dict[str, torch.Tensor]:
    return load_file(next((Path(result.checkpoint.path) / "policy").glob("*.safetensors")))


def records(storage: Path, name: str = "train") -> list[dict[str, float]]:
    lines = (storage / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


class Trained(NamedTuple):
    """Final weights, metric records and storage of a run."""

    weights: dict[str, torch.Tensor]
    records: list[dict[str, float]]
    storage: Path


@pytest.fixture(scope="module")
def uninterrupted(
    ray_cluster: None, model_dir: Path, pairs_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """The run of `make_config()` that nothing happens to; tests that change its files copy them."""
    storage = tmp_path_factory.mktemp("uninterrupted")
    result = run(make_config(), model_dir, pairs_dir, storage)
    assert [path.name for path in sorted((storage / "train").glob("step_*"))] == ["step_0000009", "step_0000010"]
    assert result.metrics["step"] == NUM_UPDATES
    assert [r["step"] for r in records(storage)] == [2, 4, 6, 8, 10]
    return Trained(weights(result), records(storage), storage)


def assert_bitwise(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_ray_trains_what_a_plain_loop_trains(uninterrupted: Trained, model_dir: Path, pairs_dir: Path) -> None:
    from raylign.models.forward import PolicyForward
    from raylign.models.loading import load_policy
    from raylign.training.loop import train_offline
    from raylign.training.metrics import MetricWindow
    from raylign.training.micro_batches import Packing
    from raylign.training.optim import build_optimizer, build_scheduler
    from raylign.training.order import DataOrder
    from raylign.training.state import TrainerState
    from raylign.training.table import PairTable, read_split

    config = make_config()
    policy = PolicyForward(load_policy(model_dir, dtype="float32"))
    optimizer = build_optimizer(policy, learning_rate=0.005, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, schedule="cosine", num_updates=NUM_UPDATES, warmup_fraction=0.03)
    train_offline(
        TrainerState(policy=policy, optimizer=optimizer, scheduler=scheduler, window=MetricWindow(has_confidence=True)),
        PairTable(read_split(pairs_dir, "train")),
        DataOrder(num_pairs=NUM_PAIRS, batch_size=4, seed=0, epochs=2),
        settings=config.train,
        packing=Packing(layout="shared", pad_token_id=1, batch_tokens=64),
        seed=0,
    )
    trained = dict(policy.model.state_dict())
    assert_bitwise({name: trained[name] for name in uninterrupted.weights}, uninterrupted.weights)


@pytest.fixture
def dying_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt of the next run dies in update 6, after its checkpoint at update 3."""

    def train_worker_that_dies(loop_config: dict[str, Any]) -> Any:  # nested, so that it travels by value
        from raylign.runtime.train_worker import train_worker
        from raylign.training import loop

        update = loop.offline_update
        directory = Path(loop_config["task"].metrics).parent

        def deadly(*args: Any, **options: Any) -> Any:
            if options["update"] == 5 and not (directory / "died").exists():
                deadline = time.monotonic() + 60  # dying earlier could lose the checkpoint, rightly
                while not (directory / "checkpoint_manager_snapshot.json").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                os.close(os.open(directory / "died", os.O_CREAT | os.O_EXCL))
                os._exit(1)
            with (directory / "updates").open("a") as done:
                done.write(f"{options['update']} ")
            return update(*args, **options)

        loop.offline_update = deadly
        try:
            return train_worker(loop_config)
        finally:
            loop.offline_update = update

    monkeypatch.setattr("raylign.runtime.trainer.train_worker", train_worker_that_dies)


def test_a_killed_worker_costs_no_bit(
    uninterrupted: Trained, model_dir: Path, pairs_dir: Path, tmp_path: Path, dying_worker: None
) -> None:
    result = run(make_config("train.max_failures=1"), model_dir, pairs_dir, tmp_path)
    assert (tmp_path / "train" / "updates").read_text() == "0 1 2 3 4 3 4 5 6 7 8 9 "
    assert_bitwise(weights(result), uninterrupted.weights)
    assert records(tmp_path) == uninterrupted.records
    rows = read_ledger(tmp_path / "train" / "ledger")
    assert {row.phase for row in rows} == {"policy_update"}
    [killed] = [row for row in rows if not row.is_finished]  # the last update of the first epoch, and the deadly one
    assert killed.cost.counts.num_items in (0, 2)  # whether the ledger said so before the kill
    assert total(rows).counts.num_items == NUM_PAIRS + (4 + 2) + NUM_PAIRS - (2 - killed.cost.counts.num_items)


def test_a_killed_variational_run_ends_where_a_plain_loop_does(
    ray_cluster: None, model_dir: Path, pairs_dir: Path, tmp_path: Path, dying_worker: None
) -> None:
    from raylign.runtime.train_worker import WorkerTask, build_state
    from raylign.training.loop import train_offline
    from raylign.training.order import DataOrder
    from raylign.training.table import PairTable, read_split
    from raylign.training.world import World

    config = make_config("train.objective=ava_p", "ava.discount=0.9", "train.max_failures=1")
    result = run(config, model_dir, pairs_dir, tmp_path)
    assert (tmp_path / "train" / "updates").read_text() == "0 1 2 3 4 3 4 5 6 7 8 9 "

    task = WorkerTask(
        config=config, pairs=str(pairs_dir), model=str(model_dir), base=None, identity={}, reward=None, metrics=""
    )
    table = PairTable(read_split(pairs_dir, "train"))
    order = DataOrder(num_pairs=NUM_PAIRS, batch_size=4, seed=0, epochs=2)
    state, packing = build_state(task, table, order, World())
    expected: list[dict[str, float]] = []
    train_offline(state, table, order, settings=config.train, packing=packing, seed=0, on_record=expected.append)
    trained = dict(state.policy.model.state_dict())
    found = weights(result)
    assert_bitwise({name: trained[name] for name in found}, found)
    heads = load_file(Path(result.checkpoint.path) / "token_heads" / "heads.safetensors")
    assert_bitwise(dict(state.policy.token_heads.state_dict()), heads)
    assert records(tmp_path) == [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in expected]

    with pytest.raises(CheckpointError, match=r"ava\.discount: was 0\.9, now 0\.95"):
        run(make_config("train.objective=ava_p", "run.resume=true"), model_dir, pairs_dir, tmp_path)


def test_a_worker_that_always_dies_is_explained(
    ray_cluster: None, model_dir: Path, pairs_dir: Path, tmp_path: Path, dying_worker: None
) -> None:
    with pytest.raises(TrainingError, match=r"train\.max_failures=0 times \(worker 0: .*run\.resume=true"):
        run(make_config("train.max_failures=0"), model_dir, pairs_dir, tmp_path)


DRIVER = """
import sys
from pathlib import Path
import ray
sys.path.insert(0, sys.argv[1])
from test_trainer import make_config, run
ray.init(address=sys.argv[5], log_to_driver=False)
run(make_config(), Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
"""


@pytest.mark.slow
def test_a_killed_driver_is_continued_by_resume(
    uninterrupted: Trained, model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    """SIGKILL as soon as the first checkpoint is registered; `run.resume` finishes bitwise."""
    import ray

    here = Path(__file__)
    driver = subprocess.Popen(
        [
            *(sys.executable, "-c", DRIVER, str(here.parent), str(model_dir), str(pairs_dir), str(tmp_path)),
            ray.get_runtime_context().gcs_address,
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here.parents[2])])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    snapshot = tmp_path / "train" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 120
    while not snapshot.exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert snapshot.exists()

    result = run(make_config("run.resume=true"), model_dir, pairs_dir, tmp_path)
    assert_bitwise(weights(result), uninterrupted.weights)
    assert records(tmp_path) == uninterrupted.records


def test_a_finished_run_is_not_repeated_and_not_overwritten(
    uninterrupted: Trained, model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted.storage, tmp_path, dirs_exist_ok=True)
    with pytest.raises(OutputExistsError, match=r"run\.resume=true"):
        run(make_config(), model_dir, pairs_dir, tmp_path)

    again = run(make_config("run.resume=true"), model_dir, pairs_dir, tmp_path)
    assert Path(again.checkpoint.path) == tmp_path / "train" / "step_0000010"
    assert_bitwise(weights(again), uninterrupted.weights)
    assert records(tmp_path) == uninterrupted.records

    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"train\.beta: was 0\.15, now 0\.3"):
        run(make_config("run.resume=true", "train.beta=0.3"), model_dir, pairs_dir, tmp_path)
    assert time.monotonic() - started < 5

    changed = write_pairs(tmp_path / "others", tiny_table(NUM_PAIRS, seed=8))
    with pytest.raises(CheckpointError, match=r"training worker 0 of 1: .*pairs: was"):
        run(make_config("run.resume=true", "train.max_failures=0"), model_dir, changed, tmp_path)


def test_a_checkpoint_that_is_gone_or_damaged_is_named_at_once(
    uninterrupted: Trained, model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted.storage, tmp_path, dirs_exist_ok=True)
    config = make_config("run.resume=true")
    checkpoint = tmp_path / "train" / "step_0000010"
    (checkpoint / "policy" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has 4 bytes instead of \d+"):
        run(config, model_dir, pairs_dir, tmp_path)
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match=r"(?s)checkpoint_manager_snapshot\.json: .*step_0000010.*new run\.name"):
        run(config, model_dir, pairs_dir, tmp_path)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_rank_and_update_without_a_retry(
    ray_cluster: None, model_dir: Path, tmp_path: Path
) -> None:
    reference = [float("inf") if i == 11 else -20.0 for i in range(NUM_PAIRS)]
    pairs = write_pairs(tmp_path / "pairs", tiny_table(NUM_PAIRS, ref_chosen_logps=reference))
    with pytest.raises(TrainingError, match=r"training worker 0 of 1: update \d: the loss of 1 of \d pairs"):
        run(make_config(), model_dir, pairs, tmp_path)


@pytest.mark.slow
def test_two_workers_train_what_one_trains(
    uninterrupted: Trained, model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    result = run(make_config("resources.num_workers=2"), model_dir, pairs_dir, tmp_path)
    for name, value in weights(result).items():
        torch.testing.assert_close(value, uninterrupted.weights[name], rtol=0, atol=2e-5)
    for mine, theirs in zip(records(tmp_path), uninterrupted.records, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@pytest.mark.slow
def test_a_dataset_trains_like_its_parquet_files(
    uninterrupted: Trained, model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    import ray

    dataset = ray.data.read_parquet(str(pairs_dir)).map_batches(lambda table: table, batch_format="pyarrow")
    result = run(make_config(), model_dir, dataset, tmp_path)
    assert_bitwise(weights(result), uninterrupted.weights)


@pytest.mark.slow
def test_live_confidence_follows_anchors(ray_cluster: None, model_dir: Path, pairs_dir: Path, tmp_path: Path) -> None:
    from raylign.rewards.hybrid import HybridReward
    from raylign.runtime.fitted_reward import FittedReward

    heads = tuple(HybridReward(NUM_LAYERS, HIDDEN, generators=[torch.Generator().manual_seed(k)]) for k in range(3))
    fitted = FittedReward(
        heads=heads[:2],
        centers=(0.0, 0.0),
        full=heads[2],
        full_center=0.0,
        temperature=1.0,
        fold_seed=0,
        metrics={},
    )
    live = ["confidence.source=live", "confidence.track=anchor", "confidence.track_batch_size=3"]
    result = run(make_config(*live), model_dir, pairs_dir, tmp_path, heads=fitted)
    assert 0 < result.metrics["confidence/mean"] < 1
    state = torch.load(Path(result.checkpoint.path) / "trainer_state" / "training.pt", weights_only=True)
    assert len(state["live"]["heads"]) == 2
    assert not torch.equal(state["live"]["heads"][0]["probe_weight"], heads[0].probe_weight)

    others = dataclasses.replace(fitted, heads=heads[1::-1])
    with pytest.raises(CheckpointError, match="heads: was"):
        run(make_config(*live, "run.resume=true"), model_dir, pairs_dir, tmp_path, heads=others)
    kept = FittedReward.load(tmp_path / "train" / "reward").heads[0]
    assert torch.equal(kept.probe_weight, heads[0].probe_weight)

    with pytest.raises(ConfigError, match="heads"):
        run(make_config(*live), model_dir, pairs_dir, tmp_path, name="other")


def test_too_large_a_plan_fails_at_once_with_both_numbers(
    ray_cluster: None, model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"3 training worker\(s\) x 1 CPU ask for 3 CPU, the cluster has 2"):
        run(make_config("resources.num_workers=3"), model_dir, pairs_dir, tmp_path)
    assert time.monotonic() - started < 5
    assert not (tmp_path / "train").exists()


def test_pairs_that_cannot_be_trained_on_are_refused_before_workers_start(
    ray_cluster: None, model_dir: Path, pairs_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match="no parquet file"):
        run(make_config(), model_dir, tmp_path / "empty", tmp_path)
    valid_only = pq.read_table(pairs_dir, filters=[("split", "=", "valid")])
    with pytest.raises(DataError, match="num_pairs=0"):
        run(make_config(), model_dir, write_pairs(tmp_path / "valid", valid_only), tmp_path)


@pytest.mark.parametrize(("num_workers", "seconds"), [(1, 0.5), (32, 0.5), (64, 1.0), (128, 2.0), (1000, 2.0)])
def test_looks_at_workers_are_rarer_when_there_are_many(num_workers: int, seconds: float) -> None:
    from raylign.runtime.trainer import poll_interval_s

    assert poll_interval_s(num_workers) == seconds


@pytest.mark.parametrize(("of_the_user", "used"), [(None, "0.5"), ("7", "7")])
def test_ray_train_reads_its_limits_while_it_runs_only(
    of_the_user: str | None,
    used: str,
    ray_cluster: None,
    model_dir: Path,
    pairs_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray.train

    names = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if of_the_user is not None:
        monkeypatch.setenv(names[0], of_the_user)

    class Trainer:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def fit(self) -> Any:
            read = tuple(os.environ[name] for name in names)
            return ray.train.Result(metrics={"read": read}, checkpoint=None, error=None, path=str(tmp_path))

    monkeypatch.setattr("raylign.runtime.trainer.TorchTrainer", Trainer)
    result = run(make_config("resources.start_timeout_s=45"), model_dir, pairs_dir, tmp_path)
    assert result.metrics["read"] == (used, "45.0")
    assert [os.environ.get(name) for name in names] == [of_the_user, None]
