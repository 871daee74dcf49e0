"""The warning about responses that all lack what their reward requires. Pure: texts in, lines out."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_disco.rewards.extract import END_OF_THINKING


class ResponseWarnings:
    """The warnings about responses that have not been given yet.

    require_think: True if a response without `</think>` gets reward 0. given: True once that was warned about.
    """

    def __init__(self, require_think: bool) -> None:
        self._require_think, self.given = require_think, False

    def new_warnings(self, texts: Sequence[str]) -> list[str]:
        """New warnings about some responses, by their texts."""
        checks = self._require_think and not self.given
        if not checks or not texts or any(END_OF_THINKING in text for text in texts):
            return []
        self.given = True
        return [
            f"no response has {END_OF_THINKING}, so every reward is 0: raise generation.max_response_length if "
            "they are cut off, or set reward.require_think=false for a model that does not think so"
        ]
