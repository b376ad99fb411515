"""Imported by Python's fork server for children.py: nothing but the heavy libraries."""

import gc

from tests.making.warm.server import load_libraries

gc.disable()  # imports make no garbage
load_libraries()
gc.collect()
gc.freeze()  # so that no collection in a forked process copies what is shared
gc.enable()
