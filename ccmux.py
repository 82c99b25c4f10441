#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14,<4", "tiktoken>=0.8,<1"]
# ///
"""ccmux: Claude Code with any model of any provider, through one Python file.

Claude Code speaks the Anthropic Messages API to ccmux. ccmux picks a model by rule, sends the request to whichever
provider serves that model, streams the answer back as Anthropic events, goes on to the next provider when one
fails, counts tokens, and keeps an exact account of what every request cost.

One request, from the top of its way to the bottom:

1.  `guard` looks at Host, Origin, content type and size; the body is read once and parsed strictly, and what it has
    in common with earlier ones (most of a conversation) is known again, not parsed.
2.  The key names the user (or the local user, where none is required).
3.  `choose_route` walks the rules; the first that applies names the model. The trail of rules tried is kept.
4.  Credits are held, or the request is refused before any upstream byte.
5.  `Relay.run` walks the model's targets by priority, and passes over those with an open breaker or a cool-down.
6.  The dialect's `request` builds the upstream body; Anthropic-format upstreams get the client's own bytes.
7.  Upstream bytes -> `SseDecoder` -> the dialect's stream -> Anthropic events -> the client. Whole answers for
    clients that do not stream are collected from the same events: one translation path, not two.
8.  Nothing but pings reaches the client before the first content event, so failover stays possible until then.
9.  A client that hangs up closes the upstream.
10. The true usage is priced and settled before the last event goes out; one log line tells the story.

Sections, each using only those above it (pure: no socket, file, clock, environment or log):

    Types and errors (pure)
    Reading requests (pure)
    Config (pure but for load and save)
    Server-sent events (pure)
    Routing (pure)
    Anthropic stream (pure)
    Translate: OpenAI Chat (pure)
    Translate: OpenAI Responses (pure)
    Translate: Gemini (pure)
    OpenAI-format clients (pure)
    Dialects and presets (tables)
    Tokens and prices (pure; the encoder is handed in)
    Store (SQLite)
    Upstream (I/O)
    HTTP API
    Admin API
    Pages
    App and command line
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.stderr.write(
        f"ccmux needs Python 3.11 or newer, and this is {sys.version.split()[0]}: start it with a newer one "
        "(python3.12 ccmux.py, say), or with `uv run --script ccmux.py`, which brings its own\n"
    )
    sys.exit(2)

import contextlib
import marshal
import os
import types

__version__ = "0.1.0"

# aiohttp refuses a duplicate Host header since 3.13.4 and has RequestKey since 3.14; majors are not trusted
# unseen.
PACKAGES = ("aiohttp>=3.14,<4", "tiktoken>=0.8,<1")


def ccmux_home() -> Path:
    """Where ccmux keeps what has no other place: ~/.ccmux."""
    return expanded("~/.ccmux")


def expanded(path: str) -> Path:
    """A path with its ~ read; OSError where no home folder is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileNotFoundError(
            2, "no home folder is known for this; set HOME, or write the path out", path
        ) from None


def config_path(given: str, counts: Callable[[Path], bool] = os.path.exists) -> Path | None:
    """The config file in use: --config, $CCMUX_CONFIG, ./config.toml if it counts, ~/.ccmux/config.toml; None: none is."""
    if given or os.environ.get("CCMUX_CONFIG"):
        return expanded(given or os.environ["CCMUX_CONFIG"])
    if counts(here := Path("config.toml")):
        return here
    kept = ccmux_home() / "config.toml"
    return kept if kept.exists() else None


# What runs before the packages are there. `statusline` is asked for at every turn of a conversation, and
# stays under 60 ms by ending here: aiohttp alone takes 200. The folder that ccmux is started in may be anybody's: `-P`
# keeps `python -m` and `python -c` from looking there for what they import.


def wants_help(argv: list[str]) -> bool:
    """Whether --help or --version is ccmux's own, which needs nothing installed; after `code` it is claude's."""
    return bool({"--help", "-h", "--version"} & set(argv[:2] if argv[:1] == ["code"] else argv))


def statusline(given: str = "") -> str:
    """One line for Claude Code's statusLine command, whose JSON is on stdin: who answered, and the cost."""
    import json
    import sqlite3

    try:
        told = json.loads("" if sys.stdin.isatty() else sys.stdin.buffer.read())
        model, session = str(told["model"]["display_name"]), str(told["session_id"])
    except (ValueError, KeyError, TypeError, AttributeError):  # a closed stdin is None
        model, session = "", ""
    try:
        figures = session_figures(database_of(config_path(given, is_own_config)), session)
    except (OSError, ValueError, AttributeError, TypeError, sqlite3.Error) as error:
        figures = [f"ccmux: no figures ({error})"]
    return " | ".join(filter(None, [model, *figures]))


def print_statusline(given: str = "") -> None:
    """Prints it in UTF-8, as Claude Code reads it whatever the locale is."""
    import io

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    print(statusline(given))


def session_figures(database: str, session: str) -> list[str]:
    """[provider/model (route), cost of the session, of the day, balance] as texts; only what there is."""
    import sqlite3

    db = sqlite3.connect(f"{Path(database).absolute().as_uri()}?mode=ro", uri=True, timeout=0.05)
    last = db.execute(
        "select provider || '/' || model, route, user from requests where session = ? order by id desc limit 1",
        (session,),
    ).fetchone()
    target, route, user = last or ("", "", "local")
    cost = db.execute("select coalesce(sum(charge_microusd), 0) from requests where session = ?", (session,))
    today = db.execute(
        "select u.balance_microusd, coalesce(s.microusd, 0) from users u "
        "left join spent s on s.user_id = u.id and s.day = date('now') where u.name = ?",
        (user,),
    ).fetchone()
    balance, spent = today or (0, 0)

    def dollars(amount: int) -> str:
        return f"${amount / 1e6:.{2 if abs(amount) >= 10**6 else 4}f}"

    figures = [f"{target} ({route})", f"session {dollars(cost.fetchone()[0])}"] if last else []
    figures.append(f"today {dollars(spent)}")
    return figures + ([f"balance {dollars(balance)}"] if user != "local" else [])


def is_own_config(path: Path) -> bool:
    """Whether a file is a config of ccmux's. A config.toml in the project that Claude Code is in may be anything's."""
    import tomllib

    try:
        tables = tomllib.loads(path.read_text("utf-8-sig")).keys()
    except (OSError, ValueError, RecursionError):
        return False
    others = {"server", "credits", "presets", "cli"}  # the latter two: of claude-code-mux
    return bool(tables - others) and tables - others <= {"providers", "router", "models"}


def database_of(config: Path | None) -> str:
    """The database that a config file names: beside it, or in ~/.ccmux where there is no config."""
    import tomllib

    config = config or ccmux_home() / "config.toml"
    server = tomllib.loads(config.read_text("utf-8-sig")).get("server", {}) if config.exists() else {}
    return str(config.resolve().parent / expanded(server.get("database", "ccmux.db")))


def bootstrap(problem: str) -> None:
    """Installs the packages into a private virtual environment and starts again in it.

    Returns only where nothing is needed (`--help`, `--version`); exits 2 with what to do where it cannot install.
    """
    if wants_help(sys.argv[1:]):
        return
    given = os.environ.get("CCMUX_VENV") or "~/.ccmux/venv"
    if os.environ.get("CCMUX_NO_BOOTSTRAP"):
        bootstrap_failed(f"{problem}, and CCMUX_NO_BOOTSTRAP is set")
    try:
        venv = expanded(given).absolute()
        python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        ready = venv / "ccmux-ready"  # written last, so that an interrupted installation is begun again
        packages = "\n".join(PACKAGES)
        recipe = f"{packages}\nPython {sys.version_info[0]}.{sys.version_info[1]}"

        def is_ready() -> bool:
            made = ready.read_text() if python.exists() and ready.exists() else ""
            # Another Python's does as well, unless that has been upgraded since.
            return made == recipe or (made.startswith(packages) and has_packages(python))

        if Path(sys.prefix).resolve() == venv.resolve():
            ready.unlink(missing_ok=True)
            bootstrap_failed(f"{problem} in {venv} any more; start again to set it up anew")
        if not is_ready():
            print(f"ccmux: {problem}; setting up {venv} once (about 20 s)", file=sys.stderr, flush=True)
            venv.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with one_at_a_time(venv.parent):
                if not is_ready():  # by another start, meanwhile
                    install_packages(venv, python)
                    ready.write_text(recipe)
        start_again([str(python), os.path.abspath(__file__), *sys.argv[1:]])
    except OSError as error:
        bootstrap_failed(f"{problem}, and {given} cannot be set up: {error.strerror} ({error.filename})")
    except KeyboardInterrupt:
        sys.exit(130)


def has_packages(python: Path) -> bool:
    command = [str(python), "-P", "-c", "import aiohttp, tiktoken"]
    return subprocess.run(command, capture_output=True).returncode == 0  # noqa: S603


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Waits while another ccmux installs or starts in this folder; it would clear away what the other has begun."""
    try:
        import fcntl

        lock = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has no such locks
        yield
        return
    try:
        with contextlib.suppress(OSError):  # nor have some network file systems
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def start_again(command: list[str]) -> NoReturn:
    """Becomes the command; on Windows, where exec detaches from the console, runs it for its status."""
    if os.name != "nt":
        os.execv(command[0], command)  # noqa: S606
    child = subprocess.Popen(command)  # noqa: S603
    while True:
        try:
            sys.exit(child.wait())
        except KeyboardInterrupt:  # the child has heard it as well, and decides
            continue


def install_packages(venv: Path, python: Path) -> None:
    """Makes the virtual environment and pip-installs PACKAGES there; exits 2 with what went wrong."""
    is_own = not os.environ.get("CCMUX_VENV")  # may be one that was half cleared away, then
    if not is_own and venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        bootstrap_failed(f"{venv} is no virtual environment; CCMUX_VENV must name an empty or a new folder")
    flags = ("--quiet", "--disable-pip-version-check", "--no-user")
    steps = (
        [sys.executable, "-P", "-m", "venv", "--clear", str(venv)],
        [str(python), "-P", "-m", "pip", "install", *flags, *PACKAGES],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            if any("ensurepip" in line or "No module named venv" in line for line in words):
                words = ["this Python lacks its venv parts (on Debian and Ubuntu: apt install python3-venv)"]
            said = next((line for line in words if line.startswith("ERROR")), (words or ["it failed"])[-1])
            bootstrap_failed(f"{step[3]}: {said}")


def bootstrap_failed(why: str) -> NoReturn:
    sys.stderr.write(
        f"ccmux: {why.rstrip('.')}. ccmux needs aiohttp and tiktoken; any of these brings them:\n"
        f"  pip:  python3 -m venv ccmux-venv && ccmux-venv/bin/pip install '{PACKAGES[0]}' '{PACKAGES[1]}'\n"
        "        then start it with ccmux-venv/bin/python ccmux.py\n"
        "  uv:   uv run --script ccmux.py\n"
        "  apt:  apt install python3-venv   (then python3 ccmux.py sets itself up)\n"
    )
    sys.exit(2)


# Python keeps a script's syntax tree (27 MB) for as long as the script runs. So what runs for long, where it can, hands
# its compiled self to a fresh interpreter, which runs it under the same name, and collects no garbage before `main`.

RUN_COMPILED = """import sys
sys.argv = sys.argv[1:]
if sys.path[0] == "":
    sys.path[0] = sys.argv[0].rpartition("/")[0]
import gc, marshal, types
gc.disable()
module = sys.modules["__main__"] = types.ModuleType("__main__")
module.__file__ = sys.argv[0]
with open(%d, "rb") as compiled:
    code = marshal.loads(compiled.read())
exec(code, module.__dict__)"""
# For glibc's allocator. Its defaults give the memory of each request of 100 KB back to the kernel, and fetch it again.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(32 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
    "MALLOC_TOP_PAD_": str(4 * 2**20),
}
COUNT_TEXTS = "count-texts"  # the command of a server's counting process, which no person gives


def runs_long(argv: list[str]) -> bool:
    """Whether a command line starts a server, or the process that counts for one."""
    command = argv[0] if argv else "serve"
    return command in ("serve", "code", COUNT_TEXTS) or (command.startswith("-") and not wants_help(argv))


def run_compiled(code: types.CodeType) -> None:
    """Starts this plain `python ccmux.py ...` again, in its place, from its code; returns where that cannot be done."""
    if sys.orig_argv[1:2] != sys.argv[:1] or not sys.executable or not hasattr(os, "memfd_create"):
        return
    if None in (sys.stdin, sys.stdout, sys.stderr):  # closed ones: the file would become one of them
        return
    # No MFD_CLOEXEC, as it is to outlive the exec. Some kernels refuse such a file (vm.memfd_noexec).
    with contextlib.suppress(OSError), open(os.memfd_create("ccmux", 0), "wb") as file:
        file.write(marshal.dumps(code))
        file.seek(0)
        command = [
            sys.executable,
            "-c",
            RUN_COMPILED % file.fileno(),
            os.path.abspath(__file__),
            *sys.argv[1:],
        ]
        os.execve(command[0], command, MALLOC | os.environ)  # noqa: S606


if __name__ == "__main__" and runs_long(sys.argv[1:]):
    run_compiled(sys._getframe().f_code)

import subprocess
from pathlib import Path
from typing import NoReturn

if (
    __name__ == "__main__"
    and sys.argv[1:3] in (["statusline"], ["statusline", "--config"])
    and len(sys.argv) in (2, 4)
):
    print_statusline("".join(sys.argv[3:4]))
    sys.exit(0)

import ssl
import threading

BARE: list[ssl.SSLContext] = []  # that wait for the system's certificates
READING = threading.Lock()


@contextlib.contextmanager
def without_certificates() -> Iterator[None]:
    """aiohttp reads the system's certificates as it is imported, a tenth of a start. Here it is put off until the port
    listens, or a connection needs them.
    """
    read = ssl.SSLContext.load_default_certs
    ssl.SSLContext.load_default_certs = lambda context, *_: BARE.append(context)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ssl.SSLContext.load_default_certs = read  # type: ignore[method-assign]


def read_certificates() -> None:
    """Takes tens of milliseconds, in which other threads run."""
    with READING:
        while BARE:
            BARE[0].load_default_certs()
            del BARE[0]


try:
    with without_certificates():
        import aiohttp
    import tiktoken  # a small module; its vocabularies are loaded when something is counted
    from aiohttp import web

    if tuple(map(int, aiohttp.__version__.split(".")[:2])) < (3, 14):  # Debian 12 has 3.8
        raise ImportError(f"aiohttp {aiohttp.__version__} is too old, and a newer one is not installed")
except ImportError as error:
    if __name__ != "__main__":
        raise
    bootstrap(f"{error.name} is not installed" if error.name else str(error))

import argparse
import asyncio
import base64
import bisect
import codecs
import concurrent.futures
import contextvars
import copy
import csv
import dataclasses
import difflib
import email.utils
import enum
import errno
import functools
import gc
import hashlib
import hmac
import http.client
import importlib
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import queue
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import time
import tomllib
import typing
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Container,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from json.encoder import encode_basestring_ascii
from typing import Any

log = logging.getLogger("ccmux")


# ----------------------------------------------------------------------------------------------------------
# Types and errors (pure)
# ----------------------------------------------------------------------------------------------------------
# Data of our own is frozen dataclasses; wire data stays plain dicts, so that fields we do not know pass
# through. Absent is "" or None, one of the two, as the type says. Money is integer micro-dollars.

Json = dict[str, Any]
T = typing.TypeVar("T")

MAX_BODY = 32 * 2**20  # Anthropic's own limit of a request
MAX_STRUCTURE = 2_000_000  # structural characters of a JSON body: what a depth or width bomb is made of


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer, disjoint as Anthropic counts them; `estimated` where an upstream did not say."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0  # five-minute cache
    cache_write_1h: int = 0
    estimated: bool = False
    fast: bool = False  # made in Anthropic's fast mode

    @property
    def prompt(self) -> int:
        """All that was sent, cached or not."""
        return self.input + self.cache_read + self.cache_write + self.cache_write_1h


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens, which is micro-dollars per token. None: costs what input costs."""

    input: Decimal
    output: Decimal
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None
    # (above this many prompt tokens, the price of the whole request)
    tiers: tuple[tuple[int, Price], ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an upstream model: limits in tokens (0 unknown) and what it refuses."""

    context: int = 0
    max_output: int = 0
    sampling: bool = True  # takes temperature, top_p, top_k
    forced_tool: bool = True  # takes a tool_choice that forces a call
    thinking_off: bool = True  # takes thinking turned off, or with a budget
    price: Price | None = None


class ConfigError(Exception):
    """The operator's mistake: one line that names the table and key and says what to do. Exit status 2."""


class Retry(enum.Enum):
    """What a failed try allows, by RFC 9110's and the vendors' meaning of the status."""

    NO = "no"  # the request itself is at fault: no other try would differ
    LARGER = "larger"  # too long for this model: a target with a larger context may take it
    SAME = "same"  # a passing fault: the same target once more, then the next
    NEXT = "next"  # this target will not serve it now: the next one at once
    KEY = "key"  # this key is refused or limited: the provider's next key, then the next target


ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 408: "timeout_error", 409: "conflict_error", 413: "request_too_large",
    429: "rate_limit_error", 500: "api_error", 502: "api_error", 504: "timeout_error", 529: "overloaded_error",
}  # fmt: skip


def error_type(status: int) -> str:
    """Anthropic's error type of a status: the documented ones, else by hundred."""
    return ERROR_TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")


class ApiError(Exception):
    """An error for the client: Anthropic's error body, or an `error` event once a stream has begun.

    `retry_after` is in seconds. `raw` is an upstream's own body, passed on as it came; `headers` go with it.
    `cause` is a short word for logs and metrics: connect, timeout, status, stream, ... `code` is Anthropic's own for
    what an SDK heals by itself.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "",
        retry: Retry = Retry.NO,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        raw: bytes = b"",
        headers: Mapping[str, str] | None = None,
        cause: str = "",
        code: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type or error_type(status)
        self.retry, self.retry_after, self.should_retry = retry, retry_after, should_retry
        self.raw, self.headers, self.cause = raw, dict(headers or {}), cause or f"http_{status}"
        self.param = ""  # the request's parameter that an upstream names as the trouble
        self.code = code

    def body(self, request_id: str) -> Json:
        details = {"details": {"error_code": self.code}} if self.code else {}
        return {
            "type": "error",
            "error": {"type": self.type, "message": self.message, **details},
            "request_id": request_id,
        }


def strict_json(data: bytes, what: str = "the request body") -> Json:
    """A JSON object out of UTF-8 bytes; ApiError 400 or 413 for anything a careless parser would let through.

    Two parsers that read a duplicate key differently are a way around a check, so duplicates are refused, as are
    NaN, Infinity, numbers that overflow, and nesting that exhausts the stack.
    """
    check_structure(data, what)
    try:
        value = _STRICT.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{what} is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ApiError(400, f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"{what} must be a JSON object")
    return value


def check_structure(data: bytes, what: str) -> None:
    if len(data) > MAX_STRUCTURE and sum(map(data.count, (b"{", b"[", b",", b":"))) > MAX_STRUCTURE:
        raise ApiError(413, f"{what} has more than {MAX_STRUCTURE} structural characters; send less")


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    members = dict(pairs)
    if len(members) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name[:100]!r}")
    return members


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


_COMPACT = json.JSONEncoder(separators=(",", ":"))
_READABLE = json.JSONEncoder(ensure_ascii=False)


def compact(value: Any) -> bytes:
    """JSON as bytes without spaces; escapes beyond ASCII, which is what keeps lone surrogates harmless."""
    return _COMPACT.encode(value).encode()


def readable(value: Any) -> str:
    """JSON for a model to read: with spaces, and no escapes beyond those JSON must have."""
    return _READABLE.encode(value)


def blocks_of(content: Any) -> list[Json]:
    """The content blocks of a message: a string is one text block, what is not a block is left out."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        return []
    return [
        block if isinstance(block, dict) else {"type": "text", "text": block}
        for block in content
        if isinstance(block, dict) or (isinstance(block, str) and block)
    ]


def as_list(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_object(value: Any) -> Json:
    """The value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def text_of(content: Any) -> str:
    """The text of a content value, blocks joined by blank lines; other blocks are left out."""
    return "\n\n".join(str(b.get("text") or "") for b in blocks_of(content) if b.get("type") == "text")


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without keys: the configured ones, and whatever looks like one."""
    for secret in secrets:
        if len(secret) >= 6:
            text = text.replace(secret, "[key]")
    return _KEY_LIKE.sub(lambda m: f"{m[1] or ''}[key]", text)


_KEY_LIKE = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}|\b(?:(?:sk|pk|rk|xai|gsk)[-_]|AIza)[\w-]{8,}")


# ----------------------------------------------------------------------------------------------------------
# Reading requests (pure)
# ----------------------------------------------------------------------------------------------------------
# Claude Code sends the whole conversation with every turn. What two requests have in common is parsed once, and
# what is made of it (a count, a translation, its bytes) is made once. `RequestReader` knows elements again by
# their bytes; `once` and `each` keep with an element what was made of it.


class MuchNewError(Exception):
    """A request has more new elements than are worth taking apart while somebody waits for it."""


class Element:
    """One element of an array as it stood in a request: its bytes and its value.

    `weight` is the bytes of memory it takes, roughly, with what is made of it. A run's values count with their elements.
    """

    __slots__ = ("raw", "value", "weight")

    def __init__(self, raw: bytes, value: Any) -> None:
        self.raw, self.value = raw, value
        self.weight = 1024 + 2 * len(raw)
        if type(value) is not Run:
            self.weight += len(raw) + 256 * raw.count(b"{") + 128 * raw.count(b"[")


class RequestReader:
    """Reads requests as `strict_json` does, but what many of them have in common only once.

    Claude Code sends the whole conversation with each turn, and its tools and system prompt. The elements of those
    arrays are known again by their bytes. The rest is parsed with a mark in place of each array's inside, a text that
    no client can foresee. Where the mark comes out as the array's one element, an array is what stood there, and its
    elements are what the parser would have found.
    """

    ARRAYS = (b'"messages"', b'"tools"', b'"system"')
    SMALL = 4096  # bytes of a request that is not worth it
    MOST_NEW = 2**16  # bytes of new elements that are read one by one while a client waits
    EACH = 512  # bytes that it counts for to read an element at all
    PREFIX = 128  # bytes by which an element is looked up; shorter ones are not kept
    ALIKE = 32  # elements kept that begin alike
    RUN = 8  # elements that are worth a run

    def __init__(self, most: int = 2**25) -> None:
        self.most = most  # bytes of memory, roughly
        self.mark = secrets.token_hex(16)  # what stands for an array's inside
        self.young: dict[bytes, list[Element]] = {}
        self.old: dict[bytes, list[Element]] = {}  # not used since the young were as many as these
        self.runs: dict[bytes, list[Element]] = {}  # of the young
        self.weight = 0  # of both
        self.new = 0  # bytes of new elements in the request that is being read
        self.kept = 0  # elements that were ever kept
        self.unread: deque[tuple[bytes, int]] = deque(maxlen=4)  # (request, tries) with much that is new

    def read(self, raw: bytes) -> Json:
        """The request; ApiError as `strict_json`. One with much that is new is read as a whole, and kept by `learn`."""
        if not self.SMALL <= len(raw) <= self.most // 6:  # as the weight of all its elements
            return strict_json(raw)
        check_structure(raw, "the request body")
        try:
            return self.read_apart(raw)
        except MuchNewError:
            if Element(raw, None).weight <= self.most // 2:  # else its end drives out its beginning
                self.unread.append((raw, 8 * len(raw) // self.MOST_NEW + 4))
        except BROKEN:
            pass
        return strict_json(raw)  # which says what is wrong with it

    def learn(self) -> bool:
        """Reads on, element by element, in a request that was read as a whole; whether there is more to do.

        It ends with the request, or with a step in which nothing was found that can be kept.
        """
        if not self.unread:
            return False
        raw, tries = self.unread.popleft()
        before = self.kept
        try:
            self.read_apart(raw)
        except MuchNewError:
            if tries and self.kept > before:
                self.unread.appendleft((raw, tries - 1))
        except BROKEN:
            pass
        return bool(self.unread)

    def read_apart(self, raw: bytes) -> Json:
        self.new = 0
        arrays: dict[str, list[Any]] = {}
        rest = [(0, len(raw))]  # what is left of the request, as (start, end)
        for name in self.ARRAYS:
            for at, (begin, stop) in enumerate(rest):
                if start := start_of_array(raw, name, begin, stop):
                    arrays[name[1:-1].decode()], end = self.elements(raw, start)
                    rest[at : at + 1] = [(begin, start), (end, stop)]
                    break
        body = strict_json((b'"%b"' % self.mark.encode()).join([raw[a:b] for a, b in rest]))
        for key, values in arrays.items():
            if body.get(key) != [self.mark]:
                raise ValueError("not the array it seemed to be")
            body[key] = values
        return body

    def elements(self, raw: bytes, start: int) -> tuple[list[Any], int]:
        """The elements of the array whose inside begins at `start`, and the place behind: its end, if all is well."""
        values: list[Any] = []
        place = start
        if run := self.find(self.runs, raw, start):
            values += run.value.values
            place += len(run.raw)
        seen = len(values), place  # how many were there before, and how far
        is_more = raw[place] == COMMA if run else not _ARRAY_END.match(raw, start)
        place += bool(run) and is_more
        try:
            while is_more:
                known = self.find(self.young, raw, place)
                element = known or self.find_old(raw, place) or self.scan(raw, place)
                values.append(element.value)
                place += len(element.raw)
                if known:
                    seen = len(values), place
                is_more = raw[place] == COMMA
                place += is_more
        finally:  # where `learn` breaks off, its next step begins behind what is known
            values = self.with_run(run, values, seen[0], memoryview(raw)[start : seen[1]])
        return values, place

    def with_run(self, run: Element | None, values: list[Any], seen: int, text: memoryview) -> list[Any]:
        """The values, with the run that they begin with.

        Where more of them were there before, `seen` in all, they make a longer run; `text` is how they stand there.
        """
        known = len(run.value.values) if run else 0
        if not all(isinstance(value, dict) for value in values[known:]):
            return values
        if seen - known >= self.RUN:
            longer = Element(bytes(text), Run(values[:seen]))
            self.keep_run(longer, run)
            run = longer
        return Elements(values, run.value) if run else values

    def find(self, kept: dict[bytes, list[Element]], raw: bytes, place: int) -> Element | None:
        for element in kept.get(raw[place : place + self.PREFIX], ()):
            if raw.startswith(element.raw, place):
                return element
        return None

    def scan(self, raw: bytes, place: int) -> Element:
        """Reads the element at `place`, with the blanks around it."""
        if self.new > self.MOST_NEW:
            raise MuchNewError
        size = 4096
        while True:
            text, _ = codecs.utf_8_decode(raw[place : place + size], "strict", False)
            try:
                value, end = _STRICT.scan_once(text, blanks_end(text, 0))  # type: ignore[attr-defined]
                break
            except (ValueError, StopIteration):
                if place + size >= len(raw):
                    raise
                size *= 8
        end = blanks_end(text, end)
        known = raw[place : place + end] if text.isascii() else text[:end].encode()
        self.new += len(known) + self.EACH
        if not isinstance(value, dict) or len(known) < self.PREFIX:
            return Element(known, value)
        element = Element(known, Kept(value))
        self.keep(element)
        return element

    def find_old(self, raw: bytes, place: int) -> Element | None:
        """An old element that begins at `place`, which makes it young again."""
        if element := self.find(self.old, raw, place):
            self.keep(element)
        return element

    def keep(self, element: Element) -> None:
        """Two generations: when the young are too many, they become the old, and the old are forgotten."""
        if element.weight > self.most // 2:
            return
        if self.weight + element.weight > self.most // 2:
            self.young, self.old, self.runs, self.weight = {}, self.young, {}, 0
        self.kept += 1
        self.add(self.young, element)

    def keep_run(self, run: Element, shorter: Element | None) -> None:
        """Keeps a run in place of the shorter one that it begins with, but only where there is room: it must not drive
        out what it is made of. The longest come first.
        """
        prefix = run.raw[: self.PREFIX]
        alike = self.runs.get(prefix, [])
        freed = sum(other.weight for other in alike if other is shorter)
        if self.weight - freed + run.weight <= self.most // 2:
            self.weight -= freed
            self.runs[prefix] = [other for other in alike if other is not shorter]
            self.add(self.runs, run)
            self.runs[prefix].sort(key=lambda other: -len(other.raw))

    def add(self, kept: dict[bytes, list[Element]], element: Element) -> None:
        alike = kept.setdefault(element.raw[: self.PREFIX], [])
        # One of them goes, any: where more of them come round in turn, none would be found without the oldest.
        if len(alike) == self.ALIKE:
            self.weight -= alike.pop(hash(element.raw) % self.ALIKE).weight
        alike.insert(0, element)
        self.weight += element.weight


# What a request raises that cannot be read apart.
BROKEN = (ValueError, IndexError, StopIteration, RecursionError, ApiError)
COMMA = ord(",")
_ARRAY_START = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*\[")
_ARRAY_END = re.compile(rb"[ \t\r\n]*\]")
_BLANKS = re.compile(r"[ \t\r\n]*")


def start_of_array(raw: bytes, key: bytes, begin: int, stop: int) -> int:
    """Where the inside of an array under `key` begins: the first one at any depth; 0 where there is none."""
    at = raw.find(key, begin, stop)
    while at >= 0:
        if match := _ARRAY_START.match(raw, at + len(key), stop):
            return match.end()
        at = raw.find(key, at + 1, stop)
    return 0


def blanks_end(text: str, start: int) -> int:
    match = _BLANKS.match(text, start)
    return match.end() if match else start


# What is kept of requests, and with it what was made of it.


class Made(dict[Any, Any]):
    """What was made of something that never changes. A key tells all else that it was made from."""

    MOST = 12

    def once(self, key: Any, make: Callable[[], T]) -> T:
        try:
            return self[key]  # type: ignore[no-any-return]
        except KeyError:
            value = make()
        if len(self) >= self.MOST:
            self.clear()
        self[key] = value
        return value


class MadeOfTurn(Made):
    """The same for a turn: one translation. Several would take more memory than the turn."""

    MOST = 1


class Kept(dict[str, Any]):
    """A JSON object out of a request that later requests will hold too, so it is never changed.

    What is made of it (a count, a translation) is kept with it.
    """

    __slots__ = ("made",)

    def __init__(self, members: Json) -> None:
        super().__init__(members)
        self.made = Made()


def once(part: Any, make: Callable[[Any], T]) -> T:
    """`make(part)`; where the part is kept, so is the result."""
    if type(part) is not Kept:
        return make(part)
    try:
        return part.made[make]  # type: ignore[no-any-return]
    except KeyError:
        return part.made.once(make, functools.partial(make, part))


class Run:
    """Objects that stand together in an array of many requests; what is made of them all is kept with them."""

    __slots__ = ("made", "values")

    def __init__(self, values: Iterable[Json]) -> None:
        self.values = [value if type(value) is Kept else Kept(value) for value in values]
        self.made = Made()


class Elements(list[Json]):
    """A list of objects with a run in it, from `at` on."""

    __slots__ = ("at", "run")

    def __init__(self, values: Iterable[Json], run: Run, at: int = 0) -> None:
        super().__init__(values)
        self.run, self.at = run, at

    @property
    def apart(self) -> tuple[list[Json], list[Json]]:
        """What stands before the run, and what behind it."""
        return self[: self.at], self[self.at + len(self.run.values) :]


def each(values: Sequence[Json], make: Callable[[Any], T]) -> list[T]:
    """`make` of each, as `once`; of a run of them at once."""
    if type(values) is not Elements:
        return [once(value, make) for value in values]
    run = values.run
    known = run.made.once(make, lambda: [once(value, make) for value in run.values])
    if len(values) == len(known):
        return [*known]
    before, behind = values.apart
    return [*(once(value, make) for value in before), *known, *(once(value, make) for value in behind)]


def messages_of(body: Json) -> list[Json]:
    """The messages of a request that are objects; their shape is the upstream's to judge."""
    return objects_of(body.get("messages"))


def tools_of(body: Json) -> list[Json]:
    return objects_of(body.get("tools"))


def objects_of(values: Any) -> list[Json]:
    return values if type(values) is Elements else [v for v in as_list(values) if isinstance(v, dict)]


def request_bytes(out: Json) -> bytes:
    """`compact` for a request; what is kept in its lists is encoded once."""
    members = []
    for key, value in out.items():
        has_kept = isinstance(value, list) and Kept in map(type, value)
        text = b"[%b]" % joined(value) if has_kept else compact(value)
        members.append(b"%b:%b" % (compact(key), text))
    return b"{%b}" % b",".join(members)


def joined(values: Sequence[Json]) -> bytes:
    """The inside of an array as JSON."""
    if type(values) is not Elements or not values.run.values:
        return b",".join([once(value, compact) for value in values])
    before, behind = values.apart
    known = values.run.made.once(joined, functools.partial(joined, values.run.values))
    return b",".join([*(once(v, compact) for v in before), known, *(once(v, compact) for v in behind)])


# ----------------------------------------------------------------------------------------------------------
# Config (pure but for load and save)
# ----------------------------------------------------------------------------------------------------------
# Each key is declared once, as a dataclass field with its default and `opt` metadata: the loader, the error
# texts, the admin forms and the tests of the documentation are all made from that declaration. A Config is
# never changed: a reload builds a new one and swaps it whole.


def opt(
    default: Any,
    help: str,
    *,
    secret: bool = False,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    regex: bool = False,
) -> Any:
    """A config key: its default, what it means, whether it is write-only, what it may be."""
    metadata = {
        "help": help, "secret": secret, "choices": choices, "least": least, "most": most, "regex": regex,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=dict, repr=not secret, metadata=metadata)
    return field(default=default, repr=not secret, metadata=metadata)


def computed(default: Any) -> Any:
    """A field that ccmux works out; not a key of the file."""
    return field(default=default, repr=False, metadata={"computed": True})


EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Server:
    host: str = opt("127.0.0.1", "address to listen on; anything but loopback needs require_key = true")
    port: int = opt(13456, "port to listen on", least=0, most=65535)
    log_level: str = opt("info", "how much is logged", choices=LOG_LEVELS)
    database: str = opt("ccmux.db", 'SQLite file, beside this one if relative; ":memory:" keeps nothing')
    admin_token: str = opt(
        "", "token of the admin page; unset: made at first start and kept beside the database", secret=True
    )
    require_key: bool = opt(False, "whether every client needs a user's key")
    allowed_hosts: tuple[str, ...] = opt(
        (), "Host names accepted besides localhost, 127.0.0.1, [::1] and `host`"
    )
    max_connections: int = opt(512, "client connections at once", least=1, most=10**6)
    body_timeout: float = opt(
        120.0, "seconds for a whole request body; 30 s without a byte ends it too", least=0.1
    )
    client_stall_timeout: float = opt(60.0, "seconds a client may stop reading", least=0.1)
    drain_timeout: float = opt(20.0, "seconds live streams get at shutdown", least=0)


@dataclass(frozen=True, slots=True)
class PromptRule:
    pattern: re.Pattern[str] = opt(
        re.compile(""), "regular expression, searched in the user's own newest words"
    )
    model: str = opt("", "the model to use; $1 stands for the first group")
    strip: bool = opt(False, "whether the matched words are taken out of the request")


@dataclass(frozen=True, slots=True)
class Router:
    default: str = opt("", "model for everything no other rule takes; unset: the first of the models")
    background: str = opt("", "model for auxiliary calls: titles, summaries, the small model")
    think: str = opt("", "model for what think_on names")
    think_on: tuple[str, ...] = opt(
        ("plan", "xhigh", "max"),
        "when think applies: plan, budget, or an effort",
        choices=("plan", "budget", *EFFORTS[1:]),
    )
    websearch: str = opt("", "model for requests that offer the web_search server tool")
    subagent: str = opt("", "model for sub-agents and workflows")
    compaction: str = opt("", "model for compaction")
    image: str = opt("", "model for requests with an image in the newest turn")
    long_context: str = opt("", "model for requests above long_context_tokens")
    long_context_tokens: int = opt(180_000, "counted input tokens above which long_context applies", least=1)
    auto_map_regex: re.Pattern[str] | None = opt(
        re.compile("^claude-"),
        "Claude's own names, which the rules decide about; others were picked on purpose",
    )
    background_regex: re.Pattern[str] | None = opt(
        re.compile("(?i)claude.*haiku"), "names that mean a background call"
    )
    fallback_provider: str = opt("", "names nobody serves go to this provider untouched")
    rules: tuple[PromptRule, ...] = opt((), "prompt rules, first match wins")


ROUTE_SLOTS = (
    "default", "background", "think", "websearch", "subagent", "compaction", "image", "long_context",
)  # fmt: skip


@dataclass(frozen=True)
class Quirks:
    """How a provider differs from its wire format. Regular expressions are searched in the upstream model's name."""

    auth: str = opt(
        "",
        "how the key is sent; unset: as the format does",
        choices=("", "x-api-key", "bearer", "both", "none", "x-goog-api-key"),
    )
    drop: tuple[str, ...] = opt(
        (), "body keys to leave out; also billing_header, tool_type, media, files, reasoning"
    )
    max_tokens_key: str = opt(
        "auto", "name of the output limit", choices=("auto", "max_tokens", "max_completion_tokens")
    )
    effort: tuple[str, ...] = opt(
        (), "reasoning efforts it takes, in rising order; empty: none is sent", choices=EFFORTS
    )
    reasoning_replay: str = opt(
        "none", "whether earlier thinking goes back", choices=("none", "tool_turns", "all")
    )
    reasoning_key: str = opt(
        "reasoning_content",
        "the key earlier thinking goes back in; reasoning_details and extra_content: as it came",
    )
    cache_control: str = opt("", "models that take cache_control (regular expression)", regex=True)
    files: bool = opt(False, "takes PDF files as content parts")
    vision: bool = opt(True, "takes images")
    vision_models: str = opt(
        "", "models that take images where vision is false or media dropped (regular expression)", regex=True
    )
    web_search: str = opt("", "how it searches the web", choices=("", "options", "plugin", "responses"))
    schema: str = opt("", "tool schema cleaning", choices=("", "gemini"))
    midway_system: bool = opt(False, "takes system messages in mid-conversation")
    user_after_tool: bool = opt(True, "takes a user message directly behind the results of tools")
    stream_options: bool = opt(True, "takes stream_options, which asks for usage")
    lax_finish: bool = opt(False, "may end a stream without a finish_reason")
    think_tags: bool = opt(False, "puts thinking into <think> tags in the text")
    tool_id: str = opt("", "pattern that tool ids must match, for example [A-Za-z0-9]{9}", regex=True)
    forced_tool: bool = opt(True, "takes a tool_choice that forces a call")
    top_k: bool = opt(False, "takes top_k")
    prompt_cache_key: bool = opt(False, "takes prompt_cache_key")
    count_tokens: str = opt("auto", "who counts tokens", choices=("auto", "local", "upstream"))
    codex: str = opt(
        "", "models that are served by the Responses format instead (regular expression)", regex=True
    )
    transient: str = opt("", "text of a 400 that means a passing fault")
    extra_body: dict[str, Any] = opt({}, "keys added to every request body")

    @functools.cached_property
    def token(self) -> object:
        """What stands for these quirks in a key: of their own, and hashed at once."""
        return object()


@dataclass(frozen=True, slots=True)
class Provider:
    name: str = opt("", "what ccmux calls it")
    type: str = opt("", "wire format (anthropic, openai, responses, gemini, demo) or a preset")
    base_url: str = opt("", "overrides the preset's address")
    api_key: tuple[str, ...] = opt(
        (),
        'the key, "$NAME" for an environment variable, "passthrough" for the client\'s own; several take turns',
        secret=True,
    )
    models: tuple[str, ...] = opt(
        (), "upstream names that may be asked for as they are, without a row of their own"
    )
    headers: dict[str, str] = opt({}, "headers added to every request", secret=True)
    enabled: bool = opt(True, "whether it is tried at all")
    max_retries: int = opt(1, "tries on one target beside the first", least=0)
    max_concurrent: int = opt(64, "requests at once", least=1)
    connect_timeout: float = opt(10.0, "seconds to connect", least=0.05)
    first_byte_timeout: float = opt(120.0, "seconds until a streamed answer begins", least=0.05)
    response_timeout: float = opt(600.0, "seconds until an answer that is not streamed begins", least=0.05)
    idle_timeout: float = opt(120.0, "seconds between two reads of a stream", least=0.05)
    total_timeout: float = opt(3600.0, "seconds for a whole request, all tries together", least=0.05)
    proxy: str = opt("", "proxy address; unset: HTTPS_PROXY and NO_PROXY of the environment")
    quirks: Quirks = opt(Quirks(), "how it differs from its format")
    format: str = computed("")  # the wire format behind `type`
    default_model: str = computed("")  # the preset's, for a start without a config
    problem: str = computed("")  # why it cannot be used: a missing variable, say

    @property
    def usable(self) -> bool:
        return self.enabled and not self.problem

    @property
    def passthrough(self) -> bool:
        """Whether the client's own credential goes upstream."""
        return self.api_key == ("passthrough",)


@dataclass(frozen=True, slots=True)
class Target:
    """An upstream model at a provider; price and context are what the config says for it, if anything."""

    provider: str = opt("", "name of a [[providers]] row")
    actual_model: str = opt("", "the provider's own name of the model")
    priority: int = opt(1, "1 is tried first; equal ones in file order")
    price: Price | None = opt(None, "US dollars per million tokens, for this target alone")
    context: int = opt(0, "context window in tokens, for this target alone", least=0)


@dataclass(frozen=True, slots=True)
class Model:
    name: str = opt("", "the name that routes and clients use")
    context: int = opt(0, "context window in tokens; 0: not known", least=0)
    price: Price | None = opt(None, "US dollars per million tokens; unset: the built-in table")
    mappings: tuple[Target, ...] = opt((), "providers that serve it, tried by priority")


@dataclass(frozen=True, slots=True)
class Credits:
    enforce: bool = opt(False, "whether a user without a balance is refused")
    markup_percent: Decimal = opt(Decimal(0), "added to the provider's cost", least=0, most=100_000)
    default_price: Price = opt(
        Price(Decimal(5), Decimal(25)), "for models with no known price, when enforcing"
    )
    starting_credit: Decimal = opt(Decimal(0), "dollars a new user gets", least=0, most=10**9)
    max_concurrent: int = opt(8, "requests of one user at a time when enforcing", least=1)


@dataclass(frozen=True)
class Config:
    """The whole configuration, swapped as one. `tables` is the file as parsed (secrets as written)."""

    server: Server = opt(Server(), "the server itself")
    router: Router = opt(Router(), "which model a request goes to")
    providers: tuple[Provider, ...] = opt((), "who serves models")
    models: tuple[Model, ...] = opt((), "names and what stands behind them")
    credits: Credits = opt(Credits(), "what users pay")
    path: str = computed("")  # "" when there is no file
    text: str = computed("")
    text_hash: str = computed("")
    tables: Json = field(default_factory=dict, repr=False, metadata={"computed": True})
    warnings: tuple[str, ...] = computed(())

    def provider(self, name: str) -> Provider | None:
        return self._providers.get(name)

    def model(self, name: str) -> Model | None:
        """The row of that name, or of its alias `anthropic/name`."""
        return self._models.get(name) or self._models.get(name.removeprefix("anthropic/"))

    @functools.cached_property
    def _providers(self) -> dict[str, Provider]:
        return {p.name: p for p in self.providers}

    @functools.cached_property
    def _models(self) -> dict[str, Model]:
        return {m.name: m for m in self.models}

    @functools.cached_property
    def smallest_limit(self) -> int:
        """The fewest input tokens that a route may turn on: long_context_tokens, or a model's context."""
        contexts = {model.context for model in self.models}
        contexts |= {target.context for model in self.models for target in model.mappings}
        return min({self.router.long_context_tokens, *contexts} - {0})

    @functools.cached_property
    def secrets(self) -> list[str]:
        """Every secret value in it, longest first, for scrubbing."""
        found = {self.server.admin_token}
        for p in self.providers:
            found |= {*p.api_key, *p.headers.values(), str(p.quirks.extra_body.get("api_key", ""))}
            found |= {urllib.parse.urlsplit(url).password or "" for url in (p.base_url, p.proxy)}
        return sorted(found - {"", "passthrough"}, key=len, reverse=True)


def parse_config(
    text: str, env: Mapping[str, str], presets: Mapping[str, Json], formats: Iterable[str], path: str = ""
) -> Config:
    """TOML and environment -> Config; ConfigError naming table and key where it is wrong.

    A preset is itself a provider table whose `type` is a wire format; a provider that names it inherits its keys.
    """
    try:
        tables = tomllib.loads(text, parse_float=Decimal)
        wanted = copy.deepcopy(tables)
    except (ValueError, RecursionError, InvalidOperation) as error:
        words = "a number is too large" if isinstance(error, InvalidOperation) else str(error)
        hint = "; text stands in quotes" if "Invalid value" in words else ""
        raise ConfigError(f"{path or 'config'}: not valid TOML: {words}{hint}") from None
    warnings: list[str] = []
    import_mux(wanted, warnings)
    rows = wanted.pop("providers", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError("providers: write it as [[providers]] tables")
    providers = [load_provider(row, n, env, presets, tuple(formats)) for n, row in enumerate(rows, 1)]
    fill_secrets(Server, as_object(wanted.get("server")), env)
    config: Config = load_table(Config, wanted, "")
    config = dataclasses.replace(
        config, providers=tuple(providers), path=path, text=text, text_hash=hash_text(text), tables=tables
    )
    check_names(config)
    check_hosts(config.server)
    return dataclasses.replace(config, warnings=tuple(dict.fromkeys([*warnings, *warnings_of(config)])))


def warnings_of(config: Config) -> Iterator[str]:
    for provider in config.providers:
        if provider.problem and provider.enabled:
            yield f"provider {provider.name}: {provider.problem}; it is disabled until then"
    for model in config.models:
        if model.name.lower().endswith("[1m]"):
            yield f"[[models]] {model.name!r}: [1m] at the end of a name is ignored, so nobody can ask for this one"


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_provider(
    row: Json, number: int, env: Mapping[str, str], presets: Mapping[str, Json], formats: tuple[str, ...]
) -> Provider:
    """A provider's row over its preset's; a variable that is not set is its `problem`, which is never fatal."""
    name, kind = row.get("name"), str(row.get("type") or "")
    where = f"[[providers]] {name!r}" if isinstance(name, str) and name else f"[[providers]] row {number}"
    if not isinstance(name, str) or not re.fullmatch(r"(?! )[\w.@:+ -]{1,64}(?<! )", name):
        raise ConfigError(
            f"{where}: key 'name' must be 1 to 64 letters, digits, spaces or . _ - @ : + (no slash)"
        )
    if kind not in formats and kind not in presets:
        raise ConfigError(
            f"{where}: key 'type' is {kind!r}: {known_names(kind, dict.fromkeys([*formats, *presets]))}"
        )
    preset = preset_at(presets.get(kind, {}), str(row.get("base_url") or ""))
    default_model, wire_format = preset.pop("default", ""), preset.pop("type", kind)
    merged = {**preset, **row, "base_url": row.get("base_url") or preset.get("base_url", "")}
    for key in ("quirks", "headers"):
        if isinstance(row.get(key, {}), dict):
            merged[key] = {**preset.get(key, {}), **row.get(key, {})}
    if isinstance(merged.get("api_key"), str):
        merged["api_key"] = [merged["api_key"]] if merged["api_key"] else []
    missing = fill_secrets(Provider, merged, env)
    provider: Provider = load_table(Provider, merged, where)
    for header in provider.headers:
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", header, re.ASCII):
            raise ConfigError(f"{where}: key 'headers': {header!r} is no name of a header")
    if not provider.base_url and wire_format != "demo":
        raise ConfigError(f"{where}: key 'base_url' is needed for type {kind!r}")
    check_url(provider.base_url, f"{where}: key 'base_url'")
    check_url(provider.proxy, f"{where}: key 'proxy'")
    problem = f"${missing[0]} is not set in the environment" if missing else ""
    if any(re.search(r"[\r\n]", text) for text in (*provider.api_key, *provider.headers.values())):
        problem = "its api_key, or a header, has a line end inside"
    return dataclasses.replace(provider, format=wire_format, default_model=default_model, problem=problem)


def preset_at(preset: Json, base_url: str) -> Json:
    """What a row with this base_url inherits. Away from the vendor's own address no key need be set, and the vendor's
    own way to search the web is missing.
    """
    row = {key: value for key, value in preset.items() if key != "hosts"}
    if not base_url or re.search(preset.get("hosts", ""), base_url):
        return row
    key = f"${{{preset['api_key'].removeprefix('$')}:-}}"
    return {**row, "api_key": key, "quirks": {**row["quirks"], "web_search": "options"}}


def fill_secrets(cls: Any, table: Json, env: Mapping[str, str]) -> list[str]:
    """Puts the environment's values in place of `$NAME`, `${NAME}` and `${NAME:-default}` in a table's secrets, and
    returns the names that are not set. Blanks and line ends around a secret are a file's, not the key's.
    """
    missing: list[str] = []

    def variable(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        value = env.get(name, "").strip()
        if not value and default is None:
            missing.append(name)
        return value or default or ""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if not isinstance(value, str):
            return value
        return re.sub(r"\$(?:\{(\w+)(?::-([^}]*))?\}|([A-Za-z_]\w*))", variable, value).strip()

    for f in dataclasses.fields(cls):
        if f.metadata.get("secret") and f.name in table:
            table[f.name] = filled(table[f.name])
    return missing


def load_table(cls: Any, table: Any, where: str) -> Any:
    """A dataclass from a table; unknown keys are an error that names the nearest known one."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: must be a table")
    fields = {f.name: f for f in dataclasses.fields(cls) if "computed" not in f.metadata}
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(
                f"{where + ': ' if where else ''}unknown key {key!r}: {known_names(key, fields)}"
            )
        title = f"[[{key}]]" if isinstance(value, list) else f"[{key}]"
        at = f"{where}: key {key!r}" if where else title
        values[key] = load_value(value, type_hints(cls)[key], at)
        check_value(values[key], fields[key].metadata, at)
    return cls(**values)


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_value(value: Any, rule: Mapping[str, Any], at: str) -> None:
    least, most, choices = rule.get("least"), rule.get("most"), rule.get("choices")
    if rule.get("regex"):
        compile_regex(value, at)
    if least is not None and value < least:
        raise ConfigError(f"{at} must be at least {least:g}")
    if most is not None and value > most:
        raise ConfigError(f"{at} must be at most {most}")
    for item in value if isinstance(value, tuple) else [value]:
        if choices and item not in choices:
            raise ConfigError(f"{at} is {item!r}: {known_names(str(item), choices)}")


def load_value(value: Any, hint: Any, at: str) -> Any:
    """A TOML value as the type that a field declares."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in options:
        return None if value == "" else load_value(value, options[0], at)
    if origin is tuple:
        items = load_plain(value, list, at)
        return tuple(load_value(item, options[0], f"{at}, item {n}") for n, item in enumerate(items, 1))
    if origin is dict:
        items = load_plain(value, dict, at)
        return {key: load_value(item, options[1], f"{at}, {key!r}") for key, item in items.items()}
    if origin is re.Pattern:
        return compile_regex(load_plain(value, str, at), at)
    if hint is Any:
        return json_value(value, at)
    if hint is Price:
        return parse_price(value, at)
    if dataclasses.is_dataclass(hint):
        return load_table(hint, value, at)
    return load_plain(value, hint, at)


PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text in quotes"), bool: ((bool,), "true or false"), int: ((int,), "a whole number"),
    float: ((int, Decimal), "a number"), Decimal: ((int, Decimal), "a number"),
    list: ((list,), "a list"), dict: ((dict,), "a table"),
}  # fmt: skip


def load_plain(value: Any, kind: Any, at: str) -> Any:
    accepted, words = PLAIN[kind]
    if kind is str and "\0" in str(value):  # no file, host or header can be named so
        raise ConfigError(f"{at} must be text without a NUL character")
    if isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
        with contextlib.suppress(OverflowError):
            if not isinstance(value, Decimal) or math.isfinite(value):
                return kind(value)
    raise ConfigError(f"{at} must be {words}")


def known_names(name: str, known: Iterable[str]) -> str:
    """What to write instead of an unknown name: the nearest one, else all of them, or the first thirty."""
    names = list(filter(None, known))
    near = difflib.get_close_matches(name, names, 1, 0.6)
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names[:30])}{more}"


def compile_regex(text: str, at: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{at} is not a regular expression: {error}") from None


def json_value(value: Any, at: str) -> Any:
    """A TOML value as JSON has it: decimals become floats; dates have no JSON form."""
    if isinstance(value, dict):
        return {k: json_value(v, at) for k, v in value.items()}
    if isinstance(value, list):
        return [json_value(v, at) for v in value]
    if isinstance(value, Decimal) and math.isfinite(value):
        return float(value)
    if not isinstance(value, (str, int, bool)):
        raise ConfigError(f"{at}: {value} has no JSON form; write it as text")
    return value


# Dollars for a million tokens; what costs more is a slip, and SQLite could not add it up.
HIGHEST_PRICE = 100_000


def parse_price(value: Any, at: str) -> Price:
    """`{ input = 3.0, output = 15.0, ... }` in dollars per million tokens; `tiers` as a list with `above`."""
    if not isinstance(value, dict):
        raise ConfigError(f"{at} must be a table such as {{ input = 3.0, output = 15.0 }}")
    known = [f.name for f in dataclasses.fields(Price)]
    amounts: dict[str, Any] = {}
    for key, amount in value.items():
        if key not in known:
            raise ConfigError(f"{at}: unknown key {key!r}: {known_names(key, known)}")
        if key == "tiers":
            tiers = amount if isinstance(amount, list) else [amount]
            amounts[key] = tuple(price_tier(tier, value, f"{at}, tiers") for tier in tiers)
            continue
        amounts[key] = exact = Decimal(str(amount)) if is_number(amount) else Decimal("nan")
        if not exact.is_finite() or exact < 0:
            raise ConfigError(f"{at}: {key!r} must be a number of dollars, not below 0")
        if exact > HIGHEST_PRICE:
            raise ConfigError(
                f"{at}: {key!r} is {amount} dollars for a million tokens; {HIGHEST_PRICE} at most"
            )
    for key in {"input", "output"} - amounts.keys():
        raise ConfigError(f"{at}: {key!r} is missing")
    return Price(**amounts)


def price_tier(tier: Json, base: Json, at: str) -> tuple[int, Price]:
    if not isinstance(tier, dict) or not isinstance(tier.get("above"), int):
        raise ConfigError(f"{at}: each tier needs `above`, a number of tokens")
    rest = {k: v for k, v in {**base, **tier}.items() if k not in ("above", "tiers")}
    return tier["above"], parse_price(rest, at)


def check_url(url: str, at: str) -> None:
    """http(s) with a host that is not link-local (cloud metadata services live there)."""
    if "[kept-" in url:
        raise ConfigError(f"{at} has a new host: type its user and password again")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:  # which may quote of a password what looks like a port
        words = "in its user and password / ? # stand as %2F %3F %23" if "@" in url else error
        raise ConfigError(f"{at} is not a URL: {words}") from None
    if not url:
        return
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{at} must be an http or https URL with a host")
    if is_link_local(host):
        raise ConfigError(f"{at} points at a link-local address, which ccmux does not call")


def is_link_local(host: str) -> bool:
    """Whether an address is link-local, in any spelling that a resolver takes (octal, hex, mapped into IPv6)."""
    host = host.rstrip(".").split("%")[0]
    try:
        packed = socket.inet_aton(host) if ":" not in host else socket.inet_pton(socket.AF_INET6, host)
    except (OSError, ValueError):
        return host.lower() == "metadata.google.internal"
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_link_local)


def check_names(config: Config) -> None:
    """Names are unique, and every mapping names a provider."""
    known = [p.name for p in config.providers]
    for table, names in (("providers", known), ("models", [m.name for m in config.models])):
        if "" in names:
            raise ConfigError(f"[[{table}]]: each row needs a name")
        for name, uses in Counter(names).items():
            if uses > 1:
                raise ConfigError(f"[[{table}]] {name!r}: the name is used twice")
    for model in config.models:
        for target in model.mappings:
            where = f"[[models]] {model.name!r}, mapping to {target.provider!r}"
            if target.provider not in known:
                raise ConfigError(f"{where}: no such provider: {known_names(target.provider, known)}")
            if not target.actual_model:
                raise ConfigError(f"{where}: key 'actual_model' is needed")
    fallback = config.router.fallback_provider
    if fallback and fallback not in known:
        raise ConfigError(
            f"[router]: key 'fallback_provider' is {fallback!r}: {known_names(fallback, known)}"
        )


def check_hosts(server: Server) -> None:
    for host in server.allowed_hosts:
        if not host_name(host):
            hint = "write each name or address out, alone, as in ccmux.example, 192.168.1.5 or [fd00::7]"
            raise ConfigError(f"[server]: key 'allowed_hosts' has {host!r}: {hint}")


@functools.lru_cache(256)
def host_name(host: str) -> str:
    """A Host without its port and trailing dot, in lower case; "" where it is malformed, or one of many (*)."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\s*]+)(?::[0-9]{1,5})?", host)
    return match[1].rstrip(".").lower() if match else ""


# claude-code-mux 0.6 writes some keys by other names, and has some that ccmux has no use for.
MUX_TYPES = {"z.ai": "zai"}
MUX_LEVELS = {"warn": "warning", "trace": "debug"}
MUX_TIMEOUTS = {"api_timeout_ms": "response_timeout", "connect_timeout_ms": "connect_timeout"}


def import_mux(tables: Json, warnings: list[str]) -> None:
    """Turns claude-code-mux's names for things into ours, in place; what ccmux lacks is warned of."""
    server, router = as_object(tables.get("server")), as_object(tables.get("router"))
    providers = objects_of(tables.get("providers"))
    if "timeouts" in server or any({"provider_type", "auth_type"} & row.keys() for row in providers):
        for key in ("auto_map_regex", "background_regex"):
            if router.get(key) == "":  # which means there that none is set
                del router[key]
    mux_skip(tables, ("presets", "cli"), "config", warnings)
    mux_skip(server, ("api_key", "tracing", "oauth"), "[server]", warnings)
    mux_skip(router, ("gemini_thinking",), "[router]", warnings)
    if "log_level" in server:
        server["log_level"] = MUX_LEVELS.get(str(server["log_level"]), server["log_level"])
    mux_rules(router)
    timeouts = as_object(server.pop("timeouts", None)).items()
    seconds = {
        MUX_TIMEOUTS[k]: Decimal(v) / 1000 for k, v in timeouts if k in MUX_TIMEOUTS and isinstance(v, int)
    }
    lost = [row for row in providers if not mux_provider(row, seconds, warnings)]
    if lost:
        tables["providers"] = [row for row in tables["providers"] if row not in lost]
    kept = [row.get("name") for row in providers if row not in lost]
    mux_models(tables, router, [row.get("name") for row in lost if row.get("name") not in kept], warnings)


def mux_skip(table: Json, keys: Iterable[str], where: str, warnings: list[str]) -> None:
    """Takes out the keys that have no meaning here."""
    for key in keys:
        if table.pop(key, None) is not None:
            warnings.append(f"{where}: claude-code-mux's key {key!r} has no meaning here and is skipped")


def mux_rules(router: Json) -> None:
    rules = router.pop("prompt_rules", [])
    for rule in objects_of(rules):
        if "strip_match" in rule:
            rule["strip"] = rule.pop("strip_match")
        if isinstance(pattern := rule.get("pattern"), str):  # Rust may spell a named group (?<name>...)
            rule["pattern"] = re.sub(r"(?<!\\)\(\?<(?=\w)", "(?P<", pattern)
    if rules != []:
        router["rules"] = [*as_list(router.get("rules")), *rules] if isinstance(rules, list) else rules


def mux_provider(row: Json, timeouts: Json, warnings: list[str]) -> bool:
    """Puts a provider's row into ccmux's keys; False for a sign-in that ccmux does not do."""
    is_oauth = row.pop("auth_type", "") == "oauth"
    if is_oauth or row.get("provider_type") == "vertex-ai":
        way = "by OAuth" if is_oauth else "to Google Cloud"
        warnings.append(
            f"provider {row.get('name')}: signing in {way} is not something ccmux does; it is skipped"
        )
        return False
    mux_skip(
        row, ("oauth_provider", "project_id", "location"), f"[[providers]] {row.get('name')!r}", warnings
    )
    if "provider_type" in row:
        row["type"] = row.pop("provider_type")
    row["type"] = MUX_TYPES.get(str(row.get("type")), row.get("type"))
    row |= {key: value for key, value in timeouts.items() if key not in row}
    return True


def mux_models(tables: Json, router: Json, lost: list[Any], warnings: list[str]) -> None:
    """Takes out the mappings to lost providers; the models that have no others, and the routes to those."""
    gone = []
    for row in objects_of(tables.get("models")):
        where, mappings = f"[[models]] {row.get('name')!r}", as_list(row.get("mappings"))
        for mapping in objects_of(mappings):
            mux_skip(mapping, ("inject_continuation_prompt",), where, warnings)
        kept = [mapping for mapping in mappings if as_object(mapping).get("provider") not in lost]
        if len(kept) < len(mappings):
            row["mappings"] = kept
        if mappings and not kept:
            gone.append(row)
            warnings.append(f"{where}: every provider of it is skipped; so is it, and routes to it")
    if gone:
        tables["models"] = [row for row in tables["models"] if row not in gone]
    names = [row.get("name") for row in gone]
    for slot in ROUTE_SLOTS:
        if slot in router and router[slot] in names:
            del router[slot]


# Editing the file. A save changes only the table it edits: what stands elsewhere stays byte for byte, and
# inside the table the lines of unchanged keys do. The result is parsed and compared with what was meant
# before it is written.


TomlPath = tuple[str | int, ...]  # the keys, and the row's number in an array of tables

# Parts of a file that tomllib has accepted. Up to two quotes may stand before the three that close a text.
TOML_TEXT = r"""(?:"{3}(?:[^\\]|\\.)*?"{3,5}|'{3}.*?'{3,5}|"(?:[^"\\]|\\.)*"|'[^']*')"""
TOML_KEYS = rf"(?s)[ \t]*(?:[\w-]+|{TOML_TEXT})[ \t]*(?:\.[ \t]*(?:[\w-]+|{TOML_TEXT})[ \t]*)*"
TOML_TOKEN = rf"(?s){TOML_TEXT}|#[^\n]*|[\[\]{{}},\r\n]|[^\"'#\[\]{{}},\r\n]+"
TOML_NOTE = r"(?:[ \t]*#[^\r\n]*)?"  # a comment on the rest of a line
TOML_BLANK = r"(?:[ \t\r\n]|#[^\n]*)*"


@dataclass(slots=True)
class Statement:
    """A stretch of a TOML file: a header, a key with its value, or (without a path) a blank or comment line."""

    text: str  # with the line's end
    path: TomlPath  # of what it says, from the top of the file
    home: TomlPath  # of the header that it stands under, or is
    value: tuple[int, int] | None = None  # of a key: from where to where in the text
    comment: str = ""  # of a comment line


def scan_toml(text: str) -> list[Statement]:
    """The statements of a file, in order and without gaps."""
    found = []
    rows: dict[TomlPath, int] = {}
    home: TomlPath = ()
    at = 0
    while at < len(text):
        start, at = at, match_end(r"[ \t]*", text, at)
        path: TomlPath = ()
        value, comment = None, ""
        if text[at : at + 1] == "[":
            is_row = text.startswith("[[", at)
            keys, at = scan_keys(text, at + 1 + is_row)
            path = home = numbered(keys, rows, is_row)
        elif text[at : at + 1] == "#":
            comment = text[at : match_end(TOML_NOTE, text, at)]
        elif text[at : at + 1].strip():
            keys, at = scan_keys(text, at)
            begin = match_end(r"[ \t]*", text, at + 1)
            at = value_end(text, begin)
            path, value = (*home, *keys), (begin - start, at - start)
        at = text.find("\n", at) + 1 or len(text)
        found.append(Statement(text[start:at], path, home, value, comment))
    return found


def numbered(keys: tuple[str, ...], rows: dict[TomlPath, int], is_new_row: bool) -> TomlPath:
    """A header's path with the numbers of the rows it is in; `rows` counts those of each array."""
    path: TomlPath = ()
    for n, key in enumerate(keys, 1):
        path = (*path, key)
        if is_new_row and n == len(keys):
            rows[path] = rows.get(path, 0) + 1
        if path in rows:
            path = (*path, rows[path] - 1)
    return path


def match_end(pattern: str, text: str, at: int) -> int:
    """The end of what matches the pattern here."""
    match = re.compile(pattern).match(text, at)
    return match.end() if match else at


def scan_keys(text: str, at: int) -> tuple[tuple[str, ...], int]:
    """A dotted key; and where what follows it begins."""
    end = match_end(TOML_KEYS, text, at)
    keys: list[str] = []
    inside: Any = tomllib.loads(f"{text[at:end]} = 0")
    while isinstance(inside, dict):
        [(key, inside)] = inside.items()
        keys.append(key)
    return tuple(keys), end


def value_end(text: str, at: int) -> int:
    """The end of the value that begins here; brackets may hold texts, comments and line ends."""
    depth = 0
    for token in re.compile(TOML_TOKEN).finditer(text, at):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth == 0:
            return at + len(text[at : token.end()].rstrip())
    raise ValueError("a value without an end")


def edit_toml(text: str, root: str, name: str | None, table: Json | None) -> str:
    """The file with one table replaced, made or (None) taken away: `[root]`, or the row of `[[root]]` of that name.

    ConfigError where the result would not parse to exactly what is meant.
    """
    if "\r\n" in text and text.count("\r\n") == text.count("\n"):
        return edit_toml(text.replace("\r\n", "\n"), root, name, table).replace("\n", "\r\n")
    if text and not text.endswith("\n"):
        return edit_toml(text + "\n", root, name, table).removesuffix("\n")
    before = tomllib.loads(text)
    meant = meant_tables(before, root, name, table)
    editor = TomlEditor(text)
    editor.set_table((), before, meant)
    after = "".join(line.text for line in editor.lines)
    with contextlib.suppress(tomllib.TOMLDecodeError):
        if same_value(tomllib.loads(after), meant):
            return after
    raise ConfigError(f"[{root}] cannot be edited by machine in this file; edit it by hand")


def meant_tables(before: Json, root: str, name: str | None, table: Json | None) -> Json:
    """What the file is to say after the edit."""
    meant: Any = table
    if name is not None:
        meant = list(before.get(root, []))
        at = next((n for n, row in enumerate(meant) if row.get("name") == name), len(meant))
        meant[at : at + 1] = [] if table is None else [table]
    is_gone = meant is None or meant == []
    return {k: v for k, v in before.items() if k != root} | ({} if is_gone else {root: meant})


def same_value(one: Any, other: Any) -> bool:
    """Deep equality that tells true from 1, as TOML does."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


class TomlEditor:
    """Changes the lines of a TOML file in their places, until they say what is meant; what is gone has no text.

    A comment belongs to what stands right below it; one with nothing below, and a key that is commented out,
    to what it touches above. Rows that change places take theirs along.
    """

    def __init__(self, text: str) -> None:
        self.lines = scan_toml(text)

    def under(self, path: TomlPath) -> list[int]:
        """Which lines say what is at this path."""
        return [n for n, s in enumerate(self.lines) if s.path and s.path[: len(path)] == path]

    def set_table(self, path: TomlPath, old: Json, new: Json) -> None:
        """Makes the table at this path, which says `old`, say `new`."""
        added = {k: v for k, v in new.items() if k not in old}
        for key, was in old.items():
            if key in new and same_value(was, new[key]):
                continue
            if key not in new or not self.set_value((*path, key), was, new[key]):
                self.remove((*path, key))
                added |= {key: new[key]} if key in new else {}
        if added:
            self.add(path, added)

    def set_value(self, path: TomlPath, old: Any, new: Any) -> bool:
        """The same for any value; False where it is to be taken out and written anew."""
        line = next((s for s in self.lines if s.path == path), None)
        if line and line.value:
            a, b = line.value
            line.text = line.text[:a] + edited_value(line.text[a:b], old, new) + line.text[b:]
        elif is_rows(old) and is_rows(new):
            self.set_rows(path, old, new)
        # A table that is only there by what is in it is not there any more when it is empty.
        elif isinstance(old, dict) and isinstance(new, dict) and (new or line):
            self.set_table(path, old, new)
        else:
            return False
        return True

    def remove(self, path: TomlPath) -> None:
        """Takes lines out: single keys one by one, so that comments between them stay; tables whole."""
        under = self.under(path)
        for last, n in zip([*under[:1], *under], under, strict=False):
            line, between = self.lines[n], self.lines[last + 1 : n]
            is_single = line.value and len(line.home) < len(path)
            if is_single or any(s.path for s in between):
                between = []
            for gone in (line, *between):
                gone.text = ""

    def add(self, path: TomlPath, new: Json) -> None:
        """Writes keys below a table's own lines, and rows under headers of their own below all of it."""
        if not path:
            gap = "\n" if any(line.text.strip() for line in self.lines) else ""
            text = gap + "\n".join(emit_tables(k, v) for k, v in new.items())
            self.lines.append(Statement(text, (), ()))
            return
        under = [self.lines[n] for n in self.under(path)]
        own = [s for s in under if s.path == path or (s.value and len(s.home) <= len(path))]
        title = dotted(path)
        if not own:  # it is only there by what is in it
            under[-1].text += emit_tables(title, new)
            return
        home = own[-1].home
        rows = {k: v for k, v in new.items() if is_rows(v) and home == path}
        for key in [k for k in new if k not in rows]:
            own[-1].text += f"{dotted((*path[len(home) :], key))} = {emit_value(new[key])}\n"
        for key, value in rows.items():
            under[-1].text += emit_tables(f"{title}.{emit_key(key)}", value)

    def set_rows(self, path: TomlPath, old: list[Json], new: list[Json]) -> None:
        """`set_table` for `[[path]]` rows. Those that stay fill the places of those that stayed, in the new order."""
        source = matched(old, new)
        order = [i for i in source if i is not None]
        for i in {*range(len(old))} - {*order}:
            self.remove((*path, i))
        fresh = ""  # rows without a place, which go behind the row before them
        for row, i in reversed(list(zip(new, source, strict=True))):
            if i is None:
                fresh = "\n" * (len(path) == 1) + emit_tables(dotted(path), [row]) + fresh
                continue
            if not same_value(old[i], row):
                self.set_value((*path, i), old[i], row)
            if fresh:
                self.slot((*path, i))[-1].text += fresh
                fresh = ""
        if fresh and order:
            top = self.slot((*path, order[0]))[0]
            top.text = fresh + top.text
        elif fresh:
            self.slot((*path, len(old) - 1))[-1].text += fresh
        moves = [(i, place) for i, place in zip(order, sorted(order), strict=True) if i != place]
        slots = {i: self.slot((*path, i)) for i, _ in moves}
        texts = {i: "".join(line.text for line in lines) for i, lines in slots.items()}
        for i, place in moves:
            for line in slots[place]:
                line.text = ""
            slots[place][0].text = texts[i]

    def slot(self, path: TomlPath) -> list[Statement]:
        """The lines where a row stands, with its comments."""
        under = self.under(path)
        first, end = under[0], self.comments_below(under[-1])
        while first and self.lines[first - 1].comment:
            first -= 1
        if first and self.lines[first - 1].path:
            first = self.comments_below(first - 1)
        return self.lines[first:end]

    def comments_below(self, n: int) -> int:
        """Where the comments end that stand right below line n and belong to it."""
        end = n + 1
        while end < len(self.lines) and self.lines[end].comment:
            end += 1
        if end < len(self.lines) and not self.lines[end].path:
            return end
        keys = [i for i in range(n + 1, end) if re.match(r"#\s*[\w.-]+\s*=", self.lines[i].comment)]
        return max(keys, default=n) + 1


def matched(old: list[Any], new: list[Any]) -> list[int | None]:
    """Which old item each new one is, by number; None for one that is new. The most alike are paired first."""
    # Those before and behind all changes pair by themselves: a thousand rows would take a million comparisons.
    least = min(len(old), len(new))
    head = next((n for n in range(least) if not same_value(old[n], new[n])), least)
    tail = next((n for n in range(least - head) if not same_value(old[-1 - n], new[-1 - n])), least - head)
    ours, theirs = range(head, len(old) - tail), range(head, len(new) - tail)
    alike = [(likeness(old[i], new[j]), -abs(i - j), i, j) for i in ours for j in theirs]
    source: list[int | None] = [*range(head), *[None] * len(theirs), *range(len(old) - tail, len(old))]
    for score, _, i, j in sorted(alike, key=lambda pair: pair[:2], reverse=True):
        if score and i not in source and source[j] is None:
            source[j] = i
    if len(old) == len(new):
        source = [j if i is None and j not in source else i for j, i in enumerate(source)]
    return source


def likeness(one: Any, other: Any) -> float:
    """How much two rows have in common; a number says little (a priority says only where the row stood)."""
    if same_value(one, other):
        return math.inf
    if not isinstance(one, dict) or not isinstance(other, dict):
        return 0
    return sum(0.01 if is_number(v) else 1 for k, v in one.items() if k in other and same_value(v, other[k]))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def dotted(path: TomlPath) -> str:
    """A path as a header has it, which names an array without the row."""
    return ".".join(emit_key(key) for key in path if isinstance(key, str))


# Inside a value: the items of an array or of an inline table, which may stand on lines with comments.


@dataclass(frozen=True, slots=True)
class TomlItem:
    """An element, or a `key = value`, as it stands there: lead, title, value and rest are the whole text."""

    lead: str  # the blank and comments before it
    title: str = ""  # the key and the equals sign
    value: str = ""
    rest: str = ""  # the comma, with the comments before and behind it
    comma: str = ""
    tail: str = ""  # the comments alone
    keys: tuple[str, ...] = ()


def edited_value(text: str, old: Any, new: Any) -> str:
    """A value's text, changed to say `new`."""
    if same_value(old, new):
        return text
    if old and isinstance(old, (dict, list)) and isinstance(new, type(old)):
        begin = match_end(TOML_NOTE, text, 1)
        items = scan_items(text, begin)
        if all(len(item.keys) <= 1 for item in items):
            return text[:begin] + edited_items(items, old, new) + text[-1]
    return emit_value(new)


def edited_items(items: list[TomlItem], old: Any, new: Any) -> str:
    """What stands between the brackets, changed to say `new`."""
    if isinstance(old, dict):
        names = [item.keys[0] for item in items[:-1]]
        keys = [k for k in names if k in new] + [k for k in new if k not in names]
        source = [names.index(k) if k in names else None for k in keys]
        old, new = [old[k] for k in names], [new[k] for k in keys]
        titles = [f"{emit_key(k)} = " for k in keys]
    else:
        source, titles = matched(old, new), [""] * len(new)
    bodies = [
        title + emit_value(value)
        if i is None
        else items[i].title + edited_value(items[i].value, old[i], value)
        for i, title, value in zip(source, titles, new, strict=True)
    ]
    if source != list(range(len(old))):
        return joined_items(items, source, bodies)
    parts = zip(items, [*bodies, ""], strict=True)
    return "".join(item.lead + body + item.rest for item, body in parts)


def scan_items(text: str, at: int) -> list[TomlItem]:
    """The items of a value from here to its closing bracket; the last one is only what stands before that."""
    items: list[TomlItem] = []
    while True:
        start, at = at, match_end(TOML_BLANK, text, at)
        lead = text[start:at]
        if text[at] in "]}":
            return [*items, TomlItem(lead)]
        begin = at
        keys: tuple[str, ...] = ()
        if text[0] == "{":
            keys, at = scan_keys(text, at)
            at = match_end(r"[ \t]*", text, at + 1)
        end = value_end(text, at)
        title, value = text[begin:at], text[at:end]
        at = match_end(TOML_BLANK, text, end)
        comma = "," if text[at] == "," else ""
        before, note = (text[end:at].rstrip(), at + 1) if comma else ("", end)
        at = match_end(TOML_NOTE, text, note)
        tail = join_blank(before, text[note:at])
        items.append(TomlItem(lead, title, value, text[end:at], comma, tail, keys))


def join_blank(one: str, other: str) -> str:
    """Two stretches of blanks and comments, such that no comment swallows what follows it."""
    is_open = "#" in one.rpartition("\n")[2] and not other.lstrip(" \t").startswith("\n")
    return f"{one}\n{other}" if is_open else one + other


def joined_items(items: list[TomlItem], source: list[int | None], bodies: list[str]) -> str:
    """What stands between the brackets when these are the items. Comments go with their item; those of one that is
    gone stay before the next.
    """
    *items, end = items
    leads, held = [], ""
    for n, item in enumerate(items):
        leads.append(join_blank(held, item.lead))
        is_gone = n not in source and "#" in leads[n] + item.tail
        held = join_blank(leads[n], item.tail) if is_gone else ""
    gap = re.sub(r"(?s).*(?=\n)", "", items[-1].lead) or " "
    blanks = [gap if "#" in item.lead else item.lead for item in items]
    out = tail = ""
    for n, (i, body) in enumerate(zip(source, bodies, strict=True)):
        lead = "" if i is None else leads[i]
        if "#" not in lead:
            lead = blanks[n] if n < len(blanks) else gap
        out += ("," if n else "") + join_blank(tail, lead) + body
        tail = "" if i is None else items[i].tail
    comma = items[-1].comma if bodies else ""
    return out + comma + join_blank(tail, join_blank(held, end.lead))


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def emit_tables(title: str, value: Any) -> str:
    """A table, or rows of them, under headers."""
    if isinstance(value, dict):
        return emit_table(title, value)
    return "\n".join(emit_table(title, row, "array") for row in value)


def emit_table(title: str, table: Json, kind: str = "table") -> str:
    """A table under its header; rows of tables get headers of their own, other tables stand inline."""
    lines = [f"[[{title}]]" if kind == "array" else f"[{title}]"]
    lines += [f"{emit_key(k)} = {emit_value(v)}" for k, v in table.items() if not is_rows(v)]
    lines += [emit_tables(f"{title}.{emit_key(k)}", v).rstrip("\n") for k, v in table.items() if is_rows(v)]
    return "\n".join(lines) + "\n"


def emit_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else emit_value(key)


def emit_value(value: Any) -> str:
    """A value as TOML writes it; ConfigError for what TOML has no form of."""
    if isinstance(value, (str, int)):  # bools too: as in JSON, but for one character
        text = readable(value).replace("\x7f", "\\u007f")
        if re.search("[\ud800-\udfff]", text):
            raise ConfigError("a text with half a surrogate pair cannot be written to the config file")
        return text
    if isinstance(value, (float, Decimal)):
        text = format(value, "f") if isinstance(value, Decimal) else repr(value)
        return text if re.search(r"[.einf]", text) else f"{text}.0"
    if isinstance(value, dict):
        items = ", ".join(f"{emit_key(k)} = {emit_value(v)}" for k, v in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(emit_value, value)) + "]"
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise ConfigError(f"{type(value).__name__} cannot be written to the config file")


def toml_text(path: Path) -> str:
    """A config file's text, without the byte order mark that Windows puts before it; OSError, UnicodeDecodeError."""
    return path.read_bytes().decode("utf-8-sig")


class StaleError(ConfigError):
    """The file has changed since it was read: saving would lose that change."""


def save_config(path: Path, text: str, expected_hash: str) -> None:
    """Replaces the file as one step, keeping three backups; StaleError when it is not what the editor saw.

    Mode 0600; a symlink stays one; what is on disk is read back before it takes the old one's place.
    """
    path = Path(os.path.realpath(path))
    current = toml_text(path) if path.exists() else ""
    if path.exists() and hash_text(current) != expected_hash:
        raise StaleError(f"{path.name} has changed on disk since this page was loaded; load it again")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    backup = path.with_name(f".{path.name}.{os.getpid()}.bak.part")
    try:
        write_private(part, text)
        if part.read_bytes().decode("utf-8") != text:
            raise ConfigError(f"{path.name} could not be written whole; nothing was changed")
        if current:
            write_private(backup, current)  # before the older ones are touched: the disk may be full
            places = backup_paths(path)
            for newer, older in reversed([*itertools.pairwise(places)]):
                if newer.exists():
                    os.replace(newer, older)
            os.replace(backup, places[0])
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        backup.unlink(missing_ok=True)
    if os.name != "nt":
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # many a shared or network folder refuses it
            os.fsync(folder)
        os.close(folder)


def write_private(path: Path, text: str) -> None:
    """A file for its owner only, on the disk when this returns."""
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8", newline=""
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def backup_paths(path: Path) -> list[Path]:
    """Where a config's backups are, newest first."""
    return [path.with_name(f"{path.name}.bak{n}") for n in (1, 2, 3)]


# Files beside the config.


def database_path(config: Config) -> str:
    """Where the ledger is: beside the config, or in ~/.ccmux where there is none."""
    name = config.server.database
    if name == ":memory:":
        return name
    return str(home_of(config) / expanded(name))


def home_of(config: Config) -> Path:
    """The folder that relative paths of a config are in; made (0700) where it is ccmux's own."""
    if config.path:
        return Path(config.path).resolve().parent
    home = ccmux_home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


def token_path(config: Config) -> Path:
    database = database_path(config)
    return (home_of(config) if database == ":memory:" else Path(database).parent) / "ccmux.token"


def admin_token_of(config: Config) -> str:
    """The admin token: the config's, else the one kept beside the database, made (0600) at the first start."""
    if config.server.admin_token:
        return config.server.admin_token
    path = token_path(config)
    try:
        if kept := path.read_text("utf-8").strip():
            return kept
    except FileNotFoundError:
        pass
    except UnicodeDecodeError:  # as a shell of Windows may write it
        raise ConfigError(
            f"{path} is no UTF-8 text: write it anew, or delete it to have a token made"
        ) from None
    token = secrets.token_urlsafe(24)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, token + "\n")
    return token


def is_any_address(host: str) -> bool:
    return host in ("", "0.0.0.0", "::")  # noqa: S104


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def check_binding(config: Config) -> None:
    """Off loopback only with keys for clients and a token for the admin page."""
    host = config.server.host
    if host.startswith("["):
        raise ConfigError(f"[server]: key 'host' is {host!r}: write it without the brackets")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise ConfigError(f"[server]: key 'host' is {host!r}, which is no name of a host: {error}") from None
    if is_loopback(host):
        return
    if not config.server.require_key:
        raise ConfigError(
            f"[server]: key 'host' is {host!r}, which others can reach: set require_key = true (and an admin_token), "
            "or listen on 127.0.0.1"
        )
    if not config.server.admin_token and not token_path(config).exists():
        raise ConfigError(f"[server]: key 'host' is {host!r}, which others can reach: set admin_token first")


# ----------------------------------------------------------------------------------------------------------
# Server-sent events (pure)
# ----------------------------------------------------------------------------------------------------------
# https://html.spec.whatwg.org/multipage/server-sent-events.html. Bytes go in cut anywhere; whole blocks come
# out, each with the blank line that ends it, so that what is relayed can be relayed byte for byte.

MAX_EVENT = 16 * 2**20


def broken_stream(message: str = "the provider's stream ended before the answer did") -> ApiError:
    """What another try may mend."""
    return ApiError(502, message, retry=Retry.SAME, cause="stream")


class SseDecoder:
    """Cuts a byte stream where events end. Lines may end in LF, CR LF or CR."""

    def __init__(self, limit: int = MAX_EVENT) -> None:
        self.limit = limit
        self.rest = bytearray()  # the unfinished event

    def cut(self, data: bytes) -> bytes:
        """The bytes up to the last end of an event; the rest waits.

        ApiError 502 when it grows past the limit.
        """
        if not self.rest and data.endswith(b"\n\n"):
            return data  # as most pieces are
        seam = bytes(self.rest[-3:]) + data  # an end may have begun in the rest, which may be megabytes
        whole = b""
        if end := last_blank_line(seam):
            whole, self.rest = bytes(self.rest[:-3]) + seam[:end], bytearray(seam[end:])
        else:
            self.rest += data
        if len(self.rest) > self.limit:
            raise broken_stream(f"the provider sent an event of more than {self.limit} bytes")
        return whole

    def feed(self, data: bytes) -> list[bytes]:
        """The whole event blocks that `data` completes, each with the blank line that ends it."""
        return split_blocks(self.cut(data))

    def finish(self) -> bytes:
        """A last block whose blank line never came, with one."""
        rest, self.rest = bytes(self.rest), bytearray()
        if not rest.strip():
            return b""
        return rest if rest.endswith(b"\r\r") else rest + b"\n\n"


_BLANK_LINE = re.compile(rb"(?:\r\n|\r(?!\n)|\n)(?:\r\n|\r(?!\n)|\n)+")


def last_blank_line(data: bytes) -> int:
    """Where the last event of `data` ends; 0 where none does."""
    # `in` would raise and catch an exception inside, as bytes may also be asked for a number.
    if data.find(b"\r") < 0:
        at = data.rfind(b"\n\n")
        return at + 2 if at >= 0 else 0
    end = len(data) - data.endswith(b"\r")  # that one may be half of a CR LF: it waits
    return max((m.end() for m in _BLANK_LINE.finditer(data, 0, end)), default=0)


def split_blocks(whole: bytes) -> list[bytes]:
    """Whole events, cut apart; each keeps its end."""
    if b"\r" not in whole:
        *blocks, rest = whole.split(b"\n\n")  # the rest: a line end beyond the last pair, as in b"\n\n\n"
        return [block + b"\n\n" for block in blocks] + ([rest] if rest else [])
    ends = [0, *(m.end() for m in _BLANK_LINE.finditer(whole))]
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


def event_of(block: bytes) -> tuple[str, str]:
    """The event name ("" if none) and data of a block; data is "" for a comment or a ping without one."""
    return next(events_of(block), ("", ""))


def events_of(whole: bytes) -> Iterator[tuple[str, str]]:
    """`event_of` for every block of whole events."""
    text = whole.decode("utf-8", "replace")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for block in text.split("\n\n"):
        if block.startswith("data: {") and "\n" not in block:  # nearly every block of a stream
            yield "", block[6:]
        elif block:
            yield read_event(block)


def read_event(block: str) -> tuple[str, str]:
    name, data = "", []
    for line in block.split("\n"):
        key, _, value = line.removeprefix("\ufeff").partition(":")
        value = value.removeprefix(" ")
        if key == "data":
            data.append(value)
        elif key == "event":
            name = value
        elif key == "error":  # llama.cpp's until September 2025 (its pull request 16109), and its forks'
            name, data = key, [value]
    return name, "\n".join(data)


_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def event_json(data: str) -> Any:
    """`json.loads` for an event's data, in half the time; ValueError or RecursionError as there."""
    try:
        value, end = _scan(data, 0)
    except StopIteration:
        end = -1
    return value if end == len(data) else json.loads(data)


def parsed(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return event_json(text)
    except (ValueError, RecursionError):
        return None


def encode_event(event: Json) -> bytes:
    return written_event(event).encode()


def written_event(event: Json) -> str:
    """An Anthropic event as it goes out, in ASCII. Text deltas, nearly all of a stream, are put together by hand."""
    kind = event["type"]
    if kind == "content_block_delta" and (delta := event["delta"])["type"] == "text_delta":
        return (
            f'event: {kind}\ndata: {{"type":"{kind}","index":{event["index"]},'
            f'"delta":{{"type":"text_delta","text":{encode_basestring_ascii(delta["text"])}}}}}\n\n'
        )
    return f"event: {kind}\ndata: {_COMPACT.encode(event)}\n\n"


PING = b'event: ping\ndata: {"type": "ping"}\n\n'


# ----------------------------------------------------------------------------------------------------------
# Routing (pure)
# ----------------------------------------------------------------------------------------------------------
# Twelve steps; the first that applies and has a model set wins. Every step tried leaves a line in the trail,
# which goes to the log, to `explain` and to the admin page, so that nobody has to guess why a request went
# where it went.


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: the model's name, the targets behind it in order, and which step said so."""

    model: str
    reason: str
    trail: tuple[tuple[str, str], ...]
    targets: tuple[Target, ...]
    body: Json | None = None  # the request without what routing takes out of it; None: as it came


@dataclass(frozen=True, slots=True)
class Asked:
    """What the routing steps look at."""

    body: Json
    headers: Mapping[str, str]  # lower-case names
    config: Config
    tokens: int  # counted input tokens; 0 where nothing needed the count
    name: str  # the model asked for, without [1m]


class Pick(typing.NamedTuple):
    """One step's word: a model's name, or "" and why not."""

    model: str = ""
    note: str = ""
    body: Json | None = None


def choose_route(body: Json, headers: Mapping[str, str], config: Config, tokens: int = 0) -> Route:
    """The route of a request; ApiError 400 without a good model name, 404 for one that nobody serves."""
    asked = Asked(body, headers, config, tokens, asked_model(body))
    trail: list[tuple[str, str]] = []
    for reason, step in ROUTE_STEPS:
        model, note, changed = step(asked)
        targets = resolve(config, model) if model else ()
        if model and not targets:
            # A name may be any words of the prompt's, so no more than its beginning is kept.
            note = f"names {model[:100]}, which nobody serves"
        trail.append((reason, note[:200]))
        if targets:
            return roomy_route(asked, Route(model, reason, tuple(trail), targets, changed))
    raise no_such_model(config, asked.name)


def no_such_model(config: Config, name: str) -> ApiError:
    unset = [f"provider {p.name}: {p.problem}" for p in config.providers if p.enabled and p.problem]
    words = [f"model: {name!r} is served by no provider", instead_of(config, name), *unset]
    return ApiError(404, "; ".join(words), should_retry=False)


def instead_of(config: Config, name: str) -> str:
    """What to do about a name that nobody serves."""
    if config.model(name):
        return "its [[models]] row has no mappings"
    known = [*model_names(config), *(f"{p.name}/<model>" for p in config.providers if p.enabled)]
    return known_names(name, known) if known else "the config names none (`ccmux.py init` writes one)"


# Characters of a model's name, as at Anthropic: a megabyte could be searched for minutes, goes into headers, and is kept.
LONGEST_NAME = 256


def asked_model(body: Json) -> str:
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise ApiError(400, "model: Field required (a text)")
    if len(name) > LONGEST_NAME:
        raise ApiError(400, f"model: String should have at most {LONGEST_NAME} characters")
    return re.sub(r"(?i)\[1m\]$", "", name)


def roomy_route(asked: Asked, route: Route) -> Route:
    """The route, or that of long_context where it is set and the model is too small for what was counted."""
    roomy, context = asked.config.router.long_context, context_of(asked.config, route.model, route.targets)
    if not roomy or not context or asked.tokens <= context or route.model == roomy:
        return route
    note = f"{asked.tokens} tokens are more than the {context} of {route.model}"
    trail = (*route.trail, ("long_context", note))
    return Route(roomy, "long_context", trail, resolve(asked.config, roomy), route.body)


def context_of(config: Config, name: str, targets: tuple[Target, ...]) -> int:
    model = config.model(name)
    return max((t.context for t in targets), default=0) or (model.context if model else 0)


def resolve(config: Config, name: str) -> tuple[Target, ...]:
    """The targets behind a name, first to be tried first; () when nobody serves it."""
    if (model := config.model(name)) and model.mappings:
        return tuple(sorted(model.mappings, key=lambda t: t.priority))
    head, _, rest = name.partition("/")
    if rest and len(name) <= LONGEST_NAME:  # of a rule or a tag, it may be any words of a prompt
        if config.provider(head):
            return (Target(head, rest),)
        if head == "anthropic":
            return resolve(config, rest)
    return tuple(Target(p.name, name) for p in config.providers if name in p.models)


def model_names(config: Config) -> list[str]:
    """The names a client may ask for: rows, then what providers list."""
    listed = [name for p in config.providers if p.enabled for name in p.models]
    return list(dict.fromkeys([m.name for m in config.models] + listed))


def rule_step(asked: Asked) -> Pick:
    rules = asked.config.router.rules
    if not rules:
        return Pick(note="no prompt rules")
    turn, texts = newest_words(messages_of(asked.body))
    for number, rule in enumerate(rules, 1):
        for block, text in reversed(texts.items()):
            try:
                found = search_words(rule.pattern, text)
            except TimeoutError:  # of whoever called `choose_route`
                return Pick(
                    note=f"rule {number} takes too long on this prompt: it and those below are passed over"
                )
            if found:
                name = fill_groups(rule.model, found[0])
                changed = without_words(asked.body, turn, block, *found) if rule.strip else None
                return Pick(name, f"rule {number} matches: {name}", changed)
    return Pick(note="no rule matches")


def fill_groups(template: str, match: re.Match[str]) -> str:
    """`$1`, `$name` and `${name}` in a rule's model, filled from the match."""
    groups = match.groupdict() | {str(n): text for n, text in enumerate((match[0], *match.groups()))}
    return _GROUP.sub(lambda name: groups.get(name[1] or name[2]) or "", template)


_GROUP = re.compile(r"\$(?:\{(\w+)\}|(\d+|[A-Za-z_]\w*))")


# What Claude Code (2.1.330) puts among the user's words: reminders; and beside a tool result that it loaded a tool or a
# skill.
_REMINDER = re.compile(
    r"<system-reminder>.*?(?:</system-reminder>|\Z)|\A(?:Tool loaded\.|Base directory for this skill: .*)\Z",
    re.S,
)


def newest_words(messages: list[Json]) -> tuple[int, dict[int, str]]:
    """The number of the newest message in which the user typed something, and its texts by the number of their block.

    Later turns that only carry tool results belong to the same prompt, so that a tool round stays on its model.
    """
    for turn in range(len(messages) - 1, -1, -1):
        if messages[turn].get("role") == "user":
            blocks = enumerate(blocks_of(messages[turn].get("content")))
            texts = {n: str(b.get("text") or "") for n, b in blocks if b.get("type") == "text"}
            if any(_REMINDER.sub("", text).strip() for text in texts.values()):
                return turn, texts
    return 0, {}


def search_words(pattern: re.Pattern[str], text: str) -> tuple[re.Match[str], int] | None:
    """The first match outside of <system-reminder> text, with the place in `text` that it counts from."""
    edges = [0, *(edge for found in _REMINDER.finditer(text) for edge in found.span()), len(text)]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        part = text[start:end]
        if part.strip() and (match := pattern.search(part)):
            return match, start
    return None


def without_words(body: Json, turn: int, block: int, match: re.Match[str], offset: int) -> Json:
    """The request without the words a rule matched; as it is where they are all of a text.

    Anthropic refuses an empty text block.
    """
    messages = list(messages_of(body))
    blocks = blocks_of(messages[turn].get("content"))
    text = str(blocks[block]["text"])
    rest = text[: offset + match.start()] + text[offset + match.end() :].lstrip()
    if not rest.strip():
        return body
    blocks[block] = {**blocks[block], "text": rest}
    messages[turn] = {**messages[turn], "content": blocks}
    return {**body, "messages": messages}


_SUBAGENT_TAG = re.compile(r"<CCM-SUBAGENT-MODEL>([^<]*)</CCM-SUBAGENT-MODEL>")


def tag_step(asked: Asked) -> Pick:
    system = asked.body.get("system")
    blocks = blocks_of(system)
    for index, block in enumerate(blocks):
        text = str(block.get("text") or "")
        if "<CCM-SUBAGENT-MODEL>" in text and (match := _SUBAGENT_TAG.search(text)):
            blocks[index] = {**block, "text": _SUBAGENT_TAG.sub("", text)}
            kept = [b for b in blocks if b.get("text") != "" or b.get("type") != "text"]
            changed = {**asked.body, "system": kept if isinstance(system, list) else text_of(kept)}
            name = match[1].strip()
            return Pick(name, f"tag names {name}", changed)
    return Pick(note="no <CCM-SUBAGENT-MODEL> tag in the system prompt")


NOT_SET = Pick(note="not set")
SLOT_OF_CLASS = {
    "compaction": "compaction", "auxiliary": "background", "side_reply": "background", "subagent": "subagent",
    "workflow": "subagent",
}  # fmt: skip


def slot_step(slot: str, applies: Callable[[Asked], str] = lambda asked: "") -> Callable[[Asked], Pick]:
    """A step whose model is a [router] key: taken by request class, or where `applies` tells why ("": it does not)."""

    def step(asked: Asked) -> Pick:
        model = getattr(asked.config.router, slot)
        if not model:
            return NOT_SET
        told = asked.headers.get("x-claude-code-request-class", "")
        why = f"request class {told}" if SLOT_OF_CLASS.get(told) == slot else applies(asked)
        return Pick(model, f"{why}: {model}") if why else Pick(note="does not apply")

    return step


def offers_web_search(asked: Asked) -> str:
    return "web_search is offered" if any(each(tools_of(asked.body), is_web_search)) else ""


def is_web_search(tool: Json) -> bool:
    return str(tool.get("type") or "").startswith("web_search_")


def newest_turn_has_image(asked: Asked) -> str:
    for message in reversed(messages_of(asked.body)):
        if message.get("role") == "assistant":
            break
        if message.get("role") == "user" and any(map(holds_image, blocks_of(message.get("content")))):
            return "an image in the newest turn"
    return ""


def holds_image(block: Json) -> bool:
    holders = {"tool_result": block, "document": as_object(block.get("source"))}  # of blocks of their own
    holder = holders.get(str(block.get("type")), {})
    return block.get("type") == "image" or any(map(holds_image, blocks_of(holder.get("content"))))


def is_long(asked: Asked) -> str:
    limit = asked.config.router.long_context_tokens
    return f"{asked.tokens} tokens are more than {limit}" if asked.tokens > limit else ""


def is_background(asked: Asked) -> str:
    regex = asked.config.router.background_regex
    matches = regex and regex.search(asked.name)
    return f"{asked.name} matches background_regex" if matches else ""


def is_claudes_own(asked: Asked) -> bool:
    """Whether the name is one that Claude Code picks by itself, and the rules decide about."""
    regex = asked.config.router.auto_map_regex
    return bool(regex and regex.pattern and regex.search(asked.name))


def asked_step(asked: Asked) -> Pick:
    if is_claudes_own(asked):
        return Pick(note=f"{asked.name} is one of Claude's own names")
    if resolve(asked.config, asked.name):
        return Pick(asked.name, f"{asked.name} was asked for")
    return Pick(note=f"nobody serves {asked.name}")


def is_subagent(asked: Asked) -> str:
    if asked.headers.get("x-claude-code-agent-id"):
        return "an agent-id header"
    first = next(iter(blocks_of(asked.body.get("system"))), {})
    return "cc_is_subagent=true" if "cc_is_subagent=true" in str(first.get("text") or "") else ""


def is_thinking(asked: Asked) -> str:
    wanted = asked.config.router.think_on
    effort = effort_of(asked.body)
    if "plan" in wanted and in_plan_mode(asked.body):
        return "plan mode"
    if effort in wanted:
        return f"effort {effort}"
    thinking = as_object(asked.body.get("thinking"))
    budget = thinking.get("type") == "enabled" and thinking.get("budget_tokens")
    return "a thinking budget" if "budget" in wanted and budget else ""


def effort_of(body: Json) -> str:
    return str(as_object(body.get("output_config")).get("effort") or "")


def in_plan_mode(body: Json) -> bool:
    """Claude Code says so in `safeguards`, or in a system message of the newest prompt."""
    for guard in as_list(body.get("safeguards")):
        mode = as_object(as_object(guard).get("classifier_context")).get("permission_mode")
        if mode:
            return bool(mode == "plan")
    messages = messages_of(body)
    turn, _ = newest_words(messages)
    newest = messages[max(turn - 1, 0) :]
    said = "\n".join(text_of(m.get("content")) for m in newest if m.get("role") != "assistant")
    # The plan may be approved on the way.
    return said.rfind("Plan mode is active") > said.rfind("Exited Plan Mode")


def row_step(asked: Asked) -> Pick:
    if asked.config.model(asked.name):
        return Pick(asked.name, f"[[models]] row {asked.name}")
    return Pick(note=f"no [[models]] row {asked.name}")


def default_step(asked: Asked) -> Pick:
    if is_claudes_own(asked):
        name = default_model(asked.config, asked.name)
        return Pick(name, name or "no default, no [[models]] row and no provider")
    if fallback := asked.config.router.fallback_provider:
        return Pick(f"{fallback}/{asked.name}", f"nobody serves {asked.name}: {fallback}/{asked.name}")
    return Pick(note=f"{asked.name} is not one of Claude's own names, and no fallback_provider is set")


def default_model(config: Config, asked: str) -> str:
    if config.router.default:
        return config.router.default
    if config.models:
        return config.models[0].name
    first = next((p.name for p in config.providers if p.usable), "")
    return f"{first}/{asked}" if first else ""


ROUTE_STEPS: tuple[tuple[str, Callable[[Asked], Pick]], ...] = (
    ("rule", rule_step),
    ("tag", tag_step),
    ("websearch", slot_step("websearch", offers_web_search)),
    ("image", slot_step("image", newest_turn_has_image)),
    ("long_context", slot_step("long_context", is_long)),
    ("compaction", slot_step("compaction")),
    ("background", slot_step("background", is_background)),
    ("asked", asked_step),
    ("subagent", slot_step("subagent", is_subagent)),
    ("think", slot_step("think", is_thinking)),
    ("model", row_step),
    ("default", default_step),
)


def idle_rules(config: Config) -> Iterator[str]:
    """A warning for each prompt rule that is passed over whatever it matches, or names a group that its pattern lacks."""
    for number, rule in enumerate(config.router.rules, 1):
        at = f"[[router.rules]] {number}: its model {rule.model!r}"
        groups = {*map(str, range(rule.pattern.groups + 1)), *rule.pattern.groupindex}
        if "$" not in rule.model and not resolve(config, rule.model):
            yield f"{at} is served by nobody, so it is passed over: {instead_of(config, rule.model)}"
        for name in (a or b for a, b in _GROUP.findall(rule.model)):
            if name not in groups:
                yield f"{at} names the group ${name}, which its pattern lacks: it stands for nothing"


def check_routes(config: Config) -> None:
    """Every [router] slot names something served; ConfigError otherwise."""
    for slot in ROUTE_SLOTS:
        name = getattr(config.router, slot)
        if name and not resolve(config, name):
            hint = instead_of(config, name)
            raise ConfigError(f"[router]: key {slot!r} is {name!r}, which nobody serves: {hint}")


# ----------------------------------------------------------------------------------------------------------
# Anthropic stream (pure)
# ----------------------------------------------------------------------------------------------------------
# https://docs.anthropic.com/en/docs/build-with-claude/streaming. `AnthropicStream` is the one place that
# decides the order of events: message_start; blocks one after another, each with start, deltas and stop;
# message_delta with the stop reason and the true usage; message_stop. A dialect only says what arrived.

SIGNATURE_TAG = "ccmux."  # what a thinking block's signature begins with when ccmux made the block


def sign(payload: Json | None = None) -> str:
    """A signature that marks a thinking block as made by ccmux; the payload comes back with the block."""
    return SIGNATURE_TAG + base64.urlsafe_b64encode(compact(payload or {})).decode()


def signed_payload(block: Json) -> Json | None:
    """What `sign` put into a thinking block's signature, or a redacted block's data; None where it is not ccmux's."""
    signature = block.get("signature") or block.get("data")
    if not isinstance(signature, str) or not signature.startswith(SIGNATURE_TAG):
        return None
    try:
        payload = json.loads(base64.urlsafe_b64decode(signature[len(SIGNATURE_TAG) :]))
    except (ValueError, RecursionError):
        return {}
    return as_object(payload)


class AnthropicStream:
    """What an answer consists of, said in any order -> well-formed Anthropic events."""

    def __init__(
        self,
        message_id: str,
        model: str,
        usage: Usage,
        count: Callable[[str], int] = lambda text: len(text) // 4,
    ) -> None:
        self.message_id, self.model = message_id, model
        self.usage = usage  # an estimate until the upstream says
        self.count = count  # tokens of a text, for an output that the upstream did not count
        self.events: list[Json] = []
        self.kind = ""  # of the open block
        self.index = -1
        self.has_content = False  # a delta went out, or a block ended
        self.has_tool = False
        self.tool_ids: set[str] = set()  # that the conversation has had
        self.call_ids: set[str] = set()  # that the upstream gave to the calls of this answer
        self.cut_off = False  # in the midst of a tool call
        self.started = self.ended = False
        self.stop_reason = ""
        self.signature: Json = {}  # payload for the open thinking block's signature
        self.text_parts: list[str] = []  # all that the model made so far, for counting

    def take(self) -> list[Json]:
        """The events since the last take."""
        events, self.events = self.events, []
        return events

    def start(self) -> None:
        if self.started:
            return
        self.started = True
        message: Json = {
            "id": self.message_id, "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": {**usage_json(self.usage), "output_tokens": 1},
        }  # fmt: skip
        self.events.append({"type": "message_start", "message": message})

    def open(self, block: Json) -> None:
        self.close()
        self.start()
        self.kind = block["type"]
        self.index += 1
        self.events.append({"type": "content_block_start", "index": self.index, "content_block": block})

    def close(self) -> None:
        """Ends the open block, if any; a thinking block is signed first."""
        if not self.kind:
            return
        if self.kind == "thinking":
            self.delta({"type": "signature_delta", "signature": sign(self.signature)})
            self.signature = {}
        self.events.append({"type": "content_block_stop", "index": self.index})
        self.kind = ""
        self.has_content = True

    def delta(self, delta: Json) -> None:
        self.has_content = True
        self.events.append({"type": "content_block_delta", "index": self.index, "delta": delta})

    def text(self, text: str) -> None:
        if not text:
            return
        if self.kind != "text":
            self.open({"type": "text", "text": ""})
        self.text_parts.append(text)
        self.delta({"type": "text_delta", "text": text})

    def thinking(self, text: str) -> None:
        if not text:
            return
        if self.kind != "thinking":
            self.open({"type": "thinking", "thinking": "", "signature": ""})
        self.text_parts.append(text)
        self.delta({"type": "thinking_delta", "thinking": text})

    def keep(self, payload: Json) -> None:
        """Data that must come back with the next request: it rides in a thinking block's signature."""
        if self.kind != "thinking":
            self.open({"type": "thinking", "thinking": "", "signature": ""})
        self.signature.update(payload)

    def tool(self, id: str, name: str) -> None:
        self.open({"type": "tool_use", "id": id, "name": name, "input": {}})
        self.has_tool = True
        self.text_parts.append(name)

    def tool_input(self, fragment: str) -> None:
        if fragment:
            self.text_parts.append(fragment)
            self.delta({"type": "input_json_delta", "partial_json": fragment})

    def whole(self, block: Json) -> None:
        """A block that arrives in one piece: server_tool_use, web_search_tool_result, ..."""
        if "input" in block:
            self.open({**block, "input": {}})
            self.delta({"type": "input_json_delta", "partial_json": json.dumps(block["input"])})
        else:
            self.open(block)
        self.close()

    def finish(self, stop_reason: str, stop_sequence: str | None = None) -> None:
        """Ends the message. stop_reason is tool_use if and only if a tool block went out, whole and not refused."""
        self.close()
        self.start()
        tool_ended = self.has_tool and not self.cut_off and stop_reason != "refusal"
        self.stop_reason = (
            "tool_use" if tool_ended else "end_turn" if stop_reason == "tool_use" else stop_reason
        )
        if self.usage.estimated:
            self.usage = dataclasses.replace(self.usage, output=self.count("".join(self.text_parts)))
        delta = {"stop_reason": self.stop_reason, "stop_sequence": stop_sequence}
        self.events.append({"type": "message_delta", "delta": delta, "usage": usage_json(self.usage)})
        self.events.append({"type": "message_stop"})
        self.ended = True


def usage_json(usage: Usage) -> Json:
    """Usage in the fields of the Messages API."""
    out: Json = {
        "input_tokens": usage.input,
        "output_tokens": usage.output,
        "cache_creation_input_tokens": usage.cache_write + usage.cache_write_1h,
        "cache_read_input_tokens": usage.cache_read,
    }
    if usage.cache_write_1h:
        out["cache_creation"] = {
            "ephemeral_5m_input_tokens": usage.cache_write,
            "ephemeral_1h_input_tokens": usage.cache_write_1h,
        }
    return out


MAX_COUNT = 10**8  # a token count above this is a provider's bug


def token_number(value: Any) -> int | None:
    """A token count as an upstream gave it; None where it is missing or absurd."""
    is_count = type(value) in (int, float) and 0 <= value <= MAX_COUNT and int(value) == value
    return int(value) if is_count else None


def anthropic_usage(usage: Any, before: Usage | None = None) -> Usage | None:
    """Usage of a message or message_delta over what was known before; None where nothing usable is in it.

    Counts are cumulative, so a later one replaces an earlier one; a delta need not repeat them all.
    """
    if not isinstance(usage, dict):
        return before
    usage = with_compactions(usage) if "iterations" in usage else usage
    if before and usage.get("input_tokens") == 0 and not any(map(usage.get, PROMPT_COUNTS)):
        # No prompt is empty: what message_start told is not told again (seen: github.com/envoyproxy/ai-gateway/pull/1631).
        usage = {"output_tokens": usage.get("output_tokens")}
    keys = {"input": "input_tokens", "output": "output_tokens", "cache_read": "cache_read_input_tokens"}
    told: Json = {name: token_number(usage[k]) for name, k in keys.items() if usage.get(k) is not None}
    if None in told.values() or (before is None and told.keys().isdisjoint(("input", "output"))):
        return None
    known = before or NO_USAGE
    if "speed" in usage:
        told["fast"] = usage["speed"] == "fast"
    told["cache_write"], told["cache_write_1h"] = cache_writes(usage, known)
    return dataclasses.replace(before, **told) if before else Usage(**told)


PROMPT_COUNTS = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def with_compactions(usage: Json) -> Json:
    """Usage with what compacting on the way took, which is billed but not in the totals.

    https://platform.claude.com/docs/en/build-with-claude/compaction#understanding-usage
    """
    rounds = [i for i in map(as_object, as_list(usage["iterations"])) if i.get("type") == "compaction"]
    told = {kind: token_number(usage.get(kind)) for kind in (*PROMPT_COUNTS, "output_tokens")}
    more = {kind: sum(token_number(i.get(kind)) or 0 for i in rounds) for kind in told}
    return usage | {kind: n + more[kind] for kind, n in told.items() if n is not None}


def cache_writes(usage: Json, known: Usage) -> tuple[int, int]:
    """Five-minute and one-hour cache writes; without the breakdown all are taken as five-minute ones."""
    total = token_number(usage.get("cache_creation_input_tokens"))
    parts = usage.get("cache_creation")
    if isinstance(parts, dict):
        hour = token_number(parts.get("ephemeral_1h_input_tokens")) or 0
        five = token_number(parts.get("ephemeral_5m_input_tokens")) or 0
        return max((total or 0) - hour, five), hour
    if total is None:
        return known.cache_write, known.cache_write_1h
    return max(total - known.cache_write_1h, 0), known.cache_write_1h


def collect(events: Iterable[Json]) -> Json:
    """The whole message that the events of an `AnthropicStream` amount to."""
    message: Json = {}
    block: Json = {}
    pieces: list[str] = []  # of the block
    for event in events:
        kind, delta = event["type"], event.get("delta", {})
        if kind == "content_block_delta" and (text := delta.get(DELTA_FIELDS.get(delta["type"]))) is not None:
            pieces.append(text)
        elif kind == "message_start":
            message = {**event["message"], "content": []}
        elif kind == "content_block_start":
            block, pieces = dict(event["content_block"]), []
            message["content"].append(block)
        elif kind == "content_block_delta" and delta["type"] == "signature_delta":
            block["signature"] = delta["signature"]
        elif kind == "content_block_stop":
            close_block(block, "".join(pieces))
        elif kind == "message_delta":
            message |= {**delta, "usage": event["usage"]}
    return message


DELTA_FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


def close_block(block: Json, text: str) -> None:
    if block["type"] in ("text", "thinking"):
        block[block["type"]] += text
    elif text:
        value = parsed(text)
        block["input"] = text if value is None else value  # cut off by the answer's limit


class AnthropicTap:
    """Relays Anthropic-format bytes as they came, whole events at a time, and reads off what ccmux must know.

    Until the first content event every event is parsed. After it, only those that can end or break the stream, or
    carry usage, are: a plain search tells whether any such event is among the bytes, and mostly there is none.
    """

    MOST_UNREAD = 2**19  # bytes that wait; an answer without usage is rare, so most are never read

    def __init__(self, scrub_text: Callable[[str], str]) -> None:
        self.decoder = SseDecoder()
        self.scrub_text = scrub_text
        self.usage: Usage | None = None
        self.usage_broken = False
        self.output_told = False  # message_start's own figure is that of a beginning
        self.stop_reason = ""
        self.has_content = self.ended = False
        self.seen_event = False
        self.error: ApiError | None = None
        self.error_relayed = False  # the upstream's own error event is among the bytes already
        self.ending = b""  # message_stop and what follows it: sent once the settlement is durable
        self.relayed: list[bytes] = []  # not looked at yet for its texts
        self.unread = 0  # bytes of it
        self.texts: list[str] = []

    def feed(self, data: bytes) -> bytes:
        out = whole = self.decoder.cut(data)
        if not self.has_content or self.ended or whole.find(b"message_") >= 0 or whole.find(b"error") >= 0:
            out = b"".join(self.looked_at(whole))
        self.relayed.append(out)
        self.unread += len(out)
        if self.unread > self.MOST_UNREAD:
            self.read_texts()
        return out

    def looked_at(self, whole: bytes) -> Iterator[bytes]:
        """What goes out of whole events: each is read, but runs of those that need not be go out in one piece."""
        if b"\r" in whole:
            yield from map(self.relay, split_blocks(whole))
            return
        at = 0
        while at < len(whole) and self.error is None:
            if self.has_content and not self.ended:
                marks = [mark for word in (b"message_", b"error") if (mark := whole.find(word, at)) >= 0]
                end = whole.rfind(b"\n\n", at, min(marks)) + 2 if marks else len(whole)
                if end > 1:
                    yield whole[at:end]
                    at = end
            end = whole.find(b"\n\n", at) + 2
            end = end if end > 1 else len(whole)
            yield self.relay(whole[at:end])
            at = end

    def finish(self) -> bytes:
        """The end of the upstream's bytes: without a message_stop it is a fault."""
        rest = self.decoder.finish()
        out = b"" if is_cut_off(rest) else self.relay(rest)
        if not self.ended and self.error is None:
            self.error = broken_stream()
        return out

    def relay(self, block: bytes) -> bytes:
        """One block, after a look at it; b"" where it is held back."""
        if self.error is not None:
            return b""
        if self.ended:
            self.ending += block
            return b""
        name, data = event_of(block)
        if not data:
            if self.seen_event or not is_body(block):
                return block
            self.error = not_a_stream(block.decode("utf-8", "replace"), "event stream")
            return b""
        self.seen_event = True
        try:
            event = event_json(data)
            kind = event.get("type") or name or ("error" if "error" in event else "")
        except (ValueError, RecursionError, AttributeError):
            if self.has_content or name not in ("", "message_start", "error"):
                return block  # the client's own parser is the judge of it
            self.error = not_a_stream(data, "event stream")
            return b""
        return self.look(kind, event, block)

    def look(self, kind: str, event: Json, block: bytes) -> bytes:
        if kind == "content_block_delta" or kind == "content_block_stop":
            self.has_content = True
        elif kind == "message_start":
            self.note_usage(as_object(event.get("message")).get("usage"))
        elif kind == "message_delta":
            self.has_content = True
            self.note_usage(event.get("usage"))
            self.output_told |= as_object(event.get("usage")).get("output_tokens") is not None
            self.stop_reason = str(as_object(event.get("delta")).get("stop_reason") or "")
        elif kind == "message_stop":
            self.ended, self.ending = True, block
            self.usage_broken |= not (self.output_told and self.usage and self.usage.prompt)
            return b""
        elif kind == "error":
            self.error = error_of_event(event)
            self.error_relayed = self.has_content and len(block) <= MOST_WORDS
            text = self.scrub_text(block.decode("utf-8", "surrogateescape")) if self.error_relayed else ""
            return text.encode("utf-8", "surrogateescape")
        return block

    def note_usage(self, usage: Any) -> None:
        known = anthropic_usage(usage, self.usage)
        self.usage_broken |= known is None and bool(usage)
        self.usage = known or self.usage

    def output_text(self) -> str:
        """What the model made so far, for a count where the upstream gave none."""
        self.read_texts()
        return "".join(self.texts)

    def read_texts(self) -> None:
        """Keeps the texts of what was relayed and lets go of its bytes."""
        for _, data in events_of(b"".join(self.relayed)):
            delta = as_object(as_object(parsed(data)).get("delta"))
            self.texts.extend(str(delta[k]) for k in DELTA_FIELDS.values() if delta.get(k))
        self.relayed.clear()
        self.unread = 0


def is_body(block: bytes) -> bool:
    """Whether a block without data is JSON or HTML: an answer that is no stream."""
    return block.lstrip().startswith((b"{", b"[", b"<"))


def is_cut_off(block: bytes) -> bool:
    """Whether the data of a last event is the beginning of a JSON object alone."""
    data = event_of(block)[1]
    return data.startswith("{") and parsed(data) is None


# What upstreams answer when something is wrong. The words are for a person, the retry class is for the Relay.


MOST_WORDS = 10_000  # characters of an upstream's error that a client gets; an event may have 16 MB


def retry_class(status: int) -> Retry:
    """What a status allows: RFC 9110 and what vendors mean by it."""
    if status in (401, 402, 403, 429):
        return Retry.KEY
    if status in (404, 529) or not 400 <= status < 600:
        return Retry.NEXT
    return Retry.SAME if status in (408, 409) or status >= 500 else Retry.NO


STATUS_OF_TYPE = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "rate_limit_exceeded": 429,
    "insufficient_quota": 429, "overloaded_error": 529, "api_error": 500, "server_error": 500, "timeout_error": 504,
    "context_length_exceeded": 400, "UNAVAILABLE": 503, "RESOURCE_EXHAUSTED": 429, "INVALID_ARGUMENT": 400,
}  # fmt: skip


def error_of_event(event: Json | list[Any]) -> ApiError:
    """The error that an event, or a body with status 200, tells of; its own code or type gives the status."""
    return upstream_error(status_of_error(event), event)


def status_of_error(payload: Any) -> int:
    detail = error_detail(payload)
    for key in ("status", "code", "status_code", "type"):
        value = detail.get(key)
        if isinstance(value, str):
            value = int(value) if re.fullmatch(r"\d{3}", value) else STATUS_OF_TYPE.get(value, 0)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return 502


def error_detail(payload: Any) -> Json:
    """The object that describes an error, wherever a vendor puts it."""
    payload = as_object(first_of(payload))
    inner = first_of(payload.get("error") or payload.get("errors"))
    return inner if isinstance(inner, dict) else payload


def first_of(value: Any) -> Any:
    """The first element where it is a list that has one, else the value."""
    return value[0] if isinstance(value, list) and value else value


def error_words(payload: Any) -> str:
    """The human part of an upstream's error body; "" where there is none."""
    payload = first_of(payload)
    if not isinstance(payload, dict):
        return str(payload)[:500] if payload else ""
    detail = error_detail(payload)
    others = map(payload.get, ("error", "errors", "detail", "message", "msg"))
    told = next(filter(None, (detail.get("message"), *others)), "")
    words = told if isinstance(told, str) else json.dumps(told)
    raw = as_object(detail.get("metadata")).get("raw")  # OpenRouter puts the provider's own words there
    return f"{words}: {raw}" if words and raw and isinstance(raw, str) else words


def upstream_error(status: int, payload: Any, *, tokens: int = 0, context: int = 0) -> ApiError:
    """An upstream's error as the client gets it: an overflow in the words Claude Code acts on, the rest by status."""
    words = error_words(payload)[:MOST_WORDS]
    if not 400 <= status < 600:
        message = f"the provider answered with status {status}, which is no answer to this request"
        return ApiError(502, message, retry=retry_class(status))
    if (error := plain_error(status, payload, words)) is not None:
        return error
    if status in (400, 413, 422, 500, 502) and (sizes := overflow(words, payload, tokens, context)):
        message = f"prompt is too long: {sizes[0]} tokens > {sizes[1]} maximum"
        if parts := output_overflow(words, tokens):
            message = "input length and `max_tokens` exceed context limit: {} + {} > {}".format(*parts)
            message += ", decrease input length or `max_tokens` and try again"
        return ApiError(400, message, retry=Retry.LARGER, cause="overflow")
    if status in (400, 422) and (most := re.search(_MOST_OUTPUT, words)):
        asked = max(number_of(most[1] or most[2] or "0"), number_of(most[3]) + 1)
        message = f"max_tokens: {asked} > {most[3]}, which is the maximum allowed number of output tokens for this model"
        return ApiError(400, message, cause="overflow")
    message = words or f"the provider answered with status {status} and no message"
    error = ApiError(status, message, retry=retry_class(status))
    error.param = str(error_detail(payload).get("param") or "")
    return error


def plain_error(status: int, payload: Any, words: str) -> ApiError | None:
    """The error that an upstream's words, code or type tell more plainly than its status; None where they do not."""
    if status == 404 and as_object(payload).get("type") == "error":
        return None  # in Anthropic's own form it goes on as it came
    if status == 404 and re.search(_NO_SUCH_ADDRESS, words):
        words = f"the provider has nothing at this address ({words or 404}): check its base_url"
        return ApiError(400, words, retry=Retry.NEXT)
    detail = error_detail(payload)
    told = f"{words} {detail.get('code')} {detail.get('type')}"
    found = (error for statuses, says, error in PLAIN_ERRORS if status in statuses and re.search(says, told))
    error = next(found, None)
    return error(words or told.strip()) if error else None


# Patterns of errors are texts: Python compiles them where an error comes, and not at each start.

# Of an account without money: no wait helps, and its key rests as for a 402.
NO_MONEY = functools.partial(ApiError, retry=Retry.KEY, should_retry=False, cause="no_money")

_AFFORDS = r"fewer max_tokens\. .{0,80}can only afford ([4-9]\d{3}|[1-9]\d{4,7})\b"  # fewer end a turn of Claude Code's

_NO_SUCH_ADDRESS = r"(?i)^(?:404 )?(?:page )?(?:not found)?$"

# Statuses, what an error with one of them says, and the error that this is.
PLAIN_ERRORS: tuple[tuple[tuple[int, ...], str, Callable[[str], ApiError]], ...] = (
    (  # Gemini's, xAI's and DashScope's; LiteLLM's, where it has no database to look for a key in.
        (400,),
        r"API key (?:not valid|expired)|Incorrect API key|account is in good standing|No connected db\.",
        functools.partial(ApiError, 401, retry=Retry.KEY),
    ),
    (  # LiteLLM's, OpenRouter's, DeepSeek's, Mistral's, Z.ai's, Bedrock's, LM Studio's; codes of OpenAI, Groq, Together
        (400,),
        r"(?i)invalid model name passed|is not a valid model ID|^model not exist|^invalid model(?::| identifier )|"
        r"^unknown model\b|model identifier is invalid|\bmodel_(?:not_found|decommissioned|not_available)\b",
        functools.partial(ApiError, 404, retry=Retry.NEXT),
    ),
    (  # OpenRouter's. Of a 404 Claude Code shows no words: it says that there is an issue with the model.
        (404,),
        r"(?i)no endpoints (?:found|available) (?:that|matching)|no allowed providers",
        functools.partial(ApiError, 400, retry=Retry.NEXT),
    ),
    (  # Groq's 413 and OpenAI's 429 for more than a minute's tokens, max_tokens among them. It is no overflow, as less
        # of a conversation would not help, and of a 413 Claude Code says that it is 32 MB of images.
        (413, 429),
        r"(?i)request too large.*tokens per min",
        functools.partial(ApiError, 429, retry=Retry.KEY, should_retry=False),
    ),
    (  # Alibaba's, of a minute's tokens, which has OpenAI's code for an empty account
        # (https://www.alibabacloud.com/help/en/model-studio/rate-limit)
        (429,),
        r"(?i)aliyun\.com|alibabacloud\.com|^allocated quota exceeded",
        functools.partial(ApiError, 429, retry=Retry.KEY),
    ),
    (  # types and codes of OpenAI, New API, Moonshot, MiniMax, Z.ai; xAI's, Fireworks's, OpenRouter's and LiteLLM's words
        (403, 412, 429),
        r"\b(?:insufficient_(?:user_)?quota|billing_not_active|exceeded_current_quota_error|insufficient_balance_error|1113)"
        r"(?: \S+)?$|^Your team \S+ has (?:either )?used all|^Account \S+ is suspended|^Key limit exceeded|"
        r"^Budget has been exceeded",
        functools.partial(NO_MONEY, 429, type="billing_error"),
    ),
    (  # Anthropic's, and LiteLLM's older
        (400,),
        r"^Your credit balance is too low|^You have reached your specified API usage limits|^Budget has been exceeded",
        functools.partial(NO_MONEY, 400),
    ),
    (  # OpenRouter's, of an account that has money left, but not for all of max_tokens (seen June 2026)
        (402,),
        _AFFORDS,
        functools.partial(ApiError, 400, retry=Retry.NEXT),
    ),
    (  # MiniMax's in Anthropic's format
        (500,),
        r"^insufficient balance \(1008\)",
        functools.partial(NO_MONEY, 500),
    ),
    (  # OpenAI's and Groq's 128, xAI's 200, Gemini's 512, Copilot's 128, OpenCode's 16
        (400,),
        r"(?i)'tools' ?: (?:array too long|maximum number of items)|maximum tools limit|more than \d+ tools|"
        r"at most \d+ function declarations|tool_count_limit",
        lambda words: ApiError(400, f"{words} ({FEWER_TOOLS})", retry=Retry.NEXT),
    ),
    (  # Ollama's and DeepSeek's of some models, vLLM's where it was not started for tools
        (400,),
        r"(?i)does not support (?:tools|function calling)\b|requires --enable-auto-tool-choice",
        functools.partial(ApiError, 400, retry=Retry.NEXT),
    ),
    (  # OpenAI's and Gemini's of what this account may not do; another's may
        (400,),
        r"organization must be verified to (?:stream|use)|User location is not supported",
        functools.partial(ApiError, 400, retry=Retry.NEXT),
    ),
    (  # Groq's, where the model wrote a call that is none: it may write a good one the next time
        (400,),
        r"\btool_use_failed\b",
        functools.partial(ApiError, 502, retry=Retry.SAME),
    ),
    (  # Bedrock's ("Input tag 'web_search_20250305' found using 'type' does not match any"), OpenAI's of some models
        (400,),
        r"(?i)\bweb_search(?:_\w+)?'.{0,30}(?:not supported|does not match)",
        lambda words: ApiError(400, f"{words} ({SET_WEBSEARCH})", retry=Retry.NEXT),
    ),
)  # fmt: skip
FEWER_TOOLS = "turn off MCP servers in Claude Code (/mcp), or give the model a target that takes more tools"
SET_WEBSEARCH = (
    "set `websearch` in [router] to a model whose provider can (Anthropic, OpenAI, Gemini, xAI or OpenRouter), or turn "
    "the WebSearch tool off in Claude Code"
)

_OVERFLOW = (
    r"(?i)prompt (?:is )?too long|maximum context length|context[_ ]length[_ ]exceeded|exceeds? (?:the |its )?(?:model'?s? )?"
    r"(?:maximum |available )?context|context ?window|prompt token count of|input token count|input is too long|"
    r"maximum prompt length|longer than the (?:maximum )?model(?:'s context)? length|too large for model with|"
    r"too long to fit into the model|"
    r"exceeded model token limit|model_context_window_exceeded|greater than the context length|"
    r"prompt exceeds max length|exceeds the available context size|exceed_context_size|input length exceeds|"
    r"model'?s context length is only|context length of only|exceeded max context length|reduce the length of the "
    r"(?:messages|prompt|input)|too many (?:input )?tokens(?: in|:)|range of input length|Prompt 超长|max_seq_len|"
    r"(?<!max_)(?<!output_)(?<!completion_)tokens? exceeds? (?:the )?(?:model|max|limit|configured)|token length too long|"
    r"exceed max message tokens|maximum allowed input length|configured context size|tokens_limit_reached|"
    r".inputs. (?:tokens \+|must have less than)"
)
_LIMIT = r"(?i)(?:maximum context length (?:is|of)|max_new_tokens. must be <=) (\d[\d,]*)"
UNSIZED = "prompt is too long: 2 tokens > 1 maximum"  # where nothing is known of either
LEAST_CONTEXT = 4000  # below it are years and error codes
_ANTHROPICS_WORDS = (
    r"prompt is too long: \d+ tokens > \d+ maximum|input length and `max_tokens` exceed context"
)


def overflow(words: str, payload: Any, tokens: int, context: int) -> tuple[int, int] | None:
    """(tokens sent, tokens allowed) where an error says that the prompt does not fit, else None.

    Vendors name the two numbers in any order, or one, or none: what was sent is always the larger.
    """
    detail = error_detail(payload)
    told = f"{words} {detail.get('code')} {detail.get('type')}"
    if "input length and `max_tokens`" in words or not re.search(_OVERFLOW, told):
        return None
    sent, allowed = token_number(detail.get("n_prompt_tokens")), token_number(detail.get("n_ctx"))
    found = {number_of(n) for n in re.findall(r"\d[\d,]*\d", words)}
    numbers = sorted((n for n in found if LEAST_CONTEXT <= n <= MAX_COUNT), reverse=True)
    if named := re.search(_LIMIT, words):
        allowed = allowed or token_number(number_of(named[1]))
    if len(numbers) >= 2:  # where more stand there, they are parts of what was sent
        sent, allowed = sent or numbers[0], allowed or numbers[1]
    limit = allowed or (numbers[0] if numbers else 0) or context or max(tokens - 1, 1)
    return max(sent or tokens, limit + 1), limit


def number_of(digits: str) -> int:
    """A number in an error's words; Python refuses to read one of thousands of digits."""
    return int(digits.replace(",", "")[:20])


_WANTED_OUTPUT = (
    r"requested (\d+) output tokens|(\d+) (?:in the completion|in the output|tokens for the completion)|"
    r"is too large: (\d+)|(\d+) .max_new_tokens"
)
_OTHER_INPUT = r"(\d+) .?inputs?.? tokens|requested (?:about |a total of )?(\d+) tokens"
_MOST_OUTPUT = (  # OpenAI, vLLM, Groq, DeepSeek, Ark, Qwen, and what relays say
    r"max_(?:completion_)?tokens(?:=(\d+) ?|\W(?:for `[^`]*`)?.{0,90}?(?: (\d+)\W.{0,30}?)?)(?:at most|cannot be greater than|"
    r"less than or equal to|[Ee]xpected a value <=|range of max_tokens is \[1,|should be \[1,|limited to|"
    r"exceeds model's maximum output tokens \()[ `a-z_=]*(\d{3,})"
)
LEAST_OUTPUT = 4096  # Claude Code gives up where it cannot have 3,000 and the 1,000 that it leaves free


def output_overflow(words: str, tokens: int) -> tuple[int, int, int] | None:
    """(input, max_tokens, context) where the prompt fits and only max_tokens is too much; else None.

    Claude Code asks again for less, once it is told in Anthropic's words.
    """
    limit, wanted, given = (re.search(p, words) for p in (_LIMIT, _WANTED_OUTPUT, _OTHER_INPUT))
    if not (limit and wanted and given):
        return None
    context, output = number_of(limit[1]), number_of(next(filter(None, wanted.groups())))
    input = number_of(given[1]) if given[1] else number_of(given[2]) - output
    if "at least" in words:  # vLLM stops counting where it is too much
        input = max(input, tokens)
    return (input, output, context) if 0 < input <= context - LEAST_OUTPUT else None


def not_a_stream(text: str, what: str) -> ApiError:
    """For a 200 whose body is HTML, plain JSON or rubbish instead of a stream: its own error, else a 502."""
    payload = parsed(text)
    if isinstance(payload, (dict, list)) and error_words(payload):
        return error_of_event(payload)
    # Claude Code hides words with tags in them.
    start = " ".join(re.sub("<[^>]*>", " ", text[:4000]).split())[:120]
    return broken_stream(f"the provider's answer is not an {what}; it begins: {start}")


# ----------------------------------------------------------------------------------------------------------
# Translate: OpenAI Chat (pure)
# ----------------------------------------------------------------------------------------------------------
# Requests are built from an allow-list, so that nothing Anthropic-only leaks, and inputs are never changed.
# The facts come from https://platform.openai.com/docs/api-reference/chat and from what compatible servers
# were seen to do.


@dataclass(frozen=True, slots=True)
class Upstream:
    """What a dialect knows of where a request goes."""

    model: str
    quirks: Quirks
    facts: Facts
    session: str = ""
    skip: frozenset[str] = frozenset()  # what errors have said it does not take

    @property
    def user_after_tool(self) -> bool:
        return self.quirks.user_after_tool and "user_after_tool" not in self.skip

    @property
    def vision(self) -> bool:
        return (self.quirks.vision or self.sees) and "media" not in self.skip

    @property
    def sees(self) -> bool:
        """Whether it is one of a provider's models that take images where the others do not."""
        names = self.quirks.vision_models
        return bool(names and re.search(names, self.model)) and "media" not in self.skip

    @property
    def files(self) -> bool:
        return self.quirks.files and "files" not in self.skip

    def tool_choice(self, kind: str) -> str:
        """A type of tool_choice; auto in place of one that forces a call, where the model refuses that."""
        takes_it = kind not in ("any", "tool") or (self.quirks.forced_tool and self.facts.forced_tool)
        return kind if takes_it else "auto"

    @property
    def caches(self) -> bool:
        """Whether this model takes cache_control."""
        names = self.quirks.cache_control
        return bool(names and re.search(names, self.model))


def openai_request(body: Json, to: Upstream) -> Json:
    """A Messages request as a Chat Completions request; ApiError 400 for what cannot be served."""
    quirks = to.quirks
    tools = each(client_tools(body), OPENAI_TOOLS[quirks.schema])
    system = openai_content([openai_part(b, to) for b in system_blocks(body)])
    before = [{"role": "system", "content": system}] if system else []
    out: Json = {"model": to.model, "messages": translated(body, openai_turn, to, before), "stream": True}
    if quirks.stream_options:
        out["stream_options"] = {"include_usage": True}
    if tools:
        out["tools"] = tools
        out.update(openai_tool_choice(body, to))
    out.update(openai_limits(body, to))
    out.update(
        sampling(body, to, ("temperature", "top_p", "top_k") if quirks.top_k else ("temperature", "top_p"))
    )
    if effort := wanted_effort(body, efforts_of(to)):
        out["reasoning_effort"] = effort
    if schema := json_schema_of(body):
        named = {"name": "answer"} | {k: schema[k] for k in ("schema", "strict") if k in schema}
        out["response_format"] = {"type": "json_schema", "json_schema": named}
    if quirks.prompt_cache_key and to.session:
        out["prompt_cache_key"] = to.session[:64]
    out.update(web_search_keys(body, to))
    return without(out | quirks.extra_body, to)


def without(out: Json, to: Upstream) -> Json:
    """The request, or a part of it, without what this upstream is known to refuse; the names of that are in snake case."""
    refused = to.skip.union(to.quirks.drop)
    return {k: v for k, v in out.items() if k not in refused and snake_case(k) not in refused}


@functools.lru_cache(1024)
def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


# Turns: what all translated dialects build their messages from.


@dataclass(frozen=True, slots=True)
class Turn:
    """Neighbouring messages of one role as one; system messages in mid-conversation count as the user's."""

    role: str
    blocks: list[Json]
    made: Made | None = field(default=None, compare=False)  # where it is one message, and that is kept
    calls: dict[str, Json] = field(default_factory=dict)  # of an answer, for the next turn to answer

    @property
    def is_silent(self) -> bool:
        """Whether it is an answer of which no format leaves anything: of thoughts alone, say."""
        return self.role == "assistant" and not any(
            b.get("type") == "tool_use" or words_of(b) for b in self.blocks
        )


# Stands before the first turn, and behind the last, where it answers the calls that nobody has answered.
NOTHING = Turn("user", [])

MIDWAY_SYSTEM = "ccmux_system"  # the type of a block that was a system message in mid-conversation


def turns_of(messages: Sequence[Json], before: Iterable[Turn] = ()) -> list[Turn]:
    """The messages as turns, the first of them joined to the last one `before`; a silent one that is not the last of them
    is left out.
    """
    turns = joined_turns([*before, *each(messages, turn_of)])
    if not any(turn.is_silent for turn in turns[:-1]):
        return turns
    return joined_turns([*(turn for turn in turns[:-1] if not turn.is_silent), turns[-1]])


def joined_turns(given: Iterable[Turn]) -> list[Turn]:
    turns = []
    for role, neighbours in itertools.groupby(given, lambda turn: turn.role):
        alike = list(neighbours)
        turns.append(alike[0] if len(alike) == 1 else new_turn(role, [b for t in alike for b in t.blocks]))
    return turns


# What writes a turn in a dialect's form; with the calls by id that the turn is to answer.
WriteTurn = Callable[[Turn, dict[str, Json], Upstream], list[Json]]


def translated(body: Json, write: WriteTurn, to: Upstream, before: Sequence[Json] = ()) -> Elements:
    """A request's messages in a dialect's form, behind those of `before`, which are in it already.

    What is kept of the conversation is written once.
    """
    given = messages_of(body)
    run, behind = (given.run, given.apart[1]) if type(given) is Elements else (Run(()), given)
    key = (write, to.quirks.token, to.model, to.skip)
    known = run.made.once(key, functools.partial(WrittenRun, run, write, to))
    rest = written([known.before, *turns_of(behind, known.last), NOTHING], write, to)
    return Elements([*before, *known.messages.values, *rest], known.messages, len(before))


class WrittenRun:
    """A run of messages as written, but for its last turn, which may go on behind it, and the one before where that turn
    may come to nothing.
    """

    def __init__(self, run: Run, write: WriteTurn, to: Upstream) -> None:
        turns = [NOTHING, *turns_of(run.values)]
        end = max(1, len(turns) - (2 if turns[-1].is_silent else 1))
        self.messages = Run(written(turns[:end], write, to))
        self.before, self.last = turns[end - 1], turns[end:]


def written(turns: list[Turn], write: WriteTurn, to: Upstream) -> list[Json]:
    """The turns behind the first in a dialect's form; each answers the calls of the one before it."""
    messages: list[Json] = []
    place = (write, to.quirks.token, to.model, to.skip)
    for before, turn in itertools.pairwise(turns):
        calls = before.calls
        # What is kept with a turn is no larger than it: results for calls that it leaves open are made anew.
        if turn.made is None or len(calls) > len(turn.blocks):
            messages += write(turn, calls, to)
        else:
            key = (*place, *calls, *[str(call.get("name")) for call in calls.values()]) if calls else place
            messages += turn.made.once(key, functools.partial(write_kept, turn, calls, write, to))
    return messages


def write_kept(turn: Turn, calls: dict[str, Json], write: WriteTurn, to: Upstream) -> list[Json]:
    return [Kept(message) for message in write(turn, calls, to)]


def turn_of(message: Json) -> Turn:
    blocks = blocks_of(message.get("content"))
    if message.get("role") == "system":
        blocks = [{"type": MIDWAY_SYSTEM, "text": text_of(blocks) or "\n".join(map(block_text, blocks))}]
    made = MadeOfTurn() if type(message) is Kept else None
    return new_turn("assistant" if message.get("role") == "assistant" else "user", blocks, made)


def new_turn(role: str, blocks: list[Json], made: Made | None = None) -> Turn:
    return Turn(role, blocks, made, calls_of(blocks) if role == "assistant" else {})


def reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def system_blocks(body: Json) -> list[Json]:
    """The system prompt's text blocks without Claude Code's billing header, which changes with each prompt."""
    blocks = [b for b in blocks_of(body.get("system")) if b.get("type") == "text" and b.get("text")]
    return [b for b in blocks if not str(b["text"]).startswith("x-anthropic-billing-header")]


def calls_of(blocks: list[Json]) -> dict[str, Json]:
    """The tool calls by id, in order; of a repeated id the last one."""
    return {str(b.get("id") or ""): b for b in blocks if b.get("type") == "tool_use"}


def without_repeated_calls(blocks: list[Json]) -> list[Json]:
    """The blocks, with the last call alone of those that have an id in common: told by place, as one may stand twice."""
    last = {str(b.get("id") or ""): n for n, b in enumerate(blocks) if b.get("type") == "tool_use"}
    return [
        b for n, b in enumerate(blocks) if b.get("type") != "tool_use" or last[str(b.get("id") or "")] == n
    ]


def results_of(blocks: list[Json]) -> dict[str, Json]:
    """The tool results of a user turn by the id they answer; of a repeated id the last one."""
    return {str(b.get("tool_use_id") or ""): b for b in blocks if b.get("type") == "tool_result"}


NO_RESULT = "No result was recorded for this call."


def tool_arguments(block: Json) -> str:
    """A tool call's input as JSON text; null or a value that is no object becomes {}."""
    return readable(as_object(block.get("input")))


def id_and_name(call: Json, to: Upstream) -> tuple[str, str]:
    """A tool call's id and its tool's name as the upstream gets them."""
    id = upstream_tool_id(str(call.get("id") or ""), to.quirks.tool_id)
    return id, upstream_name(str(call.get("name") or ""))


def result_parts(block: Json | None) -> tuple[str, list[Json]]:
    """A tool result as text, with its images and documents apart."""
    if block is None:
        return NO_RESULT, []
    texts, media = [], []
    for part in blocks_of(block.get("content")):
        if part.get("type") in ("image", "document"):
            media.append(part)
            texts.append(f"[{part['type']}: in the next user message]")
        else:
            texts.append(block_text(part))
    prefix = "Error: " if block.get("is_error") else ""
    return prefix + "\n\n".join(filter(None, texts)), media


def block_text(block: Json) -> str:
    """Any block as text, for dialects that have no form of it: never an error, never silence."""
    kind, text = block.get("type"), block.get("text")
    if kind == MIDWAY_SYSTEM:
        return reminder(str(text or ""))
    if kind == "text" or isinstance(text, str):
        return str(text or "")
    if kind == "image":
        return "[an image was left out: this model cannot see it]"
    if kind == "search_result":
        return f"{block.get('title') or ''}\n{block.get('source') or ''}\n{text_of(block.get('content'))}".strip()
    if kind == "document":
        return document_text(block)
    if kind == "tool_reference":
        return f"[tool: {block.get('tool_name') or block.get('name') or ''}]"
    if word := TOOL_CHANGES.get(str(kind)):
        return f"[{word}: {changed_tool(block)[0]}]"
    if kind == "web_search_tool_result":
        found = [r for r in blocks_of(block.get("content")) if r.get("url")]
        return "\n".join(f"[{r.get('title') or ''}]({r['url']})" for r in found)
    return readable(block)


def words_of(block: Json) -> str:
    """What an assistant's block says; calls and thoughts are written in their own places."""
    is_apart = block.get("type") in ("tool_use", "thinking", "redacted_thinking", "server_tool_use")
    return "" if is_apart else block_text(block)


def parts_of(blocks: Iterable[Json], part: Callable[[Json, Upstream], Json], to: Upstream) -> list[Json]:
    """A user's blocks as content parts, each made by `part`; results and what no user says are left out."""
    apart = ("tool_result", "tool_use", "thinking", "redacted_thinking")
    parts = [part(b, to) for block in blocks if block.get("type") not in apart for b in unfolded(block)]
    return [p for p in parts if p.get("text") != ""]


def unfolded(block: Json) -> list[Json]:
    """A document that is made of blocks, images among them, as these under its title; another block as it is."""
    inner = inner_blocks(block) if block.get("type") == "document" else []
    if not any(b.get("type") == "image" for b in inner):
        return [block]
    return [{"type": "text", "text": str(block.get("title") or "")}, *inner]


def inner_blocks(document: Json) -> list[Json]:
    return blocks_of(as_object(document.get("source")).get("content"))


def roles_of(blocks: list[Json], system: str, to: Upstream) -> list[tuple[str, list[Json]]]:
    """A user's blocks by role: `system` is that of system messages in mid-conversation, where the upstream takes them."""
    if not to.quirks.midway_system:
        return [("user", blocks)]
    groups = itertools.groupby(blocks, lambda block: system if block.get("type") == MIDWAY_SYSTEM else "user")
    return [(role, [{**b, "type": "text"} if role == system else b for b in group]) for role, group in groups]


def document_text(block: Json) -> str:
    """A document's text under its title; a note where it is a file that was left out."""
    source = as_object(block.get("source"))
    title = str(block.get("title") or "")
    if source.get("type") == "text":
        text = str(source.get("data") or "")
    elif source.get("type") == "content":
        text = "\n\n".join(map(block_text, inner_blocks(block)))
    elif source.get("type") == "url":
        text = str(source.get("url") or "")
    else:
        media_type = str(source.get("media_type") or "application/pdf")
        text = file_text(source) if media_type.startswith("text/") else ""
        if not text:
            kind = "a PDF" if media_type == "application/pdf" else f"a file of type {media_type}"
            named = f" named {title}" if title else ""
            return f"[{kind}{named} was left out: this model cannot read it]"
    return f"{title}\n\n{text}" if title else text


def file_text(source: Json) -> str:
    """What a base64 source holds, as text; "" where it is broken."""
    try:
        return base64.b64decode(str(source.get("data") or "")).decode("utf-8", "replace")
    except ValueError:
        return ""


def media_url(block: Json) -> str:
    """An image's or document's URL, or a data: URL of its base64; "" where there is neither."""
    if "source" not in block:
        return ""
    source = as_object(block.get("source"))
    if source.get("type") == "base64" and source.get("data"):
        default = "image/png" if block.get("type") == "image" else "application/pdf"
        return f"data:{source.get('media_type') or default};base64,{source['data']}"
    return str(source.get("url") or "")


def openai_turn(turn: Turn, calls: dict[str, Json], to: Upstream) -> list[Json]:
    """Tool results in the order of their calls, then what moved out of them, then the rest of the turn.

    A call that was never answered gets a neutral result; upstreams refuse one without.
    """
    if turn.role == "assistant":
        return openai_assistant(turn.blocks, to)
    results, messages, moved = results_of(turn.blocks), [], []
    for client_id in calls:
        result = results.get(client_id)
        text, media = result_parts(result)
        moved += media
        id = upstream_tool_id(client_id, to.quirks.tool_id)
        content = openai_content([openai_text(text, result or {}, to)])
        messages.append({"role": "tool", "tool_call_id": id, "content": content})
    for role, group in roles_of([*moved, *turn.blocks], "system", to):
        if content := openai_content(parts_of(group, openai_part, to)):
            openai_say(messages, role, content, to)
    return messages


def openai_say(messages: list[Json], role: str, content: str | list[Json], to: Upstream) -> None:
    """Appends a message. Where none of the user's may follow a result, its text joins that, or a word stands between."""
    before = messages[-1] if messages else {}
    if role == "user" and before.get("role") == "tool" and not to.user_after_tool:
        if isinstance(content, str) and isinstance(before["content"], str):
            # An answer made up in each round would be one for the model to copy.
            before["content"] = "\n\n".join(filter(None, (before["content"], content)))
            return
        messages.append({"role": "assistant", "content": "I have the results."})
    messages.append({"role": role, "content": content})


def openai_content(parts: list[Json]) -> str | list[Json]:
    """Content parts, or a plain string where they are only text."""
    if all(p.keys() == {"type", "text"} for p in parts):
        return "\n\n".join(p["text"] for p in parts)
    return parts


def openai_part(block: Json, to: Upstream) -> Json:
    """A block as a content part."""
    kind, url = block.get("type"), media_url(block)
    if kind == "image" and url and to.vision:
        return {"type": "image_url", "image_url": {"url": url}}
    if kind == "document" and to.files and url.startswith("data:application/pdf"):
        name = str(block.get("title") or "document.pdf")
        return {"type": "file", "file": {"filename": name, "file_data": url}}
    return openai_text(block_text(block), block, to)


def openai_text(text: str, block: Json, to: Upstream) -> Json:
    """A text as a content part, marked for the cache as its block is, where the upstream knows such marks."""
    part: Json = {"type": "text", "text": text}
    if isinstance(block.get("cache_control"), dict) and to.caches:
        part["cache_control"] = block["cache_control"]
    return part


def openai_assistant(blocks: list[Json], to: Upstream) -> list[Json]:
    calls = calls_of(blocks)
    text = "\n\n".join(filter(None, map(words_of, blocks)))
    if not text and not calls:
        return []
    message: Json = {"role": "assistant", "content": text or None, **openai_thoughts(blocks, bool(calls), to)}
    if calls:
        extras = {k: v for p in own_payloads(blocks, to) for k, v in as_object(p.get("extra")).items()}
        if to.quirks.reasoning_key == "extra_content" and wants_signatures(to.model):
            extras.setdefault(next(iter(calls)), {"google": {"thought_signature": NO_SIGNATURE}})
        message["tool_calls"] = [openai_call(block, extras.get(id), to) for id, block in calls.items()]
    return [message]


def openai_call(block: Json, extra: Any, to: Upstream) -> Json:
    id, name = id_and_name(block, to)
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": tool_arguments(block)}}
    return {**call, "extra_content": extra} if extra else call


def openai_thoughts(blocks: list[Json], has_calls: bool, to: Upstream) -> Json:
    """Earlier thinking, where this upstream wants it back."""
    quirks = to.quirks
    if quirks.reasoning_key == "reasoning_details":
        details = [d for p in own_payloads(blocks, to) for d in p.get("details") or []]
        return {"reasoning_details": details} if details else {}
    if quirks.reasoning_replay == "none" or (quirks.reasoning_replay == "tool_turns" and not has_calls):
        return {}
    thinking = "\n\n".join(str(b.get("thinking") or "") for b in blocks if b.get("type") == "thinking")
    # DeepSeek and Kimi refuse a tool round whose assistant message lacks the key (seen November 2026), and Kimi one
    # where it is empty (github.com/earendil-works/pi/pull/4178).
    if not thinking and quirks.reasoning_replay == "tool_turns":
        thinking = " "
    return {quirks.reasoning_key: thinking} if thinking else {}


def own_payloads(blocks: list[Json], to: Upstream) -> list[Json]:
    """What this very model's answers left in the signatures of thinking blocks."""
    return [p for b in blocks if (p := signed_payload(b)) and p.get("model") == to.model]


# https://ai.google.dev/gemini-api/docs/thinking: 2.5 takes a budget, later ones a level, none takes both.
_THINKS_BY_BUDGET = re.compile(r"gemini-2\.5|robotics-er")
_TAKES_XHIGH = re.compile(r"gemini-4-(?:hydrogen|neon)")
_NEVER_THINKS = re.compile(r"gemini-(?:1|2\.0)|gemma|learnlm")
# What Google documents for calls that another model made:
# https://ai.google.dev/gemini-api/docs/thought-signatures.
NO_SIGNATURE = "skip_thought_signature_validator"


def wants_signatures(model: str) -> bool:
    """Whether a Gemini model refuses a turn whose first call lacks the thought signature it was made with."""
    return not _NEVER_THINKS.search(model) and not _THINKS_BY_BUDGET.search(model)


# Names and ids. Upstreams take 64 characters of [A-Za-z0-9_-]; both are mapped without a memory of what was
# mapped, so that a restart, another process or a failover to another provider in mid-conversation changes
# nothing.

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def upstream_name(name: str) -> str:
    """A tool's name in the charset upstreams take; a hash keeps shortened ones apart."""
    return plain_name(name) if len(name) <= 256 else plain_name.__wrapped__(name)


@functools.lru_cache(4096)
def plain_name(name: str) -> str:
    if _PLAIN_NAME.fullmatch(name):
        return name
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:55]}_{digest_of(name)[:8]}"


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def tool_names(body: Json) -> dict[str, str]:
    """The client's own tool name -> the name an upstream gets."""
    names = dict(each(tools_of(body), both_names))
    names.pop("", None)
    return names


def both_names(tool: Json) -> tuple[str, str]:
    name = str(tool.get("name") or "")
    return name, upstream_name(name)


def client_tool_id(upstream_id: str) -> str:
    """An upstream's call id as one that Anthropic clients take; `upstream_tool_id` turns it back."""
    if _PLAIN_NAME.fullmatch(upstream_id):
        return upstream_id
    packed = base64.urlsafe_b64encode(upstream_id.encode("utf-8", "surrogatepass")).decode().rstrip("=")
    return f"ccx_{packed}" if len(packed) <= 60 else f"cch_{digest_of(upstream_id)[:48]}"


def made_up_id(prefix: str, out: AnthropicStream, place: Any) -> str:
    """An id for what came without one: the same for the same place in the same answer."""
    return prefix + digest_of(f"{out.message_id} {place}")[:24]


def tool_ids(body: Json) -> set[str]:
    """The ids of all calls in a conversation."""
    return set[str]().union(*each(messages_of(body), call_ids))


def call_ids(message: Json) -> tuple[str, ...]:
    blocks = as_list(message.get("content")) if message.get("role") == "assistant" else []
    return tuple(str(b.get("id")) for b in blocks if isinstance(b, dict) and b.get("type") == "tool_use")


def upstream_tool_id(client_id: str, pattern: str = "") -> str:
    """The id an upstream gets: its own where the client's was made from it, nine characters where it insists on a form."""
    if pattern and not re.fullmatch(pattern, client_id):
        return digest_of(client_id)[:9]
    if client_id.startswith("ccx_"):
        packed = client_id[4:]
        try:
            data = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
            return data.decode("utf-8", "surrogatepass").partition("\0")[0]
        except ValueError:
            return client_id
    return client_id if _PLAIN_NAME.fullmatch(client_id) else f"cch_{digest_of(client_id)[:48]}"


def client_tools(body: Json) -> list[Json]:
    """The tools that the client itself runs; server tools (web search and such) have a dated type and no
    schema.
    """
    tools = tools_of(body)
    wanted = each(tools, is_client_tool)
    return tools if all(wanted) else [*itertools.compress(tools, wanted)]


def is_function(name: Any, body: Json) -> bool:
    """Whether it is the name of a tool that the client itself runs."""
    return any(tool["name"] == name for tool in client_tools(body))


TOOL_CHANGES = {"tool_addition": "tool added", "tool_removal": "tool removed"}  # blocks of system messages


def changed_tool(block: Json) -> tuple[str, Json]:
    """The name of a tool that a block adds or removes, and its definition: {} where it is declared already."""
    tool = as_object(block.get("tool"))
    definition = as_object(tool.get("definition"))
    return str(definition.get("name") or tool.get("name") or ""), definition


def tool_changes(message: Json) -> list[Json]:
    blocks = blocks_of(message.get("content")) if message.get("role") == "system" else []
    return [b for b in blocks if str(b.get("type")) in TOOL_CHANGES]


def with_tool_changes(body: Json) -> Json:
    """The request with the tools that its system messages in mid-conversation leave, as the SDKs' tool runners change
    them (a beta of July 2026); the very same object where they change none.
    """
    changes = [*itertools.chain.from_iterable(each(messages_of(body), tool_changes))]
    if not changes:
        return body
    tools = {str(t.get("name") or ""): t for t in tools_of(body)}
    gone: set[str] = set()
    for block in changes:
        name, definition = changed_tool(block)
        if definition:
            tools[name] = definition
        if block["type"] == "tool_removal":
            gone.add(name)
        else:
            gone.discard(name)
    return {**body, "tools": [tool for name, tool in tools.items() if name not in gone]}


def is_client_tool(tool: Json) -> bool:
    return bool(tool.get("name")) and tool.get("type") in (None, "", "custom")


def openai_tool(cleaning: str, tool: Json) -> Json:
    function: Json = {"name": upstream_name(str(tool["name"]))}
    if tool.get("description"):
        function["description"] = str(tool["description"])
    function["parameters"] = tool_schema(tool, cleaning)
    made = {"type": "function", "function": function}
    return Kept(made) if type(tool) is Kept else made


OPENAI_TOOLS = {cleaning: functools.partial(openai_tool, cleaning) for cleaning in ("", "gemini")}


def tool_schema(tool: Json, cleaning: str) -> Json:
    """A tool's input schema as an object schema, cleaned where the upstream needs that."""
    schema = as_object(tool.get("input_schema"))
    if cleaning == "gemini":
        schema = gemini_schema({**schema, "type": "object"})
    return {**schema, "type": "object", "properties": as_object(schema.get("properties"))}


GEMINI_SCHEMA_KEYS = {
    "description", "nullable", "minItems", "maxItems", "minimum", "maximum", "title", "minLength", "maxLength",
    "pattern",
}  # fmt: skip
GEMINI_FORMATS = {"enum", "date-time", "int32", "int64", "float", "double"}
MAX_SCHEMA_PARTS = 10_000


def gemini_schema(schema: Any) -> Json:
    """A JSON schema in the subset that Gemini takes: references inlined, unknown keywords left out.

    https://ai.google.dev/api/caching#Schema. A const becomes an enum of one, oneOf an anyOf, a list of types with
    null a nullable. A reference to what it stands in is cut off, and so is what references multiply without end.
    """
    return gemini_node(gemini_keywords(schema, None, 0, itertools.count()))


def gemini_keywords(schema: Any, definitions: Json | None, depth: int, parts: Iterator[int]) -> Json:
    """A node's keywords, with those of what else it must match: allOf, and what it refers to."""
    if not isinstance(schema, dict) or depth > 24 or next(parts) > MAX_SCHEMA_PARTS:
        return {}
    definitions = definitions or {**as_object(schema.get("$defs")), **as_object(schema.get("definitions"))}
    keywords = functools.partial(gemini_keywords, definitions=definitions, depth=depth + 1, parts=parts)
    out = gemini_own(schema, lambda inner: gemini_node(keywords(inner)))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            given = [s for s in schema[key] if as_object(s).get("type") != "null"]
            out["anyOf"] = [keywords(s) for s in given]
            out |= {"nullable": True} if len(given) < len(schema[key]) else {}
    others = [keywords(member) for member in as_list(schema.get("allOf"))]
    if isinstance(schema.get("$ref"), str):
        name = schema["$ref"].rsplit("/", 1)[-1]
        outside = {k: v for k, v in definitions.items() if k != name}
        others.append(keywords(definitions.get(name), definitions=outside))
    return all_of(out, *others)


def gemini_own(schema: Json, inner: Callable[[Any], Json]) -> Json:
    out = {k: v for k, v in schema.items() if k in GEMINI_SCHEMA_KEYS} | gemini_type(schema.get("type"))
    if isinstance(schema.get("format"), str) and schema["format"] in GEMINI_FORMATS:
        out["format"] = schema["format"]
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        out |= gemini_enum(values, str(schema.get("description") or ""))
    if isinstance(schema.get("properties"), dict):
        out["properties"] = {k: inner(v) for k, v in schema["properties"].items()}
    if schema.get("items"):
        out["items"] = inner(schema["items"])
    if isinstance(schema.get("required"), list):
        out["required"] = [name for name in schema["required"] if isinstance(name, str)]
    return out


def all_of(*nodes: Json) -> Json:
    """The keywords of what must match all of the nodes; where they differ, the first has the word."""
    out: Json = {}
    properties: Json = {}
    for node in reversed(nodes):
        out |= node
        properties |= node.get("properties", {})
    out |= {"properties": properties} if "properties" in out else {}
    required = dict.fromkeys(name for node in nodes for name in node.get("required", ()))
    return {**out, "required": [*required]} if required else out


GEMINI_ONLY_OF = {"properties": "object", "required": "object", "items": "array", "enum": "string"}


def gemini_node(out: Json) -> Json:
    """A node's keywords as Gemini insists on them, or it refuses all tools: a type, or an anyOf with nothing beside it;
    `required` of known properties alone.
    """
    choices: list[Json] = out.pop("anyOf", [])
    kind = out.get("type") or ("object" if "properties" in out else "array" if "items" in out else "")
    if choices and not kind:
        nodes = [gemini_node(c) for c in (all_of(out, choices[0]), *choices[1:])]
        return nodes[0] if len(nodes) == 1 else {"anyOf": nodes}
    if kind == "object":
        out = all_of(out, *({"properties": c["properties"]} for c in choices if "properties" in c))
        known = out.get("properties", {})
        out["required"] = [name for name in out.get("required", []) if name in known]
        if not out["required"]:
            del out["required"]
    if kind == "array":
        out.setdefault("items", {"type": "string"})
    out["type"] = kind = kind or "string"
    return {k: v for k, v in out.items() if GEMINI_ONLY_OF.get(k, kind) == kind}


def gemini_enum(values: list[Any], description: str) -> Json:
    """An enum where it is of texts, the only kind there is, none of them empty; of numbers and booleans their type, and
    the values in words.
    """
    given = [v for v in values if v is not None]
    nullable = {"nullable": True} if len(given) < len(values) else {}
    kinds = {type(v) for v in given}
    if kinds and kinds <= {bool, int, float}:
        kind = {frozenset({bool}): "boolean", frozenset({int}): "integer"}.get(frozenset(kinds), "number")
        words = f"{description} One of {', '.join(map(json.dumps, given))}.".strip()
        return {"type": kind, "description": words, **nullable}
    texts = [v if isinstance(v, str) else json.dumps(v) for v in given if v != ""]
    return {"type": "string", **({"enum": texts} if texts else {}), **nullable}


def gemini_type(kind: Any) -> Json:
    kinds = [k for k in (kind if isinstance(kind, list) else [kind]) if isinstance(k, str)]
    known = [k for k in kinds if k != "null"]
    nullable = {"nullable": True} if "null" in kinds else {}
    return {"type": known[0] if known else "string", **nullable} if kinds else {}


def openai_tool_choice(body: Json, to: Upstream) -> Json:
    choice = as_object(body.get("tool_choice"))
    name = upstream_name(str(choice.get("name") or ""))
    forms = {
        "auto": "auto", "any": "required", "none": "none", "tool": {"type": "function", "function": {"name": name}},
    }  # fmt: skip
    kind = to.tool_choice(str(choice.get("type")))
    if kind == "tool" and not is_function(choice.get("name"), body):
        kind = "auto"  # a web search is none of the functions
    out: Json = {"tool_choice": forms[kind]} if kind in forms else {}
    if choice.get("disable_parallel_tool_use"):
        out["parallel_tool_calls"] = False
    return out


_NEW_LIMIT_KEY = re.compile(r"^(?:o\d|gpt-(?:[5-9]|\d\d))")


def openai_limits(body: Json, to: Upstream) -> Json:
    out: Json = {}
    if limit := output_limit(body, to.facts):
        key = to.quirks.max_tokens_key
        if key == "auto":
            is_new = _NEW_LIMIT_KEY.match(to.model.rsplit("/", 1)[-1])
            key = "max_completion_tokens" if is_new else "max_tokens"
        key = limit_key(key, to)
        # A reasoning model answers 400 where it cannot begin a message within the limit; Claude Code tries a model
        # named in /model with a single token.
        out[key] = max(limit, 16) if key == "max_completion_tokens" else limit
    if texts := [s for s in as_list(body.get("stop_sequences")) if isinstance(s, str) and s]:
        out["stop"] = texts[:4]
    return out


LIMIT_KEYS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


def limit_key(key: str, to: Upstream) -> str:
    """The name of the output limit; the other one where a 400 has refused this one."""
    return LIMIT_KEYS[key] if key in to.skip else key


def output_limit(body: Json, facts: Facts) -> int:
    """max_tokens, no more than the model can make; 0 where the client set none."""
    limit = body.get("max_tokens")
    return max(min(limit, facts.max_output or limit), 0) if type(limit) is int else 0


def sampling(body: Json, to: Upstream, keys: Iterable[str]) -> Json:
    """Sampling parameters, for models that take them."""
    return {k: body[k] for k in keys if type(body.get(k)) in (int, float)} if to.facts.sampling else {}


BUDGET_EFFORTS = ((1024, "minimal"), (4097, "low"), (12289, "medium"), (24577, "high"))


def wanted_effort(body: Json, allowed: tuple[str, ...]) -> str:
    """The reasoning effort a request asks for, clamped to what the upstream takes; "" where nothing is to be
    sent.
    """
    thinking = as_object(body.get("thinking"))
    effort = effort_of(body)
    if not allowed or thinking.get("type") == "disabled":
        return ""
    budget = thinking.get("budget_tokens")
    if not effort and thinking.get("type") == "enabled" and type(budget) is int:
        effort = next((name for below, name in BUDGET_EFFORTS if budget < below), "xhigh")
    if effort not in EFFORTS:
        return ""
    fitting = [a for a in allowed if EFFORTS.index(a) <= EFFORTS.index(effort)]
    return fitting[-1] if fitting else allowed[0]


EFFORTS_UNKNOWN = (  # models (a regular expression): https://platform.claude.com/docs/en/build-with-claude/effort
    (r"claude-(?:opus-|sonnet-)?4[-.]6", ("minimal", "xhigh")),
    (r"claude-(?:opus-)?4[-.]5", ("minimal", "xhigh", "max")),
)


def efforts_of(to: Upstream, usual: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The levels of effort that an upstream takes, but for those that the model does not know or a 400 has refused."""
    return known_efforts(to.model, to.quirks.effort or usual, to.skip)


@functools.lru_cache(1024)
def known_efforts(model: str, levels: tuple[str, ...], skip: frozenset[str]) -> tuple[str, ...]:
    unknown = next((unknown for models, unknown in EFFORTS_UNKNOWN if re.search(models, model)), ())
    return tuple(e for e in levels if e not in unknown and f"effort.{e}" not in skip)


def json_schema_of(body: Json) -> Json | None:
    """output_config.format (or the older output_format), where it asks for a JSON schema."""
    wanted = as_object(body.get("output_config")).get("format") or body.get("output_format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return None
    return wanted if isinstance(wanted.get("schema"), dict) else None


def web_search_of(body: Json) -> Json | None:
    tools = tools_of(body)
    return next(itertools.compress(tools, each(tools, is_web_search)), None)


def web_search_keys(body: Json, to: Upstream) -> Json:
    """Web search in the provider's own form; ApiError 400 that says what to set up where it has none."""
    tool = web_search_of(body)
    if tool is None:
        return {}
    place = search_place(tool)
    where = {"user_location": {"type": "approximate", "approximate": place}} if place else {}
    options = {"web_search_options": where}
    # "responses": of the models that are made for it here (gpt-5-search-api).
    forms: Json = {"plugin": {"plugins": [{"id": "web"}]}, "options": options, "responses": options}
    keys = as_object(forms.get(to.quirks.web_search))
    if keys and to.skip.isdisjoint(keys):
        return keys
    raise no_web_search()


def no_web_search() -> ApiError:
    """Where a search is left out, the model makes up what it found. The next target may be able to search."""
    return ApiError(400, f"this model's provider cannot search the web: {SET_WEBSEARCH}", retry=Retry.NEXT)


def search_place(tool: Json) -> Json:
    """Where the user is, as far as a web search may know: city, country, region, timezone."""
    place = as_object(tool.get("user_location"))
    return {k: v for k, v in place.items() if k in ("city", "country", "region", "timezone") and v}


def openai_usage(usage: Any) -> Usage | None:
    """OpenAI's counts as Anthropic has them; None where there are none, or they are absurd.

    OpenAI counts cached tokens inside prompt_tokens; Anthropic counts them apart.
    """
    if not isinstance(usage, dict):
        return None
    details = as_object(usage.get("prompt_tokens_details"))
    prompt, output = token_number(usage.get("prompt_tokens")), token_number(usage.get("completion_tokens"))
    if prompt is None or output is None:
        return None
    hits = (details.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), usage.get("cached_tokens"))
    cached = next(filter(None, map(token_number, hits)), 0)
    writes = (details.get("cache_write_tokens"), details.get("cache_creation_tokens"))
    written = next(filter(None, map(token_number, writes)), 0)
    rest = prompt - cached - written if cached <= prompt else prompt
    # xAI counts thinking apart, where OpenAI has it inside (docs.x.ai, "consumption and rate limits"); so does Google,
    # which tells it in the total alone (seen September 2026 with gemini-3.8-flash).
    apart = max((token_number(usage.get("total_tokens")) or 0) - prompt - output, 0)
    thought = token_number(as_object(usage.get("completion_tokens_details")).get("reasoning_tokens"))
    is_thought = apart == thought if thought is not None else apart not in (cached, written, cached + written)
    output += apart if is_thought else 0
    return Usage(input=max(rest, 0), output=output, cache_read=cached, cache_write=written)


OPENAI_STOP = {  # all others end the turn
    "length": "max_tokens", "max_tokens": "max_tokens", "model_length": "max_tokens",  # Mistral's
    "content_filter": "refusal", "sensitive": "refusal",  # Z.ai's
    "model_context_window_exceeded": "model_context_window_exceeded",  # Z.ai's
}  # fmt: skip
# What OpenRouter and Mistral, DeepSeek, Z.ai, vLLM and SGLang, and Google say of an answer that broke off.
GAVE_UP = {"error", "insufficient_system_resource", "network_error", "abort", "function_call_filter"}


def call_id(name: str, given: str, out: AnthropicStream, place: Any) -> str:
    """The id of a call that begins in the answer; ApiError 502 where it has no name.

    It is new to the conversation, as some servers number the calls of each answer from 0: Claude Code would lose the
    results of all but the first, and the model ask for ever (seen with 2.1.330). An id that two calls of one answer
    share does not go back: OpenAI and others refuse it (github.com/HKUDS/nanobot/pull/3943).
    """
    if not name:
        raise broken_stream("the provider sent a tool call without a name")
    is_own = bool(given) and given not in out.call_ids
    out.call_ids.add(given)
    upstream_id = given if is_own else made_up_id("toolu_", out, place)
    id = client_tool_id(upstream_id)
    if id in out.tool_ids:
        id = client_tool_id(f"{upstream_id}\0{made_up_id('', out, out.index)[:8]}")
    out.tool_ids.add(id)
    return id


def end_call(
    out: AnthropicStream, name: str, pieces: list[str], sent: str = "", is_cut: bool = False
) -> None:
    """Writes what is left of a call's arguments; ApiError 502 where they are not one JSON object, but for those that the
    answer's limit cut off.
    """
    text = whole_arguments(pieces)
    if not text and is_cut:
        text = "".join(pieces)  # Anthropic's own end like this; the client asks the model to go on
        out.cut_off = True
    if text is None or not text.startswith(sent):
        raise broken_stream(f"the provider sent arguments of tool {name!r} that are not a JSON object")
    out.tool_input(text[len(sent) :])
    out.close()


def argument_text(given: Any) -> str:
    return given if isinstance(given, str) else json.dumps(given)


@dataclass(slots=True)
class ToolCall:
    """A tool call as it arrives in pieces."""

    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    sent: int = 0  # how many of the pieces went out already
    longest: int = 0  # the length of the longest of them
    guarded: bool = False  # the pieces may be snapshots or encoded twice: decided at the end
    extra: Json = field(default_factory=dict)  # Google's thought signature, to come back with the call


def is_bare_error(chunk: Json) -> bool:
    """Whether a chunk without choices is an error by itself: FastAPI's {"detail"}, vLLM's {"object": "error", "message"}."""
    return "usage" not in chunk and bool(error_words(chunk))


BESIDE_TEXT = frozenset((  # what a delta may hold besides its text; most do not
    "reasoning_details", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call",
))  # fmt: skip


class ChunkPattern:
    """What the chunks of a stream have in common. Most differ from the one before in a piece of text alone, and are known
    again: to parse them all would be half of what an event costs.
    """

    MOST = 8  # chunks of text in a row that differ in more; after them none is expected to be alike

    def __init__(self) -> None:
        self.key = self.before = self.after = ""
        self.start = self.end = 0  # of the text, the latter from the chunk's end
        self.unlike = 0

    def text(self, data: str) -> str:
        """The text of a chunk that is alike; "" where it has to be parsed."""
        if not (self.key and data.startswith(self.before) and data.endswith(self.after)):
            return ""
        text = data[self.start : self.end]
        if '"' in text or "\\" in text or not text.isprintable():
            return ""
        self.unlike = 0
        return text

    def learn(self, data: str, chunk: Json) -> None:
        """Takes a parsed chunk as the pattern, if its text stands there as it is, and nowhere else could."""
        if self.unlike == self.MOST or (piece := piece_of_chunk(chunk)) is None:
            return
        self.unlike += 1
        key, text = piece
        before, mark, rest = data.partition(f'"{key}":')
        blank, quote, rest = rest.partition('"')
        if rest.startswith(f'{text}"') and mark not in rest:
            self.key, self.before, self.after = key, before + mark + blank + quote, rest[len(text) :]
            self.start, self.end = len(self.before), -len(self.after)


def piece_of_chunk(chunk: Json) -> tuple[str, str] | None:
    """(key, text) of the one thing that the delta of a chunk's one choice says."""
    choices = as_list(chunk.get("choices"))
    choice = as_object(choices[0]) if len(choices) == 1 else {}
    told = [item for item in as_object(choice.get("delta")).items() if item[1] and item[0] != "role"]
    key, text = told[0] if len(told) == 1 and not choice.get("index") else ("", None)
    return (key, text) if isinstance(text, str) else None


class OpenAIStream:
    """Chat Completions chunks -> Anthropic events. `names` maps upstream tool names back to the client's."""

    def __init__(self, out: AnthropicStream, names: dict[str, str], to: Upstream) -> None:
        self.out, self.names, self.to = out, names, to
        self.usage: Usage | None = None
        self.finish_reason = ""
        self.refused = False
        self.calls: dict[Any, ToolCall] = {}
        self.live: ToolCall | None = None
        self.think = ThinkTags(out.thinking, self.show) if to.quirks.think_tags else None
        self.details: list[Json] = []
        self.late: list[str] = []  # text that came beside an unfinished call
        self.pattern = ChunkPattern()

    @property
    def stop_reason(self) -> str:
        """Google's finish reasons go on behind a colon."""
        return OPENAI_STOP.get(self.finish_reason.partition(":")[0], "end_turn")

    def feed(self, name: str, data: str) -> None:
        """One event's data. Raises ApiError for an error it tells of, or for data that is not JSON."""
        if self.out.ended:
            return
        text = "" if name else self.pattern.text(data)
        if not text:
            self.chunk(name, data)
        elif self.pattern.key == "content":
            self.content(text)
        else:
            self.delta({self.pattern.key: text})

    def chunk(self, name: str, data: str) -> None:
        if data == "[DONE]":
            self.finish()
            return
        chunk = parsed(data)
        if not isinstance(chunk, dict):
            raise not_a_stream(data, "OpenAI stream")
        if chunk.get("error") or name == "error" or ("choices" not in chunk and is_bare_error(chunk)):
            raise error_of_event(chunk)
        if chunk.get("usage") or chunk.get("x_groq"):
            self.note_usage(chunk)
        for choice in as_list(chunk.get("choices")):
            if isinstance(choice, dict) and not choice.get("index"):
                if choice.get("usage"):  # Moonshot's
                    self.note_usage(choice)
                self.choice(choice)
        self.pattern.learn(data, chunk)

    def note_usage(self, chunk: Json) -> None:
        groq = as_object(chunk.get("x_groq"))
        self.usage = openai_usage(chunk.get("usage") or groq.get("usage")) or self.usage
        if groq.get("error"):  # why Groq stopped the stream early
            raise error_of_event(groq)

    def choice(self, choice: Json) -> None:
        delta = choice.get("delta")
        # MiniMax ends a stream with all of the message once more (github.com/GCWing/OpenBitFun/pull/792).
        if not delta and not self.out.started:
            delta = choice.get("message")
        if isinstance(delta, dict):
            self.delta(delta)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason = reason
            if reason.partition(":")[0] in GAVE_UP:
                words = f"the provider gave up (finish_reason {reason})"
                raise error_of_event(choice if choice.get("error") else {"error": {"message": words}})

    def delta(self, delta: Json) -> None:
        """Thinking, then text, then tools, whatever order the keys of a mixed chunk have."""
        is_mixed = not BESIDE_TEXT.isdisjoint(delta)
        if is_mixed:
            self.reasoning(delta)
        content = delta.get("content")
        if content:
            self.content(content) if isinstance(content, str) else self.content_parts(content)
        if is_mixed:
            self.beside_text(delta)

    def beside_text(self, delta: Json) -> None:
        refusal = delta.get("refusal")
        if isinstance(refusal, str) and refusal:
            self.refused = True
            self.show(refusal)
        for call in as_list(delta.get("tool_calls")):
            if isinstance(call, dict):
                self.tool_piece(call)
        if isinstance(delta.get("function_call"), dict):
            self.tool_piece({"index": "function_call", "function": delta["function_call"]})

    def reasoning(self, delta: Json) -> None:
        details = delta.get("reasoning_details")
        if self.live and (not details or self.in_call()):
            return  # the thought belongs to a block that has ended; the details must come back all the same
        text = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(details, list) and details:
            known = [d for d in details if isinstance(d, dict)]
            text = text or "".join(str(d.get("text") or d.get("summary") or "") for d in known)
            self.details = merge_details(self.details, known)
            self.out.keep({"details": self.details, "model": self.to.model})
        if isinstance(text, str) and text:
            self.out.thinking(text)

    def content(self, text: str) -> None:
        if self.think is None:
            self.show(text)
        else:
            self.think.feed(text)

    def content_parts(self, content: Any) -> None:
        """Content as parts: texts, and Mistral's thinking, which is a list of texts itself."""
        for part in blocks_of(content):
            if part.get("type") == "thinking":
                texts = (str(t.get("text") or "") for t in blocks_of(part.get("thinking")))
                self.reasoning({"reasoning": "".join(texts)})
            elif part.get("type") == "text":
                self.content(str(part.get("text") or ""))

    def show(self, text: str) -> None:
        """Text; beside an unfinished call it waits, because blocks never interleave."""
        if self.live and self.in_call():
            self.late.append(text)
            return
        self.details = []
        self.out.text(text)

    def in_call(self) -> bool:
        """Whether a call is open and lacks something; a whole one is ended here."""
        if self.live and whole_arguments(self.live.pieces):
            self.end_call(self.live)
        return self.live is not None

    def tool_piece(self, piece: Json) -> None:
        function = as_object(piece.get("function"))
        call = self.call_of(piece)
        call.id = call.id or str(piece.get("id") or "")
        call.name = call.name or str(function.get("name") or "")
        call.extra = call.extra or as_object(piece.get("extra_content"))
        if (arguments := function.get("arguments")) not in (None, ""):
            call.guarded = call.guarded or not isinstance(arguments, str)
            call.pieces.append(argument_text(arguments))
        self.stream_call(call)

    def call_of(self, piece: Json) -> ToolCall:
        """The call a piece belongs to: by index; without one by id, else the last open."""
        key: Any = piece.get("index")
        if not isinstance(key, (int, str)):
            key = f"id {piece['id']}" if piece.get("id") else next(reversed(self.calls), 0)
        if key in self.calls and begins_another(self.calls[key], piece):
            self.calls[object()] = self.calls.pop(key)  # some servers number every call 0
        return self.calls.setdefault(key, ToolCall())

    def stream_call(self, call: ToolCall) -> None:
        """Lets the open call's arguments out as they come; the others wait for their turn."""
        if self.live is None and call.name:
            self.begin(call)
        if self.live is call and not call.guarded:
            waiting = "".join(call.pieces[call.sent :])
            call.guarded = is_doubtful(call, waiting)
            if waiting.strip() and not call.guarded:
                self.out.tool_input(waiting)
                call.longest = max(call.longest, *map(len, call.pieces[call.sent :]))
                call.sent = len(call.pieces)

    def begin(self, call: ToolCall) -> None:
        if self.think is not None:
            self.think.release()
        self.details = []
        self.live = call
        id = call_id(call.name, call.id, self.out, f"{self.out.index} {len(self.calls)}")
        if call.extra:
            self.out.keep({"extra": {id: call.extra}, "model": self.to.model})
        self.out.tool(id, self.names.get(call.name, call.name))

    def end_call(self, call: ToolCall) -> None:
        sent, is_cut = "".join(call.pieces[: call.sent]), self.stop_reason == "max_tokens"
        end_call(self.out, call.name, call.pieces, sent, is_cut)
        self.calls = {k: c for k, c in self.calls.items() if c is not call}
        self.live = None

    def finish(self) -> None:
        """The end of the stream: ends the message, or says why it is none."""
        if self.out.ended:
            return
        if not self.finish_reason and not self.to.quirks.lax_finish:
            raise broken_stream()
        if self.think is not None:
            self.think.finish()
        if self.live:
            self.end_call(self.live)
        for call in [c for c in self.calls.values() if c.name or "".join(c.pieces).strip()]:
            self.begin(call)
            self.end_call(call)
        if "".join(self.late).strip():
            self.out.text("".join(self.late))
        self.end_message()

    def end_message(self) -> None:
        reason = "refusal" if self.refused else self.stop_reason
        is_empty = not self.out.has_content and not self.out.kind
        if is_empty and reason == "model_context_window_exceeded":
            tokens, context = self.out.usage.input, self.to.facts.context
            raise upstream_error(400, reason, tokens=tokens, context=context)
        if is_empty and reason == "refusal":
            self.out.text(f"The provider refused ({self.finish_reason}).")
        end_answer(self.out, reason, self.usage)


def end_answer(
    out: AnthropicStream, reason: str, usage: Usage | None, cited: dict[str, str] | None = None
) -> None:
    """Ends an answer, with the pages it cites (URL -> title); ApiError 502 where there is nothing in it."""
    if not out.has_content and not out.kind and reason == "end_turn":
        raise ApiError(502, "the provider's answer is empty", retry=Retry.SAME, cause="empty")
    if cited:
        out.text("\n\nSources:" + "".join(f"\n- [{title or url}]({url})" for url, title in cited.items()))
    out.usage = usage or out.usage
    out.finish(reason)


def begins_another(call: ToolCall, piece: Json) -> bool:
    """Whether a named piece under a call's key is no part of it: it has another id, or no id and arguments of its
    own beside whole ones.
    """
    function, id = as_object(piece.get("function")), str(piece.get("id") or "")
    if not function.get("name") or (id and call.id):
        return bool(function.get("name")) and id != call.id
    said, known = argument_text(function.get("arguments")), "".join(call.pieces)
    is_own = said.lstrip()[:1] == "{" and said != known and known.strip() not in ("", "{}")
    return is_own and known.rstrip()[-1] == "}" and bool(whole_arguments([known]))


def is_doubtful(call: ToolCall, waiting: str) -> bool:
    """Whether pieces may be growing snapshots, or JSON inside a JSON string: neither may be let out as it
    comes.

    A piece that repeats all that came before it is what a snapshot looks like; so may, once in a long while, an
    honest piece. Both readings begin with what is out already, so waiting decides it safely.
    """
    if not call.sent:
        return waiting.strip() == "{}" or waiting.lstrip()[:1] not in ("{", "")
    return len(waiting) > call.longest and waiting.startswith("".join(call.pieces[: call.sent]))


def whole_arguments(pieces: list[str]) -> str | None:
    """All pieces as the text of one JSON object; None where no reading of them is one."""
    text = "".join(pieces)
    # Bedrock's endpoint begins the arguments it sends in pieces with an empty object.
    for reading in (text, pieces[-1] if pieces else "", text.removeprefix("{}")):
        value = parsed(reading) if reading.strip() else {}
        if isinstance(value, str):  # encoded twice
            reading, value = value, parsed(value)
        if isinstance(value, dict):
            return reading if reading.strip() else ""
        if value is None and reading.strip() == "null":
            return ""
    return None


def merge_details(known: list[Json], new: list[Json]) -> list[Json]:
    """OpenRouter's reasoning_details put together from their pieces: texts of one index and type grow."""
    merged = list(known)
    for detail in new:
        last = merged[-1] if merged else {}
        same = last.get("type") == detail.get("type") and last.get("index") == detail.get("index")
        if not same or detail.get("type") == "reasoning.encrypted":
            merged.append(detail)
            continue
        grown = {
            k: str(last.get(k) or "") + detail[k]
            for k in ("text", "summary")
            if isinstance(detail.get(k), str)
        }
        merged[-1] = {**last, **{k: v for k, v in detail.items() if v is not None}, **grown}
    return merged


class ThinkTags:
    """Splits a leading <think>...</think>, cut anywhere, from the text that follows it."""

    def __init__(self, thinking: Callable[[str], None], text: Callable[[str], None]) -> None:
        self.thinking, self.text = thinking, text  # where each goes
        self.mode = "start"  # start: may still open with the tag; thinking; after: the tag has closed; text
        self.rest = ""

    def feed(self, text: str) -> None:
        self.rest += text
        if self.mode == "start":
            begin = self.rest.lstrip()
            if begin.startswith("<think>"):
                self.mode, self.rest = "thinking", begin[7:]
            elif not "<think>".startswith(begin):
                self.mode = "text"
        if self.mode == "thinking":
            thought, tag, after = self.rest.partition("</think>")
            if tag:
                self.mode, self.rest = "after", after
            else:  # what may be the beginning of the tag waits
                held = next((n for n in range(7, 0, -1) if thought.endswith("</think>"[:n])), 0)
                thought, self.rest = thought[: len(thought) - held], thought[len(thought) - held :]
            self.thinking(thought)
        if self.mode == "after" and (rest := self.rest.lstrip("\n")):
            self.mode, self.rest = "text", rest
        if self.mode == "text":
            self.text(self.rest)
            self.rest = ""

    def release(self) -> None:
        """Lets out what might have been the beginning of the opening tag, as something else follows it."""
        if self.mode == "start" and self.rest:
            self.text(self.rest)
            self.rest = ""

    def finish(self) -> None:
        self.release()
        if self.mode == "thinking":
            self.thinking(self.rest)


# ----------------------------------------------------------------------------------------------------------
# Translate: OpenAI Responses (pure)
# ----------------------------------------------------------------------------------------------------------
# https://platform.openai.com/docs/api-reference/responses. Nothing is stored there: a reasoning item comes
# encrypted, rides to the client in its thinking block's signature, and from there back to the same model.
# The format has no stop sequences.


def responses_request(body: Json, to: Upstream) -> Json:
    """A Messages request as a Responses request; ApiError 400 for what cannot be served."""
    out: Json = {
        "model": to.model,
        "input": translated(body, responses_turn, to),
        "stream": True,
        "store": False,
    }
    if system := "\n\n".join(str(b["text"]) for b in system_blocks(body)):
        out["instructions"] = system
    if tools := responses_tools(body, to):
        out["tools"] = tools
        out.update(responses_tool_choice(body, to))
    if limit := output_limit(body, to.facts):
        out["max_output_tokens"] = max(limit, 16)  # the least it takes
    out.update(sampling(body, to, ("temperature", "top_p")))
    include = ["web_search_call.action.sources"] if web_search_of(body) else []
    if to.quirks.effort or _REASONING_MODEL.search(to.model):
        include.append("reasoning.encrypted_content")
        out.update(responses_reasoning(body, to))
    if include:
        out["include"] = include
    if schema := json_schema_of(body):
        named = {"name": "answer", "schema": schema["schema"], "strict": bool(schema.get("strict"))}
        out["text"] = {"format": {"type": "json_schema", **named}}
    if to.quirks.prompt_cache_key and to.session:
        out["prompt_cache_key"] = to.session[:64]
    return without(out | to.quirks.extra_body, to)


# Others answer 400 to reasoning and to include reasoning.encrypted_content (gpt-4o and gpt-5-chat do).
_REASONING_MODEL = re.compile(r"(?:^|/)(?:o\d|gpt-(?:[5-9]|\d\d)(?!\S*chat))|codex")


def responses_reasoning(body: Json, to: Upstream) -> Json:
    """How much to think, and whether to tell of it: OpenAI does so to verified organisations only."""
    effort = wanted_effort(body, efforts_of(to))
    out: Json = {"effort": effort} if effort else {}
    is_shown = as_object(body.get("thinking")).get("type") in ("enabled", "adaptive")
    if is_shown and "reasoning.summary" not in to.skip:
        out["summary"] = "auto"
    return {"reasoning": out} if out else {}


_EFFORT_REFUSED = (  # OpenAI's of either API, Gemini's, CLIProxyAPI's
    r"(?i)(?:unsupported|invalid) value: '(?:reasoning_effort' does not support ')?(\w+)'|"
    r"thinking[_ ]level (\w+) is not supported|level \"(\w+)\" not supported"
)
_EFFORTS_TAKEN = (  # and Groq's, vLLM's, SGLang's, Kimi's
    r"(?i)(?:(?:supported|valid) (?:values|levels)(?: are)?|one of(?: the allowed values)?|should be)"
    rf"((?:\W|\b(?:and|or|none|default|{'|'.join(EFFORTS)})\b)+)"
)


def refused_efforts(message: str, param: str = "") -> list[str]:
    """The levels of effort that a 400 says this model does not know, as `skip` has them: all that it does not list, or
    where it lists none the one it refuses; [] where it says another thing.
    """
    found, listed = re.search(_EFFORT_REFUSED, message), re.search(_EFFORTS_TAKEN, message)
    level = next(filter(None, found.groups())).lower() if found else ""
    is_of_effort = re.search(r"reasoning[_. ]effort", param or message) or (level and not param)
    if not is_of_effort or (level and level not in EFFORTS):
        return []
    taken = set(EFFORTS).intersection(re.findall(r"\w+", listed[1].lower()) if listed else ())
    return [f"effort.{e}" for e in EFFORTS if (e not in taken if taken else e == level)]


def responses_tools(body: Json, to: Upstream) -> list[Json]:
    # strict is true where it is left out, and then refuses most schemas.
    tools: list[Json] = [
        {"type": "function", **tool["function"], "strict": False}
        for tool in each(client_tools(body), OPENAI_TOOLS[to.quirks.schema])
    ]
    if search := web_search_of(body):
        domains = [d for d in as_list(search.get("allowed_domains")) if isinstance(d, str)]
        filters = {"filters": {"allowed_domains": domains}} if domains else {}
        place = search_place(search)
        where = {"user_location": {"type": "approximate", **place}} if place else {}
        tools.append({"type": "web_search", **filters, **where})
    return tools


def responses_tool_choice(body: Json, to: Upstream) -> Json:
    out, choice = openai_tool_choice(body, to), as_object(body.get("tool_choice"))
    if to.tool_choice(str(choice.get("type"))) == "tool":
        out["tool_choice"] = responses_forced(choice.get("name"), body)
    return out


def responses_forced(name: Any, body: Json) -> Json | str:
    """The tool that must be called: flat where Chat Completions nests it; the web search by its type, or as any call
    where it is the only tool; auto where it is one that was left out.
    """
    if is_function(name, body):
        return {"type": "function", "name": upstream_name(str(name))}
    if name != (web_search_of(body) or {}).get("name"):
        return "auto"
    return {"type": "web_search"} if client_tools(body) else "required"


def responses_turn(turn: Turn, calls: dict[str, Json], to: Upstream) -> list[Json]:
    if turn.role == "assistant":
        return responses_assistant(turn.blocks, to)
    results = results_of(turn.blocks)
    items = [responses_result(id, results.get(id), to) for id in calls]
    for role, group in roles_of(turn.blocks, "developer", to):
        if parts := parts_of(group, responses_part, to):
            items.append({"type": "message", "role": role, "content": parts})
    return items


def responses_part(block: Json, to: Upstream) -> Json:
    """A block as an input content part."""
    kind, url = block.get("type"), media_url(block)
    if kind == "image" and url and to.vision:
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    takes_file = kind == "document" and "files" not in to.skip
    if takes_file and url.startswith("data:application/pdf"):
        return {"type": "input_file", "filename": str(block.get("title") or "document.pdf"), "file_data": url}
    if takes_file and url and not url.startswith("data:"):
        return {"type": "input_file", "file_url": url}
    return {"type": "input_text", "text": block_text(block)}


def responses_result(client_id: str, block: Json | None, to: Upstream) -> Json:
    """A tool's result; unlike Chat Completions it can hold images and files."""
    id = upstream_tool_id(client_id, to.quirks.tool_id)
    content = blocks_of(block.get("content")) if block else []
    if not any(b.get("type") in ("image", "document") for b in content):
        output: Any = result_parts(block)[0]
    else:
        failed = [{"type": "input_text", "text": "Error:"}] if block and block.get("is_error") else []
        output = failed + parts_of(content, responses_part, to)
    return {"type": "function_call_output", "call_id": id, "output": output}


def responses_assistant(blocks: list[Json], to: Upstream) -> list[Json]:
    """An assistant turn: messages, calls, and the reasoning items that this very model made."""
    items: list[Json] = []
    phase = None
    for block in without_repeated_calls(blocks):
        if block.get("type") in ("thinking", "redacted_thinking"):
            kept = signed_payload(block) or {}
            is_own = kept.get("dialect") == "responses" and kept.get("model") == to.model
            phase = kept.get("phase") if is_own else None
            if is_own and as_object(kept.get("item")).get("type") == "reasoning":
                items.append(kept["item"])
        elif block.get("type") == "tool_use":
            id, name = id_and_name(block, to)
            call = {"type": "function_call", "call_id": id, "name": name, "arguments": tool_arguments(block)}
            items.append(call)
        elif text := words_of(block):
            message = {"type": "message", "role": "assistant", "content": text}
            items.append({**message, "phase": phase} if phase in ("commentary", "final_answer") else message)
    # "Item 'rs_...' of type 'reasoning' was provided without its required following item" is a 400.
    while items and items[-1]["type"] == "reasoning":
        items.pop()
    return items


def responses_usage(usage: Any) -> Usage | None:
    """The counts of a Responses answer, which are Chat Completions' under other names."""
    given = as_object(usage)
    counts = {"prompt_tokens": given.get("input_tokens"), "completion_tokens": given.get("output_tokens")}
    return openai_usage({**counts, "prompt_tokens_details": given.get("input_tokens_details")})


class ResponsesStream:
    """Responses events -> Anthropic events. `names` maps upstream tool names back to the client's.

    Items come one after another as a rule. Blocks cannot interleave, so what arrives beside an unfinished
    call waits until the call is done, and is then taken whole from the event that ends its item.
    """

    def __init__(self, out: AnthropicStream, names: dict[str, str], to: Upstream) -> None:
        self.out, self.names, self.to = out, names, to
        self.usage: Usage | None = None
        self.refused = False
        self.keys: dict[str, Any] = {}  # an item's id -> what tells it from the others
        self.latest: Any = ""  # of the item that was begun last
        self.items: dict[Any, Json] = {}  # as they were told last
        self.sent: dict[Any, list[str]] = {}  # item -> what of its thought or arguments is out
        self.begun: dict[Any, list[str]] = {}  # message that is not whole -> what of its text is out
        self.said: list[str] = []  # the texts of the others
        self.live: Json | None = None  # the call that is open
        self.live_key: Any = None
        self.done: set[Any] = set()
        self.told: set[str] = set()  # which calls are out, and which other kinds of items but messages
        self.behind: set[Any] = set()  # items of which a delta was passed over, so that they are taken whole
        self.waiting: list[tuple[Any, Json]] = []
        self.cited: dict[str, str] = {}  # URL -> title

    def feed(self, name: str, data: str) -> None:
        """One event. Raises ApiError for an error it tells of, or for data that is not JSON."""
        if self.out.ended or data == "[DONE]":
            return
        event = parsed(data)
        if not isinstance(event, dict):
            raise not_a_stream(data, "OpenAI Responses stream")
        kind = str(event.get("type") or name)
        if kind == "error" or (event.get("error") and "response" not in event):
            raise responses_error(event)
        self.read(kind, event)

    def read(self, kind: str, event: Json) -> None:
        item = as_object(event.get("item"))
        key = self.key_of(event, item)
        if self.live and key == self.live_key and "arguments" in event:
            self.live = {**self.live, "arguments": event["arguments"]}  # some tell them only here
        if kind == "response.output_item.added":
            self.item_added(key, item)
        elif kind == "response.output_item.done":
            self.item_done(key, item)
        elif kind.startswith("response.output_text.annotation"):
            self.note_citation(as_object(event.get("annotation")))
        elif kind in ("response.completed", "response.incomplete", "response.failed", "response.done"):
            self.response_ended(kind.removeprefix("response."), as_object(event.get("response")))
        elif isinstance(delta := event.get("delta"), str) and key not in self.done:
            self.delta(kind, key, delta)
        elif kind == "response.reasoning_summary_part.added" and self.sent.get(key) and not self.live:
            self.show(self.out.thinking, key, "\n\n")

    def key_of(self, event: Json, item: Json) -> Any:
        """What tells an item from the others: its number, or its id where it has none or shares it.

        Ollama 0.17 gives a call the number of the text before it, which it never ends; some relays tell none at all.
        """
        id, number = str(event.get("item_id") or item.get("id") or ""), event.get("output_index")
        if isinstance(number, int) and self.keys.get(id) != id:
            return number
        return self.keys.get(id, id) if id else self.latest

    def key_of_new(self, number: Any, item: Json) -> Any:
        """What tells an item that begins from the others: its id where one that is not whole yet has its number."""
        id, before = str(item.get("id") or ""), self.items.get(number, {})
        is_shared = id and before.get("id") not in (None, "", id) and number not in self.done
        key = id if is_shared else number
        self.keys |= {id: key} if id else {}
        return key

    def item_added(self, number: Any, item: Json) -> None:
        key = self.latest = self.key_of_new(number, item)
        if self.live and key == self.live_key and not is_end_of(self.live, item) and self.is_whole():
            self.item_done(key, self.live)  # no event has told so
        if not self.live:
            self.anew(key, item)
        if item.get("type") == "function_call" and not self.live and item.get("name"):
            self.begin(key, item)
        elif item.get("type") == "reasoning" and self.out.kind == "thinking":
            self.out.close()  # one thinking block for each item, as each carries its own signature
        elif item.get("type") == "message" and not self.live:
            self.begin_message(item)

    def anew(self, key: Any, item: Json) -> None:
        """Lets go of the item that had this key before."""
        self.sent.pop(key, None)
        if key in self.begun:
            self.said.append("".join(self.begun.pop(key)))
        if key in self.done and is_another(item, self.items[key]):
            self.done.discard(key)
        self.items[key] = item

    def is_whole(self) -> bool:
        """Whether the arguments of the open call are."""
        return whole_arguments(["".join(self.sent.get(self.live_key, ()))]) is not None

    def kept(self, **payload: Any) -> Json:
        return {"dialect": "responses", "model": self.to.model, **payload}

    def delta(self, kind: str, key: Any, delta: str) -> None:
        if kind == "response.function_call_arguments.delta":
            # What does not begin as an object may be null, or encoded twice: it is taken whole at the end.
            if self.live and key == self.live_key and (self.sent.get(key) or delta.lstrip()[:1] == "{"):
                self.show(self.out.tool_input, key, delta)
        elif self.live or key in self.behind:
            self.behind.add(key)
        elif kind in ("response.output_text.delta", "response.refusal.delta"):
            self.refused |= kind == "response.refusal.delta"
            self.begun.setdefault(key, []).append(delta)
            self.out.text(delta)
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            self.told.add("reasoning")
            self.show(self.out.thinking, key, delta)

    def show(self, write: Callable[[str], None], key: Any, text: str) -> None:
        self.sent.setdefault(key, []).append(text)
        write(text)

    def note_citation(self, annotation: Json) -> None:
        if annotation.get("type") == "url_citation" and annotation.get("url"):
            self.cited.setdefault(str(annotation["url"]), str(annotation.get("title") or ""))

    def begin(self, key: Any, item: Json) -> None:
        self.live, self.live_key = {**item, "arguments": ""}, key
        name = str(item.get("name") or "")
        id = call_id(name, str(item.get("call_id") or ""), self.out, key)
        self.out.tool(id, self.names.get(name, name))

    def item_done(self, key: Any, item: Json) -> None:
        """An item is whole; it waits for a call that is still open."""
        if self.live and not (key == self.live_key and is_end_of(self.live, item)):
            self.waiting.append((key, item))
            return
        if key in self.done:
            self.anew(key, item)
            if key in self.done:
                return
        self.done.add(key)
        self.items[key] = item
        self.told.add(told_as(item))
        write = {
            "message": self.message_done, "reasoning": self.reasoning_done, "function_call": self.call_done,
            "web_search_call": self.search_done,
        }.get(str(item.get("type")))  # fmt: skip
        if write:
            write(key, item)

    def begin_message(self, item: Json) -> None:
        """Ends the text of another; what phase of the answer it belongs to comes back with it."""
        if self.out.kind == "text":
            self.out.close()
        if item.get("phase"):
            self.out.keep(self.kept(phase=item["phase"]))

    def message_done(self, key: Any, item: Json) -> None:
        parts = objects_of(item.get("content"))
        self.refused |= any(p.get("type") == "refusal" for p in parts)
        for note in (n for p in parts for n in as_list(p.get("annotations"))):
            self.note_citation(as_object(note))
        text, begun = message_text(item), "".join(self.begun.pop(key, ()))
        if text and not begun:
            self.begin_message(item)
        self.out.text(text[len(begun) :])
        self.said.append(text or begun)

    def reasoning_done(self, key: Any, item: Json) -> None:
        summary = [as_object(p) for p in as_list(item.get("summary"))]
        if "item" in self.out.signature:
            self.out.close()
        if not self.sent.get(key):
            content = summary or [as_object(p) for p in as_list(item.get("content"))]
            self.out.thinking("\n\n".join(str(p.get("text") or "") for p in content))
        if encrypted := item.get("encrypted_content"):
            # Without its id: with one, the server looks for the stored item, or for the item it led to.
            texts = [{"type": "summary_text", "text": str(p.get("text") or "")} for p in summary]
            kept = {"type": "reasoning", "summary": texts, "encrypted_content": str(encrypted)}
            self.out.keep(self.kept(item=kept))

    def call_done(self, key: Any, item: Json) -> None:
        if not self.live:
            self.begin(key, item)
        given = item.get("arguments") or (self.live or {}).get("arguments")
        sent = "".join(self.sent.get(key, ()))
        is_cut = item.get("status") == "incomplete"
        end_call(self.out, str(item.get("name")), [argument_text(given or sent)], sent, is_cut)
        self.live = None
        waiting, self.waiting = self.waiting, []
        for place, other in waiting:
            self.item_done(place, other)

    def search_done(self, key: Any, item: Json) -> None:
        action = as_object(item.get("action"))
        queries = (action.get("query"), *as_list(action.get("queries")), action.get("url"))
        found = [as_object(source).get("url") for source in as_list(action.get("sources"))]
        titles = {str(url): self.cited.get(str(url), "") for url in found if url}
        show_search(self.out, str(next(filter(None, queries), "")), titles)

    def response_ended(self, status: str, response: Json) -> None:
        """The last event: what became of the answer, with its usage."""
        self.usage = responses_usage(response.get("usage")) or self.usage
        status = str(response.get("status") or status)
        if status == "failed" or response.get("error"):
            raise responses_error(response)
        if self.live:
            self.item_done(self.live_key, {**self.live, "status": status})
        self.told_late([as_object(item) for item in as_list(response.get("output"))])
        reason = as_object(response.get("incomplete_details")).get("reason")
        cut_short = "refusal" if reason == "content_filter" else "max_tokens"
        stop = "refusal" if self.refused else cut_short if status == "incomplete" else "end_turn"
        end_answer(self.out, stop, self.usage, self.cited)

    def told_late(self, output: list[Json]) -> None:
        """Some servers tell items only in the last event, all or some, and may count them otherwise than before."""
        told, is_all = {*self.told}, not self.done
        messages = self.late_messages(output)
        for place, item in enumerate(output):
            id = str(item.get("id"))
            key = id if id in self.sent else place
            if item.get("type") == "message":
                if place in messages:
                    self.item_done(messages[place], item)
            elif is_all and key in self.sent:
                self.item_done(key, item)  # what is left of it
            elif told_as(item) not in told and (is_all or item.get("type") == "function_call"):
                self.item_done(("late", place), item)

    def late_messages(self, output: list[Json]) -> dict[int, Any]:
        """The places of the messages that are not told, or not to their end, with their keys; one that was told in other
        words is the first of the rest.
        """
        texts = {n: message_text(item) for n, item in enumerate(output) if item.get("type") == "message"}
        keys: dict[int, Any] = {}
        for text in self.said:
            texts.pop(next((n for n in texts if texts[n] == text), next(iter(texts), -1)), "")
        for key, pieces in self.begun.items():
            place = next((n for n in texts if texts[n].startswith("".join(pieces))), -1)
            if texts.pop(place, None) is not None:
                keys[place] = key
            else:
                texts.pop(next(iter(texts), -1), "")
        return keys | {n: ("late", n) for n in texts}

    def finish(self) -> None:
        """The end of the bytes, which is an error unless the answer has ended."""
        if not self.out.ended:
            raise broken_stream()


def told_as(item: Json) -> str:
    return str(item.get("call_id") or item.get("type"))


def is_end_of(call: Json, item: Json) -> bool:
    """Whether an item that bears an open call's number is that call."""
    ids = {call.get("call_id"), item.get("call_id")} - {None, ""}
    return item.get("type") == "function_call" and len(ids) < 2


def is_another(item: Json, before: Json) -> bool:
    """Whether two items of one number are not the same."""
    ids = [i.get("id") or i.get("call_id") for i in (item, before)]
    return ids[0] != ids[1] if any(ids) else item != before


def message_text(item: Json) -> str:
    return "".join(str(p.get("text") or p.get("refusal") or "") for p in objects_of(item.get("content")))


# Codes of a failed response that say the request is at fault: another try would not differ.
_REQUEST_FAULT = re.compile(r"^(?:invalid_|image_|unsupported_|empty_image|failed_to_download)|policy")


def responses_error(event: Json) -> ApiError:
    """The error that an `error` event or a failed response tells of."""
    detail = error_detail(event)
    is_fault = status_of_error(event) == 502 and _REQUEST_FAULT.search(str(detail.get("code") or ""))
    return upstream_error(400 if is_fault else status_of_error(event), {"error": detail})


def show_search(out: AnthropicStream, query: str, found: dict[str, str]) -> None:
    """A web search as the server tool's call and result. `found`: URL -> title."""
    id = made_up_id("srvtoolu_", out, out.index)
    empty = {"type": "web_search_result", "encrypted_content": "", "page_age": None}
    pages = [{**empty, "url": url, "title": title or url} for url, title in found.items()]
    out.whole({"type": "server_tool_use", "id": id, "name": "web_search", "input": {"query": query}})
    out.whole({"type": "web_search_tool_result", "tool_use_id": id, "content": pages})


# ----------------------------------------------------------------------------------------------------------
# Translate: Gemini (pure)
# ----------------------------------------------------------------------------------------------------------
# https://ai.google.dev/api/generate-content. The model stands in the URL. Gemini 3 refuses a step whose first
# function call lacks the thought signature it was made with, so signatures ride to the client and back.


def gemini_request(body: Json, to: Upstream) -> Json:
    """A Messages request as a GenerateContent request."""
    out: Json = {"contents": gemini_contents(body, to)}
    if blocks := system_blocks(body):
        out["systemInstruction"] = {"parts": [{"text": str(b["text"])} for b in blocks]}
    declarations = each(client_tools(body), gemini_function)
    tool: Json = {"functionDeclarations": declarations} if declarations else {}
    if web_search_of(body) and not (declarations and searches_alone(to)):
        tool["googleSearch"] = {}
    if tool:
        out["tools"] = [tool]
    if declarations:
        out.update(gemini_tool_config(body, to, searches="googleSearch" in tool))
    if config := without(gemini_config(body, to), to):
        out["generationConfig"] = config
    return without(out | to.quirks.extra_body, to)


def gemini_function(tool: Json) -> Json:
    function: Json = {"description": "", **openai_tool("gemini", tool)["function"]}
    if not function["parameters"]["properties"]:
        del function["parameters"]
    return function


def searches_alone(to: Upstream) -> bool:
    """Whether a model takes its web search only where there are no functions beside it, as all before Gemini 3 do."""
    return not wants_signatures(to.model) or "googleSearch" in to.skip


def gemini_tool_config(body: Json, to: Upstream, searches: bool) -> Json:
    """Which functions may be called. Beside a search it must be asked to show what it found, and does not know AUTO.

    https://ai.google.dev/gemini-api/docs/generate-content/tool-combination
    """
    choice = as_object(body.get("tool_choice"))
    kind = to.tool_choice(str(choice.get("type")))
    if kind == "tool" and not is_function(choice.get("name"), body):
        kind = "auto"  # nothing forces a search
    config: Json = {"mode": {"auto": "AUTO", "any": "ANY", "tool": "ANY", "none": "NONE"}.get(kind)}
    if kind == "tool":
        config["allowedFunctionNames"] = [upstream_name(str(choice.get("name")))]
    if config["mode"] == "AUTO" and searches:
        config["mode"] = "VALIDATED"
    out: Json = {"functionCallingConfig": config} if config["mode"] else {}
    out |= {"includeServerSideToolInvocations": True} if searches else {}
    return {"toolConfig": out} if out else {}


def gemini_config(body: Json, to: Upstream) -> Json:
    names = {"temperature": "temperature", "top_p": "topP", "top_k": "topK"}
    out: Json = {names[k]: v for k, v in sampling(body, to, names).items()}
    if limit := output_limit(body, to.facts):
        out["maxOutputTokens"] = limit
    if texts := [s for s in as_list(body.get("stop_sequences")) if isinstance(s, str) and s]:
        out["stopSequences"] = texts[:5]
    if schema := json_schema_of(body):
        out.update(responseMimeType="application/json", responseJsonSchema=schema["schema"])
    if thinking := gemini_thinking(body, to):
        out["thinkingConfig"] = thinking
    return out


GEMINI_BUDGETS = {"minimal": 512, "low": 4096, "medium": 12288, "high": 24576, "xhigh": 24576, "max": 24576}


def gemini_thinking(body: Json, to: Upstream) -> Json:
    """thinkingConfig by effort or budget; thoughts are shown unless the client turned thinking off."""
    if _NEVER_THINKS.search(to.model) or "reasoning_effort" in to.skip:
        return {}
    thinking = as_object(body.get("thinking"))
    by_budget = bool(_THINKS_BY_BUDGET.search(to.model))
    above = ("xhigh",) if _TAKES_XHIGH.search(to.model) else ()
    levels = efforts_of(to, EFFORTS if by_budget else ("low", "medium", "high", *above))
    if thinking.get("type") == "disabled":  # the least there is: only 2.5 Flash can do without
        least = 128 if "pro" in to.model else 0
        return {"thinkingBudget": least} if by_budget else {"thinkingLevel": levels[0]} if levels else {}
    effort, budget = wanted_effort(body, levels), thinking.get("budget_tokens")
    out: Json = {"includeThoughts": True} if thinking.get("type") in ("enabled", "adaptive") else {}
    if by_budget and type(budget) is int:
        out["thinkingBudget"] = min(max(budget, 512), GEMINI_BUDGETS["max"])
    elif effort:
        out.update({"thinkingBudget": GEMINI_BUDGETS[effort]} if by_budget else {"thinkingLevel": effort})
    return out


def gemini_contents(body: Json, to: Upstream) -> list[Json]:
    contents: list[Json] = translated(body, gemini_turn, to)
    groups = [(role, [*group]) for role, group in itertools.groupby(contents, lambda c: c["role"])]
    if len(groups) < len(contents):  # a turn between two of one role came to nothing
        contents = [{"role": role, "parts": [p for c in group for p in c["parts"]]} for role, group in groups]
    # It refuses a request without contents, and one that begins with a function call.
    if not contents or contents[0]["role"] != "user":
        contents = [{"role": "user", "parts": [{"text": "Begin."}]}, *contents]
    if contents[-1]["role"] == "model" and "prefill" in to.skip:
        contents = [*contents, {"role": "user", "parts": [{"text": "Continue."}]}]
    return contents


def gemini_turn(turn: Turn, calls: dict[str, Json], to: Upstream) -> list[Json]:
    """Function responses in the order of their calls, what moved out of them, then the rest of the turn."""
    if turn.role == "assistant":
        parts, role = gemini_assistant(turn.blocks, to), "model"
    else:
        results = results_of(turn.blocks)
        moved = [block for id in calls for block in result_parts(results.get(id))[1]]
        answers = [gemini_result(call, results.get(id), to) for id, call in calls.items()]
        parts, role = answers + parts_of([*moved, *turn.blocks], gemini_part, to), "user"
    return [{"role": role, "parts": parts}] if parts else []


def gemini_part(block: Json, to: Upstream) -> Json:
    """A user block as a part. Media are the only blocks it has a form of."""
    kind, source, url = block.get("type"), as_object(block.get("source")), media_url(block)
    if kind not in ("image", "document") or not url or (kind == "image" and not to.vision):
        return {"text": block_text(block)}
    mime = str(source.get("media_type") or ("image/png" if kind == "image" else "application/pdf"))
    if url.startswith("data:"):
        return {"inlineData": {"mimeType": mime, "data": url.partition("base64,")[2]}}
    return {"fileData": {"mimeType": mime, "fileUri": url}}


def gemini_result(call: Json, block: Json | None, to: Upstream) -> Json:
    id, name = id_and_name(call, to)
    text = result_parts(block)[0]
    failed = bool(block and block.get("is_error"))
    response = {"error": text.removeprefix("Error: ")} if failed else {"output": text}
    return {"functionResponse": {"id": id, "name": name, "response": response}}


def gemini_assistant(blocks: list[Json], to: Upstream) -> list[Json]:
    """An assistant turn, with what a search in it found. Of parallel calls only the first has a signature, and must have
    one.
    """
    kept = [p for p in own_payloads(blocks, to) if p.get("dialect") == "gemini"]
    signatures = {str(p.get("call")): p.get("signature") for p in kept}
    first = next(iter(calls_of(blocks)), "") if wants_signatures(to.model) else None
    parts: list[Json] = []
    for block in without_repeated_calls(blocks):
        if block.get("type") == "tool_use":
            id, name = id_and_name(block, to)
            client_id = str(block.get("id") or "")
            signature = signatures.get(client_id) or (NO_SIGNATURE if client_id == first else "")
            signed = {"thoughtSignature": str(signature)} if signature else {}
            call = {"id": id, "name": name, "args": as_object(block.get("input"))}
            parts.append({"functionCall": call, **signed})
        elif text := words_of(block):
            parts.append({"text": text})
        else:
            parts += [part for kept in own_payloads([block], to) for part in as_list(kept.get("parts"))]
    return parts


def gemini_usage(usage: Any) -> Usage | None:
    """usageMetadata as Anthropic counts: cached tokens apart, thoughts within the output."""
    given = as_object(usage)
    prompt = token_number(given.get("promptTokenCount"))
    parts = (
        given.get(f"{k}TokenCount") for k in ("toolUsePrompt", "cachedContent", "candidates", "thoughts")
    )
    counts = [0 if part is None else token_number(part) for part in parts]
    if prompt is None or None in counts:
        return None
    tools, cached, answer, thoughts = (n or 0 for n in counts)
    prompt += tools
    rest = prompt - cached if cached <= prompt else prompt
    return Usage(input=rest, output=answer + thoughts, cache_read=cached)


GEMINI_STOP = {
    "STOP": "end_turn", "MAX_TOKENS": "max_tokens", "CONTINUATION": "max_tokens",
    **dict.fromkeys((
        "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "MODEL_ARMOR", "ESCALATION",
    ), "refusal"),
}  # fmt: skip
GEMINI_FAULTS = {  # no answer came; of a 502 another try may make one
    "MALFORMED_FUNCTION_CALL": 502, "MALFORMED_RESPONSE": 502, "UNEXPECTED_TOOL_CALL": 502, "OTHER": 502,
    "TOO_MANY_TOOL_CALLS": 502, "MISSING_THOUGHT_SIGNATURE": 400, "PUP_LIMITED_DISABLED": 403,
}  # fmt: skip


class GeminiStream:
    """GenerateContent chunks -> Anthropic events. `names` maps upstream tool names back to the client's."""

    def __init__(self, out: AnthropicStream, names: dict[str, str], to: Upstream) -> None:
        self.out, self.names, self.to = out, names, to
        self.usage: Usage | None = None
        self.stop_reason = ""
        self.calls = 0
        self.queries: list[str] = []
        self.cited: dict[str, str] = {}  # URL -> title

    def feed(self, name: str, data: str) -> None:
        """One chunk. Raises ApiError for an error it tells of, or for data that is not JSON."""
        if self.out.ended or data == "[DONE]":
            return
        chunk = parsed(data)
        if isinstance(chunk, list) and len(chunk) == 1:
            chunk = chunk[0]
        if not isinstance(chunk, dict):
            raise not_a_stream(data, "Gemini stream")
        if chunk.get("error") or name == "error":
            raise error_of_event(chunk)
        self.usage = gemini_usage(chunk.get("usageMetadata")) or self.usage
        for candidate in as_list(chunk.get("candidates"))[:1]:
            self.candidate(as_object(candidate))
        if reason := as_object(chunk.get("promptFeedback")).get("blockReason"):
            self.stopped(str(reason), "refusal", as_object(chunk["promptFeedback"]).get("blockReasonMessage"))

    def candidate(self, candidate: Json) -> None:
        for part in as_list(as_object(candidate.get("content")).get("parts")):
            if isinstance(part, dict):
                self.part(part)
        grounding = as_object(candidate.get("groundingMetadata"))
        for chunk in as_list(grounding.get("groundingChunks")):
            page = as_object(as_object(chunk).get("web"))
            if page.get("uri"):
                self.cited[str(page["uri"])] = str(page.get("title") or "")
        queries = [q for q in as_list(grounding.get("webSearchQueries")) if isinstance(q, str)]
        self.queries = queries or self.queries
        if reason := str(candidate.get("finishReason") or ""):
            self.stopped(reason, GEMINI_STOP.get(reason, "end_turn"), candidate.get("finishMessage"))

    def stopped(self, reason: str, stop: str, message: Any) -> None:
        """Notes how the answer ended. A refusal without words of its own gets the provider's."""
        words = f"{reason}: {message}" if message else reason
        status = GEMINI_FAULTS.get(reason)
        if status and stop != "refusal":  # OTHER is also why a prompt is blocked, each time it comes
            error = f"the provider ended the answer with {words}"
            raise ApiError(status, error, retry=retry_class(status), cause="stream")
        self.stop_reason = stop
        if stop == "refusal" and not self.out.has_content:
            self.out.text(f"The provider refused ({words}).")

    def part(self, part: Json) -> None:
        call, text = part.get("functionCall"), part.get("text")
        if isinstance(text, str):
            self.out.thinking(text) if part.get("thought") else self.out.text(text)
        if isinstance(call, dict):
            self.call(call, part.get("thoughtSignature"))
        if "toolCall" in part or "toolResponse" in part:
            # A search beside functions: it is to come back as it is.
            parts = [*self.out.signature.get("parts", ()), part]
            self.out.keep({"dialect": "gemini", "model": self.to.model, "parts": parts})

    def call(self, call: Json, signature: Any) -> None:
        name = str(call.get("name") or "")
        id = call_id(name, str(call.get("id") or ""), self.out, self.calls)
        self.calls += 1
        if isinstance(signature, str) and signature:
            kept = {"dialect": "gemini", "model": self.to.model, "call": id, "signature": signature}
            self.out.keep(kept)
        self.out.tool(id, self.names.get(name, name))
        end_call(self.out, name, [argument_text(call.get("args") or {})])

    def finish(self) -> None:
        """The end of the bytes, which is how this format ends; an error where no finishReason came before."""
        if self.out.ended:
            return
        if not self.stop_reason:
            raise broken_stream()
        if self.cited or self.queries:
            show_search(self.out, "; ".join(self.queries), self.cited)
        end_answer(self.out, self.stop_reason, self.usage, self.cited)


# ----------------------------------------------------------------------------------------------------------
# OpenAI-format clients (pure)
# ----------------------------------------------------------------------------------------------------------
# The other direction: a Chat Completions request becomes a Messages request, which any provider can serve,
# and the Anthropic events of the answer become Chat Completions chunks.

# The Messages API needs a limit, and most clients of OpenAI's set none: Claude Code's own, and a lower one where the
# most that a model can make is not known.
CHAT_MAX_TOKENS, CHAT_MAX_UNKNOWN = 32000, 16384


def chat_request(body: Json) -> tuple[Json, ApiError | None]:
    """A Chat Completions request as a Messages request, and the error where that cannot say all of it.

    Then it is only to route and count by: an upstream of the client's own format may serve what the client sent.
    """
    try:
        return messages_request(body), None
    except ApiError as error:
        if not isinstance(body.get("messages"), list):
            raise
        messages = [servable(message) for message in messages_of(body)]
        tools = [tool for tool in as_list(body.get("tools")) if not is_openais(tool)]
        told = {"n": 1, "modalities": ["text"], "messages": messages, "tools": tools}
        return messages_request({**body, **told}), error


def servable(message: Json) -> Json:
    """A message without the content parts that have no form in the Messages API."""
    kept = []
    for part in blocks_of(message.get("content")):
        with contextlib.suppress(ApiError):
            chat_block(part)
            kept.append(part)
    return {**message, "content": kept}


def messages_request(body: Json) -> Json:
    """A Chat Completions request as a Messages request; ApiError 400 for what has no form there."""
    if not isinstance(body.get("messages"), list):
        raise ApiError(400, "messages: a list of messages is needed")
    if body.get("n") not in (None, 1):
        raise ApiError(400, "n: only one choice can be made; leave it out or set it to 1")
    if "audio" in as_list(body.get("modalities")):
        raise ApiError(400, "modalities: only text can be made; leave it out or set it to ['text']")
    system, messages = chat_conversation(messages_of(body))
    limits = map(body.get, ("max_completion_tokens", "max_tokens"))
    limit = next((n for n in limits if n and n != -1), None)  # -1: llama.cpp's and LM Studio's "no limit"
    if as_object(body.get("response_format")).get("type") == "json_object":
        system.append({"type": "text", "text": "Answer with one JSON object and nothing else."})
    stop = body.get("stop")
    stops = [s for s in (stop if isinstance(stop, list) else [stop]) if s]
    user = body.get("safety_identifier") or body.get("user")
    optional = {
        "max_tokens": limit,
        "system": system or None,
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "stop_sequences": stops or None,
        "metadata": {"user_id": opaque_id(user)} if user else None,
        **messages_thinking(body),
        **messages_tools(body),
        **cache_mark(body),
    }
    out = {"model": body.get("model"), "messages": messages, "stream": body.get("stream") is True}
    return out | {k: v for k, v in optional.items() if v is not None}


# https://platform.claude.com/docs/en/build-with-claude/effort: the others take it.
_WITHOUT_EFFORT = r"claude-(?:3|haiku-4|sonnet-4[-.]5|(?:sonnet|opus)-4(?:[-.][01]\b|-20))"


def fitting_request(body: Json, to: Upstream) -> Json:
    """What `messages_request` made, without what this very model of an Anthropic-format upstream is known to refuse."""
    if not to.facts.thinking_off:
        body = thinking_by_effort(body)
    dropped = set(to.skip)
    if not to.facts.sampling:
        dropped |= {"temperature", "top_p"}
    elif "claude" in to.model and "temperature" in body:
        dropped.add("top_p")  # Claude 4.5 and 4.6 refuse the two together
    out = {k: v for k, v in body.items() if k not in dropped}
    if isinstance(heat := out.get("temperature"), (int, float)):
        out["temperature"] = min(heat, 1)  # OpenAI's and Gemini's go to 2
    if stops := out.get("stop_sequences"):  # one of blanks alone is a 400
        out["stop_sequences"] = [s for s in stops if str(s).strip()]
    if "max_tokens" not in body:
        budget = as_object(body.get("thinking")).get("budget_tokens")  # the thinking must fit in
        room = CHAT_MAX_TOKENS if to.facts.max_output else CHAT_MAX_UNKNOWN
        out["max_tokens"] = room + (budget if isinstance(budget, int) else 0)
    if limit := output_limit(out, to.facts):
        out["max_tokens"] = limit
    if config := as_object(out.get("output_config")):
        out["output_config"] = claude_config(config, to)
    choice = as_object(out.get("tool_choice"))
    if choice.get("type") in ("any", "tool") and not (to.quirks.forced_tool and to.facts.forced_tool):
        out["tool_choice"] = {k: v for k, v in choice.items() if k != "name"} | {"type": "auto"}
    return out


def thinking_by_effort(body: Json) -> Json:
    """The request with an effort for a thinking that has a budget, and the lowest for one that is turned off."""
    if as_object(body.get("thinking")).get("type") not in ("disabled", "enabled"):
        return body
    config = {**as_object(body.get("output_config")), "effort": wanted_effort(body, EFFORTS) or "low"}
    return {**{k: v for k, v in body.items() if k != "thinking"}, "output_config": config}


def claude_config(config: Json, to: Upstream) -> Json:
    """An output_config with the efforts, and in the subset of JSON schema, that Claude takes."""
    takes_effort = not re.search(_WITHOUT_EFFORT, to.model) and "output_config.effort" not in to.skip
    out = {k: v for k, v in config.items() if k != "effort" or takes_effort}
    if out.get("effort") == "minimal":
        out["effort"] = "low"
    if "format" in out:
        out["format"] = {"type": "json_schema", "schema": claude_schema(out["format"]["schema"])}
    return out


def opaque_id(user: Any) -> str:
    """A user's id as it is, but for what Anthropic may take for a mail address or a telephone number: a 400."""
    text = str(user)
    is_plain = re.fullmatch(r"[A-Za-z_][\w-]{0,255}", text, re.ASCII)
    return text if is_plain else digest_of(text)


def messages_thinking(body: Json) -> Json:
    """reasoning_effort and a schema as output_config; `thinking` as some clients send it to Claude models."""
    effort = body.get("reasoning_effort")
    given = as_object(as_object(body.get("response_format")).get("json_schema"))
    config: Json = {"effort": effort} if effort in EFFORTS else {}
    if isinstance(schema := given.get("schema"), dict):
        strict = {"strict": True} if given.get("strict") is True else {}
        config["format"] = {"type": "json_schema", "schema": schema, **strict}
    thinking = {"type": "disabled"} if effort == "none" else body.get("thinking")
    return {"output_config": config or None, "thinking": thinking}


CLAUDE_SCHEMA_KEYS = {"$ref", "type", "enum", "const", "title", "description", "required"}
CLAUDE_VALUES: dict[str, Sequence[Any]] = {
    "format": ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"),
    "minItems": (0, 1),
}


def claude_schema(schema: Any, depth: int = 0) -> Json:
    """A JSON schema in the subset that Claude's structured output takes, as Anthropic's own client makes it: closed
    objects, and in words what has no keyword there.

    https://platform.claude.com/docs/en/build-with-claude/structured-outputs
    """
    if depth > 50:
        raise ApiError(400, "response_format: the schema is nested too deeply")
    given, inner = as_object(schema), functools.partial(claude_schema, depth=depth + 1)
    told = {k: v for k, v in given.items() if k in CLAUDE_SCHEMA_KEYS}
    out = {k: v for k, v in told.items() if k != "type" or not {"enum", "const"} & told.keys()}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(given.get(key), list):
            out["allOf" if key == "allOf" else "anyOf"] = [inner(s) for s in given[key]]
    for key in ("$defs", "definitions", "properties"):
        if isinstance(given.get(key), dict):
            out[key] = {name: inner(s) for name, s in given[key].items()}
    if "items" in given:
        out["items"] = inner(given["items"])
    if given.get("type") == "object":
        out |= {"properties": out.get("properties", {}), "additionalProperties": False}
    out |= {k: given[k] for k, known in CLAUDE_VALUES.items() if given.get(k) in known}
    unsaid = given.keys() - {*out, *told, "oneOf", "additionalProperties"}
    if words := ", ".join(f"{k}: {v}" for k, v in given.items() if k in unsaid):
        out["description"] = f"{given.get('description') or ''}\n\n{{{words}}}".strip()
    return out


def has_anthropic_tools(body: Json) -> bool:
    return any(is_anthropic_tool(as_object(tool)) for tool in as_list(body.get("tools")))


def is_anthropic_tool(tool: Json) -> bool:
    """Whether a tool is in Anthropic's form, where a web search has a name beside its type."""
    return "input_schema" in tool or (is_web_search(tool) and "name" in tool)


def is_old_form(body: Json) -> bool:
    """Whether a client asks with `functions`: it looks for a function_call in the answer, of which there is one."""
    return bool(body.get("functions")) and not body.get("tools")


def messages_tools(body: Json) -> Json:
    """Functions in today's form, the old one and Anthropic's own (Cursor's, where the model's name has "claude" in it),
    web search, and the choice among them.
    """
    old = [{"function": f} for f in as_list(body.get("functions"))]
    given_tools = map(as_object, (*as_list(body.get("tools")), *old))
    tools = [tool for tool in map(messages_tool, given_tools) if tool]
    if isinstance(body.get("web_search_options"), dict):
        tools.append({"type": "web_search_20250305", "name": "web_search"})
    given = body.get("tool_choice") or body.get("function_call") or ""
    if allowed := as_object(as_object(given).get("allowed_tools")):
        names = [as_object(as_object(t).get("function")).get("name") for t in as_list(allowed.get("tools"))]
        tools, given = [t for t in tools if t["name"] in names], allowed.get("mode")
    named = as_object(given)
    name = (as_object(named.get("function")) or named).get("name")
    kind = str(named.get("type") if named else given)
    choice: Json = {"type": "tool", "name": str(name)} if name else {"type": CHAT_CHOICES.get(kind, "auto")}
    is_single = body.get("parallel_tool_calls") is False or is_old_form(body)
    if is_single and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": choice if choice != {"type": "auto"} else None} if tools else {}


def messages_tool(tool: Json) -> Json:
    """One tool, {} where it has no name; ApiError 400 for one that has no form in the Messages API."""
    if is_openais(tool):
        kind = str(tool.get("type"))[:40]
        raise ApiError(400, f"tools: one of type {kind!r} cannot be served; describe it as a function")
    if is_web_search(tool) and "name" in tool:
        return tool
    is_flat = tool.get("type") == "function" or "input_schema" in tool
    function = as_object(tool.get("function")) or (tool if is_flat else {})
    if not function.get("name"):
        return {}
    described = {"description": d} if (d := function.get("description")) else {}
    schema = function.get("parameters") or function.get("input_schema")
    schema = {"type": "object", "properties": {}, **as_object(schema)}
    return {"name": str(function["name"]), **described, "input_schema": schema, **cache_mark(tool)}


def is_openais(tool: Any) -> bool:
    """Whether a tool has no form in the Messages API: its input is free text, or the provider runs it. Cursor's custom ones
    have a flat form, and are left out: they are for its own models.
    """
    given = as_object(tool)
    is_ours = "function" in given or is_anthropic_tool(given)
    return "custom" in given or not (is_ours or given.get("type") in (None, "", "function", "custom"))


CHAT_CHOICES = {"required": "any", "any": "any", "none": "none"}


def chat_conversation(given: list[Json]) -> tuple[list[Json], list[Json]]:
    """(system blocks, messages). What the system says later is a reminder; neighbours of a role merge."""
    system: list[Json] = []
    messages: list[Json] = []
    calls = 0  # in the old form, which has only names: an id must not come twice
    for message in given:
        calls += bool(message.get("function_call"))
        blocks = chat_turn(message, calls)
        if message.get("role") in ("system", "developer"):
            if not messages:
                system += blocks
                continue
            blocks = [{"type": "text", "text": reminder(text_of(blocks))}] if blocks else []
        role = "assistant" if message.get("role") == "assistant" else "user"
        if blocks and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": role, "content": blocks})
    for turn in messages:
        turn["content"].sort(key=lambda b: b["type"] != "tool_result")  # stable; they must stand first
    if given and (not messages or messages[0]["role"] == "assistant"):  # it must begin with the user
        messages.insert(0, {"role": "user", "content": [{"type": "text", "text": "Begin."}]})
    if messages and messages[-1]["role"] == "assistant":  # and, from Claude 4.6 on, end with the user
        messages.append({"role": "user", "content": [{"type": "text", "text": "Continue."}]})
    return system, messages


def chat_turn(message: Json, calls: int) -> list[Json]:
    """A message's blocks; `calls` counts those of the old form so far."""
    role, blocks, mark = str(message.get("role")), chat_blocks(message.get("content")), cache_mark(message)
    if role in ("tool", "function"):
        id = client_tool_id(str(message.get("tool_call_id") or f"{message.get('name')}_{calls}"))
        return [{"type": "tool_result", "tool_use_id": id, "content": blocks, **mark}]
    if role in ("system", "developer", "assistant"):
        blocks = [b for b in blocks if b["type"] in ("text", "tool_use")]
    if role == "assistant":
        blocks += [*chat_blocks(message.get("refusal")), *chat_calls(message, calls)]
        thought = message.get("reasoning_content") or message.get("reasoning")
        if thought and isinstance(thought, str) and blocks:
            # Unsigned, so that Claude gets none of it; DeepSeek and Kimi refuse a call without.
            blocks.insert(0, {"type": "thinking", "thinking": thought, "signature": ""})
    return [*blocks[:-1], {**blocks[-1], **mark}] if blocks else []


def chat_calls(message: Json, number: int) -> list[Json]:
    """An assistant message's tool calls, one of the old form by its number.

    Arguments that are no JSON object survive as text.
    """
    calls = [c for c in as_list(message.get("tool_calls")) if isinstance(c, dict)]
    if legacy := as_object(message.get("function_call")):
        calls.append({"id": f"{legacy.get('name')}_{number}", "function": legacy})
    blocks = []
    for call in calls:
        function = as_object(call.get("function")) or as_object(call.get("custom"))
        text = function.get("arguments") or function.get("input") or "{}"
        value = parsed(text) if isinstance(text, str) else text
        id, name = client_tool_id(str(call.get("id") or "")), str(function.get("name") or "")
        given = value if isinstance(value, dict) else {"arguments": text}
        blocks.append({"type": "tool_use", "id": id, "name": name, "input": given})
    return blocks


_DATA_URL = r"(?s)data:([\w.+/-]+)(?:;[^;,]*)*;base64,(.*)"


def cache_mark(given: Json) -> Json:
    """The cache_control that clients set for Claude models in OpenAI's format, too."""
    return {"cache_control": mark} if isinstance(mark := given.get("cache_control"), dict) else {}


def chat_blocks(content: Any) -> list[Json]:
    """Content parts, among them blocks of Anthropic's own (Cursor's), as blocks; ApiError 400 for audio and the like.

    Blank texts are left out, as Anthropic refuses them.
    """
    blocks = [{**chat_block(part), **cache_mark(part)} for part in blocks_of(content)]
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def chat_block(part: Json) -> Json:
    kind = str(part.get("type"))
    if kind == "tool_result":
        return {**part, "content": chat_blocks(part.get("content"))}
    if kind == "tool_use" or (kind in ("image", "document") and isinstance(part.get("source"), dict)):
        return part
    if kind in ("thinking", "redacted_thinking"):  # no longer what Claude signed, if it was
        return {"type": "text", "text": ""}
    if kind in ("text", "refusal", "input_text", "output_text"):
        return {"type": "text", "text": str(part.get("text") or part.get("refusal") or "")}
    if kind not in ("image_url", "file"):
        raise ApiError(400, f"messages: content parts of type {kind[:40]!r} cannot be served")
    given = as_object(part.get(kind)) or {"url": part.get(kind)}
    url = str(given.get("url") or given.get("file_data") or "")
    source: Json = {"type": "url", "url": url}
    if data := re.fullmatch(_DATA_URL, url):
        source = data_source(data[1], data[2])
    elif not url.startswith(("http://", "https://")):
        raise ApiError(400, f"messages: {kind} needs a base64 data: URL or an http(s) URL")
    if kind == "image_url":
        return {"type": "image", "source": source}
    named = {"title": str(given["filename"])} if given.get("filename") else {}
    return {"type": "document", "source": source, **named}


def data_source(kind: str, data: str) -> Json:
    """Base64 data as a source; texts go as texts, the only form there is of them."""
    if not kind.startswith("text/"):
        return {"type": "base64", "media_type": kind.replace("image/jpg", "image/jpeg"), "data": data}
    try:
        text = base64.b64decode(data).decode("utf-8", "replace")
    except ValueError:
        raise ApiError(400, "messages: the data: URL of a file is not base64") from None
    return {"type": "text", "media_type": "text/plain", "data": text}


CHAT_FINISH = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
    "refusal": "content_filter", "model_context_window_exceeded": "length",
}  # fmt: skip


def chat_finish(message: Json, old_form: bool) -> str:
    reason = CHAT_FINISH.get(message["stop_reason"], "stop")
    return "function_call" if old_form and reason == "tool_calls" else reason


def chat_usage(usage: Json) -> Json:
    """Usage of the Messages API as OpenAI counts it: cached tokens and those of a cache write within the prompt."""
    cached, written = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
    prompt, output = usage["input_tokens"] + cached + written, usage["output_tokens"]
    details = {"cached_tokens": cached, "cache_write_tokens": written}
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return {**counts, "prompt_tokens_details": details}


def chat_id(message: Json) -> str:
    return f"chatcmpl-{str(message['id']).removeprefix('msg_')}"


class ChatWriter:
    """The events of an `AnthropicStream` as Chat Completions chunks. `created`: seconds since 1970."""

    def __init__(self, model: str, created: int, include_usage: bool = False, old_form: bool = False) -> None:
        self.head: Json = {"id": "", "object": "chat.completion.chunk", "created": created, "model": model}
        self.include_usage, self.old_form = include_usage, old_form
        self.usage: Json = {}
        self.calls = -1  # index of the newest tool call
        self.in_call = self.has_arguments = False

    def feed(self, events: list[Json]) -> bytes:
        return b"".join(map(self.chunk, events))

    def end(self, events: list[Json]) -> bytes:
        """The last events, with usage where it was asked for, and the mark that ends an OpenAI stream."""
        last = self.feed(events)
        if self.include_usage:
            last += self.encode([], usage=chat_usage(self.usage))
        return last + b"data: [DONE]\n\n"

    def encode(self, choices: list[Json], **more: Json) -> bytes:
        return b"data: %s\n\n" % compact({**self.head, "choices": choices, **more})

    def chunk(self, event: Json) -> bytes:
        """What an event adds to the message; b"" for an event that OpenAI's format has no form of."""
        kind, block = event["type"], event.get("content_block", {})
        delta: Json = {}
        reason = None
        if kind == "content_block_delta":
            delta = self.piece(event["delta"])
        elif kind == "message_start":
            self.head["id"] = chat_id(event["message"])
            delta = {"role": "assistant", "content": ""}
        elif kind == "content_block_start" and block["type"] == "tool_use":
            self.calls += 1
            self.in_call, self.has_arguments = True, False
            delta = self.call({"name": block["name"], "arguments": ""}, id=block["id"], type="function")
        elif kind == "content_block_stop":
            is_bare, self.in_call = self.in_call and not self.has_arguments, False
            delta = self.call({"arguments": "{}"}) if is_bare else {}
        elif kind == "message_delta":
            self.usage, reason = event["usage"], chat_finish(event["delta"], self.old_form)
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return self.encode([choice]) if delta or reason else b""

    def piece(self, delta: Json) -> Json:
        if delta["type"] == "text_delta":
            return {"content": delta["text"]}
        if delta["type"] == "thinking_delta":
            return {"reasoning_content": delta["thinking"]}
        if delta["type"] == "input_json_delta" and self.in_call:
            self.has_arguments = True
            return self.call({"arguments": delta["partial_json"]})
        return {}

    def call(self, function: Json, **more: str) -> Json:
        if self.old_form:
            return {} if self.calls else {"function_call": function}
        return {"tool_calls": [{"index": self.calls, **more, "function": function}]}


def chat_completion(answer: Json, model: str, created: int, old_form: bool = False) -> Json:
    """A whole message as a chat.completion, for a client that does not stream."""
    message = chat_message(answer["content"])
    if old_form and (calls := message.pop("tool_calls", None)):
        message["function_call"] = calls[0]["function"]
    reason = chat_finish(answer, old_form)
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    head = {"id": chat_id(answer), "object": "chat.completion", "created": created, "model": model}
    return {**head, "choices": [choice], "usage": chat_usage(answer["usage"])}


def chat_message(blocks: list[Json]) -> Json:
    """An answer's blocks as OpenAI's assistant message."""
    text = "".join(b["text"] for b in blocks if b["type"] == "text")
    thinking = "".join(b["thinking"] for b in blocks if b["type"] == "thinking")
    calls = [whole_call(b) for b in blocks if b["type"] == "tool_use"]
    optional = {"reasoning_content": thinking, "tool_calls": calls}
    out = {"role": "assistant", "content": text or None, "refusal": None}
    return out | {key: value for key, value in optional.items() if value}


def whole_call(block: Json) -> Json:
    given = block["input"]  # a text where it was cut off
    function = {"name": block["name"], "arguments": given if isinstance(given, str) else readable(given)}
    return {"id": block["id"], "type": "function", "function": function}


CHAT_CODES = {
    401: "invalid_api_key", 402: "insufficient_quota", 404: "model_not_found", 429: "rate_limit_exceeded",
}  # fmt: skip


def chat_error(error: ApiError, request_id: str) -> Json:
    """An error in OpenAI's shape, with the codes its clients look for."""
    # A max_tokens above the model's is an overflow, too, but no conversation to be cut down.
    is_too_long = error.cause == "overflow" and error.retry is Retry.LARGER
    status = 402 if error.type == "billing_error" else error.status
    code = "context_length_exceeded" if is_too_long else CHAT_CODES.get(status)
    detail = {"message": error.message, "type": error.type, "param": error.param or None, "code": code}
    return {"error": detail, "request_id": request_id}


# ----------------------------------------------------------------------------------------------------------
# Dialects and presets (tables)
# ----------------------------------------------------------------------------------------------------------
# All that differs between wire formats is a row of DIALECTS; all that differs between vendors is a row of
# PRESETS.


class DialectStream(typing.Protocol):
    """What reads an upstream's events; see `OpenAIStream`."""

    usage: Usage | None

    def feed(self, name: str, data: str) -> None: ...
    def finish(self) -> None: ...


class AnthropicEvents:
    """Anthropic events read as a dialect like the others, for clients that speak another format."""

    def __init__(self, out: AnthropicStream, names: dict[str, str], to: Upstream) -> None:
        self.out = out
        self.usage: Usage | None = None
        self.output_told = False  # message_start's own figure is that of a beginning
        self.stop: Json = {}  # what message_delta says
        self.call: Json = {}  # the call that is open
        self.pieces: list[str] = []  # of its input
        self.is_partial = False  # the last block is a call without a whole input

    def feed(self, name: str, data: str) -> None:
        try:
            event = event_json(data)
            kind = event["type"]
        except (ValueError, RecursionError, KeyError, TypeError):
            raise not_a_stream(data, "Anthropic stream") from None
        if kind == "error":
            raise error_of_event(event)
        if self.out.ended:
            return
        message, delta = as_object(event.get("message")), as_object(event.get("delta"))
        self.note_usage(kind, event.get("usage") or message.get("usage"))
        if kind == "message_start":
            self.out.message_id = str(message.get("id") or self.out.message_id)
            self.out.model = str(message.get("model") or self.out.model)
            self.out.start()
        elif kind == "content_block_start":
            self.begin(as_object(event.get("content_block")))
        elif kind == "content_block_delta":
            self.piece(delta)
        elif kind == "content_block_stop":
            self.end_block()
        elif kind == "message_delta":
            self.stop |= {k: v for k, v in delta.items() if v is not None}
        elif kind == "message_stop":
            reason = str(self.stop.get("stop_reason") or "end_turn")
            self.out.cut_off = self.is_partial and reason == "max_tokens"
            self.out.finish(reason, self.stop.get("stop_sequence"))

    def note_usage(self, kind: str, given: Any) -> None:
        self.usage = anthropic_usage(given, self.usage)
        self.output_told |= kind == "message_delta" and as_object(given).get("output_tokens") is not None
        if self.usage and kind == "message_stop" and not (self.output_told and self.usage.prompt):
            self.usage = dataclasses.replace(self.usage, estimated=True)
        self.out.usage = self.usage or self.out.usage

    def begin(self, block: Json) -> None:
        """A block; one of a kind that other formats have no form of is left out, with its deltas."""
        self.end_block()
        if block.get("type") == "tool_use":
            self.call = block
            self.out.tool(str(block.get("id") or ""), str(block.get("name") or ""))
        self.piece({"text": block.get("text"), "thinking": block.get("thinking")})

    def piece(self, delta: Json) -> None:
        for key, write in (("text", self.out.text), ("thinking", self.out.thinking)):
            if isinstance(delta.get(key), str):
                write(delta[key])
        if self.call and isinstance(delta.get("partial_json"), str):
            self.pieces.append(delta["partial_json"])
            self.out.tool_input(delta["partial_json"])

    def end_block(self) -> None:
        if self.call and not "".join(self.pieces) and self.call.get("input"):
            self.piece({"partial_json": tool_arguments(self.call)})
        self.is_partial = bool(self.call) and not whole_arguments(self.pieces)
        self.call, self.pieces = {}, []
        self.out.close()

    def finish(self) -> None:
        if not self.out.ended:
            raise broken_stream()


@dataclass(frozen=True, slots=True)
class Dialect:
    """A wire format: where requests go, what they are made by, what reads the answer."""

    endpoint: str  # follows the base URL; {model} is filled in
    stream: Callable[[AnthropicStream, dict[str, str], Upstream], DialectStream]
    request: Callable[[Json, Upstream], Json] | None = None  # None: the client's own bytes are forwarded
    auth: str = "bearer"
    headers: tuple[tuple[str, str], ...] = ()
    version: str = "/v1"  # what a bare host is followed by
    is_local: bool = False  # answered in this process
    passes: str = ""  # the client format whose answers are relayed as they come
    searches_alone: Callable[[Upstream], bool] | None = None  # as the function of that name; None: none does


DIALECTS: dict[str, Dialect] = {
    "anthropic": Dialect(
        "/messages", AnthropicEvents, passes="anthropic", auth="x-api-key",
        headers=(("anthropic-version", "2023-06-01"),),
    ),
    "openai": Dialect("/chat/completions", OpenAIStream, openai_request, passes="chat"),
    "responses": Dialect("/responses", ResponsesStream, responses_request),
    "gemini": Dialect(
        "/models/{model}:streamGenerateContent?alt=sse", GeminiStream, gemini_request, auth="x-goog-api-key",
        version="/v1beta", searches_alone=searches_alone,
    ),
    "demo": Dialect("", AnthropicEvents, auth="none", is_local=True),
}  # fmt: skip

# Base URLs, key variables and quirks from the vendors' documentation and the projects' own code, November
# 2026; the last column is the model of a start without a config. A preset is a provider table whose `type` is
# a wire format.
PRESET_ROWS = """
anthropic            anthropic https://api.anthropic.com                                 ANTHROPIC_API_KEY   claude-sonnet-5-5
openai               openai    https://api.openai.com/v1                                 OPENAI_API_KEY      gpt-6.1-terra
openrouter           openai    https://openrouter.ai/api/v1                              OPENROUTER_API_KEY  z-ai/glm-5.3
openrouter-anthropic anthropic https://openrouter.ai/api                                 OPENROUTER_API_KEY  z-ai/glm-5.3
zai                  anthropic https://api.z.ai/api/anthropic                            ZAI_API_KEY         glm-5.3
zai-openai           openai    https://api.z.ai/api/paas/v4                              ZAI_API_KEY         glm-5.3
moonshot             anthropic https://api.moonshot.ai/anthropic                         MOONSHOT_API_KEY    kimi-k3
moonshot-openai      openai    https://api.moonshot.ai/v1                                MOONSHOT_API_KEY    kimi-k3
kimi-coding          anthropic https://api.kimi.com/coding                               KIMI_API_KEY        kimi-for-coding
deepseek             anthropic https://api.deepseek.com/anthropic                        DEEPSEEK_API_KEY    deepseek-v4-pro
deepseek-openai      openai    https://api.deepseek.com/v1                               DEEPSEEK_API_KEY    deepseek-v4-pro
minimax              anthropic https://api.minimax.io/anthropic                          MINIMAX_API_KEY     MiniMax-M3
qwen                 anthropic https://dashscope-intl.aliyuncs.com/apps/anthropic        DASHSCOPE_API_KEY   qwen3-coder-plus
qwen-openai          openai    https://dashscope-intl.aliyuncs.com/compatible-mode/v1    DASHSCOPE_API_KEY   qwen3-coder-plus
gemini               gemini    https://generativelanguage.googleapis.com/v1beta          GEMINI_API_KEY      gemini-3.8-flash
gemini-openai        openai    https://generativelanguage.googleapis.com/v1beta/openai   GEMINI_API_KEY      gemini-3.8-flash
groq                 openai    https://api.groq.com/openai/v1                            GROQ_API_KEY        openai/gpt-oss-120b
together             openai    https://api.together.xyz/v1                               TOGETHER_API_KEY    zai-org/GLM-5.3
fireworks            openai    https://api.fireworks.ai/inference/v1 FIREWORKS_API_KEY accounts/fireworks/models/glm-5p3
deepinfra            openai    https://api.deepinfra.com/v1/openai                       DEEPINFRA_API_KEY   zai-org/GLM-5.3
cerebras             openai    https://api.cerebras.ai/v1                                CEREBRAS_API_KEY    gpt-oss-120b
mistral              openai    https://api.mistral.ai/v1                                 MISTRAL_API_KEY     devstral-medium-latest
xai                  openai    https://api.x.ai/v1                                       XAI_API_KEY         grok-4.7
nvidia               openai    https://integrate.api.nvidia.com/v1                       NVIDIA_API_KEY      z-ai/glm-5.3
github               openai    https://models.github.ai/inference                        GITHUB_TOKEN        openai/gpt-4.1
zenmux               anthropic https://zenmux.ai/api/anthropic                           ZENMUX_API_KEY      z-ai/glm-5.3
nebius               openai    https://api.studio.nebius.ai/v1                           NEBIUS_API_KEY      zai-org/GLM-5.3
novita               openai    https://api.novita.ai/v3/openai                           NOVITA_API_KEY      zai-org/glm-5.3
baseten              openai    https://inference.baseten.co/v1                           BASETEN_API_KEY     zai-org/GLM-5.3
ollama               openai    http://localhost:11434                                    -                   -
lmstudio             anthropic http://localhost:1234                                     {LM_API_TOKEN:-}    -
llamacpp             anthropic http://localhost:8080                                     -                   -
vllm                 anthropic http://localhost:8000                                     {VLLM_API_KEY:-}    -
litellm              anthropic http://localhost:4000                                     LITELLM_API_KEY     -
demo                 demo      -                                                         -                   demo
"""
EFFORTS_3 = ["low", "medium", "high"]
FOREIGN = {"drop": ["billing_header"]}  # it changes with each prompt and spoils prompt caches
PRESET_QUIRKS: dict[str, Json] = {
    "openai": {
        "effort": [*EFFORTS], "prompt_cache_key": True, "files": True, "web_search": "responses", "codex": "codex",
    },
    "openrouter": {
        "cache_control": "claude|gemini|qwen", "reasoning_key": "reasoning_details", "effort": [*EFFORTS],
        "files": True, "web_search": "plugin", "transient": "Provider returned error",
    },
    "openrouter-anthropic": {"auth": "bearer"},
    # GLM-5.3 always thinks, and at its most where it is not told how much.
    "zai-openai": {"reasoning_replay": "tool_turns", "effort": ["low", "high", "max"]},
    "moonshot-openai": {"reasoning_replay": "tool_turns", "effort": ["low", "high", "max"]},
    **dict.fromkeys(("zai", "minimax", "qwen", "zenmux", "lmstudio", "vllm"), FOREIGN),
    "llamacpp": {"drop": ["billing_header", "files"]},  # it passes documents over without a word
    # K3 takes these efforts alone, in either format (github.com/anomalyco/models.dev/pull/3310).
    "moonshot": {"effort": ["low", "high", "max"], **FOREIGN},
    "kimi-coding": {"count_tokens": "upstream", "effort": ["low", "high", "max"], **FOREIGN},
    # https://api-docs.deepseek.com/guides/vision: since V4.1 Flash takes images, in each format.
    "deepseek": {"drop": ["billing_header", "tool_type", "media"], "vision_models": "flash"},
    "deepseek-openai": {"reasoning_replay": "tool_turns", "vision": False, "vision_models": "flash"},
    "gemini-openai": {"schema": "gemini", "effort": EFFORTS_3, "reasoning_key": "extra_content"},
    "groq": {"effort": EFFORTS_3},
    "deepinfra": {"forced_tool": False},
    # Ollama's own /v1/messages (0.14 to 0.31, at least) opens a second block under the index of an open one, which
    # Claude Code takes for a broken answer, and loses a result's images, is_error and order, and documents.
    "ollama": {"effort": EFFORTS_3, "reasoning_replay": "all", "reasoning_key": "reasoning"},
    "cerebras": {"lax_finish": True, "effort": EFFORTS_3},
    "mistral": {"tool_id": "[A-Za-z0-9]{9}", "user_after_tool": False},
    "xai": {"effort": EFFORTS_3, "web_search": "responses"},  # efforts: grok-4.3 and later; the others say no
    "litellm": {"auth": "bearer"},
}  # fmt: skip
PRESET_KEYS: dict[str, Json] = {  # what a row sets beside quirks; a local server loads its model first
    # Elsewhere the type may mean a relay to OpenAI's models, or the format alone: what such a server refuses is learnt.
    "openai": {"hosts": r"(?i)//(?:[\w-]+\.)*(?:api\.openai|azure)\.com(?:[:/]|$)"},
    "openrouter": {"headers": {"HTTP-Referer": "https://github.com/ccmux", "X-Title": "ccmux"}},
    **{name: {"first_byte_timeout": 600} for name in ("ollama", "lmstudio", "llamacpp")},
}


def preset(row: str) -> tuple[str, Json]:
    """A preset's name and its provider table, from a line of PRESET_ROWS; - stands for nothing."""
    name, format, base_url, variable, default = ("" if word == "-" else word for word in row.split())
    table = {
        "type": format,
        "base_url": base_url,
        "default": default,
        "api_key": f"${variable}" if variable else "",
    }
    return name, {**table, **PRESET_KEYS.get(name, {}), "quirks": PRESET_QUIRKS.get(name, {})}


PRESETS: dict[str, Json] = dict(map(preset, PRESET_ROWS.strip().splitlines()))


def left_out(body: Json, dialect: Dialect, to: Upstream) -> list[str]:
    """The types of those server tools that a translated request does without."""
    is_crowd = dialect.searches_alone and dialect.searches_alone(to) and bool(client_tools(body))
    tools = tools_of(body)
    others = itertools.compress(tools, map(operator.not_, each(tools, is_client_tool)))
    return [str(t.get("type"))[:64] for t in others if is_crowd or not is_web_search(t)]


CHAT = "chat/completions"  # what a model that is served by Responses alone does not take


def dialect_of(
    provider: Provider, model: str, skip: Container[str] = (), body: Json | None = None
) -> Dialect:
    """The wire format that a provider serves a model's requests by; `skip` is what errors have said it does not take.

    OpenAI and xAI search the web by Responses alone, but for the models that do so always.
    https://developers.openai.com/api/docs/guides/tools-web-search, https://docs.x.ai (November 2026)
    """
    quirks = provider.quirks
    is_codex = quirks.codex and re.search(quirks.codex, model)
    searches = quirks.web_search == "responses" and "-search" not in model and body and web_search_of(body)
    by_responses = provider.format == "openai" and (is_codex or searches or CHAT in skip)
    return DIALECTS["responses" if by_responses else provider.format]


def is_anthropics(base: str) -> bool:
    """Whether a base URL, which may be malformed, is of Anthropic's own API."""
    return bool(re.match(r"https?://api\.anthropic\.com(?![\w.-])", base, re.I))


_ENDPOINT = re.compile(
    r"/(?:messages|chat/completions|responses)$|(?:(?<=/v1)|(?<=/v1beta))/models(?:/[^/]+:\w+)?$"
)
_VERSION_SEGMENT = re.compile(r"/v\d+(?:alpha|beta)?\d*(?=/|$)")


@functools.lru_cache(1024)
def endpoint_url(base_url: str, dialect: Dialect, endpoint: str = "", model: str = "") -> str:
    """The URL to call for a base URL in any of its usual forms: bare host, with a version, or the full
    endpoint.
    """
    parts = urllib.parse.urlsplit(base_url.strip())
    given = parts.path.rstrip("/")
    path = _ENDPOINT.sub("", given)
    # Anthropic's format has its version behind any path; the others' base URLs end with theirs, if they have a path.
    if not _VERSION_SEGMENT.search(path) and (not given or dialect.endpoint == "/messages"):
        path += dialect.version
    name = urllib.parse.quote(model.removeprefix("models/"), safe="/@:.-")  # as Google lists its models
    path, _, query = (path + (endpoint or dialect.endpoint).format(model=name)).partition("?")
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query or parts.query, ""))


def load_config(text: str, env: Mapping[str, str], path: str = "") -> Config:
    """`parse_config` with this file's presets and formats, and every route checked."""
    config = parse_config(text, env, PRESETS, DIALECTS, path)
    check_routes(config)
    for provider in config.providers:
        check_sign_in(provider)
    return dataclasses.replace(config, warnings=(*config.warnings, *idle_rules(config)))


def check_sign_in(provider: Provider) -> None:
    """ConfigError where two things want to be the Authorization header: a key, and a user in the address."""
    style = provider.quirks.auth or DIALECTS[provider.format].auth
    has_user = "@" in urllib.parse.urlsplit(provider.base_url).netloc
    if has_user and provider.usable and any(provider.api_key) and style in ("bearer", "both"):
        where = f"[[providers]] {provider.name!r}: key 'base_url'"
        raise ConfigError(
            f"{where} has a user, and api_key needs the same header, Authorization: leave out one of them"
        )


class ClientFormat(typing.Protocol):
    """What turns Anthropic events into the bytes that a client wants."""

    def feed(self, events: list[Json]) -> bytes: ...
    def end(self, events: list[Json]) -> bytes: ...


class EventWriter:
    """Anthropic events as a stream."""

    def feed(self, events: list[Json]) -> bytes:
        return "".join(map(written_event, events)).encode()

    end = feed


class WholeAnswer:
    """Anthropic events as one JSON body, for a client that does not stream; `write` makes it of the whole message."""

    def __init__(self, write: Callable[[Json], Json]) -> None:
        self.write = write
        self.events: list[Json] = []

    def feed(self, events: list[Json]) -> bytes:
        self.events.extend(events)
        return b""

    def end(self, events: list[Json]) -> bytes:
        return compact(self.write(collect([*self.events, *events])))


def without_cut_off(message: Json) -> Json:
    """The message, with no input for a call that was cut off: no part of it is for a client that does not stream."""
    for block in message["content"]:
        if isinstance(block.get("input"), str):
            block["input"] = {}
    return message


class Translation:
    """An upstream's bytes -> the client's bytes, by way of Anthropic events. Same face as `AnthropicTap`."""

    def __init__(self, stream: DialectStream, out: AnthropicStream, client: ClientFormat) -> None:
        self.stream, self.out, self.client = stream, out, client
        self.decoder = SseDecoder()
        self.error: ApiError | None = None
        self.error_relayed = False
        self.ending = b""
        self.seen_event = False
        self.head = b""  # the first bytes, until there is an event among them

    @property
    def usage(self) -> Usage | None:
        return self.stream.usage

    @property
    def stop_reason(self) -> str:
        return self.out.stop_reason

    @property
    def has_content(self) -> bool:
        return self.out.has_content

    @property
    def ended(self) -> bool:
        return self.out.ended

    def feed(self, data: bytes) -> bytes:
        if not self.seen_event and len(self.head) < 65536:
            self.head += data
        return self.guarded(lambda: self.read(self.decoder.cut(data)))

    def finish(self) -> bytes:
        rest = self.decoder.finish()
        if is_cut_off(rest):
            self.seen_event, rest = True, b""
        return self.guarded(lambda: self.read(rest)) + self.guarded(self.end_of_stream)

    def read(self, whole: bytes) -> None:
        for name, text in events_of(whole):
            if text:
                self.seen_event = True
                self.stream.feed(name, text)

    def guarded(self, step: Callable[[], None]) -> bytes:
        """What a step makes for the client; an ApiError is kept, so that what came before it still goes out."""
        if self.error is None:
            try:
                step()
            except ApiError as error:
                self.error = error
        events = self.out.take()
        if not events:
            return b""
        last = [events.pop()] if self.out.ended else []
        out = self.client.feed(events)
        if last:
            self.ending = self.client.end(last)
        return out

    def end_of_stream(self) -> None:
        head = b"" if self.seen_event else self.head.lstrip()
        if head and not head.startswith((b"event:", b"data:", b":", b"id:", b"retry:")):
            raise not_a_stream(head.decode("utf-8", "replace"), "event stream")
        self.stream.finish()

    def output_text(self) -> str:
        return "".join(self.out.text_parts)


class AnthropicWhole:
    """An Anthropic-format upstream's whole JSON answer, relayed as it came. Same face as `AnthropicTap`."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.usage: Usage | None = None
        self.usage_broken = False
        self.stop_reason = ""
        self.has_content = self.ended = self.error_relayed = False
        self.error: ApiError | None = None
        self.ending = b""
        self.message: Json = {}

    def feed(self, data: bytes) -> bytes:
        self.parts.append(data)
        return b""

    def finish(self) -> bytes:
        body = b"".join(self.parts)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or not self.look(message):
            self.error = not_a_stream(body.decode("utf-8", "replace"), "answer of its format")
            return b""
        self.message, self.ending = message, body
        self.has_content = self.ended = True
        return b""

    def look(self, message: Json) -> bool:
        """Reads usage and stop reason off a whole answer; false where it is none."""
        self.usage = anthropic_usage(message.get("usage"))
        self.usage_broken = not (self.usage and self.usage.prompt)
        self.stop_reason = str(message.get("stop_reason") or "")
        return message.get("type") == "message"

    def output_text(self) -> str:
        return "\n".join(block_text(b) for b in blocks_of(self.message.get("content")))


class ChatWhole(AnthropicWhole):
    """An OpenAI-format upstream's whole answer, relayed to a client of the same format."""

    def look(self, message: Json) -> bool:
        self.usage = openai_usage(message.get("usage"))
        choices = [c for c in as_list(message.get("choices")) if isinstance(c, dict)]
        self.stop_reason = str(choices[0].get("finish_reason") or "") if choices else ""
        return bool(choices)

    def output_text(self) -> str:
        return json.dumps(self.message.get("choices"))


class ChatTap:
    """An OpenAI-format upstream's stream, relayed to a client of the same format. Same face as `AnthropicTap`."""

    def __init__(self, wants_usage: bool, lax_finish: bool = False) -> None:
        self.wants_usage = wants_usage  # false: the chunk of usage that ccmux asked for is not the client's
        self.lax_finish = lax_finish
        self.decoder = SseDecoder()
        self.usage: Usage | None = None
        self.stop_reason = ""
        self.has_content = self.ended = self.error_relayed = False
        self.error: ApiError | None = None
        self.ending = b""
        self.texts: list[str] = []

    def feed(self, data: bytes) -> bytes:
        return b"".join(map(self.relay, self.decoder.feed(data)))

    def relay(self, block: bytes) -> bytes:
        if self.ended or self.error is not None:
            return b""
        name, data = event_of(block)
        if data == "[DONE]":
            self.end(block)
            return b""
        if not data and not self.has_content and is_body(block):
            self.error = not_a_stream(block.decode("utf-8", "replace"), "OpenAI stream")
            return b""
        chunk = parsed(data or "{}")
        if not isinstance(chunk, dict):
            self.error = not_a_stream(data, "OpenAI stream")
            return b""
        groq = as_object(chunk.get("x_groq"))
        is_bare = "choices" not in chunk and is_bare_error(chunk)
        if chunk.get("error") or groq.get("error") or name == "error" or is_bare:
            self.error = error_of_event(groq if groq.get("error") else chunk)
            return b""
        if told := chunk.get("usage") or groq.get("usage"):
            self.usage = openai_usage(told) or self.usage
        choices = [c for c in as_list(chunk.get("choices")) if isinstance(c, dict)]
        for choice in choices:
            self.look(choice)
        is_ours = bool(data) and not choices and not self.wants_usage and bool(chunk.get("usage"))
        return b"" if is_ours else block

    def look(self, choice: Json) -> None:
        self.stop_reason = str(choice.get("finish_reason") or "") or self.stop_reason
        if choice.get("usage"):  # Moonshot's
            self.usage = openai_usage(choice["usage"]) or self.usage
        said = {k: v for k, v in as_object(choice.get("delta")).items() if k != "role" and v}
        self.has_content = self.has_content or bool(said) or bool(self.stop_reason)
        self.texts += [v if isinstance(v, str) else json.dumps(v) for v in said.values()]

    def finish(self) -> bytes:
        rest = self.decoder.finish()
        out = b"" if is_cut_off(rest) else self.relay(rest)
        if not self.ended and self.error is None:
            self.end(b"data: [DONE]\n\n")
        return out

    def end(self, mark: bytes) -> None:
        """The end of the stream: of the answer too, where it had said so."""
        if self.stop_reason or (self.lax_finish and self.has_content):
            self.ended, self.ending = True, mark
        else:
            self.error = broken_stream()

    def output_text(self) -> str:
        return "".join(self.texts)


def chat_passed_on(given: Json, to: Upstream) -> Json:
    """An OpenAI-format client's own request for an upstream of its format: but for the model's name as it came."""
    if "web_search_options" in to.skip & given.keys():
        raise no_web_search()
    out = {**given, "model": to.model, "stream": given.get("stream") is True}
    if out["stream"] and to.quirks.stream_options:
        out["stream_options"] = {**as_object(given.get("stream_options")), "include_usage": True}
    for key in LIMIT_KEYS.keys() & given.keys() & to.skip:
        out.setdefault(limit_key(key, to), given[key])
    if f"effort.{given.get('reasoning_effort')}" in to.skip:
        asked = {"output_config": {"effort": given["reasoning_effort"]}}
        out["reasoning_effort"] = wanted_effort(asked, efforts_of(to, EFFORTS))
    return without(out | to.quirks.extra_body, to)


# The demo provider: an answer made in this process, so that the first request works before anyone has a key.


def demo_events(body: Json, message_id: str) -> list[Json]:
    """The answer of the demo provider: a tool call where the prompt names one of the tools, else some words."""
    out = AnthropicStream(message_id, str(body.get("model")), Usage(input=len(str(body)) // 4))
    turns = turns_of(messages_of(body))
    last = turns[-1].blocks if turns else []
    words = " ".join(_REMINDER.sub("", text) for text in newest_words(messages_of(body))[1].values()).strip()
    tools = client_tools(body)
    tool = next((t for t in tools if re.search(rf"\b{re.escape(str(t['name']))}\b", words, re.I)), None)
    if results := results_of(last):
        text = "\n".join(result_parts(r)[0] for r in results.values())
        say(
            out,
            f"The tool answered:\n{text[:2000]}\n\nThat was the demo provider; add a real one to do real work.",
        )
    elif tool:
        say(out, f"I will use {tool['name']} for that.")
        out.tool(f"toolu_{message_id[4:28]}", str(tool["name"]))
        out.tool_input(json.dumps(demo_input(tool, words)))
    elif json_schema_of(body):
        say(out, json.dumps({"title": "Demo session", "isNewTopic": True}))
    else:
        say(out, f"This is ccmux's built-in demo provider, and it heard: {words[:200]!r}. Set a provider's key in the "
            "environment (ANTHROPIC_API_KEY, OPENAI_API_KEY, OPENROUTER_API_KEY, ...), or run `ccmux.py init`, "
            "to talk to a real model. Name one of my tools to see a tool call.")  # fmt: skip
    out.usage = Usage(input=out.usage.input, output=max(1, len("".join(out.text_parts)) // 4))
    out.finish("end_turn")
    return out.take()


def say(out: AnthropicStream, text: str) -> None:
    for word in re.findall(r"\S+\s*", text):
        out.text(word)


def demo_input(tool: Json, words: str) -> Json:
    """Values for a tool's required properties: what stands in quotes or backticks in the prompt, in order."""
    schema = as_object(tool.get("input_schema"))
    given = [found[1] for found in re.findall(r"([`\"'])(.+?)\1", words, re.S)]
    empty = {"number": 1, "integer": 1, "boolean": False, "array": [], "object": {}}
    values: Json = {}
    for name in as_list(schema.get("required")):
        kind = as_object(as_object(schema.get("properties")).get(name)).get("type")
        values[name] = empty[kind] if kind in empty else (given.pop(0) if given else "echo hello")
    return values


# ----------------------------------------------------------------------------------------------------------
# Tokens and prices (pure; the encoder is handed in)
# ----------------------------------------------------------------------------------------------------------
# Prices: US dollars per million tokens, taken 2026-11-27 from a maintained public table (LiteLLM's) and
# checked against the vendors' pages where they have one. Columns: name, context, max output, input, output,
# cache read, cache write, 1 h cache write; - is unknown, not free. Then what the model refuses (s sampling
# parameters, f forced tool calls, t thinking turned off or with a budget) and the tiers,
# above:input/output/read/write(/1 h write), that price a whole request once its prompt passes that. Anthropic's
# 1 h write costs twice the input. Google's gemini-4-argon and -carbon cost half of this until December 2026;
# gemini-3.6-flash to -3.8-flash will cost the double from January 2027.
PRICE_ROWS = """
claude-fable-5-1         1000000  128000    10    50   0.25   12.5  20 sft
claude-fable-5           1000000  128000    10    50      1   12.5  20 st
claude-opus-5-5          1000000  128000     4    20    0.2      5   8 sft
claude-opus-5            1000000  128000     5    25    0.5   6.25  10 s
claude-opus-4-8          1000000  128000     5    25    0.5   6.25  10 s
claude-opus-4-7          1000000  128000     5    25    0.5   6.25  10 s
claude-opus-4-6          1000000  128000     5    25    0.5   6.25  10 -
claude-opus-4-5           200000   64000     5    25    0.5   6.25  10 -
claude-sonnet-5-5        1000000  128000     2    10    0.1    2.5   4 sft
claude-sonnet-5          1000000  128000     2    10    0.2    2.5   4 s
claude-sonnet-4-6        1000000  128000     3    15    0.3   3.75   6 -
claude-sonnet-4-5         200000   64000     3    15    0.3   3.75   6 -
claude-haiku-5-5         1000000  128000   0.1   0.5   0.01  0.125 0.2 s  100000:0.5/2.5/0.05/0.625/1
claude-haiku-4-5          200000   64000     1     5    0.1   1.25   2 -
gpt-6.2-astra             922000  128000     8    40    0.4     10   - -  272000:16/60/0.8/20
gpt-6.2-sol               922000  128000     2    10    0.1    2.5   - -  272000:4/15/0.2/5
gpt-6.1-sol               922000  128000     2    10    0.1    2.5   - -  272000:4/15/0.2/5
gpt-6.1-terra             922000  128000     1     5   0.05   1.25   - -  272000:2/7.5/0.1/2.5
gpt-6-astra               922000  128000    10    50      1   12.5   - -  272000:20/75/2/25
gpt-6-sol                 922000  128000     2    10    0.2    2.5   - -  272000:4/15/0.4/5
gpt-6-luna                922000  128000   0.1   0.5   0.01  0.125   - -  272000:0.2/0.75/0.02/0.25
gpt-5.6                   922000  128000     4    20    0.4      5   - -  272000:8/30/0.8/10
gpt-5.6-sol               922000  128000     4    20    0.4      5   - -  272000:8/30/0.8/10
gpt-5.6-terra             922000  128000     2    12    0.2    2.5   - -  272000:4/18/0.4/5
gpt-5.6-luna              922000  128000   0.2   1.2   0.02   0.25   - -  272000:0.4/1.8/0.04/0.5
gpt-5.5                  1050000  128000     5    30    0.5      -   - -  272000:10/45/1/-
gpt-5.4                  1050000  128000   2.5    15   0.25      -   - -  272000:5/22.5/0.5/-
gpt-5.4-mini              272000  128000  0.75   4.5  0.075      -   - -
gpt-5.4-nano              272000  128000   0.2  1.25   0.02      -   - -
gpt-5.3-codex             272000  128000  1.75    14  0.175      -   - -
gpt-5.2                   272000  128000  1.75    14  0.175      -   - -
gpt-5.1                   272000  128000  1.25    10  0.125      -   - -
gpt-5                     272000  128000  1.25    10  0.125      -   - -
gpt-5-mini                272000  128000  0.25     2  0.025      -   - -
gpt-5-nano                272000  128000  0.05   0.4  0.005      -   - -
gpt-5-search-api          272000  128000  1.25    10  0.125      -   - -
gpt-4.1                  1047576   32768     2     8    0.5      -   - -
gpt-4.1-mini             1047576   32768   0.4   1.6    0.1      -   - -
gpt-4o                    128000   16384   2.5    10   1.25      -   - -
gpt-4o-mini               128000   16384  0.15   0.6  0.075      -   - -
o3                        200000  100000     2     8    0.5      -   - -
o4-mini                   200000  100000   1.1   4.4  0.275      -   - -
gemini-4-argon           1048576 1048576     4    20    0.2      -   - -
gemini-4-carbon          1048576 1048576     4    20    0.2      -   - -
gemini-4-neon            1048576   65536     3    15   0.15      -   - -
gemini-4-hydrogen        1048576 1048576   1.5   7.5  0.075      -   - -
gemini-3.8-flash         1048576   65536  0.75  3.75  0.075      -   - s
gemini-3.7-flash         1048576   65536  0.75  3.75  0.075      -   - s
gemini-3.6-flash         1048576   65536  0.75  3.75  0.075      -   - s
gemini-3.5-flash         1048576   65536   1.5     9   0.15      -   - -
gemini-3.5-flash-lite    1048576   65536   0.3   2.5   0.03      -   - s
gemini-3.1-pro-preview   1048576   65536     2    12    0.2      -   - -  200000:4/18/0.4/-
gemini-3-flash-preview   1048576   65536   0.5     3   0.05      -   - -
gemini-2.5-pro           1048576   65536  1.25    10  0.125      -   - -  200000:2.5/15/0.25/-
gemini-2.5-flash         1048576   65536   0.3   2.5   0.03      -   - -
deepseek-v4-pro          1000000  393216  1.32  3.96  0.044      0   - -
deepseek-flash           1000000  393216   0.3   1.2  0.006      0   - -
deepseek-v4-flash        1000000  393216   0.3   1.2  0.006      0   - -
deepseek-chat             131072    8192  0.28  0.42  0.028      0   - -
deepseek-reasoner         131072   65536  0.28  0.42  0.028      -   - -
glm-5.3                  1000000  128000   1.4   4.4   0.26      0   - -
glm-5.3-flash            1048576  128000  0.15   0.5   0.03      0   - -
glm-5.2                  1000000  128000   1.4   4.4   0.26      0   - -
glm-5.1                   200000  128000   1.4   4.4   0.26      0   - -
glm-5                     200000  128000     1   3.2    0.2      0   - -
glm-4.7                   200000  128000   0.6   2.2   0.11      0   - -
glm-4.6                   200000  128000   0.6   2.2   0.11      0   - -
glm-4.5-air               128000   32000   0.2   1.1      -      -   - -
kimi-k3                  1048576 1048576     3    15    0.3      3   6 -
kimi-k3.1-pro            1048576 1048576     2    10    0.2      2   4 -
kimi-k2.7-code            262144  262144  0.95     4   0.19      -   - -
kimi-k2.6                 262144  262144  0.95     4   0.16      -   - -
kimi-k2.5                 262144  262144   0.6     3    0.1      -   - -
MiniMax-M3               1000000  128000   0.3   1.2   0.06      -   - -  512000:0.6/2.4/0.12/-
MiniMax-M2.5             1000000    8192   0.3   1.2   0.03  0.375   - -
MiniMax-M2.1             1000000    8192   0.3   1.2   0.03  0.375   - -
qwen3.8-max               991808  131072     2     6   0.25      -   - -
qwen3.8-flash             991808  131072  0.15  0.47  0.016    0.2   - -
qwen3.7-max               991808   65536   2.5   7.5    0.5  3.125   - -
qwen3-coder-plus  997952 65536 1 5 0.1 - - -  32000:1.8/9/0.18/- 128000:3/15/0.3/- 256000:6/60/0.6/-
qwen3-max                 258048   65536   1.2     6      -      -   - -  32000:2.4/12/-/- 128000:3/15/-/-
grok-4.7                  500000  500000     2     6    0.5      -   - -  200000:4/12/1/-
grok-4.6                  500000  500000     2     6    0.5      -   - -  200000:4/12/1/-
grok-4.5                  500000  500000     2     6    0.3      -   - -  200000:4/12/0.6/-
grok-4.3                 1000000 1000000  1.25   2.5    0.2      -   - -  200000:2.5/5/0.4/-
grok-code-fast-1          256000  256000     1     2    0.2      -   - -  200000:2/4/0.4/-
mistral-large-4          1048576 1048576   0.7   2.1   0.07      -   - -
mistral-large-latest      262144  262144   0.5   1.5   0.05      -   - -
mistral-medium-latest     262144  262144   1.5   7.5   0.15      -   - -
mistral-small-latest      262144  262144  0.15   0.6  0.015      -   - -
devstral-latest           256000  256000   0.4     2   0.04      -   - -
devstral-medium-latest    256000  256000   0.4     2   0.04      -   - -
codestral-latest          128000  128000   0.3   0.9   0.03      -   - -
openai/gpt-oss-120b       131072   65536  0.15   0.6  0.075      -   - -
openai/gpt-oss-20b        131072   65536 0.075   0.3 0.0375      -   - -
gpt-oss-120b              131072   32768  0.35  0.75      -      -   - -
"""


@functools.cache
def price_table() -> dict[str, Facts]:
    """The built-in table by lower-case model name, parsed at first use."""
    return dict(map(price_row, PRICE_ROWS.strip().splitlines()))


def price_row(row: str) -> tuple[str, Facts]:
    name, context, max_output, *columns = row.split()
    tiers = (tier.split(":") for tier in columns[6:])
    above = tuple((int(size), price_of_columns(prices.split("/"))) for size, prices in tiers)
    price = price_of_columns(columns[:5], above)
    sampling, forced_tool, thinking_off = (letter not in columns[5] for letter in "sft")
    return name.lower(), Facts(int(context), int(max_output), sampling, forced_tool, thinking_off, price)


def price_of_columns(columns: Sequence[str], tiers: tuple[tuple[int, Price], ...] = ()) -> Price:
    known = {kind: Decimal(each) for kind, each in zip(PRICE_KINDS, columns, strict=False) if each != "-"}
    return Price(**known, tiers=tiers)


PRICE_KINDS = ("input", "output", "cache_read", "cache_write", "cache_write_1h")
FREE = Price(Decimal(0), Decimal(0))
# A date, an alias, Bedrock's version, OpenRouter's tag, Claude Code's mark of a long context.
_MODEL_SUFFIX = re.compile(r"(?:[-@]20\d{6}|-20\d\d-\d\d-\d\d|-latest|@default|-v\d(?::\d)?|:[a-z]+|\[1m\])$")


def facts_of(model: str) -> Facts:
    """What the built-in table knows of a model: by its name, then without vendor prefix, date or tag.

    OpenRouter's `:free` variant of any model costs nothing.
    """
    return facts_by_name(model[:LONGEST_NAME].lower())


@functools.lru_cache(4096)
def facts_by_name(name: str) -> Facts:
    table, found = price_table(), Facts()
    for candidate in spellings(name):
        while candidate not in table and (shorter := _MODEL_SUFFIX.sub("", candidate)) != candidate:
            candidate = shorter
        if candidate in table:
            found = table[candidate]
            break
    return dataclasses.replace(found, price=FREE) if name.endswith(":free") else found


def spellings(name: str) -> tuple[str, ...]:
    """A model's name as it came, without vendors, and as its maker writes it: OpenRouter has `claude-opus-4.5`,
    Bedrock `us.anthropic.claude-opus-4-5`, Fireworks `glm-5p3`.
    """
    last = name.rsplit("/", 1)[-1]
    if "claude" in last:
        return name, last, last.rpartition("anthropic.")[2].replace(".", "-")
    return name, last, re.sub(r"(?<=\d)p(?=\d)", ".", last)


def price_of(config: Config, target: Target, model_name: str) -> Price | None:
    """A target's price: its own, else its model's, else the built-in one; None where nobody knows it."""
    provider, row = config.provider(target.provider), config.model(model_name)
    if provider and provider.format == "demo":
        return FREE
    configured = target.price or (row.price if row else None)
    return configured or facts_of(target.actual_model).price or facts_of(model_name).price


def charged_price(config: Config, target: Target, model_name: str) -> Price | None:
    """The price that users are charged by, before markup: where nobody knows one and credits are enforced, the default."""
    default = config.credits.default_price if config.credits.enforce else None
    return price_of(config, target, model_name) or default


def with_markup(price: Price, percent: Decimal) -> Price:
    """What a user pays for a million tokens, where a provider takes `price`."""
    kinds = {k: each * (100 + percent) / 100 for k in PRICE_KINDS if (each := getattr(price, k)) is not None}
    return Price(**kinds, tiers=tuple((above, with_markup(tier, percent)) for above, tier in price.tiers))


def fast_price(price: Price) -> Price:
    """What a model costs in Anthropic's fast mode: twice as much, whatever kind of token.

    https://platform.claude.com/docs/en/build-with-claude/fast-mode (November 2026: Opus 5.5, Opus 5, Opus 4.8)
    """
    return with_markup(price, Decimal(100))


@dataclass(frozen=True, slots=True)
class Charge:
    """Micro-dollars: what a provider takes, what is added, and their sum, which the user pays."""

    cost: int
    markup: int
    charge: int


def exact_cost(usage: Usage, price: Price) -> Decimal:
    """Micro-dollars, not rounded. A kind of token without a price of its own costs what input costs."""
    above = [tier for tier in price.tiers if usage.prompt > tier[0]]
    price = max(above, key=lambda tier: tier[0])[1] if above else price
    exact = usage.input * price.input + usage.output * price.output
    for kind in PRICE_KINDS[2:]:
        if tokens := getattr(usage, kind):
            each = getattr(price, kind)
            exact += tokens * (price.input if each is None else each)
    return exact


def charge_of(usage: Usage, price: Price, markup_percent: Decimal) -> Charge:
    """The charge of an answer: the exact sum, without and with markup, each rounded up to a micro-dollar."""
    exact = exact_cost(usage, price)
    cost, charge = math.ceil(exact), math.ceil(exact * (100 + markup_percent) / 100)
    return Charge(cost, charge - cost, charge)


def most_output(body: Json) -> int:
    """The output tokens that a request allows; 4,096 where it does not say."""
    asked = body.get("max_tokens")
    return asked if isinstance(asked, int) and asked > 0 else 4096


def hold_of(tokens: int, max_tokens: int, price: Price, markup_percent: Decimal) -> int:
    """What a request's input and up to 4,096 tokens of output cost, in micro-dollars."""
    usage = Usage(input=tokens, output=min(max_tokens, 4096))
    return charge_of(usage, price, markup_percent).charge


def price_json(price: Price) -> Json:
    """A price as it is stored with a request: decimal texts, exact."""
    out: Json = {k: str(v) for k in PRICE_KINDS if (v := getattr(price, k)) is not None}
    if price.tiers:
        out["tiers"] = [{"above": above, **price_json(tier)} for above, tier in price.tiers]
    return out


# Counting. Every family of models has a framing: which vocabulary, and what messages and tools cost beyond
# their text. A request is counted block by block and each block's count is kept by its hash, so that a turn
# of a long conversation costs what its last message costs. True usage then teaches a factor for each
# (provider, model).

SLICE = 65_536  # characters: a megabyte of one whitespace run makes the encoder panic
SMALL = 16_384  # bytes of new messages that are counted ahead of longer ones
LIMIT = 3  # seconds that a server waits for a count before it estimates
PATIENCE = 0.01  # the same where the event loop would wait
CACHE_SIZE = 20_000
RECENT = 1000  # counts that wait for their true usage, and names of models that they have taught
SAMPLES = 50  # true usages that a factor is the average of
DEPTH = 20  # of tool results inside tool results
IMAGE_TOKENS = 1500
PDF_PAGE_TOKENS = 2500


class Encoding:
    """What counts texts, by `encode`, which makes an item a token. A subclass may count in another process."""

    is_gone = False  # for good, as only another process can be

    def __init__(self, name: str, encode: Callable[[str], Sequence[int]]) -> None:
        self.name, self.encode = name, encode

    def lengths(self, texts: list[str]) -> list[int]:
        """The tokens of each; may take long. OSError where the encoding is gone."""
        return [self.length(text) for text in texts]

    def length(self, text: str) -> int:
        try:
            return len(self.encode(text))
        except BaseException as panic:  # pyo3's is no Exception; the encoder can be used again after it
            if type(panic).__name__ != "PanicException":
                raise
            return len(guess(text))

    def close(self) -> None:
        return


def guess(text: str) -> Sequence[int]:
    """About as many items as a text has tokens, by its bytes: good to a fifth."""
    return range(math.ceil(len(text.encode("utf-8", "surrogatepass")) / 3.7))


ESTIMATE = Encoding("", guess)  # while there is no encoding, or it takes too long


@dataclass(frozen=True, slots=True)
class Framing:
    """How a family of models counts a request beyond its texts, in tokens. `factors` are by vocabulary."""

    encoding: str
    factors: tuple[tuple[str, float], ...] = ()
    base: int = 3
    message: int = 4  # three and the role
    tools: int = 9
    tools_forced: int = 9
    result: int = 0
    call: int = 3
    is_claude: bool = False
    image: tuple[int, int] = (85, 170)  # an image and each of its tiles; Claude: largest side, most tokens

    def factor(self, vocabulary: str) -> float:
        """Of a count by that vocabulary; an estimate is made as o200k would count."""
        return dict(self.factors).get(vocabulary or "o200k_base", 1.0)


_CL100K = re.compile(r"^gpt-(?:4(?!o|\.\d)|3\.5)|^gpt-35")
_CLAUDE_VERSION = re.compile(r"claude-(?:[a-z]+-)?(\d+)(?:[-.](\d{1,2})(?!\d))?")
# o200k: fitted to recorded counts of code. claude: Anthropic's published tokenizer, of Claude 2.
FACTORS_TO_46 = (("o200k_base", 1.18), ("claude", 1.13))
FACTORS_FROM_47 = (("o200k_base", 1.45), ("claude", 1.39))


def framing_of(model: str) -> Framing:
    """The framing of a model by its name. OpenAI's, where the name says nothing."""
    return framing_by_name(model[:LONGEST_NAME].lower().rsplit("/", 1)[-1])


@functools.lru_cache(1024)
def framing_by_name(name: str) -> Framing:
    if "claude" in name:
        return claude_framing(name)
    image = (2833, 5667) if name.startswith("gpt-4o-mini") else (85, 170)
    return Framing("cl100k_base" if _CL100K.match(name) else "o200k_base", image=image)


def claude_framing(name: str) -> Framing:
    """Frame, tool prompt and images by Claude's version, as recorded from its count_tokens."""
    match = _CLAUDE_VERSION.search(name)
    version = (int(match[1]), int(match[2] or 0)) if match else (4, 0)
    encoding = f"claude-{version[0]}.{version[1]}"
    if version < (4, 7):
        return Framing(encoding, FACTORS_TO_46, 7, 0, 497, 589, 8, 12, True, (1568, 1568))
    base, tools, forced = (12 if version < (5, 0) else 7), 290, 410
    if version == (4, 7):
        tools, forced = 675, 804
    return Framing(encoding, FACTORS_FROM_47, base, 0, tools, forced, 10, 15, True, (2576, 4784))


class TokenCounter:
    """Counts requests and texts. `load` hands in an encoding by name, or None while there is none.

    Encoding is done in a thread, slice by slice: a short text waits for a slice, not for a megabyte.
    """

    def __init__(self, load: Callable[[str], Encoding | None], patience: float | None = None) -> None:
        self.load, self.patience = load, patience
        self.limit = None if patience is None else LIMIT
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "ccmux-count")
        self.turn = asyncio.Lock()  # for requests with much that is new: the loop comes round between two
        self.cache: OrderedDict[Key, int] = OrderedDict()  # of blocks
        self.whole: OrderedDict[Key, float] = OrderedDict()  # of messages, whose blocks need no look then
        # (provider, model) -> (true / counted, answers it was learnt from)
        self.factors: dict[tuple[str, str], tuple[float, int]] = {}
        # (provider, model, count given) -> the count without its factor, as answers come in any order
        self.recent: OrderedDict[tuple[str, str, int], float] = OrderedDict()

    async def count(self, body: Json, provider: str, model: str, items: Sequence[Item] | None = None) -> int:
        """Input tokens of a whole request; `items` is `items_of(body)`, where a caller has it already."""
        framing, place = framing_of(model), (provider, model)
        items = items_of(body) if items is None else items
        looked = self.look_up(items, framing, self.load(framing.encoding) or ESTIMATE)
        if not looked.new:
            return self.total(looked, {}, place)
        is_long = sum(item.size for item, _ in looked.new) > SMALL
        with contextlib.suppress(OSError):  # a TimeoutError is one
            async with asyncio.timeout(self.limit), self.turn if is_long else contextlib.nullcontext():
                await asyncio.sleep(0)
                work = Work(self.take_apart(looked), looked.encoding)
                is_left = bool(work.counts)
                while is_left and looked.encoding is ESTIMATE:
                    await asyncio.sleep(0)
                    is_left = work.step()
                while is_left:
                    is_left = await asyncio.wrap_future(self.thread.submit(work.step))
                return self.total(looked, work.counts, place)
        return self.estimated(items, framing, place)

    def count_now(self, body: Json, provider: str, model: str) -> int:
        """The same for a caller that cannot await: an estimate where `patience` ends first."""
        framing, place, items = framing_of(model), (provider, model), items_of(body)
        with contextlib.suppress(OSError):
            if encoding := self.load(framing.encoding):
                looked = self.look_up(items, framing, encoding)
                work = Work(self.take_apart(looked), encoding)
                return self.total(looked, self.thread.submit(work.run).result(self.patience), place)
        return self.estimated(items, framing, place)

    def count_text(self, text: str, model: str) -> int:
        """Tokens of a text that a model made; for a caller that cannot await, too."""
        framing, parts = framing_of(model), [Part((), lambda: text)]
        encoding = self.load(framing.encoding) or ESTIMATE
        try:
            counts = self.thread.submit(Work(parts, encoding).run).result(self.patience)
        except OSError:
            encoding = ESTIMATE
            counts = Work(parts, encoding).run()
        return math.ceil(counts[()] * framing.factor(encoding.name))

    def look_up(self, items: Sequence[Item], framing: Framing, encoding: Encoding) -> Looked:
        """The tokens of the messages that this encoding has counted before, and the messages that it has not."""
        looked = Looked(encoding, framing, framing.base)
        family = hash((framing, encoding.name))
        for item in items:
            key = (family, item.kind, item.hash)
            if (known := self.whole.get(key)) is not None:
                self.whole.move_to_end(key)
                looked.tokens += known
            else:
                looked.new.append((item, key))
        return looked

    def take_apart(self, looked: Looked) -> list[Part]:
        """Takes the new messages apart; returns those of their parts that were not counted before, each once."""
        looked.pieces = [Piece(item, key, looked.framing, looked.encoding.name) for item, key in looked.new]
        fresh: dict[Key, Part] = {}
        for part in (part for piece in looked.pieces for part in piece.parts):
            if (known := self.cache.get(part.key)) is not None:
                self.cache.move_to_end(part.key)
                looked.counts[part.key] = known
            else:
                fresh[part.key] = part
        return list(fresh.values())

    def estimated(self, items: Sequence[Item], framing: Framing, place: tuple[str, str]) -> int:
        looked = self.look_up(items, framing, ESTIMATE)
        return self.total(looked, Work(self.take_apart(looked), ESTIMATE).run(), place)

    def total(self, looked: Looked, counts: dict[Key, int], place: tuple[str, str]) -> int:
        """The sum, calibrated. Counts are kept, estimates under keys of their own."""
        tokens = looked.tokens
        looked.counts.update(counts)
        for piece in looked.pieces:
            in_piece = piece.fixed + sum(looked.counts[p.key] for p in piece.parts) * piece.factor
            tokens += in_piece
            self.whole[piece.key] = in_piece
        count = max(1, math.ceil(tokens * self.factors.get(place, (1.0, 0))[0]))
        self.cache.update(counts)
        counted = (*place, count)
        if looked.encoding is not ESTIMATE:
            self.recent[counted] = tokens
        else:
            self.recent.pop(counted, None)  # the same number, but nothing to learn from
        for kept, most in ((self.whole, CACHE_SIZE), (self.cache, CACHE_SIZE), (self.recent, RECENT)):
            while len(kept) > most:
                kept.popitem(last=False)
        return count

    def observe(self, provider: str, model: str, counted: int, true: int) -> None:
        """Learns from an answer's true prompt tokens: a running average over the last 50.

        Only a count made here, for this very (provider, model), from a vocabulary, has something to teach.
        """
        tokens = self.recent.get((provider, model, counted), 0.0)
        if tokens <= 0 or true <= 0:
            return
        factor, samples = self.factors.pop((provider, model), (1.0, 0))
        samples = min(samples + 1, SAMPLES)
        factor += (min(max(true / tokens, 0.5), 2.5) - factor) / samples
        self.factors[provider, model] = (factor, samples)  # the newest last
        while len(self.factors) > RECENT:  # clients choose the names
            self.factors.pop(next(iter(self.factors)))

    def export(self) -> list[tuple[str, str, float, int]]:
        return [(*key, *value) for key, value in self.factors.items()]

    def restore(self, rows: Iterable[tuple[str, str, float, int]]) -> None:
        self.factors.update({(p, m): (factor, samples) for p, m, factor, samples in rows})


Key = tuple[Any, ...]  # ends with a hash of what was counted; Python's own, which nobody can foresee


class Part(typing.NamedTuple):
    """Something of a request that is counted as one, and kept by its hash: a text, or a number of tokens."""

    key: Key
    make: Callable[[], str | int]

    def slices(self) -> Iterable[str | int]:
        made = self.make()
        return slices(made) if isinstance(made, str) else (made,)


@dataclass(slots=True)
class Looked:
    """A request before its count: tokens known already, and what is new."""

    encoding: Encoding
    framing: Framing
    tokens: float
    new: list[tuple[Item, Key]] = field(default_factory=list)  # messages not seen before
    pieces: list[Piece] = field(default_factory=list)  # the same, taken apart
    counts: dict[Key, int] = field(default_factory=dict)  # of their parts


class Work:
    """Counts parts, in steps of a slice or so, each of which may run in a thread."""

    def __init__(self, parts: Sequence[Part], encoding: Encoding) -> None:
        self.encoding, self.counts = encoding, {part.key: 0 for part in parts}
        self.left = ((part.key, made) for part in parts for made in part.slices())

    def step(self) -> bool:
        """Counts the next parts; returns whether there may be more. OSError as an encoding's."""
        keys, texts, size = [], [], 0
        for key, made in self.left:
            if isinstance(made, int):
                self.counts[key] += made
                continue
            keys.append(key)
            texts.append(made)
            size += len(made)
            if size >= SLICE // 2:
                break
        for key, length in zip(keys, self.encoding.lengths(texts), strict=True):
            self.counts[key] += length
        return size >= SLICE // 2

    def run(self) -> dict[Key, int]:
        while self.step():
            pass
        return self.counts


class Item(typing.NamedTuple):
    """A message of a request, or its tools, and a hash by which its count is found again."""

    value: Json
    kind: str  # "", "joined" (the tools follow in the same message) or "tools"
    hash: int
    size: int  # bytes, or so


LARGEST_FACTOR = max(factor for _, factor in (*FACTORS_TO_46, *FACTORS_FROM_47))
MOST_FRAMING = 1000  # tokens around a request's messages


def is_surely_within(raw: bytes, body: Json, limit: int) -> bool:
    """Whether a request's bytes are so few that it has at most `limit` tokens, which then needs no count.

    No token is shorter than a byte. (A tool schema of nothing but commas could have more: it is counted with a space
    after each.) Images and documents may have more tokens than bytes.
    """
    fits = bool(raw) and len(raw) * LARGEST_FACTOR + MOST_FRAMING <= limit
    return fits and not holds_media(body.get("system")) and not any(each(messages_of(body), shows_media))


def shows_media(message: Json) -> bool:
    return holds_media(message.get("content"))


def holds_media(content: Any, depth: int = 0) -> bool:
    """Whether there may be an image or a document among content blocks, or inside a tool's result."""
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and (
            block.get("type") in ("image", "image_url", "document")
            or (block.get("content") and (depth == DEPTH or holds_media(block["content"], depth + 1)))
        ):
            return True
    return False


def items_of(body: Json) -> list[Item]:
    """What a request is counted by. The system prompt is a message, as it is to OpenAI's models."""
    messages = messages_of(body)
    items = [Item(m, "", *d) for m, d in zip(messages, each(messages, digest), strict=True)]
    if body.get("system"):
        system = {"role": "system", "content": body["system"]}
        items.insert(0, Item(system, "", *digest(system)))
    if tools := offered_tools(body):
        # OpenAI's tools stand in a system message: the request's own is joined to it by a newline.
        joins = next((n for n, item in enumerate(items) if item.value.get("role") == "system"), None)
        if joins is not None:
            items[joins] = items[joins]._replace(kind="joined")
        choice = body.get("tool_choice") or body.get("function_call")
        offer = {"tools": tools, "has_system": joins is not None, "choice": choice}
        items.append(Item(offer, "tools", *digest(offer)))
    return items


def digest(value: Any) -> tuple[int, int]:
    """A hash of a JSON value, and its size in bytes or so. What is kept in a list of it has a digest of its own."""
    rest: Json = {}
    parts: list[tuple[int, int]] = []
    for key, member in value.items() if isinstance(value, dict) else [("", value)]:
        if isinstance(member, list) and Kept in map(type, member):
            parts += each(member, digest)
            member = len(member)
        rest[key] = member
    try:  # ten times as fast as JSON; version 2 writes equal values as equal bytes
        whole = marshal.dumps(rest, 2)
    except ValueError:  # nested too deeply
        whole = marshal.dumps(list(strings_in(rest)), 2)
    return hash((whole, *parts)), len(whole) + sum(size for _, size in parts)


def slices(text: str) -> Iterator[str]:
    """The text in pieces of at most SLICE characters, cut at newlines where there are any."""
    start = 0
    while start < len(text):
        end = start + SLICE
        if end < len(text):
            newline = text.rfind("\n", start + 1, end)
            end = newline if newline > start else end
        yield text[start:end]
        start = end


def rendered(render: Callable[[Any], str], value: Any) -> str:
    """A value as the model reads it; its strings alone where it is nested beyond rendering."""
    try:
        return render(value)
    except (RecursionError, ValueError):
        return "\n".join(strings_in(value))


def strings_in(value: Any) -> Iterator[str]:
    """Every key and string in a JSON value, however deep."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend([*item.values(), *item])
        elif isinstance(item, list):
            stack.extend(item)


class Piece:
    """An item taken apart: parts, whose counts are looked up by their hash, and `fixed` tokens beside them.

    Reads Messages API requests, and OpenAI Chat's names, calls and functions too, so that the formulas can be
    measured against recorded usage of both.
    """

    def __init__(self, item: Item, key: Key, framing: Framing, vocabulary: str) -> None:
        self.key, self.framing, self.factor = key, framing, framing.factor(vocabulary)
        self.vocabulary = vocabulary
        self.parts: list[Part] = []
        self.fixed = 0.0
        if item.kind == "tools":
            self.add_tools(**item.value)
        else:
            self.add_message(item.value, "\n" if item.kind and not framing.is_claude else "")

    def add(self, key: Any, make: Callable[[], str | int]) -> None:
        self.parts.append(Part((self.vocabulary, key), make))

    def add_text(self, given: Any) -> None:
        if given:
            text = rendered(str, given)
            self.add(hash(text), lambda: text)

    def add_value(self, value: Any, render: Callable[[Any], str]) -> None:
        self.add((render, once(value, digest)), functools.partial(rendered, render, value))

    def add_message(self, message: Json, ending: str) -> None:
        self.fixed += self.framing.message
        content = message.get("content")
        if ending and not isinstance(content, str):
            content = rendered(text_of, content)
        self.add_content(f"{content}{ending}" if ending else content)
        if isinstance(message.get("name"), str):
            self.fixed += -1 if message.get("role") == "function" else 1
            self.add_text(message["name"])
        calls = [*as_list(message.get("tool_calls")), {"function": message.get("function_call")}]
        for function in filter(None, (as_object(as_object(call).get("function")) for call in calls)):
            self.fixed += self.framing.call
            self.add_text(function.get("name"))
            self.add_text(function.get("arguments"))

    def add_content(self, content: Any, depth: int = 0) -> None:
        if isinstance(content, str):
            self.add_text(content)
            return
        for block in blocks_of(content):
            self.add_block(block, depth)

    def add_block(self, block: Json, depth: int) -> None:
        kind = block.get("type")
        if kind == "text":
            self.add_text(block.get("text"))
        elif kind == "tool_result" and depth < DEPTH:
            self.fixed += self.framing.message + self.framing.result
            self.add_content(block.get("content"), depth + 1)
        elif kind == "tool_use":
            self.fixed += self.framing.call
            self.add_value([block.get("name"), block.get("input")], call_text)
        elif kind == "thinking":
            self.add_text(block.get("thinking"))
        elif kind in ("image", "image_url"):
            self.fixed += image_tokens(block, self.framing)
        elif kind == "document":
            self.add_document(as_object(block.get("source")), depth)
        elif kind != "redacted_thinking":
            self.add_value(block, block_text)

    def add_document(self, source: Json, depth: int) -> None:
        data = rendered(str, source.get("data") or "")
        if source.get("type") == "base64":
            self.add(("pdf", self.factor, hash(data)), functools.partial(pdf_tokens, data, self.factor))
        elif source.get("type") == "text":
            self.add_text(data)
        elif depth < DEPTH:
            self.add_content(source.get("content"), depth + 1)

    def add_tools(self, *, tools: list[Json], has_system: bool, choice: Any) -> None:
        framing = self.framing
        self.add_value(tools, claude_tools if framing.is_claude else openai_namespace)
        kind = choice if isinstance(choice, str) else as_object(choice).get("type")
        if framing.is_claude:
            self.fixed += framing.tools_forced if kind in ("any", "tool") else framing.tools
            return
        self.fixed += framing.tools - 4 * has_system + (kind == "none")
        if isinstance(choice, dict) and (name := as_object(choice.get("function") or choice).get("name")):
            self.fixed += 4
            self.add_text(name)


def call_text(call: list[Any]) -> str:
    return f"{call[0]} {tool_arguments({'input': call[1]})}"


def offered_tools(body: Json) -> list[Json]:
    """The tools that the model reads about, as {name, description, input_schema}, from either form."""
    functions = [*each(tools_of(body), function_of), *map(as_object, as_list(body.get("functions")))]
    openai = [
        {"name": f.get("name"), "description": f.get("description"), "input_schema": f.get("parameters")}
        for f in filter(None, functions)
    ]
    return [*client_tools(body), *openai] if openai else client_tools(body)


def function_of(tool: Json) -> Json:
    return as_object(tool.get("function"))


def claude_tools(tools: list[Json]) -> str:
    kept = ("name", "description", "input_schema")
    return "".join(readable({k: t.get(k) for k in kept}) for t in tools)


def openai_namespace(tools: list[Json]) -> str:
    """Tools as OpenAI renders them for its models, as github.com/hmarr/openai-chat-tokens found out."""
    functions = map(typescript_function, tools)
    return "\n".join(["namespace functions {", "", *functions, "} // namespace functions"])


def typescript_function(tool: Json) -> str:
    members = typescript_members(as_object(tool.get("input_schema")), 0)
    parameters = f"_: {{\n{members}\n}}" if members else ""
    head = f"// {tool['description']}\n" if tool.get("description") else ""
    return f"{head}type {tool.get('name') or ''} = ({parameters}) => any;\n"


def typescript_members(schema: Json, indent: int) -> str:
    required = as_list(schema.get("required"))
    lines = []
    for name, value in as_object(schema.get("properties")).items():
        member = as_object(value)
        if member.get("description") and indent < 2:
            lines.append(f"// {member['description']}")
        lines.append(f"{name}{'' if name in required else '?'}: {typescript_type(member, indent)},")
    return "\n".join(" " * indent + line for line in lines)


def typescript_type(schema: Json, indent: int) -> str:
    if any_of := as_list(schema.get("anyOf")):
        return " | ".join(typescript_type(as_object(each), indent) for each in any_of)
    kind = str(schema.get("type") or "any")
    if kind == "array":
        return f"{typescript_type(as_object(schema.get('items')), indent)}[]"
    if kind == "object":
        return f"{{\n{typescript_members(schema, indent + 2)}\n}}"
    if values := as_list(schema.get("enum")):
        return " | ".join(readable(value) for value in values)
    return "number" if kind == "integer" else kind


def image_tokens(block: Json, framing: Framing) -> int:
    """Tokens of an image: Claude 28-pixel patches, OpenAI 512-pixel tiles; 1,500 where unknown."""
    source, link = as_object(block.get("source")), as_object(block.get("image_url"))
    data = source.get("data") or rendered(str, link.get("url")).partition(";base64,")[2]
    size = image_size(data) if isinstance(data, str) else None
    if link.get("detail") == "low" and not framing.is_claude:
        return framing.image[0]
    if size is None:
        return IMAGE_TOKENS
    if not framing.is_claude:
        return openai_image_tokens(*size, *framing.image)
    side, most = framing.image
    scale = min(1.0, side / max(size))
    return min(math.ceil(size[0] * scale / 28) * math.ceil(size[1] * scale / 28), most)


def openai_image_tokens(width: int, height: int, base: int, tile: int) -> int:
    """So much for an image and so much a tile, after fitting into 2048 x 2048 and a short side of 768."""
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return base + tile * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def image_size(data: str) -> tuple[int, int] | None:
    """(width, height) from the header of a PNG, GIF, WebP or JPEG in base64; None where it cannot be told."""
    head = base64_head(data, 64)
    size = (0, 0)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        size = (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))
    elif head[:4] == b"GIF8":
        size = (int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little"))
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        size = webp_size(head)
    elif head[:2] == b"\xff\xd8":
        size = jpeg_size(base64_head(data, 65_536))
    return size if min(size) > 0 else None


def base64_head(data: str, length: int) -> bytes:
    """The first bytes of base64 text; b"" where it is none."""
    head = data[:length]
    try:
        return base64.b64decode(head + "=" * (-len(head) % 4))
    except ValueError:
        return b""


def webp_size(head: bytes) -> tuple[int, int]:
    kind = head[12:16]
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def jpeg_size(head: bytes) -> tuple[int, int]:
    """From the start-of-frame segment, skipping the others."""
    at = 2
    while at + 9 < len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(head[at + 7 : at + 9], "big"), int.from_bytes(head[at + 5 : at + 7], "big")
        at += 2 + max(length, 2)
    return 0, 0


def pdf_tokens(data: str, factor: float) -> int:
    """Tokens of a PDF in base64, by its page objects (at least one); divided by the factor, which is for texts."""
    pages = len(re.findall(rb"/Type\s*/Page(?!s)", base64_head(data, len(data))))
    return math.ceil(PDF_PAGE_TOKENS * max(1, pages) / factor)


def count_request_body(body: Json) -> Json:
    """A request for an upstream's count_tokens: without what that endpoint refuses, and no choice of such a tool."""
    kept = ("model", "messages", "system", "tools", "tool_choice", "thinking")
    out = {k: body[k] for k in kept if k in body}
    if "tools" in out:
        out["tools"] = client_tools(body)
        names, chosen = [t["name"] for t in out["tools"]], as_object(out.get("tool_choice")).get("name")
        if not names or (chosen and chosen not in names):
            out.pop("tool_choice", None)
    return out


# Vocabularies (I/O from here on): files that tiktoken would fetch by itself, without a time limit, inside a
# lock. ccmux never lets it: a file is looked for, its hash checked, and a thread loads it (a server has a
# `RemoteEncoding` do so); until then counts are estimates.

VOCABULARIES = {  # name: (file name, for OpenAI's as tiktoken caches it: the sha1 of its URL; sha256)
    "o200k_base": (
        "fb374d419588a4632f3f557e76b4b70aebbca790",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
    "cl100k_base": (
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    # npm's @anthropic-ai/tokenizer 0.0.4; put there by hand, never downloaded
    "claude": ("claude.json", "58dad83d85e9cd57be209172449ebfbc395df2b455c11fe8b7e5b661e6f462ad"),
}
VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/encodings"
PATTERNS = {  # as in tiktoken_ext.openai_public, whose functions would download
    "o200k_base": "|".join((
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    )),
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}  # fmt: skip


def find_vocabulary(name: str) -> Path | None:
    """The vocabulary's file with the right hash; None where there is none."""
    file_name, sha256 = VOCABULARIES[name]
    named = map(os.environ.get, ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"))
    for folder in filter(None, [*named, "~/.ccmux/tiktoken"]):
        try:
            path = expanded(folder) / file_name
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path
        except OSError:
            continue
    return None


def vocabulary_state() -> Json:
    """Where each vocabulary is found; "" where it is not (of `ctok` and `claude` nothing depends on it)."""
    found: Json = {name: str(find_vocabulary(name) or "") for name in VOCABULARIES}
    spec = importlib.util.find_spec("ctok")
    return {**found, "ctok": str(spec.origin or "") if spec else ""}


def source_of(name: str) -> str:
    """What an encoding is made from: for Claude ctok, Anthropic's own vocabulary, or OpenAI's."""
    if not name.startswith("claude-"):
        return name
    if importlib.util.find_spec("ctok"):
        return name.replace("claude", "ctok")
    return "claude" if find_vocabulary("claude") else "o200k_base"


def load_encoding(name: str) -> Encoding | None:
    """An encoding from its file, never from the network; None without a file."""
    if name.startswith("ctok-"):
        return ctok_encoding(name)
    path = find_vocabulary(name)
    return read_encoding(name, path) if path else None


@functools.cache
def read_encoding(name: str, path: Path) -> Encoding:
    """The encoding that a file holds, read once in a process: 0.25 s and 84 MB for o200k."""
    if name == "claude":
        return claude_encoding(json.loads(path.read_text("utf-8")))
    with path.open("rb") as lines:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    made = tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})
    return Encoding(name, made.encode_ordinary)


def claude_encoding(data: Json) -> Encoding:
    """Anthropic's published tokenizer, of Claude 2: base64 tokens in the order of their ranks."""
    _, first, *tokens = data["bpe_ranks"].split()
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokens, int(first))}
    made = tiktoken.Encoding(
        "claude", pat_str=data["pat_str"], mergeable_ranks=ranks, special_tokens=data["special_tokens"]
    )
    return Encoding("claude", lambda text: made.encode_ordinary(unicodedata.normalize("NFKC", text)))


def ctok_encoding(name: str) -> Encoding:
    """The `ctok` package, where someone has installed it: exact for Claude, but slow."""
    token_count, version = importlib.import_module("ctok").token_count, name.partition("-")[2]
    frame = int(token_count("a", version)) - 1
    return Encoding(name, lambda text: range(int(token_count(text, version)) - frame))


class Vocabulary:
    """Hands encodings to the counter: what is loaded at once, the rest while a thread loads it."""

    def __init__(self, make: Callable[[str], Encoding | None] = load_encoding) -> None:
        self.make = make
        self.loaded: dict[str, Encoding | None] = {}
        self.loading: set[str] = set()
        self.lock = threading.Lock()  # two names may have one source, which is loaded once

    def get(self, name: str) -> Encoding | None:
        """The encoding where it is loaded; else None, and a thread sets out to load it."""
        if name in self.loaded:
            return self.loaded[name]
        if name not in self.loading:
            self.loading.add(name)
            threading.Thread(target=self.load, args=(name,), daemon=True, name="ccmux-vocabulary").start()
        return None

    def load(self, name: str) -> Encoding | None:
        """Loads an encoding now, for the command line and in the thread. Names with one source share it."""
        with self.lock, contextlib.suppress(OSError):  # what cannot be had now is tried again later
            if name not in self.loaded:
                source = source_of(name)
                self.loaded[source] = self.loaded[name] = self.loaded.get(source) or self.make(source)
        return self.loaded.get(name)

    def forget_missing(self) -> None:
        """Lets what was not there, or is gone, be looked for again: after a download, and once a minute."""
        for name in {*self.loading, *self.loaded}:
            encoding = self.loaded.get(name)
            if encoding is None or encoding.is_gone:
                self.loaded.pop(name, None)
                self.loading.discard(name)

    def close(self) -> None:
        for encoding in filter(None, list(self.loaded.values())):
            encoding.close()

    def missing(self) -> list[str]:
        """Vocabularies that were looked for in vain."""
        return [n for n, encoding in list(self.loaded.items()) if encoding is None and n in PATTERNS]


# ----------------------------------------------------------------------------------------------------------
# Store (SQLite)
# ----------------------------------------------------------------------------------------------------------
# Money is integer micro-dollars and never a cached number: balances, holds and sums are rows that triggers
# keep, in one SQLite file that the server and the command line share. One thread writes, and commits together all
# that waits. What moves money is synced to the disk before anyone is told. A hold need only outlive this process, so
# it waits for no disk; after a power cut it is there if anything written later is. Where nobody else is writing, the
# event loop itself writes a hold, and the settlement of a request that is the only one.

LOCAL_USER = "local"  # the user of everyone who needs no key
USER_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")

MIGRATIONS = (
    """
    create table users (
        id integer primary key, name text not null unique, note text not null default '', created text not null,
        balance_microusd integer not null default 0, held_microusd integer not null default 0,
        day_microusd integer, week_microusd integer, month_microusd integer, disabled integer not null default 0
    ) strict;
    create table keys (hash blob primary key, user_id integer not null references users) strict, without rowid;
    create table ledger (
        id integer primary key, time text not null, user_id integer not null references users,
        kind text not null check (kind in ('topup', 'charge', 'refund', 'adjust', 'interrupted')),
        amount_microusd integer not null, balance_microusd integer not null,
        request_id text not null default '', note text not null default '', key text not null unique
    ) strict;
    create index ledger_by_user on ledger (user_id, id);
    create table spent (
        user_id integer not null references users, day text not null, microusd integer not null,
        primary key (user_id, day)
    ) strict, without rowid;
    create table holds (
        id integer primary key, user_id integer not null references users, amount_microusd integer not null,
        floor_microusd integer not null default 0, request_id text not null unique, time text not null
    ) strict;
    create index holds_by_user on holds (user_id);
    create table requests (
        id integer primary key, time text not null, request_id text not null unique, user text not null,
        session text not null, agent text not null, asked text not null, route text not null, provider text not null,
        model text not null, stream integer not null, status integer not null, error text not null,
        attempts integer not null, input_tokens integer not null, output_tokens integer not null,
        cache_read_tokens integer not null, cache_write_tokens integer not null, cache_write_1h_tokens integer not null,
        estimated integer not null, cost_microusd integer, markup_microusd integer, charge_microusd integer not null,
        first_token_ms integer, duration_ms integer not null, stop_reason text not null,
        price text not null, trail text not null
    ) strict;
    create index requests_by_user on requests (user, id);
    create index requests_by_time on requests (time);
    create table calibration (
        provider text not null, model text not null, factor real not null, samples integer not null,
        primary key (provider, model)
    ) strict, without rowid;
    create trigger ledger_in after insert on ledger begin
        update users set balance_microusd = balance_microusd + new.amount_microusd where id = new.user_id;
    end;
    create trigger ledger_spent after insert on ledger when new.kind in ('charge', 'refund', 'interrupted') begin
        insert into spent values (new.user_id, substr(new.time, 1, 10), -new.amount_microusd)
            on conflict do update set microusd = microusd + excluded.microusd;
    end;
    create trigger ledger_fixed before update on ledger begin select raise(abort, 'the ledger is append-only'); end;
    create trigger ledger_kept before delete on ledger begin select raise(abort, 'the ledger is append-only'); end;
    create trigger holds_in after insert on holds begin
        update users set held_microusd = held_microusd + new.amount_microusd where id = new.user_id;
    end;
    create trigger holds_out after delete on holds begin
        update users set held_microusd = held_microusd - old.amount_microusd where id = old.user_id;
    end;
    create trigger holds_fixed before update of user_id, amount_microusd on holds
        begin select raise(abort, 'a hold keeps its amount'); end;
    """,
    "create index if not exists requests_by_session on requests (session);",  # the first schema had it for some days
    """
    alter table holds rename to holds_before;
    create table holds (
        request_id text primary key, user_id integer not null references users, amount_microusd integer not null,
        floor_microusd integer not null default 0, time text not null
    ) strict, without rowid;
    insert into holds select request_id, user_id, amount_microusd, floor_microusd, time from holds_before;
    drop table holds_before;
    create trigger holds_in after insert on holds begin
        update users set held_microusd = held_microusd + new.amount_microusd where id = new.user_id;
    end;
    create trigger holds_out after delete on holds begin
        update users set held_microusd = held_microusd - old.amount_microusd where id = old.user_id;
    end;
    create trigger holds_fixed before update of request_id, user_id, amount_microusd on holds
        begin select raise(abort, 'a hold keeps its amount'); end;
    """,
    "alter table holds add column id text generated always as (request_id) virtual;",  # others may read it by that name
)
WRONG_SUMS = """
    with told as (select user_id, day, microusd from spent),
    found as (
        select user_id, substr(time, 1, 10), -sum(amount_microusd) from ledger
        where kind in ('charge', 'refund', 'interrupted') group by 1, 2
    )
    select 'balance', name from users
    where balance_microusd != (select coalesce(sum(amount_microusd), 0) from ledger where user_id = users.id)
    union all select 'held', name from users
    where held_microusd != (select coalesce(sum(amount_microusd), 0) from holds where user_id = users.id)
    union all select 'spent', name from users where id in (
        select user_id from (select * from told except select * from found)
        union select user_id from (select * from found except select * from told)
    )
"""
SUMS_EVERY = 3600.0  # seconds
SIBLINGS = 8  # with so many requests in flight a commit waits for company, as PostgreSQL's commit_siblings
LINGER = 0.002  # seconds that it waits
CHECKPOINT_EVERY = 100  # commits; a log that is overwritten instead of growing syncs 0.15 ms sooner
SLOW_DISK = 0.005  # seconds: a write that takes as long holds up the event loop
BUSY = 10.0  # seconds that a write waits for another process

BUDGET_COLUMNS = ("day_microusd", "week_microusd", "month_microusd")


@dataclass(frozen=True, slots=True)
class User:
    """Micro-dollars; a budget of None is none."""

    id: int
    name: str
    balance: int
    held: int
    budgets: dict[str, int | None]  # by BUDGET_COLUMNS
    disabled: bool
    created: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Hold:
    request_id: str
    amount: int


@dataclass(slots=True)  # freezing would double what it takes to make one
class Settlement:
    """One client request as the request log keeps it: all that explains its charge. cost None: no known price."""

    request_id: str
    user: str
    status: int
    error: str
    usage: Usage
    charge: int
    cost: int | None = None
    markup: int | None = None
    price: Json | None = None
    session: str = ""
    agent: str = ""
    asked: str = ""
    route: str = ""
    provider: str = ""
    model: str = ""
    stream: bool = False
    attempts: int = 0
    first_token_ms: int | None = None
    duration_ms: int = 0
    stop_reason: str = ""
    trail: list[list[str]] = field(default_factory=list)
    time: str = ""  # when it was settled


USAGE_COLUMNS = (
    "time", "request_id", "user", "session", "agent", "asked", "route", "provider", "model", "stream", "status",
    "error", "attempts", "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens",
    "cache_write_1h_tokens", "estimated", "cost_microusd", "markup_microusd", "charge_microusd", "first_token_ms",
    "duration_ms", "stop_reason",
)  # fmt: skip
REQUEST_COLUMNS = (*USAGE_COLUMNS, "price", "trail")
INSERT_REQUEST = (
    f"insert into requests ({', '.join(REQUEST_COLUMNS)}) values (:{', :'.join(REQUEST_COLUMNS)}) "  # noqa: S608
    "on conflict (request_id) do nothing"
)
MAX_ID = 2**63 - 1  # SQLite's own
TOKEN_COLUMNS = tuple(c for c in USAGE_COLUMNS if c.endswith("_tokens"))
# What of a settlement stands in a column of another name; what of it is text from elsewhere.
OF_SETTLEMENT = {
    **{f"{kind}_microusd": kind for kind in ("cost", "markup", "charge")},
    **{column: f"usage.{column.removesuffix('_tokens')}" for column in (*TOKEN_COLUMNS, "estimated")},
}
usage_values = operator.attrgetter(*(OF_SETTLEMENT.get(c, c) for c in USAGE_COLUMNS))
given_texts = operator.attrgetter(
    "user", "session", "agent", "asked", "route", "provider", "model", "error", "stop_reason"
)


def settlement_row(done: Settlement) -> Json:
    """A settlement as the row of the request log, by the names of its columns."""
    row: Json = dict(zip(USAGE_COLUMNS, usage_values(done), strict=True))
    row |= {"price": compact(done.price).decode(), "trail": compact(done.trail).decode()}
    texts = given_texts(done)
    if {*map(type, texts)} == {str} and "".join(texts).isascii():
        return row
    row["stop_reason"] = done.stop_reason or ""
    return {column: storable(value) for column, value in row.items()}


def storable(value: Any) -> Any:
    """As SQLite takes it: half a surrogate pair (JSON's \\ud800, a byte of a header or terminal) is written out."""
    if value is None or isinstance(value, int):
        return value
    text = str(value)  # an upstream's stop_reason may be anything
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def check_sqlite(version: tuple[int, ...]) -> None:
    """ConfigError where Python was built with a SQLite that knows no strict tables (RHEL 9's, Debian 11's)."""
    if version < (3, 37):
        mine = ".".join(map(str, version))
        raise ConfigError(
            f"this Python has SQLite {mine}, and ccmux needs 3.37 or newer: start it with another Python, or with "
            "`uv run --script ccmux.py`, which brings its own"
        )


def iso(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds and Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def key_hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, sync: bool, patience: float) -> Iterator[None]:
    """All or nothing; waits up to `patience` seconds for another process that writes."""
    if not sync:
        db.execute("pragma synchronous = normal")
    try:
        patiently(lambda: db.execute("begin immediate"), patience)
        yield
        db.execute("commit")
    except BaseException:  # a KeyboardInterrupt leaves nothing half done either
        if db.in_transaction:
            db.execute("rollback")
        raise
    finally:
        if not sync:
            db.execute("pragma synchronous = full")


@dataclass(slots=True)
class Write:
    """One operation on its way to the writer thread."""

    run: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any] | concurrent.futures.Future[Any] | None = None
    keep: bool = False  # tried again until it can be written
    sync: bool = True  # on the disk before anyone is told
    then: Callable[[], None] | None = None  # called once it is written, whoever still waits
    result: Any = None
    error: BaseException | None = None


class Store:
    """The ledger, the users and the request log. Reads on the caller's thread; whoever writes has `writing`."""

    def __init__(self, path: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Opens and migrates the database (made with mode 0600); ConfigError in one line where that fails."""
        check_sqlite(sqlite3.sqlite_version_info)
        self.path, self.now = path, now
        self.lock_file: typing.IO[str] | None = None
        self.thread: threading.Thread | None = None
        self.writing = threading.Lock()
        self.watcher: threading.Thread | None = None
        self.closing = threading.Event()
        self.local = threading.local()
        self.readers: list[sqlite3.Connection] = []
        self.queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self.local_known: tuple[User | None, float] = (None, 0.0)  # the local user, and until when it holds
        self.slow_until, self.slow_for = 0.0, 0.0  # until when the loop writes nothing, and for how long
        self.unchecked = 0  # commits since the last checkpoint
        self.open_holds = 0  # requests that have not settled yet
        try:
            if path != ":memory:" and not os.path.exists(path):
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self.db = self.connect(self.migrate)
        # A UnicodeDecodeError where SQLite's words quote the file.
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"database {path}: {error}; [server] database says where it is") from None

    def connect(self, prepare: Callable[[sqlite3.Connection], None] = lambda db: None) -> sqlite3.Connection:
        """A connection, set up and prepared; closed again where that fails."""
        db = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        try:
            db.row_factory = sqlite3.Row
            # SQLite itself does not wait where another process is switching a new file to write-ahead logging.
            patiently(lambda: db.execute("pragma journal_mode = wal"), BUSY)
            db.execute("pragma synchronous = full")
            db.execute("pragma wal_autocheckpoint = 4000")  # pages: one written often is copied back once
            db.execute("pragma foreign_keys = on")
            db.execute("pragma recursive_triggers = on")  # else `replace` gets past the ledger's triggers
            prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    @property
    def reader(self) -> sqlite3.Connection:
        """A connection of the calling thread's own: a long report in a thread holds up nobody else."""
        if self.path == ":memory:":
            return self.db
        if not hasattr(self.local, "db"):
            self.local.db = self.connect()
            self.readers.append(self.local.db)
        return typing.cast("sqlite3.Connection", self.local.db)

    def migrate(self, db: sqlite3.Connection) -> None:
        """Brings the schema up to date; several processes may be at it at once."""
        while (version := db.execute("pragma user_version").fetchone()[0]) != len(MIGRATIONS):
            if version > len(MIGRATIONS):
                raise ConfigError(f"database {self.path} was written by a newer ccmux; use that one")
            script = f"begin immediate; {MIGRATIONS[version]}; pragma user_version = {version + 1}; commit;"
            try:
                db.executescript(script)
            except sqlite3.Error:
                if db.in_transaction:
                    db.execute("rollback")
                if db.execute("pragma user_version").fetchone()[0] == version:
                    raise  # no other process has done it meanwhile

    # The server's side: one writer, and what a crash left behind.

    def open_server(self) -> None:
        """Takes the lock of the one server, settles what a crash left, starts the writer and the sums' watch.

        ConfigError where another server has the database, or it cannot be written.
        """
        if self.path != ":memory:":
            self.lock_file = lock(os.path.realpath(self.path) + ".lock")
            self.watcher = threading.Thread(target=self.watch_sums, name="ccmux-sums", daemon=True)
        try:
            self.recover()
        except sqlite3.Error as error:
            raise ConfigError(f"database {self.path} cannot be written: {error}") from None
        if self.watcher:
            self.watcher.start()
        # The writer copies back and waits; on this connection SQLite would do so on the event loop, too.
        self.db.execute("pragma wal_autocheckpoint = 0")
        self.db.execute("pragma busy_timeout = 0")
        self.thread = threading.Thread(target=self.write_forever, name="ccmux-store", daemon=True)
        self.thread.start()

    def recover(self) -> None:
        """Each hold that a dead server left becomes an `interrupted` entry for its floor."""
        with self.transaction():
            query = "select request_id, name, floor_microusd from holds join users on users.id = user_id"
            for request_id, user, floor in self.db.execute(query).fetchall():
                usage, time = Usage(estimated=True), iso(self.now())
                done = Settlement(request_id, user, 499, "interrupted", usage, floor, time=time)
                self.write_settlement(self.db, done, "interrupted")

    @contextlib.contextmanager
    def transaction(self, sync: bool = True, patience: float | None = None) -> Iterator[None]:
        with self.writing, transaction(self.db, sync, BUSY if patience is None else patience):
            self.unchecked += 1
            yield

    def write_forever(self) -> None:
        """The writer thread: takes all that waits, commits it as one, then tells those who wait for it."""
        kept: list[Write] = []
        while True:
            try:
                first = self.queue.get(timeout=0.5 if kept else None)
            except queue.Empty:
                kept = self.retry(kept)
                continue
            if self.open_holds >= SIBLINGS:
                time.sleep(LINGER)  # others are about to write: one commit for all of them
            batch, open_end = self.take_waiting(first)
            kept = self.retry(kept) + self.write_batch(batch)
            self.checkpoint()
            if not open_end:
                self.retry(kept)
                return

    def checkpoint(self) -> None:
        """Now and then copies the write-ahead log back; what readers or a full disk prevent is done the next time."""
        if self.unchecked >= CHECKPOINT_EVERY:
            try:
                with self.writing:
                    self.unchecked = 0
                    self.db.execute("pragma wal_checkpoint(passive)")
            except sqlite3.Error as error:
                log.warning("the write-ahead log of %s could not be copied back: %s", self.path, error)

    def retry(self, kept: list[Write]) -> list[Write]:
        """Tries again what could not be written; the first that still cannot keeps those behind it waiting."""
        for at, write in enumerate(kept):
            if self.write_each([write], BUSY):
                return kept[at:]
        return []

    def take_waiting(self, first: Write | None) -> tuple[list[Write], bool]:
        """What is on the queue, and whether more may come: a None on it ends it."""
        batch: list[Write] = []
        item = first
        while item is not None:
            batch.append(item)
            if len(batch) == 512 or self.queue.empty():
                return batch, True
            item = self.queue.get()
        return batch, False

    def write_batch(self, batch: list[Write]) -> list[Write]:
        """Writes a batch in one transaction, or, where that fails, one by one; returns what must be tried again."""
        try:
            with self.transaction(sync=any(write.sync for write in batch)):
                for write in batch:
                    self.attempt(write)
        except Exception as error:  # whatever it is, the writer must live on
            patience = 0.0 if is_busy(error) else BUSY  # all of them have waited already
            return self.write_each(batch, patience)
        tell(batch)
        return []

    def attempt(self, write: Write) -> None:
        """One operation inside a transaction. A refusal leaves others in it alone: it comes before anything is written."""
        try:
            write.result, write.error = write.run(self.db), None
        except ApiError as error:
            write.error = error

    def write_each(self, batch: list[Write], patience: float) -> list[Write]:
        """Writes operations one by one; returns those that cannot be written now and must not be lost."""
        kept = []
        for write in batch:
            try:
                with self.transaction(write.sync, patience):
                    self.attempt(write)
            except Exception as error:  # whatever it is, those behind it are written, and `error` is told
                if write.keep and isinstance(error, sqlite3.OperationalError):  # full, locked, read-only
                    kept.append(write)
                    continue
                if write.keep:
                    log.exception("a settlement cannot be written")
                write.error = error
            tell([write])
        return kept

    def put(
        self,
        run: Callable[[sqlite3.Connection], Any],
        *,
        keep: bool = False,
        sync: bool = True,
        then: Callable[[], None] | None = None,
    ) -> asyncio.Future[Any]:
        """Writes at once, else queues what is to be written; the future resolves when it is."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        write = Write(run, future, keep, sync, then)
        if self.at_once(write):
            resolve_all([write])
        else:
            self.queue.put(write)
        return future

    def at_once(self, write: Write) -> bool:
        """Writes on the event loop's thread: to wake the writer takes longer than that.

        False where the queue is the better place: others would write too (or wait for the sync), somebody is writing
        just now, the disk was slow, or it cannot be written.
        """
        began = time.monotonic()
        if self.open_holds >= (1 if write.sync else SIBLINGS) or began < self.slow_until:
            return False
        if not self.writing.acquire(blocking=False):
            return False
        try:
            with transaction(self.db, write.sync, patience=0):
                self.attempt(write)
            return True
        except Exception:  # the writer tries again, and tells
            return False
        finally:
            self.unchecked += 1
            self.writing.release()
            self.note_pace(time.monotonic() - began)
            if self.unchecked % CHECKPOINT_EVERY == 0:
                self.queue.put(Write(lambda db: None, sync=False))  # wakes the writer, who looks

    def note_pace(self, seconds: float) -> None:
        """After a slow write the event loop writes nothing for a second, after the next for two, up to a minute."""
        if seconds < SLOW_DISK:
            self.slow_for = 0.0
        else:
            self.slow_for = min(2 * self.slow_for or 1.0, 60.0)
            self.slow_until = time.monotonic() + self.slow_for

    def do(self, run: Callable[[sqlite3.Connection], Any]) -> Any:
        """An operation of the command line or the admin page: done when this returns."""
        if self.thread is None:
            with self.transaction():
                return run(self.db)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.queue.put(Write(run, future))
        while not concurrent.futures.wait([future], 1).done:
            if not self.thread.is_alive() and not future.done():
                raise sqlite3.OperationalError("the database is closed")
        return future.result()

    def close(self, timeout: float = 10) -> None:
        """Writes what waits, copies the write-ahead log back as far as it can be, gives the lock back."""
        self.closing.set()
        if self.thread:
            self.queue.put(None)
            self.thread.join(timeout)
        for reader in list(self.readers):
            reader.interrupt()
        if self.watcher and self.watcher.is_alive():
            self.watcher.join(timeout)
        for reader in self.readers:
            reader.close()
        if self.lock_file:
            # `db.close` does it only where nobody else has the file open, a database browser, say.
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("pragma wal_checkpoint(passive)")
        self.db.close()
        if self.lock_file:
            self.lock_file.close()

    # Holds and settlements.

    async def hold(
        self, user_id: int, request_id: str, amount: int, *, enforce: bool, max_concurrent: int
    ) -> Hold:
        """Sets credit aside for a request; ApiError 402 without funds, 429 for a budget or too many at once."""
        is_given_up = False

        def run(db: sqlite3.Connection) -> None:
            if is_given_up:  # its settlement was not queued behind it, perhaps, but written already
                return
            if enforce:
                self.check_funds(db, user_id, amount, max_concurrent)
            db.execute(
                "insert into holds (request_id, user_id, amount_microusd, time) values (?, ?, ?, ?)",
                (request_id, user_id, amount, iso(self.now())),
            )

        self.open_holds += 1
        try:
            await self.put(run, sync=False)
        except (sqlite3.Error, OverflowError) as error:  # the latter: an amount beyond SQLite's integers
            raise cannot_write(error) from None
        except asyncio.CancelledError:
            is_given_up = True
            raise
        return Hold(request_id, amount)

    def check_funds(self, db: sqlite3.Connection, user_id: int, amount: int, max_concurrent: int) -> None:
        row = db.execute("select * from users where id = ?", (user_id,)).fetchone()
        free = row["balance_microusd"] - row["held_microusd"]
        if free < amount or free <= 0:
            text = (
                f"credits used up: {money(free)} are free and this request may cost {money(amount)}. "
                "Ask whoever runs this ccmux for credit, or ask for a cheaper model"
            )
            raise ApiError(402, text, should_retry=False, cause="no_credit")
        now = self.now()
        for name, start, end in periods(now):
            budget = row[f"{name}_microusd"]
            if budget is not None and (spent := spent_since(db, user_id, start)) >= budget:
                text = (
                    f"the {name}'s budget of {money(budget)} is used up ({money(spent)} spent). "
                    f"It resets at {end:%Y-%m-%d %H:%M} UTC; ask whoever runs this ccmux to raise it"
                )
                raise ApiError(
                    429, text, type="billing_error", retry_after=(end - now).total_seconds(),
                    should_retry=False, cause="budget",
                )  # fmt: skip
        (busy,) = db.execute("select count(*) from holds where user_id = ?", (user_id,)).fetchone()
        if busy >= max_concurrent:
            text = f"{busy} requests at once are the limit; wait for one to end"
            raise ApiError(429, text, retry_after=1, cause="busy")

    def answered(self, hold: Hold, floor: int) -> None:
        """The upstream has begun to answer, or (floor 0) failed to: from now on a crash charges `floor`."""
        query = "update holds set floor_microusd = ? where request_id = ?"
        self.put(lambda db: db.execute(query, (floor, hold.request_id)), sync=False)

    def settle(self, done: Settlement, then: Callable[[], None] | None = None) -> asyncio.Future[None]:
        """The one settlement of a request, without waiting; what cannot be written is kept until it can."""
        self.open_holds -= 1
        done.time = iso(self.now())
        return self.put(lambda db: self.write_settlement(db, done, "charge"), keep=True, then=then)

    def write_settlement(self, db: sqlite3.Connection, done: Settlement, kind: str) -> None:
        """Takes the hold away, enters the charge and the request's row; a second time changes nothing."""
        db.execute("delete from holds where request_id = ?", (done.request_id,))
        new = db.execute(INSERT_REQUEST, settlement_row(done)).rowcount
        if new and (done.charge or kind == "interrupted"):
            key = f"request:{done.request_id}"
            enter(db, done.user, kind, -done.charge, done.time, key, request_id=done.request_id)

    # Users.

    def authenticate(self, key: str) -> User | None:
        """The user a key belongs to. Looked up by hash, so no time tells how much of a key was right."""
        if not KEY_FORM.fullmatch(key):
            return None
        query = "select users.* from keys join users on id = user_id where hash = ?"
        row = self.reader.execute(query, (key_hash(key),)).fetchone()
        return user_of(row) if row else None

    def local_user(self) -> User:
        """The user of those who need no key, made at first use, and read anew once a second."""
        known, until = self.local_known
        if known is not None and time.monotonic() < until:
            return known
        try:
            user = self.user(LOCAL_USER) or self.do(lambda db: self.make_user(db, LOCAL_USER, {}, ""))
        except sqlite3.Error as error:
            raise cannot_write(error) from None
        self.local_known = (user, time.monotonic() + 1)
        return user

    def make_user(
        self, db: sqlite3.Connection, name: str, budgets: Mapping[str, int | None], note: str
    ) -> User:
        db.execute(
            f"insert into users (name, note, created, {', '.join(BUDGET_COLUMNS)}) values (?, ?, ?, ?, ?, ?) "  # noqa: S608
            "on conflict (name) do nothing",
            (name, storable(note), iso(self.now()), *map(budgets.get, BUDGET_COLUMNS)),
        )
        return user_of(db.execute("select * from users where name = ?", (name,)).fetchone())

    def add_user(
        self, name: str, credit: int = 0, budgets: Mapping[str, int | None] | None = None, note: str = ""
    ) -> tuple[User, str]:
        """A new user and the key, which is not kept; ConfigError for a bad or taken name."""
        if not USER_NAME.fullmatch(name) or name == LOCAL_USER:
            rule = f"use 1 to 64 letters, digits or . _ @ - (and not {LOCAL_USER!r})"
            raise ConfigError(f"user name {name!r}: {rule}")
        if credit < 0:
            raise ConfigError(f"first credit {money(credit)}: it cannot be below 0")
        key = new_key()

        def run(db: sqlite3.Connection) -> None:
            # Here, as two may ask at once.
            if db.execute("select 1 from users where name = ?", (name,)).fetchone():
                raise ConfigError(f"user {name!r} is there already")
            user = self.make_user(db, name, budgets or {}, note)
            db.execute("insert into keys values (?, ?)", (key_hash(key), user.id))
            if credit:
                enter(db, name, "topup", credit, iso(self.now()), f"start:{name}", note="first credit")

        self.do(run)
        return self.known(name), key

    def rotate_key(self, name: str) -> str:
        """A new key for a user; the old one stops working."""
        user, key = self.known(name), new_key()

        def run(db: sqlite3.Connection) -> None:
            db.execute("delete from keys where user_id = ?", (user.id,))
            db.execute("insert into keys values (?, ?)", (key_hash(key), user.id))

        self.do(run)
        return key

    def set_budgets(self, name: str, budgets: Mapping[str, int | None]) -> User:
        """Budgets by column; what is not named stays."""
        user = self.known(name)

        def run(db: sqlite3.Connection) -> None:
            for column in budgets.keys() & {*BUDGET_COLUMNS}:
                db.execute(f"update users set {column} = ? where id = ?", (budgets[column], user.id))  # noqa: S608

        self.do(run)
        return self.known(name)

    def set_disabled(self, name: str, disabled: bool) -> User:
        user = self.known(name)
        self.do(lambda db: db.execute("update users set disabled = ? where id = ?", (int(disabled), user.id)))
        return self.known(name)

    def credit(self, name: str, amount: int, note: str = "", key: str = "") -> User:
        """Adds credit, or takes it back where negative. The same key twice is one entry; ConfigError where the
        entry there is of another amount.
        """
        self.known(name)
        kind = "topup" if amount >= 0 else "adjust"
        once = f"credit:{name}:{key or secrets.token_hex(16)}"
        self.do(lambda db: enter(db, name, kind, amount, iso(self.now()), once, note=note))
        query = "select amount_microusd from ledger where key = ?"
        (entered,) = self.reader.execute(query, (once,)).fetchone()
        if entered != amount:
            there = f"{entered / 1e6:.2f} dollars were entered already"
            raise ConfigError(f"{there} by this form; nothing more is changed")
        return self.known(name)

    def user(self, name: str) -> User | None:
        row = self.reader.execute("select * from users where name = ?", (storable(name),)).fetchone()
        return user_of(row) if row else None

    def known(self, name: str) -> User:
        """The user of that name; ConfigError naming the nearest where there is none."""
        user = self.user(name)
        if user is None:
            raise ConfigError(f"no user {name!r}: {known_names(name, [u.name for u in self.users()])}")
        return user

    def users(self) -> list[User]:
        return [user_of(row) for row in self.reader.execute("select * from users order by name")]

    def user_json(self, user: User) -> Json:
        """The user shape of the JSON endpoints."""
        today, week, month = (spent_since(self.reader, user.id, start) for _, start, _ in periods(self.now()))
        return {
            "name": user.name, "balance_microusd": user.balance, "held_microusd": user.held,
            "spent_today_microusd": today, "spent_week_microusd": week, "spent_month_microusd": month,
            "budgets": user.budgets, "disabled": user.disabled, "created": user.created, "note": user.note,
        }  # fmt: skip

    def budget_headers(self, user: User) -> dict[str, str]:
        """For users with a budget, so that Claude Code can show how much is left."""
        if set(user.budgets.values()) == {None}:
            return {}
        used = [
            (spent_since(self.reader, user.id, start) / max(budget, 1), end)
            for name, start, end in periods(self.now())
            if (budget := user.budgets[f"{name}_microusd"]) is not None
        ]
        share, end = max(used, key=lambda pair: pair[0])
        status = "rejected" if share >= 1 else "allowed_warning" if share >= 0.8 else "allowed"
        return {
            "anthropic-ratelimit-unified-status": status,
            "anthropic-ratelimit-unified-reset": str(int(end.timestamp())),
            "anthropic-ratelimit-unified-utilization": f"{min(share, 1):.4f}",
        }

    # Lists, reports, exports.

    def transactions(self, name: str, limit: int = 50, before: int = 0) -> list[Json]:
        """Ledger rows of a user, newest first; `before` is an id."""
        rows = self.reader.execute(
            "select l.id, time, kind, amount_microusd, l.balance_microusd, request_id, l.note "
            "from ledger l join users u on u.id = user_id where name = ? and l.id < ? order by l.id desc limit ?",
            (name, before or MAX_ID, limit),
        )
        return [dict(row) for row in rows]

    def requests(self, name: str | None = None, limit: int = 50, before: int = 0) -> list[Json]:
        """Rows of the request log, newest first, of one user or of all; with id, price and trail."""
        where, values = within("", "", name)
        rows = self.reader.execute(
            f"select * from requests where {where} and id < ? order by id desc limit ?",  # noqa: S608
            (*values, before or MAX_ID, limit),
        )
        parsed = ("price", "trail")
        return [{**usage_row(r), "id": r["id"], **{c: json.loads(r[c]) for c in parsed}} for r in rows]

    def report(
        self, by: str, since: str = "", until: str = "", user: str | None = None,
        as_if: Callable[[Usage], int] | None = None,
    ) -> list[Json]:  # fmt: skip
        """What requests cost, grouped by user, model, provider, day, month, session or agent; micro-dollars.

        `unpriced` counts the requests without a known price; their cost is not in the sums. since <= time < until.
        `as_if_microusd` is the sum of what `as_if` would have charged, where it is given.
        """
        if by not in REPORT_KEYS:
            raise ConfigError(f"report by {by!r}: {known_names(by, REPORT_KEYS)}")
        summed = (*TOKEN_COLUMNS, "charge_microusd", "cost_microusd", "markup_microusd")
        sums = ", ".join(f"coalesce(sum({c}), 0) as {c}" for c in summed)
        where, values = within(since, until, user)
        rows = self.reader.execute(
            f"select {REPORT_KEYS[by]} as key, count(*) as requests, {sums}, "  # noqa: S608
            "sum(cost_microusd is null) as unpriced, sum(estimated) as estimated, "
            "cast(avg(first_token_ms) as integer) as first_token_ms, sum(duration_ms) as duration_ms "
            f"from requests where {where} group by key order by "
            + ("key" if by in ("day", "month") else "charge_microusd desc, requests desc"),
            values,
        )
        if as_if is None:
            return [dict(row) for row in rows]
        query = f"select {REPORT_KEYS[by]}, {', '.join(TOKEN_COLUMNS)} from requests where {where}"  # noqa: S608
        charges: Counter[str] = Counter()
        for key, *tokens in self.reader.execute(query, values):
            charges[key] += as_if(Usage(*tokens))
        return [{**dict(row), "as_if_microusd": charges[row["key"]]} for row in rows]

    def export(self, since: str = "", until: str = "", user: str | None = None) -> Iterator[Json]:
        """Usage rows, oldest first."""
        where, values = within(since, until, user)
        rows = self.reader.execute(f"select * from requests where {where} order by id", values)  # noqa: S608
        return map(usage_row, rows)

    # Soundness.

    def sums_problem(self) -> str:
        """Which sum is not what its rows say; "" where all are sound."""
        wrong = self.reader.execute(WRONG_SUMS)  # one statement, so all of it is of one moment
        return "; ".join(f"{what} of user {name} differs from its rows" for what, name in wrong)

    def watch_sums(self) -> None:
        """A thread of the server's: checks the sums at start and every hour, and says so where one differs."""
        while not self.closing.is_set():
            try:
                if problem := self.sums_problem():
                    log.error("the ledger is not sound: %s", problem)
            except sqlite3.Error as error:
                if not self.closing.is_set():
                    log.error("the ledger's sums cannot be checked: %s", error)
            self.closing.wait(SUMS_EVERY)

    def backup(self, path: str) -> None:
        """A consistent copy while the server runs; mode 0600."""
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600))
        try:
            with contextlib.closing(sqlite3.connect(path)) as copy:
                self.reader.backup(copy)
                verdict = copy.execute("pragma integrity_check").fetchone()[0]
            if verdict != "ok":
                raise ConfigError(f"the backup {path} is not sound: {verdict}")
        except BaseException as error:  # an interrupt leaves half a copy, too
            for left in (path, f"{path}-journal"):  # it looks whole, and is in the next one's way
                Path(left).unlink(missing_ok=True)
            if isinstance(error, sqlite3.Error):
                raise ConfigError(f"the backup {path} could not be written: {error}") from None
            raise

    def load_calibration(self) -> list[tuple[str, str, float, int]]:
        rows = self.reader.execute("select provider, model, factor, samples from calibration")
        return [tuple(row) for row in rows]

    def save_calibration(self, rows: Iterable[tuple[str, str, float, int]]) -> None:
        """Puts these in the place of all that were kept."""
        given = [(storable(provider), storable(model), *learnt) for provider, model, *learnt in rows]

        def work(db: sqlite3.Connection) -> None:
            db.execute("delete from calibration")
            db.executemany("insert or replace into calibration values (?, ?, ?, ?)", given)

        self.do(work)


REPORT_KEYS = {
    "user": "user", "model": "model", "provider": "provider", "session": "session", "agent": "agent",
    "day": "substr(time, 1, 10)", "month": "substr(time, 1, 7)",
}  # fmt: skip


def patiently(run: Callable[[], object], seconds: float) -> None:
    """Tries again for so many seconds while another process has the database."""
    end = time.monotonic() + seconds
    while True:
        try:
            run()
            return
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() >= end:
                raise
        time.sleep(0.005)


def is_busy(error: Exception) -> bool:
    """Whether another process has the database, whatever the upper bits of the code say of why."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def cannot_write(error: Exception) -> ApiError:
    """For a request that must not go on, as its cost could not be written down."""
    log.error("the ledger could not be written: %s", error)
    text = "ccmux cannot write its ledger (is the disk full?); nothing was sent to a provider"
    return ApiError(529, text, retry_after=30, cause="store")


def tell(batch: list[Write]) -> None:
    """Resolves the futures of what was written; those of the event loop with one call into it."""
    awaited, loop = [], None
    for write in batch:
        if isinstance(write.future, asyncio.Future):
            awaited.append(write)
            loop = write.future.get_loop()
        else:
            resolve_all([write])
    if loop:
        with contextlib.suppress(RuntimeError):  # it has ended, and nobody waits any more
            loop.call_soon_threadsafe(resolve_all, awaited)


def resolve_all(writes: list[Write]) -> None:
    for write in writes:
        if write.then and not write.error:
            write.then()
        if write.future is None or write.future.done():
            continue
        if write.error:
            write.future.set_exception(write.error)
            write.future.exception()  # settlements are often waited for by nobody
        else:
            write.future.set_result(write.result)


def enter(
    db: sqlite3.Connection,
    name: str,
    kind: str,
    amount: int,
    moment: str,
    key: str,
    request_id: str = "",
    note: str = "",
) -> None:
    """One ledger entry, where there is such a user; the same key again changes nothing."""
    # Not `insert ... select`: for that SQLite builds a table first, as the ledger's triggers change what it reads.
    user = db.execute("select id, balance_microusd from users where name = ?", (name,)).fetchone()
    if user:
        db.execute(
            "insert into ledger (time, user_id, kind, amount_microusd, balance_microusd, request_id, note, key) "
            "values (?, ?, ?, ?, ?, ?, ?, ?) on conflict (key) do nothing",
            (
                moment,
                user["id"],
                kind,
                amount,
                user["balance_microusd"] + amount,
                request_id,
                storable(note),
                key,
            ),
        )


def lock(path: str) -> typing.IO[str]:
    """An exclusive lock that ends with the process; ConfigError naming the pid that has it, or why there is none."""
    file = os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+")
    try:
        if sys.platform == "win32":
            import msvcrt

            # A byte far behind the text: Windows lets nobody read a locked one, and the pid is to be read.
            os.lseek(file.fileno(), 2**20, os.SEEK_SET)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file.fileno(), 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = f"cannot be locked ({error.strerror}): [server] database must be on a disk of this machine"
        if isinstance(error, (BlockingIOError, PermissionError)):  # the latter on Windows
            why = f"is in use by ccmux with pid {file.read().strip()}"
        file.close()
        raise ConfigError(f"database {path.removesuffix('.lock')} {why}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


KEY_FORM = re.compile(r"ccmux-[A-Za-z0-9_-]{32}")  # other texts need no look-up


def new_key() -> str:
    """A user's key: 192 random bits. Only its hash is kept."""
    return f"ccmux-{secrets.token_urlsafe(24)}"


def user_of(row: sqlite3.Row) -> User:
    return User(
        row["id"], row["name"], row["balance_microusd"], row["held_microusd"],
        {column: row[column] for column in BUDGET_COLUMNS}, bool(row["disabled"]), row["created"], row["note"],
    )  # fmt: skip


def within(since: str, until: str, user: str | None = None) -> tuple[str, list[str]]:
    """A condition on requests, and its values; of given limits only, as no index serves a condition on all."""
    limits = {"time >= ?": since, "time < ?": until, "user = ?": user}
    given = {clause: value for clause, value in limits.items() if value}
    return " and ".join(["true", *given]), list(map(storable, given.values()))


def usage_row(row: sqlite3.Row) -> Json:
    flags = {name: bool(row[name]) for name in ("stream", "estimated")}
    return {**{name: row[name] for name in USAGE_COLUMNS}, **flags}


def periods(now: datetime) -> list[tuple[str, datetime, datetime]]:
    """(name, start, end) of the day, the week from Monday and the month that a UTC moment is in."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    week, month = day - timedelta(days=day.weekday()), day.replace(day=1)
    next_month = (month + timedelta(days=32)).replace(day=1)
    return [
        ("day", day, day + timedelta(days=1)), ("week", week, week + timedelta(days=7)), ("month", month, next_month),
    ]  # fmt: skip


def spent_since(db: sqlite3.Connection, user_id: int, start: datetime) -> int:
    query = "select coalesce(sum(microusd), 0) from spent where user_id = ? and day >= ?"
    return int(db.execute(query, (user_id, f"{start:%Y-%m-%d}")).fetchone()[0])


def money(microdollars: int) -> str:
    """Micro-dollars for a person."""
    dollars, rest = divmod(abs(microdollars), 10**6)
    decimals = f"{rest:06}".rstrip("0").ljust(2, "0")
    return f"{'-' if microdollars < 0 else ''}${dollars}.{decimals}"


def csv_text(rows: Iterable[Json], columns: Iterable[str]) -> str:
    """Rows as CSV. Texts that a spreadsheet would take for a formula get a leading apostrophe."""
    names = list(columns)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(names)
    writer.writerows([csv_cell(row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


# ----------------------------------------------------------------------------------------------------------
# Upstream (I/O)
# ----------------------------------------------------------------------------------------------------------
# Envoy's and nginx's promises are the standard: never retry once content has gone out, one deadline over all
# tries, budgets so that retries cannot multiply, exactly one probe of a half-open breaker. RELIABILITY in the
# README tells which failure goes where.

MOST_KEPT = 10_000  # entries of a table whose keys clients choose
MAX_TRIES = 4  # of one client request, all targets together
MAX_SLEEP = 15.0  # seconds of back-off of one client request
SHORT_WAIT = 5.0  # a retry-after up to this is waited for on the same target
KEY_COOLING = 300.0  # seconds that a refused key rests
MAX_ERROR_BODY = 2**20
LAST_BYTES = 1.0  # seconds after an answer's last event for what ends it, else its connection serves no other
LARGE = 2**18  # bytes of a request between whose steps others have their turn
MAX_ANSWER = 64 * 2**20  # bytes of an answer that the client gets as a whole, or before a stream has content
RATE_WAIT = 1.0  # a 429 that does not say how long


@dataclass(slots=True)
class Breaker:
    """Opens when a (provider, model, key) keeps failing. Half-open, it lets one probe through; the others follow once
    that has content, as an answer may take minutes. Times are handed in.
    """

    failures: int = 0  # in a row
    recent: deque[tuple[float, bool]] = field(default_factory=deque)  # (time, ok) of the last minute
    bad: int = 0  # failures among them
    opened: float = 0.0  # when
    open_until: float = 0.0
    interval: float = 0.0  # of the last opening; 0 when closed
    probe: Call | None = None  # the request that finds out whether all is well again

    def state(self, now: float) -> str:
        if not self.interval:
            return "closed"
        return "open" if now < self.open_until else "half-open"

    def allows(self, now: float) -> bool:
        """Whether a request may go now."""
        is_probed = self.probe is not None and not self.probe.first_content
        return not self.interval or (now >= self.open_until and not is_probed)

    def begin(self, now: float, call: Call) -> None:
        """Takes the probe's place where one is due."""
        if self.state(now) == "half-open" and self.probe is None:
            self.probe = call

    def leave(self, call: Call) -> None:
        """Gives up the probe's place, if the request has it."""
        if self.probe is call:
            self.probe = None

    def record(self, call: Call, began: float, now: float, ok: bool) -> None:
        """Notes how a try ended. While it is not closed, a try from before the opening, or a failure beside the
        probe's, teaches nothing new.
        """
        is_probe = self.probe is call
        self.leave(call)
        if self.interval and not is_probe and (began < self.opened or not ok):
            return
        self.failures = 0 if ok else self.failures + 1
        self.interval = 0.0 if ok else self.interval
        self.recent.append((now, ok))
        self.bad += not ok
        while self.recent[0][0] < now - 60:
            self.bad -= not self.recent.popleft()[1]
        often = len(self.recent) >= 10 and self.bad * 2 >= len(self.recent)
        if not ok and (is_probe or self.failures >= 5 or often):
            self.trip(now)

    def trip(self, now: float) -> None:
        self.interval = min(self.interval * 2, 300.0) if self.interval else 10.0
        self.opened = now
        self.open_until = now + self.interval * random.uniform(0.9, 1.1)  # noqa: S311
        self.recent.clear()
        self.bad = 0


@dataclass(slots=True)
class Health:
    """What is known of one provider: for the admin page, /health, the retry budget and the concurrency cap."""

    active: int = 0
    retrying: int = 0  # requests between a failed try and the next one's first content
    outcomes: deque[Json] = field(default_factory=lambda: deque(maxlen=50))
    next_key: int = 0  # where the rotation of its key pool stands

    def may_retry(self) -> bool:
        return self.retrying < max(3, self.active // 5)

    def last_fault(self) -> int:
        return next((outcome["status"] for outcome in reversed(self.outcomes) if not outcome["ok"]), 0)


@dataclass(slots=True)
class Call:
    """One client request on its way: what came, where it goes, and what became of it so far."""

    request_id: str
    body: Json  # {} once content is out, where `raw` is kept
    raw: bytes  # the client's own bytes of `body`; b"" where routing changed it
    headers: Mapping[str, str]  # lower-case names
    route: Route
    config: Config
    stream: bool
    asked: str = ""  # the model's name as the client wrote it
    format: str = "anthropic"  # of the client: anthropic or chat
    session: str = ""
    tokens: int = 0  # input, counted or (is_counted false) told from the request's size
    is_counted: bool = False
    count: Callable[[], Coroutine[Any, Any, int]] | None = None  # of the input, until it begins
    counting: asyncio.Task[int] | None = None  # where only the answer needs the count
    query: str = ""
    credential: str = ""  # the client's own, for passthrough providers
    chat: Json = field(default_factory=dict)  # what an OpenAI-format client sent
    unserved: ApiError | None = None  # why that can only go to an upstream of the same format
    wants_usage: bool = False  # an OpenAI-format client that asked for usage in its stream
    on_answer: Callable[[], None] = lambda: None  # the upstream has accepted the request
    on_failure: Callable[[], None] = lambda: None  # and has answered nothing that the client got
    on_raw: Callable[[str, bytes], None] | None = None  # the inspect recorder
    # What became of it:
    target: Target | None = None
    attempts: list[Json] = field(default_factory=list)
    tries: int = 0
    is_passed_on: bool = False  # the last try sent what an OpenAI-format client wrote, but for its parameters
    reader: Reader | None = None
    started: float = field(default_factory=time.monotonic)
    is_answered: bool = False  # the last try has an answer so far, and not one that failed
    first_content: float = 0.0
    reply_headers: dict[str, str] = field(default_factory=dict)
    watch: Watch | None = None
    retries_at: Health | None = None  # the provider in whose retry budget this request counts just now

    @property
    def has_answered(self) -> bool:
        """Whether content has reached the client; a client that does not stream gets all or nothing."""
        return self.stream and bool(self.first_content)

    def passes(self, dialect: Dialect) -> bool:
        """Whether the upstream gets what the client wrote, in their common format. An OpenAI-format request that routing
        has changed, or that is half Anthropic's, is translated.
        """
        if self.format == "chat" and (self.route.body or has_anthropic_tools(self.chat)):
            return False
        return dialect.passes == self.format

    def end_retry(self) -> None:
        """The retry has failed, has content, or will not be."""
        if self.retries_at:
            self.retries_at.retrying -= 1
            self.retries_at = None

    def begin_count(self) -> None:
        """Counts the input while its answer is awaited."""
        if self.count:
            self.counting = asyncio.create_task(self.count())
            self.count = None  # it holds the body

    async def end_count(self) -> None:
        """Waits for the count; no provider is blamed for what that takes."""
        if self.counting and not self.is_counted and self.watch:
            limit, what = self.watch.limit, self.watch.what
            self.watch.wait(math.inf, "")
            self.tokens, self.is_counted = await self.counting, True
            self.watch.wait(limit, what)

    def stop(self) -> None:
        """Ends the request now, with an error: the server shuts down."""
        if self.watch:
            self.watch.end(STOPPED)


Reader = AnthropicTap | AnthropicWhole | ChatTap | Translation  # what reads one upstream answer


class ClientGoneError(Exception):
    """The client's connection broke while something was written to it; nobody's fault."""


class Sink(typing.Protocol):
    """Where a streamed answer goes. ClientGoneError when nobody is there any more.

    `begin` sends the head of a 200. `write_now` writes where there is nothing to wait for; false, and nothing is
    written, where the client is behind.
    """

    async def begin(self) -> None: ...
    async def write(self, data: bytes) -> None: ...
    def write_now(self, data: bytes) -> bool: ...


@dataclass(slots=True)
class Slot:
    """One thing to try: a target with one of its provider's keys."""

    target: Target
    provider: Provider
    key: str = field(repr=False)
    place: tuple[str, str] = field(init=False)  # provider, model
    id: tuple[str, str, str] = field(init=False)  # the place, and the key's

    def __post_init__(self) -> None:
        self.place = (self.provider.name, self.target.actual_model)
        self.id = (*self.place, key_id(self.key))


@functools.lru_cache(1024)
def key_id(key: str) -> str:
    """A key's name in memory and logs that is not the key."""
    return hashlib.sha256(key.encode()).hexdigest()[:8] if key else "-"


TOTAL, STOPPED = "total", "shutdown"  # what ends a request as a whole


class Watch:
    """Cancels a request's task where something it waits for, or all of it, takes too long.

    One for all of a request, with one timer that looks now and then: a byte costs no timer, and a try no scope.
    """

    def __init__(self, tick: float, total: float) -> None:
        self.loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self.task, self.cancelling = task, task.cancelling()
        self.tick, self.until = tick, self.loop.time() + total
        self.limit, self.last, self.what = math.inf, 0.0, ""
        self.over = ""  # what took too long, once it has cancelled the task for that
        self.timer = self.loop.call_later(min(tick, total), self.look)

    def wait(self, limit: float, what: str) -> None:
        """From now on, `what` may take `limit` seconds, or up to a tick longer: the next look takes the time."""
        self.limit, self.what, self.last = limit, what, 0.0
        if limit < self.tick:
            self.last = self.loop.time()
            self.look_in(limit)

    def look(self) -> None:
        now = self.loop.time()
        self.last = self.last or now
        if now >= self.until:
            self.end(TOTAL)
        elif now >= self.last + self.limit:
            self.end(self.what)
        else:
            self.look_in(min(self.tick, self.last + self.limit - now, self.until - now))

    def look_in(self, seconds: float) -> None:
        self.timer.cancel()
        self.timer = self.loop.call_later(max(seconds, 0.001), self.look)

    def end(self, what: str) -> None:
        self.over = what
        self.task.cancel()

    def take_back(self) -> str:
        """After a CancelledError: what took too long; "" where somebody else has cancelled the task. It watches on."""
        if not self.over or self.task.uncancel() > self.cancelling:
            return ""
        what, self.over = self.over, ""
        self.look_in(self.tick)
        return what

    def close(self) -> None:
        self.timer.cancel()


class Chunks:
    """Where the HTTP chunks of a response begin, so that aiohttp's Python need not be gone through for each.

    A fast stream brings hundreds of events at once, each in a chunk: a third of what the whole request costs. Nothing
    is held back, and where it is not certain where a chunk begins, all goes on as it came.
    """

    def __init__(self, next: int | None = 0) -> None:
        self.has_head = False
        self.next = next  # where in the coming bytes a chunk begins, first of all the head; None is not known any more

    def content(self, data: bytes) -> bytes | None:
        """What the next bytes behind the head hold where they are whole chunks, which aiohttp need not see; else None."""
        if self.next != 0:
            return None
        content, rest = whole_chunks(data) or (b"", data)
        return None if rest else content

    def joined(self, data: bytes) -> bytes:
        """The next bytes for aiohttp, with the same content in fewer chunks, or as they are."""
        if self.next is None:
            return data
        start, self.next = self.next, None
        if not self.has_head:
            self.has_head, start = True, end_of_chunked_head(data)
            if not start:
                return data
        if start >= len(data):
            self.next = start - len(data)
        elif (found := whole_chunks(data[start:])) is not None:
            content, rest = found
            self.next = left_of_chunk(rest)
            if content:
                return b"%b%x\r\n%b\r\n%b" % (data[:start], len(content), content, rest)
        return data


def whole_chunks(data: bytes) -> tuple[bytes, bytes] | None:
    """(content of the whole chunks that `data` begins with, the rest); None where one holds such line ends itself.

    The last chunk, which is empty, is part of the rest: the end of an answer is for aiohttp to see.
    """
    lines = data.split(b"\r\n")
    end = (len(lines) - 1) // 2 * 2
    if lines[end - 2 : end] == [b"0", b""]:
        end -= 2
    sizes, bodies = lines[0:end:2], lines[1:end:2]
    if sizes != [b"%x" % len(body) for body in bodies] or b"0" in sizes:
        return None
    return b"".join(bodies), b"\r\n".join(lines[end:])


def end_of_chunked_head(data: bytes) -> int:
    """Where the body of a response in chunks begins; 0 where that is not certain, or aiohttp has to unpack it."""
    end = data.find(b"\r\n\r\n") + 4
    head = data[:end].lower()
    is_plain = head.find(b"\r\ncontent-encoding") < 0 <= head.find(b"\r\ntransfer-encoding: chunked\r\n")
    return end if is_plain else 0


def left_of_chunk(data: bytes) -> int | None:
    """How many bytes are still to come of the chunk that `data` begins; None where it does not tell, or it is the last."""
    size, end, body = data.partition(b"\r\n")
    if not data:
        return 0
    if not end or not re.fullmatch(rb"[1-9a-f][0-9a-f]{0,7}", size):
        return None
    left = int(size, 16) + 2 - len(body)
    return left if left > 0 else None


class Shortcut(asyncio.Protocol):
    """Takes the place of aiohttp's protocol on the connection of a streamed answer, and sends each piece on at once.

    To wake the request's task for it would take another round of the event loop: a tenth of what an event costs. The
    task sleeps in `run`. All that is unusual (a client that is behind, the end, a fault) it finds as if it had read.
    """

    def __init__(self, attempt: Attempt, response: aiohttp.ClientResponse, sink: Sink) -> None:
        self.response, self.content = response, response.content
        self.reader, self.watch, self.sink = attempt.reader, attempt.watch, sink
        self.feed = attempt.read_on if attempt.call.on_raw else attempt.reader.feed

    async def run(self) -> bytes:
        """Sends on what comes until something is unusual, and returns what the client has not taken of it. What follows
        that is still to be read.
        """
        connection = self.response.connection
        if connection is None or connection.transport is None or connection.protocol is None:
            return b""  # all of it has arrived
        if connection.transport.get_protocol() is not connection.protocol:
            return b""  # it is lost: TLS forgets its protocol a moment before it tells it
        self.protocol = connection.protocol
        self.chunks: Chunks = getattr(self.protocol, "chunks", Chunks(None))
        self.over: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        connection.transport.set_protocol(self)
        resume_below(self.content, 0)  # `pass_on` does it
        try:
            self.pass_on()
            return await self.over
        finally:
            self.leave()

    def leave(self) -> None:
        """At once, as the connection may serve another answer in the next moment."""
        transport = self.protocol.transport  # None once closed, when that of TLS cannot even be asked
        if transport is not None and transport.get_protocol() is self:
            transport.set_protocol(self.protocol)
            resume_below(self.content, 1)

    def pass_on(self, content: bytes = b"") -> None:
        left = b""
        try:
            while not left and (data := content or self.content.read_nowait()):
                content = b""
                self.watch.last = 0.0
                out = self.feed(data)
                left = b"" if not out or self.sink.write_now(out) else out
                if self.protocol.transport is None or self.protocol.transport.is_reading():
                    break  # that was all
                self.protocol.resume_reading()
        except Exception as fault:  # whatever it is, it is the task's, as if it had read
            self.leave()
            self.over.set_exception(fault)
            return
        reader = self.reader
        if left or reader.ended or reader.error is not None or self.content.is_eof():
            self.leave()
            self.over.set_result(left)

    # What the connection has to tell:

    def data_received(self, data: bytes) -> None:
        if self.over.done():  # the task has been cancelled, and will find it
            self.protocol.data_received(data)
        elif content := self.chunks.content(data):
            self.pass_on(content)
        else:
            self.protocol.data_received(data)
            self.pass_on()

    def eof_received(self) -> None:
        self.protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.protocol.connection_lost(exc)
        if not self.over.done():
            self.pass_on()

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()


class Relay:
    """Carries requests upstream and answers back. One for the life of the server; configs come and go."""

    def __init__(
        self, session: aiohttp.ClientSession, fresh: aiohttp.ClientSession, metrics: Metrics
    ) -> None:
        self.session = session
        self.fresh = fresh  # never reuses a connection: for the one retry after a stale one
        self.metrics = metrics
        self.ending: set[aiohttp.ClientResponse] = set()  # whose last bytes are still to come
        self.health: defaultdict[str, Health] = defaultdict(Health)
        self.breakers: defaultdict[tuple[str, str, str], Breaker] = defaultdict(Breaker)
        # Until when; model "" means every model of the key.
        self.cooling: dict[tuple[str, str, str], float] = {}
        # (config, provider, model) -> refused parameters
        self.learnt: dict[tuple[str, str, str], frozenset[str]] = {}
        self.sticky: dict[tuple[str, str], tuple[str, str, str]] = {}  # (session, route) -> slot's id
        self.ping_interval = 15.0
        self.count_output: Callable[[str, str], int] = lambda text, model: len(text) // 4

    async def run(self, call: Call, sink: Sink | None) -> None:
        """Tries the call's targets until one answers, and sends all of that answer but `call.reader.ending`, which is
        all there is for a client that does not stream (and has no sink).

        Raises ApiError when none did, or when the answer broke; `call` then tells how far it got.
        """
        providers = providers_of(call.config, call.route)
        total = min((p.total_timeout for p in providers), default=3600.0)
        waits = (4.0, call.config.server.client_stall_timeout, *(p.idle_timeout for p in providers))
        call.watch = watch = Watch(min(waits) / 4, total)
        try:
            await self.try_targets(call, sink)
        except asyncio.CancelledError:
            over = watch.take_back()
            if not over:
                raise
            if over == STOPPED:
                raise shutting_down() from None
            words = f"no whole answer within {total:g} s (total_timeout)"
            raise ApiError(504, words, cause="timeout") from None
        finally:
            watch.close()
            call.watch = call.count = None
            call.end_retry()
            if call.counting:
                call.counting.cancel()

    # Which target, which key, and whether again.

    async def try_targets(self, call: Call, sink: Sink | None) -> None:
        plan = Plan(self, call)
        while True:
            slot = plan.next_slot()
            attempt = Attempt(self, call, slot, sink)
            attempt.check()
            try:
                await attempt.run()
                return
            except ApiError as error:
                call.end_retry()
                call.reply_headers, call.is_answered = {}, False
                if not call.has_answered:
                    call.on_failure()
                if call.has_answered or not await plan.goes_on(slot, error):
                    raise client_error(error, slot, call) from None

    def cool(self, slot: Slot, error: ApiError, now: float) -> None:
        """Lets a key rest: for a 429 as long as the upstream says, for a refused key, or one without money, five minutes."""
        provider, model, key = slot.id
        if error.cause == "http_429":
            wait = RATE_WAIT if error.retry_after is None else error.retry_after
            self.cooling[provider, model, key] = now + wait
        elif error.retry is Retry.KEY and slot.key and not slot.provider.passthrough:
            self.cooling[provider, "", key] = now + KEY_COOLING
        forget_oldest(self.cooling)

    def health_of(self, provider: str) -> Health:
        return self.health[provider]

    def rests(self, slot: Slot, now: float) -> float:
        """Seconds until a slot's key has cooled down; 0 when it may be used."""
        provider, model, key = slot.id
        until = max(self.cooling.get((provider, model, key), 0.0), self.cooling.get((provider, "", key), 0.0))
        return max(until - now, 0.0)

    def slots_of(self, target: Target, provider: Provider, credential: str = "") -> list[Slot]:
        """A target with each of its provider's keys, in the pool's rotation; a passthrough provider's is the client's
        own, so what one is refused or limited for is nothing to the others.
        """
        if provider.passthrough:
            return [Slot(target, provider, credential)]
        keys = provider.api_key or ("",)
        start = self.health_of(provider.name).next_key % len(keys)
        return [Slot(target, provider, key) for key in (*keys[start:], *keys[:start])]

    def release(self, response: aiohttp.ClientResponse) -> None:
        self.ending.discard(response)
        response.release()

    async def close(self) -> None:
        """Ends all connections to upstreams."""
        for response in list(self.ending):
            self.release(response)
        await self.session.close()
        await self.fresh.close()

    async def post(
        self, session: aiohttp.ClientSession, request: UpstreamRequest, provider: Provider
    ) -> aiohttp.ClientResponse:
        # aiohttp warns of a large body in one piece; from a file object it goes out in pieces.
        data: Any = request.data if len(request.data) <= 2**20 else io.BytesIO(request.data)
        return await session.post(
            request.url,
            data=data,
            headers=request.headers,
            allow_redirects=False,
            proxy=proxy_of(provider),
            # For the look-up of the name, too; all that follows has limits of its own.
            timeout=aiohttp.ClientTimeout(total=None, connect=provider.connect_timeout),
        )

    def not_taken(self, call: Call, slot: Slot) -> frozenset[str]:
        """What errors have said that the slot's model does not take there."""
        return self.learnt.get((call.config.text_hash, *slot.place), frozenset())

    def upstream_of(self, call: Call, slot: Slot) -> Upstream:
        model, row = slot.target.actual_model, call.config.model(call.route.model)
        facts = facts_of(model)
        if context := slot.target.context or (row.context if row else 0):
            facts = dataclasses.replace(facts, context=context)
        return Upstream(model, slot.provider.quirks, facts, call.session, self.not_taken(call, slot))

    def passes(self, call: Call, slot: Slot) -> bool:
        """Whether the slot's upstream gets what the client wrote."""
        model, skip = slot.target.actual_model, self.not_taken(call, slot)
        return call.passes(dialect_of(slot.provider, model, skip, call.body))


class Attempt:
    """One try of a call: its request to one target, and the answer on its way to the client."""

    reader: Reader

    def __init__(self, relay: Relay, call: Call, slot: Slot, sink: Sink | None) -> None:
        assert call.watch is not None
        self.relay, self.call, self.slot, self.sink, self.watch = relay, call, slot, sink, call.watch
        self.provider = slot.provider
        self.to = relay.upstream_of(call, slot)
        self.dialect = dialect_of(slot.provider, self.to.model, self.to.skip, call.body)
        self.passes = call.passes(self.dialect)
        # All upstreams stream, but for a whole answer in the client's own format.
        self.streams = call.stream or not self.passes
        self.tools: dict[str, str] = {}  # of a translated request: the upstream's name -> the client's
        self.health = relay.health_of(self.provider.name)
        self.began = time.monotonic()

    def check(self) -> None:
        """ApiError for a request that this target has no form for, whatever another might have."""
        call = self.call
        if "safeguards" in call.body and self.dialect.request:
            raise no_safeguards()
        if call.body.get("thread") and not is_anthropics(self.provider.base_url):
            raise no_thread()
        if call.unserved and not self.passes:
            raise call.unserved

    async def run(self) -> None:
        """Sends the request and relays all of its answer; ApiError when either fails or lasts too long."""
        call = self.call
        forget_oldest(self.relay.breakers)
        breaker = self.relay.breakers[self.slot.id]
        self.health.active += 1
        call.target = self.slot.target
        call.tries += 1
        call.first_content, call.is_answered = 0.0, False
        call.is_passed_on = self.passes and call.format == "chat"
        breaker.begin(self.began, call)
        error: ApiError | None = None
        status = 0  # of a client that has left
        try:
            await self.exchange()
            status = 200
        except ApiError as caught:
            error, status = caught, caught.status
            raise
        finally:
            self.health.active -= 1
            self.learn(breaker, status, error)

    def learn(self, breaker: Breaker, status: int, error: ApiError | None) -> None:
        """Notes how the try ended. A client that hung up teaches nothing, nor does a fault of the request."""
        call, relay, now = self.call, self.relay, time.monotonic()
        provider, model, key = self.slot.id
        cause = error.cause if error else ""
        ended = {"status": status, "error": cause, "ms": round((now - self.began) * 1000)}
        call.attempts.append({"provider": provider, "model": model, "key": key, **ended})
        relay.metrics.attempt(provider, model, cause if status else "gone")
        if status in (0, 400) or (error and error.retry in (Retry.NO, Retry.LARGER, Retry.KEY)):
            breaker.leave(call)
        else:
            breaker.record(call, self.began, now, error is None)
        if not status or cause == "client_stall":
            return
        self.health.outcomes.append({"time": time.time(), "ok": error is None, **ended})
        if error is not None and not call.first_content:
            relay.cool(self.slot, error, now)
        elif error is None and call.session:
            relay.sticky.pop((call.session, call.route.model), None)
            relay.sticky[call.session, call.route.model] = self.slot.id
            forget_oldest(relay.sticky)

    async def exchange(self) -> None:
        if self.dialect.is_local:
            await self.demo()
            return
        try:
            await self.receive(await self.send())
        except asyncio.CancelledError:
            if self.watch.over in (TOTAL, STOPPED) or not self.watch.take_back():
                raise
            await self.end_broken(self.overdue())
        finally:
            self.watch.wait(math.inf, "")

    async def send(self) -> aiohttp.ClientResponse:
        """POSTs the request; the response once its status is 200, else an ApiError."""
        call, relay, provider = self.call, self.relay, self.provider
        request = await self.request()
        limit = provider.first_byte_timeout if self.streams else provider.response_timeout
        self.watch.wait(limit, "first byte")
        if call.on_raw:
            call.on_raw("upstream_request", request.data)
        if call.count:
            asyncio.get_running_loop().call_soon(call.begin_count)  # once the request is on its way
        opened = Opened()
        OPENED.set(opened)
        try:
            response = await relay.post(relay.session, request, provider)
        except UPSTREAM_FAULTS() as fault:
            if opened.yes or not is_disconnect(fault):
                raise self.fault(fault) from None
            try:
                response = await relay.post(relay.fresh, request, provider)
            except UPSTREAM_FAULTS() as again:
                raise self.fault(again) from None
        if response.status != 200:
            try:
                raise await self.refusal(response)
            finally:
                response.close()
        return response

    async def request(self) -> UpstreamRequest:
        call, dialect, to = self.call, self.dialect, self.to
        url = endpoint_url(self.provider.base_url, dialect, model=to.model)
        accept = "text/event-stream" if self.streams else "application/json"
        headers = upstream_headers(call.headers, self.slot, dialect, accept)
        if call.is_passed_on:
            return UpstreamRequest(url, headers, compact(chat_passed_on(call.chat, to)))
        if dialect.request is None:
            if "beta=true" in call.query:
                url += "&beta=true" if "?" in url else "?beta=true"
            return UpstreamRequest(url, headers, forwarded(call, to))
        body = with_tool_changes(call.body)
        self.tools = {upstream: client for client, upstream in tool_names(body).items()}
        translated = dialect.request(body, to)
        if left := left_out(call.body, dialect, to):
            name = self.provider.name
            log.info("request %s: server tools left out for %s: %r", call.request_id, name, left[:8])
        if len(call.raw) > LARGE:
            await asyncio.sleep(0)  # to translate and to encode a megabyte takes some milliseconds each
        return UpstreamRequest(url, headers, request_bytes(translated))

    async def receive(self, response: aiohttp.ClientResponse) -> None:
        call, done = self.call, False
        call.is_answered = True
        try:
            call.on_answer()
            if call.counting:
                await call.end_count()
                call.on_answer()  # its floor is by the count now
            call.reader = self.reader = self.reader_of_answer()
            await self.relay_answer(response)
            done = True
        except UPSTREAM_FAULTS() as fault:
            await self.end_broken(self.fault(fault))
        finally:
            if not done:
                response.close()
            elif response.content.is_eof():
                response.release()
            else:
                self.relay.ending.add(response)
                asyncio.get_running_loop().call_later(LAST_BYTES, self.relay.release, response)

    def reader_of_answer(self) -> Reader:
        call, secrets = self.call, self.call.config.secrets
        if call.is_passed_on:
            lax_finish = self.provider.quirks.lax_finish
            return ChatTap(call.wants_usage, lax_finish) if call.stream else ChatWhole()
        if self.passes:
            return AnthropicTap(lambda text: scrub(text, secrets)) if call.stream else AnthropicWhole()
        model, count = self.to.model, self.relay.count_output
        usage = Usage(input=call.tokens, estimated=True)
        out = AnthropicStream(
            f"msg_{call.request_id[4:]}", call.asked, usage, lambda text: count(text, model)
        )
        out.tool_ids = tool_ids(call.body)
        return Translation(self.dialect.stream(out, self.tools, self.to), out, client_format(call))

    async def relay_answer(self, response: aiohttp.ClientResponse) -> None:
        """Sends an answer on. Until its first content nothing of it goes out, and another try may mend a fault.

        Of a stream, what its client takes at once goes by the `Shortcut`; this goes round for the rest.
        """
        call, reader, watch, sink = self.call, self.reader, self.watch, self.sink
        idle, stall = self.provider.idle_timeout, call.config.server.client_stall_timeout
        resume_below(response.content, 1)
        shortcut: Shortcut | None = None
        out, size, data = b"", 0, b"-"
        while True:
            if not call.first_content and (reader.has_content or reader.ended) and reader.error is None:
                await self.begin_answer(answer_headers(response.headers, self.dialect))
                shortcut = Shortcut(self, response, sink) if sink else None
            if out and sink and call.first_content:
                watch.wait(stall, "client")
                await sink.write(out)
                watch.wait(idle, "next byte")
                out = b""
            if not data or reader.ended or reader.error is not None:
                break
            if shortcut and ((out := await shortcut.run()) or reader.ended or reader.error is not None):
                continue
            data = await response.content.readany()
            watch.wait(idle, "next byte")
            size += len(data)
            if size > MAX_ANSWER and not call.has_answered:
                words = f"the answer of provider {self.provider.name} is larger than {MAX_ANSWER} bytes"
                raise ApiError(502, words, retry=Retry.NEXT, cause="stream")
            out += self.read_on(data)
        if reader.error is not None:
            raise self.sized(reader.error)

    def sized(self, error: ApiError) -> ApiError:
        """An overflow told inside a 200, by the count and the model's context where the upstream names no numbers."""
        if error.message == UNSIZED:
            tokens, context = self.call.tokens, self.to.facts.context
            error.message = upstream_error(400, "prompt is too long", tokens=tokens, context=context).message
        return error

    async def begin_answer(self, headers: dict[str, str]) -> None:
        call = self.call
        call.reply_headers = headers
        call.first_content = time.monotonic()
        call.end_retry()
        if call.stream and call.raw:
            call.body = {}  # takes five times its bytes, and there will be no other try
        if self.sink:
            await self.sink.begin()

    def read_on(self, data: bytes) -> bytes:
        """What the client gets for the next of the upstream's bytes, or for their end; the inspect recorder is told."""
        out = self.reader.feed(data) if data else self.reader.finish()
        if self.call.on_raw:
            self.call.on_raw("upstream_answer", data)
            self.call.on_raw("events", out + self.reader.ending)
        return out

    async def end_broken(self, error: ApiError) -> None:
        """Ends an answer that broke off where its format had said already that the message is over, and only what ends
        the bytes was missing; else raises the error.
        """
        can_end = error.cause in ("disconnect", "timeout") and not self.provider.quirks.lax_finish
        if not self.call.first_content or self.reader.ended or self.reader.error or not can_end:
            raise error from None
        out = self.read_on(b"")
        if not self.reader.ended:
            raise error from None
        if self.sink:
            await self.sink.write(out)

    async def demo(self) -> None:
        """The in-process provider: its events, at the pace of a quick model."""
        call = self.call
        call.on_answer()
        events = demo_events(call.body, f"msg_{call.request_id[4:]}")
        out = AnthropicStream("", "", Usage())
        call.reader = self.reader = Translation(AnthropicEvents(out, {}, self.to), out, client_format(call))
        await self.begin_answer({})
        for event in events:
            if (data := self.reader.feed(encode_event(event))) and self.sink:
                await self.sink.write(data)
            await asyncio.sleep(0.01 if self.sink else 0)

    async def refusal(self, response: aiohttp.ClientResponse) -> ApiError:
        """The error that an answer with another status than 200 amounts to."""
        call = self.call
        try:
            async with asyncio.timeout(10):
                body = await response.content.read(MAX_ERROR_BODY)
                while len(body) < MAX_ERROR_BODY and (more := await response.content.read(MAX_ERROR_BODY)):
                    body += more
        except UPSTREAM_FAULTS():
            body = b""
        if call.on_raw:
            call.on_raw("upstream_answer", body)
        if body.startswith((b"data:", b"event:")):  # LiteLLM's, where a stream fails before it begins
            body = event_of(body)[1].encode()
        text = scrub(body.decode("utf-8", "replace"), call.config.secrets)
        try:
            payload = json.loads(text)
        except (ValueError, RecursionError):
            payload = text.strip() if not text.lstrip().startswith("<") else ""
        told = functools.partial(upstream_error, response.status, payload, context=self.to.facts.context)
        error = told(tokens=call.tokens)
        if error.cause == "overflow":
            await call.end_count()
            error = told(tokens=call.tokens)
        error.retry_after = retry_after(response.headers)
        if error.retry_after is None:
            error.retry_after = retry_after(wait_in_body(payload))
        should = response.headers.get("x-should-retry", "").lower()
        error.should_retry = {"true": True, "false": False}.get(should, error.should_retry)
        if self.dialect.request is None and call.format == "anthropic":
            error.headers = answer_headers(response.headers, self.dialect)
            words = error_words(payload) if as_object(payload).get("type") == "error" else ""
            keeps_words = error.cause != "overflow" or re.search(_ANTHROPICS_WORDS, words)
            error.raw = text.encode() if words and keeps_words and error.status == response.status else b""
        return error

    def overdue(self) -> ApiError:
        limit, what = self.watch.limit, self.watch.what
        if what == "client":
            return ApiError(408, f"the client stopped reading for {limit:g} s", cause="client_stall")
        words = f"provider {self.provider.name} sent nothing for {limit:g} s (waiting for its {what})"
        return ApiError(504, words, retry=Retry.NEXT, cause="timeout")

    def fault(self, fault: BaseException) -> ApiError:
        """A failure below HTTP as an ApiError."""
        connects = (aiohttp.ServerTimeoutError, aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError)
        cause = "connect" if isinstance(fault, connects) else "disconnect"
        return ApiError(502, fault_words(fault, self.provider), retry=Retry.SAME, cause=cause)


def shutting_down() -> ApiError:
    return ApiError(529, "ccmux is shutting down; try again in a moment", retry_after=2, cause="shutdown")


def providers_of(config: Config, route: Route) -> list[Provider]:
    found = (config.provider(target.provider) for target in route.targets)
    return [p for p in found if p is not None]


def fault_words(fault: BaseException, provider: Provider) -> str:
    """What a failure below HTTP means, and what to do. Most faults' own words may hold a URL with a key, so they are
    not passed on.
    """
    name, proxies = provider.name, (aiohttp.ClientHttpProxyError, aiohttp.ClientProxyConnectionError)
    way = urllib.parse.urlsplit(proxy_of(provider) or "").scheme
    if way.startswith("socks"):
        return f"the proxy on the way to provider {name} speaks {way}: name an http one in HTTPS_PROXY"
    if isinstance(fault, aiohttp.ServerTimeoutError):
        return f"provider {name} could not be reached within {provider.connect_timeout:g} s"
    is_dns = isinstance(fault, aiohttp.ClientConnectorDNSError)  # of the proxy's name, where there is one
    if isinstance(fault, proxies) or (is_dns and way):
        status = getattr(fault, "status", None)  # of its answer to CONNECT
        said = f"answered {status}" if status else "could not be reached"
        where = f"check proxy of [[providers]] {name!r}, or HTTPS_PROXY in the environment"
        return f"the proxy on the way to provider {name} {said}; {where}"
    if isinstance(fault, aiohttp.ClientConnectorCertificateError):
        reason = getattr(fault.os_error, "verify_message", "")
        other = "name a file of certificates that has its issuer's in SSL_CERT_FILE"
        return f"the certificate of provider {name} is not trusted ({reason}): check its base_url and the clock, or {other}"
    if isinstance(fault, aiohttp.ClientConnectorError):
        reason = fault.os_error.strerror or type(fault.os_error).__name__
        return f"provider {name} could not be reached: {reason}; check its base_url and that it runs"
    if isinstance(fault, aiohttp.ClientResponseError):
        said = fault.message.partition(":")[0]  # behind that, the upstream's bytes
        return f"what provider {name} answers is no good HTTP ({said}); check its base_url"
    return f"the connection to provider {name} broke ({type(fault).__name__})"


def proxy_of(provider: Provider) -> str | None:
    return provider.proxy or environment_proxy(provider.base_url)


@functools.cache
def environment_proxy(url: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY mean for a URL; none for this machine's own addresses.

    aiohttp's own trust_env asks a thread (and reads ~/.netrc) for every request: 0.2 ms of CPU each.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy  # as curl takes it


@functools.cache
def UPSTREAM_FAULTS() -> tuple[type[Exception], ...]:  # noqa: N802
    """What aiohttp raises when an upstream misbehaves; it lets ValueErrors out of malformed heads and chunks.

    A TimeoutError is an OSError. A function, because --help works before aiohttp is installed.
    """
    return (aiohttp.ClientError, OSError, ssl.SSLError, ValueError, RecursionError)


def resume_below(content: aiohttp.StreamReader, size: int) -> None:
    """Has aiohttp (3.14) resume a paused connection once less than `size` is in its buffer, not at each chunk taken.

    With 300 events in the buffer that is half of what a request costs.
    """
    with contextlib.suppress(AttributeError):  # where it has no such mark, all works, but slower
        content._low_water = size


def forget_oldest(kept: dict[Any, Any]) -> None:
    """Bounds what clients can make ccmux remember by asking for ever new names."""
    while len(kept) >= MOST_KEPT:
        kept.pop(next(iter(kept)))


def is_disconnect(fault: BaseException) -> bool:
    kinds = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError)
    return isinstance(fault, kinds) and not isinstance(fault, aiohttp.ClientConnectorError)


@dataclass(slots=True)
class Opened:
    """Whether a request has a connection of its own, and not one that had served before."""

    yes: bool = False


# Of the request that is on its way; where several addresses are tried at once, their tasks have the same object.
OPENED: contextvars.ContextVar[Opened] = contextvars.ContextVar("OPENED")


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    url: str
    headers: dict[str, str]
    data: bytes = field(repr=False)


class Plan:
    """The order of tries of one call, and its budgets."""

    def __init__(self, relay: Relay, call: Call) -> None:
        self.relay, self.call = relay, call
        self.tries: Counter[tuple[str, str, str]] = Counter()  # of each slot
        self.total = 0
        self.slept = 0.0
        self.again: Slot | None = None  # the same slot once more
        self.done: set[tuple[str, str, str]] = set()  # slots not to be tried again
        self.mended: set[tuple[str, ...]] = set()  # what was tried: each at most once

    def next_slot(self) -> Slot:
        """The next thing to try; ApiError 429 or 529 when all there is rests or is broken."""
        slot, self.again = self.again, None
        if slot is None:
            free = self.free()
            if not free:
                raise self.nothing_free()
            slot = free[0]
            self.relay.health_of(slot.provider.name).next_key += 1
        self.total += 1
        self.tries[slot.id] += 1
        return slot

    def left(self) -> list[Slot]:
        """What may still be tried, now or later."""
        return [slot for slot in self.slots() if slot.id not in self.done]

    def free(self) -> list[Slot]:
        """What may be tried now."""
        now = time.monotonic()
        return [slot for slot in self.left() if self.is_free(slot, now)]

    def slots(self) -> list[Slot]:
        """Every slot of the call, the session's own first: what an upstream has cached belongs to its key."""
        config, relay = self.call.config, self.relay
        found: list[Slot] = []
        for target in self.call.route.targets:
            provider = config.provider(target.provider)
            if provider and provider.usable:
                found += relay.slots_of(target, provider, self.call.credential)
        if self.call.unserved:  # then it is for upstreams of the client's own format, where there are any
            found = [slot for slot in found if relay.passes(self.call, slot)] or found
        mine = relay.sticky.get((self.call.session, self.call.route.model), ("", "", ""))
        return sorted(found, key=lambda slot: (slot.place != mine[:2], slot.id != mine))

    def is_free(self, slot: Slot, now: float) -> bool:
        health = self.relay.health_of(slot.provider.name)
        breaker = self.relay.breakers.get(slot.id)
        full = health.active >= slot.provider.max_concurrent
        return not full and not self.relay.rests(slot, now) and (breaker is None or breaker.allows(now))

    def nothing_free(self) -> ApiError:
        slots, now, model = self.left(), time.monotonic(), self.call.route.model
        if not slots:
            providers = providers_of(self.call.config, self.call.route)
            problems = "; ".join(f"provider {p.name}: {p.problem or 'enabled = false'}" for p in providers)
            words = f"model {model!r} has no usable provider: {problems or 'no provider serves it'}"
            return ApiError(500, words, should_retry=False)
        rests = [self.relay.rests(slot, now) for slot in slots]
        if all(rests):
            wait = math.ceil(min(rests))
            faults = {n: self.relay.health_of(n).last_fault() for n in (s.provider.name for s in slots)}
            told = ", ".join(f"{name} said {status}" for name, status in faults.items())
            words = f"every provider of {model!r} limits requests or refuses its key ({told}); the next is tried in {wait} s"
            return ApiError(429, words, retry_after=wait, cause="cooling")
        breakers = [self.relay.breakers.get(slot.id) for slot in slots]
        waits = [max(r, b.open_until - now if b else 0) for r, b in zip(rests, breakers, strict=True)]
        wait = math.ceil(min(max(min(waits), 1.0), 60.0))
        words = f"every provider of {model!r} is failing or busy; ccmux tries again in {wait} s"
        return ApiError(529, words, retry_after=wait, cause="unavailable")

    async def goes_on(self, slot: Slot, error: ApiError) -> bool:
        """After a failed try: whether there is another, and the wait before it. The budgets are kept here."""
        if self.mends(slot, error):
            self.total -= 1
            self.tries[slot.id] -= 1
            self.again = slot
            return True
        if self.total >= MAX_TRIES or error.retry is Retry.NO:
            return False
        if error.retry is Retry.LARGER:
            return self.has_larger(slot)
        if self.tries_same(slot, error) and await self.backs_off(slot, error):
            return True
        self.done.add(slot.id)
        if error.retry is not Retry.KEY:  # else its provider's next key has tries of its own
            self.done |= {s.id for s in self.slots() if s.target == slot.target}
        return bool(self.free())

    def tries_same(self, slot: Slot, error: ApiError) -> bool:
        """Whether the same target gets another try: for a passing fault, and a limit that ends soon."""
        health = self.relay.health_of(slot.provider.name)
        if self.tries[slot.id] > slot.provider.max_retries or not health.may_retry():
            return False
        if (error.retry_after or 0) > SHORT_WAIT:
            return False
        others = [s for s in self.free() if s.id != slot.id]
        if error.cause == "http_429":
            return error.should_retry is not False and not any(s.target == slot.target for s in others)
        if error.cause == "connect" or error.status == 529:  # its other keys would find the same
            return all(s.target == slot.target for s in others)
        return error.retry is Retry.SAME

    async def backs_off(self, slot: Slot, error: ApiError) -> bool:
        """Waits before the same slot is tried again; false when that would take too long, or does not help."""
        wait = random.uniform(0, min(4.0, 0.25 * 2 ** (self.tries[slot.id] - 1)))  # noqa: S311  (full jitter)
        if error.retry_after is not None or error.cause == "http_429":
            wait += RATE_WAIT if error.retry_after is None else error.retry_after
        if self.slept + wait > MAX_SLEEP or not self.is_worth_it(slot):
            return False
        self.slept += wait
        health = self.relay.health_of(slot.provider.name)
        self.call.retries_at = health
        health.retrying += 1
        health.active += 1  # its place among `max_concurrent` is kept
        try:
            await asyncio.sleep(wait)
        finally:
            health.active -= 1
        if not self.is_worth_it(slot):  # others have failed there in the meantime
            self.call.end_retry()
            return False
        self.again = slot
        return True

    def is_worth_it(self, slot: Slot) -> bool:
        """Whether a slot's breaker is closed, or there is nothing else to try."""
        breaker = self.relay.breakers.get(slot.id)
        return breaker is None or breaker.allows(time.monotonic()) or len(self.slots()) == 1

    def mends(self, slot: Slot, error: ApiError) -> bool:
        """Whether a 400, or Mistral's 422, names what this request can do without: a parameter, a thinking signature.

        Images and files are refused with others, too; where a next target may take them, it gets them. Anthropic's own
        models take both: there it is the place in the conversation that is wrong.
        """
        provider, words = slot.provider, error.message
        is_ours = not self.call.is_passed_on
        has_others = any(s.target != slot.target for s in self.free())
        goes_on = has_others and error.retry in (Retry.SAME, Retry.NEXT)
        refused = next((name for name, known in PARTS_REFUSED.items() if known.search(words)), "")
        if refused and is_ours and not goes_on and not is_anthropics(provider.base_url):
            return self.learns(slot, refused)
        if _BY_RESPONSES.search(words) and provider.format == "openai":
            return self.learns(slot, CHAT)
        if error.status not in (400, 422):
            return False
        if is_ours and self.asks_less(words):
            return True
        if provider.quirks.transient and provider.quirks.transient in words:
            return self.once("transient")
        if is_ours and self.unthinks(words):
            return True
        if provider.format == "anthropic" and _NO_REASONING.search(words):
            return self.learns(slot, "reasoning")
        if self.call.format == provider.format == "anthropic":
            return False  # the client's own bytes
        if self.learns(slot, *refused_efforts(words, error.param)):
            return True
        name = refused_parameter(words, error.param)
        return self.learns(slot, name if is_ours or name not in OURS_ALONE else "")

    def asks_less(self, words: str) -> bool:
        """Asks for no more output than an account can pay for, where a refusal says how much that is."""
        call, affords = self.call, re.search(_AFFORDS, words)
        if affords is None or not self.once("output"):
            return False
        limit = int(affords[1])
        call.body, call.raw = {**call.body, "max_tokens": limit}, b""
        thinking = call.body.get("thinking")
        if isinstance(thinking, dict) and (budget := token_number(thinking.get("budget_tokens"))):
            call.body["thinking"] = {**thinking, "budget_tokens": min(budget, limit // 2)}
        return True

    def unthinks(self, words: str) -> bool:
        """Takes thinking out of the request, each way once, where a refusal is about it."""
        call = self.call
        if _SIGNATURE_REFUSED.search(words) and self.once("signature"):
            call.body, call.raw = without_thinking(call.body), b""
            return True
        if _THOUGHT_MISSED.search(words) and self.once("thought"):
            rest = {k: v for k, v in without_thinking(call.body).items() if k != "context_management"}
            call.body, call.raw = {**rest, "thinking": {"type": "disabled"}}, b""
            return True
        return False

    def learns(self, slot: Slot, *names: str) -> bool:
        """Keeps in mind what an upstream does not take; false where that is nothing, or this request was tried so."""
        place = (self.call.config.text_hash, *slot.place)
        if not any(names) or not self.once(*names, *place):
            return False
        forget_oldest(self.relay.learnt)
        self.relay.learnt[place] = self.relay.not_taken(self.call, slot) | set(names)
        return True

    def once(self, *mend: str) -> bool:
        is_new = mend not in self.mended
        self.mended.add(mend)
        return is_new

    def has_larger(self, slot: Slot) -> bool:
        """After an overflow: whether a target with a larger context is left; the others are not tried."""
        mine = self.relay.upstream_of(self.call, slot).facts.context
        for other in self.slots():
            if self.relay.upstream_of(self.call, other).facts.context <= mine:
                self.done.add(other.id)
        return bool(self.free())


DROPPABLE = (
    "temperature", "top_p", "top_k", "reasoning_effort", "stream_options", "parallel_tool_calls", "prompt_cache_key",
    "stop", "response_format", "tool_choice", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "web_search_options", "plugins", "reasoning", "include", "store", "text", "thinking", "metadata", "cache_control",
    "stop_sequences", "output_config", "output_config.effort",
)  # fmt: skip
_REFUSES = re.compile(
    r"(?i)unsupported|unknown|unrecognized|not supported|not permitted|extra inputs|does not support|unexpected|"
    r"not allowed|no longer supported|only the default|invalid.{0,20}parameter|not (?:a )?valid|must be one of|"
    r"incompatible|is allowed for this model|unavailable|input should be '"
)


# Anthropic's "Invalid `signature` in `thinking` block", OpenAI's unverifiable encrypted content, Gemini's
# signatures.
_SIGNATURE_REFUSED = re.compile(
    r"(?i)signature.{0,80}thinking|thinking.{0,80}signature|thought.?signature|encrypted content .{0,160}verified"
)


# What Anthropic and DeepSeek say of a call whose thought does not come back: another model's, or one that the client's
# format has no place for.
_THOUGHT_MISSED = re.compile(
    r"Expected `thinking` or `redacted_thinking`|`content\[\]\.thinking`.{0,40}passed back"
)


# OpenAI, OpenRouter, DeepSeek, vLLM, llama.cpp, Ollama, LM Studio of a model that reads only text. Without this, a
# conversation that an image got into would end there; and so with vLLM, DeepSeek, SGLang, llama.cpp and Ollama of a PDF.
PARTS_REFUSED = {
    "media": re.compile(
        r"(?i)(?:not|n't) supports? (?:images?|vision|multimodal)\b(?!/| format| type| url)|that support image input|"
        r"image(?:_url|s| inputs?) (?:is|are) (?:not|only) supported|variant `image_url`|not a multimodal model|"
        r"at most 0 image|for text-only server: image"
    ),
    "files": re.compile(
        r"part type: file|variant `file`|tag 'file'|value: 'file'|unsupported content\[\]\.type|"
        r"^invalid message format$|tag 'document'|'input': 'document'|'input_file' is not supported|"
        r"content type: input_file"
    ),
}
# What is no parameter: only a request that is made here can do without.
OURS_ALONE = {
    # OpenAI's, to organisations that are not verified.
    "reasoning.summary": re.compile(r"reasoning summaries"),
    # "Unexpected role 'user' after role 'tool'" of Mistral and its models on vLLM, and what their templates say elsewhere.
    "user_after_tool": re.compile(r"'user' after role 'tool'|roles must alternate"),
    # Google's, where a web search and functions come together: a model's, and Vertex AI's, which knows no key for it.
    "googleSearch": re.compile(
        r"(?i)tool use with function calling is unsupported|\btools \(.{0,80}cannot be combined|they are all search tools|"
        r"include_?server_?side_?tool_?invocations"
    ),
    # Gemini's of 3.5 Flash-Lite and later, where the answer is begun by the client.
    "prefill": re.compile(r"(?i)requests ending with a model turn|last turn cannot be model"),
}
# Ollama's, of a model that does not think, or knows no levels of it (v0.17.4); Google's, of one that has no such setting
# (github.com/googleapis/js-genai/issues/681, github.com/google-gemini/gemini-cli/issues/1953).
_THINKING_REFUSED = re.compile(
    r'" does not support thinking|^think value |(?i:\bthinking(?:[ _](?:config|level|budget))?(?:\.include_thoughts)? is '
    r"(?:not (?:supported|enabled|configurable)|only enabled))"
)
# On /v1/messages, where Claude Code asks for thinking in each main turn: those words, and LiteLLM's of a model that it
# does not know to reason.
_NO_REASONING = re.compile(
    rf"{_THINKING_REFUSED.pattern}|doesn't support `reasoning\.effort`|"
    r"support parameters: \['(?:thinking|reasoning_effort)'"
)


# OpenAI's 400 of gpt-5.4 and later where tools come with reasoning, which gpt-5.6 and later do unasked (seen July 2026:
# github.com/BerriAI/litellm/pull/34569), and the 404 of its models that have no Chat Completions at all.
_BY_RESPONSES = re.compile(r"(?:use|supported in) /?v1/responses")


def no_safeguards() -> ApiError:
    """What makes Claude Code's auto mode ask again without them, and classify by itself; a translation has none."""
    return ApiError(400, "safeguards: Extra inputs are not permitted")


def no_thread() -> ApiError:
    """What makes the tool runners of Anthropic's SDKs send the whole conversation with each turn.

    With `thread` they leave to the server what was said before (SDK 2.13 of November 2026); only Anthropic's own keeps it.
    """
    words = "thread: no conversation is kept here; send all of it, without `thread`"
    return ApiError(400, words, code="thread_unsupported_request")


def refused_parameter(message: str, param: str = "") -> str:
    """The parameter that a 400 says the upstream does not know; "" where it says another thing.

    `param` is the one that the error names in a field of its own, as OpenAI's do.
    """
    if _THINKING_REFUSED.search(message):
        return "reasoning_effort"
    if other := next((name for name, known in OURS_ALONE.items() if known.search(message)), ""):
        return other
    if not _REFUSES.search(message):
        return ""
    named_in = (
        r"['\"`]([\w.]+)['\"`]|\b([a-z]+_[a-z_]+(?:\.effort)?)\b|"
        r"(?i:parameter:?|invalid|this model:)\s+(\w+)|^(\w+): "
    )
    quoted = re.findall(named_in, message.replace("response format", "response_format"))
    named = [param, *(name for names in quoted for name in names if name)]
    snake = map(snake_case, named)  # xAI's and Google's are in camel case
    tops = (name if name in DROPPABLE else name.split(".")[0] for name in snake)
    return next((top for top in tops if top in DROPPABLE), "")


def without_thinking(body: Json) -> Json:
    """The request without thinking blocks, for an upstream that refuses the signature of one."""
    return rewritten(body, is_no_thinking)


def without_foreign_thinking(body: Json, model: str) -> Json:
    """The request without thinking blocks that ccmux made for other models; for Claude also without those that carry
    no signature: others sign none of theirs (llama.cpp), and read them.
    """
    return rewritten(body, is_signed_thinking if "claude" in model else is_own_thinking)


def is_no_thinking(block: Json) -> bool:
    return block.get("type") not in ("thinking", "redacted_thinking")


def is_own_thinking(block: Json) -> bool:
    return is_no_thinking(block) or signed_payload(block) is None


def is_signed_thinking(block: Json) -> bool:
    mark = block.get("signature") or block.get("data")
    return is_no_thinking(block) or (bool(mark) and is_own_thinking(block))


def rewritten(body: Json, keeps: Callable[[Json], bool]) -> Json:
    """The request with those blocks alone of assistants' messages that `keeps` is for; messages left empty are taken
    out. The very same object where all of them stay.
    """
    given = messages_of(body)
    all_left = each(given, blocks_left(keeps))
    if all_left.count(None) == len(given):
        return body
    changed = ((m, left) for m, left in zip(given, all_left, strict=True) if left != [])
    return {**body, "messages": [m if left is None else {**m, "content": left} for m, left in changed]}


@functools.cache
def blocks_left(keeps: Callable[[Json], bool]) -> Callable[[Json], list[Any] | None]:
    """What tells what is left of a message's blocks (None: all); the same each time, as `each` knows it by its id."""

    def left_of(message: Json) -> list[Any] | None:
        content = message.get("content")
        if message.get("role") != "assistant" or not isinstance(content, list):
            return None
        left = [b for b in content if not isinstance(b, dict) or keeps(b)]
        return None if len(left) == len(content) else left

    return left_of


def forwarded(call: Call, to: Upstream) -> bytes:
    """What an Anthropic-format upstream gets: the client's own bytes, but for the model's name and what must
    go.
    """
    body, raw = call.body, call.raw
    if call.format != "anthropic":
        body = fitting_request(body, to)
    lighter = without_dropped(without_foreign_thinking(body, to.model), to)
    if lighter is not body:
        body, raw = lighter, b""
    if not raw:
        return compact({**body, "model": to.model})
    return raw if body.get("model") == to.model else with_model(raw, str(body["model"]), to.model)


def without_dropped(body: Json, to: Upstream) -> Json:
    """The body without what the provider's drop list names; the very same object where nothing is dropped."""
    for name in (*to.quirks.drop, *(to.skip & DROPS.keys())):  # the rest of `skip` is of requests made here
        if name == "media" and to.sees:
            body = without_media(body, ("document",))
        elif name in DROPS:
            body = DROPS[name](body)
        elif name in body:
            body = {k: v for k, v in body.items() if k != name}
    body = with_known_effort(body, efforts_of(to, EFFORTS))
    return body | to.quirks.extra_body if to.quirks.extra_body else body


def with_known_effort(body: Json, allowed: tuple[str, ...]) -> Json:
    """The body with its effort clamped to what the provider takes; the very same object where it takes that."""
    config = as_object(body.get("output_config"))
    effort = wanted_effort({"output_config": config}, allowed)
    if effort in ("", config.get("effort")):
        return body
    return {**body, "output_config": {**config, "effort": effort}}


def without_billing_header(body: Json) -> Json:
    given, kept = body.get("system"), system_blocks(body)
    return body if isinstance(given, str) or len(kept) == len(given or ()) else {**body, "system": kept}


def without_tool_type(body: Json) -> Json:
    """The body with client tools that carry no `type`; some endpoints know "custom" not at all."""
    if not any("type" in tool for tool in client_tools(body)):
        return body
    tools = [{k: v for k, v in t.items() if k != "type" or v != "custom"} for t in tools_of(body)]
    return {**body, "tools": tools}


def without_reasoning(body: Json) -> Json:
    """The body without thinking, its editing and an effort, as each asks for reasoning."""
    if "thinking" not in body and not effort_of(body):
        return body
    config = {k: v for k, v in as_object(body.get("output_config")).items() if k != "effort"}
    rest = {k: v for k, v in body.items() if k not in ("thinking", "context_management", "output_config")}
    return {**rest, "output_config": config} if config else rest


def without_media(body: Json, kinds: tuple[str, ...] = ("image", "document")) -> Json:
    """The body with words in place of each image and document: a document's own where it is text, else a note."""

    def noted(block: Json) -> Json:
        if block.get("type") in kinds:
            note = "[image left out: this model takes only text]"
            return {"type": "text", "text": note if block["type"] == "image" else document_text(block)}
        if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
            return {**block, "content": [noted(b) for b in blocks_of(block["content"])]}
        return block

    def lighter(message: Json) -> Json:
        if not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [noted(b) for b in blocks_of(message["content"])]}

    messages = [lighter(m) for m in messages_of(body)]
    return body if messages == body.get("messages") else {**body, "messages": messages}


DROPS: dict[str, Callable[[Json], Json]] = {  # entries of a drop list that are no top-level keys
    "billing_header": without_billing_header,
    "tool_type": without_tool_type,
    "media": without_media,
    "files": functools.partial(without_media, kinds=("document",)),
    "reasoning": without_reasoning,
}

_MODEL_KEY = re.compile(rb'"model"\s*:\s*"((?:[^"\\]|\\.)*)"')


def with_model(raw: bytes, old: str, new: str) -> bytes:
    """The body's bytes with the top-level model's name changed and nothing else.

    `"model":` as a key cannot stand inside a JSON string (its quotes would be escaped), so only keys match. The first
    match is the top-level one where nothing was opened before it but the object itself; else the object is walked.
    """
    match = _MODEL_KEY.search(raw)
    if match is None or raw.count(b"{", 0, match.start()) != 1 or b"[" in raw[: match.start()]:
        match = top_level_model(raw)
    if match is None or match[1] != old.encode("utf-8", "backslashreplace"):
        return compact({**json.loads(raw), "model": new})
    view = memoryview(raw)  # so that the body is copied once
    return b"".join((view[: match.start(1)], json.dumps(new)[1:-1].encode(), view[match.end(1) :]))


def top_level_model(raw: bytes) -> re.Match[bytes] | None:
    """The match of the top-level `"model": "..."`, found by the depth it stands at."""
    depth = 0
    for token in re.finditer(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]', raw):
        if token[0] in (b"{", b"["):
            depth += 1
        elif token[0] in (b"}", b"]"):
            depth -= 1
        elif depth == 1 and token[0] == b'"model"' and (match := _MODEL_KEY.match(raw, token.start())):
            return match
    return None


# Headers. Allow-lists both ways: what is not named does not pass.

_PASS_UP = re.compile(r"(?:anthropic|x-claude-code|x-stainless)-[a-z0-9-]+|user-agent|x-app")
_HEADER_VALUE = re.compile(r"[\t -~]*")  # aiohttp (3.14) reads more than this, but does not send it
_PASS_DOWN = re.compile(r"retry-after(?:-ms)?|x-should-retry|anthropic-ratelimit-[a-z0-9-]+|request-id")


def upstream_headers(
    client: Mapping[str, str], slot: Slot, dialect: Dialect, accept: str = "application/json"
) -> dict[str, str]:
    """The headers of a request; `client` are those that came with it."""
    passed = allowed_headers(client, _PASS_UP) if dialect.request is None else {}
    return {
        "content-type": "application/json",
        "accept": accept,
        "accept-encoding": "identity",
        "user-agent": f"ccmux/{__version__}",
        **dict(dialect.headers),
        **passed,
        **auth_headers(slot, dialect),
        **{k.lower(): v for k, v in slot.provider.headers.items()},
    }


def auth_headers(slot: Slot, dialect: Dialect) -> dict[str, str]:
    if slot.provider.passthrough:
        name, _, value = slot.key.partition(" ")
        return {name: value} if value else {}
    style = slot.provider.quirks.auth or dialect.auth
    values = {"x-api-key": slot.key, "authorization": f"Bearer {slot.key}", "x-goog-api-key": slot.key}
    names = {"bearer": ("authorization",), "both": ("x-api-key", "authorization")}.get(style, (style,))
    return {name: values[name] for name in names if slot.key and name in values}  # "none" is none of them


def answer_headers(headers: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """What of an Anthropic-format upstream's headers the client gets."""
    return allowed_headers(headers, _PASS_DOWN) if dialect.request is None else {}


def allowed_headers(headers: Mapping[str, str], allowed: re.Pattern[str]) -> dict[str, str]:
    """The headers that an allow-list names, but for those that Connection says are for one hop."""
    passed, hop = {}, {""}
    for key, value in headers.items():
        name = (allowed_name if len(key) < 64 else allowed_name.__wrapped__)(key, allowed)
        if name == "connection":
            hop.update(part.strip() for part in value.lower().split(","))
        elif name:
            passed[name] = value
    return {k: v for k, v in passed.items() if k not in hop and _HEADER_VALUE.fullmatch(v)}


@functools.lru_cache(1024)
def allowed_name(name: str, allowed: re.Pattern[str]) -> str:
    """A header's name in lower case where the allow-list, or Connection, is meant; else ""."""
    lower = name.lower()
    return lower if allowed.fullmatch(lower) or lower == "connection" else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from retry-after-ms or retry-after as a number or an HTTP date; within 0 to 3600."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if not value:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        return 0.0 if seconds != seconds else min(max(seconds, 0.0), 3600.0)
    return None


def wait_in_body(payload: Any) -> dict[str, str]:
    """As a header, the wait that some tell in an error's body alone (seen 2026): Gemini's retryDelay, of seconds with
    an "s", OpenRouter's X-RateLimit-Reset, a time in milliseconds, and what relays leave of OpenAI's and Groq's: words.
    """
    detail = error_detail(payload)
    for row in as_list(detail.get("details")):
        if delay := as_object(row).get("retryDelay"):
            return {"retry-after": str(delay).removesuffix("s")}
    reset = str(as_object(as_object(detail.get("metadata")).get("headers")).get("X-RateLimit-Reset"))
    if re.fullmatch("[0-9]{13}", reset):
        return {"retry-after": str(int(reset) / 1000 - time.time())}
    told = re.search(
        rf"(?i)\b(?:try again|retry) (?:in|after) ((?:{_SPAN_OF_TIME} ?)+)", error_words(payload)[:MOST_WORDS]
    )
    parts = re.findall(_SPAN_OF_TIME, told[1].lower()) if told else []
    seconds = sum(float(number) * SECONDS_OF[unit] for number, unit in parts)
    return {"retry-after": str(seconds)} if parts else {}


_SPAN_OF_TIME = r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|[hms])(?:ours?|in(?:ute)?s?|ec(?:ond)?s?)?(?![a-z])"
SECONDS_OF = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def client_error(error: ApiError, slot: Slot, call: Call) -> ApiError:
    """The error as the client is to see it: a refused provider key is ccmux's trouble, not the client's
    login.
    """
    error.message = scrub(error.message, call.config.secrets)
    if error.status in (401, 403) and error.retry is Retry.KEY and not slot.provider.passthrough:
        # Claude Code takes every error with this word in it for one about its own key.
        name, said = slot.provider.name, re.sub("(?i)x-api-key", "API key", error.message[:300])
        words = (
            f"provider {name} refuses ccmux's key ({error.status}): check api_key of [[providers]] {name!r}"
        )
        return ApiError(500, f"{words}. It said: {said}", should_retry=False, cause=error.cause)
    if error.status == 529 and error.retry_after is None:
        error.retry_after = 5.0
    return error


def client_format(call: Call) -> ClientFormat:
    if call.format == "chat":
        model, now, old_form = call.asked, int(time.time()), is_old_form(call.chat)
        if call.stream:
            return ChatWriter(model, now, call.wants_usage, old_form)
        return WholeAnswer(lambda answer: chat_completion(answer, model, now, old_form))
    return EventWriter() if call.stream else WholeAnswer(without_cut_off)


Labels = tuple[tuple[str, str], ...]
MetricKey = tuple[str, Labels]


class Metrics:
    """Counters and histograms in Prometheus' text format. Names as the field has them."""

    BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

    def __init__(self) -> None:
        self.counts: dict[MetricKey, float] = {}
        # How many were in each bucket alone, and in none of them; then the sum of all.
        self.times: dict[MetricKey, list[float]] = {}

    def add(self, name: str, labels: Labels, amount: float = 1) -> None:
        key = (name, labels)
        if key in self.counts:
            self.counts[key] += amount
        elif len(self.counts) < MOST_KEPT:
            self.counts[key] = amount

    def attempt(self, provider: str, model: str, error: str) -> None:
        self.add("ccmux_upstream_attempts_total", (("provider", provider), ("model", model)))
        if error:
            self.add("ccmux_upstream_errors_total", (("provider", provider), ("error", error)))

    def observe(self, name: str, labels: Labels, seconds: float) -> None:
        row = self.times.setdefault((name, labels), [0.0] * (len(self.BUCKETS) + 2))
        row[bisect.bisect_left(self.BUCKETS, seconds)] += 1
        row[-1] += seconds

    def render(self, gauges: Mapping[str, float]) -> str:
        """Every family under its TYPE; gauges come with their labels in their names."""
        families: dict[str, list[str]] = {}
        for (name, labels), value in sorted(self.counts.items()):
            families.setdefault(f"{name} counter", []).append(sample(name, labels, value))
        for (name, labels), row in sorted(self.times.items()):
            families.setdefault(f"{name} histogram", []).extend(self.histogram(name, labels, row))
        for name, value in gauges.items():
            families.setdefault(f"{name.partition('{')[0]} gauge", []).append(sample(name, (), value))
        return "".join(f"# TYPE {family}\n{''.join(lines)}" for family, lines in families.items())

    def histogram(self, name: str, labels: Labels, row: list[float]) -> Iterator[str]:
        """Each bucket with all that are below it, the sum, and the count of all."""
        *counts, total = row
        bounds, below = [*(f"{bound:g}" for bound in self.BUCKETS), "+Inf"], [*itertools.accumulate(counts)]
        for bound, count in zip(bounds, below, strict=True):
            yield sample(f"{name}_bucket", (*labels, ("le", bound)), count)
        yield sample(f"{name}_sum", labels, total)
        yield sample(f"{name}_count", labels, below[-1])


def sample(name: str, labels: Labels, value: float) -> str:
    """One line. Whole numbers in full: a counter rounded to six digits would stand still."""
    return f"{name}{labels_text(labels)} {int(value) if value == int(value) else value}\n"


def labels_text(labels: Labels) -> str:
    def quoted(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{k}="{quoted(v)}"' for k, v in labels) + "}" if labels else ""


# ----------------------------------------------------------------------------------------------------------
# HTTP API
# ----------------------------------------------------------------------------------------------------------
# Handlers are thin: guard, read, ask the sections above, answer. Every error leaves through one middleware,
# in Anthropic's shape, with a request id.


@dataclass(slots=True)
class State:
    """The only thing that changes while the server runs. Config is swapped whole; a request reads it once."""

    config: Config
    store: Store
    relay: Relay
    counter: TokenCounter
    metrics: Metrics
    vocabulary: Vocabulary
    admin_token: str = field(default="", repr=False)
    config_error: str = ""  # why the file on disk is not the config in use
    draining: bool = False
    started: float = field(default_factory=time.monotonic)
    calls: dict[str, Call] = field(default_factory=dict)  # in flight, by request id
    posts: dict[str, web.Request] = field(default_factory=dict)  # by id, from their body until their answer
    failures: dict[str, deque[float]] = field(default_factory=dict)  # times of wrong tokens, by address
    listeners: set[asyncio.Queue[Json]] = field(default_factory=set)  # of the live request log
    recorder: Recorder = field(default_factory=lambda: Recorder())
    requests: RequestReader = field(default_factory=RequestReader)
    learning: asyncio.TimerHandle | None = None  # when `requests` is to learn on
    # (URL, model) -> until when it is not asked for its count
    refused_counts: dict[tuple[str, str], float] = field(default_factory=dict)


class Recorder:
    """Keeps the last requests whole while it is switched on: in memory only, and shown without keys."""

    MOST = 20
    LARGEST = 2**20  # bytes of each part that is kept
    PIECEWISE = ("upstream_request", "upstream_answer", "events")

    def __init__(self) -> None:
        self.until = 0.0
        self.held: OrderedDict[str, tuple[Json, list[str]]] = OrderedDict()  # with the secrets of its config

    def switch(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    @property
    def is_on(self) -> bool:
        """Whether it is still on; once it is not, it holds nothing."""
        if is_over := time.monotonic() >= self.until:
            self.held.clear()
        return not is_over

    def summary(self) -> Json:
        left = max(self.until - time.monotonic(), 0) if self.is_on else 0
        listed = ("id", "time", "asked", "route", "target", "status")
        return {
            "on_for_s": round(left),
            "held": [{k: row.get(k) for k in listed} for row, _ in reversed(self.held.values())],
        }

    def begin(self, call: Call) -> None:
        """Starts a record and has the relay add to it."""
        secrets_of = call.config.secrets
        record: Json = {
            "id": call.request_id, "time": iso(datetime.now(UTC)), "asked": call.asked,
            "route": call.route.reason, "client_request": json.loads(scrub(json.dumps(call.body), secrets_of)),
            "client_headers": json.loads(scrub(json.dumps(allowed_headers(call.headers, _PASS_UP)), secrets_of)),
            **{part: bytearray() for part in self.PIECEWISE},
        }  # fmt: skip
        self.held[call.request_id] = record, secrets_of
        if len(self.held) > self.MOST:
            self.held.popitem(last=False)

        def note(part: str, data: bytes) -> None:
            if part == "upstream_request" and record[part]:  # another try
                record[part] += b"\n\n"
                record["upstream_answer"] += b"\n\n"
            if len(record[part]) < self.LARGEST:
                record[part] += data

        call.on_raw = note

    def shown(self, id: str) -> Json | None:
        """A record without keys, taken out of the whole: one may have come in two pieces."""
        if not self.is_on or id not in self.held:
            return None
        record, secrets_of = self.held[id]
        return record | {p: scrub(record[p].decode("utf-8", "replace"), secrets_of) for p in self.PIECEWISE}

    def end(self, call: Call, status: int) -> None:
        if call.request_id in self.held:
            record, _ = self.held[call.request_id]
            target = call.target or call.route.targets[0]
            name = f"{target.provider}/{target.actual_model}"
            record |= {"status": status, "target": name, "attempts": call.attempts}


@functools.cache
def state_key() -> web.AppKey[State]:
    return web.AppKey("state", State)


@functools.cache
def request_key() -> web.RequestKey[str]:
    """Where a request keeps its id."""
    return web.RequestKey("id", str)


def state_of(request: web.Request) -> State:
    return request.app[state_key()]


def one_line(value: Any) -> str:
    """A value for a log line: control characters escaped, so that nobody can write a line of their own."""
    text = str(value)
    safe = text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()
    return f'"{safe}"' if " " in safe or not safe else safe


# The guard in front of every route.

LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
CHANGING = {"POST", "PUT", "PATCH", "DELETE"}


def guard(request: web.Request, config: Config) -> None:
    """ApiError for what no handler should see: other hosts' names, other sites' pages, bodies that are not
    JSON.
    """
    check_host(request, config)
    check_site(request)
    headers = request.headers
    if request.method in CHANGING and request.content_type != "application/json":
        raise ApiError(415, "send Content-Type: application/json")
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed request bodies are not taken; send it plain")
    if (request.content_length or 0) > MAX_BODY:
        raise ApiError(413, f"the request is larger than {MAX_BODY // 2**20} MB")
    if headers.get("Expect", "100-continue").lower() != "100-continue":
        raise ApiError(417, "the only expectation known here is 100-continue")


def check_host(request: web.Request, config: Config) -> None:
    """A page that re-binds its own name to this address (DNS rebinding) still sends its own name as Host."""
    names = [request.headers.get("Host", "")]
    if "://" in request.raw_path.partition("?")[0]:  # absolute-form: that name counts as well
        names.append(urllib.parse.urlsplit(request.raw_path).netloc)
    for name in names:
        if host_name(name) not in allowed_hosts(config.server.host, config.server.allowed_hosts):
            words = "add it to allowed_hosts in [server] if it is this server's own name"
            raise ApiError(421, f"this server is not called {name[:100]!r}; {words}")


@functools.lru_cache(8)
def allowed_hosts(listens_on: str, configured: tuple[str, ...]) -> set[str]:
    """The names of this server: the configured ones, and the one address it listens on where that is one."""
    own = () if is_any_address(listens_on) else (f"[{listens_on}]" if ":" in listens_on else listens_on,)
    return LOOPBACK_HOSTS | {host_name(h) for h in (*own, *configured)} - {""}


def check_site(request: web.Request) -> None:
    """No other site's page may call this server; the two pages themselves may be linked to from anywhere."""
    path, headers = request.path, request.headers
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site", "none")
    if path.startswith("/v1"):
        if origin is not None or site != "none":
            raise ApiError(403, "this API is for programs, not for web pages")
    elif path.startswith(("/api/", "/admin/api/", "/metrics")):
        own = f"{scheme_of(request)}://{headers.get('Host', '')}"
        if origin not in (None, own) or site not in ("none", "same-origin"):
            raise ApiError(403, "this API answers only its own pages")


def scheme_of(request: web.Request) -> str:
    """How a client came: by TLS where a proxy on this machine says so; nobody else is believed."""
    told = request.headers.get("X-Forwarded-Proto", "") if is_loopback(request.remote or "") else ""
    return told if told in ("http", "https") else request.scheme


def new_request_id() -> str:
    """An id that is not given twice. Later ones sort behind earlier ones, so that the database appends to its indexes;
    they are no secret, so one need not cost a system call.
    """
    return f"req_{time.time_ns() >> 20:011x}{random.getrandbits(52):013x}"


async def answer_errors(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
    """The middleware around everything: an id for the request, the guard, errors in Anthropic's shape."""
    request[request_key()] = new_request_id()
    try:
        guard(request, state_of(request).config)
        response: web.StreamResponse = await handler(request)
    except ApiError as error:
        response = error_response(request, error)
    except web.HTTPException as error:
        fault = ApiError(error.status if error.status >= 400 else 502, error.reason)
        response = error_response(request, fault)
    except Exception:  # the client is to hear of a mistake, and the log why
        response = error_response(request, own_fault(request[request_key()]))
    finally:
        state_of(request).posts.pop(request[request_key()], None)
    if not response.prepared:
        response.headers.setdefault("request-id", request[request_key()])
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers["Server"] = "ccmux"
        watch_client(request)
    return response


def watch_client(request: web.Request) -> None:
    """To be called before the last of an answer is sent: aiohttp waits for ever for a client that does not read it."""
    asyncio.get_running_loop().call_soon(cut_off_if_stalled, request, 0)


def cut_off_if_stalled(request: web.Request, before: int) -> None:
    """Ends the connection of a client that has taken nothing since `before` bytes were left; else looks again later."""
    left = request.transport.get_write_buffer_size() if request.transport else 0
    if left == before > 0 and request.transport:
        request.transport.abort()
    elif left:
        limit = state_of(request).config.server.client_stall_timeout
        asyncio.get_running_loop().call_later(limit, cut_off_if_stalled, request, left)


def own_fault(request_id: str) -> ApiError:
    """For an exception that is a mistake of ccmux's: it goes into the log, and none of it to the client."""
    log.exception("request %s failed inside ccmux", request_id)
    return ApiError(500, "ccmux failed at this request; its log says why", cause="internal")


async def no_such_route(request: web.Request) -> web.StreamResponse:
    """ApiError 405 for a path that answers other methods, else 404."""
    for resource in request.app.router.resources():
        _, methods = await resource.resolve(request)
        if methods and "*" not in methods:
            allowed = ", ".join(sorted(methods))
            raise ApiError(405, f"{request.method} is not for {request.path[:200]!r}, but {allowed}")
    known = "Claude Code talks to /v1/messages, clients of OpenAI's API to /v1/chat/completions"
    raise ApiError(404, f"there is no {request.path[:200]!r} here; {known}")


def error_response(request: web.Request, error: ApiError) -> web.Response:
    id = request[request_key()]
    headers = {"request-id": id, **error.headers}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if request.method == "POST" and request.path == "/v1/chat/completions":
        body = compact(chat_error(error, id))
    else:
        body = error.raw or compact(error.body(id))
    return web.Response(status=error.status, body=body, headers=headers, content_type="application/json")


async def expect_continue(request: web.Request) -> None:
    """In place of aiohttp's, which asks for the body before anything is checked: `read_body` does it."""


# Who is asking.


def credentials(request: web.Request) -> list[tuple[str, str, str]]:
    """(header, its value, the key in it) for each credential a client sent."""
    found = []
    if key := request.headers.get("x-api-key", "").strip():
        found.append(("x-api-key", key, key))
    bearer = request.headers.get("Authorization", "")
    if bearer[:7].lower() == "bearer " and bearer[7:].strip():
        found.append(("authorization", bearer, bearer[7:].strip()))
    return found


def client_of(request: web.Request, state: State) -> tuple[User, str]:
    """The user a request is from, and the credential that is not a ccmux key (for passthrough providers)."""
    given = credentials(request)
    own = ""
    user: User | None = None
    for header, value, key in given:
        known = state.store.authenticate(key)
        user = user or known
        own = own or ("" if known else f"{header} {value}")
    if user is None and state.config.server.require_key:
        count_failure(state, request)
        words = "unknown key" if given else "a key is needed"
        raise ApiError(401, f"{words}: set ANTHROPIC_AUTH_TOKEN to your ccmux key", should_retry=False)
    user = user or state.store.local_user()
    if user.disabled:
        raise ApiError(403, f"user {user.name} is disabled; ask whoever runs this ccmux", should_retry=False)
    return user, own


def count_failure(state: State, request: web.Request) -> None:
    """Ten wrong tokens a minute from one address; then 429. A right one never comes here."""
    now, address = time.monotonic(), request.remote or ""
    times = state.failures.setdefault(address, deque(maxlen=10))
    left = times[0] + 60 - now if len(times) == 10 else 0.0
    if left > 0:
        raise ApiError(429, "too many wrong keys; wait a minute", retry_after=left, should_retry=False)
    times.append(now)
    forget_oldest(state.failures)


def is_admin(request: web.Request, state: State) -> bool:
    """Whether the admin token came as Bearer. Compared as bytes: str comparison raises beyond ASCII."""
    given = next((key for header, _, key in credentials(request) if header == "authorization"), "")
    token = state.admin_token.encode()
    return bool(token) and hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token)


def require_admin(request: web.Request) -> State:
    state = state_of(request)
    if not is_admin(request, state):
        count_failure(state, request)
        words = "the admin token is needed; the start-up text has the link, `ccmux.py token` prints it"
        raise ApiError(401, words)
    return state


async def read_body(request: web.Request) -> bytes:
    """The whole body; ApiError 408 when it stalls for 30 s or takes too long, 413 when it grows too large."""
    state = state_of(request)
    state.posts[request[request_key()]] = request
    if "Expect" in request.headers and request.transport:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if request.content.is_eof() and request.content.exception() is None:
        return await request.content.read()  # it is all there: nothing to wait for
    loop = asyncio.get_running_loop()
    end = loop.time() + state.config.server.body_timeout
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout_at(min(end, loop.time() + 30)) as idle:
            while chunk := await request.content.readany():
                size += len(chunk)
                if size > MAX_BODY:
                    raise ApiError(413, f"the request is larger than {MAX_BODY // 2**20} MB")
                chunks.append(chunk)
                idle.reschedule(min(end, loop.time() + 30))
    except TimeoutError:
        raise ApiError(408, "the request body did not arrive in time") from None
    except (aiohttp.ClientError, web.RequestPayloadError, ValueError) as fault:
        raise ApiError(400, f"the request body is broken ({type(fault).__name__})") from None
    return b"".join(chunks)


async def read_request(request: web.Request, state: State) -> tuple[bytes, Json]:
    """A request's bytes, and what they say. What is new in a large one is learnt while its answer is awaited."""
    raw = await read_body(request)
    body = state.requests.read(raw)
    if state.requests.unread and state.learning is None:
        state.learning = asyncio.get_running_loop().call_later(0.1, learn, state)
    return raw, body


def learn(state: State) -> None:
    """A step of it, under a millisecond but for what one very large message takes; then others have their turn."""
    is_more = state.requests.learn()
    state.learning = asyncio.get_running_loop().call_later(0.002, learn, state) if is_more else None


# Messages.


async def post_messages(request: web.Request) -> web.StreamResponse:
    state = state_of(request)
    user, credential = client_of(request, state)
    raw, body = await read_request(request, state)
    call = await plan_call(request, state, body, raw)
    del body  # else it would be here for as long as its answer streams
    call.credential = credential
    return await Exchange(request, state, call, user).serve()


async def post_chat_completions(request: web.Request) -> web.StreamResponse:
    """An OpenAI-format request, served by any provider through the same machinery."""
    state = state_of(request)
    user, credential = client_of(request, state)
    _, given = await read_request(request, state)
    body, unserved = chat_request(given)
    call = await plan_call(request, state, body, b"", format="chat")
    call.unserved = unserved
    call.credential = credential
    call.body = {**call.body, "stream": True}  # upstream; the client's own wish is call.stream
    call.chat = given
    call.wants_usage = as_object(given.get("stream_options")).get("include_usage") is True
    return await Exchange(request, state, call, user).serve()


RULE_TIME = 1.0  # seconds of CPU


def route_of(body: Json, headers: Mapping[str, str], config: Config, tokens: int = 0) -> Route:
    """`choose_route` with an alarm for the prompt rules: a repeat inside a repeat may search for ever, and nothing
    else is served meanwhile. Windows has no such alarm, and only the main thread hears it.
    """
    is_heard = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not config.router.rules or not is_heard:
        return choose_route(body, headers, config, tokens)
    before = signal.signal(signal.SIGVTALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, RULE_TIME)
        return choose_route(body, headers, config, tokens)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def ring(*_: Any) -> NoReturn:
    log.warning(
        "the patterns of [[router.rules]] took more than %g s on a prompt, and nothing else was served; is there a "
        "repeat inside a repeat?",
        RULE_TIME,
    )
    raise TimeoutError


async def plan_call(
    request: web.Request, state: State, body: Json, raw: bytes, format: str = "anthropic"
) -> Call:
    """Routes a request, and counts it: before that where it may be a long one, before its hold where credits are
    enforced, else (where its answer begins with the count) while that is awaited.
    """
    config, started = state.config, time.monotonic()
    headers = headers_of(request)
    may_be_long = bool(config.router.long_context) and not is_surely_within(raw, body, config.smallest_limit)
    if len(raw) > LARGE:
        await asyncio.sleep(0)
    items = items_of(body) if may_be_long else None
    early = await state.counter.count(body, "", asked_model(body), items) if items else 0
    route = route_of(body, headers, config, early)
    translated = [DIALECTS[p.format].request is not None for p in providers_of(config, route)]
    if "safeguards" in body and translated and all(translated):  # of auto mode; the client then does without
        raise no_safeguards()
    call = Call(
        request_id=request[request_key()],
        body=route.body or body,
        raw=b"" if route.body else raw,
        headers=headers,
        route=route,
        config=config,
        stream=body.get("stream") is True,
        asked=str(body.get("model")),
        format=format,
        session=session_of(body, headers),
        query=request.query_string,
        started=started,
    )
    first, items = route.targets[0], None if route.body else items
    count = functools.partial(state.counter.count, call.body, first.provider, first.actual_model, items)
    if may_be_long or config.credits.enforce:
        call.tokens, call.is_counted = await count(), True
    else:
        call.tokens = max(1, (request.content_length or len(raw)) // 4)
        # For a translated answer's beginning. A server that only forwards starts no process to count (115 MB).
        call.count = count if any(translated) else None
    return call


def headers_of(request: web.Request) -> dict[str, str]:
    """A request's headers under lower-case names; one that stands in several lines is their list (RFC 9110, 5.3)."""
    found: dict[str, str] = {}
    for key, value in request.headers.items():
        name = key.lower()
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def session_of(body: Json, headers: Mapping[str, str]) -> str:
    """Claude Code's session id: from its header, or from the JSON text in metadata.user_id."""
    if session := headers.get("x-claude-code-session-id"):
        return session[:128]
    given = as_object(body.get("metadata")).get("user_id")
    if not isinstance(given, str):
        return ""
    try:
        return str(as_object(json.loads(given)).get("session_id") or "")[:128]
    except (ValueError, RecursionError):
        return given.partition("session_")[2][:128]


WRITE_NOW = 2**15  # bytes; asyncio has a writer wait from twice as many on
CLIENT_BUFFER = 2**18  # bytes; the kernel's own buffer grows to 4 MB for a client that does not read


class StreamSink:
    """A streaming client. Its 200 goes out with the first bytes, or with the first ping."""

    def __init__(
        self, request: web.Request, headers: Callable[[], dict[str, str]], interval: float, ping: bytes = PING
    ) -> None:
        self.request, self.headers, self.interval, self.ping = request, headers, interval, ping
        kind = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        safe = {"X-Content-Type-Options": "nosniff", "Server": "ccmux"}
        self.response = web.StreamResponse(headers=kind | safe)
        self.response._send_headers_immediately = False  # aiohttp 3.14: with the first event, in one piece
        if request.version < aiohttp.HttpVersion11:
            self.response.force_close()  # without chunks it is the connection's end that ends a stream
        self.began = False
        self.last = time.monotonic()
        self.pinging: asyncio.Task[None] | None = None
        self.timer = asyncio.get_running_loop().call_later(interval / 4, self.look)

    async def begin(self) -> None:
        if self.began:
            return
        self.began = True
        self.response.headers.update({**self.headers(), "X-Accel-Buffering": "no"})
        try:
            await self.response.prepare(self.request)
        except ConnectionError:
            raise ClientGoneError from None
        if self.request.transport and (client := self.request.transport.get_extra_info("socket")):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CLIENT_BUFFER)

    async def write(self, data: bytes) -> None:
        self.last = 0.0  # since the last look: the next one takes the time
        try:
            await self.response.write(data)
        except ConnectionError:
            raise ClientGoneError from None

    def look(self) -> None:
        """Pings after each interval of silence. What is written elsewhere is whole events, so a ping always fits."""
        now, pause = time.monotonic(), self.interval / 4
        self.last = self.last or now - pause
        left = self.last + self.interval - now
        if left <= 0:
            self.last = now
            if self.pinging is None or self.pinging.done():
                self.pinging = asyncio.create_task(self.send_ping())
        self.timer = asyncio.get_running_loop().call_later(min(left, pause) if left > 0 else pause, self.look)

    def write_now(self, data: bytes) -> bool:
        transport = self.request.transport
        if transport is None or transport.get_write_buffer_size() or len(data) > WRITE_NOW:
            return False
        self.last = 0.0  # as in `write`
        try:
            self.response.write(data).send(None)  # it waits only for a client that is behind
        except StopIteration:
            return True
        except ConnectionError:
            raise ClientGoneError from None
        raise AssertionError("aiohttp waits for more than it did")

    async def send_ping(self) -> None:
        with contextlib.suppress(ClientGoneError, ConnectionError):  # the exchange itself will notice
            await self.begin()
            await self.response.write(self.ping)

    async def finish(self, ending: bytes) -> web.StreamResponse:
        self.close()  # while the end waits for a client that is behind, a ping would go out behind it
        await self.response.write_eof(ending)
        return self.response

    def close(self) -> None:
        self.timer.cancel()
        if self.pinging:
            self.pinging.cancel()


NOTE_AFTER = 0.01  # seconds: the floor of an answer that is over sooner need not be written down


class Exchange:
    """One client request from its hold to its settlement."""

    def __init__(self, request: web.Request, state: State, call: Call, user: User) -> None:
        self.request, self.state, self.call, self.user = request, state, call, user
        self.hold: Hold | None = None
        self.settled: asyncio.Future[None] | None = None
        self.done: Settlement | None = None
        self.floor = 0  # as noted for a crash
        self.floor_note: asyncio.TimerHandle | None = None
        call.on_answer, call.on_failure = self.on_answer, self.on_failure

    async def serve(self) -> web.StreamResponse:
        call, state = self.call, self.state
        if state.draining:
            raise shutting_down()
        await self.place_hold()
        sink = self.sink() if call.stream else None
        state.calls[call.request_id] = call
        error: ApiError | None = None
        try:
            if state.recorder.is_on:
                state.recorder.begin(call)
            await state.relay.run(call, sink)
            self.settle(None)
            await self.durable()
            assert call.reader is not None
            ending = call.reader.ending + self.epilogue()
            if sink is None:
                return web.Response(body=ending, headers=self.headers(), content_type="application/json")
            watch_client(self.request)
            return await sink.finish(ending)
        except (ClientGoneError, ConnectionError):
            raise asyncio.CancelledError from None  # as if aiohttp had noticed first
        except Exception as fault:  # a mistake of ccmux's, too, is settled, and ends the answer
            error = fault if isinstance(fault, ApiError) else own_fault(call.request_id)
            self.settle(error)
            if sink is None or not sink.began:
                if call.on_raw:
                    call.on_raw("events", error.raw or compact(error.body(call.request_id)))
                error.headers = {**self.headers(), **error.headers}
                raise error from None
            watch_client(self.request)
            return await self.fail(sink, error)
        finally:
            if sink:
                sink.close()
            state.calls.pop(call.request_id, None)
            self.settle(error)
            # They lead back here: the request would wait for the collector.
            del call.on_answer, call.on_failure, call.on_raw

    def epilogue(self) -> bytes:
        """What follows an answer's ending: nothing, but for the admin page's own requests."""
        return b""

    def sink(self) -> StreamSink:
        ping = PING if self.call.format == "anthropic" else b": ping\n\n"
        return StreamSink(self.request, self.headers, self.state.relay.ping_interval, ping)

    async def fail(self, sink: StreamSink, error: ApiError) -> web.StreamResponse:
        """After the 200: an `error` event (unless the upstream's own went out), then the end."""
        if error.cause == "client_stall":
            if self.request.transport:
                self.request.transport.abort()
            return sink.response
        call, reader = self.call, self.call.reader
        with contextlib.suppress(ClientGoneError, ConnectionError):  # the client has left meanwhile
            if not (call.has_answered and reader and reader.error_relayed and reader.error is error):
                last = encode_error(error, call)
                if call.on_raw:
                    call.on_raw("events", last)
                await sink.write(last)
            await sink.finish(b"")
        return sink.response

    def on_answer(self) -> None:
        """From now on a crash charges the input, at the price of the target that answers."""
        if self.floor_note:
            self.floor_note.cancel()
        if self.hold:
            target = self.call.target or self.call.route.targets[0]
            self.floor_note = asyncio.get_running_loop().call_later(NOTE_AFTER, self.note_floor, target)

    def on_failure(self) -> None:
        """A crash before the next try is answered charges nothing."""
        if self.floor_note:
            self.floor_note.cancel()
        if self.hold and self.floor:
            self.floor = 0
            self.state.store.answered(self.hold, 0)

    def note_floor(self, target: Target) -> None:
        """The input's cost, with markup: what a request costs once its upstream has begun to answer."""
        price = self.price_of(target)
        markup = self.call.config.credits.markup_percent
        assert self.hold is not None
        self.floor = hold_of(self.call.tokens, 0, price, markup) if price else 0
        self.state.store.answered(self.hold, self.floor)

    # Money.

    async def place_hold(self) -> None:
        call, credits = self.call, self.call.config.credits
        limit = most_output(call.body)
        prices = filter(None, map(self.price_of, call.route.targets))
        amounts = [hold_of(call.tokens, limit, price, credits.markup_percent) for price in prices]
        try:
            self.hold = await self.state.store.hold(
                self.user.id,
                call.request_id,
                max(amounts, default=0),
                enforce=self.is_enforced,
                max_concurrent=credits.max_concurrent,
            )
        # Refused, or the client has left while it was on its way to the disk.
        except (ApiError, asyncio.CancelledError) as ended:
            self.settle(ended if isinstance(ended, ApiError) else None)
            raise

    @property
    def is_enforced(self) -> bool:
        """Whether this user's balance and budgets can refuse a request."""
        return self.call.config.credits.enforce and self.user.name != LOCAL_USER

    def price_of(self, target: Target) -> Price | None:
        return charged_price(self.call.config, target, self.call.route.model)

    def usage(self, error: ApiError | None) -> Usage:
        """As the upstream told it, else counted here and marked; none for what cost nothing."""
        call, reader = self.call, self.call.reader
        if reader is None or not (call.has_answered if error else call.first_content):
            has_left = error is None and call.is_answered  # the client
            return Usage(input=self.input_tokens(), estimated=True) if has_left else NO_USAGE
        told = reader.usage
        model = call.target.actual_model if call.target else ""
        if reader.ended and told and not told.estimated and not getattr(reader, "usage_broken", False):
            return told
        counted = self.state.relay.count_output(reader.output_text(), model)
        if told is None or not told.prompt:  # 0 at an answer's beginning is not known yet
            told = Usage(input=self.input_tokens(), output=told.output if told else 0)
        return dataclasses.replace(told, output=max(told.output, counted), estimated=True)

    def input_tokens(self) -> int:
        """As counted; now, where nothing needed the count so far."""
        call = self.call
        if not call.is_counted:
            target = call.target or call.route.targets[0]
            body = call.body or strict_json(call.raw)
            return self.state.counter.count_now(body, target.provider, target.actual_model)
        return call.tokens

    def settle(self, error: ApiError | None) -> None:
        """Puts the settlement on the store's queue, once, without waiting: a cancelled handler may not wait."""
        if self.settled is not None:
            return
        if self.floor_note:
            self.floor_note.cancel()
        self.done = self.settlement(error)
        self.settled = self.state.store.settle(self.done, self.show)
        self.tell(self.done)

    def settlement(self, error: ApiError | None) -> Settlement:
        call, config = self.call, self.call.config
        usage = self.usage(error)
        target = call.target or call.route.targets[0]
        costs_nothing = usage == NO_USAGE
        price = None if costs_nothing else self.price_of(target)
        price = fast_price(price) if price and usage.fast else price
        is_priced = costs_nothing or price_of(config, target, call.route.model) is not None
        charge = charge_of(usage, price, config.credits.markup_percent) if price else Charge(0, 0, 0)
        order = ", then ".join(f"{t.provider}/{t.actual_model}" for t in call.route.targets)
        status = error.status if error else 200 if call.reader and call.reader.ended else 499
        return Settlement(
            request_id=call.request_id,
            user=self.user.name,
            session=call.session,
            agent=call.headers.get("x-claude-code-agent-id", "")[:128],
            asked=call.asked,
            route=call.route.reason,
            provider=target.provider,
            model=target.actual_model,
            stream=call.stream,
            status=status,
            error=error.cause if error else "" if status == 200 else "client_gone",
            attempts=call.tries,
            usage=usage,
            cost=charge.cost if is_priced else None,
            markup=charge.markup if is_priced else None,
            charge=charge.charge,
            price=price_json(price) if price else None,
            first_token_ms=round((call.first_content - call.started) * 1000) if call.first_content else None,
            duration_ms=round((time.monotonic() - call.started) * 1000),
            stop_reason=str(call.reader.stop_reason or "")[:64] if call.reader else "",
            trail=[*map(list, call.route.trail), ["targets", order]],
        )

    async def durable(self) -> None:
        """Waits until the settlement is on disk, but for a disk that takes none only so long: the answer was made."""
        assert self.settled is not None
        if self.settled.done():
            return
        try:
            async with asyncio.timeout(5):  # it is written nevertheless
                await self.settled
        except TimeoutError:
            log.error("settlement of %s is not on disk yet; it will be tried again", self.call.request_id)
        except Exception:  # the writer has logged what it cannot write, and the answer was made all the same
            return

    def tell(self, done: Settlement) -> None:
        """One log line, the metrics, the recorder, and the counter's lesson."""
        usage, call = done.usage, self.call
        metrics, model = self.state.metrics, ("model", done.model)
        provider = ("provider", done.provider)
        metrics.add("ccmux_requests_total", (provider, model, ("status", str(done.status))))
        for kind in ("input", "output", "cache_read", "cache_write", "cache_write_1h"):
            if amount := getattr(usage, kind):
                metrics.add("ccmux_tokens_total", (("kind", kind), model), amount)
        if done.cost:
            metrics.add("ccmux_cost_microusd_total", (model,), done.cost)
        if done.first_token_ms is not None:
            metrics.observe("ccmux_first_token_seconds", (provider,), done.first_token_ms / 1000)
        if done.status == 200 and not usage.estimated and call.is_counted:
            self.state.counter.observe(done.provider, done.model, call.tokens, usage.prompt)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", log_line(done))
        self.state.recorder.end(call, done.status)

    def show(self) -> None:
        """The row for the live log, once it is on disk: who begins to listen now finds it there."""
        row = settlement_row(self.done) if self.done and self.state.listeners else {}
        for listener in self.state.listeners:
            if not listener.full():
                listener.put_nowait(row)

    def headers(self) -> dict[str, str]:
        """The headers every answer of a model carries.

        The upstream's name of the model is only known once it answers.
        """
        target = self.call.target or self.call.route.targets[0]
        return {
            "request-id": self.call.request_id,
            "x-ccmux-provider": header_text(target.provider),
            "x-ccmux-model": header_text(target.actual_model),
            "x-ccmux-route": self.call.route.reason,
            "x-ccmux-attempts": str(self.call.tries),
            **(self.state.store.budget_headers(self.user) if self.is_enforced else {}),
            **self.call.reply_headers,
        }


def header_text(text: str) -> str:
    """A name as a header value: printable ASCII."""
    return text.encode("ascii", "backslashreplace").decode() if text.isprintable() else repr(text)


def encode_error(error: ApiError, call: Call) -> bytes:
    if call.format == "chat":
        return b"data: %s\n\n" % compact(chat_error(error, call.request_id))
    return encode_event(error.body(call.request_id))


def log_line(done: Settlement) -> str:
    usage = done.usage
    fields = {
        "request": done.request_id, "user": done.user, "asked": done.asked, "route": done.route,
        "target": f"{done.provider}/{done.model}", "status": done.status, "attempts": done.attempts,
        "in": usage.input, "cached": usage.cache_read, "out": usage.output,
        "cost": "unknown" if done.cost is None else money(done.cost),
        "first": f"{(done.first_token_ms or 0) / 1000:.2f}", "seconds": f"{done.duration_ms / 1000:.2f}",
        "stop": done.stop_reason, "error": done.error, "session": done.session[:8],
    }  # fmt: skip
    return " ".join(f"{k}={one_line(v)}" for k, v in fields.items() if v != "")


# Counting, models, health.


async def post_count_tokens(request: web.Request) -> web.StreamResponse:
    """The input tokens of a request: the upstream's own count where it has one, else counted here. Free."""
    state = state_of(request)
    _, credential = client_of(request, state)
    _, body = await read_request(request, state)
    headers = headers_of(request)
    try:
        route = route_of(body, headers, state.config)
    except ApiError as error:
        if error.status != 404:
            raise
        return web.json_response({"input_tokens": await state.counter.count(body, "", asked_model(body))})
    target = route.targets[0]
    call = Call(
        request[request_key()], body, b"", headers, route, state.config, stream=False, credential=credential
    )
    tokens = await upstream_count(state, call, target)
    if tokens is None:
        tokens = await state.counter.count(route.body or body, target.provider, target.actual_model)
    return web.json_response({"input_tokens": tokens})


async def upstream_count(state: State, call: Call, target: Target) -> int | None:
    """What an Anthropic-format upstream says a request counts; None where it does not, or not in 3 s."""
    provider = call.config.provider(target.provider)
    if provider is None or not provider.usable or DIALECTS[provider.format].request or not provider.base_url:
        return None
    dialect = DIALECTS[provider.format]
    url = endpoint_url(provider.base_url, dialect, "/messages/count_tokens")
    place = (url, target.actual_model)  # a 404 may be of the model alone
    if provider.quirks.count_tokens == "local" or state.refused_counts.get(place, 0.0) > time.monotonic():
        return None
    slot = state.relay.slots_of(target, provider, call.credential)[0]
    body = {**count_request_body(call.body), "model": target.actual_model}
    request = UpstreamRequest(url, upstream_headers(call.headers, slot, dialect), compact(body))
    try:
        async with asyncio.timeout(3):
            response = await state.relay.post(state.relay.session, request, provider)
            answer = await response.read()
        told = json.loads(answer) if response.status == 200 else None
        is_none = response.status in (400, 404, 405, 501) and provider.quirks.count_tokens == "auto"
        rest = 86_400 if is_none else 0
    except TimeoutError:  # each count would wait for it
        told, rest = None, 300
    except UPSTREAM_FAULTS():
        return None
    if rest:
        forget_oldest(state.refused_counts)
        state.refused_counts[place] = time.monotonic() + rest
    return token_number(as_object(told).get("input_tokens")) or None  # gateways that cannot count say 0


async def get_models(request: web.Request) -> web.StreamResponse:
    """Every name a client may ask for, in a shape that Anthropic's and OpenAI's clients both read.

    Claude Code's discovery keeps only ids with `claude` or `anthropic` in them, so each name is also listed as
    `anthropic/<name>`; routing takes the prefix off again.
    """
    state = state_of(request)
    client_of(request, state)
    names = model_names(state.config)
    listed = [model_entry(n, n) for n in names]
    listed += [
        model_entry(f"anthropic/{n}", f"{n} (by ccmux)") for n in names if not n.startswith("anthropic/")
    ]
    first, last = (listed[0]["id"], listed[-1]["id"]) if listed else (None, None)
    page = {"object": "list", "data": listed, "has_more": False, "first_id": first, "last_id": last}
    return web.json_response(page)


def model_entry(id: str, display_name: str) -> Json:
    return {
        "type": "model", "id": id, "display_name": display_name, "created_at": "2026-01-01T00:00:00Z",
        "lifecycle": "active", "object": "model", "created": 1767225600, "owned_by": "ccmux",
    }  # fmt: skip


async def get_model(request: web.Request) -> web.StreamResponse:
    state = state_of(request)
    client_of(request, state)
    name = request.match_info["id"]
    if not resolve(state.config, asked_model({"model": name})):
        raise no_such_model(state.config, name)
    return web.json_response(model_entry(name, name))


async def get_hello(request: web.Request) -> web.StreamResponse:
    return web.json_response({"status": "ok"})


async def get_health(request: web.Request) -> web.StreamResponse:
    state = state_of(request)
    status = "draining" if state.draining else "ok"
    uptime = round(time.monotonic() - state.started)
    body: Json = {"status": status, "version": __version__, "uptime_s": uptime}
    if is_admin(request, state) or not state.config.server.require_key:
        body["providers"] = {p.name: provider_health(state, p) for p in state.config.providers}
    return web.json_response(body, status=503 if state.draining else 200)


def provider_health(state: State, provider: Provider) -> Json:
    """A provider's state word, its last outcomes, and when a resting or broken part of it is tried again."""
    now = time.monotonic()
    health = state.relay.health_of(provider.name)
    keys = {key_id(key) for key in provider.api_key or ("",)}

    def is_used(place: tuple[str, str, str]) -> bool:  # not so a key that the config no longer has
        return place[0] == provider.name and (place[2] in keys or provider.passthrough)

    open_now = [b for k, b in state.relay.breakers.items() if is_used(k) and b.state(now) != "closed"]
    resting = [t - now for k, t in state.relay.cooling.items() if is_used(k) and t > now]
    waits = [max(b.open_until - now, 0) for b in open_now] + resting
    word = "disabled" if not provider.enabled else "unusable" if provider.problem else ""
    word = word or (open_now[0].state(now) if open_now else "cooling" if resting else "ok")
    good = [o["ms"] for o in health.outcomes if o["ok"]]
    return {
        "state": word,
        "problem": provider.problem,
        "active": health.active,
        "latency_ms": round(sum(good) / len(good)) if good else None,
        "next_try_s": round(min(waits), 1) if waits else None,
        "outcomes": list(health.outcomes),
    }


async def get_metrics(request: web.Request) -> web.StreamResponse:
    state = require_admin(request)
    now = time.monotonic()
    states = {"closed": 0, "half-open": 1, "open": 2}
    gauges: dict[str, float] = {"ccmux_requests_in_flight": len(state.calls)}
    for (provider, model, key), breaker in state.relay.breakers.items():
        labels = labels_text((("provider", provider), ("model", model), ("key", key)))
        gauges[f"ccmux_breaker_state{labels}"] = states[breaker.state(now)]
    return web.Response(text=state.metrics.render(gauges), content_type="text/plain", charset="utf-8")


def api_routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/messages", post_messages),
        web.post("/v1/messages/count_tokens", post_count_tokens),
        web.post("/v1/chat/completions", post_chat_completions),
        web.get("/v1/models", get_models),
        web.get("/v1/models/{id:.+}", get_model),
        web.get("/api/hello", get_hello),
        web.get("/health", get_health),
        web.get("/metrics", get_metrics),
    ]


# ----------------------------------------------------------------------------------------------------------
# Admin API
# ----------------------------------------------------------------------------------------------------------
# JSON for the two pages and for scripts. User endpoints answer for the key's own user; /admin/api needs the
# admin token.


def page_query(request: web.Request) -> tuple[int, int]:
    """`limit` (1 to 500, 50 if left out) and `before` (an id) of a list's query."""
    limit, before = query_number(request, "limit", 50), query_number(request, "before", 0)
    return min(max(limit, 1), 500), before


def query_number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, "")
    if text and not re.fullmatch(r"\d{1,15}", text):
        raise ApiError(400, f"{name}: must be a whole number, not {text[:40]!r}")
    return int(text) if text else default


def query_choice(request: web.Request, name: str, known: Iterable[str], default: str) -> str:
    value = request.query.get(name, default)
    if value not in known:
        raise ApiError(400, f"{name}: {known_names(value[:40], known)}")
    return value


def query_time(request: web.Request, name: str) -> str:
    """A date or a moment in ISO 8601, as text that compares with the request log's times; "" where left out."""
    text = request.query.get(name, "")
    try:
        return iso_text(text)
    except (ValueError, OverflowError):
        raise ApiError(400, f"{name}: must be a date such as 2026-11-24 or a time in ISO 8601") from None


def iso_text(text: str) -> str:
    """A date or time as the log writes times (UTC, milliseconds, Z); "" for ""; ValueError for anything else."""
    if not text:
        return ""
    moment = datetime.fromisoformat(text)
    return iso(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


async def body_of(request: web.Request, known: Iterable[str]) -> Json:
    """A small JSON object with known keys only; ApiError 400 naming the nearest one."""
    body = strict_json(await read_body(request) or b"{}")
    for key in body:
        if key not in known:
            raise ApiError(400, f"unknown key {key[:40]!r}: {known_names(key, known)}")
    return body


def microusd_in(body: Json, name: str, least: int = 0) -> int | None:
    """A whole number of micro-dollars out of a body; None where it is left out or null."""
    value = body.get(name)
    if value is not None and (type(value) is not int or not least <= value <= 10**15):
        words = f"{name}: must be a whole number of micro-dollars (1 dollar is 1000000), at least {least}"
        raise ApiError(400, words)
    return value


def text_in(body: Json, name: str, longest: int = 500) -> str:
    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > longest or storable(value) != value:
        raise ApiError(400, f"{name}: must be a text of at most {longest} characters")
    return value


def budgets_in(body: Json) -> dict[str, int | None]:
    """`budgets` as columns; a null takes a budget away, what is not named stays."""
    given = body.get("budgets") or {}
    if not isinstance(given, dict) or not given.keys() <= {*BUDGET_COLUMNS}:
        raise ApiError(400, f"budgets: an object with {', '.join(BUDGET_COLUMNS)}")
    return {key: microusd_in(given, key) for key in given}


async def table_response(
    request: web.Request, name: str, read: Callable[[], Iterable[Json]], columns: Iterable[str]
) -> web.Response:
    """Rows as JSON, or as a CSV file where `format=csv` asks for it.

    They are read and written out in a thread: a million take many seconds.
    """
    if query_choice(request, "format", ("json", "csv"), "json") == "json":
        data = await asyncio.to_thread(lambda: rows_json(name, read()))
        return web.Response(body=data, content_type="application/json", charset="utf-8")
    data = await asyncio.to_thread(lambda: csv_text(read(), columns).encode())
    headers = {"Content-Disposition": f'attachment; filename="ccmux-{name}.csv"'}
    return web.Response(body=data, content_type="text/csv", charset="utf-8", headers=headers)


def rows_json(name: str, rows: Iterable[Json]) -> bytes:
    """`{name: [...]}`, row by row: encoding it at one go would keep Python's lock for as long as it takes."""
    return b'{"%b": [%b]}' % (name.encode(), b", ".join(json.dumps(row).encode() for row in rows))


async def export_response(request: web.Request, store: Store, user: str | None) -> web.Response:
    """The usage rows of a period, of one user or of all."""
    since, until = query_time(request, "since"), query_time(request, "until")
    read = functools.partial(store.export, since, until, user)
    return await table_response(request, "usage", read, USAGE_COLUMNS)


# For users.


def own_store(request: web.Request) -> tuple[Store, str]:
    """The store, and the name of the user whose key the request has."""
    state = state_of(request)
    return state.store, client_of(request, state)[0].name


async def get_me(request: web.Request) -> web.StreamResponse:
    store, user = own_store(request)
    return web.json_response(store.user_json(store.known(user)))


async def get_my_models(request: web.Request) -> web.StreamResponse:
    """What may be asked for, and what users pay for it (dollars per million tokens, with markup)."""
    state = state_of(request)
    client_of(request, state)
    return web.json_response(
        {"models": [model_json(state.config, name) for name in model_names(state.config)]}
    )


def model_json(config: Config, name: str) -> Json:
    targets = resolve(config, name)
    first = targets[0] if targets else None
    price = charged_price(config, first, name) if first else None
    context = context_of(config, name, targets) or (facts_of(first.actual_model).context if first else 0)
    shown = [f"{t.provider}/{t.actual_model}" for t in targets]
    return {
        "name": name,
        "targets": shown,
        "context": context or None,
        "price": price_json(with_markup(price, config.credits.markup_percent)) if price else None,
    }


async def get_my_usage(request: web.Request) -> web.StreamResponse:
    store, user = own_store(request)
    by = query_choice(request, "by", ("day", "model", "session"), "day")
    days = min(max(query_number(request, "days", 30), 1), 3660)
    since = iso_text(f"{datetime.now(UTC).date() - timedelta(days=days - 1)}")
    rows = await asyncio.to_thread(store.report, by, since, "", user)
    return web.json_response({"usage": rows, "by": by, "days": days})


async def get_my_transactions(request: web.Request) -> web.StreamResponse:
    store, user = own_store(request)
    return web.json_response({"transactions": store.transactions(user, *page_query(request))})


async def get_my_requests(request: web.Request) -> web.StreamResponse:
    store, user = own_store(request)
    return web.json_response({"requests": store.requests(user, *page_query(request))})


async def get_my_export(request: web.Request) -> web.StreamResponse:
    return await export_response(request, *own_store(request))


async def post_purchase(request: web.Request) -> web.StreamResponse:
    own_store(request)
    raise ApiError(
        501, "ccmux takes no payments: ask whoever runs this server, who can add credit on the admin page"
    )


# For the admin. Writes wait in threads: another process may have the database for seconds.


async def get_users(request: web.Request) -> web.StreamResponse:
    store = require_admin(request).store
    return web.json_response({"users": [store.user_json(user) for user in store.users()]})


async def post_user(request: web.Request) -> web.StreamResponse:
    """A new user; the only answer that ever has the key in it."""
    state = require_admin(request)
    body = await body_of(request, ("name", "credit_microusd", "budgets", "note"))
    credit = microusd_in(body, "credit_microusd")
    if credit is None:
        credit = int(state.config.credits.starting_credit * 10**6)
    with operator_errors():
        name, budgets, note = text_in(body, "name", 64), budgets_in(body), text_in(body, "note")
        user, key = await asyncio.to_thread(state.store.add_user, name, credit, budgets, note)
    return web.json_response({**state.store.user_json(user), "key": key}, status=201)


@contextlib.contextmanager
def operator_errors() -> Iterator[None]:
    """What the command line says in one line, as a 400, a 404 or a 409."""
    try:
        yield
    except ConfigError as error:
        words = str(error)
        status = 404 if words.startswith("no user") else 409 if "already" in words else 400
        raise ApiError(status, words) from None


async def patch_user(request: web.Request) -> web.StreamResponse:
    store = require_admin(request).store
    body = await body_of(request, ("disabled", "budgets"))
    name = request.match_info["name"]
    disabled, budgets = body.get("disabled"), budgets_in(body)
    if "disabled" in body and not isinstance(disabled, bool):
        raise ApiError(400, "disabled: must be true or false")
    with operator_errors():
        user = await asyncio.to_thread(store.set_budgets, name, budgets)
        if disabled is not None:
            user = await asyncio.to_thread(store.set_disabled, name, disabled)
    return web.json_response(store.user_json(user))


async def post_credit(request: web.Request) -> web.StreamResponse:
    store = require_admin(request).store
    body = await body_of(request, ("amount_microusd", "note", "key"))
    amount = microusd_in(body, "amount_microusd", -(10**15))
    if amount is None:
        raise ApiError(400, "amount_microusd: is missing")
    with operator_errors():
        note, key = text_in(body, "note"), text_in(body, "key", 100)
        user = await asyncio.to_thread(store.credit, request.match_info["name"], amount, note, key)
    return web.json_response(store.user_json(user))


async def post_key(request: web.Request) -> web.StreamResponse:
    store = require_admin(request).store
    await body_of(request, ())
    with operator_errors():
        key = await asyncio.to_thread(store.rotate_key, request.match_info["name"])
    return web.json_response({"key": key})


async def get_user_transactions(request: web.Request) -> web.StreamResponse:
    store = require_admin(request).store
    with operator_errors():
        name = store.known(request.match_info["name"]).name
    return web.json_response({"transactions": store.transactions(name, *page_query(request))})


async def get_report(request: web.Request) -> web.StreamResponse:
    """Cost, markup and charge by key; with `as_if=MODEL` also what the same tokens would have cost there."""
    state = require_admin(request)
    by = query_choice(request, "by", REPORT_KEYS, "user")
    since, until = query_time(request, "since"), query_time(request, "until")
    as_if = as_if_on(state.config, request.query.get("as_if", ""))
    rows = await asyncio.to_thread(state.store.report, by, since, until, None, as_if)
    return await table_response(request, "report", lambda: rows, rows[0] if rows else ("key",))


def as_if_on(config: Config, name: str) -> Callable[[Usage], int] | None:
    """What a model would charge, for a report that compares with it; ApiError 400 where no price of it is known."""
    if not name:
        return None
    targets = resolve(config, name)
    price = price_of(config, targets[0], name) if targets else facts_of(name).price
    if price is None:
        raise ApiError(
            400, f"as_if: no price is known for {name[:100]!r}; {known_names(name, price_table())}"
        )
    return lambda usage: charge_of(usage, price, config.credits.markup_percent).charge


async def get_export(request: web.Request) -> web.StreamResponse:
    return await export_response(request, require_admin(request).store, None)


async def get_requests(request: web.Request) -> web.StreamResponse:
    return web.json_response({"requests": require_admin(request).store.requests(None, *page_query(request))})


async def get_events(request: web.Request) -> web.StreamResponse:
    """The request log as it happens, as server-sent events: one `request` event a row."""
    state = require_admin(request)
    rows: asyncio.Queue[Json] = asyncio.Queue(1000)
    state.listeners.add(rows)
    response = web.StreamResponse(headers={
        "Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
        "request-id": request[request_key()], "Server": "ccmux",
    })  # fmt: skip
    try:
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await response.write(b": here\n\n")
        while not state.draining:
            try:
                async with asyncio.timeout(15):
                    row = await rows.get()
            except TimeoutError:
                await response.write(b": still here\n\n")
                continue
            row = {**row, "price": json.loads(row["price"]), "trail": json.loads(row["trail"])}
            await response.write(b"event: request\ndata: %s\n\n" % compact(row))
    except ConnectionError:
        pass  # the page was closed
    finally:
        state.listeners.discard(rows)
    return response


async def post_explain(request: web.Request) -> web.StreamResponse:
    """Where a request would go and the most it can cost; {body, headers?} in, nothing is sent."""
    state = require_admin(request)
    given = await body_of(request, ("body", "headers"))
    if not isinstance(given.get("body"), dict):
        raise ApiError(400, "body: must be a Messages request")
    headers = {str(k).lower(): str(v) for k, v in as_object(given.get("headers")).items()}
    return web.json_response(await explain(state.config, given["body"], headers, state.counter))


async def explain(config: Config, body: Json, headers: Mapping[str, str], counter: TokenCounter) -> Json:
    """The route of a request and what it would hold, without sending it."""
    early = await counter.count(body, "", asked_model(body)) if config.router.long_context else 0
    route = route_of(body, headers, config, early)
    first = route.targets[0]
    tokens = await counter.count(route.body or body, first.provider, first.actual_model)
    limit = most_output(body)
    return {
        "model": route.model,
        "reason": route.reason,
        "trail": [list(step) for step in route.trail],
        "tokens": tokens,
        "factor": counter.factors.get((first.provider, first.actual_model), (1.0, 0))[0],
        "targets": [ceiling_of(config, route, target, tokens, limit) for target in route.targets],
    }


def ceiling_of(config: Config, route: Route, target: Target, tokens: int, limit: int) -> Json:
    """A target with the most that a request can cost there, in micro-dollars; null where no price is known."""
    price = charged_price(config, target, route.model)
    usage = Usage(input=tokens, output=limit)
    charge = charge_of(usage, price, config.credits.markup_percent).charge if price else None
    return {"provider": target.provider, "model": target.actual_model, "ceiling_microusd": charge}


# The config, seen and edited.

SECRET_KEYS = ("api_key", "admin_token", "headers")  # claude-code-mux has an api_key in [server]
URL_KEYS = ("base_url", "proxy")  # which may have a login in them


def masked(secret: Any) -> Any:
    """A secret as the admin page may see it: whether it is set, a reference as written, else its last four."""
    if isinstance(secret, list):
        return [masked(s) for s in secret]
    if isinstance(secret, dict):
        return {name: masked(text) for name, text in secret.items()}
    if not isinstance(secret, str) or not secret:
        return {"set": False, "last4": "", "reference": ""}
    if not is_literal(secret):
        return {"set": True, "last4": "", "reference": secret}
    return {"set": True, "last4": secret[-4:] if len(secret) >= 12 else "", "reference": ""}


def masked_table(table: Any) -> Any:
    """A parsed table without its secrets, as JSON has it."""
    if isinstance(table, dict):
        return {key: masked_value(key, value) for key, value in table.items()}
    if isinstance(table, list):
        return [masked_table(item) for item in table]
    if isinstance(table, Decimal):
        return float(table)
    return table if isinstance(table, (str, int)) else str(table)


def masked_value(key: str, value: Any) -> Any:
    if key in SECRET_KEYS:
        return masked(value)
    return without_logins(value) if key in URL_KEYS and isinstance(value, str) else masked_table(value)


def without_logins(text: str) -> str:
    """The text with a mark for the user and password of each URL in it."""
    return _LOGIN.sub(lambda m: f"://[kept-{hash_text(m[1])}]@{m[2]}", text)


def with_logins(text: str, old: str) -> str:
    """The text with the logins of an old one for their marks; beside another host a mark stays one."""
    logins = {without_logins(m[0]): m[0] for m in _LOGIN.finditer(old)}
    return _LOGIN.sub(lambda m: logins.get(m[0], m[0]), text)


_LOGIN = re.compile(r"""://([^\s/?#"']+)@([^\s/?#"'@]+)""")


def form_fields() -> Json:
    """The config's keys as the pages' forms show them, from the dataclasses' own declarations."""
    classes = {
        "server": Server, "router": Router, "rules": PromptRule, "providers": Provider, "quirks": Quirks,
        "models": Model, "mappings": Target, "credits": Credits,
    }  # fmt: skip
    return {
        name: [form_field(cls, f) for f in dataclasses.fields(cls) if "help" in f.metadata]
        for name, cls in classes.items()
    }


FIELD_KINDS = {
    "Price": "price", "tuple": "list", "dict": "table", "Quirks": "table", "Pattern": "text", "bool": "bool",
    "int": "number", "float": "number", "Decimal": "number",
}  # fmt: skip


def form_field(cls: Any, field: Any) -> Json:
    hint, default = str(type_hints(cls)[field.name]), field.default
    choices = [c for c in field.metadata["choices"] if c]
    kind = next((kind for word, kind in FIELD_KINDS.items() if word in hint), "text")
    if isinstance(default, re.Pattern):
        default = default.pattern
    elif isinstance(default, Decimal):
        default = float(default)
    return {
        "name": field.name, "help": field.metadata["help"], "choices": choices, "secret": field.metadata["secret"],
        "kind": "secret" if field.metadata["secret"] else "choice" if choices and kind == "text" else kind,
        "default": default if isinstance(default, (str, int, float, tuple)) else "",
    }  # fmt: skip


async def get_state(request: web.Request) -> web.StreamResponse:
    """Everything the admin page shows at its start; keys masked."""
    state = require_admin(request)
    config = state.config
    names = model_names(config)
    served = [(name, resolve(config, name)) for name in names]
    return web.json_response({
        "version": __version__,
        "uptime_s": round(time.monotonic() - state.started),
        "path": config.path,
        "config": masked_table(config.tables),
        "config_hash": config.text_hash,
        "config_error": state.config_error,
        "warnings": list(config.warnings),
        "providers": {p.name: provider_state(state, p) for p in config.providers},
        "presets": {name: preset_json(row) for name, row in PRESETS.items()},
        "formats": list(DIALECTS),
        "fields": form_fields(),
        "routes": {slot: getattr(config.router, slot) or "" for slot in ROUTE_SLOTS},
        "names": names,
        "unpriced": [n for n, targets in served if not targets or price_of(config, targets[0], n) is None],
        "vocabulary_missing": state.vocabulary.missing(),
    })  # fmt: skip


def provider_state(state: State, provider: Provider) -> Json:
    url = called_url(provider.base_url, provider.format)
    return {**provider_health(state, provider), "url": url, "format": provider.format}


def called_url(base_url: str, wire_format: str) -> str:
    """The URL that requests go to, as it may be shown; "" for what answers in this process."""
    return without_logins(endpoint_url(base_url, DIALECTS[wire_format], model="MODEL")) if base_url else ""


def preset_json(row: Json) -> Json:
    """A preset as the form offers it: where a key will be sent, and the variable it is usually in."""
    url = called_url(row["base_url"], row["type"])
    return {"url": url, **{key: row[key] for key in ("type", "base_url", "api_key", "default")}}


def config_place(state: State) -> Path:
    """The config file; where none was found, the one that the first save makes."""
    return Path(state.config.path).expanduser() if state.config.path else ccmux_home() / "config.toml"


def config_text(state: State) -> str:
    """The config file's text; where there is no file (any more), the text in use."""
    path = config_place(state)
    try:
        return toml_text(path) if state.config.path else state.config.text
    except FileNotFoundError:
        return state.config.text
    except (OSError, UnicodeDecodeError) as error:
        raise ApiError(409, f"{path.name} cannot be read ({type(error).__name__}); mend it by hand") from None


def config_table(state: State, root: str, name: str | None) -> Json:
    """`[root]`, or the row of `[[root]]` with that name, as the file has it; {} where it is not there.

    ApiError 409 where the file is broken, as a form cannot save into it.
    """
    try:
        table = load_config(config_text(state), os.environ, str(config_place(state))).tables.get(root)
    except ConfigError as error:
        words = f"the config file is broken, mend it under Config first: {error}"
        raise ApiError(409, words) from None
    if name is None:
        return as_object(table)
    return next((row for row in as_list(table) if row.get("name") == name), {})


def store_text(state: State, text: str, given_hash: Any) -> web.Response:
    """Checks and saves a new config text and swaps it in; the answer carries the new hash.

    ApiError 400 where it is wrong, 409 stale.
    """
    current, path = hash_text(config_text(state)), config_place(state)
    if given_hash != current:
        raise ApiError(
            409, "the config has changed since this page was loaded; load it again (nothing was saved)"
        )
    try:
        config = load_config(text, os.environ, str(path))
        check_binding(config)
        save_config(path, text, current)
    except StaleError as error:
        raise ApiError(409, str(error)) from None
    except (ConfigError, OSError) as error:
        raise ApiError(400, str(error)) from None
    adopt_config(state, config)
    return web.json_response({"hash": config.text_hash})


AT_START = ("host", "port", "database", "max_connections")  # keys of [server] that only a start can change


def adopt_config(state: State, config: Config) -> None:
    """Swaps a config in; what only a start can change keeps its old value until then."""
    old = state.config
    kept = {key: getattr(old.server, key) for key in AT_START}
    if not is_loopback(old.server.host):  # where others still reach it
        kept["require_key"] = old.server.require_key
    levels = [as_object(c.tables.get("server")).get("log_level") for c in (old, config)]
    if levels[0] != levels[1]:  # else --log-level holds on
        logging.getLogger().setLevel(config.server.log_level.upper())
    state.config = dataclasses.replace(config, server=dataclasses.replace(config.server, **kept))
    state.config_error = ""
    forget_faults(state, {p.name for p in old.providers if p != config.provider(p.name)})
    if config.server.admin_token:
        state.admin_token = config.server.admin_token
    elif old.server.admin_token:  # taken out: the one beside the database holds instead, as after a start
        state.admin_token = ""
        with contextlib.suppress(OSError):
            state.admin_token = admin_token_of(state.config)
        log.warning("[server] admin_token is gone: `ccmux.py token` prints the one that holds now")


def forget_faults(state: State, providers: set[str]) -> None:
    """Has providers tried again at once: what failed may have been put right."""
    for faults in (state.relay.breakers, state.relay.cooling):
        for slot in [slot for slot in faults if slot[0] in providers]:
            del faults[slot]


def put_table(root: str) -> Callable[[web.Request], Any]:
    """The handler that replaces `[root]`, or makes or replaces the row of `[[root]]` that the address names."""

    async def put(request: web.Request) -> web.StreamResponse:
        state, name = require_admin(request), request.match_info.get("name")
        table = strict_json(await read_body(request))
        hash = table.pop("hash", None)
        table = table.pop("table", table)  # its keys may also stand beside hash
        if not isinstance(table, dict):
            raise ApiError(400, "table: must be an object with the TOML's own keys")
        if name is not None:
            table = {"name": name, **table}
        old = config_table(state, root, name)
        for key in URL_KEYS:
            if isinstance(table.get(key), str):
                table[key] = with_logins(table[key], str(old.get(key)))
        is_moved = address_of(table) != address_of(old)  # no secret goes along to another address
        return save_table(state, root, name, with_secrets({} if is_moved else old, table), hash)

    return put


def delete_row(root: str) -> Callable[[web.Request], Any]:
    """The handler that takes away the row of `[[root]]` that the address names."""

    async def delete(request: web.Request) -> web.StreamResponse:
        state, name = require_admin(request), request.match_info["name"]
        if users := users_of(state.config, root, name):
            words = f"{root[:-1]} {name!r} is used by {', '.join(users)}; change that first"
            raise ApiError(409, words)
        body = await body_of(request, ("hash",))
        if not config_table(state, root, name):
            raise ApiError(404, f"there is no {root[:-1]} {name!r}")
        return save_table(state, root, name, None, body.get("hash"))

    return delete


def users_of(config: Config, root: str, name: str) -> list[str]:
    """What names a provider or a model."""
    if root == "providers":
        return [f"model {m.name}" for m in config.models if any(t.provider == name for t in m.mappings)]
    return [f"[router] {slot}" for slot in ROUTE_SLOTS if getattr(config.router, slot) == name]


def save_table(state: State, root: str, name: str | None, table: Json | None, hash: Any) -> web.Response:
    try:
        edited = edit_toml(config_text(state), root, name, table)
    except ConfigError as error:
        raise ApiError(400, str(error)) from None
    return store_text(state, edited, hash)


def with_secrets(old: Json, new: Json) -> Json:
    """The new table with the old one's secrets where it leaves them out, or has null or a mask for them; "" clears
    a key.
    """
    table = dict(new)
    for key in SECRET_KEYS:
        table[key] = None if new.get(key) == "" else kept(old.get(key), new.get(key))
    if "quirks" in new:
        table["quirks"] = unmasked(old.get("quirks"), new["quirks"])
    return without_nulls(table)


def kept(old: Any, new: Any) -> Any:
    """A secret, or a table of them, that a form gives: the old one where it gives none, or a mask."""
    if new is None or is_mask(new):
        return old
    if isinstance(new, dict):
        return without_nulls({name: kept(as_object(old).get(name), text) for name, text in new.items()})
    return new


def unmasked(old: Any, new: Any) -> Any:
    """What a form gives for a table, with the old one's secrets for the masks in it; without those it has none for."""
    if is_mask(new):
        return old
    if isinstance(new, list):
        if new == masked_table(old):
            return old
        bare = [unmasked(None, item) for item in new]
        if any(map(is_mask, new)) or (
            old is not None and bare != new
        ):  # it has changed: an item may have moved
            raise ApiError(400, "quirks: type the keys in a list again where the list has changed")
        return bare
    if not isinstance(new, dict):
        return new
    items = {key: unmasked(as_object(old).get(key), value) for key, value in new.items()}
    return without_nulls(items)


def is_mask(value: Any) -> bool:
    """Whether it is what state shows for a secret; a pool with a new key among its masks is none."""
    if isinstance(value, dict):
        return isinstance(value.get("set"), bool) and value.keys() <= masked("").keys()
    return isinstance(value, list) and bool(value) and all(map(is_mask, value))


def address_of(row: Json) -> str:
    """The base URL a row amounts to, with its preset's where it has none of its own."""
    kind = str(row.get("type") or row.get("provider_type"))
    preset = PRESETS.get(MUX_TYPES.get(kind, kind), {})
    return str(row.get("base_url") or preset.get("base_url") or "").rstrip("/")


def without_nulls(table: Json) -> Json:
    return {k: v for k, v in table.items() if v is not None}


def provider_model(config: Config, provider: Provider) -> str:
    """A model to try a provider with: one that the config maps to it, lists, or its preset names."""
    mapped = [t.actual_model for m in config.models for t in m.mappings if t.provider == provider.name]
    return next(iter([*mapped, *provider.models, provider.default_model]), "")


async def test_provider(state: State, provider: Provider, model: str) -> Json:
    """One tiny request over the live path: {ok, status, ms, model, text, error}."""
    began = time.monotonic()
    body = {"model": model, "max_tokens": 16, "messages": [{"role": "user", "content": "Say hi."}]}
    route = Route(model, "test", (), (Target(provider.name, model),))
    call = Call(new_request_id(), body, compact(body), {}, route, state.config, False, model)
    result: Json = {"ok": True, "status": 200, "model": model, "text": "", "error": ""}
    try:
        if not provider.usable or not model:
            why = provider.problem or ("no model to try it with" if provider.enabled else "disabled")
            raise ApiError(500, why)
        await state.relay.run(call, None)
        assert call.reader is not None
        result["text"] = text_of(json.loads(call.reader.ending).get("content"))[:200]
    except ApiError as error:
        result |= {"ok": False, "status": error.status, "error": error.message[:200]}
    return result | {"ms": round((time.monotonic() - began) * 1000)}


async def post_provider_test(request: web.Request) -> web.StreamResponse:
    """One tiny request to a saved provider over the live path."""
    state, provider = saved_provider(request)
    body = await body_of(request, ("model",))
    model = text_in(body, "model", 200) or provider_model(state.config, provider)
    forget_faults(state, {provider.name})
    return web.json_response(await test_provider(state, provider, model))


def saved_provider(request: web.Request) -> tuple[State, Provider]:
    """The provider that the address names; ApiError 404 where there is none."""
    state, name = require_admin(request), request.match_info["name"]
    provider = state.config.provider(name)
    if provider is None:
        raise ApiError(404, f"there is no provider {name!r}; save it first")
    return state, provider


async def get_provider_models(request: web.Request) -> web.StreamResponse:
    """The model names that a provider itself lists."""
    return web.json_response({"models": await listed_models(*saved_provider(request))})


async def listed_models(state: State, provider: Provider) -> list[str]:
    """The ids of a provider's model list; ApiError 502 where it gives none."""
    dialect = DIALECTS[provider.format]
    if dialect.is_local:
        return [provider.default_model]
    slot = state.relay.slots_of(Target(provider.name, ""), provider)[0]
    headers = upstream_headers({}, slot, dialect)
    proxy = proxy_of(provider)
    names: list[str] = []
    page: str | None = ""
    status = 200
    try:
        async with asyncio.timeout(15):
            while page is not None and status == 200 and len(names) < 10_000:
                url = endpoint_url(provider.base_url, dialect, f"/models{page}")
                answer = await state.relay.session.get(
                    url, headers=headers, proxy=proxy, allow_redirects=False
                )
                body, status = await answer.read(), answer.status
                listed = as_object(json.loads(body)) if status == 200 else {}  # an error may be a page
                rows = as_list(listed.get("data")) or as_list(listed.get("models"))
                names += [str(row.get("id") or row.get("name") or "") for row in map(as_object, rows)]
                page = next_page(listed) if rows else None
    except UPSTREAM_FAULTS() as fault:
        raise ApiError(502, f"provider {provider.name} gave no model list ({type(fault).__name__})") from None
    if status != 200 or not any(names):
        raise ApiError(502, f"provider {provider.name} gave no model list (status {status})")
    return sorted({name.removeprefix("models/") for name in names if name})


def next_page(listed: Json) -> str | None:
    """The query of a list's next page, as Anthropic's and Google's name it; None after the last."""
    if listed.get("has_more") and listed.get("last_id"):
        return "?" + urllib.parse.urlencode({"after_id": listed["last_id"]})
    token = listed.get("nextPageToken")
    return "?" + urllib.parse.urlencode({"pageToken": token}) if token else None


async def get_config(request: web.Request) -> web.StreamResponse:
    """The file's text, broken or not; literal secrets in it are shown as marks that a save turns back."""
    text = config_text(require_admin(request))
    return web.json_response({"text": without_secrets(text, secret_marks(text)), "hash": hash_text(text)})


def without_secrets(text: str, marks: Mapping[str, str]) -> str:
    text = without_logins(text)
    for secret in sorted(marks, key=len, reverse=True):  # a short one may be part of a longer one
        text = text.replace(secret, marks[secret])
    return text


def secret_marks(text: str) -> dict[str, str]:
    """Each literal secret as a config text spells it, longest first, with the mark that stands for it."""
    try:
        tables = tomllib.loads(text)
        shown = shown_text(tables, is_secret_key)
        # A short one that stands in the open as well ("ollama", "none") is no secret, and marks would hide names.
        secret = {s for s in literal_secrets(tables) if len(s) >= 12 or s not in shown}
        found = {raw for raw, value in string_values(text) if value in secret}
        found |= {raw for _, raw in _KEY_IN_COMMENT.findall(text) if is_literal(raw)}
    except (ValueError, RecursionError):
        # Where keys stand cannot be known in a broken file. Marks lose nothing, so any long word is one.
        words = re.findall(r"[^\s\"',=\[\]{}]{8,}", text)
        found = {w for w in words if not re.fullmatch(r"\$.*|[a-z_.:/#-]+", w)}
    return {s: f"[kept-{hash_text(s)}]" for s in sorted(found, key=len, reverse=True)}


_KEY_IN_COMMENT = re.compile(r"""(?m)^[ \t]*#[ \t]*(?:api_key|admin_token)[ \t]*=[ \t]*(["'])(.{8,}?)\1""")


def literal_secrets(tables: Json) -> set[str]:
    """The secrets of tables that may not be checked ones: at misspelt keys, too."""
    return {text for text, is_secret in texts_of(tables, is_secret_key) if is_secret}


def shown_text(tables: Json, hides: Callable[[str], bool]) -> str:
    """All keys and texts that are no secrets; between two of them what no secret has in it."""
    return "\0".join(text for text, is_secret in texts_of(tables, hides) if not is_secret)


def seen_text(text: str) -> str:
    """What the admin page shows of a sound config: its text, where only keys are known in comments, and its tables."""
    shown = shown_text(tomllib.loads(text), SECRET_KEYS.__contains__)
    return f"{without_secrets(text, secret_marks(text))}\0{shown}"


def texts_of(value: Any, hides: Callable[[str], bool], is_secret: bool = False) -> Iterator[tuple[str, bool]]:
    """Every key and text in tables, and whether it is a secret: a text below a key that hides what it has, but no
    `$NAME`, which the admin page shows as written.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, False
            yield from texts_of(item, hides, is_secret or hides(key))
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item, hides, is_secret)
    elif isinstance(value, str):
        yield value, is_secret and is_literal(value)


@functools.lru_cache(1024)
def is_secret_key(key: str) -> bool:
    """Whether a secret stands at a key, which may be misspelt; what is known by that very name is no slip."""
    classes = (Server, Router, PromptRule, Provider, Quirks, Model, Target, Price, Credits)
    known = {f.name for cls in classes for f in dataclasses.fields(cls)}
    return key in SECRET_KEYS or (
        key not in known and bool(difflib.get_close_matches(key.lower(), SECRET_KEYS))
    )


def is_literal(secret: str) -> bool:
    """Whether a key is in the text itself, be it as the default of a variable."""
    return not re.fullmatch(r"|passthrough|\$(?:[A-Za-z_]\w*|\{\w+(?::-)?\})", secret)


def string_values(text: str) -> Iterator[tuple[str, str]]:
    """The strings of a valid TOML text: as spelled between the quotes, and what that means."""
    for token in _STRING_OR_COMMENT.findall(text):
        if token[0] != "#":
            quotes = 3 if token.startswith(token[0] * 3) and len(token) >= 6 else 1
            raw = token[quotes:-quotes]
            yield raw, raw if token.isprintable() and "\\" not in raw else tomllib.loads(f"k = {token}")["k"]


_STRING_OR_COMMENT = re.compile(rf"(?s)#[^\n]*|{TOML_TEXT}")


async def put_config(request: web.Request) -> web.StreamResponse:
    """Saves the whole text. A kept secret stays where it was: it never moves to another key or address."""
    state = require_admin(request)
    body = await body_of(request, ("text", "hash"))
    current = config_text(state)
    after = with_logins(text_in(body, "text", 2**20), current)
    old, kept, marked = state.config.tables, set(), set()
    for secret, mark in reversed(secret_marks(current).items()):  # a short one may be part of another's mark
        if mark in after:
            after = after.replace(mark, secret)
            kept.add(secret)
    with contextlib.suppress(ValueError, RecursionError):
        old = tomllib.loads(current)
        kept, marked = {value for raw, value in string_values(current) if raw in kept}, kept
    # Before anything else reads it: an error about a misplaced secret would quote it. A broken text is told below.
    with contextlib.suppress(ValueError, RecursionError):
        check_kept(old, tomllib.loads(after), kept, {m[0] for m in _LOGIN.finditer(current)})
        before, now = seen_text(current), seen_text(after)
        if any(len(secret) >= 8 and secret in now and secret not in before for secret in marked):
            raise ApiError(400, MISPLACED_MARK)
    return store_text(state, after, body.get("hash"))


MISPLACED_MARK = "a [kept-...] mark may only stand where its key stood"


def check_kept(old: Json, new: Json, kept: set[str], logins: set[str]) -> None:
    """ApiError 400 where a secret that the editor never saw would be shown, or sent elsewhere."""
    secret = kept & (literal_secrets(old) | literal_secrets(new))
    for keys, hidden in ((SECRET_KEYS, secret), (URL_KEYS, logins)):
        before, after = (shown_text(tables, keys.__contains__) for tables in (old, new))
        if any(s in after and s not in before for s in hidden):
            raise ApiError(400, MISPLACED_MARK)
    tokens = [str(as_object(tables.get("server")).get("admin_token")) for tables in (old, new)]
    if tokens[0] != tokens[1] and tokens[1] in secret:
        raise ApiError(400, "[server]: key 'admin_token' may not be another's [kept-...] mark")
    # `[providers]` is a slip for `[[providers]]`, and one row.
    given = old.get("providers")
    rows = {str(row.get("name")): row for row in map(as_object, as_list(given) or [given])}
    for row in map(as_object, as_list(new.get("providers"))):
        name = str(row.get("name"))
        was = rows.get(name, {})
        moved = address_of(row) != address_of(was)
        if (secret & literal_secrets(row)) - (set() if moved else literal_secrets(was)):
            raise ApiError(400, f"provider {name!r} has a new address: type its key again, or use $NAME")


async def get_backups(request: web.Request) -> web.StreamResponse:
    path = config_place(require_admin(request))
    found = [(p.name, p.stat()) for p in backup_paths(path.resolve()) if p.exists()]
    rows = [
        {"name": name, "time": iso(datetime.fromtimestamp(stat.st_mtime, UTC)), "bytes": stat.st_size}
        for name, stat in found
    ]
    return web.json_response({"backups": rows})


def backup_text(request: web.Request) -> str:
    """The text of the backup that the address names; ApiError 404 where there is none."""
    path, name = config_place(require_admin(request)), request.match_info["name"]
    try:
        return toml_text(next(p for p in backup_paths(path.resolve()) if p.name == name))
    except (StopIteration, FileNotFoundError):
        raise ApiError(404, f"there is no backup {name[:100]!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ApiError(409, f"{name} cannot be read ({type(error).__name__})") from None


async def get_backup(request: web.Request) -> web.StreamResponse:
    """A backup's text and what restoring it would change, as a unified diff; secrets as in `get_config`."""
    text, now = backup_text(request), config_text(state_of(request))
    marks = secret_marks(now) | secret_marks(text)
    shown, current = (without_secrets(t, marks) for t in (text, now))
    lines = difflib.unified_diff(current.splitlines(), shown.splitlines(), "now", "then", lineterm="")
    return web.json_response({"text": shown, "changes": "\n".join(lines)})


async def post_backup(request: web.Request) -> web.StreamResponse:
    """Makes a backup the config again, as a save of its text; the file before it becomes the newest backup."""
    state, text = require_admin(request), backup_text(request)
    body = await body_of(request, ("hash",))
    try:
        return store_text(state, text, body.get("hash"))
    except ApiError as error:  # an error about a misplaced secret would quote it
        raise ApiError(error.status, without_secrets(error.message, secret_marks(text))) from None


async def post_try(request: web.Request) -> web.StreamResponse:
    """A real request through the live path, streamed as raw events; a last `ccmux` event tells route and cost."""
    state = require_admin(request)
    given = await body_of(request, ("body",))
    body = {"max_tokens": 1024, **as_object(given.get("body")), "stream": True}
    call = await plan_call(request, state, body, b"")
    return await Try(request, state, call, state.store.local_user()).serve()


class Try(Exchange):
    """An exchange of the admin page's, which tells its row of the request log at the end."""

    def epilogue(self) -> bytes:
        assert self.done is not None
        row = {**settlement_row(self.done), "trail": self.done.trail, "price": self.done.price}
        return b"event: ccmux\ndata: %s\n\n" % compact(row)


async def get_inspect(request: web.Request) -> web.StreamResponse:
    return web.json_response(require_admin(request).recorder.summary())


async def put_inspect(request: web.Request) -> web.StreamResponse:
    """Switches the recorder on for some minutes (at most 15), or off with 0."""
    recorder = require_admin(request).recorder
    body = await body_of(request, ("minutes",))
    minutes = body.get("minutes")
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not 0 <= minutes <= 15:
        raise ApiError(400, "minutes: a number from 0 (off) to 15")
    recorder.switch(minutes * 60)
    # Which lets go of what is over, though nobody asks then.
    asyncio.get_running_loop().call_later(minutes * 60 + 0.1, recorder.summary)
    return web.json_response(recorder.summary())


async def get_inspected(request: web.Request) -> web.StreamResponse:
    found = require_admin(request).recorder.shown(request.match_info["id"])
    if found is None:
        raise ApiError(404, "that request is not held; the recorder keeps the last 20 while it is on")
    return web.json_response(found)


def admin_routes() -> list[web.RouteDef]:
    return [
        web.get("/api/me", get_me),
        web.get("/api/models", get_my_models),
        web.get("/api/usage", get_my_usage),
        web.get("/api/transactions", get_my_transactions),
        web.get("/api/requests", get_my_requests),
        web.get("/api/export", get_my_export),
        web.post("/api/purchase", post_purchase),
        web.get("/admin/api/state", get_state),
        web.put("/admin/api/providers/{name}", put_table("providers")),
        web.delete("/admin/api/providers/{name}", delete_row("providers")),
        web.post("/admin/api/providers/{name}/test", post_provider_test),
        web.get("/admin/api/providers/{name}/models", get_provider_models),
        web.put("/admin/api/models/{name:.+}", put_table("models")),
        web.delete("/admin/api/models/{name:.+}", delete_row("models")),
        *(web.put(f"/admin/api/{root}", put_table(root)) for root in ("router", "credits", "server")),
        web.get("/admin/api/config", get_config),
        web.put("/admin/api/config", put_config),
        web.get("/admin/api/backups", get_backups),
        web.get("/admin/api/backups/{name}", get_backup),
        web.post("/admin/api/backups/{name}", post_backup),
        web.post("/admin/api/try", post_try),
        web.get("/admin/api/inspect", get_inspect),
        web.put("/admin/api/inspect", put_inspect),
        web.get("/admin/api/inspect/{id}", get_inspected),
        web.get("/admin/api/users", get_users),
        web.post("/admin/api/users", post_user),
        web.patch("/admin/api/users/{name}", patch_user),
        web.post("/admin/api/users/{name}/credit", post_credit),
        web.post("/admin/api/users/{name}/key", post_key),
        web.get("/admin/api/users/{name}/transactions", get_user_transactions),
        web.get("/admin/api/report", get_report),
        web.get("/admin/api/export", get_export),
        web.get("/admin/api/requests", get_requests),
        web.get("/admin/api/events", get_events),
        web.post("/admin/api/explain", post_explain),
    ]


# ----------------------------------------------------------------------------------------------------------
# Pages
# ----------------------------------------------------------------------------------------------------------
# Two pages, no build: a stylesheet and a script that both share, inside the page and allowed by their hashes alone.
# Data comes as JSON and enters the page as text. Forms are made from the config's own declarations of its keys.

STYLE = r"""
:root {
  color-scheme: light; --bg: #f5f6f8; --card: #fff; --text: #1b2230; --muted: #586173; --line: #dfe3e9;
  --accent: #2a56cf; --on-accent: #fff; --soft: #eaeffc; --ok: #17733f; --warn: #8a5700; --bad: #b62a24;
  --shadow: 0 1px 2px rgb(20 30 50 / 7%), 0 4px 14px rgb(20 30 50 / 4%);
}
@media screen { :root[data-theme="dark"] {
  color-scheme: dark; --bg: #11141a; --card: #191e27; --text: #e5e9f0; --muted: #9fa9b9; --line: #2d3542;
  --accent: #91b2ff; --on-accent: #0f1726; --soft: #232c3f; --ok: #5ccb8e; --warn: #e3b552; --bad: #ff8f86;
  --shadow: none;
} } /* paper is white */
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 20px; padding-top: 18px; }
main { padding-top: 8px; padding-bottom: 40px; }
footer { color: var(--muted); font-size: 13px; padding-bottom: 32px; }
h1 { font-size: 19px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 16px; margin: 0; }
h3 { font-size: 14px; margin: 20px 0 6px; }
p { margin: 6px 0; max-width: 75ch; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 2px; }
nav a { padding: 6px 11px; border-radius: 8px; color: var(--muted); text-decoration: none; }
nav a:hover { color: var(--text); background: var(--soft); }
nav a[aria-current] { color: var(--accent); background: var(--soft); font-weight: 600; }
.grow { flex: 1; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  margin: 16px 0; box-shadow: var(--shadow); min-width: 0;
}
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 12px; margin-bottom: 10px; }
.head > * { overflow-wrap: anywhere; }
.head h2 { margin-right: auto; }
.head input { width: 220px; }
.tiles, .two { display: grid; gap: 14px; margin: 16px 0; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.tiles .card, .two .card { margin: 0; }
.tiles .card { padding: 14px 16px; position: relative; }
.big { display: block; font-size: 23px; font-weight: 600; letter-spacing: -.02em; }
.muted, .help { color: var(--muted); font-size: 13px; }
.empty { color: var(--muted); padding: 10px 0; }
main:focus { outline: 0; }
.scroll { overflow-x: auto; max-width: 100%; position: relative; }
@media screen { .log { max-height: 460px; overflow-y: auto; } }
@media print { .scroll { overflow: visible; } }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: 13px; white-space: nowrap; }
td.num, th.num { text-align: right; white-space: nowrap; }
td.nowrap, td.act, td .status { white-space: nowrap; }
td.act button + button { margin-left: 6px; }
td.text { max-width: 26em; overflow-wrap: anywhere; min-width: 8em; }
tbody tr:last-child td { border-bottom: 0; }
.status::before {
  content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px;
  background: var(--muted);
}
.status::before, .beats i { forced-color-adjust: none; print-color-adjust: exact; } /* their colour is all they are */
.status.ok::before { background: var(--ok); }
.status.warn::before { background: var(--warn); }
.status.bad::before { background: var(--bad); }
.status.ok { color: var(--ok); } .status.warn { color: var(--warn); } .status.bad { color: var(--bad); }
.problems { border-left: 4px solid var(--bad); } .problems.mild { border-left-color: var(--warn); }
.problems ul { margin: 0; padding-left: 0; list-style: none; }
.problems li { padding: 4px 0; }
button, input, select, textarea { font: inherit; color: inherit; }
button {
  border: 1px solid var(--line); background: var(--card); border-radius: 8px; padding: 5px 12px; cursor: pointer;
  white-space: nowrap;
}
button:hover { border-color: var(--accent); }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600; }
button.danger { color: var(--bad); }
button.small { padding: 1px 8px; font-size: 13px; }
td button.small { margin: -1px 0; }
button:disabled { opacity: .55; cursor: default; }
input, select, textarea {
  width: 100%; background: var(--bg); border: 1px solid var(--line); border-radius: 8px; padding: 6px 10px;
  min-width: 0; min-height: 37px;
}
input[type="checkbox"] { width: auto; min-height: 0; margin: 0 8px 0 0; accent-color: var(--accent); }
textarea, pre, code, td.mono { font-family: ui-monospace, "Cascadia Mono", Menlo, monospace; font-size: 13px; }
textarea { resize: vertical; }
::placeholder { color: var(--muted); opacity: 1; }
pre {
  background: var(--bg); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; margin: 6px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow: auto;
}
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
[aria-invalid="true"] { border-color: var(--bad); }
.error { color: var(--bad); white-space: pre-wrap; margin: 8px 0; }
.error:empty { display: none; }
.fields { display: grid; gap: 14px 18px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
.field { min-width: 0; }
.field > label, legend { display: block; font-weight: 500; font-size: 14px; margin-bottom: 3px; padding: 0; }
.field .help { display: block; margin-top: 3px; line-height: 1.35; }
.wide { grid-column: 1 / -1; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
.checks { display: flex; flex-wrap: wrap; gap: 4px 16px; }
.prices { display: grid; gap: 6px; grid-template-columns: repeat(auto-fill, minmax(94px, 1fr)); }
.row { display: flex; flex-wrap: wrap; gap: 8px; align-items: end; margin: 8px 0; }
form > .row:last-child { margin: 14px 0 0; } form > .field { margin: 10px 0; }
.row > .field { flex: 1 1 150px; }
.head .row { align-items: center; margin: 0; }
.item { border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; margin: 8px 0; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--muted); padding: 2px 0; }
dialog {
  border: 1px solid var(--line); border-radius: 14px; background: var(--card); color: var(--text);
  width: min(860px, calc(100vw - 20px)); max-height: calc(100vh - 24px); padding: 20px; overflow: auto;
}
dialog h2 { flex: 1; }
dialog::backdrop { background: rgb(10 14 22 / 50%); }
.bar { fill: var(--accent); } .axis { stroke: var(--line); }
.spark { position: absolute; right: 14px; bottom: 18px; fill: none; stroke: var(--accent); opacity: .7; }
.chart { display: block; width: 100%; height: 150px; }
.beats { display: flex; gap: 2px; height: 22px; align-items: end; }
.beats i { flex: 0 1 7px; min-width: 2px; height: 100%; border-radius: 2px; background: var(--line); }
.beats i.ok { background: var(--ok); } .beats i.bad { background: var(--bad); }
meter { display: block; width: 100%; height: 14px; margin-bottom: 10px; }
#status {
  position: fixed; right: 16px; bottom: 16px; max-width: calc(100vw - 32px); padding: 9px 16px; border-radius: 10px;
  background: var(--text); color: var(--bg); z-index: 9;
}
#status:empty { display: none; }
.signin { max-width: 460px; margin: 48px auto; }
@media (max-width: 1060px) { nav { order: 1; width: 100%; } }
@media (max-width: 560px) { header, main, footer { padding-left: 12px; padding-right: 12px; }
  header { column-gap: 10px; }
  .card { padding: 14px; } .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .big { font-size: 19px; } dialog { padding: 14px; } }
@media (prefers-reduced-motion: no-preference) { button, nav a { transition: background .12s, border-color .12s; } }
"""

SCRIPT = r"""
"use strict";
const IS_ADMIN = document.body.dataset.page === "admin";
const $ = (id) => document.getElementById(id);

/* Nodes: el(tag, {property: value}?, child ...). Data gets into the page as text only: no markup is parsed. */
const isNothing = (value) => value === null || value === undefined || value === false;
const el = (tag, ...parts) => build(document.createElement(tag), parts);
const svg = (tag, ...parts) => build(document.createElementNS("http://www.w3.org/2000/svg", tag), parts);
function build(node, parts) {
  const hasProps = parts[0]?.constructor === Object;
  for (const [name, value] of hasProps ? Object.entries(parts[0]) : []) {
    if (isNothing(value)) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  return fill(node, ...(hasProps ? parts.slice(1) : parts));
}
function fill(node, ...children) {
  node.append(...children.flat(9).filter((child) => !isNothing(child)));
  return node;
}
const refill = (node, ...children) => { node.replaceChildren(); return fill(node, ...children); };
/* Work that is not begun anew while it goes on: a double click, or a poll of a server that hangs. */
function once(work) {
  let busy = false;
  return async () => {
    if (busy) return;
    busy = true;
    try { await work(); } finally { busy = false; }
  };
}
/* A button; the status line tells what its work failed at. Work that saved something gives words that say so. */
function button(label, work, props) {
  const onclick = once(async () => { try { await saved(await work(), node); } catch (error) { tellError(error); } });
  const node = el("button", { type: "button", onclick, ...props }, label);
  return node;
}
/* A part of a page; beside its title buttons, or words. */
const card = (title, tools, ...body) => el("section", { class: "card" }, el("div", { class: "head" },
  el("h2", title), typeof tools === "string" ? el("span", { class: "muted" }, tools) : tools), ...body);
const badge = (kind, word) => el("span", { class: `status ${kind}` }, word);
const empty = (words) => el("p", { class: "empty" }, words);
const remark = (...words) => el("p", { class: "muted" }, ...words);
const folded = (title, ...body) => el("details", el("summary", title), ...body);
const grid = (...fields) => el("div", { class: "fields" }, ...fields);

/* Columns: [title, cell of a row, class]. `shown` says what an empty table means and what to do. */
function table(label, columns, rows, shown) {
  if (!rows.length) return empty(shown);
  const cell = ([, make, kind], row) => el("td", { class: kind }, make(row));
  const head = columns.map(([title, , kind]) => (title ? el("th", { scope: "col", class: kind }, title) : el("td")));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    el("table", el("thead", el("tr", head)),
      el("tbody", rows.map((row) => el("tr", columns.map((c) => cell(c, row)))))));
}
/* Columns that show one field of a row, and the button of a row. */
const textOf = (title, name, kind = "text") => [title, (row) => row[name] || "–", kind];
const numberOf = (title, name, shown = whole) => [title, (row) => shown(row[name]), "num"];
const rowButton = (label, name, work) => button(label, work,
  { class: "small", "aria-label": `${label} ${name}`, "data-key": `${label} ${name}` });

/* Numbers and times for people. */
const whole = (n) => (isNothing(n) ? "–" : Number(n).toLocaleString("en-US"));
const count = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;
function short(n) {
  const units = [[1e9, "B"], [1e6, "M"], [1e3, "k"]];
  const [size, letter] = units.find(([size]) => n >= size) || [1, ""];
  return letter ? Number((n / size).toPrecision(3)) + letter : String(Math.round(n || 0));
}
/* Formats are made once: making one takes longer than using it a hundred times. */
const dollarsWith = (most) => new Intl.NumberFormat("en-US",
  { style: "currency", currency: "USD", minimumFractionDigits: 2, maximumFractionDigits: most });
const CENTS = dollarsWith(2), MICRO_DOLLARS = dollarsWith(6);
function usd(micro) {
  if (isNothing(micro)) return "–";
  const dollars = micro / 1e6 || 0; /* no -0 */
  return (Math.abs(dollars) < 0.1 && dollars ? MICRO_DOLLARS : CENTS).format(dollars);
}
const seconds = (ms) => (isNothing(ms) ? "–" : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`);
const percent = (share) => (Number.isFinite(share) ? `${(share * 100).toFixed(1)} %` : "–");
const CLOCK = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const DATE = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "short" });
function when(time) {
  const at = new Date(time), isToday = at.toDateString() === new Date().toDateString();
  return el("time", { datetime: time, title: time }, (isToday ? CLOCK : DATE).format(at));
}
const capital = (word) => word[0].toUpperCase() + word.slice(1);
const sum = (rows, name) => rows.reduce((total, row) => total + (row[name] || 0), 0);
/* The kinds of tokens: what their columns and prices are called. */
const KINDS = [["input", "Input"], ["output", "Output"], ["cache_read", "Cache read"],
  ["cache_write", "Cache write"], ["cache_write_1h", "1 h write"]];
const tokensOf = (row) => KINDS.reduce((total, [kind]) => total + (row[`${kind}_tokens`] || 0), 0);

/* Where the browser keeps nothing for a page, as with cookies blocked, the page does while it is open. */
function keeper(storage) {
  try { return window[storage]; } catch {
    const held = new Map();
    return { getItem: (name) => held.get(name) ?? null, setItem: (name, value) => held.set(name, value),
      removeItem: (name) => held.delete(name) };
  }
}
const SESSION = keeper("sessionStorage"), LASTING = keeper("localStorage");

/* The server. The admin page sends its token, the dashboard a user's key where one is needed. */
class Failure extends Error {
  constructor(status, message) { super(message); this.status = status; }
}
const SECRET = IS_ADMIN ? "ccmux-admin-token" : "ccmux-key";
async function call(path, method = "GET", body = {}, signal = undefined) {
  /* Bytes, as a browser sends nothing else: what is no ASCII would be thrown out as if ccmux did not answer. */
  const secret = String.fromCharCode(...new TextEncoder().encode(SESSION.getItem(SECRET) || ""));
  const headers = { "content-type": "application/json" };
  if (secret && IS_ADMIN) headers.authorization = `Bearer ${secret}`;
  else if (secret) headers["x-api-key"] = secret;
  const sent = method === "GET" ? undefined : JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(path, { method, body: sent, signal, cache: "no-store", headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "ccmux does not answer: is it still running?");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Failure(answer.status, told.error?.message || `status ${answer.status}`);
}
const ask = async (path, method, body) => (await call(path, method, body)).json();
async function download(path, name) {
  const content = typeof path === "string" ? await (await call(path)).blob() : path;
  const url = URL.createObjectURL(content), link = el("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/* Server-sent events of an answer, one by one: [event, data]. */
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (held + part.value).split(/\r?\n\r?\n/);
    held = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/), of = (name) => lines.filter((l) => l.startsWith(`${name}:`))
        .map((l) => l.slice(name.length + 1).replace(/^ /, "")).join("\n");
      if (of("data")) yield [of("event"), of("data")];
    }
  }
}

/* The one line that says what happened. */
const STATUS = $("status");
let statusTimer = 0;
function tell(words) {
  STATUS.textContent = words;
  clearTimeout(statusTimer);
  statusTimer = setTimeout(() => { STATUS.textContent = ""; }, 6000);
}
function tellError(error) {
  if (error.name !== "AbortError") tell(error.message);
}
/* Browsers let a page copy on https and on this computer alone. */
function copyable(text) {
  const shown = el("pre", { tabindex: 0 }, text);
  const copy = async () => {
    try { await navigator.clipboard.writeText(text); tell("Copied."); } catch {
      getSelection().selectAllChildren(shown);
      tell("The browser does not allow copying here. The text is selected: press Ctrl+C.");
    }
  };
  return [shown, button("Copy", copy, { class: "small" })];
}

/* Theme: the system's until the toggle was used. */
const darkSystem = matchMedia("(prefers-color-scheme: dark)");
const theme = () => LASTING.getItem("ccmux-theme") || (darkSystem.matches ? "dark" : "light");
const otherTheme = () => (theme() === "dark" ? "light" : "dark");
function showTheme() {
  document.documentElement.dataset.theme = theme();
  $("theme").textContent = capital(otherTheme());
  $("theme").setAttribute("aria-label", `Switch to ${otherTheme()} colours`);
}
$("theme").addEventListener("click", () => { LASTING.setItem("ccmux-theme", otherTheme()); showTheme(); });
darkSystem.addEventListener("change", showTheme);
showTheme();

/* Draws a part anew, and gives back the focus, the scrolling sideways and what was unfolded in it. */
function redraw(node, ...children) {
  const all = (what) => [...node.querySelectorAll(what)], stops = "a, button, summary, [tabindex]";
  const old = document.activeElement, at = all(stops).indexOf(old);
  const left = all(".scroll").map((s) => s.scrollLeft), open = all("details").map((d) => d.open);
  refill(node, ...children);
  all(".scroll").forEach((s, n) => { s.scrollLeft = left[n] || 0; });
  if (all("details").length === open.length) all("details").forEach((d, n) => { d.open = open[n]; });
  const isSame = (e, n) => (old.dataset.key ? e.dataset.key === old.dataset.key
    : n === at && e.textContent === old.textContent);
  const focused = at >= 0 && all(stops).find(isSame);
  if (focused) focused.focus({ preventScroll: true });
}
/* Asks again every few seconds while the page is seen and no text on it is selected, to be copied perhaps. */
function poll(refresh, every, left) {
  const fail = (error) => (error.status === 401 ? start() : tellError(error)); /* the token was changed */
  const ask = once(() => refresh().catch(fail));
  const timer = setInterval(() => {
    if (left?.aborted) clearInterval(timer);
    else if (!document.hidden && !String(getSelection())) ask();
  }, every);
}

const [SECRET_NAME, SECRET_HELP] = IS_ADMIN
  ? ["Admin token", "ccmux printed a link with the token when it started; `ccmux.py token` prints it again. "
    + "It stays in this tab."]
  : ["Your ccmux key", "This server keeps an account for each user. Give your key to see yours; it stays in this tab."];
function signIn(again) {
  const input = textBox("", { type: "password", required: true });
  const error = el("p", { class: "error", role: "alert" }, again);
  const submit = (event) => {
    event.preventDefault();
    SESSION.setItem(SECRET, input.value.trim());
    tell(""); /* what was said of another one */
    start();
  };
  refill($("main"), el("section", { class: "card signin" }, el("h2", "Sign in"),
    el("form", { onsubmit: submit }, el("p", SECRET_HELP), labelled(SECRET_NAME, input), error,
      el("div", { class: "row" }, el("button", { class: "main" }, "Sign in")))));
  input.focus();
}
/* Shows the page, or asks for the secret without which it cannot be shown. */
async function start() {
  try {
    await (IS_ADMIN ? admin() : dashboard());
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if ([401, 403, 429].includes(error.status)) {
      visit.abort();
      const words = error.status === 401 ? "That is not the right one." : error.message;
      signIn(SESSION.getItem(SECRET) ? words : "");
      SESSION.removeItem(SECRET);
    } else if (document.querySelector(".tiles")) tellError(error); /* what is shown stays, and is asked for again */
    else refill($("main"), card("ccmux did not answer", button("Try again", start), el("p", error.message)));
  }
}

/* Pictures. */
function spark(values) {
  const most = Math.max(...values, 1e-9), step = 64 / Math.max(values.length - 1, 1);
  const point = (v, n) => `${(n * step).toFixed(1)},${(19 - (v / most) * 18).toFixed(1)}`;
  return svg("svg", { class: "spark", width: 64, height: 20, "aria-hidden": "true" },
    svg("polyline", { points: values.map(point).join(" ") }));
}
function tile(label, value, note, values) {
  return el("div", { class: "card" }, el("span", { class: "muted" }, label), el("span", { class: "big" }, value),
    note && el("span", { class: "muted" }, note), values && spark(values));
}
function dayChart(days) {
  const most = Math.max(...days.map((d) => d.charge_microusd), 1e-9);
  const bar = (day, n) => {
    const height = Math.max((day.charge_microusd / most) * 130, day.charge_microusd > 0 ? 2 : 0);
    return svg("rect", { class: "bar", x: n * 30 + 2, y: 140 - height, width: 26, height, rx: 2 },
      svg("title", `${day.key}: ${usd(day.charge_microusd)}, ${count(day.requests, "request")}`));
  };
  return svg("svg", { class: "chart", viewBox: "0 0 900 142", preserveAspectRatio: "none", role: "img",
    "aria-label": `Bars of ${days.length} days, the highest ${usd(most)}` },
  svg("line", { class: "axis", x1: 0, y1: 141, x2: 900, y2: 141 }), days.map(bar));
}
/* The rows of the last 30 days, the ones without a request too. */
function lastDays(rows) {
  const known = new Map(rows.map((row) => [row.key, row])), today = Date.now();
  return Array.from({ length: 30 }, (_, n) => {
    const key = new Date(today - (29 - n) * 864e5).toISOString().slice(0, 10);
    return known.get(key) || { key, requests: 0, charge_microusd: 0 };
  });
}

/* The request log, on both pages. */
const FAULTS = { http_400: "request refused", http_401: "key refused", http_402: "payment needed", http_403: "key refused",
  http_404: "not found", http_413: "too large", http_429: "limited", http_529: "overloaded", budget: "budget used up",
  busy: "too many at once", client_gone: "client hung up", client_stall: "client stopped reading",
  connect: "cannot be reached", cooling: "limited everywhere", disconnect: "connection broke", empty: "empty answer",
  internal: "fault in ccmux", interrupted: "ccmux was ended", no_credit: "no credit left", overflow: "too long",
  no_money: "provider wants paying", shutdown: "ccmux was stopped", store: "database failed", stream: "answer broke off",
  timeout: "took too long", unavailable: "all failing or busy" };
const faultWord = (error) => FAULTS[error] || (/^http_5/.test(error) ? "server fault" : error.slice(0, 50));
const statusBadge = (row) => badge(row.status < 300 && !row.error ? "ok" : row.status < 500 ? "warn" : "bad",
  `${row.status} ${faultWord(row.error)}`);
const chargeOf = (row) => (row.cost_microusd === null && !row.charge_microusd ? "no price" : usd(row.charge_microusd));
const target = (row) => [row.provider, row.model].filter(Boolean).join("/") || "–";
const REQUEST_COLUMNS = [
  ["Time", (r) => button(when(r.time), () => showRow(r), { class: "small", title: "All of this request",
    "data-key": r.request_id }), "nowrap"],
  IS_ADMIN ? textOf("User", "user", "nowrap") : ["Session", (r) => (r.session || "–").slice(0, 8), "nowrap mono"],
  textOf("Asked for", "asked"), ["Answered by", target, "text"], textOf("Why", "route", "nowrap"),
  ["Status", statusBadge, "nowrap"], ["Tokens", (r) => `${r.estimated ? "~" : ""}${whole(tokensOf(r))}`, "num"],
  ["Cost", chargeOf, "num"], numberOf("Took", "duration_ms", seconds),
];
/* Why a request went where it went, and what it cost: of the log's row, as prompts are not kept. */
function explanation(trail) {
  const tried = trail.filter(([step]) => step !== "targets"), order = trail.find(([step]) => step === "targets");
  return [table("Rules tried", [["Rule", ([step]) => step, "nowrap"], ["What it said", ([, note]) => note, "text"]],
    tried, "No rules were tried."), order && el("p", "Targets in order: ", order[1],
    order[1].includes(", then ") && ". One that rests after faults, or is limited, is tried last.")];
}
function costTable(row) {
  const price = row.price || {}, tiers = price.tiers || [];
  const rate = ([kind]) => price[kind] ?? (price.input ? "as input" : "–");
  const kinds = KINDS.filter(([kind]) => row[`${kind}_tokens`] || ["input", "output"].includes(kind));
  return [table("Tokens and price", [["Kind", ([, name]) => name, "nowrap"],
    ["Tokens", ([kind]) => whole(row[`${kind}_tokens`]), "num"], ["$ per million", rate, "num"]], kinds, ""),
  tiers.length > 0 && remark(`Another price above ${whole(tiers[0].above)} tokens.`),
  el("p", row.cost_microusd === null ? "No price is known for this model, so its cost is not counted."
    : `Cost ${usd(row.cost_microusd)}, markup ${usd(row.markup_microusd)}, charged ${usd(row.charge_microusd)}.`)];
}
async function showRow(row) {
  const shown = (name, value) => (name.endsWith("_microusd") ? usd(value) : name.endsWith("_ms")
    ? seconds(value) : value === "" || value === null ? "–" : String(value));
  const fields = Object.entries(row).filter(([name]) => !["trail", "price"].includes(name));
  const again = el("div");
  const isAsked = row.attempts || row.error === "interrupted"; /* of which nothing more is known */
  const ended = row.status < 300 && !row.error ? "answered" : isAsked ? "did not answer to the end" : "was not asked";
  openDialog(`Request ${row.request_id}`, el("p", statusBadge(row), ` ${row.asked || "–"} was asked for, `,
    `${target(row)} ${ended} (${row.route || "–"}, ${count(row.attempts, "attempt")})`),
  el("h3", "Why"), explanation(row.trail), again, el("h3", "Cost"), costTable(row),
  folded("All fields", table("All fields",
    [["Field", ([n]) => n.replace(/_/g, " "), "nowrap"], ["Value", ([n, v]) => shown(n, v), "text"]], fields, "")));
  if (!IS_ADMIN) return;
  const { held } = await ask(`${ROOT}/inspect`).catch(() => ({ held: [] }));
  const explain = async () => {
    const whole = await ask(path("inspect", row.request_id));
    refill(again, await explained(whole.client_request, whole.client_headers));
  };
  fill(again, held.some((r) => r.id === row.request_id) ? button("Explain it again on today's rules", explain)
    : remark("The prompt is not kept. While Inspect is on, requests are held whole and can be explained anew."));
}
const isDirty = (within = document) => within.querySelector("[data-dirty]");
const mayLeave = (within) => !isDirty(within) || confirm("Leave without saving what you changed?");
/* One dialog is open at a time. The status line goes along: what stands outside of it is not read out. */
let closeDialog = () => {};
function openDialog(title, ...body) {
  closeDialog();
  const opener = document.activeElement, leave = button("Close", () => { if (mayLeave(node)) closeDialog(); });
  const node = el("dialog", { "aria-label": title }, el("div", { class: "head" }, el("h2", title), leave), ...body);
  closeDialog = () => {
    closeDialog = () => {};
    document.body.append(STATUS);
    node.remove();
    const isDrawnAnew = (e) => e.dataset.key === opener.dataset.key; /* as a log's row may be */
    const back = opener.isConnected ? opener : [...document.querySelectorAll("[data-key]")].find(isDrawnAnew);
    (back || $("main")).focus({ preventScroll: true });
  };
  node.addEventListener("close", () => { if (node.isConnected) closeDialog(); });
  /* Browsers let a page refuse `cancel` once, not to a second Escape. */
  node.addEventListener("cancel", (event) => { if (!mayLeave(node)) event.preventDefault(); });
  node.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    event.preventDefault();
    leave.click();
  });
  document.body.append(node);
  node.showModal();
  node.append(STATUS);
  (node.querySelector("input, select, textarea") || leave).focus();
}

/* Dashboard: one user's own numbers. */
async function dashboard() {
  const paths = ["me", "usage?days=30&by=day", "usage?days=30&by=model", "usage?days=30&by=session", "models",
    "requests?limit=50", "transactions?limit=50"];
  const [me, { usage: days }, { usage: used }, { usage: sessions }, { models }, { requests }, { transactions }]
    = await Promise.all(paths.map((path) => ask(`/api/${path}`)));
  if (me.name === "local" && SESSION.getItem(SECRET)) {
    SESSION.removeItem(SECRET);
    tell("No user here has that key: this is the local user.");
  }
  const cards = [tiles(me, lastDays(days), days), budgetCard(me), spendCard(lastDays(days)),
    el("div", { class: "two" }, topCard("Models used", "Model", used), topCard("Sessions", "Session", sessions)),
    requestCard(requests), offeredCard(models), moneyCard(transactions)];
  redraw($("main"), requests.length ? [cards, connectCard(models)] : [connectCard(models), cards]);
}
const isFree = (user) => user.name === "local" && user.balance_microusd <= 0;
function tiles(me, days, rows) {
  const fresh = sum(rows, "input_tokens"), cached = sum(rows, "cache_read_tokens"), output = sum(rows, "output_tokens");
  const written = sum(rows, "cache_write_tokens") + sum(rows, "cache_write_1h_tokens");
  const held = me.held_microusd ? `${usd(me.held_microusd)} set aside for running requests`
    : isFree(me) ? "no credit is needed here" : "nothing set aside";
  const timed = rows.filter((r) => r.first_token_ms), busy = sum(rows, "duration_ms") / 1000;
  const waited = timed.reduce((t, r) => t + r.first_token_ms * r.requests, 0) / sum(timed, "requests");
  return el("div", { class: "tiles" },
    /* Who has no credit and needs none would read a balance below zero as a debt. */
    isFree(me) ? tile("Spent in all", usd(-me.balance_microusd), held) : tile("Balance", usd(me.balance_microusd), held),
    tile("Spent today", usd(me.spent_today_microusd), `by ${me.name}`),
    tile("Spent this month", usd(me.spent_month_microusd), "UTC", days.map((d) => d.charge_microusd)),
    tile("Requests", whole(sum(rows, "requests")), "in 30 days", days.map((d) => d.requests)),
    tile("Input tokens", short(fresh), `${short(written)} written to cache`),
    tile("Output tokens", short(output), "in 30 days"),
    tile("Read from cache", short(cached), `${percent(cached / (fresh + cached + written))} of all input`),
    tile("First token", waited ? seconds(waited) : "–",
      busy ? `${Number((output / busy).toPrecision(3))} tokens/s` : "no requests yet"));
}
const budgetBars = (user) => budgetsOf(user).map(([period, used, limit]) => el("div",
  el("p", `${usd(used)} of ${usd(limit)} this ${period}`),
  el("meter", { min: 0, max: Math.max(limit, 1), value: used, high: limit * 0.8,
    "aria-label": `budget of the ${period}` })));
const budgetCard = (me) => budgetsOf(me).length > 0 && card("Budgets", "UTC, a week begins on Monday", budgetBars(me));
const PERIODS = ["day", "week", "month"];
/* [period, spent, budget] of those that are set. */
const budgetsOf = (user) => PERIODS.map((period) => [period,
  user[`spent_${period === "day" ? "today" : period}_microusd`], user.budgets[`${period}_microusd`]])
  .filter(([, , limit]) => limit !== null);
function spendCard(days) {
  if (!sum(days, "requests")) return card("Spend per day", null, empty("Nothing was asked in the last 30 days."));
  const used = days.filter((d) => d.requests).reverse();
  const label = el("div", { class: "head muted" }, el("span", { class: "grow" }, days[0].key), days.at(-1).key);
  return card("Spend per day", `${usd(sum(days, "charge_microusd"))} in 30 days`, dayChart(days), label,
    folded("As a table", table("Spend per day", [...usageColumns("Day"), COST], used, "")));
}
const usageColumns = (title) => [[title, (r) => r.key || "none", "text"], numberOf("Requests", "requests"),
  numberOf("Input", "input_tokens", short), numberOf("Output", "output_tokens", short),
  numberOf("Cache read", "cache_read_tokens", short)];
const COST = ["Cost", (r) => (r.unpriced === r.requests ? "no price" : usd(r.charge_microusd)), "num"];
const topCard = (title, by, rows) => card(title, null,
  table(title, [...usageColumns(by), COST], rows.slice(0, 10), "Nothing yet: it fills as you work."));
const requestCard = (rows) => card("Last requests",
  ["csv", "json"].map((format) => button(`Export ${format.toUpperCase()}`,
    () => download(`/api/export?format=${format}`, `ccmux-usage.${format}`))),
  table("Last requests", REQUEST_COLUMNS, rows, "No requests yet. Point Claude Code here and ask it something."));
/* Claude Code lists only names with claude or anthropic in them, so ccmux offers each with this in front too. */
const seenAs = ({ name }) => (name.startsWith("anthropic/") ? name : `anthropic/${name}`);
function offeredCard(models) {
  const price = ([kind, title]) => [title, ({ price }) => (price?.[kind] ? `$${Number(price[kind])}` : "–"), "num"];
  const columns = [textOf("Ask for", "name", "text mono"), ["Claude Code sees", seenAs, "text mono"],
    ["Goes to", (m) => m.targets.join(", then "), "text"], CONTEXT, ...KINDS.slice(0, 3).map(price)];
  return card("Models", "US dollars per million tokens", table("Models", columns, models,
    "No models yet. Whoever runs this server adds a provider and a model on the admin page."));
}
const CONTEXT = ["Context", (m) => (m.context ? short(m.context) : "–"), "num"];
const TIME = ["Time", (r) => when(r.time), "nowrap"];
const ledgerTable = (entries, shown) => table("Transactions", [TIME, textOf("Kind", "kind", "nowrap"),
  ["Note", (t) => t.note || t.request_id || "–", "text"], numberOf("Amount", "amount_microusd", usd),
  numberOf("Balance", "balance_microusd", usd)], entries, shown);
function moneyCard(entries) {
  const buy = () => openDialog("Buy credits", el("p",
    "ccmux takes no payments: ask whoever runs this server, who can add credit on the admin page."));
  return card("Transactions", button("Buy credits", buy), ledgerTable(entries,
    "No transactions. Credit that is added and what requests cost is listed here."));
}
function connectCard(models) {
  const url = location.origin, key = SESSION.getItem(SECRET) ? "YOUR-CCMUX-KEY" : "ccmux-local";
  const values = { ANTHROPIC_BASE_URL: url, ANTHROPIC_AUTH_TOKEN: key };
  const shells = [["bash, zsh", (n, v) => `export ${n}='${v}'`], ["fish", (n, v) => `set -gx ${n} '${v}'`],
    ["PowerShell", (n, v) => `$env:${n} = '${v}'`], ["cmd", (n, v) => `set ${n}=${v}`]];
  const block = ([name, line], n) => el("details", { open: n === 0 }, el("summary", name), copyable(
    [...Object.entries(values).map(([key, value]) => line(key, value)), "claude"].join("\n")));
  return card("Point Claude Code here", null,
    remark("Paste these lines into a terminal; the last one starts Claude Code",
    models.length ? `, whose /model also takes names such as ${models[0].name}.` : ".",
    key !== "ccmux-local" && ` Put your key where ${key} stands.`,
    " On this server's machine `python3 ccmux.py code` does it all, and sets what auto mode needs."), shells.map(block));
}

/* Forms, built from the config's own declarations of its keys: {name, kind, help, default, choices}. */
let lastId = 0;
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
function labelled(label, input, help, wide) {
  input.id = input.id || `f${++lastId}`;
  const hint = help && el("span", { class: "help", id: `${input.id}h` }, help);
  if (hint) input.setAttribute("aria-describedby", hint.id);
  return el("div", { class: wide ? "field wide" : "field" }, el("label", { for: input.id }, label), input, hint);
}
const textBox = (value, props) => el("input", { type: "text", autocomplete: "off", spellcheck: "false",
  value, ...props });
const textArea = (rows, value, props) => el("textarea", { rows, spellcheck: "false", value, ...props });
const numberBox = (value, props) => el("input", { type: "number", step: "any", value: value ?? "", ...props });
const options = (names) => names.map((value) => el("option", { value }));
/* Choices: [value, label], or a value alone. */
function selectBox(choices, value = "") {
  const known = choices.map((choice) => [choice].flat());
  if (value && !known.some(([key]) => key === value)) known.push([value]);
  const node = el("select", known.map(([key, label]) => el("option", { value: key }, label ?? key)));
  node.value = value;
  return node;
}
/* What a number box says, undefined where it is empty. Browsers give what is no number as "" too. */
function numberIn(input, name = input.labels[0].textContent) {
  const { badInput, rangeUnderflow, rangeOverflow } = input.validity;
  if (badInput) throw new Failure(400, `${name}: must be a number`);
  if (rangeUnderflow) throw new Failure(400, `${name}: must be at least ${whole(input.min)}`);
  if (rangeOverflow) throw new Failure(400, `${name}: must be at most ${whole(input.max)}`);
  return input.value === "" ? undefined : Number(input.value);
}
const commaParts = (input) => input.value.split(",").map((part) => part.trim()).filter(Boolean);
function jsonIn(input, place) {
  try { return JSON.parse(input.value); } catch (error) { throw new Failure(400, `${place}${error.message}`); }
}

const AS_IT_IS = "as the preset or format has it";
/* A control for each kind: (field, value) -> {node, get}; get() is undefined for "leave the key out". */
const CONTROLS = {
  text(field, value) {
    const input = textBox(value ?? field.default, { list: field.list });
    const isPattern = /pattern|regex/.test(field.name); /* where a space at an end counts */
    return { input, get: () => (isPattern ? input.value : input.value.trim()) };
  },
  choice(field, value) {
    const input = selectBox([...(field.default ? [] : [["", field.maybe ? AS_IT_IS : "–"]]), ...field.choices],
      value ?? field.default);
    return { input, get: () => input.value };
  },
  number(field, value) {
    const input = numberBox(value ?? field.default);
    return { input, get: () => numberIn(input, field.name) };
  },
  bool(field, value) {
    const now = value ?? (field.maybe ? "" : field.default), words = now ? "yes" : "no";
    const input = selectBox([...(field.maybe ? [["", AS_IT_IS]] : []), "yes", "no"], now === "" ? "" : words);
    return { input, get: () => (input.value ? input.value === "yes" : undefined) };
  },
  list(field, value) {
    const given = value ?? field.default;
    if (!field.choices.length) {
      const input = textBox(given.join(", "), { placeholder: "separated by commas" });
      return { input, get: () => commaParts(input) };
    }
    const boxes = field.choices.map((c) => el("input", { type: "checkbox", value: c, checked: given.includes(c) }));
    const node = fieldset(field, "checks", boxes.map((box) => el("label", box, box.value)));
    return { node, get: () => boxes.filter((b) => b.checked).map((b) => b.value) };
  },
  secret(field, value) {
    if (field.name === "headers") return headerControl(field, value);
    const now = keysSet(value, (last4) => `ends in ${last4 || "…"}`);
    /* Browsers fill the password they know, this page's token, into every other such box. */
    const input = textBox("", { type: "password", autocomplete: "new-password",
      placeholder: now ? `set (${now}); empty keeps it` : "not set" });
    input.addEventListener("input", () => { input.type = input.value.startsWith("$") ? "text" : "password"; });
    const isPool = field.name === "api_key", gone = el("input", { type: "checkbox" });
    const node = labelled(labelOf(field), input, field.help + (isPool ? ", commas between them" : ""));
    if (now) node.append(el("label", gone, "take the stored one away"));
    const typed = () => (isPool ? commaParts(input) : [input.value.trim()]);
    return { input, node, get: () => (gone.checked ? "" : typed().length > 1 ? typed() : typed()[0] || undefined) };
  },
  price(field, value) {
    const given = value || {}, boxes = KINDS.map(([kind]) => numberBox(given[kind], { min: 0 }));
    const node = fieldset(field, "prices", boxes.map((box, n) => labelled(KINDS[n][1], box)));
    const pairs = () => boxes.map((b, n) => [KINDS[n][0], numberIn(b, field.name)])
      .filter(([, dollars]) => dollars !== undefined);
    const others = Object.entries(given).filter(([name]) => !KINDS.some(([kind]) => kind === name)); /* tiers */
    return { node, get: () => (pairs().length ? Object.fromEntries([...others, ...pairs()]) : undefined) };
  },
  table(field, value) {
    const input = textArea(3, value ? JSON.stringify(value, null, 1) : "");
    return { input, wide: true, get: () => (input.value.trim() ? jsonIn(input, `${field.name}: `) : undefined) };
  },
};
function headerControl(field, value) {
  const lines = Object.keys(value || {}).map((name) => `${name}: [kept]`).join("\n");
  const input = textArea(2, lines, { placeholder: "Name: value, one a line" });
  const pair = (line) => {
    const [name, ...rest] = line.split(":"), text = rest.join(":").trim();
    if (!rest.length) throw new Failure(400, `${field.name}: ${line.trim()} lacks a colon; write Name: value`);
    return [name.trim(), text === "[kept]" ? null : text];
  };
  const get = () => Object.fromEntries(input.value.split("\n").filter((l) => l.trim()).map(pair));
  return { input, wide: true, get: () => (value || input.value.trim() ? get() : undefined) };
}
const fieldset = (field, kind, boxes) => el("fieldset", { class: "field wide" }, el("legend", labelOf(field)),
  el("div", { class: kind }, boxes), el("span", { class: "help" }, field.help));
const labelOf = (field) => capital(field.name).replace(/_/g, " ").replace("Api", "API").replace(" url", " URL");

/* Controls for some fields of a table. read() is the table with what was changed; a key whose control was made
   empty is left out. What was not changed stays as it was written: an empty list may overrule a preset's. */
function controls(fields, table) {
  const made = fields.map((field) => {
    const control = CONTROLS[field.kind](field, table[field.name]);
    const node = control.node || labelled(labelOf(field), control.input, field.help, control.wide);
    node.dataset.field = field.name;
    return { field, first: control.get(), ...control, node };
  });
  const read = (start = table) => {
    const out = { ...start };
    for (const { field, first, get } of made) {
      const now = get();
      if (same(now, first) && !field.secret) continue; /* a secret that is left out stays */
      const isEmpty = (now === "" && !field.secret) || same(now, []);
      if (now === undefined || (isEmpty && same(now, field.default))) delete out[field.name];
      else out[field.name] = now;
    }
    return out;
  };
  return { nodes: made.map((m) => m.node), read, input: (name) => made.find((m) => m.field.name === name).input };
}

/* A form that keeps what was typed when a save fails. `save` throws a Failure then, and gives words where it saved. */
function formOf(nodes, save, { label = "Save", extra = [], keeps = true } = {}) {
  const error = el("p", { class: "error", role: "alert" }), send = el("button", { class: "main" }, label);
  const row = el("div", { class: "row" }, send, extra), form = el("form", { novalidate: true }, nodes, error, row);
  const dirty = () => { if (keeps) form.dataset.dirty = "yes"; };
  form.addEventListener("input", dirty);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    for (const mark of form.querySelectorAll("[aria-invalid]")) mark.removeAttribute("aria-invalid");
    error.textContent = "";
    row.before(error); /* it may have stood beside a field */
    send.disabled = true;
    delete form.dataset.dirty;
    try {
      await saved(await save(), form);
    } catch (failure) {
      dirty();
      showFailure(failure, error, form);
    }
    send.disabled = false;
    if (document.activeElement === document.body) send.focus(); /* what is disabled loses it */
  });
  return form;
}
/* The message stands in the form, and beside the field that it names. */
function showFailure({ status, message }, error, form) {
  error.textContent = message;
  if (status === 409) fill(error, " ", button("Load the newest", () => location.reload(), { class: "small" }));
  const isNamed = (field) => new RegExp(`\\b${field.dataset.field}\\b`).test(message);
  const wrong = [...form.querySelectorAll("[data-field]:not(.item *)")].find(isNamed);
  if (!wrong) return;
  const input = wrong.querySelector("input, select, textarea");
  input.setAttribute("aria-invalid", "true");
  (wrong.closest("details") || {}).open = true;
  wrong.append(error);
  input.focus();
}
addEventListener("beforeunload", (event) => { if (isDirty()) event.preventDefault(); });

/* Rows that can be moved, removed and added: `make(row)` -> {node, read}. */
function sequence(rows, make, what) {
  const list = el("div"), readers = new Map();
  const changed = () => {
    [...list.children].forEach((item, n) => item.setAttribute("aria-label", `${what} ${n + 1}`));
    list.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const add = (row) => {
    const { node, read } = make(row);
    const move = (other, where) => { if (other) { other[where](item); changed(); } };
    const up = button("Up", () => { move(item.previousSibling, "before"); up.focus(); }, { class: "small" });
    const down = button("Down", () => { move(item.nextSibling, "after"); down.focus(); }, { class: "small" });
    const remove = button("Remove", () => { item.remove(); changed(); more.focus(); }, { class: "small danger" });
    const item = el("div", { class: "item", role: "group" }, node, el("div", { class: "row" }, up, down, remove));
    readers.set(item, read);
    list.append(item);
  };
  rows.forEach(add);
  changed();
  const more = button(`Add a ${what}`, () => {
    add({});
    changed();
    list.lastChild.querySelector("input, select").focus();
  });
  return { node: el("div", list, more), read: () => [...list.children].map((item) => readers.get(item)()) };
}

/* Admin: one view a tab. S is the server's last state; a form keeps the hash it was opened with. What a view begins
   ends when it is left, which its signal tells. */
let S = null, visit = new AbortController(), shownTab = "";
const ROOT = "/admin/api";
const path = (...parts) => [ROOT, ...parts.map(encodeURIComponent)].join("/");
const VIEWS = { overview, providers: providersView, models: modelsView, router: routerView, users: usersView,
  billing: billingView, try: tryView, inspect: inspectView, config: configView };

async function admin() {
  let [, token] = /^#token=(.+)$/.exec(location.hash) || [];
  if (token) {
    try { token = decodeURIComponent(token); } catch { /* typed by hand, with a percent sign of its own */ }
    SESSION.setItem(SECRET, token);
    history.replaceState(null, "", "/admin#overview");
  }
  await reload();
  await showTab(true);
}
async function reload() {
  S = await ask(`${ROOT}/state`);
  $("version").textContent = `ccmux ${S.version}`;
}
async function showTab(isFresh = false) {
  if (!S) return;
  const named = location.hash.slice(1), key = Object.hasOwn(VIEWS, named) ? named : "overview";
  if (!mayLeave()) {
    history.replaceState(null, "", `#${shownTab}`);
    return;
  }
  if (shownTab !== key) closeDialog(); /* by Back */
  visit.abort();
  visit = new AbortController();
  const { signal } = visit, isAgain = shownTab === key;
  shownTab = key;
  redraw($("tabs"), Object.keys(VIEWS).map((name) => el("a", { href: `#${name}`, "aria-current": name === key && "page" },
    capital(name))));
  try {
    if (!isFresh) await reload();
    const nodes = !signal.aborted && await VIEWS[key](signal);
    if (signal.aborted || (isAgain && isDirty())) return; /* what was typed meanwhile stays */
    (isAgain ? redraw : refill)($("main"), nodes);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) start();
    else refill($("main"), card("That did not work", button("Try again", () => showTab()), el("p", error.message)));
  }
}
/* After a save, which gives words: the dialog that it was made in closes, the newest state is read, and the view is
   drawn again unless another form on it has unsaved changes. */
async function saved(words, place) {
  if (typeof words !== "string") return;
  if (place.isConnected && place.closest("dialog")) closeDialog();
  await (isDirty() ? reload() : showTab());
  if (document.activeElement === document.body) $("main").focus(); /* what had the focus is drawn anew */
  tell(words);
}

/* Overview */
const STATES = { ok: ["ok", "working"], disabled: ["", "switched off"], cooling: ["warn", "limited for now"],
  "half-open": ["warn", "being tried again"], open: ["bad", "resting after faults"], unusable: ["bad", "cannot be used"] };
const problemOf = ({ state, problem }) => state === "unusable" && el("div", { class: "help" }, problem);
const refusesKey = ({ outcomes }) => ["http_401", "http_403"].includes(outcomes.at(-1)?.error);
function stateBadge(name) {
  const health = S.providers[name] || { state: "unusable", outcomes: [] };
  if (refusesKey(health) && !["disabled", "unusable"].includes(health.state)) return badge("bad", "refuses its key");
  if (health.state === "ok" && !health.outcomes.length) return badge("", "not used yet");
  if (health.state === "ok" && !health.outcomes.at(-1).ok) return badge("warn", "failed last time");
  return badge(...STATES[health.state]);
}
function problems(broke) {
  const found = [], add = (kind, word, text, tab) => found.push([kind, word, text, tab]);
  if (S.config_error) add("bad", "config", S.config_error, "config");
  if (!rowsOf("providers").length) add("warn", "no provider",
    "Add one to have anything to send requests to.", "providers");
  const first = Object.values(S.providers).find((p) => !["disabled", "unusable"].includes(p.state));
  if (first?.format === "demo" && !S.routes.default && !rowsOf("models").length) add("warn", "demo",
    "The built-in demo answers what Claude Code asks for. Add a provider, then a model of it", "providers");
  for (const user of broke) add("warn", user.name, "has no credit left, so requests are refused", "users");
  for (const [name, health] of Object.entries(S.providers)) {
    const error = health.outcomes.at(-1)?.error;
    const next = health.next_try_s ? `, tried again in ${Math.ceil(health.next_try_s)} s` : "";
    if (health.state === "disabled") continue;
    if (health.problem) add("bad", name, health.problem, "providers");
    else if (refusesKey(health)) add("bad", name, "refuses its key", "providers");
    else if (["open", "half-open", "cooling"].includes(health.state)) {
      add("warn", name, `${STATES[health.state][1]}${next}${error ? `: ${faultWord(error)}` : ""}`, "providers");
    }
  }
  if (S.unpriced.length) {
    const rest = S.unpriced.length > 8 ? ` and ${S.unpriced.length - 8} more` : "";
    add("warn", "no price", `${S.unpriced.slice(0, 8).join(", ")}${rest}: what these cost is not counted`, "models");
  }
  for (const name of S.vocabulary_missing) {
    add("warn", "token counts", `are estimates until ${name} is downloaded, which is tried each hour`);
  }
  const isSaid = (warning) => Object.entries(S.providers).some(([name, { problem }]) => problem
    && warning.startsWith(`provider ${name}:`));
  for (const warning of S.warnings) if (!isSaid(warning)) add("warn", "warning", warning, "config");
  return found;
}
function problemCard(broke) {
  const found = problems(broke);
  if (!found.length) return card("All is well", badge("ok", "no problems"));
  const item = ([kind, word, text, tab]) => el("li", badge(kind, word), ` ${text.replace(/\.$/, "")}.`,
    tab && [" See ", el("a", { href: `#${tab}` }, capital(tab))]);
  const node = card(`${count(found.length, "thing")} to look at`, null, el("ul", found.map(item)));
  node.classList.add("problems", ...(found.some(([kind]) => kind === "bad") ? [] : ["mild"]));
  return node;
}
function beats(outcomes) {
  const label = `${outcomes.filter((o) => o.ok).length} of the last ${outcomes.length} requests went well`;
  const beat = (o) => el("i", { class: o.ok ? "ok" : "bad", title: `${o.status} in ${o.ms} ms ${faultWord(o.error)}` });
  return el("div", { class: "beats", role: "img", "aria-label": label }, outcomes.map(beat));
}
function healthCard() {
  const rows = Object.entries(S.providers).map(([name, health]) => ({ name, ...health }));
  return card("Providers", null, table("Provider health", [textOf("Provider", "name"),
    ["State", (p) => stateBadge(p.name), "nowrap"], ["Last requests", (p) => beats(p.outcomes)],
    numberOf("Running now", "active"), numberOf("Average time", "latency_ms", seconds)], rows,
  "No providers yet. Add one under Providers: with a preset, a key is enough."));
}
async function overview(left) {
  const top = el("div"), log = el("div", { class: "log" });
  let since = "", past = null, live = null, shownDay = "";
  const draw = async () => {
    const day = new Date().toISOString().slice(0, 10), localDay = new Date().toDateString();
    if (live && shownDay !== localDay) live.draw(); /* what was today's is yesterday's now */
    shownDay = localDay;
    if (since !== day) past = ask(`${ROOT}/report?by=provider&until=${day}`); /* once a day: a long log takes its time */
    since = day;
    past.catch(() => { since = ""; });
    const [before, today, { users }] = await Promise.all([past, ask(`${ROOT}/report?by=provider&since=${since}`),
      tableOf("credits").enforce ? ask(`${ROOT}/users`) : { users: [] }]);
    const broke = users.filter((user) => user.balance_microusd <= 0 && !user.disabled && !isFree(user));
    const now = today.report, ever = [...before.report, ...now];
    redraw(top, problemCard(broke), el("div", { class: "tiles" },
      tile("Requests today", whole(sum(now, "requests")), `${whole(sum(ever, "requests"))} in all`),
      tile("Charged today", usd(sum(now, "charge_microusd")), `${usd(sum(ever, "charge_microusd"))} in all`),
      tile("Tokens today", short(now.reduce((total, row) => total + tokensOf(row), 0)), "of all kinds, in UTC"),
      tile("Running for", duration(S.uptime_s), S.path || "no config file yet")), healthCard());
  };
  await draw();
  live = await liveLog(log, left);
  poll(async () => { await reload(); await draw(); }, 5000, left);
  return [top, card("Requests", live.tools, log)];
}
const duration = (s) => (s < 3600 ? `${Math.floor(s / 60)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h`
  : `${Math.floor(s / 86400)} days`);
async function liveLog(place, left) {
  const newest = async () => (await ask(`${ROOT}/requests?limit=100`)).requests;
  let rows = await newest(), shown = rows, paused = false, stream = new AbortController();
  const filter = textBox("", { placeholder: "model, user, session …", "aria-label": "Filter the requests",
    type: "search" });
  const isWanted = (row) => `${faultWord(row.error)} ${JSON.stringify(row)}`.toLowerCase()
    .includes(filter.value.toLowerCase());
  const draw = () => {
    if (!paused) shown = rows;
    redraw(place, table("Requests", REQUEST_COLUMNS, shown.filter(isWanted),
      shown.length ? "Nothing fits the filter." : "No requests yet. They appear here as they end."));
  };
  let timer = 0; /* many requests at once are drawn once */
  const drawSoon = () => { timer = timer || setTimeout(() => { timer = 0; if (!paused) draw(); }, 300); };
  const pause = button("Pause", () => {
    paused = !paused;
    pause.textContent = paused ? "Go on" : "Pause";
    if (!paused) draw();
  });
  /* A browser has six connections to a server, for all its tabs: a hidden page gives its own back. */
  document.addEventListener("visibilitychange", () => { if (document.hidden) stream.abort(); }, { signal: left });
  left.addEventListener("abort", () => stream.abort());
  const follow = async () => {
    while (!left.aborted) {
      if (!document.hidden) try {
        stream = new AbortController();
        const answer = await call(`${ROOT}/events`, "GET", undefined, stream.signal);
        rows = await newest(); /* what ended before the stream began, or while it was broken */
        if (!paused) draw();
        for await (const [, data] of eventsOf(answer)) {
          const row = JSON.parse(data);
          rows = [row, ...rows.filter((r) => r.request_id !== row.request_id)].slice(0, 300);
          drawSoon();
        }
      } catch { /* the server restarts, or the view is left */ }
      stream.abort(); /* where it was the reading beside it that failed */
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  };
  filter.addEventListener("input", draw);
  draw();
  follow();
  return { tools: [filter, pause], draw };
}

/* Providers */
const rowsOf = (root) => S.config[root] || [], tableOf = (root) => S.config[root] || {};
/* What would name a row that is gone: models their providers, routes and rules their models. */
const usersOf = (name) => rowsOf("models").filter((m) => m.mappings?.some((t) => t.provider === name)).map((m) => m.name);
const routesOf = (name) => [...Object.keys(S.routes).filter((slot) => S.routes[slot] === name),
  ...(tableOf("router").rules || []).filter((rule) => rule.model === name).map((rule) => rule.pattern)];
const NAMED_BY = { providers: usersOf, models: routesOf };
/* A save under another row's name would take that row's place. */
function checkName(root, name, old) {
  const isNew = name !== old?.name, users = old && isNew ? NAMED_BY[root](old.name) : [];
  if (!name) throw new Failure(400, "name: give it a name");
  if (isNew && rowsOf(root).some((row) => row.name === name)) {
    throw new Failure(400, `name: there is ${name} already; edit that one, or choose another name`);
  }
  if (users.length) {
    throw new Failure(400, `name: ${users.join(", ")} would still say ${old.name}; `
      + "change both names in the whole file, under Config");
  }
}
function removeButton(root, { name }, hash) {
  return button("Delete", async () => {
    const users = NAMED_BY[root](name);
    if (users.length) throw new Failure(409, `${name} is used by ${users.join(", ")}; change that first.`);
    if (!confirm(`Delete ${name}?`)) return null;
    await ask(path(root, name), "DELETE", { hash });
    return `${name} is deleted.`;
  }, { class: "danger" });
}
const hostOf = (url) => { try { return new URL(url).host; } catch { return url || "–"; } };
/* The keys that are set, as far as the server tells them: a variable by its name, else the last four. */
const keysSet = (key, ending) => [key].flat().filter((k) => k?.set)
  .map((k) => k.reference || ending(k.last4)).join(", ");
function providersView() {
  const columns = [textOf("Name", "name"),
    ["", (p) => [rowButton("Edit", p.name, () => providerDialog(p)), rowButton("Test", p.name, () => testDialog(p.name))],
      "act"],
    ["State", (p) => [stateBadge(p.name), problemOf(S.providers[p.name] || {})], "text"],
    ["Type", (p) => p.type || p.provider_type, "nowrap"],
    ["Sends to", (p) => hostOf(S.providers[p.name]?.url), "text mono"],
    ["Key", (p) => keysSet(p.api_key, (last4) => `set, …${last4}`) || "none", "text"],
    ["Models", (p) => whole(usersOf(p.name).length + (p.models || []).length), "num"]];
  return card("Providers", button("Add a provider", () => providerDialog(null), { class: "main" }),
    table("Providers", columns, rowsOf("providers"),
      "None yet. Add one: choose a preset, give it a key, save, and test it."));
}
function providerDialog(old) {
  const row = old || { name: "", type: "" }, hash = S.config_hash, list = S.fields.providers;
  const main = ["name", "base_url", "api_key", "models", ...(old ? ["enabled"] : [])];
  const field = (name) => list.find((f) => f.name === name);
  const first = controls(main.map(field), row);
  const rest = controls(list.filter((f) => ![...main, "type", "quirks"].includes(f.name)), row);
  /* What is not chosen stays the preset's or the format's own: no default of the file's is written over it. */
  const quirks = controls(S.fields.quirks.map((f) => ({ ...f, maybe: true, default: f.kind === "list" ? [] : "" })),
    row.quirks || {});
  const types = new Set([...Object.keys(S.presets), ...S.formats]);
  const type = selectBox([["", "choose …"], ...types], row.type || row.provider_type || "");
  const to = remark(), name = first.input("name"), url = first.input("base_url");
  const key = first.input("api_key");
  const addressOf = (kind, given) => given || S.presets[kind]?.base_url || "";
  const chosen = () => {
    const preset = S.presets[type.value] || {}, place = addressOf(type.value, url.value);
    const isMoved = old && place !== addressOf(row.type || row.provider_type, row.base_url);
    const known = old && !isMoved ? S.providers[old.name]?.url : !url.value && preset.url;
    to.textContent = place ? `Requests and the key go to ${known || hostOf(place)}.`
      : "Give the address that requests go to.";
    if (isMoved) to.textContent += " The key must be typed again for a new address.";
    url.placeholder = preset.base_url || "https://host/v1";
    if (preset.api_key && !old) key.placeholder = `the key, or ${preset.api_key} from the environment`;
  };
  let suggested = "";
  type.addEventListener("change", () => {
    if (!old && ["", suggested].includes(name.value)) name.value = suggested = type.value;
    chosen();
  });
  url.addEventListener("input", chosen);
  chosen();
  const save = async () => {
    const own = quirks.read(), { provider_type: written, quirks: _, ...table } = rest.read(first.read());
    if (!type.value) throw new Failure(400, "type: choose one first");
    table[written === type.value ? "provider_type" : "type"] = type.value;
    if (Object.keys(own).length) table.quirks = own;
    checkName("providers", table.name, old);
    await ask(path("providers", old ? old.name : table.name), "PUT", { hash, table });
    return `Provider ${table.name} is saved.${old ? "" : " Test it, then give it a model."}`;
  };
  const typeField = labelled("Type", type,
    "Not listed? Choose the one whose API it speaks (openai, mostly), and give its base URL.");
  typeField.dataset.field = "type";
  const form = formOf([grid(typeField, first.nodes), to, folded("More settings", grid(rest.nodes)),
    folded("Quirks: how it differs from others of its format (a preset knows)", grid(quirks.nodes))], save,
  { extra: old && removeButton("providers", old, hash) });
  openDialog(old ? `Provider ${old.name}` : "Add a provider", form);
}
/* A box for a model's name at a provider, and what fills its list with the names that the provider gives. */
function modelBox(value) {
  const list = el("datalist", { id: `found${++lastId}` }), input = textBox(value, { list: list.id });
  const fetchNames = async (provider) => {
    const { models } = await ask(`${path("providers", provider)}/models`);
    refill(list, options(models));
    return models;
  };
  return { input, list, fetchNames };
}
function testDialog(name) {
  const result = el("div", { "aria-live": "polite" }), model = modelBox("");
  const test = async () => {
    refill(result, "Asking …");
    const told = await ask(`${path("providers", name)}/test`, "POST", { model: model.input.value.trim() });
    refill(result, el("p", badge(told.ok ? "ok" : "bad", told.ok ? "works" : `failed with ${told.status}`),
      ` ${seconds(told.ms)}, model ${told.model || "none: fetch the list and choose one"}`),
    el("pre", told.text || told.error || "an empty answer"));
    await showTab(); /* the list behind tells the new state */
  };
  const fetchNames = async () => {
    const names = await model.fetchNames(name);
    refill(result, el("p", count(names.length, "model")), el("pre", { tabindex: 0 }, names.join("\n")));
  };
  const run = (work) => () => work().catch((error) => refill(result, el("p", { class: "error" }, error.message)));
  openDialog(`Test ${name}`, remark("Sends one tiny real request over the way all requests go."),
    labelled("Model", model.input, "empty: one that the config uses, or the preset's"), model.list,
    el("div", { class: "row" }, button("Test", run(test), { class: "main" }),
      button("Fetch the model list", run(fetchNames))), result);
}

/* Models */
const priceWord = (price) => (price ? `$${price.input ?? "–"} / $${price.output ?? "–"}` : "built-in table");
const namesList = () => el("datalist", { id: "names" }, options(S.names));
function modelsView() {
  const [first] = rowsOf("models"), providers = rowsOf("providers");
  const firstWord = (m) => (m === first && !S.routes.default ? "default, as the first" : "–");
  const columns = [textOf("Ask for", "name", "text mono"),
    ["", (m) => rowButton("Edit", m.name, () => modelDialog(m)), "act"],
    ["Goes to", (m) => m.mappings?.map((t) => `${t.provider}/${t.actual_model}`).join(", then ") || "nothing yet", "text"],
    ["Claude Code sees", seenAs, "text mono"],
    ["Used by", (m) => routesOf(m.name).join(", ") || firstWord(m), "text"],
    ["Price, in / out", (m) => (S.unpriced.includes(m.name) ? badge("warn", "not known") : priceWord(m.price)), "nowrap"],
    CONTEXT];
  const listed = providers.flatMap((p) => (p.models || []).map((name) => ({ name, provider: p.name })));
  return [card("Models", button("Add a model", () => modelDialog(null), { class: "main", disabled: !providers.length }),
    table("Models", columns, rowsOf("models"), providers.length
      ? "None yet. A model is a name of your own for one or more models of providers, tried in order."
      : "Add a provider first; then give its models names here.")),
  listed.length > 0 && card("Listed by providers", null, table("Listed models",
    [textOf("Ask for", "name", "text mono"), textOf("Provider", "provider")], listed, ""))];
}
function mappingItem(row) {
  const names = rowsOf("providers").map((p) => p.name);
  const provider = selectBox(names, row.provider || names.at(-1)); /* the last was added last */
  const model = modelBox(row.actual_model || "");
  const fetchNames = async () => {
    const found = await model.fetchNames(provider.value);
    model.input.focus();
    tell(`${count(found.length, "model")}: type, or press the down arrow, to choose one.`);
  };
  const own = controls(S.fields.mappings.filter((f) => ["price", "context"].includes(f.name)), row);
  const node = el("div", el("div", { class: "row" }, labelled("Provider", provider),
    labelled("Model at the provider", model.input), model.list, button("Fetch list", fetchNames)),
  el("details", { open: Boolean(row.price) }, el("summary", "Price and context of this target alone"),
    grid(own.nodes)));
  return { node, read: () => ({ ...own.read(), provider: provider.value, actual_model: model.input.value.trim() }) };
}
function modelDialog(old) {
  const row = old || { name: "", mappings: [{}] }, hash = S.config_hash;
  const made = controls(S.fields.models.filter((f) => f.name !== "mappings"), row);
  const order = (t) => t.priority ?? 1;
  const targets = sequence([...(row.mappings || [])].sort((a, b) => order(a) - order(b)), mappingItem, "target");
  const save = async () => {
    const rows = targets.read(), isOrdered = rows.every((t, n) => !n || order(rows[n - 1]) <= order(t));
    const table = { ...made.read(), mappings: isOrdered ? rows : rows.map((t, n) => ({ ...t, priority: n + 1 })) };
    checkName("models", table.name, old);
    if (!table.mappings.length) throw new Failure(400, "Add a target: without one nobody serves the model.");
    if (table.mappings.some((t) => !t.actual_model)) throw new Failure(400, "Each target needs a model at the provider.");
    await ask(path("models", old ? old.name : table.name), "PUT", { hash, table });
    return `Model ${table.name} is saved.${old ? "" : " Under Router you choose what goes to it."}`;
  };
  const [name, ...others] = made.nodes;
  const form = formOf([grid(name), el("h3", "Targets, the first tried first"),
    remark("A target is a provider, and the name that the model has there."), targets.node,
    el("h3", "Facts"), grid(others)], save, { extra: old && removeButton("models", old, hash) });
  openDialog(old ? `Model ${old.name}` : "Add a model", form);
}

/* Router */
function matchWord(pattern, sample) {
  if (!pattern) return badge("", "matches nothing");
  const [, flags, rest] = /^(?:\(\?([ims]+)\))?([^]*)$/.exec(pattern); /* Python's way to write flags */
  try {
    return new RegExp(rest, flags).test(sample) ? badge("ok", "matches") : badge("", "does not match");
  } catch { return badge("warn", "Python's own syntax, or wrong: saving tells"); }
}
function ruleItem(row) {
  const made = controls(S.fields.rules, row);
  return { node: grid(made.nodes), read: made.read };
}
async function routerView() {
  const row = tableOf("router");
  let hash = S.config_hash;
  const fields = S.fields.router.filter((f) => f.name !== "rules")
    .map((f) => (f.name in S.routes ? { ...f, list: "names" } : f));
  const made = controls(fields, row), rules = sequence(row.rules || [], ruleItem, "rule");
  const sample = textBox("claude-haiku-4-5"), words = textBox("use fast: rename this"), results = el("div");
  const attempt = () => {
    const line = (title, name) => el("p", `${title} (${name}): `, matchWord(made.input(name).value, sample.value));
    refill(results, line("Claude's own name", "auto_map_regex"), line("Background name", "background_regex"),
      rules.read().map((rule, n) => el("p", `Rule ${n + 1}, `, el("code", rule.pattern || "empty"), " ",
        matchWord(rule.pattern, words.value))));
  };
  const save = async () => {
    const { rules: _, ...table } = made.read(), kept = rules.read();
    if (kept.some((rule) => !rule.pattern || !rule.model)) throw new Failure(400, "Each rule needs a pattern and a model.");
    ({ hash } = await ask(`${ROOT}/router`, "PUT", { hash, table: kept.length ? { ...table, rules: kept } : table }));
    return "The router is saved.";
  };
  const form = formOf([namesList(), grid(made.nodes), el("h3", "Prompt rules, the first match wins"), rules.node,
    el("h3", "Try the patterns"),
    el("div", { class: "row" }, labelled("A model name", sample), labelled("A user's words", words)), results], save);
  form.addEventListener("input", attempt);
  attempt();
  return [card("Router", null, remark("Which model a request goes to: the first rule that applies and has a model wins. ",
    "An empty one is passed over."), form), await explainCard()];
}
const sampleBody = (model, text) => ({ model, max_tokens: 1024, messages: [{ role: "user", content: text }] });
async function explained(body, headers) {
  const told = await ask(`${ROOT}/explain`, "POST", { body, headers });
  const columns = [["Tried", (t) => told.targets.indexOf(t) + 1, "num"], textOf("Provider", "provider"),
    textOf("Model", "model", "text mono"), numberOf("At most", "ceiling_microusd", usd)];
  return [el("p", badge("ok", told.reason), ` goes to ${told.model}; ${count(told.tokens, "token")} counted`,
    told.factor !== 1 && ` (by ${told.factor.toFixed(2)}, as its answers there have told)`), explanation(told.trail),
  el("h3", "Targets, and the most it can cost there"), table("Targets", columns, told.targets, "No targets.")];
}
async function explainCard() {
  const body = textArea(8, JSON.stringify(sampleBody("claude-sonnet-4-5", "Hello"), null, 2));
  const [{ requests }, { held }] = await Promise.all([ask(`${ROOT}/requests?limit=50`), ask(`${ROOT}/inspect`)]);
  const isHeld = (row) => held.some((r) => r.id === row.request_id);
  const words = (row) => `${when(row.time).textContent} ${row.asked} → ${target(row)}`;
  const recent = selectBox([["", "none: the request below"], ...requests.map((row) => [row.request_id,
    isHeld(row) ? `${words(row)} (held whole)` : words(row)])]);
  const result = el("div");
  let headers = {};
  const show = async () => {
    const row = requests.find((r) => r.request_id === recent.value);
    headers = {};
    if (!row) refill(result);
    else if (!isHeld(row)) refill(result, el("h3", "As it went"), explanation(row.trail), costTable(row));
    else {
      const held = await ask(path("inspect", row.request_id));
      headers = held.client_headers;
      body.value = JSON.stringify(held.client_request, null, 2);
      await run();
    }
  };
  recent.addEventListener("change", () => show().catch(tellError));
  const run = async () => refill(result, el("h3", "On the rules as they are now"),
    await explained(jsonIn(body, "Not JSON: "), headers));
  const form = formOf([labelled("A recent request", recent,
    "one that Inspect holds whole is explained anew; of any other you see what was noted when it went"),
  labelled("Messages request (JSON)", body)], run, { label: "Explain", keeps: false });
  return card("Explain a request", null, remark("Shows each rule that is tried. Nothing is sent."), form, result);
}

/* Users */
const DOLLARS = { min: 0, max: 1e9 };
function dollarsIn(input) {
  const dollars = numberIn(input);
  return dollars === undefined ? null : Math.round(dollars * 1e6);
}
function budgetBoxes(budgets) {
  const made = PERIODS.map((period) => {
    const name = `${period}_microusd`, box = numberBox(isNothing(budgets[name]) ? "" : budgets[name] / 1e6, DOLLARS);
    return { node: labelled(`Budget a ${period}, dollars`, box, "empty: none"), read: () => [name, dollarsIn(box)] };
  });
  return { nodes: made.map(({ node }) => node), read: () => Object.fromEntries(made.map(({ read }) => read())) };
}
async function usersView() {
  const { users } = await ask(`${ROOT}/users`);
  const columns = [textOf("Name", "name"),
    ["", (u) => rowButton("Open", u.name, () => userDialog(u)), "act"],
    ["State", (u) => (u.disabled ? badge("warn", "disabled") : badge("ok", "active")), "nowrap"],
    ["Balance", (u) => (isFree(u) ? "–" : usd(u.balance_microusd)), "num"], numberOf("Set aside", "held_microusd", usd),
    numberOf("Today", "spent_today_microusd", usd), numberOf("This week", "spent_week_microusd", usd),
    numberOf("This month", "spent_month_microusd", usd),
    ["Budgets", (u) => budgetsOf(u).map(([period, , limit]) => `${usd(limit)} a ${period}`).join(", ") || "–", "text"]];
  return card("Users", button("Add a user", addUserDialog, { class: "main" }),
    !tableOf("server").require_key && remark(
      "Who gives no key is the user local, and never refused. Require key, under Config, changes that."),
    !tableOf("credits").enforce && remark(
      "Credit and budgets are counted, but refuse nobody yet. Enforce, under Config, changes that."),
    table("Users", columns, users,
      "No users. On this computer alone none is needed; on a network each person gets a key."));
}
function addUserDialog() {
  const name = textBox(""), credit = numberBox("", DOLLARS), note = textBox(""), budgets = budgetBoxes({});
  const save = async () => {
    const user = { name: name.value.trim(), budgets: budgets.read(), note: note.value,
      credit_microusd: dollarsIn(credit) };
    const told = await ask(`${ROOT}/users`, "POST", user);
    keyDialog(told.name, told.key);
    return `User ${told.name} is made.`;
  };
  const nameField = labelled("Name", name, "letters, digits and . _ @ -");
  nameField.dataset.field = "name";
  openDialog("Add a user", formOf(grid(nameField, labelled("Credit, dollars", credit, "empty: what [credits] says"),
    labelled("Note", note), budgets.nodes), save, { label: "Add" }));
}
function keyDialog(name, key) {
  openDialog(`Key of ${name}`, el("p",
    "This is shown once. Give it to them now: only a hash of it is kept. "
    + "With it they sign in on the dashboard, which says how to point Claude Code here."), copyable(key));
}
async function userDialog(user) {
  const place = path("users", user.name), amount = numberBox("", { min: -1e9, max: 1e9 }), note = textBox(""),
    budgets = budgetBoxes(user.budgets);
  const key = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());
  const send = async (words, path, method, body) => {
    /* The dialog closes with a save, and with it the other form. */
    const isKept = isDirty() && !confirm("Leave without saving what you changed in the other form?");
    if (isKept) throw new Failure(0, "Nothing is saved.");
    const told = await ask(path, method, body);
    if (told.key) keyDialog(user.name, told.key);
    return words;
  };
  const credit = () => {
    const body = { amount_microusd: dollarsIn(amount), note: note.value, key };
    if (!body.amount_microusd) throw new Failure(400, "Give an amount of dollars; below zero takes back.");
    return send(`Credit of ${user.name} is changed.`, `${place}/credit`, "POST", body);
  };
  const setBudgets = () => send(`Budgets of ${user.name} are saved.`, place, "PATCH", { budgets: budgets.read() });
  const toggle = () => send(`${user.name} is changed.`, place, "PATCH", { disabled: !user.disabled });
  const rotate = () => confirm(`Make a new key for ${user.name}? The old one stops working at once.`)
    && send("The key is new.", `${place}/key`, "POST");
  const ledger = el("div");
  openDialog(`User ${user.name}`,
    el("p", `Balance ${usd(user.balance_microusd)}, ${usd(user.held_microusd)} of it set aside for running requests`),
    formOf(grid(labelled("Amount, dollars", amount, "below zero takes back"), labelled("Note", note)), credit,
      { label: "Change credit" }),
    el("h3", "Budgets"), user.name === "local" && remark(
      "The user local is never refused: these show how much is used, and limit nothing."), budgetBars(user),
    formOf(grid(budgets.nodes), setBudgets, { label: "Save budgets" }),
    el("div", { class: "row" }, button("New key", rotate),
      button(user.disabled ? "Enable" : "Disable", toggle, { class: "danger" })),
    el("h3", "Transactions"), ledger);
  try {
    const { transactions } = await ask(`${place}/transactions?limit=100`);
    fill(ledger, ledgerTable(transactions, "Nothing yet."));
  } catch (error) { tellError(error); }
}

/* Billing */
async function billingView() {
  const month = new Date().toISOString().slice(0, 8);
  const by = selectBox(["user", "model", "provider", "day", "session", "month"], "user");
  const since = el("input", { type: "date", value: `${month}01` }), until = el("input", { type: "date" });
  const other = textBox("", { list: "names" }), result = el("div");
  const query = () => new URLSearchParams({ by: by.value, since: since.value, until: until.value,
    as_if: other.value.trim() });
  const draw = async () => {
    const asked = String(query()), { report } = await ask(`${ROOT}/report?${asked}`);
    if (asked !== String(query())) return; /* the answer to what the form says now comes, too */
    const columns = [...usageColumns(capital(by.value)), numberOf("No price", "unpriced"),
      numberOf("Cost", "cost_microusd", usd), numberOf("Markup", "markup_microusd", usd),
      numberOf("Charge", "charge_microusd", usd)];
    if (other.value.trim()) columns.push(numberOf(`As ${other.value.trim()}`, "as_if_microusd", usd));
    refill(result, table("Report", columns, report, "No requests in that time."), report.length > 0 && remark(
      `In all ${count(sum(report, "requests"), "request")}, cost ${usd(sum(report, "cost_microusd"))}, `,
      `charged ${usd(sum(report, "charge_microusd"))}.`));
  };
  const csv = (label, kind, name) => button(label, () => download(`${ROOT}/${kind}?format=csv&${query()}`, name));
  const form = formOf([namesList(), grid(labelled("By", by), labelled("From", since),
    labelled("Until", until, "that day not included; days are UTC"),
    labelled("As if on model", other, "what the same tokens would have cost there"))], draw,
  { label: "Show", keeps: false, extra: [csv("Report as CSV", "report", "ccmux-report.csv"),
    csv("All rows as CSV", "export", "ccmux-usage.csv")] });
  form.addEventListener("change", () => form.requestSubmit());
  await draw();
  return card("Usage and billing", null, form, result);
}

/* Try */
function tryView(left) {
  const model = textBox(S.names[0] || "claude-sonnet-4-5", { list: "names" }), limit = numberBox(512, { min: 1 });
  const prompt = el("textarea", { rows: 4, value: "Say hello in one sentence." });
  const output = el("pre", { tabindex: 0, role: "region", "aria-label": "Answer" }), raw = el("pre", { tabindex: 0 }),
    end = el("div", { "aria-live": "polite" });
  let running = new AbortController();
  const showEnd = (row) => refill(end, el("p", statusBadge(row), ` ${target(row)} because of ${row.route}`),
    remark(`${whole(row.input_tokens)} in, ${whole(row.output_tokens)} out, ${chargeOf(row)}, `,
      `first token after ${seconds(row.first_token_ms)}, ${seconds(row.duration_ms)} in all`),
    folded("Why it went there", explanation(row.trail)));
  const send = async () => {
    refill(end);
    output.textContent = raw.textContent = "";
    running = new AbortController();
    const body = { ...sampleBody(model.value.trim(), prompt.value), max_tokens: numberIn(limit) ?? 512 };
    try {
      const answer = await call(`${ROOT}/try`, "POST", { body }, running.signal);
      for await (const [event, text] of eventsOf(answer)) {
        const data = JSON.parse(text), delta = data.delta || {};
        raw.append(`event: ${event}\ndata: ${text}\n\n`); /* textContent += copies all before it, each time */
        output.append(delta.text || delta.thinking || delta.partial_json || "");
        if (data.type === "error") throw new Failure(500, data.error.message);
        if (event === "ccmux") showEnd(data);
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      refill(end, el("p", "Stopped."));
    }
  };
  const stop = () => running.abort();
  left.addEventListener("abort", stop);
  const form = formOf([namesList(), el("div", { class: "row" }, labelled("Model asked for", model),
    labelled("Most output tokens", limit)), labelled("Prompt", prompt)], send,
  { label: "Send", keeps: false, extra: button("Stop", stop) });
  return card("Send a real request", null,
    remark("It goes the way all requests go, and it costs what they cost."),
    form, output, end, folded("Raw events", raw));
}

/* Inspect */
async function inspectView(left) {
  const list = el("div"), detail = el("div"), state = el("div", { class: "row" });
  const pretty = (value) => {
    try { return JSON.stringify(typeof value === "string" ? JSON.parse(value) : value, null, 2); } catch { return value; }
  };
  const tries = (text) => text.split("\n\n").map(pretty).join("\n\n");
  const show = async (id) => {
    const held = await ask(path("inspect", id));
    const file = new Blob([JSON.stringify(held, null, 2)], { type: "application/json" });
    const headers = Object.entries(held.client_headers).map(([name, value]) => `${name}: ${value}\n`).join("");
    const pane = (title, text) => el("div", el("h3", title), el("pre", { tabindex: 0 }, text || "nothing"));
    refill(detail, card(`Request ${id}`, button("Download JSON", () => download(file, `ccmux-${id}.json`)),
      el("div", { class: "two" }, pane("What the client sent", `${headers}\n${pretty(held.client_request)}`.trim()),
        pane("What the provider got", tries(held.upstream_request)), pane("What it answered", tries(held.upstream_answer)),
        pane("Events for the client", pretty(held.events)))));
  };
  const draw = (told) => {
    const minutes = Math.ceil(told.on_for_s / 60);
    refill(state, minutes ? [badge("ok", `on for ${minutes} min more`),
      button("Switch off and forget", () => refresh("PUT", { minutes: 0 }))] : [badge("", "off"),
      button("Keep requests for 15 minutes", () => refresh("PUT", { minutes: 15 }), { class: "main" })]);
    redraw(list, table("Held requests", [TIME, ["", (r) => rowButton("Show", r.id, () => show(r.id)), "act"],
      textOf("Asked for", "asked"), textOf("Why", "route", "nowrap"), textOf("Answered by", "target"),
      ["Status", (r) => r.status ?? "running", "nowrap"]], told.held,
    minutes ? "Waiting for requests." : "Nothing is held. Switch it on, then repeat what went wrong."));
  };
  const refresh = async (...put) => draw(await ask(`${ROOT}/inspect`, ...put));
  await refresh();
  poll(refresh, 3000, left);
  return [card("Inspect", state, remark("Keeps the last 20 requests whole, in memory only: what the client sent, ",
    "what the provider got and answered, and what was made of it for the client. Keys are never in it."), list), detail];
}

/* Config */
async function configView() {
  const [config, { backups }] = await Promise.all([ask(`${ROOT}/config`), ask(`${ROOT}/backups`)]);
  const text = textArea(24, config.text);
  const save = async () => {
    config.hash = (await ask(`${ROOT}/config`, "PUT", { text: text.value, hash: config.hash })).hash;
    return "The config is saved and in use.";
  };
  const read = { hash: S.config_hash };
  return [S.config_error && card("The file is broken; the config before it is in use", null, el("pre", S.config_error)),
    settingsCard("credits", read), settingsCard("server", read),
    card("The whole file", S.path || "not written yet", formOf(labelled("config.toml", text,
      "[kept-…] stands for a key that is not shown; it stays as it is."), save, { label: "Check and save" })),
    card("Backups", null, table("Backups", [textOf("File", "name", "text mono"),
      ["", (b) => rowButton("Look", `at ${b.name}`, () => backupDialog(b.name, config.hash)), "act"],
      ["Written", (b) => when(b.time), "nowrap"], numberOf("Bytes", "bytes")],
    backups, "None yet: a save keeps the file before it."))];
}
async function backupDialog(name, hash) {
  const { text, changes } = await ask(path("backups", name));
  const restore = async () => {
    await ask(path("backups", name), "POST", { hash });
    return `${name} is the config again.`;
  };
  openDialog(`Backup ${name}`, el("h3", "What restoring it changes"),
    el("pre", { tabindex: 0 }, changes || "Nothing: it says what the config says now."),
    folded("The whole backup", el("pre", { tabindex: 0 }, text)),
    formOf(remark("The config as it is now becomes the newest backup."), restore, { label: "Restore", keeps: false }));
}
/* Both tables were read as of read.hash, and a save of one leaves the other as it was read. */
function settingsCard(root, read) {
  const made = controls(S.fields[root], tableOf(root)), title = capital(root);
  const save = async () => {
    const table = made.read(), token = table.admin_token;
    read.hash = (await ask(`${ROOT}/${root}`, "PUT", { hash: read.hash, table })).hash;
    if (token && !token.includes("$")) SESSION.setItem(SECRET, token); /* this tab stays signed in */
    return `${title}: saved.`;
  };
  const atStart = root === "server" && remark("Host, port, database and max connections change at the next start.");
  return card(title, null, formOf([atStart, grid(made.nodes)], save));
}

/* Start */
start();
if (IS_ADMIN) addEventListener("hashchange", () => (location.hash.startsWith("#token=") ? start() : showTab()));
else {
  $("key").addEventListener("click", () => signIn());
  poll(async () => { if (document.querySelector(".tiles")) await start(); }, 30000);
}
"""

PAGE_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title><link rel="icon" href="data:,"><style>@STYLE@</style></head>
<body data-page="@PAGE@"><header><h1>@TITLE@</h1>@NAV@
<span class="grow"></span>@OTHER@<button type="button" id="theme">Dark</button></header>
<main id="main" tabindex="-1"><p class="empty">Loading …</p>
<noscript><p>This page needs JavaScript; the numbers are also at /api/usage, and in `ccmux.py report`.</p></noscript></main>
<footer><span id="version"></span></footer><div id="status" role="status"></div>
<script>@SCRIPT@</script></body></html>
"""


def page_html(page: str, title: str, other: str) -> str:
    nav = '<nav id="tabs" aria-label="Pages"></nav>' if page == "admin" else ""
    parts = {"TITLE": title, "STYLE": STYLE, "PAGE": page, "NAV": nav, "OTHER": other, "SCRIPT": SCRIPT}
    return re.sub(r"@([A-Z]+)@", lambda m: parts[m[1]], PAGE_HTML)


DASHBOARD = page_html(
    "dashboard", "ccmux", '<a href="/admin">Admin</a><button type="button" id="key">Use a key</button>'
)
ADMIN = page_html("admin", "ccmux admin", '<a href="/">Dashboard</a>')


@functools.cache
def page_policy() -> str:
    """The Content-Security-Policy of both pages: this style and this script by hash, no other source at all."""
    style, script = (base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (STYLE, SCRIPT))
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; "
        "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


async def get_page(html: str, request: web.Request) -> web.StreamResponse:
    headers = {
        "Content-Security-Policy": page_policy(),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return web.Response(text=html, content_type="text/html", charset="utf-8", headers=headers)


def page_routes() -> list[web.RouteDef]:
    pages = {"/": DASHBOARD, "/admin": ADMIN}
    return [web.get(path, functools.partial(get_page, html)) for path, html in pages.items()]


# ----------------------------------------------------------------------------------------------------------
# App and command line
# ----------------------------------------------------------------------------------------------------------
# `main` parses the command line; each sub-command is one function that returns its exit status. `serving` is the
# server from its start to its end, for `serve` and `code`; `make_app` is what it serves, also for tests.


def make_app(state: State) -> web.Application:
    """The server's routes and middleware around a State."""
    app = web.Application(middlewares=[web.middleware(answer_errors)], client_max_size=MAX_BODY)
    app[state_key()] = state
    # The last, because aiohttp's own would judge Expect by itself.
    rest = web.RouteDef("*", "/{path:.*}", no_such_route, {})
    for route in (*api_routes(), *admin_routes(), *page_routes(), rest):
        options = {**route.kwargs, "expect_handler": expect_continue}
        app.router.add_routes([web.RouteDef(route.method, route.path, route.handler, options)])
    return app


async def make_state(
    config: Config, store: Store, admin_token: str = "", *, counts_apart: bool = False
) -> State:
    """A State with its upstream sessions; call inside a running loop, and `close_state` at the end.

    `counts_apart`: tokens are counted in a process of its own, so that the event loop never waits for it.
    """
    metrics = Metrics()
    relay = Relay(upstream_session(), upstream_session(force_close=True), metrics)
    vocabulary = Vocabulary(remote_encoding if counts_apart else load_encoding)
    counter = TokenCounter(vocabulary.get, PATIENCE if counts_apart else None)
    relay.count_output = counter.count_text
    token = admin_token or config.server.admin_token
    return State(config, store, relay, counter, metrics, vocabulary, token)


async def close_state(state: State) -> None:
    state.vocabulary.close()
    await state.relay.close()


def upstream_session(force_close: bool = False) -> aiohttp.ClientSession:
    """A client session for upstreams: no cookies, no limit but ccmux's own, the environment's proxies."""
    connector = upstream_connector()(limit=0, force_close=force_close, socket_factory=open_socket)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=65536,
        max_field_size=2**16,  # of a header: a Content-Security-Policy may be longer than aiohttp's 8 KB
        skip_auto_headers=("User-Agent",),
    )


@functools.cache
def upstream_connector() -> type[aiohttp.TCPConnector]:
    """A connector that hands out no connection on which the upstream has said something unasked: aiohttp (3.14) would
    take that for the answer to the next request. Its connections keep `Chunks`, and join them for aiohttp.

    A function, because --help works before aiohttp is installed.
    """

    class Wire(aiohttp.client_proto.ResponseHandler):
        chunks = Chunks(None)  # of no response

        def set_response_params(self, **options: Any) -> None:
            self.chunks = Chunks()  # before the parser, which may get some of the response at once
            super().set_response_params(**options)

        def data_received(self, data: bytes) -> None:
            super().data_received(self.chunks.joined(data))

    class Connector(aiohttp.TCPConnector):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            handler: type[aiohttp.client_proto.ResponseHandler] = Wire
            self._factory = functools.partial(handler, loop=self._loop)

        async def connect(self, req: Any, traces: Any, timeout: Any) -> aiohttp.connector.Connection:  # noqa: ASYNC109
            if BARE and (req.is_ssl() or req.proxy):
                await asyncio.to_thread(read_certificates)
            connection = await super().connect(req, traces, timeout)
            if connection.protocol and connection.protocol.should_close:
                connection.close()
                raise aiohttp.ServerDisconnectedError
            return connection

    return Connector


def open_socket(address: Any) -> socket.socket:
    """A socket for an address that a name was resolved to; link-local ones (cloud metadata) are refused."""
    family, kind, protocol, _, place = address
    if is_link_local(str(place[0])):
        raise OSError(errno.EACCES, "ccmux does not call link-local addresses")
    if opened := OPENED.get(None):
        opened.yes = True
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made


# After 30 s of silence the peer is asked up to three times whether it is there: so no router forgets the connection
# while an answer is waited for, and the wait ends where the network is gone. TCP_KEEPALIVE is a Mac's TCP_KEEPIDLE.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


# Files and start.


def read_config(given: str) -> Config:
    """The config file, or the config that the environment amounts to; ConfigError in one line."""
    path = config_path(given)
    if path is None:
        return load_config(config_of_environment(os.environ, ollama_models()), os.environ)
    try:
        return load_config(toml_text(path), os.environ, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except ConfigError as error:
        is_ours = given or path != Path("config.toml") or is_own_config(path)
        hint = "" if is_ours else "; if it is another program's file, name ccmux's with --config"
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{path}: ')}{hint}") from None


def config_of_environment(env: Mapping[str, str], ollama: list[str]) -> str:
    """A config for a start without a file: a provider for each key that is set, Ollama where it answers, else demo.

    The first one takes the requests: Anthropic and the demo by the names Claude Code asks for, Ollama by its first
    model, others by the model their preset names, if it names one.
    """
    presets: dict[str, str] = {}  # each key's variable, and the first preset that it is for
    for name, row in PRESETS.items():
        presets.setdefault(row["api_key"], name)
    providers: list[Json] = [
        {"name": name, "type": name, "api_key": key} for key, name in presets.items() if has_key(env, key)
    ]
    if ollama:
        providers.append({"name": "ollama", "type": "ollama", "base_url": ollama_url(env), "models": ollama})
    if not providers:
        providers.append({"name": "demo", "type": "demo"})
    first = providers[0]["name"]
    model = ollama[0] if first == "ollama" else PRESETS[first]["default"]
    tables = [emit_table("providers", row, "array") for row in providers]
    if model and first not in ("anthropic", "demo"):
        tables.insert(0, emit_table("router", {"default": f"{first}/{model}"}))
    return "\n".join(tables)


def has_key(env: Mapping[str, str], reference: str) -> bool:
    """Whether a preset's `$NAME` is set. Beside another ANTHROPIC_BASE_URL, an ANTHROPIC_API_KEY is not Anthropic's."""
    name = reference.removeprefix("$")
    base = env.get("ANTHROPIC_BASE_URL") or "https://api.anthropic.com"
    return bool(env.get(name)) and (name != "ANTHROPIC_API_KEY" or is_anthropics(base))


def ollama_url(env: Mapping[str, str]) -> str:
    """Where $OLLAMA_HOST says Ollama is, as its own client reads it."""
    host = env.get("OLLAMA_HOST") or "127.0.0.1"
    parts = urllib.parse.urlsplit(host if "://" in host else f"http://{host}")
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1"}.get(parts.hostname or "", parts.hostname)  # noqa: S104
    port = parts.port or ({"http": 80, "https": 443}.get(parts.scheme) if "://" in host else 11434)
    return f"{parts.scheme}://{f'[{name}]' if ':' in str(name) else name}:{port}{parts.path.rstrip('/')}"


def ollama_models() -> list[str]:
    """The models of a local Ollama that can chat; [] where none answers within a moment."""
    try:
        with open_directly(f"{ollama_url(os.environ)}/api/tags", 0.3) as answer:
            tags = as_object(json.load(answer))
    except (OSError, ValueError, http.client.HTTPException):
        return []
    names = [str(as_object(row).get("name") or "") for row in as_list(tags.get("models"))]
    return [name for name in names if name and "embed" not in name]


def open_directly(url: str, timeout: float) -> Any:
    """The answer of a server near by, asked through no proxy; OSError or HTTPException."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout)


def serve(args: argparse.Namespace) -> int:
    """Runs the server until a signal ends it."""
    asyncio.run(serve_until_stopped(with_overrides(read_config(args.config), args), args))
    return 0


def with_overrides(config: Config, args: argparse.Namespace | None) -> Config:
    """The config with what the command line sets instead."""
    given = {k: v for k in ("host", "port", "log_level") if (v := getattr(args, k, None)) is not None}
    return dataclasses.replace(config, server=dataclasses.replace(config.server, **given))


def set_up_logging(level: str, path: Path | None) -> None:
    handler = logging.FileHandler(path, encoding="utf-8") if path else logging.StreamHandler()
    line = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(handlers=[handler], format=line, level=level.upper(), force=True)
    # A log file that cannot be written is not told on the terminal: it is Claude Code's.
    logging.raiseExceptions = path is None
    for name in ("aiohttp.access", "aiohttp.server", "aiohttp.web", "aiohttp.client", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they echo header text, and a header may be a key


async def serve_until_stopped(config: Config, args: argparse.Namespace) -> None:
    async with serving(config, args) as (state, port):
        stop = stop_on_signals()  # before the start-up text: whoever has read it may send one
        print(start_text(config, port, state.admin_token), flush=True)
        await stop.wait()


@contextlib.asynccontextmanager
async def serving(
    config: Config, args: argparse.Namespace, log_file: Path | None = None
) -> AsyncIterator[tuple[State, int]]:
    """A server that runs, by its state and its port; at the end it drains."""
    check_binding(config)
    set_up_logging(config.server.log_level, log_file)
    for warning in config.warnings:
        log.warning("%s", warning)
    store = Store(database_path(config))
    store.open_server()
    state = await make_state(config, store, admin_token_of(config), counts_apart=True)
    state.counter.restore(store.load_calibration())
    runner = runner_of(state)
    await runner.setup()
    try:
        server = await listen(runner, config)
        # No daemon: it may not be in OpenSSL when Python ends.
        threading.Thread(target=read_certificates, name="ccmux-certificates").start()
        asyncio.get_running_loop().call_later(1, calm_collector)  # not while the first request waits
        works = (watch_config(state, args), keep_calibration(state), fetch_vocabularies(state))
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield state, server.sockets[0].getsockname()[1]
        finally:
            for task in tasks:
                task.cancel()
        await drain(state, server)
    finally:
        await runner.cleanup()
        await close_state(state)
        save_calibration(store, state.counter.export())
        store.close()


def runner_of(state: State) -> web.AppRunner:
    """The web server, not yet set up. Without `handler_cancellation` a client that hangs up is not noticed in time."""
    return web.AppRunner(
        make_app(state),
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,  # else what aiohttp cannot unpack is refused before `guard` can say why
        keepalive_timeout=75,
        shutdown_timeout=0.1,
        max_line_size=16384,
        max_field_size=32768,
    )


def calm_collector() -> None:
    """Fewer garbage collections: a parsed request is thousands of objects that are freed by count, not by cycles.

    With Python's defaults a tenth of a request's CPU went there.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def listen(runner: web.AppRunner, config: Config) -> asyncio.Server:
    """The listening sockets; ConfigError where the port is taken."""
    host, port, cap = config.server.host, config.server.port, config.server.max_connections
    handlers = runner.server
    assert handlers is not None

    def protocol() -> asyncio.BaseProtocol:
        return handlers() if len(handlers.connections) < cap else TurnAway()

    try:
        return await asyncio.get_running_loop().create_server(protocol, host, port, backlog=cap)
    except OSError as error:
        hint = "is another ccmux running? --port sets another one"
        why = (error.strerror or str(error)).rpartition(": ")[2]
        raise ConfigError(f"cannot listen on {host}:{port} ({why}); {hint}") from None


class TurnAway(asyncio.Protocol):
    """A connection beyond max_connections: closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def keep_calibration(state: State) -> None:
    """Writes down once a minute what true usage has taught, so that a crash forgets little of it."""
    kept = state.counter.export()
    while True:
        await asyncio.sleep(60)
        state.vocabulary.forget_missing()
        learnt = state.counter.export()
        if learnt != kept:
            await asyncio.to_thread(save_calibration, state.store, learnt)
            kept = learnt


def save_calibration(store: Store, learnt: list[tuple[str, str, float, int]]) -> None:
    try:
        store.save_calibration(learnt)
    except sqlite3.Error as error:
        log.warning("what true usage has taught is not written down: %s", error)


async def fetch_vocabularies(state: State, url: str = VOCABULARY_URL) -> None:
    """Downloads a vocabulary that a count has missed: once now, then hourly until it is there."""
    warned = False
    while True:
        await asyncio.sleep(1)
        for name in state.vocabulary.missing():
            if not warned:
                log.warning(
                    "no tiktoken vocabulary %s here yet: token counts are estimates until it is downloaded",
                    name,
                )
                warned = True
            if await fetch_vocabulary(state.relay.session, f"{url}/{name}.tiktoken", name):
                state.vocabulary.forget_missing()
            else:
                await asyncio.sleep(3600)


class RemoteEncoding(Encoding):
    """An encoding in a process of its own, which ends when its stdin does: with this process at the latest.

    Making one holds Python's lock for 0.2 s, in which no stream would move; and its 84 MB are elsewhere.
    """

    def __init__(self, source: str) -> None:
        command, pipe = [sys.executable, __file__, COUNT_TEXTS, source], subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)  # noqa: S603
        assert self.child.stdin and self.child.stdout
        self.texts, self.answers = self.child.stdin, self.child.stdout
        self.name = self.ask(None)

    def lengths(self, texts: list[str]) -> Any:
        return self.ask(texts)

    def ask(self, texts: list[str] | None) -> Any:
        """Its answer to some texts (None: what it says at first); OSError where it is gone. One thread asks at a time."""
        try:
            if texts is not None:
                marshal.dump(texts, self.texts)
                self.texts.flush()
            return marshal.load(self.answers)  # noqa: S302
        except (OSError, EOFError, ValueError, TypeError) as fault:
            if not self.is_gone:
                log.warning("the process that counts tokens is gone: counts are estimates for a minute")
            self.close()
            raise ConnectionError(str(fault)) from fault

    def close(self) -> None:
        self.is_gone = True
        self.child.kill()
        self.child.wait()
        for pipe in (self.texts, self.answers):
            with contextlib.suppress(OSError):
                pipe.close()


def count_texts(source: str) -> int:
    """That process: says its encoding's name, then answers each list of texts with their lengths."""
    # Ctrl-C, and what ends a whole control group: the server still answers, and ends this by closing its stdin.
    for number in (signal.SIGINT, *ENDING_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    encoding = load_encoding(source)
    answer: Any = encoding and encoding.name
    with contextlib.suppress(EOFError, OSError):
        while encoding:
            marshal.dump(answer, sys.stdout.buffer)
            sys.stdout.flush()
            answer = encoding.lengths(marshal.load(sys.stdin.buffer))  # noqa: S302
    return 0


def remote_encoding(source: str) -> Encoding | None:
    """An encoding in a process of its own; None where there is no file for it."""
    return RemoteEncoding(source) if source.startswith("ctok-") or find_vocabulary(source) else None


async def fetch_vocabulary(session: aiohttp.ClientSession, url: str, name: str) -> bool:
    """One vocabulary file into ~/.ccmux/tiktoken, its hash checked; false where that fails within 10 s."""
    file_name, sha256 = VOCABULARIES[name]
    try:
        folder = ccmux_home() / "tiktoken"
        request = session.get(url, proxy=environment_proxy(url), allow_redirects=False)
        async with asyncio.timeout(10), request as answer:
            data = await answer.read()
        if answer.status != 200 or hashlib.sha256(data).hexdigest() != sha256:
            log.warning("the tiktoken vocabulary %s could not be downloaded: status %s", name, answer.status)
            return False
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = folder / f"{file_name}.{os.getpid()}.part"
        part.write_bytes(data)
        part.replace(folder / file_name)
    except UPSTREAM_FAULTS() as fault:
        log.warning("the tiktoken vocabulary %s could not be downloaded: %s", name, type(fault).__name__)
        return False
    return True


def stop_on_signals() -> asyncio.Event:
    """The event that SIGINT, SIGTERM and (but under nohup) a closed terminal set; the second of the first two ends at
    once.
    """
    stop, asked = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask(number: int) -> None:
        if asked.is_set():
            os._exit(128 + number)
        asked.set()
        stop.set()

    if sys.platform == "win32":  # whose loop takes no handlers; SIGBREAK is also a console that closes
        for number in (signal.SIGINT, signal.SIGBREAK):
            signal.signal(number, lambda number, _: loop.call_soon_threadsafe(ask, number))
        return stop
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask, number)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, stop.set)
    return stop


ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


async def drain(state: State, server: asyncio.Server) -> None:
    """Takes no more requests, gives the live ones their time, then ends them with an error event."""
    state.draining = True
    server.close()
    if state.posts:
        log.info("stopping: %d requests have up to %g s", len(state.posts), state.config.server.drain_timeout)
    await no_more_posts(state, state.config.server.drain_timeout)
    for request in state.posts.values():
        request.content.set_exception(shutting_down())  # to those whose body still arrives
    for call in list(state.calls.values()):
        call.stop()
    await no_more_posts(state, 2)


async def no_more_posts(state: State, seconds: float) -> None:
    """Returns when no request is in flight, or after so long."""
    end = time.monotonic() + seconds
    while state.posts and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def watch_config(state: State, args: argparse.Namespace) -> None:
    """Swaps the config in when its file has changed; a broken file keeps the old one and says so.

    Only a file that two looks find the same: many editors empty it and write it anew, and its first half may be a
    good config that lacks the models.
    """
    seen: tuple[str, tuple[int, ...]] = (state.config.path, ())  # it may have changed since it was read
    now = seen
    while True:
        await asyncio.sleep(0.25)
        # `init` may have made one since the start.
        if not state.config.path and (made := ccmux_home() / "config.toml").exists():
            state.config = dataclasses.replace(state.config, path=str(made))
        before, now = now, (state.config.path, stamp_of(Path(state.config.path)))
        if state.config.path and before == now != seen:
            seen = now
            reload_config(state, args)


def stamp_of(path: Path) -> tuple[int, ...]:
    """Differs once a file, or who may read it, has changed; () for no file, and for a pipe, which is read once."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino) if path.is_file() else ()


def reload_config(state: State, args: argparse.Namespace | None = None) -> None:
    """Reads the config file again. What only a start can change is said to need one."""
    old = state.config
    try:
        config = with_overrides(read_config(old.path), args)
        check_binding(config)
    except (ConfigError, OSError) as error:
        state.config_error = str(error)
        log.error("config not reloaded: %s", error)
        return
    state.config_error = ""
    if config.text_hash == old.text_hash:
        return
    adopt_config(state, config)
    for key in AT_START:
        if getattr(config.server, key) != getattr(old.server, key):
            log.warning("[server] %s has changed; it takes effect at the next start", key)
    for warning in config.warnings:
        log.warning("%s", warning)
    log.info("config reloaded from %s", config.path)


def start_text(config: Config, port: int, token: str) -> str:
    """What a newcomer needs to know, once, at the start."""
    url = client_url(config, port)
    is_unnamed = is_any_address(config.server.host) and not config.server.allowed_hosts
    return "\n".join([
        f"ccmux {__version__} at {url}",
        f"  config     {config.path or what_was_found(config)}",
        f"  dashboard  {url}/",
        f"  admin      {url}/admin#token={urllib.parse.quote(token, safe='')}",
        *["  others     put the name or address they use into allowed_hosts of [server]"] * is_unnamed,
        "  Claude Code, in another terminal (`ccmux.py code` does this, and sets what auto mode needs):",
        f"    {set_here({'ANTHROPIC_BASE_URL': url, 'ANTHROPIC_AUTH_TOKEN': key_to_print(config)})}",
        "    claude",
    ])  # fmt: skip


SHELL_HERE = "powershell" if sys.platform == "win32" else "bash"


def set_here(variables: Mapping[str, str]) -> str:
    """A line that sets variables in the shell that this machine most likely has."""
    if SHELL_HERE == "powershell":
        return "; ".join(f"$env:{name} = '{value}'" for name, value in variables.items())
    return " ".join(["export", *(f"{name}={shlex.quote(value)}" for name, value in variables.items())])


def key_to_print(config: Config) -> str:
    return "YOUR-CCMUX-KEY" if needs_key(config) else "ccmux-local"


def what_was_found(config: Config) -> str:
    names = [p.name for p in config.providers]
    hint = "`ccmux.py init` writes a config"
    if names == ["demo"]:
        return f"none; no key in the environment and no Ollama, so the built-in demo answers ({hint})"
    route = default_model(config, "the model asked for")
    return f"none; found {', '.join(names)}; Claude Code's requests go to {route} ({hint})"


def client_url(config: Config, port: int = 0) -> str:
    """The address that clients on this machine use; PORT stands for one that each start chooses."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.server.host, config.server.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{port or config.server.port or 'PORT'}"


# Commands. Each is a function of its parsed arguments that returns the exit status.


def print_found(word: str, text: str) -> None:
    """A line that a check found, its word (ok, note, FAILED) coloured where a person looks at a terminal."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # it may be closed
    plain = not is_terminal or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    color = {"ok": 32, "note": 33, "FAILED": 31}[word]
    print(f"{word:7} {text}" if plain else f"\033[{color}m{word:7}\033[0m {text}", flush=True)


def print_table(rows: Iterable[Iterable[str]], right: bool = False) -> None:
    """Columns as wide as they need; `right` aligns all but the first to the right."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = enumerate(zip(row, widths, strict=True))
        print("  ".join(c.rjust(w) if right and n else c.ljust(w) for n, (c, w) in cells).rstrip())


def model_command(args: argparse.Namespace) -> int:
    """Shows the providers, the models with their targets and prices, the routes."""
    config = read_config(args.config)
    print("providers")
    states = [p.problem or ("ok" if p.enabled else "disabled") for p in config.providers]
    rows = zip(config.providers, states, strict=True)
    print_table([(f"  {p.name}", p.type, state, provider_url(p)) for p, state in rows])
    print("models")
    found = [(name, target) for name in model_names(config) for target in resolve(config, name)]
    print_table(
        (f"  {n}", f"{t.provider}/{t.actual_model}", price_text(price_of(config, t, n))) for n, t in found
    )
    print("" if found else "  none of its own: Claude's names go to the default route")
    print("routes")
    default = default_model(config, "<the name asked for>")
    slots = {slot: getattr(config.router, slot) or "-" for slot in ROUTE_SLOTS} | {"default": default}
    print_table([(f"  {slot}", model) for slot, model in slots.items()])
    return 0


def provider_url(provider: Provider) -> str:
    url = provider.base_url and endpoint_url(provider.base_url, DIALECTS[provider.format])
    return without_logins(url) or "in this process"


def price_text(price: Price | None) -> str:
    return f"${price.input:f} in, ${price.output:f} out per million" if price else "price unknown"


def check_command(args: argparse.Namespace) -> int:
    """Says whether the config is sound; --live sends a request to each provider."""
    config = read_config(args.config)
    check_binding(config)
    for warning in config.warnings:
        print_found("note", warning)
    counts = f"providers: {len(config.providers)}, models: {len(config.models)}"
    print_found("ok", f"{config.path or 'no config file: the environment'}: {counts}")
    is_well = asyncio.run(check_live(config)) if args.live else True
    return 0 if is_well and not config.warnings else 1


async def check_live(config: Config) -> bool:
    """Whether all providers answer that are enabled."""
    store = Store(":memory:")
    state = await make_state(config, store)
    is_well = True
    try:
        for provider in config.providers:
            if not provider.enabled:
                print_found("note", f"{provider.name}  not tried: it has enabled = false")
                continue
            model = provider_model(config, provider)
            result = await test_provider(state, provider, model)
            is_well &= result["ok"]
            told = f"{provider.name}/{model or '-'}  {result['ms']} ms  {result['error']}"
            print_found("ok" if result["ok"] else "FAILED", told)
    finally:
        await close_state(state)
        store.close()
    return is_well


def explain_command(args: argparse.Namespace) -> int:
    """Shows where a request would go, rule by rule, and the most it can cost."""
    config = read_config(args.config)
    stdin = sys.stdin.buffer if sys.stdin else io.BytesIO()  # None: it is closed
    raw = stdin.read() if args.file == "-" else Path(args.file).read_bytes()
    try:
        counter = TokenCounter(Vocabulary().load)
        counter.restore(learnt_factors(config))
        told = asyncio.run(explain(config, strict_json(raw), {}, counter))
    except ApiError as error:
        raise ConfigError(f"{args.file}: {error.message}") from None
    print_table([(f"  {reason}", note) for reason, note in told["trail"]])
    print(f"model     {told['model']} (by {told['reason']})")
    for target in told["targets"]:
        ceiling = target["ceiling_microusd"]
        cost = "price unknown" if ceiling is None else f"at most {money(ceiling)}"
        print(f"target    {target['provider']}/{target['model']}, {cost}")
    learnt = (
        "" if told["factor"] == 1 else f", by a factor of {told['factor']:.2f} that true usage has taught"
    )
    print(f"tokens    {told['tokens']} counted{learnt}")
    return 0


def learnt_factors(config: Config) -> list[tuple[str, str, float, int]]:
    """What true usage has taught a server with this config; nothing where its database cannot be read."""
    with contextlib.suppress(ConfigError, sqlite3.Error), open_store(config) as store:
        return store.load_calibration()
    return []


def token_command(args: argparse.Namespace) -> int:
    """Prints the admin token, making it if there is none yet."""
    print(admin_token_of(read_config(args.config)))
    return 0


def statusline_command(args: argparse.Namespace) -> int:
    """Prints a line for Claude Code: who answers, cost of session and day, balance."""
    print_statusline(args.config)
    return 0


def init_command(args: argparse.Namespace) -> int:
    """Writes a commented config.toml from the keys found; never over an old one."""
    path = expanded(args.config or os.environ.get("CCMUX_CONFIG") or "~/.ccmux/config.toml")
    if path.exists():
        raise ConfigError(f"{path} is there already; edit it, or name another file with --config")
    found = config_of_environment(os.environ, ollama_models())
    is_demo = 'type = "demo"' in found
    text = INIT_HEAD + found + (INIT_DEMO if is_demo else "") + INIT_TAIL
    load_config(text, os.environ, str(path))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(path, text, os.O_EXCL)
    if is_demo:
        print("no key was found in the environment, so it has the built-in demo; edit it, or set a key first")
    used = config_path("")
    flag = "" if used and used.resolve() == path.resolve() else f" --config {shlex.quote(str(path))}"
    print(f"wrote {path}\nstart ccmux with: python3 {shlex.quote(sys.argv[0])}{flag}")
    return 0


INIT_HEAD = """\
# ccmux config. config.example.toml beside ccmux.py shows every key; `ccmux.py check` tells whether this file
# is sound. Keys are best left in the environment: api_key = "$NAME" reads the variable NAME.

"""
INIT_DEMO = """
# No key was found in the environment, so the built-in demo answers. Put a provider in its place, and set its variable:
# [[providers]]
# name = "openrouter"
# type = "openrouter"
# api_key = "$OPENROUTER_API_KEY"
"""
INIT_TAIL = """
# A name of your own for one or more upstream models; they are tried by priority until one answers:
# [[models]]
# name = "sonnet"
# [[models.mappings]]
# provider = "openrouter"
# actual_model = "z-ai/glm-5.3"
# priority = 1
#
# Then send background work to a cheap model, and hard thinking to a strong one:
# [router]
# default = "sonnet"
# background = "openrouter/z-ai/glm-5.3-flash"
# think = "anthropic/claude-opus-5-5"
"""


# Claude Code: its variables, its settings, and running it.


def client_environment(config: Config, url: str) -> dict[str, str]:
    """The variables that point Claude Code here.

    The key is $CCMUX_KEY, where one is set. A passthrough provider needs Claude Code's own login, so no key is set then.
    """
    context = client_window(config)
    key = os.environ.get("CCMUX_KEY") or key_to_print(config)
    own = any(p.passthrough for p in config.providers if p.usable) and "CCMUX_KEY" not in os.environ
    targets = resolve(config, default_model(config, "claude-x"))
    bases = [provider.base_url for t in targets if (provider := config.provider(t.provider))]
    variables = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "" if own else key,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-haiku-4-5",
        "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "1",
        # Auto mode has Anthropic's server check its actions; with this (2.1.330) it asks the model for that.
        "CLAUDE_CODE_AUTO_MODE_SERVER": "" if any(map(is_anthropics, bases)) else "0",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(context or ""),
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(context) if context >= LEAST_WINDOW else "",
    }
    return {name: value for name, value in variables.items() if value}


# Claude Code heeds MAX_CONTEXT_TOKENS only for names it does not know; its own it takes for a million. It heeds
# AUTO_COMPACT_WINDOW for all, but not below this.
LEAST_WINDOW = 100_000


def client_window(config: Config) -> int:
    """How many tokens a conversation may have before Claude Code is to compact it; 0: not known."""
    names = filter(None, (default_model(config, ""), config.router.long_context))
    windows = []
    for name in names:
        targets = resolve(config, name)
        known = facts_of(targets[0].actual_model).context if targets else 0
        windows.append(context_of(config, name, targets) or known)
    return max(windows) if windows and all(windows) else 0


SHELLS: dict[str, tuple[str, Callable[[str], str]]] = {  # a line, and how a value is quoted in it
    "bash": ("export {}={}", shlex.quote),
    "fish": ("set -gx {} {};", lambda value: "'" + re.sub(r"([\\'])", r"\\\1", value) + "'"),
    "powershell": ("$env:{} = {}", lambda value: "'" + value.replace("'", "''") + "'"),
    "cmd": ('set "{}={}"', str),
}


def env_command(args: argparse.Namespace) -> int:
    """Prints the variables that point Claude Code here, for a shell or as JSON."""
    config, url = address_to_keep(args)
    variables = client_environment(config, url) | (no_proxy_for(url) if has_proxy() else {})
    if args.shell == "json":
        print(json.dumps(variables, indent=2))
    else:
        line, quoted = SHELLS[args.shell]
        for name, value in variables.items():
            print(line.format(name, quoted(value)))
    if lacks_key(config):
        print(f"ccmux: {NEEDS_KEY}", file=sys.stderr)
    return 0


def address_to_keep(args: argparse.Namespace) -> tuple[Config, str]:
    """The config and its address, for what outlives a start; ConfigError where no start has it, or each another port."""
    config = with_overrides(read_config(args.config), args)
    check_binding(config)
    if not config.server.port:
        raise ConfigError("[server] port is 0, so each start takes another one: set one there, or by --port")
    return config, client_url(config)


NEEDS_KEY = "this ccmux asks for a user's key: set CCMUX_KEY to one (`ccmux.py user add NAME` makes one)"


def lacks_key(config: Config) -> bool:
    return needs_key(config) and not os.environ.get("CCMUX_KEY")


def needs_key(config: Config) -> bool:
    """Whether Claude Code needs a user's key: all do, or the user `local` is disabled."""
    if config.server.require_key:
        return True
    with contextlib.suppress(ConfigError, sqlite3.Error), open_store(config) as store:
        local = store.user(LOCAL_USER)
        return local is not None and local.disabled
    return False


def code_command(args: argparse.Namespace) -> int:
    """Runs `claude` through the ccmux that runs, or one that lasts as long as it."""
    places = map(os.path.expanduser, ("~/.local/bin/claude", "~/.claude/local/claude"))
    claude = shutil.which("claude") or next((path for path in places if os.access(path, os.X_OK)), "")
    if not claude:
        raise ConfigError(
            "there is no `claude` here: npm install -g @anthropic-ai/claude-code, and try again"
        )
    if not os.path.isabs(claude):  # Windows looks there first, and it may be anybody's folder
        raise ConfigError(
            f"the `claude` found first is {claude} of this folder: take it away, or go elsewhere"
        )
    config = read_config(args.config)
    check_binding(config)
    if lacks_key(config):
        raise ConfigError(NEEDS_KEY)
    try:
        return asyncio.run(run_claude([claude, *args.rest], config, args))
    except asyncio.CancelledError:  # before claude ran, or after
        return 128 + signal.SIGTERM


async def run_claude(command: list[str], config: Config, args: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task
    with contextlib.suppress(NotImplementedError):  # on Windows
        for number in ENDING_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with contextlib.AsyncExitStack() as at_end:
        with one_at_a_time(home_of(config)):  # two would start a server each, with one log and one database
            url = client_url(config)
            if not config.server.port or not is_ccmux(url):
                url = await at_end.enter_async_context(own_server(config, args))
            elif found_here(config):
                print(f"ccmux: using the one at {url}{found_here(config)}", file=sys.stderr, flush=True)
        for path, settings, _ in settings_in_use():
            if place := elsewhere(settings, url):
                remedy = "take that out of its env, or let `ccmux.py setup` replace it"
                raise ConfigError(f"{path} sends Claude Code to {place}, whatever `code` says: {remedy}")
        ours = client_environment(config, url) | no_proxy_for(url)
        unset = {*OTHER_CLOUDS, *MALLOC}  # the latter are for this process
        if "ANTHROPIC_AUTH_TOKEN" in ours:
            unset.add("ANTHROPIC_API_KEY")  # two credentials make Claude Code ask which
        return await run_child(command, {k: v for k, v in os.environ.items() if k not in unset} | ours)


@contextlib.asynccontextmanager
async def own_server(config: Config, args: argparse.Namespace) -> AsyncIterator[str]:
    """The address of a server in this process, which logs to a file: the terminal is Claude Code's."""
    path = home_of(config) / "ccmux.log"
    place = f"{client_url(config)}{found_here(config)}"
    print(f"ccmux: starting at {place}, its log is {path}", file=sys.stderr, flush=True)
    write_text(path, "", os.O_TRUNC)
    async with serving(config, args, path) as (state, port):
        log.info("serving at %s", client_url(config, port))
        yield client_url(config, port)
        await no_more_posts(state, 1)  # those of the `claude` that ended, which is heard of a moment later
        if state.posts:
            with contextlib.suppress(OSError):  # the terminal may be closed
                print("ccmux: waiting for requests to end; Ctrl-C stops them", file=sys.stderr, flush=True)


def found_here(config: Config) -> str:
    """Words about a config that nobody has named: it says where keys and prompts go, and came with the folder."""
    return " by this folder's config.toml" if config.path == "config.toml" else ""


def has_proxy() -> bool:
    return any(os.environ.get(name) for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"))


def no_proxy_for(url: str) -> dict[str, str]:
    """The variables with which Claude Code does not look for this address through HTTPS_PROXY."""
    known = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    host = urllib.parse.urlsplit(url).hostname or ""
    is_listed = {host, "*"} & set(re.split(r"[,\s]+", known))
    return dict.fromkeys(NO_PROXY, known if is_listed else ",".join(filter(None, [known, host])))


NO_PROXY = ("NO_PROXY",) if sys.platform == "win32" else ("NO_PROXY", "no_proxy")  # there these are one


async def run_child(command: list[str], variables: dict[str, str]) -> int:
    """Runs a command in the foreground; its exit status as a shell has it. Ctrl-C is its own to heed, and where this is
    to be cancelled, it is told to end.
    """
    child = subprocess.Popen(command, env=variables)  # noqa: ASYNC220, S603
    before = signal.signal(signal.SIGINT, lambda *_: None)
    while (status := child.poll()) is None:
        try:
            await asyncio.to_thread(child.wait)
        except asyncio.CancelledError:
            child.terminate()
    signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


def is_ccmux(url: str) -> bool:
    """Whether a ccmux answers there; ConfigError where something else does."""
    try:
        with open_directly(f"{url}/health", 5) as answer:
            server = answer.headers.get("Server")
    except urllib.error.HTTPError as error:
        server = error.headers.get("Server")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError):
            return False
        server = str(reason)
    if server != "ccmux":
        raise ConfigError(f"something else answers at {url} ({server}); [server] port sets another one")
    return True


def setup_command(args: argparse.Namespace) -> int:
    """Points Claude Code here for good, in its own settings; --undo takes it back."""
    path = Path(os.path.realpath(claude_settings()))
    before, ours = (path.with_name(f"settings.json.{word}") for word in ("before-ccmux", "by-ccmux"))
    old, was, made = (file.read_bytes() if file.exists() else None for file in (path, before, ours))
    if made is None and args.undo:
        raise ConfigError("there is nothing to undo: ccmux.py setup was not used here")
    bare = old if made is None else settings_without(old, was, made)
    if args.undo:
        show_change(path, old, bare)
        for file, data in ((path, bare), (before, None), (ours, None)):
            write_whole(file, data)
        return 0
    config, url = address_to_keep(args)
    if lacks_key(config):
        raise ConfigError(NEEDS_KEY)
    new = settings_with(bare, client_environment(config, url), statusline_shell(config))
    show_change(path, old, new)
    for file, data in ((before, bare), (ours, new), (path, new)):
        write_whole(file, data)
    print(f"Claude Code now uses {url}; `ccmux.py setup --undo` puts the file back as it was")
    return 0


def claude_settings() -> Path:
    return expanded(os.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude") / "settings.json"


def settings_in_use() -> Iterator[tuple[Path, Json, str]]:
    """Claude Code's settings, the user's and this folder's: (file, what it says, why it cannot be read)."""
    for path in (claude_settings(), Path(".claude/settings.json"), Path(".claude/settings.local.json")):
        try:
            yield path, settings_of(path.read_bytes()), ""
        except FileNotFoundError:
            continue
        except (OSError, ConfigError) as error:
            yield path, {}, str(error)


def elsewhere(settings: Json, url: str) -> str:
    """Where these settings send Claude Code instead of this address; "" where they do not."""
    variables = as_object(settings.get("env"))
    if cloud := other_cloud(variables):
        return f"what {cloud} means"
    base = str(variables.get("ANTHROPIC_BASE_URL") or url)
    return "" if is_same_place(base, url) else base


def other_cloud(variables: Mapping[str, Any]) -> str:
    """Which of them has Claude Code (2.1.330) go elsewhere, whatever ANTHROPIC_BASE_URL is; "" for none."""
    is_set = ("1", "true", "yes", "on")
    return next((name for name in OTHER_CLOUDS if str(variables.get(name)).lower() in is_set), "")


OTHER_CLOUDS = tuple(
    f"CLAUDE_CODE_USE_{name}"
    for name in ("BEDROCK", "VERTEX", "FOUNDRY", "MANTLE", "ANTHROPIC_AWS", "ANTHROPIC_GOOGLE_CLOUD")
)


def settings_with(bare: bytes | None, variables: Mapping[str, str], shell: str) -> bytes:
    """Claude Code's settings with these variables in their `env`, and a status line where there is none of the user's."""
    settings = settings_of(bare)
    kept = {k: v for k, v in as_object(settings.get("env")).items() if k not in MANAGED}
    settings["env"] = {**kept, **variables}
    if "statusLine" not in settings or has_unsafe_statusline(settings):
        settings["statusLine"] = {"type": "command", "command": shell}
    return settings_text(settings, bare)


def settings_without(now: bytes | None, bare: bytes | None, made: bytes) -> bytes | None:
    """The settings without what setup made of the `bare` ones (None: no file): these, unless others changed them. A
    variable that has another value by now stays.
    """
    if now == made:
        return bare
    settings, first, ours = (settings_of(data) for data in (now, bare, made))
    if has_unsafe_statusline(settings):
        del settings["statusLine"]
    now_set, first_set, made_set = (as_object(told.get("env")) for told in (settings, first, ours))
    settings["env"] = taken_back(now_set, first_set, made_set, MANAGED)
    if not settings["env"] and "env" not in first:
        del settings["env"]
    return settings_text(taken_back(settings, first, ours, ["statusLine"]), now)


def taken_back(now: Json, first: Json, made: Json, names: Iterable[str]) -> Json:
    """`now`, with those names as at first that are as setup made them; what somebody has changed since stays."""
    unchanged = [name for name in names if now.get(name) == made.get(name)]
    kept = {name: value for name, value in now.items() if name not in unchanged}
    return kept | {name: first[name] for name in unchanged if name in first}


def has_unsafe_statusline(settings: Json) -> bool:
    """Whether their status line is as setup wrote it before `-P`: it runs a ccmux.py of the project one works in."""
    command = str(as_object(settings.get("statusLine")).get("command"))
    return bool(re.match(r"PYTHONPATH=.+(?<! -P) -m [^ ]+ statusline( --config |$)", command))


def settings_text(settings: Json, like: bytes | None) -> bytes:
    """The settings as Claude Code keeps them, indented as those were."""
    indent = re.search(rb"\n([ \t]+)\"", like or b"")
    text = json.dumps(settings, indent=indent[1].decode() if indent else 2, ensure_ascii=False)
    return f"{text}\n".encode(errors="backslashreplace")  # half a surrogate pair, as JSON writes it


# What `setup` decides about: no old value of one stays beside new ones.
MANAGED = (
    "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_DEFAULT_HAIKU_MODEL",
    "CLAUDE_CODE_GATEWAY_HINT_HEADERS", "CLAUDE_CODE_MAX_CONTEXT_TOKENS", "CLAUDE_CODE_AUTO_COMPACT_WINDOW",
    "CLAUDE_CODE_AUTO_MODE_SERVER", *OTHER_CLOUDS,
)  # fmt: skip


def settings_of(data: bytes | None) -> Json:
    try:
        settings = json.loads(data or b"{}")
    except ValueError as error:
        raise ConfigError(f"Claude Code's settings.json is not valid JSON ({error}); mend it first") from None
    if not isinstance(settings, dict):
        raise ConfigError("Claude Code's settings.json is not a JSON object; mend it first")
    return settings


def statusline_shell(config: Config) -> str:
    """The status line's command. `-m` uses the compiled file, which `python3 ccmux.py` cannot; it needs the
    file's own name, where this was started by a link such as ~/bin/ccmux, and `-P` and the config's name, as Claude Code
    runs it in whatever project it is in.
    """
    flag = ["--config", os.path.abspath(config.path or ccmux_home() / "config.toml")]
    files = [Path(os.path.abspath(__file__)), Path(os.path.realpath(__file__))]
    named = (f for f in files if re.fullmatch(r"[^.]+\.py", f.name) and os.pathsep not in str(f.parent))
    module = next(named, None)
    if os.name == "nt" or module is None:
        join = windows_shell if os.name == "nt" else shlex.join
        return join([sys.executable, str(files[0]), "statusline", *flag])
    command = shlex.join([sys.executable, "-P", "-m", module.stem, "statusline", *flag])
    return f"PYTHONPATH={shlex.quote(str(module.parent))} {command}"


def windows_shell(words: Iterable[str]) -> str:
    """A command as Claude Code runs it on Windows: by Git Bash, which takes backslashes away, else by PowerShell, which
    takes a word in quotes for a text (anthropics/claude-code#67588, #88256); formerly by cmd.
    """
    paths = (word.replace("\\", "/") for word in words)
    return " ".join(path if re.fullmatch(r"[\w./:~-]+", path) else f'"{path}"' for path in paths)


def show_change(path: Path, old: bytes | None, new: bytes | None) -> None:
    was, now = ((data or b"").decode("utf-8", "replace").splitlines() for data in (old, new))
    lines = list(difflib.unified_diff(was, now, str(path), f"{path} (new)", lineterm="", n=1))
    secret = re.compile(r'("[^"]*(?:KEY|TOKEN(?!S)|SECRET)[^"]*"\s*:\s*")(?!ccmux-local)[^"]+', re.I)
    print("\n".join(secret.sub(r"\1...", line) for line in lines) or f"{path} stays as it is")


def write_text(path: Path, text: str, mode: int) -> None:
    """A file (0600 where it is new). With O_EXCL a whole one or none, and FileExistsError where there is one."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600)
    try:
        with open(file, "w", encoding="utf-8", newline="") as writer:
            writer.write(text)
    except OSError:
        if mode & os.O_EXCL:
            path.unlink()
        raise


def write_whole(path: Path, data: bytes | None) -> None:
    """Replaces a file in one step, keeping its mode (0600 for a new one); None takes it away."""
    if data is None:
        return path.unlink(missing_ok=True)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# Money.


def open_store(config: Config, to_read: bool = True) -> contextlib.closing[Store]:
    """The database beside a server or without one; ConfigError where there is nothing to read."""
    path = database_path(config)
    if path == ":memory:":
        raise ConfigError(
            '[server] database is ":memory:", which keeps nothing; name a file to use this command'
        )
    if to_read and not os.path.exists(path):
        raise ConfigError(f"there is no database {path} yet; it is made when ccmux first runs")
    return contextlib.closing(Store(path))


def microdollars(text: str) -> int:
    """Dollars as a person writes them -> micro-dollars."""
    try:
        amount = Decimal(text.removeprefix("$")) * 10**6
        is_whole = abs(amount) <= 10**15 and amount % 1 == 0
    except (ArithmeticError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of dollars such as 5 or 1.50") from None
    if not is_whole:
        raise argparse.ArgumentTypeError(f"{text!r} must have at most 6 decimals and be below a billion")
    return int(amount)


def budget(text: str) -> int | None:
    """A budget in dollars -> micro-dollars; `none` -> None."""
    amount = None if text == "none" else microdollars(text)
    if amount is not None and amount < 0:
        raise argparse.ArgumentTypeError("a budget cannot be below 0; `none` takes it away")
    return amount


def budgets_of(args: argparse.Namespace) -> dict[str, int | None]:
    return {f"{name}_microusd": getattr(args, name) for name in PERIODS if hasattr(args, name)}


PERIODS = ("day", "week", "month")


def user_add(args: argparse.Namespace) -> int:
    """Adds a user and shows the key, which is not kept and cannot be shown again."""
    config = read_config(args.config)
    credit = int(config.credits.starting_credit * 10**6) if args.credit is None else args.credit
    with open_store(config, to_read=False) as store:
        user, key = store.add_user(args.name, credit, budgets_of(args), args.note)
        print_users(store, [user])
    print_key(config, key)
    return 0


def print_key(config: Config, key: str) -> None:
    print(f"key       {key}   (shown this once)")
    print(f"for them  export ANTHROPIC_BASE_URL={client_url(config)} ANTHROPIC_AUTH_TOKEN={key}")


def user_list(args: argparse.Namespace) -> int:
    """Lists the users with their balances, what they spent, and their budgets."""
    with open_store(read_config(args.config)) as store:
        print_users(store, store.users())
    return 0


def print_users(store: Store, users: list[User]) -> None:
    rows: list[tuple[str, ...]] = [("name", "balance", "held", "today", "month", "budgets", "note")]
    for user in users:
        told = store.user_json(user)
        limits = {name: told["budgets"][f"{name}_microusd"] for name in PERIODS}
        texts = [f"{money(amount)} a {name}" for name, amount in limits.items() if amount is not None]
        amounts = ("balance_microusd", "held_microusd", "spent_today_microusd", "spent_month_microusd")
        note = " ".join(filter(None, ["(disabled)" if user.disabled else "", user.note]))
        rows.append((user.name, *(money(told[a]) for a in amounts), ", ".join(texts) or "-", note))
    print_table(rows)


def user_credit(args: argparse.Namespace) -> int:
    """Adds credit to a user, or takes it back where the amount is negative."""
    with open_store(read_config(args.config)) as store:
        print_users(store, [store.credit(args.name, args.amount, args.note)])
    return 0


def user_budget(args: argparse.Namespace) -> int:
    """Sets what a user may spend a day, week (from Monday) or month, in UTC."""
    with open_store(read_config(args.config)) as store:
        print_users(store, [store.set_budgets(args.name, budgets_of(args))])
    return 0


def user_key(args: argparse.Namespace) -> int:
    """Makes a new key for a user; the old one stops working at once."""
    config = read_config(args.config)
    with open_store(config) as store:
        print_key(config, store.rotate_key(args.name))
    return 0


def user_disable(args: argparse.Namespace) -> int:
    """Stops a user's key from working, or lets it work again; the balance stays."""
    with open_store(read_config(args.config)) as store:
        if args.name == LOCAL_USER:
            store.local_user()  # made at the first request, else
        print_users(store, [store.set_disabled(args.name, args.action == "disable")])
    return 0


def moment(text: str) -> str:
    """`2026-11-24`, `2026-11-24T08:00`, `today`, `7d` (days back) -> a time as the ledger writes it."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match = re.fullmatch(r"(\d{1,4})d|today", text)
    try:
        return iso(today - timedelta(days=int(match[1] or 0))) if match else iso_text(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: 2026-11-24, today or 7d") from None


REPORT_COLUMNS = (
    "requests", *TOKEN_COLUMNS, "cost_microusd", "markup_microusd", "charge_microusd", "unpriced",
)  # fmt: skip


def report_command(args: argparse.Namespace) -> int:
    """Shows what requests cost: tokens, cost, markup and charge."""
    config = read_config(args.config)
    try:
        as_if = as_if_on(config, args.as_if)
    except ApiError as error:
        raise ConfigError(f"--{error.message.replace('_', '-', 1)}") from None
    with open_store(config) as store:
        rows = store.report(args.by, args.since, args.until, args.user or None, as_if)
    columns = (args.by, *REPORT_COLUMNS, *(("as_if_microusd",) if args.as_if else ()))
    rows = [{args.by: row["key"], **{c: row[c] for c in columns[1:]}} for row in rows]
    if args.format == "json":
        print(json.dumps(rows, indent=2))
    elif args.format == "csv":
        print(csv_text(rows, columns), end="")
    else:
        print_report(columns, rows)
    return 0


def print_report(columns: tuple[str, ...], rows: list[Json]) -> None:
    """The report as a table with a sum below; money in dollars."""
    total = {columns[0]: "total", **{c: sum(row[c] for row in rows) for c in columns[1:]}}
    heads = [c.removesuffix("_microusd").removesuffix("_tokens").replace("_", " ") for c in columns]
    cells = [
        tuple(money(row[c]) if c.endswith("_microusd") else str(row[c]) or "-" for c in columns)
        for row in [*rows, total]
    ]
    print_table([tuple(heads), *cells], right=True)
    if total["unpriced"]:
        print(f"requests without a known price: {total['unpriced']}; their cost is not in the sums")


def export_command(args: argparse.Namespace) -> int:
    """Writes the request log, one row a request, as CSV or JSON."""
    with open_store(read_config(args.config)) as store:
        rows = list(store.export(args.since, args.until))
    text = csv_text(rows, USAGE_COLUMNS) if args.format == "csv" else json.dumps(rows, indent=1) + "\n"
    if args.output == "-":
        print(text, end="")
    else:
        write_text(Path(args.output), text, os.O_TRUNC)  # in its place: it may be a pipe
        print(f"wrote {args.output}, requests: {len(rows)}")
    return 0


def backup_command(args: argparse.Namespace) -> int:
    """Copies the database to a new file, also while ccmux runs."""
    config = read_config(args.config)
    with open_store(config) as store:
        size = os.path.getsize(database_path(config)) / 1e6
        print(f"copying {size:.1f} MB", file=sys.stderr, flush=True)
        store.backup(args.file)
    print(f"wrote {args.file}")
    return 0


# doctor


def doctor_command(args: argparse.Namespace) -> int:
    """Looks for faults, from the config and the database to Claude Code's settings."""
    failed = False
    for word, text in diagnose(args.config):
        print_found(word, text)
        failed |= word == "FAILED"
    return 1 if failed else 0


def diagnose(given: str) -> Iterator[tuple[str, str]]:
    """(ok, note or FAILED; what was found), up to a file or folder that cannot be had."""
    try:
        yield from findings(given)
    except OSError as error:
        yield "FAILED", words_of_fault(error)


def findings(given: str) -> Iterator[tuple[str, str]]:
    ours = f"ccmux {__version__}, Python {sys.version.split()[0]}, aiohttp {aiohttp.__version__}"
    yield "ok", f"{ours}, tiktoken {tiktoken.__version__}, SQLite {sqlite3.sqlite_version}"
    try:
        config = read_config(given)
        check_binding(config)
    except ConfigError as error:
        yield "FAILED", str(error)
        return
    yield "ok", f"config {config.path or what_was_found(config)}"
    yield from (("note", warning) for warning in config.warnings)
    yield from diagnose_files(config)
    yield diagnose_port(config)
    yield diagnose_database(config)
    for name, path in vocabulary_state().items():
        if path:
            yield "ok", f"vocabulary {name}: {path}"
        elif name.endswith("_base"):
            yield "note", f"vocabulary {name}: not here yet; counts are estimates until it is downloaded"
    yield from diagnose_variables(config)
    yield from diagnose_claude(config)


def diagnose_files(config: Config) -> Iterator[tuple[str, str]]:
    """Files with secrets in them that others on this machine can read."""
    paths = [Path(database_path(config)), token_path(config)]
    if config.path and any(secret in Path(config.path).read_text("utf-8") for secret in config.secrets):
        paths.append(Path(config.path))
    for path in paths:
        if os.name != "nt" and path.exists() and path.stat().st_mode & 0o077:
            yield "FAILED", f"others can read {path}: chmod 600 {shlex.quote(str(path))}"


def diagnose_port(config: Config) -> tuple[str, str]:
    url, port = client_url(config), config.server.port
    if not port:
        return "ok", "port 0: each start takes one that is free"
    try:
        return "ok", f"ccmux runs at {url}" if is_ccmux(url) else f"port {port} is free"
    except ConfigError as error:
        return "FAILED", f"{error}{port_owner(port)}"


def port_owner(port: int) -> str:
    """` (pid 12, name)` of who listens on a port, where Linux tells; else ""."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) in sockets:
                return f" (pid {link.parts[2]}, {Path('/proc', link.parts[2], 'comm').read_text().strip()})"
    return ""


def diagnose_database(config: Config) -> tuple[str, str]:
    path = database_path(config)
    if path == ":memory:" or not os.path.exists(path):
        return "note", f"database {path}: " + ("nothing is kept" if path == ":memory:" else "not made yet")
    try:
        with open_store(config) as store:
            (verdict,) = store.reader.execute("pragma integrity_check(1)").fetchone()
            problem = store.sums_problem() if verdict == "ok" else f"damaged: {' '.join(verdict.split())}"
            if problem:
                return "FAILED", f"database {path}: {problem}"
            requests, users = sum(r["requests"] for r in store.report("month")), len(store.users())
    except ConfigError as error:  # which names it
        return "FAILED", str(error)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: of SQLite's own words
        return "FAILED", f"database {path}: {error}"
    return "ok", f"database {path}: requests {requests}, users {users}, all sums equal their rows"


def diagnose_variables(config: Config) -> Iterator[tuple[str, str]]:
    """What in this shell's environment keeps Claude Code from coming here."""
    env, url = os.environ, client_url(config)
    if not is_same_place(base := env.get("ANTHROPIC_BASE_URL", url), url):
        yield "FAILED", f"ANTHROPIC_BASE_URL is {base}, and ccmux is at {url}: see `ccmux.py env`"
    if env.get("ANTHROPIC_API_KEY") and env.get("ANTHROPIC_AUTH_TOKEN"):
        both = "ANTHROPIC_API_KEY and ANTHROPIC_AUTH_TOKEN are both set"
        yield "note", f"{both}: Claude Code sends both; unset one"
    if cloud := other_cloud(env):
        yield "FAILED", f"{cloud} is set: Claude Code then does not use ANTHROPIC_BASE_URL; unset it"
    for name in ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL"):
        if asked := env.get(name):
            yield "note", f"{name} is set: Claude Code asks for {asked} whatever /model says"
    wanted = no_proxy_for(url)["NO_PROXY"]
    if has_proxy() and wanted not in map(env.get, NO_PROXY):
        lacks = f"a proxy is set and NO_PROXY lacks {urllib.parse.urlsplit(url).hostname}"
        remedy = set_here({"NO_PROXY": wanted})
        yield "note", f"{lacks}: Claude Code looks for ccmux through the proxy; {remedy}"


def is_same_place(base: str, url: str) -> bool:
    """Whether a base URL leads to this address, as `http://localhost:13456/` does to 127.0.0.1."""
    one, other = (text.rstrip("/").replace("//localhost", "//127.0.0.1") for text in (base, url))
    return one == other


def diagnose_claude(config: Config) -> Iterator[tuple[str, str]]:
    """What Claude Code's own settings, the user's and this folder's, say about where it goes."""
    url = client_url(config)
    found = shutil.which("claude")
    yield ("ok", f"Claude Code is {found}") if found else ("note", "there is no `claude` on the PATH")
    for path, settings, problem in settings_in_use():
        if problem:
            yield "FAILED", f"{path}: {problem}"
        place = elsewhere(settings, url)
        if place or "ANTHROPIC_BASE_URL" in as_object(settings.get("env")):
            yield ("FAILED" if place else "ok"), f"{path} sends Claude Code to {place or url}"
        if has_unsafe_statusline(settings):
            yield "FAILED", f"{path}: its status line runs a project's files: `ccmux.py setup` renews it"
        if "apiKeyHelper" in settings:
            yield "note", f"{path} has an apiKeyHelper: its key is sent to ccmux in place of yours"


# import-litellm


def import_litellm_command(args: argparse.Namespace) -> int:
    """Shows what a LiteLLM config.yaml becomes; keys in it are not copied or shown."""
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        remedy = f"{shlex.quote(sys.executable)} -m pip install pyyaml"
        raise ConfigError(f"import-litellm needs PyYAML: {remedy}") from None
    try:
        tables = yaml.safe_load(Path(args.file).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{args.file}: not valid YAML: {' '.join(str(error).split())}") from None
    imported = LiteLLMImport(as_object(tables), os.environ)
    text = imported.toml()
    load_config(text, os.environ)
    words = ("mapped", "approximated", "dropped")
    report = [f"{word:13} {line}" for word in words for kind, line in imported.report if kind == word]
    if not args.write:
        print(text + "\n".join(["", "# Report", *(f"# {line}" for line in report)]))
        return 0
    write_text(Path(args.write), text, os.O_EXCL)
    print("\n".join([*report, f"wrote {args.write}; `ccmux.py check --config {args.write}` tries it"]))
    return 0


# LiteLLM's provider prefixes (docs.litellm.ai/docs/providers, November 2026) and the preset or format that serves each.
LITELLM_PRESETS = {
    "anthropic": "anthropic", "openai": "openai", "openrouter": "openrouter", "gemini": "gemini", "groq": "groq",
    "deepinfra": "deepinfra", "cerebras": "cerebras", "mistral": "mistral", "xai": "xai", "github": "github",
    "ollama": "ollama", "minimax": "minimax", "nebius": "nebius", "novita": "novita", "baseten": "baseten",
    "together_ai": "together", "fireworks_ai": "fireworks", "nvidia_nim": "nvidia", "deepseek": "deepseek-openai",
    "moonshot": "moonshot-openai", "zai": "zai-openai", "dashscope": "qwen-openai", "ollama_chat": "ollama",
    "litellm_proxy": "litellm", "codestral": "mistral", "azure": "openai", "hosted_vllm": "openai",
    "openai/responses": "responses", "azure/responses": "responses",
    "lm_studio": "openai", "openai_like": "openai", "custom_openai": "openai", "text-completion-openai": "openai",
}  # fmt: skip
# The address and the key of a row that names none, where our presets have others.
LITELLM_BASES = {
    "azure": "os.environ/AZURE_API_BASE", "azure/responses": "os.environ/AZURE_API_BASE",
    "codestral": "https://codestral.mistral.ai/v1", "openai/responses": "https://api.openai.com/v1",
}  # fmt: skip
LITELLM_KEYS = {
    "azure": "os.environ/AZURE_API_KEY", "azure/responses": "os.environ/AZURE_API_KEY",
    "codestral": "os.environ/CODESTRAL_API_KEY", "openai/responses": "os.environ/OPENAI_API_KEY",
    "github": "os.environ/GITHUB_API_KEY", "nvidia_nim": "os.environ/NVIDIA_NIM_API_KEY",
}  # fmt: skip
LITELLM_NAMES = ((r"gpt-|chatgpt-|o\d|codex", "openai"), ("claude", "anthropic"))
LITELLM_PRICES = {
    "input_cost_per_token": "input", "output_cost_per_token": "output", "cache_read_input_token_cost": "cache_read",
    "cache_creation_input_token_cost": "cache_write", "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
}  # fmt: skip
LITELLM_KNOWN = {
    "model", "api_key", "api_base", "base_url", "api_version", "custom_llm_provider", "extra_headers", "order",
    "max_input_tokens", "id", "mode", "base_model", "max_tokens", "max_output_tokens", *LITELLM_PRICES,
    "model_name", "litellm_params", "model_info",
}  # fmt: skip


class LiteLLMImport:
    """A LiteLLM config, table by table, in ccmux's terms; `report` has a line on all that was in it."""

    def __init__(self, tables: Json, env: Mapping[str, str]) -> None:
        self.env = env
        self.server: Json = {}
        self.router: Json = {}
        self.providers: list[Json] = []
        self.models: dict[str, list[Json]] = {}
        self.literals: dict[str, str] = {}  # a key written in the file -> the variable to put it in
        self.report: list[tuple[str, str]] = []
        for row in as_list(tables.get("model_list")):
            self.deployment(as_object(row))
        if any(len(targets) > 1 for targets in self.models.values()):
            self.approximated("several deployments of a model: the first is used, the others when it fails")
        if self.models:
            first = next(iter(self.models))
            self.approximated(
                f"Claude Code's own names without a row go to {first}; [router] default sets another"
            )
        names = ("litellm_settings", "router_settings", "general_settings")
        litellm, router, general = (dict(as_object(tables.get(name))) for name in names)
        aliases = as_object(router.pop("model_group_alias", None))
        self.fallbacks(litellm, router)
        self.aliases(aliases)
        self.limits({**litellm, **router})
        for table in (litellm, general):  # LiteLLM's page about Claude Code has the key in the first
            self.master_key(table)
        for name, rest in zip(names, (litellm, router, general), strict=True):
            if unread := sorted(
                str(key) for key in rest.keys() - LITELLM_LIMITS.keys() - {"routing_strategy"}
            ):
                self.dropped(f"{name}: {', '.join(unread)}")
        for name in tables.keys() - {"model_list", *names}:
            self.dropped(f"{name}: ccmux has nothing like it")

    def say(self, word: str, line: str) -> None:
        if (word, line) not in self.report:
            self.report.append((word, line))

    mapped = functools.partialmethod(say, "mapped")
    approximated = functools.partialmethod(say, "approximated")
    dropped = functools.partialmethod(say, "dropped")

    def deployment(self, row: Json) -> None:
        """One row of model_list: a provider, and a target of the model."""
        name = str(row.get("model_name") or "")
        if not name:
            return self.dropped("a row of model_list without a model_name")
        params, info = as_object(row.get("litellm_params")), as_object(row.get("model_info"))
        if (mode := info.get("mode") or "chat") not in ("chat", "completion", "responses"):
            return self.dropped(f"model {name}: mode {mode}; ccmux serves chat models")
        prefix, upstream = self.split(params)
        if not upstream:
            return self.dropped(f"model {name}: no model of {prefix or 'a provider'} is named")
        if prefix in ("openai", "azure") and (mode == "responses" or upstream.startswith("responses/")):
            prefix, upstream = f"{prefix}/responses", upstream.removeprefix("responses/")
        provider = self.provider(prefix, params, name)
        if not provider:
            return None
        if "*" in name:
            return self.wildcard(name, prefix, provider)
        priority = order if isinstance(order := params.get("order"), int) else 1
        target = {"provider": provider, "actual_model": upstream, "priority": priority}
        self.models.setdefault(name, []).append(target | self.price_and_context({**params, **info}, name))
        self.mapped(f"model {name} -> {provider}/{upstream}")
        if unread := sorted(map(str, (params.keys() | info.keys() | row.keys()) - LITELLM_KNOWN)):
            self.dropped(f"model {name}: {', '.join(unread)}")
        return None

    def split(self, params: Json) -> tuple[str, str]:
        """(LiteLLM's provider prefix, the upstream model); "": a prefix it infers in ways unknown here."""
        model = str(params.get("model") or "")
        head, slash, rest = model.partition("/")
        if given := str(params.get("custom_llm_provider") or ""):
            return given, rest if head == given else model
        if slash and (head in LITELLM_PRESETS or params.get("api_base") or not re.match("[A-Z]", rest)):
            return head, rest
        return next((preset for pattern, preset in LITELLM_NAMES if re.match(pattern, model)), ""), model

    def provider(self, prefix: str, params: Json, name: str) -> str:
        """The name of the provider row for a deployment, made if it is a new one; "": ccmux has none for it."""
        is_azure = prefix.split("/")[0] == "azure"
        given = params.get("api_base") or params.get("base_url") or LITELLM_BASES.get(prefix)
        base = self.expanded(given, name)
        preset = LITELLM_PRESETS.get(prefix) or ("openai" if base else "")
        if base is None:
            return ""
        if not preset:
            self.dropped(f"model {name}: ccmux has no preset or format for {prefix or params.get('model')!r}")
            return ""
        if is_azure:
            base = re.sub(r"(?<!/)/openai(/.*)?$", "", base.partition("?")[0].rstrip("/")) + "/openai/v1"
            self.approximated(f"model {name}: Azure through its v1 address, {base}, without an api_version")
        elif base and prefix not in LITELLM_PRESETS:
            self.approximated(f"model {name}: {prefix or 'its address'} is taken to speak OpenAI's format")
        elif base.rstrip("/") == PRESETS.get(preset, {}).get("base_url"):
            base = ""
        row: Json = {"type": preset, **({"base_url": base} if base else {})}
        is_own = is_azure or base in ("", LITELLM_BASES.get(prefix))  # at other addresses none may be wanted
        key = params.get("api_key") or (LITELLM_KEYS.get(prefix) if is_own else "")
        if key or base:
            row["api_key"] = self.secret(key, f"model {name}")
        if headers := as_object(params.get("extra_headers")):
            row["headers"] = {str(k): self.secret(v, f"model {name}, header {k}") for k, v in headers.items()}
        return self.provider_name(row, re.sub(r"[^\w.-]", "-", prefix) or preset)

    def provider_name(self, row: Json, stem: str) -> str:
        """The name of the provider that has this row; a new one gets the stem, with a number where that is taken."""
        taken = {str(known["name"]): known for known in self.providers}
        for name, known in taken.items():
            if known == {**row, "name": name}:
                return name
        names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        name = next(name for name in names if name not in taken)
        self.providers.append({"name": name, **row})
        return name

    def expanded(self, value: Any, name: str) -> str | None:
        """An address; None where it stands in a variable that is not set."""
        text = str(value or "")
        if not text.startswith("os.environ/"):
            return text
        variable = text.removeprefix("os.environ/")
        if found := self.env.get(variable):
            self.approximated(f"model {name}: the address is what {variable} holds now")
            return found
        self.dropped(f"model {name}: its address stands in {variable}, which is not set here")
        return None

    def secret(self, value: Any, where: str) -> str:
        """`$NAME` for a key; one that is written out gets a variable's name instead, and is not shown."""
        text = str(value or "")
        if not text or text.startswith("os.environ/"):
            return text.replace("os.environ/", "$", 1)
        variable = self.literals.setdefault(text, f"LITELLM_KEY_{len(self.literals) + 1}")
        self.approximated(
            f"{where}: what is written there is not copied; put it into the variable {variable}"
        )
        return f"${variable}"

    def price_and_context(self, info: Json, name: str) -> Json:
        out: Json = {}
        given = {ours: str(info[key]) for key, ours in LITELLM_PRICES.items() if info.get(key) is not None}
        try:
            price = {kind: (Decimal(amount) * 10**6).normalize() for kind, amount in given.items()}
        except InvalidOperation:
            price = {}
        if {"input", "output"} <= price.keys():
            out["price"] = price
            self.mapped(f"model {name}: prices per token, as dollars per million")
        elif given:
            self.dropped(f"model {name}: a price needs both input_cost_per_token and output_cost_per_token")
        if isinstance(context := info.get("max_input_tokens"), int):
            out["context"] = context
        return out

    def wildcard(self, name: str, prefix: str, provider: str) -> None:
        if name == "*":
            self.router["fallback_provider"] = provider
            self.mapped(
                f"model * -> fallback_provider {provider}; Claude's own names go to the default instead"
            )
        elif name == f"{prefix}/*":
            self.mapped(f"model {name} -> ask for {provider}/NAME, which needs no row")
        else:
            self.dropped(f"model {name}: write the names into `models` of provider {provider}")

    def aliases(self, table: Json) -> None:
        for alias, given in table.items():
            name = str(given.get("model") if isinstance(given, dict) else given)
            if name in self.models:
                self.models[str(alias)] = [dict(target) for target in self.models[name]]
                self.mapped(f"alias {alias} -> the targets of {name}")
            else:
                self.dropped(f"alias {alias}: {name} is no model that was imported")

    def fallbacks(self, *settings: Json) -> None:
        """Fallbacks become targets of a lower priority, in LiteLLM's order; a loop is cut after one round."""
        own = {name: list(targets) for name, targets in self.models.items()}
        for table, (key, word) in itertools.product(settings, LITELLM_FALLBACKS.items()):
            given = as_list(table.pop(key, None))
            rows = [dict.fromkeys(own, given)] if key == "default_fallbacks" else map(as_object, given)
            pairs = [
                (str(name), str(o)) for row in rows for name, others in row.items() for o in as_list(others)
            ]
            for name, other in pairs:
                if name == other:
                    continue
                if name not in own or other not in own:
                    self.dropped(f"{key}: {name} -> {other}, of which one is no model that was imported")
                    continue
                self.add_targets(self.models[name], own[other])
                self.say(word, f"{key}: {name} -> {other}, as targets of a lower priority")

    def add_targets(self, targets: list[Json], others: list[Json]) -> None:
        """Those others that are not among the targets, behind them."""
        last = max(target["priority"] for target in targets)
        known = {(t["provider"], t["actual_model"]) for t in targets}
        new = [t for t in others if (t["provider"], t["actual_model"]) not in known]
        targets.extend({**target, "priority": last + target["priority"]} for target in new)

    def limits(self, settings: Json) -> None:
        for key, (ours, least) in LITELLM_LIMITS.items():
            if key not in settings:
                continue
            amount = settings[key]
            if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < least:
                self.dropped(f"{key} = {amount!r}: not a number that {ours} takes")
                continue
            self.mapped(f"{key} = {amount} -> {ours} of each provider")
            for provider in self.providers:
                provider[ours] = int(amount) if ours == "max_retries" else amount
        if strategy := settings.get("routing_strategy"):
            self.approximated(f"routing_strategy {strategy}: ccmux goes by priority, then file order")

    def master_key(self, settings: Json) -> None:
        if key := settings.pop("master_key", None):
            self.literals.setdefault(str(key), "CCMUX_ADMIN_TOKEN")
            self.server = {"require_key": True, "admin_token": self.secret(key, "master_key")}
            self.approximated(
                "master_key -> admin_token and require_key: each user gets a key of ccmux's own"
            )

    def toml(self) -> str:
        tables = {"server": self.server, "router": self.router}
        rows = [emit_table(name, table) for name, table in tables.items() if table]
        rows += [emit_table("providers", row, "array") for row in self.providers]
        for name, targets in self.models.items():
            rows.append(emit_table("models", {"name": name, "mappings": targets}, "array"))
        return "\n".join(rows)


LITELLM_FALLBACKS = {
    "fallbacks": "mapped", "context_window_fallbacks": "approximated", "default_fallbacks": "mapped",
}  # fmt: skip
LITELLM_LIMITS = {  # ccmux's key, and the least that it takes; of two for one key the later stands
    "request_timeout": ("response_timeout", 0.05), "timeout": ("response_timeout", 0.05),
    "num_retries": ("max_retries", 0),
}  # fmt: skip


# The command line.


Flag = tuple[tuple[str, ...], Json]


def flag(*names: str, **options: Any) -> Flag:
    return names, options


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command: what runs it, a line of help, its flags as argparse takes them, examples."""

    name: str
    run: Callable[[argparse.Namespace], int]
    help: str
    flags: tuple[Flag, ...] = ()
    examples: str = ""


def port_number(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


ADDRESS = (
    flag("--host", help="address to listen on"),
    flag("--port", type=port_number, help="port to listen on"),
)
AMOUNT = {"metavar": "D", "type": budget, "default": argparse.SUPPRESS}
BUDGETS = tuple(flag(f"--{name}", help=f"dollars a {name}, or none", **AMOUNT) for name in PERIODS)
NAME = flag("name", metavar="NAME", help="the user's name")
NOTE = flag("--note", default="", metavar="T", help="kept with it, for people")
SPAN = (
    flag("--since", type=moment, default="", metavar="D", help="from this time on: 2026-11-24, today, 7d"),
    flag("--until", type=moment, default="", metavar="D", help="up to this time"),
)
COMMANDS = (
    Command(
        "serve", serve, "run the server (what happens without a command)",
        (*ADDRESS, flag("--log-level", choices=LOG_LEVELS, help="how much is logged")),
        "ccmux.py\nccmux.py --port 8000 --log-level debug",
    ),
    Command(
        "code", code_command, "run Claude Code through ccmux, started and stopped as needed",
        (flag("rest", nargs="*", metavar="ARGUMENT", help="claude's own arguments"),),
        'ccmux.py code\nccmux.py code -p "say hi"\nccmux.py code --config work.toml --continue',
    ),
    Command(
        "env", env_command, "print the variables that point Claude Code here",
        (*ADDRESS, flag("--shell", choices=(*SHELLS, "json"), default=SHELL_HERE, help="for which shell")),
        'eval "$(ccmux.py env)"\nccmux.py env --shell fish | source\nccmux.py env --shell powershell | Invoke-Expression',
    ),
    Command(
        "setup", setup_command, "write them into Claude Code's settings; --undo takes them out",
        (*ADDRESS, flag("--undo", action="store_true", help="put the settings back as they were")),
        "ccmux.py setup\nccmux.py setup --undo",
    ),
    Command("init", init_command, "write a commented config.toml from the keys found"),
    Command("model", model_command, "show providers, models and routes (also: models)"),
    Command(
        "check", check_command, "validate the config",
        (flag("--live", action="store_true", help="send one tiny request to each provider"),),
        "ccmux.py check --config new.toml\nccmux.py check --live",
    ),
    Command(
        "explain", explain_command, "show which model a request would go to, rule by rule",
        (flag("file", metavar="FILE", help="a Messages request as JSON, - for standard input"),),
        'echo \'{"model": "claude-x", "messages": []}\' | ccmux.py explain -',
    ),
    Command("doctor", doctor_command, "look for what commonly goes wrong"),
    Command(
        "user add", user_add, "add a user; shows the key once",
        (NAME, flag("--credit", type=microdollars, metavar="D", help="first credit in dollars"), *BUDGETS, NOTE),
        "ccmux.py user add anna --credit 5 --day 1.50",
    ),
    Command("user list", user_list, "list users, balances and budgets"),
    Command(
        "user credit", user_credit, "add credit, or take it back",
        (NAME, flag("amount", type=microdollars, metavar="D", help="dollars; negative takes back"), NOTE),
        'ccmux.py user credit anna 10 --note "paid in cash"\nccmux.py user credit anna -2.50',
    ),
    Command(
        "user budget", user_budget, "set budgets", (NAME, *BUDGETS), "ccmux.py user budget anna --day 2 --month none"
    ),
    Command("user key", user_key, "make a new key; the old one stops working", (NAME,)),
    Command("user disable", user_disable, "stop a user's key from working", (NAME,)),
    Command("user enable", user_disable, "let it work again", (NAME,)),
    Command(
        "report", report_command, "show what requests cost",
        (
            flag("--by", choices=tuple(REPORT_KEYS), default="user", help="what a row is (default: user)"),
            *SPAN,
            flag("--user", default="", metavar="NAME", help="of this user alone"),
            flag("--as-if", default="", metavar="MODEL", help="also what it would have cost on this model"),
            flag("--format", choices=("table", "csv", "json"), default="table", help="default: table"),
        ),
        "ccmux.py report --by model --since 7d\nccmux.py report --by day --as-if claude-opus-5-5",
    ),
    Command(
        "export", export_command, "write the request log as CSV or JSON",
        (
            *SPAN,
            flag("--format", choices=("csv", "json"), default="csv", help="default: csv"),
            flag("-o", "--output", default="-", metavar="F", help="file to write; left out: standard output"),
        ),
        "ccmux.py export --since 2026-11-01 -o november.csv",
    ),
    Command(
        "backup", backup_command, "copy the database, also while ccmux runs",
        (flag("file", metavar="FILE", help="the file to write"),),
    ),
    Command("token", token_command, "print the admin token"),
    Command("statusline", statusline_command, "one line for Claude Code's statusLine setting"),
    Command(
        "import-litellm", import_litellm_command, "turn a LiteLLM config.yaml into a ccmux config",
        (
            flag("file", metavar="FILE", help="LiteLLM's config.yaml"),
            flag("--write", default="", metavar="F", help="write the TOML there, instead of showing it"),
        ),
        "ccmux.py import-litellm config.yaml\nccmux.py import-litellm config.yaml --write config.toml",
    ),
)  # fmt: skip
ALIASES = {"models": "model"}
HELP_END = """
Without a config file ccmux uses the keys it finds in the environment
(ANTHROPIC_API_KEY, OPENAI_API_KEY, OPENROUTER_API_KEY, ...), a local Ollama, or
else a built-in demo. A config is found at --config, $CCMUX_CONFIG,
./config.toml or ~/.ccmux/config.toml. Each command takes --config F, and tells
about itself with --help.

exit status: 0 good; 1 a check found something; 2 something to put right, said
in one line. `code` passes on claude's own.

examples:
  ccmux.py         run the server, and be told how to point Claude Code at it
  ccmux.py code    run Claude Code through ccmux
  ccmux.py init    write a config to begin with
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def parser(word: str) -> Parser:
    """For the commands that begin with this word, else for all, which would take 10 ms of a start."""
    top = Parser(
        prog="ccmux.py", description="Claude Code with any model of any provider.", epilog=HELP_END,
        formatter_class=help_format,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"ccmux {__version__}")
    top.set_defaults(config="")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    groups: dict[str, Any] = {"": commands}
    for command in [c for c in COMMANDS if c.name.split()[0] == word] or COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            users = commands.add_parser(group, help="add and list users; their credit, budgets and keys")
            users.add_argument(*CONFIG[0], **CONFIG[1])
            groups[group] = users.add_subparsers(dest="action", metavar="action", required=True)
        add_command(groups[group], name, command)
    return top


help_format = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
CONFIG = flag("--config", default=argparse.SUPPRESS, metavar="F", help="config file")


def add_command(group: Any, name: str, command: Command) -> None:
    examples = "".join(f"\n  {line}" for line in command.examples.splitlines())
    made = group.add_parser(
        name, help=command.help, description=command.run.__doc__,
        epilog=f"examples:{examples}" if examples else None,
        formatter_class=help_format,
    )  # fmt: skip
    made.set_defaults(run=command.run)
    for names, options in (CONFIG, *command.flags):
        made.add_argument(*names, **options)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; 0 good, 1 a check found something, 2 the operator's error in one line."""
    gc.enable()  # see RUN_COMPILED
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that its encoding lacks is no fault
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parsed_arguments(sys.argv[1:] if argv is None else argv)
        status = int(args.run(args))
        print(end="", flush=True)
        return status
    except ConfigError as error:
        return failed(str(error))
    except BrokenPipeError:  # `ccmux.py report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return failed(words_of_fault(error))
    except sqlite3.Error as error:
        return failed(f"the database: {error}")
    except KeyboardInterrupt:
        return 130


def words_of_fault(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def failed(why: str) -> int:
    print(f"ccmux: {' '.join(why.split())}", file=sys.stderr)
    return 2


def parsed_arguments(given: list[str]) -> argparse.Namespace:
    """The command line; without a command it is `serve`, and --config may stand before the command."""
    config, given = leading_config(given)
    word = ALIASES.get(given[0], given[0]) if given else ""
    names = {command.name.split()[0] for command in COMMANDS}
    if word == "code" and given[1:2] not in (["--help"], ["-h"]):
        own, rest = leading_config(given[1:])
        args = parser(word).parse_args([word, *config, *own])
        args.rest = rest[1:] if rest[:1] == ["--"] else rest
        return args
    if word in names:
        given = [word, *config, *given[1:]]
    elif word and not word.startswith("-"):
        raise ConfigError(f"there is no command {word!r}: {known_names(word, sorted(names))}")
    elif word not in ("--help", "-h", "--version"):
        given = ["serve", *config, *given]
    return parser(given[0]).parse_args(given)


def leading_config(words: list[str]) -> tuple[list[str], list[str]]:
    """(--config and its file, where a command line begins with them; the other words)."""
    taken = 2 if words[:1] == ["--config"] else int(words[:1] != [] and words[0].startswith("--config="))
    return words[:taken], words[taken:]


if __name__ == "__main__":
    sys.exit(count_texts(sys.argv[2]) if sys.argv[1:2] == [COUNT_TEXTS] else main())
