"""PWM: policy learning with multi-task world models (Georgiev et al., arXiv 2407.02466), one file.

A world model with task embeddings (TD-MPC2's architecture) is trained on episodes of all tasks. It
is then frozen and used as a differentiable simulator: one actor and three critics per task learn by
first-order gradients through imagined roll-outs, all tasks at once as stacked tensors. Without
data, rounds of {roll out, train the model, improve all policies} make it: `train` is Algorithm 1.

    python pwm.py --task cartpole-swingup    # 2 CPU cores, no data, 9 minutes: return 849 to 878
    python pwm.py --task mt30                # 30 policies and a table; 50 minutes: mean return 327

Any gymnasium id with continuous actions works (my_file:MyTask-v0), also one whose episodes end; the
paper's bodies are studies.bodies:hopper and so on; its toys, ablations and baselines are studies.

Copy me together with envs.py and data.py. Shapes: N tasks, B batch, H horizon, O obs, A action, L
latent, E critics, K = 101 bins; time first: obs (H+1, B, O), act (H, B, A), rew (H, B); stacked
networks (N, ..).

Deviations from the paper (the released code's own are not repeated):
 1. Loss weights 20 : 0.1 and means, as the published models' trainer; Eq. (10) has 1 : 1 and sums.
 2. Critic minibatches are reshuffled in every pass, as App. C.2 says; the release cuts quarters.
 3. A CPU's model trains on short sequences at rate 1e-3 instead of 16 and 3e-4, and thirty policies
    imagine 8 steps; everywhere the model's rate falls in the second half of a round, and several
    tasks' observations are centred and divided by the root of their deviation.
 4. On a CPU critics take one pass over the imagined data per update instead of eight, but for 8.
 5. Actions are masked to a task's own dimensions in imagination too; the release leaves them free.
 6. gamma^H discounts the terminal value (Eq. 6; the release has gamma^(H+1)), and all episodes give
    start states.
 7. Half of the roll-outs with current policies are disturbed by short random actions.
 8. A task that may end: environments that do what imagination does tell the ends and make data
    (`Beside`); on given data a head, which the release has not, learns them, and steps count by the
    probability to come so far; it imagines 6 steps, in sixty short rounds of falling rates.
 9. There, rewards are divided by their deviation but not centred (which would make an end as good
    as going on), critics tell the distance from targets' running mean, and actors begin near 0.
10. There, no SimNorm: F predicts the change of a latent, from scaled observations, as a body
    changes less in a step than a young model errs when it makes a latent anew.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads do not fight for a core that is busy

import contextlib
import copy
import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from data import Batch, Episodes, Run, bootstrap_ci, iqm
from envs import MT30, MT80, SUITES, Workers, beside, choose_gl, make_env, score, task_facts


@dataclass
class Args:
    task: str = "mt30"
    """mt30, mt80, cup-catch, mw-reach, a comma list, or a gymnasium id (my_file:MyTask-v0)"""
    seed: int = 1
    """seeds networks, sampling and environments"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes the GPU when there is one"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for the losses: by default with a GPU; it costs a CPU minutes at the start"""
    bf16: bool = False
    """bfloat16 matrix products, all else float32; 1.05-1.35x faster on a CPU that has it"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """environment processes for roll-outs"""
    fast: bool = False
    """tiny budgets: the whole pipeline in about a minute, to see that it works"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""
    capture_video: bool = False
    """one mp4 per task after evaluation (needs OpenGL: EGL or OSMesa)"""
    resume: str | None = None
    """continue the run in this folder, e.g. runs/mt30__pwm__1__1700000000, with its flags"""
    save_every: float = 60.0
    """seconds between checkpoints"""
    checkpoint: str | None = None
    """published world model (TD-MPC2 or PWM) or checkpoint.pt of a run: skips its training"""
    eval_only: bool = False
    """with --checkpoint runs/../checkpoint.pt: only evaluate its policies"""
    data_dir: str | None = None
    """published chunk_*.pt (converted once, into data_dir/episodes) or a folder of episodes"""
    ends: bool | None = None
    """one task that may end (Sec. 4.1): a scalar head for scaled rewards, ends seen or learnt,
    short episodes used, roll-outs counted in steps; default: as the task says"""

    # budget: left out, these follow from device and tasks and are printed at the start (BUDGETS)
    model_size: Literal[1, 5, 19, 48, 317] | None = None
    """millions of parameters of the TD-MPC2 agent with this world model (Table 1: 48)"""
    rounds: int | None = None
    """own data: rounds of {roll out, train the world model, improve all policies}"""
    seed_episodes: int | None = None
    """own data: episodes per task with random actions in the first round (ends: as many steps)"""
    round_episodes: int | None = None
    """own data: episodes per task with current policies in each later round (ends: as above)"""
    wm_steps: int | None = None
    """world-model gradient steps over all rounds (published models: 4.9 million on MT30)"""
    wm_batch: int | None = None
    """sequences per world-model step (Table 1: 1024)"""
    wm_horizon: int | None = None
    """steps of world-model training sequences (Table 1: 16): deviation 3"""
    wm_lr: float | None = None
    """world-model learning rate (Table 1: 3e-4); the encoder's is 0.3 of it: deviation 3"""
    policy_steps: int | None = None
    """policy updates of every task over all rounds (Sec. 4.2: 10,000)"""
    policy_batch: int | None = None
    """B, imagined roll-outs per task and update (Table 1: 64; the multi-task release ran 512)"""
    critic_passes: int | None = None
    """passes over the imagined data per update (App. C.2: 8): deviation 4"""

    # algorithm
    horizon: int | None = None
    """H, imagined steps (Table 1: 16): deviation 8"""
    gamma: float = 0.99
    """discount (Table 1)"""
    lam: float = 0.95
    """lambda of the critics' targets (Table 1)"""
    policy_lr: float | None = None
    """actor learning rate, falling linearly to 1e-5 (Table 1: 5e-4; tasks that end: 3e-4)"""
    critic_lr: float | None = None
    """critic learning rate, falling alike (Table 1: 5e-4; default: --policy-lr, with ends 1e-3)"""

    # evaluation
    eval_episodes: int | None = None
    """deterministic episodes per task at the end, and as many of a random policy (default 10)"""
    eval_every: int = 0
    """policy updates of a round after which all policies are evaluated, for a curve; 0: never"""


# ------------------------------------------------------------------------------------------ maths
BINS, BIN_LIMIT = 101, 10.0  # reward classes, equally spaced in symlog space
RHO = 0.99  # weight of step t in the world-model loss is RHO^t (Eq. 10 calls it gamma)
CRITIC_BATCHES = 4  # minibatches per pass (App. C.2)
BETAS = (0.7, 0.95)  # Adam of actors and critics (released code)
FINAL_RATE = 0.03  # share of its rate to which the world model's falls in a round
HELD_OUT = 0.1  # fraction of episodes on which the world model is tested, never trained


def symlog(x):
    """sign(x) ln(1 + |x|), which keeps large numbers small."""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """sign(x) (e^|x| - 1), the inverse of symlog."""
    return x.sign() * x.abs().expm1()


def two_hot(x):
    """x (..) raw reward -> (.., BINS): symlog(x) as weights on its two neighbours (App. C.1)."""
    y = (symlog(x).clamp(-BIN_LIMIT, BIN_LIMIT) + BIN_LIMIT) * ((BINS - 1) / (2 * BIN_LIMIT))
    k = y.floor()
    frac, k = (y - k)[..., None], k.long()[..., None]
    out = torch.zeros(*x.shape, BINS, device=x.device, dtype=x.dtype)
    return out.scatter_(-1, (k + 1) % BINS, frac).scatter_(-1, k, 1 - frac)


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


def lambda_return(rew, value, gamma, lam, alive=None):
    """TD(lambda) targets, Eqs. (7)-(8): G_h = r_h + gamma [(1-lam) v_{h+1} + lam G_{h+1}] down from
    G_H = v_H.

    rew (H, ..), value (H+1, ..) with value[h] = V(z_h); value[0] is not used. alive (H, ..): the
    probability to go on after step h, which multiplies gamma there. Returns G (H, ..).
    """
    G, out = value[-1], []
    for h in reversed(range(len(rew))):
        g = gamma if alive is None else gamma * alive[h]
        G = rew[h] + g * ((1 - lam) * value[h + 1] + lam * G)
        out.append(G)
    return torch.stack(out[::-1])


def batch_mean(x, live):
    """Mean over all axes but the first, live (H, B) = 0 counting as 0: x (H, B, ..) -> (H,)."""
    x = x.flatten(2).mean(2) if x.ndim > 2 else x
    return (x * live).mean(1)  # of the whole batch: several ranks average to what one computes


def between(start, end, progress):
    """start at progress 0, end at progress 1."""
    return start + (end - start) * progress


