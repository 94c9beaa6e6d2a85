"""Many devices: the weights of one, each example in one part, noise once, one ledger."""

import errno
import functools
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest

import lipdp
from accountants import Ledger
from lipdp import layers
from lipdp.data.batches import DrawnBatches
from lipdp.data.sources import Arrays
from lipdp.devices import SINGLE_DEVICE, Devices, broadcast_from_chief, digest, require_same_run
from lipdp.randomness import RandomSource, SharedSource
from lipdp.training import steps
from lipdp.training.plan import run_fingerprint
from tests.lipdp.helpers import Rounded, data, dense_network, private, weights
from tests.lipdp.training.devices import train

TENSORFLOW = keras.backend.backend() == "tensorflow"
# Three devices of one process, and two processes of one device each.
ONE_PROCESS, PROCESSES = ("mirrored", "workers") if TENSORFLOW else ("parallel", "processes")
ROOT = pathlib.Path(__file__).parents[3]
only_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="of TensorFlow")
only_jax = pytest.mark.skipif(TENSORFLOW, reason="of JAX")

# Steps go through Keras' own loops, in processes that have to start first.
FAST = ["tiny", "secure noise"]
SLOW = [
    "poisson",
    "loop",
    "conv",
    "adaptive",
    "per layer",
    "per layer, whole",
    "outputs",
    "shuffled",
    "stream",
    "augmented",
    "clipnorm",
    "ema",
    "validated",
]
SLOW += ["banded", "toeplitz", *([] if TENSORFLOW else ["together", "plain", "accumulated"])]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("localhost", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def started(kind, folder, *cases, **environment):
    """The processes of a kind; what they say goes into the folder."""
    ports = free_ports(2)
    added = {"KERAS_BACKEND": keras.backend.backend(), "COORDINATOR": f"localhost:{ports[0]}"}
    if kind in ("parallel", "sharded"):
        flags, count = os.environ.get("XLA_FLAGS", ""), 3 if kind == "parallel" else 4
        added["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
    processes = []
    for i in range(2 if kind == PROCESSES else 1):
        if kind == "workers":
            cluster = {"worker": [f"localhost:{port}" for port in ports]}
            task = {"type": "worker", "index": i}
            added["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
        with open(folder / f"{kind}-{i}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "tests.lipdp.training.devices",
                        kind,
                        str(folder),
                        *cases,
                    ],
                    cwd=ROOT,
                    env=os.environ | added | {"PROCESS": str(i)} | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def ended(processes, timeout=900):
    """Return codes of the processes, none of which is left running."""
    end = time.monotonic() + timeout
    try:
        return [p.wait(max(1.0, end - time.monotonic())) for p in processes]
    finally:
        for p in processes:
            p.kill()


def outcome(kind, folder, *cases, **environment):
    """What the cases came to on devices of a kind: weights and logs of each process."""
    codes = ended(started(kind, folder, *cases, **environment))
    said = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
    assert not any(codes), said[-4000:]
    found = {}
    for name in cases:
        found[name] = []
        for i in range(len(codes)):
            with np.load(folder / f"{name}-{i}.npz") as arrays:
                logs = json.loads((folder / f"{name}-{i}.json").read_text())
                found[name].append(([arrays[key] for key in arrays], logs))
    return found


def gap(name, found, logs_too=True):
    """How far the weights of all processes are from those of one device at most."""
    model, logs = train(name)
    for _, told in found:
        assert told["steps"] == model.spent(1e-5).steps
        for key in logs if logs_too else ():
            assert told[key] == pytest.approx(logs[key], abs=1e-4), key
    one = weights(model)
    return max(np.abs(a - b).max() for arrays, _ in found for a, b in zip(arrays, one, strict=True))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return outcome(ONE_PROCESS, tmp_path_factory.mktemp("devices"), *FAST)


def test_devices_of_one_process_come_to_the_weights_of_one(one_process):
    """Many a batch has fewer rows than there are devices, or none."""
    assert one_process["tiny"][0][1]["replicas"] == 3
    assert gap("tiny", one_process["tiny"]) < 1e-5


def test_secure_noise_is_added_once(one_process):
    """To 1,536 entries, which tell their std to 2 %: noise of three devices would be 1.7 of it."""
    _, logs = train("noise")
    assert one_process["secure noise"][0][1]["std"] == pytest.approx(logs["std"], rel=0.1)


@pytest.mark.slow
def test_whatever_a_step_holds(tmp_path):
    found = outcome(ONE_PROCESS, tmp_path, *SLOW)
    for name in SLOW:
        assert gap(name, found[name]) < 1e-5, name


@pytest.mark.slow
def test_processes_come_to_the_weights_of_one_device(tmp_path):
    cases = [
        "poisson",
        "tiny",
        "straggler",
        "loop",
        "adaptive",
        "banded",
        "unseeded",
        "secure noise",
    ]
    found = outcome(PROCESSES, tmp_path, *cases)
    for name in cases:
        (first, logs), (second, _) = found[name]
        assert logs["replicas"] == 2
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)
        if name == "secure noise":
            assert logs["std"] == pytest.approx(train("noise")[1]["std"], rel=0.1)
        elif name == "unseeded":
            assert gap("poisson", found[name], logs_too=False) > 1e-3
        else:
            assert gap(name, found[name]) < 1e-5, name


@pytest.mark.slow
@only_jax
def test_weights_that_are_cut_up_come_to_those_of_one_device(tmp_path):
    """Model parallel: two devices for the rows times two for the columns of each kernel."""
    cases = ["wide", "wide secure noise"]
    found = outcome("sharded", tmp_path, *cases)
    assert found["wide"][0][1]["replicas"] == 2
    assert gap("wide", found["wide"]) < 1e-5
    std = found["wide secure noise"][0][1]["std"]
    assert std == pytest.approx(train("noise")[1]["std"], rel=0.1)


@pytest.mark.slow
@only_tensorflow
@pytest.mark.parametrize("mutant", ["own noise", "every update", "noise of parts", "same rows"])
def test_mutants_come_to_other_weights(mutant, tmp_path):
    found = outcome(ONE_PROCESS, tmp_path, "poisson", MUTANT=mutant)
    assert gap("poisson", found["poisson"], logs_too=False) > 1e-2


# --- which rows are whose -------------------------------------------------------------------------


def parts_of(sampling, replicas, processes, examples=23, steps=6):
    """Drawn batches, and those of each process, of the same draws."""
    x = 1.0 + np.arange(examples, dtype="float32")

    def drawn(own):
        return DrawnBatches(
            Arrays(x, x), sampling, RandomSource(3), (0, 0), steps, replicas, x, devices=own
        )

    of_all = drawn(SINGLE_DEVICE)
    of_each = [drawn(Devices(replicas, p, processes)) for p in range(processes)]
    for index in range(steps):
        yield of_all.draw(index), [each.draw(index) for each in of_each]


@pytest.mark.parametrize("replicas, processes", [(3, 1), (2, 2), (8, 2), (6, 3)])
@pytest.mark.parametrize(
    "sampling",
    [
        lipdp.PoissonSampling(8),
        lipdp.PoissonSampling(0.5),
        lipdp.ShuffledEpochs(5),
        lipdp.FullBatch(),
    ],
    ids=repr,
)
@pytest.mark.any_backend
def test_each_example_of_a_batch_is_in_one_part(sampling, replicas, processes):
    for whole, shares in parts_of(sampling, replicas, processes):
        parts = [p for share in shares for p in share.parts(replicas // processes)]
        assert len(parts) == replicas and len({len(p.mask) for p in parts}) == 1
        for name in ("inputs", "targets", "mask", "weights"):
            joined = np.concatenate([getattr(p, name) for p in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert all((p.key == whole.key).all() for p in parts)


@pytest.mark.any_backend
def test_noise_of_the_host_is_in_the_first_part_alone():
    ((_, shares), *_) = parts_of(lipdp.FullBatch(), 4, 2, steps=1)
    for share in shares:
        share.noise = np.array([3, -5], np.int32)
    parts = [p for i, share in enumerate(shares) for p in share.parts(2, first=i == 0)]
    assert [p.noise.tolist() for p in parts] == [[3, -5], [0, 0], [0, 0], [0, 0]]


# --- what processes agree on ----------------------------------------------------------------------


def together(function, processes=2):
    """`function(gather, devices)` of each process, which here is a thread; what it returned or
    raised.
    """
    barrier = threading.Barrier(processes, timeout=300)
    told, results = {}, [None] * processes

    def process(p):
        count = itertools.count()

        def gather(array):
            turn = next(count)
            told[turn, p] = array
            barrier.wait()
            return np.stack([told[turn, other] for other in range(processes)])

        try:
            results[p] = function(gather, Devices(processes, p, processes, distributed=True))
        except ValueError as error:
            results[p] = error

    threads = [threading.Thread(target=process, args=(p,)) for p in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.any_backend
def test_processes_share_the_chiefs_secret_which_is_fresh():
    def key(gather, own):
        return tuple(require_same_run(gather, own, {"steps": 3}).key(0, 1).tolist())

    first, second = together(key), together(key)
    assert first[0] == first[1] and second[0] == second[1] and first[0] != second[0]


@pytest.mark.any_backend
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_differ_are_all_refused(processes):
    def facts(gather, own):
        return require_same_run(gather, own, {"steps": 3, "data": own.process == 1, "weights": 0})

    for error in together(facts, processes):
        assert isinstance(error, ValueError)
        assert f"{processes} processes of this run differ in data:" in str(error)


def facts(order=1, weigh=False, rate=0.5, seed=3, network=None, steps=4, **kwargs):
    keras.utils.set_random_seed(1)
    model = private(network, seed=seed, optimizer=keras.optimizers.SGD(rate), **kwargs)
    x, y = (array[::order] for array in data())
    run = model.spending.plan(model.sampling, len(y), steps, steps)
    weights = np.ones(64) if weigh else None
    return run_fingerprint(model, model.step, Arrays(x, y), weights, None, run, (0, 0))


@pytest.mark.any_backend
def test_what_a_process_could_do_otherwise_is_told():
    alike = facts()
    for name, kwargs in {
        "data": {"order": -1},
        "sample weights": {"weigh": True},
        "steps": {"steps": 5},
        "mechanism": {"seed": 4},
        "settings": {"clip": 0.5},
        "optimizer": {"rate": 0.25},
        "weights": {"network": dense_network(hidden=10)},
    }.items():
        other = facts(**kwargs)
        assert [key for key in alike if alike[key] != other[key]] == [name]
    assert facts(sampling=lipdp.FixedSize(16))["mechanism"] != alike["mechanism"]
    assert facts(allocation="least")["settings"] != alike["settings"]
    assert facts() == alike


@pytest.mark.any_backend
def test_the_chief_has_the_word():
    said = together(lambda gather, own: broadcast_from_chief(gather, own, [f"é{own.process}", 1.5]))
    assert said == [["é0", 1.5]] * 2
    assert together(lambda gather, own: broadcast_from_chief(gather, own, [])) == [[], []]


@pytest.mark.any_backend
def test_shared_randomness_never_recurs():
    source = SharedSource(bytes(range(32)))
    places = [*itertools.product(range(3), repeat=3), (0, 0), (1,), (11,), (1, 1)]
    keys = {source.key(*place).tobytes() for place in places}
    draws = {source.generator(*place).integers(2**62) for place in places}
    assert len(keys) == len(draws) == len(places)
    assert digest(np.zeros(2)) != digest(np.zeros(2, "float32"))


# --- what is refused ------------------------------------------------------------------------------


def refused(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == 0


def built(**compile):
    return private(run_eagerly=False, compile=compile)


@only_tensorflow
def test_strategies_that_are_refused():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        refused(lambda: built(jit_compile=True), "`jit_compile` must be False under Mirrored")
        refused(lambda: built(steps_per_execution=2), "`steps_per_execution` must be 1 under")
        for argument in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
            optimizer = keras.optimizers.SGD(0.1, use_ema="ema" in argument, **{argument: 2})
            refused(
                lambda optimizer=optimizer: private(optimizer=optimizer),
                f"`optimizer` must have no {argument} under",
            )
    model = built()
    with strategy.scope(), pytest.raises(ValueError, match="made outside of the scope"):
        model.fit(*data(), verbose=0)
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        refused(built, "trains under tf.distribute.MirroredStrategy.*got OneDeviceStrategy")


@only_jax
def test_a_distribution_that_is_set_too_late():
    model = built()
    with keras.distribution.DataParallel(devices=["cpu:0"]).scope():
        model.fit(*data(), verbose=0)  # the one device there is
    assert model.devices.replicas == 1

    class Other(keras.distribution.DataParallel.__base__):
        pass

    mesh = keras.distribution.DeviceMesh((1,), ("batch",), ["cpu:0"])
    with Other(mesh).scope(), pytest.raises(ValueError, match="DataParallel.*got Other"):
        model.fit(*data(), verbose=0)


# --- precision ------------------------------------------------------------------------------------

LOW = ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64"]


@pytest.fixture
def policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def dense(*policies):
    """A network whose layers have policies."""
    network = keras.Sequential([keras.Input((6,))])
    network.add(layers.BallProjection(1.0, dtype=policies[0]))
    # No initializer of bfloat16 is orthogonal.
    network.add(layers.SpectralDense(3, kernel_initializer="ones", dtype=policies[1]))
    network.add(layers.GroupSort(3, dtype=policies[2]))
    return network


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("index", range(3))
def test_a_layer_of_another_precision_is_refused(dtype, index):
    policies = ["float32"] * 3
    policies[index] = dtype
    private(dense("float32", "float32", "float32"))
    with pytest.raises(ValueError, match="computes in .*float.*dtype='float32'"):
        private(dense(*policies))


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", LOW)
def test_a_network_of_another_precision_is_refused(dtype, policy, tmp_path):
    policy(dtype)
    network = dense(None, None, None)
    with pytest.raises(ValueError, match="computes in .*float.*dtype='float32'"):
        private(network)
    network.save(tmp_path / "network.keras")
    policy("float32")
    with pytest.raises(ValueError, match="computes in"):
        private(keras.models.load_model(tmp_path / "network.keras"))


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", LOW)
def test_a_policy_that_is_set_later_is_refused(dtype):
    model = private()
    model.network.layers[1].dtype_policy = dtype
    with pytest.raises(RuntimeError, match="`dtype_policy` of the layers"):
        model.fit(*data(), verbose=0)
    model.compile("sgd", "sparse_categorical_crossentropy")
    refused(lambda: model, "computes in .*float.*dtype='float32'")


def test_weights_of_another_precision_are_refused():
    network = keras.Sequential(
        [
            keras.Input((6,)),
            layers.BallProjection(1.0),
            layers.FrobeniusDense(3, kernel_initializer="ones", dtype=Rounded("float32")),
        ]
    )
    assert network.trainable_variables[0].dtype == "float16"
    with pytest.raises(ValueError, match="updates weights in float32; .*has dtype float16"):
        private(network)


def test_the_policy_of_the_day_changes_nothing_of_a_float32_network(policy):
    """Keras would scale the loss under mixed_float16: the noise would be divided by its scale."""
    results = []
    for name in ("float32", "mixed_float16"):
        keras.utils.set_random_seed(0)
        network = dense_network()
        policy(name)
        model = private(network, seed=3, clip=lipdp.AdaptiveClip(0.5))
        assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.fit(*data(), verbose=0)
        results.append([*weights(model), np.array(model.current_clip())])
        policy("float32")
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, loss_scale_factor=8.0),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    ],
)
def test_losses_are_not_scaled(optimizer):
    with pytest.raises(ValueError, match="`optimizer` must not scale losses"):
        private(optimizer=optimizer)


@only_tensorflow
def test_products_of_rounded_factors_are_refused_on_tensorflow(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"])
    refused(private, "enable_tensor_float_32_execution.False.")
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        steps.backend().check_precision(private())
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(True)


@only_jax
def test_products_of_rounded_factors_are_refused_on_jax(monkeypatch):
    import jax

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    refused(private, "in less than float32 on a TPU.*got None")
    with jax.default_matmul_precision("float32"):
        steps.backend().check_precision(private())


# --- compiled, and several steps at a time --------------------------------------------------------


@functools.cache
def several(together, jit_compile):
    """Weights and logs of eight steps that run so many at a time."""
    keras.utils.set_random_seed(1)
    compile = {"jit_compile": jit_compile, "steps_per_execution": together}
    clip = lipdp.AdaptiveClip(0.5)
    model = private(seed=4, clip=clip, run_eagerly=False, compile=compile)
    history = model.fit(*data(), epochs=2, verbose=0).history
    assert model.spent(1e-5).steps == 8
    return weights(model), history["epsilon"]


@pytest.mark.parametrize(
    "together, jit_compile",
    [
        (2, False),
        pytest.param(4, False, marks=pytest.mark.slow),
        (1, True),
        pytest.param(4, True, marks=pytest.mark.slow),
    ],
)
def test_steps_however_they_run_come_to_the_same_weights(together, jit_compile):
    (a, epsilon), (b, same) = several(1, False), several(together, jit_compile)
    assert epsilon == same
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_noise_that_is_compiled_has_the_same_std():
    assert train("compiled noise")[1]["std"] == pytest.approx(train("noise")[1]["std"], rel=0.1)


class Broken:
    """Records, one of which cannot be read once some were."""

    def __init__(self, reads):
        self.x, self.y = data()
        self.left = reads

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, "the disk is gone")
        return self.x[i], self.y[i]


@pytest.mark.parametrize("jit_compile", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_crash_among_steps_that_run_together_overstates_at_most(jit_compile, tmp_path):
    """64 records, four steps an epoch in pairs: the fourth step of all finds no data."""
    model = private(
        sampling=lipdp.ShuffledEpochs(16),
        ledger=tmp_path / "ledger",
        run_eagerly=False,
        compile={"jit_compile": jit_compile, "steps_per_execution": 2},
    )
    before = weights(model)
    with pytest.raises(Exception, match="disk is gone"):
        model.fit(Broken(2 + 16 * 7), epochs=4, verbose=0)
    assert any((a != b).any() for a, b in zip(before, weights(model), strict=True))
    taken = int(model.optimizer.iterations)
    assert taken <= Ledger(tmp_path / "ledger").steps <= taken + 2
    assert Ledger(tmp_path / "ledger").steps == model.spent(1e-5).steps


def test_a_budget_that_is_no_multiple_of_the_steps_that_run_together():
    budget = lipdp.Budget(3.0, 1e-5)
    model = private(
        noise_multiplier=2.0,
        budget=budget,
        run_eagerly=False,
        compile={"steps_per_execution": 4},
    )
    with pytest.warns(UserWarning, match="The budget allows"):
        model.fit(*data(), epochs=100, verbose=0)
    spent = model.spent()
    assert spent.steps % 4 == 0 and spent.epsilon <= 3.0
    alone = private(noise_multiplier=2.0, budget=budget)
    with pytest.warns(UserWarning, match="The budget allows"):
        alone.fit(*data(), epochs=100, verbose=0)
    assert spent.steps < alone.spent().steps < spent.steps + 4


# --- a process that dies --------------------------------------------------------------------------


def wait_for(path, size, processes, timeout=900):
    end = time.monotonic() + timeout
    while not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < end, path
        assert all(p.poll() is None for p in processes), "a process ended by itself"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_and_another_goes_on(victim, tmp_path):
    processes = started(PROCESSES, tmp_path, "long")
    try:
        wait_for(tmp_path / "released-0", 30, processes)
        processes[victim].send_signal(signal.SIGKILL)
    except BaseException:
        ended(processes, timeout=0)
        raise
    codes = ended(processes, timeout=600)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
    ledger = Ledger(tmp_path / "ledger")
    released = max((tmp_path / f"released-{i}").stat().st_size for i in range(2))
    assert released <= ledger.steps <= released + 64
    assert not (tmp_path / "nowhere").exists()

    before = ledger.steps
    found = outcome(PROCESSES, tmp_path, "resumed")["resumed"]
    assert ledger.steps == before + 8
    assert [told["steps"] for _, told in found] == [before + 8] * 2
