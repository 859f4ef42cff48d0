"""What a quantised checkpoint says about itself: the fields of ``quantization_config``, checked one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from ..errors import ConfigError

__all__ = ["Settings"]


class Settings:
    """An object of settings. Every method raises ConfigError, one line that names field, value and what is supported.

    raw: the object; where: the file, for errors; within: the object's name in the file, "" for all of it. What was read
    is remembered, so that ``unread`` can name the rest.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, within: str = "") -> None:
        self.raw, self.where, self._within = raw, where, f"{within}." if within else ""
        self._read: set[str] = set()
        self._parts: list[Settings] = []

    def refuse(self, key: str, supported: str, value: Any = ...) -> NoReturn:
        """Raise. supported: what the field may be; value: what it is, if not the field's own value."""
        found = self.raw.get(key) if value is ... else value
        shown = json.dumps(found, default=str)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        state = f"is {shown}" if found is not None or key in self.raw else "is missing"
        raise ConfigError(f"{self.where}: {self._within}{key} {state}; supported: {supported}")

    def key(self, *keys: str) -> str:
        """Of several spellings of a field the first that is given and not null, or the first of all."""
        self._read.update(keys)
        return next((key for key in keys if self.raw.get(key) is not None), keys[0])

    def get(self, *keys: str) -> Any:
        """The value of a field by any of its spellings, or None."""
        return self.raw.get(self.key(*keys))

    def choice(self, keys: str | Sequence[str], allowed: Sequence[Any], default: Any = ...) -> Any:
        """A field that is one of few values, in upper or lower case. default: of an absent one, if it may be absent."""
        key = self.key(*([keys] if isinstance(keys, str) else keys))
        value = self.raw.get(key)
        if value is None and default is not ...:
            return default
        value = value.lower() if isinstance(value, str) else value
        if not any(type(value) is type(a) and value == a for a in allowed):
            self.refuse(key, ", ".join(a if isinstance(a, str) else json.dumps(a) for a in allowed))
        return value

    def switch(self, *keys: str, default: bool = False) -> bool:
        """A field that is true or false."""
        found: bool = self.choice(keys, (True, False), default)
        return found

    def size(self, *keys: str) -> int:
        """A field that is a positive whole number, or -1 for all that there is."""
        key = self.key(*keys)
        value = self.raw.get(key)
        if type(value) is not int or (value < 1 and value != -1) or value >= 2**31:
            self.refuse(key, "a positive whole number, or -1 for whole rows")
        return value

    def names(self, *keys: str) -> tuple[str, ...]:
        """A field that is a list of names; none if it is absent."""
        key = self.key(*keys)
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(key, "a list of names")
        return tuple(value)

    def patterns(self, key: str, names: Iterable[str], begin: str) -> Mapping[str, re.Pattern[str]]:
        """The regular expressions among names, those that start with ``begin``, by the whole name."""
        found = {}
        for name in names:
            if name.startswith(begin):
                try:
                    found[name] = re.compile(name.removeprefix(begin))
                except (re.error, OverflowError, RecursionError) as e:
                    self.refuse(key, f"regular expressions ({e})", name)
        return found

    def part(self, key: str) -> Settings:
        """A field that is an object of settings itself; an absent one is empty."""
        self._read.add(key)
        value = self.raw.get(key)
        if not isinstance(value, Mapping | type(None)):
            self.refuse(key, "an object of settings")
        self._parts.append(Settings(value or {}, self.where, f"{self._within}{key}"))
        return self._parts[-1]

    def has(self, key: str) -> bool:
        """Whether a field is given and not null."""
        return self.raw.get(key) is not None

    def only(self, **neutral: Sequence[Any]) -> None:
        """Refuse fields that would change the result, unless absent, null or one of the values that do not."""
        for key, allowed in neutral.items():
            self._read.add(key)
            value = self.raw.get(key)
            if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
                self.refuse(key, " or ".join(json.dumps(a) for a in allowed) or "nothing")

    def harmless(self, *patterns: str) -> None:
        """Fields that change no result, as patterns of fnmatch."""
        self._read.update(key for key in self.raw if any(fnmatchcase(key, p) for p in patterns))

    def unread(self) -> list[str]:
        """The names of what is given and nobody has classified, sorted; null says nothing, whatever its name."""
        found = [self._within + key for key, value in self.raw.items() if key not in self._read and value is not None]
        return sorted(found + [name for part in self._parts for name in part.unread()])
