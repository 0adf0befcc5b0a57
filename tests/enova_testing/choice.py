"""Measured settings of real servers, and what different rules choose among them: what `recommender_choice` runs.

A group holds all settings that were measured of one model on one type of GPU under one load: layouts, and how many
sequences ran at once. A rule picks one for a target of the time between tokens. Names of models and GPUs end here, in
the readers: rules see shapes and data sheets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from enova_recommender.catalog import find_gpu, find_model
from enova_recommender.memory import fit
from enova_recommender.performance import Correction, KernelTimes, ObservedStep
from enova_recommender.performance.calibration import measured, seconds_of
from enova_recommender.performance.engine_model import EngineModel, corrected_times
from enova_recommender.recommend.capacity import factor_of, lanes_of
from enova_recommender.recommend.capacity_curve import curve, load_grid
from enova_recommender.recommend.capacity_lengths import Lengths, lengths_of
from enova_recommender.recommend.search import TimesOf, search
from enova_recommender.recommend.search_space import SearchSpace
from enova_recommender.recommend.types import ASSURANCES, EngineSettings, InventoryNode, Objectives, Workload
from enova_recommender.scaling.enova_007_model import GIB, TableRow, lay_out, max_num_seqs, one_sequence_bytes
from enova_recommender.scaling.types import GpuFacts
from enova_recommender.types import Batch, Experts, GpuModel, Interval, ModelShape, Parallelism, Precision
from enova_testing.benchmark import read_rows
from enova_testing.latency_rows import silicon_precision, told_once

BATCHED_TOKENS = 8192     # vLLM's default on these GPUs; neither set says otherwise
MOST_SEQS = 4096          # that any of the settings has
UTILIZATION = 0.92
MEDIAN = 0.5              # the percentile of the time between tokens that both sets tell, or nearly
ENDLESS_RPS, ENDLESS_GPUS = 1e6, 1_000_000_000
TARGETS_S = (0.020, 0.030, 0.040, 0.050, 0.075, 0.100)
MEASURED = 3              # settings that are known after a first trial
# Tokens of a prompt by task, for a set that does not say: conversations and questions are short, completions of code
# bring the files around them. Assumed, not fitted.
PROMPT_TOKENS = {"lm-arena-chat": 200, "gpqa": 300, "sourcegraph-fim": 3000}
LARGE_GPU_BYTES = 70 * GIB
DEFAULT_SEQS = {True: 1024, False: 256}  # vLLM's default max_num_seqs on GPUs of 70 GiB or more, and on others


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measured setting."""

    shape: ModelShape
    gpu: GpuModel
    parallelism: Parallelism
    precision: Precision
    sequences: int            # at once, in the whole server
    prompt_tokens: float
    output_tokens: float
    step_s: float             # between two tokens
    tokens_per_s: float
    is_median: bool           # the time is a median over tokens, else a mean

    @property
    def worth(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens_per_s / self.parallelism.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All settings of one model, GPU and load."""

    data_set: str
    name: str
    settings: tuple[Setting, ...]

    @property
    def family(self) -> tuple[int, int, int]:
        """Layers, hidden size and experts: models that agree in these are one family."""
        shape = self.settings[0].shape
        experts = max((b.feed_forward.experts for b in shape.blocks if isinstance(b.feed_forward, Experts)), default=0)
        return shape.layers, shape.hidden_size, experts


# -- readers


def energy_groups(paths: Iterable[Path], unknown: set[str]) -> list[Group]:
    """Sweeps over max_num_seqs. Expert parallel over N GPUs with one data rank is read as attention split over N."""
    found: dict[str, list[Setting]] = defaultdict(list)
    for row in (row for path in paths for row in read_rows(path)):
        prompt = PROMPT_TOKENS.get(row["task"])
        if prompt is None:
            continue
        shape, gpu = find_model(row["model_id"]), find_gpu(row["gpu_model"])
        if shape is None or gpu is None:
            unknown.add(row["model_id"] if shape is None else row["gpu_model"])
            continue
        gpus, ranks = int(row["num_gpus"]), int(row["data_parallel"])
        found[f"{row['task']} {row['model_id']} {row['gpu_model']}"].append(Setting(
            shape=shape, gpu=gpu, precision=Precision(),
            parallelism=Parallelism(tensor=gpus // ranks, data=ranks, expert=int(row["expert_parallel"]) > 1),
            sequences=int(row["max_num_seqs"]), prompt_tokens=prompt, output_tokens=float(row["avg_output_len"]),
            step_s=float(row["median_itl_ms"]) / 1000, tokens_per_s=float(row["output_throughput_tokens_per_sec"]),
            is_median=True,
        ))  # fmt: skip
    return _groups("rec_mlenergy", found)


def silicon_groups(paths: Iterable[Path], unknown: set[str]) -> list[Group]:
    """Concurrency sweeps of vLLM servers; of repeats the median."""
    repeats: dict[tuple[str, Parallelism, int], list[Setting]] = defaultdict(list)
    for row in told_once(row for path in paths for row in read_rows(path)):
        if row["backend"] != "vllm":
            continue
        shape, gpu = find_model(row["model_path"]), find_gpu(row["system"].removesuffix("_sxm"))
        if shape is None or gpu is None:
            unknown.add(row["model_path"] if shape is None else row["system"])
            continue
        setting = _silicon_setting(row, shape, gpu)
        name = f"{row['model_path']} {row['precision']} {row['system']} {row['isl']}/{row['osl']}"
        repeats[name, setting.parallelism, setting.sequences].append(setting)
    found: dict[str, list[Setting]] = defaultdict(list)
    for (name, _, _), settings in repeats.items():
        found[name].append(sorted(settings, key=lambda one: one.step_s)[len(settings) // 2])
    return _groups("rec_silicon_concurrency", found)


def _silicon_setting(row: dict[str, str], shape: ModelShape, gpu: GpuModel) -> Setting:
    tensor, stages, ranks, cut, spread = (
        int(float(row[name] or 1)) for name in ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    )
    ranks = max(ranks, cut * spread // tensor)  # GPUs of the experts beyond those of attention hold it again
    prompt, output, sequences = float(row["isl"]), float(row["osl"]), int(float(row["concurrency"]))
    ttft, tpot = float(row["silicon_ttft_ms"]) / 1000, float(row["silicon_tpot_ms"]) / 1000
    return Setting(
        shape=shape, gpu=gpu, precision=silicon_precision(row, shape),
        parallelism=Parallelism(tensor=tensor, pipeline=stages, data=ranks, expert=spread > 1),
        sequences=sequences, prompt_tokens=prompt, output_tokens=output, step_s=tpot,
        tokens_per_s=sequences * output / (ttft + tpot * (output - 1)), is_median=False,
    )  # fmt: skip


def _groups(data_set: str, found: dict[str, list[Setting]]) -> list[Group]:
    return [Group(data_set=data_set, name=name, settings=tuple(settings)) for name, settings in found.items()]


# -- what a rule sees of a setting


def load_of(group: Group) -> Workload:
    """The load of a group: its mean lengths, for all settings alike, and more requests than any one replica carries."""
    prompt = round(float(np.mean([one.prompt_tokens for one in group.settings])))
    output = round(float(np.mean([one.output_tokens for one in group.settings])))
    return Workload(requests_per_s=ENDLESS_RPS, lengths=((prompt, max(2, output)),))


def lengths(group: Group) -> Lengths:
    """Moments of the load's lengths."""
    return lengths_of(load_of(group), prefix_caching=False)


@cache
def shipped_times(shape: ModelShape, gpu: GpuModel, parallelism: Parallelism, precision: Precision) -> KernelTimes:
    """Step times of a layout by the constants that are shipped."""
    return KernelTimes(shape, gpu, parallelism=parallelism, precision=precision)


def step_times(setting: Setting) -> KernelTimes:
    """Step times of a setting's layout by the constants that are shipped."""
    return shipped_times(setting.shape, setting.gpu, setting.parallelism, setting.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is expected of a setting: the mean time between tokens of a full batch, and tokens a second."""

    step_s: Interval
    tokens_per_s: float


def predicted(setting: Setting, load: Lengths) -> Expected:
    """What the product's curve says of a setting, by the constants that are shipped."""
    times, lanes = step_times(setting), lanes_of(setting.parallelism)
    each = max(setting.sequences / lanes, 1.0)
    grid = load_grid(times, load, most_sequences=max(each, 2.0))
    behaviour = curve(times, load, np.array([float(BATCHED_TOKENS)]), grid, percentile=MEDIAN, arrival_cv=1.0)
    step_s = float(np.interp(each - 1, grid, behaviour.mean_tpot_s[0]))
    factor = factor_of(float(np.interp(each - 1, grid, behaviour.spreads)), 0.9)
    return Expected(
        step_s=Interval(value=step_s, low=step_s / factor, high=step_s * factor), tokens_per_s=lanes * each / step_s
    )


def observed(setting: Setting, load: Lengths) -> ObservedStep:
    """A measured setting as calibration takes it: the step that the measured time is of."""
    sequences = setting.sequences / lanes_of(setting.parallelism)
    prompts = sequences / load.mean_decode_steps  # a step
    holding = 1 - np.exp(-prompts)
    tokens = min(prompts / holding * load.mean_prompt_tokens, BATCHED_TOKENS)
    pairs = tokens * float(load.prompt_pairs @ load.prompt_weights) / load.mean_prompt_tokens
    context = round(sequences * load.context_tokens)
    calm = Batch(decode_sequences=max(1, round(sequences)), context_tokens=context)
    mixed = Batch(
        prefill_tokens=round(tokens), prefill_pairs=round(pairs), decode_sequences=max(1, round(sequences)),
        context_tokens=context,
    )  # fmt: skip
    share = float(holding > 0.5) if setting.is_median else float(holding)
    parts = tuple((part, batch) for part, batch in ((1 - share, calm), (share, mixed)) if part > 0)
    return ObservedStep(parts=parts, step_s=setting.step_s)


# -- ours: what the product chooses by what it was told. A rule gives the place of the setting, None for no answer.

Rule = Callable[[Group, float], int | None]
Corrections = dict[str, Correction]


class Taught:
    """What measured settings teach, as the product keeps it: corrections by the key of a model on a type of GPU."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._models: dict[tuple[str, str], list[Group]] = defaultdict(list)
        for group in groups:
            self._models[group.data_set, _model_of(group.settings[0]).key].append(group)
        self._found: dict[tuple[str, str], Correction] = {}

    def by_others(self, group: Group) -> Corrections:
        """The corrections of all other families of the set, each by all of its settings."""
        return {
            key: self._correction(data_set, key)
            for (data_set, key), members in self._models.items()
            if data_set == group.data_set and members[0].family != group.family
        }

    def by_trial(self, group: Group, known: Sequence[int]) -> Corrections:
        """Those of the group itself by some of its settings, beside what the others teach."""
        load, first = lengths(group), group.settings[0]
        site = corrected_times(self.by_others(group))(first.shape, first.gpu, first.parallelism, first.precision)
        settings = [group.settings[place] for place in known]
        steps = [(seconds_of(step_times(one), step), step.step_s) for one in settings for step in [observed(one, load)]]
        found = measured(steps, spread=step_times(first).spread, site=site.correction).correction
        return {_model_of(one).key: found for one in group.settings}

    def _correction(self, data_set: str, key: str) -> Correction:
        if (data_set, key) not in self._found:
            members = self._models[data_set, key]
            steps = [
                (seconds_of(step_times(one), step), step.step_s)
                for group in members for load in [lengths(group)]
                for one in group.settings for step in [observed(one, load)]
            ]  # fmt: skip
            spread = step_times(members[0].settings[0]).spread
            self._found[data_set, key] = measured(steps, spread=spread).correction
        return self._found[data_set, key]


def _model_of(setting: Setting) -> EngineModel:
    return EngineModel(
        shape=setting.shape, gpu=setting.gpu, parallelism=setting.parallelism, precision=setting.precision
    )


def our_rules(groups: Sequence[Group], seeds: Iterable[int]) -> list[tuple[str, int | None, Rule]]:
    """Ours by how much they know: the model and the GPU; other families of the set as well; three trials too."""
    taught = Taught(groups)

    def after(seed: int) -> Rule:
        def rule(group: Group, target_s: float) -> int | None:
            draw = np.random.default_rng([seed, len(group.settings)])
            known = draw.choice(len(group.settings), size=min(MEASURED, len(group.settings)), replace=False).tolist()
            return advised(group, target_s, corrected_times(taught.by_trial(group, known)))

        return rule

    return [
        ("cold", None, lambda group, target_s: advised(group, target_s, shipped_times)),
        ("cold_taught", None, lambda group, target_s: advised(
            group, target_s, corrected_times(taught.by_others(group))
        )),
        *(("after3", seed, after(seed)) for seed in seeds),
    ]  # fmt: skip


def advised(group: Group, target_s: float, times_of: TimesOf) -> int | None:
    """What the product's search chooses for a load without end on GPUs without end, all at one price.

    The cheapest then is the one with the most requests a second and GPU. Its max_num_seqs is snapped down to a measured
    one. Where nothing that was measured keeps the target with the first of the product's chances, the next is asked
    for, as the product does (`most_assured`) where nothing at all keeps it.
    """
    first = group.settings[0]
    gpu = replace(first.gpu, price_per_hour=1.0)
    nodes = [InventoryNode(name="endless", gpu=gpu, gpus=ENDLESS_GPUS, island_gpus=gpu.island_gpus)]
    space = SearchSpace(
        parallelisms=tuple(dict.fromkeys(one.parallelism for one in group.settings)), max_num_seqs=(MOST_SEQS,),
        max_num_batched_tokens=(BATCHED_TOKENS,), gpu_memory_utilizations=(UTILIZATION,),
        kv_cache_dtypes=(first.precision.kv_cache_dtype,),
    )  # fmt: skip
    for assurance in ASSURANCES:
        found = search(
            first.shape, nodes, load_of(group), Objectives(tpot_s=target_s, percentile=MEDIAN), space=space,
            precision=first.precision, times_of=times_of, assurance=assurance, check_floor=False,
        )  # fmt: skip
        for candidate in found.feasible():
            if (place := _measured_as(group, candidate.settings)) is not None:
                return place
    return None


def _measured_as(group: Group, chosen: EngineSettings) -> int | None:
    """The largest measured setting of this layout that is no larger than what was chosen."""
    most = chosen.max_num_seqs * chosen.parallelism.data
    places = [
        place for place, one in enumerate(group.settings)
        if one.parallelism == chosen.parallelism and one.sequences <= most
    ]  # fmt: skip
    return max(places, key=lambda place: group.settings[place].sequences, default=None)


# -- baselines


def default_rule(group: Group, target_s: float) -> int | None:
    """vLLM's own defaults on the fewest GPUs."""
    del target_s  # the engine knows no targets
    gpu = group.settings[0].gpu
    return _snapped(group, DEFAULT_SEQS[gpu.memory_bytes >= LARGE_GPU_BYTES], gpus=None)


def enova_007_rule(group: Group, target_s: float) -> int | None:
    """ENOVA 0.0.7: sequences by the number of parameters, the smallest tensor-parallel size that holds one of them."""
    del target_s  # it knows no targets
    shape, gpu = group.settings[0].shape, group.settings[0].gpu
    row = TableRow(
        parameters=shape.parameters, token_size=shape.kv_elements_per_token, heads=shape.attention_heads,
        context_tokens=shape.context_tokens,
    )  # fmt: skip
    facts = GpuFacts(memory_bytes=gpu.memory_bytes, count=8)
    layout = lay_out(one_sequence_bytes(row, activation_gib=3), row, facts)
    return _snapped(group, max_num_seqs(row), gpus=layout.tensor_parallel_size if layout else None)


def largest_rule(group: Group, target_s: float) -> int | None:
    """The most sequences whose cache the memory model says to fit, on the layout that takes the most."""
    del target_s  # throughput alone
    load = lengths(group)

    def fits(one: Setting) -> bool:
        memory = fit(one.shape, one.gpu, parallelism=one.parallelism, precision=one.precision,
                     max_num_seqs=max(1, one.sequences // one.parallelism.data), max_model_len=32768)  # fmt: skip
        return memory.kv_tokens * one.parallelism.data >= one.sequences * load.held_tokens

    places = [place for place, one in enumerate(group.settings) if fits(one)]
    sizes = {place: (group.settings[place].sequences, -group.settings[place].parallelism.gpus) for place in places}
    return max(sizes, key=lambda place: sizes[place], default=None)


def neighbour_rule(others: Sequence[Group]) -> Rule:
    """The measured time of the most alike setting of any other family."""
    settings = [one for group in others for one in group.settings]
    families = np.array([group.family for group in others for _ in group.settings])
    features = np.array([_features(one) for one in settings])
    scale = features.std(axis=0) + 1e-9

    def rule(group: Group, target_s: float) -> int:
        usable = np.flatnonzero((families != group.family).any(axis=1))
        assert len(usable), "a nearest neighbour needs another family"
        best, worth = 0, -np.inf
        for place, one in enumerate(group.settings):
            distances = (((features[usable] - _features(one)) / scale) ** 2).sum(axis=1)
            near = settings[usable[int(np.argmin(distances))]]
            if near.step_s <= target_s and (value := one.sequences / near.step_s / one.parallelism.gpus) > worth:
                best, worth = place, value
        if worth > -np.inf:
            return best
        return min(range(len(group.settings)), key=lambda at: group.settings[at].sequences)

    return rule


def _features(one: Setting) -> list[float]:
    gpus, speed = one.parallelism.gpus, one.gpu.bandwidth_bytes_per_s
    return [float(np.log(value)) for value in (
        one.shape.parameters / gpus / speed, one.shape.active_parameters / gpus / speed, one.sequences / gpus,
        one.prompt_tokens + one.output_tokens / 2, gpus,
    )]  # fmt: skip


def _snapped(group: Group, sequences: int, *, gpus: int | None) -> int | None:
    """The largest measured setting of at most so many sequences, on that many GPUs or the fewest that were measured."""
    sizes = {one.parallelism.gpus for one in group.settings}
    wanted = gpus if gpus in sizes else min(sizes)
    places = [
        place for place, one in enumerate(group.settings)
        if one.parallelism.gpus == wanted and one.sequences <= sequences
    ]  # fmt: skip
    return max(places, key=lambda place: group.settings[place].sequences, default=None)
