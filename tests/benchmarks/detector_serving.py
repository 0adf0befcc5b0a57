"""Verdicts on incidents of a small serving cluster, in worlds that are not what the detector believes.

Worlds, incidents and what the detector is told are in `enova_testing.serving_faults`: every frame passes through the
bytes that an agent sends, with a scrape's age, late and lost frames. Arrivals and lengths are of `azure_llm_2023` conv
(where the data folder lacks it: lengths of ServeGen, Gamma arrivals). World (a) leaves out prompts above its context.

Onset, hit and false alarm are as the docs define them: a hit is a right verdict on the right object between onset and
end; from the end to 60 s later, or until nobody waits in an engine any more, nothing counts; any other verdict that is
not NORMAL is a false alarm, but UNDERUSED where one replica fewer would hold. Of a leak either of DEGRADED and
MISCONFIGURED is right, and neither is wrong before the first preemption. False alarms count by replica and stretch.
Baselines get the knob at which they raise no more false alarms than ours on quiet runs of tuning seeds (of a few
values, the most sensitive); where none does, the least sensitive.

Raw results: `events.csv.gz` (a row a detector and incident), `verdicts.csv.gz` (ours: replica, step's end, verdict,
cause, action). SEEDS seeds a world; with FULL=1, FULL_SEEDS.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from enova_recommender.detection.causes import DESTRUCTIVE
from enova_recommender.detection.episodes import Change
from enova_recommender.types import VerdictKind
from enova_testing.benchmark import Benchmark, benchmark, wilson
from enova_testing.latency_rows import splitwise_rows
from enova_testing.serving_baselines import BASELINES, GRIDS, Said, ours
from enova_testing.serving_faults import (
    CONTEXT,
    EFFICIENCY_SIGMA,
    INCIDENTS,
    LOAD,
    REPLICAS,
    WARM_S,
    Played,
    Setting,
    World,
    additive,
    kernel_times,
    play,
)
from enova_testing.serving_trace import recorded_residuals, trace

SEEDS, FULL_SEEDS = 2, 10
TUNING = ("nothing", "season", "longer_prompts", "deploy")
AFTER_S = 60.0
PAGE_AFTER_S = 60.0          # of an overload
ROOM = 0.9                   # of capacity, that one replica fewer may be used to
REQUESTS_MAX = 3_000_000
OURS = "enova"
DAY_S = 86_400.0
SLOW = ("throttle_1.2", "throttle_1.5", "throttle_2", "throttle_3", "slow_gpu_of_group", "co_runner", "hung",
        "hung_blind")  # fmt: skip
# (model, GPU, tensor-parallel size): what perf_splitwise holds, and what the kernel tables do.
ADDITIVE = (("meta-llama/Llama-2-70b-hf", "H100", 4), ("meta-llama/Llama-2-70b-hf", "A100-80G", 8),
            ("meta-llama/Llama-3.1-8B-Instruct", "A100-80G", 2))  # fmt: skip
KERNELS = (("meta-llama/Llama-3.1-70B-Instruct", "H100", 4), ("meta-llama/Llama-3.1-8B-Instruct", "H100", 1))
Task = tuple[Setting, str, int, Mapping[str, float] | None]   # the incident by name


def settings(run: Benchmark, seeds: Sequence[int]) -> list[tuple[Setting, int]]:
    """One a world and seed."""
    requests = trace(run)
    short = tuple((gap_s, prompt, output) for gap_s, prompt, output in requests if prompt <= CONTEXT)
    if len(short) < len(requests):
        run.notes["prompts"] = f"{len(requests) - len(short)} prompts above {CONTEXT} tokens are left out"
    residuals = recorded_residuals(run)
    rows = splitwise_rows(run.files("perf_splitwise", "*.csv.gz"), set())
    found = []
    for index, seed in enumerate(seeds):
        model, gpu, tensor = ADDITIVE[index % len(ADDITIVE)]
        labels = _labels(model, gpu)
        same = [row for row in rows if row.parallelism.tensor == tensor and row.label.lower() in labels]
        if same:
            found.append((Setting(
                world=World.ADDITIVE, name=f"{model} {tensor}x{gpu}", times=additive(same),
                believed=kernel_times(model, gpu, tensor), requests=short,
            ), seed))  # fmt: skip
        else:
            run.notes[f"world a, seed {seed}"] = f"perf_splitwise has no row of {model} on {tensor} x {gpu}"
        model, gpu, tensor = KERNELS[index % len(KERNELS)]
        believed = kernel_times(model, gpu, tensor)
        efficiency = math.exp(EFFICIENCY_SIGMA * float(np.random.default_rng(seed).normal()))
        for world in (World.PERTURBED, World.MATCHED):
            perturbed = world is World.PERTURBED
            found.append((Setting(
                world=world, name=f"{model} {tensor}x{gpu}", times=believed, believed=believed, requests=short,
                residuals=residuals if perturbed else (), efficiency=efficiency if perturbed else 1.0,
            ), seed))  # fmt: skip
    return found


def _labels(model: str, gpu: str) -> set[str]:
    names = {"meta-llama/Llama-2-70b-hf": "llama2-70b", "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b"}
    gpus = {"H100": "h100-80gb", "A100-80G": "a100-80gb"}
    return {f"{names.get(model, model)} {gpus.get(gpu, gpu)}".lower()}


def judged(played: Played, name: str, said: Sequence[Said]) -> dict[str, object]:
    """What one detector made of one incident."""
    incident = played.incident
    objects = {incident.replica} if incident.replica else {each.replica for each in played.placements}
    within = [each for each in said if each.replica in objects and played.onset_s < each.end_s <= played.end_s
              and (each.kind in incident.verdicts or not _is_spare(each, played))]  # fmt: skip
    within.sort(key=lambda each: each.end_s)
    hits = [each for each in within if each.kind in incident.verdicts]
    wrong = [each for each in said if _is_wrong(each, played)]
    is_seen = bool(incident.verdicts) and math.isfinite(played.onset_s)
    return {
        "world": played.setting.world.value, "setting": played.setting.name, "seed": played.seed, "detector": name,
        "incident": incident.name, "fault": is_seen, "hit": bool(hits) if is_seen else None,
        "delay_s": hits[0].end_s - played.onset_s if hits else math.nan,
        "first": within[0].kind if within and is_seen else "",
        "first_right": within[0].kind in incident.verdicts if within and is_seen else None,
        "causes": ",".join(sorted({each.cause for each in within if each.cause})),
        "kinds": ",".join(sorted({each.kind for each in said if each.replica in objects})),
        "false_alarms": _stretches(wrong, played),
        "wrong_destructive_acts": _stretches(
            [each for each in wrong if each.action in DESTRUCTIVE and _is_healthy(each, played)], played
        ),
        "wrong": ",".join(sorted({f"{each.kind}/{each.cause}" for each in wrong})),
        "knob": None, "pages": None, "quiet_node_s": None, "requests": None,
    }  # fmt: skip


def _is_wrong(said: Said, played: Played) -> bool:
    incident = played.incident
    if _is_spare(said, played):
        return False
    if played.end_s < said.end_s <= max(played.end_s + AFTER_S, played.recovered_s):
        return False
    if WARM_S < said.end_s <= played.end_s and said.kind in incident.verdicts | incident.allowed:
        return bool(incident.replica) and said.replica != incident.replica
    return True


def _is_spare(said: Said, played: Played) -> bool:
    """Whether one replica fewer would have held what came until two steps ago, as was said."""
    if said.kind != VerdictKind.UNDERUSED.value:
        return False
    until = int(said.end_s) - 10
    load = max(played.loads[max(0, until - 50) : max(1, until)], default=LOAD)
    return load <= ROOM * (REPLICAS - 1) / REPLICAS


def _is_healthy(said: Said, played: Played) -> bool:
    return not (said.replica == played.incident.replica and said.end_s > WARM_S)


def _stretches(said: Sequence[Said], played: Played) -> int:
    """Runs of the same verdict on the same replica in steps that follow each other."""
    step_s = played.told[1].step.end_s - played.told[0].step.end_s
    last: dict[tuple[str, str], float] = {}
    count = 0
    for each in sorted(said, key=lambda each: each.end_s):
        key = each.replica, each.kind
        count += each.end_s - last.get(key, -math.inf) > 1.5 * step_s
        last[key] = each.end_s
    return count


def quiet_pages(played: Played) -> tuple[int, float]:
    """Pages in time that is quiet, and how many node-seconds that is."""
    closed = {
        change.episode.id: change.episode.closed_s or math.inf
        for told in played.told for change in told.changes if change.change is Change.CLOSED
    }
    faulty = bool(played.incident.verdicts)
    from_s, until_s = (WARM_S, max(played.end_s + AFTER_S, played.recovered_s)) if faulty else (math.inf, -math.inf)
    pages = 0
    for told in played.told:
        for change in told.changes:
            episode = change.episode
            if change.change is not Change.OPENED or from_s < episode.opened_s <= until_s:
                continue
            lasts_s = closed.get(episode.id, math.inf) - episode.opened_s
            pages += episode.kind in {VerdictKind.DEGRADED, VerdictKind.MISCONFIGURED} or (
                episode.kind is VerdictKind.OVERLOADED and lasts_s > PAGE_AFTER_S
            )
    quiet = sum(not from_s < told.step.end_s <= until_s for told in played.told)
    return pages, quiet * 5.0 * REPLICAS


def _play(task: Task) -> tuple[list[dict[str, object]], list[tuple[object, ...]]]:
    """One incident in a process of its own: ours and each baseline at its knob, or at every knob while tuning."""
    setting, name, seed, knobs = task
    incident = next(each for each in INCIDENTS if each.name == name)
    played = play(setting, incident, seed=seed, capacity_rps=setting.capacity_rps())
    rows = [judged(played, OURS, ours(played))]
    for other, baseline in BASELINES.items():
        values = GRIDS[other] if knobs is None else (knobs[other],)
        rows += [{**judged(played, other, baseline(played, knob)), "knob": knob} for knob in values]
    pages, node_s = quiet_pages(played)
    rows[0] |= {"pages": pages, "quiet_node_s": node_s, "requests": played.requests}
    return rows, [(setting.world.value, seed, incident.name, *_plain(each)) for each in ours(played)]


def _plain(said: Said) -> tuple[str, float, str, str, str]:
    return said.replica, said.end_s, said.kind, said.cause, said.action.value


def tuned(rows: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """The most sensitive knob of each baseline that raises no more false alarms than ours."""
    alarms: dict[tuple[str, float], int] = defaultdict(int)
    limit = 0
    for row in rows:
        if row["detector"] == OURS:
            limit += int(str(row["false_alarms"]))
        else:
            alarms[str(row["detector"]), float(str(row["knob"]))] += int(str(row["false_alarms"]))
    return {
        name: next((knob for knob in grid if alarms[name, knob] <= limit), grid[-1]) for name, grid in GRIDS.items()
    }


def summary(rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The figures of one detector in one world."""
    faults = [row for row in rows if row["fault"]]
    hits = [row for row in faults if row["hit"]]
    told = [row for row in faults if row["first"]]
    slow = [row for row in told if row["incident"] in SLOW]
    apart = {each.name for each in INCIDENTS if each.apart}
    delays = [float(str(row["delay_s"])) for row in hits if row["incident"] not in apart]
    false = sum(int(str(row["false_alarms"])) for row in rows)
    interval = wilson(len(hits), len(faults))
    by_fault: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(str(row["incident"]) for row in rows):
        own = [row for row in rows if row["incident"] == name]
        seen = [row for row in own if row["fault"]]
        waits = [float(str(row["delay_s"])) for row in seen if row["hit"]]
        by_fault[name] = {
            "events": len(own), "recall": sum(bool(row["hit"]) for row in seen) / len(seen) if seen else None,
            "delay_p50_s": float(np.median(waits)) if waits else None,
            "false_alarms": sum(int(str(row["false_alarms"])) for row in own),
        }  # fmt: skip
    return {
        "recall": len(hits) / len(faults) if faults else None, "recall_low95": interval[0] if interval else None,
        "precision": len(hits) / (len(hits) + false) if hits or false else None,
        "delay_p50_s": float(np.median(delays)) if delays else None,
        "delay_p95_s": float(np.quantile(delays, 0.95)) if delays else None,
        "verdict_accuracy": sum(bool(row["first_right"]) for row in told) / len(told) if told else None,
        "degraded_accuracy": sum(bool(row["first_right"]) for row in slow) / len(slow) if slow else None,
        "hung_busy_prefill_accuracy": _hung_accuracy(rows),
        "wrong_destructive_acts": sum(int(str(row["wrong_destructive_acts"])) for row in rows),
        "false_alarms": false, "faults": len(faults), "by_fault": by_fault,
    }  # fmt: skip


