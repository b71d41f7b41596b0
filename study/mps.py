"""CUDA's Multi-Process Service (MPS), under which trials in several processes compute on one GPU at the same time.

Without it, the driver gives the GPU to one process after another, and trials that share it gain nothing. It needs no
root: a control daemon, found through a folder of sockets, starts a server for the GPUs when its first client comes.

`cluster.sh` runs this file on the nodes of a cluster: `python -m study.mps start FOLDER` (or `end`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ramcore.errors import say

PIPE = "CUDA_MPS_PIPE_DIRECTORY"  # CUDA's variable: the folder in which programs find the daemon
_LOG = "CUDA_MPS_LOG_DIRECTORY"
_PROGRAM = "nvidia-cuda-mps-control"
_PROCESS = "nvidia-cuda-mps"  # how the names of the daemon's and the server's processes begin
_DEFAULT = "/tmp/nvidia-mps"  # of PIPE
_SECONDS = 20.0  # for the program to answer
_END_SECONDS = 5.0  # for the processes to end after they were told to


class MpsUnusable(RuntimeError):
    """Why MPS cannot be used here, in a few words."""


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Have the processes that are started in the block compute under MPS.

    One that runs already is used as it is, and stays. Else one is started with its files in `folder`, which is made for
    it, and is ended after the block. Raises MpsUnusable.
    """
    if _runs(Path(os.environ.get(PIPE) or _DEFAULT)):
        yield
        return
    start(folder)
    before = {name: os.environ.get(name) for name in (PIPE, _LOG)}
    os.environ |= _variables(folder)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        end(folder)


def start(folder: Path) -> None:
    """Start a daemon with its files in a folder, which is made, and which others cannot enter. Raises MpsUnusable."""
    if shutil.which(_PROGRAM) is None:
        raise MpsUnusable(f"there is no {_PROGRAM}")
    try:
        for inside in (folder, *map(Path, _variables(folder).values())):
            inside.mkdir(mode=0o700)
        _start(folder)
    except (MpsUnusable, OSError) as error:
        end(folder)
        raise MpsUnusable(str(error)) from error


def _start(folder: Path) -> None:
    environment = os.environ | _variables(folder)
    # With it, the daemon would give the GPUs new numbers; the trials name them by the machine's own.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    said = folder / "said"  # no pipe: the daemon would keep it open
    try:
        with said.open("w") as out:
            code = subprocess.run(
                [_PROGRAM, "-d"], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                timeout=_SECONDS, start_new_session=True,
            ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        raise MpsUnusable(f"{_PROGRAM} did not start within {_SECONDS:g} s") from None
    last = time.monotonic() + _END_SECONDS  # the daemon may need a moment more
    while not (answers := code == 0 and _answers(folder / "pipe")) and not code and time.monotonic() < last:
        time.sleep(0.1)
    if not answers:
        lines = said.read_text(errors="replace").strip().splitlines() or ["without a word"]
        raise MpsUnusable(f"{_PROGRAM} did not start: {lines[-1][:200]}")


def end(folder: Path) -> None:
    """End the MPS that was started in a folder, if it still runs, and remove the folder."""
    pipe = folder / "pipe"
    if _processes(pipe):
        _answers(pipe, "quit")
        last = time.monotonic() + _END_SECONDS
        while _processes(pipe) and time.monotonic() < last:
            time.sleep(0.1)
        for process in _processes(pipe):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _variables(folder: Path) -> dict[str, str]:
    return {PIPE: str(folder / "pipe"), _LOG: str(folder / "log")}


def _runs(pipe: Path) -> bool:
    """Whether a daemon runs that programs find in this folder."""
    if _answers(pipe):
        return True
    with suppress(OSError, ValueError):  # another user's may not answer us, but its number is there
        number = int((pipe / f"{_PROGRAM}.pid").read_text())
        return _PROGRAM in Path(f"/proc/{number}/cmdline").read_text()  # empty of one that has ended
    return False


def _answers(pipe: Path, command: str = "get_server_list") -> bool:
    """Give the daemon of this folder a command; returns whether it took it in time."""
    line = {"input": command, "env": os.environ | {PIPE: str(pipe)}, "timeout": _SECONDS}
    with suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([_PROGRAM], **line, text=True, capture_output=True).returncode == 0
    return False


def _processes(pipe: Path) -> list[int]:
    """The daemon and the servers that were started for this folder: their names and their environment say so."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            is_mps = (folder / "comm").read_text().startswith(_PROCESS)
            if is_mps and f"{PIPE}={pipe}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def main(verb: str, place: str) -> None:
    """Start MPS on a node before Ray, or end it after Ray."""
    folder = Path(place)
    if verb == "start" and _answers(folder / "pipe"):
        return
    end(folder)
    if verb == "end":
        return
    try:
        if _runs(Path(_DEFAULT)):  # it is used as it is
            folder.mkdir(mode=0o700)
            (folder / "pipe").symlink_to(_DEFAULT)
        else:
            start(folder)
    except (MpsUnusable, OSError) as error:
        say(f"warning: CUDA's MPS cannot be used ({error}): trials that share a GPU take turns, and gain nothing")


if __name__ == "__main__":
    main(*sys.argv[1:])
