"""Scaling policies: from telemetry and verdicts to a target number of replicas."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from enova_recommender.scaling.enova_007 import FAITHFUL, MENDED
from enova_recommender.scaling.types import ScalingPolicy

POLICIES: Mapping[str, ScalingPolicy] = MappingProxyType({policy.name: policy for policy in (MENDED, FAITHFUL)})
DEFAULT_POLICY = MENDED.name
