"""The published results, one row a network: its sizes and its test accuracy.

Readers of this table: the designs `paper` and `mnih`, the first points of a search, and `analysis.paper`.

Sources: Fang, Tian and Yang, "Recurrent Models of Visual Attention: A Case Study on MNIST Dataset", Table 1 (one seed,
Adam 3e-4, 100 epochs, best validation epoch); Mnih et al. 2014 (arXiv 1406.6247), Tables 1 and 2, published as error.
"""

from __future__ import annotations

from dataclasses import dataclass

CASE_STUDY = "Fang, Tian and Yang"
MNIH = "Mnih et al. 2014"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published result. Only a RAM has glimpses, a patch size (pixels) and scales."""

    source: str
    task: str
    model: str  # ram, ram-random, cnn, conv or fc: `Config.model`
    accuracy: float  # test, %
    glimpses: int = 0
    patch: int = 0
    scales: int = 0
    hidden: int = 256  # units of the hidden layer or layers; the case study does not give its CNN's
    epoch: int | None = None  # of the best validation accuracy, if published
    first: int | None = None  # place among the first points of a search on this task; None: not among them

    @property
    def label(self) -> str:
        """The row's name in the tables."""
        if self.model == "cnn":
            return "CNN"
        if self.model == "conv":
            return "convolutional, 2 layers"
        if self.model == "fc":
            return f"fully connected, 2 layers of {self.hidden}"
        kind = " random" if self.model == "ram-random" else ""
        plural = "s" if self.scales > 1 else ""
        return f"RAM, {self.glimpses}{kind} glimpses, {self.patch}x{self.patch}, {self.scales} scale{plural}"

    @property
    def short(self) -> str:
        """The row's name in the designs."""
        if self.model == "fc":
            return f"fc {self.hidden}"
        if self.model in ("cnn", "conv"):
            return {"cnn": "CNN"}.get(self.model, self.model)
        if self.model == "ram-random":
            return f"RAM {self.glimpses} random gl"
        return f"RAM {self.glimpses} gl {self.patch}x{self.patch} {self.scales} s"


def _case(
    task: str, accuracy: float, epoch: int, sizes: tuple[int, int, int] | None = None, first: int | None = None
) -> Published:
    glimpses, patch, scales = sizes or (0, 0, 0)
    return Published(
        source=CASE_STUDY, task=task, model="ram" if sizes else "cnn", accuracy=accuracy, glimpses=glimpses,
        patch=patch, scales=scales, epoch=epoch, first=first,
    )  # fmt: skip


def _mnih(
    task: str, error: float, sizes: tuple[int, int, int] = (0, 0, 0), model: str = "ram", hidden: int = 256,
    first: int | None = None,
) -> Published:  # fmt: skip
    glimpses, patch, scales = sizes
    return Published(
        source=MNIH, task=task, model=model, accuracy=round(100 - error, 2), glimpses=glimpses, patch=patch,
        scales=scales, hidden=hidden, first=first,
    )  # fmt: skip


PUBLISHED: tuple[Published, ...] = (
    _case("translated", 96.66, 96),
    _case("translated", 79.98, 57, (6, 8, 2), first=5),
    _case("translated", 81.22, 96, (6, 8, 3), first=4),
    _case("translated", 94.35, 92, (6, 12, 3), first=1),
    _case("translated", 92.52, 63, (8, 12, 3), first=3),
    _case("translated", 96.87, 69, (6, 16, 3), first=2),
    _case("cluttered", 93.50, 96),
    _case("cluttered", 85.65, 72, (6, 12, 3), first=1),
    _case("cluttered", 85.11, 52, (6, 12, 4), first=5),
    _case("cluttered", 86.07, 67, (8, 12, 3), first=3),
    _case("cluttered", 91.26, 95, (6, 16, 3), first=2),
    _case("cluttered", 93.01, 96, (6, 20, 3), first=4),
    _mnih("original", 1.69, model="fc"),
    _mnih("original", 1.21, model="conv"),
    _mnih("original", 3.79, (2, 8, 1), first=3),
    _mnih("original", 1.51, (3, 8, 1)),
    _mnih("original", 1.54, (4, 8, 1), first=2),
    _mnih("original", 1.34, (5, 8, 1)),
    _mnih("original", 1.12, (6, 8, 1), first=1),
    _mnih("original", 1.07, (7, 8, 1)),
    _mnih("translated", 6.42, model="fc", hidden=64),
    _mnih("translated", 2.63, model="fc"),
    _mnih("translated", 1.62, model="conv"),
    _mnih("translated", 1.54, (4, 12, 3)),
    _mnih("translated", 1.22, (6, 12, 3)),
    _mnih("translated", 1.20, (8, 12, 3)),
    _mnih("cluttered", 28.58, model="fc", hidden=64),
    _mnih("cluttered", 11.96, model="fc"),
    _mnih("cluttered", 8.09, model="conv"),
    _mnih("cluttered", 4.96, (4, 12, 3)),
    _mnih("cluttered", 4.08, (6, 12, 3)),
    _mnih("cluttered", 4.04, (8, 12, 3)),
    _mnih("cluttered", 14.4, (8, 12, 3), model="ram-random"),
    _mnih("cluttered-100", 14.35, model="conv"),
    _mnih("cluttered-100", 9.41, (4, 12, 4), first=3),
    _mnih("cluttered-100", 8.31, (6, 12, 4), first=2),
    _mnih("cluttered-100", 8.11, (8, 12, 4), first=1),
)


def published_rows(source: str, tasks: tuple[str, ...] | None = None) -> list[Published]:
    """The rows of one source, of some tasks or of all, in the order of the papers' tables."""
    return [row for row in PUBLISHED if row.source == source and (tasks is None or row.task in tasks)]


def first_points(task: str) -> list[Published]:
    """The published RAMs that a search on a task tries first, in this order."""
    found = [(row.first, row) for row in PUBLISHED if row.task == task and row.first is not None]
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]
