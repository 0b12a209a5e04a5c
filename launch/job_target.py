"""The command that a job runs, checked here as far as it can be: its configuration, and what it names is shipped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from launch.upload import Upload
from raylign.config import EMBEDDED, RunConfig, load_config, merge_config
from raylign.errors import ConfigError, DataNotFoundError, SubmitError
from raylign.runtime.storage import check_job_storage

ENTRYPOINT = ("python3", "-m", "launch.cli")  # works where raylign is installed and where the job ships it
_CODE = ("raylign/__init__.py", "launch/cli.py")
_RESOLVED = ("align", "evaluate", "compare", "calibrate", "sweep", "check")  # verbs that take a whole configuration
_FILE_KEYS = ("data.path", "evaluate.prompts")  # never names of a hub
_MODEL_KEYS = ("policy.model", "evaluate.judge", "reward_model.model", "cost_model.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The command that a job runs.

    Attributes:
        arguments: of `raylign`, the verb first; a config file is named as it lies in the working directory.
        configs: what it runs, resolved here; empty for verbs that read no configuration.
        file: config file relative to the working directory; None for none, or one that ships with raylign.
    """

    arguments: tuple[str, ...]
    configs: tuple[RunConfig, ...]
    file: str | None = None

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
    from launch.cli import shipped

    if not arguments or arguments[0] not in group.commands or arguments[0] == "submit":
        verbs = ", ".join(sorted(set(group.commands) - {"submit"}))
        raise SubmitError(f"after -- comes a command of raylign ({verbs}), found {' '.join(arguments) or 'nothing'}")
    verb = arguments[0]
    with group.commands[verb].make_context(f"raylign {verb}", list(arguments[1:])) as context:
        path, overrides = context.params.get("path"), context.params.get("overrides", ())
    configs: tuple[RunConfig, ...] = ()
    if verb in _RESOLVED:
        configs = _resolve(None if path is None else shipped(path), overrides)
    if path is None or not Path(path).exists():
        return Target(arguments=tuple(arguments), configs=configs)
    try:
        inside = Path(os.path.abspath(path)).relative_to(root).as_posix()
    except ValueError:
        raise ConfigError(
            f"config file {path} is not in the working directory {root}, which is all that the job sees: move it "
            "there, or name a --working-dir that holds it"
        ) from None
    words = {path: inside, f"--config={path}": f"--config={inside}"}
    return Target(arguments=tuple(words.get(word, word) for word in arguments), configs=configs, file=inside)


def _resolve(path: str | None, overrides: Sequence[str]) -> tuple[RunConfig, ...]:
    """What a file runs; of a comparison the first seed, since others differ in nothing else that is checked here."""
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
    if target.file is not None and not upload.holds(upload.root / target.file):
        raise ConfigError(
            f"config file {target.file} would not be shipped: .gitignore, .rayignore or an exclude names it; let it "
            f"through there (a line !{target.file}), or move it"
        )
    notes: list[str] = []
    for config in target.configs:
        check_job_storage(config.run.storage)
        for key in (*_FILE_KEYS, *_MODEL_KEYS):
            note = _check_path(key, _value(config, key), upload)
            if note is not None and note not in notes:
                notes.append(note)
    if any(config.tracking.wandb == "online" for config in target.configs):
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
    if there or key in _FILE_KEYS or value.startswith("."):
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
