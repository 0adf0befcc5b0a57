"""Performance detection: from telemetry to verdicts."""
