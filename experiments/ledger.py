"""Cost of the ledger for a step: `pay()` on a real file, beside steps of 20 ms.

`python -m experiments.ledger` reserves steps as training does, each reservation on disk (fsync)
before its first step, and pays for one step every 20 ms. Shares are of the step: of the median
payment, and of all payments together, reservations included.
"""

import json
import os
import statistics
import tempfile
import time

import accountants
from experiments import frame


def main(values):
    with tempfile.TemporaryDirectory(dir=frame.folder(values)) as folder:
        path = os.path.join(folder, "spent.ledger")
        paid = []
        with accountants.Ledger(path).open_run(
            noise_multiplier=1.0, sampling=accountants.PoissonSampling(256), num_examples=60_000
        ) as run:
            for _ in range(values.steps):
                start = time.perf_counter()
                run.pay()
                paid.append(1e3 * (time.perf_counter() - start))
                time.sleep(values.step_ms / 1e3)
    result = {
        "steps": values.steps,
        "step_ms": values.step_ms,
        "median_ms": round(statistics.median(paid), 6),
        "mean_ms": round(statistics.fmean(paid), 6),
        "worst_ms": round(max(paid), 3),
        "median_percent": round(100 * statistics.median(paid) / values.step_ms, 4),
        "percent": round(100 * statistics.fmean(paid) / values.step_ms, 4),
    }
    print(json.dumps(result))


def define_flags(define):
    define.integer("steps", 2_000, "Steps that are paid for.", least=1)
    define.number("step_ms", 20.0, "Milliseconds that a step takes.", least=0.001)
    define.text("folder", ".", "Where the file lies, and the disk that is waited for.")


if __name__ == "__main__":
    frame.start(main, define_flags)