def late_fall(progress):
    """1 in the first half of a round, then falling to FINAL_RATE (deviation 3)."""
    return min(1.0, FINAL_RATE + 2 * (1 - FINAL_RATE) * (1 - progress))


def shares(total, rounds, first, last):
    """Split `total` updates over rounds: fractions for first and last, the rest in equal parts."""
    if rounds == 1:
        return [total]
    middle = (1 - first - last) / max(rounds - 2, 1)
    cuts = [0, *(round((first + k * middle) * total) for k in range(rounds - 1)), total]
    return [b - a for a, b in zip(cuts, cuts[1:])]


class FastMish(torch.autograd.Function):
    """x tanh(softplus(x)) = x (1-s^2)/(1+s^2) with s = sigmoid(-x), in less than half the time of
    PyTorch's CPU kernel, which costs as much as the matrix product before it."""

    @staticmethod
    def forward(ctx, x):
        s = x.neg().sigmoid_()
        q = s * s
        r = q.add(1).reciprocal_()
        t = (1 - q).mul_(r)
        if ctx.needs_input_grad[0]:  # d/dx = t + 4 x s^2 (1-s) / (1+s^2)^2
            slope = s.neg_().add_(1).mul_(q).mul_(r).mul_(r).mul_(x).mul_(4).add_(t)
            ctx.save_for_backward(slope)
        return t.mul_(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class FastSimNorm(torch.autograd.Function):
    """Softmax over a last axis of 8, three times faster on a CPU than the kernel for long rows."""

    @staticmethod
    def forward(ctx, x):
        p = (x - x.amax(-1, keepdim=True)).exp_()
        p = p.div_(p.sum(-1, keepdim=True))
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        gp = grad * p
        return gp.addcmul_(p, gp.sum(-1, keepdim=True), value=-1)


def mish(x):
    if torch.compiler.is_compiling():  # fused into one pass by the compiler
        q = torch.sigmoid(-x).square()
        return x * (1 - q) / (1 + q)
    return F.mish(x) if x.is_cuda else FastMish.apply(x)


def simnorm(x, V=8):
    """Eq. (4): softmax over groups of V; x (.., L) -> (.., L), each group sums to 1."""
    g = x.unflatten(-1, (-1, V))
    g = g.softmax(-1) if x.is_cuda or torch.compiler.is_compiling() else FastSimNorm.apply(g)
    return g.flatten(-2)


# --------------------------------------------------------------------------------------- networks
ACTIVATIONS = {  # of hidden layers, and where a latent is made (Sec. 3.3; Fig. 8a; deviation 10)
    "simnorm": (mish, simnorm), "mish": (mish, mish), "relu": (F.relu, F.relu),
    "residual": (mish, nn.Identity())}


class NormedLinear(nn.Linear):
    """Linear -> LayerNorm -> activation, TD-MPC2's block: (.., I) -> (.., J)."""

    def __init__(self, i, j, act=F.mish):
        super().__init__(i, j)
        self.ln, self.act = nn.LayerNorm(j), act

    def forward(self, x):
        return self.act(self.ln(super().forward(x).float()))


class WorldModel(nn.Module):
    """TD-MPC2's encoder E, dynamics F and reward R with task embeddings (Sec. 3.3, Table 1).

    obs (.., B, O), act (.., B, A), task (B,) ints, z (.., B, L). Observations and actions are
    padded with zeros to the widest task; `act_dims[task]` entries of an action are real.
    ends: a task that may end: a scalar head for rewards divided by `rew_std`, a head for ends, and
    observations centred and scaled. activation: see ACTIVATIONS; residual: F predicts the change.
    """

    def __init__(self, obs_dim, act_dims, enc_layers, enc_hidden, hidden, latent, task_dim,
                 ends=False, activation="simnorm"):
        super().__init__()
        self.obs_dim, self.act_dims, self.ends = obs_dim, tuple(act_dims), bool(ends)
        self.latent, self.task_dim, self.activation = latent, task_dim, activation
        self.residual = activation == "residual"
        self.tasks = ()  # names of the task rows, where known
        A = max(self.act_dims)
        mask = (torch.arange(A) < torch.tensor(self.act_dims)[:, None]).float()
        self.register_buffer("act_mask", mask, persistent=False)  # (N, A)
        inner, last = ACTIVATIONS[activation]
        block = functools.partial(NormedLinear, act=inner)
        widths = [obs_dim + task_dim] + [enc_hidden] * max(enc_layers - 1, 1)
        hiddens = [block(i, j) for i, j in zip(widths, widths[1:])]
        self.encoder = nn.Sequential(*hiddens, NormedLinear(widths[-1], latent, last))
        i = latent + task_dim + A
        layers = [block(i, hidden), block(hidden, hidden)]
        end = nn.Linear(hidden, latent) if self.residual else NormedLinear(hidden, latent, last)
        self.dynamics = nn.Sequential(*layers, end)
        layers = [block(i, hidden), block(hidden, hidden)]
        self.reward_head = nn.Sequential(*layers, nn.Linear(hidden, 1 if ends else BINS))
        if ends:
            self.end_head = nn.Sequential(block(latent + task_dim, hidden), nn.Linear(hidden, 1))
            self.register_buffer("rew_std", torch.ones(()))
        for name, x in (("obs_mean", 0.0), ("obs_std", 1.0)):  # of every task: see set_scales
            self.register_buffer(name, torch.full((len(self.act_dims), obs_dim), x))
        if task_dim:
            self.task_emb = nn.Embedding(len(self.act_dims), task_dim)
            nn.init.uniform_(self.task_emb.weight, -0.02, 0.02)
        self.apply(init_trunc_normal)
        nn.init.zeros_(self.reward_head[-1].weight)  # uniform reward logits at the start

    def with_task(self, x, task):
        if not self.task_dim:
            return x
        return torch.cat([x, self.task_emb(task).expand(*x.shape[:-1], -1)], -1)

    def encode(self, obs, task):
        obs = (obs - self.obs_mean[task]) / self.obs_std[task]
        return self.encoder(self.with_task(obs, task))  # (.., B, L)

    def next(self, z, act, task):
        out = self.dynamics(torch.cat([self.with_task(z, task), act], -1))  # (.., B, L)
        return z + out if self.residual else out

    def reward(self, z, act, task):
        x = torch.cat([self.with_task(z, task), act], -1)
        return self.reward_head(x).float()  # (.., B, 101) logits, or (.., B, 1)

    def reward_value(self, logits, pseudo=False):
        """What the reward head's output means, (..); `pseudo`: in log space (App. C.1)."""
        return logits[..., 0] if self.ends else two_hot_inv(logits, pseudo)

    def end(self, z, task):
        return self.end_head(self.with_task(z, task))[..., 0].float()  # (.., B) logits: z ended it

    def forward(self, batch, rho):  # what DistributedDataParallel calls
        return world_model_loss(self, batch, rho)

    @torch.no_grad()
    def project_embeddings(self):
        """Rows of the task table keep a norm of at most 1; after a step: the graph stays pure."""
        if self.task_dim:
            norm = self.task_emb.weight.norm(dim=1, keepdim=True)
            self.task_emb.weight.mul_(torch.where(norm > 1, 1 / (norm + 1e-7), 1.0))

    def set_scales(self, episodes, row, task, most=1000):
        """Centre a task's observations and divide them by the root of their deviation, of `most`
        stored episodes at equal distances; if it ends, by the deviation, and rewards too."""
        arrays = episodes.arrays(task)
        length = np.asarray(arrays["length"])
        pick = np.unique(np.linspace(0, len(length) - 1, most).astype(int))
        seen = np.concatenate([arrays["obs"][i, :length[i]] for i in pick])
        mean, std = torch.from_numpy(seen.mean(0)), torch.from_numpy(seen.std(0))
        std = std.clamp(min=1e-3) if self.ends else std.where(std > 1e-3, torch.ones(())).sqrt()
        self.obs_mean[row, :len(mean)] = mean.to(self.obs_mean)
        self.obs_std[row, :len(std)] = std.to(self.obs_std)
        if self.ends:
            self.rew_std.fill_(reward_deviation(arrays))


def reward_deviation(arrays):
    """Standard deviation of all stored rewards of a task."""
    real = np.arange(arrays["rew"].shape[1]) < np.asarray(arrays["length"])[:, None]
    return max(float(np.asarray(arrays["rew"])[real].std(dtype=np.float64)), 1e-3)


def init_trunc_normal(m):
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        nn.init.zeros_(m.bias)


class StackedMLP(nn.Module):
    """n independent MLPs as stacked tensors: x (n, B, I) -> (n, B, J), one baddbmm per layer.
    Blocks are Linear -> Mish -> LayerNorm, as PWM's actor and critic have them."""

    def __init__(self, n, widths, init):
        super().__init__()
        pairs = list(zip(widths, widths[1:]))
        layers = [[init(i, j) for _ in range(n)] for i, j in pairs]
        weights = [torch.stack([w for w, _ in layer]) for layer in layers]
        biases = [torch.stack([b for _, b in layer])[:, None] for layer in layers]
        self.weight = nn.ParameterList(weights)  # (n, I, J)
        self.bias = nn.ParameterList(biases)  # (n, 1, J)
        self.gain = nn.ParameterList(torch.ones(n, 1, j) for _, j in pairs[:-1])
        self.shift = nn.ParameterList(torch.zeros(n, 1, j) for _, j in pairs[:-1])

    def forward(self, x):
        for k, (W, b) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(b, x, W).float()  # (n, B, J)
            x = self.block(x, k) if k < len(self.gain) else x
        return x

    def block(self, x, k):
        return self.norm(mish(x), k)

    def norm(self, x, k):
        return torch.addcmul(self.shift[k], F.layer_norm(x, x.shape[-1:]), self.gain[k])


def init_default(i, j):
    """PyTorch's default Linear initialisation, as (weight (I, J), bias (J,))."""
    layer = nn.Linear(i, j)
    return layer.weight.detach().T, layer.bias.detach()


def init_orthogonal(i, j):
    return nn.init.orthogonal_(torch.empty(j, i), 2**0.5).T, torch.zeros(j)


class Actors(nn.Module):
    """A Gaussian tanh policy per task: z (N, B, L), noise eps (N, B, A) or None -> (N, B, A)."""

    MIN_LOG_STD = -1.427  # sigma >= 0.24 (App. C.3)

    def __init__(self, act_mask, latent, widths=(400, 200, 100)):
        super().__init__()
        n, A = act_mask.shape
        self.mu = StackedMLP(n, (latent, *widths, A), init_default)
        self.log_std = nn.Parameter(torch.full((n, 1, A), -1.0))
        self.register_buffer("act_mask", act_mask[:, None].clone(), persistent=False)

    def forward(self, z, eps=None):
        u = self.mu(z)
        u = u if eps is None else u + self.log_std.exp() * eps
        return torch.tanh(u) * self.act_mask

    @torch.no_grad()
    def clamp_std(self):
        self.log_std.clamp_(min=self.MIN_LOG_STD)


class Critics(nn.Module):
    """E value functions per task: z (N, B, L) -> (N, E, B), told as the distance from `offset`."""

    def __init__(self, n, latent, E=3, widths=(400, 200)):
        super().__init__()
        self.n, self.E = n, E
        self.v = StackedMLP(n * E, (latent, *widths, 1), init_orthogonal)
        self.register_buffer("offset", torch.zeros(n * E, 1))

    def forward(self, z):
        x = z[:, None].expand(-1, self.E, -1, -1).flatten(0, 1)  # (N E, B, L)
        return (self.v(x)[..., 0] + self.offset).view(self.n, self.E, -1)

    @torch.no_grad()
    def follow(self, target):
        """Move the offset to the mean of targets (n, M) by a tenth of the way (deviation 9)."""
        self.offset.lerp_(target.mean(1).repeat_interleave(self.E)[:, None], 0.1)


class RunningStats(nn.Module):
    """Running mean and variance of n quantities: of imagined returns per task (Chan's update)."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("var", torch.ones(n))
        self.register_buffer("count", torch.full((n,), 1e-4))

    @torch.no_grad()
    def update(self, J):  # (n, samples)
        b, mean, var = J.shape[1], J.mean(1), J.var(1, unbiased=False)
        total, delta = self.count + b, mean - self.mean
        m2 = self.var * self.count + var * b + delta.square() * self.count * b / total
        self.mean.copy_(self.mean + delta * b / total)
        self.var.copy_(m2 / total)
        self.count.copy_(total)


# ----------------------------------------------------------------------------------------- losses
def world_model_loss(wm, batch, rho=RHO):
    """Eq. (10) with TD-MPC2's weights: consistency 20, reward 0.1, means over batch and horizon.

    batch: obs (H+1, B, O), act (H, B, A), rew (H, B); term (H, B) says which steps ended their
    episode, live (H, B) which are real (1) or beyond the end (0); task (B,) rows of the model's
    table. Returns loss, metrics and the roll-out z (H+1, B, L).
    """
    obs, act, rew, term, live, task = batch
    with torch.no_grad():  # no slow copy of the encoder: its own output on the next observation
        target = wm.encode(obs[1:], task)  # (H, B, L)
    z = [wm.encode(obs[0], task)]
    for a in act:
        z.append(wm.next(z[-1], a, task))
    z = torch.stack(z)  # (H+1, B, L)
    logits = wm.reward(z[:-1], act, task)  # (H, B, 101) or (H, B, 1)
    if wm.ends:  # deviation 9
        error = (logits[..., 0] - (rew / wm.rew_std).clamp(-5, 5)).square()
    else:
        error = two_hot_loss(logits, rew)  # App. C.1
    discount = rho ** torch.arange(len(act), device=z.device)  # (H,)
    consistency = (discount * batch_mean((z[1:] - target).square(), live)).mean()
    reward = (discount * batch_mean(error, live)).mean()
    loss = 20 * consistency + 0.1 * reward
    metrics = dict(consistency=consistency.detach(), reward=reward.detach())
    if wm.ends:
        end = F.binary_cross_entropy_with_logits(wm.end(z[1:], task), term, reduction="none")
        end = (discount * batch_mean(end, live)).mean()
        loss, metrics["end"] = loss + end, end.detach()  # not weighted by 0.1: ends are rare
    return loss, metrics, z


def imagine(wm, actors, obs, eps, task, alive=None, pseudo=True):
    """Roll all policies through the model: obs (N, B, O), eps (H, N, B, A), task (N B,).

    Returns z (H+1, N, B, L), rewards (H, N, B), in log space if `pseudo` (App. C.1), and the
    probabilities (H, N, B) that the episode goes on: those given, or the model's, or 1. Gradients
    flow through F and R by state and action; the only cut is the actor's input. wm may be anything
    with encode, next, reward, reward_value and end: with a true plant this is SHAC.
    """
    N, B = obs.shape[:2]
    z, acts = [wm.encode(obs.flatten(0, 1), task)], []  # (N B, L)
    for e in eps:
        acts.append(actors(z[-1].detach().view(N, B, -1), e).flatten(0, 1))  # (N B, A)
        z.append(wm.next(z[-1], acts[-1], task))
    z = torch.stack(z)
    rew = wm.reward_value(wm.reward(z[:-1], torch.stack(acts), task), pseudo).view(-1, N, B)
    if alive is None:
        alive = (-wm.end(z[1:], task)).sigmoid().view(-1, N, B) if wm.ends else torch.ones_like(rew)
    return z.view(len(z), N, B, -1), rew, alive


def imagined_returns(critics, z, rew, alive, gamma, lam):
    """What imagination is worth, for the actors, Eq. (6), and for the critics, Eqs. (7)-(8).

    z (H+1, N, B, L), rew and alive (H, N, B) from `imagine`. Steps count by the probability to come
    so far; an end has no value. Returns J (N, B), through which gradients flow, targets (H, N, B)
    and the steps' weights (H, N, B).
    """
    H, N, B = rew.shape
    discount = (gamma ** torch.arange(H + 1, device=z.device))[:, None, None]
    reached = torch.cat([torch.ones_like(alive[:1]), alive.cumprod(0)])  # (H+1, N, B)
    value_H = critics(z[-1]).amin(1)  # (N, B), differentiable
    weight = discount * reached
    J = (weight[:-1] * rew).sum(0) + weight[-1] * value_H  # Eq. (6)
    with torch.no_grad():
        between = z[1:-1].transpose(0, 1).flatten(1, 2)  # (N, (H-1) B, L)
        value = critics(between).amin(1).view(N, H - 1, B).transpose(0, 1)
        value = torch.cat([value_H[None], value, value_H[None]])  # (H+1, N, B); 0 is not read
        target = lambda_return(rew, value, gamma, lam, alive)  # Eqs. (7)-(8)
    return J, target, reached[:-1].detach()


def actor_loss(J, var):
    """Eq. (6): returns J (N, B) divided by their running deviation, summed over tasks."""
    return (-J.mean(1) / (var + 1e-5).sqrt()).sum()


def critic_loss(critics, z, target, weight):
    """Eq. (9): z (N, M, L), target, weight (N, M) -> squared errors, summed over tasks and averaged
    over critics and batch."""
    return ((critics(z) - target[:, None]).square() * weight[:, None]).mean((1, 2)).sum()


def descend(loss, opt, max_norm, n=None):
    """One step of opt down the loss, the gradient's norm clipped: of all parameters, or of each of
    n stacked networks. Returns the norm, () or (n,)."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    params = [p for group in opt.param_groups for p in group["params"]]
    norm = clip_each(params, max_norm, n) if n else nn.utils.clip_grad_norm_(params, max_norm)
    opt.step()
    return norm


def clip_each(params, max_norm, n):
    """Clip the gradients of n stacked networks one by one; the norms (n,) before it."""
    grads = [p.grad.view(n, -1) for p in params]
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in grads])
    norm = torch.linalg.vector_norm(norms, dim=0)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None]
    for g in grads:
        g.mul_(scale)
    return norm


