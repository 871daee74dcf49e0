"""Reads a question's gold answer, which is its tests, into cases, and compares results with them. Starts no process.

Gold answers are the user's own data: they are parsed, but none of their code is run here.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from nemo_disco.runtime.errors import UserError

_FUNCTION_KEYS = ("fn_name", "func_name", "function_name")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_KNOWN_KEYS = {"inputs", "outputs", "input", "output", "testtype", "type", "metadata", *_FUNCTION_KEYS}


@dataclass(frozen=True)
class ProgramCases:
    """Pairs (input, expected output); the program is run once for each."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CallCases:
    """Calls of `function`, one for each list of arguments; `expected[i]` holds the return values that pass call i."""

    function: str
    arguments: tuple[list[Any], ...]
    expected: tuple[list[Any], ...]


@dataclass(frozen=True)
class ExpressionCases:
    """Expressions, evaluated after `setup`, and their expected values: from `assert EXPRESSION == VALUE` lines."""

    setup: str
    expressions: tuple[str, ...]
    expected: tuple[Any, ...]


@dataclass(frozen=True)
class Script:
    """Python source that raises if the program is wrong."""

    text: str


Cases = ProgramCases | CallCases | ExpressionCases | Script


def read_cases(tests: str) -> Cases:
    """The cases of a gold answer.

    JSON: `{"inputs": [...], "outputs": [...]}` (APPS, TACO), or a list of `{"input": ..., "output": ...}`
    (LiveCodeBench); with `fn_name` they are calls. Anything else is Python. Raises UserError for unusable tests.
    """
    start = tests.lstrip()[:1]
    try:
        content = json.loads(tests) if start in ("{", "[") else None
    except ValueError as error:
        if start == "{":
            raise _unusable(f"they are not JSON ({error})", tests) from error
        content = None
    if isinstance(content, dict):
        return _read_mapping(content, tests)
    if isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
        return _read_list(content, tests)
    return _read_python(tests)


