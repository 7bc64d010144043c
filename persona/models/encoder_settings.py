"""Settles how an encoder is used, from its folder and from flags, before any weights are loaded.

Every reason to refuse an encoder that can be seen without its weights is found here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from persona.errors import InputError, UsageError
from persona.models import encoder_model, sentence_transformer
from persona.models.resolve import ModelFolder
from persona.models.sentence_head import SentenceHead
from persona.models.sentence_transformer import Dense, Layer
from persona.options import Precision, VectorOptions, pooling_modes


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """How behaviors become vectors; a store keeps these with its encoder's fingerprint.

    Attributes:
        pooling: modes joined by `+`.
        width: of the vectors.
        max_tokens: texts are cut to this length.
        prompt: in front of each text.
    """

    pooling: str
    width: int
    max_tokens: int
    prompt: str


@dataclass(frozen=True, kw_only=True)
class QuerySettings:
    """How queries are read by the query encoder; pooling and width are those of the behaviors."""

    prompt: str
    max_tokens: int


def settle(
    folder: ModelFolder,
    options: VectorOptions | None = None,
    *,
    max_tokens: int = 512,
    precision: Precision = "auto",
) -> EncoderSettings:
    """The settings for behaviors; what `options` leave out comes from the folder.

    Args:
        folder: of the encoder.
        options: pooling, prompt and width.
        max_tokens: cut texts to this length; a smaller one in the folder wins.
        precision: that the encoder will run in.

    Raises:
        InputError: the encoder, or something that its folder declares, is not supported.
        UsageError: a choice does not fit the encoder, or must be made.
    """
    options = options or VectorOptions()
    declared = sentence_transformer.read(folder)
    model = encoder_model.check_encoder(folder)
    model.check_precision(precision)
    pooling: str = options.pooling
    if pooling == "auto":
        pooling = declared.pooling or encoder_model.default_pooling(folder, model.kind)
    full = _full_width(model.width, pooling, declared.layers)
    if options.width is not None and options.width > full:
        raise UsageError(f"--width {options.width}: the vectors of {folder.name!r} have only {full} components")
    kept = full if declared.width is None else min(declared.width, full)
    cut = min(max_tokens, declared.max_tokens or max_tokens)
    model.check_length(cut)
    SentenceHead(pooling, declared.layers).load_weights()
    return EncoderSettings(
        pooling=pooling,
        width=kept if options.width is None else options.width,
        max_tokens=cut,
        prompt=declared.document_prompt(options.document_prompt),
    )


def settle_query(folder: ModelFolder, *, prompt: str | None = None, max_tokens: int) -> QuerySettings:
    """The same for queries: the folder's prompt for queries, unless another one is given. Raises as `settle` does."""
    declared = sentence_transformer.read(folder)
    cut = min(max_tokens, declared.max_tokens or max_tokens)
    encoder_model.check_encoder(folder).check_length(cut)
    return QuerySettings(prompt=declared.query_prompt(prompt), max_tokens=cut)


def _full_width(width: int, pooling: str, layers: Sequence[Layer]) -> int:
    """The width of uncut vectors. Raises InputError when a dense layer reads another width than it is given."""
    width *= len(pooling_modes(pooling))
    for layer in layers:
        if isinstance(layer, Dense):
            if layer.inputs != width:
                raise InputError(
                    f"{layer.folder}: in_features is {layer.inputs}, but what comes before has width {width} "
                    f"({pooling} pooling)"
                )
            width = layer.outputs
    return width
