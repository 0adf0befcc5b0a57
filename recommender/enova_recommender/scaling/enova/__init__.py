"""enova's own scaling policy: a forecast of demand against learnt capacity, at the time at which a replica is ready."""

from __future__ import annotations

from enova_recommender.scaling.enova.policy import EnovaPolicy

__all__ = ["EnovaPolicy"]
