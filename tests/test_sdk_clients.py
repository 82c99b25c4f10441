"""The Anthropic SDK as a client of ccmux, on every kind of provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import anthropic
import pytest
from anthropic import AsyncAnthropic, beta_async_tool
from conftest import Start, config_for
from fakes import FAKES, Answer, Call, Fake, Script, Tokens, Turn
from proxy_harness import Proxy, in_process

KINDS = pytest.mark.parametrize("kind", FAKES)
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def start_ccmux(tmp_path: Path) -> Start:
    return lambda text: in_process(tmp_path, text)


@asynccontextmanager
async def sdk_on(
    kind: str, start: Start, script: Script, extra: str = ""
) -> AsyncIterator[tuple[AsyncAnthropic, Fake, Proxy]]:
    """The SDK without retries of its own, pointed at ccmux, pointed at a fake."""
    async with (
        FAKES[kind](script) as fake,
        start(config_for(fake, extra=extra)) as ccmux,
        AsyncAnthropic(base_url=ccmux.url, api_key="client-key-123", max_retries=0) as client,
    ):
        yield client, fake, ccmux


def ask(client: AsyncAnthropic, **more):
    return client.messages.create(**({"model": "tiny", "max_tokens": 500, "messages": HELLO} | more))


async def whole(client: AsyncAnthropic, streamed: bool, **more) -> anthropic.types.Message:
    """The message, however it is asked for."""
    asked = {"model": "tiny", "max_tokens": 500, "messages": HELLO} | more
    if not streamed:
        return await client.messages.create(**asked)
    async with client.messages.stream(**asked) as stream:
        return await stream.get_final_message()


def always(answer: Answer) -> Script:
    return lambda turn: answer


TEXT = 'Grüße \U0001f339 from <the> model\nin "two" lines.'


@KINDS
async def test_a_whole_answer(kind: str, start_ccmux: Start) -> None:
    tokens = Tokens(input=100, output=20, cached=50)
    async with sdk_on(kind, start_ccmux, always(Answer(text=TEXT, tokens=tokens))) as (client, fake, _):
        message = await ask(client)
    assert [(b.type, b.text) for b in message.content] == [("text", TEXT)]
    assert (message.stop_reason, message.role, message.type) == ("end_turn", "assistant", "message")
    usage = message.usage
    assert (usage.input_tokens, usage.output_tokens, usage.cache_read_input_tokens) == (100, 20, 50)
    assert fake.asked[0].headers.get("x-api-key") != "client-key-123"


@KINDS
async def test_a_streamed_answer(kind: str, start_ccmux: Start) -> None:
    tokens = Tokens(input=100, output=20, cached=50)
    async with (
        sdk_on(kind, start_ccmux, always(Answer(text=TEXT, tokens=tokens))) as (client, _, _),
        client.messages.stream(model="tiny", max_tokens=500, messages=HELLO) as stream,
    ):
        pieces = [piece async for piece in stream.text_stream]
        message = await stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == message.content[0].text == TEXT
    assert (message.usage.input_tokens, message.usage.output_tokens) == (100, 20)


def weather(turn: Turn) -> Answer:
    if turn.results:
        return Answer(text=f"It is {turn.results[0]}.")
    call = Call("get_weather", {"city": "Zürich", "days": [1, 2], "deep": {"a": None}})
    return Answer(text="I will look.", calls=(call,))


@KINDS
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_tool_round(kind: str, streamed: bool, start_ccmux: Start) -> None:
    async with sdk_on(kind, start_ccmux, weather) as (client, fake, _):
        first = await whole(client, streamed, tools=[WEATHER])
        text, call = first.content
        assert (first.stop_reason, text.text, call.name) == ("tool_use", "I will look.", "get_weather")
        assert call.input == {"city": "Zürich", "days": [1, 2], "deep": {"a": None}}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        answered = [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = await whole(client, streamed, messages=[*HELLO, *answered], tools=[WEATHER])
    assert (second.content[0].text, second.stop_reason) == ("It is sunny.", "end_turn")
    assert len(fake.asked) == 2


@KINDS
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_the_tool_runner_keeps_the_conversation(kind: str, streamed: bool, start_ccmux: Start) -> None:
    """It would leave to the server what was said before, which only Anthropic's own keeps."""

    @beta_async_tool
    async def get_weather(city: str, days: list[int], deep: dict[str, None]) -> str:
        """The weather of a city"""
        return f"sunny in {city}"

    async with sdk_on(kind, start_ccmux, weather) as (client, fake, _):
        runner = client.beta.messages.tool_runner(
            model="tiny",
            max_tokens=500,
            messages=HELLO,
            tools=[get_weather],
            stream=streamed,
            max_iterations=3,
        )
        message = await runner.until_done()
    assert message.content[0].text == "It is sunny in Zürich."
    assert len(fake.asked) == 2
    assert all("hello" in str(request.body) for request in fake.asked)


