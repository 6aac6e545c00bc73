"""SAVi: slots from video, and slots that actions explain, in one file.

The idea (Kipf et al., "Conditional Object-Centric Learning from Video", ICLR 2022): K vectors, slots, compete for the
pixels of each frame; a predictor carries them to the next one, and each is decoded to a picture and a mask of its own.
With reconstruction (or optical flow) as the only goal, slots settle on objects. Giridhar et al. ("Explorations in
Dynamics Decomposition for Multi-Task RL", Sections 3.3 and 5.2, Figure 3) trained it on video of a humanoid: one slot
took the whole body, and they propose to tie slots to groups of actions. Both are here, with video made on the spot and
every score printed beside rules that learn nothing: on a centred body a fixed 2x3 grid already looks good.

    python savi.py                                        # 500 clips of moving objects, 6 slots, FG-ARI: README
    python savi.py --data humanoid --slots 7              # the seed study's experiment: who draws the body?
    python savi.py --data humanoid --study slots          # the same for 3 to 11 slots, one colour and five
    python savi.py --data pushed --ablation action        # do actions explain slots? Arms A0-A6, rule fixed in advance

Copy me together with envs.py and data.py. Shapes: B clips, T frames, K slots, D slot size, N tokens, m actions, H W
pixels; time first: video (T, B, 3, H, W), act (T, B, m), slots (T, B, K, D); act[t] was active until frame t.

Deviations and choices:
 1. Data: scenes of MuJoCo instead of MOVi and MoCapAct, which are downloads; --data mocapact re-renders its poses.
 2. The loss is a mean over pixels, SAVi's a sum; its gradient clip of 0.05 then acts in the first updates only.
 3. The predictor is a residual MLP per slot (the authors' choice for robots); --predictor transformer is the other.
 4. Two iterations of slot attention on the first frame, one on later ones, with the original module's residual MLP.
 5. The preset cpu has 32 pixels, 64 numbers per slot, 8 frames and, instead of transposed convolutions, an MLP per
    cell of 2x2 pixels with sines of the position.
 6. Frames are centred and scaled before the encoder; weights start as in the authors' JAX code, not as in PyTorch;
    StoSAVi's variance starts at that of its prior.
 7. --init com conditions on centres of parts instead of boxes; the slots left for the background come last.
 8. Action-conditioned slots, their arms and their verdict are ours: the seed study proposes the direction only.
"""
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

from data import FORK_STEPS, LegacyRun as Run, bootstrap_ci, make_video, open_video, render_mocapact


@dataclass
class Args:
    data: Literal["objects", "pushed", "humanoid", "crowd", "mocapact"] = "objects"
    """objects: 2-5 free bodies; pushed: three bodies, two actions each; humanoid: the CMU body, 56 actions, masks of
    five parts; crowd: 2 or 3 humanoids; mocapact: the poses in --mocapact-dir. All but the last are made on the spot"""
    seed: int = 1
    """first training seed; the data have their own, fixed seed"""
    seeds: int = 1
    """trainings: seed, seed + 1, ..; with more than one the table shows mean and 95 % interval"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes the GPU when there is one"""
    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """sizes and budget: cpu 32 pixels, minutes; gpu 64 pixels, SAVi-S, 30,000 updates; auto follows the device"""
    ablation: Literal["action"] | None = None
    """action: arms A0-A6 (see ARMS) on --data, --seeds each (default 5), and the verdict by a rule fixed in advance"""
    study: Literal["slots"] | None = None
    """slots: 3, 5, 7, 9 and 11 slots, one colour and colour per part: where does the body go?"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for the loss; on a CPU its minute is more than it saves"""
    threads: int = 1
    """CPU threads of one training; two were slower than one on two busy cores"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes: for rendering, and on a CPU for trainings side by side"""
    resume: str | None = None
    """continue the run in this folder; its flags are read from there"""
    checkpoint: str | None = None
    """start from the weights in this checkpoint.pt; the network's flags are read from it"""
    eval_only: bool = False
    """with --checkpoint: only measure and draw"""
    capture_video: bool = True
    """slots.gif and slots.mp4 beside the figures"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""

    # data
    color: Literal["parts", "default", "random"] | None = None
    """parts: each part or object its own colour; default: all the same tan, as in the seed study; random: each body one
    random colour. Left out: humanoid default, crowd random, others parts"""
    floor: Literal["plain", "checker"] = "plain"
    """a checkerboard costs the decoder capacity"""
    clips: int | None = None
    """clips in the data set, 70 % of them to train on (preset: 500 or 1200)"""
    clip_frames: int | None = None
    """frames per clip (preset: 12 or 24)"""
    size: Literal[32, 64, 128] | None = None
    """pixels (preset: 32 or 64)"""
    cache: str = "runs/video"
    """where rendered video is kept; HDF5, reused by the same recipe"""
    mocapact_dir: str | None = None
    """folder with MoCapAct's CMU_*.hdf5"""

    # network
    slots: int | None = None
    """K (objects 6, pushed 4, others 7 as in the seed study)"""
    dim: int | None = None
    """D, numbers per slot (SAVi: 128; preset cpu: 64)"""
    init: Literal["learned", "gauss", "com", "action"] = "learned"
    """first slots: learned; Gaussian with learned mean and spread; from the true centres of parts in frame 0 (weak
    supervision, SAVi's conditional mode); learned plus the slot's own actions"""
    predictor: Literal["transformer", "mlp", "action"] = "mlp"
    """slots to the next frame's: SAVi's transformer across slots; per slot, as SAVi's authors took for robot video; per
    slot with the slot's own actions"""
    interact: bool = False
    """with --predictor action: slots also attend to each other, which lets actions reach all of them"""
    partition: str = "none"
    """actions of each slot: none; global (all to all); body (the parts' own); random (same sizes); discovered (SD2 on
    body positions, written to cells/*.partition.json); or a JSON file with a list of lists of action indices"""
    decoder: Literal["conv", "mlp"] | None = None
    """spatial broadcast decoder: transposed convolutions (SAVi), or an MLP per cell, 40 times cheaper on a CPU"""
    target: Literal["rgb", "flow"] = "rgb"
    """what slots must explain: colours, or exact optical flow of the simulator, SAVi's main target"""
    iters_first: int = 2
    """slot attention iterations on the first frame"""
    iters_next: int = 1
    """slot attention iterations on later frames"""
    pred_weight: float = 0.0
    """weight of the error of decoded predictions; the corrected slots alone never need an action"""
    noise: float = 0.0
    """StoSAVi: sample the predicted slots, with this weight on their KL divergence (1e-4 there); 0: no noise"""

    # optimisation: left out, these follow from the preset and are printed at the start
    updates: int | None = None
    """gradient steps"""
    frames: int | None = None
    """T, consecutive frames in a training sequence"""
    batch: int | None = None
    """sequences per update"""
    lr: float | None = None
    """peak learning rate; linear warm-up over 7 % of the updates, cosine to zero"""
    clip: float = 0.05
    """clip of the gradient's norm; the loss is a mean over pixels, so it bites in the first updates only"""
    until: int | None = None
    """stop after this many updates of the schedule (to train in pieces with --resume)"""


# --------------------------------------------------------------------------------------------- metrics, all in float64
def contingency(true, pred):
    """counts (n_true, n_pred) of pixels for two label maps of one shape."""
    true, pred = np.asarray(true).ravel().astype(np.int64), np.asarray(pred).ravel().astype(np.int64)
    if true.shape != pred.shape:
        raise SystemExit(f"masks of {true.size} and {pred.size} pixels: expected two label maps of one shape")
    if not true.size:
        return np.zeros((1, 1))
    width = pred.max() + 1
    return np.bincount(true * width + pred, minlength=(true.max() + 1) * width).reshape(-1, width).astype(np.float64)


def ari(true_masks, pred_masks):
    """Adjusted Rand index of two label maps: 1 the same up to names, 0 as by chance."""
    n = contingency(true_masks, pred_masks)

    def pairs(x):
        return (x * (x - 1)).sum()

    both, a, b = pairs(n), pairs(n.sum(1)), pairs(n.sum(0))
    expected = a * b / max(pairs(n.sum()), 1.0)
    most = (a + b) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


