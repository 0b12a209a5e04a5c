"""The reference pages say what the code says; their makers are checked on made-up keys, commands and docstrings."""

from __future__ import annotations

import ast
import inspect
from typing import Annotated, Literal

import click
import pytest
from pydantic import BaseModel, Field

import raylign
from launch import reference
from launch.cli import CONFIGS, main
from launch.reference_api import api_page, errors_page, markdown, signature
from launch.reference_cli import command_entry, commands
from launch.reference_config import FILES, SPACES, config_page, describe, shipped_page, table
from raylign import errors
from raylign.config import RunConfig, idle_keys, known_keys


def test_committed_pages_are_what_the_code_says():
    found = reference.differences(reference.DIRECTORY)
    shown = "\n".join(found.values())
    assert not found, f"run `{reference.COMMAND}` and commit docs/reference:\n{shown}"


def test_check_reports_a_changed_a_missing_and_a_foreign_page(tmp_path, capsys):
    directory = tmp_path / "reference"
    assert reference.main(["--directory", str(directory)]) == 0
    assert reference.main(["--check", "--directory", str(directory)]) == 0
    page = directory / "config.md"
    page.write_text(page.read_text().replace("`train.beta`", "`train.betta`"))
    (directory / "cli.md").unlink()
    (directory / "old.md").write_text("gone\n")
    assert set(reference.differences(directory)) == {"cli.md", "config.md", "old.md"}
    assert reference.main(["--check", "--directory", str(directory)]) == 1
    out = capsys.readouterr().out
    assert "train.betta" in out
    assert "run `python -m launch.reference`" in out
    assert reference.main(["--directory", str(directory)]) == 0  # mends all three
    assert not reference.differences(directory)


def test_pages_are_written_beside_the_sources_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        reference.main(["--directory", str(tmp_path / "nowhere" / "reference")])
    assert "is no directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_key_has_a_row():
    keys = known_keys(RunConfig) + [f"{name}.{key}" for name, (model, _) in FILES.items() for key in model.model_fields]
    rows = [line.split("`")[1] for line in config_page().splitlines() if line.startswith("| `")]
    assert rows == keys
    assert len(keys) > 150


def test_idle_keys_say_what_to_change_first():
    rows = {line.split("`")[1]: line for line in config_page().splitlines() if line.startswith("| `")}
    assert rows["train.ipo_tau"].startswith("| `train.ipo_tau` | number > 0 | `0.1` | ")
    assert rows["train.ipo_tau"].endswith(" *(set `train.objective=ipo`)* |")
    idle = idle_keys(RunConfig())
    assert {key for key, row in rows.items() if row.endswith(")* |")} == idle.keys()


def test_every_shipped_file_is_shown():
    page = shipped_page()
    shipped = [*CONFIGS.glob("*.yaml"), *SPACES.glob("*.yaml")]
    assert len(shipped) > 15
    assert all(f"### {path.name}\n" in page and path.read_text().rstrip() in page for path in shipped)


class Made(BaseModel):
    plain: int = 1
    ranged: float = Field(0.5, gt=0, le=1)
    choice: Literal["a", "b"] = "a"
    either: Annotated[float, Field(ge=0)] | Literal["fitted"] = "fitted"
    maybe: int | None = Field(None, ge=8)
    flag: bool = True
    names: list[str] = Field([], min_length=2)
    layers: list[int] | Literal["all"] = "all"
    prices: dict[str, Annotated[float, Field(ge=0)]] = {}
    free: dict[str, dict[str, object]] = Field(min_length=1)
    pattern: str = Field("x", pattern="^[a|b]$")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", "integer"),
        ("ranged", "number > 0, <= 1"),
        ("choice", "`a`, `b`"),
        ("either", "number >= 0 or `fitted`"),
        ("maybe", "integer >= 8 or `null`"),
        ("flag", "`true`, `false`"),
        ("names", "list of text, at least 2"),
        ("layers", "list of integer or `all`"),
        ("prices", "mapping of names to number >= 0"),
        ("free", "mapping of names to mapping of names to any value, at least 1"),
        ("pattern", "text like `^[a|b]$`"),
    ],
)
def test_values_in_words(name, words):
    assert describe(Made.model_json_schema()["properties"][name]) == words


