"""SAVi: objects as slots, learned from video alone, in one file.

The idea (Kipf et al., "Conditional Object-Centric Learning from Video", ICLR 2022): K vectors,
slots, compete for the pixels of each frame; a predictor carries them to the next one, and each is
decoded to a picture and a mask of its own.  With reconstruction (or optical flow) as the only
goal, slots settle on objects.  Video is made on the spot; every score stands beside rules that
learn nothing.

    python savi.py          # 500 clips of moving objects, 6 slots, under 10 minutes: FG-ARI 0.60
    python savi.py --fast   # the whole pipeline in a minute

Copy me together with envs.py and data.py.  Bodies with actions: --task studies.scenes:Humanoid.

Shapes: B clips, T frames, K slots, D slot size, N tokens, m actions (or 0), H W pixels; time first:
video (T,B,3,H,W), act (T,B,m), slots (T,B,K,D).  act[t] was active until frame t.

Deviations from the paper:
 1. Data: scenes of MuJoCo instead of MOVi, which is a download.
 2. The loss is a mean over pixels, SAVi's a sum; the gradient clip of 0.05 then acts rarely.
 3. The predictor is a residual MLP per slot (the authors' choice for robots), not a transformer.
 4. Two iterations of slot attention on the first frame, one on later ones, with a residual MLP.
 5. The preset cpu has 32 pixels, 64 numbers per slot, 8 frames and, for a decoder, an MLP per cell
    of 2x2 pixels with sines of the position.
 6. Frames are centred and scaled before the encoder.
 7. Linear and convolutional layers start as in the authors' JAX code.
 8. --init com conditions on centres of parts instead of boxes; slots of the background come last.
"""
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Run, check_ranges, choose_device, make_video, open_video, parse, refuse, resumed


@dataclass
class Args:
    task: str = "objects"
    """objects, module:Scene (studies.scenes:Humanoid), or a folder of data.make_video"""
    seed: int = 1
    """of weights and batches; the video has its own, fixed seed"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes the GPU when there is one"""
    preset: Literal["auto", "cpu", "gpu"] = "auto"
    """sizes and budget: 32 pixels, minutes; 64 pixels, SAVi-S, 30,000 updates; by the device"""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """torch.compile for the loss; on a CPU its minute is more than it saves"""
    threads: int = 1
    """CPU threads of the training; two were slower than one on two busy cores"""
    workers: int = 2
    """processes that render video"""
    fast: bool = False
    """tiny sizes: the whole pipeline in a minute, to see that it runs"""
    resume: str | None = None
    """continue the run in this folder; its flags are read from there"""
    checkpoint: str | None = None
    """start from these weights; their checkpoint.pt has the flags of video and network"""
    eval_only: bool = False
    """with --checkpoint: only measure and draw"""
    capture_video: bool = False
    """slots.gif and slots.mp4 beside the figures"""
    track: bool = False
    """also send metrics to Weights & Biases (pip install wandb)"""
    save_every: float = 60.0
    """seconds between checkpoints"""
    data_dir: str = "runs/video"
    """where rendered video is kept for the next run"""

    # video
    color: Literal["parts", "default", "random"] = "parts"
    """each object or part its own, all the same tan, or each body a random one"""
    floor: Literal["plain", "checker"] = "plain"
    """a checkerboard costs the decoder capacity"""
    clips: int | None = None
    """clips in the data set, 70 % of them to train on (preset: 500 or 1200)"""
    clip_frames: int | None = None
    """frames per clip (preset: 12 or 24)"""
    size: Literal[32, 64, 128] | None = None
    """pixels (preset: 32 or 64)"""

    # network
    slots: int = 6
    """K, the largest number of objects and one for the background"""
    dim: int | None = None
    """D, numbers per slot (SAVi: 128; preset cpu: 64)"""
    init: Literal["learned", "gauss", "com"] = "learned"
    """first slots: learned, drawn, or from the true centres in frame 0 (SAVi's conditional mode)"""
    predictor: Literal["transformer", "mlp"] = "mlp"
    """to the next frame's slots: SAVi's transformer across slots, or an MLP per slot"""
    decoder: Literal["conv", "mlp"] | None = None
    """transposed convolutions (SAVi), or an MLP per cell, 40 times cheaper on a CPU"""
    target: Literal["rgb", "flow"] = "rgb"
    """what slots must explain: colours, or the simulator's exact optical flow (SAVi's main one)"""
    iters: tuple[int, int] = (2, 1)
    """iterations of slot attention on the first frame, and on each later one"""
    pred_weight: float = 0.0
    """weight of the error of decoded predictions; corrected slots alone need none"""
    noise: float = 0.0
    """StoSAVi: sample the predicted slots, with this weight on their KL (1e-4 there); 0: never"""

    # optimisation: left out, these follow from the preset
    updates: int | None = None
    """gradient steps (preset: 3,000 or 30,000; SAVi 100,000)"""
    frames: int | None = None
    """T, consecutive frames in a training sequence (preset: 8 or 6)"""
    batch: int | None = None
    """sequences per update (preset: 4 or 32; SAVi 64)"""
    lr: float | None = None
    """peak learning rate (preset: 2e-3 or 2e-4); warm-up over 7 % of the updates, cosine to 0"""
    clip: float = 0.05
    """largest norm of the gradient"""


