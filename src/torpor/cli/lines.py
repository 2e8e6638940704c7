"""The lines of the daemon's log: key=value for people, or one JSON object each.

What a function prints may be part of a message: it makes no line and no member of its own.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Final

_TEXT: Final = "%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
_PAIR: Final = re.compile(r"(?:^|\s)([A-Za-z_]\w*)=(.*?)(?=\s[A-Za-z_]\w*=|$)")
_PLACE: Final = re.compile(r"(?:\b([A-Za-z_]\w*)=)?(%[-.\d]*[sdfr])")
_ENDS_OF_LINES: Final = {ord(end): repr(end)[1:-1] for end in "\n\r\v\f\x85\u2028\u2029"}


class TextLines(logging.Formatter):
    """Messages as they are, each in one line; a traceback follows in lines of its own."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return super().formatMessage(record).translate(_ENDS_OF_LINES)


class JsonLines(logging.Formatter):
    """One JSON object a line; what is written key=value in a message becomes members too."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            **_members(record),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _members(record: logging.LogRecord) -> dict[str, str]:
    """The pairs of a message: of its text, if values are filled in, whatever these hold."""
    if not isinstance(record.args, tuple) or not record.args:
        return dict(_PAIR.findall(record.getMessage()))
    filled = zip(_PLACE.findall(str(record.msg)), record.args, strict=False)
    return {name: form % value for (name, form), value in filled if name}


def set_up(*, as_json: bool, debug: bool) -> None:
    """Write the log to standard error so, everything with `debug`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else TextLines())
    logging.basicConfig(
        handlers=[handler], level=logging.DEBUG if debug else logging.INFO, force=True
    )
    for name in ("asyncio", "uvicorn", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
