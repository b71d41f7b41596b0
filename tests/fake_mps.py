"""A program in place of NVIDIA's control program of MPS: it does what that does, hangs, refuses or never ends."""

from __future__ import annotations

import sys
from pathlib import Path

from study import mps

# `-d` starts a daemon that only writes its number; other calls give it a command, as NVIDIA's program does.
PROGRAM = f"""\
#!{sys.executable} -SE
import os, signal, sys, time
pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
number, mode = f"{{pipe}}/nvidia-cuda-mps-control.pid", os.environ.get("FAKE_MPS")
if "-d" in sys.argv:
    if mode == "hangs":
        time.sleep(600)
    if mode == "refuses":
        sys.exit("MPS is not supported on this device")
    with open(os.environ["CUDA_MPS_LOG_DIRECTORY"] + "/control.log", "w") as log:
        print("visible", os.environ.get("CUDA_VISIBLE_DEVICES", "all"), file=log)
    if daemon := os.fork():
        with open(number, "w") as file:
            print(daemon, file=file)
        sys.exit()
    signal.pause()
try:
    daemon = int(open(number).read())
    assert open(f"/proc/{{daemon}}/cmdline").read()
except (OSError, AssertionError):
    sys.exit("Cannot find MPS control daemon process")
if input() == "quit" and mode != "never ends":
    os.remove(number)
    os.kill(daemon, signal.SIGTERM)
"""


def daemons(folder: Path) -> list[int]:
    """The processes of the MPS that was started in a folder."""
    return mps._processes(folder / "pipe")
