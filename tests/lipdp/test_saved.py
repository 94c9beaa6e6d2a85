"""Networks that an earlier version saved still load, whatever became of the modules since."""

import pathlib

import keras
import numpy as np

import lipdp

SAVED = pathlib.Path(__file__).parent / "saved"


def test_a_network_of_an_earlier_version_loads_with_its_outputs():
    network = keras.saving.load_model(SAVED / "network.keras")
    x = np.linspace(-1, 1, 2 * 64, dtype=np.float32).reshape(2, 8, 8, 1)
    found = network.predict(x, verbose=0)
    np.testing.assert_allclose(found, np.load(SAVED / "outputs.npy"), rtol=1e-4, atol=1e-6)
    assert len(lipdp.gradient_bounds(network)) == len(network.trainable_variables)