def fg_ari(true_masks, pred_masks):
    """Adjusted Rand index over the pixels whose true label is not 0, for integer label maps of one shape (any axes, all
    frames of a clip together). It ignores what slots do to the background: look at the masks too."""
    true, pred = np.asarray(true_masks), np.asarray(pred_masks)
    return ari(true[true > 0], pred[true > 0]) if true.shape == pred.shape else ari(true, pred)


def iou_table(true, pred):
    """(labels of true that occur, IoU of each of them with each label of pred)."""
    n = contingency(true, pred)
    there = np.flatnonzero(n.sum(1))
    return there, (n / np.maximum(n.sum(1, keepdims=True) + n.sum(0) - n, 1))[there]


def segment_scores(true, pred):
    """mIoU: best one-to-one matching, over all true segments, background too; mBO: best slot of each object."""
    from scipy.optimize import linear_sum_assignment
    labels, table = iou_table(true, pred)
    rows, cols = linear_sum_assignment(-table)
    best = table[labels > 0].max(1)
    return {"miou": table[rows, cols].sum() / len(labels), "mbo": best.mean() if len(best) else 1.0}


def usage(true, alpha):
    """Who draws the body? true (T,H,W) labels, alpha (T,K,H,W) soft masks.

    share (K,): of the foreground; top1: its largest; eff: exp of its entropy, the effective number of slots; conf: mean
    largest alpha; top1_hard: top1 of the argmax; whole: best IoU of one slot with the whole foreground.
    A monopoly has top1 and whole near 1; a smear, where no slot has decided, has eff = K and conf = 1/K."""
    fg, hard = np.asarray(true) > 0, alpha.argmax(1)
    a = np.moveaxis(alpha, 1, -1)[fg].astype(np.float64)                                              # (pixels, K)
    K = alpha.shape[1]
    share = a.sum(0) / max(a.sum(), 1e-12)
    hard_share = np.bincount(hard[fg], minlength=K) / max(fg.sum(), 1)
    whole = max(((hard == j) & fg).sum() / max(((hard == j) | fg).sum(), 1) for j in range(K))
    return {"share": share, "top1": share.max(), "eff": np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum()),
            "conf": a.max(1).mean() if len(a) else 1.0, "top1_hard": hard_share.max(), "whole": whole}


def consistency(true, pred):
    """Share of (frame, object) pairs in which an object's largest slot is the one it has most often; (T,H,W) labels."""
    same = total = 0
    for label in np.unique(true[true > 0]):
        best = [np.bincount(p[g == label]).argmax() for g, p in zip(true, pred) if (g == label).any()]
        same, total = same + np.bincount(best).max(), total + len(best)
    return same / max(total, 1)


def designated_iou(true, pred, slot_of_part):
    """Mean over the parts there are of the IoU with the slot that was meant for each; slot_of_part {label: slot}."""
    labels, table = iou_table(true, pred)
    got = [table[i, slot_of_part[g]] if slot_of_part[g] < table.shape[1] else 0.0
           for i, g in enumerate(labels) if g in slot_of_part]
    return float(np.mean(got)) if got else 0.0


GRIDS = ((1, 7), (7, 1), (2, 3), (3, 2), (3, 3))


