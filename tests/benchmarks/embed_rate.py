"""Behaviors a second of `jobs.embed` end to end, beside `sentence_transformers` on the same texts, in turns.

    python tests/benchmarks/embed_rate.py --histories HISTORIES.parquet --n 1000 --rounds 3

`embed` reads, compares with the store, encodes and commits; Ray is already up, its actors load the model anew each
round, and that time counts. The peer encodes texts that lie in memory with a model that is loaded: as it comes (fp32)
and in bf16.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer

from jobs import embed, session
from persona import packaged


def main() -> None:
    """Prints one line a contender and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", required=True, help="Parquet with user_id, behavior_id, text")
    parser.add_argument("--n", type=int, default=1000, help="behaviors of a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="embed-rate-"))
    table = pq.read_table(arguments.histories).slice(0, arguments.n)
    pq.write_table(table, folder / "histories.parquet")
    texts = table["text"].to_pylist()
    session.connect()
    model = str(packaged.minilm())
    peers = {
        "sentence_transformers fp32": SentenceTransformer(model, device="cpu"),
        "sentence_transformers bf16": SentenceTransformer(model, device="cpu", model_kwargs={"dtype": torch.bfloat16}),
    }
    rates: dict[str, list[float]] = {"jobs.embed": [], **{name: [] for name in peers}}
    for round_number in range(arguments.rounds):
        config = embed.Config(
            histories=str(folder / "histories.parquet"),
            store=str(folder / f"store-{round_number}"),
            encoder=model,
            max_tokens=256,
            buckets=4,
            block_rows=max(1, arguments.n // 4),
        )
        rates["jobs.embed"].append(_rate(len(texts), lambda config=config: embed.main(config)))
        for name, peer in peers.items():
            rates[name].append(_rate(len(texts), lambda peer=peer: peer.encode(texts, show_progress_bar=False)))
    for name, found in rates.items():
        print(f"{name:<28} median {statistics.median(found):6.1f}/s   {' '.join(f'{rate:.1f}' for rate in found)}")
    shutil.rmtree(folder)
    print(json.dumps({name: round(statistics.median(found), 1) for name, found in rates.items()}))


def _rate(n: int, work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return n / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
