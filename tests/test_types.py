"""Types and errors: strict JSON, error types, key scrubbing, and the small readers of wire data."""

from __future__ import annotations

import json
import sys
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ccmux
from ccmux import ApiError, Price, Usage, error_type, scrub, strict_json


@pytest.mark.parametrize(
    ("data", "value"),
    [
        pytest.param(b"{}", {}, id="empty object"),
        pytest.param(b' {"a" : [1, null, true, "x"]}\n', {"a": [1, None, True, "x"]}, id="white space"),
        pytest.param('{"a": "é🌹"}'.encode(), {"a": "é🌹"}, id="UTF-8"),
        pytest.param(rb'{"a": "\ud83c\udf39"}', {"a": "🌹"}, id="escaped pair"),
        pytest.param(rb'{"a": "\ud800"}', {"a": "\ud800"}, id="lone surrogate"),
        pytest.param(b'{"a": 1e308}', {"a": 1e308}, id="largest exponent"),
        pytest.param(b'{"a": 1e-999}', {"a": 0.0}, id="number too small for a float"),
        pytest.param(b'{"a": 9007199254740993}', {"a": 9007199254740993}, id="integer beyond a double"),
        pytest.param(b'{"a": {"a": {"a": 1}}}', {"a": {"a": {"a": 1}}}, id="the same key at other levels"),
        pytest.param(b'{"a": "' + b"{[,:" * 10 + b'"}', {"a": "{[,:" * 10}, id="structure within a text"),
        pytest.param(b'{"": 1}', {"": 1}, id="empty key"),
    ],
)
def test_strict_json_takes(data: bytes, value: object) -> None:
    assert strict_json(data) == value


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        pytest.param(b'{"a": 1, "a": 2}', 400, "duplicate key 'a'", id="duplicate key"),
        pytest.param(b'{"m": [{"x": {"b": 1, "c": 2, "b": 1}}]}', 400, "duplicate key 'b'", id="deep duplicate"),
        pytest.param(rb'{"a": 1, "\u0061": 2}', 400, "duplicate key 'a'", id="escaped duplicate"),
        pytest.param(b"{" + b"".join(b'"%d": 1, ' % n for n in range(200_000)) + b'"last": 1, "last": 2}', 400,
                     "duplicate key 'last'", id="a duplicate among many"),  # 400 s where each is counted
        pytest.param(b'{"a": NaN}', 400, "NaN is not JSON", id="NaN"),
        pytest.param(b'{"a": Infinity}', 400, "Infinity is not JSON", id="Infinity"),
        pytest.param(b'{"a": -Infinity}', 400, "-Infinity is not JSON", id="minus Infinity"),
        pytest.param(b'{"a": 1e999}', 400, "too large", id="number that overflows"),
        pytest.param(b'{"a": -1e999}', 400, "too large", id="negative number that overflows"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", 400, "not valid JSON", id="integer of 5,000 digits"),
        pytest.param(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "nested too deeply", id="deep lists"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "nested too deeply", id="deep objects"),
        pytest.param(b"[" * 100_000, 400, "nested too deeply", id="deep and never closed"),
        pytest.param(b"[1, 2]", 400, "must be a JSON object", id="a list"),
        pytest.param(b'"text"', 400, "must be a JSON object", id="a text"),
        pytest.param(b"null", 400, "must be a JSON object", id="null"),
        pytest.param(b"", 400, "not valid JSON", id="nothing"),
        pytest.param(b'{"a": 1', 400, "not valid JSON", id="cut off"),
        pytest.param(b'{"a": 1} {"b": 2}', 400, "not valid JSON", id="two objects"),
        pytest.param(b"{'a': 1}", 400, "not valid JSON", id="single quotes"),
        pytest.param(b'{"a": 1,}', 400, "not valid JSON", id="comma at the end"),
        pytest.param(b'{"a": "\n"}', 400, "not valid JSON", id="a control character in a text"),
        pytest.param(b'\xef\xbb\xbf{"a": 1}', 400, "not valid JSON", id="byte order mark"),
        pytest.param(b'{"a": "\xff"}', 400, "not UTF-8 (byte 7)", id="not UTF-8"),
        pytest.param('{"a": 1}'.encode("utf-16"), 400, "not UTF-8", id="UTF-16"),
        pytest.param(b'{"a": "\xed\xa0\x80"}', 400, "not UTF-8", id="surrogate as UTF-8 bytes"),
        pytest.param(b'{"a": "\xc0\xaf"}', 400, "not UTF-8", id="overlong UTF-8"),
        pytest.param(b'{"a": [' + b"1," * 2_000_001 + b"1]}", 413, "structural", id="two million commas"),
        pytest.param(b'{"a": [' + b"[]," * 700_000 + b"1]}", 200, "", id="wide but within the limit"),
    ],
)  # fmt: skip
def test_strict_json_refuses(data: bytes, status: int, words: str) -> None:
    if status == 200:
        assert strict_json(data)
        return
    with pytest.raises(ApiError) as caught:
        strict_json(data)
    assert (caught.value.status, words in caught.value.message) == (status, True), caught.value.message
    assert caught.value.type == error_type(status)
    assert len(caught.value.message) < 300


def test_strict_json_names_what_it_read() -> None:
    with pytest.raises(ApiError, match=r"^request\.json is not UTF-8"):
        strict_json(b"\xff", "request.json")


def test_strict_json_counts_the_limit_exactly() -> None:
    list_of = b'{"a":[' + b"," * (ccmux.MAX_STRUCTURE - 3)
    with pytest.raises(ApiError) as at_the_limit:
        strict_json(list_of + b"]}")
    with pytest.raises(ApiError) as above:
        strict_json(list_of + b",]}")
    assert (at_the_limit.value.status, above.value.status) == (400, 413)


