"""ED2: environment dynamics decomposition for world models in one file.

The idea (ED2, arXiv 2112.02817; sections, tables and equations in the order of Giridhar et al.,
"Explorations in Dynamics Decomposition for Multi-Task RL"): a robot's actions fall into groups
G_1 .. G_k that move different things. SD2 finds them by correlating actions with state changes
(Sec. 3.2); D2P predicts with one small model per group, each of which reads the whole state:
s' = (1/k) sum_i f_i(s, a_Gi), Eq. (2). Both run here on the world models of Sec. 5.1, TD-MPC2 and
DreamerV3, beside one model of equal size.

    python ed2.py --task walker-walk                  # TD-MPC2, 3 paired seeds: 6 minutes on 2
                                                      # cores; no difference to one model
    python ed2.py --task walker-walk --wm dreamerv3   # on a recurrent model: 4 minutes; the same

All controls and the verdicts: `python -m studies.ed2_tables`. Copy me with envs.py and data.py.

Shapes: B batch, T or H time, O obs, A action, D latent, k groups, w width of one sub-model; time
first: obs (H+1, B, O), act (H, B, A), rew (H, B). `groups` are lists of action indices.

Deviations from the paper:
 1. Data (Sec. 4): the paper used TD-MPC2's 20 GB set and replay of DreamerV3 runs; without
    --data-dir this script plays random actions, then an evolving linear policy: minutes, not days.
 2. Sub-models are as narrow as it takes to have the parameters of the single model; published were
    sub-models as wide as it, with k times as many parameters (studies/ed2_tables.py has both).
 3. TD-MPC2's errors are compared in the latents of one fixed encoder: two that are trained side by
    side have latents of different scale, so that their losses (Table 2) say nothing of each other.
 4. DreamerV3's dynamics loss (Table 1) is clipped at 1 nat and falls when the posterior says less;
    the verdict uses the open-loop error of decoded states instead, and both are shown.
 5. On a CPU, batches, sequences and updates are smaller and learning rates higher.
 6. TD-MPC2 has two Q functions, as in its 1M size, without dropout. DreamerV3 starts every
    recording from the zero state instead of a stored one, and has no actor (studies/ed2_online.py).
"""
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import Episodes, Run
from envs import Workers, task_facts


@dataclass
class Args:
    task: str = "walker-walk"
    """any task of envs.py that does not end by itself"""
    seed: int = 1
    """first training seed; data and its split have their own, fixed seeds"""
    seeds: int = 3
    """paired trainings of every model: seed, seed + 1, .."""
    wm: Literal["tdmpc2", "dreamerv3"] = "tdmpc2"
    """backbone: TD-MPC2's MLP dynamics or DreamerV3's recurrent state-space model"""
    partition: Literal["sd2", "published", "full", "none"] = "sd2"
    """groups: SD2's on random data; published; one per action; one. More: studies.ed2_partitions"""
    eta: float = 0.0
    """SD2 merges while the best score is above this (0 gives the published dm_control groups)"""
    data_dir: str | None = None
    """episodes to train on (e.g. runs/<a run of pwm.py>/episodes) instead of made ones"""
    fast: bool = False
    """tiny data and budgets: the whole pipeline in about a minute, to see that it runs"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes the GPU when there is one"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for the losses; on a CPU its minutes are more than these short runs take"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes: for roll-outs, and on a CPU for trainings side by side, of one thread each"""
    resume: str | None = None
    """continue the run in this folder; its flags are read from there"""
    save_every: float = 60.0
    """seconds between checkpoints of a training"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""
    # left out, these follow from device and backbone and are printed at the start
    updates: int | None = None
    """gradient steps of every training"""
    batch: int | None = None
    """sequences per update"""
    length: int | None = None
    """steps per sequence (TD-MPC2: 3, DreamerV3: 64)"""
    lr: float | None = None
    """learning rate (TD-MPC2: 3e-4, its encoder 0.3 of it; DreamerV3: 4e-5)"""
    model_size: str | None = None
    """tdmpc2: 1M or 5M (of the whole agent); dreamerv3: 1m, 12m, 25m, 50m"""
    data_steps: int | None = None
    """agent steps of own replay, beside 20,000 random ones"""


# ------------------------------------------------------------------------------------------ maths
BINS, BIN_LIMIT = 101, 10.0  # TD-MPC2's reward and value classes, equally spaced in symlog space
CONT = 1 - 1 / 333  # DreamerV3's discount: the continue head learns that any step may be the last


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


def symexp_bins(device):
    """(255,) values of DreamerV3's reward classes: symexp-spaced to e^20 - 1, and mirrored at 0."""
    half = symexp(torch.linspace(0, 20, 128, device=device))
    return torch.cat([-half[1:].flip(0), half])


def symexp_two_hot_loss(logits, x):
    """Cross-entropy of logits (.., 255) with x (..), split linearly in raw space: the mean is x."""
    bins = symexp_bins(x.device)
    k = (symlog(x) * (127 / 20) + 127).nan_to_num().clamp(0, 253).long()  # `high` keeps a NaN
    high = ((x - bins[k]) / (bins[k + 1] - bins[k])).clamp(0, 1)
    logp = logits.log_softmax(-1)
    low = logp.gather(-1, k[..., None])[..., 0]
    return -(1 - high) * low - high * logp.gather(-1, k[..., None] + 1)[..., 0]


def unimix(logits):
    """Log-probabilities of 0.99 softmax + 0.01 uniform: (.., groups, classes)."""
    return (0.99 * logits.float().softmax(-1) + 0.01 / logits.shape[-1]).log()


def kl(p, q):
    """KL(p || q) in nats, summed over groups: (.., groups, classes) log-probabilities -> (..)."""
    return (p.exp() * (p - q)).sum((-2, -1))


def draw_gumbel(shape, generator):
    """Noise for `sample_latent`."""
    u = torch.rand(shape, generator=generator, device=generator.device)
    return -(-u.clamp(1e-10, 1 - 6e-8).log()).log()


def sample_latent(logp, gumbel):
    """Gumbel-max with straight-through gradient: logp, gumbel (.., S, C) -> z (.., S C)"""
    index, p = (logp.detach() + gumbel).argmax(-1, keepdim=True), logp.exp()
    one_hot = (index == torch.arange(p.shape[-1], device=p.device)).to(p.dtype)
    return (one_hot + p - p.detach()).flatten(-2)


def linear_fall(step, total, lr, final=0.03):
    """Constant, then linear to `final` of it in the second half: short trainings end converged."""
    return lr * min(1.0, final + (1 - final) * 2 * (1 - step / total))


# ------------------------------------------------ SD2: sub-dynamics discovery (Sec. 3.2, Fig. 1)
# Groups that ED2's authors published for dm_control's robots, actuator numbers in file order.
PUBLISHED = {
    "walker": [[0, 1, 3, 4], [2], [5]], "cheetah": [[0, 1], [2], [3, 4], [5]],
    "hopper": [[0, 1], [2], [3]], "reacher": [[0], [1]], "finger": [[0], [1]],
    "humanoid": [[0, 5, 11], [1, 15, 16, 17, 18, 19, 20], [2, 3, 9], [4, 10], [6, 8], [7],
                 [12, 14], [13]]}


