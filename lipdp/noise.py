"""The Gaussian mechanism on a list of gradients, and where its randomness comes from."""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from accountants import FixedEpochs
from accountants.sampling import Sampling
from lipdp._validation import check_number
from lipdp.discrete import discrete_gaussian
from lipdp.normal import add_noise, drawn_together

__all__ = [
    "ALLOCATIONS",
    "GaussianNoise",
    "RandomSource",
    "SecureNoise",
    "make_noise",
    "shares",
    "standard_deviations",
]


def standard_deviations(
    bounds: Sequence[Any],
    sizes: Sequence[int],
    noise_multiplier: float,
    allocation: str | Sequence[float],
) -> list[Any]:
    """Noise of each weight's gradient *sum*; divide by the expected batch size for its mean.

    Every weight alone would have the multiplier `σ_v = std_v/Δ_v`; together they are one Gaussian
    mechanism of multiplier `σ` with `1/σ² = Σ 1/σ_v²` (scale each weight by `1/std_v`: the noise
    becomes standard, the sensitivity `√Σ(Δ_v/std_v)²`). All allocations reach the same `σ`:

    - `"global"`: one std for all, `σ·√ΣΔ²`.
    - `"per_weight"`: equal multipliers, `σ·√D·Δ_v` for `D` weights.
    - `"least"`: the least total variance `Σ d_v·std_v²`, `σ·√Δ_v/d_v^¼·√(Σ_u Δ_u·√d_u)`
      (Lagrange: `d_v·std_v⁴` is proportional to `Δ_v²`).
    - numbers `a_v`, one a weight: its share of `1/σ²`, `std_v = σ·√(Σ_u a_u/a_v)·Δ_v`. Equal
      numbers are `"per_weight"`.

    Args:
        bounds: `Δ_v` of each weight, floats or scalar tensors.
        sizes: `d_v`, number of entries of each weight.
        noise_multiplier: `σ`.
        allocation: one of `ALLOCATIONS`, or positive numbers.

    Returns:
        A list of floats or scalar tensors.

    >>> stds = standard_deviations([3.0, 4.0], [10, 1000], 2.0, "global")
    >>> [round(s, 6) for s in stds]
    [10.0, 10.0]
    """
    if allocation == "global":
        std = _sqrt(sum(b * b for b in bounds)) * noise_multiplier
        return [std] * len(bounds)
    if allocation == "per_weight":
        allocation = [1.0] * len(bounds)
    if not isinstance(allocation, str):
        whole = sum(allocation)
        return [
            noise_multiplier * math.sqrt(whole / share) * b
            for b, share in zip(bounds, allocation, strict=True)
        ]
    total = _sqrt(sum(b * math.sqrt(d) for b, d in zip(bounds, sizes, strict=True)))
    return [
        noise_multiplier * _sqrt(b) / d**0.25 * total for b, d in zip(bounds, sizes, strict=True)
    ]


#: How the noise may be shared out over the weights, by name.
ALLOCATIONS = ("global", "per_weight", "least")


def shares(allocation: str | Mapping[str, float], variables: Sequence[Any]) -> str | list[float]:
    """An allocation as `standard_deviations` takes it.

    Args:
        allocation: a name, or a number for each variable's path.
        variables: the trainable ones.

    Raises:
        ValueError: an unknown name; a path too many or too few; a number that is not positive.
    """
    if isinstance(allocation, Mapping):
        paths = [v.path for v in variables]
        if set(allocation) != set(paths):
            raise ValueError(
                "`allocation` must give a number for each trainable weight, "
                f"{', '.join(map(repr, paths))}; got {', '.join(map(repr, allocation))}."
            )
        return [check_number(allocation[path], f"allocation[{path!r}]") for path in paths]
    if allocation not in ALLOCATIONS:
        raise ValueError(
            f"`allocation` must be one of {ALLOCATIONS}, or a dict of a number for each weight's "
            f"path; got {allocation!r}."
        )
    return allocation


