"""Shared by the benchmarks: a model whose response lengths are known, and sides that take turns on one core.

Each side is a process of its own, pinned to the same core with one thread, and works only when it is its turn, so a
busy moment of the machine hits all of them. Runs in TRL's environment too: imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VOCABULARY = 2048
EOS, PAD = 0, 1
HERE = Path(__file__).parent


# --- the model ---


def make_model(directory: Path, limit: int, *, ends: bool, seed: int = 0, hidden: int = 256, layers: int = 4) -> Path:
    """A random Qwen2 (4M parameters) with a tokenizer of words, whose responses end by chance alone. Load the tokenizer
    as a PreTrainedTokenizerFast: AutoTokenizer gives every qwen2 model Qwen's own pre-tokenizer.

    ends: the chance of EOS is the same at every token, such that the mean length is a third of `limit`; otherwise EOS
    never comes. The first hidden unit is a constant that no layer writes to; EOS alone reads it differently.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        # The mean of a geometric length cut at L is L/3 where the chance of EOS is 2.82 / L.
        embeddings[EOS] = 0.0
        states = model.model(torch.randint(2, VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(seed)))
        unit = states.last_hidden_state[0, :, 0]
        logits = model.lm_head(states.last_hidden_state[0])
        others = logits[:, 2:].logsumexp(-1).mean()
        chance = 2.82 / limit if ends else 1e-12
        embeddings[EOS, 0] = (others + torch.tensor(chance / (1 - chance)).log()) / unit.mean()
        embeddings[PAD] = 0.0
        embeddings[PAD, 0] = -1e3 / unit.mean()
    model.save_pretrained(directory)
    _word_tokenizer().save_pretrained(directory)
    return directory


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def prompts(count: int, seed: int = 0, shortest: int = 16, longest: int = 64) -> list[list[int]]:
    """Prompts of different lengths, evenly between shortest and longest, as token ids."""
    import random

    draw = random.Random(seed)
    lengths = [shortest + i * (longest - shortest) // max(1, count - 1) for i in range(count)]
    draw.shuffle(lengths)
    return [[draw.randrange(2, VOCABULARY) for _ in range(n)] for n in lengths]


def as_text(prompt: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in prompt)


def reward(response: str) -> float:
    """A grader that costs nothing and finds half of the responses right."""
    return float(zlib.crc32(response.strip().encode()) % 2)


# --- a side's process ---


class Turns:
    """A side's end: `while turns.wait(): ...; turns.done(...)`. What libraries print goes to stderr. worker: another
    process whose work counts as this side's."""

    def __init__(self, worker: int | None = None) -> None:
        self._processes = ["self"] if worker is None else ["self", str(worker)]
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._base = self._memory("VmRSS")
        for process in self._processes:
            Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak starts here, with the model loaded

    def wait(self) -> bool:
        """Until it is this side's turn; False if there are no more."""
        go = bool(sys.stdin.readline())
        self._start = time.perf_counter(), self._processor_seconds()
        return go

    def done(self, **figures: float) -> None:
        """The turn is over. seconds are the processor's; megabytes: the peak so far, and of it what the turns added."""
        now = time.perf_counter(), self._processor_seconds()
        peak = self._memory("VmHWM")
        figures |= {
            "seconds": now[1] - self._start[1],
            "wall_seconds": now[0] - self._start[0],
            "peak_mb": peak / 1e6,
            "added_mb": (peak - self._base) / 1e6,
        }
        self._answers.write(json.dumps(figures) + "\n")
        self._answers.flush()

    def _processor_seconds(self) -> float:
        """Of all threads: what else runs on the machine counts little."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        stats = [_stat(process) for process in self._processes[1:]]
        ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats)
        return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")

    def _memory(self, field: str) -> int:
        """Bytes: VmRSS is resident now, VmHWM its peak."""
        lines = [line for p in self._processes for line in Path(f"/proc/{p}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def serve(work: Callable[[], Mapping[str, float]], worker: int | None = None) -> None:
    """Do `work` whenever it is this side's turn. See Turns for `worker`."""
    turns = Turns(worker)
    while turns.wait():
        turns.done(**work())


def alive_seconds() -> float:
    """Since this process was started: what it takes to be ready."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat("self")[19]) / os.sysconf("SC_CLK_TCK")


def _stat(process: str) -> list[str]:
    """/proc/PID/stat behind the name: from field 3 on."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()


# --- the sides, taking turns ---


class Side:
    """One side, seen from the benchmark."""

    def __init__(self, command: Sequence[str], pinned: bool = True) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if pinned:
            os.sched_setaffinity(self.process.pid, {max(os.sched_getaffinity(0))})

    def turn(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self.process.args)}: ended with {self.process.wait()}")  # type: ignore[arg-type]
        figures: dict[str, float] = json.loads(answer)
        return figures

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


Runs = dict[str, list[dict[str, float]]]


def take_turns(commands: Mapping[str, Sequence[str]], repeats: int, *, pinned: bool = True) -> Runs:
    """The answers of each side in each of `repeats` turns, after one turn to warm up. pinned: all on the same core."""
    sides = {name: Side(command, pinned) for name, command in commands.items()}
    try:
        for side in sides.values():
            side.turn()
        runs: Runs = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                runs[name].append(side.turn())
    finally:
        for side in sides.values():
            side.close()
    return runs


def median(runs: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def median_ratio(above: Sequence[Mapping[str, float]], below: Sequence[Mapping[str, float]], name: str) -> float:
    """The median over turns of above/below."""
    return statistics.median(a[name] / b[name] for a, b in zip(above, below, strict=True))


def write_record(output: Path | None, record: Mapping[str, Any]) -> None:
    """Print the record as JSON, with the machine and the command; also into `output`."""
    import torch

    machine = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"date": now, "command": ["python", *sys.argv], "machine": machine, **record}, indent=1)
    if output:
        output.write_text(text + "\n")
        print(f"written to {output}")
