"""The pager: a process that serves snapshots and images over FUSE, fetched as they are touched."""
