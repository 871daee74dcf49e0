"""Compose one run's config: conf/ and overrides by Hydra, then types and bounds by schema.py.

Every mistake is a UserError of one line that names the key or the file. No object is instantiated from a config, and
YAML is read by the safe loader. consistency.py checks that the keys agree with each other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from nemo_disco.config import paths
from nemo_disco.config.known_keys import MAPPING, SECTION, enclosing_key, known_keys
from nemo_disco.config.safe_yaml import check_interpolations, check_yaml_files, read_yaml
from nemo_disco.config.schema import RunConfig
from nemo_disco.runtime.errors import UserError, printable

MAX_MISTAKES = 3  # in one message
MAX_VALUE = 200  # characters of a value in a message
# A path's ~ inside an override, where bash does not expand it; quoted texts are matched to be left alone.
_HOME = re.compile(r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | (?<=[=\[,])~(?=/) """, re.VERBOSE)
# Mappings whose keys are declared elsewhere: by an objective, a chat template, an engine, a verifier.
OPEN = ("algorithm.", "data.chat_template_kwargs.", "generation.options.", "reward.parameters.")


def compose(name: str = "config", overrides: Sequence[str] = (), config_path: str | None = None) -> RunConfig:
    """The config `name` (such as quickstart or recipe/disco_logl_1.5b) with Hydra-style overrides applied.

    Raises UserError for an unknown config, group choice or key (naming the nearest known), a wrong type, invalid YAML.
    """
    name = name.removesuffix(".yaml")
    roots = paths.config_roots(name, config_path)
    overrides = [_check_override(override, roots) for override in overrides]
    OmegaConf.register_new_resolver("assets", paths.asset_path, replace=True)
    check_yaml_files(roots)
    others = json.dumps([f"file://{root}" for root in roots[1:]])
    with _errors_in_one_line(f"config {name}"):
        with initialize_config_dir(str(roots[0]), version_base="1.3"), _errors_of_hydra():
            composed = hydra_compose(name, overrides=[f"hydra.searchpath={others}", *overrides])
        return _validate(composed)


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML that `load_run_config` reads back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="python")))


