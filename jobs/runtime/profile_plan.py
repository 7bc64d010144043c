"""The dry run of `jobs.profile`: how many users have enough pairs, and what their profiles would cost at most."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from jobs.runtime import chat as chats, cost
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests
from jobs.runtime.profilers import LLMSpec
from persona.chat.options import ChatOptions
from persona.options import CostOptions
from persona.profiling.options import ProfileOptions

if TYPE_CHECKING:
    from persona.profiling.pairs import Sizes

_LOOKED_AT = 100_000  # pairs of the input


def of_likelihood(
    first: "FirstPairs", options: ProfileOptions, llm: LLMSpec, costs: CostOptions, plan: Summary
) -> Summary:
    """Adds the answers to measure and their cost to a dry run."""
    from persona import cost as formulas
    from persona.models import resolve as models
    from persona.profiling.likelihood import max_answers

    n_answers = first.scaled(max_answers(parts, options) for parts in first.parts(options))
    tokens = (1 + options.demonstrations) * formulas.tokens_of_text(round(first.mean_bytes))
    inputs = min(tokens, llm.max_input_tokens + llm.front_tokens)
    config = models.resolve(llm.name, flag="--llm").config
    flops = cost.known(lambda: formulas.llm_flops(config, n_requests=n_answers, inputs=inputs, outputs=0))
    measures = ("measures", f"the likelihood of at most {n_answers:,} answers")
    plan = replace(plan, table=[*plan.table, measures], result={**plan.result, "answers_to_measure": n_answers})
    return cost.planned(plan, costs, flops=flops, if_all="if no user has a profile yet")


def of_chat(first: "FirstPairs", options: ProfileOptions, chat: ChatOptions, plan: Summary) -> Summary:
    """Adds the calls, their tokens and their price to a dry run."""
    from persona.profiling import questions
    from persona.profiling.search import max_calls

    calls = first.scaled(max_calls(parts, options) for parts in first.parts(options))
    prompt_tokens = calls * questions.max_prompt_tokens(first.mean_bytes, options.demonstrations)
    longest = max(questions.CHOICE_TOKENS, questions.DESCRIPTION_TOKENS)
    facts = chats.planned_facts(chat, calls=calls, prompt_bytes=prompt_tokens, max_tokens=longest)
    return replace(plan, table=[*plan.table, *chats.planned_rows(facts)], result={**plan.result, **facts})


@dataclass(frozen=True, kw_only=True)
class FirstPairs:
    """What a dry run knows of the input: the pairs of each user in the first files, and how much of the input that is.

    Attributes:
        pairs_by_user: numbers of pairs.
        mean_bytes: of the texts of a pair.
        share: of the input that was read.
    """

    pairs_by_user: Sequence[int]
    mean_bytes: float
    share: float

    def parts(self, options: ProfileOptions) -> "list[Sizes]":
        """The sizes of the parts of those users who have enough pairs."""
        from persona.profiling.pairs import sizes

        return [found for n in self.pairs_by_user if (found := sizes(n, options)) is not None]

    def scaled(self, numbers: Iterable[int]) -> int:
        """The sum of numbers for what was read, extrapolated to the whole input."""
        return round(sum(numbers) / self.share)

    def summary(self, would: str, options: ProfileOptions, requests: Requests) -> Summary:
        """The dry run so far."""
        n_users = len(self.parts(options))
        seen = f"{sum(self.pairs_by_user):,} pairs of {len(self.pairs_by_user):,} users, {n_users:,} with enough pairs"
        table = [("would", would), (f"first {self.share:.0%}", seen), *requests.rows()]
        result = {"dry_run": True, "would": would, "users": n_users, "share": round(self.share, 4), **requests.facts()}
        return Summary(table=table, result=result)


def look(requests: Requests, *, rejected: str, n_buckets: int, limit: int | None) -> FirstPairs:
    """Read the first files, until there are enough pairs or `limit`. Raises InputError when they cannot be read."""
    from persona.inputs import requests as rules
    from persona.inputs.reader import read_split

    columns = requests.columns
    users: Counter[str] = Counter()
    n_bytes = n_read = n_rows = 0
    problem = partial(rules.problem, columns=columns, needs_target=True, rejected=rejected)
    for split in requests.splits:
        for records in read_split(split, job="dry run", max_row_mb=columns.max_row_mb, problem=problem):
            good, _ = rules.validate(
                records, n_buckets, True, columns=columns, needs_as_of=requests.needs_as_of, rejected=rejected
            )
            good = good.slice(0, None if limit is None else limit - n_rows)
            users.update(good["user_id"].to_pylist())
            n_rows += good.num_rows
            n_bytes += sum(good[name].nbytes for name in ("input", "target", "rejected"))
        n_read += split.end - split.start
        if n_rows >= (_LOOKED_AT if limit is None else min(limit, _LOOKED_AT)):
            break
    n_all = sum(split.end - split.start for split in requests.splits)
    share = n_read / n_all if limit is None or n_rows < limit else 1.0
    return FirstPairs(pairs_by_user=list(users.values()), mean_bytes=n_bytes / max(n_rows, 1), share=share)
