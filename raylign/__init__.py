"""raylign: safety alignment of language models on Ray.

`import raylign` loads neither torch nor ray; the phases below are imported on first use.

    >>> import raylign
    >>> pairs = raylign.ingest(dataset, model=model)           # doctest: +SKIP
    >>> features = raylign.extract_features(pairs, model=model)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "ingest": "raylign.runtime.api",
    "extract_features": "raylign.runtime.api",
    "fit_reward": "raylign.runtime.api",
    "rank": "raylign.runtime.api",
    "train": "raylign.runtime.api",
    "train_online": "raylign.runtime.api",
    "evaluate": "raylign.runtime.api",
    "align": "raylign.runtime.pipeline",
    "compare": "raylign.runtime.compare",
    "load_comparison": "raylign.compare_config",
    "RunConfig": "raylign.config",
    "load_config": "raylign.config",
}

__all__ = [
    "RunConfig",
    "__version__",
    "align",
    "compare",
    "evaluate",
    "extract_features",
    "fit_reward",
    "ingest",
    "load_comparison",
    "load_config",
    "rank",
    "train",
    "train_online",
]

if TYPE_CHECKING:
    from raylign.compare_config import load_comparison
    from raylign.config import RunConfig, load_config
    from raylign.runtime.api import evaluate, extract_features, fit_reward, ingest, rank, train, train_online
    from raylign.runtime.compare import compare
    from raylign.runtime.pipeline import align


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'raylign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
