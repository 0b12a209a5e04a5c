"""What a page of the documentation claims, and which of it the code does not have.

Each check gives sentences about what is wrong on a page, none when all is right. What is real: click's commands, the
schema, the shipped files, the source tree. Nothing is run and Ray is not started.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import ValidationError

import raylign
from launch.cli import CONFIGS, main
from launch.reference_api import definition
from launch.reference_config import FILES, SPACES
from raylign.calibrate_config import load_calibration
from raylign.compare_config import load_comparison
from raylign.config import RunConfig, load_config, merge_config
from raylign.errors import ConfigError
from tuning.sweep_config import load_sweep

ROOT = Path(raylign.__file__).parents[1]
SECTIONS = {name: field.annotation for name, field in RunConfig.model_fields.items()} | {
    name: section for name, (section, _) in FILES.items()
}
# by command: what checks its file, its overrides and its other options
LOADERS: dict[str, Callable[[str | None, list[str], dict[str, Any]], object]] = {
    "compare": lambda file, given, _: load_comparison(file, given),
    "calibrate": lambda file, given, _: load_calibration(file, given),
    "sweep": lambda file, given, options: load_sweep(options["space"], file, given),
}
# the section whose keys a function of `import raylign` takes as options
OPTIONS = {
    "ingest": "data",
    "extract_features": "features",
    "fit_reward": "reward",
    "rank": "confidence",
    "train": "train",
    "train_online": "train",
    "evaluate": "evaluate",
}
_KEY = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z]\w*)(?![\w(/-])(?:=([^\s`]+))?")
_SUFFIXES = {"yaml", "json", "jsonl", "html", "md", "py", "parquet"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" when none is named) and its text."""

    language: str
    text: str


def fenced(page: str) -> list[Block]:
    """Fenced blocks in order."""
    return [Block(*found) for found in re.findall(r"^[ ]*```(\w*)\n(.*?)^[ ]*```$", page, re.MULTILINE | re.DOTALL)]


