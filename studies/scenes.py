"""Video for SAVi in which actions move parts: three pushed bodies, a humanoid, a crowd.

    python savi.py --task studies.scenes:Pushed        # or :Humanoid, :Crowd

A scene is a subclass of data.Scene; data.make_video(folder, "studies.scenes:Pushed", 500, 12) films
it. Every clip holds a counterfactual: a frame as it would be, had one group of actions been others.

    python -m studies.scenes        # all scenes and their masks, runs/scenes.png, in a minute
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import PALETTE, TAN, Objects, Scene, parse

HUMANOID_PARTS = ("torso", "left arm", "right arm", "left leg", "right leg")
FAMILIES = ("all", "arms", "legs", "left", "right", "torso",  # six smooth random ones
            "wave", "walk", "jumping-jack", "kick")
MOVING = {"arms": (2, 3), "legs": (4, 5), "left": (2, 4), "right": (3, 5), "torso": (1,),
          "wave": (3,), "walk": (2, 3, 4, 5), "jumping-jack": (2, 3, 4, 5), "kick": (5,)}
REACH = {"humerus": 0.9, "radius": 0.9, "femur": 0.7, "tibia": 0.7, "clavicle": 0.4, "foot": 0.4,
         "back": 0.25, "thorax": 0.25, "head": 0.25}  # fingers, wrists, toes and neck stay still


def humanoid_part(name):
    """1..5 for a body, joint or actuator of the CMU humanoid: which of HUMANOID_PARTS."""
    name = name.split("/")[-1]
    arms = ("clavicle", "humerus", "radius", "wrist", "hand", "finger", "thumb")
    if any(x in name for x in arms):
        return 2 + (name[0] == "r")
    return 4 + (name[0] == "r") if any(x in name for x in ("femur", "tibia", "foot", "toes")) else 1


def smooth(rng, n, m, every):
    """(n, m) commands in [-1, 1]: a new target every few frames, cosines between them."""
    keys = rng.uniform(-1, 1, (n // every + 2, m))
    t = np.arange(n) / every
    i, w = t.astype(int), (1 - np.cos(np.pi * (t % 1))) / 2
    return keys[i] * (1 - w[:, None]) + keys[i + 1] * w[:, None]


class Acted(Scene):
    """A scene with actions: it can film what would have been."""

    def redraw(self, rng):
        """(m,) other commands."""
        return rng.uniform(-1, 1, len(self.action_names))

    def branch(self, rng, group, actions):
        """The last of the next frames, had the actions of `group` been others; then goes back."""
        kind = self.mj.mjtState.mjSTATE_INTEGRATION
        saved = np.empty(self.mj.mj_stateSize(self.model, kind))
        self.mj.mj_getState(self.model, self.data, saved, kind)
        other = actions.copy()
        other[:, self.groups[group]] = self.redraw(rng)[self.groups[group]]
        for action in other:
            self.advance(action)
        self.mj.mj_forward(self.model, self.data)
        frame = self.rgb()
        self.mj.mj_setState(self.model, self.data, saved, kind)
        self.mj.mj_forward(self.model, self.data)
        return {"fork_frame": frame, "fork_actions": other.astype(np.float32),
                "fork_group": np.int16(group)}


class Pushed(Acted):
    """Sphere, box and cylinder on a table; two actions push each: who moves what is known."""
    kind, part_names, groups = "pushed", ("sphere", "box", "cylinder"), [[0, 1], [2, 3], [4, 5]]
    action_names = ("sphere x", "sphere y", "box x", "box y", "cylinder x", "cylinder y")

    def __init__(self, color, floor):
        super().__init__(color, floor)
        bodies = "".join(
            f'<body pos="0 0 .4"><joint name="{shape}x" type="slide" axis="1 0 0" range="-1.4 1.4" '
            f'limited="true" damping="2"/><joint name="{shape}y" type="slide" axis="0 1 0" '
            f'range="-1.1 1.1" limited="true" damping="2"/><geom type="{shape}" size=".4 .38 .36" '
            'mass="1" friction="0"/></body>' for shape in self.part_names)
        joints = [name.replace(" ", "") for name in self.action_names]
        motor = '<motor joint="{}" gear="12" ctrlrange="-1 1"/>'
        self.build(bodies, "".join(motor.format(joint) for joint in joints))
        self.parts = np.arange(self.model.ngeom, dtype=np.uint8)  # geom 0 is the floor
        self.model.geom_contype[0] = self.model.geom_conaffinity[0] = 0

    def start(self, rng, clip, n):
        """Three places on the table, smooth random pushes."""
        self.mj.mj_resetData(self.model, self.data)
        for i, color in enumerate(PALETTE[[0, 1, 3]] if self.color == "parts" else [TAN] * 3):
            self.paint(1 + i, color)
        spots = np.stack([np.repeat((-1.1, 0, 1.1), 2), np.tile((-0.8, 0.8), 3)], 1)
        where = spots[rng.permutation(6)[:3]] + rng.uniform(-0.25, 0.25, (3, 2))
        self.data.qpos[:] = where.ravel()
        self.look((0, 0, 0.1), 5.1, -40, 90)
        return 0, smooth(rng, n, 6, 4)


class Humanoid(Acted):
    """dm_control's CMU humanoid with 56 servos, ten families of motion.

    It hangs in the air without gravity and contacts, so that every action has a local, repeatable
    effect and nothing falls; with `free` it can be placed anywhere.  color random: one per body."""
    kind, fps, substeps, count, free = "humanoid", 33, 6, 1, False  # substeps of 5 ms: 33 frames/s
    task_names, part_names = FAMILIES, HUMANOID_PARTS

    def __init__(self, color, floor):
        super().__init__(color, floor)
        from dm_control import mjcf
        from dm_control.locomotion.arenas.floors import Floor
        from dm_control.locomotion.walkers.cmu_humanoid import CMUHumanoidPositionControlledV2020
        arena = Floor((8, 8))
        for i in range(self.count):
            walker = CMUHumanoidPositionControlledV2020(name=f"walker{i}")
            frame = arena.attach(walker)
            if self.free:
                walker.create_root_joints(frame)
            else:
                frame.pos = 0, 1.2 * (i - (self.count - 1) / 2), 1.143  # 1.2 m apart
                frame.quat = 0.859, 1, 1, 0.859
        self.physics = mjcf.Physics.from_mjcf_model(arena.mjcf_model)
        self.model, self.data = m, _ = self.physics.model.ptr, self.physics.data.ptr
        m.opt.timestep = 0.005
        m.opt.gravity[:] = 0
        m.opt.disableflags |= int(self.mj.mjtDisableBit.mjDSBL_CONTACT)
        self.label()
        low, high = m.jnt_range[m.actuator_trnid[:, 0]].T
        self.neutral = -(high + low) / (high - low)  # the command of angle 0
        if floor == "plain":
            self.paint(np.flatnonzero(self.walker == 0), (0.45, 0.5, 0.55))

    def label(self):
        """Which walker and part every geom and action belongs to."""
        m = self.model
        body = [m.body(b).name for b in m.geom_bodyid]
        walker = [int(x[6]) + 1 if x.startswith("walker") else 0 for x in body]
        self.walker = np.array(walker, np.uint8)
        parts = [humanoid_part(x) if w else 0 for x, w in zip(body, walker)]
        self.parts = np.array(parts, np.uint8)
        self.roots = [m.body(f"walker{i}/").id for i in range(self.count)]
        names = [m.actuator(i).name for i in range(m.nu)]
        self.action_names = tuple(x.removeprefix("walker0/") for x in names)
        self.bases = [x.split("/")[-1] for x in names]
        self.part_of_action = np.array([humanoid_part(x) for x in names])
        self.scale = np.array([next((s for k, s in REACH.items() if k in x), 0.0) for x in names])
        self.groups = [np.flatnonzero(self.part_of_action == p).tolist() for p in range(1, 6)]

    def split_of(self, clip):
        """By family of motion, so that the test is on new ones."""
        return {"jumping-jack": 1, "kick": 1, "torso": 2}.get(FAMILIES[clip % len(FAMILIES)], 0)

    def redraw(self, rng):
        """(m,) commands of another pose."""
        return np.clip(self.neutral + self.scale * rng.uniform(-1, 1, len(self.scale)), -1, 1)

    def motion(self, rng, family, n):
        """(n, m) servo commands of one family of motion."""
        part = self.part_of_action
        if family in FAMILIES[:6]:
            drive = smooth(rng, n, len(part), 8)
        else:  # sinusoids; a pair of limbs shares weights, mirrored about all axes but the first
            limbs = [x[1:] if p > 1 else x for x, p in zip(self.bases, part)]
            shared = {x: rng.uniform(0.4, 1) * rng.choice((-1, 1)) for x in dict.fromkeys(limbs)}
            right = np.isin(part, (3, 5))
            mirrored = right & ~np.array([x.endswith("rx") for x in self.bases])
            weight = np.array([shared[x] for x in limbs]) * np.where(mirrored, -1, 1)
            phase = rng.uniform(0, 2 * np.pi) + np.pi * right * (family == "walk")
            drive = weight * np.sin(2 * np.pi * np.arange(n)[:, None] / rng.uniform(12, 24) + phase)
        moving = np.isin(part, MOVING.get(family, (1, 2, 3, 4, 5)))
        return np.clip(self.neutral + self.scale * moving * drive, -1, 1)

    def dress(self, rng):
        """Colours: of parts, or one for each body, drawn anew."""
        tint = PALETTE[rng.permutation(len(PALETTE))]
        for w in range(len(self.roots)):
            one = TAN if self.color == "default" else tint[w]
            for p in range(5):
                mine = np.flatnonzero((self.walker == w + 1) & (self.parts == p + 1))
                self.paint(mine, PALETTE[[0, 1, 2, 3, 5]][p] if self.color == "parts" else one)

    def start(self, rng, clip, n):
        """A family of motion by the number of the clip; a camera somewhere in front."""
        self.mj.mj_resetData(self.model, self.data)
        task, crowd = clip % len(FAMILIES), self.count > 1
        self.dress(rng)
        if crowd:  # two or three of them: the last one waits far away
            self.model.body_pos[self.roots[-1], 0] = 0 if rng.random() < 0.5 else -60
        at = np.array((0, 0, 1.05)) + rng.uniform(-0.15, 0.15, 3)
        distance = rng.uniform(2.6, 3.4) * (1.4 if crowd else 1)
        self.look(at, distance, -8, 180 + rng.uniform(-40, 40))
        actions = self.motion(rng, FAMILIES[task], n + 4)
        for action in actions[:4]:  # leave the first pose before the camera starts
            self.advance(action)
        return task, actions[4:]


class Crowd(Humanoid):
    """Two or three humanoids side by side; groups and masks (`inst`) are bodies."""
    kind, count = "crowd", 3

    def label(self):
        """Groups per body, to agree with the masks that slots are compared with."""
        super().label()
        self.inst = self.walker
        body = np.array([int(self.model.actuator(i).name[6]) for i in range(self.model.nu)])
        self.groups = [np.flatnonzero(body == w).tolist() for w in range(self.count)]


@dataclass
class Args:
    file: str = "runs/scenes.png"
    """where the picture goes"""
    size: int = 96
    """pixels of one frame"""
    fast: bool = False
    """two frames of 32 pixels"""


def main(args):
    """Films one clip of every scene: {kind: actions}; rows: frames, then their masks."""
    import imageio.v3 as imageio

    from envs import choose_gl
    choose_gl()
    rows, result = [], {}
    for make in (Objects, Pushed, Humanoid, Crowd):
        scene = make("random" if make is Crowd else "parts", "plain")
        scene.open(32 if args.fast else args.size)
        film = scene.film(np.random.default_rng(0), 7, 2 if args.fast else 8)
        scene.renderer.close()
        colors = (np.concatenate([np.zeros((1, 3)), PALETTE]) * 255).astype(np.uint8)
        masks = colors[film.get("inst", film["seg"])]
        rows += [np.concatenate(list(film["video"]), 1), np.concatenate(list(masks), 1)]
        result[scene.kind] = len(scene.action_names)
    Path(args.file).parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(args.file, np.concatenate(rows))
    print(", ".join(f"{kind}: {n} actions" for kind, n in result.items()), "->", args.file)
    return result


if __name__ == "__main__":
    main(parse(Args, __doc__))
