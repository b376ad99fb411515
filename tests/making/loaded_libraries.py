"""Imported by Python's fork server for warm_children.py: nothing but the heavy libraries."""

from tests.making.warm_server import load_libraries

load_libraries()
