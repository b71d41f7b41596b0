"""Checkpoints of trials, by trial number, in the study's storage.

    <storage>/<study>/trials/0007/epoch_0003.pt    the trainer's state and all epochs' metrics; the last two are kept
    <storage>/<study>/trials/0007/best.pt          the best weights of a complete trial, all that is kept of it

Tune's own checkpoints are not used. Tune finds them by its own trial ids, which a new run of the command does not have,
and writes its experiment state every ten seconds at best. Ours are found by number, on any node, after any crash.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from ramcore.errors import UserError, first_line
from study.storage import Folder

logger = logging.getLogger(__name__)

KEPT = 2  # epoch checkpoints of a running trial: the newest, and the one before in case the newest is damaged
_DIGEST_SIZE = 32  # bytes of a SHA-256
_EPOCH_FILE = re.compile(r"epoch_([0-9]{4,})\.pt")
_CHECKPOINT = re.compile(rf"{_EPOCH_FILE.pattern}|best\.pt")
_OF_TRIAL = re.compile(rf"([0-9]{{4,}})/(?:{_CHECKPOINT.pattern})")
_OUR_FILE = re.compile(rf"{_CHECKPOINT.pattern}|\..*\.tmp")  # a temporary file is of a process that was killed
# What reading or using a checkpoint that is whole may raise if its content is not what it should be.
UNUSABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, KeyError, IndexError, TypeError, ValueError,
    AttributeError, UserError,
)  # fmt: skip


class Checkpoints:
    """The checkpoints of one trial."""

    def __init__(self, folder: Folder, number: int) -> None:
        self.folder = folder
        self.name = f"trials/{number:04d}"
        self.problems: list[str] = []  # the files that were not used, and why

    def save(self, epoch: int, content: dict[str, Any]) -> None:
        """Save the state after an epoch, then drop all but the last two. Raises OSError (full disk, no access)."""
        self.folder.write(f"{self.name}/epoch_{epoch:04d}.pt", _pack(content))
        for old in self._epochs()[:-KEPT]:
            self.folder.delete(f"{self.name}/{old}")

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The newest of `candidates`; None: start from the beginning."""
        return next((content for _, content in self.candidates(identity)), None)

    def candidates(self, identity: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(epoch, content) of the undamaged checkpoints of this identity (configuration and seeds), newest first.

        A record that lost its last commit in a power cut may give the number to another configuration, which must not
        continue from here. What is passed over is added to `problems`.
        """
        if junk := [n for n in self.folder.names(self.name) if not _OUR_FILE.fullmatch(n)]:
            self.problem(f"{self.name} holds what is no checkpoint, and is not used: {', '.join(junk)[:200]}")
        for name in reversed(self._epochs()):
            try:
                content = self._read(name)
            except UNUSABLE as error:
                self.problem(f"{self.name}/{name} cannot be used ({first_line(error)})")
                continue
            if content is None:
                continue
            if content.get("identity") != identity:
                self.problem(f"{self.name}/{name} belongs to another configuration and is not used")
            else:
                yield int(name[len("epoch_") : -len(".pt")]), content

    def problem(self, text: str) -> None:
        """Note a file that is not used."""
        logger.warning("%s", text)
        self.problems.append(text)

    def save_best(self, content: dict[str, Any]) -> None:
        """Save a complete trial's best weights."""
        self.folder.write(f"{self.name}/best.pt", _pack(content))

    def load_best(self) -> dict[str, Any] | None:
        """A complete trial's best weights; None if they are lost or damaged. Raises one of UNUSABLE."""
        return self._read("best.pt")

    def drop_epochs(self, *, keep_best: bool) -> None:
        """Delete the files that an ended trial no longer needs; what is not this class's stays."""
        for name in self.folder.names(self.name):
            if _OUR_FILE.fullmatch(name) and not (keep_best and name == "best.pt"):
                self.folder.delete(f"{self.name}/{name}")
        self.folder.delete_folder(self.name)

    def identity(self) -> dict[str, Any] | None:
        """Whose checkpoints these are, by the newest undamaged file; None if there is no such file."""
        for name in [*reversed(self._epochs()), "best.pt"]:
            try:
                content = self._read(name)
            except UNUSABLE:
                continue
            if content and "identity" in content:
                return content["identity"]
        return None

    def _epochs(self) -> list[str]:
        return [name for name in self.folder.names(self.name) if _EPOCH_FILE.fullmatch(name)]

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            raw = self.folder.read(f"{self.name}/{name}")
        except FileNotFoundError:
            return None
        body, digest = raw[:-_DIGEST_SIZE], raw[-_DIGEST_SIZE:]
        if hashlib.sha256(body).digest() != digest:
            self.problem(f"{self.name}/{name} is damaged ({len(raw)} bytes, wrong checksum) and is not used")
            return None
        # weights_only: a checkpoint that contains code is refused.
        content = torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")
        if not isinstance(content, dict):
            raise ValueError("it holds no checkpoint")
        return content


def numbers_present(folder: Folder) -> list[int]:
    """The numbers of the trials of which a study's folder holds checkpoints."""
    found = (_OF_TRIAL.fullmatch(name) for name in folder.files("trials"))
    return sorted({int(match[1]) for match in found if match})


def _pack(content: dict[str, Any]) -> bytes:
    """A torch file, followed by its SHA-256, because torch does not notice all damage."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
