"""Writes docs/models.md, a row a model with its verdict: `make models`.

    python -m tests.matrix.page --only Llama

The exit code is 1 if a model neither works nor is refused. With `--only`, rows are printed and nothing is written.
"""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers

from persona.models import packaged
from tests.encoders import ENCODERS
from tests.llms import CAUSAL, MORE_CAUSAL, MORE_SEQ2SEQ, SEQ2SEQ, Family, build
from tests.matrix.encoder_checks import check_encoder
from tests.matrix.findings import Findings
from tests.matrix.llm_checks import LONG, check_llm

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_COLUMNS = ("Model", "`model_type`", "Weights", "Verdict")
_TOP = """\
# Models

Every LLM and encoder below was compared with plain `transformers` or `sentence-transformers` code on the same input.
A model **works** if all results are equal. If they would not be, the model is **refused**: the job ends with that
reason before any work begins.

This command writes the page. It takes several minutes on one core; `make test` runs a short form of it.

```bash
make models
```

*Tiny* models are built from the configuration of their family, with random weights. *Real* ones come from Python
packages.

## LLMs

For requests of different lengths, in float32, alone and in a padded batch, the command compares

- losses: without a plug, with soft tokens, with retrieved texts, with `--soft-position start`, in bf16;
- the gradient of each soft token, with finite differences as well, and with `--activation-checkpointing`;
- greedy answers and answers of four beams, under the folder's `generation_config.json`.

Embeddings of words take the places of the soft tokens, so that `transformers` can read the same request as token ids.
Models named *Instruct* or *chat* read requests in their chat template.

*One prompt length a batch* means that padding would change the answers, so prompts of different lengths are answered
in different batches. It costs speed only.

### Decoder-only
"""
_SEQ2SEQ = "### Encoder-decoder\n"
_ENCODERS = """\
## Encoders

The command compares the vectors of texts, alone, in a padded batch and in bf16, and the vectors of queries under a new
plug. Pooling, layers, prompts and lengths are those that the folder declares ([data](data.md#encoders)).
"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the page: `build` writes its folder or finds it, `check` compares it."""

    name: str
    weights: str
    build: Callable[[Path], Path]
    check: Callable[[Path], Findings]


def main() -> int:
    """Checks all models, or those whose name contains `--only`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="check only models whose name contains this")
    only = parser.parse_args().only
    _quiet()
    page, failed = [], False
    for text, models in sections().items():
        page += [text, _line(*_COLUMNS), _line(*["---"] * len(_COLUMNS))]
        for model in models:
            if only.lower() in model.name.lower():
                kind, findings = _check(model)
                page.append(_line(model.name, f"`{kind}`", model.weights, findings.verdict))
                print(page[-1], flush=True)
                failed |= bool(findings.failures)
        page.append("")
    if not only:
        PAGE.write_text("\n".join(page))
    return int(failed)


def sections() -> dict[str, list[Model]]:
    """The texts of the page and the models below each."""
    smollm2 = Family(name="SmolLM2-135M-Instruct", model_type="llama", style="", config={})
    minilm = Model(name="all-MiniLM-L6-v2", weights="real", build=lambda _: packaged.minilm(), check=check_encoder)
    encoders = [Model(name=case.name, weights="tiny", build=case.build, check=check_encoder) for case in ENCODERS]
    return {
        _TOP: [*map(_tiny, [*CAUSAL, *MORE_CAUSAL]), _llm(smollm2, "real", lambda _: packaged.smollm2())],
        _SEQ2SEQ: [*map(_tiny, [*SEQ2SEQ, *MORE_SEQ2SEQ])],
        _ENCODERS: [*encoders, minilm],
    }


def read() -> dict[str, str]:
    """The verdict on each model of the page."""
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in PAGE.read_text().splitlines()]
    return {row[0]: row[-1] for row in rows if len(row) == len(_COLUMNS) and row[0] not in (_COLUMNS[0], "---")}


def _tiny(family: Family) -> Model:
    return _llm(family, "tiny", partial(build, family))


def _llm(family: Family, weights: str, build: Callable[[Path], Path]) -> Model:
    return Model(
        name=family.name,
        weights=weights,
        build=build,
        check=lambda folder: check_llm(folder, LONG, seq2seq=family.seq2seq),
    )


def _check(model: Model) -> tuple[str, Findings]:
    """The `model_type` of the model and what is found."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = model.build(Path(temporary))
        return json.loads((folder / "config.json").read_text())["model_type"], model.check(folder)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _quiet() -> None:
    """Only the rows are printed: libraries warn about random weights and unused settings."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
