"""Run one command in level 1, with this working tree.

PYTHONPATH=src:tests .venv/bin/python -m kvm.run [--get DIR] [--file NAME=PATH]...
    [--env NAME=VALUE]... [--processor MODEL] [--timeout SECONDS] -- COMMAND...
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fixtures.nodes import SESSION_HOME
from kvm.disks import Job, named_programs
from kvm.machine import Level1


def main() -> int:
    """Its exit code is the command's, 98 when level 1 ended before, 99 after the time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--get", type=Path, help="unpack what is left in /rig/out here")
    parser.add_argument("--file", action="append", default=[], help="NAME=PATH: PATH as /rig/NAME")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--processor", default="max", help="a CPU model of QEMU's")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    environment, files = named_programs()
    environment |= dict(entry.split("=", 1) for entry in options.env)
    files |= {name: Path(path) for name, path in (entry.split("=", 1) for entry in options.file)}
    images = SESSION_HOME / "images"
    job = Job(options.command, environment, files, images if images.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="torpor-rig-") as work:
        with Level1(job, Path(work), on_output=_show, processor=options.processor) as level1:
            ended = level1.wait(options.timeout)
            if not ended or level1.code is None:
                sys.stderr.write(level1.console[-6000:])
                return 98 if ended else 99
        if options.get:
            level1.fetch_files(options.get)
        return level1.code


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
