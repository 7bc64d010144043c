"""A node is cut off from the network in the middle of `embed` and of `train`.

Each worker node has its own network namespace, connected to the head's by a bridge. Taking its interface down is what a
broken switch does: no process ends and no connection is closed. Skipped without root and `ip`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.jobs.conftest import TRAINING, arguments, behaviors, end_groups, n_reports, requests, stored, write
from tests.killable import LOG

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NET = "10.213.77"
TAG = f"pp{os.getpid() % 10000}"
CAN = os.geteuid() == 0 and shutil.which("ip") is not None
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not CAN, reason="network namespaces need root and `ip`"),
]
# Ray gives up a silent node after five seconds; by default after half a minute. A caller that waits for a worker on it
# finds out by pings without an answer: here within five seconds, in our image within a minute, by Ray's default within
# seven.
QUICK = {
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "3000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": "1500",  # on a busy machine a healthy node may take a second
    "RAY_health_check_initial_delay_ms": "0",
}


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def wait(condition: Callable[[], bool], within_s: float = 240, of: "subprocess.Popen[str] | None" = None) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until
        assert of is None or of.poll() is None, of.communicate()
        time.sleep(0.2)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


class Network:
    """A head and two workers, each worker in its own namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bridge, self.spaces = f"{TAG}b", [f"{TAG}n{number}" for number in range(2)]
        self.nodes: list[subprocess.Popen[bytes]] = []
        (folder / "token").write_text("c" * 64)
        self.api = f"http://{NET}.1:8265"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self.environment.pop("RAY_ADDRESS", None)
        self.environment |= {
            **QUICK,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_API_SERVER_ADDRESS": self.api,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Creates bridge, cables and namespaces, and starts a Ray node in each."""
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{NET}.1/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for number, space in enumerate(self.spaces):
            ip("netns", "add", space)
            ip("link", "add", f"{space}c", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"{space}c", "master", self.bridge, "up")
            ip("-n", space, "addr", "add", f"{NET}.{number + 11}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        head = ("--head", "--port=6399", f"--dashboard-host={NET}.1", "--num-cpus=2")
        self._node(head, f"{NET}.1", self.bridge)
        submit = [sys.executable, "-m", "jobs.submit", "--id", "ready", "--entrypoint", "true"]
        subprocess.run(submit, env=self.environment, cwd=ROOT, check=True, capture_output=True)
        for number, space in enumerate(self.spaces):
            worker = (f"--address={NET}.1:6399", "--num-cpus=3")
            self._node(worker, f"{NET}.{number + 11}", "eth0", within=("ip", "netns", "exec", space))
            wait(lambda expected=number + 2: self.n_alive() == expected)  # type: ignore[misc]

    def _node(self, flags: tuple[str, ...], address: str, interface: str, within: tuple[str, ...] = ()) -> None:
        given = [f"--node-ip-address={address}", "--object-store-memory=100000000", f"--temp-dir={self.folder}/ray"]
        given.append("--dashboard-agent-listen-port=52399")  # another Ray on this machine may have the default port
        command = [*within, str(BIN / "ray"), "start", *flags, *given, "--block", "--disable-usage-stats"]
        environment = {**self.environment, "GLOO_SOCKET_IFNAME": interface}
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)

    def n_alive(self) -> int:
        """The number of nodes that the head considers alive."""
        request = Request(f"{self.api}/nodes?view=summary", headers={"Authorization": f"Bearer {'c' * 64}"})
        with urlopen(request, timeout=30) as answer:
            found = json.load(answer)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in found)

    def at_work(self, title: str) -> list[str]:
        """The namespaces in which a process with that title runs."""
        pids = {space: ip("netns", "pids", space).split() for space in self.spaces}
        return [space for space, found in pids.items() if any(title in _title(int(pid)) for pid in found)]

    def cut(self, space: str) -> None:
        """Takes the node's interface down."""
        ip("link", "set", f"{space}c", "down")

    def submit(self, name: str, *words: str) -> "subprocess.Popen[str]":
        """Starts `jobs.submit`, which waits for the job."""
        command = [sys.executable, "-m", "jobs.submit", "--id", name, "--entrypoint", " ".join(words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def end(self) -> None:
        """Stops the nodes and removes the namespaces and the bridge."""
        end_groups(self.nodes)
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
            subprocess.run(["ip", "link", "del", f"{space}c"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture
def network() -> Iterator[Network]:
    folder = Path(tempfile.mkdtemp(prefix="ppn-", dir="/tmp"))
    found = Network(folder)
    try:
        found.start()
        yield found
    finally:
        found.end()
        shutil.rmtree(folder, ignore_errors=True)


def result(job: "subprocess.Popen[str]") -> dict[str, Any]:
    out, stderr = job.communicate(timeout=600)
    assert job.returncode == 0, stderr[-4000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])["result"]
    return found


def test_a_node_is_cut_off_during_embed(network: Network, models: dict[str, str], tmp_path: Path) -> None:
    rows = behaviors(40, 8)
    histories = write(str(tmp_path / "histories.jsonl"), rows)
    flags: dict[str, Any] = {"histories": histories, "store": tmp_path / "store", "encoder": models["encoder"]}
    flags |= {"max_tokens": 32, "block_rows": 4, "buckets": 4, "actors": 4}
    job = network.submit("cut-embed", sys.executable, "-m", "tests.killable", "never", "embed", *arguments(**flags))
    log = tmp_path / LOG
    wait(lambda: _lines(log) > 4 and bool(network.at_work("ray::MapWorker")), of=job)
    assert _lines(log) < len(rows) / 4
    network.cut(network.at_work("ray::MapWorker")[0])
    assert result(job)["read"] == len(rows)
    assert len(stored(tmp_path / "store", "behaviors")) == len(rows)
    wait(lambda: network.n_alive() == 2)


def test_a_node_is_cut_off_during_train(network: Network, store: Path, models: dict[str, str], tmp_path: Path) -> None:
    requests_file = write(str(tmp_path / "requests.jsonl"), requests(n_each=8))
    runs = tmp_path / "runs"
    flags: dict[str, Any] = {**TRAINING, "requests": requests_file, "store": store, "llm": models["llama"]}
    flags |= {"workers": 2, "runs": runs, "plug": tmp_path / "plug", "epochs": 3, "encoder": models["encoder"]}
    flags["validation"] = requests_file
    job = network.submit("cut-train", sys.executable, "-m", "jobs.train", *arguments(**flags))
    wait(lambda: n_reports(runs) >= 2 and bool(network.at_work("RayTrainWorker")), of=job)
    network.cut(network.at_work("RayTrainWorker")[0])
    found = result(job)
    assert found["steps"] == found["requests"] // TRAINING["global_batch"] * 3
    assert (tmp_path / "plug" / "plug.safetensors").exists()
    wait(lambda: network.n_alive() == 2)
