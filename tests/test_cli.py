"""The command line: in this process where that shows the same, as processes where signals, pipes and time matter."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import http.server
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import proxy_harness
import pytest
from attacks import set_traps, until
from proxy_harness import ROOT, provider_row

import ccmux

CCMUX = str(ROOT / "ccmux.py")


class Ran(NamedTuple):
    status: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("user", "list")` in an empty home, in this process."""
    for name in list(os.environ):
        if name.endswith(("_KEY", "_TOKEN", "_PROXY", "_proxy")) or name.startswith(
            ("ANTHROPIC_", "CLAUDE_", "CCMUX_")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{closed_port()}")
    monkeypatch.chdir(tmp_path)

    def run(*args: str, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            status = ccmux.main(list(args))
        except SystemExit as end:  # --help
            status = int(end.code or 0)
        return Ran(status, *capsys.readouterr())

    return run


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def write_config(folder: Path, text: str = "", port: int = 0) -> Path:
    path = folder / "config.toml"
    path.write_text(f"[server]\nport = {port or closed_port()}\n{text}\n{provider_row()}")
    return path


def process_environment(home: Path, **more: str) -> dict[str, str]:
    kept = {k: os.environ[k] for k in ("PATH", "LANG", "SYSTEMROOT") if k in os.environ}
    return {**kept, "HOME": str(home), "OLLAMA_HOST": "127.0.0.1:9", **more}


def process(home: Path, *args: str, stdin: str = "", **more: str) -> Ran:
    done = subprocess.run(
        [sys.executable, CCMUX, *args], cwd=home, env=process_environment(home, **more),
        input=stdin, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def in_shell(home: Path, script: str, shell: str = "sh", stdin: str = "") -> Ran:
    """A script in which "$0" "$1" is ccmux."""
    done = subprocess.run(
        [shell, "-c", script, sys.executable, CCMUX], cwd=home, env=process_environment(home),
        input=stdin, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def web_server(answers: dict[str, Any]) -> Iterator[int]:
    """A server that answers paths with JSON; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.get(self.path, {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


# Help, errors, exit statuses.


@pytest.mark.parametrize("command", ccmux.COMMANDS, ids=lambda command: command.name)
def test_help_teaches(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: ccmux.Command) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = cli(*command.name.split(), "--help")
    assert ran.status == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    for names, options in command.flags:
        assert options["help"]
        assert (names[0] if names[0].startswith("-") else options["metavar"]) in ran.out
    assert "--config F" in ran.out
    for line in command.examples.splitlines():
        assert line in ran.out


def test_top_help_names_every_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = cli("--help").out
    assert max(map(len, out.splitlines())) <= 80
    for word in {command.name.split()[0] for command in ccmux.COMMANDS}:
        assert f"\n    {word}" in out
    assert "exit status: 0 good; 1 a check found something; 2" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(("reprot",), "there is no command 'reprot': did you mean 'report'?", id="command"),
        pytest.param(("--prot", "1"), "unrecognized arguments: --prot 1; see `ccmux.py", id="flag"),
        pytest.param(("user",), "the following arguments are required: action", id="user-alone"),
        pytest.param(("user", "add"), "the following arguments are required: NAME", id="no-name"),
        pytest.param(("user", "add", "a b"), "user name 'a b': use 1 to 64 letters", id="bad-name"),
        pytest.param(
            ("user", "add", "a", "--credit", "-5"), "first credit -$5.00: it cannot be below 0", id="debt"
        ),
        pytest.param(
            ("report", "--since", "0001-01-01T00:00+14:00"),
            "is not a time: 2026-11-24, today or 7d",
            id="no-moment",
        ),
        pytest.param(
            ("user", "credit", "x", "1e3.3"), "'1e3.3' is not an amount of dollars", id="bad-amount"
        ),
        pytest.param(("user", "credit", "x", "0.0000001"), "at most 6 decimals", id="too-fine"),
        pytest.param(("user", "budget", "x", "--day", "-1"), "a budget cannot be below 0", id="budget"),
        pytest.param(("user", "list"), "there is no database", id="no-database"),
        pytest.param(
            ("report", "--since", "yesteryear"), "is not a time: 2026-11-24, today or 7d", id="time"
        ),
        pytest.param(("explain", "nothing.json"), "nothing.json: No such file or directory", id="no-file"),
        pytest.param(("check", "--config", "nothing.toml"), "nothing.toml: cannot be read", id="no-config"),
        pytest.param(("serve", "--host", "0.0.0.0"), "set require_key = true", id="open-to-all"),
        pytest.param(("--host", "[::1]"), "'[::1]': write it without the brackets", id="brackets"),
        pytest.param(("--host", "a" * 64), "which is no name of a host", id="no-host"),
        pytest.param(("check", "--config", "~no-such-user/x"), "no home folder is known", id="no-home"),
        pytest.param(("--port", "65536"), "'65536' is not a port: 0 to 65535", id="port"),
        pytest.param(("setup", "--undo"), "there is nothing to undo", id="undo"),
        pytest.param(("code",), "there is no `claude` here", id="no-claude"),
    ],
)
def test_operator_errors_are_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], said: str
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    ran = cli(*args)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("ccmux: ") and ran.err.count("\n") == 1
    assert said in ran.err


def test_explain_without_a_stdin(tmp_path: Path) -> None:
    ran = in_shell(tmp_path, '"$0" "$1" explain - <&-')
    assert (ran.status, ran.err.count("\n")) == (2, 1)


def test_config_may_stand_before_the_command(cli: Cli, tmp_path: Path) -> None:
    path = write_config(tmp_path).rename(tmp_path / "other.toml")
    assert str(path) in cli("--config", str(path), "check").out
    assert str(path) in cli(f"--config={path}", "check").out
    assert str(path) in cli("check", "--config", str(path)).out
    assert "anna" in cli("--config", str(path), "user", "add", "anna").out
    assert "anna" in cli("user", "--config", str(path), "list").out


def test_leave_to_read_a_config_is_a_change_of_it(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    before, end = ccmux.stamp_of(path), time.monotonic() + 10
    while ccmux.stamp_of(path) == before and time.monotonic() < end:  # the file system's clock ticks
        path.chmod(0o640)
    assert ccmux.stamp_of(path) != before


def test_a_config_beside_needs_no_home(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has none."""
    write_config(tmp_path)
    monkeypatch.setenv("HOME", "~nobody-here")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(FileNotFoundError):
        ccmux.ccmux_home()
    assert "config.toml" in cli("check").out
    assert "database" in cli("doctor").out


def test_an_equals_sign_before_the_config(tmp_path: Path) -> None:
    """As other programs take it; after `code`, where all else is claude's, as well."""
    write_config(tmp_path)
    other = tmp_path / "other.toml"
    other.write_text("not TOML")
    for command, said in (("code", f"ccmux: {other}: "), ("statusline", "ccmux: no figures (Expected '='")):
        path = fake_claude(tmp_path / command, "echo never")
        ran = process(tmp_path, command, f"--config={other}", PATH=path)
        assert said in ran.out + ran.err and "never" not in ran.out


def test_names_that_the_output_cannot_show(tmp_path: Path) -> None:
    """As on Windows, where what is piped is not UTF-8."""
    write_config(tmp_path)
    for args in (("add", "eleni", "--note", "Ελένη"), ("list",)):
        ran = process(tmp_path, "user", *args, PYTHONIOENCODING="cp1252")
        assert (ran.status, ran.err) == (0, "") and "\\u0395" in ran.out


def test_models_is_model(cli: Cli) -> None:
    assert cli("models") == cli("model")


def test_model_hides_a_login_in_an_address(cli: Cli, tmp_path: Path) -> None:
    config = tmp_path / "login.toml"
    config.write_text('[[providers]]\nname = "p"\ntype = "openai"\nbase_url = "http://anna:wonder@h/v1"\n')
    out = cli("model", "--config", str(config)).out
    assert "@h/v1/chat/completions" in out and "wonder" not in out


def test_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = process(tmp_path, "--port", str(port))
    assert ran.status == 2
    assert ran.err.startswith(f"ccmux: cannot listen on 127.0.0.1:{port} (")
    assert (
        ran.err.endswith("); is another ccmux running? --port sets another one\n")
        and ran.err.count("\n") == 1
    )


def test_closed_pipe_is_no_error(tmp_path: Path) -> None:
    enter(tmp_path / "ccmux.db", *((TODAY, settlement(f"req_{n:024}", "local")) for n in range(3000)))
    write_config(tmp_path)
    ran = in_shell(tmp_path, '"$0" "$1" export | head -1; exit ${PIPESTATUS[0]}', "bash")
    assert (ran.status, ran.err, ran.out[:5]) == (0, "", '"time')


def test_colours_only_for_people_who_want_them(tmp_path: Path) -> None:
    import pty

    def run(**more: str) -> bytes:
        pid, terminal = pty.fork()
        if pid == 0:  # pragma: no cover
            os.chdir(tmp_path)
            environment = process_environment(tmp_path, TERM="xterm", **more)
            os.execve(sys.executable, [sys.executable, CCMUX, "check"], environment)
        out = b""
        with contextlib.suppress(OSError):  # the terminal's end
            while data := os.read(terminal, 4096):
                out += data
        os.close(terminal)
        os.waitpid(pid, 0)
        return out

    assert b"\x1b[32mok" in run()
    assert b"\x1b" not in run(NO_COLOR="1")
    assert "\x1b" not in process(tmp_path, "check").out


# A start without a config.


@pytest.mark.parametrize(
    ("env", "ollama", "names", "default"),
    [
        pytest.param({}, [], ["demo"], "demo/M", id="nothing"),
        pytest.param({"ANTHROPIC_API_KEY": "k"}, [], ["anthropic"], "anthropic/M", id="anthropic"),
        pytest.param({"OPENAI_API_KEY": "k"}, [], ["openai"], "openai/gpt-6.1-terra", id="openai"),
        pytest.param({"ZAI_API_KEY": "k"}, [], ["zai"], "zai/glm-5.3", id="other-anthropic-format"),
        pytest.param(
            {"OPENROUTER_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}, [], ["anthropic", "openrouter"], "anthropic/M",
            id="preset-order",
        ),
        pytest.param({"OPENROUTER_API_KEY": ""}, [], ["demo"], "demo/M", id="empty-key"),
        pytest.param({"LITELLM_API_KEY": "k"}, [], ["litellm"], "litellm/M", id="no-model-of-its-own"),
        pytest.param({}, ["q:7b", "r"], ["ollama"], "ollama/q:7b", id="ollama"),
        pytest.param({"GROQ_API_KEY": "k"}, ["q"], ["groq", "ollama"], "groq/openai/gpt-oss-120b", id="both"),
        pytest.param({"ANTHROPIC_API_KEY": "k"}, ["q"], ["anthropic", "ollama"], "anthropic/M", id="both-anthropic"),
        pytest.param(
            {"ANTHROPIC_API_KEY": "ccmux-local", "ANTHROPIC_BASE_URL": "http://127.0.0.1:13456"}, [], ["demo"], "demo/M",
            id="a-shell-that-points-here",
        ),
        pytest.param(
            {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "http://[::1"}, [], ["demo"], "demo/M", id="malformed-address"
        ),
        pytest.param(
            {"ANTHROPIC_API_KEY": "k", "ANTHROPIC_BASE_URL": "https://api.anthropic.com/"}, [], ["anthropic"],
            "anthropic/M", id="anthropics-own-address",
        ),
    ],
)  # fmt: skip
def test_config_of_the_environment(
    env: dict[str, str], ollama: list[str], names: list[str], default: str
) -> None:
    config = ccmux.load_config(ccmux.config_of_environment(env, ollama), env)
    assert ([p.name for p in config.providers], config.warnings) == (names, ())
    assert all(p.usable for p in config.providers)
    assert ccmux.default_model(config, "M") == default
    assert ccmux.choose_route({"model": "claude-x", "messages": []}, {}, config).targets


@pytest.mark.parametrize(
    ("host", "url"),
    [
        pytest.param("", "http://127.0.0.1:11434", id="unset"),
        pytest.param("0.0.0.0", "http://127.0.0.1:11434", id="every-address"),
        pytest.param("box:8080", "http://box:8080", id="port"),
        pytest.param("box.example", "http://box.example:11434", id="name"),
        pytest.param(
            "https://box.example", "https://box.example:443", id="scheme"
        ),  # as ollama 0.6 from PyPI does
        pytest.param("http://box.example/ollama/", "http://box.example:80/ollama", id="path"),
        pytest.param("[::1]:7", "http://[::1]:7", id="ipv6"),
    ],
)
def test_ollama_url(host: str, url: str) -> None:
    assert ccmux.ollama_url({"OLLAMA_HOST": host}) == url


def test_ollama_that_answers_is_used_where_it_is(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"name": "nomic-embed-text"}, {"name": "qwen3-coder:30b"}, {"odd": 1}]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with web_server({"/api/tags": {"models": models}}) as port:
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
        config = ccmux.read_config("")
    assert config.provider("ollama").base_url == f"http://127.0.0.1:{port}"
    assert ccmux.default_model(config, "M") == "ollama/qwen3-coder:30b"


def test_start_text_says_all(cli: Cli) -> None:
    config = ccmux.load_config('[server]\nhost = "0.0.0.0"\nrequire_key = true\n', {})
    text = ccmux.start_text(config, 9, "t%k")
    assert "http://127.0.0.1:9/admin#token=t%25k" in text  # the page decodes it
    assert "export ANTHROPIC_BASE_URL=http://127.0.0.1:9 ANTHROPIC_AUTH_TOKEN=YOUR-CCMUX-KEY" in text
    assert "allowed_hosts" in text
    assert "demo answers" in ccmux.start_text(ccmux.read_config(""), 9, "tok")


def test_start_text_on_windows(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ccmux, "SHELL_HERE", "powershell")
    text = ccmux.start_text(ccmux.read_config(""), 9, "tok")
    line = "$env:ANTHROPIC_BASE_URL = 'http://127.0.0.1:9'; $env:ANTHROPIC_AUTH_TOKEN = 'ccmux-local'"
    assert line in map(str.strip, text.splitlines())


@pytest.mark.parametrize("name", ["SIGINT", "SIGBREAK"])
async def test_windows_stops_by_signal_handlers(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its event loop takes none, and without one Ctrl-C would cut live streams (seen under Wine 8)."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        stop = ccmux.stop_on_signals()
        signal.raise_signal(getattr(signal, name))
        await asyncio.wait_for(stop.wait(), 10)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_no_key_is_offered_that_is_refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the user `local` disabled each client needs a key, as with require_key."""
    write_config(tmp_path)
    cli("user", "add", "anna")  # and nobody has asked anything yet
    assert "ccmux-local" in cli("env").out
    assert cli("user", "disable", "local").status == 0
    config = ccmux.read_config("")
    assert "AUTH_TOKEN=YOUR-CCMUX-KEY" in ccmux.start_text(config, 9, "t")
    assert "set CCMUX_KEY" in cli("env").err
    assert cli("setup").status == 2
    monkeypatch.setenv("CCMUX_KEY", "k")
    assert (cli("setup").status, cli("env").err) == (0, "")


def test_no_address_is_told_that_is_none(cli: Cli, tmp_path: Path) -> None:
    """Where each start takes another port, nothing is written down with the port 0."""
    write_config(tmp_path)
    (tmp_path / "config.toml").write_text("[server]\nport = 0\n")
    assert "ANTHROPIC_BASE_URL=http://127.0.0.1:PORT " in cli("user", "add", "anna").out
    assert "port 0: each start takes one that is free" in words_of(cli("doctor"), "ok")
    for command in ("env", "setup"):
        ran = cli(command)
        assert (ran.status, ran.out) == (2, "") and "port is 0" in ran.err
        assert cli(command, "--port", "7").status == 0


def test_init_writes_once(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-secret")
    ran = cli("init")
    path = tmp_path / ".ccmux/config.toml"
    assert (ran.status, f"wrote {path}" in ran.out) == (0, True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    text = path.read_text()
    assert 'api_key = "$OPENROUTER_API_KEY"' in text and "sk-or-secret" not in text
    assert ccmux.read_config("").path == str(path)
    again = cli("init")
    assert (again.status, path.read_text()) == (2, text)
    uncommented = text.partition("# [[models]]")[2].replace("\n# ", "\n").partition("Then send")[0]
    ccmux.load_config('[[providers]]\nname = "openrouter"\ntype = "openrouter"\n[[models]]' + uncommented, {})


def test_init_without_a_key_says_so(cli: Cli, tmp_path: Path) -> None:
    assert "no key was found in the environment" in cli("init").out
    text = (tmp_path / ".ccmux/config.toml").read_text()
    shown = text.partition("set its variable:")[2].partition("\n\n")[0].replace("\n# ", "\n")
    assert ccmux.load_config(shown, {"OPENROUTER_API_KEY": "k"}).providers[0].usable


# The variables and settings of Claude Code.


def test_env_as_bash_reads_it(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = 'a\'b "c" $HOME `id`'
    monkeypatch.setenv("CCMUX_KEY", key)
    write_config(tmp_path, port=4242)
    done = subprocess.run(
        ["sh", "-c", cli("env").out + 'printf "%s|%s" "$ANTHROPIC_BASE_URL" "$ANTHROPIC_AUTH_TOKEN"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"http://127.0.0.1:4242|{key}"


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", "export ANTHROPIC_AUTH_TOKEN='it'\"'\"'s\\'"),
        ("fish", "set -gx ANTHROPIC_AUTH_TOKEN 'it\\'s\\\\';"),
        ("powershell", "$env:ANTHROPIC_AUTH_TOKEN = 'it''s\\'"),
        ("cmd", 'set "ANTHROPIC_AUTH_TOKEN=it\'s\\"'),
    ],
)
def test_env_of_each_shell(cli: Cli, monkeypatch: pytest.MonkeyPatch, shell: str, line: str) -> None:
    monkeypatch.setenv("CCMUX_KEY", "it's\\")
    assert line in cli("env", "--shell", shell).out.splitlines()


@pytest.mark.parametrize(
    ("known", "listed"),
    [
        ("", "127.0.0.1"),
        ("a.example", "a.example,127.0.0.1"),
        ("127.0.0.11", "127.0.0.11,127.0.0.1"),
        ("localhost, 127.0.0.1", "localhost, 127.0.0.1"),
        ("*", "*"),
    ],
)
def test_env_beside_a_proxy(cli: Cli, monkeypatch: pytest.MonkeyPatch, known: str, listed: str) -> None:
    """Claude Code looks even for 127.0.0.1 through HTTPS_PROXY, and waits for a minute or more."""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    monkeypatch.setenv("NO_PROXY", known)
    variables = json.loads(cli("env", "--shell", "json").out)
    assert variables["NO_PROXY"] == variables["no_proxy"] == listed
    monkeypatch.setattr(ccmux, "NO_PROXY", ("NO_PROXY",))  # as on Windows
    assert "no_proxy" not in cli("env").out


def test_env_as_json(cli: Cli) -> None:
    assert json.loads(cli("env", "--shell", "json", "--port", "7").out) == {
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:7", "ANTHROPIC_AUTH_TOKEN": "ccmux-local",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-haiku-4-5", "CLAUDE_CODE_GATEWAY_HINT_HEADERS": "1",
        "CLAUDE_CODE_AUTO_MODE_SERVER": "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param('[router]\ndefault = "openai/gpt-4o"\n',
                     {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": "128000", "CLAUDE_CODE_AUTO_COMPACT_WINDOW": "128000"}, id="known"),
        pytest.param('[[models]]\nname = "m"\ncontext = 5\n[[models.mappings]]\nprovider = "openai"\nactual_model = "x"\n',
                     {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": "5", "CLAUDE_CODE_AUTO_COMPACT_WINDOW": None}, id="row"),
        pytest.param('[router]\ndefault = "openai/gpt-4o"\nlong_context = "openai/gpt-4.1"\n',
                     {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": "1047576", "CLAUDE_CODE_AUTO_COMPACT_WINDOW": "1047576"}, id="long"),
        pytest.param('[router]\ndefault = "openai/gpt-4o"\nlong_context = "openai/unheard-of"\n',
                     {"CLAUDE_CODE_MAX_CONTEXT_TOKENS": None, "CLAUDE_CODE_AUTO_COMPACT_WINDOW": None}, id="long-unknown"),
        pytest.param('[server]\nrequire_key = true\n', {"ANTHROPIC_AUTH_TOKEN": "YOUR-CCMUX-KEY"}, id="key-needed"),
        pytest.param('[router]\ndefault = "openai/gpt-4o"\n', {"CLAUDE_CODE_AUTO_MODE_SERVER": "0"}, id="no-check-of-actions"),
        pytest.param('[[providers]]\nname = "anthropic"\ntype = "anthropic"\napi_key = "k"\n',
                     {"CLAUDE_CODE_AUTO_MODE_SERVER": None}, id="anthropic-checks-actions"),
    ],
)  # fmt: skip
def test_client_environment(cli: Cli, text: str, expected: dict[str, str | None]) -> None:
    config = ccmux.load_config(text + '[[providers]]\nname = "openai"\ntype = "openai"\n', {})
    variables = ccmux.client_environment(config, "u")
    assert {name: variables.get(name) for name in expected} == expected


def test_passthrough_leaves_claudes_own_login(cli: Cli) -> None:
    text = '[[providers]]\nname = "anthropic"\ntype = "anthropic"\napi_key = "passthrough"\n'
    assert "ANTHROPIC_AUTH_TOKEN" not in ccmux.client_environment(ccmux.load_config(text, {}), "u")


def test_env_says_that_a_key_is_needed(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path, "require_key = true")
    assert "set CCMUX_KEY" in cli("env").err


def settings_of(home: Path, data: bytes, name: str = "settings.json") -> Path:
    """Claude Code's settings in this home."""
    path = home / ".claude" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o640)
    return path


ODD = b'{\n\t"env": {"FOO":  "1", "ANTHROPIC_BASE_URL": "https://old.example"},\n\t"model": "opus"   \n}'


@pytest.mark.parametrize(
    "before", [None, b"", b"{}", ODD, b'{"statusLine": {"type": "command", "command": "mine"}}\r\n'],
    ids=["none", "empty", "object", "odd-format", "own-statusline"],
)  # fmt: skip
def test_setup_and_undo(cli: Cli, tmp_path: Path, before: bytes | None) -> None:
    path = settings_of(tmp_path, before or b"")
    if before is None:
        path.unlink()
    write_config(tmp_path, port=4242)
    for _ in range(2):
        ran = cli("setup")
        assert (ran.status, ran.err) == (0, "")
    settings = json.loads(path.read_bytes())
    assert settings["env"]["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:4242"
    assert (
        settings["statusLine"]["command"] == "mine" or "ccmux statusline" in settings["statusLine"]["command"]
    )
    if before == ODD:
        assert (settings["env"]["FOO"], settings["model"]) == ("1", "opus")
    ran = cli("setup", "--undo")
    assert ran.status == 0
    assert (path.read_bytes() if path.exists() else None) == before
    assert before is None or path.stat().st_mode & 0o777 == 0o640
    assert {p.name for p in path.parent.iterdir()} <= {"settings.json"}


def test_setup_shows_the_change_without_keys(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCMUX_KEY", "ccmux-secret-of-anna")
    path = settings_of(tmp_path, b'{"env":{"GLM_KEY":"sk-secret-of-anna","MAX_TOKENS":"7"}}')
    path.chmod(0o600)
    out = cli("setup").out
    assert '-{"env":{"GLM_KEY":"...","MAX_TOKENS":"7"}}' in out
    assert '+    "ANTHROPIC_BASE_URL": "http://127.0.0.1:13456",' in out
    assert "secret-of-anna" not in out
    assert path.stat().st_mode & 0o777 == 0o600


def test_undo_keeps_what_was_changed_since(cli: Cli, tmp_path: Path) -> None:
    path = settings_of(tmp_path, ODD)
    cli("setup")
    settings = json.loads(path.read_bytes())
    settings["model"] = "haiku"
    settings["env"]["BAR"] = "2"
    path.write_text(json.dumps(settings))
    assert cli("setup", "--undo").status == 0
    assert json.loads(path.read_bytes()) == {
        "env": {"FOO": "1", "ANTHROPIC_BASE_URL": "https://old.example", "BAR": "2"}, "model": "haiku",
    }  # fmt: skip


def test_undo_keeps_what_was_changed_of_setups_own(cli: Cli, tmp_path: Path) -> None:
    """Setup again points here all the same, and its undo gives what the user had set by then."""
    path = settings_of(tmp_path, ODD)
    cli("setup")
    by_hand = json.loads(path.read_bytes())
    by_hand["env"]["ANTHROPIC_BASE_URL"] = "https://new.example"
    by_hand["env"]["CLAUDE_CODE_USE_VERTEX"] = "1"
    del by_hand["env"]["ANTHROPIC_AUTH_TOKEN"]
    by_hand["statusLine"] = {"type": "command", "command": "mine"}
    path.write_text(json.dumps(by_hand))
    cli("setup", "--port", "7")
    settings = json.loads(path.read_bytes())
    assert settings["env"]["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:7"
    assert settings["statusLine"]["command"] == "mine"
    for _ in range(2):  # after this setup, and after the first
        cli("setup", "--undo")
        assert json.loads(path.read_bytes()) == {
            "env": {"FOO": "1", "ANTHROPIC_BASE_URL": "https://new.example", "CLAUDE_CODE_USE_VERTEX": "1"},
            "model": "opus", "statusLine": {"type": "command", "command": "mine"},
        }  # fmt: skip
        path.write_bytes(ODD)
        cli("setup")
        path.write_text(json.dumps(by_hand))


def test_undo_keeps_what_was_changed_between_two_setups(cli: Cli, tmp_path: Path) -> None:
    path = settings_of(tmp_path, ODD)
    cli("setup")
    path.write_text(path.read_text().replace('"opus"', '"haiku"'))
    cli("setup", "--port", "7")
    assert '"http://127.0.0.1:7"' in path.read_text()
    cli("setup", "--undo")
    assert json.loads(path.read_bytes()) == {**json.loads(ODD), "model": "haiku"}
    assert b'\n\t"env"' in path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["settings.json"]


def test_setup_writes_through_a_link(cli: Cli, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles/claude.json"
    real.parent.mkdir()
    real.write_text("{}")
    link = tmp_path / ".claude/settings.json"
    link.parent.mkdir()
    link.symlink_to(real)
    cli("setup")
    assert link.is_symlink() and "ANTHROPIC_BASE_URL" in real.read_text()
    cli("setup", "--undo")
    assert link.is_symlink() and real.read_text() == "{}"


def test_setup_again_renews_its_own_status_line(cli: Cli, tmp_path: Path) -> None:
    """ccmux.py or its config may stand elsewhere by now."""
    path = tmp_path / ".claude/settings.json"
    write_config(tmp_path).rename(tmp_path / "old.toml")
    write_config(tmp_path).rename(tmp_path / "new.toml")
    cli("setup", "--config", "old.toml")
    cli("setup", "--config", "new.toml")
    assert json.loads(path.read_bytes())["statusLine"]["command"].endswith("new.toml")
    cli("setup", "--undo")
    assert not path.exists()


@pytest.mark.parametrize("more", [{}, {"padding": 0}], ids=["as-written", "edited"])
def test_setup_again_replaces_a_status_line_that_ran_a_projects_files(
    cli: Cli, tmp_path: Path, more: dict[str, int]
) -> None:
    """As setup wrote it until it knew `-P`; also where no file tells any more that it did."""
    cli("setup")
    path, made = tmp_path / ".claude/settings.json", tmp_path / ".claude/settings.json.by-ccmux"
    safe = json.loads(path.read_bytes())
    unsafe = safe | {
        "statusLine": {**safe["statusLine"], "command": safe["statusLine"]["command"].replace(" -P", "")}
    }
    made.write_text(json.dumps(unsafe))
    for is_known in (True, False):
        path.write_text(json.dumps(unsafe | {"statusLine": {**unsafe["statusLine"], **more}}))
        assert "its status line runs" in "".join(words_of(cli("doctor"), "FAILED"))
        if not is_known:
            made.unlink()
        cli("setup")
        assert json.loads(path.read_bytes()) == safe
        assert words_of(cli("doctor"), "FAILED") == []
    assert not ccmux.has_unsafe_statusline({"statusLine": {"command": "python3 ~/ccmux.py statusline"}})


@pytest.mark.parametrize("command", ["setup", "env", "code"])
def test_no_way_to_an_address_that_no_server_takes(tmp_path: Path, command: str) -> None:
    """By a config that `serve` refuses: a project's own could name any host there."""
    write_config(tmp_path, 'host = "elsewhere.example"')
    ran = process(tmp_path, command, PATH=fake_claude(tmp_path, "echo never"))
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "key 'host' is 'elsewhere.example', which others can reach" in ran.err


def test_setup_writes_no_key_that_is_none(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path, "require_key = true")
    ran = cli("setup")
    assert (ran.status, ran.out) == (2, "") and "set CCMUX_KEY to one" in ran.err
    assert not (tmp_path / ".claude").exists()


def test_setup_without_a_home(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", "~no-such-user/x")
    ran = cli("setup")
    assert (ran.status, ran.err.count("\n")) == (2, 1) and "no home folder is known" in ran.err


def test_setup_leaves_no_half_of_a_file_behind(tmp_path: Path) -> None:
    path = settings_of(tmp_path, b"{}")
    ran = in_shell(tmp_path, 'ulimit -f 0; "$0" "$1" setup')  # no room, as on a full disk
    assert (ran.status, ran.err) == (2, "ccmux: [Errno 27] File too large\n")
    assert [p.name for p in path.parent.iterdir()] == ["settings.json"]
    assert path.read_text() == "{}"


@pytest.mark.parametrize(
    "args", ["init", "init --config new.toml", "import-litellm old.yaml --write new.toml"]
)
def test_no_half_of_a_new_config_is_left(tmp_path: Path, args: str) -> None:
    """The next `init` would take it for a config, and so would a start."""
    (tmp_path / "old.yaml").write_text("general_settings: {master_key: x}")
    ran = in_shell(tmp_path, f'ulimit -f 0; "$0" "$1" {args}')
    assert (ran.status, ran.err) == (2, "ccmux: [Errno 27] File too large\n")
    assert [*tmp_path.glob("*.toml"), *tmp_path.glob(".ccmux/*")] == []


def test_setup_beside_half_a_surrogate_pair(cli: Cli, tmp_path: Path) -> None:
    """Which JSON can have, and UTF-8 cannot; a folder's name in another encoding has them as well."""
    path = settings_of(tmp_path, b'{"model": "\\ud83d"}')
    assert cli("setup", "--config", write_config(tmp_path).name).status == 0
    assert b'"\\ud83d"' in path.read_bytes()


def test_setup_touches_no_broken_settings(cli: Cli, tmp_path: Path) -> None:
    path = settings_of(tmp_path, b"{ // a comment\n}")
    ran = cli("setup")
    assert (ran.status, path.read_text()) == (2, "{ // a comment\n}")
    assert "not valid JSON" in ran.err and ran.err.count("\n") == 1


# Users and money.


PRICED = {
    "model": "claude-sonnet-5-5", "cost": 47_500, "markup": 9_500, "charge": 57_000,
    "usage": ccmux.Usage(input=12_000, output=1_200, cache_read=40_000, cache_write=3_000),
}  # fmt: skip


def settlement(request_id: str, user: str, **more: Any) -> ccmux.Settlement:
    return proxy_harness.settlement(request_id, user=user, **PRICED | more)


def enter(path: Path, *rows: tuple[str, ccmux.Settlement]) -> None:
    """Requests in the ledger, as the server writes them: (time, settlement)."""
    store = ccmux.Store(str(path))
    store.local_user()
    with store.transaction():
        for moment, done in rows:
            done.time = moment
            store.write_settlement(store.db, done, "charge")
    store.close()


def ledger(path: Path, sql: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def test_a_users_life(cli: Cli, tmp_path: Path) -> None:
    database = tmp_path / ".ccmux/ccmux.db"
    added = cli("user", "add", "anna", "--credit", "5", "--day", "1.50", "--note", "a friend")
    assert added.status == 0
    key = next(line.split()[1] for line in added.out.splitlines() if line.startswith("key "))
    assert f"ANTHROPIC_AUTH_TOKEN={key}" in added.out
    assert key not in cli("user", "list").out
    assert cli("user", "add", "anna").err == "ccmux: user 'anna' is there already\n"
    assert "$15.25" in cli("user", "credit", "anna", "10.25", "--note", "cash").out
    assert "$12.75" in cli("user", "credit", "anna", "-2.50").out
    assert ledger(database, "select kind, amount_microusd, note from ledger order by id") == [
        ("topup", 5_000_000, "first credit"), ("topup", 10_250_000, "cash"), ("adjust", -2_500_000, ""),
    ]  # fmt: skip
    assert "$20.00 a month" in cli("user", "budget", "anna", "--day", "none", "--month", "20").out
    assert ledger(database, "select day_microusd, week_microusd, month_microusd from users") == [
        (None, None, 20_000_000)
    ]
    new = cli("user", "key", "anna").out.split()[1]
    store = ccmux.Store(str(database))
    assert (store.authenticate(key), store.authenticate(new).name) == (None, "anna")
    store.close()
    assert "(disabled) a friend" in cli("user", "disable", "anna").out
    assert "(disabled)" not in cli("user", "enable", "anna").out
    assert cli("user", "key", "ana").err == "ccmux: no user 'ana': did you mean 'anna'?\n"
    assert database.stat().st_mode & 0o777 == 0o600


def test_starting_credit(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path, "[credits]\nstarting_credit = 2.5")
    assert "$2.50" in cli("user", "add", "anna").out
    assert "$0.00" in cli("user", "add", "ben", "--credit", "0").out


@pytest.mark.parametrize(
    ("text", "amount"),
    [("5", 5_000_000), ("1.50", 1_500_000), ("$0.000001", 1), ("-2.5", -2_500_000), ("1e2", 100_000_000)],
)
def test_microdollars(text: str, amount: int) -> None:
    assert ccmux.microdollars(text) == amount


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "0.0000001", "1,5", "9" * 20, "1e999999"])
def test_no_microdollars(text: str) -> None:
    with pytest.raises(ccmux.argparse.ArgumentTypeError):
        ccmux.microdollars(text)


TODAY = "2026-11-24T08:00:00.000Z"


def test_report_and_its_formats(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path)
    enter(
        tmp_path / "ccmux.db", (TODAY, settlement("r1", "local")),
        ("2026-11-20T23:59:59.999Z", settlement("r2", "local", model="glm-5.3", cost=None, markup=None, charge=0)),
    )  # fmt: skip
    table = cli("report", "--by", "model").out.splitlines()
    assert table[0].split()[:3] == ["model", "requests", "input"]
    assert table[1].split() == ["claude-sonnet-5-5", "1", "12000", "1200", "40000", "3000", "0", "$0.0475", "$0.0095",
                                "$0.057", "0"]  # fmt: skip
    assert table[-2].split()[:2] == ["total", "2"]
    assert table[-1] == "requests without a known price: 1; their cost is not in the sums"
    rows = json.loads(cli("report", "--by", "day", "--format", "json", "--since", "2026-11-21").out)
    assert [(row["day"], row["charge_microusd"]) for row in rows] == [("2026-11-24", 57_000)]
    table = csv.DictReader(
        io.StringIO(cli("report", "--by", "day", "--until", "2026-11-21", "--format", "csv").out)
    )
    assert [(row["day"], row["requests"], row["unpriced"]) for row in table] == [("2026-11-20", "1", "1")]
    as_if = json.loads(cli("report", "--as-if", "claude-sonnet-5-5", "--format", "json").out)
    assert as_if[0]["as_if_microusd"] == 2 * 47_500
    assert cli("report", "--as-if", "no-such-model").err.startswith("ccmux: --as-if: no price is known")
    assert json.loads(cli("report", "--user", "nobody", "--format", "json").out) == []


def test_a_report_on_one_user_reprices_that_user_alone(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path)
    enter(tmp_path / "ccmux.db", (TODAY, settlement("r1", "local")), (TODAY, settlement("r2", "anna")))
    asked = ("report", "--by", "model", "--user", "anna", "--as-if", "claude-sonnet-5-5", "--format", "json")
    (row,) = json.loads(cli(*asked).out)
    assert (row["requests"], row["as_if_microusd"]) == (1, 47_500)


def test_export(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path)
    enter(tmp_path / "ccmux.db", (TODAY, settlement("r1", "local", asked="=evil()")))
    head, row = csv.reader(io.StringIO(cli("export").out))
    assert head == list(ccmux.USAGE_COLUMNS)
    assert row[head.index("asked")] == "'=evil()"
    ran = cli("export", "--format", "json", "-o", str(tmp_path / "out.json"))
    assert ran.out == f"wrote {tmp_path / 'out.json'}, requests: 1\n"
    assert json.loads((tmp_path / "out.json").read_text())[0]["charge_microusd"] == 57_000
    assert (tmp_path / "out.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "link.json").symlink_to("out.json")  # as /dev/stdout may be one; a pipe stays one, too
    assert cli("export", "--format", "csv", "-o", "link.json").status == 0
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "out.json").read_text()[:5] == '"time'


def test_backup_beside_a_server(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path)
    enter(tmp_path / "ccmux.db", (TODAY, settlement("r1", "local")))
    server = ccmux.Store(str(tmp_path / "ccmux.db"))
    server.open_server()
    try:
        assert cli("backup", "copy.db").status == 0
        assert "-$0.057" in cli("user", "list").out
    finally:
        server.close()
    assert ledger(tmp_path / "copy.db", "select amount_microusd from ledger") == [(-57_000,)]
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert cli("backup", "copy.db").err == "copying 0.1 MB\nccmux: copy.db: File exists\n"


# Looking.


def test_model_shows_all(cli: Cli, tmp_path: Path) -> None:
    text = '[[models]]\nname = "m"\n[[models.mappings]]\nprovider = "demo"\nactual_model = "x"\n'
    write_config(tmp_path, f'[router]\nthink = "m"\n{text}[[providers]]\nname = "zai"\ntype = "zai"\n')
    out = cli("model").out
    assert "$ZAI_API_KEY is not set in the environment  https://api.z.ai/api/anthropic/v1/messages" in out
    assert "\n  m  demo/x  $0 in, $0 out per million\n" in out
    assert "\n  think         m\n" in out


def test_check_finds_warnings(cli: Cli, tmp_path: Path) -> None:
    assert cli("check").status == 0
    write_config(tmp_path, '[[providers]]\nname = "zai"\ntype = "zai"\n')
    ran = cli("check")
    assert ran.status == 1
    assert "$ZAI_API_KEY is not set" in ran.out


def test_check_live(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path)
    ran = cli("check", "--live")
    assert (ran.status, "ok      demo/demo" in ran.out) == (0, True)
    write_config(tmp_path, '[[providers]]\nname = "resting"\ntype = "demo"\nenabled = false\n')
    ran = cli("check", "--live")
    assert (ran.status, words_of(ran, "note")) == (0, ["resting  not tried: it has enabled = false"])
    assert "ok      demo/demo" in ran.out
    dead = f'[[providers]]\nname = "dead"\ntype = "openai"\nbase_url = "http://127.0.0.1:{closed_port()}"\napi_key = "k"\n'
    write_config(tmp_path, dead)
    ran = cli("check", "--live")
    assert (ran.status, "FAILED  dead/gpt-6.1-terra" in ran.out) == (1, True)
    write_config(
        tmp_path, '[[models]]\nname = "m[1m]"\nmappings = [{provider = "demo", actual_model = "x"}]\n'
    )
    for args in (("check",), ("check", "--live")):  # a warning counts, whether all answer or not
        ran = cli(*args)
        assert (ran.status, words_of(ran, "FAILED"), len(words_of(ran, "note"))) == (1, [], 1)


def test_explain(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path)
    body = {"model": "claude-x", "max_tokens": 10, "messages": [{"role": "user", "content": "hello"}]}
    ran = cli("explain", "-", stdin=json.dumps(body).encode())
    assert ran.status == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == [
        *(reason for reason, _ in ccmux.ROUTE_STEPS), "model", "target", "tokens",
    ]  # fmt: skip
    assert "model     demo/claude-x (by default)" in ran.out
    counted = int(ran.out.split()[-2])
    with contextlib.closing(ccmux.Store(str(tmp_path / "ccmux.db"))) as store:
        store.save_calibration([("demo", "claude-x", 1.5, 20)])
    told = cli("explain", "-", stdin=json.dumps(body).encode()).out.splitlines()[-1]
    assert told.endswith("counted, by a factor of 1.50 that true usage has taught")
    assert abs(int(told.split()[1]) - counted * 1.5) <= 1.5
    ran = cli("explain", "-", stdin=b'{"model": 1}')
    assert (ran.status, ran.err) == (2, "ccmux: -: model: Field required (a text)\n")
    assert cli("explain", "-", stdin=b"{").err.startswith("ccmux: -: the request body is not valid JSON: ")


def test_where_the_config_is_found(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config, else $CCMUX_CONFIG, else ./config.toml, else ~/.ccmux/config.toml; each by its one model."""

    def write(path: Path, model: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'[[providers]]\nname = "demo"\ntype = "demo"\nmodels = ["{model}"]\n')

    home, here, named, given = (
        tmp_path / name for name in (".ccmux/config.toml", "config.toml", "n.toml", "g.toml")
    )
    assert "none of its own" in cli("model").out
    write(home, "of-home")
    assert "of-home" in cli("model").out
    write(here, "of-here")
    assert "of-here" in cli("model").out
    write(named, "of-variable")
    monkeypatch.setenv("CCMUX_CONFIG", "~/n.toml")
    assert "of-variable" in cli("model").out
    write(given, "of-flag")
    assert "of-flag" in cli("model", "--config", "g.toml").out


def test_token_of_a_server_that_keeps_nothing(cli: Cli, tmp_path: Path) -> None:
    write_config(tmp_path, 'database = ":memory:"')
    token = cli("token").out.strip()
    assert (tmp_path / "ccmux.token").read_text().strip() == cli("token").out.strip() == token


def test_token_is_kept(cli: Cli, tmp_path: Path) -> None:
    token = cli("token").out.strip()
    assert len(token) >= 22 and cli("token").out.strip() == token
    assert (tmp_path / ".ccmux/ccmux.token").stat().st_mode & 0o777 == 0o600
    (tmp_path / ".ccmux/ccmux.token").write_text("mine\n", "utf-16")  # as a shell of Windows does
    ran = cli("token")
    assert (ran.status, len(ran.err.splitlines())) == (2, 1) and "is no UTF-8 text" in ran.err


def words_of(ran: Ran, word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in ran.out.splitlines() if line.startswith(word)]


def test_doctor_finds_nothing_wrong(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    write_config(tmp_path, port=port)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", f"http://localhost:{port}/")
    enter(tmp_path / "ccmux.db", (TODAY, settlement("r1", "local")))
    ran = cli("doctor")
    assert (ran.status, words_of(ran, "FAILED")) == (0, [])
    assert "requests 1, users 1, all sums equal their rows" in ran.out


def test_doctor_names_who_has_the_port(cli: Cli, tmp_path: Path) -> None:
    with web_server({}) as port:
        write_config(tmp_path, port=port)
        ran = cli("doctor")
    assert ran.status == 1
    assert f"something else answers at http://127.0.0.1:{port}" in words_of(ran, "FAILED")[0]
    if sys.platform == "linux":
        assert f"(pid {os.getpid()}, " in words_of(ran, "FAILED")[0]


def broken_sum(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path / "ccmux.db")) as db, db:
        db.execute("update users set balance_microusd = 1")


def wrong_schema(path: Path, change: str) -> None:
    with contextlib.closing(sqlite3.connect(path / "ccmux.db")) as db, db:
        db.execute("pragma writable_schema = on")
        db.execute(f"update sqlite_schema set sql = {change} where name = 'requests_by_time'")


def broken_index(path: Path) -> None:
    wrong_schema(path, "replace(sql, '(time)', '(session)')")


def broken_letters(path: Path) -> None:
    wrong_schema(path, "replace(sql, '(time)', cast(x'e4' as text))")


def open_database(path: Path) -> None:
    (path / "ccmux.db").chmod(0o644)


def open_config(path: Path) -> None:
    text = '[[providers]]\nname = "x"\ntype = "openai"\napi_key = "sk-in-the-file"\n'
    write_config(path, text).chmod(0o644)


def no_database(path: Path) -> None:
    (path / "ccmux.db").write_bytes(b"no database" * 100)


def settings_elsewhere(path: Path) -> None:
    settings_of(path, b'{"env": {"ANTHROPIC_BASE_URL": "http://elsewhere.example"}}')


def settings_broken(path: Path) -> None:
    settings_of(path, b"{,}", "settings.local.json")


def config_broken(path: Path) -> None:
    (path / "config.toml").write_text("[router]\ndefualt = 1")


@pytest.mark.parametrize(
    ("break_it", "env", "said"),
    [
        pytest.param(broken_sum, {}, "balance of user local differs from its rows", id="sums"),
        pytest.param(broken_index, {}, "missing from index requests_by_time", id="index"),
        pytest.param(broken_letters, {}, "codec can't decode", id="letters"),
        pytest.param(
            no_database, {}, "file is not a database; [server] database says where", id="no-database"
        ),
        pytest.param(open_database, {}, "others can read", id="database-mode"),
        pytest.param(open_config, {}, "others can read", id="config-mode"),
        pytest.param(settings_elsewhere, {}, "sends Claude Code to http://elsewhere.example", id="settings"),
        pytest.param(settings_broken, {}, "not valid JSON", id="settings-broken"),
        pytest.param(config_broken, {}, "did you mean 'default'?", id="config"),
        pytest.param(None, {"ANTHROPIC_BASE_URL": "http://x.example/"}, "see `ccmux.py env`", id="base-url"),
        pytest.param(None, {"CLAUDE_CODE_USE_BEDROCK": "1"}, "CLAUDE_CODE_USE_BEDROCK is set", id="bedrock"),
    ],
)
def test_doctor_finds(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Any, env: dict[str, str], said: str
) -> None:
    write_config(tmp_path)
    enter(tmp_path / "ccmux.db", (TODAY, settlement("r1", "local")))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if break_it:
        break_it(tmp_path)
    ran = cli("doctor")
    assert ran.status == 1
    failed = words_of(ran, "FAILED")
    assert said in "\n".join(failed)
    assert not [line for line in failed if line.count(str(tmp_path / "ccmux.db: ")) > 1]
    assert "sk-in-the-file" not in ran.out


@pytest.mark.parametrize(
    ("env", "said"),
    [
        pytest.param({"ANTHROPIC_API_KEY": "a", "ANTHROPIC_AUTH_TOKEN": "b"}, "are both set", id="two-credentials"),
        pytest.param({"ANTHROPIC_MODEL": "opus"}, "asks for opus whatever /model says", id="model"),
        pytest.param({"HTTPS_PROXY": "http://proxy.example"}, "NO_PROXY lacks 127.0.0.1", id="proxy"),
        pytest.param({"HTTPS_PROXY": "p", "NO_PROXY": "127.0.0.11"}, "export NO_PROXY=127.0.0.11,127.0.0.1", id="no-proxy"),
    ],
)  # fmt: skip
def test_doctor_notes(cli: Cli, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], said: str) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ran = cli("doctor")
    assert (ran.status, said in "\n".join(words_of(ran, "note"))) == (0, True)


def test_doctor_tells_a_home_that_cannot_be_used(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / ".ccmux").write_text("")
    ran = cli("doctor")
    assert (ran.status, ran.err) == (1, "")
    assert words_of(ran, "FAILED") == [f"{tmp_path / '.ccmux'}: File exists"]


@pytest.mark.parametrize("args", ["check", "check --live", "doctor"])
def test_checks_without_an_output(tmp_path: Path, args: str) -> None:
    """As for their status alone."""
    write_config(tmp_path)
    ran = in_shell(tmp_path, f'exec "$0" "$1" {args} >&-')
    assert ran == Ran(0, "", "")


@pytest.mark.parametrize("env", [{"NO_PROXY": "*"}, {"NO_PROXY": "", "no_proxy": "127.0.0.1"}])
def test_doctor_knows_a_good_no_proxy(cli: Cli, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in {"HTTPS_PROXY": "http://proxy.example", "CLAUDE_CODE_USE_VERTEX": "0", **env}.items():
        monkeypatch.setenv(name, value)
    out = cli("doctor").out
    assert "NO_PROXY" not in out and "VERTEX" not in out


# The status line.


def test_statusline(tmp_path: Path) -> None:
    write_config(tmp_path)
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    store = ccmux.Store(str(tmp_path / "ccmux.db"))
    store.add_user("anna", 5_000_000)
    store.close()
    enter(
        tmp_path / "ccmux.db", (now, settlement("r1", "anna")), (now, settlement("r2", "anna", session="s2")),
        (now, settlement("r3", "local")),
    )  # fmt: skip
    told = json.dumps({"session_id": "s2", "model": {"id": "x", "display_name": "Sonnet"}})
    ran = process(tmp_path, "statusline", stdin=told)
    assert ran == Ran(
        0, "Sonnet | p/claude-sonnet-5-5 (default) | session $0.0570 | today $0.1140 | balance $4.89\n", ""
    )
    assert process(tmp_path, "statusline", stdin="no json").out == "today $0.0570\n"


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.parametrize("name", ["ccmux.py", "ccmux", "cc.mux", "my-proxy.py", "a:b/ccmux.py"])
@pytest.mark.parametrize("is_link", [True, False], ids=["link", "copy"])
def test_the_status_line_that_setup_writes_runs(tmp_path: Path, name: str, is_link: bool) -> None:
    """Whatever the file is called, and where only a link to it is on the PATH; in whatever project."""
    sprung = set_traps(tmp_path)
    started = tmp_path / "my bin" / name
    started.parent.mkdir(parents=True)
    started.symlink_to(CCMUX) if is_link else shutil.copy(CCMUX, started)
    write_config(tmp_path)
    enter(tmp_path / "ccmux.db", (TODAY, settlement("r1", "local")))
    environment = process_environment(tmp_path, PYTHONDONTWRITEBYTECODE="1")
    subprocess.run([sys.executable, started, "setup"], cwd=tmp_path, env=environment, check=True)
    command = json.loads((tmp_path / ".claude/settings.json").read_bytes())["statusLine"]["command"]
    ran = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, input="{}", capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "today $0.0000\n")
    assert not sprung.exists()


@pytest.mark.parametrize("python", ["C:\\Python\\python.exe", "C:\\Program Files (x86)\\Python\\python.exe"])
def test_the_status_line_on_windows(python: str) -> None:
    """Git Bash eats backslashes, and PowerShell runs no first word in quotes; cmd takes all of it."""
    words = [python, "C:\\Users\\JOE~1\\ccmux.py", "statusline", "--config", "C:\\my files\\ccmux.toml"]
    command = ccmux.windows_shell(words)
    bash = subprocess.run(
        ["sh", "-c", f'printf "%s\n" {command}'], capture_output=True, text=True, check=True
    )
    assert bash.stdout.splitlines() == [word.replace("\\", "/") for word in words]
    assert command.startswith('"') == (" " in python)


def test_statusline_is_utf8_in_any_locale(tmp_path: Path) -> None:
    told = '{"session_id": "s", "model": {"display_name": "Größe \\ud83d\\ude00 \\ud83d"}}'
    for command in (["statusline"], ["--config=c.toml", "statusline"]):
        ran = process(tmp_path, *command, stdin=told, PYTHONIOENCODING="cp1252", LC_ALL="C.UTF-8")
        assert (ran.status, ran.err) == (0, "") and ran.out.startswith("Größe 😀 \\ud83d | ")


def test_statusline_with_a_closed_input(tmp_path: Path) -> None:
    ran = in_shell(tmp_path, 'exec "$0" "$1" statusline <&-')
    assert (ran.status, ran.err) == (0, "")


@pytest.mark.parametrize("text", ["not TOML", "[server]\ndatabase = 5"])
def test_statusline_never_fails(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    ran = process(tmp_path, "statusline", "--config", "mine.toml")
    assert (ran.status, ran.err) == (0, "") and ran.out.startswith("ccmux: no figures (")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('baseURL = "/"\ntitle = "a site"\n[server]\nport = 1\n[[models]]\n', id="hugo"),
        pytest.param('[server]\nport = 1\ndatabase = "x"\n', id="of-a-server"),
        pytest.param('[build]\ntarget = "wasm32"\n', id="rust"),
        pytest.param("not TOML", id="not-toml"),
        pytest.param(f"a = {'[' * 5000}", id="deep"),
        pytest.param("", id="empty"),
    ],
)
def test_statusline_passes_over_a_projects_own_config(tmp_path: Path, text: str) -> None:
    project, home = tmp_path / "project", tmp_path / ".ccmux"
    for folder in (project, home):
        folder.mkdir()
    enter(home / "ccmux.db", (TODAY, settlement("r1", "local")))
    (project / "config.toml").write_text(text)
    ran = in_shell(tmp_path, 'cd project; "$0" "$1" statusline')
    assert ran == Ran(0, "today $0.0000\n", "")
    ran = in_shell(tmp_path, 'cd project; "$0" "$1" check')  # the others tell what to do
    assert ran.status == 0 or ran.err.endswith(
        "; if it is another program's file, name ccmux's with --config\n"
    )
    write_config(project)
    assert "no figures" in in_shell(tmp_path, 'cd project; "$0" "$1" statusline').out
    process(tmp_path, "setup")  # without any config, so its server is that of ~/.ccmux
    command = json.loads((tmp_path / ".claude/settings.json").read_bytes())["statusLine"]["command"]
    assert in_shell(project, command).out == "today $0.0000\n"


def test_statusline_loads_no_more_than_it_needs(tmp_path: Path) -> None:
    """It is asked for at every turn: by the command that `setup` writes, which uses the compiled file, and without
    aiohttp, it takes 35 ms more than a bare Python's start.
    """
    (tmp_path / "app").mkdir()
    shutil.copy(CCMUX, tmp_path / "app")
    enter(tmp_path / "ccmux.db", (TODAY, settlement("r1", "local")))
    write_config(tmp_path)
    environment = process_environment(tmp_path, PYTHONPATH=str(tmp_path / "app"))
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-P", "-m", "ccmux", "statusline"],
        env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "sqlite3" in done.stderr
    assert "aiohttp" not in done.stderr and "asyncio" not in done.stderr


# code


def fake_claude(folder: Path, script: str) -> str:
    """A PATH on which `claude` is this shell script."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/claude").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin/claude").chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def started_code(folder: Path, path: str, **options: Any) -> subprocess.Popen[str]:
    """`ccmux.py code` under way, with this PATH."""
    return subprocess.Popen(
        [sys.executable, CCMUX, "code"], cwd=folder, env=process_environment(folder, PATH=path), text=True,
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, **options},
    )  # fmt: skip


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return True
    except OSError:
        return False


def test_code_starts_runs_and_stops(tmp_path: Path) -> None:
    path = fake_claude(
        tmp_path,
        'env | grep -E "^(ANTHROPIC|CLAUDE|MALLOC|NO_PROXY)" | sort; for a in "$@"; do echo "<$a>"; done; exit 7',
    )
    port = closed_port()
    write_config(tmp_path, port=port)
    more = {"ANTHROPIC_API_KEY": "sk-real", "NO_PROXY": "corp.example"}
    ran = process(tmp_path, "code", "-p", "say hi", "--version", "", PATH=path, **more)
    assert ran.status == 7
    assert ran.out.splitlines() == [
        "ANTHROPIC_AUTH_TOKEN=ccmux-local", f"ANTHROPIC_BASE_URL=http://127.0.0.1:{port}",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL=claude-haiku-4-5", "CLAUDE_CODE_AUTO_MODE_SERVER=0",
        "CLAUDE_CODE_GATEWAY_HINT_HEADERS=1",
        "NO_PROXY=corp.example,127.0.0.1",
        "<-p>", "<say hi>", "<--version>", "<>",
    ]  # fmt: skip
    place = f"http://127.0.0.1:{port} by this folder's config.toml"
    assert ran.err == f"ccmux: starting at {place}, its log is {tmp_path / 'ccmux.log'}\n"
    assert (tmp_path / "ccmux.log").stat().st_mode & 0o777 == 0o600
    assert not answers(port)


async def test_code_leaves_a_running_server(tmp_path: Path, start_ccmux: Any) -> None:
    path = fake_claude(tmp_path, 'echo "$ANTHROPIC_BASE_URL"')
    async with start_ccmux(provider_row()) as running:
        port = running.port
        other = tmp_path / "other"
        other.mkdir()
        write_config(other, port=port)
        ran = await asyncio.to_thread(process, other, "code", PATH=path)
        place = f"{running.url} by this folder's config.toml"
        assert ran == Ran(0, f"{running.url}\n", f"ccmux: using the one at {place}\n")
        named = ("--config", str(other / "config.toml"))
        ran = await asyncio.to_thread(process, other, "code", *named, PATH=path)
        assert ran == Ran(0, f"{running.url}\n", "")
        assert answers(port)


async def test_two_codes_at_once_share_a_server(tmp_path: Path) -> None:
    both = 'echo here >> both; for i in $(seq 200); do [ "$(wc -l < both)" = 2 ] && exit; sleep 0.1; done; exit 1'
    path = fake_claude(tmp_path, f"cd {tmp_path}; {both}")
    write_config(tmp_path, port=closed_port())
    ran = await asyncio.gather(*(asyncio.to_thread(process, tmp_path, "code", PATH=path) for _ in range(2)))
    assert [r.status for r in ran] == [0, 0]
    assert sum("starting at" in r.err for r in ran) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("require_key = true", "set CCMUX_KEY to one", id="needs-a-key"),
        pytest.param(
            'database = "/nonexistent/x.db"', "database /nonexistent/x.db", id="server-does-not-start"
        ),
    ],
)
def test_code_that_cannot_start(tmp_path: Path, text: str, said: str) -> None:
    write_config(tmp_path, text)
    ran = process(tmp_path, "code", PATH=fake_claude(tmp_path, "echo never"))
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err.splitlines()[-1]


def test_code_runs_no_claude_of_the_folder_it_is_in(tmp_path: Path) -> None:
    """As Windows would, where a PATH need not say so for that."""
    fake_claude(tmp_path, "echo never")
    ran = process(tmp_path, "code", PATH=f"bin:{os.environ['PATH']}")
    assert (ran.status, ran.out, ran.err.count("\n")) == (
        2,
        "",
        1,
    ) and "is bin/claude of this folder" in ran.err


def test_code_beside_a_stranger(tmp_path: Path) -> None:
    with web_server({}) as port:
        write_config(tmp_path, port=port)
        ran = process(tmp_path, "code", PATH=fake_claude(tmp_path, "echo never"))
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "something else answers" in ran.err


def test_code_beside_settings_that_lead_elsewhere(tmp_path: Path) -> None:
    """Claude Code (2.1.330) takes its settings' variables over those it is started with."""
    port = closed_port()
    write_config(tmp_path, port=port)
    path = fake_claude(tmp_path, "echo ran")
    for name, value, said in (
        ("ANTHROPIC_BASE_URL", "https://api.z.ai/api/anthropic", "https://api.z.ai/api/anthropic"),
        ("CLAUDE_CODE_USE_BEDROCK", "1", "what CLAUDE_CODE_USE_BEDROCK means"),
        ("CLAUDE_CODE_USE_BEDROCK", "0", ""),
        ("ANTHROPIC_BASE_URL", f"http://localhost:{port}/", ""),
    ):
        settings_of(tmp_path, json.dumps({"env": {name: value}}).encode())
        ran = process(tmp_path, "code", PATH=path)
        assert (ran.status, ran.out) == ((2, "") if said else (0, "ran\n"))
        assert (f"settings.json sends Claude Code to {said}, whatever `code` says" in ran.err) == bool(said)


def test_setup_and_code_leave_no_other_cloud(tmp_path: Path) -> None:
    write_config(tmp_path)
    settings = settings_of(tmp_path, b'{"env": {"CLAUDE_CODE_USE_VERTEX": "1"}}')
    assert process(tmp_path, "setup").status == 0
    assert "VERTEX" not in settings.read_text()
    path = fake_claude(tmp_path, 'echo "[$CLAUDE_CODE_USE_BEDROCK]"')
    assert process(tmp_path, "code", PATH=path, CLAUDE_CODE_USE_BEDROCK="1").out == "[]\n"
    settings.write_text(settings.read_text() + "\n")  # changed since
    assert process(tmp_path, "setup", "--undo").status == 0
    assert json.loads(settings.read_text()) == {"env": {"CLAUDE_CODE_USE_VERTEX": "1"}}


def test_code_passes_signals_on(tmp_path: Path) -> None:
    path = fake_claude(tmp_path, 'trap "echo heard; exit 5" TERM; echo ready; while :; do sleep 0.05; done')
    port = closed_port()
    write_config(tmp_path, port=port)
    with started_code(tmp_path, path) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)  # claude's own to heed; ccmux goes on
        running.send_signal(signal.SIGTERM)
        assert running.stdout.read() == "heard\n"
    assert running.returncode == 5
    assert not answers(port)


def test_codes_server_ends_in_order_where_its_terminal_is_gone(tmp_path: Path) -> None:
    """Another terminal may use it: who is under way is answered."""
    path = fake_claude(tmp_path, 'trap "exit 5" TERM; echo ready; while :; do sleep 0.05; done')
    port = closed_port()
    write_config(tmp_path, port=port)
    body = ccmux.compact(proxy_harness.message_body())
    with started_code(tmp_path, path, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == "ready\n"
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")
            running.stderr.close()
            running.send_signal(signal.SIGTERM)
            until(lambda: "stopping: 1 requests" in (tmp_path / "ccmux.log").read_text(), "it drains", 20)
            client.sendall(body)
            assert client.recv(100).startswith(b"HTTP/1.1 529 ")  # to ask again, as nothing was begun


HOLD = """\
import os, pathlib, socket, time
claude = os.getppid()
with socket.create_connection(("127.0.0.1", PORT)) as client:
    head = "POST /v1/messages HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nContent-Length: 9\\r\\nExpect: 100-continue\\r\\n"
    client.sendall(f"{head}Content-Type: application/json\\r\\n\\r\\n".encode())
    client.recv(100)
    pathlib.Path("held").touch()
    while os.getppid() == claude:
        time.sleep(0.01)
"""


def test_code_is_silent_about_the_requests_that_end_with_claude(tmp_path: Path) -> None:
    wait = "while [ ! -e held ]; do sleep 0.05; done"
    path = fake_claude(tmp_path, f"{sys.executable} hold.py & {wait}; exit 3")
    port = closed_port()
    write_config(tmp_path, port=port)
    (tmp_path / "hold.py").write_text(HOLD.replace("PORT", str(port)))
    ran = process(tmp_path, "code", PATH=path)
    assert (ran.status, "waiting for requests" in ran.err) == (3, False)


def test_code_whose_log_cannot_be_written_keeps_off_the_terminal(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "ccmux.log").symlink_to("/dev/full")
    ran = process(tmp_path, "code", PATH=fake_claude(tmp_path, "exit 3"))
    assert (ran.status, ran.err.count("\n")) == (3, 1)


def test_a_killed_code_leaves_no_server(tmp_path: Path) -> None:
    path = fake_claude(tmp_path, "echo ready; exec cat > /dev/null")
    port = closed_port()
    write_config(tmp_path, port=port)
    with started_code(tmp_path, path, stdin=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        assert answers(port)
        running.kill()
        running.wait()
        assert not answers(port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_code_ended_while_its_server_starts(tmp_path: Path, number: int) -> None:
    """As SIGHUP does where the terminal is closed."""
    write_config(tmp_path)
    path = fake_claude(tmp_path, "exec sleep 30")
    with started_code(tmp_path, path, stdout=subprocess.DEVNULL) as running:
        until((tmp_path / "ccmux.db").exists, "the database is made", 20)  # made before the server answers
        running.send_signal(number)
    assert running.returncode in (128 + number, 128 + signal.SIGTERM)  # the latter where claude ran already
    until(lambda: not running_in(tmp_path), "all has ended", 20)


def running_in(folder: Path) -> list[str]:
    """The ids of the processes whose working folder this is."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(folder):
                found.append(link.parts[2])
    return found


def test_code_with_the_real_cli(tmp_path: Path, claude: Path) -> None:
    """From an empty home to an answer in one command."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/claude").symlink_to(claude)
    write_config(tmp_path)
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "TERM": "dumb"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    ran = process(tmp_path, "code", "-p", "say hi", PATH=path, **quiet)
    assert ran.status == 0, ran.err
    assert "ccmux's built-in demo provider" in ran.out


@pytest.mark.parametrize("amount", [Decimal("0.1") * n for n in range(5)])
def test_dollars_come_back_as_they_went_in(amount: Decimal) -> None:
    assert Decimal(ccmux.money(ccmux.microdollars(str(amount))).removeprefix("$")) == amount
