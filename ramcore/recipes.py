"""Named starting points: every other setting is a field of Config away."""

from __future__ import annotations

from ramcore.config import Config

# The papers' network and loss at the case study's own setting (section 3.2): Adam 3e-4, batches of 100, 100 epochs.
PAPER = Config(epochs=100)

# The same glimpse budget with what helped on validation data; results/LOG.md has the measurements.
TUNED = Config(
    input_gain=4.0,
    glimpse_size=256,
    location_input="state+paths",
    location_hidden=128,
    location_std_end=0.3,
    reward="probability",
    reward_steps="every",
    discount=0.0,
    step_supervision=0.5,
    reinforce_weight=0.1,
    learning_rate=1e-3,
    schedule="cosine",
    gradient_clip=5.0,
    epochs=30,
)

RECIPES = {"tuned": TUNED, "paper": PAPER}
