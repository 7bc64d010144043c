"""A user's profile: a description in words, demonstrations, and how well both predict the user's choices."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from persona.profiling.options import ProfileOptions
from persona.profiling.pairs import Demonstration, Pair

# Raise it when the same pairs and options would give another profile.
_VERSION = 1
# Flags that change no profile: only who gets one.
_WITHOUT_EFFECT = ("recipe", "min_pairs")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a user's pairs have become.

    Attributes:
        text: a description of the user; empty if it was made without a strong LLM.
        demonstrations: pairs to be shown as examples, in this order.
        validation_score: share of the validation pairs whose target the profile prefers.
        n_pairs: pairs that it depends on.
        newest_pair_at: the time of the newest of these; only later requests may see the profile.
        n_held_out: newer pairs that were kept out.
        held_out_score: share of these whose target it prefers; None without any.
        held_out_none: the same without a profile.
        n_calls: prompts that the strong LLM was asked.
        n_unusable: replies to them that could not be used; they count as wrong choices.
    """

    text: str
    demonstrations: tuple[Demonstration, ...]
    validation_score: float
    n_pairs: int
    newest_pair_at: datetime
    n_held_out: int = 0
    held_out_score: float | None = None
    held_out_none: float | None = None
    n_calls: int = 0
    n_unusable: int = 0

    def row(self) -> dict[str, Any]:
        """The columns of the table `profiles` that depend on the pairs alone."""
        return {
            **{one.name: getattr(self, one.name) for one in fields(self) if one.name != "demonstrations"},
            "demonstrations": [
                {
                    "request_id": one.pair.request_id,
                    "input": one.pair.input,
                    "target": one.pair.target,
                    "rejected": one.pair.rejected,
                    "reasoning": one.reasoning,
                }
                for one in self.demonstrations
            ],
        }


def fingerprint(pairs: Sequence[Pair], options: ProfileOptions, model: str) -> str:
    """Hash of everything a profile depends on; `model` identifies the LLM and how it reads."""
    chosen = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in _WITHOUT_EFFECT}
    rows = [[p.request_id, p.input, p.target, p.rejected, p.as_of.isoformat(), p.system] for p in pairs]
    text = json.dumps([_VERSION, model, chosen, rows], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def texts_in_front(profile: Mapping[str, Any]) -> list[str]:
    """The texts of a row of `profiles` that are put in front of a request: the description, then the demonstrations.

    A demonstration is the request with the preferred answer; a rejected one would be read as an example, too.
    """
    description = [f"About the person who asks: {profile['text']}"] if profile["text"] else []
    return [*description, *(demonstration_text(one["input"], one["target"]) for one in profile["demonstrations"])]


def demonstration_text(request: str, answer: str) -> str:
    """One demonstration in front of a request."""
    return f"{request}\n{answer}"
