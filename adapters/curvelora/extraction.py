"""The plain LoRA that is nearest to an adapter's update: dW ~ B A in rank k, with the error that this leaves.

    dW: (d_out, d_in)   dW = U S V^T, s_1 >= s_2 >= ...   A = sqrt(S_k) V_k^T: (k, d_in)   B = U_k sqrt(S_k): (d_out, k)

No other B A of rank k is nearer in the Frobenius norm (Eckart and Young, Psychometrika 1, 1936), and what it misses is
||dW - B A||^2 = s_{k+1}^2 + s_{k+2}^2 + ... The first k of these squares as a share of all is the energy that rank k keeps.

It holds for every adapter whose update is linear in the layer's input, whatever its form: weight-space methods, linear
bottlenecks, and PEFT's own methods that merge. Everything is computed in fp64, a layer at a time, on the layer's device.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from curvelora.errors import UserError
from curvelora.layers.base_weight import is_transposed, linear_shape
from curvelora.svd import singular_triplets

PROBES = 4  # random inputs on which a layer is compared with its merged form
# How far a merged layer may be off: a share of the update, and of the base's output, because some of PEFT's methods compute
# parts in fp32. One that is not linear is off by much of the update itself.
OF_UPDATE, OF_OUTPUT = 1e-3, 1e-6


@torch.no_grad()
def weight_change(layer: BaseTunerLayer, name: str, adapter: str = "default") -> Tensor:
    """dW, what merging `adapter` adds to the base weight: (d_out, d_in), fp64. The layer itself is left as it was.

    Merging is asked rather than a method's formula, because some updates depend on the base weight (DoRA, OFT). A copy of the
    layer is merged in fp64, and then has to give the outputs that the adapter gave on a few random inputs.

    Args:
        layer: an adapted `nn.Linear` or `Conv1D` in floating point.
        name: its name in the model, for messages.
        adapter: the one that is active.

    Raises:
        UserError: another kind of layer, or one with a merged adapter; an adapter that cannot be merged, that changes the bias
            too, or that is not linear in its input; an update that is not finite.
    """
    base_layer = layer.get_base_layer()
    if not isinstance(base_layer, nn.Linear | Conv1D):
        raise UserError(
            f"module {name!r} is of type {type(base_layer).__name__}, and a plain LoRA is extracted from linear layers only: "
            "train the adapter without this module, or merge it"
        )
    if not base_layer.weight.is_floating_point():
        raise UserError(f"module {name!r} holds a quantised weight: load the unquantised base")
    if layer.merged:
        raise UserError(f"module {name!r} holds a merged adapter: call model.unmerge_adapter() first")
    # fp64, because W + dW - W would lose the digits of a dW that is small beside W
    own = copy.deepcopy(layer).double().eval()
    base = own.get_base_layer()
    weight, bias = base.weight.detach().clone(), None if base.bias is None else base.bias.detach().clone()
    d_in, _ = linear_shape(base, name)
    x = torch.randn(PROBES, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(weight.device)
    try:
        without, adapted = base(x), own(x)
        own.merge(adapter_names=[adapter])
    except UserError:
        raise
    # how PEFT says so of what it cannot merge, or cannot run alone (Poly) or in fp64 (AdaMSS)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"the update of module {name!r} cannot be formed ({' '.join(str(error).split())}): serve the adapter as it is"
        ) from error
    base = own.get_base_layer()
    if bias is not None and not torch.equal(base.bias, bias):
        raise UserError(f"the adapter changes the bias of module {name!r}, which a plain LoRA cannot: merge it instead")
    delta = base.weight.detach() - weight
    if not torch.isfinite(delta).all():
        raise UserError(
            f"the update of module {name!r} has NaN or infinite entries: the training diverged, or a file is damaged"
        )
    allowed = OF_UPDATE * (adapted - without).norm() + OF_OUTPUT * without.norm()
    if (base(x) - adapted).norm() > allowed:
        raise UserError(
            f"the adapter of module {name!r} does not act as its merged weight does, so it is not linear in its input and "
            "no LoRA equals it: serve it as the adapter that it is"
        )
    return delta.T if is_transposed(base) else delta


@torch.no_grad()
def squared_singular_values(delta: Tensor) -> Tensor:
    """s_i^2, descending: (min(d_out, d_in),), fp64, from the Gram matrix of the smaller side.

    Absolute errors are about 2^-53 s_1^2, so shares of energy are good to 1e-15 and an s_i below 1e-8 s_1 is noise.
    """
    W = delta.double()
    W = W.T if W.shape[0] > W.shape[1] else W
    return torch.linalg.eigvalsh(W @ W.T).flip(0).clamp(min=0)


def rank_for(squares: Tensor, energy: float) -> int:
    """The smallest k whose first k of `squares` (n,) are at least the share `energy` of all; 0 where all are zero."""
    # what is left after k, summed from the small end: 1 - sum would lose the last digits
    left = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return int((left > (1 - energy) * left[0]).sum())


@dataclass(frozen=True)
class LowRank:
    """dW ~ B A.

    Args:
        A, B: (k, d_in) and (d_out, k), in the dtype that was asked for.
        norm: ||dW||_F.
        error: ||dW - B A||_F of the factors as rounded to their dtype.
    """

    A: Tensor
    B: Tensor
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """`error` over `norm`; 0 where dW is zero."""
        return self.error / self.norm if self.norm else 0.0


@torch.no_grad()
def nearest_factors(delta: Tensor, rank: int, name: str, dtype: torch.dtype = torch.float32) -> LowRank:
    """The best rank-k factors of `delta` by SVD, rounded once to `dtype`.

    Args:
        delta: dW (d_out, d_in), any floating dtype; the work is done in fp64.
        rank: k.
        name: the layer's name, for messages.

    Raises:
        UserError: a rank below 1 or above min(d_out, d_in), or factors that overflow in `dtype`.
    """
    limit = min(delta.shape)
    if not 1 <= rank <= limit:
        raise UserError(
            f"rank {rank} is not between 1 and min(d_in, d_out)={limit} of module {name!r} "
            f"({delta.shape[0]} x {delta.shape[1]}): take a rank that all adapted modules have"
        )
    W = delta.double()
    found = singular_triplets(W, rank, "first")
    # half of each singular value on either side: neither factor leaves the narrow range of float16
    root = found.S.sqrt()
    A, B = (root[:, None] * found.V.T).to(dtype), (found.U * root).to(dtype)
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise UserError(
            f"the factors of module {name!r} overflow in {str(dtype).removeprefix('torch.')}: take bfloat16"
        )
    error = (W - B.double() @ A.double()).norm().item()
    return LowRank(A, B, W.norm().item(), error)
