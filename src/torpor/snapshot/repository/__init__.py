"""The snapshot repository: windows as sealed chunks in packs, in any object store.

docs/format.md is the format; the modules here are its one implementation.
"""
