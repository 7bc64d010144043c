"""The tally counts each unit once and does not grow with the number of units."""

import pytest

from jobs.runtime import tally
from jobs.runtime.tally import TallyActor


class NoMetrics:
    """Ray's metrics need a running Ray."""

    def update(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> TallyActor:
    monkeypatch.setattr(tally, "RunMetrics", NoMetrics)
    monkeypatch.setattr(tally, "_UNITS_KEPT", 100)
    return TallyActor()


def test_a_later_report_replaces_the_earlier_one(actor: TallyActor) -> None:
    actor.add("read", "a", {"rows": 3})
    actor.add("read", "b", {"rows": 10})
    actor.add("read", "a", {"rows": 5})
    assert actor.totals() == {"read": {"rows": 15}}


def test_old_units_are_folded_into_the_sums(actor: TallyActor) -> None:
    for number in range(10_000):
        actor.add("read", str(number), {"rows": 1})
        actor.add("read", str(number), {"rows": 2})
    assert actor.totals() == {"read": {"rows": 20_000}}
    assert len(actor._units) == 100
