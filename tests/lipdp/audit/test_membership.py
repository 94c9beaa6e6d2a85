"""Membership inference: figures with known answers, the attacks, the command."""

import json
import sys

import keras
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

import lipdp
from lipdp import audit, cli
from lipdp.audit import membership
from tests.lipdp.helpers import private

pytestmark = pytest.mark.any_backend

K = keras.layers


def classifier(activation=None, classes=3, inputs=5):
    return keras.Sequential([keras.Input((inputs,)), K.Dense(classes, activation=activation)])


def examples(count, classes=3, inputs=5, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, inputs)), random.integers(0, classes, count)


def memorised(count=60, classes=3):
    """A model that knows its training examples by heart, those, and others: labels are noise."""
    members, others = examples(count, inputs=100), examples(count, inputs=100, seed=1)
    model = classifier(inputs=100)
    targets = 5 * np.eye(classes)[members[1]]
    kernel, *_ = np.linalg.lstsq(members[0], targets, rcond=None)
    model.layers[-1].set_weights([kernel, np.zeros(classes)])
    return model, members, others


# --- figures --------------------------------------------------------------------------------


def test_the_area_is_that_of_scikit_learn(rng):
    for ties in (False, True):
        a, b = rng.normal(0.5, 1, 70), rng.normal(0, 1, 90)
        if ties:
            a, b = a.round(), b.round()
        truth = np.repeat([1, 0], [70, 90])
        found = membership._auc(a, b, 0.95)
        assert found.value == pytest.approx(metrics.roc_auc_score(truth, np.concatenate([a, b])))
        false, true, _ = metrics.roc_curve(truth, np.concatenate([a, b]), drop_intermediate=False)
        advantage = membership._advantage(a, b, 0.95)
        assert advantage.value == pytest.approx((true - false).max())
        assert advantage.low < advantage.value < advantage.high


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_intervals_cover_as_often_as_they_say(shift):
    """Normal scores, shifted: the true figures are known."""
    random = np.random.default_rng(0)
    area, advantage = stats.norm.cdf(shift / 2**0.5), 2 * stats.norm.cdf(shift / 2) - 1
    missed, repetitions = np.zeros(3), 400
    for _ in range(repetitions):
        a, b = random.normal(shift, 1, 60), random.normal(0, 1, 80)
        rate = membership._rate(a, b, 0.1, 0.95, None)
        threshold = np.sort(b)[len(b) - 1 - 8]
        for index, (interval, truth) in enumerate(
            [
                (membership._auc(a, b, 0.95), area),
                (membership._advantage(a, b, 0.95), advantage),
                (rate.true_positive_rate, stats.norm.sf(threshold - shift)),
            ]
        ):
            missed[index] += not interval.low <= truth <= interval.high
        # One-sided, at half of what remains.
        assert rate.most_false_positives > 0.1
    assert (missed <= [0.08 * repetitions, 0, 0.065 * repetitions]).all(), missed


def test_true_positives_at_few_false_positives():
    members, others = np.arange(100.0) + 50, np.arange(100.0)
    rate = membership._rate(members, others, 0.1, 0.95, audit.Claim(1.0, 0.0))
    # Ten others lie above 89.
    assert rate.true_positive_rate.value == 0.6
    assert rate.ceiling == pytest.approx(0.1 * np.e)
    assert 0.1 < rate.most_false_positives < 0.2
    # Ties are no true positives.
    assert membership._rate(np.ones(9), np.ones(9), 0.5, 0.95, None).true_positive_rate.value == 0


def test_a_perfect_attack_keeps_an_interval():
    found = membership._auc(np.ones(20), np.zeros(20), 0.95)
    assert found.value == found.high == 1.0 and 0.7 < found.low < 0.9


# --- signals --------------------------------------------------------------------------------


def test_logits_and_probabilities_show_the_same():
    x, y = examples(40)
    logits, softmax = classifier(), classifier("softmax")
    softmax.set_weights(logits.get_weights())
    one, other = audit.Signals.of(logits, x, y), audit.Signals.of(softmax, x, y)
    assert (one.outputs, other.outputs) == ("logits", "probabilities")
    for name in ("loss", "entropy", "modified_entropy", "confidence"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)
    one_hot = audit.Signals.of(logits, x, np.eye(3)[y])
    np.testing.assert_allclose(one.loss, one_hot.loss)
    hot = audit.Signals.of(logits, x, y, temperature=2.0)
    np.testing.assert_allclose(hot.logits, 2 * one.logits)


