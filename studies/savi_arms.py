"""Do actions explain slots?  Slots that see one group of actions each, against six other arms.

    python -m studies.savi_arms                              # three pushed bodies, 35 trainings
    python -m studies.savi_arms --task studies.scenes:Humanoid --slots 7
    python -m studies.savi_arms --partition discovered       # A4 with groups found in the motion
    python -m studies.savi_arms --fast                       # under a minute, to see that it runs

Giridhar et al. (Sec. 5.2) propose to tie slots to groups of actions; the design is ours.  A slot
may know c_j = W2 relu(W1 [M_j * a; M_j]) of the actions a, with a 0/1 mask M_j of its group; c_j is
added to the first slots and given to the predictor, per slot.  The corrected slots alone never need
an action, so predicted frames are decoded too (--pred-weight 1 of savi.py).

    A0  SAVi as published: transformer across slots, no loss on predicted frames
    A1  no actions         A2  all actions to all slots       A3  random groups of the same sizes
    A4  groups of actions  A5  A1, true centres in frame 0    A6  A1, optical flow instead of colour

A1 to A4 have the same parameters (zeros instead of fewer inputs).  Measured beside FG-ARI:
designated IoU, of each part with the slot that was meant for it; locality, from one state with two
commands of a group: the share of the predicted change that lies where the true pictures differ; and
the share of it in the designated slot.

Rule, fixed before the run: "benefit" if, with at least five seeds, A4's 95 % intervals of FG-ARI
and of designated IoU both lie above those of A1, A2 and A3 and above the best grid.
"""
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from scipy.optimize import linear_sum_assignment

import savi
from data import bootstrap_ci, run_cells
from studies import common
from studies.savi_partitions import choose_partition, slots_of_parts
from studies.savi_seeds import learn, row_of, savi_args, tell, test_clips, workers_of
from studies.savi_slots import best_grid


@dataclass
class Args(common.StudyArgs):
    task: str = "studies.scenes:Pushed"
    """a scene with groups of actions"""
    seeds: int = 5
    """trainings of every arm: seed, seed + 1, ..; the rule asks for five"""
    color: Literal["parts", "default", "random"] = "parts"
    """colour alone lets slots separate parts"""
    partition: str = "body"
    """groups of A4: body, discovered, or a JSON file like [[0, 1], [2]]"""
    interact: bool = False
    """slots of A1 to A6 also attend to each other, which lets actions reach all of them"""
    slots: int = 4
    """K, one more than there are groups"""
    size: int | None = None
    """pixels (savi.py's preset)"""
    updates: int | None = None
    """of each training (savi.py's preset)"""
    batch: int | None = None
    """sequences per update (savi.py's preset)"""
    clips: int | None = None
    """in the data set (savi.py's preset)"""


_AC = dict(actions=True, pred_weight=1.0)
ARMS = {"A0": ("SAVi as published", dict(predictor="transformer", partition="none", actions=False)),
        "A1": ("no actions", _AC | dict(partition="none")),
        "A2": ("all actions to all slots", _AC | dict(partition="global")),
        "A3": ("random groups", _AC | dict(partition="random")),
        "A4": ("groups of actions", _AC | dict(partition="body")),
        "A5": ("A1, true centres in frame 0", _AC | dict(partition="none", init="com")),
        "A6": ("A1, flow target", _AC | dict(partition="none", target="flow"))}


# --------------------------------------------------------------------------------- networks
class Effects(nn.Module):
    """c_j = W2 relu(W1 [M_j * a; M_j]): what slot j may know of the actions (B,m) -> (B,K,D).
    masks (K,m): 1 where slot j sees an action."""

    def __init__(self, masks, dim):
        super().__init__()
        self.register_buffer("masks", torch.as_tensor(masks))
        self.net = nn.Sequential(nn.Linear(2 * masks.shape[1], 128), nn.ReLU(),
                                 nn.Linear(128, dim))

    def forward(self, act):
        M = self.masks.expand(len(act), -1, -1)
        return self.net(torch.cat([M * act[:, None], M], -1))


class ActionFirst(nn.Module):
    """First slots (B,K,D): savi.FirstSlots, and what each slot's actions of frame 0 do; from a cue
    nothing is added."""

    def __init__(self, kind, slots, dim, effects):
        super().__init__()
        self.first, self.effects = savi.FirstSlots(kind, slots, dim), effects
        self.cued = kind == "com"

    def forward(self, act, cue=None):
        slots = self.first(act, cue)
        return slots if self.cued else slots + self.effects(act)


