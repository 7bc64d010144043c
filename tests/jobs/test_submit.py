"""All jobs by `ray job submit` on a cluster of two nodes, every path on S3, and token authentication."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from persona.storage import copy_folder, join
from tests import pages
from tests.jobs.conftest import behaviors, end_groups, requests, write
from tests.warm_workers import ray_command, warm_workers

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
UP_WITHIN_S = 120


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """A head and a worker node, started as in `cluster/README.md`."""

    def __init__(self, folder: Path, token: str, environment: dict[str, str]) -> None:
        self.folder = folder
        self.token = token
        self.environment = environment
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.gcs, self.dashboard, *self.ports = free_ports(8)
        self.api = f"http://127.0.0.1:{self.dashboard}"

    def start(self) -> None:
        """Start both nodes, and wait until they accept jobs."""
        self._start("--head", f"--port={self.gcs}", f"--dashboard-port={self.dashboard}", ports=self.ports[:3], cpus=4)
        self._wait(lambda: self.submit("true", log=False).returncode == 0)
        self._start(f"--address=127.0.0.1:{self.gcs}", ports=self.ports[3:], cpus=3)
        self._wait(lambda: self.n_nodes() == 2)

    def _start(self, *flags: str, ports: list[int], cpus: int) -> None:
        names = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port")
        given = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
        given += [f"--num-cpus={cpus}", "--object-store-memory=150000000", f"--temp-dir={self.folder}", "--block"]
        command = [*ray_command(), "start", *flags, *given, "--disable-usage-stats"]
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            self.nodes.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _wait(self, is_up: Callable[[], bool]) -> None:
        until = time.monotonic() + UP_WITHIN_S
        while not is_up():
            log = (self.folder / f"node-{len(self.nodes) - 1}.log").read_text()
            assert time.monotonic() < until, log[-3000:]
            assert self.nodes[-1].poll() is None, log[-3000:]
            time.sleep(0.5)

    def n_nodes(self) -> int:
        """Nodes that are alive."""
        request = Request(f"{self.api}/nodes?view=summary", headers={"Authorization": f"Bearer {self.token}"})
        with urlopen(request, timeout=30) as answer:
            nodes = json.load(answer)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def submit(self, *entrypoint: str, log: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit`, which waits for the job; the job's log is in the output."""
        files = ["--working-dir", str(ROOT)] if log else []
        command = [str(BIN / "ray"), "job", "submit", "--address", self.api, *files, "--", *entrypoint]
        env = {**self.environment, **environment}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)

    def job(self, name: str, **flags: Any) -> Any:
        """Run one of our jobs; returns the JSON of its last line."""
        given: list[str] = []
        for flag, value in flags.items():
            given += [f"--{flag.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
        done = self.submit(sys.executable, "-m", f"jobs.{name}", *given)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(lines[-1])

    def end(self) -> None:
        """Stop the two nodes and nothing else: each has its own process group."""
        end_groups(self.nodes)


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[Cluster]:
    # Directly in /tmp, because the path of a Unix socket is limited to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pp-", dir="/tmp"))
    token = "a" * 64
    (folder / "token").write_text(token)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        # Otherwise Ray starts a process per CPU of a node for each job, before the job needs any.
        "RAY_prestart_worker_first_driver": "0",
    }
    with warm_workers():
        others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        found = Cluster(folder, token, {**others, **environment})
        try:
            found.start()
            yield found
        finally:
            found.end()
            shutil.rmtree(folder, ignore_errors=True)


