"""The published results, one row a network: its sizes and its test accuracy.

Readers of this table: the designs `paper` and `mnih`, the first points of a search, and `analysis.paper`.

Sources: Fang, Tian and Yang, "Recurrent Models of Visual Attention: A Case Study on MNIST Dataset", Table 1 (one seed,
Adam 3e-4, 100 epochs, best validation epoch); Mnih et al. 2014 (arXiv 1406.6247), Tables 1 and 2, published as error.
"""

from __future__ import annotations

from typing import NamedTuple

CASE_STUDY = "Fang, Tian and Yang"
MNIH = "Mnih et al. 2014"


class Published(NamedTuple):
    """One published result. Only a RAM has glimpses, a patch size (pixels) and scales."""

    source: str
    task: str
    model: str  # ram, ram-random, cnn, conv or fc: `Config.model`
    accuracy: float  # test, %
    glimpses: int
    patch: int
    scales: int
    hidden: int = 256  # units of the hidden layer or layers; the case study does not give its CNN's
    epoch: int | None = None  # of the best validation accuracy, if published
    first: int | None = None  # place among the first points of a search on this task; None: not among them

    @property
    def label(self) -> str:
        """The row's name in the tables."""
        if not self.glimpses:
            layers = f"fully connected, 2 layers of {self.hidden}"
            return {"cnn": "CNN", "conv": "convolutional, 2 layers", "fc": layers}[self.model]
        kind = " random" if self.model == "ram-random" else ""
        plural = "s" if self.scales > 1 else ""
        return f"RAM, {self.glimpses}{kind} glimpses, {self.patch}x{self.patch}, {self.scales} scale{plural}"

    @property
    def short(self) -> str:
        """The row's name in the designs."""
        if not self.glimpses:
            return {"cnn": "CNN", "conv": "conv", "fc": f"fc {self.hidden}"}[self.model]
        if self.model == "ram-random":
            return f"RAM {self.glimpses} random gl"
        return f"RAM {self.glimpses} gl {self.patch}x{self.patch} {self.scales} s"


# The case study's rows: task, accuracy, best epoch, glimpses, patch, scales (none: its CNN), `first`.
_CASE_STUDY_ROWS = (
    ("translated", 96.66, 96, 0, 0, 0, None),
    ("translated", 79.98, 57, 6, 8, 2, 5),
    ("translated", 81.22, 96, 6, 8, 3, 4),
    ("translated", 94.35, 92, 6, 12, 3, 1),
    ("translated", 92.52, 63, 8, 12, 3, 3),
    ("translated", 96.87, 69, 6, 16, 3, 2),
    ("cluttered", 93.50, 96, 0, 0, 0, None),
    ("cluttered", 85.65, 72, 6, 12, 3, 1),
    ("cluttered", 85.11, 52, 6, 12, 4, 5),
    ("cluttered", 86.07, 67, 8, 12, 3, 3),
    ("cluttered", 91.26, 95, 6, 16, 3, 2),
    ("cluttered", 93.01, 96, 6, 20, 3, 4),
)
# Mnih et al.'s rows: task, error, model, hidden, glimpses, patch, scales, `first`.
_MNIH_ROWS = (
    ("original", 1.69, "fc", 256, 0, 0, 0, None),
    ("original", 1.21, "conv", 256, 0, 0, 0, None),
    ("original", 3.79, "ram", 256, 2, 8, 1, 3),
    ("original", 1.51, "ram", 256, 3, 8, 1, None),
    ("original", 1.54, "ram", 256, 4, 8, 1, 2),
    ("original", 1.34, "ram", 256, 5, 8, 1, None),
    ("original", 1.12, "ram", 256, 6, 8, 1, 1),
    ("original", 1.07, "ram", 256, 7, 8, 1, None),
    ("translated", 6.42, "fc", 64, 0, 0, 0, None),
    ("translated", 2.63, "fc", 256, 0, 0, 0, None),
    ("translated", 1.62, "conv", 256, 0, 0, 0, None),
    ("translated", 1.54, "ram", 256, 4, 12, 3, None),
    ("translated", 1.22, "ram", 256, 6, 12, 3, None),
    ("translated", 1.2, "ram", 256, 8, 12, 3, None),
    ("cluttered", 28.58, "fc", 64, 0, 0, 0, None),
    ("cluttered", 11.96, "fc", 256, 0, 0, 0, None),
    ("cluttered", 8.09, "conv", 256, 0, 0, 0, None),
    ("cluttered", 4.96, "ram", 256, 4, 12, 3, None),
    ("cluttered", 4.08, "ram", 256, 6, 12, 3, None),
    ("cluttered", 4.04, "ram", 256, 8, 12, 3, None),
    ("cluttered", 14.4, "ram-random", 256, 8, 12, 3, None),
    ("cluttered-100", 14.35, "conv", 256, 0, 0, 0, None),
    ("cluttered-100", 9.41, "ram", 256, 4, 12, 4, 3),
    ("cluttered-100", 8.31, "ram", 256, 6, 12, 4, 2),
    ("cluttered-100", 8.11, "ram", 256, 8, 12, 4, 1),
)
PUBLISHED: tuple[Published, ...] = (
    *(
        Published(CASE_STUDY, task, "ram" if sizes[0] else "cnn", accuracy, *sizes, epoch=epoch, first=first)
        for task, accuracy, epoch, *sizes, first in _CASE_STUDY_ROWS
    ),
    *(
        Published(MNIH, task, model, round(100 - error, 2), *sizes, hidden=hidden, first=first)
        for task, error, model, hidden, *sizes, first in _MNIH_ROWS
    ),
)


def published_rows(source: str, tasks: tuple[str, ...] | None = None) -> list[Published]:
    """The rows of one source, of some tasks or of all, in the order of the papers' tables."""
    return [row for row in PUBLISHED if row.source == source and (tasks is None or row.task in tasks)]


def first_points(task: str) -> list[Published]:
    """The published RAMs that a search on a task tries first, in this order."""
    return sorted((row for row in PUBLISHED if row.task == task and row.first), key=lambda row: row.first or 0)
