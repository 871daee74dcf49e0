"""A grader's verdict on one response, and the possible reasons for it. Plain data: imports nothing of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CORRECT: Final = "correct"
WRONG: Final = "wrong"
NO_BOX: Final = "no boxed answer"
OPEN_BOX: Final = "unclosed boxed answer"
EMPTY_BOX: Final = "empty boxed answer"
NO_THINK: Final = "no </think>"
TOO_LONG: Final = "answer too long"
UNPARSABLE: Final = "unparsable answer"
UNPARSABLE_GOLD: Final = "unparsable gold answer"
TIMEOUT: Final = "timeout"
NO_MEMORY: Final = "out of memory"
DIED: Final = "grader worker died"
NO_CHOICE: Final = "no choice"
NO_CODE: Final = "no code block"
FAILED_TEST: Final = "failed a test"
UNSUPPORTED_TEST: Final = "test gives the program more than values"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A response's reward, 1.0 or 0.0 or any number from a user's function, and the reason: one of the constants above,
    or "reward X" for a user's reward X; CORRECT exactly where the reward is 1."""

    reward: float
    reason: str

    @classmethod
    def from_reason(cls, reason: str) -> Verdict:
        return cls(1.0 if reason == CORRECT else 0.0, reason)
