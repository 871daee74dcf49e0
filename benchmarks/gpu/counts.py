"""Lower bounds (floors) of the time of each figure of the benchmark, counted from its sizes, not measured.

    python benchmarks/gpu/counts.py [--write]      print the table of README.md, or write it there

run_all.py divides measured times by these floors. A floor is the larger of two times: the FLOPs of the matrix products
over the matrix rate, and the bytes that must cross device memory (each number read or written once) over the bandwidth.
Work that depends on a program's choices, such as recomputing activations or keeping them, is in no floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from setting import Setting, look_up

from nemo_disco.estimate.flops import TRAINING, forward_flops, peak_flops
from nemo_disco.models.shape import ModelShape

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- counts.py writes what follows -->\n", "<!-- until here -->\n"
BF16, FLOAT32 = 2, 4  # bytes
# For each parameter in a gradient step, read once and written once: the bf16 weight, the float32 gradient, the float32
# weight and its two moments.
STEP_BYTES = 2 * BF16 + 2 * FLOAT32 + 2 * 3 * FLOAT32
GRADIENT_BYTES = BF16 + FLOAT32  # for each parameter without an optimizer: the weight read, the gradient written


@dataclass(frozen=True)
class Rates:
    """Rates of a device: FLOP/s in dense bf16, and bytes per second of its memory."""

    flops: float
    bandwidth: float


DATASHEET = {
    name: Rates(peak_flops(name) or 0.0, bandwidth) for name, bandwidth in (("H100", 3.35e12), ("H200", 4.8e12))
}


@dataclass(frozen=True)
class Work:
    """Least work behind a figure: FLOPs of matrix products (two for a multiply-add), and bytes of device memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_seconds(self, rates: Rates) -> float:
        """Seconds of the arithmetic or of the memory traffic at these rates, whichever is larger."""
        return max(self.flops / rates.flops, self.bytes / rates.bandwidth)


@dataclass(frozen=True)
class Row:
    """A figure of the benchmark, with its work and a prediction of its time.

    key: dotted key of its seconds in the results. prediction: multiples of the datasheet's floor on H100 and on H200.
    reason: why they are predicted.
    """

    key: str
    work: Callable[[Setting], Work]
    prediction: tuple[float, float]
    reason: str


# --- work of the figures ---


def count_matrix_product(setting: Setting) -> Work:
    """Work of one product of square matrices."""
    n = setting.size(8192, 256)
    return Work(2 * n**3, 3 * BF16 * n * n)


def count_copy(setting: Setting) -> Work:
    """Work of one copy on the device: every byte is read and written."""
    return Work(0, 2 * setting.size(2**32, 2**20))


def count_log_probs(setting: Setting) -> Work:
    """Work of log-probs, forward and backward: three products of hidden states and weight.

    A fourth product, which recomputes the logits in backward instead of keeping them, is a choice and not counted.
    """
    n, v, h = setting.head_sizes()
    return Work(3 * 2 * n * v * h, BF16 * 3 * (n * h + v * h))


def count_attention(setting: Setting) -> Work:
    """Work of attention: two products forward, four backward; bytes of q, k, v, the output, and their gradients."""
    shape, lengths = setting.shape("1p5b"), setting.attention_lengths()
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    numbers = sum(lengths) * 2 * (shape.query_width + shape.kv_width)
    return Work(TRAINING * 4 * shape.query_width * pairs, BF16 * 2 * numbers)


def count_decoding_step(setting: Setting) -> Work:
    """Work of decoding one token of each row: all weights but the embedding, and the keys and values in the cache.

    The cache has the prompt's tokens and, on average over the steps, half of the response's.
    """
    shape, (rows, prompt, tokens) = setting.shape("1p5b"), setting.decoding_sizes()
    weights = shape.parameters - shape.embedding_parameters
    return Work(2 * weights * rows, BF16 * weights + count_cache_bytes(shape, rows, prompt + tokens / 2))


def count_cache_bytes(shape: ModelShape, rows: int, tokens: float) -> float:
    """Bytes of the keys and values of `tokens` tokens in each row."""
    return BF16 * 2 * shape.layers * shape.kv_width * rows * tokens


