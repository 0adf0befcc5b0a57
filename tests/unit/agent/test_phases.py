"""Phases of a start, read from the lines that vLLM 0.32 and the simulated engine log."""

from __future__ import annotations

import pytest

from enova_agent.core.events import Phase
from enova_agent.core.phases import download, goes_on, later, phase_of

_P = "(Worker pid=7) INFO 11-21 14:18:23 [x.py:1] "


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("Resolved architecture: LlamaForCausalLM", Phase.FETCH),
        ("Time spent downloading weights for org/name: 12.3 seconds", Phase.FETCH),
        ("Starting to load model /models/x...", Phase.LOAD),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2", Phase.LOAD),
        ("Model loading took 14.99 GiB memory and 6.00 seconds", Phase.LOAD),
        ("torch.compile takes 20.00 s in total", Phase.COMPILE),
        ("Available KV cache memory: 50.00 GiB", Phase.WARM),
        ("CPU KV cache size: 2,097,152 tokens, Maximum concurrency for 2,048 tokens per request: 1024.00x", Phase.WARM),
        ("Graph capturing finished in 10 secs, took 0.50 GiB", Phase.WARM),
        ("init engine (profile, create kv cache, warmup model) took 3.51 s", Phase.WARM),
        ("Starting vLLM API server 0 on http://127.0.0.1:8000", Phase.WARM),
        ("non-default args: {'host': '127.0.0.1', 'model': '/models/x'}", None),
        ("Using max model len 2048", None),
        ("Initializing a V1 LLM engine (v0.32.0) with config: model='/models/x'", None),
        ("Enabled custom fusions: norm_quant, act_quant", None),
    ],
)
def test_a_line_names_its_phase(line: str, phase: Phase | None) -> None:
    assert phase_of(_P + line) is phase


def test_a_warning_of_what_will_not_be_done_names_none() -> None:
    line = "WARNING 11-21 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup."
    assert phase_of(line) is None


def test_phases_only_go_forward() -> None:
    assert later(None, Phase.LOAD)
    assert later(Phase.LOAD, Phase.WARM)
    assert not later(Phase.WARM, Phase.LOAD)
    assert not later(Phase.LOAD, Phase.LOAD)
    assert not later(Phase.LOAD, None)


BAR = "model-00001-of-00004.safetensors:  12%|#2        | 594M/4.98G [00:10<01:12, 60.4MB/s]"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (BAR, "model-00001-of-00004.safetensors: 12 %"),
        ("Fetching 4 files:  25%|##5       | 1/4 [00:01<00:03,  1.00s/it]", "Fetching 4 files: 25 %"),
        ("Downloading bytes: 100%|##########| 9.1G/9.1G [02:01<00:00, 75.0MB/s]", "Downloading bytes: 100 %"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01,  1.0it/s]", ""),
        ("Capturing CUDA graphs:  10%|#         | 1/10 [00:01<00:09,  1.0it/s]", ""),
    ],
)
def test_a_bar_of_a_download_says_what_and_how_much(line: str, words: str) -> None:
    assert download(line) == words
    assert (phase_of(line) is Phase.FETCH) == bool(words)


def test_the_loader_that_fetches_its_weights_is_back_in_fetch() -> None:
    assert goes_on(Phase.LOAD, BAR) is Phase.FETCH
    assert goes_on(Phase.FETCH, BAR) is None
    assert goes_on(Phase.WARM, BAR) is None
    assert goes_on(Phase.LOAD, "Resolved architecture: LlamaForCausalLM") is None
