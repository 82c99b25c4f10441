"""Responses and Gemini upstreams served whole: both SDKs -> ccmux as a process -> recorded streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web
from conftest import Start
from fakes import serving
from proxy_harness import provider_row
from translation import BASH, COMMAND, FIXTURES, tool_result, user

FUNCTION: Any = {"type": "function", "function": {"name": "Bash", "parameters": COMMAND}}
MODELS = ["r/gpt-5.3-codex", "g/gemini-3.8-flash"]
CASES = {"responses": ("plain", "reasoning_then_tool"), "gemini": ("plain", "thoughts_then_tool")}


class Upstream:
    """Answers with a recorded stream: a tool call where tools are offered, words once it has the result."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.calls_again = False  # with the ids of the first calls
        self.refusals: list[Any] = []  # requests to the address that refuses them
        self.refusal = (400, "")
        self.thinking_refused = ""  # in what words, by a Gemini model
        self.url = ""

    def config(self, **quirks: Any) -> str:
        """Its three formats as the providers r, g and o, the last with quirks."""
        r = {"base_url": f"{self.url}/v1", "api_key": "key-of-r"}
        rows = [
            provider_row("r", "responses", **r),
            provider_row("g", "gemini", base_url=self.url, api_key="key-of-g"),
            provider_row("o", "openai", **r, quirks=quirks),
        ]
        return '[router]\ndefault = "r/gpt-5.3-codex"\nauto_map_regex = ""\n' + "".join(rows)

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        format = "responses" if request.path == "/v1/responses" else "gemini"
        key = request.headers.get("authorization" if format == "responses" else "x-goog-api-key")
        assert key in ("Bearer key-of-r", "key-of-g")
        assert format == "responses" or request.query_string == "alt=sse"
        is_answered = "function_call_output" in json.dumps(body) or "functionResponse" in json.dumps(body)
        if self.thinking_refused and "thinkingConfig" in body.get("generationConfig", {}):
            error = {"code": 400, "message": self.thinking_refused, "status": "INVALID_ARGUMENT"}
            return web.json_response({"error": error}, status=400)
        case = CASES[format]["tools" in body and (self.calls_again or not is_answered)]
        data = (FIXTURES / format / f"{case}.sse").read_bytes()
        return web.Response(body=data, content_type="text/event-stream")

    async def refuse(self, request: web.Request) -> web.Response:
        self.refusals.append(await request.json())
        status, message = self.refusal
        return web.json_response({"error": {"message": message, "param": "reasoning_effort"}}, status=status)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    async with serving(
        web.post("/v1/responses", upstream.answer),
        web.post("/v1/chat/completions", upstream.refuse),
        web.post("/v1beta/models/gemini-3.8-flash:streamGenerateContent", upstream.answer),
    ) as upstream.url:
        yield upstream


async def test_anthropic_sdk_in_a_tool_round(upstream: Upstream, start_ccmux: Start) -> None:
    async with (
        start_ccmux(upstream.config()) as ccmux,
        anthropic.AsyncAnthropic(base_url=ccmux.url, api_key="x") as client,
    ):
        for model in MODELS:
            asked: Any = {"model": model, "max_tokens": 99, "tools": [BASH], "thinking": {"type": "adaptive"}}
            first = await client.messages.create(messages=[user("list")], **asked)  # type: ignore[list-item]
            assert first.stop_reason == "tool_use"
            said = {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in first.content]}
            call = next(b for b in first.content if b.type == "tool_use")
            history: Any = [user("list"), said, user(tool_result(call.id, "a.txt"))]
            async with client.messages.stream(messages=history, **asked) as stream:
                last = await stream.get_final_message()
            assert last.stop_reason == "end_turn"
            assert last.model == model
            upstream.calls_again = True
            again = await client.messages.create(messages=history, **asked)
            ids = {b.id for b in (*first.content, *again.content) if b.type == "tool_use"}
            assert len(ids) == 2 * sum(b.type == "tool_use" for b in first.content)
            upstream.calls_again = False
    sent = [json.dumps(body) for body in upstream.bodies]
    assert "gAAAAABo4Wq1-encrypted-reasoning-==" in sent[1]
    assert "CpcBAdHtim9TaWduYXR1cmUx" in sent[4]


