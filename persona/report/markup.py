"""The pieces of HTML that the pages for people are made of: one file each, without a script or an address elsewhere."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from persona.report.style import STYLE

KINDS = {
    "own": "the user's own persona",
    "other": "another user's persona",
    "mean": "the own history, each behavior weighed alike",
    "none": "no history: the persona of a typical behavior",
    "bare": "the LLM without the plug",
}
RANKING_TEXT = (
    "Requests whose target is likelier than the rejected text, 50 % by chance, with 95 % intervals over users. By "
    "nats: which text is likelier as a whole. Calibrated: which one owes more to the history, its nats less those "
    "without any."
)

Interval = Mapping[str, float]  # mean, low, high


def page(title: str, sections: Sequence[str]) -> bytes:
    """A whole page; what users have written stands in it as text and can do nothing."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>persona-plug: {escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    ).encode()


def section(title: str, text: str, inside: str) -> str:
    """A part of a page under a title, with a few words on what it shows."""
    words = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{words}{inside}</section>"


def warnings(texts: Sequence[str]) -> str:
    """What a reader must know before any number."""
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in texts)


def more(title: str, inside: str) -> str:
    """What is shown when somebody asks for it."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; a column of which no cell says anything is left out."""
    told = [any(cells) for cells in zip(*rows, strict=True)] or [True] * len(heads)
    heads = [head for head, tells in zip(heads, told, strict=True) if tells]
    rows = [[cell for cell, tells in zip(row, told, strict=True) if tells] for row in rows]
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = f"<thead><tr>{top}</tr></thead>" if any(heads) else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def tile(name: str, value: str, note: str, how: str) -> str:
    """A number in large; `how` is a verdict."""
    return (
        f'<div class="tile {how}"><span>{escape(name)}</span><strong>{value}</strong><span>{escape(note)}</span></div>'
    )


def figure(chart: str, legend: Mapping[str, str]) -> str:
    """A chart with the names of its series."""
    if not chart:
        return '<p class="quiet">Nothing to draw here.</p>'
    keys = "".join(f'<span><i class="{kind}"></i>{escape(text)}</span>' for kind, text in legend.items())
    return f'<figure>{chart}<figcaption class="legend">{keys}</figcaption></figure>'


def name(kind: str) -> str:
    """The name of a kind of persona, or of a variant, in its color."""
    title = f' title="{escape(KINDS[kind])}"' if kind in KINDS else ""
    return f'<span class="kind"{title}><i class="{escape(kind, quote=True)}"></i>{escape(kind)}</span>'


def verdict(interval: Interval, *, less_is_better: bool = False) -> str:
    """Whether an interval leaves zero out, and on which side it lies."""
    if interval["low"] > 0:
        return "loss" if less_is_better else "gain"
    if interval["high"] < 0:
        return "gain" if less_is_better else "loss"
    return "open"


def difference(interval: Interval | None, *, less_is_better: bool = False) -> str:
    """A difference with its interval, in color where the interval leaves zero out."""
    if interval is None:
        return ""
    how = verdict(interval, less_is_better=less_is_better)
    return f'<b class="{how}">{interval["mean"]:+.4f}</b>{beside(interval)}'


def beside(interval: Interval | None) -> str:
    """An interval, to stand behind its mean."""
    return f' <span class="range">{ends(interval)}</span>'


def ends(interval: Interval | None) -> str:
    """The two ends of an interval; one user has none."""
    if interval is None or not math.isfinite(interval["low"]):
        return "–"
    return f"[{interval['low']:.4f}, {interval['high']:.4f}]"


def share(interval: Interval) -> str:
    """A share and its interval, in percent."""
    if not math.isfinite(interval["low"]):
        return f"{100 * interval['mean']:.1f} %"
    low, high = 100 * interval["low"], 100 * interval["high"]
    return f'{100 * interval["mean"]:.1f} % <span class="range">[{low:.1f}, {high:.1f}]</span>'
