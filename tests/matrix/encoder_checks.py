"""What the matrix checks of an encoder: vectors of texts and queries, against sentence-transformers."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona.errors import PersonaError
from tests.encoders import reference
from tests.matrix.findings import Findings, message
from tests.matrix.our_encoder import OurEncoder

_TEXTS = ["A walk by the river in Paris", "it", "the title of a paper " * 9, "", "a movie is good and i like it"]
_MAX_TOKENS = 64
# A component of a unit vector is rounded to float16 with an error of at most 2^-12; sums in float32 add less.
_LEAST_COSINE = 0.9999
# bf16 has 8 bits: a relative error of 2^-9 per rounding, over about 20 roundings in a row. For a relative error e at
# a right angle, the cosine is 1 - e²/2.
_LEAST_COSINE_BF16 = 1 - (20 * 2.0**-9) ** 2 / 2


def check_encoder(folder: Path) -> Findings:
    """Compares the encoder in the folder."""
    try:
        ours = OurEncoder(folder, max_tokens=_MAX_TOKENS)
    except PersonaError as error:
        return Findings(refused=message(error, folder))
    plain = reference(folder)
    plain.max_seq_length = min(plain.max_seq_length, _MAX_TOKENS)
    documents = plain.encode_document(_TEXTS, batch_size=1, normalize_embeddings=True)
    queries = plain.encode_query(_TEXTS, batch_size=1, normalize_embeddings=True)
    found = {
        "texts alone": (ours.documents(_TEXTS, token_budget=1), documents),
        "texts in a padded batch": (ours.documents(_TEXTS, token_budget=16_384), documents),
        "queries": (ours.queries(_TEXTS), queries),
    }
    failures = [
        f"{name}: least cosine {cosine:.5f}"
        for name, (vectors, expected) in found.items()
        if not (cosine := least_cosine(vectors, expected)) > _LEAST_COSINE
    ]
    try:
        cosine = least_cosine(ours.documents(_TEXTS, precision="bf16"), documents)
    except PersonaError:
        return Findings(failures=failures, limits=["float32 only"])
    if not cosine > _LEAST_COSINE_BF16:
        failures.append(f"bf16: least cosine {cosine:.5f}")
    return Findings(failures=failures)


def least_cosine(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """The smallest cosine of two vectors of the same text; 0 if they differ in width."""
    if found.shape != expected.shape:
        return 0.0
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.min((found * expected).sum(1) / norms))
