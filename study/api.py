"""Studies from Python: `run_study`, for scripts and notebooks."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pandas as pd

from ramcore.config import Config, nearest
from ramcore.errors import UserError
from study.best import conclude
from study.flags import USAGE, Flags, arguments, check, flag_of
from study.prepare import Prepared, held_out, prepare, stored_study
from study.record import TrialRecord
from study.storage import Storage

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A study as it is after a run."""

    study: str
    best: Config | None  # None while no trial is complete
    best_trial: int | None
    against_default: str  # how the best compares with the default, in words; empty if that was not trained
    trials: pd.DataFrame  # see `_table`
    record: Path  # Optuna's storage
    exit_code: int  # as README.md lists them: 0 done, 3 done with failed trials, 75 or 130 stopped, ...


def run_study(**flags: Any) -> StudyResult:
    """Run a study, or continue it, as `python -m study.run` does, and print its progress.

    The study has a process of its own, because Ray ends a driver whose cluster died. So this works in a notebook, in a
    thread and under a running event loop. An interrupt (Ctrl-C) stops the study; the same call continues it.

    Args:
        flags: those of the command, by name: run_study(data="digits", task="original", trials=8).

    Raises UserError if the flags, the data, the storage or MLflow cannot be used: nothing was started.
    """
    asked = _flags(flags)
    check(asked)
    Storage.parse(asked.storage).check_writable()
    for name in ("address", "dry_run", "print_space"):
        if getattr(asked, name) not in (None, False, "local"):
            raise UserError(f"run_study trains on this machine; got {name}: use python -m study.run for that")
    prepared = prepare(asked)
    code, last = _run([sys.executable, "-m", "study.run", *arguments(asked)])
    known = stored_study(prepared.storage, prepared.settings.study)
    if code == USAGE or known is None:
        raise UserError(last.removeprefix("error: "))
    return _result(prepared, known.trials, code)


def _flags(asked: dict[str, Any]) -> Flags:
    """The flags of these names and values; a single text may stand for several. Raises UserError."""
    kinds, given = get_type_hints(Flags), {}
    for name, value in asked.items():
        if name not in kinds:
            raise UserError(f"run_study takes the flags of study.run by name; got {name}{nearest(name, kinds)}")
        if get_origin(kinds[name]) is tuple:
            value = (value,) if isinstance(value, str) else tuple(value)
        else:
            allowed = get_args(kinds[name]) or (kinds[name],)
            wider = {float: (int, float), Path: (str, Path)}
            fits = isinstance(value, tuple(kind for one in allowed for kind in wider.get(one, (one,))))
            if not fits or (isinstance(value, bool) and bool not in allowed):
                rule = " or ".join(kind.__name__ for kind in allowed).replace("NoneType", "None")
                raise UserError(f"{flag_of(name)} must be of type {rule}; got {value!r}: pass another value")
            value = Path(value) if isinstance(value, str) and Path in allowed else value
        given[name] = value
    return Flags(**given)


def _run(line: list[str]) -> tuple[int, str]:
    """Run a command and print its output as it comes; returns its exit code and its last line.

    An interrupt is passed on; then the output is read to its end.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    last = ""
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C reaches it once, from here
    ) as process:
        assert process.stdout is not None
        while True:
            try:
                if not (read := process.stdout.readline()):
                    break
                last = read.rstrip("\n")
                print(last, flush=True)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
            except BaseException:  # nobody reads on: end as after an interrupt, which loses nothing
                process.send_signal(signal.SIGTERM)
                raise
    return process.returncode, last


def _result(prepared: Prepared, trials: list[TrialRecord], code: int) -> StudyResult:
    outcome = conclude(trials, prepared.settings, held_out(prepared.storage, prepared.settings))
    return StudyResult(
        study=prepared.settings.study,
        best=outcome and outcome.best.spec.config,
        best_trial=outcome and outcome.best.number,
        against_default=outcome.against_default if outcome else "",
        trials=_table(trials),
        record=prepared.record_path,
        exit_code=code,
    )


def _table(trials: list[TrialRecord]) -> pd.DataFrame:
    """One row a trial, with the analysis' names: origin, row, state, stop_reason, seeds, epochs_seen, val_accuracy
    (fraction, mean over seeds after the last epoch), test_accuracy, and every field of `Config`.
    """
    rows = [
        {
            "trial": trial.number,
            "origin": trial.spec.origin,
            "row": trial.spec.row,
            "state": trial.state,
            "stop_reason": trial.reason,
            "seeds": trial.spec.seeds,
            "epochs_seen": len(trial.epochs),
            "val_accuracy": trial.epochs[-1].value if trial.epochs else float("nan"),
            "test_accuracy": statistics.fmean(trial.test["accuracy"]) if trial.test else float("nan"),
            **asdict(trial.spec.config),
        }
        for trial in trials
    ]
    return pd.DataFrame(rows).set_index("trial") if rows else pd.DataFrame()
