"""Do slots that know their place segment better, with a background in one slot?

    python -m studies.savi_place            # 3 seeds and savi.py's default, 40 minutes on one core
    python -m studies.savi_place --fast     # under a minute, to see that it runs

In savi.py a slot has to tell its decoder where its object is, and all slots may paint the floor:
masks are zones of the picture.  Here a slot also has a place, the centre of its attention, carried
from frame to frame, and is decoded relative to it (Biza et al. 2023, "Invariant Slot Attention",
the decoder half; scale is left out).  Ours: tokens without a position, so that slots differ by what
they see and not by where; attention falls off with the distance from the place; the last slot is
the background, decoded at absolute positions through four numbers, too few for an object.  Batches
are many short sequences at first, which ends the grey plateau of training early, then few long
ones, which learn to follow.  A small price on what object slots paint leaves the floor to the
background once objects are found.

Rule, fixed before the run: "holds" if in each of at least three seeds FG-ARI, ARI with background
and mIoU are all above savi.py's default with the same seed; "fails" if one of them is below in
each seed; otherwise "undecided".
"""
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import savi
from data import Run, choose_device, run_cells
from studies import common
from studies.savi_seeds import row_of, savi_args, tell, test_clips, work, workers_of

WHERE = ((0.3, 0.25), (0.3, 0.75), (0.5, 0.5), (0.7, 0.25), (0.7, 0.75))  # of the first places


@dataclass
class Args(common.StudyArgs):
    task: str = "objects"
    """a scene as in savi.py"""
    slots: int = 6
    """K, the last one for the background"""
    updates: int = 1500
    """of a training with places; savi.py's default takes its own 3,000"""
    radius: float = 0.3
    """at which attention has fallen by exp(-1/2), in widths of the picture"""
    sharpness: float = 3.0
    """factor of the attention's logits; without positions in the tokens it has to be larger"""
    area: float = 7e-4
    """weight of the share of the picture that object slots paint, once objects are found"""
    compare: bool = True
    """train savi.py's default too; without it its kept trainings (results/savi_objects.json) serve,
    which are of the same clips"""


# --------------------------------------------------------------------------------- networks
def cells(n):
    """(n*n, 2): y and x in [0, 1] of the centres of n x n cells."""
    at = (torch.arange(n) + 0.5) / n
    return torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).view(n * n, 2)


def waves(u, count=4):
    """u (..,2) with sines and cosines of it: (.., 2 + 4 count)."""
    parts = [u]
    for k in range(count):
        parts += [(2**k * math.pi * u).sin(), (2**k * math.pi * u).cos()]
    return torch.cat(parts, -1)


class PlacedAttention(savi.SlotAttention):
    """savi.SlotAttention for slots (B,K,D+2) that end with their place (y, x); the last slot is
    everywhere and has a learned handicap instead."""
    def __init__(self, channels, dim, side, radius, sharpness):
        super().__init__(channels, dim)
        self.register_buffer("grid", cells(side), persistent=False)
        self.radius, self.sharpness = radius, sharpness
        self.everywhere = nn.Parameter(torch.tensor(-1.0))

    def forward(self, slots, tokens, iters=1):
        slots, place = slots[..., :-2], slots[..., -2:]
        B, K, D = slots.shape
        tokens = self.norm_tokens(tokens)
        k, v = self.k(tokens), self.v(tokens)                                  # (B,N,D)
        for _ in range(iters):
            q = self.q(self.norm_slots(slots)) * (self.sharpness * D ** -0.5)
            far = (self.grid[:, None] - place[:, None]).square().sum(-1)       # (B,N,K)
            near = -far[..., :-1] / (2 * self.radius**2)
            bias = torch.cat([near, self.everywhere.expand(*near.shape[:2], 1)], -1)
            attention = (k @ q.mT + bias).softmax(-1)                          # over SLOTS
            weight = attention / (attention.sum(1, keepdim=True) + 1e-8)
            update = (weight.mT @ v).view(B * K, D)
            slots = self.gru(update, slots.reshape(B * K, D)).view(B, K, D)
            slots = slots + self.mlp(self.norm_mlp(slots))
            place = weight.mT @ self.grid
        return torch.cat([slots, place], -1), attention


class PlacedFirst(nn.Module):
    """First slots (B,K,D+2): learned, at learned places that start apart."""
    def __init__(self, slots, dim):
        super().__init__()
        self.first = nn.Parameter(torch.randn(slots, dim))
        spots = [WHERE[j % len(WHERE)] for j in range(slots - 1)] + [(0.5, 0.5)]
        self.place = nn.Parameter(torch.tensor(spots))

    def forward(self, act, cue=None):
        return torch.cat([self.first, self.place], -1).expand(len(act), -1, -1)


