"""Measures token counting: its error against recorded counts, and its time.

usage: python tests/bench_tokens.py [VECTORS.json]     or CCMUX_TOKEN_VECTORS=VECTORS.json

The vectors are a list of {id, api, model, body, prompt_tokens | input_tokens | input_tokens_by_model, image}.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import struct
import sys
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vocabulary as files

from ccmux import Json, TokenCounter, Vocabulary, remote_encoding

SESSIONS = 100  # simulated, each from a seed of its own: one alone may be off by a percent either way


def main(arguments: list[str]) -> int:
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(files.filled(files.cache_dir())))
    path = arguments[0] if arguments else os.environ.get("CCMUX_TOKEN_VECTORS", "")
    if path:
        vocabulary = Vocabulary()
        print(f"Claude is counted with the vocabulary {vocabulary.load('claude-4.5').name}")
        measure_errors(json.loads(Path(path).read_text("utf-8")), vocabulary)
    else:
        print("no vectors file given: only times")
    asyncio.run(measure_times())
    return 0


def measure_errors(vectors: list[Json], vocabulary: Vocabulary) -> None:
    chat = [v for v in vectors if v["api"] == "openai-chat" and "body" in v]
    counted = [count(vocabulary, v["body"], chat_model(v)) for v in chat]
    show("OpenAI chat", [(v["id"], c, v["prompt_tokens"]) for v, c in zip(chat, counted, strict=True)])
    for model in ("claude-opus-4-5", "claude-opus-4-7", "claude-opus-5"):
        recorded = [(v, v["input_tokens_by_model"][model]) for v in vectors if "input_tokens_by_model" in v]
        show(model, [(v["id"], count(vocabulary, v["body"], model), true) for v, true in recorded])
        show_sessions(f"{model}, 20 turns calibrated", vocabulary, recorded, model)
    others = [v for v in vectors if v["api"] != "openai-chat" and "input_tokens" in v]
    for vector in others:
        body = vector.get("body") or image_request(*vector["image"])
        print(
            f"{vector['id']}: {count(vocabulary, body, 'claude-sonnet-4-5')}, true {vector['input_tokens']}"
        )


def chat_model(vector: Json) -> str:
    """A model of the encoding that the vector was recorded with."""
    if vector.get("encoding") == "cl100k_base":
        return "gpt-3.5-turbo"
    return str(vector["model"])


def count(vocabulary: Vocabulary, body: Json, model: str) -> int:
    return TokenCounter(vocabulary.load).count_now(body, "bench", model)


def show_sessions(title: str, vocabulary: Vocabulary, recorded: list[tuple[Json, int]], model: str) -> None:
    counter = TokenCounter(vocabulary.load)  # one, for its cache: each session has a provider of its own
    errors = sorted(session_error(counter, recorded, model, seed) for seed in range(SESSIONS))
    print(
        f"{title}: {SESSIONS} sessions, mean error {statistics.mean(errors):.2%}, "
        f"p95 {errors[SESSIONS * 95 // 100]:.2%}, largest {errors[-1]:.2%}"
    )


def session_error(counter: TokenCounter, recorded: list[tuple[Json, int]], model: str, seed: int) -> float:
    """The mean error from the 21st turn on of a session that a growing mix of the texts is sent in."""
    drawn, errors = random.Random(seed), []
    messages: list[Json] = []
    total = 0
    for turn in range(60):
        vector, true = drawn.choice(recorded)
        messages, total = [*messages, *vector["body"]["messages"]], total + true
        if len(messages) > 8:
            messages, total = vector["body"]["messages"], true
        tokens = counter.count_now({"messages": messages}, str(seed), model)
        if turn >= 20:
            errors.append(abs(tokens - total) / total)
        counter.observe(str(seed), model, tokens, total)
    return statistics.mean(errors)


def show(title: str, rows: Iterable[tuple[str, int, int]]) -> None:
    rows = list(rows)
    errors = sorted((abs(tokens - true) / true, name, tokens, true) for name, tokens, true in rows)
    exact = sum(tokens == true for _, tokens, true in rows)
    p95 = errors[min(len(errors) - 1, round(0.95 * len(errors)))]
    mean = statistics.mean(error[0] for error in errors)
    print(
        f"{title}: {exact} of {len(rows)} exact, mean error {mean:.2%}, p95 {p95[0]:.2%}, "
        f"largest {errors[-1][0]:.2%} ({errors[-1][1]}: {errors[-1][2]}, true {errors[-1][3]})"
    )


def image_request(width: int, height: int) -> Json:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)
    source = {"type": "base64", "media_type": "image/png", "data": b64encode(header).decode()}
    return {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}


def conversation(size: int, seed: int = 0) -> Json:
    """A Claude Code request of about `size` characters: tools, system prompt, turns of calls and results."""
    drawn = random.Random(seed)
    words = ("return", "def", "value", "request", "for", "stream", "the", "not", "found", "0x1f", "()", "=")

    def text(length: int) -> str:
        return "".join(drawn.choice(words) + drawn.choice(" \n \t") for _ in range(length // 6))

    schema = {"type": "object", "properties": {"path": {"type": "string", "description": text(200)}}}
    tools = [{"name": f"Tool{n}", "description": text(1200), "input_schema": schema} for n in range(15)]
    messages: list[Json] = []
    while size > 40_000 + sum(2400 for _ in messages):
        call = {"type": "tool_use", "id": f"t{len(messages)}", "name": "Read", "input": {"path": text(100)}}
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": text(4000)}
        messages += [
            {"role": "assistant", "content": [{"type": "text", "text": text(300)}, call]},
            {"role": "user", "content": [result]},
        ]
    return {"system": [{"type": "text", "text": text(20_000)}], "tools": tools, "messages": messages}


ODD = {
    "code": "def answer(question):\n    return 42\n" * 28_000,
    "one letter": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "newlines": "\n" * 1_000_000,
    "base64": b64encode(random.Random(0).randbytes(750_000)).decode(),
    "CJK": "漢字仮名交" * 200_000,
    "emoji": "😀" * 1_000_000,
    "special tokens": "<|endoftext|>" * 77_000,
}


async def measure_times() -> None:
    """Times and stalls as a server has them, whose encodings are in a process of their own."""
    vocabulary = Vocabulary(remote_encoding)
    counter = TokenCounter(vocabulary.get)
    print(f"stalls of the event loop, in ms; with nothing to do: {await stalls(lambda: asyncio.sleep(1))}")
    before = memory()

    async def first_count() -> None:
        await counter.count(conversation(60_000), "", "gpt-5")
        while not vocabulary.loaded:
            await asyncio.sleep(0.001)

    print(f"the first count, until o200k_base is there: {await stalls(first_count)}")
    child = vocabulary.load("o200k_base").child.pid
    print(f"memory: {before} MB before it, {memory()} after, {memory(child)} the process that counts")
    for size in (118_000, 163_000):
        await measure_conversation(conversation(size), counter)
    for _ in range(3):
        bodies = [conversation(60_000, next(TURNS)) for _ in range(50)]

        async def at_once(bodies: list[Json] = bodies) -> None:
            await asyncio.gather(*(counter.count(body, "", "gpt-5") for body in bodies))

        print(f"50 counts of 60 KB at once: {await stalls(at_once)}")
    for name, text in ODD.items():
        body = {"messages": [{"role": "user", "content": text}]}
        print(f"1 MB of {name}: {await stalls(lambda body=body: counter.count(body, '', 'gpt-5'))}")
    vocabulary.close()


async def measure_conversation(body: Json, counter: TokenCounter) -> None:
    cold, turn, warm = [], [], []
    for _ in range(15):
        counter.cache.clear()
        counter.whole.clear()
        cold.append(await timed(counter.count(body, "", "gpt-5")))
        turn.append(await timed(counter.count(with_turn(body), "", "gpt-5")))
        warm.append(await timed(counter.count(body, "", "gpt-5")))
    print(
        f"{len(json.dumps(body)):,} bytes, best and median ms: cold {figures(cold)}, "
        f"only the last message new {figures(turn)}, all known {figures(warm)}"
    )


async def timed(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return (time.perf_counter() - started) * 1000


def figures(times: list[float]) -> str:
    return f"{min(times):.2f} / {statistics.median(times):.2f}"


def memory(pid: int | str = "self") -> str:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return "?"
    return str(round(int(status.read_text().partition("VmRSS:")[2].split()[0]) / 1024))


TURNS = iter(range(1_000_000))


def with_turn(body: Json) -> Json:
    message = {"role": "user", "content": f"{next(TURNS)} " + "what does this function return? " * 60}
    return {**body, "messages": [*body["messages"], message]}


async def stalls(work: Callable[[], Awaitable[object]]) -> str:
    """How late the event loop came to a 1 ms timer meanwhile, the three latest times, and the most CPU that this
    process used between two: what it may itself have stalled for, however busy the machine is.
    """
    late, used, done = [], [], asyncio.Event()

    async def watch() -> None:
        while not done.is_set():
            started, cpu = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.001)
            late.append((time.perf_counter() - started) * 1000 - 1)
            used.append((time.process_time() - cpu) * 1000)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0.02)
    took = await timed(work())
    done.set()
    await watcher
    latest = ", ".join(f"{each:.1f}" for each in sorted(late)[-3:])
    return f"{latest}; {max(used):.1f} of its own (took {took:.0f} ms)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
