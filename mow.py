"""MoW: one agent for many pixel tasks, a mixture of world models.  STORM is its single-task case.

The idea ("Mixture-of-World Models: Scaling Multi-Task Reinforcement Learning with Modular Latent
Dynamics", arXiv 2602.01270): one agent learns many games at once in the imagination of one world
model. Images differ most, so tasks are clustered by their gradients after a warm-up, and every
cluster gets its own VAE, predictors and critic. Dynamics share more: a router picks a few expert
Transformers per task (never per token, so that an expert sees whole sequences), and a shared
Transformer reads what they say. One actor serves all tasks. With one task, one cluster and one
expert this is STORM (arXiv 2310.09615), `--storm`.

    python mow.py                             # Boxing, Krull, RoadRunner: 18 minutes on one core;
                                              # the reconstruction loss falls from 3,000 to 25
    python mow.py --task Boxing --storm       # the single-task baseline; --fast: see that it works
    python mow.py --storm --task catch --steps 3400 --random-steps 2000 --rollouts 64   # 2 minutes
    torchrun --nproc-per-node 4 mow.py --task atari26   # each GPU takes a quarter of every batch

Copy me together with envs.py and data.py.  Shapes: K tasks, B sequences, L steps, C context,
H horizon, I imagined roll-outs, R environments or rows, Z = groups x classes of the latent z,
D width of h, A actions, E embedding, n experts per task (topk); stacked layers take G rows of input
with layer which[g] each. Tasks come first, time after sequences. h_t reads z_1..t and a_1..t; it
predicts the reward and the end that a_t brings, and z_t+1. The agent sees [z_t, h_t-1].

The body of the MoW paper is not public at the time of writing: known are the architecture, the
losses, and 12 clusters and 12 experts for 26 games. Our choices and deviations:
 1. What MoW leaves open follows STORM's paper and released code; but the agent acts on the latent
    of the frame it sees, with h = 0 at the first (as released: `studies/mow_storm_code.py`).
 2. The task embedding (64 numbers of norm 1) is appended to the input of all but the convolutions.
 3. The router is an MLP on the embedding; its temperature falls from 5 to 1 in the first quarter of
    the run, with Gumbel noise of scale (tau - 1) / 4 while the world model trains.
 4. Concatenated experts give the router no gradient, so each output is multiplied by w + sg(1 - w),
    whose value is 1; chosen experts are concatenated in ascending order, not by score.
 5. The balance loss compares n softmax(..) with its target K n / N_experts (both sum to K n) and is
    divided by K^2; the harmonious weights are the closed-form minimum for running means of losses.
 6. Clustering: cosine of per-layer gradients, averaged over layers; average linkage, sizes capped.
 7. Return scales are per task, and so is the free nat of the KL.
 8. Imagination starts from windows of the batch that the world model was just trained on, and the
    acting agent remembers min(16, C + H / 2) steps, the middle of what imagination visits.
 9. Attention and KL do not cross the start of an episode (with --storm they do).
10. GroupNorm instead of BatchNorm for more than one task; on a CPU smaller sizes and budgets.
11. The agent's loss leaves out imagined steps after an imagined end, and imagination does not
    predict the first frame of an episode: there it starts from the frame itself.
"""
import contextlib
import copy
import difflib
import math
import os
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Literal

import imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
from data import Frames, Run, choose_device, join_ranks, write_csv
from envs import ATARI26, ATARI_SCORES, GAMES, METAWORLD50, MT10, Fleet, score


@dataclass
class Args:
    task: str = "Boxing,Krull,RoadRunner"
    """small games (catch), Atari games and Meta-World tasks (mw-reach) with commas between, or
    games, atari26, mt10, mt50; Boxing@m0d1 is a game in another mode and difficulty"""
    seed: int = 1
    """of networks, data and everything random"""
    storm: bool = False
    """the single-task baseline: one cluster, one expert, no embedding, router or harmonious loss"""
    preset: Literal["auto", "cpu", "gpu", "paper"] = "auto"
    """values of the flags below that were left out; auto looks at the device"""
    fast: bool = False
    """the whole pipeline in about a minute; nothing is learnt"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for world model, imagination, agent and acting; on a CPU it costs minutes"""
    bf16: bool = field(default_factory=torch.cuda.is_available)
    """matrix products in bfloat16; losses, KL and returns stay in float32"""
    resume: str | None = None
    """continue the run in this folder; its flags are read from there"""
    checkpoint: str | None = None
    """start from the checkpoint.pt of another run with the same tasks and sizes"""
    eval_only: bool = False
    """with --checkpoint: only play the agent"""
    capture_video: bool = False
    """what the agent sees in one evaluation episode of every task, as mp4"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""
    save_every: float = 120.0
    """seconds between checkpoints"""

    # left out, these follow from the preset and are printed at the start
    steps: int | None = None
    """agent steps per task, random ones included (paper: 100,000 Atari, 300,000 Meta-World)"""
    random_steps: int | None = None
    """of these, random ones at the start (STORM: 1,024)"""
    warmup: int | None = None
    """world-model updates on the random data before clustering"""
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
    """Adam, world model (STORM: 1e-4)"""
    agent_lr: float | None = None
    """Adam, actor and critics (STORM: 3e-5)"""
    eval_episodes: int | None = None
    """episodes per task at the end (STORM: 20)"""
    clusters: int | None = None
    """modules: VAEs, predictors and critics (paper: 12 for 26 games)"""
    experts: int | None = None
    """expert Transformers (paper: 12)"""
    topk: int | None = None
    """n, experts per task"""
    sizes: dict[str, int] = field(default_factory=dict)
    """sizes of networks other than the preset's (SIZES): --sizes width 128 heads 8"""
    atari: dict[str, float] = field(default_factory=dict)
    """protocol of Atari other than STORM's (ATARI): --atari sticky 0 noop 30"""


PRESETS = {
    "paper": dict(steps=100_000, random_steps=1024, warmup=5000, train_every=1, batch=16, length=64,
                  rollouts=256, context=8, horizon=16, lr=1e-4, agent_lr=3e-5, eval_episodes=20,
                  clusters=12, experts=12, topk=2),
    "gpu": dict(steps=50_000, random_steps=1024, warmup=2000, train_every=2, batch=8, length=32,
                rollouts=128, context=8, horizon=15, lr=2e-4, agent_lr=1e-4, eval_episodes=10,
                clusters=3, experts=6, topk=2),
    "cpu": dict(steps=2500, random_steps=400, warmup=300, train_every=1, batch=4, length=16,
                rollouts=32, context=4, horizon=8, lr=1e-3, agent_lr=3e-4, eval_episodes=4,
                clusters=2, experts=3, topk=2)}
FAST = dict(steps=90, random_steps=60, warmup=20, batch=2, rollouts=8, eval_episodes=1)
SIZES = {  # stem: channels of the first convolution; they double three times. hidden: of all MLPs
    "paper": dict(stem=32, latents=32, classes=32, width=512, heads=8, expert_layers=2,
                  shared_layers=2, hidden=512, emb=64),
    "gpu": dict(stem=16, latents=32, classes=32, width=256, heads=8, expert_layers=2,
                shared_layers=2, hidden=256, emb=64),
    "cpu": dict(stem=8, latents=16, classes=16, width=64, heads=4, expert_layers=1,
                shared_layers=1, hidden=64, emb=16)}
ATARI = dict(sticky=0.25,        # probability per frame that the last action is repeated
             life_loss=1,        # a lost life counts as an end in the world model; play goes on
             noop=0,             # up to so many random idle frames at the start (others: 30)
             frame_cap=108_000,  # frames per episode
             full_actions=0)     # 1: choose among all 18 actions, not those that a game has
WINDOW = 16  # past steps that the acting agent remembers, at most: see Agent.window
DISCRETE, CONTINUOUS = 18, 4  # sizes of the two kinds of actions, Atari's and Meta-World's
MOW_MEAN_HNS, STORM_MEAN_HNS = 1.104, 1.142  # published means over 26 games: MoW, and 26 STORMs
STORM_RETURN = {  # STORM's published mean return per game (5 seeds, one agent per game)
    "Alien": 983.6, "Amidar": 204.8, "Assault": 801.0, "Asterix": 1028.0, "BankHeist": 641.2,
    "BattleZone": 13540.0, "Boxing": 79.7, "Breakout": 15.9, "ChopperCommand": 1888.0,
    "CrazyClimber": 66776.0, "DemonAttack": 164.6, "Freeway": 0.0, "Frostbite": 1316.0,
    "Gopher": 8239.6, "Hero": 11044.3, "Jamesbond": 509.0, "Kangaroo": 4208.0, "Krull": 8412.6,
    "KungFuMaster": 26182.0, "MsPacman": 2673.5, "Pong": 11.3, "PrivateEye": 7781.0,
    "Qbert": 4522.5, "RoadRunner": 17564.0, "Seaquest": 525.2, "UpNDown": 7985.0}


