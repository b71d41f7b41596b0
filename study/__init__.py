"""The study scheduler: which configurations are trained, where, for how long, and how that is recorded.

It knows ray, optuna and mlflow; `ramcore` knows none of them, and `analysis` reads only what `study.tracking` wrote.
"""
