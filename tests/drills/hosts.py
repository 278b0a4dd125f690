"""Two hosts on one machine: an ssh server each, with an address and a host name of its own.

All of 127.0.0.0/8 is this machine, and a UTS namespace gives processes a host name; so programs
that start ranks by ssh see two hosts, and all processes of one can be killed without the other's.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ranks import free_port

ADDRESSES = ("127.0.0.2", "127.0.0.3")
NAMES = ("host-2", "host-3")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
SERVER = """
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
CLIENT = """
Port {port}
IdentityFile {folder}/key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
VARIABLES = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR")


def missing() -> str | None:
    """Name what this machine lacks for two hosts; None if nothing."""
    programs = {"sshd": SSHD, **{name: shutil.which(name) for name in ("ssh", "pdsh", "unshare")}}
    lacking = [name for name, path in programs.items() if path is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    if os.geteuid() or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        return "needs to be root, and allowed to make namespaces"
    return None


@dataclass(frozen=True)
class TwoHosts:
    """Servers that run, and what reaches them.

    Attributes:
        servers: the ssh server of each host.
        hostfile: one slot each.
        environment: of programs that are to find them by ssh.
    """

    servers: tuple[subprocess.Popen[bytes], ...]
    hostfile: Path
    environment: dict[str, str]

    def hit(self, number: int, by: signal.Signals = signal.SIGKILL) -> int:
        """Signal all processes of a host but its ssh server; returns how many there were."""
        server = self.servers[number].pid
        existing = [pid for pid in _processes_of(server) if pid != server]
        for pid in existing:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, by)
        return len(existing)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Start both hosts; afterwards nothing of them is left running."""
    folder.mkdir()
    port = free_port()
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    for name in ("key", "host_key"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(make, check=True)
    (folder / "client").write_text(CLIENT.format(port=port, folder=folder))
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    output = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    output |= {"GLOO_SOCKET_IFNAME": "lo"}
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in output.items()))
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    wrapper.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(
            [str(wrapper.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
        "DS_ENV_FILE": str(folder / "env"),
    }
    servers = []
    hosts = TwoHosts((), folder / "hosts", environment)
    try:
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            file = folder / f"{name}.conf"
            file.write_text(SERVER.format(port=port, address=address, folder=folder))
            serve = f'hostname {name} && exec {SSHD} -D -f "$0" -E "$0.log"'
            servers.append(subprocess.Popen(["unshare", "--uts", "sh", "-c", serve, str(file)]))
        hosts = TwoHosts(tuple(servers), hosts.hostfile, environment)
        deadline = time.monotonic() + 20
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            while _says(address, environment) != name:
                assert time.monotonic() < deadline, (folder / f"{name}.conf.log").read_text()
                time.sleep(0.2)
        yield hosts
    finally:
        for number, server in enumerate(servers):
            hosts.hit(number) if hosts.servers else None
            server.kill()
            server.wait()


def _says(address: str, environment: dict[str, str]) -> str:
    """The name that a host gives itself over ssh."""
    done = subprocess.run(
        ["ssh", address, "hostname"], capture_output=True, text=True, env=environment, timeout=20
    )
    return done.stdout.strip()


def _processes_of(server: int) -> list[int]:
    """Processes in the UTS namespace of a process."""
    space = os.readlink(f"/proc/{server}/ns/uts")
    result = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and os.readlink(folder / "ns" / "uts") == space:
                result.append(int(folder.name))
    return result
