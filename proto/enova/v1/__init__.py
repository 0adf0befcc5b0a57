"""Version 1 of enova's API; everything beside this file is generated from the .proto files."""
