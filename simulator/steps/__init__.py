"""What replicas do, step by step, compiled: batches, KV blocks and times of a whole fleet in arrays. No policy lives here."""

from pathlib import Path

from cluster.compiled import forget_stale

_HERE = Path(__file__).parent
forget_stale((*map(str, _HERE.glob("*.py")), str(_HERE.parent / "sketch.py")))
