"""What formats give back of a network's outputs: `python -m experiments.serving`.

Prints the table of docs/how_to_serving.md for the backend that `KERAS_BACKEND` says: the largest
difference to the network's own outputs, or the error. ONNX needs `onnx`, `onnxruntime` and, on
TensorFlow, `tf2onnx`.
"""

import contextlib
import pathlib
import tempfile

import numpy as np

from experiments import pages


def networks():
    """Networks by name, not trained."""
    import keras

    from lipdp import layers, models

    steps = keras.Input((6, 4))
    state = layers.LipschitzRNN(4)(layers.BallProjection(1.0)(steps))
    return {
        "`conv_net`": models.conv_net((28, 28, 1), 10),
        "`scatter_net`": models.scatter_net((28, 28, 1), 10),
        "`vision_transformer`": models.vision_transformer((32, 32, 3), 10),
        "`text_classifier`": models.text_classifier(1000, 20, 2),
        "`LipschitzRNN` and a dense layer": keras.Model(steps, layers.SpectralDense(3)(state)),
    }


def by_keras(plain, x, folder):
    import keras

    plain.save(folder / "plain.keras")
    return keras.saving.load_model(folder / "plain.keras").predict(x, verbose=0)


def by_saved_model(plain, x, folder):
    import tensorflow as tf

    plain.export(folder / "served", verbose=False)
    restored = tf.saved_model.load(str(folder / "served"))  # its weights live as long as it
    return np.asarray(restored.serve(x))


def by_tflite(plain, x, folder):
    import tensorflow as tf

    plain.export(folder / "served", verbose=False)
    content = tf.lite.TFLiteConverter.from_saved_model(str(folder / "served")).convert()
    interpreter = tf.lite.Interpreter(model_content=content)
    read, written = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.resize_tensor_input(read["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(read["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(written["index"])


def by_onnx(plain, x, folder):
    import onnxruntime

    plain.export(folder / "plain.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(str(folder / "plain.onnx"))
    return session.run(None, {session.get_inputs()[0].name: x})[0]


FORMATS = {
    ".keras": by_keras,
    "SavedModel": by_saved_model,
    "TFLite": by_tflite,
    "ONNX": by_onnx,
}


def difference(network, give_back):
    """The largest difference, or the name of the error; a dash where a package is missing."""
    import lipdp

    random = np.random.default_rng(0)
    like = network.inputs[0]
    shape = (3, *like.shape[1:])
    if "int" in like.dtype:
        x = random.integers(0, 100, shape).astype(like.dtype)
    else:
        x = random.normal(size=shape).astype("float32")
    expected = network.predict(x, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = give_back(lipdp.to_keras(network), x, pathlib.Path(folder))
        except ImportError:
            return "–"
        except Exception as error:  # whatever a converter raises is the result
            return f"fails ({type(error).__name__})"
    return f"{np.abs(found - expected).max():.0e}"


def main():
    import keras

    keras.utils.set_random_seed(0)
    with contextlib.redirect_stdout(None):  # converters print
        rows = [
            [name, *(difference(network, give_back) for give_back in FORMATS.values())]
            for name, network in networks().items()
        ]
    print(pages.markdown(["network", *FORMATS], rows, left=1))


if __name__ == "__main__":
    main()
