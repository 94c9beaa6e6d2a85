"""Steps of TensorFlow Privacy with Keras 2: `vectorized`, its optimizer; `dpmodel`, its model;
`fast`, its model with norms of gradients that come without the gradients; and `plain` ones.
"""

import functools
import importlib.metadata

import tensorflow as tf
import tensorflow_privacy
from tensorflow_privacy.privacy.fast_gradient_clipping import layer_registry
from tensorflow_privacy.privacy.keras_models.dp_keras_model import make_dp_model_class
from tensorflow_privacy.privacy.optimizers import dp_optimizer_keras_vectorized

from experiments.baselines import networks, worker


def build(method, name, batch_size):
    ends = networks.layers_of(name, tf.keras)
    optimizer = tf.keras.optimizers.legacy.SGD(0.05, momentum=0.9)
    reduction = "auto"
    if method in ("dpmodel", "fast"):
        registry = layer_registry.make_default_layer_registry() if method == "fast" else None
        private = make_dp_model_class(tf.keras.Model)
        network = private(
            l2_norm_clip=1.0, noise_multiplier=1.0, layer_registry=registry, inputs=ends[0],
            outputs=ends[1],
        )  # fmt: skip
    else:
        network = tf.keras.Model(*ends)
    if method == "vectorized":
        optimizer = dp_optimizer_keras_vectorized.VectorizedDPKerasSGDOptimizer(
            1.0, 1.0, num_microbatches=batch_size, learning_rate=0.05, momentum=0.9
        )
        reduction = "none"
    elif method == "dpmodel":
        reduction = "none"
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    network.compile(optimizer, loss=loss, metrics=["accuracy"])
    x, y = worker.examples(name, batch_size)
    fit = functools.partial(network.fit, x, y, batch_size=batch_size, epochs=worker.EPOCHS)
    return worker.fitting(tf.keras, fit), {
        "tensorflow_privacy": tensorflow_privacy.__version__,
        "tensorflow": tf.__version__,
        "keras": importlib.metadata.version("keras"),
    }


if __name__ == "__main__":
    worker.serve(build)
