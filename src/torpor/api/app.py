"""The API as an ASGI application: operations, metrics, and errors as problems."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from torpor.api.metrics import Metrics
from torpor.api.problems import MEDIA_TYPE, Problem, bug_of, problem_of
from torpor.api.routes import router
from torpor.api.schemas import describe
from torpor.api.state import State
from torpor.errors import InvalidInput, NoSpace, NotFound, TorporError
from torpor.host.cancel import in_thread
from torpor.host.space import no_space_of

log = logging.getLogger("torpor.api")


def create_app(state: State, metrics: Metrics) -> FastAPI:
    """The application of a daemon."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url="/v1/openapi.json")
    app.state.torpor = state
    app.include_router(router)

    def openapi() -> dict[str, Any]:
        app.openapi_schema = app.openapi_schema or describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/metrics", include_in_schema=False)
    async def get_metrics() -> Response:
        content_type, body = await in_thread(metrics.render)
        return Response(body, media_type=content_type)

    app.add_exception_handler(TorporError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_refused)
    app.add_exception_handler(OSError, _on_os_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TorporError)
    log.info("refused method=%s path=%s error=%s", request.method, request.url.path, error)
    return _answer(problem_of(error))


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return _answer(
        problem_of(
            InvalidInput(
                "the request is malformed",
                reason="; ".join(found),
                hint="/v1/openapi.json describes each operation",
            )
        )
    )


async def _on_refused(request: Request, error: Exception) -> Response:
    """What no operation took: an unknown path, a method that it has not."""
    assert isinstance(error, HTTPException)
    kind = NotFound if error.status_code == 404 else InvalidInput
    said = kind(f"{request.method} {request.url.path}: {error.detail}")
    return _answer(problem_of(said, status=error.status_code), headers=error.headers)


async def _on_os_error(request: Request, error: Exception) -> Response:
    told = no_space_of(error)
    if isinstance(told, NoSpace):
        return await _on_error(request, told)
    raise error


async def _on_bug(request: Request, error: Exception) -> Response:
    log.exception("internal error method=%s path=%s", request.method, request.url.path)
    return _answer(problem_of(bug_of(error)))


def _answer(problem: Problem, *, headers: Any = None) -> Response:  # noqa: ANN401
    return Response(
        msgspec.json.encode(problem),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )
