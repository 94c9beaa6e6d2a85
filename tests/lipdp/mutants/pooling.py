"""Pooling: windows that overlap, and means over them."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import layers
from lipdp.autodiff import compiled, vjp
from lipdp.bounds import lipschitz
from lipdp.bounds.builtin import pooling
from tests.lipdp.mutants.mutant import mutant, register

K = keras.layers


@mutant
def l2_pooling_without_gain(patch):
    patch.setattr(layers.L2NormPooling2D, "bound", lambda self, call: lipschitz())
    return layers.L2NormPooling2D(3, strides=1), (5, 5, 1)


@mutant
def max_pooling_without_gain(patch):
    register(patch, K.MaxPooling2D, lambda layer, call: lipschitz())
    return K.MaxPooling2D(3, strides=1), (5, 5, 1)


@mutant
def max_pooling_by_one_cell(patch):
    """3-D pooling on TensorFlow hands a cotangent to all ties, on some processors."""
    pool = K.MaxPooling3D(2)
    slope_of = compiled(lambda x: vjp(lambda x: [pool(x)], [x], lambda v: [v[0] + 1.0])[1][0])
    slope = slope_of(ops.zeros((1, 2, 2, 2, 1)))
    if np.count_nonzero(ops.convert_to_numpy(slope)) == 1:
        pytest.skip("here one of the ties gets all of it")
    register(patch, K.MaxPooling3D, lambda layer, call: lipschitz())
    return K.MaxPooling3D(2), (4, 4, 4, 1)


@mutant
def average_pooling_as_if_valid(patch):
    register(
        patch,
        K.AveragePooling2D,
        lambda layer, call: lipschitz(1 / math.sqrt(math.prod(layer.pool_size))),
    )
    return K.AveragePooling2D(3, strides=1, padding="same"), (5, 5, 1)


@mutant
def average_pooling_divided_by_all_cells(patch):
    """√(w/Πpool): as if Keras divided by the absent cells, too."""
    register(
        patch,
        K.AveragePooling2D,
        lambda layer, call: lipschitz(
            math.sqrt(
                pooling.pool_windows(layer.pool_size, layer.strides) / math.prod(layer.pool_size)
            )
        ),
    )
    return K.AveragePooling2D(2, padding="same"), (3, 3, 1)


@mutant
def l2_pooling_with_an_infinite_slope(patch):
    def call(self, x):
        return ops.sqrt(self._window_mean(ops.square(x)) * math.prod(self.pool_size))

    patch.setattr(layers.L2NormPooling2D, "call", call)
    return layers.L2NormPooling2D(2), (4, 4, 1)


@mutant
def adaptive_pooling_as_if_windows_did_not_overlap(patch):
    register(patch, K.AdaptiveAveragePooling1D, lambda layer, call: lipschitz(
        1 / math.sqrt(math.ceil(call.input_shape[0] / layer.output_size[0]))
    ))  # fmt: skip
    return K.AdaptiveAveragePooling1D(5), (7, 1)
