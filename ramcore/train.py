"""The command `python -m ramcore.train`: train one configuration, print its accuracy, draw its glimpses."""

from __future__ import annotations

from ramcore.errors import UserError, brief, entry_point, parsed, say, show

if __name__ == "__main__":
    entry_point("ramcore.train")

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from ramcore import machine
from ramcore.config import SOURCES, TASKS, Config, read_value
from ramcore.cost import check_memory, cost
from ramcore.data import TaskData
from ramcore.pictures import draw_glimpses, glimpse_paths
from ramcore.recipes import RECIPES
from ramcore.sources import load_images, load_task
from ramcore.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train Recurrent Attention Models of one configuration, one for each seed, and test the best epoch of each."""

    recipe: str = "tuned"
    """The defaults of the settings below: tuned (chosen on validation data) or paper (the case study's)."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=lambda: RECIPES["tuned"])
    """Settings of the run."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = (0,)
    """One replicate is trained for each seed, all at the same time."""
    data_dir: Path | None = None
    """Folder with the data set's IDX files; without it $RAM_DATA_DIR, the per-user cache or a download."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train: cpu or cuda."""
    threads: int = 0
    """CPU threads; 0: torch's own choice."""
    out: Path = Path("runs/single")
    """Folder for the best weights (best.pt) and the picture of the glimpses (glimpses.png)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 bad usage or data, 1 every seed diverged."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, value in (("recipe", "tuned"), ("data", "mnist"), ("task", "translated"), ("canvas", "0")):
        first.add_argument(f"--{flag}", default=value, nargs="?", const=value)  # tyro refuses one without a value
    known, others = first.parse_known_args(arguments)
    try:
        if known.recipe not in RECIPES:
            raise UserError(f"--recipe must be one of {', '.join(RECIPES)}; got {brief(known.recipe)}")
        default, data = Arguments(config=RECIPES[known.recipe]), None
        if known.data not in SOURCES and known.task in TASKS:
            # A configuration holds the images' name and number of classes, which only the images tell.
            data = load_images(known.data, known.task, read_value("canvas", known.canvas))
            default, arguments = replace(default, config=data.configure(default.config)), others
        args = parsed(lambda: tyro.cli(Arguments, args=arguments, default=default, prog="ramcore.train"))
        return train(args, data)
    except UserError as error:
        say(f"error: {error}")
        return 2


def cli() -> int:
    """Entry point."""
    return main()


def train(args: Arguments, own: TaskData | None = None) -> int:
    """Train, test and draw; returns the exit code. `own`: own images. Raises UserError before any training."""
    _check(args)
    config, seeds = args.config, args.seeds
    data = own.to(args.device) if own else load_task(config, args.data_dir, args.device)
    trainer = Trainer(config, data, seeds, args.device)
    parameters, macs = cost(config)
    show(f"{config.model} on {config.task} {config.data}: {parameters:,} parameters, {macs:,} MACs an image")
    _train_epochs(trainer)
    validation, test = trainer.evaluate("validation").accuracy, trainer.evaluate("test").accuracy
    for r, seed in enumerate(seeds):
        show(f"seed {seed}: validation {validation[r]:.2%} at epoch {trainer.best_epoch[r]}, test {test[r]:.2%}")
    best = max(range(len(seeds)), key=lambda r: validation[r])
    _save(args, trainer.best_weights(best), data)
    if not any(trainer.best_epoch):
        say("error: every seed diverged before its first validation; lower learning_rate")
        return 1
    return 0


def _check(args: Arguments) -> None:
    """Check the flags that are no settings, make the folder of --out, and set the threads. Raises UserError."""
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda; got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use; it finds none: use --device cpu")
    if unusable := next((seed for seed in args.seeds if not -(2**63) <= seed < 2**63), None):
        raise UserError(f"--seeds must be whole numbers of 64 bits; got {brief(unusable)}: pass smaller ones")
    check_memory(args.config, len(args.seeds), _memory(args.device))
    if args.threads < 0:
        raise UserError(f"--threads must be at least 0; got {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written; {args.out}: {error.strerror}") from error


def _memory(device: str) -> int:
    """Bytes of memory where a device trains."""
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else machine.memory()


def _train_epochs(trainer: Trainer) -> None:
    """Train all epochs, or until every seed has diverged. Progress goes to stderr: a bar, or a line for each epoch."""
    epochs = trainer.config.epochs
    with tqdm(total=epochs, unit="epoch", file=sys.stderr, disable=None) as bar:
        for _ in range(epochs):
            metrics = trainer.epoch()
            accuracy = "validation " + " ".join(f"{value:.2%}" for value in metrics.val_accuracy)
            bar.set_postfix_str(accuracy)
            bar.update()
            if not sys.stderr.isatty():
                say(f"epoch {metrics.epoch}/{epochs}: {accuracy}, {metrics.seconds:.1f} s")
            if all(metrics.diverged):
                return


def _save(args: Arguments, weights: dict[str, Tensor], data: TaskData) -> None:
    """Write the weights and, for model ram, the picture of its glimpses."""
    torch.save(weights, args.out / "best.pt")
    show(f"weights: {args.out / 'best.pt'}")
    if args.config.model == "ram":
        figure = draw_glimpses(args.config, glimpse_paths(args.config, weights, data))
        figure.savefig(args.out / "glimpses.png", dpi=150)
        show(f"picture: {args.out / 'glimpses.png'}")