@pytest.mark.parametrize("kind", [kind for kind in FAKES if kind != "anthropic"])
async def test_a_tool_added_in_mid_conversation_is_called(kind: str, start_ccmux: Start) -> None:
    added = {**WEATHER, "name": "weather.of a city"}  # no upstream takes this name as it is
    change = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": added}}

    def script(turn: Turn) -> Answer:
        return Answer(calls=tuple(Call(name, {"city": "Bern"}) for name in turn.tools))

    async with sdk_on(kind, start_ccmux, script) as (client, _, _):
        asked = [*HELLO, {"role": "system", "content": [change]}]
        message = await client.beta.messages.create(model="tiny", max_tokens=500, messages=asked)
    assert [(b.name, b.input) for b in message.content] == [("weather.of a city", {"city": "Bern"})]


@KINDS
async def test_two_tools_at_once(kind: str, start_ccmux: Start) -> None:
    calls = tuple(Call("get_weather", {"city": city}) for city in ("Rome", "Oslo"))
    async with sdk_on(kind, start_ccmux, always(Answer(calls=calls))) as (client, _, _):
        message = await ask(client, tools=[WEATHER])
    assert [b.input["city"] for b in message.content] == ["Rome", "Oslo"]
    assert len({b.id for b in message.content}) == 2


@KINDS
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_thinking(kind: str, streamed: bool, start_ccmux: Start) -> None:
    script = always(Answer(reasoning="First I think.", text="Then I speak."))
    async with sdk_on(kind, start_ccmux, script) as (client, fake, _):
        message = await whole(client, streamed)
        thought, text = message.content
        assert (thought.type, thought.thinking) == ("thinking", "First I think.")
        assert text.text == "Then I speak."
        again = [*HELLO, {"role": "assistant", "content": message.content}, *HELLO]
        assert (await ask(client, messages=again)).content[1].text == "Then I speak."
    assert len(fake.asked) == 2


@KINDS
async def test_an_answer_cut_by_its_limit(kind: str, start_ccmux: Start) -> None:
    async with sdk_on(kind, start_ccmux, always(Answer(text="half", stop="length"))) as (client, _, _):
        assert (await ask(client)).stop_reason == "max_tokens"


ERRORS = [
    pytest.param(400, anthropic.BadRequestError, "invalid_request_error", id="400"),
    pytest.param(404, anthropic.NotFoundError, "not_found_error", id="404"),
    pytest.param(413, anthropic.APIStatusError, "request_too_large", id="413"),
    pytest.param(429, anthropic.RateLimitError, "rate_limit_error", id="429"),
    pytest.param(500, anthropic.InternalServerError, "api_error", id="500"),
    pytest.param(529, anthropic.InternalServerError, "overloaded_error", id="529"),
]


@KINDS
@pytest.mark.parametrize(("status", "exception", "error_type"), ERRORS)
async def test_an_upstreams_error_is_the_sdks_exception(
    kind: str, status: int, exception: type, error_type: str, start_ccmux: Start
) -> None:
    failure = always(Answer(status=status, error="The upstream's own words"))
    async with sdk_on(kind, start_ccmux, failure) as (client, _, _):
        with pytest.raises(exception) as caught:
            await ask(client, stream=status > 404)
    error = caught.value
    assert (error.status_code, error.body["error"]["type"]) == (status, error_type)
    assert "The upstream's own words" in error.body["error"]["message"]
    assert error.request_id


@KINDS
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_provider_key_is_not_the_clients_fault(
    kind: str, status: int, start_ccmux: Start
) -> None:
    failure = always(Answer(status=status, error="bad key sk-upstream-0-0123456789"))
    async with sdk_on(kind, start_ccmux, failure) as (client, _, _):
        with pytest.raises(anthropic.InternalServerError) as caught:
            await ask(client)
    assert (caught.value.status_code, caught.value.response.headers["x-should-retry"]) == (500, "false")
    assert "sk-upstream" not in str(caught.value)


@KINDS
async def test_an_overflow_has_the_words_the_client_acts_on(kind: str, start_ccmux: Start) -> None:
    async with sdk_on(kind, start_ccmux, always(Answer(overflow=(210_000, 200_000)))) as (client, _, _):
        with pytest.raises(anthropic.BadRequestError, match=r"too long: 2\d+ tokens > 200000 maximum"):
            await ask(client)


