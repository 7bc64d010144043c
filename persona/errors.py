"""The errors that this project raises on purpose; their text is written for the person who reads it.

    PersonaError                 exit 1   anything below
    ├── UsageError               exit 2   a flag, a key or a combination of them that cannot work
    ├── InputError               exit 2   an input that cannot be read as what it should be
    ├── StoreMismatch            exit 2   a store that belongs to another encoder or layout
    ├── PlugMismatch             exit 2   a plug that belongs to another encoder or LLM
    ├── StorageError             exit 1   a disk or an object store that refused or did not answer
    ├── LeaseHeld                exit 1   a table that another run is writing to
    └── LeaseLost                exit 1   a table that another run has taken over

A message says what was given, what is allowed and what to do. A bad *row* is no error: it becomes a reject.
"""


class PersonaError(Exception):
    """Base of every error that a job reports without a traceback."""

    exit_code = 1


class UsageError(PersonaError):
    """A flag, a configuration key or a combination of them that cannot work."""

    exit_code = 2


class InputError(PersonaError):
    """An input that as a whole cannot be read: missing column, wrong type, nothing there."""

    exit_code = 2


class StoreMismatch(PersonaError):
    """A store that was made by another encoder, or with another layout, than the one asked for."""

    exit_code = 2


class PlugMismatch(PersonaError):
    """A plug that was trained for another encoder or another LLM than the one at hand."""

    exit_code = 2


class StorageError(PersonaError):
    """A disk or an object store that refused, or did not answer in time."""


class LeaseHeld(PersonaError):
    """A table that another run is writing to at this moment."""


class LeaseLost(PersonaError):
    """A table that another run has taken over, because this one did not renew its lease in time."""


class RunLost(PersonaError):
    """A run that cannot go on because a process died that it had only once."""
