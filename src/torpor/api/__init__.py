"""The daemon, its HTTP API, and the clients of that."""
