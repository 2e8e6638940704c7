"""Makes thumbnails: POST a picture, get a smaller PNG back. ?size=N is its longest side."""

import io
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from PIL import Image

LARGEST_BODY = 32 * 1024 * 1024
Image.MAX_IMAGE_PIXELS = 64 * 1024 * 1024


def thumbnail(picture: Image.Image, size: int) -> bytes:
    """The picture as PNG with no side longer than `size`."""
    small = picture.convert("RGB")
    small.thumbnail((size, size))
    out = io.BytesIO()
    small.save(out, "PNG")
    return out.getvalue()


class Thumbs(BaseHTTPRequestHandler):
    """GET /example makes a picture of its own."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Help, or a thumbnail of a gradient."""
        if urlsplit(self.path).path == "/example":
            self.picture(Image.linear_gradient("L"))
        else:
            self.answer(200, "text/plain", b"POST a picture; ?size=N sets the longest side\n")

    def do_POST(self) -> None:
        """Resize the body."""
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            self.close_connection = True
            self.answer(413, "text/plain", b"the picture is too large\n")
            return
        try:
            picture = Image.open(io.BytesIO(self.rfile.read(int(length))))
            picture.load()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            self.answer(400, "text/plain", f"not a picture: {error}\n".encode())
            return
        self.picture(picture)

    def picture(self, picture: Image.Image) -> None:
        """Answer with a thumbnail of the size that was asked for."""
        asked = parse_qs(urlsplit(self.path).query).get("size", ["128"])[0]
        if not asked.isdecimal() or not 1 <= int(asked) <= 4096:
            self.answer(400, "text/plain", b"size is a number from 1 to 4096\n")
            return
        self.answer(200, "image/png", thumbnail(picture, int(asked)))

    def answer(self, status: int, kind: str, body: bytes) -> None:
        """Send a response."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Thumbs).serve_forever()