def _sqrt(x):
    return math.sqrt(x) if isinstance(x, (int, float)) else ops.sqrt(x)


class GaussianNoise:
    """Independent Gaussian noise in every step, drawn where the gradients are: the default.

    Its floating-point numbers are only nearly Gaussian; see `SecureNoise`.

    Attributes:
        correlated: whether the noise of a step depends on that of others.
        whole_runs: whether it is scaled to the sensitivity of a whole run, not of a step.
        variables: Keras variables that the backend carries from step to step; never saved.
    """

    correlated = False
    whole_runs = False
    variables: Sequence[Any] = ()

    def plan(self, sampling: Sampling, num_examples: int, steps: int) -> tuple[float, ...]:
        """The constants of a run, which are compiled into its steps.

        Raises:
            ValueError: the noise is not for a run of so many steps.
        """
        return ()

    def begin(self, weights: Sequence[Any]) -> bool:
        """Forgets all noise, for a run that begins; returns whether `variables` are others now."""
        return False

    def multiplier(self, noise_multiplier: float, entries: int) -> float:
        """The multiplier of the stds that make a release of so many entries, with all that is done
        to them, the Gaussian mechanism of the given multiplier.
        """
        return noise_multiplier

    def draw(self, entries: int) -> np.ndarray | None:
        """What the batch of one step is to carry as its noise, for so many entries in all."""
        return None

    def add(self, backend: Any, features: dict, sums: list, stds: list) -> list:
        """The sums of one step with their noise.

        Args:
            backend: the backend's step module, of which `compiled` is needed.
            features: what the step's batch carries beside its inputs: `"key"`, and as `"noise"`
                what `draw` gave.
            sums, stds: of each weight, in the order of the trainable variables, and of the count
                of an adaptive clip. Stream `i` of the key belongs to sum `i` and what is drawn
                with it, streams from their number on to others.
        """

        def noisy(group, stream):
            totals = [sums[i] for i in group]
            scales = [ops.convert_to_tensor(stds[i], "float32") for i in group]
            return backend.compiled(add_noise)(totals, scales, features["key"], stream)

        return drawn_together(noisy, [tuple(total.shape) for total in sums])


