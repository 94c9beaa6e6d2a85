"""The runner on images: what it writes, how it goes on, what it refuses."""

import dataclasses
import hashlib
import io

import keras
import numpy as np
import pytest

from accountants import Ledger
from experiments import data, features, images, record
from experiments.settings import NETWORKS, Settings, settings_of
from lipdp.noise import ALLOCATIONS

pytestmark = pytest.mark.any_backend


QUICK = ("--epsilon=8", "--batch_size=45", "--epochs=3", "--learning_rate=20", "--seed=1")


def test_a_result_tells_all_that_is_needed_to_run_it_again(run, refused, corners, tmp_path):
    arguments = ("--data=corners.npz", *QUICK, "--groups=3", "--out=kept.jsonl")
    result = run(images, *arguments)
    assert record.read("kept.jsonl") == [result]
    assert result["data"] == {
        "name": "corners",
        "sha256": hashlib.sha256(corners.read_bytes()).hexdigest(),
    }
    assert result["spent"]["epsilon"] <= 8 and result["spent"]["steps"] == 6
    assert result["spent"]["delta"] == result["delta"] == 1e-5
    assert result["sampling"] == {"scheme": "poisson", "batch_size": 45}
    assert result["accountant"] == "pld" and result["noise_multiplier"] > 0
    assert result["settings"]["batch_size"] == 45 and result["evaluated_on"] == "test set"
    assert result["command"].startswith("python -m experiments.images --data=corners.npz ")
    assert str(tmp_path) not in (tmp_path / "kept.jsonl").read_text()
    assert {"keras", "numpy", "dp_accounting"} <= set(result["versions"])

    # Its own command gives it again.
    again = run(images, *result["command"].split()[3:])
    assert again["accuracy"] == result["accuracy"] >= 0.9
    assert "has this run already, in line 1" in refused(images, *arguments)


def test_features_and_what_makes_them_are_kept(run, corners, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(images, "train", lambda used, *_: seen.append(used) or {})
    arguments = ("--data=corners.npz", "--folder=.", *QUICK, "--groups=3")
    run(images, *arguments)
    (front,) = tmp_path.glob("*.keras")
    assert front.name.startswith("8x8x1-scattering-")
    monkeypatch.setattr(images, "build_features", None)  # nothing is made anew
    run(images, *arguments, "--learning_rate=19")
    made, kept = (used.x_train for used in seen)
    assert made.shape == (90, 2, 2, 81)
    np.testing.assert_array_equal(made, kept)


def test_validation_leaves_the_test_set_alone(run, refused, corners, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        images, "train", lambda used, *args: seen.update(used=used) or {"accuracy": 1.0}
    )
    result = run(images, "--data=corners.npz", "--network=mlp", "--validation=20")
    assert result["evaluated_on"] == "20 held-out training examples"
    whole = data.load(str(corners))
    np.testing.assert_array_equal(seen["used"].x_train, whole.x_train[:-20])
    np.testing.assert_array_equal(seen["used"].x_test, whole.x_train[-20:])
    assert "from 1 to 89" in refused(images, "--data=corners.npz", "--validation=90")


def test_an_interrupted_run_goes_on_and_remembers_what_it_spent(
    run, corners, tmp_path, monkeypatch
):
    arguments = (images, "--data=corners.npz", "--network=mlp", "--folder=.", *QUICK)

    class Interrupted(keras.callbacks.BackupAndRestore):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            if epoch == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(keras.callbacks, "BackupAndRestore", Interrupted)
        run(*arguments)
    (ledger,) = tmp_path.glob("run-*/spent.ledger")
    begun = Ledger(ledger).runs[0]
    assert begun.steps == 4
    result = run(*arguments)
    assert Ledger(ledger).steps == result["spent"]["steps"] == 6
    assert result["noise_multiplier"] == begun.noise_multiplier
    assert result["spent"]["epsilon"] <= 8


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_bounds(network, few_drawings):
    from lipdp import gradient_bounds

    settings = settings_of("unknown", network, 1.0)
    shape = (16, 16, 3)
    if settings.front != "pixels":
        shape = images.build_features(shape, settings).output_shape[1:]
    built = images.build_network(shape, 4, settings)
    assert built.output_shape == (None, 4)
    bounds = gradient_bounds(built, 0.1)
    assert len(bounds) == len(built.trainable_variables) > 0
    assert all(0 < float(b) < 10 for b in bounds.values())


@pytest.mark.parametrize("network", ["scattering-linear", "patches-linear"])
def test_a_mirrored_image_has_the_same_features(network, few_drawings):
    settings = dataclasses.replace(
        settings_of("unknown", network, 1.0), mirror=True, filters=4, cells=2
    )
    front = images.build_features((8, 8, 1), settings)
    x = np.random.default_rng(0).uniform(0, 255, (2, 8, 8, 1)).astype("float32")
    found = np.asarray(front(x))
    np.testing.assert_allclose(found, np.asarray(front(x[:, :, ::-1])), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.reshape(2, -1), axis=1), 1.0, rtol=1e-4)


