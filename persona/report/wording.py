"""The sentences of the reports: what the numbers mean, and what they do not show.

`metrics` is the content of `metrics.json`, `found` that of `comparison.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from persona.report import formats
from persona.report.formats import Interval

KINDS = {
    "own": "the user's own persona",
    "other": "another user's persona",
    "mean": "the user's own history with equal weights",
    "none": "no history (the persona of the mean behavior)",
    "bare": "the LLM without the plug",
}
# The two ways to rank a target and a rejected text, as terminal and pages call them.
RANKINGS = {"likelier": "by loss", "calibrated": "by gain over none"}

RANKING = (
    "Share of the requests whose target is ranked above the rejected text; chance is 50 %. By loss: the text with "
    "fewer nats wins. By gain over none: the text wins whose nats the persona lowers more, compared with no history. "
    "In brackets 95 % intervals over users."
)
_CONTROL = "a plug trained without any history (prompt tuning, jobs.train --empty-history 1 --alignment 0)"
_MOST_NAMES = 6

_VERDICTS = {
    "gain": "a gain, the interval excludes zero",
    "loss": "a loss, the interval excludes zero",
    "noise": "noise, the interval includes zero",
    "unknown": "one user gives no interval, so this may be noise",
}


def rankings_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ways of ranking that at least one row has."""
    present = {way for row in rows for way in row}
    return [way for way in RANKINGS if way in present]


def evaluation_reading(metrics: Mapping[str, Any]) -> list[str]:
    """The result of one evaluation in sentences."""
    if "own" not in metrics["loss"]:
        return [
            "The user's own persona was not measured, so this page cannot show what a history is worth.",
            _control_of_one(metrics),
        ]
    saved = metrics["loss_saved_by_own"]
    return [*_own_against_others(saved, "the own persona"), _task_caveat(saved), _control_of_one(metrics)]


def short_name(kind: str) -> str:
    """What a kind of persona is, in a few words."""
    return KINDS[kind].split(" (")[0] if kind in KINDS else kind


def _own_against_others(saved: Mapping[str, Interval], own: str) -> list[str]:
    """What the own persona saves against another user's and against no history; `own` is how sentences call it."""
    sentences = []
    if "other" in saved:
        sentences.append(_own_against("other", saved["other"], own))
        sentences.append(
            {
                "gain": "So it is the user's own history that helps, not just any history.",
                "loss": "So the user's own history does worse here than a stranger's.",
                "noise": "So these requests do not show that the user's own history helps.",
                "unknown": "",
            }[formats.verdict(saved["other"])]
        )
    else:
        sentences.append(
            "Another user's persona was not measured, so a gain may come from any history rather than the user's own."
        )
    if "none" in saved:
        sentences.append(_own_against("none", saved["none"], own))
    return [sentence for sentence in sentences if sentence]


def _own_against(kind: str, saved: Interval, own: str) -> str:
    number = f"{saved['mean']:+.4f} nats a token {formats.bounds(saved)}".removesuffix(" –")
    return f"Against {short_name(kind)}, {own} saves {number}: {_VERDICTS[formats.verdict(saved)]}."


def _task_caveat(saved: Mapping[str, Interval]) -> str:
    kinds = [short_name(kind) for kind in ("none", "bare") if kind in saved]
    if not kinds:
        return ""
    return f"A gain against {' or '.join(kinds)} may be just the task, which a plug also learns without any history."


def _control_of_one(metrics: Mapping[str, Any]) -> str:
    if metrics["training"].get("empty_history") == 1:
        return (
            "This plug was trained without any history (prompt tuning): it is the control that shows what the task "
            "alone is worth."
        )
    return (
        f"The control, {_CONTROL}, is not part of this page; evaluate it on the same requests and put both on one page "
        "with jobs.compare."
    )


