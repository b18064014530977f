"""Made-up traffic has the rates, lengths and shared prefixes it states, and is the same for the same seed."""

import itertools
import math
import statistics
import tracemalloc
from collections import Counter

import pytest

from cluster.errors import InvalidConfig
from cluster.record import TraceRow
from workloads import generators
from workloads.generators import is_generator, parse_generator

POISSON = "poisson:rate=10,minutes=10,prompt=lognormal(200,0.6),output=fixed(32)"

SESSIONS = "sessions:rate=1,minutes=30,turns=geometric(4),think=exponential(20),prompt=lognormal(80,0.6),output=uniform(20,60)"


def made(text, seed=0):
    return list(parse_generator(text).rows(seed))


def gap_variation(rows):
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(rows)]
    return statistics.stdev(gaps) / statistics.mean(gaps)


def test_the_same_seed_makes_the_same_rows():
    assert made(POISSON, seed=3) == made(POISSON, seed=3) != made(POISSON, seed=4)


def test_poisson_arrives_at_its_rate_with_gaps_as_spread_as_their_mean():
    rows = made(POISSON)
    assert len(rows) == pytest.approx(6000, rel=0.05)
    assert rows[-1].arrival_s < 600
    assert gap_variation(rows) == pytest.approx(1.0, rel=0.05)


def test_gamma_gaps_have_the_stated_burstiness():
    rows = made("gamma:rate=10,burstiness=0.25,minutes=10,prompt=fixed(9),output=fixed(1)")
    assert len(rows) == pytest.approx(6000, rel=0.1)
    assert gap_variation(rows) == pytest.approx(2.0, rel=0.1)


def test_each_step_has_its_own_rate():
    rows = made("steps:rates=2x100/20x100/0x50/2x100,prompt=fixed(9),output=fixed(1)")
    counts = [sum(low <= row.arrival_s < low + 50 for row in rows) for low in range(0, 350, 50)]
    assert counts == pytest.approx([100, 100, 1000, 1000, 0, 100, 100], rel=0.25)


def test_lengths_follow_their_distribution_and_its_bounds():
    rows = made("poisson:rate=20,minutes=5,prompt=lognormal(200,0.6,50,400),output=uniform(5,9)")
    assert statistics.median(row.prompt_tokens for row in rows) == pytest.approx(200, rel=0.05)
    assert {row.prompt_tokens for row in rows} <= set(range(50, 401))
    assert {row.output_tokens for row in rows} == {5, 6, 7, 8, 9}


def test_the_stated_share_of_prompts_opens_with_a_common_prefix():
    rows = made("poisson:rate=20,minutes=2,prompt=fixed(100),output=fixed(1),shared=0.75,prefix=64,prefixes=2")
    openings = [row.block_hashes[:4] for row in rows]
    common = [opening for opening in openings if openings.count(opening) > 1]
    assert len(common) / len(rows) == pytest.approx(0.75, abs=0.05)
    assert len(set(common)) == 2
    assert all(len(row.block_hashes) == 6 for row in rows)


def test_a_day_swings_between_its_low_and_its_high():
    rows = made("diurnal:low=1,high=9,period_h=0.5,hours=1,prompt=fixed(9),output=fixed(1)")
    counts = [sum(low <= row.arrival_s < low + 300 for row in rows) for low in range(0, 3600, 300)]
    means = [5 - 4 * (math.sin(math.tau * (at + 1) / 6) - math.sin(math.tau * at / 6)) / (math.tau / 6) for at in range(12)]
    assert counts == pytest.approx([300 * mean for mean in means], rel=0.15)
    days = parse_generator("diurnal:low=1,high=9,hours=48,prompt=fixed(9),output=fixed(1)")
    assert days.expected(86400.0) == pytest.approx(5 * 86400)


@pytest.fixture
def seen(tmp_path):
    """A trace whose prompts are each a hundred times their output."""
    path = tmp_path / "seen.csv"
    rows = "".join(f"{at},{100 * (at + 1)},{at + 1}\n" for at in range(20))
    path.write_text("Timestamp,Request tokens,Response tokens\n" + rows)
    return path


