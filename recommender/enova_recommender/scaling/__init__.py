"""Scaling policies: from telemetry and verdicts to a target number of replicas.

Two kinds: ENOVA 0.0.7's rules look at nine minutes of six series, those that look ahead at a `Situation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from enova_recommender.scaling.enova_007 import FAITHFUL, MENDED
from enova_recommender.scaling.situation import Policy
from enova_recommender.scaling.types import ScalingPolicy

POLICIES: Mapping[str, ScalingPolicy] = MappingProxyType({policy.name: policy for policy in (MENDED, FAITHFUL)})
FORESEEING = frozenset({"enova"})
NAMES = frozenset(POLICIES) | FORESEEING
DEFAULT_POLICY = "enova"


def foreseeing(name: str) -> Policy:
    """The policy of a name in FORESEEING."""
    # It brings scipy, which takes a second to import: who only names policies does without.
    from enova_recommender.scaling.enova import EnovaPolicy

    return {"enova": EnovaPolicy()}[name]
