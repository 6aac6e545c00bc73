"""Video of human motion for SAVi: render the poses that MoCapAct stores, of the CMU humanoid.

    python -m studies.mocapact --src data/mocapact       # -> runs/video/mocapact; minutes per file
    python -m studies.mocapact --fast                    # the same with poses that are made up
    python savi.py --task runs/video/mocapact

Poses and not actions are replayed: actions drift with the version of the simulator. Subjects are
split 70-20-10. Files: CMU_*.hdf5 of huggingface.co/datasets/microsoft/mocapact-data.
"""
import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

import data
from envs import choose_gl
from studies.scenes import Humanoid

LAYOUT = ("<snippet>/0/observations/proprioceptive (L+1,2868), <snippet>/0/actions (L,56), "
          "observable_indices/walker")


class Posed(Humanoid):
    """The humanoid where its stored poses put it."""
    kind, free, task_names = "mocapact", True, ("mocapact",)


def mocapact_splits(names):
    """{clip: 0 train, 1 test, 2 validation} for names like CMU_009_12.

    By subject, because snippets overlap; in the order of a hash, to the split that lacks most."""
    subjects = {}
    for name in names:
        subjects.setdefault(name.split("_")[1], []).append(name)
    have, out = [0, 0, 0], {}
    for s in sorted(subjects, key=lambda s: hashlib.sha256(s.encode()).hexdigest()):
        lacks = np.array((0.7, 0.2, 0.1)) * len(names) - have
        k = int(lacks.argmax())
        have[k] += len(subjects[s])
        out |= dict.fromkeys(subjects[s], k)
    return out


def joints_of(model):
    """Names of the 56 angles in the order of the files: alphabetical."""
    hinges = np.flatnonzero(model.jnt_type == 3).tolist()
    return sorted(model.joint(i).name.removeprefix("walker0/") for i in hinges)


def made_up(path, model, L=30):
    """A file in the published layout with random poses, and action i full of i; returns qpos (L+1,
    63)."""
    import mujoco
    rng, proprio = np.random.default_rng(0), np.zeros((L + 1, 2868), np.float32)
    columns = {"joints_pos": np.arange(91, 147), "orientation": np.arange(259, 268),
               "position": np.arange(268, 271)}
    low, high = model.jnt_range[model.jnt_type == 3].T
    qpos = np.zeros((L + 1, model.nq))
    qpos[:, :3] = rng.normal(size=(L + 1, 3)) * 0.1 + (0, 0, 1)
    qpos[:, 3:7] = rng.normal(size=4)
    qpos[:, 3:7] /= np.linalg.norm(qpos[0, 3:7])
    qpos[:, 7:] = rng.uniform(low, high, (L + 1, 56))
    proprio[:, columns["position"]], matrix = qpos[:, :3], np.zeros(9)
    for row, q in zip(proprio, qpos):
        mujoco.mju_quat2Mat(matrix, q[3:7])
        row[columns["orientation"]] = matrix
    for column, name in zip(columns["joints_pos"], joints_of(model)):
        proprio[:, column] = qpos[:, model.joint(f"walker0/{name}").qposadr[0]]
    with h5py.File(path, "w") as f:
        for name, c in columns.items():
            f[f"observable_indices/walker/{name}"] = c
        roll = f.create_group(f"{Path(path).stem}-0-{L}/0")
        roll["observations/proprioceptive"] = proprio
        roll["actions"] = np.arange(L)[:, None] * np.ones((L, 56), np.float32)
    return qpos


def mocapact_qpos(proprio, indices, joints, model):
    """qpos (L+1, 63) of stored observations (L+1, 2868): root pose, and 56 angles placed by name.

    indices: {observable: columns}, as in the file; joints: names of the angles, alphabetical."""
    import mujoco
    qpos = np.zeros((len(proprio), model.nq))
    qpos[:, :3] = proprio[:, indices["position"]]
    for row, matrix in zip(qpos, proprio[:, indices["orientation"]].astype(np.float64)):
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, matrix)
        row[3:7] = quat
    for column, name in zip(np.asarray(indices["joints_pos"]), joints):
        qpos[:, model.joint(f"walker0/{name}").qposadr[0]] = proprio[:, column]
    return qpos


def read_rollouts(file, most):
    """(indices, [(observations (L+1,2868), actions (L,56))]), at most `most` of each snippet.
    SystemExit: another layout."""
    try:
        with h5py.File(file, "r") as f:
            names = "position", "orientation", "joints_pos"
            indices = {k: f[f"observable_indices/walker/{k}"][:] for k in names}
            rolls = []
            for snippet in (f[s] for s in sorted(f) if s.startswith("CMU_")):
                for r in sorted((x for x in snippet if x.isdigit()), key=int)[:most]:
                    roll = snippet[r]
                    rolls.append((roll["observations/proprioceptive"][:], roll["actions"][:]))
        bad = [(o.shape, a.shape) for o, a in rolls if o.ndim != 2 or a.shape != (len(o) - 1, 56)]
        if not rolls or bad or [len(x) for x in indices.values()] != [3, 9, 56]:
            raise KeyError(f"{len(rolls)} rollouts, shapes {bad[:1]}")
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as e:
        raise SystemExit(f"{file} has not the layout of MoCapAct ({str(e)[:120]}): expected "
                         f"{LAYOUT}") from None
    return indices, rolls


