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
import re
from typing import Any

import torch

from study.storage import Folder

logger = logging.getLogger(__name__)

KEPT = 2  # epoch checkpoints of a running trial: the newest, and the one before in case the newest is damaged
_DIGEST_SIZE = 32  # bytes of a SHA-256
_EPOCH_FILE = re.compile(r"epoch_(\d{4,})\.pt")


class Checkpoints:
    """The checkpoints of one trial."""

    def __init__(self, folder: Folder, number: int) -> None:
        self.folder = folder
        self.name = f"trials/{number:04d}"

    def save(self, epoch: int, content: dict[str, Any]) -> None:
        """Save the state after an epoch, then drop all but the last two. Raises OSError (full disk, no access)."""
        self.folder.write(f"{self.name}/epoch_{epoch:04d}.pt", _pack(content))
        for old in self._epochs()[:-KEPT]:
            self.folder.delete(f"{self.name}/{old}")

    def load(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The newest undamaged checkpoint of this identity (configuration and seeds); None: start from the beginning.

        A record that lost its last commit in a power cut may give the number to another configuration, which must not
        continue from here.
        """
        for name in reversed(self._epochs()):
            if content := self._read(name):
                if content.get("identity") == identity:
                    return content
                logger.warning("%s/%s belongs to another configuration and is not used", self.name, name)
        return None

    def save_best(self, content: dict[str, Any]) -> None:
        """Save a complete trial's best weights."""
        self.folder.write(f"{self.name}/best.pt", _pack(content))

    def load_best(self) -> dict[str, Any] | None:
        """A complete trial's best weights; None if they are lost or damaged."""
        return self._read("best.pt")

    def drop_epochs(self, *, keep_best: bool) -> None:
        """Delete the files that an ended trial no longer needs."""
        for name in self.folder.names(self.name):
            if not (keep_best and name == "best.pt"):
                self.folder.delete(f"{self.name}/{name}")
        self.folder.delete_folder(self.name)

    def identity(self) -> dict[str, Any] | None:
        """Whose checkpoints these are, by the newest undamaged file; None if there is no such file."""
        for name in [*reversed(self._epochs()), "best.pt"]:
            if content := self._read(name):
                return content.get("identity")
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
            logger.warning("%s/%s is damaged (%d bytes, wrong checksum) and is not used", self.name, name, len(raw))
            return None
        # weights_only: a checkpoint that contains code is refused.
        return torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")


def numbers_present(folder: Folder) -> list[int]:
    """The numbers of the trials of which a study's folder holds files."""
    return sorted(int(name) for name in folder.folders("trials") if name.isdecimal())


def _pack(content: dict[str, Any]) -> bytes:
    """A torch file, followed by its SHA-256, because torch does not notice all damage."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
