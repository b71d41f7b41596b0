"""All steps of CLUSTER.md on own machines: `python -m pytest -m root -s tests/test_launcher_e2e.py`.

The machines are namespaces of this machine (tests/hosts.py): a laptop, a head, three workers and an S3 server. The
laptop launches the cluster, submits a study, loses a worker, gains one, fetches the results and tears down. The first
run installs the project for the machines, which takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts import BRIDGE, HOME, Host, Lab, bake, missing

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent
PROJECT = ("cluster.sh", "pyproject.toml", "constraints.txt", "README.md", "ramcore", "study", "analysis")
S3 = {"AWS_ENDPOINT_URL": f"http://{BRIDGE}:9000", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
YAML = "cluster-local.yaml"
TRIALS, EPOCHS = 20, 6
STUDY = f"--data digits --task original --trials {TRIALS} --epochs {EPOCHS} --seeds-per-trial 1"
NAME = "original-digits-search"
DASHBOARD, MLFLOW = 8265, 5001
RAY = {"gcs_server", "raylet", "python", "ray::DashboardA", "ray::RuntimeEnv"}  # behind Ray's token
CHANGE = 'metrics["code"] = "of the laptop"'
PATIENCE = 900.0  # seconds; on a machine with nothing else to do every step takes under 120

_started = time.monotonic()


def note(text: str) -> None:
    """Print a line of the timeline."""
    print(f"{time.monotonic() - _started:6.1f} s  {text}", flush=True)


def until(what: str, happens: Callable[[], object], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not happens():
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain until {what}"
        time.sleep(0.5)
    note(what)


@pytest.fixture(scope="module")
def image() -> Path:
    """The first content of every machine's home: the installed project. It is kept for the next run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ram-study" / "test-machine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text("metadata: {environment: {}}\n")  # the real one comes with `ray up`
    files: dict[str, Path | str] = {}
    for name in PROJECT:
        path = ROOT / name
        files[f"ram-study/{name}"] = f"{path}/" if path.is_dir() else path
    note("installing the project on the machines' disk")
    bake(folder, files, f"bash {HOME}/ram-study/cluster.sh node")
    return folder


