"""Objects on S3: the clients with their time-outs, and the requests of which `persona.storage` is made.

A request raises what its library raises; `persona.storage.retry` knows which of these errors pass.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pyarrow.fs as pafs
from boto3.exceptions import RetriesExceededError
from botocore.config import Config
from botocore.exceptions import ClientError

from persona.errors import StorageError
from persona.storage.retry import retry_transient, silence_s, timeout_s
from persona.storage.uris import S3

_MOST_ATTEMPTS = 5
_building = threading.Lock()


def split(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = uri.removeprefix(S3).partition("/")
    return bucket, key


def endpoint() -> str | None:
    """The endpoint that the environment names, for a store other than AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def where() -> str:
    """The store's name in a message."""
    url = endpoint()
    return (urlsplit(url).hostname or "the endpoint") if url else "AWS S3"


@contextlib.contextmanager
def client(bucket: str, *, attempts: int = 1, silent_s: float | None = None) -> Iterator[Any]:
    """A client for `bucket`, which gives up a request after `silent_s` without a byte."""
    wait_s = 2 * silence_s() if silent_s is None else silent_s
    config = Config(
        connect_timeout=min(silence_s(), wait_s),
        read_timeout=wait_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    with _building:  # the session, which is expensive to make, belongs to all threads and bears one at a time
        made = boto3.client("s3", region_name=_region(bucket), endpoint_url=endpoint(), config=config)
    with contextlib.closing(made):
        yield made


def filesystem(bucket: str) -> pafs.S3FileSystem:
    """The Arrow filesystem. It holds the secret key."""
    options: dict[str, Any] = {"region": _region(bucket)}
    if url := endpoint():
        parts = urlsplit(url)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    silent_s = max(silence_s(), 1.0)  # curl, which sees to it, counts whole seconds
    return pafs.S3FileSystem(
        connect_timeout=silent_s,
        request_timeout=silent_s,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_attempts(silent_s)),
        **options,
    )


def delta_options(uri: str) -> dict[str, str]:
    """Options for `deltalake`."""
    options = {
        "AWS_REGION": _region(split(uri)[0]),
        "aws_conditional_put": "etag",
        "connect_timeout": _duration(silence_s()),
        # The time for one whole request, and that for a request with its repetitions; together half of the bound.
        "timeout": _duration(timeout_s() / 4),
        "retry_timeout": _duration(timeout_s() / 4),
        "backoff_config.max_backoff": _duration(timeout_s() / 16),
    }
    if url := endpoint():
        options |= {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": str(url.startswith("http://")).lower()}
    return options


def get(uri: str) -> bytes:
    """The bytes of an object."""
    bucket, key = split(uri)
    with client(bucket) as asked, contextlib.closing(asked.get_object(Bucket=bucket, Key=key)["Body"]) as body:
        return bytes(body.read())


def put(uri: str, data: bytes) -> None:
    """Write an object."""
    bucket, key = split(uri)
    with client(bucket) as asked:
        asked.put_object(Bucket=bucket, Key=key, Body=data)


def create(uri: str, data: bytes) -> bool:
    """Write an object where there is none; otherwise whether the one there has the same bytes, as after a lost answer.

    A 409, from a store that is busy with another request for this key, is raised: nobody knows yet who comes first.
    """
    bucket, key = split(uri)
    try:
        with client(bucket) as asked:
            asked.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
            raise
    else:
        return True
    try:
        return get(uri) == data
    except ClientError as error:
        if _is_missing(error):
            return False  # it was there a moment ago
        raise


def delete(uri: str) -> None:
    """Remove an object, if there is one."""
    bucket, key = split(uri)
    with client(bucket) as asked:
        asked.delete_object(Bucket=bucket, Key=key)


def size_bytes(uri: str) -> int | None:
    """The size of an object; None where there is none."""
    bucket, key = split(uri)
    if not key:
        return None
    try:
        with client(bucket) as asked:
            return int(asked.head_object(Bucket=bucket, Key=key)["ContentLength"])
    except ClientError as error:
        if _is_missing(error):
            return None
        raise


def pages(uri: str, *, what: str) -> Iterator[list[tuple[str, int]]]:
    """The objects below a prefix, key and size of each, as many at once as the store gives in one answer."""
    bucket, key = split(uri)
    more: dict[str, str] = {}
    with client(bucket) as asked:
        while True:
            ask = functools.partial(asked.list_objects_v2, Bucket=bucket, Prefix=f"{key}/" if key else "", **more)
            page = retry_transient(ask, what)
            yield [(found["Key"], found["Size"]) for found in page.get("Contents", ()) if found["Key"][-1] != "/"]
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


def download(uri: str, path: Path) -> None:
    """Write an object of any size as a file, which is there in whole or not at all."""
    bucket, key = split(uri)
    try:
        with _carrier(bucket) as carrier:
            carrier.download_file(bucket, key, str(path))
    except RetriesExceededError as error:
        raise error.last_exception from error


def upload(path: Path, uri: str) -> None:
    """Write a file of any size as an object, which is there in whole or not at all."""
    bucket, key = split(uri)
    with path.open("rb") as file, _carrier(bucket) as carrier:
        carrier.upload_fileobj(file, bucket, key)


def copy(source_uri: str, target_uri: str) -> None:
    """Have the store itself copy an object."""
    (source, source_key), (target, target_key) = split(source_uri), split(target_uri)
    named = {"Bucket": source, "Key": source_key}
    with _carrier(target) as carrier, _carrier(source) as reader:
        carrier.copy(named, target, target_key, SourceClient=reader)


def _is_missing(error: ClientError) -> bool:
    """Whether an error says that there is no such object."""
    return error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey")


def _carrier(bucket: str) -> contextlib.AbstractContextManager[Any]:
    # A large file is many requests: each has attempts of its own, so that not the whole is done again for one of them.
    return client(bucket, attempts=_attempts(2 * silence_s()))


def _attempts(silent_s: float) -> int:
    """How many attempts fit into half of the bound when all meet silence, and pause for 0 to 1, 2, 4, ... s between."""
    longest_s = {n: n * silent_s + (2 ** (n - 1) - 1) / 2 for n in range(2, _MOST_ATTEMPTS + 1)}
    return max((n for n, s in longest_s.items() if s <= timeout_s() / 2), default=1)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms"


def _region(bucket: str) -> str:
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if named:
        return named
    return "us-east-1" if endpoint() else _configured_region(bucket)


@functools.cache
def _configured_region(bucket: str) -> str:
    what = f"cannot find the region of bucket {bucket!r}; set AWS_REGION"
    try:
        return boto3.Session().region_name or str(retry_transient(lambda: pafs.resolve_s3_region(bucket), what))
    except OSError as error:
        raise StorageError(f"{what} ({error})") from error
