"""One run's config: Hydra's composition of conf/, overrides, then the types of schema.py.

Every mistake is a UserError of one line that names the key or the file. Imports hydra; nothing of it is instantiated,
and YAML is read by its safe loader. Contradictions between keys are checks.py's.
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
from nemo_disco.config.known_keys import MAPPING, SECTION, known_keys, nearest_known
from nemo_disco.config.safe_yaml import check_interpolations, check_yaml_files, read_yaml
from nemo_disco.config.schema import RunConfig
from nemo_disco.runtime.errors import UserError, printable

SHOWN = 3  # mistakes in one line
LONGEST_VALUE = 200  # characters of a value in a message
# A path's ~, which bash expands only at the beginning of a word; texts in quotes are for themselves.
_HOME = re.compile(r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' | (?<=[=\[,])~(?=/) """, re.VERBOSE)
# Mappings whose keys are declared elsewhere: by an objective, a chat template, an engine, a verifier.
OPEN = ("algorithm.", "data.chat_template_kwargs.", "generation.options.", "reward.parameters.")


def compose(name: str = "config", overrides: Sequence[str] = (), config_path: str | None = None) -> RunConfig:
    """The config `name` (such as quickstart or recipe/disco_logl_1.5b) with Hydra-style overrides.

    Raises UserError: unknown config, group choice or key (with the nearest known), a wrong type, broken YAML.
    """
    name = name.removesuffix(".yaml")
    roots = paths.config_roots(name, config_path)
    overrides = [_checked(override, roots) for override in overrides]
    OmegaConf.register_new_resolver("assets", paths.assets, replace=True)
    check_yaml_files(roots)
    others = json.dumps([f"file://{root}" for root in roots[1:]])
    with _one_line(f"config {name}"):
        with initialize_config_dir(str(roots[0]), version_base="1.3"), _plain_errors():
            composed = hydra_compose(name, overrides=[f"hydra.searchpath={others}", *overrides])
        return _typed(composed)


