"""The frozen base in shares over the processes: a block of layers is gathered when it is needed, the next one meanwhile.

DeepSpeed's ZeRO-3 is made for weights that train, and gathers module by module; with a frozen base a step costs 2 to 3 times that
of ZeRO-2 (docs/decisions.md, section 5, has the figures). A frozen weight needs no gradient exchange and never changes, so this
is enough: every process keeps 1/N of the bytes of each block, and two buffers of one block each take turns. Blocks with an even
number are gathered into the first and the others into the second, so always to the same address. While a block computes, the one
that comes next is gathered on another stream; the last two of the forward pass are still there when the backward pass begins.
What lies outside of blocks (embeddings, the output layer) shares a third buffer.

The bytes are moved, whatever they mean: packed 4-bit codes as well as bf16. Their block scales (3 % of an NF4 base) stay whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

# renamed in torch 2.13
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
ALIGNMENT = 256  # bytes; more than any kernel wants of the first address of a tensor
OUTSIDE = 2  # the buffer of weights outside of blocks
SMALL = 1 << 12  # entries; weights outside of blocks with fewer stay whole


@dataclass
class Unit:
    """What is gathered at once.

    Attributes:
        modules: whose passes need it; more than one where a weight is tied.
        tensors: its frozen parameters.
        slot: the buffer that it is gathered into.
    """

    modules: list[nn.Module]
    tensors: list[nn.Parameter]
    slot: int
    share: Tensor | None = None
    views: list[Tensor] = field(default_factory=list)
    size: int = 0  # bytes, a multiple of ALIGNMENT times the number of processes


class FrozenShares:
    """The shares of one model on this process.

    Args:
        units: from `units_of`; each has to be given to `take`, and then `start` to be called.
        device: where the passes run.

    Every process must make the same passes in the same order: each takes part in every gathering.
    """

    def __init__(self, units: list[Unit], device: torch.device) -> None:
        self.units, self.device = units, device
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.blocks = [unit for unit in units if unit.slot != OUTSIDE]
        self.place = {id(unit): number for number, unit in enumerate(self.blocks)}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: dict[int, Tensor] = {}
        self.held: dict[int, Unit] = {}
        self.arrived: dict[int, torch.cuda.Event] = {}

    @torch.no_grad()
    def take(self, unit: Unit) -> None:
        """Keep this process's share of the unit's tensors, which are on the device in full, and free them.

        Afterwards they have their shape but no memory, and are NaN (0 for packed codes) outside of their modules' passes.
        """
        part = -(-sum(map(_room, unit.tensors)) // (ALIGNMENT * self.processes)) * ALIGNMENT
        whole = torch.zeros(part * self.processes, dtype=torch.uint8, device=self.device)
        for tensor, view in zip(unit.tensors, _views(unit.tensors, whole), strict=True):
            view.copy_(tensor)
        unit.size = part * self.processes
        unit.share = whole[self.rank * part : (self.rank + 1) * part].clone()
        for tensor in unit.tensors:
            _empty(tensor)
            tensor.share_numel = tensor.numel() / self.processes
            # DeepSpeed sends every parameter of the first process to the others, but those that are said to differ by design
            tensor.ds_optim_param = True
            tensor.whole = lambda unit=unit: self.gathered(unit)

    def start(self) -> None:
        """After all were taken: make the buffers, and have every module gather what it needs."""
        for slot in {unit.slot for unit in self.units}:
            largest = max(unit.size for unit in self.units if unit.slot == slot)
            self.buffers[slot] = torch.empty(largest, dtype=torch.uint8, device=self.device)
        for unit in self.units:
            unit.views = _views(unit.tensors, self.buffers[unit.slot])
            for module in unit.modules:
                # before a backward pass, too: without checkpointing the forward pass is not made again in it
                module.register_forward_pre_hook(lambda module, args, unit=unit: self.use(unit))
                module.register_full_backward_pre_hook(lambda module, grads, unit=unit: self.use(unit))

    def use(self, unit: Unit) -> None:
        """Have the unit's tensors whole for what is computed from now on, and gather the next block meanwhile."""
        with (
            _disable_current_modes()
        ):  # what selective checkpointing looks at is the layer alone, and this differs each time
            self._fetch(unit)
            self._wait(unit)
            if unit.slot != OUTSIDE:
                backward = torch._C._current_graph_task_id() != -1
                following = self.place[id(unit)] + (-1 if backward else 1)
                if 0 <= following < len(self.blocks):
                    self._fetch(self.blocks[following])

    @contextlib.contextmanager
    def gathered(self, unit: Unit) -> Iterator[None]:
        """The unit's tensors whole inside, also between passes; every process has to come here."""
        self._fetch(unit)
        self._wait(unit)
        yield

    @torch.no_grad()
    def _fetch(self, unit: Unit) -> None:
        if (before := self.held.get(unit.slot)) is unit:
            return
        for tensor in before.tensors if before else ():
            _empty(tensor)
        whole = self.buffers[unit.slot][: unit.size]
        if self.stream is None:
            _all_gather(whole, unit.share)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the block before has to be computed
            with torch.cuda.stream(self.stream):
                _all_gather(whole, unit.share)
                self.arrived[unit.slot] = self.stream.record_event()
        for tensor, view in zip(unit.tensors, unit.views, strict=True):
            tensor.data = view
        self.held[unit.slot] = unit

    def _wait(self, unit: Unit) -> None:
        if unit.slot in self.arrived:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[unit.slot])


