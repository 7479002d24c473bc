"""Two nodes, as two network namespaces of this machine: lose a process, then a node, and end with the same bits.

    sudo PYTHONPATH=tests python tests/soak/nodes.py

Needs Linux, `ip` and the right to make namespaces. Each node runs `distributed_train.sh 1` with MAX_RESTARTS and
RDZV_ENDPOINT; the nodes share the folder of the run.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exact_runs import ROOT, assert_same_run, flags_of, run_until

from vip.data.digits import write_digits

NODES = {"vip-node-a": "10.77.0.1", "vip-node-b": "10.77.0.2"}
FLAGS = ("-b", "8", "--epochs", "2", "--recovery-interval", "10", "--dist-timeout", "120")


def ip(*command: str) -> None:
    """Call `ip`."""
    subprocess.run(["ip", *command], check=True)


@contextmanager
def network() -> Iterator[None]:
    """Two namespaces with a cable between them."""
    try:
        for node in NODES:
            ip("netns", "add", node)
        first, second = NODES
        ip("link", "add", "vip-a", "netns", first, "type", "veth", "peer", "vip-b", "netns", second)
        for (node, address), device in zip(NODES.items(), ("vip-a", "vip-b"), strict=True):
            ip("-n", node, "address", "add", f"{address}/24", "dev", device)
            ip("-n", node, "link", "set", device, "up")
            ip("-n", node, "link", "set", "lo", "up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], check=False)


def start(node: str, data: Path, flags: list[str], log: Path) -> subprocess.Popen:
    """Start one node."""
    device = "vip-a" if node.endswith("a") else "vip-b"
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"NNODES": "2", "RDZV_ENDPOINT": f"{NODES['vip-node-a']}:29400", "MAX_RESTARTS": "5"}
    env |= {"GLOO_SOCKET_IFNAME": device, "PET_LOCAL_ADDR": NODES[node]}  # the name of the machine is no address here
    env["PET_RDZV_CONF"] = f"is_host={node.endswith('a')}"
    command = ["ip", "netns", "exec", node, "./distributed_train.sh", "1", str(data), *flags]
    return subprocess.Popen(command, stderr=open(log, "a"), env=env, cwd=ROOT, start_new_session=True)


def wait_for(log: Path, text: str, count: int = 1) -> None:
    """Wait until a log has so many more lines with a text than now."""
    target, deadline = log.read_text().count(text) + count, time.monotonic() + 300
    while log.read_text().count(text) < target:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def trainer_of(launcher: int) -> int:
    """The training process of a node."""
    [pid] = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(pid)


def main() -> None:
    """One run on one node, undisturbed; one on two nodes, disturbed; compare."""
    with tempfile.TemporaryDirectory() as temporary, network():
        folder = Path(temporary)
        write_digits(folder / "digits")
        whole = ["./distributed_train.sh", "2", str(folder / "digits"), *flags_of(folder, "whole", *FLAGS)]
        assert run_until(-1, whole) == 0
        flags = flags_of(folder, "run", *FLAGS)
        logs = {node: folder / f"{node}.log" for node in NODES}
        for log in logs.values():
            log.touch()
        nodes = {node: start(node, folder / "digits", flags, logs[node]) for node in NODES}
        both = folder / "run/train.log"
        while not both.exists():
            time.sleep(0.1)
            assert all(process.poll() is None for process in nodes.values()), logs["vip-node-a"].read_text()[-2000:]
        wait_for(both, "] lr", 25)
        print("a process of the second node is killed", flush=True)
        os.kill(trainer_of(nodes["vip-node-b"].pid), signal.SIGKILL)
        wait_for(both, "] lr", 25)
        print("the second node is lost, and comes back after 10 s", flush=True)
        os.killpg(nodes["vip-node-b"].pid, signal.SIGKILL)
        time.sleep(10)
        nodes["vip-node-b"] = start("vip-node-b", folder / "digits", flags, logs["vip-node-b"])
        ends = {node: process.wait() for node, process in nodes.items()}
        assert set(ends.values()) == {0}, {node: logs[node].read_text()[-3000:] for node in NODES}
        assert_same_run(folder / "run", folder / "whole")
        print("every file equal to the bit")


if __name__ == "__main__":
    main()
