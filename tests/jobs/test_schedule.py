"""The weekly schedule on a real Ray and an S3 server: every step as steps.sh gives it, a promotion, and a refusal."""

import importlib
import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.cli import run
from persona.storage import copy_folder
from persona.store import registry
from persona.store.store import Store
from tests.cluster.manifests import CLUSTER, calls_job
from tests.jobs.conftest import START, Row, new_plug, write

STEPS = CLUSTER / "schedule" / "steps.sh"
FLAGS = {
    "REFRESH_FLAGS": "--sync --buckets 4 --max-tokens 32",
    "REQUESTS_FLAGS": "--buckets 2 --max-a-user 3",
    "TRAIN_FLAGS": "--weights mean --persona-tokens 4 --persona-gain 1 --warm-start none --alignment 0 "
    "--learning-rate 0.03 --epochs 12 --global-batch 16 "
    "--micro-batch 16 --validate-every 1000 --max-input-tokens 32 --max-target-tokens 16 --precision fp32 "
    "--validation-fraction 0.2",
    "EVALUATE_FLAGS": "--actors 1 --precision fp32",
    "GENERATE_FLAGS": "--beams 1 --max-new-tokens 4 --actors 1",
}
LETTERS = "abcdefgh"


def texts(users: range) -> list[Row]:
    """Six texts of each user, who writes of nothing but one letter; so do users of the other set."""
    return [
        {
            "user_id": f"user-{user}",
            "behavior_id": f"b{number}",
            "text": " ".join([LETTERS[user % len(LETTERS)] * 3] * 3),
            "timestamp": START + timedelta(days=number),
        }
        for user in users
        for number in range(6)
    ]


def commands(step: str, day: str, **environment: str) -> list[list[str]]:
    """What steps.sh runs, as words."""
    done = subprocess.run(
        ["bash", STEPS, step, day],
        env={**os.environ, **environment, "WHERE": "print"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Runs steps in this process, on the local Ray, with the files of a bucket."""

    corp: str
    environment: dict[str, str]
    capsys: pytest.CaptureFixture[str]

    def run(self, step: str, day: str) -> tuple[int, dict[str, Any]]:
        """Exit code and result of the last job of a step."""
        code, result = 0, {}
        for words in commands(step, day, **self.environment):
            call = calls_job(words)
            assert call is not None
            job = importlib.import_module(call[1])
            self.capsys.readouterr()
            code = run(job.Config, job.main, call[2])
            out, said = self.capsys.readouterr()
            assert out, said
            result = json.loads(out.splitlines()[-1])
        return code, result

    @property
    def live(self) -> str:
        """The folder of the live plug."""
        return registry.read(Store.open(f"{self.corp}/persona/store")).require_live().uri


@pytest.fixture
def schedule(local_ray: None, s3: str, models: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Schedule:
    for name in ("encoder", "llama"):
        copy_folder(models[name], f"{s3}/models/{name}")
    write(f"{s3}/histories/train/a.parquet", texts(range(24)))
    write(f"{s3}/histories/held-out/a.parquet", texts(range(24, 40)))
    asked = [{"request_id": f"q{user}", "user_id": f"user-{user}", "input": "What next?"} for user in range(4)]
    write(f"{s3}/requests/today.jsonl", asked)
    paths = {"CORP": s3, "ENCODER": f"{s3}/models/encoder", "LLM": f"{s3}/models/llama"}
    return Schedule(corp=s3, environment={**paths, **FLAGS}, capsys=capsys)


@pytest.mark.soak
def test_the_weekly_schedule_promotes_a_plug_and_refuses_a_worse_one(schedule: Schedule, tmp_path: Path) -> None:
    untrained = new_plug(tmp_path / "plug", f"{schedule.corp}/models/encoder", f"{schedule.corp}/models/llama")
    first = {step: schedule.run(step, "2026-12-06") for step in weekly()}
    assert {step: code for step, (code, _) in first.items()} == dict.fromkeys(weekly(), 0), first["promote"]
    assert first["promote"][1]["promoted"]
    assert schedule.live.endswith("/plugs/2026-12-06")
    assert first["generate"][1]["answered"] == 4

    # The next week's plug has learned nothing.
    copy_folder(untrained, f"{schedule.corp}/persona/plugs/2026-12-13")
    copy_folder(f"{schedule.corp}/persona/requests/2026-12-06", f"{schedule.corp}/persona/requests/2026-12-13")
    worse = {step: schedule.run(step, "2026-12-13") for step in ("evaluate", "promote", "generate")}
    assert {step: code for step, (code, _) in worse.items()} == {"evaluate": 0, "promote": 4, "generate": 0}
    assert [check["holds"] for check in worse["promote"][1]["checks"]] == [False, False]
    assert schedule.live.endswith("/plugs/2026-12-06")
    assert worse["generate"][1]["already_answered"] == 4


def weekly() -> list[str]:
    done = subprocess.run(["bash", STEPS, "--list", "weekly"], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()
