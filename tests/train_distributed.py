"""Run by ``accelerate launch``: trains once for each ``FILE`` or ``FILE=CHECKPOINT`` given."""

import sys
from pathlib import Path

from memattn.train import load_config, train
from memattn.train.distributed import leave_process_group

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path, _, checkpoint = argument.partition("=")
        train(load_config(path), resume=checkpoint or False, progress=False)
    leave_process_group()
    # one that is left may abort the process at its end
    threads = [(task / "comm").read_text() for task in Path("/proc/self/task").glob("*")]
    assert not any("gloo" in name for name in threads), threads
