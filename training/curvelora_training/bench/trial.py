"""One arm in training: a step is data, forward, backward, communication and optimiser, each measured.

Data parallel over the processes that the launcher started: every process has the whole frozen base, and the gradients of
what trains are averaged in one exchange after the backward pass, so that communication has a time of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from curvelora.precision import exact_products
from curvelora.registry import METHODS
from curvelora_eval.tasks.base import compute_context
from curvelora_training.bench.adapted import arm_tensors
from curvelora_training.bench.devices import Device
from curvelora_training.bench.sources import Batch

PHASES = ("data", "forward", "backward", "communication", "optimiser")


@dataclass(frozen=True)
class Optimisation:
    """How every arm is trained.

    Args:
        learning_rate, head_learning_rate: peaks of AdamW's rate, for adapters and for new heads.
        steps: length of the schedule: linear warm-up over `warmup` steps, then linear decay to 0 (or constant).
        schedule: "linear" or "constant".
        max_grad_norm: gradients are clipped to this global norm; 0 leaves them.
    """

    learning_rate: float = 2e-4
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    steps: int = 100
    warmup: int = 0
    schedule: str = "linear"
    max_grad_norm: float = 1.0

    def factor(self, step: int) -> float:
        """The share of the peak learning rate in this step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))


class PhaseClock:
    """Times the parts of a step: by events on a GPU, which stop nothing, by the wall clock elsewhere."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    @property
    def running(self) -> bool:
        """Whether a step has begun: its batch is made before `Trial.step` is called."""
        return bool(self._marks)

    def mark(self, name: str) -> None:
        """What follows the previous mark ends here and is called `name`; the first mark of a step only starts it."""
        if self.device.is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the first mark, and `step`, their sum; waits for the device and starts afresh."""
        self.device.synchronise()
        marks, self._marks = self._marks, []
        parts = {}
        for (_, before), (name, after) in itertools.pairwise(marks):
            span = before.elapsed_time(after) / 1e3 if self.device.is_gpu else after - before
            parts[name] = parts.get(name, 0.0) + span
        return parts | {"step": sum(parts.values())}


