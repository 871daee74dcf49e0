"""read_yaml reads a config.yaml as OmegaConf does, or raises UserError."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_disco.config.safe_yaml import read_yaml
from nemo_disco.runtime.errors import UserError

# YAML whose aliases expand to 9^29 values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize("text", [BOMB, "[" * 10_000, "a: [unclosed", "a: !!python/object:os.system {}", "a: ${", "\t"])
def test_malformed_yaml_and_alias_bombs_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(UserError):
        read_yaml(tmp_path / "f")


def test_a_yaml_is_read_as_omegaconf_does(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a: {b: 3e-3, c: [1, null, '2']}\n")
    assert read_yaml(tmp_path / "f") == {"a": {"b": 3e-3, "c": [1, None, "2"]}}