def test_empirical_lengths_are_those_of_the_trace_as_often(seen):
    rows = made(f"poisson:rate=50,minutes=2,lengths={seen}")
    counts = Counter(row.prompt_tokens for row in rows)
    assert counts.keys() == {100 * length for length in range(1, 21)}
    assert min(counts.values()) > 0.7 * len(rows) / 20


def test_empirical_lengths_are_independent_unless_asked_otherwise(seen):
    free = made(f"poisson:rate=50,minutes=2,lengths={seen}")
    assert sum(row.prompt_tokens == 100 * row.output_tokens for row in free) / len(free) == pytest.approx(0.05, abs=0.02)
    paired = made(f"gamma:rate=50,burstiness=0.5,minutes=1,lengths={seen},independent=no")
    assert all(row.prompt_tokens == 100 * row.output_tokens for row in paired)


def test_azure_lengths_have_their_medians(data_dir):
    rows = made(f"poisson:rate=50,minutes=5,lengths={data_dir / 'azure_llm_2023/AzureLLMInferenceTrace_conv.csv'}")
    assert statistics.median(row.prompt_tokens for row in rows) == pytest.approx(1020, rel=0.05)
    assert statistics.median(row.output_tokens for row in rows) == pytest.approx(129, rel=0.05)


def test_tenants_classes_and_priorities_come_by_their_weights_and_independently():
    rows = made(POISSON + ",tenants=a:3/b:1,classes=interactive:1/batch:1,priorities=0:9/-5:1")
    shares = {
        (tenant, slo_class, priority): weight_1 * weight_2 * weight_3
        for tenant, weight_1 in {"a": 0.75, "b": 0.25}.items()
        for slo_class, weight_2 in {"interactive": 0.5, "batch": 0.5}.items()
        for priority, weight_3 in {0: 0.9, -5: 0.1}.items()
    }
    counts = Counter((row.tenant, row.slo_class, row.priority) for row in rows)
    assert counts.keys() == shares.keys()
    assert all(counts[who] / len(rows) == pytest.approx(share, abs=0.02) for who, share in shares.items())


BASE = POISSON + ",shared=0.5,tenants=a:3/b:1,classes=x:1/y:1,priorities=0:1/1:1"


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (BASE.replace("poisson:", "gamma:burstiness=0.5,"), {"arrival_s"}),
        (BASE.replace("lognormal(200,0.6)", "lognormal(300,0.6)"), {"prompt_tokens", "block_hashes"}),
        (BASE.replace("output=fixed(32)", "output=uniform(1,64)"), {"output_tokens"}),
        (BASE.replace("shared=0.5", "shared=0.6"), {"block_hashes"}),
        (BASE.replace("tenants=a:3/b:1", "tenants=a:1/b:1/c:1"), {"tenant"}),
        (BASE.replace("classes=x:1/y:1", "classes=x:1/y:3"), {"slo_class"}),
        (BASE.replace("priorities=0:1/1:1", "priorities=0:1/2:1"), {"priority"}),
    ],
)
def test_what_is_drawn_for_one_concern_leaves_the_others_as_they_were(text, changed):
    before, after = made(BASE, seed=5), made(text, seed=5)
    differing = {
        name
        for one, other in zip(before, after, strict=False)
        for name in TraceRow.__struct_fields__
        if getattr(one, name) != getattr(other, name)
    }
    assert differing == changed


