"""Admin API: every endpoint over a real socket, with wrong input too; secrets never come out."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sqlite3
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fakes import Answer, AnthropicFake, OpenAIFake, Turn, serving
from proxy_harness import ADMIN_TOKEN, in_process, provider_row, until

import ccmux

SECRET = "sk-canary-abcdefgh-1234"
CONFIG = """\
# a comment at the top
[server]
database = "ccmux.db" # beside this file
[router]
default = "m" # the default

# the provider
[[providers]]
name = "p"
type = "openai"
base_url = "{url}"
api_key = "sk-canary-abcdefgh-1234" # the key

[[models]]
name = "m"
price = {{ input = 1.0, output = 2.0 }}
[[models.mappings]]
provider = "p"
actual_model = "up"
"""


class Admin:
    """Calls a ccmux as the admin page does."""

    def __init__(self, session: aiohttp.ClientSession, proxy: Any) -> None:
        self.session, self.proxy, self.state = session, proxy, proxy.state
        self.file = proxy.folder / "config.toml"

    async def call(
        self, method: str, path: str, body: Any = None, token: str = ADMIN_TOKEN, **more: Any
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}", **more}
        if method != "GET":
            headers.setdefault("Content-Type", "application/json")
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        async with self.session.request(method, self.proxy.url + path, data=data, headers=headers) as reply:
            text = await reply.text()
            assert SECRET not in text
            is_json = reply.content_type == "application/json"
            return reply.status, json.loads(text) if is_json else text

    async def get(self, path: str) -> Any:
        status, body = await self.call("GET", path)
        assert status == 200, body
        return body

    async def hash(self) -> str:
        return str((await self.get("/admin/api/state"))["config_hash"])

    async def put(self, path: str, table: Any, **more: Any) -> Any:
        status, body = await self.call("PUT", path, {"table": table, "hash": await self.hash(), **more})
        assert status == 200, body
        return body

    async def save(self, path: str, method: str = "PUT", **body: Any) -> tuple[int, Any]:
        """A change of the config as it now is."""
        return await self.call(method, f"/admin/api/{path}", {"hash": await self.hash(), **body})

    async def shown(self) -> str:
        """The whole text as the page shows it."""
        return str((await self.get("/admin/api/config"))["text"])

    async def edit(self, old: str, new: str) -> tuple[int, str]:
        """Saves the whole text as shown, with the only `old` in it replaced; the status, and an error's words."""
        given = await self.get("/admin/api/config")
        assert given["text"].count(old) == 1
        body = {"text": given["text"].replace(old, new), "hash": given["hash"]}
        status, told = await self.call("PUT", "/admin/api/config", body)
        return status, told.get("error", {}).get("message", "")

    async def add_line(self) -> int:
        """The same, with a comment at the end."""
        given = await self.get("/admin/api/config")
        body = {"text": given["text"] + "# more\n", "hash": given["hash"]}
        return (await self.call("PUT", "/admin/api/config", body))[0]

    @property
    def text(self) -> str:
        return str(self.file.read_text())


def marks_in(text: str) -> list[str]:
    """What stands in a shown text for the secrets that are kept."""
    return [word for word in text.split('"') if word.startswith("[kept-")]


def hi(turn: Turn) -> Answer:
    return Answer(text="hi there")


@contextlib.asynccontextmanager
async def admin_of(folder: Path, text: str | None = None) -> AsyncIterator[tuple[Admin, OpenAIFake]]:
    async with OpenAIFake(hi) as fake:
        config = CONFIG.format(url=fake.base_url) if text is None else text
        async with in_process(folder, config) as proxy, aiohttp.ClientSession() as session:
            yield Admin(session, proxy), fake


def message(**more: Any) -> dict[str, Any]:
    return {"model": "claude-x", "max_tokens": 50, "messages": [{"role": "user", "content": "hello"}], **more}


