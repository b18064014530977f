"""What to do: pure functions and pure state machines. Imports only `cluster`; no I/O, no clock, no chance."""
