"""Who trains: a `TrainingWork` goes in, a complete model folder comes out (`Trainers.train`).

`work.py` is the interface, `choosing.py` decides. `one.py` is this process. `elastic.py` is a group of processes on
this machine, which torch's elastic agent starts and restarts (`agent.py`, `child.py`); `joined.py` is one that torchrun
has started, on as many machines as it likes (`launched.py`); `on_ray/` is one on a Ray cluster. `rank.py` is what each
process of a group does, whoever started it.

In a training, `team.py` is what a process has of the others, `sharing.py` which rows of an update are its own,
`gradients.py` how gradients become those of all, `sharding.py` a model of which each holds a part, `strategy.py` which
of the two it is, `journal.py` what became of earlier tries.
"""
