"""The sentences about judged answers; `found` is the content of `judged.json`."""

from collections.abc import Mapping
from typing import Any

from persona.report import formats
from persona.report.formats import Interval

TASKS = {
    "action": "expected action",
    "language": "linguistic habits",
    "consistency": "persona consistency",
    "toxicity": "toxicity control",
    "justification": "action justification",
}
SCORE = (
    "The mean over five tasks of the mean score of their answers, 1 to 5 (PersonaGym, arXiv 2407.18416). The swap gap "
    "is what an answer scores under its own persona above what the same answer scores under another one. Where its "
    "interval is not above 0, the judge does not tell whose answer it reads, and no PersonaScore is given. In brackets "
    "95 % intervals over personas. Unparsed judgements are counted here and are in no mean."
)


def reading(found: Mapping[str, Any]) -> list[str]:
    """The result of judged answers in sentences."""
    sentences = []
    for row in found["scores"]:
        who = f"{row['judge']} on {row['variant']}"
        if row["persona_score"] is None:
            sentences.append(f"{who}: no PersonaScore, because {row['no_score_because']}.")
        else:
            sentences.append(f"{who}: PersonaScore {_two(row['persona_score'])}, swap gap {_signed(row['swap_gap'])}.")
    if len(found["judges"]) < 2:
        sentences.append("One judge: whether another one agrees is not known; add one with another --chat-model.")
    return sentences


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know before any number of judged answers."""
    texts = []
    if found["limited"]:
        texts.append("--limit was given: these are not the numbers of the whole set.")
    if found["left_out"]:
        texts.append(
            f"{found['left_out']:,} requests are left out, since not all variants have a judged answer to them."
        )
    if found["without_other_persona"]:
        texts.append(f"{found['without_other_persona']:,} requests have no other persona, and so no swap gap.")
    if found["rejects"]:
        texts.append(f"{found['rejects']:,} rows of the requests could not be read; see the table `rejects`.")
    return texts


def lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table that jobs.judge prints."""
    rows = [("warning", text) for text in warnings(found)]
    for row in found["scores"]:
        score = row["persona_score"]
        text = f"PersonaScore {_two(score)}" if score else f"no PersonaScore: {row['no_score_because']}"
        if row["swap_gap"]:
            text += f"; swap gap {_signed(row['swap_gap'])}"
        toxicity = row["tasks"].get("toxicity", {}).get("score")
        text += f"; toxicity control {_two(toxicity)}" if toxicity else ""
        rows.append(
            (f"{row['variant']}, {row['judge']}", f"{text}; {row['unparsed']:,} of {row['judgements']:,} unparsed")
        )
    for one in found["agreement"]:
        rank = one["rank_correlation"]
        correlation = "" if rank is None else f", rank correlation {rank:.2f}"
        text = f"{100 * one['same_score']:.0f} % same score, mean difference {one['mean_difference']:.2f}{correlation}"
        rows.append((f"agreement, {' and '.join(one['judges'])}", f"{text}; {one['answers']:,} answers"))
    return rows


def _two(interval: Interval) -> str:
    return f"{interval['mean']:.2f} {formats.bounds(interval)}".removesuffix(" –")


def _signed(interval: Interval) -> str:
    return f"{interval['mean']:+.2f} {formats.bounds(interval)}".removesuffix(" –")
