"""Run commands of memattn, given as JSON, in one process, so that torch is loaded once."""

import json
import sys

from memattn.cli import main

if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        sys.stdout.write(f"$ {' '.join(command)}\n")
        sys.stdout.flush()
        code = main(command[1:])
        if code:
            sys.exit(f"{' '.join(command)} ended with {code}")
