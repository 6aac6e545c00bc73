"""What does a new task gain from a world model of other tasks, and what do these forget?

    python -m studies.mow_transfer                                # Boxing at another difficulty
    python -m studies.mow_transfer --task Boxing,Krull,mw-reach   # a robot after games

A model of all tasks but the last learns that last, new one. The new task gets an embedding and
joins the old cluster whose modules fit it best; then all of the model learns, or all but the
experts, or all but the VAE. new_cluster: modules of its own, as they were after the warm-up, while
all that tasks share is frozen. scratch: the same sizes, never trained on the old tasks. Losses of
the world model on held-out random play, not returns; an hour for 3 seeds on two cores.

Rule: pre-training `helps` a variant if the ratio of the area under its curve of losses to that of
scratch is below 1 in every seed, and `hurts` if it is above 1 in every seed; three seeds or more.
"""
from dataclasses import dataclass

import numpy as np
import torch

import mow
from data import save_torch
from studies import mow_diagnosis as lab
from studies.common import command, figure, finish, open_run, save_figure, seeds_of, show


@dataclass
class Args(lab.ModelArgs):
    task: str = "Boxing,Krull,Boxing@m0d1"
    """games, as in mow.py; the last is the new one"""


FROZEN = {  # variants: parts of the world model that do not learn the new task
    "scratch": (), "all": (), "freeze_experts": ("mix", "experts"), "freeze_vae": ("vaes",),
    "new_cluster": ("mix", "experts", "router", "join", "shared")}


def pretrain(cell, path):
    """The model of the old tasks and the cluster of each, last of the new task, in a file."""
    agent, frames, _ = lab.begin(cell)
    old, spare = list(range(agent.K - 1)), agent.args.clusters - 1
    lab.learn(agent, frames, agent.args.warmup, old)
    grads = mow.task_gradients(agent, frames, 2 if cell["batches"] == 1 else 32)
    agent.clone_modules(mow.cluster_tasks(grads[old], spare) + [spare])
    lab.learn(agent, frames, agent.total, old)
    labels, fit = list(agent.wm.labels[:-1]), []
    for c in range(spare):
        agent.wm.assign([*labels, c])
        fit += lab.held_out_loss(agent, frames, [agent.K - 1], batches=cell["batches"])
    saved = {"model": agent.wm.state_dict(), "labels": [*labels, int(np.argmin(fit))]}
    save_torch(path, saved)


def work(name, cell, folder):
    variant, batches = cell["variant"], cell["batches"]
    agent, frames, test = lab.begin(cell)
    new, old, total = agent.K - 1, list(range(agent.K - 1)), agent.total
    budget = total // 2
    saved = torch.load(folder / f"model_{cell['seed']}.pt", weights_only=True)
    agent.balance = agent.task_coef = 0.0  # terms that compare tasks
    if variant != "scratch":
        agent.wm.load_state_dict(saved["model"])
        agent.updates = total  # the router's temperature has fallen
    own = agent.args.clusters - 1 if variant == "new_cluster" else saved["labels"][new]
    agent.wm.assign([*saved["labels"][:new], own])
    for part, p in agent.wm.named_parameters():
        p.requires_grad_(not part.startswith(FROZEN[variant]))
    steps, curve = np.linspace(0, budget, 11).round().astype(int).tolist(), []
    before, start = lab.held_out_loss(agent, frames, old, test, batches), agent.updates
    for step in steps:
        lab.learn(agent, frames, start + step, [new])
        curve += lab.held_out_loss(agent, frames, [new], test, batches)
    forgot = np.array(lab.held_out_loss(agent, frames, old, test, batches)) / before - 1
    good = {x: v[new] for x, v in lab.fidelity(agent, frames, test, batches).items()}
    return good | {"variant": variant, "seed": cell["seed"], "updates": steps, "loss": curve,
                   "forgetting": None if variant == "scratch" else forgot.tolist(), "cluster": own}


def against_scratch(found, budget):
    """Add to every cell how its curve of losses compares with that of the cell `scratch` of its
    seed: first and last loss, ratio of the areas, share of the budget until it is as good as
    scratch's end (None: never)."""
    for f in found.values():
        scratch = found[f"scratch_s{f['seed']}"]["loss"]
        reached = [u for u, x in zip(f["updates"], f["loss"]) if x <= scratch[-1]]
        f |= {"zero_shot": f["loss"][0], "final": f["loss"][-1],
              "auc_ratio": sum(f["loss"][1:]) / sum(scratch[1:]),
              "until_scratch": reached[0] / budget if reached else None}


def judged(rows, found):
    """Add the verdict of the ratio of areas to every row but scratch."""
    for row in rows:
        ratios = [f["auc_ratio"] for f in found.values() if f["variant"] == row["variant"]]
        if row["variant"] == "scratch":
            row["verdict"] = None
        elif len(ratios) < 3 or min(ratios) <= 1 <= max(ratios):
            row["verdict"] = "undecided"
        else:
            row["verdict"] = "helps" if max(ratios) < 1 else "hurts"
    return rows


def plot(found, label, path):
    """Held-out loss over updates, mean over seeds."""
    fig, ax = figure(6, 4)
    for variant in dict.fromkeys(f["variant"] for f in found.values()):
        mine = [f for f in found.values() if f["variant"] == variant]
        ax.semilogy(mine[0]["updates"], np.mean([f["loss"] for f in mine], 0), label=variant,
                    marker=".", ls="--" if variant.startswith("freeze") else "-")
    ax.set(xlabel=label, ylabel="held-out loss of the world model")
    ax.legend(fontsize=8)
    save_figure(fig, path)


def main(args):
    args, run = open_run("mow_transfer", lab.quick(args))
    tasks = mow.task_list(args.task)
    if len(tasks) < 2:
        raise SystemExit(f"--task {args.task}: expected two or more, the new one last, for example "
                         "Boxing,Krull,Boxing@m0d1")
    usual = lab.plan(args, run, {"all": {}})
    clusters = next(iter(usual.values()))["args"]["clusters"]
    spare = dict(clusters=min(clusters, len(tasks) - 1) + 1)  # the last is for the new task
    cells = lab.plan(args, run, dict.fromkeys(FROZEN, spare))
    for seed in seeds_of(args):
        if not (run.dir / f"model_{seed}.pt").exists():
            pretrain(cells[f"all_s{seed}"], run.dir / f"model_{seed}.pt")
    found = lab.run_cells(work, cells, run, args)
    budget = (args.warmup + args.updates) // 2
    against_scratch(found, budget)
    rows = judged(lab.over_seeds(found, ("zero_shot", "final", "auc_ratio", "until_scratch", "psnr",
                                     "ssim", "open_loop_psnr", "dyn_kl", "forgetting")), found)
    plot(found, f"updates on {tasks[-1]}", run.dir / "curve.png")
    print(f"\n{tasks[-1]} after {', '.join(tasks[:-1])}: {args.warmup + args.updates} updates "
          f"before, {budget} on the new task. Until scratch: share of the updates until as good as "
          "scratch's end")
    show(rows, {"variant": "variant", "zero_shot": "first loss", "final": "last loss",
                "auc_ratio": "area / scratch", "auc_ratio_sd": "+-",
                "until_scratch": "until scratch", "open_loop_psnr": "open loop", "ssim": "SSIM",
                "dyn_kl": "KL", "forgetting": "change of old tasks", "verdict": "verdict"})
    far = "_far" if tasks[-1].startswith("mw-") else ""  # a robot after games
    return finish(run, f"mow_transfer{far}", dict(rows=rows, cells=found), ["curve.png"])


if __name__ == "__main__":
    command(Args, __doc__, main)
