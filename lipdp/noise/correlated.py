"""Noise that is correlated over steps: what one step adds, later ones partly take back.

What a network becomes is, roughly, a sum of all its noisy updates. Independent noise adds up in
it; noise w = C⁻¹z, with z standard normal and C lower triangular with a heavy first column, much
less. It is as private as releasing Cx + z, where an example moves Cx by its columns of C: the
price of the correlation is the norm of these columns. (Kairouz et al. 2021; Denisov et al. 2022;
matrix factorisation and DP-FTRL are other names.)

C is Toeplitz here, given by a series 1 + c₁x + c₂x² + ... with no coefficient below 0, so that
w_t = z_t - Σ_k c_k w_{t-k} is computed as training goes. Which steps an example may take part in
decides what C costs. The sampling scheme says it, the loader draws so, and `accountants` has the
proofs: `CyclicPoisson` for `BandedNoise`, `FixedEpochs` for `ToeplitzNoise`.

A step scales its noise by standard deviations of its own, set by weights that are public: divide
what weight v releases in step t by `std_v,t`, and an example contributes no more than 1/σ in norm
to what is left, whatever the allocation.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from accountants.sampling import Sampling
from lipdp.noise.gaussian import GaussianNoise
from lipdp.noise.gaussian_rng import draw_grouped, standard_normals

__all__ = ["BandedNoise", "CorrelatedNoise", "ToeplitzNoise", "mean_error"]

# Above what rounds in float64 where a sensitivity is computed.
_MARGIN = 1 + 1e-6


class CorrelatedNoise(abc.ABC):
    """A kind of correlated noise, as a value without state: `BandedNoise` or `ToeplitzNoise`."""

    @abc.abstractmethod
    def stream(self, sampling: Sampling) -> GaussianNoise:
        """The noise of one model.

        Raises:
            ValueError: an example may take part in steps in which this noise does not hide it.
        """

    @abc.abstractmethod
    def coefficients(self, sampling: Sampling, num_examples: int, steps: int) -> np.ndarray:
        """The first column of C for a run, scaled to a sensitivity of 1: `(steps,)`."""


@dataclasses.dataclass(frozen=True)
class BandedNoise(CorrelatedNoise):
    """Noise correlated over fewer than `bands` steps, amplified by `CyclicPoisson` sampling.

    Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization". More bands correlate
    more and amplify less; 1 is independent noise. The coefficients are those of least mean squared
    error of the sums of all updates up to each step, `mean_error`, found numerically for the
    length of the run. Takes `bands - 1` times the memory of the weights.

    >>> from accountants import CyclicPoisson
    >>> column = BandedNoise(bands=4).coefficients(CyclicPoisson(32, bands=4), 1000, steps=100)
    >>> [round(float(c), 2) for c in column[:5]], float(round(np.sum(column**2), 4))
    ([0.68, 0.48, 0.41, 0.36, 0.0], 1.0)

    Args:
        bands: a positive integer, at most those of the scheme; by default the scheme's.

    Raises:
        ValueError: `bands` is neither None nor a positive integer.
    """

    bands: int | None = None

    def __post_init__(self) -> None:
        if self.bands is not None:
            _check_positive("bands", self.bands)

    def stream(self, sampling: Sampling) -> "_Stream":
        if sampling.noise_bands is None:
            raise ValueError(
                "BandedNoise needs lipdp.CyclicPoisson(batch_size, bands), which keeps the steps "
                f"of one example apart; got `sampling` {sampling!r}."
            )
        if self.bands is not None and self.bands > sampling.noise_bands:
            raise ValueError(
                f"BandedNoise(bands={self.bands}) needs a scheme of at least as many bands; got "
                f"`sampling` {sampling!r}."
            )
        return _BandedStream(self)

    def coefficients(self, sampling: Sampling, num_examples: int, steps: int) -> np.ndarray:
        scale, *tail = self.constants(sampling, steps)
        column = np.zeros(max(steps, len(tail) + 1))
        column[: len(tail) + 1] = (1.0, *tail)
        return column[:steps] / scale

    def constants(self, sampling: Sampling, steps: int) -> tuple[float, ...]:
        """The norm of the column, and c₁, ..., c_{bands-1}."""
        tail = _banded(self.bands or sampling.noise_bands, max(steps, 1))
        return math.sqrt(1.0 + sum(c * c for c in tail)) * _MARGIN, *tail


@dataclasses.dataclass(frozen=True)
class ToeplitzNoise(CorrelatedNoise):
    """Noise correlated over the whole run, for `FixedEpochs`: the run is one Gaussian mechanism.

    A buffered linear Toeplitz matrix (McMahan, Xu and Zhang 2024): c_k = Σ_j ω_j λ_j^(k-1) with a
    handful of ω_j > 0 and 0 < λ_j < 1, whatever the number of steps. They are those of least
    `mean_error`, found numerically for the scheme's whole run, in which an example may take part
    once an epoch. Nothing is amplified, which suits large epsilons and many epochs. Takes
    `buffers` times the memory of the weights.

    >>> from accountants import FixedEpochs
    >>> noise = ToeplitzNoise(buffers=2)
    >>> column = noise.coefficients(FixedEpochs(100, epochs=2), 1000, steps=20)
    >>> both = column + np.append(np.zeros(10), column[:10])  # of an example of the first step
    >>> bool(0.9999 < np.linalg.norm(both) <= 1)
    True

    Args:
        buffers: a positive integer; beyond 4 little is gained.

    Raises:
        ValueError: `buffers` is no positive integer.
    """

    buffers: int = 3

    def __post_init__(self) -> None:
        _check_positive("buffers", self.buffers)

    def stream(self, sampling: Sampling) -> "_Stream":
        if not sampling.whole_run:
            raise ValueError(
                "ToeplitzNoise needs lipdp.FixedEpochs(batch_size, epochs), which keeps the steps "
                f"of one example an epoch apart; got `sampling` {sampling!r}."
            )
        return _ToeplitzStream(self)

    def coefficients(self, sampling: Sampling, num_examples: int, steps: int) -> np.ndarray:
        scale, *rest = self.constants(sampling, num_examples)
        scales, decays = np.split(np.array(rest), 2)
        return _toeplitz_column(scales, decays, steps) / scale

    def constants(self, sampling: Sampling, num_examples: int) -> tuple[float, ...]:
        """The sensitivity of the whole run, the ω_j, and the λ_j."""
        length = sampling.steps_per_epoch(num_examples)
        scales, decays = _toeplitz(self.buffers, sampling.epochs, length)
        column = _toeplitz_column(np.array(scales), np.array(decays), sampling.epochs * length)
        return _sensitivity(column, length) * _MARGIN, *scales, *decays


def mean_error(coefficients: np.ndarray) -> float:
    """Mean over the steps of the variance of the sum of the noise so far, for C of this column.

    The sum is A z with A = (1 1 ... 1) C⁻¹, Toeplitz too; its column B gives Σ_k (1 - k/n) B_k².
    Independent noise, of column (1, 0, ...), has (n + 1) / 2.

    >>> mean_error(np.array([1.0, 0.0, 0.0]))
    2.0
    """
    from scipy import signal

    steps = len(coefficients)
    summed = np.cumsum(signal.lfilter([1.0], coefficients, _impulse(steps)))
    return float(np.sum(_weights(steps) * summed**2))


# --- the noise of one model -----------------------------------------------------------------------


class _Stream(GaussianNoise):
    """Correlated noise, with its memory on the device.

    The memory is in Keras variables, so that both backends carry it from step to step. It is
    never saved (who knows it can subtract noise) and begins each run at zero, so no noise is used
    twice, whatever is restored.
    """

    correlated = True

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.variables = []
        self._constants = (1.0,)

    def begin(self, weights: Sequence[Any]) -> bool:
        rows = self._rows()
        shapes = [(rows, *w.shape) for w in weights] if rows else []
        renewed = [tuple(v.shape) for v in self.variables] != shapes
        if renewed:
            self.variables = [
                keras.Variable(
                    np.zeros(shape, "float32"), trainable=False, dtype="float32", name="noise"
                )
                for shape in shapes
            ]
        for variable in self.variables:
            variable.assign(ops.zeros(variable.shape, "float32"))
        return renewed

    def add(self, backend: Any, features: dict, sums: list, stds: list) -> list:
        shapes = [tuple(total.shape) for total in sums]

        def normals(group, stream):
            draw = backend.compiled(standard_normals)
            return draw(features["key"], stream, tuple(shapes[i] for i in group))

        noise = draw_grouped(normals, shapes)
        if self.variables:
            pairs = zip(noise, self.variables, strict=True)
            noise = [self._correlated(fresh, memory) for fresh, memory in pairs]
        return [total + std * z for total, std, z in zip(sums, stds, noise, strict=True)]

    def multiplier(self, noise_multiplier: float, entries: int) -> float:
        """The noise multiplier times the planned run's sensitivity, for contributions of norm 1."""
        return noise_multiplier * self._constants[0]

    @abc.abstractmethod
    def _rows(self) -> int:
        """The number of copies of a weight that are remembered."""

    @abc.abstractmethod
    def _correlated(self, fresh, memory):
        """The next row of C⁻¹z from that of z; moves the memory on."""