def units_of(model: PreTrainedModel, trained: set[str]) -> list[Unit]:
    """The blocks of layers of a model in their order, then its large weights outside of blocks; none where there are no blocks.

    Outside of blocks those are shared that only their own module's pass reads, embeddings and linear layers; what else there is
    (norms, convolutions, positions that a module with children adds itself) is small and stays whole.

    Args:
        trained: modules that are left alone, as PEFT names them: the end of the dotted name.
    """
    names = set(model._no_split_modules or ())
    # tied, perhaps, and so used elsewhere
    ends = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    blocks: list[nn.Module] = []
    for module in model.modules():
        nested = any(module in block.modules() for block in blocks)
        if type(module).__name__ in names and not ends & set(module.modules()) and not nested:
            blocks.append(module)
    if not blocks:
        return []
    training = {
        parameter
        for name, module in model.named_modules(remove_duplicate=False)
        if any(name == end or name.endswith(f".{end}") for end in trained)
        for parameter in module.parameters()
    }
    units = [Unit([b], [p for p in b.parameters() if p not in training], n % 2) for n, b in enumerate(blocks)]
    inside = {p for unit in units for p in unit.tensors}
    outside: list[Unit] = []
    for module in model.modules():
        found = [p for p in module.parameters(recurse=False) if p not in training | inside]
        if not isinstance(module, nn.Embedding | nn.Linear) or not any(p.numel() >= SMALL for p in found):
            continue
        if (tied := next((unit for unit in outside if set(unit.tensors) & set(found)), None)) is not None:
            tied.modules.append(module)
            tied.tensors += [p for p in found if p not in tied.tensors]
        else:
            outside.append(Unit([module], found, OUTSIDE))
    return [*units, *outside]


def _views(tensors: list[nn.Parameter], whole: Tensor) -> list[Tensor]:
    """The places of these tensors in `whole`, one after the other."""
    found, offset = [], 0
    for tensor in tensors:
        place = whole[offset : offset + tensor.numel() * tensor.element_size()]
        found.append(place.view(tensor.dtype).view(tensor.shape))
        offset += _room(tensor)
    return found


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _empty(tensor: nn.Parameter) -> None:
    """Leave the shape, so that whoever asks for it is told the truth, and no memory."""
    value = float("nan") if tensor.is_floating_point() else 0
    tensor.data = torch.full((1,), value, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
