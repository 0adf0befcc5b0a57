"""The coordinator: cluster state, reconciliation, telemetry, decisions and the gRPC API."""
