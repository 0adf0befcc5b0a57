"""The part of etcd's v3 API that enova uses; generated, wire-compatible with etcd 3.4 and 3.5."""
