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
from policies.scaling import Scaling, Schedule
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


def schedule(**changed: object) -> Schedule:
    return Schedule(**{"group": "m/mixed/p", "start": "08:00", "end": "18:30", "min_replicas": 1, **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"timezone": "Europe/Berln"}, "timezone 'Europe/Berln' is no known time zone"),
        ({"timezone": "Europe"}, "timezone 'Europe' is no known time zone"),
        ({"timezone": "../UTC"}, "timezone '../UTC' is no known time zone"),
        ({"start": "8:00"}, "start '8:00' is no time of day from 00:00 to 23:59"),
        ({"start": "24:00"}, "start '24:00' is no time of day from 00:00 to 23:59"),
        ({"end": "24:01"}, "end '24:01' is no time of day from 00:00 to 24:00"),
        ({"end": "12:60"}, "end '12:60' is no time of day from 00:00 to 24:00"),
        ({"end": "18:30\n"}, "end '18:30\\n' is no time of day"),
        ({"start": "18:30"}, "end 18:30 is start: nothing lies between"),
        ({"days": (0, 7)}, "days [0, 7] are not some of 0 (Monday) to 6"),
        ({"days": ()}, "days [] are not some of 0 (Monday) to 6"),
        ({"min_replicas": None}, "neither min_replicas nor max_replicas is given"),
        ({"min_replicas": -1}, "min_replicas -1 is outside [0, inf)"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is above max_replicas 2"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changed: dict, words: str):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        schedule(**changed)


def test_a_schedule_may_cover_whole_days():
    day = schedule(start="00:00", end="24:00", days=(0,))
    assert [day.covers(hour * 3600.0 + 345_600.0) for hour in (-1, 0, 12, 23, 24)] == [False, True, True, True, False]