def to_yaml(config: RunConfig) -> str:
    """The whole config as YAML that `load_run_config` reads back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="python")))


def load_run_config(path: str | Path) -> RunConfig:
    """The config that a run wrote into its directory (`to_yaml`). Raises UserError."""
    with _one_line(f"config {path}"):
        loaded = read_yaml(path)
        if not isinstance(loaded, dict):
            raise UserError(f"config {path}: expected keys and values, got a {type(loaded).__name__}")
        return _typed(OmegaConf.create(loaded))


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """`key: value before -> value now`, for each setting that differs."""
    old, new = (_flat(config.model_dump(mode="json")) for config in (before, now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}" for key in keys]


def overridden(overrides: Sequence[str]) -> set[str]:
    """The dotted keys (and groups) that the overrides set."""
    parser = OverridesParser.create()
    return {str(parser.parse_override(_at_home(override)).key_or_group) for override in overrides}


def _at_home(override: str) -> str:
    return _HOME.sub(lambda part: os.path.expanduser("~") if part[0] == "~" else part[0], override)


def _checked(text: str, roots: list[Path]) -> str:
    """The override as Hydra takes it: ++ sets a key that the composed files need not have."""
    text = _at_home(text)
    try:
        override = OverridesParser.create().parse_override(text)
        key, value = str(override.key_or_group), override.value()
    except (HydraException, ValueError) as error:  # ValueError: a number of thousands of digits
        given = printable(text.partition("=")[2], LONGEST_VALUE)
        quoting = f"""special characters in quotes: key='"{given}"'"""
        if given.startswith("["):  # quotes around it all would make a text of it
            quoting = """each item with special characters in quotes: 'key=["a, b","c"]'"""
        raise UserError(
            f"override '{printable(text, LONGEST_VALUE)}': expected key=value, {quoting} ({_squeeze(error)})"
        ) from error
    if override.is_sweep_override():
        raise UserError(f"override '{text}': one value is expected; a list is written {key}=[a,b]")
    choices = paths.options(roots, key) if "." not in key else []
    if choices:
        if value not in choices and not override.is_delete():
            raise UserError(f"override '{text}': {key} has no choice {value}{paths.nearest(str(value), choices)}")
    elif known_keys().get(key, MAPPING) == MAPPING:
        if not f"{key}.".startswith(OPEN):
            known = [*known_keys(), *_objective_keys(roots)]
            raise UserError(f"override '{text}': unknown key {key}{paths.nearest(key, known)}")
        return text if override.is_delete() else f"++{text.lstrip('+')}"
    return text


def _objective_keys(roots: list[Path]) -> dict[str, Any]:
    """The dotted keys of every algorithm/*.yaml, which list the parameters of the objectives."""
    keys: dict[str, Any] = {}
    for file in (file for root in roots for file in root.glob("algorithm/*.yaml")):
        with suppress(UserError):  # a broken file is reported when it is composed
            keys |= _flat({"algorithm": read_yaml(file)})
    return keys


def _typed(composed: DictConfig) -> RunConfig:
    known, written = known_keys(), OmegaConf.to_container(composed)
    assert isinstance(written, dict)
    unknown = [key for key in _keys(written) if key not in known and not key.startswith(OPEN)]
    if unknown:
        raise UserError("; ".join(f"unknown key {key}{paths.nearest(key, known)}" for key in unknown))
    check_interpolations(written)  # before anything resolves them, as looking for what is missing does
    missing = sorted(key if key.startswith(OPEN) else nearest_known(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(
            f"{', '.join(missing)} must be given: add {missing[0]}=... ({known.get(missing[0], 'a value')})"
        )
    container = OmegaConf.to_container(composed, resolve=True)
    _check_plain(container)
    try:
        # Strict, so that 1.5 is no integer and 1 no boolean; through JSON, so that lists may stand for tuples.
        return RunConfig.model_validate_json(json.dumps(container), strict=True)
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(detail) for detail in error.errors()))
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise UserError("; ".join(lines[:SHOWN]) + more) from error


def _keys(container: Any, prefix: str = "") -> list[str]:
    """The dotted keys of nested mappings, down to the first that is no section."""
    keys: list[str] = []
    for name, value in container.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict) and known_keys().get(keys[-1]) == SECTION:
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def _flat(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in container.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _describe(detail: Any) -> str:
    """One pydantic error in a line: which key, what is expected, what was given."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "missing" and key in known_keys():
        return f"{key} is missing (expected {known_keys()[key]})"
    given = printable(json.dumps(detail["input"]), LONGEST_VALUE)
    if detail["type"] == "less_than_equal":
        return f"{key}: expected at most {detail['ctx']['le']}, got {given}"
    expected = known_keys()[nearest_known(key)]
    hint = ""
    if expected.startswith("text") and isinstance(detail["input"], bool | int | float):
        hint = f"""; as text, with quotes as you mean it: {key}='"{given}"'"""
    return f"{key}: expected {expected}, got {given}{hint}"


def _check_plain(value: Any, key: str = "") -> None:
    """Raises UserError for what JSON has no word for: bytes, dates, keys that are no text, and half a character."""
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
            raise UserError(f"{key}: {printable(value, LONGEST_VALUE)} has a lone surrogate, which is no character")
    elif value is not None and not isinstance(value, bool | int | float):
        given = printable(repr(value), LONGEST_VALUE)
        raise UserError(f"{key}: expected text, a number, true, false, null, a list or a mapping, got {given}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Around Hydra's and OmegaConf's own work: what they raise for odd input is of many types, some of them bare."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, MemoryError):
        raise
    except Exception as error:
        raise HydraException(f"{type(error).__name__}: {error}") from error


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns what YAML, Hydra and OmegaConf raise into one line each."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        file = mark.name if mark is not None and mark.name.startswith("/") else what  # a text has no name
        where = f"{file} line {mark.line + 1}" if mark is not None else what
        raise UserError(f"{where}: not valid YAML: {error.problem}") from error
    except MissingConfigException as error:
        wanted = str(error.missing_cfg_file)
        hint = paths.nearest(wanted.rpartition("/")[2], error.options or [])
        raise UserError(f"{what}: there is no {wanted} to compose{hint}") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{what}: {_squeeze(error)}") from error


def _squeeze(error: BaseException) -> str:
    """The error's words on one line, or those of the one that it came from: Hydra wraps some in an empty one."""
    if not str(error) and error.__cause__ is not None:
        return _squeeze(error.__cause__)
    return " ".join(str(error).split("\nSee https")[0].split())
