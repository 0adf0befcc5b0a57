"""The OpenAI-compatible reverse proxy of one node, a program of its own."""
