"""The dotted keys of the schema, each with a description of the value it expects, for error messages.

Derived from the schema alone; reads no file.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from nemo_disco.config.schema import LARGEST_INT, RunConfig

SECTION = "a section of keys"
MAPPING = "a mapping, such as {name: 1}"


@cache
def known_keys() -> dict[str, str]:
    """Every dotted key of a run in the schema's order, with a description of its value, such as "true or false"."""
    schema = RunConfig.model_json_schema()
    descriptions: dict[str, str] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, field in node["properties"].items():
            if "$ref" in field:
                descriptions[prefix + name] = SECTION
                walk(schema["$defs"][field["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
            else:
                descriptions[prefix + name] = _describe(field)

    walk(schema, "")
    return descriptions


def enclosing_key(key: str) -> str:
    """The dotted key if it is known, else the list or mapping that holds it; without any, the first known key."""
    while key and key not in known_keys():
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return key or next(iter(known_keys()))


def _describe(field: dict[str, Any]) -> str:
    """A description of the values that a field of the JSON schema accepts."""
    if "anyOf" in field:
        return " or ".join(_describe(choice) for choice in field["anyOf"])
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"a list of {len(field['prefixItems'])} numbers"
        return "a list of texts, such as [a,b]"
    plain = {
        "boolean": "true or false",
        "string": "text",
        "null": "null",
        "integer": "an integer",
        "number": "a number",
        "object": MAPPING,
    }
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    # The limit of all integers is left out here; compose.py names it when a value exceeds it.
    limits = {bound: field[bound] for bound in words if field.get(bound, LARGEST_INT) != LARGEST_INT}
    bounds = [f"{words[bound]} {value:g}" for bound, value in limits.items()]
    return " ".join([plain[field["type"]], " and ".join(bounds)]).strip()
