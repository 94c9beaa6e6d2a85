"""The report of a model whose layers clip their own gradients."""

import json
import math
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest

import accountants
import lipdp
from lipdp.report import Report
from tests.lipdp.helpers import data

pytestmark = pytest.mark.any_backend

K = keras.layers


def network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            K.Conv2D(3, 3, strides=2, name="<b>conv"),
            K.GroupNormalization(3, name="norm"),
            K.Conv2DTranspose(2, 2, strides=2, output_padding=1, name="up"),
            K.Flatten(),
            K.Dense(3, name="head"),
        ],
        name="clipped",
    )


def model(**settings):
    settings = {"noise_multiplier": 1.0, "clip": lipdp.PerLayerClip()} | settings
    made = lipdp.PrivateModel(
        network(),
        sampling=lipdp.PoissonSampling(16),
        seed=0,
        **settings,
    )
    made.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    return made


@pytest.fixture(scope="module")
def trained():
    made = model(noise_multiplier=None, budget=lipdp.Budget(3.0, 1e-5))
    x, y = data(64, (8, 8, 1))
    made.fit(x, y, epochs=1, verbose=0)
    return made, x, y


def test_a_row_for_each_layer_that_clips(trained):
    report = trained[0].report()
    assert report.weights == report.layers == ()
    assert [row.layer for row in report.clipped] == ["<b>conv", "norm", "up", "head"]
    assert [row.size for row in report.clipped] == [30, 6, 26, 2 * 7 * 7 * 3 + 3]
    assert all(row.exact and row.calls == 1 for row in report.clipped)
    by_itself = [row.layer for row in report.clipped if "by itself" in row.measured]
    assert by_itself == ["up"]
    thresholds = keras.ops.convert_to_numpy(trained[0].current_clip())
    assert [row.threshold for row in report.clipped] == pytest.approx(list(thresholds))
    text = report.to_text()
    for words in ("Conv2DTranspose", "exact", "threshold", "all layers together", "spent so far"):
        assert words in text


def test_noise_is_that_of_the_step(trained):
    made, *_ = trained
    report = made.report()
    # Equal shares of one mechanism, whose other part are the counts.
    sigma = made.step.constants.gradient_noise_multiplier
    assert sigma > made.noise_multiplier
    for row in report.clipped:
        assert row.noise_std == pytest.approx(sigma * 2 * row.sensitivity / 16)
        noise = row.noise_std * math.sqrt(row.size)
        assert row.signal_to_noise == pytest.approx(row.sensitivity / noise)
    assert sum(row.noise_share for row in report.clipped) == pytest.approx(1)


def test_before_training_it_says_what_the_first_step_has(trained):
    made = model(noise_multiplier=trained[0].noise_multiplier)
    before = made.report()
    assert [row.threshold for row in before.clipped] == pytest.approx([0.05] * 4)
    after = trained[0].report()
    for one, other in zip(before.clipped, after.clipped, strict=True):
        ratio = other.threshold / one.threshold
        assert other.noise_std == pytest.approx(one.noise_std * ratio, rel=1e-5)


def test_weights_of_examples_count():
    made = model(clip=lipdp.PerLayerClip(threshold=0.5))
    made.compile("sgd", "sparse_categorical_crossentropy", max_sample_weight=3.0)
    for row in made.report().clipped:
        assert row.threshold == 0.5 and row.sensitivity == pytest.approx(1.5, rel=1e-3)


def test_json_has_no_infinities(trained):
    values = trained[0].report().to_dict()
    json.loads(json.dumps(values, allow_nan=False))
    assert values["lipschitz"] is None and values["clipped"][1]["kind"] == "GroupNormalization"


def test_norms_of_a_sample_are_those_before_the_clip(trained):
    made, x, y = trained
    report = made.report(sample=(x[:4], y[:4]))
    clipped = {row.layer: row.threshold for row in report.clipped}
    kernel = made.network.get_layer("head")
    # By hand: the head's gradient is (features, 1) times (probabilities - one hot).
    features = keras.Sequential(made.network.layers[:-1])(x[:4])
    features = keras.ops.convert_to_numpy(features)
    logits = keras.ops.convert_to_numpy(kernel(features))
    cotangents = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[y[:4]]
    norms = np.sqrt((features**2).sum(1) + 1) * np.linalg.norm(cotangents, axis=1)
    found = {row.name: row for row in report.attained}
    np.testing.assert_allclose(found["head"].norms, norms, rtol=1e-4)
    for name, row in found.items():
        within = np.mean(np.array(row.norms) <= clipped[name])
        assert row.within == pytest.approx(within)
        assert row.mean_norm <= clipped[name] * (1 + 1e-4)
    assert "NOT PRIVATE" in report.to_text() and "NOT PRIVATE" not in made.report().to_text()


def test_page(trained, tmp_path):
    made, x, y = trained
    made.report(sample=(x[:4], y[:4])).to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for words in ("Layers that clip", "Signal and noise of each layer", "Not private", "What if"):
        assert words in text
    assert "Lipschitz" not in text and "<b>conv" not in text and "&lt;b&gt;conv" in text
    for part in text.split("<svg ")[1:]:
        svg = "<svg " + part[: part.index("</svg>")] + "</svg>"
        ElementTree.fromstring(svg.replace("xlink:href", "href"))


def test_planned_runs(trained, tmp_path):
    made = model()
    run = accountants.TrainingRun(1.0, made.sampling, 100, 20)
    report = Report.of(made, runs=[run], delta=1e-5)
    assert report.planned and "planned: ε" in report.to_text()


def test_a_subclassed_network(tmp_path):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = K.Dense(3)

        def call(self, x):
            return self.dense(self.dense(x))

    net = Net()
    net(np.ones((1, 3)))
    made = lipdp.PrivateModel(
        net,
        noise_multiplier=1.0,
        sampling=lipdp.PoissonSampling(4),
        clip=lipdp.PerLayerClip(),
    )
    made.compile("sgd", "sparse_categorical_crossentropy")
    (row,) = made.report().clipped
    assert row.calls == 2
    made.report().to_html(tmp_path / "page.html")