def baseline_masks(true, video, k=5, seed=0):
    """{name: label map (T,H,W)} of rules that learn nothing; k-means may even look at the true foreground."""
    from scipy.cluster.vq import kmeans2
    T, H, W = true.shape
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:H, :W]
    out = {"one slot": np.zeros_like(true), "random": rng.integers(0, k, true.shape)}
    for r, c in GRIDS:
        out[f"grid {r}x{c}"] = np.broadcast_to(y * r // H * c + x * c // W, true.shape)
    fg = true > 0
    xy = np.stack(np.broadcast_arrays(y / H, x / W), -1)[None].repeat(T, 0)[fg]
    rgb = video[fg] / 255.0
    for name, points in (("xy", xy), ("rgb", rgb), ("xy+rgb", np.concatenate([xy, rgb], 1))):
        labels = np.zeros_like(true, dtype=np.int64)
        if len(points) >= k:
            points = points + 1e-6 * rng.standard_normal(points.shape)                   # k-means++ wants k different
            labels[fg] = kmeans2(points, k, minit="++", seed=seed, missing="warn")[1]
        out[f"k-means {name}"] = labels
    return out


# ------------------------------------------------------------------------------------------------ partitions of actions
def discover(pairs, most):
    """SD2 (ED2, arXiv 2112.02817): groups of action indices from pairs of act (N,m) and what it moved, change (N,n,3).

    Actions are alike when their effects are, the squared correlations with each body's motion summed over x y z (force
    along x and along y have no coordinate in common). The most related pair is merged while that is above chance, or
    while there are more than `most` groups. Actions that never vary join the last group."""
    def unit_variance(x):
        x = np.asarray(x, np.float64).reshape(len(x), -1)
        return (x - x.mean(0)) / np.where(x.std(0) > 1e-6, x.std(0), np.inf)

    moves = np.flatnonzero(unit_variance(pairs[0][0]).any(0))
    feature = sum(np.square(unit_variance(a).T @ unit_variance(d) / len(a)) for a, d in pairs)
    feature, m = feature.reshape(len(feature), -1, 3).sum(2)[moves], len(feature)
    unit = feature / np.maximum(np.linalg.norm(feature, axis=1, keepdims=True), 1e-12)
    sim, groups = unit @ unit.T, [[i] for i in range(len(moves))]

    def related(p, q):  # how much more alike p and q are than either is to everything but the other
        not_p, not_q = ([i for i in range(len(sim)) if i not in g] for g in (p, q))
        outside = sim[np.ix_(p, not_q)].sum() + sim[np.ix_(q, not_p)].sum()
        return sim[np.ix_(p, q)].mean() - outside / (len(p) * len(not_q) + len(q) * len(not_p))

    while len(groups) > 1:
        score, i, j = max((round(related(groups[i], groups[j]), 12), -i, -j)
                          for i in range(len(groups)) for j in range(i + 1, len(groups)))
        if score <= 0 and len(groups) <= most:
            break
        merged = groups[-i] + groups[-j]
        groups = [g for n, g in enumerate(groups) if n not in (-i, -j)] + [merged]
    groups = sorted(sorted(moves[g].tolist()) for g in groups)
    groups[-1] = sorted(groups[-1] + [i for i in range(m) if i not in moves])
    return groups


def check_partition(groups, act_dim, slots, where):
    """SystemExit unless each action is in exactly one group and a slot is left for the background."""
    try:
        flat = sorted(int(i) for g in groups for i in g)
    except (TypeError, ValueError):
        flat = None
    if flat != list(range(act_dim)) or not all(groups):
        missing = sorted(set(range(act_dim)) - set(flat or []))
        raise SystemExit(f"partition {where} has to hold each of the actions 0..{act_dim - 1} exactly once"
                         + (f", but it misses action {missing[0]}" if missing else "")
                         + ": expected a list of lists of indices like [[0, 1], [2]]")
    if len(groups) > slots - 1:
        raise SystemExit(f"partition {where} has {len(groups)} groups for {slots} slots, one of which is for the "
                         f"background: type --slots {len(groups) + 1} or merge groups")
    return [sorted(map(int, g)) for g in groups]


def choose_partition(name, clips, meta, slots, seed):
    """(groups, 0/1 masks (slots, m)) of --partition; groups is empty for none, and the true ones for global."""
    m = clips["actions"].shape[-1]
    masks = np.zeros((slots, m), np.float32)
    if name == "none":
        return [], masks
    if m == 0:
        raise SystemExit(f"--partition {name}, but {meta['recipe']['kind']} has no actions: use --data pushed, "
                         "humanoid, crowd or mocapact")
    if name == "global":
        return meta["groups"], np.ones_like(masks)
    if name in ("body", "random"):
        groups = meta["groups"]
        if name == "random":
            order = iter(np.random.default_rng(seed).permutation(m).tolist())
            groups = [[next(order) for _ in g] for g in groups]
    elif name == "discovered":
        train = clips["split"] == 0
        act, step = clips["actions"][train][:, 1:], np.diff(clips["state"][train].astype(np.float64), axis=1)
        pairs = [(act, step), (np.diff(act, axis=1), step[:, 1:])]          # forces cause motion, servos by changing
        groups = discover([(a.reshape(-1, m), d.reshape(-1, d.shape[-1] // 3, 3)) for a, d in pairs], slots - 1)
    else:
        try:
            groups = json.loads(Path(name).read_text())
            groups = groups["groups"] if isinstance(groups, dict) else groups
        except (OSError, ValueError, KeyError) as e:
            raise SystemExit(f"--partition {name} cannot be read ({e}): expected none, global, body, random, "
                             "discovered, or a JSON file like [[0, 1], [2]]")
    groups = check_partition(groups, m, slots, name)
    for j, g in enumerate(groups):
        masks[j, g] = 1
    return groups, masks


def slots_of_parts(groups, true_groups):
    """{part label: slot meant for it}: groups to parts by most shared actions, one to one; without groups slot i for
    part i + 1, which is what an arm with no actions gets compared on."""
    from scipy.optimize import linear_sum_assignment
    if not groups:
        return {i + 1: i for i in range(len(true_groups))}
    shared = np.array([[len(set(g) & set(p)) for p in true_groups] for g in groups], float)
    return {int(p) + 1: int(g) for g, p in zip(*linear_sum_assignment(-shared))}


# ------------------------------------------------------------------------------------------------------------ networks
def position_grid(h, w, waves=0):
    """(h*w, 4 + 4 waves): y, x, 1-y, 1-x of every cell in [0, 1], and sines and cosines of y and x."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    parts = [y, x, 1 - y, 1 - x]
    for k in range(waves):
        parts += [f(2**k * torch.pi * c) for f in (torch.sin, torch.cos) for c in (y, x)]
    return torch.stack(parts, -1).view(h * w, len(parts))


def flax_init(layer):
    """Weights of variance 1 / fan-in and no bias, as in the authors' JAX code; torch's default is a third of that."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        fan_in = layer.weight[0].numel() if not isinstance(layer, nn.ConvTranspose2d) else layer.weight[:, 0].numel()
        nn.init.normal_(layer.weight, std=fan_in ** -0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class SlotAttention(nn.Module):
    """Slots compete for the tokens of a frame (Locatello et al. 2020, Algorithm 1): slots (B,K,D), tokens (B,N,C) ->
    slots (B,K,D), attention (B,N,K), which sums to one over the slots."""

    def __init__(self, channels, dim, hidden=None):
        super().__init__()
        self.norm_tokens, self.norm_slots, self.norm_mlp = nn.LayerNorm(channels), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(i, dim, bias=False) for i in (dim, channels, channels))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden or 2 * dim), nn.ReLU(), nn.Linear(hidden or 2 * dim, dim))

    def forward(self, slots, tokens, iters=1):
        B, K, D = slots.shape
        tokens = self.norm_tokens(tokens)
        k, v = self.k(tokens), self.v(tokens)                                            # (B,N,D)
        for _ in range(iters):
            q = self.q(self.norm_slots(slots)) * D ** -0.5
            attention = (k @ q.mT).softmax(-1)                                           # (B,N,K), over SLOTS
            weight = attention / (attention.sum(1, keepdim=True) + 1e-8)                 # then a mean over tokens
            slots = self.gru((weight.mT @ v).view(B * K, D), slots.reshape(B * K, D)).view(B, K, D)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attention


class Encoder(nn.Module):
    """Frames (n,3,H,W) -> tokens (n,N,C): convolutions, plus a learned map of the position, then an MLP per token."""

    def __init__(self, size, channels):
        super().__init__()
        strides = {32: (2, 1, 1), 64: (1, 1, 1, 1), 128: (2, 1, 1, 1)}[size]
        layers, c = [], 3
        for s in strides:
            layers += [nn.Conv2d(c, channels, 5, s, 2), nn.ReLU()]
            c = channels
        side = size // strides[0]
        self.conv, self.position = nn.Sequential(*layers), nn.Linear(4, c)
        self.mlp = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 64), nn.ReLU(), nn.Linear(64, c))
        self.register_buffer("grid", position_grid(side, side), persistent=False)

    def forward(self, frames):
        x = self.conv(4 * frames - 2)                                                # colours of about unit variance
        return self.mlp(x.flatten(2).mT + self.position(self.grid))


class Decoder(nn.Module):
    """Spatial broadcast (Watters et al. 2019): one slot on every cell, plus its position; (n,D) -> (n,C,H,W).

    conv: 8x8 cells, four transposed 5x5 convolutions (SAVi App. B); mlp: cells of 2x2 pixels and a small MLP."""

    def __init__(self, kind, size, dim, out, hidden=64):
        super().__init__()
        self.kind, self.side = kind, 8 if kind == "conv" else size // 2
        # sines, because the MLP sees one cell at a time and cannot make edges out of its neighbours
        self.register_buffer("grid", position_grid(self.side, self.side, 0 if kind == "conv" else 4), persistent=False)
        if kind == "conv":
            self.position = nn.Linear(4, dim)
            layers, c = [], dim
            for s in {32: (2, 2, 1, 1), 64: (2, 2, 2, 1), 128: (2, 2, 2, 2)}[size]:
                layers += [nn.ConvTranspose2d(c, hidden, 5, s, 2, s - 1), nn.ReLU()]
                c = hidden
            self.net = nn.Sequential(*layers, nn.Conv2d(hidden, out, 1))
        else:
            # The first layer is linear in slot + position: both halves are computed once, not once per cell and slot.
            self.slot, self.position = nn.Linear(dim, hidden), nn.Linear(20, hidden, bias=False)
            self.net = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
                                     nn.ReLU(), nn.Linear(hidden, 4 * out))

    def forward(self, slots):
        n, side = len(slots), self.side
        if self.kind == "conv":
            x = slots[:, None] + self.position(self.grid)                                # (n, 64, D)
            return self.net(x.mT.reshape(n, -1, side, side))
        x = self.net(self.slot(slots)[:, None] + self.position(self.grid))               # (n, side*side, 4*out)
        return F.pixel_shuffle(x.mT.reshape(n, -1, side, side), 2)


class Predictor(nn.Module):
    """Slots (B,K,D) of this frame -> first guess for the next. effects (B,K,D): what each slot's actions do, or None.

    transformer: SAVi's post-norm block across slots; mlp: residual MLP per slot; action: the same with the effects."""

    def __init__(self, kind, dim, interact=False):
        super().__init__()
        self.kind, self.interact = kind, interact
        if kind == "transformer" or interact:
            self.block = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        if kind != "transformer":
            i = dim * (2 if kind == "action" else 1)
            self.mlp = nn.Sequential(nn.LayerNorm(i), nn.Linear(i, 256), nn.ReLU(), nn.Linear(256, dim))

    def forward(self, slots, effects=None):
        if self.kind == "transformer":
            return self.block(slots)
        x = slots if effects is None else torch.cat([slots, effects], -1)
        slots = slots + self.mlp(x)
        return self.block(slots) if self.interact else slots


