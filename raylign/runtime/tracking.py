"""Weights & Biases beside the run's own records: the driver follows `metrics.jsonl` and sends what is new.

The records are the truth; tracking reads them and can be switched on, off, or on again in a resumed run without any
change to them. Only the driver talks to wandb. The key comes from the environment variable WANDB_API_KEY, never from
the configuration.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from raylign.config import RunConfig
from raylign.errors import ConfigError, MissingDependencyError, RaylignError
from raylign.runtime.phases import write_json
from raylign.runtime.progress import phase_line

STEP_METRIC = "train/global_step"
STATE_FILE = "wandb.json"
_KEY = "WANDB_API_KEY"
_POLL_S = 1.0


@contextmanager
def track_run(config: RunConfig, run_directory: Path, metrics_file: Path) -> Iterator[None]:
    """While the block runs, send the records that training appends to `metrics_file`; do nothing when wandb is off.

    Names are those of TRL's dashboards: "train/loss", "train/rewards/margins", against "train/global_step". A resumed
    run continues the wandb run whose id lies in the run directory and sends no update twice.

    Args:
        config: `tracking` says whether and where; all other values are shown as the run's config.
        run_directory: holds `wandb.json` and wandb's own files.
        metrics_file: JSON lines with a "step"; need not exist yet.

    Raises:
        MissingDependencyError: wandb is not installed.
        ConfigError: online tracking without a key in the environment.
    """
    if config.tracking.wandb == "off":
        yield
        return
    with _open_run(config, run_directory) as run:
        follower = _Follower(run, run_directory / STATE_FILE, metrics_file)
        stop = threading.Event()
        thread = threading.Thread(target=follower.follow, args=(stop,), name="raylign-tracking", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if follower.error is not None:  # a tracking service must not cost a finished training
                phase_line("tracking", f"stopped after update {follower.last_step}: {follower.error!r}")


def record_summary(config: RunConfig, run_directory: Path, values: Mapping[str, float | int | str | None]) -> None:
    """Put results, for example safety after training, into the summary of the wandb run; nothing when wandb is off.

    Raises:
        MissingDependencyError: wandb is not installed.
        ConfigError: online tracking without a key in the environment.
    """
    if config.tracking.wandb == "off":
        return
    try:
        with _open_run(config, run_directory) as run:
            run.summary.update({name: value for name, value in values.items() if value is not None})
    except RaylignError:
        raise
    except Exception as error:  # whatever the client throws: a tracking service must not cost a finished run
        phase_line("tracking", f"summary not recorded: {error!r}")


@contextmanager
def _open_run(config: RunConfig, run_directory: Path) -> Iterator[Any]:
    wandb = _import_wandb()
    if config.tracking.wandb == "online" and not os.environ.get(_KEY):
        raise ConfigError(f"tracking.wandb=online needs the key in the environment variable {_KEY}; or use offline")
    run = wandb.init(
        project=config.tracking.project,
        name=config.run.name,
        id=_run_id(run_directory / STATE_FILE),
        resume="allow",
        dir=str(run_directory),
        mode=config.tracking.wandb,
        config=config.model_dump(),
        settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
    )
    run.define_metric(STEP_METRIC)
    run.define_metric("*", step_metric=STEP_METRIC)
    try:
        yield run
    finally:
        run.finish()


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise MissingDependencyError("tracking.wandb needs wandb: pip install wandb") from error
    return wandb


def _run_id(state_file: Path) -> str:
    """The id of this run directory, made once."""
    state = _read_state(state_file)
    if "run_id" not in state:
        state = {"run_id": secrets.token_hex(4), "last_step": 0}
        write_json(state_file, state)
    return str(state["run_id"])


def _read_state(state_file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return state


class _Follower:
    """Sends the records of a growing file.

    Attributes:
        last_step: newest update sent, in this session or an earlier one.
        error: why sending stopped, None while it works.
    """

    def __init__(self, run: Any, state_file: Path, metrics_file: Path) -> None:
        self._run = run
        self._state_file = state_file
        self._metrics_file = metrics_file
        self.last_step = int(_read_state(state_file).get("last_step", 0))
        self.error: Exception | None = None

    def follow(self, stop: threading.Event) -> None:
        """Send until told to stop, then once more."""
        try:
            while not stop.wait(_POLL_S):
                self.send_new()
            self.send_new()
        except Exception as error:  # whatever the client throws; reported by the caller
            self.error = error

    def send_new(self) -> None:
        """Send records of updates after the newest one sent."""
        before = self.last_step
        for record in read_records(self._metrics_file):
            step = int(record["step"])
            if step > self.last_step:
                named = {f"train/{name}": value for name, value in record.items() if name != "step"}
                # wandb's own step too, so that offline files of a resumed run do not overlap when they are synced
                self._run.log({STEP_METRIC: step, **named}, step=step)
                self.last_step = step
        if self.last_step > before:
            write_json(self._state_file, {**_read_state(self._state_file), "last_step": self.last_step})


def read_records(metrics_file: Path) -> list[dict[str, Any]]:
    """Whole records of a metrics file; a last line still being written is left for the next time."""
    if not metrics_file.exists():
        return []
    lines = metrics_file.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]
