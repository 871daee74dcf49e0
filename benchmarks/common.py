"""Measure several implementations alternately on one core; also the model, prompts and rewards that they share.

A *side* is one of the compared implementations. It runs in a child process with one thread, pinned to the same core as
the other sides. A *turn* is one repetition of its work. Only the side whose turn it is works, and turns rotate, so that
a busy moment of the machine slows all sides alike.

- `Side`: the benchmark's handle of such a child. `take_turn` lets it work once and returns the figures it reports.
- `Turns`: the same connection seen from inside the child, over its standard input and output; `serve` loops over it.
- `take_turns`: start all sides, let each warm up for one turn, then give them `repeats` turns in rotation.

These own the child processes, the order of the turns, and the measurement of seconds and memory. They do not own the
work: each script says which commands are its sides, what one turn does and which other figures it reports, and it
computes its results from the turns. This module runs in TRL's environment too, so it must not import nemo_disco.
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


# --- the model, the prompts and the rewards ---


def make_model(directory: Path, limit: int, *, ends: bool, seed: int = 0, hidden: int = 256, layers: int = 4) -> Path:
    """Save a random Qwen2 (4M parameters) and its tokenizer in `directory`, which is returned.

    ends: whether EOS has the same chance at every token, so that the mean length of a response is a third of `limit`;
    otherwise EOS never comes. To set that chance, the first hidden unit is a constant that no layer changes, and the
    logits of EOS and PAD depend on this unit alone. Load the tokenizer as a PreTrainedTokenizerFast: AutoTokenizer
    gives every qwen2 model Qwen's own pre-tokenizer.
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
        # A geometric length cut at L has the mean L/3 if the chance of EOS is 2.82 / L.
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
    """A tokenizer with one word for each id, such as `w17` for 17, and with a chat template that adds nothing."""
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


def make_prompts(count: int, seed: int = 0, shortest: int = 16, longest: int = 64) -> list[list[int]]:
    """Random prompts as token ids, in random order; their lengths are spread evenly from `shortest` to `longest`."""
    import random

    draw = random.Random(seed)
    lengths = [shortest + i * (longest - shortest) // max(1, count - 1) for i in range(count)]
    draw.shuffle(lengths)
    return [[draw.randrange(2, VOCABULARY) for _ in range(n)] for n in lengths]


def as_text(prompt: Sequence[int]) -> str:
    """The prompt as words, from which the model's tokenizer makes the same token ids."""
    return " ".join(f"w{i}" for i in prompt)


def grade_by_hash(response: str) -> float:
    """The reward of a response, 0 or 1, from a hash of its text: about half are right, and grading costs nothing."""
    return float(zlib.crc32(response.strip().encode()) % 2)


# --- inside a side's process ---


class Turns:
    """The turns of the side that this process is: `while turns.wait(): ...; turns.finish(...)`.

    Create it when the side is ready to work, since memory is measured from then on. From then on, all output of
    libraries goes to standard error; standard output is for the figures alone.
    """

    def __init__(self, worker_pid: int | None = None) -> None:
        """worker_pid: a process that works for this side; its processor time and memory are added to this one's."""
        self._processes = ["self"] if worker_pid is None else ["self", str(worker_pid)]
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._base = self._memory("VmRSS")
        for process in self._processes:
            Path(f"/proc/{process}/clear_refs").write_text("5")  # reset the peak memory, with the model already loaded

    def wait(self) -> bool:
        """Wait for this side's next turn. Returns True when it begins, False if the benchmark has no more turns."""
        has_turn = bool(sys.stdin.readline())
        self._start = time.perf_counter(), self._processor_seconds()
        return has_turn

    def finish(self, **figures: float) -> None:
        """End the turn and send its figures to the benchmark.

        Added to `figures`: `seconds` of processor time and `wall_seconds` of the turn; `peak_mb`, the most memory so
        far in megabytes (10^6 bytes), and `added_mb`, its excess over the memory when this object was created.
        """
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
        """Processor time of all threads of this side, which other work on the machine changes little."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        stats = [_stat(process) for process in self._processes[1:]]
        ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats)
        return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")

    def _memory(self, field: str) -> int:
        """Resident memory of this side in bytes; field: as of resident_bytes."""
        return sum(resident_bytes(field, process) for process in self._processes)


def serve(work: Callable[[], Mapping[str, float]], worker_pid: int | None = None) -> None:
    """Call `work` once in each turn of this side and report the figures that it returns. worker_pid: see Turns."""
    turns = Turns(worker_pid)
    while turns.wait():
        turns.finish(**work())


def resident_bytes(field: str, process: str = "self") -> int:
    """Resident memory of a process in bytes: VmRSS is the present value, VmHWM the peak since the last reset.

    getrusage's ru_maxrss is no substitute for VmHWM, since a child process inherits its parent's.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def seconds_since_start() -> float:
    """Wall-clock seconds since this process was started: the start-up time, if called when the side is ready."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat("self")[19]) / os.sysconf("SC_CLK_TCK")


def _stat(process: str) -> list[str]:
    """The fields of /proc/PID/stat from the third on, which follows the program's name in parentheses."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()


# --- in the benchmark's process ---

# Side -> the figures of each of its turns.
TurnsBySide = dict[str, list[dict[str, float]]]


class Side:
    """The child process of one side, with a pipe to it and one from it."""

    def __init__(self, command: Sequence[str], pinned: bool = True) -> None:
        """Start the process; if pinned, on the last core that this process may use, else on any."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        if pinned:
            os.sched_setaffinity(self.process.pid, {max(os.sched_getaffinity(0))})

    def take_turn(self) -> dict[str, float]:
        """Let the side work once, and return the figures that it reports. Raises SystemExit if the process ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            command = " ".join(self.process.args)  # type: ignore[arg-type]
            raise SystemExit(f"a side ended before its turn was over, with exit code {self.process.wait()}: {command}")
        figures: dict[str, float] = json.loads(line)
        return figures

    def close(self) -> None:
        """Tell the side that there are no more turns, and wait until its process has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(commands: Mapping[str, Sequence[str]], repeats: int, *, pinned: bool = True) -> TurnsBySide:
    """Start every side and return the figures of its `repeats` turns; one turn before them warms up and is dropped.

    commands: side -> the command that starts its process. pinned: whether all sides are confined to the same core.
    """
    sides = {name: Side(command, pinned) for name, command in commands.items()}
    try:
        for side in sides.values():
            side.take_turn()
        turns_by_side: TurnsBySide = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                turns_by_side[name].append(side.take_turn())
    finally:
        for side in sides.values():
            side.close()
    return turns_by_side


def median(turns: Sequence[Mapping[str, float]], name: str) -> float:
    """The median over turns of the figure `name`."""
    return statistics.median(turn[name] for turn in turns)


def median_ratio(
    numerators: Sequence[Mapping[str, float]], denominators: Sequence[Mapping[str, float]], name: str
) -> float:
    """The median over turns of one side's figure `name` divided by another side's figure in the same turn."""
    return statistics.median(a[name] / b[name] for a, b in zip(numerators, denominators, strict=True))


def write_record(output: Path | None, record: Mapping[str, Any]) -> None:
    """Write the record to `output` as JSON, with the date, the command and the machine; without a path do nothing."""
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
