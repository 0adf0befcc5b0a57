"""What hosts said of models: the most recently used, each for a while, since a directory may get other contents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from enova_coordinator.agents import ModelFacts

MODELS_MAX = 256               # a config.json may have a mebibyte
FRESH_S = 600.0


class KnownModels:
    """Facts by model. `now_s` is the monotonic clock."""

    def __init__(self, *, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._facts: OrderedDict[str, tuple[float, ModelFacts]] = OrderedDict()

    def get(self, model: str) -> ModelFacts | None:
        """What was said last, however old; None if nothing is remembered."""
        if model not in self._facts:
            return None
        self._facts.move_to_end(model)
        return self._facts[model][1]

    def is_fresh(self, model: str) -> bool:
        """Whether a host said it not long ago."""
        return model in self._facts and self._now_s() - self._facts[model][0] < FRESH_S

    def put(self, model: str, facts: ModelFacts) -> None:
        """Remember what a host just said; what was not used for longest is forgotten for it."""
        self._facts[model] = (self._now_s(), facts)
        self._facts.move_to_end(model)
        while len(self._facts) > MODELS_MAX:
            self._facts.popitem(last=False)
