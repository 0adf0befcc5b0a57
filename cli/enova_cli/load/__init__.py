"""`enova load`: traffic from a trace or a rate, and its report."""
