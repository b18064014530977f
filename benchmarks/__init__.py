"""Speed, as ratios against a peer or a bare loop in the same run: `python -m benchmarks.NAME`."""
