"""The trained policy: a sharded megatron model and its optimizer. Its three main methods: log_probs, accumulate, step.

Log-probs and gradients are the same, to rounding, at every layout and token budget. Knows no objective: `accumulate`
takes a loss of per-token log-probs that is a sum over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from nemo_disco.config.schema import ModelConfig
from nemo_disco.data.packing import plan_micro_batches
from nemo_disco.data.rollouts import Rollouts
from nemo_disco.models.hf_config import load_hf_config, read_hf_config
from nemo_disco.models.shape import read_shape
from nemo_disco.models.weight_files import SafetensorReader, save_hf_directory
from nemo_disco.policy import cpu_backend
from nemo_disco.policy.hugging_face import HuggingFaceModel
from nemo_disco.policy.layers import uses_transformer_engine
from nemo_disco.policy.likely_tokens import LikelyTokens
from nemo_disco.policy.micro_batch import MicroBatch, Padding, build_micro_batch, sequence_lengths
from nemo_disco.policy.model import Targets, TargetValues
from nemo_disco.policy.optimizer import Optimizer, StepResult
from nemo_disco.policy.options import data_parallel_config, optimizer_config, transformer_config
from nemo_disco.policy.parallel import Ranks, device
from nemo_disco.policy.routes import Routes, changed_share
from nemo_disco.runtime.collectives import is_first_rank
from nemo_disco.runtime.files import atomic_directory

# (index [n] into the T response tokens, the values at them) -> per-token losses [n]
TokenLoss = Callable[[Tensor, TargetValues], Tensor]
_SHARED_AT_ONCE = 2**24  # numbers of host memory that are summed over the ranks in one collective


class Policy:
    """This rank's part of a policy."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
        clip_grad: float = 0.0,
        total_optimizer_steps: int = 1,
        trainable: bool = True,
        with_optimizer: bool = True,
        read_weights: bool = True,
        vocabulary: int | None = None,
        longest: int = 0,
    ) -> None:
        """parallel.start must have run. temperature: log-probs are those of the logits divided by it. clip_grad: the
        largest gradient norm, 0 for any. trainable: with gradients; with_optimizer: with `step` too.
        read_weights: read them from config.path (if False, a checkpoint must be loaded). vocabulary: number of token
        ids; rows of the output weight beyond them have probability 0 and no gradient (None: all rows are tokens).
        longest: tokens of the run's longest sequence, by which rope's type `longrope` chooses its angles.

        Raises UserError for a missing or damaged model directory, or one that does not fit.
        """
        self.config, self.temperature, self.longest = config, temperature, longest
        self.ranks, self.device = Ranks.here(), device()
        self._padding = Padding.for_layout(self.ranks, config.sequence_parallel, config.fp8_tokens)
        self.transformer_engine = uses_transformer_engine(config)
        self.hf_config = load_hf_config(config.path, config.trust_remote_code)
        self.shape = read_shape(config.path)
        self.rows = self.shape.vocab
        self.vocabulary = self.rows if vocabulary is None else min(vocabulary, self.rows)
        network = transformer_config(self.shape, config, dtype, self.device, _finalize_sums)
        with SafetensorReader(config.path) if read_weights else nullcontext() as reader:
            if reader is not None:
                reader.check(self.shape.tensors(), self.shape.tied)
            parts = self.shape, self.hf_config, network
            self.model = HuggingFaceModel(*parts, self.transformer_engine, self.vocabulary, longest)
            if reader is not None:
                self.model.load(reader.read_finite)
        self.network: list[Any] = [chunk.to(self.device) for chunk in self.model.chunks]
        cpu_backend.return_freed_memory(sum(p.nbytes for chunk in self.network for p in chunk.parameters()))
        if dtype is torch.bfloat16:
            self.network = [Float16Module(chunk.config, chunk) for chunk in self.network]
        # Passes for which FP8 delayed scaling has no history of maxima yet (fp8_scales.py).
        self.unscaled = {"forward", "backward"} if config.fp8 == "delayed" else set()
        self.optimizer: Optimizer | None = None
        if trainable:
            self.network = [self._wrap_in_ddp(i, chunk, dtype) for i, chunk in enumerate(self.network)]
            if with_optimizer and dtype is not torch.float64:  # megatron's optimizers know float32 and bfloat16
                settings = optimizer_config(config.optim, dtype, clip_grad, config.fp8)
                self.optimizer = Optimizer(self.network, config.optim, settings, total_optimizer_steps)

    @property
    def device_name(self) -> str:
        """CUDA's name of the device; "cpu" without CUDA."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def router_replay(self, rollouts: Rollouts) -> Routes | Literal["record"] | None:
        """The routes of a step's old log-probs (model.moe_router_replay): the engine's, or to be recorded, or None."""
        if (kind := self.config.moe_router_replay) == "engine":
            return Routes.of_engine(rollouts, self.shape, self.model.chunks)
        return "record" if kind == "trainer" and self.shape.experts else None

    def _wrap_in_ddp(self, index: int, chunk: Any, dtype: torch.dtype) -> DistributedDataParallel:
        overlap = self.ranks.data_size * self.ranks.context_size > 1
        ddp = DistributedDataParallel(
            chunk.config, data_parallel_config(self.config, dtype, overlap), chunk, disable_bucketing=index > 0
        )
        if overlap:
            config = chunk.config
            syncs = config.no_sync_func or []
            config.no_sync_func = [*syncs, ddp.no_sync] if len(self.model.chunks) > 1 else ddp.no_sync
        model = self.model.chunks[index]
        if ddp.use_forward_hook and model.post_process:
            # A forward pass gathers a module's weights before it runs; the output layer's are read without running it.
            model.decoder.final_layernorm.register_forward_pre_hook(
                lambda *_: ddp.param_to_bucket_group[model.output_weight()].finish_param_sync()
            )
        return ddp

    # --- log-probs, gradients, steps ---

    def log_probs(self, rollouts: Rollouts, *, entropies: bool = False) -> tuple[Tensor, Tensor | None]:
        """[T] log-probs of every response token under the present weights, on every rank, and with `entropies` the [T]
        entropies. float32, or float64 for a float64 model. A collective."""
        values = self.target_values(rollouts, entropies=entropies)
        return values.log_probs, values.entropies

    def target_values(
        self,
        rollouts: Rollouts,
        *,
        entropies: bool = False,
        likely_tokens: int = 0,
        old: LikelyTokens | None = None,
        routes: Routes | Literal["record"] | None = None,
    ) -> TargetValues:
        """The values of all T response tokens under the present weights, on every rank: log-probs [T], and as asked for
        (`Targets`) entropies [T], divergences [T], and the likeliest tokens [T, K], in host memory. A collective.

        old [T, K]: of the policy that the present one is compared with. routes: the experts that all tokens take, or
        "record", to return those that they took. float32, or float64 for a float64 model.
        """
        rows, total = 1 + entropies + (old is not None), int(rollouts.response_lengths.sum())
        precision = torch.float64 if self.dtype is torch.float64 else torch.float32
        out = torch.zeros(rows, total, dtype=precision, device=self.device)
        ids = torch.zeros(total, likely_tokens, dtype=torch.int32)
        likely_log_probs = torch.zeros(total, likely_tokens, dtype=precision)

        def collect(batch: MicroBatch, output: Tensor, non_loss_data: bool = True) -> None:  # noqa: ARG001
            out[:, batch.index] = output[:rows].to(precision)
            if likely_tokens:
                index, packed = batch.index.cpu(), output[rows:].T.cpu()
                ids[index] = packed[:, :likely_tokens].to(torch.int32)
                likely_log_probs[index] = packed[:, likely_tokens:].to(precision)

        target_fields = {"entropies": entropies, "likely_tokens": likely_tokens}
        if "forward" in self.unscaled:  # Transformer Engine updates its scales only in passes with gradients enabled
            self.unscaled.remove("forward")
            self._schedule(rollouts, lambda *_, **__: None, target_fields, old, None, forward_only=True)
        with torch.no_grad():
            batches = self._schedule(rollouts, collect, target_fields, old, routes, forward_only=True)
        values = TargetValues.from_rows(self.share(out), entropies=entropies, divergences=old is not None)
        if routes == "record":
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            values = replace(values, routes=Routes.gather(batches, len(rollouts.tokens), group))
        if not likely_tokens:
            return values
        shared = self._share_on_host(ids), self._share_on_host(likely_log_probs)
        return replace(values, likely=LikelyTokens(*shared, complete=likely_tokens == self.vocabulary))

    def share(self, values: Tensor) -> Tensor:
        """Sum over all ranks of vectors in which each last pipeline stage has written the elements of its own tokens.
        Exact: the other elements are zero, and of TP peers with the same values one is counted. A collective."""
        if not self.ranks.contributes_log_probs:
            values = torch.zeros_like(values)
        dist.all_reduce(values)
        return values

    def _share_on_host(self, values: Tensor) -> Tensor:
        """As `share`, in place, of values [T, K] in host memory, of which a part at a time is on the device."""
        for part in torch.split(values, max(1, _SHARED_AT_ONCE // max(1, values.size(1)))):
            part.copy_(self.share(part.to(self.device)))
        return values

    def accumulate(
        self,
        rollouts: Rollouts,
        token_loss: TokenLoss,
        *,
        entropies: bool = False,
        old: LikelyTokens | None = None,
        routes: Routes | None = None,
        everywhere: bool = False,
    ) -> float | None:
        """Forward and backward of the sum over all T tokens of `token_loss`, replacing the gradient.

        token_loss gets the log-probs, and with `entropies` and `old` (as for target_values) entropies and divergences.
        routes: the experts that all tokens take. Returns the share of them that the routers would change, or None.
        Afterwards main_grad is reduced over data parallelism for the shard that this rank's optimizer owns;
        everywhere=True reduces it whole on every rank (to be exported).
        """

        def loss(batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            values = TargetValues.from_rows(output, entropies=entropies, divergences=old is not None)
            total = token_loss(batch.index, values).sum()
            return total, torch.zeros((), dtype=torch.int, device=output.device), {}

        # Delayed scaling starts with a scale of 1, under which most gradients are too small for FP8: a first pass sets
        # the scales.
        for _ in range(1 + ("backward" in self.unscaled)):
            for chunk in self.network:
                chunk.zero_grad_buffer()
                chunk.force_all_reduce = everywhere
            if self.optimizer is not None:
                self.optimizer.megatron.zero_grad()
            target_fields = {"entropies": entropies}
            batches = self._schedule(
                rollouts, loss, target_fields, old, routes, forward_only=False, force_all_reduce=everywhere
            )
        self.unscaled.clear()
        return None if routes is None else changed_share(batches)

    def step(self) -> StepResult:
        """Clip and apply the accumulated gradient. A gradient that is not finite is not applied."""
        assert self.optimizer is not None, "this policy was built without an optimizer"
        return self.optimizer.step()

    def gradient_norm(self, rollouts: Rollouts) -> float:
        """Gradient norm of the mean log-prob of the response tokens, before clipping; finite if the weights can be
        trained. Replaces the gradient and changes no weight. A collective."""
        assert self.optimizer is not None, "this policy was built without an optimizer"
        total = max(1, int(rollouts.response_lengths.sum()))
        self.accumulate(rollouts, lambda _index, values: values.log_probs / total)
        return self.optimizer.gradient_norm()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Context in which an engine samples: the gradient's memory on the device is free, and with model.optim.offload
        also that of the optimizer's state, which is on the host. Afterwards the gradient is zero."""
        if self.optimizer is None:
            yield
            return
        for chunk in self.network:
            chunk.offload_grad_buffers()
        offload = self.config.optim.offload
        if offload:
            self.optimizer.offload()
        try:
            yield
        finally:
            for chunk in self.network:
                chunk.restore_grad_buffers()
            if offload:
                self.optimizer.restore()

    # --- weights in and out ---

    def load(self, read: Callable[[str], Tensor]) -> None:
        """Set every weight to `read(its Hugging Face name)`; the optimizer's moments stay."""
        self.model.load(read)
        if self.optimizer is not None:
            self.optimizer.reload_weights()

    def gather_weights(self) -> None:
        """Gather the last step's weights from the ranks that computed them. A collective.

        Forward passes gather weights while they compute. Call this before the weights are read in any other way.
        """
        for ddp in self.network:
            if not getattr(ddp, "use_forward_hook", False):
                continue
            for buckets in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups):
                buckets.finish_param_sync(skip_next_bucket_dispatch=True)

    def has_finite_weights(self) -> bool:
        """True on every rank if all weights are finite; weights in FP8 always are. A collective."""
        self.gather_weights()
        plain = (p.detach() for chunk in self.model.chunks for p in chunk.parameters())
        finite = all(bool(p.isfinite().all()) for p in plain if type(p) is Tensor)
        votes = torch.tensor(int(finite), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
        return bool(votes)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over all weights, whole, by Hugging Face name. A collective: every rank must iterate to the end."""
        self.gather_weights()
        return self.model.named_tensors()

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the gradient after accumulate(everywhere=True), with Hugging Face names. A collective."""
        return self.model.named_tensors(lambda p: p.main_grad)  # type: ignore[attr-defined]

    def export(self, directory: str | Path, texts: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write the policy as a Hugging Face directory, in the dtype of its config.json, with the tokenizer from
        config.path. texts: further files, by name. A collective."""
        if not is_first_rank():
            for _ in self.named_weights():
                pass
        else:
            shapes, dtype = self.shape.tensors(), self.hf_config.dtype or self.dtype
            plan = [(name, shapes[name], dtype) for name in self.model.names()]
            config = read_hf_config(self.config.path)
            with atomic_directory(directory) as work:
                save_hf_directory(work, plan, self.named_weights(), config, Path(self.config.path))
                for name, text in texts.items():
                    (work / name).write_text(text, encoding="utf-8")
        dist.barrier()

    # --- the micro-batch schedule ---

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return cast(torch.dtype, self.model.config.params_dtype)

    def plan(self, rollouts: Rollouts) -> list[list[tuple[int, ...]]]:
        """Indices of the responses in each micro-batch of each data-parallel rank; the same on every rank. Empty
        responses are in no micro-batch."""
        config = self.model.config
        lengths = sequence_lengths(rollouts)
        responses = [i for i, n in enumerate(lengths) if n > 0]
        plan = plan_micro_batches(
            [lengths[i] for i in responses],
            token_budget=self.config.token_budget,
            data_parallel_size=self.ranks.data_size,
            sequence_multiple=self._padding.sequence,
            micro_batch_multiple=self._padding.micro_batch,
            count_multiple=self.ranks.pipeline_size if config.virtual_pipeline_model_parallel_size else 1,
            attention_span=12 * config.hidden_size,  # GPT's: a layer has 12 hidden_size^2 parameters
        )
        return [[tuple(responses[i] for i in batch) for batch in rank] for rank in plan]

    def _schedule(
        self,
        rollouts: Rollouts,
        use: Callable[..., Any],
        target_fields: Mapping[str, Any],
        old: LikelyTokens | None,
        routes: Routes | Literal["record"] | None,
        *,
        forward_only: bool,
        **options: Any,
    ) -> list[MicroBatch]:
        """Run megatron's pipeline schedule on this rank's micro-batches; the last stage calls `use(batch, output)`.
        Returns them.

        target_fields: those of Targets that say what is computed. old [T, K], routes: as for target_values.
        """
        ranks = self.ranks
        old = old if any(chunk.post_process for chunk in self.model.chunks) else None  # the last stage reads it
        share = (ranks.tensor, ranks.tensor_size) if self.config.sequence_parallel else (0, 1)
        build = partial(
            build_micro_batch,
            rollouts,
            padding=self._padding,
            device=self.device,
            old=old,
            routes=routes,
            tensor_share=share,
        )
        batches = [
            build(responses, context_rank=ranks.context, context_size=ranks.context_size)
            for responses in self.plan(rollouts)[ranks.data]
        ]

        def forward(batches: Iterator[MicroBatch], network: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            targets = Targets(batch.rows, batch.targets, self.temperature, **target_fields, old=batch.old)
            inputs = batch.input_ids, batch.position_ids, None
            return network(*inputs, packed_seq_params=batch.sequences, labels=targets), partial(use, batch)

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in self.network],
            model=self.network,
            num_microbatches=len(batches),
            seq_length=self.config.token_budget,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **options,
        )
        return batches


def _finalize_sums(model: list[Any], _num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """megatron's gradient reduction over DP, SP and tied embeddings, without its division by the number of tokens."""
    finalize_model_grads(model, None, **kwargs)
