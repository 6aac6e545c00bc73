"""Does ED2 predict better than one model of equal size? Tables 1 and 2 without blank cells.

    python -m studies.ed2_tables                          # 3 hours on 2 cores: a tie on all tasks
    python -m studies.ed2_tables --task walker-walk       # one task of the five: 35 minutes

Sec. 5.1 compares converged dynamics losses of single and decomposed models, the latter with k times
the parameters. Here, on the same data with paired seeds: ED2 of equal parameters, with the controls
random groups, k models that see all actions, ED2 of full width, and one model as large as that.

Verdicts, fixed in advance, per row: win: the 95 % t interval of the relative change of the held-out
error (TD-MPC2: per step, in the latents of one fixed encoder; DreamerV3: decoded state after 15
open-loop steps) against the single model of equal parameters is below zero and the mean is below
both random groups and k unsplit models; loss: above zero; tie: it crosses zero or is under 5 %. The
weaker "reproduces the paper": full-width ED2 is lower in the published metric on most tasks.
Expected: no wins.
"""
from dataclasses import dataclass, replace

import numpy as np

import data
import ed2
from studies import common
from studies.ed2_partitions import random_partition, settings

TASKS = "walker-walk,humanoid-walk,cheetah-run,hopper-hop,walker-run"
UPDATES = {"tdmpc2": 700, "dreamerv3": 500}  # on a CPU
VARIANTS = ("single", "ed2", "random", "nosplit", "ed2_wide", "single_wide")
SEED_METRIC = {"tdmpc2": "logged", "dreamerv3": "dyn"}  # what the paper's tables show
# (baseline, + ED2), converged dynamics losses as published; absent: blank there
PAPER = {"dreamerv3": {"walker-walk": (3.22, 1.84), "humanoid-walk": (6.01, 1.21)},
         "tdmpc2": {"cheetah-run": (5e-5, 4e-5), "hopper-hop": (1e-3, 1e-3),
                    "walker-run": (5e-5, 3e-5)}}


@dataclass
class Args(common.StudyArgs):
    task: str = TASKS
    """tasks with published groups, with commas between"""


def variants(groups, full, count, seed):
    """{variant: (groups, width)}: comparison and controls; full: the single model's width."""
    single = [sorted(j for G in groups for j in G)]
    others = {"ed2": groups, "random": random_partition(groups, seed),
              "nosplit": single * len(groups)}
    found = {"single": (single, full), "ed2_wide": (groups, full)}
    for name, parts in others.items():
        width = ed2.match_width(lambda w, parts=parts: count(parts, w), count(single, full))
        found[name] = parts, width
    width = ed2.match_width(lambda w: count(single, w), count(groups, full))
    found["single_wide"] = single, width
    return {name: found[name] for name in VARIANTS}


def cells_of(args, groups):
    """All trainings of a task: six variants, and TD-MPC2's two published ones, trained jointly."""
    count, full = ed2.counter(args.wm, args.model_size)
    cells = []
    for n in range(args.seeds):
        seed = args.seed + n
        models = variants(groups, full, count, seed)
        cells += ed2.cells_of(replace(args, seed=seed, seeds=1), models)
        if args.wm == "tdmpc2":
            joint = dict(cells[-1], regime="joint", variant="ed2_wide", groups=groups, width=full)
            cells.append(joint)
    return cells


def values(cells, task, variant, metric, regime):
    """The numbers of one variant, in the order of seeds."""
    found = [c for c in cells if (c["task"], c["variant"], c["regime"]) == (task, variant, regime)]
    return [c[metric] for c in sorted(found, key=lambda c: c["seed"])]


