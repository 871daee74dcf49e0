"""Tests that are a script run in a process apart from the program: right programs pass, forged results do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nemo_disco.rewards import verdict
from nemo_disco.rewards.code.python_tests import PythonTests


@pytest.fixture(scope="module")
def verifier() -> Iterator[PythonTests]:
    with PythonTests(timeout=5.0, workers=1) as verifier:
        yield verifier


def reason(verifier: PythonTests, code: str, tests: str) -> str:
    [outcome] = verifier.grade_with_reasons([f"```python\n{code}\n```"], [tests])
    return outcome.reason


CHECK = "METADATA = {{}}\n\n\ndef check(candidate):\n    {}\n\ncheck(f)\n"
STACK = """
class Empty(ValueError): pass
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, item): self.items.append(item)
    def pop(self):
        if not self.items: raise Empty("none left")
        return self.items.pop()
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
def reverse(stack): return Stack(stack.items[::-1])
"""
# By name: a program, the body of a test that it passes, and that of a test that it fails ("pass": there is none).
HONEST = {
    "check": ("f = lambda x: x + 1", "assert candidate(1) == 2; assert candidate(2) == 3, 'three'", "pass"),
    "loop": ("def f(x): return x * x", "for i in range(99): assert candidate(i) == i**2", "assert candidate(2) == 5"),
    "isclose": (
        "def f(x): return x / 3",
        "import math\n    assert math.isclose(candidate(1), 0.3333333333) and abs(candidate(3) - 1) < 1e-6",
        "assert abs(candidate(3) - 2) < 1e-6",
    ),
    "in place": (
        "def f(x, y):\n    x.sort()\n    x[0].append(9)\n    y['a'] = {1}",
        "a, b = [[3], [1]], {}\n    candidate(a, y=b); assert a == [[1, 9], [3]] and b == {'a': {1}}",
        "a = [[2]]; candidate(a, {}); assert a == [[2]]",
    ),
    "exceptions": (
        "def f(x):\n    if x < 0: raise ValueError(f'{x} is negative')\n    return {}[x]",
        "try:\n        candidate(-1)\n    except ValueError as e:\n        assert str(e) == '-1 is negative'\n"
        "    else:\n        assert False\n    import unittest\n"
        "    with unittest.TestCase().assertRaises(KeyError): candidate(1)",
        "candidate(-1)",
    ),
    "values": (
        "def f(x): return x",
        "from fractions import Fraction\n    import datetime\n"
        "    for v in (None, True, 2**5000, -1.5, float('inf'), 'é\\ud800', b'\\x00', 1j, (1, [2, (3,)]), {1: {2}}, "
        "frozenset([1]), Fraction(1, 3), datetime.date(2020, 1, 2), range(3), {(1, 2): 'x'}):\n"
        "        assert candidate(v) == v and type(candidate(v)) is type(v)\n    assert candidate(x=float('nan')) != 0",
        "assert candidate((1,)) == [1]",
    ),
    "numpy": (
        "import numpy as np\ndef f(n): return np.arange(n) * np.float64(0.5)",
        "import numpy as np\n    assert np.allclose(candidate(3), [0, 0.5, 1])",
        "import numpy as np\n    assert np.allclose(candidate(3), [0, 0.5, 2])",
    ),
    "generator": (
        "def f(n):\n    for i in range(n): yield i",
        "assert list(candidate(3)) == [0, 1, 2] and next(candidate(1)) == 0",
        "assert list(candidate(3)) == [0, 1]",
    ),
    "closure": ("f = lambda a: lambda b: a + b", "assert candidate(1)(2) == 3", "assert candidate(1)(2) == 4"),
    "state": (
        STACK + "f = Stack",
        "s = Stack(); s.push(4); assert len(s) == 1 and s.items == [4] and isinstance(s, Stack) and s.pop() == 4\n"
        "    try: s.pop()\n    except Empty as e: assert str(e) == 'none left'\n    else: assert False\n"
        "    assert reverse(Stack([1, 2])) == Stack([2, 1]) != Stack()",
        "s = Stack(); s.push(4); assert s.pop() == 5",
    ),
    "data of an object": (
        "class node:\n    def __init__(self, val, next): self.val, self.next = val, next\n"
        "def f(values): return node(values[0], f(values[1:])) if values else None",
        "h = candidate([1, 2]); assert h.val == 1 and h.next.val == 2 and h.next.next is None",
        "assert candidate([1]).val == 2",
    ),
    "unittest": (
        "def f(x): return x",
        "import unittest\n    class T(unittest.TestCase):\n        def test(self): self.assertEqual(candidate(3), 3)\n"
        "    globals()['T'] = T\n    unittest.main()",
        "import unittest\n    class T(unittest.TestCase):\n        def test(self): self.assertEqual(candidate(3), 4)\n"
        "    globals()['T'] = T\n    unittest.main()",
    ),
    "method": (
        "class Solution:\n    def two(self, nums: List[int], k: int) -> List[int]: return [n for n in nums if n > k]\n"
        "f = Solution().two",
        "assert candidate(nums=[1, 2, 3], k=1) == [2, 3] == Solution().two([3, 2], 0)[::-1]",
        "assert candidate(nums=[1, 2, 3], k=1) == [3, 2]",
    ),
    "recursion": (
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)",
        "assert candidate(500) == 500\n    try: candidate(10**6)\n    except RecursionError: pass",
        "candidate(10**6)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("code", "right", "wrong"), HONEST.values(), ids=HONEST.keys())
def test_honest_programs(verifier: PythonTests, code: str, right: str, wrong: str) -> None:
    assert reason(verifier, code, CHECK.format(right)) == verdict.CORRECT
    if wrong != "pass":
        assert reason(verifier, code, CHECK.format(wrong)) == verdict.FAILED_TEST


def test_tests_run_as_main(verifier: PythonTests) -> None:
    """The tests have `__name__ == "__main__"`, and their SystemExit is a success; the program's SystemExit is not."""
    tests = "def test_f():\n    assert f(1) == 1\nif __name__ == '__main__':\n    test_f()\n    raise SystemExit"
    assert reason(verifier, "def f(x): return x", tests) == verdict.CORRECT
    for wrong in ("return x + 1", "raise SystemExit", "raise SystemExit(0)"):
        assert reason(verifier, f"def f(x): {wrong}", tests) == verdict.FAILED_TEST


