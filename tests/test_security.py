"""The threat list, attacked with raw sockets: one row, one attack.

One ccmux, with canary keys in its config, its environment and its provider's errors, takes all the attacks of this
file; the last tests look for the canaries in everything it ever said or wrote.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import re
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fault_server as fs
import pytest
from attacks import (
    ADMIN_TOKEN,
    CANARIES,
    CLIENT_KEY,
    FORGED_LINE,
    HOSTILE_HEADERS,
    LEAK,
    Answer,
    Upstream,
    Victim,
    until,
    victim,
)
from proxy_harness import ROOT, in_process, message_body, provider_row

import ccmux

MESSAGE = ccmux.compact({**message_body(False), "model": "claude-d"})


@pytest.fixture(scope="module")
def ccm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(tmp_path_factory.mktemp("victim")) as running:
        yield running


# Every endpoint there is: (method, path).

V1 = [
    ("POST", "/v1/messages"), ("POST", "/v1/messages?beta=true"), ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/models"), ("GET", "/v1/models/claude-a"), ("POST", "/v1/chat/completions"),
]  # fmt: skip
USER_API = [
    ("GET", "/api/me"), ("GET", "/api/models"), ("GET", "/api/usage"), ("GET", "/api/transactions"),
    ("GET", "/api/requests"), ("GET", "/api/export"), ("POST", "/api/purchase"),
]  # fmt: skip
ADMIN_API = [
    ("GET", "/admin/api/state"), ("PUT", "/admin/api/providers/own"), ("DELETE", "/admin/api/providers/none"),
    ("POST", "/admin/api/providers/own/test"), ("GET", "/admin/api/providers/own/models"),
    ("PUT", "/admin/api/models/x"), ("DELETE", "/admin/api/models/none"), ("PUT", "/admin/api/router"),
    ("PUT", "/admin/api/credits"), ("GET", "/admin/api/backups"), ("GET", "/admin/api/config"),
    ("PUT", "/admin/api/config"), ("GET", "/admin/api/users"), ("POST", "/admin/api/users"),
    ("PATCH", "/admin/api/users/local"), ("POST", "/admin/api/users/local/credit"),
    ("POST", "/admin/api/users/nobody/key"), ("GET", "/admin/api/users/local/transactions"),
    ("GET", "/admin/api/report"), ("GET", "/admin/api/export"), ("GET", "/admin/api/requests"),
    ("GET", "/admin/api/events"), ("POST", "/admin/api/explain"), ("POST", "/admin/api/try"),
    ("GET", "/admin/api/inspect"), ("PUT", "/admin/api/inspect"), ("GET", "/admin/api/inspect/none"),
]  # fmt: skip
METRICS = [("GET", "/metrics")]
PAGES = [("GET", "/"), ("GET", "/admin")]
OPEN = [("GET", "/health"), ("GET", "/api/hello"), ("HEAD", "/api/hello"), ("HEAD", "/")]
ALL = [*V1, *USER_API, *ADMIN_API, *METRICS, *PAGES, *OPEN]


def named(endpoint: Any) -> str:
    return "".join(endpoint) if isinstance(endpoint, tuple) else str(endpoint)


# 1. Other sites' pages.

FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: "+".join(f"{k}={v}" for k, v in f.items()))
@pytest.mark.parametrize("endpoint", [*V1, *USER_API, *ADMIN_API, *METRICS], ids=named)
def test_other_sites_are_refused(ccm: Victim, endpoint: tuple[str, str], foreign: dict[str, str]) -> None:
    assert ccm.ask(*endpoint, {**ccm.admin, **foreign}, b"{}").status == 403


@pytest.mark.parametrize("endpoint", V1, ids=named)
def test_v1_is_not_for_pages_not_even_its_own(ccm: Victim, endpoint: tuple[str, str]) -> None:
    for own in ({"Origin": f"http://127.0.0.1:{ccm.port}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert ccm.ask(*endpoint, own, MESSAGE).status == 403


@pytest.mark.parametrize("endpoint", [*USER_API, ("GET", "/admin/api/users"), *METRICS], ids=named)
def test_its_own_pages_are_answered(ccm: Victim, endpoint: tuple[str, str]) -> None:
    own = {"Origin": f"http://127.0.0.1:{ccm.port}", "Sec-Fetch-Site": "same-origin"}
    assert ccm.ask(*endpoint, {**ccm.admin, **own}, b"{}").status in (200, 501)


@pytest.mark.parametrize(
    ("origin", "forwarded", "status"),
    [
        ("https://ccmux.example", "https", 200),
        ("http://ccmux.example", "-", 200),
        ("https://ccmux.example", "-", 403),
        ("http://ccmux.example", "https", 403),
        ("https://ccmux.example:8443", "https", 403),
        ("https://evil.example", "https", 403),
        ("ftp://ccmux.example", "ftp", 403),
    ],
)
def test_its_own_pages_behind_a_tls_proxy(ccm: Victim, origin: str, forwarded: str, status: int) -> None:
    headers = {"Origin": origin, "Sec-Fetch-Site": "same-origin", "X-Forwarded-Proto": forwarded}
    body = b'{"body": {"model": "claude-d", "messages": []}}'
    answer = ccm.ask("POST", "/admin/api/explain", {**ccm.admin, **headers}, body, "ccmux.example")
    assert answer.status == status


@pytest.mark.parametrize("path", ["/v1/messages", "/admin/api/users", "/api/me", "/", "/nowhere"])
def test_a_preflight_grants_nothing(ccm: Victim, path: str) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert ccm.ask("OPTIONS", path, headers).status in (403, 404, 405)


@pytest.mark.parametrize("endpoint", PAGES, ids=named)
def test_pages_may_be_linked_to(ccm: Victim, endpoint: tuple[str, str]) -> None:
    answer = ccm.ask(*endpoint, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")


CHANGING = [e for e in ALL if e[0] in ("POST", "PUT", "PATCH", "DELETE")]


@pytest.mark.parametrize(
    "content_type",
    ["-", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp",
     "text/plain; application/json", "application/json, text/plain"],
)  # fmt: skip
@pytest.mark.parametrize("endpoint", CHANGING, ids=named)
def test_only_json_changes_anything(ccm: Victim, endpoint: tuple[str, str], content_type: str) -> None:
    for body in (b"", b"{}"):
        length = {"Content-Length": str(len(body))} if body else {}
        answer = ccm.ask(*endpoint, {**ccm.admin, "Content-Type": content_type, **length}, body)
        assert answer.status == 415


# 2. Other names.

GOOD_HOSTS = [
    "localhost", "localhost:13456", "LocalHost.", "127.0.0.1", "127.0.0.1:1", "[::1]:99", "ccmux.example",
    "CCMUX.example.:443", "[fd00::7]",
]  # fmt: skip
BAD_HOSTS = [
    "-", "", "evil.example", "evil.example:13456", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.2",
    "localhost@evil.example", "evil.example@localhost", "[::1].evil.example", "[::1", "::1", "127.0.0.1:abc",
    "127.0.0.1:", "127.0.0.1:123456", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "localhost evil.example",
    "localhost,evil.example", "localhost/evil", "local\u212aost", "127.0.0.1:\uff11", "*",
]  # fmt: skip


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_its_own_names_are_known(ccm: Victim, host: str) -> None:
    assert ccm.ask("GET", "/health", host=host).status == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
@pytest.mark.parametrize(
    "endpoint",
    [("GET", "/health"), ("POST", "/v1/messages"), ("GET", "/admin/api/users"), ("GET", "/")],
    ids=named,
)
def test_other_names_are_refused(ccm: Victim, endpoint: tuple[str, str], host: str) -> None:
    assert ccm.ask(*endpoint, ccm.admin, MESSAGE, host).status in (400, 421)


@pytest.mark.parametrize(
    ("listens_on", "configured", "more"),
    [
        pytest.param("192.168.1.5", (), {"192.168.1.5"}, id="the address it listens on"),
        pytest.param("fd00::7", (), {"[fd00::7]"}, id="an IPv6 address"),
        pytest.param(
            "Box.lan", ("a.example:80",), {"box.lan", "a.example"}, id="a name, beside the configured"
        ),
        pytest.param("0.0.0.0", (), set(), id="any address is none"),
        pytest.param("::", (), set(), id="any IPv6 address is none"),
        pytest.param("", ("https://a.example",), set(), id="a configured name that is none"),
    ],
)
def test_the_address_it_listens_on_is_a_name_of_its(
    listens_on: str, configured: tuple[str, ...], more: set[str]
) -> None:
    assert ccmux.allowed_hosts(listens_on, configured) == {"localhost", "127.0.0.1", "[::1]"} | more


@pytest.mark.parametrize("endpoint", ALL, ids=named)
def test_a_rebound_name_reaches_no_endpoint(ccm: Victim, endpoint: tuple[str, str]) -> None:
    assert ccm.ask(*endpoint, ccm.admin, MESSAGE, "rebound.example").status == 421


RAW_HOSTS = {
    "two-hosts": "GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "two-hosts-other-way": "GET /health HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n",
    "absolute-form": "GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "absolute-form-other-way": "GET http://localhost/health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "absolute-form-user": "GET http://localhost@evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "absolute-form-https": "GET https://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "absolute-form-odd-scheme": "GET ftp://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "http-1.0": "GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n",
    "http-1.0-without": "GET /health HTTP/1.0\r\n\r\n",
    "http-1.0-absolute": "GET http://evil.example/health HTTP/1.0\r\n\r\n",
    "http-0.9": "GET /health\r\n\r\n",
    "authority-form": "CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "folded": "GET /health HTTP/1.1\r\nHost: localhost\r\n evil.example\r\n\r\n",
    "forwarded": "GET /health HTTP/1.1\r\nHost: evil.example\r\nX-Forwarded-Host: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW_HOSTS)
def test_the_host_is_judged_in_every_form(ccm: Victim, name: str) -> None:
    assert ccm.send(RAW_HOSTS[name].encode()).status in (400, 404, 421)


# 3 and 5. Tokens.

BAD_TOKENS: dict[str, dict[str, str]] = {
    "none": {},
    "empty": {"Authorization": "Bearer "},
    "wrong": {"Authorization": "Bearer wrong"},
    "prefix": {"Authorization": f"Bearer {ADMIN_TOKEN[:-1]}"},
    "longer": {"Authorization": f"Bearer {ADMIN_TOKEN}x"},
    "other-case": {"Authorization": f"Bearer {ADMIN_TOKEN.upper()}"},
    "basic": {"Authorization": "Basic " + base64.b64encode(f"admin:{ADMIN_TOKEN}".encode()).decode()},
    "bare": {"Authorization": ADMIN_TOKEN},
    "x-api-key": {"x-api-key": ADMIN_TOKEN},
    "cookie": {"Cookie": f"token={ADMIN_TOKEN}"},
    "not-ascii": {"Authorization": "Bearer \u00e9\udcff\u2603"},
    "nul": {"Authorization": f"Bearer {ADMIN_TOKEN}%00"},
    "list": {"Authorization": f"Bearer x, Bearer {ADMIN_TOKEN}"},
}


@pytest.mark.parametrize("token", BAD_TOKENS)
@pytest.mark.parametrize("endpoint", [*ADMIN_API, *METRICS], ids=named)
def test_admin_endpoints_need_the_token(ccm: Victim, endpoint: tuple[str, str], token: str) -> None:
    assert ccm.ask(*endpoint, BAD_TOKENS[token], b"{}").status == 401


def test_the_schemes_case_is_no_matter(ccm: Victim) -> None:
    """As with a user's key, and as RFC 9110 has it."""
    assert ccm.ask("GET", "/metrics", {"Authorization": f"bearer {ADMIN_TOKEN}"}).status == 200


