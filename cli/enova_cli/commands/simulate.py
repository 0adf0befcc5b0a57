"""simulate: what a deployment would cost on a fleet under a trace, and whether it would hold, before it is deployed."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from enova_cli.commands.deployments import Duration
from enova_cli.commands.recommend import parse_supply
from enova_cli.context import Context, output_option, pass_context, run
from enova_cli.manifest import read_manifests
from enova_cli.output import print_answer
from enova_cli.plain import to_plain
from enova_cli.plan_process import Plain, ask_plan
from enova_cli.simulation_plot import plot_simulation
from enova_cli.workload import length_pair
from enova_common.errors import InvalidField, NotFound


@click.command()
@click.option("-f", "--file", "file", type=click.Path(path_type=Path), required=True, help="deployment.yaml.")
@click.option("--trace", type=click.Path(path_type=Path), required=True, help="Trace CSV (or .gz).")
@click.option("--fleet", required=True, help="GPUs that it may use: TYPE:COUNT,...: H100:16,L40S:8.")
@click.option("--policy", "policies", multiple=True, help="To try, or all; may be repeated. [the deployment's]")
@click.option("--start-up", type=Duration(), default="120s", show_default=True, help="Median time of a start.")
@click.option("--lengths", default="", help="prompt=512,output=128: for a trace that counts requests alone.")
@click.option("--allow-gaps", is_flag=True, help="Take long silences in the trace as they are.")
@click.option("--seed", type=int, default=1000, show_default=True, help="Of everything that is drawn.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture over time to this .svg or .png.")
@output_option
@pass_context
def simulate(
    context: Context,
    file: Path,
    trace: Path,
    fleet: str,
    policies: tuple[str, ...],
    start_up: float,
    lengths: str,
    allow_gaps: bool,
    seed: int,
    plot: Path | None,
) -> None:
    """Say what a deployment would cost under a trace, by each scaling policy, and whether its objectives would hold.

    Nothing is deployed, and no coordinator is asked. Step times are those that the recommender predicts.
    """

    async def action() -> None:
        manifests = read_manifests(file)
        if len(manifests) != 1:
            raise InvalidField(f"holds {len(manifests)} deployments: simulate one at a time", field=str(file))
        if not trace.is_file():
            raise NotFound(f"no file {trace}", reason="FILE_NOT_FOUND", field="--trace")
        if plot is not None and plot.suffix.lower() not in {".svg", ".png"}:
            raise InvalidField(f"{plot.name} is neither .svg nor .png", field="--plot")
        answer = compute({
            "deployment": to_plain(manifests[0].deployment),
            "trace": str(trace.resolve()),
            "fleet": _fleet(fleet),
            "policies": list(policies),
            "start_up_s": start_up,
            "lengths": [list(length_pair(lengths))] if lengths else [],
            "allow_gaps": allow_gaps,
            "seed": seed,
        })
        if plot is not None:
            plot_simulation(answer, plot)
        print_answer(answer, context.form, _print_table)

    run(action(), context.form)


def compute(plain: Plain) -> Plain:
    """The answer of the simulator's plan. Raises InvalidField for what cannot be simulated."""
    remedy = "take a shorter trace, or fewer policies"
    return ask_plan("simulate", plain, options={"trace", "fleet", "policy"}, remedy=remedy)


def _fleet(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parse_supply(text):
        if part["count"] < 1:
            raise InvalidField(f"{part['type']}:{part['count']} is no GPU at all", field="--fleet", remedy="H100:16")
        found[part["type"]] = found.get(part["type"], 0) + part["count"]
    if not found:
        raise InvalidField("names no GPU", field="--fleet", remedy="H100:16")
    return found


def _print_table(answer: Plain) -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("POLICY", "HOLDS", "ATTAINMENT", "USD", "GPU HOURS", "REPLICAS", "TTFT P50", "TTFT P99", "TPOT P99",
                    "WORST 5 MIN", "REFUSED", "DECISIONS"):  # fmt: skip
        table.add_column(heading)
    for row in sorted(answer["policies"], key=lambda each: (not each["holds"], each["cost_usd"])):
        table.add_row(
            row["policy"], "yes" if row["holds"] else "no", _share(row["attainment"]), f"{row['cost_usd']:.2f}",
            f"{row['gpu_hours']:.2f}", f"{min(row['replicas'])} to {max(row['replicas'])}",
            _milliseconds(row["ttft_p50_s"]), _milliseconds(row["ttft_p99_s"]), _milliseconds(row["tpot_p99_s"]),
            _share(row["worst_5_minutes"]), str(row["refused"]), str(row["acts"]),
        )  # fmt: skip
    console.print(table)
    print(f"\n{answer['requests']:,} requests in {answer['span_s'] / 60:.1f} minutes; {_promise(answer['objectives'])}")
    for variant in answer["variants"]:
        rate = variant["capacity_rps"]
        print(
            f"A replica on {variant['gpus']} x {variant['gpu_type']} costs {variant['usd_per_hour']:.2f} USD/h and "
            f"carries {rate['value']:.3g} requests/s ({rate['low']:.3g} to {rate['high']:.3g}), as predicted."
        )
    if (least := answer["least"]) is not None:
        print(
            f"Who knew the future would need {least['cost_usd']:.2f} USD at the least, if a replica carries what is "
            f"predicted{'' if least['whole_replicas'] else ' and replicas could be divided'}."
        )
    print("Policies other than enova are reimplemented from their published rules, not the products.")


def _promise(objectives: Plain) -> str:
    parts = [
        f"{name} within {objectives[key] * 1000:.0f} ms"
        for name, key in (("first token", "ttft_s"), ("gap between tokens", "tpot_s"))
        if objectives[key] is not None
    ]
    return f"it holds if {100 * objectives['attainment']:.4g} % have: {', '.join(parts) or 'an answer'}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.0f} ms"