def pearson_features(act, delta):
    """F (A, n): |Pearson correlation| of every action with every state change that varies.

    act (N, A), delta (N, O) = next state - state. An action that never varies has a row of zeros.
    """
    act, delta = np.asarray(act, np.float64), np.asarray(delta, np.float64)
    finite = np.isfinite(act).all() and np.isfinite(delta).all()
    if len(act) != len(delta) or len(act) < 2 or not finite:
        raise SystemExit(f"discover got actions {act.shape} and state changes {delta.shape}: "
                         "expected as many rows of both, at least 2, all finite")
    delta = delta[:, delta.std(0) > 1e-8]  # constant dimensions would be 0/0
    a_std = act.std(0)
    act = (act - act.mean(0)) / np.where(a_std > 1e-8, a_std, np.inf)
    delta = (delta - delta.mean(0)) / delta.std(0)
    return np.abs(act.T @ delta) / len(act)


def cosine(features):
    """Similarity (A, A) of the rows of F (A, n); a row of zeros resembles only itself."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = np.divide(features, norm, out=np.zeros_like(features), where=norm > 1e-12)
    sim = unit @ unit.T
    np.fill_diagonal(sim, 1.0)
    return sim


def relatedness(sim, P, Q):
    """How much more alike P and Q are than either is to all but the other, own members included."""
    everything = set(range(len(sim)))

    def total(X, Y):
        return sim[np.ix_(sorted(X), sorted(Y))].sum()

    not_p, not_q = everything - set(P), everything - set(Q)
    between = total(P, Q) / (len(P) * len(Q))
    outside = (total(P, not_q) + total(Q, not_p)) / (len(P) * len(not_q) + len(Q) * len(not_p))
    return between - outside


def agglomerate(sim, eta=0.0):
    """Merge the most related groups while they are above eta: (groups, every merge considered).

    sim (A, A). The last entry of the log is the first merge that was refused. Ties: lowest indices.
    """
    groups, log = [[i] for i in range(len(sim))], []
    while len(groups) > 1:
        scored = [(relatedness(sim, groups[i], groups[j]), i, j)
                  for i, j in combinations(range(len(groups)), 2)]
        best, i, j = max(scored, key=lambda x: (round(x[0], 12), -x[1], -x[2]))
        pair = [groups[i], groups[j]]
        log.append({"merge": pair, "score": float(best), "done": bool(best > eta)})
        if best <= eta:
            break
        groups = sorted([g for g in groups if g not in pair] + [sorted(pair[0] + pair[1])])
    return groups, log


def discover(act, delta, eta=0.0):
    """SD2: groups of action indices, e.g. [[0, 1], [2]], from act (N, A) and changes (N, O)."""
    return agglomerate(cosine(pearson_features(act, delta)), eta)[0]


def assignment(groups, act_dim):
    """The partition as a float matrix (A, k)."""
    out = torch.zeros(act_dim, len(groups))
    for i, g in enumerate(groups):
        out[g, i] = 1.0
    return out


# --------------------------------------------------------------------- networks of both backbones
def tiny(*shape):
    """A parameter of deviation 0.02, as all weights of TD-MPC2 begin."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


class Stacked(nn.Module):
    """Linear layers side by side, k, or k x g for k networks of g blocks: one batched product.

    weight (k, .., I, J), x (k, .., B, I) -> (k, .., B, J). `apart`: what LaProp clips for each k.
    """

    apart = ("weight", "bias")

    def __init__(self, weight):
        super().__init__()
        *n, _, j = weight.shape
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(*n, 1, j))

    def forward(self, x):
        bias, weight = self.bias.flatten(0, -3), self.weight.flatten(0, -3)
        return torch.baddbmm(bias, x.flatten(0, -3), weight).unflatten(0, x.shape[:-2])


# ---- TD-MPC2 (arXiv 2310.16828, Sec. 3.1)
class NormedLinear(nn.Linear):
    """Linear -> LayerNorm -> activation, TD-MPC2's block: (.., I) -> (.., J)."""

    def __init__(self, i, j, act=F.mish):
        super().__init__(i, j)
        self.ln, self.act = nn.LayerNorm(j), act

    def forward(self, x):
        return self.act(self.ln(super().forward(x).float()))


class NormedStacked(Stacked):
    """k such blocks side by side: (k, B, I) -> (k, B, J)."""

    def __init__(self, k, i, j, act=F.mish):
        super().__init__(tiny(k, i, j))
        self.gain = nn.Parameter(torch.ones(k, 1, j))
        self.shift, self.act = nn.Parameter(torch.zeros(k, 1, j)), act

    def forward(self, x):
        x = super().forward(x)
        return self.act(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift)


def simnorm(x, V=8):
    """Softmax over groups of V: (.., D) -> (.., D)."""
    return x.unflatten(-1, (-1, V)).softmax(-1).flatten(-2)


class Dynamics(nn.Module):
    """D2P on TD-MPC2: k trunks (latent, own actions) -> w -> w, and a head; one group is its MLP.

    The head reads the mean of the trunks' last layers, as ED2 on MBPO (a head each and the mean of
    their outputs: studies/ed2_cores.py). No loop over trunks: their first layer is one product with
    W_z (D, k w) and W_a (A, k w), W_a masked: other groups' actions have weight and gradient 0.
    """

    def __init__(self, latent, act_dim, width, groups):
        super().__init__()
        k, self.width = len(groups), width
        self.register_buffer("assign", assignment(groups, act_dim))  # (A, k)
        self.w_z, self.w_a = tiny(latent, k * width), tiny(act_dim, k * width)
        self.bias = nn.Parameter(torch.zeros(k * width))
        self.gain = nn.Parameter(torch.ones(k, width))
        self.shift = nn.Parameter(torch.zeros(k, width))
        self.second = NormedStacked(k, width, width)
        self.head = NormedStacked(1, width, latent, simnorm)

    def trunks(self, z, act):
        """z (B, D), act (B, A) -> last hidden layers (k, B, w)"""
        w_a = self.w_a * self.assign.repeat_interleave(self.width, 1)
        x = (torch.addmm(self.bias, z, self.w_z) + act @ w_a).unflatten(-1, self.gain.shape)
        x = F.mish(F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift)  # own statistics each
        return self.second(x.transpose(0, 1))

    def forward(self, z, act):  # -> next z (B, D)
        return self.head(self.trunks(z, act).mean(0, keepdim=True))[0]


