"""The start on a Python that lacks the packages: real virtual environments and a real pip, with wheels made here."""

from __future__ import annotations

import gc
import marshal
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import aiohttp
import fault_server as fs
import psutil
import pytest
from attacks import set_traps, until
from conftest import Start
from proxy_harness import ROOT, provider_row

import ccmux

PYTHON = "Scripts/python.exe" if os.name == "nt" else "bin/python"


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel as pip installs it, of the smallest kind."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without packages, and stand-ins for them where pip looks; `model` needs no more of them."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True)
    (folder / "wheels").mkdir()
    wheel(
        folder / "wheels", "aiohttp", "3.14.0",
        {"aiohttp/__init__.py": '__version__ = "3.14.0"\n', "aiohttp/web.py": ""},
    )  # fmt: skip
    wheel(folder / "wheels", "tiktoken", "0.9.0", {"tiktoken/__init__.py": ""})
    shutil.copy(ROOT / "ccmux.py", folder)
    return folder


def environment(bare: Path, home: Path, **more: str) -> dict[str, str]:
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(bare / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    pip["PIP_USER"] = "1"  # as some people's pip.conf has it, which pip refuses in a virtual environment
    return {"PATH": os.environ["PATH"], "HOME": str(home), **pip, **more}


def start(bare: Path, home: Path, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [bare / "python" / PYTHON, bare / "ccmux.py", *args]
    return subprocess.run(
        command, cwd=home, env=environment(bare, home, **more), capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def home(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which ccmux has set itself up."""
    home = tmp_path_factory.mktemp("home")
    done = start(bare, home, "model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("providers\n  demo")
    assert done.stderr.count("\n") == 1
    assert "aiohttp is not installed; setting up" in done.stderr
    return home


def test_second_start_says_nothing(bare: Path, home: Path) -> None:
    done = start(bare, home, "model")
    assert (done.returncode, done.stderr) == (0, "")
    assert (home / ".ccmux").stat().st_mode & 0o777 == 0o700


def test_exit_status_comes_through(bare: Path, home: Path) -> None:
    done = start(bare, home, "reprot")
    told = "ccmux: there is no command 'reprot': did you mean 'report'?\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_lost_package_is_installed_again(bare: Path, home: Path) -> None:
    ready = home / ".ccmux/venv/ccmux-ready"
    of_another_python = ready.read_text() + "0"
    shutil.rmtree(next((home / ".ccmux/venv").glob("lib/*/site-packages/aiohttp")))
    done = start(bare, home, "model")
    assert done.returncode == 2
    assert "start again to set it up anew" in done.stderr
    assert not ready.exists()
    ready.write_text(of_another_python)  # as after an upgrade of the system: the same cure
    assert "setting up" in start(bare, home, "model").stderr
    ready.write_text(of_another_python)  # two Pythons in turn do not take it from one another
    assert start(bare, home, "model").stderr == ""
    assert ready.read_text() == of_another_python


def test_interrupted_installation_is_begun_again(bare: Path, tmp_path: Path) -> None:
    """In a folder of the user's choice."""
    place, venv = {"CCMUX_VENV": "~/else where/venv"}, tmp_path / "else where/venv"
    with subprocess.Popen(
        [bare / "python" / PYTHON, bare / "ccmux.py", "model"], env=environment(bare, tmp_path, **place),
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        until((venv / "pyvenv.cfg").exists, "the installation has begun", 60)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not (venv / "ccmux-ready").exists()
    assert start(bare, tmp_path, "model", **place).returncode == 0
    assert (venv / "ccmux-ready").exists()
    assert not (tmp_path / ".ccmux").exists()


def test_half_cleared_installation_is_begun_again(bare: Path, tmp_path: Path) -> None:
    """As Ctrl-C leaves it while an upgrade clears the old one away."""
    (tmp_path / ".ccmux/venv/lib").mkdir(parents=True)
    done = start(bare, tmp_path, "model")
    assert done.returncode == 0, done.stderr


def test_two_starts_at_once_make_it_once(bare: Path, tmp_path: Path) -> None:
    """Each would clear away what the other has begun."""
    command = [bare / "python" / PYTHON, bare / "ccmux.py", "model"]
    started = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment(bare, tmp_path),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("user", "add", "--help"), ("code", "-h")])
def test_help_needs_nothing(bare: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    done = start(bare, tmp_path, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / ".ccmux").exists()


def test_version_after_code_is_claudes(bare: Path, tmp_path: Path) -> None:
    done = start(bare, tmp_path, "code", "-p", "hi", "--version", CCMUX_NO_BOOTSTRAP="1")
    assert done.returncode == 2
    assert "CCMUX_NO_BOOTSTRAP is set" in done.stderr


def test_statusline_needs_nothing(bare: Path, tmp_path: Path) -> None:
    done = start(bare, tmp_path, "statusline")
    assert (done.returncode, done.stderr) == (0, "")


def folder_of_ones_own(home: Path) -> str:
    (home / "precious").mkdir()
    (home / "precious/thesis.txt").write_text("do not delete")
    return str(home / "precious")


def unwritable(home: Path) -> str:
    (home / "file").write_text("")
    return str(home / "file" / "venv")


@pytest.mark.parametrize(
    ("venv", "more", "said"),
    [
        pytest.param(
            lambda home: "", {"CCMUX_NO_BOOTSTRAP": "1"}, "CCMUX_NO_BOOTSTRAP is set", id="told-not-to"
        ),
        pytest.param(folder_of_ones_own, {}, "is no virtual environment", id="folder-of-ones-own"),
        pytest.param(unwritable, {}, "cannot be set up: File exists", id="unwritable"),
        pytest.param(
            lambda home: "~no-such-user/x",
            {},
            "cannot be set up: no home folder is known for this",
            id="no-home",
        ),
        pytest.param(lambda home: "", {"PIP_FIND_LINKS": ""}, "pip: ERROR: ", id="no-network"),
        pytest.param(lambda home: "", {"PYTHONPATH": "no-venv"}, "lacks its venv parts", id="no-venv-module"),
    ],
)
def test_where_it_cannot_install(bare: Path, tmp_path: Path, venv, more, said: str) -> None:
    """One message with three ways to go on, exit status 2, and nobody's files touched."""
    (tmp_path / "no-venv").mkdir()
    (tmp_path / "no-venv/venv.py").write_text("raise ImportError('No module named venv')\n")
    more = {**more, "CCMUX_VENV": venv(tmp_path)}
    if more.get("PYTHONPATH"):
        more["PYTHONPATH"] = str(tmp_path / "no-venv")
    done = start(bare, tmp_path, "model", **more)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()[-4:]] == [
        "pip", "then start it with ccmux-venv/bin/python ccmux.py", "uv", "apt",
    ]  # fmt: skip
    if (tmp_path / "precious").exists():
        assert (tmp_path / "precious/thesis.txt").read_text() == "do not delete"


def test_aiohttp_that_is_too_old(bare: Path, tmp_path: Path) -> None:
    """Debian 12's own aiohttp is 3.8: it can be imported, and lacks what ccmux uses."""
    (tmp_path / "old/aiohttp").mkdir(parents=True)
    (tmp_path / "old/aiohttp/__init__.py").write_text('__version__ = "3.8.4"\n')
    (tmp_path / "old/aiohttp/web.py").write_text("")
    (tmp_path / "old/tiktoken.py").write_text("")
    done = start(bare, tmp_path, "model", PYTHONPATH=str(tmp_path / "old"), CCMUX_NO_BOOTSTRAP="1")
    assert done.returncode == 2
    assert "aiohttp 3.8.4 is too old" in done.stderr


async def test_a_server_imports_nothing_from_the_folder_it_is_started_in(
    start_ccmux: Start, tmp_path: Path
) -> None:
    """It starts again as `python -c`, for which Python would look there first; so does the process that counts."""
    sprung = set_traps(tmp_path)
    async with start_ccmux(provider_row()) as running:
        ran = Path(f"/proc/{running.process.pid}/cmdline")  # the same pid, and still named
        assert not ran.exists() or str(ROOT / "ccmux.py") in ran.read_text().split("\0")
    counts = subprocess.run(
        [sys.executable, ROOT / "ccmux.py", ccmux.COUNT_TEXTS, "o200k_base"], cwd=tmp_path,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert (marshal.loads(counts.stdout), sprung.exists()) == ("o200k_base", False)


def test_the_bootstrap_imports_nothing_from_the_folder_it_is_started_in(bare: Path, tmp_path: Path) -> None:
    """Which may hold a pip.py or an aiohttp.py, whether it installs the packages or looks for another Python's."""
    sprung, ready = set_traps(tmp_path), tmp_path / ".ccmux/venv/ccmux-ready"
    assert start(bare, tmp_path, "model").returncode == 0
    ready.write_text(ready.read_text() + "0")
    done = start(bare, tmp_path, "model")
    assert (done.returncode, done.stderr, sprung.exists()) == (0, "", False)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux keeps no syntax tree")
async def test_a_server_runs_from_its_compiled_code(start_ccmux: Start) -> None:
    async with start_ccmux(provider_row()) as running:
        process = Path(f"/proc/{running.process.pid}")
        assert "marshal.load" in (process / "cmdline").read_text()
        assert not [file for file in process.glob("fd/*") if "memfd" in os.readlink(file)]  # a megabyte


def in_shell(setting: str, *args: str) -> list[str]:
    """The command line of ccmux after a shell's setting."""
    return ["sh", "-c", f'{setting}; exec "$0" "$@"', sys.executable, str(ROOT / "ccmux.py"), *args]


@pytest.mark.skipif(os.name == "nt", reason="has no such shell")
@pytest.mark.parametrize(
    ("setting", "command", "status"),
    [
        ("ulimit -f 100", "serve", 2),
        ("exec <&-", "serve", 2),
        ("exec >&-", "serve", 2),
        ("exec >&-", "env", 0),
    ],
)
def test_a_start_without_room_for_the_compiled_code_or_an_output(
    setting: str, command: str, status: int, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("wrong = 1\n" if status else "")
    shell = in_shell(setting, command)
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1 if status else 0)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux keeps no syntax tree")
def test_the_compiled_code_does_not_become_a_closed_output(tmp_path: Path) -> None:
    """The server would print into whatever file it opens next."""
    (tmp_path / "config.toml").write_text(provider_row())
    with subprocess.Popen(in_shell("exec >&-", "--port", "0"), cwd=tmp_path) as process:
        try:
            started = psutil.Process(process.pid)
            until(started.net_connections, "it listens", 60)
            assert "-c" not in started.cmdline()
        finally:
            process.kill()


def test_packages_are_those_of_the_script_block() -> None:
    """`uv run --script` and the bootstrap install the same."""
    text = (ROOT / "ccmux.py").read_text("utf-8")
    for package in ccmux.PACKAGES:
        assert f'"{package}"' in text.partition('"""')[0]


def test_certificates_are_read_when_they_are_needed() -> None:
    """As the standard library would have read them while aiohttp was imported."""
    code = """
import ccmux, aiohttp
[context] = ccmux.BARE
assert context is aiohttp.connector._SSL_CONTEXT_VERIFIED and context.check_hostname
assert context.verify_mode == ccmux.ssl.CERT_REQUIRED and context.cert_store_stats()["x509"] == 0
ccmux.read_certificates()
ccmux.read_certificates()
assert context.cert_store_stats() == ccmux.ssl.create_default_context().cert_store_stats() != {}
print(context.cert_store_stats()["x509"], ccmux.BARE)
"""
    trusts = {**os.environ, "SSL_CERT_FILE": str(fs.CERTIFICATE), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=trusts)
    assert (done.stdout, done.stderr) == ("1 []\n", "")


async def test_a_connection_by_tls_waits_for_the_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        def load_default_certs(self) -> None:
            read.append(threading.current_thread() is not threading.main_thread())

    read: list[bool] = []
    monkeypatch.setattr(ccmux, "BARE", [Context()])
    async with (
        fs.FaultServer(fs.answer()) as plain,
        fs.FaultServer(tls=True) as tls,
        ccmux.upstream_session() as session,
    ):
        async with session.post(f"{plain.url}/v1/messages", json={}):
            assert read == []
        for _ in range(2):
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.post(f"{tls.url}/v1/messages", json={})
            assert read == [True]


def test_main_has_the_collector_work_again() -> None:
    gc.disable()
    try:
        with pytest.raises(SystemExit):
            ccmux.main(["--version"])
        assert gc.isenabled()
    finally:
        gc.enable()
