"""The real Claude Code CLI: installed from npm into a per-user cache, and driven against a server.

It runs with an empty environment, a fresh home and a fresh working folder, so nothing of the person who runs
the tests gets in, and nothing it does stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "2.1.332"  # a release is taken by changing this line
PACKAGE = f"@anthropic-ai/claude-code@{VERSION}"


class NoCliError(Exception):
    """Why the CLI cannot be had here."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run of the CLI left: its exit status, what it printed, the text files in its working folder."""

    status: int
    stdout: str
    stderr: str
    files: dict[str, str]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The lines of `--output-format stream-json`."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    @property
    def result(self) -> dict[str, Any]:
        """The last line: what came of it, as the CLI sees it."""
        return next((m for m in reversed(self.messages) if m["type"] == "result"), {})

    def blocks(self, kind: str) -> list[dict[str, Any]]:
        """The content blocks of a kind in the messages the CLI printed, in order."""
        contents = [m["message"]["content"] for m in self.messages if m["type"] in ("assistant", "user")]
        return [b for c in contents if isinstance(c, list) for b in c if b["type"] == kind]


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ccmux-claude"


def installed(folder: Path) -> Path | None:
    """The CLI's native binary in the folder, if it is of the version wanted."""
    for manifest in sorted(folder.glob("node_modules/@anthropic-ai/claude-code-*/package.json")):
        binary = manifest.parent / ("claude.exe" if os.name == "nt" else "claude")
        if os.access(binary, os.X_OK) and json.loads(manifest.read_text("utf-8"))["version"] == VERSION:
            return binary
    return None


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Two runs of the tests at the same time install once."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install() -> Path:
    """The CLI's binary, installed if it is not there (5 s, 370 MB); NoCliError tells why it cannot be."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        if binary := installed(folder):
            return binary
        npm = shutil.which("npm")
        if npm is None:
            raise NoCliError("npm is not installed")
        if not (folder / "package.json").exists():
            (folder / "package.json").write_text('{"private": true}\n')
        flags = ["--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts"]
        command = [npm, "install", *flags, PACKAGE]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if binary := installed(folder):
            return binary
        raise NoCliError(f"npm install {PACKAGE} left no binary: {done.stderr.strip()[-300:]}")


def environment(url: str, home: Path, key: str, extra: Mapping[str, str]) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", "LANG": "C.UTF-8", "IS_SANDBOX": "1",
        "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": key, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "DISABLE_AUTOUPDATER": "1", **extra,
    }  # fmt: skip


async def run_claude(
    binary: Path,
    url: str,
    prompt: str,
    *args: str,
    env: Mapping[str, str] | None = None,
    key: str = "any-string",
    timeout: float = 120,
) -> Ran:
    """Runs `claude -p PROMPT` against the server at `url`; past `timeout` seconds it is killed, status -9."""
    flags = ["--dangerously-skip-permissions", "--output-format", "stream-json", "--verbose"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temp:
        home, work = Path(temp, "home"), Path(temp, "work")
        home.mkdir()
        work.mkdir()
        process = await asyncio.create_subprocess_exec(
            binary, "-p", prompt, *flags, *args,
            cwd=work, env=environment(url, home, key, env or {}), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(timeout):
                out, err = await process.communicate()
        except TimeoutError:
            out, err = b"", f"killed after {timeout} s".encode()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        return Ran(process.returncode or 0, out.decode(), err.decode(), text_files(work))


def text_files(folder: Path) -> dict[str, str]:
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): p.read_text("utf-8", "replace") for p in found}
