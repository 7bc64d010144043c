"""A job waits for the number of GPUs in PERSONA_GPUS, and an autoscaler adds them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
# Ray believes any number of GPUs, as long as no task uses them.
WITH_TWO = "import ray; ray.init(address='local', num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)"
CONNECT = "from jobs.runtime import session; print(session.connect().gpus)"


def python(*lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **environment}
    if "RAY_ADDRESS" not in environment:
        given.pop("RAY_ADDRESS", None)
    code = "\n".join(lines)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True, check=False, timeout=240
    )


def test_it_continues_with_fewer_gpus_and_warns() -> None:
    done = python(WITH_TWO, CONNECT, PERSONA_GPUS="3", PERSONA_GPUS_WITHIN_S="1", PERSONA_LOG="json")
    assert done.stdout.splitlines()[-1] == "2", done.stderr
    logged = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"time"')]
    assert [(one["level"], one["message"][:6]) for one in logged] == [("warning", "2 of 3")]


REFUSED = """
import os
from jobs.runtime import session
from persona.errors import UsageError

for value in ("two", "1"):
    os.environ["PERSONA_GPUS"] = value
    try:
        session.connect()
    except UsageError as error:
        print(error)
"""


def test_invalid_numbers_and_missing_gpus_are_refused() -> None:
    done = python(WITH_TWO.replace("num_gpus=2", "num_gpus=0"), REFUSED, PERSONA_GPUS_WITHIN_S="0")
    not_a_number, none_came = done.stdout.splitlines()[-2:]
    assert not_a_number == "PERSONA_GPUS=two: must be a whole number"
    assert none_came.startswith("PERSONA_GPUS=1: no GPU has come")


@pytest.fixture
def scaling(tmp_path: Path) -> Iterator[str]:
    """The address of a head without GPUs, whose autoscaler may add two nodes with one GPU each, as processes."""
    folder = tempfile.mkdtemp(prefix="pps-", dir="/tmp")  # a short path, because those of sockets are limited
    held = [socket.socket() for _ in range(5)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    port, *ports = (one.getsockname()[1] for one in held)
    for one in held:
        one.close()
    gpu = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    head = {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0}
    nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config = {
        "cluster_name": "here",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        # All nodes share the address of this machine.
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, "gpu": gpu},
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in nothing},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    names = ("dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
    flags = [f"--{name}={value}" for name, value in zip(names, ports, strict=True)]
    flags += [
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--temp-dir={folder}",
        "--num-cpus=2",
        "--num-gpus=0",
        "--object-store-memory=100000000",
        "--block",
    ]
    command = [str(BIN / "ray"), "start", "--head", f"--autoscaling-config={tmp_path}/config.yaml", *flags]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (tmp_path / "log").open("wb") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 120
    while b"Ray runtime started" not in (tmp_path / "log").read_bytes():
        assert node.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    os.killpg(node.pid, signal.SIGTERM)
    try:
        node.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.soak
def test_an_autoscaler_adds_them(scaling: str) -> None:
    without = python(CONNECT, RAY_ADDRESS=scaling)
    assert without.stdout.splitlines()[-1] == "0", without.stderr
    done = python(CONNECT, RAY_ADDRESS=scaling, PERSONA_GPUS="2", PERSONA_GPUS_WITHIN_S="120")
    assert done.stdout.splitlines()[-1] == "2", done.stderr
