"""How good is the world model of a finished run of mow.py, and which task uses which expert?

    python -m studies.mow_diagnosis --run runs/NAME        # a minute; without --run a tiny one

Prints per task the PSNR, SSIM and a perceptual distance of reconstructions, the PSNR of open-loop
imagination, the KL of the dynamics, and how the router shares out the experts. Draws frames.png:
real, rebuilt and imagined images; routing.png; curve.png: losses and scores of episodes. Also holds
what MoW's other studies share: random play, training of a world model on it, measures, tables.

Rule: imagination `holds` if in every task its PSNR is at least that of showing the mean image.
"""
import functools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import data
import mow
from data import Frames, choose_device, write_json
from envs import Fleet, score
from studies.common import StudyArgs, command, figure, finish, open_run, save_figure, seeds_of, show

TINY = dict(stem=4, latents=4, classes=4, width=16, heads=2, hidden=16, emb=8)


@dataclass
class ModelArgs(StudyArgs):
    """Flags of studies that train world models on random play, tested on its last fifth."""
    task: str = "Boxing,Krull,RoadRunner"
    """games, as in mow.py"""
    preset: Literal["auto", "cpu", "gpu", "paper"] = "auto"
    """sizes, as in mow.py"""
    random_steps: int = 300
    """steps of random play per task"""
    warmup: int = 60
    """updates before the tasks are clustered"""
    updates: int = 160
    """updates after that"""
    batch: int = 2
    """sequences per task and update"""
    sizes: dict[str, int] = field(default_factory=dict)
    """sizes of networks other than the preset's, as in mow.py"""


def quick(args):
    """args, or what --fast makes of them."""
    if not args.fast:
        return args
    return replace(args, seeds=1, workers=1, random_steps=45, warmup=2, updates=1,
                   sizes={**TINY, **args.sizes})


def script_args(args, **changes):
    """The flags of mow.py that a study's flags stand for."""
    device, _ = choose_device(args.device)
    changes = {"sizes": args.sizes, **changes}
    small = dict(length=8, context=3, horizon=3, rollouts=8) if args.fast else {}
    given = dict(task=args.task, seed=args.seed, device=args.device, compile=args.compile,
                 preset=args.preset, random_steps=args.random_steps, warmup=args.warmup,
                 steps=args.random_steps + args.updates, train_every=1, batch=args.batch)
    tasks = mow.task_list(args.task)
    a = mow.settle(mow.Args(**{**given, **small, **changes}), tasks, device)
    mow.check(a, len(tasks), 1)
    if a.random_steps < 5 * (a.length + 1):
        raise SystemExit(f"studies test on the last fifth of --random-steps {a.random_steps}, "
                         f"which holds no window of length {a.length}: type --random-steps "
                         f"{5 * a.length + 5} or more")
    return a


def plan(args, run, variants, **more):
    """Cells of a study, after the random play of all seeds: {name: plain dict} for the variants
    {name: changes of mow.Args}."""
    cells = {}
    for seed in seeds_of(args):
        random_frames(script_args(args, seed=seed), run.dir)
        for name, changes in variants.items():
            a = script_args(args, seed=seed, **changes)
            cells[f"{name}_s{seed}"] = {"variant": name, "seed": seed, "args": asdict(a),
                                        "folder": str(run.dir), "batches": 1 if args.fast else 8,
                                        **more}
    return cells


def run_cells(work, cells, run, args):
    """data.run_cells; one after the other where they share a GPU."""
    device, _ = choose_device(args.device)
    return data.run_cells(work, cells, run.dir, 1 if device.type == "cuda" else args.workers)


def random_frames(a, folder):
    """Random play of all tasks, the same for all cells of a seed -> (frames, legal actions)."""
    path, tasks = Path(folder) / f"frames_{a.seed}", mow.task_list(a.task)
    if not (path / "legal.json").exists():
        with Fleet(tasks, mow.task_options(a, tasks)) as fleet:
            agent = mow.Agent(a, fleet.legal, torch.device("cpu"))
            frames = Frames(path, agent.K, a.random_steps, agent.A)
            stage = mow.Stage(agent, fleet, 1, lambda k, r, n: mow.draw_seed(a.seed, 3, k, n),
                              frames)
            stage.begin()
            for step in range(a.random_steps):
                stage.send(agent.play_randomly, [a.seed, 4, step])
                stage.receive()
            frames.flush()
            write_json(path / "legal.json", [agent.A, fleet.legal])
    A, legal = json.loads((path / "legal.json").read_text())
    frames = Frames(path, len(tasks), a.random_steps, A)
    frames.count = a.random_steps
    return frames, legal


