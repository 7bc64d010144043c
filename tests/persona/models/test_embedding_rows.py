"""Embeddings of a few tokens equal those of the loaded LLM, however it scales them."""

import pytest
import torch

from persona.errors import InputError
from persona.models.embedding_rows import embedding_rows
from persona.models.frozen_llm import FrozenLLM
from persona.models.resolve import resolve
from tests.llms import CAUSAL, build

NAMES = ("GPT-2", "OPT-350M", "Llama 3", "Gemma", "Gemma 3", "Gemma 3 with images", "Granite", "Falcon-H1")
FAMILIES = [family for family in CAUSAL if family.name in NAMES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_rows_are_what_the_llm_reads(family, dtype, tmp_path):
    folder = resolve(str(build(family, tmp_path)), flag="--llm")
    llm = FrozenLLM.load(folder, precision="fp32" if dtype == torch.float32 else "bf16", device="cpu")
    ids = [5, 0, 17, llm.tokenizer.end_id]
    assert torch.equal(embedding_rows(folder, ids, dtype=dtype), llm.embed(torch.tensor(ids)))


def test_weights_without_a_matrix_of_embeddings_are_refused(llama_folder, monkeypatch):
    monkeypatch.setattr("persona.models.embedding_rows.contents.weight_files", lambda folder: [])
    with pytest.raises(InputError, match="0 tensors could be its embeddings \\(embed_tokens.weight\\)"):
        embedding_rows(llama_folder, [1], dtype=torch.float32)
