"""Put the users' profiles in front of their requests, in the task where a request is joined with its history."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.runtime.tally import Counts, Tally

if TYPE_CHECKING:
    import pyarrow as pa

    from persona.front_texts import FrontTexts
    from persona.store.store import Store


@dataclass(frozen=True, kw_only=True)
class AddProfiles:
    """For `joining.JoinPlan`: adds the column `retrieved`, the texts of the user's profile of one recipe.

    A request sees a profile only if the newest pair in it is strictly older than the request's `as_of`; a request
    without `as_of` sees any.
    """

    recipe: str
    tally: Tally

    def __call__(self, requests: "pa.Table", store: "Store", bucket: int) -> "pa.Table":
        """The requests of some users of a bucket."""
        import pyarrow as pa

        from persona.profiling.profile import texts_in_front
        from persona.store import profiles

        users = requests["user_id"].to_pylist()
        found = {row["user_id"]: row for row in profiles.of_users(store, bucket, self.recipe, users).to_pylist()}
        counts = {"used": 0, "newer": 0, "without": 0}
        front: list[list[str]] = []
        for user, as_of in zip(users, requests["as_of"].to_pylist(), strict=True):
            profile = found.get(user)
            if profile is None:
                case = "without"
            elif as_of is not None and not profile["newest_pair_at"] < as_of:
                case = "newer"
            else:
                case = "used"
            counts[case] += 1
            front.append(texts_in_front(profile) if profile and case == "used" else [])
        self.tally.note("profiles", f"{bucket}/{users[0]}", counts)
        return requests.append_column("retrieved", pa.array(front, pa.list_(pa.large_string())))


def of(front: "FrontTexts", tally: Tally) -> AddProfiles | None:
    """What adds the profiles; None if none are to be put in front."""
    return None if front.user_profile is None else AddProfiles(recipe=front.user_profile, tally=tally)


def check(front: "FrontTexts", store: "Store") -> None:
    """Raises InputError when profiles are to be put in front and there are none of that recipe."""
    from persona.store import profiles

    if front.user_profile is not None:
        profiles.require(store, front.user_profile)


def tables(front: "FrontTexts") -> tuple[str, ...]:
    """The table that a snapshot needs for it."""
    return () if front.user_profile is None else ("profiles",)


def summary_rows(counts: Counts) -> list[tuple[str, str]]:
    """The row of a summary that shows how many requests saw a profile; none if none were put in front."""
    found = counts.get("profiles")
    if found is None:
        return []
    newer, without = f"{int(found['newer']):,} are not after it", f"{int(found['without']):,} have none"
    return [("user profiles", f"in front of {int(found['used']):,} requests; {newer}, {without}")]


def facts(counts: Counts) -> dict[str, int]:
    """The same for programs."""
    found = counts.get("profiles")
    return {} if found is None else {f"profiles_{name}": int(n) for name, n in found.items()}
