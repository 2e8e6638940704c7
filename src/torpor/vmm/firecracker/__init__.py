"""Firecracker, driven over its HTTP API on a Unix socket."""
