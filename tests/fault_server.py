"""An upstream that misbehaves on purpose: a raw HTTP server on asyncio streams, driven by a script.

A script is one `Behaviour` per call, the last repeats. A behaviour is a list of steps made from the call it
answers, so a row speaks Anthropic or OpenAI chat, streamed or whole, as the request asks. Calls are kept with
their head, their body and the moment their peer closed; waiting is by event.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of 127.0.0.1, signed by itself, with a key that is nobody's secret.
CERTIFICATE = Path(__file__).parent / "fixtures" / "loopback.pem"
WAIT = 30.0  # seconds until an event that a test waits for counts as never coming


# Steps: what a behaviour is made of.


@dataclass(frozen=True)
class Send:
    """Bytes; with `piece` in pieces of that many, each in a write of its own."""

    data: bytes
    piece: int = 0


@dataclass(frozen=True)
class Stall:
    """Nothing more, until the peer is gone."""


@dataclass(frozen=True)
class Gate:
    """Nothing more until the test calls `server.open_gate()`."""


@dataclass(frozen=True)
class Pause:
    """Silence of some seconds: for what is to take time, not to wait for luck."""

    seconds: float


@dataclass(frozen=True)
class Reset:
    """The connection is cut with RST."""


@dataclass(frozen=True)
class End:
    """The connection is closed with FIN."""


Step = Send | Stall | Gate | Pause | Reset | End


@dataclass(frozen=True)
class Behaviour:
    steps: Callable[[UpstreamCall], Iterable[Step]]
    at_accept: bool = False  # acts on the connection, before any request is read
    on_reuse: bool = (
        False  # acts only when the connection has served before; else the next behaviour is taken
    )


@dataclass
class UpstreamCall:
    """One request as it arrived, and what became of it. Times are of time.monotonic."""

    number: int  # from 1
    connection: int
    method: str = ""
    path: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    began: float = field(default_factory=time.monotonic)
    answered: float | None = None  # all steps were done
    gone: asyncio.Future[float] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body) if self.body else {}

    @property
    def format(self) -> str:
        return "openai" if self.path.partition("?")[0].endswith("/chat/completions") else "anthropic"

    @property
    def streams(self) -> bool:
        return self.json.get("stream") is True

    @property
    def was_cancelled(self) -> bool:
        """Whether the peer closed before the answer was complete."""
        return self.gone.done() and (self.answered is None or self.gone.result() < self.answered)

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)


class _Connection(asyncio.StreamReaderProtocol):
    """Streams, with the moment the peer closed."""

    def __init__(self, server: FaultServer) -> None:
        self.lost: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        super().__init__(asyncio.StreamReader(), server.serve)

    def eof_received(self) -> bool | None:
        self.note()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.note()
        super().connection_lost(exc)

    def note(self) -> None:
        if not self.lost.done():
            self.lost.set_result(time.monotonic())


class FaultServer:
    """`async with FaultServer(answer()) as server:` listens on a free port of loopback."""

    def __init__(self, *script: Behaviour, tls: bool = False) -> None:
        self.script: Sequence[Behaviour] = script or (answer(),)
        self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if tls else None
        if self.tls:
            self.tls.load_cert_chain(CERTIFICATE)
        self.calls: list[UpstreamCall] = []
        self.connections = 0
        self.changed = asyncio.Condition()
        self.gate = asyncio.Event()
        self.port = 0
        self.sent = 0  # bytes, all connections together

    async def __aenter__(self) -> FaultServer:
        loop = asyncio.get_running_loop()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", 0, backlog=1024, ssl=self.tls
        )
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *error: Any) -> None:
        self.server.close()
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def count(self) -> int:
        return len(self.calls)

    def open_gate(self) -> None:
        self.gate.set()

    async def called(self, number: int = 1) -> UpstreamCall:
        """The call of that number (from 1), once its request has arrived."""
        await self._until(lambda: len(self.calls) >= number, f"call {number}")
        return self.calls[number - 1]

    async def cancelled(self, number: int = 1) -> float:
        """The moment the peer closed the connection of that call."""
        call = await self.called(number)
        async with asyncio.timeout(WAIT):
            return await asyncio.shield(call.gone)

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT), self.changed:
                await self.changed.wait_for(holds)
        except TimeoutError:
            raise AssertionError(f"{what} never came; {len(self.calls)} calls did") from None

    # One connection.

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self.serve_connection(reader, writer, self.connections)
        finally:
            writer.close()
            self.tasks.discard(task)

    async def serve_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> None:
        served = 0
        if self.behaviour(served).at_accept:
            await self.play(self.behaviour(served), await self.note(connection, writer), writer)
            return
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            request = self.parse(head)
            request["body"] = await self.read_body(reader, writer, request["headers"])
            behaviour = self.behaviour(served)
            call = await self.note(connection, writer, **request)
            if not await self.play(behaviour, call, writer):
                return
            served += 1

    def behaviour(self, served: int) -> Behaviour:
        at = len(self.calls)
        found = self.script[min(at, len(self.script) - 1)]
        if found.on_reuse and not served:  # only meant for a connection that has served before
            return self.script[min(at + 1, len(self.script) - 1)]
        return found

    async def note(self, connection: int, writer: asyncio.StreamWriter, **request: Any) -> UpstreamCall:
        call = UpstreamCall(len(self.calls) + 1, connection, **request)
        lost = writer.transport.get_protocol().lost
        if lost.done():
            call.gone.set_result(lost.result())
        else:
            lost.add_done_callback(lambda f: call.gone.done() or call.gone.set_result(f.result()))
        async with self.changed:
            self.calls.append(call)
            self.changed.notify_all()
        return call

    def parse(self, head: bytes) -> dict[str, Any]:
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        pairs = [line.partition(":") for line in lines if line]
        return {"method": method, "path": path, "headers": [(k, v.strip()) for k, _, v in pairs]}

    async def read_body(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: list[tuple[str, str]]
    ) -> bytes:
        known = {k.lower(): v for k, v in headers}
        if "chunked" in known.get("transfer-encoding", ""):
            parts = []
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                parts.append(await reader.readexactly(size))
                await reader.readexactly(2)
            await reader.readuntil(b"\r\n")
            return b"".join(parts)
        return await reader.readexactly(int(known.get("content-length", 0)))

    async def play(self, behaviour: Behaviour, call: UpstreamCall, writer: asyncio.StreamWriter) -> bool:
        """Takes the steps; false when the connection is at its end."""
        for step in behaviour.steps(call):
            if isinstance(step, Send):
                await self.send(step, writer)
            elif isinstance(step, Stall):
                await asyncio.shield(call.gone)
                return False
            elif isinstance(step, Gate):
                await self.gate.wait()
            elif isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
            else:
                call.answered = time.monotonic()
                self.cut(writer, isinstance(step, Reset))
                return False
        call.answered = time.monotonic()
        return True

    async def send(self, step: Send, writer: asyncio.StreamWriter) -> None:
        size = step.piece or len(step.data) or 1
        for start in range(0, len(step.data), size):
            piece = step.data[start : start + size]
            writer.write(piece)
            await writer.drain()
            self.sent += len(piece)
            await asyncio.sleep(0)

    def cut(self, writer: asyncio.StreamWriter, reset: bool) -> None:
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        else:
            writer.close()


@contextlib.contextmanager
def refusing_address() -> Any:
    """The URL of a port that is bound but does not listen: connecting is refused, and nobody else gets it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@contextlib.contextmanager
