"""Does SAVi find objects better than rules that learn nothing, whatever the seed?

    python -m studies.savi_seeds                      # objects, 3 seeds, 15 minutes on 2 cores
    python -m studies.savi_seeds --color default      # all objects of one colour
    python -m studies.savi_seeds --fast               # half a minute, to see that it runs

Trains savi.py's default once per seed and prints every score of the test clips, mean and 95 %
interval, beside one slot, random pixels, grids and k-means on the same clips.

Rule, fixed before the run: with at least three seeds "holds" if the FG-ARI of every seed is above
the best rule's, "fails" if that of every seed is below, otherwise "undecided".
"""
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import savi
from data import Run, choose_device, run_cells
from studies import common


@dataclass
class Args(common.StudyArgs):
    task: str = "objects"
    """a scene as in savi.py"""
    color: Literal["parts", "default", "random"] = "parts"
    """each object its own, all the same tan, or each body a random one"""
    floor: Literal["plain", "checker"] = "plain"
    """of the scene"""
    slots: int = 6
    """K"""
    size: int | None = None
    """pixels (savi.py's preset)"""
    updates: int | None = None
    """of each training (savi.py's preset)"""
    batch: int | None = None
    """sequences per update (savi.py's preset)"""
    clips: int | None = None
    """in the data set (savi.py's preset)"""


def savi_args(args, **flags):
    """The flags of one training: those of the study, then `flags`; sizes by savi.py's preset."""
    same = ("task", "device", "compile", "fast", "workers", "save_every", "color", "floor", "slots",
            "size", "updates", "batch", "clips")
    base = {k: getattr(args, k) for k in same if hasattr(args, k)}
    device, _ = choose_device(args.device)
    filled = savi.filled(savi.Args(**{**base, **flags}), device)
    savi.check_flags(filled)
    return filled


def test_clips(args):
    """(test clips of the flags on the CPU, what is known of the scene); filmed if need be."""
    arrays, meta = savi.load_video(args)
    chosen = savi.pick(arrays, 1, savi.EVAL_CLIPS)
    return savi.Clips(arrays, chosen, args, torch.device("cpu")), meta


def learn(args, folder, model=None):
    """Train a network (or `model`) in a folder: (model, test clips, scores and curve)."""
    device, _ = choose_device(args.device)
    torch.set_num_threads(args.threads)
    arrays, _ = savi.load_video(args)
    train, test, val = (savi.Clips(arrays, savi.pick(arrays, split, most), args, device)
                        for split, most in ((0, None), (1, savi.EVAL_CLIPS), (2, 24)))
    model = (model or savi.make_model(args)).to(device)
    run = Run("savi", args, log_every=max(10, args.updates // 30), inside=folder)
    savi.train(model, train, val, run, args)
    run.close()
    return model, test, dict(scores=savi.evaluate(model, test), curve=run.history,
                             parameters=sum(p.numel() for p in model.parameters()))


def work(name, cell, folder):
    """One training with plain flags."""
    return learn(savi.Args(**cell), Path(folder) / "trainings" / name)[2]


def tell(result):
    """What is said of a training that has ended."""
    s = result["scores"]
    return f"FG-ARI {s['fg_ari']:.3f}, top-1 {s['top1']:.2f}, PSNR {s['psnr']:.1f}"


def workers_of(args):
    """Trainings side by side: as many as asked for on a CPU, one on a GPU."""
    return args.workers if choose_device(args.device)[0].type == "cpu" else 1


def row_of(name, results, metrics):
    """{"": name, metric: mean and interval over seeds}; metrics that nobody has are left out."""
    row = {"": name}
    for k in metrics:
        values = [r["scores"][k] for r in results if k in r["scores"]]
        if values:
            row[k] = common.spread_of(values)
    return row


def verdict_of(values, best):
    """The rule above."""
    if len(values) < 3:
        return "undecided: fewer than 3 seeds"
    if min(values) > best:
        return "holds"
    return "fails" if max(values) < best else "undecided"


COLUMNS = {"": "", **savi.COLUMNS, "psnr": "PSNR", "pred_psnr": "PSNR predicted"}


def main(args):
    """Train all seeds and judge; returns what results/savi_seeds.json holds."""
    args, run = common.open_run("savi_seeds", args)
    cells = {f"seed{s}": asdict(savi_args(args, seed=s)) for s in common.seeds_of(args)}
    clips, _ = test_clips(savi.Args(**next(iter(cells.values()))))
    baselines = savi.evaluate_baselines(clips)
    done = run_cells(work, cells, run.dir, workers_of(args), tell)
    rows = [{"": name, **scores} for name, scores in baselines.items()]
    rows.append(row_of(f"SAVi, {args.slots} slots", list(done.values()), COLUMNS))
    common.show(rows, COLUMNS)
    best = max(b["fg_ari"] for b in baselines.values())
    verdict = verdict_of([r["scores"]["fg_ari"] for r in done.values()], best)
    print(f"\nabove the best rule that learns nothing (FG-ARI {best:.3f}) in every seed: {verdict}")
    return common.finish(run, "savi_seeds", dict(baselines=baselines, cells=done, verdict=verdict))


if __name__ == "__main__":
    common.command(Args, __doc__, main)
