"""Judges a plug for `style`: losses under each persona, and the share of answers that obey a style by a rule."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona.engines.local import LocalEngine
from persona.inputs.histories import bucket_of
from persona.models import packaged
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from persona.options import Decoding, PersonaKind
from persona.plug import folder as plug_folder, record as plug_record
from persona.plug.answerer import Answerer
from persona.plug.personalized import PersonalizedLLM
from persona.plug.request_tables import answer_all, loss_of_all
from persona.store.join import join_histories
from persona.store.store import Store
from persona.strengths import name_at

_DECODING = Decoding(max_new_tokens=32, beams=1)
_MAX_WORDS = 6


@dataclass(frozen=True)
class Style:
    """An instruction, and the rule that says whether a title obeys it."""

    instruction: str
    obeys: Callable[[str], bool]


STYLES: Mapping[str, Style] = {
    "short": Style(f"Use at most {_MAX_WORDS} words.", lambda title: 0 < len(title.split()) <= _MAX_WORDS),
    "question": Style("Write it as a question.", lambda title: title.endswith("?")),
    "lower": Style("Use lower-case letters only.", lambda title: title != "" and title == title.lower()),
    "colon": Style("Put a colon in the middle.", lambda title: ":" in title.strip(":")),
}


class Judge:
    """The dev requests with their histories, and the LLM, for any number of plugs."""

    def __init__(self, folder: Path, store: Path, llm: Path, strengths: Sequence[float]) -> None:
        self.store = Store.open(str(store))
        self.strengths = sorted(strengths)
        self.encoder = resolve(str(packaged.minilm()), flag="--encoder")
        self.llm_folder = resolve(str(llm), flag="--llm")
        self.llm: FrozenLLM | None = None
        self.requests = {kind: pq.read_table(folder / f"dev-{kind}.parquet") for kind in ("plain", "styled")}
        self._joined: dict[tuple[str, PersonaKind], pa.Table] = {}

    def judge(self, plug: Path, personas: Sequence[str]) -> dict[str, Any]:
        """Losses of the dev requests, plain and styled, and answers to the styled ones, with whether they obey.

        Strengths other than 1 are measured on the styled requests, for the own and another history.
        """
        model = self._model(plug)
        answerer = Answerer(model.plug, LocalEngine(model.llm, batch_size=32), model.query_text, batch_size=32)
        styled = self.requests["styled"]
        styles = styled["style"].to_pylist()
        found: dict[str, Any] = {
            "training": plug_record.read(plug).training,
            "users": styled["user_id"].to_pylist(),
            "styles": styles,
            "targets_obey": [STYLES[style].obeys(text) for style, text in zip(styles, _texts(styled), strict=True)],
        }
        for kind in self.requests:
            found[kind] = {persona: self._losses(model, kind, PersonaKind(persona)) for persona in personas}
        others = [one for one in self.strengths if one not in (0, 1)] if "own" in personas else []
        for strength in others:
            for persona in (PersonaKind.OWN, PersonaKind.OTHER):
                measured = self._losses(model, "styled", persona, strength, with_rejected=False)
                found["styled"][name_at(persona, strength)] = measured
        wanted = [name_at(PersonaKind.OWN, one) for one in self.strengths] if "own" in personas else [*personas]
        found["answers"] = {}
        for name in wanted:
            kind = PersonaKind(name.partition("-")[0])
            table = _with_persona(self._with_history("styled", kind), name)
            texts = [text.strip() for text in answer_all(answerer, table, _DECODING)["output"].to_pylist()]
            obeys = [STYLES[style].obeys(text) for style, text in zip(styles, texts, strict=True)]
            found["answers"][name] = {"texts": texts, "obeys": obeys}
        return found

    def _losses(
        self,
        model: PersonalizedLLM,
        requests: str,
        persona: PersonaKind,
        strength: float = 1.0,
        *,
        with_rejected: bool = True,
    ) -> dict[str, list[float]]:
        """Nats and tokens of the targets, and of another author's titles."""
        table = _with_persona(self._with_history(requests, persona), name_at(persona, strength))
        found = loss_of_all(model, table, batch_size=16).to_pydict()
        if with_rejected:
            other = table.set_column(table.column_names.index("target"), "target", table["rejected"])
            of_other = loss_of_all(model, other, batch_size=16).to_pydict()
            found |= {f"rejected_{name}": values for name, values in of_other.items()}
        return found

    def _model(self, plug: Path) -> PersonalizedLLM:
        record = plug_record.read(plug)
        if self.llm is None:
            lengths = {"max_input_tokens": record.max_input_tokens, "max_target_tokens": record.max_target_tokens}
            self.llm = FrozenLLM.load(self.llm_folder, prompt=record.prompt, **lengths)
        return plug_folder.load(plug, encoder=self.encoder, llm=self.llm)

    def _with_history(self, requests: str, persona: PersonaKind) -> pa.Table:
        """The dev requests in their order, each with the history that it sees."""
        if (requests, persona) not in self._joined:
            table = self.requests[requests]
            table = table.append_column("row", pa.array(np.arange(table.num_rows)))
            buckets = bucket_of(table["user_id"].combine_chunks(), self.store.n_buckets)
            parts = [
                join_histories(table.filter(buckets == bucket), self.store, bucket, persona=persona, max_behaviors=512)
                for bucket in np.unique(buckets).tolist()
            ]
            self._joined[requests, persona] = pa.concat_tables(parts).sort_by("row")
        return self._joined[requests, persona]


def _with_persona(table: pa.Table, name: str) -> pa.Table:
    return table.append_column("persona", pa.repeat(name, table.num_rows))


def _texts(styled: pa.Table) -> list[str]:
    return [text.strip() for text in styled["target"].to_pylist()]


def read(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The judged plugs by name, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(results.glob("*.json")):
        one = json.loads(file.read_text())
        found.setdefault(one["name"], []).append(one)
    return found
