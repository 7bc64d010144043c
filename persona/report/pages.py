"""The pages of jobs.evaluate, jobs.compare, jobs.judge and jobs.locate: one HTML file each, made from the job's JSON.

A page has no script and no address of anything outside. Texts of users are escaped by the templates.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from persona.report import charts, drawing, formats, judged_wording, layer_wording, palette, wording
from persona.report.formats import Interval

if TYPE_CHECKING:
    from jinja2 import Environment

# Numbers by layer: what the page calls them, and which of their columns says what chance gives.
_LAYER_CHARTS = {
    "auc": ("AUC of a linear probe", "auc_shuffled"),
    "silhouette": ("silhouette", "silhouette_shuffled"),
    "moved": ("movement of the last token", "moved_shuffled"),
    "cosine": ("cosine of the last token", "cosine_shuffled"),
    "user_in_nearest": ("nearest request is of the same user", "user_in_nearest_shuffled"),
    "scan_precision": ("precision of the scan", None),
    "scan_recall": ("recall of the scan", None),
    "n_units": ("units in half of the runs", "n_units_shuffled"),
}
_MOST_OVERLAPS = 30
# The plain mean has the interval; the median next to it is LaMP's official number.
_PLAIN_MEAN = {"rouge1": "rouge1_mean", "rougeL": "rougeL_mean"}


@dataclass(frozen=True, kw_only=True)
class _Score:
    """A line of the table of scores; the interval is that of the plain mean if there is one."""

    variant: str
    name: str
    value: float
    plain_mean: float | None
    interval: Interval
    gained: Interval | None


def evaluation_page(metrics: Mapping[str, Any]) -> bytes:
    """The report of one evaluation, from the content of `metrics.json`."""
    users = metrics["map"]
    training = metrics["training"]
    return _page(
        "evaluation.html.j2",
        title=metrics["settings"]["out"],
        metrics=metrics,
        scores=list(_scores(metrics)),
        charts={
            "gain_by_history_length": charts.gain_by_history_length(metrics["gain_by_history_length"]),
            "persona_map": charts.persona_map(users),
            "gain_by_user": charts.gain_by_user(users),
            "training_curves": charts.training_curves(training),
            "plug_versions": charts.plug_versions(metrics.get("plug_versions")),
        },
        leaves_out_bare=charts.leaves_out_bare(metrics["loss_saved_by_own"]),
        origin={
            "Settings": metrics["settings"],
            "Training": {
                name: value for name, value in training.items() if name != "held_out" and not name.endswith("_curve")
            },
            "Versions": metrics["versions"],
            "Cost": {
                "seconds of this evaluation": metrics["seconds"],
                "seconds of training steps": training.get("seconds", "unknown"),
                "requests trained on": training.get("requests", "unknown"),
            },
        },
    )


def chart_files(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """Charts of the evaluation as PNG files, by name; those without data are left out."""
    found = {
        "gain.png": charts.gain_by_history_length(metrics["gain_by_history_length"]),
        "curves.png": charts.training_curves(metrics["training"]),
        "map.png": charts.persona_map(metrics["map"]),
    }
    return {name: drawing.png(chart) for name, chart in found.items() if chart is not None}


def comparison_page(found: Mapping[str, Any]) -> bytes:
    """The report of a comparison, from the content of `comparison.json`."""
    rows = [
        charts.ForestRow(
            label=f"{row['name']}/{row['persona']}", persona=row["persona"], interval=row["above_reference"]
        )
        for row in found["rows"]
        if row["above_reference"]
    ]
    return _page(
        "comparison.html.j2",
        title="comparison",
        found={"judged": [], **found},
        forest=charts.forest(rows, x="nats a token, difference to the reference"),
        leaves_out_bare=charts.leaves_out_bare(row.persona for row in rows),
        saved_by_own=wording.saved_by_own(found["rows"]),
        score_names=list(dict.fromkeys(name for row in found["rows"] for name in row["scores"])),
    )


def judged_page(found: Mapping[str, Any]) -> bytes:
    """The report of judged answers, from the content of `judged.json`."""
    return _page("judged.html.j2", title=found["settings"]["out"], found=found)


def locating_page(found: Mapping[str, Any]) -> bytes:
    """The report of jobs.locate, from the content of `locate.json`."""
    names = [one["group"] for one in found["groups"]]
    shown = [names[start : start + charts.CURVES_A_CHART] for start in range(0, len(names), charts.CURVES_A_CHART)]
    drawn = [
        charts.layer_curves(
            {name: _points(found, name, column) for name in some},
            y=title,
            chance={name: _points(found, name, chance) for name in some} if chance else {},
        )
        for column, (title, chance) in _LAYER_CHARTS.items()
        for some in shown
    ]
    return _page(
        "locating.html.j2",
        title=found["settings"]["out"],
        found=found,
        readings={one["group"]: layer_wording.group_reading(one) for one in found["groups"]},
        charts=[chart for chart in drawn if chart is not None],
        overlaps=sorted(found["overlaps"], key=lambda one: one["p"])[:_MOST_OVERLAPS],
        is_paired=any(row.get("moved") is not None for row in found["layers"]),
    )


def _points(found: Mapping[str, Any], group: str, column: str) -> list[tuple[float, float]]:
    rows = [row for row in found["layers"] if row["group"] == group and row.get(column) is not None]
    return [(row["layer"], row[column]) for row in rows]


def _scores(metrics: Mapping[str, Any]) -> Iterator[_Score]:
    for variant, scores in metrics["scores"].items():
        for name, value in scores.items():
            if name not in _PLAIN_MEAN.values():
                mean = _PLAIN_MEAN.get(name)
                yield _Score(
                    variant=variant,
                    name=name,
                    value=value,
                    plain_mean=scores[mean] if mean else None,
                    interval=metrics["score_intervals"][variant][mean or name],
                    gained=metrics["score_gained_by_own"].get(name, {}).get(variant),
                )


def _page(template: str, **content: Any) -> bytes:
    # A text from JSON may hold half a surrogate pair, which UTF-8 cannot encode.
    return _environment().get_template(template).render(**content).encode(errors="replace")


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("persona.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "bounds": formats.bounds,
        "cut": formats.cut,
        "flat": formats.flat,
        "model_name": formats.model_name,
        "percent_bounds": formats.percent_bounds,
        "series": palette.series,
        "span": formats.span,
        "stage": formats.stage,
        "svg": drawing.svg,
        "verdict": formats.verdict,
        "version": formats.version,
    }
    found.globals |= {
        "wording": wording,
        "judged_wording": judged_wording,
        "kinds": wording.KINDS,
        "light": palette.LIGHT,
        "dark": palette.DARK,
    }
    return found
