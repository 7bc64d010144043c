"""Actors that make profiles: users with their pairs in, rows of the table `profiles` out."""

import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from jobs.runtime import chat as chats, plugs, preferences, session
from jobs.runtime.chat import ChatRef, Replies
from jobs.runtime.job_options import LLMPool
from jobs.runtime.tally import Tally
from persona.errors import InputError, UsageError
from persona.front_texts import FrontTexts
from persona.option_checks import check_at_least, check_default
from persona.options import Precision
from persona.profiling.options import ProfileOptions

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.options import PromptOptions
    from persona.profiling.pairs import Split


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The frozen LLM of --by likelihood, and how it reads."""

    llm: str | None = None
    """With --by likelihood: folder or hub id of the frozen LLM whose likelihoods judge; any LLM that train accepts."""
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    """With --by likelihood: how the LLM reads requests; as in the training of the plug that is to read the profiles."""
    max_input_tokens: int = 256
    """With --by likelihood: cut requests to this many tokens."""
    max_target_tokens: int = 256
    """With --by likelihood: cut answers to this many tokens."""
    user_profile_tokens: int = FrontTexts.user_profile_tokens
    """With --by likelihood: tokens of all demonstrations together, as in generate and evaluate."""
    precision: Precision = "auto"
    """With --by likelihood: precision of the LLM; auto is bf16 where the hardware supports it."""
    batch_size: int = 16
    """With --by likelihood: answers per forward pass; lower it when a GPU runs out of memory."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot work."""
        check_at_least(self, 1, "max_input_tokens", "max_target_tokens", "user_profile_tokens", "batch_size")

    def check_unused(self) -> None:
        """Raises UsageError for an option that has no effect with --by chat."""
        check_default(self, *(one.name for one in fields(self)), needs="--by likelihood")


@dataclass(frozen=True, kw_only=True)
class LLMSpec:
    """The frozen LLM that judges by likelihood, and how it reads.

    Attributes:
        name: folder or hub id.
        fingerprint: of its content, as the driver found it.
        prompt: how requests are written; max_input_tokens, max_target_tokens: requests and answers are cut to these.
        front_tokens: tokens of all demonstrations together.
        precision, device: as of `FrozenLLM.load`.
        batch_size: answers per forward pass.
    """

    name: str
    fingerprint: str
    prompt: "PromptOptions"
    max_input_tokens: int
    max_target_tokens: int
    front_tokens: int
    precision: Precision
    device: str | None
    batch_size: int

    @property
    def identity(self) -> str:
        """What a profile depends on: the LLM and how it reads, but neither its precision nor the machine."""
        reads = ("fingerprint", "max_input_tokens", "max_target_tokens", "front_tokens")
        found = {**{name: getattr(self, name) for name in reads}, "prompt": asdict(self.prompt)}
        return json.dumps(found, sort_keys=True)


def find_llm(options: JudgeOptions, pool: LLMPool) -> LLMSpec:
    """The LLM that judges. Raises InputError or UsageError when it cannot, before any work begins."""
    from persona.models import resolve as models
    from persona.options import PromptOptions

    if options.llm is None:
        raise UsageError("--by likelihood needs --llm, the frozen LLM whose likelihoods judge")
    folder = models.resolve(options.llm, flag="--llm")
    tokenizer = plugs.check_llm(
        folder,
        max_input_tokens=options.max_input_tokens,
        max_target_tokens=options.max_target_tokens,
        prompt=PromptOptions(prompt_format=options.prompt_format),
        n_soft=0,
        retrieved_tokens=options.user_profile_tokens,
    )
    return LLMSpec(
        name=options.llm,
        fingerprint=folder.fingerprint,
        prompt=tokenizer.options,
        max_input_tokens=options.max_input_tokens,
        max_target_tokens=options.max_target_tokens,
        front_tokens=options.user_profile_tokens,
        precision=options.precision,
        device=pool.device,
        batch_size=options.batch_size,
    )


