"""What made the vectors of a store, kept in its metadata."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from persona.errors import InputError, StoreMismatch
from persona.store.schema import FORMAT_VERSION

_PREFIX = "persona."  # of our table properties; the others are Delta's
_FORMAT, _BUCKETS = "format", "buckets"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The encoder settings of a store. Vectors of two identities are not comparable, so a store has one."""

    encoder: str
    revision: str
    fingerprint: str
    width: int
    pooling: str
    max_tokens: int
    text_rule: str
    document_prompt: str = ""

    def describe(self) -> str:
        """Width, pooling, length and prompt for people."""
        prompt = f", prompt {self.document_prompt!r}" if self.document_prompt else ""
        return f"width {self.width}, {self.pooling} pooling, {self.max_tokens} tokens{prompt}"


def to_properties(identity: Identity, n_buckets: int) -> dict[str, str]:
    """The table properties of a new store."""
    values = {_FORMAT: FORMAT_VERSION, **asdict(identity), _BUCKETS: n_buckets}
    return {f"{_PREFIX}{name}": str(value) for name, value in values.items()}


def from_properties(properties: Mapping[str, str], table_uri: str) -> tuple[Identity, int]:
    """The identity and the number of buckets of a store, from its table properties.

    Raises:
        InputError: A property is missing or malformed.
        StoreMismatch: The store has a newer format than this version of persona-plug knows.
    """
    ours = {name.removeprefix(_PREFIX): value for name, value in properties.items() if name.startswith(_PREFIX)}
    try:
        _check_format(int(ours.get(_FORMAT, 1)), table_uri)
        identity = Identity(
            encoder=ours["encoder"],
            revision=ours["revision"],
            fingerprint=ours["fingerprint"],
            width=int(ours["width"]),
            pooling=ours["pooling"],
            max_tokens=int(ours["max_tokens"]),
            text_rule=ours["text_rule"],
            document_prompt=ours.get("document_prompt", ""),  # stores before this property have none
        )
        return identity, int(ours[_BUCKETS])
    except KeyError as error:
        raise InputError(
            f"the table {table_uri} has no property {_PREFIX}{error.args[0]}: it was not created by persona-plug"
        ) from error
    except ValueError as error:
        raise InputError(f"the table {table_uri} has a malformed {_PREFIX}* property: {error}") from error


def upgrade(properties: Mapping[str, str]) -> dict[str, str]:
    """The table properties to set before this version of persona-plug writes to a store; mostly none."""
    is_current = properties.get(f"{_PREFIX}{_FORMAT}") == str(FORMAT_VERSION)
    return {} if is_current else {f"{_PREFIX}{_FORMAT}": str(FORMAT_VERSION)}


def _check_format(version: int, table_uri: str) -> None:
    if version > FORMAT_VERSION:
        raise StoreMismatch(
            f"the table {table_uri} has format version {version}, but this version of persona-plug supports only "
            f"versions up to {FORMAT_VERSION}; upgrade persona-plug"
        )


def describe_difference(stored: Identity, stored_buckets: int, given: Identity, given_buckets: int) -> str:
    """The settings that differ, with both values; empty when none does."""
    mine = {**asdict(stored), _BUCKETS: stored_buckets}
    theirs = {**asdict(given), _BUCKETS: given_buckets}
    return "; ".join(
        f"{name} is {mine[name]!r} in the store and {theirs[name]!r} here"
        for name in mine
        if mine[name] != theirs[name]
    )
