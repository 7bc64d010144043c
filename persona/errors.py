"""Errors with messages for users, and the exit codes of the jobs that raise them.

    PersonaError                 exit 1   base class
    ├── UsageError               exit 2   an invalid flag, configuration key or combination of them
    ├── InputError               exit 2   an input that is unusable as a whole
    ├── StoreMismatch            exit 2   a store of another encoder or layout
    ├── PlugMismatch             exit 2   a plug for another encoder or LLM
    ├── StorageError             exit 1   a disk or object store that fails
    ├── TrackingError            exit 1   an experiment tracker that cannot be reached
    ├── ChatError                exit 1   a chat model that cannot be reached, or fails
    ├── LeaseHeld                exit 1   a table that another run is writing to
    ├── LeaseLost                exit 1   a table that another run has taken over
    └── RunLost                  exit 1   a run that lost a process it cannot replace

A message says what was given, what is allowed and what to do. A bad *row* is not an error: it becomes a reject.
"""


class PersonaError(Exception):
    """Base class of errors that a job reports without a traceback."""

    exit_code = 1


class UsageError(PersonaError):
    """An invalid flag, configuration key or combination of them."""

    exit_code = 2


class InputError(PersonaError):
    """An input that is unusable as a whole: a missing column, a wrong type, no rows."""

    exit_code = 2


class StoreMismatch(PersonaError):
    """A store that was created with another encoder or another layout."""

    exit_code = 2


class PlugMismatch(PersonaError):
    """A plug that was trained for another encoder or another LLM."""

    exit_code = 2


class StorageError(PersonaError):
    """A disk or object store that denied a request, failed, or did not respond in time."""


class TrackingError(PersonaError):
    """An experiment tracker that cannot be reached, or refuses."""


class ChatError(PersonaError):
    """A chat model that cannot be reached, fails, or does not reply in time."""


class LeaseHeld(PersonaError):
    """A table that another run is writing to."""


class LeaseLost(PersonaError):
    """A table that another run has taken over because this one did not renew its lease in time."""


class RunLost(PersonaError):
    """A run that cannot continue because a process died that it cannot replace."""
