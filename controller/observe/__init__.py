"""What the controller sees: load reports, counters, the inventory of nodes; and the snapshot made of them."""
