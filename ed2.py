"""ED2: environment dynamics decomposition for world models in one file.

The idea ("ED2: Environment Dynamics Decomposition World Models for Continuous Control", arXiv 2112.02817; revisited on
DreamerV3 and TD-MPC2 by Giridhar et al., "Explorations in Dynamics Decomposition for Multi-Task RL"): a robot's actions
fall into groups that move different things. SD2 finds such groups {G_1 .. G_k} by correlating actions with state
changes, and D2P predicts with one small model per group, s' = (1/k) sum_i f_i(s, a_Gi), every f_i reading the whole
state. Here both run on two world models, next to all controls that a fair verdict needs.

    python ed2.py --task walker-walk                      # TD-MPC2: baseline and ED2 (minutes and numbers: README)
    python ed2.py --task walker-walk --wm dreamerv3       # the same on a recurrent model
    python ed2.py --tables                                # five tasks, both models, all controls, verdicts
    python ed2.py --mode online --task cartpole-swingup   # a DreamerV3 agent that learns to act

Copy me together with envs.py and data.py. Shapes: B batch, T or H time, O obs, A action, D latent, k groups, w width of
one sub-model; time first: obs (H+1, B, O), act (H, B, A), rew (H, B). `assign` (A, k) is the partition as a 0/1 matrix.

Deviations and choices:
 1. Data: the papers used TD-MPC2's 20 GB set and replay of DreamerV3 runs; without --data-dir this script plays random
    actions and then an evolving linear policy (augmented random search), minutes instead of days.
 2. Sub-models are as narrow as it takes to have the parameters of the single model (--match none: as wide, k times
    as many parameters, which is what the published comparisons used).
 3. TD-MPC2's errors are compared in one fixed latent space (--encoder frozen): two encoders trained side by side have
    latents of different scale, so their losses say nothing about each other. The published table is --encoder joint.
 4. DreamerV3's dynamics loss is clipped at 1 nat and falls when the posterior says less; the verdict uses the open-loop
    error of decoded states instead and shows both.
 5. On a CPU, batches, sequences and updates are smaller and learning rates higher (printed at the start).
 6. Partitions `sd2j` and `learned` are ours: neither paper has them.
 7. TD-MPC2 has two Q functions here, as in its 1M size, and no dropout in them. DreamerV3 starts every recording from
    the zero state instead of a stored one.
 8. With `blocks`, the hidden layer of DreamerV3's core is normalised over the blocks of one group; over all of them,
    actions would leak into the others.
"""
import copy
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import Episodes, LegacyRun as Run
from envs import Workers, make_env, task_facts


@dataclass
class Args:
    task: str = "walker-walk"
    """any task of envs.py without early termination"""
    seed: int = 1
    """first training seed; data and its split have their own, fixed seeds"""
    wm: Literal["tdmpc2", "dreamerv3"] = "tdmpc2"
    """backbone: TD-MPC2's MLP dynamics or DreamerV3's recurrent state-space model"""
    partition: Literal["sd2", "published", "sd2j", "learned", "human", "random", "full", "none"] = "sd2"
    """groups of actions: SD2 on random data; the authors' published groups; SD2 on the influence that actions have in a
    trained model; an assignment matrix trained with the model; limbs; SD2's sizes at random; one per action; one"""
    agg: Literal["hidden", "pre", "post", "mean", "blocks"] | None = None
    """what is averaged over groups. tdmpc2: last hidden layer (default), logits, or outputs; dreamerv3: recurrent
    states (default), or none: blocks of the GRU each see one group"""
    match: Literal["params", "none"] = "params"
    """params: sub-models as narrow as the single model's parameters allow; none: each as wide as the single model"""
    encoder: Literal["frozen", "joint"] = "frozen"
    """tdmpc2: compare dynamics on the latents of one fixed encoder, or train everything together"""
    eta: float = 0.0
    """SD2 merges while the best score is above this (0 reproduces the published dm_control groups)"""
    seeds: int = 3
    """paired training seeds: seed, seed + 1, .."""
    mode: Literal["offline", "online"] = "offline"
    """offline: world models on fixed data; online: a DreamerV3 agent (with --partition: ED2's) that makes its own"""
    tables: bool = False
    """both tables of the paper: five tasks, both backbones, all controls, verdicts"""
    discovery: bool = False
    """what SD2, sd2j and learned find on random and on replay data, in states and in latents"""
    bodies: bool = False
    """one bank of sub-models shared by walker, cheetah and hopper; few-shot error on a held-out variant"""
    cost: bool = False
    """wall-clock of an update: single, ED2 batched, ED2 looped, at equal parameters"""
    data_dir: str | None = None
    """episodes to train on (e.g. runs/<a run of pwm.py>/episodes) instead of made ones"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes the GPU when there is one"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for the losses; on a CPU its minutes are more than these short runs take"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes: for roll-outs, and on a CPU for trainings side by side, one thread each"""
    resume: str | None = None
    """continue the run in this folder; its flags are read from there"""
    checkpoint: str | None = None
    """online: start from the checkpoint.pt of another online run"""
    eval_only: bool = False
    """online, with --checkpoint: only play the agent"""
    capture_video: bool = False
    """online: one deterministic episode as mp4 at the end (needs OpenGL: EGL or OSMesa)"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""

    # budget: left out, these follow from device and backbone and are printed at the start
    updates: int | None = None
    """world-model updates of every training"""
    batch: int | None = None
    """sequences per update"""
    length: int | None = None
    """steps per sequence (TD-MPC2: 3, DreamerV3: 64)"""
    lr: float | None = None
    """learning rate (TD-MPC2: 3e-4, encoder 0.3 of it; DreamerV3: 4e-5)"""
    size: str | None = None
    """tdmpc2: 1M or 5M (of the whole agent); dreamerv3: 1m, 12m, 25m, 50m"""
    data_steps: int | None = None
    """agent steps of own replay data, beside 20,000 random ones"""
    train_ratio: int = 128
    """online: steps trained on per agent step played (DreamerV3: 512 or 1024); --updates then sets the agent steps"""


# ------------------------------------------------------------------------------------------------------------ maths
CONT = 1 - 1 / 333  # the discount, which the continue head learns as if episodes could end at any step
UNIMIX = 0.01  # share of the uniform distribution in every latent variable
DREAMER_SIZES = {"1m": dict(deter=512, hidden=64, classes=4, units=64),  # named by the authors' totals with CNNs
         "12m": dict(deter=2048, hidden=256, classes=16, units=256),
         "25m": dict(deter=3072, hidden=384, classes=24, units=384),
         "50m": dict(deter=4096, hidden=512, classes=32, units=512)}


def symlog(x):
    """sign(x) ln(1 + |x|)"""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """sign(x) (e^|x| - 1), the inverse of symlog"""
    return x.sign() * x.abs().expm1()


# ------------------------------------------------------------------------------------------ SD2: sub-dynamics discovery
# Groups published by the ED2 authors for dm_control, actuator numbers in file order.
PUBLISHED = {"walker": [[0, 1, 3, 4], [2], [5]], "cheetah": [[0, 1], [2], [3, 4], [5]], "hopper": [[0, 1], [2], [3]],
             "reacher": [[0], [1]], "finger": [[0], [1]],
             "humanoid": [[0, 5, 11], [1, 15, 16, 17, 18, 19, 20], [2, 3, 9], [4, 10], [6, 8], [7], [12, 14], [13]]}
LIMBS = {"walker": [[0, 1, 2], [3, 4, 5]], "cheetah": [[0, 1, 2], [3, 4, 5]], "hopper": [[0, 1], [2, 3]],
         "humanoid": [[0, 1, 2], list(range(3, 9)), list(range(9, 15)), [15, 16, 17], [18, 19, 20]]}


def pearson_features(act, delta):
    """F (A, n): |Pearson correlation| of every action with every state change that varies, in float64.

    act (N, A), delta (N, O) = next state - state. An action that never varies has a row of zeros.
    """
    act, delta = np.asarray(act, np.float64), np.asarray(delta, np.float64)
    if len(act) != len(delta) or len(act) < 2 or not (np.isfinite(act).all() and np.isfinite(delta).all()):
        raise SystemExit(f"discover got actions {act.shape} and state changes {delta.shape}: expected as many rows of "
                         "both, at least 2, all finite")
    delta = delta[:, delta.std(0) > 1e-8]  # constant dimensions would be 0/0
    a_std = act.std(0)
    act = (act - act.mean(0)) / np.where(a_std > 1e-8, a_std, np.inf)
    delta = (delta - delta.mean(0)) / delta.std(0)
    return np.abs(act.T @ delta) / len(act)


def cosine(features):
    """Similarity (A, A) of the rows of F (A, n); an inert action (a row of zeros) resembles only itself."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, norm, out=np.zeros_like(features), where=norm > 1e-12)
    sim = unit @ unit.T
    np.fill_diagonal(sim, 1.0)
    return sim


def relatedness(sim, P, Q):
    """How much more alike P and Q are than either is to everything but the other, its own members included."""
    everything = set(range(len(sim)))

    def total(X, Y):
        return sim[np.ix_(sorted(X), sorted(Y))].sum()

    not_p, not_q = everything - set(P), everything - set(Q)
    between = total(P, Q) / (len(P) * len(Q))
    outside = (total(P, not_q) + total(Q, not_p)) / (len(P) * len(not_q) + len(Q) * len(not_p))
    return between - outside


def agglomerate(sim, eta=0.0):
    """Merge the most related pair of groups while its relatedness is above eta: (groups, every merge considered).

    sim (A, A). The last entry of the log is the first merge that was refused. Ties: lowest indices.
    """
    groups, log = [[i] for i in range(len(sim))], []
    while len(groups) > 1:
        scored = [(relatedness(sim, groups[i], groups[j]), i, j)
                  for i in range(len(groups)) for j in range(i + 1, len(groups))]
        best, i, j = max(scored, key=lambda x: (round(x[0], 12), -x[1], -x[2]))
        log.append({"merge": [groups[i], groups[j]], "score": float(best), "done": bool(best > eta)})
        if best <= eta:
            break
        merged = sorted(groups[i] + groups[j])
        groups = sorted([g for n, g in enumerate(groups) if n not in (i, j)] + [merged])
    return groups, log


def discover(act, delta, eta=0.0):
    """SD2: groups of action indices, e.g. [[0, 1], [2]], from act (N, A) and state changes delta (N, O)."""
    return agglomerate(cosine(pearson_features(act, delta)), eta)[0]


def check_partition(groups, act_dim):
    """SystemExit unless every action is in exactly one group."""
    flat = sorted(j for g in groups for j in g)
    if flat != list(range(act_dim)) or not all(groups):
        raise SystemExit(f"partition {groups} does not hold each of the actions 0..{act_dim - 1} exactly once")
    return [sorted(g) for g in groups]


def assignment(groups, act_dim):
    """The partition as a float matrix (A, k)."""
    out = torch.zeros(act_dim, len(groups))
    for i, g in enumerate(groups):
        out[g, i] = 1.0
    return out


def adjusted_rand(p, q):
    """Adjusted Rand index of two partitions of the same actions: 1 = the same, 0 = as by chance."""
    table = np.array([[len(set(a) & set(b)) for b in q] for a in p], float)
    n = table.sum()

    def pairs(x):
        return (x * (x - 1) / 2).sum()

    both, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = a * b / max(n * (n - 1) / 2, 1)
    most = (a + b) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


def random_partition(groups, seed):
    """The same group sizes, members at random."""
    order = np.random.default_rng(seed).permutation(sum(map(len, groups))).tolist()
    return [sorted(order.pop() for _ in g) for g in groups]


# ------------------------------------------------------------------------ sd2j and learned: groups from a trained model
@torch.no_grad()
def influence(predict, s, act, generator):
    """I (A, n): mean change of each output of predict(s, act) -> (B, n) when one action is permuted over the batch.

    That breaks the correlation of actions with states, which misleads Pearson on replay.
    """
    base, rows = predict(s, act), []
    for j in range(act.shape[1]):
        mixed = act.clone()
        mixed[:, j] = act[torch.randperm(len(act), generator=generator), j]
        rows.append((predict(s, mixed) - base).abs().mean(0))
    return torch.stack(rows)


def fit_influence(s, act, delta, seed, latents=False, steps=1500, batch=256, eta=0.0, learned=False):
    """Groups from a model trained on rows s (N, n), act (N, A), delta (N, n): (groups, log).

    sd2j: train one single model, then merge actions by the influence they have in it. learned: three phases of a
    decomposed model: A all actions enter all sub-models while influence is averaged, B an assignment matrix P =
    softmax(L) is trained on the loss minus the modularity of the influence, C argmax. The loss alone does not
    identify groups: seeds disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    A, k = act.shape[1], min(act.shape[1], 8) if learned else 1
    scale = delta.std(0).clamp(min=1e-8)
    target = (delta - delta.mean(0)) / scale * (scale > 1e-7)
    if not latents:  # simplex coordinates have one scale already
        s = (s - s.mean(0)) / s.std(0).clamp(min=1e-8)
    model = Dynamics(s.shape[1], A, s.shape[1], 200 if k == 1 else 64, torch.ones(A, k), simnorm=False)
    opt = torch.optim.Adam(model.parameters(), 1e-3)
    L = torch.zeros(A, k, requires_grad=True)
    with torch.no_grad():
        L.add_(0.01 * torch.randn(L.shape, generator=generator))
    opt_L = torch.optim.Adam([L], 2e-2)
    average, Q, hard = None, None, None
    for step in range(steps if k == 1 else int(0.6 * steps)):
        rows = torch.randint(len(s), (batch,), generator=generator)
        assign = None
        if learned and step >= int(0.35 * steps):
            if Q is None:
                u = F.normalize(average, dim=1)
                u = F.normalize(u - u.mean(0), dim=1)  # uncentred, everything is alike and merges
                Q = (u @ u.T).fill_diagonal_(0)
                Q = Q / Q.abs().mean()
            tau = 1 - 0.7 * (step / steps - 0.35) / 0.25
            gumbel = -torch.empty_like(L).exponential_(generator=generator).log()
            soft = ((L + gumbel) / tau).softmax(1)
            hard = F.one_hot(soft.argmax(1), k).float()
            assign = hard + soft - soft.detach()  # straight through
        loss = (model(s[rows], act[rows], assign) - target[rows]).square().mean()
        if assign is not None:
            P = L.softmax(1)
            loss = loss - ((P @ P.T) * Q).mean()
        opt.zero_grad(set_to_none=True)
        opt_L.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        if assign is not None:
            opt_L.step()
        elif learned and step % 50 == 0:
            now = influence(model, s[rows], act[rows], generator)
            average = now if average is None else average.lerp(now, 0.1)
    if learned:
        owner = L.argmax(1).tolist()
        return sorted([j for j in range(A) if owner[j] == i] for i in set(owner)), []
    rows = torch.randperm(len(s), generator=generator)[:6000]
    return agglomerate(cosine(influence(model, s[rows], act[rows], generator).double().numpy()), eta)


# ---------------------------------------------------------------------------------- D2P on TD-MPC2: decomposed dynamics
class NormedLinear(nn.Linear):
    """Linear -> LayerNorm -> activation, TD-MPC2's block: (.., I) -> (.., J)."""

    def __init__(self, i, j, act=F.mish):
        super().__init__(i, j)
        self.ln, self.act = nn.LayerNorm(j), act

    def forward(self, x):
        return self.act(self.ln(super().forward(x)))


