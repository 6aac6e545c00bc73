"""Does a sharper VAE give the actor a steadier gradient?

    python -m studies.mow_fidelity           # 5 variants, 3 seeds: two hours on two cores

One VAE for all tasks, its width and its latents vary, the dynamics do not; world model, actor and
critic learn on random play. At five checkpoints, per task: how good held-out reconstructions are
(PSNR, SSIM, perceptual distance), and the noise of the actor's gradient in imagination, tr Cov /
|mean|^2 over the parts of one large batch of roll-outs.

Rule: sharper images `help` if the rank correlation of noise and PSNR over all points is below -0.5,
they do `not` if it lies between -0.5 and 0.5, and `hurt` above.
"""
import copy
from dataclasses import dataclass

import numpy as np
import torch

import mow
from studies import mow_diagnosis as lab
from studies.common import command, figure, finish, open_run, save_figure, show


@dataclass
class Args(lab.ModelArgs):
    task: str = "Boxing,Krull"
    """games, as in mow.py"""
    warmup: int = 0
    """no clusters"""
    updates: int = 300
    """of world model, actor and critic"""
    random_steps: int = 200
    """steps of random play per task"""


MEASURES = {"psnr": "PSNR", "ssim": "SSIM", "perceptual": "distance"}


def gradient_noise(agent, frames, since, parts=8, rollouts=1024):
    """tr Cov / |mean|^2 of the actor's gradient for each task, over the parts of one batch of
    imagined roll-outs. It is near `parts` where there is only noise: the mean of n parts has 1/n of
    their variance. So the batch is large."""
    a, wm, out = agent.args, agent.wm.eval(), []
    torch.manual_seed(mow.draw_seed(a.seed, 10))
    rng = np.random.default_rng([a.seed, 10])
    obs, acts, _, _, first = frames.sample(rollouts, a.context + 1, rng, agent.device, since=since)
    with torch.no_grad():
        z = mow.draw_latent(wm.posterior(mow.to_images(obs), wm.embedding()))
    dream = agent.imagine_from(z, acts, first)
    for k in range(agent.K):
        one, actor = slice(k, k + 1), copy.deepcopy(agent.actor)
        actor.legal, actor.continuous = actor.legal[one], actor.continuous[one]
        grads = []
        for i in range(parts):
            part = [x[one, i::parts] for x in dream]
            loss, *_ = mow.agent_loss(
                actor, agent.critic, agent.slow, wm.cluster_of[one], *part, agent.low[one],
                agent.high[one])
            grad = torch.autograd.grad(loss, list(actor.parameters()))
            grads.append(torch.cat([g.flatten() for g in grad]))
        grads = torch.stack(grads)
        out.append(float(grads.var(0).sum() / grads.mean(0).square().sum()))
    return out


def rank_correlation(x, y):
    """Spearman's rho of all numbers in two lists of lists; None where one of them is constant."""
    from scipy.stats import spearmanr
    if 0 in (np.ptp(x), np.ptp(y)):
        return None
    return float(spearmanr(np.ravel(x), np.ravel(y)).statistic)


def work(name, cell, folder):
    agent, frames, test = lab.begin(cell)
    points, total = [], agent.total
    rollouts = 64 if cell["batches"] == 1 else 1024
    for i in range(1, 6):
        lab.learn(agent, frames, total * i // 5, act=True)
        point = lab.fidelity(agent, frames, test, cell["batches"])
        points.append(point | {"noise": gradient_noise(agent, frames, test, 8, rollouts)})
    last = {x: points[-1][x] for x in (*MEASURES, "noise")}
    return {"variant": cell["variant"], "points": points} | last


def plot(found, path):
    """Noise of the actor's gradient over PSNR: a point per task, checkpoint and seed."""
    fig, ax = figure(6, 4)
    for variant in dict.fromkeys(f["variant"] for f in found.values()):
        points = []
        for f in found.values():
            points += f["points"] if f["variant"] == variant else []
        ax.semilogy(np.ravel([p["psnr"] for p in points]), np.ravel([p["noise"] for p in points]),
                    ".", label=variant)
    ax.set(xlabel="PSNR of held-out reconstructions (dB)",
           ylabel="tr Cov / |mean|$^2$ of the actor's gradient")
    ax.legend(fontsize=8)
    save_figure(fig, path)


def main(args):
    args, run = open_run("mow_fidelity", lab.quick(args))
    size = lab.script_args(args).sizes
    c, n = size["stem"], size["latents"]
    sizes = {f"stem{i}": dict(stem=i) for i in (c // 2, c, 2 * c)}
    sizes |= {f"latents{i}": dict(latents=i, classes=i) for i in (n // 2, 2 * n)}
    variants = {name: dict(clusters=1, sizes={**args.sizes, **x}) for name, x in sizes.items()}
    found = lab.run_cells(work, lab.plan(args, run, variants), run, args)
    rows = lab.over_seeds(found, (*MEASURES, "noise"))
    rows.append(dict.fromkeys(rows[0]) | {"variant": "all together"})
    for row in rows:
        mine = []
        for f in found.values():
            mine += f["points"] if row["variant"] in (f["variant"], "all together") else []
        for x in MEASURES:
            row[f"rho_{x}"] = rank_correlation([p[x] for p in mine], [p["noise"] for p in mine])
    plot(found, run.dir / "scatter.png")
    rho = rows[-1]["rho_psnr"]
    verdict = "undecided"
    if rho is not None:
        verdict = "help" if rho < -0.5 else "not" if rho < 0.5 else "hurt"
    show(rows, {"variant": "variant", **MEASURES, "noise": "noise", "noise_sd": "+-",
                **{f"rho_{x}": f"rho with {name}" for x, name in MEASURES.items()}})
    print(f"do sharper images give a steadier gradient? {verdict}")
    return finish(run, "mow_fidelity", dict(rows=rows, cells=found, verdict=verdict),
                  ["scatter.png"])


if __name__ == "__main__":
    command(Args, __doc__, main)
