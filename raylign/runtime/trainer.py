"""Run the off-policy trainer on Ray Train: resources checked first, progress shown, failures survived or explained."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError  # has no public name in 2.60

from raylign.config import RunConfig
from raylign.cost.ledger import Ledger
from raylign.errors import CheckpointError, ConfigError, OutputExistsError, RaylignError, ResourceError, TrainingError
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.identity import base_model_name, run_identity
from raylign.runtime.progress import progress_bar
from raylign.runtime.resources import ResourcePlan, check_demand
from raylign.runtime.stored_pairs import store_pairs
from raylign.runtime.train_worker import PAIRS, WorkerTask, train_worker

if TYPE_CHECKING:
    import ray.data

METRICS_FILE = "metrics.jsonl"
REWARD_DIR = "reward"
_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of finished checkpoints
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_POLL_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
_START_RETRIES = 2
_POLL_S = 0.5


def run_training(
    ranked: ray.data.Dataset | str | Path,
    *,
    config: RunConfig,
    model_path: str | Path,
    storage_path: str | Path,
    name: str,
    heads: FittedReward | str | Path | None = None,
    ledger: Ledger | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.Result:
    """Train the policy on ranked pairs; the newest checkpoint holds a plain HF or PEFT directory `policy/`.

    Everything is written below `<storage_path>/<name>`: `metrics.jsonl`, checkpoints `step_<update>`, the pairs when
    they came as a Dataset, and the reward when it came as an object. A run found there is continued from its newest
    checkpoint when `config.run.resume` is set. Ray must be initialised.

    Args:
        ranked: pairs with the columns of the rank phase; a directory of parquet files is read in place by all workers.
        config: of the run.
        model_path: directory of the policy before training.
        storage_path: directory that all nodes see.
        name: of this training below it.
        heads: fitted reward, saved as `reward/` beside the rest, or directory of the reward phase; read when
            confidence.source=live.
        ledger: what it costs is recorded here; by default in `ledger/` of the training.
        callbacks: of Ray Train, run on its controller.

    Returns:
        Ray's result; `metrics` is the last record, `checkpoint` the last checkpoint.

    Raises:
        ResourceError: the workers do not fit the cluster.
        OutputExistsError: a training is there and `run.resume` is not set.
        CheckpointError: the checkpoint to resume from is damaged or of another run.
        TrainingError: the loss is not finite, or workers failed more than `train.max_failures` times.
    """
    plan = ResourcePlan.from_config(config)
    check_demand(plan.training, ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]])
    is_live = config.train.objective == "label_confidence" and config.confidence.source == "live"
    if is_live and heads is None:
        raise ConfigError("confidence.source=live needs the fitted reward or its directory (argument heads)")
    directory = Path(storage_path).expanduser().absolute() / name
    model = str(Path(model_path).absolute())
    with reward_directory(heads if is_live else None) as found:
        identity = run_identity(config, model=model, reward=found)
    check_resume(directory, config, identity)
    directory.mkdir(parents=True, exist_ok=True)
    reward = store_reward(heads, directory) if is_live and heads is not None else None
    pairs = _materialise(ranked, directory)
    task = WorkerTask(
        config=config,
        pairs=str(pairs),
        model=model,
        base=base_model_name(config.policy.model, model),
        identity=identity,
        reward=reward,
        metrics=str(directory / METRICS_FILE),
        ledger=ledger or Ledger(directory / LEDGER_DIR, run=name, method=config.train.method),
        devices=plan.training_devices,
    )
    return fit_workers(train_worker, task, directory, num_updates=_num_updates(config, pairs), callbacks=callbacks)


def fit_workers(
    worker: Callable[[Mapping[str, Any]], Any],
    task: WorkerTask,
    directory: Path,
    *,
    num_updates: int,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> ray.train.Result:
    """Run a train function on Ray Train's workers, with progress, and failures told by their cause.

    Args:
        worker: gets {"task": task}; returns the error that ended training, if one did.
        task: for every worker.
        directory: of the training; its name is Ray Train's name of the run.
        num_updates: length of the progress bar.
        callbacks: of Ray Train.

    Raises:
        RaylignError: the cause of the failure.
    """
    config = task.config
    trainer = TorchTrainer(
        worker,
        train_loop_config={"task": task},
        scaling_config=_scaling(config),
        run_config=ray.train.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures, controller_failure_limit=_START_RETRIES
            ),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    with _ray_train_limits(config), _progress(directory / METRICS_FILE, num_updates):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as failure:
            raise explain_failure(failure, config) from failure
    if isinstance(result.return_value, TrainingError):
        raise result.return_value
    return result


def explain_failure(failure: ray.train.TrainingFailedError, config: RunConfig) -> RaylignError:
    """The typed error a worker raised, or one that says which worker died of what.

    Args:
        failure: what `fit` raised.
        config: of the run, for the cure.
    """
    controller_failure = getattr(failure, "controller_failure", None)
    if controller_failure is not None:
        if "Timeout" in type(controller_failure).__name__:
            return ResourceError(
                f"{config.resources.num_workers} training worker(s) did not start within "
                f"resources.start_timeout_s={config.resources.start_timeout_s:g}: another job may hold the resources"
            )
        return TrainingError(f"Ray Train's controller failed: {controller_failure}")
    causes: Mapping[int, BaseException] = {
        rank: getattr(error, "_base_exc", error) for rank, error in getattr(failure, "worker_failures", {}).items()
    }
    for _, cause in sorted(causes.items()):
        if isinstance(cause, RaylignError):
            return cause
    told = "; ".join(f"worker {rank}: {type(c).__name__}: {_first_line(c)}" for rank, c in sorted(causes.items()))
    return TrainingError(
        f"training workers failed more than train.max_failures={config.train.max_failures} times ({told or failure}); "
        "the finished checkpoints are kept, continue with run.resume=true"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def check_resume(
    directory: Path, config: RunConfig, identity: Mapping[str, Any], *, unknown: Sequence[str] = (PAIRS,)
) -> None:
    """Fail before workers start, and restart, over what can be told from here.

    Args:
        directory: of the training.
        config: of the run.
        identity: that its checkpoints must have.
        unknown: entries of it that only workers can tell.

    Raises:
        OutputExistsError: a training is there and `run.resume` is not set.
        CheckpointError: its newest checkpoint is damaged or of another run.
    """
    if not (directory / _SNAPSHOT).exists():
        return
    if not config.run.resume:
        raise OutputExistsError(f"{directory} holds a training; continue it with run.resume=true or use another name")
    from raylign.training.state import check_checkpoint

    try:
        with warnings.catch_warnings():
            # Ray 2.60 reads its own snapshot through names that pydantic has deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            checkpoint = ray.train.Result.from_path(directory).checkpoint
    except (CheckpointManagerInitializationError, RuntimeError) as error:
        raise CheckpointError(
            f"Ray Train cannot read its list of checkpoints, {directory / _SNAPSHOT}: {error}; restore what is missing "
            "from a backup, or start under a new run.name"
        ) from error
    if checkpoint is not None:
        check_checkpoint(Path(checkpoint.path), identity, unknown=unknown)


@contextmanager
def reward_directory(heads: FittedReward | str | Path | None) -> Iterator[Path | None]:
    """Where the files of a reward can be read while the block runs; nothing is written to the run yet."""
    if not isinstance(heads, FittedReward):
        yield None if heads is None else Path(heads)
        return
    with tempfile.TemporaryDirectory() as scratch:
        heads.save(Path(scratch))
        yield Path(scratch)


def store_reward(heads: FittedReward | str | Path, directory: Path) -> str:
    """Directory that all workers read the reward from."""
    if not isinstance(heads, FittedReward):
        return str(Path(heads).absolute())
    (directory / REWARD_DIR).mkdir(exist_ok=True)
    heads.save(directory / REWARD_DIR)
    return str(directory / REWARD_DIR)


def _scaling(config: RunConfig) -> ray.train.ScalingConfig:
    resources = {"CPU": config.resources.cpus_per_worker}
    if config.resources.gpus_per_worker:
        resources["GPU"] = config.resources.gpus_per_worker
    return ray.train.ScalingConfig(
        num_workers=config.resources.num_workers,
        use_gpu=config.resources.gpus_per_worker > 0,
        resources_per_worker=resources,
        placement_strategy=config.resources.placement.upper(),
    )


def _materialise(ranked: ray.data.Dataset | str | Path, directory: Path) -> Path:
    """A directory of parquet files; a Dataset is written below the training's directory."""
    if isinstance(ranked, str | Path):
        return Path(ranked).expanduser().absolute()
    pairs = directory / "pairs"
    store_pairs(ranked, pairs, is_continued=(directory / _SNAPSHOT).exists())
    return pairs


