"""Paths and `s3://` URIs in one normal form; what the libraries would misread is refused."""

import os
import re
from pathlib import Path

from persona.errors import UsageError

S3 = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# The characters allowed in the path of an S3 URI. Ray and pyarrow silently send a URI with other characters to the
# local disk, or read them as a query.
_KEY = re.compile(r"[A-Za-z0-9!_.*'()/=+,:@&$;~-]*")


def is_s3(uri: str) -> bool:
    """Whether the URI names an object store rather than this machine's disk."""
    return uri.startswith(S3)


def check_uri(uri: str, *, flag: str) -> str:
    """The URI in its one normal form: no trailing slash, a local path absolute.

    Raises `UsageError`, naming `flag`, for a URI that the libraries below would misunderstand. The text of an
    S3 URI that may hold a password is not repeated.
    """
    if not uri.strip():
        raise UsageError(f"{flag}: the path is empty; give a local path or s3://bucket/prefix")
    scheme, colon, rest = uri.partition("://")
    if not colon or scheme == "file":
        return os.path.normpath(Path(rest if colon else uri).expanduser().absolute())
    if scheme != "s3":
        raise UsageError(f"{flag}: unknown scheme {scheme}://; give a local path or s3://bucket/prefix")
    bucket, _, key = rest.partition("/")
    if "@" in bucket:
        raise UsageError(
            f"{flag}: credentials do not belong in a URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    if not bucket:
        raise UsageError(f"{flag}: {uri!r} names no bucket; give s3://bucket/prefix")
    bad = next((c for c in key if not _KEY.fullmatch(c)), None)
    if bad is not None:
        name = "a space" if bad == " " else f"the character {bad!r}"
        raise UsageError(f"{flag}: {uri!r} holds {name}; use ASCII letters, digits and - _ . = / in an s3:// path")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{flag}: {bucket!r} cannot be a bucket: 3 to 63 of a-z 0-9 . - are allowed")
    parts = [part for part in key.split("/") if part]
    if ".." in parts or "." in parts:
        raise UsageError(f"{flag}: {uri!r} holds a relative part (. or ..), which object stores take literally")
    return join(f"{S3}{bucket}", *parts)


def join(uri: str, *parts: str) -> str:
    """`uri` with the parts behind it, one slash between."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])
