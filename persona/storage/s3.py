"""S3 clients with their timeouts, and the object requests that `persona.storage` is built on.

A request raises its library's own errors; `persona.storage.retry` decides which of them are transient.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
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

_MAX_ATTEMPTS = 5
_session_lock = threading.Lock()


def split(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = uri.removeprefix(S3).partition("/")
    return bucket, key


def endpoint() -> str | None:
    """The endpoint URL from the environment, for a store other than AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def store_name() -> str:
    """The store's name for messages, without any credentials in the endpoint URL."""
    url = endpoint()
    return (urlsplit(url).hostname or "the endpoint") if url else "AWS S3"


@contextlib.contextmanager
def client(bucket: str, *, attempts: int = 1, silent_s: float | None = None) -> Iterator[Any]:
    """A client for `bucket` that gives up on a request after `silent_s` seconds without a byte."""
    with contextlib.closing(_new_client(bucket, attempts, silent_s)) as connection:
        yield connection


def _new_client(bucket: str, attempts: int = 1, silent_s: float | None = None) -> Any:
    wait_s = 2 * silence_s() if silent_s is None else silent_s
    config = Config(
        connect_timeout=min(silence_s(), wait_s),
        read_timeout=wait_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    with _session_lock:  # all threads share the default session, which is expensive to create and not thread-safe
        return boto3.client("s3", region_name=_region(bucket), endpoint_url=endpoint(), config=config)


def filesystem(bucket: str) -> pafs.S3FileSystem:
    """The Arrow filesystem for `bucket`. It holds the secret key."""
    options: dict[str, Any] = {"region": _region(bucket)}
    if url := endpoint():
        parts = urlsplit(url)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    silent_s = max(silence_s(), 1.0)  # curl enforces it, in whole seconds
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
        # The limits for one request and for its retries; together half of the overall limit.
        "timeout": _duration(timeout_s() / 4),
        "retry_timeout": _duration(timeout_s() / 4),
        "backoff_config.max_backoff": _duration(timeout_s() / 16),
    }
    if url := endpoint():
        options |= {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": str(url.startswith("http://")).lower()}
    return options


def get(uri: str) -> bytes:
    """The content of an object."""
    bucket, key = split(uri)
    with (
        client(bucket) as connection,
        contextlib.closing(connection.get_object(Bucket=bucket, Key=key)["Body"]) as body,
    ):
        return bytes(body.read())


def get_range(uri: str, start: int, length: int) -> bytes:
    """`length` bytes of an object from `start` on; cheap enough to be called a million times."""
    bucket, key = split(uri)
    connection = _lasting_client(bucket, endpoint(), silence_s())
    found = connection.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
    with contextlib.closing(found["Body"]) as body:
        return bytes(body.read())


@functools.lru_cache(maxsize=8)
def _lasting_client(bucket: str, url: str | None, silent_s: float) -> Any:
    """A client that this process keeps, as making one takes longer than a small request."""
    del url, silent_s  # from the environment, as a new client has them
    return _new_client(bucket)


def put(uri: str, data: bytes) -> None:
    """Write an object."""
    bucket, key = split(uri)
    with client(bucket) as connection:
        connection.put_object(Bucket=bucket, Key=key, Body=data)


def create(uri: str, data: bytes) -> bool:
    """Write an object unless it exists; returns whether the object has these bytes.

    An existing object with the same bytes is our own, written by a request whose response was lost. A 409 (the store is
    handling another request for this key) is raised, because it does not tell which request wins.
    """
    bucket, key = split(uri)
    try:
        with client(bucket) as connection:
            connection.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
            raise
    else:
        return True
    try:
        return get(uri) == data
    except ClientError as error:
        if _is_missing(error):
            return False  # deleted since
        raise


def delete(uri: str) -> None:
    """Delete an object if it exists."""
    bucket, key = split(uri)
    with client(bucket) as connection:
        connection.delete_object(Bucket=bucket, Key=key)


def head(uri: str) -> tuple[int, str] | None:
    """The size of an object in bytes, and its tag; None if it does not exist."""
    bucket, key = split(uri)
    if not key:
        return None
    try:
        with client(bucket) as connection:
            found = connection.head_object(Bucket=bucket, Key=key)
            return int(found["ContentLength"]), _tag(found)
    except ClientError as error:
        if _is_missing(error):
            return None
        raise


def age_s(uri: str) -> float | None:
    """Seconds since an object was written, by the store's clock. None if it does not exist, or the store tells no time.

    Object stores give both times in whole seconds.
    """
    bucket, key = split(uri)
    try:
        with client(bucket) as connection:
            found = connection.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if _is_missing(error):
            return None
        raise
    now = found["ResponseMetadata"]["HTTPHeaders"].get("date")
    return None if now is None else float((parsedate_to_datetime(now) - found["LastModified"]).total_seconds())


def pages(uri: str, *, what: str) -> Iterator[list[tuple[str, int, str]]]:
    """Key, size in bytes and tag of the objects below a prefix, one list per page of the store's response."""
    bucket, key = split(uri)
    more: dict[str, str] = {}
    with client(bucket) as connection:
        while True:
            request = functools.partial(
                connection.list_objects_v2, Bucket=bucket, Prefix=f"{key}/" if key else "", **more
            )
            page = retry_transient(request, what)
            objects = [found for found in page.get("Contents", ()) if found["Key"][-1] != "/"]
            yield [(found["Key"], found["Size"], _tag(found)) for found in objects]
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


def download(uri: str, path: Path) -> None:
    """Download an object of any size to a file that appears whole or not at all."""
    bucket, key = split(uri)
    try:
        with _transfer_client(bucket) as connection:
            connection.download_file(bucket, key, str(path))
    except RetriesExceededError as error:
        raise error.last_exception from error


def upload(path: Path, uri: str) -> None:
    """Upload a file of any size to an object that appears whole or not at all."""
    bucket, key = split(uri)
    with path.open("rb") as file, _transfer_client(bucket) as connection:
        connection.upload_fileobj(file, bucket, key)


def copy(source_uri: str, target_uri: str) -> None:
    """Copy an object of any size within the store, without downloading it."""
    (source, source_key), (target, target_key) = split(source_uri), split(target_uri)
    with _transfer_client(target) as writer, _transfer_client(source) as reader:
        writer.copy({"Bucket": source, "Key": source_key}, target, target_key, SourceClient=reader)


def _tag(found: Mapping[str, Any]) -> str:
    """What changes with an object's content."""
    etag = str(found["ETag"]).strip('"')
    return f"etag:{etag}"


def _is_missing(error: ClientError) -> bool:
    """Whether the error means that the object does not exist."""
    return error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey")


def _transfer_client(bucket: str) -> contextlib.AbstractContextManager[Any]:
    # A large file is many requests: retrying each one avoids repeating the whole file.
    return client(bucket, attempts=_attempts(2 * silence_s()))


def _attempts(silent_s: float) -> int:
    """How many attempts fit into half of the time limit if each times out, with pauses of up to 1, 2, 4, ... s."""
    total_s = {n: n * silent_s + (2 ** (n - 1) - 1) / 2 for n in range(2, _MAX_ATTEMPTS + 1)}
    return max((n for n, s in total_s.items() if s <= timeout_s() / 2), default=1)


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms"


def _region(bucket: str) -> str:
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        return region
    return "us-east-1" if endpoint() else _configured_region(bucket)


@functools.cache
def _configured_region(bucket: str) -> str:
    what = f"cannot find the region of bucket {bucket!r}; set AWS_REGION"
    try:
        return boto3.Session().region_name or str(retry_transient(lambda: pafs.resolve_s3_region(bucket), what))
    except OSError as error:
        raise StorageError(f"{what} ({error})") from error
