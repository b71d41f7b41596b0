"""python -m ramcore.train: train one configuration, print its accuracy, draw its glimpses."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from ramcore.config import Config
from ramcore.cost import cost
from ramcore.errors import UserError
from ramcore.pictures import draw_glimpses, glimpse_paths
from ramcore.recipes import RECIPES
from ramcore.sources import load_task
from ramcore.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train Recurrent Attention Models of one configuration, one a seed, and test the best epoch of each."""

    recipe: str = "tuned"
    """Where the settings below start from: tuned (what helped on validation data) or paper (the case study's)."""
    config: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=lambda: RECIPES["tuned"])
    """Settings of the run."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED [SEED ...]")] = (0,)
    """Replicates to train side by side, one a seed."""
    data_dir: Path | None = None
    """Folder with the data set's IDX files; else $RAM_DATA_DIR, the per-user cache, a download."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train: cpu or cuda."""
    threads: int = 0
    """CPU threads; 0: as many as torch finds."""
    out: Path = Path("runs/single")
    """Folder for the best weights (best.pt) and the picture of the glimpses (glimpses.png)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 bad usage or data, 1 every seed diverged."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="tuned")
    recipe = first.parse_known_args(arguments)[0].recipe
    try:
        if recipe not in RECIPES:
            raise UserError(f"--recipe must be one of {', '.join(RECIPES)}; got {recipe!r}")
        args = tyro.cli(Arguments, args=arguments, default=Arguments(config=RECIPES[recipe]), prog="ramcore.train")
        return train(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train(args: Arguments) -> int:
    """Train, test, draw. Raises UserError and UserError before any work starts."""
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda; got {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use; it finds none: use --device cpu")
    if args.threads < 0:
        raise UserError(f"--threads must be at least 0; got {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out must be a folder that can be written; {args.out}: {error.strerror}") from error
    config = args.config
    data = load_task(config, args.data_dir, args.device)
    trainer = Trainer(config, data, args.seeds, args.device)
    parameters, macs = cost(config)
    print(f"{config.model} on {config.task} {config.data}: {parameters:,} parameters, {macs:,} MACs an image")
    bar = tqdm(total=config.epochs, unit="epoch", file=sys.stderr, disable=None)
    for _ in range(config.epochs):
        metrics = trainer.epoch()
        bar.set_postfix_str(f"validation {_percent(metrics.val_accuracy)}")
        bar.update()
        if not sys.stderr.isatty():
            line = f"epoch {metrics.epoch}/{config.epochs}: validation {_percent(metrics.val_accuracy)}, "
            print(line + f"{metrics.seconds:.1f} s", file=sys.stderr, flush=True)
        if all(metrics.diverged):
            break
    bar.close()
    validation, test = trainer.evaluate("validation"), trainer.evaluate("test")
    for r, seed in enumerate(args.seeds):
        print(
            f"seed {seed}: validation {validation.accuracy[r]:.2%} at epoch {trainer.best_epoch[r]}, "
            f"test {test.accuracy[r]:.2%}"
        )
    best = max(range(len(args.seeds)), key=lambda r: validation.accuracy[r])
    weights = trainer.best_weights(best)
    torch.save(weights, args.out / "best.pt")
    print(f"weights: {args.out / 'best.pt'}")
    if config.model == "ram":
        figure = draw_glimpses(config, glimpse_paths(config, weights, data))
        figure.savefig(args.out / "glimpses.png", dpi=150)
        print(f"picture: {args.out / 'glimpses.png'}")
    if all(e == 0 for e in trainer.best_epoch):
        print("error: every seed diverged before its first validation; lower learning_rate", file=sys.stderr)
        return 1
    return 0


def _percent(values: tuple[float, ...]) -> str:
    return " ".join(f"{v:.2%}" for v in values)


if __name__ == "__main__":
    sys.exit(main())
