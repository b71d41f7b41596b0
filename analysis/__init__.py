"""What a study's tracked records say: which hyperparameters matter, by how much, and how sure that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ramcore import on_first_use

if TYPE_CHECKING:
    from analysis.importance import analyse as analyse
    from analysis.load import open_study as open_study

__getattr__ = on_first_use(__name__, {"analyse": "analysis.importance", "open_study": "analysis.load"})
