"""The report: what it says adds up, and the page can be read."""

import json
import math
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest

import accountants
import lipdp
from lipdp import layers
from lipdp.report import Report
from tests.lipdp.helpers import conv_network, data, dense_network, private

pytestmark = pytest.mark.any_backend


@pytest.fixture(scope="module")
def trained():
    model = private(conv_network(), budget=lipdp.Budget(3.0, 1e-5))
    x, y = data(64, (8, 8, 1))
    model.fit(x, y, epochs=1, verbose=0)
    return model, x, y


def branches():
    x = keras.Input((6,), name="<b>&")
    y = layers.BallProjection(1.0)(x)
    z = layers.SpectralDense(6, use_bias=False, name="inner")(y)
    y = keras.layers.Average()([y, z])
    return keras.Model(x, layers.SpectralDense(3, use_bias=False)(y), name="<i>x")


def test_layers_say_what_they_read():
    rows = private(branches()).report().layers
    assert [row.sources for row in rows] == [(-1,), (0,), (0, 1), (2,)]
    assert rows[2].input_bounds == pytest.approx((1.0, 1.0))
    assert rows[1].weights == ("inner/kernel",) and rows[2].weights == ()
    # The input's own edge: nothing bounds it before the ball.
    assert math.isinf(rows[0].input_bounds[0])


def test_signal_to_noise_is_that_of_a_batch_that_attains_the_bound(trained):
    report = trained[0].report()
    for row in report.weights:
        noise = row.noise_std * math.sqrt(math.prod(row.shape))
        assert row.signal_to_noise == pytest.approx(row.sensitivity / noise)


def test_json_has_no_infinities_and_the_runs(trained):
    values = trained[0].report().to_dict()
    json.loads(json.dumps(values, allow_nan=False))
    (run,) = values["runs"]
    assert accountants.TrainingRun.from_dict(run) == trained[0].spending.runs[0]
    assert values["relation"] == "add_or_remove_one"


def test_gradients_of_a_sample_are_those_of_single_examples(trained):
    model, x, y = trained
    report = model.report(sample=(x[:3], y[:3]))
    # The definition, example by example, on a step without noise.
    for index in range(3):
        one = model.report(sample=(x[index : index + 1], y[index : index + 1]))
        for whole, single in zip(report.attained, one.attained, strict=True):
            assert whole.norms[index] == pytest.approx(single.norms[0], rel=1e-4)
            assert single.mean_norm == pytest.approx(single.norms[0], rel=1e-4)
    for row, found in zip(report.weights, report.attained, strict=True):
        assert 0 < max(found.norms) <= row.sensitivity
        assert found.mean_norm <= np.mean(found.norms) * (1 + 1e-6)
    assert "NOT PRIVATE" in report.to_text()
    assert "NOT PRIVATE" not in model.report().to_text()


def test_a_sample_changes_neither_weights_nor_what_is_spent(trained):
    model, x, y = trained
    before, spent = model.network.get_weights(), model.spent()
    model.report(sample=(x[:2], y[:2]))
    assert model.spent() == spent
    for a, b in zip(before, model.network.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sample", [5, ("x",), [1, 2]])
def test_a_sample_is_a_pair(trained, sample):
    with pytest.raises(TypeError, match="sample"):
        trained[0].report(sample=sample)


def test_a_sample_of_another_shape_is_refused(trained):
    with pytest.raises(ValueError, match="shape"):
        trained[0].report(sample=(np.ones((2, 5, 5, 1)), np.zeros(2, int)))


def page_of(report, path):
    report.to_html(path)
    return path.read_text(encoding="utf-8")


def test_page_loads_nothing_and_says_what_the_report_says(trained, tmp_path):
    model, x, y = trained
    report = model.report(sample=(x[:4], y[:4]))
    text = page_of(report, tmp_path / "report.html")
    for row in report.weights:
        assert f"{row.sensitivity:.4g}" in text and row.weight in text
    assert f"{report.epsilon:.4g}" in text
    assert "Not private" in text and "What if" in text
    addresses = text.replace("http://www.w3.org/", "")  # names of SVG's vocabulary
    assert "http:" not in addresses and "https:" not in addresses and "src=" not in text
    assert "@media print" in text and "width=device-width" in text
    # Each drawing is well-formed by itself, and no two define the same name.
    names = []
    for part in text.split("<svg ")[1:]:
        svg = "<svg " + part[: part.index("</svg>")] + "</svg>"
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        names += [node.get("id") for node in root.iter() if node.get("id")]
    assert len(names) == len(set(names)) > 0


def test_page_without_training_has_bounds_and_no_spending(tmp_path):
    text = page_of(private(dense_network()).report(), tmp_path / "report.html")
    assert "What was spent" not in text and "Not private" not in text
    assert "Where each sensitivity comes from" in text


def test_names_cannot_break_out_of_the_page(tmp_path):
    text = page_of(private(branches()).report(), tmp_path / "report.html")
    assert "<i>x" not in text and "&lt;i&gt;" in text


def test_what_if_starts_at_the_run(trained, tmp_path):
    report = trained[0].report()
    text = page_of(report, tmp_path / "report.html")
    data_of = json.loads(text[text.index("const D=") + 8 : text.index(";\nconst get")])
    size, passes, noise = (text.index(f'id="{k}" min') for k in ("sizes", "epochs", "noises"))
    start = [int(text[at:].split('value="', 1)[1].split('"')[0]) for at in (size, passes, noise)]
    i, j, k = start
    shown = data_of["epsilons"][(i * len(data_of["epochs"]) + j) * len(data_of["noises"]) + k]
    # But for the share of delta that pays for certificates.
    assert shown == pytest.approx(report.epsilon, abs=2e-3)
    assert data_of["sizes"][i] == 16
    assert data_of["noise"] * data_of["noises"][k] / 16 == pytest.approx(report.total_noise)


def test_sliders_keep_to_sizes_that_the_scheme_can_draw(tmp_path):
    model = private(
        dense_network(), sampling=lipdp.CyclicPoisson(16, bands=3), noise=lipdp.BandedNoise()
    )
    run = accountants.TrainingRun(1.0, model.sampling, 100, 20)
    text = page_of(Report.of(model, runs=[run], delta=1e-5), tmp_path / "report.html")
    assert '"sizes": [4, 8, 16, 32]' in text  # 64 in each of 3 groups of 100 are too many


def test_planned_runs_are_said_to_be_planned():
    model = private(dense_network())
    run = accountants.TrainingRun(1.0, model.sampling, 100, 20)
    report = Report.of(model, runs=[run], delta=1e-5)
    assert report.planned and "planned: ε" in report.to_text()
    assert report.epsilon == pytest.approx(float(accountants.epsilon(runs=[run], delta=1e-5)))


def test_tensorboard_gets_epsilon(tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("written by TensorFlow")
    import tensorflow as tf

    model = private(budget=lipdp.Budget(3.0, 1e-5))
    x, y = data()
    callback = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[callback])
    found = {}
    for file in tmp_path.rglob("events.*"):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    assert found["epoch_epsilon"][-1] == pytest.approx(model.spent().epsilon, rel=1e-5)
    assert len(found["epoch_epsilon"]) == 2
