"""The sentences about layers; `found` is the content of `locate.json`."""

from collections.abc import Mapping
from typing import Any


def group_reading(one: Mapping[str, Any]) -> list[str]:
    """What was found about one group, with what chance gives beside each number; parts of one sentence."""
    sentences = []
    if one.get("auc") is not None:
        if one["auc"] > one["auc_shuffled_high"]:
            best = f"reads it best in layer {one['auc_layer']}"
            since = f", and nearly as well from layer {one['readable_from']} on"
        else:
            best, since = f"does not read it; its best layer is {one['auc_layer']}", ""
        shuffled = f"shuffled labels at most {one['auc_shuffled_high']:.2f}"
        sentences.append(f"a linear probe {best}: AUC {one['auc']:.2f} ({shuffled}){since}")
    if one.get("silhouette") is not None:
        sentences.append(
            f"it dominates most in layer {one['silhouette_layer']}: silhouette {one['silhouette']:.2f} "
            f"(shuffled {one['silhouette_shuffled']:.2f})"
        )
    if one.get("moved") is not None:
        sentences.append(
            f"the last token moves most in layer {one['moved_layer']}: by {one['moved']:.2f} of its length "
            f"({_two_digits(one['moved_shuffled'])} to another user's prompt)"
        )
    if one.get("scan_p") is not None:
        precision = "" if one["scan_precision"] is None else f", precision {one['scan_precision']:.2f}"
        sentences.append(
            f"half of the scans of layer {one['scan_layer']} find {one['n_units']:,} units (shuffled "
            f"{one['n_units_shuffled']:,}){precision}, recall {one['scan_recall']:.2f}, p ≤ {one['scan_p']:.3f}"
        )
    return sentences or ["too few rows"]


def _two_digits(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
