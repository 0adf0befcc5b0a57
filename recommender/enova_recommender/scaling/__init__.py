"""Scaling policies: from telemetry and verdicts to a target number of replicas."""
