"""Call delta-rs and Arrow with retries, and raise their errors as one-line `StorageError`s."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
from deltalake.exceptions import CommitFailedError, DeltaError

from persona.errors import StorageError
from persona.storage.retry import retry_transient

T = TypeVar("T")


@contextmanager
def storage_errors(what: str, error_class: type[StorageError] = StorageError) -> Iterator[None]:
    """Raise library errors as `error_class`, starting with `what`. A `CommitFailedError` passes unchanged."""
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError, pa.ArrowInvalid) as error:
        raise error_class(f"{what}: {' '.join(str(error).split())[:500]}") from error


def with_retries(work: Callable[[], T], what: str) -> T:
    """The result of `work`, retried on transient errors. Any other error becomes a `StorageError` as above."""
    with storage_errors(what):
        return retry_transient(work, what)
