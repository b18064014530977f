"""cluster.yaml: read, checked against what is possible, and shown with every default.

A bad file is refused whole, before anything starts, by one InvalidConfig that names the value, the bound and the place.
"""

from controller.config.effective import as_yaml, effective
from controller.config.groups import model_of
from controller.config.possible import check, check_fleet, check_unstarted
from controller.config.reading import load_fleet, parse_fleet
from controller.config.this_machine import memory_by_node

__all__ = [
    "as_yaml",
    "check",
    "check_fleet",
    "check_unstarted",
    "effective",
    "load_fleet",
    "memory_by_node",
    "model_of",
    "parse_fleet",
]
