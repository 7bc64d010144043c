"""How a user's pairs are split in order of time, and what a profile's fingerprint and texts depend on."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from persona.errors import UsageError
from persona.front_texts import FrontTexts
from persona.profiling.options import ProfileOptions
from persona.profiling.pairs import Demonstration, Pair, split
from persona.profiling.profile import Profile, fingerprint, texts_in_front

START = datetime(2024, 1, 1, tzinfo=UTC)


def pairs(n: int, *, per_day: int = 1) -> list[Pair]:
    """Pairs in a random order."""
    found = [
        Pair(
            request_id=f"r{number:02}",
            input=f"question {number}",
            target=f"yes {number}",
            rejected=f"no {number}",
            as_of=START + timedelta(days=number // per_day),
        )
        for number in range(n)
    ]
    return found[1::2] + found[::2]


def ids(found: tuple[Pair, ...]) -> list[int]:
    return [int(pair.request_id[1:]) for pair in found]


@pytest.mark.parametrize(
    ("n", "holdout", "expected"),
    [
        (10, 0.0, (range(7), range(7, 10), ())),
        (5, 0.0, (range(3), range(3, 5), ())),
        (10, 0.3, (range(4), range(4, 7), range(7, 10))),
        (40, 0.5, (range(8, 19), range(19, 24), range(24, 40))),
    ],
)
def test_older_pairs_train_newer_ones_validate_and_the_newest_are_held_out(n: int, holdout: float, expected) -> None:
    found = split(pairs(n), ProfileOptions(holdout=holdout))
    assert found is not None
    assert (ids(found.train), ids(found.validation), ids(found.held_out)) == tuple(map(list, expected))
    assert found.newest == START + timedelta(days=expected[1][-1])


def test_a_held_out_pair_is_strictly_newer_than_the_profile() -> None:
    found = split(pairs(10, per_day=4), ProfileOptions(holdout=0.3))
    assert found is not None
    assert ids(found.used) == list(range(7))  # 4, 5, 6 and 7 are of one day
    assert ids(found.held_out) == [8, 9]


def test_too_few_pairs_give_no_profile() -> None:
    assert split(pairs(4), ProfileOptions()) is None
    assert split(pairs(6), ProfileOptions(holdout=0.4)) is None
    assert split(pairs(2), ProfileOptions(min_pairs=2)) is not None


def test_the_fingerprint_changes_with_everything_that_a_profile_depends_on() -> None:
    some, options = pairs(5), ProfileOptions()
    changes = [
        ([replace(some[0], target="other"), *some[1:]], options, "m"),
        ([replace(some[0], system="be brief"), *some[1:]], options, "m"),
        (some[1:], options, "m"),
        (some, ProfileOptions(candidates=3), "m"),
        (some, options, "other"),
    ]
    first = fingerprint(some, options, "m")
    assert len({first, *(fingerprint(*change) for change in changes)}) == len(changes) + 1
    assert fingerprint(some, ProfileOptions(recipe="named", min_pairs=2), "m") == first


def test_the_rejected_answer_and_the_reasoning_are_not_put_in_front() -> None:
    shown = Demonstration(pair=pairs(1)[0], reasoning="likes yes")
    profile = Profile(text="Likes yes.", demonstrations=(shown,), validation_score=1.0, n_pairs=5, newest_pair_at=START)
    assert texts_in_front(profile.row()) == ["About the person who asks: Likes yes.", "question 0\nyes 0"]
    assert texts_in_front({**profile.row(), "text": "", "demonstrations": []}) == []


def test_answers_with_a_profile_have_a_name_of_their_own() -> None:
    front = FrontTexts(user_profile="chat", user_profile_tokens=64)
    assert (front.front_tokens, front.answers_of("own")) == (64, "own-profile-chat")
    assert (FrontTexts().front_tokens, FrontTexts().answers_of("own")) == (0, "own")
    assert (FrontTexts(retrieve=2).front_tokens, FrontTexts(retrieve=2).answers_of("own")) == (256, "own-recency-2")


@pytest.mark.parametrize(
    "flags",
    [{"user_profile": "a", "retrieve": 1}, {"user_profile_tokens": 3}, {"user_profile": "a", "user_profile_tokens": 0}],
)
def test_texts_in_front_that_cannot_be(flags) -> None:
    with pytest.raises(UsageError, match="--user-profile"):
        FrontTexts(**flags)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("min-pairs", 1), ("candidates", 0), ("demonstrations", 0), ("max-pairs", 4), ("holdout", 1.0), ("recipe", " ")],
)
def test_options_that_cannot_be(flag: str, value: float | str) -> None:
    with pytest.raises(UsageError, match=f"--{flag}"):
        ProfileOptions(**{flag.replace("-", "_"): value})
