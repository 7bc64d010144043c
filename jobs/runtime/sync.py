"""`--sync`: delete stored behaviors that are absent from the input, unless they may only be unread."""

from typing import TYPE_CHECKING

from jobs.runtime import reading
from jobs.runtime.tally import Counts, Tally

if TYPE_CHECKING:
    from persona.store.store import Store
    from persona.store.writer import Writer


def blocker(counts: Counts, max_reject_fraction: float) -> str:
    """Why nothing must be deleted; empty if deleting is safe. Valid once all input has been read."""
    if unreadable := int(counts.get("read", {}).get("unreadable", 0)):
        return f"{unreadable:,} files or lines could not be read and may contain the absent behaviors"
    if reading.exit_code(counts, max_reject_fraction):
        return "more rows than --max-reject-fraction allows were rejected and may contain the absent behaviors"
    return ""


def delete_absent_buckets(store: "Store", writer: "Writer", tally: Tally, max_reject_fraction: float) -> None:
    """Delete the buckets that were never compared with the store because the input has no row of them."""
    if blocker(tally.totals(), max_reject_fraction):
        return
    compared = set(tally.units("compare"))
    for bucket in sorted({str(bucket) for bucket in store.buckets()} - compared):
        tally.note("compare", bucket, {"gone": writer.remove_partition(bucket)})
