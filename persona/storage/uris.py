"""Normalize local paths and `s3://` URIs, and refuse those that a library would misread."""

import os
import re
from pathlib import Path

from persona.errors import UsageError

S3 = "s3://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# The characters allowed in the path of an S3 URI. With others, Ray and pyarrow silently use the local disk or parse a
# query string.
_KEY = re.compile(r"[A-Za-z0-9!_.*'()/=+,:@&$;~-]*")


_OTHER_CLOUDS = {
    **dict.fromkeys(("gs", "gcs"), "Google Cloud Storage"),
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl", "wasb", "wasbs"), "Azure Storage"),
}


def is_s3(uri: str) -> bool:
    """Whether the URI is on an object store rather than on the local disk."""
    return uri.startswith(S3)


def check_uri(uri: str, *, flag: str) -> str:
    """The URI in normal form: no trailing slash, and a local path absolute.

    Raises `UsageError`, naming `flag`, for a URI that a library would misread. The message does not repeat text that
    may contain a password.
    """
    if not uri.strip():
        raise UsageError(f"{flag}: the path is empty; give a local path or s3://bucket/prefix")
    scheme, colon, rest = uri.partition("://")
    if not colon or scheme == "file":
        return os.path.normpath(Path(rest if colon else uri).expanduser().absolute())
    if scheme in _OTHER_CLOUDS:
        raise UsageError(
            f"{flag}: {_OTHER_CLOUDS[scheme]} ({scheme}://) is not supported: commits rely on a store that refuses to "
            "create an object twice, which is tested on S3 and S3-compatible stores only; give s3://bucket/prefix or a "
            "local path"
        )
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
        raise UsageError(f"{flag}: {uri!r} contains {name}; use ASCII letters, digits and - _ . = / in an s3:// path")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{flag}: {bucket!r} is not a valid bucket name: use 3 to 63 of the characters a-z 0-9 . -")
    parts = [part for part in key.split("/") if part]
    if ".." in parts or "." in parts:
        raise UsageError(f"{flag}: {uri!r} contains . or .., which object stores take literally; remove it")
    return join(f"{S3}{bucket}", *parts)


def join(uri: str, *parts: str) -> str:
    """`uri` followed by the parts, separated by single slashes."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])
