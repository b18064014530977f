"""Two minutes of load, and the show around it."""