@pytest.mark.parametrize("path", ["/admin/api/users", "/metrics"])
def test_a_token_in_the_query_is_none(ccm: Victim, path: str) -> None:
    assert ccm.ask("GET", f"{path}?token={ADMIN_TOKEN}&access_token={ADMIN_TOKEN}").status == 401


def test_a_users_key_is_no_admin_token(ccm: Victim) -> None:
    key = new_user(ccm, "mallory")
    for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}):
        assert ccm.ask("GET", "/admin/api/users", headers).status == 401


def new_user(ccm: Victim, name: str) -> str:
    answer = ccm.ask("POST", "/admin/api/users", ccm.admin, json.dumps({"name": name}).encode())
    assert answer.status == 201, answer
    return str(json.loads(answer.body)["key"])


@pytest.mark.parametrize("path", ["/admin/api/users", "/metrics"])
def test_ten_wrong_tokens_a_minute_are_enough(ccm: Victim, path: str) -> None:
    """From one address; the right token passes all the same, and so does another address."""
    source = f"127.8.0.{5 + len(path)}"
    statuses = [from_address(ccm, source, path, {"Authorization": f"Bearer {n}"}).status for n in range(13)]
    assert statuses == [401] * 10 + [429] * 3
    assert from_address(ccm, source, path, ccm.admin).status == 200
    assert from_address(ccm, "127.8.1.1", path, {"Authorization": "Bearer x"}).status == 401


