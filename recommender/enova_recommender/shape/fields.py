"""Typed reading of a config.json: every error names the key that is to blame, with the section that it lies in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Beyond these no configuration is real; they keep products of counts from running away.
COUNT_MAX = 1 << 40
LAYERS_MAX = 10_000


class ShapeError(ValueError):
    """A config.json that cannot be turned into a shape; `field` names the key that is to blame."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class Fields:
    """One section of a config.json.

    Most keys have several names, by which library wrote them. The first of the names that is present counts; another
    one that is present too, and says something else, is a contradiction.
    """

    def __init__(
        self, values: Mapping[str, object], section: str = "", defaults: Mapping[str, object] | None = None
    ) -> None:
        self.values = values
        self._section = section
        self._defaults = defaults or {}

    def path(self, name: str) -> str:
        """The key's full name, such as `text_config.hidden_size`."""
        return f"{self._section}.{name}" if self._section else name

    def error(self, name: str, message: str) -> ShapeError:
        """An error that blames a key of this section."""
        return ShapeError(self.path(name), message)

    def has(self, *names: str) -> bool:
        """Whether one of the names is present with a value."""
        return any(self.values.get(name) is not None for name in names)

    def without(self, *names: str) -> Fields:
        """The same section, silent on some keys."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return Fields(kept, self._section, self._defaults)

    def with_defaults(self, defaults: Mapping[str, object]) -> Fields:
        """The same section, with what its class has where it is silent."""
        return Fields(self.values, self._section, defaults)

    def get(self, *names: str) -> object:
        """The value of the first name that is present, else the class's default; None where there is neither."""
        found = [(name, self.values[name]) for name in names if self.values.get(name) is not None]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise self.error(name, f"is {value!r}, but {found[0][0]} is {found[0][1]!r}")
        if found:
            return found[0][1]
        return next((self._defaults[name] for name in names if name in self._defaults), None)

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; without a default it must be there."""
        value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise self.error(names[0], "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= COUNT_MAX:
            raise self.error(self._present(names), f"must be a whole number of at least {least}, not {value!r}")
        return value

    def optional_count(self, *names: str, least: int = 1) -> int | None:
        """The same, or None where it is absent."""
        return None if self.get(*names) is None else self.count(*names, least=least)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(self._present(names), f"must be true or false, not {value!r}")
        return value

    def number(self, *names: str) -> float | None:
        """A number above 0, or None where it is absent."""
        value = self.get(*names)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < COUNT_MAX:
            raise self.error(self._present(names), f"must be a number above 0, not {value!r}")
        return float(value)

    def text(self, *names: str) -> str | None:
        """A text, or None where it is absent."""
        value = self.get(*names)
        if value is not None and not isinstance(value, str):
            raise self.error(self._present(names), f"must be a text, not {value!r}")
        return value

    def texts(self, *names: str) -> tuple[str, ...] | None:
        """A list of texts, or None where it is absent."""
        values = self._list(names)
        if values is None:
            return None
        texts = tuple(value for value in values if isinstance(value, str))
        if len(texts) != len(values):
            raise self.error(self._present(names), "must be a list of texts")
        return texts

    def counts(self, *names: str, least: int = 0) -> tuple[int, ...] | None:
        """A list of whole numbers, or None where it is absent."""
        values = self._list(names)
        if values is None:
            return None
        whole = tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= least)
        if len(whole) != len(values):
            raise self.error(self._present(names), f"must be a list of whole numbers of at least {least}")
        return whole

    def section(self, *names: str) -> Fields | None:
        """A nested section, or None where it is absent."""
        value = self.get(*names)
        if value is None:
            return None
        name = self._present(names)
        if not isinstance(value, Mapping):
            raise self.error(name, f"must be an object, not {value!r}")
        return Fields(value, self.path(name))

    def sections(self, *names: str) -> tuple[Fields, ...] | None:
        """A list of nested sections, or None where it is absent."""
        values = self._list(names)
        if values is None:
            return None
        name = self._present(names)
        nested = [Fields(v, f"{self.path(name)}[{i}]") for i, v in enumerate(values) if isinstance(v, Mapping)]
        if len(nested) != len(values):
            raise self.error(name, "must be a list of objects")
        return tuple(nested)

    def layers(self, *names: str) -> int:
        """The number of layers."""
        layers = self.count(*(names or ("num_hidden_layers", "n_layer", "num_layers", "n_layers")))
        if layers > LAYERS_MAX:
            raise self.error(self._present(names or ("num_hidden_layers",)), f"{layers} is more than {LAYERS_MAX}")
        return layers

    def _list(self, names: Sequence[str]) -> Sequence[object] | None:
        value = self.get(*names)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) > LAYERS_MAX:
            raise self.error(self._present(names), f"must be a list of at most {LAYERS_MAX} entries")
        return value

    def _present(self, names: Sequence[str]) -> str:
        return next((name for name in names if self.values.get(name) is not None), names[0])
