"""Warnings about a step whose responses teach nothing, each given once in the life of a process.

Pure: texts and one number in, lines out.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_disco.rewards.extract import END_OF_THINKING


class ResponseWarnings:
    """The warnings that have not been given yet."""

    def __init__(self, require_think: bool) -> None:
        """require_think: True if a response without `</think>` gets reward 0."""
        self._checks_thinking, self._checks_mixed = require_think, True

    def new_warnings(self, texts: Sequence[str], mixed: float) -> list[str]:
        """New warnings. texts: the step's responses. mixed: the share of questions with right and wrong responses."""
        lines = []
        if self._checks_thinking and len(texts) and not any(END_OF_THINKING in text for text in texts):
            self._checks_thinking = False
            lines.append(
                f"no response has {END_OF_THINKING}, so every reward is 0: raise generation.max_response_length if "
                "they are cut off, or set reward.require_think=false for a model that does not think so"
            )
        if self._checks_mixed and mixed == 0:
            self._checks_mixed = False
            lines.append(
                "no question has both right and wrong responses, so nothing is learned from this step: look at "
                "rollouts/; easier or harder questions, or more responses a question, would help"
            )
        return lines
