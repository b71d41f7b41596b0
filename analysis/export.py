"""python -m analysis.export: a study's records as text files, to keep in version control or to read without MLflow.

`python -m analysis.sensitivity --records FOLDER` and `python -m analysis.paper --records FOLDER` read them again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from analysis.load import Exported, connect, find_study, list_studies, load_study, progress_line, quieten, tracking_uri
from ramcore.errors import UserError


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
    try:
        client = connect(tracking_uri(args.tracking_uri))
        study = find_study(list_studies(client), args.study)
        records = load_study(client, study, progress_line(f"reading {study.name}"))
        print(Exported.write_to(args.out, records))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the records must be writable; {error}. Choose another folder with --out", file=sys.stderr)
        return 2
    return 0


def cli() -> int:
    """Entry point."""
    quieten()
    return main(tyro.cli(Args, description=__doc__))


if __name__ == "__main__":
    sys.exit(cli())
