"""OpenAI in, OpenAI-format upstream: relayed as it came, with usage read off and the request as the client wrote it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fakes import Answer, Call, OpenAIFake, Turn
from openai import AsyncOpenAI, BadRequestError, RateLimitError
from proxy_harness import Proxy, in_process, provider_row
from translation import upstream

from ccmux import ApiError, ChatTap, ChatWhole, chat_passed_on


def chunk(delta: Any, finish: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: %s\n\n" % json.dumps({"id": "c", "odd": [1.50], "choices": choices, **more}).encode()


USAGE = {"prompt_tokens": 10, "completion_tokens": 3}
OURS = b"data: %s\n\n" % json.dumps({"choices": [], "usage": USAGE}).encode()
DONE = b"data: [DONE]\n\n"
STREAM = (
    b": hello\n\n" + chunk({"role": "assistant", "content": ""}) + chunk({"content": "a"}) + chunk({}, "stop")
)


@pytest.mark.parametrize(
    "told",
    [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "x_groq": {"usage": USAGE}},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}]},
    ],
    ids=["Groq", "Moonshot"],
)
def test_usage_is_read_wherever_a_stream_tells_it(told: Any) -> None:
    tap = ChatTap(wants_usage=False)
    data = b"data: %s\n\n" % json.dumps(told).encode()
    assert tap.feed(data) + tap.feed(b"data: [DONE]\n\n") == data
    assert tap.ended and tap.usage and (tap.usage.input, tap.usage.output) == (10, 3)


@pytest.mark.parametrize("wants_usage", [True, False])
def test_a_stream_is_relayed_byte_for_byte_cut_anywhere(wants_usage: bool) -> None:
    data = STREAM + OURS + DONE
    for cut in range(len(data)):
        tap = ChatTap(wants_usage)
        out = tap.feed(data[:cut]) + tap.feed(data[cut:]) + tap.finish()
        assert out == STREAM + (OURS if wants_usage else b"")
        assert (tap.ending, tap.ended, tap.error) == (DONE, True, None)
        assert tap.usage is not None
        assert (tap.usage.input, tap.usage.output, tap.stop_reason) == (10, 3, "stop")
        assert tap.output_text() == "a"


def test_a_last_chunk_without_its_blank_line_is_apart_from_what_follows() -> None:
    tap = ChatTap(True)
    assert tap.feed(STREAM[:-2]) + tap.finish() == STREAM
    assert (tap.ending, tap.error) == (DONE, None)


@pytest.mark.parametrize(
    ("data", "status", "content"),
    [
        (STREAM[: -len(chunk({}, "stop"))], 502, True),
        (b'data: {"error": {"message": "x", "code": 429}}\n\n', 429, False),
        (b'data: {"object": "error", "message": "x", "code": 400}\n\n', 400, False),
        (b'{"error": {"message": "x", "code": 429}}', 429, False),
        (b'{"error": {"message": "x", "code": 429}}\n\n', 429, False),
        (chunk({"content": "a"}) + chunk({}, "stop", x_groq={"error": "over capacity"}) + DONE, 502, True),
        (
            b'error: {"code": 400, "message": "the request exceeds the available context size"}\n\n',
            400,
            False,
        ),
        (b"<html>", 502, False),
        (b"data: {broken\n\n", 502, False),
        (b"", 502, False),
    ],
)
def test_what_is_no_whole_stream_is_an_error(data: bytes, status: int, content: bool) -> None:
    tap = ChatTap(False)
    tap.feed(data)
    tap.finish()
    assert isinstance(tap.error, ApiError)
    assert (tap.error.status, tap.has_content, tap.ending) == (status, content, b"")


def test_a_last_event_that_is_cut_off_is_no_other_kind_of_fault() -> None:
    tap = ChatTap(False)
    tap.feed(chunk({"content": "a"}) + chunk({"content": "b"})[:-9])
    assert tap.finish() == b""
    assert tap.error is not None
    assert tap.error.message == "the provider's stream ended before the answer did"


@pytest.mark.parametrize("mark", [DONE, b""])
def test_an_end_without_a_reason(mark: bytes) -> None:
    strict, lax, empty = ChatTap(False), ChatTap(False, lax_finish=True), ChatTap(False, lax_finish=True)
    for tap, data in ((strict, chunk({"content": "a"})), (lax, chunk({"content": "a"})), (empty, b"")):
        assert tap.feed(data + mark) + tap.finish() == data
    assert (lax.ended, lax.ending, lax.error) == (True, DONE, None)
    for tap in (strict, empty):
        assert tap.error is not None
        assert (tap.error.message, tap.ended) == ("the provider's stream ended before the answer did", False)


def test_a_whole_answer_is_relayed_byte_for_byte() -> None:
    choices = b'{ "choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]'
    body = choices + b', "usage": %s }' % json.dumps(USAGE).encode()
    whole = ChatWhole()
    assert whole.feed(body) + whole.finish() == b""
    assert whole.ending == body
    assert whole.usage is not None
    assert whole.usage.output == 3
    broken = ChatWhole()
    broken.feed(b'{"choices": []}')
    broken.finish()
    assert broken.error is not None


def test_the_request_goes_on_as_the_client_wrote_it() -> None:
    given = {"model": "x", "stream": True, "n": 2, "seed": 7, "messages": [{"role": "user", "content": "hi"}]}
    sent = chat_passed_on(given, upstream("up", skip=frozenset({"seed"})))
    assert "seed" not in sent
    assert {**sent, "seed": 7} == {**given, "model": "up", "stream_options": {"include_usage": True}}
    assert "stream_options" not in chat_passed_on({**given, "stream": False}, upstream("up"))
    assert chat_passed_on({**given, "stream": "yes"}, upstream("up"))["stream"] is False


def row_of(fake: OpenAIFake, *models: str, name: str = "o", type: str = "openai") -> str:
    keys = {"base_url": fake.base_url, "api_key": "sk-x-012345678", "models": models}
    return provider_row(name, type, **keys)


@asynccontextmanager
async def sdk_on(folder: Path, text: str) -> AsyncIterator[tuple[AsyncOpenAI, Proxy]]:
    """The SDK without retries of its own, pointed at a ccmux with this config."""
    async with (
        in_process(folder, text) as proxy,
        AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client, proxy


async def test_the_openai_sdk_through_ccmux(tmp_path: Path) -> None:
    def script(turn: Turn) -> Answer:
        return Answer(text="hello", calls=(Call("Bash", {"command": "ls"}),))

    async with OpenAIFake(script) as fake, sdk_on(tmp_path, row_of(fake, "up")) as (client, proxy):
        asked: Any = {"model": "up", "messages": [{"role": "user", "content": "hi"}], "seed": 5}
        whole = await client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == "hello"
        assert whole.choices[0].message.tool_calls
        stream = await client.chat.completions.create(**asked, stream=True)
        parts = [part async for part in stream]
        assert all(part.choices for part in parts)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == "hello"
        stream = await client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        assert [part async for part in stream][-1].usage is not None
        assert [r.body.get("seed") for r in fake.asked] == [5, 5, 5]
        async with aiohttp.ClientSession() as session:
            reply = await session.get(f"{proxy.url}/api/requests")
            rows = (await reply.json())["requests"]
        assert len(rows) == 3
        assert all(r["output_tokens"] == 40 and not r["estimated"] for r in rows)


HELLO: Any = {"role": "user", "content": "hello"}


async def test_what_no_messages_request_can_say_goes_to_an_upstream_of_the_clients_format(
    tmp_path: Path,
) -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}, audio]}]
    async with OpenAIFake(lambda turn: Answer(text="hello")) as fake:
        text = row_of(fake, "up") + row_of(fake, "other", name="r", type="responses")
        text += "[[models]]\nname = 'both'\nmappings = [{provider = 'r', actual_model = 'other'}, {provider = 'o', actual_model = 'up'}]\n"
        async with sdk_on(tmp_path, text) as (client, _):
            asked: Any = {"messages": messages, "n": 2, "modalities": ["text", "audio"]}
            for model in ("up", "both"):  # the first target of the latter is passed over
                answer = await client.chat.completions.create(model=model, **asked)
                assert answer.choices[0].message.content == "hello"
            with pytest.raises(BadRequestError, match="n: only one choice"):
                await client.chat.completions.create(model="other", **asked)
            with pytest.raises(BadRequestError, match="'input_audio' cannot be served"):
                await client.chat.completions.create(model="other", messages=messages)
            free: Any = [{"type": "custom", "custom": {"name": "patch"}}]
            with pytest.raises(BadRequestError, match="'custom' cannot be served"):
                await client.chat.completions.create(model="other", messages=[HELLO], tools=free)
            await client.chat.completions.create(model="both", messages=[HELLO], tools=free)
    *sent, last = fake.asked
    assert [(s.body["messages"], s.body["n"]) for s in sent] == [(messages, 2)] * 2
    assert last.body["tools"] == free


async def test_what_only_openais_format_can_say_is_refused_by_those_that_speak_it(tmp_path: Path) -> None:
    limited = Answer(status=429, error="slow down", headers=(("retry-after", "60"),))
    async with OpenAIFake(lambda turn: limited) as fake:
        rows = row_of(fake, "up") + row_of(fake, "other", name="r", type="responses")
        model = "[[models]]\nname = 'm'\n[[models.mappings]]\nprovider = 'o'\nactual_model = 'up'\n"
        model += "[[models.mappings]]\nprovider = 'r'\nactual_model = 'other'\n"
        async with sdk_on(tmp_path, rows + model) as (client, _):
            with pytest.raises(RateLimitError, match="slow down"):
                await client.chat.completions.create(model="m", messages=[HELLO], n=2)
    assert len(fake.asked) == 1


TOOL = {"name": "Bash", "description": "Runs", "input_schema": {"type": "object", "properties": {}}}


async def test_cursors_tools_are_translated_even_where_the_upstream_speaks_openais_format(
    tmp_path: Path,
) -> None:
    async with (
        OpenAIFake(lambda turn: Answer(text="hello")) as fake,
        sdk_on(tmp_path, row_of(fake, "up")) as (client, _),
    ):
        asked: Any = {"model": "up", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
        assert (await client.chat.completions.create(**asked)).choices[0].message.content == "hello"
    [sent] = fake.asked
    assert [tool["function"]["name"] for tool in sent.body["tools"]] == ["Bash"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_what_a_rule_takes_out_does_not_go_on(streamed: bool, tmp_path: Path) -> None:
    async with OpenAIFake(lambda turn: Answer(text="hello")) as fake:
        rule = '[[router.rules]]\npattern = "^use up:"\nmodel = "up"\nstrip = true\n'
        async with sdk_on(tmp_path, rule + row_of(fake, "up", "other")) as (client, _):
            asked: Any = {"model": "other", "messages": [{"role": "user", "content": "use up: say hello"}]}
            if streamed:
                stream = await client.chat.completions.create(**asked, stream=True)
                said = "".join([part.choices[0].delta.content or "" async for part in stream])
            else:
                said = (await client.chat.completions.create(**asked)).choices[0].message.content or ""
    assert said == "hello"
    [sent] = fake.asked
    assert (sent.body["model"], sent.body["messages"]) == ("up", [{"role": "user", "content": "say hello"}])