def test_strict_json_leaves_the_recursion_limit_alone() -> None:
    before = sys.getrecursionlimit()
    with pytest.raises(ApiError):
        strict_json(b"[" * 100_000)
    assert sys.getrecursionlimit() == before


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_strict_json_reads_what_json_writes(value: dict) -> None:
    assert strict_json(json.dumps(value).encode()) == value
    assert strict_json(ccmux.compact(value)) == value


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_strict_json_says_yes_or_an_api_error(data: bytes) -> None:
    try:
        assert isinstance(strict_json(data), dict)
    except ApiError as error:
        assert error.status == 400


TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 405: "invalid_request_error", 408: "timeout_error", 409: "conflict_error",
    413: "request_too_large", 415: "invalid_request_error", 418: "invalid_request_error",
    421: "invalid_request_error", 422: "invalid_request_error", 429: "rate_limit_error",
    431: "invalid_request_error", 500: "api_error", 502: "api_error", 503: "api_error", 504: "timeout_error",
    520: "api_error", 529: "overloaded_error",
}  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), TYPES.items())
def test_error_type_of_a_status(status: int, kind: str) -> None:
    assert error_type(status) == kind
    body = ApiError(status, "why").body("req_1")
    assert body == {"type": "error", "error": {"type": kind, "message": "why"}, "request_id": "req_1"}


def test_an_error_may_have_a_type_of_its_own() -> None:
    assert ApiError(429, "spent", type="billing_error").body("r")["error"]["type"] == "billing_error"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        pytest.param("key sk-ant-api03-abcdefgh12345678 is bad", "key [key] is bad", id="Anthropic's"),
        pytest.param("sk-proj-AbCd_1234567890-xyz", "[key]", id="OpenAI's project key"),
        pytest.param("sk-or-v1-0123456789abcdef", "[key]", id="OpenRouter's"),
        pytest.param("gsk_abcdefgh1234", "[key]", id="Groq's"),
        pytest.param("xai-abcdefgh1234", "[key]", id="xAI's"),
        pytest.param("AIzaSyA-1234567890_abc", "[key]", id="Google's"),
        pytest.param("Authorization: Bearer abc.def-ghi_jkl", "Authorization: Bearer [key]", id="Bearer"),
        pytest.param('"bearer  eyJhbGciOi.J9+/="', '"bearer  [key]"', id="bearer, lower case"),
        pytest.param("my own secret-value-1 here", "my own [key] here", id="a configured one"),
        pytest.param("secret-value-1-longer", "[key]-longer", id="a configured one within a word"),
        pytest.param("secret-value-1 secret-value-1", "[key] [key]", id="twice"),
        pytest.param("an abc is no secret", "an abc is no secret", id="a secret too short to take out"),
        pytest.param("task-force desk-1234567890", "task-force desk-1234567890", id="words that end in sk"),
        pytest.param("sk-1", "sk-1", id="too short to be a key"),
        pytest.param("the bearer of news", "the bearer of news", id="bearer as a word"),
        pytest.param("", "", id="nothing"),
    ],
)  # fmt: skip
def test_scrub(text: str, clean: str) -> None:
    assert scrub(text, ["secret-value-1", "abc", ""]) == clean


@pytest.mark.parametrize(
    ("content", "blocks"),
    [
        pytest.param("hi", [{"type": "text", "text": "hi"}], id="string"),
        pytest.param("", [], id="empty string"),
        pytest.param(None, [], id="absent"),
        pytest.param(7, [], id="a number"),
        pytest.param({"type": "text"}, [], id="an object"),
        pytest.param([{"type": "x"}, "hi", "", 3, None], [{"type": "x"}, {"type": "text", "text": "hi"}], id="mixed"),
    ],
)  # fmt: skip
def test_blocks_of(content: object, blocks: list) -> None:
    assert ccmux.blocks_of(content) == blocks


@pytest.mark.parametrize(
    ("content", "text"),
    [
        pytest.param("hi", "hi", id="string"),
        pytest.param([{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
                     "a\n\nb",
                     id="blocks"),
        pytest.param([{"type": "text"}, {"type": "text", "text": None}], "\n\n", id="blocks without text"),
        pytest.param(None, "", id="absent"),
    ],
)  # fmt: skip
def test_text_of(content: object, text: str) -> None:
    assert ccmux.text_of(content) == text


@pytest.mark.parametrize(
    ("body", "messages", "tools"),
    [
        pytest.param({}, [], [], id="absent"),
        pytest.param({"messages": "x", "tools": {}}, [], [], id="of a wrong type"),
        pytest.param({"messages": [1, {"a": 1}], "tools": [None, {"b": 2}]}, [{"a": 1}], [{"b": 2}], id="mixed"),
    ],
)  # fmt: skip
def test_messages_and_tools_of(body: dict, messages: list, tools: list) -> None:
    assert (ccmux.messages_of(body), ccmux.tools_of(body)) == (messages, tools)


def test_usage_is_disjoint() -> None:
    assert Usage(1, 2, 4, 8, 16).prompt == 29


def test_own_data_cannot_be_changed() -> None:
    for value in (Usage(), Price(Decimal(1), Decimal(2))):
        with pytest.raises(AttributeError):
            value.input = 5
        assert not hasattr(value, "__dict__")


def test_compact_is_ascii_without_spaces() -> None:
    assert ccmux.compact({"a": [1, "é\ud800"]}) == rb'{"a":[1,"\u00e9\ud800"]}'