def simnorm(x, V=8):
    """Softmax over groups of V: (.., D) -> (.., D)."""
    return x.unflatten(-1, (-1, V)).softmax(-1).flatten(-2)


class Stack(nn.Module):
    """k Linear layers as one weight (k, I, J), with `norm` each with its LayerNorm and Mish: (k, B, I) -> (k, B, J)."""

    def __init__(self, k, i, j, norm=True):
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(k, i, j), std=0.02))
        self.bias = nn.Parameter(torch.zeros(k, 1, j))
        self.norm = norm
        if norm:
            self.gain, self.shift = nn.Parameter(torch.ones(k, 1, j)), nn.Parameter(torch.zeros(k, 1, j))

    def forward(self, x):
        x = torch.baddbmm(self.bias, x, self.weight)
        return F.mish(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift) if self.norm else x


class Dynamics(nn.Module):
    """k trunks (state, own actions) -> w -> w, joined as `agg` says: state (.., n_in), act (.., A) -> (.., n_out).

    hidden: mean of the k last hidden layers, one shared head (as ED2 on MBPO). pre: k heads, mean before the
    normalisation. post: mean of k outputs, s' = (1/k) sum_i f_i(s, a_Gi). With one group all three are TD-MPC2's MLP.
    The trunks never see a loop: their first layer is one product with W_s (n_in, k w) and W_a (A, k w), W_a masked by
    `assign` (A, k), so that other groups' actions have weight and gradient zero; the second is one bmm.
    """

    def __init__(self, n_in, act_dim, n_out, width, assign, agg="hidden", simnorm=True):
        super().__init__()
        k = assign.shape[1]
        self.k, self.width, self.agg, self.simnorm = k, width, agg, simnorm
        self.register_buffer("assign", assign.clone())
        self.w_s = nn.Parameter(nn.init.trunc_normal_(torch.empty(n_in, k * width), std=0.02))
        self.w_a = nn.Parameter(nn.init.trunc_normal_(torch.empty(act_dim, k * width), std=0.02))
        self.bias = nn.Parameter(torch.zeros(k * width))
        self.gain, self.shift = nn.Parameter(torch.ones(k, width)), nn.Parameter(torch.zeros(k, width))
        self.second = Stack(k, width, width)
        self.head = Stack(1 if agg == "hidden" else k, width, n_out, norm=False)
        heads = k if agg == "post" else 1
        self.out_gain = nn.Parameter(torch.ones(heads, 1, n_out)) if simnorm else None
        self.out_shift = nn.Parameter(torch.zeros(heads, 1, n_out)) if simnorm else None

    def trunks(self, s, act, assign=None):
        """(B, n_in), (B, A) -> (k, B, w); `assign` (A, k) overrides the partition while it is being learned."""
        mask = (self.assign if assign is None else assign).repeat_interleave(self.width, 1)
        x = torch.addmm(self.bias, s, self.w_s) + act @ (self.w_a * mask)
        x = x.unflatten(-1, (self.k, self.width))
        x = F.mish(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift)  # every trunk has its own statistics
        return self.second(x.transpose(0, 1))

    def finish(self, x):
        if self.simnorm:
            x = simnorm(F.layer_norm(x, x.shape[-1:]) * self.out_gain + self.out_shift)
        return x.mean(0)

    def forward(self, s, act, assign=None):
        x = self.trunks(s, act, assign)
        if self.agg == "hidden":
            x = x.mean(0, keepdim=True)
        x = self.head(x)
        return self.finish(x.mean(0, keepdim=True) if self.agg == "pre" else x)


def dynamics_params(n, act_dim, width, sizes, agg):
    """Parameters of Dynamics(n, act_dim, n, width, ..) that are not masked, for groups of `sizes`."""
    trunk = sum((n + m) * width + width * width + 6 * width for m in sizes)  # two layers with bias, gain and shift
    heads = 1 if agg == "hidden" else len(sizes)
    return trunk + heads * (width * n + n) + (heads if agg == "post" else 1) * 2 * n


def match_width(count, target, step=8):
    """The multiple of `step` whose count(width) is closest to `target`. SystemExit if that is more than 5 % off."""
    width = min(range(step, 2**15, step), key=lambda w: abs(count(w) - target))
    if abs(count(width) / target - 1) > 0.05:
        raise SystemExit(f"no width gives {target:,} parameters within 5 % (width {width} has {count(width):,}): use a "
                         "larger --size or --match none")
    return width


# millions of parameters of the agent: latent, width of dynamics and heads
TDMPC2_SIZES = {"1M": (128, 384), "5M": (512, 512)}


class TDMPC2(nn.Module):
    """TD-MPC2's single-task world model: encoder, dynamics, reward, policy prior, E Q functions and their slow copy."""

    def __init__(self, obs_dim, act_dim, latent, hidden, dynamics, E=2):
        super().__init__()
        self.E = E
        self.encoder = nn.Sequential(NormedLinear(obs_dim, 256), NormedLinear(256, latent, simnorm))
        i = latent + act_dim
        self.reward = nn.Sequential(NormedLinear(i, hidden), NormedLinear(hidden, hidden), nn.Linear(hidden, BINS))
        self.prior = nn.Sequential(NormedLinear(latent, hidden), NormedLinear(hidden, hidden),
                                   nn.Linear(hidden, 2 * act_dim))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.reward[-1].weight)
        self.q, self.q_slow = (nn.Sequential(Stack(E, i, hidden), Stack(E, hidden, hidden),
                                             Stack(E, hidden, BINS, norm=False)) for _ in range(2))
        nn.init.zeros_(self.q[-1].weight)
        self.q_slow.load_state_dict(self.q.state_dict())
        self.q_slow.requires_grad_(False)
        self.dynamics = dynamics  # last: all variants of a seed start from the same encoder and heads

    def q_logits(self, net, z, act):
        """(.., D), (.., A) -> (E, .., 101)"""
        x = torch.cat([z, act], -1)
        return net(x.flatten(0, -2).expand(self.E, -1, -1)).unflatten(1, x.shape[:-1])

    def policy(self, z, noise):
        """z (.., D), noise (.., A) -> act in [-1, 1], log-probability (..)"""
        mean, s = self.prior(z).chunk(2, -1)
        log_std = -10 + 6 * (torch.tanh(s) + 1)
        act = torch.tanh(mean + log_std.exp() * noise)
        gauss = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return act, gauss - (F.relu(1 - act.square()) + 1e-6).log().sum(-1)


BINS, BIN_LIMIT = 101, 10.0  # TD-MPC2's reward and value classes, equally spaced in symlog space


def two_hot_loss(logits, x):
    """Cross-entropy of logits (.., 101) with the two bins beside symlog(x), x (..) -> (..)."""
    y = (symlog(x).clamp(-BIN_LIMIT, BIN_LIMIT) + BIN_LIMIT) * ((BINS - 1) / (2 * BIN_LIMIT))
    low = y.floor().clamp(max=BINS - 2)
    frac, low = y - low, low.long()[..., None]
    logp = logits.log_softmax(-1)
    return -((1 - frac) * logp.gather(-1, low)[..., 0] + frac * logp.gather(-1, low + 1)[..., 0])


def two_hot_mean(logits):
    bins = torch.linspace(-BIN_LIMIT, BIN_LIMIT, BINS, device=logits.device)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def unroll(dynamics, z, act):
    """z (B, D), act (H, B, A) -> open-loop latents (H, B, D)."""
    out = []
    for a in act:
        z = dynamics(z, a)
        out.append(z)
    return torch.stack(out)


def consistency_loss(dynamics, z, act, target, rho=0.5):
    """TD-MPC2's logged dynamics loss, (1/H) sum_t rho^t MSE_t of the open-loop latents; z (B, D), target (H, B, D)."""
    error = (unroll(dynamics, z, act) - target).square().mean((1, 2))
    return (error * rho ** torch.arange(len(act), device=error.device)).mean()


def world_model_loss(model, obs, act, rew, noise, pair, rho=0.5, gamma=0.99):
    """20 consistency + 0.1 reward + 0.1 value on the open-loop latents: (loss, metrics, detached z (H+1, B, D)).

    noise (H, B, A) for the policy in the value target; pair (2,) picks the two slow Q functions of its minimum.
    """
    with torch.no_grad():
        target = model.encoder(obs[1:])
        a, _ = model.policy(target, noise)
        slow = two_hot_mean(model.q_logits(model.q_slow, target, a).index_select(0, pair)).amin(0)
        value = rew + gamma * slow  # (H, B)
    z0 = model.encoder(obs[0])
    z = torch.cat([z0[None], unroll(model.dynamics, z0, act)])
    weight = rho ** torch.arange(len(act), device=z.device)
    consistency = (weight * (z[1:] - target).square().mean((1, 2))).mean()
    x = torch.cat([z[:-1], act], -1)
    reward = (weight * two_hot_loss(model.reward(x), rew).mean(1)).mean()
    q = model.q_logits(model.q, z[:-1], act)
    q_loss = (weight[:, None] * two_hot_loss(q, value.expand(model.E, -1, -1))).mean()
    loss = 20 * consistency + 0.1 * reward + 0.1 * q_loss
    return loss, dict(consistency=consistency.detach(), reward=reward.detach(), value=q_loss.detach()), z.detach()


def prior_loss(model, z, noise, scale, rho=0.5):
    """TD-MPC2's policy loss on detached latents z (H+1, B, D): maximise Q / scale + 1e-4 entropy."""
    act, logp = model.policy(z, noise)
    q = two_hot_mean(model.q_logits(model.q, z, act)).mean(0)
    with torch.no_grad():
        p5, p95 = torch.quantile(q[0], torch.tensor([0.05, 0.95], device=z.device))
        scale.lerp_((p95 - p5).clamp(min=1.0), 0.01)
    weight = rho ** torch.arange(len(z), device=z.device)
    return (weight[:, None] * (1e-4 * logp - q / scale)).mean()


def rate(step, total, lr, final=0.03):
    """Constant, then linear to `final` of it in the second half; short trainings end converged."""
    return lr * min(1.0, final + (1 - final) * 2 * (1 - step / total))


def check_finite(step, metrics, grad_norm):
    numbers = {k: float(v) for k, v in metrics.items()} | {"grad_norm": float(grad_norm)}
    if not np.isfinite(list(numbers.values())).all():
        raise SystemExit(f"update {step} is not finite: {numbers}; try a smaller --lr")
    return numbers


def train_tdmpc2(model, sampler, args, seed, compiled):
    """Joint training of all parts on replay; returns the logged consistency, averaged over the last tenth."""
    generator = torch.Generator(model.q[0].weight.device).manual_seed(seed)
    groups = [{"params": model.encoder.parameters(), "scale": 0.3}]
    groups += [{"params": m.parameters(), "scale": 1.0} for m in (model.reward, model.q, model.dynamics)]
    opt = torch.optim.Adam(groups, args.lr, foreach=True)
    opt_pi = torch.optim.Adam(model.prior.parameters(), args.lr, eps=1e-5, foreach=True)
    params = [p for g in opt.param_groups for p in g["params"]]
    slow, fast, pi = list(model.q_slow.parameters()), list(model.q.parameters()), list(model.prior.parameters())
    scale, tail = torch.ones((), device=generator.device), []
    for step in range(args.updates):
        for g in opt.param_groups:
            g["lr"] = rate(step, args.updates, args.lr) * g["scale"]
        obs, act, rew, *_ = sampler.sequences(args.batch, generator)
        noise = torch.randn(len(obs), *act.shape[1:], generator=generator, device=act.device)
        pair = torch.randperm(model.E, generator=generator, device=act.device)[:2]
        loss, metrics, z = compiled(world_model_loss)(model, obs, act, rew, noise[1:], pair)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 20.0)
        opt.step()
        model.q.requires_grad_(False)  # the prior moves, its judges do not
        opt_pi.zero_grad(set_to_none=True)
        compiled(prior_loss)(model, z, noise, scale).backward()
        nn.utils.clip_grad_norm_(pi, 20.0)
        opt_pi.step()
        model.q.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_(slow, fast, 0.01)
        if step >= int(0.9 * args.updates):
            tail.append(metrics["consistency"])
        if (step + 1) % 200 == 0:
            check_finite(step, metrics, norm)
    return float(torch.stack(tail).mean())


def train_dynamics(dynamics, encoder, sampler, args, seed, compiled):
    """Dynamics alone on the latents of a fixed encoder; the same batches for every variant of a seed."""
    generator = torch.Generator(next(dynamics.parameters()).device).manual_seed(seed)
    opt = torch.optim.Adam(dynamics.parameters(), args.lr, foreach=True)
    for step in range(args.updates):
        opt.param_groups[0]["lr"] = rate(step, args.updates, args.lr)
        obs, act, *_ = sampler.sequences(args.batch, generator)
        with torch.no_grad():
            z = encoder(obs)
        loss = 20 * compiled(consistency_loss)(dynamics, z[0], act, z[1:])
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(dynamics.parameters(), 20.0)
        opt.step()
        if (step + 1) % 200 == 0:
            check_finite(step, {"loss": loss.detach()}, norm)


def ridge(x, y, penalty=1e-4):
    """Least squares with intercept in float64: x (N, n), y (N, d) -> weights (n+1, d)."""
    x = np.c_[np.asarray(x, np.float64), np.ones(len(x))]
    return np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(x.shape[1]), x.T @ np.asarray(y, np.float64))


def nmse(pred, true, spread):
    """mean_d E(pred - true)^2 / Var_d over dimensions that vary; pred, true (B, d), spread (d,) variances."""
    live, error = spread > 1e-6, ((pred - true) ** 2).mean(0)
    return float((error[live] / spread[live]).mean())


