"""Two groups of people: features, metrics, and a certificate that nothing may break."""

import gzip

import keras
import numpy as np
import pytest

import lipdp
from experiments import fairness, record

pytestmark = pytest.mark.any_backend

HEADER = "decile1b,decile3,lsat,ugpa,zfygpa,zgpa,fulltime,fam_inc,male,tier,race,pass_bar"
SETTINGS = fairness.Settings(steps=10, depth=2, width=8, buckets=8)


@pytest.fixture
def file(tmp_path, rng):
    rows = [HEADER]
    for _ in range(300):
        white = rng.random() < 0.7
        skill = rng.normal() + white
        passes = skill + rng.normal() > 0
        lsat = min(48, max(10, 30 + 6 * skill))
        race = "White" if white else "Non-White"
        rows.append(f"5.0,5.0,{lsat:.1f},3.0,0.1,{skill:.2f},1.0,3.0,1.0,2.0,{race},{passes:d}.0")
    path = tmp_path / "law_school.csv.gz"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return path


@pytest.fixture
def data(file):
    columns = fairness.load(file)
    return fairness.encode(columns, fairness.TABLES["law_school"], SETTINGS)


def halves(data):
    return tuple(a[:200] for a in data), tuple(a[200:] for a in data)


def test_features_are_hats_buckets_and_a_constant(file, data):
    x, y, group = data
    # Six numbers of 8 knots, four categories of 8 buckets; race is no feature.
    assert x.shape == (300, 1 + 6 * 8 + 4 * 8)
    np.testing.assert_allclose(x.sum(axis=1), 11, rtol=1e-5)
    assert set(y) == {0, 1} and 0.5 < group.mean() < 0.9
    with_race = fairness.encode(
        fairness.load(file), fairness.TABLES["law_school"], SETTINGS, with_sensitive=True
    )[0]
    assert with_race.shape[1] == x.shape[1] + 8


def test_numbers_beyond_their_range_or_missing_are_held():
    table = fairness.Table(
        ("y", "1"), ("s", frozenset({"a"}), ("a", "b")), {"log n": (0, 10), "m": (0, 1)}
    )
    columns = {"y": ["1", "0", "1"], "s": ["a", "b", "b"], "n": ["-5", "99", "0"]}
    columns["m"] = ["0.5", "", "?"]
    x, y, group = fairness.encode(columns, table, fairness.Settings(knots=3))
    assert y.tolist() == [1, 0, 1] and group.tolist() == [1, 0, 0]
    assert x[:, 1:4].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert x[:, 4:].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("epsilon", [None, 3.0], ids=["plain", "private"])
def test_the_certificate_holds_for_trained_networks_and_attacked_pairs(data, epsilon):
    train, test = halves(data)
    result, network = fairness.train(train, test, epsilon, 1e-3, SETTINGS, seed=0)
    found = result["certificate"]
    assert 0 < found["gap"] <= found["bound"] == found["lipschitz"] * found["distance"]
    assert found["worst_pair"] <= 1 + 1e-4
    assert ("spent" in result) == (epsilon is not None)
    for name in ("demographic_parity_difference", "equalized_odds_difference"):
        assert 0 <= result[name] <= 1
    # A search for the pairs that come closest to breaking it, among directions the network reads.
    rng = np.random.default_rng(1)
    kernel = next(np.asarray(layer.kernel) for layer in network.layers if layer.weights)
    first = second = rng.normal(size=(64, len(kernel))).astype("float32")
    ratios = np.zeros(64)
    for step in np.geomspace(3.0, 0.03, 60):
        moved = second + step * rng.normal(size=(64, kernel.shape[1])) @ kernel.T
        better = ratios_of(network, first, moved.astype("float32"))
        second = np.where((better > ratios)[:, None], moved, second)
        ratios = np.maximum(ratios, better)
    assert 0.05 * found["lipschitz"] < ratios.max() <= found["lipschitz"] * (1 + 1e-4)


