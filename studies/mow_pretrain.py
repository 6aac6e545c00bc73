"""What is play without rewards worth once rewards come?

    python -m studies.mow_pretrain          # two games, 3 seeds: 40 minutes on two cores

A world model of all tasks first learns images and dynamics only (`reward_free`), or rewards as well
(`rewards`), or nothing (`scratch`); then all three learn everything for half as many updates. One
cluster, measured on held-out random play.

Rule: as in mow_transfer, by the area under the curve of losses against scratch's.
"""
from dataclasses import dataclass

import numpy as np

from studies import mow_diagnosis as lab
from studies.common import command, finish, open_run, show
from studies.mow_transfer import against_scratch, judged, plot


@dataclass
class Args(lab.ModelArgs):
    task: str = "Boxing,Krull"
    """games, as in mow.py"""
    random_steps: int = 1000
    """steps of random play per task"""
    warmup: int = 400
    """updates before the rewards come"""
    updates: int = 200
    """updates with them"""


def work(name, cell, folder):
    variant, batches = cell["variant"], cell["batches"]
    agent, frames, test = lab.begin(cell)
    tasks, curve, scores = list(range(agent.K)), [], []
    agent.scored = variant != "reward_free"
    lab.learn(agent, frames, 0 if variant == "scratch" else agent.args.warmup)
    agent.scored, start = True, agent.updates
    steps = np.linspace(0, agent.total - agent.args.warmup, 11).round().astype(int).tolist()
    for step in steps:
        lab.learn(agent, frames, start + step)
        curve.append(float(np.mean(lab.held_out_loss(agent, frames, tasks, test, batches))))
        only = lab.held_out_loss(agent, frames, tasks, test, batches, only=("rew", "end"))
        scores.append(float(np.mean(only)))
    return lab.fidelity(agent, frames, test, batches) | {
        "variant": variant, "seed": cell["seed"], "updates": steps, "loss": curve,
        "scores": scores, "scores_first": scores[0], "scores_last": scores[-1]}


def main(args):
    args, run = open_run("mow_pretrain", lab.quick(args))
    variants = dict.fromkeys(("scratch", "rewards", "reward_free"), dict(clusters=1))
    found = lab.run_cells(work, lab.plan(args, run, variants), run, args)
    against_scratch(found, args.updates)
    rows = judged(lab.over_seeds(found, ("zero_shot", "final", "auc_ratio", "until_scratch",
                                     "scores_first", "scores_last", "psnr", "ssim",
                                     "open_loop_psnr", "dyn_kl")), found)
    plot(found, "updates with rewards", run.dir / "curve.png")
    print(f"\n{args.warmup} updates before, {args.updates} with rewards. Until scratch: share of "
          "the updates until as good as scratch's end")
    show(rows, {"variant": "variant", "zero_shot": "first loss", "final": "last loss",
                "auc_ratio": "area / scratch", "auc_ratio_sd": "+-",
                "until_scratch": "until scratch", "scores_first": "first, rewards and ends",
                "scores_last": "last", "open_loop_psnr": "open loop", "ssim": "SSIM",
                "dyn_kl": "KL", "verdict": "verdict"})
    return finish(run, "mow_pretrain", dict(rows=rows, cells=found), ["curve.png"])


if __name__ == "__main__":
    command(Args, __doc__, main)