def test_signals_of_known_probabilities():
    p = np.array([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]])
    signals = audit.Signals(np.log(np.clip(p, 1e-12, None)), np.array([0, 2]), "probabilities")
    np.testing.assert_allclose(signals.loss, [-np.log(0.7), 12 * np.log(10)], rtol=1e-6)
    np.testing.assert_allclose(signals.entropy[0], stats.entropy(p[0]), rtol=1e-6)
    expected = -0.3 * np.log(0.7) - 0.2 * np.log(0.8) - 0.1 * np.log(0.9)
    np.testing.assert_allclose(signals.modified_entropy[0], expected, rtol=1e-6)
    np.testing.assert_allclose(signals.confidence[0], np.log(0.7 / 0.3), rtol=1e-6)
    assert np.isfinite(signals.modified_entropy).all()


def test_one_output_is_the_second_of_two_classes():
    x, y = examples(30, classes=2)
    logit, sigmoid = classifier(classes=1), classifier("sigmoid", classes=1)
    sigmoid.set_weights(logit.get_weights())
    p = sigmoid.predict(x, verbose=0)[:, 0].astype("float64")
    expected = -np.log(np.where(y == 1, p, 1 - p))
    for model in (logit, sigmoid):
        np.testing.assert_allclose(audit.Signals.of(model, x, y).loss, expected, atol=1e-5)


@pytest.mark.parametrize(
    "y, message",
    [
        (np.full(10, 3), "between 0 and 2"),
        (np.full(10, -1), "between 0 and 2"),
        (np.full(10, 0.5), "integer labels"),
        (np.full((10, 3), 0.4), "one-hot"),
        (np.zeros((10, 2)), "integer labels"),
        (np.zeros(9, int), "one row"),
    ],
)
def test_labels_that_are_none(y, message):
    with pytest.raises(ValueError, match=message):
        audit.Signals.of(classifier(), np.zeros((10, 5)), y)


def test_models_and_outputs_that_are_no_classifiers():
    x, y = examples(10)
    with pytest.raises(ValueError, match="not probabilities"):
        audit.Signals.of(classifier(), 100 * x, y, from_logits=False)
    with pytest.raises(ValueError, match="output row"):
        shape = keras.Sequential([keras.Input((5,)), K.Reshape((5, 1)), K.Dense(2)])
        audit.Signals.of(shape, x, y)
    with pytest.raises(ValueError, match="temperature"):
        audit.Signals.of(classifier(), x, y, temperature=0.0)
    twice = keras.Input((2,))
    several = keras.Model(twice, [K.Dense(2)(twice), K.Dense(2)(twice)])
    with pytest.raises(ValueError, match="`model` must have one output; this one has 2"):
        audit.Signals.of(several, np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(TypeError, match="`model`"):
        audit.Signals.of(object(), x, y)
    broken = classifier()
    broken.set_weights([np.full((5, 3), np.nan), np.zeros(3)])
    with pytest.raises(ValueError, match="NaN"):
        audit.Signals.of(broken, x, y)


# --- attacks --------------------------------------------------------------------------------


def test_every_attack_sees_a_model_that_memorised():
    model, members, others = memorised()
    found = audit.infer_membership(model, members, others, claim=audit.Claim(0.5, 1e-5))
    assert [r.attack for r in found.rows[::4]] == list(membership.ATTACKS)
    assert [r.group for r in found.rows[:4]] == ["all", "class 0", "class 1", "class 2"]
    overall = {row.attack: row for row in found.rows if row.group == "all"}
    assert all(row.auc.low > 0.5 for row in overall.values())
    assert overall["loss"].auc.low > 0.75 and overall["logistic"].auc.low > 0.75
    assert found.violated and "AUC" in overall["loss"].beyond
    assert "BEYOND THE CEILING" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["violated"] is True
    assert sum(row.members for row in found.rows[1:4]) == found.rows[0].members == 60


def test_no_attack_sees_what_is_not_there():
    model, _, others = memorised()
    fresh = examples(60, inputs=100, seed=2)
    found = audit.infer_membership(model, fresh, others, claim=audit.Claim(0.1, 1e-5))
    assert not found.violated and "no attack is beyond the ceiling" in str(found)
    assert all(row.auc.low < 0.5 for row in found.rows if row.group == "all")
    # Without a claim there is nothing to exceed.
    found = audit.infer_membership(model, fresh, others, attacks=["loss"])
    assert not found.violated and "ceiling" not in str(found)


def test_a_private_model_is_its_own_claim():
    x, y = examples(40, inputs=6)
    model = private(budget=lipdp.Budget(1.0, 1e-5), sampling=lipdp.FullBatch())
    model.fit(x, y, epochs=2, verbose=0)
    found = audit.infer_membership(model, (x, y), examples(30, inputs=6), claim=model)
    assert not found.violated
    # The ceiling is that of the Gaussian mechanism, lower than that of ε and δ alone.
    assert found.advantage_ceiling < audit.Claim(1.0, 1e-5).advantage


def test_the_likelihood_ratio_knows_who_is_hard_to_learn():
    """Least squares on few examples: in a shadow model with it an example's confidence is high."""

    def train(x, y, model=classifier(inputs=20)):  # noqa: B008
        kernel, *_ = np.linalg.lstsq(x, 3 * np.eye(3)[y], rcond=None)
        model.layers[-1].set_weights([kernel, np.zeros(3)])
        return model

    members, others = examples(40, inputs=20), examples(40, inputs=20, seed=1)
    model = train(*members, classifier(inputs=20))
    scores = audit.lira(train, model, members, others, shadows=16, seed=0)
    found = audit.infer_membership(
        model, members, others, attacks=["loss"], scores={"LiRA": scores}
    )
    overall = {row.attack: row.auc.value for row in found.rows if row.group == "all"}
    assert overall["LiRA"] > overall["loss"] + 0.03 and overall["LiRA"] > 0.8
    again = audit.lira(train, model, members, others, shadows=16, seed=0)
    np.testing.assert_allclose(scores[0], again[0])


def test_every_example_is_in_half_of_the_shadow_models():
    seen = []

    def train(x, y):
        seen.append(set(x[:, 0]))
        return classifier(inputs=1)

    x = np.arange(20.0)[:, None]
    model = classifier(inputs=1)
    audit.lira(train, model, (x[:8], np.zeros(8, int)), (x[8:], np.ones(12, int)), shadows=6)
    assert len(seen) == 6 and all(sum(v in s for s in seen) == 3 for v in range(20))


def test_bad_arguments(monkeypatch):
    model, members, others = memorised(12)
    for arguments, message in (
        ({"attacks": ["magic"]}, "`attacks`"),
        ({"attacks": []}, "`attacks`"),
        ({"confidence": 1.0}, "`confidence`"),
        ({"false_positive_rates": [0.0]}, "`false_positive_rates`"),
        ({"scores": {"own": (np.zeros(3), np.zeros(12))}}, "own"),
        ({"scores": {"own": (np.full(12, np.nan), np.zeros(12))}}, "own"),
    ):
        with pytest.raises(ValueError, match=message):
            audit.infer_membership(model, members, others, **arguments)
    for shadows in (1, 3, 2.0):
        with pytest.raises((TypeError, ValueError), match="`shadows`"):
            audit.lira(lambda x, y: model, model, members, others, shadows=shadows)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="lipdp\\[audit\\]"):
        audit.infer_membership(model, members, others)
    assert audit.infer_membership(model, members, others, attacks=["loss"]).rows


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr("sys.argv", ["lipdp", "audit", *map(str, argv)])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def files(tmp_path):
    model, members, others = memorised()
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "in.npz", x=members[0], y=members[1])
    np.savez(tmp_path / "out.npz", x=others[0], y=others[1])
    return tmp_path


