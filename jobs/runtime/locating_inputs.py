"""What jobs.locate reads: labelled statements and the LLM that reads them, or requests with their store and plug."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jobs.runtime import cost, plugs
from jobs.runtime.inputs import Requests
from jobs.runtime.plugs import PlugRef
from persona.errors import InputError

if TYPE_CHECKING:
    from persona.inputs.splits import Split
    from persona.locating.statements import Columns
    from persona.models.resolve import ModelFolder
    from persona.options import PersonaKind, PromptOptions
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class TextLLM:
    """An LLM that reads texts without a plug; small, so that it can be sent to every worker.

    Attributes:
        name: hub id or folder; fingerprint: of the model that the driver found there.
        prompt: how texts are written; its format is `chat` or `plain`.
        max_input_tokens: texts are cut to this length.
    """

    name: str
    fingerprint: str
    prompt: "PromptOptions"
    max_input_tokens: int

    def folder(self) -> "ModelFolder":
        """The model on this node. Raises InputError if it is another one."""
        from persona.models import resolve as models

        found = models.resolve(self.name, flag="--llm")
        if found.fingerprint != self.fingerprint:
            raise InputError(f"--llm {self.name}: this node has another model under this name than the driver")
        return found


@dataclass(frozen=True, kw_only=True)
class StatementInput:
    """Labelled statements."""

    splits: "Sequence[Split]"
    columns: "Columns"
    llm: TextLLM

    def facts(self) -> dict[str, Any]:
        """What the hidden states depend on, besides the files."""
        return {"llm": self.llm.fingerprint, "prompt": asdict(self.llm.prompt), "cut": self.llm.max_input_tokens}

    def llm_card(self) -> dict[str, str]:
        """The LLM for the report."""
        return {"name": self.llm.name, "fingerprint": self.llm.fingerprint}

    def would(self) -> str:
        """What a run would do first."""
        n_files = len({split.uri for split in self.splits})
        return f"read the statements of {n_files} files ({self.llm.prompt.prompt_format}) with {self.llm.name}"

    def in_words(self) -> str:
        """What is read, for the report."""
        if self.llm.prompt.prompt_format == "chat":
            return "Statements are the user's turn of a chat; the last token is the template's, where the LLM answers."
        return "Statements are read plainly, up to their last token."

    def flops(self) -> float:
        """Operations at most: all bytes of the files are taken for text."""
        return _flops(self.llm.folder(), self.splits, self.llm.max_input_tokens)


@dataclass(frozen=True, kw_only=True)
class RequestInput:
    """Requests, the store of their histories, and the plug with which they are read under each kind of persona."""

    requests: Requests
    store: "Store"
    plug: PlugRef
    personas: "Sequence[PersonaKind]"

    def facts(self) -> dict[str, Any]:
        """What the hidden states depend on, besides the files."""
        models = {"plug": self.plug.fingerprint, "llm": self.plug.record.llm["fingerprint"]}
        store = {"store": self.store.uri, "behaviors": self.store.version("behaviors")}
        return {**models, **store, "personas": [kind.value for kind in self.personas]}

    def llm_card(self) -> dict[str, str]:
        """The LLM for the report."""
        return {"name": self.plug.llm, "fingerprint": self.plug.record.llm["fingerprint"]}

    def would(self) -> str:
        """What a run would do first."""
        n_files = len({split.uri for split in self.requests.splits})
        return f"read the requests of {n_files} files for {', '.join(self.personas)} with {self.plug.llm}"

    def in_words(self) -> str:
        """What is read, for the report."""
        n_soft, kinds = self.plug.record.options.n_soft, ", ".join(self.personas)
        last = "the last token is that of the prompt, where the LLM predicts the answer"
        return f"Requests are read with {n_soft} soft tokens under {kinds}; {last}."

    def flops(self) -> float:
        """Operations at most: all bytes of the files are taken for input."""
        _, llm = plugs.models_of(self.plug)
        return len(self.personas) * _flops(llm, self.requests.splits, self.plug.record.max_input_tokens)


def _flops(llm: "ModelFolder", splits: "Sequence[Split]", cut: int) -> float:
    from persona import cost as costs

    n_texts = costs.tokens_of_text(sum(split.end - split.start for split in splits)) / cut
    return cost.known(lambda: costs.llm_flops(llm.config, n_requests=n_texts, inputs=cut, outputs=0))