def begin(cell, make_agent=mow.Agent, **changes):
    """Agent, frames and first row of the test part of a cell."""
    a = mow.Args(**{**cell["args"], **changes})
    frames, legal = random_frames(a, cell["folder"])
    return make_agent(a, legal, choose_device(a.device)[0]), frames, first_test_row(frames)


def first_test_row(frames):
    """Studies test on the last fifth."""
    return frames.count * 4 // 5


def learn(agent, frames, until, tasks=None, act=False, rows=None):
    """Updates on the first `rows` of frames (all but the test part) until there were so many."""
    n, frames.count = frames.count, rows or first_test_row(frames)
    while agent.updates < until:
        batch = agent.sample(frames, tasks)
        loss, z, _ = agent.model_loss(batch, tasks)
        mow.descend(loss, agent.opt, 1000.0)
        agent.updates += 1
        if act:
            loss, _ = agent.policy_loss(agent.imagine(z, batch))
            mow.descend(loss, agent.agent_opt, 100.0)
            agent.follow()
    frames.count = n


# ---------------------------------------------------------------------------------------- measures
def ssim(x, y):
    """Structural similarity of images (.., H, W) in [0, 1], the mean over pixels: (..).

    Local means and variances are weighted by a Gaussian of 1.5 pixels in windows of 11 that lie
    within the image (Wang et al., 2004)."""
    g = torch.exp(-torch.linspace(-5, 5, 11, device=x.device).square() / (2 * 1.5**2))
    g = g / g.sum()

    def bands(n):
        return torch.stack([F.pad(g, (i, n - 11 - i)) for i in range(n - 10)])

    rows, cols = bands(x.shape[-2]), bands(x.shape[-1]).T
    mx, my, xx, yy, xy = (rows @ m @ cols for m in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    return (alike / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))).mean((-2, -1))


@functools.cache
def random_filters(device):
    """Kernels of three convolutions, drawn once for all runs."""
    g, widths = torch.Generator().manual_seed(0), (3, 32, 64, 128)
    return [torch.randn(o, i, 3, 3, generator=g).mul((2 / (9 * i)) ** 0.5).to(device)
            for i, o in zip(widths, widths[1:])]


def perceptual(x, y):
    """Distance of images (.., 3, H, W) in [0, 1] as in LPIPS (Zhang et al., 2018), in a network of
    fixed random weights: squared difference of features of norm 1 per place, mean over places, sum
    over layers."""
    pair, out = torch.stack([x, y]).reshape(2, -1, *x.shape[-3:]) * 2 - 1, 0.0
    for kernel in random_filters(x.device):
        pair = F.relu(F.conv2d(pair.flatten(0, 1), kernel, stride=2, padding=1))
        pair = pair.unflatten(0, (2, -1))
        a, b = F.normalize(pair, dim=2)
        out = out + (a - b).square().sum(1).mean((-2, -1))
    return out.view(x.shape[:-3])


def psnr(x, y):
    """Decibels of images (.., 3, H, W): (..)."""
    return -10 * (y - x).square().mean((-3, -2, -1)).clamp(min=1e-8).log10()


@torch.no_grad()
def fidelity(agent, frames, since=0, batches=8):
    """How good the world model is per task on the frames from row `since` on: {name: [K numbers]}.

    PSNR, SSIM and `perceptual` distance of reconstructions, PSNR of open-loop imagination,
    dynamics KL, reconstruction loss."""
    a, rows = agent.args, []
    for i in range(batches):
        torch.manual_seed(mow.draw_seed(a.seed, 7, i))
        rng = np.random.default_rng([a.seed, 7, i])
        batch = frames.sample(a.batch, a.length, rng, agent.device, since=since)
        real, rebuilt, dreamt = mow.open_loop_images(agent, batch, a.context)
        losses, more = mow.world_model_loss(agent.wm, *batch, agent.temperature(), 0.0,
                                            gate=agent.gate, reset_mask=agent.reset_mask)
        dream = psnr(real, dreamt)[:, :, a.context:]
        mean = real.mean((1, 2), keepdim=True).expand_as(real)
        rows.append(torch.stack([
            psnr(real, rebuilt).mean((1, 2)), ssim(rebuilt, real).mean((1, 2, 3)),
            perceptual(rebuilt, real).mean((1, 2)), dream.mean((1, 2)),
            psnr(real, mean).mean((1, 2)), more["dyn_raw"], losses["rec"]]))
    names = "psnr", "ssim", "perceptual", "open_loop_psnr", "mean_image_psnr", "dyn_kl", "rec"
    return dict(zip(names, torch.stack(rows).mean(0).tolist()))


