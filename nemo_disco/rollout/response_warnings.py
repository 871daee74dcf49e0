"""Warnings about a step whose responses teach nothing, each given once in the life of a process.

Pure: texts and one number in, lines out.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_disco.rewards.extract import END_OF_THINKING


class ResponseWarnings:
    """The warnings that have not been given yet."""

    def __init__(self, require_think: bool) -> None:
        """require_think: whether a response without `</think>` gets reward 0."""
        self._thinking, self._mixed = not require_think, False  # given, or of no matter

    def about(self, texts: Sequence[str], mixed: float) -> list[str]:
        """New warnings. texts: the step's responses. mixed: the share of questions with right and wrong responses."""
        lines = []
        if not self._thinking and texts and not any(END_OF_THINKING in text for text in texts):
            self._thinking = True
            lines.append(
                f"no response has {END_OF_THINKING}, so every reward is 0: raise generation.max_response_length if "
                "they are cut off, or set reward.require_think=false for a model that does not think so"
            )
        if not self._mixed and mixed == 0:
            self._mixed = True
            lines.append(
                "no question has both right and wrong responses, so nothing is learned from this step: look at "
                "rollouts/; easier or harder questions, or more responses a question, would help"
            )
        return lines
