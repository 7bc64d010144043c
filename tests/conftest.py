"""Fixtures that every test may ask for: an S3 server for the session, and a fresh bucket on it."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import boto3
import pytest

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%s" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3-compatible server; the environment names it for this process and all that it starts."""
    # A process of its own: a library that waits for an answer with Python's lock in hand would wait for ever
    # on a thread.
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    endpoint = server.stdout.readline().strip()
    with pytest.MonkeyPatch.context() as environment:
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
    server.stdin.close()  # the server ends with it, and also when this process is killed
    server.stdout.close()
    server.wait()


@pytest.fixture
def s3(s3_server: str) -> str:
    """`s3://bucket` of a bucket that nobody else uses."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """A fresh folder to write into, once on the disk and once on the S3 server."""
    return str(request.getfixturevalue("tmp_path" if request.param == "local" else "s3"))
