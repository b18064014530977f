"""What arrives: trace readers, generators, the open-loop client and the latency report."""
