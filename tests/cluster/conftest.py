"""Fixtures of `tests/jobs`: models, a local Ray, and functions that run a job."""

from tests.jobs.conftest import do, filled_store, local_ray, models, refuse, store

__all__ = ["do", "filled_store", "local_ray", "models", "refuse", "store"]
