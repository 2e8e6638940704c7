"""Struct types that several threads decode first at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

RACE = """
import sys, threading
import msgspec
from torpor.structs import prepared

sys.setswitchinterval(1e-6)
SOURCE = '''
import msgspec
class Inner(msgspec.Struct, frozen=True):
    key: str
    pairs: tuple[tuple[int, int], ...] = ()
class Outer(msgspec.Struct, frozen=True):
    one: Inner
    many: tuple[Inner, ...]
class Top(msgspec.Struct, frozen=True):
    outer: Outer
    named: dict[str, Outer]
    inner: Inner
'''
inner = b'{"key":"x","pairs":[[1,2]]}'
outer = b'{"one":%s,"many":[%s]}' % (inner, inner)
top = b'{"outer":%s,"named":{"a":%s},"inner":%s}' % (outer, outer, inner)
for _ in range(int(sys.argv[1])):
    made = {}
    exec(SOURCE, made)
    barrier = threading.Barrier(4)
    def decode(name, text):
        barrier.wait()
        msgspec.json.decode(text, type=prepared(made[name]))
    jobs = (("Top", top), ("Outer", outer), ("Inner", inner), ("Top", top))
    threads = [threading.Thread(target=decode, args=job) for job in jobs]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


@pytest.mark.slow
def test_first_use_in_several_threads() -> None:
    """Without `prepared` a few hundred rounds are enough to end the process by SIGSEGV."""
    outcome = subprocess.run(
        [sys.executable, "-c", RACE, "1000"], capture_output=True, text=True, timeout=120
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
