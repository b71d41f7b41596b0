"""Settings of MLflow's client. MLflow reads them when it is imported, so import this module first.

MLflow's own time limits are minutes, and its own retries can create a run twice: `study.tracking` retries instead. A
value that the user has set stays.
"""

from __future__ import annotations

import os

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A connection of its own for each call: one that stays open goes on with a database file that was deleted or moved.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)
