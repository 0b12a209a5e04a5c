"""Records and checkpoints of a training worker on their way to disk and to Ray."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

if TYPE_CHECKING:
    from raylign.runtime.train_worker import WorkerTask
    from raylign.training.state import TrainerState
    from raylign.training.world import World


_SCRATCH = ".checkpoint-"  # beside the checkpoints, because a node's /tmp may be too small for one


class Reporter:
    """Hands records to the metrics file and checkpoints to Ray.

    Args:
        task: from the driver.
        world: this worker.
        identity: that checkpoints are marked with.
    """

    def __init__(self, task: WorkerTask, world: World, identity: dict[str, Any]) -> None:
        from raylign.models.loading import load_tokenizer

        self._file = Path(task.metrics)
        self._world = world
        self._identity = identity
        self._base = task.base
        self._tokenizer = load_tokenizer(task.model, trust_remote_code=task.config.policy.trust_remote_code)

    def start(self, update: int) -> None:
        """Drop records of updates that will be done again, and what a killed worker was writing."""
        if self._world.rank != 0:
            return
        for scratch in self._file.parent.glob(f"{_SCRATCH}*"):
            shutil.rmtree(scratch, ignore_errors=True)
        kept = [line for line in _whole_lines(self._file) if json.loads(line)["step"] <= update]
        temporary = self._file.with_name(f".{self._file.name}.new")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self._file)

    def record(self, record: dict[str, float]) -> None:
        """Append one line."""
        if self._world.rank == 0:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")

    def checkpoint(self, state: TrainerState, record: dict[str, float]) -> None:
        """Save on the first worker and report on all: a barrier."""
        from raylign.training.state import save_checkpoint

        with tempfile.TemporaryDirectory(dir=self._file.parent, prefix=_SCRATCH) as scratch:
            directory = Path(scratch) / "checkpoint"
            directory.mkdir()
            save_checkpoint(
                directory,
                state,
                tokenizer=self._tokenizer,
                identity=self._identity,
                base=self._base,
                world=self._world,
            )
            ray.train.report(
                {**record, "step": state.update},
                checkpoint=ray.train.Checkpoint.from_directory(directory) if self._world.rank == 0 else None,
                checkpoint_dir_name=f"step_{state.update:07d}",
                checkpoint_upload_fn=self._put,
            )

    def _put(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Put a written checkpoint in its place, whole or not at all, without copying it."""
        place = self._file.parent / name
        shutil.rmtree(place, ignore_errors=True)  # of a worker that died before it reported
        Path(checkpoint.path).rename(place)
        return ray.train.Checkpoint.from_directory(place)


def _whole_lines(file: Path) -> list[str]:
    """Complete lines; a worker may have died while writing the last one."""
    if not file.exists():
        return []
    return [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