class ActionPredictor(nn.Module):
    """Slots of this frame, act (B,m) -> first guess for the next: a residual MLP per slot that
    also sees the effects of the slot's actions; `interact`: then a transformer block across
    slots."""

    def __init__(self, dim, effects, interact=False):
        super().__init__()
        self.effects = effects
        self.mlp = nn.Sequential(nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 256), nn.ReLU(),
                                 nn.Linear(256, dim))
        self.across = savi.Predictor("transformer", dim) if interact else None

    def forward(self, slots, act):
        slots = slots + self.mlp(torch.cat([slots, self.effects(act)], -1))
        return self.across(slots) if self.across else slots


def action_model(args, masks, interact=False):
    """savi.make_model(args) with first slots and predictor that see actions (masks (K,m))."""
    model = savi.make_model(args)
    effects = Effects(masks, args.dim)
    model.initial = ActionFirst(args.init, args.slots, args.dim, effects)
    model.predictor = ActionPredictor(args.dim, effects, interact)
    model.initial.apply(savi.flax_init)
    model.predictor.mlp.apply(savi.flax_init)
    return model


# --------------------------------------------------------------------------------- measures
def designated_iou(true, pred, slot_of_part):
    """Mean over the parts there are of the IoU with the slot that was meant for each; slot_of_part
    {label: slot}."""
    labels, table = savi.iou_table(true, pred)
    got = []
    for i, label in enumerate(labels):
        if label in slot_of_part:
            slot = slot_of_part[label]
            got.append(table[i, slot] if slot < table.shape[1] else 0.0)
    return float(np.mean(got)) if got else 0.0


def grid_designated(masks):
    """{grid: designated IoU} on true masks (N,T,H,W), with the best fixed cell of each part as its
    designated one."""
    P, out = int(masks.max()), {}
    for r, c in savi.GRIDS:
        tables = np.full((len(masks), P + 1, r * c), np.nan)
        for i, true in enumerate(masks):
            labels, table = savi.iou_table(true, savi.grid_mask(r, c, true.shape))
            tables[i, labels] = table
        mean = np.nan_to_num(np.nanmean(tables[:, 1:], 0))
        out[f"grid {r}x{c}"] = float(mean[linear_sum_assignment(-mean)].mean())
    return out


@torch.no_grad()
def counterfactual(model, clips, slot_of_part):
    """Does another command of group g change the pixels that it should, in the slot meant for it?

    Both futures start from the slots at frame T//2 and are predicted open loop.  locality: share of
    the predicted change where the true pictures differ by more than 0.05, whose area is `area`;
    slot_share: of the change, in the designated slot.  Means over clips; {} without such
    branches."""
    if (clips.arrays["fork_group"] < 0).all():
        return {}
    rows = [counterfactual_row(model, clips, i, slot_of_part) for i in range(len(clips.video))]
    rows = [r for r in rows if r]  # a command of inert actions changes nothing
    return savi.mean_of(rows) if rows else {}


def counterfactual_row(model, clips, i, slot_of_part):
    """The measures of clip i, or None where the true pictures are the same."""
    T, index = clips.video.shape[1], torch.tensor([i], device=clips.device)
    other = torch.as_tensor(clips.arrays["fork_actions"][i]).to(clips.device)  # (steps,m)
    fork, steps = T // 2, len(other)
    video, _, act, cue = clips.window(index, torch.zeros_like(index), T)
    now = model(video[:fork + 1], act[:fork + 1], cue)[1][-1]                  # (1,K,D)
    drawn = []
    for commands in (act[fork + 1:fork + 1 + steps, 0], other):
        slots = now
        for a in commands:
            slots = model.predictor(slots, a[None])
        picture, alpha, each = model.decode(slots)
        drawn.append((picture[0], (alpha.unsqueeze(2) * each)[0]))             # (C,H,W) (K,C,H,W)
    change = (drawn[0][0] - drawn[1][0]).abs().sum(0).double().cpu().numpy()
    by_slot = (drawn[0][1] - drawn[1][1]).abs().sum((1, 2, 3)).double().cpu().numpy()
    real = video[fork + steps, 0].permute(1, 2, 0).cpu().numpy()
    where = np.abs(real - clips.arrays["fork_frame"][i] / 255.0).max(-1) > 0.05
    if not where.any():
        return None
    meant = slot_of_part.get(int(clips.arrays["fork_group"][i]) + 1, 0)
    return {"locality": (change * where).sum() / max(change.sum(), 1e-9), "area": where.mean(),
            "slot_share": by_slot[meant] / max(by_slot.sum(), 1e-9)}


