"""Doing the work: the Ray actor that hosts replicas, their roles, and the engines."""
