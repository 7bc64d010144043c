"""Can a path be read or written? Asked before a job begins, with short time-outs."""

import os
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from persona.errors import StorageError, UsageError
from persona.storage import s3
from persona.storage.retry import is_transient, retry_transient
from persona.storage.uris import is_s3

_ANSWER_S = 5.0  # how long a store may be silent when `check_reachable` asks it
_ATTEMPTS = 4  # of that question, before a store that is not heard counts as one that is not there


def check_reachable(uri: str, *, flag: str, write: bool = False) -> None:
    """Ask, with short time-outs, whether `uri` can be read (or, with `write`, be written below).

    Raises `UsageError` for what the caller can put right (nothing there, no credentials or none that can be found, no
    such bucket) and `StorageError` for a store that refuses, does not answer (within seconds: its address may be
    wrong), or answers with errors for as long as `persona.storage.retry` lets it.
    """
    if is_s3(uri):
        _check_s3(uri, flag, write)
    elif not write:
        if not Path(uri).exists():
            raise UsageError(f"{flag}: {uri} does not exist")
        if not os.access(uri, os.R_OK):
            raise UsageError(f"{flag}: {uri} cannot be read by this user")
    else:
        there = next(p for p in (Path(uri), *Path(uri).parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"{flag}: {uri} cannot be written: {there} is no folder that this user may write to")


def _check_s3(uri: str, flag: str, write: bool) -> None:
    bucket, key = s3.split(uri)

    def ask() -> dict[str, Any]:
        try:
            if boto3.Session().get_credentials() is None:
                raise UsageError(
                    f"{flag}: {uri} needs credentials and there are none; set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL for a store other than AWS), or run under a role"
                )
            with s3.client(bucket, attempts=_ATTEMPTS, silent_s=_ANSWER_S) as client:
                return dict(client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1))
        except BotoCoreError as error:
            if not is_transient(error):
                # Nobody was asked yet: a profile that is not in the files, half a key, credentials that do not come.
                raise UsageError(
                    f"{flag}: {uri} cannot be asked for: {error}; check the AWS_ variables (AWS_PROFILE, for one) and "
                    "the files in ~/.aws"
                ) from None
            raise StorageError(
                f"{flag}: {s3.where()} does not answer ({type(error).__name__}); check AWS_ENDPOINT_URL and the network"
            ) from None

    try:
        # A store that answers "not now" is there, and is asked again for as long as by any other work.
        found = retry_transient(ask, f"{flag}: {s3.where()} cannot list {uri}")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code == "NoSuchBucket":
            raise UsageError(
                f"{flag}: there is no bucket {bucket!r} at {s3.where()}; create it or correct the name"
            ) from None
        raise StorageError(
            f"{flag}: {s3.where()} refused to list {uri} ({code}); check the key and its rights"
        ) from None
    if not write and not found.get("KeyCount"):
        raise UsageError(f"{flag}: there is nothing at {uri}")
