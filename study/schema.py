"""The names of all tracked data, which the writer (`study.tracking`) and the reader (`analysis.load`) share.

One MLflow experiment holds all studies. A study is a parent run; each of its trials is a child run. The params of a
child are the fields of `Config`. The step of an epoch's metrics is the epoch, from 1.
"""

from __future__ import annotations

VERSION = 2  # of these names; version 1 had ram.arm for ram.origin, and no baseline, parameter or diverged
EXPERIMENT = "ram-study"
DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"  # in the working directory, where `mlflow ui` looks

# A tag of the experiment that MLflow's page reads: it is about runs, not about traces.
KIND_OF_EXPERIMENT = ("mlflow.experimentKind", "custom_model_development")

# Tags of the parent run and of its children.
KIND = "ram.kind"  # study or trial
STUDY = "ram.study"  # the study's name
UID = "ram.uid"  # unique, also among studies of one name
SCHEMA = "ram.schema"  # VERSION
COMMIT = "ram.commit"
COMMIT_DIRTY = "ram.commit_dirty"  # true or false
PARENT = "mlflow.parentRunId"  # MLflow's own

# Tags of the parent run.
DEVICE = "ram.device"  # of the last run: what it trained on, and how many trials shared a GPU, in words
STATUS = "ram.status"  # running, finished, stopped or failed
TRIALS = "ram.trials"  # number of trials asked for
PUBLISHED = "ram.published"  # "trial 7": the trial whose model the study has logged
BEST = "best."  # then a field of Config: its value in the best configuration. No param, because those never change

# Tags of a trial.
TRIAL = "ram.trial"  # its number, from 0
ORIGIN = "ram.origin"  # of its configuration: see study.designs
ROW = "ram.row"  # a row of a fixed design, as text for people
BASELINE = "ram.baseline"  # design ofat: the name of the baseline; replicate: best, default or empty
PARAMETER = "ram.parameter"  # design ofat: the field that differs from the baseline; empty for the baseline itself
SEEDS = "ram.seeds"  # "0,1"
STATE = "ram.state"  # running, complete, pruned or failed
STOP_REASON = "ram.stop_reason"
DIVERGED = "ram.diverged"  # true if a loss or a gradient was not finite; else absent
TRACKED_EPOCHS = "ram.tracked_epochs"  # epochs that MLflow holds

# Metrics.
OBJECTIVE = "val_accuracy"  # mean over seeds, a fraction
OBJECTIVE_SD = "val_accuracy_sd"  # standard deviation over seeds; only with two seeds or more
SEED_ACCURACY = "val_accuracy.seed_"  # then the seed
TEST_ACCURACY = "test_accuracy"
SEED_TEST_ACCURACY = "test_accuracy.seed_"  # then the seed
PARAMETERS, MACS = "parameters", "macs"  # of one network; multiply-accumulates an image
EPOCH_MEANS = ("val_loss", "train_loss", "train_accuracy", "reward", "baseline_error", "gradient_norm")
EPOCH_SECONDS = "epoch_seconds"
# Also of the parent run: OBJECTIVE and TEST_ACCURACY, of the best configuration of a finished study.
TRIALS_FINISHED, BEST_OBJECTIVE = "trials_finished", "best_val_accuracy"  # of the parent run

# Artifacts of the parent run.
SETTINGS_FILE = "study.json"
SPACE_FILE = "space.json"
BEST_CONFIG_FILE = "best_config.json"
MODEL = "model"
