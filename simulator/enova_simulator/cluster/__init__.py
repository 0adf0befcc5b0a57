"""Discrete-event simulation of a whole fleet."""
