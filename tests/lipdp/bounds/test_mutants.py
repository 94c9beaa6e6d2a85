"""Rules broken on purpose: the attack must find a violation of each."""

import keras
import pytest

from lipdp import layers
from lipdp.audit import attack_bounds
from lipdp.bounds import projections
from tests.lipdp.mutants import MUTANTS

pytestmark = pytest.mark.any_backend

K = keras.layers


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    monkeypatch.setattr(projections, "_programs", {})  # compiled of what is not broken
    target, shape = mutant(monkeypatch)
    network = isinstance(target, keras.Model)
    bounded = network and any(isinstance(v, layers.BallProjection) for v in target.layers)
    radius = {} if bounded or not network else {"input_bound": 1.0}
    training = isinstance(target, (K.Dropout, K.AlphaDropout))
    result = attack_bounds(target, shape, training=training, until=1.003, **radius)
    assert result.ratio > 1.003, result.attained