@KINDS
async def test_a_stream_that_breaks_after_content_is_an_error(kind: str, start_ccmux: Start) -> None:
    broken = always(Answer(text="many words, " * 50 + "end", cut=8, pause=0.01))
    async with sdk_on(kind, start_ccmux, broken) as (client, _, _):
        said = ""
        with pytest.raises(anthropic.APIStatusError):
            async with client.messages.stream(model="tiny", max_tokens=9, messages=HELLO) as stream:
                async for piece in stream.text_stream:
                    said += piece
    assert said
    assert "end" not in said


@KINDS
async def test_retries_of_the_sdk_heal_an_overload(kind: str, start_ccmux: Start) -> None:
    def script(turn: Turn) -> Answer:
        return Answer(status=529, error="busy") if turn.number == 0 else Answer(text="here")

    async with sdk_on(kind, start_ccmux, script) as (client, _, _):
        assert (await ask(client.with_options(max_retries=2))).content[0].text == "here"


@KINDS
async def test_a_client_that_leaves_ends_the_upstream(kind: str, start_ccmux: Start) -> None:
    async with sdk_on(kind, start_ccmux, always(Answer(text=TEXT * 10, pause=0.02))) as (client, fake, _):
        async with client.messages.stream(model="tiny", max_tokens=9, messages=HELLO) as stream:
            async for _ in stream.text_stream:
                break
        async with asyncio.timeout(2):
            while not fake.asked[0].hung_up:
                await asyncio.sleep(0.01)
    assert not fake.asked[0].answered


@KINDS
async def test_count_tokens(kind: str, start_ccmux: Start) -> None:
    async with sdk_on(kind, start_ccmux, always(Answer())) as (client, _, _):
        short = await client.messages.count_tokens(model="tiny", messages=HELLO)
        text = [{"role": "user", "content": "hello there, " * 200}]
        long = await client.messages.count_tokens(model="tiny", messages=text, tools=[WEATHER])
    assert 0 < short.input_tokens < 200
    assert long.input_tokens > short.input_tokens + 300


@KINDS
async def test_models(kind: str, start_ccmux: Start) -> None:
    async with sdk_on(kind, start_ccmux, always(Answer(text="hi"))) as (client, _, _):
        models = [m async for m in client.models.list(limit=1000)]
        ids = [m.id for m in models]
        assert {"tiny", "anthropic/tiny"} <= set(ids)
        assert all(m.display_name for m in models)
        one = await client.models.retrieve("tiny")
        assert one.id == "tiny"
        for model in (*models, one):  # what the package's own types ask for, as it does not check that itself
            type(model).model_validate(model.model_dump())
        message = await ask(client, model="anthropic/tiny")
        assert message.content[0].text == "hi"
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("no-such-model")


@KINDS
async def test_a_model_nobody_serves_is_not_found(kind: str, start_ccmux: Start) -> None:
    async with sdk_on(kind, start_ccmux, always(Answer())) as (client, fake, _):
        with pytest.raises(anthropic.NotFoundError, match="did you mean 'tiny'"):
            await ask(client, model="tinny")
    assert not fake.asked


@KINDS
async def test_the_answer_tells_its_way(
    kind: str, start_ccmux: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with sdk_on(kind, start_ccmux, always(Answer(text="hi"))) as (client, _, _):
        raw = await client.messages.with_raw_response.create(model="claude-x", max_tokens=9, messages=HELLO)
    told = {k: v for k, v in raw.headers.items() if k.startswith("x-ccmux-")}
    assert told == {
        "x-ccmux-provider": "p0", "x-ccmux-model": "tiny", "x-ccmux-route": "default",
        "x-ccmux-attempts": "1",
    }  # fmt: skip
    assert raw.headers["request-id"]
    [line] = [line for line in caplog.messages if "provider=p0" in line or "target=p0" in line]
    assert "hello" not in line


@pytest.mark.parametrize(("first", "second"), list(pairwise([*FAKES, "anthropic"])))
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_the_next_target_takes_over(
    first: str, second: str, streamed: bool, start_ccmux: Start
) -> None:
    failing = FAKES[first](always(Answer(status=529, error="busy")))
    good = FAKES[second](always(Answer(text=TEXT)))
    async with (
        failing,
        good,
        start_ccmux(config_for(failing, good)) as ccmux,
        AsyncAnthropic(base_url=ccmux.url, api_key="k", max_retries=0) as client,
    ):
        message = await whole(client, streamed)
    assert message.content[0].text == TEXT
    assert (len(failing.asked), len(good.asked)) == (1, 1)
