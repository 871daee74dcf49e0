"""The page shows the run directories' data, fetches nothing, runs no text of a model, and notes missing parts."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nemo_disco.evaluation.report import write_report
from nemo_disco.evaluation.rollout_pack import pack_rollouts
from nemo_disco.evaluation.run_data import read_runs
from nemo_disco.runtime.errors import UserError

MakeRun = Callable[..., Path]


class Elements(HTMLParser):
    """The page's element names, the targets of its links, and the names of its event handlers."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def parse_data(page: str) -> dict[str, Any]:
    """The data that the page's scripts read."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def unpack_texts(page: str) -> list[dict[str, Any]]:
    """The page's groups: the texts of their question, answer and responses."""
    chunks = re.findall(r'<script type="text/plain" id="chunk-\d+">(.*?)</script>', page, re.DOTALL)
    return [group for chunk in chunks for group in json.loads(gzip.decompress(base64.b64decode(chunk)))]


def extract_text(page: str) -> str:
    """The visible text of the page, without what its scripts draw."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_page_shows_the_runs_data(make_run: MakeRun) -> None:
    run = make_run()
    path = write_report([run])
    assert path == run / "report.html"
    page = path.read_text()
    (run_data,) = parse_data(page)["runs"]
    assert run_data["steps"] == list(range(1, 41))
    assert run_data["series"]["reward/mean"][9] == pytest.approx(0.35)
    assert run_data["series"]["grad_norm"][2] is None
    assert run_data["delta"] == pytest.approx(3e-3)
    points = run_data["accuracy"]["arithmetic"]
    assert [p["step"] for p in points] == [0, 40]
    assert all(p["low"] < p["value"] < p["high"] for p in points)
    text = extract_text(page)
    for part in ("Pass@1 (avg@8)", "64 questions", "step 0 → 40", "greedy accuracy", "10 of 40", "2.4 s", "1.6 min"):
        assert part in text


def test_new_metrics_stand_beside_an_older_run_without_them(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("old", steps=5), make_run("new", steps=5, estimators=True)]
    old, new = parse_data(write_report(runs, tmp_path / "page.html").read_text())["runs"]
    added = set(new["series"]) - set(old["series"])
    assert {"policy/kl_after", "constraint/kl_after_over_delta", "groups/pass@2", "dro/effective_sample"} <= added
    assert not set(old["series"]) - set(new["series"])
    assert new["series"]["policy/kl_after"] == [pytest.approx(2e-4 * s) if s != 2 else None for s in range(1, 6)]
    # Lists of objects are for readers of metrics.jsonl.
    assert not {"constraint/by_mini_batch", "mismatch/worst_tokens"} & added


def test_two_evaluations_that_were_made_differently_are_noted(make_run: MakeRun) -> None:
    run = make_run()
    assert "made differently" not in extract_text(write_report([run]).read_text())
    for file, precision in zip(sorted((run / "evaluation").glob("*.json")), ("<b>32", "bf16"), strict=True):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"identity": {"precision": precision}}))
    assert "made differently" in extract_text(page := write_report([run]).read_text()) and "<b>32" not in page


def test_every_rollout_is_in_the_page_unchanged(make_run: MakeRun) -> None:
    run = make_run(steps=5)
    page = write_report([run]).read_text()
    index, texts = parse_data(page)["index"], unpack_texts(page)
    assert index["size"] == [4] * 15 and len(index["reward"]) == 60
    saved = [json.loads(line) for s in range(1, 6) for line in (run / f"rollouts/step_{s}.jsonl").open()]
    assert [r for group in texts for r in group["responses"]] == [row["response"] for row in saved]
    assert index["correct"] == [int(row["correct"]) for row in saved]
    assert index["truncated"] == [int(row["truncated"]) for row in saved]
    assert index["slot"] == list(range(15)) and set(index["chunk"]) == {0}
    assert texts[4]["question"] == "What is 1 + 2?" and texts[4]["answer"] == "3"


def test_the_page_fetches_nothing_and_runs_no_text_of_a_model(make_run: MakeRun) -> None:
    run = make_run(name="<img src=x onerror=alert(1)>", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "</script><b>": 1.0}) + "\n")
    page = write_report([run]).read_text()
    assert "</script><b>" not in page and "<img" not in page and "<b>bold" not in page
    assert "default-src 'none'" in page
    elements = Elements(page)
    assert elements.links and all(link.startswith("#") for link in elements.links)
    assert elements.handlers == [] and "img" not in elements.names
    assert not re.search(
        r"\b(innerHTML|outerHTML|insertAdjacentHTML|(document\.write|eval|fetch|import|Function)\()", page
    )
    assert set(re.findall(r"https?://[^\s\"'<>`]+", page)) == {"http://www.w3.org/2000/svg"}


def test_several_runs_have_distinct_labels_and_differing_settings(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a/run", lr=1e-4), make_run("b/run", lr=2e-4)]
    out = tmp_path / "compared.html"
    assert write_report(runs, out) == out
    page = out.read_text()
    assert [run["label"] for run in parse_data(page)["runs"]] == ["a/run", "b/run"]
    differing = page[page.index("Settings that differ between the runs") : page.index("settings</summary>")]
    assert "model.optim.lr" in differing and "0.0001" in differing and "0.0002" in differing
    assert "seed" not in differing and "betas" not in differing
    with pytest.raises(UserError, match="same run directory twice"):
        write_report([runs[0], runs[0]])


def test_missing_parts_are_noted(make_run: MakeRun, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "rew')
    text = extract_text(write_report([bare]).read_text())
    for part in ("No config.yaml", "No evaluation results", "No saved rollouts", "line 2 is left out", "incomplete"):
        assert part in text
    run = make_run(steps=2)
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text("a: [unclosed")
    (run / "evaluation" / "odd.json").write_text("{}")
    text = extract_text(write_report([run]).read_text())
    for part in ("No metrics.jsonl", "config.yaml: not a usable YAML file", "odd.json: damaged"):
        assert part in text


def test_malformed_rollouts_do_not_break_the_page(make_run: MakeRun) -> None:
    run = make_run(steps=1)
    lines = ['{"response": "only this", "reward": NaN}', '{"question_id": 3, "answer": ["1", "2"]}', '"text"']
    lines += ['{"question_id": 4, "length": 1' + "0" * 400 + ', "token_widths": 5}']
    lines += [json.dumps({"question_id": 4, "response": "lone \ud800 surrogate"})]
    (run / "rollouts" / "step_2.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report([run]).read_text()
    index, texts = parse_data(page)["index"], unpack_texts(page)
    assert index["size"][-3:] == [1, 1, 1] and index["reward"][-3:] == [None, None, None]
    assert [group["answer"] for group in texts[-3:]] == ["", "1  or  2", ""]
    assert all(f"step_2.jsonl: line {number} is left out" in extract_text(page) for number in (3, 5))


def test_a_page_has_a_size_limit_and_notes_what_it_left_out(make_run: MakeRun) -> None:
    run = make_run(steps=1, questions=1, samples=4)
    path = run / "rollouts" / "step_1.jsonl"
    rows = [json.loads(line) for line in path.open()]
    rows[2]["response"] = "a" * 500 + "b" * 9000 + "c" * 500
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed = pack_rollouts(read_runs([run]), budget=1200)
    (group,) = json.loads(gzip.decompress(base64.b64decode(packed.chunks[0])))
    assert [group["responses"][i] for i in (0, 1, 3)] == [rows[i]["response"] for i in (0, 1, 3)]
    cut = group["responses"][2]
    assert re.fullmatch(r"a{500}b*\n\n\[\.\.\. [\d,]+ characters left out of this page \.\.\.\]\n\nb*c{500}", cut)
    assert sum(map(len, group["responses"])) < 1300
    assert packed.note is not None and packed.note.startswith("1 of 4 responses")
    assert pack_rollouts(read_runs([run])).note is None


def test_texts_are_packed_in_chunks(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_disco.evaluation.rollout_pack.CHUNK", 500)
    packed = pack_rollouts(read_runs([make_run(steps=6)]))
    assert len(packed.chunks) > 3
    for chunk, slot, step in zip(*(packed.index[c] for c in ("chunk", "slot", "step")), strict=True):
        group = json.loads(gzip.decompress(base64.b64decode(packed.chunks[chunk])))[slot]
        assert group["question"].endswith(f"+ {step}?")


def test_a_directory_that_is_not_a_run_is_refused_in_one_line(tmp_path: Path, make_run: MakeRun) -> None:
    for paths, message in [
        ([], "no run directory given"),
        ([tmp_path / "nowhere"], "is not a directory"),
        ([tmp_path], "is not a run directory"),
    ]:
        with pytest.raises(UserError, match=message):
            write_report(paths)
    run = make_run(steps=1)
    with pytest.raises(UserError, match="is a directory"):
        write_report([run], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")
