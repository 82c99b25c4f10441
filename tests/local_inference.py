"""Drives a real local inference server (llama.cpp) through ccmux: an opt-in check, outside the gate.

    pip install xllamacpp gguf numpy && python tests/local_inference.py

A tiny model with random weights is written as GGUF and served by llama.cpp; what it says is noise, so the check is
that noise comes through whole: streamed and not, with tools offered, in Anthropic's format, with true usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SERVE = "import sys, time, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 4096; p.port = 0;"
SERVE += "p.n_parallel = 1; p.use_jinja = True; s = x.Server(p); print(s.listening_address, flush=True); time.sleep(600)"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(path: Path) -> None:
    """A two-layer llama of random weights with a byte vocabulary."""
    import gguf
    import numpy as np

    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{n:02X}>".encode() for n in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    size, heads, layers, inner = 64, 4, 2, 128
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(size // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    rand = np.random.default_rng(7)

    def tensor(name: str, *shape: int) -> None:
        data = np.ones(shape, np.float32) if "norm" in name else rand.normal(0, 0.2, shape).astype(np.float32)
        writer.add_tensor(name, data)

    tensor("token_embd.weight", len(tokens), size)
    tensor("output_norm.weight", size)
    tensor("output.weight", len(tokens), size)
    for n in range(layers):
        for part in ("attn_norm", "ffn_norm"):
            tensor(f"blk.{n}.{part}.weight", size)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{n}.{part}.weight", size, size)
        tensor(f"blk.{n}.ffn_gate.weight", inner, size)
        tensor(f"blk.{n}.ffn_up.weight", inner, size)
        tensor(f"blk.{n}.ffn_down.weight", size, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def started(command: list[str], pattern: str, **more: Any) -> Any:
    """A process, and what the pattern finds in its first lines."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **more)
    assert child.stdout
    try:
        for line in child.stdout:
            if match := re.search(pattern, line):
                yield match[1]
                break
        else:
            raise SystemExit(f"{command[0]} ended before it served")
    finally:
        child.terminate()
        child.wait(10)


def ask(url: str, model: str, **more: Any) -> str:
    tool = {
        "name": "Bash",
        "description": "Runs a command",
        "input_schema": {"type": "object", "properties": {}},
    }
    body = {
        "model": model,
        "max_tokens": 24,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [tool],
        **more,
    }
    request = urllib.request.Request(
        f"{url}/v1/messages", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{model}: {error.code} {error.read().decode()}") from None


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "tiny.gguf")
        with started([sys.executable, "-c", SERVE, str(folder / "tiny.gguf")], r"(http\S+)") as upstream:
            rows = "".join(
                f'[[providers]]\nname = "{n}"\ntype = "{kind}"\nbase_url = "{upstream}"\napi_key = "none"\n'
                for n, kind in FORMATS.items()
            )
            (folder / "config.toml").write_text(f'[server]\nport = 0\ndatabase = "l.db"\n{rows}')
            command = [sys.executable, str(ROOT / "ccmux.py"), "--config", str(folder / "config.toml")]
            with started(command, r"ccmux \S+ at (http\S+)", env={**os.environ, "HOME": name}) as url:
                for provider in FORMATS:
                    whole = json.loads(ask(url, f"{provider}/tiny"))
                    streamed = ask(url, f"{provider}/tiny", stream=True)
                    assert whole["type"] == "message"
                    assert whole["usage"]["output_tokens"] > 0
                    assert "event: message_stop" in streamed
                    kinds = [b["type"] for b in whole["content"]]
                    print(
                        f"{provider}: whole {kinds} {whole['stop_reason']} {whole['usage']}; streamed {len(streamed)} bytes"
                    )


FORMATS = {"chat": "openai", "messages": "llamacpp"}

if __name__ == "__main__":
    asyncio.run(main())