def _read_mapping(content: dict[str, Any], tests: str) -> Cases:
    if unknown := sorted(content.keys() - _KNOWN_KEYS):
        raise _unusable(f"the key {unknown[0]!r} is unknown; the keys are inputs, outputs and fn_name", tests)
    inputs, outputs = content.get("inputs", content.get("input")), content.get("outputs", content.get("output"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise _unusable("they are not `inputs` and `outputs`, two lists of the same length", tests)
    function = _function_name(content)
    if function is None:
        texts = [[_read_text(value, tests) for value in values] for values in (inputs, outputs)]
        return ProgramCases(tuple(zip(*texts, strict=True)))
    calls = [_read_call(arguments, output, tests) for arguments, output in zip(inputs, outputs, strict=True)]
    return CallCases(function, tuple(c[0] for c in calls), tuple(c[1] for c in calls))


def _read_list(content: list[dict[str, Any]], tests: str) -> Cases:
    if not all({"input", "output"} <= item.keys() for item in content):
        raise _unusable("each case needs `input` and `output`", tests)
    kinds = {str(item.get("testtype", item.get("type", ""))) for item in content}
    functions = {_function_name(item) for item in content}
    if len(kinds) > 1 or len(functions) > 1:
        raise _unusable("programs and calls, or calls of several functions, are mixed", tests)
    function = functions.pop()
    if function is None and kinds & {"functional", "function_call", "call_based"}:
        raise _unusable("they are calls, but no `fn_name` names the function", tests)
    inputs, outputs = [item["input"] for item in content], [item["output"] for item in content]
    return _read_mapping({"inputs": inputs, "outputs": outputs, "fn_name": function}, tests)


def _function_name(content: dict[str, Any]) -> str | None:
    """The name of the function to call; None if the program is to be run."""
    metadata = content.get("metadata")
    for place in (content, metadata if isinstance(metadata, dict) else {}):
        for key in _FUNCTION_KEYS:
            if place.get(key):
                return str(place[key])
    return None


def _read_text(value: Any, tests: str) -> str:
    """An input or output as text; a list holds its lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(line, (str, int, float)) for line in value):
        return "\n".join(map(str, value))
    raise _unusable("an input or output is neither a text nor a list of lines; calls need `fn_name`", tests)


def _read_call(arguments: Any, output: Any, tests: str) -> tuple[list[Any], list[Any]]:
    """(arguments, return values that pass). Arguments are a list, or a text with one JSON value on each line."""
    if isinstance(arguments, str):
        try:
            values = [json.loads(line) for line in arguments.splitlines() if line.strip()]
            return values, [json.loads(output) if isinstance(output, str) else output]
        except ValueError as error:
            raise _unusable(f"a call's arguments and output are one JSON value a line ({error})", tests) from error
    if not isinstance(arguments, list):
        raise _unusable("a call's arguments are neither a list nor lines of JSON", tests)
    # APPS and TACO often, but not always, wrap the return value in a list of one.
    return arguments, [output, output[0]] if isinstance(output, list) and output else [output]


def _read_python(tests: str) -> Cases:
    """ExpressionCases if all tests compare with literals (these values then stay in this process), else a Script."""
    try:
        statements = ast.parse(tests).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unusable(f"they are not Python ({error})", tests) from error
    if not any(map(_has_effect, statements)):
        raise _unusable("they define names but test nothing; end them with a call, such as `check(NAME)`", tests)
    setup: list[str] = []
    cases: list[tuple[str, Any]] = []
    for statement in statements:
        if isinstance(statement, (ast.Import, ast.ImportFrom)) and not cases:
            setup.append(ast.unparse(statement))
        elif isinstance(statement, ast.Assert) and (case := _read_comparison(statement.test)):
            cases.append(case)
        else:
            return Script(tests)
    if not cases:
        return Script(tests)
    return ExpressionCases("\n".join(setup), tuple(text for text, _ in cases), tuple(value for _, value in cases))


def _has_effect(statement: ast.stmt) -> bool:
    """True if the statement is more than a definition."""
    if isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign)):
        return any(isinstance(node, ast.Call) for node in ast.walk(statement))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
    return not isinstance(statement, definitions)


def _read_comparison(test: ast.expr) -> tuple[str, Any] | None:
    """(expression, value) for `expression == value` with a literal value, else None."""
    if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)):
        return None
    try:
        expected = ast.literal_eval(test.comparators[0])
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return (ast.unparse(test.left), expected) if _is_plain(expected) else None


def _is_plain(literal: Any) -> bool:
    if isinstance(literal, dict):
        return all(_is_plain(item) for pair in literal.items() for item in pair)
    if isinstance(literal, (list, tuple, set)):
        return all(map(_is_plain, literal))
    return literal is None or isinstance(literal, (bool, int, float, str))


def decode_plain(encoded: Any) -> Any:
    """The value that confined_process.encode_plain encoded. Raises ValueError, KeyError or TypeError for other JSON."""
    if isinstance(encoded, list):
        return [decode_plain(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    [(kind, items)] = encoded.items()
    if kind == "tuple":
        return tuple(decode_plain(item) for item in items)
    if kind == "set":
        return frozenset(decode_plain(item) for item in items)
    if kind == "ratio":
        return Fraction(*items)
    return {decode_plain(key): decode_plain(item) for key, item in items}


def as_json(value: Any) -> Any:
    """The value after a trip through JSON, which makes tuples lists and keys text; call cases compare such values."""
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(key): as_json(item) for key, item in value.items()}
    return value


def outputs_match(output: str, expected: str) -> bool:
    """True if a program printed the expected lines, apart from spaces at their ends.

    A number that is expected with a decimal point may have fewer or more zeros at its end: 0.5 for 0.50.
    """
    lines, expected_lines = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (output, expected))
    return len(lines) == len(expected_lines) and all(map(_lines_match, lines, expected_lines))


def _lines_match(line: str, expected: str) -> bool:
    if line == expected:
        return True
    words, expected_words = line.split(" "), expected.split(" ")
    return len(words) == len(expected_words) and all(map(_words_match, words, expected_words))


def _words_match(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(expected) and "." in expected):
        return False
    return Decimal(word) == Decimal(expected)


def _unusable(problem: str, tests: str) -> UserError:
    return UserError(f"reward.verifier=python_tests: a question's tests cannot be used: {problem}: {tests[:80]!r}")
