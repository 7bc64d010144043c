"""Log lines on stderr: plain text, and JSON with PERSONA_LOG=json."""

import json

import pytest

from jobs import embed
from jobs.runtime import cli, log
from jobs.runtime.cli import Summary
from tests.jobs.conftest import Job


def broken(_config: embed.Config) -> Summary:
    raise ZeroDivisionError("a bug")


def test_lines_are_plain_text_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    log.say("embed: 3 of 4")
    log.say("no such file", level="error")
    assert capsys.readouterr().err == "embed: 3 of 4\nerror: no such file\n"


def test_with_persona_log_json_every_line_is_an_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, refuse: Job
) -> None:
    monkeypatch.setenv("PERSONA_LOG", "json")
    log.say("embed: 3 of 4\nand more")
    said = refuse(embed, histories="/nowhere", store="/nowhere/store").said
    lines = [json.loads(line) for line in (capsys.readouterr().err + said).splitlines()]
    assert lines and all(line.keys() == {"time", "level", "message"} for line in lines)
    assert lines[-1]["level"] == "error" and "/nowhere" in lines[-1]["message"]


def test_a_bug_is_one_line_with_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_LOG", "json")
    assert cli.run(embed.Config, broken, ["--histories", "a", "--store", "b"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert found["level"] == "error" and "a bug" in found["message"] and "broken" in found["traceback"]
    monkeypatch.delenv("PERSONA_LOG")
    with pytest.raises(ZeroDivisionError):
        cli.run(embed.Config, broken, ["--histories", "a", "--store", "b"])
