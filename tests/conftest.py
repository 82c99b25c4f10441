"""What all tests share: `import ccmux` from the repository's root, and ccmux as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import vocabulary
from claude_cli import NoCliError, install
from fakes import Fake

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


@dataclass(frozen=True, slots=True)
class Running:
    """A ccmux process that serves. `log` is what it wrote to stderr so far."""

    url: str
    config: Path
    process: asyncio.subprocess.Process
    log: list[str]


def config_for(*fakes: Fake, extra: str = "") -> str:
    """A config that sends everything to the fakes' model `tiny`, the first fake first."""
    lines = ['[router]\ndefault = "tiny"\n']
    for n, fake in enumerate(fakes):
        lines.append(
            f'[[providers]]\nname = "p{n}"\ntype = "{fake.kind}"\nbase_url = "{fake.base_url}"\n'
            f'api_key = "sk-upstream-{n}-0123456789"\n'
        )
    lines.append('[[models]]\nname = "tiny"\ncontext = 200000\n')
    for n, _ in enumerate(fakes):
        lines.append(f'[[models.mappings]]\nprovider = "p{n}"\nactual_model = "tiny"\npriority = {n + 1}\n')
    return "\n".join([*lines, extra])


@contextlib.asynccontextmanager
async def running_ccmux(
    folder: Path, text: str, *args: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[Running]:
    """ccmux as a real process on a free port, with this config; ended by SIGTERM."""
    config = folder / "config.toml"
    config.write_text(text, "utf-8")
    home = folder / "home"
    home.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "TIKTOKEN_CACHE_DIR", "LANG", "SYSTEMROOT")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "ccmux.py"), "--config", str(config), "--port", "0", *args,
        cwd=folder, env={**kept, "HOME": str(home), "PYTHONWARNINGS": "error", **(env or {})},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    log: list[str] = []
    reader = asyncio.create_task(keep_lines(process.stderr, log))
    try:
        url = await start_address(process, log)
        silent = asyncio.create_task(keep_lines(process.stdout, []))
        yield Running(url, config, process, log)
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
        await reader
    await silent
    assert process.returncode == 0, f"ccmux ended with {process.returncode}:\n" + "".join(log)


async def keep_lines(stream: asyncio.StreamReader | None, lines: list[str]) -> None:
    assert stream is not None
    while line := await stream.readline():
        lines.append(line.decode("utf-8", "replace"))


async def start_address(process: asyncio.subprocess.Process, log: list[str]) -> str:
    """The address in the start-up text."""
    assert process.stdout is not None
    said = ""
    async with asyncio.timeout(60):
        while line := await process.stdout.readline():
            said += line.decode()
            if found := re.search(r"http://127\.0\.0\.1:\d+", said):
                return found[0]
    await process.wait()
    raise AssertionError(f"ccmux did not start: {said}{''.join(log)}")


Start = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def start_ccmux(tmp_path: Path) -> Start:
    """`async with start_ccmux(config_text) as running`: ccmux as a process, in this test's own folder."""
    return lambda text, *args, env=None: running_ccmux(tmp_path, text, *args, env=env)


@pytest.fixture(scope="session", autouse=True)
def vocabularies() -> None:
    """tiktoken's files for all tests, so that none of them reaches for the network."""
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        return
    try:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(vocabulary.filled(vocabulary.cache_dir()))
    except RuntimeError as error:
        if IN_CI:
            pytest.fail(f"tiktoken's vocabularies are needed in CI: {error}")


@pytest.fixture(scope="session")
def claude() -> Path:
    """The real Claude Code CLI; skipped where it cannot be had, but never in CI."""
    try:
        return install()
    except NoCliError as error:
        if IN_CI:
            pytest.fail(f"the Claude Code CLI is needed in CI: {error}")
        pytest.skip(f"no Claude Code CLI here: {error}")
