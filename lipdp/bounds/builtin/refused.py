"""Layers that cannot be private, and what to use instead."""

from keras import layers
from keras.src import ops as keras_ops

from lipdp.bounds.rule import UnknownLayerError, register

_MIXES = "it mixes the examples of a batch, so one example moves the gradient of all others"


def _refused(remedy, reason):
    def rule(layer, call):
        raise UnknownLayerError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be private: {reason}. {remedy}"
        )

    return rule


register(layers.Lambda)(
    _refused(
        "Use a layer with a rule, or register one for a class of your own.",
        "nothing is known of what a Lambda computes",
    )
)
register(layers.UnitNormalization)(
    _refused("Use lipdp.layers.BallProjection.", "its slope at zero is unbounded")
)
register(layers.GaussianDropout)(_refused("Use keras.layers.Dropout.", "its factor is unbounded"))
register(layers.Embedding)(
    _refused(
        "Use lipdp.layers.Embedding.",
        "a token out of range ends the step on one backend and makes it NaN on another",
    )
)
register(layers.SimpleRNN, layers.LSTM, layers.GRU)(
    _refused(
        "Use lipdp.layers.LipschitzRNN.",
        "nothing bounds its recurrent weights, whose powers reach the gradients",
    )
)
register(layers.MultiHeadAttention, layers.GroupQueryAttention)(
    _refused(
        "Use lipdp.layers.LipschitzAttention.",
        "attention on rows of any norm has no Lipschitz constant",
    )
)
register(layers.MixUp, layers.CutMix)(_refused("Augment examples one by one.", _MIXES))


@register(
    layers.RandomBrightness,
    layers.RandomContrast,
    layers.RandomCrop,
    layers.RandomFlip,
    layers.RandomRotation,
    layers.RandomTranslation,
    layers.RandomZoom,
)
def _augmentation(layer, call):
    kind = type(layer).__name__
    raise UnknownLayerError(
        f"Layer {layer.name!r} ({kind}) has no certified bound within a network. Take it out, and "
        "write PrivateModel(network, augmentation=lipdp.Augmentation("
        f"keras.layers.{kind}(...)), ...)."
    )


register(layers.ActivityRegularization)(
    _refused(
        "Leave it out.",
        "its gradient passes by the clip of the loss gradient, so no bound covers it",
    )
)
register(
    layers.CategoryEncoding,
    layers.Discretization,
    layers.HashedCrossing,
    layers.Hashing,
    layers.IntegerLookup,
    layers.StringLookup,
    layers.TextVectorization,
)(
    _refused(
        "Apply it to the data set, and give the network what comes out.",
        "it makes categories, of which no norm tells anything",
    )
)
register(keras_ops.nn.HardShrink, keras_ops.nn.Threshold)(
    _refused("Use soft_shrink or relu.", "it jumps")
)
register(keras_ops.numpy.Sqrt, keras_ops.math.Rsqrt, keras_ops.linalg.Norm)(
    _refused("Use lipdp.layers.L2NormPooling2D or BallProjection.", "its slope at zero is infinite")
)
