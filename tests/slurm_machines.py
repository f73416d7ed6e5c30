"""A real SLURM on machines of this machine's own: Linux namespaces, so root alone can have it.

Each machine has its processes, network address, host name, /tmp, /run and /dev/shm to itself, and
shares one folder with the others. The first runs the controller, all run a daemon. Munge and SLURM
are the system's (Debian: slurm-wlm, munge).
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip", "setpriv")
NAMES = ("n1", "n2", "n3")
OWN = "/run /dev/shm /var/spool /var/lib/slurm /var/lib/munge /var/log"
CONFIG = """
ClusterName=test
SlurmctldHost=n1
SlurmUser=root
StateSaveLocation=/var/lib/slurm
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdTimeout=30
GresTypes=gpu
NodeName={names} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> str | None:
    """Why no SLURM can be had here, in words; None when it can."""
    if os.geteuid() != 0:
        return "needs root, for machines made of namespaces"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: slurm-wlm, munge, iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], check=False)
    return None if tried.returncode == 0 else "needs to be allowed namespaces"


class Machine:
    """A process that is PID 1 of its own namespaces; killing it is pulling the plug."""

    def __init__(self, name: str, prepare: str) -> None:
        self.name = name
        body = f"set -e\nmount --make-rprivate /\n{prepare}\nhostname {name}; ip link set lo up"
        body += "\necho ready; trap : TERM INT; while :; do sleep 1000 & wait; done"
        dying = ("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child")  # with us
        apart = ("--net", "--uts", "--pid", "--mount", "--ipc", "--mount-proc")
        self._outer = subprocess.Popen(
            [*dying, *apart, "bash", "-c", body], stdout=subprocess.PIPE, text=True
        )
        assert self._outer.stdout is not None
        assert self._outer.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        self.pid = int(children.read_text().split()[0])

    def run(self, *words: object, **environment: str) -> str:
        """What a program says there; its failure fails the test."""
        done = subprocess.run(
            ["nsenter", "--all", "--target", str(self.pid), *map(str, words)],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def pull_the_plug(self) -> None:
        self._outer.kill()  # --kill-child: the first process inside goes too, hence all
        self._outer.wait()


@contextmanager
def slurm(folder: Path) -> Iterator[list[Machine]]:
    """Three machines with a running SLURM, its files in `folder`; the first has the controller."""
    hosts = "".join(f"{_address(number)} {name}\n" for number, name in enumerate(NAMES, 1))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    (folder / "etc").mkdir()
    names = ",".join(NAMES)
    (folder / "etc" / "slurm.conf").write_text(CONFIG.format(names=names, cpus=os.cpu_count()))
    prepare = f"mkdir -p /etc/slurm {OWN}\nfor d in {OWN}; do mount -t tmpfs tmpfs $d; done\n"
    prepare += f"mount --bind {folder}/hosts /etc/hosts; mount --bind {folder}/etc /etc/slurm"
    machines: list[Machine] = []
    try:
        for name in NAMES:
            machines.append(Machine(name, prepare))
            _connect(machines)
            _start_daemons(machines[-1], controls=len(machines) == 1)
        ready = str(len(NAMES))
        wait_for(lambda: machines[0].run("sinfo", "-ht", "idle", "-o", "%D").strip() == ready, 60)
        yield machines
    finally:
        for machine in machines:
            machine.pull_the_plug()


def _address(number: int) -> str:
    return f"10.77.0.{number}"


def _connect(machines: list[Machine]) -> None:
    """Give the last one its address; the first one is the switch, so that others may vanish."""
    first, new = machines[0], machines[-1]
    if new is first:
        first.run("ip", "link", "add", "name", "lan", "type", "bridge")
    else:
        cable = f"ip link add {new.name} netns {first.pid} type veth peer name lan netns {new.pid}"
        subprocess.run(cable.split(), check=True)
        first.run("ip", "link", "set", new.name, "master", "lan", "up")
    new.run("ip", "addr", "add", f"{_address(len(machines))}/24", "dev", "lan")
    new.run("ip", "link", "set", "lan", "up")


def _start_daemons(machine: Machine, *, controls: bool) -> None:
    machine.run("install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge")
    for own in ("/var/log/munge", "/var/lib/munge"):
        machine.run("install", "-d", "-o", "munge", "-g", "munge", "-m", "700", own)
    as_munge = ("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups")
    machine.run(*as_munge, "munged")
    if controls:
        machine.run("slurmctld")
    machine.run("install", "-d", "/var/spool/slurmd")
    machine.run("slurmd")


def wait_for(true: Callable[[], object], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.5)
