"""Every family gives the logits that Hugging Face gives (see make_family_goldens.py)."""

import json

import pytest
from tiny import CASES, GOLDENS, ONE_OF_EACH, decoder, error

from converters.families import FAMILIES


@pytest.mark.parametrize("name", CASES)
def test_logits_are_hugging_faces(name):
    assert error(name, decoder(name)) < 1e-4


def test_every_family_has_a_golden():
    kinds = [json.loads((GOLDENS / name / "config.json").read_text())["model_type"] for name in ONE_OF_EACH]
    assert sorted(kinds) == sorted(FAMILIES)
