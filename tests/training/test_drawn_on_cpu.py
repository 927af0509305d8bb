"""A new head is the same one on whichever device it is drawn."""

import pytest
import torch
from torch import nn

from curvelora_training.zero3 import drawn_on_cpu

DRAWS = {
    "normal": lambda t: nn.init.normal_(t, 0.5, 0.02),
    "method": lambda t: t.normal_(mean=0.0, std=2.0),
    "kaiming": lambda t: nn.init.kaiming_uniform_(t, a=5**0.5),
    "truncated": lambda t: nn.init.trunc_normal_(t, std=0.02),
}


def draw(name: str, device: str) -> torch.Tensor:
    torch.manual_seed(3)
    with drawn_on_cpu(), torch.no_grad():
        return DRAWS[name](torch.empty(5, 7, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("name", DRAWS)
def test_the_gpus_numbers_are_the_cpus(name: str) -> None:
    found, wanted = draw(name, "cuda").cpu(), draw(name, "cpu")
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7) and wanted.std() > 0


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "truncated"])  # which leaves a meta tensor alone
def test_the_cpus_generator_moves_on_as_without(name: str) -> None:
    """What is drawn next (an adapter's factors) is what one process draws; a tensor on the meta device stands for a GPU's."""
    torch.manual_seed(3)
    before = DRAWS[name](torch.empty(5, 7))
    wanted = torch.rand(4)
    assert draw(name, "meta").is_meta and torch.rand(4).equal(wanted)
    assert draw(name, "cpu").equal(before)
    assert "normal_" not in vars(torch.Tensor)  # as it was
