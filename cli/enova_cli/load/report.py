"""The report of a load: counts, percentiles, throughput, what it cost, as a table and one line of JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from enova_common.records import Outcome, RequestRecord

PERCENTILES = (50, 95, 99)
ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Figures of one load. Times in model seconds; a percentile of nothing is None."""

    sent: int
    served: int
    failed: int
    cut: int
    ttft_s: dict[str, float | None]
    tpot_s: dict[str, float | None]
    tokens_per_s: float
    gpu_seconds: float | None
    decisions: list[dict[str, Any]]
    errors: dict[str, int]

    def to_plain(self) -> dict[str, Any]:
        """The line of JSON that scripts read."""
        return {
            "sent": self.sent,
            "served": self.served,
            "failed": self.failed,
            "cut": self.cut,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "tokens_per_s": round(self.tokens_per_s, 3),
            "gpu_seconds": None if self.gpu_seconds is None else round(self.gpu_seconds, 3),
            "decisions": self.decisions,
        }


def summarise(
    results: Sequence[RequestRecord],
    *,
    gpu_seconds: float | None = None,
    decisions: Iterable[dict[str, Any]] = (),
) -> Report:
    """The report of these results; output tokens per model second from the first arrival to the last answer."""
    outcomes = Counter(result.outcome for result in results)
    finished = [result for result in results if result.outcome is Outcome.FINISHED]
    end = max((result.arrival_s + (result.duration_s or 0.0) for result in results), default=0.0)
    start = min((result.arrival_s for result in results), default=0.0)
    tokens = sum(result.output_tokens or 0 for result in results)
    errors = Counter(f"{result.status or 'no answer'}: {result.reason}" for result in results if result.reason)
    return Report(
        sent=len(results),
        served=len(finished),
        failed=outcomes[Outcome.FAILED] + outcomes[Outcome.REFUSED],
        cut=outcomes[Outcome.CUT],
        ttft_s=percentiles(result.ttft_s for result in finished),
        tpot_s=percentiles(result.tpot_s for result in finished),
        tokens_per_s=tokens / (end - start) if end > start else 0.0,
        gpu_seconds=gpu_seconds,
        decisions=list(decisions),
        errors=dict(errors.most_common(ERRORS_SHOWN)),
    )


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """p50, p95 and p99 of what is there, by the nearest-rank rule."""
    known = sorted(value for value in values if value is not None)

    def at(percent: int) -> float | None:
        return round(known[max(0, math.ceil(len(known) * percent / 100) - 1)], 6) if known else None

    return {f"p{percent}": at(percent) for percent in PERCENTILES}


def report_table(report: Report) -> Table:
    """The report for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "p50", "p95", "p99"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, figures in (("TTFT", report.ttft_s), ("TPOT", report.tpot_s)):
        table.add_row(name, *(_seconds(figures[f"p{percent}"]) for percent in PERCENTILES))
    return table


def summary_lines(report: Report) -> list[str]:
    """Counts, throughput and the commonest errors, a line each."""
    gpu = "" if report.gpu_seconds is None else f", {report.gpu_seconds:,.0f} GPU-seconds held"
    lines = [
        f"sent {report.sent}, served {report.served}, failed {report.failed}, cut {report.cut}",
        f"{report.tokens_per_s:,.0f} output tokens/s{gpu}, {len(report.decisions)} decisions",
    ]
    return lines + [f"{count} x {error}" for error, count in report.errors.items()]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"
