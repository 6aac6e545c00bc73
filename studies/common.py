"""What the studies share: flags, seeds, paired intervals and verdicts, tables, where evidence goes.

A study is a file with one question. Its docstring has the command, the minutes and the rule of the
verdict. Its trainings are cells that are kept when finished (data.run_cells): a study that was
killed goes on with --resume.
"""

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass
class StudyArgs:
    task: str = ""
    """what is studied; each study has its own default"""
    seed: int = 1
    """first training seed"""
    seeds: int = 3
    """trainings of every variant: seed, seed + 1, ..; a verdict needs three"""
    fast: bool = False
    """tiny budgets: the whole study in a minute, to see that it runs; leaves results/ alone"""
    device: str = "auto"
    """auto, cpu or cuda"""
    compile: bool = False
    """torch.compile for the losses"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes: for roll-outs, and on a CPU for trainings side by side"""
    resume: str | None = None
    """continue the study in this folder; cells that are finished are not run again"""
    save_every: float = 60.0
    """seconds between checkpoints"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""


def open_run(name, args):
    """(args, Run) of the study called `name`; reads --resume, checks ranges, says what begins."""
    args = data.resumed(args)
    data.check_ranges(
        args, dict(seed=(0, None), seeds=(1, None), workers=(1, None), save_every=(0, None))
    )
    run = data.Run(name, args)
    names = [f.name for f in dataclasses.fields(args)]
    changed = {
        n: getattr(args, n) for n in names if n not in ("task", "resume", "track", "save_every")
    }
    print(
        f"{name} on {args.task}: "
        + ", ".join(f"{k} {v}" for k, v in changed.items())
        + f"; folder {run.dir}",
        flush=True,
    )
    return args, run


def seeds_of(args):
    """[seed, seed + 1, ..]"""
    return list(range(args.seed, args.seed + args.seeds))


def paired(ours, theirs, reps=2000):
    """Mean of ours - theirs, both (runs, tasks) of equal seeds, and its 95 % interval over runs.

    Returns (difference, low, high); with one run low == high, which is no interval."""
    change = np.asarray(ours, float) - np.asarray(theirs, float)
    low, high = data.bootstrap_ci(change.reshape(len(change), -1), np.mean, reps)
    return float(change.mean()), low, high


def verdict(low, high, expected, runs):
    """Of the claim that a difference has the sign `expected` (+1, -1); interval over `runs`."""
    if runs < 3 or low <= 0 <= high:
        return "undecided"
    return "holds" if expected * low > 0 else "fails"


def spread_of(values):
    """'mean [low, high]' over seeds, or the one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return f"{values.mean():.3f}"
    low, high = data.bootstrap_ci(values[:, None], np.mean)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def show(rows, columns, digits=3):
    """Print rows (dicts) as a table; columns {key: heading}; numbers get `digits`, None is -."""

    def word(x):
        if x is None:
            return "-"
        return f"{x:,.{digits}f}" if isinstance(x, float) else str(x)

    cells = [list(columns.values())] + [[word(r.get(k)) for k in columns] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print()
    for line in cells:
        print(
            "  ".join(
                x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))
            )
        )


def judge(checks):
    """Print {sentence: bool} with yes or NO; returns "reproduced" or "not reproduced"."""
    print()
    for sentence, holds in checks.items():
        print(f"{'yes' if holds else 'NO ':4} {sentence}")
    return "reproduced" if all(checks.values()) else "not reproduced"


def figure(width, height, rows=1, cols=1, **options):
    """(figure, axes) of matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, cols, figsize=(width, height), layout="constrained", **options)


def save_figure(fig, path, dpi=110):
    """Write a figure and forget it."""
    import matplotlib.pyplot as plt

    fig.savefig(path, dpi=dpi)
    plt.close(fig)


def finish(run, name, result, figures=()):
    """results.json in the run's folder; unless --fast, also results/<name>.json, and the figures
    (names of files in that folder) as results/<name>_<figure>. Returns what the file holds."""
    result = run.finish(result)
    if result and not run.args.fast and RESULTS.is_dir():
        copies = {"results.json": f"{name}.json"} | {f: f"{name}_{f}" for f in figures}
        for ours, theirs in copies.items():
            shutil.copy(run.dir / ours, RESULTS / theirs)
        print("evidence:", *(f"results/{x}" for x in copies.values()))
    return result


def command(Args, doc, main):
    """The last line of a study: flags from the command line, then main."""
    import tyro

    main(tyro.cli(Args, description=doc, prog=f"python -m studies.{Path(sys.argv[0]).stem}"))
