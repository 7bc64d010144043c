"""Ranking: whether the target of a request is likelier than a rejected text.

Shapes: R requests.
"""

from collections.abc import Mapping

import numpy as np

from persona.evaluation.intervals import Floats

FROM_HISTORY = ("own", "other", "mean")  # the kinds of persona that are made from a history


def outcomes(nats: Mapping[str, tuple[Floats, Floats]]) -> dict[str, dict[str, Floats]]:
    """By kind of persona and way of ranking (R,): 1 where the target wins, 0 where it loses, 0.5 for a tie.

    The way `likelier` ranks by loss: the text with fewer nats wins, which favors texts that are likely for anyone.
    `calibrated` ranks by gain over none: the text whose nats the persona lowers more, compared with `none`, wins. It
    exists for personas that are made from a history, if `none` was measured.

    Args:
        nats: for each kind of persona the nats of the targets (R,) and of the rejected texts (R,).
    """
    found = {persona: {"likelier": _target_wins(*pair)} for persona, pair in nats.items()}
    if "none" in nats:
        target_none_R, rejected_none_R = nats["none"]
        for persona in FROM_HISTORY:
            if persona in nats:
                target_R, rejected_R = nats[persona]
                gains = _target_wins(target_R - target_none_R, rejected_R - rejected_none_R)
                found[persona]["calibrated"] = gains
    return found


def _target_wins(target_R: Floats, rejected_R: Floats) -> Floats:
    wins_R: Floats = (np.sign(rejected_R - target_R) + 1) / 2
    return wins_R
