"""Hyperparameter studies: which configurations are trained, where, for how long, and how that is recorded.

This package uses Ray, Optuna and MLflow; `ramcore` uses none of them. `analysis` reads what `study.tracking` wrote.
"""
