"""Submit the command with its code to a cluster's job server, from a laptop, and follow the job.

The job is the same command without --address. It runs on the cluster's head, with the `ramcore` and `study` of this
working tree on all nodes. It does not need the laptop: you can stop following it and follow it again later. If a job is
running the study, the command follows that job. If the job has ended, a new job continues the study.

This module brings Ray's client. `study.run` imports it after it has set what Ray reads when it is imported.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ramcore.errors import UserError, first_line, say, show
from ramcore.private import without_secrets
from study.cluster import code_folder, no_job_server, wrong_token
from study.flags import DONE, STOPPED, SUBMITTED, Flags, arguments, command, signals_caught, working_tree

_TAG = "ram-study"  # the job's metadata: which study it runs
SPACE_FILE = "space.toml"  # what --space names is sent with the code, under this name
_AGAIN_SECONDS = 5.0  # between two tries of a lost connection
_STOP_SECONDS = "60"  # Ray gives the driver this long to stop; its default is 3


def submit(flags: Flags, address: str) -> int:
    """Submit the command, or find the job that runs its study; follow it; returns the job's exit code.

    The address is that of the job server, without a slash at the end. Raises UserError if the server is not there, or
    refuses the token, or runs this study with other flags.
    """
    try:
        return _submit_or_follow(flags, address)
    except AuthenticationError as error:
        raise UserError(wrong_token(address)) from error


def _submit_or_follow(flags: Flags, address: str) -> int:
    client = _connect(address)
    entrypoint = shlex.join(["python", "-m", "study.run", *arguments(sent(flags))])
    if without_secrets(entrypoint) != entrypoint:  # the cluster shows every job's command
        raise UserError(
            f"a job's command must hold no password; got `{without_secrets(entrypoint)}`: set MLFLOW_TRACKING_URI or "
            "RAM_STORAGE in the environment of the cluster's nodes, and leave the flag out"
        )
    study = study_of(flags)
    only_asks = flags.dry_run or flags.print_space or flags.cancel is not None  # such a job runs no study
    running = None if only_asks else _running(client, study)
    if running is not None and running.entrypoint != entrypoint:
        raise UserError(
            f"a study has one driver at a time; job {running.submission_id} runs {study} as `{running.entrypoint}`: "
            f"repeat that, or stop it with `{_ray_job('stop', address, running.submission_id)}`"
        )
    new_job = f"{re.sub(r'[^A-Za-z0-9-]+', '-', study)}-{time.strftime('%Y%m%d-%H%M%S')}"
    job = (running and running.submission_id) or new_job
    with signals_caught(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, raising=_Left) as left:
        try:
            if running is not None:
                say(f"job {job} is running this study: following it")
            else:
                _submit(client, job, entrypoint, {} if only_asks else {_TAG: study}, flags.space)
                goes_on = "" if only_asks else "; it goes on without this machine"
                say(f"submitted to {address} as job {job}{goes_on}")
            return _follow(client, job)
        except _Left:
            if only_asks:
                client.stop_job(job)
                say("left; the plan is not made" if flags.dry_run else "left; the job is stopped")
            else:
                say(f"left; the job goes on\n  follow it  {command()}")
                say(f"  stop it    {_ray_job('stop', address, job)}")
                say(f"  its state  {_ray_job('status', address, job)}")
            return 128 + left[0]


class _Left(Exception):
    """The user stops following the job: Ctrl-C, SIGTERM, or a closed terminal."""


def study_of(flags: Flags) -> str:
    """What tells the study's job from others: the study's name, or the flags that its name is made of."""
    return flags.study or f"{flags.task or 'default'}-{flags.data}-{flags.design or 'search'}"


def _connect(address: str) -> JobSubmissionClient:
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they set INFO when they are imported
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, ConnectionError, OSError, ValueError, KeyError) as error:
        raise no_job_server(address, f"is not one ({first_line(error)})") from error


def sent(flags: Flags) -> Flags:
    """The flags as the job gets them: the file of the space goes along with the code."""
    return flags if flags.space is None else replace(flags, space=Path(SPACE_FILE))


def _running(client: JobSubmissionClient, study: str) -> JobDetails | None:
    """The newest job that runs the study now."""
    jobs = [j for j in client.list_jobs() if (j.metadata or {}).get(_TAG) == study and not j.status.is_terminal()]
    return max(jobs, key=lambda j: j.start_time or 0, default=None)


def _submit(
    client: JobSubmissionClient, job: str, entrypoint: str, metadata: dict[str, str], space: Path | None
) -> None:
    """Send the command, its code and the file of the space. Raises UserError if the cluster refuses them."""
    commit, dirty = working_tree()
    submitted = json.dumps({"command": command(), "commit": commit, "dirty": dirty})
    variables = {SUBMITTED: submitted, "RAY_JOB_STOP_WAIT_TIME_S": _STOP_SECONDS}
    with code_folder() as folder:
        if space is not None:
            shutil.copy2(space, folder / SPACE_FILE)
        runtime = {"working_dir": str(folder), "env_vars": variables}
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job, metadata=metadata, runtime_env=runtime)
        except (RuntimeError, OSError) as error:
            fact = f"it did not ({first_line(error)})"
            raise UserError(f"the cluster must take the job; {fact}: look at its dashboard and try again") from error


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Print the job's output until it ends; returns its exit code."""
    printed, lost = 0, False  # characters of the log; whether the connection is lost
    while True:
        try:
            details = client.get_job_info(job)
            text = client.get_job_logs(job) or ""
            show(text[printed:], end="")
            printed = max(printed, len(text))
            if details.status.is_terminal():
                return _exit_code(details)
            if lost:
                say("connected again")
            lost = False
            printed = asyncio.run(_tail(client, job, printed))
        except (OSError, RuntimeError, ValueError, aiohttp.ClientError) as error:  # requests' errors are OSErrors
            if "status code 404" in str(error):
                say(f"the cluster does not know job {job} any more; the same command continues: {command()}")
                return STOPPED
            if not lost:
                say(f"no answer ({first_line(error)}); the job goes on, and this waits for it; Ctrl-C leaves")
            lost = True
            time.sleep(_AGAIN_SECONDS)


async def _tail(client: JobSubmissionClient, job: str, printed: int) -> int:
    """Print the log beyond this many characters while it grows; returns the characters printed by then."""
    seen = 0
    async for text in client.tail_job_logs(job):
        show(text[max(0, printed - seen) :], end="")
        seen += len(text)
        printed = max(printed, seen)
    return printed


def _exit_code(details: JobDetails) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return DONE
    if details.status == JobStatus.STOPPED:
        say(f"the job was stopped; the same command continues: {command()}")
        return STOPPED
    if details.driver_exit_code is None:
        why = first_line(ValueError(details.message))
        say(f"error: the job failed ({why}); once that is mended, the same command continues: {command()}")
        return STOPPED
    return int(details.driver_exit_code) % 256


def _ray_job(verb: str, address: str, job: str | None) -> str:
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""  # Ray's default is no token
    return f"{token}ray job {verb} --address {address} {job}"
