"""Faults of the machine and the operator: signals, kill -9, a full disk, bad starts; and money under fire."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import fault_server as fs
import pytest
from fault_server import FaultServer
from proxy_harness import (
    FULL,
    ROOT,
    Proxy,
    Reply,
    as_process,
    ask,
    ask_many,
    config_text,
    message_body,
    soon_enough,
    until,
)
from test_fault_sequences import BOTH, hang_up, mixed_faults, raw_client
from test_faults import PART, breaks_off, check_ledger, fails, full, stage

import ccmux


@contextlib.asynccontextmanager
async def served(
    folder: Path, *script: fs.Behaviour, wire: str = "anthropic", **server: Any
) -> AsyncIterator[tuple[Proxy, FaultServer]]:
    """ccmux as a process in front of one fault server."""
    async with FaultServer(*script) as a:
        text = config_text({"A": a.url}, formats=wire, server=server)
        async with as_process(folder, text) as proxy:
            yield proxy, a


async def end(proxy: Proxy, number: signal.Signals | None = None) -> int:
    """The process's exit status, after a signal."""
    assert proxy.process is not None
    if number is not None:
        proxy.signal(number)
    async with asyncio.timeout(30):
        return await proxy.process.wait()


async def time_to_end(proxy: Proxy, number: signal.Signals, status: int = 0) -> float:
    """Seconds from a signal to the process's end, which has that exit status."""
    began = time.monotonic()
    assert await end(proxy, number) == status
    return time.monotonic() - began


async def refuses_connections(proxy: Proxy) -> None:
    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", proxy.port)) != 0

    await until(refused, "ccmux stopped listening")


def when_text_comes(pieces: int = 3) -> tuple[asyncio.Event, Callable[[Reply], None]]:
    """An event, and an `on_data` that sets it once so many pieces of text have come."""
    came = asyncio.Event()

    def look(reply: Reply) -> None:
        if reply.body.count(b"text_delta") >= pieces:
            came.set()

    return came, look


async def test_a_served_client_that_leaves_closes_the_upstream(tmp_path: Path) -> None:
    """What no later byte could tell: aiohttp's own default notices a hang-up only when it writes."""
    async with served(tmp_path, fs.stall()) as (proxy, a):
        await hang_up(proxy, a.called(1))
        await a.cancelled(1)
        await until(lambda: bool(proxy.books.requests()), "it was settled")
    check_ledger(proxy, "0")


async def test_a_certificate_is_trusted_where_the_environment_says_so(tmp_path: Path) -> None:
    """As the words say to whoever's is not."""
    async with FaultServer(tls=True) as a:
        for trusted in (False, True):
            env = {"SSL_CERT_FILE": str(fs.CERTIFICATE)} if trusted else {}
            async with as_process(tmp_path, config_text({"A": a.url}), env) as proxy:
                reply = await ask(proxy)
                (full() if trusted else fails(502, says="not trusted (self-signed certificate): check"))(
                    reply
                )
                assert trusted or "SSL_CERT_FILE" in reply.error["message"]
                assert await end(proxy, signal.SIGTERM) == 0


async def test_a_server_that_ends_while_it_reads_certificates_ends_well(tmp_path: Path) -> None:
    """A thread in OpenSSL that outlives the interpreter is a crash."""
    many = tmp_path / "many.pem"
    many.write_text(fs.CERTIFICATE.read_text() * 500)  # some tenths of a second
    async with FaultServer(fs.answer()) as a:
        text = config_text({"A": a.url})
        for _ in range(3):
            async with as_process(tmp_path, text, {"SSL_CERT_FILE": str(many)}) as proxy:
                assert await end(proxy, signal.SIGTERM) == 0


# Signals.


@BOTH
async def test_a_stream_that_ends_inside_the_drain_is_complete(wire: str, tmp_path: Path) -> None:
    async with served(tmp_path, fs.gated_answer(), wire=wire) as (proxy, a):
        came, look = when_text_comes(1)
        asked = asyncio.create_task(ask(proxy, on_data=look))
        await came.wait()
        proxy.signal(signal.SIGTERM)
        await refuses_connections(proxy)
        a.open_gate()
        full()(await asked)
        assert await end(proxy) == 0
    check_ledger(proxy, "A")


