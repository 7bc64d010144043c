"""The table that jobs.evaluate prints, from the content of `metrics.json`."""

from collections.abc import Mapping
from typing import Any


def table(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows about losses, rankings and scores."""
    from persona.report.wording import RANKINGS

    rows = [
        ("requests", f"{metrics['requests']:,} of {metrics['users']:,} users"),
        ("store", metrics["settings"]["store"]),
    ]
    if metrics["limited"]:
        rows.append(("warning", "--limit was given: these numbers are not of all requests"))
    for persona, loss in metrics["loss"].items():
        saved = metrics["loss_saved_by_own"].get(persona)
        note = f"; own saves {saved['mean']:+.4f} [{saved['low']:+.4f}, {saved['high']:+.4f}]" if saved else ""
        text = f"{loss['mean']:.4f} nats a token [{loss['low']:.4f}, {loss['high']:.4f}]{note}"
        rows.append((f"loss, {persona}", text))
    rows += [(f"scores, {variant}", "no answers in the store") for variant in metrics["unanswered_variants"]]
    for persona, found in metrics.get("ranking", {}).items():
        shares = [f"{RANKINGS[way]} {100 * one['mean']:.1f} % {_percent(one)}" for way, one in found.items()]
        rows.append((f"ranking, {persona}", f"target before rejected: {', '.join(shares)}"))
    for variant, scores in metrics["scores"].items():
        rows.append((f"scores, {variant}", ", ".join(f"{name} {value:.4f}" for name, value in scores.items())))
    return rows


def _percent(interval: Mapping[str, float]) -> str:
    return f"[{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"
