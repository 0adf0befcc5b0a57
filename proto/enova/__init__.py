"""The contracts between enova's processes, as generated protobuf code."""
