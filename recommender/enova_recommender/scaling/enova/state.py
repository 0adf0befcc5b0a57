"""What the policy remembers from one call to the next, as JSON can hold it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from enova_recommender.scaling.situation import Memory

NEVER_S = -1e18               # JSON knows no infinity
_FACTOR, _TOLD = "factor:", "told:"
LOADS_MAX = 1024              # kept of the patience window


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState:
    """Times are model seconds; loads are requests a second of the told mix, with the stamps at which they were seen."""

    target: int = -1                                   # as it was at the last call; -1 before the first
    wish: int = -1                                     # what was then wished
    edited_s: float = NEVER_S                          # when somebody else last changed the target
    loads: tuple[tuple[float, float], ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)   # the capacities that the factors belong to
    profile: tuple[float, ...] = ()
    profile_s: float = NEVER_S                         # when the profile was made

    @classmethod
    def of(cls, memory: Memory) -> PolicyState:
        """The state that `memory()` returned; a new one where there is nothing, or nothing that can be read."""
        try:
            loads = zip(_floats(memory, "loads_s"), _floats(memory, "loads"), strict=True)
            return cls(
                target=int(_float(memory, "target", -1)),
                wish=int(_float(memory, "wish", -1)),
                edited_s=_float(memory, "edited_s", NEVER_S),
                loads=tuple(loads),
                told={key[len(_TOLD) :]: _float(memory, key, 0.0) for key in memory if key.startswith(_TOLD)},
                factors={key[len(_FACTOR) :]: _float(memory, key, 1.0) for key in memory if key.startswith(_FACTOR)},
                profile=_floats(memory, "profile"),
                profile_s=_float(memory, "profile_s", NEVER_S),
            )
        except (TypeError, ValueError):
            return cls()      # another version's: what it learnt is learnt anew

    def memory(self) -> Memory:
        """The state as plain values."""
        return {
            "target": float(self.target),
            "wish": float(self.wish),
            "edited_s": self.edited_s,
            "loads_s": tuple(stamp for stamp, _ in self.loads),
            "loads": tuple(load for _, load in self.loads),
            "profile": self.profile,
            "profile_s": self.profile_s,
            **{f"{_FACTOR}{name}": factor for name, factor in self.factors.items()},
            **{f"{_TOLD}{name}": rate for name, rate in self.told.items()},
        }

    def seeing(self, target: int, *, now_s: float) -> PolicyState:
        """The state once the target of now is known: one that is neither the last nor the wished was set by others."""
        low, high = sorted((self.target, self.wish))
        # At first sight, too: a deployment that was made a moment ago has not been idle for long, whatever was heard.
        edited = self.target < 0 or not low <= target <= high
        # What was needed before an edit does not undo it.
        return replace(self, edited_s=now_s, loads=()) if edited else self

    def with_load(self, load: float, *, now_s: float, patience_s: float) -> PolicyState:
        """With one more load, and those older than the patience forgotten but the newest of them."""
        kept = self.loads
        while len(kept) > 1 and kept[1][0] <= now_s - patience_s:
            kept = kept[1:]
        return replace(self, loads=(*kept, (now_s, load))[-LOADS_MAX:])


def _float(memory: Memory, key: str, default: float) -> float:
    value = memory.get(key, default)
    if isinstance(value, tuple):
        raise TypeError(key)
    return float(value)


def _floats(memory: Memory, key: str) -> tuple[float, ...]:
    values = memory.get(key, ())
    if isinstance(values, str | float | int):
        raise TypeError(key)
    return tuple(float(value) for value in values)
