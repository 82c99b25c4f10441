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
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vocabulary as files

from ccmux import Json, TokenCounter, Vocabulary


def main(arguments: list[str]) -> int:
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(files.filled(files.cache_dir())))
    path = arguments[0] if arguments else os.environ.get("CCMUX_TOKEN_VECTORS", "")
    vocabulary = Vocabulary()
    if path:
        measure_errors(json.loads(Path(path).read_text("utf-8")), vocabulary)
    else:
        print("no vectors file given: only times")
    measure_times(vocabulary)
    return 0


def measure_errors(vectors: list[Json], vocabulary: Vocabulary) -> None:
    chat = [v for v in vectors if v["api"] == "openai-chat" and "body" in v]
    counted = [count(vocabulary, v["body"], chat_model(v)) for v in chat]
    show("OpenAI chat", [(v["id"], c, v["prompt_tokens"]) for v, c in zip(chat, counted, strict=True)])
    for model in ("claude-opus-4-5", "claude-opus-4-7", "claude-opus-5"):
        recorded = [(v, v["input_tokens_by_model"][model]) for v in vectors if "input_tokens_by_model" in v]
        show(model, [(v["id"], count(vocabulary, v["body"], model), true) for v, true in recorded])
        show(f"{model}, 20 turns calibrated", session_errors(vocabulary, recorded, model))
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


def session_errors(
    vocabulary: Vocabulary, recorded: list[tuple[Json, int]], model: str
) -> list[tuple[str, int, int]]:
    """A session that a growing mix of the texts is sent in; its counts from the 21st turn on."""
    counter, drawn, out = TokenCounter(vocabulary.load), random.Random(1), []
    messages: list[Json] = []
    total = 0
    for turn in range(60):
        vector, true = drawn.choice(recorded)
        messages, total = [*messages, *vector["body"]["messages"]], total + true
        if len(messages) > 8:
            messages, total = messages[-1:], true
        tokens = counter.count_now({"messages": messages}, "bench", model)
        if turn >= 20:
            out.append((vector["id"], tokens, total))
        counter.observe("bench", model, tokens, total)
    return out


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


def measure_times(vocabulary: Vocabulary) -> None:
    started = time.perf_counter()
    Vocabulary().load("o200k_base")
    print(f"loading o200k_base: {time.perf_counter() - started:.2f} s")
    for size in (118_000, 163_000):
        body = conversation(size)
        cold = best(lambda body=body: TokenCounter(vocabulary.load).count_now(body, "", "gpt-5"))
        counter = TokenCounter(vocabulary.load)
        counter.count_now(body, "", "gpt-5")
        warm = best(lambda body=body, counter=counter: counter.count_now(body, "", "gpt-5"))
        turn = best(lambda body=body, counter=counter: counter.count_now(with_turn(body), "", "gpt-5"))
        print(
            f"{len(json.dumps(body)):,} bytes: cold {cold * 1000:.2f} ms, "
            f"only the last message new {turn * 1000:.2f} ms, all known {warm * 1000:.3f} ms"
        )
    print(f"50 counts of 60 KB at once: longest stall {asyncio.run(longest_stall(vocabulary)) * 1000:.1f} ms")


TURNS = iter(range(1_000_000))


def with_turn(body: Json) -> Json:
    message = {"role": "user", "content": f"{next(TURNS)} " + "what does this function return? " * 60}
    return {**body, "messages": [*body["messages"], message]}


def best(run: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


async def longest_stall(vocabulary: Vocabulary) -> float:
    """Seconds that the event loop did not get to a 1 ms timer while 50 requests of 60 KB were counted."""
    counter = TokenCounter(vocabulary.load)
    bodies = [conversation(60_000, seed) for seed in range(50)]
    longest, done = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal longest
        while not done.is_set():
            started = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - started - 0.001)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0.01)
    await asyncio.gather(*(counter.count(body, "", "gpt-5") for body in bodies))
    done.set()
    await watcher
    return longest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
