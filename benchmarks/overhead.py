"""How much of a study's slot-seconds is training?

    python -m benchmarks.overhead STUDY_FOLDER       # such as runs/translated-mnist-search

Reads a finished study's record. A slot-second is a second of one slot, from the first trial's start to the last one's
end; training is what the trainers themselves measured (an epoch with its validation). What is missing to 100%:
starting workers, checkpoints, reports, decisions, and slots that stay empty at the end because no trial is left to
start. The latter is printed on its own: it shrinks with the number of trials.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import optuna


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description="How much of a study is training?")
    parser.add_argument("study", type=Path, help="folder of a study, with its study.db")
    parser.add_argument("--slots", type=int, help="trials at a time (default: the most that ran at once)")
    flags = parser.parse_args()
    print("\n".join(overhead(flags.study / "study.db", flags.slots)))


def overhead(path: Path, slots: int | None) -> list[str]:
    """The figures of one study, in words."""
    name = optuna.get_all_study_names(f"sqlite:///{path}")[0]
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{path}")
    spans: list[tuple[float, float]] = []
    training = 0.0
    beyond: list[float] = []
    for trial in study.get_trials():
        attrs = trial.user_attrs
        if "end" not in attrs:
            continue
        start, end = attrs["started"] / 1000, attrs["end"]["time"] / 1000
        trained = sum(v["metrics"]["seconds"] for k, v in attrs.items() if k.startswith("epoch "))
        spans.append((start, end))
        training += trained
        beyond.append(end - start - trained)
    # Running at once, counted at each start.
    most = max(sum(s <= start < e for s, e in spans) for start, _ in spans)
    slots = slots or most
    first, last = min(s for s, _ in spans), max(e for _, e in spans)
    busy = sum(e - s for s, e in spans)
    total = slots * (last - first)
    beyond.sort()
    return [
        f"{name}: {len(spans)} trials in {slots} slots over {last - first:.0f} s = {total:.0f} slot-seconds",
        f"training            {training:8.0f} s  {training / total:6.1%}",
        f"trials, not training{busy - training:8.0f} s  {(busy - training) / total:6.1%}",
        f"slots without trial {total - busy:8.0f} s  {(total - busy) / total:6.1%}",
        f"a trial beyond its training: median {statistics.median(beyond):.2f} s, "
        f"95% {beyond[int(0.95 * (len(beyond) - 1))]:.2f} s (the first of each slot starts its worker)",
    ]


if __name__ == "__main__":
    main()
