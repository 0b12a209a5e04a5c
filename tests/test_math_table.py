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
    modules = (
        "losses.preference",
        "losses.reward",
        "losses.advantages",
        "losses.policy_gradient",
        "losses.token_credit",
        "losses.variational",
        "rewards.confidence",
    )
    for module in (f"raylign.{name}" for name in modules):
        loaded = importlib.import_module(module)
        public = [name for name, value in vars(loaded).items() if getattr(value, "__module__", "") == module]
        functions = [name for name in public if name[0].islower()]
        assert len(functions) > 2
        missing = {name for name in functions if f"`{module}:{name}`" not in TEXT}
        # a special case of E2, a count, and checks and marks of shapes
        assert missing <= {"bradley_terry", "count_flips", "check_alike", "check_vector", "is_last"}