def _hung_accuracy(rows: Sequence[Mapping[str, object]]) -> float | None:
    """Hung ones called hung; busy ones and long prefills not called degraded."""
    right = [
        "HUNG" in str(row["causes"]) if str(row["incident"]).startswith("hung") else "DEGRADED" not in str(row["kinds"])
        for row in rows if row["incident"] in {"hung", "hung_blind", "overload_step", "long_prefill"}
    ]  # fmt: skip
    return sum(right) / len(right) if right else None


def main() -> None:
    """Tune the baselines, play, judge, print."""
    run = benchmark("detector_serving", __doc__)
    seeds = [run.seed + index for index in range(FULL_SEEDS if run.full else SEEDS)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        tasks: list[Task] = [(setting, name, seed, None) for setting, seed in settings(run, [0]) for name in TUNING]
        knobs = tuned([row for rows, _ in pool.imap(_play, tasks) for row in rows])
        tasks = [(setting, each.name, seed, knobs) for setting, seed in settings(run, seeds) for each in INCIDENTS]
        results = pool.map(_play, tasks, chunksize=1)
    rows = [row for found, _ in results for row in found]
    run.write("events", rows)
    columns = ("world", "seed", "incident", "replica", "end_s", "kind", "cause", "action")
    run.write("verdicts", [dict(zip(columns, each, strict=True)) for _, told in results for each in told])
    own = [row for row in rows if row["detector"] == OURS]
    worlds: dict[str, dict[str, object]] = {}
    for world in World:
        here = [row for row in own if row["world"] == world.value]
        node_s = sum(float(str(row["quiet_node_s"])) for row in here)
        pages = sum(int(str(row["pages"])) for row in here)
        worlds[world.value] = {
            **summary(here), "pages": pages, "quiet_node_days": node_s / DAY_S,
            "pages_per_node_day": pages / (node_s / DAY_S) if node_s else None,
        }  # fmt: skip
    headline = [row for row in rows if row["world"] in {"a", "b"}]
    baselines = {
        name: {**summary([row for row in headline if row["detector"] == name]), "knob": knobs.get(name)}
        for name in BASELINES
    }
    requests = sum(int(str(row["requests"])) for row in own)
    if requests > REQUESTS_MAX:
        run.notes["requests"] = f"{requests} were played, above the bound of {REQUESTS_MAX}"
    run.table("ours", [{"world": name, **{key: value for key, value in each.items() if key != "by_fault"}}
                       for name, each in worlds.items()])  # fmt: skip
    run.table("by fault, all worlds", [{"incident": name, **each} for name, each in _by_fault(own)])
    run.table("baselines, worlds a and b", [
        {"detector": name, **{key: value for key, value in each.items() if key != "by_fault"}}
        for name, each in {OURS: summary([row for row in headline if row["detector"] == OURS]), **baselines}.items()
    ])  # fmt: skip
    run.notes["baselines"] = "of worlds a and b, with no more false alarms than ours on tuning seeds, where a knob can"
    run.end({
        "worlds": worlds, "baselines": baselines, "requests": requests, "seeds": len(seeds),
    })  # fmt: skip


def _by_fault(rows: Sequence[Mapping[str, object]]) -> list[tuple[str, dict[str, object]]]:
    found = summary(rows)["by_fault"]
    assert isinstance(found, dict)
    return list(found.items())


if __name__ == "__main__":
    main()
