"""Store: the ledger on real SQLite files, with sums that must never differ."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import errno
import io
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxy_harness import settlement, until

import ccmux

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)  # a Tuesday


class Clock:
    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@contextlib.asynccontextmanager
async def server_store(path: Path | str, **options: Any) -> AsyncIterator[ccmux.Store]:
    store = ccmux.Store(str(path), **options)
    store.open_server()
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[ccmux.Store]:
    """A server's, in the file a.db of the test's folder."""
    async with server_store(tmp_path / "a.db") as made:
        yield made


def ledger(path: Path) -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(r) for r in db.execute("select * from ledger order by id")]


async def place(
    store: ccmux.Store, user: ccmux.User, id: str, amount: int = 100, enforce: bool = True
) -> ccmux.Hold:
    return await store.hold(user.id, id, amount, enforce=enforce, max_concurrent=1000)


# Users and keys.


def test_a_sqlite_that_is_too_old_is_told() -> None:
    ccmux.check_sqlite((3, 37, 0))
    with pytest.raises(ccmux.ConfigError, match=r"SQLite 3\.34\.1, and ccmux needs 3\.37 or newer"):
        ccmux.check_sqlite((3, 34, 1))


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    store = ccmux.Store(str(tmp_path / "a.db"))
    user, key = store.add_user("ann", 5_000_000, {"day_microusd": 1}, "a friend")
    assert (user.balance, user.budgets["day_microusd"], user.note) == (5_000_000, 1, "a friend")
    found = store.authenticate(key)
    assert found is not None
    assert found.name == "ann"
    assert store.authenticate(key + "x") is None
    assert store.authenticate("\udcff") is None
    second = store.rotate_key("ann")
    assert store.authenticate(key) is None
    assert store.authenticate(second) is not None
    store.close()
    everything = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert key.encode() not in everything
    assert second.encode() not in everything


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ä", "a/b", "local"])
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    store = ccmux.Store(":memory:")
    with pytest.raises(ccmux.ConfigError, match="user name"):
        store.add_user(name)
    store.close()


def test_a_taken_or_unknown_name_is_an_error_that_names_the_nearest() -> None:
    store = ccmux.Store(":memory:")
    store.add_user("annette")
    with pytest.raises(ccmux.ConfigError, match="already"):
        store.add_user("annette")
    with pytest.raises(ccmux.ConfigError, match="did you mean 'annette'"):
        store.credit("anette", 5)
    store.close()


async def test_a_user_added_twice_at_once_is_added_once(store: ccmux.Store, tmp_path: Path) -> None:
    """A double click on the admin page: one key, one first credit."""
    clicks = [asyncio.to_thread(store.add_user, "ann", 700) for _ in range(4)]
    told = await asyncio.gather(*clicks, return_exceptions=True)
    assert sum(isinstance(t, ccmux.ConfigError) for t in told) == 3
    assert (store.known("ann").balance, len(ledger(tmp_path / "a.db"))) == (700, 1)


def test_a_credit_with_a_key_is_entered_once() -> None:
    store = ccmux.Store(":memory:")
    store.add_user("ann")
    for _ in range(3):
        assert store.credit("ann", 700, "gift", key="click-1").balance == 700
    assert store.credit("ann", -200, "back").balance == 500
    kinds = [(t["kind"], t["amount_microusd"], t["balance_microusd"]) for t in store.transactions("ann")]
    assert kinds == [("adjust", -200, 500), ("topup", 700, 700)]
    assert store.sums_problem() == ""
    store.close()


# Holds and settlements.


async def test_a_hold_then_a_settlement(store: ccmux.Store) -> None:
    user, _ = store.add_user("ann", 1000)
    await place(store, user, "r1", 300)
    assert (store.known("ann").held, store.known("ann").balance) == (300, 1000)
    await store.settle(settlement("r1", 250))
    assert (store.known("ann").held, store.known("ann").balance) == (0, 750)
    await store.settle(settlement("r1", 250))  # twice changes nothing
    assert store.known("ann").balance == 750
    assert len(store.requests("ann")) == 1
    assert store.sums_problem() == ""


@pytest.mark.parametrize(
    ("balance", "amount", "status"),
    [(300, 301, 402), (300, 300, 200), (0, 0, 402), (-5, 0, 402), (1, 0, 200)],
)
async def test_funds(store: ccmux.Store, balance: int, amount: int, status: int) -> None:
    user, _ = store.add_user("ann")
    store.credit("ann", balance)
    try:
        await place(store, user, "r1", amount)
        seen = 200
    except ccmux.ApiError as error:
        seen = error.status
        assert error.type == "billing_error"
        assert error.should_retry is False
        assert "credit" in error.message
    assert seen == status


async def test_too_many_at_once_comes_after_the_balance(store: ccmux.Store) -> None:
    user, _ = store.add_user("ann", 1000)
    await store.hold(user.id, "r1", 400, enforce=True, max_concurrent=1)
    with pytest.raises(ccmux.ApiError) as busy:
        await store.hold(user.id, "r2", 400, enforce=True, max_concurrent=1)
    assert (busy.value.status, busy.value.type, busy.value.retry_after) == (429, "rate_limit_error", 1)
    with pytest.raises(ccmux.ApiError) as poor:
        await store.hold(user.id, "r3", 700, enforce=True, max_concurrent=1)
    assert poor.value.status == 402


@pytest.mark.parametrize(
    ("budget", "spent_at", "asked_at", "refused", "reset_s"),
    [
        pytest.param("day", "2026-11-24T00:00", "2026-11-24T23:59", True, 60, id="same day"),
        pytest.param("day", "2026-11-23T23:59", "2026-11-24T00:00", False, 0, id="a new day"),
        pytest.param("week", "2026-11-23T00:00", "2026-11-29T23:00", True, 3600, id="Monday to Sunday"),
        pytest.param("week", "2026-11-22T23:59", "2026-11-23T00:00", False, 0, id="a new week"),
        pytest.param("month", "2026-11-01T00:00", "2026-11-30T23:00", True, 3600, id="same month"),
        pytest.param("month", "2026-12-31T23:59", "2027-01-01T00:00", False, 0, id="a new month and year"),
    ],
)
async def test_budgets(budget: str, spent_at: str, asked_at: str, refused: bool, reset_s: int) -> None:
    clock = Clock(datetime.fromisoformat(spent_at).replace(tzinfo=UTC))
    async with server_store(":memory:", now=clock) as store:
        user, _ = store.add_user("ann", 10_000, {f"{budget}_microusd": 100})
        await place(store, user, "r1", 50)
        await store.settle(settlement("r1", 100))
        clock.now = datetime.fromisoformat(asked_at).replace(tzinfo=UTC)
        if not refused:
            await place(store, user, "r2", 50)
            return
        with pytest.raises(ccmux.ApiError) as used_up:
            await place(store, user, "r2", 50)
        error = used_up.value
        assert (error.status, error.type, error.should_retry) == (429, "billing_error", False)
        assert error.retry_after == reset_s
        assert "resets at" in error.message


async def test_nothing_is_refused_without_enforcing(store: ccmux.Store) -> None:
    user, _ = store.add_user("ann", 0, {"day_microusd": 0})
    await place(store, user, "r1", 500, enforce=False)
    await store.settle(settlement("r1", 400))
    assert store.known("ann").balance == -400


async def test_five_hundred_debits_at_once(store: ccmux.Store) -> None:
    user, _ = store.add_user("ann", 500_000)

    async def one(number: int) -> bool:
        try:
            await place(store, user, f"r{number}", 1500)
        except ccmux.ApiError as error:
            assert error.status == 402
            return False
        await store.settle(settlement(f"r{number}", 1000))
        return True

    answered = sum(await asyncio.gather(*(one(n) for n in range(500))))
    assert 0 < answered <= 500
    after = store.known("ann")
    assert (after.balance, after.held) == (500_000 - 1000 * answered, 0)
    assert store.sums_problem() == ""


async def test_what_moves_money_is_synced_to_the_disk_and_a_hold_is_not(store: ccmux.Store) -> None:
    user, _ = store.add_user("ann", 1000)
    modes: list[int] = []

    def note(statement: str) -> None:
        if statement.startswith("COMMIT") or statement == "commit":
            modes.append(mode[0])
        elif statement.startswith("pragma synchronous"):
            mode[0] = {"normal": 1, "full": 2}[statement.rpartition(" ")[2]]

    mode = [store.db.execute("pragma synchronous").fetchone()[0]]
    store.db.set_trace_callback(note)
    hold = await store.hold(user.id, "r1", 100, enforce=True, max_concurrent=8)
    store.answered(hold, 5)
    await store.settle(settlement("r1"))
    store.credit("ann", 5)
    store.db.set_trace_callback(None)
    assert (modes[0], modes[-2:]) == (1, [2, 2])
    assert store.db.execute("pragma synchronous").fetchone()[0] == 2


async def test_a_refused_hold_does_not_undo_its_neighbours(store: ccmux.Store) -> None:
    rich, _ = store.add_user("rich", 10**6)
    poor, _ = store.add_user("poor", 0)
    jobs = [place(store, poor if n % 3 == 0 else rich, f"r{n}", 10) for n in range(30)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert [isinstance(r, ccmux.ApiError) for r in results] == [n % 3 == 0 for n in range(30)]
    assert store.known("rich").held == 200


WORKER = """
import asyncio, sys
sys.path.insert(0, {folder!r})
import ccmux
store = ccmux.Store({path!r})
for number in range(60):
    store.credit("ann", 1, "from " + sys.argv[1])
