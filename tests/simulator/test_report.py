"""The report is one page that asks for no other file, says what the result holds, and escapes what others wrote."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import msgspec
import pytest

from cluster.fleet import Fleet, GatewaySpec, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.replica import Role
from simulator.control import Act
from simulator.plot import Bound, Mark, Plot, Series, svg
from simulator.report import MOST_ROWS, html
from simulator.result import Event, Result
from simulator.simulation import Setup, Simulation
from simulator.world import Fault, World
from workloads.stream import open_workload

FLEET = Fleet(
    models=(ModelSpec(name="m", path="m"),),
    nodes=tuple(NodeSpec(name=f"n{n}", accelerator="h100", slots=1, price_usd_per_hour=4.0) for n in range(3)),
    replicas=(
        ReplicaGroup(
            role=Role.MIXED,
            count=2,
            max_replicas=3,
            engine="emulated",
            pace=Pace(shape="llama-3.1-8b", accelerator="h100"),
            startup_s=5,
        ),
    ),
    gateway=GatewaySpec(allow_anonymous=True),
)
VOID = {"meta", "line", "polygon", "path", "link", "br"}


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup(fleet=FLEET, world=World(faults=(Fault(at_s=20, kind="kill"),)), warm_up_s=5.0, label="a <trace> & more")


@pytest.fixture(scope="module")
def result(setup: Setup) -> Result:
    return Simulation(setup, iter(open_workload("poisson:rate=5,minutes=1,prompt=fixed(200),output=fixed(20)"))).run()


class Tags(HTMLParser):
    """Whether each tag is closed by its own end."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(page: str) -> str:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return " ".join(tags.text.split())


def test_the_page_needs_nothing_from_anywhere(result, setup):
    page = html(result, setup, command="mobula simulate")
    assert not re.search(r"(?i)<script|<link|<img|src=|url\(|@import|https?://", page)


def test_the_page_says_what_the_result_holds(result, setup):
    text = text_of(html(result, setup, command="mobula simulate 'a b'"))
    assert f"{result.kept:,} of {result.arrived:,}" in text
    assert f"{1000 * result.classes['default'].ttft_s.p99:,.1f}" in text
    assert f"${result.usd:,.2f}" in text
    assert "kill" in text
    for act in result.acts:
        assert act.action in text
    for words in result.warnings:
        assert words in text
    assert "mobula simulate 'a b'" in text
    assert "not measured" in text or "mean" in text
    assert "kind: kill" in text
    assert "a <trace> & more" in text


def test_what_others_wrote_is_escaped(result, setup):
    spoilt = msgspec.structs.replace(
        result,
        events=[Event(at_s=1.0, kind="kill", what="<script>alert(1)</script>")],
        acts=[Act(at_s=1.0, action="<b>x</b>", reason='"><img src=x>')],
    )
    page = html(spoilt, setup, command="<i>")
    for words in ("<script", "<b>x", "<img", "<i>"):
        assert words not in page.split("</style>")[1].replace('<i class="', "")


def test_an_interrupted_result_is_marked_as_one_even_with_nothing_found(setup):
    simulation = Simulation(setup, iter(open_workload("poisson:rate=5,minutes=1,prompt=fixed(200),output=fixed(20)")))
    empty = msgspec.structs.replace(simulation.result(), interrupted=True)
    assert "Interrupted after 0:00" in text_of(html(empty, setup, command=""))


def test_no_more_decisions_are_shown_than_anybody_reads(result, setup):
    many = msgspec.structs.replace(result, acts=[Act(at_s=float(n), action=f"act {n}", reason="why") for n in range(MOST_ROWS + 1)])
    text = text_of(html(many, setup, command="")).split("Latency and totals")[1]
    assert f"act {MOST_ROWS - 1}" in text
    assert f"act {MOST_ROWS} " not in text
    assert f"the first {MOST_ROWS} are shown" in text


# Plots


def line(values: list[float | None]) -> Series:
    return Series(name="x", values=values, style="blue")


def test_a_line_breaks_where_there_is_no_value():
    drawn = svg(Plot(title="t", unit="s", series=[line([1.0, 2.0, None, 3.0])]), 1.0, 4.0)
    path = re.search(r' d="([^"]+)"', drawn)
    assert path
    assert path[1].count("M") == 2
    assert path[1].count("L") == 1


def test_areas_are_stacked_and_keep_inside_the_axes():
    areas = [Series(name=name, values=[1.0, 3.0], style="", area=True) for name in "ab"]
    drawn = svg(Plot(title="t", unit="", series=areas), 1.0, 2.0)
    first, second = (
        [tuple(map(float, point.split(","))) for point in points.split()] for points in re.findall(r'points="([^"]+)"', drawn)
    )
    assert min(y for _, y in second) == 16.0  # Six of six, at the top.
    assert min(y for _, y in first) == pytest.approx((16 + 176) / 2)
    assert first[:4] == second[4:][::-1]


def test_a_bound_far_above_everything_does_not_flatten_the_rest():
    near, far = (
        svg(Plot(title="t", unit="", series=[line([1.0])], bounds=[Bound("SLO", value)]), 1.0, 1.0) for value in (2.0, 99.0)
    )
    assert 'class="bound"' in near
    assert 'class="bound"' not in far


def test_marks_say_what_happened_and_when():
    drawn = svg(Plot(title="t", unit="", series=[line([1.0] * 90)]), 1.0, 90.0, [Mark(61.0, "kill: <a>", "grave")])
    assert "<title>1:01 kill: &lt;a&gt;</title>" in drawn


@pytest.mark.parametrize("highest", [0.0, 1e-6, 0.3, 1.0, 7.0, 12345.0, 3e9])
def test_ticks_are_round_few_and_reach_the_highest_value(highest):
    drawn = svg(Plot(title="t", unit="", series=[line([highest])]), 1.0, 1.0)
    assert 2 <= drawn.count('class="grid"') <= 6
