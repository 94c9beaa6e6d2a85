"""Workers of `experiments.speed`: the baselines, a module for each library, and lipdp in `ours`.

`python -m experiments.baselines.NAME METHOD NETWORK BATCH_SIZE` makes a step for each line that it
reads, in the environment of its library. Only `ours` imports lipdp.
"""