store.close()
"""


async def test_three_processes_on_one_database(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    folder = str(Path(ccmux.__file__).parent)
    async with server_store(path) as store:
        user, _ = store.add_user("ann", 10**6)
        script = WORKER.format(folder=folder, path=str(path))
        workers = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(n)) for n in range(2)
        ]
        for number in range(100):
            await place(store, user, f"r{number}", 10)
            await store.settle(settlement(f"r{number}", 7))
        assert [await w.wait() for w in workers] == [0, 0]
        assert store.known("ann").balance == 10**6 + 120 - 700
        assert store.sums_problem() == ""


# What must not be possible.


@pytest.mark.parametrize(
    "sql",
    [
        "update ledger set amount_microusd = 0",
        "delete from ledger",
        "update holds set amount_microusd = 1",
        "insert into ledger (time, user_id, kind, amount_microusd, balance_microusd, key) values ('', 1, 'gift', 1, 1, 'k')",
        "insert into users (name, created, balance_microusd) values ('x', '', 'much')",
    ],
)
async def test_the_schema_refuses(store: ccmux.Store, sql: str, tmp_path: Path) -> None:
    user, _ = store.add_user("ann", 100)
    await place(store, user, "r1", 10)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute(sql)


COLUMNS = {  # that others may read
    "users": "id, name, balance_microusd, held_microusd",
    "ledger": "id, user_id, amount_microusd",
    "holds": "id, user_id, amount_microusd",
    "requests": "time, request_id, user, session, agent, asked, route, provider, model, stream, status, error, attempts, "
    "input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens, estimated, "
    "cost_microusd, markup_microusd, charge_microusd, first_token_ms, duration_ms, stop_reason",
}


async def test_columns_that_others_read(tmp_path: Path) -> None:
    async with server_store(tmp_path / "a.db") as store:
        user, _ = store.add_user("ann", 1000)
        await place(store, user, "r1", 50)
        await store.settle(settlement("r1"))
        await place(store, user, "r2", 50)
        with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db:
            for table, columns in COLUMNS.items():
                rows = db.execute(f"select {columns} from {table}").fetchall()
                assert rows and None not in rows[0][:2]
    assert ", ".join(ccmux.USAGE_COLUMNS) == COLUMNS["requests"]


def test_sums_that_differ_are_told(tmp_path: Path) -> None:
    store = ccmux.Store(str(tmp_path / "a.db"))
    store.add_user("ann", 100)
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db:
        db.execute("update users set balance_microusd = 99, held_microusd = 5 where name = 'ann'")
        db.commit()
    store = ccmux.Store(str(tmp_path / "a.db"))
    assert "balance of user ann" in store.sums_problem()
    assert "held of user ann" in store.sums_problem()
    store.close()


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    store = ccmux.Store(str(tmp_path / "a.db"))
    store.open_server()
    store.add_user("ann")
    store.backup(str(tmp_path / "copy.db"))
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    store.close()
    copy = ccmux.Store(str(tmp_path / "copy.db"))
    assert copy.user("ann") is not None
    copy.close()


def test_a_second_server_is_refused_by_pid(tmp_path: Path) -> None:
    first = ccmux.Store(str(tmp_path / "a.db"))
    first.open_server()
    second = ccmux.Store(str(tmp_path / "a.db"))
    with pytest.raises(ccmux.ConfigError, match=f"pid {os.getpid()}"):
        second.open_server()
    second.close()
    first.close()
    third = ccmux.Store(str(tmp_path / "a.db"))
    third.open_server()
    third.close()


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a network folder whose server lacks them; the lock's file may still name a server of long ago."""
    import fcntl

    def fails(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "a.db.lock").write_text("12345")
    monkeypatch.setattr(fcntl, "flock", fails)
    store = ccmux.Store(str(tmp_path / "a.db"))
    with pytest.raises(ccmux.ConfigError, match=r"a\.db cannot be locked \(No locks available\)"):
        store.open_server()
    store.close()