PRESETS = {
    "cpu": dict(size=32, dim=64, decoder="mlp", clips=500, clip_frames=12, updates=3000, frames=8,
                batch=4, lr=2e-3),
    "gpu": dict(size=64, dim=128, decoder="conv", clips=1200, clip_frames=24, updates=30_000,
                frames=6, batch=32, lr=2e-4)}
PRESETS["fast"] = PRESETS["cpu"] | dict(dim=16, clips=30, clip_frames=6, updates=60, frames=3)
VIDEO = ("task", "color", "floor", "clips", "clip_frames", "size")
TRAINING = ("updates", "frames", "batch", "lr", "clip", "pred_weight", "save_every", "track")
NETWORK = ("slots", "dim", "init", "predictor", "decoder", "target", "iters", "noise")
MOVED = {
    "--data objects": "python savi.py --task objects",
    "--data pushed": "python savi.py --task studies.scenes:Pushed --slots 4",
    "--data humanoid": "python savi.py --task studies.scenes:Humanoid --color default --slots 7",
    "--data crowd": "python savi.py --task studies.scenes:Crowd --color random --slots 7",
    "--data mocapact": "python -m studies.mocapact --src DIR, then python savi.py --task FOLDER",
    "--mocapact-dir": "python -m studies.mocapact --src DIR, then python savi.py --task FOLDER",
    "--cache": "--data-dir, with the same meaning",
    "--seeds": "python -m studies.savi_seeds --seeds 3",
    "--ablation": "python -m studies.savi_arms --task studies.scenes:Pushed",
    "--study": "python -m studies.savi_slots",
    "--init action": "python -m studies.savi_arms",
    "--predictor action": "python -m studies.savi_arms",
    "--partition": "python -m studies.savi_arms --partition body",
    "--interact": "python -m studies.savi_arms --interact",
    "--iters-first": "python savi.py --iters 2 1",
    "--iters-next": "python savi.py --iters 2 1",
    "--until": "Ctrl-C when you want to stop, and --resume with the run's folder to go on"}


# -------------------------------------------------------------------- metrics, all in float64
def labels_of(masks):
    x = np.asarray(masks)
    if x.dtype.kind not in "biu" or x.size and x.min() < 0:
        raise SystemExit(f"masks of {x.dtype} from {x.min()}: expected whole labels from 0 up, 0 "
                         "for the background; take the argmax of soft masks over the slots")
    return x.astype(np.int64)


def contingency(true, pred):
    """counts (n_true, n_pred) of pixels for two label maps of one shape."""
    true, pred = labels_of(true).ravel(), labels_of(pred).ravel()
    if true.shape != pred.shape:
        raise SystemExit(f"masks of {true.size} and {pred.size} pixels: expected one shape")
    if not true.size:
        return np.zeros((1, 1))
    rows, width = true.max() + 1, pred.max() + 1
    counts = np.bincount(true * width + pred, minlength=rows * width)
    return counts.reshape(rows, width).astype(np.float64)


def ari(true_masks, pred_masks):
    """Adjusted Rand index of two label maps: 1 the same up to names, 0 as by chance."""
    def pairs(x):
        return (x * (x - 1)).sum()

    n = contingency(true_masks, pred_masks)
    both, a, b = pairs(n), pairs(n.sum(1)), pairs(n.sum(0))
    expected = a * b / max(pairs(n.sum()), 1.0)
    most = (a + b) / 2
    return 1.0 if most == expected else float((both - expected) / (most - expected))


def fg_ari(true_masks, pred_masks):
    """Adjusted Rand index over pixels whose true label is not 0, for label maps of one shape,
    all frames of a clip together.  It ignores the background: look at the masks too."""
    true, pred = labels_of(true_masks), labels_of(pred_masks)
    same = true.shape == pred.shape
    return ari(true[true > 0], pred[true > 0]) if same else ari(true, pred)


def iou_table(true, pred):
    """(labels of true that occur, IoU of each of them with each label of pred)."""
    n = contingency(true, pred)
    there = np.flatnonzero(n.sum(1))
    return there, (n / np.maximum(n.sum(1, keepdims=True) + n.sum(0) - n, 1))[there]


def segment_scores(true, pred):
    """mIoU: best one-to-one matching, background too; mBO: best slot of each object."""
    from scipy.optimize import linear_sum_assignment
    labels, table = iou_table(true, pred)
    rows, cols = linear_sum_assignment(-table)
    best = table[labels > 0].max(1)
    return {"miou": table[rows, cols].sum() / len(labels), "mbo": best.mean() if len(best) else 1.0}


