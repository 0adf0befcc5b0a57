"""The commands of enova, a module for each group."""
