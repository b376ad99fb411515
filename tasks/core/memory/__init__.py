"""How much memory there is and what it holds: a device goes in, bytes and tokens come out.

Read `device_memory.py` first (what running out means, what is free), then `budget.py` (how many tokens may be there at
once), `activations.py`, and `processor.py` (which number formats the processor computes in).
"""
