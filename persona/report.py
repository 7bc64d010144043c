"""The page that shows people what an evaluation found: one file, drawn from `metrics.json` alone, without a network.

No script and no address of anything elsewhere: what users have written stands in it as text and can do nothing.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from persona import charts
from persona.report_style import STYLE

_VERSIONED = ("persona-plug", "torch", "transformers", "deepspeed", "ray", "deltalake", "rouge-score", "numpy")
_KINDS = {
    "own": "the user's own persona",
    "other": "another user's persona",
    "mean": "the own history, each behavior weighed alike",
    "none": "no history: instruction token and default persona",
    "bare": "the LLM without the plug",
}
_BETTER = {"mae": "lower", "rmse": "lower"}
# The plain mean is what the interval is about; the median beside it is LaMP's official number.
_INTERVAL_OF = {"rouge1": "rouge1_mean", "rougeL": "rougeL_mean"}

Metrics = Mapping[str, Any]


def versions() -> dict[str, str]:
    """Of Python and of the packages that a number may depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def page(metrics: Metrics) -> bytes:
    """The report as one HTML file."""
    settings = metrics["settings"]
    sections = [
        _head(metrics),
        _section("Loss", _loss_text(metrics), _losses(metrics)),
        _section("Scores", _score_text(metrics), _scores(metrics)) if metrics["scores"] else "",
        '<div class="pair">',
        _section("Gain against history length", _LENGTH_TEXT, _lengths(metrics)),
        _section("Training", _TRAINING_TEXT, _curves(metrics)),
        _section("A map of personas", _MAP_TEXT, _map(metrics)),
        _section("Who gains", _who_text(metrics), _who(metrics)),
        "</div>",
        _section("What the persona listened to", _listening_text(metrics), _listening(metrics)),
        _section("Where the own persona helps most", "", _examples(metrics["largest_gains"], settings["variants"])),
        _section("Where it harms most", "", _examples(metrics["largest_losses"], settings["variants"])),
        _section("Requests evenly spaced over the set", "", _examples(metrics["examples"], settings["variants"])),
        _section("Settings, versions, cost", "", _origin(metrics)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>persona-plug: {escape(settings["out"])}</title>'
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    ).encode()


_LENGTH_TEXT = (
    "Nats a token that the own persona saves, for requests whose visible history is about as long; the bars are "
    "95 % intervals over users."
)
_TRAINING_TEXT = "Loss of the training steps, with parts of the histories left out, and of held-out requests."
_MAP_TEXT = (
    "Each point is a user, placed by the two directions in which personas differ most (all behaviors weighed alike). "
    "Color: what the own persona saves or costs this user against another's."
)


def _head(metrics: Metrics) -> str:
    settings = metrics["settings"]
    warnings = []
    if metrics["limited"]:
        warnings.append(f"--limit {settings['limit']} was given: these are not the numbers of the whole set.")
    unanswered = metrics["unanswered_variants"]
    warnings += [
        f"No answers of the variant {variant!r} are in the store, so it has no scores." for variant in unanswered
    ]
    if metrics["users"] < 2:
        warnings.append("All requests are of one user: no interval can be given.")
    if metrics["rejects"]:
        warnings.append(f"{metrics['rejects']:,} rows of the requests could not be read; see the table of rejects.")
    tiles = [
        _tile(
            f"saved against {_KINDS[kind].split(':')[0]}",
            f"{saved['mean']:+.4f}",
            f"nats a token, {_range(saved)}",
            _verdict(saved),
        )
        for kind, saved in metrics["loss_saved_by_own"].items()
    ]
    shown = "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)
    return (
        f'<header><p class="eyebrow">persona-plug · evaluation</p><h1>{escape(settings["llm"]["name"])} with a plug of '
        f"{settings['plug_options']['persona_tokens']} persona {_tokens(settings)}</h1>"
        f"<p>{metrics['requests']:,} requests of {metrics['users']:,} users from "
        f"<code>{escape(settings['requests'])}</code></p>{shown}"
        f'<div class="tiles">{"".join(tiles)}</div></header>'
    )


def _tokens(settings: Mapping[str, Any]) -> str:
    return "token" if settings["plug_options"]["persona_tokens"] == 1 else "tokens"


def _tile(name: str, value: str, note: str, verdict: str) -> str:
    return (
        f'<div class="tile {verdict}"><span>{escape(name)}</span><strong>{value}</strong>'
        f"<span>{escape(note)}</span></div>"
    )


def _verdict(interval: Mapping[str, float]) -> str:
    """Whether an interval leaves zero out, and on which side it lies."""
    if interval["low"] > 0:
        return "gain"
    return "loss" if interval["high"] < 0 else "open"


def _loss_text(metrics: Metrics) -> str:
    return (
        f"Negative log-likelihood of the targets in nats a token, lower is better: {metrics['requests']:,} requests of "
        f"{metrics['users']:,} users, in brackets 95 % intervals by a bootstrap over users. “Saved by own” is paired: "
        "the same requests on both sides. The comparison to watch is own against other, since any history tells "
        "the LLM the task."
    )


def _losses(metrics: Metrics) -> str:
    rows = [
        [
            _name(kind),
            f"{loss['mean']:.4f}{_beside(loss)}",
            _difference(metrics["loss_saved_by_own"].get(kind)),
        ]
        for kind, loss in metrics["loss"].items()
    ]
    return _table(["persona", "loss", "saved by own"], rows)


def _score_text(metrics: Metrics) -> str:
    first = next(iter(metrics["scores"].values()))
    lower = [name for name in first if name in _BETTER]
    text = "Lower is better. " if lower else "Higher is better. "
    if "rouge1" in first:
        text += (
            "rouge1 and rougeL are the median of a seeded bootstrap, as LaMP reports them; the intervals and gains are "
            "about the plain means. "
        )
    return text + f"{metrics['requests']:,} requests of {metrics['users']:,} users."


def _scores(metrics: Metrics) -> str:
    rows = []
    for variant, scores in metrics["scores"].items():
        for name, value in scores.items():
            if name in _INTERVAL_OF.values():
                continue
            about = _INTERVAL_OF.get(name, name)
            interval = _beside(metrics["score_intervals"][variant].get(about))
            shown = f"{value:.4f}" if about != name else f"{value:.4f}{interval}"
            mean = f"{scores[about]:.4f}{interval}" if about != name else ""
            gained = metrics["score_gained_by_own"].get(name, {}).get(variant)
            rows.append([_name(variant), escape(name), shown, mean, _difference(gained)])
    heads = ["variant", "score", "value", "plain mean", "gained by own"]
    if not any(row[3] for row in rows):
        heads, rows = [*heads[:3], *heads[4:]], [[*row[:3], *row[4:]] for row in rows]
    return _table(heads, rows)


def _difference(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f'<b class="{_verdict(interval)}">{interval["mean"]:+.4f}</b>{_beside(interval)}'


def _lengths(metrics: Metrics) -> str:
    rows = metrics["gain_by_history_length"]
    found = [
        (_span(row), {kind: (one["mean"], one["low"], one["high"]) for kind, one in row["saved_by_own"].items()})
        for row in rows
    ]
    counts = _table(
        ["behaviors seen", "requests", "users"],
        [[_span(row), f"{row['requests']:,}", f"{row['users']:,}"] for row in rows],
    )
    chart = charts.groups(found, x="behaviors that the request sees", y="nats a token saved")
    kinds = list(found[0][1]) if found else []
    return _figure(chart, {kind: f"against {kind}" for kind in kinds}) + _more("How many requests these are", counts)


def _span(row: Mapping[str, Any]) -> str:
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']}–{row['to']}"


def _curves(metrics: Metrics) -> str:
    training = metrics["training"]
    series = {
        "train": training.get("training_curve", []),
        "held-out": training.get("validation_curve", []),
    }
    chart = charts.lines(series, x="step", y="nats a token")
    return _figure(chart, {name: name for name, points in series.items() if points})


def _map(metrics: Metrics) -> str:
    points = [
        (
            one["x"],
            one["y"],
            one["saved"],
            f"{one['user_id']}: {one['n_behaviors']} behaviors, saved {one['saved']:+.4f}",
        )
        for one in metrics["map"]
    ]
    chart = charts.cloud(points, x="first principal direction", y="second")
    return _figure(chart, {"gain": "own saves", "loss": "own costs"})


def _who_text(metrics: Metrics) -> str:
    users = metrics["map"]
    gaining = sum(one["saved"] > 0 for one in users)
    return f"The users of the map in the order of what the own persona saves them: {gaining} of {len(users)} gain."


def _who(metrics: Metrics) -> str:
    saved = sorted((one["saved"] for one in metrics["map"]), reverse=True)
    points = [(100 * (i + 0.5) / len(saved), value) for i, value in enumerate(saved)]
    chart = charts.lines({"own": points}, x="share of the users (%)", y="nats a token saved", zero=True)
    return _figure(chart, {"own": "own against another's"})


def _figure(chart: str, legend: Mapping[str, str]) -> str:
    if not chart:
        return '<p class="quiet">Nothing to draw here.</p>'
    keys = "".join(f'<span><i class="{kind}"></i>{escape(text)}</span>' for kind, text in legend.items())
    return f'<figure>{chart}<figcaption class="legend">{keys}</figcaption></figure>'


def _listening_text(metrics: Metrics) -> str:
    text = "The past texts with the largest weights (eq. 3), for the requests with the largest gains."
    if metrics["settings"]["texts"] is None:
        text += " Give the histories with --texts to see them in words."
    return text


def _listening(metrics: Metrics) -> str:
    chosen = metrics["largest_gains"] or metrics["examples"][:3]
    return "".join(_heard(one) for one in chosen)


def _heard(example: Mapping[str, Any]) -> str:
    top = max((one["weight"] for one in example["listened_to"]), default=1.0)
    rows = []
    for one in example["listened_to"]:
        words = one["text"] if one["text"] is not None else one["behavior_id"]
        date = f'<span class="quiet"> {escape(one["written"])}</span>' if one["written"] else ""
        rows.append(
            f'<li><div class="bar"><i style="width:{100 * one["weight"] / top:.1f}%"></i></div>'
            f"<b>{100 * one['weight']:.1f} %</b>{date}<p>{escape(words)}</p></li>"
        )
    if not rows:
        rows = ['<li class="quiet">This request sees no behavior.</li>']
    of = f"{len(example['listened_to'])} of {example['n_behaviors']} behaviors"
    return (
        f'<article><p class="ask">{escape(_cut(example["input"]))}</p>'
        f'<p class="quiet">{escape(example["user_id"])}, {of}</p><ol class="heard">{"".join(rows)}</ol></article>'
    )


def _examples(examples: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> str:
    if not examples:
        return '<p class="quiet">There are none.</p>'
    return "".join(_example(one, [name for name in variants if name in one]) for one in examples)


def _example(example: Mapping[str, Any], variants: Sequence[str]) -> str:
    nats = example["nats_a_token"]
    rows = [f"<dt>target</dt><dd><b>{escape(_cut(example['target']))}</b></dd>"]
    rows += [f"<dt>{_name(name)}</dt><dd>{escape(_cut(example[name])) or '<em>empty</em>'}</dd>" for name in variants]
    losses = ", ".join(f"{escape(kind)} {value:.3f}" for kind, value in nats.items())
    return (
        f'<article><p class="ask">{escape(_cut(example["input"]))}</p><dl>{"".join(rows)}</dl>'
        f'<p class="quiet">{escape(example["user_id"])}, {example["n_behaviors"]} behaviors; nats a token of the '
        f"target: {losses}</p></article>"
    )


def _origin(metrics: Metrics) -> str:
    settings, training = metrics["settings"], metrics["training"]
    run = {name: value for name, value in training.items() if not name.endswith("_curve")}
    cost = {
        "seconds of this evaluation": metrics["seconds"],
        "seconds of training steps": training.get("seconds", "unknown"),
        "requests trained on": training.get("requests", "unknown"),
    }
    parts = {"Settings": settings, "Training": run, "Versions": metrics["versions"], "Cost": cost}
    return "".join(_more(name, _table(["", ""], _pairs(values))) for name, values in parts.items())


def _pairs(values: Mapping[str, Any]) -> list[list[str]]:
    return [[escape(str(name)), f"<code>{escape(_said(value))}</code>"] for name, value in values.items()]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_said(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section(title: str, text: str, inside: str) -> str:
    words = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{words}{inside}</section>"


def _more(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = f"<thead><tr>{top}</tr></thead>" if any(heads) else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _name(kind: str) -> str:
    title = f' title="{escape(_KINDS[kind])}"' if kind in _KINDS else ""
    return f'<span class="kind"{title}><i class="{escape(kind, quote=True)}"></i>{escape(kind)}</span>'


def _beside(interval: Mapping[str, float] | None) -> str:
    return f' <span class="range">{_range(interval)}</span>'


def _range(interval: Mapping[str, float] | None) -> str:
    if interval is None or not math.isfinite(interval["low"]):
        return "–"
    return f"[{interval['low']:.4f}, {interval['high']:.4f}]"


def _cut(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