@BOTH
async def test_a_stream_that_outlasts_the_drain_ends_with_an_error(wire: str, tmp_path: Path) -> None:
    async def go(folder: Path) -> float:
        behaviour = fs.cut_after(5, fs.Stall(), gate=False)
        async with served(folder, behaviour, wire=wire, drain_timeout=1) as (proxy, a):
            came, look = when_text_comes()
            asked = asyncio.create_task(ask(proxy, on_data=look))
            await came.wait()
            took = await time_to_end(proxy, signal.SIGTERM)
            breaks_off("overloaded_error")(await asked)
            await a.cancelled(1)
        check_ledger(proxy, PART)
        assert took > 0.9
        return took

    await soon_enough(go, tmp_path, 4)


@pytest.mark.parametrize("mode", ["s", "n"])
async def test_a_request_not_answered_at_the_end_of_the_drain_gets_529(mode: str, tmp_path: Path) -> None:
    async with served(tmp_path, fs.stall(), drain_timeout=1) as (proxy, a):
        asked = asyncio.create_task(ask(proxy, stream=mode == "s"))
        await a.called(1)
        assert await end(proxy, signal.SIGTERM) == 0
        fails(529, "overloaded_error", retry_after=(1, 60))(await asked)
    check_ledger(proxy, "0")


async def test_a_draining_server_says_so_on_open_connections(tmp_path: Path) -> None:
    async with served(tmp_path, fs.gated_answer()) as (proxy, a), aiohttp.ClientSession() as session:
        async with session.get(f"{proxy.url}/health") as reply:
            assert reply.status == 200
        asked = asyncio.create_task(ask(proxy))
        await a.called(1)
        proxy.signal(signal.SIGTERM)
        await refuses_connections(proxy)
        async with session.get(f"{proxy.url}/health") as reply:
            assert reply.status == 503
        async with session.post(f"{proxy.url}/v1/messages", json=message_body()) as reply:
            assert (reply.status, reply.headers["retry-after"], a.count) == (529, "2", 1)
        a.open_gate()
        full()(await asked)
        assert await end(proxy) == 0


