"""Every metric of a training and of an evaluation is explained, and what is explained is written."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from docs_pages import ROOT, inline

from raylign.report.wording import METRIC_ROWS

NAME = re.compile(r"[a-z_]+(?:/[a-z_]+)+")
SOURCES = [*sorted((ROOT / "raylign" / "training").glob("*.py"))] + [
    ROOT / "raylign" / "runtime" / name for name in ("round_facts.py", "online_worker.py")
]


def written_names(source: str) -> tuple[set[str], set[str]]:
    """Metric names in a module: whole ones, and beginnings whose end is filled in."""
    whole: set[str] = set()
    beginnings: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if NAME.fullmatch(node.value):
                whole.add(node.value)
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant) and len(node.values) > 1:
            found = re.fullmatch(r"[a-z_/]*/", str(node.values[0].value))
            beginnings |= {found.group()} if found else set()
    return whole, beginnings


@pytest.fixture(scope="module")
def written() -> tuple[set[str], set[str]]:
    found = [written_names(path.read_text(encoding="utf-8")) for path in SOURCES]
    return set().union(*(whole for whole, _ in found)), set().union(*(beginnings for _, beginnings in found))


@pytest.fixture(scope="module")
def explained() -> set[str]:
    spans = inline((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"))
    return {span for span in spans if NAME.fullmatch(span.removesuffix("/*")) or span.endswith("/*")}


def test_every_written_metric_is_explained(written, explained):
    whole, beginnings = written
    families = tuple(name.removesuffix("*") for name in explained if name.endswith("/*"))
    missing = {name for name in whole if name not in explained and not name.startswith(families)}
    missing |= {start for start in beginnings if not any(name.startswith(start) for name in explained | set(families))}
    assert not missing, f"explain in docs/metrics.md: {', '.join(sorted(missing))}"
    assert len(whole) > 35


def test_every_explained_metric_is_written(written, explained):
    whole, beginnings = written
    not_written = {
        name
        for name in explained - {"perf/*", "timing_s/*"}
        if name not in whole and not name.startswith(tuple(beginnings)) and Path(name).suffix == ""
    }
    assert not not_written, f"nothing writes {', '.join(sorted(not_written))}"


def test_names_are_found_in_source():
    source = 'def f(x):\n    """Doc a/b."""\n    return {"a/b": x, f"c/d/{x}": 1, "no": 2, f"{x}/e": 3, "x/y.z": 4}'
    assert written_names(source) == ({"a/b"}, {"c/d/"})


def test_every_row_of_the_evaluation_is_explained():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:3]) for line in page.splitlines() if line.startswith("| `")
    ]
    assert rows == [(f"`{row.name}`", row.label) for row in METRIC_ROWS]
