"""MoW: one agent for many pixel tasks, a mixture of world models in one file.  STORM is its single-task case.

The idea ("Mixture-of-World Models: Scaling Multi-Task Reinforcement Learning with Modular Latent Dynamics", arXiv
2602.01270): one agent learns many games at once in the imagination of one world model. Images differ most, so tasks are
clustered by their gradients after a warm-up, and every cluster gets its own VAE, predictors and critic. Dynamics share
more: a router picks a few expert Transformers per task (never per token, so that an expert sees whole sequences), and a
shared Transformer reads what they say. One actor serves all tasks. With one task, one cluster and one expert this is
STORM (arXiv 2310.09615), `--storm`.

    python mow.py                                        # Boxing, Krull, RoadRunner: 18 minutes on a busy core,
                                                         # reconstruction loss from 3,000 to 25
    python mow.py --task Boxing --storm                  # the single-task baseline
    python mow.py --task atari26 --cluster-only          # only: which of the 26 games are alike?
    torchrun --nproc-per-node 4 mow.py --task atari26    # four GPUs: each takes a quarter of every batch

Copy me together with envs.py and data.py. Shapes: K tasks, B sequences, L steps, C context, H horizon, I imagined
roll-outs, R environments or rows, Z = groups x classes of the latent z, D width of h, A actions, E embedding, n experts
per task (topk); stacked layers take G rows of input with layer which[g] each. Tasks come first, time after sequences.
h_t reads z_1..t and a_1..t; it predicts the reward and the end that a_t brings, and z_t+1. The agent sees [z_t, h_t-1].

The body of the MoW paper is not public at the time of writing: what is known is the architecture, the losses and 12
clusters and 12 experts for 26 games. All that is listed here is our choice, never the paper's.
Deviations and choices:
 1. What the paper leaves open follows STORM's paper and released code: networks, losses, learning rates, imagination.
 2. The task embedding (64 numbers of norm 1) is appended to the input of every module but the convolutions.
 3. Router: an MLP on the embedding; the temperature falls from 5 to 1 in the first quarter of the run, with Gumbel
    noise of scale (tau - 1) / 4 while the world model trains: which scores are largest does not depend on temperature.
 4. Concatenated experts give the router no gradient: each output is multiplied by w + sg(1 - w), whose value is 1
    (--gate none: without). Chosen experts are concatenated in ascending order, not by score.
 5. The balance loss compares n softmax(..) with its target K n / N_experts (both sum to K n) and is divided by K^2.
 6. The harmonious weights are the closed-form minimum for a running mean of each task's loss (--harmony adam: learned).
 7. Clustering: cosine of per-layer gradients, averaged over layers; average linkage with a size cap; random data.
 8. Return scales are per task. Returns follow the formula; STORM's code mixes in V(s_t) for V(s_t+1) (--lambda-compat).
 9. The agent acts on the posterior of the current frame; STORM's code on the prior, one frame late (--act-on-prior).
    Its first action of an episode sees h = 0 (STORM's code: a random action).
10. Imagination starts from windows of the batch that the world model was just trained on (--fresh-contexts: from new
    ones, as STORM; encoding those is its largest cost).
11. Attention and KL do not cross the start of an episode (--no-reset-mask: they do, as in STORM).
12. GroupNorm instead of BatchNorm for more than one task: batch statistics would mix the tasks of a cluster.
13. On a CPU sizes, batches and budgets are smaller and learning rates higher (--preset smoke, printed at the start).
14. The acting agent remembers min(16, context + horizon / 2) steps, the middle of what imagination visits; STORM 16.
15. Experts per token (--routing token, --segment, --switch-coef, --prior-coef) and a warm-up without rewards
    (--reward-free) are experiments of ours.
"""
import contextlib
import copy
import csv
import difflib
import functools
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro

from data import Frames, LegacyRun as Run
from envs import ATARI26, ATARI_SCORES, METAWORLD50, MT10, Fleet, score


@dataclass
class Args:
    task: str = "Boxing,Krull,RoadRunner"
    """tasks: Atari games and Meta-World tasks (mw-reach) with commas between, or a set: atari26, mt10, mt50;
    Boxing@m0d1 is a game in another mode and difficulty"""
    seed: int = 1
    """of networks, data and everything random"""
    storm: bool = False
    """the single-task baseline: one cluster, one expert, no embedding, shared Transformer, router or harmony"""
    preset: Literal["auto", "smoke", "mid", "full"] = "auto"
    """values of the flags below that were left out; full: the paper's sizes; auto: smoke on a CPU, mid on a GPU"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes the GPU when there is one"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for world model, imagination, agent and acting; on a CPU it costs minutes at the start"""
    bf16: bool = field(default_factory=torch.cuda.is_available)
    """matrix products in bfloat16; losses, KL and returns stay in float32"""
    resume: str | None = None
    """continue the run in this folder; its flags are read from there"""
    checkpoint: str | None = None
    """start from the checkpoint.pt of another run with the same tasks and sizes"""
    eval_only: bool = False
    """with --checkpoint: only play the agent"""
    cluster_only: bool = False
    """only warm-up and clustering, for --seeds seeds: silhouette, adjusted Rand index between seeds"""
    experiment: Literal["clusters", "experts", "monolith", "transfer", "pretrain", "tokens", "fidelity",
                        "cost"] | None = None
    """a study instead of a run: number of clusters, experts and losses, one big model, what a model of all tasks but
    the last one gains on that last one (Boxing,Krull,Boxing@m0d1: a near one), what play without rewards gains once
    they come, experts per token instead of per task, image quality against the noise of the actor's gradient, or the
    time of an update"""
    seeds: int = 3
    """seeds of --cluster-only and --experiment: seed, seed + 1, .."""
    capture_video: bool = False
    """what the agent sees in one evaluation episode of every task, as mp4"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""
    save_every: float = 120.0
    """seconds between checkpoints"""

    # protocol of the environments, logged with the results
    sticky: float = 0.25
    """Atari: probability per frame that the last action is repeated (STORM: 0.25; many others: 0)"""
    life_loss: bool = True
    """Atari: a lost life counts as an end in the world model; the episode goes on"""
    noop: int = 0
    """Atari: up to so many random idle frames at the start (others: 30)"""
    frame_cap: int = 108_000
    """Atari: frames per episode"""
    action_space: Literal["masked", "full"] = "masked"
    """Atari: choose among the actions that a game tells apart, or among all 18"""
    mix_actions: bool = False
    """allow discrete and continuous tasks in one run: one action vector with room for both"""
    act_on_prior: bool = False
    """play on the predicted latent instead of the seen one, as STORM's released code"""

    # budget: left out, these follow from the preset and are printed at the start
    steps: int | None = None
    """agent steps per task, random ones included (paper: 100,000 Atari, 300,000 Meta-World)"""
    random_steps: int | None = None
    """of these, random ones at the start (STORM: 1,024)"""
    warmup: int | None = None
    """world-model updates on the random data before clustering (a secondary source says 5,000)"""
    train_every: int | None = None
    """agent steps of every task per update (STORM: 1)"""
    batch: int | None = None
    """B, sequences per task and update (STORM: 16)"""
    length: int | None = None
    """L, steps of a sequence (STORM: 64)"""
    rollouts: int | None = None
    """I, imagined roll-outs per task and update (STORM: 1,024)"""
    context: int | None = None
    """C, real steps before imagination (STORM: 8)"""
    horizon: int | None = None
    """H, imagined steps (16)"""
    lr: float | None = None
    """world model (STORM: 1e-4)"""
    agent_lr: float | None = None
    """actor and critics (STORM: 3e-5)"""
    eval_episodes: int | None = None
    """episodes per task at the end (STORM: 20)"""

    # sizes: left out, these follow from the preset
    stem: int | None = None
    """channels of the first convolution; they double three times (STORM: 32)"""
    latents: int | None = None
    """groups of the latent (32)"""
    classes: int | None = None
    """classes per group (32)"""
    width: int | None = None
    """D of the Transformers (STORM: 512)"""
    heads: int | None = None
    """attention heads (STORM: 8)"""
    expert_layers: int | None = None
    """blocks of an expert (STORM: 2)"""
    shared_layers: int | None = None
    """blocks of the shared Transformer"""
    hidden: int | None = None
    """units of all MLPs (STORM: 512)"""
    emb: int | None = None
    """E of the task embedding"""
    clusters: int | None = None
    """modules: VAEs, predictors and critics (paper: 12 for 26 games)"""
    experts: int | None = None
    """expert Transformers (paper: 12)"""
    topk: int | None = None
    """n, experts per task"""
    norm: Literal["bn", "gn"] | None = None
    """of the convolutions: BatchNorm (default for one task) or GroupNorm"""

    # method
    routing: Literal["task", "token"] = "task"
    """who is given experts: a task (the paper), or every token one, by what it holds; all experts then compute"""
    segment: int = 1
    """--routing token: so many tokens in a row keep the expert of the first"""
    switch_coef: float = 0.0
    """--routing token: weight of the total variation between the router's scores for neighbouring tokens"""
    prior_coef: float = 0.0
    """--routing token: weight of the KL from the router's scores for a token to those for its task"""
    gate: Literal["st", "none"] = "st"
    """how the router learns from the world-model loss: straight-through weights, or not at all"""
    harmony: Literal["closed", "adam", "off"] = "closed"
    """weights of the tasks' losses: best sigma in closed form, learned at 1e-2, or all 1"""
    balance: float = 0.1
    """weight of the expert balance loss"""
    task_coef: float = 1.0
    """weight of the task prediction loss"""
    reward_free: bool = False
    """the warm-up learns images and dynamics, but no rewards and ends (with more --random-steps and --warmup this is
    pre-training on play that nobody has scored)"""
    reset_mask: bool = True
    """attention and KL stay within an episode"""
    fresh_contexts: bool = False
    """imagine from freshly sampled and encoded contexts"""
    lambda_compat: bool = False
    """lambda-return as in STORM's released code: (1 - lambda) V(s_t)"""
    grad_reduce: Literal["sketch", "mean"] = "sketch"
    """what clustering compares per layer: the gradient's direction, or only its mean"""
    tau: float = 5.0
    """router temperature at the start"""
    gamma: float = 0.985
    """discount (STORM)"""
    lam: float = 0.95
    """lambda of the return (STORM)"""
    entropy: float = 3e-4
    """weight of the actor's entropy (STORM)"""


PRESETS = {
    "full": dict(steps=100_000, random_steps=1024, warmup=5000, train_every=1, batch=16, length=64, rollouts=256,
                 context=8, horizon=16, lr=1e-4, agent_lr=3e-5, eval_episodes=20, stem=32, latents=32, classes=32,
                 width=512, heads=8, expert_layers=2, shared_layers=2, hidden=512, emb=64, clusters=12,
                 experts=12, topk=2),
    "mid": dict(steps=50_000, random_steps=1024, warmup=2000, train_every=2, batch=8, length=32, rollouts=128,
                context=8, horizon=15, lr=2e-4, agent_lr=1e-4, eval_episodes=10, stem=16, latents=32, classes=32,
                width=256, heads=8, expert_layers=2, shared_layers=2, hidden=256, emb=64, clusters=3,
                experts=6, topk=2),
    "smoke": dict(steps=2500, random_steps=400, warmup=300, train_every=1, batch=4, length=16, rollouts=32,
                  context=4, horizon=8, lr=1e-3, agent_lr=3e-4, eval_episodes=4, stem=8, latents=16, classes=16,
                  width=64, heads=4, expert_layers=1, shared_layers=1, hidden=64, emb=16, clusters=2,
                  experts=3, topk=2)}
WINDOW = 16  # past steps that the acting agent remembers, at most: see Agent.window
MOW_MEAN_HNS, STORM_MEAN_HNS = 1.104, 1.142  # published means over 26 games: MoW, and 26 STORMs by MoW's authors
STORM_RETURN = {  # STORM's published mean return per game (5 seeds, one agent per game, released results)
    "Alien": 983.6, "Amidar": 204.8, "Assault": 801.0, "Asterix": 1028.0, "BankHeist": 641.2, "BattleZone": 13540.0,
    "Boxing": 79.7, "Breakout": 15.9, "ChopperCommand": 1888.0, "CrazyClimber": 66776.0, "DemonAttack": 164.6,
    "Freeway": 0.0, "Frostbite": 1316.0, "Gopher": 8239.6, "Hero": 11044.3, "Jamesbond": 509.0, "Kangaroo": 4208.0,
    "Krull": 8412.6, "KungFuMaster": 26182.0, "MsPacman": 2673.5, "Pong": 11.3, "PrivateEye": 7781.0, "Qbert": 4522.5,
    "RoadRunner": 17564.0, "Seaquest": 525.2, "UpNDown": 7985.0}


# --------------------------------------------------------------------------------------------------------------- maths
BINS = 255  # of rewards and values, uniform in [-20, 20] after symlog


def symlog(x):
    """sign(x) ln(1 + |x|)"""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """sign(x) (e^|x| - 1), the inverse of symlog"""
    return x.sign() * x.abs().expm1()


def two_hot_mean(logits):
    """The number that logits (.., 255) stand for: (..)."""
    return symexp(logits.float().softmax(-1) @ torch.linspace(-20, 20, BINS, device=logits.device))


def two_hot_loss(logits, x):
    """Cross-entropy of logits (.., 255) with symlog(x) (..) split between its two neighbouring bins: (..)."""
    at = ((symlog(x) + 20) * ((BINS - 1) / 40)).clamp(0, BINS - 1)
    low = at.floor().clamp(max=BINS - 2)
    logp = logits.float().log_softmax(-1)
    p_low, p_high = (logp.gather(-1, (low.long() + i)[..., None])[..., 0] for i in (0, 1))
    return -(p_low + (at - low) * (p_high - p_low))


def unimix(logits):
    """Log-probabilities of 0.99 softmax + 0.01 uniform: (.., groups, classes)."""
    return (0.99 * logits.float().softmax(-1) + 0.01 / logits.shape[-1]).log()


def sample_onehot(logp):
    """A one-hot draw per row of logp (.., classes), by the Gumbel-max trick."""
    gumbel = -torch.empty_like(logp).exponential_().log()
    return F.one_hot((logp + gumbel).argmax(-1), logp.shape[-1]).to(logp.dtype)


def sample_latent(logp):
    """Draw z (.., Z) from logp (.., groups, classes); its gradient is that of the probabilities (straight through)."""
    p = logp.exp()
    return (sample_onehot(logp.detach()) + p - p.detach()).flatten(-2)


def kl(p, q):
    """KL(p || q) in nats, summed over the groups: (.., groups, classes) log-probabilities -> (..)."""
    return (p.exp() * (p - q)).sum((-2, -1))


def lambda_return(rew, done, value, gamma=0.985, lam=0.95, compat=False):
    """R_t = r_t + gamma (1 - d_t) [(1 - lam) V_t+1 + lam R_t+1], R_H = V_H: rew, done (.., H), value (.., H+1)."""
    R, out = value[..., -1], []
    for t in range(rew.shape[-1] - 1, -1, -1):
        near = value[..., t] if compat else value[..., t + 1]
        R = rew[..., t] + gamma * (1 - done[..., t]) * ((1 - lam) * near + lam * R)
        out.append(R)
    return torch.stack(out[::-1], -1)


