"""Tests of cluster.yaml, cluster-local.yaml, aws-stack.yaml and kuberay.yaml that need one machine and no cloud.

test_launcher_e2e.py tests them on several machines.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import jsonschema
import kubernetes_validate
import pytest
import requests
import yaml
from clusters import free_port
from fake_mps import PROGRAM, daemons
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).with_name("ray")
YAML = ["cluster.yaml", "cluster-local.yaml"]
MARK = "@EDIT "
KUBERNETES = "1.34"  # the version of the schema that pods are checked against


def edited(name: str, **values: str) -> str:
    """A file after editing: without the marks, and with the given values by key, else the examples."""
    text = (ROOT / name).read_text()
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^( *{key}: (?:&\w+ )?){MARK}\S+", rf"\g<1>{value}", text)
        assert count == 1, key
    return text.replace(MARK, "")


def config(name: str) -> dict:
    return prepare_config(yaml.safe_load(edited(name)))


def marks(name: str) -> list[int]:
    return [m.start() for m in re.finditer(MARK, (ROOT / name).read_text())]


@pytest.mark.parametrize("name", YAML)
def test_edited_file_passes_rays_validation(name):
    validate_config(config(name))


@pytest.mark.parametrize("name", [*YAML, "kuberay.yaml"])
def test_mark_that_is_left_is_a_yaml_error(name):
    text = (ROOT / name).read_text()
    assert marks(name)
    for mark in marks(name):
        left = text[:mark].replace(MARK, "") + MARK + text[mark + len(MARK) :].replace(MARK, "")
        with pytest.raises(yaml.scanner.ScannerError, match=MARK):
            yaml.safe_load(left)


@pytest.mark.parametrize("name", YAML)
def test_ray_up_with_a_mark_left_names_its_line_and_starts_nothing(name, tmp_path):
    last = marks(name)[-1]
    text = (ROOT / name).read_text()
    (tmp_path / name).write_text(text[:last].replace(MARK, "") + text[last:])
    run = ray("up", "--yes", str(tmp_path / name), home=tmp_path)
    assert run.returncode == 1
    line = text[:last].count("\n") + 1
    assert f"line {line}, column" in run.stdout + run.stderr
    assert MARK in run.stdout + run.stderr
    assert not (tmp_path / "ssh.log").exists()


@pytest.mark.parametrize("name", YAML)
def test_marks_stand_above_the_cluster_name(name):
    text = (ROOT / name).read_text()
    assert all(mark < text.index("\ncluster_name:") for mark in marks(name))


def test_head_has_no_cpus_and_workers_are_spot_machines_that_end_when_idle():
    read = config("cluster.yaml")
    head, worker = (read["available_node_types"][kind] for kind in ("head", "worker"))
    assert read["head_node_type"] == "head" and head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    environment = read["metadata"]["environment"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] == read["max_workers"] == environment["RAM_MAX_WORKERS"]
    assert worker["resources"] == {"CPU": environment["RAM_WORKER_CPUS"], "GPU": environment["RAM_WORKER_GPUS"]}
    assert 0 < read["idle_timeout_minutes"] <= 15
    assert read["provider"]["cache_stopped_nodes"] is False


def test_worker_that_never_joins_or_loses_its_head_shuts_down():
    read = config("cluster.yaml")
    worker = read["available_node_types"]["worker"]["node_config"]
    assert worker["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert worker["UserData"].splitlines() == ["#!/bin/sh", "shutdown +60"]
    *_, called_off, watched = read["worker_start_ray_commands"]
    assert "shutdown -c" in called_off and "cluster.sh watch sudo shutdown now" in watched


def test_aws_machines_have_role_image_and_closed_firewall():
    for kind, node in config("cluster.yaml")["available_node_types"].items():
        assert node["node_config"]["IamInstanceProfile"] == {"Name": f"ram-study-{kind}"}
        assert node["node_config"]["ImageId"].startswith("ami-")
        assert node["node_config"]["SecurityGroupIds"][0].startswith("sg-")  # else Ray makes one, open to everybody
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


@pytest.mark.parametrize("name", YAML)
def test_servers_are_bound_to_loopback_and_the_token_is_distributed(name):
    read = config(name)
    start = " ".join(read["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "cluster.sh mlflow" in start
    assert read["cluster_synced_files"] == ["~/.ray/auth_token"]
    assert "0.0.0.0" not in (ROOT / name).read_text() + (ROOT / "cluster.sh").read_text()
    script = (ROOT / "cluster.sh").read_text()
    assert "RAY_AUTH_MODE=token" in script and "--host 127.0.0.1" in script and "--allowed-hosts" in script


@pytest.mark.parametrize("name", YAML)
def test_file_mounts_hold_the_whole_project(name):
    mounts = config(name)["file_mounts"]
    assert mounts["~/cluster.yaml"] == name
    sent = {path for path in mounts.values() if path != name}
    packages = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packages is not None
    assert sent >= {"cluster.sh", "pyproject.toml", "constraints.txt", "README.md", *json.loads(packages[1])}
    for path in sent:
        assert (ROOT / path).exists() and mounts[f"~/ram-study/{path}"] == path


def test_both_files_prepare_their_nodes_alike():
    aws, local = config("cluster.yaml"), config("cluster-local.yaml")
    for key in ("setup_commands", "head_setup_commands", "cluster_synced_files", "rsync_exclude"):
        assert aws[key] == local[key], key


# KubeRay's types (RayJobSpec, RayClusterSpec and their parts, as of 1.5.1). Pods are Kubernetes' type, checked
# against its own schema.
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def _fields(required: tuple[str, ...], **properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_RAY_CLUSTER = _fields(
    ("headGroupSpec",),
    rayVersion={"type": "string"},
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions={"type": "object"},
    authOptions=_fields((), mode={"enum": ["disabled", "token"]}),
    gcsFaultToleranceOptions={"type": "object"},
    headServiceAnnotations=_STRINGS,
    managedBy={"type": "string"},
    suspend={"type": "boolean"},
    upgradeStrategy={"type": "object"},
    headGroupSpec=_fields(
        ("template",),
        template={"type": "object"},
        rayStartParams=_STRINGS,
        serviceType={"type": "string"},
        headService={"type": "object"},
        enableIngress={"type": "boolean"},
        labels=_STRINGS,
        resources=_STRINGS,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _fields(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            groupName={"type": "string"},
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            numOfHosts=_COUNT,
            idleTimeoutSeconds=_COUNT,
            suspend={"type": "boolean"},
            scaleStrategy={"type": "object"},
            rayStartParams=_STRINGS,
            template={"type": "object"},
            labels=_STRINGS,
            resources=_STRINGS,
        ),
    },
)
_RAY_JOB = _fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object", "required": ["name"]},
    spec=_fields(
        (),
        activeDeadlineSeconds=_COUNT,
        backoffLimit=_COUNT,
        clusterSelector=_STRINGS,
        deletionStrategy={"type": "object"},
        entrypoint={"type": "string"},
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources={"type": "string"},
        jobId={"type": "string"},
        managedBy={"type": "string"},
        metadata=_STRINGS,
        rayClusterSpec=_RAY_CLUSTER,
        runtimeEnvYAML={"type": "string"},
        shutdownAfterJobFinishes={"type": "boolean"},
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        submitterConfig={"type": "object"},
        submitterPodTemplate={"type": "object"},
        suspend={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
    ),
)


def test_kubernetes_manifest_passes_its_schema():
    job = yaml.safe_load(edited("kuberay.yaml"))
    jsonschema.validate(job, _RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"].keys() <= {"metadata", "spec"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        # The schema does not say it, but Kubernetes refuses GPUs whose request differs from their limit.
        for container in pod["spec"]["containers"]:
            limits, requests = (container["resources"][kind].get("nvidia.com/gpu") for kind in ("limits", "requests"))
            assert limits == requests


@pytest.mark.parametrize(
    ("at", "wrong"),
    [
        ("entrypoint: ", "entrypont: "),
        ("minReplicas: 0", "minReplicas: none"),
        ('num-cpus: "0"', "num-cpus: 0"),
        ("mode: token", "mode: password"),
    ],
)
def test_wrong_kubernetes_manifest_fails_the_schema(at, wrong):
    text = edited("kuberay.yaml")
    assert text.count(at) == 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text.replace(at, wrong)), _RAY_JOB)


def test_kubernetes_environment_agrees_with_its_workers():
    cluster = yaml.safe_load(edited("kuberay.yaml"))["spec"]["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert head["template"]["spec"]["containers"][0]["env"] == container["env"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert environment["RAM_MAX_WORKERS"] == str(workers["maxReplicas"])
    assert environment["RAM_WORKER_CPUS"] == container["resources"]["limits"]["cpu"]
    assert environment["RAM_WORKER_GPUS"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert cluster["rayVersion"] == re.findall(r"(?m)^ray(?:\[.*\])?==(\S+)", (ROOT / "constraints.txt").read_text())[0]


# The same against a mock of AWS.


@pytest.fixture(scope="module")
def aws():
    """A mock of AWS's API on loopback; yields a function that makes clients."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        yield boto3.client
        server.stop()