@torch.no_grad()
def held_out_loss(agent, frames, tasks, since=0, batches=8, only=None):
    """L_k of the tasks in the list, or the sum of some of its terms, on the frames from `since`."""
    a, out = agent.args, []
    for i in range(batches):
        torch.manual_seed(mow.draw_seed(a.seed, 9, i))
        rng = np.random.default_rng([a.seed, 9, i])
        batch = frames.sample(a.batch, a.length, rng, agent.device, tasks, since)
        losses, _ = mow.world_model_loss(agent.wm.eval(), *batch, agent.temperature(), 0.0,
                                         gate=agent.gate, reset_mask=agent.reset_mask, task=tasks)
        chosen = {k: x for k, x in losses.items() if k in (only or losses)}
        out.append(mow.total_loss(chosen, agent.task_coef))
    return torch.stack(out).mean(0).tolist()


def entropy(p):
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


@torch.no_grad()
def routing_facts(agent):
    """Who uses what: scores S (K, experts), chosen experts, entropy of their use (nats), dead ones,
    and the mutual information I(task; expert)."""
    S, J, _ = agent.wm.routing(agent.wm.embedding(), agent.temperature())
    chosen = F.one_hot(J, S.shape[1]).sum(1).double() / J.shape[1]       # (K, N), p(expert | task)
    use = chosen.mean(0)
    return {"scores": S.tolist(), "chosen": J.tolist(), "usage_entropy": float(entropy(use)),
            "dead_experts": int((use == 0).sum()),
            "mutual_information": float(entropy(use) - entropy(chosen).mean())}


@torch.no_grad()
def drop_one(agent, frames, batches=4):
    """How much each task's dynamics KL rises when one expert's output is zero: (experts, K)."""
    base, out = np.array(fidelity(agent, frames, batches=batches)["dyn_kl"]), []
    last = agent.wm.experts.blocks[-1].norm2
    for j in range(agent.args.experts):
        kept = last.gain[j].clone(), last.shift[j].clone()
        last.gain[j], last.shift[j] = 0.0, 0.0
        out.append((np.array(fidelity(agent, frames, batches=batches)["dyn_kl"]) - base).tolist())
        last.gain[j], last.shift[j] = kept
    return out


