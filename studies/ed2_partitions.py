"""Do groups of actions from elsewhere than SD2 predict better: from a trained model, limbs, chance?

    python -m studies.ed2_partitions --task cheetah-run --partition learned   # 8 minutes on 2 cores
    python -m studies.ed2_partitions --partition sd2j                         # or human, random

sd2j merges actions by the influence that they have in a trained model; learned trains an assignment
with the model (both are ours: neither paper has them); human: limbs; random: SD2's group sizes with
other members. The comparison is that of ed2.py: ED2 with these groups and one model, paired seeds.

Verdict, fixed in advance: ed2.verdict on held-out error: win if the 95 % interval of the relative
change is below zero, loss above, tie if it crosses zero or is under 5 %. Expected: tie.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import ed2
import envs
from studies import common


@dataclass
class Args(common.StudyArgs):
    task: str = "walker-walk"
    """any task of envs.py that does not end by itself"""
    partition: Literal["sd2j", "learned", "human", "random"] = "learned"
    """where the groups come from"""
    wm: Literal["tdmpc2", "dreamerv3"] = "tdmpc2"
    """backbone that is compared"""
    eta: float = 0.0
    """sd2j and random: merge while the best score is above this"""


LIMBS = {
    "walker": [[0, 1, 2], [3, 4, 5]], "cheetah": [[0, 1, 2], [3, 4, 5]],
    "hopper": [[0, 1], [2, 3]],
    "humanoid": [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16, 17],
                 [18, 19, 20]]}


def check_partition(groups, act_dim):
    """The groups, each sorted. SystemExit unless every action is in exactly one of them."""
    flat = sorted(j for g in groups for j in g)
    if flat != list(range(act_dim)) or not all(groups):
        raise SystemExit(f"partition {groups} does not hold each of the actions 0..{act_dim - 1} "
                         "exactly once")
    return [sorted(g) for g in groups]


def random_partition(groups, seed):
    """The same group sizes, members at random."""
    order = np.random.default_rng(seed).permutation(sum(map(len, groups))).tolist()
    return [sorted(order.pop() for _ in g) for g in groups]


def adjusted_rand(p, q):
    """Adjusted Rand index of two partitions of the same actions: 1 the same, 0 as by chance."""
    table = np.array([[len(set(a) & set(b)) for b in q] for a in p], float)
    n = table.sum()

    def pairs(x):
        return (x * (x - 1) / 2).sum()

    both, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = a * b / max(n * (n - 1) / 2, 1)
    most = (a + b) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


@torch.no_grad()
def influence(predict, s, act, generator):
    """I (A, n): mean change of each output of predict(s, act) (B, n) when an action is permuted.

    That breaks the correlation of actions with states, which misleads Pearson on replay.
    """
    base, rows = predict(s, act), []
    for j in range(act.shape[1]):
        mixed = act.clone()
        mixed[:, j] = act[torch.randperm(len(act), generator=generator), j]
        rows.append((predict(s, mixed) - base).abs().mean(0))
    return torch.stack(rows)


class StateDynamics(ed2.Dynamics):
    """ed2.Dynamics with plain outputs (B, n), for states; `assign` (A, k) may be learned."""

    def __init__(self, n, act_dim, width, k):
        super().__init__(n, act_dim, width, [list(range(act_dim))] * k)
        self.head = ed2.Stacked(self.head.weight)


def modularity(average):
    """Q (A, A): how much more alike the influences (A, n) of two actions are than others'."""
    u = F.normalize(average, dim=1)
    u = F.normalize(u - u.mean(0), dim=1)  # uncentred, everything is alike and merges
    Q = (u @ u.T).fill_diagonal_(0)
    return Q / Q.abs().mean()