@pytest.fixture(scope="module")
def lab(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if lacking := missing():
        pytest.skip(
            f"needs {', '.join(lacking)}: install openssh-server, openssh-client, rsync, iproute2, util-linux, curl"
        )
    with Lab(tmp_path_factory.mktemp("lab"), image, ("laptop", "head", "one", "two", "three", "alone")) as machines:
        moto = machines.on_bridge([str(Path(sys.executable).with_name("moto_server")), "-H", BRIDGE, "-p", "9000"])
        for name in ("laptop", "head", "one", "two"):
            machines.boot(name)
        note("switched on: laptop, head, workers one and two, S3 server")
        yield machines
        moto.kill()
        moto.wait()


@pytest.fixture(scope="module")
def laptop(lab: Lab) -> Host:
    """The laptop, with a checkout of the project that is edited as CLUSTER.md says."""
    host = lab.hosts["laptop"]
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    pack = subprocess.run(
        ["tar", "-C", ROOT, "--null", "-T", "-", "-c"], input=listed, capture_output=True, check=True
    ).stdout
    subprocess.run([*host.console, "tar -x -C ~/ram-study"], input=pack, check=True)
    host.run("mkdir -p -m 700 ~/.ssh && install -m 600 /run/key ~/.ssh/id_ed25519")
    text = (ROOT / YAML).read_text()
    for mark, value in {
        "@EDIT 192.168.1.10 ": f"{lab.addresses['head']} ",
        "@EDIT [192.168.1.11, 192.168.1.12]": str([lab.addresses[name] for name in ("one", "two", "three")]),
        "@EDIT your-user": "root",
        "@EDIT ~/.ssh/id_ed25519": "~/.ssh/id_ed25519",
        "RAM_STORAGE: @EDIT /shared/ram-study ": "RAM_STORAGE: s3://bucket/ram-study ",
        "RAM_MAX_WORKERS: @EDIT 2": "RAM_MAX_WORKERS: 3",
        "RAM_WORKER_CPUS: @EDIT 8": "RAM_WORKER_CPUS: 1",
        "RAM_WORKER_GPUS: @EDIT 1": "RAM_WORKER_GPUS: 0",
        "RAM_WORKER_GPU_MEMORY: @EDIT 24": "RAM_WORKER_GPU_MEMORY: 24",
        "# AWS_ENDPOINT_URL: http://192.168.1.20:9000": f"AWS_ENDPOINT_URL: {S3['AWS_ENDPOINT_URL']}",
        "# AWS_ACCESS_KEY_ID: ...": f"AWS_ACCESS_KEY_ID: {S3['AWS_ACCESS_KEY_ID']}",
        "# AWS_SECRET_ACCESS_KEY: ...": f"AWS_SECRET_ACCESS_KEY: {S3['AWS_SECRET_ACCESS_KEY']}",
    }.items():
        assert text.count(mark) == 1, mark
        text = text.replace(mark, value)
    subprocess.run([*host.console, f"cat > ~/ram-study/{YAML}"], input=text.encode(), check=True)
    # A change of the code that the machines' installation lacks.
    change = f"sed -i 's/^    def tell(.*$/&\\n        {CHANGE}/' study/trainable.py"
    host.run(f"cd ~/ram-study && {change} && grep -qF '{CHANGE}' study/trainable.py")
    return host


def in_checkout(laptop: Host, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command on the laptop, in the checkout, with .venv activated."""
    run = laptop.run(f"cd ~/ram-study && . .venv/bin/activate && {command}", check=False, timeout=PATIENCE)
    assert not check or run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    return run


@contextmanager
def ports_forwarded(laptop: Host) -> Iterator[None]:
    """Run `ray attach` with the ports of CLUSTER.md in the background."""
    attach = f"cd ~/ram-study && .venv/bin/ray attach {YAML} -p 8265 -p 5001 > ~/attach.log 2>&1"
    tunnel = subprocess.Popen([*laptop.console, attach], stdin=subprocess.PIPE)
    try:
        yield
        tunnel.communicate(b"exit\n", timeout=60)
    finally:
        tunnel.kill()
        tunnel.wait()


def on_head(laptop: Host, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command on the head through `ray exec`."""
    return in_checkout(laptop, f"ray exec {YAML} '{command}'", check=check)


def trains(host: Host) -> bool:
    return any("ray::ImplicitFunc.train" in line for line in host.processes())


def answers(host: Host, port: int, of: str = "127.0.0.1") -> bool:
    """Whether a machine can connect to a port."""
    return not host.run(f"timeout 5 bash -c '</dev/tcp/{of}/{port}'", check=False).returncode


def status(host: Host, url: str, header: str = "Accept: */*", *, method: str = "GET") -> int:
    """The HTTP status that a machine gets; 0 if the answer is not HTTP."""
    request = f"curl -s -m 10 -o /dev/null -w %{{http_code}} -X {method} -H '{header}' '{url}'"
    return int(host.run(request, check=False).stdout)


def refusal(laptop: Host, command: str) -> str:
    """Run a command on the head that must be refused; returns the one line that it prints."""
    run = on_head(laptop, f"cd ram-study && {command}; echo ended with $?")
    assert "ended with 2" in run.stdout, run.stdout
    lines = [line for line in run.stdout.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, run.stdout
    note(f"refused: {lines[0]}")
    return lines[0]


def listeners(host: Host) -> set[tuple[str, str]]:
    """The (address, program) of each listening socket beyond loopback."""
    found = set()
    for line in host.run("ss -Hltnp").stdout.splitlines():
        address, program = line.split()[3], re.findall(r'"([^"]+)"', line)[0]
        if not re.match(r"(127\.|\[::1\]|\[::ffff:127\.)", address):
            found.add((address, program))
    return found


def test_autoscaler_starts_workers_for_trials_and_ends_idle_ones(lab: Lab) -> None:
    """With the autoscaler of the AWS cluster, which here starts its workers as processes of one machine."""
    host = lab.boot("alone")
    head = "f" * 51 + "00000"  # as this provider of Ray's calls it
    node_types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    config = {
        "cluster_name": "alone", "max_workers": 2, "idle_timeout_minutes": 0.2, "upscaling_speed": 4.0,
        "provider": {"type": "fake_multinode", "launch_multiple": True, "head_node_id": head,
                     "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True},
        "available_node_types": node_types, "head_node_type": "ray.head.default", "auth": {}, "docker": {},
        "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    }  # fmt: skip
    # Ray reads the defaults of each provider from a file; its package lacks the file of this one.
    defaults = (
        "$(echo ~/ram-study/.venv/lib/python*/site-packages/ray/autoscaler/_private/fake_multi_node)/example.yaml"
    )
    subprocess.run([*host.console, f"tee ~/alone.json > {defaults}"], input=json.dumps(config).encode(), check=True)
    mode = "cd ~/ram-study && export RAY_AUTH_MODE=disabled PATH=$PWD/.venv/bin:$PATH &&"
    fake = f"RAY_FAKE_CLUSTER=1 RAY_CLOUD_INSTANCE_ID={head} RAY_OVERRIDE_NODE_ID_FOR_TESTING={head}"
    host.run(
        f"{mode} AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_enable_autoscaler_v2=1 {fake} "
        "ray start --head --num-cpus=0 --disable-usage-stats --autoscaling-config=$HOME/alone.json"
    )
    note("a head without workers is up")
    look = "import ray; ray.init(address='auto', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"

    def nodes() -> int:
        return int(host.run(f'{mode} python -c "{look}" 2> /dev/null').stdout.split()[-1])

    assert nodes() == 1
    places = f"--storage {HOME}/runs --tracking-uri sqlite:///{HOME}/mlflow.db"
    growth = "RAY_ADDRESS=auto RAM_MAX_WORKERS=2 RAM_WORKER_CPUS=1"
    study = f"python -m study.run --data digits --task original --seeds-per-trial 1 --trials 6 --epochs 20 {places}"
    most = 0
    with subprocess.Popen([*host.console, f"{mode} {growth} {study} > ~/study.log 2>&1"]) as process:
        while process.poll() is None:
            most = max(most, nodes())
            time.sleep(2)
    log = host.run("cat ~/study.log").stdout
    assert process.returncode == 0, log
    assert "waiting for a worker with 1 CPUs" in log and "0 to be continued, of 6" in log
    assert most == 3
    note("two workers came for six trials")
    until("they have gone again", lambda: nodes() == 1)
    host.power_off()


def test_cluster_of_own_machines_runs_all_steps_of_the_guide(lab: Lab, laptop: Host, tmp_path: Path) -> None:
    head, one, two = (lab.hosts[name] for name in ("head", "one", "two"))
    head.run(
        f"{' '.join(f'{k}={v}' for k, v in S3.items())} ~/ram-study/.venv/bin/python -c "
        '\'import boto3; boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")\''
    )

    # Launch.
    in_checkout(laptop, f"ray up --yes {YAML}")
    note("`ray up` is done")
    until("both workers have joined", lambda: "2.0 CPU" in on_head(laptop, "ray status").stdout)

    # Only the expected ports are open.
    for port in (DASHBOARD, MLFLOW):
        assert answers(head, port) and not answers(laptop, port, of="head")
    for host in (head, one, two):
        found = listeners(host)
        assert {program for _, program in found} <= {"sshd", *RAY}, found
        for address, program in found:
            if program != "sshd":  # includes the agent of each node, which can start jobs
                url = f"http://{host.address}:{address.rpartition(':')[2]}/api/job_agent/jobs/"
                assert not 200 <= status(laptop, url, method="POST") < 300, (address, program)
    assert status(head, f"http://127.0.0.1:{DASHBOARD}/api/jobs/") == 401
    assert status(head, f"http://127.0.0.1:{DASHBOARD}/nodes?view=summary") == 401
    experiments = f"http://127.0.0.1:{MLFLOW}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status(head, experiments) == 200 and status(head, experiments, "Host: evil.example") == 403
    note("without a token or with a forged host, nothing answers")
    for host in (head, one, two):
        modes = host.run("stat -c %a ~/.ray/auth_token ~/.ram-study.env ~/cluster.yaml").stdout.split()
        assert modes == ["600", "600", "600"]

    # Submit through the forwarded port; without the token first.
    with ports_forwarded(laptop):
        until("the ports are forwarded", lambda: answers(laptop, DASHBOARD) and answers(laptop, MLFLOW))
        submit = f"python -m study.run --address http://127.0.0.1:{DASHBOARD} {STUDY}"
        refused = in_checkout(laptop, submit, check=False)
        assert refused.returncode == 2 and "token" in refused.stderr and len(refused.stderr.splitlines()) == 1
        note(f"refused: {refused.stderr.strip()}")
        in_checkout(laptop, f"mkdir -p -m 700 ~/.ray && ray rsync-down {YAML} '~/.ray/auth_token' ~/.ray/auth_token")
        plan = in_checkout(laptop, f"{submit} --dry-run").stdout
        assert "slots" in plan and "s3://bucket/ram-study" in plan, plan
        note(f"the plan: {re.findall('.*slots.*', plan)[0].strip()}")
        job = subprocess.Popen(
            [*laptop.console, f"cd ~/ram-study && . .venv/bin/activate && {submit} > ~/job.log 2>&1"]
        )

        def runs(*hosts: Host) -> bool:
            assert job.poll() is None, laptop.run("cat ~/job.log").stdout
            return all(trains(host) for host in hosts)

        until("trials run on workers one and two", lambda: runs(one, two))
        three = lab.boot("three")
        note("worker three is switched on")
        until("a trial runs on worker three", lambda: runs(three))
        until("a trial runs on worker one", lambda: runs(one))
        one.power_off()
        note("worker one is powered off")
        job.wait(PATIENCE)
        log = laptop.run("cat ~/job.log").stdout
        assert job.returncode == 0, log
        note(f"the study has ended: {re.findall('Study .*', log)}")
        assert "its worker died" in log or "started again" in log, log

        # Nothing is lost: every trial ended once, with every epoch.
        record = tmp_path / "study.db"
        with record.open("wb") as file:
            fetch = (
                'import boto3, sys; boto3.client("s3", region_name="us-east-1")'
                f'.download_fileobj("bucket", "ram-study/{NAME}/study.db", sys.stdout.buffer)'
            )
            subprocess.run([*head.console, f". ~/.ram-study.env; python -c '{fetch}'"], stdout=file, check=True)
        with sqlite3.connect(record) as database:
            rows = database.execute(
                "select t.state, count(distinct v.step), count(*) from trials t join trial_intermediate_values v "
                "using (trial_id) group by t.trial_id"
            ).fetchall()
            epochs = database.execute(
                "select value_json from trial_user_attributes where key like 'epoch %'"
            ).fetchall()
        assert epochs and all('"of the laptop"' in text for (text,) in epochs)
        note("all nodes ran the code of the laptop's working tree")
        assert len(rows) == TRIALS and {state for state, _, _ in rows} <= {"COMPLETE", "PRUNED"}
        assert all(steps == values for _, steps, values in rows)
        assert all(steps == EPOCHS for state, steps, _ in rows if state == "COMPLETE")
        note(f"the record holds {len(rows)} ended trials")

        # MLflow on the head shows it, to the laptop too; the report comes back.
        shown = in_checkout(
            laptop,
            'python -c \'import mlflow; mlflow.set_tracking_uri("http://127.0.0.1:5001"); '
            'print(*mlflow.search_runs(search_all_experiments=True, output_format="pandas").status)\'',
        )
        stopped = sum(state == "PRUNED" for state, _, _ in rows)
        tracked = ["FINISHED"] * (TRIALS + 1 - stopped) + ["KILLED"] * stopped
        assert sorted(shown.stdout.split()) == tracked
        note(f"MLflow shows {TRIALS} trials and their study")
        in_checkout(laptop, "python -m analysis.sensitivity --tracking-uri http://127.0.0.1:5001")
        assert laptop.run("ls ~/ram-study/reports/*/*.html").stdout
        note("the report is on the laptop")

    # On the head itself, without flags about the cluster; first the refusals.
    other = f"python -m study.run {STUDY} --study other --trials 2"
    assert "must be" in refusal(laptop, f"{other} --storage runs")
    assert "nowhere" in refusal(laptop, f"{other} --storage s3://nowhere/ram-study")
    packages = f"cd {HOME}/ram-study/.venv/lib/python*/site-packages"
    two.run(f"{packages} && sed -i.was 's/^Version: .*/Version: 1.0/' torch-*.dist-info/METADATA")
    assert "torch 1.0" in refusal(laptop, other)
    two.run(f"{packages} && (cd torch-*.dist-info && mv METADATA.was METADATA) && mv torch torch-away")
    assert "lacks" in refusal(laptop, other)
    two.run(f"{packages} && mv torch-away torch")
    done = on_head(laptop, f"cd ram-study && {other}")
    assert "2 trials finished" in done.stdout
    note("a second study was run from the head")

    # The head is lost; another one takes its place, and the same command continues.
    head.power_off()
    note("the head is powered off")
    in_checkout(laptop, f"ray down --yes {YAML}")
    head = lab.boot("head")
    in_checkout(laptop, f"ray up --yes {YAML}")
    note("another head is up")
    again = on_head(laptop, f"cd ram-study && python -m study.run {STUDY}")
    assert "0 to be continued" in again.stdout, again.stdout
    runs_again = "import mlflow; print(*mlflow.search_runs(search_all_experiments=True).status)"
    words = on_head(laptop, f'python -c "{runs_again}"').stdout.split()
    assert sorted(word for word in words if word in ("FINISHED", "KILLED")) == tracked
    note("the same command fills the new head's MLflow from the record")

    # Tear down.
    in_checkout(laptop, f"ray down --yes {YAML}")
    note("`ray down` is done")

    def left() -> list[str]:
        basic = r"bash (-c|--login)|sshd|sleep|ps "
        return [line for host in (head, two, three) for line in host.processes() if not re.match(basic, line)]

    until("nothing of Ray and MLflow is left on any machine", lambda: not left(), 300)