def test_rows_are_made_as_they_are_asked_for():
    rows = parse_generator("poisson:rate=1e5,minutes=100,prompt=fixed(1000),output=fixed(1),shared=0.5").rows(0)
    tracemalloc.start()
    last = next(itertools.islice(rows, 20_000, None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last.arrival_s == pytest.approx(0.2, rel=0.1)
    assert peak < 32 * 2**20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poisson:rate=4", "needs minutes, output, prompt"),
        ("poisson:rate=x,minutes=1,prompt=fixed(1),output=fixed(1)", "rate: 'x' is not a number"),
        ("poisson:rate=-4,minutes=1,prompt=fixed(1),output=fixed(1)", "rate: -4 is outside"),
        ("poisson:rate=nan,minutes=1,prompt=fixed(1),output=fixed(1)", "rate: nan is outside"),
        ("poisson:rate=4,minutes=1,prompt=normal(1),output=fixed(1)", "prompt='normal\\(1\\)' is none of"),
        ("poisson:rate=4,minutes=1,prompt=uniform(9,1),output=fixed(1)", "lower bound is above"),
        ("poisson:rate=4,minutes=1,prompt=fixed(1,2),output=fixed(1)", "2 arguments"),
        ("poisson:rate=4,minutes=1,promt=fixed(1),output=fixed(1)", "has no promt"),
        ("poisson:rate=4,,minutes=1", "not name=value"),
        ("poisson:rate=4,rate=5,minutes=1,prompt=fixed(1),output=fixed(1)", "has rate twice"),
        ("poisson:rate=1e6,minutes=1e6,prompt=fixed(1),output=fixed(1)", "above 1000000000"),
        ("poisson:rate=1,minutes=1,prompt=geometric(0),output=fixed(1)", "prompt=geometric\\(0\\): 0 is outside"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=lognormal(9,-1)", "output=lognormal\\(9,-1\\): -1 is outside"),
        (
            "poisson:rate=1,minutes=1,prompt=fixed(1),output=lognormal(9,11)",
            "output=lognormal\\(9,11\\): 11 is outside \\[0, 10\\]",
        ),
        ("poisson:rate=1,minutes=1,prompt=lognormal(9,1,7,3),output=fixed(1)", "lower bound is above"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),prefix=64.5", "prefix: 64.5 is no whole number"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),tenants=a", "tenants: '' is no name of 1 to 64"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),tenants=a:0", "tenants: weight of 'a': 0 is outside"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),tenants=a:1/a:2", "has a value twice"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),classes=x:nan", "classes: weight of 'x': nan is outside"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),priorities=a:1", "priorities: 'a' is not a number"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),priorities=101:1", "priorities: 101 is outside \\[-100, 100\\]"),
        ("poisson:rate=1,minutes=1,lengths=none.csv", "lengths: none.csv: No such file"),
        ("poisson:rate=1,minutes=1,lengths=none.csv,prompt=fixed(1)", "has lengths and also prompt"),
        ("poisson:rate=1,minutes=1,prompt=fixed(1),output=fixed(1),independent=no", "independent=no without lengths"),
        ("diurnal:low=5,high=2,hours=1,prompt=fixed(1),output=fixed(1)", "low: 5 is outside \\[0, 2\\]"),
        ("diurnal:low=1,high=2,hours=1e6,period_h=1,prompt=fixed(1),output=fixed(1)", "hours: 1e6 is outside"),
        ("diurnal:low=1,high=2,prompt=fixed(1),output=fixed(1)", "needs hours"),
        ("sessions:rate=1,minutes=1,turns=fixed(2),prompt=fixed(1),output=fixed(1)", "needs think"),
        (SESSIONS.replace("turns=geometric(4)", "turns=fixed(0)"), "turns=fixed\\(0\\): 0 is outside"),
        (SESSIONS.replace("exponential(20)", "geometric(20)"), "think='geometric\\(20\\)' is none of"),
        (f"{SESSIONS},system=200,context=100", "context: 100 is outside \\[201,"),
        (f"{SESSIONS},shared=0.5", "generator 'sessions' has no shared"),
        ("steps:rates=2,prompt=fixed(1),output=fixed(1)", "seconds of a step: '' is not a number"),
        ("weibull:rate=4", "generator 'weibull' is none of"),
    ],
)
def test_a_wrong_generator_is_named(text, message):
    with pytest.raises(InvalidConfig, match=message):
        parse_generator(text)


def test_every_form_that_the_documentation_shows_makes_rows(seen):
    shown = [line.strip() for line in generators.__doc__.splitlines() if line.startswith("    ")]
    assert {text.partition(":")[0] for text in shown} == {"poisson", "gamma", "steps", "diurnal", "sessions"}
    for text in shown:
        assert next(parse_generator(text.replace("azure_conv.csv", str(seen))).rows(0)).prompt_tokens


def test_a_generator_is_told_from_a_file():
    assert is_generator(POISSON)
    assert not is_generator("poisson.csv")
    assert not is_generator("C:/traces/azure.csv")