def from_address(
    ccm: Victim, source: str, path: str, headers: dict[str, str], body: bytes | None = None
) -> Answer:
    method = "GET" if body is None else "POST"
    with socket.create_connection(("127.0.0.1", ccm.port), 10, (source, 0)) as client:
        client.sendall(ccm.request(method, path, headers, body))
        return Answer(b"".join(iter(lambda: client.recv(65536), b"")))


KEYED = f'[server]\nrequire_key = true\nadmin_token = "$CANARY_ADMIN"\n{provider_row()}'


def test_wrong_keys_are_counted_on_v1_too(tmp_path: Path) -> None:
    with victim(tmp_path, config=KEYED) as ccm:
        key = new_user(ccm, "anna")

        def status(source: str, **headers: str) -> int:
            return from_address(ccm, source, "/v1/messages", headers, MESSAGE).status

        statuses = [status("127.8.2.1", **{"x-api-key": f"k{n}"}) for n in range(13)]
        assert statuses == [401] * 10 + [429] * 3
        assert status("127.8.2.1", **{"x-api-key": key}) == 200
        assert status("127.8.2.2", **{"x-api-key": "\u00e9\udcff"}) == 401
        assert status("127.8.2.3", **{"x-api-key": "x", "Authorization": f"Bearer {key}"}) == 200
        for method, other in [*V1, *USER_API]:
            answer = ccm.ask(method, other, {}, b"{}")
            assert answer.status == 401, (method, other)
        assert ccm.ask("GET", "/health").status == 200
        assert b"providers" not in ccm.ask("GET", "/health").body


def test_a_key_is_refused_before_the_body_is_read(tmp_path: Path) -> None:
    """Which never comes, and would be waited for."""
    with victim(tmp_path, config=KEYED) as ccm:
        head = ccm.request("POST", "/v1/messages", {"Content-Length": "1000000"})
        assert ccm.send(head).status == 401


def test_a_made_token_is_long_and_kept_private(tmp_path: Path) -> None:
    with victim(tmp_path, config=provider_row()) as ccm:
        token = (tmp_path / "ccmux.token").read_text().strip()
        assert len(base64.urlsafe_b64decode(token + "==")) >= 16
        assert ccm.ask("GET", "/admin/api/users", {"Authorization": f"Bearer {token}"}).status == 200


def test_keys_are_kept_as_hashes(ccm: Victim) -> None:
    key = new_user(ccm, "hashed")
    assert len(key) >= 22
    for file in ccm.folder.glob("ccmux.db*"):
        assert key.encode() not in file.read_bytes()
    with contextlib.closing(sqlite3.connect(ccm.folder / "ccmux.db")) as database:
        hashes = {bytes(row[0]) for row in database.execute("select hash from keys")}
    assert hashlib.sha256(key.encode()).digest() in hashes


# 7. Requests that would send ccmux elsewhere.


@pytest.mark.parametrize("model", ["claude-a", "claude-o", "claude-d"])
def test_a_body_cannot_choose_where_it_goes(ccm: Victim, model: str) -> None:
    with Upstream() as evil:
        body = {
            **message_body(False), "model": model, "api_base": evil.url, "base_url": evil.url, "api_key": "x",
            "url": evil.url, "custom_llm_provider": "openai", "proxy": evil.url, "extra_headers": {"Host": "evil"},
            "user_config": {"model_list": [{"litellm_params": {"api_base": evil.url}}]}, "callbacks": [evil.url],
            "messages": [{"role": "user", "content": [
                {"type": "image", "source": {"type": "url", "url": f"{evil.url}/image.png"}},
                {"type": "document", "source": {"type": "url", "url": f"{evil.url}/doc.pdf"}},
                {"type": "text", "text": "hello"},
            ]}],
        }  # fmt: skip
        headers = {"x-api-base": evil.url, "x-forwarded-host": "evil", "x-ccmux-provider": "own"}
        assert ccm.ask("POST", "/v1/messages", headers, ccmux.compact(body)).status == 200
        assert evil.connections == 0


async def test_a_name_that_leads_to_a_link_local_address_is_not_followed() -> None:
    """A config's own are refused (test_config.py); of a name it cannot tell: the socket is never made."""
    async with ccmux.upstream_session() as session:
        for host in ("169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"):
            with pytest.raises(aiohttp.ClientConnectorError, match="link-local"):
                await session.get(f"http://{host}/")


def test_a_new_address_takes_the_key_away(ccm: Victim) -> None:
    """A provider's address is changed by somebody who does not know its key: the key does not go there."""
    with Upstream() as evil:
        state = json.loads(ccm.ask("GET", "/admin/api/state", ccm.admin).body)
        table = {"name": "own2", "type": "anthropic", "base_url": ccm.upstream.url, "api_key": CLIENT_KEY}
        put = {"hash": state["config_hash"], **table}
        answer = ccm.ask("PUT", "/admin/api/providers/own2", ccm.admin, json.dumps(put).encode())
        assert answer.status in (200, 201), answer
        moved = {
            "hash": json.loads(answer.body)["hash"],
            "name": "own2",
            "type": "anthropic",
            "base_url": evil.url,
        }
        answer = ccm.ask("PUT", "/admin/api/providers/own2", ccm.admin, json.dumps(moved).encode())
        assert answer.status in (200, 201), answer
        ccm.ask("POST", "/admin/api/providers/own2/test", ccm.admin, b'{"model": "x"}')
        ccm.message("hello", "own2/x")
        assert all(CLIENT_KEY not in str(call.headers) for call in evil.calls)
        assert CLIENT_KEY not in (ccm.folder / "config.toml").read_text()


