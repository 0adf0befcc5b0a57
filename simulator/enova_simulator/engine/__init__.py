"""The simulated engine: vLLM's command line, routes and metrics over the pure scheduler."""