class SecureNoise(GaussianNoise):
    """Discrete Gaussian noise on a grid, drawn by the host: `PrivateModel(noise="secure")`.

    Floating-point Gaussian noise leaves traces: which of the sums could have led to a result can
    be told from its last bits (Mironov, "On Significance of the Least Significant Bits for
    Differential Privacy", CCS 2012). Here each sum, in units `g` of its grid, is rounded to an
    integer `n`; the noise is an integer `z` with exactly the discrete Gaussian distribution of
    scale `s = 2²⁰` (`lipdp.discrete`), from the operating system's cryptographic generator; and
    `g·(n + z)` is released. `g ≥ std/s`, by less than 2⁻¹³ of it. No rounding but the one to `n` is
    in this; what happens to `n + z` afterwards (its reduction modulo 2³², the product with `g`, the
    optimizer) is post-processing.

    **Sensitivity.** Sums that differ by a vector `v` lead to integers that differ by at most
    `‖v‖/g + c·√d` in norm, over `d` entries: an entry is clamped, at 2²⁹ units (512 stds) or
    more, which moves no two values apart, and rounded, by at most ½ + 2⁻¹³ (`_on_grid`). So with
    stds of multiplier `σ'`, all weights together (`D` entries, each scaled by its own std) have
    the sensitivity `s·(1/σ' + c·√D/s)`, by Minkowski's inequality.

    **Accounting.** Up to a factor that no number can tell from 1, `n + z` is a post-processing of
    `x ~ N(n, s² − r²)` with `r = 8`: round `x` to the integer `k` with probability proportional
    to `exp(−(k − x)²/2r²)`. For `exp(−(x − n)²/2(s² − r²))·exp(−(k − x)²/2r²)` is
    `exp(−(k − n)²/2s²)` times a Gaussian density in `x` whose integral is the same for all `k`;
    and the sum over `k` that normalises the rounding is `r·√2π·(1 + 2·Σ_j cos(2πjx)·exp(−2π²r²j²))`
    by Poisson's formula: constant up to a factor `1 ± 10⁻⁵⁴⁷`. Even 10³⁰ entries over all steps
    multiply the probabilities of the whole training by `1 ± 10⁻⁵¹⁶`, and so ε and δ change by less
    than any float64 can show. Hence the Gaussian mechanism of multiplier `σ` is what is released,
    under sampling and adaptive composition too, if

        `1/σ' = √(1 − r²/s²)/σ − c·√D/s`.

    What that costs: at `σ = 1`, 0.12 % more noise for 1.6 million weights.

    Rounded sums are no sums of contributions any more, but what one example can change, given all
    others, is bounded as before, and the accountants use nothing else. The count of an adaptive
    clip is a release of one entry, with a `σ` and a grid of its own.

    **Not covered**: the float32 arithmetic before the rounding. That one example's gradient is
    within its bound holds up to float32's relative error; and the sum over all others rounds
    differently with it and without (Casacuberta et al., "Widespread Underestimation of Sensitivity
    in Differentially Private Libraries and How to Fix It", CCS 2022). For `B` rows that is about
    `√B·2⁻²⁴` of the sum's norm or less (6·10⁻⁶ of Δ was measured for 256 nearly parallel gradients
    of a convolutional network); a bound for the worst case would grow as `B²·2⁻²³·Δ`, and none is
    charged. Nor is anything said of the time that a step takes. Which examples are drawn is decided
    by NumPy's Philox generator, which is no cryptographic one, under a fresh key from the operating
    system for each draw; none of its output is released.

    >>> noise = SecureNoise()
    >>> round(noise.multiplier(1.0, 1_600_000), 6)
    1.001208
    >>> noise.draw(3).dtype
    dtype('int32')
    """

    #: `s`, in units of the grid.
    scale = 2**20
    _rounding = 1 + 2**-12  # c
    _smoothing = 8  # r

    def multiplier(self, noise_multiplier: float, entries: int) -> float:
        """`σ'` of the class' docstring.

        Raises:
            ValueError: without noise, or where the grid is too coarse for so much of it.
        """
        if noise_multiplier == 0:
            raise ValueError("noise='secure' needs a noise multiplier above 0; got 0.")
        accounted = math.sqrt(1 - (self._smoothing / self.scale) ** 2) / noise_multiplier
        left = accounted - self._rounding * math.sqrt(entries) / self.scale
        if not left > 0:
            most = accounted * noise_multiplier * self.scale / self._rounding / math.sqrt(entries)
            raise ValueError(
                f"noise='secure' reaches noise multipliers below {most:.4g} for {entries} entries, "
                f"beyond which rounding alone moves the sums too far; got {noise_multiplier:.4g}. "
                "Use noise='gaussian', a smaller network or smaller batches."
            )
        return 1 / left

    def draw(self, entries: int) -> np.ndarray:
        """int32 `(entries,)`: discrete Gaussians, modulo 2³²."""
        return discrete_gaussian(entries, self.scale).astype(np.int32)

    def add(self, backend: Any, features: dict, sums: list, stds: list) -> list:
        """As in `GaussianNoise`, with the noise that the batch carries."""
        noisy, start = [], 0
        for total, std in zip(sums, stds, strict=True):
            end = start + math.prod(total.shape)
            noise = ops.reshape(features["noise"][start:end], tuple(total.shape))
            std = ops.convert_to_tensor(std, "float32")
            noisy.append(backend.compiled(_on_grid)(total, noise, std))
            start = end
        return noisy


