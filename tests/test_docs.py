"""The documentation claims nothing that the code does not have: keys, values, commands, files, names, headings."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from docs_pages import (
    LOADERS,
    ROOT,
    command_lines,
    fenced,
    inline,
    wrong_anchors,
    wrong_commands,
    wrong_files,
    wrong_keys,
    wrong_python,
    wrong_yaml,
)

from launch.cli import CONFIGS
from launch.reference_config import FILES, SPACES
from raylign.data.schema import parse_row

PAGES = {
    path.relative_to(ROOT / "docs" if path.name != "README.md" else ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
CHECKS = {check.__name__: check for check in (wrong_commands, wrong_files, wrong_keys, wrong_python, wrong_yaml)}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_only_what_exists(name):
    text = PAGES[name].read_text(encoding="utf-8")
    found = [sentence for check in CHECKS.values() for sentence in check(text)]
    found += wrong_anchors(text, PAGES[name].parent)
    assert not found, "\n".join(found)


def test_pages_show_commands_and_code():
    texts = [path.read_text(encoding="utf-8") for path in PAGES.values()]
    assert sum(len(command_lines(text)) for text in texts) > 40
    assert sum(block.language == "python" for text in texts for block in fenced(text)) > 3
    assert sum(len(inline(text)) for text in texts) > 500


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_code_stand_in_blocks_with_a_language(name):
    """The checks above read no others."""
    text = PAGES[name].read_text(encoding="utf-8")
    bare = "".join(block.text for block in fenced(text) if not block.language)
    code = ("raylign ", "from raylign", "import raylign")
    assert not [line for line in text.splitlines() if line.startswith(tuple(f"    {word}" for word in code))]
    assert not [line for line in bare.splitlines() if line.startswith(code)]


def test_every_kind_of_file_has_a_loader():
    assert LOADERS.keys() == FILES.keys()


def test_every_page_is_in_the_table_of_contents():
    index = PAGES["index.md"].read_text(encoding="utf-8")
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    assert not {page for page in pages if f"]({page})" not in index}


@pytest.mark.parametrize(
    ("check", "text", "words"),
    [
        (wrong_keys, "`train.betta` and `loss.beta`", "no key train.betta"),
        (wrong_keys, "set `train.objective=dpp`", "train.objective does not take dpp"),
        (wrong_keys, "set `compare.seed`", "no key compare.seed"),
        (wrong_yaml, "```yaml\ntrain: {betta: 1}\n```", "did you mean train.beta"),
        (wrong_yaml, "```yaml\ntrain: {objective: dpo, ipo_tau: 1}\n```", "no effect"),
        (wrong_yaml, "```yaml\ncompare: {seed: [1]}\n```", "no key compare.seed"),
        (wrong_yaml, "```yaml\ntrain.betta: {grid: [1]}\n```", "no key train.betta"),
        (wrong_commands, "```bash\nraylign aling\n```", "no command aling"),
        (wrong_commands, "```bash\nraylign data look\n```", "no command look"),
        (wrong_commands, "```bash\nraylign align --fast\n```", "No such option"),
        (wrong_commands, "```bash\nraylign align --config my.yaml train.betta=1\n```", "no key train.betta"),
        (wrong_commands, "```bash\nraylign align --config my.yaml train\n```", "train is no key"),
        (wrong_commands, "```bash\nraylign align \\\n  train.ipo_tau=1  # far\n```", "no effect"),
        (wrong_commands, "```bash\nray job submit -- raylign align train.ipo_tau=1\n```", "no effect"),
        (wrong_commands, "```bash\nraylign submit -- align train.ipo_tau=1\n```", "no effect"),
        (wrong_commands, "run `raylign compare --config dpo.yaml`", "needs a section compare"),
        (wrong_commands, "```bash\nraylign compare\n```", "Missing option"),
        (wrong_commands, "run `raylign comparee`", "no command comparee"),
        (wrong_commands, "```bash\nOMP_NUM_THREADS=1 python -m tests.benchmarks.none\n```", "no module"),
        (wrong_commands, "```bash\nbash launch/none.sh\n```", "no script"),
        (wrong_python, "```python\nraylign.ingets(rows)\n```", "no raylign.ingets"),
        (wrong_python, "```python\nraylign.train(ranked, name='a', betta=1)\n```", "no key train.betta"),
        (wrong_python, "```python\nraylign.evaluate('m', config={'data': {'pat': 1}})\n```", "no key data.pat"),
        (wrong_python, "```python\nfrom raylign.models.averaging import average\n```", "has no average"),
        (wrong_python, "```python\nfrom raylign.none import some\n```", "no module raylign.none"),
        (wrong_files, "see `raylign/none.py`", "no raylign/none.py"),
        (wrong_files, "see none.yaml", "no configuration none.yaml"),
    ],
)
def test_what_does_not_exist_is_found(check, text, words):
    (sentence,) = set(check(text))
    assert words in sentence


@pytest.mark.parametrize(
    "text",
    [
        "`train.beta`, `train.beta=0.2`, `resources.*`, `<run.storage>/<run.name>/report.html`",
        "`train/step_*/policy`, `reward.json`, `raylign.cost.compare`, `constraint/under`, `data.max_prompt_length`",
        "`raylign align ... run.resume=true`, `raylign evaluate CHECKPOINT`, `raylign --version`, `raylign compare`",
        "```bash\nraylign check --config calibrate_tiny.yaml calibrate.seeds=[0]\n```",
        "```yaml\nkind: RayCluster\n---\nkind: Secret\n```\n```yaml\n# my.yaml\ntrain: {objective: dpo}\n```",
        "```python\nfrom raylign.models.averaging import average_policies\nraylign.train(r, name='a', beta=0.1)\n```",
        "`tests/test_docs.py::test_a`, `raylign/constraints/` and my-own.yaml",
    ],
)
def test_what_exists_is_left_alone(text):
    assert not [sentence for check in CHECKS.values() for sentence in check(text)]


def test_an_anchor_without_a_heading_is_found():
    page = "[a](data.md#formats) [b](evaluation.md#what-is-reported) [c](math.md#nothing) [d](https://a.b/c#d)"
    assert list(wrong_anchors(page, ROOT / "docs")) == ["math.md has no heading #nothing"]


SHIPPED = {path.name: path for directory in (CONFIGS, SPACES) for path in sorted(directory.glob("*.yaml"))}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_says_how_to_start_it(name):
    """Its first lines hold a command, indented, with a remark behind three spaces or more."""
    head = SHIPPED[name].read_text(encoding="utf-8").partition("\n\n")[0].replace("\\\n#", "")
    commands = re.findall(r"^#   (raylign .*?)(?: {3,}.*)?$", head, re.MULTILINE)
    assert any(name in command or f"--space {name.removesuffix('.yaml')}" in command for command in commands) or (
        name == "default.yaml"
    )
    assert not [sentence for command in commands for sentence in wrong_commands(f"```bash\n{command}\n```")]


def test_shipped_files_are_named_somewhere():
    guides = [path for name, path in PAGES.items() if not name.startswith("reference/")]  # these show them all
    text = "".join(path.read_text(encoding="utf-8") for path in guides)
    assert not {path.name for path in CONFIGS.glob("*.yaml") if path.name not in text}


def test_example_rows_are_read():
    blocks = [block.text for block in fenced(PAGES["data.md"].read_text(encoding="utf-8")) if block.language == "json"]
    pairs = [parse_row(json.loads(line)) for line in "".join(blocks).splitlines()]
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("Hello!", "Go away.")}
    assert [len(pair.prompt) for pair in pairs] == [1, 1, 1, 2]


def test_the_example_of_a_ledger_runs(tmp_path, monkeypatch, capsys):
    (code,) = [
        block.text for block in fenced(PAGES["costs.md"].read_text(encoding="utf-8")) if block.language == "python"
    ]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "generated_tokens=812" in capsys.readouterr().out


def test_every_extra_is_explained():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = PAGES["getting-started.md"].read_text(encoding="utf-8")
    rows = "".join(line for line in page.splitlines() if line.startswith("| `"))
    assert not {extra for extra in extras if f"`{extra}`" not in rows}
