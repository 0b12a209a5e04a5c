"""docs/math.md names functions and tests; both exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
FORMULA_ROWS = [line for line in TEXT.splitlines() if line.startswith("|") and "raylign." in line]


def test_every_row_names_a_function_and_a_test_that_exist():
    assert len(FORMULA_ROWS) > 20
    for row in FORMULA_ROWS:
        (module, name), (path, test) = (
            re.search(pattern, row).groups() for pattern in (r"`(raylign[\w.]+):(\w+)`", r"`(tests/[\w/]+\.py)::(\w+)`")
        )
        assert hasattr(importlib.import_module(module), name), row
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), row


def test_every_loss_has_a_row():
    for module in ("raylign.losses.preference", "raylign.losses.reward", "raylign.rewards.confidence"):
        loaded = importlib.import_module(module)
        public = [name for name, value in vars(loaded).items() if getattr(value, "__module__", "") == module]
        functions = [name for name in public if name[0].islower()]
        assert len(functions) > 2
        missing = {name for name in functions if f"`{module}:{name}`" not in TEXT}
        assert missing <= {"bradley_terry", "count_flips"}  # a special case of E2, and a count
