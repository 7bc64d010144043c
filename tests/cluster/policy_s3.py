"""A proxy in front of an S3 server that allows what an IAM policy allows and refuses the rest as S3 does."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faulty_s3 import FaultyS3


def action_of(method: str, path: str) -> str:
    """The permission that S3 requires for a request, https://docs.aws.amazon.com/service-authorization (Amazon S3).

    A copy also requires permission to read its source. That is not checked, because every source here is readable.
    """
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    has_key = "/" in parts.path.strip("/")
    if method == "GET" and "uploadId" in query:
        return "s3:ListMultipartUploadParts"
    if method == "DELETE" and "uploadId" in query:
        return "s3:AbortMultipartUpload"
    if method == "POST" and "delete" in query:
        return "s3:DeleteObject"
    if not has_key:
        if not set(query) & {"location", "uploads", "versioning", "policy", "lifecycle"} and method in ("GET", "HEAD"):
            return "s3:ListBucket"
        return f"another permission: {method} {path}"
    return {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "DELETE": "s3:DeleteObject"}.get(method, "s3:PutObject")


def allows(policy: Mapping[str, Any], action: str, resource: str) -> bool:
    """Whether a statement allows the action on that ARN. Conditions and denials are not supported."""
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow" and "Condition" not in statement
        if action in statement["Action"] and any(fnmatch.fnmatchcase(resource, one) for one in statement["Resource"]):
            return True
    return False


def without(policy: Mapping[str, Any], sid: str, action: str) -> dict[str, Any]:
    """The policy without one action of one statement."""
    return {
        **policy,
        "Statement": [
            {**one, "Action": [name for name in one["Action"] if one["Sid"] != sid or name != action]}
            for one in policy["Statement"]
        ],
    }


class PolicyS3(FaultyS3):
    """The proxy; `allowed` and `refused` are the actions with their objects."""

    def __init__(self, upstream: str, policy: Mapping[str, Any]) -> None:
        super().__init__(upstream, seed=0)
        self.policy = policy
        self.allowed: set[tuple[str, str]] = set()
        self.refused: set[tuple[str, str]] = set()

    def draw(self, method: str, path: str) -> str:
        """`denied` where the policy does not allow the request."""
        action = action_of(method, path)
        # A trailing slash belongs to the key: `persona/` matches `persona/*`.
        key = unquote(urlsplit(path).path).removeprefix("/")
        if action == "s3:ListBucket" or (action == "s3:DeleteObject" and method == "POST"):
            key = key.split("/")[0]
        resource = f"arn:aws:s3:::{key}"
        many = action == "s3:DeleteObject" and method == "POST"  # its body lists the keys
        allowed = allows(self.policy, action, f"{resource}/persona/" if many else resource)
        (self.allowed if allowed else self.refused).add((action, key))
        return "passed" if allowed else "denied"


def actions(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """The actions without their objects."""
    return {action for action, _ in pairs}