# ------------------------------------------------------------------------------------------- maths
BINS, BIN_LIMIT = 255, 20.0  # of rewards and values, uniform after symlog. two_hot_inv averages
# before symexp, which is STORM's choice: 100 with probability 0.1 is read as 0.6


def symlog(x):
    """sign(x) ln(1 + |x|), which keeps large numbers small."""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """sign(x) (e^|x| - 1), the inverse of symlog."""
    return x.sign() * x.abs().expm1()


def two_hot_loss(logits, x):
    """Cross-entropy of logits (.., BINS) with symlog(x) (..), spread on two neighbouring bins."""
    y = (symlog(x).clamp(-BIN_LIMIT, BIN_LIMIT) + BIN_LIMIT) * ((BINS - 1) / (2 * BIN_LIMIT))
    k = y.floor()
    frac, k = y - k, k.long().clamp(0, BINS - 1)[..., None]  # of NaN: any, frac carries it on
    logp = logits.log_softmax(-1)
    low, high = logp.gather(-1, k)[..., 0], logp.gather(-1, (k + 1) % BINS)[..., 0]
    return -((1 - frac) * low + frac * high)


def two_hot_inv(logits, pseudo=False):
    """logits (.., BINS) -> scalar (..). `pseudo` leaves out the symexp: a value in log space."""
    bins = torch.linspace(-BIN_LIMIT, BIN_LIMIT, BINS, device=logits.device).expand_as(logits)
    y = (logits.softmax(-1) * bins).sum(-1)  # not a matmul: autocast would round the bins
    return y if pseudo else symexp(y)


def unimix(logits):
    """Log-probabilities of 0.99 softmax + 0.01 uniform: (.., groups, classes)."""
    return (0.99 * logits.float().softmax(-1) + 0.01 / logits.shape[-1]).log()


def kl(p, q):
    """KL(p || q) in nats, summed over groups: (.., groups, classes) log-probabilities -> (..)."""
    return (p.exp() * (p - q)).sum((-2, -1))


def sample_onehot(logp):
    """A one-hot draw per row of logp (.., classes), by the Gumbel-max trick."""
    gumbel = -torch.empty_like(logp).exponential_().log()
    return F.one_hot((logp + gumbel).argmax(-1), logp.shape[-1]).to(logp.dtype)


def draw_latent(logp):
    """Draw z (.., Z) from logp (.., groups, classes); its gradient is that of the probabilities."""
    p = logp.exp()
    return (sample_onehot(logp.detach()) + p - p.detach()).flatten(-2)


def lambda_return(rew, done, value, gamma, lam):
    """R_t = r_t + gamma (1 - d_t) [(1 - lam) V_t+1 + lam R_t+1], R_H = V_H; value (.., H+1)."""
    R, out = value[..., -1], []
    for t in range(rew.shape[-1] - 1, -1, -1):
        R = rew[..., t] + gamma * (1 - done[..., t]) * ((1 - lam) * value[..., t + 1] + lam * R)
        out.append(R)
    return torch.stack(out[::-1], -1)


def best_sigma(loss):
    """The sigma > 0 that minimises loss / sigma + ln(1 + sigma)."""
    return (loss + (loss.square() + 4 * loss).sqrt()) / 2


def running(old, new):
    """Running mean that starts at the first value (old: NaN)."""
    return torch.where(old.isnan(), new, old.lerp(new, 0.01))


def balance_loss(scores, topk):
    """|| sum_k n S_k - K n / N_experts ||^2 / K^2 for scores S (K, N_experts): 0 for equal use."""
    K, N = scores.shape
    return (topk * scores.sum(0) - K * topk / N).square().sum() / K**2


def route(task_emb, router, topk, tau=1.0, noise=0.0):
    """S = softmax((router(e) + noise * Gumbel) / tau) and its topk, per task and not per token.

    task_emb (K, E), router: (K, E) -> (K, N_experts) -> scores S (K, N_experts), indices J (K, n)
    in ascending order, their weights w (K, n), which sum to 1. The order matters: outputs are
    concatenated, and scores cross."""
    logits = router(task_emb).float()
    logits = logits - noise * torch.empty_like(logits).exponential_().log()
    S = (logits / tau).softmax(-1)
    J = S.topk(topk, -1).indices.sort(-1).values
    w = S.gather(-1, J)
    return S, J, w / w.sum(-1, keepdim=True)


# -------------------------------------------------------------------------------------- clustering
SKETCH = 4096  # numbers kept of a layer's gradient


def sketch(grad, size=SKETCH):
    """Count sketch of a flat gradient, fixed by its length: inner products are kept on average."""
    generator = torch.Generator().manual_seed(grad.numel())
    bucket = torch.randint(size, grad.shape, generator=generator)
    sign = torch.randint(2, grad.shape, generator=generator) * 2 - 1
    return torch.zeros(size).index_add_(0, bucket, grad * sign)


def task_similarity(grads):
    """Cosine of gradients (K, layers, m) or (K, m) of every two tasks, mean over layers: (K, K)."""
    g = torch.from_numpy(np.asarray(grads, np.float64))
    g = F.normalize(g if g.ndim == 3 else g[:, None], dim=-1, eps=1e-300)
    return (torch.einsum("ilm,jlm->ij", g, g) / g.shape[1]).numpy()


def cluster_tasks(grads, n):
    """Average-linkage clustering of K tasks into n groups of at most ceil(1.5 K / n).

    grads (K, layers, m) or (K, m) -> (K,) ints that count up in the order of the tasks."""
    K = len(grads)
    if not 1 <= n <= K:
        raise SystemExit(f"cluster_tasks got {K} tasks and n={n} clusters; expected 1 to {K}: "
                         "type fewer --clusters")
    sim, groups, cap = task_similarity(grads), [[k] for k in range(K)], math.ceil(1.5 * K / n)

    def alike(pair):
        return round(sim[np.ix_(groups[pair[0]], groups[pair[1]])].mean(), 12)

    def size(pair):
        return len(groups[pair[0]]) + len(groups[pair[1]])

    while len(groups) > n:
        pairs = list(zip(*np.triu_indices(len(groups), 1)))
        fits = [pair for pair in pairs if size(pair) <= cap]
        # where the cap leaves no way on, the two smallest are joined
        i, j = max(fits, key=alike) if fits else min(pairs, key=size)
        groups[i] = groups[i] + groups.pop(j)
    labels = [0] * K
    for c, group in enumerate(sorted(groups, key=min)):
        for k in group:
            labels[k] = c
    return labels


# ---------------------------------------------------------------------------------------- networks
class Stacked(nn.Module):
    """N linear layers as one weight (N, i, j); row g of x uses which[g]: (G, R, i) -> (G, R, j)."""

    def __init__(self, N, i, j, bias=True):
        super().__init__()

        def uniform(*shape):
            return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(i))

        self.weight, self.bias = uniform(N, i, j), uniform(N, 1, j) if bias else None

    def forward(self, x, which):
        w = self.weight[which]
        return torch.bmm(x, w) if self.bias is None else torch.baddbmm(self.bias[which], x, w)


class StackedNorm(nn.Module):
    """N LayerNorms: (G, R, j) -> (G, R, j)."""

    def __init__(self, N, j, eps=1e-5):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(N, 1, j)), eps
        self.shift = nn.Parameter(torch.zeros(N, 1, j))

    def forward(self, x, which):
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return x * self.gain[which] + self.shift[which]


class StackedMLP(nn.Module):
    """N MLPs of `layers` x [Linear, LayerNorm, ReLU] and a Linear: (G, R, i) -> (G, R, out)."""

    def __init__(self, N, i, hidden, layers, out):
        super().__init__()
        sizes = [i] + [hidden] * layers
        self.layers = nn.ModuleList(Stacked(N, a, b, bias=False) for a, b in zip(sizes, sizes[1:]))
        self.norms = nn.ModuleList(StackedNorm(N, hidden) for _ in range(layers))
        self.out = Stacked(N, sizes[-1], out)

    def forward(self, x, which):
        for layer, norm in zip(self.layers, self.norms):
            x = F.relu(norm(layer(x, which), which))
        return self.out(x, which)