def test_a_newer_or_foreign_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    ccmux.Store(str(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("pragma user_version = 99")
    with pytest.raises(ccmux.ConfigError, match="newer ccmux") as newer:
        ccmux.Store(str(path))
    (tmp_path / "b.db").write_bytes(b"this is no database at all" * 100)
    with pytest.raises(ccmux.ConfigError, match=r"b\.db") as foreign:
        ccmux.Store(str(tmp_path / "b.db"))
    ccmux.Store(str(tmp_path / "c.db")).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "c.db")) as db:
        db.executescript(
            "pragma writable_schema = on; update sqlite_schema set sql = replace(sql, '(time)', cast(x'e4' as text)) "
            "where name = 'requests_by_time'"
        )
    with pytest.raises(ccmux.ConfigError, match=r"c\.db"):
        ccmux.Store(str(tmp_path / "c.db"))
    assert newer.tb and foreign.tb  # they hold the stores that were not made, which hold no file
    opened = {Path(file.path).name for file in psutil.Process().open_files()}
    assert not opened & {"a.db", "b.db"}


# Disk full.


async def test_disk_full_refuses_holds_and_keeps_settlements(store: ccmux.Store) -> None:
    user, _ = store.add_user("ann", 10**9)
    await place(store, user, "r0", 10)
    pages = store.reader.execute("pragma page_count").fetchone()[0]
    store.do(lambda db: None)
    store.db.execute(f"pragma max_page_count = {pages + 3}")
    error: ccmux.ApiError | None = None
    for number in range(1, 3000):
        try:
            await place(store, user, f"r{number}", 10)
        except ccmux.ApiError as failed:
            error = failed
            break
    assert error is not None
    assert (error.status, error.cause) == (529, "store")
    kept = store.settle(settlement("r0", 5, trail=[["x" * 9000, "y"]]))
    await asyncio.wait([kept], timeout=0.2)
    assert not kept.done()
    store.db.execute("pragma max_page_count = 1000000")
    await asyncio.wait_for(kept, 30)
    assert [t["request_id"] for t in store.transactions("ann") if t["kind"] == "charge"] == ["r0"]
    assert store.sums_problem() == ""


# Reports and exports.


async def test_reports_and_exports_equal_the_ledger(tmp_path: Path) -> None:
    rand = random.Random(5)
    async with server_store(tmp_path / "a.db") as store:
        for name in ("ann", "ben"):
            store.add_user(name, 10**7)
        for number in range(60):
            name = rand.choice(["ann", "ben"])
            cost = None if number % 10 == 0 else rand.randrange(1000)
            more = {"model": rand.choice(["m1", "m2"]), "session": rand.choice(["s1", "s2"]), "cost": cost}
            await store.settle(settlement(f"r{number}", cost or 0, name, **more))
        charged = -sum(e["amount_microusd"] for e in ledger(tmp_path / "a.db") if e["kind"] == "charge")
        for by in ccmux.REPORT_KEYS:
            rows = store.report(by)
            assert sum(r["charge_microusd"] for r in rows) == charged
            assert sum(r["requests"] for r in rows) == 60
            assert sum(r["unpriced"] for r in rows) == 6
        exported = list(store.export())
        assert sum(r["charge_microusd"] for r in exported) == charged
        assert [r["request_id"] for r in exported] == [f"r{n}" for n in range(60)]
        assert tuple(exported[0]) == ccmux.USAGE_COLUMNS
        text = ccmux.csv_text(exported, ccmux.USAGE_COLUMNS)
        parsed = list(csv.DictReader(io.StringIO(text)))
        assert sum(int(r["charge_microusd"]) for r in parsed) == charged
        price = ccmux.Price(ccmux.Decimal(1), ccmux.Decimal(2))
        again = store.report(
            "model", as_if=lambda usage: ccmux.charge_of(usage, price, ccmux.Decimal(0)).charge
        )
        assert sum(r["as_if_microusd"] for r in again) == 60 * (10 + 3 + 2 * 5)


