"""Settings outside their range make no policy."""

import math
import re

import msgspec
import pytest

from policies.disaggregation import Disaggregation
from policies.expansion import Expansion
from policies.flow import Window
from policies.guards import DisruptionBudget, RateOfChange, StaleTelemetry
from policies.hands import Hands
from policies.scaling import Scaling
from policies.sizing import Bounds

STRUCTS = (Window, Bounds, Scaling, Disaggregation, Expansion, Hands, StaleTelemetry, RateOfChange, DisruptionBudget)
NUMBERS = [(kind, field.name) for kind in STRUCTS for field in msgspec.structs.fields(kind) if field.type in (int, float)]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_number_is_neither_negative_nor_nan_nor_infinite(kind: type, name: str, value: float):
    with pytest.raises(ValueError, match=f"^{name} {value} is outside"):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (Window, {"rise_s": ()}, "rise_s [] is not one window or more"),
        (Window, {"rise_s": (60.0, 5.0)}, "rise_s [60.0, 5.0] is not one window or more, shortest first"),
        (Window, {"rise_s": (0.0, 5.0)}, "rise_s 0.0 is outside (0, inf)"),
        (Window, {"fall_s": 30.0}, "fall_s 30.0 is below 60.0, fall_part_s"),
        (Bounds, {"utilisation": 1.1}, "utilisation 1.1 is outside (0, 1]"),
        (Bounds, {"missed_share": 0.0}, "missed_share 0.0 is outside (0, 1]"),
        (Scaling, {"down_margin": 0.9}, "down_margin 0.9 is outside [1.0, inf)"),
        (Scaling, {"backlog_s": 0.0}, "backlog_s 0.0 is outside (0, inf)"),
        (RateOfChange, {"up_least": 0}, "up_least 0 is outside [1, inf)"),
        (Expansion, {"give_up_after": 0}, "give_up_after 0 is outside [1, inf)"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_bound(kind: type, settings: dict, words: str):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        kind(**settings)
