"""Finds the subcommand, builds its parser, runs it, and turns errors into one line."""

import ast
import errno
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMANDS = (
    *("doctor", "data", "train", "evaluate", "generate", "audit", "bench", "estimate", "plot"),
    *("gates", "memorize", "chapters", "demo", "gallery", "study", "compare", "continual"),
)
# errors that the user can fix; all others are bugs and show a traceback
USER_ERRORS = (
    *(ValueError, TypeError, OSError, ImportError, NotImplementedError),
    FloatingPointError,  # training that diverged
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None means those of the process.

    Returns:
        The exit code: 0 success, 1 a negative result of the command (a failed audit), 2 a user
            error (one line on stderr), 130 Ctrl-C. ``--debug`` shows the traceback of a user error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        from memattn import __version__

        sys.stdout.write(f"memattn {__version__}\n")
        return 0
    name = arguments.pop(0)
    if name not in COMMANDS:
        return _fail("memattn", f"command must be one of {', '.join(COMMANDS)}, got {name}")
    try:
        return _run(name, arguments)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"memattn {name}: interrupted{': ' * bool(stop.args)}{_one_line(stop)}\n")
        return 130
    except BrokenPipeError:
        # the reader of a pipe, such as head, has ended
        sys.stdout = None  # pyright: ignore[reportAttributeAccessIssue]
        return 0
    except USER_ERRORS as error:
        if debug:
            raise
        return _fail(f"memattn {name}", _describe(error))


def _run(name: str, arguments: list[str]) -> int:
    """Parse the arguments of a subcommand and call its function."""
    from jsonargparse import ArgumentError

    from memattn.cli._parser import build_parser, normalise

    module = importlib.import_module(f"memattn.cli.{name}")
    function: Callable[..., Any] = getattr(module, name)
    kinds: dict[str, Callable[..., Any]] = getattr(module, "KINDS", {})
    if arguments and arguments[0] in kinds:  # a command with subcommands, each with its own options
        kind = arguments.pop(0)
        name, function = f"{name} {kind}", kinds[kind]
    parser, build = build_parser(function, prog=f"memattn {name}")
    try:
        values = parser.parse_args(normalise(arguments))
    except ArgumentError as error:
        return _fail(f"memattn {name}", f"{_one_line(error)} (see memattn {name} --help)")
    except SystemExit as stop:  # --help and --print_config end the program after printing
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: sys.stderr.write(
            f"memattn {name}: {_one_line(message)}\n"
        )
        return int(function(**build(values)) or 0)


def _help() -> str:
    """The help of the program, from the first line of each subcommand's docstring."""
    lines = [
        "usage: memattn COMMAND ...",
        "",
        "Attention with tasks, foresight, segments and memory.",
    ]
    lines += ["", "commands:"]
    lines += [f"  {name:<10}{_summary(name)}" for name in COMMANDS]
    lines += ["", "options:", "  -h, --help     this help; memattn COMMAND --help for a command's"]
    lines += ["  -V, --version  the version", "  --debug        show the traceback of an error"]
    return "\n".join(lines) + "\n"


def _summary(name: str) -> str:
    """First line of the docstring of a subcommand, read without importing it."""
    file = Path(__file__).with_name(f"{name}.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            file = (
                Path(__file__).parents[2].joinpath(*str(node.module).split(".")).with_suffix(".py")
            )
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise LookupError(f"{file} must define the function {name}")


def _describe(error: BaseException) -> str:
    """The error in one line; the operating system's own errors name their file."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device{_file(error)}; nothing that was complete is lost"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{_file(error)}"
    return _one_line(error) or type(error).__name__


def _file(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())


def _fail(prog: str, message: str) -> int:
    sys.stderr.write(f"{prog}: error: {message}\n")
    return 2
