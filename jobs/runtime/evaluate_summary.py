"""The table that jobs.evaluate prints, from the content of `metrics.json`, and where those numbers come from."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.runtime.plugs import PlugRef

if TYPE_CHECKING:
    from persona.store.store import Store


def origin(store: "Store", plug: PlugRef) -> dict[str, Any]:
    """The plug, models and table versions behind the numbers."""
    from persona.evaluation.saved_run import READ_AS

    return {
        "store": store.uri,
        "plug_fingerprint": plug.fingerprint,
        "plug_options": asdict(plug.record.options),
        "prompt": asdict(plug.record.prompt),
        **{name: getattr(plug.record, name) for name in READ_AS},
        "llm": plug.record.llm,
        "encoder": plug.record.encoder,
        **{f"{table}_version": version for table, version in store.versions.items()},
    }


def table(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows about losses, rankings and scores."""
    from persona.report.wording import RANKINGS

    rows = [
        ("requests", f"{metrics['requests']:,} of {metrics['users']:,} users"),
        ("store", metrics["settings"]["store"]),
    ]
    if metrics["limited"]:
        rows.append(("warning", "--limit was given: these numbers are not of all requests"))
    rows += loss_rows(metrics)
    rows += [(f"scores, {variant}", "no answers in the store") for variant in metrics["unanswered_variants"]]
    for persona, found in metrics.get("ranking", {}).items():
        shares = [f"{RANKINGS[way]} {100 * one['mean']:.1f} % {_percent(one)}" for way, one in found.items()]
        rows.append((f"ranking, {persona}", f"target before rejected: {', '.join(shares)}"))
    for variant, scores in metrics["scores"].items():
        rows.append((f"scores, {variant}", ", ".join(f"{name} {value:.4f}" for name, value in scores.items())))
    return rows


def loss_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The loss under each kind of persona and what own saves, from the result of `one_run.summarize_losses`."""
    from persona.report import formats

    rows = []
    for persona, loss in found["loss"].items():
        saved = found["loss_saved_by_own"].get(persona)
        note = f"; own saves {saved['mean']:+.4f} {formats.signed_bounds(saved)}" if saved else ""
        rows.append((f"loss, {persona}", f"{loss['mean']:.4f} nats a token {formats.bounds(loss)}{note}"))
    return rows


def _percent(interval: Mapping[str, float]) -> str:
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
