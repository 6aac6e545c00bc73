"""PWM's ablations as one table of paired differences (Figs. 7b, 8, 14, 18 and 19).

What do the parts of PWM do for its policies? A base and every variant train on the same data with
the same seeds; variants that leave the world model alone start from the base's.

    python -m studies.ablations                             # all, four tasks: 3 hours (an estimate)
    python -m studies.ablations --only activation,batch     # some: see ABLATIONS
    python -m studies.ablations --only model-updates,prior,wm-horizon --eval-every 100 \
        --task cartpole-swingup,walker-walk                 # and the curve of Fig. 8b: 43 minutes
    python -m studies.ablations --fast                      # two of them on a tiny budget

Verdict per claim of the paper: the difference to the base with its 95 % interval over three seeds
or more ("activation": five), redrawn within each task; it holds, fails, or is undecided if 0 is
inside. """
import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import data
import pwm
from studies import common, tdmpc2
from studies.common import StudyArgs, command, figure, finish, open_run, paired, save_figure

DATA = dict(wm_steps=6000, wm_batch=128, policy_steps=1200, policy_batch=16, horizon=16)
CELL = dict(wm_steps=2000, wm_batch=128, wm_horizon=3, policy_steps=400, policy_batch=16,
            horizon=16)
FAST = dict(wm_steps=6, wm_batch=8, wm_horizon=3, policy_steps=3, policy_batch=4, eval_episodes=1,
            seed_episodes=4, round_episodes=2, rounds=2, horizon=4, model_size=1)
ABLATIONS = {  # name: (the paper's claim, the sign of the difference it means, {variant: changes})
    "activation": ("less regularised models predict better, their policies are worse (Fig. 8a)", -1,
                   {"Mish without SimNorm": dict(agent="mish"),
                    "ReLU without SimNorm": dict(agent="relu")}),
    "model-updates": ("policies need a well-trained model (Fig. 8b)", -1,
                      {"400 model updates, not 2,000": dict(wm_steps=400)}),
    "prior": ("TD-MPC2 without planning is below PWM on the same model, the row before it "
              "(Figs. 8b, 18)", -1, {"TD-MPC2 without planning": dict(agent="TD-MPC2")}),
    "wm-horizon": ("models trained on 16 steps are marginally better (Fig. 14)", 1,
                   {"model trained on 16 steps": dict(wm_horizon=16)}),
    "batch": ("at equal time, small batches are better (Fig. 7b)", -1,
              {"batch of 64, equal time": dict(policy_batch=64),
               "batch of 256, equal time": dict(policy_batch=256)}),
    "objective": ("a TD(lambda) objective is worse (Fig. 19)", -1,
                  {"TD(lambda) objective": dict(agent="td")}),
    "shared": ("one policy for all tasks fails (Fig. 18)", -1,
               {"one policy for all tasks": dict(agent="shared")})}
OWN_MODEL = "activation", "model-updates", "prior", "wm-horizon"  # these train one for each variant


@dataclass
class Args(StudyArgs):
    task: str = "cartpole-swingup,walker-walk,cheetah-run,cup-catch"
    """tasks of the table"""
    only: str = "all"
    """all, or some of activation, model-updates, prior, wm-horizon, batch, objective, shared"""
    data_dir: str | None = None
    """episodes to train on (pwm.py --data-dir); without it a run of PWM makes them"""
    eval_every: int = 0
    """policy updates after which policies are evaluated, for the curve of Fig. 8b; 0: none"""
    eval_episodes: int = 10
    """deterministic episodes per task"""


# --------------------------------------------------------------------------------------- variants
def tell_task(z, wm, rows):
    """z (N, B, L) -> (1, N B, L + e): every latent with its task's embedding, in one batch."""
    e = wm.task_emb(rows.to(z.device)).detach()[:, None].expand(-1, z.shape[1], -1)
    return torch.cat([z, e], -1).flatten(0, 1)[None]


class SharedActor(pwm.Actors):
    """The interface of Actors with one network for all tasks, which sees their embeddings."""

    def __init__(self, wm, rows):
        super().__init__(torch.ones(1, wm.act_mask.shape[1]), wm.latent + wm.task_dim)
        self.wm, self.rows = [wm], rows  # in a list: not a sub-module
        self.act_mask = wm.act_mask[rows][:, None]

    def forward(self, z, eps=None):
        u = self.mu(tell_task(z, self.wm[0], self.rows)).view(*z.shape[:2], -1)
        if eps is not None:
            u = u + self.log_std.exp() * eps
        return torch.tanh(u) * self.act_mask

    def first(self):
        one = SharedActor(self.wm[0], self.rows[:1]).to(self.act_mask.device)
        one.load_state_dict(self.state_dict())
        return one


class SharedCritics(pwm.Critics):
    """The interface of Critics with one set of critics for all tasks."""

    def __init__(self, wm, rows):
        super().__init__(1, wm.latent + wm.task_dim)
        self.wm, self.rows = [wm], rows

    def forward(self, z):
        v = super().forward(tell_task(z, self.wm[0], self.rows))  # (1, E, N B)
        return v.view(self.E, *z.shape[:2]).transpose(0, 1)


