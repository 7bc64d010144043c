"""The page that shows people what an evaluation found: one file, drawn from `metrics.json` alone, without a network.

No script and no address of anything elsewhere: what users have written stands in it as text and can do nothing.
"""

import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from persona.report import charts, markup

_VERSIONED = ("persona-plug", "torch", "transformers", "deepspeed", "ray", "deltalake", "rouge-score", "numpy")
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
    variants = settings["variants"]
    personal = "own" in metrics["loss"]
    sections = [
        _head(metrics),
        markup.section("Loss", _loss_text(metrics), _losses(metrics)),
        markup.section("Scores", _score_text(metrics), _scores(metrics)) if metrics["scores"] else "",
        markup.section("Ranking", markup.RANKING_TEXT, _ranking(metrics)) if "ranking" in metrics else "",
        '<div class="pair">',
        *(_of_users(metrics) if personal else ()),
        markup.section("Training", _TRAINING_TEXT, _curves(metrics)),
        "</div>",
        *(_of_requests(metrics) if personal else ()),
        markup.section("Requests evenly spaced over the set", "", _examples(metrics["examples"], variants)),
        markup.section("Settings, versions, cost", "", _origin(metrics)),
    ]
    return markup.page(settings["out"], sections)


def _of_users(metrics: Metrics) -> list[str]:
    return [
        markup.section("Gain against history length", _LENGTH_TEXT, _lengths(metrics)),
        markup.section("A map of personas", _MAP_TEXT, _map(metrics)),
        markup.section("Who gains", _who_text(metrics), _who(metrics)),
    ]


def _of_requests(metrics: Metrics) -> list[str]:
    variants = metrics["settings"]["variants"]
    return [
        markup.section("What the persona listened to", _listening_text(metrics), _listening(metrics)),
        markup.section("Where the own persona helps most", "", _examples(metrics["largest_gains"], variants)),
        markup.section("Where it harms most", "", _examples(metrics["largest_losses"], variants)),
    ]


_LENGTH_TEXT = (
    "Nats a token that the own persona saves, for requests whose visible history is about as long; the bars are "
    "95 % intervals over users."
)
_TRAINING_TEXT = "Loss of the training steps, with parts of the histories left out, and of held-out requests."
_MAP_TEXT = (
    "Each point is a user, placed by the two directions in which personas differ most (weighed without the request). "
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
        markup.tile(
            f"saved against {markup.KINDS[kind].split(':')[0]}",
            f"{saved['mean']:+.4f}",
            f"nats a token, {markup.ends(saved)}",
            markup.verdict(saved),
        )
        for kind, saved in metrics["loss_saved_by_own"].items()
    ]
    return (
        '<header><p class="eyebrow">persona-plug · evaluation</p>'
        f"<h1>{escape(_short(settings['llm']['name']))} with a plug of "
        f"{settings['plug_options']['persona_tokens']} persona {_tokens(settings)}</h1>"
        f"<p>{metrics['requests']:,} requests of {metrics['users']:,} users from "
        f"<code>{escape(settings['requests'])}</code></p>{markup.warnings(warnings)}"
        f'<div class="tiles">{"".join(tiles)}</div></header>'
    )


def _short(model: str) -> str:
    """The hub id, or the last part of a folder's path."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "s3://")) else model


def _tokens(settings: Mapping[str, Any]) -> str:
    return "token" if settings["plug_options"]["persona_tokens"] == 1 else "tokens"


def _loss_text(metrics: Metrics) -> str:
    text = (
        f"Negative log-likelihood of the targets in nats a token, lower is better: {metrics['requests']:,} requests of "
        f"{metrics['users']:,} users, in brackets 95 % intervals by a bootstrap over users."
    )
    paired = (
        " “Saved by own” is paired: the same requests on both sides. Against none it may be what any history tells, "
        "against other it is only what is the user's own."
    )
    return text + (paired if metrics["loss_saved_by_own"] else "")


def _losses(metrics: Metrics) -> str:
    rows = [
        [
            markup.name(kind),
            f"{loss['mean']:.4f}{markup.beside(loss)}",
            markup.difference(metrics["loss_saved_by_own"].get(kind)),
        ]
        for kind, loss in metrics["loss"].items()
    ]
    return markup.table(["persona", "loss", "saved by own"], rows)


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
            interval = markup.beside(metrics["score_intervals"][variant].get(about))
            shown = f"{value:.4f}" if about != name else f"{value:.4f}{interval}"
            mean = f"{scores[about]:.4f}{interval}" if about != name else ""
            gained = metrics["score_gained_by_own"].get(name, {}).get(variant)
            rows.append([markup.name(variant), escape(name), shown, mean, markup.difference(gained)])
    return markup.table(["variant", "score", "value", "plain mean", "gained by own"], rows)


def _ranking(metrics: Metrics) -> str:
    rows = [
        [markup.name(kind), *(markup.share(found[way]) if way in found else "" for way in ("likelier", "calibrated"))]
        for kind, found in metrics["ranking"].items()
    ]
    return markup.table(["persona", "by nats", "calibrated"], rows)


def _lengths(metrics: Metrics) -> str:
    rows = metrics["gain_by_history_length"]
    found = [
        (_span(row), {kind: (one["mean"], one["low"], one["high"]) for kind, one in row["saved_by_own"].items()})
        for row in rows
    ]
    counts = markup.table(
        ["behaviors seen", "requests", "users"],
        [[_span(row), f"{row['requests']:,}", f"{row['users']:,}"] for row in rows],
    )
    chart = charts.groups(found, x="behaviors that the request sees", y="nats a token saved")
    kinds = list(found[0][1]) if found else []
    return markup.figure(chart, {kind: f"against {kind}" for kind in kinds}) + markup.more(
        "How many requests these are", counts
    )


def _span(row: Mapping[str, Any]) -> str:
    return str(row["from"]) if row["from"] == row["to"] else f"{row['from']}–{row['to']}"


def _curves(metrics: Metrics) -> str:
    training = metrics["training"]
    series = {
        "train": training.get("training_curve", []),
        "held-out": training.get("validation_curve", []),
    }
    chart = charts.lines(series, x="step", y="nats a token")
    return markup.figure(chart, {name: name for name, points in series.items() if points})


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
    return markup.figure(chart, {"gain": "own saves", "loss": "own costs"})


def _who_text(metrics: Metrics) -> str:
    users = metrics["map"]
    gaining = sum(one["saved"] > 0 for one in users)
    return f"The users of the map in the order of what the own persona saves them: {gaining} of {len(users)} gain."


def _who(metrics: Metrics) -> str:
    saved = sorted((one["saved"] for one in metrics["map"]), reverse=True)
    points = [(100 * (i + 0.5) / len(saved), value) for i, value in enumerate(saved)]
    chart = charts.lines({"own": points}, x="share of the users (%)", y="nats a token saved", zero=True)
    return markup.figure(chart, {"own": "own against another's"})


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
    rows += [
        f"<dt>{markup.name(name)}</dt><dd>{escape(_cut(example[name])) or '<em>empty</em>'}</dd>" for name in variants
    ]
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
    return "".join(markup.more(name, markup.table(["", ""], _pairs(values))) for name, values in parts.items())


def _pairs(values: Mapping[str, Any]) -> list[list[str]]:
    return [[escape(str(name)), f"<code>{escape(_said(value))}</code>"] for name, value in values.items()]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_said(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
