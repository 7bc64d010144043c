"""Texts as long as titles (16 tokens) and abstracts (205 tokens): generated from single-token words, or real ones."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from persona.models import packaged

# Words per text: mean, standard deviation, minimum and maximum. Special tokens add two.
_LENGTHS = {"titles": (14, 5, 3, 38), "abstracts": (203, 55, 40, 254)}
_BEHAVIORS_PER_USER = 100


def texts(kind: str, n: int, *, acl: Path | None = None, seed: int = 0) -> list[str]:
    """`n` different texts; with `acl`, at most `n` texts of the ACL Anthology papers in that folder."""
    if acl is not None:
        table, column = ("next_title_train", "target") if kind == "titles" else ("histories", "text")
        found = pq.read_table(acl / f"{table}.parquet", columns=[column])[column].unique()
        step = max(1, len(found) // n)
        return [str(text) for text in found.to_pylist()[::step][:n]]
    draw = random.Random(f"{kind} {seed}")
    words = _words()
    mean, deviation, least, most = _LENGTHS[kind]
    lengths = [min(max(round(draw.gauss(mean, deviation)), least), most) for _ in range(n)]
    return [" ".join([*draw.choices(words, k=length - 1), words[i % len(words)]]) for i, length in enumerate(lengths)]


def write_histories(path: Path, behaviors: list[str], *, first: int = 0) -> None:
    """Write the texts to a Parquet file as behaviors number `first` and up, `_BEHAVIORS_PER_USER` per user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + len(behaviors))
    users = [f"user-{number // _BEHAVIORS_PER_USER}" for number in numbers]
    columns = {"user_id": users, "behavior_id": [f"b{number}" for number in numbers], "text": behaviors}
    pq.write_table(pa.table(columns), path)


def _words() -> list[str]:
    vocabulary = AutoTokenizer.from_pretrained(packaged.minilm()).get_vocab()
    return sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
