"""The grader's table: answers that count as the gold answer, and near misses that do not."""

from __future__ import annotations

import pytest

from nemo_disco.rewards import MathGrader

EQUAL = [
    # gold, answers that mean the same
    (r"\frac{1}{2}", ["0.5", ".5", "1/2", r"\dfrac12", r"\frac{2}{4}", r"2^{-1}", r"50\%", r"$\frac12$"]),
    (r"\frac{1}{3}", ["0.333333", r"\frac{-1}{-3}", "2/6", r"3^{-1}"]),
    (r"-\frac{3}{8}", [r"\frac{-3}{8}", r"\frac{3}{-8}", "-0.375", r"-3/8"]),
    ("80\\%", ["80", "0.8", "80%", r"80 \%", r"\frac{4}{5}", "80 percent", r"80\text{ percent}"]),
    (r"\frac{200}{3}\%", [r"66\frac{2}{3}\%", r"\frac{200}{3}"]),
    ("5", [r"5\text{ cm}", "5 cm", r"5\,\text{cm}", r"5 \mathrm{~cm}", r"x=5", r"5.0", r"\$5", r"5^\circ", "5 units"]),
    (r"864 \mbox{ inches}^2", ["864", r"864\text{ square inches}", r"864\text{ in}^2"]),
    (r"60\text{ miles per hour}", ["60", "60 mph"]),
    ("32348", [r"32,348", r"32{,}348", r"32,\!348", r"\$32,\!348", r"32\,348", "32 348"]),
    (r"\frac{1}{29322216}", [r"\frac{1}{29,\!322,\!216}"]),
    (r"2\frac{1}{2}", ["2.5", r"\frac{5}{2}", r"2 \frac12", "2 1/2"]),
    ("(1,2)", [r"\left( 1, 2 \right)", "(1, 2)", r"(1.0,\frac{4}{2})"]),
    ("[-2,7]", [r"x \in [-2,7]", r"-2 \le x \le 7", r"\left[-2,7\right]", r"-2\leq x\leqslant7"]),
    (r"(5,\infty)", ["x>5", r"5<x", r"(5, +\infty)"]),
    (r"(-\infty,3]\cup[5,\infty)", [r"[5,\infty) \cup (-\infty,3]"]),
    ("1,2", ["2,1", r"\{1,2\}", "1, 2", r"1 \text{ and } 2", r"1\text{, and }2", "x=1 or x=2"]),
    (r"6, 8\text{, and }10", ["10,8,6"]),
    (r"3 \pm 2\sqrt{2}", [r"3+2\sqrt{2}, 3-2\sqrt{2}", r"3-\sqrt{8}, 3+\sqrt 8"]),
    (r"\begin{pmatrix} 1 \\ -1/2 \end{pmatrix}", [r"\begin{bmatrix}1\\-\frac12\end{bmatrix}"]),
    (r"\text{Evelyn}", ["Evelyn", "evelyn", r"\textbf{Evelyn}"]),
    (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\mathrm{C}"]),
    (r"\text{A, B}", ["A,B", r"\text{A,B}"]),
    ("6+9i", ["9i+6", "6 + 9 i", r"9 i + 6", r"3(2+3i)"]),
    ("2i", ["(1+i)^2", r"\frac{-2}{i}"]),
    (r"\frac{\sqrt{2}}{2}", [r"\frac{1}{\sqrt{2}}", r"\sqrt{\frac12}", r"2^{-1/2}", "0.707107", r"\sin\frac{\pi}{4}"]),
    (r"12\pi", [r"12 \pi", "12\N{GREEK SMALL LETTER PI}", "12pi", r"\pi \cdot 12"]),
    ("x^2+2x+1", ["(x+1)^2", r"1+x(x+2)"]),
    ("y = 2x+3", ["2x+3", "y=3+2x", "2x - y + 3 = 0", "2x+3=y"]),
    ("x^2+y^2=-1", ["-1=y^2+x^2", "x^2+y^2+1=0"]),
    (r"\frac{e^{-at}-e^{-bt}}{b-a}", [r"\frac{1}{b-a}\left(e^{-a t}-e^{-b t}\right)"]),
    (r"2007 + \frac\pi 2", [r"2007+\frac{\pi}{2}", r"\frac{4014+\pi}{2}"]),
    (r"8.7 \times 10^{8}", ["8.7e8", "870000000", r"8.7\cdot 10^8", r"870 \times 10^6"]),
    ("4343_6", ["4343_{6}", "4343"]),
    ("1:4", ["1 : 4", r"\frac14"]),
    (r"\binom{5}{2}", ["10", r"\frac{5!}{2!3!}"]),
    ("142.0", ["142"]),
    ("9.6\n", ["9.6", "9.60"]),
]  # fmt: skip

DIFFERENT = [
    # gold, answers that do not mean the same
    (r"\frac{1}{3}", ["0.3333", "0.33", "0.333334", r"\frac{1}{4}", "3"]),
    ("12", ["1 2", "12x", r"1\cdot 2", "21", "1.2", "1,2"]),
    ("6m", ["6", "6s", "7m"]),
    (r"5\text{ cm}", [r"5\text{ m}", r"5\text{ km}", r"6\text{ cm}"]),
    ("2", [r"2\text{ million}", r"2\%x", "2x"]),
    ("(1,2)", ["(2,1)", "[1,2]", "(1,2]", "(1,3)"]),
    ("(2,1)", ["(1,2)"]),
    ("1,2", ["1", "2", "1,2,3", "(1,3)"]),
    (
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        [r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"],
    ),
    (r"x\text{ is even}", [r"x\text{ is odd}", "x"]),
    ("13", ["not 12 but 13", "12 or 13"]),
    (r"\text{(C)}", ["(D)", "CD", r"\text{A}"]),
    (r"2\times10^{-7}\pi", [r"3\times10^{-7}\pi"]),
    (r"\pi\times10^{-20}", [r"2\pi\times10^{-20}", "3.2e-20", "0"]),
    (r"10^{-9}", ["0.000000002", "0"]),
    ("4343_6", ["4343_7", "4344_6", "43_6"]),
    ("x^2+1", ["x^2", "x^2-1", "y^2+1"]),
    ("x=5", ["y=5", "x=6", "x>5"]),
    ("6+9i", ["6-9i", "9+6i"]),
    (r"\sqrt{2}", ["1.41", "1.4142", "2"]),
    ("0.5", [r"0.5\%"]),
    ("x^2+y^2=-1", ["x^2+y^2=-2"]),
    ("N=n", ["N=n+1"]),
    (r"0.56 = 56\%", [r"0.57=56\%"]),
]


def box(answer: str) -> str:
    return rf"Let us see.</think> So the answer is \boxed{{{answer}}}."


@pytest.mark.parametrize(("gold", "answers"), EQUAL, ids=[gold for gold, _ in EQUAL])
def test_equal(grader: MathGrader, gold: str, answers: list[str]) -> None:
    verdicts = grader.grade_with_reasons([box(answer) for answer in [gold, *answers]], [gold] * (len(answers) + 1))
    assert [
        a for a, v in zip([gold, *answers], verdicts, strict=True) if (v.reward, v.reason) != (1.0, "correct")
    ] == []


@pytest.mark.parametrize(("gold", "answers"), DIFFERENT, ids=[gold for gold, _ in DIFFERENT])
def test_different(grader: MathGrader, gold: str, answers: list[str]) -> None:
    verdicts = grader.grade_with_reasons([box(answer) for answer in answers], [gold] * len(answers))
    assert [
        a for a, v in zip(answers, verdicts, strict=True) if v.reward or v.reason not in ("wrong", "unparsable answer")
    ] == []


def test_any_of_several_gold_answers_counts(grader: MathGrader) -> None:
    golds = ["0.01\n", r"\sqrt{3}"]
    assert grader.grade([box("0.01"), box(r"\frac{3}{\sqrt{3}}"), box("0.02")], [golds, tuple(golds), golds]) == [
        1.0,
        1.0,
        0.0,
    ]


def test_the_last_box_counts(grader: MathGrader) -> None:
    assert grader.grade([r"\boxed{1} \boxed{2}", r"\boxed{2} \boxed{1}"], ["2", "2"]) == [1.0, 0.0]


def test_a_gold_answer_may_be_boxed(grader: MathGrader) -> None:
    assert grader.grade([box("5")], [r"It is $\boxed{5}$"]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "reason"), [("", "unparsable gold answer"), ("@#", "unparsable gold answer"), ("7", "wrong")]
)
def test_reasons_tell_a_bad_gold_answer_from_a_wrong_one(grader: MathGrader, gold: str, reason: str) -> None:
    assert [v.reason for v in grader.grade_with_reasons([box("x+1")], [gold])] == [reason]