def load_run_config(path: str | Path) -> RunConfig:
    """Read the config that a run wrote into its directory (`to_yaml`). Raises UserError."""
    with _errors_in_one_line(f"config {path}"):
        loaded = read_yaml(path)
        if not isinstance(loaded, dict):
            raise UserError(f"config {path}: expected keys and values, got a {type(loaded).__name__}")
        return _validate(OmegaConf.create(loaded))


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """A line `key: old value -> new value` for each setting that differs."""
    old, new = (_flatten(config.model_dump(mode="json")) for config in (before, now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}" for key in keys]


def overridden_keys(overrides: Sequence[str]) -> set[str]:
    """The dotted keys (and groups) that the overrides set."""
    parser = OverridesParser.create()
    return {str(parser.parse_override(_expand_home(override)).key_or_group) for override in overrides}


def _expand_home(override: str) -> str:
    return _HOME.sub(lambda part: os.path.expanduser("~") if part[0] == "~" else part[0], override)


def _check_override(text: str, roots: list[Path]) -> str:
    """The override for Hydra, with ++ if its key need not be in the composed files. Raises UserError."""
    text = _expand_home(text)
    try:
        override = OverridesParser.create().parse_override(text)
        key, value = str(override.key_or_group), override.value()
    except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
        name, equals, value_text = printable(text, MAX_VALUE).partition("=")
        quoting = f"""special characters in quotes: {name}='"{value_text.strip("'" + '"')}"'"""
        if not equals:
            quoting = """such as 'data.prompt_suffix=" two words"'; a config is chosen by --config-name NAME"""
        elif value_text.startswith("["):  # quotes around the whole would make it a text
            quoting = """each item with special characters in quotes: 'key=["a, b","c"]'"""
        raise UserError(
            f"override '{printable(text, MAX_VALUE)}': expected key=value, {quoting} ({_message(error)})"
        ) from error
    if override.is_sweep_override():
        raise UserError(f"override '{text}': one value is expected; a list is written {key}=[a,b]")
    choices = paths.group_choices(roots, key) if "." not in key else []
    if choices:
        if value not in choices and not override.is_delete():
            raise UserError(f"override '{text}': {key} has no choice {value}{paths.suggest(str(value), choices)}")
    elif known_keys().get(key, MAPPING) == MAPPING:
        if not f"{key}.".startswith(OPEN):
            names = [*known_keys(), *_objective_keys(roots)]
            raise UserError(f"override '{text}': unknown key {key}{paths.suggest(key, names)}")
        return text if override.is_delete() else f"++{text.lstrip('+')}"
    return text


def _objective_keys(roots: list[Path]) -> dict[str, Any]:
    """The dotted keys in every algorithm/*.yaml, which list the objectives' parameters."""
    keys: dict[str, Any] = {}
    for file in (file for root in roots for file in root.glob("algorithm/*.yaml")):
        with suppress(UserError):  # a broken file is reported when it is composed
            keys |= _flatten({"algorithm": read_yaml(file)})
    return keys


def _validate(composed: DictConfig) -> RunConfig:
    descriptions, raw = known_keys(), OmegaConf.to_container(composed)
    assert isinstance(raw, dict)
    unknown = [key for key in _keys(raw) if key not in descriptions and not key.startswith(OPEN)]
    if unknown:
        raise UserError("; ".join(f"unknown key {key}{paths.suggest(key, descriptions)}" for key in unknown))
    check_interpolations(raw)  # before they are resolved, as the search for missing values does
    missing = sorted(key if key.startswith(OPEN) else enclosing_key(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(
            f"{', '.join(missing)} must be given: add {missing[0]}=... ({descriptions.get(missing[0], 'a value')})"
        )
    container = OmegaConf.to_container(composed, resolve=True)
    _check_plain(container)
    try:
        # Strict: 1.5 is not an integer and 1 not a boolean. From JSON: lists are accepted for tuples.
        return RunConfig.model_validate_json(json.dumps(container), strict=True)
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(detail) for detail in error.errors()))
        more = f"; and {len(lines) - MAX_MISTAKES} more" if len(lines) > MAX_MISTAKES else ""
        raise UserError("; ".join(lines[:MAX_MISTAKES]) + more) from error


def _keys(container: Any, prefix: str = "") -> list[str]:
    """The dotted keys of nested mappings; a mapping that is no section of the schema counts as one key."""
    keys: list[str] = []
    for name, value in container.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict) and known_keys().get(keys[-1]) == SECTION:
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def _flatten(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in container.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _describe(detail: Any) -> str:
    """One pydantic error as a message: the key, the expected value and the actual one."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing" and key in known_keys():
        return f"{key} is missing (expected {known_keys()[key]})"
    value = printable(json.dumps(detail["input"]), MAX_VALUE)
    if detail["type"] == "less_than_equal":
        return f"{key}: expected at most {detail['ctx']['le']}, got {value}"
    expected = known_keys()[enclosing_key(key)]
    hint = ""
    if expected.startswith("text") and isinstance(detail["input"], bool | int | float):
        hint = f"""; as text, with quotes as you mean it: {key}='"{value}"'"""
    return f"{key}: expected {expected}, got {value}{hint}"


def _check_plain(value: Any, key: str = "") -> None:
    """Raise UserError for a value that JSON cannot hold: bytes, a date, a key that is not text, a lone surrogate."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise UserError(f"{key}: the name {name!r} is not text; put it in quotes")
            _check_plain(name, key)
            _check_plain(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, key)
    elif isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{key}: {printable(value, MAX_VALUE)} has a lone surrogate, which is no character")
    elif value is not None and not isinstance(value, bool | int | float):
        text = printable(repr(value), MAX_VALUE)
        raise UserError(f"{key}: expected text, a number, true, false, null, a list or a mapping, got {text}")


@contextmanager
def _errors_of_hydra() -> Iterator[None]:
    """Turn the other exceptions that Hydra and OmegaConf raise for malformed input into HydraException."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, MemoryError):
        raise
    except Exception as error:
        raise HydraException(f"{type(error).__name__}: {error}") from error


@contextmanager
def _errors_in_one_line(source: str) -> Iterator[None]:
    """Turn the errors of YAML, Hydra and OmegaConf into UserErrors of one line. source: the config, for the message."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        file = mark.name if mark is not None and mark.name.startswith("/") else source  # a text has no name
        where = f"{file} line {mark.line + 1}" if mark is not None else source
        raise UserError(f"{where}: not valid YAML: {error.problem}") from error
    except MissingConfigException as error:
        missing = str(error.missing_cfg_file)
        hint = paths.suggest(missing.rpartition("/")[2], error.options or [])
        raise UserError(f"{source}: there is no {missing} to compose{hint}") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{source}: {_message(error)}") from error


def _message(error: BaseException) -> str:
    """The error's message on one line; its cause's message if it has none, like Hydra's wrappers."""
    if not str(error) and error.__cause__ is not None:
        return _message(error.__cause__)
    return " ".join(str(error).split("\nSee https")[0].split())