@pytest.mark.parametrize("kind", ["strokes", "blobs"])
def test_drawings_are_constants_in_the_range_of_pixels(kind):
    images = features.drawings(kind, (28, 28, 2), 20)
    assert images.shape == (20, 28, 28, 2) and images.dtype == np.float32
    assert 0 <= images.min() < 1 and 200 < images.max() <= 255
    assert images[:, 8:20, 8:20].mean() > 2 * images[:, :4].mean()
    np.testing.assert_array_equal(images, features.drawings(kind, (28, 28, 2), 20))
    with pytest.raises(ValueError, match="'strokes', 'blobs' or 'leaves'"):
        features.drawings("cats", (28, 28, 1))


def test_deformed_drawings_are_constants_near_the_ones_they_come_from():
    images = features.drawings("strokes", (28, 28, 2), 40)
    once, again, other = (features.deformed(images, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert once.shape == images.shape and once.dtype == np.float32
    assert 0 <= once.min() and once.max() <= 255.001
    assert np.abs(once - other).mean() > 1
    shuffled = np.roll(images, 1, axis=0)
    for twin in (once, other):
        assert np.abs(twin - images).mean() < 0.7 * np.abs(twin - shuffled).mean()


@pytest.mark.slow
def test_steadied_features_tell_deformed_drawings_apart():
    plain = features.scattering((28, 28, 1))
    steady = features.steadied(plain, "strokes", size=150, count=250)
    assert steady.output_shape == (None, 150) and not steady.trainable_variables
    # Drawings that took no part in it.
    images = features.drawings("strokes", (28, 28, 1), 310)[250:]
    twins = features.deformed(images, 9)

    def recognised(network):
        x, twin = (np.asarray(network(v)).reshape(len(v), -1) for v in (images, twins))
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-4)
        products = (x - x.mean(axis=0)) @ (twin - twin.mean(axis=0)).T
        return (products.argmax(axis=1) == np.arange(len(x))).mean()

    assert recognised(steady) > recognised(plain) + 0.05


def test_features_of_views_hardly_tell_an_image_from_one_that_is_turned():
    from scipy import ndimage

    images = features.drawings("strokes", (16, 16, 1), 20)
    turned = ndimage.rotate(images, 10, axes=(2, 1), reshape=False, order=1)

    def change(**changes):
        front = features.scattering((16, 16, 1), scales=1, groups=3, **changes)
        x, other = (np.asarray(front(v)).reshape(len(v), -1) for v in (images, turned))
        return np.linalg.norm(x - other) / np.linalg.norm(x)

    assert change(views=True) < 0.85 * change()


def test_leaves_are_constants_in_colours():
    images = features.drawings("leaves", (16, 16, 3), 20)
    assert images.shape == (20, 16, 16, 3) and images.dtype == np.float32
    assert 0 <= images.min() < 5 and 250 < images.max() <= 255
    assert np.ptp(images, axis=-1).mean() > 10
    np.testing.assert_array_equal(images, features.drawings("leaves", (16, 16, 3), 20))


def test_features_of_patches(few_drawings):
    shape = (11, 11, 2)
    front = features.patches(shape, "leaves", filters=5, size=3, cells=2)
    assert front.output_shape == (None, 2, 2, 10) and not front.trainable_variables
    x = np.random.default_rng(0).uniform(0, 255, (3, *shape)).astype("float32")
    x[2] = 7.0
    found = np.asarray(front(x))
    np.testing.assert_allclose(np.linalg.norm(found.reshape(3, -1), axis=1), 1.0, rtol=1e-4)
    # Neither brightness nor contrast is seen, but for what the floor of the deviation takes.
    np.testing.assert_allclose(np.asarray(front(0.5 * x + 60))[:2], found[:2], atol=0.01)
    # Each image is treated by itself, a constant image is finite, the constants are constant.
    np.testing.assert_allclose(np.asarray(front(x[:1])), found[:1], atol=1e-5)
    assert np.isfinite(found).all()
    again = features.patches(shape, "leaves", filters=5, size=3, cells=2)
    np.testing.assert_allclose(np.asarray(again(x)), found, atol=1e-5)


def test_settings_follow_epsilon_and_the_network_is_known():
    choices = {f.name: f.metadata.get("choices") for f in dataclasses.fields(Settings)}
    assert set(choices["allocation"]) == set(ALLOCATIONS)
    with pytest.raises(ValueError, match="`network` must be one of"):
        settings_of("mnist", "lenet", 1.0)
    for epsilon in (0.5, 1.0, 3.0, 100.0):
        assert settings_of("mnist", "scattering-linear", epsilon).front == "scattering"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network=lenet"], "network"),
        (["--epsilon=0"], "epsilon"),
        (["--delta=2"], "delta"),
        (["--seed=-1"], "seed"),
        (["--batch_size=0"], "batch_size"),
        (["--learning_rate=-1"], "learning_rate"),
        (["--front=pixels"], "front"),
        (["--allocation=fair"], "allocation"),
        (["--drawings=cats"], "drawings"),
    ],
)
def test_bad_flags_are_refused(refused, corners, arguments, message):
    assert message in refused(images, "--data=corners.npz", *arguments)


