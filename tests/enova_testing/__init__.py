"""Builders, twins and real servers that the tests share."""
