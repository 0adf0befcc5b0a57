"""The continuous-batching scheduler, shared by advice, the simulated engine and fleet simulation."""

from enova_recommender.engine.events import (
    Admitted,
    Event,
    Finished,
    FirstToken,
    Limits,
    Policy,
    Preempted,
    Rejected,
    Request,
    Resumed,
    Stepped,
)
from enova_recommender.engine.scheduler import Scheduler

__all__ = [
    "Admitted",
    "Event",
    "Finished",
    "FirstToken",
    "Limits",
    "Policy",
    "Preempted",
    "Rejected",
    "Request",
    "Resumed",
    "Scheduler",
    "Stepped",
]
