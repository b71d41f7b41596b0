"""What a study tracks, by name: plain data that the writer (`study.tracking`) and the reader (`analysis.load`) share.

One MLflow experiment holds all studies: a parent run a study, a child run a trial. A child's params are the fields of
`Config`. Mean metrics of an epoch carry the epoch as their step.
"""

from __future__ import annotations

VERSION = 2  # of what is below; 1 had ram.arm for ram.origin and no baseline, parameter or diverged
EXPERIMENT = "ram-study"
DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"  # in the working directory, where `mlflow ui` looks

# Tags of the parent run and of its children.
KIND = "ram.kind"  # study or trial
STUDY = "ram.study"  # the study's name
UID = "ram.uid"  # the study's own id, which tells two studies of one name apart
SCHEMA = "ram.schema"  # VERSION
COMMIT = "ram.commit"
COMMIT_DIRTY = "ram.commit_dirty"  # true or false
PARENT = "mlflow.parentRunId"  # MLflow's own

# Tags of the parent run.
STATUS = "ram.status"  # one of STATUSES
TRIALS = "ram.trials"  # how many the study is to have
PUBLISHED = "ram.published"  # which trial's model the study has logged

# Tags of a trial.
TRIAL = "ram.trial"  # its number, from 0
ORIGIN = "ram.origin"  # what chose its configuration: see study.designs
ROW = "ram.row"  # of a fixed design, for people
BASELINE = "ram.baseline"  # of one factor at a time: around which baseline
PARAMETER = "ram.parameter"  # of one factor at a time: the one field that differs from the baseline; empty: none does
SEEDS = "ram.seeds"  # "0,1"
STATE = "ram.state"  # one of STATES
STOP_REASON = "ram.stop_reason"
DIVERGED = "ram.diverged"  # true: it ended because a loss or a gradient was not finite
TRACKED_EPOCHS = "ram.tracked_epochs"

STATUSES = ("running", "finished", "stopped", "failed")
STATES = ("running", "complete", "pruned", "failed")

# Metrics.
OBJECTIVE = "val_accuracy"  # mean over seeds, a fraction
OBJECTIVE_SD = "val_accuracy_sd"  # standard deviation over seeds; only with two seeds or more
SEED_ACCURACY = "val_accuracy.seed_"  # then the seed
TEST_ACCURACY = "test_accuracy"
SEED_TEST_ACCURACY = "test_accuracy.seed_"  # then the seed
PARAMETERS, MACS = "parameters", "macs"  # of one network; multiply-accumulates an image
EPOCH_MEANS = ("val_loss", "train_loss", "train_accuracy", "reward", "baseline_error", "gradient_norm")
EPOCH_SECONDS = "epoch_seconds"
TRIALS_FINISHED, BEST_OBJECTIVE = "trials_finished", "best_val_accuracy"  # of the parent run

# Artifacts of the parent run.
SETTINGS_FILE = "study.json"
SPACE_FILE = "space.json"
BEST_CONFIG_FILE = "best_config.json"
MODEL = "model"
