"""What is recommended for the whole fleet, as tables for people and as plain values for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from enova.v1.deployment_service_pb2 import RecommendAllocationRequest
from enova_cli import output
from enova_cli.client import Client
from enova_cli.context import Context
from enova_cli.output import print_answer
from enova_cli.plain import to_plain

TIMEOUT_S = 300.0              # the options of many deployments take half a second each
NODES_SHOWN = 4
_VARIANTS = ("DEPLOYMENT", "GPU", "REPLICAS", "KEPT", "WEIGHT", "CARRIES/S", "USD/H", "NODES")
_GPUS = ("GPU", "TOTAL", "HELD", "USD/H", "ONE MORE SAVES", "ONE MORE CARRIES/S")

Plain = dict[str, Any]


async def print_allocation(context: Context, *, headroom: float, time_limit_s: float | None) -> None:
    """Ask the coordinator what would be best for all deployments together, and show it."""
    request = RecommendAllocationRequest(headroom=headroom, time_limit_s=time_limit_s)
    async with Client(context.endpoints, context.tls) as client:
        answer = to_plain(
            await client.call(lambda stubs: stubs.deployments.RecommendAllocation(request, timeout=TIMEOUT_S))
        )
    print_answer(answer, context.form, _print_tables)


def _print_tables(answer: Plain) -> None:
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False, markup=False)
    if any(each["variants"] for each in answer["deployments"]):
        console.print(_table(_VARIANTS, _variants(answer)))
        print()
    console.print(_table(_GPUS, _gpus(answer)))
    print()
    for sentence in sentences(answer):
        print(sentence)


def _table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _variants(answer: Plain) -> Iterator[tuple[str, ...]]:
    for deployment in answer["deployments"]:
        for each in deployment["variants"]:
            yield (
                output.short(deployment["name"]),
                f"{each['gpu_type']} {each['layout']}{', as it runs now' if each['runs_now'] else ''}",
                str(each["replicas"]),
                str(sum(node["kept"] for node in each["nodes"])),
                f"{each['weight']:.0%}",
                f"{each['replicas'] * each['capacity_rps']['low']:.3g}",
                f"{each['cost_per_hour']:.2f}",
                _nodes(each["nodes"]),
            )


def _nodes(nodes: list[Plain]) -> str:
    shown = [f"{output.short(each['node'])} x{each['replicas']}" for each in nodes[:NODES_SHOWN]]
    return ", ".join(shown) + (f" and {len(nodes) - NODES_SHOWN} more" if len(nodes) > NODES_SHOWN else "")


def _gpus(answer: Plain) -> Iterator[tuple[str, ...]]:
    for each in answer["gpus"]:
        saved, gained = each["saved_per_hour"], each["gained_rps"]
        yield (
            each["gpu_type"], str(each["total"]), str(each["held"]), f"{each['price_per_hour']:.2f}",
            f"{saved:.2f}" if saved else "", f"{gained:.3g}" if gained else "",
        )  # fmt: skip


def sentences(answer: Plain) -> Iterator[str]:
    """What the tables do not say: how much is carried, how good the answer is, what is missing, what is left out."""
    yield (
        f"{answer['carried_rps']:.3g} of {answer['demand_rps']:.3g} requests/s are carried for "
        f"${answer['cost_per_hour']:.2f}/h; with the charge for starts ${answer['objective_per_hour']:.2f}/h, and "
        f"nothing that carries as much is below ${answer['bound_per_hour']:.2f}/h (gap {answer['gap']:.1%})."
    )
    proof = "is proven to be the most" if answer["carried_proven"] else "may not be the most"
    yield (
        f"What is carried {proof}; the programme took {answer['solve_s']:.2g} s of {answer['time_limit_s']:g} s. "
        f"A replica counts with {answer['capacity_basis']}, and demand with {answer['headroom']:.0%} of headroom."
    )
    for deployment in answer["deployments"]:
        name = output.short(deployment["name"])
        yield f"{name}: {deployment['grounds']}."
        for each in deployment["classes"]:
            if len(deployment["classes"]) > 1 or each["carried_rps"] < each["demand_rps"]:
                yield f"  class {each['name']}: {each['carried_rps']:.3g} of {each['demand_rps']:.3g} requests/s."
        if deployment["unmet"] is not None:
            yield f"  {unmet_words(deployment['unmet'])}"
    for each in answer["missing"]:
        yield f"Missing for all of it: {each['count']} {each['gpu_type']}, ${each['cost_per_hour']:.2f}/h."
    for each in answer["left_out"]:
        yield f"Left out: {output.short(each['object'])}: {each['reason']}."


def unmet_words(unmet: Plain) -> str:
    """What a deployment lacks, and why."""
    lacks = [
        words
        for value, words in (
            (unmet["requests_per_s"], f"{unmet['requests_per_s']:.3g} requests/s"),
            (unmet["headroom_rps"], f"{unmet['headroom_rps']:.3g} requests/s of headroom"),
            (unmet["replicas"], f"{unmet['replicas']} of its least replicas"),
        )
        if value
    ]
    return f"It lacks {' and '.join(lacks)} ({unmet['obstacle']}): {unmet['reason']}."
