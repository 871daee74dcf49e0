"""Right programs earn their reward in any style, in any code fence, and with any form of tests."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from nemo_disco.rewards.code.blocks import find_defining_programs, find_reading_programs
from nemo_disco.rewards.code.python_tests import PythonTests
from nemo_disco.runtime.errors import UserError

ADD = "print(sum(map(int, input().split())))"
SUM = {"inputs": ["1 2\n", "30 4"], "outputs": ["3\n", "34"]}


@pytest.fixture(scope="module")
def verifier() -> Iterator[PythonTests]:
    with PythonTests(timeout=10.0, workers=1) as verifier:
        yield verifier


def reason(verifier: PythonTests, response: str, tests: object) -> str:
    gold = tests if isinstance(tests, str) else json.dumps(tests)
    [verdict] = verifier.grade_with_reasons([response], [gold])
    return verdict.reason


PROGRAMS = {
    "buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "buffered output": "import sys\nline = sys.stdin.buffer.readline()\n"
    "sys.stdout.buffer.write(b'%d' % sum(map(int, line.split())))",
    "descriptor": "print(sum(map(int, open(0).read().split())))",
    "os.read": "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 100).split())))",
    "dev stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "fileinput": "import fileinput\nprint(sum(map(int, ''.join(fileinput.input()).split())))",
    "exit": ADD + "\nexit()",
    "quit": ADD + "\nquit(0)",
    "sys.exit": "import sys\n" + ADD + "\nsys.exit(0)",
    "os._exit": "import os\n" + ADD + "\nos._exit(0)",
    "pickle": "import pickle\nclass N:\n    def __init__(self, n): self.n = n\n"
    "a, b = [pickle.loads(pickle.dumps(N(int(x)))).n for x in input().split()]\nprint(a + b)",
    "deepcopy and dataclass": "from __future__ import annotations\nimport copy\n"
    "from dataclasses import dataclass, replace\n"
    "@dataclass(order=True)\nclass P:\n    x: int\n    nxt: P | None = None\n"
    "a, b = map(int, input().split())\np = copy.deepcopy(P(a, P(b)))\nprint(replace(p).x + p.nxt.x)",
    "numpy": "import numpy as np\nprint(np.array(input().split(), dtype=np.int64).sum())",
    "numpy linalg": "import numpy as np\n"
    "a = np.array(input().split(), float)\nprint(round(float(np.linalg.norm(a, 1))))",
    "threads": "import sys, threading\nsys.setrecursionlimit(10**7)\nthreading.stack_size(1 << 27)\n"
    "def deep(n): return 0 if n == 0 else deep(n - 1)\n"
    f"def main():\n    deep(100000)\n    {ADD}\nthreading.Thread(target=main).start()",
    "a thread's large stack": "import threading\nthreading.stack_size(1 << 30)\n"
    f"threading.Thread(target=lambda: {ADD}).start()",
    "recursion through C": "import functools, sys\nsys.setrecursionlimit(10**6)\n@functools.lru_cache(None)\n"
    f"def deep(n): return n and deep(n - 1)\ndeep(100000)\n{ADD}",
    "a file of its own that is not closed": "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
    "streams put in their place": f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach())\n{ADD}",
    "its place": f"import os\nos.path.dirname(os.path.abspath(__file__))\n{ADD}",
    "stack limit": f"import resource\nresource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\n{ADD}",
    "pool": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as p:\n"
    "    print(sum(p.map(int, input().split())))",
    "asyncio": f"import asyncio\nasync def main():\n    await asyncio.sleep(0)\n    {ADD}\nasyncio.run(main())",
    "at exit": "import atexit\natexit.register(lambda: print(sum(xs)))\nxs = list(map(int, input().split()))",
    "fast output": "import io, os, sys\nout = io.StringIO()\nsys.stdout = out\n"
    + ADD
    + "\nos.write(1, out.getvalue().encode())",
    "main": f"def main():\n    {ADD}\nif __name__ == '__main__':\n    main()",
    "generators": "import sys\ninput = iter(sys.stdin.read().split()).__next__\nprint(int(input()) + int(input()))",
    "modules": "import collections, heapq, bisect, math, itertools, functools, re, random, decimal, fractions, "
    "datetime, json, "
    "string, typing, statistics, operator, array, struct, time, queue, copy, enum, textwrap, cmath, sys, abc, zlib, "
    f"hashlib, base64, contextlib, unicodedata, calendar, secrets, uuid, bz2, sqlite3\n{ADD}",
    "signals": f"import signal\nsignal.signal(signal.SIGALRM, print)\nsignal.alarm(5)\n{ADD}",
    "unicode": "a, b = input().split()\nprint(int(a) + int(b), '\\u00e9\\u4e2d'[2:], sep='')",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_programs_in_many_styles(verifier: PythonTests, program: str) -> None:
    assert reason(verifier, f"<think>hm</think>\n```python\n{program}\n```", SUM) == "correct"


def test_a_large_input_and_a_large_output(verifier: PythonTests) -> None:
    numbers = "\n".join(map(str, range(400_000)))
    program = "import sys\ndata = sys.stdin.buffer.read().split()\nprint(*map(int, data), sep='\\n')"
    assert reason(verifier, f"```python\n{program}\n```", {"inputs": [numbers], "outputs": [numbers]}) == "correct"


RESPONSES = {
    "last of two": "```python\n1/0\n```\nbetter:\n```python\n{}\n```",
    "an example follows": "```python\n{}\n```\nFor 1 2 it prints\n```\n3\n```\nas in\n```python\n>>> 1 + 2\n3\n```",
    "its use follows": "```python\n{}\n```\nTry\n```bash\npython a.py\n```\nor\n```python\nprint(1 + 2)\n```",
    "carriage returns": "```python\r\n{}\r\n```\r\nDone.\r\n",
    "tildes": "~~~python\n{}\n~~~",
    "long fence": "````python\n{}\n````",
    "py": "```py\n{}\n```", "python3": "```python3\n{}\n```", "Python": "```Python\n{}\n```",
    "attributes": '```python title="a.py"\n{}\n```', "braces": "```{{.python}}\n{}\n```",
    "no mark": "So:\n```\n{}\n```",
    "spaces": "``` python \n{}\n```  ", "no end": "```python\n{}",
    "within a list": "1. Code:\n   ```python\n   {}\n   ```",
    "within a line": "Here: ```python\n{}\n``` is it.", "end on a line": "```python\n{}```",
    "after thinking": "```python\n1/0\n```\n</think>\n```python\n{}\n```",
    "cut off": "```python\n{}\n```\nShorter:\n```python\nprint(sum(map(int, input(",
    "other language": "```python\n{}\n```\nIn C:\n```c\nint main() {{ return 0; }}\n```",
}  # fmt: skip


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES.keys())
def test_responses_with_many_kinds_of_fence(verifier: PythonTests, response: str) -> None:
    assert reason(verifier, response.format(ADD), SUM) == "correct"


def test_candidates_are_ordered_by_likelihood() -> None:
    assert find_reading_programs("```c\nint x;\n```") == []
    assert find_reading_programs("```\nx\n```\n```py\ny\n```") == ["y\n"]
    two = "```py\ndef f(x): return x\n```\n```py\nprint(f(input()))\n```"
    assert find_defining_programs(two, "assert f(1) == 1")[0].startswith("def f")
    assert find_reading_programs(two)[0].startswith("print")
    quoted = '```python\ns = """\n  x ``` y\n"""\n```'
    assert find_reading_programs(quoted) == ['s = """\n  x ``` y\n"""\n']


