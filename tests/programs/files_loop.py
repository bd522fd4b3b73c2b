"""A toy framework that trains a number and saves it as files, one for each rank beside those that rank 0 writes.

python -m trainer.launch tests/programs/files_loop.py --dir FOLDER --until 20 --strike 7:SIGKILL
"""

from trainer import SpotRun  # isort: skip

import argparse
import json
import os
import signal
import time
from pathlib import Path


def strike(number: signal.Signals, saved: Path | None) -> None:
    """Send this process a signal; SIGKILL comes when the last save, if there is one, is committed."""
    while number == signal.SIGKILL and saved and not list(saved.parent.glob(f"{saved.name}*/MANIFEST.json")):
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir")
    parser.add_argument("--until", type=int, default=12)
    parser.add_argument("--strike", default="0:SIGTERM")
    parser.add_argument("--strike-in-evaluation", type=int, default=0)
    parser.add_argument("--framework", default="toy")
    parser.add_argument("--both-write", action="store_true")
    given = parser.parse_args()
    step, _, name = given.strike.partition(":")
    value, seen, saved = 0, [], None
    with SpotRun(given.dir, save_every=4) as run:
        loop = run._framework_loop(given.framework)

        def write(folder: Path) -> Path:
            place = folder / "toy"
            (place / "parts").mkdir(parents=True)
            (place / "parts" / f"{run.rank}.json").write_text(json.dumps({"value": value, "rank": run.rank}))
            if run.rank == 0 or given.both_write:
                (place / "common.bin").write_bytes(bytes([value % 256]) * 100_000)
            if run.rank == 0:
                (place / "empty").touch()
            return place

        folder = run.resume_from()
        if folder:
            files = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
            part = Path(folder) / "parts" / f"{run.rank}.json"
            value = json.loads((part if part.exists() else part.with_name("0.json")).read_text())["value"]
            assert (Path(folder) / "common.bin").read_bytes() == bytes([value % 256]) * 100_000
            assert value == sum(range(1, run.step + 1)), (value, run.step)
            seen = run.state["seen"]
            run.print_line(f"files: {' '.join(files)}")
        loop.begin(write, given.until)
        while run.step < given.until and not loop.is_finished():
            if run.step + 1 == int(step) and run.rank == 0:
                strike(signal.Signals[name], saved)
            loop.start_step()
            value += run.step + 1
            loop.end_step(lr=0.1)
            run.state["seen"] = seen = [*seen, run.step]
            run.log(loss=value)
            for _ in range(3 if run.step % 3 == 0 else 0):  # An evaluation.
                if given.strike_in_evaluation == run.step and run.rank == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                loop.look()
            if loop.wants_save:
                loop.save()
                saved = Path(given.dir, "checkpoints", f"{run.step:010d}-")
        run.finish(lambda folder: (folder / "value.json").write_text(json.dumps([value, seen])))
    print(f"after the block: {value}", flush=True)


if __name__ == "__main__":
    main()
