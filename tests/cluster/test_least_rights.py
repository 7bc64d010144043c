"""The policy of `cluster/aws` is minimal: all jobs pass with it, and a job without one of its permissions says so."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from jobs import embed, forget
from persona.errors import StorageError
from persona.storage import copy_folder, join
from tests.cluster.manifests import ROOT, policy
from tests.cluster.policy_s3 import PolicyS3, action_of, actions, without
from tests.jobs.conftest import TRAINING, Job, arguments, behaviors, requests, write

POLICY = policy("store-policy.json")
ABORT = "s3:AbortMultipartUpload"  # only needed after a failure
PERMISSIONS = [(one["Sid"], action) for one in POLICY["Statement"] for action in one["Action"] if action != ABORT]


@pytest.fixture
def guarded(s3: str) -> Iterator[PolicyS3]:
    """A proxy that applies the policy to this bucket instead of `corp`. This process bypasses it."""
    mine = json.loads(json.dumps(POLICY).replace(":::corp", f":::{s3.removeprefix('s3://')}"))
    with PolicyS3(os.environ["AWS_ENDPOINT_URL"], mine) as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("request_line", "action"),
    [
        ("GET /b?list-type=2&prefix=a", "s3:ListBucket"),
        ("HEAD /b", "s3:ListBucket"),
        ("HEAD /b/a/c", "s3:GetObject"),
        ("PUT /b/a?partNumber=1&uploadId=x", "s3:PutObject"),
        ("POST /b/a?uploads", "s3:PutObject"),
        ("DELETE /b/a?uploadId=x", "s3:AbortMultipartUpload"),
        ("POST /b?delete", "s3:DeleteObject"),
        ("DELETE /b/a", "s3:DeleteObject"),
        ("GET /b?location", "another permission: GET /b?location"),
    ],
)
def test_a_request_requires_a_permission(request_line: str, action: str) -> None:
    assert action_of(*request_line.split(" ", 1)) == action


class Breaking(PolicyS3):
    """Refuses the second part of any upload."""

    def draw(self, method: str, path: str) -> str:
        return "denied" if "partNumber=2" in path else super().draw(method, path)


@pytest.mark.parametrize("may_abort", [True, False])
def test_a_failed_upload_leaves_no_parts_with_the_permission_to_abort(
    may_abort: bool, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, direct = s3.removeprefix("s3://"), boto3.client("s3")
    large = tmp_path / "large"
    large.write_bytes(bytes(20 * 2**20))
    mine = json.loads(json.dumps(POLICY).replace(":::corp", f":::{bucket}"))
    with Breaking(os.environ["AWS_ENDPOINT_URL"], mine) as proxy:
        proxy.policy = mine if may_abort else without(mine, "ReadAndWriteOutputs", ABORT)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageError, match="UploadPart operation"):
            copy_folder(str(tmp_path), join(s3, "persona/plug"))
        assert (ABORT in actions(proxy.refused)) != may_abort
    left = direct.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert bool(left) != may_abort


@pytest.mark.parametrize(("sid", "action"), PERMISSIONS)
def test_a_job_without_a_permission_says_what_was_refused(
    sid: str,
    action: str,
    guarded: PolicyS3,
    s3: str,
    models: dict[str, str],
    do: Job,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(join(s3, "histories/a.parquet"), behaviors())
    store = join(s3, "persona/store")
    refresh = {"histories": join(s3, "histories"), "store": store, "encoder": models["encoder"], "buckets": 4}
    if action == "s3:DeleteObject":
        assert do(embed, **refresh).code == 0  # a store that can be searched for users to forget
    guarded.policy = without(guarded.policy, sid, action)
    monkeypatch.setenv("AWS_ENDPOINT_URL", guarded.url)
    done = do(forget, store=store, user="user-1") if action == "s3:DeleteObject" else do(embed, **refresh)
    assert done.code != 0 and action in actions(guarded.refused)
    # The message names the object and the refusal; no traceback is needed.
    assert "s3://" in done.said and "Traceback" not in done.said
    assert any(word in done.said for word in ("AccessDenied", "Access Denied", "ACCESS_DENIED", "403", "denied"))


def run(guarded: PolicyS3, job: str, *words: str, **flags: Any) -> dict[str, Any]:
    """Runs a job in a new process with its own Ray; its storage requests go through the proxy."""
    environment = {**os.environ, "AWS_ENDPOINT_URL": guarded.url, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", f"jobs.{job}", *words, *arguments(**flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:] + str(guarded.refused)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_all_jobs_pass_with_the_policy_and_use_every_permission(
    guarded: PolicyS3, s3: str, models: dict[str, str], tmp_path: Path
) -> None:
    for name in ("encoder", "llama"):
        copy_folder(models[name], join(s3, "persona/models", name))
    encoder, llm = (join(s3, "persona/models", name) for name in ("encoder", "llama"))
    outputs = {"store": join(s3, "persona/store"), "plug": join(s3, "persona/plug")}
    histories, store = join(s3, "histories"), outputs["store"]
    write(join(histories, "a.parquet"), behaviors())
    file = write(join(s3, "requests/a.jsonl"), requests())
    refresh: dict[str, Any] = {"histories": histories, "store": store, "encoder": encoder, "max_tokens": 32}
    run(guarded, "embed", **refresh, buckets=4)
    training = {**TRAINING, "validation": file, "runs": join(s3, "persona/runs")}
    run(guarded, "train", requests=file, llm=llm, **outputs, **training)
    run(guarded, "generate", requests=file, persona=("own", "none", "other"), beams=1, max_new_tokens=4, **outputs)
    run(guarded, "evaluate", requests=file, out=join(s3, "persona/report"), **outputs)
    edited = [{**row, "text": f"{row['text']} indeed"} for row in behaviors()[:-3]]
    write(join(histories, "a.parquet"), edited)
    run(guarded, "embed", **refresh, sync=True, plug=outputs["plug"])
    for action in ("compact", "vacuum", "verify", "show"):
        run(guarded, "store", action, store=store)
    run(guarded, "forget", store=store, user="user-1")
    # Arrow requests a bucket that cannot exist, to find out what kind of server this is. S3 refuses that, too.
    assert {key for _, key in guarded.refused} <= {"$extremelyunlikelytoexist$"}
    assert actions(guarded.allowed) - {ABORT} == {action for _, action in PERMISSIONS}
