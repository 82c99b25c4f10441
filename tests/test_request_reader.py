"""What requests have in common is read, counted, translated and encoded once, and nothing else changes by it."""

from __future__ import annotations

import copy
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_types import JSON_VALUES
from translation import BODIES, upstream

import ccmux
from ccmux import ApiError, Json, Kept, strict_json


class Reader(ccmux.RequestReader):
    """One for which nothing is too small."""

    SMALL = 0
    PREFIX = 12
    RUN = 1


class CountingReader(ccmux.RequestReader):
    finds = scans = 0

    def find(self, kept: dict[bytes, list[ccmux.Element]], raw: bytes, place: int) -> ccmux.Element | None:
        self.finds += 1
        return super().find(kept, raw, place)

    def scan(self, raw: bytes, place: int) -> ccmux.Element:
        self.scans += 1
        return super().scan(raw, place)


def outcome(read: Any, *given: Any) -> Any:
    try:
        return read(*given)
    except ApiError as error:
        return (error.status, error.message)


def message(text: str, role: str = "user") -> Json:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def tool(name: str) -> Json:
    schema = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    return {"name": name, "description": "Reads a file. " * 20, "input_schema": schema}


def conversation(length: int, size: int = 300) -> Json:
    """A request with `length` messages of about `size` bytes."""
    messages = [
        message(f"{n} " + "word " * (size // 5), "assistant" if n % 2 else "user") for n in range(length)
    ]
    return {
        "model": "m", "max_tokens": 10, "system": [{"type": "text", "text": "Be brief. " * 30}],
        "messages": messages, "tools": [tool("Read"), tool("Write")],
    }  # fmt: skip


def test_a_second_turn_shares_all_but_what_is_new() -> None:
    reader = ccmux.RequestReader()
    body = conversation(20)
    first = reader.read(ccmux.compact(body))
    body["messages"] += [message("an answer " * 20, "assistant"), message("and on " * 30)]
    second = reader.read(ccmux.compact(body))
    assert second == body
    for key in ("messages", "tools", "system"):
        assert all(type(part) is Kept for part in first[key])
        assert all(a is b for a, b in zip(first[key], second[key], strict=False))
    assert len(second["messages"]) == 22


def test_a_changed_message_in_the_middle_is_read_anew_and_the_others_are_not() -> None:
    """Claude Code moves its cache_control mark from turn to turn."""
    reader = ccmux.RequestReader()
    body = conversation(10)
    body["messages"][6]["content"][0]["cache_control"] = {"type": "ephemeral"}
    first = reader.read(ccmux.compact(body))
    del body["messages"][6]["content"][0]["cache_control"]
    second = reader.read(ccmux.compact(body))
    assert second == body
    assert [a is b for a, b in zip(first["messages"], second["messages"], strict=True)] == [
        n != 6 for n in range(10)
    ]


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b'{"messages":[],"tools":[ ]}', id="empty arrays"),
        pytest.param(b'{"messages" : [ {"role":"user","content":"hi"} , {"role":"user"} ] }', id="blanks"),
        pytest.param(b'{"messages":[1,"x",null,[],{"a":1}]}', id="elements that are no objects"),
        pytest.param(b'{"messages":"none","tools":{},"system":"text"}', id="no arrays"),
        pytest.param(b'{"x":{"messages":[{"a":1}]},"messages":[{"b":2}]}', id="another array first"),
        pytest.param(b'{"x":{"messages":[{"a":1}]}}', id="only another array"),
        pytest.param(b'{"tools":[{"messages":[{"a":"long enough"}]}],"messages":[{"b":2}]}', id="one inside another"),
        pytest.param(b'{"messages":[{"tools":[{"a":"long enough"}]}],"tools":[{"b":2}]}', id="one inside messages"),
        pytest.param(rb'{"a":"\"messages\":[1]","messages":[{"b":2}]}', id="within a text"),
        pytest.param(b'{"messages":[{"a":"long enough"}],"messages":[]}', id="the array twice"),
        pytest.param(rb'{"messages":[{"a":"long enough"}],"mess\u0061ges":[]}', id="twice, escaped"),
        pytest.param(b'{"messages":[{"a":"long enough","a":2}]}', id="duplicate key in an element"),
        pytest.param(b'{"messages":[{"a":"long enough"},]}', id="comma at the end"),
        pytest.param(b'{"messages":[{"a":"long enough"}', id="cut off behind an element"),
        pytest.param(b'{"messages":[{"a":"long enough"}]', id="cut off behind the array"),
        pytest.param(b'{"messages":[{"a":"long enough"}]}]', id="more behind"),
        pytest.param(b'{"messages":[{"a":"long enough"}{"b":1}]}', id="no comma"),
        pytest.param(b'{"messages":[{"a":"long enough"};{"b":1}]}', id="another separator"),
        pytest.param(b'{"messages":[{"a":NaN,"b":"long enough"}]}', id="NaN"),
        pytest.param(b'{"messages":[{"a":"\xff long enough"}]}', id="not UTF-8"),
        pytest.param('{"messages":[{"a":"é🌹 long enough"},{"b":"日本語"}],"tools":[{"c":"ü"}]}'.encode(), id="UTF-8"),
        pytest.param(b'[{"messages":[{"a":"long enough"}]}]', id="a list at the top"),
        pytest.param(b'"messages":[{"a":"long enough"}]', id="no object around it"),
        pytest.param(b'{"messages":[' + b"[" * 100_000 + b"]}", id="nested without end"),
        pytest.param(b'{"messages":[{"a":' + b"1," * 2_000_001 + b"}]}", id="too much structure"),
    ],
)  # fmt: skip
def test_odd_requests_read_as_strict_json_reads_them(raw: bytes) -> None:
    reader = Reader()
    for _ in range(3):
        assert outcome(reader.read, raw) == outcome(strict_json, raw)