# --------------------------------------------------------------------------------------- training
def train(run, args, agent, episodes, workers):
    """Algorithm 1 in rounds: play, fit the model by Eq. (10), freeze it, improve all policies by
    Eqs. (6)-(9). On given data there is one round, whose play stage only looks at the data."""
    wm, actors, critics, stats, opt = agent.wm, agent.actors, agent.critics, agent.stats, agent.opt
    f, N, B, H = agent.functions, len(agent.tasks), args.policy_batch, args.horizon
    rand = dict(generator=agent.rng["policy"], device=agent.device)
    model_steps = shares(args.wm_steps, args.rounds, *agent.shares["model", args.ends])
    policy_steps = shares(args.policy_steps, args.rounds, *agent.shares["policy", args.ends])
    if run.rank:  # the other ranks of torchrun help to train the model
        policy_steps = [0] * args.rounds
    played = [args.seed_episodes] + [args.round_episodes] * (args.rounds - 1)
    run.expects(play=sum(played), model=sum(model_steps), policy=sum(policy_steps))
    for r in run.rounds(args.rounds):
        for _ in run.once("play", played[r]):
            roll_out(run, args, agent, episodes, workers, r, played[r])
            if model_steps[r]:
                agent.scale_observations(episodes, r)
        sampler = agent.sampler(episodes, args.wm_horizon)

        wm.requires_grad_(True)
        calm = 1 - args.ends * r / args.rounds  # deviation 8
        for step in run.steps("model", model_steps[r], shared=True):
            set_rates(opt["model"], args.wm_lr, calm * late_fall(step / model_steps[r]))
            batch = agent.share(sampler.sequences(args.wm_batch, agent.rng["model"]), run)
            loss, metrics, z = f.world_model_loss(batch, RHO)  # Eq. (10)
            norm = descend(loss, opt["model"], 20.0)
            agent.after_model_step(z, batch, metrics)
            run.note(metrics, loss=loss.detach(), grad_norm=norm)
        for _ in run.once("check", 0):
            check_model(run, args, agent, episodes, r, model_steps[r])

        wm.requires_grad_(False)  # frozen: extraction computes no gradients of its weights
        task = agent.rows.repeat_interleave(B)  # (N B,)
        for step in run.steps("policy", policy_steps[r]):
            updates = sum(policy_steps[:r]) + step
            for name, lr in (("actors", args.policy_lr), ("critics", args.critic_lr)):
                set_rates(opt[name], between(lr, 1e-5, updates / sum(policy_steps)))  # Table 1
            noise = torch.randn(H, N, B, wm.act_mask.shape[1], **rand)
            obs, alive = agent.starts(sampler, noise)
            z, rew, alive = f.imagine(wm, actors, obs, noise, task, alive)
            J, target, weight = f.imagined_returns(critics, z, rew, alive, args.gamma, args.lam)
            stats.update(J.detach())
            loss = actor_loss(J, stats.var)  # Eq. (6)
            actor_norm = descend(loss, opt["actors"], 1.0, len(actors.log_std))
            actors.clamp_std()
            z, target, weight = by_task(z[:-1].detach()), by_task(target), by_task(weight)
            if args.ends:
                critics.follow(target)
            for order in torch.rand(args.critic_passes, H * B, **rand).argsort(1):
                for m in order.chunk(CRITIC_BATCHES):  # App. C.2
                    error = f.critic_loss(critics, z[:, m], target[:, m], weight[:, m])  # Eq. (9)
                    norm = descend(error, opt["critics"], 100.0, critics.n)
            run.note(actor_loss=loss.detach() / N, critic_loss=error.detach() / N,
                     imagined_return=J.detach().mean(1).mean(), actor_grad_norm=actor_norm.mean(),
                     critic_grad_norm=norm.mean(), sigma=actors.log_std.detach().exp().mean())
            if is_due(step + 1, policy_steps[r], args.eval_every):
                evaluate_now(run, agent, workers, updates + 1)


