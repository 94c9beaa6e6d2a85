"""Workers of `experiments.speed`: each makes the steps of one library, in its own environment.

`python -m experiments.baselines.NAME METHOD NETWORK BATCH_SIZE` makes a step for each line that it
reads. Only `ours` imports lipdp.
"""
