"""Recorded runs of vLLM replayed through the scheduler in virtual time, with predicted step times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from enova_recommender.catalog import find_gpu, find_model
from enova_recommender.engine.events import Finished, FirstToken, Limits, Request
from enova_recommender.engine.scheduler import Scheduler
from enova_recommender.memory import fit
from enova_recommender.performance import StepTimes
from enova_recommender.types import Parallelism, Precision
from enova_testing.benchmark import read_rows
from enova_testing.latency_model import Figures
from enova_testing.latency_rows import Load, Row

BLOCK_TOKENS = 16
FAR_S = 1e7


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One recorded run: its row holds medians over the requests."""

    row: Row
    limits: Limits
    requests: tuple[tuple[float, int, int], ...]  # arrival, prompt tokens, output tokens

    def predicted(self, times: StepTimes) -> Figures:
        """Medians over the same requests, sent at the same times."""
        engine = Scheduler(self.limits, times)
        for index, (arrival, prompt, output) in enumerate(self.requests):
            engine.submit(Request(id=str(index), prompt_tokens=prompt, output_tokens=output), arrival)
        first: dict[str, float] = {}
        ttfts, tpots, last = [], [], 0.0
        for event in engine.advance(FAR_S):
            match event:
                case FirstToken():
                    first.setdefault(event.request.id, event.at_s)
                case Finished():
                    arrival, _, output = self.requests[int(event.request.id)]
                    ttfts.append(first[event.request.id] - arrival)
                    tpots.append((event.at_s - first[event.request.id]) / max(1, output - 1))
                    last = event.at_s
        tokens = sum(output for _, _, output in self.requests)
        return Figures(
            ttft_s=float(np.median(ttfts)), tpot_s=float(np.median(tpots)),
            tokens_per_s=tokens / (last - self.requests[0][0]),
        )  # fmt: skip


def replays(metas: Iterable[Path]) -> list[Replay]:
    """The runs whose metadata name a GPU, or are named after one."""
    found = []
    for path in metas:
        meta = json.loads(path.read_text(encoding="utf-8"))
        name = meta.get("hardware", {}).get("device_name") or path.name.split("_")[0].replace("RTXPRO", "RTX-PRO-")
        shape, gpu = find_model(meta["model"]), find_gpu(name)
        requests = path.with_name(path.name.replace("_meta.json", "_requests.csv.gz"))
        if shape is None or gpu is None or not requests.exists():
            continue
        rows = sorted(read_rows(requests), key=lambda row: float(row["arrival_s"]))
        engine = meta["engine_kwargs"]
        tokens = meta.get("kv_cache", {}).get("num_kv_tokens")
        blocks = tokens // BLOCK_TOKENS if tokens else fit(shape, gpu, max_num_seqs=engine["max_num_seqs"]).kv_blocks
        first = np.array([float(row["first_token_s"]) for row in rows])
        last = np.array([float(row["last_token_s"]) for row in rows])
        arrival = np.array([float(row["arrival_s"]) for row in rows])
        output = np.array([int(row["output_toks"]) for row in rows])
        found.append(Replay(
            row=Row(
                data_set="vllm_runs", engine="vllm", shape=shape, gpu=gpu, parallelism=Parallelism(),
                precision=Precision(), load=Load.BATCH, concurrency=float(engine["max_num_seqs"]),
                prompt_tokens=round(np.mean([int(row["input_toks"]) for row in rows])),
                output_tokens=round(float(output.mean())), ttft_s=float(np.median(first - arrival)),
                tpot_s=float(np.median((last - first) / np.maximum(1, output - 1))),
                tokens_per_s=float(output.sum() / (last.max() - arrival.min())), label=path.name.split("_meta")[0],
            ),
            limits=Limits(
                num_blocks=blocks, max_num_seqs=engine["max_num_seqs"],
                max_num_batched_tokens=engine["max_num_batched_tokens"], enable_prefix_caching=False,
            ),
            requests=tuple(
                (float(row["arrival_s"]), int(row["input_toks"]), int(row["output_toks"])) for row in rows
            ),
        ))  # fmt: skip
    return found
