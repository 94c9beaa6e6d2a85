"""Times kinds of steps beside each other: a process for each, which take turns step by step.

A process of its own tells the peak of a kind's memory, and lets it have an environment of its own.
What it runs is a module of `experiments.baselines`.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import select
import statistics
import subprocess
import tempfile
import time

LEAST = 3  # steps that must be timed, however slow they are


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of taking private steps, and what it is held against.

    Attributes:
        library: whose environment it needs.
        name: for people.
        worker: its module.
        kinds: the worker's methods: `private`, `plain`, and perhaps others.
        networks: on which it is timed.
        warmup: steps that are not timed, at most.
        variables: of the environment, for the worker.
    """

    library: str
    name: str
    worker: str
    kinds: dict[str, str]
    networks: tuple[str, ...]
    warmup: int
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on how much is timed, and on what a process may take.

    Attributes:
        steps: that are timed, at most.
        seconds: of CPU, in which to get ready, or to make a step.
        gib: of memory.
        threads: of each process; 0 leaves it to the framework.
        keep_memory: whether processes keep the memory that they have freed.
    """

    steps: int = 30
    seconds: float = 120
    gib: float = 8.0
    threads: int = 1
    keep_memory: bool = True


class Failure(Exception):
    """A library cannot be installed, or a step not be timed; says why."""


class Worker:
    """A process that makes steps of one kind.

    Args:
        python: of its environment.
        method, kind, network, batch_size: what to make steps of.
        limits: the `Limits` that it has to keep.
    """

    def __init__(self, python, method, kind, network, batch_size, limits):
        command = [python, "-m", method.worker]
        command += [method.kinds[kind], network, str(batch_size)]
        self.limits = limits
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=pathlib.Path(__file__).parents[1],
            env=variables(limits.threads, limits.keep_memory) | method.variables,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def answer(self, limit):
        """Waits for the next answer.

        Args:
            limit: CPU seconds that the process may have spent since it began. They say more than
                the clock on a machine that is busy; the clock ends what hangs.

        Raises:
            Failure: it died, spent more than the limit, or took more memory than it may.
        """
        seconds, gib = self.limits.seconds, self.limits.gib
        hangs = time.monotonic() + 10 * seconds
        while not select.select([self.process.stdout], [], [], 0.1)[0]:
            if self.cpu_seconds() > limit:
                raise Failure(f"takes more than {seconds:g} s of CPU")
            if time.monotonic() > hangs:
                raise Failure(f"says nothing for {10 * seconds:g} s")
            if _resident_gib(self.process.pid) > gib:
                raise Failure(f"needs more than {gib:g} GiB")
            if _available_gib() < 1:
                raise Failure("the machine ran out of memory")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = [line.strip() for line in self.log if line.strip()][-1:]
            raise Failure(f"exit status {self.process.returncode}: {''.join(last)[:300]}")
        return json.loads(line)

    def step(self, limit=None):
        """Makes a step; by default it has all seconds for itself."""
        limit = self.cpu_seconds() + self.limits.seconds if limit is None else limit
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.answer(limit)

    def cpu_seconds(self):
        with contextlib.suppress(OSError):
            stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
            user, system = stat.rsplit(")", 1)[1].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.log.close()


def variables(threads=1, keep_memory=True):
    """The environment of a process whose framework uses so many threads; 0 leaves it to itself.

    It keeps the memory that it has freed, unless told not to. How much of that glibc would hand
    back and fetch anew, page by page, depends on the sizes of a step's tensors, and on chance.
    TensorFlow has an allocator of its own that keeps it, the others need glibc to: in one arena,
    as what threads have to themselves is handed back whatever glibc is told.
    """
    found = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    if keep_memory:
        found |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
        found["MALLOC_ARENA_MAX"] = "1"
        found["TF_CPU_ALLOCATOR_USE_BFC"] = "true"
    if threads:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
        names += ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
        found |= {name: str(threads) for name in names}
    if threads == 1:
        found["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    return found


def machine():
    """The processor's name, and how many cores there are."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def _resident_gib(pid):
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 2**20
    return 0.0


def _available_gib():
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) / 2**20
    return float("inf")


def rounds(python, method, network, batch_size, limits):
    """Times a method's kinds of steps, which take turns: a generator, with one step of each kind
    between two yields.

    Returns:
        What `measure` does.

    Raises:
        Failure: a kind cannot be measured.
    """
    workers, result = {}, {"steps": 0}
    try:
        for kind in method.kinds:
            workers[kind] = Worker(python, method, kind, network, batch_size, limits)
            try:
                result["versions"] = workers[kind].answer(limits.seconds)["versions"]
                warm = []
                while len(warm) < method.warmup:
                    if len(warm) >= 2 and _without_compiling(warm) > limits.seconds / 10:
                        break
                    warm.append(workers[kind].step(limits.seconds))
            except Failure as failure:
                raise Failure(f"{kind}: {failure}") from failure
        spent = {kind: [] for kind in workers}
        while result["steps"] < limits.steps:
            yield
            total = sum(_without_compiling(steps) for steps in spent.values())
            if total > limits.seconds / 8 and result["steps"] >= LEAST:
                break
            order = list(workers) if result["steps"] % 2 else list(workers)[::-1]
            for kind in order:
                spent[kind].append(workers[kind].step())
            result["steps"] += 1
    finally:
        for process in workers.values():
            process.close()
    for kind, steps in spent.items():
        cpu = [step["cpu_ms"] for step in steps]
        result[kind] = {
            "cpu_ms": round(statistics.median(cpu), 3),
            "mean_cpu_ms": round(statistics.mean(cpu), 3),
            "wall_ms": round(statistics.median(step["wall_ms"] for step in steps), 3),
            "mib": round(steps[-1]["mib"], 1),
        }
    return result


def measure(python, method, network, batch_size, limits):
    """Medians of a method's kinds of steps.

    Returns:
        `{kind: {"cpu_ms", "mean_cpu_ms", "wall_ms", "mib"}}`, with the number of steps and the
        versions.

    Raises:
        Failure: a kind cannot be measured.
    """
    running = rounds(python, method, network, batch_size, limits)
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value


def _without_compiling(steps):
    """Seconds of CPU, as if no step had compiled: those that do would crowd out the others."""
    return min((step["cpu_ms"] for step in steps), default=0.0) * len(steps) / 1000
