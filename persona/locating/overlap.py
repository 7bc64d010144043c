"""Whether two personas share more units of a layer than chance would give sets of their sizes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Units that two personas share in a layer.

    Attributes:
        shared: their number.
        expected: what two independent sets of these sizes share on average.
        p: how probable at least as many are by chance (hypergeometric).
    """

    shared: int
    expected: float
    p: float


def overlap(first: set[int], second: set[int], n_units: int) -> Overlap:
    """The overlap of two sets of the `n_units` units of a layer."""
    from scipy.stats import hypergeom

    shared = len(first & second)
    by_chance = hypergeom(n_units, len(first), len(second))
    return Overlap(shared=shared, expected=len(first) * len(second) / n_units, p=float(by_chance.sf(shared - 1)))
