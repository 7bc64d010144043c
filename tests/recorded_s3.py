"""A proxy in front of an S3 server that records the requests it passes on."""

from tests.faulty_s3 import FaultyS3


class RecordedS3(FaultyS3):
    """The proxy, running while its context is open; `asked` has the method and path of each request."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream, seed=0)
        self.asked: list[str] = []

    def draw(self, method: str, path: str) -> str:
        """Never a fault."""
        self.asked.append(f"{method} {path}")
        return super().draw(method, path)