class Trial:
    """A model with its optimiser and its own random numbers; many of them can share one device and one base.

    Args:
        model: from `arm_model`.
        heads: names of new heads, which have their own learning rate.
        fp32: no autocast and no TF32.
        seed: of the dropout.
        computed: what `switch` says of how the model is computed, for records.
    """

    def __init__(
        self,
        model: nn.Module,
        how: Optimisation,
        device: Device,
        heads: list[str],
        fp32: bool,
        seed: int = 0,
        computed: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.how, self.device, self.fp32 = model, how, device, fp32
        self.computed = computed or {}
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        rates = {
            name: (how.head_learning_rate or how.learning_rate) if _is_head(name, heads) else how.learning_rate
            for name in self.named
        }
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            groups.setdefault(rates[name], []).append(parameter)
        # a rate on the device, and steps that are counted there: a recorded step reads both anew each time
        rate_of = (lambda rate: torch.tensor(rate, device=device.device)) if device.is_gpu else (lambda rate: rate)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "lr": rate_of(rate), "peak": rate} for rate, p in groups.items()],
            weight_decay=how.weight_decay,
            fused=device.is_gpu or None,
            capturable=device.is_gpu,
        )
        self.types = module_types(self.named, heads)
        self.taken = 0
        self._training: bool | None = None  # the mode that was set last
        self.graph: Callable[[Batch], dict[str, Any]] | None = None  # see `step_graph`
        self._random = self._seeded(seed)

    @property
    def finite(self) -> bool:
        """Whether everything that trains is finite; waits for the device."""
        return all(torch.isfinite(p).all().item() for p in self.named.values())

    @property
    def trainable_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.named.values())

    def step(self, batch: Batch, clock: PhaseClock | None = None, observe: bool = False) -> dict[str, Any]:
        """One optimiser step.

        Args:
            clock: times the phases; read it afterwards.
            observe: also measure gradient norms and update-to-weight ratios per module type.

        Returns:
            `loss` and `grad_norm` as tensors on the device, so that nothing waits; with `observe` also `grad_norms` and
            `update_ratio` (module type -> tensor).
        """
        mark = clock.mark if clock else (lambda name: None)
        with self._own_random_numbers():
            if clock is None or not clock.running:
                mark("start")
            batch = {key: value.to(self.device.device, non_blocking=True) for key, value in batch.items()}
            mark("data")
            self._set_rates()
            record = self.graph(batch) if self.graph else self.compute(batch, mark, observe)
            mark("optimiser")
        self.taken += 1
        return record

    def compute(self, batch: Batch, mark: Callable[[str], None], observe: bool) -> dict[str, Any]:
        """Forward, backward, exchange and update, without anything that waits for the device; see `step`."""
        self._set_mode(training=True)
        with self.precision():
            loss = self.model(**batch).loss
            mark("forward")
            loss.backward()
        mark("backward")
        loss = average_gradients(list(self.named.values()), loss.detach())
        mark("communication")
        return {"loss": loss, **self._update(observe)}

    def _set_rates(self) -> None:
        factor = self.how.factor(self.taken)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["peak"] * factor)
            else:
                group["lr"] = group["peak"] * factor

    def _update(self, observe: bool) -> dict[str, Any]:
        parameters = list(self.named.values())
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        observed: dict[str, Any] = {}
        if observe:
            observed["grad_norms"] = self._norms(torch._foreach_norm(grads))
            before, size = [p.detach().clone() for p in parameters], torch._foreach_norm(parameters)
        norm = torch.nn.utils.get_total_norm(grads)
        if self.how.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.how.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if observe:
            torch._foreach_sub_(before, parameters)
            moved, sizes = self._norms(torch._foreach_norm(before)), self._norms(size)
            observed["update_ratio"] = {kind: moved[kind] / sizes[kind] for kind in moved}
        return {"grad_norm": norm, **observed}

    def _norms(self, norms: list[Tensor]) -> dict[str, Tensor]:
        """Norms of single tensors -> norm of each module type."""
        squares: dict[str, list[Tensor]] = {}
        for kind, norm in zip(self.types, norms, strict=True):
            squares.setdefault(kind, []).append(norm)
        return {kind: torch.stack(found).norm() for kind, found in squares.items()}

    @torch.no_grad()
    def held_out(self, batches: list[Batch]) -> dict[str, float | None]:
        """Mean loss over these batches, and the accuracy where the model classifies (else None); in evaluation mode."""
        self._set_mode(training=False)
        losses, right, rows = [], 0, 0
        for batch in batches:
            batch = {key: value.to(self.device.device) for key, value in batch.items()}
            with self.precision():
                output = self.model(**batch)
            losses.append((output.loss.double(), len(batch["labels"])))
            if output.logits.dim() == 2 and batch["labels"].dim() == 1 and output.logits.shape[1] > 1:
                right += (output.logits.argmax(-1) == batch["labels"]).sum().item()
                rows += len(batch["labels"])
        if not losses:
            return {"loss": None, "accuracy": None}
        loss = sum(value.item() * size for value, size in losses) / sum(size for _, size in losses)
        return {"loss": loss if math.isfinite(loss) else None, "accuracy": right / rows if rows else None}

    def _set_mode(self, training: bool) -> None:
        """Visits every module, so only where the mode changes; the model's own flag says nothing of the modules in it."""
        if self._training is not training:
            self.model.train(training)
            self._training = training

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """The arm's arithmetic: autocast to the base's dtype, or fp32 products throughout."""
        with exact_products(self.device.device) if self.fp32 else compute_context(self.model):
            yield

    def park(self) -> None:
        """Move everything that is this arm's own to the CPU, so that the others are measured without it."""
        self._move(torch.device("cpu"))

    def unpark(self) -> None:
        """Bring it back."""
        self._move(self.device.device)

    def _move(self, device: torch.device) -> None:
        if not self.device.is_gpu:
            return
        for tensor in arm_tensors(self.model):
            tensor.data = tensor.data.to(device)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(device)

    def _seeded(self, seed: int) -> list[Tensor]:
        with torch.random.fork_rng([self.device.device] if self.device.is_gpu else []):
            torch.manual_seed(seed)
            return self._states()

    def _states(self) -> list[Tensor]:
        cpu = [torch.get_rng_state()]
        return [*cpu, torch.cuda.get_rng_state(self.device.device)] if self.device.is_gpu else cpu

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Dropout draws from this trial's stream, whatever runs between its steps."""
        with torch.random.fork_rng([self.device.device] if self.device.is_gpu else []):
            torch.set_rng_state(self._random[0])
            if self.device.is_gpu:
                torch.cuda.set_rng_state(self._random[1], self.device.device)
            yield
            self._random = self._states()


def average_gradients(parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
    """Average gradients (in place) and the loss over all processes, in one exchange; returns the averaged loss."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return loss
    grads = [p.grad for p in parameters if p.grad is not None]
    tensors = [*grads, loss.reshape(1).to(grads[0].dtype)]
    flat = _flatten_dense_tensors(tensors)
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for grad, averaged in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
        grad.copy_(averaged)
    return tensors[-1].reshape(())


def module_types(names: dict[str, Any], heads: list[str]) -> list[str]:
    """The adapted module's last name for each parameter (`q_proj`), or the head's name."""
    found = []
    for name in names:
        parts = [
            p for p in name.split(".") if p not in ("default", "weight", "bias", "modules_to_save", "original_module")
        ]
        head = next((p for p in parts if p in heads), None)
        last = parts[-2] if len(parts) > 1 and _is_factor(parts[-1]) else parts[-1]
        found.append(head or last)
    return found


def _is_factor(part: str) -> bool:
    """`lora_A`, `loran_B`, `aurora_spline`: a tensor inside an adapted layer, not the layer's own name."""
    return part.split("_")[0] in METHODS


def _is_head(name: str, heads: list[str]) -> bool:
    return bool(set(name.split(".")) & set(heads))