class PlacedPredictor(nn.Module):
    """A residual MLP on what a slot holds; its place waits for the next attention."""
    def __init__(self, dim):
        super().__init__()
        self.content = savi.Predictor("mlp", dim)

    def forward(self, slots, act=None):
        return torch.cat([self.content(slots[..., :-2]), slots[..., -2:]], -1)


class Painter(nn.Module):
    """Contents (n,D) at positions u (n,cells,2) or (cells,2) -> (n,C,2 side,2 side): an MLP per
    cell, then bilinear enlargement and a convolution, which leave no checkerboard."""
    def __init__(self, side, dim, out, hidden, middle=16):
        super().__init__()
        self.side = side
        self.slot, self.position = nn.Linear(dim, hidden), nn.Linear(18, hidden, bias=False)
        self.net = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                 nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, middle))
        self.out = nn.Conv2d(middle, out, 3, padding=1)

    def forward(self, contents, u):
        x = self.net(self.slot(contents)[:, None] + self.position(waves(u)))
        x = x.mT.reshape(len(contents), -1, self.side, self.side)
        return self.out(F.interpolate(x, scale_factor=2, mode="bilinear").relu())


class PlacedSAVi(savi.SAVi):
    """savi.SAVi whose slots (..,K,D+2) end with a place; the last one is the background."""
    def __init__(self, args, radius, sharpness):
        size, dim, side = args.size, args.dim, args.size // 2
        encoder, decoder = savi.Encoder(size, 32), Painter(side, dim, 4, 64)
        tokens = math.isqrt(len(encoder.grid))
        attention = PlacedAttention(32, dim, tokens, radius, sharpness)
        super().__init__(PlacedFirst(args.slots, dim), encoder, attention, PlacedPredictor(dim),
                         decoder, iters=(3, 1))
        self.narrow, self.background = nn.Linear(dim, 4), Painter(side, 4, 4, 32)
        self.narrow.apply(savi.flax_init)
        self.background.apply(savi.flax_init)
        for painter, logit in ((decoder, 0.0), (self.background, math.log(args.slots - 1))):
            nn.init.zeros_(painter.out.weight[-1:])  # at first the background has half of a pixel
            nn.init.constant_(painter.out.bias[-1:], logit)
        self.register_buffer("grid", cells(side), persistent=False)
        encoder.position.requires_grad_(False)
        encoder.position.weight.zero_()
        for layer in encoder.conv[::2]:  # zeros would show where the picture ends
            layer.padding_mode = "replicate"
        gru = attention.gru              # as in Flax: variance 1 / fan-in, orthogonal, no bias
        for part in range(3):
            nn.init.normal_(gru.weight_ih[part * dim:(part + 1) * dim], std=dim ** -0.5)
            nn.init.orthogonal_(gru.weight_hh[part * dim:(part + 1) * dim])
        nn.init.zeros_(gru.bias_ih)
        nn.init.zeros_(gru.bias_hh)

    def decode(self, slots):
        """As savi.SAVi.decode."""
        lead, K = slots.shape[:-2], slots.shape[-2]
        slots = slots.flatten(0, -3)                                           # (n,K,D+2)
        content, place = slots[..., :-2], slots[..., -2:]
        u = self.grid - place[:, :-1, None]                                    # (n,K-1,cells,2)
        things = self.decoder(content[:, :-1].flatten(0, 1), u.flatten(0, 1))
        things = things.unflatten(0, (-1, K - 1))
        floor = self.background(self.narrow(content[:, -1]), 2 * self.grid - 1)
        x = torch.cat([things, floor[:, None]], 1).unflatten(0, lead)
        each, alpha = x[..., :-1, :, :], x[..., -1, :, :].softmax(-3)
        return (alpha.unsqueeze(-3) * each).sum(-4), alpha, each


# ----------------------------------------------------------------------------------- learning
def ramp(p, start, end):
    """0 before `start`, 1 after `end`, linear between; p, the share of the training, in [0, 1]."""
    return min(1.0, max(0.0, (p - start) / (end - start)))


def place_loss(model, video, act, area_weight):
    """Mean squared error, and the share of the picture that object slots paint."""
    picture, alpha, _ = model.decode(model(video, act)[1])
    recon, area = F.mse_loss(picture, video), alpha[..., :-1, :, :].sum(-3).mean()
    return recon + area_weight * area, dict(recon=recon.detach(), area=area.detach())


