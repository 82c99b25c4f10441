"""Fake upstreams: real HTTP servers on loopback whose answers a script decides by the conversation.

A script is a function `Turn -> Answer`, the way a tiny model would work: it looks at what the user asked and
at the tool results that have come back, and says text, thinking, tool calls or an error. It knows nothing of
wire formats, so one script serves every kind of provider:

    async with OpenAIFake(script) as fake:
        ... fake.url, fake.requests ...

Every request is recorded with its headers and body, and with whether the client hung up before the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from aiohttp import web
from aiohttp.test_utils import TestServer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call the model makes."""

    name: str
    input: Json


@dataclass(frozen=True, slots=True)
class Tokens:
    """What an answer says it used; cached ones are apart from input, as Anthropic counts."""

    input: int = 1200
    output: int = 40
    cached: int = 800


@dataclass(frozen=True, slots=True)
class Answer:
    """What the tiny model does with a request. A status beside 200 is an error with `error` as its words."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    tokens: Tokens = Tokens()
    stop: str = ""  # "length": the output limit cut it
    status: int = 200
    error: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    overflow: tuple[int, int] | None = (
        None  # (tokens sent, tokens allowed): too long, in the provider's own words
    )
    delay: float = 0.0  # seconds before the first byte
    pause: float = 0.0  # seconds between two pieces of a stream
    cut: int | None = None  # the connection breaks after so many pieces of the stream
    hang: asyncio.Event | None = None  # after the first piece it waits for this


@dataclass(frozen=True, slots=True)
class Turn:
    """What a script sees of a request."""

    prompt: str  # the newest words of the user, system reminders left out
    results: tuple[str, ...]  # tool results that came after them
    tools: tuple[str, ...]
    text: str  # all text of the messages: what its length is measured by
    model: str
    stream: bool
    number: int  # requests for an answer before this one
    body: Json


@dataclass(slots=True)
class Recorded:
    """A request as it arrived. `hung_up`: the client was gone before the answer was whole."""

    method: str
    path: str
    headers: dict[str, str]  # lower-case names
    body: Json
    hung_up: bool = False
    answered: bool = False


Script = Callable[[Turn], Answer]


class Fake:
    """A server on a free port of 127.0.0.1; the wire formats are its subclasses."""

    kind = ""
    base_path = ""  # what a config's base_url has after the port

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Recorded] = []
        self.answers = 0  # requests for an answer that came
        self.url = ""

    @property
    def base_url(self) -> str:
        return self.url + self.base_path

    @property
    def asked(self) -> list[Recorded]:
        """The requests for an answer: no counts, no model lists."""
        return [r for r in self.requests if r.method == "POST" and "count" not in r.path]

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(self.routes())
        self.runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.runner.cleanup()

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    def turn(self, body: Json) -> Turn:
        raise NotImplementedError

    def pieces(self, answer: Answer, turn: Turn) -> Iterator[bytes]:
        """The stream, cut where a network might."""
        raise NotImplementedError

    def whole(self, answer: Answer, turn: Turn) -> Json:
        raise NotImplementedError

    def error_body(self, answer: Answer) -> Json:
        raise NotImplementedError

    async def record(self, request: web.Request) -> Recorded:
        raw = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        recorded = Recorded(request.method, request.path_qs, headers, json.loads(raw) if raw else {})
        self.requests.append(recorded)
        return recorded

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """An answer of the model, whole or streamed, as the request wants it."""
        recorded = await self.record(request)
        turn = dataclasses.replace(self.turn(recorded.body), number=self.answers)
        self.answers += 1
        answer = self.script(turn)
        try:
            if answer.delay:
                await asyncio.sleep(answer.delay)
            response = await self.respond(request, answer, turn)
        except (asyncio.CancelledError, ConnectionError):
            recorded.hung_up = True
            raise
        recorded.answered = True
        return response

    async def respond(self, request: web.Request, answer: Answer, turn: Turn) -> web.StreamResponse:
        headers = {"request-id": f"req_fake_{turn.number}", **dict(answer.headers)}
        if answer.overflow:
            answer = self.too_long(answer)
        if answer.status != 200:
            return web.json_response(self.error_body(answer), status=answer.status, headers=headers)
        if not self.wants_stream(request, turn):
            return web.json_response(self.whole(answer, turn), headers=headers)
        response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for piece in self.paced(answer, turn):
            await response.write(piece)
        if answer.cut is not None and request.transport is not None:
            request.transport.abort()
        await response.write_eof()
        return response

    async def paced(self, answer: Answer, turn: Turn) -> AsyncIterator[bytes]:
        for number, piece in enumerate(self.pieces(answer, turn)):
            if number == answer.cut:
                return
            yield piece
            if answer.hang and number == 0:
                await answer.hang.wait()
            await asyncio.sleep(answer.pause)

    def wants_stream(self, request: web.Request, turn: Turn) -> bool:
        return turn.stream

    def too_long(self, answer: Answer) -> Answer:
        raise NotImplementedError


@contextlib.asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    """A server of these routes alone; its address."""
    app = web.Application()
    app.add_routes(routes)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


def fragments(text: str, size: int = 12) -> list[str]:
    """A text as the pieces a model streams."""
    return [text[n : n + size] for n in range(0, len(text), size)]


def sse(data: Json, event: str = "") -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


_REMINDER = re.compile(r"<system-reminder>.*?(?:</system-reminder>|\Z)", re.S)


def spoken(text: str) -> str:
    """What the user said, without what the client added."""
    return _REMINDER.sub("", text).strip()


def flat(content: Any) -> str:
    """All text in a content value, however nested."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(filter(None, map(flat, content)))
    if isinstance(content, dict):
        return "\n".join(flat(content[k]) for k in ("text", "content", "output", "parts") if k in content)
    return ""