async def half_sent(proxy: Proxy, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection whose request waits for its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    writer.write(b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    return reader, writer


@pytest.mark.parametrize("is_whole", [True, False], ids=["in-time", "too-late"])
async def test_a_request_whose_body_still_arrives_gets_529(is_whole: bool, tmp_path: Path) -> None:
    body = json.dumps(message_body()).encode()
    async with served(tmp_path, fs.answer(), drain_timeout=1) as (proxy, a):
        reader, writer = await half_sent(proxy, body)
        writer.write(body[:10])
        proxy.signal(signal.SIGTERM)
        await refuses_connections(proxy)
        if is_whole:
            writer.write(body[10:])
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 529 ") and b"overloaded_error" in answer
        assert b"retry-after: 2\r\n" in answer
        writer.close()
        assert (await end(proxy), a.count) == (0, 0)


async def test_a_request_whose_hold_is_being_written_is_drained(tmp_path: Path) -> None:
    async with served(tmp_path, fs.answer()) as (proxy, _):
        with contextlib.closing(sqlite3.connect(proxy.books.path, isolation_level=None)) as other:
            body = json.dumps(message_body()).encode()
            reader, writer = await half_sent(proxy, body)
            other.execute("begin immediate")
            writer.write(body)
            for _ in range(3):  # once these are answered the body has been read
                async with aiohttp.ClientSession() as session, session.get(f"{proxy.url}/health") as reply:
                    assert reply.status == 200
            proxy.signal(signal.SIGTERM)
            await refuses_connections(proxy)
            other.execute("rollback")
            answer = await reader.read()  # on a slow machine the hold may have been given up meanwhile
            assert b"event: message_stop" in answer or answer.startswith(b"HTTP/1.1 529 ")
            writer.close()
        assert await end(proxy) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(number: signal.Signals, tmp_path: Path) -> None:
    async def go(folder: Path) -> float:
        async with served(folder, fs.stall()) as (proxy, a):
            asked = asyncio.create_task(ask(proxy))
            await a.called(1)
            proxy.signal(number)
            await refuses_connections(proxy)
            took = await time_to_end(proxy, number, 128 + number)
            assert (await asked).broken
        return took

    await soon_enough(go, tmp_path, 1)


async def test_a_closed_terminal_drains_too(tmp_path: Path) -> None:
    """The kernel and the shell may both tell of it, and who ends a session asks as well."""
    async with served(tmp_path, fs.gated_answer()) as (proxy, a):
        asked = asyncio.create_task(ask(proxy))
        await a.called(1)
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            proxy.signal(number)
            await refuses_connections(proxy)
        a.open_gate()
        full()(await asked)
        assert await end(proxy) == 0


async def test_under_nohup_it_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        async with served(tmp_path, fs.answer(), fs.answer()) as (proxy, _):
            proxy.signal(signal.SIGHUP)
            for _ in range(2):  # once the first is answered, it has heard the signal
                full()(await ask(proxy))
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_server_ends_quickly_and_well(number: signal.Signals, tmp_path: Path) -> None:
    async def go(folder: Path) -> float:
        async with served(folder, fs.answer()) as (proxy, _):
            full()(await ask(proxy))
            took = await time_to_end(proxy, number)
        assert b"Traceback" not in proxy.output
        assert not (folder / "ccmux.db-wal").exists()  # all of it is in the database itself
        check_ledger(proxy, "A")
        return took

    await soon_enough(go, tmp_path, 2)


# Death.


@pytest.mark.parametrize(
    ("behaviour", "answered"),
    [(fs.stall(), False), (fs.cut_after(5, fs.Stall(), gate=False), True)],
    ids=["before-the-upstream-answered", "after-content"],
)
@BOTH
async def test_after_a_crash_orphan_holds_become_interrupted_entries(
    behaviour: fs.Behaviour, answered: bool, wire: str, tmp_path: Path
) -> None:
    async with FaultServer(behaviour) as a:
        here = {"A": {"quirks": {"count_tokens": "local"}}}
        text = config_text({"A": a.url}, formats=wire, providers=here)
        async with as_process(tmp_path, text) as proxy:
            came, look = when_text_comes()
            asked = asyncio.create_task(ask(proxy, on_data=look))
            await a.called(1)
            if answered:
                await came.wait()
            tokens = (await ask(proxy, "/v1/messages/count_tokens")).json["input_tokens"]
            if answered:  # nobody waits for the floor's way to the disk
                await until(lambda: proxy.books.holds()[0]["floor_microusd"] > 0, "the floor is on disk")
            await end(proxy, signal.SIGKILL)
            assert (await asked).broken
            assert len(proxy.books.holds()) == 1
        async with as_process(tmp_path, None) as proxy:
            assert await end(proxy, signal.SIGTERM) == 0
    entries = [e for e in proxy.books.ledger() if e["kind"] == "interrupted"]
    assert len(entries) == 1
    floor = -entries[0]["amount_microusd"]
    if wire == "openai" or not answered:
        assert floor == (tokens if answered else 0)
    else:  # what is only forwarded is not counted: its floor goes by the request's size
        assert 0 < floor <= len(json.dumps(message_body()))
    assert proxy.books.holds() == []
    proxy.books.check_sums()


@pytest.mark.parametrize("mode", ["s", "n"])
async def test_who_saw_the_end_has_been_charged_once(mode: str, tmp_path: Path) -> None:
    """The server is killed the instant the client has the end of its answer."""
    async with FaultServer(fs.answer()) as a:
        text: str | None = config_text({"A": a.url})
        for number in range(1, 4):
            async with as_process(tmp_path, text) as proxy:
                assert proxy.process is not None
                kill = proxy.process.kill

                def look(reply: Reply, kill: Callable[[], None] = kill) -> None:
                    if b"message_stop" in reply.body or (mode == "n" and reply.body.endswith(b"}")):
                        with contextlib.suppress(ProcessLookupError):
                            kill()

                await ask(proxy, stream=mode == "s", on_data=look)
                await end(proxy)
            text = None
            charges = [e["amount_microusd"] for e in proxy.books.ledger()]
            assert charges == [-FULL["A"]] * number


# A full disk.


def may_write(proxy: Proxy, size: int) -> None:
    """How large the process's files may get: what a full disk looks like from inside."""
    assert proxy.process is not None
    resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def test_with_a_full_disk_no_upstream_is_called(tmp_path: Path) -> None:
    async with served(tmp_path, fs.answer()) as (proxy, a):
        full()(await ask(proxy))
        may_write(proxy, 0)
        fails(529, "overloaded_error")(await ask(proxy))
        assert a.count == 1
        may_write(proxy, resource.RLIM_INFINITY)
        full()(await ask(proxy))
        assert await end(proxy, signal.SIGTERM) == 0
    assert [e["amount_microusd"] for e in proxy.books.ledger()] == [-FULL["A"]] * 2
    assert proxy.books.holds() == []
    proxy.books.check_sums()


async def test_a_disk_that_is_full_from_the_start_is_told(tmp_path: Path) -> None:
    async with served(tmp_path, fs.answer()) as (proxy, a):
        may_write(proxy, 0)
        fails(529, "overloaded_error")(await ask(proxy))
        assert a.count == 0
        may_write(proxy, resource.RLIM_INFINITY)
        full()(await ask(proxy))


async def test_a_disk_that_is_full_at_the_end_is_told(tmp_path: Path) -> None:
    """What true usage has taught is lost then, and nothing else."""
    with contextlib.closing(ccmux.Store(str(tmp_path / "ccmux.db"))) as store:
        store.save_calibration([("A", "up-A", 1.5, 20)])
    async with served(tmp_path, fs.answer()) as (proxy, _):
        full()(await ask(proxy))
        await until(lambda: not proxy.books.holds(), "the hold was settled")
        may_write(proxy, 0)
        assert await end(proxy, signal.SIGTERM) == 0
    assert b"what true usage has taught is not written down" in proxy.output


async def test_a_client_that_leaves_while_its_hold_is_written_leaves_no_hold(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.answer(),)) as (proxy, (a,)):
        full()(await ask(proxy))
        await proxy.idle()
        with contextlib.closing(sqlite3.connect(proxy.books.path, isolation_level=None)) as other:
            other.execute("begin immediate")
            async with raw_client(proxy) as (reader, _):
                await until(lambda: proxy.state.store.queue.empty() and proxy.connections == 1, "it came")
                await asyncio.sleep(0.1)  # until the hold waits for the lock: nothing outside can tell
            await until(lambda: proxy.connections == 0, "ccmux saw it leave")
            other.execute("commit")
        assert await reader.read() == b""
        full()(await ask(proxy))
        await proxy.idle()
        assert a.count == 2
        proxy.books.check_sums()


@pytest.mark.parametrize("mode", ["s", "n"])
async def test_a_settlement_that_cannot_be_written_is_written_later(mode: str, tmp_path: Path) -> None:
    script = (fs.gated_answer(),) if mode == "s" else (fs.gated_whole(),)
    async with served(tmp_path, *script) as (proxy, a):
        asked = asyncio.create_task(ask(proxy, stream=mode == "s"))
        await a.called(1)
        await until(lambda: bool(proxy.books.holds()), "the hold is on disk")
        may_write(proxy, 0)
        a.open_gate()
        full()(await asked)
        may_write(proxy, resource.RLIM_INFINITY)
        await until(lambda: not proxy.books.holds(), "the settlement is on disk", 30)
        assert await end(proxy, signal.SIGTERM) == 0
    check_ledger(proxy, "A")


# Money under fire.

ENFORCED = {"credits": {"enforce": True}, "server": {"require_key": True}}


async def test_without_funds_nothing_goes_upstream(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.answer(),), **ENFORCED) as (proxy, (a,)):
        for credit in (0, 1000):
            key = proxy.add_user(f"poor{credit}", credit)
            for stream in (True, False):
                fails(402, "billing_error")(await ask(proxy, key=key, stream=stream))
        assert a.count == 0 and proxy.books.holds() == []
    check_ledger(proxy, "0")