class Block(nn.Module):
    """N post-norm Transformer blocks, no biases in the attention: (G, R, L, D) -> (G, R, L, D)."""

    def __init__(self, N, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = Stacked(N, width, 3 * width, bias=False)
        self.out = Stacked(N, width, width, bias=False)
        self.up, self.down = Stacked(N, width, 2 * width), Stacked(N, 2 * width, width)
        self.norm1, self.norm2 = StackedNorm(N, width, 1e-6), StackedNorm(N, width, 1e-6)

    def forward(self, x, which, mask, cache=None, pos=None):
        """mask (G*R, 1, L, T): keys that a query may see. cache (2, G*R, heads, T, d) holds earlier
        keys and values; the L tokens of x stand at positions pos (L,) and are written there."""
        G, R, L, D = x.shape
        p = self.dropout if self.training else 0.0
        x = x.flatten(1, 2)
        qkv = self.qkv(x, which).view(G, R, L, 3, self.heads, -1)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)                  # (3, G*R, heads, L, d)
        if cache is not None:
            qkv = qkv.to(cache.dtype)
            cache.index_copy_(3, pos, qkv[1:])
        q, (k, v) = qkv[0], qkv[1:] if cache is None else cache
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        y = y.transpose(1, 2).reshape(G, R * L, D)
        x = self.norm1(x + F.dropout(self.out(y, which), p), which)
        y = self.down(F.relu(self.up(x, which)), which)
        return self.norm2(x + F.dropout(y, p), which).view(G, R, L, D)