def usage(true, alpha):
    """Who draws the foreground?  true (T,H,W) labels, alpha (T,K,H,W) soft masks.

    share (K,): of the foreground; top1: its largest; eff: exp of its entropy; conf: mean largest
    alpha; top1_hard: top1 of the argmax; whole: best IoU of a slot with the foreground.  A monopoly
    has top1 and whole near 1; a smear, where no slot has decided, eff = K and conf = 1/K."""
    fg, hard, K = np.asarray(true) > 0, alpha.argmax(1), alpha.shape[1]
    a = np.moveaxis(alpha, 1, -1)[fg].astype(np.float64)                       # (pixels, K)
    share = a.sum(0) / max(a.sum(), 1e-12)
    hard_share = np.bincount(hard[fg], minlength=K) / max(fg.sum(), 1)
    whole = [((hard == j) & fg).sum() / max(((hard == j) | fg).sum(), 1) for j in range(K)]
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum()
    return {"share": share, "top1": share.max(), "eff": np.exp(entropy),
            "conf": a.max(1).mean() if len(a) else 1.0, "top1_hard": hard_share.max(),
            "whole": max(whole)}


def consistency(true, pred):
    """Share of (frame, object) pairs in which an object has its usual slot; (T,H,W) labels."""
    same = total = 0
    for label in np.unique(true[true > 0]):
        best = [np.bincount(p[g == label]).argmax() for g, p in zip(true, pred) if label in g]
        same, total = same + np.bincount(best).max(), total + len(best)
    return same / max(total, 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return -10 * math.log10(max(float(np.square(a - b, dtype=np.float64).mean()), 1e-12))


GRIDS = ((1, 7), (7, 1), (2, 3), (3, 2), (3, 3))


def grid_mask(rows, cols, shape):
    """Labels (T,H,W) of the cells of a fixed grid."""
    y, x = np.mgrid[:shape[1], :shape[2]]
    return np.broadcast_to(y * rows // shape[1] * cols + x * cols // shape[2], shape)


def baseline_masks(true, video, k=5, seed=0):
    """{name: labels (T,H,W)} of rules that learn nothing; k-means sees the foreground, or all."""
    from scipy.cluster.vq import kmeans2
    T, H, W = true.shape
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:H, :W]
    out = {"one slot": np.zeros_like(true), "random": rng.integers(0, k, true.shape)}
    for r, c in GRIDS:
        out[f"grid {r}x{c}"] = grid_mask(r, c, true.shape)
    xy = np.stack(np.broadcast_arrays(y / H, x / W), -1)[None].repeat(T, 0)
    points = {"xy": xy, "rgb": video / 255.0, "xy+rgb": np.concatenate([xy, video / 255.0], -1)}
    for name, where in (("xy", true > 0), ("rgb", true > 0), ("xy+rgb", true > 0),
                        ("rgb, all", true >= 0), ("xy+rgb, all", true >= 0)):
        chosen, n = points[name.split(",")[0]][where], k + name.endswith("all")
        labels = np.zeros_like(true, dtype=np.int64)
        if len(chosen) >= n:
            chosen = chosen + 1e-6 * rng.standard_normal(chosen.shape)  # n different ones
            labels[where] = kmeans2(chosen, n, minit="++", seed=seed, missing="warn")[1]
        out[f"k-means {name}"] = labels
    return out


# --------------------------------------------------------------------------------- networks
def position_grid(h, w, waves=0):
    """(h*w, 4 + 4 waves): y, x, 1-y, 1-x of every cell in [0, 1], and sines and cosines of y, x."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    parts = [y, x, 1 - y, 1 - x]
    for k in range(waves):
        for f in (torch.sin, torch.cos):
            parts += [f(2**k * torch.pi * y), f(2**k * torch.pi * x)]
    return torch.stack(parts, -1).view(h * w, len(parts))


def flax_init(layer):
    """Variance 1 / fan-in and no bias, as in the authors' JAX code; torch's is a third of that."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        transposed = isinstance(layer, nn.ConvTranspose2d)
        fan_in = (layer.weight[:, 0] if transposed else layer.weight[0]).numel()
        nn.init.normal_(layer.weight, std=fan_in ** -0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class SlotAttention(nn.Module):
    """Slots compete for the tokens of a frame (Locatello et al. 2020, Algorithm 1): slots (B,K,D),
    tokens (B,N,C) -> slots (B,K,D), attention (B,N,K), which sums to one over the slots."""
    def __init__(self, channels, dim, hidden=None):
        super().__init__()
        hidden = hidden or 2 * dim
        self.norm_tokens = nn.LayerNorm(channels)
        self.norm_slots, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(channels, dim, bias=False)
        self.v = nn.Linear(channels, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, slots, tokens, iters=1):
        B, K, D = slots.shape
        tokens = self.norm_tokens(tokens)
        k, v = self.k(tokens), self.v(tokens)                                  # (B,N,D)
        for _ in range(iters):
            q = self.q(self.norm_slots(slots)) * D ** -0.5
            attention = (k @ q.mT).softmax(-1)                                 # (B,N,K), over SLOTS
            weight = attention / (attention.sum(1, keepdim=True) + 1e-8)       # mean over tokens
            update = (weight.mT @ v).view(B * K, D)
            slots = self.gru(update, slots.reshape(B * K, D)).view(B, K, D)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, attention


class Encoder(nn.Module):
    """SAVi App. B: frames (n,3,H,W) -> tokens (n,N,C), convolutions plus position, then an MLP."""
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
        x = self.conv(4 * frames - 2)             # Deviation 6: colours of about unit variance
        return self.mlp(x.flatten(2).mT + self.position(self.grid))


class ConvDecoder(nn.Module):
    """SAVi App. B, spatial broadcast (Watters et al. 2019): a slot on each of 8x8 cells, plus its
    position, and four transposed 5x5 convolutions: (n,D) -> (n,C,H,W)."""
    def __init__(self, size, dim, out, hidden=64):
        super().__init__()
        self.register_buffer("grid", position_grid(8, 8), persistent=False)
        self.position = nn.Linear(4, dim)
        layers, c = [], dim
        for s in {32: (2, 2, 1, 1), 64: (2, 2, 2, 1), 128: (2, 2, 2, 2)}[size]:
            layers += [nn.ConvTranspose2d(c, hidden, 5, s, 2, s - 1), nn.ReLU()]
            c = hidden
        self.net = nn.Sequential(*layers, nn.Conv2d(hidden, out, 1))

    def forward(self, slots):
        x = slots[:, None] + self.position(self.grid)                          # (n,64,D)
        return self.net(x.mT.reshape(len(slots), -1, 8, 8))


class CellDecoder(nn.Module):
    """Deviation 5: spatial broadcast to cells of 2x2 pixels, an MLP per cell: (n,D) -> (n,C,H,W).

    Sines, because the MLP sees one cell at a time and cannot make edges out of its neighbours.  The
    first layer is linear in slot + position: each half is computed once, not per cell and slot."""
    def __init__(self, size, dim, out, hidden=64):
        super().__init__()
        self.side = size // 2
        self.register_buffer("grid", position_grid(self.side, self.side, 4), persistent=False)
        self.slot, self.position = nn.Linear(dim, hidden), nn.Linear(20, hidden, bias=False)
        self.net = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                 nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4 * out))

    def forward(self, slots):
        x = self.net(self.slot(slots)[:, None] + self.position(self.grid))     # (n,cells,4C)
        return F.pixel_shuffle(x.mT.reshape(len(slots), -1, self.side, self.side), 2)