async def test_report_periods_and_users() -> None:
    clock = Clock()
    async with server_store(":memory:", now=clock) as store:
        store.add_user("ann", 10**6)
        for day in (1, 2, 3):
            clock.now = datetime(2026, 11, day, 8, tzinfo=UTC)
            await store.settle(settlement(f"r{day}", day))
        rows = store.report("day", "2026-11-02", "2026-11-03")
        assert [(r["key"], r["charge_microusd"]) for r in rows] == [("2026-11-02", 2)]
        assert [r["key"][-2:] for r in store.report("day")] == ["01", "02", "03"]  # not by what was charged
        await store.settle(settlement("r4", 9, model="dear"))
        assert [r["key"] for r in store.report("model")] == ["dear", "m"]
        assert store.report("day", user="nobody") == []
        with pytest.raises(ccmux.ConfigError, match="report by"):
            store.report("colour")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", '=HYPERLINK("http://x")'])
def test_no_cell_is_a_formula(text: str) -> None:
    parsed = next(csv.DictReader(io.StringIO(ccmux.csv_text([{"a": text, "n": -5}], ["a", "n"]))))
    assert parsed["a"] == f"'{text}"
    assert parsed["n"] == "-5"


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0.00"),
        (5_000_000, "$5.00"),
        (1_500_000, "$1.50"),
        (1, "$0.000001"),
        (-2_340_000, "-$2.34"),
        (10**12, "$1000000.00"),
    ],
)
def test_money_for_people(amount: int, text: str) -> None:
    assert ccmux.money(amount) == text


