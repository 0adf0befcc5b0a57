"""The model clock: real time since an epoch, scaled."""

from __future__ import annotations

import time


class ModelClock:
    """Model time is `epoch + (now - epoch) * scale`; processes that share epoch and scale agree on it."""

    def __init__(self, *, epoch_s: float | None = None, scale: float = 1.0) -> None:
        # Anchored once, so that a step of the host's clock does not move the model's.
        self._offset_s = time.time() - time.monotonic()
        self.scale = scale
        self.epoch_s = self._real_s() if epoch_s is None else epoch_s

    def now_s(self) -> float:
        """Model time, Unix seconds."""
        return self.epoch_s + (self._real_s() - self.epoch_s) * self.scale

    def real_span_s(self, model_s: float) -> float:
        """Real seconds that pass in `model_s` model seconds."""
        return model_s / self.scale

    def _real_s(self) -> float:
        return self._offset_s + time.monotonic()
