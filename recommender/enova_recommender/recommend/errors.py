"""What is wrong with a request for advice: the field at fault, and why."""

from __future__ import annotations


class RecommendError(ValueError):
    """A request that cannot be answered. `field` names what to change, such as `workload.requests_per_s`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
