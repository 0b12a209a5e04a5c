"""What a job ships to the cluster: the files of its working directory as Ray will pack them, their size and limit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raylign.errors import SubmitError

EXCLUDES = (
    "runs/",
    "wandb/",
    "build/",
    "dist/",
    "*.egg-info/",
    ".mypy_cache/",
    ".ruff_cache/",
    ".pytest_cache/",
    "node_modules/",
    ".raylign-token-*",  # of a cluster that launch/clusters/slurm.sh starts
    ".env",
    ".env.*",
    # what else holds secrets, or a home directory's caches
    ".netrc",
    ".git-credentials",
    ".ssh/",
    ".aws/",
    ".ray/",
    ".kube/",
    ".docker/",
    ".gnupg/",
    ".cache/",
    "*.pem",
    "id_rsa*",
    "id_ed25519*",
)
MAX_FILES = 20_000  # more than any project has; stops a walk over a home directory
_ENTRY_BYTES = 30 + 46  # of a zip file beside a name and its content: local header and directory entry
_END_BYTES = 22
_SHOWN = 5
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """The files that a working directory sends.

    Attributes:
        root: the working directory, absolute.
        excludes: patterns as in .gitignore, beside Ray's own, .gitignore and .rayignore.
        files: path relative to the root, with "/", and bytes.
    """

    root: Path
    excludes: tuple[str, ...]
    files: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        """Size of the zip file, which Ray does not compress."""
        return _END_BYTES + sum(size + _ENTRY_BYTES + 2 * len(name.encode()) for name, size in self.files)

    def holds(self, path: Path) -> bool:
        """Whether a file is among them, or a directory has files among them."""
        try:
            name = path.absolute().relative_to(self.root).as_posix()
        except ValueError:
            return False
        return any(file == name or file.startswith(f"{name}/") for file, _ in self.files)

    def describe(self) -> str:
        """One line: files and size."""
        return f"{len(self.files)} files, {self.num_bytes / _MIB:.1f} MiB from {self.root}"


def collect_upload(root: Path, excludes: Sequence[str]) -> Upload:
    """The files that Ray 2.60 would pack, found by its own walk.

    Args:
        root: working directory.
        excludes: further patterns beside `EXCLUDES`.

    Raises:
        SubmitError: no directory, or more files than a project has.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    if not root.is_dir():
        raise SubmitError(f"working directory {root} does not exist; give one with --working-dir")
    root = Path(os.path.abspath(root))
    patterns = (*EXCLUDES, *excludes)
    files: list[tuple[str, int]] = []

    def keep(path: Path) -> None:
        if path.is_file():
            files.append((path.relative_to(root).as_posix(), path.stat().st_size))
        if len(files) > MAX_FILES:
            raise SubmitError(
                f"working directory {root} holds more than {MAX_FILES} files; name the project's own directory with "
                "--working-dir, or leave out directories with --exclude or .rayignore"
            )

    _dir_travel(
        root,
        [_get_excludes(root, [*get_runtime_env_default_excludes(), *patterns])],
        keep,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=_silent_logger(),
    )
    return Upload(root=root, excludes=patterns, files=tuple(sorted(files)))


def check_size(upload: Upload) -> None:
    """Refuse what the job server would refuse after the transfer.

    Ray documents 500 MiB for packages; its dashboard, which takes those of jobs, reads no request above 100 MiB.

    Raises:
        SubmitError: naming the largest files.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    if upload.num_bytes < DASHBOARD_CLIENT_MAX_SIZE:
        return
    largest = sorted(upload.files, key=lambda file: -file[1])[:_SHOWN]
    shown = ", ".join(f"{name} ({size / _MIB:.1f} MiB)" for name, size in largest)
    raise SubmitError(
        f"the working directory is {upload.describe()}; the job server takes less than "
        f"{DASHBOARD_CLIENT_MAX_SIZE / _MIB:.0f} MiB. Largest are {shown}. Leave them out with --exclude PATTERN or "
        ".rayignore, and put data and models on storage that all nodes see"
    )


def _silent_logger() -> logging.Logger:
    logger = logging.getLogger("raylign.upload")
    logger.setLevel(logging.CRITICAL)
    return logger
