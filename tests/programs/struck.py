"""Runs a script of tests/programs/scripts, and has its machine taken as it comes to a line.

    python struck.py SCRIPT STEPS PAUSES [LINE TIMES SIGNAL]

Every pause of the script is a step. It leaves a byte in the file STEPS, and is left out unless PAUSES is `real`. As
line LINE is about to run for the TIMESth time, the whole process group gets the signal, as all processes of a machine
do. The group must be this program's own.
"""

import os
import runpy
import signal
import sys
import time

script, steps, pauses, *strike = sys.argv[1:]
line, times, number = (int(strike[0]), int(strike[1]), signal.Signals[strike[2]]) if strike else (0, 0, None)
this, sleep = os.getpid(), time.sleep


def pause(seconds):
    """A step is done."""
    if pauses == "real":
        sleep(seconds)
    with open(steps, "ab") as file:  # noqa: PTH123
        file.write(b".")


def trace(frame, event, argument):
    """Look at the lines of the script alone."""
    return look if frame.f_code.co_filename == script else None


def look(frame, event, argument):
    """Strike, if it is time."""
    global times
    if event == "line" and frame.f_lineno == line and os.getpid() == this:
        times -= 1
        if times == 0:
            take_machine()
    return look


def take_machine():
    """Signal the group from outside of it: loader workers tell a stranger's SIGTERM from their parent's.

    Not before fork has returned: Python drops what a handler raises while the hooks of a fork run. The script goes on
    once a worker has died, if it has any: how long that takes is no fault of the script.
    """
    group, workers = os.getpgrp(), []
    if multiprocessing := sys.modules.get("multiprocessing"):
        workers = [worker.sentinel for worker in multiprocessing.active_children()]
    returned, has_returned = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        os.read(returned, 1)
        os.killpg(group, number)
        os._exit(0)
    os.write(has_returned, b".")
    os.waitpid(child, 0)
    if workers:
        from multiprocessing.connection import wait

        wait(workers)


time.sleep = pause
sys.argv = [script]
if strike:
    sys.settrace(trace)
runpy.run_path(script, run_name="__main__")