class Transformer(nn.Module):
    """N causal Transformers with stacked weights: (G, R, L, D) -> (G, R, L, D)."""

    def __init__(self, N, width, heads, layers, dropout, max_len=0):
        super().__init__()
        self.position = nn.Parameter(torch.randn(N, 1, max_len, width)) if max_len else None
        self.norm = StackedNorm(N, width, 1e-6) if max_len else None
        self.blocks = nn.ModuleList(Block(N, width, heads, dropout) for _ in range(layers))

    def forward(self, x, which, mask, pos, cache=None):
        if self.position is not None:
            x = x + self.position[which][:, :, pos]
            x = self.norm(x.flatten(1, 2), which).view(x.shape)
        mask = mask.flatten(0, 1)[:, None]                                         # (G*R, 1, L, T)
        for i, block in enumerate(self.blocks):
            x = block(x, which, mask, None if cache is None else cache[i], pos)
        return x

    def new_cache(self, rows, T, x):
        """Room for T keys and values of `rows` sequences, of the kind of tensor x."""
        D, heads = self.blocks[0].out.weight.shape[-1], self.blocks[0].heads
        return x.new_zeros(len(self.blocks), 2, rows, heads, T, D // heads)


class VAE(nn.Module):
    """Images (R, 3, 64, 64) and embeddings (R, E) <-> latents; every image on its own."""

    def __init__(self, stem, Z, emb, norm):
        super().__init__()
        c = [3, stem, 2 * stem, 4 * stem, 8 * stem]

        def normed(n):
            return nn.BatchNorm2d(n) if norm == "bn" else nn.GroupNorm(min(8, n), n)

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

    emb=0, shared_layers=0 and one of everything is STORM. Methods take x (K, .., ·) for all tasks,
    or for those of the list `task` alone."""

    def __init__(self, K, A, *, clusters, experts, topk, emb, stem, latents, classes, width, heads,
                 expert_layers, shared_layers, hidden, norm, max_len=64, dropout=0.1):
        super().__init__()
        Z, N, D = latents * classes, clusters, width
        self.latents, self.topk = latents, topk
        self.e = nn.Parameter(torch.randn(K, emb))
        self.vaes = nn.ModuleList(VAE(stem, Z, emb, norm) for _ in range(clusters))
        self.mix, self.mix_norm = Stacked(experts, Z + A + emb, D, False), StackedNorm(experts, D)
        self.mix_out, self.mix_out_norm = Stacked(experts, D, D, False), StackedNorm(experts, D)

        def mlp(i, hidden, out):
            return nn.Sequential(nn.Linear(i, hidden), nn.ReLU(), nn.Linear(hidden, out))

        self.router = mlp(emb, 64, experts) if experts > 1 else None
        self.experts = Transformer(experts, D, heads, expert_layers, dropout, max_len)
        self.join = nn.Linear(topk * D + emb, D) if shared_layers or topk > 1 else None
        self.shared = Transformer(1, D, heads, shared_layers, dropout) if shared_layers else None
        self.prior_head = StackedMLP(N, D + emb, 0, 0, Z)
        self.reward_head = StackedMLP(N, D + emb, hidden, 2, BINS)
        self.end_head = StackedMLP(N, D + emb, hidden, 2, 1)
        self.task_head = mlp(D, hidden, K) if K > 1 else None
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
        """route() with this model's router: S (K, N_experts), J (K, n), w (K, n)."""
        if self.router is None:
            one = e.new_ones(len(e), 1)
            return one, self.zero.expand(len(e), 1), one
        return route(e, self.router, self.topk, tau, noise)

    def perceive(self, method, x, e, task=None):
        """Every cluster's VAE on the frames of its tasks: x (K, R, ..), e (K, E) -> (K, R, ..)."""
        labels = self.labels if task is None else [self.labels[k] for k in task]
        out = [None] * len(labels)
        for c in sorted(set(labels)):
            mine = [i for i, label in enumerate(labels) if label == c]
            embs = torch.cat([e[i].expand(x.shape[1], -1) for i in mine])
            y = getattr(self.vaes[c], method)(torch.cat([x[i] for i in mine]), embs)
            for i, part in zip(mine, y.chunk(len(mine))):
                out[i] = part
        return torch.stack(out)

    def posterior(self, x, e, task=None):
        """Images (K, B, L, 3, 64, 64) -> log-probabilities (K, B, L, groups, classes)."""
        y = self.perceive("encode", x.flatten(1, 2), e, task)
        return unimix(y.unflatten(1, x.shape[1:3]).unflatten(-1, (self.latents, -1)))

    def decode(self, z, e, task=None):
        """(K, B, L, Z) -> images (K, B, L, 3, 64, 64)."""
        images = self.perceive("decode", z.flatten(1, 2), e, task)
        return images.unflatten(1, z.shape[1:3]).float()

    def sequence(self, z, act, e, J, gate, mask, pos, cache=(None, None)):
        """h (K, B, L, D) from z (K, B, L, Z) and act (K, B, L, A) at positions pos (L,).

        J, gate (K, n): experts and factors of their outputs; mask (K, B, L, T) as in Block."""
        K, B, L, _ = z.shape
        n, which, at = J.shape[1], J.flatten(), e[:, None, None].expand(K, B, L, -1)
        x = torch.cat([z, act, at], -1).flatten(1, 2)
        x = x.repeat_interleave(n, 0)                                       # (K*n, B*L, Z+A+E)
        x = F.relu(self.mix_norm(self.mix(x, which), which))
        x = self.mix_out_norm(self.mix_out(x, which), which).view(K * n, B, L, -1)
        x = self.experts(x, which, mask.repeat_interleave(n, 0), pos, cache[0])
        x = (x * gate.reshape(K * n, 1, 1, 1)).view(K, n, B, L, -1)
        x = self.combine(x.permute(0, 2, 3, 1, 4), z, act, e, pos, cache)   # (K, B, L, n*D)
        if self.join is not None:
            x = self.join(torch.cat([x, at], -1))
        if self.shared is not None:
            one = x.flatten(0, 1)[None], self.zero, mask.flatten(0, 1)[None]
            x = self.shared(*one, pos, cache[1])[0].view(x.shape)
        return x

    def combine(self, x, z, act, e, pos, cache):
        """What the shared Transformer reads of x (K, B, L, n, D), the outputs of a task's experts:
        all, one after the other. Routing per token (`studies/mow_tokens.py`) chooses instead."""
        return x.flatten(3)

    def head(self, head, h, e, task=None):
        """A cluster head on h (K, B, L, D): (K, B, L, out)."""
        which = self.cluster_of if task is None else self.cluster_of[task]
        x = torch.cat([h, e[:, None, None].expand(*h.shape[:3], -1)], -1)
        return head(x.flatten(1, 2), which).unflatten(1, h.shape[1:3]).float()

    def prior(self, h, e, task=None):
        """Log-probabilities of the next latent (K, B, L, groups, classes)."""
        return unimix(self.head(self.prior_head, h, e, task).unflatten(-1, (self.latents, -1)))

    def new_cache(self, K, R, T, x, n=None):
        """Caches for K tasks of R sequences of T steps: n experts per task, shared Transformer."""
        shared = self.shared and self.shared.new_cache(K * R, T, x)
        return self.experts.new_cache(K * R * (n or self.topk), T, x), shared


class Actor(nn.Module):
    """One policy for all tasks: x (K, R, Z+D+E) -> log-probabilities (K, R, discrete), mean and std
    (K, R, continuous).

    legal (K, discrete) masks what a game does not have; continuous (K,): kind of its actions."""

    def __init__(self, i, hidden, legal, continuous, n_cont):
        super().__init__()
        self.n_disc = legal.shape[1]
        self.net = nn.Sequential(
            nn.Linear(i, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False), nn.LayerNorm(hidden), nn.ReLU(),
            nn.Linear(hidden, self.n_disc + 2 * n_cont))
        self.register_buffer("legal", legal)
        self.register_buffer("continuous", continuous)

    def forward(self, x):
        middle = (self.n_disc + self.net[-1].out_features) // 2
        logits, mean, std = self.net(x).float().tensor_split([self.n_disc, middle], -1)
        logp = logits.masked_fill(~self.legal[:, None], -1e9).log_softmax(-1)
        return logp, mean.tanh(), 0.1 + 0.9 * std.sigmoid()

    def sample(self, x):
        """act (K, R, A): one-hot for a game, else a Gaussian draw; the other half is zero."""
        logp, mean, std = self(x)
        other = self.continuous[:, None, None]
        return torch.cat([sample_onehot(logp) * ~other if self.n_disc else logp,
                          (mean + std * torch.randn_like(std)) * other], -1)

    def evaluate(self, x, act):
        """log pi(act) and entropy, (K, R) each."""
        logp, mean, std = self(x)
        a, log_std, log_2pi = act[..., self.n_disc:], std.log(), math.log(2 * math.pi)
        gauss = (-((a - mean) / std).square() / 2 - log_std - 0.5 * log_2pi).sum(-1)
        gauss_entropy = (log_std + 0.5 * (log_2pi + 1)).sum(-1)
        discrete = (logp * act[..., :self.n_disc]).sum(-1)
        discrete_entropy = -(logp.exp() * logp).sum(-1)
        other = self.continuous[:, None]
        return (torch.where(other, gauss, discrete),
                torch.where(other, gauss_entropy, discrete_entropy))


# ------------------------------------------------------------------------------------------ losses
def to_images(obs):
    """uint8 (.., 64, 64, 3) -> float (.., 3, 64, 64) in [0, 1]; in memory channels stay last."""
    return obs.movedim(-1, -3).float() / 255


def episode_mask(first, pos, reset_mask=True):
    """Keys that queries at pos (L,) see: earlier, same episode; first (K, B, T) -> (K, B, L, T)."""
    part = first.long().cumsum(-1) * reset_mask
    past = pos[:, None] >= torch.arange(first.shape[-1], device=first.device)
    return past & (part[:, :, pos, None] == part[:, :, None])


def over_ranks(x):
    """x averaged over the processes of torchrun, if any; its gradient is that of the own x."""
    if not dist.is_initialized():
        return x
    mean = x.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size() + (x - x.detach())


def world_model_loss(wm, obs, act, rew, term, first, tau, noise, *, gate=True, reset_mask=True,
                     task=None):
    """STORM's loss terms and the task loss, {name: (K,)}, and what else came of it.

    obs uint8 (K, B, L, 64, 64, 3), act (K, B, L, A), rew, term, first (K, B, L). gate: the router
    learns, through straight-through weights."""
    K, B, L = rew.shape
    e = wm.embedding(task)
    S, J, w = wm.routing(e, tau, noise)
    open_gate = w + (1 - w).detach() if gate else torch.ones_like(w)
    x, pos = to_images(obs), torch.arange(L, device=rew.device)
    post = wm.posterior(x, e, task)                                   # (K, B, L, groups, classes)
    z = draw_latent(post)
    h = wm.sequence(z, act, e, J, open_gate, episode_mask(first, pos, reset_mask), pos)
    prior = wm.prior(h, e, task)
    follows = ~first[:, :, 1:] if reset_mask else torch.ones_like(first[:, :, 1:])
    pairs = over_ranks(follows.sum((1, 2)).float()).clamp(min=1)

    def mean_kl(p, q):  # over the pairs (t, t+1) of one episode
        return over_ranks((kl(p[:, :, 1:], q[:, :, :-1]) * follows).sum((1, 2)) / pairs)

    dyn, rep = mean_kl(post.detach(), prior), mean_kl(post, prior.detach())
    rec = (wm.decode(z, e, task) - x).square().sum((-3, -2, -1))
    reward, end = (wm.head(head, h, e, task) for head in (wm.reward_head, wm.end_head))
    end = F.binary_cross_entropy_with_logits(end[..., 0], term.float(), reduction="none")
    losses = {
        "rec": rec.mean((1, 2)), "rew": two_hot_loss(reward, rew).mean((1, 2)),
        "end": end.mean((1, 2)),
        # one free nat for each task, not for the mean of all: easy tasks would hide the hard ones
        "dyn": dyn.clamp(min=1), "rep": rep.clamp(min=1)}
    more = {"z": z.detach(), "scores": S, "J": J, "dyn_raw": dyn.detach()}
    if wm.task_head is not None:
        ids = torch.tensor(task or range(K), device=rew.device)[:, None, None]
        logits = wm.task_head(h).float().movedim(-1, 1)                           # (K, tasks, B, L)
        losses["task"] = F.cross_entropy(logits, ids.expand(K, B, L), reduction="none").mean((1, 2))
        more["task_accuracy"] = (logits.argmax(1) == ids).float().mean()
    return losses, more


def total_loss(losses, task_coef=1.0, scored=True):
    """L_k = rec + rew + end + task + 0.5 dyn + 0.1 rep, (K,); rew and end if play is `scored`."""
    scale = {"dyn": 0.5, "rep": 0.1, "task": task_coef, "rew": float(scored), "end": float(scored)}
    return sum(scale.get(name, 1.0) * x for name, x in losses.items())


def seen(z, h, e):
    """What actor and critic see: [z_t, h_t-1] and the embedding, (K, I, 1, ·) -> (K, I, ·)."""
    return torch.cat([z, h, e[:, None, None].expand(*h.shape[:3], -1)], -1)[:, :, 0]


def imagine_step(wm, actor, z, h, e, J, gate, mask, pos, cache):
    """A step from z_t, h_t-1 (K, I, 1, ·): x_t, a_t, r_t, d_t (K, I, ·), z_t+1, h_t."""
    x = seen(z, h, e)
    act = actor.sample(x)
    h = wm.sequence(z, act[:, :, None], e, J, gate, mask, pos, cache).float()
    rew = two_hot_inv(wm.head(wm.reward_head, h, e))[:, :, 0]
    done = (wm.head(wm.end_head, h, e)[:, :, 0, 0] > 0).float()
    return x, act, rew, done, sample_onehot(wm.prior(h, e)).flatten(-2), h


@torch.no_grad()
def imagine(wm, actor, z, act, first, H, tau, *, step=imagine_step, reset_mask=True, dtype=None):
    """The actor's own roll-outs after C real steps: states x (K, I, H+1, ·), act (K, I, H, A), rew
    and done (K, I, H). dtype: of the cache.

    z (K, I, C+1, Z), act and first: the real steps and one more, whose z is used only where it
    opens an episode: nothing predicts it, and the agent sees it with h = 0."""
    K, I, C = *z.shape[:2], z.shape[2] - 1
    e = wm.embedding()
    _, J, w = wm.routing(e, tau)
    gate, pos = torch.ones_like(w), torch.arange(C + H, device=z.device)
    later = torch.zeros(K, I, H - 1, dtype=torch.bool, device=z.device)
    mask = episode_mask(torch.cat([first, later], -1), pos, reset_mask)            # (K, I, T, T)
    cache = wm.new_cache(K, I, len(pos), z.to(dtype or z.dtype))
    past = z[:, :, :C], act[:, :, :C], e, J, gate, mask[:, :, :C], pos[:C]
    h = wm.sequence(*past, cache)[:, :, -1:].float()
    fresh = (first[:, :, C:] & reset_mask)[..., None]                              # (K, I, 1, 1)
    z = torch.where(fresh, z[:, :, C:], sample_onehot(wm.prior(h, e)).flatten(-2))
    h, steps = h.masked_fill(fresh, 0), []
    for t in range(C, C + H):
        here = slice(t, t + 1)
        *now, z, h = step(wm, actor, z, h, e, J, gate, mask[:, :, here], pos[here], cache)
        steps.append(now)
    x, act, rew, done = (torch.stack(s, 2) for s in zip(*steps))
    return torch.cat([x, seen(z, h, e)[:, :, None]], 2), act, rew, done


def agent_loss(actor, critic, slow, cluster_of, x, act, rew, done, low, high, *, gamma=0.985,
               lam=0.95, entropy=3e-4, returns=lambda_return):
    """REINFORCE on lambda-returns with the critic as baseline and a percentile scale per task;
    two-hot critics that also follow the returns of their slow copies.

    x (K, I, H+1, ·), act (K, I, H, A), rew, done (K, I, H); low, high (K,) are running
    percentiles, NaN before the first. -> loss, new low and high, metrics."""
    K, I, H = rew.shape
    flat = x.flatten(1, 2)
    logits = critic(flat, cluster_of).view(K, I, H + 1, BINS).float()
    with torch.no_grad():
        value = two_hot_inv(logits)
        R = returns(rew, done, value, gamma, lam)
        alive = F.pad((1 - done[..., :-1]).cumprod(-1), (1, 0), value=1.0)          # Deviation 11
        slow_value = two_hot_inv(slow(flat, cluster_of).view(K, I, H + 1, BINS).float())
        R_slow = returns(rew, done, slow_value, gamma, lam)
        new = torch.quantile(R.flatten(1), torch.tensor([0.05, 0.95], device=R.device), dim=1)
        low, high = running(low, new[0]), running(high, new[1])
        advantage = (R - value[..., :-1]) / (high - low).clamp(min=1)[:, None, None]
    logp, ent = actor.evaluate(x[:, :, :-1].flatten(1, 2), act.flatten(1, 2))
    logp, ent = logp.view(rew.shape), ent.view(rew.shape)
    critic_loss = two_hot_loss(logits[:, :, :-1], R) + two_hot_loss(logits[:, :, :-1], R_slow)
    critic_loss = alive * critic_loss
    actor_loss = alive * (-advantage * logp - entropy * ent)
    metrics = {"critic": critic_loss.mean(), "actor": actor_loss.mean(), "entropy": ent.mean(),
               "imagined_reward": (alive * rew).sum(-1).mean(), "value": value.mean(),
               "advantage_std": advantage.std((1, 2)).mean()}
    return (actor_loss + critic_loss).mean(), low, high, {k: v.detach() for k, v in metrics.items()}


@torch.no_grad()
def act(wm, actor, obs, past_z, past_a, n, tau, *, on_prior=False):
    """Actions (K, R, A) for frames obs uint8 (K, R, 64, 64, 3), and the window with this step.

    past_z (K, R, W, Z), past_a (K, R, W, A): the steps of this episode so far, n (K, R) of them.
    on_prior: act on the predicted latent, not on that of the frame."""
    W, e = past_z.shape[2], wm.embedding()
    _, J, w = wm.routing(e, tau)
    pos = torch.arange(W, device=obs.device)
    mask = (pos[:, None] >= pos).expand(*n.shape, W, W)
    h = wm.sequence(past_z, past_a, e, J, torch.ones_like(w), mask, pos).float()
    last = (n - 1).clamp(min=0)[..., None, None].expand(*n.shape, 1, h.shape[-1])
    h = h.gather(2, last) * (n > 0)[..., None, None]                               # (K, R, 1, D)
    logp = wm.prior(h, e) if on_prior else wm.posterior(to_images(obs[:, :, None]), e)
    z = sample_onehot(logp).flatten(-2)                                            # (K, R, 1, Z)
    a = actor.sample(seen(z, h, e))
    full = (n == W)[..., None, None]
    here = (pos == n.clamp(max=W - 1)[..., None])[..., None]                       # (K, R, W, 1)

    def append(old, new):  # behind the last step; the oldest leaves a full window
        return torch.where(here, new, torch.where(full, old.roll(-1, 2), old))

    return a, append(past_z, z), append(past_a, a[:, :, None]), (n + 1).clamp(max=W)


# ------------------------------------------------------------------------------------------- agent
def from_first(x):
    """What x is in the first process of torchrun."""
    box = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def descend(loss, opt, max_norm):
    """One step of opt down the loss, its gradient the mean over processes, clipped -> its norm."""
    params = [p for group in opt.param_groups for p in group["params"]]
    opt.zero_grad(set_to_none=True)
    loss.backward()
    if dist.is_initialized():  # as one message
        grads = [p.grad for p in params if p.grad is not None]
        means = over_ranks(torch.cat([g.flatten() for g in grads]))
        means = means.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [mean.view_as(g) for mean, g in zip(means, grads)])
    norm = nn.utils.clip_grad_norm_(params, max_norm)
    opt.step()
    return norm


