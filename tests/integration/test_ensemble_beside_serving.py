"""Why the ensemble has no vote in live verdicts: it knows no load, so a new mix of traffic is as strange as a fault."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.causes import Cause
from enova_recommender.detection.ensemble import EnsembleDetector
from enova_recommender.detection.features import COLUMN, Feature
from enova_recommender.detection.watch import Watched
from enova_testing.serving_world import cluster, watching

LOOKED_AT = [COLUMN[each] for each in (
    Feature.RUNNING, Feature.WAITING, Feature.KV_USAGE, Feature.ARRIVALS, Feature.GENERATION_TOKENS,
    Feature.PROMPT_TOKENS, Feature.ITERATIONS, Feature.STEP_S, Feature.TTFT_S, Feature.QUEUE_S,
    Feature.GPU_UTILIZATION, Feature.GPU_POWER,
)]  # fmt: skip
FAR = 5.0                  # times the strangest quiet step
NEAR = 3.0                 # times as strange


def rows(told: list[Watched]) -> npt.NDArray[np.float64]:
    return np.array([each.step.values[0][LOOKED_AT] for each in told], dtype=np.float64)


def test_longer_prompts_are_nearly_as_strange_as_a_slow_replica_which_live_detection_tells_apart() -> None:
    detector = watching(cluster(rate_rps=2.0))
    engine, ensemble = detector.world.engines[0], EnsembleDetector.standard(period_steps=None)
    past = rows(detector.until(1000.0)[4:])
    ensemble.fit(past, first=0)

    quiet = detector.until(1150.0)
    usual, engine.prompt_tokens = engine.prompt_tokens, 900
    longer = detector.until(1300.0)
    engine.prompt_tokens = usual
    again = detector.until(1400.0)
    engine.slow(1.4)
    slow = detector.until(1550.0)

    parts = [rows(each) for each in (quiet, longer, again, slow)]
    scores = np.split(
        ensemble.score(np.concatenate(parts), first=len(past)), np.cumsum([len(each) for each in parts])[:-1]
    )
    strangest, of_longer, of_slow = np.nanmax(scores[0]), np.nanmedian(scores[1]), np.nanmedian(scores[3])
    assert of_longer > FAR * strangest
    assert of_slow > FAR * strangest
    assert of_slow < NEAR * of_longer
    assert not any(each.judgement.verdicts for each in (*quiet, *longer, *again))
    assert slow[-1].judgement.verdicts["replica-0"].cause is Cause.SLOW