def test_an_unknown_schema_is_refused():
    with pytest.raises(ValueError, match="add it to describe"):
        describe({"type": "tuple"})


def test_bars_inside_cells_are_escaped():
    assert table([["a", "b"], ["x|y", "z"]]) == "| a | b |\n|---|---|\n| x\\|y | z |"


def test_every_command_is_listed_once_with_its_words():
    assert len(main.commands) > 5
    names = [" ".join(words) for words, _ in commands(main, ("raylign",))]
    assert len(set(names)) == len(names)
    assert {"raylign align", "raylign data inspect", "raylign check"} <= set(names)


def test_a_command_entry_shows_usage_options_and_defaults():
    @click.command()
    @click.argument("target")
    @click.option("--rows", default=3, show_default=True, type=click.IntRange(1, 9), help="How many.")
    @click.option("--kind", type=click.Choice(["a", "b"]), required=True, help="Which.")
    @click.option("--where", envvar="TOOL_WHERE", help="Place.")
    @click.option("--quiet", "-q", is_flag=True, help="Say less.")
    def show(target, rows, kind, where, quiet):
        """Show it.

        More words.

        tool show this
        """

    entry = command_entry(("tool", "show"), show)
    assert entry.startswith("## tool show\n\n```text\ntool show [OPTIONS] TARGET\n```\n\nShow it.\n\nMore words.\n\n")
    assert "```bash\ntool show this\n```" in entry
    assert "| `--rows INTEGER` | How many. (from 1 to 9; default 3) |" in entry
    assert r"| `--kind a\|b` | Which. (required) |" in entry
    assert "| `--where TEXT` | Place. (or the environment's TOOL_WHERE) |" in entry
    assert "| `--quiet, -q` | Say less. |" in entry or "| `-q, --quiet` | Say less. |" in entry


def test_signature_keeps_order_defaults_and_stars():
    source = "def f(a: int, b='x', *args: str, c: bool, **rest: object) -> None: ..."
    assert signature(ast.parse(source).body[0]) == (
        'def f(\n    a: int,\n    b = "x",\n    *args: str,\n    c: bool,\n    **rest: object,\n) -> None: ...'
    )
    assert signature(ast.parse("def g(a, *, b=1): ...").body[0]) == "def g(\n    a,\n    *,\n    b = 1,\n): ..."
    assert signature(ast.parse("def h(a): ...").body[0]) == "def h(a): ..."


def test_google_docstrings_become_lists():
    text = inspect.cleandoc(
        """Sum up.

        Args:
            a: first, over
                two lines.
            b: second.

        Returns:
            The sum.

        Source: someone.
        """
    )
    assert markdown(text) == (
        "Sum up.\n\n**Args**\n\n- `a`: first, over two lines.\n- `b`: second.\n\n**Returns**\n\nThe sum.\n\n"
        "**Source**\n\nsomeone."
    )


def test_api_page_has_every_public_name_and_what_functions_return():
    page = api_page()
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert [name for name in raylign.__all__ if name != "__version__" and f"## {name}" not in headings] == []
    assert headings.index("### RewardFacts") < headings.index("### FittedReward")
    assert "Also the attributes of `RewardFacts`." in page
    assert "### Section" not in headings
    assert len(set(headings)) == len(headings)


def test_errors_page_follows_the_tree():
    rows = {line.split("`")[1]: line for line in errors_page().splitlines() if line.startswith("| `")}
    names = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert rows.keys() == names
    assert "| 2 |" in rows["ConfigError"]
    assert "| 1 |" in rows["SamplerError"]