def silent_address() -> Any:
    """The URL of a port whose queue of connections is full: connecting neither succeeds nor fails (Linux)."""
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket())
        held.bind(("127.0.0.1", 0))
        held.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(held.getsockname())
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


# What a healthy upstream says. Five pieces of text; the usage is the same in both formats.

PIECES = ("Hello", " there", ", this", " is", " it.")
INPUT_TOKENS, OUTPUT_TOKENS = 100, 50
REASONS = {400: "Bad Request", 500: "Internal Server Error"}


def anthropic_events(
    pieces: Sequence[str] = PIECES, start_usage: Any = None, end_usage: Any = None
) -> list[bytes]:
    """The events of an answer, one a block of bytes: 2 before the text, 3 after it."""
    usage = {"input_tokens": INPUT_TOKENS, "output_tokens": 1} if start_usage is None else start_usage
    final = {"output_tokens": OUTPUT_TOKENS} if end_usage is None else end_usage
    message = {
        "id": "msg_upstream", "type": "message", "role": "assistant", "model": "up", "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    block = {"type": "text", "text": ""}
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
        for piece in pieces
    ]
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    return [
        sse_event(event)
        for event in (
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": block},
            *deltas,
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": end, "usage": final},
            {"type": "message_stop"},
        )
    ]