ROUTES = [
    (route.method, route.path)
    for route in ccmux.admin_routes()
    if route.path.startswith("/admin/api") and route.method in ("GET", "POST", "PUT", "PATCH", "DELETE")
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_no_endpoint_answers_without_the_token(method: str, path: str, tmp_path: Path) -> None:
    place = path.replace("{name}", "p").replace("{name:.+}", "m").replace("{id}", "x")
    async with admin_of(tmp_path) as (admin, _):
        before = admin.text
        for token in ("", "wrong", ADMIN_TOKEN + "x", "ü"):
            status, body = await admin.call(method, place, None if method == "GET" else {}, token=token)
            assert status == 401, (token, body)
        assert admin.text == before


async def test_state_masks_every_secret(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        state = await admin.get("/admin/api/state")
        [provider] = state["config"]["providers"]
        assert provider["api_key"] == {"set": True, "last4": "1234", "reference": ""}
        assert state["providers"]["p"]["state"] == "ok"
        assert state["providers"]["p"]["url"].endswith("/chat/completions")
        assert state["presets"]["openrouter"]["url"].startswith("https://openrouter.ai/")
        names = {f["name"] for f in state["fields"]["providers"]}
        assert {"name", "type", "api_key", "quirks"} <= names
        assert "problem" not in names


# Providers.


async def test_a_provider_is_added_changed_and_taken_away_with_comments_kept(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        before = admin.text
        await admin.put(
            "/admin/api/providers/q", {"type": "anthropic", "base_url": fake.base_url, "api_key": "$Q_KEY"}
        )
        assert 'api_key = "$Q_KEY"' in admin.text
        assert all(line in admin.text for line in before.splitlines())
        assert admin.state.config.provider("q").problem == "$Q_KEY is not set in the environment"
        status, answer = await admin.save("providers/q", "DELETE")
        assert status == 200, answer
        assert list(filter(None, admin.text.splitlines())) == list(filter(None, before.splitlines()))


async def test_a_key_left_out_stays_but_never_goes_to_another_address(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        for more in ({"max_retries": 0}, {"api_key": None}):
            await admin.put("/admin/api/providers/p", {"type": "openai", "base_url": fake.base_url, **more})
            assert SECRET in admin.text
        await admin.put("/admin/api/providers/p", {"type": "openai", "base_url": "https://elsewhere.test"})
        assert SECRET not in admin.text
        assert admin.state.config.provider("p").api_key != (SECRET,)


async def test_headers_left_out_stay_but_never_go_to_another_address(tmp_path: Path) -> None:
    row = '[[providers]]\nname = "p"\ntype = "anthropic"\nheaders = { x-a = "canary-1", x-b = "canary-2" }\n'
    async with admin_of(tmp_path, row) as (admin, _):
        for given in ({}, {"headers": None}, {"headers": {"x-a": None, "x-b": {"set": True}}}):
            await admin.put("/admin/api/providers/p", {"type": "anthropic", **given})
            assert admin.text == row
        await admin.put("/admin/api/providers/p", {"type": "anthropic", "headers": {"x-b": None}})
        assert "canary-1" not in admin.text and "canary-2" in admin.text
        moved = {"type": "anthropic", "base_url": "https://elsewhere.test"}
        await admin.put("/admin/api/providers/p", {**moved, "headers": {"x-b": {"set": True}, "x-c": "new"}})
        assert "canary" not in admin.text
        assert admin.state.config.provider("p").headers == {"x-c": "new"}


async def test_a_new_key_among_masks_is_no_silent_loss(tmp_path: Path) -> None:
    row = '[[providers]]\nname = "p"\ntype = "anthropic"\napi_key = ["canary-1", "$KEY_2"]\n'
    async with admin_of(tmp_path, row) as (admin, _):
        masks = (await admin.get("/admin/api/state"))["config"]["providers"][0]["api_key"]
        table = {"type": "anthropic", "api_key": masks}
        await admin.put("/admin/api/providers/p", table)
        status, told = await admin.save("providers/p", table={**table, "api_key": [*masks, "new"]})
        assert (status, "item 1 must be text" in told["error"]["message"]) == (400, True)
        assert admin.text == row


async def test_a_key_inside_a_body_stays_but_never_goes_to_another_address(tmp_path: Path) -> None:
    key = f'api_key = "{SECRET}"'
    body = f'{{ {key}, headers = {{ x = "{SECRET}" }}, deep = {{ {key}, n = 1.5 }}, all = [{{ {key}, n = 2 }}] }}'
    quirks = f"quirks = {{ extra_body = {body} }}\n"
    async with admin_of(tmp_path, f'{DEMO}base_url = "https://a.example/"\n{quirks}') as (admin, _):
        state = await admin.get("/admin/api/state")
        [provider] = state["config"]["providers"]
        await admin.put("/admin/api/providers/d", {**provider, "max_retries": 2})
        assert tomllib.loads(admin.text)["providers"][0]["quirks"] == tomllib.loads(quirks)["quirks"]
        await admin.put("/admin/api/providers/d", {**provider, "base_url": "https://b.example"})
        [saved] = tomllib.loads(admin.text)["providers"]
        assert saved["quirks"] == {"extra_body": {"headers": {}, "deep": {"n": 1.5}, "all": [{"n": 2}]}}


def test_a_one_in_a_body_may_become_true() -> None:
    assert ccmux.unmasked({"seed": 1, "think": 1}, {"seed": 1, "think": True})["think"] is True


def test_a_key_added_to_a_masked_list_asks_for_all_of_them() -> None:
    stored = {"api_key": ["sk-of-one", "sk-of-another"]}
    masks = ccmux.masked_table(stored)["api_key"]
    assert ccmux.unmasked(stored, {"api_key": masks}) == stored
    with pytest.raises(ccmux.ApiError, match="type the keys in a list again"):
        ccmux.unmasked(stored, {"api_key": [*masks, "sk-new"]})


def test_a_key_in_an_item_of_a_changed_list_is_no_silent_loss() -> None:
    stored = [{"api_key": "sk-of-one", "n": 1}]
    masks = ccmux.masked_table(stored)
    assert ccmux.unmasked(stored, masks) == stored
    with pytest.raises(ccmux.ApiError, match="type the keys in a list again"):
        ccmux.unmasked(stored, [{**masks[0], "n": 2}])
    typed = [{"api_key": "sk-new", "n": 2}]
    assert ccmux.unmasked(stored, typed) == typed


async def test_an_empty_key_clears_it(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        await admin.put(
            "/admin/api/providers/p", {"type": "openai", "base_url": fake.base_url, "api_key": ""}
        )
        assert SECRET not in admin.text


async def test_another_name_in_the_body_renames(tmp_path: Path) -> None:
    async with admin_of(tmp_path, '[[providers]]\nname = "d"\ntype = "demo" # mine\n') as (admin, _):
        await admin.put("/admin/api/providers/d", {"name": "e", "type": "demo"})
        assert admin.text == '[[providers]]\nname = "e"\ntype = "demo" # mine\n'


async def test_a_provider_in_use_is_not_taken_away(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        status, body = await admin.save("providers/p", "DELETE")
        assert (status, "used by model m" in body["error"]["message"]) == (409, True)
        assert (await admin.save("providers/none", "DELETE"))[0] == 404


async def test_testing_a_provider_uses_the_live_path(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        status, body = await admin.call("POST", "/admin/api/providers/p/test", {})
        assert (status, body["ok"], body["text"], body["model"]) == (200, True, "hi there", "up")
        assert len(fake.asked) == 1
        status, body = await admin.call("POST", "/admin/api/providers/none/test", {})
        assert status == 404


async def test_a_failing_provider_says_so_without_its_key(tmp_path: Path) -> None:
    def refuses(turn: Turn) -> Answer:
        return Answer(status=401, error=f"bad key {SECRET}")

    async with AnthropicFake(refuses) as fake:
        text = provider_row("p", "anthropic", base_url=fake.base_url, api_key=SECRET, models=["x"])
        async with admin_of(tmp_path, text) as (admin, _):
            _, body = await admin.call("POST", "/admin/api/providers/p/test", {})
            assert (body["ok"], body["status"]) == (False, 500)
            assert "refuses ccmux's key" in body["error"]
            _, body = await admin.call("POST", "/admin/api/providers/p/test", {})
            assert body["status"] == 500 and len(fake.asked) == 2  # really tried, though its key rests


@pytest.mark.parametrize("status", [401, 500])
async def test_a_provider_that_is_put_right_is_tried_at_once(status: int, tmp_path: Path) -> None:
    async with AnthropicFake(lambda turn: Answer(status=status)) as wrong, AnthropicFake(hi) as right:
        row = {"api_key": "k", "models": ["x"], "max_retries": 0}
        async with admin_of(tmp_path, provider_row("p", "anthropic", base_url=wrong.base_url, **row)) as (
            admin,
            _,
        ):
            for _ in range(6):
                last, _ = await admin.call("POST", "/v1/messages", message(model="x"))
            assert last in (429, 529)  # its key rests, or its breaker is open
            admin.file.write_text(provider_row("p", "anthropic", base_url=right.base_url, **row))
            ccmux.reload_config(admin.state)
            assert (await admin.call("POST", "/v1/messages", message(model="x")))[0] == 200


async def test_models_that_a_provider_lists(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        listed = await admin.get("/admin/api/providers/p/models")
        assert listed["models"]
        assert all(isinstance(name, str) for name in listed["models"])


@pytest.mark.parametrize("format", ["anthropic", "gemini"])
async def test_a_model_list_is_read_to_its_last_page(format: str, tmp_path: Path) -> None:
    async def listed(request: web.Request) -> web.Response:
        if format == "gemini":
            first = "pageToken" not in request.query
            row = {"name": "models/one" if first else "models/two"}
            return web.json_response({"models": [row], **({"nextPageToken": "a b"} if first else {})})
        first = request.query.get("after_id") != "one"
        return web.json_response(
            {"data": [{"id": "one" if first else "two"}], "has_more": first, "last_id": "one"}
        )

    async with (
        serving(web.get("/{version}/models", listed)) as url,
        admin_of(tmp_path, provider_row("p", format, base_url=url, api_key="k")) as (admin, _),
    ):
        assert (await admin.get("/admin/api/providers/p/models"))["models"] == ["one", "two"]


async def test_a_refused_model_list_tells_its_status(tmp_path: Path) -> None:
    async def refused(request: web.Request) -> web.Response:
        return web.Response(status=401, text="<html>who are you?", content_type="text/html")

    async with (
        serving(web.get("/v1/models", refused)) as url,
        admin_of(tmp_path, provider_row("p", "openai", base_url=url, api_key="k")) as (admin, _),
    ):
        status, body = await admin.call("GET", "/admin/api/providers/p/models")
        assert (status, body["error"]["message"]) == (502, "provider p gave no model list (status 401)")


# Models, routes, credits, the whole text.


async def test_a_backup_is_looked_at_and_restored(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        before, first = admin.text, await admin.hash()
        await admin.put("/admin/api/router", {"default": "m", "think": "m"})
        now, place = admin.text, "/admin/api/backups/config.toml.bak1"
        seen = await admin.get(place)
        assert "[kept-" in seen["text"] and "# the provider" in seen["text"]
        changed = [line for line in seen["changes"].splitlines() if line[0] in "+-"]
        assert changed == ["--- now", "+++ then", '-think = "m"']
        status, body = await admin.call("POST", place, {"hash": first})
        assert (status, admin.text) == (409, now), body
        status, body = await admin.save("backups/config.toml.bak1", "POST")
        assert (status, admin.text) == (200, before), body
        assert admin.state.config.router.think == "" and body["hash"] == await admin.hash()
        assert (tmp_path / "config.toml.bak1").read_text() == now
        (tmp_path / "config.toml.bak2").write_text(
            f'[server]\nhost = "0.0.0.0"\nlog_level = "{SECRET}"\nadmin_token = "{SECRET}"\n'
        )
        (tmp_path / "config.toml.bak3").write_bytes(b"\xff")
        for end, wrong in ((".bak2", 400), (".bak3", 409), (".bak4", 404), ("", 404)):
            status, body = await admin.save(f"backups/config.toml{end}", "POST")
            assert (status, admin.text) == (wrong, before), body
        admin.file.write_text("broken = [")  # by hand: a backup mends it
        hash = (await admin.get("/admin/api/config"))["hash"]
        assert "-broken = [" in (await admin.get(place))["changes"]
        assert (await admin.call("POST", place, {"hash": hash}))[0] == 200
        assert admin.text == now


async def test_a_backups_key_that_begins_with_todays_is_not_shown_past_it(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        (tmp_path / "config.toml.bak1").write_text(admin.text)
        admin.file.write_text(admin.text.replace(SECRET, SECRET.removesuffix("-1234")))
        seen = await admin.get("/admin/api/backups/config.toml.bak1")
        assert "-1234" not in seen["text"] and "-1234" not in seen["changes"]
        assert "[kept-" in seen["text"] and "[kept-" in seen["changes"]


async def test_models_and_routes_are_edited_and_served_at_once(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        mapping = {"provider": "p", "actual_model": "other", "priority": 1}
        await admin.put("/admin/api/models/a/b", {"mappings": [mapping], "context": 1000})
        await admin.put("/admin/api/router", {"default": "a/b", "think_on": ["plan"]})
        for comment in ("# a comment at the top", "# beside this file", "# the provider", "# the key"):
            assert comment in admin.text
        status, answer = await admin.call("POST", "/v1/messages", message(), token="x")
        assert status == 200, answer
        assert fake.asked[-1].body["model"] == "other"
        status, body = await admin.save("models/a/b", "DELETE")
        assert (status, "[router] default" in body["error"]["message"]) == (409, True)


@pytest.mark.parametrize(
    ("path", "table", "words"),
    [
        ("router", {"default": "nobody"}, "which nobody serves"),
        ("router", {"defualt": "m"}, "did you mean 'default'"),
        ("router", {"background_regex": "("}, "not a regular expression"),
        ("credits", {"markup_percent": -1}, "at least 0"),
        ("server", {"host": "0.0.0.0"}, "require_key"),
        ("providers/x", {"type": "nope"}, "key 'type'"),
        ("providers/x", {"type": "openai", "base_url": "http://169.254.169.254/"}, "link-local"),
        ("models/x", {"mappings": [{"provider": "zzz", "actual_model": "y"}]}, "no such provider"),
        ("models/x", {"price": {"input": 1}}, "'output' is missing"),
        ("router", {"default": "\ud800"}, "surrogate"),
    ],
)
async def test_wrong_tables_change_nothing(path: str, table: Any, words: str, tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        before = admin.text
        status, body = await admin.save(path, table=table)
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")
        assert words in body["error"]["message"]
        assert admin.text == before


OPEN = f'[server]\nhost = "0.0.0.0"\nadmin_token = "{ADMIN_TOKEN}"\n'
DEMO = provider_row("d")


async def test_what_others_reach_needs_keys_until_the_next_start(tmp_path: Path) -> None:
    async with admin_of(tmp_path, f"{OPEN}require_key = true\n{DEMO}") as (admin, _):
        admin.file.write_text(OPEN + DEMO)
        ccmux.reload_config(admin.state)
        assert "require_key = true" in admin.state.config_error
        assert (await admin.call("POST", "/v1/messages", message(), token="x"))[0] == 401
        admin.file.write_text(
            f'[server]\nadmin_token = "{ADMIN_TOKEN}"\n{DEMO}'
        )  # as for a start on loopback
        ccmux.reload_config(admin.state)
        assert (admin.state.config_error, admin.state.config.server.host) == ("", "0.0.0.0")
        assert (await admin.call("POST", "/v1/messages", message(), token="x"))[0] == 401
        await admin.put("/admin/api/server", {"require_key": False})
        assert (await admin.call("POST", "/v1/messages", message(), token="x"))[0] == 401


async def test_a_database_that_has_no_place_is_told_and_the_watch_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "~nobody-here")  # nor has ccmux a home: it needs none
    async with admin_of(tmp_path, DEMO) as (admin, _):
        watcher = asyncio.create_task(ccmux.watch_config(admin.state, argparse.Namespace()))
        lost = '[server]\nhost = "0.0.0.0"\nrequire_key = true\ndatabase = "~nobody-here/x.db"\n'
        admin.file.write_text(lost + DEMO)
        await until(lambda: "no home folder" in admin.state.config_error, "the error is told")
        admin.file.write_text('[router]\ndefault = "d/x"\n' + DEMO)
        await until(lambda: admin.state.config.router.default == "d/x", "the config is in use")
        watcher.cancel()


async def test_a_token_taken_out_of_the_config_holds_no_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with admin_of(tmp_path, f'[server]\nadmin_token = "{ADMIN_TOKEN}"\n{DEMO}') as (admin, _):
        admin.file.write_text(DEMO)
        ccmux.reload_config(admin.state)
        assert (await admin.call("GET", "/admin/api/users"))[0] == 401
        assert "`ccmux.py token` prints" in caplog.text
        kept = (tmp_path / "ccmux.token").read_text().strip()
        assert (await admin.call("GET", "/admin/api/users", token=kept))[0] == 200


async def test_a_new_log_level_holds_at_once(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.level
    try:
        async with admin_of(tmp_path, DEMO) as (admin, _):
            await admin.put("/admin/api/server", {"log_level": "error"})
            assert root.level == logging.ERROR
            root.setLevel(logging.DEBUG)  # as --log-level does
            await admin.put("/admin/api/credits", {"enforce": False})
            assert root.level == logging.DEBUG
            admin.file.write_text(admin.text.replace('"error"', '"warning"'))
            ccmux.reload_config(admin.state)
            assert root.level == logging.WARNING
    finally:
        root.setLevel(before)


async def test_a_mux_servers_key_is_not_shown_and_stays(tmp_path: Path) -> None:
    text = f'[server]\napi_key = "{SECRET}" # mux\n{DEMO}'
    async with admin_of(tmp_path, text) as (admin, _):
        assert marks_in(await admin.shown())
        server = (await admin.get("/admin/api/state"))["config"]["server"]
        await admin.put("/admin/api/server", {**server, "drain_timeout": 5})  # as the page's settings do
        assert admin.text == text.replace("# mux\n", "# mux\ndrain_timeout = 5\n")


async def test_a_file_with_a_byte_order_mark_is_a_config(tmp_path: Path) -> None:
    async with admin_of(tmp_path, DEMO) as (admin, _):
        admin.file.write_bytes(b"\xef\xbb\xbf" + DEMO.encode() + b"models = ['x']\n")  # PowerShell's Out-File
        ccmux.reload_config(admin.state)
        assert (admin.state.config_error, admin.state.config.providers[0].models) == ("", ("x",))
        assert ccmux.database_of(admin.file) == str(tmp_path / "ccmux.db")
        await admin.put("/admin/api/router", {"default": "d/y"})
        assert "default" in admin.text and not marks_in(await admin.shown())


async def test_a_config_made_after_the_start_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "home" / ".ccmux" / "config.toml"
    made.parent.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    async with admin_of(tmp_path, DEMO) as (admin, _):
        admin.state.config = ccmux.load_config(DEMO, {})  # as where no file was found
        watcher = asyncio.create_task(ccmux.watch_config(admin.state, argparse.Namespace()))
        made.write_text('[router]\ndefault = "d/x" # mine\n' + DEMO)  # as `init` does
        await until(lambda: admin.state.config.router.default == "d/x", "the config is in use")
        await admin.put("/admin/api/router", {"default": "d/y"})
        assert made.read_text() == '[router]\ndefault = "d/y" # mine\n' + DEMO
        watcher.cancel()


async def test_a_change_between_the_load_and_the_watch_is_seen(tmp_path: Path) -> None:
    async with admin_of(tmp_path, DEMO) as (admin, _):
        admin.file.write_text('[router]\ndefault = "d/x"\n' + DEMO)
        watcher = asyncio.create_task(ccmux.watch_config(admin.state, argparse.Namespace()))
        await until(lambda: admin.state.config.router.default == "d/x", "the config is in use")
        watcher.cancel()


async def test_a_file_that_is_still_being_written_is_no_config(tmp_path: Path) -> None:
    half, rest = DEMO, '[router]\ndefault = "d/x"\n'
    async with admin_of(tmp_path, half + rest) as (admin, _):
        old = admin.state.config
        watcher = asyncio.create_task(ccmux.watch_config(admin.state, argparse.Namespace()))
        with admin.file.open(
            "w"
        ) as file:  # emptied, and written anew in pieces, as by an editor on a slow disk
            for piece in (half, *["#" * 99 + "\n"] * 50):
                file.write(piece)
                file.flush()
                await asyncio.sleep(0.02)
                assert admin.state.config is old
            file.write(rest.replace("d/x", "d/y"))
        await until(lambda: admin.state.config.router.default == "d/y", "the whole file is in use")
        watcher.cancel()


async def test_a_stale_save_is_a_conflict(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        first = await admin.hash()
        await admin.put("/admin/api/credits", {"enforce": False})
        for method, path, body in (
            ("PUT", "/admin/api/router", {"table": {"default": "m"}, "hash": first}),
            ("DELETE", "/admin/api/models/m", {"hash": first}),
            ("PUT", "/admin/api/config", {"text": "", "hash": first}),
            ("PUT", "/admin/api/providers/p", {"table": {"type": "demo"}, "hash": None}),
        ):
            status, answer = await admin.call(method, path, body)
            assert status == 409, (path, answer)
        admin.file.write_text(admin.text + "# by hand\n")
        status, answer = await admin.call(
            "PUT", "/admin/api/credits", {"table": {}, "hash": admin.state.config.text_hash}
        )
        assert status == 409
        assert "# by hand" in admin.text


async def test_the_whole_text_shows_no_secret_and_keeps_it_on_save(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        given = await admin.get("/admin/api/config")
        assert "[kept-" in given["text"]
        new = given["text"].replace("# a comment at the top", "# changed")
        status, body = await admin.call("PUT", "/admin/api/config", {"text": new, "hash": given["hash"]})
        assert status == 200, body
        assert admin.text.startswith("# changed")
        assert SECRET in admin.text
        backups = await admin.get("/admin/api/backups")
        assert [b["name"] for b in backups["backups"]] == ["config.toml.bak1"]
        moved = new.replace(tomllib.loads(new)["providers"][0]["base_url"], "https://elsewhere.test")
        status, body = await admin.call("PUT", "/admin/api/config", {"text": moved, "hash": body["hash"]})
        assert status == 400
        assert "type its key again" in body["error"]["message"]
        status, body = await admin.call(
            "PUT", "/admin/api/config", {"text": "x = [", "hash": admin.state.config.text_hash}
        )
        assert (status, "not valid TOML" in body["error"]["message"]) == (400, True)


HEADERS = '{ "x-auth" = "header-canary-5678" }'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        pytest.param('name = "m"\nprice', 'name = "MARK"\nprice', "where its key stood", id="into a model's name"),
        pytest.param('default = "m"', 'default = "p/MARK"', "where its key stood", id="inside another text"),
        pytest.param('[[models]]', '[[providers]]\nname = "q"\ntype = "demo"\napi_key = "MARK"\n[[models]]', "new address", id="to another provider"),
        pytest.param('database =', 'admin_token = "MARK"\ndatabase =', "admin_token", id="to the admin token"),
        pytest.param('type = "openai"', 'type = "openai"\nproxy = "http://MARK"', "where its key stood", id="into a proxy"),
        pytest.param('type = "openai"', 'type = "openai"\nproxy = "http://u:MARK@h"', "where its key stood", id="into a login"),
    ],
)  # fmt: skip
async def test_a_kept_secret_stays_where_it_was(old: str, new: str, words: str, tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        [mark] = marks_in(await admin.shown())
        status, told = await admin.edit(old, new.replace("MARK", mark))
        assert (status, words in told) == (400, True), told
        assert admin.text == CONFIG.format(url=tomllib.loads(admin.text)["providers"][0]["base_url"])
        await admin.get("/admin/api/state")


LOGINS = """\
[[providers]]
name = "p"
type = "openai"
base_url = "http://anna:wonder-land@127.0.0.1:9/v1"
api_key = "$NOWHERE"
proxy = "http://ben:rabbit-hole@127.0.0.1:80"
# proxy = "http://ben:looking-glass@127.0.0.1:80"
[[models]]
name = "m"
mappings = [{provider = "p", actual_model = "x"}]
"""


async def test_a_password_in_an_address_is_not_shown_and_stays(tmp_path: Path) -> None:
    async with admin_of(tmp_path, LOGINS) as (admin, _):
        state, given = await admin.get("/admin/api/state"), await admin.get("/admin/api/config")
        for seen in (state, given):
            assert not [w for w in ("wonder-land", "rabbit-hole", "looking-glass") if w in json.dumps(seen)]
        assert state["providers"]["p"]["url"].endswith("]@127.0.0.1:9/v1/chat/completions")
        await admin.put("/admin/api/providers/p", state["config"]["providers"][0])
        assert admin.text == LOGINS
        status, body = await admin.call("PUT", "/admin/api/config", given)
        assert (status, admin.text) == (200, LOGINS), body
        row = state["config"]["providers"][0]
        longer = row | {"base_url": row["base_url"] + "/x"}
        await admin.put("/admin/api/providers/p", longer)
        assert 'base_url = "http://anna:wonder-land@127.0.0.1:9/v1/x"' in admin.text
        seen = await admin.get("/admin/api/backups/config.toml.bak1")
        assert "+base_url" in seen["changes"] and "wonder-land" not in json.dumps(seen)
        for moved in (row["base_url"].replace(":9", ":90"), row["base_url"].replace("127", "x127")):
            table = {"table": row | {"base_url": moved}, "hash": await admin.hash()}
            status, body = await admin.call("PUT", "/admin/api/providers/p", table)
            assert (status, "type its user and password again" in body["error"]["message"]) == (400, True), (
                body
            )


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        pytest.param('name = "m"', 'name = "MARK127.0.0.1:80"', 400, id="into a model's name"),
        pytest.param('MARK127.0.0.1:80', 'MARK127.0.0.1:8080', 400, id="beside another host"),
        pytest.param('api_key = "$NOWHERE"', '# see MARK127.0.0.1:80', 200, id="into a comment, which hides it"),
        pytest.param('MARK127.0.0.1:80"\n#', 'MARK127.0.0.1:80/"\n#', 200, id="a longer path"),
    ],
)  # fmt: skip
async def test_a_kept_login_goes_nowhere_else(old: str, new: str, status: int, tmp_path: Path) -> None:
    async with admin_of(tmp_path, LOGINS) as (admin, _):
        given = await admin.get("/admin/api/config")
        mark = given["text"].split('proxy = "')[1].split("127")[0]
        old, new = old.replace("MARK", mark), new.replace("MARK", mark)
        assert old in given["text"]
        body = {"text": given["text"].replace(old, new, 1), "hash": given["hash"]}
        assert (await admin.call("PUT", "/admin/api/config", body))[0] == status
        assert "rabbit-hole" in admin.text
        for place in ("config", "state"):
            assert "rabbit-hole" not in json.dumps(await admin.get(f"/admin/api/{place}"))


@pytest.mark.parametrize("reference", ["$MARK", "${MARK}", "${MARK:-}"])
async def test_a_kept_secret_does_not_become_a_variables_name(reference: str, tmp_path: Path) -> None:
    """State, warnings and the text show a variable's name as it stands."""
    text = CONFIG.replace(SECRET, "canary_abcdefgh_1234").format(url="http://127.0.0.1:9/v1")
    async with admin_of(tmp_path, text) as (admin, _):
        [mark] = marks_in(await admin.shown())
        status, told = await admin.edit(mark, reference.replace("MARK", mark))
        assert (status, "where its key stood" in told) == (400, True), told
        assert admin.text == text


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        pytest.param('api_key = "M0"', '# api_key = "M0"', 200, id="a key in a comment stays a mark"),
        pytest.param('api_key = "M0"', '# the key was M0', 400, id="another comment"),
        pytest.param('# api_key = "M1"', 'api_key = "M1"', 200, id="a key out of a comment"),
        pytest.param('name = "m"', 'name = "M1"', 400, id="out of a comment into a name"),
    ],
)  # fmt: skip
async def test_a_kept_secret_in_a_comment_is_not_shown(
    old: str, new: str, status: int, tmp_path: Path
) -> None:
    text = f'[[providers]]\nname = "p"\ntype = "demo"\napi_key = "{SECRET}"\n[[providers]]\n# api_key = "sk-spare-98765432"\n'
    text += 'name = "q"\ntype = "demo"\n[[models]]\nname = "m"\nmappings = [{provider = "p", actual_model = "x"}]\n'
    async with admin_of(tmp_path, text) as (admin, _):
        for n, mark in enumerate(marks_in(await admin.shown())):
            old, new = old.replace(f"M{n}", mark), new.replace(f"M{n}", mark)
        assert (await admin.edit(old, new))[0] == status
        seen = await admin.shown()
        assert SECRET not in seen and "sk-spare" not in seen


@pytest.mark.parametrize(
    "text",
    [
        "providers = [1]",
        "providers = 'x'",
        "[[providers]]\nname = ['x']\napi_key = [{a=1}]\nheaders = 3",
        "server = 1",
        "[server]\nadmin_token = {a=1}",
    ],
)
async def test_odd_tables_are_no_fault_of_the_server(text: str, tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        status, body = await admin.save("config", text=text)
        assert status < 500, body


async def test_a_kept_header_never_goes_to_another_address(tmp_path: Path) -> None:
    text = f'[[providers]]\nname = "p"\ntype = "anthropic"\nheaders = {HEADERS}\n'
    async with admin_of(tmp_path, text) as (admin, _):
        assert "canary" not in await admin.shown()
        status, told = await admin.edit("headers", 'base_url = "https://elsewhere.test"\nheaders')
        assert (status, "type its key again" in told) == (400, True)
        assert admin.text == text


@pytest.mark.parametrize(
    "spelled",
    ['"sk\\u002dcanary-abcdefgh-1234"', '"${NOT_SET:-sk-canary-abcdefgh-1234}"',
     "'sk-canary-abcdefgh-1234'", '["sk-canary-\\u0061bcdefgh-1234", "$OTHER"]', '"""sk-canary-abcdefgh-1234"""'],
)  # fmt: skip
async def test_a_secret_is_not_shown_however_it_is_spelled(spelled: str, tmp_path: Path) -> None:
    text = f'# it\'s "mine"\n[[providers]]\nname = "p"\ntype = "anthropic"\napi_key = {spelled} # "\n'
    async with admin_of(tmp_path, text) as (admin, _):
        assert "bcdefgh-1234" not in await admin.shown()
        assert "bcdefgh-1234" not in json.dumps(await admin.get("/admin/api/state"))
        assert await admin.add_line() == 200
        assert admin.text == text + "# more\n"


async def test_a_key_that_is_commented_out_is_not_shown(tmp_path: Path) -> None:
    text = f"{DEMO}  #api_key = '{SECRET}' # old\n# admin_token = \"$NAME_OF_IT\"\n"
    async with admin_of(tmp_path, text) as (admin, _):
        assert "$NAME_OF_IT" in await admin.shown()  # `call` looks for the secret
        assert await admin.add_line() == 200
        assert admin.text == text + "# more\n"


@pytest.mark.parametrize(
    ("text", "strings"),
    [
        ("a = 'x\\' # 'no'\nb = \"y # z\"", [("x\\", "x\\"), ("y # z", "y # z")]),
        (r'a = "q\"u\u0041"', [(r"q\"u\u0041", 'q"uA')]),
        ('a = """\nx""\\""""""', [('\nx""\\"""', 'x"""""')]),
        ("a = '''x''''\nb = \"\"", [("x'", "x'"), ("", "")]),
    ],
    ids=["plain-and-comments", "escapes", "three-quotes-and-two-more", "a-quote-before-three"],
)
def test_strings_are_found_as_toml_has_them(text: str, strings: list[tuple[str, str]]) -> None:
    assert list(ccmux.string_values(text)) == strings


def test_names_that_follow_one_another_are_no_key_of_two_lines() -> None:
    text = '[[providers]]\nname = "ab"\nx.api_key = "b\\nx"\n'
    assert list(ccmux.secret_marks(text)) == ["b\\nx"]


async def test_a_short_key_hides_no_names_and_breaks_no_mark(tmp_path: Path) -> None:
    [mark] = ccmux.secret_marks(f'[[providers]]\napi_key = "{SECRET}"').values()
    rows = [("ollama", "ollama"), ("q", SECRET), ("r", mark[-3:-1])]
    row = '[[providers]]\nname = "{}"\ntype = "anthropic"\napi_key = "{}" # ollama\n'
    text = "".join(row.format(*names) for names in rows)
    async with admin_of(tmp_path, text) as (admin, _):
        seen = await admin.shown()
        assert 'name = "ollama"' in seen and "# ollama" in seen
        assert (await admin.add_line(), admin.text) == (200, text + "# more\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('name = "p"', 'name = "p', id="no TOML"),
        pytest.param('name = "p"', 'name = "p"\ncolour = "red"', id="an unknown key"),
        pytest.param("[[providers]]", "[providers]", id="a table for a row"),
    ],
)
async def test_a_broken_file_is_mended_from_the_page(old: str, new: str, tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        whole, stale = admin.text, await admin.hash()
        admin.file.write_text(whole.replace(old, new))
        for path in ("router", "providers/p", "models/m"):
            status, body = await admin.call("PUT", f"/admin/api/{path}", {"table": {}, "hash": stale})
            assert (status, "mend it under Config" in body["error"]["message"]) == (409, True), path
        given = await admin.get("/admin/api/config")
        assert new in given["text"]
        text = given["text"].replace(new, old)
        assert (await admin.call("PUT", "/admin/api/config", {"text": text, "hash": stale}))[0] == 409
        status, body = await admin.call("PUT", "/admin/api/config", {"text": text, "hash": given["hash"]})
        assert (status, admin.text) == (200, whole), body


@pytest.mark.parametrize("key", ["apikey", "API_KEY", "api-key", "key", "api_keys", "token", "header.x"])
async def test_a_secret_at_a_misspelt_key_is_not_shown(key: str, tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        whole = admin.text
        admin.file.write_text(whole.replace("api_key =", f"{key} ="))
        ccmux.reload_config(admin.state)
        assert "unknown key" in (await admin.get("/admin/api/state"))["config_error"]
        assert (await admin.edit(f"{key} =", "api_key ="))[0] == 200  # `call` looks for the secret
        assert admin.text == whole


async def test_a_short_secret_at_a_misspelt_key_is_not_shown(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        admin.file.write_text(admin.text.replace(f'api_key = "{SECRET}"', 'apikey = "sk-12345"'))
        assert "sk-12345" not in await admin.shown()


async def test_a_file_that_cannot_be_read_is_said_to_be(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        whole = admin.text
        admin.file.write_bytes(b"\xff\xfe")
        status, body = await admin.call("GET", "/admin/api/config")
        assert (status, "cannot be read" in body["error"]["message"]) == (409, True)
        admin.file.unlink()
        await admin.put("/admin/api/router", {"default": "m", "think": "m"})
        assert admin.text == whole.replace(
            'default = "m" # the default\n', 'default = "m" # the default\nthink = "m"\n'
        )


# Users and billing.


async def test_a_friend_gets_a_key_and_five_dollars(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        new = {
            "name": "friend",
            "credit_microusd": 5_000_000,
            "budgets": {"day_microusd": 1_000_000},
            "note": "n",
        }
        status, user = await admin.call("POST", "/admin/api/users", new)
        assert status == 201
        key = user.pop("key")
        assert user["balance_microusd"] == 5_000_000
        status, answer = await admin.call("POST", "/v1/messages", message(), token=key)
        assert status == 200, answer
        status, me = await admin.call("GET", "/api/me", token=key)
        assert me["balance_microusd"] < 5_000_000
        assert me["spent_today_microusd"] == 5_000_000 - me["balance_microusd"]
        assert me["spent_today_microusd"] == me["spent_week_microusd"] == me["spent_month_microusd"]
        _, mine = await admin.call("GET", "/api/requests", token=key)
        assert [r["charge_microusd"] for r in mine["requests"]] == [me["spent_today_microusd"]]
        _, ledger = await admin.call("GET", "/api/transactions", token=key)
        assert [t["kind"] for t in ledger["transactions"]] == ["charge", "topup"]
        for by in ("day", "model", "session"):
            _, usage = await admin.call("GET", f"/api/usage?by={by}", token=key)
            assert usage["usage"][0]["charge_microusd"] == me["spent_today_microusd"]
        _, text = await admin.call("GET", "/api/export?format=csv", token=key)
        assert text.splitlines()[0].startswith('"time","request_id"')
        status, _ = await admin.call("POST", "/api/purchase", {}, token=key)
        assert status == 501
        status, new_key = await admin.call("POST", "/admin/api/users/friend/key", {})
        assert new_key["key"] != key
        status, off = await admin.call("PATCH", "/admin/api/users/friend", {"disabled": True})
        assert off["disabled"] is True
        status, refused = await admin.call("POST", "/v1/messages", message(), token=new_key["key"])
        assert (status, refused["error"]["type"]) == (403, "permission_error")


async def test_who_needs_no_key_can_be_disabled(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        await admin.call("GET", "/api/me", token="")  # makes the user
        await admin.call("PATCH", "/admin/api/users/local", {"disabled": True})
        admin.state.store.local_known = (None, 0.0)  # as after a second
        for method, path in (("GET", "/api/me"), ("POST", "/v1/messages")):
            status, refused = await admin.call(method, path, message(), token="")
            assert (status, "user local is disabled" in refused["error"]["message"]) == (403, True)
        assert not fake.requests
        _, key = admin.state.store.add_user("friend")
        assert (await admin.call("POST", "/v1/messages", message(), token=key))[0] == 200


async def test_users_see_the_prices_they_pay(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        await admin.put("/admin/api/models/odd", {"mappings": [{"provider": "p", "actual_model": "odd-1"}]})
        credits = {"markup_percent": 20, "default_price": {"input": 5, "output": 25}, "enforce": False}
        for enforce, odd in ((False, None), (True, {"input": "6", "output": "30"})):
            await admin.put("/admin/api/credits", credits | {"enforce": enforce})
            _, told = await admin.call("GET", "/api/models")
            prices = {m["name"]: m["price"] for m in told["models"]}
            assert prices == {"m": {"input": "1.2", "output": "2.4"}, "odd": odd}
            _, state = await admin.call("GET", "/admin/api/state")
            assert state["unpriced"] == ["odd"]
            asked = {"body": message(model="odd", max_tokens=1000)}
            _, plan = await admin.call("POST", "/admin/api/explain", asked)
            ceiling = plan["targets"][0]["ceiling_microusd"]
            assert ceiling is None if odd is None else ceiling == 30_000 + 6 * plan["tokens"]


async def test_a_change_of_a_user_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        before = admin.state.store.add_user("ann")[0]
        for body in (
            {"disabled": True, "budgets": {"day_microusd": "5"}},
            {"disabled": "yes", "budgets": {"day_microusd": 5}},
        ):
            status, _ = await admin.call("PATCH", "/admin/api/users/ann", body)
            assert status == 400
        assert admin.state.store.known("ann") == before


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/users", {"name": "bob"}),
        ("PATCH", "/users/ann", {"disabled": True}),
        ("PATCH", "/users/ann", {"budgets": {"day_microusd": 1}}),
        ("POST", "/users/ann/credit", {"amount_microusd": 1}),
        ("POST", "/users/ann/key", {}),
    ],
)
async def test_a_write_that_waits_for_another_process_holds_up_nothing_else(
    method: str, path: str, body: Any, tmp_path: Path
) -> None:
    async with admin_of(tmp_path) as (admin, _):
        admin.state.store.add_user("ann")
        with contextlib.closing(sqlite3.connect(admin.state.store.path, isolation_level=None)) as other:
            other.execute("begin immediate")
            asked = asyncio.create_task(admin.call(method, f"/admin/api{path}", body))
            await until(admin.state.store.writing.locked, "the writer waits")
            await admin.get("/health")
            assert not asked.done()
            other.execute("commit")
        status, _ = await asked
        assert status in (200, 201)


async def test_credit_given_twice_with_one_key_counts_once(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        credit = "/admin/api/users/u/credit"
        await admin.call("POST", "/admin/api/users", {"name": "u"})
        for _ in range(2):
            _, user = await admin.call("POST", credit, {"amount_microusd": 7, "key": "k1"})
        assert user["balance_microusd"] == 7
        _, user = await admin.call("POST", credit, {"amount_microusd": -2, "note": "back"})
        assert user["balance_microusd"] == 5
        _, ledger = await admin.call("GET", "/admin/api/users/u/transactions")
        assert [t["amount_microusd"] for t in ledger["transactions"]] == [-2, 7]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/api/users", {"name": "a b"}, 400),
        ("POST", "/admin/api/users", {"name": "u", "credit_microusd": 1.5}, 400),
        ("POST", "/admin/api/users", {"name": "u", "credit_microusd": -1}, 400),
        ("POST", "/admin/api/users", {"name": "u", "budgets": {"year": 1}}, 400),
        ("POST", "/admin/api/users", {"nmae": "u"}, 400),
        ("POST", "/admin/api/users", [], 400),
        ("POST", "/admin/api/users", b"{", 400),
        ("PATCH", "/admin/api/users/nobody", {"disabled": True}, 404),
        ("PATCH", "/admin/api/users/local", {"disabled": "yes"}, 400),
        ("POST", "/admin/api/users/nobody/credit", {"amount_microusd": 1}, 404),
        ("POST", "/admin/api/users/local/credit", {"amount_microusd": True}, 400),
        ("POST", "/admin/api/users/local/credit", {"amount_microusd": 10**30}, 400),
        ("POST", "/admin/api/users/nobody/key", {}, 404),
        ("GET", "/admin/api/users/nobody/transactions", None, 404),
        ("GET", "/admin/api/report?by=colour", None, 400),
        ("GET", "/admin/api/report?since=yesterday", None, 400),
        ("GET", "/admin/api/report?as_if=unheard-of", None, 400),
        ("GET", "/admin/api/requests?limit=x", None, 400),
        ("GET", "/admin/api/requests?before=-1", None, 400),
        ("GET", "/admin/api/export?format=xml", None, 400),
        ("GET", "/admin/api/inspect/none", None, 404),
        ("PUT", "/admin/api/inspect", {"minutes": 16}, 400),
        ("POST", "/admin/api/explain", {"body": []}, 400),
        ("POST", "/admin/api/try", {"body": {"messages": []}}, 400),
        ("POST", "/admin/api/try", {"body": message(), "headers": {"x-a": "not heeded"}}, 400),
        ("GET", "/admin/api/nothing", None, 404),
    ],
)
async def test_wrong_input(method: str, path: str, body: Any, status: int, tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        admin.state.store.local_user()
        seen, answer = await admin.call(method, path, body)
        assert (seen, answer["type"]) == (status, "error"), answer
        assert answer["error"]["message"]


async def test_reports_explain_the_bill(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        for session in ("s1", "s1", "s2"):
            named = {"x-claude-code-session-id": session}
            await admin.call("POST", "/v1/messages", message(), token="x", **named)
        rows = (await admin.get("/admin/api/report?by=session&as_if=claude-opus-5"))["report"]
        assert {r["key"]: r["requests"] for r in rows} == {"s1": 2, "s2": 1}
        assert all(r["charge_microusd"] == r["cost_microusd"] + r["markup_microusd"] for r in rows)
        assert all(r["as_if_microusd"] > r["charge_microusd"] for r in rows)
        whole = await admin.get("/admin/api/export")
        assert sum(r["charge_microusd"] for r in whole["usage"]) == sum(r["charge_microusd"] for r in rows)
        listed = await admin.get("/admin/api/requests?limit=2")
        assert len(listed["requests"]) == 2
        older = await admin.get(f"/admin/api/requests?before={listed['requests'][-1]['id']}")
        assert len(older["requests"]) == 1
        assert listed["requests"][0]["trail"][-2:] == [["default", "m"], ["targets", "p/up"]]


@pytest.mark.parametrize("format", ["csv", "json"])
async def test_a_long_table_is_read_and_written_elsewhere_than_on_the_loop(format: str) -> None:
    def rows() -> Iterator[ccmux.Json]:
        yield {"thread": threading.get_ident()}

    async def get_table(request: web.Request) -> web.Response:
        return await ccmux.table_response(request, "usage", rows, ("thread",))

    async with serving(web.get("/", get_table)) as url, aiohttp.ClientSession() as client:
        reply = await client.get(f"{url}/?format={format}")
        text = await reply.text()
    assert reply.content_type == {"csv": "text/csv", "json": "application/json"}[format]
    thread = text.split()[-1] if format == "csv" else json.loads(text)["usage"][0]["thread"]
    assert int(thread) != threading.get_ident()


# Looking at what happens.


async def test_explain_sends_nothing(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        status, told = await admin.call("POST", "/admin/api/explain", {"body": message()})
        assert status == 200
        assert (told["model"], told["reason"]) == ("m", "default")
        assert told["targets"][0]["ceiling_microusd"] >= 100
        assert fake.asked == []


async def test_a_rule_that_searches_for_ever_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ccmux, "RULE_TIME", 0.05)
    rule = "[[router.rules]]\npattern = '(\\w+\\s?)+:'\nmodel = 'd/x'\n"
    endless, short = (message(messages=[{"role": "user", "content": text}]) for text in ("a" * 60, "a:"))
    async with admin_of(tmp_path, DEMO + rule) as (admin, _):
        assert (await admin.call("POST", "/v1/messages", endless))[0] == 200
        assert "repeat inside a repeat" in caplog.text
        _, told = await admin.call("POST", "/admin/api/explain", {"body": endless})
        assert told["reason"] == "default" and "rule 1 takes too long" in told["trail"][0][1]
        _, told = await admin.call("POST", "/admin/api/explain", {"body": short})
        assert told["reason"] == "rule"


async def test_try_streams_raw_events_and_tells_the_cost(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        status, text = await admin.call("POST", "/admin/api/try", {"body": message()})
        assert status == 200
        assert "event: message_stop" in text
        row = json.loads(text.rpartition("event: ccmux\ndata: ")[2])
        assert (row["route"], row["provider"], row["status"]) == ("default", "p", 200)
        assert row["charge_microusd"] > 0


async def test_the_live_log(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with admin.session.get(admin.proxy.url + "/admin/api/events", headers=headers) as events:
            told = events.headers
            assert told["request-id"]
            assert (told["Server"], told["X-Content-Type-Options"]) == ("ccmux", "nosniff")
            assert (await events.content.readline()).startswith(b":")
            await admin.call("POST", "/v1/messages", message(), token="x")
            lines = [await events.content.readline() for _ in range(3)]
            row = json.loads(lines[2].removeprefix(b"data: "))
            assert (row["asked"], row["status"]) == ("claude-x", 200)
            [logged] = (await admin.get("/admin/api/requests"))["requests"]
            assert row == {key: logged[key] for key in row}  # its time, too


async def test_an_upstreams_endless_stop_reason_does_not_fill_the_log(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        fake.script = lambda _: Answer(text="hi", stop="x" * 100_000)
        status, _ = await admin.call("POST", "/v1/chat/completions", message(), token="x")
        assert status == 200
        (row,) = (await admin.get("/admin/api/requests"))["requests"]
        assert row["stop_reason"] == "x" * 64


@pytest.mark.parametrize("client", ["waits", "leaves"])
async def test_no_row_is_lost_between_the_log_and_the_live_log(client: str, tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        disk = sqlite3.connect(tmp_path / "ccmux.db", isolation_level=None)

        def answer_while_the_disk_is_slow(turn: Turn) -> Answer:
            disk.execute("begin immediate")
            return hi(turn)

        fake.script = answer_while_the_disk_is_slow
        asked = asyncio.create_task(admin.call("POST", "/v1/messages", message(), token="x"))
        known = admin.state.metrics.counts
        await until(lambda: any("ccmux_requests_total" in key for key in known), "the answer is over")
        if client == "leaves":
            asked.cancel()
            await until(lambda: not admin.state.calls, "the server has noticed")
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        async with admin.session.get(admin.proxy.url + "/admin/api/events", headers=headers) as events:
            assert (await events.content.readline()).startswith(b":")
            assert (await admin.get("/admin/api/requests"))["requests"] == []
            assert client == "leaves" or not asked.done()  # the end of an answer waits for the disk
            disk.execute("rollback")
            disk.close()
            async with asyncio.timeout(10):
                assert b"claude-x" in await events.content.readuntil(b"}\n\n")
            assert len((await admin.get("/admin/api/requests"))["requests"]) == 1
        if client == "waits":
            await asked


def test_the_recorder_shows_no_key_that_came_in_two_pieces() -> None:
    recorder, config = ccmux.Recorder(), SimpleNamespace(secrets=[SECRET])
    route = SimpleNamespace(reason="default")
    call: Any = SimpleNamespace(
        request_id="req_1", body={}, headers={}, asked="m", route=route, config=config
    )
    recorder.switch(60)
    recorder.begin(call)
    for part in ("request", "answer", "request"):
        call.on_raw(f"upstream_{part}", b"{}")
    shown = recorder.shown("req_1")  # two tries
    assert shown and [shown[f"upstream_{part}"] for part in ("request", "answer")] == ["{}\n\n{}", "{}\n\n"]
    recorder.begin(call)
    said = f"é {SECRET} é".encode()
    for piece in (said[:1], said[1:12], said[12:]):
        call.on_raw("upstream_answer", piece)
    shown = recorder.shown("req_1")
    assert shown and shown["upstream_answer"] == "é [key] é"
    for number in range(recorder.MOST):
        call.request_id = f"req_new{number}"
        recorder.begin(call)
    assert recorder.shown("req_1") is None and len(recorder.held) == recorder.MOST == 20


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(status=400, error="no such thing"), id="refused"),
        pytest.param(Answer(text="one two three four five six", cut=2), id="cut off"),
    ],
)
async def test_the_recorder_keeps_the_error_that_the_client_got(
    answer: Answer, stream: bool, tmp_path: Path
) -> None:
    async with admin_of(tmp_path) as (admin, fake):
        fake.script = lambda turn: answer
        await admin.call("PUT", "/admin/api/inspect", {"minutes": 15})
        _, got = await admin.call("POST", "/v1/messages", message(stream=stream), token="x")
        [held] = (await admin.get("/admin/api/inspect"))["held"]
        events = (await admin.get(f"/admin/api/inspect/{held['id']}"))["events"]
        said = got if isinstance(got, str) else json.dumps(got)
        assert json.loads(events.split("data: ")[-1]) == json.loads(said.split("data: ")[-1])


async def test_the_recorder_keeps_a_request_whole_without_keys(tmp_path: Path) -> None:
    async with admin_of(tmp_path) as (admin, _):
        assert (await admin.get("/admin/api/inspect"))["held"] == []
        _, summary = await admin.call("PUT", "/admin/api/inspect", {"minutes": 15})
        assert 890 <= summary["on_for_s"] <= 900
        sent = {"x-claude-code-agent-id": "a1", "user-agent": f"claude-cli {SECRET}", "cookie": SECRET}
        asked = message(stream=True, system=f"my key is {SECRET}")
        await admin.call("POST", "/v1/messages", asked, token="x", **sent)
        [held] = (await admin.get("/admin/api/inspect"))["held"]
        record = await admin.get(f"/admin/api/inspect/{held['id']}")
        assert '"model":"up"' in record["upstream_request"]
        assert "chat.completion.chunk" in record["upstream_answer"]
        assert "event: message_start" in record["events"]
        assert record["status"] == 200
        assert record["client_headers"] == {"x-claude-code-agent-id": "a1", "user-agent": "claude-cli [key]"}
        recorder = admin.state.recorder
        recorder.until = time.monotonic() - 1  # its minutes are over
        assert (await admin.call("GET", f"/admin/api/inspect/{held['id']}"))[0] == 404
        await admin.call("PUT", "/admin/api/inspect", {"minutes": 15})
        await admin.call("POST", "/v1/messages", message(), token="x")
        assert recorder.held
        await admin.call("PUT", "/admin/api/inspect", {"minutes": 0.001})
        await until(lambda: not recorder.held, "it forgets, though nobody asks")
        await admin.call("PUT", "/admin/api/inspect", {"minutes": 15})
        await admin.call("POST", "/v1/messages", message(), token="x")
        assert len((await admin.get("/admin/api/inspect"))["held"]) == 1
        await admin.call("PUT", "/admin/api/inspect", {"minutes": 0})
        assert (await admin.get("/admin/api/inspect"))["held"] == []
