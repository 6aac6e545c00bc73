"""Which tasks are alike, and are the clusters stable?  Warm-up and clustering of MoW alone.

    python -m studies.mow_clusters                     # 26 games, 3 seeds: an hour on two cores
    python -m studies.mow_clusters --reduce mean       # compare only the mean of a layer's gradient

Several seeds of data and networks; for each number of clusters the silhouette, and the adjusted
Rand index between seeds, and between half and all of the warm-up.

Rule: clusters are `stable` at a number of clusters if the mean index between seeds is 0.5 or more.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np

import mow
from studies.common import command, figure, finish, open_run, save_figure, show
from studies.mow_diagnosis import ModelArgs, begin, learn, plan, quick, run_cells

COUNTS = 2, 3, 6, 12, 24


@dataclass
class Args(ModelArgs):
    task: str = "atari26"
    """games, as in mow.py"""
    clusters: int = 12
    """number of clusters in the figure"""
    reduce: Literal["sketch", "mean"] = "sketch"
    """what is compared of a layer: the gradient's direction, or only its mean"""
    warmup: int = 120
    """updates before the tasks are clustered"""
    updates: int = 0
    """none after that"""
    batch: int = 1
    """sequences per task and update"""


def silhouette(sim, labels):
    """Mean silhouette width of labels (K,) for distances 1 - sim (K, K); 1 = far apart."""
    labels, widths = np.asarray(labels), []
    for k in range(len(labels)):
        others = np.arange(len(labels)) != k
        mean = {c: (1 - sim[k])[(labels == c) & others] for c in set(labels.tolist())}
        own = mean.pop(labels[k])
        if not len(own) or not mean:
            widths.append(0.0)
            continue
        a, b = own.mean(), min(x.mean() for x in mean.values())
        widths.append((b - a) / max(a, b, 1e-12))
    return float(np.mean(widths))


def adjusted_rand(p, q):
    """Adjusted Rand index of two labelings of the same tasks: 1 = the same, 0 = as by chance."""
    table = np.zeros((max(p) + 1, max(q) + 1))
    np.add.at(table, (np.asarray(p), np.asarray(q)), 1)

    def pairs(x):
        return float((x * (x - 1) / 2).sum())

    both, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = a * b / max(pairs(np.array([len(p)])), 1)
    same = (a + b) / 2 == expected
    return 1.0 if same else (both - expected) / ((a + b) / 2 - expected)


def mean_ari(pairs):
    """Mean adjusted Rand index of pairs of labelings, None if there are none."""
    return float(np.mean([adjusted_rand(p, q) for p, q in pairs])) if pairs else None


def work(name, cell, folder):
    agent, frames, _ = begin(cell)
    found = {"variant": "clusters", "seed": cell["seed"]}
    for share, until in (("half", agent.args.warmup // 2), ("all", agent.args.warmup)):
        learn(agent, frames, until, rows=frames.count)
        reduce = mow.sketch if cell["reduce"] == "sketch" else lambda g: g.mean()
        grads = mow.task_gradients(agent, frames, 2 if cell["batches"] == 1 else 32, reduce)
        sim = mow.task_similarity(grads)
        labels = {str(n): mow.cluster_tasks(grads, n) for n in cell["counts"]}
        found[share] = {"similarity": sim.tolist(), "labels": labels}
        found[share]["silhouette"] = {n: silhouette(sim, x) for n, x in labels.items()}
    return found


def plot(sim, labels, tasks, path):
    """Cosine of every two tasks' gradients, tasks in the order of their clusters, framed."""
    order = np.argsort(labels, kind="stable")
    fig, ax = figure(2.8 + 0.24 * len(tasks), 1.8 + 0.22 * len(tasks))
    off = sim[~np.eye(len(tasks), dtype=bool)]
    image = ax.imshow(sim[np.ix_(order, order)], cmap="Blues", vmin=min(0, off.min()),
                      vmax=off.max())
    names = [f"{tasks[k]} ({labels[k] + 1})" for k in order]
    ax.set_yticks(range(len(tasks)), names, fontsize=8)
    ax.set_xticks(range(len(tasks)), names, fontsize=8, rotation=90)
    edge = -0.5
    for c in sorted(set(labels)):
        n = labels.count(c)
        ax.plot(edge + n * np.array([0, 1, 1, 0, 0]), edge + n * np.array([0, 0, 1, 1, 0]),
                color="C1", lw=1.5)
        edge += n
    fig.colorbar(image, label="cosine of gradients")
    save_figure(fig, path)


def main(args):
    args, run = open_run("mow_clusters", quick(args))
    tasks = mow.task_list(args.task)
    clusters = min(args.clusters, len(tasks))
    counts = sorted({n for n in COUNTS if n < len(tasks)} | {clusters})
    cells = plan(args, run, {"clusters": dict(clusters=clusters)}, counts=counts,
                 reduce=args.reduce)
    found = list(run_cells(work, cells, run, args).values())
    rows = []
    for n in map(str, counts):
        labels = [f["all"]["labels"][n] for f in found]
        between = [(p, q) for i, p in enumerate(labels) for q in labels[:i]]
        halves = [(f["half"]["labels"][n], f["all"]["labels"][n]) for f in found]
        ari = mean_ari(between)
        rows.append({"clusters": int(n), "ari_seeds": ari, "ari_half_warmup": mean_ari(halves),
                     "silhouette": float(np.mean([f["all"]["silhouette"][n] for f in found])),
                     "verdict": "undecided" if args.seeds < 3 else
                     "stable" if ari >= 0.5 else "not stable"})
    show(rows, {"clusters": "clusters", "silhouette": "silhouette", "ari_seeds": "ARI of seeds",
                "ari_half_warmup": "ARI, half the warm-up", "verdict": "verdict"})
    labels = found[0]["all"]["labels"][str(clusters)]
    plot(np.mean([f["all"]["similarity"] for f in found], 0), labels, tasks,
         run.dir / "clusters.png")
    for c in sorted(set(labels)):
        names = [t for t, label in zip(tasks, labels) if label == c]
        print(f"cluster {c + 1} (seed {args.seed}): {', '.join(names)}")
    return finish(run, "mow_clustering", dict(rows=rows, cells=found), ["clusters.png"])


if __name__ == "__main__":
    command(Args, __doc__, main)