def best_sigma(loss):
    """The sigma > 0 that minimises loss / sigma + ln(1 + sigma)."""
    return (loss + (loss.square() + 4 * loss).sqrt()) / 2


def balance_loss(scores, topk):
    """|| sum_k n S_k - K n / N_experts ||^2 / K^2 for scores S (K, N_experts): 0 where all experts are used alike."""
    K, N = scores.shape
    return (topk * scores.sum(0) - K * topk / N).square().sum() / K**2


def route(task_emb, router, topk, tau=1.0, noise=0.0):
    """S = softmax((router(e) + noise * Gumbel) / tau) and its topk, per task and not per token.

    task_emb (K, E), router: (K, E) -> (K, N_experts) -> scores S (K, N_experts), indices J (K, n) in ascending order,
    their weights w (K, n), which sum to 1. The order matters: outputs are concatenated, and scores cross.
    """
    logits = router(task_emb).float()
    logits = logits - noise * torch.empty_like(logits).exponential_().log()
    S = (logits / tau).softmax(-1)
    J = S.topk(topk, -1).indices.sort(-1).values
    w = S.gather(-1, J)
    return S, J, w / w.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------- clustering
SKETCH = 4096  # numbers kept of a layer's gradient


def sketch(grad, size=SKETCH):
    """Every entry of a flat gradient with a random sign to a random one of `size` sums, fixed by the gradient's length:
    inner products are kept on average, whatever their size (a count sketch)."""
    generator = torch.Generator().manual_seed(grad.numel())
    bucket = torch.randint(size, grad.shape, generator=generator)
    sign = torch.randint(2, grad.shape, generator=generator) * 2 - 1
    return torch.zeros(size).index_add_(0, bucket, grad * sign)


def task_similarity(grads):
    """Cosine of every two tasks' gradients, averaged over layers: grads (K, layers, m) or (K, m) -> (K, K)."""
    g = np.asarray(grads, np.float64)
    g = g[:, None] if g.ndim == 2 else g
    norm = np.linalg.norm(g, axis=-1, keepdims=True)
    g = np.divide(g, norm, out=np.zeros_like(g), where=norm > 0)
    return np.einsum("ilm,jlm->ij", g, g) / g.shape[1]


def cluster_tasks(grads, n):
    """Average-linkage clustering of K tasks into n groups of at most ceil(1.5 K / n): a label per task, (K,) ints.

    grads (K, layers, m) or (K, m). Deterministic; labels count up in the order of the tasks.
    """
    K = len(grads)
    if not 1 <= n <= K:
        raise SystemExit(f"cluster_tasks got {K} tasks and n={n} clusters; expected 1 to {K}: type fewer --clusters")
    sim, groups, cap = task_similarity(grads), [[k] for k in range(K)], math.ceil(1.5 * K / n)
    while len(groups) > n:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        fits = [(i, j) for i, j in pairs if len(groups[i]) + len(groups[j]) <= cap]
        if fits:
            i, j = max(fits, key=lambda p: round(sim[np.ix_(groups[p[0]], groups[p[1]])].mean(), 12))
        else:  # the cap leaves no way on: join the two smallest
            i, j = min(pairs, key=lambda p: len(groups[p[0]]) + len(groups[p[1]]))
        groups[i] = groups[i] + groups.pop(j)
    return [sorted(groups, key=min).index(next(g for g in groups if k in g)) for k in range(K)]


def silhouette(sim, labels):
    """Mean silhouette width of labels (K,) for distances 1 - sim (K, K): 1 = far apart, 0 = no structure."""
    labels, widths = np.asarray(labels), []
    for k in range(len(labels)):
        mean = {c: (1 - sim[k])[(labels == c) & (np.arange(len(labels)) != k)] for c in set(labels.tolist())}
        own = mean.pop(labels[k])
        if not len(own) or not mean:
            widths.append(0.0)
            continue
        a, b = own.mean(), min(x.mean() for x in mean.values())
        widths.append((b - a) / max(a, b, 1e-12))
    return float(np.mean(widths))


def adjusted_rand(p, q):
    """Adjusted Rand index of two labelings of the same tasks: 1 = the same, 0 = as by chance."""
    table = np.array([[sum(a == c and b == d for a, b in zip(p, q)) for d in sorted(set(q))] for c in sorted(set(p))])

    def pairs(x):
        return float((x * (x - 1) / 2).sum())

    both, a, b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = a * b / max(pairs(np.array([len(p)])), 1)
    return 1.0 if (a + b) / 2 == expected else (both - expected) / ((a + b) / 2 - expected)


# ------------------------------------------------------------------------------------------------------------ networks
class Stack(nn.Module):
    """N linear layers as one weight (N, i, j); row g of x uses number which[g]: (G, R, i) -> (G, R, j)."""

    def __init__(self, N, i, j, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(N, i, j).uniform_(-1, 1) / math.sqrt(i))
        self.bias = nn.Parameter(torch.empty(N, 1, j).uniform_(-1, 1) / math.sqrt(i)) if bias else None

    def forward(self, x, which):
        w = self.weight[which]
        return torch.bmm(x, w) if self.bias is None else torch.baddbmm(self.bias[which], x, w)


class StackNorm(nn.Module):
    """N LayerNorms: (G, R, j) -> (G, R, j)."""

    def __init__(self, N, j, eps=1e-5):
        super().__init__()
        self.gain, self.shift, self.eps = nn.Parameter(torch.ones(N, 1, j)), nn.Parameter(torch.zeros(N, 1, j)), eps

    def forward(self, x, which):
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.gain[which] + self.shift[which]


class StackMLP(nn.Module):
    """N MLPs of `layers` x [Linear, LayerNorm, ReLU] and a Linear: (G, R, i) -> (G, R, out)."""

    def __init__(self, N, i, hidden, layers, out):
        super().__init__()
        sizes = [i] + [hidden] * layers
        self.layers = nn.ModuleList(Stack(N, a, b, bias=False) for a, b in zip(sizes, sizes[1:]))
        self.norms = nn.ModuleList(StackNorm(N, hidden) for _ in range(layers))
        self.out = Stack(N, sizes[-1], out)

    def forward(self, x, which):
        for layer, norm in zip(self.layers, self.norms):
            x = F.relu(norm(layer(x, which), which))
        return self.out(x, which)


class Block(nn.Module):
    """N post-norm Transformer blocks without biases in the attention, as STORM's: (G, R, L, D) -> (G, R, L, D)."""

    def __init__(self, N, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = Stack(N, width, 3 * width, bias=False), Stack(N, width, width, bias=False)
        self.up, self.down = Stack(N, width, 2 * width), Stack(N, 2 * width, width)
        self.norm1, self.norm2 = StackNorm(N, width, 1e-6), StackNorm(N, width, 1e-6)

    def forward(self, x, which, mask, cache=None, pos=None):
        """mask (G*R, 1, L, T) of keys that a query may see. cache (2, G*R, heads, T, d) holds earlier keys and values;
        the L tokens of x stand at positions pos (L,) and are written there."""
        G, R, L, D = x.shape
        p = self.dropout if self.training else 0.0
        x = x.flatten(1, 2)
        qkv = self.qkv(x, which).view(G, R, L, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)
        if cache is not None:
            qkv = qkv.to(cache.dtype)
            cache.index_copy_(3, pos, qkv[1:])
        q, (k, v) = qkv[0], qkv[1:] if cache is None else cache
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)      # (G*R, heads, L, d)
        y = y.transpose(1, 2).reshape(G, R * L, D)
        x = self.norm1(x + F.dropout(self.out(y, which), p), which)
        y = self.down(F.relu(self.up(x, which)), which)
        return self.norm2(x + F.dropout(y, p), which).view(G, R, L, D)


class Transformer(nn.Module):
    """N causal Transformers with stacked weights: (G, R, L, D) -> (G, R, L, D), row g by number which[g]."""

    def __init__(self, N, width, heads, layers, dropout, max_len=0):
        super().__init__()
        self.position = nn.Parameter(torch.randn(N, 1, max_len, width)) if max_len else None
        self.norm = StackNorm(N, width, 1e-6) if max_len else None
        self.blocks = nn.ModuleList(Block(N, width, heads, dropout) for _ in range(layers))

    def forward(self, x, which, mask, pos, cache=None):
        if self.position is not None:
            x = x + self.position[which][:, :, pos]
            x = self.norm(x.flatten(1, 2), which).view(x.shape)
        mask = mask.flatten(0, 1)[:, None]                                             # (G*R, 1, L, T)
        for i, block in enumerate(self.blocks):
            x = block(x, which, mask, None if cache is None else cache[i], pos)
        return x

    def new_cache(self, rows, T, x):
        """Room for T keys and values of `rows` sequences, of the kind of tensor x."""
        width, heads = self.blocks[0].out.weight.shape[-1], self.blocks[0].heads
        return x.new_zeros(len(self.blocks), 2, rows, heads, T, width // heads)


class VAE(nn.Module):
    """Images (R, 3, 64, 64) and embeddings (R, E) <-> latents; every image on its own, time is the Transformer's."""

    def __init__(self, stem, Z, emb, norm):
        super().__init__()
        c = [3, stem, 2 * stem, 4 * stem, 8 * stem]

        def normed(channels):
            return nn.BatchNorm2d(channels) if norm == "bn" else nn.GroupNorm(min(8, channels), channels)

        down, up = [], [normed(c[4]), nn.ReLU()]
        for a, b in zip(c, c[1:]):
            down += [nn.Conv2d(a, b, 4, 2, 1, bias=False), normed(b), nn.ReLU()]
        for a, b in zip(c[:1:-1], c[-2:0:-1]):
            up += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), normed(b), nn.ReLU()]
        self.conv, self.shape = nn.Sequential(*down), (c[4], 4, 4)
        self.to_latent = nn.Linear(16 * c[4] + emb, Z)
        self.from_latent = nn.Linear(Z + emb, 16 * c[4], bias=False)
        self.deconv = nn.Sequential(*up, nn.ConvTranspose2d(c[1], 3, 4, 2, 1))

    def encode(self, x, e):
        """-> logits (R, Z)"""
        return self.to_latent(torch.cat([self.conv(x).flatten(1), e], -1))

    def decode(self, z, e):
        """-> images (R, 3, 64, 64), not limited to [0, 1]"""
        return self.deconv(self.from_latent(torch.cat([z, e], -1)).unflatten(-1, self.shape))


class WorldModel(nn.Module):
    """Cluster VAEs, routed expert Transformers, a shared Transformer and cluster heads for K tasks.

    emb=0, shared_layers=0 and one of everything is STORM. Methods take x (K, .., ·) for all tasks, or for those of the
    list `task` alone.
    """

    def __init__(self, K, A, clusters, experts, topk, emb, stem, latents, classes, width, heads, expert_layers,
                 shared_layers, hidden, norm, segment=0, max_len=64, dropout=0.1):
        """segment: of routing per token, 0 for routing per task."""
        super().__init__()
        Z, N = latents * classes, clusters
        self.latents, self.topk, self.segment, self.active = latents, topk, segment, experts if segment else topk
        self.e = nn.Parameter(torch.randn(K, emb))
        self.vaes = nn.ModuleList(VAE(stem, Z, emb, norm) for _ in range(clusters))
        self.mix, self.mix_norm = Stack(experts, Z + A + emb, width, bias=False), StackNorm(experts, width)
        self.mix_out, self.mix_out_norm = Stack(experts, width, width, bias=False), StackNorm(experts, width)
        self.router = nn.Sequential(nn.Linear(emb, 64), nn.ReLU(), nn.Linear(64, experts)) if experts > 1 else None
        self.token_router = nn.Linear(Z + A, experts) if segment else None
        self.experts = Transformer(experts, width, heads, expert_layers, dropout, max_len)
        self.join = nn.Linear(topk * width + emb, width) if shared_layers or topk > 1 else None
        self.shared = Transformer(1, width, heads, shared_layers, dropout) if shared_layers else None
        self.prior_head, self.reward_head = StackMLP(N, width + emb, 0, 0, Z), StackMLP(N, width + emb, hidden, 2, BINS)
        self.end_head = StackMLP(N, width + emb, hidden, 2, 1)
        self.task_head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, K)) if K > 1 else None
        self.register_buffer("cluster_of", torch.zeros(K, dtype=torch.long))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.long), persistent=False)
        self.assign([0] * K)

    def assign(self, labels):
        """Give every task its cluster."""
        self.labels = tuple(int(c) for c in labels)
        self.cluster_of.copy_(torch.tensor(self.labels))

    def embedding(self, task=None):
        """(K, E), of length 1"""
        return F.normalize(self.e if task is None else self.e[task], dim=-1)

    def routing(self, e, tau=1.0, noise=0.0):
        """route() with this model's router: S (K, N_experts), J (K, n), w (K, n). Per token all experts are active."""
        if self.router is None:
            return e.new_ones(len(e), 1), self.zero.expand(len(e), 1), e.new_ones(len(e), 1)
        S, J, w = route(e, self.router, self.active, tau, noise)
        return S, J, torch.ones_like(w) if self.segment else w

    def token_scores(self, z, act, e):
        """Routing per token: softmax (K, B, L, N_experts) of the task's logits and those of z (K, B, L, Z) and act."""
        logits = self.router(e)[:, None, None] + self.token_router(torch.cat([z, act], -1))
        return logits.float().softmax(-1)

    def held(self, scores, pos):
        """What each of the tokens at positions pos (L,) is routed by: the scores (.., T, N_experts) of all positions
        where its segment begins."""
        return scores[:, :, pos - pos % self.segment]

    def perceive(self, method, x, e, task=None):
        """Every cluster's VAE on the frames of its own tasks: x (K, R, ..), e (K, E) -> (K, R, ..)."""
        labels = self.labels if task is None else [self.labels[k] for k in task]
        out = [None] * len(labels)
        for c in sorted(set(labels)):
            mine = [i for i, label in enumerate(labels) if label == c]
            rows = torch.cat([x[i] for i in mine])
            embs = torch.cat([e[i].expand(x.shape[1], -1) for i in mine])
            y = getattr(self.vaes[c], method)(rows, embs)
            for i, part in zip(mine, y.chunk(len(mine))):
                out[i] = part
        return torch.stack(out)

    def posterior(self, x, e, task=None):
        """Images (K, B, L, 3, 64, 64) -> log-probabilities (K, B, L, groups, classes)."""
        y = self.perceive("encode", x.flatten(1, 2), e, task)
        return unimix(y.unflatten(1, x.shape[1:3]).unflatten(-1, (self.latents, -1)))

    def decode(self, z, e, task=None):
        """(K, B, L, Z) -> images (K, B, L, 3, 64, 64)."""
        return self.perceive("decode", z.flatten(1, 2), e, task).unflatten(1, z.shape[1:3]).float()

    def sequence(self, z, act, e, J, gate, mask, pos, cache=(None, None, None)):
        """h (K, B, L, D) from z (K, B, L, Z) and act (K, B, L, A) at positions pos (L,); mask (K, B, L, T)."""
        K, B, L, _ = z.shape
        n, which, at = J.shape[1], J.flatten(), e[:, None, None].expand(K, B, L, -1)
        x = torch.cat([z, act, at], -1).flatten(1, 2).repeat_interleave(n, 0)          # (K*n, B*L, Z+A+E)
        x = F.relu(self.mix_norm(self.mix(x, which), which))
        x = self.mix_out_norm(self.mix_out(x, which), which).view(K * n, B, L, -1)
        x = self.experts(x, which, mask.repeat_interleave(n, 0), pos, cache[0])
        x = (x * gate.reshape(K * n, 1, 1, 1)).view(K, n, B, L, -1).permute(0, 2, 3, 1, 4)             # (K, B, L, n, D)
        if self.segment:
            p = self.token_scores(z, act, e)
            p = self.held(p if cache[2] is None else cache[2].index_copy_(2, pos, p.to(cache[2].dtype)), pos)
            best = F.one_hot(p.argmax(-1), n).to(p.dtype)
            x = (x * (best + p - p.detach())[..., None]).sum(3)                        # one's; p learns from all
        else:
            x = x.flatten(3)
        if self.join is not None:
            x = self.join(torch.cat([x, at], -1))
        if self.shared is not None:
            x = self.shared(x.flatten(0, 1)[None], self.zero, mask.flatten(0, 1)[None], pos, cache[1])[0].view(x.shape)
        return x

    def head(self, head, h, e, task=None):
        """A cluster head on h (K, B, L, D): (K, B, L, out)."""
        which = self.cluster_of if task is None else self.cluster_of[task]
        x = torch.cat([h, e[:, None, None].expand(*h.shape[:3], -1)], -1)
        return head(x.flatten(1, 2), which).unflatten(1, h.shape[1:3]).float()

    def prior(self, h, e, task=None):
        """Log-probabilities of the next latent (K, B, L, groups, classes)."""
        return unimix(self.head(self.prior_head, h, e, task).unflatten(-1, (self.latents, -1)))

    def new_cache(self, K, R, T, x):
        """Empty caches of experts, shared Transformer and routing per token for K tasks of R sequences of T steps."""
        return (self.experts.new_cache(K * self.active * R, T, x),
                None if self.shared is None else self.shared.new_cache(K * R, T, x),
                x.new_zeros(K, R, T, self.active) if self.segment else None)


