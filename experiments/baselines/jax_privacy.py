"""Steps of JAX-Privacy: `vmap`, all examples at once; `microbatches`, 32 at once; `plain`, the same
loop without clipping; `keras` and `keras_plain`, in `fit` of Keras.
"""

import functools
import importlib.metadata

import jax
import jax_privacy
import keras
import optax
from jax_privacy import keras_api, noise_addition

from experiments.baselines import networks, worker


def build(method, name, batch_size):
    network = keras.Model(*networks.layers_of(name, keras))
    versions = {
        "jax_privacy": importlib.metadata.version("jax-privacy"),
        "jax": jax.__version__,
        "keras": keras.__version__,
    }
    if method.startswith("keras"):
        if method == "keras":
            settings = keras_api.DPKerasConfig(
                epsilon=1000.0, delta=1e-5, clipping_norm=1.0, batch_size=batch_size,
                gradient_accumulation_steps=1, train_steps=16 * worker.EPOCHS,
                train_size=max(1024, 4 * batch_size),
                noise_multiplier=1.0, microbatch_size=min(32, batch_size),
            )  # fmt: skip
            network = keras_api.make_private(network, settings)
        network.compile(
            keras.optimizers.SGD(0.05, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        x, y = worker.examples(name, batch_size)
        fit = functools.partial(network.fit, x, y, batch_size=batch_size, epochs=worker.EPOCHS)
        return worker.fitting(keras, fit), versions

    def loss(weights, x, y):
        logits, _ = network.stateless_call(weights, [], x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = optax.sgd(0.05, momentum=0.9)
    if method == "plain":
        gradient = jax.grad(loss)
    else:
        gradient = jax_privacy.clipped_grad(
            loss, batch_argnums=(1, 2), l2_clip_norm=1.0, normalize_by=batch_size,
            microbatch_size=32 if method == "microbatches" else None,
        )  # fmt: skip
        noise = noise_addition.gaussian_privatizer(
            stddev=gradient.sensitivity() / batch_size, prng_key=0
        )
        optimizer = optax.chain(noise, optimizer)

    @jax.jit
    def update(weights, state, x, y):
        changes, state = optimizer.update(gradient(weights, x, y), state, weights)
        return optax.apply_updates(weights, changes), state

    batches = worker.rows(name, batch_size)
    weights = [jax.numpy.asarray(v.value) for v in network.trainable_variables]
    kept = [weights, optimizer.init(weights)]

    def step():
        kept[:] = jax.block_until_ready(update(*kept, *next(batches)))

    return worker.repeated(step), versions


if __name__ == "__main__":
    worker.serve(build)
