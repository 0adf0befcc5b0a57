"""Every scaling policy by its name, with the values of its one knob that are compared.

A factory takes the knob: 1.0 is the policy as published, more spends more GPUs. Which parameter it moves, the module
of the policy says. The five values span what can sensibly be set: where a published default is far from what a language
model's server needs (two ongoing requests a replica), they reach down to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from enova_recommender.scaling.peers.aibrix import apa, kpa
from enova_recommender.scaling.peers.aibrix_optimizer import optimizer
from enova_recommender.scaling.peers.cron import Cron
from enova_recommender.scaling.peers.dynamo_load import dynamo_load, dynamo_load_latency, dynamo_load_sla
from enova_recommender.scaling.peers.dynamo_throughput import (
    dynamo,
    dynamo_throughput,
    dynamo_throughput_constant,
    dynamo_throughput_kalman,
)
from enova_recommender.scaling.peers.enova_007 import faithful, mended
from enova_recommender.scaling.peers.keda import epp_keda, keda_queue, keda_two_signal
from enova_recommender.scaling.peers.knative import knative
from enova_recommender.scaling.peers.kubernetes import hpa_concurrency, hpa_gpu
from enova_recommender.scaling.peers.llm_d_saturation import saturation
from enova_recommender.scaling.peers.llm_d_tokens import tokens
from enova_recommender.scaling.peers.ray_serve import ray_serve
from enova_recommender.scaling.peers.serverless_llm import serverless_llm
from enova_recommender.scaling.peers.skyserve import skyserve
from enova_recommender.scaling.peers.static import static_mean, static_peak
from enova_recommender.scaling.situation import Policy

Knobs = tuple[float, float, float, float, float]

PEERS: Mapping[str, Callable[[float], Policy]] = MappingProxyType({
    "static-peak": static_peak,
    "static-mean": static_mean,
    "cron": lambda knob: Cron(knob=knob),
    "enova-0.0.7-faithful": faithful,
    "enova-0.0.7-mended": mended,
    "hpa-concurrency": hpa_concurrency,
    "hpa-gpu": hpa_gpu,
    "keda-queue": keda_queue,
    "keda-two-signal": keda_two_signal,
    "ray-serve": ray_serve,
    "skyserve": skyserve,
    "knative": knative,
    "aibrix-apa": apa,
    "aibrix-kpa": kpa,
    "aibrix-optimizer": optimizer,
    "llm-d-saturation": saturation,
    "llm-d-tokens": tokens,
    "llm-d-epp-keda": epp_keda,
    "dynamo-load": dynamo_load,
    "dynamo-load-latency": dynamo_load_latency,
    "dynamo-load-sla": dynamo_load_sla,
    "dynamo-throughput": dynamo_throughput,
    "dynamo-throughput-constant": dynamo_throughput_constant,
    "dynamo-throughput-kalman": dynamo_throughput_kalman,
    "dynamo": dynamo,
    "serverless-llm": serverless_llm,
})

_RATE: Knobs = (0.8, 0.9, 1.0, 1.25, 1.6)          # factors on a rate
_FEW_REQUESTS: Knobs = (0.0125, 0.02, 0.03, 0.1, 1.0)  # a target of 2 requests: 160, 100, 67, 20, 2
_SHARE: Knobs = (0.6, 0.8, 1.0, 1.5, 2.5)          # thresholds on shares of KV cache or GPU
_LIMIT: Knobs = (0.85, 1.0, 1.25, 1.6, 2.2)        # thresholds that are near full use as published

KNOBS: Mapping[str, Knobs] = MappingProxyType({
    "static-peak": _RATE,
    "static-mean": (1.0, 1.25, 1.5, 2.0, 3.0),
    "cron": _RATE,
    "enova-0.0.7-faithful": (0.5, 1.0, 2.5, 5.0, 25.0),
    "enova-0.0.7-mended": (0.5, 1.0, 2.5, 5.0, 25.0),
    "hpa-concurrency": (0.75, 1.0, 1.5, 2.5, 4.0),
    "hpa-gpu": (0.61, 0.7, 0.8, 1.0, 1.3),
    "keda-queue": (0.25, 0.5, 1.0, 2.5, 5.0),
    "keda-two-signal": _SHARE,
    "ray-serve": _FEW_REQUESTS,
    "skyserve": _RATE,
    "knative": (0.35, 0.5, 1.0, 1.5, 2.5),
    "aibrix-apa": _SHARE,
    "aibrix-kpa": _SHARE,
    "aibrix-optimizer": _RATE,
    "llm-d-saturation": _LIMIT,
    "llm-d-tokens": _LIMIT,
    "llm-d-epp-keda": _SHARE,
    "dynamo-load": _LIMIT,
    "dynamo-load-latency": _SHARE,
    "dynamo-load-sla": _RATE,
    "dynamo-throughput": _RATE,
    "dynamo-throughput-constant": _RATE,
    "dynamo-throughput-kalman": _RATE,
    "dynamo": _RATE,
    "serverless-llm": _FEW_REQUESTS,
})
