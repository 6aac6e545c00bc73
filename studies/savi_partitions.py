"""Which actions move the same thing?  Groups of actions found in motion, and other partitions.

    python -m studies.savi_partitions                                    # a minute
    python -m studies.savi_partitions --task studies.scenes:Humanoid
    python -m studies.savi_partitions --fast

Action-conditioned slots (studies/savi_arms.py) need groups of actions: those of the parts (body),
the same sizes at random, all to all (global), or discovered from where bodies go, without pictures,
by the agglomeration of ED2's SD2 (arXiv 2112.02817).

Rule, fixed before the run: "holds" if the discovered groups have an adjusted Rand index of at least
0.9 with the true ones.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import savi
from studies import common


@dataclass
class Args(common.StudyArgs):
    task: str = "studies.scenes:Pushed"
    """a scene with actions"""
    clips: int = 200
    """clips to look at"""


def effects(pairs):
    """(m, bodies): squared correlations of actions with the motion of each body, summed over x y z
    (force along x and along y have no coordinate in common) and over pairs of act (N,m) and what
    it moved, change (N,n,3); and which actions vary."""
    def unit_variance(x):
        x = np.asarray(x, np.float64).reshape(len(x), -1)
        return (x - x.mean(0)) / np.where(x.std(0) > 1e-6, x.std(0), np.inf)

    total = 0
    for act, change in pairs:
        total = total + np.square(unit_variance(act).T @ unit_variance(change) / len(act))
    moves = np.flatnonzero(unit_variance(pairs[0][0]).any(0))
    return total.reshape(len(total), -1, 3).sum(2), moves


def discover_slots_groups(pairs, most):
    """Groups of action indices, at most so many, from pairs as in `effects`.

    Actions are alike when their effects are.  The most related pair of groups is merged while that
    is above chance, or while there are more than `most` groups.  Actions that never vary join the
    last group."""
    feature, moves = effects(pairs)
    m, feature = len(feature), feature[moves]
    unit = feature / np.maximum(np.linalg.norm(feature, axis=1, keepdims=True), 1e-12)
    sim, groups = unit @ unit.T, [[i] for i in range(len(moves))]

    def related(p, q):  # how much more alike p and q are than either is to everything but the other
        not_p, not_q = ([i for i in range(len(sim)) if i not in g] for g in (p, q))
        outside = sim[np.ix_(p, not_q)].sum() + sim[np.ix_(q, not_p)].sum()
        return sim[np.ix_(p, q)].mean() - outside / (len(p) * len(not_q) + len(q) * len(not_p))

    while len(groups) > 1:
        best = (-np.inf, 0, 0)
        for j in range(len(groups)):
            for i in range(j):
                best = max(best, (round(related(groups[i], groups[j]), 12), -i, -j))
        score, i, j = best
        if score <= 0 and len(groups) <= most:
            break
        merged = groups[-i] + groups[-j]
        groups = [g for n, g in enumerate(groups) if n not in (-i, -j)] + [merged]
    groups = sorted(sorted(moves[g].tolist()) for g in groups)
    groups[-1] = sorted(groups[-1] + [i for i in range(m) if i not in moves])
    return groups


def moved(arrays):
    """Pairs of actions and motion of the training clips: forces cause motion, servos do so by
    changing."""
    train = arrays["split"] == 0
    act = arrays["actions"][train][:, 1:]                                      # (n,T-1,m)
    step = np.diff(arrays["state"][train].astype(np.float64), axis=1)          # (n,T-1,3 bodies)
    pairs = []
    for a, d in ((act, step), (np.diff(act, axis=1), step[:, 1:])):
        pairs.append((a.reshape(-1, a.shape[-1]), d.reshape(-1, d.shape[-1] // 3, 3)))
    return pairs


def check_partition(groups, act_dim, slots, where):
    """SystemExit unless each action is in exactly one group and a slot is left for the
    background."""
    try:
        flat = sorted(int(i) for i in np.concatenate([np.asarray(g, int) for g in groups]))
    except (TypeError, ValueError):
        flat = None
    if flat != list(range(act_dim)) or not all(groups):
        missing = sorted(set(range(act_dim)) - set(flat or []))
        lost = f", but it misses action {missing[0]}" if missing else ""
        raise SystemExit(f"partition {where} has to hold each of the actions 0..{act_dim - 1} "
                         f"exactly once{lost}: expected a list of lists of indices like "
                         "[[0, 1], [2]]")
    if len(groups) > slots - 1:
        raise SystemExit(f"partition {where} has {len(groups)} groups for {slots} slots, one of "
                         f"which is for the background: type --slots {len(groups) + 1} or merge "
                         "groups")
    return [sorted(map(int, g)) for g in groups]


def read_partition(file):
    """Groups in a JSON file: a list of lists, or {"groups": such a list}."""
    try:
        groups = json.loads(Path(file).read_text())
        return groups["groups"] if isinstance(groups, dict) else groups
    except (OSError, ValueError, KeyError) as e:
        raise SystemExit(f"--partition {file} cannot be read ({e}): expected none, global, body, "
                         "random, discovered, or a JSON file like [[0, 1], [2]]")


def choose_partition(name, arrays, meta, slots, seed):
    """(groups, 0/1 masks (slots, m)) of a partition: none, global, body, random, discovered or a
    file; groups is empty for none, and the true ones for global."""
    m = arrays["actions"].shape[-1]
    masks = np.zeros((slots, m), np.float32)
    if name == "none":
        return [], masks
    if m == 0:
        raise SystemExit(f"--partition {name}, but {meta['recipe']['kind']} has no actions: type "
                         "--task studies.scenes:Pushed or studies.scenes:Humanoid")
    if name == "global":
        return meta["groups"], np.ones_like(masks)
    if name == "body":
        groups = meta["groups"]
    elif name == "random":
        order = iter(np.random.default_rng(seed).permutation(m).tolist())
        groups = [[next(order) for _ in g] for g in meta["groups"]]
    elif name == "discovered":
        groups = discover_slots_groups(moved(arrays), slots - 1)
    else:
        groups = read_partition(name)
    groups = check_partition(groups, m, slots, name)
    for j, g in enumerate(groups):
        masks[j, g] = 1
    return groups, masks


def slots_of_parts(groups, true_groups):
    """{part label: slot meant for it}: groups to parts by most shared actions, one to one; without
    groups slot i for part i + 1, which is what an arm with no actions gets compared on."""
    from scipy.optimize import linear_sum_assignment
    if not groups:
        return {i + 1: i for i in range(len(true_groups))}
    shared = np.zeros((len(groups), len(true_groups)))
    for i, g in enumerate(groups):
        shared[i] = [len(set(g) & set(p)) for p in true_groups]
    return {int(p) + 1: int(g) for g, p in zip(*linear_sum_assignment(-shared))}


def agreement(groups, true_groups, act_dim):
    """Adjusted Rand index of two partitions of the actions."""
    ours, true = np.zeros(act_dim, int), np.zeros(act_dim, int)
    for labels, parts in ((ours, groups), (true, true_groups)):
        for i, g in enumerate(parts):
            labels[g] = i
    return savi.ari(true, ours)


def main(args):
    """Find the groups, compare, judge; returns what results/savi_partitions.json holds."""
    args, run = common.open_run("savi_partitions", args)
    clips = min(args.clips, 40) if args.fast else args.clips
    cpu = savi.torch.device("cpu")
    flags = savi.filled(savi.Args(task=args.task, clips=clips, clip_frames=12, size=32,
                                  workers=args.workers), cpu)
    arrays, meta = savi.load_video(flags)
    m = arrays["actions"].shape[-1]
    groups, _ = choose_partition("discovered", arrays, meta, len(meta["groups"]) + 1, args.seed)
    random, _ = choose_partition("random", arrays, meta, len(meta["groups"]) + 1, args.seed)
    score = agreement(groups, meta["groups"], m)
    for i, g in enumerate(groups):
        print(f"group {i + 1}: " + ", ".join(meta["action_names"][a] for a in g))
    common.show([{"": "discovered", "ari": score},
                 {"": "random", "ari": agreement(random, meta["groups"], m)}],
                {"": "partition", "ari": "ARI with the true groups"})
    verdict = "holds" if score >= 0.9 else "fails"
    print(f"\nthe groups are found: {verdict}")
    result = dict(groups=groups, true=meta["groups"], ari=score, verdict=verdict)
    return common.finish(run, "savi_partitions", result)


if __name__ == "__main__":
    common.command(Args, __doc__, main)
