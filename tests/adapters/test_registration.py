"""A method from outside in PEFT's closed enum: everything that PEFT, pickle and JSON do with a member works."""

from __future__ import annotations

import copy
import enum
import json
import pickle

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from curvelora import LoranConfig, LoranModel
from curvelora.peft_registration import extend_peft_type, register


class Other(LoranConfig):
    pass


class OtherModel(LoranModel):
    """Same prefix as LoRAN on purpose: two methods with one prefix would read each other's tensors."""


@pytest.fixture
def spare_enum():
    """PeftType and PEFT's tables are shared by all tests of a process: what a test adds is taken out again."""
    before = list(PeftType.__members__)
    yield
    for name in set(PeftType.__members__) - set(before):
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            table.pop(PeftType[name], None)
        type.__delattr__(PeftType, name)
        PeftType._member_names_.remove(name)
        del PeftType._member_map_[name], PeftType._value2member_map_[name]


def test_extending_twice_gives_the_same_member(spare_enum):
    count = len(PeftType)
    member = extend_peft_type("sometest")
    assert extend_peft_type("sometest") is member
    assert len(PeftType) == count + 1


def test_a_name_that_peft_has_is_returned_as_it_is():
    assert extend_peft_type("lora") is PeftType.LORA


MEMBER = PeftType("LORAN")
LOOKUPS = {
    "by value": lambda: PeftType("LORAN"),
    "by name": lambda: PeftType["LORAN"],
    "by attribute": lambda: PeftType.LORAN,
    "by iteration": lambda: next(m for m in PeftType if m.name == "LORAN"),
    "from __members__": lambda: PeftType.__members__["LORAN"],
    "through pickle": lambda: pickle.loads(pickle.dumps(PeftType.LORAN)),
    "through copy": lambda: copy.copy(PeftType.LORAN),
    "through deepcopy": lambda: copy.deepcopy(PeftType.LORAN),
}


@pytest.mark.parametrize("how", LOOKUPS)
def test_every_way_to_the_member_is_the_same_object(how):
    assert LOOKUPS[how]() is MEMBER


def test_the_member_is_like_peft_s_own():
    own, ours = PeftType.LORA, PeftType.LORAN
    assert type(ours) is type(own) is PeftType and isinstance(ours, str) and isinstance(ours, enum.Enum)
    assert (ours.name, ours.value, ours == "LORAN") == ("LORAN", "LORAN", True)
    assert repr(ours) == repr(own).replace("LORA", "LORAN") and str(ours) == str(own).replace("LORA", "LORAN")
    assert ours in PeftType and ours in list(PeftType) and "LORAN" in list(PeftType)
    assert hash(ours) == hash(PeftType("LORAN")) and {ours: 1}[PeftType.LORAN] == 1
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert json.dumps({"t": ours}) == '{"t": "LORAN"}'


def test_an_unknown_value_is_still_refused():
    with pytest.raises(ValueError, match="NOTHING"):
        PeftType("NOTHING")
    with pytest.raises(AttributeError):
        PeftType.LORAN = "x"  # the enum stays closed for everybody else


def test_peft_knows_the_method():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORAN] is LoranConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORAN] is LoranModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORAN] == "loran_"


def test_registering_the_same_method_again_does_nothing():
    sizes = len(PEFT_TYPE_TO_CONFIG_MAPPING), len(PeftType)
    register("loran", LoranConfig, LoranModel)
    assert (len(PEFT_TYPE_TO_CONFIG_MAPPING), len(PeftType)) == sizes


def test_another_class_under_a_taken_name_is_refused():
    with pytest.raises(KeyError, match="already PEFT method called 'loran'"):
        register("loran", Other, LoranModel)


def test_a_prefix_clash_is_refused(spare_enum):
    with pytest.raises(KeyError, match="already a prefix called 'loran_'"):
        register("someother", Other, OtherModel)


def test_the_config_survives_json_and_pickle(tmp_path):
    config = LoranConfig(r=5, target_modules=["v_proj", "q_proj"], activation="sin", rank_pattern={"k": 2})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORAN" and written["activation"] == "sinter"
    assert sorted(written["target_modules"]) == ["q_proj", "v_proj"]
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is LoranConfig and read.target_modules == {"q_proj", "v_proj"} and read.rank_pattern == {"k": 2}
    assert (read.r, read.amplitude, read.frequency, read.dropout) == (5, 5e-5, 1e4, 0.2)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
