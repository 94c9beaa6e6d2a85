"""The variants of the page's code differ from it where they should."""

import pytest

from experiments import public_start

pytestmark = pytest.mark.any_backend


def test_variants_of_the_page():
    found = [public_start.variant(t, f) for t in (0, 1, 4) for f in public_start.FROZEN]
    assert len(set(found)) == 12 and tuple(public_start.codes()) in found
    for codes in found:
        for code in codes:
            compile(code, "page", "exec")


def test_what_is_not_on_the_page_is_said():
    with pytest.raises(ValueError, match="has no 'epochs=7'"):
        public_start._replaced("epochs=10", "epochs=7", "epochs=0")