class SAVi(nn.Module):
    """video (T,B,3,H,W), act (T,B,m), cue (B,K,3), noise (T+1,B,K,D) -> predicted and corrected slots (T,B,K,D), KL.

    masks (K,m): which actions a slot sees; act[t] was active until frame t. cue: centre of each slot's part in frame 0
    (y, x in [0,1], 1 if there is one). The first prediction is the initial slots."""

    def __init__(self, size, slots, dim, channels, masks, init, predictor, decoder, out=3, interact=False,
                 stochastic=False, iters=(2, 1)):
        super().__init__()
        self.init, self.iters, self.stochastic = init, iters, stochastic
        self.encoder, self.attention = Encoder(size, channels), SlotAttention(channels, dim)
        self.predictor, self.decoder = Predictor(predictor, dim, interact), Decoder(decoder, size, dim, out + 1)
        self.first = nn.Parameter(torch.randn(1 if init == "gauss" else slots, dim))
        if init == "gauss":
            self.log_std = nn.Parameter(torch.zeros(1, dim))
        if init == "com":
            self.cue = nn.Sequential(nn.Linear(3, 256), nn.ReLU(), nn.Linear(256, dim))
        self.uses_actions = "action" in (init, predictor)
        if self.uses_actions:
            self.register_buffer("masks", torch.as_tensor(masks))
            self.effect = nn.Sequential(nn.Linear(2 * masks.shape[1], 128), nn.ReLU(), nn.Linear(128, dim))
        if stochastic:
            self.spread = nn.Linear(dim, 2 * dim)
        self.apply(flax_init)
        if stochastic:  # at variance 1 the noise of 12 frames grew until it was not finite
            nn.init.constant_(self.spread.bias[dim:], math.log(0.01))

    def effects(self, act):
        """c_j = W2 relu(W1 [M_j * a; M_j]): what slot j may know of the actions act (B,m)."""
        if not self.uses_actions:
            return None
        M = self.masks.expand(len(act), -1, -1)
        return self.effect(torch.cat([M * act[:, None], M], -1))

    def initial(self, act, cue, noise):
        if self.init == "gauss":
            return self.first + self.log_std.exp() * noise
        if self.init == "com":
            return self.cue(cue)
        slots = self.first.expand(len(act), -1, -1)
        return slots + self.effects(act) if self.init == "action" else slots

    def predict(self, slots, act):
        return self.predictor(slots, self.effects(act) if self.predictor.kind == "action" else None)

    def sample(self, slots, noise):
        """StoSAVi: sampled slots, KL to a Gaussian with the same mean and variance 0.01."""
        mean, log_var = self.spread(slots).chunk(2, -1)
        kl = 0.5 * (math.log(0.01) - log_var + log_var.exp() / 0.01 - 1).sum(-1).mean()
        return mean + (0.5 * log_var).exp() * noise, kl

    def forward(self, video, act, cue=None, noise=None):
        tokens = self.encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2])         # (T,B,N,C), all frames at once
        slots = self.initial(act[0], cue, None if noise is None else noise[-1])
        before, after, kl = [], [], video.new_zeros(())
        for t in range(len(video)):
            if t:
                slots = self.predict(slots, act[t])
            if self.stochastic:
                slots, extra = self.sample(slots, noise[t])
                kl = kl + extra / len(video)
            before.append(slots)
            slots, _ = self.attention(slots, tokens[t], self.iters[t > 0])
            after.append(slots)
        return torch.stack(before), torch.stack(after), kl

    def decode(self, slots):
        """slots (..,K,D) -> picture (..,C,H,W), alpha (..,K,H,W), each slot's own picture (..,K,C,H,W).

        All slots of all frames are one batch; a loop over slots gives the same numbers."""
        x = self.decoder(slots.flatten(0, -2)).unflatten(0, slots.shape[:-1])
        each, alpha = x[..., :-1, :, :], x[..., -1, :, :].softmax(-3)
        return (alpha.unsqueeze(-3) * each).sum(-4), alpha, each


# --------------------------------------------------------------------------------------------------- losses and updates
def savi_loss(model, video, target, act, cue, noise, pred_weight, kl_weight):
    """Mean squared error of the decoded corrected slots, of the predicted ones after frame 0, and StoSAVi's KL."""
    before, after, kl = model(video, act, cue, noise)
    T = len(video)
    slots = torch.cat([after, before[1:]]) if pred_weight else after
    picture = model.decode(slots)[0]
    recon = F.mse_loss(picture[:T], target)
    pred = F.mse_loss(picture[T:], target[1:]) if pred_weight else torch.zeros_like(recon)
    loss = recon + pred_weight * pred + kl_weight * kl
    return loss, {"loss": loss.detach(), "recon": recon.detach(), "pred": pred.detach(), "kl": kl.detach()}


def rate(step, total, lr, warmup):
    """Linear warm-up from 0, cosine to 0 at the last update."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def check_finite(step, terms):
    """The terms as floats; SystemExit if one is not finite."""
    numbers = {k: float(v) for k, v in terms.items()}
    if not np.isfinite(list(numbers.values())).all():
        raise SystemExit(f"update {step} is not finite: {numbers}; the last checkpoint is older: try a smaller --lr")
    return numbers


def compiler(enabled):
    """f -> f, or its compiled form; shapes are fixed."""
    return (lambda f: torch.compile(f, dynamic=False)) if enabled else (lambda f: f)


def make_model(args, clips, meta, seed):
    """(network, groups of actions) that the flags describe, with weights from this seed."""
    groups, masks = choose_partition(args.partition, clips, meta, args.slots, seed)
    torch.manual_seed(seed)
    channels = 64 if args.size == 128 else 32
    model = SAVi(args.size, args.slots, args.dim, channels, masks, args.init, args.predictor, args.decoder,
                 3 if args.target == "rgb" else 2, args.interact, args.noise > 0, (args.iters_first, args.iters_next))
    return model, groups


class Clips:
    """Clips on the device; window() cuts sequences out of them, time first."""

    def __init__(self, clips, chosen, args):
        self.args, self.device = args, torch.device(args.device)

        def move(name):
            return torch.as_tensor(clips[name][chosen]).to(self.device)

        self.video, self.act = move("video"), move("actions")
        self.flow = move("flow") if args.target == "flow" else None
        self.cue = None
        if args.init == "com":
            self.cue = torch.as_tensor(centres(truth(clips)[chosen], args.slots)).to(self.device)

    def window(self, clip, start, T):
        """clip, start (B,) -> video (T,B,3,H,W), target (T,B,C,H,W), act (T,B,m), cue (B,K,3) or None."""
        t = start[None] + torch.arange(T, device=self.device)[:, None]
        video = self.video[clip[None], t].permute(0, 1, 4, 2, 3).float() / 255
        target = video
        if self.flow is not None:  # 4 pixels per frame are far
            target = (self.flow[clip[None], t].permute(0, 1, 4, 2, 3).float() / 4).clamp(-1, 1)
        return video, target, self.act[clip[None], t], None if self.cue is None else self.cue[clip, start]

    def noise(self, generator, T, B):
        a = self.args
        if a.init == "gauss" or a.noise:
            return torch.randn(T + 1, B, a.slots, a.dim, generator=generator, device=generator.device).to(self.device)


def truth(clips):
    """The masks that slots are compared with: bodies in a crowd, else objects or parts."""
    return clips.get("inst", clips["seg"])


def centres(masks, slots):
    """(N,T,K,3): y and x in [0,1] of the centre of part j+1, and 1 if it is there; zeros for slots without part."""
    out, (H, W) = np.zeros((*masks.shape[:2], slots, 3), np.float32), masks.shape[2:]
    y, x = (np.arange(H) + 0.5) / H, (np.arange(W) + 0.5) / W
    for j in range(slots):
        m = masks == j + 1
        n = m.sum((2, 3))
        there = n > 0
        out[..., j, :] = np.stack([(m.sum(3) @ y) / np.maximum(n, 1), (m.sum(2) @ x) / np.maximum(n, 1), there], -1)
    return out


def train(model, data, args, seed, store, watch, log):
    """Train from where `store` left off to --updates or --until; returns the curve [(update, recon, FG-ARI)].

    Batches depend on the seed and the number of the update alone, so a resumed run sees the same ones.
    store: (save(state), load() -> state or None); watch(model) -> {metric: float}; log(update, numbers)."""
    save, load = store
    opt = torch.optim.Adam(model.parameters(), args.lr)
    loss_of, warmup = compiler(args.compile)(savi_loss), max(1, round(0.07 * args.updates))
    step, curve, state = 0, [], load()
    if state:
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step, curve = state["step"], state["curve"]
    N, L = data.video.shape[:2]
    every = max(10, args.updates // 30)
    end, began, first = min(args.updates, args.until or args.updates), time.time(), step
    while step < end:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        clip = torch.randint(N, (args.batch,), generator=generator).to(data.device)
        start = torch.randint(L - args.frames + 1, (args.batch,), generator=generator).to(data.device)
        noise = data.noise(generator, args.frames, args.batch)
        for group in opt.param_groups:
            group["lr"] = rate(step, args.updates, args.lr, warmup)
        loss, terms = loss_of(model, *data.window(clip, start, args.frames), noise, args.pred_weight, args.noise)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        terms["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        opt.step()
        step += 1
        if step % every == 0 or step == end:
            numbers = check_finite(step, terms)
            speed = (step - first) / (time.time() - began)
            seen = watch(model)
            curve.append([step, numbers["recon"], seen["fg_ari"]])
            log(step, {f"losses/{k}": v for k, v in numbers.items()} | {f"eval/{k}": v for k, v in seen.items()}
                | {"charts/UPS": speed, "charts/lr": opt.param_groups[0]["lr"]}, (end - step) / speed / 60)
            save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step, "curve": curve,
                  "args": asdict(args)})
    return curve


# ---------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def see(model, data, clips):
    """What the model makes of whole clips (indices): numpy arrays, batch first: alpha (B,T,K,H,W), picture, target and
    predicted (B,T-1,..) (B,T,C,H,W), each (B,T,K,C,H,W)."""
    clip = torch.as_tensor(clips, device=data.device)
    T, B = data.video.shape[1], len(clip)
    video, target, act, cue = data.window(clip, torch.zeros_like(clip), T)
    noise = data.noise(torch.Generator().manual_seed(0), T, B)
    before, after, _ = model(video, act, cue, noise)
    picture, alpha, each = model.decode(after)
    out = dict(alpha=alpha, picture=picture, each=each, target=target, video=video,
               predicted=model.decode(before[1:])[0])
    return {k: v.transpose(0, 1).cpu().numpy() for k, v in out.items()}


def scores(true, pred):
    """All scores of one clip's label maps (T,H,W)."""
    frames = [fg_ari(g, p) for g, p in zip(true, pred) if (g > 0).any()]
    return {"fg_ari": fg_ari(true, pred), "fg_ari_frame": float(np.mean(frames)) if frames else 1.0,
            "ari": ari(true, pred), **segment_scores(true, pred), "consistency": consistency(true, pred)}


