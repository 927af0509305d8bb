"""Fixtures of the matrix. `--matrix-device cuda` runs it on a GPU, `--record-matrix PATH` writes its page."""

from __future__ import annotations

import copy
from collections.abc import Callable

import models
import pytest
import torch
from cases import Case
from page import Record, write
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the models are."""
    return torch.device(request.config.getoption("--matrix-device"))


@pytest.fixture
def ids(device: torch.device) -> Tensor:
    """A batch of token ids, (2, 7), the same in every cell."""
    return models.IDS.to(device)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama as an fp32 checkpoint."""
    folder = tmp_path_factory.mktemp("matrix") / "llama"
    models.llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def load_llama(llama_folder: str, device: torch.device) -> Callable[..., nn.Module]:
    """-> load(quantization, dtype): the tiny Llama as a user would load it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load(quantization: str = "none", dtype: torch.dtype = torch.float32) -> nn.Module:
        options = {}
        if quantization != "none":
            pytest.importorskip("bitsandbytes")
            settings = (
                BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=dtype,
                )
                if quantization == "nf4"
                else BitsAndBytesConfig(load_in_8bit=True)
            )
            options = {"quantization_config": settings, "device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype, **options).eval()
        # bitsandbytes' CPU kernel that reorders codes at the first evaluation, see curvelora.layers.base_weight
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model.to(device) if quantization == "none" else model

    return load


@pytest.fixture
def base(load_llama: Callable[..., nn.Module]) -> Callable[[Case], nn.Module]:
    """-> base(case): the tiny Llama, quantised where the method says so."""
    return lambda case: load_llama(case.entry.required_quantization or "none")


@pytest.fixture
def adapted(base: Callable[[Case], nn.Module]) -> Callable[..., PeftModel]:
    """-> adapted(case, trained=True, **options): the tiny Llama with the adapter, its tensors moved as training would."""

    def build(case: Case, trained: bool = True, seed: int = 0, **options: object) -> PeftModel:
        model = base(case)
        torch.manual_seed(seed)
        model = get_peft_model(model, copy.deepcopy(case.config(**options))).eval()
        return models.train_a_little(model, seed=seed) if trained else model

    return build


@pytest.fixture
def two(case, adapted):
    """A model with the adapters "default" (active) and "second", which is of another rank and on k_proj too."""
    model = adapted(case)
    model.add_adapter("second", case.config(r=2, target_modules=["q_proj", "k_proj"]))
    return models.train_a_little(model, seed=5, adapter="second").eval()


@pytest.fixture
def measure(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """-> measure(name, value): put a figure on the matrix page."""
    return lambda name, value: record_property("measured", (name, value))


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable:
    """-> refused(refusal): a context in which exactly this refusal must be met."""

    def expect(refusal) -> object:
        record_property("refused", refusal.title)
        return pytest.raises(ValueError, match=f"(?s){refusal.says}")

    return expect


RECORD = pytest.StashKey[Record]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = Record()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    outcome = yield
    item.config.stash.setdefault(RECORD, Record()).add(item, outcome.get_result())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--record-matrix"):
        write(session.config.stash[RECORD], path, session.config.getoption("--matrix-device"))
