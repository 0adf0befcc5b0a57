"""Pure decisions of the agent and of the ingress: no clock, no socket, no protobuf."""