class TDMPC2(nn.Module):
    """TD-MPC2: encoder, reward, policy prior, E Q functions and their slow copy, dynamics."""

    def __init__(self, obs_dim, act_dim, latent, hidden, dynamics, E=2):
        super().__init__()
        self.E = E
        self.encoder = tdmpc2_encoder(obs_dim, latent)
        self.reward, self.prior = (nn.Sequential(
            NormedLinear(i, hidden), NormedLinear(hidden, hidden), nn.Linear(hidden, j))
            for i, j in ((latent + act_dim, BINS), (latent, 2 * act_dim)))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.zeros_(self.reward[-1].weight)
        self.q, self.q_slow = (nn.Sequential(
            NormedStacked(E, latent + act_dim, hidden), NormedStacked(E, hidden, hidden),
            Stacked(tiny(E, hidden, BINS))) for _ in range(2))
        nn.init.zeros_(self.q[-1].weight)
        self.q_slow.load_state_dict(self.q.state_dict())
        self.q_slow.requires_grad_(False)
        self.dynamics = dynamics  # last: all variants of a seed start from the same other parts

    def q_logits(self, net, z, act):
        """(.., D), (.., A) -> (E, .., BINS)"""
        x = torch.cat([z, act], -1)
        return net(x.flatten(0, -2).expand(self.E, -1, -1)).unflatten(1, x.shape[:-1])

    def policy(self, z, noise):
        """z (.., D), noise (.., A) -> act in [-1, 1], log-probability (..)"""
        mean, s = self.prior(z).chunk(2, -1)
        log_std = -10 + 6 * (torch.tanh(s) + 1)
        act = torch.tanh(mean + log_std.exp() * noise)
        gauss = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return act, gauss - (F.relu(1 - act.square()) + 1e-6).log().sum(-1)


def tdmpc2_encoder(obs_dim, latent):
    """Observations (.., O) -> latents (.., D)."""
    return nn.Sequential(NormedLinear(obs_dim, 256), NormedLinear(256, latent, simnorm))


# ---- DreamerV3 (arXiv 2301.04104, version 2)
def truncated_normal(shape, fan_in, scale=1.0):
    """A parameter of deviation scale / sqrt(fan_in); 1.1368 makes up for the cut at two of them."""
    std = 1.1368 * scale * fan_in**-0.5
    x = torch.zeros(shape)
    return nn.Parameter(nn.init.trunc_normal_(x, std=std, a=-2 * std, b=2 * std) if std else x)


def linear(i, j, scale=1.0):
    """A linear layer with DreamerV3's initial weights."""
    layer = nn.Linear(i, j)
    layer.weight = truncated_normal((j, i), i, scale)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(i, units, layers, out=None, scale=1.0):
    """`layers` x [Linear, RMSNorm, SiLU] and, if `out`, a Linear whose weights start at `scale`."""
    blocks = []
    for n in range(layers):
        blocks += [linear(units if n else i, units), nn.RMSNorm(units, 1e-4), nn.SiLU()]
    return nn.Sequential(*blocks, *([linear(units, out, scale)] if out else []))


