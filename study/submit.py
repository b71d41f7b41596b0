"""From a laptop: hand the command to a cluster's job server, with the code, and follow it.

The job is this very command without --address, run on the cluster's head with the `ramcore` and `study` of this working
tree, on all nodes. It does not need the laptop: whoever follows may leave and come back. A second submission of a study
that is running follows that job instead; once it has ended, it continues the study as a new job.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import socket
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ramcore.errors import UserError
from study.cluster import code_folder, one_line, wrong_token
from study.run import DONE, STOPPED, SUBMITTED, Flags, command, working_tree

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_TAG = "ram-study"  # the job's metadata: which study it runs
_CONNECT_SECONDS = 5.0
_AGAIN_SECONDS = 5.0  # between two tries of a lost connection
_STOP_SECONDS = "60"  # that Ray gives the driver to stop; by itself it gives 3


def submit(flags: Flags) -> int:
    """Submit the command, or find the job that runs its study; follow it; returns the job's exit code.

    Raises:
        UserError: the job server is not there, or does not take us, or runs this study with other flags.
    """
    assert flags.address is not None
    address = flags.address.rstrip("/")
    _prepare_client(address)
    from ray.exceptions import AuthenticationError

    try:
        return _submit_or_follow(flags, address)
    except AuthenticationError as error:
        raise UserError(wrong_token(address)) from error


def _submit_or_follow(flags: Flags, address: str) -> int:
    client = _connect(address)
    entrypoint = shlex.join(["python", "-m", "study.run", *arguments(flags)])
    study = study_of(flags)
    running = None if flags.dry_run else _running(client, study)
    if running is not None and running.entrypoint != entrypoint:
        raise UserError(
            f"a study has one driver at a time; job {running.submission_id} runs {study} as `{running.entrypoint}`: "
            f"repeat that, or stop it with `{_ray_job('stop', address, running.submission_id)}`"
        )
    job = running.submission_id if running else _new_id(study)
    assert job is not None
    with _leaving() as left:
        try:
            if running is None:
                _submit(client, job, entrypoint, {} if flags.dry_run else {_TAG: study})
                goes_on = "" if flags.dry_run else "; it goes on without this machine"
                _say(f"submitted to {address} as job {job}{goes_on}")
            else:
                _say(f"job {job} is running this study: following it")
            return _follow(client, job)
        except _Left:
            if flags.dry_run:
                client.stop_job(job)
                _say("left; the plan is not made")
                return 128 + left[0]
            _say(
                f"left; the job goes on\n  follow it  {command()}\n  stop it    {_ray_job('stop', address, job)}\n"
                f"  its state  {_ray_job('status', address, job)}"
            )
            return 128 + left[0]


def arguments(flags: Flags) -> list[str]:
    """The command line of these flags without the defaults and --address."""
    found: list[str] = []
    for field in dataclasses.fields(Flags):
        value = getattr(flags, field.name)
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name == "address" or value == default:
            continue
        name = f"--{field.name.replace('_', '-')}"
        found += [name] if value is True else [name, str(value)]
    return found


def study_of(flags: Flags) -> str:
    """What names the study: its name, or what its name is made of."""
    return flags.study or f"{flags.task or 'default'}-{flags.data}-{flags.design or 'search'}"


_RULE = "--address must be a Ray cluster's job server"
_FIX = "forward the head's port 8265 (`ray dashboard cluster.yaml`) and try again"


def _prepare_client(address: str) -> None:
    """See that somebody is there, and set what Ray reads when it is imported. Raises UserError."""
    parts = urllib.parse.urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(f"{_RULE}; {address} did not answer ({one_line(error)}): {_FIX}") from error
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        _say(
            f"warning: the token and the code go to {parts.hostname} unencrypted; forward its port through SSH instead"
        )
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # which Ray would prefer to what it is told
        os.environ[name] = address
    if os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _connect(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # set to INFO when they are imported
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, ConnectionError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{_RULE}; {address} is not one ({one_line(error)}): {_FIX}") from error


def _running(client: JobSubmissionClient, study: str) -> JobDetails | None:
    jobs = [j for j in client.list_jobs() if (j.metadata or {}).get(_TAG) == study and not j.status.is_terminal()]
    return max(jobs, key=lambda j: j.start_time or 0, default=None)


def _new_id(study: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9-]+', '-', study)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _submit(client: JobSubmissionClient, job: str, entrypoint: str, metadata: dict[str, str]) -> None:
    commit, dirty = working_tree()
    told = {"command": command(), "commit": commit, "dirty": dirty}
    with code_folder() as folder:
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                metadata=metadata,
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {SUBMITTED: json.dumps(told), "RAY_JOB_STOP_WAIT_TIME_S": _STOP_SECONDS},
                },
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"the cluster must take the job; it did not ({one_line(error)}): look at its dashboard and try again"
            ) from error


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Print what the job prints until it ends; returns its exit code."""
    import aiohttp

    printed, lost = 0, False
    while True:
        try:
            details = client.get_job_info(job)
            ended = details.status.is_terminal()
            printed = _print_new(client, job, printed)
            if ended:
                return _exit_code(details)
            if lost:
                _say("connected again")
            lost = False
            printed = asyncio.run(_tail(client, job, printed))
        except (OSError, RuntimeError, ValueError, aiohttp.ClientError) as error:  # requests' errors are OSErrors
            if "status code 404" in str(error):
                _say(f"the cluster does not know job {job} any more; the same command continues: {command()}")
                return STOPPED
            if not lost:
                _say(f"no answer ({one_line(error)}); the job goes on, and this waits for it; Ctrl-C leaves")
            lost = True
            time.sleep(_AGAIN_SECONDS)


def _print_new(client: JobSubmissionClient, job: str, printed: int) -> int:
    text = client.get_job_logs(job) or ""
    _show(text[printed:])
    return max(printed, len(text))


async def _tail(client: JobSubmissionClient, job: str, printed: int) -> int:
    """Print the log beyond so many characters as it grows; returns the characters printed."""
    seen = 0
    async for text in client.tail_job_logs(job):
        new = text[max(0, printed - seen) :]
        seen += len(text)
        _show(new)
        printed = max(printed, seen)
    return printed


def _exit_code(details: Any) -> int:
    from ray.job_submission import JobStatus

    if details.status == JobStatus.SUCCEEDED:
        return DONE
    if details.status == JobStatus.STOPPED:
        _say(f"the job was stopped; the same command continues: {command()}")
        return STOPPED
    if details.driver_exit_code is None:
        _say(f"error: the job failed ({one_line(ValueError(details.message))}); the same command continues")
        return STOPPED
    return int(details.driver_exit_code) % 256


def _ray_job(verb: str, address: str, job: str | None) -> str:
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""  # not Ray's own default
    return f"{token}ray job {verb} --address {address} {job}"


class _Left(Exception):
    """Whoever followed the job goes."""


@contextmanager
def _leaving() -> Iterator[list[int]]:
    """Ctrl-C, a closed terminal and SIGTERM leave the job; they do not stop it."""
    received: list[int] = []

    def leave(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise _Left

    before = {s: signal.signal(s, leave) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
