"""What the security tests attack, and with what: a ccmux full of canary keys, an upstream that leaks, raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_server as fs
from proxy_harness import ROOT, message_body

import ccmux

# Secrets that must never be seen again: not in an answer, a log line, the database or its backup.
CONFIG_KEY = "canary-config-key-83vd72hs9"
POOL_KEY = "canary-pool-key-9f8s7d6f5g"
ENVIRONMENT_KEY = "canary-environment-k2j4h5g6"
HEADER_VALUE = "canary-header-value-p0o9i8u7"
ERROR_KEY = "sk-ant-canary-in-the-error-5t4r3e2w"
ERROR_BEARER = "canary-bearer-in-error-1q2w3e4r"
ADMIN_TOKEN = "canary-admin-token-zxcv8765mnbv"
CLIENT_KEY = "canary-of-the-client-7u8i9o0p"
CANARIES = (
    CONFIG_KEY, POOL_KEY, ENVIRONMENT_KEY, HEADER_VALUE, ERROR_KEY, ERROR_BEARER, ADMIN_TOKEN, CLIENT_KEY,
)  # fmt: skip
FORGED_LINE = "2026-11-24 12:00:00,000 INFO request=req_forged status=200"
LEAK = f"{' '.join(CANARIES[:5])} Bearer {ERROR_BEARER}\r\n{FORGED_LINE}\x1b[2J\x00"
HOSTILE_HEADERS = [
    ("Set-Cookie", "session=1"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Credentials", "true"),
    ("Content-Security-Policy", "default-src *"),
    ("Server", "evil"),
    ("X-Powered-By", "evil"),
    ("Location", "http://evil.example/"),
    ("Refresh", "0; url=http://evil.example/"),
    ("Clear-Site-Data", "*"),
    ("Alt-Svc", 'h2="evil.example:443"'),
    ("request-id", "req_upstream"),
    ("anthropic-ratelimit-requests-remaining", "7"),
]


def treacherous() -> fs.Behaviour:
    """An upstream that does as the prompt says: `status 401` or `event` tells it to fail, and its words leak keys."""

    def steps(call: fs.UpstreamCall) -> Iterable[fs.Step]:
        words = call.body.decode("utf-8", "replace")
        if found := re.search(r"please answer with status (\d+)", words):
            return fs.status(int(found[1]), HOSTILE_HEADERS, "api_error", LEAK).steps(call)
        if "please break midway" in words:
            return fs.cut_after(5, fs.Send(fs.LAST_CHUNK), gate=False, extra=leaking_event).steps(call)
        if "please break first" in words:
            return fs.stream_of([leaking_event(call)])
        if "please send rubbish" in words:
            return [fs.whole(200, [("Content-Type", "text/html")], f"<p>{LEAK}</p>".encode())]
        return fs.answer(headers=HOSTILE_HEADERS).steps(call)

    return fs.Behaviour(steps)


def leaking_event(call: fs.UpstreamCall) -> bytes:
    return fs.error_event(call, "api_error", LEAK)


class Upstream:
    """A fault server on a loop and thread of its own, for tests that block on raw sockets."""

    def __init__(self, *script: fs.Behaviour) -> None:
        self.server = fs.FaultServer(*script)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> fs.FaultServer:
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.server.__aenter__(), self.loop).result(10)
        return self.server

    def __exit__(self, *error: Any) -> None:
        asyncio.run_coroutine_threadsafe(self.server.__aexit__(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


CONFIG = """
[server]
admin_token = "$CANARY_ADMIN"
allowed_hosts = ["ccmux.example", "[fd00::7]"]
body_timeout = 1
max_connections = 100
[credits]
enforce = false
[[providers]]
name = "anthropic-like"
type = "anthropic"
base_url = "{url}"
api_key = ["{config_key}", "{pool_key}"]
max_retries = 0
headers = {{ x-secret = "{header_value}" }}
[[providers]]
name = "openai-like"
type = "openai"
base_url = "{url}/v1"
api_key = "$CANARY_KEY"
max_retries = 0
[[providers]]
name = "own"
type = "anthropic"
base_url = "{url}"
api_key = "passthrough"
[[providers]]
name = "demo"
type = "demo"
[[models]]
name = "claude-a"
[[models.mappings]]
provider = "anthropic-like"
actual_model = "up-a"
[[models]]
name = "claude-o"
[[models.mappings]]
provider = "openai-like"
actual_model = "up-o"
[[models]]
name = "claude-p"
[[models.mappings]]
provider = "own"
actual_model = "up-p"
[[models]]
name = "claude-d"
[[models.mappings]]
provider = "demo"
actual_model = "demo"
"""


@dataclass
class Answer:
    """The first response in some bytes; `more` is what follows it."""

    raw: bytes
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    more: bytes = b""
    is_complete: bool = False

    def __post_init__(self) -> None:
        head, _, rest = self.raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/"):
            return
        self.status = int(first.split(" ")[1])
        if self.status == 100:
            self.raw = rest
            self.__post_init__()
            return
        self.headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self.is_complete = self.status in (204, 304)
        if "content-length" in self.headers:
            self.is_complete = len(rest) >= int(self.headers["content-length"])
            length = int(self.headers["content-length"])
            self.body, self.more = rest[:length], rest[length:]
        elif "chunked" in self.headers.get("transfer-encoding", ""):
            self.body, self.is_complete = rest, rest.endswith(b"0\r\n\r\n")
        else:
            self.body = rest


Headers = Mapping[str, str] | None


@dataclass
class Victim:
    """A ccmux process under attack, and all that it ever answered."""

    port: int
    folder: Path
    upstream: fs.FaultServer
    process: subprocess.Popen[bytes]
    answers: bytearray = field(default_factory=bytearray)
    sources: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def log(self) -> bytes:
        return (self.folder / "log").read_bytes()

    def send(self, data: bytes, quiet: float = 0.0) -> Answer:
        """Bytes on a connection of their own, from an address of their own; the answer, and what follows it within
        `quiet` seconds. Status 0: the connection was closed without one."""
        number = next(self.sources)
        source = (f"127.7.{number // 250}.{number % 250 + 1}", 0)
        with socket.create_connection(("127.0.0.1", self.port), 10, source) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
            raw = read_answer(client, quiet)
        self.answers += raw
        answer = Answer(raw)
        check_answer(answer)
        return answer

    def ask(
        self,
        method: str,
        path: str,
        headers: Headers = None,
        body: bytes | None = None,
        host: str | None = None,
    ) -> Answer:
        return self.send(self.request(method, path, headers, body, host))

    def request(
        self,
        method: str,
        path: str,
        headers: Headers = None,
        body: bytes | None = None,
        host: str | None = None,
    ) -> bytes:
        """A request's bytes, JSON unless the headers say otherwise; the connection ends with it."""
        changes = method in ("POST", "PUT", "PATCH", "DELETE")
        found = {"Host": f"127.0.0.1:{self.port}" if host is None else host, "Connection": "close"}
        if changes:
            found |= {"Content-Type": "application/json", "Content-Length": str(len(body or b""))}
        found |= headers or {}
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in found.items() if v != "-"), "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + ((body or b"") if changes else b"")

    def message(
        self, words: str = "Hello.", model: str = "claude-a", stream: bool = False, **headers: str
    ) -> Answer:
        """One POST /v1/messages."""
        body = {**message_body(stream), "model": model, "messages": [{"role": "user", "content": words}]}
        return self.ask("POST", "/v1/messages", headers, ccmux.compact(body))

    @property
    def admin(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {ADMIN_TOKEN}"}


def read_answer(client: socket.socket, quiet: float) -> bytes:
    """All bytes until the answer is complete or the connection closes; and `quiet` seconds longer."""
    raw = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while data := client.recv(65536):
            raw += data
            if Answer(raw).is_complete:
                if not quiet:
                    break
                client.settimeout(quiet)
    return raw


def check_answer(answer: Answer) -> None:
    """What holds for every answer to anybody."""
    assert not any(name.startswith("access-control-") for name in answer.headers), answer.raw
    assert answer.status != 500 or b"ccmux failed" not in answer.body, answer.raw
    assert b"Traceback" not in answer.raw
    # What is not HTTP is refused by aiohttp, under its own name.
    assert answer.headers.get("server") != "ccmux" or "request-id" in answer.headers, answer.raw


@contextlib.contextmanager
def victim(folder: Path, *script: fs.Behaviour, config: str = CONFIG) -> Iterator[Victim]:
    """ccmux as a process, with umask 0 and its log in a file, before an upstream of this process."""
    with Upstream(*(script or (treacherous(),))) as upstream, (folder / "log").open("wb") as log:
        text = config.format(
            url=upstream.url, config_key=CONFIG_KEY, pool_key=POOL_KEY, header_value=HEADER_VALUE
        )
        (folder / "config.toml").write_text(text)
        canaries = {"CANARY_KEY": ENVIRONMENT_KEY, "CANARY_ADMIN": ADMIN_TOKEN}
        environment = {**os.environ, "HOME": str(folder), **canaries}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "ccmux.py"), "serve", "--config", str(folder / "config.toml"), "--port", "0",
             "--log-level", "debug"],
            stdout=subprocess.PIPE, stderr=log, env=environment, cwd=folder, umask=0,
        )  # fmt: skip
        try:
            yield Victim(started_port(process), folder, upstream, process)
        finally:
            process.terminate()
            process.wait(30)
            if process.stdout:
                process.stdout.close()


def started_port(process: subprocess.Popen[bytes]) -> int:
    """The port in the start-up text."""
    assert process.stdout
    for line in process.stdout:
        if found := re.search(rb"http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise AssertionError("ccmux did not start")


def set_traps(folder: Path) -> Path:
    """Modules in a folder, named as all that ccmux and pip import; who runs one is written into the file returned."""
    sprung = folder / "sprung.txt"
    spring = f"open({str(sprung)!r}, 'a').write(__name__ + '\\n')\nraise SystemExit('imported from here')\n"
    others = ("aiohttp", "ccmux", "pip", "setuptools", "sitecustomize", "tiktoken", "usercustomize", "yaml")
    for name in {*sys.stdlib_module_names, *others}:
        (folder / f"{name}.py").write_text(spring)
    return sprung


def until(holds: Any, what: str, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)
