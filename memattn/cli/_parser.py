"""A parser from the typed arguments of a subcommand's function."""

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from memattn.train.config import TrainConfig
from memattn.train.load import upgrade_file
from memattn.yaml_text import plain_text, text_mode


def build_parser(
    function: Callable[..., Any], prog: str
) -> tuple[ArgumentParser, Callable[[Namespace], dict[str, Any]]]:
    """The parser of a subcommand, and a function that converts its values to arguments.

    An argument without a default is positional. So is a list or tuple that comes first: it takes at
    least one value, or any number if it has a default. An optional string that comes first may be
    left out. A bool is ``--name`` or ``--no_name``; everything else follows jsonargparse.
    ``--config`` reads values from a YAML file, unless the function has an argument of that name.
    """
    docstring = parse_docstring(inspect.getdoc(function) or "")
    description = "\n\n".join(
        filter(None, [docstring.short_description, docstring.long_description])
    )
    hints = get_type_hints(function)
    # a command with the sections of a run reads every kind of configuration file
    is_run = get_type_hints(TrainConfig).items() <= hints.items()
    mode = text_mode(function, upgrade_file if is_run else None)
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, parser_mode=mode
    )
    if "config" not in hints:
        help = "YAML file with values of the options."
        parser.add_argument("--config", action="config", help=help)
    helps = {param.arg_name: param.description or "" for param in docstring.params}
    own: set[str | int] = set()
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        required = parameter.default is inspect.Parameter.empty
        item = _item_type(hints[name])
        if item is not None and (required or i == 0):
            own.add(name)
            parser.add_argument(
                name,
                nargs="+" if required else "*",
                type=item,
                metavar=name.removesuffix("s").upper(),
                help=helps.get(name),
            )
        elif item is not None and parameter.default == ():
            # several values as in argparse, not one YAML list
            own.add(name)
            parser.add_argument(f"--{name}", nargs="+", type=item, default=(), help=helps.get(name))
        elif i == 0 and hints[name] == str | None:
            own.add(name)
            parser.add_argument(name, nargs="?", type=str, help=helps.get(name))
        elif hints[name] is bool and not required:
            own.add(name)
            parser.add_argument(
                f"--{name}",
                action=ActionYesNo(no_prefix="no_"),
                default=parameter.default,
                help=helps.get(name),
            )
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=own)

    def build(values: Namespace) -> dict[str, Any]:
        given = parser.instantiate(values)
        names = inspect.signature(function).parameters
        # positional values cannot have a default in the parser, so theirs is that of the function
        return {
            name: plain_text(given[name])
            for name in names
            if not (name in own and given[name] is None)
        }

    return parser, build


def normalise(arguments: list[str]) -> list[str]:
    """Option names with underscores: ``--batch-size=4`` is ``--batch_size=4``."""
    changed = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return changed + arguments[i:]
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
        changed.append(argument)
    return changed


def _item_type(hint: Any) -> type | None:
    """``X`` for ``list[X]`` and ``tuple[X, ...]``, else None."""
    return get_args(hint)[0] if get_origin(hint) in (list, tuple) else None
