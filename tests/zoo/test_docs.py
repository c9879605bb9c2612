"""The docs' table of families is there and whole; ``recording.py`` writes it."""

from __future__ import annotations

import re

import tstlens
from tests.zoo.recording import DOCS


def test_every_family_has_a_row_with_measured_parity():
    page = DOCS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w.-]+) \| (.+?) \| (\d+) \| (\S+) \| (\S+) \|$", page, re.M)
    found = {name: (int(n), float(single), float(double)) for name, _, n, single, double in rows}
    assert sorted(found) == sorted(tstlens.families())
    for name, (n, single, double) in found.items():
        assert n >= 2 and single <= 4e-5 and double <= 1e-9, name
        assert f"\n## {name}\n" in page