@pytest.fixture(scope="module")
def stack(aws) -> dict[str, str]:
    """The outputs of aws-stack.yaml, made as CLUSTER.md says."""
    template = (ROOT / "aws-stack.yaml").read_text()
    # The mock does not know this image.
    default = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
    assert default in template
    template = template.replace(default, "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64")
    client = aws("cloudformation")
    client.create_stack(
        StackName="ram-study",
        TemplateBody=template,
        Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": "203.0.113.7/32"}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    made = client.describe_stacks(StackName="ram-study")["Stacks"][0]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    return {output["OutputKey"]: output["OutputValue"] for output in made["Outputs"]}


def test_stack_is_a_valid_template():
    run = subprocess.run(
        [Path(sys.executable).with_name("cfn-lint"), "--regions", "eu-central-1", "--", ROOT / "aws-stack.yaml"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    events = yaml.parse((ROOT / "aws-stack.yaml").read_text())
    assert not any(isinstance(event, yaml.AliasEvent) for event in events)  # CloudFormation does not support aliases


def test_stack_firewall_lets_in_only_ssh_from_one_network(aws, stack):
    group = aws("ec2").describe_security_groups(GroupIds=[stack["SecurityGroup"]])["SecurityGroups"][0]
    open_to_networks = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [(r["FromPort"], r["ToPort"], r["IpRanges"][0]["CidrIp"]) for r in open_to_networks] == [
        (22, 22, "203.0.113.7/32")
    ]
    others = [rule for rule in group["IpPermissions"] if rule not in open_to_networks]
    assert [pair["GroupId"] for rule in others for pair in rule["UserIdGroupPairs"]] == [stack["SecurityGroup"]]


def test_worker_role_may_use_only_the_bucket(aws, stack):
    iam = aws("iam")
    bucket = stack["Storage"].removeprefix("s3://").partition("/")[0]
    role = iam.get_instance_profile(InstanceProfileName="ram-study-worker")["InstanceProfile"]["Roles"][0]
    assert iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"] == []
    policies = iam.list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
    assert [policy["PolicyName"] for policy in policies] == ["ram-study-storage"]
    version = iam.get_policy_version(PolicyArn=policies[0]["PolicyArn"], VersionId="v1")["PolicyVersion"]
    statements = version["Document"]["Statement"]
    assert {s["Resource"] for s in statements} == {f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"}
    assert all(action.startswith("s3:") for s in statements for action in s["Action"])


def test_policies_can_tag_or_end_only_the_clusters_machines(aws, stack):
    iam = aws("iam")
    launcher = next(p for p in iam.list_policies(Scope="Local")["Policies"] if p["PolicyName"] == "ram-study-launcher")
    documents = [
        iam.get_role_policy(RoleName="ram-study-head", PolicyName="workers")["PolicyDocument"],
        iam.get_policy_version(PolicyArn=launcher["Arn"], VersionId="v1")["PolicyVersion"]["Document"],
    ]
    mine = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "ram-study"}}
    new = {"StringEquals": {"ec2:CreateAction": "RunInstances"}}
    for document in (yaml.safe_load(d) if isinstance(d, str) else d for d in documents):
        conditions: dict[str, list[dict]] = {}
        for statement in document["Statement"]:
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            for action in actions:
                conditions.setdefault(action, []).append(statement.get("Condition"))
                assert not action.startswith("iam:PassRole") or "*" not in statement["Resource"]
        assert conditions["ec2:TerminateInstances"] == [mine]
        assert sorted(conditions["ec2:CreateTags"], key=str) == sorted([mine, new], key=str)


def ray(*command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Ray's command line with an ssh and rsync that only log their arguments."""
    programs = home / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("ssh", "rsync"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {home}/ssh.log\n')
        (programs / name).chmod(0o755)
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home), "PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run([RAY, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_ray_up_launches_the_head_and_ray_down_ends_it(aws, stack, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        edited(
            "cluster.yaml",
            region=stack["Region"],
            image=stack["Image"],
            RAM_STORAGE=stack["Storage"],
        ).replace("sg-0123456789abcdef0", stack["SecurityGroup"])
    )
    up = ray("up", "--yes", str(path), home=tmp_path)
    assert up.returncode == 0, up.stdout + up.stderr

    ec2 = aws("ec2")
    machines = [m for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]]
    assert len(machines) == 1
    head = machines[0]
    assert head["InstanceType"] == "m6i.large"
    assert head["ImageId"] == stack["Image"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/ram-study-head")
    assert head["KeyName"] == "ram-study" and (tmp_path / ".ssh" / "ram-study.pem").stat().st_mode & 0o77 == 0
    assert [group["GroupId"] for group in head["SecurityGroups"]] == [stack["SecurityGroup"]]
    assert head.get("InstanceLifecycle") is None  # not a spot machine
    assert {"Key": "ray-cluster-name", "Value": "ram-study"} in head["Tags"]  # the tag that the stack's policies check
    assert [g["GroupName"] for g in ec2.describe_security_groups()["SecurityGroups"] if "ray" in g["GroupName"]] == []

    told = (tmp_path / "ssh.log").read_text()
    steps = ["cluster.sh node", "cluster.sh head", "ray stop", "ray start --head", "cluster.sh mlflow"]
    assert sorted(steps, key=told.index) == steps
    assert re.search(r"RAY_OVERRIDE_RESOURCES=\W*CPU\W+0\W", told)

    down = ray("down", "--yes", str(path), home=tmp_path)
    assert down.returncode == 0, down.stdout + down.stderr
    states = {m["State"]["Name"] for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]}
    assert states <= {"terminated", "shutting-down"}


