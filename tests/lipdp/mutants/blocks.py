"""Layers of lipdp whose weights are bounded by a map or a projection of their own."""

import keras
from keras import ops

from lipdp import layers
from lipdp.bounds import lipschitz, norms, projections, rule
from lipdp.bounds.rule import Rule
from lipdp.layers.projected import Projected
from tests.lipdp.mutants.mutant import mutant

K = keras.layers


@mutant
def projection_that_does_nothing(patch):
    patch.setattr("lipdp.bounds.projections.SpectralBall.project", lambda self, w: w)
    return layers.SpectralDense(3), (4,)


@mutant
def initial_weights_outside_of_their_sets(patch):
    patch.setattr(Projected, "build", lambda self, shape: super(Projected, self).build(shape))
    return layers.SpectralDense(3, kernel_initializer="ones"), (4,)


@mutant
def frozen_weights_believed_to_be_inside(patch):
    patch.setattr(rule, "held_by", lambda variable: variable.constraint)
    return layers.SpectralDense(3, use_bias=False), (4,)


@mutant
def frozen_block_believed_to_be_inside(patch):
    patch.setattr(rule, "held_by", lambda variable: variable.constraint)
    return layers.ConvexPotential(use_bias=False), (3,)


@mutant
def gain_of_a_frozen_layer_believed(patch):
    patch.setattr(layers.ChannelGain, "bound", lambda self, call: lipschitz(
        self.gain, gradients=lambda x, g: [(self.gamma, x * g)]
    ))  # fmt: skip
    return layers.ChannelGain(2.0), (3, 2)


@mutant
def sandwich_by_the_norm_instead_of_its_square(patch):
    def bound(self, call):
        s = rule.matrix_norm(self.kernel)
        return lipschitz(s, gradients=lambda x, g: [(self.kernel, 4.0 * x * g)])

    patch.setattr(layers.SandwichDense, "bound", bound)
    return layers.SandwichDense(3, use_bias=False), (3,)


@mutant
def gain_taken_for_one(patch):
    patch.setattr(layers.ChannelGain, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.gamma, x * g)]
    ))  # fmt: skip
    return layers.ChannelGain(2.0), (3, 2)


@mutant
def residual_conv_projected_without_the_identity(patch):
    ball = projections.ResidualConvBall
    patch.setattr(ball, "bound", staticmethod(projections.ConvBall.bound))
    patch.setattr(ball, "project", projections.ConvBall.project)
    return layers.ResidualConv2D(1, 3, use_bias=False), (4, 4, 1)


@mutant
def sandwich_gradient_without_its_root(patch):
    def bound(self, call):
        return lipschitz(gradients=lambda x, g: [(self.kernel, 2.0 * x * g)])

    patch.setattr(layers.SandwichDense, "bound", bound)
    return layers.SandwichDense(3, 6, use_bias=False), (4,)


@mutant
def convex_potential_that_counts_one_use(patch):
    patch.setattr(layers.ConvexPotential, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.kernel, 2.0 * x * g)]
    ))  # fmt: skip
    return layers.ConvexPotential(use_bias=False), (3,)


@mutant
def convex_potential_bias_without_its_factor(patch):
    right = layers.ConvexPotential.bound

    def bound(self, call):
        rule = right(self, call)
        halved = lambda xs, g: [  # noqa: E731
            (v, b / 2 if v is self.bias else b) for v, b in rule.gradients(xs, g)
        ]
        return Rule(rule.forward, rule.backward, halved)

    patch.setattr(layers.ConvexPotential, "bound", bound)
    return layers.ConvexPotential(), (2, 3)


@mutant
def convex_potential_conv_without_multiplicity(patch):
    patch.setattr(norms, "conv_multiplicity", lambda *a, **k: 1)
    options = dict(certificate="fft", use_bias=False)
    return layers.ConvexPotentialConv2D(2, 1, **options), (5, 5, 1)


@mutant
def reflector_that_counts_one_use(patch):
    patch.setattr(layers.BlockReflector, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.kernel, 2.0 * x * g)]
    ))  # fmt: skip
    return layers.BlockReflector(2), (4,)


@mutant
def cayley_without_its_jacobian(patch):
    patch.setattr(layers.CayleyDense, "_SLOPE", 0.5**0.5)
    return layers.CayleyDense(3, use_bias=False), (3,)


@mutant
def cayley_without_the_factor_of_the_skew_part(patch):
    patch.setattr(layers.CayleyDense, "_SLOPE", 2.0**0.5)
    return layers.CayleyDense(3, use_bias=False), (3,)


@mutant
def exponential_without_the_factor_of_the_skew_part(patch):
    patch.setattr(layers.ExponentialDense, "_SLOPE", 0.5**0.5)
    return layers.ExponentialDense(3, use_bias=False), (3,)


@mutant
def almost_orthogonal_by_the_norms_of_channels(patch):
    def scales(kernel):
        axis = -1 if kernel.shape[-1] <= kernel.shape[-2] else -2
        others = tuple(a for a in range(len(kernel.shape)) if a != len(kernel.shape) + axis)
        return 1.0 / ops.sqrt(ops.sum(ops.square(kernel), axis=others)), axis

    patch.setattr(norms, "almost_orthogonal_scales", scales)
    return layers.AlmostOrthogonalDense(3, use_bias=False), (4,)


@mutant
def almost_orthogonal_conv_without_shifts(patch):
    """The channels' correlations at shift zero alone."""
    right = norms.almost_orthogonal_scales

    def scales(kernel):
        flat, axis = right(ops.reshape(kernel, (-1, kernel.shape[-1])))
        return flat, axis

    patch.setattr(norms, "almost_orthogonal_scales", scales)
    return layers.AlmostOrthogonalConv2D(1, 3, padding="same", use_bias=False), (5, 5, 1)
