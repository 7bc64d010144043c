"""Check with short timeouts, before a job starts, that a path can be read or written."""

import os
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from persona.errors import StorageError, UsageError
from persona.storage import s3
from persona.storage.retry import is_transient, retry_transient
from persona.storage.uris import is_s3

_SILENCE_S = 5.0  # how long the store may send nothing during this check
_ATTEMPTS = 4  # before a store that does not respond counts as unreachable


def check_reachable(uri: str, *, flag: str, write: bool = False) -> None:
    """Check that `uri` can be read or, with `write`, that something can be written below it.

    Raises:
        UsageError: The user can fix it: nothing at `uri`, missing or unusable credentials, no such bucket.
        StorageError: The store denies the request, does not respond within seconds (its address may be wrong), or
            keeps responding with errors until the time limit of `persona.storage.retry`.
    """
    if is_s3(uri):
        _check_s3(uri, flag, write)
    elif write:
        _check_local_write(uri, flag)
    elif not Path(uri).exists():
        raise UsageError(f"{flag}: {uri} does not exist")
    elif not os.access(uri, os.R_OK):
        raise UsageError(f"{flag}: {uri} is not readable by this user")


def _check_local_write(uri: str, flag: str) -> None:
    existing = next(path for path in (Path(uri), *Path(uri).parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{flag}: {uri} cannot be written: {existing} is not a folder writable by this user")


def _check_s3(uri: str, flag: str, write: bool) -> None:
    try:
        # A store that responds with "not now" is reachable: retry for as long as any other work would.
        page = retry_transient(lambda: _first_page(uri, flag), f"{flag}: {s3.store_name()} cannot list {uri}")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code == "NoSuchBucket":
            bucket, _ = s3.split(uri)
            raise UsageError(
                f"{flag}: there is no bucket {bucket!r} at {s3.store_name()}; create it or correct the name"
            ) from None
        raise StorageError(
            f"{flag}: {s3.store_name()} refused to list {uri} ({code}); check the credentials and their permissions"
        ) from None
    if not write and not page.get("KeyCount"):
        raise UsageError(f"{flag}: there is nothing at {uri}")


def _first_page(uri: str, flag: str) -> dict[str, Any]:
    """The store's response to a listing of at most one object."""
    bucket, key = s3.split(uri)
    try:
        if boto3.Session().get_credentials() is None:
            raise UsageError(
                f"{flag}: {uri} needs credentials and none were found; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store other than AWS), or run under a role"
            )
        with s3.client(bucket, attempts=_ATTEMPTS, silent_s=_SILENCE_S) as client:
            return dict(client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1))
    except BotoCoreError as error:
        if is_transient(error):
            raise StorageError(
                f"{flag}: {s3.store_name()} does not respond ({type(error).__name__}); check AWS_ENDPOINT_URL and "
                "the network"
            ) from None
        # No request was sent: an unknown profile, half a key pair, or no credentials from their provider.
        raise UsageError(
            f"{flag}: cannot prepare a request for {uri}: {error}; check the AWS_ variables (such as AWS_PROFILE) and "
            "the files in ~/.aws"
        ) from None
