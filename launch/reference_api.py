"""Reference of the names of `import raylign` and of its errors, read from their source: nothing is imported to run."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Collection
from pathlib import Path

import raylign
from launch.reference_config import code, table

_API = """# Python API

What `import raylign` offers; the names are imported on first use, so that the import itself loads neither torch nor
Ray. Nothing here starts Ray. The [configuration keys](config.md) that a call takes as options are those of the section
it names; mistakes raise a [named error](errors.md).

```python
import ray
import raylign

ray.init()
result = raylign.align(raylign.load_config("my.yaml", ["run.name=from-python", "train.beta=0.1"]))
print(result.table, result.checkpoint)
```

The phases one by one, with Datasets of yours in between: `ingest`, `extract_features`, `fit_reward`, `rank`, `train`
or `train_online`, `evaluate`.
"""
_RESULTS = """## What they return

Beside Ray's own `ray.data.Dataset` and `ray.train.Result`.
"""
_ERRORS = """# Errors

Every mistake that a user can make raises one of these. A message says what was found, what was expected, where, and
what to do. Each also inherits the built-in type that it replaces, and keeps its type on the way out of a Ray worker.
The command line prints the message and leaves with the exit status of the table. Cures for the common ones are in
[troubleshooting](../troubleshooting.md).
"""
_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields|Source|Definition):\s*(.*)$")


def api_page() -> str:
    """Markdown of every public name, in the order of the module, and of the types that the functions return."""
    parts, returned = [_API], dict[str, ast.ClassDef]()
    for name, module in raylign._LAZY.items():
        node = definition(module, name)
        parts.append(_entry(name, node))
        if isinstance(node, ast.FunctionDef) and node.returns:
            returned |= _own_types(module, node.returns)
    parts += [_RESULTS, *(_type_entry(node, returned.keys()) for node in returned.values())]
    return "\n\n".join(part.strip() for part in parts)


def _own_types(module: str, annotation: ast.expr) -> dict[str, ast.ClassDef]:
    """Classes of raylign in an annotation that have no entry of their own, each after those that it inherits from."""
    tree = _source(module)
    homes = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    found: dict[str, ast.ClassDef] = {}
    for named in ast.walk(annotation):
        if isinstance(named, ast.Name) and named.id not in raylign._LAZY:
            home = homes.get(named.id) or module
            if home.split(".")[0] == "raylign" and _defines(home, named.id):
                node = definition(home, named.id)
                assert isinstance(node, ast.ClassDef), f"{named.id} of {home} is an annotation and no class"
                for base in node.bases:
                    found |= _own_types(home, base)
                found[named.id] = node
    return found


def errors_page() -> str:
    """Markdown of the error tree."""
    rows = [["error", "is also", "exit status", "raised when"]]
    statuses = {"ConfigError": 2}
    for node in _source("raylign.errors").body:
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            statuses.setdefault(node.name, max((statuses.get(base, 1) for base in bases), default=1))
            summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            rows.append([code(node.name), ", ".join(map(code, bases)), str(statuses[node.name]), summary])
    return f"{_ERRORS}\n{table(rows)}"


def _source(module: str) -> ast.Module:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{module} is named by raylign/__init__.py and does not exist")
    return ast.parse(Path(found.origin).read_text(encoding="utf-8"))


def _defines(module: str, name: str) -> bool:
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in _source(module).body)


def definition(module: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """Where the source of a module defines a name.

    Raises:
        AttributeError: it does not.
    """
    for node in _source(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    raise AttributeError(f"raylign.{name} is said to be defined in {module}, which defines no such name")


def _entry(name: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    docstring = markdown(ast.get_docstring(node) or "")
    call = f"```python\n{signature(node)}\n```\n\n" if isinstance(node, ast.FunctionDef) else ""
    return f"## {name}\n\n{call}{docstring}"


def _type_entry(node: ast.ClassDef, shown: Collection[str]) -> str:
    bases = [code(base.id) for base in node.bases if isinstance(base, ast.Name) and base.id in shown]
    inherited = f"\n\nAlso the attributes of {', '.join(bases)}." if bases else ""
    return f"### {node.name}\n\n{markdown(ast.get_docstring(node) or '')}{inherited}"


def signature(node: ast.FunctionDef) -> str:
    """Head of a function with its annotations and defaults, one argument a line where there are several."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [_argument(one, default) for one, default in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        parts.append(f"*{_text(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(one, value) for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append(f"**{_text(arguments.kwarg)}")
    returned = f" -> {_text(node.returns)}" if node.returns else ""
    if len(parts) < 3:
        return f"def {node.name}({', '.join(parts)}){returned}: ..."
    inner = "".join(f"    {part},\n" for part in parts)
    return f"def {node.name}(\n{inner}){returned}: ..."


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return _text(argument) + (f" = {_text(default)}" if default is not None else "")


def _text(node: ast.AST) -> str:
    """Source of a node with double quotes, as the formatter has them in pages too."""
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def markdown(docstring: str) -> str:
    """A Google docstring as Markdown: sections in bold, their entries as lists.

    Args:
        docstring: cleaned, as `ast.get_docstring` gives it.
    """
    blocks: list[str] = []
    lines = docstring.splitlines()
    while lines:
        found = _SECTION.match(lines[0])
        if found is None:
            blocks.append(lines.pop(0))
            continue
        lines.pop(0)
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        name, first = found.groups()
        content = inspect.cleandoc("\n".join(body))
        if name in ("Args", "Attributes"):
            content = "\n".join(_item(item) for item in _items(content))
        blocks += ["", f"**{name}**", "", "\n".join(filter(None, (first, content)))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip()


def _items(content: str) -> list[str]:
    """Entries of a section; what is indented belongs to the entry above."""
    items: list[str] = []
    for line in content.splitlines():
        if line.startswith(" ") and items:
            items[-1] += f" {line.strip()}"
        elif line.strip():
            items.append(line.strip())
    return items


def _item(item: str) -> str:
    name, separator, text = item.partition(":")
    return f"- {code(name)}: {text.strip()}" if separator else f"- {item}"