def newest(said: list[tuple[str, str]]) -> tuple[str, tuple[str, ...]]:
    """The newest prompt and the tool results after it, out of (who, text); who is user, tool or model."""
    prompt, results = "", []
    for who, text in said:
        if who == "user" and spoken(text):
            prompt, results = spoken(text), []
        elif who == "tool":
            results.append(text)
    return prompt, tuple(results)


# Anthropic Messages

ANTHROPIC_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error",
    529: "overloaded_error",
}  # fmt: skip


class AnthropicFake(Fake):
    """POST /v1/messages and /v1/messages/count_tokens, GET /v1/models, as Anthropic's own API does it."""

    kind = "anthropic"

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self.answer),
            web.post("/v1/messages/count_tokens", self.count),
            web.get("/v1/models", self.models),
            web.get("/api/hello", self.hello),
            web.get("/", self.hello),
        ]

    async def hello(self, request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def count(self, request: web.Request) -> web.Response:
        recorded = await self.record(request)
        return web.json_response({"input_tokens": len(json.dumps(recorded.body)) // 4})

    async def models(self, request: web.Request) -> web.Response:
        await self.record(request)
        row = {"type": "model", "id": "tiny", "display_name": "Tiny", "created_at": "2026-01-01T00:00:00Z"}
        return web.json_response({"data": [row], "has_more": False, "first_id": "tiny", "last_id": "tiny"})

    def turn(self, body: Json) -> Turn:
        said: list[tuple[str, str]] = []
        for message in body["messages"]:
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for block in blocks:
                who = "tool" if block["type"] == "tool_result" else message["role"]
                said.append((who, flat(block)))
        prompt, results = newest(said)
        tools = tuple(t["name"] for t in body.get("tools") or [])
        text = "\n".join(text for _, text in said)
        return Turn(prompt, results, tools, text, body["model"], bool(body.get("stream")), 0, body)

    def usage(self, answer: Answer) -> Json:
        t = answer.tokens
        return {
            "input_tokens": t.input, "output_tokens": t.output,
            "cache_read_input_tokens": t.cached, "cache_creation_input_tokens": 0,
        }  # fmt: skip

    def blocks(self, answer: Answer, turn: Turn) -> list[Json]:
        made: list[Json] = []
        if answer.reasoning:
            made.append({"type": "thinking", "thinking": answer.reasoning, "signature": "c2lnbmVk"})
        if answer.text:
            made.append({"type": "text", "text": answer.text})
        for index, call in enumerate(answer.calls):
            id = f"toolu_{turn.number:02}_{index:02}"
            made.append({"type": "tool_use", "id": id, "name": call.name, "input": call.input})
        return made

    def stop_reason(self, answer: Answer) -> str:
        return "max_tokens" if answer.stop == "length" else "tool_use" if answer.calls else "end_turn"

    def whole(self, answer: Answer, turn: Turn) -> Json:
        return {
            "id": f"msg_{turn.number:04}", "type": "message", "role": "assistant", "model": turn.model,
            "content": self.blocks(answer, turn), "stop_reason": self.stop_reason(answer),
            "stop_sequence": None, "usage": self.usage(answer),
        }  # fmt: skip

    def pieces(self, answer: Answer, turn: Turn) -> Iterator[bytes]:
        for event in self.events(answer, turn):
            yield sse(event, event["type"])

    def events(self, answer: Answer, turn: Turn) -> Iterator[Json]:
        message = {**self.whole(answer, turn), "content": [], "stop_reason": None}
        yield {
            "type": "message_start",
            "message": {**message, "usage": {**message["usage"], "output_tokens": 1}},
        }
        yield {"type": "ping"}
        for index, block in enumerate(self.blocks(answer, turn)):
            yield {"type": "content_block_start", "index": index, "content_block": self.empty(block)}
            for delta in self.deltas(block):
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
        delta = {"stop_reason": self.stop_reason(answer), "stop_sequence": None}
        yield {"type": "message_delta", "delta": delta, "usage": self.usage(answer)}
        yield {"type": "message_stop"}

    def empty(self, block: Json) -> Json:
        blank: Json = {"text": "", "thinking": "", "signature": "", "input": {}}
        return {k: blank.get(k, v) for k, v in block.items()}

    def deltas(self, block: Json) -> Iterator[Json]:
        if block["type"] == "tool_use":
            for part in fragments(json.dumps(block["input"])):
                yield {"type": "input_json_delta", "partial_json": part}
            return
        kind = block["type"]
        for part in fragments(block[kind]):
            yield {"type": f"{kind}_delta", kind: part}
        if kind == "thinking":
            yield {"type": "signature_delta", "signature": block["signature"]}

    def error_body(self, answer: Answer) -> Json:
        error = {"type": ANTHROPIC_ERRORS.get(answer.status, "api_error"), "message": answer.error}
        return {"type": "error", "error": error, "request_id": "req_fake"}

    def too_long(self, answer: Answer) -> Answer:
        sent, allowed = answer.overflow or (0, 0)
        words = f"prompt is too long: {sent} tokens > {allowed} maximum"
        return dataclasses.replace(answer, status=400, error=words)


# OpenAI Chat Completions


class OpenAIFake(Fake):
    """POST /v1/chat/completions and GET /v1/models, as OpenAI and those that copy it do."""

    kind = "openai"
    base_path = "/v1"

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self.answer), web.get("/v1/models", self.models)]

    async def models(self, request: web.Request) -> web.Response:
        await self.record(request)
        row = {"id": "tiny", "object": "model", "created": 1767225600, "owned_by": "fake"}
        return web.json_response({"object": "list", "data": [row]})

    def turn(self, body: Json) -> Turn:
        names = {"tool": "tool", "user": "user"}
        said = [(names.get(m["role"], "model"), flat(m.get("content"))) for m in body["messages"]]
        prompt, results = newest(said)
        tools = tuple(t["function"]["name"] for t in body.get("tools") or [] if "function" in t)
        text = "\n".join(flat(m.get("content")) for m in body["messages"] if m["role"] != "system")
        return Turn(prompt, results, tools, text, body["model"], bool(body.get("stream")), 0, body)

    def usage(self, answer: Answer) -> Json:
        t = answer.tokens
        prompt = t.input + t.cached
        return {
            "prompt_tokens": prompt, "completion_tokens": t.output, "total_tokens": prompt + t.output,
            "prompt_tokens_details": {"cached_tokens": t.cached},
        }  # fmt: skip

    def tool_calls(self, answer: Answer, turn: Turn) -> list[Json]:
        return [
            {"id": f"call_{turn.number:02}_{index:02}", "type": "function",
             "function": {"name": call.name, "arguments": json.dumps(call.input)}}
            for index, call in enumerate(answer.calls)
        ]  # fmt: skip

    def finish_reason(self, answer: Answer) -> str:
        return answer.stop or ("tool_calls" if answer.calls else "stop")

    def frame(self, turn: Turn, object: str, choices: list[Json]) -> Json:
        head = {"id": f"chatcmpl-{turn.number}", "object": object, "created": 1767225600, "model": turn.model}
        return {**head, "choices": choices}

    def whole(self, answer: Answer, turn: Turn) -> Json:
        message: Json = {"role": "assistant", "content": answer.text or None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = self.tool_calls(answer, turn)
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason(answer)}
        return {**self.frame(turn, "chat.completion", [choice]), "usage": self.usage(answer)}

    def pieces(self, answer: Answer, turn: Turn) -> Iterator[bytes]:
        for delta in self.deltas(answer, turn):
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            yield sse(self.frame(turn, "chat.completion.chunk", [choice]))
        last = {"index": 0, "delta": {}, "finish_reason": self.finish_reason(answer)}
        yield sse(self.frame(turn, "chat.completion.chunk", [last]))
        if (turn.body.get("stream_options") or {}).get("include_usage"):
            yield sse({**self.frame(turn, "chat.completion.chunk", []), "usage": self.usage(answer)})
        yield b"data: [DONE]\n\n"

    def deltas(self, answer: Answer, turn: Turn) -> Iterator[Json]:
        yield {"role": "assistant", "content": ""}
        for part in fragments(answer.reasoning):
            yield {"reasoning_content": part}
        for part in fragments(answer.text):
            yield {"content": part}
        for index, call in enumerate(self.tool_calls(answer, turn)):
            function = call["function"]
            yield {"tool_calls": [{**call, "index": index, "function": {**function, "arguments": ""}}]}
            for part in fragments(function["arguments"]):
                yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}

    def error_body(self, answer: Answer) -> Json:
        kind = "invalid_request_error" if answer.status < 500 else "server_error"
        code = "context_length_exceeded" if answer.overflow else None
        return {"error": {"message": answer.error, "type": kind, "param": None, "code": code}}

    def too_long(self, answer: Answer) -> Answer:
        sent, allowed = answer.overflow or (0, 0)
        words = (
            f"This model's maximum context length is {allowed} tokens. However, your messages resulted in "
            f"{sent} tokens. Please reduce the length of the messages."
        )
        return dataclasses.replace(answer, status=400, error=words)