async def test_openai_sdk_streamed_and_whole(upstream: Upstream, start_ccmux: Start) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "list"}], "tools": [FUNCTION]}
    async with (
        start_ccmux(upstream.config()) as ccmux,
        openai.AsyncOpenAI(base_url=f"{ccmux.url}/v1", api_key="x") as client,
    ):
        for model in MODELS:
            whole = await client.chat.completions.create(model=model, **asked)
            call = whole.choices[0].message.tool_calls[0]
            assert (call.function.name, whole.choices[0].finish_reason) == ("Bash", "tool_calls")
            assert json.loads(call.function.arguments) == {"command": "ls -la", "description": "List files"}
            chunks = await client.chat.completions.create(
                model=model, stream=True, stream_options={"include_usage": True}, **asked
            )
            seen = [chunk async for chunk in chunks]
            pieces = [c.choices[0].delta for c in seen if c.choices]
            arguments = "".join(p.tool_calls[0].function.arguments for p in pieces if p.tool_calls)
            assert json.loads(arguments) == json.loads(call.function.arguments)
            assert "".join(p.content or "" for p in pieces) == whole.choices[0].message.content
            assert seen[-1].usage == whole.usage
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="nobody/x", **asked)
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("format", ["anthropic", "chat"])
async def test_a_web_search_goes_to_responses_at_once(
    format: str, upstream: Upstream, start_ccmux: Start
) -> None:
    """OpenAI's Chat Completions answers it with a 400, of all models but those that are made for it."""
    search: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    hello: Any = [user("who won?")]
    async with (
        start_ccmux(upstream.config(web_search="responses")) as ccmux,
        anthropic.AsyncAnthropic(base_url=ccmux.url, api_key="x", max_retries=0) as client,
        openai.AsyncOpenAI(base_url=f"{ccmux.url}/v1", api_key="x", max_retries=0) as other,
    ):
        if format == "anthropic":
            await client.messages.create(model="o/gpt-5.1", max_tokens=99, tools=[search], messages=hello)
        else:
            await other.chat.completions.create(model="o/gpt-5.1", messages=hello, web_search_options={})
    [body] = upstream.bodies
    assert body["tools"] == [{"type": "web_search"}]
    assert not upstream.refusals


@pytest.mark.parametrize(
    "refusal",
    [
        (400, "Function tools with reasoning_effort are not supported for gpt-5.6 in /v1/chat/completions. To use "
              "function tools, use /v1/responses or set reasoning_effort to 'none'."),
        (404, "This model is only supported in v1/responses and not in v1/chat/completions."),
    ],
    ids=["with tools", "at all"],
)  # fmt: skip
async def test_a_model_that_sends_on_to_responses_is_served_there(
    refusal: tuple[int, str], upstream: Upstream, start_ccmux: Start
) -> None:
    upstream.refusal = refusal
    hello: Any = [user("list")]
    async with (
        start_ccmux(upstream.config()) as ccmux,
        anthropic.AsyncAnthropic(base_url=ccmux.url, api_key="x", max_retries=0) as client,
        openai.AsyncOpenAI(base_url=f"{ccmux.url}/v1", api_key="x", max_retries=0) as other,
    ):
        for _ in range(2):
            answer = await client.messages.create(
                model="o/gpt-5.6", max_tokens=99, tools=[BASH], messages=hello
            )
            assert answer.stop_reason == "tool_use"
        whole = await other.chat.completions.create(model="o/gpt-5.6", messages=hello, tools=[FUNCTION])
        assert whole.choices[0].finish_reason == "tool_calls"
    assert (len(upstream.refusals), len(upstream.bodies)) == (1, 3)


async def test_a_gemini_model_that_takes_no_thinking_config_is_asked_without(
    upstream: Upstream, start_ccmux: Start
) -> None:
    upstream.thinking_refused = "Thinking level is not supported for this model."
    asked: Any = {"model": "g/gemini-3.8-flash", "max_tokens": 99, "thinking": {"type": "adaptive"}}
    async with (
        start_ccmux(upstream.config()) as ccmux,
        anthropic.AsyncAnthropic(base_url=ccmux.url, api_key="x", max_retries=0) as client,
    ):
        for _ in range(2):
            answer = await client.messages.create(messages=[{"role": "user", "content": "hi"}], **asked)
            assert answer.stop_reason == "end_turn"
    configs = [body["generationConfig"] for body in upstream.bodies]
    assert ["thinkingConfig" in config for config in configs] == [True, False, False]