def test_the_function_may_have_a_builtin_name(verifier: PythonTests) -> None:
    tests = CHECK.format("assert candidate(1) == 2").replace("check(f)", "check(sum)")
    assert reason(verifier, "def sum(x): return x + 1", tests) == verdict.CORRECT
    assert reason(verifier, "def sum(x): return x", tests) == verdict.FAILED_TEST
    assert reason(verifier, "def gcd(*x): return 0", "for i in (4, 6): assert gcd(i, i) == i") == verdict.FAILED_TEST


def test_tests_that_give_the_program_more_than_values_are_unsupported(verifier: PythonTests) -> None:
    tests = CHECK.format("assert candidate(lambda x: x) == 2")
    assert reason(verifier, "def f(x): return 2", tests) == verdict.UNSUPPORTED_TEST


GOLD = "import math\n" + CHECK.format(
    "wanted = [7919, 104729]\n    for i, w in enumerate(wanted):\n"
    "        r = candidate(i)\n        assert r == w\n        assert abs(r - w) < 1e-9 and math.isclose(r, w)"
)
ALWAYS = """
class Same:
    def __init__(self, *_): pass
    def __getattr__(self, name): return lambda *_: True
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __call__ = lambda *_: True
    __sub__ = __rsub__ = __abs__ = __float__ = lambda *_: 0.0
"""
TAKE_OVER = """
import os, sys, json
def f(x):
    for fd in range(3, 64):
        for text in (b'{"value": true, "arguments": []}', b'\\n' * 9, b'[]\\n', b'unsendable'):
            try: os.write(fd, text)
            except OSError: pass
    %s
"""
FORGERIES = {
    "redefines check": "def check(candidate): pass\ndef f(x): return 0",
    "claims a class that tests bind": ALWAYS.replace("Same", "METADATA") + "def f(x): return METADATA()",
    "redefines the built-ins": "import builtins\ndef abs(x): return 0.0\ndef enumerate(x): return []\n"
    "builtins.abs, builtins.enumerate = abs, enumerate\nclass math:\n    isclose = lambda *_: True\n"
    "def f(x): return 0\nclass AssertionError(BaseException): pass",
    "always equal": ALWAYS + "def f(x): return Same()",
    "always equal class": ALWAYS.replace("Same", "f"),
    "always equal number": "class E(int):\n    __eq__ = lambda *_: True\n    __sub__ = lambda *_: 0\n"
    "    __ne__ = lambda *_: False\ndef f(x): return E(3)",
    "never unequal exception": "class E(AssertionError):\n    def __bool__(self): return False\ndef f(x): raise E()",
    "exits": "import sys\ndef f(x): sys.exit(0)",
    "exits at once": "import os\ndef f(x): os._exit(0)",
    "keyboard interrupt": "def f(x): raise KeyboardInterrupt",
    "frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for n in (*frame.f_locals.values(), *frame.f_globals.values()):\n"
    "            if isinstance(n, list) and n[:1] == [7919]: return n[x]\n        frame = frame.f_back",
    "collector": "import gc\ndef f(x):\n    for o in gc.get_objects():\n"
    "        if isinstance(o, list) and o[:1] == [7919]: return o[x]\n"
    "        if isinstance(o, dict) and 'wanted' in o: return o['wanted'][x]",
    "memory of others": "import os\ndef f(x):\n    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
    "        if int(pid) != os.getpid():\n            try: open(f'/proc/{pid}/mem', 'rb'); return [7919, 104729][x]\n"
    "            except OSError: pass\n    return 0",
    "writes to all": TAKE_OVER % "return 0",
    "writes to all and exits": TAKE_OVER % "os._exit(0)",
    "writes before": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[]\\n' * 9)\n"
    "    except OSError: pass\ndef f(x): return 0",
    "closes all": "import os\ndef f(x):\n    os.closerange(3, 64)\n    return 0",
    "deep answer": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "other end's names": "import os\ndef f(x): return 0\nfor fd in range(3, 64):\n"
    '    try: os.write(fd, b\'["check", "enumerate", "abs", "__builtins__", "f"]\\n\')\n    except OSError: pass',
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES.keys())
def test_forgeries_fail(verifier: PythonTests, code: str) -> None:
    assert reason(verifier, code, GOLD) in (verdict.FAILED_TEST, verdict.NO_MEMORY)
    assert reason(verifier, "def f(x): return [7919, 104729][x]", GOLD) == verdict.CORRECT