def set_rates(opt, lr, fall=1.0):
    """Learning rate lr times fall, and times the share that a group of parameters may have."""
    for group in opt.param_groups:
        group["lr"] = group.get("share", 1.0) * lr * fall


def is_due(done, n, every):
    """Whether `done` of n steps is a multiple of `every` or the end; every = 0: never."""
    return bool(every) and 0 in (done % every, n - done)


def by_task(x):
    """(H, N, B, ..) -> (N, H B, ..)"""
    return x.transpose(0, 1).flatten(1, 2)


def wait_for_all(run):
    if run.world > 1:
        torch.distributed.barrier()


class Agent:
    """The networks of a run for all tasks, their optimisers and generators, and how they act.
    Studies subclass it, to change its networks and functions."""

    activation = None  # of a model that is trained here: simnorm, or residual for a task that ends
    shares = property(lambda self: SHARES)
    Beside = property(lambda self: Beside)

    def __init__(self, args, tasks, device, world=1):
        self.args, self.tasks, self.device = args, tasks, device
        self.facts = [task_facts(t) for t in tasks]
        torch.manual_seed(args.seed)
        self.wm = wm = self.world_model()
        wm.tasks = wm.tasks or tuple(tasks)
        self.args = args = replace(args, ends=wm.ends)  # a file says what it is
        self.rows = task_rows(wm, tasks, self.facts, args.checkpoint)  # (N,) rows of its table
        nets = dict(wm=wm, **self.networks(), stats=RunningStats(len(tasks)))
        self.actors, self.critics, self.stats = (nets[k] for k in ("actors", "critics", "stats"))
        if args.ends:  # see keep_best
            nets["best"] = copy.deepcopy(nn.ModuleDict(dict(wm=wm, actors=self.actors)))
        self.nets = nn.ModuleDict(nets).to(device)
        self.rows, self.best = self.rows.to(device), nets.get("best")
        self.where = dict(best=-math.inf)  # return of the best round
        self.opt, self.beside = self.optimizers(), None
        seeds = dict(model=args.seed, policy=args.seed + 1)
        self.rng = {k: torch.Generator(device).manual_seed(s) for k, s in seeds.items()}
        model = nn.parallel.DistributedDataParallel(wm) if world > 1 else wm
        amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        losses = dict(world_model_loss=model, imagine=imagine, critic_loss=critic_loss,
                      imagined_returns=imagined_returns)
        made = {name: prepare(fn, amp, args.compile) for name, fn in losses.items()}
        self.functions = SimpleNamespace(**made)

    def scale_observations(self, episodes, r):
        """Of several tasks by the first round's data, of one that ends by all (deviation 3)."""
        if self.args.ends or r == 0 and len(self.tasks) > 1:
            for row, name in zip(self.rows, self.tasks):
                self.wm.set_scales(episodes, row, name)

    def world_model(self):
        a, facts = self.args, self.facts
        if a.checkpoint:
            return load_world_model(a.checkpoint)
        return WorldModel(max(f.obs_dim for f in facts), [f.act_dim for f in facts], ends=a.ends,
                          activation=self.activation or ("residual" if a.ends else "simnorm"),
                          **model_dims(a.model_size, len(facts), self.tasks == MT80))

    def networks(self):
        """{name: module}, among them actors and critics."""
        actors = Actors(self.wm.act_mask[self.rows], self.wm.latent)
        critics = Critics(len(self.tasks), self.wm.latent)
        if self.args.ends:
            with torch.no_grad():  # begin by doing next to nothing: deviation 9
                actors.mu.weight[-1].mul_(0.01)
        return dict(actors=actors, critics=critics)

    def optimizers(self):
        """{name: Adam}: the model's with its encoder at 0.3 of the rate, actors', critics'."""
        adam, parts = functools.partial(torch.optim.Adam, fused=True), ([], [])
        for name, p in self.wm.named_parameters():
            parts[not name.startswith("encoder")].append(p)
        model = [dict(params=parts[0], share=0.3), dict(params=parts[1])]
        return dict(model=adam(model, 3e-4), actors=adam(self.actors.parameters(), 5e-4, BETAS),
                    critics=adam(self.critics.parameters(), 5e-4, BETAS))

    def after_model_step(self, z, batch, metrics):
        self.wm.project_embeddings()

    def sampler(self, episodes, horizon):
        return episodes.sampler(self.tasks, horizon, self.device, self.wm.obs_dim,
                                self.wm.act_mask.shape[1], HELD_OUT, ends=self.args.ends)

    def share(self, batch, run):
        """This rank's part of a batch that all ranks draw alike, with the model's task rows."""
        part = slice(run.rank, None, run.world)
        return Batch(*(x[:, part] for x in batch[:5]), self.rows[batch.task[part]])

    def starts(self, sampler, noise):
        """Where imagination starts, (N, B, O); with environments beside it also how they fared."""
        if self.beside:
            return self.beside.roll(self, noise)
        return sampler.starts(self.args.policy_batch, self.rng["policy"]), None

    def policy(self, obs, task, eps=None, best=False):
        """What roll-outs call: numpy obs (n, o), task (n,), noise (n, A) or None -> (n, A)."""
        wm, actors = self.best.values() if best else (self.wm, self.actors)
        task, A = torch.as_tensor(task, device=self.device), wm.act_mask.shape[1]
        eps = None if eps is None else pad(eps, A, self.device)
        a = act(wm, actors, self.rows, pad(obs, wm.obs_dim, self.device), task, eps)
        return a[:, :max(f.act_dim for f in self.facts)].cpu().numpy()

    def contestants(self):
        """{column of the table: (policy(obs, task, job, t), episodes)}; a study may add its own."""
        n, rng = self.args.eval_episodes, np.random.default_rng([self.args.seed, 7])
        A = max(f.act_dim for f in self.facts)
        out = dict(random=(lambda obs, *_: rng.uniform(-1, 1, (len(obs), A)), n),
                   ours=(lambda obs, task, *_: self.policy(obs, task), n))
        if self.where["best"] > -math.inf:
            out["best round"] = lambda obs, task, *_: self.policy(obs, task, best=True), n
        return out

    def keep(self, run, episodes):
        """Tell the run what its checkpoints hold; `wm` and `facts` make one a loadable model."""
        facts = dict(tasks=list(self.wm.tasks), act_dims=list(self.wm.act_dims),
                     activation=self.wm.activation, policy_tasks=list(self.tasks))
        parts = dict(self.nets.items()) | {f"opt_{k}": o for k, o in self.opt.items()}
        parts |= {f"rng_{k}": g for k, g in self.rng.items()} | dict(where=self.where)
        parts["beside"] = self.beside  # it writes episodes: before these
        run.keeps(facts, **parts, episodes=None if self.args.data_dir or run.rank else episodes)

    def load_policies(self, path):
        """The actors of `tasks` from a run's checkpoint, whatever its order of tasks."""
        file = torch.load(path, map_location=self.device, weights_only=True)
        known = file.get("policy_tasks", [])
        if missing := [t for t in self.tasks if t not in known]:
            raise SystemExit(f"{path} has no policy for {missing[0]}: --eval-only needs "
                             "checkpoint.pt of a run with that task; this file has policies for "
                             f"{', '.join(known) or 'no task'}")
        pick = torch.tensor([known.index(t) for t in self.tasks])
        self.actors.load_state_dict({k: v[pick] for k, v in file["actors"].items()})
        if self.best and "best" in file:
            self.best.load_state_dict(self.best.state_dict() | file["best"])
            self.where["best"] = file["where"]["best"]


