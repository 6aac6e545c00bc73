"""Fig. 2: why the less accurate world model gives the better optimum (Sec. 3.1, App. A).

Small networks, ReLU or SimNorm, are fitted to the cost of throwing a ball over a wall, a landscape
with cliffs; gradient descent on the fit starts in a plateau. Where does it end?

    python -m studies.ball_wall           # 85 CPU seconds: reproduced, gap 3.7 m instead of 16.9 m
    python -m studies.ball_wall --fast    # seconds; nothing is decided

Verdict: reproduced if SimNorm's model error is at least twice ReLU's, its median gap to the optimum
at most a third of ReLU's, and below 5 in 90 % of 20 networks or more. Deviations from the paper's
protocol: networks as the text says, without the LayerNorm of the released code (whose "ReLU" is
Mish); gradient descent is run (SGD 0.01, 2000 steps), where the released code takes the argmin of
the model; contact time with k = 1 as printed (a slip), the right one, k = 2, beside it. SimNorm's
advantage needs under-fitting and groups of 4 or 8: see the table's other rows. """
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

import data
from pwm import init_default, simnorm
from studies.common import StudyArgs, command, figure, finish, judge, open_run, save_figure
from studies.plants import plant


@dataclass
class Args(StudyArgs):
    task: str = "ball-wall"
    """the plant"""
    seeds: int = 100
    """networks of ReLU and SimNorm; of the other rows at most 20"""


class ToyNet(nn.Module):
    """n small networks 1-32-32-1 side by side, without normalisation: theta (n, B) -> J (n, B)."""

    def __init__(self, n, act):
        super().__init__()
        self.act = act
        layers = [[init_default(i, j) for _ in range(n)] for i, j in ((1, 32), (32, 32), (32, 1))]
        weights = [torch.stack([w for w, _ in layer]) for layer in layers]
        biases = [torch.stack([b for _, b in layer])[:, None] for layer in layers]
        self.weight, self.bias = nn.ParameterList(weights), nn.ParameterList(biases)

    def forward(self, x):
        x = x[..., None]
        for k, (W, b) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(b, x, W)
            x = self.act(x) if k < 2 else x
        return x[..., 0]


def fit_landscape(act, cost, n, epochs, seed):
    """Regress cost(theta) with n networks of activation `act`: 1000 uniform angles each, MSE, Adam
    2e-3, batch 50. Every call with the same n and seed starts from the same weights and angles
    (App. A). Returns net and losses (epochs, n)."""
    torch.manual_seed(seed)
    net, g = ToyNet(n, act), torch.Generator().manual_seed(seed)
    theta = (2 * torch.rand(n, 1000, generator=g) - 1) * math.pi
    J = cost(theta)
    opt = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    losses = []
    for _ in range(epochs):
        order, total = torch.rand(n, 1000, generator=g).argsort(1), 0
        for rows in order.split(50, 1):
            error = (net(theta.gather(1, rows)) - J.gather(1, rows)).square().mean(1)  # (n,)
            opt.zero_grad(set_to_none=True)
            error.sum().backward()  # the networks share nothing
            opt.step()
            total = total + error.detach() / 20
        losses.append(total)
    return net, torch.stack(losses)


def descend(net, n, steps=2000, lr=0.01):
    """Gradient descent on n fitted landscapes from theta = -pi, kept in [-pi, pi] -> angles
    (n,)."""
    theta = torch.full((n, 1), -math.pi, requires_grad=True)
    for _ in range(steps):
        (grad,) = torch.autograd.grad(net(theta).sum(), theta)
        with torch.no_grad():
            theta.sub_(lr * grad).clamp_(-math.pi, math.pi)
    return theta.detach()[:, 0]


def networks(n):
    """{row of the table: (activation, epochs, contact time, networks)}"""
    few = min(n, 20)
    rows = {"ReLU": (torch.relu, 100, 1, n), "SimNorm": (simnorm, 100, 1, n)}
    for V in (4, 16, 32):
        rows[f"SimNorm, groups of {V}"] = functools.partial(simnorm, V=V), 100, 1, few
    for name, act in (("ReLU", torch.relu), ("SimNorm", simnorm)):
        rows[f"{name}, 10 x training"] = act, 1000, 1, few
    for name, act in (("ReLU", torch.relu), ("SimNorm", simnorm)):
        rows[f"{name}, right contact time"] = act, 100, 2, few
    return rows


