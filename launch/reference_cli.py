"""Reference of the commands, from click's own description of them."""

from __future__ import annotations

import inspect

import click

from launch.cli import main
from launch.reference_config import code, table

_INTRODUCTION = """# Commands

`raylign COMMAND --help` says the same on a terminal. Overrides are `section.key=value`, see
[configuration keys](config.md); `--config` takes a path or the name of a [shipped file](shipped.md).

Exit status: 0 done; 1 a run failed with a [named error](errors.md); 2 the configuration or the command line is wrong.
"""


def cli_page() -> str:
    """Markdown of every command with its usage, description, arguments and options."""
    parts = [_INTRODUCTION, *(command_entry(names, command) for names, command in commands(main, ("raylign",)))]
    return "\n\n".join(part.strip() for part in parts)


def commands(group: click.Group, names: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group that does something, with the words that call it; groups are left out."""
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        if isinstance(command, click.Group):
            found.extend(commands(command, (*names, name)))
        else:
            found.append(((*names, name), command))
    return found


def command_entry(names: tuple[str, ...], command: click.Command) -> str:
    """Heading, usage, help and options of one command.

    Args:
        names: the words that call it, for example ("raylign", "data", "inspect").
        command: as click has it.
    """
    name = " ".join(names)
    pieces = command.collect_usage_pieces(click.Context(command, info_name=names[-1]))
    text = inspect.cleandoc((command.help or "").split("\f")[0]).replace("\b\n", "")
    paragraphs = (f"```bash\n{part}\n```" if part.startswith(f"{names[0]} ") else part for part in text.split("\n\n"))
    parts = [f"## {name}", f"```text\n{' '.join([name, *pieces])}\n```", *paragraphs]
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    if options:
        parts.append(
            table([["option", "what it does"], *([_spelling(option), _meaning(option)] for option in options)])
        )
    return "\n\n".join(parts)


def _spelling(option: click.Option) -> str:
    value = ""
    if not option.is_flag and not option.count:
        choices = option.type.choices if isinstance(option.type, click.Choice) else ()
        value = " " + (option.metavar or "|".join(map(str, choices)) or option.type.name.split()[0].upper())
    names = ", ".join([*option.opts, *option.secondary_opts])
    return code(names + value)


def _meaning(option: click.Option) -> str:
    facts = []
    if isinstance(option.type, click.IntRange | click.FloatRange):
        bounds = (("from", option.type.min), ("to", option.type.max))
        facts.append(" ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None))
    if option.required:
        facts.append("required")
    elif option.show_default:
        facts.append(f"default {option.default}")
    if option.envvar:
        facts.append(f"or the environment's {option.envvar}")
    noted = f" ({'; '.join(facts)})" if facts else ""
    return (option.help or "") + noted