def holm(p):
    """Holm's correction for testing several tasks: adjusted p values in the order given."""
    order, out, worst = np.argsort(p), np.zeros(len(p)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out.tolist()


def row_of(wm, cells, task):
    """All numbers of one task in one table."""
    metric, old = ed2.PRIMARY[wm], SEED_METRIC[wm]
    regime, seen = ("frozen", "joint") if wm == "tdmpc2" else ("replay", "replay")
    by = {v: values(cells, task, v, metric, regime) for v in VARIANTS}
    published = {f"{old} {name}": float(np.mean(values(cells, task, v, old, seen)))
                 for name, v in (("single", "single"), ("ED2", "ed2_wide"))}
    means = {f"{metric} {v}": float(np.mean(x)) for v, x in by.items()}
    change, low, high, p = ed2.relative_change(by["ed2"], by["single"])
    wide = ed2.relative_change(by["ed2_wide"], by["single_wide"])
    controls = all(np.mean(by["ed2"]) < np.mean(by[v]) for v in ("random", "nosplit"))
    return {"task": task, **dict(zip(("paper", "paper ED2"), PAPER[wm].get(task, ("", "")))),
            **published, **means, "change": change, "low": low, "high": high, "p": p,
            "beats controls": controls, "verdict": ed2.verdict(change, low, high, controls),
            **dict(zip(("wide change", "wide low", "wide high"), wide))}


def summary(wm, cells, tasks):
    """{rows, wins, lower, reproduces} of one table, from its cells."""
    cells = [c for c in cells if c["wm"] == wm]
    rows, old = [row_of(wm, cells, task) for task in tasks], SEED_METRIC[wm]
    for row, p in zip(rows, holm([r["p"] for r in rows])):
        row["p Holm"] = p
    wins = sum(r["verdict"] == "win" for r in rows)
    lower = sum(r[f"{old} ED2"] < r[f"{old} single"] for r in rows)
    return dict(rows=rows, wins=wins, lower=lower, reproduces=lower > len(rows) / 2)


def tell(wm, table):
    """Print one table and its two verdicts."""
    rows, metric, old = table["rows"], ed2.PRIMARY[wm], SEED_METRIC[wm]
    shown = [dict(r, interval=f"[{r['low']:+.1%}, {r['high']:+.1%}]", shift=f"{r['change']:+.1%}",
                  wide=f"{r['wide change']:+.1%}") for r in rows]
    print(f"\n{wm}: {metric} on held-out data; change of ED2 at equal parameters to one model")
    columns = {"task": "task", "paper": "paper", "paper ED2": "+ ED2", f"{old} single": old,
               f"{old} ED2": "+ ED2 wide"} | {f"{metric} {v}": v for v in VARIANTS}
    columns |= {"shift": "change", "interval": "95 % interval", "verdict": "verdict",
                "wide": "wide: ED2 / one"}
    common.show(shown, columns, 5)
    print(f"beats the matched baseline: {table['wins']} of {len(rows)} tasks; reproduces the paper "
          f"(its metric, unmatched ED2 lower in most rows): "
          f"{'yes' if table['reproduces'] else 'no'}, {table['lower']} of {len(rows)}")


def plot(tables, path):
    """Change of the error by ED2 per task with its interval, at equal parameters and full width."""
    fig, ax = common.figure(6.5, 3.6)
    kinds = (("", "equal parameters"), ("wide ", "full width, one model as large"))
    for n, (wm, table) in enumerate(tables.items()):
        rows = table["rows"]
        for m, (kind, label) in enumerate(kinds):
            x = np.arange(len(rows)) + 0.18 * (2 * n + m - 1.5)
            y, low, high = (100 * np.array([r[kind + k] for r in rows])
                            for k in ("change", "low", "high"))
            ax.errorbar(x, y, (y - low, high - y), fmt="os"[m], ms=4, capsize=2, color=f"C{n}",
                        mfc="w" if m else f"C{n}", label=f"{wm}: {label}")
    ax.axhline(0, color="k", lw=0.8)
    ax.set_xticks(range(len(rows)), [r["task"] for r in rows], fontsize=8)
    ax.set_ylabel("change of error by ED2, %")
    ax.legend(fontsize=7)
    common.save_figure(fig, path)


def groups_of(tasks):
    """{task: its published groups}. SystemExit: there are none."""
    missing = [t for t in tasks if t.split("-")[0] not in ed2.PUBLISHED]
    if missing:
        raise SystemExit(f"--task {missing[0]}: the tables need published groups, which there are "
                         f"for {', '.join(ed2.PUBLISHED)}")
    return {t: ed2.PUBLISHED[t.split("-")[0]] for t in tasks}


def main(args):
    """Both tables; returns what results.json holds."""
    args = data.resumed(args)
    if args.fast and args.task == TASKS:
        args = replace(args, task="cheetah-run", seeds=1)
    groups = groups_of(args.task.split(","))
    args, run = common.open_run("ed2_tables", args)
    result, tasks = dict(cells=[]), list(groups)
    for wm in ("tdmpc2", "dreamerv3"):
        inner = settings(args, wm=wm, task=tasks[0])
        if inner.device == "cpu" and not args.fast:
            inner = replace(inner, updates=UPDATES[wm])
        for task in tasks:
            made = run.dir / "data" / task
            ed2.make_data(task, made, inner.data_steps, args.workers)
        cells = sum((cells_of(replace(inner, task=t), groups[t]) for t in tasks), [])
        result["cells"] += ed2.train_cells(cells, inner, run.dir)
        result[wm] = summary(wm, result["cells"], tasks)
        tell(wm, result[wm])
        data.write_csv(run.dir / f"table_{wm}.csv", result[wm]["rows"])
    tables = {wm: result[wm] for wm in ("tdmpc2", "dreamerv3")}
    ratio = {wm: 1 + np.array([r["change"] for r in t["rows"]]) for wm, t in tables.items()}
    gap, low, high, _ = ed2.relative_change(ratio["dreamerv3"], ratio["tdmpc2"])
    result["recurrent_minus_mlp"] = dict(mean=gap, low=low, high=high)
    says = "supported" if high < 0 else "refuted" if low > 0 else "undecided"
    print("\nDo recurrent backbones profit more than MLPs (Sec. 5.1)? Error ratio of ED2, "
          f"recurrent over MLP, minus 1: {gap:+.1%} [{low:+.1%}, {high:+.1%}] over {len(tasks)} "
          f"tasks: {says}")
    plot(tables, run.dir / "tables.png")
    return common.finish(run, "ed2_tables", result, ["tables.png"])


if __name__ == "__main__":
    common.command(Args, __doc__, main)
