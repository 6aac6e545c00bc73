"""Experts chosen per token instead of per task: does it help, and how often do they change?

    python -m studies.mow_tokens                  # 6 variants, 3 seeds: an hour on two cores

MoW gives experts to a task. Here every token has one of four, by the router's scores for its task
and by what it holds; so many tokens in a row may keep the expert of the first (segments), changes
may be penalised (total variation between neighbours), or leaving the task's scores (KL). All
experts compute; the chosen one's output is used, and all learn the scores. World models on random
play, judged on its last fifth.

Rule: a variant is `better` or `worse` than routing per task if the 95 % interval of its open-loop
PSNR, paired by seed, lies on one side of 0; fewer than three seeds decide nothing.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import mow
from studies import mow_diagnosis as lab
from studies.common import command, finish, open_run, paired, show, verdict


@dataclass
class Args(lab.ModelArgs):
    task: str = "Boxing,Krull"
    """games, as in mow.py"""
    experts: int = 4
    """expert Transformers"""


METHODS = {  # segment, weights of the penalties on changes and on leaving the task's scores
    "task": None, "token": (1, 0.0, 0.0), "segment8": (8, 0.0, 0.0), "segment16": (16, 0.0, 0.0),
    "switch_penalty": (1, 0.1, 0.0), "task_prior": (1, 0.0, 0.1)}


class TokenWorldModel(mow.WorldModel):
    """Of a task's experts, all, every token takes one: sequence() calls `combine`."""

    def __init__(self, K, A, *, segment, topk=1, **sizes):
        super().__init__(K, A, topk=1, **sizes)
        Z, experts = self.latents * sizes["classes"], sizes["experts"]
        self.segment, self.active = segment, experts
        self.token_router = nn.Linear(Z + A, experts)

    def routing(self, e, tau=1.0, noise=0.0):
        """Scores S of the tasks; all experts are active."""
        S, J, w = mow.route(e, self.router, self.active, tau, noise)
        return S, J, torch.ones_like(w)

    def token_scores(self, z, act, e):
        """softmax (K, B, L, N_experts) of the logits of tasks and those of z (K, B, L, Z), act."""
        logits = self.router(e)[:, None, None] + self.token_router(torch.cat([z, act], -1))
        return logits.float().softmax(-1)

    def held(self, scores, pos):
        """What the tokens at positions pos (L,) are routed by: the scores (.., T, N_experts) of all
        positions where their segments begin."""
        return scores[:, :, pos - pos % self.segment]

    def combine(self, x, z, act, e, pos, cache):
        """One expert's output per token; the scores learn from all."""
        p = self.token_scores(z, act, e)
        if len(cache) > 2:
            p = cache[2].index_copy_(2, pos, p.to(cache[2].dtype))
        p = self.held(p, pos)
        best = F.one_hot(p.argmax(-1), self.active).to(p.dtype)
        return (x * (best + p - p.detach())[..., None]).sum(3)

    def new_cache(self, K, R, T, x, n=None):
        caches = super().new_cache(K, R, T, x, self.active)
        return *caches, x.new_zeros(K, R, T, self.active)

    def routed(self, z, act):
        """Scores (K, B, L, N_experts) that sequences z (K, B, L, Z) are routed by."""
        scores = self.token_scores(z, act, self.embedding())
        return self.held(scores, torch.arange(z.shape[2], device=z.device))


def penalties(p, S):
    """Total variation between neighbours, and KL to the task's scores S (K, N), of the scores p
    (K, B, L, N): (K,) each."""
    surprise = p.clamp(min=1e-8).log() - S[:, None, None].clamp(min=1e-8).log()
    return (p.diff(dim=2).abs().sum(-1).mean((1, 2)) / 2, (p * surprise).sum(-1).mean((1, 2)))


def switch_rate(p):
    """Share of steps with another expert than before: (K, B, L, N) -> (K,)."""
    return p.argmax(-1).diff().ne(0).float().mean((1, 2))


class TokenAgent(mow.Agent):
    """Trains a TokenWorldModel; balance by the scores of the tokens."""
    segment, switch_coef, prior_coef = 1, 0.0, 0.0
    balance = 0.0  # of the scores of tasks

    def make_world_model(self, **sizes):
        return TokenWorldModel(segment=self.segment, **sizes)

    def model_loss(self, batch, tasks=None):
        loss, z, metrics = super().model_loss(batch, tasks)
        p, e = self.wm.routed(z, batch[1]), self.wm.embedding()
        switch, prior = penalties(p, self.wm.routing(e, self.temperature())[0])
        loss = loss + (self.switch_coef * switch + self.prior_coef * prior).sum()
        return loss + 0.1 * mow.balance_loss(p.mean((1, 2)), 1), z, metrics


def agent_of(variant):
    """The class that makes a variant's agent."""
    if METHODS[variant] is None:
        return mow.Agent
    names = "segment", "switch_coef", "prior_coef"
    return type("Variant", (TokenAgent,), dict(zip(names, METHODS[variant])))


@torch.no_grad()
def measured_switches(agent, frames, test, batches):
    """Switch rate per task on the test part, 0 where experts belong to tasks."""
    if not isinstance(agent, TokenAgent):
        return [0.0] * agent.K
    a, out = agent.args, []
    for i in range(batches):
        torch.manual_seed(mow.draw_seed(a.seed, 7, i))
        rng = np.random.default_rng([a.seed, 7, i])
        obs, acts, *_ = frames.sample(a.batch, a.length, rng, agent.device, since=test)
        post = agent.wm.eval().posterior(mow.to_images(obs), agent.wm.embedding())
        out.append(switch_rate(agent.wm.routed(mow.draw_latent(post), acts)))
    return torch.stack(out).mean(0).tolist()


def work(name, cell, folder):
    agent, frames, test = lab.begin(cell, agent_of(cell["variant"]))
    lab.learn(agent, frames, agent.args.warmup)
    if agent.args.clusters > 1:
        grads = mow.task_gradients(agent, frames, 2 if cell["batches"] == 1 else 32)
        agent.clone_modules(mow.cluster_tasks(grads, agent.args.clusters))
    lab.learn(agent, frames, agent.total)
    rate, L = measured_switches(agent, frames, test, cell["batches"]), agent.args.length
    return lab.fidelity(agent, frames, test, cell["batches"]) | {
        "variant": cell["variant"], "switch_rate": rate,
        "run_length": [L / (1 + (L - 1) * x) for x in rate]}


def main(args):
    args, run = open_run("mow_tokens", lab.quick(args))
    variants = dict.fromkeys(METHODS, dict(experts=args.experts, topk=1))
    found = lab.run_cells(work, lab.plan(args, run, variants), run, args)
    rows = lab.over_seeds(found, ("psnr", "ssim", "open_loop_psnr", "dyn_kl", "switch_rate",
                              "run_length"))
    for row in rows[1:]:
        ours, task = (lab.per_seed(found, v, "open_loop_psnr") for v in (row["variant"], "task"))
        row["change"], low, high = paired(ours, task)
        words = {"holds": "better", "fails": "worse", "undecided": "undecided"}
        row["verdict"] = words[verdict(low, high, 1, args.seeds)]
    show(rows, {"variant": "variant", "psnr": "PSNR", "ssim": "SSIM", "open_loop_psnr": "open loop",
                "open_loop_psnr_sd": "+-", "dyn_kl": "KL", "switch_rate": "switch rate",
                "run_length": "run length", "change": "change", "verdict": "verdict"})
    return finish(run, "mow_tokens", dict(rows=rows, cells=found))


if __name__ == "__main__":
    command(Args, __doc__, main)