def evaluation_warnings(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader must know before any number of an evaluation."""
    found = []
    if metrics["limited"]:
        found.append(f"--limit {metrics['settings']['limit']} was given: these are not the numbers of the whole set.")
    found += [
        f"The store has no answers of the variant {variant!r}, so it has no scores."
        for variant in metrics["unanswered_variants"]
    ]
    if metrics["users"] < 2:
        found.append("All requests are from one user, so there are no intervals.")
    if metrics["rejects"]:
        found.append(f"{metrics['rejects']:,} rows of the requests could not be read; see the table `rejects`.")
    return found


def loss_text(metrics: Mapping[str, Any]) -> str:
    """What the table of losses shows."""
    text = (
        f"Negative log-likelihood of the targets in nats a token (lower is better) on {metrics['requests']:,} requests "
        f"of {metrics['users']:,} users, with 95 % intervals from a bootstrap over users."
    )
    saved = metrics["loss_saved_by_own"]
    if not saved:
        return text
    text += (
        " “Saved by own” is paired: the same requests on both sides. Against none it may come from any history; "
        "against other it comes from the user's own."
    )
    if "mean" in saved and not any(saved["mean"].values()):
        text += " The row mean equals own: this plug weights all behaviors the same, or nearly so."
    return text


def score_text(metrics: Mapping[str, Any]) -> str:
    """What the table of scores shows."""
    names = next(iter(metrics["scores"].values()))
    text = "Lower is better." if "mae" in names else "Higher is better."
    if "rouge1" in names:
        text += (
            " rouge1 and rougeL are the median of a seeded bootstrap, as LaMP reports them; intervals and gains are "
            "those of the plain means."
        )
    return f"{text} {metrics['requests']:,} requests of {metrics['users']:,} users."


def plug_versions_text(found: Mapping[str, Any]) -> str:
    """What the comparison of the versions of a plug shows."""
    text = (
        f"The plugs that were proposed for this store, under the users' own personas, on the {found['requests']:,} "
        f"requests of {found['users']:,} users that all these evaluations have. Lower is better. “Saved by this one” "
        "is paired: what the plug of this page saves on the same requests."
    )
    if found["left_out"]:
        named = _listed([f"v{number}" for number in found["left_out"]])
        text += f" Left out, for other requests or another LLM: {named}."
    return text


def weighs_all_the_same(examples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether in none of the examples one behavior weighs more than another."""
    weights = [[one["weight"] for one in example["listened_to"]] for example in examples]
    several = [found for found in weights if len(found) > 1]
    return bool(several) and all(min(found) == max(found) for found in several)


def weights_text(metrics: Mapping[str, Any]) -> str:
    """What the list of the heaviest behaviors shows."""
    text = "The past texts with the largest attention weights (PPlug eq. 3), for the requests with the largest gains."
    if metrics["settings"]["texts"] is None:
        text += " Give the histories with --texts to see them in words."
    return text


def gain_by_user_text(metrics: Mapping[str, Any]) -> str:
    """What the curve over users shows."""
    users = metrics["map"]
    gaining = sum(user["saved"] > 0 for user in users)
    return (
        f"The users of the map, ordered by what the own persona saves them: {gaining} of {len(users)} gain. A single "
        "user has few requests and no interval, so read the curve as a whole."
    )


def comparison_reading(found: Mapping[str, Any]) -> list[str]:
    """The result of a comparison in sentences."""
    return [*_against_reference(found), *_own_of_one_plug(found["rows"]), _control_of_many(found)]


def _against_reference(found: Mapping[str, Any]) -> list[str]:
    """How the other plugs compare with the reference, under the same kind of persona if they have it."""
    reference = next(row for row in found["rows"] if not row["above_reference"])
    others = [row for row in found["rows"] if row["name"] != reference["name"]]
    others = [row for row in others if row["persona"] == reference["persona"]] or others
    beginnings = {
        "gain": f"Better than {found['against']}",
        "loss": f"Worse than {found['against']}",
        "noise": f"Not distinguishable from {found['against']} (the interval of the difference includes zero)",
        "unknown": f"Perhaps not distinguishable from {found['against']} (one user gives no interval)",
    }
    labels: dict[str, list[str]] = {verdict: [] for verdict in beginnings}
    for row in others:
        labels[formats.verdict(row["above_reference"], lower_is_better=True)].append(_label(row))
    return [f"{beginnings[verdict]}: {_listed(some)}." for verdict, some in labels.items() if some]


def _own_of_one_plug(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Own against other and none, for the plug of the reference if it has them, else for the first that does."""
    saved = saved_by_own(rows)
    if not saved:
        return []
    of_reference = next((row["name"] for row in rows if row["above_reference"] is None), None)
    name = of_reference if of_reference in saved else next(iter(saved))
    return _own_against_others(saved[name], f"the own persona of {name}")


def saved_by_own(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Interval]]:
    """By plug and kind of persona, what the plug's own persona saves."""
    found: dict[str, dict[str, Interval]] = {}
    for row in rows:
        if row["above_own"]:
            # Costing more than the own persona is what the own persona saves.
            found.setdefault(row["name"], {})[row["persona"]] = row["above_own"]
    return found


def _control_of_many(found: Mapping[str, Any]) -> str:
    rows = [row for row in found["rows"] if row["trained_without_history"]]
    if not rows:
        return (
            f"The control, {_CONTROL}, is not part of this page; without it, a gain against no history or the LLM "
            "without the plug may be just the task."
        )
    control = next((row for row in rows if row["persona"] == "none"), rows[0])
    if any(row["above_reference"] is None for row in rows):
        return (
            f"The reference {found['against']} was trained without any history (prompt tuning): it is the control, and "
            "what is better than it is worth more than the task alone."
        )
    above = control["above_reference"]
    number = f"{above['mean']:+.4f} nats a token {formats.bounds(above)}".removesuffix(" –")
    meaning = {
        "loss": "the reference is worth more than the task alone",
        "gain": "the reference is worth less than the task alone",
        "noise": "noise, so the reference may be worth no more than the task alone",
        "unknown": _VERDICTS["unknown"],
    }[formats.verdict(above, lower_is_better=True)]
    return (
        f"{_label(control)} is the control, trained without any history (prompt tuning). Its difference to the "
        f"reference is {number}: {meaning}."
    )


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['name']}/{row['persona']}"


def _listed(labels: Sequence[str]) -> str:
    more = len(labels) - _MOST_NAMES
    return ", ".join(labels[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
