"""What the API takes and what it says about itself: OpenAPI 3.1 over the node's views."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI, Header, Path
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

from torpor import __version__
from torpor.api.problems import MEDIA_TYPE, Problem
from torpor.api.streams import LINES
from torpor.node import views
from torpor.node.events import Event

REFERENCE: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_VIEWS: Final = tuple(
    view
    for view in vars(views).values()
    if isinstance(view, type) and issubclass(view, views.View) and view is not views.View
)

Reference = Annotated[str, Path(pattern=REFERENCE, description="A name, id, digest or beginning.")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]{1,128}$",
        description="A repeat with the same key gets the first answer.",
    ),
]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DeployAsked(_Asked):
    """Deploy the function of a directory of this host."""

    directory: str = Field(min_length=1, max_length=4096, pattern=r"^/[^\x00]*$")
    name: str | None = Field(None, pattern=REFERENCE)


class InvokeAsked(_Asked):
    """Send one request to a function; `body` is base64."""

    method: str = Field("GET", pattern=r"^[A-Z]{1,16}$")
    path: str = Field("/", pattern=r"^/[!-~]*$", max_length=65536)
    headers: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list, max_length=200
    )
    body: str | None = None
    keep: bool = False
    trace: bool = False


class RestoreAsked(_Asked):
    """Wake a snapshot."""

    reference: str = Field(pattern=REFERENCE)
    expect: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    trace: bool = False


class ForkAsked(_Asked):
    """Make clones of a running instance."""

    count: int = Field(1, ge=1, le=64)


class StopAsked(_Asked):
    """End instances, all of them or none."""

    ids: list[Annotated[str, Field(pattern=REFERENCE)]] = Field(min_length=1, max_length=1000)


class SnapshotAsked(_Asked):
    """Snapshot a running instance, which runs on."""

    name: str | None = Field(None, pattern=REFERENCE)
    trial: bool = False


def says(view: type, *, many: bool = False, status: int = 200, lines: bool = False) -> Any:  # noqa: ANN401
    """The keyword arguments of a route that answers with a view, or with a list of them."""
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{view.__name__}"}
    if many:
        schema = {"type": "array", "items": schema}
    content = {"application/json": {"schema": schema}}
    if lines:
        content[LINES] = {"schema": {"type": "string", "description": "progress, then result"}}
    return {
        "status_code": status,
        "response_model": None,
        "responses": {status: {"description": "Done.", "content": content}},
    }


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the views and the problem that every operation may answer."""
    document = get_openapi(
        title="torpor",
        version=__version__,
        summary="The daemon of one node.",
        routes=app.routes,
    )
    _, components = msgspec.json.schema_components(
        (*_VIEWS, Event, Problem), ref_template="#/components/schemas/{name}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(components)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    problem = {
        "description": "A problem (RFC 9457).",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = problem
    return document