async def test_funds_for_three_holds_let_three_of_twenty_through(tmp_path: Path) -> None:
    """A hold is the input and 1,000 output tokens at 2 micro-dollars: a little above 2,000."""
    async with stage(tmp_path, (fs.gated_answer(),), **ENFORCED) as (proxy, (a,)):
        key = proxy.add_user("anna", 6500)
        asked = [asyncio.create_task(ask(proxy, key=key)) for _ in range(20)]
        await a.called(3)
        await until(lambda: sum(task.done() for task in asked) == 17, "the others were refused")
        a.open_gate()
        replies = await asyncio.gather(*asked)
        await proxy.idle()
        assert sorted(reply.status for reply in replies) == [200] * 3 + [402] * 17
        assert a.count == 3
        assert [e["amount_microusd"] for e in proxy.books.ledger()] == [-FULL["A"]] * 3
        proxy.books.check_sums()


async def test_one_too_many_at_once_gets_429(tmp_path: Path) -> None:
    options = {"credits": {"enforce": True, "max_concurrent": 2}, "server": {"require_key": True}}
    async with stage(tmp_path, (fs.gated_answer(),), **options) as (proxy, (a,)):
        key = proxy.add_user("anna", 10**7)
        asked = [asyncio.create_task(ask(proxy, key=key)) for _ in range(2)]
        await a.called(2)
        fails(429, "rate_limit_error", retry_after=(1, 1))(await ask(proxy, key=key))
        a.open_gate()
        for reply in await asyncio.gather(*asked):
            full()(reply)
        full()(await ask(proxy, key=key))


