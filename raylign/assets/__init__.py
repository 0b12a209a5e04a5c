"""The embedded default: a tiny chat model, its judge, and small licensed data. See `NOTICE.md` for sources."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from raylign.errors import RaylignError

EMBEDDED: Final = "embedded"
TINY_CHAT: Final = "tiny_chat"
TINY_JUDGE: Final = "tiny_judge"
TINY_COST: Final = "tiny_cost"
PAIRS: Final = "pairs_hh_harmless.jsonl.gz"
EVAL_PROMPTS: Final = "eval_prompts.jsonl"
REFUSAL_LABELS: Final = "refusal_labels_xstest.jsonl.gz"


class AssetNotFoundError(RaylignError, FileNotFoundError):
    """An embedded file or model is not part of this installation."""


def asset_path(name: str) -> Path:
    """Path of an embedded file or model directory.

    Args:
        name: name inside the asset directory, for example `tiny_chat` or `eval_prompts.jsonl`.

    Returns:
        Absolute path that exists.

    Raises:
        AssetNotFoundError: there is no such asset; the message lists those there are.
    """
    root = Path(__file__).resolve().parent
    path = (root / name).resolve()
    if path == root or root not in path.parents or not path.exists():
        found = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("__"))
        raise AssetNotFoundError(
            f"asset {name!r} is not in {root}; found {found}. "
            "Reinstall raylign, or build it with `raylign assets build`"
        )
    return path


def model_directory(name: str) -> Path | None:
    """Directory of a model that is at hand: the embedded one, or a local one; None for anything else.

    Args:
        name: "embedded", a directory, or a hub id.
    """
    if name == EMBEDDED:
        return asset_path(TINY_CHAT)
    path = Path(name).expanduser()
    return path if path.is_dir() else None
