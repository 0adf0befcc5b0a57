"""Plumbing that several programs use and that names no concept of the domain."""
