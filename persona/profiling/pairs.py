"""Preference pairs of one user, and how they are split in order of time."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from persona.profiling.options import ProfileOptions

_TRAIN_SHARE = 0.7  # as in SynthesizeMe (arXiv 2506.05598)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A request, the answer that the user preferred, and the other one.

    Attributes:
        target: the preferred answer.
        as_of: when the user chose.
        system: system text of the request; None without one.
    """

    request_id: str
    input: str
    target: str
    rejected: str
    as_of: datetime
    system: str | None = None


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A pair that is shown as an example, with the verified reasoning that led to the right choice, if there is any."""

    pair: Pair
    reasoning: str = ""


class Sizes(NamedTuple):
    """How many of a user's pairs train, validate and are held out."""

    train: int
    validation: int
    held_out: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """The pairs of a user, oldest first: `train` is older than `validation`, and `held_out` is strictly newer."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    held_out: tuple[Pair, ...] = ()

    @property
    def used(self) -> tuple[Pair, ...]:
        """The pairs that the profile depends on."""
        return self.train + self.validation

    @property
    def newest(self) -> datetime:
        """The time of the newest pair that the profile depends on."""
        return self.used[-1].as_of


def sizes(n_pairs: int, options: ProfileOptions) -> Sizes | None:
    """The parts of so many pairs, 70 % of the used ones for training; None if they are fewer than `min_pairs`."""
    n_taken = min(n_pairs, options.max_pairs)
    n_used = n_taken - int(options.holdout * n_taken)
    if n_used < options.min_pairs:
        return None
    n_train = min(max(1, int(_TRAIN_SHARE * n_used)), n_used - 1)
    return Sizes(n_train, n_used - n_train, n_taken - n_used)


def split(pairs: Sequence[Pair], options: ProfileOptions) -> Split | None:
    """The newest pairs in order of time, in parts of `sizes`; None if there are too few.

    Held-out pairs come last. One of the same time as a used pair is left out: the profile would not be older.
    """
    parts = sizes(len(pairs), options)
    if parts is None:
        return None
    newest = sorted(pairs, key=lambda pair: (pair.as_of, pair.request_id))[-sum(parts) :]
    n_used = parts.train + parts.validation
    last = newest[n_used - 1].as_of
    return Split(
        train=tuple(newest[: parts.train]),
        validation=tuple(newest[parts.train : n_used]),
        held_out=tuple(pair for pair in newest[n_used:] if pair.as_of > last),
    )


def target_is_first(pair: Pair) -> bool:
    """Whether the target is shown first: random, but always the same, as reasoning may speak of the first answer."""
    return bool(hashlib.blake2b(pair.request_id.encode(), digest_size=1).digest()[0] & 1)
