"""The reference pages of the documentation, written from the code that they describe so that they cannot drift.

    python -m launch.reference            write docs/reference/*.md
    python -m launch.reference --check    exit 1, and say what differs, when a page is not what the code says

Each page has a module that makes its text: keys from the schema, commands from click, names and errors from docstrings,
shipped files from their YAML. `tests/launch/test_reference.py` runs the check.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from launch.reference_api import api_page, errors_page
from launch.reference_cli import cli_page
from launch.reference_config import config_page, shipped_page

DIRECTORY = Path(__file__).parents[1] / "docs" / "reference"
COMMAND = "python -m launch.reference"
_NOTICE = f"<!-- Written by `{COMMAND}`. Change the code that it describes, not this page. -->\n"


def pages() -> dict[str, str]:
    """Text of every reference page by file name."""
    texts = {
        "api.md": api_page(),
        "cli.md": cli_page(),
        "config.md": config_page(),
        "errors.md": errors_page(),
        "shipped.md": shipped_page(),
    }
    return {name: f"{_NOTICE}\n{text.rstrip()}\n" for name, text in texts.items()}


def differences(directory: Path) -> dict[str, str]:
    """What differs between the pages of a directory and those that the code gives.

    Args:
        directory: of the committed pages.

    Returns:
        By file name, a unified diff from the committed to the right text; a file that no code writes differs, too.
    """
    written = pages()
    found = {path.name: path.read_text(encoding="utf-8") for path in directory.glob("*.md")}
    return {
        name: "\n".join(
            difflib.unified_diff(
                found.get(name, "").splitlines(), written.get(name, "").splitlines(), name, "the code", lineterm="", n=0
            )
        )
        for name in sorted(found.keys() | written.keys())
        if found.get(name) != written.get(name)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Write docs/reference from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page differs")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the pages lie")
    options = parser.parse_args(arguments)
    if options.check:
        found = differences(options.directory)
        for text in found.values():
            print(text)
        if found:
            print(f"{', '.join(found)}: not what the code says; run `{COMMAND}` and commit docs/reference")
        return 1 if found else 0
    if not options.directory.parent.is_dir():
        parser.error(f"{options.directory.parent} is no directory: run this where the sources of the documentation are")
    options.directory.mkdir(exist_ok=True)
    written = pages()
    for path in options.directory.glob("*.md"):
        if path.name not in written:
            path.unlink()
    for name, text in written.items():
        (options.directory / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
