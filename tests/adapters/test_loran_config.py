"""LoRAN's own options: what is refused, and with which words."""

from __future__ import annotations

import pytest

from curvelora import LoranConfig, UserError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"amplitude": -1e-5}, "amplitude must be a non-negative number, not -1e-05"),
        ({"amplitude": float("nan")}, "not nan"),
        ({"frequency": 0}, "frequency must be a positive number, not 0"),
        ({"frequency": True}, "not True"),
        ({"init_B_std": "small"}, "init_B_std must be a non-negative number, not 'small'"),
        ({"activation": "sinner"}, "unknown activation 'sinner'; did you mean 'sinter'"),
        ({"activation": "gelu"}, "unknown activation 'gelu'.*known: identity, sinter"),
        ({"scale_position": "outsid"}, "did you mean 'outside'"),
        ({"layers_pattern": "layers"}, "give layers_to_transform as well"),
        ({"r": True}, "not True"),
        ({"alpha": float("inf")}, "not inf"),
        ({"alpha_pattern": {"q": -2}}, "not -2"),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_the_value(options, said):
    with pytest.raises(UserError, match=said):
        LoranConfig(**options)
