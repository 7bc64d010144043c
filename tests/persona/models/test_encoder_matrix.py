"""Each encoder of the matrix: refused by name, or vectors as sentence-transformers makes them on the same folder."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from persona.errors import InputError, UsageError
from persona.models.encoder import TextEncoder
from persona.models.encoder_settings import EncoderSettings, settle, settle_query
from persona.models.resolve import ModelFolder, resolve
from persona.options import PlugOptions, Precision
from persona.plug import folder as plug_folder
from persona.plug.module import Plug
from tests.encoders import ENCODERS, EncoderCase, reference

WORKING = [case for case in ENCODERS if case.expected == "works"]
REFUSED = [case for case in ENCODERS if case.expected != "works"]
TEXTS = ["A walk by the river in Paris", "it", "the title of a paper " * 9, "", "a movie is good and i like it"]
MAX_TOKENS = 64
# A component of a unit vector is rounded to float16 with an error of at most 2^-12; sums in float32 add less.
LEAST_COSINE = 0.9999
# bf16 has 8 bits: a relative error of 2^-9 per rounding, over about 20 roundings in a row. For a relative error e at
# a right angle, the cosine is 1 - e²/2.
LEAST_COSINE_BF16 = 1 - (20 * 2.0**-9) ** 2 / 2


@dataclass(frozen=True, kw_only=True)
class Both:
    """An encoder's folder with its settings, and sentence-transformers' vectors of `TEXTS`, each text encoded alone."""

    case: EncoderCase
    folder: ModelFolder
    settings: EncoderSettings
    documents: NDArray[np.float32]
    queries: NDArray[np.float32]


Vectors = NDArray[np.float32]


def plain_vectors(name: str, folder: Path) -> tuple[Path, Vectors, Vectors]:
    """Builds the encoder of that name; its path, and sentence-transformers' vectors of documents and of queries."""
    torch.set_num_threads(1)
    path = next(case for case in WORKING if case.name == name).build(folder)
    model = reference(path)
    model.max_seq_length = min(model.max_seq_length, MAX_TOKENS)
    return (
        path,
        model.encode_document(TEXTS, batch_size=1, normalize_embeddings=True),
        model.encode_query(TEXTS, batch_size=1, normalize_embeddings=True),
    )


@pytest.fixture(scope="module", autouse=True)
def ahead(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, Future[tuple[Path, Vectors, Vectors]]]]:
    """What the tests compare with, made by another process, which runs ahead of this one."""
    chosen = [item.callspec.params for item in request.session.items if item.path == Path(__file__)]
    names = dict.fromkeys(params["both"].name for params in chosen if "both" in params)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield {name: pool.submit(plain_vectors, name, tmp_path_factory.mktemp("encoder")) for name in names}


@pytest.fixture(scope="module", params=WORKING, ids=lambda case: case.name)
def both(request: pytest.FixtureRequest, ahead: Mapping[str, Future[tuple[Path, Vectors, Vectors]]]) -> Both:
    path, documents, queries = ahead[request.param.name].result()
    folder = resolve(str(path), flag="--encoder")
    settings = settle(folder, max_tokens=MAX_TOKENS)
    return Both(case=request.param, folder=folder, settings=settings, documents=documents, queries=queries)


# The first tests, because they need nothing of the other process.
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_cannot_be_right_is_refused_before_weights_are_loaded(case: EncoderCase, tmp_path: Path):
    folder = resolve(str(case.build(tmp_path)), flag="--encoder")
    with pytest.raises((InputError, UsageError)) as refusal:
        settle(folder, max_tokens=MAX_TOKENS)
    assert case.expected in str(refusal.value)


def text_encoder(both: Both, precision: Precision) -> TextEncoder:
    return TextEncoder(
        both.folder,
        pooling=both.settings.pooling,
        max_tokens=both.settings.max_tokens,
        prompt=both.settings.prompt,
        width=both.settings.width,
        precision=precision,
        device="cpu",
    )


def least_cosine(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.min((found * expected).sum(1) / norms))


def test_behaviors_have_the_vectors_of_encode_document(both: Both):
    encoder = text_encoder(both, "fp32")
    for token_budget in (1, 16_384):  # alone, and together in a padded batch
        encoder.token_budget = token_budget
        vectors = encoder.encode(TEXTS).vectors
        assert vectors.shape == both.documents.shape == (len(TEXTS), both.settings.width)
        assert least_cosine(vectors, both.documents) > LEAST_COSINE
    # Texts differ by far more than that, so a wrong vector would fail.
    assert least_cosine(vectors, np.roll(vectors, 1, axis=0)) < 1 - 100 * (1 - LEAST_COSINE)


def test_behaviors_have_nearly_the_same_vectors_in_bf16(both: Both):
    if both.case.bf16:
        assert least_cosine(text_encoder(both, "bf16").encode(TEXTS).vectors, both.documents) > LEAST_COSINE_BF16
        return
    with pytest.raises(UsageError, match="cannot compute in bf16; use --precision fp32 or auto"):
        settle(both.folder, precision="bf16")
    encoder = text_encoder(both, "auto")
    assert encoder.model.dtype is torch.float32


def test_queries_of_a_new_plug_have_the_vectors_of_encode_query(both: Both):
    settings = settle_query(both.folder, max_tokens=MAX_TOKENS)
    options = PlugOptions(weights="attention")
    query_encoder, query_head = plug_folder.new_query_encoder(
        both.folder, options, pooling=both.settings.pooling, width=both.settings.width, pretrained=True
    )
    plug = Plug(
        options,
        query_encoder=query_encoder,
        query_head=query_head,
        width=both.settings.width,
        llm_width=8,
        token_norm=1.0,
    )
    query_text = plug_folder.new_query_text(both.folder, settings.prompt, settings.max_tokens)
    plug.train()  # as in training: dropout must have no effect
    query_Bd = plug.encode_query(*query_text.tokens(TEXTS, torch.device("cpu")))
    assert least_cosine(query_Bd.detach().numpy(), both.queries) > LEAST_COSINE

    # All of it is trained: a parameter without a gradient would stop DeepSpeed.
    (query_Bd * torch.randn_like(query_Bd)).sum().backward()
    parts = {"query_encoder": plug.query_encoder, "query_head": plug.query_head}
    unused = [
        f"{part}.{name}"
        for part, module in parts.items()
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.grad is None
    ]
    assert not unused
    # Nor can safetensors save two names for one tensor.
    names = {tensor.data_ptr() for tensor in plug.state_dict().values() if tensor.numel()}
    assert len(names) == sum(tensor.numel() > 0 for tensor in plug.state_dict().values())
