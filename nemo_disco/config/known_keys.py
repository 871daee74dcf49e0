"""What the schema knows about each dotted key, for error messages: which keys there are and what each expects.

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
    """Every dotted key of a run, in order, with what it expects in words."""
    schema = RunConfig.model_json_schema()
    found: dict[str, str] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, field in node["properties"].items():
            if "$ref" in field:
                found[prefix + name] = SECTION
                walk(schema["$defs"][field["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
            else:
                found[prefix + name] = _expectation(field)

    walk(schema, "")
    return found


def nearest_known(key: str) -> str:
    """The dotted key itself, or the longest known key that contains it (an item of a list, a name in a mapping)."""
    while key and key not in known_keys():
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return key or next(iter(known_keys()))


def _expectation(field: dict[str, Any]) -> str:
    """A JSON schema's leaf in words."""
    if "anyOf" in field:
        return " or ".join(_expectation(choice) for choice in field["anyOf"])
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
    # The limit of all integers is said where it is passed (compose.py).
    given = {bound: field[bound] for bound in words if field.get(bound, LARGEST_INT) != LARGEST_INT}
    bounds = [f"{words[bound]} {value:g}" for bound, value in given.items()]
    return " ".join([plain[field["type"]], " and ".join(bounds)]).strip()