def draw_seed(*numbers):
    """One 63-bit seed out of (seed, purpose, step ..): no generator has to be saved."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Agent(nn.Module):
    """World model, actor, critics, their optimisers and running numbers. A study varies the method
    by the attributes below or in a subclass. legal: per task the actions of a game, None where they
    are continuous."""
    start_tau = 5.0    # router temperature at the start
    gate = True        # the router learns from the world-model loss
    balance = 0.1      # weight of the expert balance loss
    task_coef = 1.0    # weight of the task prediction loss
    scored = True      # play has rewards and ends
    make_world_model = WorldModel

    def __init__(self, args, legal, device):
        super().__init__()
        size, hidden = args.sizes, args.sizes["hidden"]
        continuous = torch.tensor([x is None for x in legal])
        n_disc, n_cont = DISCRETE * (not continuous.all()), CONTINUOUS * bool(continuous.any())
        mask = torch.zeros(len(legal), n_disc, dtype=torch.bool)
        for k, x in enumerate(legal):
            mask[k, list(range(n_disc)) if x is None or args.atari["full_actions"] else x] = True
        self.args, self.device, self.K, self.A = args, device, len(legal), n_disc + n_cont
        self.rank, self.world = join_ranks(device)
        # the actor learns on h of C to C + H steps: later positions it has never seen
        self.window = min(WINDOW, args.context + args.horizon // 2)
        self.updates = 0
        self.total = args.warmup + -(-(args.steps - args.random_steps) // args.train_every)
        self.reset_mask = self.harmonise = not args.storm
        torch.manual_seed(args.seed)
        self.wm = self.make_world_model(
            K=self.K, A=self.A, clusters=args.clusters, experts=args.experts, topk=args.topk,
            norm="bn" if self.K == 1 else "gn", **size,
            max_len=max(args.length, args.context + args.horizon, WINDOW)).to(device)
        self.wm.vaes.to(memory_format=torch.channels_last)  # of images and kernels: faster
        self.Z = size["latents"] * size["classes"]
        i = self.Z + size["width"] + size["emb"]
        self.actor = Actor(i, hidden, mask, continuous, n_cont).to(device)
        self.critic = StackedMLP(args.clusters, i, hidden, 2, BINS).to(device)
        self.slow = copy.deepcopy(self.critic).requires_grad_(False)
        self.opt = torch.optim.Adam(self.wm.parameters(), args.lr, fused=True)
        self.agent_opt = torch.optim.Adam([*self.actor.parameters(), *self.critic.parameters()],
                                          args.agent_lr, eps=1e-5, fused=True)
        # per task: running mean of the loss, running percentiles of the returns
        for name in ("mean_loss", "low", "high"):
            self.register_buffer(name, torch.full((self.K,), math.nan, device=device))
        self.world_loss, self.imagine_step, self.agent_loss, self.act = (
            torch.compile(f) if args.compile else f
            for f in (world_model_loss, imagine_step, agent_loss, act))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def temperature(self):
        """Of the router: falls to 1 in a quarter of the run. A tensor: nothing compiles again."""
        fall = self.updates / max(1, self.total // 4)
        tau = self.start_tau - (self.start_tau - 1) * fall
        return torch.tensor(max(1.0, tau), device=self.device)

    def sample(self, frames, tasks=None):
        """B windows of L steps per task; each process of torchrun keeps its share. Sets the noise
        of the update that follows, which depends on the seed and its number alone."""
        a, self.draw = self.args, [self.args.seed, 1, self.updates]
        torch.manual_seed(draw_seed(*self.draw, self.rank))
        rng = np.random.default_rng(self.draw)
        batch = frames.sample(a.batch, a.length, rng, self.device, tasks)
        return [x[:, self.rank::self.world] for x in batch]

    def model_loss(self, batch, tasks=None):
        """Of the world model on all tasks, or a list of them -> loss, latents z, metrics (K,)."""
        tau, at = self.temperature(), slice(None) if tasks is None else tasks
        self.wm.train()
        with self.autocast():
            losses, more = self.world_loss(self.wm, *batch, tau, (tau - 1) / 4, gate=self.gate,
                                           reset_mask=self.reset_mask, task=tasks)
        losses = dict(zip(losses, over_ranks(torch.stack([*losses.values()]))))
        per_task = total_loss(losses, self.task_coef, self.scored)
        self.mean_loss[at] = mean = running(self.mean_loss[at], per_task.detach())
        loss = self.weigh(per_task, mean).sum()
        loss = loss + self.balance * balance_loss(more["scores"], self.args.topk)
        z = more.pop("z")
        return loss, z, {k: v.detach() for k, v in (losses | more).items()}

    def weigh(self, losses, means):
        """Every task's loss times its harmonious weight."""
        return losses / best_sigma(means) if self.harmonise else losses

    def imagine(self, z, batch):
        """I roll-outs of H steps per task that start in windows of C steps of z (K, B, L, Z)."""
        C, (K, B, L, _) = self.args.context, z.shape
        I, generator = self.args.rollouts // self.world, torch.Generator()
        generator.manual_seed(draw_seed(*self.draw, self.rank))
        row = torch.randint(B, (K, I, 1), generator=generator).to(self.device)
        start = torch.randint(L - C, (K, I, 1), generator=generator).to(self.device)
        steps = start + torch.arange(C + 1, device=self.device)
        at = torch.arange(K, device=self.device)[:, None, None], row, steps
        return self.imagine_from(z[at], batch[1][at], batch[4][at])

    def imagine_from(self, z, act, first):
        """Roll-outs after the real steps z (K, I, C+1, Z), act, first."""
        self.wm.eval()
        with self.autocast():
            return imagine(self.wm, self.actor, z, act, first, self.args.horizon,
                           self.temperature(), step=self.imagine_step, reset_mask=self.reset_mask,
                           dtype=torch.bfloat16 if self.args.bf16 else None)

    def policy_loss(self, dream, **more):
        """Of actor and critics -> loss, metrics. Updates the running percentiles."""
        with self.autocast():
            loss, low, high, metrics = self.agent_loss(
                self.actor, self.critic, self.slow, self.wm.cluster_of, *dream, self.low, self.high,
                **more)
        self.low, self.high = over_ranks(torch.stack([low, high]))  # of parts, averaged
        return loss, metrics

    def follow(self):
        """The slow critics take a step of 0.02 towards the critics."""
        torch._foreach_lerp_([*self.slow.parameters()], [*self.critic.parameters()], 0.02)

    def memory(self, R):
        """An empty window of past steps for R environments per task: past_z, past_a, n."""
        shape = self.K, R, self.window
        return [torch.zeros(*shape, self.Z, device=self.device),
                torch.zeros(*shape, self.A, device=self.device),
                torch.zeros(self.K, R, dtype=torch.long, device=self.device)]

    def play(self, obs, memory, seed, **more):
        """Actions (K, R, A) for numpy frames (K, R, 64, 64, 3), and the new memory."""
        torch.manual_seed(draw_seed(*seed))
        self.wm.eval()
        with self.autocast():
            action, *memory = self.act(self.wm, self.actor, torch.from_numpy(obs).to(self.device),
                                       *memory, self.temperature(), **more)
        return action.float().cpu().numpy(), memory

    def play_randomly(self, obs, memory, seed):
        """Uniform legal actions, with the arguments of `play`."""
        rng, n, legal = np.random.default_rng(seed), self.actor.n_disc, self.actor.legal.cpu()
        action = np.zeros((*obs.shape[:2], self.A), np.float32)
        for k, r in np.ndindex(*obs.shape[:2]):
            if self.actor.continuous[k]:
                action[k, r, n:] = rng.uniform(-1, 1, self.A - n)
            else:
                action[k, r, rng.choice(np.flatnonzero(legal[k]))] = 1
        return action, memory

    @torch.no_grad()
    def clone_modules(self, labels):
        """Give every task its cluster, and every cluster a copy of module 0 with its Adam moments:
        a fresh optimiser would take far too large first steps."""
        wm = self.wm
        wm.assign(labels)
        for vae in wm.vaes[1:]:
            vae.load_state_dict(wm.vaes[0].state_dict())
            for p, q in zip(vae.parameters(), wm.vaes[0].parameters()):
                self.opt.state[p] = {k: v.clone() for k, v in self.opt.state[q].items()}
        heads = [(head, self.opt) for head in (wm.prior_head, wm.reward_head, wm.end_head)]
        for head, opt in [*heads, (self.critic, self.agent_opt), (self.slow, self.agent_opt)]:
            for p in head.parameters():
                for x in [p, *(v for v in opt.state.get(p, {}).values() if v.ndim)]:
                    x.copy_(x[:1].expand_as(x))

    def get_extra_state(self):
        return {"updates": self.updates, "labels": self.wm.labels}

    def set_extra_state(self, state):
        self.updates = state["updates"]
        self.wm.assign(state["labels"])