class Actor(nn.Module):
    """One policy for all tasks: x (K, R, Z+D+E) -> log-probabilities (K, R, discrete), mean and std (K, R, continuous).

    legal (K, discrete) masks what a game does not have; continuous (K,) says which kind of action a task takes.
    """

    def __init__(self, i, hidden, legal, continuous, n_cont):
        super().__init__()
        self.n_disc = legal.shape[1]
        layers = [nn.Linear(i, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU(),
                  nn.Linear(hidden, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, self.n_disc + 2 * n_cont))
        self.register_buffer("legal", legal)
        self.register_buffer("continuous", continuous)

    def forward(self, x):
        logits, mean, std = self.net(x).float().tensor_split(
            [self.n_disc, (self.n_disc + self.net[-1].out_features) // 2], -1)
        logp = logits.masked_fill(~self.legal[:, None], -1e9).log_softmax(-1)
        return logp, mean.tanh(), 0.1 + 0.9 * std.sigmoid()

    def sample(self, x):
        """act (K, R, A): one-hot for a game, a draw of the Gaussian otherwise; the other half is zero."""
        logp, mean, std = self(x)
        other = self.continuous[:, None, None]
        return torch.cat([sample_onehot(logp) * ~other if self.n_disc else logp,
                          (mean + std * torch.randn_like(std)) * other], -1)

    def evaluate(self, x, act):
        """log pi(act) and entropy, (K, R) each."""
        logp, mean, std = self(x)
        if not std.shape[-1]:
            return (logp * act).sum(-1), -(logp.exp() * logp).sum(-1)
        a, log_std = act[..., self.n_disc:], std.log()
        gauss = (-((a - mean) / std).square() / 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        gauss_entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        if not self.n_disc:
            return gauss, gauss_entropy
        other = self.continuous[:, None]
        return (torch.where(other, gauss, (logp * act[..., :self.n_disc]).sum(-1)),
                torch.where(other, gauss_entropy, -(logp.exp() * logp).sum(-1)))


# ------------------------------------------------------------------------------------------------------------ losses
def to_images(obs):
    """uint8 (.., 64, 64, 3) -> float (.., 3, 64, 64) in [0, 1]; in memory the channels stay last, which is faster."""
    return obs.movedim(-1, -3).float() / 255


def episode_mask(first, pos, reset_mask=True):
    """Which keys queries at positions pos (L,) may see: not later, same episode. first (K, B, T) -> (K, B, L, T)."""
    part = first.long().cumsum(-1) * reset_mask
    past = pos[:, None] >= torch.arange(first.shape[-1], device=first.device)
    return past & (part[:, :, pos, None] == part[:, :, None])


def world_model_loss(wm, obs, act, rew, term, first, tau, noise, gate="st", reset_mask=True, task=None,
                     average=lambda x: x):
    """STORM's loss terms and the task loss, one number per task (K,): {name: (K,)}, and what else came of it.

    obs uint8 (K, B, L, 64, 64, 3), act (K, B, L, A), rew, term, first (K, B, L). average: over the processes that
    share a batch."""
    K, B, L = rew.shape
    e = wm.embedding(task)
    S, J, w = wm.routing(e, tau, noise)
    open_gate = w + (1 - w).detach() if gate == "st" else torch.ones_like(w)
    x, pos = to_images(obs), torch.arange(L, device=rew.device)
    post = wm.posterior(x, e, task)                                                    # (K, B, L, groups, classes)
    z = sample_latent(post)
    h = wm.sequence(z, act, e, J, open_gate, episode_mask(first, pos, reset_mask), pos)
    prior = wm.prior(h, e, task)
    follows = ~first[:, :, 1:] if reset_mask else torch.ones_like(first[:, :, 1:])

    pairs = average(follows.sum((1, 2)).float()).clamp(min=1)

    def mean_kl(p, q):  # over the pairs (t, t+1) of one episode
        return average((kl(p[:, :, 1:], q[:, :, :-1]) * follows).sum((1, 2)) / pairs)

    dyn, rep = mean_kl(post.detach(), prior), mean_kl(post, prior.detach())
    losses = {
        "rec": (wm.decode(z, e, task) - x).square().sum((-3, -2, -1)).mean((1, 2)),
        "rew": two_hot_loss(wm.head(wm.reward_head, h, e, task), rew).mean((1, 2)),
        "end": F.binary_cross_entropy_with_logits(wm.head(wm.end_head, h, e, task)[..., 0], term.float(),
                                                  reduction="none").mean((1, 2)),
        # one free nat for each task, not for the mean of all: easy tasks would hide the hard ones
        "dyn": dyn.clamp(min=1), "rep": rep.clamp(min=1)}
    more = {"z": z.detach(), "scores": S, "J": J, "dyn_raw": dyn.detach()}
    if wm.segment:
        p = wm.held(wm.token_scores(z.detach(), act, e), pos)                          # (K, B, L, N_experts)
        best, surprise = p.argmax(-1), p.clamp(min=1e-8).log() - S[:, None, None].clamp(min=1e-8).log()
        more |= {"scores": p.mean((1, 2)), "switch": p.diff(dim=2).abs().sum(-1).mean((1, 2)) / 2,
                 "prior": (p * surprise).sum(-1).mean((1, 2)), "switch_rate": best.diff().ne(0).float().mean((1, 2))}
    if wm.task_head is not None:
        ids = torch.arange(K, device=rew.device) if task is None else torch.tensor(task, device=rew.device)
        logits = wm.task_head(h).float().movedim(-1, 1)                                # (K, tasks, B, L)
        losses["task"] = F.cross_entropy(logits, ids[:, None, None].expand(K, B, L), reduction="none").mean((1, 2))
        more["task_accuracy"] = (logits.argmax(1) == ids[:, None, None]).float().mean()
    return losses, more


def total_loss(losses, task_coef=1.0, scored=True):
    """L_k = rec + rew + end + task + 0.5 dyn + 0.1 rep, (K,); rew and end only where play is `scored`."""
    scale = {"dyn": 0.5, "rep": 0.1, "task": task_coef, "rew": float(scored), "end": float(scored)}
    return sum(scale.get(name, 1.0) * x for name, x in losses.items())


def imagine_step(wm, actor, h, e, J, gate, mask, pos, cache):
    """One imagined step after h_t-1 (K, I, 1, D): the agent's state x_t (K, I, ·), a_t, h_t, r_t and d_t (K, I)."""
    z = sample_onehot(wm.prior(h, e)).flatten(-2)                                      # (K, I, 1, Z)
    x = torch.cat([z, h, e[:, None, None].expand(*h.shape[:3], -1)], -1)[:, :, 0]
    act = actor.sample(x)
    h = wm.sequence(z, act[:, :, None], e, J, gate, mask, pos, cache).float()
    rew = two_hot_mean(wm.head(wm.reward_head, h, e))[:, :, 0]
    done = (wm.head(wm.end_head, h, e)[:, :, 0, 0] > 0).float()
    return x, act, h, rew, done


@torch.no_grad()
def imagine(wm, actor, z, act, first, horizon, tau, step=imagine_step, reset_mask=True, cache_dtype=None):
    """The actor's own roll-outs after real steps z (K, I, C, Z), act, first: states x (K, I, H+1, ·), act (K, I, H, A),
    rew and done (K, I, H)."""
    K, I, C, _ = z.shape
    e = wm.embedding()
    _, J, w = wm.routing(e, tau)
    gate, pos = torch.ones_like(w), torch.arange(C + horizon + 1, device=z.device)
    later = torch.zeros(K, I, horizon + 1, dtype=torch.bool, device=z.device)
    mask = episode_mask(torch.cat([first, later], -1), pos, reset_mask)               # (K, I, T, T)
    cache = wm.new_cache(K, I, len(pos), z.to(cache_dtype or z.dtype))
    h = wm.sequence(z, act, e, J, gate, mask[:, :, :C], pos[:C], cache)[:, :, -1:].float()
    steps = []
    for t in range(C, C + horizon + 1):
        x, a, h, rew, done = step(wm, actor, h, e, J, gate, mask[:, :, t:t + 1], pos[t:t + 1], cache)
        steps.append((x, a, rew, done))
    x, act, rew, done = (torch.stack(s, 2) for s in zip(*steps))
    return x, act[:, :, :-1], rew[..., :-1], done[..., :-1]


def agent_loss(actor, critic, slow, cluster_of, x, act, rew, done, low, high, gamma, lam, entropy, compat):
    """REINFORCE on lambda-returns with the critic as baseline and a percentile scale per task; two-hot critics that
    also follow the returns of their slow copies. x (K, I, H+1, ·), act (K, I, H, A), rew, done (K, I, H); low,
    high (K,) are running percentiles, NaN before the first. -> loss, new low and high, metrics."""
    K, I, H = rew.shape
    flat = x.flatten(1, 2)
    logits = critic(flat, cluster_of).view(K, I, H + 1, BINS).float()
    with torch.no_grad():
        value = two_hot_mean(logits)
        R = lambda_return(rew, done, value, gamma, lam, compat)
        slow_value = two_hot_mean(slow(flat, cluster_of).view(K, I, H + 1, BINS))
        R_slow = lambda_return(rew, done, slow_value, gamma, lam, compat)
        new = torch.quantile(R.flatten(1), torch.tensor([0.05, 0.95], device=R.device), dim=1)
        low, high = (torch.where(old.isnan(), now, old.lerp(now, 0.01)) for old, now in zip((low, high), new))
        advantage = (R - value[..., :-1]) / (high - low).clamp(min=1)[:, None, None]
    logp, ent = (y.view(K, I, H) for y in actor.evaluate(x[:, :, :-1].flatten(1, 2), act.flatten(1, 2)))
    critic_loss = two_hot_loss(logits[:, :, :-1], R) + two_hot_loss(logits[:, :, :-1], R_slow)
    actor_loss = -advantage * logp - entropy * ent
    metrics = {"critic": critic_loss.mean(), "actor": actor_loss.mean(), "entropy": ent.mean(),
               "imagined_reward": rew.sum(-1).mean(), "value": value.mean(), "advantage_mean": advantage.mean(),
               "advantage_std": advantage.std((1, 2)).mean()}
    return (actor_loss + critic_loss).mean(), low, high, {k: v.detach() for k, v in metrics.items()}


@torch.no_grad()
def act(wm, actor, obs, past_z, past_a, n, tau, on_prior=False):
    """Actions (K, R, A) for frames obs uint8 (K, R, 64, 64, 3), and the window with this step in it.

    past_z (K, R, W, Z), past_a (K, R, W, A): the steps of this episode so far, n (K, R) of them."""
    W, e = past_z.shape[2], wm.embedding()
    _, J, w = wm.routing(e, tau)
    pos = torch.arange(W, device=obs.device)
    mask = (pos[:, None] >= pos).expand(*n.shape, W, W)
    h = wm.sequence(past_z, past_a, e, J, torch.ones_like(w), mask, pos).float()
    last = (n - 1).clamp(min=0)[..., None, None].expand(*n.shape, 1, h.shape[-1])
    h = h.gather(2, last) * (n > 0)[..., None, None]                                   # (K, R, 1, D)
    logp = wm.prior(h, e) if on_prior else wm.posterior(to_images(obs[:, :, None]), e)
    z = sample_onehot(logp).flatten(-2)                                                # (K, R, 1, Z)
    a = actor.sample(torch.cat([z, h, e[:, None, None].expand(*h.shape[:3], -1)], -1)[:, :, 0])
    full = (n == W)[..., None, None]
    here = (pos == n.clamp(max=W - 1)[..., None])[..., None]                           # (K, R, W, 1)
    past_z, past_a = (torch.where(here, new, torch.where(full, old.roll(-1, 2), old))
                      for old, new in ((past_z, z), (past_a, a[:, :, None])))
    return a, past_z, past_a, (n + 1).clamp(max=W)


# ------------------------------------------------------------------------------------------------------------- updates
class Agent:
    """World model, actor, critics, their optimisers and running statistics, for the sizes and flags of `args`."""

    def __init__(self, args, legal, continuous, n_cont, device):
        K, A = len(legal), legal.shape[1] + n_cont
        # the actor learns on h of C to C + H steps: one of a longer past would have positions that it has never seen
        self.window = min(WINDOW, args.context + args.horizon // 2)
        self.args, self.device, self.K, self.A, self.updates = args, device, K, A, 0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.average = over_ranks if self.world > 1 else lambda x: x
        torch.manual_seed(args.seed)
        self.wm = WorldModel(
            K, A, args.clusters, args.experts, args.topk, args.emb, args.stem, args.latents, args.classes, args.width,
            args.heads, args.expert_layers, args.shared_layers, args.hidden, args.norm,
            args.segment if args.routing == "token" else 0,
            max(args.length, args.context + args.horizon + 1, WINDOW)).to(device)
        self.wm.vaes.to(memory_format=torch.channels_last)  # of images and kernels: faster convolutions
        self.Z = args.latents * args.classes
        i = self.Z + args.width + args.emb
        self.actor = Actor(i, args.hidden, legal, continuous, n_cont).to(device)
        self.critic = StackMLP(args.clusters, i, args.hidden, 2, BINS).to(device)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.sigma = nn.Parameter(torch.zeros(K, device=device))  # log sigma of --harmony adam
        self.mean_loss, self.low, self.high = (torch.full((K,), math.nan, device=device) for _ in range(3))
        self.opt = torch.optim.Adam([{"params": list(self.wm.parameters())},
                                     {"params": [self.sigma], "lr": 1e-2}], args.lr, fused=True)
        self.agent_params = [*self.actor.parameters(), *self.critic.parameters()]
        self.agent_opt = torch.optim.Adam(self.agent_params, args.agent_lr, eps=1e-5, fused=True)
        self.anneal = max(1, total_updates(args) // 4)
        compiler = torch.compile if args.compile else lambda f: f
        self.world_loss, self.imagine_step, self.agent_loss, self.act = (
            compiler(f) for f in (world_model_loss, imagine_step, agent_loss, act))

    def average_gradients(self, params):
        """Over the processes of torchrun, as one message."""
        if self.world > 1:
            grads = [p.grad for p in params if p.grad is not None]
            means = over_ranks(torch.cat([g.flatten() for g in grads])).split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [mean.view_as(g) for mean, g in zip(means, grads)])

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def temperature(self):
        """Router temperature now, a tensor so that compiled functions need not be made again."""
        tau = max(1.0, self.args.tau - (self.args.tau - 1) * self.updates / self.anneal)
        return torch.tensor(tau, device=self.device)

    def update_world(self, batch, task=None):
        """One step of the world model on obs, act, rew, term, first of all tasks, or of the list `task` -> per-task
        losses, and latents for imagination."""
        a, tau, at = self.args, self.temperature(), slice(None) if task is None else task
        self.wm.train()
        with self.autocast():
            losses, more = self.world_loss(self.wm, *batch, tau, (tau - 1) / 4, a.gate, a.reset_mask, task,
                                           self.average)
        losses = dict(zip(losses, self.average(torch.stack([*losses.values()]))))
        per_task = total_loss(losses, a.task_coef, not a.reward_free or self.updates >= a.warmup)
        mean, now = self.mean_loss[at], per_task.detach()
        self.mean_loss[at] = mean = torch.where(mean.isnan(), now, mean.lerp(now, 0.01))
        if a.harmony == "closed":
            loss = (per_task / best_sigma(mean)).sum()
        elif a.harmony == "adam":
            sigma = self.sigma[at].exp()
            loss = (per_task / sigma + sigma.log1p()).sum()
        else:
            loss = per_task.sum()
        loss = loss + a.balance * balance_loss(more["scores"], a.topk)
        if a.routing == "token":
            loss = loss + (a.switch_coef * more["switch"] + a.prior_coef * more["prior"]).sum()
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        self.average_gradients([*self.wm.parameters(), self.sigma])
        norm = nn.utils.clip_grad_norm_(self.wm.parameters(), 1000.0)
        self.opt.step()
        self.updates += 1
        return {k: v.detach() for k, v in (losses | more).items()} | {"grad_norm": norm}

    def update_agent(self, z, act, first, I, generator):
        """One step of actor and critics on I roll-outs per task that start in windows of z (K, B, L, Z)."""
        a, (K, B, L, _) = self.args, z.shape
        tau = self.temperature()
        row = torch.randint(B, (K, I, 1), generator=generator).to(self.device)
        start = torch.randint(L - a.context + 1, (K, I, 1), generator=generator).to(self.device)
        steps = start + torch.arange(a.context, device=self.device)
        at = torch.arange(K, device=self.device)[:, None, None], row, steps
        self.wm.eval()
        with self.autocast():
            rolled = imagine(self.wm, self.actor, z[at], act[at], first[at], a.horizon, tau, self.imagine_step,
                             a.reset_mask, torch.bfloat16 if a.bf16 else None)
            loss, self.low, self.high, metrics = self.agent_loss(
                self.actor, self.critic, self.slow, self.wm.cluster_of, *rolled, self.low, self.high, a.gamma, a.lam,
                a.entropy, a.lambda_compat)
        self.low, self.high = self.average(torch.stack([self.low, self.high]))  # percentiles of parts, averaged
        self.agent_opt.zero_grad(set_to_none=True)
        loss.backward()
        self.average_gradients(self.agent_params)
        metrics["agent_grad_norm"] = nn.utils.clip_grad_norm_(self.agent_params, 100.0)
        self.agent_opt.step()
        torch._foreach_lerp_(list(self.slow.parameters()), list(self.critic.parameters()), 0.02)
        return metrics

    def update(self, frames, learn_to_act=True, task=None):
        """One update on a fresh batch of `frames`; what is random depends on the seed and the number of the update.
        task: a list of tasks, for the world model alone. Every process of torchrun draws the same batch, keeps its
        share of the sequences and has noise of its own."""
        a, seed = self.args, [self.args.seed, 1, self.updates]
        torch.manual_seed(draw_seed(*seed, self.rank))
        rng = np.random.default_rng(seed)

        def share(B, L):
            return [x[:, self.rank::self.world] for x in frames.sample(B, L, rng, self.device, task)]

        batch = share(a.batch, a.length)
        metrics = self.update_world(batch, task)
        z, act, first = metrics.pop("z"), batch[1], batch[4]
        if learn_to_act:
            if a.fresh_contexts:
                obs, act, _, _, first = share(a.rollouts, a.context)
                with torch.no_grad(), self.autocast():
                    z = sample_latent(self.wm.eval().posterior(to_images(obs), self.wm.embedding()))
            generator = torch.Generator().manual_seed(draw_seed(*seed, self.rank))
            metrics |= self.update_agent(z, act, first, a.rollouts // self.world, generator)
        return metrics

    def memory(self, R):
        """An empty window of past steps for R environments per task: past_z, past_a, n."""
        return (torch.zeros(self.K, R, self.window, self.Z, device=self.device),
                torch.zeros(self.K, R, self.window, self.A, device=self.device),
                torch.zeros(self.K, R, dtype=torch.long, device=self.device))

    def play(self, obs, memory, seed):
        """Actions (K, R, A) for numpy frames (K, R, 64, 64, 3), and the new memory."""
        torch.manual_seed(draw_seed(*seed))
        self.wm.eval()
        with self.autocast():
            action, *memory = self.act(self.wm, self.actor, torch.from_numpy(obs).to(self.device), *memory,
                                       self.temperature(), self.args.act_on_prior)
        return action.float().cpu().numpy(), memory

    @torch.no_grad()
    def spread(self, labels):
        """Give every task its cluster, and every cluster a copy of module 0 with its Adam moments: a fresh optimiser
        would take far too large first steps."""
        self.wm.assign(labels)
        for vae in self.wm.vaes[1:]:
            vae.load_state_dict(self.wm.vaes[0].state_dict())
            for p, q in zip(vae.parameters(), self.wm.vaes[0].parameters()):
                self.opt.state[p] = {k: v.clone() for k, v in self.opt.state[q].items()}
        for head, opt in ((self.wm.prior_head, self.opt), (self.wm.reward_head, self.opt), (self.wm.end_head, self.opt),
                          (self.critic, self.agent_opt), (self.slow, self.agent_opt)):
            for p in head.parameters():
                for x in [p, *(v for v in opt.state.get(p, {}).values() if v.ndim)]:
                    x.copy_(x[:1].expand_as(x))

    def state(self):
        """Everything that training changes, as plain values and tensors."""
        return {"wm": self.wm.state_dict(), "actor": self.actor.state_dict(), "critic": self.critic.state_dict(),
                "slow": self.slow.state_dict(), "opt": self.opt.state_dict(), "agent_opt": self.agent_opt.state_dict(),
                "sigma": self.sigma.detach(), "mean_loss": self.mean_loss, "low": self.low, "high": self.high,
                "updates": self.updates}

    def load_state(self, state):
        for name in ("wm", "actor", "critic", "slow", "opt", "agent_opt"):
            getattr(self, name).load_state_dict(state[name])
        self.wm.assign(self.wm.cluster_of.tolist())
        with torch.no_grad():
            self.sigma.copy_(state["sigma"])
        self.mean_loss, self.low, self.high, self.updates = (state[k] for k in ("mean_loss", "low", "high", "updates"))


def over_ranks(x):
    """x averaged over the processes of torchrun, with the gradient of the own x: gradients are averaged later."""
    mean = x.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size() + (x - x.detach())


def from_first(x):
    """What x is in the first process of torchrun."""
    box = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def draw_seed(*numbers):
    """One 63-bit seed out of several numbers. Random numbers that depend on (seed, step) alone need no saved state."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# --------------------------------------------------------------------------------------------------- warm-up, clusters
def task_gradients(agent, frames, batches=32):
    """Sketched gradients of every task's loss, averaged over batches: (K, layers, SKETCH), or (K, 1, layers) of means.

    Of the convolutions and linear layers of VAE and heads of module 0; without dropout, with the same noise for all."""
    wm, a = agent.wm.eval(), agent.args
    weights = [p for p in wm.vaes[0].parameters() if p.ndim > 1]
    stacked = [p for head in (wm.prior_head, wm.reward_head, wm.end_head) for p in head.parameters() if p.shape[1] > 1]
    out = []
    for k in range(agent.K):
        total = [torch.zeros_like(p) for p in weights + stacked]
        for i in range(batches):
            torch.manual_seed(draw_seed(a.seed, 2, i))
            batch = frames.sample(a.batch, a.length, np.random.default_rng([a.seed, 2, i]), agent.device, [k])
            losses, _ = world_model_loss(wm, *batch, agent.temperature(), 0.0, a.gate, a.reset_mask, [k])
            loss = total_loss(losses, a.task_coef).sum()
            torch._foreach_add_(total, list(torch.autograd.grad(loss, weights + stacked)))
        flat = [g.flatten().cpu() for g in total[:len(weights)]] + [g[0].flatten().cpu() for g in total[len(weights):]]
        out.append(torch.stack([g.mean() for g in flat])[None] if a.grad_reduce == "mean" else
                   torch.stack([sketch(g) for g in flat]))
    return torch.stack(out).numpy()


def random_actions(agent, rng):
    """Uniform legal actions (K, A)."""
    actor, out = agent.actor, np.zeros((agent.K, agent.A), np.float32)
    legal, n = actor.legal.cpu().numpy(), actor.n_disc
    for k, other in enumerate(actor.continuous.tolist()):
        if other:
            out[k, n:] = rng.uniform(-1, 1, agent.A - n)
        else:
            out[k, rng.choice(np.flatnonzero(legal[k]))] = 1
    return out


def find_clusters(agent, frames, note=print):
    """After the warm-up: cluster the tasks by their gradients, copy module 0 into every module -> what was found."""
    sim = task_similarity(grads := task_gradients(agent, frames))
    labels = from_first(cluster_tasks(grads, agent.args.clusters))
    agent.spread(labels)
    found = {"labels": labels, "similarity": sim.round(4).tolist(), "silhouette": silhouette(sim, labels)}
    note(f"clusters {labels}, silhouette {found['silhouette']:.3f}")
    return found


# --------------------------------------------------------------------------------------------------------------- play
class Player:
    """The training environments: one step of every task per sweep, into `frames`, while the caller trains."""

    def __init__(self, agent, fleet, frames):
        self.agent, self.fleet, self.frames, K = agent, fleet, frames, agent.K
        self.memory, self.first, self.finished = agent.memory(1), [True] * K, []
        self.episode, self.ret, self.success = [0] * K, [0.0] * K, [0.0] * K
        self.obs = None

    def seed(self, k, later=0):
        return draw_seed(self.agent.args.seed, 3, k, self.episode[k] + later) % 2**31

    def begin(self):
        """Start all episodes, or after a restart bring them back to where they were by playing the stored actions."""
        start = [self.frames.count if new else int(np.flatnonzero(f[:self.frames.count])[-1])
                 for new, f in zip(self.first, self.frames.first)]
        past = [[env_action(self.agent, a) for a in acts[s:self.frames.count]]
                for s, acts in zip(start, self.frames.act)]
        self.obs = np.stack(self.fleet.reset([self.seed(k) for k in range(len(past))], past))

    def send(self, sweep, random):
        """Choose and start one step in every environment."""
        seed = [self.agent.args.seed, 4, sweep]
        if random:
            self.action = random_actions(self.agent, np.random.default_rng(seed))
        else:
            action, self.memory = self.agent.play(self.obs[:, None], self.memory, seed)
            self.action = action[:, 0]
        self.fleet.send([env_action(self.agent, a) for a in self.action],
                        [self.seed(k, later=1) for k in range(len(self.obs))])

    def receive(self, sweep):
        """Store what came of it."""
        obs, rew, over, cut, info = zip(*self.fleet.receive())
        term = [end or i.get("life_lost", False) for end, i in zip(over, info)]
        self.frames.append(self.obs, self.action, rew, term, self.first)
        self.obs, self.first = np.stack(obs), [a or b for a, b in zip(over, cut)]
        for k, new in enumerate(self.first):
            self.ret[k] += rew[k]
            self.success[k] = max(self.success[k], info[k]["success"])
            if new:
                self.finished.append([sweep + 1, k, self.ret[k], self.success[k]])
                self.episode[k] += 1
                self.ret[k] = self.success[k] = 0.0
                self.memory[2][k] = 0
        if self.agent.world > 1:
            dist.barrier()

    def state(self):
        return {"memory": list(self.memory), "first": self.first, "finished": self.finished, "episode": self.episode,
                "ret": self.ret, "success": self.success, "count": self.frames.count}

    def load_state(self, state):
        self.frames.count = state["count"]
        for name in ("memory", "first", "finished", "episode", "ret", "success"):
            setattr(self, name, state[name])


class Follower:
    """The Player of the other processes of torchrun: waits until the first one has stored its step."""

    def __init__(self, frames):
        self.frames = frames

    def begin(self):
        pass

    def send(self, sweep, random):
        pass

    def receive(self, sweep):
        dist.barrier()
        self.frames.count = sweep + 1

    def load_state(self, state):
        self.frames.count = state["count"]


def env_action(agent, a):
    """What an environment takes: the number of a discrete action, or the continuous part of a (A,)."""
    n = agent.actor.n_disc
    return int(a[:n].argmax()) if n and a[:n].any() else a[n:]


def evaluate(agent, tasks, options, episodes, seed, video=None, pool=None):
    """Sampled actions in whole episodes -> per task [(return, success)], and the actions (K, n, A). One episode's
    frames go to video(task, ..). With a pool (K, n, A) the agent is blind: it draws from these actions, whatever it
    sees."""
    K, R = len(tasks), min(episodes, 4)
    quota = [episodes // R + (r < episodes % R) for r in range(R)]  # fixed per environment: no bias to short episodes
    seeds = np.array([[[draw_seed(seed, 5, k, r, i) % 2**31 for i in range(quota[r] + 1)] for r in range(R)]
                      for k in range(K)])
    played, ret, success = [[[] for _ in range(R)] for _ in tasks], np.zeros((K, R)), np.zeros((K, R))
    film, memory, taken = [[] for _ in tasks], agent.memory(R), []
    rng = np.random.default_rng([seed, 9])
    with Fleet([task for task in tasks for _ in range(R)], options) as fleet:
        obs = np.stack(fleet.reset(seeds[:, :, 0].flatten())).reshape(K, R, 64, 64, 3)
        while any(len(p) < q for row in played for p, q in zip(row, quota)):
            if pool is None:
                action, memory = agent.play(obs, memory, [seed, 6, len(taken)])
            else:
                action = np.stack([p[rng.integers(len(p), size=R)] for p in pool])
            taken.append(action)
            done = [[min(len(p) + 1, q) for p, q in zip(row, quota)] for row in played]
            fleet.send([env_action(agent, a) for a in action.reshape(K * R, -1)],
                       [seeds[k, r, done[k][r]] for k in range(K) for r in range(R)])
            for j, (frame, rew, over, cut, info) in enumerate(fleet.receive()):
                k, r = divmod(j, R)
                if video and r == 0 and not played[k][0]:
                    film[k].append(obs[k, 0].copy())
                obs[k, r], ret[k, r], success[k, r] = frame, ret[k, r] + rew, max(success[k, r], info["success"])
                if over or cut:
                    if len(played[k][r]) < quota[r]:
                        played[k][r].append((float(ret[k, r]), float(success[k, r])))
                    ret[k, r] = success[k, r] = memory[2][k, r] = 0
    for k, task in enumerate(tasks if video else ()):
        video(task, film[k])
    return [[x for p in row for x in p] for row in played], np.stack(taken, 1).reshape(K, -1, agent.A)


# ---------------------------------------------------------------------------------------------------------- diagnosis
def ssim(x, y):
    """Structural similarity of images (.., H, W) in [0, 1], the mean over pixels: (..). Local means and variances are
    weighted by a Gaussian of 1.5 pixels in windows of 11 that lie within the image (Wang et al., 2004)."""
    g = torch.exp(-torch.linspace(-5, 5, 11, device=x.device).square() / (2 * 1.5**2))
    g = g / g.sum()
    rows, cols = (torch.stack([F.pad(g, (i, n - 11 - i)) for i in range(n - 10)]) for n in x.shape[-2:])
    mx, my, xx, yy, xy = (rows @ m @ cols.T for m in (x, y, x * x, y * y, x * y))      # products are faster than conv2d
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
    """Distance of images (.., 3, H, W) in [0, 1] as in LPIPS (Zhang et al., 2018), in a network of fixed random weights
    instead of a trained one: squared difference of features of norm 1 per place, mean over places, sum over layers."""
    pair, out = torch.stack([x, y]).reshape(2, -1, *x.shape[-3:]) * 2 - 1, 0.0
    for kernel in random_filters(x.device):
        pair = F.relu(F.conv2d(pair.flatten(0, 1), kernel, stride=2, padding=1)).unflatten(0, (2, -1))
        a, b = F.normalize(pair, dim=2)
        out = out + (a - b).square().sum(1).mean((-2, -1))
    return out.view(x.shape[:-3])


@torch.no_grad()
def open_loop(agent, batch, context):
    """Real, reconstructed and imagined images (K, B, L, 3, 64, 64) for real actions, of which only the first `context`
    images are seen by the imagination."""
    obs, acts, _, _, first = batch
    wm, e = agent.wm.eval(), agent.wm.embedding()
    _, J, w = wm.routing(e, agent.temperature())
    gate, x, L = torch.ones_like(w), to_images(obs), obs.shape[2]
    z, pos = sample_latent(wm.posterior(x, e)), torch.arange(L, device=obs.device)
    mask, cache = episode_mask(first, pos), wm.new_cache(*obs.shape[:2], L, z)
    h = wm.sequence(z[:, :, :context], acts[:, :, :context], e, J, gate, mask[:, :, :context], pos[:context], cache)
    h, dream = h[:, :, -1:], [z[:, :, :context]]
    for t in range(context, L):
        dream.append(sample_onehot(wm.prior(h, e)).flatten(-2))
        h = wm.sequence(dream[-1], acts[:, :, t:t + 1], e, J, gate, mask[:, :, t:t + 1], pos[t:t + 1], cache)
    return x, wm.decode(z, e).clamp(0, 1), wm.decode(torch.cat(dream, 2), e).clamp(0, 1)


@torch.no_grad()
def fidelity(agent, frames, since=0, batches=8):
    """How good the world model is per task, on the frames from row `since` on: PSNR of reconstructions and of open-loop
    imagination, SSIM and `perceptual` distance of reconstructions, dynamics KL; how often the expert changes from token
    to token, and the mean number of tokens that keep one."""
    a, rows = agent.args, []
    for i in range(batches):
        torch.manual_seed(draw_seed(a.seed, 7, i))
        batch = frames.sample(a.batch, a.length, np.random.default_rng([a.seed, 7, i]), agent.device, since=since)
        real, rebuilt, dreamt = open_loop(agent, batch, a.context)
        losses, more = world_model_loss(agent.wm, *batch, agent.temperature(), 0.0, a.gate, a.reset_mask)
        psnr, dream = (-10 * (y - real).square().mean((-3, -2, -1)).clamp(min=1e-8).log10() for y in (rebuilt, dreamt))
        dream = dream[:, :, a.context:]
        rows.append(torch.stack([psnr.mean((1, 2)), ssim(rebuilt, real).mean((1, 2, 3)),
                                 perceptual(rebuilt, real).mean((1, 2)), dream.mean((1, 2)), more["dyn_raw"],
                                 losses["rec"], more.get("switch_rate", torch.zeros_like(more["dyn_raw"]))]))
    names = ("psnr", "ssim", "perceptual", "open_loop_psnr", "dyn_kl", "rec", "switch_rate")
    good = dict(zip(names, torch.stack(rows).mean(0)))
    good["run_length"] = a.length / (1 + (a.length - 1) * good["switch_rate"])
    return {name: x.tolist() for name, x in good.items()}


@torch.no_grad()
def routing_facts(agent):
    """Who uses what: scores S (K, experts), chosen experts, entropy of their use (nats), dead ones, I(task; expert)."""
    S, J, _ = agent.wm.routing(agent.wm.embedding(), agent.temperature())
    N = S.shape[1]
    chosen = F.one_hot(J, N).sum(1).double() / J.shape[1]                              # (K, N), p(expert | task)
    use = chosen.mean(0)

    def entropy(p):
        return -(p * p.clamp(min=1e-12).log()).sum(-1)

    return {"scores": S.tolist(), "chosen": J.tolist(), "usage_entropy": float(entropy(use)),
            "dead_experts": int((use == 0).sum()), "mutual_information": float(entropy(use) - entropy(chosen).mean())}


def figure(width, height, rows=1, cols=1):
    """A matplotlib figure and its axes, drawn without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.close("all")
    return plt.subplots(rows, cols, figsize=(width, height), layout="constrained", squeeze=False)


def plot_frames(agent, frames, tasks, path, columns=12):
    """Real, reconstructed and imagined images of one window per task."""
    a, L = agent.args, agent.args.length
    torch.manual_seed(draw_seed(a.seed, 8))
    batch = frames.sample(1, L, np.random.default_rng([a.seed, 8]), agent.device)
    images = torch.stack(open_loop(agent, batch, a.context))[:, :, 0].float().cpu()    # (3, K, L, 3, 64, 64)
    at = np.unique(np.linspace(0, L - 1, columns).round().astype(int))
    fig, axes = figure(0.85 * len(at) + 1.2, 2.75 * len(tasks), len(tasks))
    for k, task in enumerate(tasks):
        ax = axes[k, 0]
        tiles = images[:, k, at].permute(0, 3, 1, 4, 2)                                # (3, 64, columns, 64, 3)
        ax.imshow(tiles.reshape(3 * 64, -1, 3).numpy(), interpolation="nearest")
        ax.set_yticks([32, 96, 160], ["real", "rebuilt", "imagined"])
        ax.set_xticks(np.arange(len(at)) * 64 + 32, at + 1)
        ax.axvline(64 * int((at < a.context).sum()) - 0.5, color="white", lw=2)
        ax.tick_params(length=0)
        ax.set_title(f"{task}: imagination sees {a.context} images, then only actions", fontsize=9)
    axes[-1, 0].set_xlabel("step")
    fig.savefig(path, dpi=100)


def plot_routing(facts, labels, tasks, path):
    """Scores of the router, task x expert; the chosen ones are marked."""
    S = np.array(facts["scores"])
    K, N = S.shape
    fig, axes = figure(2.6 + 0.55 * N, 1.3 + 0.32 * K)
    ax = axes[0, 0]
    image = ax.imshow(S, cmap="Blues", vmin=0, vmax=max(1 / N, S.max()), aspect="auto")
    for k, chosen in enumerate(facts["chosen"]):
        for j in chosen:
            ax.text(j, k, f"{S[k, j]:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if S[k, j] > 0.6 * S.max() else "black")
    ax.set_yticks(range(K), [f"{t} ({c + 1})" for t, c in zip(tasks, labels)])
    ax.set_xticks(range(N), range(1, N + 1))
    ax.set(xlabel="expert (numbers: chosen)", ylabel="task (cluster)")
    fig.colorbar(image, label="router score")
    fig.savefig(path, dpi=120)


def plot_similarity(sim, labels, tasks, path):
    """Cosine of every two tasks' gradients, tasks in the order of their clusters, which are framed."""
    order = np.argsort(labels, kind="stable")
    fig, axes = figure(2.8 + 0.24 * len(tasks), 1.8 + 0.22 * len(tasks))
    off = sim[~np.eye(len(tasks), dtype=bool)]
    image = axes[0, 0].imshow(sim[np.ix_(order, order)], cmap="Blues", vmin=min(0, off.min()), vmax=off.max())
    names = [f"{tasks[k]} ({labels[k] + 1})" for k in order]
    axes[0, 0].set_yticks(range(len(tasks)), names, fontsize=8)
    axes[0, 0].set_xticks(range(len(tasks)), names, fontsize=8, rotation=90)
    edge = 0
    for c in sorted(set(labels)):
        n = labels.count(c)
        x = [edge - 0.5, edge + n - 0.5]
        axes[0, 0].plot([x[0], x[1], x[1], x[0], x[0]], [x[0], x[0], x[1], x[1], x[0]], color="C1", lw=1.5)
        edge += n
    fig.colorbar(image, label="cosine of gradients")
    fig.savefig(path, dpi=110)


def plot_curve(history, finished, tasks, path):
    """Losses of the world model over updates, and returns over agent steps."""
    fig, axes = figure(11, 3.4, 1, 3)
    for k, task in enumerate(tasks):
        color = f"C{k % 10}"
        x = [row["updates"] for row in history]
        axes[0, 0].semilogy(x, [row["rec"][k] for row in history], color=color, lw=1, label=task)
        axes[0, 1].plot(x, [row["dyn_raw"][k] for row in history], color=color, lw=1)
        mine = [(step, score(task, ret, won)) for step, j, ret, won in finished if j == k]
        if mine:
            step, y = np.array(mine).T
            width = min(len(y), 10)
            axes[0, 2].plot(step, y, ".", color=color, alpha=0.25, ms=3)
            axes[0, 2].plot(step[width - 1:], np.convolve(y, np.ones(width) / width, "valid"), color=color, lw=1.5)
    axes[0, 0].set(xlabel="updates", ylabel="reconstruction loss (summed squares)")
    axes[0, 1].set(xlabel="updates", ylabel="dynamics KL (nats)", ylim=(0, None))
    axes[0, 1].axhline(1, color="gray", ls="--", lw=1)
    axes[0, 1].text(0, 1.05, " free", color="gray", fontsize=8)
    axes[0, 2].set(xlabel="agent steps per task", ylabel="score of training episodes, mean of 10")
    axes[0, 2].axhline(0, color="gray", ls="--", lw=1)
    if len(tasks) <= 12:
        axes[0, 0].legend(fontsize=7)
    fig.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------------------- studies
def random_frames(args, tasks, run):
    """Random play of all tasks, the same for every cell of a study -> (frames, legal actions)."""
    with Fleet(tasks, task_options(args, tasks)) as fleet:
        agent = make_agent(args, tasks, fleet.legal, torch.device("cpu"))
        frames = Frames(run.dir / f"frames_{args.seed}", len(tasks), args.random_steps, agent.A)
        player = Player(agent, fleet, frames)
        player.begin()
        for sweep in range(args.random_steps):
            player.send(sweep, random=True)
            player.receive(sweep)
        return frames, fleet.legal


def cells(run, names, work):
    """{name: work(name)}; each is kept in a file of its own, so that a resumed study goes on where it was."""
    (run.dir / "cells").mkdir(exist_ok=True)
    out = {}
    for name in names:
        file = run.dir / "cells" / f"{name}.json"
        if not file.exists():
            began = time.time()
            write_text(file, json.dumps(work(name) | {"cell": name, "seconds": round(time.time() - began, 1)}))
        out[name] = json.loads(file.read_text())
    return out


def learn(agent, frames, until, run, phase, learn_to_act=False, task=None):
    """Updates on `frames` until there were so many."""
    log = Log(agent.args, agent, run, [])
    while agent.updates < until:
        metrics = agent.update(frames, learn_to_act, task)
        if agent.updates % 50 == 0 or agent.updates in (1, 10):
            log.note(metrics, frames.count, until - agent.updates, phase=phase)


def first_test_row(frames):
    """Studies test on the last fifth."""
    return frames.count * 4 // 5


@contextlib.contextmanager
def training_part(frames):
    """Hides the frames on which studies test."""
    n, frames.count = frames.count, first_test_row(frames)
    yield
    frames.count = n


def cluster_only(args, tasks, run):
    """Warm-up and clustering alone, for several seeds of data and networks: are clusters stable, and how long must the
    warm-up be? Silhouette and adjusted Rand index between seeds, and between half and all of the warm-up."""
    K = len(tasks)
    counts = sorted({n for n in (2, 3, 6, 12, 24) if n < K} | {args.clusters})

    def work(name):
        a = replace(args, seed=int(name))
        frames, legal = random_frames(a, tasks, run)
        agent, found = make_agent(a, tasks, legal, torch.device(a.device)), {}
        for share in ("half", "all"):
            learn(agent, frames, a.warmup if share == "all" else a.warmup // 2, run, f"seed {name}")
            grads = task_gradients(agent, frames)
            sim = task_similarity(grads)
            found[share] = {"similarity": sim.tolist(), "labels": {n: cluster_tasks(grads, n) for n in counts}}
            found[share]["silhouette"] = {n: silhouette(sim, labels) for n, labels in found[share]["labels"].items()}
        return found

    found = list(cells(run, [str(args.seed + i) for i in range(args.seeds)], work).values())
    rows = []
    for n in map(str, counts):
        labels = [f["all"]["labels"][n] for f in found]
        rows.append({"clusters": int(n), "silhouette": float(np.mean([f["all"]["silhouette"][n] for f in found])),
                     "ari_seeds": mean_ari([(p, q) for i, p in enumerate(labels) for q in labels[:i]]),
                     "ari_half_warmup": mean_ari([(f["half"]["labels"][n], f["all"]["labels"][n]) for f in found])})
    show(f"{len(found)} seeds, {args.warmup} updates", rows,
         {"clusters": "clusters", "silhouette": "silhouette", "ari_seeds": "ARI of seeds",
          "ari_half_warmup": "ARI, half the warm-up"})
    write_csv(run.dir / "results.csv", rows)
    labels = found[0]["all"]["labels"][str(args.clusters)]
    sim = np.mean([f["all"]["similarity"] for f in found], 0)
    plot_similarity(sim, labels, tasks, run.dir / "clusters.png")
    for c in sorted(set(labels)):
        print(f"cluster {c + 1} (seed {args.seed}): {', '.join(t for t, label in zip(tasks, labels) if label == c)}")
    return {"args": asdict(args), "rows": rows, "seeds": found}


def mean_ari(pairs):
    """Mean adjusted Rand index of pairs of labelings, None if there are none."""
    return float(np.mean([adjusted_rand(p, q) for p, q in pairs])) if pairs else None


def study_cells(args, K, A):
    """Variants of one study: {name: changed arguments}. `random` in a name: tasks in random clusters of equal size."""
    if args.experiment == "clusters":
        counts = [n for n in (1, 2, 3, 6, 12) if n <= K]
        return ({f"clusters{n}": dict(clusters=n) for n in counts}
                | {f"clusters{n}random": dict(clusters=n) for n in counts if 1 < n < K})
    if args.experiment == "experts":
        return ({f"experts{n}": dict(experts=n) for n in (3, 6, 12)}
                | {"no_balance": dict(balance=0.0), "gate_none": dict(gate="none"), "no_shared": dict(shared_layers=0),
                   "no_task_loss": dict(task_coef=0.0), "harmony_off": dict(harmony="off")})
    if args.experiment == "tokens":
        task = dict(experts=4, topk=1, routing="task", segment=1, switch_coef=0.0, prior_coef=0.0)
        token = task | dict(routing="token")
        return {"task": task, "token": token, "segment8": token | dict(segment=8),
                "segment16": token | dict(segment=16), "switch_penalty": token | dict(switch_coef=0.1),
                "task_prior": token | dict(prior_coef=0.1)}
    one = dict(clusters=1, experts=1, topk=1)  # monoliths: widen the Transformers until parameters or products agree
    widths = [args.heads * i for i in range(1, 1 + 16 * args.width // args.heads)]

    def closest(cost):
        target = cost(args)
        return min(widths, key=lambda w: abs(cost(replace(args, **one, width=w)) - target))

    return {"mow": {}, "monolith": one,
            "monolith_flops": one | dict(width=closest(lambda a: sum(products(a, A).values()))),
            "monolith_params": one | dict(width=closest(lambda a: parameters(a, K, A)))}


def compare(args, tasks, run):
    """--experiment clusters, experts, monolith, tokens: world models on the same random play, judged on its last fifth.
    Every cell has the same number of updates; no agent is trained."""
    played = functools.lru_cache(maxsize=1)(lambda seed: random_frames(replace(args, seed=seed), tasks, run))

    def work(name):
        variant, seed = name.rsplit("_s", 1)
        frames, legal = played(int(seed))
        a = replace(args, seed=int(seed), **variants[variant])
        agent = make_agent(a, tasks, legal, torch.device(a.device))
        with training_part(frames):
            learn(agent, frames, a.warmup, run, name)
            if "random" in name:
                agent.spread(np.random.default_rng(int(seed)).permutation(np.arange(len(tasks)) % a.clusters))
            elif a.clusters > 1:
                find_clusters(agent, frames)
            learn(agent, frames, total_updates(a), run, name)
        facts = {} if args.experiment == "tokens" else routing_facts(agent)
        return fidelity(agent, frames, first_test_row(frames)) | facts | {
            "variant": variant, "labels": list(agent.wm.labels), "drop_one": drop_one(agent, frames),
            "parameters": sum(p.numel() for p in agent.wm.parameters()),
            "products": sum(products(a, agent.A).values())}

    A = (18 if any(t not in METAWORLD50 for t in tasks) else 0) + (4 if any(t in METAWORLD50 for t in tasks) else 0)
    variants = study_cells(args, len(tasks), A)
    found = cells(run, [f"{v}_s{args.seed + i}" for i in range(args.seeds) for v in variants], work)
    own = ({"switch_rate": "switch rate", "run_length": "run length"} if args.experiment == "tokens" else
           {"dead_experts": "dead", "mutual_information": "I(task;expert)", "usage_entropy": "usage entropy"})
    rows = over_seeds(found, ("psnr", "ssim", "open_loop_psnr", "dyn_kl", *own), ("parameters", "products"))
    write_csv(run.dir / "results.csv", rows)
    show(f"{args.experiment}, {args.seeds} seeds, {total_updates(args)} updates, held-out random play", rows,
         {"variant": "variant", "parameters": "parameters", "psnr": "PSNR", "ssim": "SSIM",
          "open_loop_psnr": "open loop", "open_loop_psnr_sd": "+-", "dyn_kl": "KL", **own})
    return {"args": asdict(args), "rows": rows, "cells": found}


def show(title, rows, columns):
    """Print the columns {key: heading} of a study's table."""
    print(f"\n{title}")
    text = [list(columns.values())] + [[x if isinstance(x, str) else cell(x, 0, 0 if isinstance(x, int) else 3)
                                        for x in (r[key] for key in columns)] for r in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    for line in text:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))))


def over_seeds(found, numbers, same=()):
    """A row per variant of the cells `found`: mean over tasks and seeds and standard deviation over seeds of `numbers`
    (None if one seed has none), and what is the `same` for all seeds."""
    rows = []
    for v in dict.fromkeys(f["variant"] for f in found.values()):
        mine = [f for f in found.values() if f["variant"] == v]
        row = {"variant": v} | {x: mine[0][x] for x in same}
        for x in numbers:
            values = [] if any(f[x] is None for f in mine) else [float(np.mean(f[x])) for f in mine]
            row |= {x: float(np.mean(values)) if values else None,
                    f"{x}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
        rows.append(row)
    return rows


FROZEN = {  # variants of --experiment transfer: parts of the world model that do not learn the new task
    "scratch": (), "all": (), "freeze_experts": ("mix", "experts"), "freeze_vae": ("vaes",),
    "new_cluster": ("mix", "experts", "router", "token_router", "join", "shared")}


def transfer(args, tasks, run):
    """--experiment transfer: a world model of all tasks but the last learns that last, new task. Measured on held-out
    random play of both: losses of the world model, not returns.

    The new task gets an embedding and joins the old cluster whose modules fit it best; all of the model learns, or all
    but the experts, or all but the VAE. new_cluster: modules of its own, as they were after the warm-up, while all that
    tasks share is frozen. scratch: the same sizes, never trained on the old tasks."""
    new, total = len(tasks) - 1, total_updates(args)
    old, budget = list(range(new)), total // 2
    args = replace(args, clusters=min(args.clusters, new) + 1)  # the last is for the new task

    @functools.lru_cache(maxsize=1)
    def pretrained(seed):
        """Random play of all tasks, the model of the old ones and the cluster for the new one."""
        a = replace(args, seed=seed)
        frames, legal = random_frames(a, tasks, run)
        agent, spare = make_agent(a, tasks, legal, torch.device(a.device)), a.clusters - 1
        with training_part(frames):
            learn(agent, frames, a.warmup, run, f"old tasks, seed {a.seed}", task=old)
            agent.spread(cluster_tasks(task_gradients(agent, frames)[old], spare) + [spare])
            learn(agent, frames, total, run, f"old tasks, seed {a.seed}", task=old)
            labels, fit = agent.wm.labels[:new], []
            for c in range(spare):
                agent.wm.assign([*labels, c])
                fit += held_out_loss(agent, frames, [new])
        return frames, legal, agent.wm.state_dict(), [*labels, int(np.argmin(fit))]

    def work(name):
        variant, seed = name.rsplit("_s", 1)
        frames, legal, model, labels = pretrained(int(seed))
        a = replace(args, seed=int(seed), balance=0.0, task_coef=0.0)  # terms that compare tasks
        agent = make_agent(a, tasks, legal, torch.device(a.device))
        if variant != "scratch":
            agent.wm.load_state_dict(model)
            agent.updates = total  # the router's temperature has fallen
        agent.wm.assign(labels[:new] + [a.clusters - 1 if variant == "new_cluster" else labels[new]])
        for part, p in agent.wm.named_parameters():
            p.requires_grad_(not part.startswith(FROZEN[variant]))
        steps, curve, test = np.linspace(0, budget, 11).round().astype(int).tolist(), [], first_test_row(frames)
        before, start = held_out_loss(agent, frames, old, test), agent.updates
        for step in steps:
            with training_part(frames):
                learn(agent, frames, start + step, run, name, task=[new])
            curve += held_out_loss(agent, frames, [new], test)
        forgot = np.array(held_out_loss(agent, frames, old, test)) / before - 1
        good = {x: v[new] for x, v in fidelity(agent, frames, test).items()}
        return good | {"variant": variant, "seed": int(seed), "updates": steps, "loss": curve,
                       "forgetting": None if variant == "scratch" else forgot.tolist(), "cluster": agent.wm.labels[new]}

    found = cells(run, [f"{v}_s{args.seed + i}" for i in range(args.seeds) for v in FROZEN], work)
    against_scratch(found, budget)
    rows = over_seeds(found, ("zero_shot", "final", "auc_ratio", "until_scratch", "psnr", "ssim", "open_loop_psnr",
                              "dyn_kl", "forgetting"))
    write_csv(run.dir / "results.csv", rows)
    plot_transfer(found, f"updates on {tasks[new]}", run.dir / "transfer.png")
    show(f"{tasks[new]} after {', '.join(tasks[:new])}: {args.seeds} seeds, {total} updates before, {budget} on the "
         "new task; held-out random play. Until scratch: share of the updates until as good as scratch's end", rows,
         {"variant": "variant", "zero_shot": "first loss", "final": "last loss", "auc_ratio": "area / scratch",
          "auc_ratio_sd": "+-", "until_scratch": "until scratch", "open_loop_psnr": "open loop", "ssim": "SSIM",
          "dyn_kl": "KL", "forgetting": "change of old tasks"})
    return {"args": asdict(args), "rows": rows, "cells": found}


def against_scratch(found, budget):
    """Add to every cell how its curve of losses compares with that of the cell `scratch` of its seed: first and last
    loss, ratio of the areas, share of the budget until it is as good as scratch's end (None: never)."""
    for f in found.values():
        scratch = found[f"scratch_s{f['seed']}"]["loss"]
        reached = [u for u, x in zip(f["updates"], f["loss"]) if x <= scratch[-1]]
        f |= {"zero_shot": f["loss"][0], "final": f["loss"][-1], "auc_ratio": sum(f["loss"][1:]) / sum(scratch[1:]),
              "until_scratch": reached[0] / budget if reached else None}


def pretrain(args, tasks, run):
    """--experiment pretrain: what is play without rewards worth once rewards come? A world model of all tasks first
    learns images and dynamics only (`reward_free`), or rewards as well (`rewards`), or nothing (`scratch`); then all
    three learn everything for half as many updates. One cluster, measured on held-out random play."""
    total = total_updates(args)
    budget, every = total // 2, list(range(len(tasks)))
    args = replace(args, clusters=1, warmup=total, steps=args.random_steps)
    played = functools.lru_cache(maxsize=1)(lambda seed: random_frames(replace(args, seed=seed), tasks, run))

    def work(name):
        variant, seed = name.rsplit("_s", 1)
        frames, legal = played(int(seed))
        a, test = replace(args, seed=int(seed), reward_free=variant == "reward_free"), first_test_row(frames)
        agent = make_agent(a, tasks, legal, torch.device(a.device))
        with training_part(frames):
            learn(agent, frames, 0 if variant == "scratch" else total, run, f"{name}, before")
        agent.args = replace(a, reward_free=False)
        steps, losses, scores, start = np.linspace(0, budget, 11).round().astype(int).tolist(), [], [], agent.updates
        for step in steps:
            with training_part(frames):
                learn(agent, frames, start + step, run, name)
            losses.append(float(np.mean(held_out_loss(agent, frames, every, test))))
            scores.append(float(np.mean(held_out_loss(agent, frames, every, test, only=("rew", "end")))))
        return fidelity(agent, frames, test) | {"variant": variant, "seed": int(seed), "updates": steps, "loss": losses,
                                                "scores": scores, "scores_first": scores[0], "scores_last": scores[-1]}

    found = cells(run, [f"{v}_s{args.seed + i}" for i in range(args.seeds)
                        for v in ("scratch", "rewards", "reward_free")], work)
    against_scratch(found, budget)
    rows = over_seeds(found, ("zero_shot", "final", "auc_ratio", "until_scratch", "scores_first", "scores_last", "psnr",
                              "ssim", "open_loop_psnr", "dyn_kl"))
    write_csv(run.dir / "results.csv", rows)
    plot_transfer(found, "updates with rewards", run.dir / "pretrain.png")
    show(f"{', '.join(tasks)}: {args.seeds} seeds, {total} updates before, {budget} with rewards; held-out random "
         "play. Until scratch: share of the updates until as good as scratch's end", rows,
         {"variant": "variant", "zero_shot": "first loss", "final": "last loss", "auc_ratio": "area / scratch",
          "auc_ratio_sd": "+-", "until_scratch": "until scratch", "scores_first": "first, rewards and ends",
          "scores_last": "last", "open_loop_psnr": "open loop", "ssim": "SSIM", "dyn_kl": "KL"})
    return {"args": asdict(args), "rows": rows, "cells": found}


@torch.no_grad()
def held_out_loss(agent, frames, task, since=0, batches=8, only=None):
    """L_k of the tasks in the list, or the sum of some of its terms, on the frames from row `since` on."""
    a, out = agent.args, []
    for i in range(batches):
        torch.manual_seed(draw_seed(a.seed, 9, i))
        batch = frames.sample(a.batch, a.length, np.random.default_rng([a.seed, 9, i]), agent.device, task, since)
        losses, _ = world_model_loss(agent.wm.eval(), *batch, agent.temperature(), 0.0, a.gate, a.reset_mask, task)
        out.append(total_loss({k: x for k, x in losses.items() if k in (only or losses)}, a.task_coef))
    return torch.stack(out).mean(0).tolist()


def plot_transfer(found, label, path):
    """Held-out loss over updates, mean over seeds."""
    fig, axes = figure(6, 4)
    for variant in dict.fromkeys(f["variant"] for f in found.values()):
        mine = [f for f in found.values() if f["variant"] == variant]
        axes[0, 0].semilogy(mine[0]["updates"], np.mean([f["loss"] for f in mine], 0), label=variant, marker=".",
                            ls="--" if variant.startswith("freeze") else "-")
    axes[0, 0].set(xlabel=label, ylabel="held-out loss of the world model")
    axes[0, 0].legend(fontsize=8)
    fig.savefig(path, dpi=120)


SHARPNESS = {"psnr": "PSNR", "ssim": "SSIM", "perceptual": "distance"}


def sharpness(args, tasks, run):
    """--experiment fidelity: does a sharper VAE give the actor a steadier gradient? One VAE for all tasks, its width
    and its latents vary, the dynamics do not; world model, actor and critic learn on random play. At five checkpoints,
    per task: how good held-out reconstructions are (SHARPNESS), and the gradient's noise in imagination."""
    played = functools.lru_cache(maxsize=1)(lambda seed: random_frames(replace(args, seed=seed), tasks, run))
    c, n = args.stem, args.latents
    variants = ({f"stem{i}": dict(stem=i) for i in (c // 2, c, 2 * c)}
                | {f"latents{i}": dict(latents=i, classes=i) for i in (n // 2, 2 * n)})

    def work(name):
        variant, seed = name.rsplit("_s", 1)
        frames, legal = played(int(seed))
        a, points, test = replace(args, seed=int(seed), clusters=1, **variants[variant]), [], first_test_row(frames)
        agent = make_agent(a, tasks, legal, torch.device(a.device))
        for i in range(1, 6):
            with training_part(frames):
                learn(agent, frames, total_updates(a) * i // 5, run, name, learn_to_act=True)
            points.append(fidelity(agent, frames, test) | {"noise": gradient_noise(agent, frames, test)})
        return {"variant": variant, "points": points} | {x: points[-1][x] for x in (*SHARPNESS, "noise")}

    found = cells(run, [f"{v}_s{args.seed + i}" for i in range(args.seeds) for v in variants], work)
    rows = over_seeds(found, (*SHARPNESS, "noise"))
    rows.append(dict.fromkeys(rows[0]) | {"variant": "all together"})
    for row in rows:
        mine = [p for f in found.values() if row["variant"] in (f["variant"], "all together") for p in f["points"]]
        for x in SHARPNESS:
            row[f"rho_{x}"] = rank_correlation([p[x] for p in mine], [p["noise"] for p in mine])
    write_csv(run.dir / "results.csv", rows)
    plot_sharpness(found, run.dir / "fidelity.png")
    show(f"fidelity, {args.seeds} seeds, {total_updates(args)} updates; noise of the actor's gradient and its rank "
         "correlation with PSNR, SSIM and perceptual distance over tasks, checkpoints and seeds", rows,
         {"variant": "variant", **SHARPNESS, "noise": "noise", "noise_sd": "+-",
          **{f"rho_{x}": f"rho with {name}" for x, name in SHARPNESS.items()}})
    return {"args": asdict(args), "rows": rows, "cells": found}


def rank_correlation(x, y):
    """Spearman's rho of all numbers in two lists of lists; None where one of them is constant."""
    from scipy.stats import spearmanr
    return None if 0 in (np.ptp(x), np.ptp(y)) else float(spearmanr(np.ravel(x), np.ravel(y)).statistic)


def gradient_noise(agent, frames, since, parts=8, rollouts=1024):
    """tr Cov / |mean|^2 of the actor's gradient for each task, over the parts of one batch of imagined roll-outs. It is
    near `parts` where there is only noise: the mean of n parts has 1/n of their variance. So the batch is large."""
    a, wm, out = agent.args, agent.wm.eval(), []
    torch.manual_seed(draw_seed(a.seed, 10))
    obs, acts, _, _, first = frames.sample(rollouts, a.context, np.random.default_rng([a.seed, 10]), agent.device,
                                           since=since)
    with torch.no_grad():
        z = sample_latent(wm.posterior(to_images(obs), wm.embedding()))
    rolled = imagine(wm, agent.actor, z, acts, first, a.horizon, agent.temperature(), reset_mask=a.reset_mask)
    for k in range(agent.K):
        one, actor = slice(k, k + 1), copy.deepcopy(agent.actor)
        actor.legal, actor.continuous = actor.legal[one], actor.continuous[one]
        grads = []
        for i in range(parts):
            part = [x[one, i::parts] for x in rolled]
            loss, *_ = agent_loss(actor, agent.critic, agent.slow, wm.cluster_of[one], *part, agent.low[one],
                                  agent.high[one], a.gamma, a.lam, a.entropy, a.lambda_compat)
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(actor.parameters()))]))
        grads = torch.stack(grads)
        out.append(float(grads.var(0).sum() / grads.mean(0).square().sum()))
    return out


def plot_sharpness(found, path):
    """Noise of the actor's gradient over PSNR: a point per task, checkpoint and seed."""
    fig, axes = figure(6, 4)
    for variant in dict.fromkeys(f["variant"] for f in found.values()):
        points = [p for f in found.values() if f["variant"] == variant for p in f["points"]]
        axes[0, 0].semilogy(np.ravel([p["psnr"] for p in points]), np.ravel([p["noise"] for p in points]), ".",
                            label=variant)
    axes[0, 0].set(xlabel="PSNR of held-out reconstructions (dB)", ylabel="tr Cov / |mean|$^2$ of the actor's gradient")
    axes[0, 0].legend(fontsize=8)
    fig.savefig(path, dpi=120)


@torch.no_grad()
def drop_one(agent, frames):
    """How much each task's dynamics KL rises when one expert's output is zero: (experts, K)."""
    base, out = np.array(fidelity(agent, frames, batches=4)["dyn_kl"]), []
    last = agent.wm.experts.blocks[-1].norm2
    for j in range(agent.args.experts):
        kept = last.gain[j].clone(), last.shift[j].clone()
        last.gain[j], last.shift[j] = 0.0, 0.0
        out.append((np.array(fidelity(agent, frames, batches=4)["dyn_kl"]) - base).tolist())
        last.gain[j], last.shift[j] = kept
    return out


def parameters(args, K, A):
    """Parameters of the world model, without making it."""
    with torch.device("meta"):
        wm = WorldModel(K, A, args.clusters, args.experts, args.topk, args.emb, args.stem, args.latents, args.classes,
                        args.width, args.heads, args.expert_layers, args.shared_layers, args.hidden, args.norm,
                        args.segment if args.routing == "token" else 0)
    return sum(p.numel() for p in wm.parameters())


def products(args, A):
    """Multiply-adds per frame: {encoder, decoder, dynamics, heads}; one is two floating-point operations."""
    c, D, E, Z, H = args.stem, args.width, args.emb, args.latents * args.classes, args.hidden
    n = args.experts if args.routing == "token" else args.topk
    layers = (3, c, 32), (c, 2 * c, 16), (2 * c, 4 * c, 8), (4 * c, 8 * c, 4)           # channels in, out, side
    convs = sum(16 * i * o * side**2 for i, o, side in layers)
    linear, block = (128 * c + E) * Z, 8 * D * D + 2 * args.length * D
    shared = ((args.topk * D + E) * D if args.shared_layers or args.topk > 1 else 0) + args.shared_layers * block
    return {"encoder": convs + linear, "decoder": convs + linear,
            "dynamics": n * ((Z + A + E) * D + D * D + args.expert_layers * block) + shared,
            "heads": (D + E) * (Z + 2 * H) + 2 * H * H + (BINS + 1) * H}


def work_of_update(args, A):
    """Floating-point operations of one update, per task; a backward pass costs two forward passes."""
    p, H = products(args, A), args.hidden
    frames, steps = args.batch * args.length, args.rollouts * (args.context + args.horizon + 1)
    agent = (args.latents * args.classes + args.width + args.emb) * H + H * H
    encode = args.rollouts * args.context * p["encoder"] if args.fresh_contexts else 0
    acting = args.rollouts * (args.horizon + 1) * (3 * 2 * agent + agent + A * H + 3 * BINS * H)
    return 2 * (3 * frames * sum(p.values()) + encode + steps * (p["dynamics"] + p["heads"]) + acting)


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


def cost(args, tasks, run):
    """--experiment cost: time of an update against tasks and experts, batched experts and critics against a loop,
    acting, and an estimate of whole runs. The images are noise: time does not depend on them."""
    device, names = torch.device(args.device), [*tasks, *(t for t in ATARI26 if t not in tasks)]

    def make(K, **more):
        a = replace(args, clusters=min(args.clusters, K), **more)
        agent = make_agent(a, names[:K], [list(range(18))] * K, device)
        agent.wm.assign([k % a.clusters for k in range(K)])
        frames = Frames(run.dir / f"frames_{K}", K, 2 * args.length, agent.A)
        if not frames.obs.any():
            frames.obs[:] = np.random.default_rng(0).integers(0, 256, frames.obs.shape, np.uint8)
            frames.act[:, :, 0] = 1
        frames.count = 2 * args.length
        return agent, frames

    def one(name):
        kind, n = name.split("_")
        agent, frames = make(int(n)) if kind == "tasks" else make(6, experts=int(n), topk=min(args.topk, int(n)))
        ms, memory = milliseconds(lambda: agent.update(frames), device), agent.memory(1)
        obs, flops = frames.obs[:, :1].copy(), work_of_update(agent.args, agent.A) * agent.K
        row = {"update_ms": ms, "act_ms": milliseconds(lambda: agent.play(obs, memory, [0]), device),
               "gflop": flops / 1e9, "gflop_per_s": flops / ms / 1e6, "tasks": agent.K, "experts": agent.args.experts}
        return row | (looped(agent, frames) if name in ("tasks_6", "tasks_12") else {})

    rows = list(cells(run, [f"{kind}_{n}" for kind in ("tasks", "experts") for n in (1, 3, 6, 12)], one).values())
    print(f"\n{'cell':12}{'update ms':>11}{'acting ms':>11}{'GFLOP':>9}{'GFLOP/s':>9}   batched / looped ms")
    for r in rows:
        print(f"{r['cell']:12}{r['update_ms']:11.1f}{r['act_ms']:11.1f}{r['gflop']:9.2f}{r['gflop_per_s']:9.1f}"
              + (f"   Transformers {r['experts_ms']:.1f} / {r['experts_looped_ms']:.1f}, critics "
                 f"{r['critics_ms']:.2f} / {r['critics_looped_ms']:.2f}" if "experts_ms" in r else ""))
    rate, plans = max(r["gflop_per_s"] for r in rows), []
    for preset in PRESETS:
        a = fill(replace(Args(task="atari26", preset=preset), device=args.device), list(ATARI26))
        each, updates = work_of_update(a, 18), a.steps // a.train_every
        plans.append({"preset": preset, "parameters": parameters(a, 26, 18), "gflop_per_task_update": each / 1e9,
                      "updates": updates, "exaflop": 26 * each * updates / 1e18,
                      "hours_at_measured_rate": 26 * each * updates / (rate * 1e9) / 3600})
        p = plans[-1]
        print(f"estimate for all 26 games, {preset}: {p['parameters'] / 1e6:.1f}M parameters, {updates:,} updates, "
              f"{p['exaflop']:.3g} EFLOP, {p['hours_at_measured_rate']:,.1f} h at the best rate above ({rate:,.0f} "
              "GFLOP/s; larger sizes usually reach more)")
    write_csv(run.dir / "results.csv", [{k: r.get(k) for k in rows[2]} for r in rows])
    return {"args": asdict(args), "rows": rows, "estimates": plans}


@torch.no_grad()
def looped(agent, frames):
    """Experts and critics in one product, and task by task: milliseconds of a forward pass."""
    wm, a, device, K = agent.wm.eval(), agent.args, agent.device, agent.K
    e, pos = wm.embedding(), torch.arange(a.length, device=device)
    _, J, w = wm.routing(e, agent.temperature())
    z, acts = (torch.zeros(K, a.batch, a.length, i, device=device) for i in (agent.Z, agent.A))
    mask = episode_mask(z[..., 0] > 0, pos)
    x = torch.zeros(K, a.rollouts * a.horizon, agent.Z + a.width + a.emb, device=device)
    each = [slice(k, k + 1) for k in range(K)]

    def ms(f):
        return milliseconds(f, device, 20)

    return {"experts_ms": ms(lambda: wm.sequence(z, acts, e, J, w, mask, pos)),
            "experts_looped_ms": ms(
                lambda: [wm.sequence(*(x[k] for x in (z, acts, e, J, w, mask)), pos) for k in each]),
            "critics_ms": ms(lambda: agent.critic(x, wm.cluster_of)),
            "critics_looped_ms": ms(lambda: [agent.critic(x[k], wm.cluster_of[k]) for k in each])}


# ---------------------------------------------------------------------------------------------------------------- main
def task_list(text):
    """Names of tasks from a set or a list with commas. SystemExit: an unknown one, with the nearest names."""
    sets = {"atari26": ATARI26, "mt10": MT10, "mt50": METAWORLD50}
    tasks = [t for name in text.split(",") for t in sets.get(name.strip(), (name.strip(),))]
    for task in tasks:
        if task not in METAWORLD50 and task.partition("@")[0] not in ATARI26:
            near = difflib.get_close_matches(task, [*ATARI26, *METAWORLD50, *sets], 3, 0.4)
            raise SystemExit(f"--task {task!r} is unknown: expected a game of the Atari-100k benchmark (Boxing), a "
                             f"Meta-World task (mw-reach), atari26, mt10 or mt50; nearest: {', '.join(near) or 'none'}")
    if len(set(tasks)) < len(tasks):
        raise SystemExit(f"--task {text} names {max(tasks, key=tasks.count)} twice: name every task once")
    return tasks


def fill(args, tasks):
    """Values for all flags that were left out. SystemExit: a combination that cannot work."""
    K, kinds = len(tasks), {t not in METAWORLD50 for t in tasks}
    if len(kinds) > 1 and not args.mix_actions:
        raise SystemExit(f"--task {args.task} mixes discrete (Atari) and continuous (Meta-World) actions: type "
                         "--mix-actions to give every task one action vector with room for both")
    preset = args.preset if args.preset != "auto" else "mid" if args.device == "cuda" else "smoke"
    values = dict(PRESETS[preset], norm="gn" if K > 1 else "bn")
    if preset == "full" and K == 1:
        values["rollouts"] = 1024
    if not any(kinds) and preset == "full":
        values["steps"] = 300_000
    values["clusters"] = min(values["clusters"], K)
    if args.storm:
        if K > 1:
            raise SystemExit(f"--storm is the single-task baseline, but --task names {K} tasks: name one, or leave "
                             "--storm out")
        values.update(clusters=1, experts=1, topk=1, emb=0, shared_layers=0, warmup=0)
        args = replace(args, harmony="off", reset_mask=False)
    if args.routing == "token":
        values["topk"] = 1
    elif args.segment != 1 or args.switch_coef or args.prior_coef:
        raise SystemExit("--segment, --switch-coef and --prior-coef are for experts per token: add --routing token")
    if args.experts is not None and args.topk is None:
        values["topk"] = min(values["topk"], args.experts)
    args = replace(args, preset=preset, **{k: v for k, v in values.items() if getattr(args, k) is None})
    if args.clusters > K:
        raise SystemExit(f"--clusters {args.clusters} for {K} task{'s' * (K > 1)}: expected at most one cluster per "
                         f"task; type --clusters {K} or less")
    if args.routing == "token" and (args.topk > 1 or args.experts == 1):
        raise SystemExit(f"--routing token gives every token one of several experts, not --topk {args.topk} of "
                         f"--experts {args.experts}: type --experts 2 or more and leave --topk out")
    if args.topk > args.experts:
        raise SystemExit(f"--topk {args.topk} of {args.experts} experts: expected at most --experts; type --topk "
                         f"{args.experts} or less")
    low = [f.name for f in fields(args) if isinstance(v := getattr(args, f.name), int) and v < (
        0 if f.name in ("emb", "shared_layers", "warmup", "noop", "seed") or isinstance(v, bool) else 1)]
    if low:
        raise SystemExit(f"--{low[0].replace('_', '-')} {getattr(args, low[0])}: expected a positive number")
    if args.random_steps < args.length or args.length < args.context + 1 or args.steps < args.random_steps:
        raise SystemExit(f"expected --context {args.context} < --length {args.length} <= --random-steps "
                         f"{args.random_steps} <= --steps {args.steps}: windows are drawn from the random steps first")
    if args.experiment not in (None, "cost") and args.random_steps < 5 * (args.length + 1):
        raise SystemExit(f"--experiment {args.experiment} tests on the last fifth of --random-steps "
                         f"{args.random_steps}, which holds no window of --length {args.length}: type --random-steps "
                         f"{5 * args.length + 5} or more")
    if args.context + args.horizon > args.length:
        raise SystemExit(f"--context {args.context} + --horizon {args.horizon} steps are more than --length "
                         f"{args.length}: imagination would reach positions that the world model never learned; type "
                         f"--length {args.context + args.horizon} or more")
    if args.experiment == "transfer" and K == 1:
        raise SystemExit("--experiment transfer learns the last task after the others: give --task two or more, the "
                         "new one last")
    if args.reward_free and (not args.warmup or args.checkpoint):
        raise SystemExit("--reward-free changes the warm-up, and there is none: leave --checkpoint out and type "
                         "--warmup 1000, or how many updates it shall have")
    if args.width % args.heads:
        raise SystemExit(f"--width {args.width} is no multiple of --heads {args.heads}: choose --heads that divides it")
    return args


def task_options(args, tasks):
    """Keyword arguments of make_env for every task."""
    atari = dict(sticky=args.sticky, life_loss=args.life_loss, noop=args.noop, frame_cap=args.frame_cap)
    return {t: dict(camera="corner4", repeat=1, length=500) if t in METAWORLD50 else atari for t in tasks}


def make_agent(args, tasks, legal, device):
    """An agent for environments that report the actions `legal` (None: continuous)."""
    n_disc = 18 if any(x is not None for x in legal) else 0
    mask = torch.zeros(len(tasks), n_disc, dtype=torch.bool)
    for k, x in enumerate(legal):
        mask[k, x if x is not None and args.action_space == "masked" else list(range(n_disc))] = True
    continuous = torch.tensor([x is None for x in legal])
    return Agent(args, mask, continuous, 4 if continuous.any() else 0, device)


def announce(args, agent, frames, folder):
    """What was chosen, before anything long begins."""
    def millions(m):
        return f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f}M"

    print(f"{'STORM' if args.storm else 'MoW'} on {agent.K} task{'s' * (agent.K > 1)} ({args.task}), seed {args.seed}, "
          f"{agent.device}{f' x {agent.world} processes' * (agent.world > 1)}, "
          f"{'bfloat16' if args.bf16 else 'float32'}, {'compiled' if args.compile else 'eager'}, run folder {folder}")
    print(f"preset {args.preset}: {args.clusters} clusters, {args.topk} of {args.experts} experts, latent "
          f"{args.latents} x {args.classes}, width {args.width}; world model {millions(agent.wm)}, actor "
          f"{millions(agent.actor)}, critics {millions(agent.critic)} parameters")
    print(f"budget: {args.steps:,} agent steps per task ({args.random_steps:,} random), {args.warmup:,} warm-up "
          f"updates, then one update per {args.train_every} steps of {args.batch} x {args.length} frames and "
          f"{args.rollouts} roll-outs of {args.horizon} steps per task; replay {frames.obs.nbytes / 1e9:.2f} GB")
    print(f"protocol: sticky {args.sticky}, {args.action_space} actions, life loss "
          f"{'on' if args.life_loss else 'off'}, up to {args.noop} idle frames at the start, learning "
          f"rates {args.lr} and {args.agent_lr}", flush=True)


def write_text(path, text):
    """Replace a file at once."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def write_csv(path, rows):
    """Replace a file by a table of dicts."""
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def cell(x, width, digits=1):
    """A number of a printed table, - for None."""
    return f"{'-' if x is None else f'{x:,.{digits}f}':>{width}}"


def report(args, tasks, played, blind, agent, run, extra):
    """The table at the end, also as results.csv -> what results.json holds."""
    rows = []
    for k, task in enumerate(tasks):
        ret = np.array([r for r, _ in played[k]])
        random, human = ATARI_SCORES.get(task, (None, None))
        storm = STORM_RETURN.get(task)
        rows.append({"task": task, "cluster": agent.wm.labels[k] + 1, "return": float(ret.mean()),
                     "sem": float(ret.std(ddof=1) / math.sqrt(len(ret))) if len(ret) > 1 else None,
                     "episodes": len(ret), "blind": float(np.mean([r for r, _ in blind[k]])), "random": random,
                     "human": human,
                     "score": float(np.mean([score(task, r, s) for r, s in played[k]])),
                     "storm": storm, "storm_score": None if storm is None else score(task, storm, 0)})
    write_csv(run.dir / "results.csv", rows)
    scores = [r["score"] for r in rows]
    result = {"args": asdict(args), "rows": rows, "mean_score": float(np.mean(scores)),
              "median_score": float(np.median(scores)), "played": played, "played_blind": blind, **extra,
              "published": {"mow_mean_26_games": MOW_MEAN_HNS, "storm_mean_26_games_by_mow_authors": STORM_MEAN_HNS}}

    print(f"\n{'task':22}{'cluster':>8}{'return':>11}{'+-':>8}{'blind':>10}{'random':>10}{'human':>10}{'score':>8}"
          f"{'STORM':>10}{'its score':>10}")
    for r in rows:
        print(f"{r['task']:22}{r['cluster']:8}{cell(r['return'], 11)}{cell(r['sem'], 8)}{cell(r['blind'], 10)}"
              f"{cell(r['random'], 10)}{cell(r['human'], 10)}{cell(r['score'], 8, 3)}{cell(r['storm'], 10)}"
              f"{cell(r['storm_score'], 10, 3)}")
    print(f"mean score {result['mean_score']:.3f}, median {result['median_score']:.3f} (Atari: human-normalised; "
          f"Meta-World: success; +- standard error over {rows[0]['episodes']} episodes; 1 training seed)")
    print("blind: the agent's own actions in random order; only a return above it shows that seeing pays")
    print(f"published at 100k steps per game: STORM as above, one agent per game; MoW, one agent for all 26 games: "
          f"mean {MOW_MEAN_HNS}")
    return result


def record(run):
    """video(task, frames): what the agent saw, four times as large, as mp4."""
    def video(task, frames):
        import imageio
        large = [np.repeat(np.repeat(f, 4, 0), 4, 1) for f in frames]
        imageio.mimwrite(run.dir / f"{task}.mp4", large, fps=15, macro_block_size=1)
    return video


class Log:
    """metrics.jsonl, TensorBoard, progress lines and the history that is plotted."""

    def __init__(self, args, agent, run, history):
        self.agent, self.run, self.history = agent, run, history
        self.tasks, self.began, self.at = task_list(args.task), time.time(), agent.updates

    def note(self, metrics, sweep, to_do, finished=(), phase=""):
        """Read the metrics of an update, which waits for a GPU, and say what they are and how long the updates `to_do`
        will take. SystemExit: a number that is not finite."""
        m = {k: v.float().tolist() for k, v in metrics.items() if k not in ("scores", "J", "z")}
        flat = {f"losses/{k}": float(np.mean(v)) for k, v in m.items()}
        if not np.isfinite(list(flat.values())).all():
            raise SystemExit(f"update {self.agent.updates} is not finite: {flat}; the last checkpoint is in "
                             f"{self.run.dir}: try a smaller --lr or --agent-lr")
        self.history.append({"updates": self.agent.updates, "sweep": sweep, "rec": m["rec"], "dyn_raw": m["dyn_raw"],
                             "rew": m["rew"]})
        recent = [[e[2] for e in finished if e[1] == k][-10:] for k in range(len(self.tasks))]
        flat |= {f"charts/episodic_return/{t}": float(np.mean(r)) for t, r in zip(self.tasks, recent) if r}
        rate = (self.agent.updates - self.at) / max(time.time() - self.began, 1e-9)
        self.run.log(self.agent.updates, flat | {"charts/agent_steps": sweep, "charts/UPS": rate})
        left = to_do / max(rate, 1e-9) / 60
        print(f"{phase or f'{sweep:,} steps'}, {self.agent.updates:,} updates: reconstruction "
              f"{flat['losses/rec']:.1f}, dynamics KL {flat['losses/dyn_raw']:.2f}"
              + (f", entropy {m['entropy']:.2f}" if "entropy" in m else "")
              + (", returns " + " ".join(f"{np.mean(r):.1f}" if r else "-" for r in recent) if any(recent) else "")
              + (f" | {rate:.1f} updates/s, {left:.1f} min left" if self.agent.updates - self.at > 1 else ""),
              flush=True)


def total_updates(args):
    """World-model updates of a whole run."""
    return args.warmup + -(-(args.steps - args.random_steps) // args.train_every)


def train(args, agent, player, frames, run, state):
    """Random steps, warm-up and clustering, then play and learn -> clustering, history of the losses, seconds."""
    stop, saved, began = [], [time.time()], time.time() - state.get("seconds", 0.0)
    signal.signal(signal.SIGINT, signal.SIG_IGN if run is None else lambda *_: (
        stop.append(1), signal.signal(signal.SIGINT, signal.default_int_handler)))
    found, sweep = state.get("found"), state.get("sweep", 0)
    if args.checkpoint and not found:  # its modules have long gone their own ways: clustering would overwrite them
        found = {"labels": list(agent.wm.labels)}
    log = Log(args, agent, run, state.get("history", []))

    def save(now=False):
        if run and (stop or now or time.time() - saved[0] > args.save_every):
            saved[0] = time.time()
            frames.flush()
            run.save(dict(agent.state(), player=player.state(), found=found, history=log.history, sweep=sweep,
                          seconds=time.time() - began))
        if stop:
            raise SystemExit(f"stopped; go on with: python {Path(sys.argv[0]).name} --resume {run.dir}")

    player.begin()
    while sweep < args.random_steps:
        player.send(sweep, random=True)
        player.receive(sweep)
        sweep += 1
        save()
    while found is None and agent.updates < args.warmup:
        metrics = agent.update(frames, learn_to_act=False)
        if run and (agent.updates % 50 == 0 or agent.updates in (1, 10)):
            log.note(metrics, sweep, total_updates(args) - agent.updates, phase="warm-up")
        save()
    if found is None:
        note = print if run else lambda text: None
        found = find_clusters(agent, frames, note) if args.clusters > 1 else {"labels": [0] * agent.K}
        save(now=True)
    log.began, log.at = time.time(), agent.updates  # updates take longer from here on
    while sweep < args.steps:
        player.send(sweep, random=False)  # the environments step while the networks learn
        learn = (sweep - args.random_steps) % args.train_every == 0
        if learn:
            metrics = agent.update(frames)
        player.receive(sweep)
        sweep += 1
        if run and learn and (agent.updates % 100 == 0 or agent.updates - log.at in (1, 20)):
            log.note(metrics, sweep, (args.steps - sweep) // args.train_every, player.finished)
        save()
    save(now=True)
    return found, log.history, time.time() - began


def play_and_learn(args, tasks, run):
    """The whole method on all tasks -> what results.json holds. The first process of torchrun has the run and the
    environments, the others (run: None) only learn on what it stores."""
    options, device = task_options(args, tasks), torch.device(args.device)
    with Fleet(tasks, options) if run else contextlib.nullcontext() as fleet:
        agent = make_agent(args, tasks, from_first(run and fleet.legal), device)
        size = len(tasks), 1 if args.eval_only else args.steps, agent.A
        frames = Frames(run.dir / "frames", *size) if run else None
        folder = Path(from_first(run and str(run.dir)))  # comes when the files are there
        frames = frames or Frames(folder / "frames", *size)
        if run:
            announce(args, agent, frames, folder)
        if args.checkpoint:
            load_checkpoint(agent, args.checkpoint)
        player, state, extra = Player(agent, fleet, frames) if run else Follower(frames), {}, {}
        if args.resume:
            state = run.load(device=device) if run else torch.load(folder / "checkpoint.pt", device, weights_only=True)
            agent.load_state(state)
            player.load_state(state["player"])
        if not args.eval_only:
            found, history, seconds = train(args, agent, player, frames, run, state)
            if run is None:
                return None
            extra = {"seconds": round(seconds, 1), "clusters": found, "history": history, "finished": player.finished,
                     "fidelity": fidelity(agent, frames), "routing": routing_facts(agent)}
    if not args.eval_only:
        plot_frames(agent, frames, tasks, run.dir / "frames.png")
        plot_routing(extra["routing"], agent.wm.labels, tasks, run.dir / "routing.png")
        plot_curve(history, player.finished, tasks, run.dir / "curve.png")
    print(f"playing {args.eval_episodes} episodes per task", flush=True)
    video = record(run) if args.capture_video else None
    played, taken = evaluate(agent, tasks, options, args.eval_episodes, args.seed, video)
    blind, _ = evaluate(agent, tasks, options, args.eval_episodes, args.seed, pool=taken)
    return report(args, tasks, played, blind, agent, run, extra)


def load_checkpoint(agent, file):
    """Weights and statistics of another run. SystemExit: no such file, or other sizes."""
    try:
        agent.load_state(torch.load(file, agent.device, weights_only=True))
    except OSError as e:
        raise SystemExit(f"--checkpoint {file} cannot be read ({e}): expected runs/<a run of mow.py>/checkpoint.pt")
    except (RuntimeError, KeyError, ValueError, TypeError) as e:
        raise SystemExit(f"--checkpoint {file} does not fit ({str(e).splitlines()[0]}): give the tasks and sizes of "
                         "the run that made it")


def main(args: Args):
    """Run everything and return what results.json holds (None on the other processes of torchrun)."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if args.resume:
        file = Path(args.resume) / "args.json"
        if not file.exists():
            raise SystemExit(f"--resume {args.resume} has no args.json: expected a folder that mow.py made, e.g. "
                             "runs/Boxing__mow__1__1700000000")
        args = Args(**json.loads(file.read_text())["args"] | {"resume": args.resume})
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU: install its CUDA build or type --device cpu")
    if args.eval_only and not args.checkpoint:
        raise SystemExit("--eval-only plays a trained agent: add --checkpoint runs/<a run of mow.py>/checkpoint.pt")
    if world > 1 and (args.experiment or args.cluster_only or args.eval_only):
        raise SystemExit("--experiment, --cluster-only and --eval-only run in one process: start them with python")
    args = replace(args, device="cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    tasks = task_list(args.task)
    args = fill(args, tasks)
    if args.batch % world or args.rollouts % world:
        raise SystemExit(f"--batch {args.batch} and --rollouts {args.rollouts} cannot be shared by {world} processes: "
                         f"type multiples of {world}")
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(days=2))
    run = Run(args.task, "mow", args.seed, asdict(args), args.resume) if rank == 0 else None
    if args.track and run:
        import wandb
        wandb.init(project="mow", name=run.dir.name, config=asdict(args), sync_tensorboard=True)
    study = {None: play_and_learn, "cost": cost, "transfer": transfer, "pretrain": pretrain,
             "fidelity": sharpness}.get(args.experiment, compare)
    result = (cluster_only if args.cluster_only else study)(args, tasks, run)
    if world > 1:
        dist.destroy_process_group()
    if run is None:
        return None
    git = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True)  # maybe no git here
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    result = dict(command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                  commit=git.stdout.strip() or None, hardware=chip, **result)
    write_text(run.dir / "results.json", json.dumps(result, indent=1))
    names = sorted(p.name for p in run.dir.iterdir() if p.suffix in (".json", ".csv", ".png", ".mp4", ".pt"))
    print(f"files: {run.dir}/", *names)
    run.close()
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