# 8. Pages.


@pytest.mark.parametrize("endpoint", PAGES, ids=named)
def test_pages_carry_their_policy(ccm: Victim, endpoint: tuple[str, str]) -> None:
    answer = ccm.ask(*endpoint)
    policy = dict(
        part.strip().split(" ", 1)
        for part in answer.headers["content-security-policy"].split(";")
        if part.strip()
    )
    for kind in ("default-src", "frame-ancestors", "base-uri", "form-action"):
        assert policy[kind] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (answer.headers["referrer-policy"], answer.headers["cache-control"]) == ("no-referrer", "no-cache")
    html = answer.body.decode()
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        assert "unsafe" not in policy[directive] and "*" not in policy[directive]
        for inline in re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.S):
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy[directive]
    assert not re.search(
        r"(?i)innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", html
    )
    assert not re.search(r"(?i)<[^>]+\son\w+\s*=|javascript:|style\s*=\s*\"", html)
    assert not re.search(r"(?i)(?:src|href|action)\s*=\s*[\"']?(?:https?:)?//", html)


# 9. JSON.

BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "spaces": b"  ",
    "text": b"hello",
    "list": b"[]",
    "list-of-object": b'[{"model": "x"}]',
    "null": b"null",
    "string": b'"x"',
    "number": b"1",
    "duplicate-key": b'{"model": "claude-d", "model": "claude-a"}',
    "duplicate-deep": b'{"model": "claude-d", "messages": [{"role": "user", "role": "system"}]}',
    "duplicate-escaped": b'{"model": "claude-d", "mod\\u0065l": "claude-a"}',
    "nan": b'{"temperature": NaN}',
    "infinity": b'{"temperature": Infinity}',
    "minus-infinity": b'{"temperature": -Infinity}',
    "overflowing": b'{"temperature": 1e999}',
    "huge-int": b'{"max_tokens": ' + b"9" * 5000 + b"}",
    "deep-list": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep-object": b'{"x": ' * 100_000 + b"1" + b"}" * 100_000,
    "deep-open": b"[" * 1_000_000,
    "latin-1": b'{"model": "\xe9"}',
    "utf-16": '{"model": "x"}'.encode("utf-16"),
    "utf-7": b"+AHsAIg-",
    "bom": b'\xef\xbb\xbf{"model": "x"}',
    "trailing": b'{"model": "x"} {}',
    "trailing-nul": b'{"model": "x"}\x00',
    "comment": b'{"model": "x" /* */}',
    "single-quotes": b"{'model': 'x'}",
    "raw-newline": b'{"model": "a\nb"}',
    "overlong": b'{"model": "\xc0\xaf"}',
    "surrogate-bytes": b'{"model": "\xed\xa0\x80"}',
}
JSON_ENDPOINTS = [e for e in V1 if e[0] == "POST"] + [
    ("POST", "/admin/api/users"), ("POST", "/admin/api/explain"), ("POST", "/admin/api/users/local/credit"),
    ("PUT", "/admin/api/config"), ("PUT", "/admin/api/router"),
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS, ids=named)
def test_careless_json_is_refused(ccm: Victim, endpoint: tuple[str, str], name: str) -> None:
    if name == "empty" and "admin" in endpoint[1]:
        return  # stands for {} there: a POST without anything to say
    assert ccm.ask(*endpoint, ccm.admin, BAD_JSON[name]).status == 400


@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS, ids=named)
def test_wide_json_is_too_much(ccm: Victim, endpoint: tuple[str, str]) -> None:
    assert ccm.ask(*endpoint, ccm.admin, b'{"x": [' + b"0," * 2_000_001 + b"0]}").status == 413


@pytest.mark.parametrize("endpoint", JSON_ENDPOINTS, ids=named)
def test_large_bodies_are_refused_unread(ccm: Victim, endpoint: tuple[str, str]) -> None:
    head = ccm.request(*endpoint, {**ccm.admin, "Content-Length": str(33 * 2**20)})
    assert ccm.send(head).status == 413  # once it had waited for the body it would be a 408
    chunked = {**ccm.admin, "Content-Length": "-", "Transfer-Encoding": "chunked"}
    data = ccm.request(*endpoint, chunked) + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 33 + b"0\r\n\r\n"
    assert ccm.send(data).status == 413


@pytest.mark.parametrize("endpoint", ALL, ids=named)
def test_expectations_are_judged_by_the_guard_first(ccm: Victim, endpoint: tuple[str, str]) -> None:
    for headers, status in (
        ({"Expect": "\udcff"}, 417),
        ({"Expect": "100-continue", "Host": "evil.example"}, 421),
    ):
        answer = ccm.ask(*endpoint, {**ccm.admin, **headers}, b"{}")
        assert answer.status == status and not answer.raw.startswith(b"HTTP/1.1 100")


def test_expectations_are_met_only_for_what_is_welcome(ccm: Victim) -> None:
    expect = {"Expect": "100-continue"}
    for more, status in (
        ({"Content-Length": str(33 * 2**20)}, 413), ({"Content-Type": "text/plain"}, 415),
        ({"Origin": "http://evil.example"}, 403), ({"Expect": "200-ok"}, 417),
    ):  # fmt: skip
        answer = ccm.send(ccm.request("POST", "/v1/messages", {**expect, **more}))
        assert answer.status == status and not answer.raw.startswith(b"HTTP/1.1 100")
    welcome = ccm.send(
        ccm.request("POST", "/v1/messages", {**expect, "Content-Length": str(len(MESSAGE))}, MESSAGE)
    )
    assert welcome.status == 200