def psnr(a, b):
    return -10 * math.log10(max(float(np.square(a - b, dtype=np.float64).mean()), 1e-12))


def mean_of(rows):
    return {k: np.mean([r[k] for r in rows], 0) for k in rows[0]}


@torch.no_grad()
def counterfactual(model, data, clips, chosen, slot_of_part):
    """Does another command of group g change the pixels that it should, and in the slot that was meant for it?

    Both futures start from the slots at frame T//2 and are predicted open loop. locality: share of the predicted change
    that lies where the true pictures differ by more than 0.05; slot_share: of the change, in the designated slot."""
    T = data.video.shape[1]
    fork, index = T // 2, torch.as_tensor(chosen, device=data.device)
    video, _, act, cue = data.window(index, torch.zeros_like(index), T)
    noise = data.noise(torch.Generator().manual_seed(0), T, len(chosen))
    now = model(video[:fork + 1], act[:fork + 1], cue, noise)[1][-1]
    other = torch.as_tensor(clips["fork_actions"][chosen]).to(data.device).transpose(0, 1)
    drawn = []
    for commands in (act[fork + 1:fork + 1 + FORK_STEPS], other):
        slots = now
        for a in commands:
            slots = model.predict(slots, a)
            slots = model.sample(slots, 0)[0] if model.stochastic else slots
        picture, alpha, each = model.decode(slots)
        drawn.append((picture, alpha.unsqueeze(2) * each))
    change = (drawn[0][0] - drawn[1][0]).abs().sum(1).double().cpu().numpy()                     # (B,H,W)
    by_slot = (drawn[0][1] - drawn[1][1]).abs().sum((2, 3, 4)).double().cpu().numpy()            # (B,K)
    real = video[fork + FORK_STEPS].permute(0, 2, 3, 1).cpu().numpy() - clips["fork_frame"][chosen] / 255.0
    where = np.abs(real).max(-1) > 0.05
    meant = np.array([slot_of_part.get(int(g) + 1, 0) for g in clips["fork_group"][chosen]])
    keep = where.any((1, 2))  # a command of inert actions changes nothing
    total, local = change.sum((1, 2)), (change * where).sum((1, 2))
    share = by_slot[np.arange(len(meant)), meant] / np.maximum(by_slot.sum(1), 1e-9)
    return [{"locality": lo / max(t, 1e-9), "slot_share": s, "area": w.mean()}
            for lo, t, s, w in zip(local[keep], total[keep], share[keep], where[keep])]


EVAL_CLIPS = 60  # of the test split at most; their mean has a standard error of about 0.02


def evaluate(model, data, clips, groups, meta, batch=12):
    """Mean scores over the clips of `data` (arrays `clips` in the same order), whole clips, frame by frame."""
    true = truth(clips)
    slot_of_part = slots_of_parts(groups, meta["groups"])
    rows, futures = [], []
    for a in range(0, len(true), batch):
        chosen = np.arange(a, min(a + batch, len(true)))
        x = see(model, data, chosen)
        for b, i in enumerate(chosen):
            hard = x["alpha"][b].argmax(1)
            row = scores(true[i], hard) | usage(true[i], x["alpha"][b]) | {
                "mse": np.square(x["picture"][b] - x["target"][b], dtype=np.float64).mean(),
                "psnr": psnr(x["picture"][b], x["target"][b]), "pred_psnr": psnr(x["predicted"][b], x["target"][b, 1:]),
                "copy_psnr": psnr(x["target"][b, :-1], x["target"][b, 1:])}
            if meta["groups"]:
                row["designated"] = designated_iou(true[i], hard, slot_of_part)
            if "inst" in clips:
                row["fg_ari_parts"] = fg_ari(clips["seg"][i], hard)
            rows.append(row)
        if model.predictor.kind == "action" and data.flow is None and (clips.get("fork_group", [-1])[0] >= 0):
            futures += counterfactual(model, data, clips, chosen, slot_of_part)
    out = mean_of(rows) | (mean_of(futures) if futures else {})
    return {k: v.tolist() if np.ndim(v) else float(v) for k, v in out.items()}


def evaluate_baselines(clips, meta):
    """{baseline: scores} on the same clips; grids get the best fixed cell of each part as its designated one."""
    from scipy.optimize import linear_sum_assignment
    true, rows, tables = truth(clips), {}, {}
    P = int(true.max())
    for g, v in zip(true, clips["video"]):
        for name, pred in baseline_masks(g, v).items():
            rows.setdefault(name, []).append(scores(g, pred))
            if name.startswith("grid"):
                labels, table = iou_table(g, pred)
                full = np.full((P + 1, table.shape[1]), np.nan)
                full[labels] = table
                tables.setdefault(name, []).append(full[1:])
    out = {name: {k: float(v) for k, v in mean_of(r).items()} for name, r in rows.items()}
    if meta["groups"]:
        for name, t in tables.items():
            mean = np.nan_to_num(np.nanmean(t, 0))
            out[name]["designated"] = float(mean[linear_sum_assignment(-mean)].mean())
    return out


def best_grid(baselines, metric):
    return max(v[metric] for name, v in baselines.items() if name.startswith("grid") and metric in v)


# ------------------------------------------------------------------------------------------------------------- figures
def hues(n):
    """(n,3) colours by slot index, fixed over time."""
    from matplotlib.colors import hsv_to_rgb
    return np.array([hsv_to_rgb((j / n, 0.75 if j % 2 else 1.0, 1.0 if j % 2 else 0.85)) for j in range(n)])


def as_rgb(x):
    """(C,H,W) -> (H,W,3) in [0,1]; flow as red (right) and green (down) around grey."""
    x = x.transpose(1, 2, 0)
    if x.shape[-1] == 2:
        x = np.concatenate([x / 2 + 0.5, np.full_like(x[..., :1], 0.5)], -1)
    return x.clip(0, 1)


