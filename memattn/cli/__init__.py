"""The command line: one file for each subcommand; its parser is built when it is called."""

from memattn.cli._main import main

__all__ = ["main"]
