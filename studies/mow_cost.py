"""What does an update of MoW cost, and what would whole runs take?

    python -m studies.mow_cost            # five minutes on one core

Time of an update against tasks and experts, batched experts and critics against a loop over tasks,
acting, and an estimate for all 26 games. The images are noise: time does not depend on them.

Rule: batching `pays` if for six tasks experts and critics together take less time than the loop.
"""
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

import mow
from data import Frames, choose_device
from envs import ATARI26
from studies.common import StudyArgs, command, finish, open_run, show
from studies.mow_diagnosis import TINY, run_cells


@dataclass
class Args(StudyArgs):
    task: str = "atari26"
    """the first games of this list are used"""
    preset: Literal["auto", "cpu", "gpu", "paper"] = "auto"
    """sizes and batches, as in mow.py"""
    seeds: int = 1
    """one: this is a measurement of time"""
    workers: int = 1
    """one: timings side by side disturb each other"""
    sizes: dict[str, int] = field(default_factory=dict)
    """sizes of networks other than the preset's, as in mow.py"""


def parameters(a, K, A):
    """Parameters of the world model, without making it."""
    with torch.device("meta"):
        wm = mow.WorldModel(K, A, clusters=a.clusters, experts=a.experts, topk=a.topk,
                            norm="bn" if K == 1 else "gn", **a.sizes)
    return sum(p.numel() for p in wm.parameters())


def products(a, A):
    """Multiply-adds per frame: {encoder, decoder, dynamics, heads}; one is two operations."""
    s = a.sizes
    c, D, E, H, Z = s["stem"], s["width"], s["emb"], s["hidden"], s["latents"] * s["classes"]
    # channels in, out, side
    layers = (3, c, 32), (c, 2 * c, 16), (2 * c, 4 * c, 8), (4 * c, 8 * c, 4)
    convs = sum(16 * i * o * side**2 for i, o, side in layers)
    linear, block = (128 * c + E) * Z, 8 * D * D + 2 * a.length * D
    shared = s["shared_layers"] * block
    if s["shared_layers"] or a.topk > 1:
        shared += (a.topk * D + E) * D
    experts = a.topk * ((Z + A + E) * D + D * D + s["expert_layers"] * block)
    return {"encoder": convs + linear, "decoder": convs + linear, "dynamics": experts + shared,
            "heads": (D + E) * (Z + 2 * H) + 2 * H * H + (mow.BINS + 1) * H}


def work_of_update(a, A):
    """Floating-point operations of one update, per task; a backward pass costs two forward ones."""
    p, s, H = products(a, A), a.sizes, a.sizes["hidden"]
    frames, steps = a.batch * a.length, a.rollouts * (a.context + a.horizon)
    trunk = (s["latents"] * s["classes"] + s["width"] + s["emb"]) * H + H * H
    acting = a.rollouts * (a.horizon + 1) * (7 * trunk + A * H + 3 * mow.BINS * H)
    return 2 * (3 * frames * sum(p.values()) + steps * (p["dynamics"] + p["heads"]) + acting)


def milliseconds(f, device, repeats=5):
    """Median time of a call."""
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 1:
            times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def settled(cell, K, **changes):
    """Flags of mow.py for the first K games."""
    a = mow.Args(task=",".join(ATARI26[:K]), device=cell["device"], preset=cell["preset"],
                 sizes=cell["sizes"], compile=cell["compile"], **{**cell["small"], **changes})
    return mow.settle(a, list(ATARI26[:K]), choose_device(a.device)[0])


def make(cell, folder, K, **changes):
    """An agent for K games, its clusters given in turn, and frames of noise."""
    a = settled(cell, K, **changes)
    agent = mow.Agent(a, [list(range(mow.DISCRETE))] * K, choose_device(a.device)[0])
    agent.wm.assign([k % a.clusters for k in range(K)])
    frames = Frames(folder / f"frames_{K}", K, 2 * a.length, agent.A)
    if not frames.obs.any():
        frames.obs[:] = np.random.default_rng(0).integers(0, 256, frames.obs.shape, np.uint8)
        frames.act[:, :, 0] = 1
    frames.count = 2 * a.length
    return agent, frames


def update(agent, frames):
    """One update of everything."""
    batch = agent.sample(frames)
    loss, z, _ = agent.model_loss(batch)
    mow.descend(loss, agent.opt, 1000.0)
    loss, _ = agent.policy_loss(agent.imagine(z, batch))
    mow.descend(loss, agent.agent_opt, 100.0)
    agent.follow()
    agent.updates += 1