SURROGATES = {
    "model": {"model": "claude-\ud800"},
    "session": {"metadata": {"user_id": json.dumps({"session_id": "\udfff"})}},
    "session-text": {"metadata": {"user_id": "session_\ud800"}},
    "content": {"messages": [{"role": "user", "content": "\ud800"}]},
    "system": {
        "system": [{"type": "text", "text": "\udc00 <CCM-SUBAGENT-MODEL>\ud800</CCM-SUBAGENT-MODEL>"}]
    },
    "tools": {"tools": [{"name": "\ud800", "input_schema": {"type": "object"}}]},
    "stop": {"stop_sequences": ["\ud800"]},
}


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("model", ["claude-a", "claude-o", "claude-d"])
def test_half_a_surrogate_pair_harms_nobody(ccm: Victim, model: str, name: str) -> None:
    body = json.dumps({**message_body(False), "model": model, **SURROGATES[name]}).encode()
    assert ccm.ask("POST", "/v1/messages", {}, body).status in (200, 400)
    assert ccm.message(model=model).status == 200


@pytest.mark.parametrize(
    "header",
    ["x-claude-code-session-id", "x-claude-code-agent-id", "user-agent", "anthropic-beta", "x-api-key", "x-app"],
)  # fmt: skip
@pytest.mark.parametrize("value", ["\udcff\udcfe", "\u00e9", "\u2603" * 200, "a" * 8000, "\x7f", "a\tb"])
@pytest.mark.parametrize("model", ["claude-a", "claude-o"])
def test_odd_bytes_in_headers_harm_nobody(ccm: Victim, model: str, header: str, value: str) -> None:
    assert ccm.message("hello", model, **{header: value}).status in (200, 400)
    assert ccm.message(model=model).status == 200


# 10. Headers, smuggling, routes.


def test_only_listed_headers_go_up(ccm: Victim) -> None:
    sent = {
        "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4", "Via": "x", "Proxy-Authorization": "x",
        "Authorization": f"Bearer {CLIENT_KEY}", "x-api-key": CLIENT_KEY, "TE": "trailers", "Referer": "http://x/",
        "X-Custom": "x", "Accept-Encoding": "gzip, br", "Upgrade": "h2c", "Connection": "close, anthropic-secret",
        "anthropic-secret": "named by Connection", "anthropic-beta": "yes", "x-claude-code-session-id": "yes",
        "x-stainless-lang": "yes", "User-Agent": "yes", "Range": "bytes=0-1", "If-None-Match": "x", "Expect": "-",
    }  # fmt: skip
    for model in ("claude-a", "claude-o"):
        assert ccm.message("hello", model, **sent).status == 200
        found = {k.lower(): v for k, v in ccm.upstream.calls[-1].headers}
        known = {"host", "content-type", "content-length", "accept", "accept-encoding", "user-agent", "x-secret",
                 "x-api-key", "authorization", "anthropic-version"}  # fmt: skip
        passed = {"anthropic-beta", "x-claude-code-session-id", "x-stainless-lang"}
        assert set(found) <= known | passed
        assert found["accept-encoding"] == "identity" and CLIENT_KEY not in str(found)
        if model == "claude-a":
            assert passed <= set(found) and found["user-agent"] == "yes"


def test_a_header_in_two_lines_goes_up_whole(ccm: Victim) -> None:
    body = {**message_body(False), "model": "claude-a"}
    sent = {"anthropic-beta": "a-1", "Connection": "close, anthropic-secret", "anthropic-secret": "x"}
    head = ccm.request("POST", "/v1/messages", sent, ccmux.compact(body))
    more = b"\r\nAnthropic-Beta: b-2\r\nConnection: anthropic-other\r\nanthropic-other: y\r\n\r\n"
    assert ccm.send(head.replace(b"\r\n\r\n", more, 1)).status == 200
    found = {k.lower(): v for k, v in ccm.upstream.calls[-1].headers}
    assert found["anthropic-beta"] == "a-1, b-2"
    assert not {"anthropic-secret", "anthropic-other"} & set(found)


