"""Newton-like updates of 16 numbers; its state is a file of a fixed size, synced and renamed over the one before.

It is right: at every moment the file is whole, of this save or of the one before.
"""

import json
import math
import os
import struct
import time

OUT = os.environ["OUT"]
STATE, TEMPORARY = f"{OUT}/state.bin", f"{OUT}/state.bin.tmp"
LAYOUT = struct.Struct("<q16d")
STEPS, SAVE_EVERY = 100, 5


def load():
    try:
        with open(STATE, "rb") as file:  # noqa: PTH123
            step, *values = LAYOUT.unpack(file.read())
    except FileNotFoundError:
        return 0, [1.0 + number / 16 for number in range(16)]
    print("resume at", step, flush=True)
    return step, values


def save(step, values):
    with open(TEMPORARY, "wb") as file:  # noqa: PTH123
        file.write(LAYOUT.pack(step, *values))
        file.flush()
        os.fsync(file.fileno())
    os.replace(TEMPORARY, STATE)  # noqa: PTH105


def main():
    os.makedirs(OUT, exist_ok=True)  # noqa: PTH103
    step, values = load()
    while step < STEPS:
        noise = math.sin(step * 12.9898) * 0.01
        values = [value - 0.05 * (value * value - number - 1) / value + noise for number, value in enumerate(values)]
        step += 1
        time.sleep(0.02)
        if step % SAVE_EVERY == 0:
            save(step, values)
    with open(f"{OUT}/result.json", "w") as file:  # noqa: PTH123
        json.dump(values, file)


if __name__ == "__main__":
    main()
