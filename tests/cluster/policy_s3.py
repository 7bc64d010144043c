"""A proxy in front of an S3 server that lets through what an IAM policy allows, and refuses the rest as S3 does."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faulty_s3 import FaultyS3


def action_of(method: str, path: str) -> str:
    """The right that S3 asks for a request, https://docs.aws.amazon.com/service-authorization (Amazon S3).

    A copy also asks for the right to read its source, which this does not see: every source here is readable.
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
        return f"another right: {method} {path}"
    return {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "DELETE": "s3:DeleteObject"}.get(method, "s3:PutObject")


def allows(policy: Mapping[str, Any], action: str, resource: str) -> bool:
    """Whether a statement allows the action on that ARN; policies without conditions and denials only."""
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow" and "Condition" not in statement
        if action in statement["Action"] and any(fnmatch.fnmatchcase(resource, one) for one in statement["Resource"]):
            return True
    return False


def without(policy: Mapping[str, Any], sid: str, action: str) -> dict[str, Any]:
    """The policy with one action less in one statement."""
    return {
        **policy,
        "Statement": [
            {**one, "Action": [name for name in one["Action"] if one["Sid"] != sid or name != action]}
            for one in policy["Statement"]
        ],
    }


class PolicyS3(FaultyS3):
    """The proxy; `asked` are the actions and objects that were asked for, `refused` those that were not given."""

    def __init__(self, upstream: str, policy: Mapping[str, Any]) -> None:
        super().__init__(upstream, seed=0)
        self.policy = policy
        self.asked: set[tuple[str, str]] = set()
        self.refused: set[tuple[str, str]] = set()

    def draw(self, method: str, path: str) -> str:
        """`denied` where the policy does not allow the request."""
        action = action_of(method, path)
        # A slash at the end belongs to the key: `persona/` is inside of `persona/*`.
        place = unquote(urlsplit(path).path).removeprefix("/")
        if action == "s3:ListBucket" or (action == "s3:DeleteObject" and method == "POST"):
            place = place.split("/")[0]
        resource = f"arn:aws:s3:::{place}"
        many = action == "s3:DeleteObject" and method == "POST"  # the keys are in its body
        allowed = allows(self.policy, action, f"{resource}/persona/" if many else resource)
        (self.asked if allowed else self.refused).add((action, place))
        return "passed" if allowed else "denied"


def actions(asked: Iterable[tuple[str, str]]) -> set[str]:
    """The actions alone."""
    return {action for action, _ in asked}