class RSSM(nn.Module):
    """D2P on DreamerV3: h' = mean_i core_i(h, z, a_Gi), prior p(z' | h'), posterior q(z' | h', e).

    groups: None for one core that sees all actions, DreamerV3 itself. Each of k sub-cores has its
    own embedding of its actions, hidden layer (g blocks of width / g units) and GRU; they share h,
    z and embeddings of both (U each). Every h_i' has size D, so `width` is what matches sizes. No
    loop over groups: first layers are one masked product, later ones are batched, and
    [h, embeddings] is never copied k times, because its parts have their own products.
    """

    apart = ("act_weight", "act_bias", "act_gain", "hid_gain")  # see `Stacked`

    def __init__(self, act_dim, embed, deter, hidden, classes, groups=None, width=None, stoch=32,
                 blocks=8):
        super().__init__()
        groups, width = groups or [list(range(act_dim))], width or deter
        k, U, g, latent = len(groups), hidden, blocks, stoch * classes
        self.deter, self.stoch, self.classes, self.blocks = deter, stoch, classes, g
        self.h_in, self.z_in = mlp(deter, U, 1), mlp(latent, U, 1)
        # weights of other groups' actions are 0, and so is their gradient
        self.register_buffer("act_mask", assignment(groups, act_dim).T[..., None], persistent=False)
        own = torch.stack([truncated_normal((act_dim, U), len(G)).detach() for G in groups])
        self.act_weight = nn.Parameter(own * self.act_mask)  # (k, A, U)
        self.act_bias = nn.Parameter(torch.zeros(k, U))
        self.act_gain = nn.Parameter(torch.ones(k, U))
        i, j = deter // g + 3 * U, width // g
        self.hid = Stacked(truncated_normal((k, g, i, j), g * i))  # fan-in: of all blocks
        self.hid_gain = nn.Parameter(torch.ones(k, g, j))
        self.gru = Stacked(truncated_normal((k, g, j, 3 * deter // g), g * j))
        self.prior_net = mlp(deter, U, 2, latent)
        self.post_net = mlp(deter + embed, U, 1, latent)

    def core_weights(self):
        """Rearranged weights, made once for all steps of a sequence."""
        W, d, U = self.hid.weight, self.deter // self.blocks, self.act_bias.shape[-1]
        actions = (self.act_weight * self.act_mask).transpose(0, 1).flatten(1)  # (A, k U)
        # W (k, g, d + 3U, w/g): the input of a block is its d of h, embeddings of h, z and a
        from_h = W[:, :, :d].permute(1, 2, 0, 3).flatten(2)  # (g, d, k w/g)
        from_x = W[:, :, d:d + 2 * U].permute(2, 0, 1, 3).flatten(1)  # (2U, k w)
        from_a = W[:, :, d + 2 * U:].transpose(1, 2).flatten(2)  # (k, U, w)
        return actions, from_h, from_x, from_a

    def act_input(self, weights, act):
        """What actions (.., A) add to the hidden layers: (.., k, g, w/g), for a whole recording."""
        # the environment clips; beyond [-1, 1] an action becomes its sign, with a scaled gradient
        act = act / act.detach().abs().clamp(min=1)
        x = (act.flatten(0, -2) @ weights[0]).unflatten(-1, self.act_bias.shape) + self.act_bias
        x = F.silu(F.rms_norm(x, x.shape[-1:], eps=1e-4) * self.act_gain)  # (n, k, U)
        x = torch.bmm(x.transpose(0, 1), weights[3]).transpose(0, 1)  # (n, k, w)
        x = x.unflatten(-1, (self.blocks, -1)) + self.hid.bias[:, :, 0]
        return x.unflatten(0, act.shape[:-1])

    def mean_square(self, x):  # (B, k, g, w/g), over all blocks of a sub-core
        return x.square().mean((-2, -1), keepdim=True)

    def subcores(self, weights, h, z, act_in):
        """h (B, D), z (B, S C), act_in (B, k, g, w/g) -> next states h_i of all (k, g, B, D/g)."""
        hs = h.unflatten(-1, (self.blocks, -1)).transpose(0, 1)  # (g, B, D/g)
        x = act_in + (torch.cat([self.h_in(h), self.z_in(z)], -1) @ weights[2]).view_as(act_in)
        x = x + torch.bmm(hs, weights[1]).unflatten(-1, (-1, x.shape[-1])).permute(1, 2, 0, 3)
        x = F.silu(x * torch.rsqrt(self.mean_square(x) + 1e-4) * self.hid_gain)
        reset, cand, update = self.gru(x.permute(1, 2, 0, 3)).chunk(3, -1)  # (k, g, B, D/g)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * hs

    def step(self, weights, h, z, act_in):
        """Eq. (2) on the recurrent state: the mean of the sub-cores' next states, (B, D)."""
        return self.subcores(weights, h, z, act_in).mean(0).transpose(0, 1).flatten(1)

    def classify(self, x):
        """Logits (.., S C) -> log-probabilities (.., S, C)."""
        return unimix(x.unflatten(-1, (self.stoch, self.classes)))

    def prior(self, h):
        return self.classify(self.prior_net(h))

    def posterior(self, h, embed):
        return self.classify(self.post_net(torch.cat([h, embed], -1)))

    def observe(self, embed, act, gumbel):
        """Posterior states of recordings, which start from the zero state.

        embed (T+1, B, U), act (T, B, A), gumbel (T+1, B, S, C) -> h (T+1, B, D), z (T+1, B, S C),
        log-probabilities of the posteriors (T+1, B, S, C)
        """
        weights, states, B = self.core_weights(), [], embed.shape[1]
        before = torch.cat([torch.zeros_like(act[:1]), act])  # the action that led to each state
        h, z = embed.new_zeros(B, self.deter), embed.new_zeros(B, self.stoch * self.classes)
        for e, a, g in zip(embed.unbind(0), self.act_input(weights, before).unbind(0), gumbel):
            h = self.step(weights, h, z, a)
            post = self.posterior(h, e)
            z = sample_latent(post, g)
            states.append((h, z, post))
        return [torch.stack(x) for x in zip(*states)]


class DreamerV3(nn.Module):
    """DreamerV3's world model: encoder, RSSM, decoder, reward and continue heads (its Eq. (1))."""

    def __init__(self, obs_dim, act_dim, deter, hidden, classes, units, groups=None, width=None,
                 stoch=32):
        super().__init__()
        feat = deter + stoch * classes
        self.encoder = mlp(obs_dim, units, 3)
        self.rssm = RSSM(act_dim, units, deter, hidden, classes, groups, width, stoch)
        self.decoder = mlp(feat, units, 3, obs_dim)
        self.reward = mlp(feat, units, 1, 255, scale=0.0)
        self.cont = mlp(feat, units, 1, 1)


# ---- sizes
TDMPC2_SIZES = {"1M": (128, 384), "5M": (512, 512)}  # millions of the agent: latent, width
DREAMER_SIZES = {  # named by their authors' totals with convolutions
    "1m": dict(deter=512, hidden=64, classes=4, units=64),
    "12m": dict(deter=2048, hidden=256, classes=16, units=256),
    "25m": dict(deter=3072, hidden=384, classes=24, units=384),
    "50m": dict(deter=4096, hidden=512, classes=32, units=512)}


def counter(wm, model_size):
    """(count, width of the single model): count(groups, width) -> unmasked parameters of D2P."""
    def tdmpc2(groups, width):
        trunks = sum((latent + len(G)) * width + width * width + 6 * width for G in groups)
        return trunks + (width + 3) * latent

    def dreamerv3(groups, width):
        inputs = deter + 32 * classes + 4 + sum(len(G) + 2 for G in groups)  # of the embeddings
        core = (deter // 8 + 3 * hidden + 2) * width + 3 * deter // 8 * width + 3 * deter
        return hidden * inputs + len(groups) * core

    if wm == "tdmpc2":
        latent, hidden = TDMPC2_SIZES[model_size]
        return tdmpc2, hidden
    deter, hidden, classes, _ = DREAMER_SIZES[model_size].values()
    return dreamerv3, deter


def match_width(count, target, step=8):
    """The multiple of `step` whose count(width) is closest to target. SystemExit: over 5 % off."""
    width = min(range(step, 2**15, step), key=lambda w: abs(count(w) - target))
    if abs(count(width) / target - 1) > 0.05:
        raise SystemExit(f"no width gives {target:,} parameters within 5 % (width {width} has "
                         f"{count(width):,}): use a larger --model-size")
    return width


# ------------------------------------------------------------------------------------------ losses
def unroll(dynamics, z, act):
    """z (B, D), act (H, B, A) -> open-loop latents (H, B, D)."""
    out = []
    for a in act:
        z = dynamics(z, a)
        out.append(z)
    return torch.stack(out)


def consistency_loss(dynamics, z, act, target, rho=0.5):
    """(1/H) sum_t rho^t MSE_t of open-loop latents, Table 2: z (B, D), act, target (H, B, ..)."""
    error = (unroll(dynamics, z, act) - target).square().mean((1, 2))
    return (error * rho ** torch.arange(len(act), device=error.device)).mean()


def tdmpc2_loss(model, obs, act, rew, noise, pair, rho=0.5, gamma=0.99):
    """20 consistency + 0.1 reward + 0.1 value on open-loop latents (TD-MPC2, Sec. 3.1).

    noise (H, B, A) is the policy's in the value target, pair (2,) the slow Q functions of its
    minimum. -> loss, metrics, detached z (H+1, B, D).
    """
    with torch.no_grad():
        target = model.encoder(obs[1:])
        a, _ = model.policy(target, noise)
        slow = two_hot_inv(model.q_logits(model.q_slow, target, a).index_select(0, pair)).amin(0)
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
    metrics = dict(dyn=consistency.detach(), reward=reward.detach(), value=q_loss.detach())
    return loss, metrics, z.detach()


def policy_loss(model, z, noise, scale, rho=0.5):
    """Maximise Q / scale + 1e-4 entropy on detached z (H+1, B, D) -> loss, new scale (of Q)."""
    act, logp = model.policy(z, noise)
    q = two_hot_inv(model.q_logits(model.q, z, act)).mean(0)
    with torch.no_grad():
        p5, p95 = torch.quantile(q[0], torch.tensor([0.05, 0.95], device=z.device))
        scale = scale.lerp((p95 - p5).clamp(min=1.0), 0.01)
    weight = rho ** torch.arange(len(z), device=z.device)
    return (weight[:, None] * (1e-4 * logp - q / scale)).mean(), scale


def rssm_loss(model, obs, act, rew, gumbel, skip=0):
    """DreamerV3's Eqs. (2) and (3): reconstruction, reward, continuation, KL with 1 free nat.

    obs (T+1, B, O), act (T, B, A), rew (T, B), gumbel (T+1, B, S, C); metrics leave out the first
    `skip` steps, which suffer from the zero state; dyn is the KL with free nats (Table 1), dyn_raw
    without. -> loss, metrics, (h (T+1, B, D), z (T+1, B, S C)).
    """
    target = symlog(obs)
    h, z, post = model.rssm.observe(model.encoder(target), act, gumbel)
    prior, feat = model.rssm.prior(h), torch.cat([h, z], -1)
    dyn, rep = kl(post.detach(), prior), kl(post, prior.detach())  # (T+1, B)
    cont = model.cont(feat)[..., 0]
    more = torch.full_like(cont, CONT)
    terms = dict(
        rec=(model.decoder(feat) - target).square().sum(-1),
        rew=symexp_two_hot_loss(model.reward(feat[1:]), rew),  # earned by arriving at feat[1:]
        con=F.binary_cross_entropy_with_logits(cont, more, reduction="none"),
        dyn=dyn.clamp(min=1), rep=rep.clamp(min=1))  # clipped per step, then averaged
    loss = sum((0.1 if name == "rep" else 1.0) * x.mean() for name, x in terms.items())
    terms |= dict(dyn_raw=dyn, post_entropy=-(post.exp() * post).sum((-2, -1)),
                  prior_entropy=-(prior.exp() * prior).sum((-2, -1)))
    metrics = {k: x.detach()[max(skip - (k == "rew"), 0):].mean() for k, x in terms.items()}
    return loss, metrics, (h, z)


class LaProp(torch.optim.Optimizer):
    """DreamerV3's optimiser: adaptive gradient clipping, division by the RMS, then momentum.

    Each tensor's gradient norm is at most 0.3 of its weight norm; what a module names in `apart` is
    clipped for each entry of its first axis alone, so that stacked networks train as separate ones.
    """

    def __init__(self, model, lr=4e-5, warmup=1000):
        self.warmup, params, self.dims = warmup, [], []
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                params.append(p)
                self.dims.append(list(range(name in getattr(module, "apart", ()), p.ndim)))
        super().__init__(params, dict(lr=lr))
        for p in params:
            self.state[p] = dict(mu=torch.zeros_like(p), nu=torch.zeros_like(p))
        self.state[params[0]]["steps"] = torch.zeros((), device=params[0].device)  # no host sync

    def norms(self, tensors):
        norm = torch.linalg.vector_norm
        return [norm(x, dim=dims, keepdim=True) for x, dims in zip(tensors, self.dims)]

    @torch.no_grad()
    def step(self, clip=0.3, beta1=0.9, beta2=0.999, eps=1e-20):
        (group,) = self.param_groups
        params = group["params"]
        mu, nu = ([self.state[p][k] for p in params] for k in ("mu", "nu"))
        steps = self.state[params[0]]["steps"].add_(1)
        limit, grads = self.norms(params), [p.grad for p in params]
        torch._foreach_clamp_min_(limit, 1e-3)
        torch._foreach_mul_(limit, clip)
        torch._foreach_div_(limit, self.norms(grads))  # inf where the gradient is 0
        torch._foreach_clamp_max_(limit, 1.0)
        grads = torch._foreach_mul(grads, limit)
        torch._foreach_mul_(nu, beta2)
        torch._foreach_addcmul_(nu, grads, grads, 1 - beta2)
        rms = torch._foreach_div(nu, 1 - beta2**steps)
        torch._foreach_sqrt_(rms)
        torch._foreach_add_(rms, eps)
        torch._foreach_lerp_(mu, torch._foreach_div(grads, rms), 1 - beta1)
        lr = group["lr"] * (steps / self.warmup).clamp(max=1) / (1 - beta1**steps)
        torch._foreach_sub_(params, torch._foreach_mul(mu, lr))


# -------------------------------------------------------------------------------------- training
def optimisers(model, args, joint):
    """(optimiser of the world model, that of TD-MPC2's policy prior or None)."""
    if args.wm == "dreamerv3":
        return LaProp(model, args.lr, max(1, min(1000, args.updates // 10))), None
    if not joint:
        return torch.optim.Adam([dict(params=model.parameters(), scale=1.0)], foreach=True), None
    scales = {"encoder": 0.3, "reward": 1.0, "q": 1.0, "dynamics": 1.0}
    groups = [dict(params=getattr(model, k).parameters(), scale=x) for k, x in scales.items()]
    prior = torch.optim.Adam(model.prior.parameters(), args.lr, eps=1e-5, foreach=True)
    return torch.optim.Adam(groups, foreach=True), prior


def train(run, model, sampler, args, seed, encoder=None):
    """Fit a world model to the replay; every variant of a seed sees the same batches.

    encoder: `model` is TD-MPC2's dynamics alone, in the latents of this fixed encoder. Returns the
    dynamics loss that Tables 1 and 2 show, averaged over the last tenth of training.
    """
    recurrent, joint = args.wm == "dreamerv3", args.wm == "tdmpc2" and encoder is None
    device, begin = next(model.parameters()).device, int(0.9 * args.updates)
    (opt, prior_opt), generator = optimisers(model, args, joint), torch.Generator(device)
    generator.manual_seed(seed)
    kept = dict(scale=torch.ones(()), shown=torch.zeros(args.updates - begin))
    run.keeps(model=model, opt=opt, prior_opt=prior_opt, rng=generator, kept=kept)
    kept.update({k: x.to(device) for k, x in kept.items()})
    losses = rssm_loss, tdmpc2_loss, consistency_loss, policy_loss
    if args.compile:
        torch._dynamo.reset()  # of the trainings before, whose shapes differ
        losses = [torch.compile(f, dynamic=False) for f in losses]
    recurrent_loss, joint_loss, latent_loss, prior_loss = losses
    for step in run.steps("update", args.updates):
        obs, act, rew, *_ = sampler.sequences(args.batch, generator)  # sample
        if recurrent:  # loss
            latents = model.rssm.stoch, model.rssm.classes
            gumbel = draw_gumbel((len(obs), args.batch, *latents), generator)
            loss, metrics, _ = recurrent_loss(model, obs, act, rew, gumbel, 8)
        elif joint:
            noise = torch.randn(len(obs), *act.shape[1:], generator=generator, device=device)
            pair = torch.randperm(model.E, generator=generator, device=device)[:2]
            loss, metrics, z = joint_loss(model, obs, act, rew, noise[1:], pair)
        else:
            z = encoder(obs)
            loss = 20 * latent_loss(model, z[0], act, z[1:])
            metrics = dict(dyn=loss.detach() / 20)
        rate = linear_fall(step, args.updates, args.lr)
        metrics["grad_norm"] = descend(opt, loss, rate, math.inf if recurrent else 20.0)
        if joint:  # the prior moves, its judges do not
            model.q.requires_grad_(False)
            loss, kept["scale"] = prior_loss(model, z, noise, kept["scale"])
            descend(prior_opt, loss, args.lr, 20.0)
            model.q.requires_grad_(True)
            fast = [p.detach() for p in model.q.parameters()]
            torch._foreach_lerp_(list(model.q_slow.parameters()), fast, 0.01)
        if step >= begin:
            kept["shown"][step - begin] = metrics["dyn"]
        run.note(metrics)
    return float(kept["shown"].mean())


def descend(opt, loss, lr, clip):
    """One step down a loss with a gradient of norm `clip` at most -> its norm before."""
    opt.zero_grad()
    loss.backward()
    for group in opt.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    params = sum((group["params"] for group in opt.param_groups), [])
    norm = nn.utils.clip_grad_norm_(params, clip)
    opt.step()
    return norm


# ------------------------------------------------------------------------------------------- data
def make_data(task, folder, steps, workers, data_dir=None):
    """Episodes for a task: (random, replay, notes), with fixed seeds: the same for all trainings.

    random: 20,000 agent steps of uniform actions, what SD2 reads. replay: `steps` of an evolving
    linear policy, or the episodes in data_dir; with neither, the random ones. SystemExit: data that
    does not fit the task, ends early, or is too little.
    """
    shape, folder, done = task_facts(task)[:3], Path(folder), Path(folder, "data.json")
    if data_dir and (found := Episodes.open(data_dir, [task]).facts[task]) != shape:
        raise SystemExit(f"{data_dir} holds {task} with (obs, act, steps) = {found}, the task has "
                         f"{shape}: expected episodes of envs.make_env, with its action repeat")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)  # a run killed here starts its data again
        _, A, T = shape
        n = max(4, math.ceil(20_000 / T))
        acts = np.random.default_rng(0).uniform(-1, 1, (n, T, A)).astype(np.float32)
        random, own = (Episodes.create(folder / x, {task: shape}) for x in ("random", "replay"))
        with Workers(workers) as pool:
            seeds = range(10**6, 10**6 + n)
            played = play(pool, task, seeds, lambda obs, job, t: acts[job, t], random)
            notes = {"random_return": float(np.mean([e["ret"] for e in played]))}
            if steps and not data_dir:
                notes["returns"] = search(task, pool, played, own, steps)
        data.write_json(done, notes)
    random = Episodes.open(folder / "random", [task])
    replay = Episodes.open(data_dir or folder / ("replay" if steps else "random"), [task])
    if replay.arrays(task)["term"].any():
        raise SystemExit(f"episodes of {task} end early (termination): ed2.py cannot use them")
    if (n := replay.counts()[task]) < 4:
        raise SystemExit(f"replay of {task} has {n} episodes: expected at least 4, of which every "
                         "tenth is held out; more --data-steps")
    return random, replay, json.loads(done.read_text())


def play(pool, task, seeds, policy, episodes):
    """Roll a policy out once per seed and store it."""
    played = pool.rollout([(task, seed) for seed in seeds], policy)
    episodes.append(task, *([e[x] for e in played] for x in ("obs", "act", "rew", "term")))
    return played


def search(task, pool, random, episodes, steps, directions=8, nu=0.2, alpha=1.0, noise=0.3):
    """Store an evolving linear policy's episodes, from useless to better: (mean, best) by round.

    Augmented random search (Mania et al. 2018) over normalised states, with action noise.
    """
    O, A, T = task_facts(task)[:3]
    rng = np.random.default_rng(1)
    x = np.concatenate([e["obs"] for e in random])
    mean, std = x.mean(0), x.std(0) + 1e-3
    W, curve = np.zeros((A, O)), []
    for r in range(max(1, round(steps / (2 * directions * T)))):
        delta = rng.normal(size=(directions, A, O))
        both = np.concatenate([W + nu * delta, W - nu * delta])
        eps = noise * rng.normal(size=(2 * directions, T, A))

        def act(obs, job, t, both=both, eps=eps):
            linear = np.einsum("nao,no->na", both[job], (obs - mean) / std)
            return np.clip(linear + eps[job, t], -1, 1)

        seeds = 2 * list(range(1000 * (r + 1), 1000 * (r + 1) + directions))
        ret = np.array([e["ret"] for e in play(pool, task, seeds, act, episodes)])
        plus, minus = ret[:directions], ret[directions:]
        top = np.argsort(-np.maximum(plus, minus))[:directions // 2]
        spread = np.concatenate([plus[top], minus[top]]).std() + 1e-6
        change = np.einsum("i,iao->ao", (plus - minus)[top], delta[top])
        W += alpha * nu / (len(top) * spread) * change
        curve.append((float(ret.mean()), float(ret.max())))
    return curve


def transitions(episodes, task, n=20_000, seed=0):
    """n random rows (obs, act, next obs - obs) inside episodes: (n, O), (n, A), (n, O)."""
    maps = episodes.arrays(task)
    rows = [np.c_[np.full(t, e), np.arange(t)] for e, t in enumerate(maps["length"])]
    rows, rng = np.concatenate(rows), np.random.default_rng(seed)
    e, t = rows[np.sort(rng.permutation(len(rows))[:n])].T
    return maps["obs"][e, t], maps["act"][e, t], maps["obs"][e, t + 1] - maps["obs"][e, t]


def find_partition(name, task, random, eta=0.0):
    """(groups, log of merges) for --partition; sd2 reads the random data."""
    A = task_facts(task).act_dim
    if name == "sd2" and A > 1:
        _, act, delta = transitions(random, task)
        return agglomerate(cosine(pearson_features(act, delta)), eta)
    known = {"none": [list(range(A))], "full": [[j] for j in range(A)]}
    return known.get(name if A > 1 else "none") or PUBLISHED[task.split("-")[0]], []


# -------------------------------------------------------------------------------------- measuring
HORIZONS = {"tdmpc2": (1, 3, 5, 10), "dreamerv3": (1, 5, 15, 45)}  # steps of open-loop predictions
CONTEXT = 16  # observations that DreamerV3 sees before


def nmse(pred, true, spread):
    """mean_d E(pred - true)^2 / Var_d where it varies; pred, true (B, d), spread (d,) variances."""
    live, error = spread > 1e-6, ((pred - true) ** 2).mean(0)
    return float((error[live] / spread[live]).mean())


@torch.no_grad()
def measure_latents(encoder, dynamics, sampler, batch=2048):
    """Held-out open-loop errors of latents after h steps; sampler: slices of 10 steps.

    logged: as in training; per_step_mse: mean of 3 steps; persistence: nothing changes. More, on
    the same samples: studies/ed2_cores.py, which fits a probe on those that are drawn first.
    """
    generator = torch.Generator(next(encoder.parameters()).device).manual_seed(0)
    sampler.sequences(batch, generator)
    obs, act, *_ = sampler.sequences(batch, generator, held_out=True)
    z = encoder(obs)
    error = (unroll(dynamics, z[0], act) - z[1:]).square().mean(2)  # (H, B)
    rho = 0.5 ** torch.arange(3, device=z.device)
    out = dict(logged=(error[:3].mean(1) * rho).mean(), per_step_mse=error[:3].mean())
    for h in HORIZONS["tdmpc2"]:
        out[f"mse_{h}"] = error[h - 1].mean()
        out[f"persistence_mse_{h}"] = (z[0] - z[h]).square().mean()
    return {k: float(x) for k, x in out.items()}


@torch.no_grad()
def open_loop(model, obs, act, gumbel, context=CONTEXT):
    """Predict obs[context:] (T+1-context, B, O) from obs[:context] and all actions act (T, B, A).

    gumbel (T+1, B, S, C): posterior states for the context, then samples of the prior.
    """
    rssm, feats = model.rssm, []
    embed, weights = model.encoder(symlog(obs[:context])), rssm.core_weights()
    h, z = (x[-1] for x in rssm.observe(embed, act[:context - 1], gumbel[:context])[:2])
    for a, g in zip(rssm.act_input(weights, act[context - 1:]), gumbel[context:]):
        h = rssm.step(weights, h, z, a)
        z = sample_latent(rssm.prior(h), g)
        feats.append(torch.cat([h, z], -1))
    return symexp(model.decoder(torch.stack(feats)))


@torch.no_grad()
def measure_rssm(model, sampler, longer, batch=128, draws=8):
    """Held-out losses, on slices as in training, and errors of decoded states h steps ahead.

    longer: slices of 60 steps. nmse_h: squared error / variance, mean over dimensions, of the mean
    of `draws` sampled roll-outs after 16 observations; persistence: nothing changes.
    """
    generator = torch.Generator(sampler.device).manual_seed(0)
    latent = model.rssm.stoch, model.rssm.classes
    obs, act, rew, *_ = sampler.sequences(4 * batch, generator, held_out=True)
    gumbel = draw_gumbel((len(obs), 4 * batch, *latent), generator)
    metrics = rssm_loss(model, obs, act, rew, gumbel, 8)[1]
    out = {k: float(metrics[k]) for k in ("dyn", "dyn_raw", "post_entropy", "rec")}
    longer.sequences(batch, generator)
    obs, act, *_ = longer.sequences(batch, generator, held_out=True)
    pred = [open_loop(model, obs, act, draw_gumbel((len(obs), batch, *latent), generator))
            for _ in range(draws)]
    pred, true = (x.cpu().double().numpy() for x in (torch.stack(pred).mean(0), obs))
    now, spread = true[CONTEXT - 1], true.reshape(-1, true.shape[-1]).var(0)
    for h in HORIZONS["dreamerv3"]:
        then = true[CONTEXT - 1 + h]
        out[f"nmse_{h}"] = nmse(pred[h - 1], then, spread)
        out[f"persistence_nmse_{h}"] = nmse(now, then, spread)
    return out


# ------------------------------------------------------------------------ one training is one cell
PRIMARY = {"tdmpc2": "per_step_mse", "dreamerv3": "nmse_15"}  # what a verdict is about


def build(args, O, A, groups, width):
    """What predicts with these groups: TD-MPC2's dynamics, or DreamerV3's whole world model."""
    if args.wm == "dreamerv3":
        return DreamerV3(O, A, **DREAMER_SIZES[args.model_size], groups=groups, width=width)
    return Dynamics(TDMPC2_SIZES[args.model_size][0], A, width, groups)


def run_cell(name, cell, folder, build=build, measure=None):
    """Train and test one model: cell = {wm, task, regime, variant, seed, groups, width, args}."""
    args, folder, encoder = Args(**cell["args"]), Path(folder), None
    task, seed, groups, width = (cell[k] for k in ("task", "seed", "groups", "width"))
    if args.device == "cpu":
        torch.set_num_threads(1)
    O, A = task_facts(task)[:2]
    replay = make_data(task, folder / "data" / task, args.data_steps, 1, args.data_dir)[1]
    tested = 10 if args.wm == "tdmpc2" else CONTEXT + 44
    short, longer = (replay.sampler([task], steps, args.device, held_out=0.1)
                     for steps in (args.length, tested))
    run = Run("ed2", args, inside=folder / "trainings" / quote(name, safe=""))
    torch.manual_seed(seed)
    model = build(args, O, A, groups, width)
    if cell["regime"] == "joint":
        torch.manual_seed(seed)
        model = TDMPC2(O, A, *TDMPC2_SIZES[args.model_size], model)
    fixed = folder / "encoders" / f"{task}-s{seed}.pt"  # in its latents all variants are compared
    if cell["regime"] == "frozen":
        latent = TDMPC2_SIZES[args.model_size][0]
        encoder = tdmpc2_encoder(O, latent).to(args.device).requires_grad_(False)
        encoder.load_state_dict(torch.load(fixed, args.device, weights_only=True))
    loss = train(run, model.to(args.device), short, args, seed, encoder)
    if args.wm == "dreamerv3":
        numbers = measure_rssm(model, short, longer)
    else:
        parts = (encoder, model) if encoder else (model.encoder, model.dynamics)
        numbers = (measure or measure_latents)(*parts, longer)
    if (cell["regime"], cell["variant"]) == ("joint", "single"):
        fixed.parent.mkdir(exist_ok=True)
        data.save_torch(fixed, model.encoder.state_dict())
    run.close()
    (run.dir / "checkpoint.pt").unlink()  # the numbers remain
    size = counter(args.wm, args.model_size)[0](groups, width)
    told = {k: v for k, v in cell.items() if k != "args"} | dict(updates=args.updates)
    return told | dict(dynamics_params=size, train_loss=loss) | numbers


def train_cells(cells, args, folder, work=run_cell):
    """Results of all cells, in their order; those that fix an encoder run before the others."""
    parts, metric = ("wm", "task", "regime", "variant", "seed"), PRIMARY[args.wm]
    named = {"-".join(str(c[k]) for k in parts): dict(c, args=asdict(args)) for c in cells}
    first = {n: c for n, c in named.items() if (c["regime"], c["variant"]) == ("joint", "single")}
    done, side = {}, args.workers if args.device == "cpu" else 1
    for wave in (first, {n: c for n, c in named.items() if n not in first}):
        if wave:
            done |= data.run_cells(work, wave, folder, side,
                                   lambda result: f"{metric} {result[metric]:.3g}")
    return [done[n] for n in named]


# -------------------------------------------------------------------------------------- comparing
def relative_change(new, old):
    """Paired by seed: mean of (new - old) / old, its 95 % t interval, p value; nan for one seed."""
    r = (np.asarray(new, float) - old) / np.asarray(old, float)
    mean = float(r.mean())
    if len(r) < 2:
        return mean, math.nan, math.nan, math.nan
    if r.std() == 0:
        return mean, mean, mean, float(mean == 0)
    from scipy import stats
    low, high = stats.t.interval(0.95, len(r) - 1, mean, stats.sem(r))
    return mean, float(low), float(high), float(stats.ttest_1samp(r, 0).pvalue)


def verdict(mean, low, high, better_than_controls=True):
    """win: interval below 0 and no control as good; loss: above 0; tie: neither, or under 5 %."""
    if not (high < 0 or low > 0) or abs(mean) < 0.05:  # also with one seed, whose interval is nan
        return "tie"
    return "loss" if mean > 0 else "win" if better_than_controls else "tie"


def plan(args, groups):
    """{variant: (groups, width)}: one model, and ED2 unless all actions are one group."""
    count, full = counter(args.wm, args.model_size)
    single = [sorted(j for G in groups for j in G)]
    if len(groups) == 1:
        return {"single": (single, full)}
    width = match_width(lambda w: count(groups, w), count(single, full))
    return {"single": (single, full), "ed2": (groups, width)}


def cells_of(args, models):
    """The trainings of {variant: (groups, width)} for every seed, and of TD-MPC2's encoders."""
    regime = "replay" if args.wm == "dreamerv3" else "frozen"
    kinds = [(regime, v) for v in models]
    if args.wm == "tdmpc2":
        kinds.insert(0, ("joint", "single"))
    return [dict(wm=args.wm, task=args.task, regime=r, variant=v, seed=args.seed + n,
                 groups=models[v][0], width=models[v][1])
            for n, (r, v) in product(range(args.seeds), kinds)]


def paired_rows(results):
    """One row per metric from {variant: cells of equal seeds}: means, relative change, interval."""
    names, rows = list(results["single"][0]), []
    for metric in names[names.index("dynamics_params"):names.index("cell")]:
        values = {v: [c[metric] for c in cells] for v, cells in results.items()}
        row = {"metric": metric} | {v: float(np.mean(x)) for v, x in values.items()}
        if len(results) > 1:
            single, ed2 = values.values()
            row |= zip(("change", "low", "high"), relative_change(ed2, single))
        rows.append(row)
    return rows


def compare(args, run, groups=None):
    """One model and ED2 on one task with paired seeds; groups: instead of those of --partition."""
    made, log = run.dir / "data" / args.task, []
    random, _, notes = make_data(args.task, made, args.data_steps, args.workers, args.data_dir)
    print("returns of random actions, of rounds of search (mean, best):", notes, flush=True)
    if groups is None:
        groups, log = find_partition(args.partition, args.task, random, args.eta)
    print(f"groups {groups}; published: {PUBLISHED.get(args.task.split('-')[0], 'none')}")
    for merge in log:
        pair = " + ".join(map(str, merge["merge"]))
        print(f"  {'merge' if merge['done'] else 'leave'} {pair}: {merge['score']:+.4f}")
    models = plan(args, groups)
    if len(models) == 1:
        print("all actions are in one group: ED2 is the single model, which runs alone")
    done = train_cells(cells_of(args, models), args, run.dir)
    paired = [c for c in done if c["regime"] != "joint"]
    rows = paired_rows({v: [c for c in paired if c["variant"] == v] for v in models})
    print(f"\n{args.task}, {args.wm}, held-out data: {', '.join(models)}, change, 95 % interval")
    for row in rows:
        changes = [f"{row[k]:+.1%}" for k in ("change", "low", "high") if row.get(k, math.nan) > -9]
        print(f"{row['metric']:<22}", *(f"{row[v]:>12.4g}" for v in models), *changes)
    result = dict(partition=groups, merges=log, data=notes, table=rows, cells=done)
    if len(models) > 1:
        row = next(r for r in rows if r["metric"] == PRIMARY[args.wm])
        says = verdict(row["change"], row["low"], row["high"]) if args.seeds > 1 else "none, 1 seed"
        print(f"verdict on {PRIMARY[args.wm]} against the single model: {says} "
              "(a win needs the controls of studies.ed2_tables)")
        result["verdict"] = says
    data.write_csv(run.dir / "results.csv", rows)
    return result


# ------------------------------------------------------------------------------------------- main
# what flags that were left out become: on a CPU, on a GPU, with --fast
BUDGETS = {
    "tdmpc2": (
        dict(updates=2000, batch=64, length=3, lr=1e-3, model_size="1M", data_steps=96_000),
        dict(updates=20_000, batch=256, length=3, lr=3e-4, model_size="5M", data_steps=400_000),
        dict(updates=40, batch=32, length=3, lr=1e-3, model_size="1M", data_steps=4000)),
    "dreamerv3": (
        dict(updates=600, batch=16, length=32, lr=2e-3, model_size="1m", data_steps=96_000),
        dict(updates=20_000, batch=16, length=64, lr=3e-4, model_size="12m", data_steps=400_000),
        dict(updates=8, batch=8, length=16, lr=2e-3, model_size="1m", data_steps=4000))}
MOVED = {
    "--tables": "python -m studies.ed2_tables", "--encoder": "python -m studies.ed2_tables",
    "--discovery": "python -m studies.ed2_discovery", "--bodies": "python -m studies.ed2_bodies",
    "--cost": "python -m studies.ed2_cost", "--mode offline": "python ed2.py",
    "--agg mean": "python ed2.py --wm dreamerv3", "--size": "--model-size",
    "--agg hidden": "python ed2.py", "--match": "python -m studies.ed2_tables"}
MOVED |= {f"--partition {x}": f"python -m studies.ed2_partitions --partition {x}"
          for x in ("sd2j", "learned", "human", "random")}
MOVED |= {f"--agg {x}": f"python -m studies.ed2_cores --core {x}"
          for x in ("pre", "post", "blocks")}
MOVED |= {x: "python -m studies.ed2_online" for x in (
    "--mode online", "--checkpoint", "--eval-only", "--capture-video", "--train-ratio")}


def check(args):
    """SystemExit: a flag out of its range, one that nobody reads, or two that do not fit."""
    task_facts(args.task)  # an unknown task ends here
    robot, sizes = args.task.split("-")[0], TDMPC2_SIZES if args.wm == "tdmpc2" else DREAMER_SIZES
    if args.partition == "published" and robot not in PUBLISHED:
        raise SystemExit(f"no published partition of {robot!r}: there is one for "
                         f"{', '.join(PUBLISHED)}; type --partition sd2")
    if args.model_size not in (None, *sizes):
        raise SystemExit(f"--model-size {args.model_size} with --wm {args.wm}: expected one of "
                         f"{', '.join(sizes)}")
    if args.data_dir and not args.resume:
        data.refuse(args, "data_steps", "the episodes are those of --data-dir")
    if args.partition != "sd2":
        data.refuse(args, "eta", f"--partition {args.partition} does not read it")
    least = 1 if args.wm == "tdmpc2" else 9  # DreamerV3's first 8 steps are not measured
    ranges = {k: (1, None) for k in ("seeds", "workers", "updates", "batch", "data_steps")}
    ranges |= {"seed": (0, None), "save_every": (0, None), "length": (least, None), "lr": (0, 1)}
    data.check_ranges(args, ranges | {"eta": (-1, 1)})


def fill(args):
    """The args with the flags that were left out."""
    device = data.choose_device(args.device)[0].type
    budget = BUDGETS[args.wm][2 if args.fast else int(device == "cuda")]
    left_out = {k: v for k, v in budget.items() if getattr(args, k) is None}
    return replace(args, device=device, **left_out)


def main(args: Args):
    """Compare one model and ED2 on a task; returns what results.json holds."""
    args = data.resumed(args)
    check(args)
    args = fill(args)
    run = Run("ed2", args)
    shown = {k: v for k, v in asdict(args).items() if k not in ("resume", "track", "save_every")}
    print(f"ED2 in {run.dir}:", *(f"{k} {v}," for k, v in shown.items()), flush=True)
    try:
        return run.finish(compare(args, run))
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; go on with: python ed2.py --resume {run.dir}") from None


if __name__ == "__main__":
    main(data.parse(Args, __doc__, MOVED))
