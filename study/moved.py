"""Where tracked data lie: which MLflow is meant, whether a database is its own, and its artifacts after a move.

MLflow stores the absolute path of every artifact. This module needs no MLflow: the analysis uses it, too.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy

from ramcore.errors import UserError
from ramcore.private import without_secrets
from study import schema

_DATABASES = ("mssql", "mysql", "postgresql", "sqlite")  # that MLflow can use
SQLITE = ("sqlite:", "sqlite+")  # how the URIs of its files begin
_PLACES = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


def tracking_uri(given: str | None) -> str:
    """The URI that is given, else that of $MLFLOW_TRACKING_URI, else a SQLite file where `mlflow ui` looks for it."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or schema.DEFAULT_TRACKING_URI


def database_file(uri: str) -> Path | None:
    """The absolute path of a SQLite database; None for a server, another database, or one in memory."""
    if not uri.startswith(SQLITE):
        return None
    name = sqlalchemy.make_url(uri).database
    return None if name in (None, "", ":memory:") else Path(name).absolute()


def check_database(uri: str, *, may_be_empty: bool = False) -> None:
    """Check that a database is MLflow's, because MLflow makes its tables in any database that it opens.

    A SQLite file that was moved follows its artifacts. Nothing is done for a server. Raises UserError if the database
    holds other tables, or none and `may_be_empty` is false; SQLAlchemyError, ImportError.
    """
    if uri.partition(":")[0].partition("+")[0] not in _DATABASES:
        return
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)  # MLflow's own repeats for minutes
    tables = {name for name in sqlalchemy.inspect(engine).get_table_names() if not name.startswith("alembic_")}
    if not {"experiments", "runs"} <= tables and (tables or not may_be_empty):
        fact = f"{without_secrets(uri)} holds {'other' if tables else 'no'} tables"
        raise UserError(f"the tracking database must be MLflow's own; {fact}: pass another --tracking-uri")
    if (path := database_file(uri)) is not None and tables:
        with contextlib.suppress(sqlite3.Error):  # one that cannot be written has its artifacts where they were
            follow_move(path)


def follow_move(database: Path) -> None:
    """Set the artifact paths of the studies in an MLflow SQLite file to where the artifacts are now.

    They are looked for beside the database and in the folders above it, by their old path's last parts. Nothing is
    changed if they are not there, or if the paths are right. Raises sqlite3.Error if the file cannot be used.
    """
    with contextlib.closing(sqlite3.connect(database.absolute().as_uri() + "?mode=rw", uri=True)) as connection:
        query = "select experiment_id, artifact_location from experiments where name = ?"
        row = connection.execute(query, (schema.EXPERIMENT,)).fetchone()
        if row is None or row[1] is None:
            return
        experiment, stored = row
        old = _path(stored)
        if old is None:
            return
        runs = {
            run for (run,) in connection.execute("select run_uuid from runs where experiment_id = ?", (experiment,))
        }
        new = next((folder for folder in _candidates(database.absolute(), old) if _holds(folder, runs)), old)
        if new == old:
            return
        with connection:
            for table, column in _PLACES:
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "
                    f"where {column} = ? or substr({column}, 1, ?) = ?",
                    (str(new), len(stored) + 1, stored, len(stored) + 1, f"{stored}/"),
                )


def _path(place: str) -> Path | None:
    """A stored place as a path; None if it is a URI of something else."""
    if place.startswith("file:"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path))
    return None if ":" in place else Path(place)


def _candidates(database: Path, old: Path) -> Iterator[Path]:
    for folder in database.parents:
        for i in range(1, len(old.parts)):
            yield folder.joinpath(*old.parts[i:])


def _holds(folder: Path, runs: set[str]) -> bool:
    """Whether a folder holds the artifacts of a run."""
    try:
        return not runs.isdisjoint(entry.name for entry in folder.iterdir())
    except OSError:  # no such folder, or one of somebody else
        return False
