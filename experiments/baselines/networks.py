"""Networks of the baselines in Keras, with the fastest layers there are: ReLU, maximum pooling."""

from experiments.baselines.worker import SHAPES

__all__ = ["layers_of"]


def layers_of(network: str, keras) -> tuple:
    """The input and the logits of a baseline, with Keras 2 or 3.

    Raises:
        KeyError: there is no such network.
    """
    K = keras.layers
    x = inputs = keras.Input(SHAPES[network])

    def conv(filters, x):
        return K.Conv2D(filters, 3, padding="same", activation="relu")(x)

    if network == "convnet":
        for filters in (16, 32):
            x = K.MaxPooling2D(2)(conv(filters, x))
        x = K.Dense(1024, activation="relu")(K.Flatten()(x))
    elif network == "vgg5":
        for filters in (32, 64, 128):
            x = K.MaxPooling2D(2)(conv(filters, x))
        x = K.Dense(256, activation="relu")(K.Flatten()(x))
    elif network == "mlp":
        x = K.Flatten()(x)
        for _ in range(3):
            x = K.Dense(1024, activation="relu")(x)
    elif network == "mixer":
        x = K.Reshape((64, 64))(K.Conv2D(64, 4, strides=4)(x))
        for _ in range(2):
            tokens = K.Dense(64, activation="relu")(K.Permute((2, 1))(x))
            x = K.Add()([x, K.Permute((2, 1))(tokens)])
            x = K.Add()([x, K.Dense(64)(K.Dense(64, activation="relu")(x))])
        x = K.Flatten()(x)
    return inputs, K.Dense(10)(x)
