"""`enova up`: a whole fleet on this machine, as processes that are supervised and restarted."""