class ByLikelihood:
    """An actor with a frozen LLM that chooses demonstrations by the likelihood of the answers."""

    def __init__(self, spec: LLMSpec, options: ProfileOptions, tally: Tally, n_threads: int) -> None:
        from persona.engines import probe
        from persona.models import resolve as models
        from persona.models.frozen_llm import FrozenLLM
        from persona.profiling.likelihood import LikelihoodJudge

        session.quiet_models(n_threads)
        folder = models.resolve(spec.name, flag="--llm")
        if folder.fingerprint != spec.fingerprint:
            raise InputError(f"--llm {spec.name}: has another content on this machine than where the job was started")
        llm = FrozenLLM.load(
            folder,
            max_input_tokens=spec.max_input_tokens,
            max_target_tokens=spec.max_target_tokens,
            prompt=spec.prompt,
            precision=spec.precision,
            device=spec.device,
        )
        probe.check_llm(llm)
        self.judge = LikelihoodJudge(llm, front_tokens=spec.front_tokens, batch_size=spec.batch_size)
        self.model = folder.name
        self.options = options
        self.tally = tally

    def __call__(self, users: "pa.Table") -> "pa.Table":
        """A profile for each user, in their order."""
        from persona.profiling.likelihood import choose

        made = [choose(user, pairs, self.judge, self.options).row() for user, pairs in splits(users, self.options)]
        note(self.tally, users, made)
        return preferences.profile_rows(users, made, self.model)


class ByChat:
    """An actor with a chat model that reasons about the pairs; its replies are kept as they come."""

    def __init__(self, chat: ChatRef, replies: Replies, options: ProfileOptions, tally: Tally, n_threads: int) -> None:
        self.chat = replies.open_chat(chat, n_threads=n_threads)
        self.options = options
        self.tally = tally
        self.unit = uuid.uuid4().hex

    def __call__(self, users: "pa.Table") -> "pa.Table":
        """A profile for each user, in their order; what several users wait for is asked together."""
        from persona.profiling.rounds import together
        from persona.profiling.search import search

        searches = {user: search(user, pairs, self.options) for user, pairs in splits(users, self.options)}
        found = together(searches, self.chat.complete)
        made = [found[user].row() for user in users["user_id"].to_pylist()]
        chats.note_usage(self.tally, self.chat, self.unit)
        note(self.tally, users, made)
        return preferences.profile_rows(users, made, self.chat.identity)


def splits(users: "pa.Table", options: ProfileOptions) -> "Iterator[tuple[str, Split]]":
    """Users and their pairs, split in order of time."""
    from persona.profiling.pairs import split

    for row in users.to_pylist():
        found = split(preferences.pairs_of(row), options)
        assert found is not None, "a user with too few pairs goes no further than the join"
        yield row["user_id"], found


def note(tally: Tally, users: "pa.Table", made: "list[dict[str, Any]]") -> None:
    """Report the profiles of a block to the tally."""
    if made:
        held_out = [one for one in made if one["n_held_out"]]
        counts = {
            "users": len(made),
            "empty": sum(not one["text"] and not one["demonstrations"] for one in made),
            "validation": sum(one["validation_score"] for one in made),
            "held_out": len(held_out),
            "held_out_score": sum(one["held_out_score"] for one in held_out),
            "held_out_none": sum(one["held_out_none"] for one in held_out),
            **{name: sum(one[name] for one in made) for name in ("n_calls", "n_unusable")},
        }
        tally.note("profile", f"{users['bucket'][0]}/{users['user_id'][0]}", counts)


def scores(counts: Mapping[str, float]) -> dict[str, float | None]:
    """Mean scores over users, from the counts of `note`; None where no user has one."""

    def mean(total: str, n: str) -> float | None:
        return round(counts[total] / counts[n], 4) if counts.get(n) else None

    return {
        "validation_score": mean("validation", "users"),
        "held_out_score": mean("held_out_score", "held_out"),
        "held_out_none": mean("held_out_none", "held_out"),
    }
