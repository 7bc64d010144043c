"""What the personas save on held-out requests with the weights that become the plug, and a warning if own is no better.

Training workers measure it at their end, because they hold the LLM and the requests already.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime import cli
from persona.options import PersonaKind

if TYPE_CHECKING:
    from jobs.runtime.training.spec import RunSpec
    from persona.options import Select
    from persona.plug.personalized import Row

CheckpointT = TypeVar("CheckpointT")
Metrics = Mapping[str, Any]

PERSONAS = (PersonaKind.OWN, PersonaKind.NONE, PersonaKind.OTHER)
_ADVICE = (
    "try more requests or --epochs, a larger --persona-gain or --alignment, and check as_of: each request needs older "
    "texts of its user (docs/training.md, When own is not ahead)"
)


def selected(reported: Sequence[tuple[CheckpointT, Metrics]], select: "Select") -> tuple[CheckpointT, Metrics]:
    """The checkpoint whose weights become the plug, and the metrics that it was reported with."""
    if select == "last":
        return max(reported, key=lambda pair: pair[1]["step"])
    return min(reported, key=lambda pair: (pair[1]["validation_loss"], pair[1]["step"]))


def measure(engine: Any, spec: "RunSpec", rows: "Sequence[Row]", step: int) -> dict[str, list[Any]] | None:
    """Loads the selected weights into the engine, and measures the losses of all workers' rows under each persona.

    All workers call it together, after the last step.

    Args:
        engine: as after that step; no more steps can follow.
        spec: of the run.
        rows: this worker's held-out requests, with the columns of `inputs.with_other_history`.
        step: the last one.

    Returns:
        columns as in `persona.evaluation.losses.by_persona`; None for a plug without histories (prompt tuning).
    """
    from pathlib import Path

    from ray import train

    from persona.training import checkpoint
    from persona.training.deepspeed import gather_over_workers
    from persona.training.step import target_losses

    if spec.training.empty_history == 1:
        return None
    kept = [(one.checkpoint, one.metrics) for one in train.get_all_reported_checkpoints()]
    chosen, metrics = selected(kept, spec.select)
    if metrics["step"] != step:
        with chosen.as_directory() as folder:
            checkpoint.load_selected(engine, Path(folder))
    histories = {PersonaKind.OWN: "history", PersonaKind.OTHER: "other_history"}
    found: list[dict[str, Any]] = []
    for persona in PERSONAS:
        seen = [{**row, "history": row[histories[persona]] if persona in histories else b""} for row in rows]
        for row, (nats, n_tokens) in zip(rows, target_losses(engine, seen, spec.training), strict=True):
            names = ("request_id", "user_id", "target", "n_behaviors")
            numbers = {"persona": str(persona), "nats": nats, "tokens": n_tokens}
            found.append({name: row[name] for name in names} | numbers)
    everything = gather_over_workers(found)
    return {name: [one[name] for one in everything] for name in everything[0]}


def summarize(losses: Mapping[str, Sequence[Any]] | None) -> dict[str, Any] | None:
    """Losses and what own saves, with intervals over users, as `jobs.evaluate` has them, and a warning or "".

    It holds plain values for JSON; None without losses.
    """
    from persona.evaluation.losses import by_persona
    from persona.evaluation.one_run import summarize_losses

    if losses is None:
        return None
    found = summarize_losses(by_persona(losses, PERSONAS), seed=0)
    plain: dict[str, Any] = cli.plain({**found, "warning": _warning(found["loss_saved_by_own"]["other"])})
    return plain


def cautions(spec: "RunSpec", n_steps: int) -> list[tuple[str, str]]:
    """Warnings before a training of settings from which little was gained in our measurements."""
    from persona.evaluation.benchmark_verdict import FEW_STEPS

    found = []
    if n_steps < FEW_STEPS:
        advice = "take more --epochs or more requests (docs/training.md, Start here)"
        found.append(f"in fewer than {FEW_STEPS} steps a plug learns little from histories; {advice}")
    warmup = spec.training.persona_warmup
    if n_steps < warmup and spec.training.empty_history < 1:
        found.append(
            f"after {n_steps} of --persona-warmup {warmup} steps the persona has {n_steps / warmup:.0%} of its strength"
        )
    if spec.retrieval.retrieve and spec.training.alignment:
        found.append("with alignment a plug does not learn to read retrieved texts; add --alignment 0")
    return [("warning", caution) for caution in found]


def _warning(saved: Mapping[str, Any]) -> str:
    """What to try when the own persona is not ahead of another user's on held-out users."""
    from persona.report import formats

    difference = f"it saves {saved['mean']:+.4f} nats a token {formats.signed_bounds(saved)}"
    return {
        "gain": "",
        "loss": f"own is behind other on held-out users: {difference}. The plug does not help its users; {_ADVICE}",
        "noise": f"own is not ahead of other on held-out users: {difference}. So far no user gains from their own "
        f"history; {_ADVICE}",
        "unknown": "the held-out requests are of a single user, so it is unknown whether own is ahead of other; hold "
        "out more users (--validation-fraction, --validation)",
    }[formats.verdict(saved)]
