"""The losses that are gathered on the driver are of requests that can be told apart."""

import pytest

from jobs.runtime.losses import check_ids
from persona.errors import InputError


def test_an_id_of_users_in_different_buckets_is_refused() -> None:
    losses = {"request_id": ["1", "2", "1"], "user_id": ["ann", "bob", "ann"]}  # under two kinds of persona
    check_ids(losses)
    with pytest.raises(InputError, match="the request_id '1' is that of requests of several users"):
        check_ids({**losses, "user_id": ["ann", "bob", "cem"]})
