"""A parser from the typed arguments of a subcommand's function."""

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser, Namespace


def build_parser(
    function: Callable[..., Any], prog: str
) -> tuple[ArgumentParser, Callable[[Namespace], dict[str, Any]]]:
    """The parser of a subcommand, and what turns its values into the function's arguments.

    An argument without a default is positional, a list without a default takes one value or more,
    a bool is ``--name`` or ``--no_name``, and everything else is jsonargparse's own. ``--config``
    reads values from a YAML file.
    """
    docstring = parse_docstring(inspect.getdoc(function) or "")
    description = "\n\n".join(filter(None, [docstring.short_description, docstring.long_description]))
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with values of the options.")
    helps = {param.arg_name: param.description or "" for param in docstring.params}
    hints = get_type_hints(function)
    own: set[str | int] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if required and get_origin(hints[name]) is list:
            own.add(name)
            (item,) = get_args(hints[name])
            parser.add_argument(
                name, nargs="+", type=item, metavar=_singular(name), help=helps.get(name)
            )
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
        instantiated = parser.instantiate_classes(values)
        return {name: instantiated[name] for name in inspect.signature(function).parameters}

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


def _singular(name: str) -> str:
    return name.removesuffix("s").upper()