DOUBLE = "def double(x):\n    return 2 * x"
SOLUTION = "class Solution:\n    def double(self, x: List[int]) -> List[int]:\n        return [2 * y for y in x]"
REVERSE = (
    "def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        last = None\n"
    "        while head: head.next, last, head = last, head, head.next\n        return last"
)
MIRROR = (
    "def mirror(root: 'TreeNode | None'):\n    if root: root.left, root.right = mirror(root.right), mirror(root.left)\n"
    "    return root"
)
STDIN_TOO = DOUBLE + "\nif __name__ == '__main__':\n    print(double(int(input())))"


@pytest.mark.parametrize(
    ("code", "tests", "right"),
    [
        (DOUBLE, {"fn_name": "double", "inputs": [[2], [-3]], "outputs": [[4], [-6]]}, True),  # APPS
        (DOUBLE, {"fn_name": "double", "inputs": [[2], [-3]], "outputs": [4, -6]}, True),
        (DOUBLE, {"fn_name": "double", "inputs": [[2], [-3]], "outputs": [[4], [6]]}, False),
        (STDIN_TOO, {"fn_name": "double", "inputs": [[2]], "outputs": [[4]]}, True),
        (SOLUTION, {"fn_name": "double", "inputs": [[[1, 2]]], "outputs": [[2, 4]]}, True),
        (SOLUTION, {"fn_name": "double", "inputs": ["[1, 2]"], "outputs": ["[2, 4]"]}, True),  # LiveCodeBench
        (
            SOLUTION,
            [{"input": "[1]", "output": "[2]", "testtype": "functional", "metadata": {"func_name": "double"}}],
            True,
        ),
        (
            SOLUTION,
            [{"input": "[1]", "output": "[3]", "testtype": "functional", "metadata": {"func_name": "double"}}],
            False,
        ),
        (ADD, [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}], True),
        (ADD, {"fn_name": None, "inputs": [["1 2", ""]], "outputs": [["3"]]}, True),  # lines, as in APPS
        (
            "def f(a, b):\n    return (a, {a: b})",
            {"fn_name": "f", "inputs": ['1\n"x"'], "outputs": ['[1, {"1": "x"}]']},
            True,
        ),
        ("def f(d):\n    return d[1]", {"fn_name": "f", "inputs": [[{"1": 5}]], "outputs": [[5]]}, True),
        (
            "import numpy as np\ndef f(n):\n    return np.arange(n)",
            {"fn_name": "f", "inputs": [[2]], "outputs": [[[0, 1]]]},
            True,
        ),
        (
            f"class Solution:\n    {REVERSE}",
            {"fn_name": "reverse", "inputs": [[[1, 2, 3]], [[]]], "outputs": [[3, 2, 1], []]},
            True,
        ),
        (
            "class ListNode:\n    def __init__(self, val=0, next=None): self.val, self.next = val, next\n"
            f"class Solution:\n    {REVERSE}",
            {"fn_name": "reverse", "inputs": ["[1, 2]"], "outputs": ["[1, 2]"]},
            False,
        ),
        (
            MIRROR,
            {"fn_name": "mirror", "inputs": [[[4, 2, 7, 1, None, 6]]], "outputs": [[4, 7, 2, None, 6, None, 1]]},
            True,
        ),
        ("f = print", {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}, False),
        (
            "class E:\n    def __eq__(self, o): return True\nf = lambda x: E()",
            {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]},
            False,
        ),
        ("class E(int):\n    def __eq__(self, o): return True\nf = lambda x: E(9)", "assert f(1) == 3", False),
        ("f = lambda x: (x, {x})", "assert f(1) == (1, {1})\nassert f(2) == (2, {2})", True),
        ("f = lambda x: [x]", "assert f(1) == (1,)", False),
        ("from fractions import Fraction\nf = lambda x: Fraction(x, 2)", "assert f(1) == 0.5", True),
        ("f = lambda x: x / 3", "import math\nassert math.isclose(f(1), 0.33333333333)", True),
        ("import os\nos.write(3, b'[3]')\nos._exit(0)", "assert f(1) == 4", False),
    ],
)
def test_calls_and_assertions(verifier: PythonTests, code: str, tests: object, right: bool) -> None:
    assert (reason(verifier, f"```python\n{code}\n```", tests) == "correct") is right


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": ["1"], "outputs": ["1"], "fname": "f"},
        {"inputs": [], "outputs": []},
        {"inputs": "1", "outputs": "1"},
        {"inputs": [{"a": 1}], "outputs": ["1"]},
        {"inputs": ["x y"], "outputs": ["1"], "fn_name": "f"},
        [{"input": "1", "output": "1", "testtype": "functional"}],
        [{"input": "1"}],
        "{'inputs': ['1']}",
        "def check(candidate):\n    assert candidate(1) == 2\n",
        "import unittest\nMETA = {}\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)",
        "assert f(1) = 1",
    ],
)
def test_tests_that_cannot_be_used_are_refused(verifier: PythonTests, tests: object) -> None:
    with pytest.raises(UserError, match="a question's tests cannot be used"):
        reason(verifier, f"```python\n{ADD}\n```", tests)
