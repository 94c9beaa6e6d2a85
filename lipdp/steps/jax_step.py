"""The private step on JAX."""

import jax
import keras

from lipdp import steps
from lipdp.steps.private_step import private_step


def pull_back(network, x):
    """Outputs of the network in training mode, and `cotangent -> gradients of its weights`."""
    state = [v.value for v in network.non_trainable_variables]

    def forward(values):
        return network.stateless_call(values, state, x, training=True)

    values = [v.value for v in network.trainable_variables]
    outputs, pull, state = jax.vjp(forward, values, has_aux=True)
    for variable, value in zip(network.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return outputs, lambda cotangent: pull(cotangent)[0]


def accumulate(part, arrays, size):
    """`part` of `size` rows at a time: sums are added up, what has a row an example is joined."""
    sums, rows = None, []
    for start in range(0, len(arrays[-1]), size):
        added, joined = part(*jax.tree.map(lambda a, i=start: a[i : i + size], arrays))
        sums = added if sums is None else [a + b for a, b in zip(sums, added, strict=True)]
        rows.append(joined)
    return sums, tuple(jax.numpy.concatenate(r) for r in zip(*rows, strict=True))


def compiled(function):
    """The function itself: the whole step is compiled."""
    return function


def train_step(model, state, data):
    """Keras' `train_step` on JAX: the same step with the variables' values passed through."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    mapping = [
        pair
        for group, values in zip(groups, state, strict=True)
        for pair in zip(group, values, strict=True)
    ]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        logs = private_step(model, data, steps.backend())
    return logs, tuple([scope.get_current_value(v) for v in group] for group in groups)


def default_jit_compile():
    return True
