"""Every family gives the logits that Hugging Face gives (see make_family_goldens.py)."""

import pytest
from tiny import CASES, decoder, error


@pytest.mark.parametrize("name", CASES)
def test_logits_are_hugging_faces(name):
    assert error(name, decoder(name)) < 1e-4
