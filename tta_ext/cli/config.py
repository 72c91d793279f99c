"""``--config FILE``: a command's options from a YAML or TOML file."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tta_ext.files import read_text

__all__ = ["Config", "commands_beside", "load", "read"]


def read(path: Path, command: str, commands: Collection[str]) -> dict[str, Any]:
    """A file's values for a command: those at its top, then those under the command's own name.

    Raises:
        ValueError: the file is no YAML or TOML, or no table of names.
    """
    text = read_text(path)
    try:
        if path.suffix == ".toml":
            tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
            values: Any = tomllib.loads(text)
        else:
            import yaml

            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    values = {} if values is None else values
    own = {} if not isinstance(values, dict) else values.get(command)
    own = {} if own is None else own
    if not isinstance(values, dict) or not isinstance(own, dict):
        raise ValueError(f"{path} is not a table of options, name: value")
    return {str(k): v for k, v in values.items() if k not in commands} | own


def load(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of ``--config``: its values stand where the command line has no other.

    Raises:
        ValueError: an option that the command does not have, or a value of a wrong form.
    """
    if path is None or context.resilient_parsing:
        return path
    commands = commands_beside(context)
    known = {name: one for one in context.command.params for name in _names(one)}
    context.default_map = {}
    path = path.expanduser()
    for key, value in read(path, context.info_name or "", commands).items():
        parameter = known.get(key)
        if parameter is None or parameter.name == "config":
            raise ValueError(f"{path}: tta {context.info_name} has no option {key!r}")
        name = str(parameter.name)
        if name in context.default_map:
            raise ValueError(f"{path}: {key!r} is given twice")
        if value is not None:
            context.default_map[name] = _value(parameter, value, f"{path}: {_option(parameter)}")
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=load,
        help="YAML or TOML file of options; what is on the command line goes first.",
    ),
]


def commands_beside(context: typer.Context) -> list[str]:
    """The names of all commands, that of the context's own among them."""
    group: Any = context.parent
    return [] if group is None else group.command.list_commands(group)


def _option(parameter: Any) -> str:
    """What errors call a parameter."""
    return str(max(parameter.opts, key=len)).lstrip("-")


def _names(parameter: Any) -> set[str]:
    """What a parameter may be called: its option without dashes, or its name in Python."""
    options = {option.lstrip("-") for option in parameter.opts if option.startswith("--")}
    names = options or {str(parameter.name)}
    return names | {name.replace("-", "_") for name in names}


def _value(parameter: Any, value: Any, where: str) -> Any:
    """A value as the command line would give it; click does the rest."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}, expected true or false")
        return value
    if not getattr(parameter, "multiple", False) and parameter.nargs != -1:
        return _text(value, where)
    if isinstance(value, dict):  # set: {alpha: 0.9}
        value = [f"{name}={_text(one, where)}" for name, one in value.items()]
    return [_text(one, where) for one in (value if isinstance(value, list) else [value])]


def _text(value: Any, where: str) -> str:
    if isinstance(value, dict) and where.endswith(": quantization-config"):
        return json.dumps(value)
    if isinstance(value, (bool, list, dict)):
        raise ValueError(f"{where} is {value!r}, expected a number or a text (in quotes)")
    return str(value)