def task_gradients(agent, frames, batches=32, reduce=sketch):
    """Gradients of every task's loss by the convolutions and linear layers of VAE and heads of
    module 0, means over batches with the same noise for all: sketches (K, layers, SKETCH)."""
    wm, a = agent.wm.eval(), agent.args
    weights = [p for p in wm.vaes[0].parameters() if p.ndim > 1]
    of_vae, out = len(weights), []
    for head in (wm.prior_head, wm.reward_head, wm.end_head):
        weights += [p for p in head.parameters() if p.shape[1] > 1]
    for k in range(agent.K):
        total = [torch.zeros_like(p) for p in weights]
        for i in range(batches):
            torch.manual_seed(draw_seed(a.seed, 2, i))
            rng = np.random.default_rng([a.seed, 2, i])
            batch = frames.sample(a.batch, a.length, rng, agent.device, [k])
            losses, _ = world_model_loss(wm, *batch, agent.temperature(), 0.0, gate=agent.gate,
                                         reset_mask=agent.reset_mask, task=[k])
            loss = total_loss(losses, agent.task_coef).sum()
            torch._foreach_add_(total, list(torch.autograd.grad(loss, weights)))
        flat = total[:of_vae] + [g[0] for g in total[of_vae:]]
        out.append(torch.stack([reduce(g.flatten().cpu()) for g in flat]))
    return torch.stack(out).numpy()


def find_clusters(agent, frames):
    """After the warm-up: cluster the tasks by their gradients, copy module 0 into every module."""
    if agent.args.clusters == 1:
        return {"labels": [0] * agent.K}
    grads = task_gradients(agent, frames)
    labels = from_first(cluster_tasks(grads, agent.args.clusters))
    agent.clone_modules(labels)
    return {"labels": labels, "similarity": task_similarity(grads).round(4).tolist()}


# -------------------------------------------------------------------------------------------- play
class Stage:
    """R environments of every task in lock step, and what the agent remembers of their episodes.

    seed(k, r, n): of episode n. frames: the replay that takes every step.
    finished: [step, environment, return, success] of every episode that has ended. On the other
    ranks of torchrun there is no fleet: they wait until the first has written the step."""
    STATE = "memory", "first", "finished", "episode", "ret", "success", "steps"

    def __init__(self, agent, fleet, R, seed, frames=None):
        J = agent.K * R
        self.agent, self.fleet, self.R, self.seed, self.frames = agent, fleet, R, seed, frames
        self.memory, self.first, self.finished, self.steps = agent.memory(R), [True] * J, [], 0
        self.episode, self.ret, self.success = [0] * J, [0.0] * J, [0.0] * J

    def begin(self):
        """Start all episodes, or bring them back to where they were, by their actions."""
        past = []
        for j, new in enumerate(self.first):
            acts = [] if new else self.frames.act[j, :self.frames.count]
            start = 0 if new else np.flatnonzero(self.frames.first[j, :len(acts)])[-1]
            past.append([self.plain(a) for a in acts[start:]])
        if self.fleet:
            self.obs = np.stack(self.fleet.reset(self.seeds(), past))

    def seeds(self, later=0):
        """Of the episodes that are played, or of those after them."""
        numbers = [(*divmod(j, self.R), n + later) for j, n in enumerate(self.episode)]
        return [self.seed(*x) % 2**31 for x in numbers]

    def plain(self, a):
        """What an environment takes: the number of a discrete action, or the continuous part."""
        n = self.agent.actor.n_disc
        return int(a[:n].argmax()) if n and a[:n].any() else a[n:]

    def send(self, choose, seed):
        """Let every environment take a step: choose(obs, memory, seed) -> (K, R, A), memory."""
        if self.fleet:
            obs = self.obs.reshape(-1, self.R, *self.obs.shape[1:])
            self.action, self.memory = choose(obs, self.memory, seed)
            flat = self.action.reshape(len(self.obs), -1)
            self.fleet.send([self.plain(a) for a in flat], self.seeds(later=1))

    def receive(self):
        """What came of it."""
        if not self.fleet:
            from_first(None)
            self.frames.count += 1
            return
        obs, rew, over, cut, info = zip(*self.fleet.receive())
        if self.frames:
            term = [end or i.get("life_lost", False) for end, i in zip(over, info)]
            act = self.action.reshape(len(obs), -1)
            self.frames.append(self.obs, act, rew, term, self.first)
            from_first(None)
        self.obs, self.first = np.stack(obs), [a or b for a, b in zip(over, cut)]
        self.steps += 1
        for j, new in enumerate(self.first):
            self.ret[j] += rew[j]
            self.success[j] = max(self.success[j], info[j]["success"])
            if new:
                self.finished.append([self.steps, j, float(self.ret[j]), float(self.success[j])])
                self.episode[j] += 1
                self.ret[j] = self.success[j] = 0.0
                self.memory[2][divmod(j, self.R)] = 0

    def state_dict(self):
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state):
        vars(self).update(state, memory=[x.to(self.agent.device) for x in state["memory"]])


