"""The rows of a summary, and of a dry run, that show what a run costs (computed by `persona.cost`)."""

from collections.abc import Callable
from dataclasses import replace

from jobs.runtime import first_look
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Requests
from jobs.runtime.plugs import PlugRef
from jobs.runtime.session import Machines
from persona import cost
from persona.options import CostOptions


def known(count: Callable[[], float]) -> float:
    """The result of `count`, or 0 for a model whose config lacks a size: no number is better than a wrong one."""
    try:
        return count()
    except KeyError:
        return 0.0


def planned_requests(
    would: str,
    options: CostOptions,
    requests: Requests,
    plug: PlugRef,
    *,
    needs_target: bool,
    limit: int | None,
    passes: int,
    if_all: str,
    outputs: int = 0,
    beams: int = 1,
) -> Summary:
    """The dry run of a job in which the plug's LLM reads each request `passes` times, with texts of the mean length.

    `limit` is the value of --limit.
    """
    from persona.models import resolve as models

    record = plug.record
    llm = models.resolve(plug.llm, revision=record.llm["revision"], flag="--llm")
    found = first_look.n_requests(requests, needs_target=needs_target).at_most(limit)
    n_read = round(min(record.max_input_tokens, found.mean_tokens))
    n_requests = passes * found.n
    flops = known(
        lambda: cost.llm_flops(llm.config, n_requests=n_requests, inputs=n_read, outputs=outputs, beams=beams)
    )
    times = f"{found}, each read {passes} times" if passes > 1 else str(found)
    table = [("would", would), ("requests", times), *requests.rows()]
    result = {"dry_run": True, "would": would, "requests": found.n, **requests.facts()}
    return planned(Summary(table=table, result=result), options, flops=flops, if_all=if_all)


def planned(summary: Summary, options: CostOptions, *, flops: float, if_all: str) -> Summary:
    """Adds the work that a run would do at most, and hours and price where a speed and a price are given."""
    if not flops:
        return summary
    hours = cost.gpu_hours(flops, options.tflops) if options.tflops else None
    found = {"tflop": round(flops / cost.TERA, 3), **_hours_and_price(hours, options)}
    hint = "" if options.tflops else "; give --tflops, the speed in the summary of a run of embed, to see hours"
    return _with_cost(summary, f"about {found['tflop']:,.0f} TFLOP {if_all}{hint}{_in_words(found)}", found)


def spent(
    summary: Summary,
    options: CostOptions,
    machines: Machines,
    *,
    n_gpus: int,
    seconds: float,
    flops: float = 0.0,
    model_s: float = 0.0,
) -> Summary:
    """Adds the GPU-hours of a run, in which the time that models waited counts too.

    Args:
        summary: of the run.
        options: the price.
        machines: no hours are shown without GPUs.
        n_gpus: GPUs that the run reserved.
        seconds: of the whole run.
        flops: operations of all models together, if known; they give the speed for --tflops.
        model_s: seconds that the models worked, summed over all of them.
    """
    found = _hours_and_price(n_gpus * seconds / 3600, options) if machines.gpus else {}
    if flops and model_s:
        found["tflops"] = round(flops / model_s / cost.TERA, 6)
    if not found:
        return summary
    speed = f"{found['tflops']:.3g} TFLOP/s per model while working" if "tflops" in found else ""
    return _with_cost(summary, (speed + _in_words(found)).removeprefix("; "), found)


def _hours_and_price(hours: float | None, options: CostOptions) -> dict[str, float]:
    found = {} if hours is None else {"gpu_hours": round(hours, 4)}
    if hours is not None and options.gpu_hour_price is not None:
        found["price"] = round(hours * options.gpu_hour_price, 4)
    return found


def _in_words(found: dict[str, float]) -> str:
    hours = f"; {found['gpu_hours']:,.3g} GPU-hours" if "gpu_hours" in found else ""
    return f"{hours}, {found['price']:,.2f} at your price" if "price" in found else hours


def _with_cost(summary: Summary, text: str, found: dict[str, float]) -> Summary:
    return replace(summary, table=[*summary.table, ("cost", text)], result={**summary.result, "cost": found})