def make_training_counter(name: str, bytes_per_parameter: int = STEP_BYTES) -> Callable[[Setting], Work]:
    """A function that counts the work of one gradient step at the shape of that name."""

    def count(setting: Setting) -> Work:
        forward, parameters = _count_forward(setting, name), setting.shape(name).parameters
        return Work(TRAINING * forward.flops, bytes_per_parameter * parameters)

    return count


def _count_forward(setting: Setting, name: str) -> Work:
    """Work of a forward pass over the rollouts whose sizes have that name, with logits for response tokens."""
    prompts, responses = setting.lengths(name)
    shape = setting.shape("1p5b" if name == "step" else name)
    totals = [p + r - 1 for p, r in zip(prompts, responses, strict=True)]
    return Work(forward_flops(shape, totals, sum(responses)), BF16 * shape.parameters)


def count_step_log_probs(setting: Setting) -> Work:
    """Work of the old log-probs in a step, and of pass 1 for all mini-batches but the first.

    The mini-batches have equally many questions, and so about the same work.
    """
    once = _count_forward(setting, "step")
    share = 1 + (setting.MINI_BATCHES - 1) / setting.MINI_BATCHES
    return Work(share * once.flops, setting.MINI_BATCHES * once.bytes)


def count_step_training(setting: Setting) -> Work:
    """Work of pass 2 and of the optimizer for all mini-batches of a step."""
    parameters = setting.shape("1p5b").parameters
    return Work(TRAINING * _count_forward(setting, "step").flops, setting.MINI_BATCHES * STEP_BYTES * parameters)


def count_step_sampling(setting: Setting) -> Work:
    """Work of sampling in the section `step`, which draws fewer tokens than it trains on."""
    shape, (rows, prompt, tokens) = setting.shape("1p5b"), setting.step_sampling_sizes()
    weights = shape.parameters - shape.embedding_parameters
    bytes_per_step = BF16 * weights + count_cache_bytes(shape, rows, prompt + tokens / 2)
    return Work(tokens * 2 * weights * rows, tokens * bytes_per_step)


ROWS = (
    Row(
        "floors.matrix_s",
        count_matrix_product,
        (1.25, 1.25),
        "a library's matrix product of this size reaches about 0.8 of the datasheet's rate",
    ),
    Row("floors.copy_s", count_copy, (1.1, 1.1), "a copy reaches about 0.9 of the datasheet's bandwidth"),
    Row(
        "train_1p5b_8k.seconds",
        make_training_counter("1p5b"),
        (2.35, 2.35),
        "MFU 0.40 to 0.45: FlashAttention 2, a fourth product for the logits, norms and activations bound by bandwidth",
    ),
    Row(
        "train_1p5b_8k_long.seconds",
        make_training_counter("1p5b"),
        (2.2, 2.2),
        "as `train_1p5b_8k`, faster by cuDNN's attention for long sequences, slower by padding and a call for each",
    ),
    Row(
        "baseline_unpadded.seconds",
        make_training_counter("1p5b"),
        (2.8, 2.8),
        "cuDNN's attention, but norms, rope and Adam in kernels of their own",
    ),
    Row(
        "baseline_padded.seconds",
        make_training_counter("1p5b"),
        (3.8, 3.8),
        "as `baseline_unpadded`, but padding is 0.26 of the tokens and a larger share of attention",
    ),
    Row(
        "log_probs.kernel.forward_backward_s",
        count_log_probs,
        (2.7, 2.7),
        "4 products instead of 3, at 0.8 of the rate, are 1.7; the kernel's own run at 0.6; sums use temporaries",
    ),
    Row(
        "log_probs.fused_sum.forward_backward_s",
        count_log_probs,
        (2.5, 2.5),
        "as `log_probs.kernel`, without the 45 GB of temporaries that were counted there (FUSED_SUM)",
    ),
    Row(
        "log_probs.tiled.forward_backward_s",
        count_log_probs,
        (4.5, 4.0),
        "float32 logits, written and read several times",
    ),
    Row(
        "log_probs.likely_tokens.forward_backward_s",
        count_log_probs,
        (2.9, 2.9),
        "as `log_probs.kernel`; 17 rows of the weight are gathered for each token, and the gradient has 17 places",
    ),
    Row(
        "attention.packed.forward_backward_s",
        count_attention,
        (3.3, 3.3),
        "FlashAttention 2 at 350 TFLOP/s, with one product more than the floor has",
    ),
    Row(
        "attention.alone.forward_backward_s",
        count_attention,
        (2.0, 2.0),
        "cuDNN, published as 1.7 to 2.3 times as fast as FlashAttention 2",
    ),
    Row(
        "decode.in_place.seconds_a_step",
        count_decoding_step,
        (1.8, 2.0),
        "weights are read at 0.8 of the bandwidth; about 300 launches",
    ),
    Row(
        "decode.in_place_without_graphs.seconds_a_step",
        count_decoding_step,
        (6.0, 8.0),
        "bound by launching 800 kernels",
    ),
    Row(
        "decode.plain.seconds_a_step",
        count_decoding_step,
        (6.0, 8.0),
        "bound by launching kernels, and by checking at every step which rows are done",
    ),
    Row("step.seconds.generate", count_step_sampling, (2.5, 3.0), "as `decode.in_place`, plus capturing the graph"),
    Row("step.seconds.log_probs", count_step_log_probs, (2.3, 2.3), "forward passes at 0.43 of the rate"),
    Row(
        "step.seconds.train",
        count_step_training,
        (2.5, 2.5),
        "as `train_1p5b_8k`, with four optimizer updates instead of one",
    ),
    Row(
        "train_7b_8k.seconds",
        make_training_counter("7b", GRADIENT_BYTES),
        (2.7, 2.0),
        "larger matrices: MFU 0.5; on 80 GB activations are computed twice",
    ),
    Row(
        "train_qwen3_0p6b_16k.seconds",
        make_training_counter("qwen3_0p6b_16k"),
        (2.8, 2.8),
        "0.6 of the work is attention at 300 TFLOP/s: MFU 0.36 (published on one H100: 0.11)",
    ),
    Row(
        "train_qwen3_0p6b_65k.seconds",
        make_training_counter("qwen3_0p6b_65k"),
        (4.1, 3.2),
        "0.86 of the work is attention; on 80 GB activations are computed twice (published on one H100: MFU 0.27)",
    ),
)