def test_missing_data_and_folders_are_refused(refused, corners):
    assert "nothing.npz" in refused(images, "--data=nothing.npz")
    assert "is no folder" in refused(images, "--data=corners.npz", "--folder=nowhere")


# --- data -----------------------------------------------------------------------------------------


def save(path, **changes):
    arrays = {
        "x_train": np.zeros((4, 32, 32, 3), np.uint8),
        "y_train": np.arange(4),
        "x_test": np.zeros((2, 32, 32, 3), np.uint8),
        "y_test": np.arange(2)[:, None],
    }
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **arrays)
    return str(path)


def test_mosaics_are_cut_into_images(tmp_path, rng):
    from PIL import Image

    x = rng.integers(256, size=(6, 32, 32, 3)).astype(np.uint8)
    mosaic = x.reshape(2, 3, 32, 32, 3).swapaxes(1, 2).reshape(64, 96, 3)
    buffer = io.BytesIO()
    Image.fromarray(mosaic).save(buffer, "WEBP", lossless=True)
    encoded = np.frombuffer(buffer.getvalue(), np.uint8)
    path = save(tmp_path / "x.npz", x_train=None, x_train_webp=encoded, y_train=np.arange(6))
    loaded = data.load(path)
    np.testing.assert_array_equal(loaded.x_train, x)
    assert loaded.y_test.shape == (2,) and loaded.classes == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "lacks x_test"),
        ({"x_train": np.zeros((4, 32, 32, 3))}, "x_train must be uint8"),
        ({"x_train": np.zeros((4, 32), np.uint8)}, "x_train must be uint8"),
        ({"y_train": np.arange(3)}, "y_train must be 4 integer labels"),
        ({"y_train": np.full(4, np.nan)}, "y_train must be 4 integer labels"),
        ({"y_train": -np.arange(4)}, "y_train must be 4 integer labels"),
    ],
)
def test_broken_data_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        data.load(save(tmp_path / "x.npz", **changes))