class SharedAgent(pwm.Agent):
    def networks(self):
        wm, rows = self.wm, self.rows
        return dict(actors=SharedActor(wm, rows), critics=SharedCritics(wm, rows))


def td_returns(critics, z, rew, alive, gamma, lam):
    """pwm.imagined_returns with the mean TD(lambda) return of the imagined steps in the place of
    Eq. (6), through model and critics (App. F.3)."""
    _, target, reached = pwm.imagined_returns(critics, z, rew, alive, gamma, lam)
    values = torch.stack([critics(x).amin(1) for x in z[1:]])  # (H, N, B)
    goal = pwm.lambda_return(rew, torch.cat([values[:1], values]), gamma, lam, alive)
    return (reached * goal).mean(0), target, reached


class TdAgent(pwm.Agent):
    def __init__(self, *settings):
        super().__init__(*settings)
        self.functions.imagined_returns = td_returns


class MishAgent(pwm.Agent):
    activation = "mish"


class ReluAgent(pwm.Agent):
    activation = "relu"


AGENTS = {"PWM": pwm.Agent, "mish": MishAgent, "relu": ReluAgent, "td": TdAgent,
          "shared": SharedAgent, "TD-MPC2": tdmpc2.Agent}


# ------------------------------------------------------------------------------------------ cells
def work(name, cell, folder):
    """One training in its own folder: {folder, returns {column: {task: mean}}, errors, curve}."""
    inside, agent = Path(folder) / "cells" / name, AGENTS[cell.get("agent", "PWM")]
    inside.mkdir(parents=True, exist_ok=True)
    flags = {k: v for k, v in cell.items() if k != "agent"}
    with open(inside / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        result = pwm.main(pwm.Args(**flags), make_agent=agent, inside=inside)
    errors, curve = {}, []
    for entry in result["history"]:
        errors |= {k: v for k, v in entry.items() if "nmse" in k}  # of the last round
        if "evaluation" in entry:
            mean = float(np.mean(list(entry["evaluation"].values())))
            curve.append([entry["policy_updates"], mean])
    returns = {}
    for column, played in result["episodes"].items():
        returns[column] = {t: float(np.mean(x)) for t, x in played.items()}
    return dict(folder=str(inside), returns=returns, errors=errors, curve=curve,
                args=result["args"])


def update_seconds(cell, tasks):
    """Seconds of one policy update, measured on made-up start states."""
    cpu, flags = torch.device("cpu"), {k: v for k, v in cell.items() if k != "agent"}
    args = pwm.fill_args(pwm.Args(**flags), cpu, tasks)
    agent = pwm.Agent(args, tasks, cpu)
    agent.wm.requires_grad_(False)
    N, B, A, times = len(tasks), args.policy_batch, agent.wm.act_mask.shape[1], []
    task = agent.rows.repeat_interleave(B)
    for _ in range(4):
        obs, noise = torch.rand(N, B, agent.wm.obs_dim), torch.randn(args.horizon, N, B, A)
        began = time.perf_counter()
        z, rew, alive = pwm.imagine(agent.wm, agent.actors, obs, noise, task)
        J, target, weight = pwm.imagined_returns(agent.critics, z, rew, alive, 0.99, 0.95)
        pwm.descend(pwm.actor_loss(J, agent.stats.var), agent.opt["actors"], 1.0, N)
        z, target, weight = (pwm.by_task(x) for x in (z[:-1].detach(), target, weight))
        orders = torch.rand(args.critic_passes, args.horizon * B).argsort(1).flatten()
        for m in orders.chunk(pwm.CRITIC_BATCHES * args.critic_passes):
            loss = pwm.critic_loss(agent.critics, z[:, m], target[:, m], weight[:, m])
            pwm.descend(loss, agent.opt["critics"], 100.0, N)
        times.append(time.perf_counter() - began)
    return sorted(times)[1]


def variants_of(wanted, base, cells, tasks, args):
    """{variant-seed: cell} of all wanted ablations."""
    out = {}
    for name in wanted:
        for variant, changes in ABLATIONS[name][2].items():
            small = {k: v for k, v in FAST.items() if args.fast and k in changes}
            cell = base | changes | small
            if name == "batch":  # as many updates as fit into the base's time
                ratio = update_seconds(base, tasks) / update_seconds(cell, tasks)
                cell["policy_steps"] = max(1, round(base["policy_steps"] * ratio))
            for seed in seeds_for([name], args):
                mine = dict(cell, seed=seed)
                if name not in OWN_MODEL:
                    for flag in ("model_size", "wm_steps", "wm_batch"):
                        mine.pop(flag, None)
                    mine["checkpoint"] = f"{cells[f'base-{seed}']['folder']}/checkpoint.pt"
                out[f"{variant}-{seed}"] = mine
    return out


def seeds_for(names, args):
    more = 5 if "activation" in names and args.seeds == 3 and not args.fast else args.seeds
    return list(range(args.seed, args.seed + more))


def row(name, variant, cells, base, tasks, expected):
    """One line of the table: returns per seed (mean over tasks), the paired difference to PWM's
    policies of `base`, and one word for the paper's claim."""
    column = "prior" if name == "prior" else "ours"
    mine = np.array([[c["returns"][column][t] for t in tasks] for c in cells])  # (seeds, tasks)
    theirs = np.array([[c["returns"]["ours"][t] for t in tasks] for c in base])[:len(mine)]
    change, low, high = paired(mine, theirs)
    latent = [c["errors"]["latent_nmse_16"] for c in cells if "latent_nmse_16" in c["errors"]]
    return dict(ablation=name, variant=variant, returns=mine.mean(1).tolist(),
                mean=float(mine.mean()), tasks=dict(zip(tasks, mine.mean(0).tolist())),
                difference=change, ci95=[low, high],
                verdict=common.verdict(low, high, expected, len(mine)) if expected else "",
                latent=float(np.mean(latent)) if latent else None)


def table(wanted, made, tasks, args):
    """All rows, the base's first."""
    def of(variant, names):
        return [made[f"{variant}-{s}"] for s in seeds_for(names, args)]
    base = of("base", wanted)
    rows = [row("base", "base", base, base, tasks, 0)]
    for name in wanted:
        _, expected, variants = ABLATIONS[name]
        for variant in variants:
            cells = against = of(variant, [name])
            if name == "prior":  # TD-MPC2's Q has a part in this model: what that does is a row too
                rows.append(row("base", "PWM on TD-MPC2's model", cells, base, tasks, 0))
            else:
                against = base
            rows.append(row(name, variant, cells, against, tasks, expected))
    return rows


def figure_efficiency(path, made, wanted, args):
    """Fig. 8b: return against policy updates (mean and range of the seeds), and as a line what
    TD-MPC2's prior gets."""
    fig, ax = figure(7, 4.5)
    names = ["base", *(v for name in wanted for v in ABLATIONS[name][2])]
    for name in names:
        cells = [c for k, c in made.items() if k.rpartition("-")[0] == name]
        curves = np.array([c["curve"] for c in cells])  # (seeds, evaluations, 2)
        priors = [list(c["returns"]["prior"].values()) for c in cells if "prior" in c["returns"]]
        label = "PWM on TD-MPC2's model" if priors else name
        (line,) = ax.plot(curves[0, :, 0], curves[..., 1].mean(0), "o-", ms=3, label=label)
        low, high = curves[..., 1].min(0), curves[..., 1].max(0)
        ax.fill_between(curves[0, :, 0], low, high, color=line.get_color(), alpha=0.15)
        if priors:
            ax.axhline(np.mean(priors), color=line.get_color(), ls="--", label=name)
    ax.set(xlabel="policy updates", ylabel="return, mean over tasks")
    ax.legend(fontsize=8)
    save_figure(fig, path)


def main(args):
    """Data, base, variants, table; returns what results.json holds."""
    args = data.resumed(args)
    if args.fast and args.only == "all":
        args = replace(args, only="objective,shared", seeds=2)
    wanted = list(ABLATIONS) if args.only == "all" else args.only.split(",")
    if unknown := [x for x in wanted if x not in ABLATIONS]:
        raise SystemExit(f"--only {unknown[0]}: expected all or some of " + ", ".join(ABLATIONS))
    args, run = open_run("ablations", args)
    tasks, own = args.task.split(","), FAST if args.fast else {}
    every = dict(task=args.task, device=args.device, compile=args.compile, workers=1, ends=False,
                  eval_episodes=args.eval_episodes, seed=args.seed)
    folder = args.data_dir
    if folder is None:
        made = data.run_cells(work, {"data": every | DATA | own}, run.dir)
        folder = f"{made['data']['folder']}/episodes"
    playing = ("seed_episodes", "round_episodes", "rounds")
    base = every | CELL | {k: v for k, v in own.items() if k not in playing}
    base |= dict(data_dir=folder, eval_every=args.eval_every)
    cells = {f"base-{s}": dict(base, seed=s) for s in seeds_for(wanted, args)}
    made = data.run_cells(work, cells, run.dir, args.workers)
    variants = variants_of(wanted, base, made, tasks, args)
    made |= data.run_cells(work, variants, run.dir, args.workers)
    rows = table(wanted, made, tasks, args)
    heads = dict(variant="variant", mean="return", difference="minus base", ci95="95 % interval",
                 latent="latent error", verdict="claim")
    common.show(rows, heads)
    for name in wanted:
        print(f"{name}: {ABLATIONS[name][0]}")
    figures = ["efficiency.png"] if args.eval_every else []
    if figures:
        figure_efficiency(run.dir / "efficiency.png", made, wanted, args)
    return finish(run, "ablation", dict(tasks=tasks, rows=rows, cells=made), figures)


if __name__ == "__main__":
    command(Args, __doc__, main)
