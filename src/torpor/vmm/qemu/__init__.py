"""QEMU's microvm machine, driven over QMP."""
