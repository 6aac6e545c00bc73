"""Which parts of MoW matter for its world model?  Equal updates on the same random play, no agent.

    python -m studies.mow_variants --question clusters   # 1, 2, 3, .. clusters against random ones
    python -m studies.mow_variants --question experts    # experts, router, shared part, losses
    python -m studies.mow_variants --question monolith   # one model of equal size or equal compute

Three games, 3 seeds: one to three hours on two cores. Every variant is judged on the last fifth of
the play: PSNR and SSIM of reconstructions, PSNR of 16 steps of imagination, KL of the dynamics, how
the router shares out the experts, and what the KL gains when one expert is dropped.

Rule: a variant is `better` or `worse` than the first of the table if the 95 % interval of its
open-loop PSNR, paired by seed, lies on one side of 0; fewer than three seeds decide nothing.
"""
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

import mow
from envs import METAWORLD50
from studies import mow_diagnosis as lab
from studies.common import command, finish, open_run, paired, show, verdict
from studies.mow_cost import parameters, products


@dataclass
class Args(lab.ModelArgs):
    question: Literal["clusters", "experts", "monolith"] = "clusters"
    """what is varied"""


METHODS = {  # attributes of the agent that a variant changes
    "no_balance": dict(balance=0.0), "gate_none": dict(gate=False),
    "no_task_loss": dict(task_coef=0.0), "harmony_off": dict(harmonise=False),
    "tau_1": dict(start_tau=1.0), "no_reset_mask": dict(reset_mask=False)}


class LearnedSigma(mow.Agent):
    """Harmonious weights that are learned, by sigma = e^s with its own rate, as HarmonyDream's."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sigma = torch.nn.Parameter(torch.zeros(self.K, device=self.device))
        self.opt.add_param_group({"params": [self.sigma], "lr": 1e-2})

    def weigh(self, losses, means):
        return losses / self.sigma.exp() + self.sigma.exp().log1p()


def monoliths(args):
    """MoW, and one model of it: as wide, of equal parameters, of equal multiply-adds per frame."""
    a, tasks = lab.script_args(args), mow.task_list(args.task)
    robots = sum(t in METAWORLD50 for t in tasks)
    A = mow.DISCRETE * (robots < len(tasks)) + mow.CONTINUOUS * (robots > 0)
    one, heads = dict(clusters=1, experts=1, topk=1), a.sizes["heads"]
    widths = range(heads, 16 * a.sizes["width"] + 1, heads)

    def wide(width):
        return dict(one, sizes={**args.sizes, "width": width})

    def closest(cost):
        target = cost(a)
        return wide(min(widths, key=lambda w: abs(cost(
            replace(a, **one, sizes={**a.sizes, "width": w})) - target)))

    return {"mow": {}, "monolith": one,
            "monolith_flops": closest(lambda a: sum(products(a, A).values())),
            "monolith_params": closest(lambda a: parameters(a, len(tasks), A))}


def variants_of(args):
    """{name: changes of mow.Args}. `random` in a name: tasks in random clusters of equal size."""
    K = len(mow.task_list(args.task))
    if args.question == "monolith":
        return monoliths(args)
    if args.question == "clusters":
        counts = [n for n in (1, 2, 3, 6, 12) if n <= K]
        return ({f"clusters{n}": dict(clusters=n) for n in counts}
                | {f"clusters{n}random": dict(clusters=n) for n in counts if 1 < n < K})
    return ({f"experts{n}": dict(experts=n) for n in (3, 6, 12)} | dict.fromkeys(METHODS, {})
            | {"no_shared": dict(sizes={**args.sizes, "shared_layers": 0}), "harmony_adam": {}})


def work(name, cell, folder):
    variant = cell["variant"]
    agent, frames, test = lab.begin(cell, LearnedSigma if variant == "harmony_adam" else mow.Agent)
    for attribute, value in METHODS.get(variant, {}).items():
        setattr(agent, attribute, value)
    lab.learn(agent, frames, agent.args.warmup)
    if "random" in variant:
        rng = np.random.default_rng(cell["seed"])
        agent.clone_modules(rng.permutation(np.arange(agent.K) % agent.args.clusters))
    elif agent.args.clusters > 1:
        grads = mow.task_gradients(agent, frames, 2 if cell["batches"] == 1 else 32)
        agent.clone_modules(mow.cluster_tasks(grads, agent.args.clusters))
    lab.learn(agent, frames, agent.total)
    good = lab.fidelity(agent, frames, test, cell["batches"])
    return good | lab.routing_facts(agent) | {
        "variant": variant, "labels": list(agent.wm.labels),
        "drop_one": lab.drop_one(agent, frames, min(4, cell["batches"])),
        "parameters": sum(p.numel() for p in agent.wm.parameters()),
        "products": sum(products(agent.args, agent.A).values())}


def main(args):
    args, run = open_run("mow_variants", lab.quick(args))
    found = lab.run_cells(work, lab.plan(args, run, variants_of(args)), run, args)
    rows = lab.over_seeds(found, ("psnr", "ssim", "open_loop_psnr", "dyn_kl", "dead_experts",
                              "mutual_information", "usage_entropy"), ("parameters", "products"))
    for row in rows[1:]:
        ours, first = (lab.per_seed(found, r["variant"], "open_loop_psnr") for r in (row, rows[0]))
        row["change"], low, high = paired(ours, first)
        words = {"holds": "better", "fails": "worse", "undecided": "undecided"}
        row["verdict"] = words[verdict(low, high, 1, args.seeds)]
    show(rows, {"variant": "variant", "parameters": "parameters", "psnr": "PSNR", "ssim": "SSIM",
                "open_loop_psnr": "open loop", "open_loop_psnr_sd": "+-", "dyn_kl": "KL",
                "dead_experts": "dead", "mutual_information": "I(task;expert)",
                "usage_entropy": "usage entropy", "change": "change", "verdict": "verdict"})
    return finish(run, f"mow_{args.question}", dict(rows=rows, cells=found))


if __name__ == "__main__":
    command(Args, __doc__, main)
