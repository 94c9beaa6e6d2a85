"""Views of examples, and batches that are computed in pieces."""

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers
from lipdp.data.augmentation import _SEPARATE
from tests.lipdp.helpers import data, dense_network, one_in, private, weights

K = keras.layers

RANDOM = {
    K.GaussianNoise: lambda: K.GaussianNoise(0.1, seed=1),
    K.RandomBrightness: lambda: K.RandomBrightness(0.3, (0.0, 1.0), seed=1),
    K.RandomContrast: lambda: K.RandomContrast(0.5, (0.0, 1.0), seed=1),
    K.RandomCrop: lambda: K.RandomCrop(4, 4, seed=1),
    K.RandomFlip: lambda: K.RandomFlip(seed=1),
    K.RandomRotation: lambda: K.RandomRotation(0.2, seed=1),
    K.RandomTranslation: lambda: K.RandomTranslation(0.2, 0.2, seed=1),
    K.RandomZoom: lambda: K.RandomZoom(0.3, seed=1),
}


def image_network():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.BallProjection(1.0),
            K.Flatten(),
            layers.SpectralDense(3),
        ]
    )


CHANGES = {"another image": None, "black": 0.0, "NaN": np.nan, "huge": 3e38}


def views_that_change(call, shape, change, rng):
    """Numbers of the views that another image in place of the second changes, for one draw."""
    x = rng.uniform(0, 1, (4, *shape)).astype("float32")
    other = x.copy()
    other[1] = rng.uniform(0, 1, shape) if change is None else change
    found = []
    for images in (x, other):
        with keras.StatelessScope():  # which leaves the layers' seeds as they were
            views = call(ops.convert_to_tensor(images))
        found.append(np.asarray(ops.convert_to_numpy(views)).reshape(len(views), -1))
    return set(np.flatnonzero(~(np.abs(found[0] - found[1]) < 1e-5).all(axis=1)))


@pytest.mark.any_backend
@pytest.mark.parametrize("shape", [(6, 6, 1), (6, 6, 3), (6, 6)], ids=str)
@pytest.mark.parametrize("cls", _SEPARATE, ids=lambda cls: cls.__name__)
def test_a_view_depends_on_its_own_example_only(cls, shape, rng):
    augmentation = lipdp.Augmentation(RANDOM[cls](), views=2)
    for change in CHANGES.values():
        assert views_that_change(augmentation, shape, change, rng) == {2, 3}


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_gray_images_have_one_channel_wherever_it_stands(data_format, rng):
    layer = K.RandomContrast(0.5, (0.0, 1.0), data_format=data_format, seed=1)
    augmentation = lipdp.Augmentation(layer, views=2)
    assert views_that_change(augmentation, (6, 5), None, rng) == {2, 3}
    assert augmentation(np.ones((3, 6, 5))).shape == (6, 6, 5)


@pytest.mark.any_backend
def test_keras_takes_gray_images_for_one(rng):
    """Mutant: the layer itself."""
    assert len(views_that_change(RANDOM[K.RandomContrast](), (6, 6), None, rng)) == 4


@pytest.mark.any_backend
def test_images_only():
    for shape in ((3,), (2, 6, 6, 1)):
        with pytest.raises(ValueError, match=r"RandomFlip is for images .*; got examples of shape"):
            lipdp.Augmentation(K.RandomFlip())(np.ones((2, *shape)))
    assert lipdp.Augmentation(K.GaussianNoise(0.1))(np.ones((2, 3))).shape == (2, 3)


@pytest.mark.any_backend
def test_what_may_mix_examples_is_refused():
    for layer in (
        *(K.BatchNormalization(), K.MixUp(), K.CutMix(), K.Lambda(lambda x: x)),
        *(K.AugMix(), K.RandAugment(), K.Equalization(), K.Normalization()),
        keras.Sequential([K.RandomFlip(), K.MixUp()]),
    ):
        with pytest.raises(TypeError, match=f"{type(layer).__name__}, which may mix"):
            lipdp.Augmentation(layer)
    for views in (0, 1.5, True, "2"):
        with pytest.raises(ValueError, match="`views` must be a positive integer"):
            lipdp.Augmentation(K.RandomFlip(), views=views)
    with pytest.raises(TypeError, match="`augmentation` must be lipdp.Augmentation"):
        private(augmentation=K.RandomFlip())


@pytest.mark.parametrize(
    "views, physical",
    [
        (3, 8),
        *(pytest.param(*p, marks=pytest.mark.any_backend) for p in ((1, None), (1, 8), (3, None))),
    ],
)
def test_training_with_views(views, physical):
    augmentation = lipdp.Augmentation([K.RandomFlip(), K.RandomTranslation(0.1, 0.1)], views)
    model = private(
        image_network(),
        augmentation=augmentation,
        physical_batch_size=physical,
        clip=lipdp.AdaptiveClip(0.5),
        run_eagerly=False,
    )
    x, y = data(shape=(6, 6, 1))
    history = model.fit(x, y, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert all(np.isfinite(w).all() for w in weights(model))


def step_of(x, y, **options):
    """The weights after one noise-free step of full batches at rate 1."""
    keras.utils.set_random_seed(3)
    model = private(
        dense_network(),
        sampling=lipdp.FullBatch(),
        noise_multiplier=0.0,
        optimizer=keras.optimizers.SGD(1.0),
        **options,
    )
    model.fit(x, y, epochs=1, verbose=0)
    return weights(model)


@pytest.mark.any_backend
def test_views_of_no_change_are_the_example():
    """Their mean has the length of one gradient, not of all."""
    x, y = data(32)
    augmentation = lipdp.Augmentation(K.GaussianNoise(1e-7), views=5)
    for a, b in zip(step_of(x, y), step_of(x, y, augmentation=augmentation), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.any_backend
@pytest.mark.parametrize("physical", [1, 7, 16, 32, 100])
def test_pieces_make_the_whole(physical):
    x, y = data(32)
    whole = step_of(x, y)
    for a, b in zip(whole, step_of(x, y, physical_batch_size=physical), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert any(
        np.abs(a - b).max() > 1e-3 for a, b in zip(whole, step_of(x[:16], y[:16]), strict=True)
    )


@pytest.mark.parametrize("eager", one_in(2, [False, True]))
def test_pieces_with_noise_weights_and_draws(eager):
    """One draw and one noise, whatever the pieces: the same run with the same seed."""
    x, y = data(64)
    found = []
    for physical in (None, 8):
        keras.utils.set_random_seed(3)
        model = private(physical_batch_size=physical, seed=5, run_eagerly=eager)
        model.compile(
            keras.optimizers.SGD(0.5),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
            max_sample_weight=2.0,
            run_eagerly=eager,
        )
        history = model.fit(x, y, epochs=1, sample_weight=np.linspace(0, 2, 64), verbose=0)
        found.append((weights(model), history.history))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for name, values in found[0][1].items():
        assert found[1][1][name] == pytest.approx(values, abs=1e-5)


def test_a_bad_physical_batch_size_is_refused():
    for value in (0, -1, 2.5, True):
        kind = ValueError if type(value) is int else TypeError
        with pytest.raises(kind, match="`physical_batch_size` must be an integer"):
            private(physical_batch_size=value)
