"""Errors over HTTP and back."""

from __future__ import annotations

import json

import msgspec
import pytest

from torpor import errors
from torpor.api.problems import error_of, problem_of
from torpor.api.streams import LINES
from torpor.api.wire import Lines, LineSplitter, Where, event_of, refuse_problem
from torpor.errors import HostUnfit, InternalError, InvalidInput, NotFound, TorporError
from torpor.node.parts import Silent

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, TorporError)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_comes_through(kind: type[TorporError]) -> None:
    """Class, message, reason, hint; the status is the class's."""
    problem = problem_of(kind("what", reason="why", hint="how"))
    assert problem.status == kind.http_status >= 400
    assert problem.title
    with pytest.raises(kind) as caught:
        refuse_problem(problem.status, msgspec.json.encode(problem))
    error = caught.value
    assert type(error) is kind
    assert (error.message, error.reason, error.hint) == ("what", "why", "how")


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"type": "urn:torpor:error:dict", "status": 1}'],
)
def test_answers_that_are_no_problem(body: bytes) -> None:
    """A proxy's page, or something else's error, is an error of ours, never a crash."""
    with pytest.raises(InternalError, match="502"):
        refuse_problem(502, body)
    refuse_problem(200, body)


@pytest.mark.parametrize("kind", ["TYPE_CHECKING", "ClassVar", "Nothing", "", "annotations"])
def test_unknown_kinds_of_problem(kind: str) -> None:
    """A newer daemon's error, or a name in that module which is none, keeps its words."""
    problem = {"type": f"urn:torpor:error:{kind}", "title": "t", "status": 400, "detail": "words"}
    error = error_of(problem, status=400)
    assert type(error) is InternalError
    assert error.message == "words"


def test_lines_are_cut_at_line_feeds_only() -> None:
    """Strings hold what other splitters take for line ends; pieces come as they come."""
    values = ["a\u2028b", "c\x85d", "e\x0bf", "ö" * 10]
    data = b"".join(json.dumps(v, ensure_ascii=False).encode() + b"\n" for v in values)
    for size in (1, 2, 3, 7, len(data)):
        splitter = LineSplitter()
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        lines = [line for piece in pieces for line in splitter.feed(piece)]
        assert [json.loads(line) for line in lines] == values


def test_operation_that_ends_without_a_result() -> None:
    """A daemon that stopped in the middle is said; a problem in a line is raised."""
    lines = Lines(Silent())
    lines.take('{"progress": {"say": "building"}}')
    with pytest.raises(HostUnfit, match="stopped before it was done"):
        lines.result(None)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match="no function"):
        lines.take(
            json.dumps({"problem": msgspec.to_builtins(problem_of(NotFound("no function")))})
        )


def test_events_are_found_between_comments() -> None:
    """A line of data is an event; ids, names and comments around it are not."""
    assert event_of(": nothing new") is None
    assert event_of("id: 3") is None
    event = event_of('data: {"id":3,"at_ns":1,"kind":"k","subject":"s","data":{}}')
    assert event is not None
    assert (event.id, event.kind) == (3, "k")
    assert LINES == "application/x-ndjson"


def test_where_a_daemon_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is a socket, a URL takes a token, nothing means the settings' socket."""
    monkeypatch.setenv("TORPOR_HOME", "/some/home")
    assert str(Where.find(None, None).socket) == "/some/home/torpor.sock"
    monkeypatch.setenv("TORPOR_SOCKET", "/run/x.sock")
    assert str(Where.find(None, None).socket) == "/run/x.sock"
    where = Where.find("https://node:1", "secret")
    assert where.socket is None
    assert where.headers() == {"Authorization": "Bearer secret"}
    with pytest.raises(InvalidInput):
        Where.find("node:1", None)
