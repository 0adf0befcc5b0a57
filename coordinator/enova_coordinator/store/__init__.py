"""The Store Protocol and its implementations."""
