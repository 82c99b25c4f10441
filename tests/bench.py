"""Measures ccmux against a bare aiohttp pass-through that does nothing, in the same run, on loopback.

    python tests/bench.py [--rounds 3] [--seconds 2] [--only anthropic,openai] [--out bench.json] [--history]

Mock upstream, gateway and load generator are processes of their own; with two cores or more the gateway has
one for itself. Each cell is measured straight to the mock and then through the gateway, in turn, so that the
machine's mood is in both figures: `added_ms` is the difference of the two medians of a round. A round measures all
gateways in turn, and a ratio is the median over the rounds of what the two came to in the same one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CCMUX = Path(__file__).resolve().parent.parent / "ccmux.py"
EVENTS = 300  # text events of a burst stream
PACED = 200  # text events of a paced stream, one each PACE seconds
PACE = 0.02
TURN = b"turn 00000000"  # in the last message: another number in each request, as each turn of a conversation is new
STAMP = re.compile(rb"@(\d{16})@")
WORDS = [
    "the",
    "function",
    "reads",
    "a",
    "config",
    "file",
    "then",
    "returns",
    "its",
    "value",
    "so",
    "that",
    "tests",
]


# Bodies: the size and shape of a Claude Code request.


def prose(rand: random.Random, size: int) -> str:
    return " ".join(rand.choice(WORDS) for _ in range(size // 5))[:size]


def tool(rand: random.Random, number: int) -> dict[str, Any]:
    properties = {
        n: {"type": "string", "description": prose(rand, 120)} for n in ("file_path", "command", "pattern")
    }
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": properties,
    }
    return {
        "name": f"Tool{number}",
        "description": prose(rand, 1600),
        "input_schema": {**schema, "required": ["file_path"]},
    }


def body_of(model: str, stream: bool, size: int = 113_000) -> bytes:
    """A request of about `size` bytes: system prompt, 20 tools, rounds of tool calls and results, and what is new."""
    rand = random.Random(7)
    system = [{"type": "text", "text": prose(rand, 14_000), "cache_control": {"type": "ephemeral"}}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Find the failing test."}]}
    ]
    body = {"model": model, "max_tokens": 32_000, "stream": stream, "system": system, "messages": messages}
    body["tools"] = [tool(rand, n) for n in range(20)]
    length = len(json.dumps(body))
    for number in range(10_000):
        if length > size:
            break
        id = f"toolu_{number:04}"
        call = {"type": "tool_use", "id": id, "name": "Tool1", "input": {"file_path": f"/src/{number}.py"}}
        result = {"type": "tool_result", "tool_use_id": id, "content": prose(rand, 2600)}
        messages += [{"role": "assistant", "content": [{"type": "text", "text": prose(rand, 300)}, call]}]
        messages += [{"role": "user", "content": [result]}]
        length += 3200
    messages += [{"role": "assistant", "content": [{"type": "text", "text": prose(rand, 300)}]}]
    messages += [
        {"role": "user", "content": [{"type": "text", "text": f"{prose(rand, 1000)} {TURN.decode()}"}]}
    ]
    return json.dumps(body, separators=(",", ":")).encode()


# The mock upstream: prebuilt bytes on a bare protocol. The model's name says what to answer: burst, paced or whole.


def sse(event: str, data: dict[str, Any]) -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def anthropic_events(texts: list[str]) -> list[bytes]:
    usage = {"input_tokens": 500, "cache_read_input_tokens": 3000, "output_tokens": 1}
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "usage": usage,
    }
    start = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 421}}
    return [
        sse("message_start", {"type": "message_start", "message": {**message, "stop_reason": None}})
        + sse("content_block_start", start),
        *(
            sse(
                "content_block_delta",
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": t}},
            )
            for t in texts
        ),
        sse("content_block_stop", {"type": "content_block_stop", "index": 0})
        + sse("message_delta", delta)
        + sse("message_stop", {"type": "message_stop"}),
    ]


def openai_events(texts: list[str]) -> list[bytes]:
    base = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "system_fingerprint": "fp",
    }

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        return sse(
            "", {**base, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}
        )

    usage = {
        "prompt_tokens": 3500,
        "completion_tokens": 421,
        "prompt_tokens_details": {"cached_tokens": 3000},
    }
    end = chunk({}, "stop") + sse("", {**base, "choices": [], "usage": usage}) + b"data: [DONE]\n\n"
    return [chunk({"role": "assistant", "content": ""}), *(chunk({"content": t}) for t in texts), end]


def text_of(number: int, stamped: bool) -> str:
    return ("@0000000000000000@" if stamped else "") + WORDS[number % len(WORDS)] + " "


class Mock(asyncio.Protocol):
    """Answers POSTs by path (chat completions or messages) and by the request's wish to stream."""

    paced: dict[str, list[bytes]]
    burst: dict[str, bytes]
    short: bytes  # what a translated answer that is not streamed is collected from
    whole: bytes

    @classmethod
    def build(cls) -> None:
        kinds: dict[str, Callable[[list[str]], list[bytes]]] = {"a": anthropic_events, "o": openai_events}
        cls.paced = {k: make([text_of(n, True) for n in range(PACED)]) for k, make in kinds.items()}
        texts = [text_of(n, False) for n in range(EVENTS)]
        cls.burst = {k: chunked(make(texts)) for k, make in kinds.items()}
        cls.short = chunked(openai_events(texts[:60]))
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "stop_reason": "end_turn",
        }
        usage = {"input_tokens": 500, "cache_read_input_tokens": 3000, "output_tokens": 421}
        text = "".join(text_of(n, False) for n in range(60))
        cls.whole = json.dumps(
            {**message, "content": [{"type": "text", "text": text}], "usage": usage}
        ).encode()

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer, self.timer = transport, bytearray(), None

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        length = re.search(rb"content-length: *(\d+)", head)
        size = end + 4 + int(length[1] if length else 0)
        if len(self.buffer) < size:
            return
        body = bytes(self.buffer[end + 4 : size])
        del self.buffer[:size]
        self.answer("o" if b"/chat/completions" in head.split(b"\r\n")[0] else "a", body)

    def answer(self, kind: str, body: bytes) -> None:
        if b"paced" in body[:300]:
            self.transport.write(STREAM_HEAD)
            self.step(kind, 0, asyncio.get_running_loop().time())
        elif kind == "o" and b"whole" in body[:300]:
            self.transport.write(STREAM_HEAD + self.short)
        elif kind == "o" or re.search(rb'"stream": ?true', body[:300] + body[-300:]):
            self.transport.write(STREAM_HEAD + self.burst[kind])
        else:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
                self.whole
            )
            self.transport.write(head + self.whole)

    def step(self, kind: str, number: int, due: float) -> None:
        event = self.paced[kind][number].replace(
            b"0000000000000000", b"%016d" % (time.monotonic_ns() // 1000)
        )
        is_last = number + 1 == len(self.paced[kind])
        self.transport.write(b"%x\r\n%s\r\n" % (len(event), event) + (b"0\r\n\r\n" if is_last else b""))
        if not is_last:
            self.timer = asyncio.get_running_loop().call_at(
                due + PACE, self.step, kind, number + 1, due + PACE
            )


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(events: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n"


async def serve_mock(port: int) -> None:
    Mock.build()
    server = await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def serve_floor(port: int, upstream: str) -> None:
    """The floor: aiohttp as a server and as a client, and nothing between."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

    hop = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding", "content-encoding"}

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in hop}
        async with request.app["session"].post(
            upstream + request.path_qs, data=body, headers=headers
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in hop}
            if "event-stream" not in answer.headers.get("content-type", ""):
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
            out = web.StreamResponse(status=answer.status, headers=kept)
            await out.prepare(request)
            async for data in answer.content.iter_any():
                await out.write(data)
            await out.write_eof()
            return out

    async def session(app: web.Application) -> Any:
        app["session"] = ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None))
        yield
        await app["session"].close()

    app = web.Application(client_max_size=2**26)
    app.cleanup_ctx.append(session)
    app.router.add_post("/{path:.*}", relay)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, handler_cancellation=True)


# The load generator.


@dataclass
class Record:
    start: float
    end: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One keep-alive connection; times are taken on arrival, all parsing is left for later."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, data: bytes) -> asyncio.Future[Record]:
        self.future: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        self.record, self.head, self.got, self.need, self.tail = Record(time.perf_counter()), b"", 0, -2, b""
        self.transport.write(data)
        return self.future

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.need == -2:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self.head[:end].lower(), self.head[end + 4 :]
            self.record.status = int(head[9:12])
            length = re.search(rb"content-length: *(\d+)", head)
            self.need = int(length[1]) if length else -1
        self.record.pieces.append((now, data))
        self.got += len(data)
        self.tail = (self.tail + data)[-7:]
        if self.got == self.need or (self.need == -1 and self.tail == b"\r\n0\r\n\r\n"):
            self.record.end = now
            self.future.set_result(self.record)

    def connection_lost(self, error: Exception | None) -> None:
        if hasattr(self, "future") and not self.future.done():
            self.future.set_exception(ConnectionError("the gateway closed the connection"))


@dataclass
class Gateway:
    name: str
    port: int
    model: str
    command: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    start_s: float = 0.0
    path: str = "/v1/messages"

    def request(self, kind: str, stream: bool, size: int = 113_000) -> bytes:
        model = self.model.replace("MODEL", kind)
        body = body_of(model, stream, size)
        head = f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nx-api-key: bench"
        return (
            f"{head}\r\nanthropic-version: 2023-06-01\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )

    async def connect(self) -> Connection:
        return (await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port))[1]

    def cpu(self) -> float:
        """CPU seconds of the process so far (user and system)."""
        if not self.process:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss(self, key: str = "VmRSS") -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text() if self.process else "VmRSS: 0"
        return int((re.search(rf"{key}:\s+(\d+)", status) or [0, 0])[1]) / 1024


turns = itertools.count(1)


async def load(
    gateway: Gateway, data: bytes, workers: int, limit: int, seconds: float, stagger: float = 0.0
) -> list[Record]:
    """A closed loop: each worker sends its next request when the last is answered. No two requests are the same."""
    records: list[Record] = []
    left = limit
    deadline = time.perf_counter() + seconds

    async def worker(number: int) -> None:
        nonlocal left
        await asyncio.sleep(number * stagger)
        connection = await gateway.connect()
        while left > 0 and (time.perf_counter() < deadline or stagger):
            left -= 1
            record = await connection.send(data.replace(TURN, b"turn %08d" % next(turns)))
            assert record.status == 200, record.pieces[-1][1][:300]
            records.append(record)
        connection.transport.close()

    await asyncio.gather(*(worker(n) for n in range(workers)))
    return records


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def lags(records: list[Record]) -> list[float]:
    """Seconds from the mock's stamp in each event to the event's arrival."""
    out = []
    for record in records:
        carry = b""
        for arrived, piece in record.pieces:
            data, end = carry + piece, 0
            for match in STAMP.finditer(data):
                out.append(arrived - int(match[1]) / 1e6)
                end = match.end()
            carry = data[end:][-40:]
    return out


# The cells.


async def measure(gateway: Gateway, direct: Gateway, seconds: float) -> dict[str, float]:
    """All figures of one gateway in one round."""
    base = await load(direct, direct.request("whole", False), 1, 300, seconds)
    records = await load(gateway, gateway.request("whole", False), 1, 300, seconds)
    out = {"added_ms": (median_time(records) - median_time(base)) * 1000}
    before, began = gateway.cpu(), time.perf_counter()
    records = await load(gateway, gateway.request("whole", False), 32, 3000, seconds)
    out["requests_s"] = len(records) / (time.perf_counter() - began)
    out["cpu_ms"] = (gateway.cpu() - before) * 1000 / len(records)
    began = time.perf_counter()
    records = await load(gateway, gateway.request("burst", True), 32, 1500, seconds)
    out["events_s"] = len(records) * EVENTS / (time.perf_counter() - began)
    before = gateway.cpu()
    records = await load(gateway, gateway.request("paced", True), 100, 100, 30, stagger=0.01)
    out["cpu_us_event"] = (gateway.cpu() - before) * 1e6 / (len(records) * PACED)
    out["lag_p99_ms"] = percentile(lags(records), 0.99) * 1000
    return out


def median_time(records: list[Record]) -> float:
    return statistics.median(r.end - r.start for r in records)


async def growth(gateway: Gateway) -> float:
    """How many times longer a ten times longer conversation takes (113 KB against 1.13 MB)."""
    times = []
    for size in (113_000, 1_130_000):
        records = await load(gateway, gateway.request("whole", False, size), 1, 40, 10)
        times.append(median_time(records))
    return times[1] / times[0]


async def lag_beside_large(gateway: Gateway) -> float:
    """p99 lag in ms of 20 paced streams while 1 MB requests arrive, each with new text to count."""
    request = gateway.request("whole", False, 1_000_000)
    large = [request.replace(b"function", b"fun%05d" % number) for number in range(10)]
    streams = asyncio.create_task(load(gateway, gateway.request("paced", True), 20, 20, 30, stagger=0.01))
    connection = await gateway.connect()
    for each in large:
        await connection.send(each)
        await asyncio.sleep(0.2)
    connection.transport.close()
    return percentile(lags(await streams), 0.99) * 1000


async def started(gateway: Gateway, cpu: int | None, environment: dict[str, str]) -> None:
    """Starts a gateway and waits for its first answer."""
    began = time.perf_counter()
    pin = (lambda: os.sched_setaffinity(0, {cpu})) if cpu is not None else None
    gateway.process = subprocess.Popen(
        gateway.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, preexec_fn=pin
    )
    while time.perf_counter() - began < 20:
        try:
            connection = await gateway.connect()
            await connection.send(gateway.request("whole", False, 100))
            connection.transport.close()
            gateway.start_s = time.perf_counter() - began
            return
        except OSError:
            await asyncio.sleep(0.01)
    raise SystemExit(f"{gateway.name} did not start")


def stop(gateway: Gateway) -> None:
    if gateway.process and gateway.process.poll() is None:
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(10)


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def config_of(folder: Path, port: int, upstream: str) -> Path:
    rows = "".join(
        f'[[providers]]\nname = "{name}"\ntype = "{name}"\nbase_url = "{upstream}"\napi_key = "bench-key-0000"\n'
        "max_concurrent = 512\n"
        for name in ("anthropic", "openai")
    )
    price = "price = { input = 3.0, output = 15.0 }\n"
    models = "".join(
        f'[[models]]\nname = "{provider}-{kind}"\n{price}[[models.mappings]]\nprovider = "{provider}"\nactual_model = "{kind}"\n'
        for provider in ("anthropic", "openai")
        for kind in ("whole", "burst", "paced")
    )
    path = folder / "config.toml"
    path.write_text(
        f'[server]\nport = {port}\nlog_level = "warning"\n[router]\nlong_context = "anthropic-whole"\n{rows}{models}'
    )
    return path


def fill_history(database: Path, users: int = 1_000, rows: int = 1_000_000) -> None:
    """A long life: many users, a million rows in the request log."""
    with sqlite3.connect(database) as db:
        columns = [r[1] for r in db.execute("pragma table_info(requests)")]
        name = db.execute("select * from requests order by id desc limit 1")
        sample = dict(zip([c[0] for c in name.description], name.fetchone(), strict=True))
        for number in range(users):
            db.execute(
                "insert or ignore into users (name, created) values (?, ?)",
                (f"user{number}", "2026-01-01T00:00:00Z"),
            )
        marks = ",".join("?" * len(columns))
        key = next(c for c in columns if c == "request_id")

        def made() -> Any:
            for number in range(rows):
                row = {**sample, "id": None, key: f"req_history{number}"}
                yield [row[c] for c in columns]

        db.executemany(f"insert into requests ({','.join(columns)}) values ({marks})", made())


GOALS = {  # figure: (most, as a ratio to the floor) or least
    "anthropic": {"added_ms": 3.0, "cpu_ms": 3.0, "events_s": -0.6, "cpu_us_event": 1.3},
    "openai": {"added_ms": 6.0, "cpu_us_event": 2.0, "lag_p99_ms": 3.0},
}
ABSOLUTE = {
    "openai": {"requests_s": -400.0, "events_s": -70_000.0},
    "ccmux": {"rss_max_mb": 110.0, "start_s": 0.5},
}


def judge(name: str, rounds: dict[str, list[dict[str, float]]], figures: dict[str, float]) -> list[str]:
    """A line per goal: the figure, its ratio to the floor of the same round, whether it is reached.

    A negative goal is a least.
    """
    lines = []
    for figure, goal in GOALS.get(name, {}).items():
        pairs = zip(rounds[name], rounds["floor"], strict=True)
        ratio = statistics.median(own[figure] / floor[figure] for own, floor in pairs)
        good = ratio >= -goal if goal < 0 else ratio <= goal
        lines.append(
            f"{name:10} {figure:13} {figures[figure]:10.2f}  {ratio:5.2f}x  goal {abs(goal)}x  {'ok' if good else 'MISSED'}"
        )
    for figure, goal in {**ABSOLUTE.get(name, {}), **ABSOLUTE["ccmux"]}.items():
        good = figures[figure] >= -goal if goal < 0 else figures[figure] <= goal
        lines.append(
            f"{name:10} {figure:13} {figures[figure]:10.2f}         goal {abs(goal):g}  {'ok' if good else 'MISSED'}"
        )
    return lines


def ccmux_gateway(name: str, model: str, folder: Path, upstream: str) -> Gateway:
    """A ccmux with a config and a database of its own."""
    home, port = folder / name, free_port()
    home.mkdir()
    command = [sys.executable, str(CCMUX), "--config", str(config_of(home, port, upstream))]
    return Gateway(name, port, model, command)


def gateways_of(args: argparse.Namespace, folder: Path, upstream: str) -> list[Gateway]:
    """The floor, and a ccmux for each format."""
    port = free_port()
    gateways = [Gateway("floor", port, "MODEL", [sys.executable, __file__, "--floor", str(port), upstream])]
    for name in args.only.split(","):
        gateways.append(ccmux_gateway(name, f"{name}-MODEL", folder, upstream))
    return gateways


async def run(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """The figures of each gateway, a row a round; a round measures all gateways in turn."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    own, theirs = (cores[0], cores[1]) if len(cores) > 1 else (None, None)
    if own is not None:
        os.sched_setaffinity(0, {own})
    port = free_port()
    mock = Gateway("direct", port, "MODEL", [sys.executable, __file__, "--mock", str(port)])
    gateways = gateways_of(args, folder, f"http://127.0.0.1:{port}")
    environment = {**os.environ, "HOME": str(folder)}
    rounds: dict[str, list[dict[str, float]]] = {gateway.name: [] for gateway in gateways}
    try:
        for gateway in (mock, *gateways):
            await started(gateway, own if gateway is mock else theirs, environment)
        idle = {gateway.name: gateway.rss() for gateway in gateways}
        for gateway in gateways:
            await load(gateway, gateway.request("whole", False), 2, 20, 5)  # warm
        for _ in range(args.rounds):
            for gateway in gateways:
                rounds[gateway.name].append(await measure(gateway, mock, args.seconds))
        for gateway in gateways:
            last = rounds[gateway.name][-1]
            last |= {"rss_idle_mb": idle[gateway.name], "rss_max_mb": gateway.rss("VmHWM")}
            last["start_s"] = gateway.start_s
            if gateway.name != "floor":
                last["growth_10x"] = await growth(gateway)
                last["lag_beside_1mb_ms"] = await lag_beside_large(gateway)
        if args.history:
            young = gateways[-1]
            old = ccmux_gateway("aged", young.model, folder, f"http://127.0.0.1:{port}")
            gateways.append(old)
            await started(old, theirs, environment)  # it makes its database
            stop(old)
            fill_history(folder / old.name / "ccmux.db")
            await started(old, theirs, environment)
            await load(old, old.request("whole", False), 2, 20, 5)
            rounds[young.name][-1]["history_p50_change_percent"] = await history_change(young, old)
    finally:
        for gateway in (*gateways, mock):
            stop(gateway)
    return rounds


async def history_change(young: Gateway, old: Gateway) -> float:
    """What a long life adds to a lone request, in percent: a server with one and a server without, in turn."""
    request = young.request("whole", False)
    times: dict[str, list[float]] = {young.name: [], old.name: []}
    for number in range(10):
        for gateway in (young, old) if number % 2 else (old, young):
            records = await load(gateway, request, 1, 150, 5)
            times[gateway.name].append(median_time(records))
    return (statistics.median(times[old.name]) / statistics.median(times[young.name]) - 1) * 100


def medians(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {f: statistics.median(row[f] for row in rows if f in row) for f in rows[-1]}
        for name, rows in rounds.items()
    }


def table(results: dict[str, dict[str, float]]) -> str:
    names = list(dict.fromkeys(k for figures in results.values() for k in figures))
    lines = ["| | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        cells = (f"{f[name]:,.2f}" if name in f else "" for f in results.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a cell")
    parser.add_argument("--only", default="anthropic,openai", help="upstream formats to measure")
    parser.add_argument(
        "--history", action="store_true", help="measure again with 1,000 users and 1,000,000 rows"
    )
    parser.add_argument("--out", default="", help="write the figures as JSON")
    parser.add_argument("--mock", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--floor", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mock:
        asyncio.run(serve_mock(args.mock))
    elif args.floor:
        serve_floor(int(args.floor[0]), args.floor[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            rounds = asyncio.run(run(args, Path(folder)))
        results = medians(rounds)
        print(table(results))
        for name in args.only.split(","):
            print("\n".join(judge(name, rounds, results[name])))
        if args.out:
            Path(args.out).write_text(json.dumps(rounds, indent=2))


if __name__ == "__main__":
    main()
