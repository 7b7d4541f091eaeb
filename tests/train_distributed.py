"""Run by ``accelerate launch``: trains once for each ``FILE`` or ``FILE=CHECKPOINT`` given."""

import sys

from memattn.train import load_config, train
from memattn.train.distributed import leave_process_group

if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path, _, checkpoint = argument.partition("=")
        train(load_config(path), resume=checkpoint or False, progress=False)
    leave_process_group()
