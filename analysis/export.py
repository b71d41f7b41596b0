"""python -m analysis.export: a study's records as text files, to keep in version control or to read without MLflow.

`python -m analysis.sensitivity --records FOLDER` and `python -m analysis.paper --records FOLDER` read them again.
"""

from __future__ import annotations

from ramcore.errors import entry_point, parsed, show

if __name__ == "__main__":
    entry_point("analysis.export")

from dataclasses import dataclass
from pathlib import Path

import tyro

from analysis import load
from ramcore.private import private_arguments
from study.moved import tracking_uri


@dataclass(frozen=True, kw_only=True)
class Args:
    """Write the records of studies as text."""

    study: str | None = None
    """Name of the study; the newest one if left out."""
    tracking_uri: str | None = None
    """MLflow tracking server; $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db, if left out."""
    out: Path = Path("results/records")
    """Folder of all exported studies; each gets a folder of its own in it."""


def main(args: Args) -> int:
    """Read and write. Gives 0, or 2 after a one-line message."""
    return load.exit_code("records", lambda: _export(args))


def _export(args: Args) -> None:
    client = load.connect(tracking_uri(args.tracking_uri))
    study = load.find_study(load.list_studies(client), args.study)
    records = load.load_study(client, study, load.progress_line(f"reading {study.name}"))
    show(str(load.Exported.write_to(args.out, records)))


def cli() -> int:
    """Entry point."""
    load.quieten()
    arguments = private_arguments()
    return main(parsed(lambda: tyro.cli(Args, args=arguments, description=__doc__)))
