"""The kernel and its objects, no policy: child processes, locks, sparse files, pagemap.

Nothing in this room knows what a function, a snapshot or a VM is. All of it blocks; asyncio code
calls it through a thread.
"""
