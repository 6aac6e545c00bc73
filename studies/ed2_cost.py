"""What does decomposition cost: wall-clock of an update, single, ED2 batched, ED2 as a loop?

    python -m studies.ed2_cost                            # 5 minutes on one core

At equal parameters, with the published groups of walker and humanoid, on both backbones; the
variants take turns, so that the load of a shared machine hits all alike.

Rule, fixed in advance: batched ED2 should cost at most 1.5 times the single model's update.
Expected: it holds but for the humanoid's eight groups on TD-MPC2.
"""
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn

import data
import ed2
import envs
from studies import common
from studies.ed2_cores import BlockRSSM
from studies.ed2_partitions import settings


@dataclass
class Args(common.StudyArgs):
    task: str = "walker-walk,humanoid-walk"
    """tasks with published groups, with commas between"""
    repeats: int = 15
    """updates of each kind, after two that are not counted"""


def updates_of(params, loss, make_opt):
    """A function that does one update."""
    opt = make_opt(params)

    def run():
        opt.zero_grad()
        loss().backward()
        opt.step()
    return run


def tdmpc2_updates(args, O, A, groups, device):
    """{name: function} of one update of TD-MPC2's dynamics."""
    latent, hidden = ed2.TDMPC2_SIZES[args.model_size]
    everything = [list(range(A))]
    width = ed2.plan(args, groups)["ed2"][1]
    single = ed2.Dynamics(latent, A, hidden, everything).to(device)
    batched = ed2.Dynamics(latent, A, width, groups).to(device)
    loop = nn.ModuleList(ed2.Dynamics(latent, A, width, everything) for _ in groups)
    loop.to(device)
    masks = ed2.assignment(groups, A).T.to(device)  # (k, A)
    z = ed2.simnorm(torch.randn(args.length + 1, args.batch, latent, device=device))
    act = torch.rand(args.length, args.batch, A, device=device) * 2 - 1

    def looped(s, a):
        return torch.stack([f(s, a * m) for f, m in zip(loop, masks)]).mean(0)

    def update(step, module):
        return updates_of(module.parameters(),
                          lambda: ed2.consistency_loss(step, z[0], act, z[1:]),
                          lambda p: torch.optim.Adam(p, foreach=True))

    return {"single": update(single, single), "batched": update(batched, batched),
            "looped": update(looped, loop)}


class LoopedRSSM(ed2.RSSM):
    """D2P as one would write it first, k cores in a Python loop."""

    def __init__(self, groups, act_dim, width, units, deter, hidden, classes):
        sizes = act_dim, units, deter, hidden, classes
        super().__init__(*sizes)
        self.loop = nn.ModuleList(ed2.RSSM(*sizes, width=width) for _ in groups)
        for name in ("h_in", "z_in", "hid", "gru", "act_weight", "act_bias", "act_gain",
                     "hid_gain"):
            delattr(self, name)  # LaProp wants a gradient of every parameter
        for core in self.loop:
            del core.prior_net, core.post_net
        self.register_buffer("masks", ed2.assignment(groups, act_dim).T.contiguous())

    def core_weights(self):
        return [core.core_weights() for core in self.loop]

    def act_input(self, weights, act):
        parts = zip(self.loop, weights, self.masks)
        return torch.cat([core.act_input(w, act * m) for core, w, m in parts], -3)

    def step(self, weights, h, z, act_in):
        parts = [core.step(w, h, z, act_in[:, i:i + 1])
                 for i, (core, w) in enumerate(zip(self.loop, weights))]
        return torch.stack(parts).mean(0)


def rssm_updates(args, O, A, groups, device):
    """{name: function} of one update of DreamerV3's world model."""
    shape = ed2.DREAMER_SIZES[args.model_size]
    width = ed2.plan(args, groups)["ed2"][1]
    T, B, latent = args.length, args.batch, (32, shape["classes"])
    obs = torch.randn(T + 1, B, O, device=device)
    act, rew = torch.rand(T, B, A, device=device) * 2 - 1, torch.rand(T, B, device=device)
    gumbel = ed2.draw_gumbel((T + 1, B, *latent), torch.Generator(device))
    models = {"single": ed2.DreamerV3(O, A, **shape),
              "batched": ed2.DreamerV3(O, A, **shape, groups=groups, width=width),
              "blocks": ed2.DreamerV3(O, A, **shape), "looped": ed2.DreamerV3(O, A, **shape)}
    sizes = [shape[k] for k in ("units", "deter", "hidden", "classes")]
    models["blocks"].rssm = BlockRSSM(A, *sizes, groups)
    models["looped"].rssm = LoopedRSSM(groups, A, width, *sizes)

    def update(model):
        model.to(device)
        return updates_of(model, lambda: ed2.rssm_loss(model, obs, act, rew, gumbel)[0],
                          ed2.LaProp)

    return {name: update(model) for name, model in models.items()}


def milliseconds(functions, repeats, device):
    """{name: median time} of functions that are called in turn."""
    times = {name: [] for name in functions}
    for n in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if n >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def main(args):
    """Time all variants; returns what results.json holds."""
    if args.fast and not args.resume:
        args = replace(args, repeats=1)
    args, run = common.open_run("ed2_cost", args)
    rows = []
    for task in args.task.split(","):
        O, A = envs.task_facts(task)[:2]
        groups = ed2.PUBLISHED[task.split("-")[0]]
        for wm in ("tdmpc2", "dreamerv3"):
            inner = settings(args, wm=wm, task=task)
            if not args.fast:  # the batches of the papers
                inner = replace(inner, batch=256 if wm == "tdmpc2" else 16,
                                length=3 if wm == "tdmpc2" else 64)
            make = tdmpc2_updates if wm == "tdmpc2" else rssm_updates
            ms = milliseconds(make(inner, O, A, groups, inner.device), args.repeats, inner.device)
            ratios = {f"{name}_ratio": ms[name] / ms["single"] for name in ms if name != "single"}
            rows.append({"task": task, "wm": wm, "k": len(groups), "batch": inner.batch,
                         "length": inner.length} | {f"{k}_ms": v for k, v in ms.items()} | ratios)
            print(f"{task:<14}{wm:<10} k = {len(groups)}: " + ", ".join(
                f"{name} {v:.1f} ms ({v / ms['single']:.2f} x)" for name, v in ms.items()),
                flush=True)
    common.judge({f"{r['task']}, {r['wm']}: batched costs at most 1.5 times the single model":
                  r["batched_ratio"] <= 1.5 for r in rows})
    data.write_csv(run.dir / "cost.csv", [{k: r.get(k, "") for k in rows[-1]} for r in rows])
    return common.finish(run, "ed2_cost", dict(rows=rows))


if __name__ == "__main__":
    common.command(Args, __doc__, main)
