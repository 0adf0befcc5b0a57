"""How good the mix of GPUs is that the allocation chooses: on measured capacities with real prices, and as a programme.

Part 1, `perf_llm_pilot`. Capacity is the largest measured requests_per_s with n_failed 0, TTFT p90 <= 1 s and p90
between tokens <= 100 ms; encoder-decoder models are left out and named. The mix is chosen from predicted capacity: the
closed loop of 1, 2, 4, ... 128 users is predicted by the recommender's step times, and the largest number of users that
holds the limits counts. The server is not vLLM: a prefill is a step of its own (known of it), and one factor on step
times and one host time for each sequence of a batch are fitted on the other model families with the same attention
path (flash or padded, from llm_features.csv), never on the family at hand. `cold` is `low` without those two. Weights
are those of the checkpoint (`model_torch_dtype` there), in 16 bits where attention is flash, which knows no others.
The headroom is that of the prediction's own interval, and nothing else is added: `enova` counts as the product's fleet
path does, with as many users as hold the limits at steps that are longer by the factor that, by their spread, is not
exceeded in 90 of 100 cases (1.58 or 1.67 here). Beside it: `low`, the predicted rate divided by that factor, and the
middle of the prediction (`middle`) with the demand raised by 0, 15 and 30 %. A case is a model with a demand, or all
models at once over a limited supply, drawn by seed. cost_vs_optimum is the cost of the choice over that of the cheapest
mix by measured capacity; a case is carried if the measured capacity of the choice reaches the demand of every model.
Baselines have the same capacities and demand. carried_mean is the mean over cases of the worst carried share of a
model's demand, carried_cost_p50 the cost over the cases that are carried, over_predicted the share of settings that
count with more than was measured.

Part 2, `inventories`. Three fleets from files, demand worth 1, 10 and 100 GPUs, options from the recommender's own
search, some deployments spread over racks. The objective is held against a programme with a variable for each option
on each node and island, solved on its own (`proven`), or against the larger of the two bounds.
ratio_to_integer_optimum_max is over cases of both parts that are proven or bounded.

Raw results: `capacities.csv.gz` (model, gpu, gpus, measured_rps, predicted_rps, low_rps, bound_rps, cold_rps,
price), `pilot.csv.gz` (case, chooser, headroom, cost, optimum_cost, carried), `fleets.csv.gz` (inventory, gpus, seed,
objective, bound, textbook, proven, ratio, seconds, complete).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from enova_recommender import catalog
from enova_recommender.performance import KernelTimes
from enova_recommender.recommend.allocation_types import (
    AllocationRequest,
    ClassDemand,
    FleetDeployment,
    Option,
    SolveLimits,
    Spread,
    options_of,
)
from enova_recommender.recommend.capacity import factor_of
from enova_recommender.recommend.capacity_lengths import Floats, Lengths, lengths_of
from enova_recommender.recommend.search import search
from enova_recommender.recommend.search_space import SearchSpace
from enova_recommender.recommend.types import ASSURANCES, EngineSettings, InventoryNode, Objectives, Workload
from enova_recommender.types import Batch, GpuModel, ModelShape, Parallelism, Precision
from enova_testing.allocation_baselines import Instance, greedy, single_type, sliced, textbook
from enova_testing.benchmark import SAMPLES, Benchmark, benchmark, read_rows, wilson
from enova_testing.fleets import inventory, timed
from enova_testing.full_batch import full_batch

SET = "perf_llm_pilot"
USERS = (1, 2, 4, 8, 16, 32, 64, 128)
TTFT_LIMIT_S, STEP_LIMIT_S, PERCENTILE = 1.0, 0.1, 0.9
HEADROOMS = (0.0, 0.15, 0.3)  # over the middle of the prediction, for comparison
BATCH_TOKENS = 4096
LENGTH_CV = 1.0          # of prompts and answers, lognormal: the set gives their means only
LENGTH_PAIRS = 64
DEMANDS_RPS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
AMPLE = 150              # of each instance: more than any demand takes of the best one
FLEET_SEEDS = 10
FACTORS = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
SEQUENCE_S = (0.0, 0.0002, 0.0004, 0.0006, 0.0008, 0.0012, 0.002, 0.004)
EXACT = SolveLimits(time_limit_s=20.0, gap=1e-6)
INVENTORY_SEEDS = 2
INVENTORY_GPUS = (1, 10, 100)
MODELS = (
    "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-14B", "Qwen/Qwen2.5-32B-Instruct",
    "mistralai/Mistral-7B-Instruct-v0.3", "meta-llama/Llama-3.1-70B-Instruct", "Qwen/Qwen3-30B-A3B",
)
TEXTBOOK_S = 10.0
SMALL_SPACE = SearchSpace(
    max_num_seqs=(256, 64, 16), max_num_batched_tokens=(8192,), gpu_memory_utilizations=(0.9,),
    kv_cache_dtypes=("auto",),
)


Rates = Mapping[tuple[str, str], float]  # requests/s by model and instance
Prices = Mapping[str, float]             # USD an hour by instance
Counts = Mapping[tuple[str, str], int]   # by model and instance


@dataclass(frozen=True, slots=True)
class Engine:
    """What is fitted of a server: a factor on all step times, and host time for each sequence of a batch."""

    factor: float = 1.0
    sequence_s: float = 0.0


class SeparateSteps:
    """Step times of a server that computes prompts in steps of their own, between those that decode."""

    def __init__(self, times: KernelTimes, engine: Engine) -> None:
        self._times = times
        self._engine = engine

    @property
    def spread(self) -> float:
        """The error of the step times that it is made of."""
        return self._times.spread

    def step_s(self, batch: Batch) -> float:
        """Seconds of one batch."""
        return float(self.steps_s(
            batch.prefill_tokens, batch.prefill_pairs, batch.decode_sequences, batch.context_tokens
        ))

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Seconds of steps that only decode."""
        return float(np.sum(self.steps_s(0, 0, sequences, context_tokens + sequences * np.arange(steps))))

    def steps_s(
        self, prefill_tokens: npt.ArrayLike, prefill_pairs: npt.ArrayLike, decode_sequences: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
    ) -> Floats:
        """Seconds of one prefill step and one decode step; none for an empty one."""
        tokens, sequences = np.asarray(prefill_tokens, float), np.asarray(decode_sequences, float)
        prompts = self._times.steps_s(tokens, np.asarray(prefill_pairs, float), 0.0, 0.0) * (tokens > 0)
        decodes = self._times.steps_s(0.0, 0.0, sequences, np.asarray(context_tokens, float))
        return np.asarray(self._engine.factor * (prompts + decodes) + self._engine.sequence_s * sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model on an instance, with what was measured there."""

    model: str
    path: str                      # of attention in that server: flash or padded
    family: tuple[int, int]
    gpu: str
    gpus: int
    price: float
    times: KernelTimes
    lengths: Lengths
    rows: tuple[Mapping[str, str], ...]

    @property
    def measured_rps(self) -> float:
        """Its capacity by the definition; 0 if it never holds the limits."""
        rates = [
            float(row["requests_per_s"]) for row in self.rows if int(row["n_failed"]) == 0
            and float(row["ttft_p90_ms"]) <= 1e3 * TTFT_LIMIT_S and float(row["itl_p90_ms"]) <= 1e3 * STEP_LIMIT_S
        ]
        return max(rates, default=0.0)

    def at(self, users: int, engine: Engine) -> tuple[float, float, float]:
        """Predicted requests/s, 90th percentile between tokens, and that of the first token."""
        times = SeparateSteps(self.times, engine)
        found = full_batch(
            times, self.lengths, sequences=users, max_num_batched_tokens=BATCH_TOKENS, percentile=PERCENTILE
        )
        # A prompt waits for the step under way and is then computed with those that came meanwhile.
        return found.requests_per_s, found.step_s.value, 2 * found.step_s.value

    def predicted_rps(self, engine: Engine) -> float:
        """The rate at the most users that hold the limits."""
        best = 0.0
        for users in USERS:
            rate, step_s, first_s = self.at(users, engine)
            if step_s <= STEP_LIMIT_S and first_s <= TTFT_LIMIT_S:
                best = max(best, rate)
        return best

    @property
    def slowest(self) -> float:
        """The factor on step times that is not exceeded with the search's assurance."""
        return factor_of(self.times.spread, ASSURANCES[0])

    def low_rps(self, engine: Engine) -> float:
        """The rate of as many users with steps that are as long as they may be."""
        return self.predicted_rps(engine) / self.slowest

    def bound_rps(self, engine: Engine) -> float:
        """The rate of as many users as then hold the limits."""
        return self.predicted_rps(Engine(engine.factor * self.slowest, engine.sequence_s * self.slowest))

    @property
    def name(self) -> str:
        return f"{self.gpus} x {self.gpu}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A row of the raw results."""

    model: str
    gpu: str
    gpus: int
    price: float
    measured_rps: float
    predicted_rps: float
    low_rps: float           # the same with steps as long as the step times' own spread says at 90 %
    bound_rps: float         # with as many users as then hold the limits
    cold_rps: float          # low_rps without what is fitted


def settings_of(run: Benchmark) -> list[Setting]:
    """All decoder-only models on all instances with a price."""
    rows: dict[tuple[str, str, int], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows_of(run, "aggregated*.csv*"):
        rows[row["model"], row["gpu_type"], int(row["n_gpus"])].append(row)
    prices = {row["GPU"]: float(row["price"]) for row in rows_of(run, "aws_prices*.csv") if row["GPU"]}
    features = {row["model"]: row for row in rows_of(run, "llm_features*.csv")}
    linked = {row["gpu"]: row["gpu_is_nvlink"] == "True" for row in rows_of(run, "gpu_features*.csv")}
    left_out: dict[str, str] = {}
    found = []
    for (model, gpu, gpus), measured in sorted(rows.items()):
        feature, price = features.get(model), prices.get(f"{gpus} x {gpu}")
        shape, card = known_shape(model), known_gpu(gpu, linked=linked.get(f"1 x {gpu}", False))
        if feature is not None and feature["model_is_encoder_decoder"] == "TRUE":
            left_out[model] = "encoder-decoder"
        elif shape is None or card is None or price is None or feature is None:
            left_out[f"{model} on {gpus} x {gpu}"] = "model, GPU or price unknown"
        else:
            # Requests that were cut have short answers: lengths are those of runs without failures, if there are any.
            good = [row for row in measured if int(row["n_failed"]) == 0] or measured
            kinds = ("mean_input_tokens", "mean_output_tokens")
            means = [float(np.mean([float(row[kind]) for row in good])) for kind in kinds]
            workload = Workload(requests_per_s=1.0, lengths=pairs_of(*means))
            found.append(Setting(
                model=model, path="flash" if feature["model_is_flash_attention"] == "TRUE" else "padded", gpu=gpu,
                gpus=gpus, price=price, family=(shape.layers, shape.hidden_size), rows=tuple(measured),
                times=KernelTimes(
                    shape, card, parallelism=Parallelism(tensor=gpus), precision=Precision(dtype=served_as(feature))
                ),
                lengths=lengths_of(workload, prefix_caching=False),
            ))
    run.notes["left_out"] = "; ".join(f"{name}: {why}" for name, why in sorted(left_out.items()))
    return found


def served_as(feature: Mapping[str, str]) -> str:
    """The type of weights: that server's flash attention knows 16 bits alone, else a checkpoint's own is kept."""
    return "float16" if feature["model_is_flash_attention"] == "TRUE" else feature["model_torch_dtype"]


def rows_of(run: Benchmark, pattern: str) -> list[dict[str, str]]:
    """All rows of the set's files of one kind."""
    return [row for file in run.files(SET, pattern) for row in read_rows(file)]


def known_shape(model: str) -> ModelShape | None:
    """The catalogue's shape, also if the set names a model without its owner."""
    full = (name for name in sorted(catalog.models()) if name.split("/")[-1] == model)
    return catalog.find_model(model) or catalog.find_model(next(full, ""))


def known_gpu(name: str, *, linked: bool) -> GpuModel | None:
    """The catalogue's GPU: of variants the one whose link the set tells of, with the least memory."""
    exact = catalog.find_gpu(name)
    variants = [gpu for key, gpu in catalog.gpus().items() if key.split("-")[0] == name]
    board = [gpu for gpu in variants if gpu.name.endswith("PCIe") != linked] or variants
    return exact if exact in board or not board else min(board, key=lambda gpu: gpu.memory_bytes)


def pairs_of(prompt_tokens: float, output_tokens: float) -> tuple[tuple[int, int], ...]:
    """Independent lognormal lengths with these means."""
    variance = math.log(1 + LENGTH_CV**2)
    ranks = [NormalDist().inv_cdf((i + 0.5) / LENGTH_PAIRS) for i in range(LENGTH_PAIRS)]
    scale = [math.exp(rank * math.sqrt(variance) - variance / 2) for rank in ranks]
    shuffled = [scale[(37 * i) % LENGTH_PAIRS] for i in range(LENGTH_PAIRS)]
    return tuple(
        (max(1, round(prompt_tokens * a)), max(1, round(output_tokens * b)))
        for a, b in zip(shuffled, scale, strict=True)
    )


def fitted(train: Sequence[Setting]) -> Engine:
    """The factor and the host time with the least median error of throughput and of the 90th percentile."""
    def error(engine: Engine) -> float:
        logs = []
        for setting in train:
            for row in setting.rows:
                if int(row["n_failed"]) == 0:
                    rate, step_s, _ = setting.at(int(row["num_users"]), engine)
                    logs.append(math.log(1e3 * step_s / float(row["itl_p90_ms"])))
                    logs.append(math.log(rate / float(row["requests_per_s"])))
        return float(np.median(np.abs(logs)))

    engines = [Engine(factor, sequence_s) for factor in FACTORS for sequence_s in SEQUENCE_S]
    return min(engines, key=error) if train else Engine()


def capacities(settings: Sequence[Setting]) -> list[Capacity]:
    """Measured and predicted, the engine's constants from the other families."""
    engines: dict[tuple[str, tuple[int, int]], Engine] = {}
    rows = []
    for setting in settings:
        key = (setting.path, setting.family)
        if key not in engines:
            others = [s for s in settings if s.path == setting.path and s.family != setting.family]
            engines[key] = fitted(others)
        rows.append(Capacity(
            model=setting.model, gpu=setting.gpu, gpus=setting.gpus, price=setting.price,
            measured_rps=setting.measured_rps, predicted_rps=setting.predicted_rps(engines[key]),
            low_rps=setting.low_rps(engines[key]), bound_rps=setting.bound_rps(engines[key]),
            cold_rps=setting.low_rps(Engine()),
        ))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Demand of one model or of several, and how many of each instance there are."""

    name: str
    demand_rps: Mapping[str, float]
    supply: Mapping[str, int]


def cases(run: Benchmark, rows: Sequence[Capacity]) -> list[Case]:
    """Each model at each demand with all that is needed; then all at once, over a supply that is short of some."""
    found = []
    models = sorted({row.model for row in rows if row.measured_rps > 0})
    names = sorted({f"{row.gpus} x {row.gpu}" for row in rows})
    for model in models:
        ample = dict.fromkeys(names, AMPLE)
        found += [Case(name=f"{model} {rate:g}/s", demand_rps={model: rate}, supply=ample) for rate in DEMANDS_RPS]
    for seed in range(run.seed, run.seed + FLEET_SEEDS):
        draw = np.random.default_rng(seed)
        demand = {model: float(np.exp(draw.uniform(np.log(2), np.log(60)))) for model in models}
        supply = {name: int(draw.integers(2, 13)) for name in names}
        found.append(Case(name=f"fleet {seed}", demand_rps=demand, supply=supply))
    return found


def request_of(case: Case, rates: Rates, prices: Prices, headroom: float) -> AllocationRequest:
    """A node for each instance of the supply, an option for each model on it."""
    cards: dict[str, GpuModel] = {}
    nodes: list[InventoryNode] = []
    plain = next(iter(catalog.gpus().values()))
    for name, count in case.supply.items():
        gpus = int(name.split(" x ")[0])
        cards[name] = replace(plain, name=name, price_per_hour=prices[name] / gpus)
        nodes += [InventoryNode(name=f"{name} {i}", gpu=cards[name], gpus=gpus, island_gpus=gpus) for i in range(count)]
    deployments = []
    for model, demand in case.demand_rps.items():
        options = tuple(
            Option(name=name, settings=engine_on(cards[name], int(name.split(" x ")[0])), capacity_rps=rate)
            for (owner, name), rate in sorted(rates.items()) if owner == model and rate > 0 and name in cards
        )
        deployments.append(FleetDeployment(
            name=model, options=options, headroom=headroom, classes=(ClassDemand(name="all", requests_per_s=demand),),
        ))
    return AllocationRequest(nodes=tuple(nodes), deployments=tuple(deployments), start_hours=0.0)


def engine_on(gpu: GpuModel, gpus: int) -> EngineSettings:
    """An engine on all GPUs of an instance."""
    return EngineSettings(
        gpu=gpu, parallelism=Parallelism(tensor=gpus), precision=Precision(), max_num_seqs=128,
        max_num_batched_tokens=BATCH_TOKENS, gpu_memory_utilization=0.9, max_model_len=2048,
    )


def chosen(case: Case, rates: Rates, prices: Prices, headroom: float) -> tuple[Counts, float]:
    """Our choice, and its ratio to its own bound."""
    _, found = timed(request_of(case, rates, prices, headroom))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for replica in found.replicas:
        counts[replica.deployment, replica.option] += 1
    ratio = found.objective_per_hour / found.bound_per_hour if found.bound_per_hour > 0 else 1.0
    return counts, ratio


Chooser = Callable[[tuple[Instance, ...], float], dict[str, int]]
BASELINES: dict[str, Chooser] = {"single_type": single_type, "greedy": greedy, "sliced": sliced}


def chosen_by(chooser: Chooser, case: Case, rates: Rates, prices: Prices, headroom: float) -> Counts:
    """A baseline's choice: models one after the other, none of an instance beyond what is left of it."""
    left, counts = dict(case.supply), dict[tuple[str, str], int]()
    for model, demand in case.demand_rps.items():
        wanted = demand * (1 + headroom)
        while wanted > 1e-9:
            mine = sorted((name, rate) for (owner, name), rate in rates.items() if owner == model and rate > 0)
            instances = tuple(
                Instance(name=name, price_per_hour=prices[name], capacity_rps=rate) for name, rate in mine if left[name]
            )
            if not instances:
                break
            carry = {i.name: i.capacity_rps for i in instances}
            for name, count in chooser(instances, wanted).items():
                taken = min(count, left[name])
                left[name] -= taken
                counts[model, name] = counts.get((model, name), 0) + taken
                wanted -= taken * carry[name]
    return counts


def judged(case: Case, counts: Counts, measured: Rates, prices: Prices) -> tuple[float, float]:
    """What a choice costs, and the least share of a model's demand that it really carries."""
    cost = sum(count * prices[name] for (_, name), count in counts.items())
    shares = [
        sum(count * measured[owner, name] for (owner, name), count in counts.items() if owner == model) / demand
        for model, demand in case.demand_rps.items()
    ]
    return cost, min(1.0, *shares)


def pilot(run: Benchmark) -> tuple[dict[str, object], list[float]]:
    """Part 1: its figures, and the ratios of our choices to their bounds."""
    rows = capacities(settings_of(run))
    run.write("capacities", (asdict(row) for row in rows))
    if not rows:
        return {"cost_vs_optimum_p50": None, "demand_carried_share": None}, []
    run.table("perf_llm_pilot: capacity, requests/s", [asdict(row) for row in rows])
    prices = {f"{row.gpus} x {row.gpu}": row.price for row in rows}
    by_kind = {
        kind: {(row.model, f"{row.gpus} x {row.gpu}"): getattr(row, f"{kind}_rps") for row in rows}
        for kind in ("measured", "predicted", "low", "bound", "cold")
    }
    measured, counted = by_kind["measured"], by_kind["bound"]
    raw: list[dict[str, object]] = []
    ratios = []
    for case in cases(run, rows):
        optimum = timed(request_of(case, measured, prices, 0.0), EXACT)[1]
        if not optimum.complete:
            run.notes[case.name] = "cannot be carried even by measured capacity: left out"
            continue
        ways: dict[tuple[str, float], Counts] = {}
        ways["enova", 0.0], ratio = chosen(case, counted, prices, 0.0)
        ratios.append(ratio)
        for headroom in HEADROOMS:
            ways["middle", headroom], ratio = chosen(case, by_kind["predicted"], prices, headroom)
            ratios.append(ratio)
        for kind in ("low", "cold"):
            ways[kind, 0.0] = chosen(case, by_kind[kind], prices, 0.0)[0]
        for name, chooser in BASELINES.items():
            ways[name, 0.0] = chosen_by(chooser, case, counted, prices, 0.0)
        for (name, headroom), counts in ways.items():
            cost, carried = judged(case, counts, measured, prices)
            raw.append({
                "case": case.name, "chooser": name, "headroom": headroom, "cost": cost,
                "optimum_cost": optimum.cost_per_hour, "carried": carried,
            })
    run.write("pilot", raw)
    over = sum(row.bound_rps > row.measured_rps for row in rows) / len(rows)
    return {**summary(run, raw), "over_predicted": over}, ratios


def summary(run: Benchmark, raw: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The figures of part 1 from its raw results."""
    ways: dict[str, dict[str, object]] = {}
    for name, headroom in sorted({(str(row["chooser"]), float(str(row["headroom"]))) for row in raw}):
        mine = [row for row in raw if row["chooser"] == name and row["headroom"] == headroom]
        costs = np.array([float(str(row["cost"])) / float(str(row["optimum_cost"])) for row in mine])
        carried = np.array([float(str(row["carried"])) for row in mine])
        whole = carried >= 1 - 1e-9
        whole_cases = int(np.sum(whole))
        ways[f"{name} {headroom:g}"] = {
            "cost_vs_optimum_p50": float(np.median(costs)), "cost_vs_optimum_p90": float(np.quantile(costs, 0.9)),
            "demand_carried_share": whole_cases / len(mine), "demand_carried_95": wilson(whole_cases, len(mine)),
            "carried_mean": float(np.mean(carried)), "cases": len(mine),
            "carried_cost_p50": float(np.median(costs[whole])) if whole_cases else None,
        }
    shown = [{"chooser": name, **way} for name, way in ways.items()]
    run.table("perf_llm_pilot: mixes, judged by what was measured", shown)
    ours = ways["enova 0"]
    return {
        "cost_vs_optimum_p50": ours["cost_vs_optimum_p50"], "demand_carried_share": ours["demand_carried_share"],
        "carried_mean": ours["carried_mean"], "carried_cost_p50": ours["carried_cost_p50"], "choosers": ways,
    }


def fleets(run: Benchmark) -> tuple[list[dict[str, object]], list[float]]:
    """Part 2: raw results, and seconds."""
    raw: list[dict[str, object]] = []
    for file in run.files("inventories", "*.json") or sorted((SAMPLES / "inventories").glob("*.json")):
        nodes = inventory(file)
        options = {model: options_for(model, nodes) for model in MODELS}
        for gpus in INVENTORY_GPUS:
            for seed in range(run.seed, run.seed + INVENTORY_SEEDS):
                request = fleet_request(nodes, options, gpus, np.random.default_rng(seed))
                seconds, found = timed(request)
                other = textbook(request, time_limit_s=TEXTBOOK_S)
                best = other.cost_per_hour if other.proven else None
                bound = best or max(other.bound_per_hour, found.bound_per_hour)
                raw.append({
                    "inventory": file.stem, "gpus": gpus, "seed": seed, "objective": found.objective_per_hour,
                    "bound": found.bound_per_hour, "textbook": other.cost_per_hour, "proven": other.proven,
                    "ratio": found.objective_per_hour / bound if bound and found.complete else None, "seconds": seconds,
                    "complete": found.complete, "gap": found.gap,
                })
    run.write("fleets", raw)
    run.table("inventories: objective against the textbook's programme", raw)
    return raw, [float(str(row["seconds"])) for row in raw]


def options_for(model: str, nodes: Sequence[InventoryNode]) -> tuple[Option, ...]:
    """The best candidate of each layout, by the recommender's own search."""
    shape = catalog.find_model(model)
    assert shape is not None, model
    workload = Workload(requests_per_s=0.2, lengths=pairs_of(600, 200))
    found = search(shape, nodes, workload, Objectives(ttft_s=2.0, tpot_s=0.06), space=SMALL_SPACE)
    return options_of(found.finalists(16))


def fleet_request(
    nodes: tuple[InventoryNode, ...], options: Mapping[str, tuple[Option, ...]], gpus: int, draw: np.random.Generator
) -> AllocationRequest:
    """Deployments whose demand takes about so many GPUs, if each had its best option."""
    models = [model for model in MODELS if options[model]][: 1 if gpus == 1 else 3 if gpus == 10 else len(MODELS)]
    shares = draw.dirichlet(np.full(len(models), 4.0))
    deployments = []
    for place, (model, share) in enumerate(zip(models, shares, strict=True)):
        best = max(option.capacity_rps / option.gpus for option in options[model])
        rate = float(share) * gpus * best * (0.9 if gpus == 1 else 1.0)
        deployments.append(FleetDeployment(
            name=model, options=options[model], classes=(ClassDemand(name="all", requests_per_s=rate),),
            spread=Spread(domain_share=0.5, domains=2) if gpus == 100 and place % 2 == 0 else Spread(),
        ))
    return AllocationRequest(nodes=nodes, deployments=tuple(deployments), start_hours=0.0)


def finite(values: Iterable[object]) -> list[float]:
    return [float(str(value)) for value in values if value is not None]


def main() -> None:
    run = benchmark("recommender_allocation", __doc__)
    figures, pilot_ratios = pilot(run)
    raw, seconds = fleets(run)
    ratios = finite(row["ratio"] for row in raw)
    run.notes["ratio_to_integer_optimum_max"] = (
        f"inventories: {sum(bool(row['proven']) for row in raw)} of {len(raw)} optima proven, the rest against the "
        f"best bound; perf_llm_pilot against its own bound: {max(pilot_ratios, default=1.0):.5f}"
    )
    run.end({
        **figures,
        "ratio_to_integer_optimum_max": max([*ratios, *pilot_ratios], default=None),
        "ratio_to_integer_optimum_p50": float(np.median(ratios)) if ratios else None,
        "seconds_p50": float(np.median(seconds)) if seconds else None,
        "seconds_max": max(seconds, default=None),
        "complete_share": float(np.mean([bool(row["complete"]) for row in raw])) if raw else None,
    })


if __name__ == "__main__":
    main()