def prepare(fn, amp, compiled):
    """fn under autocast and, if asked for, compiled for fixed shapes."""
    def run(*inputs):
        with amp():
            return fn(*inputs)
    return torch.compile(run, dynamic=False) if compiled else run


@torch.no_grad()
def act(wm, actors, rows, obs, task, eps=None):
    """Closed-loop actions for a mixed batch: obs (n, O), task (n,) numbers of actors, rows (N,)
    their model's tasks -> (n, A). The batch is laid out as (N, M, ..) with M the most frequent
    task's count, so that every actor runs once."""
    z = wm.encode(obs, rows[task])  # (n, L)
    N, order = len(rows), task.argsort(stable=True)
    count = task.bincount(minlength=N)
    first, column = (count.cumsum(0) - count)[task[order]], torch.empty_like(task)
    column[order] = torch.arange(len(task), device=task.device) - first

    def grid(x):
        out = x.new_zeros(N, int(count.max()), x.shape[1])
        out[task, column] = x
        return out
    return actors(grid(z), None if eps is None else grid(eps))[task, column]


def pad(obs, width, device):
    """numpy (n, o) -> tensor (n, width) with zeros at the end"""
    obs = torch.as_tensor(obs, device=device)
    return F.pad(obs, (0, width - obs.shape[1]))


# ------------------------------------------------------------------------- roll-outs in the world
PIECE = 100  # ends: steps of a stored piece of an episode; files have room for full ones
HOLDS = 1, 2, 4, 8, 16, 32  # agent steps for which random actions are held: slow bodies need many


def roll_out(run, args, agent, episodes, workers, r, n):
    """The play stage: n episodes per task into the data, their mean returns into the log."""
    if args.data_dir:
        return
    if run.rank == 0:
        def note(done, total):
            run.say(f"round {r}: rolling out: {done:,}/{total:,} agent steps", force=False)
        played = collect(workers, agent.tasks, n, r, args, agent.policy, note)
        returns, steps = {}, [len(e["rew"]) for e in played]
        for t in agent.tasks:
            mine = [e for e in played if e["task"] == t]
            parts = [x for e in mine for x in pieces(e, PIECE if args.ends else len(e["rew"]))]
            episodes.append(t, *zip(*parts))
            undisturbed = mine[::2] if args.ends and r else mine
            returns[t] = float(np.mean([e["ret"] for e in undisturbed]))
        mean = float(np.mean(list(returns.values())))
        run.history.append({"round": r, "seconds": run.seconds, "return": returns})
        if args.ends:
            keep_best(run, args, agent, r, mean, steps)
        run.log({f"rollout/{t}/return": v for t, v in returns.items()})
        run.log({"charts/episodic_return": mean})
        run.say(f"round {r}: {len(played)} episodes of {np.mean(steps):.0f} steps on average, mean "
                f"return {mean:.1f}")
    wait_for_all(run)


def keep_best(run, args, agent, r, mean, steps):
    """Of a task that ends: policies come and go, and what acted in the best round is kept."""
    run.history[-1] |= {"steps": sum(steps), "length": float(np.mean(steps)),
                        "window_steps": agent.beside.steps}  # in all so far
    if r and mean > agent.where["best"]:
        agent.where["best"] = mean
        for name, net in agent.best.items():
            net.load_state_dict(agent.nets[name].state_dict())
    if np.mean(steps) < args.horizon:
        run.say(f"round {r}: nearly all imagined windows of {args.horizon} steps end, and only "
                "those that go on teach what an end costs: try --horizon "
                f"{max(1, round(np.mean(steps) / 2))}")


def collect(workers, tasks, n, r, args, policy, note):
    """Roll out n episodes per task; if they end early, as have the steps of n, 64 n at most."""
    played, steps, wanted = [], 0, n * task_facts(tasks[0]).episode_length
    more = n + n % 2 if args.ends else n  # an even number, as every other one is disturbed
    while not played or args.ends and steps < wanted and len(played) < 64 * n:
        played += play_round(workers, tasks, more, r, args, policy, note, len(played))
        steps = sum(len(e["rew"]) for e in played)
        more = min(64, 2 * math.ceil((wanted - steps) * len(played) / steps / 2))
    return played


