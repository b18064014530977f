"""Made-up traffic has the rates, lengths and shared prefixes it states, and is the same for the same seed."""

import itertools
import statistics

import pytest

from cluster.errors import InvalidConfig
from workloads.generators import is_generator, parse_generator

POISSON = "poisson:rate=10,minutes=10,prompt=lognormal(200,0.6),output=fixed(32)"


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
        ("poisson:rate=1e6,minutes=1e6,prompt=fixed(1),output=fixed(1)", "above 10000000"),
        ("steps:rates=2,prompt=fixed(1),output=fixed(1)", "seconds of a step: '' is not a number"),
        ("weibull:rate=4", "generator 'weibull' is none of"),
    ],
)
def test_a_wrong_generator_is_named(text, message):
    with pytest.raises(InvalidConfig, match=message):
        parse_generator(text)


def test_a_generator_is_told_from_a_file():
    assert is_generator(POISSON)
    assert not is_generator("poisson.csv")
    assert not is_generator("C:/traces/azure.csv")
