"""Pydantic's validation errors as one ConfigError: class, field, value got, allowed values, closest known name.

The allowed values are read off the field's own JSON schema, so a message cannot fall behind the type.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from woq.errors import ConfigError

Schema = dict[str, Any]

_repr = reprlib.Repr()  # a data set or a tokenizer must not fill the screen
_repr.maxstring = _repr.maxother = 80


def explain(cls: type[BaseModel], error: ValidationError, aliases: Iterable[str]) -> ConfigError:
    """The ConfigError that says what `error` means; `aliases` are further names that `cls` accepts."""
    root = cls.model_json_schema()
    messages: dict[str, str] = {}  # by field: the arms of a union each report the same field
    hints: list[str] = []
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):  # says it all
            messages[cause.message] = cause.message
            hints += [cause.hint] if cause.hint else []
            continue
        if item["type"] == "default_factory_not_called":  # only says that an earlier field is wrong
            continue
        path, schema = _descend(root, item["loc"])
        if item["type"] == "extra_forbidden":
            name, owner = str(item["loc"][-1]), ".".join([cls.__name__, *path])
            messages.setdefault(name, f"{owner} has no field {name!r}")
            hints.append(_closest(name, schema["properties"], () if path else aliases))
            continue
        where = ".".join([cls.__name__, *path])
        why = f": {cause}" if cause is not None else ""
        got = _repr.repr(item["input"])
        messages.setdefault(where, f"{where} = {got}{why}; allowed: {_allowed(schema, root)}")
    return ConfigError("\n".join(messages.values()), hint="; ".join(hints) or None)


def _descend(root: Schema, loc: tuple[int | str, ...]) -> tuple[list[str], Schema]:
    """The named part of an error's location, and the schema there. Union arms and list indices have no name."""
    path: list[str] = []
    schema = root
    for key in loc:
        inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
        if not isinstance(inner, dict):
            break
        path.append(str(key))
        schema = _resolve(inner, root)
    return path, schema


def _resolve(schema: Schema, root: Schema) -> Schema:
    reference = schema.get("$ref")
    return root["$defs"][reference.rsplit("/", 1)[-1]] if reference else schema


def _allowed(schema: Schema, root: Schema) -> str:
    """A field's JSON schema in words."""
    schema = _resolve(schema, root)
    if "enum" in schema:
        return ", ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if "anyOf" in schema:
        return " or ".join(_allowed(arm, root) for arm in schema["anyOf"])
    if schema.get("type") == "null":
        return "None"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in bounds.items() if key in schema]
    if "pattern" in schema:
        limits.append(f"that matches {schema['pattern']}")
    inner = schema.get("items") or schema.get("additionalProperties")
    if inner and inner is not True:
        limits.append(f"of ({_allowed(inner, root)})")
    if "properties" in schema:
        limits.append(f"with {', '.join(schema['properties'])}")
    kind = str(schema.get("type", "anything"))
    return " ".join([{"array": "list", "object": "mapping"}.get(kind, kind), " and ".join(limits)]).strip()


def _closest(name: str, fields: Iterable[str], aliases: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [*fields, *aliases], n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"fields: {', '.join(fields)}"
