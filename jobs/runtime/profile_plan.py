"""The dry run of `jobs.profile`: how many users have enough pairs, and what their profiles would cost at most."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.runtime import chat as chats
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests
from persona.chat.options import ChatOptions
from persona.profiling.options import ProfileOptions

_LOOKED_AT = 100_000  # pairs of the input


def plan(requests: Requests, options: ProfileOptions, chat: ChatOptions, *, rejected: str, n_buckets: int) -> Summary:
    """The summary of a dry run."""
    from persona.profiling import questions
    from persona.profiling.pairs import sizes
    from persona.profiling.search import max_calls

    first = look(requests, rejected=rejected, n_buckets=n_buckets)
    parts = [found for n in first.pairs_by_user if (found := sizes(n, options)) is not None]
    would = f"make profiles by {options.by}, as recipe {options.name}"
    seen = f"{sum(first.pairs_by_user):,} pairs of {len(first.pairs_by_user):,} users, {len(parts):,} with enough pairs"
    table = [("would", would), (f"first {first.share:.0%}", seen), *requests.rows()]
    result: dict[str, Any] = {"dry_run": True, "would": would, "users": len(parts), "share": round(first.share, 4)}
    if options.by == "likelihood":
        from persona.profiling.likelihood import max_answers

        result["answers_to_measure"] = round(sum(max_answers(one, options) for one in parts) / first.share)
        table.append(("measures", f"the likelihood of at most {result['answers_to_measure']:,} answers"))
    else:
        calls = round(sum(max_calls(one, options) for one in parts) / first.share)
        prompt_tokens = calls * questions.max_prompt_tokens(first.mean_bytes, options.demonstrations)
        longest = max(questions.CHOICE_TOKENS, questions.DESCRIPTION_TOKENS)
        facts = chats.planned_facts(chat, calls=calls, prompt_bytes=prompt_tokens, max_tokens=longest)
        table += chats.planned_rows(facts)
        result |= facts
    return Summary(table=table, result={**result, **requests.facts()})


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


def look(requests: Requests, *, rejected: str, n_buckets: int) -> FirstPairs:
    """Read the first files, until there are enough pairs. Raises InputError when they cannot be read."""
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
            users.update(good["user_id"].to_pylist())
            n_rows += good.num_rows
            n_bytes += sum(good[name].nbytes for name in ("input", "target", "rejected"))
        n_read += split.end - split.start
        if n_rows >= _LOOKED_AT:
            break
    n_all = sum(split.end - split.start for split in requests.splits)
    return FirstPairs(
        pairs_by_user=list(users.values()), mean_bytes=n_bytes / max(n_rows, 1), share=n_read / max(n_all, 1)
    )
