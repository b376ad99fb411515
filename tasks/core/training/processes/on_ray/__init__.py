"""Processes of a Ray cluster train, which Ray Train places, starts and begins again.

`cluster.py` is what the cluster has, `group.py` the process that began the training, `worker.py` what runs on the
cluster, `place.py` what a worker must have in front of it before it trains.
"""
