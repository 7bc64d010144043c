"""The models, the Ray and the ways to call a job of `tests/jobs`."""

from tests.jobs.conftest import do, local_ray, models, refuse

__all__ = ["do", "local_ray", "models", "refuse"]
