"""Bytes between processes: tokens, KV and load. Imports only `cluster`."""
