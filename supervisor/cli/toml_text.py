"""Settings written as the file would have them, with units. Called by ``config show`` and the test of
``config/bsup.toml``.
"""

from __future__ import annotations

import json

import msgspec

from supervisor.model.settings import Key, Settings, keys_of, section_types
from supervisor.model.units import format_duration, format_size


def to_toml(settings: Settings) -> str:
    """Every key of every section; ``decode`` reads it back."""
    lines: list[str] = []
    for name, type_ in section_types().items():
        section = getattr(settings, name)
        lines += ["", f"[{name}]"]
        for key, (_, rule) in keys_of(type_).items():
            lines.append(f"{key} = {value_text(getattr(section, key), rule)}")
    return "\n".join(lines[1:]) + "\n"


def value_text(value: object, key: Key) -> str:
    """A value as TOML: words for what they stand for, durations and sizes with units."""
    for word, stands_for in key.words:
        if value == stands_for and type(value) is type(stands_for):
            return f'"{word}"'
    if key.unit == "duration" and isinstance(value, int | float):
        return f'"{format_duration(value)}"'
    if key.unit == "size" and isinstance(value, int):
        text = format_size(value)
        # Rounded to one decimal where no unit divides it: the plain number of bytes is exact.
        return f'"{text}"' if "." not in text else str(value)
    return _toml(value)


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str():
            # JSON's escapes are TOML's, but for surrogate pairs: so what is not ASCII stays as it is.
            return json.dumps(value, ensure_ascii=False)
        case tuple() | list():
            return f"[{', '.join(_toml(item) for item in value)}]"
        case dict():
            return (
                f"{{ {', '.join(f'{_toml(name)} = {_toml(item)}' for name, item in value.items())} }}"
                if value
                else "{}"
            )
        case msgspec.Struct():
            pairs = (f"{name} = {_toml(getattr(value, name))}" for name in value.__struct_fields__)
            return f"{{ {', '.join(pairs)} }}"
        case _:
            raise TypeError(f"TOML has no {type(value).__name__}")
