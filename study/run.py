"""`python -m study.run`: run a study, or continue it. See `study.flags` for the flags and the exit codes."""

from __future__ import annotations

from ramcore.errors import UserError, entry_point, first_line, say, show

if __name__ == "__main__":
    entry_point("study.run")

import logging
import os
import secrets
import signal
import socket
import sys
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ramcore.private import private_arguments, without_secrets
from study import cluster, ray_folder
from study.flags import DONE, USAGE, Flags, check, parse, stopped
from study.space_flags import space_toml
from study.status import status
from study.storage import Storage

if TYPE_CHECKING:
    from study.prepare import Prepared

_CONNECT_SECONDS = 5.0  # for a job server to answer


def main(flags: Flags) -> int:
    """Run or continue a study; returns the exit code."""
    _configure_logging()
    try:
        check(flags)
        flags = _settled(flags)
        if flags.address is not None and flags.address.startswith(("http://", "https://")):
            return _submit(flags, flags.address.rstrip("/"))
        if flags.money_budget is not None and flags.price_per_hour is None:
            raise UserError("a money budget needs a price; got --money-budget alone: pass --price-per-hour too")
        return _run(flags)
    except UserError as error:
        say(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:
        say("stopped; no trial was started")
        return 128 + signal.SIGINT


def _settled(flags: Flags) -> Flags:
    """The flags, with the environment's values where a flag was left out. Raises UserError."""
    address = None if flags.address in (None, "", "local") else flags.address
    if address is not None and address.startswith("ray://"):
        raise UserError(
            f"--address is a job server, or auto on the cluster itself; got {address}, a Ray client's: forward the "
            "head's port 8265 and pass --address http://127.0.0.1:8265"
        )
    price = flags.price_per_hour
    if price is None:
        price = cluster.number("RAM_PRICE_PER_HOUR") or None
    return replace(flags, address=address, price_per_hour=price)


def _submit(flags: Flags, address: str) -> int:
    """Submit the command to the job server at an address, and follow it. Raises UserError."""
    try:
        server = urllib.parse.urlsplit(address)
        port = server.port or (443 if server.scheme == "https" else 80)
        socket.create_connection((server.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise cluster.no_job_server(address, f"did not answer ({first_line(error)})") from error
    if server.scheme == "http" and server.hostname not in ("127.0.0.1", "localhost", "::1"):
        host = server.hostname
        say(f"warning: the token and the code go to {host} unencrypted; forward its port through SSH instead")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray prefers these to the address that it is given
        os.environ[name] = address
    if os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(Path.home() / ".ray" / "auth_token"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from study.submit import submit  # puts off Ray, which reads the variables above when it is imported

    return submit(flags, address)


def _run(flags: Flags) -> int:
    """Prepare the study, then run it. Raises UserError."""
    with status("starting") as tell:
        Storage.parse(flags.storage).check_writable()
        if flags.address is None:
            ray_folder.check()
        tell("loading PyTorch")
        from study.prepare import RecordLost, prepare  # puts off torch: a refusal need not wait for it

        _quieten()
        try:
            tell("reading the images and the record")
            prepared = prepare(flags)
        except RecordLost as error:
            return stopped(error)
        if flags.cancel is not None:
            return _cancel(flags.cancel, prepared)
        for warning in prepared.warnings:
            say(f"warning: {warning}")
        if flags.print_space and prepared.space is not None:
            return DONE if show(space_toml(prepared.space, prepared.base)) else USAGE
        if flags.address is None:
            _protect_local_ray()
        tell("loading Ray and MLflow")
        from study.driver import run_prepared  # puts off Ray and MLflow

        _quieten()
    try:
        return run_prepared(flags, prepared)
    except RecordLost as error:
        return stopped(error)


def _cancel(number: int, prepared: Prepared) -> int:
    """Ask the driver of the study to end a trial. Raises UserError."""
    from study import cancel  # puts off Optuna and torch

    name = prepared.settings.study
    if prepared.known is None:
        raise UserError(f"--cancel ends a trial of a study that runs; there is no {name}: pass its --study")
    try:
        cancel.ask(prepared.storage, prepared.known, number)
    except OSError as error:
        raise prepared.storage.unreachable(error) from error
    show(f"trial {number:04d} of {name} ends after its next epoch")
    return DONE


def _protect_local_ray() -> None:
    """Keep Ray of this machine on loopback, behind a token of this run: other users reach loopback too."""
    if "ray" in sys.modules:  # Ray reads these variables when it is imported; later they have no effect
        return
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # loopback; the name is from where this is Ray's default
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes, without secrets, to the current sys.stderr, because the live display replaces it."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _configure_logging() -> None:
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s", handlers=[_ToStderr()])
    logging.getLogger("study").setLevel(logging.INFO)
    _quieten()


def _quieten() -> None:
    """Hide the libraries' messages. They set their own levels when they are imported: call this again after that."""
    for noisy in ("alembic", "optuna", "ray"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # it logs the traceback of every error that it raises


def cli() -> None:
    """The console entry point."""
    sys.exit(main(parse(private_arguments())))
