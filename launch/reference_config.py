"""Reference of every configuration key, from the JSON schema of the sections, and of the shipped files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import tuning
from raylign.calibrate_config import CalibrateSection
from raylign.compare_config import CompareSection
from raylign.config import RunConfig, idle_keys
from tuning.sweep_config import SweepSection

CONFIGS = Path(__file__).parent / "configs"
SPACES = Path(tuning.__file__).parent / "spaces"
# sections of files that describe several runs, with the command that reads them
FILES: dict[str, tuple[type[BaseModel], str]] = {
    "compare": (CompareSection, "raylign compare"),
    "calibrate": (CalibrateSection, "raylign calibrate"),
    "sweep": (SweepSection, "raylign sweep"),
}

_INTRODUCTION = """# Configuration keys

Every key of a configuration file, in the order of its sections. On the command line a key is `section.key=value`, in
a file it is `key: value` below `section:`, in Python `config={"section": {"key": value}}`. An unknown key is an error
that names the nearest one; so is a key that the rest of the configuration makes idle.

Keys that the defaults do not read say in parentheses what to change first. `raylign align --print-config` prints what a
configuration resolves to, with the keys that it reads.
"""


def config_page() -> str:
    """Markdown of all sections: those of a run, then those of files that describe several runs."""
    idle = idle_keys(RunConfig())
    parts = [
        _INTRODUCTION,
        "Sections: " + " · ".join(f"[{name}](#{name})" for name in (*RunConfig.model_fields, *FILES)),
    ]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            raise TypeError(f"RunConfig.{name} is no section")
        parts.append(_section(name, section, {key: cure for key, cure in idle.items() if key.startswith(f"{name}.")}))
    for name, (section, command) in FILES.items():
        parts.append(_section(name, section, {}, note=f"Read by `{command}`, beside the sections of a run."))
    return "\n\n".join(part.strip() for part in parts)


def shipped_page() -> str:
    """Markdown of the files in launch/configs and tuning/spaces, each described by its own first lines."""
    parts = [
        "# Shipped configurations",
        "Each can be named without its directory, `raylign align --config dpo.yaml`, and any of its keys overridden "
        "behind it. The first lines of a file say what it is, how to start it and what to expect. What the keys do: "
        "[configuration keys](config.md).",
    ]
    parts += ["## Runs", *_files(CONFIGS)]
    parts += [
        "## Spaces",
        "What [a sweep](../sweeps.md) searches, named without directory and ending: `raylign sweep --space beta`.",
        *_files(SPACES),
    ]
    return "\n\n".join(parts)


def _files(directory: Path) -> list[str]:
    return [
        f"### {path.name}\n\n```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```"
        for path in sorted(directory.glob("*.yaml"))
    ]


def _section(name: str, section: type[BaseModel], idle: Mapping[str, str], *, note: str = "") -> str:
    schema = section.model_json_schema()
    rows = [["key", "value", "default", "what it does"]]
    for field, entry in schema["properties"].items():
        key = f"{name}.{field}"
        default = "required" if field in schema.get("required", ()) else code(shown(entry["default"]))
        cure = f" *({_as_code(idle[key])})*" if key in idle else ""
        rows.append([code(key), describe(entry), default, entry["description"] + cure])
    return "\n\n".join(filter(None, (f"## {name}", section.__doc__, note, table(rows))))


def describe(entry: Mapping[str, Any]) -> str:
    """The values that a key takes, in words.

    Args:
        entry: JSON schema of one value, for example {"type": "integer", "minimum": 1}.

    Returns:
        Markdown, for example "integer >= 1".

    Raises:
        ValueError: a schema that no key has had so far.
    """
    if "anyOf" in entry:
        return " or ".join(describe(one) for one in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(code(shown(value)) for value in entry["enum"])
    if "const" in entry:
        return code(shown(entry["const"]))
    kind = entry.get("type")
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "null":
        return "`null`"
    if kind in ("integer", "number"):
        return f"{kind}{_bounds(entry)}"
    if kind == "string":
        return f"text like {code(entry['pattern'])}" if "pattern" in entry else "text"
    if kind == "array":
        return f"list of {describe(entry['items'])}{_at_least(entry.get('minItems', 0))}"
    if kind == "object":
        values = entry.get("additionalProperties", True)
        of = describe(values) if isinstance(values, Mapping) and values else "any value"
        return f"mapping of names to {of}{_at_least(entry.get('minProperties', 0))}"
    if kind is None:
        return "any value"
    raise ValueError(f"a key has the schema {entry!r}, whose type {kind!r} this page cannot show: add it to describe()")


def _bounds(entry: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {entry[key]:g}" for key, sign in signs.items() if key in entry]
    return f" {', '.join(found)}" if found else ""


def _at_least(number: int) -> str:
    return f", at least {number}" if number else ""


def shown(value: Any) -> str:
    """A value as YAML reads it: text plain, everything else as JSON, small numbers in powers of ten."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)


def code(text: str) -> str:
    """Inline code."""
    return f"`{text}`"


def _as_code(cure: str) -> str:
    """A cure with its keys, such as "set train.objective=ipo", as inline code."""
    words = (f"`{word.rstrip(',')}`{',' * word.endswith(',')}" if "." in word else word for word in cure.split())
    return " ".join(words)


def table(rows: list[list[str]]) -> str:
    """A Markdown table, its first row the heading; bars inside of cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
