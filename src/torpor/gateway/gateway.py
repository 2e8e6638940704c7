"""The gateway of one node: listens, finds each request's function and an instance, and scales."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Final

from torpor.errors import DeadlineExceeded, FunctionFailed, HostUnfit, InvalidInput, TorporError
from torpor.gateway.client import ClientConnection, Limits
from torpor.gateway.exchange import Exchange
from torpor.gateway.fleet import Fleet, NodeFleet
from torpor.gateway.heads import encode_request, find_route
from torpor.gateway.problems import Problem, Refused
from torpor.gateway.scaler import Scaler
from torpor.gateway.spans import Spans, answered, name_request, traceparent
from torpor.gateway.stats import GatewayStats
from torpor.gateway.upstream import FunctionConnection
from torpor.node.node import Node
from torpor.node.spans import failed
from torpor.snapshot.manifest import Scale

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from torpor.config import Settings
    from torpor.gateway.client import Incoming
    from torpor.gateway.heads import Route
    from torpor.gateway.pool import Member, Pool

log = logging.getLogger("torpor.gateway")

_ATTEMPTS: Final = 3
_CONNECT_S: Final = 3.0
_BACKLOG: Final = 1024
_UNKNOWN_DEADLINE_S: Final = Scale().deadline_ms / 1000


class Gateway:
    """Takes invocations for the functions of a node. Belongs to one asyncio loop."""

    def __init__(
        self, node: Node | Fleet, settings: Settings, *, tracer: Tracer | None = None
    ) -> None:
        """`node` may be any Fleet in tests. With a `tracer` requests and wakes have spans."""
        self.limits = Limits(
            head_bytes=settings.gateway_head_bytes,
            body_bytes=settings.gateway_body_bytes,
            header_timeout_s=settings.gateway_header_timeout_s,
            keep_alive_s=settings.gateway_keep_alive_s,
            connections=settings.gateway_connections,
        )
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self._domain = settings.gateway_domain
        self._wakes_at_once = settings.gateway_wakes
        self._fleet: Fleet = NodeFleet(node) if isinstance(node, Node) else node
        self._spans = Spans(tracer)
        self._server: asyncio.Server | None = None
        self._scaling: asyncio.Task[None] | None = None
        self._scaler: Scaler
        self._refused: Counter[int] = Counter()

    async def start(self, *, host: str, port: int) -> None:
        """Listen and begin to scale; port 0 takes a free one.

        Raises InvalidInput for what is no address, HostUnfit when it cannot listen there.
        """
        if not 0 <= port <= 65535:
            raise InvalidInput(f"not a port: {port}", hint="use 0 to 65535")
        self._scaler = Scaler(self._fleet, wakes_at_once=self._wakes_at_once, spans=self._spans)
        await self._scaler.look()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: ClientConnection(self), host, port, backlog=_BACKLOG
            )
        except OSError as error:
            raise HostUnfit(
                f"the gateway cannot listen on {host}:{port}",
                reason=str(error),
                hint="name another address or port, or end what listens there",
            ) from None
        self._scaling = loop.create_task(self._scaler.run())

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens: host and port."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def drain(self, *, deadline_s: float) -> None:
        """Stop accepting, let requests finish, then end scaling; instances stay as they are.

        After `deadline_s` what has not finished is broken off. Idempotent.
        """
        self.draining = True
        if self._server is not None:
            self._server.close()
        try:
            async with asyncio.timeout(deadline_s):
                while self.connections:
                    for client in [c for c in self.connections if not c.busy]:
                        client.close()
                    await asyncio.sleep(0.02)
                await self._stop_scaling()
        except TimeoutError:
            log.warning("drain breaks off what is left connections=%d", len(self.connections))
        for client in list(self.connections):
            client.abort()
        self._scaler.cancel()
        await self._stop_scaling()

    def stats(self) -> GatewayStats:
        """The gateway now."""
        return GatewayStats(
            connections=len(self.connections),
            functions={name: pool.stats() for name, pool in self._scaler.pools.items()},
            refused=dict(self._refused),
            recent_wakes=tuple(self._scaler.recent_wakes),
        )

    # Service

    def count_refused(self, status: int) -> None:
        """See Service."""
        self._refused[status] += 1

    async def answer(self, client: ClientConnection, incoming: Incoming) -> bool:
        """See Service."""
        with self._spans.request(incoming) as span:
            return await self._answer(client, incoming, span)

    async def _answer(
        self, client: ClientConnection, incoming: Incoming, span: Span | None
    ) -> bool:
        pool: Pool | None = None
        problem: Problem
        exchange: Exchange | None = None
        try:
            route = find_route(incoming.head, self._domain)
            pool = self._scaler.pools.get(route.function)
            pool = pool or await self._find(route.function, asked_at=incoming.at)
            name_request(span, pool.name)
            exchange = await self._pass_on(client, incoming, route, pool, span)
            return exchange.keep_alive and exchange.reusable
        except Refused as refused:
            problem = refused.problem
        except _Broken as broken:
            exchange, error = broken.exchange, broken.error
            failed(span, error)
            log.warning("request failed id=%s error=%s", _id_of(incoming), error)
            problem = Problem.of(error)
        except TorporError as error:
            failed(span, error)
            log.info("request not passed on id=%s error=%s", _id_of(incoming), error)
            problem = Problem.of(error)
        except asyncio.CancelledError:
            if pool is not None:
                pool.responses["lost"] += 1
            raise
        if exchange is not None and exchange.status:
            client.abort()
            return False
        answered(span, problem.status)
        return self._answer_problem(client, incoming, pool, problem)

    def _answer_problem(
        self, client: ClientConnection, incoming: Incoming, pool: Pool | None, problem: Problem
    ) -> bool:
        if pool is None:
            self.count_refused(problem.status)
        else:
            pool.responses[f"{problem.status // 100}xx"] += 1
        incoming.body.discard()
        keep_alive = incoming.head.keep_alive and incoming.body.ended and not self.draining
        client.answer_problem(
            problem,
            request_id=incoming.head.request_id,
            method=incoming.head.method,
            keep_alive=keep_alive,
        )
        return keep_alive

    async def _find(self, name: str, *, asked_at: float) -> Pool:
        """The pool of a function that this gateway does not know yet."""
        try:
            async with asyncio.timeout_at(asked_at + _UNKNOWN_DEADLINE_S):
                return await self._scaler.find(name)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the store did not say within {_UNKNOWN_DEADLINE_S:g} s whether it has {name}"
            ) from None

    async def _pass_on(
        self,
        client: ClientConnection,
        incoming: Incoming,
        route: Route,
        pool: Pool,
        span: Span | None,
    ) -> Exchange:
        deadline_s = pool.scale.deadline_ms / 1000
        deadline_at = incoming.at + deadline_s
        member = pool.take()
        connection = FunctionConnection.take_idle(member) if member is not None else None
        if member is None or connection is None:
            try:
                with self._spans.wait(incoming.at):
                    async with asyncio.timeout_at(deadline_at):
                        member, connection = await self._connect(pool, member)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"no instance of {pool.name} was ready within {deadline_s:g} s"
                ) from None
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        pool.wait.add(sent_at - incoming.at)
        exchange = Exchange(client, incoming, connection)
        head = encode_request(
            incoming.head, route, client=client.address, traceparent=traceparent(span)
        )
        member.active.add(connection)
        try:
            await exchange.run(head, deadline_at=deadline_at, deadline_s=deadline_s)
        except TorporError as error:
            if exchange.status:
                pool.responses["lost"] += 1
            raise _Broken(exchange, error) from None
        else:
            pool.responses[f"{exchange.status // 100}xx"] += 1
            pool.duration.add(loop.time() - incoming.at)
        finally:
            self._spans.first_byte(span, exchange, sent_at)
            member.active.discard(connection)
            if exchange.reusable:
                connection.keep(member)
            elif exchange.status == 101:
                connection.close()
            else:
                connection.abort()
            pool.release(member)
        return exchange

    async def _connect(
        self, pool: Pool, member: Member | None
    ) -> tuple[Member, FunctionConnection]:
        """An instance that takes a connection. Nothing was sent yet: another one may be tried."""
        for _ in range(_ATTEMPTS):
            member = member or await pool.acquire()
            connected = False
            try:
                connection = FunctionConnection.take_idle(member)
                if connection is None:
                    async with asyncio.timeout(_CONNECT_S):
                        ready = member.ready
                        connection = await FunctionConnection.open(ready.address, ready.port)
                connected = True
                return member, connection
            except TimeoutError as error:
                last: Exception = error
            except OSError as error:
                last = error
                self._scaler.suspect(pool, member)
            finally:
                if not connected:
                    pool.release(member)
            member = None
        raise FunctionFailed(
            f"{pool.name} takes no connections", reason=f"{_ATTEMPTS} attempts, the last: {last}"
        )

    async def _stop_scaling(self) -> None:
        if self._scaling is not None:
            self._scaling.cancel()
            await asyncio.wait((self._scaling,))
            await self._scaler.drain()


class _Broken(Exception):
    """An exchange that failed, and why."""

    def __init__(self, exchange: Exchange, error: TorporError) -> None:
        super().__init__(str(error))
        self.exchange, self.error = exchange, error


def _id_of(incoming: Incoming) -> str:
    return incoming.head.request_id.decode("ascii")