# ------------------------------------------------------------------------------------ study
def work(name, cell, folder):
    """Train and measure one arm with one seed."""
    args = savi.Args(**cell["args"])
    arrays, meta = savi.load_video(args)
    groups, masks = choose_partition(cell["partition"], arrays, meta, args.slots, args.seed)
    model = action_model(args, masks, cell["interact"]) if cell["actions"] else None
    model, test, result = learn(args, Path(folder) / "trainings" / name, model)
    slot_of_part = slots_of_parts(groups, meta["groups"])
    pairs = zip(test.true, savi.segment(model, test))
    result["scores"]["designated"] = float(np.mean([designated_iou(t, p, slot_of_part)
                                                    for t, p in pairs]))
    if cell["actions"] and args.target == "rgb":
        result["scores"] |= counterfactual(model, test, slot_of_part)
    return result | dict(groups=groups)


def action_verdict(by_arm, baselines):
    """The rule above; by_arm {arm: results of its seeds}."""
    for metric in ("fg_ari", "designated"):
        ends = {}
        for arm in ("A1", "A2", "A3", "A4"):
            values = np.array([[r["scores"][metric]] for r in by_arm[arm]])
            ends[arm] = bootstrap_ci(values, np.mean)
        rivals = max(ends[arm][1] for arm in ("A1", "A2", "A3"))
        if ends["A4"][0] <= max(rivals, best_grid(baselines, metric)):
            return "no benefit"
    return "benefit" if min(map(len, by_arm.values())) >= 5 else "none: fewer than 5 seeds"


COLUMNS = {"": "", "fg_ari": "FG-ARI", "designated": "designated IoU", "top1": "top-1",
           "pred_psnr": "PSNR predicted", "locality": "locality", "slot_share": "slot share"}


def cells_of(args):
    """{arm-seed: cell} of the study."""
    cells = {}
    for seed in common.seeds_of(args):
        for arm, (_, flags) in ARMS.items():
            flags = dict(flags)
            actions, partition = flags.pop("actions"), flags.pop("partition")
            # the fork of a clip needs 12 frames, more than savi.py --fast films
            flags |= dict(seed=seed, clip_frames=12) if args.fast else dict(seed=seed)
            cells[f"{arm}-seed{seed}"] = dict(
                args=asdict(savi_args(args, **flags)), actions=actions, interact=args.interact,
                partition=args.partition if arm == "A4" else partition)
    return cells


def main(args):
    """Train all arms and judge; returns what results/savi_arms.json holds."""
    if args.fast:
        args = replace(args, seeds=1)
    args, run = common.open_run("savi_arms", args)
    cells = cells_of(args)
    plain = savi.Args(**cells[f"A1-seed{args.seed}"]["args"])
    clips, meta = test_clips(plain)
    if not meta["groups"]:
        raise SystemExit(f"--task {args.task}, which no action moves: type --task "
                         "studies.scenes:Pushed or studies.scenes:Humanoid")
    choose_partition(args.partition, *savi.load_video(plain), args.slots, args.seed)
    baselines = savi.evaluate_baselines(clips)
    for name, value in grid_designated(clips.true).items():
        baselines[name]["designated"] = value
    done = run_cells(work, cells, run.dir, workers_of(args), tell)

    by_arm = {arm: [r for name, r in done.items() if name.startswith(arm)] for arm in ARMS}
    rows = [{"": name, **b} for name, b in baselines.items() if name[:4] in ("grid", "k-me")]
    for arm, (words, _) in ARMS.items():
        rows.append(row_of(f"{arm} {words}", by_arm[arm], COLUMNS))
    common.show(rows, COLUMNS)
    verdict = action_verdict(by_arm, baselines)
    print("\nverdict by the rule fixed in advance (A4 above A1-A3 and the best grid, intervals "
          f"apart): {verdict}")
    return common.finish(run, "savi_arms", dict(baselines=baselines, cells=done, verdict=verdict))


if __name__ == "__main__":
    common.command(Args, __doc__, main)
