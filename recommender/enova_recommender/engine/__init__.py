"""The continuous-batching scheduler, shared by advice, the simulated engine and fleet simulation."""