def test_a_passthrough_credential_goes_to_its_provider_alone(ccm: Victim) -> None:
    ccm.message("hello", "claude-p", Authorization=f"Bearer {CLIENT_KEY}")
    assert ("authorization", f"Bearer {CLIENT_KEY}") in [
        (k.lower(), v) for k, v in ccm.upstream.calls[-1].headers
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", ["hello", "please answer with status 529", "please answer with status 400"])
@pytest.mark.parametrize("model", ["claude-a", "claude-o"])
def test_only_listed_headers_come_down(ccm: Victim, model: str, words: str, stream: bool) -> None:
    answer = ccm.message(words, model, stream)
    passed_on = {"request-id", "anthropic-ratelimit-requests-remaining"}
    hostile = {name.lower() for name, _ in HOSTILE_HEADERS} - passed_on - {"server"}
    assert not hostile & set(answer.headers)
    assert answer.headers["server"] == "ccmux"


def smuggle(*lines: str, body: str = "") -> bytes:
    head = ["POST /v1/messages HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", ""]
    return "\r\n".join(head).encode("latin-1") + body.encode("latin-1")


HIDDEN = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Smuggled: yes\r\n\r\n"
SMUGGLING = {
    "cl-te": smuggle("Content-Length: 6", "Transfer-Encoding: chunked", body="0\r\n\r\n" + HIDDEN),
    "te-cl": smuggle("Transfer-Encoding: chunked", "Content-Length: 4", body="5c\r\n" + HIDDEN + "0\r\n\r\n"),
    "two-lengths": smuggle("Content-Length: 0", "Content-Length: 60", body=HIDDEN),
    "two-lengths-one-line": smuggle("Content-Length: 0, 60", body=HIDDEN),
    "length-plus": smuggle("Content-Length: +2", body="{}" + HIDDEN),
    "length-minus": smuggle("Content-Length: -1", body=HIDDEN),
    "length-hex": smuggle("Content-Length: 0x2", body="{}" + HIDDEN),
    "length-underscore": smuggle("Content-Length: 1_0", body="{}" + HIDDEN),
    "length-unicode": smuggle("Content-Length: \xb2", body="{}" + HIDDEN),
    "te-space-colon": smuggle("Transfer-Encoding : chunked", body="0\r\n\r\n" + HIDDEN),
    "te-identity": smuggle("Transfer-Encoding: chunked, identity", body="0\r\n\r\n" + HIDDEN),
    "te-twice": smuggle("Transfer-Encoding: chunked", "Transfer-Encoding: identity", body="0\r\n\r\n" + HIDDEN),
    "te-unknown": smuggle("Transfer-Encoding: xchunked", body="0\r\n\r\n" + HIDDEN),
    "te-vertical-tab": smuggle("Transfer-Encoding:\x0bchunked", body="0\r\n\r\n" + HIDDEN),
    "te-folded": smuggle("Transfer-Encoding:", " chunked", body="0\r\n\r\n" + HIDDEN),
    "chunk-size-sign": smuggle("Transfer-Encoding: chunked", body="+0\r\n\r\n" + HIDDEN),
    "chunk-size-huge": smuggle("Transfer-Encoding: chunked", body="ffffffffffffffffff\r\n" + HIDDEN),
    "chunk-size-0x": smuggle("Transfer-Encoding: chunked", body="0x2\r\n{}\r\n0\r\n\r\n"),
    "chunk-without-crlf": smuggle("Transfer-Encoding: chunked", body="2\r\n{}XX0\r\n\r\n" + HIDDEN),
    "chunk-bare-lf": smuggle("Transfer-Encoding: chunked", body="2\n{}\n0\n\n" + HIDDEN),
    "header-space": smuggle("X Y: z", "Content-Length: 0", body=HIDDEN),
    "header-nul": smuggle("X: a\x00b", "Content-Length: 0", body=HIDDEN),
    "header-bare-cr": smuggle("X: a\rContent-Length: 0", "Content-Length: 60", body=HIDDEN),
    "header-empty-name": smuggle(": x", "Content-Length: 0", body=HIDDEN),
    "header-no-colon": smuggle("nonsense", "Content-Length: 0", body=HIDDEN),
    "request-line-tabs": b"POST\t/v1/messages\tHTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN.encode(),
    "version-2": b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n" + HIDDEN.encode(),
    "version-odd": b"GET /health HTTP/1.1x\r\nHost: localhost\r\n\r\n" + HIDDEN.encode(),
    "preface-h2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls-hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 60 + b"\r\n\r\n",
    "header-too-long": smuggle("X: " + "a" * 70_000, "Content-Length: 0", body=HIDDEN),
    "headers-too-many": smuggle(*(f"X-{n}: {n}" for n in range(40_000)), "Content-Length: 0", body=HIDDEN),
    "path-too-long": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" + HIDDEN.encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLING)
def test_ambiguous_requests_are_refused_and_hide_nothing(ccm: Victim, name: str) -> None:
    answer = ccm.send(SMUGGLING[name], quiet=0.2)
    assert len(re.findall(rb"HTTP/1\.[01] \d\d\d ", answer.raw)) <= 1
    assert b'"data"' not in answer.raw
    assert answer.status in (0, 400, 404, 408, 413, 415, 431)
    assert ccm.ask("GET", "/health").status == 200


ODD_PATHS = [
    "//v1/messages", "/v1//messages", "/v1/messages/", "/V1/messages", "/v1/messages;x=1", "/v1/./messages",
    "/v1/x/../messages", "/v1/messages/../messages", "/admin/api/../../v1/messages", "/v1/messages%00", "/v1/messages%20",
    "/v1%2fmessages", "/v1/messages%2f", "/%76%31/messages/x", "/v1/messages/count_tokens/", "/v1/messages.json", "/v1",
    "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/../../etc/passwd", "/static/../ccmux.py", "/ccmux.db",
    "/config.toml", "/.git/config", "/admin/", "/admin/api", "/admin/api/", "/admin/api%2fusers", "/admin//api/users",
    "/Admin/api/users", "/api/", "/metrics/", "/health/", "/\\evil", "/v1\\messages", "/%", "/%zz", "/\u00e9", "*",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD_PATHS)
def test_odd_paths_lead_nowhere(ccm: Victim, path: str) -> None:
    """Neither with a foreign Origin, which must not slip by the guard, nor without one."""
    for method in ("GET", "POST"):
        for foreign in ({}, {"Origin": "http://evil.example"}):
            assert ccm.ask(method, path, {**ccm.admin, **foreign}, MESSAGE).status in (400, 403, 404, 405)


@pytest.mark.parametrize(
    "path", ["/%76%31/messages", "/v1/%6dessages", "/admin/%61pi/users", "/%61dmin/api/users"]
)
def test_an_escaped_path_passes_no_guard(ccm: Victim, path: str) -> None:
    method = "POST" if "essages" in path else "GET"
    assert ccm.ask(method, path, {**ccm.admin, "Origin": "http://evil.example"}, MESSAGE).status in (403, 404)
    assert ccm.ask(method, path, {}, b"{").status in (400, 401, 404)


@pytest.mark.parametrize(
    "method", ["TRACE", "CONNECT", "PROPFIND", "DELETE", "PUT", "PATCH", "OPTIONS", "get", "G\u00cbT"]
)
def test_odd_methods_lead_nowhere(ccm: Victim, method: str) -> None:
    for path in ("/v1/messages", "/health", "/admin/api/users"):
        assert ccm.ask(method, path, ccm.admin, b"{}").status in (400, 404, 405, 415)


QUERIES = [
    "since=0001-01-01T00:00:00%2B14:00", "until=9999-12-31T23:59:59-14:00", "since=%ED%A0%80", "since='; drop table users",
    "limit=-1", "limit=1e9", "limit=9999999999999999999999", "before=%00", "days=0", "by=x", "by=user'--", "format=xml",
    "as_if=%ED%A0%80", "as_if=" + "x" * 5000, "since=" + "9" * 5000, "limit=\u0661", "a=" + "&a=" * 500, "%FF=%FE",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(
    "endpoint", [e for e in [*USER_API, *ADMIN_API] if e[0] == "GET" and "events" not in e[1]], ids=named
)
def test_odd_queries_are_refused_or_ignored(ccm: Victim, endpoint: tuple[str, str], query: str) -> None:
    allowed = (
        (400, 502) if "providers" in endpoint[1] else (200, 400, 404)
    )  # that upstream has no list of models
    assert ccm.ask("GET", f"{endpoint[1]}?{query.replace(' ', '%20')}", ccm.admin).status in allowed


@pytest.mark.parametrize(
    "name", ["x'; drop table users; --", "%ED%A0%80", "%00", "..", "a%2Fb", "x" * 3000, "%F0%9F%92%A9"]
)
def test_odd_names_in_paths_are_not_found(ccm: Victim, name: str) -> None:
    path = name.replace(" ", "%20")
    for method, end, body in (
        ("GET", "transactions", b""),
        ("POST", "credit", b'{"amount_microusd": 1}'),
        ("POST", "key", b"{}"),
    ):
        assert ccm.ask(method, f"/admin/api/users/{path}/{end}", ccm.admin, body).status in (400, 404)
    assert ccm.ask("GET", f"/v1/models/{path}").status in (400, 404)


# 11 and logs. Injection into what people open later.


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_cells_are_no_formulas(ccm: Victim, start: str) -> None:
    cell = f'{start}cmd|"/c calc"!A0'
    body = {**message_body(False), "model": f"demo/{cell}"}
    sent = ccm.ask("POST", "/v1/messages", {"x-claude-code-session-id": "=1+1"}, ccmux.compact(body))
    assert sent.status == 200
    for path in ("/api/export", "/admin/api/export", "/admin/api/report"):
        answer = ccm.ask("GET", f"{path}?by=model&format=csv", ccm.admin)
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/csv")
        cells = [
            c
            for line in answer.body.decode().splitlines()
            for c in re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', line)
        ]
        assert not [c for c in cells if c.lstrip('"')[:1] in tuple("=+@\t\r")], cells
        assert not [c for c in cells if re.match(r'"?-(?!\d+(\.\d+)?"?$)', c)]
        assert "attachment" in answer.headers["content-disposition"]


LOG_ATTACKS = [
    f"x\r\n{FORGED_LINE}", f"x\n{FORGED_LINE}", f"\x1b[2J\x1b]0;owned\x07{FORGED_LINE}", f"x\u2028{FORGED_LINE}",
    f"x\x85{FORGED_LINE}", f"\u202e{FORGED_LINE}", f'" status=200 request="{FORGED_LINE}', "a" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", LOG_ATTACKS)
def test_log_lines_cannot_be_forged(ccm: Victim, text: str) -> None:
    body = {
        **message_body(False), "model": f"demo/{text[:200]}",
        "metadata": {"user_id": json.dumps({"session_id": text})},
    }  # fmt: skip
    before = len(ccm.log)
    assert ccm.ask("POST", "/v1/messages", {}, ccmux.compact(body)).status == 200
    until(lambda: b"request=" in ccm.log[before:], "the request is logged")
    lines = ccm.log[before:].decode().splitlines()  # splits at every kind of line end
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in lines), lines
    assert not [line for line in lines if line.startswith(FORGED_LINE)]
    assert all(line.isprintable() and len(line) < 5000 for line in lines)


# 12 and slow attackers.


def test_a_dripping_body_is_cut_off(ccm: Victim) -> None:
    with socket.create_connection(("127.0.0.1", ccm.port), 10) as client:
        client.sendall(ccm.request("POST", "/v1/messages", {"Content-Length": "1000"}))
        began, client_done = time.monotonic(), False
        client.settimeout(0.1)
        while not client_done:
            with contextlib.suppress(TimeoutError, ConnectionError):
                client.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                client_done = b"408" in client.recv(65536)[:20]
            assert time.monotonic() - began < 30
        assert time.monotonic() - began > 0.9


async def test_a_head_that_does_not_come_is_waited_for_75_seconds(tmp_path: Path) -> None:
    """By aiohttp's keepalive_timeout, which runs from the connection's beginning."""
    async with in_process(tmp_path, provider_row()) as proxy:
        runner = ccmux.runner_of(proxy.state)
        await runner.setup()
        assert runner.server and runner.server().keepalive_timeout == 75
        await runner.cleanup()


BOMB = gzip.compress(b" " * 50_000_000 + MESSAGE)


@pytest.mark.parametrize(
    "encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip", "x", "GZIP"]
)
def test_compressed_bodies_are_not_taken(ccm: Victim, encoding: str) -> None:
    answer = ccm.ask("POST", "/v1/messages", {"Content-Encoding": encoding}, BOMB)
    assert answer.status == 415 and b'"invalid_request_error"' in answer.body
    assert ccm.ask("GET", "/health").status == 200


def test_connections_beyond_the_cap_are_turned_away(tmp_path: Path) -> None:
    config = f'[server]\nmax_connections = 20\nadmin_token = "$CANARY_ADMIN"\n{provider_row()}'
    with victim(tmp_path, config=config) as ccm, contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", ccm.port), 5)) for _ in range(20)]
        for client in held:  # each has been accepted once it is answered
            client.sendall(ccm.request("GET", "/health", {"Connection": "keep-alive"}))
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        with (
            socket.create_connection(("127.0.0.1", ccm.port), 5) as late,
            contextlib.suppress(ConnectionError),
        ):
            late.sendall(ccm.request("GET", "/health"))
            assert late.recv(100) == b""
        held[0].close()
        until(lambda: ccm.ask("GET", "/health").status == 200, "a place is free again")


def test_a_compressed_answer_of_an_upstream_is_no_bomb(tmp_path: Path) -> None:
    """ccmux asks for identity; an upstream that sends gzip all the same makes an error, or little."""
    packed = gzip.compress(b'{"type": "message", "x": "' + b"x" * 200_000_000 + b'"}')
    bomb = fs.raw(200, [fs.JSON_TYPE, ("Content-Encoding", "gzip")], packed)
    with victim(tmp_path, bomb) as ccm:
        assert ccm.message().status == 502
        peak = Path(f"/proc/{ccm.process.pid}/status").read_text()
        assert int(re.search(r"VmHWM:\s+(\d+) kB", peak)[1]) < 400_000  # type: ignore[index]


# Secrets: asked for in every way, then searched for in all that was said and written.


@pytest.mark.parametrize("model", ["claude-a", "claude-o", "claude-p"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "words",
    ["please break midway", "please break first", "please send rubbish"]
    + [f"please answer with status {code}" for code in (400, 401, 402, 403, 404, 413, 422, 429, 500, 529)],
)
def test_a_leaking_upstream_is_scrubbed(ccm: Victim, words: str, stream: bool, model: str) -> None:
    answer = ccm.message(words, model, stream, Authorization=f"Bearer {CLIENT_KEY}")
    assert not canaries_in(answer.raw)
    chat = {"model": model, "stream": stream, "messages": [{"role": "user", "content": words}]}
    answer = ccm.ask("POST", "/v1/chat/completions", {"x-api-key": CLIENT_KEY}, ccmux.compact(chat))
    assert not canaries_in(answer.raw)


def canaries_in(data: bytes) -> list[str]:
    return [canary for canary in CANARIES if canary.encode() in data]


def test_no_canary_is_in_any_answer(ccm: Victim) -> None:
    for method, path in ALL:
        if method in ("GET", "HEAD") and "events" not in path:
            ccm.ask(method, path, ccm.admin)
    assert not canaries_in(ccm.answers)


def test_no_canary_is_in_the_log(ccm: Victim) -> None:
    assert b"request=" in ccm.log
    assert not canaries_in(ccm.log)
    assert b"Say hello" not in ccm.log and b"Hello there" not in ccm.log  # nor prompts, nor answers
    assert b"Traceback" not in ccm.log
    assert FORGED_LINE.encode() not in [line[: len(FORGED_LINE)] for line in ccm.log.splitlines()]


def test_no_canary_is_in_the_database_or_its_backup(ccm: Victim) -> None:
    backup = ccm.folder / "copy.db"
    command = [sys.executable, ROOT / "ccmux.py", "backup", backup, "--config", ccm.folder / "config.toml"]
    environment = {"HOME": str(ccm.folder), "PATH": "/bin"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    files = [*ccm.folder.glob("ccmux.db*"), backup]
    assert len(files) >= 2
    for file in files:
        assert not canaries_in(file.read_bytes()), file.name
    assert LEAK.encode() not in backup.read_bytes()


def test_a_crash_report_shows_no_secrets() -> None:
    text = '[server]\nadmin_token = "$T"\n[[providers]]\nname = "x"\ntype = "anthropic"\nbase_url = "http://x.example"\n'
    text += 'api_key = ["$K", "k2-secret"]\nheaders = { a = "h-secret" }\n'
    config = ccmux.load_config(text, {"T": "t-secret", "K": "k-secret"})
    shown = repr(config) + repr(config.providers) + str(config.server)
    assert not re.search(r"[tkh]2?-secret", shown)


# Files.


def test_files_are_private_whatever_the_umask(ccm: Victim) -> None:
    names = ["ccmux.db", "ccmux.db-wal", "ccmux.db-shm", "ccmux.db.lock"]
    assert {name: mode_of(ccm.folder / name) for name in names} == dict.fromkeys(names, 0o600)


def test_a_start_without_a_config_makes_a_private_folder(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "PATH": "/bin", "CCMUX_NO_BOOTSTRAP": "1"}
    command = [sys.executable, str(ROOT / "ccmux.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=tmp_path, umask=0) as process:
        assert process.stdout
        until(lambda: b"claude" in process.stdout.readline(), "it has started")  # type: ignore[union-attr]
        process.terminate()
    home = tmp_path / ".ccmux"
    assert mode_of(home) == 0o700
    assert {f.name: mode_of(f) for f in home.iterdir()} == {f.name: 0o600 for f in home.iterdir()}
    assert {"ccmux.db", "ccmux.token"} <= {f.name for f in home.iterdir()}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_commands_write_is_private(tmp_path: Path) -> None:
    environment = {
        "HOME": str(tmp_path),
        "PATH": "/bin",
        "ANTHROPIC_API_KEY": "sk-ant-canary-of-the-environment",
    }
    for command in (["init"], ["user", "add", "anna"], ["backup", str(tmp_path / "copy.db")]):
        done = subprocess.run(
            [sys.executable, str(ROOT / "ccmux.py"), *command], env=environment, cwd=tmp_path, umask=0, timeout=60,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"canary" not in done.stdout + done.stderr
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) >= 3 and {f.name: mode_of(f) for f in files} == {f.name: 0o600 for f in files}
    assert all(b"canary" not in f.read_bytes() for f in files)


# After all that.


@pytest.mark.parametrize("path", ["/nothing", "/v1/messages", "/admin/api/state"])
def test_an_expectation_of_odd_bytes_is_no_fault_on_any_path(path: str, ccm: Victim) -> None:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
    )
    found = ccm.send(head.encode() + b"Expect: \xff\r\n\r\n{}")
    assert found.status == 417, found


@pytest.mark.parametrize(
    "path", [path for method, path in ALL if method == "GET" and not path.endswith(("/events", "/models"))]
)
def test_head_works_where_get_does(ccm: Victim, path: str) -> None:
    got = ccm.ask("GET", path, ccm.admin)
    head = ccm.ask("HEAD", path, ccm.admin)
    assert (head.status, head.body) == (got.status, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


def test_head_of_the_live_log_is_a_head(ccm: Victim) -> None:
    answer = ccm.ask("HEAD", "/admin/api/events", ccm.admin)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    assert answer.raw.endswith(b"\r\n\r\n")


def test_the_wrong_method_is_told_which_are_right(ccm: Victim) -> None:
    found = ccm.ask("PUT", "/v1/messages", {"Content-Type": "application/json"}, b"{}")
    assert found.status == 405
    assert b"POST" in found.raw


def test_it_is_still_well(ccm: Victim) -> None:
    for model in ("claude-a", "claude-o", "claude-d"):
        until(lambda model=model: ccm.message(model=model).status == 200, "breakers and cool-downs pass", 15)
    assert ccm.process.poll() is None
    with contextlib.closing(sqlite3.connect(ccm.folder / "ccmux.db")) as database:
        until(lambda: not database.execute("select * from holds").fetchall(), "no hold is left")
