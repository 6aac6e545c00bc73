"""What does a run of ed2.py look like: error against horizon, and which actions are alike?

    python -m studies.ed2_figures --folder runs/walker-walk__ed2__1__1700000000      # seconds

horizon.png: means and seeds of each model beside two naive predictions: nothing changes, and ridge
regression of changes. partition.png: similarity of the actuators' effects on random data, in the
order of the groups. Both are written into the run's folder. No verdict: ed2.py gives it.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import ed2
import envs
from studies import common
from studies.ed2_cores import ridge

LABELS = {"single": "one model", "ed2": "ED2, equal parameters"}


@dataclass
class Args:
    folder: str = ""
    """a finished run of ed2.py; with --fast one is made"""
    fast: bool = False
    """make a tiny run of ed2.py first"""


@torch.no_grad()
def linear_errors(args, folder):
    """{horizon: held-out error of a ridge regression of changes}: latents' MSE, or states' NMSE.

    On the samples on which ed2.py measured the models of the first seed.
    """
    task, wm = args.task, args.wm
    made = Path(folder) / "data" / task
    replay = ed2.make_data(task, made, args.data_steps, 1, args.data_dir)[1]
    steps, batch = (10, 2048) if wm == "tdmpc2" else (ed2.CONTEXT + 44, 128)
    sampler = replay.sampler([task], steps, "cpu", held_out=0.1)
    generator = torch.Generator().manual_seed(0)
    x, act, *_ = sampler.sequences(batch, generator)
    y, y_act, *_ = sampler.sequences(batch, generator, held_out=True)
    first = 0
    if wm == "tdmpc2":
        encoder = ed2.tdmpc2_encoder(x.shape[-1], ed2.TDMPC2_SIZES[args.model_size][0])
        file = Path(folder) / "encoders" / f"{task}-s{args.seed}.pt"
        encoder.load_state_dict(torch.load(file, "cpu", weights_only=True))
        x, y = encoder(x), encoder(y)
    else:
        first = ed2.CONTEXT - 1
    inputs = torch.cat([x[:-1], act], -1).flatten(0, 1)
    weights = ridge(inputs, (x[1:] - x[:-1]).flatten(0, 1))
    y, now, out = y.double().numpy(), y[first].double().numpy(), {}
    spread = y.reshape(-1, y.shape[-1]).var(0)
    for h in range(1, max(ed2.HORIZONS[wm]) + 1):
        step = y_act[first + h - 1].double().numpy()
        now = now + np.c_[now, step, np.ones(len(now))] @ weights
        true = y[first + h]
        if h in ed2.HORIZONS[wm]:
            latent = float(((now - true) ** 2).mean())
            out[h] = latent if wm == "tdmpc2" else ed2.nmse(now, true, spread)
    return out


def plot_horizons(results, wm, linear, path):
    """Error against open-loop horizon; results {variant: cells}, linear {horizon: error}."""
    stem, steps = "nmse" if wm == "dreamerv3" else "mse", ed2.HORIZONS[wm]
    fig, ax = common.figure(5, 3.6)
    for name, cells in results.items():
        y = np.array([[c[f"{stem}_{h}"] for h in steps] for c in cells])
        (line,) = ax.plot(steps, y.mean(0), "-", label=LABELS.get(name, name))
        ax.plot(np.tile(steps, len(y)), y.ravel(), "o", ms=3, alpha=0.5, color=line.get_color())
    still = [results["single"][0][f"persistence_{stem}_{h}"] for h in steps]
    ax.plot(steps, still, "--", lw=1, color="silver", label="persistence")
    if max(linear.values()) < 30 * max(still):  # a diverged linear model hides the rest
        ax.plot(steps, [linear[h] for h in steps], "--", lw=1, color="gray", label="linear")
    unit = "state error / variance" if stem == "nmse" else "latent mean squared error"
    ax.set(xlabel="open-loop steps", ylabel=unit, xscale="log", yscale="log", xticks=steps,
           xticklabels=steps)
    ax.minorticks_off()
    ax.legend(fontsize=8)
    common.save_figure(fig, path)


def actuator_names(task):
    """Names of the actions, or their numbers."""
    env = envs.make_env(task)
    model = getattr(getattr(env, "_physics", None), "model", None)
    n = envs.task_facts(task).act_dim
    names = [model and model.id2name(i, "actuator") or str(i) for i in range(n)]
    env.close()
    return names


def plot_partition(task, random, groups, path):
    """Similarity of the actuators, in the order of the groups, each group framed in its colour."""
    import matplotlib.pyplot as plt
    names, order = actuator_names(task), [j for g in groups for j in g]
    _, act, delta = ed2.transitions(random, task)
    sim = ed2.cosine(ed2.pearson_features(act, delta))[np.ix_(order, order)]
    fig, ax = common.figure(2.4 + 0.32 * len(order), 1.6 + 0.32 * len(order))
    image = ax.imshow(sim, vmin=0, vmax=1, cmap="Greys")
    ax.set_xticks(range(len(order)), [names[j] for j in order], rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(len(order)), [f"{names[j]} ({j})" for j in order], fontsize=8)
    at = 0
    for i, g in enumerate(groups):
        color = plt.get_cmap("tab10")(i % 10)
        box = plt.Rectangle((at - 0.5, at - 0.5), len(g), len(g), fill=False, ec=color, lw=2.5)
        ax.add_patch(box)
        for t in range(at, at + len(g)):
            ax.get_xticklabels()[t].set_color(color)
            ax.get_yticklabels()[t].set_color(color)
        at += len(g)
    fig.colorbar(image, label="similarity of effects", shrink=0.8)
    ax.set_title(f"{task}: {len(groups)} groups", fontsize=10)
    common.save_figure(fig, path)


def main(args):
    """Draw both figures; returns {folder, linear: errors of the linear prediction}."""
    folder = args.folder
    if args.fast and not folder:
        folder = ed2.main(ed2.Args(task="cheetah-run", fast=True, seeds=2, device="cpu"))["folder"]
    file = Path(folder or "nowhere") / "results.json"
    if not file.exists():
        raise SystemExit(f"--folder {folder or 'is missing'}: expected a finished run of ed2.py, a "
                         "folder with results.json such as runs/walker-walk__ed2__1__1700000000")
    result = json.loads(file.read_text())
    inner = ed2.Args(**result["args"])
    linear = linear_errors(inner, folder)
    paired = [c for c in result["cells"] if c["regime"] != "joint"]
    results = {v: [c for c in paired if c["variant"] == v]
               for v in dict.fromkeys(c["variant"] for c in paired)}
    plot_horizons(results, inner.wm, linear, Path(folder) / "horizon.png")
    random = data.Episodes.open(Path(folder) / "data" / inner.task / "random", [inner.task])
    plot_partition(inner.task, random, result["partition"], Path(folder) / "partition.png")
    print(f"figures: {folder}/horizon.png {folder}/partition.png; linear prediction: {linear}")
    return dict(folder=str(folder), linear=linear)


if __name__ == "__main__":
    common.command(Args, __doc__, main)