class Predictor(nn.Module):
    """Slots (B,K,D) -> first guess for the next frame: SAVi's post-norm transformer block across
    slots, or a residual MLP per slot (Deviation 3).  act (B,m) is for those of other files."""
    def __init__(self, kind, dim):
        super().__init__()
        self.across = kind == "transformer"
        if self.across:
            self.net = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        else:
            self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 256), nn.ReLU(),
                                     nn.Linear(256, dim))

    def forward(self, slots, act=None):
        return self.net(slots) if self.across else slots + self.net(slots)


class FirstSlots(nn.Module):
    """First slots (B,K,D).  learned: a vector per slot; gauss: drawn, with learned mean and spread;
    com: from a cue (B,K,3), y and x of the centre of each slot's part, and 1 if there is one."""
    def __init__(self, kind, slots, dim):
        super().__init__()
        self.kind, self.slots = kind, slots
        if kind == "com":
            self.cue = nn.Sequential(nn.Linear(3, 256), nn.ReLU(), nn.Linear(256, dim))
        else:
            self.first = nn.Parameter(torch.randn(1 if kind == "gauss" else slots, dim))
        if kind == "gauss":
            self.log_std = nn.Parameter(torch.zeros(1, dim))

    def forward(self, act, cue=None):
        if self.kind == "com":
            return self.cue(cue)
        slots = self.first.expand(len(act), self.slots, -1)
        if self.kind == "gauss":
            slots = slots + self.log_std.exp() * torch.randn_like(slots)
        return slots


class NoisySlots(nn.Module):
    """StoSAVi: predicted slots (B,K,D) -> sampled ones, KL to the same mean and variance 0.01."""
    def __init__(self, dim):
        super().__init__()
        self.spread = nn.Linear(dim, 2 * dim)

    def forward(self, slots):
        mean, change = self.spread(slots).chunk(2, -1)
        log_var = math.log(0.01) + change
        kl = 0.5 * (math.log(0.01) - log_var + log_var.exp() / 0.01 - 1).sum(-1).mean()
        return mean + (0.5 * log_var).exp() * torch.randn_like(mean), kl


class SAVi(nn.Module):
    """video (T,B,3,H,W), act (T,B,m), cue -> predicted and corrected slots (T,B,K,D), KL.

    initial(act, cue): first slots, which count as the first prediction; predictor(slots, act):
    those of the next frame, to which act led; sampler: None or NoisySlots."""
    def __init__(self, initial, encoder, attention, predictor, decoder, sampler=None, iters=(2, 1)):
        super().__init__()
        self.initial, self.encoder, self.attention = initial, encoder, attention
        self.predictor, self.decoder, self.sampler, self.iters = predictor, decoder, sampler, iters
        self.apply(flax_init)

    def forward(self, video, act, cue=None):
        tokens = self.encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2])  # (T,B,N,C)
        slots = self.initial(act[0], cue)
        before, after, kl = [], [], video.new_zeros(())
        for t in range(len(video)):
            if t:
                slots = self.predictor(slots, act[t])
            if self.sampler:
                slots, extra = self.sampler(slots)
                kl = kl + extra / len(video)
            before.append(slots)
            slots, _ = self.attention(slots, tokens[t], self.iters[t > 0])
            after.append(slots)
        return torch.stack(before), torch.stack(after), kl

    def decode(self, slots):
        """slots (..,K,D) -> picture (..,C,H,W), alpha (..,K,H,W), each slot's own (..,K,C,H,W).

        All slots of all frames are one batch; a loop over slots gives the same numbers."""
        x = self.decoder(slots.flatten(0, -2)).unflatten(0, slots.shape[:-1])
        each, alpha = x[..., :-1, :, :], x[..., -1, :, :].softmax(-3)
        return (alpha.unsqueeze(-3) * each).sum(-4), alpha, each


