"""A search for a violation of the bounds.

A bound is worth what it survives. `attack_bounds` looks for an example, weights inside their
projection sets and a cotangent of norm `G` whose gradient is larger than `lipdp.bounds` claims:
first over structured candidates, which is where rules of networks break (constants, single
frequencies, single pixels, alternating signs, zeros where entries tie, extreme scales, NaN), then
by ascent from the best of them. The value that is raised is `½‖q‖²` for one quantity `q`, its
slope a vector-Jacobian product of a vector-Jacobian product. For a linear layer a whole step
along that slope is one round of alternating power iteration, which ends at singular vectors.
"""

import contextlib
import dataclasses
import functools
import math

import keras
import numpy as np
from keras import ops

from lipdp.autodiff import compiled, fused, vjp
from lipdp.bounds import network_bounds

# Lengths of a step of the ascent, in radii of the ball; a whole power step is tried first.
_STEPS = (math.inf, 0.5, 0.1)
# How many times too large frozen weights are.
_OUTSIDE = 3.0


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """The largest norms that a search attained.

    Attributes:
        ratio: the largest (norm attained) / (norm claimed); above 1 the bound is broken.
        quantity: what attains it: a variable's path, `"output"`, `"input"` (the cotangent of the
            input, `"input_1"`, ... for further ones), `"frozen weights"` (output or cotangent,
            with weights that nobody trains, outside of their sets) or `"other examples"`.
        attained: the largest ratio found for each quantity.
        inputs: the example that attains `ratio`, one array for each input, without batch axis.
        weights: the kind of weights that attains it.
    """

    ratio: float
    quantity: str
    attained: dict[str, float]
    inputs: tuple[np.ndarray, ...]
    weights: str


def attack_bounds(
    target,
    input_shape=None,
    *,
    input_bound: float | None = None,
    loss_gradient_bound: float = 1.0,
    training: bool = False,
    steps: int = 4,
    seed: int = 0,
    until: float = math.inf,
) -> AttackResult:
    """Searches for a violation of the bounds of a network or a layer.

    Tried are all weights of `_weight_settings`, on each of them all examples of
    `_input_candidates`, and for each quantity an ascent over example and cotangent. The batch
    holds a second example with a zero cotangent: a cotangent that reaches it tells that examples
    are mixed, which counts as an infinite ratio. Integer inputs are tokens: all equal, all
    different, few, random, out of range. At last the weights are frozen and three times too large,
    as a checkpoint may be that was trained elsewhere. The weights are as before afterwards.

    Args:
        target: a built Sequential or functional network with one output, or a layer.
        input_shape: of a layer: the shape of its input, without batch; a list of shapes for
            several inputs.
        input_bound: norm of each input, at most. By default 1 for a layer; for a network
            infinity, that is, its own `BallProjection` bounds it.
        loss_gradient_bound: norm `G` of the cotangent of the output, at most.
        training: how the network is called.
        steps: steps of each ascent; with 0 only candidates are tried.
        seed: of everything random; the same seed gives the same result.
        until: the search ends as soon as it finds a ratio above this.

    Returns:
        An `AttackResult`. Bounds are those of exact arithmetic: expect `ratio` up to `1 + 1e-5`.

    Raises:
        ValueError: `input_shape` is missing or superfluous, or a bound is infinite.
        UnknownLayerError: a layer has no rule.

    >>> layer = keras.layers.Dense(3, use_bias=False)
    >>> result = attack_bounds(layer, input_shape=(4,))
    >>> 0.999 < result.ratio <= 1.00001
    True
    """
    if isinstance(target, keras.Model):
        if input_shape is not None:
            raise ValueError("`input_shape` is for layers; a network has its own.")
        network, default = target, math.inf
    else:
        network, default = _network_of(target, input_shape), 1.0
    search = _Search(
        network,
        default if input_bound is None else input_bound,
        loss_gradient_bound,
        training,
        np.random.default_rng(seed),
        until,
    )
    initial = [ops.convert_to_numpy(v) for v in network.trainable_variables]
    try:
        for name, values in _weight_settings(network, initial, search.random):
            search.use_weights(name, values)
            search.attack(steps)
        if network.trainable_variables:
            if steps:
                search.ascend_weights()
                search.attack(steps)
            search.random = np.random.default_rng(seed)  # whatever the initial weights were
            settings = dict(_weight_settings(network, initial, search.random))
            outside = [_OUTSIDE * value for value in settings["aligned"]]
            search.use_weights("frozen", outside, frozen=True)
            search.attack(steps)
    except _Found:
        pass
    finally:
        for variable, value in zip(network.trainable_variables, initial, strict=True):
            variable.assign(value)
    return search.result()


