"""A worker of `experiments.speed` that only pretends to make steps."""

import time

import numpy as np

from experiments.baselines import worker


def build(method, network, batch_size):
    if method == "dies":
        raise RuntimeError("no such layer")
    print("what libraries print is no answer")
    kept = []

    def step():
        until = time.process_time() + (0.03 if method == "private" else 0.01)
        if method == "large":
            kept.append(np.ones(2**26))  # 512 MiB
            time.sleep(60)  # it is seen, and ended, meanwhile
        while method == "endless" or time.process_time() < until:
            pass

    return worker.repeated(step), {"pretence": f"1.0 of {network}"}


if __name__ == "__main__":
    worker.serve(build)