@torch.no_grad()
def measure_latents(encoder, dynamics, sampler, horizons=(1, 3, 5, 10)):
    """Held-out open-loop errors of latents after h steps; sampler: slices of max(horizons) steps.

    Returns {logged: what training logs, per_step_mse: mean over the 3 training steps, fast_mse_1: on the tenth of the
    steps with the largest state change (mostly contacts), mse_h, latent_nmse_h: over the latents' variance,
    state_nmse_h: read out by one ridge probe fitted on real latents, persistence_mse_h, linear_mse_h: naive}.
    """
    generator = torch.Generator(next(encoder.parameters()).device).manual_seed(0)
    obs, act, *_ = sampler.sequences(2048, generator)
    z = encoder(obs)
    probe = ridge(z.flatten(0, 1).cpu(), obs.flatten(0, 1).cpu())
    x = torch.cat([z[:-1], act], -1).flatten(0, 1).cpu()
    linear = ridge(x, (z[1:] - z[:-1]).flatten(0, 1).cpu())  # one-step linear model of the same latents
    obs, act, *_ = sampler.sequences(2048, generator, held_out=True)
    z = encoder(obs)
    pred = unroll(dynamics, z[0], act)
    var_z, states = z[0].var(0).sum(), obs.cpu().double().numpy()
    spread = states.reshape(-1, states.shape[-1]).var(0)
    error = (pred - z[1:]).square().mean(2)  # (H, B)
    out = {"logged": float((error[:3].mean(1) * 0.5 ** torch.arange(3, device=z.device)).mean()),
           "per_step_mse": float(error[:3].mean())}
    change = ((states[1] - states[0]) ** 2 / np.maximum(spread, 1e-6)).sum(1)
    fast = torch.as_tensor(change >= np.quantile(change, 0.9), device=z.device)
    out["fast_mse_1"] = float(error[0][fast].mean())
    guess = z[0].cpu().double().numpy()
    for h in range(1, max(horizons) + 1):
        guess = guess + np.c_[guess, act[h - 1].cpu(), np.ones(len(guess))] @ linear
        if h in horizons:
            true = z[h].cpu().double().numpy()
            out[f"mse_{h}"] = float(error[h - 1].mean())
            out[f"latent_nmse_{h}"] = float((pred[h - 1] - z[h]).square().mean(0).sum() / var_z)
            decoded = np.c_[pred[h - 1].cpu(), np.ones(len(true))] @ probe
            out[f"state_nmse_{h}"] = nmse(decoded, states[h], spread)
            out[f"persistence_mse_{h}"] = float((z[0] - z[h]).square().mean())
            out[f"linear_mse_{h}"] = float(((guess - true) ** 2).mean())
    return out


# --------------------------------------------------------------------------------- DreamerV3 with a decomposed core
def symexp_bins(device):
    """(255,) values of reward and critic classes: symexp-spaced from 0 to e^20 - 1 and mirrored, 0 in the middle"""
    half = symexp(torch.linspace(0, 20, 128, device=device))
    return torch.cat([-half[1:].flip(0), half])


def symexp_two_hot(x):
    """x (..) -> lower bin k (..) and the weight (..) of bin k+1, split linearly in raw space so that the mean is x"""
    bins = symexp_bins(x.device)
    k = (symlog(x) * (127 / 20) + 127).clamp(0, 253).long()
    return k, ((x - bins[k]) / (bins[k + 1] - bins[k])).clamp(0, 1)


def symexp_two_hot_loss(logits, *targets):
    """Cross-entropy of logits (.., 255) against the two-hot distribution of a target (..), summed over targets: (..)"""
    logp, loss = logits.log_softmax(-1), 0.0
    for k, high in map(symexp_two_hot, targets):
        low = logp.gather(-1, k[..., None])[..., 0]
        loss = loss - (1 - high) * low - high * logp.gather(-1, k[..., None] + 1)[..., 0]
    return loss


def symexp_two_hot_mean(logits):
    """logits (.., 255) -> (..). Mirrored bins are summed in pairs: uniform logits give exactly 0, not rounded e^20s."""
    p = logits.softmax(-1)
    return ((p[..., 128:] - p[..., :127].flip(-1)) * symexp_bins(logits.device)[128:]).sum(-1)


def dreamer_lambda_return(rew, value, cont, lam):
    """R_t = r_{t+1} + c_{t+1} [(1-lam) v_{t+1} + lam R_{t+1}], R_H = v_H, for t = 0..H-1.

    rew, cont (H, ..) hold r_1..r_H and c_1..c_H (the discount is part of c); value (H+1, ..), value[0] is not used.
    """
    R, out = value[-1], []
    for t in reversed(range(len(rew))):
        R = rew[t] + cont[t] * ((1 - lam) * value[t + 1] + lam * R)
        out.append(R)
    return torch.stack(out[::-1])  # (H, ..)


def unimix(logits):
    """logits (.., S, C) -> probabilities, 99 % softmax and 1 % uniform (a softmax by hand: C is small)"""
    p = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return (1 - UNIMIX) * p / p.sum(-1, keepdim=True) + UNIMIX / logits.shape[-1]


def kl(p, q):
    """KL divergence in nats, summed over the latent variables: (.., S, C) -> (..)"""
    return (p * (p.log() - q.log())).sum((-2, -1))


def sample_latent(p, gumbel):
    """Gumbel-max with straight-through gradient: p, gumbel (.., S, C) -> z (.., S C)"""
    index = (p.detach().log() + gumbel).argmax(-1, keepdim=True)
    one_hot = (index == torch.arange(p.shape[-1], device=p.device)).to(p.dtype)
    return (one_hot + p - p.detach()).flatten(-2)


def return_range(old, returns):
    """Moving 5th and 95th percentile of the returns: old (2,) -> (2,)"""
    ends = torch.tensor([0.05, 0.95], device=returns.device)
    return 0.99 * old + 0.01 * torch.quantile(returns.flatten(), ends)


# --------------------------------------------------------------------------------------------------------- networks
def truncated_normal(shape, fan_in, scale=1.0):
    """A parameter with standard deviation scale / sqrt(fan_in); 1.1368 makes up for the cut at two deviations."""
    std = 1.1368 * scale * fan_in**-0.5
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std) if std
                        else torch.zeros(shape))


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last axis, in float32"""

    def __init__(self, n):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x.float(), self.gain.shape, self.gain, 1e-4)


def linear(i, j, scale=1.0):
    layer = nn.Linear(i, j)
    layer.weight = truncated_normal((j, i), i, scale)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(i, units, layers, out=None, scale=1.0):
    """`layers` x [Linear, RMSNorm, SiLU] and, if `out`, a last Linear whose initial weights are scaled by `scale`."""
    widths = [i] + [units] * layers
    blocks = [m for a, b in zip(widths, widths[1:]) for m in (linear(a, b), RMSNorm(b), nn.SiLU())]
    return nn.Sequential(*blocks, *([linear(units, out, scale)] if out else []))


class BlockLinear(nn.Module):
    """k x g independent linear layers as one tensor: x (k, g, B, I) -> (k, g, B, J), one batched product.

    As in DreamerV3, the initial scale counts the inputs of all g blocks. `keep`: see `clip_units`.
    """

    keep = dict(weight=(0,), bias=(0,))

    def __init__(self, k, g, i, j):
        super().__init__()
        self.weight = truncated_normal((k, g, i, j), g * i)
        self.bias = nn.Parameter(torch.zeros(k, g, j))

    def forward(self, x):
        y = torch.baddbmm(self.bias.flatten(0, 1)[:, None], x.flatten(0, 1), self.weight.flatten(0, 1))
        return y.unflatten(0, x.shape[:2])


def merged_groups(groups, blocks):
    """`blocks` aggregation with more groups than blocks: block b takes the union of the groups b, b + blocks, .."""
    return [sum((list(part) for part in groups[e::blocks]), []) for e in range(min(len(groups), blocks))]


class RSSM(nn.Module):
    """Recurrent state-space model h' = core(h, z, act), prior p(z'|h'), posterior q(z'|h', embed).

    groups: k lists of action indices, None for one core that sees all actions (DreamerV3 itself). agg:
      "mean": k sub-cores, each with its own embedding of its own actions, its own block-diagonal hidden layer and its
        own GRU; they share h, z and the two embeddings of h and z, and h' = mean_i h_i'. Every h_i' has the full size D
        (or it could not be averaged), so `width` is what matches sizes: the units of one sub-core's hidden layer over
        its g blocks, input (D/g + 3U) g -> width -> GRU 3 D. With width = D a sub-core is DreamerV3's whole core.
      "blocks": one core of DreamerV3's size whose block b sees only the actions of group b mod k.
    Nothing loops over groups: all first layers are one masked product, all later ones are batched products, and
    [h, embeddings] is never copied k times, because h and the shared embeddings have their own products.
    """

    keep = dict(act_weight=(1,), act_bias=(0,), act_gain=(0,), hid_gain=(0,))  # see `clip_units`

    def __init__(self, act_dim, embed, deter, hidden, classes, groups=None, agg="mean", width=None, stoch=32, blocks=8):
        super().__init__()
        groups = groups or [list(range(act_dim))]
        width = width or deter
        assert agg in ("mean", "blocks") and deter % blocks == 0 and width % blocks == 0, (agg, deter, width, blocks)
        parts = groups if agg == "mean" else merged_groups(groups, blocks)
        k, E, U, g = len(groups) if agg == "mean" else 1, len(parts), hidden, blocks
        self.agg, self.deter, self.hidden, self.stoch, self.classes, self.blocks = agg, deter, U, stoch, classes, g
        self.h_in, self.z_in = mlp(deter, U, 1), mlp(stoch * classes, U, 1)
        # every part embeds its own actions: columns of other actions are 0, and so is their gradient
        mask = torch.tensor([[float(j in part) for part in parts] for j in range(act_dim)])[..., None]  # (A, E, 1)
        self.act_weight = nn.Parameter(
            torch.stack([truncated_normal((act_dim, U), len(part)).detach() for part in parts], 1) * mask)  # (A, E, U)
        self.act_bias, self.act_gain = nn.Parameter(torch.zeros(E, U)), nn.Parameter(torch.ones(E, U))
        self.hid = BlockLinear(k, g, deter // g + 3 * U, width // g)
        self.hid_gain = nn.Parameter(torch.ones(k, g, width // g))
        self.gru = BlockLinear(k, g, width // g, 3 * deter // g)
        self.prior_net = mlp(deter, U, 2, stoch * classes)
        self.post_net = mlp(deter + embed, U, 1, stoch * classes)
        # `blocks`: the hidden layer is normalised per group of blocks; over all of them, actions would leak by the norm
        part_of = torch.arange(g) % E if agg == "blocks" else torch.zeros(g, dtype=torch.long)
        same = (part_of[:, None] == part_of).float()
        self.register_buffer("act_mask", mask, persistent=False)
        self.register_buffer("norm_mix", same / same.sum(0), persistent=False)  # (g, g), symmetric
        self.register_buffer("part_of", part_of, persistent=False)

    def core_weights(self):
        """Rearranged weights, made once for all steps of a sequence. The input of a block is [h-slice, x0, x1, x2]."""
        W, d, U = self.hid.weight, self.deter // self.blocks, self.hidden  # (k, g, d + 3U, w)
        from_h = W[:, :, :d].permute(1, 2, 0, 3).flatten(2)  # (g, d, k w)
        from_x = W[:, :, d:d + 2 * U].permute(2, 0, 1, 3).flatten(1)  # (2U, k g w)
        own = W[:, :, d + 2 * U:]
        own = own.transpose(1, 2).flatten(2) if self.agg == "mean" else own[0]  # (k, U, g w) or (g, U, w)
        return (self.act_weight * self.act_mask).flatten(1), from_h, from_x, own

    def act_input(self, weights, act):
        """What the actions (.., A) add to the hidden layers: (.., k, g, w). All steps of a recording at once."""
        # the environment clips; a beyond [-1, 1] becomes its sign, with the gradient of a scaled action
        act = act / act.detach().abs().clamp(min=1)
        x = (act.flatten(0, -2) @ weights[0]).unflatten(-1, self.act_bias.shape) + self.act_bias  # (n, E, U)
        x = F.silu(F.rms_norm(x.float(), x.shape[-1:], eps=1e-4) * self.act_gain)
        if self.agg == "blocks":
            x = x[:, self.part_of]  # (n, g, U)
        x = torch.bmm(x.transpose(0, 1), weights[3]).transpose(0, 1)  # (n, k or g, ..)
        return (x.flatten(1).unflatten(1, self.hid.bias.shape) + self.hid.bias).unflatten(0, act.shape[:-1])

    def subcores(self, weights, h, z, act_in):
        """h (B, D), z (B, S C), act_in (B, k, g, w) -> the sub-cores' h_i before they are averaged, (k, g, B, D/g)"""
        hs = h.unflatten(-1, (self.blocks, -1)).transpose(0, 1)  # (g, B, D/g)
        x = act_in + (torch.cat([self.h_in(h), self.z_in(z)], -1) @ weights[2]).view_as(act_in)
        x = x + torch.bmm(hs, weights[1]).unflatten(-1, (-1, x.shape[-1])).permute(1, 2, 0, 3)
        scale = torch.rsqrt(x.float().square().mean(-1) @ self.norm_mix + 1e-4)  # (B, k, g)
        x = F.silu(x * scale[..., None] * self.hid_gain)
        reset, cand, update = self.gru(x.permute(1, 2, 0, 3)).chunk(3, -1)  # (k, g, B, D/g)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * hs

    def step(self, weights, h, z, act_in):
        """One step of the core: h' (B, D)"""
        return self.subcores(weights, h, z, act_in).mean(0).transpose(0, 1).flatten(1)

    def prior(self, h):
        return unimix(self.prior_net(h).float().unflatten(-1, (self.stoch, self.classes)))  # (.., S, C)

    def posterior(self, h, embed):
        x = self.post_net(torch.cat([h, embed], -1))
        return unimix(x.float().unflatten(-1, (self.stoch, self.classes)))  # (.., S, C)

    def initial(self, n, device):
        """Zero state h (n, D), z (n, S C)"""
        return torch.zeros(n, self.deter, device=device), torch.zeros(n, self.stoch * self.classes, device=device)

    def observe(self, embed, act, gumbel):
        """Posterior states of recordings that start from the zero state.

        embed (T+1, B, U), act (T, B, A), gumbel (T+1, B, S, C) -> h (T+1, B, D), z (T+1, B, S C), posterior (.., S, C)
        """
        weights = self.core_weights()
        act_in = self.act_input(weights, torch.cat([torch.zeros_like(act[:1]), act]))  # of the previous action
        h, z = self.initial(embed.shape[1], embed.device)
        hs, zs, posts = [], [], []
        for e, a, noise in zip(embed.unbind(0), act_in.unbind(0), gumbel.unbind(0)):
            h = self.step(weights, h, z, a)
            posts.append(self.posterior(h, e))
            z = sample_latent(posts[-1], noise)
            hs.append(h)
            zs.append(z)
        return torch.stack(hs), torch.stack(zs), torch.stack(posts)


class DreamerV3(nn.Module):
    """World model (encoder, rssm, decoder, reward, cont), actor and critic. The slow critic lives outside.

    One decoder output layer for all observations: the same parameters and function as one layer per sensor.
    """

    def __init__(self, obs_dim, act_dim, deter, hidden, classes, units, groups=None, agg="mean", width=None, stoch=32):
        super().__init__()
        feat = deter + stoch * classes
        self.encoder = mlp(obs_dim, units, 3)
        self.rssm = RSSM(act_dim, units, deter, hidden, classes, groups, agg, width, stoch)
        self.decoder = mlp(feat, units, 3, obs_dim)
        self.reward = mlp(feat, units, 1, 255, scale=0.0)
        self.cont = mlp(feat, units, 1, 1)
        self.actor = mlp(feat, units, 3, 2 * act_dim, scale=0.01)
        self.critic = mlp(feat, units, 3, 255, scale=0.0)

    def world(self):
        """Modules of the world model, for training without behaviour: LaProp(*clip_units(*model.world()))"""
        return self.encoder, self.rssm, self.decoder, self.reward, self.cont

    def policy(self, feat):
        """Mean and standard deviation of a Gaussian that is clipped by the environment, not squashed: (.., A) each"""
        mean, std = self.actor(feat).float().chunk(2, -1)
        return torch.tanh(mean), 0.9 * torch.sigmoid(std + 2) + 0.1