async def test_more_than_was_held_is_charged_in_full(tmp_path: Path) -> None:
    usage = {"input_tokens": 100_000, "output_tokens": 50}
    async with stage(tmp_path, (fs.answer(usage=usage),), **ENFORCED) as (proxy, (a,)):
        key = proxy.add_user("anna", 3000)
        full()(await ask(proxy, key=key, stream=False))
        await proxy.idle()
        assert [e["amount_microusd"] for e in proxy.books.ledger()] == [-100_100]
        fails(402, "billing_error")(await ask(proxy, key=key))
        assert a.count == 1


@pytest.mark.parametrize("enforce", [True, False])
async def test_budget_headers_are_for_who_may_be_refused(enforce: bool, tmp_path: Path) -> None:
    """Claude Code takes a status of `rejected` at its word."""
    options = {"credits": {"enforce": enforce}, "server": {"require_key": True}}
    async with stage(tmp_path, (fs.answer(),), **options) as (proxy, _):
        key = proxy.add_user("anna", 10**6)
        assert not [name for name in (await ask(proxy, key=key)).headers if "unified" in name]
        proxy.state.store.set_budgets("anna", {"day_microusd": 2 * FULL["A"], "month_microusd": 10**6})
        seen = [await ask(proxy, key=key, stream=stream) for stream in (True, False, False)]
    told = [
        {
            n.removeprefix("anthropic-ratelimit-unified-"): v
            for n, v in reply.headers.items()
            if "unified" in n
        }
        for reply in seen
    ]
    tomorrow = str((int(time.time()) // 86400 + 1) * 86400)
    half = {"status": "allowed", "reset": tomorrow, "utilization": "0.5000"}
    assert [reply.status for reply in seen] == ([200, 429, 429] if enforce else [200] * 3)
    assert told == ([half, {}, {}] if enforce else [{}] * 3)


async def test_a_crowd_of_users_and_faults_balances(tmp_path: Path) -> None:
    """Every charge is in the ledger once, every hold is gone, and the sums are true."""
    options = {"credits": {"enforce": True, "max_concurrent": 100}, "server": {"require_key": True}}
    scripts = tuple(mixed_faults(0.3, 3)), tuple(mixed_faults(0.3, 4))
    async with stage(tmp_path, *scripts, **options) as (proxy, _):
        keys = [proxy.add_user(f"user{n}", 10**6) for n in range(4)]
        await asyncio.gather(*(ask_many(proxy, 15, key=key) for key in keys))
        await proxy.idle()
        rows = proxy.books.requests()
        charged = {e["request_id"]: -e["amount_microusd"] for e in proxy.books.ledger()}
        assert len(rows) == 60
        assert {r["request_id"]: r["charge_microusd"] for r in rows if r["charge_microusd"]} == {
            id: amount for id, amount in charged.items() if amount
        }
        assert proxy.books.holds() == []
        proxy.books.check_sums()


# A bad start: one line on stderr, status 2, no traceback.


async def start(folder: Path, *args: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "ccmux.py"), *args, cwd=folder, env={"HOME": str(folder), "PATH": "/bin"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode()


BAD_STARTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no-toml": ("[server\n", (), "TOML"),
    "unknown-key": ("[server]\nprot = 1\n", (), "port"),
    "database-is-text": ('[server]\ndatabase = "config.toml"\n', (), "config.toml"),
    "database-is-a-folder": ('[server]\ndatabase = "/"\n', (), "/"),
    "open-without-keys": ('[server]\nhost = "0.0.0.0"\n', (), "require_key"),
    "open-by-option": ("[server]\n", ("--host", "0.0.0.0"), "require_key"),
    "open-without-a-token": ('[server]\nhost = "::"\nrequire_key = true\n', (), "admin_token"),
    "no-such-file": ("", ("--config", "nowhere.toml"), "nowhere.toml"),
    "no-such-command": ("", ("sevre",), "sevre"),
}


@pytest.mark.parametrize("name", BAD_STARTS)
async def test_the_operators_mistakes_are_told_in_one_line(name: str, tmp_path: Path) -> None:
    text, args, says = BAD_STARTS[name]
    (tmp_path / "config.toml").write_text(text)
    status, said = await start(tmp_path, *args, *(() if name == "no-such-command" else ("--port", "0")))
    assert status == 2, said
    assert says in said and "Traceback" not in said
    assert len([line for line in said.splitlines() if line and not line.startswith("usage")]) == 1, said


async def test_a_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        status, said = await start(tmp_path, "--port", str(held.getsockname()[1]))
    assert status == 2 and "--port" in said and len(said.strip().splitlines()) == 1, said
    assert "in use)" in said and said.count("127.0.0.1") == 1


async def test_a_second_server_on_the_same_database_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, fs.answer()) as (proxy, _):
        assert proxy.process is not None
        status, said = await start(tmp_path, "--config", str(proxy.config_file), "--port", "0")
        assert status == 2 and str(proxy.process.pid) in said and len(said.strip().splitlines()) == 1, said
        full()(await ask(proxy))


async def test_a_changed_config_file_is_seen(tmp_path: Path) -> None:
    async def go(folder: Path) -> float:
        async with served(folder, fs.answer()) as (proxy, a), FaultServer(fs.answer()) as b:
            full("A")(await ask(proxy))
            took = []
            for text, told in (
                (config_text({"B": b.url}), b"config reloaded"),
                ("[server\n", b"config not reloaded"),
            ):
                began = time.monotonic()
                proxy.config_file.write_text(text)
                await until(lambda told=told: told in proxy.output, "the change was seen")
                took.append(time.monotonic() - began)
                full("B")(await ask(proxy))
            assert (a.count, b.count) == (1, 2)
        return max(took)

    await soon_enough(go, tmp_path, 3)
