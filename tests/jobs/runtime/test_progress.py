"""Progress on a real terminal and in a log: stages, rates, time left, and nothing mixed into other output."""

import contextlib
import json
import os
import re
import termios
import threading
from collections.abc import Iterator

import pytest

from jobs.runtime import encoding, log, progress
from jobs.runtime.progress import Stage
from jobs.runtime.tally import Counts


class Counting:
    """The driver's end of a tally."""

    def __init__(self) -> None:
        self.counts: Counts = {}
        self.n_asked = 0
        self.asked = threading.Condition()

    def totals(self) -> Counts:
        with self.asked:
            self.n_asked += 1
            self.asked.notify_all()
            return self.counts

    def show(self, stage: str, rows: float) -> None:
        """Sets the counts, and waits until they are shown: the second question after that comes behind it."""
        with self.asked:
            self.counts = {stage: {"rows": rows}}
            last = self.n_asked
            assert self.asked.wait_for(lambda: self.n_asked >= last + 2, timeout=60)


def stage_of(counts: Counts) -> Stage | None:
    if "encode" in counts:
        note = f"{{{int(counts['encode']['rows'])}}}"
        return Stage(name="encode", done=int(counts["encode"]["rows"]), total=2000, unit="behaviors", note=note)
    if "read" in counts:
        return Stage(name="read", done=int(counts["read"]["rows"]), total=None, unit="behaviors")
    return None


def run(tally: Counting, say: str = "") -> None:
    """A job of two stages, the second in two halves."""
    with progress.progress(tally, "embed", stage_of):  # type: ignore[arg-type]
        tally.show("read", 1234)
        tally.show("encode", 0)
        tally.show("encode", 1000)
        if say:
            log.say(say, level="warning")
        tally.counts = {"encode": {"rows": 2000}}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REFRESH_S", 0.01)


@contextlib.contextmanager
def terminal() -> Iterator[list[str]]:
    """Makes stderr a terminal of 100 columns; the list gets the rows that a person sees at the end."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (40, 100))
    written: list[bytes] = []

    def read() -> None:  # all the while, because a terminal that nobody reads blocks its writer
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                written.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    rows: list[str] = []
    try:
        with os.fdopen(theirs, "w") as stream, contextlib.redirect_stderr(stream):
            yield rows
    finally:
        reader.join()
        os.close(ours)
        # A carriage return starts the row again; what is longer than the new text would stay.
        rows += [_overwritten(row) for row in b"".join(written).decode().replace("\r\n", "\n").split("\n")]


def _overwritten(row: str) -> str:
    seen = ""
    for part in row.split("\r"):
        seen = part + seen[len(part) :]
    return seen.rstrip()


def test_a_terminal_shows_one_bar_a_stage_and_each_stays() -> None:
    with terminal() as rows:
        run(Counting())
    read, encode, end = rows
    assert read == "embed: read 1,234 behaviors"
    assert re.fullmatch(
        r"embed: encode 100%\|█{20}\| 2,000 of 2,000 behaviors, [\d,.]+/s, took \d\d:\d\d, \{2000\}", encode
    )
    assert end == ""


def test_a_message_gets_a_row_of_its_own_between_the_bars() -> None:
    with terminal() as rows:
        run(Counting(), say="a warning")
    assert "a warning" in rows and rows[-1] == "" and rows[-2].startswith("embed: encode 100%")


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY_S", 0.0)
    run(Counting())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "embed: read 1,234 behaviors\n" in captured.err
    assert re.search(r"embed: encode 1,000 of 2,000 behaviors, [\d,.]+/s, \d\d:\d\d left, \{1000\}\n", captured.err)
    assert "\r" not in captured.err


def test_a_log_is_quiet_for_ten_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_LOG", "json")
    run(Counting())
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "embed: read 1,234 behaviors"


@pytest.mark.parametrize(
    ("done", "rate"), [(0, ""), (1, ", 2.0/min"), (3, ", 0.1/s"), (30, ", 1.0/s"), (36_000, ", 1,200/s")]
)
def test_rate_and_time_left_follow_from_what_was_done_under_our_eyes(
    done: int, rate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = progress._Lines("train")
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    first = Stage(name="train", done=500, total=72_500, unit="steps")
    display.show(first)
    now[0] = 30.0
    later = Stage(name="train", done=500 + done, total=72_500, unit="steps", note="loss 3.6")
    display.show(later)
    assert display.label(later) == "train"
    left = f", {progress_time((72_000 - done) * 30 / done)} left" if done else ""
    assert display.text(later) == f"{500 + done:,} of 72,500 steps{rate}{left}, loss 3.6"


def progress_time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def fail(tally: Counting) -> None:
    with progress.progress(tally, "embed", stage_of):  # type: ignore[arg-type]
        tally.show("encode", 500)
        raise ZeroDivisionError


def test_an_error_leaves_the_bar_where_it_was() -> None:
    with pytest.raises(ZeroDivisionError), terminal() as rows:
        fail(Counting())
    row, end = rows
    assert row.startswith("embed: encode  25%|█████     ") and end == ""


def test_a_long_block_tells_once_a_second_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[int]()
    monkeypatch.setattr(encoding.time, "perf_counter", lambda: now[0])
    on_batch = encoding._once_a_second(told.append, 50)
    for n_done in range(1, 51):
        now[0] += 0.3
        on_batch(n_done)
    assert told == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 50]
