"""Paths of configs (in --config-path, then ./conf, then the copy of conf/ in the package) and of packaged assets.

Reads no file. Works in a checkout (conf/ beside nemo_disco/) and in a wheel (nemo_disco/conf/).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from nemo_disco.runtime.errors import UserError

PACKAGE = Path(__file__).resolve().parent.parent


def packaged_directory(name: str) -> Path:
    """The directory conf or assets of the package: inside nemo_disco/ in a wheel, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def asset_path(relative: str) -> str:
    """Absolute path of a file in assets/: the value of `${assets:quickstart/model}` in a config."""
    return str(packaged_directory("assets") / relative)


def config_roots(name: str, config_path: str | None) -> list[Path]:
    """The directories to compose the config `name` from: the one that contains it, then the others in search order.

    Raises UserError for a --config-path that is not a directory and for a name that none of them has.
    """
    if config_path is not None and not Path(config_path).is_dir():
        raise UserError(f"--config-path {config_path}: there is no such directory")
    candidates = [Path(config_path)] if config_path is not None else []
    candidates += [Path("conf"), packaged_directory("conf")]
    roots = list(dict.fromkeys(path.resolve() for path in candidates if path.is_dir()))
    holder = next((root for root in roots if (root / f"{name}.yaml").is_file()), None)
    if holder is None:
        configs = sorted({config for root in roots for config in config_names(root)})
        places = ", ".join(str(root) for root in roots)
        raise UserError(f"--config-name {name}: no such config in {places}{suggest(name, configs)}")
    return [holder] + [root for root in roots if root != holder]


def config_names(root: Path) -> list[str]:
    """The names of the configs of whole runs in a directory: its YAML files, and those of recipe/."""
    files = [*root.glob("*.yaml"), *root.glob("recipe/*.yaml")]
    return sorted(str(path.relative_to(root).with_suffix("")) for path in files)


def group_choices(roots: Iterable[Path], group: str) -> list[str]:
    """The choices of a config group, such as generation: megatron, vllm, ..."""
    return sorted({path.stem for root in roots for path in (root / group).glob("*.yaml")})


def suggest(unknown: str, names: Iterable[str]) -> str:
    """The end of an error message: "; did you mean X?", else "; known: ..." with the names of the section, or all."""
    names = {name: name for name in names}
    section, _, last = unknown.rpartition(".")
    peers = [name for name in names if name.rpartition(".")[0] == section]
    tails, own = ({name.rpartition(".")[2].rpartition("/")[2]: name for name in group} for group in (names, peers))
    attempts = [(last, own, 0.6), (last, tails, 0.9)]
    if not section or not own:
        section, own, attempts = "", {n: n for n in names if "." not in n}, [(unknown, names, 0.6), (last, tails, 0.6)]
    for text, candidates, cutoff in attempts:
        if close := difflib.get_close_matches(text, candidates, n=1, cutoff=cutoff):
            return f"; did you mean {candidates[close[0]]}?"
    return f"; known{section and f' in {section}'}: {', '.join(own or names)}" if names else ""
