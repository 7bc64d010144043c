"""The lines of a summary, and of a dry run, that say what a run costs (`persona.cost`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jobs.runtime.cli import Summary
from jobs.runtime.session import Machines
from persona import cost
from persona.options import CostOptions

if TYPE_CHECKING:
    from persona.inputs.splits import Split


def known(count: Callable[[], float]) -> float:
    """The operations, or 0 for a model whose sizes are not known: no number is better than a wrong one."""
    try:
        return count()
    except KeyError:
        return 0.0


def planned_requests(
    would: str,
    options: CostOptions,
    splits: "Sequence[Split]",
    where: Mapping[str, Any],
    *,
    times: int,
    if_all: str,
    outputs: int = 0,
    beams: int = 1,
) -> Summary:
    """The dry run of a job that shows each request to the plug's LLM so many `times`, with inputs of full length.

    All of a row is taken for input, which the LLM reads as far as it may: what else it has is short beside it.
    """
    from persona.models import resolve as models

    record = where["record"]
    llm = models.resolve(where["llm"], revision=record.llm["revision"], flag="--llm")
    n_read = record.max_input_tokens
    n_requests = times * cost.tokens_of_text(sum(split.end - split.start for split in splits)) / n_read
    sizes = {"inputs": n_read, "outputs": outputs, "beams": beams}
    flops = known(lambda: cost.llm_flops(llm.config, n_requests=n_requests, **sizes))
    plan = Summary(table=[("would", would)], result={"dry_run": True, "would": would})
    return planned(plan, options, flops=flops, if_all=if_all)


def planned(summary: Summary, options: CostOptions, *, flops: float, if_all: str) -> Summary:
    """A dry run's summary with the work that it would be at most, in hours and money where rate and price are given."""
    if not flops:
        return summary
    hours = cost.gpu_hours(flops, options.tflops) if options.tflops else None
    found = {"tflop": round(flops / cost.TERA, 3), **_priced(hours, options)}
    about = f"about {found['tflop']:,.0f} TFLOP {if_all}"
    said = f"{about}; --tflops, what a GPU of yours reaches, makes hours of it" if hours is None else about
    return _with(summary, ("cost", f"{said}{_said(found)}"), found)


def spent(
    summary: Summary,
    options: CostOptions,
    machines: Machines,
    *,
    n_models: int,
    seconds: float,
    flops: float = 0.0,
    model_s: float = 0.0,
) -> Summary:
    """The summary of a run with the hours that its models took, also while they waited.

    `flops` is what the models did in `model_s` seconds, over all of them: where known, the rate that --tflops wants.
    """
    found = _priced(n_models * seconds / 3600, options) if machines.gpus else {}
    if flops and model_s:
        found["tflops"] = round(flops / model_s / cost.TERA, 6)
    if not found:
        return summary
    rate = f"{found['tflops']:.3g} TFLOP/s of each model while it worked" if "tflops" in found else ""
    return _with(summary, ("cost", (rate + _said(found)).removeprefix("; ")), found)


def _priced(hours: float | None, options: CostOptions) -> dict[str, float]:
    found = {} if hours is None else {"gpu_hours": round(hours, 4)}
    if hours is not None and options.gpu_hour_price is not None:
        found["price"] = round(hours * options.gpu_hour_price, 4)
    return found


def _said(found: dict[str, float]) -> str:
    hours = f"; {found['gpu_hours']:,.3g} GPU-hours" if "gpu_hours" in found else ""
    return f"{hours}, {found['price']:,.2f} at your price" if "price" in found else hours


def _with(summary: Summary, row: tuple[str, str], found: dict[str, float]) -> Summary:
    return replace(summary, table=[*summary.table, row], result={**summary.result, "cost": found})
