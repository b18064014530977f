"""Doing it live: reads the config, keeps the membership table, starts and stops replicas."""
