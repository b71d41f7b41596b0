from __future__ import annotations

import crash


def test_a_serial_study_survives_faults_and_ends_the_same(tmp_path):
    # The full one, of 200 faults, is in test_faults.py; any number: python -m tests.crash --faults N --seed S
    assert crash.check(tmp_path, 5, seed=42) >= 5
