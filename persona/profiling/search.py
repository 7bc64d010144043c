"""The search for one user's profile with a strong LLM: verified reasoning, a description, and demonstrations.

The steps of SynthesizeMe (arXiv 2506.05598, section 3):

1. Sets of demonstrations are tried on the validation pairs. Some sets hold *traces*: the LLM's reasoning about a
   training pair, kept only if its choice was right.
2. The traces of the best set become a description of the user.
3. Sets are tried again, with the description in the prompt. The best one and the description are the profile.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from persona.profiling import questions
from persona.profiling.options import ProfileOptions
from persona.profiling.pairs import Demonstration, Pair, Sizes, Split, target_is_first
from persona.profiling.profile import Profile
from persona.profiling.questions import Question
from persona.profiling.rounds import Rounds

_BOTH_ORDERS = (True, False)


def max_calls(parts: Sizes, options: ProfileOptions) -> int:
    """The most prompts that `search` asks for a user's pairs: known before the first one is asked."""
    tried = options.candidates * parts.train + 2 * (options.candidates + 2) * parts.validation
    return 2 * tried + 1 + 2 * 2 * parts.held_out


def search(user_id: str, pairs: Split, options: ProfileOptions) -> Rounds[Profile]:
    """The profile of a user; yields prompts and expects their replies (`rounds.together`)."""
    one = _Search(user_id=user_id, pairs=pairs, options=options)
    tried = yield from one.try_sets("")
    best = _best(tried)
    description = ""
    if traces := _traces(tried):
        replies = yield [questions.describe(traces)]
        one.count(len(replies), sum(bool(reply.problem) for reply in replies))
        description = questions.description_of(replies[0])
    if description:
        best = _best((yield from one.try_sets(description)))
    held_out: tuple[float, float] | tuple[None, None] = (None, None)
    if pairs.held_out:
        scores = yield from one.scores([(best.shown, description), ((), "")], pairs.held_out)
        held_out = scores[0], scores[1]
    return Profile(
        text=description,
        demonstrations=best.shown,
        validation_score=best.score,
        n_pairs=len(pairs.used),
        newest_pair_at=pairs.newest,
        n_held_out=len(pairs.held_out),
        n_calls=one.n_calls,
        n_unusable=one.n_unusable,
        held_out_score=held_out[0],
        held_out_none=held_out[1],
    )


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A set of demonstrations, and the share of validation questions that it gets right."""

    shown: tuple[Demonstration, ...]
    score: float


def _best(tried: Sequence[_Tried]) -> _Tried:
    """The set with the best score; of equally good ones, the first."""
    return max(tried, key=lambda one: one.score)


def _traces(tried: Sequence[_Tried]) -> list[Demonstration]:
    """The verified traces of the best set that has any."""
    with_traces = [one for one in tried if any(shown.reasoning for shown in one.shown)]
    return [shown for shown in _best(with_traces).shown if shown.reasoning] if with_traces else []


@dataclass(kw_only=True)
class _Bootstrap:
    """A candidate that collects traces: pairs are asked about in `order` until it has `size` traces."""

    order: Sequence[Pair]
    size: int
    traces: list[Demonstration] = field(default_factory=list)

    def question(self, position: int, description: str, n_shown: int) -> Question:
        """About one pair, with other pairs of the order shown."""
        pair = self.order[position]
        shown = [Demonstration(pair=other) for other in self.order if other is not pair][:n_shown]
        return Question(pair=pair, target_first=target_is_first(pair), shown=shown, description=description)

    def filled(self, n: int) -> tuple[Demonstration, ...]:
        """The traces, and other pairs without reasoning up to `n`."""
        traced = {one.pair.request_id for one in self.traces}
        others = [Demonstration(pair=pair) for pair in self.order if pair.request_id not in traced]
        return (*self.traces, *others)[:n]


@dataclass(kw_only=True)
class _Search:
    """What the steps of one user's search share."""

    user_id: str
    pairs: Split
    options: ProfileOptions
    n_calls: int = 0
    n_unusable: int = 0

    def count(self, n_calls: int, n_unusable: int) -> None:
        self.n_calls += n_calls
        self.n_unusable += n_unusable

    def try_sets(self, description: str) -> Rounds[list[_Tried]]:
        """No demonstrations, the newest pairs, and sets with verified traces, each with its validation score."""
        collected = list(self._bootstraps())
        for position in range(len(self.pairs.train)):
            open_ones = [one for one in collected if len(one.traces) < one.size]
            asked = [one.question(position, description, self.options.demonstrations) for one in open_ones]
            if not asked:
                break
            replies = yield [question.prompt() for question in asked]
            self.count(len(replies), sum(bool(reply.problem) for reply in replies))
            for one, question, reply in zip(open_ones, asked, replies, strict=True):
                if question.is_right(reply):
                    one.traces.append(Demonstration(pair=question.pair, reasoning=questions.reasoning_of(reply)))
        most = self.options.demonstrations
        newest = tuple(Demonstration(pair=pair) for pair in self.pairs.train[-most:])
        sets = list(dict.fromkeys([(), newest, *(one.filled(most) for one in collected)]))
        scores = yield from self.scores([(shown, description) for shown in sets], self.pairs.validation)
        return [_Tried(shown=shown, score=score) for shown, score in zip(sets, scores, strict=True)]

    def scores(
        self, variants: Sequence[tuple[Sequence[Demonstration], str]], pairs: Sequence[Pair]
    ) -> Rounds[list[float]]:
        """For demonstrations with a description, the share of pairs whose target is preferred, over both orders."""
        asked = [
            Question(pair=pair, target_first=first, shown=shown, description=description)
            for shown, description in variants
            for pair in pairs
            for first in _BOTH_ORDERS
        ]
        replies = yield [question.prompt() for question in asked]
        self.count(len(replies), sum(bool(reply.problem) for reply in replies))
        right = [question.is_right(reply) for question, reply in zip(asked, replies, strict=True)]
        n_each = len(_BOTH_ORDERS) * len(pairs)
        return [sum(right[start : start + n_each]) / n_each for start in range(0, len(right), n_each)]

    def _bootstraps(self) -> Iterator[_Bootstrap]:
        """The first keeps the order of time, the others shuffle the pairs and draw a size."""
        most = min(self.options.demonstrations, len(self.pairs.train))
        yield _Bootstrap(order=self.pairs.train, size=most)
        for number in range(1, self.options.candidates):
            draw = random.Random(f"{self.options.seed}\0{self.user_id}\0{number}")
            order = draw.sample(self.pairs.train, len(self.pairs.train))
            yield _Bootstrap(order=order, size=draw.randint(1, most))