def fit_influence(s, act, delta, seed, latents=False, steps=1500, batch=256, eta=0.0):
    """sd2j: (groups, log) from the influence of actions in one model of rows s, act, delta."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    s, target = standardised(s, delta, latents)
    model = StateDynamics(s.shape[1], act.shape[1], 200, 1)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    torch.randn(act.shape[1], 1, generator=generator)  # as `learn_partition` draws
    for _ in range(steps):
        rows = torch.randint(len(s), (batch,), generator=generator)
        loss = (model(s[rows], act[rows]) - target[rows]).square().mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    rows = torch.randperm(len(s), generator=generator)[:6000]
    found = influence(model, s[rows], act[rows], generator).double().numpy()
    return ed2.agglomerate(ed2.cosine(found), eta)


def learn_partition(s, act, delta, seed, latents=False, steps=1500, batch=256):
    """learned: groups from a decomposed model of rows s (N, n), act (N, A), delta (N, n).

    Three phases: all actions enter all sub-models while influence is averaged; an assignment P =
    softmax(L) is trained on the loss minus the modularity of the influence; argmax. The loss alone
    does not identify groups: seeds disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    s, target = standardised(s, delta, latents)
    A, k = act.shape[1], min(act.shape[1], 8)
    model = StateDynamics(s.shape[1], A, 64, k)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    L = torch.zeros(A, k, requires_grad=True)
    with torch.no_grad():
        L.add_(0.01 * torch.randn(L.shape, generator=generator))
    opt_L, average, Q = torch.optim.Adam([L], 2e-2), None, None
    first = int(0.35 * steps)
    for step in range(int(0.6 * steps)):
        rows = torch.randint(len(s), (batch,), generator=generator)
        if step == first:
            Q = modularity(average)
        if step >= first:
            tau = 1 - 0.7 * (step / steps - 0.35) / 0.25
            gumbel = -torch.empty_like(L).exponential_(generator=generator).log()
            soft = ((L + gumbel) / tau).softmax(1)
            hard = F.one_hot(soft.argmax(1), k).float()
            model.assign = hard + soft - soft.detach()  # straight through
        loss = (model(s[rows], act[rows]) - target[rows]).square().mean()
        if step >= first:
            P = L.softmax(1)
            loss = loss - ((P @ P.T) * Q).mean()
        opt.zero_grad(set_to_none=True)
        opt_L.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if step >= first:
            opt_L.step()
        elif step % 50 == 0:
            now = influence(model, s[rows], act[rows], generator)
            average = now if average is None else average.lerp(now, 0.1)
    owner = L.argmax(1).tolist()
    return sorted([j for j in range(A) if owner[j] == i] for i in set(owner))


def standardised(s, delta, latents):
    """(s, target) in units of their deviations; simplex coordinates have one scale already."""
    scale = delta.std(0).clamp(min=1e-8)
    target = (delta - delta.mean(0)) / scale * (scale > 1e-7)
    return s if latents else (s - s.mean(0)) / s.std(0).clamp(min=1e-8), target


def find(name, task, random, seed=0, eta=0.0):
    """(groups, log of merges) of a task from its random data. SystemExit: no limbs are known."""
    A, robot = envs.task_facts(task).act_dim, task.split("-")[0]
    if A == 1:
        return [[0]], []
    if name == "human":
        if robot not in LIMBS:
            raise SystemExit(f"no human partition of {robot!r}: there is one for "
                             f"{', '.join(LIMBS)}; type --partition random, sd2j or learned")
        return check_partition(LIMBS[robot], A), []
    if name == "random":
        return random_partition(ed2.find_partition("sd2", task, random, eta)[0], seed), []
    rows = [torch.from_numpy(np.ascontiguousarray(x)) for x in ed2.transitions(random, task)]
    if name == "learned":
        return learn_partition(*rows, seed), []
    return fit_influence(*rows, seed, eta=eta)


def main(args):
    """Find the groups, compare them with one model; returns what results.json holds."""
    args, run = common.open_run("ed2_partitions", args)
    inner = settings(args, wm=args.wm, task=args.task)
    if args.partition == "human":
        find("human", args.task, None)  # refused before data are made
    made = run.dir / "data" / args.task
    random = ed2.make_data(args.task, made, inner.data_steps, args.workers)[0]
    groups, log = find(args.partition, args.task, random, args.seed, args.eta)
    known = ed2.PUBLISHED.get(args.task.split("-")[0])
    if known:
        print(f"adjusted Rand index with the published groups: {adjusted_rand(groups, known):.2f}")
    result = ed2.compare(inner, run, groups) | dict(merges=log)
    return run.finish(result)


def settings(args, **more):
    """ed2's flags for a study: budgets of ed2.py, the study's own seeds, device and processes."""
    names = ("seed", "seeds", "fast", "device", "compile", "workers", "save_every")
    inner = ed2.Args(**{k: getattr(args, k) for k in names} | more)
    ed2.check(inner)
    return ed2.fill(inner)


if __name__ == "__main__":
    common.command(Args, __doc__, main)