# OpenAI Responses


class ResponsesFake(Fake):
    """POST /v1/responses, as OpenAI's own API does it."""

    kind = "responses"
    base_path = "/v1"

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/responses", self.answer)]

    def turn(self, body: Json) -> Turn:
        said = []
        for item in (
            [{"role": "user", "content": body["input"]}] if isinstance(body["input"], str) else body["input"]
        ):
            kind = item.get("type", "message")
            who = "tool" if kind == "function_call_output" else str(item.get("role"))
            said.append((who, flat(item)))
        prompt, results = newest(said)
        tools = tuple(t.get("name", t["type"]) for t in body.get("tools") or [])
        text = "\n".join(text for who, text in said if who not in ("system", "developer"))
        return Turn(prompt, results, tools, text, body["model"], bool(body.get("stream")), 0, body)

    def usage(self, answer: Answer) -> Json:
        t = answer.tokens
        prompt = t.input + t.cached
        return {
            "input_tokens": prompt, "input_tokens_details": {"cached_tokens": t.cached},
            "output_tokens": t.output, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + t.output,
        }  # fmt: skip

    def items(self, answer: Answer, turn: Turn) -> list[Json]:
        made: list[Json] = []
        if answer.reasoning:
            summary = [{"type": "summary_text", "text": answer.reasoning}]
            made.append({"type": "reasoning", "id": f"rs_{turn.number}", "summary": summary})
        if answer.text:
            content = [{"type": "output_text", "text": answer.text, "annotations": []}]
            made.append({
                "type": "message", "id": f"msg_{turn.number}", "role": "assistant", "status": "completed",
                "content": content,
            })  # fmt: skip
        for n, call in enumerate(answer.calls):
            made.append({
                "type": "function_call", "id": f"fc_{turn.number}_{n}", "call_id": f"call_{turn.number}_{n}",
                "name": call.name, "arguments": json.dumps(call.input), "status": "completed",
            })  # fmt: skip
        return made

    def frame(self, answer: Answer, turn: Turn, status: str, output: list[Json]) -> Json:
        cut = {"reason": "max_output_tokens"} if answer.stop == "length" else None
        done = status != "in_progress"
        return {
            "id": f"resp_{turn.number}", "object": "response", "created_at": 1767225600, "model": turn.model,
            "status": status, "output": output, "error": None, "incomplete_details": cut if done else None,
            "usage": self.usage(answer) if done else None,
        }  # fmt: skip

    def whole(self, answer: Answer, turn: Turn) -> Json:
        status = "incomplete" if answer.stop == "length" else "completed"
        return self.frame(answer, turn, status, self.items(answer, turn))

    def pieces(self, answer: Answer, turn: Turn) -> Iterator[bytes]:
        for number, event in enumerate(self.events(answer, turn)):
            yield sse({**event, "sequence_number": number}, event["type"])

    def events(self, answer: Answer, turn: Turn) -> Iterator[Json]:
        begun = self.frame(answer, turn, "in_progress", [])
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        for index, item in enumerate(self.items(answer, turn)):
            where = {"output_index": index, "item_id": item["id"]}
            yield {"type": "response.output_item.added", "output_index": index, "item": self.empty(item)}
            for event in self.deltas(item):
                yield {**event, **where}
            yield {"type": "response.output_item.done", "output_index": index, "item": item}
        last = self.whole(answer, turn)
        yield {"type": f"response.{last['status']}", "response": last}

    def empty(self, item: Json) -> Json:
        blank: Json = {"content": [], "summary": [], "arguments": ""}
        return {k: blank.get(k, v) for k, v in item.items()}

    def deltas(self, item: Json) -> Iterator[Json]:
        if item["type"] == "function_call":
            for part in fragments(item["arguments"]):
                yield {"type": "response.function_call_arguments.delta", "delta": part}
            yield {"type": "response.function_call_arguments.done", "arguments": item["arguments"]}
            return
        key, kind, at = (
            ("content", "response.output_text", "content_index")
            if item["type"] == "message"
            else ("summary", "response.reasoning_summary_text", "summary_index")
        )
        part_kind = "response.content_part" if key == "content" else "response.reasoning_summary_part"
        [part] = item[key]
        yield {"type": f"{part_kind}.added", at: 0, "part": {**part, "text": ""}}
        for text in fragments(part["text"]):
            yield {"type": f"{kind}.delta", at: 0, "delta": text}
        yield {"type": f"{kind}.done", at: 0, "text": part["text"]}
        yield {"type": f"{part_kind}.done", at: 0, "part": part}

    def error_body(self, answer: Answer) -> Json:
        kind = "invalid_request_error" if answer.status < 500 else "server_error"
        code = "context_length_exceeded" if answer.overflow else None
        return {"error": {"message": answer.error, "type": kind, "param": None, "code": code}}

    def too_long(self, answer: Answer) -> Answer:
        words = "Your input exceeds the context window of this model. Please adjust your input and try again."
        return dataclasses.replace(answer, status=400, error=words)