class _BandedStream(_Stream):
    """Remembers the last rows, newest first."""

    def plan(self, sampling: Sampling, num_examples: int, steps: int) -> tuple[float, ...]:
        self._constants = self.kind.constants(sampling, steps)
        return self._constants

    def _rows(self):
        return len(self._constants) - 1

    def _correlated(self, fresh, memory):
        past = memory.value
        tail = ops.convert_to_tensor(np.array(self._constants[1:], "float32"))
        noise = fresh - ops.tensordot(tail, past, axes=1)
        memory.assign(ops.concatenate([noise[None], past[:-1]], axis=0))
        return noise


class _ToeplitzStream(_Stream):
    """Remembers s_j = Σ_k λ_j^(k-1) w_{t-k}."""

    whole_runs = True

    def plan(self, sampling: Sampling, num_examples: int, steps: int) -> tuple[float, ...]:
        most = sampling.epochs * sampling.steps_per_epoch(num_examples)
        if steps > most:
            raise ValueError(
                f"{sampling!r} is for runs of up to {most} steps of {num_examples} examples, whose "
                f"noise is planned as a whole; {steps} were asked for. Give the scheme more epochs."
            )
        self._constants = self.kind.constants(sampling, num_examples)
        return self._constants

    def _rows(self):
        return (len(self._constants) - 1) // 2

    def _correlated(self, fresh, memory):
        past = memory.value
        scales, decays = np.split(np.array(self._constants[1:], "float32"), 2)
        noise = fresh - ops.tensordot(ops.convert_to_tensor(scales), past, axes=1)
        decays = ops.reshape(decays, (-1,) + (1,) * len(fresh.shape))
        memory.assign(decays * past + noise[None])
        return noise


