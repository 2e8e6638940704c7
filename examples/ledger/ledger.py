"""A ledger in SQLite on the scratch disk: what falls asleep here must be there on waking."""

import json
import os
import sqlite3
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PATH = Path(os.environ.get("LEDGER", "/var/lib/ledger/ledger.db"))
LARGEST_BODY = 64 * 1024
LARGEST_AMOUNT = 2**31  # so that four billion rows can be summed up


def connect() -> sqlite3.Connection:
    """The database; every commit reaches the disk before it returns."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(PATH, isolation_level=None, timeout=30)
    database.execute("PRAGMA synchronous = FULL")
    database.execute(
        "CREATE TABLE IF NOT EXISTS ledger"
        " (number INTEGER PRIMARY KEY AUTOINCREMENT, amount INTEGER NOT NULL, note TEXT NOT NULL)"
    )
    return database


class Ledger(BaseHTTPRequestHandler):
    """POST adds a row, GET sums up."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Count, sum, last number, and whether the database is sound."""
        database = connect()
        try:
            count, total, last = database.execute(
                "SELECT count(*), coalesce(sum(amount), 0), coalesce(max(number), 0) FROM ledger"
            ).fetchone()
            integrity = database.execute("PRAGMA integrity_check").fetchone()[0]
        finally:
            database.close()
        self.answer(200, {"count": count, "sum": total, "last": last, "integrity": integrity})

    def do_POST(self) -> None:
        """Add {"amount": whole number, "note": text} in one transaction."""
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            self.close_connection = True
            self.answer(413, {"error": f"the body must have at most {LARGEST_BODY} bytes"})
            return
        try:
            row = json.loads(self.rfile.read(int(length)))
            amount, note = row["amount"], str(row.get("note", ""))
            note.encode()  # JSON may escape half a character, which no database takes
            if type(amount) is not int or abs(amount) > LARGEST_AMOUNT:
                raise TypeError("amount must be a whole number of at most 32 bits")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.answer(400, {"error": f"send {{amount, note}} as JSON: {error}"})
            return
        database = connect()
        try:
            database.execute("BEGIN IMMEDIATE")
            number = database.execute(
                "INSERT INTO ledger (amount, note) VALUES (?, ?)", (amount, note)
            ).lastrowid
            database.execute("COMMIT")
        finally:
            database.close()
        self.answer(201, {"number": number})

    def answer(self, status: int, value: dict[str, Any]) -> None:
        """Send JSON."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    connect().close()
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Ledger).serve_forever()