# Gemini


class GeminiFake(Fake):
    """POST /v1beta/models/{model}:generateContent and :streamGenerateContent, as Google's own API does it."""

    kind = "gemini"
    base_path = "/v1beta"

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1beta/models/{model}:countTokens", self.count),
            web.post("/v1beta/models/{model}:{action}", self.answer),
        ]

    async def count(self, request: web.Request) -> web.Response:
        recorded = await self.record(request)
        return web.json_response({"totalTokens": len(json.dumps(recorded.body)) // 4})

    async def record(self, request: web.Request) -> Recorded:
        recorded = await super().record(request)
        recorded.body.setdefault("model", request.match_info["model"])
        return recorded

    def turn(self, body: Json) -> Turn:
        said = []
        for content in body["contents"]:
            for part in content["parts"]:
                who = "tool" if "functionResponse" in part else content.get("role", "user")
                said.append((who, flat(part.get("functionResponse", {}).get("response") or part)))
        prompt, results = newest([(who, text or "") for who, text in said])
        declared = [d for t in body.get("tools") or [] for d in t.get("functionDeclarations") or []]
        text = "\n".join(text for _, text in said)
        return Turn(prompt, results, tuple(d["name"] for d in declared), text, body["model"], True, 0, body)

    def wants_stream(self, request: web.Request, turn: Turn) -> bool:
        return request.match_info["action"] == "streamGenerateContent"

    def parts(self, answer: Answer) -> list[Json]:
        thoughts: list[Json] = [{"text": t, "thought": True} for t in fragments(answer.reasoning)]
        texts: list[Json] = [{"text": t} for t in fragments(answer.text)]
        calls = [{"functionCall": {"name": c.name, "args": c.input}} for c in answer.calls]
        return [*thoughts, *texts, *calls]

    def frame(self, answer: Answer, turn: Turn, parts: list[Json], last: bool) -> Json:
        t = answer.tokens
        candidate: Json = {"content": {"role": "model", "parts": parts}, "index": 0}
        if last:
            candidate["finishReason"] = "MAX_TOKENS" if answer.stop == "length" else "STOP"
        usage = {
            "promptTokenCount": t.input + t.cached, "cachedContentTokenCount": t.cached,
            "candidatesTokenCount": t.output, "totalTokenCount": t.input + t.cached + t.output,
        }  # fmt: skip
        return {
            "candidates": [candidate], "usageMetadata": usage, "modelVersion": turn.model,
            "responseId": f"r{turn.number}",
        }  # fmt: skip

    def whole(self, answer: Answer, turn: Turn) -> Json:
        return self.frame(answer, turn, self.parts(answer), True)

    def pieces(self, answer: Answer, turn: Turn) -> Iterator[bytes]:
        for part in self.parts(answer):
            yield sse(self.frame(answer, turn, [part], False))
        yield sse(self.frame(answer, turn, [{"text": ""}], True))

    STATUSES = (
        (400, "INVALID_ARGUMENT"),
        (429, "RESOURCE_EXHAUSTED"),
        (500, "INTERNAL"),
        (503, "UNAVAILABLE"),
    )

    def error_body(self, answer: Answer) -> Json:
        status = dict(self.STATUSES).get(answer.status, "UNKNOWN")
        return {"error": {"code": answer.status, "message": answer.error, "status": status}}

    def too_long(self, answer: Answer) -> Answer:
        sent, allowed = answer.overflow or (0, 0)
        words = f"The input token count ({sent}) exceeds the maximum number of tokens allowed ({allowed})."
        return dataclasses.replace(answer, status=400, error=words)


FAKES: dict[str, type[Fake]] = {
    fake.kind: fake for fake in (AnthropicFake, OpenAIFake, ResponsesFake, GeminiFake)
}