# cluster.sh on a machine of its own home.


@pytest.fixture
def machine(tmp_path) -> Path:
    """A home with the project installed, as far as cluster.sh looks."""
    project = tmp_path / "ram-study"
    (project / ".venv").mkdir(parents=True)
    (project / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for name in ("cluster.sh", "pyproject.toml", "constraints.txt"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    files = ["pyproject.toml", "constraints.txt"]
    sums = subprocess.run(["sha256sum", *files], cwd=project, capture_output=True, text=True, check=True).stdout
    (project / ".venv" / "installed").write_text(sums)
    return tmp_path


def script(machine: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run cluster.sh there, with this environment in the cluster's yaml and in ours."""
    (machine / "cluster.yaml").write_text(json.dumps({"metadata": {"environment": environment}}))
    env = {"HOME": str(machine), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **environment}
    line = ["bash", str(machine / "ram-study" / "cluster.sh"), *words]
    return subprocess.run(line, env=env, capture_output=True, text=True)


def test_node_makes_rays_temporary_folder_for_its_user_alone(machine):
    folder = machine / "tmp" / "ray"
    done = script(machine, "node", RAY_TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    assert folder.stat().st_mode & 0o777 == 0o700
    assert script(machine, "folder", RAY_TMPDIR=str(folder)).returncode == 0
    assert script(machine, "folder").returncode == 0  # none is named: the machine is the cluster's alone


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o755, 0o750])
@pytest.mark.parametrize("command", ["node", "folder"])
def test_temporary_folder_that_others_can_enter_is_refused(machine, command, mode):
    folder = machine / "shared"
    folder.mkdir()
    folder.chmod(mode)
    done = script(machine, command, RAY_TMPDIR=str(folder))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: RAY_TMPDIR must be a folder that only ")
    assert str(folder) in line and line.endswith("remove it, or name another")


def test_temporary_folder_that_is_a_link_is_refused(machine):
    (machine / "own").mkdir(mode=0o700)
    (machine / "link").symlink_to(machine / "own")
    assert script(machine, "folder", RAY_TMPDIR=str(machine / "link")).returncode == 1


def test_own_machines_have_a_private_temporary_folder_made_before_each_start_of_ray():
    read = config("cluster-local.yaml")
    assert read["metadata"]["environment"]["RAY_TMPDIR"]
    for kind in ("head", "worker"):
        assert read[f"{kind}_start_ray_commands"][0].endswith("cluster.sh folder")


def test_workers_have_an_mps_of_their_own_that_starts_before_ray_and_ends_when_the_head_is_gone(machine):
    for name in YAML:
        commands = config(name)["worker_start_ray_commands"]
        (at,) = (i for i, command in enumerate(commands) if command.endswith("cluster.sh mps"))
        assert "ray start" in commands[at + 1]
    path, program = machine / "ram-study" / "cluster.sh", machine / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (machine / "nvidia0").touch()
    path.write_text(path.read_text().replace("/dev/nvidia[0-9]*", f"{machine}/nvidia*"))
    settings = {"RAY_TMPDIR": str(machine / "ray"), "PYTHONPATH": str(ROOT)}
    settings["PATH"] = f"{program.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"
    assert script(machine, "node", **settings).returncode == 0
    line = f". {machine}/.ram-study.env; echo $CUDA_MPS_PIPE_DIRECTORY"
    pipe = subprocess.run(["bash", "-c", line], env=settings, capture_output=True, text=True).stdout.strip()
    done = script(machine, "mps", **settings, CUDA_MPS_PIPE_DIRECTORY=pipe)
    assert (done.returncode, done.stderr) == (0, "")
    folder = machine / "ray" / "ram-mps"
    assert len(daemons(folder)) == 1 and pipe == str(folder / "pipe") and folder.stat().st_mode & 0o777 == 0o700
    path.write_text(path.read_text().replace("pgrep --euid", "false pgrep --euid").replace("ray stop", "true"))
    assert script(machine, "when_alone", **settings).returncode == 0
    assert not daemons(folder) and not folder.exists()


def test_mlflows_password_is_made_once_in_a_file_of_its_user_alone(machine):
    assert script(machine, "node").returncode == 0 and script(machine, "head").returncode == 0
    assert "PASSWORD" not in (machine / ".ram-study.env").read_text()
    made = []
    for _ in range(2):
        assert script(machine, "node", RAM_MLFLOW_LOGIN="1").returncode == 0
        assert script(machine, "head", RAM_MLFLOW_LOGIN="1").returncode == 0
        made.append((machine / ".mlflow-password").read_text().strip())
        settings = (machine / ".ram-study.env").read_text()
        assert f"MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD={made[-1]}" in settings
    assert made[0] == made[1] and len(made[0]) >= 32
    for name in (".mlflow-password", ".ram-study.env"):
        assert (machine / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_mlflow_with_a_login_answers_only_to_the_password(machine, tmp_path):
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed: make setup")
    port = free_port()
    path = machine / "ram-study" / "cluster.sh"
    text = path.read_text().replace("MLFLOW_PORT=5001", f"MLFLOW_PORT={port}")
    path.write_text(text.replace("pgrep --euid", "true pgrep --euid"))  # it ends with Ray, and none runs here
    settings = {"RAM_MLFLOW_LOGIN": "1", "RAM_STORAGE": str(tmp_path / "storage")}
    settings["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    for command in ("node", "head", "mlflow"):
        done = script(machine, command, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
    try:
        password = (machine / ".mlflow-password").read_text().strip()
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        answers = [requests.get(url, auth=auth).status_code for auth in (None, ("admin", "x"), ("admin", password))]
        assert answers == [401, 401, 200]
        assert (machine / ".mlflow-users.db").stat().st_mode & 0o077 == 0
    finally:
        os.kill(int((machine / ".mlflow.pid").read_text()), signal.SIGTERM)
