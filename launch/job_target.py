"""The command that a job runs, checked here as far as it can be: its configuration, and what it names is shipped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launch.upload import Upload
from raylign.config import EMBEDDED, RunConfig, load_config, merge_config
from raylign.errors import ConfigError, DataNotFoundError, SubmitError
from raylign.runtime.storage import check_job_storage

ENTRYPOINT = ("python3", "-m", "launch.cli")  # works where raylign is installed and where the job ships it
_CODE = ("raylign/__init__.py", "launch/cli.py")
_RUNS = ("align", "compare", "calibrate", "sweep")  # verbs that write to run.storage and ask for all resources
_RESOLVED = (*_RUNS, "evaluate", "check")  # verbs that take a whole configuration
_FILE_OPTIONS = {"--config": "path", "--space": "space"}
_FILE_KEYS = ("data.path", "evaluate.prompts")  # never names of a hub
_MODEL_KEYS = ("policy.model", "evaluate.judge", "reward_model.model", "cost_model.model")
_EVALUATE_KEYS = ("evaluate.prompts", "evaluate.judge")  # all that `evaluate` reads beside its checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The command that a job runs.

    Attributes:
        arguments: of `raylign`, the verb first; files are named as they lie in the working directory.
        configs: what it runs, resolved here; empty for verbs that read no configuration.
        files: config file and space, relative to the working directory, but for those that ship with raylign.
        checkpoint: what `evaluate` judges; None for other verbs.
    """

    arguments: tuple[str, ...]
    configs: tuple[RunConfig, ...]
    files: tuple[str, ...] = ()
    checkpoint: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether it runs whole configurations, rather than looks at one or judges a checkpoint."""
        return self.arguments[0] in _RUNS

    @property
    def entrypoint(self) -> tuple[str, ...]:
        """The command line on the cluster."""
        return (*ENTRYPOINT, *self.arguments)


def parse_target(group: click.Group, arguments: Sequence[str], *, root: Path) -> Target:
    """The command after `--`, with its configuration resolved as it will be on the cluster.

    Args:
        group: the `raylign` command.
        arguments: verb, options, overrides.
        root: working directory, absolute.

    Raises:
        SubmitError: no command of raylign, or `submit` itself.
        ConfigError: wrong configuration, or a file outside the working directory.
    """
    if not arguments or arguments[0] not in group.commands or arguments[0] == "submit":
        verbs = ", ".join(sorted(set(group.commands) - {"submit"}))
        raise SubmitError(f"after -- comes a command of raylign ({verbs}), found {' '.join(arguments) or 'nothing'}")
    verb = arguments[0]
    with group.commands[verb].make_context(f"raylign {verb}", list(arguments[1:])) as context:
        params = context.params
    configs = _resolve(verb, params) if verb in _RESOLVED else ()
    words = list(arguments)
    files: list[str] = []
    for option, name in _FILE_OPTIONS.items():
        given = params.get(name)
        if given is None or not Path(given).exists():
            continue
        inside = _inside(given, root, option)
        files.append(inside)
        renamed = {given: inside, f"{option}={given}": f"{option}={inside}"}
        words = [renamed.get(word, word) for word in words]
    return Target(arguments=tuple(words), configs=configs, files=tuple(files), checkpoint=params.get("checkpoint"))


def _inside(path: str, root: Path, option: str) -> str:
    """A file as it is named from the working directory."""
    try:
        return Path(os.path.abspath(path)).relative_to(root).as_posix()
    except ValueError:
        raise ConfigError(
            f"{option} {path} is not in the working directory {root}, which is all that the job sees: move it there, "
            "or name a --working-dir that holds it"
        ) from None


def _resolve(verb: str, params: Mapping[str, Any]) -> tuple[RunConfig, ...]:
    """What a command runs; of several seeds the first, since others differ in nothing that is checked here."""
    from launch.cli import shipped

    path = None if params.get("path") is None else shipped(params["path"])
    overrides = params.get("overrides", ())
    if verb == "sweep":
        from tuning.sweep_config import load_sweep

        sweep = load_sweep(params["space"], path, overrides, is_resumed=params["resume"])
        seed = sweep.sweep.seeds[0]
        return (sweep.base, *(sweep.trial(keys, seed).config for keys in sweep.checked_points))
    sections = merge_config(path, overrides)
    if "compare" in sections:
        from raylign.compare_config import load_comparison

        comparison = load_comparison(path, overrides)
        first = comparison.compare.seeds[0]
        return (comparison.base, *(trial.config for trial in comparison.trials if trial.seed == first))
    if "calibrate" in sections:
        from raylign.calibrate_config import load_calibration

        return (load_calibration(path, overrides).base,)
    return (load_config(path, overrides),)


def check_target(target: Target, upload: Upload) -> list[str]:
    """Refuse what cannot work on the cluster, and say what only the cluster can tell.

    Args:
        target: what will run.
        upload: what it ships.

    Returns:
        Lines for the user.

    Raises:
        ConfigError: a config file is not shipped, or the results would lie in a directory that Ray removes.
        DataNotFoundError: a relative path that is not shipped.
    """
    for file in target.files:
        if not upload.holds(upload.root / file):
            raise ConfigError(
                f"{file} would not be shipped: .gitignore, .rayignore or an exclude names it; let it through there "
                f"(a line !{file}), or move it"
            )
    keys = (*_FILE_KEYS, *_MODEL_KEYS) if target.checkpoint is None else _EVALUATE_KEYS
    paths = [("CHECKPOINT", target.checkpoint)]
    for config in target.configs:
        if target.is_run:
            check_job_storage(config.run.storage)
        paths += [(key, _value(config, key)) for key in keys]
    found = (_check_path(key, value, upload) for key, value in dict.fromkeys(paths))
    notes = [note for note in found if note is not None]
    if target.is_run and any(config.tracking.wandb == "online" for config in target.configs):
        notes.append("tracking.wandb=online needs WANDB_API_KEY there: --env WANDB_API_KEY, unless the nodes have it")
    is_shipped = all(upload.holds(upload.root / name) for name in _CODE)
    notes.append("raylign itself is shipped" if is_shipped else "raylign is not shipped: the cluster must have it")
    return notes


def _check_path(key: str, value: str | None, upload: Upload) -> str | None:
    """A note on a path that only the cluster has, None where there is nothing to say."""
    if value is None or value == EMBEDDED or "://" in value:
        return None
    if Path(value).expanduser().is_absolute():
        return f"{key}={value} must exist on every node; it is not shipped"
    there = sorted(upload.root.glob(value))
    if there and all(upload.holds(path) for path in there):
        return None
    if there or key in _FILE_KEYS or value.startswith(".") or value.count("/") > 1:
        found = "is left out of the upload" if there else f"is not in the working directory {upload.root}"
        raise DataNotFoundError(
            f"{key}={value} {found}, which is all that the job sees; ship it, or give the absolute path on storage "
            "that every node sees"
        )
    return None  # a hub id


def _value(config: RunConfig, key: str) -> str | None:
    section, _, name = key.partition(".")
    value: str | None = getattr(getattr(config, section), name)
    return value
