"""The models, the Ray and the ways to call a job of `tests/jobs`."""

from tests.jobs.conftest import do, filled_store, local_ray, models, refuse, store

__all__ = ["do", "filled_store", "local_ray", "models", "refuse", "store"]