def openai_events(
    pieces: Sequence[str] = PIECES, start_usage: Any = None, end_usage: Any = None
) -> list[bytes]:
    """The same answer in chat chunks: 1 before the text, 3 after it."""
    counts = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
    usage = counts if end_usage is None else end_usage

    def chunk(delta: Any, finish: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return sse_data(
            {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "up", "choices": [choice]}
        )

    last = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "up", "choices": []}
    return [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": piece}) for piece in pieces),
        chunk({}, "stop"),
        sse_data({**last, "usage": usage}),
        b"data: [DONE]\n\n",
    ]


def sse_event(event: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), json.dumps(event).encode())


def sse_data(value: Any) -> bytes:
    return b"data: %s\n\n" % json.dumps(value).encode()


def anthropic_message(pieces: Sequence[str] = PIECES, usage: Any = None) -> bytes:
    usage = {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS} if usage is None else usage
    return json.dumps({
        "id": "msg_upstream", "type": "message", "role": "assistant", "model": "up", "stop_sequence": None,
        "content": [{"type": "text", "text": "".join(pieces)}], "stop_reason": "end_turn", "usage": usage,
    }).encode()  # fmt: skip


def openai_message(pieces: Sequence[str] = PIECES, usage: Any = None) -> bytes:
    usage = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS} if usage is None else usage
    message = {"role": "assistant", "content": "".join(pieces)}
    return json.dumps({
        "id": "c1", "object": "chat.completion", "created": 1, "model": "up", "usage": usage,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }).encode()  # fmt: skip


def events_for(call: UpstreamCall, **options: Any) -> list[bytes]:
    return (openai_events if call.format == "openai" else anthropic_events)(**options)


def error_body(call: UpstreamCall, type: str, message: str) -> dict[str, Any]:
    detail = {"type": type, "message": message}
    if call.format == "openai":
        return {"error": {**detail, "code": type}}
    return {"type": "error", "error": detail}


def error_event(call: UpstreamCall, type: str = "overloaded_error", message: str = "Overloaded") -> bytes:
    body = error_body(call, type, message)
    return sse_data(body) if call.format == "openai" else sse_event(body)


# Framing.


