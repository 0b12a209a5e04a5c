"""What ships: assets, configs and scripts are package data, and every documented path exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import launch
import raylign

ROOT = Path(raylign.__file__).parents[1]


def test_assets_stay_small():
    total = sum(p.stat().st_size for p in (ROOT / "raylign" / "assets").rglob("*") if p.is_file())
    assert total < 40 * 2**20


def test_shipped_configs_are_beside_the_package():
    assert (Path(launch.__file__).parent / "configs" / "default.yaml").is_file()


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