def test_a_submission_without_the_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("b" * 64)
    wrong = cluster.submit("true", log=False, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    none = cluster.submit("true", log=False, RAY_AUTH_MODE="disabled")
    for refused, why in ((wrong, "token is invalid"), (none, "no authentication token")):
        assert refused.returncode != 0
        assert why in (refused.stdout + refused.stderr).lower()


def test_submit_exits_with_the_jobs_exit_code_and_starts_an_id_of_one_command_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    def submit(entrypoint: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs.submit", "--id", "night-1", "--entrypoint", entrypoint]
        return subprocess.run(
            [*command, "--address", cluster.api],
            cwd=ROOT,
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    entrypoint = f"sh -c 'echo ran >> {tmp_path}/log; echo {{}}; exit 7'"
    for started in (True, False):
        done = submit(entrypoint)
        found = json.loads(done.stdout.splitlines()[-1])
        assert (done.returncode, found["status"], found["started"], found["result"]) == (7, "FAILED", started, {})
    other = submit("true")
    assert (other.returncode, other.stdout) == (2, "")
    assert "error: --id 'night-1' belongs to another command" in other.stderr and "(FAILED)" in other.stderr
    assert (tmp_path / "log").read_text() == "ran\n"


@pytest.mark.timeout(1200)
def test_the_whole_pipeline_on_s3(
    cluster: Cluster, s3: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("encoder", "llama"):
        copy_folder(models[name], join(s3, "models", name))
    store, plug = join(s3, "store"), join(s3, "plug")
    write(join(s3, "histories/a.parquet"), behaviors())
    train_requests = write(join(s3, "requests/train.jsonl"), requests())
    held_out = write(join(s3, "requests/test.jsonl"), requests(2, 6))

    encoder, llm = join(s3, "models/encoder"), join(s3, "models/llama")
    embedded = cluster.job(
        "embed",
        histories=join(s3, "histories"),
        store=store,
        encoder=encoder,
        max_tokens=32,
        buckets=4,
        block_rows=16,
        actors=2,
    )
    assert embedded["committed"] == embedded["read"] == len(behaviors())
    trained = cluster.job(
        "train",
        requests=train_requests,
        validation=held_out,
        store=store,
        plug=plug,
        run="r",
        runs=join(s3, "runs"),
        llm=llm,
        epochs=1,
        global_batch=8,
        micro_batch=4,
        workers=2,
        validate_every=2,
        warm_start="none",  # the tiny tokenizers share no words
    )
    assert trained["steps"] == len(requests()) // 8
    kinds = ("own", "none", "other")
    answered = cluster.job(
        "generate", requests=held_out, store=store, plug=plug, persona=kinds, beams=1, max_new_tokens=4, actors=2
    )
    assert answered["answered"] == 3 * answered["requests"] == 3 * len(requests(2, 6))
    evaluated = cluster.job(
        "evaluate", requests=held_out, store=store, plug=plug, out=join(s3, "report"), metric="text", actors=1
    )
    assert set(evaluated["scores"]) == set(evaluated["loss"]) == set(kinds)

    logged = logged_lines(cluster.folder)
    assert not {name for name, line in logged if "test-secret" in line}
    assert not [line for _, line in logged if re.search(r"\buser-\d\b|likes the paper", line)], "ids or texts in a log"

    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")  # deltalake requires it for an endpoint without TLS
    read_as_in_the_docs(store, n_answers=answered["answered"], n_behaviors=embedded["committed"])


def logged_lines(folder: Path) -> list[tuple[str, str]]:
    """Every line that Ray or a job has logged below a folder, except debug lines."""
    files = [path for path in folder.rglob("logs/**/*") if path.is_file() and not path.is_symlink()]
    lines = [(path.name, line) for path in files for line in path.read_text(errors="replace").splitlines()]
    assert len(lines) > 100
    return [(name, line) for name, line in lines if "DEBUG" not in line]


def read_as_in_the_docs(store: str, *, n_answers: int, n_behaviors: int) -> None:
    """Run the Python blocks of docs/data.md that read tables, on this store."""
    blocks = pages.python_blocks(pages.section(pages.DATA, "Reading the tables"))
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("s3://corp/persona/store", store), names)
    assert len(names["answers"]) == len(names["answers_polars"]) == n_answers
    assert sum(n for _, n in names["by_variant"]) == n_answers
    assert names["vectors"].shape[0] == n_behaviors
