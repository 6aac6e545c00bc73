"""Can a bank of sub-models that was learned on some robots be used for something new?

    python -m studies.ed2_bodies                          # 10 minutes on 2 cores: no

The paper asks (Sec. 3.2, research question 2); the study is ours. A bank is trained with several
robots at once. A task that it has not seen then gets a new body (encoder, head, keys), trained on
few episodes while the bank stays as it is; while it trains on; with a new bank; and with a frozen
random bank, which shows what a bank does that has learned nothing. The same updates for all.

Verdict, fixed in advance, by task and number of episodes: ed2.verdict on the relative change of the
held-out error, frozen bank against training from scratch, paired seeds. Expected: never better.
"""
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import ed2
from studies import common
from studies.ed2_cores import ridge

ARMS = {"frozen": "pre-trained bank, frozen", "tuned": "pre-trained bank, trained on",
        "scratch": "all from scratch", "random": "random bank, frozen",
        "zero_shot": "pre-trained bank and body as they are", "linear": "ridge regression",
        "persistence": "no change"}
HELD_OUT = {  # a new task of a known body; a new body
    "cheetah-run-backwards": ("walker-walk", "cheetah-run", "hopper-hop"),
    "walker-walk": ("cheetah-run", "hopper-hop")}


@dataclass
class Args(common.StudyArgs):
    task: str = "cheetah-run-backwards,walker-walk"
    """held-out tasks, of the two that are known here, with commas between"""
    pretrain: int = 2000
    """updates of a bank with the bodies that it knows"""
    updates: int = 1000
    """updates of a new body"""
    batch: int = 128
    """rows per update"""
    data_steps: int = 48_000
    """agent steps of replay of each task"""


class Bank(nn.Module):
    """K trunks that know no robot: z (B, D), act (B, A), keys (A, 16) -> mean of last layers.

    Action j enters trunk i with the weights p_ji (key_j V_i), V_i (16, w), p (A, K) = softmax(key .
    codes / 4). A key is all that the bank knows of an action, so robots with any number of actions
    share all weights. As in ed2.Dynamics no loop runs over trunks: the keys make W_a (A, K w).
    """

    def __init__(self, K=8, latent=64, width=64, key=16):
        super().__init__()
        self.K, self.width = K, width
        self.codes = nn.Parameter(torch.randn(K, key))
        self.w_z, self.w_a = (nn.Parameter(nn.init.trunc_normal_(
            torch.empty(n, K * width), std=n**-0.5)) for n in (latent, key))
        self.bias = nn.Parameter(torch.zeros(K * width))
        self.gain = nn.Parameter(torch.ones(K, width))
        self.shift = nn.Parameter(torch.zeros(K, width))
        self.second = ed2.NormedStacked(K, width, width)

    def assign(self, keys):
        """(A, 16) -> (A, K), rows sum to 1"""
        return (keys @ self.codes.T / keys.shape[1] ** 0.5).softmax(1)

    def forward(self, z, act, keys):
        w_a = (keys @ self.w_a) * self.assign(keys).repeat_interleave(self.width, 1)
        x = (torch.addmm(self.bias, z, self.w_z) + act @ w_a).unflatten(-1, (self.K, self.width))
        x = F.mish(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift)
        return self.second(x.transpose(0, 1)).mean(0)


class Body(nn.Module):
    """What a robot has of its own: encoder, head, a key per action, scales of s and delta."""

    def __init__(self, bank, s, act, delta):
        super().__init__()
        O, A = s.shape[1], act.shape[1]
        self.encoder, self.head = nn.Linear(O, len(bank.w_z)), nn.Linear(bank.width, O)
        self.keys = nn.Parameter(torch.randn(A, bank.codes.shape[1]))
        for name, x in (("s", s), ("d", delta)):
            self.register_buffer(name + "_mean", x.mean(0))
            self.register_buffer(name + "_std", x.std(0).clamp(min=1e-4))

    def forward(self, bank, s, act):
        """s (B, O), act (B, A) -> standardised state change (B, O)"""
        return self.head(bank(self.encoder((s - self.s_mean) / self.s_std), act, self.keys))

    def loss(self, bank, s, act, delta):
        return (self(bank, s, act) - (delta - self.d_mean) / self.d_std).square().mean()

    @torch.no_grad()
    def error(self, bank, s, act, delta):
        return ed2.nmse(self(bank, s, act) * self.d_std + self.d_mean, delta, delta.var(0))