def play_round(workers, tasks, n, r, args, policy, note, first=0):
    """Episodes first .. first + n - 1 of every task: random actions in round 0, then the current
    stochastic policies, those of odd number disturbed: about every 50 steps a random action takes
    over for 10. Policies soon repeat one path, and a model that saw only that path does not know
    how to come back to it. All noise is drawn per episode beforehand, so that neither the number of
    workers nor their timing changes anything."""
    start = 10**6 * args.seed + 10**4 * r + first
    jobs = [(t, small_seed(start + i)) for t in tasks for i in range(n)]
    facts = [task_facts(t) for t, _ in jobs]
    shape = max(f.episode_length for f in facts), max(f.act_dim for f in facts)
    noise, held = np.zeros((2, len(jobs), *shape), np.float32)
    taken = np.zeros((len(jobs), shape[0], 1), bool)
    for j, T in enumerate(f.episode_length for f in facts):
        rng = np.random.default_rng([args.seed, r, first + j])
        if r:
            noise[j, :T] = rng.standard_normal((T, shape[1]), np.float32)
        held[j, :T] = random_actions(T, shape[1], 10 if r else HOLDS[j % n % len(HOLDS)], rng)
        if r:
            taken[j, :T, 0] = np.convolve(rng.random(T) < 0.02 * (j % 2), np.ones(10))[:T] > 0

    def acts(obs, job, t):
        if r == 0:
            return held[job, t]
        return np.where(taken[job, t], held[job, t], policy(obs, job // n, noise[job, t]))
    return workers.rollout(jobs, acts, note)


def random_actions(T, act_dim, hold, rng):
    """Uniform actions (T, A), each held for `hold` agent steps."""
    return rng.uniform(-1, 1, (-(-T // hold), act_dim)).repeat(hold, 0)[:T].astype(np.float32)


def small_seed(seed):
    """A seed as it is, or mapped to the 32 bits that simulators take if it has more."""
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def pieces(episode, most):
    """[(obs, act, rew, term), ..]: an episode cut into pieces of at most so many steps."""
    o, a, r, e = (episode[k] for k in ("obs", "act", "rew", "term"))
    starts = range(0, len(r), most)
    return [(o[t:t + most + 1], a[t:t + most], r[t:t + most], e[t:t + most]) for t in starts]


class Beside:
    """Environments beside the imagination (deviation 8): B of them go on for H steps with the
    actions of the next imagined windows, which start where they are, and tell which windows ended.
    One that has ended, or done all its steps, begins anew; a window of the latter kind goes on
    in imagination. An end has no slope: policies learn to avoid it from the values of windows
    that went on, so that H has to be well below the length of episodes. What they did is data:
    complete pieces are written before every checkpoint, which has the rest."""

    def __init__(self, args, task, facts, episodes):
        self.env = beside(task, args.policy_batch, args.seed, args.workers)
        self.task, self.episodes, self.steps, self.complete = task, episodes, 0, []
        B, self.obs = args.policy_batch, self.env.reset()  # (B, O)
        rows = {"obs": (PIECE + 1, facts.obs_dim), "act": (PIECE, facts.act_dim), "rew": (PIECE,)}
        self.book = {k: np.zeros((B, *row), np.float32) for k, row in rows.items()}  # unfinished
        self.book["t"] = np.zeros(B, int)
        self.book["obs"][:, 0] = self.obs

    @torch.no_grad()
    def roll(self, agent, noise):
        """noise (H, 1, B, A) of the imagined steps -> start observations (1, B, O), and alive
        (H, 1, B): 0 from the step on that ended."""
        start = torch.as_tensor(self.obs, device=agent.device)
        alive, z = torch.ones(len(noise), 1, len(start)), agent.wm.encode(start, agent.rows[0])
        for h, eps in enumerate(noise):
            action = agent.actors(z[None], eps)[0]
            alive[h:, 0, self.step(action.cpu().numpy())] = 0
            z = agent.wm.next(z, action, agent.rows[0])
        return start[None], alive.to(agent.device)

    def step(self, action):
        """One step of all, into the book of each; tears out complete pieces. Returns terminated."""
        self.obs, rew, terminated, truncated, last = self.env.step(action)
        book, i, t = self.book, np.arange(len(action)), self.book["t"]
        book["act"][i, t], book["rew"][i, t], book["obs"][i, t + 1] = action, rew, last
        t += 1
        for b in np.flatnonzero(terminated | truncated | (t == PIECE)):
            n, term = t[b], np.zeros(t[b], bool)
            term[-1] = terminated[b]
            piece = book["obs"][b, :n + 1], book["act"][b, :n], book["rew"][b, :n]
            self.complete.append((*(x.copy() for x in piece), term))
            book["obs"][b, 0], t[b] = self.obs[b], 0
        self.steps += len(action)
        return terminated

    def state_dict(self):
        """Writes the complete pieces to the episodes first."""
        if self.complete:
            self.episodes.append(self.task, *zip(*self.complete))
        self.complete = []
        arrays = {f"env.{k}": v for k, v in self.env.state_dict().items()} | self.book
        return {"steps": self.steps} | {k: torch.tensor(np.asarray(v)) for k, v in arrays.items()}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.book = {k: state[k].cpu().numpy().copy() for k in self.book}
        mine = {k[4:]: v.cpu() for k, v in state.items() if k.startswith("env.")}
        self.obs = self.env.load_state_dict(mine)


# ----------------------------------------------------------------------- published world models
def read_layers(weights, prefix):
    """The tensors of one MLP in network order, [{weight, bias, ln.weight, ln.bias}, ..]. Layouts:
    `0.weight, 0.ln.weight` (TD-MPC2 now, PWM) and a Sequential `1.weight`, `2.weight` (LN)."""
    modules, layers = {}, []
    for key, value in weights.items():
        if key.startswith(prefix + "."):
            path, _, name = key[len(prefix) + 1:].rpartition(".")
            modules.setdefault(path, {})[name] = value

    def place(path):
        return [(p == "ln", int(p) if p.isdigit() else 0) for p in path.split(".")]
    for path in sorted(modules, key=place):
        if modules[path]["weight"].ndim == 2:
            layers.append(dict(modules[path]))
        else:  # a LayerNorm belongs to the Linear before it
            layers[-1].update({f"ln.{k}": v for k, v in modules[path].items()})
    return layers


def find_world_model(file, path):
    """The world model's tensors in what `safe_load` returned, their keys without `_` and `state.`,
    and the name of its reward head."""
    nested = [k for k in ("wm", "model", "world_model") if isinstance(file, dict) and k in file]
    file = file[nested[0]] if nested else file
    weights = {k.replace("_encoder.state.", "_encoder.").removeprefix("_"): v
               for k, v in (file.items() if isinstance(file, dict) else ()) if torch.is_tensor(v)}
    found = {k.split(".")[0] for k in weights}
    head = found & {"reward", "reward_head"}
    if not (head and found >= {"encoder", "dynamics"}):
        raise SystemExit(f"{path} has no world model: found keys {sorted(weights)[:5]}, expected "
                         "_encoder.*, _dynamics.* and _reward.* of TD-MPC2 or PWM, or a "
                         "checkpoint.pt of pwm.py")
    return weights, head.pop()


def load_world_model(path, device="cpu"):
    """A WorldModel from TD-MPC2's and PWM's published files (three key layouts) or our own.
    Sizes follow from shapes. SystemExit: not a world model, or shapes that do not fit together."""
    file = data.safe_load(path)
    weights, head = find_world_model(file, path)
    names = dict(encoder="encoder", dynamics="dynamics", reward_head=head, end_head="end_head")
    layers = {ours: read_layers(weights, theirs) for ours, theirs in names.items()}
    wm = empty_world_model(file, weights, layers, path)
    state = {k: v for k, v in wm.state_dict().items() if k in ("obs_mean", "obs_std")}
    state |= {k: weights[k].expand_as(x) for k, x in state.items() if k in weights}
    state |= {k: weights[k] for k in ("task_emb.weight", "rew_std") if k in weights}
    for name, made in layers.items():
        for i, layer in enumerate(made):
            state |= {f"{name}.{i}.{k}": x for k, x in layer.items()}
    try:
        wm.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise SystemExit(f"{path} does not fit together as a world model: {why}") from None
    wm.project_embeddings()
    return wm.to(device)


def empty_world_model(file, weights, layers, path):
    """A WorldModel of the sizes, tasks and activation that a file's tensors and facts tell."""
    (enc_hidden, width), depth = layers["encoder"][0]["weight"].shape, len(layers["encoder"])
    (hidden, i), ends = layers["dynamics"][0]["weight"].shape, bool(layers["end_head"])
    latent, bins = (layers[k][-1]["bias"].numel() for k in ("dynamics", "reward_head"))
    n, e = weights["task_emb.weight"].shape if "task_emb.weight" in weights else (1, 0)
    suite, A = {30: MT30, 80: MT80}.get(n, ()), i - latent - e
    dims = file.get("act_dims") or [task_facts(t).act_dim for t in suite] or [A] * n
    if bins != (1 if ends else BINS) or max(dims) != A:
        raise SystemExit(f"{path} has {bins} reward classes and {A} actions for {n} tasks; "
                         f"expected {BINS} and {max(dims)}: not of this family of models")
    activation = file.get("activation") or file.get("args", {}).get("activation", "simnorm")
    wm = WorldModel(width - e, dims, depth, enc_hidden, hidden, latent, e, ends, activation)
    wm.tasks = tuple(file.get("tasks") or suite)
    return wm


def task_rows(wm, tasks, facts, path):
    """Rows of the model's task table for our tasks, (N,). SystemExit: a model of other tasks."""
    known = wm.tasks if len(wm.tasks) == len(wm.act_dims) else tuple(tasks)
    for t, f in zip(tasks, facts):
        row = known.index(t) if t in known and len(known) == len(wm.act_dims) else None
        if row is None or wm.act_dims[row] != f.act_dim or f.obs_dim > wm.obs_dim:
            raise SystemExit(f"{path} is a world model (latent {wm.latent}, "
                             f"{len(wm.act_dims)} tasks, obs {wm.obs_dim}) not trained on {t}: "
                             "expected --task mt30, mt80 or one of its tasks")
    return torch.tensor([known.index(t) for t in tasks])


# ----------------------------------------------------------------------------------------- set-up
# millions of parameters: encoder layers and width, other width, latent, Q functions, embedding
SIZES = {1: (2, 256, 384, 128, 2, 96), 5: (2, 256, 512, 512, 5, 64),  # Table 1
         19: (3, 1024, 1024, 512, 5, 64), 48: (4, 1792, 1792, 768, 5, 64),
         317: (5, 4096, 4096, 1376, 8, 96)}
SHARES = {  # of all updates, in the first round and in the last, by kind and whether tasks end
    ("model", False): (0.25, 0.2), ("policy", False): (0.04, 0.3),
    ("model", True): (0.3, 0.05), ("policy", True): (0.01, 0.05)}
DEFAULTS = dict(eval_episodes=10, policy_lr=5e-4)
ENDS = dict(eval_episodes=10, horizon=6, policy_lr=3e-4, critic_lr=1e-3)
COLUMNS = ("model_size rounds seed_episodes round_episodes wm_steps wm_batch wm_horizon wm_lr "
           "policy_steps policy_batch critic_passes horizon").split()
BUDGETS = {  # what the flags that were left out become, by device and kind of task
    ("cpu", "one"): (1, 12, 16, 4, 10_000, 64, 4, 1e-3, 3_000, 64, 1, 16),
    ("cpu", "many"): (1, 6, 18, 8, 24_000, 256, 4, 1e-3, 4_000, 16, 1, 8),
    ("cpu", "ends"): (1, 60, 12, 6, 8_000, 128, 6, 1e-3, 2_160, 64, 8, 6),
    ("cuda", "one"): (5, 20, 20, 10, 40_000, 256, 16, 3e-4, 20_000, 64, 8, 16),
    ("cuda", "many"): (48, 6, 40, 20, 100_000, 1024, 16, 3e-4, 10_000, 64, 8, 16),
    ("cuda", "ends"): (5, 60, 20, 64, 60_000, 256, 16, 3e-4, 15_000, 64, 8, 6),
    "fast": (1, 2, 4, 1, 200, 64, 4, 1e-3, 20, 8, 1, 16)}
OWN, MODEL = "rounds seed_episodes round_episodes", "model_size wm_steps wm_batch wm_lr"
COUNTS = f"{OWN} workers wm_batch wm_horizon policy_batch critic_passes horizon eval_episodes"
RANGES = dict.fromkeys(COUNTS.split(), (1, None))
RANGES |= dict.fromkeys(("save_every", "wm_steps", "policy_steps", "eval_every"), (0, None))
RANGES |= dict.fromkeys("wm_lr policy_lr critic_lr gamma lam".split(), (0, 1))
RANGES["seed"] = 0, 2**62


def model_dims(size, n_tasks, mt80=False):
    """Keyword arguments of WorldModel for a model size; some differ between MT30 and MT80."""
    layers, enc, hidden, latent, _, emb = SIZES[size]
    if mt80:
        latent, emb = 768 if size == 19 else latent, 96
    return dict(enc_layers=layers, enc_hidden=enc, hidden=hidden, latent=latent,
                task_dim=emb if n_tasks > 1 else 0)


def tasks_of(text):
    tasks = SUITES.get(text) or tuple(t.strip() for t in text.split(",") if t.strip())
    if not tasks or len(set(tasks)) < len(tasks):
        raise SystemExit(f"--task {text!r} names no task, or one twice: expected mt30, mt80 or "
                         "walker-walk,cup-catch")
    return tasks


def check_args(args):
    """SystemExit: flags out of range, or that the chosen mode does not read."""
    data.check_ranges(args, RANGES)
    if args.resume:
        return
    if args.eval_only and not args.checkpoint:
        raise SystemExit("--eval-only needs --checkpoint runs/<name>/checkpoint.pt")
    if args.eval_only:
        training = f"{OWN} {MODEL} policy_steps policy_batch critic_passes eval_every data_dir"
        data.refuse(args, training, "--eval-only does not train")
    if args.checkpoint:
        data.refuse(args, MODEL, "with --checkpoint the world model is given and says its sizes")
    if args.data_dir:
        data.refuse(args, OWN, "with --data-dir no data is made")


def fill_args(args, device, tasks):
    """Args with the defaults of this device for the flags that were left out."""
    single = len(tasks) == 1
    ends = single and task_facts(tasks[0]).ends if args.ends is None else args.ends
    if ends and not single:
        raise SystemExit("--ends is for one task: name one, or type --ends False")
    kind = "ends" if ends else "one" if single else "many"
    row = BUDGETS["fast" if args.fast else (device.type, kind)]
    budget = dict(zip(COLUMNS, row), ends=ends) | (ENDS if ends else DEFAULTS)
    budget |= dict(eval_episodes=1) if args.fast else {}
    budget |= dict(model_size=None, wm_steps=0) if args.checkpoint else {}
    budget |= dict(rounds=1) if args.data_dir else {}
    args = replace(args, **{k: v for k, v in budget.items() if getattr(args, k) is None})
    return args if args.critic_lr is not None else replace(args, critic_lr=args.policy_lr)


def open_data(run, args, tasks):
    """Episodes: published chunks (converted once), a folder of episodes, or our own."""
    folder = Path(args.data_dir or run.dir / "episodes")
    chunks = list(folder.glob("chunk_*.pt"))
    if run.rank == 0 and not args.data_dir:
        most, sizes = PIECE if args.ends else math.inf, {}
        for t in tasks:
            O, A, steps = task_facts(t)[:3]
            sizes[t] = O, A, min(steps, most)
        Episodes.create(folder, sizes)
    if run.rank == 0 and chunks:
        suite = MT80 if any(t.startswith("mw-") for t in tasks) or len(chunks) > 4 else MT30
        sizes = {t: task_facts(t)[:2] for t in suite}
        data.convert_tdmpc2(folder, folder / "episodes", suite, sizes)
    wait_for_all(run)
    return Episodes.open(folder / "episodes" if chunks else folder, tasks)


def announce(run, a, agent, hardware):
    """Print what was chosen and why."""
    n, size = len(agent.tasks), sum(p.numel() for p in agent.wm.parameters())
    origin = a.data_dir or "own roll-outs"
    model = f"from {a.checkpoint}" if a.checkpoint else f"--model-size {a.model_size}"
    ends = f", {'seen' if agent.beside else 'learnt'} ends" if a.ends else ""
    print(f"PWM on {n} task{'s' * (n > 1)} ({a.task}), seed {a.seed}, {hardware}, "
          f"{'compiled' if a.compile else 'eager'}, {a.workers} roll-out workers"
          f"{', also sent to Weights & Biases' if a.track else ''}\n"
          f"world model of {size:,} parameters, {model}, data from {origin}{ends}")
    if not a.eval_only:
        print(f"budget: {a.rounds} rounds, {a.wm_steps} model updates ({a.wm_batch} x "
              f"{a.wm_horizon} steps), {a.policy_steps} policy updates ({n} x {a.policy_batch} x "
              f"{a.horizon} imagined steps, {a.critic_passes} x {CRITIC_BATCHES} critic steps)")
    print(f"run folder {run.dir}", flush=True)


# ------------------------------------------------------------------------------------- evaluation
PUBLISHED = {"PWM paper": dict(zip(MT30, (  # final returns, both models 48M (released files)
    995.4, 985.8, 857.8, 414.5, 991.7, 988.3, 116.4, 869.1, 999.7, 1000.0, 896.6, 953.4, 471.6,
    977.6, 879.7, 871.2, 844.4, 394.7, 162.4, 977.8, 791.6, 601.0, 549.4, 825.9, 793.8, 165.1,
    989.1, 974.9, 839.6, 866.9))), "TD-MPC2 paper": dict(zip(MT30, (  # with planning
        989.2, 979.0, 617.6, 148.1, 981.4, 974.5, 9.7, 814.8, 990.5, 1000.0, 0.5, 0.0, 964.3, 928.2,
        983.4, 981.1, 487.6, 493.1, 69.6, 959.9, 186.7, 324.6, 122.8, 156.8, 301.8, 273.0, 979.1,
        580.8, 828.8, 820.5)))}


@torch.no_grad()
def open_loop_error(wm, batch, horizons=(1, 4, 16)):
    """Normalised squared error of open-loop prediction: {latent_nmse_h, reward_nmse_h}; 1.0 is what
    predicting each task's mean would give. batch: as for world_model_loss. Steps beyond the end of
    an episode do not count; a horizon that no episode reaches is left out."""
    obs, acts, rew, _, live, task = batch
    z, true = wm.encode(obs[0], task), wm.encode(obs, task)
    within, out = F.one_hot(task).float(), {}  # (B, N): variance is counted within a task

    def centred(x, keep):  # (B, D) minus the mean of its task
        w = within[keep]
        return x - w @ ((w.T @ x) / w.sum(0).clamp(min=1)[:, None])
    for h, a in enumerate(acts, 1):
        r = wm.reward_value(wm.reward(z, a, task)) * (wm.rew_std if wm.ends else 1.0)
        z, keep = wm.next(z, a, task), live[h - 1] > 0
        if h in horizons and keep.any():
            goal, real = true[h][keep], rew[h - 1][keep]
            spread = centred(real[:, None], keep).square().sum()
            spread = spread.clamp(min=1e-4 * len(real))  # sparse rewards: maybe all 0
            error = (z[keep] - goal).square().sum()
            out[f"latent_nmse_{h}"] = error / centred(goal, keep).square().sum()
            out[f"reward_nmse_{h}"] = (r[keep] - real).square().sum() / spread
    return out


def check_model(run, args, agent, episodes, r, updates):
    """Held-out open-loop error after a model stage: a world model is not trusted unseen."""
    if run.rank or not updates:
        return
    generator = torch.Generator(agent.device).manual_seed(0)
    batch = agent.sampler(episodes, args.horizon).sequences(512, generator, held_out=True)
    batch = batch._replace(task=agent.rows[batch.task])
    found = open_loop_error(agent.wm, batch, (1, 4, args.horizon))
    errors = {k: float(v) for k, v in found.items()}
    run.history.append({"round": r, **errors})
    run.log({f"eval/{k}": v for k, v in errors.items()})
    run.say(f"round {r}: held-out open-loop error (1 = predicting the mean): "
            + ", ".join(f"{k} {v:.3f}" for k, v in errors.items()))


def play_all(workers, tasks, n, seed, policy, note=None):
    """n episodes per task -> {task: results of its episodes on the table's scale: return, or 1000 x
    success for Meta-World}; policy(obs, task index, job, t) -> actions."""
    jobs = [(t, small_seed(10**9 + 10**4 * seed + i)) for t in tasks for i in range(n)]
    out = {t: [] for t in tasks}
    for e in workers.rollout(jobs, lambda obs, job, t: policy(obs, job // n, job, t), note):
        scale = 1.0 if task_facts(e["task"]).scale is None else 1000.0
        out[e["task"]].append(scale * score(e["task"], float(e["ret"]), float(e["success"])))
    return out


def evaluate_now(run, agent, workers, updates):
    """Deterministic episodes of all policies as they are, into the history."""
    policy, n = agent.contestants()["ours"]
    played = play_all(workers, agent.tasks, n, agent.args.seed, policy)
    returns = {t: float(np.mean(x)) for t, x in played.items()}
    run.history.append(dict(policy_updates=updates, seconds=run.seconds, evaluation=returns))
    run.log({f"eval/{t}/return": v for t, v in returns.items()})
    mean = np.mean(list(returns.values()))
    run.say(f"after {updates} policy updates: mean return {mean:.1f}")


def evaluate(run, agent, workers):
    """{column of the table: {task: results}} of all contestants."""
    def note(done, total):
        run.say(f"evaluating: {done:,}/{total:,} agent steps", force=False)
    return {name: play_all(workers, agent.tasks, n, agent.args.seed, policy, note)
            for name, (policy, n) in agent.contestants().items()}


def summarise(tasks, columns):
    """(rows of the final table, {column: {mean, iqm, ..}}), the paper's numbers beside ours."""
    rows, summary = [], {}
    for t in tasks:
        ours = {c: float(np.mean(x[t])) for c, x in columns.items()}
        rows.append({"task": t, **ours, **{c: x.get(t) for c, x in PUBLISHED.items()}})
    for c in (*columns, *PUBLISHED):
        if values := [r[c] for r in rows if r[c] is not None]:
            summary[c] = dict(mean=float(np.mean(values)), iqm=iqm(values))
        if c in columns:  # 95 % interval over evaluation episodes of this one training seed
            results = np.array([columns[c][t] for t in tasks]).T
            summary[c]["mean_ci95"] = list(bootstrap_ci(results, np.mean))
    return rows, summary


def report(run, tasks, columns):
    """Print the final table, write results.csv; returns what results.json holds."""
    rows, summary = summarise(tasks, columns)
    means = [{"task": s, **{c: x[s] for c, x in summary.items()}} for s in ("mean", "iqm")]
    width = max(len(t) for t in tasks) + 2
    print(f"\n{'task':<{width}}" + "".join(f"{c:>15}" for c in summary))
    for r in rows + means * (len(rows) > 1):
        cells = ["-" if r[c] is None else f"{r[c]:.1f}" for c in summary]
        print(f"{r['task']:<{width}}" + "".join(f"{x:>15}" for x in cells))
    data.write_csv(run.dir / "results.csv", [{k: r[k] for k in ("task", *summary)} for r in rows])
    return dict(summary=summary, table=rows, episodes=columns, history=run.history)


def record(run, agent, best):
    """One deterministic episode per task as video_<task>.mp4, at the task's own pace."""
    import imageio
    for k, t in enumerate(agent.tasks):
        env = make_env(t)
        obs, _ = env.reset(seed=small_seed(10**9 + 10**4 * agent.args.seed))
        frames, done = [env.render()], False
        while not done:
            action = agent.policy(obs[None], np.array([k]), best=best)[0, :agent.facts[k].act_dim]
            obs, _, terminated, truncated, _ = env.step(action)
            frames.append(env.render())
            done = terminated or truncated
        path = run.dir / f"video_{t.replace('/', '_').replace(':', '_')}.mp4"
        imageio.mimwrite(path, frames, fps=env.metadata.get("render_fps", 40), macro_block_size=1)
        env.close()


# ------------------------------------------------------------------------------------------- main
def main(args: Args, root="runs", make_agent=Agent, inside=None):
    """Run everything in a folder below root, or in the folder `inside`; returns what results.json
    holds (None on the other ranks of torchrun). make_agent: a study's own subclass of Agent."""
    args = data.resumed(args)
    check_args(args)
    if args.capture_video:
        choose_gl()  # now: mujoco looks at the choice once, and hours should not end without OpenGL
    device, hardware = data.choose_device(args.device)
    tasks = tasks_of(args.task)
    args = fill_args(args, device, tasks)
    rank, world = data.join_ranks(device)
    agent = make_agent(args, tasks, device, world)
    args = agent.args
    run = Run("pwm", args, root, inside=inside)
    if args.eval_only:
        agent.load_policies(args.checkpoint)
    else:
        episodes = open_data(run, args, tasks)
        if args.ends and not args.data_dir and rank == 0:
            agent.beside = agent.Beside(args, tasks[0], agent.facts[0], episodes)
        agent.keep(run, episodes)
    if rank == 0:
        announce(run, args, agent, hardware)
    with Workers(args.workers) if rank == 0 else contextlib.nullcontext() as workers:
        if not args.eval_only:
            train(run, args, agent, episodes, workers)
        columns = evaluate(run, agent, workers) if rank == 0 else None
    if rank:
        return run.finish({})
    result = report(run, tasks, columns)
    means = {c: x["mean"] for c, x in result["summary"].items()}
    run.log({f"eval/{t}/return": float(np.mean(x)) for t, x in columns["ours"].items()})
    if args.capture_video:
        record(run, agent, means.get("best round", -math.inf) > means["ours"])
    return run.finish(result)


STUDY = "python -m studies."
MOVED = {  # what has left, and what to type now
    "--task ball-wall": f"{STUDY}ball_wall", "--task double-pendulum": f"{STUDY}double_pendulum",
    "--true-plant": f"{STUDY}shac", "--planner-episodes": f"{STUDY}tdmpc2",
    "--prior": f"{STUDY}tdmpc2", "--ablation stiffness": f"{STUDY}stiffness",
    "--ablation latency": f"{STUDY}latency", "--ablation all": f"{STUDY}ablations",
    "--ablation": f"{STUDY}ablations --only NAMES", "--seeds": "--seed, once for each",
    "--shared-policy": f"{STUDY}ablations --only shared", "--episodic": "--ends True",
    "--td-actor": f"{STUDY}ablations --only objective", "--no-episodic": "--ends False",
    "--activation": f"{STUDY}ablations --only activation"}
CONSTANTS = dict(rho="RHO", beta1="BETAS", held_out="HELD_OUT", critic_batches="CRITIC_BATCHES",
                 wm_final_lr="FINAL_RATE", symexp="`pseudo` of imagine")
CONSTANTS |= dict.fromkeys(("first_model", "last_model", "first_policy", "last_policy"), "SHARES")
MOVED |= {data.flag(k): f"nothing, and change {x} in pwm.py" for k, x in CONSTANTS.items()}

if __name__ == "__main__":
    main(data.parse(Args, __doc__, MOVED))
