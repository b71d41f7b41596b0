"""How much of a study's slot-seconds is training?

    python -m benchmarks.overhead STUDY_FOLDER       # such as runs/translated-mnist-search

Reads the record of a finished study. A slot-second is one second of one slot, between the start of the first trial and
the end of the last. Training is the time of the epochs with their validation, as the trainers measured it. The rest is
starting workers, checkpoints, reports and decisions, and slots without a trial at the end of the study. The last is
printed separately: its share falls with the number of trials.
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
    """The figures of one study, as lines of text."""
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
    slots = slots or max(sum(s <= start < e for s, e in spans) for start, _ in spans)  # the most trials at once
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
