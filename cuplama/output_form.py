"""What a text must look like: the parameters json_schema, regex and grammar, and OpenAI's response_format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .arguments import in_range, need_type, shown, type_of
from .errors import ParameterError

__all__ = ["FORMS", "JSON_STYLE", "MAX_TEXT", "asked_form", "check_one_form", "read_form", "read_schema"]

FORMS = ("json_schema", "regex", "grammar")
MAX_TEXT = 2**17  # characters of one of them: at this size one took a second to compile, and most take milliseconds
# What llguidance is told of JSON: on one line, with at most a space after "," and ":". A small model that may write
# blanks wherever JSON allows them writes nothing else. A schema's own "x-guidance" takes the place of these.
JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_FORMATS = "text, json_object, json_schema"


def read_schema(value: Any) -> dict[str, Any] | None:
    """A JSON schema in plain Python types, from a mapping, JSON text, or True for any object.

    Raises WrongTypeError or ValueError, as readers do, and ParameterError for what is no JSON, too deep or too long.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        in_range(value)
        return dict(_ANY_OBJECT)
    need_type(isinstance(value, (str, Mapping)), value)
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False, default=dict)
        found = json.loads(_short(text), parse_constant=_refuse)
    except RecursionError:
        raise ParameterError("json_schema is nested too deeply") from None
    except (ValueError, TypeError) as e:
        if isinstance(e, ParameterError):
            raise
        raise ParameterError(f"json_schema = {shown(value)} is no JSON: {e}; it must be a schema") from None
    in_range(isinstance(found, dict))
    schema: dict[str, Any] = found
    return schema


def read_form(value: Any) -> str | None:
    """The text of a regex or a grammar. Raises WrongTypeError or ValueError, as readers do."""
    if value is None:
        return None
    need_type(isinstance(value, str), value)
    in_range(0 < len(value) <= MAX_TEXT)
    return str(value)


def check_one_form(params: Any) -> None:
    """Raises ParameterError if more than one of FORMS is given; they are attributes of ``params``."""
    given = [name for name in FORMS if getattr(params, name) is not None]
    if len(given) > 1:
        raise ParameterError(f"{given[0]} and {given[1]} are both given; at most one of {', '.join(FORMS)} may be")


def asked_form(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with response_format as the parameter that it stands for.

    ``{"type": "text"}`` is none, ``{"type": "json_object"}`` any object, ``{"type": "json_schema", "json_schema":
    {"schema": {...}}}`` a schema, as OpenAI's API has them. Raises ParameterError.
    """
    options = dict(options)
    asked = options.pop("response_format", None)
    if asked is None:
        return options
    if not isinstance(asked, Mapping):
        raise ParameterError(f"response_format = {shown(asked)} is {type_of(asked)}; it must be a mapping with a type")
    schema = _schema_of(asked)
    if schema is None:
        return options
    for name in FORMS:
        if options.get(name) is not None:
            raise ParameterError(f"response_format and {name} are both given; give one of them")
    return {**options, "json_schema": schema}


def _schema_of(asked: Mapping[str, Any]) -> Any:
    kind = asked.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return True
    if kind != "json_schema":
        raise ParameterError(f"response_format: type = {shown(kind)} is not supported; supported: {_FORMATS}")
    inner = asked.get("json_schema")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        raise ParameterError('response_format: json_schema must hold the schema: {"name": ..., "schema": {...}}')
    return inner["schema"]


def _short(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ParameterError(f"json_schema has {len(text)} characters; the most is {MAX_TEXT}")
    return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