def make_model(args):
    """The network that the flags describe, with weights from the seed."""
    torch.manual_seed(args.seed)
    channels, out = 64 if args.size == 128 else 32, (3 if args.target == "rgb" else 2) + 1
    encoder, attention = Encoder(args.size, channels), SlotAttention(channels, args.dim)
    predictor = Predictor(args.predictor, args.dim)
    decoder = (CellDecoder if args.decoder == "mlp" else ConvDecoder)(args.size, args.dim, out)
    initial = FirstSlots(args.init, args.slots, args.dim)
    sampler = NoisySlots(args.dim) if args.noise else None
    return SAVi(initial, encoder, attention, predictor, decoder, sampler, args.iters)


# ------------------------------------------------------------------------------------- loss
def savi_loss(model, video, target, act, cue, pred_weight, kl_weight):
    """Mean squared error of decoded corrected slots, and of predicted ones; StoSAVi's KL."""
    before, after, kl = model(video, act, cue)
    T = len(video)
    slots = torch.cat([after, before[1:]]) if pred_weight else after
    picture = model.decode(slots)[0]
    recon = F.mse_loss(picture[:T], target)
    pred = F.mse_loss(picture[T:], target[1:]) if pred_weight else torch.zeros_like(recon)
    loss = recon + pred_weight * pred + kl_weight * kl
    terms = dict(loss=loss, recon=recon, pred=pred, kl=kl)
    return loss, {k: v.detach() for k, v in terms.items()}


def warm_cosine(step, total, lr):
    """Learning rate: linear warm-up from 0 over 7 % of the steps, cosine to 0 at the last one."""
    warmup = max(1, round(0.07 * total))
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


# ------------------------------------------------------------------------------------ video
def load_video(args):
    """(arrays, meta) of --task as data.make_video describes them; filmed first if need be."""
    folder = Path(args.task)
    if not folder.is_dir():
        name = f"{args.task.replace(':', '.')}-{args.color}-{args.floor}-{args.size}px"
        folder = Path(args.data_dir) / f"{name}-{args.clips}x{args.clip_frames}"
        make_video(folder, args.task, args.clips, args.clip_frames, args.size, args.color,
                   args.floor, 0, args.workers)
    arrays, meta = open_video(folder)
    frames, size = arrays["video"].shape[1:3]
    if size != args.size or frames < args.frames:
        raise SystemExit(f"{folder} has {frames} frames of {size} pixels: expected at least "
                         f"{args.frames} of --size {args.size}")
    return arrays, meta


def pick(arrays, split, most=None):
    """Clips (indices) of one split, at most so many, evenly over the list (families alternate)."""
    chosen = np.flatnonzero(arrays["split"] == split)
    if not len(chosen):
        raise SystemExit(f"no clip in split {split} (train, test, validation): make more clips")
    some = np.linspace(0, len(chosen) - 1, min(most or len(chosen), len(chosen)))
    return chosen[some.round().astype(int)]


def centres(masks, slots):
    """(N,T,K,3): y and x in [0,1] of the centre of part j+1, and 1 if it is there, else zeros."""
    out, (H, W) = np.zeros((*masks.shape[:2], slots, 3), np.float32), masks.shape[2:]
    y, x = (np.arange(H) + 0.5) / H, (np.arange(W) + 0.5) / W
    for j in range(slots):
        m = masks == j + 1
        n = m.sum((2, 3))
        where = (m.sum(3) @ y) / np.maximum(n, 1), (m.sum(2) @ x) / np.maximum(n, 1)
        out[..., j, :] = np.stack([*where, n > 0], -1)
    return out


