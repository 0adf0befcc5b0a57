"""A real process of the simulated engine for tests, on a port from the kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

import httpx
import psutil

from enova_testing.waiting import until

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
TINY_CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 1024,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
_URL = re.compile(r"API server 0 on (http://\S+)")


def write_tiny_model(folder: Path) -> Path:
    """A folder that holds the config.json of a tiny model with a context of 2,048 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


class SimulatedEngine:
    """`with SimulatedEngine(tmp_path, "--max-num-seqs", "4") as engine:` serves when the block begins.

    The log lies in `folder`. `start_s` is model seconds; `wait=False` does not wait until it serves.
    """

    def __init__(
        self, folder: Path, *words: str, model: str = MODEL, start_s: float | None = 0.0, wait: bool = True,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        start = [] if start_s is None else ["--simulated-start-s", str(start_s)]
        self.command = [
            sys.executable, "-m", "enova_simulator.engine", "serve", model, "--port", "0",
            "--max-model-len", "2048", *start, *words,
        ]  # fmt: skip
        self._wait = wait
        self._environment = {**os.environ, **(environment or {})}
        self._log_path = folder / f"engine-{id(self)}.log"
        self._log_file: IO[bytes] | None = None
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> SimulatedEngine:
        self._log_file = self._log_path.open("wb")
        self.process = subprocess.Popen(
            self.command, stdout=self._log_file, stderr=self._log_file, env=self._environment, start_new_session=True
        )
        if self._wait:
            until(lambda: "startup complete" in self.log or self.process.poll() is not None, timeout_s=30)
            assert self.process.poll() is None, self.log
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._log_file is not None:
            self._log_file.close()

    @property
    def log(self) -> str:
        """All that it wrote so far."""
        return self._log_path.read_text()

    @property
    def url(self) -> str:
        """Where it serves."""
        match = _URL.search(self.log)
        assert match, self.log
        return match[1]

    @property
    def core(self) -> psutil.Process:
        """Its core process."""
        return next(
            child for child in psutil.Process(self.process.pid).children() if "EngineCore" in " ".join(child.cmdline())
        )

    def exit_code(self, timeout_s: float = 15.0) -> int:
        """Wait for its end."""
        return self.process.wait(timeout_s)

    def metrics(self) -> dict[str, float]:
        """Every series without its engine and model labels."""
        text = httpx.get(f"{self.url}/metrics").text
        values = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, number = line.rpartition(" ")
                name = re.sub(r'(engine|model_name)="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")
                values[name] = float(number)
        return values

    def complete(self, prompt: str | list[int] = "hello", **body: object) -> httpx.Response:
        """One completion that does not stream; `max_tokens` is kept to by ignore_eos."""
        content = {"prompt": prompt, "ignore_eos": True, **body}
        return httpx.post(f"{self.url}/v1/completions", json=content, timeout=60)