def pose_clip(scene, qpos, frames, stride):
    """One clip of the poses `frames`; the camera stands still, so that flow is the body's own."""
    scene.look((*qpos[frames, :2].mean(0), 1.0), 3.4, -8, 180)
    shots = []
    for t in [max(0, frames[0] - stride), *frames]:
        before = scene.data.geom_xpos.copy(), scene.data.geom_xmat.copy()
        scene.data.qpos[:] = qpos[t]
        scene.mj.mj_forward(scene.model, scene.data)
        if t >= frames[0]:
            shots.append(scene.shoot(before))
    return {k: np.stack([s[k] for s in shots]) for k in shots[0]}


def render_file(path, recipe, file, split):
    """One file of MoCapAct -> one file of a cache."""
    scene = Posed(recipe["color"], recipe["floor"])
    m, length, stride = scene.model, recipe["frames"], recipe["stride"]
    joints = joints_of(m)
    indices, rolls = read_rollouts(file, recipe["rollouts"])
    scene.open(recipe["size"])
    clips, rng = [], np.random.default_rng(0)
    for obs, act in rolls:
        qpos = mocapact_qpos(obs, indices, joints, m)
        # actions[i] leads from observation i to i+1: it belongs to frame i+1, and frame 0 has none
        frames = np.arange(1, len(obs), stride)
        for a in range(0, len(frames) - length + 1, length):
            scene.dress(rng)
            chosen = frames[a:a + length]
            clips.append({**pose_clip(scene, qpos, chosen, stride), "split": np.uint8(split),
                          "actions": act[chosen - 1].astype(np.float32), "task": np.int16(0)})
    scene.renderer.close()
    if not clips:
        raise SystemExit(f"{file} has no rollout of {length} frames at stride {stride}: expected "
                         "longer ones; type a smaller --frames")
    source = f"MoCapAct {file.name}"
    data.save_part(path, scene, recipe, clips, fps=round(33 / stride), source=source)


def render_mocapact(src, folder, frames=24, size=64, stride=2, rollouts=1, color="default",
                    workers=1):
    """Render the poses stored in src/CMU_*.hdf5 into folder/part_*.h5, one per file: {clip: split}.

    The same call continues where a killed one was; data.open_video(folder) reads the result.
    SystemExit: no such files, another layout, rollouts shorter than a clip."""
    files = sorted(Path(src).glob("CMU_*.hdf5"))
    if not files:
        raise SystemExit(f"no CMU_*.hdf5 in {src}: download some of "
                         "huggingface.co/datasets/microsoft/mocapact-data")
    recipe = dict(kind="mocapact", frames=frames, size=size, color=color, floor="plain",
                  stride=stride, rollouts=rollouts)
    splits = mocapact_splits([file.stem for file in files])
    parts = {f"part_{file.stem}.h5": (1, (file, splits[file.stem])) for file in files}
    data.fill_cache(folder, recipe, render_file, parts, workers)
    return splits


@dataclass
class Args:
    src: str = "data/mocapact"
    """folder with MoCapAct's CMU_*.hdf5"""
    folder: str = "runs/video/mocapact"
    """where the cache goes"""
    frames: int = 24
    """frames per clip"""
    size: int = 64
    """pixels"""
    stride: int = 2
    """simulated steps (of 30 ms) from frame to frame"""
    rollouts: int = 1
    """roll-outs of every snippet"""
    color: str = "default"
    """parts: each part its own colour; default: tan; random: each clip one colour"""
    workers: int = 1
    """processes, one file each"""
    fast: bool = False
    """a temporary file of random poses instead of --src, small frames"""


def main(args):
    """Render, and say what there is: {clips, splits, folder}."""
    data.check_ranges(args, dict(frames=(2, None), size=(16, 512), stride=(1, None),
                                 rollouts=(1, None), workers=(1, None)))
    if args.fast:
        choose_gl()  # before mujoco is imported
        with tempfile.TemporaryDirectory() as folder:
            made_up(Path(folder) / "CMU_001_01.hdf5", Posed("default", "plain").model)
            small = dict(src=folder, folder=f"{folder}/cache", frames=6, size=32, fast=False)
            return main(replace(args, **small))
    splits = render_mocapact(args.src, args.folder, args.frames, args.size, args.stride,
                             args.rollouts, args.color, args.workers)
    clips = len(data.open_video(args.folder)[0]["video"])
    names = ("train", "test", "validation")
    files = {name: list(splits.values()).count(i) for i, name in enumerate(names)}
    print(f"{clips} clips of {args.frames} frames in {args.folder}; files: {files}")
    return dict(clips=clips, splits=files, folder=args.folder)


if __name__ == "__main__":
    main(data.parse(Args, __doc__))