@torch.no_grad()
def looped(agent):
    """Experts and critics in one product, and task by task: milliseconds of a forward pass."""
    wm, a, device, K = agent.wm.eval(), agent.args, agent.device, agent.K
    e, pos = wm.embedding(), torch.arange(a.length, device=device)
    _, J, w = wm.routing(e, agent.temperature())
    z = torch.zeros(K, a.batch, a.length, agent.Z, device=device)
    acts = torch.zeros(K, a.batch, a.length, agent.A, device=device)
    mask = mow.episode_mask(z[..., 0] > 0, pos)
    width = agent.Z + a.sizes["width"] + a.sizes["emb"]
    x = torch.zeros(K, a.rollouts * a.horizon, width, device=device)
    each = [slice(k, k + 1) for k in range(K)]

    def sequences():
        return [wm.sequence(*(y[k] for y in (z, acts, e, J, w, mask)), pos) for k in each]

    def critics():
        return [agent.critic(x[k], wm.cluster_of[k]) for k in each]

    fast = milliseconds(lambda: wm.sequence(z, acts, e, J, w, mask, pos), device, 20)
    return {"experts_ms": fast, "experts_looped_ms": milliseconds(sequences, device, 20),
            "critics_ms": milliseconds(lambda: agent.critic(x, wm.cluster_of), device, 20),
            "critics_looped_ms": milliseconds(critics, device, 20)}


def work(name, cell, folder):
    kind, n = cell["kind"], cell["n"]
    if kind == "tasks":
        agent, frames = make(cell, folder, n)
    else:
        agent, frames = make(cell, folder, 6, experts=n)
    device, memory = agent.device, agent.memory(1)
    ms = milliseconds(lambda: update(agent, frames), device)
    obs, flops = frames.obs[:, :1].copy(), work_of_update(agent.args, agent.A) * agent.K
    row = {"update_ms": ms, "gflop": flops / 1e9, "gflop_per_s": flops / ms / 1e6,
           "act_ms": milliseconds(lambda: agent.play(obs, memory, [0]), device),
           "tasks": agent.K, "experts": agent.args.experts}
    return row | (looped(agent) if kind == "tasks" and n >= 6 else {})


def estimates(rate, cell):
    """What runs of all 26 games would take at so many GFLOP/s."""
    rows = []
    for preset in mow.PRESETS:
        a = settled(cell | {"preset": preset, "small": {}, "sizes": {}}, 26)
        each, updates = work_of_update(a, mow.DISCRETE), a.steps // a.train_every
        rows.append({"preset": preset, "parameters": parameters(a, 26, mow.DISCRETE),
                     "gflop_per_task_update": each / 1e9, "updates": updates,
                     "exaflop": 26 * each * updates / 1e18,
                     "hours_at_measured_rate": 26 * each * updates / (rate * 1e9) / 3600})
    return rows


def main(args):
    args, run = open_run("mow_cost", replace(args, sizes=TINY | args.sizes) if args.fast else args)
    small = dict(length=8, context=3, horizon=3, rollouts=8, batch=2) if args.fast else {}
    cell = dict(device=args.device, preset=args.preset, sizes=args.sizes, compile=args.compile,
                small=small)
    sizes = [(kind, n) for kind in ("tasks", "experts") for n in (1, 3, 6, 12)]
    cells = {f"{kind}_{n}": cell | {"kind": kind, "n": n} for kind, n in sizes}
    rows = list(run_cells(work, cells, run, args).values())
    show(rows, {"cell": "cell", "update_ms": "update ms", "act_ms": "acting ms", "gflop": "GFLOP",
                "gflop_per_s": "GFLOP/s", "experts_ms": "Transformers",
                "experts_looped_ms": "looped", "critics_ms": "critics",
                "critics_looped_ms": "looped"}, 1)
    plans = estimates(max(r["gflop_per_s"] for r in rows), cell)
    print("\nestimate for all 26 games at the best rate above (larger sizes usually reach more):")
    show(plans, {name: name.replace("_", " ") for name in plans[0]})
    six = rows[2]
    pays = (six["experts_ms"] + six["critics_ms"]
            < six["experts_looped_ms"] + six["critics_looped_ms"])
    print(f"batching over tasks: {'pays' if pays else 'does not pay'}")
    return finish(run, "mow_cost", dict(rows=rows, estimates=plans, batching_pays=pays))


if __name__ == "__main__":
    command(Args, __doc__, main)