def verdict(relu, smooth):
    """{sentence: bool} from the two main rows."""
    n, gaps = len(smooth["gap"]), [np.median(x["gap"]) for x in (relu, smooth)]
    ratio = np.median(smooth["rmse"]) / np.median(relu["rmse"])
    share = float(np.mean(np.array(smooth["gap"]) < 5))
    return {f"model error of SimNorm at least twice that of ReLU: {ratio:.2f} times":
                bool(ratio >= 2),
            f"its median gap at most a third of ReLU's: {gaps[1]:.2f} against {gaps[0]:.2f}":
                bool(gaps[1] <= gaps[0] / 3),
            f"its gap below 5 in 90 % of 20 seeds or more: {share:.0%} of {n}":
                share >= 0.9 and n >= 20}


def main(args):
    """Fit, descend, judge, draw; returns what results.json holds."""
    data.check_ranges(args, dict(seeds=(2, None)))
    args, run = open_run("ball_wall", args)
    ball, grid = plant(args.task), torch.linspace(-math.pi, math.pi, 4001)
    rows, kept = {}, {}
    for name, (act, epochs, k, size) in networks(args.seeds).items():
        cost = functools.partial(ball.cost, k=k)
        trained = epochs // 50 if args.fast else epochs
        net, losses = fit_landscape(act, cost, size, trained, args.seed)
        with torch.no_grad():
            fitted, true = net(grid.expand(size, -1)), cost(grid)
            rmse = (fitted - true).square().mean(1).sqrt()
        theta = descend(net, size, 200 if args.fast else 2000)
        gap, error = cost(theta) - true.min(), (theta - grid[true.argmin()]).abs()
        rows[name] = dict(seeds=size, epochs=epochs, k=k, rmse=rmse.tolist(), theta=theta.tolist(),
                          gap=gap.tolist(), angle_error=error.tolist())
        kept[name] = fitted, losses
        print(f"{name:28} {size:4} seeds   error {rmse.median():6.2f}   gap {gap.median():6.2f}   "
              f"theta {theta.median():6.3f}", flush=True)
    checks = verdict(rows["ReLU"], rows["SimNorm"])
    draw(run.dir / "figure2.png", ball, grid, rows, kept)
    return finish(run, "ball_wall", dict(verdict=judge(checks), checks=checks, table=rows),
                  ["figure2.png"])


def draw(path, ball, grid, rows, kept):
    """Figs. 2 and 10: the throw, the landscapes with start and end of a typical seed, training
    losses, the table."""
    fig, (sketch, land, loss, table) = figure(17, 4, 1, 4, width_ratios=(1, 1.4, 1, 1.3))
    for theta in (-0.6, 0.0, 0.26, 0.8):
        x, y = ball.path(theta).T
        sketch.plot(x, y, "o-", ms=2, lw=1, label=f"θ = {theta:.2f}")
    sketch.plot([ball.WALL, ball.WALL], [-15, ball.TOP], "k", lw=4)
    sketch.set(title="throw over the wall", xlabel="x [m]", ylabel="y [m]", ylim=(-15, 6))
    sketch.legend(fontsize=7)
    land.plot(grid, ball.cost(grid), "k", lw=1.5, label="true J(θ)")
    for name, color in (("ReLU", "tab:red"), ("SimNorm", "tab:blue")):
        gap, (fitted, losses) = np.array(rows[name]["gap"]), kept[name]
        i = int(np.argsort(gap)[len(gap) // 2])  # the seed with the median gap
        ends = np.array([-math.pi, rows[name]["theta"][i]])
        heights = np.interp(ends, grid, fitted[i])
        land.plot(grid, fitted[i], color=color, lw=1.2, label=name)
        land.plot(ends[0], heights[0], "x", color=color, ms=9, mew=2)
        land.plot(ends[1], heights[1], "*", color=color, ms=14, mec="k")
        q = losses.quantile(torch.tensor([0.25, 0.5, 0.75]), 1)
        loss.plot(q[1], color=color, label=name)
        loss.fill_between(range(len(q[1])), q[0], q[2], color=color, alpha=0.2)
    land.set(title="landscapes: start ×, end ★ (typical seed)", xlabel="θ [rad]", ylabel="J")
    loss.set(title="training loss (quartiles over seeds)", xlabel="epoch", ylabel="MSE",
             yscale="log")
    for ax in (land, loss):
        ax.legend(fontsize=8)
    table.axis("off")
    cells = [[name, f"{np.median(r['rmse']):.2f}", f"{np.median(r['gap']):.2f}"]
             for name, r in rows.items()]
    heads = ["model", "error (RMSE)", "gap |J(θ*) - J(θ̂)|"]
    made = table.table(cells, colLabels=heads, loc="center", colWidths=[0.5, 0.22, 0.33])
    made.auto_set_font_size(False)
    made.set_fontsize(8)
    made.scale(1, 1.4)
    table.set_title("medians over seeds")
    save_figure(fig, path)


if __name__ == "__main__":
    command(Args, __doc__, main)
