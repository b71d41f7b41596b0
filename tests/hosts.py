"""Machines for tests: namespaces of this machine, each with its own network, processes, mounts, host name and sshd.

A bridge in a namespace of its own connects them. They share this machine's programs, but have their own homes, /tmp and
/run. When the process that made them ends in any way, the kernel ends them and everything in them. Needs root.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

HOME = Path("/srv/ram")  # of root, on every host
NEEDED = ("curl", "ip", "nsenter", "rsync", "setpriv", "ss", "ssh", "ssh-keygen", "sshd", "unshare")
BRIDGE = "10.77.0.1"

_BOOT = """
set -e
mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/sshd
mkdir -p {disk}/upper {disk}/work {disk}/tmp
mount -t tmpfs -o size=512m tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /srv && mkdir {home}
mount -t overlay -o lowerdir={image},upperdir={disk}/upper,workdir={disk}/work overlay {home}
sed 's#^root:[^:]*:0:0:[^:]*:.*#root:x:0:0:root:{home}:/bin/bash#' /etc/passwd > /run/passwd
mount --bind /run/passwd /etc/passwd
mount --bind {lab}/hosts /etc/hosts
chmod 1777 {disk}/tmp
hostname {name}
cp {lab}/key {lab}/sshd_config /run/ && cp {lab}/key.pub /run/authorized_keys
mount --bind {disk}/tmp /tmp
cd /
{sshd} -f /run/sshd_config
echo booted > /run/booted
while :; do sleep 1000; done
"""
_SSHD = """
HostKey /run/key
AuthorizedKeysFile /run/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
PidFile none
Subsystem sftp internal-sftp
"""


def missing() -> list[str]:
    """The programs that a lab needs and this machine lacks."""
    return [name for name in NEEDED if shutil.which(name, path=_PATH) is None]


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def bake(image: Path, files: dict[str, Path | str], command: str) -> None:
    """Fill a folder that becomes the home on every machine of a lab: copy files, then run a command there.

    The command uses this machine's network, so it may install packages. It may run again on the same folder.
    """
    image.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        copy = ["rsync", "-a", "--delete", "--mkpath", "--exclude=__pycache__", source, image / name]
        subprocess.run(copy, check=True)
    python = Path(sys.executable).resolve().parent
    (image / ".profile").write_text(f'PATH="{python}:$PATH"\n. ~/.bashrc\n')
    environment = {**os.environ, "HOME": str(HOME), "PATH": f"{python}:{_PATH}",
                   "PIP_CACHE_DIR": str(Path("~/.cache/pip").expanduser())}  # fmt: skip
    script = f"mount -t tmpfs tmpfs /srv && mkdir {HOME} && mount --bind {image} {HOME} && {command}"
    subprocess.run(["unshare", "--mount", "bash", "-c", script], check=True, env=environment)


_numbers = itertools.count()


class Host:
    """One machine of a lab. It is up from its creation until `power_off`."""

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.number = next(_numbers)
        self._disk = lab.path / "disks" / f"{name}-{self.number}"  # a new one for each start
        boot = _BOOT.format(
            disk=self._disk, home=HOME, image=lab.image, lab=lab.path, name=name, sshd=shutil.which("sshd", path=_PATH)
        )
        self._process = subprocess.Popen(
            [*lab.enter, "unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", boot],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # `unshare` prints a line at `power_off`
        )  # fmt: skip
        self.init = _child(_child(self._process.pid))  # nsenter, unshare, init
        lab.plug_in(self)
        deadline = time.monotonic() + 20
        while self.run("test -e /run/booted", check=False).returncode:
            assert self._process.poll() is None and time.monotonic() < deadline, f"{name} does not boot"
            time.sleep(0.05)

    def run(self, command: str, *, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in a login shell on the machine."""
        return subprocess.run([*self.console, command], capture_output=True, text=True, check=check, timeout=timeout)

    @property
    def console(self) -> list[str]:
        """The words before a command that runs in a login shell on the machine."""
        return [
            "nsenter", f"--target={self.init}", "--net", "--pid", "--mount", "--uts", "--ipc",
            "env", "-i", f"HOME={HOME}", f"PATH={_PATH}", "USER=root", "TERM=dumb",
            "bash", "--login", "-c",
        ]  # fmt: skip

    def processes(self) -> list[str]:
        """The command lines of its processes, without this `ps` itself."""
        return [line for line in self.run("ps -eo args=").stdout.splitlines() if not line.startswith("ps ")]

    def power_off(self) -> None:
        """End it at once, without a shutdown."""
        subprocess.run(["kill", "-KILL", str(self.init)], check=True)
        self.wait()

    def wait(self) -> None:
        """Wait until it is off."""
        self._process.wait(timeout=20)


class Lab:
    """A bridge and the machines on it. As a context manager, it removes all of them at its end."""

    def __init__(self, path: Path, image: Path, names: tuple[str, ...]) -> None:
        self.path = path
        self.image = image
        self.hosts: dict[str, Host] = {}
        self.addresses = {name: f"10.77.0.{10 + i}" for i, name in enumerate(names)}

    def __enter__(self) -> Lab:
        self._outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", f"mount -t tmpfs tmpfs {self.path} && while :; do sleep 1000; done"],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        init = _child(self._outer.pid)
        self.enter = ["nsenter", f"--target={init}", "--net", "--pid", "--mount"]
        self._net = ["nsenter", f"--target={init}", "--net"]
        while subprocess.run([*self.enter, "mountpoint", "-q", str(self.path)]).returncode:
            time.sleep(0.05)
        self._ip("link set lo up")
        self._ip("link add switch type bridge")
        self._ip(f"addr add {BRIDGE}/24 dev switch")
        self._ip("link set switch up")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in self.addresses.items())
        self._write("hosts", hosts)
        self._write("sshd_config", _SSHD)
        subprocess.run(
            [*self.enter, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.path / "key")], check=True
        )
        return self

    def boot(self, name: str) -> Host:
        """Start a machine."""
        self.hosts[name] = Host(self, name, self.addresses[name])
        return self.hosts[name]

    def plug_in(self, host: Host) -> None:
        """Connect a machine to the bridge."""
        wire = f"to-{host.number}"
        self._ip(f"link add {wire} type veth peer name eth0 netns {host.init}")
        self._ip(f"link set {wire} master switch up")
        inside = ["nsenter", f"--target={host.init}", "--net", "ip"]
        for command in ("link set lo up", f"addr add {host.address}/24 dev eth0", "link set eth0 up",
                        f"route add default via {BRIDGE}"):  # fmt: skip
            subprocess.run([*inside, *command.split()], check=True)

    def on_bridge(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a server for the machines, at BRIDGE, outside of all of them."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            [*self._net, "setpriv", "--pdeathsig", "KILL", *command], stdin=quiet, stdout=quiet, stderr=quiet
        )

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._outer.kill()
        self._outer.wait(timeout=20)
        for host in self.hosts.values():
            host.wait()

    def _ip(self, command: str) -> None:
        subprocess.run([*self._net, "ip", *command.split()], check=True)

    def _write(self, name: str, text: str) -> None:
        write = [*self.enter, "tee", str(self.path / name)]
        subprocess.run(write, input=text.encode(), check=True, capture_output=True)


def _child(pid: int) -> int:
    """The child of a waiting `unshare` or `setpriv`, by its id on this machine."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.02)
    raise TimeoutError(f"process {pid} has no child")
