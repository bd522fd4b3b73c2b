"""Runs a program of this folder in which SIGTERM reaches the whole tree, and kills a data loader's worker on rank 1.

python -m trainer.launch --processes 2 tests/programs/frail.py ASKS PROGRAM [ARGS ...]

That happens as the worker loads a batch that its rank waits for already: the one that is asked for the ASKSth time. By
then the ranks have agreed that there is no stop, and the other rank goes on with its batch.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
from torch.utils.data import get_worker_info
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

ASKS = int(sys.argv[1])
ASKED = multiprocessing.Event()
next_data, fetch = _MultiProcessingDataLoaderIter._next_data, _MapDatasetFetcher.fetch
asks = fetches = 0


def next_data_asked(self):
    """Count what the training process asks for."""
    global asks
    asks += 1
    if asks == ASKS:
        ASKED.set()
    return next_data(self)


def fetch_or_die(self, index):
    """Count what a worker loads: of the first epoch, each loads the batch that comes after those of the others."""
    global fetches
    worker = get_worker_info()
    if worker is None:
        print(f"rank {os.environ['RANK']} loads {len(index)} samples itself", flush=True)
        return fetch(self, index)
    fetches += 1
    if (fetches - 1) * worker.num_workers + worker.id + 1 == ASKS:
        ASKED.wait()
        launcher = psutil.Process(os.getppid()).parent()
        for process in (*launcher.children(recursive=True), launcher):
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        os.kill(os.getpid(), signal.SIGKILL)
    return fetch(self, index)


if os.environ["RANK"] == "1" and ASKS:
    _MultiProcessingDataLoaderIter._next_data, _MapDatasetFetcher.fetch = next_data_asked, fetch_or_die
program = Path(__file__).parent / sys.argv[2]
sys.argv = [str(program), *sys.argv[3:]]
sys.path.insert(0, str(program.parent))
runpy.run_path(str(program), run_name="__main__")