def count_parameters(model):
    """Trainable parameters that are in use: masked action weights are not"""
    masked = (1 - model.rssm.act_mask).sum().item() * model.rssm.hidden
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - int(masked)


def core_params(act_dim, groups, agg, width, deter, hidden, latent, blocks=8):
    """Parameters of the core, in closed form: embeddings of h, z (latent = S C) and actions, hidden layers, GRUs"""
    parts = groups if agg == "mean" else merged_groups(groups, blocks)
    k, U = len(groups) if agg == "mean" else 1, hidden
    embeddings = U * (deter + 2 + latent + 2 + sum(len(part) + 2 for part in parts))
    return embeddings + k * ((deter // blocks + 3 * U + 2) * width + 3 * deter // blocks * width + 3 * deter)


# ----------------------------------------------------------------------------------------------- losses and updates
def draw_gumbel(shape, generator):
    u = torch.rand(shape, generator=generator, device=generator.device)
    return -(-u.clamp(1e-10, 1 - 6e-8).log()).log()


def draw_noise(rssm, act_dim, T, B, horizon, generator):
    """All randomness of one update: Gumbel noise of T+1 posteriors and H priors, normal noise of H actions."""
    latent = rssm.stoch, rssm.classes
    return (draw_gumbel((T + 1, B, *latent), generator), draw_gumbel((horizon, T * B, *latent), generator),
            torch.randn(horizon, T * B, act_dim, generator=generator, device=generator.device))


def rssm_loss(model, obs, act, rew, gumbel, skip=0):
    """World-model loss of recordings: reconstruction, reward, continuation, and KL with 1 free nat.

    obs (T+1, B, O), act (T, B, A), rew (T, B), gumbel (T+1, B, S, C). The first step counts as the first of an episode:
    zero state, zero previous action, no reward. Metrics (detached, 0-d) leave out the first `skip` steps, where the
    zero state of a recording that starts amid an episode is wrong: dyn_raw is the KL without free nats, the entropies
    are sums over the latent variables. Returns loss, metrics, (h (T+1, B, D), z (T+1, B, S C)).
    """
    target = symlog(obs)
    h, z, post = model.rssm.observe(model.encoder(target), act, gumbel)
    prior, feat = model.rssm.prior(h), torch.cat([h, z], -1)
    dyn, rep = kl(post.detach(), prior), kl(post, prior.detach())  # (T+1, B)
    cont = model.cont(feat)[..., 0].float()
    terms = dict(
        rec=(model.decoder(feat) - target).square().sum(-1),
        rew=symexp_two_hot_loss(model.reward(feat[1:]).float(), rew),
        con=F.binary_cross_entropy_with_logits(cont, torch.full_like(cont, CONT), reduction="none"),
        dyn=dyn.clamp(min=1), rep=rep.clamp(min=1))  # clipped per step, then averaged
    loss = sum((0.1 if name == "rep" else 1.0) * x.mean() for name, x in terms.items())
    terms.update(dyn_raw=dyn, post_entropy=-(post * post.log()).sum((-2, -1)),
                 prior_entropy=-(prior * prior.log()).sum((-2, -1)))
    metrics = {name: x.detach()[max(skip - (name == "rew"), 0):].mean() for name, x in terms.items()}
    return loss, metrics, (h, z)


def imagine(model, h, z, gumbel, eps):
    """Roll the actor through the prior: h (N, D), z (N, S C), noise (H, N, S, C) and (H, N, A).

    Returns feat (H+1, N, F) and the unclipped actions (H, N, A); run it without gradients.
    """
    rssm = model.rssm
    weights, feats, acts = rssm.core_weights(), [torch.cat([h, z], -1)], []
    for g, e in zip(gumbel.unbind(0), eps.unbind(0)):
        mean, std = model.policy(feats[-1])
        acts.append(mean + std * e)
        h = rssm.step(weights, h, z, rssm.act_input(weights, acts[-1]))
        z = sample_latent(rssm.prior(h), g)
        feats.append(torch.cat([h, z], -1))
    return torch.stack(feats), torch.stack(acts)


def behaviour_loss(model, slow, h, z, rew, gumbel, eps, old_range, lam=0.95):
    """Actor and critic losses: REINFORCE on imagined roll-outs from every state, and the critic on the replay.

    slow: the slow critic; h (T+1, B, D), z (T+1, B, S C) posterior states with gradient; rew (T, B); old_range (2,)
    percentiles of earlier returns. Imagination starts at states 1..T (the state before has seen too little).
    Returns loss, metrics (detached, 0-d), the new range. Only the replay loss has a gradient into the world model.
    """
    T, B = rew.shape
    with torch.no_grad():
        feat, act = imagine(model, h[1:].flatten(0, 1), z[1:].flatten(0, 1), gumbel, eps)
        reward = symexp_two_hot_mean(model.reward(feat[1:]).float())  # (H, N) of arriving
        cont = torch.sigmoid(model.cont(feat)[..., 0].float())  # (H+1, N)
        weight = cont.cumprod(0)[:-1]  # (H, N)
        slow_value = symexp_two_hot_mean(slow(feat[:-1]).float())
    logits = model.critic(feat).float()  # (H+1, N, 255)
    with torch.no_grad():
        value = symexp_two_hot_mean(logits)
        ret = dreamer_lambda_return(reward, value, cont[1:], lam)  # (H, N)
        new_range = return_range(old_range, ret)
        scale = (new_range[1] - new_range[0]).clamp(min=1)
        adv = (ret - value[:-1]) / scale
    mean, std = model.policy(feat[:-1])
    logp = (-0.5 * ((act - mean) / std).square() - std.log()).sum(-1)  # without the constant
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)  # (H, N)
    policy = -(weight * (logp * adv + 3e-4 * entropy)).mean()
    # the slow critic's value is a second target, a regulariser
    critic = (weight * symexp_two_hot_loss(logits[:-1], ret, slow_value)).mean()

    # the replay: recorded rewards, and the imagined return of a state as its value
    boot = ret[0].view(T, B)
    target = dreamer_lambda_return(rew, torch.cat([boot[:1], boot]), torch.full_like(rew, CONT), lam)  # (T, B)
    feat = torch.cat([h, z], -1)[:-1]
    with torch.no_grad():
        slow_value = symexp_two_hot_mean(slow(feat).float())
    replay = symexp_two_hot_loss(model.critic(feat).float(), target, slow_value).mean()
    metrics = dict(policy=policy, value=critic, replay_value=replay, imag_reward=reward.mean(), imag_return=ret.mean(),
                   replay_return=target.mean(), adv=adv.abs().mean(), scale=scale, entropy=entropy.mean())
    return policy + critic + 0.3 * replay, {k: x.detach() for k, x in metrics.items()}, new_range


def dreamer_loss(model, slow, old_range, obs, act, rew, noise):
    """Everything DreamerV3 minimises on one batch (one optimiser, one backward pass); noise from `draw_noise`."""
    loss, metrics, (h, z) = rssm_loss(model, obs, act, rew, noise[0])
    behaviour, more, new_range = behaviour_loss(model, slow, h, z, rew, *noise[1:], old_range)
    return loss + behaviour, metrics | more, new_range


@torch.no_grad()
def open_loop(model, obs, act, gumbel, context):
    """Predict obs[context:] (T+1-context, B, O) from the first `context` observations and all recorded actions.

    obs (T+1, B, O), act (T, B, A), gumbel (T+1, B, S, C): posterior states for the context, then samples of the prior.
    """
    rssm = model.rssm
    h, z, _ = rssm.observe(model.encoder(symlog(obs[:context])), act[:context - 1], gumbel[:context])
    h, z, weights, feats = h[-1], z[-1], rssm.core_weights(), []
    for a, g in zip(rssm.act_input(weights, act[context - 1:]).unbind(0), gumbel[context:].unbind(0)):
        h = rssm.step(weights, h, z, a)
        z = sample_latent(rssm.prior(h), g)
        feats.append(torch.cat([h, z], -1))
    return symexp(model.decoder(torch.stack(feats)))


def clip_units(*modules):
    """All parameters of the modules and, for each, the dimensions that number independent networks (`keep`).

    These are attributes of classes, not of parameters, where a copy of the model would lose them.
    """
    owned = [(p, getattr(sub, "keep", {}).get(name, ())) for m in modules for sub in m.modules()
             for name, p in sub.named_parameters(recurse=False)]
    return [p for p, _ in owned], [keep for _, keep in owned]


class LaProp:
    """DreamerV3's optimiser: adaptive gradient clipping, division by the root mean square, then momentum.

    Each tensor's gradient norm is at most 0.3 of its weight norm, taken over all dimensions but those in `keep` (from
    `clip_units`), so that stacked networks train as separate ones would.
    """

    def __init__(self, params, keep, lr=4e-5, warmup=1000, beta1=0.9, beta2=0.999, clip=0.3, eps=1e-20):
        self.params = list(params)
        self.lr, self.warmup, self.beta1, self.beta2, self.clip, self.eps = lr, warmup, beta1, beta2, clip, eps
        self.dims = [tuple(d for d in range(p.ndim) if d not in dims) for p, dims in zip(self.params, keep)]
        self.steps = torch.zeros((), device=self.params[0].device)  # a tensor: no host sync, fit for CUDA graphs
        self.mu, self.nu = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    def norms(self, tensors):
        return [torch.linalg.vector_norm(x, dim=d, keepdim=True) for x, d in zip(tensors, self.dims)]

    @torch.no_grad()
    def step(self):
        """One update from the gradients in .grad, which are clipped in place"""
        grads = [p.grad for p in self.params]
        limit, norm = self.norms(self.params), self.norms(grads)
        torch._foreach_clamp_min_(limit, 1e-3)
        torch._foreach_mul_(limit, self.clip)
        torch._foreach_div_(limit, norm)  # inf where the gradient is 0
        torch._foreach_clamp_max_(limit, 1.0)
        for g, factor in zip(grads, limit):
            g.mul_(factor)
        self.steps += 1
        torch._foreach_mul_(self.nu, self.beta2)
        torch._foreach_addcmul_(self.nu, grads, grads, 1 - self.beta2)
        rms = torch._foreach_div(self.nu, 1 - self.beta2**self.steps)
        torch._foreach_sqrt_(rms)
        torch._foreach_add_(rms, self.eps)
        torch._foreach_div_(grads, rms)
        torch._foreach_lerp_(self.mu, grads, 1 - self.beta1)
        lr = self.lr * (self.steps / self.warmup).clamp(max=1) / (1 - self.beta1**self.steps)
        torch._foreach_sub_(self.params, torch._foreach_mul(self.mu, lr))

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        return dict(steps=self.steps, mu=self.mu, nu=self.nu)

    def load_state_dict(self, state):
        for mine, saved in zip([self.steps, *self.mu, *self.nu], [state["steps"], *state["mu"], *state["nu"]]):
            mine.copy_(saved)


# ------------------------------------------------------------------------------------------------------------ agent
class Agent:
    """A DreamerV3 that acts and learns online; state() is all that an exact resume needs, apart from the episodes."""

    def __init__(self, model, seed, lr=4e-5, warmup=1000, horizon=15, loss=dreamer_loss):
        self.model, self.horizon, self.loss, self.seed = model, horizon, loss, seed
        self.device = next(model.parameters()).device
        self.slow = copy.deepcopy(model.critic).requires_grad_(False)
        self.opt = LaProp(*clip_units(model), lr, warmup)
        self.range = torch.zeros(2, device=self.device)  # 5th and 95th percentile of imagined returns
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.steps, self.episodes, self.updates, self.minutes, self.curve = 0, 0, 0, 0.0, []

    def update(self, obs, act, rew):
        """One gradient step on obs (T+1, B, O), act (T, B, A), rew (T, B); returns detached 0-d metrics."""
        noise = draw_noise(self.model.rssm, act.shape[-1], *rew.shape, self.horizon, self.generator)
        loss, metrics, new_range = self.loss(self.model, self.slow, self.range, obs, act, rew, noise)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.slow.parameters()), list(self.model.critic.parameters()), 0.02)
        self.range.copy_(new_range)
        self.updates += 1
        return dict(metrics, loss=loss.detach())

    def policy(self, jobs, mean=False):
        """A policy for `Workers.rollout` with `jobs` jobs: filters each job's observations, samples or takes the mean.

        The policy's own memory is (h, z, previous action) per job, reset at the first step of an episode.
        """
        model, rssm = self.model, self.model.rssm
        h, z = rssm.initial(jobs, self.device)
        act = torch.zeros(jobs, model.rssm.act_weight.shape[0], device=self.device)
        with torch.no_grad():
            weights = rssm.core_weights()

        @torch.no_grad()
        def step(obs, job, t):  # (n, O), (n,), (n,) -> (n, A)
            obs, i = torch.from_numpy(obs).to(self.device), torch.from_numpy(job).to(self.device)
            old = torch.from_numpy(t > 0).to(self.device)[:, None]
            new = rssm.step(weights, h[i] * old, z[i] * old, rssm.act_input(weights, act[i] * old))
            post = rssm.posterior(new, model.encoder(symlog(obs)))
            h[i], z[i] = new, sample_latent(post, draw_gumbel(post.shape, self.generator))
            mu, std = model.policy(torch.cat([h[i], z[i]], -1))
            eps = torch.randn(mu.shape, generator=self.generator, device=self.device)
            act[i] = (mu if mean else mu + std * eps).clamp(-1, 1)
            return act[i].cpu().numpy()
        return step

    def state(self):
        return dict(model=self.model.state_dict(), slow=self.slow.state_dict(), opt=self.opt.state_dict(),
                    range=self.range, generator=self.generator.get_state(), steps=self.steps, episodes=self.episodes,
                    updates=self.updates, minutes=self.minutes, curve=self.curve)

    def load_state(self, state):
        for part in ("model", "slow", "opt"):
            getattr(self, part).load_state_dict(state[part])
        self.range.copy_(state["range"])
        self.generator.set_state(state["generator"].cpu())
        for name in ("steps", "episodes", "updates", "minutes"):
            setattr(self, name, state[name])
        self.curve = list(state["curve"])