# --- output, for run_all.py and README.md ---


def divide_by_floors(setting: Setting, device: str, results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """For each figure among the results: its seconds, and their multiples of the floor.

    There are two floors: by the device's datasheet, and by the rates that the section `floors` measured. A multiple is
    absent if its rates are unknown.
    """
    datasheet = next((rates for name, rates in DATASHEET.items() if name in device), None)
    measured_flops, measured_bandwidth = (
        setting.measured_rate("matrix_flops"),
        setting.measured_rate("copy_bytes_per_second"),
    )
    figures = {}
    for row in ROWS:
        if (seconds := look_up(results, row.key)) is None:
            continue
        work = row.work(setting)
        figures[row.key] = {"seconds": seconds}
        if datasheet is not None:
            figures[row.key]["times_datasheet_floor"] = seconds / work.floor_seconds(datasheet)
        if measured_flops and measured_bandwidth:
            floor = work.floor_seconds(Rates(measured_flops, measured_bandwidth))
            figures[row.key]["times_measured_floor"] = seconds / floor
    return figures


def render_table() -> str:
    """The table of README.md in Markdown, at the real sizes."""
    setting = Setting(tiny=False, results={})
    head = "| figure | TFLOP | GB | floor H100 | floor H200 | predicted H100 | predicted H200 | because |"
    lines = [head, "|" + " --- |" * 8]
    for row in ROWS:
        work = row.work(setting)
        floors = [work.floor_seconds(rates) for rates in DATASHEET.values()]
        times = [f"{f * p:.3g} s ({p:g})" for f, p in zip(floors, row.prediction, strict=True)]
        cells = [f"`{row.key}`", f"{work.flops / 1e12:.3g}", f"{work.bytes / 1e9:.3g}"]
        cells += [*(f"{floor:.3g} s" for floor in floors), *times, row.reason]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render_page(text: str) -> str:
    """The text of README.md with its table replaced by the present one."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + render_table() + "\n" + END + rest.partition(END)[2]


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args(None if arguments is None else list(arguments)).write:
        README.write_text(render_page(README.read_text()))
    else:
        print(render_table(), end="")


if __name__ == "__main__":
    main()
