"""ccmux as the tests run it: in this process on a free port, or as a process of its own; and a client.

Both use a config file and a SQLite file in the test's own folder. The database is read with sqlite3 alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

import ccmux

ROOT = Path(__file__).resolve().parents[1]

ADMIN_TOKEN = "admin-token-of-the-tests-0123456789"
# Dollars per million tokens are micro-dollars per token: 100 in and 50 out cost 200 at A, 500 at B.
PRICES = {"A": (1, 2), "B": (3, 4), "C": (5, 6)}
FULL = {name: 100 * price[0] + 50 * price[1] for name, price in PRICES.items()}


def toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def provider_row(name: str = "demo", type: str = "demo", **keys: Any) -> str:
    """A [[providers]] table; without words the built-in demo's."""
    rows = {"name": name, "type": type, **keys}.items()
    return "\n".join(["[[providers]]", *(f"{k} = {toml(v)}" for k, v in rows), ""])


def config_text(
    urls: Mapping[str, str],
    *,
    formats: str = "anthropic",
    server: Mapping[str, Any] | None = None,
    providers: Mapping[str, Mapping[str, Any]] | None = None,
    credits: Mapping[str, Any] | None = None,
    context: Mapping[str, int] | None = None,
) -> str:
    """A config whose model `m` has a target per URL, in that order; `providers` adds keys to their tables."""
    lines = ["[server]", *(f"{k} = {toml(v)}" for k, v in (server or {}).items())]
    lines += ["[router]", 'default = "m"']
    lines += ["[credits]", *(f"{k} = {toml(v)}" for k, v in (credits or {}).items())]
    for name, url in urls.items():
        table = {"type": formats, "base_url": url, "api_key": f"sk-test-key-of-{name}"}
        lines += [provider_row(name, **table | (providers or {}).get(name, {}))]
    lines += ["[[models]]", 'name = "m"']
    for number, name in enumerate(urls, 1):
        price = {"input": PRICES[name[0]][0], "output": PRICES[name[0]][1]}
        table = {"provider": name, "actual_model": f"up-{name}", "priority": number, "price": price}
        table |= {"context": context[name]} if context and name in context else {}
        lines += ["[[models.mappings]]", *(f"{k} = {toml(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


class Books:
    """The database of a ccmux, read from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, sql: str) -> list[dict[str, Any]]:
        with contextlib.closing(
            sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=10)
        ) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(sql)]

    def ledger(self) -> list[dict[str, Any]]:
        """What was charged: every entry but top-ups."""
        return self.rows("select * from ledger where kind != 'topup' order by id")

    def holds(self) -> list[dict[str, Any]]:
        return self.rows("select * from holds")

    def requests(self) -> list[dict[str, Any]]:
        return self.rows("select * from requests order by rowid")

    def check_sums(self) -> None:
        """What must always be true: entries add up to balances, holds to what is held."""
        for user in self.rows("select * from users"):
            entries = self.rows("select user_id, amount_microusd from ledger")
            held = self.rows("select user_id, amount_microusd from holds")
            assert total(entries, user["id"]) == user["balance_microusd"], user["name"]
            assert total(held, user["id"]) == user["held_microusd"], user["name"]


def total(rows: list[dict[str, Any]], user_id: int) -> int:
    return sum(int(row["amount_microusd"]) for row in rows if row["user_id"] == user_id)


def settlement(request_id: str, charge: int = 100, user: str = "ann", **more: Any) -> ccmux.Settlement:
    """A request as it stands in the ledger."""
    fields: dict[str, Any] = {
        "session": "s1", "agent": "", "asked": "claude-x", "route": "default", "provider": "p", "model": "m",
        "stream": True, "status": 200, "error": "", "attempts": 1, "cost": charge, "markup": 0,
        "usage": ccmux.Usage(input=10, output=5, cache_read=3), "price": {"input": "1", "output": "2"},
        "first_token_ms": 12, "duration_ms": 34, "stop_reason": "end_turn", "trail": [["default", "m"]], **more,
    }  # fmt: skip
    return ccmux.Settlement(request_id=request_id, user=user, charge=charge, **fields)


@dataclass
class Proxy:
    """A running ccmux."""

    url: str
    books: Books
    folder: Path
    state: Any = None  # of an in-process one
    runner: web.AppRunner | None = None
    process: asyncio.subprocess.Process | None = None
    output: bytearray = field(default_factory=bytearray)  # of a process: stdout and stderr

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def config_file(self) -> Path:
        return self.folder / "config.toml"

    def signal(self, number: int) -> None:
        """To a process."""
        assert self.process is not None
        self.process.send_signal(number)

    def add_user(self, name: str, credit_microusd: int = 0) -> str:
        """A user with some credit; the key."""
        return str(self.state.store.add_user(name, credit_microusd)[1])

    @property
    def connections(self) -> int:
        """How many clients are connected, to an in-process one."""
        assert self.runner and self.runner.server
        return len(self.runner.server.connections)

    async def idle(self) -> None:
        """Until no request is in flight and every settlement is on disk."""
        await until(lambda: not self.state.calls, "the last request ended")
        await until(lambda: not self.books.holds(), "the last hold was settled")


async def until(holds: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Looks until something holds that nothing can tell us of (another process, a file)."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def in_process(folder: Path, text: str) -> AsyncIterator[Proxy]:
    """ccmux in this process, set up as `serve` does it."""
    file = folder / "config.toml"
    file.write_text(text)
    store = ccmux.Store(str(folder / "ccmux.db"))
    store.open_server()
    state = await ccmux.make_state(ccmux.load_config(text, os.environ, str(file)), store, ADMIN_TOKEN)
    runner = ccmux.runner_of(state)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield Proxy(url, Books(folder / "ccmux.db"), folder, state, runner)
    finally:
        await runner.cleanup()
        await ccmux.close_state(state)
        store.close()


@contextlib.asynccontextmanager
async def as_process(
    folder: Path, text: str | None, env: Mapping[str, str] | None = None
) -> AsyncIterator[Proxy]:
    """`ccmux.py serve --config ... --port 0`, from its first line to its end; what it said is in `output`."""
    file = folder / "config.toml"
    if text is not None:
        file.write_text(text)
    environment = {**os.environ, "HOME": str(folder), "CCMUX_ADMIN_TOKEN": ADMIN_TOKEN, **(env or {})}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "ccmux.py"), "serve", "--config", str(file), "--port", "0",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment, cwd=folder,
    )  # fmt: skip
    proxy = Proxy("", Books(folder / "ccmux.db"), folder, process=process)
    reader = asyncio.create_task(keep_output(proxy))
    try:
        await until(
            lambda: b"claude\n" in proxy.output or process.returncode is not None, "ccmux started", seconds=60
        )
        match = re.search(rb"at (http://[\d.]+:\d+)", proxy.output)
        assert match, proxy.output.decode()
        proxy.url = match[1].decode()
        yield proxy
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reader


async def keep_output(proxy: Proxy) -> None:
    assert proxy.process and proxy.process.stdout
    while data := await proxy.process.stdout.read(65536):
        proxy.output += data


# A client.


@dataclass
class Reply:
    """What a client got. `broken`: the connection ended before the answer did."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    broken: bool = False
    seconds: float = 0.0

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Events of a stream, pings left out; each must be whole and named by its `event:` line."""
        found = []
        for block in self.body.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n\n"):
            lines = [line.partition(":") for line in block.split("\n") if line and not line.startswith(":")]
            fields = {name: value.strip() for name, _, value in lines}
            if fields:
                event = json.loads(fields["data"])
                assert fields["event"] == event["type"]
                found.append(event)
        return [event for event in found if event["type"] != "ping"]

    @property
    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]

    @property
    def text(self) -> str:
        """The text of the answer, streamed or whole."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            deltas = [e["delta"] for e in self.events if e["type"] == "content_block_delta"]
            return "".join(d.get("text", "") for d in deltas)
        return "".join(block.get("text", "") for block in self.json.get("content", []))

    @property
    def error(self) -> dict[str, Any]:
        """The error of a JSON answer, or of the stream's last event."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return self.events[-1]["error"] if self.events and self.events[-1]["type"] == "error" else {}
        return self.json["error"]


def message_body(stream: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "model": "claude-sonnet-5-5", "max_tokens": 1000, "stream": stream,
        "messages": [{"role": "user", "content": "Say hello."}], **more,
    }  # fmt: skip


async def ask(
    proxy: Proxy,
    path: str = "/v1/messages",
    *,
    stream: bool = True,
    key: str = "",
    headers: Mapping[str, str] | None = None,
    on_data: Callable[[Reply], None] = lambda reply: None,
    body: Mapping[str, Any] | None = None,
) -> Reply:
    """One POST on a connection of its own; `on_data` sees the reply grow."""
    began = time.monotonic()
    sent = {**({"x-api-key": key} if key else {}), **(headers or {})}
    reply = Reply()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        try:
            url, asked = f"{proxy.url}{path}", message_body(stream) if body is None else body
            async with session.post(url, json=asked, headers=sent) as response:
                reply.status = response.status
                reply.headers = {k.lower(): v for k, v in response.headers.items()}
                async for data in response.content.iter_any():
                    reply.body += data
                    on_data(reply)
        except aiohttp.ClientError:
            reply.broken = True
    reply.seconds = time.monotonic() - began
    return reply


async def soon_enough(go: Callable[[Path], Awaitable[float]], folder: Path, most: float) -> None:
    """Runs something that is to take at most so many seconds, which it returns (inf: it was too late for more).
    Being late counts only when it is so each of three times, as a shared machine may be away for longer.
    """
    took = []
    for number in range(3):
        place = folder / f"go{number}"
        place.mkdir()
        took.append(await go(place))
        if took[-1] <= most:
            return
    raise AssertionError(f"took {took} seconds instead of at most {most:g}")


async def ask_many(proxy: Proxy, number: int, **options: Any) -> list[Reply]:
    return await asyncio.gather(*(ask(proxy, **options) for _ in range(number)))


def opens_gates(servers: Iterable[Any], deltas: int = 3) -> Callable[[Reply], None]:
    """An `on_data` that opens the servers' gates once so many pieces of text have come."""

    def look(reply: Reply) -> None:
        if reply.body.count(b"text_delta") >= deltas:
            for server in servers:
                server.open_gate()

    return look