def learn_online(agent, episodes, workers, task, steps, per_round=4, batch=16, length=64, train_ratio=512, log=print,
                 save=None):
    """Alternate {play `per_round` episodes, store them, train} for `steps` agent steps of one task.

    episodes: data.Episodes with that task; workers: envs.Workers. train_ratio: trained per played steps, so that
    updates = steps * train_ratio / (batch * length). Recordings start from the zero state. log(row, metrics) and
    save(agent.state()) are called once per round. Returns the curve, rows of (agent steps, environment steps, minutes
    of training and playing, mean return of the round's stochastic episodes).
    """
    repeat = task_facts(task).action_repeat
    episodes.truncate({task: agent.episodes})  # what an interrupted round has added
    while agent.steps < steps:
        start = time.perf_counter()
        jobs = [(task, 100_000 * agent.seed + agent.episodes + i) for i in range(per_round)]
        played = workers.rollout(jobs, agent.policy(per_round))
        episodes.append(task, *([e[name] for e in played] for name in ("obs", "act", "rew", "term")))
        agent.episodes += per_round
        agent.steps += sum(len(e["rew"]) for e in played)
        sampler, metrics = episodes.sampler([task], length, agent.device), {}
        while agent.updates < agent.steps * train_ratio // (batch * length):
            metrics = agent.update(*sampler.sequences(batch, agent.generator)[:3])
        agent.minutes += (time.perf_counter() - start) / 60
        ret = float(np.mean([e["ret"] for e in played]))
        agent.curve.append([agent.steps, agent.steps * repeat, agent.minutes, ret])
        log(agent.curve[-1], {name: x.item() for name, x in metrics.items()})
        if save:
            save(agent.state())
    return agent.curve


# -------------------------------------------------------------------------------------------------------------- data
def make_data(task, folder, steps, workers, data_dir=None):
    """Episodes for a task: (random, replay, notes).

    `folder`/random: 20,000 agent steps of uniform actions, what SD2 reads. `folder`/replay: an evolving linear policy
    (augmented random search, Mania et al. 2018) from useless to better; or the episodes in `data_dir`. Seeds are fixed:
    every variant and training seed sees the same data and the same held-out episodes. With steps = 0 the random
    episodes are all there is. SystemExit: data that does not fit the task, or ends early.
    """
    O, A, T, _ = task_facts(task)
    facts, folder = {task: (O, A, T)}, Path(folder)
    if data_dir:
        replay = Episodes.open(data_dir, [task])
        if replay.facts[task] != (O, A, T):
            raise SystemExit(f"{data_dir} holds {task} with (obs, act, steps) = {replay.facts[task]}, the task has "
                             f"{(O, A, T)}: expected episodes of envs.make_env, with its action repeat")
    done = folder / "data.json"
    if not done.exists():
        random = Episodes.create(folder / "random", facts)
        random.truncate({task: 0})  # a run killed here starts its data again
        rng = np.random.default_rng(0)
        n = max(4, math.ceil(20_000 / T))
        acts = rng.uniform(-1, 1, (n, T, A)).astype(np.float32)
        with Workers(workers) as pool:
            played = pool.rollout([(task, 10**6 + s) for s in range(n)], lambda obs, job, t: acts[job, t])
            random.append(task, *([e[x] for e in played] for x in ("obs", "act", "rew", "term")))
            notes = {"random_return": float(np.mean([e["ret"] for e in played]))}
            if steps and not data_dir:
                own = Episodes.create(folder / "replay", facts)
                own.truncate({task: 0})
                notes["returns"] = search(task, pool, played, own, steps)
        write_text(done, json.dumps(notes))
    random = Episodes.open(folder / "random", [task])
    if not data_dir:
        replay = Episodes.open(folder / "replay", [task]) if steps else random
    if replay.arrays(task)["term"].any():
        raise SystemExit(f"episodes of {task} end early (termination): ed2.py is for tasks that do not")
    return random, replay, json.loads(done.read_text())


def search(task, pool, random, episodes, steps, directions=8, nu=0.2, alpha=1.0, noise=0.3):
    """Augmented random search over linear policies of normalised states, with action noise; stores every episode and
    returns [(mean, best) return of each round]."""
    O, A, T, _ = task_facts(task)
    rng = np.random.default_rng(1)
    x = np.concatenate([e["obs"] for e in random])
    mean, std = x.mean(0), x.std(0) + 1e-3
    W, curve = np.zeros((A, O)), []
    for r in range(max(1, round(steps / (2 * directions * T)))):
        delta = rng.normal(size=(directions, A, O))
        both = np.concatenate([W + nu * delta, W - nu * delta])
        eps = noise * rng.normal(size=(2 * directions, T, A))

        def act(obs, job, t, both=both, eps=eps):
            return np.clip(np.einsum("nao,no->na", both[job], (obs - mean) / std) + eps[job, t], -1, 1)

        played = pool.rollout([(task, 1000 * (r + 1) + i % directions) for i in range(2 * directions)], act)
        episodes.append(task, *([e[x] for e in played] for x in ("obs", "act", "rew", "term")))
        ret = np.array([e["ret"] for e in played])
        plus, minus = ret[:directions], ret[directions:]
        top = np.argsort(-np.maximum(plus, minus))[:directions // 2]
        spread = np.concatenate([plus[top], minus[top]]).std() + 1e-6
        W += alpha * nu / (len(top) * spread) * np.einsum("i,iao->ao", (plus - minus)[top], delta[top])
        curve.append((float(ret.mean()), float(ret.max())))
    return curve


def transitions(episodes, task, n=20_000, seed=0):
    """n random rows (obs, act, next obs - obs), never across an episode's end: (n, O), (n, A), (n, O)."""
    maps = episodes.arrays(task)
    rows = np.concatenate([np.c_[np.full(t, e), np.arange(t)] for e, t in enumerate(maps["length"])])
    rng = np.random.default_rng(seed)
    e, t = rows[np.sort(rng.permutation(len(rows))[:n])].T
    return maps["obs"][e, t], maps["act"][e, t], maps["obs"][e, t + 1] - maps["obs"][e, t]


def find_partition(name, task, random, seed=0, eta=0.0):
    """(groups, log of merges) for --partition; everything that is computed reads the random data."""
    A, robot = task_facts(task)[1], task.split("-")[0]
    if name == "none" or A == 1:
        return [list(range(A))], []
    if name == "full":
        return [[j] for j in range(A)], []
    table = {"published": PUBLISHED, "human": LIMBS}.get(name)
    if table is not None:
        if robot not in table:
            raise SystemExit(f"no {name} partition of {robot!r}: there is one for {', '.join(table)}; "
                             "type --partition sd2, or human or published for one of these")
        return check_partition(table[robot], A), []
    s, act, delta = transitions(random, task)
    if name in ("sd2j", "learned"):
        s, act, delta = (torch.from_numpy(np.ascontiguousarray(x)) for x in (s, act, delta))
        return fit_influence(s, act, delta, seed, eta=eta, learned=name == "learned")
    groups, log = agglomerate(cosine(pearson_features(act, delta)), eta)
    return (random_partition(groups, seed), []) if name == "random" else (groups, log)


def sampler_of(replay, task, steps, device):
    """Slices of `steps` with every tenth episode held out. SystemExit: episodes shorter than that, or too few."""
    counts, T = replay.counts()[task], replay.facts[task][2]
    if T < steps or counts < 4:
        raise SystemExit(f"replay of {task} has {counts} episodes of {T} steps: expected at least 4 of {steps} "
                         "steps; more --data-steps, or a shorter --length")
    return replay.sampler([task], steps, device, held_out=0.1)


# ---------------------------------------------------------------------------------------------- one training = one cell
VARIANTS = {"single": "one model", "ed2": "ED2, equal parameters", "random": "random groups, equal parameters",
            "nosplit": "k models that see all actions, equal parameters", "ed2_wide": "ED2, full width",
            "single_wide": "one model as large as ED2 of full width"}


def variant(name, groups, width, count, seed):
    """(groups, width) of a control; count(groups, width) -> parameters; `width` is the single model's."""
    everything = [sorted(j for g in groups for j in g)]
    target = count(everything, width)
    if name == "single":
        return everything, width
    if name == "single_wide":
        return everything, match_width(lambda w: count(everything, w), count(groups, width))
    if name == "ed2_wide":
        return groups, width
    groups = {"ed2": groups, "random": random_partition(groups, seed), "nosplit": everything * len(groups)}[name]
    return groups, match_width(lambda w: count(groups, w), target)


def compiler(enabled):
    """f -> f, or its compiled form, made once; shapes are fixed."""
    made = {}
    if enabled:
        torch._dynamo.reset()  # of the cells before, whose shapes differ
    return lambda f: (made.get(f) or made.setdefault(f, torch.compile(f, dynamic=False))) if enabled else f


def run_cell(cell, args, root, data_dir):
    """Train and test one model, cell = {wm, task, regime, variant, groups, seed}: returns its numbers.

    They are also written to root/cells; a cell that is there is not run again, so that a killed run continues.
    """
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    file = Path(root) / "cells" / f"{cell_name(cell)}.json"
    if file.exists():
        return json.loads(file.read_text())
    started, device = time.time(), torch.device(args.device)
    _, replay, _ = make_data(cell["task"], Path(root) / "data" / cell["task"], args.data_steps, 1, data_dir)
    torch.manual_seed(cell["seed"])
    O, A, _, _ = task_facts(cell["task"])
    train = train_rssm_cell if cell["wm"] == "dreamerv3" else train_tdmpc2_cell
    numbers = train(cell, args, root, replay, O, A, device)
    result = {**cell, **numbers, "updates": args.updates, "seconds": round(time.time() - started, 1)}
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(result))
    return result


def train_tdmpc2_cell(cell, args, root, replay, O, A, device):
    latent, hidden = TDMPC2_SIZES[args.size]
    agg = args.agg or "hidden"

    def count(groups, width):
        return dynamics_params(latent, A, width, [len(g) for g in groups], agg)

    groups, width = variant(cell["variant"], cell["groups"], hidden, count, cell["seed"])
    dynamics = Dynamics(latent, A, latent, width, assignment(groups, A), agg)
    sampler = sampler_of(replay, cell["task"], args.length, device)
    shape = {"width": width, "dynamics_params": count(groups, width), "trained_on": groups}
    fixed = Path(root) / "encoders" / f"{cell['task']}-s{cell['seed']}.pt"
    if cell["regime"] == "joint":
        torch.manual_seed(cell["seed"])
        model = TDMPC2(O, A, latent, hidden, dynamics).to(device)
        shape["train_loss"] = train_tdmpc2(model, sampler, args, cell["seed"], compiler(args.compile))
        encoder = model.encoder
        if cell["variant"] == "single":  # the latent space in which all variants of this seed are compared
            fixed.parent.mkdir(exist_ok=True)
            save_atomic(encoder.state_dict(), fixed)
    else:
        dynamics = dynamics.to(device)
        encoder = nn.Sequential(NormedLinear(O, 256), NormedLinear(256, latent, simnorm)).to(device)
        encoder.load_state_dict(torch.load(fixed, device, weights_only=True))
        train_dynamics(dynamics, encoder, sampler, args, cell["seed"], compiler(args.compile))
    return shape | measure_latents(encoder, dynamics, sampler_of(replay, cell["task"], 10, device))


def cell_name(cell):
    return "-".join(str(cell[k]) for k in ("wm", "task", "regime", "variant", "seed"))


def run_cells(cells, args, root, data_dir=None):
    """All cells, on a CPU as --workers processes of one thread each; progress and time left as they finish."""
    done, began = [], time.time()
    waves = [[c for c in cells if (c["regime"], c["variant"]) == ("joint", "single")]]
    waves.append([c for c in cells if c not in waves[0]])  # these need the encoders of the first wave
    spent = 0

    def note(cell, result):
        nonlocal spent
        done.append(result)
        spent += result["seconds"]
        left = (len(cells) - len(done)) * spent / len(done) / (args.workers if args.device == "cpu" else 1)
        print(f"{len(done)}/{len(cells)} {cell_name(cell)}: {result['seconds']:.0f} s, {headline(result)} | "
              f"{left / 60:.0f} min left", flush=True)

    if args.device != "cpu" or args.workers == 1:
        for cell in waves[0] + waves[1]:
            note(cell, run_cell(cell, args, root, data_dir))
        return done
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        for wave in waves:
            jobs = {pool.submit(run_cell, cell, args, root, data_dir): cell for cell in wave}
            try:
                for job in as_completed(jobs):
                    note(jobs[job], job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)  # not after hours of other cells
                raise
    print(f"{len(cells)} trainings in {(time.time() - began) / 60:.1f} min")
    return done


def headline(result):
    if result["wm"] == "dreamerv3":
        return f"NMSE after 15 steps {result['nmse_15']:.3f}, dynamics loss {result['dyn']:.2f}"
    return f"MSE per step {result['per_step_mse']:.2e}, held-out consistency {result['logged']:.2e}"