# ------------------------------------------------------------------------------------------ method
def note(run, agent, metrics):
    """Hand the means over tasks to the log; now and then keep those of each for the curves."""
    run.note({k: x.float().mean() for k, x in metrics.items() if k not in ("scores", "J")})
    if agent.updates in (1, 10) or agent.updates % 50 == 0:
        row = {k: metrics[k].tolist() for k in ("rec", "dyn_raw", "rew")}
        run.history.append({"updates": agent.updates, **row})


def train(args, run, agent, stage):
    """Random play; a world model of it with one module; clusters of tasks, and a module for each;
    then play, model and agent at once -> what was clustered."""
    # the modules of a checkpoint have gone their own ways: clustering would overwrite them
    found, frames = {"labels": list(agent.wm.labels)} if args.checkpoint else {}, stage.frames
    run.keeps(agent=agent, opt=agent.opt, agent_opt=agent.agent_opt, stage=stage, frames=frames,
              found=found)
    warmup, sweeps = 0 if args.checkpoint else args.warmup, args.steps - args.random_steps
    run.expects(random=args.random_steps, warmup=warmup, sweeps=sweeps)
    stage.begin()

    for step in run.steps("random", args.random_steps):
        stage.send(agent.play_randomly, [args.seed, 4, step])
        stage.receive()

    for _ in run.steps("warmup", warmup):
        batch = agent.sample(frames)
        loss, _, metrics = agent.model_loss(batch)
        metrics["grad_norm"] = descend(loss, agent.opt, 1000.0)
        agent.updates += 1
        note(run, agent, metrics)

    for _ in run.once("clusters"):
        if not found:
            found.update(find_clusters(agent, frames))
            run.say(f"clusters of the tasks: {found['labels']}")

    for sweep in run.steps("sweeps", sweeps):
        stage.send(agent.play, [args.seed, 4, args.random_steps + sweep])
        if sweep % args.train_every == 0:  # the environments step while the networks learn
            batch = agent.sample(frames)
            loss, z, metrics = agent.model_loss(batch)
            metrics["grad_norm"] = descend(loss, agent.opt, 1000.0)
            agent.updates += 1
            dream = agent.imagine(z, batch)
            loss, more = agent.policy_loss(dream)
            more["agent_grad_norm"] = descend(loss, agent.agent_opt, 100.0)
            agent.follow()
            note(run, agent, metrics | more)
        stage.receive()
    return found


