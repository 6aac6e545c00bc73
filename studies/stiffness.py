"""Fig. 7a: what do stiff contacts cost SHAC, whose gradients go through them, and PWM, whose do
not?

SHAC through the true planar hopper and PWM through models of it, on soft and on five times stiffer
contacts. All is trained anew on each.

    python -m studies.stiffness           # 114 minutes on a thread: SHAC loses 62 %, PWM 10.5 %
    python -m studies.stiffness --fast    # under a minute

Verdict: reproduced if, over three seeds or more, SHAC's mean return falls by more than a fifth (the
paper's by 48 per cent) and PWM's by less than a tenth. Deviations: a planar hopper with the contact
springs of the paper's simulator and the masses of gymnasium's; no PPO.
"""
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import data
import pwm
from studies import shac
from studies.common import StudyArgs, command, finish, judge, open_run, seeds_of, show

TASKS = "planar-hopper", "stiff-hopper"
SHAC = dict(horizon=32, rounds=4, policy_steps=120)
PWM = dict(rounds=30, wm_steps=4000, policy_steps=1080)
FAST = dict(rounds=1, seed_episodes=1, round_episodes=1, wm_steps=2, wm_batch=4, policy_steps=2,
            policy_batch=2, horizon=2, eval_episodes=1)


@dataclass
class Args(StudyArgs):
    task: str = "planar-hopper,stiff-hopper"
    """the soft and the stiff plant, of studies.plants"""


def work(name, cell, folder):
    """One training: cell {method, task, seed, fast}; returns its returns and what it learned on."""
    inside, task = Path(folder) / "cells" / name, f"studies.plants:{cell['task']}"
    inside.mkdir(parents=True, exist_ok=True)
    base = shac.Args(cell["task"], cell["seed"], fast=cell["fast"], device="cpu", workers=1)
    with open(inside / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        if cell["method"] == "SHAC":
            result = shac.train(base, inside, **SHAC)
        else:
            flags = FAST if cell["fast"] else PWM
            made = pwm.Args(task=task, seed=cell["seed"], device="cpu", compile=False, workers=1)
            result = pwm.main(replace(made, **flags), inside=inside)
    return dict(seed=cell["seed"], method=cell["method"], returns=result["episodes"]["ours"][task],
                args=result["args"])


def main(args):
    """Train all cells, print the table and the verdict; returns what results.json holds."""
    args, run = open_run("stiffness", args)
    cells = {}
    for method in ("SHAC", "PWM"):
        for task in TASKS:
            for seed in seeds_of(args):
                cell = dict(method=method, task=task, seed=seed, fast=args.fast)
                cells[f"{method}-{task}-{seed}"] = cell
    made, rows = data.run_cells(work, cells, run.dir, args.workers), []
    for method in ("SHAC", "PWM"):
        mine = {t: [made[f"{method}-{t}-{s}"]["returns"] for s in seeds_of(args)] for t in TASKS}
        returns = {t: [float(np.mean(x)) for x in runs] for t, runs in mine.items()}
        soft, stiff = (float(np.mean(returns[t])) for t in TASKS)
        drop = 1 - stiff / soft
        rows.append(dict(method=method, soft=soft, stiff=stiff, drop=drop, returns=returns))
    show(rows, dict(method="method", soft="soft", stiff="stiff", drop="loss"), 3)
    ours, theirs = rows[1]["drop"], rows[0]["drop"]
    verdict = judge({f"three seeds or more: {args.seeds}": args.seeds >= 3,
                     f"SHAC loses by stiff contacts (paper: 48 %): {theirs:.1%}": theirs > 0.2,
                     f"PWM does not: {ours:.1%}": ours < 0.1})
    return finish(run, "stiffness", dict(verdict=verdict, rows=rows, cells=made))


if __name__ == "__main__":
    command(Args, __doc__, main)
