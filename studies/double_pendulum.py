"""Fig. 3: what do policy gradients through the true plant and through learned models look like as
the horizon grows (Sec. 3.2, App. B)?

SHAC on the true double pendulum makes the policy and the data; models train on 3 and 16 steps; the
variance, expected signal-to-noise ratio (ESNR, Eq. 5) and direction of the policy gradient along
the same actions are then compared.

    python -m studies.double_pendulum           # 235 CPU seconds with three models per horizon
    python -m studies.double_pendulum --fast    # seconds; nothing is decided

Verdict: see `checks`; all must hold, with three models per horizon or more. Deviations from the
paper's protocol: small models of few updates, which begin on 3 steps for both horizons; a true
acrobot, where the reference's two hinges sit at one point, so that its links do not pull at each
other; all models see the same starts, noise, actions and reward scale, where the released code lets
the true plant go on from its last state and adds a term that grows with H to its ESNR; the gradient
flows action -> state -> reward, the policy's input is cut, as in the release. """
import copy
import json
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import pwm
from data import Batch
from studies.common import StudyArgs, command, figure, finish, judge, open_run, save_figure
from studies.plants import plant
from studies.shac import TruePlant

TASK = "studies.plants:double-pendulum"
BUDGET = dict(episodes=32, shac_updates=150, shac_horizon=32, random_episodes=480,
              base_updates=1000, model_updates=600, model_batch=128, latent=64, hidden=128,
              policy_updates=60, rollouts=100)
FAST = dict(episodes=2, shac_updates=2, shac_horizon=4, random_episodes=4, base_updates=4,
            model_updates=2, model_batch=8, latent=16, hidden=16, policy_updates=2, rollouts=4)


@dataclass
class Args(StudyArgs):
    task: str = "double-pendulum"
    """the plant"""
    seeds: int = 3
    """learned models per horizon; a verdict needs three"""


def play_pendulum(pendulum, act, state, steps):
    """Closed loop from state (B, 4): act(obs (B, 6), t) -> (B, 1). Returns obs (steps+1, B, 6),
    act, rew (steps, B)."""
    obs, acts, rew = [pendulum.observe(state)], [], []
    for t in range(steps):
        acts.append(act(obs[-1], t))
        state = pendulum.step(state, acts[-1])
        obs.append(pendulum.observe(state))
        rew.append(pendulum.reward(obs[-1]))
    return torch.stack(obs), torch.stack(acts), torch.stack(rew)


def extract(wm, starts, updates, horizon, gen, lr=2e-3, collect=None):
    """A policy for the pendulum by first-order gradients through wm (a WorldModel or TruePlant).

    starts (M, 6) start observations. collect(actors, share done) -> more starts, called before
    every 15th update. Returns the actors (one). The learning rate falls linearly to 1e-5; small
    networks, as the observation has 6 numbers. """
    actors = pwm.Actors(torch.ones(1, 1), wm.latent, (128, 64, 32))
    critics, stats = pwm.Critics(1, wm.latent, widths=(128, 64)), pwm.RunningStats(1)
    opts = [torch.optim.Adam(x.parameters(), lr, pwm.BETAS, fused=True) for x in (actors, critics)]
    wm.requires_grad_(False)
    task = torch.zeros(64, dtype=torch.long)
    for i in range(updates):
        if collect and i % 15 == 0:
            starts = torch.cat([starts, collect(actors, i / updates)])
        for opt in opts:
            pwm.set_rates(opt, pwm.between(lr, 1e-5, i / updates))
        obs = starts[torch.randint(len(starts), (64,), generator=gen)][None]
        noise = torch.randn(horizon, 1, 64, 1, generator=gen)
        orders = torch.rand(2, horizon * 64, generator=gen).argsort(1)
        z, rew, alive = pwm.imagine(wm, actors, obs, noise, task)
        J, target, weight = pwm.imagined_returns(critics, z, rew, alive, 0.99, 0.95)
        stats.update(J.detach())
        pwm.descend(pwm.actor_loss(J, stats.var), opts[0], 1.0, 1)
        actors.clamp_std()
        if wm.ends:
            critics.follow(pwm.by_task(target))
        z, target, weight = (pwm.by_task(x) for x in (z[:-1].detach(), target, weight))
        for order in orders:
            for m in order.chunk(pwm.CRITIC_BATCHES):
                loss = pwm.critic_loss(critics, z[:, m], target[:, m], weight[:, m])
                pwm.descend(loss, opts[1], 100.0, 1)
    return actors