# -------------------------------------------------------------------------------------- evaluation
def evaluate(agent, tasks, options, episodes, seed, choose, film=None):
    """Whole episodes -> per task [(return, success)], and the actions (K, n, A) that were taken.
    choose as in Stage.send. film: folder for one episode of every task, as mp4."""
    K, R, taken = len(tasks), min(episodes, 4), []
    films = {task: [] for task in tasks if film}
    # so many episodes of every environment, whatever their length: no bias to short ones
    quota = [episodes // R + (r < episodes % R) for r in range(R)] * K
    with Fleet(np.repeat(tasks, R).tolist(), options) as fleet:
        stage = Stage(agent, fleet, R, lambda *which: draw_seed(seed, 5, *which))
        stage.begin()
        while any(n < q for n, q in zip(stage.episode, quota)):
            for k, images in enumerate(films.values()):
                if not stage.episode[k * R]:
                    images.append(stage.obs[k * R])
            stage.send(choose, [seed, 6, len(taken)])
            taken.append(stage.action)
            stage.receive()
    for task, images in films.items():
        large = np.stack(images).repeat(4, 1).repeat(4, 2)
        imageio.mimwrite(film / f"{task}.mp4", large, fps=15, macro_block_size=1)
    played = [[] for _ in tasks]
    for j, n in enumerate(quota):
        played[j // R] += [(ret, won) for _, i, ret, won in stage.finished if i == j][:n]
    return played, np.stack(taken, 1).reshape(K, -1, agent.A)


def evaluate_all(agent, tasks, options, episodes, seed, film=None):
    """{"agent", "blind", "random": per task [(return, success)]}; blind: one that draws from the
    agent's own actions, whatever it sees."""
    rng = np.random.default_rng([seed, 9])

    def blindly(obs, memory, seed):
        return np.stack([p[rng.integers(len(p), size=obs.shape[1])] for p in taken]), memory

    played, taken = evaluate(agent, tasks, options, episodes, seed, agent.play, film)
    blind, _ = evaluate(agent, tasks, options, episodes, seed, blindly)
    random, _ = evaluate(agent, tasks, options, episodes, seed, agent.play_randomly)
    return {"agent": played, "blind": blind, "random": random}


@torch.no_grad()
def open_loop_images(agent, batch, C):
    """Real, reconstructed and imagined images (K, B, L, 3, 64, 64) for real actions, of which only
    the first C images are seen by the imagination."""
    obs, acts, _, _, first = batch
    wm, x, L = agent.wm.eval(), to_images(obs), obs.shape[2]
    e, later = wm.embedding(), iter(acts[:, :, C:].unbind(2))
    z, recorded = draw_latent(wm.posterior(x, e)), SimpleNamespace(sample=lambda _: next(later))
    real = z[:, :, :C + 1], acts[:, :, :C + 1], first[:, :, :C + 1]
    states, *_ = imagine(wm, recorded, *real, L - C - 1, agent.temperature())
    dream = torch.cat([z[:, :, :C], states[..., :agent.Z]], 2)
    return x, wm.decode(z, e).clamp(0, 1), wm.decode(dream, e).clamp(0, 1)


def draw_dream(agent, frames, path, columns=12):
    """A picture of one window per task: real images, reconstructed ones below, and below these what
    is imagined after the first C images. `studies/mow_diagnosis.py` draws it with labels."""
    a = agent.args
    torch.manual_seed(draw_seed(a.seed, 8))
    batch = frames.sample(1, a.length, np.random.default_rng([a.seed, 8]), agent.device)
    images = torch.stack(open_loop_images(agent, batch, a.context))[:, :, 0]
    at = np.unique(np.linspace(0, a.length - 1, columns).round().astype(int))
    tiles = images[:, :, at].permute(1, 0, 4, 2, 5, 3)              # (K, 3, 64, columns, 64, 3)
    imageio.imwrite(path, (255 * tiles.reshape(agent.K * 3 * 64, -1, 3)).byte().cpu().numpy())


def report(tasks, labels, played, run):
    """The table at the end, also as results.csv -> its part of results.json."""
    rows = []
    for k, task in enumerate(tasks):
        ret = {who: np.array(x[k])[:, 0] for who, x in played.items()}
        n, storm = len(ret["agent"]), STORM_RETURN.get(task)
        rows.append({
            "task": task, "cluster": labels[k] + 1, "return": float(ret["agent"].mean()),
            "sem": float(ret["agent"].std(ddof=1) / math.sqrt(n)) if n > 1 else None,
            "blind": float(ret["blind"].mean()), "random": float(ret["random"].mean()),
            "human": ATARI_SCORES.get(task, (None, None))[1],
            "score": float(np.mean([score(task, *episode) for episode in played["agent"][k]])),
            "storm": storm, "storm_score": storm and score(task, storm, 0), "episodes": n})
    write_csv(run.dir / "results.csv", rows)
    print("\n" + "".join(f"{name:>12}" for name in rows[0]))
    for row in rows:
        words = [f"{x:,.2f}" if isinstance(x, float) else str(x or "-") for x in row.values()]
        print("".join(f"{word:>12}" for word in words))
    scores = [row["score"] for row in rows]
    mean, median = float(np.mean(scores)), float(np.median(scores))
    print(f"""mean score {mean:.3f}, median {median:.3f}; 1 training seed
score: human-normalised (Atari), best-normalised (small games), success (Meta-World)
sem: standard error over episodes
blind: the agent's own actions in random order; only a return above it shows that seeing pays
storm: published, 100k steps, one agent per game. MoW's mean for all 26 games: {MOW_MEAN_HNS}""")
    return {"rows": rows, "mean_score": mean, "median_score": median, "played": played,
            "published": {"mow_mean_26_games": MOW_MEAN_HNS,
                          "storm_mean_26_games_by_mow_authors": STORM_MEAN_HNS}}


# -------------------------------------------------------------------------------------------- main
def task_list(text):
    """Names of tasks from a set or a list with commas. SystemExit: an unknown one, or one twice."""
    sets = {"games": GAMES, "atari26": ATARI26, "mt10": MT10, "mt50": METAWORLD50}
    known, tasks = {*GAMES, *ATARI26, *METAWORLD50}, []
    for name in text.split(","):
        tasks += sets.get(name.strip(), (name.strip(),))
    for task in tasks:
        if task not in known and task.partition("@")[0] not in ATARI26:
            near = difflib.get_close_matches(task, [*sorted(known), *sets], 3, 0.4)
            raise SystemExit(
                f"--task {task!r} is unknown: expected a small game (catch), one of the Atari-100k "
                "benchmark, a Meta-World task (mw-reach), games, atari26, mt10 or mt50; nearest: "
                f"{', '.join(near) or 'none'}")
        if tasks.count(task) > 1:
            raise SystemExit(f"--task {text} names {task} twice: name every task once")
    return tasks


def settle(args, tasks, device):
    """Values for all flags that were left out. SystemExit: flags that nobody reads."""
    if args.eval_only:
        data.refuse(args, "steps random_steps warmup train_every batch rollouts lr agent_lr",
                    "--eval-only does not train")
    elif args.checkpoint:
        data.refuse(args, "warmup", "the modules of --checkpoint have their clusters")
    auto, K = "gpu" if device.type == "cuda" else "cpu", len(tasks)
    preset = auto if args.preset == "auto" else args.preset
    values, sizes = {**PRESETS[preset], **(FAST if args.fast else {})}, SIZES[preset]
    if preset == "paper":
        values["rollouts"] = 1024 if K == 1 else values["rollouts"]
        values["steps"] = 100_000 if set(tasks) - set(METAWORLD50) else 300_000
    values["clusters"] = min(values["clusters"], K)
    values["topk"] = min(values["topk"], args.experts or values["topk"])
    if args.storm:
        values |= dict(clusters=1, experts=1, topk=1, warmup=0)
        sizes = {**sizes, "emb": 0, "shared_layers": 0}
    atari = {**ATARI, "frame_cap": 1200} if args.fast else ATARI
    for name, known in (("sizes", sizes), ("atari", atari)):
        if strange := sorted(set(getattr(args, name)) - set(known)):
            raise SystemExit(f"--{name} {strange[0]}: expected some of {', '.join(known)}, each "
                             "with its number behind")
    return replace(args, preset=preset, sizes=sizes | args.sizes, atari=atari | args.atari,
                   **{k: v for k, v in values.items() if getattr(args, k) is None})


def check(args, K, world):
    """SystemExit: values that cannot work, alone or together."""
    ranges = dict.fromkeys(PRESETS["cpu"], (1, None)) | dict.fromkeys(
        ("seed", "warmup", "lr", "agent_lr", "save_every"), (0, None))
    data.check_ranges(args, ranges | dict(clusters=(1, K), topk=(1, args.experts)))
    size, longest = args.sizes, args.context + args.horizon
    least = {name: name not in ("emb", "shared_layers") for name in size}
    for wrong, words in (
            (args.storm and K > 1, f"--storm is the single-task baseline, but --task names {K} "
             "tasks: name one, or leave --storm out"),
            (any(size[name] < n for name, n in least.items()) or size["width"] % size["heads"],
             f"--sizes {size}: expected positive numbers, and heads that divide the width"),
            (not args.context < args.length <= args.random_steps <= args.steps,
             f"expected --context {args.context} < --length {args.length} <= --random-steps "
             f"{args.random_steps} <= --steps {args.steps}: windows are drawn from random steps"),
            (longest > args.length, f"--context {args.context} + --horizon {args.horizon} are "
             f"more than --length {args.length}: imagination would reach positions that the world "
             f"model never learned; type --length {longest} or more"),
            (args.eval_only and not args.checkpoint, "--eval-only plays a trained agent: add "
             "--checkpoint runs/<a run of mow.py>/checkpoint.pt"),
            (args.batch % world or args.rollouts % world, f"--batch {args.batch} and --rollouts "
             f"{args.rollouts} cannot be shared by {world} processes: type multiples of {world}")):
        if wrong:
            raise SystemExit(words)


def task_options(args, tasks):
    """Keyword arguments of make_env for every task."""
    atari = {k: x if k == "sticky" else int(x) for k, x in args.atari.items()}
    del atari["full_actions"]
    metaworld = dict(camera="corner4", repeat=1, length=500)
    return {t: metaworld if t in METAWORLD50 else {} if t in GAMES else atari for t in tasks}


def load_checkpoint(agent, file):
    """Networks and optimisers of another run. SystemExit: no such file, or other sizes."""
    try:
        state = torch.load(file, agent.device, weights_only=True)
        agent.load_state_dict(state["agent"])
        agent.opt.load_state_dict(state["opt"])
        agent.agent_opt.load_state_dict(state["agent_opt"])
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as e:
        raise SystemExit(f"--checkpoint {file} cannot be read or does not fit ({str(e)[:200]!r}): "
                         "expected runs/<a run of mow.py with these tasks and sizes>/checkpoint.pt")


def main(args: Args, make_agent=Agent):
    """Run everything and return what results.json holds (None on the other ranks of torchrun).

    make_agent: a subclass of Agent, for a study."""
    args = data.resumed(args) if args.resume else args
    device, why = choose_device(args.device)
    tasks = task_list(args.task)
    args = settle(args, tasks, device)
    check(args, len(tasks), int(os.environ.get("WORLD_SIZE", "1")))
    rank, _ = join_ranks(device)
    options, run, extra = task_options(args, tasks), Run("mow", args), {}
    with Fleet(tasks, options) if rank == 0 else contextlib.nullcontext() as fleet:
        agent = make_agent(args, from_first(fleet and fleet.legal), device)
        counts = {k: sum(p.numel() for p in m.parameters()) for k, m in agent.named_children()}
        run.say(f"{'STORM' if args.storm else 'MoW'}, {why} x {run.world}, parameters {counts}, "
                f"run folder {run.dir}\n{args}")
        if args.checkpoint:
            load_checkpoint(agent, args.checkpoint)
        if not args.eval_only:
            replay = run.dir / "frames", agent.K, args.steps, agent.A
            if rank == 0:
                Frames(*replay)
            from_first(None)  # from here on it is there for all processes
            stage = Stage(agent, fleet, 1, lambda k, r, n: draw_seed(args.seed, 3, k, n),
                          Frames(*replay))
            found = train(args, run, agent, stage)
            extra = {"clusters": found, "history": run.history, "finished": stage.finished}
    if rank:
        return run.finish({})
    if extra:
        S, J, _ = agent.wm.routing(agent.wm.embedding(), agent.temperature())
        extra["routing"] = {"scores": S.tolist(), "chosen": J.tolist()}
        draw_dream(agent, stage.frames, run.dir / "frames.png")
    print(f"playing {args.eval_episodes} episodes per task", flush=True)
    film = run.dir if args.capture_video else None
    played = evaluate_all(agent, tasks, options, args.eval_episodes, args.seed, film)
    return run.finish({**report(tasks, agent.wm.labels, played, run), **extra})


MOVED = {  # old words: new ones
    "--preset smoke": "--preset cpu", "--preset mid": "--preset gpu",
    "--preset full": "--preset paper", "--experiment cost": "python -m studies.mow_cost",
    "--grad-reduce": "python -m studies.mow_clusters --reduce mean",
    "--experiment clusters": "python -m studies.mow_variants --question clusters",
    "--experiment monolith": "python -m studies.mow_variants --question monolith"}
for _new, _old in {
        "python -m studies.mow_variants --question experts": "--gate --harmony --balance --tau "
        "--task-coef --no-reset-mask", "python -m studies.mow_clusters": "--cluster-only",
        "python -m studies.mow_pretrain": "--reward-free",
        "python -m studies.mow_tokens": "--routing --segment --switch-coef --prior-coef",
        "python -m studies.mow_storm_code": "--act-on-prior --fresh-contexts --lambda-compat",
        "--atari sticky 0.25 life_loss 1 noop 30 frame_cap 108000 full_actions 1, or some of it":
        "--sticky --life-loss --no-life-loss --noop --frame-cap --action-space",
        "--sizes width 64 heads 4 stem 8 .., or some of it": "--stem --latents --classes --width "
        "--heads --expert-layers --shared-layers --hidden --emb",
        "nothing, and change it in agent_loss": "--gamma --lam --entropy",
        "nothing; it follows from the tasks and --storm": "--mix-actions --norm --reset-mask",
        "--seed 1, --seed 2, .. one after the other; studies have --seeds": "--seeds"}.items():
    MOVED |= dict.fromkeys(_old.split(), _new)
for _old in ("transfer", "pretrain", "tokens", "fidelity"):
    MOVED[f"--experiment {_old}"] = f"python -m studies.mow_{_old}"
MOVED["--experiment experts"] = MOVED["--gate"]


if __name__ == "__main__":
    main(data.parse(Args, __doc__, MOVED))
