"""Writes docs/models.md, a row a model with its verdict: `make models`.

    python -m tests.matrix.page --only Llama

The exit code is 1 if a model neither works nor is refused. With `--only`, rows are printed and nothing is written.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.llms import CAUSAL, MORE_CAUSAL, MORE_SEQ2SEQ, SEQ2SEQ, Family, build
from tests.matrix.llm_checks import LONG, check_llm

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_INTRODUCTION = """\
# Models

Every LLM and encoder below was compared with plain `transformers` or `sentence-transformers` code on the same input.
A model **works** when all results are equal. What would give other results is **refused**: the job ends with the
message in the table before any work begins.

This page is written by

```bash
make models
```

which takes a few minutes on one core. It builds a tiny model of each family from its configuration, with random
weights, and uses real models where a Python package contains them. A short form runs in `make test`.
"""
_LLMS = """\
## LLMs

Checked for each, in float32, for requests of different lengths:

- the loss of a bare request, with soft tokens, and with retrieved texts in front as well,
- the gradient to each soft token, also against finite differences,
- greedy and 4-beam answers under the `generation_config.json` of the folder,
- all of these alone and in a padded batch,
- the loss with `--soft-position start`, in bf16, and the loss and gradient with `--activation-checkpointing`.

The soft tokens are the embeddings of words, so that `transformers` can be given the same request as token ids.
"One prompt length a batch" means that padding would change the answers, so prompts of different lengths are answered
in different batches.
"""


_COLUMNS = 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model on the page."""

    model: str
    kind: str
    tested: str
    verdict: str


def main() -> int:
    """Checks all models, or those whose name contains `--only`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="check only models whose name contains this")
    only = parser.parse_args().only
    _quiet()
    tables = {
        f"{_LLMS}\n### Decoder-only": list(_llm_rows([*CAUSAL, *MORE_CAUSAL], only)),
        "### Encoder-decoder": list(_llm_rows([*SEQ2SEQ, *MORE_SEQ2SEQ], only)),
    }
    rows = [row for table in tables.values() for row in table]
    if not only:
        PAGE.write_text("\n".join([_INTRODUCTION, *(f"{head}\n\n{_table(table)}\n" for head, table in tables.items())]))
    return any(row.verdict.startswith("fails") for row in rows)


def read() -> dict[str, str]:
    """The verdict on each model of the page."""
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in PAGE.read_text().splitlines()]
    return {row[0]: row[-1] for row in rows if len(row) == _COLUMNS}


def _llm_rows(families: Sequence[Family], only: str) -> Iterator[Row]:
    for family in families:
        if only.lower() not in family.name.lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            findings = check_llm(family, build(family, Path(folder) / "model"), LONG)
        row = Row(model=family.name, kind=family.model_type, tested="tiny", verdict=findings.verdict)
        print(_line(row), flush=True)
        yield row


def _table(rows: Sequence[Row]) -> str:
    head = ["| Model | `model_type` | Tested on | Verdict |", "|---|---|---|---|"]
    return "\n".join([*head, *map(_line, rows)])


def _line(row: Row) -> str:
    verdict = row.verdict.replace("|", "\\|").replace("\n", " ")
    return f"| {row.model} | `{row.kind}` | {row.tested} | {verdict} |"


def _quiet() -> None:
    """Only the rows are printed: libraries warn about random weights and unused settings."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
