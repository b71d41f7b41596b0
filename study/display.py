"""The study's progress on the screen: in a terminal a live part below the lines of the trials that have ended; else
these lines, and one each minute.

All of it goes to stderr.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from study.designs import STOPPABLE
from study.record import TrialRecord, best_trial
from study.status import console, is_live

_SHOWN_RUNNING = 8  # rows of running trials at most
_QUIET = 60.0  # seconds between plain lines, at most, while epochs are reported
_STOPPING = "stopping; what is trained stays, to be continued (Ctrl-C again: at once)"
_FULL_SPREAD = (0.8, 1.25)  # factors of an epoch's time, while fewer than four trials have been timed


def accuracies(trial: TrialRecord) -> tuple[float, ...]:
    """Validation accuracy of each seed after the newest epoch."""
    return tuple(trial.epochs[-1].metrics["val_accuracy"]) if trial.epochs else ()


def percent(values: tuple[float, ...]) -> str:
    """'96.12 +- 0.31 %': mean and standard deviation over seeds, of fractions."""
    if not values:
        return "-"
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} +- {100 * statistics.stdev(values):.2f} %" if len(values) > 1 else f"{mean} %"


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_left(
    trials: list[TrialRecord], origins: Sequence[str], epochs: int, slots: int, timed: Sequence[float] = ()
) -> tuple[float, float] | None:
    """Seconds until the study ends, as a range; None before the first epoch.

    Lower end: a trial that may be stopped early trains as many epochs as such trials did on average so far (a quarter
    of all epochs until one has ended), and an epoch takes the first quartile of the trials' times.
    Upper end: no trial is stopped early, and an epoch takes the third quartile.

    Args:
        trials: all so far.
        origins: of all trials of the study, by number.
        epochs: of a trial that is not stopped early.
        slots: trials at a time.
        timed: seconds of an epoch of some configurations, if no trial has an epoch yet.
    """
    seconds = list(timed) or sorted(
        statistics.fmean(e.metrics["seconds"] for e in t.epochs) for t in trials if t.epochs
    )
    if not seconds:
        return None
    if len(seconds) >= 4:
        quick, _, slow = statistics.quantiles(seconds, n=4)
    else:
        quick, slow = (factor * statistics.fmean(seconds) for factor in _FULL_SPREAD)
    ended = [len(t.epochs) for t in trials if t.spec.origin in STOPPABLE and t.state != "running"]
    short = statistics.fmean(ended) if ended else epochs / 4
    done = {t.number: t for t in trials}
    expected, most = [0.0], [0.0]  # epochs of each trial that is left
    for number, origin in enumerate(origins):
        trial = done.get(number)
        if trial is None or trial.state == "running":
            trained = len(trial.epochs) if trial else 0
            most.append(epochs - trained)
            expected.append(max(short - trained, 0.0) if origin in STOPPABLE else epochs - trained)
    # The study takes at least as long as its longest remaining trial.
    low, high = (max(sum(left) / slots, *left) for left in (expected, most))
    return low * quick, high * slow


class Display:
    """Shows what the scheduler reports; see `study.scheduler.Callback`."""

    def __init__(self, *, study: str, epochs: int, device: str = "CPU") -> None:
        self.study = study
        self.device = device  # in words
        self.epochs = epochs
        self.slots = 1  # trials at a time
        self.origins: Sequence[str] = ()  # of all trials of the study
        self.outage: Callable[[], str | None] = lambda: None  # why tracking is behind; None: it is not
        self._trials: dict[int, TrialRecord] = {}
        self._recent: deque[float] = deque(maxlen=200)  # when the last epochs were reported
        self._doing = ""  # instead of training
        self._stopping = False  # since a signal
        self._console = console()
        self._live: Live | None = None
        self._began = self._last_said = time.monotonic()

    def __enter__(self) -> Self:
        if is_live(self._console):
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def resume(self, trials: list[TrialRecord], origins: Sequence[str]) -> None:
        """Begin with the trials of the record and the origins of all trials of the study."""
        self.origins = origins
        self._trials = {t.number: t for t in trials}

    def doing(self, text: str) -> None:
        """Show what is done instead of training, until the next call or the next epoch."""
        self._doing = text
        if self._live is None and not self._stopping:
            self.note(text)

    def interrupted(self) -> None:
        """Answer a first signal at once. Called by its handler, in which nothing else may print."""
        self._stopping = True
        if self._live is None:
            with suppress(OSError):
                os.write(2, f"{_STOPPING}\n".encode())

    def started(self, trial: TrialRecord) -> None:
        """A trial starts on a worker."""
        self._trials[trial.number] = trial

    def reported(self, trial: TrialRecord) -> None:
        """A trial has a new epoch."""
        now = time.monotonic()
        self._recent.append(now)
        self._doing = ""
        is_first = sum(len(t.epochs) for t in self._trials.values()) == 1
        if self._live is None and (is_first or now - self._last_said >= _QUIET):
            state = f"{_epoch(trial)}, {percent(accuracies(trial))}"
            self.note(f"{self._count()} {_named(trial)}: {state}; best {self._best()}{self._left('; ')}")

    def ended(self, trial: TrialRecord) -> None:
        """A trial has ended."""
        took = duration(sum(e.metrics["seconds"] for e in trial.epochs))
        result = percent(accuracies(trial))
        if trial.state == "failed":
            result = f"failed, {trial.reason}"
        elif trial.state == "pruned":
            result += f", stopped at epoch {len(trial.epochs)} after {took}"
        else:
            result += f" in {took}"
        line = f"{self._count()} {_named(trial)}: {result}"
        if (best := best_trial(list(self._trials.values()))) and best.number == trial.number:
            line += ", best so far"
        elif self._live is None:
            line += f"; best {self._best()}"
        self.note(line + ("" if self._live else self._left("; ")))

    def note(self, text: str) -> None:
        """Show a line that stays: on a terminal above the live part, wrapped at words."""
        self._last_said = time.monotonic()
        if self._live is not None:
            self._console.print(Text(text))
        else:
            print(text, file=sys.stderr, flush=True)

    def _count(self) -> str:
        """'[3/40] 12 min,': trials that have ended, of all trials of the study, and since when this run works."""
        ended = sum(t.state != "running" for t in self._trials.values())
        return f"[{ended}/{len(self.origins)}] {duration(time.monotonic() - self._began)},"

    def _best(self) -> str:
        """The best complete trial; before there is one, the running trial that leads."""
        trials = list(self._trials.values())
        if best := best_trial(trials):
            return f"{percent(accuracies(best))}, {_named(best)}"
        leads = max((t for t in trials if t.epochs), key=lambda t: t.epochs[-1].value, default=None)
        return f"so far {percent(accuracies(leads))}, {_named(leads)}, {_epoch(leads)}" if leads else "-"

    def _left(self, before: str) -> str:
        left = time_left(list(self._trials.values()), self.origins, self.epochs, self.slots)
        if left is None or left[1] <= 0:
            return ""
        low, high = map(duration, left)
        return f"{before}{low} left" if low == high else f"{before}{low} to {high} left"

    def _render(self) -> RenderableType:
        trials = list(self._trials.values())
        states = [t.state for t in trials]
        running = [t for t in trials if t.state == "running"]
        ended, total = len(trials) - len(running), len(self.origins)
        counts = f"{states.count('complete')} finished, {states.count('pruned')} stopped early"
        counts += f", {states.count('failed')} failed; {len(running)} running"
        now = time.monotonic()
        recent = [t for t in list(self._recent) if now - t < 60]  # list: the driver thread appends meanwhile
        rate = f", {len(recent) / max(now - recent[0], 1):.2f} epochs/s" if len(recent) > 1 else ""
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(self.study, style="bold"), ProgressBar(total=total, completed=ended, width=30))
        lines = [
            f"trials  {ended} of {total} ended: {counts}",
            f"device  {self.device}",
            f"best    {self._best()}",
            f"time    {duration(now - self._began)}{rate}{self._left(', ')}",
        ]
        rows = Table.grid(padding=(0, 2))
        for trial in running[:_SHOWN_RUNNING]:
            name = trial.spec.row or trial.spec.origin
            rows.add_row(f"  {trial.number:04d}", name, _epoch(trial), percent(accuracies(trial)))
        if len(running) > _SHOWN_RUNNING:
            rows.add_row("", f"and {len(running) - _SHOWN_RUNNING} more")
        outage = self.outage()
        asides = [
            _STOPPING if self._stopping else self._doing,
            f"tracking is behind ({outage}); training goes on" if outage else "",
        ]
        return Group(head, *map(Text, lines), rows, *(Text(aside, style="yellow") for aside in asides if aside))


def _epoch(trial: TrialRecord) -> str:
    return f"epoch {len(trial.epochs)}/{trial.spec.config.epochs}"


def _named(trial: TrialRecord) -> str:
    """'trial 0003 sobol'; with its row where it has one."""
    return f"trial {trial.number:04d} {trial.spec.origin} {trial.spec.row}".rstrip()
