"""The forms that a question's tests come in, read into cases. Knows nothing of processes.

Gold answers are the user's own data: they are parsed, but none of their code is run here.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from nemo_disco.runtime.errors import UserError

_FUNCTION_KEYS = ("fn_name", "func_name", "function_name")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_KNOWN = {"inputs", "outputs", "input", "output", "testtype", "type", "metadata", *_FUNCTION_KEYS}


@dataclass(frozen=True)
class ProgramCases:
    """The program is run once for each (input, output)."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CallCases:
    """`function` is called once for each list of arguments; `wanted[i]` holds the values that are right for it."""

    function: str
    arguments: tuple[list[Any], ...]
    wanted: tuple[list[Any], ...]


@dataclass(frozen=True)
class ExpressionCases:
    """Each expression, after `setup`, has the wanted value: what `assert EXPRESSION == VALUE` says."""

    setup: str
    expressions: tuple[str, ...]
    wanted: tuple[Any, ...]


@dataclass(frozen=True)
class Script:
    """Python that raises where the program is wrong."""

    text: str


Cases = ProgramCases | CallCases | ExpressionCases | Script


def read_cases(tests: str) -> Cases:
    """The cases of a gold answer.

    JSON: `{"inputs": [...], "outputs": [...]}` (APPS, TACO), or a list of `{"input": ..., "output": ...}`
    (LiveCodeBench); with `fn_name` they are calls. Anything else is Python. Raises UserError for neither.
    """
    start = tests.lstrip()[:1]
    try:
        content = json.loads(tests) if start in ("{", "[") else None
    except ValueError as error:
        if start == "{":
            raise _damaged(f"they are not JSON ({error})", tests) from error
        content = None
    if isinstance(content, dict):
        return _of_mapping(content, tests)
    if isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
        return _of_list(content, tests)
    return _of_python(tests)


def _of_mapping(content: dict[str, Any], tests: str) -> Cases:
    if unknown := sorted(content.keys() - _KNOWN):
        raise _damaged(f"nothing is known of {unknown[0]!r}; the keys are inputs, outputs and fn_name", tests)
    inputs, outputs = content.get("inputs", content.get("input")), content.get("outputs", content.get("output"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise _damaged("they are not `inputs` and `outputs`, lists of one length", tests)
    function = _function(content)
    if function is None:
        return ProgramCases(tuple((_text(i, tests), _text(o, tests)) for i, o in zip(inputs, outputs, strict=True)))
    calls = [_call(given, output, tests) for given, output in zip(inputs, outputs, strict=True)]
    return CallCases(function, tuple(c[0] for c in calls), tuple(c[1] for c in calls))


def _of_list(content: list[dict[str, Any]], tests: str) -> Cases:
    if not all({"input", "output"} <= item.keys() for item in content):
        raise _damaged("each is to have `input` and `output`", tests)
    kinds = {str(item.get("testtype", item.get("type", ""))) for item in content}
    functions = {_function(item) for item in content}
    if len(kinds) > 1 or len(functions) > 1:
        raise _damaged("programs and calls, or calls of several functions, are mixed", tests)
    function = functions.pop()
    if function is None and kinds & {"functional", "function_call", "call_based"}:
        raise _damaged("they are calls, but `fn_name` does not say of which function", tests)
    inputs, outputs = [item["input"] for item in content], [item["output"] for item in content]
    return _of_mapping({"inputs": inputs, "outputs": outputs, "fn_name": function}, tests)


def _function(content: dict[str, Any]) -> str | None:
    """The name of the function to call; None where the program is to be run."""
    metadata = content.get("metadata")
    for place in (content, metadata if isinstance(metadata, dict) else {}):
        for key in _FUNCTION_KEYS:
            if place.get(key):
                return str(place[key])
    return None


def _text(given: Any, tests: str) -> str:
    """An input or output as text; lists hold its lines."""
    if isinstance(given, str):
        return given
    if isinstance(given, (int, float)):
        return str(given)
    if isinstance(given, list) and all(isinstance(line, (str, int, float)) for line in given):
        return "\n".join(map(str, given))
    raise _damaged("an input or output is neither a text nor a list of lines; calls need `fn_name`", tests)


def _call(given: Any, output: Any, tests: str) -> tuple[list[Any], list[Any]]:
    """(arguments, the values that are right): a list holds them itself, a text holds one as JSON on each line."""
    if isinstance(given, str):
        try:
            arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
            return arguments, [json.loads(output) if isinstance(output, str) else output]
        except ValueError as error:
            raise _damaged(f"a call's arguments and output are one JSON value a line ({error})", tests) from error
    if not isinstance(given, list):
        raise _damaged("a call's arguments are neither a list nor lines of JSON", tests)
    # These sets put the value into a list of one, and not always.
    return given, [output, output[0]] if isinstance(output, list) and output else [output]


def _of_python(tests: str) -> Cases:
    """ExpressionCases where all tests compare with a literal: then what is expected need not enter the process."""
    try:
        statements = ast.parse(tests).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _damaged(f"they are not Python ({error})", tests) from error
    if not any(map(_does_something, statements)):
        raise _damaged("they define names and then test nothing; end them with a call, such as `check(NAME)`", tests)
    setup: list[str] = []
    found: list[tuple[str, Any]] = []
    for statement in statements:
        if isinstance(statement, (ast.Import, ast.ImportFrom)) and not found:
            setup.append(ast.unparse(statement))
        elif isinstance(statement, ast.Assert) and (case := _comparison(statement.test)):
            found.append(case)
        else:
            return Script(tests)
    if not found:
        return Script(tests)
    return ExpressionCases("\n".join(setup), tuple(text for text, _ in found), tuple(value for _, value in found))


def _does_something(statement: ast.stmt) -> bool:
    """Whether the statement is more than a definition."""
    if isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign)):
        return any(isinstance(node, ast.Call) for node in ast.walk(statement))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass)
    return not isinstance(statement, definitions)


