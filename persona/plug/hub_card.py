"""The card of a plug with the metadata that the Hugging Face hub reads: base model, task, library, license."""

import re

from persona.plug.record import PlugRecord

LIBRARY = "persona-plug"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def with_metadata(card: str, record: PlugRecord, *, license_id: str | None, base_model: str | None) -> str:
    """A card for the hub: `card` with YAML metadata in front, in place of any that it has.

    `base_model` is the hub id of the LLM; by default the one that the plug records, if that is an id and not a folder.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base_model or (record.llm["name"] if _HUB_ID.fullmatch(record.llm["name"]) else None),
        base_model_relation="adapter",
        library_name=LIBRARY,
        license=license_id,
        pipeline_tag="text-generation",
        tags=[LIBRARY, "personalization", "soft-prompt"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{ModelCard(card, ignore_metadata_errors=True).text.lstrip()}"