class Clips:
    """Chosen clips on the device.  arrays: all about them; true: bodies in a crowd, else parts."""

    def __init__(self, arrays, chosen, args, device):
        self.device = device
        self.arrays = {k: v[chosen] for k, v in arrays.items()}
        self.true = self.arrays.get("inst", self.arrays["seg"])
        self.video = torch.as_tensor(self.arrays["video"]).to(device)
        self.act = torch.as_tensor(self.arrays["actions"]).to(device)
        self.flow = self.cue = None
        if args.target == "flow":
            self.flow = torch.as_tensor(self.arrays["flow"]).to(device)
        if args.init == "com":
            self.cue = torch.as_tensor(centres(self.true, args.slots)).to(device)

    def window(self, clip, start, T):
        """clip, start (B,) -> video, target (T,B,C,H,W), act (T,B,m), cue (B,K,3) or None."""
        t = start[None] + torch.arange(T, device=self.device)[:, None]
        video = self.video[clip[None], t].permute(0, 1, 4, 2, 3).float() / 255
        target = video
        if self.flow is not None:  # 4 pixels per frame are far
            flow = self.flow[clip[None], t].permute(0, 1, 4, 2, 3).float()
            target = (flow / 4).clamp(-1, 1)
        cue = None if self.cue is None else self.cue[clip, start]
        return video, target, self.act[clip[None], t], cue

    def sample(self, batch, T):
        """window() of random sequences, by torch's global generator."""
        N, L = self.video.shape[:2]
        clip, start = torch.randint(N, (batch,)), torch.randint(L - T + 1, (batch,))
        return self.window(clip.to(self.device), start.to(self.device), T)


# --------------------------------------------------------------------------------- training
def train(model, clips, val, run, args):
    """Adam on savi_loss of random sequences of `clips`; run.history gets the curve on `val`."""
    opt = torch.optim.Adam(model.parameters(), args.lr)
    loss_of = torch.compile(savi_loss, dynamic=False) if args.compile else savi_loss
    run.keeps(facts=dict(args=asdict(args)), model=model, opt=opt)
    run.expects(update=args.updates)

    for step in run.steps("update", args.updates):
        torch.manual_seed(1_000_003 * args.seed + step)  # batch and noise: the same when resumed
        batch = clips.sample(args.batch, args.frames)

        loss, terms = loss_of(model, *batch, args.pred_weight, args.noise)

        for group in opt.param_groups:
            group["lr"] = warm_cosine(step, args.updates, args.lr)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        opt.step()

        run.note(terms, grad_norm=norm)
        if (step + 1) % run.log_every == 0 or step + 1 == args.updates:
            score = float(np.mean([fg_ari(g, p) for g, p in zip(val.true, segment(model, val))]))
            run.history.append(dict(update=step + 1, recon=float(terms["recon"]), fg_ari=score))
            run.log({"eval/fg_ari": score, "charts/lr": group["lr"]}, step + 1)
            run.say(f"update {step + 1:,}: FG-ARI {score:.3f} on validation clips", force=False)


# ------------------------------------------------------------------------------- evaluation
EVAL_CLIPS = 60  # of the test split at most; their mean has a standard error of about 0.02


@torch.no_grad()
def see(model, clips, chosen):
    """What the model makes of whole clips (indices), in numpy, clips first: alpha (B,T,K,H,W),
    picture, target, video (B,T,C,H,W), predicted (B,T-1,..), each (B,T,K,C,H,W)."""
    chosen = torch.as_tensor(chosen, device=clips.device)
    start, T = torch.zeros_like(chosen), clips.video.shape[1]
    video, target, act, cue = clips.window(chosen, start, T)
    torch.manual_seed(0)  # of noise, if the network has any
    before, after, _ = model(video, act, cue)
    picture, alpha, each = model.decode(after)
    out = dict(alpha=alpha, picture=picture, each=each, target=target, video=video,
               predicted=model.decode(before[1:])[0])
    return {k: v.transpose(0, 1).cpu().numpy() for k, v in out.items()}


def batches(n, size=12):
    """0 .. n-1 in arrays of `size`."""
    return np.split(np.arange(n), range(size, n, size))


def segment(model, clips):
    """Label maps (N,T,H,W): the slot with the largest alpha."""
    masks = [see(model, clips, b)["alpha"].argmax(2) for b in batches(len(clips.video), 24)]
    return np.concatenate(masks)


def scores(true, pred):
    """All scores of one clip's label maps (T,H,W)."""
    frames = [fg_ari(g, p) for g, p in zip(true, pred) if (g > 0).any()]
    return {"fg_ari": fg_ari(true, pred), "fg_ari_frame": float(np.mean(frames)) if frames else 1.0,
            "ari": ari(true, pred), "consistency": consistency(true, pred),
            **segment_scores(true, pred)}


def mean_of(rows):
    """Means over clips of {name: number or array}, as plain values."""
    out = {k: np.mean([r[k] for r in rows], 0) for k in rows[0]}
    return {k: v.tolist() if np.ndim(v) else float(v) for k, v in out.items()}


def evaluate(model, clips):
    """Mean scores over `clips`: whole clips, every frame."""
    rows = []
    for chosen in batches(len(clips.video)):
        x = see(model, clips, chosen)
        for b, i in enumerate(chosen):
            hard, true = x["alpha"][b].argmax(1), clips.true[i]
            picture, target = x["picture"][b], x["target"][b]
            row = scores(true, hard) | usage(true, x["alpha"][b]) | {
                "mse": np.square(picture - target, dtype=np.float64).mean(),
                "psnr": psnr(picture, target),
                "pred_psnr": psnr(x["predicted"][b], target[1:]),
                "copy_psnr": psnr(target[:-1], target[1:])}
            if "inst" in clips.arrays:
                row["fg_ari_parts"] = fg_ari(clips.arrays["seg"][i], hard)
            rows.append(row)
    return mean_of(rows)


