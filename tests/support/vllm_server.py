"""A server of vLLM with our plugin, as a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import reftnoise as rn

from .waiting import wait_until

NEEDS_VLLM = "needs vllm: see examples/guides/serving.md"


def saved_base(folder: Path) -> Path:
    """The folder, with the embedded model and its tokenizer in it."""
    for part in rn.load_tiny_model():
        part.save_pretrained(folder)
    return folder


@contextmanager
def served_base(
    base: Path, log: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A running server of a base, to which adapters can be added: its address, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
    command += ["--additional-config", json.dumps({"reft": ["block_output"]})]
    command += ["--port", str(port), *options]
    variables = {
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # which an engine in this process switches off
        "HF_HUB_OFFLINE": "1",
        **(environment or {}),
    }
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=variables, start_new_session=True
        )
        try:

            def is_ready() -> bool:
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                        return bool(answer.status == 200)
                except OSError:
                    return False

            wait_until(is_ready)
            yield url, process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