def ratios_of(network, first, second):
    """Differences of scores over distances behind the projection."""
    front = network.layers[0]
    apart = np.linalg.norm(np.asarray(front(first)) - np.asarray(front(second)), axis=1)
    moved = np.abs(np.asarray(network(first)) - np.asarray(network(second)))[:, 0]
    return moved / apart


def test_flips_of_the_sensitive_attribute_are_bounded(file):
    columns = fairness.load(file)
    other = {"White": "Non-White", "Non-White": "White"}
    flipped = columns | {"race": [other[value] for value in columns["race"]]}
    table = fairness.TABLES["law_school"]
    x, y, group = fairness.encode(columns, table, SETTINGS, with_sensitive=True)
    twin = fairness.encode(flipped, table, SETTINGS, with_sensitive=True)[0]
    everyone = (x, y, group)
    result, network = fairness.train(everyone, everyone, 8.0, 1e-3, SETTINGS, seed=0)
    front = network.layers[0]
    apart = np.linalg.norm(np.asarray(front(x)) - np.asarray(front(twin)), axis=1)
    moved = np.abs(np.asarray(network(x)) - np.asarray(network(twin)))[:, 0]
    assert apart.min() > 0.1 and moved.max() > 0
    assert (moved <= result["certificate"]["lipschitz"] * apart * (1 + 1e-4)).all()


def test_the_certificate_is_tight_where_groups_differ_along_the_weights():
    network = keras.Sequential(
        [
            keras.Input((2,)),
            lipdp.layers.BallProjection(1.0),
            lipdp.layers.SpectralDense(1, use_bias=False),
        ]
    )
    network.layers[-1].kernel.assign([[1.0], [0.0]])
    x = np.repeat([[0.9, 0.0], [-0.9, 0.0]], 20, axis=0).astype("float32")
    found = fairness.certificate(network, x, np.repeat([1, 0], 20))
    assert found["gap"] == pytest.approx(1.8, rel=1e-4)
    assert found["gap"] / found["bound"] > 0.99 and found["members"] == 20
    # A constant half as large is what a wrong rule would give.
    assert found["gap"] > 0.5 * found["bound"]


def test_the_certificate_refuses(data):
    network = lipdp.models.mlp((3,), 1)
    with pytest.raises(ValueError, match="both groups"):
        fairness.certificate(network, np.ones((4, 3)), np.ones(4))
    bare = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="BallProjection"):
        fairness.certificate(bare, np.ones((4, 3)), np.array([0, 1, 0, 1]))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="adult, german_credit"):
        fairness.load(tmp_path / "people.csv")
    with pytest.raises(FileNotFoundError):
        fairness.load(tmp_path / "adult.csv")
    bad = tmp_path / "law_school.csv"
    for content, message in (("", "lacks"), ("a,b\n1,2\n", "lacks"), (HEADER + "\n", "rows")):
        bad.write_text(content)
        with pytest.raises(ValueError, match=message):
            fairness.load(bad)
    bad.write_text(HEADER + "\n1,2\n")
    with pytest.raises(ValueError, match="rows of 12"):
        fairness.load(bad)


def test_the_table_is_made_of_results(run, tmp_path):
    runs = [
        {
            "accuracy": 0.8,
            "demographic_parity_difference": 0.1,
            "equalized_odds_difference": 0.2,
            "certificate": {"gap": 0.05, "bound": 0.4},
        }
    ]
    for epsilon in (None, 1.0):
        result = {"data": {"name": "adult"}, "groups": ["a", "b"], "epsilon": epsilon, "runs": runs}
        record.append(tmp_path / "kept.jsonl", result)
    run(fairness, "--out=kept", "--table=fairness.md")
    said = (tmp_path / "fairness.md").read_text().splitlines()
    assert said[-2].startswith("| adult | a, b | 1 | 80.0") and "0.050 | 0.400" in said[-2]
    assert "| plain |" in said[-1] and (tmp_path / "fairness.svg").exists()
