"""Imported by Python's fork server for children.py: nothing but the heavy libraries."""

from tests.making.warm.server import load_libraries

load_libraries()