def inline(page: str) -> list[str]:
    """Inline code outside of fenced blocks, on one line or broken once."""
    prose = re.sub(r"^[ ]*```.*?^[ ]*```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


@dataclass(frozen=True)
class Line:
    """Words of a command line, and whether it merely mentions the command, as prose does: then arguments may lack."""

    words: list[str]
    is_mention: bool


def command_lines(page: str) -> list[Line]:
    """Every command line, comments and environment taken off: of bash blocks, and inline ones."""
    lines = []
    for block in fenced(page):
        if block.language == "bash":
            lines += [(line, False) for line in block.text.replace("\\\n", " ").splitlines()]
    lines += [(span, True) for span in inline(page) if span.startswith(("raylign ", "python -m ", "bash "))]
    found = []
    for line, is_mention in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            found.append(Line(words, is_mention))
    return found


def wrong_keys(page: str) -> Iterator[str]:
    """Keys in inline code that no section has, and values that they do not take."""
    for span in inline(page):
        for section, name, value in _KEY.findall(span):
            if name not in _SUFFIXES:
                yield from _wrong_value(section, name, value)


def _wrong_value(section: str, name: str, value: str = "") -> Iterator[str]:
    key = f"{section}.{name}"
    if name not in SECTIONS[section].model_fields:
        yield f"there is no key {key}"
    elif value and value != "..." and not re.fullmatch("[A-Z]+", value):  # =N stands for a number
        content = merge_config(None, [f"{key}={value}"])[section]
        try:
            SECTIONS[section].model_validate(content)
        except ValidationError as error:
            if any(item["type"] != "missing" for item in error.errors()):
                yield f"{key} does not take {value}"


def wrong_yaml(page: str) -> Iterator[str]:
    """Configurations in YAML blocks that would not load; those of several runs and spaces are checked key by key."""
    for block in fenced(page):
        if block.language == "yaml":
            for content in yaml.safe_load_all(block.text):
                if isinstance(content, dict):
                    yield from _wrong_document(content, block.text.splitlines()[0])


def _wrong_document(content: dict[str, Any], first_line: str) -> Iterator[str]:
    for section, dot, name in (str(key).partition(".") for key in content):
        if dot and section in SECTIONS:  # of a space
            yield from _wrong_value(section, name)
    if content.keys() & FILES.keys():
        for section in content.keys() & SECTIONS.keys():
            for name in content[section]:
                yield from _wrong_value(section, name)
    elif content.keys() & SECTIONS.keys():  # else of Ray or Kubernetes
        try:
            load_config(values=content)
        except ConfigError as error:
            yield f"{first_line}: {error}"


def wrong_commands(page: str) -> Iterator[str]:
    """Command lines that the command would refuse before it does anything."""
    for line in command_lines(page):
        words = line.words
        if Path(words[0]).name == "raylign":
            yield from _wrong_raylign(words[1:], is_mention=line.is_mention)
        elif words[:3] == ["ray", "job", "submit"] and "raylign" in words:
            yield from _wrong_raylign(words[words.index("raylign") + 1 :])
        elif "-m" in words[1:2] and words[2].split(".")[0] in ("launch", "tests", "raylign", "tuning"):
            if not (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file():
                yield f"there is no module {words[2]}"
        elif words[0] == "bash" and words[1].startswith("launch/") and not (ROOT / words[1]).is_file():
            yield f"there is no script {words[1]}"


def _is_shipped(name: str) -> bool:
    return any(path.is_file() for path in (CONFIGS / name, SPACES / name, SPACES / f"{name}.yaml"))


def _wrong_raylign(words: list[str], *, is_mention: bool = False) -> Iterator[str]:
    line = " ".join(["raylign", *words])
    command: click.Command = main
    called = ""
    words = list(words)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        called = words.pop(0)
        if called == "COMMAND":  # any
            return
        if called not in command.commands:
            yield f"{line}: there is no command {called}"
            return
        command = command.commands[called]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # of --help
            context = command.make_context(called, words)
    except click.exceptions.Exit:  # --help, --version
        return
    except click.UsageError as error:
        if is_mention and isinstance(error, click.MissingParameter):
            return
        yield f"{line}: {error.format_message()}"
        return
    if called == "submit":
        yield from _wrong_raylign([word for word in context.params["arguments"] if word != "raylign"])
        return
    given = [word for word in context.params.get("overrides") or () if word != "..."]
    path = context.params.get("path")
    if not all(map(_is_shipped, filter(None, (path, context.params.get("space"))))):  # a file of the reader's
        given_keys = [_KEY.fullmatch(word.replace(" ", "")) for word in given]
        for word, found in zip(given, given_keys, strict=True):
            yield from _wrong_value(*found.groups()) if found else [f"{line}: {word} is no key"]
        return
    if "overrides" not in context.params:
        return
    file = None if path is None else str(CONFIGS / path)
    named = merge_config(file).keys() & LOADERS.keys()
    load = LOADERS.get(named.pop() if called == "check" and named else called)
    try:
        load(file, given, context.params) if load else load_config(file, given)
    except ConfigError as error:
        yield f"{line}: {error}"


def wrong_python(page: str) -> Iterator[str]:
    """Names of raylign in Python blocks that do not exist, and options and keys that they do not take."""
    for block in fenced(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("raylign", "tuning"):
                yield from _wrong_import(node)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "raylign":
                if node.attr not in raylign.__all__:
                    yield f"there is no raylign.{node.attr}"
            elif isinstance(node, ast.Dict):
                yield from _wrong_mapping(node)
            if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("raylign.") in OPTIONS:
                yield from _wrong_options(node)


def _wrong_import(node: ast.ImportFrom) -> Iterator[str]:
    path = ROOT / (node.module or "").replace(".", "/")
    source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    if not source.is_file():
        yield f"there is no module {node.module}"
        return
    text = source.read_text(encoding="utf-8")
    for alias in node.names:
        known = re.search(rf"^(def |class )?{alias.name}\b|^    \"{alias.name}\"", text, re.MULTILINE)
        if not known and not (path / f"{alias.name}.py").is_file():
            yield f"{node.module} has no {alias.name}"


def _wrong_mapping(node: ast.Dict) -> Iterator[str]:
    """{"section": {"key": value}} as the functions take it."""
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and key.value in SECTIONS and isinstance(value, ast.Dict):
            for inner in value.keys:
                if isinstance(inner, ast.Constant):
                    yield from _wrong_value(str(key.value), str(inner.value))


def _wrong_options(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func).removeprefix("raylign.")
    found: Any = definition(raylign._LAZY[name], name)
    own = {argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)}
    for keyword in node.keywords:
        if keyword.arg and keyword.arg not in own:
            yield from _wrong_value(OPTIONS[name], keyword.arg)


def wrong_files(page: str) -> Iterator[str]:
    """Files of the repository, and shipped configurations, that do not exist."""
    for span in inline(page):
        for path in re.findall(r"(?<![\w/.-])((?:raylign|launch|tests|tuning|docs)/[\w./-]+)", span):
            if not (ROOT / path.rstrip(".")).exists():
                yield f"there is no {path}"
    shipped = {path.name for folder in ("launch", "tuning") for path in (ROOT / folder).rglob("*.yaml")}
    written = {"config.yaml"}  # of every run directory
    for name in re.findall(r"(?<![\w*{-])([\w-]+\.yaml)\b", page):
        if name not in shipped | written and not name.startswith("my"):
            yield f"no configuration {name} ships (call a reader's own my-something.yaml)"


def wrong_anchors(page: str, directory: Path) -> Iterator[str]:
    """Links to headings that the page they lead to does not have; Sphinx sees those of docs/ alone."""
    for target, anchor in re.findall(r"\]\(([^)#:\s]+)#([^)\s]+)\)", page):
        headings = re.findall(r"^#+ (.+)$", (directory / target).read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if anchor not in slugs:
            yield f"{target} has no heading #{anchor}"