# Any sequence of operations keeps the sums.

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "settle", "settle twice", "credit", "answered", "crash"]),
        st.integers(0, 5),
        st.integers(-500, 2000),
    ),
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_sequence_keeps_the_sums(
    steps: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    asyncio.run(run_steps(steps, tmp_path_factory.mktemp("steps") / "a.db"))


async def run_steps(steps: list[tuple[str, int, int]], path: Path) -> None:
    store = ccmux.Store(str(path))
    store.open_server()
    user, _ = store.add_user("ann", 1000)
    holds: dict[int, ccmux.Hold] = {}
    expected, number = 1000, 0
    floors: dict[int, int] = {}
    try:
        for kind, at, amount in steps:
            number += 1
            if kind == "hold" and at not in holds:
                with contextlib.suppress(ccmux.ApiError):
                    holds[at] = await place(store, user, f"r{number}", abs(amount))
                    floors[at] = 0
            elif kind.startswith("settle") and at in holds:
                hold = holds.pop(at)
                for _ in range(2 if kind == "settle twice" else 1):
                    await store.settle(settlement(hold.request_id, abs(amount)))
                expected -= abs(amount)
            elif kind == "credit":
                store.credit("ann", amount)
                expected += amount
            elif kind == "answered" and at in holds:
                store.answered(holds[at], at)
                floors[at] = at
            elif kind == "crash":
                store.close()
                store = ccmux.Store(str(path))
                store.open_server()
                expected -= sum(floors[at] for at in holds)
                holds.clear()
        after = store.known("ann")
        assert after.balance == expected
        assert after.held == sum(h.amount for h in holds.values())
        assert store.sums_problem() == ""
    finally:
        store.close()


# kill -9 at random under load.

CRASHER = """
import asyncio, os, sys
sys.path.insert(0, {folder!r})
sys.path.insert(0, {tests!r})
import ccmux
from proxy_harness import settlement

async def one(store, user, number):
    id = f"{{sys.argv[1]}}-{{number}}"
    hold = await store.hold(user.id, id, 50, enforce=True, max_concurrent=1000)
    store.answered(hold, 3)
    await store.settle(settlement(id, 7))
    os.write(1, (id + "\\n").encode())

async def main():
    store = ccmux.Store({path!r})
    store.open_server()
    user = store.known("ann")
    number = 0
    while True:
        await asyncio.gather(*(one(store, user, number + n) for n in range(20)))
        number += 20

asyncio.run(main())
"""


def answered_before_death(path: Path, round: int, lines: int) -> Iterator[str]:
    """Runs a child under load, kills it after so many answers; yields the ids it had told as settled."""
    folder, tests = str(Path(ccmux.__file__).parent), str(Path(__file__).parent)
    script = CRASHER.format(folder=folder, tests=tests, path=str(path))
    child = subprocess.Popen([sys.executable, "-c", script, str(round)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(lines):
        yield child.stdout.readline().decode().strip()
    child.kill()
    yield from (line.decode().strip() for line in child.stdout if line.endswith(b"\n"))
    child.wait()
    child.stdout.close()


def test_kill_9_at_random_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    store = ccmux.Store(str(path))
    store.add_user("ann", 10**9)
    store.close()
    rand = random.Random()
    told: list[str] = []
    for round in range(20):
        told += answered_before_death(path, round, rand.randrange(1, 60))
    store = ccmux.Store(str(path))
    store.open_server()
    entries = ledger(path)
    charges = [e["request_id"] for e in entries if e["kind"] == "charge"]
    interrupted = [e for e in entries if e["kind"] == "interrupted"]
    assert len(charges) == len(set(charges))
    assert set(told) <= set(charges)
    assert not set(charges) & {e["request_id"] for e in interrupted}
    assert {e["amount_microusd"] for e in interrupted} <= {0, -3}
    after = store.known("ann")
    assert after.held == 0
    assert after.balance == 10**9 - 7 * len(charges) + sum(e["amount_microusd"] for e in interrupted)
    assert store.sums_problem() == ""
    assert sum(r["charge_microusd"] for r in store.export()) == 10**9 - after.balance
    store.close()


# Beside other processes, odd values, a slow disk and a full one.


def test_many_processes_may_make_the_database_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    script = (
        f"import os, sys; sys.path.insert(0, {str(Path(ccmux.__file__).parent)!r}); import ccmux\n"
        "print(flush=True)\nsys.stdin.readline()\n"
        f"ccmux.Store({str(path)!r}).close()"
    )
    command = [sys.executable, "-c", script]
    makers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for maker in makers:
        assert maker.stdout is not None
        maker.stdout.readline()  # it has imported all and waits
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write(b"\n")
        maker.stdin.flush()
    problems = [maker.communicate()[1].decode() for maker in makers]
    assert [(m.returncode, p) for m, p in zip(makers, problems, strict=True)] == [(0, "")] * 4


@pytest.mark.parametrize("more", ["", "create index requests_by_session on requests (session)"])
def test_a_database_of_the_first_schema_keeps_its_rows(
    more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "a.db")
    with monkeypatch.context() as patch:
        patch.setattr(ccmux, "MIGRATIONS", ccmux.MIGRATIONS[:1])
        old = ccmux.Store(path)
        old.add_user("ann", 700)
        old.db.execute(more)
        old.close()
    new = ccmux.Store(path)
    assert new.known("ann").balance == 700
    assert new.db.execute("pragma user_version").fetchone()[0] == len(ccmux.MIGRATIONS)
    new.close()


@pytest.mark.parametrize("charges", [(0, 50), (50, 0), (50, 70)])
async def test_a_second_settlement_with_another_charge_changes_nothing(
    store: ccmux.Store, charges: tuple[int, int]
) -> None:
    store.add_user("ann", 1000)
    for charge in charges:
        await store.settle(settlement("r1", charge))
    assert store.known("ann").balance == 1000 - charges[0]
    assert store.report("user")[0]["charge_microusd"] == charges[0]


@pytest.mark.parametrize("odd", [{"a": 1}, ["x"], 5, None, True, "\ud800"], ids=repr)
async def test_an_odd_stop_reason_does_not_keep_a_settlement_from_the_ledger(
    store: ccmux.Store, odd: Any
) -> None:
    user, _ = store.add_user("ann", 1000)
    await place(store, user, "r1")
    await asyncio.wait_for(store.settle(settlement("r1", 50, stop_reason=odd)), 30)
    assert (store.known("ann").balance, store.known("ann").held) == (950, 0)
    assert [r["charge_microusd"] for r in store.requests("ann")] == [50]


async def test_the_live_row_of_a_request_is_the_one_that_is_read_later(store: ccmux.Store) -> None:
    store.add_user("ann", 1000)
    done = settlement("r1", usage=ccmux.Usage(1, 2, estimated=True))
    await store.settle(done)
    (read,) = store.requests("ann")
    live = {**ccmux.settlement_row(done), "id": read["id"], "price": done.price, "trail": done.trail}
    assert ccmux.compact(dict(sorted(live.items()))) == ccmux.compact(dict(sorted(read.items())))


def test_half_a_surrogate_pair_is_written_out(tmp_path: Path) -> None:
    """As in a note typed at a terminal of another encoding, and in a model's name out of JSON."""
    with contextlib.closing(ccmux.Store(str(tmp_path / "a.db"))) as store:
        assert store.add_user("ann", note="caf\udce9")[0].note == "caf\\udce9"
        store.credit("ann", 5, "caf\udce9")
        assert store.transactions("ann")[0]["note"] == "caf\\udce9"
        with pytest.raises(ccmux.ConfigError, match="no user"):
            store.credit("ann\udce9", 5)
        assert store.report("user", user="ann\udce9") == []
        store.save_calibration([("p", "m\ud800", 1.5, 3)])
        assert store.load_calibration() == [("p", "m\\ud800", 1.5, 3)]
        store.save_calibration([("p", "n", 1.5, 3)])  # what is no longer known goes
        assert store.load_calibration() == [("p", "n", 1.5, 3)]


async def test_what_can_never_be_written_is_told_and_holds_up_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with server_store(":memory:") as store:
        store.add_user("ann", 1000)
        broken = store.settle(settlement("r1", 50, duration_ms=None))
        good = store.settle(settlement("r2", 50))
        with pytest.raises(sqlite3.IntegrityError):
            await asyncio.wait_for(broken, 30)
        await asyncio.wait_for(good, 30)
    assert "a settlement cannot be written" in caplog.text


def test_replacing_a_ledger_row_is_refused(tmp_path: Path) -> None:
    store = ccmux.Store(str(tmp_path / "a.db"))
    store.add_user("ann", 100)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        store.db.execute("insert or replace into ledger select * from ledger")
    assert store.sums_problem() == ""
    store.close()


def test_a_link_to_the_database_does_not_get_past_the_lock(tmp_path: Path) -> None:
    first = ccmux.Store(str(tmp_path / "a.db"))
    first.open_server()
    (tmp_path / "link.db").symlink_to(tmp_path / "a.db")
    second = ccmux.Store(str(tmp_path / "link.db"))
    with pytest.raises(ccmux.ConfigError, match="in use"):
        second.open_server()
    second.close()
    first.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
async def test_a_write_that_fails_at_the_disk_is_made_good(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.db"
    async with server_store(path) as store:
        user, _ = store.add_user("ann", 1000)
        await place(store, user, "r0", 10)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(f"{path}-wal"), hard))
            with pytest.raises(ccmux.ApiError, match="ledger"):
                await place(store, user, "r1", 10)
            kept = [store.settle(settlement("r0", 5))]
            kept += [store.settle(settlement(f"late{n}", 5)) for n in range(20)]
            await asyncio.wait(kept, timeout=0.1)
            assert not any(one.done() for one in kept)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        await asyncio.wait_for(asyncio.gather(*kept), 30)
        assert (store.known("ann").balance, store.known("ann").held) == (1000 - 21 * 5, 0)
        assert store.sums_problem() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_backup_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    import resource

    with contextlib.closing(ccmux.Store(str(tmp_path / "a.db"))) as store:
        store.add_user("ann", 1000)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = sorted(os.listdir(tmp_path))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / "a.db") // 2, hard))
            with pytest.raises(ccmux.ConfigError, match="could not be written"):
                store.backup(str(tmp_path / "copy.db"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(os.listdir(tmp_path)) == before
        store.backup(str(tmp_path / "copy.db"))


async def test_a_server_tells_of_sums_that_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ccmux.Store(str(tmp_path / "a.db"))
    store.add_user("ann", 100)
    store.db.execute("update users set balance_microusd = 99")
    store.open_server()
    await until(lambda: "balance of user ann differs" in caplog.text, "it is told")
    store.close()


async def test_a_server_looks_at_the_sums_every_hour(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ccmux.SUMS_EVERY == 3600
    monkeypatch.setattr(ccmux, "SUMS_EVERY", 0.05)
    async with server_store(tmp_path / "a.db") as store:
        store.add_user("ann", 100)
        store.do(lambda db: db.execute("update users set balance_microusd = 99"))
        await until(lambda: "balance of user ann differs" in caplog.text, "it is told")


@pytest.mark.parametrize(
    "sql",
    [
        "update spent set microusd = microusd + 1",
        "delete from spent",
        "insert into spent values (1, '2020-01-01', 5)",
    ],
)
async def test_day_sums_that_differ_are_told(store: ccmux.Store, sql: str) -> None:
    store.add_user("ann", 100)
    await store.settle(settlement("r1", 5))
    assert store.sums_problem() == ""
    store.do(lambda db: db.execute(sql))
    assert store.sums_problem() == "spent of user ann differs from its rows"


async def test_a_report_in_a_thread_has_a_connection_of_its_own(store: ccmux.Store) -> None:
    store.add_user("ann", 100)
    await store.settle(settlement("r1", 5))
    theirs = await asyncio.to_thread(lambda: (store.reader, store.report("user")))
    assert theirs[0] is not store.reader
    assert theirs[1] == store.report("user")


async def test_a_request_waits_for_no_thread_where_it_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccmux, "SLOW_DISK", 60.0)  # whatever else this machine does
    async with server_store(tmp_path / "a.db") as store:
        user, _ = store.add_user("ann", 10_000)
        writers = note_writers(store)
        hold = await place(store, user, "r1", 100)
        store.answered(hold, 5)
        assert store.settle(settlement("r1", 40)).done()
        here = threading.current_thread()
        with pytest.raises(ccmux.ApiError, match="credits used up"):
            await place(store, user, "r2", 10_000)
        assert store.settle(settlement("r2", 0)).done()
        assert writers == [(here, False), (here, False), (here, True), (here, False), (here, True)]
        assert (store.known("ann").balance, store.known("ann").held) == (10_000 - 40, 0)
        assert store.sums_problem() == ""


@pytest.mark.parametrize("why", ["another is open", "somebody is writing", "the disk was slow"])
async def test_a_settlement_goes_to_the_writer_where_others_would_wait(store: ccmux.Store, why: str) -> None:
    user, _ = store.add_user("ann", 10_000)
    await place(store, user, "r1", 100)
    if why == "another is open":
        await place(store, user, "r2", 100)
    elif why == "the disk was slow":
        store.slow_until = time.monotonic() + 60
    else:
        store.writing.acquire()
    writers = note_writers(store)
    settled = store.settle(settlement("r1", 40))
    if why == "somebody is writing":
        assert not settled.done()
        store.writing.release()
    await asyncio.wait_for(settled, 30)
    assert writers == [(store.thread, True)]
    assert store.known("ann").balance == 10_000 - 40


async def test_a_settlement_is_entered_at_the_time_it_was_made(tmp_path: Path) -> None:
    clock = Clock()
    async with server_store(tmp_path / "a.db", now=clock) as store:
        store.add_user("ann", 1000)
        store.writing.acquire()
        settled = store.settle(settlement("r1", 40))
        clock.now += timedelta(days=1)
        store.writing.release()
        await asyncio.wait_for(settled, 30)
        assert store.requests("ann")[0]["time"] == store.transactions("ann")[0]["time"] == ccmux.iso(NOON)


async def test_who_is_to_hear_of_a_settlement_hears_once_it_is_written(store: ccmux.Store) -> None:
    """Also where its request waits no longer, whose task takes the future with it."""
    store.add_user("ann", 0)
    heard: list[int] = []

    def hear() -> None:
        heard.append(len(store.requests("ann")))

    store.writing.acquire()
    store.settle(settlement("r1", 7), hear).cancel()
    assert heard == []
    store.writing.release()
    await until(lambda: heard == [1], "the writer has written it")
    store.settle(settlement("r2", 7), hear)
    assert heard == [1, 2]  # at once
    with pytest.raises(OverflowError):
        await asyncio.wait_for(store.settle(settlement("r3", 2**70), hear), 30)
    assert heard == [1, 2]


async def test_a_settlement_that_sqlite_cannot_hold_is_told(
    store: ccmux.Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.add_user("ann", 0)
    with pytest.raises(OverflowError):
        await asyncio.wait_for(store.settle(settlement("r1", 2**70)), 30)
    assert "cannot be written" in caplog.text
    await asyncio.wait_for(store.settle(settlement("r2", 1)), 30)


async def test_a_hold_that_sqlite_cannot_hold_is_refused(store: ccmux.Store) -> None:
    user, _ = store.add_user("ann", 10_000)
    with pytest.raises(ccmux.ApiError, match="ledger"):
        await place(store, user, "r1", 2**70, enforce=False)
    assert store.settle(settlement("r1", 0)).done()
    assert store.open_holds == 0


async def test_a_hold_given_up_on_its_way_is_not_placed_after_its_settlement(
    store: ccmux.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, _ = store.add_user("ann", 10_000)
    take, may_go = store.take_waiting, threading.Event()

    def take_late(first: ccmux.Write | None) -> tuple[list[ccmux.Write], bool]:
        may_go.wait(10)
        return take(first)

    monkeypatch.setattr(store, "take_waiting", take_late)
    store.slow_until = time.monotonic() + 60  # the hold goes to the writer
    placed = asyncio.create_task(place(store, user, "r1", 100))
    await asyncio.sleep(0)
    placed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await placed
    store.slow_until = 0.0  # the settlement does not
    assert store.settle(settlement("r1", 0)).done()
    may_go.set()
    store.do(lambda db: None)
    assert store.known("ann").held == 0
    assert store.sums_problem() == ""


@pytest.mark.parametrize("why", ["somebody is writing", "many write", "the disk was slow"])
async def test_a_hold_goes_to_the_writer_where_it_might_wait(store: ccmux.Store, why: str) -> None:
    user, _ = store.add_user("ann", 10_000)
    writers = note_writers(store)
    if why == "many write":
        store.open_holds = ccmux.SIBLINGS
    elif why == "the disk was slow":
        store.slow_until = time.monotonic() + 60
    else:
        store.writing.acquire()
    placed = asyncio.create_task(place(store, user, "r1", 100))
    await asyncio.sleep(0)
    if why == "somebody is writing":
        assert not placed.done()
        store.writing.release()
    await asyncio.wait_for(placed, 30)
    assert writers == [(store.thread, False)]


async def test_a_write_that_took_long_sends_the_next_ones_to_the_writer(
    store: ccmux.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, _ = store.add_user("ann", 10_000)
    monkeypatch.setattr(ccmux, "SLOW_DISK", -1.0)
    writers = note_writers(store)
    await place(store, user, "r1", 100)
    await place(store, user, "r2", 100)
    assert writers == [(threading.current_thread(), False), (store.thread, False)]


async def test_a_disk_that_stays_slow_is_tried_less_and_less(tmp_path: Path) -> None:
    async with server_store(tmp_path / "a.db") as store:
        paces = []
        for seconds in [1.0] * 8 + [0.0, 1.0]:
            store.note_pace(seconds)
            paces.append(store.slow_for)
            assert store.slow_until <= time.monotonic() + 60
    assert paces == [1, 2, 4, 8, 16, 32, 60, 60, 0, 1]


@pytest.mark.parametrize(
    ("code", "seconds", "tries"),
    [
        (sqlite3.SQLITE_BUSY, 10.0, 3),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, 10.0, 3),  # another process has committed in the same moment
        (sqlite3.SQLITE_BUSY_RECOVERY, 10.0, 3),
        (sqlite3.SQLITE_BUSY, 0.0, 1),
        (sqlite3.SQLITE_FULL, 10.0, 1),
    ],
)
def test_only_for_another_process_is_waited(code: int, seconds: float, tries: int) -> None:
    tried = 0

    def run() -> None:
        nonlocal tried
        tried += 1
        if tried < 3:
            error = sqlite3.OperationalError("no")
            error.sqlite_errorcode = code
            raise error

    with pytest.raises(sqlite3.OperationalError) if tries < 3 else contextlib.nullcontext():
        ccmux.patiently(run, seconds)
    assert tried == tries


async def test_a_write_that_comes_after_the_last_one_ends(store: ccmux.Store) -> None:
    """In a thread that waits for ever the server would never exit."""
    assert store.thread
    store.queue.put(None)
    store.thread.join()
    told: list[sqlite3.Error] = []

    def write() -> None:
        try:
            store.do(lambda db: None)
        except sqlite3.Error as error:
            told.append(error)

    late = threading.Thread(target=write, daemon=True)
    late.start()
    late.join(10)
    assert told


async def test_another_process_that_writes_holds_up_no_loop(store: ccmux.Store, tmp_path: Path) -> None:
    user, _ = store.add_user("ann", 10_000)
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("begin immediate")
    began = time.monotonic()
    placed = asyncio.create_task(place(store, user, "r1", 100))
    await asyncio.sleep(0)
    assert time.monotonic() - began < ccmux.BUSY / 2  # it did not wait for the lock
    await asyncio.wait([placed], timeout=0.2)
    assert not placed.done()
    other.execute("commit")
    await asyncio.wait_for(placed, 30)
    other.close()


async def test_a_command_that_ends_beside_a_long_report_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To empty the write-ahead log SQLite waits for whoever reads, and lets nobody write meanwhile."""
    monkeypatch.setattr(ccmux, "BUSY", 60.0)
    async with server_store(tmp_path / "a.db") as store:
        user, _ = store.add_user("ann", 10_000)
        with contextlib.closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as report:
            report.execute("begin")
            report.execute("select * from users").fetchall()
            await place(store, user, "r1", 100)
            ending = threading.Thread(target=ccmux.Store(str(tmp_path / "a.db")).close)
            ending.start()
            await asyncio.to_thread(ending.join, 20)
            assert not ending.is_alive()
            await place(store, user, "r2", 100)
    assert not (tmp_path / "a.db-wal").exists()


async def test_what_a_server_wrote_is_in_its_file_when_it_has_ended(tmp_path: Path) -> None:
    """Though a browser has the file open, which keeps SQLite from doing so by itself."""
    address = f"{(tmp_path / 'a.db').as_uri()}?mode=ro"
    async with server_store(tmp_path / "a.db") as store:
        store.add_user("ann", 10_000)
        browser = sqlite3.connect(address, uri=True)
        browser.execute("select * from users").fetchall()
    shutil.copy(tmp_path / "a.db", tmp_path / "copy.db")
    browser.close()
    with contextlib.closing(ccmux.Store(str(tmp_path / "copy.db"))) as copy:
        assert [user.name for user in copy.users()] == ["ann"]


async def test_for_a_process_that_keeps_the_database_many_wait_no_longer_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccmux, "BUSY", 0.5)
    async with server_store(tmp_path / "a.db") as store:
        user, _ = store.add_user("ann", 10_000)
        other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        other.execute("begin immediate")
        began = time.monotonic()
        told = await asyncio.gather(
            *(place(store, user, f"r{n}", 1) for n in range(40)), return_exceptions=True
        )
        assert [t.status for t in told if isinstance(t, ccmux.ApiError)] == [529] * 40
        assert time.monotonic() - began < 10  # in turn it would be 20
        other.close()
        await place(store, user, "r", 1)


def test_a_new_file_that_another_process_has_just_now_is_opened(tmp_path: Path) -> None:
    """SQLite's own patience does not cover the switch to write-ahead logging."""
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")
    threading.Timer(0.3, other.execute, ["commit"]).start()
    with contextlib.closing(ccmux.Store(str(tmp_path / "a.db"))) as store:
        assert store.users() == []
    other.close()


def note_writers(store: ccmux.Store) -> list[tuple[threading.Thread | None, bool]]:
    """The threads that begin transactions from now on, in order, and whether those are synced."""
    writers: list[tuple[threading.Thread | None, bool]] = []
    synced = [True]

    def note(statement: str) -> None:
        if statement.startswith("pragma synchronous"):
            synced[0] = statement.endswith("full")
        if statement.startswith("begin"):
            writers.append((threading.current_thread(), synced[0]))

    store.db.set_trace_callback(note)
    return writers


@pytest.mark.parametrize("where", ["on the event loop", "by the writer"])
async def test_the_write_ahead_log_is_copied_back_by_the_writer(
    store: ccmux.Store, where: str, tmp_path: Path
) -> None:
    store.add_user("ann", 0)
    if where == "by the writer":
        store.slow_until = time.monotonic() + 600
    copiers: list[threading.Thread] = []

    def note(statement: str) -> None:
        if statement.startswith("pragma wal_checkpoint"):
            copiers.append(threading.current_thread())

    store.db.set_trace_callback(note)
    many = ccmux.CHECKPOINT_EVERY * 3
    largest = 0
    for number in range(many):
        await store.settle(settlement(f"r{number}", 1))
        largest = max(largest, os.path.getsize(tmp_path / "a.db-wal"))
    store.do(lambda db: None)  # the writer has done what it was woken for
    pages = largest / 4096
    assert pages < ccmux.CHECKPOINT_EVERY * 2 * 14
    assert len(copiers) in (2, 3)
    assert set(copiers) == {store.thread}
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as db:
        assert db.execute("select count(*) from requests").fetchone()[0] == many


async def test_a_hold_of_an_older_ccmux_outlives_the_new_schema(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as db:
        for script in ccmux.MIGRATIONS[:2]:
            db.executescript(script)
        db.execute("pragma user_version = 2")
        db.execute("insert into users (name, created) values ('ann', '2026-11-24T00:00:00.000Z')")
        db.execute(
            "insert into holds (user_id, amount_microusd, floor_microusd, request_id, time) "
            "values (1, 500, 20, 'r1', '2026-11-24T00:00:00.000Z')"
        )
    async with server_store(tmp_path / "a.db") as store:
        assert store.sums_problem() == ""
        assert [(t["kind"], t["amount_microusd"]) for t in store.transactions("ann")] == [
            ("interrupted", -20)
        ]
        user = store.known("ann")
        assert (user.balance, user.held) == (-20, 0)
        await place(store, user, "r2", 30, enforce=False)
        assert store.known("ann").held == 30
        with pytest.raises(sqlite3.IntegrityError, match="keeps its amount"):
            store.db.execute("update holds set amount_microusd = 1")


async def test_a_checkpoint_that_fails_does_not_end_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ccmux, "CHECKPOINT_EVERY", 1)
    async with server_store(tmp_path / "a.db") as store:
        store.add_user("ann", 0)
        refuse = lambda action, name, *_: (  # noqa: E731
            sqlite3.SQLITE_DENY
            if (action, name) == (sqlite3.SQLITE_PRAGMA, "wal_checkpoint")
            else sqlite3.SQLITE_OK
        )
        store.db.set_authorizer(refuse)
        for number in range(3):
            await asyncio.wait_for(store.settle(settlement(f"r{number}", 1)), 30)
        await until(lambda: "could not be copied back" in caplog.text, "the writer has tried")
        store.db.set_authorizer(None)
        assert store.thread is not None
        assert store.thread.is_alive()


async def test_a_note_that_comes_after_the_end_is_nobodys_trouble(tmp_path: Path) -> None:
    async with server_store(tmp_path / "a.db") as store:
        user, _ = store.add_user("ann", 10_000)
        hold = await place(store, user, "r1", 100)
    store.answered(hold, 5)
    assert not store.writing.locked()


def test_a_report_on_some_days_reads_only_their_rows(tmp_path: Path) -> None:
    with contextlib.closing(ccmux.Store(str(tmp_path / "a.db"))) as store:
        where, values = ccmux.within("2026-11-24", "2026-11-25", "ann")
        plan = store.reader.execute(
            f"explain query plan select * from requests where {where}", values
        ).fetchall()
        assert "requests_by_time" in plan[0]["detail"] or "requests_by_user" in plan[0]["detail"]
        where, values = ccmux.within("2026-11-24", "")
        plan = store.reader.execute(
            f"explain query plan select * from requests where {where}", values
        ).fetchall()
        assert "requests_by_time" in plan[0]["detail"]
        assert ccmux.within("", "") == ("true", [])