def evaluate_baselines(clips):
    """{rule: scores} of rules that learn nothing, on the same clips."""
    rows = {}
    for true, video in zip(clips.true, clips.arrays["video"]):
        for name, pred in baseline_masks(true, video).items():
            rows.setdefault(name, []).append(scores(true, pred))
    return {name: mean_of(r) for name, r in rows.items()}


COLUMNS = dict(fg_ari="FG-ARI", fg_ari_frame="per frame", ari="ARI", miou="mIoU", mbo="mBO",
               consistency="consistency")
WORDS = dict(psnr="PSNR, corrected slots", pred_psnr="PSNR, slots predicted one frame ahead",
             copy_psnr="PSNR of the last frame again", conf="confidence: mean largest alpha",
             top1="largest share of the foreground in a slot", eff="effective number of slots",
             whole="IoU of the best slot with the foreground", fg_ari_parts="FG-ARI of parts")


def print_table(rows, ours):
    """rows {name: scores}; below it what else is known of `ours`."""
    print(f"\n{'':<24}" + "".join(f"{x:>13}" for x in COLUMNS.values()))
    for name, row in rows.items():
        print(f"{name:<24}" + "".join(f"{row[k]:>13.3f}" for k in COLUMNS))
    print()
    for k, words in WORDS.items():
        if k in ours:
            print(f"{words:<44}{ours[k]:>9.3f}")
    best = max(v["fg_ari"] for v in list(rows.values())[:-1])
    print(f"\nbest trivial baseline: FG-ARI {best:.3f}; k-means without 'all' sees the true "
          "foreground; published: SAVi-S 0.92 on MOVi-A with boxes given in frame 0")


# ---------------------------------------------------------------------------------- figures
def hues(n):
    """(n,3) colours by slot index, fixed over time."""
    from matplotlib.colors import hsv_to_rgb
    j = np.arange(n)
    return hsv_to_rgb(np.stack([j / n, np.where(j % 2, 0.75, 1), np.where(j % 2, 1, 0.85)], -1))


def as_rgb(x):
    """(C,H,W) -> (H,W,3) in [0,1]; flow as red (right) and green (down) about grey."""
    x = x.transpose(1, 2, 0)
    if x.shape[-1] == 2:
        x = np.concatenate([x / 2 + 0.5, np.full_like(x[..., :1], 0.5)], -1)
    return x.clip(0, 1)


def strip(x, b, t):
    """Tiles of clip b, frame t: input, reconstruction, truth, masks, and the slots on white."""
    colors, parts = hues(x["alpha"].shape[2]), hues(max(int(x["true"].max()), 1))
    tiles = [as_rgb(x["video"][b, t]), as_rgb(x["picture"][b, t]),
             np.concatenate([np.zeros((1, 3)), parts])[x["true"][b, t]],
             colors[x["alpha"][b, t].argmax(0)]]
    for a, each in zip(x["alpha"][b, t][..., None], x["each"][b, t]):
        tiles.append(as_rgb(each) * a + (1 - a))
    return tiles


def mosaic(rows, gap=2, zoom=3):
    """uint8 picture of rows of equal tiles (H,W,3) in [0,1], enlarged, white gaps, even sides."""
    H, W = rows[0][0].shape[:2]
    H, W = H * zoom + gap * 2, W * zoom + gap * 2
    canvas = np.ones((H * len(rows), W * len(rows[0]), 3))
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            place = canvas[r * H + gap:(r + 1) * H - gap, c * W + gap:(c + 1) * W - gap]
            place[:] = tile.repeat(zoom, 0).repeat(zoom, 1)
    return (canvas * 255).round().astype(np.uint8)


def label_mosaic(picture, rows, path):
    """Save a picture of strips with the names of rows and columns around it."""
    from matplotlib.figure import Figure  # without pyplot: no screen, nothing to close
    h, w = picture.shape[0] / 100, picture.shape[1] / 100
    left, top = 0.25 + 0.075 * max(map(len, rows)), 0.35
    fig = Figure(figsize=(w + left, h + top))
    ax = fig.add_axes((left / (w + left), 0, w / (w + left), h / (h + top)))
    ax.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, w, len(rows), 0))
    tile = picture.shape[0] / len(rows) / 100
    slots = [f"slot {j + 1}" for j in range(round(w / tile) - 4)]
    columns = ["input", "recon", "true", "masks", *slots]
    ax.set_xticks((np.arange(len(columns)) + 0.5) * tile, columns, fontsize=8)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fig.savefig(path, dpi=200)