def _network_of(layer, input_shape):
    if input_shape is None:
        raise ValueError(f"`input_shape` is needed to attack layer {layer.name!r}.")
    several = isinstance(input_shape, list)
    dtype = "int32" if isinstance(layer, keras.layers.Embedding) else None
    inputs = [keras.Input(s, dtype=dtype) for s in (input_shape if several else [input_shape])]
    return keras.Model(inputs, layer(inputs if several else inputs[0]))


# --- candidates -----------------------------------------------------------------------------


def _patterns(shape, random):
    """Arrays of a shape in which a rule may be attained, of norm one (or zero)."""
    index = np.indices(shape) if shape else np.zeros((1,))
    wave = np.cos(2 * np.pi * sum(i / n for i, n in zip(index, shape, strict=False)))
    corner, centre, channel = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    corner[(0,) * len(shape)] = 1.0
    centre[tuple(n // 2 for n in shape)] = 1.0
    channel[..., -1] = -1.0
    arrays = {
        "constant": np.ones(shape),
        "negative": -np.ones(shape),
        "corner": corner,
        "centre": centre,
        "channel": channel,
        "alternating": (-1.0) ** index.sum(axis=0) if shape else np.ones(shape),
        "wave": np.broadcast_to(wave, shape),
        "random": random.standard_normal(shape),
        "positive": np.abs(random.standard_normal(shape)),
    }
    return {name: _scaled(a, 1.0) for name, a in arrays.items()}


def _tokens(shape, random):
    """Integers under the names of `_patterns`: all equal, all different, few, out of range."""
    order = np.arange(math.prod(shape)).reshape(shape)
    return {
        "constant": np.ones(shape),
        "negative": -np.ones(shape),
        "corner": (order == 0) * 1.0,
        "centre": np.full(shape, 1e9),
        "channel": np.where(order % 2, 1.0, 1e9),
        "alternating": order % 2,
        "wave": order,
        "random": random.integers(0, 1 + order.size, shape),
        "positive": np.minimum(order, 1 + order % 3),
    }


def _input_candidates(shapes, integers, radius, random):
    """One example's inputs. Without a radius also all that a ball projection must stand."""
    patterns = [
        (_tokens if i else _patterns)(s, random) for s, i in zip(shapes, integers, strict=True)
    ]
    scales = (radius, radius / 30) if math.isfinite(radius) else (1.0, 1e-20, 1e20)
    yield [np.zeros(shape) for shape in shapes]
    for name in patterns[0]:
        for scale in scales:
            pairs = zip(patterns, integers, strict=True)
            yield [p[name] if integer else p[name] * scale for p, integer in pairs]
    if not math.isfinite(radius):
        for broken in (np.nan, np.inf, -np.inf, 3e38):
            yield [np.full(shape, broken) for shape in shapes]
            yield [np.where(np.indices(s).sum(0) % 2, broken, 1.0) if s else broken for s in shapes]


def _weight_settings(network, initial, random):
    """`(name, values)`: extreme points of the sets of the weights, and some inner ones."""
    variables = network.trainable_variables
    yield "initial", initial
    if not variables:
        return

    def setting(make):
        """Kernels by `make`, projected if there is a set; else of a norm of about one."""
        values = []
        for variable in variables:
            value = make(variable.shape) if len(variable.shape) > 1 else np.ones(variable.shape)
            outside = 3.0 * value if variable.constraint is not None else _scaled(value, 1.0)
            values.append(_project(variable, outside))
        return values

    def aligned(shape):
        matrix = random.standard_normal((math.prod(shape[:-1]), shape[-1]))
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        return (left @ right).reshape(shape)

    def rank_one(shape):
        left, right = map(random.standard_normal, (shape[:-1], shape[-1]))
        return np.multiply.outer(left, right)

    yield "aligned", setting(aligned)
    yield "rank one", setting(rank_one)
    yield "constant", setting(np.ones)
    yield "alternating", setting(lambda shape: (-1.0) ** np.indices(shape).sum(axis=0))
    yield "random", setting(random.standard_normal)


def _project(variable, value):
    value = ops.convert_to_tensor(value, dtype=variable.dtype)
    if variable.constraint is not None:
        value = variable.constraint(value)
    return ops.convert_to_numpy(value)


def _norm(array):
    """Norm in float64; NaN counts as infinite."""
    norm = float(np.linalg.norm(np.asarray(array, dtype=np.float64)))
    return math.inf if math.isnan(norm) else norm


def _scaled(array, norm):
    size = _norm(array)
    return array * (norm / size) if 0 < size < math.inf else array


@contextlib.contextmanager
def _trainable(variables, trainable):
    before = [variable.trainable for variable in variables]
    try:
        for variable in variables:
            variable.trainable = trainable
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.trainable = value


# --- search ---------------------------------------------------------------------------------


class _Found(Exception):
    """A ratio beyond which nothing is searched for."""


class _Search:
    """Keeps the best of everything tried; knows how to evaluate and to ascend."""

    def __init__(self, network, radius, cotangent, training, random, until):
        self.network, self.radius, self.cotangent = network, radius, cotangent
        self.random, self.until = random, until
        self.variables = network.trainable_variables
        self.shapes = [tuple(t.shape[1:]) for t in network.inputs]
        self.integers = ["int" in t.dtype for t in network.inputs]
        self.output_shape = tuple(network.outputs[0].shape[1:])
        further = [f"input_{i}" for i in range(1, len(self.shapes))]
        self.names = ["output", "input", *further, *(v.path for v in self.variables)]
        self.best = dict.fromkeys([*self.names, "other examples"], 0.0)
        self.frozen = False
        self.where = {}  # inputs and weights that attain each of them
        self._quantities = self._of_example(training)
        self._evaluate = compiled(self._slopes)
        compile_bounds = fused if self.variables else lambda function: function
        self._known = {}
        self._measure = {
            frozen: compile_bounds(functools.partial(self._measured, frozen))
            for frozen in (False, True)
        }

    def _of_example(self, training):
        """The function `(*weights, *inputs, g) -> [output, *input cotangents, *gradients]`."""
        network, weights = self.network, len(self.variables)
        state = [ops.convert_to_tensor(v) for v in network.non_trainable_variables]

        def quantities(*arguments):
            *arguments, g = arguments

            def forward(*arguments):
                trainable, inputs = list(arguments[:weights]), list(arguments[weights:])
                inputs = inputs if len(inputs) > 1 else inputs[0]
                output, _ = network.stateless_call(trainable, state, inputs, training=training)
                return [output]

            (output,), cotangents = vjp(forward, arguments, lambda _: [g])
            return [output[:1], *cotangents[weights:], *cotangents[:weights]]

        return quantities

    def _slopes(self, coefficients, arguments):
        """The quantities `q` and the slopes of `Σ c_q·½‖q‖²` with respect to the arguments."""

        def cotangents_of(values):
            return [coefficients[i] * value for i, value in enumerate(values)]

        return vjp(self._quantities, arguments, cotangents_of)

    def _flat(self, coefficients, arguments):
        return self._quantities(*arguments), [ops.zeros_like(a) for a in arguments]

    def _measured(self, frozen, values):
        """Bounds for which weights had to be measured, by number; `_known` has all others."""
        mapping = zip(self.variables, values, strict=True)
        with keras.StatelessScope(state_mapping=mapping), _trainable(self.variables, not frozen):
            found = network_bounds(self.network, self.cotangent, self.radius)
        # Of what is frozen no gradient is taken.
        weights = [] if frozen else self.variables
        gradients = [found.gradients.get(v.path, math.inf) for v in weights]
        self._known[frozen] = [found.output, *found.input_cotangents, *gradients]
        return {i: b for i, b in enumerate(self._known[frozen]) if ops.is_tensor(b)}

    def use_weights(self, name, values, frozen=False):
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)
        self.weights, self.values = name, [ops.convert_to_tensor(v) for v in self.variables]
        self.frozen = frozen
        measured = self._measure[frozen](self.values)
        self.bounds = [float(measured.get(i, b)) for i, b in enumerate(self._known[frozen])]
        if not all(map(math.isfinite, self.bounds)):
            unbounded = [n for n, b in zip(self.names, self.bounds, strict=False) if b == math.inf]
            raise ValueError(
                f"There is nothing to attack, since {unbounded} have no finite bound. Give "
                "`input_bound`, or put lipdp.layers.BallProjection after the input."
            )
        self.here = {}

    def evaluate(self, inputs, g, quantity=None):
        """Ratios of one example, kept where they are the best; and slopes of one quantity."""
        coefficients = np.array([i == quantity for i in range(len(self.names))], "float32")
        with np.errstate(over="ignore"):  # an infinite entry is as good a candidate
            rows = [np.stack([x, self.random.standard_normal(x.shape)]) for x in inputs]
            rows = [x.astype("float32") for x in (*rows, np.stack([g, np.zeros(g.shape)]))]
        coefficients, *rows_as_tensors = map(ops.convert_to_tensor, [coefficients, *rows])
        try:
            values, slopes = self._evaluate(coefficients, [*self.values, *rows_as_tensors])
        except LookupError:  # TensorFlow knows no second derivative of some operation
            self._evaluate = compiled(self._flat)
            return self.evaluate(inputs, g, quantity)
        values = [ops.convert_to_numpy(v) for v in values]
        last = 1 + len(self.shapes)
        others = max(_norm(v[1:]) for v in values[1:last])
        values[1:last] = [v[0] for v in values[1:last]]
        ratios = [
            _norm(v) / bound if bound else (math.inf if _norm(v) else 0.0)
            for v, bound in zip(values, self.bounds, strict=not self.frozen)
        ]
        named = dict(zip(self.names, ratios, strict=not self.frozen))
        for name, ratio in named.items():
            if name not in self.here or ratio > self.here[name][0]:
                self.here[name] = (ratio, inputs, g)
        if self.frozen:
            named = {"frozen weights": max(ratios)}
        named["other examples"] = math.inf if others else 0.0
        for name, ratio in named.items():
            if name not in self.where or ratio > self.best[name]:
                self.best[name] = ratio
                self.where[name] = (tuple(rows[i][0] for i in range(len(inputs))), self.weights)
                if ratio > self.until:
                    raise _Found
        return ratios, [ops.convert_to_numpy(s) for s in slopes]

    def attack(self, steps):
        """All candidates on the present weights, then the ascent of each quantity."""
        patterns = _patterns(self.output_shape, self.random)
        cotangents = [patterns[n] * self.cotangent for n in ("random", "constant")]
        for inputs in _input_candidates(self.shapes, self.integers, self.radius, self.random):
            for g in cotangents:
                self.evaluate(inputs, g)
        for quantity in range(len(self.bounds)) if steps else ():
            self.ascend(quantity, steps)

    def ascend(self, quantity, steps):
        ratio, inputs, g = self.here[self.names[quantity]]
        _, slopes = self.evaluate(inputs, g, quantity)
        weights = len(self.variables)
        for _ in range(steps):
            for step in _STEPS:
                pairs = zip(inputs, slopes[weights:-1], strict=True)
                trial = [self._moved(x, slope[0], self.radius, step) for x, slope in pairs]
                trial_g = self._moved(g, slopes[-1][0], self.cotangent, step)
                ratios, trial_slopes = self.evaluate(trial, trial_g, quantity)
                if ratios[quantity] > ratio:
                    ratio, inputs, g, slopes = ratios[quantity], trial, trial_g, trial_slopes
                    break
            else:
                return

    @staticmethod
    def _moved(point, slope, radius, step):
        """A step along the slope, back to the ball; where it is infinite the norm is kept."""
        if not 0 < _norm(slope) < math.inf or _norm(point) == math.inf:
            return point
        size = radius if math.isfinite(radius) else _norm(point)
        if math.isinf(step):
            return _scaled(slope.astype("float64"), size)
        moved = point + _scaled(slope.astype("float64"), step * size)
        return _scaled(moved, min(size, _norm(moved)))

    def ascend_weights(self):
        """Moves all weights along the slopes of their worst quantity, inside their sets."""
        for quantity, name in enumerate(self.names):
            _, inputs, g = self.here[name]
            _, slopes = self.evaluate(inputs, g, quantity)
            values = []
            for variable, value, slope in zip(self.variables, self.values, slopes, strict=False):
                value = ops.convert_to_numpy(value)
                step = _scaled(np.nan_to_num(slope), 0.5 * _norm(value))
                values.append(_project(variable, value + step))
            self.use_weights("ascended", values)
            self.here = {name: (0.0, inputs, g) for name in self.names}

    def result(self):
        quantity = max(self.best, key=self.best.get)
        inputs, weights = self.where[quantity]
        return AttackResult(self.best[quantity], quantity, dict(self.best), inputs, weights)