def strip(x, b, t):
    """One row of tiles of clip b, frame t: input, reconstruction, segmentation, slots on white."""
    K = x["alpha"].shape[2]
    tiles = [as_rgb(x["video"][b, t]), as_rgb(x["picture"][b, t]), hues(K)[x["alpha"][b, t].argmax(0)]]
    for j in range(K):
        a = x["alpha"][b, t, j][..., None]
        tiles.append(as_rgb(x["each"][b, t, j]) * a + (1 - a))
    return tiles


def mosaic(rows, gap=2, zoom=3):
    """uint8 picture of equal tiles, rows of lists of (H,W,3) in [0,1], pixels enlarged, white gaps, even sides."""
    H, W = rows[0][0].shape[:2]
    H, W = H * zoom + gap * 2, W * zoom + gap * 2
    canvas = np.ones((H * len(rows), W * len(rows[0]), 3))
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            canvas[r * H + gap:(r + 1) * H - gap, c * W + gap:(c + 1) * W - gap] = tile.repeat(zoom, 0).repeat(zoom, 1)
    return (canvas * 255).round().astype(np.uint8)


def label_mosaic(picture, rows, columns, path, title=""):
    """Save the picture with names of rows and columns around it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    h, w = picture.shape[0] / 100, picture.shape[1] / 100
    left, top = 0.25 + 0.075 * max(map(len, rows)), 0.35 + 0.3 * bool(title)
    fig = plt.figure(figsize=(w + left, h + top))
    ax = fig.add_axes((left / (w + left), 0, w / (w + left), h / (h + top)))
    ax.imshow(picture, aspect="auto", interpolation="nearest")
    ax.set_xticks((np.arange(len(columns)) + 0.5) * picture.shape[1] / len(columns), columns, fontsize=8)
    ax.set_yticks((np.arange(len(rows)) + 0.5) * picture.shape[0] / len(rows), rows, fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if title:
        fig.text(0.5, 1 - 0.18 / (h + top), title, ha="center", va="center", fontsize=9)
    fig.savefig(path, dpi=200)
    plt.close(fig)


def five_clips(clips, meta):
    """Five clips to draw, of five families of motion where there are such, test ones first, and their names."""
    order = np.argsort(np.where(clips["split"] == 1, 0, 1), kind="stable")
    tasks = clips["task"][order]
    firsts = order[np.sort(np.unique(tasks, return_index=True)[1])]
    chosen = firsts if len(firsts) >= 5 else np.concatenate([firsts, np.setdiff1d(order, firsts, True)])
    names = [meta["task_names"][clips["task"][i]] if len(firsts) > 1 else f"clip {i}" for i in chosen[:5]]
    return chosen[:5], [n + " (test)" * bool(clips["split"][i] == 1) for n, i in zip(names, chosen)]


def draw(model, clips, meta, args, folder):
    """slots.png (five clips: input, reconstruction, masks, slots), time.png (masks over time), slots.gif and .mp4,
    usage.png (who draws the foreground)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    chosen, names = five_clips(clips, meta)
    x, true, K = see(model, Clips(clips, chosen, args), np.arange(len(chosen))), truth(clips)[chosen], args.slots
    zoom, T = max(1, 128 // args.size), true.shape[1]
    columns = ["input", "recon", "masks", *(f"slot {j + 1}" for j in range(K))]
    label_mosaic(mosaic([strip(x, b, T // 2) for b in range(len(chosen))], zoom=zoom), names, columns,
                 folder / "slots.png")
    times = np.linspace(0, T - 1, min(8, T)).round().astype(int)
    colors, parts = hues(K), np.concatenate([np.zeros((1, 3)), hues(max(int(true.max()), 1))])
    rows = [[as_rgb(x["video"][0, t]) for t in times], [as_rgb(x["picture"][0, t]) for t in times],
            [parts[true[0, t]] for t in times], [colors[x["alpha"][0, t].argmax(0)] for t in times]]
    rows += [[x["alpha"][0, t, j][..., None].repeat(3, -1) for t in times] for j in range(K)]
    label_mosaic(mosaic(rows, zoom=zoom), ["input", "recon", "true", "masks", *columns[3:]],
                 [f"frame {t}" for t in times], folder / "time.png", names[0])
    if args.capture_video:
        import imageio.v2 as imageio
        movie = [mosaic([strip(x, b, t) for b in range(len(chosen))], zoom=zoom // 2 or 1) for t in range(T)]
        imageio.mimwrite(folder / "slots.gif", movie, duration=125, loop=0)
        imageio.mimwrite(folder / "slots.mp4", movie * 3, fps=8, macro_block_size=1)
    use = [usage(g, a) for g, a in zip(true, x["alpha"])]
    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    for b, u in enumerate(use):
        ax.bar(np.arange(K) + (b - 2) * 0.16, u["share"], 0.15, label=f"{names[b]}: top-1 {u['top1']:.2f}, "
               f"effective {u['eff']:.1f}")
    ax.set(xticks=range(K), xticklabels=columns[3:], ylabel="share of the foreground", ylim=(0, 1))
    ax.legend(fontsize=7)
    fig.savefig(folder / "usage.png", dpi=150)
    plt.close(fig)


# --------------------------------------------------------------------------------------------------------------- cells
def load_clips(args):
    """(arrays, meta) of the data set of the flags, rendered first if need be."""
    name = f"{args.data}-{args.color}-{args.floor}-{args.size}px"
    if args.data == "mocapact":
        folder = Path(args.cache) / f"{name}-{args.clip_frames}f"
        render_mocapact(args.mocapact_dir, folder, args.clip_frames, args.size, color=args.color, floor=args.floor,
                        workers=args.workers)
    else:
        folder = Path(args.cache) / f"{name}-{args.clips}x{args.clip_frames}"
        make_video(folder, args.data, args.clips, args.clip_frames, args.size, args.color, args.floor, 0, args.workers)
    return open_video(folder)


def pick(clips, split, most=None):
    """The clips of one split, at most so many, evenly over the list (families alternate)."""
    chosen = np.flatnonzero(clips["split"] == split)
    if not len(chosen):
        raise SystemExit(f"no clip in split {split} (0 train, 1 test, 2 validation) of {len(clips['split'])}: make "
                         "more clips, --clips 10 at least")
    return chosen[np.linspace(0, len(chosen) - 1, min(most or len(chosen), len(chosen))).round().astype(int)]


def run_cell(cell, args, root, run=None):
    """Train and test one network, cell = {name, seed, flags}: its scores, also in root/cells/<name>.json.

    A cell that is there is not run again, one that was killed goes on from its checkpoint. run: log and save there."""
    file = Path(root) / "cells" / f"{cell['name']}.json"
    if file.exists():
        return json.loads(file.read_text())
    file.parent.mkdir(exist_ok=True)
    torch.set_num_threads(args.threads)
    keep_memory()
    args, began = replace(args, **cell["flags"]), time.time()
    clips, meta = load_clips(args)
    model, groups = make_model(args, clips, meta, cell["seed"])
    model = model.to(args.device)
    if groups:
        write_text(file.with_suffix(".partition.json"), json.dumps({"groups": groups, "names": meta["action_names"]}))
    if args.checkpoint:
        model.load_state_dict(read_checkpoint(args.checkpoint)["model"])
    train_data, val = Clips(clips, pick(clips, 0), args), pick(clips, 2, 24)
    val_data, val_true = Clips(clips, val, args), truth(clips)[val]
    weights = file.with_suffix(".pt")
    if run:
        def load():
            return run.load(device=args.device) if args.resume and (run.dir / "checkpoint.pt").exists() else None
        store = run.save, load
    else:
        store = (lambda state: save_atomic(state, weights),
                 lambda: torch.load(weights, args.device, weights_only=True) if weights.exists() else None)

    def watch(model):
        x = see(model, val_data, np.arange(len(val)))["alpha"]
        return {"fg_ari": float(np.mean([fg_ari(g, a.argmax(1)) for g, a in zip(val_true, x)]))}

    def log(step, numbers, left):
        if run:
            run.log(step, numbers)
            print(f"update {step:,}: reconstruction {numbers['losses/recon']:.5f}, FG-ARI {numbers['eval/fg_ari']:.3f} "
                  f"on validation, {numbers['charts/UPS']:.1f} updates/s | {left:.1f} min left", flush=True)

    curve = [] if args.eval_only else train(model, train_data, args, cell["seed"], store, watch, log)
    trained = time.time() - began
    test = pick(clips, 1, EVAL_CLIPS)
    chosen = {k: v[test] for k, v in clips.items()}
    result = {**cell, "scores": evaluate(model, Clips(clips, test, args), chosen, groups, meta), "curve": curve,
              "groups": groups, "parameters": sum(p.numel() for p in model.parameters()), "clips": len(test)}
    if cell.get("draw"):
        draw(model, clips, meta, args, Path(root))
    result |= {"train_seconds": round(trained, 1), "seconds": round(time.time() - began, 1)}
    if args.until is None or args.until >= args.updates:
        write_text(file, json.dumps(result))
    return result


def run_cells(cells, args, root):
    """All cells, on a CPU as --workers processes side by side; progress and time left as they finish."""
    done, began = [], time.time()

    def note(result):
        done.append(result)
        side = min(args.workers, len(cells)) if args.device == "cpu" else 1
        left = (len(cells) - len(done)) * sum(r["seconds"] for r in done) / len(done) / side
        s = result["scores"]
        print(f"{len(done)}/{len(cells)} {result['name']}: {result['seconds']:.0f} s, FG-ARI {s['fg_ari']:.3f}, top-1 "
              f"{s['top1']:.2f}, effective slots {s['eff']:.1f}, PSNR {s['psnr']:.1f} | {left / 60:.0f} min left",
              flush=True)

    if args.device != "cpu" or args.workers == 1:
        for cell in cells:
            note(run_cell(cell, args, root))
    else:
        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            jobs = [pool.submit(run_cell, cell, args, root) for cell in cells]
            try:
                for job in as_completed(jobs):
                    note(job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)  # not after hours of other cells
                raise
    print(f"{len(cells)} trainings in {(time.time() - began) / 60:.1f} min")
    order = [c["name"] for c in cells]
    return sorted(done, key=lambda r: order.index(r["name"]))


# ------------------------------------------------------------------------------------------------------------- studies
def spread(values):
    """(mean, low, high): 95 % bootstrap interval of the mean over seeds."""
    low, high = bootstrap_ci(np.asarray(values, float)[:, None], np.mean)
    return float(np.mean(values)), low, high


def show(cells, metrics):
    """'mean [low, high]' of each metric over cells."""
    out = []
    for k in metrics:
        values = [c["scores"][k] for c in cells if k in c["scores"]]
        if not values:
            out.append(f"{'':>20}")
        elif len(values) == 1:
            out.append(f"{values[0]:>20.3f}")
        else:
            out.append("{:>6.3f} [{:.3f}, {:.3f}]".format(*spread(values)).rjust(20))
    return "".join(out)


def print_baselines(baselines, metrics, width=30):
    for name, row in baselines.items():
        print(f"{name:<{width}}" + "".join(f"{row[k]:>20.3f}" if k in row else f"{'':>20}" for k in metrics))


def baselines_of(args):
    clips, meta = load_clips(args)
    test = pick(clips, 1, EVAL_CLIPS)
    return evaluate_baselines({k: v[test] for k, v in clips.items()}, meta)


def single(args, run):
    """Train (or only measure) --seeds networks on one data set; table beside the trivial baselines."""
    baselines = baselines_of(args)
    seeds = range(args.seed, args.seed + args.seeds)
    cells = [dict(name=f"seed{s}", seed=s, flags={}, draw=s == args.seed) for s in seeds]
    done = [run_cell(cells[0], args, run.dir, run)] if args.seeds == 1 else run_cells(cells, args, run.dir)
    metrics = ["fg_ari", "fg_ari_frame", "ari", "miou", "mbo", "consistency"]
    metrics += ["designated"] * ("designated" in done[0]["scores"])
    names = dict(fg_ari="FG-ARI", fg_ari_frame="per frame", ari="ARI", miou="mIoU", mbo="mBO",
                 consistency="consistency", designated="designated IoU")
    print(f"\n{args.data} ({args.color}), {done[0]['clips']} test clips of {args.clip_frames} frames, {len(done)} seed"
          + f"{'s, mean [95 % interval]' if len(done) > 1 else ''}\n{'':<30}"
          + "".join(f"{names[k]:>20}" for k in metrics))
    print_baselines(baselines, metrics)
    print(f"{'SAVi, ' + str(args.slots) + ' slots':<30}" + show(done, metrics))
    more = [k for k in ("top1", "eff", "conf", "whole", "psnr", "pred_psnr", "copy_psnr", "fg_ari_parts", "locality",
                        "slot_share", "area") if k in done[0]["scores"]]
    print("\n" + "\n".join(f"{WORDS[k]:<60}{show(done, [k])}" for k in more))
    beaten = max(v["fg_ari"] for v in baselines.values())
    print(f"\nbest trivial baseline: FG-ARI {beaten:.3f}; published: SAVi-S 0.92 on MOVi-A with boxes given in frame 0")
    return dict(baselines=baselines, cells=done)


WORDS = dict(top1="top-1 share of the foreground in one slot (monopoly: 1)", psnr="PSNR, corrected slots",
             eff="effective number of slots (exp of entropy)", conf="confidence (mean largest alpha)",
             whole="whole-foreground IoU of the best slot",
             pred_psnr="PSNR, slots predicted one frame ahead", copy_psnr="PSNR of showing the last frame again",
             fg_ari_parts="FG-ARI against parts instead of bodies", locality="counterfactual locality",
             slot_share="share of that change in the designated slot",
             area="area of the true change (locality by chance)")

# arm: (name, flags). Same slots, size, decoder, data order and updates; A1-A4 have the same parameters.
_AC = dict(init="action", predictor="action", pred_weight=1.0)
ARMS = {"A0": ("SAVi as published", dict(init="learned", predictor="transformer", partition="none", pred_weight=0.0)),
        "A1": ("no actions", _AC | dict(partition="none")),
        "A2": ("all actions to all slots", _AC | dict(partition="global")),
        "A3": ("random groups", _AC | dict(partition="random")),
        "A4": ("groups of actions", _AC | dict(partition="body")),
        "A5": ("A1, true centres in frame 0", _AC | dict(partition="none", init="com")),
        "A6": ("A1, flow target", _AC | dict(partition="none", target="flow"))}


def action_verdict(by_arm, baselines):
    """The rule, fixed before any run: with at least 5 seeds, A4's 95 % intervals of part FG-ARI and of designated IoU
    both lie above those of A1, A2 and A3 and above the best grid; anything else is no benefit."""
    for metric in ("fg_ari", "designated"):
        low = spread([c["scores"][metric] for c in by_arm["A4"]])[1]
        rivals = [spread([c["scores"][metric] for c in by_arm[a]])[2] for a in ("A1", "A2", "A3")]
        if low <= max(*rivals, best_grid(baselines, metric)):
            return "no benefit"
    return "benefit" if min(map(len, by_arm.values())) >= 5 else "none: fewer than 5 seeds"


def action_study(args, run):
    """Do slots that see one group of actions each find the parts that these actions move?"""
    baselines = baselines_of(args)
    chosen = {} if args.partition in ("none", "body") else {"partition": args.partition}    # A4 with another partition
    cells = [dict(name=f"{arm}-seed{s}", seed=s, flags=flags | (chosen if arm == "A4" else {}))
             for s in range(args.seed, args.seed + args.seeds) for arm, (_, flags) in ARMS.items()]
    done = run_cells(cells, args, run.dir)
    by_arm = {arm: [c for c in done if c["name"].startswith(arm)] for arm in ARMS}
    metrics = ["fg_ari", "designated", "top1", "pred_psnr", "locality", "slot_share"]
    print(f"\n{args.data} ({args.color}), {args.seeds} seeds, mean [95 % interval]\n{'':<30}"
          + "".join(f"{x:>20}" for x in ("FG-ARI", "designated IoU", "top-1", "predicted PSNR", "locality",
                                         "slot share")))
    print_baselines({k: v for k, v in baselines.items() if k.startswith(("grid", "k-means"))}, metrics)
    for arm, (name, _) in ARMS.items():
        print(f"{arm + ' ' + name:<30}" + show(by_arm[arm], metrics))
    verdict = action_verdict(by_arm, baselines)
    print(f"\nverdict by the rule fixed in advance (A4 above A1-A3 and the best grid, intervals apart): {verdict}")
    return dict(baselines=baselines, cells=done, verdict=verdict)


def slots_study(args, run, counts=(3, 5, 7, 9, 11), colors=("default", "parts")):
    """The seed study's finding: does one slot take the whole body, for every number of slots and colour?"""
    baselines = {color: baselines_of(replace(args, color=color)) for color in colors}
    cells = [dict(name=f"{color}-K{K}-seed{s}", seed=s, flags=dict(slots=K, color=color))
             for s in range(args.seed, args.seed + args.seeds) for color in colors for K in counts]
    done = run_cells(cells, args, run.dir)
    metrics = ["top1", "whole", "eff", "conf", "fg_ari", "psnr"]
    print(f"\n{args.data}, {args.seeds} seed{'s, mean [95 % interval]' if args.seeds > 1 else ''}; a monopoly has "
          f"top-1 and whole-body IoU near 1, a smear has K effective slots and confidence 1/K\n{'':<30}"
          + "".join(f"{x:>20}" for x in ("top-1", "whole-body IoU", "effective slots", "confidence", "FG-ARI", "PSNR")))
    for color in colors:
        for K in counts:
            mine = [c for c in done if (c["flags"]["color"], c["flags"]["slots"]) == (color, K)]
            print(f"{color + ', ' + str(K) + ' slots':<30}" + show(mine, metrics))
        print(f"{color + ', best grid':<30}{'':>80}{best_grid(baselines[color], 'fg_ari'):>20.3f}")
    return dict(baselines=baselines, cells=done)


# ---------------------------------------------------------------------------------------------------------------- main
def keep_memory():
    """Let glibc keep freed memory: fresh pages for every activation were 30 % of an update (0.114 -> 0.080 s)."""
    import ctypes
    try:
        for option, value in ((-1, 2**31 - 1), (-3, 2**25), (-2, 2**28)):  # trim and mmap thresholds, top pad
            ctypes.CDLL(None).mallopt(option, value)
    except (AttributeError, OSError):  # no glibc
        pass


def strict(x):
    """nan, which JSON lacks, as None."""
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


def read_checkpoint(path):
    try:
        state = torch.load(path, "cpu", weights_only=True)
        return {"model": state["model"], "args": state["args"]}
    except Exception as e:  # a foreign or damaged file can raise almost anything
        raise SystemExit(f"--checkpoint {path} cannot be read ({type(e).__name__}): expected the checkpoint.pt of a "
                         "run of savi.py") from e


def describe(args):
    """What every results.json starts with."""
    git = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True)  # maybe no git here
    chip = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.workers} CPU threads"
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return dict(command=command, commit=git.stdout.strip() or None, hardware=chip, args=asdict(args))


PRESETS = {"cpu": dict(size=32, dim=64, decoder="mlp", clips=500, clip_frames=12, updates=3000, frames=8, batch=4,
                       lr=2e-3),
           "gpu": dict(size=64, dim=128, decoder="conv", clips=1200, clip_frames=24, updates=30_000, frames=6, batch=32,
                       lr=2e-4)}
# what is read from a checkpoint
NETWORK = ("data", "color", "floor", "clips", "clip_frames", "size", "slots", "dim", "init", "predictor", "interact",
           "partition", "decoder", "target", "iters_first", "iters_next", "noise", "mocapact_dir")


def fill_args(args):
    """args with device, preset and defaults by data set filled in. SystemExit: flags that do not fit together."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but PyTorch sees no GPU: install its CUDA build or type --device cpu")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.checkpoint:
        saved = read_checkpoint(args.checkpoint)["args"]
        args = replace(args, **{k: saved[k] for k in NETWORK})
    elif args.eval_only:
        raise SystemExit("--eval-only measures a network that has learned: type --checkpoint runs/NAME/checkpoint.pt")
    preset = PRESETS[{"auto": "gpu" if device == "cuda" else "cpu"}.get(args.preset, args.preset)]
    extra = dict(color={"humanoid": "default", "crowd": "random", "mocapact": "default"}.get(args.data, "parts"),
                 slots={"objects": 6, "pushed": 4}.get(args.data, 7))
    if args.ablation and args.data == "humanoid":
        extra["color"] = "parts"                     # where colour alone lets slots separate
    args = replace(args, device=device, **{k: v for k, v in {**preset, **extra}.items() if getattr(args, k) is None})
    if args.ablation and args.seeds == 1:
        args = replace(args, seeds=5)
    if args.ablation and args.study:
        raise SystemExit("asked for --ablation and --study: choose one")
    if (args.ablation or args.study) and args.checkpoint:
        raise SystemExit("--checkpoint with a study: its networks start untrained; leave it out")
    if args.ablation and args.data == "objects":
        raise SystemExit("--ablation action on objects, which no action moves: type --data pushed or --data humanoid")
    if args.study and args.data != "humanoid":
        raise SystemExit(f"--study slots is about one body: type --data humanoid instead of {args.data}")
    if args.data == "mocapact" and not args.mocapact_dir:
        raise SystemExit("--data mocapact needs --mocapact-dir, a folder with CMU_*.hdf5; --data humanoid needs none")
    for name in ("updates", "frames", "batch", "slots", "seeds", "workers", "threads", "iters_first", "iters_next",
                 "clips"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a whole number, at least 1")
    if args.clip_frames < args.frames:
        raise SystemExit(f"clips of {args.clip_frames} frames are shorter than a training sequence of {args.frames}: "
                         f"type --frames {args.clip_frames} or --clip-frames {args.frames}")
    return args


def main(args: Args):
    """Run one study and return what results.json holds."""
    if args.resume:
        file = Path(args.resume) / "args.json"
        if not file.exists():
            raise SystemExit(f"--resume {args.resume} has no args.json: expected a folder that savi.py made, e.g. "
                             "runs/objects__savi__1__1700000000")
        args = Args(**json.loads(file.read_text())["args"] | {"resume": args.resume, "until": args.until})
    args = fill_args(args)
    torch.set_float32_matmul_precision("high")
    kind = {"action": action_study, "slots": slots_study}.get(args.ablation or args.study, single)
    run = Run(args.data, "savi", args.seed, asdict(args), args.resume)
    print(f"SAVi: {kind.__name__}, {args.data} ({args.color}), {args.size} pixels, {args.slots} slots of {args.dim}, "
          f"{args.decoder} decoder, {args.device}, {'compiled' if args.compile else 'eager'}, run folder {run.dir}")
    print(f"budget: {args.clips} clips of {args.clip_frames} frames, {args.updates:,} updates of {args.batch} x "
          f"{args.frames} frames, learning rate {args.lr}, prediction weight {args.pred_weight}", flush=True)
    if args.track:
        import wandb
        wandb.init(project="savi", name=run.dir.name, config=asdict(args), sync_tensorboard=True)
    began = time.time()
    try:
        result = describe(args) | kind(args, run)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; go on with: python {Path(sys.argv[0]).name} --resume {run.dir}") from None
    result["seconds"] = round(time.time() - began, 1)
    write_text(run.dir / "results.json", json.dumps(strict(result), indent=1))
    names = sorted(p.name for p in run.dir.iterdir() if p.suffix in (".json", ".csv", ".png", ".gif", ".mp4", ".pt"))
    print(f"files: {run.dir}/", *names)
    run.close()
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