def _comparison(test: ast.expr) -> tuple[str, Any] | None:
    """(expression, value) of `expression == value`, value a literal."""
    if not (isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)):
        return None
    try:
        wanted = ast.literal_eval(test.comparators[0])
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return (ast.unparse(test.left), wanted) if _is_plain(wanted) else None


def _is_plain(literal: Any) -> bool:
    if isinstance(literal, dict):
        return all(_is_plain(item) for pair in literal.items() for item in pair)
    if isinstance(literal, (list, tuple, set)):
        return all(map(_is_plain, literal))
    return literal is None or isinstance(literal, (bool, int, float, str))


def decode_plain(read: Any) -> Any:
    """The Python value that confined_process.encode_plain wrote as JSON.

    Raises ValueError, KeyError or TypeError for other JSON.
    """
    if isinstance(read, list):
        return [decode_plain(item) for item in read]
    if not isinstance(read, dict):
        return read
    [(kind, items)] = read.items()
    if kind == "tuple":
        return tuple(decode_plain(item) for item in items)
    if kind == "set":
        return frozenset(decode_plain(item) for item in items)
    if kind == "ratio":
        return Fraction(*items)
    return {decode_plain(key): decode_plain(item) for key, item in items}


def as_json(returned: Any) -> Any:
    """The value as JSON would have it, which has no tuples and no keys but texts: what call cases compare."""
    if isinstance(returned, (list, tuple)):
        return [as_json(item) for item in returned]
    if isinstance(returned, dict):
        return {key if isinstance(key, str) else json.dumps(key): as_json(item) for key, item in returned.items()}
    return returned


def same_output(printed: str, wanted: str) -> bool:
    """Whether a program printed the lines that are wanted, apart from spaces at their ends.

    A number that is wanted with a decimal point may have other zeros at its end: 0.5 for 0.50.
    """
    mine, lines = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (printed, wanted))
    return len(mine) == len(lines) and all(map(_same_line, mine, lines))


def _same_line(mine: str, wanted: str) -> bool:
    if mine == wanted:
        return True
    words, right = mine.split(" "), wanted.split(" ")
    return len(words) == len(right) and all(map(_same_word, words, right))


def _same_word(mine: str, wanted: str) -> bool:
    if mine == wanted:
        return True
    if not (_NUMBER.fullmatch(mine) and _NUMBER.fullmatch(wanted) and "." in wanted):
        return False
    return Decimal(mine) == Decimal(wanted)


def equal(returned: Any, alternatives: Iterable[Any]) -> bool:
    return any(as_json(returned) == wanted for wanted in alternatives)


def _damaged(what: str, tests: str) -> UserError:
    return UserError(f"reward.verifier=python_tests: the tests of a question cannot be used: {what}: {tests[:80]!r}")