@pytest.mark.parametrize("name", ["METADATA", "List", "f"])
def test_methods_of_a_returned_object_answer_no_test(verifier: PythonTests, name: str) -> None:
    """A program can name its class anything; the tests see methods only of a class that they use by name."""
    code = "def f(x): pass\n" + ALWAYS.replace("Same", name) + ("" if name == "f" else f"f = lambda x: {name}()")
    for test in ("assert candidate(1).startswith('s')", "assert 's' in candidate(1)", "assert len(candidate(1)) == 1"):
        assert reason(verifier, code, CHECK.format(test)) == verdict.FAILED_TEST


def test_tests_cannot_survive_the_end_of_the_program(verifier: PythonTests) -> None:
    tests = CHECK.format("for _ in range(9):\n        try: candidate(1)\n        except BaseException: pass")
    for code in ("os._exit(0)", "os.closerange(3, 64)", "os.write(next(filter(link, range(3, 64))), b'}')"):
        link = "import stat\nlink = lambda fd: fd != 200 and stat.S_ISSOCK(os.fstat(fd).st_mode) if ok(fd) else False\n"
        ok = "def ok(fd):\n    try: os.fstat(fd); return True\n    except OSError: return False\n"
        assert reason(verifier, f"import os\n{ok}{link}def f(x): {code}", tests) == verdict.FAILED_TEST


def test_the_time_limit_covers_program_and_tests() -> None:
    with PythonTests(timeout=1.0, workers=1) as verifier:
        spin = "import time\ndef f(x):\n    while time.process_time() < 0.7: pass\n    return x"
        alone = CHECK.format("assert candidate(1) == 1")
        both = CHECK.format("import time\n    assert candidate(1) == 1\n    while time.process_time() < 0.7: pass")
        assert reason(verifier, spin, alone) == verdict.CORRECT
        assert reason(verifier, spin, both) == verdict.TIMEOUT
        assert reason(verifier, "def f(x):\n    while True: pass", alone) == verdict.TIMEOUT
        assert reason(verifier, "def f(x): return [0] * 10**9", alone) == verdict.NO_MEMORY
