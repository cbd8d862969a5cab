"""Two machines: network namespaces with a cable between them and names of their own, and `deepspeed --hostfile`.

DeepSpeed starts its ranks through pdsh. A stand-in for it reaches the machines by ssh, where sshd is installed, or
enters their namespaces. Needs root.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from processes import ROOT, start, write_config, write_images
from soak import log_of

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and the program ip"),
]
needs_sshd = pytest.mark.skipif(not (SSHD and shutil.which("ssh-keygen")), reason="needs sshd and ssh-keygen")

BIN = Path(sys.executable).parent
LOST = 69
FIRST, SECOND = "10.213.77.1", "10.213.77.2"
# Called as `pdsh -S -f 1024 -w HOST,HOST COMMAND ...`, where %n is a host's number.
PDSH = """#!/bin/bash
IFS=, read -ra hosts <<< "$5"
shift 5
command="$*"
for n in "${!hosts[@]}"; do
    (reach "${hosts[$n]}" "${command//%n/$n}" > "$FOLDER/out.$n" 2>&1; echo $? > "$FOLDER/code.$n") &
done
wait
cat "$FOLDER"/out.*
exit "$(sort -n "$FOLDER"/code.* | tail -1)"
"""
REACH = {
    "namespaces": """ip netns exec "$PREFIX-${1##*.}" unshare --uts sh -c "hostname machine${1##*.}; $2" """,
    "ssh": """ssh -F "$FOLDER/ssh_config" "$1" "$2" """,
}
SSH_CONFIG = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nIdentityFile {}/key\nLogLevel ERROR\n"
SSHD_CONFIG = """HostKey {0}/key
AuthorizedKeysFile {0}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
"""


def do(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)


class Machines:
    """Two of them, PREFIX-1 and PREFIX-2, that share all files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder, f"jepa{os.getpid()}"
        self.names = [f"{self.prefix}-{number}" for number in (1, 2)]
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Machines":
        for name in self.names:
            do("ip", "netns", "add", name)
            hosts = Path("/etc/netns", name, "hosts")  # bound over /etc/hosts there
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n{FIRST} machine1\n{SECOND} machine2\n")
        one, two = self.names
        do("ip", "link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
        for name, address in zip(self.names, (FIRST, SECOND), strict=True):
            do("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                do("ip", "-n", name, "link", "set", link, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for process in found.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), 9)
            subprocess.run(["ip", "netns", "delete", name], check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)

    def cut_the_cable(self) -> None:
        do("ip", "-n", self.names[0], "link", "set", "cable", "down")

    def run_sshd(self) -> None:
        do("ssh-keygen", "-q", "-N", "", "-f", self.folder / "key")
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(self.folder))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        for number, name in enumerate(self.names, 1):
            serve = f"hostname machine{number}; exec {SSHD} -D -e -f {self.folder}/sshd_config"
            log = (self.folder / f"sshd.{number}").open("w")
            words = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", serve]
            self.daemons.append(subprocess.Popen(words, stdout=log, stderr=log))

    def launch(self, way: str, slots: tuple[int, int], *words: object) -> subprocess.Popen[str]:
        """`deepspeed --hostfile` on the first machine, with so many ranks on each."""
        tools = self.folder / "bin"
        tools.mkdir()
        for name, text in {"pdsh": PDSH, "reach": f"#!/bin/bash\n{REACH[way]}\n"}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        lines = [f"{address} slots={n}" for address, n in zip((FIRST, SECOND), slots, strict=True)]
        (self.folder / "hostfile").write_text("\n".join(lines) + "\n")
        (self.folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")
        environment = {name: value for name, value in os.environ.items() if name not in launched}
        environment |= {"PATH": f"{tools}:{BIN}:{environment['PATH']}", "PYTHONPATH": str(ROOT / "kernels")}
        environment |= {"FOLDER": str(self.folder), "PREFIX": self.prefix, "DS_ACCELERATOR": "cpu"}
        options = ["--hostfile", "hostfile", "--no_ssh_check", "--master_addr", FIRST, "--master_port", 29577]
        command = ["deepspeed", *options, ROOT / "engine/train.py", *words, "engine.device=cpu"]
        inside = ["ip", "netns", "exec", self.names[0], "unshare", "--uts", "sh", "-c", 'hostname machine1; exec "$@"']
        log = (self.folder / "launcher").open("w")
        return subprocess.Popen(
            [str(word) for word in (*inside, "-", *command)],
            cwd=self.folder, env=environment, stdout=log, stderr=log, text=True,
        )  # fmt: skip

    def text(self, number: int) -> str:
        """What the ranks of a machine print."""
        path = self.folder / f"out.{number - 1}"
        return path.read_text() if path.exists() else ""

    def code(self, number: int) -> int:
        return int((self.folder / f"code.{number - 1}").read_text())

    def everything(self) -> str:
        return "\n".join([(self.folder / "launcher").read_text(), self.text(1), self.text(2)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machines")
    return write_config(folder / "config.yaml", write_images(folder / "images"))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    folder = tmp_path / "machines"
    folder.mkdir()
    with Machines(folder) as made:
        yield made


@pytest.mark.parametrize("way", ["namespaces", pytest.param("ssh", marks=needs_sshd)])
def test_two_machines_train_as_one_does(way: str, machines: Machines, config: Path, tmp_path: Path) -> None:
    words = ("--config", config, "engine.max_steps=3", "mask.mode=packed")
    if way == "ssh":
        machines.run_sshd()
    launched = machines.launch(way, (1, 1), *words, f"logging.folder={tmp_path / 'two'}")
    assert launched.wait(240) == 0, machines.everything()
    assert start(2, tmp_path / "one", *words).wait() == [0, 0]
    assert log_of(tmp_path / "two") == log_of(tmp_path / "one")


def test_a_cut_cable_ends_both_machines_and_each_names_what_it_lost(
    machines: Machines, config: Path, tmp_path: Path
) -> None:
    words = ("--config", config, "optimization.epochs=9000", "engine.timeout_minutes=0.3", "logging.save_every=5")
    launched = machines.launch("namespaces", (1, 2), *words, f"logging.folder={tmp_path / 'run'}")
    end = time.monotonic() + 240
    while not re.search(r"saved \S+/jepa-", machines.text(1)):
        assert launched.poll() is None and time.monotonic() < end, machines.everything()
        time.sleep(0.1)
    time.sleep(1.5)  # there is a heartbeat every second
    machines.cut_the_cable()
    launched.wait(240)
    assert machines.code(1) == machines.code(2) == LOST, machines.everything()
    here, there = machines.text(1), machines.text(2)
    for rank in (1, 2):
        assert re.search(rf"no heartbeat for .*rank {rank} \(process \d+ on machine2\) last seen in step \d+", here), (
            here
        )
        assert re.search(rf"rank {rank}: rank 0( has not answered for|, or the launcher).*Exit code {LOST}", there), (
            there
        )
