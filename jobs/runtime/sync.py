"""`--sync`: when stored behaviors that are absent from the input may be deleted."""

from jobs.runtime.reading import Found


def blocker(found: Found, max_reject_fraction: float) -> str:
    """Why nothing must be deleted, given what was found in the whole input; empty if deleting is safe."""
    if unreadable := found.total.unreadable:
        return f"{unreadable:,} files or lines could not be read and may contain the absent behaviors"
    if found.exit_code(max_reject_fraction):
        return "more rows than --max-reject-fraction allows were rejected and may contain the absent behaviors"
    return ""
