"""Fixtures for all tests: S3 servers for the session, and fresh buckets on them."""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import boto3
import hypothesis
import pytest

# The time an example takes depends more on the load of the machine than on the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
# By default it listens on every interface, and for protocols other than S3.
_OTHER_SERVER = """
import os, signal, socket, sys, threading, time
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3", "LOG_LEVEL": "ERROR"}
os.environ |= {"IOT_MTLS_ENABLED": "0", "SFTP_ENABLED": "0"}
def announce_and_wait():
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            time.sleep(0.02)
    print(f"http://127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=announce_and_wait, daemon=True).start()
sys.argv = ["ministack"]
from ministack.app import main
main()
"""


@contextlib.contextmanager
def s3_process(code: str = _SERVER) -> Iterator[str]:
    """The endpoint of an S3-compatible server in a separate process."""
    # Not a thread: a library that waits for a response while it holds the GIL would deadlock.
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    yield server.stdout.readline().strip()
    server.stdin.close()  # ends the server, as does the end of this process
    server.stdout.close()
    server.wait()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3-compatible server, set in the environment of this process and its children."""
    with s3_process() as endpoint, pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "test-key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-7f3a")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("AWS_CONFIG_FILE", os.devnull)
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield endpoint


@pytest.fixture(scope="session")
def other_s3_server(s3_server: str) -> Iterator[str]:
    """The endpoint of a different implementation, with the same credentials."""
    with s3_process(_OTHER_SERVER) as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_server: str) -> str:
    """`s3://bucket` of a fresh bucket."""
    return _new_bucket()


@pytest.fixture
def other_s3(other_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same on the other server, which is in the environment during the test."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", other_s3_server)
    return _new_bucket()


def _new_bucket() -> str:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """A fresh folder, on disk and on the S3 server in turn."""
    return str(request.getfixturevalue("tmp_path" if request.param == "local" else "s3"))


@pytest.fixture(params=["s3", "other_s3"])
def each_s3(request: pytest.FixtureRequest) -> str:
    """A fresh bucket on each server in turn."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=["tmp_path", "s3", "other_s3"])
def each_root(request: pytest.FixtureRequest) -> str:
    """A fresh folder on disk and on each server in turn, for tests of storage itself."""
    return str(request.getfixturevalue(request.param))
