"""Fixtures of all tests. The backend of a run is chosen by KERAS_BACKEND."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# One thread for each process: the problems are small, and pytest-xdist runs several.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
# Tests compile the same small programs over and over, in every process of the run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".pytest_cache/jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# What LLVM saves at run time it costs many times over in compiling such programs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import gc  # noqa: E402

import hypothesis  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# What was imported stays: the collector need not look through it again and again.
gc.freeze()
gc.set_threshold(20_000, 20, 50)

# The same examples in every run, however long each takes, unless asked for others:
# --hypothesis-profile=default
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state and from fresh names of layers."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


if keras.backend.backend() == "jax":
    import jax

    from lipdp.bounds import projections

    @pytest.fixture(autouse=True)
    def _optimizations(request, monkeypatch):
        """XLA's, where a test asks for the rounding that users get."""
        wanted = request.node.get_closest_marker("optimized") is not None
        if wanted:
            jax.config.update("jax_disable_most_optimizations", False)
            monkeypatch.setattr(projections, "_programs", {})
        yield
        if wanted:
            jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pytest_addoption(parser):
    parser.addoption(
        "--slow-part",
        type=int,
        default=1,
        metavar="N",
        help="run one slow test in N (default: all)",
    )
    parser.addoption(
        "--slow-offset",
        type=int,
        default=0,
        metavar="K",
        help="which of the N parts; K and K + N are the same (default: the first)",
    )


def pytest_collection_modifyitems(config, items):
    """What no backend changes is tested once: on JAX, which compiles each small program, slow. Of
    the slow tests a part may do.
    """
    if keras.backend.backend() != "tensorflow":
        for item in items:
            if item.get_closest_marker("any_backend"):
                item.add_marker(pytest.mark.slow)
    part, offset = config.getoption("--slow-part"), config.getoption("--slow-offset")
    slow = [item for item in items if item.get_closest_marker("slow")]
    left_out = [item for i, item in enumerate(slow) if (i - offset) % part]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
