"""The parts of bench/gpu.py. Read bench/checks first, then a part.

Each part is a module with `CHECKS`; a check is a generator of rows that runs in a process of its part. Modules here
import only the standard library when they are loaded, so that a missing library is a row, not the end.
"""