def test_what_is_known_is_known_only_where_an_element_may_stand() -> None:
    """The very bytes of a known element, in places where they are something else."""
    reader = Reader()
    known = ccmux.compact(message("a text that is long enough"))
    reader.read(b'{"messages":[%b]}' % known)
    for raw in (
        b'{"messages":[%b' % known,
        b'{"messages":[%b}' % known,
        b'{"messages":[1%b]}' % known,
        b'{"messages":["%b]}' % known,
        b'{"messages":[{"x":1,"messages":[%b]},%b]}' % (known, known),
        b'{"x":"\\"messages\\":[%b]"}' % known,
        b'"messages":[%b]' % known,
        b'{"messages":[%b],"messages":[%b]}' % (known, known),
        b'{"messages":[%b]]}' % known,
    ):
        assert outcome(reader.read, raw) == outcome(strict_json, raw), raw


PARTS = st.dictionaries(st.text(max_size=6), JSON_VALUES, max_size=4)
REQUESTS = st.fixed_dictionaries(
    {"model": st.text(max_size=5)},
    optional={key: st.lists(PARTS, max_size=5) for key in ("messages", "tools", "system")},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(REQUESTS, min_size=1, max_size=3), st.data())
def test_whatever_came_before_a_request_reads_as_strict_json_reads_it(bodies: list[Json], data: Any) -> None:
    reader = Reader()
    forms = [{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}]
    for body in (*bodies, *bodies):
        raw = json.dumps(body, **data.draw(st.sampled_from(forms))).encode("utf-8", "surrogatepass")
        assert outcome(reader.read, raw) == outcome(strict_json, raw)
        at = data.draw(st.integers(0, len(raw)))
        cut = data.draw(st.integers(0, 3))
        odd = (
            raw[:at]
            + data.draw(st.sampled_from([b"", b",", b"]", b"}", b'"', b"{", b"\\", b" "]))
            + raw[at + cut :]
        )
        assert outcome(reader.read, odd) == outcome(strict_json, odd)
        assert outcome(reader.read, raw) == outcome(strict_json, raw)


def test_a_large_new_request_is_read_as_a_whole_and_learnt_in_steps() -> None:
    reader = ccmux.RequestReader()
    raw = ccmux.compact(conversation(200, 3000))
    first = reader.read(raw)
    assert first == strict_json(raw)
    assert {type(m) for m in first["messages"]} == {dict}
    steps = 0
    while reader.learn():
        assert reader.new <= reader.MOST_NEW + 4000 + reader.EACH
        steps += 1
    assert steps >= len(raw) // reader.MOST_NEW - 1
    assert reader.kept == 200 + 3
    assert {type(m) for m in reader.read(raw)["messages"]} == {Kept}
    assert not reader.unread


def test_a_step_of_learning_does_not_go_through_what_is_known() -> None:
    reader = CountingReader()
    raw = ccmux.compact(conversation(2000))
    assert reader.read(raw) == strict_json(raw)
    finds = [0]
    while reader.learn():
        finds.append(reader.finds - sum(finds))
    assert len(finds) > 8
    assert max(finds) < 1000
    assert reader.read(raw) == strict_json(raw)


