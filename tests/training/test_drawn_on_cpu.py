"""A new head is the same one on whichever device it is drawn."""

import pytest
import torch
from torch import nn

from curvelora_training.zero3 import DrawnOnCpu

DRAWS = [
    lambda t: nn.init.normal_(t, 0.5, 0.02),
    lambda t: t.normal_(mean=0.0, std=2.0),
    lambda t: nn.init.kaiming_uniform_(t, a=5**0.5),
    lambda t: nn.init.trunc_normal_(t, std=0.02),
]


def draw(device: str) -> list[torch.Tensor]:
    torch.manual_seed(3)
    with DrawnOnCpu(), torch.no_grad():
        return [draw(torch.empty(5, 7, device=device)).cpu() for draw in DRAWS]


@pytest.mark.gpu
def test_the_gpus_numbers_are_the_cpus() -> None:
    for found, wanted in zip(draw("cuda"), draw("cpu"), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7) and wanted.std() > 0


def test_the_cpus_generator_moves_on_as_without() -> None:
    """What is drawn next (an adapter's factors) is what one process draws; a tensor on the meta device stands for a GPU's."""
    torch.manual_seed(3)
    torch.empty(5, 7).normal_()
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with DrawnOnCpu():
        assert torch.empty(5, 7, device="meta").normal_().is_meta
    assert torch.rand(4).equal(wanted)