def strict(x):
    """nan, which JSON lacks, as None (the interval of one seed)."""
    if isinstance(x, dict):
        return {k: strict(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [strict(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def write_text(path, text):
    tmp = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    tmp.write_text(text)
    os.replace(tmp, path)


def save_atomic(state, path):
    tmp = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    torch.save(state, tmp)
    os.replace(tmp, path)


def train_rssm_cell(cell, args, root, replay, O, A, device):
    shape = DREAMER_SIZES[args.size]
    agg, deter = args.agg or "mean", shape["deter"]

    def count(groups, width):
        return core_params(A, groups, agg, width, deter, shape["hidden"], 32 * shape["classes"])

    groups, width = variant(cell["variant"], cell["groups"], deter, count, cell["seed"])
    torch.manual_seed(cell["seed"])
    model = DreamerV3(O, A, **shape, groups=groups, agg=agg, width=width).to(device)
    sampler, longer = (sampler_of(replay, cell["task"], T, device) for T in (args.length, CONTEXT + max(HORIZONS) - 1))
    compiled = compiler(args.compile)
    opt = LaProp(*clip_units(*model.world()), lr=args.lr, warmup=max(1, min(1000, args.updates // 10)))
    generator, tail, lr = torch.Generator(device).manual_seed(cell["seed"]), [], args.lr
    for step in range(args.updates):
        opt.lr = rate(step, args.updates, lr)
        obs, act, rew, *_ = sampler.sequences(args.batch, generator)
        gumbel = draw_gumbel((args.length + 1, args.batch, 32, shape["classes"]), generator)
        loss, metrics, _ = compiled(rssm_loss)(model, obs, act, rew, gumbel, 8)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step >= int(0.9 * args.updates):
            tail.append(metrics["dyn"])
        if (step + 1) % 50 == 0:
            check_finite(step, metrics, loss.detach())
    numbers = {"width": width, "dynamics_params": count(groups, width), "trained_on": groups,
               "train_loss": float(torch.stack(tail).mean())}
    return numbers | measure_rssm(model, sampler, longer)


CONTEXT, HORIZONS = 16, (1, 5, 15, 45)  # observations before an open-loop prediction, and how far it is tested


@torch.no_grad()
def measure_rssm(model, sampler, longer, batch=128, draws=8):
    """Held-out {dyn (clipped), dyn_raw, post_entropy, rec, nmse_h, persistence_nmse_h, linear_nmse_h}.

    sampler: slices as in training; longer: of 60 steps. nmse_h: mean over dimensions of squared error / variance of the
    state decoded h steps after 16 observations; the prediction is the mean of `draws` sampled roll-outs.
    """
    generator = torch.Generator(sampler.device).manual_seed(0)
    latent = model.rssm.stoch, model.rssm.classes
    obs, act, rew, *_ = sampler.sequences(4 * batch, generator, held_out=True)
    _, metrics, _ = rssm_loss(model, obs, act, rew, draw_gumbel((len(obs), 4 * batch, *latent), generator), 8)
    out = {k: float(metrics[k]) for k in ("dyn", "dyn_raw", "post_entropy", "rec")}
    obs, act, *_ = longer.sequences(batch, generator)
    x, change = torch.cat([obs[:-1], act], -1).flatten(0, 1).cpu(), (obs[1:] - obs[:-1]).flatten(0, 1).cpu()
    linear = ridge(x, change)
    obs, act, *_ = longer.sequences(batch, generator, held_out=True)
    pred = torch.stack([open_loop(model, obs, act, draw_gumbel((len(obs), batch, *latent), generator), CONTEXT)
                        for _ in range(draws)]).mean(0).cpu().double().numpy()
    true, act = obs.cpu().double().numpy(), act.cpu().numpy()
    spread, guess = true.reshape(-1, true.shape[-1]).var(0), true[CONTEXT - 1]
    for h in range(1, max(HORIZONS) + 1):
        t = CONTEXT - 1 + h
        guess = guess + np.c_[guess, act[t - 1], np.ones(batch)] @ linear
        if h in HORIZONS:
            out[f"nmse_{h}"] = nmse(pred[h - 1], true[t], spread)
            out[f"persistence_nmse_{h}"] = nmse(true[CONTEXT - 1], true[t], spread)
            out[f"linear_nmse_{h}"] = nmse(guess, true[t], spread)
    return out


# ----------------------------------------------------------------------------------------------------------- comparing
def relative_change(new, old):
    """Paired by seed: mean of (new - old) / old, its 95 % t interval and p value. One seed: an interval of nan."""
    r = (np.asarray(new, float) - old) / np.asarray(old, float)
    if len(r) < 2:
        return float(r.mean()), math.nan, math.nan, math.nan
    from scipy import stats
    if r.std() == 0:
        return float(r.mean()), float(r.mean()), float(r.mean()), float(r.mean() == 0)
    low, high = stats.t.interval(0.95, len(r) - 1, r.mean(), stats.sem(r))
    return float(r.mean()), float(low), float(high), float(stats.ttest_1samp(r, 0).pvalue)


def verdict(mean, low, high, better_than_controls=True):
    """win: the interval is below zero and no control is as good; loss: above zero; tie: across zero or under 5 %."""
    if not (high < 0 or low > 0) or abs(mean) < 0.05:  # also with one seed, whose interval is nan
        return "tie"
    return "loss" if mean > 0 else "win" if better_than_controls else "tie"


def holm(p):
    """Holm's correction for testing several tasks: adjusted p values in the order given."""
    order, out, worst = np.argsort(p), np.zeros(len(p)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out.tolist()


PRIMARY = {"tdmpc2": "per_step_mse", "dreamerv3": "nmse_15"}  # what a verdict is about
SEED_METRIC = {"tdmpc2": "logged", "dreamerv3": "dyn"}  # what the paper's tables show


def compare(args, run):
    """Baseline and ED2 on one task with paired seeds: table, results.json/csv, error against horizon, partition."""
    A = task_facts(args.task)[1]
    folder = run.dir / "data" / args.task
    random, _, notes = make_data(args.task, folder, args.data_steps, args.workers, args.data_dir)
    means = [mean for mean, _ in notes.get("returns", [])]
    print(f"data: random actions return {notes['random_return']:.1f}; " + (
        f"{len(means)} rounds of search, mean return {means[0]:.1f} to {means[-1]:.1f}" if means else
        f"replay from {args.data_dir}"), flush=True)
    groups, log = find_partition(args.partition, args.task, random, eta=args.eta)
    groups = check_partition(groups, A)
    print(f"partition {args.partition}: {groups}")
    for merge in log:
        pair = " + ".join(map(str, merge["merge"]))
        print(f"  {'merge' if merge['done'] else 'leave'} {pair}: {merge['score']:+.4f}")
    known = PUBLISHED.get(args.task.split("-")[0])
    if known and args.partition != "published":
        print(f"  published: {known}, adjusted Rand index {adjusted_rand(groups, known):.2f}")
    regime = {"dreamerv3": "replay"}.get(args.wm, args.encoder)
    names = ["single"] if len(groups) == 1 else ["single", "ed2" if args.match == "params" else "ed2_wide"]
    if len(groups) == 1:
        print(f"{args.task} has {A} action{'s' * (A > 1)} in one group: ED2 is the baseline, which runs alone")
    seeds = range(args.seed, args.seed + args.seeds)
    first = [("joint", "single")] if args.wm == "tdmpc2" else []
    kinds = dict.fromkeys(first + [(regime, v) for v in names])
    cells = [dict(wm=args.wm, task=args.task, regime=r, variant=v, groups=groups, seed=s)
             for s in seeds for r, v in kinds]
    done = sorted(run_cells(cells, args, run.dir, args.data_dir), key=lambda c: c["seed"])
    by = {v: [c for c in done if (c["regime"], c["variant"]) == (regime, v)] for v in names}
    told = {*cells[0], "width", "dynamics_params", "trained_on", "updates", "seconds"}
    metrics = [k for k in by["single"][0] if k not in told and not k.startswith(("persistence", "linear"))]
    print(f"\n{args.task}, {args.wm}, {regime}, {args.seeds} seed{'s' * (args.seeds > 1)}, held-out data"
          f"\n{'':<18}{'single':>12}" + (f"{'ED2':>12}{'change':>9}   95 % interval" if len(names) > 1 else ""))
    rows = []
    for k in ["dynamics_params", *metrics]:
        values = {v: [c[k] for c in by[v]] for v in names}
        row = {"metric": k, **{v: float(np.mean(x)) for v, x in values.items()}}
        text = f"{k:<18}" + "".join(f"{row[v]:>12.4g}" for v in names)
        if len(names) > 1:
            r, low, high, _ = relative_change(values[names[1]], values["single"])
            row |= {"change": r} | ({"low": low, "high": high} if args.seeds > 1 else {})
            text += f"{r:>+9.1%}   [{low:+.1%}, {high:+.1%}]" if args.seeds > 1 else f"{r:>+9.1%}   1 seed"
        rows.append(row)
        print(text)
    result = dict(describe(args), partition=groups, merges=log, data=notes, table=rows, cells=done)
    if len(names) > 1:
        row = next(r for r in rows if r["metric"] == PRIMARY[args.wm])
        says = verdict(row["change"], row["low"], row["high"]) if args.seeds > 1 else "none, 1 seed"
        result["verdict"] = says
        print(f"verdict on {PRIMARY[args.wm]} against the single model: {says} (a win needs the controls of --tables)")
    write_table(rows, run.dir / "results.csv")
    plot_horizons(by, args.wm, run.dir / "horizon.png")
    plot_partition(args.task, random, groups, run.dir / "partition.png")
    return result


TASKS = ("walker-walk", "humanoid-walk", "cheetah-run", "hopper-hop", "walker-run")
# (baseline, + ED2) converged dynamics losses as published; None: blank there
PAPER = {"dreamerv3": {"walker-walk": (3.22, 1.84), "humanoid-walk": (6.01, 1.21)},
         "tdmpc2": {"cheetah-run": (5e-5, 4e-5), "hopper-hop": (1e-3, 1e-3), "walker-run": (5e-5, 3e-5)}}


def tables(args, run, tasks=TASKS):
    """Tables 1 and 2 of the paper without blank cells, with controls, intervals and both verdicts."""
    seeds = range(args.seed, args.seed + args.seeds)
    result = dict(describe(args), cells=[])
    for task in tasks:
        make_data(task, run.dir / "data" / task, args.data_steps, args.workers)
        print(f"{task}: data ready", flush=True)
    for wm in ("tdmpc2", "dreamerv3"):
        part = fill_budget(replace(args, wm=wm), "tables")
        print(f"{wm}: {part.updates} updates of {part.batch} x {part.length} steps, size {part.size}, "
              f"learning rate {part.lr}")
        kinds = [("joint", "single"), ("joint", "ed2_wide")] if wm == "tdmpc2" else []
        kinds += [("frozen" if wm == "tdmpc2" else "replay", v) for v in VARIANTS]
        cells = [dict(wm=wm, task=t, regime=r, variant=v, groups=PUBLISHED[t.split("-")[0]], seed=s)
                 for t in tasks for s in seeds for r, v in kinds]
        result["cells"] += run_cells(cells, part, run.dir)
        result[wm] = summarise(wm, result["cells"], tasks)
        write_table(result[wm]["rows"], run.dir / f"table_{wm}.csv")
    change = {wm: np.array([r["change"] for r in result[wm]["rows"]]) for wm in ("tdmpc2", "dreamerv3")}
    gap, low, high, _ = relative_change(1 + change["dreamerv3"], 1 + change["tdmpc2"])
    result["recurrent_minus_mlp"] = dict(mean=gap, low=low, high=high)
    says = "supported" if high < 0 else "refuted" if low > 0 else "undecided"
    print(f"\nDo recurrent backbones profit more than MLPs? Error ratio of ED2, recurrent over MLP, minus 1: "
          f"{gap:+.1%} [{low:+.1%}, {high:+.1%}] over {len(tasks)} tasks: {says}")
    plot_changes(result, run.dir / "tables.png")
    return result


def summarise(wm, cells, tasks):
    """One table: rows of numbers per task, and the two verdicts."""
    cells = [c for c in cells if c["wm"] == wm]

    def values(task, variant_, metric, regime=None):
        found = [c for c in cells if (c["task"], c["variant"]) == (task, variant_) and regime in (None, c["regime"])]
        return [c[metric] for c in sorted(found, key=lambda c: c["seed"])]

    regime, metric, old = "frozen" if wm == "tdmpc2" else "replay", PRIMARY[wm], SEED_METRIC[wm]
    rows = []
    for task in tasks:
        row = {"task": task, **dict(zip(("paper", "paper ED2"), PAPER[wm].get(task, ("", ""))))}
        seen = "joint" if wm == "tdmpc2" else "replay"
        row |= {f"{old} single": np.mean(values(task, "single", old, seen)),
                f"{old} ED2": np.mean(values(task, "ed2_wide", old, seen))}
        row |= {f"{metric} {v}": np.mean(values(task, v, metric, regime)) for v in VARIANTS}
        base = values(task, "single", metric, regime)
        ed2 = values(task, "ed2", metric, regime)
        r, low, high, p = relative_change(ed2, base)
        wide = relative_change(values(task, "ed2_wide", metric, regime), values(task, "single_wide", metric, regime))
        controls = all(np.mean(ed2) < row[f"{metric} {v}"] for v in ("random", "nosplit"))
        row |= {"change": r, "low": low, "high": high, "p": p, "beats controls": controls,
                "verdict": verdict(r, low, high, controls)}
        row |= dict(zip(("wide change", "wide low", "wide high"), wide))
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    for row, p in zip(rows, holm([r["p"] for r in rows])):
        row["p Holm"] = p
    lower = sum(r[f"{old} ED2"] < r[f"{old} single"] for r in rows)
    wins = sum(r["verdict"] == "win" for r in rows)
    print(f"\n{wm}: {metric} on held-out data, mean over seeds; change of ED2 at equal parameters against one model")
    print(f"{'task':<15}{'paper':>8}{'+ ED2':>8} |{old + ':':>8}{'single':>10}{'ED2 wide':>10} |" + "".join(
        f"{v:>12}" for v in VARIANTS) + f"{'change':>9}   95 % interval     verdict   wide: ED2 / single")
    for r in rows:
        print(f"{r['task']:<15}{r['paper'] or '-':>8}{r['paper ED2'] or '-':>8} |{r[f'{old} single']:>18.3g}"
              f"{r[f'{old} ED2']:>10.3g} |" + "".join(f"{r[f'{metric} {v}']:>12.3g}" for v in VARIANTS)
              + f"{r['change']:>+9.1%}   [{r['low']:+.1%}, {r['high']:+.1%}]   {r['verdict']:<7}   "
              f"{r['wide change']:+.1%} [{r['wide low']:+.1%}, {r['wide high']:+.1%}]")
    reproduced = lower > len(rows) / 2
    print(f"beats the matched baseline: {wins} of {len(rows)} tasks; reproduces the paper (its metric, unmatched ED2 "
          f"lower in most rows): {'yes' if reproduced else 'no'}, {lower} of {len(rows)}")
    return dict(rows=rows, wins=wins, reproduces=bool(reproduced), lower=lower)


# ------------------------------------------------------------------------------------------------------ smaller studies
def discovery(args, run, tasks=("walker-walk", "cheetah-run", "hopper-hop")):
    """SD2, sd2j and learned on random and on replay data, in states and in latents.

    Adjusted Rand index with the published groups and between seeds; a seed draws its own 10,000 rows and networks. The
    latents are those of one TD-MPC2 encoder per task, trained on the replay.
    """
    rows = []
    for task in tasks:
        O, A, _, _ = task_facts(task)
        random, replay, _ = make_data(task, run.dir / "data" / task, args.data_steps, args.workers)
        known = PUBLISHED[task.split("-")[0]]
        torch.manual_seed(args.seed)
        latent, hidden = TDMPC2_SIZES[args.size]
        model = TDMPC2(O, A, latent, hidden, Dynamics(latent, A, latent, hidden, torch.ones(A, 1)))
        train_tdmpc2(model, sampler_of(replay, task, args.length, "cpu"), args, args.seed, compiler(False))
        for source, episodes in (("random", random), ("replay", replay)):
            for space in ("state", "latent"):
                found = {"sd2": [], "sd2j": [], "learned": []}
                for seed in range(args.seed, args.seed + args.seeds):
                    s, act, delta = (torch.from_numpy(np.ascontiguousarray(x))
                                     for x in transitions(episodes, task, 10_000, seed))
                    if space == "latent":
                        with torch.no_grad():
                            s, delta = (z := model.encoder(s)), model.encoder(s + delta) - z
                    found["sd2"].append(discover(act, delta, args.eta))
                    for name in ("sd2j", "learned"):
                        found[name].append(fit_influence(s, act, delta, seed, space == "latent", eta=args.eta,
                                                         learned=name == "learned")[0])
                for name, groups in found.items():
                    pairs = [adjusted_rand(p, q) for i, p in enumerate(groups) for q in groups[:i]]
                    rows.append({"task": task, "data": source, "space": space, "method": name,
                                 "ari_published": float(np.mean([adjusted_rand(g, known) for g in groups])),
                                 "ari_between_seeds": float(np.mean(pairs)) if pairs else math.nan,
                                 "groups": groups})
                    r = rows[-1]
                    print(f"{task:<13}{source:<8}{space:<8}{name:<9} published {r['ari_published']:+.2f}, between "
                          f"seeds {r['ari_between_seeds']:+.2f}: {groups[0]}", flush=True)
    write_table(rows, run.dir / "discovery.csv")
    return dict(describe(args), rows=rows)


class Bank(nn.Module):
    """K trunks that know no robot: latent z (B, D), act (B, A), keys (A, 16) -> mean of the K last layers (B, w).

    Action j enters trunk i with the weights p_ji (key_j V_i), V_i (16, w), p = softmax(key . codes / 4) (A, K). A key
    is all that the bank knows of an action, so robots with any number of actions share all weights. As in Dynamics
    no loop runs over trunks: the keys make its W_a (A, K w), masked by p instead of a partition.
    """

    def __init__(self, K=8, latent=64, width=64, key=16):
        super().__init__()
        self.K, self.width = K, width
        self.codes = nn.Parameter(torch.randn(K, key))
        self.w_z = nn.Parameter(nn.init.trunc_normal_(torch.empty(latent, K * width), std=latent**-0.5))
        self.w_a = nn.Parameter(nn.init.trunc_normal_(torch.empty(key, K * width), std=key**-0.5))
        self.bias = nn.Parameter(torch.zeros(K * width))
        self.gain, self.shift = nn.Parameter(torch.ones(K, width)), nn.Parameter(torch.zeros(K, width))
        self.second = Stack(K, width, width)

    def assign(self, keys):
        """(A, 16) -> (A, K), rows sum to 1"""
        return (keys @ self.codes.T / keys.shape[1] ** 0.5).softmax(1)

    def forward(self, z, act, keys):
        w_a = (keys @ self.w_a) * self.assign(keys).repeat_interleave(self.width, 1)
        x = (torch.addmm(self.bias, z, self.w_z) + act @ w_a).unflatten(-1, (self.K, self.width))
        x = F.mish(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift)
        return self.second(x.transpose(0, 1)).mean(0)


class Body(nn.Module):
    """What a robot has of its own: encoder, head, a key per action, and the scales of its rows s, delta (N, O)."""

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
        return nmse(self(bank, s, act) * self.d_std + self.d_mean, delta, delta.var(0))


def fit_bank(bank, data, updates, batch, seed, lr=3e-3, watch=None):
    """Train what requires a gradient on data [(body, rows (s, act, delta))]. `watch`, other rows of the only body,
    is looked at 20 times: keep the weights of the best look. Returns its updates."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for m in (bank, *(body for body, _ in data)) for p in m.parameters() if p.requires_grad]
    opt, best = torch.optim.Adam(params, lr, foreach=True), (math.inf, updates, None)
    for step in range(updates):
        opt.param_groups[0]["lr"] = rate(step, updates, lr)
        loss = 0.0
        for body, rows in data:
            i = torch.randint(len(rows[0]), (batch,), generator=generator)
            loss = loss + body.loss(bank, *(x[i] for x in rows))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, 20.0)
        opt.step()
        if (step + 1) % max(1, updates // 20) == 0:
            check_finite(step, {"loss": loss.detach()}, norm)
            if watch:
                with torch.no_grad():
                    now = float(data[0][0].loss(bank, *watch))
                if now < best[0]:
                    best = now, step + 1, [p.detach().clone() for p in params]
    for p, kept in zip(params, best[2] or []):
        p.data.copy_(kept)
    return best[1]


def changes_of(replay, task):
    """All steps by episode: s (N, T, O), act (N, T, A), next s - s (N, T, O)."""
    maps = replay.arrays(task)
    obs, act = torch.from_numpy(np.array(maps["obs"])), torch.from_numpy(np.array(maps["act"]))
    return obs[:, :-1], act, obs[:, 1:] - obs[:, :-1]


ARMS = {"frozen": "pre-trained bank, frozen", "tuned": "pre-trained bank, trained on", "scratch": "all from scratch",
        "random": "random bank, frozen", "zero_shot": "pre-trained bank and body as they are",
        "linear": "ridge regression", "persistence": "no change"}
HELD_OUT = {"cheetah-run-backwards": ("walker-walk", "cheetah-run", "hopper-hop"),  # a new task of a known body
            "walker-walk": ("cheetah-run", "hopper-hop")}  # a new body


def few_shot(data, bank, zero_shot, episodes, seed, updates, batch, size):
    """Held-out NMSE of one-step state changes by arm: {arm: .., arm_updates: ..}.

    data: s (N, T, O), act (N, T, A), delta (N, T, O). A sixth of the episodes is for testing, always the same; of the
    rest `episodes` train, chosen by seed, and their middle fifth says when to stop.
    """
    order = np.random.default_rng(0).permutation(len(data[0]))
    cut = max(1, len(order) // 6)
    test = [x[order[:cut]].flatten(0, 1) for x in data]
    few = [x[np.random.default_rng(seed).permutation(order[cut:])[:episodes]] for x in data]
    middle = torch.arange(few[0].shape[1]) * 5 // few[0].shape[1] == 2
    rows, watch = ([x[:, keep].flatten(0, 1) for x in few] for keep in (~middle, middle))
    out = {}
    for arm in ("frozen", "tuned", "scratch", "random"):
        torch.manual_seed(seed)  # the same new body in all arms, the same new bank in two
        own = Bank(**size)
        body = Body(own, *rows)
        if arm in ("frozen", "tuned"):
            own.load_state_dict(bank.state_dict())
        own.requires_grad_(arm in ("tuned", "scratch"))
        lr = 1e-3 if arm in ("tuned", "scratch") else 3e-3  # the better ones on another case: hopper, held out
        out[arm + "_updates"] = fit_bank(own, [(body, rows)], updates, batch, seed, lr, watch)
        out[arm] = body.error(own, *test)
    s, act, delta = (torch.cat([a, b]) for a, b in zip(rows, watch))
    guess = np.c_[test[0], test[1], np.ones(len(test[0]))] @ ridge(torch.cat([s, act], 1), delta)
    spread = test[2].var(0)
    out |= {"zero_shot": zero_shot.error(bank, *test)} if zero_shot else {}
    return out | {"linear": nmse(torch.from_numpy(guess), test[2], spread), "persistence": nmse(0.0, test[2], spread)}


def bodies(args, run, cases=HELD_OUT, shots=(2, 8, 32), steps=48_000, pretrain=2000, updates=1000, batch=128, **size):
    """Can a bank of sub-models learned on some robots be used for something new? The paper asks; the study is ours.

    A bank is trained with several bodies at once. A task that it has not seen then gets a new body (encoder, head,
    keys), trained on few episodes while the bank stays as it is; while it trains on; with a new bank; and with a
    frozen random bank, which shows what a bank does that has learned nothing. The same updates and batches for all.
    """
    torch.set_num_threads(1)
    (run.dir / "cells").mkdir(exist_ok=True)
    seeds, cells, rows = range(args.seed, args.seed + args.seeds), [], []
    data = {t: changes_of(make_data(t, run.dir / "data" / t, steps, args.workers)[1], t)
            for t in dict.fromkeys(t for case, known in cases.items() for t in (*known, case))}
    print(f"held-out error of state changes (1 = as good as their mean), {args.seeds} paired seeds", flush=True)
    for case, known in cases.items():
        trained = {}  # by seed, when a cell needs it
        for n in shots:
            for seed in seeds:
                file = run.dir / "cells" / f"{case}_{n}_{seed}.json"
                if not file.exists():
                    if seed not in trained:
                        torch.manual_seed(1000 + seed)
                        bank, rest = Bank(**size), {t: [x.flatten(0, 1) for x in data[t]] for t in known}
                        robots = {t: Body(bank, *x) for t, x in rest.items()}
                        fit_bank(bank, [(robots[t], rest[t]) for t in known], pretrain, batch, seed)
                        same = [t for t in known if t.split("-")[0] == case.split("-")[0]]
                        trained[seed] = bank, robots[same[0]] if same else None
                    errors = few_shot(data[case], *trained[seed], n, seed, updates, batch, size)
                    write_text(file, json.dumps({"case": case, "episodes": n, "seed": seed} | errors))
                cells.append(json.loads(file.read_text()))
            own = cells[-len(seeds):]
            rows.append({"case": case, "episodes": n} | {
                arm: float(np.mean([c[arm] for c in own])) for arm in ARMS if arm in own[0]})
            print(f"{case}, {n} episodes: " + ", ".join(f"{a} {rows[-1][a]:.3f}" for a in ARMS if a in own[0]))
            for new, old in (("frozen", "scratch"), ("frozen", "random"), ("tuned", "scratch")):
                r, low, high, p = relative_change([c[new] for c in own], [c[old] for c in own])
                rows[-1] |= {f"{new}_vs_{old}": r, f"{new}_vs_{old}_low": low, f"{new}_vs_{old}_high": high}
                print(f"    {new} against {old}: {r:+.1%} [{low:+.1%}, {high:+.1%}]", flush=True)
    words = {"win": "better", "loss": "worse", "tie": "undecided"}
    said = [words[verdict(*(r["frozen_vs_scratch" + x] for x in ("", "_low", "_high")))] for r in rows]
    print("Against training from scratch, the frozen bank is " + ", ".join(
        f"{word} on {r['case']} with {r['episodes']} episodes" for word, r in zip(said, rows)) + ".")
    write_table(rows, run.dir / "bodies.csv")
    plot_bodies(cells, run.dir / "bodies.png")
    return dict(describe(args), rows=rows, cells=cells)


def cost(args, run, repeats=15):
    """Milliseconds of one update, in turn: single model, ED2 batched, ED2 as a loop over k separate models."""
    device, rows = torch.device(args.device), []
    for task in ("walker-walk", "humanoid-walk"):
        O, A, _, _ = task_facts(task)
        groups = PUBLISHED[task.split("-")[0]]
        masks = assignment(groups, A).T.to(device)  # (k, A)
        for wm in ("tdmpc2", "dreamerv3"):
            part = fill_budget(replace(args, wm=wm), "full")
            fns = (tdmpc2_costs if wm == "tdmpc2" else rssm_costs)(part, O, A, groups, masks, device)
            times = {name: [] for name in fns}
            for n in range(repeats + 2):
                for name, fn in fns.items():  # in turn: the load of a shared machine hits all alike
                    start = time.perf_counter()
                    fn()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    times[name] += [1e3 * (time.perf_counter() - start)] * (n >= 2)
            ms = {name: float(np.median(t)) for name, t in times.items()}
            rows.append({"task": task, "wm": wm, "k": len(groups), "batch": part.batch, "length": part.length,
                         **{f"{name}_ms": v for name, v in ms.items()},
                         **{f"{name}_ratio": ms[name] / ms["single"] for name in ms if name != "single"}})
            print(f"{task:<14}{wm:<10} k = {len(groups)}: " + ", ".join(
                f"{name} {v:.1f} ms ({v / ms['single']:.2f} x)" for name, v in ms.items()), flush=True)
    write_table(rows, run.dir / "cost.csv")
    return dict(describe(args), rows=rows)


def tdmpc2_costs(args, O, A, groups, masks, device):
    latent, hidden = TDMPC2_SIZES[args.size]

    def count(g, w):
        return dynamics_params(latent, A, w, [len(x) for x in g], "hidden")

    width = variant("ed2", groups, hidden, count, 0)[1]
    single = Dynamics(latent, A, latent, hidden, torch.ones(A, 1)).to(device)
    ed2 = Dynamics(latent, A, latent, width, assignment(groups, A)).to(device)
    loop = nn.ModuleList(Dynamics(latent, A, latent, width, torch.ones(A, 1), "post") for _ in groups).to(device)
    z = simnorm(torch.randn(args.length + 1, args.batch, latent, device=device))
    act = torch.rand(args.length, args.batch, A, device=device) * 2 - 1

    def looped(s, a):
        return torch.stack([f(s, a * m) for f, m in zip(loop, masks)]).mean(0)

    def update(step, params):
        opt = torch.optim.Adam(params, foreach=True)

        def run():
            opt.zero_grad()
            consistency_loss(step, z[0], act, z[1:]).backward()
            opt.step()
        return run

    return {"single": update(single, single.parameters()), "batched": update(ed2, ed2.parameters()),
            "looped": update(looped, loop.parameters())}


def rssm_costs(args, O, A, groups, masks, device):
    shape = DREAMER_SIZES[args.size]

    def count(g, w):
        return core_params(A, g, "mean", w, shape["deter"], shape["hidden"], 32 * shape["classes"])

    width = variant("ed2", groups, shape["deter"], count, 0)[1]
    T, B, latent = args.length, args.batch, (32, shape["classes"])
    obs, act = torch.randn(T + 1, B, O, device=device), torch.rand(T, B, A, device=device) * 2 - 1
    rew, gumbel = torch.rand(T, B, device=device), draw_gumbel((T + 1, B, *latent), torch.Generator(device))

    def update(model):
        model = model.to(device)
        opt = LaProp(*clip_units(*model.world()))

        def run():
            opt.zero_grad()
            rssm_loss(model, obs, act, rew, gumbel)[0].backward()
            opt.step()
        return run

    kinds = {"single": {}, "batched": dict(groups=groups, width=width), "blocks": dict(groups=groups, agg="blocks")}
    models = {name: DreamerV3(O, A, **shape, **kw) for name, kw in kinds.items()}
    models["looped"] = DreamerV3(O, A, **shape)
    models["looped"].rssm = LoopedRSSM(masks, width, shape)
    return {name: update(model) for name, model in models.items()}


class LoopedRSSM(RSSM):
    """`mean` as one would write it first, k cores in a Python loop: what `--cost` times the batched form against."""

    def __init__(self, masks, width, shape):
        k, A = masks.shape
        sizes = A, shape["units"], shape["deter"], shape["hidden"], shape["classes"]
        super().__init__(*sizes)
        self.loop = nn.ModuleList(RSSM(*sizes, width=width) for _ in range(k))
        for name in ("h_in", "z_in", "hid", "gru", "act_weight", "act_bias", "act_gain", "hid_gain"):
            delattr(self, name)  # LaProp wants a gradient of every parameter
        for core in self.loop:
            del core.prior_net, core.post_net
        self.register_buffer("masks", masks)

    def core_weights(self):
        return [core.core_weights() for core in self.loop]

    def act_input(self, weights, act):
        return torch.cat([core.act_input(w, act * m) for core, w, m in zip(self.loop, weights, self.masks)], -3)

    def step(self, weights, h, z, act_in):
        parts = [core.step(w, h, z, act_in[:, i:i + 1]) for i, (core, w) in enumerate(zip(self.loop, weights))]
        return torch.stack(parts).mean(0)


# ------------------------------------------------------------------------------------------------- reports and figures
def describe(args):
    """What every results.json starts with."""
    git = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True)  # maybe no git here
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.workers} CPU threads"
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return dict(command=command, commit=git.stdout.strip() or None, hardware=chip, args=asdict(args))


def write_table(rows, path):
    with open(path, "w", newline="") as f:
        names = list(dict.fromkeys(k for r in rows for k in r))
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)


def figure(width, height):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.close("all")  # of the studies before
    return plt.subplots(figsize=(width, height), layout="constrained")


def plot_horizons(by, wm, path):
    """Error against open-loop horizon: mean of the seeds as a line, each seed as a dot; naive predictions dashed."""
    from matplotlib.ticker import LogLocator
    stem = "nmse" if wm == "dreamerv3" else "mse"
    fig, ax = figure(5, 3.6)
    first = by["single"][0]
    steps = sorted(int(k.split("_")[1]) for k in first if k.startswith(stem + "_"))
    for name, cells in by.items():
        y = np.array([[c[f"{stem}_{h}"] for h in steps] for c in cells])
        (line,) = ax.plot(steps, y.mean(0), "-", label=VARIANTS[name])
        ax.plot(np.tile(steps, len(y)), y.ravel(), "o", ms=3, alpha=0.5, color=line.get_color())
    for naive in ("persistence", "linear"):
        y = [first[f"{naive}_{stem}_{h}"] for h in steps]
        if max(y) < 30 * max(first[f"persistence_{stem}_{h}"] for h in steps):  # a diverged linear model hides the rest
            ax.plot(steps, y, "--", lw=1, color="gray" if naive == "linear" else "silver", label=naive)
    ax.set(xlabel="open-loop steps", ylabel="state error / variance" if stem == "nmse" else "latent mean squared error",
           xscale="log", yscale="log", xticks=steps, xticklabels=steps)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)


def actuator_names(task):
    env = make_env(task)
    model = getattr(getattr(env, "_physics", None), "model", None)
    names = [model.id2name(i, "actuator") or str(i) for i in range(model.nu)] if model is not None else None
    env.close()
    return names or [str(i) for i in range(task_facts(task)[1])]


def plot_partition(task, random, groups, path):
    """Similarity of the actuators, in the order of the groups, each group framed and labelled in its colour."""
    import matplotlib.pyplot as plt
    names, order = actuator_names(task), [j for g in groups for j in g]
    _, act, delta = transitions(random, task)
    sim = cosine(pearson_features(act, delta))[np.ix_(order, order)]
    fig, ax = figure(2.4 + 0.32 * len(order), 1.6 + 0.32 * len(order))
    image = ax.imshow(sim, vmin=0, vmax=1, cmap="Greys")
    ax.set_xticks(range(len(order)), [names[j] for j in order], rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(len(order)), [f"{names[j]} ({j})" for j in order], fontsize=8)
    at = 0
    for i, g in enumerate(groups):
        color = plt.get_cmap("tab10")(i % 10)
        ax.add_patch(plt.Rectangle((at - 0.5, at - 0.5), len(g), len(g), fill=False, ec=color, lw=2.5))
        for t in range(at, at + len(g)):
            ax.get_xticklabels()[t].set_color(color)
            ax.get_yticklabels()[t].set_color(color)
        at += len(g)
    fig.colorbar(image, label="similarity of effects", shrink=0.8)
    ax.set_title(f"{task}: {len(groups)} groups", fontsize=10)
    fig.savefig(path, dpi=120)


def plot_changes(result, path):
    """Change of the error by ED2 per task with its interval, both backbones, at equal parameters and at full width."""
    fig, ax = figure(6.5, 3.6)
    for n, wm in enumerate(("tdmpc2", "dreamerv3")):
        rows = result[wm]["rows"]
        for m, (kind, label) in enumerate((("", "equal parameters"), ("wide ", "full width, one model as large"))):
            x = np.arange(len(rows)) + 0.18 * (2 * n + m - 1.5)
            y, low, high = (100 * np.array([r[kind + k] for r in rows]) for k in ("change", "low", "high"))
            ax.errorbar(x, y, (y - low, high - y), fmt="os"[m], ms=4, capsize=2, color=f"C{n}",
                        mfc="w" if m else f"C{n}", label=f"{wm}: {label}")
    ax.axhline(0, color="k", lw=0.8)
    ax.set_xticks(range(len(rows)), [r["task"] for r in rows], fontsize=8)
    ax.set_ylabel("change of error by ED2, %")
    ax.legend(fontsize=7)
    fig.savefig(path, dpi=120)


def plot_bodies(cells, path):
    """Error against the number of episodes: one panel per case, one line per arm, one dot per seed."""
    cases = list(dict.fromkeys(c["case"] for c in cells))
    fig, ax = figure(4 * len(cases), 4.2)
    ax.remove()
    for ax, case in zip(fig.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases):
        shots = sorted({c["episodes"] for c in cells if c["case"] == case})
        for arm, label in ARMS.items():
            y = np.array([[c.get(arm, math.nan) for c in cells if (c["case"], c["episodes"]) == (case, n)]
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
    fig.axes[0].set_ylabel("error of state changes / variance")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    fig.savefig(path, dpi=120)


def plot_curve(curve, random, task, path):
    fig, ax = figure(5, 3.4)
    ax.plot([row[0] for row in curve], [row[3] for row in curve], "o-", ms=3, lw=1)
    ax.axhline(random, ls="--", color="gray", lw=1, label="random policy")
    ax.set(xlabel="agent steps (2 environment steps each)", ylabel="return of the stochastic policy", title=task)
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------------------------------- online
def online(args, run):
    """A DreamerV3 agent, decomposed unless --partition none, that learns to act; returns what results.json holds."""
    O, A, T, _ = task_facts(args.task)
    device = torch.device(args.device)
    random, _, notes = make_data(args.task, run.dir / "data", 0, args.workers)  # SD2 reads it, and it is the baseline
    groups = check_partition(find_partition(args.partition, args.task, random, eta=args.eta)[0], A)
    shape, agg, width = DREAMER_SIZES[args.size], args.agg or "mean", None
    if agg == "mean" and args.match == "params":
        def count(g, w):
            return core_params(A, g, agg, w, shape["deter"], shape["hidden"], 32 * shape["classes"])
        groups, width = variant("ed2", groups, shape["deter"], count, args.seed)
    torch.manual_seed(args.seed)
    model = DreamerV3(O, A, **shape, groups=groups, agg=agg, width=width).to(device)
    agent = Agent(model, args.seed, args.lr, warmup=max(1, min(1000, args.updates // 10)),
                  loss=compiler(args.compile)(dreamer_loss))
    if args.checkpoint:
        agent.load_state(torch.load(args.checkpoint, device, weights_only=True))
    if args.resume and (run.dir / "checkpoint.pt").exists():
        agent.load_state(run.load(device=device))
    print(f"groups {groups}, {count_parameters(model):,} parameters, random policy {notes['random_return']:.1f}",
          flush=True)
    began, start = time.time(), agent.steps
    total = round(args.updates * args.batch * args.length / args.train_ratio)

    def log(row, metrics):
        run.log(row[0], {f"losses/{k}": v for k, v in metrics.items()} | {"charts/episodic_return": row[3]})
        if metrics and not np.isfinite(list(metrics.values())).all():
            raise SystemExit(f"update {agent.updates} is not finite: {metrics}; the last checkpoint is in {run.dir}: "
                             "try a smaller --lr")
        left = (time.time() - began) / max(row[0] - start, 1) * (total - row[0]) / 60
        print(f"{row[0]:,} agent steps, {agent.updates:,} updates: return {row[3]:.1f}"
              + (f", reconstruction {metrics['rec']:.3g}, dynamics {metrics['dyn_raw']:.2f}, imagined return "
                 f"{metrics['imag_return']:.1f}" if metrics else "") + f" | {left:.0f} min left", flush=True)

    with Workers(args.workers) as workers:
        if not args.eval_only:
            episodes = Episodes.create(run.dir / "episodes", {args.task: (O, A, T)})
            learn_online(agent, episodes, workers, args.task, total, 2, args.batch, args.length, args.train_ratio, log,
                         lambda state: run.save(state))
        played = workers.rollout([(args.task, 10**9 + i) for i in range(10)], agent.policy(10, mean=True))
    returns = [float(e["ret"]) for e in played]
    print(f"\n{args.task}: mean action {np.mean(returns):.1f} (10 episodes), random {notes['random_return']:.1f}")
    if agent.curve:
        plot_curve(agent.curve, notes["random_return"], args.task, run.dir / "curve.png")
    if args.capture_video:
        record(run, args.task, agent)
    return dict(describe(args), groups=groups, random_return=notes["random_return"], returns=returns, curve=agent.curve)


def record(run, task, agent):
    """One deterministic episode as video.mp4."""
    import imageio
    env, policy, t = make_env(task, 0), agent.policy(1, mean=True), 0
    obs, _ = env.reset(seed=10**9)
    frames, done = [env.render()], False
    while not done:
        obs, _, terminated, truncated, _ = env.step(policy(obs[None], np.array([0]), np.array([t]))[0])
        frames.append(env.render())
        done, t = terminated or truncated, t + 1
    env.close()
    imageio.mimwrite(run.dir / "video.mp4", frames, fps=40, macro_block_size=1)
    print(f"video: {run.dir / 'video.mp4'}")


# ---------------------------------------------------------------------------------------------------------------- main
# kind of run, backbone -> what flags that were left out become: on a CPU, and on a GPU
BUDGETS = {
    ("compare", "tdmpc2"): (dict(updates=2000, batch=64, length=3, lr=1e-3, size="1M"),
                            dict(updates=20_000, batch=256, length=3, lr=3e-4, size="5M")),
    ("compare", "dreamerv3"): (dict(updates=600, batch=16, length=32, lr=2e-3, size="1m"),
                               dict(updates=20_000, batch=16, length=64, lr=3e-4, size="12m")),
    ("tables", "tdmpc2"): (dict(updates=700, batch=64, length=3, lr=1e-3, size="1M"),
                           dict(updates=20_000, batch=256, length=3, lr=3e-4, size="5M")),
    ("tables", "dreamerv3"): (dict(updates=500, batch=16, length=32, lr=2e-3, size="1m"),
                              dict(updates=20_000, batch=16, length=64, lr=3e-4, size="12m")),
    ("full", "tdmpc2"): (dict(updates=1, batch=256, length=3, lr=3e-4, size="1M"),
                         dict(updates=1, batch=256, length=3, lr=3e-4, size="5M")),
    ("full", "dreamerv3"): (dict(updates=1, batch=16, length=64, lr=4e-5, size="1m"),
                            dict(updates=1, batch=16, length=64, lr=4e-5, size="12m")),
    ("online", "dreamerv3"): (dict(updates=6250, batch=16, length=32, lr=5e-4, size="1m"),
                              dict(updates=250_000, batch=16, length=64, lr=4e-5, size="12m"))}


DATA_STEPS = 96_000, 400_000  # agent steps of own replay on a CPU and on a GPU
STUDIES = {"tables": tables, "discovery": discovery, "bodies": bodies, "cost": cost}


def fill_budget(args, kind):
    """The flags that were left out, for one backbone."""
    budget = BUDGETS[kind, args.wm][args.device == "cuda"]
    return replace(args, **{k: v for k, v in budget.items() if getattr(args, k) is None})


def check_args(args):
    """(args with their budget, kind of run). SystemExit: flags that do not fit together, in one sentence."""
    kinds = [name for name in STUDIES if getattr(args, name)] + ["online"] * (args.mode == "online")
    if len(kinds) > 1:
        raise SystemExit(f"asked for {' and '.join(kinds)}: choose one")
    kind = kinds[0] if kinds else "compare"
    both = kind in ("tables", "cost")  # backbones
    if both and (args.size or args.agg or args.data_dir):
        given = [f"--{x.replace('_', '-')} {getattr(args, x)}" for x in ("size", "agg", "data_dir") if getattr(args, x)]
        raise SystemExit(f"--{kind} runs both backbones on its own data: leave {' and '.join(given)} out")
    if kind in ("discovery", "bodies", "online"):
        args = replace(args, wm="dreamerv3" if kind == "online" else "tdmpc2")
    if kind == "online" and args.eval_only and not args.checkpoint:
        raise SystemExit("--eval-only plays an agent that has learned: type its --checkpoint runs/NAME/checkpoint.pt")
    if args.checkpoint and not (kind == "online" and Path(args.checkpoint).is_file()):
        raise SystemExit(f"--checkpoint {args.checkpoint}: expected --mode online and the checkpoint.pt of such a run")
    if args.agg and (args.agg in ("mean", "blocks")) != (args.wm == "dreamerv3"):
        raise SystemExit(f"--agg {args.agg} with --wm {args.wm}: expected hidden, pre or post for tdmpc2, mean or "
                         "blocks for dreamerv3")
    if args.agg == "blocks" and args.match == "none":
        raise SystemExit("--agg blocks has the size of the single model already: leave --match none out")
    task_facts(args.task)  # an unknown task ends here
    if not both:
        args = fill_budget(args, kind if kind == "online" else "compare")
        sizes, least = (TDMPC2_SIZES, 1) if args.wm == "tdmpc2" else (DREAMER_SIZES, 8)
        if args.size not in sizes:
            raise SystemExit(f"--size {args.size} with --wm {args.wm}: expected one of {', '.join(sizes)}")
        if args.length < least:
            raise SystemExit(f"--length {args.length}: expected at least {least} for {args.wm}, whose first 8 steps of "
                             "a recording are not measured")
    for name in ("workers", "seeds", "updates", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SystemExit(f"--{name} {getattr(args, name)}: expected a whole number, at least 1")
    return args, kind


def main(args: Args):
    """Run one study and return what results.json holds."""
    if args.resume:
        file = Path(args.resume) / "args.json"
        if not file.exists():
            raise SystemExit(f"--resume {args.resume} has no args.json: expected a folder that ed2.py made, e.g. "
                             "runs/walker-walk__ed2__1__1700000000")
        args = Args(**json.loads(file.read_text())["args"] | {"resume": args.resume})
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU: install its CUDA build or type --device cpu")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    args = replace(args, device=device, data_steps=args.data_steps or DATA_STEPS[device == "cuda"])
    args, kind = check_args(args)
    given = asdict(args)
    run = Run(args.task if kind in ("compare", "online") else kind, "ed2", args.seed, given, args.resume)
    print(f"ED2: {kind}, {args.wm}, seed {args.seed}, {device}, {args.workers} workers, "
          f"{'compiled' if args.compile else 'eager'}, run folder {run.dir}")
    if kind in ("compare", "online"):
        trained = args.updates * args.batch * args.length
        steps = args.data_steps if kind == "compare" else round(trained / args.train_ratio)
        print(f"budget: size {args.size}, {args.updates} updates of {args.batch} x {args.length} steps, learning rate "
              f"{args.lr}, {steps:,} agent steps of own replay", flush=True)
    if args.track:
        import wandb
        wandb.init(project="ed2", name=run.dir.name, config=given, sync_tensorboard=True)
    began = time.time()
    try:
        result = {"compare": compare, "online": online, **STUDIES}[kind](args, run)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; go on with: python {Path(sys.argv[0]).name} --resume {run.dir}") from None
    result["seconds"] = round(time.time() - began, 1)
    write_text(run.dir / "results.json", json.dumps(strict(result), indent=1))
    names = sorted(p.name for p in run.dir.iterdir() if p.suffix in (".json", ".csv", ".png", ".mp4", ".pt"))
    print(f"files: {run.dir}/", *names)
    run.close()
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
