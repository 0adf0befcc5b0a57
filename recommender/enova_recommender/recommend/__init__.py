"""Configuration recommendation: from model, hardware and workload to a configuration."""