def fit_bank(bank, pairs, updates, batch, seed, lr=3e-3, watch=None):
    """Train what requires a gradient on pairs [(body, rows (s, act, delta))]. Returns updates kept.

    `watch`, other rows of the only body, is looked at 20 times: the weights of the best look stay.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = (bank, *(body for body, _ in pairs))
    params = [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
    opt, best = torch.optim.Adam(params, lr, foreach=True), (math.inf, updates, [])
    for step in range(updates):
        opt.param_groups[0]["lr"] = ed2.linear_fall(step, updates, lr)
        loss = 0.0
        for body, rows in pairs:
            i = torch.randint(len(rows[0]), (batch,), generator=generator)
            loss = loss + body.loss(bank, *(x[i] for x in rows))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 20.0, error_if_nonfinite=True)
        opt.step()
        if watch and (step + 1) % max(1, updates // 20) == 0:
            with torch.no_grad():
                now = float(pairs[0][0].loss(bank, *watch))
            if now < best[0]:
                best = now, step + 1, [p.detach().clone() for p in params]
    for p, kept in zip(params, best[2]):
        p.data.copy_(kept)
    return best[1]


def changes_of(replay, task):
    """All steps by episode: s (N, T, O), act (N, T, A), next s - s (N, T, O)."""
    maps = replay.arrays(task)
    obs, act = torch.from_numpy(np.array(maps["obs"])), torch.from_numpy(np.array(maps["act"]))
    return obs[:, :-1], act, obs[:, 1:] - obs[:, :-1]


def few_shot(rows, bank, zero_shot, episodes, seed, updates, batch, size):
    """Held-out NMSE of one-step state changes by arm: {arm: .., arm_updates: ..}.

    rows: s (N, T, O), act (N, T, A), delta (N, T, O). A sixth of the episodes is for testing,
    always the same; of the rest `episodes` train, chosen by seed; their middle fifth says when to
    stop.
    """
    order = np.random.default_rng(0).permutation(len(rows[0]))
    cut = max(1, len(order) // 6)
    test = [x[order[:cut]].flatten(0, 1) for x in rows]
    few = [x[np.random.default_rng(seed).permutation(order[cut:])[:episodes]] for x in rows]
    middle = torch.arange(few[0].shape[1]) * 5 // few[0].shape[1] == 2
    seen, watch = ([x[:, keep].flatten(0, 1) for x in few] for keep in (~middle, middle))
    out = {}
    for arm in ("frozen", "tuned", "scratch", "random"):
        torch.manual_seed(seed)  # the same new body in all arms, the same new bank in two
        own = Bank(**size)
        body = Body(own, *seen)
        if arm in ("frozen", "tuned"):
            own.load_state_dict(bank.state_dict())
        own.requires_grad_(arm in ("tuned", "scratch"))
        lr = 1e-3 if arm in ("tuned", "scratch") else 3e-3  # better on another case: hopper
        out[arm + "_updates"] = fit_bank(own, [(body, seen)], updates, batch, seed, lr, watch)
        out[arm] = body.error(own, *test)
    s, act, delta = (torch.cat([a, b]) for a, b in zip(seen, watch))
    weights = ridge(torch.cat([s, act], 1), delta)
    guess = np.c_[test[0], test[1], np.ones(len(test[0]))] @ weights
    spread = test[2].var(0)
    if zero_shot:
        out["zero_shot"] = zero_shot.error(bank, *test)
    return out | {"linear": ed2.nmse(torch.from_numpy(guess), test[2], spread),
                  "persistence": ed2.nmse(0.0, test[2], spread)}


def run_cell(name, cell, folder):
    """Pre-train a bank for a held-out task and seed, then all arms for each number of episodes."""
    torch.set_num_threads(1)
    task, known, seed, size = cell["task"], cell["known"], cell["seed"], cell["size"]
    made = {t: changes_of(ed2.make_data(t, folder / "data" / t, cell["data_steps"], 1)[1], t)
            for t in (*known, task)}
    torch.manual_seed(1000 + seed)
    bank, rest = Bank(**size), {t: [x.flatten(0, 1) for x in made[t]] for t in known}
    robots = {t: Body(bank, *x) for t, x in rest.items()}
    pairs = [(robots[t], rest[t]) for t in known]
    fit_bank(bank, pairs, cell["pretrain"], cell["batch"], seed)
    same = [robots[t] for t in known if t.split("-")[0] == task.split("-")[0]]
    zero_shot = same[0] if same else None
    few = [dict(case=task, episodes=n, seed=seed) | few_shot(
        made[task], bank, zero_shot, n, seed, cell["updates"], cell["batch"], size)
        for n in cell["shots"]]
    return dict(cells=few)


def compare_arms(cells):
    """One row: means of all arms over the cells (seeds) of a case, and three paired changes."""
    row = {k: cells[0][k] for k in ("case", "episodes")}
    row |= {arm: float(np.mean([c[arm] for c in cells])) for arm in ARMS if arm in cells[0]}
    for new, old in (("frozen", "scratch"), ("frozen", "random"), ("tuned", "scratch")):
        change = ed2.relative_change([c[new] for c in cells], [c[old] for c in cells])
        row |= dict(zip((f"{new}_vs_{old}{x}" for x in ("", "_low", "_high")), change))
    return row


def plot(cells, path):
    """Error against the number of episodes: a panel per case, a line per arm, a dot per seed."""
    cases = list(dict.fromkeys(c["case"] for c in cells))
    fig, axes = common.figure(4 * len(cases), 4.2, 1, len(cases), sharey=True, squeeze=False)
    for ax, case in zip(axes[0], cases):
        own = [c for c in cells if c["case"] == case]
        shots = sorted({c["episodes"] for c in own})
        for arm, label in ARMS.items():
            y = np.array([[c.get(arm, math.nan) for c in own if c["episodes"] == n]
                          for n in shots])  # (shots, seeds)
            style = {"zero_shot": ":", "linear": "--", "persistence": "--"}.get(arm, "-")
            color = {"zero_shot": "C4", "linear": "gray", "persistence": "silver"}.get(arm)
            (line,) = ax.plot(shots, y.mean(1), style, label=label, color=color)
            if style == "-":
                ax.plot(shots, y, "o", ms=3, alpha=0.5, color=line.get_color())
        ax.set(title=case, xlabel="episodes of the new task", xscale="log", yscale="log")
        ax.set_xticks(shots, shots)
        ax.set_yticks((0.1, 0.2, 0.5, 1, 2), (0.1, 0.2, 0.5, 1, 2))
        ax.minorticks_off()
    axes[0, 0].set_ylabel("error of state changes / variance")
    handles = axes[0, 0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=3, fontsize=8)
    common.save_figure(fig, path)


def main(args, cases=HELD_OUT, shots=(2, 8, 32), size=None):
    """All arms on the held-out tasks; returns what results.json holds."""
    args = data.resumed(args)
    if args.fast:
        args = replace(args, task="walker-walk", seeds=1, pretrain=20, updates=20, data_steps=4000)
        shots = (1, 2)
    unknown = [t for t in args.task.split(",") if t not in cases]
    if unknown:
        raise SystemExit(f"--task {unknown[0]}: expected some of {','.join(cases)}")
    args, run = common.open_run("ed2_bodies", args)
    cells = {}
    for task in args.task.split(","):
        for t in (*cases[task], task):
            ed2.make_data(t, run.dir / "data" / t, args.data_steps, args.workers)
        for seed in common.seeds_of(args):
            cells[f"{task}, seed {seed}"] = dict(
                task=task, known=cases[task], seed=seed, shots=shots, size=size or {},
                pretrain=args.pretrain, updates=args.updates, batch=args.batch,
                data_steps=args.data_steps)
    done = data.run_cells(run_cell, cells, run.dir, args.workers)
    results = sum((x["cells"] for x in done.values()), [])
    rows, words = [], {"win": "better", "loss": "worse", "tie": "undecided"}
    for task in args.task.split(","):
        for n in shots:
            own = [c for c in results if (c["case"], c["episodes"]) == (task, n)]
            rows.append(compare_arms(own))
            change = [rows[-1]["frozen_vs_scratch" + x] for x in ("", "_low", "_high")]
            rows[-1]["verdict"] = words[ed2.verdict(*change)]
    columns = ("case", "episodes", *ARMS, "frozen_vs_scratch", "verdict")
    print("held-out error of state changes (1 = as good as their mean)")
    common.show(rows, {k: k for k in columns})
    print("\nAgainst training from scratch, the frozen bank is " + ", ".join(
        f"{r['verdict']} on {r['case']} with {r['episodes']} episodes" for r in rows) + ".")
    data.write_csv(run.dir / "bodies.csv", rows)
    plot(results, run.dir / "bodies.png")
    return common.finish(run, "ed2_bodies", dict(rows=rows, cells=results), ["bodies.png"])


if __name__ == "__main__":
    common.command(Args, __doc__, main)