def test_a_request_larger_than_what_is_kept_is_not_learnt() -> None:
    """Its end would drive out its beginning, in each of hundreds of steps."""
    for messages, most in (
        (conversation(200, 3000)["messages"], 2**21),
        ([{"content": [{}] * 60}] * 999, 2**22),
    ):
        reader = ccmux.RequestReader(most)
        raw = ccmux.compact({"messages": messages})
        for _ in range(2):
            assert reader.read(raw) == strict_json(raw)
            assert not reader.learn()
        assert bool(reader.kept) is (len(raw) <= most // 6)


def test_learning_forgets_a_request_that_turns_out_broken() -> None:
    reader = ccmux.RequestReader()
    raw = ccmux.compact(conversation(100, 3000))[:-1] + b",}"
    with pytest.raises(ApiError):
        reader.read(raw)
    while reader.learn():
        pass
    assert not reader.unread


def test_what_is_kept_is_bounded_and_what_is_used_stays() -> None:
    reader = ccmux.RequestReader(most=2**20)
    used = ccmux.compact({"messages": [message("used in each turn " * 400)]})
    first = reader.read(used)["messages"][0]
    for number in range(400):
        reader.read(ccmux.compact({"messages": [message(f"{number} of many " * 400)]}))
        assert reader.read(used)["messages"][0] is first
        kept = [
            e
            for by_prefix in (reader.young, reader.old, reader.runs)
            for alike in by_prefix.values()
            for e in alike
        ]
        assert sum(e.weight for e in kept) <= reader.most


def read_often(reader: ccmux.RequestReader, body: Json, times: int = 3) -> Json:
    raw = ccmux.compact(body)
    for _ in range(times):
        given = reader.read(raw)
        while reader.learn():
            pass
        assert given == body
    return given


def run_of(body: Json, key: str = "messages") -> list[Json]:
    """The values of the run that an array begins with."""
    values = body[key]
    return values.run.values if type(values) is ccmux.Elements else []


def test_a_run_grows_with_the_conversation_and_is_found_as_one() -> None:
    reader = ccmux.RequestReader()
    body = conversation(20)
    body["messages"].insert(5, message("Short."))  # not kept by itself
    assert run_of(reader.read(ccmux.compact(body))) == []
    first = reader.read(ccmux.compact(body))
    assert run_of(first) == body["messages"]
    for length in range(1, 2 * reader.RUN):
        body["messages"].append(message(f"more {length} " * 30, "assistant" if length % 2 else "user"))
        given = reader.read(ccmux.compact(body))
        assert given == body
        assert given["messages"][5] is run_of(first)[5]
    assert len(run_of(given)) == 21 + reader.RUN
    assert sum(map(len, reader.runs.values())) == 1  # the longer one in place of the shorter
    weights = [e.weight for kept in (reader.young, reader.runs) for alike in kept.values() for e in alike]
    assert sum(weights) == reader.weight


def test_a_run_ends_where_the_request_is_another() -> None:
    reader = ccmux.RequestReader()
    body = conversation(20)
    read_often(reader, body)
    for messages in (
        body["messages"][:19],
        body["messages"][1:],
        body["messages"][:10] * 2,
        body["messages"][:3],
    ):
        given = read_often(reader, {**body, "messages": messages}, 1)
        assert run_of(given) == (messages if len(messages) >= reader.RUN else [])
    for messages in ([], [1, "x"]):
        assert type(read_often(reader, {**body, "messages": messages}, 1)["messages"]) is list
    grown = {**body, "messages": [*body["messages"], 1, None, message("x" * 200)]}
    assert type(read_often(reader, grown)["messages"]) is list  # not all of them are objects
    assert len(run_of(read_often(reader, body, 1))) == 20


def test_runs_of_conversations_that_begin_alike_are_bounded() -> None:
    reader = ccmux.RequestReader(most=2**20)
    body = conversation(20, 1000)
    for number in range(100):
        body["messages"][-1] = message(f"{number} " * 300)
        body["messages"].insert(1, body["messages"].pop(number % 17 + 2))
        read_often(reader, body, 2)
        kept = [e for k in (reader.young, reader.runs) for alike in k.values() for e in alike]
        assert sum(e.weight for e in kept) == reader.weight <= reader.most // 2
        assert all(len(alike) <= reader.ALIKE for alike in reader.runs.values())


def test_a_run_drives_out_nothing_that_it_is_made_of() -> None:
    reader = CountingReader(most=2**20)
    body = conversation(20, 4000)
    read_often(reader, body)
    for number in range(80):
        body["messages"].append(message(f"{number} " * 60, "assistant" if number % 2 else "user"))
        reader.scans = 0
        read_often(reader, body, 2)
        assert reader.scans <= 1


def test_a_run_may_grow_into_the_room_of_the_shorter_one() -> None:
    reader = ccmux.RequestReader(most=1_400_000)
    body = conversation(20, 4900)
    assert len(run_of(read_often(reader, body))) >= 15
    assert reader.weight > reader.most // 2 - 250_000  # no room for two of them
    for number in range(24):
        body["messages"].append(message(f"{number} " * 60, "assistant" if number % 2 else "user"))
        given = read_often(reader, body, 2)
    assert len(run_of(given)) >= 36


@given(st.lists(PARTS, max_size=8), st.data())
def test_each_of_a_list_with_a_run_is_as_each_of_any_list(values: list[Json], data: Any) -> None:
    at = data.draw(st.integers(0, len(values)))
    end = data.draw(st.integers(at, len(values)))
    run = ccmux.Run(values[at:end])
    elements = ccmux.Elements([*values[:at], *run.values, *values[end:]], run, at)
    for _ in range(2):
        assert ccmux.each(elements, len) == [len(value) for value in values]
        assert json.loads(b"[%b]" % ccmux.joined(elements)) == json.loads(ccmux.compact(values))
    assert elements.apart == (values[:at], values[end:])


def test_small_messages_take_no_more_memory_than_they_weigh_but_half() -> None:
    reader, to = ccmux.RequestReader(most=2**21), upstream("gpt-5")
    tracemalloc.start()
    try:
        before, most = tracemalloc.get_traced_memory()[0], 0
        for number in range(25):
            texts = [f"{number} {n} " + "x" * 100 for n in range(100)]
            body = {
                "messages": [
                    {"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)
                ]
            }
            for _ in range(3):
                given = read_often(reader, body, 1)
                ccmux.request_bytes(ccmux.openai_request(given, to))
                ccmux.items_of(given)
            del body, texts, given
            most = max(most, tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    assert reader.kept > 2000
    assert most <= 1.5 * reader.most


def test_of_elements_that_begin_alike_some_are_kept_and_weighed() -> None:
    reader = ccmux.RequestReader()
    body = {"messages": [message("the same beginning " * 40 + str(n)) for n in range(200)]}
    raw = ccmux.compact(body)
    for _ in range(30):
        assert reader.read(raw) == body
        while reader.learn():
            pass
    (alike,) = reader.young.values()
    (runs,) = reader.runs.values()
    assert len(alike) == reader.ALIKE
    assert reader.weight == sum(element.weight for element in (*alike, *runs))


def test_an_element_larger_than_all_that_is_kept_is_not() -> None:
    reader = ccmux.RequestReader(most=2**20)
    raw = ccmux.compact({"messages": [message("x" * 2**20), message("many", "assistant")]})
    assert reader.read(raw) == strict_json(raw)
    assert not reader.young
    blocks = {
        "role": "user",
        "content": [{"type": "text", "text": ""}] * 4000,
    }  # small in bytes, not in memory
    raw = ccmux.compact({"messages": [blocks]})
    assert reader.read(raw) == strict_json(raw)
    assert not reader.young


@pytest.mark.parametrize(
    "elements", [b"0," * 65_600 + b"0", b"{}," * 30_000 + b"{}", b'{"a":1},' * 20_000 + b'"e"'],
    ids=["numbers", "empty objects", "small objects"],
)  # fmt: skip
def test_many_elements_too_small_to_keep_are_soon_given_up(elements: bytes) -> None:
    reader = CountingReader()
    raw = b'{"messages":[' + elements + b'],"x":"' + b"y" * 2**20 + b'"}'
    assert reader.read(raw) == strict_json(raw)
    assert reader.scans <= reader.MOST_NEW // reader.EACH + 2
    assert not reader.learn()
    assert reader.scans <= 2 * (reader.MOST_NEW // reader.EACH + 2)


def test_what_is_kept_with_a_turn_is_no_larger_than_it() -> None:
    """Results for thousands of calls that a small message leaves open are made anew each time."""
    reader, to = Reader(), upstream("gpt-5")
    calls = [{"type": "tool_use", "id": f"call_{n}", "name": "Read", "input": {}} for n in range(50)]
    results = [{"type": "tool_result", "tool_use_id": f"call_{n}", "content": "found"} for n in range(50)]
    for content in ([{"type": "text", "text": "never mind"}], results[:49], results):
        body = {
            "messages": [
                message("go"),
                {"role": "assistant", "content": calls},
                {"role": "user", "content": content},
            ]
        }
        kept = reader.read(ccmux.compact(body))
        assert ccmux.openai_request(kept, to) == ccmux.openai_request(strict_json(ccmux.compact(body)), to)
        made = ccmux.once(kept["messages"][2], ccmux.turn_of).made
        assert made is not None
        lists = [value for value in made.values() if isinstance(value, list)]
        assert [len(value) for value in lists] == ([50] if content == results else [])


def test_a_kept_message_that_stands_twice_calls_its_tool_once() -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a file"}}
    body = {"messages": [message("go"), *2 * [{"role": "assistant", "content": [call]}]]}
    plain, kept = strict_json(ccmux.compact(body)), Reader().read(ccmux.compact(body))
    assert kept["messages"][1] is kept["messages"][2]
    for translate in (ccmux.openai_request, ccmux.responses_request, ccmux.gemini_request):
        assert translate(kept, upstream("gpt-5")) == translate(plain, upstream("gpt-5"))


def test_a_kept_result_answers_the_call_it_follows() -> None:
    reader, to = Reader(), upstream("gemini-3.8-flash")
    results = [{"type": "tool_result", "tool_use_id": "a", "content": "found" * 50}]
    for name in ("Read", "Grep"):
        call = {"type": "tool_use", "id": "a", "name": name, "input": {}}
        body = {
            "messages": [
                message("go"),
                {"role": "assistant", "content": [call]},
                {"role": "user", "content": results},
            ]
        }
        sent = ccmux.gemini_request(reader.read(ccmux.compact(body)), to)
        assert sent["contents"][2]["parts"][0]["functionResponse"]["name"] == name


def test_one_translation_is_kept_with_a_turn() -> None:
    kept = Reader().read(ccmux.compact(conversation(3)))
    for model in "abcd":
        ccmux.openai_request(kept, upstream(model))
        ccmux.gemini_request(kept, upstream(model))
    made = [ccmux.once(message, ccmux.turn_of).made for message in kept["messages"]]
    assert [sum(isinstance(value, list) for value in (m or {}).values()) for m in made] == [1, 1, 1]


def test_long_names_are_not_remembered() -> None:
    before = ccmux.plain_name.cache_info().currsize
    for number in range(3):
        name = f"{number}-" + "x" * 300
        assert ccmux.upstream_name(name) == ccmux.upstream_name(name) != name
    assert ccmux.plain_name.cache_info().currsize == before


@settings(max_examples=150, deadline=None)
@given(body=BODIES)
def test_kept_conversations_are_translated_as_others_are_and_never_changed(body: Any) -> None:
    raw = ccmux.compact(body)
    reader = Reader()
    plain = strict_json(raw)
    targets = [upstream("gpt-5"), upstream("m", files=True, midway_system=True, reasoning_replay="all")]
    for to in (*targets, *targets):
        kept = reader.read(raw)
        before = copy.deepcopy(kept)
        for translate in (ccmux.openai_request, ccmux.responses_request, ccmux.gemini_request):
            ours, theirs = outcome(translate, kept, to), outcome(translate, plain, to)
            assert ours == theirs
            if isinstance(ours, dict):
                assert json.loads(ccmux.request_bytes(ours)) == json.loads(ccmux.compact(theirs))
        for model in ("m", "claude-x"):
            lighter = ccmux.without_foreign_thinking(kept, model)
            assert lighter == ccmux.without_foreign_thinking(plain, model)
        assert ccmux.without_thinking(kept) == ccmux.without_thinking(plain)
        assert kept == before == plain


def test_a_translation_is_made_and_encoded_once() -> None:
    reader, to = ccmux.RequestReader(), upstream("gpt-5")
    raw = ccmux.compact(conversation(20))
    first = ccmux.openai_request(reader.read(raw), to)
    second = ccmux.openai_request(reader.read(raw), to)
    third = ccmux.openai_request(reader.read(raw), to)
    for key in ("messages", "tools"):
        same = [a is b is c for a, b, c in zip(first[key], second[key], third[key], strict=True)]
        assert all(same[1:] if key == "messages" else same)  # the system message is put together each time
    assert second["messages"].run is third["messages"].run
    assert len(third["messages"].run.values) == 19  # the last turn may go on
    other = ccmux.openai_request(reader.read(raw), upstream("gpt-5", tool_id="[a-z]{9}"))
    assert not any(a is b for a, b in zip(first["messages"], other["messages"], strict=True))
    encoded = [ccmux.request_bytes(out) for out in (first, second, third, third)]
    assert len(set(encoded)) == 1


def test_results_of_one_call_are_not_taken_for_those_of_another() -> None:
    """The same user message after two different calls: its translation depends on what it answers."""
    reader, to = Reader(), upstream("gpt-5")
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "found"}]}
    for id, told in (("a", "found"), ("b", ccmux.NO_RESULT), ("a", "found")):
        call = {"role": "assistant", "content": [{"type": "tool_use", "id": id, "name": "Read", "input": {}}]}
        out = ccmux.openai_request(
            reader.read(ccmux.compact({"messages": [message("go"), call, result]})), to
        )
        answers = [m for m in out["messages"] if m["role"] == "tool"]
        assert [(m["tool_call_id"], m["content"]) for m in answers] == [(id, told)]


def test_counting_knows_kept_parts_again_and_tells_changed_ones_apart() -> None:
    reader = ccmux.RequestReader()
    body = conversation(20)
    hashes = [item.hash for item in ccmux.items_of(reader.read(ccmux.compact(body)))]
    for _ in range(3):
        assert hashes == [item.hash for item in ccmux.items_of(reader.read(ccmux.compact(body)))]
    body["messages"][3]["content"][0]["number"] = 1
    body["tools"][1]["input_schema"]["minProperties"] = 1
    changed = [item.hash for item in ccmux.items_of(reader.read(ccmux.compact(body)))]
    differ = [n for n, (a, b) in enumerate(zip(hashes, changed, strict=True)) if a != b]
    assert differ == [4, 21]  # the message behind the system prompt, and the tools
    plain, kept = strict_json(ccmux.compact(body)), reader.read(ccmux.compact(body))
    counter = ccmux.TokenCounter(lambda name: None)
    assert counter.count_now(plain, "p", "gpt-5") == counter.count_now(kept, "p", "gpt-5")


def test_kept_parts_that_differ_in_numbers_alone_are_counted_apart() -> None:
    reader, counter = Reader(), ccmux.TokenCounter(lambda name: None)
    for length in (1, 300):
        numbers = {"enum": list(range(length))}
        body = conversation(2) | {
            "system": [{"type": "of another kind", **numbers}],
            "tools": [{"name": "Read", "input_schema": {"properties": {"n": numbers}}}],
        }
        kept = reader.read(ccmux.compact(body))
        assert {type(part) for part in (*kept["system"], *kept["tools"])} == {Kept}
        for key in ("system", "tools"):
            one = {k: v for k, v in kept.items() if k in ("messages", key)}
            plain = ccmux.TokenCounter(lambda name: None).count_now(json.loads(json.dumps(one)), "p", "gpt-5")
            assert counter.count_now(one, "p", "gpt-5") == plain


def test_a_kept_message_that_stands_twice_is_joined_to_the_tools_once() -> None:
    body = conversation(2)
    del body["system"]
    body["messages"] += 3 * [message("a reminder", "system")]
    kept = Reader().read(ccmux.compact(body))
    assert kept["messages"][2] is kept["messages"][4]
    assert [item.kind for item in ccmux.items_of(kept)] == ["", "", "joined", "", "", "tools"]


def test_no_more_is_kept_with_a_part_than_a_dozen_things() -> None:
    made = ccmux.Made()
    for number in range(100):
        assert made.once(number, lambda: number) == number  # noqa: B023
        assert made.once(number, lambda: -1) == number
        assert len(made) <= made.MOST


@pytest.mark.parametrize("unit", ["[]", "{}", "[1]", "[[]]", '{"a":1}', '"a"'])
def test_an_element_weighs_what_it_takes(unit: str) -> None:
    """Else what clients send would take several times the memory that the reader may."""
    raw = b'{"role":"user","x":[%b]}' % b",".join([unit.encode()] * 20_000)
    tracemalloc.start()
    value = json.loads(raw)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ccmux.Element(raw, value).weight >= taken