def _on_grid(total, noise, std):
    """`g·(n + noise)` for the smallest grids `g ≥ std/2²⁰` of 14 bits.

    `g = 2^(q+15)/k` for an integer `k` of at most 15 bits. In units of 2^q, float32 gives the sum
    exactly; `total/g` is that number times `k/2¹⁵`, in integers of 32 bits: with parts of 15 bits,
    `x = 2¹⁵·high + low + fraction/2¹⁵`. Each part that is cut moves the result by 2⁻¹⁵ at most,
    the rounding at the end by ½.
    """
    # Where nothing can move a sum, a noise of next to nothing does no harm. NaN stays.
    std = ops.where(std < 2.0**-80, 2.0**-80, std)
    bits = ops.bitwise_and(ops.view(std * 2.0**-20, "int32"), 0x7F800000)
    power, inverse = ops.view(bits, "float32"), ops.view((254 << 23) - bits, "float32")
    ratio = power / (std * 2.0**-20)  # in (½, 1]
    k = ops.cast(ops.floor(ratio * (2.0**15 * (1 - 2.0**-20))), "int32")

    x = ops.clip(total * inverse, -(2.0**30), 2.0**30)
    x = ops.where(ops.isnan(x), 0.0, x)
    whole = ops.floor(x)
    fraction = ops.cast((x - whole) * 2.0**15, "int32")
    whole = ops.cast(whole, "int32")
    high, low = ops.right_shift(whole, 15), ops.bitwise_and(whole, 2**15 - 1)
    low = low * k + ops.right_shift(fraction * k, 15)
    n = high * k + ops.right_shift(low + 2**14, 15)
    grid = power / ops.cast(k, "float32") * 2.0**15
    grid = ops.where(ops.isfinite(std), grid, math.nan)
    return ops.cast(n + noise, "float32") * grid


def make_noise(noise: Any, sampling: Sampling) -> GaussianNoise:
    """The noise of a model, as `PrivateModel(noise=)` names it.

    Raises:
        ValueError: `noise` is no name and no noise, or cannot hide what batches drawn by `sampling`
            may hold of one example.

    >>> from accountants import FullBatch
    >>> type(make_noise("secure", FullBatch())).__name__
    'SecureNoise'
    """
    named = {"gaussian": GaussianNoise, "secure": SecureNoise}
    if isinstance(noise, str) and noise in named:
        made = named[noise]()
    elif hasattr(noise, "stream"):
        made = noise.stream(sampling)
    else:
        raise ValueError(
            f"`noise` must be one of {', '.join(map(repr, named))}, lipdp.BandedNoise(...) or "
            f"lipdp.ToeplitzNoise(...); got {noise!r}."
        )
    if isinstance(sampling, FixedEpochs) and not made.whole_runs:
        raise ValueError(
            f"{sampling!r} accounts for a whole run at once and needs noise=lipdp.ToeplitzNoise(); "
            f"with noise={noise!r} take lipdp.ShuffledEpochs(batch_size={sampling.batch_size})."
        )
    return made


class RandomSource:
    """Keys for the noise of each step and generators for its draw.

    Without a seed each request reads fresh operating-system entropy, so nothing can repeat,
    whatever is copied, restarted or restored. With a seed (for tests: who knows it can subtract
    the noise) a request is a function of the seed and its position, and positions never recur
    within a model or a ledger.

    Args:
        seed: None, or a non-negative integer.

    Raises:
        ValueError: anything else.

    >>> RandomSource(7).key(0).tolist() == RandomSource(7).key(0).tolist()
    True
    >>> RandomSource(None).key(0).tolist() == RandomSource(None).key(0).tolist()
    False
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise ValueError(f"`seed` must be None or a non-negative integer; got {seed!r}.")
        self.seed = seed

    def _sequence(self, *position):
        if self.seed is None:
            return np.random.SeedSequence(secrets.randbits(256))
        return np.random.SeedSequence(self.seed, spawn_key=position)

    def key(self, *position: int) -> np.ndarray:
        """128 bits, as uint32 of shape (4,), for the noise of one step."""
        if self.seed is None:
            return np.frombuffer(secrets.token_bytes(16), dtype=np.uint32)
        return self._sequence(0, *position).generate_state(4, np.uint32)

    def generator(self, *position: int) -> np.random.Generator:
        """NumPy generator for a draw of examples."""
        return np.random.Generator(np.random.Philox(self._sequence(1, *position)))
