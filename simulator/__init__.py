"""The same policies in simulated time: replicas, gateways and machines that obey performance models instead of hardware."""
