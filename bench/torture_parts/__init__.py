"""The parts of bench/torture.py. Read: trials (a command and a fault), stage and works (what is tortured), a part.

Each part is a module with `check(bench, share)`, a generator of rows, listed in catalogue.py. Its trials run in
processes that are forked from one that has only imported the libraries: a trial costs tenths of a second.
"""