def head(status: int = 200, headers: Iterable[tuple[str, str]] = (), reason: str = "") -> bytes:
    lines = [
        f"HTTP/1.1 {status} {reason or REASONS.get(status, 'Status')}",
        *(f"{k}: {v}" for k, v in headers),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


STREAM_HEAD = (("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked"))
LAST_CHUNK = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def whole(status: int, headers: Iterable[tuple[str, str]], body: bytes) -> Send:
    """A response with a Content-Length, after which the connection stays open."""
    return Send(head(status, [*headers, ("Content-Length", str(len(body)))]) + body)


def stream_of(blocks: Iterable[bytes], headers: Iterable[tuple[str, str]] = ()) -> list[Step]:
    """A whole chunked stream, after which the connection stays open."""
    parts = [head(200, [*STREAM_HEAD, *headers]), *map(chunked, blocks), LAST_CHUNK]
    return [Send(b"".join(parts))]


JSON_TYPE = ("Content-Type", "application/json")


# Behaviours.


def answer(
    pieces: Sequence[str] = PIECES,
    usage: Any = None,
    headers: Iterable[tuple[str, str]] = (),
    *,
    last: bool = False,
) -> Behaviour:
    """A good answer in the format and mode the request asked for; after the `last` the connection closes."""
    more = [*headers, *([("Connection", "close")] if last else [])]

    def steps(call: UpstreamCall) -> Iterable[Step]:
        if not call.streams:
            body = openai_message if call.format == "openai" else anthropic_message
            yield whole(200, [JSON_TYPE, *more], body(pieces, usage))
        else:
            start = usage if call.format == "anthropic" else None
            yield from stream_of(events_for(call, pieces=pieces, start_usage=start, end_usage=usage), more)
        if last:
            yield End()

    return Behaviour(steps)


def slow_answer(before: float = 0.0, between: float = 0.0, pieces: Sequence[str] = PIECES) -> Behaviour:
    """A good stream that takes its time before the head and between events."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        yield Pause(before)
        yield Send(head(200, STREAM_HEAD))
        for block in events_for(call, pieces=pieces):
            yield Send(chunked(block))
            yield Pause(between)
        yield Send(LAST_CHUNK)

    return Behaviour(steps)


def with_signs_of_life(after: int) -> Behaviour:
    """A good stream that after `after` events sends nothing but pings or comments for 1.6 s."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        blocks = events_for(call)
        yield Send(head(200, STREAM_HEAD) + b"".join(map(chunked, blocks[:after])))
        for _ in range(4):
            yield Pause(0.4)
            yield Send(chunked(b": alive\n\n" if call.format == "openai" else sse_event({"type": "ping"})))
        yield Send(b"".join(map(chunked, blocks[after:])) + LAST_CHUNK)

    return Behaviour(steps)


def gated_answer(after: int = 4) -> Behaviour:
    """A good stream that stops after `after` events until the gate opens."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        blocks = [chunked(block) for block in events_for(call)]
        return [
            Send(head(200, STREAM_HEAD) + b"".join(blocks[:after])),
            Gate(),
            Send(b"".join(blocks[after:]) + LAST_CHUNK),
        ]

    return Behaviour(steps)


def gated_whole() -> Behaviour:
    """A good whole answer, once the gate is open."""
    return Behaviour(lambda call: [Gate(), whole(200, [JSON_TYPE], anthropic_message())])


def dripping(piece: int = 1, newline: bytes = b"\n") -> Behaviour:
    """A good stream in writes and chunks of a few bytes, with any line ends."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        data = b"".join(events_for(call)).replace(b"\n", newline)
        cut = b"".join(chunked(data[n : n + piece]) for n in range(0, len(data), piece))
        return [Send(head(200, STREAM_HEAD)), Send(cut + LAST_CHUNK, piece=piece + 5)]

    return Behaviour(steps)


TYPES = {429: "rate_limit_error", 529: "overloaded_error"}


def status(
    code: int, headers: Iterable[tuple[str, str]] = (), type: str = "", message: str = ""
) -> Behaviour:
    """An error status with an error body in the format of the request."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        body = error_body(call, type or TYPES.get(code, "api_error"), message or f"upstream says {code}")
        return [whole(code, [JSON_TYPE, *headers], json.dumps(body).encode())]

    return Behaviour(steps)


def refusing(words: str, what: Callable[[dict[str, Any]], Any], code: int = 400) -> Behaviour:
    """A refusal in these words of each request of which `what` holds, and a good answer to any other."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        return (status(code, message=words) if what(call.json) else answer()).steps(call)

    return Behaviour(steps)


def raw(code: int = 200, headers: Iterable[tuple[str, str]] = (), body: bytes = b"") -> Behaviour:
    """Any status with any headers and any body."""
    return Behaviour(lambda call: [whole(code, headers, body)])


def bytes_then(*steps: Step) -> Behaviour:
    """Steps as they are, HTTP or not."""
    return Behaviour(lambda call: steps)


def html() -> Behaviour:
    return raw(
        200, [("Content-Type", "text/html")], b"<html><body>Sign in to the hotel network</body></html>"
    )


def truncated_json() -> Behaviour:
    return raw(200, [JSON_TYPE], anthropic_message()[:80])


def until_closed(*ending: Step, events: int = 99) -> Behaviour:
    """So many events in a stream without a length, whose end is that of its connection."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        blocks = events_for(call)[:events]
        yield Send(head(200, [("Content-Type", "text/event-stream")]) + b"".join(blocks[:4]))
        yield Gate()
        yield Send(b"".join(blocks[4:]))
        yield from ending

    return Behaviour(steps)


def truncated_body() -> Behaviour:
    """Fewer bytes than Content-Length said, then FIN."""
    body = anthropic_message()
    start = head(200, [JSON_TYPE, ("Content-Length", str(len(body)))])
    return bytes_then(Send(start + body[:60]), End())


def empty(kind: str = "text/event-stream") -> Behaviour:
    return raw(200, [("Content-Type", kind)], b"")


def redirect(location: str, code: int = 307) -> Behaviour:
    return raw(code, [("Location", location)], b"")


def reset_at_accept() -> Behaviour:
    return Behaviour(lambda call: [Reset()], at_accept=True)


def reset_before_status() -> Behaviour:
    return bytes_then(Reset())


def close_before_status() -> Behaviour:
    return bytes_then(End())


def reset_on_reuse() -> Behaviour:
    """RST to a request on a connection that has answered one before: what a stale keep-alive looks like."""
    return Behaviour(lambda call: [Reset()], on_reuse=True)


def stall() -> Behaviour:
    return bytes_then(Stall())


def stall_in_headers() -> Behaviour:
    return bytes_then(Send(b"HTTP/1.1 200 OK\r\nContent-Ty"), Stall())


def stall_after_headers() -> Behaviour:
    return bytes_then(Send(head(200, STREAM_HEAD)), Stall())


def cut_after(
    events: int, *ending: Step, gate: bool = True, extra: Callable[[UpstreamCall], bytes] = lambda call: b""
) -> Behaviour:
    """So many events, then (once the gate is open) `extra` and the ending: Reset(), End(), Stall(), ..."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        blocks = b"".join(map(chunked, events_for(call)[:events]))
        yield Send(head(200, STREAM_HEAD) + blocks)
        if gate:
            yield Gate()
        if more := extra(call):
            yield Send(chunked(more))
        yield from ending

    return Behaviour(steps)


def error_first() -> Behaviour:
    """A 200 whose first event is an error."""
    return Behaviour(lambda call: stream_of([error_event(call)]))


def error_after_start() -> Behaviour:
    """A 200 that begins a message, then tells an error before any content."""
    return Behaviour(lambda call: stream_of([events_for(call)[0], error_event(call)]))


def error_midway(events: int = 5) -> Behaviour:
    return cut_after(events, Send(LAST_CHUNK), extra=error_event)


def error_midway_at_once(events: int = 5) -> Behaviour:
    return cut_after(events, Send(LAST_CHUNK), extra=error_event, gate=False)


def broken_json(event: int = 6) -> Behaviour:
    """A stream whose event of that number (from 1) is no JSON."""
    return cut_after(event - 1, Send(LAST_CHUNK), extra=lambda call: b'data: {"choices": [{"del\n\n')


def by_key(*bad: str, otherwise: Behaviour, refusal: Behaviour) -> Behaviour:
    """One behaviour for calls with one of these keys, another for the rest."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        key = call.header("x-api-key") or (call.header("authorization") or "").removeprefix("Bearer ")
        return (refusal if key in bad else otherwise).steps(call)

    return Behaviour(steps)


def endless(piece: str = "x" * 60_000, pieces: int = 10_000) -> Behaviour:
    """A stream that goes on for as long as anybody reads it."""

    def steps(call: UpstreamCall) -> Iterable[Step]:
        blocks = events_for(call, pieces=(piece,))
        text = 1 if call.format == "openai" else 2
        yield Send(head(200, STREAM_HEAD) + b"".join(map(chunked, blocks[:text])))
        for _ in range(pieces):
            yield Send(chunked(blocks[text]))

    return Behaviour(steps)
