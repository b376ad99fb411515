"""Checks that run in processes of their own, whatever becomes of these: what bench/gpu.py and bench/torture.py share.

Read: rows (what is reported), results (the file), running (processes and time limits), worker.
"""