def train(model, clips, run, args, area):
    """Adam on place_loss; area: its weight in the second half."""
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], args.lr)
    run.keeps(facts=dict(args=asdict(args)), model=model, opt=opt)
    run.expects(update=args.updates)
    for step in run.steps("update", args.updates):
        torch.manual_seed(1_000_003 * args.seed + step)
        p, pairs = step / args.updates, args.batch * args.frames // 2
        shape = (pairs, 2) if p < 0.35 else (args.batch, args.frames)
        video, _, act, _ = clips.sample(*shape)

        loss, terms = place_loss(model, video, act, area * ramp(p, 0.45, 0.85))

        for group in opt.param_groups:
            group["lr"] = savi.warm_cosine(step, args.updates, args.lr)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        opt.step()
        run.note(terms, grad_norm=norm)


def place_work(name, cell, folder):
    """One training with places, or with savi.py's default."""
    if "area" not in cell:
        return work(name, cell, folder)
    args, device = savi.Args(**cell["args"]), choose_device(cell["args"]["device"])[0]
    torch.set_num_threads(args.threads)
    arrays, meta = savi.load_video(args)
    torch.manual_seed(args.seed)
    model = PlacedSAVi(args, cell["radius"], cell["sharpness"]).to(device)
    run = Run("savi", args, inside=Path(folder) / "trainings" / name)
    train(model, savi.Clips(arrays, savi.pick(arrays, 0), args, device), run, args,
          cell["area"])
    run.close()
    five = savi.Clips(arrays, savi.pick(arrays, 1, 5), args, device)
    savi.draw(model, five, meta["task_names"], run.dir)
    test = savi.Clips(arrays, savi.pick(arrays, 1, savi.EVAL_CLIPS), args, device)
    return dict(scores=savi.evaluate(model, test), train_seconds=round(run.seconds, 1),
                parameters=sum(p.numel() for p in model.parameters()))


# -------------------------------------------------------------------------------------- study
METRICS = ("fg_ari", "ari", "miou")
COLUMNS = {"": "", **savi.COLUMNS, "psnr": "PSNR", "pred_psnr": "PSNR predicted"}


def verdict_of(ours, theirs):
    """The rule above; scores of the same seeds."""
    if len(ours) < 3 or len(ours) != len(theirs):
        return "undecided: fewer than 3 seeds of both"
    wins = [[a[k] > b[k] for k in METRICS] for a, b in zip(ours, theirs)]
    if all(map(all, wins)):
        return "holds"
    return "fails" if any(not any(w) for w in zip(*wins)) else "undecided"


def kept_default(seeds):
    """{name: result} of savi.py's default as it was kept, for the seeds that are there."""
    cells = json.loads((common.RESULTS / "savi_objects.json").read_text())["cells"]
    return {f"default-{c['name']}": c for c in cells if c["seed"] in seeds}


def main(args):
    """Train both, compare; returns what results/savi_place.json holds."""
    args = replace(args, updates=40) if args.fast else args
    args, run = common.open_run("savi_place", args)
    todo = {}
    for seed in common.seeds_of(args):
        same = dict(seed=seed, decoder="mlp")
        flags = savi_args(args, batch=2, **({} if args.fast else dict(frames=8)), **same)
        todo[f"place-seed{seed}"] = dict(args=asdict(flags), radius=args.radius,
                                         sharpness=args.sharpness, area=args.area)
        if args.compare:
            updates = args.updates if args.fast else None
            todo[f"default-seed{seed}"] = asdict(savi_args(args, updates=updates, **same))
    clips, _ = test_clips(savi.Args(**todo[f"place-seed{args.seed}"]["args"]))
    baselines = savi.evaluate_baselines(clips)
    done = run_cells(place_work, todo, run.dir, workers_of(args), tell)

    rows = [{"": name, **scores} for name, scores in baselines.items()]
    if not args.compare:
        done = kept_default(common.seeds_of(args)) | done
    kinds = {kind: [r for name, r in done.items() if name.startswith(kind)]
             for kind in ("default", "place")}
    for kind, words in (("default", "SAVi, savi.py"), ("place", "slots with a place")):
        if kinds[kind]:
            rows.append(row_of(words, kinds[kind], COLUMNS))
    common.show(rows, COLUMNS)
    verdict = verdict_of(*([r["scores"] for r in kinds[k]] for k in ("place", "default")))
    print(f"\nslots with a place are better in FG-ARI, ARI and mIoU in every seed: {verdict}")
    picture = run.dir / "trainings" / f"place-seed{args.seed}" / "slots.png"
    (run.dir / "slots.png").write_bytes(picture.read_bytes())
    result = dict(baselines=baselines, cells=done, verdict=verdict)
    return common.finish(run, "savi_place", result, ["slots.png"])


if __name__ == "__main__":
    common.command(Args, __doc__, main)