def draw(model, clips, task_names, folder, movie=False):
    """slots.png (a row per clip, its middle frame), time.png (a row per frame of the first clip),
    with `movie` slots.gif and .mp4 of all."""
    x = see(model, clips, np.arange(len(clips.true))) | dict(true=clips.true)
    names = [f"{task_names[t]} {i + 1}" for i, t in enumerate(clips.arrays["task"])]
    T, zoom = clips.video.shape[1], max(1, 128 // clips.video.shape[2])
    times = np.linspace(0, T - 1, min(8, T)).round().astype(int)
    middle = mosaic([strip(x, b, T // 2) for b in range(len(names))], zoom=zoom)
    label_mosaic(middle, names, folder / "slots.png")
    over_time = mosaic([strip(x, 0, t) for t in times], zoom=zoom)
    label_mosaic(over_time, [f"frame {t}" for t in times], folder / "time.png")
    if movie:
        import imageio.v2 as imageio
        frames = []
        for t in range(T):
            tiles = [strip(x, b, t) for b in range(len(names))]
            frames.append(mosaic(tiles, zoom=max(1, zoom // 2)))
        imageio.mimwrite(folder / "slots.gif", frames, duration=125, loop=0)
        imageio.mimwrite(folder / "slots.mp4", frames * 3, fps=8, macro_block_size=1)


# ------------------------------------------------------------------------------------- main
def read_checkpoint(path):
    """{"model": weights, "args": flags of video and network} of a checkpoint.pt."""
    try:
        state = torch.load(path, "cpu", weights_only=True)
        return {"model": state["model"], "args": {k: state["args"][k] for k in VIDEO + NETWORK}}
    except Exception as e:  # a foreign or damaged file can raise almost anything
        raise SystemExit(f"--checkpoint {path} cannot be read ({type(e).__name__}): expected a "
                         "checkpoint.pt of this savi.py") from e


def filled(args, device):
    """args with what was left out: from the checkpoint, or by the preset."""
    if args.eval_only:
        refuse(args, " ".join(TRAINING), "--eval-only trains nothing")
        if not args.checkpoint:
            raise SystemExit("--eval-only needs a network: type --checkpoint runs/X/checkpoint.pt")
    if args.checkpoint:
        refuse(args, " ".join(VIDEO + NETWORK), "with --checkpoint it is read from there")
        args = replace(args, **read_checkpoint(args.checkpoint)["args"])
    elif Path(args.task).is_dir():
        refuse(args, "color floor clips clip_frames", "--task is a folder of video that is there")
    if args.fast:
        refuse(args, "preset", "--fast has sizes of its own")
    name = "fast" if args.fast else args.preset
    if name == "auto":
        name = "gpu" if device.type == "cuda" else "cpu"
    return replace(args, **{k: v for k, v in PRESETS[name].items() if getattr(args, k) is None})


def check_flags(args):
    """SystemExit: a flag out of range, or flags that do not fit together."""
    ones = ("updates", "frames", "batch", "slots", "dim", "workers", "threads")
    check_ranges(args, dict.fromkeys(ones, (1, None)) | dict(
        seed=(0, None), clips=(10, None), clip_frames=(2, None), lr=(1e-8, None), clip=(1e-6, None),
        noise=(0, None), pred_weight=(0, None), save_every=(0, None)))
    if min(args.iters) < 1:
        raise SystemExit(f"--iters {args.iters}: expected two whole numbers, at least 1")
    if args.predictor == "transformer" and args.dim % 4:
        raise SystemExit(f"--dim {args.dim}: the transformer has four heads; type a multiple of 4")
    if args.pred_weight and args.frames < 2:
        raise SystemExit("--pred-weight needs a frame to predict: type --frames 2 or more")
    if args.clip_frames < args.frames:
        raise SystemExit(f"clips of {args.clip_frames} frames are shorter than a sequence of "
                         f"{args.frames}: type --frames {args.clip_frames}")


def main(args: Args):
    """Train or only measure a network, beside rules that learn nothing; returns results.json."""
    device, chip = choose_device(args.device)
    args = resumed(args) if args.resume else filled(args, device)
    check_flags(args)
    torch.set_num_threads(args.threads)
    print(f"SAVi on {args.task} ({args.color}), {args.size} pixels, {args.slots} slots of "
          f"{args.dim}; {args.clips} clips of {args.clip_frames} frames, {args.updates:,} updates "
          f"of {args.batch} x {args.frames} frames, learning rate {args.lr}; {chip}, "
          f"{'compiled' if args.compile else 'eager'}", flush=True)
    arrays, meta = load_video(args)
    run = Run("savi", args, log_every=max(10, args.updates // 30))
    test = Clips(arrays, pick(arrays, 1, EVAL_CLIPS), args, device)
    baselines, model = evaluate_baselines(test), make_model(args).to(device)
    if args.checkpoint:
        model.load_state_dict(read_checkpoint(args.checkpoint)["model"])
    if not args.eval_only:
        val = Clips(arrays, pick(arrays, 2, 24), args, device)
        train(model, Clips(arrays, pick(arrays, 0), args, device), val, run, args)

    ours = evaluate(model, test)
    five = Clips(arrays, pick(arrays, 1, 5), args, device)
    draw(model, five, meta["task_names"], run.dir, args.capture_video)
    print_table(baselines | {f"SAVi, {args.slots} slots": ours}, ours)
    count = sum(p.numel() for p in model.parameters())
    return run.finish(dict(scores=ours, baselines=baselines, curve=run.history, parameters=count))


if __name__ == "__main__":
    main(parse(Args, __doc__, MOVED))
