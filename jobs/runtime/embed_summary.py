"""What a run of `jobs.embed` has done, in words and numbers."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobs.runtime import cost, profile, reading
from jobs.runtime.cli import Summary
from jobs.runtime.inputs import Histories
from jobs.runtime.progress import Stage
from jobs.runtime.receipts import Receipts
from jobs.runtime.session import Machines
from jobs.runtime.sources import Planned
from jobs.runtime.tally import Counts
from persona.options import CostOptions

if TYPE_CHECKING:
    from persona.models.resolve import ModelFolder
    from persona.store.store import Store


@dataclass(kw_only=True)
class Done:
    """What a run has read, and found by comparing it with the store; why `--sync` deletes nothing, if it was to."""

    found: reading.Found = field(default_factory=lambda: reading.Found.of(()))
    receipts: Receipts = field(default_factory=Receipts)
    blocker: str = ""


def stage_of(counts: Counts) -> Stage | None:
    """What the job is doing."""
    if updated := counts.get("personas"):
        return Stage(name="personas", done=int(updated["rows"]), total=None, unit="users")
    compared = counts.get("compare", {})
    if total := int(compared.get("new", 0) + compared.get("edited", 0)):
        done = int(counts.get("encoding", {}).get("rows", 0))
        committed = f"{int(counts.get('commit', {}).get('rows', 0)):,} committed"
        return Stage(name="encode", done=done, total=total, unit="behaviors", note=committed)
    if known := int(compared.get("known", 0)):
        return Stage(name="compare", done=known, total=None, unit="behaviors")
    n_read = int(counts.get("read", {}).get("rows", 0))
    return Stage(name="read", done=n_read, total=None, unit="behaviors") if n_read else None


def summary(
    done: Done,
    planned: Planned,
    histories: Histories,
    store: "Store",
    counts: Counts,
    seconds: float,
    *,
    sync: bool,
    with_personas: bool,
    max_reject_fraction: float,
) -> Summary:
    """What was read, found, encoded and committed. Exits with 3 if too many rows were bad."""
    encode, read, compared = counts.get("encode", {}), done.found.total, done.receipts.counts
    committed = int(counts.get("commit", {}).get("rows", 0))
    result = {
        "job": "embed",
        "store": store.uri,
        "read": read.rows,
        **{name: compared.get(name, 0) for name in ("known", "new", "edited", "gone", "duplicates")},
        "encoded": int(encode.get("rows", 0)),
        "committed": committed,
        "store_bytes_read": compared.get("store_bytes", 0),
        "files_rewritten": int(counts.get("commit", {}).get("rewritten", 0)),
        "personas": int(counts.get("personas", {}).get("rows", 0)),
        "rejects": read.rejects,
        "unreadable": read.unreadable,
        "without_timestamp": read.timeless,
        **planned.facts(),
        **histories.facts(),
        "tokens": int(encode.get("tokens", 0)),
        "seconds": round(seconds, 1),
        "behaviors_per_s": round(committed / seconds, 1),
        "version": store.version("behaviors"),
    }
    padding = 1 - encode.get("tokens", 0) / encode["padded"] if encode.get("padded") else 0.0
    deleted = f"{result['gone']:,} that are no longer in --histories"
    if done.blocker or not planned.refresh.deletes:
        deleted = f"nothing, because {done.blocker or 'no file has changed or gone'}"
    table = [
        ("behaviors read", f"{result['read']:,}"),
        ("already known", f"{result['known']:,}"),
        ("encoded", f"{committed:,} ({result['new']:,} new, {result['edited']:,} edited)"),
        *([("deleted", deleted)] if sync else []),
        *([("personas updated", f"{result['personas']:,}")] if with_personas else []),
        ("tokens", f"{result['tokens']:,} and {padding:.1%} padding"),
        ("seconds", f"{seconds:,.1f} ({result['behaviors_per_s']:,} behaviors/s)"),
        ("encoder", store.identity.describe()),
        ("store", f"{store.label}, version {result['version']}"),
        *planned.rows(),
        *histories.rows(),
        *done.found.reject_rows(),
    ]
    return Summary(table=table, result=result, exit_code=done.found.exit_code(max_reject_fraction))


def with_cost(
    summary: Summary,
    options: CostOptions,
    encoder: "ModelFolder",
    counts: Counts,
    machines: Machines,
    *,
    n_gpus: int,
    seconds: float,
) -> Summary:
    """The summary with GPU-hours and money."""
    from persona.cost import encoder_flops

    n_texts = (encoded := counts.get("encode", {})).get("rows", 0)
    mean_tokens = round(encoded["tokens"] / n_texts) if n_texts else 0
    flops = cost.known(lambda: encoder_flops(encoder.config, n_texts=n_texts, tokens=mean_tokens))
    model_s = encoded.get("seconds", 0.0)
    return cost.spent(summary, options, machines, n_gpus=n_gpus, seconds=seconds, flops=flops, model_s=model_s)


def with_profile(summary: Summary, counts: Counts, *, n_actors: int, cores: int, seconds: float) -> Summary:
    """The summary with where the time went."""
    more_cpus = "more CPUs for Ray, on this machine or on others"
    shorter = "shorter texts (--max-tokens)"
    stages = [
        profile.stage(counts, "encode", n_actors, "more GPUs or cores (--actors), or a smaller --encoder"),
        profile.stage(counts, "read", cores, f"{more_cpus}; also input in more files"),
        profile.stage(counts, "compare", cores, f"{more_cpus}; also a store with more --buckets"),
        profile.stage(counts, "encode", n_actors, shorter, seconds="tokenizing", name="tokenize"),
        *profile.writing(counts, cores),
    ]
    waited_s = counts.get("encode", {}).get("waiting", 0.0)
    starving = "more CPUs for Ray, or fewer --actors, which would suffice"
    return profile.added(summary, stages, wall_s=seconds, waited_s=waited_s, starving=starving)
