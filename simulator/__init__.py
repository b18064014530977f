"""The same policies in simulated time: a fleet of replicas, gateways and machines that obey performance models instead of hardware."""
