"""How close the LLM's choice was where two engines gave different greedy answers to the same requests.

    persona-plug generate … --engine local --variant local
    persona-plug generate … --engine vllm --variant vllm
    python -m tests.benchmarks.engine_ties --store STORE --plug PLUG --requests FILE --variants local vllm \\
        --precision bf16

Reads both answers of the persona `own` from the store. Where they first differ, it prints the gap between the logits
of the two tokens in float64, and the rounding: by how much these logits change in the answers' precision, or half the
distance of two numbers of that size, whichever is more. A gap of at most twice the rounding is a tie.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from persona import load_plug, open_store
from persona.api import LoadedPlug
from persona.options import PersonaKind
from persona.plug.personalized import Row
from persona.store.join import join_histories


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first tokens that differ: the gap of their logits, and how much rounding may move each."""

    tokens: tuple[str, str]
    gap: float
    rounding: float

    @property
    def is_tie(self) -> bool:
        return self.gap <= 2 * self.rounding


def main() -> None:
    """Print each difference, then a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--plug", required=True)
    parser.add_argument("--requests", required=True, help="Parquet file")
    parser.add_argument("--variants", nargs=2, required=True)
    parser.add_argument("--precision", choices=["bf16", "fp32"], required=True)
    arguments = parser.parse_args()
    store = open_store(arguments.store)
    table = store.read_generations(arguments.variants, ["request_id", "variant", "output"])
    by: dict[str, dict[str, str]] = {variant: {} for variant in arguments.variants}
    for row in table.to_pylist():
        by[row["variant"]][row["request_id"]] = row["output"]
    one, other = by.values()
    shared = sorted(one.keys() & other.keys())
    differing = [request for request in shared if one[request] != other[request]]
    exact = load_plug(arguments.plug, store=store, precision="fp32")
    exact.model.llm.double()
    rounded = load_plug(arguments.plug, store=store, precision=arguments.precision)
    found = []
    for row in _rows(arguments.requests, differing, store, exact):
        found.append(_difference(exact, rounded, row, one[row["request_id"]], other[row["request_id"]]))
        print(row["request_id"], found[-1], "tie" if found[-1].is_tie else "NOT A TIE")
    summary = {
        "precision": arguments.precision,
        "answers": len(shared),
        "equal": len(shared) - len(differing),
        "ties": sum(difference.is_tie for difference in found),
        "median_gap": statistics.median([difference.gap for difference in found]) if found else None,
        "largest_gap": max((difference.gap for difference in found), default=None),
    }
    print(json.dumps(summary))


def _rows(requests: str, wanted: list[str], store: Any, plug: LoadedPlug) -> list[Row]:
    """The requests of these ids with their histories."""
    from persona.inputs.histories import bucket_of

    table = pq.read_table(requests)
    names = set(wanted)
    table = table.filter(pa.array([request in names for request in table["request_id"].to_pylist()], pa.bool_()))
    rows: list[Row] = []
    for i, bucket in enumerate(bucket_of(table["user_id"].to_pylist(), store.n_buckets)):
        joined = join_histories(
            table.slice(i, 1), store, int(bucket), persona=PersonaKind.OWN, max_behaviors=plug.record.max_behaviors
        )
        row = joined.to_pylist()[0]
        rows.append({"query": row["input"], "system": None, **row})
    return rows


@torch.inference_mode()
def _difference(exact: LoadedPlug, rounded: LoadedPlug, row: Row, one: str, other: str) -> Difference:
    tokenizer = exact.model.llm.tokenizer
    ids = tokenizer.targets([one, other])
    first = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    chosen = [ids[0][first], ids[1][first]]
    logits = []
    for plug in (exact, rounded):
        batch = plug.model.collate([{**row, "target": ""}])
        soft_BSD = plug.model.soft_tokens(batch)
        logits.append(plug.model.llm.target_logits(soft_BSD, batch.prompts, [ids[0][: first + 1]])[-1].double()[chosen])
    half_step = float(logits[0].abs().max()) * torch.finfo(rounded.model.llm.dtype).eps / 2
    return Difference(
        tokens=(tokenizer.decode(chosen[:1]), tokenizer.decode(chosen[1:])),
        gap=float((logits[0][0] - logits[0][1]).abs()),
        rounding=max(float((logits[0] - logits[1]).abs().max()), half_step),
    )


if __name__ == "__main__":
    main()
