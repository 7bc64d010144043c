"""The page that shows evaluations side by side: one file, drawn from `comparison.json` alone, without a network."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from persona.report import charts, markup

Comparison = Mapping[str, Any]

_LOSS_TEXT = (
    "Negative log-likelihood of the targets in nats a token, lower is better; in brackets 95 % intervals by a "
    "bootstrap over users. Differences are paired, the same requests on both sides: below 0 is better than the "
    "reference. Plugs that differ in nothing but the seed of their training are one row, the mean over the seeds of "
    "each request."
)
_SCORE_TEXT = (
    "Scores of the answers, as jobs.evaluate gives them, in brackets the interval over users; of several seeds the "
    "mean, and without brackets the lowest and the highest."
)


def page(found: Comparison) -> bytes:
    """The comparison as one HTML file."""
    rows = found["rows"]
    chart = charts.forest(
        [_marked(row) for row in rows if row["above_reference"]], x="nats a token above the reference"
    )
    sections = [
        _head(found),
        markup.section("Loss", _LOSS_TEXT, _losses(found)),
        '<div class="pair">',
        markup.section(f"Against {found['against']}", "To the left is better.", markup.figure(chart, {})),
        markup.section("In what they differ", "", _differing(found)),
        "</div>",
        markup.section("Scores", _SCORE_TEXT, _scores(rows)) if any(row["scores"] for row in rows) else "",
        markup.section("Ranking", markup.RANKING_TEXT, _ranking(rows)) if any(row["ranking"] for row in rows) else "",
        markup.section("What is compared", "", _origins(found)),
    ]
    return markup.page("comparison", sections)


def _head(found: Comparison) -> str:
    return (
        f'<header><p class="eyebrow">persona-plug · comparison</p><h1>{len(found["evaluations"])} evaluations against '
        f"{escape(found['against'])}</h1><p>{found['requests']:,} requests of {found['users']:,} users</p>"
        f"{markup.warnings(found['warnings'])}</header>"
    )


def _marked(row: Mapping[str, Any]) -> tuple[str, str, charts.Triple]:
    above = row["above_reference"]
    return f"{row['name']}/{row['persona']}", row["persona"], (above["mean"], above["low"], above["high"])


def _losses(found: Comparison) -> str:
    rows = [
        [
            *_named(row),
            f"{row['loss']['mean']:.4f}{markup.beside(row['loss'])}",
            markup.difference(row["above_reference"], less_is_better=True) or "the reference",
            _seeds(row),
        ]
        for row in found["rows"]
    ]
    return markup.table(["plug", "persona", "loss", f"less {escape(found['against'])}", "seeds"], rows)


def _named(row: Mapping[str, Any]) -> list[str]:
    return [escape(row["name"]), markup.name(row["persona"])]


def _seeds(row: Mapping[str, Any]) -> str:
    spread = row["loss_of_seeds"]
    if spread is None:
        return "1"
    ends = f"{spread['low']:.4f}–{spread['high']:.4f}, σ {spread['deviation']:.4f}"
    return f'{len(row["seeds"])} <span class="range">{ends}</span>'


def _scores(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    shown = [[*_named(row), *(_score(row["scores"].get(name)) for name in names)] for row in rows if row["scores"]]
    return markup.table(["plug", "persona", *map(escape, names)], shown)


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    spread = score["of_seeds"]
    if spread is not None:
        return f'{score["value"]:.4f} <span class="range">{spread["low"]:.4f}–{spread["high"]:.4f}</span>'
    return f"{score['value']:.4f}{markup.beside(score['interval']) if score['interval'] else ''}"


def _ranking(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [
        [
            *_named(row),
            *(markup.share(row["ranking"][way]) if way in row["ranking"] else "" for way in ("likelier", "calibrated")),
        ]
        for row in rows
        if row["ranking"]
    ]
    return markup.table(["plug", "persona", "by nats", "calibrated"], shown)


def _differing(found: Comparison) -> str:
    names = list(next(iter(found["differing"].values())))
    if not names:
        return '<p class="quiet">In nothing but their seeds.</p>'
    rows = [
        [escape(name), *(f"<code>{escape(str(options[name]))}</code>" for options in found["differing"].values())]
        for name in names
    ]
    return markup.table(["option", *map(escape, found["differing"])], rows)


def _origins(found: Comparison) -> str:
    heads = ["name", "seed", "plug", "plug_fingerprint", "requests"]
    rows = [[f"<code>{escape(str(one[head]))}</code>" for head in heads] for one in found["evaluations"]]
    return markup.more("Folders and fingerprints", markup.table(heads, rows))
