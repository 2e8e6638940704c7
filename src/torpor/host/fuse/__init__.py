"""A read-only file system in plain Python on the kernel's FUSE protocol.

    layouts      the structures, opcodes and flags of linux/fuse.h
    protocol     bytes to requests, answers to bytes; no IO
    files        what a file system has to know: nodes, their names, their bytes
    connection   /dev/fuse: mount, negotiate, clone, send again, unmount
    server       threads that answer, push pages and forget them

Whoever holds a `Connection` keeps the mount alive; a server is a process that may die at any time.
The rules that make this safe are in `server`.
"""