def action_gradients(wm, obs, acts):
    """How later rewards depend on every action, along given actions: d(r_0 + .. + r_k)/d a_t, k, t
    < H.

    obs (N, O) starts, acts (H, N, 1). Returns (H, H, N): [k, t]. Gradients flow from action to
    state to reward only. """
    acts = acts.detach().requires_grad_()
    task = torch.zeros(len(obs), dtype=torch.long)
    z = [wm.encode(obs, task)]
    for a in acts[:-1]:
        z.append(wm.next(z[-1], a, task))
    rew = wm.reward_value(wm.reward(torch.stack(z), acts, task))  # (H, N)
    grads = [torch.autograd.grad(r.sum(), acts, retain_graph=True)[0] for r in rew]
    return torch.stack(grads)[..., 0].cumsum(0)  # roll-outs are independent


def policy_jacobian(actors, obs, eps):
    """d a / d(actor parameters) of single actions: obs (M, O), eps (M, 1) -> (M, P)."""
    params, rows = list(actors.parameters()), []
    for o, e in zip(obs, eps):
        grads = torch.autograd.grad(actors(o[None, None], e[None, None]).sum(), params)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def gradient_statistics(weights, jacobian):
    """Policy gradients g_n = sum_t dJ_H/da_t da_t/dtheta of N roll-outs for every horizon.

    weights (H, T, N) from action_gradients, jacobian (T, N, P). Returns {"variance": mean over
    parameters of the sample variance, "esnr": Eq. (5), "esnr_code": mean of the ratios as the
    released code has it}, each (H,); means (H, P). """
    out, means = {"variance": [], "esnr": [], "esnr_code": []}, []
    for w in weights:  # (T, N)
        g = -torch.einsum("tn,tnp->np", w, jacobian)  # of the loss -J_H
        mean, var = g.mean(0), g.var(0)
        out["variance"].append(float(var.mean()))
        out["esnr"].append(float(mean.square().sum() / var.sum()))
        out["esnr_code"].append(float((mean.square() / (var + 1e-9)).mean()))
        means.append(mean)
    return out, torch.stack(means)


def fit_model(wm, data, horizon, updates, lr, batch, gen):
    """Train wm on `horizon`-step sequences of obs (T+1, M, 6), act (T, M, 1), rew (T, M); returns
    the last loss."""
    obs, act, rew = data
    opt = torch.optim.Adam(wm.parameters(), lr, fused=True)
    steps = torch.arange(horizon + 1)[:, None]
    for i in range(updates):
        pwm.set_rates(opt, lr, min(1.0, 0.03 + 2 * (1 - i / updates)))
        e = torch.randint(act.shape[1], (batch,), generator=gen)
        t = torch.randint(len(act) - horizon + 1, (batch,), generator=gen) + steps  # (horizon+1, B)
        term = torch.zeros(horizon, batch)  # it never ends, and its head learns so
        mine = Batch(obs[t, e], act[t[:-1], e], rew[t[:-1], e], term, term + 1, e * 0)
        loss, *_ = pwm.world_model_loss(wm, mine)
        pwm.descend(loss, opt, 20.0)
    return float(loss.detach())


def train_models(data, seed, budget, note):
    """{3: WorldModel, 16: WorldModel} of one seed: the same start on 3-step sequences, then each on
    its own horizon (long sequences from nothing need far more updates than the minutes of this
    study)."""
    torch.manual_seed(seed)
    gen, hidden = torch.Generator().manual_seed(seed), budget["hidden"]
    base = pwm.WorldModel(6, [1], 2, hidden, hidden, budget["latent"], 0, ends=True)
    base.rew_std.copy_(data[2].std())
    fit_model(base, data, 3, budget["base_updates"], 1e-3, budget["model_batch"], gen)
    models = {}
    for horizon in (3, 16):
        models[horizon] = wm = copy.deepcopy(base)
        updates, batch = budget["model_updates"], budget["model_batch"]
        loss = fit_model(wm, data, horizon, updates, 6e-4, batch, gen)
        wm.requires_grad_(False)
        note(f"model {seed} of horizon {horizon}: loss {loss:.4f}")
    return models


