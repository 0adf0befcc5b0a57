"""The sidecar of one GPU host: it runs engines, watches them and reports."""
