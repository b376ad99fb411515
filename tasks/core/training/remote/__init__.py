"""An unfinished training at a URL: what one needs to go on is brought, and its checkpoints are sent while it trains.

    <run>/identity.json                                   whose the folder is, before the first checkpoint
    <run>/checkpoints/checkpoint-<step>/…, complete.json  as on the disk; the seal is sent last and removed first

A thread sends the newest whole checkpoint, and the best one that it needs; those that were overtaken while it was sent
are left out, so that no training ever waits for a slow network. Rotation there follows what was sent. Read
`trainings.py` first, then `checkpoints.py` and `sender.py`.
"""
