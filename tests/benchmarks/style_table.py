"""The table of `style`: for each loss the mean over its seeds, with intervals over authors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona.evaluation.intervals import Interval, bootstrap, paired_bootstrap
from persona.strengths import parse
from tests.benchmarks.style_judge import STYLES, read

Runs = Sequence[dict[str, Any]]
_ORDER = ("bare", "nll", "preference", "both")


def write(results: Path, out: Path) -> str:
    """The table as text; its numbers are written to `out`."""
    found = read(results)
    if not found:
        return "nothing has been judged yet"
    names = [name for one in _ORDER for name in (one, f"{one}-control") if name in found]
    numbers = {name: _numbers(found[name], found.get(f"{name}-control")) for name in names}
    out.write_text(json.dumps(numbers, indent=2))
    return "\n\n".join([_losses_text(numbers), _obedience_text(numbers, found), _strengths_text(numbers)])


def _numbers(runs: Runs, control: Runs | None) -> dict[str, Any]:
    """All numbers of one loss; losses are nats a token, differences below 0 favor the first."""
    found: dict[str, Any] = {"seeds": [run["seed"] for run in runs], "requests": len(runs[0]["users"])}
    for kind in ("plain", "styled"):
        personas = list(runs[0][kind])
        found[kind] = {persona: _value(_loss(runs, kind, persona)) for persona in personas}
        if "own" in personas:
            for other in ("none", "other"):
                found[kind][f"own − {other}"] = _value(_difference(runs, kind, "own", runs, other))
            found[kind]["of seeds"] = [_difference([run], kind, "own", [run], "other").mean for run in runs]
            found[kind]["told apart"] = _value(_told_apart(runs, kind))
            if control:
                same = [run for run in runs if run["seed"] in [one["seed"] for one in control]]
                found[kind]["own − control"] = _value(_difference(same, kind, "own", control, "none"))
    found["obeys"] = {
        persona: {
            "all": _mean(runs, persona),
            **{style: _mean(runs, persona, style) for style in STYLES},
            "words": float(np.mean([len(text.split()) for run in runs for text in run["answers"][persona]["texts"]])),
            "different": float(np.mean([len(set(run["answers"][persona]["texts"])) for run in runs])),
        }
        for persona in runs[0]["answers"]
    }
    found["strengths"] = {
        persona: _value(_difference(runs, "styled", persona, runs, persona.replace("own", "other", 1)))
        for persona in runs[0]["styled"]
        if persona.startswith("own")
    }
    return found


def _nats(runs: Runs, kind: str, persona: str, name: str = "nats") -> np.ndarray:
    """The mean over the seeds, for each request."""
    return np.mean([run[kind][persona][name] for run in runs], axis=0)


def _loss(runs: Runs, kind: str, persona: str) -> Interval:
    tokens = runs[0][kind][persona]["tokens"]
    return bootstrap(_nats(runs, kind, persona), runs[0]["users"], weights=np.array(tokens, float))


def _difference(runs: Runs, kind: str, persona: str, others: Runs, other: str) -> Interval:
    """Nats a token of `persona` minus those of `other`, paired by request."""
    tokens = np.array(runs[0][kind][persona]["tokens"], float)
    pair = _nats(runs, kind, persona), _nats(others, kind, other)
    return paired_bootstrap(*pair, runs[0]["users"], weights=tokens)


def _told_apart(runs: Runs, kind: str) -> Interval:
    """How often the own history helps the author's title more, a token, than it helps another author's title."""

    def saved(prefix: str) -> np.ndarray:
        tokens = np.array(runs[0][kind]["own"][f"{prefix}tokens"])
        nats = [_nats(runs, kind, persona, f"{prefix}nats") for persona in ("none", "own")]
        return (nats[0] - nats[1]) / tokens

    return bootstrap((saved("") > saved("rejected_")).astype(float), runs[0]["users"])


def _mean(runs: Runs, persona: str, style: str | None = None) -> float:
    return float(
        np.mean(
            [
                obeys
                for run in runs
                for obeys, its in zip(run["answers"][persona]["obeys"], run["styles"], strict=True)
                if style in (None, its)
            ]
        )
    )


def _value(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _cell(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"


def _losses_text(numbers: dict[str, Any]) -> str:
    lines = ["Losses in nats a token; differences below 0 favor the own persona", ""]
    for kind in ("styled", "plain"):
        lines.append(f"{kind:<20}{'loss':>8}  {'own − other':<28}{'own − none':<28}{'own − control':<28}told apart")
        for name, one in numbers.items():
            of = one[kind]
            loss = next(iter(of.values()))["mean"]
            cells = [_cell(of.get(f"own − {other}")) for other in ("other", "none", "control")]
            apart = f"{of['told apart']['mean']:.3f}" if "told apart" in of else "–"
            lines.append(f"{name:<20}{loss:>8.4f}  {''.join(f'{cell:<28}' for cell in cells)}{apart}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _obedience_text(numbers: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    targets = next(iter(found.values()))[0]
    lines = [f"Share of answers that obey the style (authors' own titles: {np.mean(targets['targets_obey']):.3f})", ""]
    heads = "".join(f"{style:>10}" for style in STYLES)
    lines.append(f"{'':<20}{'persona':<22}{'all':>7}{heads}{'words':>8}{'different':>11}")
    for name, one in numbers.items():
        for persona, of in one["obeys"].items():
            shares = "".join(f"{of[style]:>10.3f}" for style in STYLES)
            tail = f"{of['words']:>8.1f}{of['different']:>11.1f}"
            lines.append(f"{name:<20}{persona:<22}{of['all']:>7.3f}{shares}{tail}")
    return "\n".join(lines)


def _strengths_text(numbers: dict[str, Any]) -> str:
    lines = ["Own − other over the strength of the persona, and obedience there", ""]
    for name, one in numbers.items():
        for persona, value in sorted(one["strengths"].items(), key=lambda pair: parse(pair[0])[1]):
            obeys = one["obeys"][persona]["all"]
            lines.append(f"{name:<20}{f'α = {parse(persona)[1]:g}':<10}{_cell(value):<28}{obeys:.3f}")
    return "\n".join(lines)