def over_seeds(found, numbers, same=()):
    """A row per variant of the cells `found`: mean over tasks and seeds and standard deviation over
    seeds of `numbers` (None if one seed has none), and what is the `same` for all seeds."""
    rows = []
    for v in dict.fromkeys(f["variant"] for f in found.values()):
        mine = [f for f in found.values() if f["variant"] == v]
        row = {"variant": v} | {x: mine[0][x] for x in same}
        for x in numbers:
            values = [] if any(f[x] is None for f in mine) else [float(np.mean(f[x])) for f in mine]
            row[x] = float(np.mean(values)) if values else None
            row[f"{x}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


def per_seed(found, variant, number):
    """(seeds, 1) means over tasks of a variant's number, for `paired`."""
    return [[float(np.mean(f[number]))] for f in found.values() if f["variant"] == variant]


# ----------------------------------------------------------------------------------------- figures
def draw_frames(agent, frames, tasks, path, columns=12):
    """Real, reconstructed and imagined images of one window per task."""
    a, K = agent.args, agent.K
    torch.manual_seed(mow.draw_seed(a.seed, 8))
    batch = frames.sample(1, a.length, np.random.default_rng([a.seed, 8]), agent.device)
    images = torch.stack(mow.open_loop_images(agent, batch, a.context))[:, :, 0].float().cpu()
    at = np.unique(np.linspace(0, a.length - 1, columns).round().astype(int))
    fig, axes = figure(0.85 * len(at) + 1.2, 2.75 * K, K, squeeze=False)
    for k, (task, ax) in enumerate(zip(tasks, axes[:, 0])):
        tiles = images[:, k, at].permute(0, 3, 1, 4, 2)                    # (3, 64, columns, 64, 3)
        ax.imshow(tiles.reshape(3 * 64, -1, 3).numpy(), interpolation="nearest")
        ax.set_yticks([32, 96, 160], ["real", "rebuilt", "imagined"])
        ax.set_xticks(np.arange(len(at)) * 64 + 32, at + 1)
        ax.axvline(64 * int((at < a.context).sum()) - 0.5, color="white", lw=2)
        ax.set_title(f"{task}: imagination sees {a.context} images, then actions", fontsize=9)
    save_figure(fig, path, 100)


def draw_routing(facts, labels, tasks, path):
    """The router's scores, those of the chosen experts as numbers."""
    S, J = np.array(facts["scores"]), np.array(facts["chosen"])
    fig, ax = figure(2.6 + 0.55 * S.shape[1], 1.3 + 0.32 * len(S))
    fig.colorbar(ax.imshow(S, cmap="Blues", vmin=0, aspect="auto"), label="router score")
    for k, j in zip(np.arange(len(S)).repeat(J.shape[1]), J.flatten()):
        color = "white" if S[k, j] > 0.6 * S.max() else "black"
        ax.text(j, k, f"{S[k, j]:.2f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_yticks(range(len(S)), [f"{t} ({c + 1})" for t, c in zip(tasks, labels)])
    ax.set_xticks(range(S.shape[1]), range(1, S.shape[1] + 1))
    ax.set(xlabel="expert (numbers: chosen)", ylabel="task (cluster)")
    save_figure(fig, path, 120)


def draw_curve(result, tasks, path):
    """Losses and scores of episodes over the run, from its results.json."""
    fig, axes = figure(11, 3.4, 1, 3)
    history = result["history"]
    for k, task in enumerate(tasks):
        mine = [(step, score(task, ret, won)) for step, j, ret, won in result["finished"] if j == k]
        for ax, name in zip(axes, ("rec", "dyn_raw")):
            ax.semilogy([r["updates"] for r in history], [r[name][k] for r in history], label=task)
        axes[2].plot(*np.array(mine or [(0, np.nan)]).T, ".-", lw=0.5, ms=3)
    for ax, name in zip(axes, ("reconstruction loss", "dynamics KL (nats)", "score of episodes")):
        ax.set(ylabel=name, xlabel="agent steps per task" if ax is axes[2] else "updates")
    axes[0].legend(fontsize=7)
    save_figure(fig, path)


# ------------------------------------------------------------------------------------------- study
@dataclass
class Args(StudyArgs):
    task: str = ""
    """left out: that of the run"""
    run: str = ""
    """folder of a finished run of mow.py"""


def main(args):
    args, run = open_run("mow_diagnosis", args)
    folder = args.run
    if not folder:
        folder = mow.main(mow.Args(task="Boxing,Krull", fast=True, device=args.device))["folder"]
    saved = json.loads((Path(folder) / "args.json").read_text())["args"]
    a, tasks = mow.Args(**saved), mow.task_list(saved["task"])
    with Fleet(tasks, mow.task_options(a, tasks)) as fleet:
        agent = mow.Agent(a, fleet.legal, choose_device(args.device)[0])
    mow.load_checkpoint(agent, Path(folder) / "checkpoint.pt")
    frames = Frames(Path(folder) / "frames", agent.K, a.steps, agent.A)
    frames.count = a.steps
    facts, good = routing_facts(agent), fidelity(agent, frames, batches=1 if args.fast else 8)
    rows = []
    for k, task in enumerate(tasks):
        words = " ".join(str(j + 1) for j in facts["chosen"][k])
        rows.append({"task": task, "cluster": agent.wm.labels[k] + 1, "experts": words}
                    | {name: values[k] for name, values in good.items()})
    show(rows, {name: name.replace("_", " ") for name in rows[0]})
    print(f"use of experts: entropy {facts['usage_entropy']:.2f} nats, {facts['dead_experts']} not "
          f"used, I(task; expert) {facts['mutual_information']:.2f} nats")
    draw_frames(agent, frames, tasks, run.dir / "frames.png")
    draw_routing(facts, agent.wm.labels, tasks, run.dir / "routing.png")
    result = json.loads((Path(folder) / "results.json").read_text())
    if result["history"]:
        draw_curve(result, tasks, run.dir / "curve.png")
    holds = all(r["open_loop_psnr"] >= r["mean_image_psnr"] for r in rows)
    print(f"imagination better than the mean image in every task: {'holds' if holds else 'fails'}")
    return finish(run, "mow_diagnosis", dict(rows=rows, routing=facts, holds=holds, of=folder))


if __name__ == "__main__":
    command(Args, __doc__, main)
