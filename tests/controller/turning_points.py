"""The claim behind every explanation: a stated turning point turns the decision, and 99 % of the way there does not."""

from __future__ import annotations

from collections.abc import Iterator

from controller.explanation import GroupAnswer, explain
from controller.journal import Journal
from controller.pipelines import from_text
from policies.counterfactual import outcome
from policies.levers import write


def proven(journal: Journal) -> Iterator[GroupAnswer]:
    """Each group's part in each pass that did something, once all that is stated of it was found to be true."""
    for number in [choice.number for choice in journal.changes(most=1000)]:
        entry = journal.entry(number)
        decide = from_text(entry.pipeline).decide
        for told in explain(journal, number).groups:
            assert told.flips, f"nothing would have turned {told.group} in pass {number}"
            for flip in told.flips:
                there = decide(write(entry.snapshot, flip.lever, flip.turns_at))
                nearly = decide(write(entry.snapshot, flip.lever, flip.was + 0.99 * (flip.turns_at - flip.was)))
                assert outcome(there, told.group) == flip.outcome != told.outcome
                assert outcome(nearly, told.group) == told.outcome
            yield told
