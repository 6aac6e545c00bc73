"""One body, 3 to 11 slots: does one slot take all of it?

    python -m studies.savi_slots            # 10 trainings, 80 minutes on one core
    python -m studies.savi_slots --fast     # under a minute, to see that it runs

Giridhar et al. ("Explorations in Dynamics Decomposition for Multi-Task RL", Sec. 5.2) trained SAVi
on video of a humanoid, 7 slots at 64 pixels, and one slot took the whole body.  Here the CMU
humanoid moves in one colour and with a colour per part; a slot that has it all has a share of the
foreground (top-1) and an IoU with the body near 1, a smear has K effective slots and confidence
1/K.

Rule, fixed before the run: "holds" if in one colour the whole-body IoU is above 0.7 in every seed
for at least three of the five numbers of slots; "undecided" if no training beats the best grid's
FG-ARI, since then slots have not separated anything; otherwise "fails".
"""
from dataclasses import asdict, dataclass, replace

import numpy as np

import savi
from data import run_cells
from studies import common
from studies.savi_seeds import row_of, savi_args, tell, test_clips, work, workers_of


@dataclass
class Args(common.StudyArgs):
    task: str = "studies.scenes:Humanoid"
    """a scene with one body"""
    seeds: int = 1
    """trainings of every variant: seed, seed + 1, .."""
    counts: tuple[int, ...] = (3, 5, 7, 9, 11)
    """numbers of slots"""
    colors: tuple[str, ...] = ("default", "parts")
    """one tan colour, a colour per part"""
    size: int | None = None
    """pixels (savi.py's preset)"""
    updates: int | None = None
    """of each training (savi.py's preset)"""
    batch: int | None = None
    """sequences per update (savi.py's preset)"""
    clips: int | None = None
    """in the data set (savi.py's preset)"""


COLUMNS = {"": "", "top1": "top-1", "whole": "whole-body IoU", "eff": "effective slots",
           "conf": "confidence", "fg_ari": "FG-ARI", "psnr": "PSNR"}


def best_grid(baselines, metric="fg_ari"):
    """The best score of the fixed grids."""
    return max(v[metric] for k, v in baselines.items() if k.startswith("grid") and metric in v)


def verdict_of(whole, separated):
    """whole (numbers of slots, seeds): IoU of the best slot with the body, in one colour."""
    if (np.min(whole, 1) > 0.7).sum() >= min(3, len(whole)):
        return "holds"
    return "fails" if separated else "undecided: no training beats the best grid"


def figure(groups, path):
    """Share of the foreground that each slot draws, largest first: a panel per colour, a line per
    number of slots.  groups {(color, K): results}."""
    colors = list(dict.fromkeys(color for color, _ in groups))
    fig, axes = common.figure(5 * len(colors), 3, 1, len(colors), squeeze=False, sharey=True)
    for (color, K), results in groups.items():
        share = np.mean([sorted(r["scores"]["share"], reverse=True) for r in results], 0)
        axes[0, colors.index(color)].plot(range(1, K + 1), share, "o-", label=f"{K} slots")
    for ax, color in zip(axes[0], colors):
        ax.set(title=f"colour: {color}", xlabel="slot, largest first", ylim=(0, 1))
        ax.legend(fontsize=7)
    axes[0, 0].set_ylabel("share of the body")
    common.save_figure(fig, path)


def main(args):
    """Train all and judge; returns what results/savi_slots.json holds."""
    if args.fast:
        args = replace(args, counts=args.counts[:2])
    args, run = common.open_run("savi_slots", args)
    cells = {}
    for seed in common.seeds_of(args):
        for color in args.colors:
            for K in args.counts:
                flags = savi_args(args, seed=seed, color=color, slots=K)
                cells[f"{color}-K{K}-seed{seed}"] = asdict(flags)
    first = {c["color"]: savi.Args(**c) for c in reversed(cells.values())}
    baselines = {color: savi.evaluate_baselines(test_clips(first[color])[0])
                 for color in args.colors}
    done = run_cells(work, cells, run.dir, workers_of(args), tell)

    groups, rows, separated = {}, [], False
    for color in args.colors:
        grid = best_grid(baselines[color])
        for K in args.counts:
            mine = [r for r in done.values() if r["cell"].startswith(f"{color}-K{K}-")]
            groups[color, K] = mine
            rows.append(row_of(f"{color}, {K} slots", mine, COLUMNS))
            separated |= any(r["scores"]["fg_ari"] > grid for r in mine)
        rows.append({"": f"{color}, best grid", "fg_ari": f"{grid:.3f}"})
    common.show(rows, COLUMNS)
    whole = [[r["scores"]["whole"] for r in groups[args.colors[0], K]] for K in args.counts]
    verdict = verdict_of(whole, separated)
    print(f"\none slot takes the whole body, by the rule fixed in advance: {verdict}")
    figure(groups, run.dir / "usage.png")
    result = dict(baselines=baselines, cells=done, verdict=verdict)
    return common.finish(run, "savi_slots", result, ["usage.png"])


if __name__ == "__main__":
    common.command(Args, __doc__, main)