def test_the_command(run, files):
    where = (files / "model.keras", "--members", files / "in.npz")
    where += (f"--nonmembers={files / 'out.npz'}",)
    code, out, _ = run(*where)
    assert code == 0 and "modified entropy" in out and "taken for logits" in out
    code, out, _ = run(*where, "--json", "--epsilon=1", "--delta=1e-5")
    record = json.loads(out)
    assert code == 1 and record["violated"] and record["outputs"] == "logits"
    assert {row["group"] for row in record["rows"]} == {"all", "class 0", "class 1", "class 2"}
    code, _, _ = run(*where, "--epsilon=30", "--delta=1e-5")
    assert code == 0


def test_bad_use_of_the_command(run, files):
    model, members, others = files / "model.keras", files / "in.npz", files / "out.npz"
    assert run()[0] == 2
    code, _, err = run(model, f"--members={members}")
    assert code == 2 and "--nonmembers is needed" in err
    both = (f"--members={members}", f"--nonmembers={others}")
    code, _, err = run(model, *both, "--epsilon=1")
    assert code == 2 and "together" in err
    code, _, err = run(model, *both, "--epsilon=-1", "--delta=1e-5")
    assert code == 2 and "`epsilon`" in err
    code, _, err = run(model, f"--members={files / 'none.npz'}", both[1])
    assert code == 1 and "none.npz" in err
    np.savez(files / "keys.npz", x=np.zeros((3, 100)))
    np.save(files / "array.npy", np.zeros(3))
    (files / "text.npz").write_text("no arrays")
    np.savez(files / "shape.npz", x=np.zeros((3, 4)), y=np.zeros(3, int))
    np.savez(files / "nan.npz", x=np.full((3, 100), np.nan), y=np.zeros(3, int))
    for name, said in {
        "keys.npz": "keys.npz must be an .npz file of arrays x and y",
        "array.npy": "array.npy must be an .npz file",
        "text.npz": "text.npz must be an .npz file",
        "shape.npz": "(100,)",
        "nan.npz": "NaN",
    }.items():
        code, _, err = run(model, f"--members={files / name}", both[1])
        assert code == 2 and said in err, (name, err)