def make_data(pendulum, budget, gen, note):
    """SHAC on the true plant, and the episodes it leaves: a third random, a third the policies on
    the way, a third the last one with wide noise. Returns actors, (obs (T+1, M, 6), act (T, M, 1),
    rew (T, M)), returns on the way (random actions first)."""
    T, m = pendulum.STEPS, budget["random_episodes"]
    held = (2 * torch.rand(T // 4, m, 1, generator=gen) - 1).repeat_interleave(4, 0)
    episodes = [play_pendulum(pendulum, lambda o, t: held[t], pendulum.reset(m, gen), T)]
    history = [float(episodes[0][2].sum(0).mean())]

    @torch.no_grad()
    def roll(actors, n, sigma):  # n episodes of the policy with its noise times sigma
        noise = torch.randn(T, 1, n, 1, generator=gen) * sigma
        start = pendulum.reset(n, gen)

        def act(o, t):
            return actors(o[None], noise[t])[0]
        episodes.append(play_pendulum(pendulum, act, start, T))

    def collect(actors, done):
        roll(actors, budget["episodes"], 1.0)
        obs, _, rew = episodes[-1]
        history.append(float(rew.sum(0).mean()))
        if len(history) % 4 == 2:
            note(f"SHAC {done:.0%}: return {history[-1]:.0f} (random actions {history[0]:.0f})")
        return obs[:-1].flatten(0, 1)

    true = TruePlant(pendulum, TASK, float(episodes[0][2].std()))
    starts = pendulum.observe(pendulum.reset(64, gen))
    updates, horizon = budget["shac_updates"], budget["shac_horizon"]
    actors = extract(true, starts, updates, horizon, gen, collect=collect)
    roll(actors, m, 3.0)
    return actors, [torch.cat(x, 1) for x in zip(*episodes)], history


def gradients(pendulum, actors, models, N, gen, note, H=50):
    """{"upright", "random": {model: [gradient_statistics and "cosine" for every seed]}}, of N
    roll-outs for horizons 1..H."""
    studies = {}
    for where, start in (("upright", torch.zeros(N, 4)), ("random", pendulum.reset(N, gen))):
        eps = torch.randn(H, 1, N, 1, generator=gen)
        with torch.no_grad():
            def act(o, t, eps=eps):
                return actors(o[None], eps[t])[0]
            seen, acts, _ = play_pendulum(pendulum, act, start, H)
        jacobian = policy_jacobian(actors, seen[:-1].flatten(0, 1), eps[:, 0].flatten(0, 1))
        jacobian = jacobian.view(H, N, -1)
        studies[where], true = {}, None
        for name, seeds in models.items():
            studies[where][name] = []
            for wm in seeds:
                numbers, mean = gradient_statistics(action_gradients(wm, seen[0], acts), jacobian)
                true = mean if true is None else true
                cosine = F.cosine_similarity(mean, true, dim=1).tolist()
                studies[where][name].append(dict(numbers, cosine=cosine))
        note(f"gradients from {where} starts")
    return studies


def checks_of(upright, n):
    """What counts as reproduced, {sentence: bool}; lists in `upright` are over H = 1..50."""
    true, models = upright["true"][0], {h: upright[f"WM, H = {h}"] for h in (3, 16)}
    growth = true["variance"][49] / true["variance"][15]
    over = [true["variance"][49] / m["variance"][49] for m in models[16]]
    gain = [min(m["esnr"][h] / true["esnr"][h] for h in range(15, 50)) for m in models[16]]
    pairs = list(zip(models[16], models[3]))
    better = [min(a["esnr"][h] / b["esnr"][h] for h in range(7, 30)) for a, b in pairs]

    def shown(x):
        return ", ".join(f"{v:.3g}" for v in x)
    return {f"three models per horizon or more: {n}": n >= 3,
            f"true variance grows at least 100 times from H = 16 to 50: {growth:.3g} times":
                growth >= 100,
            f"there it is at least 5 times that of models trained on 16 steps: {shown(over)} times":
                min(over) >= 5,
            f"their ESNR is at least 10 times the true one for all H >= 16: at least {shown(gain)}":
                min(gain) >= 10,
            f"and above that of models trained on 3 steps for 8 <= H <= 30: {shown(better)} times":
                min(better) > 1}


def draw(path, studies):
    """Fig. 3, with the direction of the gradients: rows fixed upright start and random starts."""
    fig, axes = figure(14, 4 * len(studies), len(studies), 3, squeeze=False)
    colors = dict(zip(studies["upright"], ("black", "tab:orange", "tab:blue")))
    titles = {"variance": "variance of the gradient", "esnr": "ESNR (Eq. 5)",
              "cosine": "cosine to the true mean gradient"}
    for row, (where, models) in zip(axes, studies.items()):
        for ax, (key, title) in zip(row, titles.items()):
            for name, stats in models.items():
                for k, x in enumerate(stats):
                    ax.plot(range(1, len(x[key]) + 1), x[key], color=colors[name], lw=1.3,
                            alpha=0.8, label=None if k else name)
            ax.set(title=f"{title}, {where} start{'s' * (where == 'random')}", xlabel="H")
            if key != "cosine":
                ax.set_yscale("log")
        row[0].legend(fontsize=8)
    save_figure(fig, path)


def main(args):
    """Policy and data, models, gradients, verdict; returns what results.json holds."""
    args, run = open_run("double_pendulum", args)
    began, cpu = time.time(), time.process_time()
    pendulum, gen = plant(args.task), torch.Generator().manual_seed(args.seed)
    budget = FAST if args.fast else BUDGET
    torch.manual_seed(args.seed)

    def note(text):
        used = time.process_time() - cpu
        print(f"{text} ({time.time() - began:.0f} s, {used:.0f} CPU-s)", flush=True)

    actors, data, history = make_data(pendulum, budget, gen, note)
    test = pendulum.reset(64, torch.Generator().manual_seed(7))
    zero = torch.zeros(64, dtype=torch.long)

    @torch.no_grad()
    def mean_return(actors, wm):
        def act(o, t):
            return actors(wm.encode(o, zero)[None])[0]
        return float(play_pendulum(pendulum, act, test, pendulum.STEPS)[2].sum(0).mean())

    models = {"true": [TruePlant(pendulum, TASK, float(data[2].std()))]}
    returns = {"random": history[0], "SHAC, true plant": mean_return(actors, models["true"][0])}
    note(f"SHAC: return {returns['SHAC, true plant']:.0f}")
    learned = [train_models(data, args.seed + k, budget, note) for k in range(args.seeds)]
    starts = data[0][:-1].flatten(0, 1)
    for horizon in (3, 16):
        name = f"WM, H = {horizon}"
        models[name], mine = [pair[horizon] for pair in learned], []
        for wm in models[name]:
            policy = extract(wm, starts, budget["policy_updates"], 16, gen)
            mine.append(mean_return(policy, wm))
        returns[f"PWM, {name}"] = mine
        note(f"PWM on models of horizon {horizon}: returns {np.round(mine)}")
    studies = gradients(pendulum, actors, models, budget["rollouts"], gen, note)
    draw(run.dir / "figure3.png", studies)
    print("\n" + "cosine to the true mean gradient, random starts".ljust(50)
          + "".join(f"{f'H = {h}':>10}" for h in (16, 30, 50)))
    for name, stats in studies["random"].items():
        for k, x in enumerate(stats):
            shown = "".join(f"{x['cosine'][h - 1]:10.2f}" for h in (16, 30, 50))
            print(f"{f'{name}, model {k}':50}{shown}")
    print(f"\nreturns over 240 steps: {json.dumps(returns)}")
    checks = {k: bool(v) for k, v in checks_of(studies["upright"], args.seeds).items()}
    result = dict(verdict=judge(checks), checks=checks, gradients=studies, returns=returns,
                  shac_returns=history, cpu_seconds=round(time.process_time() - cpu, 1))
    return finish(run, "double_pendulum", result, ["figure3.png"])


if __name__ == "__main__":
    command(Args, __doc__, main)