# --- strategies -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _banded(bands: int, steps: int) -> tuple[float, ...]:
    """c₁, ..., c_{bands-1} of least mean error times squared norm; as float32 has them.

    With B the series of 1 / ((1-x) C) and E = Σ_k v_k B_k², the derivative of B by c_j is -x^j B/C.
    """
    from scipy import optimize, signal

    bands = min(bands, steps)
    if bands == 1:
        return ()
    weights, impulse = _weights(steps), _impulse(steps)

    def objective(tail):
        column = np.append(1.0, tail)
        summed = np.cumsum(signal.lfilter([1.0], column, impulse))
        slope = signal.lfilter([1.0], column, summed)
        weighted = weights * summed
        error, square = float(weighted @ summed), float(column @ column)
        lags = np.array([weighted[j:] @ slope[: steps - j] for j in range(1, bands)])
        return math.log(error * square), 2 * tail / square - 2 * lags / error

    # The coefficients of (1-x)^(-1/2), which are the best of all for a single participation.
    start = np.cumprod(1 - 0.5 / np.arange(1, bands))
    found = optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=[(0.0, 1.0)] * (bands - 1)
    )
    return tuple(float(c) for c in np.maximum(found.x, 0.0).astype("float32"))


@functools.lru_cache(maxsize=64)
def _toeplitz(
    buffers: int, epochs: int, length: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ω and λ of least mean error times squared sensitivity; as float32 has them."""
    from scipy import optimize

    steps = epochs * length
    weights = _weights(steps)

    def parameters(free):
        scales, decays = np.split(free, 2)
        powers = np.exp(scales - max(scales.max(), 0.0))
        # Together below 1: then C⁻¹ does not grow.
        scales = powers / (powers.sum() + math.exp(-max(scales.max(), 0.0)))
        return scales, 1 / (1 + np.exp(-decays))

    def objective(free):
        scales, decays = parameters(free)
        error = np.sum(weights * _summed(scales, decays, steps) ** 2)
        return math.log(error) + 2 * math.log(
            _sensitivity(_toeplitz_column(scales, decays, steps), length)
        )

    # Time constants from one step to the whole run.
    times = np.geomspace(1.0, max(steps, 2), buffers + 1)[1:]
    shares = times**-0.5 / np.sum(times**-0.5)
    start = np.concatenate([np.log(shares), np.log(np.expm1(1 / times) ** -1)])
    limits = [(-15.0, 5.0)] * buffers + [(-5.0, 13.0)] * buffers
    found = optimize.minimize(objective, start, method="L-BFGS-B", bounds=limits)
    scales, decays = (p.astype("float32") for p in parameters(found.x))
    return tuple(map(float, scales)), tuple(map(float, decays))


def _toeplitz_column(scales: np.ndarray, decays: np.ndarray, steps: int) -> np.ndarray:
    """1, and c_k = Σ_j ω_j λ_j^(k-1)."""
    return np.append(1.0, scales @ _powers(decays, steps - 1))[:steps]


def _summed(scales: np.ndarray, decays: np.ndarray, steps: int) -> np.ndarray:
    """The series of 1 / ((1-x) C).

    w_t = z_t - √ω·s, s ← (diag λ - √ω √ωᵀ) s + √ω z: a symmetric matrix, whose eigenvalues are
    the decays of C⁻¹.
    """
    roots = np.sqrt(scales)
    values, vectors = np.linalg.eigh(np.diag(decays) - np.outer(roots, roots))
    inverse = (vectors.T @ roots) ** 2 @ _powers(values, steps - 1)
    return 1.0 - np.append(0.0, np.cumsum(inverse))[:steps]


def _powers(bases: np.ndarray, steps: int) -> np.ndarray:
    """`(bases, steps)`: the powers 0, 1, ..., steps - 1."""
    table = np.repeat(bases[:, None], steps, axis=1)
    table[:, :1] = 1.0
    return np.cumprod(table, axis=1)


def _sensitivity(column: np.ndarray, length: int) -> float:
    """Norm of the sum of the columns 0, length, 2·length, ... of the Toeplitz matrix.

    Those of any other first step are the same moved down, with less of them left.
    """
    epochs = -(-len(column) // length)
    padded = np.append(column, np.zeros(epochs * length - len(column)))
    summed = np.cumsum(padded.reshape(epochs, length), axis=0).ravel()[: len(column)]
    return float(np.linalg.norm(summed))


def _weights(steps: int) -> np.ndarray:
    return 1.0 - np.arange(steps) / steps


def _impulse(steps: int) -> np.ndarray:
    return np.append(1.0, np.zeros(steps - 1))


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
