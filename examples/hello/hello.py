"""Says who answers: enough to see that two clones are not one and the same."""

import itertools
import json
import os
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

INSTANCE = Path("/run/torpor/instance-id")
requests = itertools.count(1)


class Hello(BaseHTTPRequestHandler):
    """GET any path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with identity, clock and fresh random bytes."""
        instance = INSTANCE.read_text().strip() if INSTANCE.exists() else ""
        body = json.dumps(
            {
                "hello": "world",
                "hostname": socket.gethostname(),
                "instance": instance,
                "time": time.time(),
                "random": os.urandom(8).hex(),
                "pid": os.getpid(),
                "request": next(requests),
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Hello).serve_forever()
