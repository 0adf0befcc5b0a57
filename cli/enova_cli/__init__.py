"""The enova command."""
