"""What all tests share: `import ccmux` from the repository's root, and ccmux as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import vocabulary
from claude_cli import NoCliError, install
from fakes import Fake
from proxy_harness import Proxy, as_process, provider_row

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


def config_for(*fakes: Fake, extra: str = "") -> str:
    """A config that sends everything to the fakes' model `tiny`, the first fake first."""
    lines = ['[router]\ndefault = "tiny"\n']
    for n, fake in enumerate(fakes):
        key = f"sk-upstream-{n}-0123456789"
        lines.append(provider_row(f"p{n}", fake.kind, base_url=fake.base_url, api_key=key))
    lines.append('[[models]]\nname = "tiny"\ncontext = 200000\n')
    for n, _ in enumerate(fakes):
        lines.append(f'[[models.mappings]]\nprovider = "p{n}"\nactual_model = "tiny"\npriority = {n + 1}\n')
    return "\n".join([*lines, extra])


Start = Callable[[str], AbstractAsyncContextManager[Proxy]]


@contextlib.asynccontextmanager
async def running_ccmux(folder: Path, text: str) -> AsyncIterator[Proxy]:
    """ccmux as a process, where a warning is an error; a SIGTERM ends it, and that is no failure."""
    async with as_process(folder, text, {"PYTHONWARNINGS": "error"}) as proxy:
        yield proxy
        assert proxy.process
        proxy.process.terminate()
        assert await asyncio.wait_for(proxy.process.wait(), 30) == 0, proxy.output.decode()


@pytest.fixture
def start_ccmux(tmp_path: Path) -> Start:
    """`async with start_ccmux(config_text) as running`: ccmux as a process, in this test's own folder."""
    return functools.partial(running_ccmux, tmp_path)


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """SIGINT ends a process again, in the background of a shell, too, which leaves it ignored to all it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
