from __future__ import annotations

import crash


def test_serial_study_with_faults_ends_as_one_without(tmp_path):
    # The full one, of 200 faults, is in test_faults.py; any number: python -m tests.crash --faults N --seed S
    assert crash.check(tmp_path, 5, seed=42) >= 5
