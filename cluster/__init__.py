"""The vocabulary: what a cluster is and what may be done to it. Imports nothing else of ours."""