def _num_updates(config: RunConfig, pairs: Path) -> int:
    """Length of the run, from the parquet files' counts alone.

    Raises:
        DataError: no pair to train on.
    """
    from raylign.training.order import DataOrder
    from raylign.training.table import count_split

    return DataOrder(
        num_pairs=count_split(pairs, "train"),
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
    ).num_updates


def poll_interval_s(num_workers: int) -> float:
    """Seconds that Ray Train's controller waits between two looks at its workers.

    Every look takes up one report and notices the end of training, and while a report waits for its look, the next one
    blocks training: Ray's own two seconds cost more than the updates of a small run. A look is one call to each worker,
    made by one process, so they are kept to 64 calls a second, up to Ray's own interval.

    Args:
        num_workers: of the training.
    """
    return min(2.0, max(0.5, num_workers / 64))


@contextmanager
def _ray_train_limits(config: RunConfig) -> Iterator[None]:
    """Set what Ray Train reads from the driver's environment only; a poll interval found there is the user's."""
    before = {name: os.environ.get(name) for name in (_START_TIMEOUT, _POLL_INTERVAL)}
    os.environ[_START_TIMEOUT] = str(config.resources.start_timeout_s)
    os.environ.setdefault(_POLL_INTERVAL, str(poll_interval_s(config.resources.num_workers)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _progress(metrics: Path, num_updates: int) -> Iterator[None]:
    """Show a bar while the block runs, on terminals only, from what the first worker has recorded."""
    stop = threading.Event()

    def draw() -> None:
        for _ in progress_bar(_finished_updates(metrics, stop), label="train", total=num_updates):
            pass

    thread = threading.Thread(target=draw, name="raylign-train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _finished_updates(metrics: Path, stop: threading.Event) -> Iterator[int]:
    """Numbers of finished updates as the records grow, until told to stop; going back after a resume is not shown."""
    shown = 0
    while True:
        is_stopping = stop.wait(_POLL_S)
        last = _last_step(metrics)
        while shown < last:
            shown += 1
            yield shown
        if is_stopping:
            return


def _last_step(metrics: Path) -> int:
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):  # not there yet, or a line in the making
        return 0
