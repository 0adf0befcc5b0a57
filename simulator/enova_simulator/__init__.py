"""Simulated parts that say so: an engine, and a whole fleet."""
