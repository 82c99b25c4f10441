"""Prints durable holds and settlements a second, and what a lone pair costs.

    python tests/bench_store.py [--seconds 3] [--at-once 50] [--rows 0] [folder]

The database is a real file in `folder` (default: a temporary one); each pair is a hold that is waited for and a
settlement that is waited for, only the latter synced to the disk. --rows fills the request log first.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ccmux


def settled(id: str, user: str) -> ccmux.Settlement:
    usage = ccmux.Usage(input=1000, output=500)
    texts = dict.fromkeys(
        ("session", "agent", "asked", "route", "provider", "model", "error", "stop_reason"), "x"
    )
    return ccmux.Settlement(
        request_id=id, user=user, **texts, stream=True, status=200, attempts=1, usage=usage, cost=7, markup=0,
        charge=7, price=None, first_token_ms=5, duration_ms=9, trail=[],
    )  # fmt: skip


async def pairs(
    store: ccmux.Store, user: ccmux.User, at_once: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds that each hold and each pair took."""
    end = time.perf_counter() + seconds
    holds: list[float] = []
    whole: list[float] = []

    async def worker(number: int) -> None:
        count = 0
        while time.perf_counter() < end:
            count += 1
            id = f"{at_once}-{number}-{count}"
            began = time.perf_counter()
            await store.hold(user.id, id, 100, enforce=True, max_concurrent=10_000)
            holds.append(time.perf_counter() - began)
            await store.settle(settled(id, user.name))
            whole.append(time.perf_counter() - began)

    await asyncio.gather(*(worker(n) for n in range(at_once)))
    return holds, whole


def show(name: str, times: list[float]) -> None:
    ordered = sorted(times)
    middle, high = ordered[len(ordered) // 2] * 1000, ordered[int(len(ordered) * 0.99)] * 1000
    print(f"{name:32} p50 {middle:7.3f} ms   p99 {high:7.3f} ms")


async def run(folder: Path, args: argparse.Namespace) -> None:
    store = ccmux.Store(str(folder / "bench.db"))
    store.open_server()
    user, _ = store.add_user("bench", 10**15)
    for start in range(0, args.rows, 500):
        await asyncio.gather(*(store.settle(settled(f"old-{start + n}", "bench")) for n in range(500)))
    holds, whole = await pairs(store, user, 1, args.seconds)
    show("a lone hold", holds)
    show("a lone hold and settlement", whole)
    holds, whole = await pairs(store, user, args.at_once, args.seconds)
    show(f"a hold, {args.at_once} at once", holds)
    print(
        f"{len(whole) / args.seconds:,.0f} durable hold and settlement pairs a second, {args.at_once} at once"
    )
    print(f"sums: {store.sums_problem() or 'ok'}")
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--rows", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(run(args.folder or Path(temporary), args))


if __name__ == "__main__":
    main()
