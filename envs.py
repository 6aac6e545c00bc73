"""Tasks: names, constructors, dimensions, scores and parallel roll-outs.  Copy me next to any of the scripts.

    env = make_env("walker-walk", seed=0)          # or "mw-reach", "Pendulum-v1", "my_module:Id-v0"
    env = make_env("Boxing", obs="pixels")         # an Atari game: discrete actions, 64 x 64 RGB
    env = make_env("ant")                          # a body of LOCOMOTION; "ball-wall", "double-pendulum": toys
    with Herd("ant", 64) as herd:                  # 64 of them stepping together on all cores, no processes
        obs = herd.reset()                        # Flock: the same for any other task, without the speed
    state = plant("planar-hopper").step(state, act)   # differentiable dynamics in torch
    with Workers(2) as workers:                    # batched roll-outs in two processes
        episodes = workers.rollout([("walker-walk", 0), ("cup-spin", 1)], policy)

`python envs.py [TASK ...]` prints agent steps per second for one task of each domain, `python envs.py locomotion` those
of Herd.

Vocabulary: O observation size, A action size, T agent steps of an episode, n environments stepping together.
An agent step is `action_repeat` control steps with the same action and the summed reward.
MT30 and MT80 are the task sets of TD-MPC2 (Hansen et al., 2024) in its order: the position is the task id.
"""
import contextlib
import difflib
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing.connection
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium
import numpy as np


class Facts(NamedTuple):
    """Sizes of a task, the scale of its score, and whether its episodes may end by themselves."""
    obs_dim: int                                  # O, also when the environment is asked for pixels
    act_dim: int                                  # A
    episode_length: int                           # agent steps until truncation
    action_repeat: int                            # control steps per agent step
    scale: float | None = None                    # return that scores 1; 0.0: success is the score; None: the return is
    ends: bool = True                             # may be terminated before the time limit

    def __iter__(self):                           # for the time of the move: four fields are unpacked in places
        return iter(self[:4])


# -------------------------------------------------------------------------------- task tables
_MT30_DIMS = {                                    # name: (O, A); a static table, so that asking costs nothing
    "walker-stand": (24, 6), "walker-walk": (24, 6), "walker-run": (24, 6), "cheetah-run": (17, 6),
    "reacher-easy": (6, 2), "reacher-hard": (6, 2), "acrobot-swingup": (6, 1), "pendulum-swingup": (3, 1),
    "cartpole-balance": (5, 1), "cartpole-balance-sparse": (5, 1), "cartpole-swingup": (5, 1),
    "cartpole-swingup-sparse": (5, 1), "cup-catch": (8, 2), "finger-spin": (9, 2),
    "finger-turn-easy": (12, 2), "finger-turn-hard": (12, 2), "fish-swim": (24, 5), "hopper-stand": (15, 4),
    "hopper-hop": (15, 4), "walker-walk-backwards": (24, 6), "walker-run-backwards": (24, 6),
    "cheetah-run-backwards": (17, 6), "cheetah-run-front": (17, 6), "cheetah-run-back": (17, 6),
    "cheetah-jump": (17, 6), "hopper-hop-backwards": (15, 4), "reacher-three-easy": (8, 3),
    "reacher-three-hard": (8, 3), "cup-spin": (8, 2), "pendulum-spin": (3, 1)}
MT30 = tuple(_MT30_DIMS)
METAWORLD50 = tuple("mw-" + name for name in (
    "assembly", "basketball", "button-press-topdown", "button-press-topdown-wall", "button-press",
    "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn", "disassemble",
    "door-open", "door-close", "drawer-close", "drawer-open", "faucet-open", "faucet-close", "hammer",
    "handle-press-side", "handle-press", "handle-pull-side", "handle-pull", "lever-pull", "peg-insert-side",
    "peg-unplug-side", "pick-out-of-hole", "pick-place", "pick-place-wall", "plate-slide", "plate-slide-side",
    "plate-slide-back", "plate-slide-back-side", "push-back", "push", "push-wall", "reach", "reach-wall",
    "shelf-place", "soccer", "stick-push", "stick-pull", "sweep-into", "sweep", "window-open", "window-close",
    "bin-picking", "box-close", "door-lock", "door-unlock", "hand-insert"))
MT80 = MT30 + METAWORLD50
MT10 = tuple("mw-" + name for name in (           # Meta-World's own set of ten
    "reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close", "button-press-topdown",
    "peg-insert-side", "window-open", "window-close"))
ATARI_SCORES = {                                  # of a random policy and of a human tester (Mnih et al., 2015)
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0), "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5), "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8), "CrazyClimber": (10780.5, 35829.4), "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5), "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8), "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5), "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6), "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0), "Seaquest": (68.4, 42054.7), "UpNDown": (533.4, 11693.2)}
ATARI26 = tuple(ATARI_SCORES)                     # the 26 games of the Atari-100k benchmark
_LOCOMOTION_DIMS = {"hopper": (11, 3), "ant": (37, 8), "anymal": (49, 12), "humanoid": (76, 21),
                    "muscle-humanoid": (53, 152),     # PWM's single tasks (Sec. 4.1), here on MuJoCo
                    "planar-hopper": (11, 3), "stiff-hopper": (11, 3)}                # the hopper on PlanarHopper
LOCOMOTION = tuple(_LOCOMOTION_DIMS)
_TOY_FACTS = {"ball-wall": (1, 1, 1, 1), "double-pendulum": (6, 1, 240, 1)}
TOY = tuple(_TOY_FACTS)                           # PWM's two examples (Sec. 3), differentiable: see plant
SUITES = {"mt30": MT30, "mt80": MT80}             # names of task sets


def task_facts(task):
    """Facts of a task. Those of our own lists come from tables; any other task is made once to be measured."""
    if task in _MT30_DIMS:
        return Facts(*_MT30_DIMS[task], 500, 2, 1000.0, False)
    if task in LOCOMOTION:
        return Facts(*_LOCOMOTION_DIMS[task], 1000, 1)
    if task in TOY:
        return Facts(*_TOY_FACTS[task], None, task == "ball-wall")
    if task in METAWORLD50:
        return Facts(39, 4, 100, 2, 0.0, False)
    family = _registered(task)
    return family.facts if family else _measured_facts(task)


@functools.cache
def _measured_facts(task):
    env = make_env(task)
    env.close()
    return env.facts


def score(task, ret, success):
    """Score of an episode in [0, 1] as in TD-MPC2: success for `mw-` tasks, return / 1000 for dm_control. For Atari
    the human-normalised score: 0 a random policy, 1 a human tester.

    Gymnasium ids, LOCOMOTION and TOY have no published scale: the return comes back as it is, also outside [0, 1]."""
    if (game := task.partition("@")[0]) in ATARI_SCORES:
        random, human = ATARI_SCORES[game]
        return (float(ret) - random) / (human - random)
    scale = task_facts(task).scale
    if scale is None:
        return float(ret)
    return float(ret) / scale if scale else float(success)


class _Family(NamedTuple):
    facts: Facts
    make: object
    batch: object


_FAMILIES = {}


def register(name, facts, make, batch=None):
    """Add a task of your own, called "module:rest" after the module whose import registers it.

    facts: Facts. make(seed, obs) -> gymnasium.Env. batch(n, seed, workers) -> n of them side by side, see beside;
    None: as many single ones. SystemExit: a name without a module, or facts that are no Facts."""
    if ":" not in name or not isinstance(facts, Facts):
        raise SystemExit(f"register got the name {name!r} and facts {facts!r}; expected 'module:name' of the module that "
                         "registers it, and Facts(obs_dim, act_dim, episode_length, action_repeat, scale, ends)")
    _FAMILIES[name] = _Family(facts, make, batch)


def _registered(task):
    """The family of a task "module:rest", whose module is imported first; None if it registered no such name."""
    if task not in _FAMILIES and ":" in task:
        with contextlib.suppress(ImportError):
            importlib.import_module(task.partition(":")[0])
    return _FAMILIES.get(task)


def beside(task, n, seed=0, workers=1):
    """n environments of a task side by side: its registered batch, otherwise a Flock. All have

    reset() -> obs (n, O); step(act (n, A)) -> obs, rew, terminated, truncated, last (obs before a restart);
    state_dict() -> {name: array}; load_state_dict(state) -> obs, from where it goes on with the same steps; close()."""
    if task in LOCOMOTION:
        return Herd(task, n, seed, workers)
    family = _registered(task)
    return family.batch(n, seed, workers) if family and family.batch else Flock(task, n, seed)


def _is_gymnasium_id(task):
    return ":" in task or task in gymnasium.registry


def _unknown(task):
    suite = (f"{domain}-{name.replace('_', '-')}" for domain, name in _import_suite().ALL_TASKS)
    near = difflib.get_close_matches(task, dict.fromkeys([*MT80, *ATARI26, *LOCOMOTION, *TOY, *suite,
                                                          *gymnasium.registry]), 3, 0.4)
    return SystemExit(f"unknown task {task!r}: expected an MT30/MT80/ATARI26/LOCOMOTION name, a dm_control "
                      "'domain-task' or a gymnasium id ('module:Id-v0' for your own); nearest: "
                      f"{', '.join(near) or 'none'}")


# -------------------------------------------------------------------------------- constructors
def make_env(task, seed=0, obs="state", size=64, **options):
    """Make one environment, a gymnasium.Env that passes gymnasium's check_env.

    task: a name of MT30 or MT80; a dm_control suite task as `domain-task` (the first '-' ends the domain, the
      others stand for '_', 'cup' is ball_in_cup: `point_mass-easy`, `finger-turn-hard`); or a registered
      gymnasium id with a continuous Box action space (`Pendulum-v1`; `module:Id-v0` imports `module`).
      Or an Atari game of ATARI26 by its bare name, with 18 discrete actions and obs="pixels" (see _Atari);
      `Breakout@m4d1` is the game in the ALE's mode 4 and difficulty 1.
      Or a body of LOCOMOTION (see _Body), or an example of TOY (see plant).
    seed: of the first reset; `reset(seed=s)` fixes all that is random in an episode.
    obs: "state" gives float32 (O,); "pixels" gives uint8 (size, size, 3) and needs OpenGL.
    options: of Atari: sticky, life_loss, noop, frame_cap; of Meta-World: camera, repeat, length.
    Actions are float32 (A,) in [-1, 1], rescaled to the task's own bounds where these are finite.

    Episodes: dm_control repeats each action twice, is truncated after 500 agent steps and never terminated;
    Meta-World repeats twice, is truncated after 100, and draws a new goal at each reset; bodies of LOCOMOTION take
    1000 steps of 1/60 s unless they fall (terminated); a gymnasium id is not repeated and keeps its own limit
    (1000 steps if it has none). `info["success"]` is a float, 0.0 where
    the task has no such notion.
    Errors: SystemExit with one sentence for an unknown task, a missing package, discrete actions, no OpenGL,
    or (while stepping) a number that is not finite."""
    if obs not in ("state", "pixels"):
        raise SystemExit(f"make_env got obs={obs!r}; expected 'state' or 'pixels'")
    atari = task.partition("@")[0] in ATARI26
    if obs == "pixels" and not atari:             # an emulator draws without OpenGL
        choose_gl()
    if atari:
        return _Atari(task, seed, obs, size, **options)
    if task.startswith("mw-"):
        return _MetaWorld(task, seed, obs, size, **options)
    if options:
        raise SystemExit(f"make_env got {', '.join(options)} for {task!r}; expected no options for this kind of task")
    if family := _registered(task):
        return _Own(task, family, seed, obs, size)
    own = _Walker if task in LOCOMOTION else _Toy if task in TOY else _Gymnasium
    return (own if own is not _Gymnasium or _is_gymnasium_id(task) else _Suite)(task, seed, obs, size)


class _Env(gymnasium.Env):
    """What all tasks share. A subclass sets _env, calls _setup, and defines _restart, _advance and _frame."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}        # noqa: RUF012 (gymnasium's own way)
    render_mode = "rgb_array"

    def _setup(self, task, seed, obs, size, facts):
        self.task, self.facts, self.t = task, facts, 0
        self._first_seed, self._size = seed, size if obs == "pixels" else None
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (facts.act_dim,), np.float32)
        self.observation_space = (
            gymnasium.spaces.Box(-np.inf, np.inf, (facts.obs_dim,), np.float32) if obs == "state" else
            gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8))

    def reset(self, *, seed=None, options=None):
        """Start an episode -> obs, {"success": 0.0}. The same seed and actions give the same episode."""
        if seed is None:                          # the constructor's seed counts for the first episode only
            seed = self._first_seed
        self._first_seed = None
        super().reset(seed=seed)
        self.t = 0
        return self._observe(self._restart(seed)), {"success": 0.0}

    def step(self, action):
        """One agent step -> obs, summed reward, terminated, truncated (time limit), {"success": float}."""
        action = np.minimum(np.maximum(np.asarray(action, np.float32), -1.0), 1.0)    # np.clip is 4x slower
        if not math.isfinite(action.sum()):       # one bad entry spoils the sum
            raise SystemExit(f"{self.task}: the policy gave a non-finite action {action} at agent step "
                             f"{self.t} of an episode; expected numbers in [-1, 1]")
        obs, rew, terminated, truncated, success = self._advance(action)
        if not math.isfinite(rew):
            raise self._broken("reward")
        self.t += 1
        truncated = bool(truncated) or (self.t >= self.facts.episode_length and not terminated)
        return self._observe(obs), float(rew), bool(terminated), truncated, {"success": float(success)}

    def render(self):
        """One frame, uint8 (height, width, 3)."""
        choose_gl()
        return self._frame()

    def close(self):
        """Free the simulation."""
        self._env.close()

    def _observe(self, obs):
        if self._size:                            # nearest pixels: a gymnasium id fixes its own frame size
            frame = self._frame()
            rows, cols = (np.arange(self._size) * n // self._size for n in frame.shape[:2])
            return frame[rows][:, cols]
        obs = np.asarray(obs, np.float32)
        if not math.isfinite(obs.sum()):
            raise self._broken("observation")
        return obs

    def _broken(self, what):
        return SystemExit(f"{self.task}: the environment gave a non-finite {what} at agent step {self.t} of "
                          "an episode; expected finite numbers: check its dynamics and reward")


def _rescale(low, high):
    """(centre, half width) that map [-1, 1] to finite bounds and leave unbounded entries alone."""
    finite = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):
        return np.where(finite, (low + high) / 2, 0.0), np.where(finite, (high - low) / 2, 1.0)


class _Suite(_Env):
    """A dm_control suite task, or one of the 11 that TD-MPC2 added (see _CUSTOM)."""

    def __init__(self, task, seed, obs, size):
        suite = _import_suite()
        if task in _CUSTOM:
            env = _CUSTOM[task](suite, seed)
        else:
            domain, _, name = task.partition("-")
            domain, name = {"cup": "ball_in_cup"}.get(domain, domain), name.replace("-", "_")
            if (domain, name) not in suite.ALL_TASKS:
                raise _unknown(task)
            env = suite.load(domain, name, task_kwargs={"random": seed})
        self._env, self._plant, self._physics = env, env.task, env.physics
        self._substeps = round(env.control_timestep() / env.physics.timestep())
        self._camera = 2 if task.startswith("quadruped") else 0          # its camera 0 stands 17 m away
        self._physics_error = importlib.import_module("dm_control.rl.control").PhysicsError
        spec = env.action_spec()
        self._centre, self._half = _rescale(spec.minimum, spec.maximum)
        with env.physics.reset_context():
            env.task.initialize_episode(env.physics)
        self._setup(task, seed, obs, size, Facts(len(self._flat()), *spec.shape, 500, 2, 1000.0, False))

    def _flat(self):                              # some entries are 0-d (walker height, fish upright)
        return np.concatenate([np.ravel(x) for x in self._plant.get_observation(self._physics).values()])

    def _restart(self, seed):
        if seed is not None:
            self._plant.random.seed(seed)         # in place: the task keeps no other random state
        with self._physics.reset_context():
            self._plant.initialize_episode(self._physics)
        return None if self._size else self._flat()

    def _advance(self, action):
        # What control.Environment.step does, without its time step objects and without the observation after
        # the first of the two control steps, which nobody sees. Equal to it number by number (tested).
        action, rew = self._centre + self._half * action, 0.0
        try:
            for _ in range(2):
                self._plant.before_step(action, self._physics)
                self._physics.step(self._substeps)
                self._plant.after_step(self._physics)
                rew += self._plant.get_reward(self._physics)
        except self._physics_error:               # dm_control's own check: MuJoCo met NaN or huge numbers
            raise self._broken("simulation state") from None
        return None if self._size else self._flat(), rew, False, False, 0.0

    def _frame(self):
        renderer = importlib.import_module("dm_control._render")
        if renderer.BACKEND != os.environ["MUJOCO_GL"]:      # chosen when imported, see _import_suite
            importlib.reload(renderer)
        return self._physics.render(self._size or 256, self._size or 256, self._camera)


class _MetaWorld(_Env):
    """A Meta-World v3 task with visible goal. (TD-MPC2 used an older v2: close, but not the same numbers.)

    camera: corner4 is the corner2 that multi-task papers moved closer; repeat, length: control steps per agent step and
    agent steps per episode (2 and 100 as in TD-MPC2; the benchmark's own are 1 and 500)."""

    def __init__(self, task, seed, obs, size, camera="corner2", repeat=2, length=100):
        if task not in METAWORLD50:
            raise _unknown(task)
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except ImportError as error:
            raise SystemExit(f"{task} needs Meta-World, which cannot be imported ({error}); "
                             "pip install metaworld==3.1.1 mujoco==3.3.0") from None
        pixels = size if obs == "pixels" else 480
        env = ALL_V3_ENVIRONMENTS[task[3:] + "-v3"](render_mode="rgb_array", camera_name=camera,
                                                    width=pixels, height=pixels)
        # Outside its own benchmarks Meta-World must be told: show the goal (and forget the cached bounds,
        # which would clip it to zero), draw a new one at each reset, and draw it from the environment's seed.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
        if obs == "pixels":                       # shadow maps of 4096 x 4096: half of the time
            env.model.vis.quality.shadowsize = 1024
        self._env = env
        self._setup(task, seed, obs, size, Facts(39, 4, length, repeat, 0.0, False))

    def _restart(self, seed):
        if seed is not None:
            self._env.seed(seed)
        obs, _ = self._env.reset()
        # One idle control step whose observation is dropped, as when TD-MPC2's published data were recorded
        # (official code: envs/metaworld.py, reset). There is no room for it in an episode of all 500 steps.
        if self.facts.action_repeat * self.facts.episode_length < 500:
            self._env.step(np.zeros(4, np.float32))
        return obs

    def _advance(self, action):
        rew = 0.0
        for _ in range(self.facts.action_repeat):
            obs, r, _, _, info = self._env.step(action)
            rew += r
        return obs, rew, False, False, info["success"]

    def _frame(self):
        return self._env.render()[::-1].copy()    # the corner cameras hang upside down


class _Gymnasium(_Env):
    """Any registered gymnasium id with continuous actions: action repeat 1, observations flattened."""

    def __init__(self, task, seed, obs, size):
        try:
            env = gymnasium.make(task, disable_env_checker=True)
            if "rgb_array" in env.metadata.get("render_modes", ()):     # known only now, fixed when made
                env.close()
                env = gymnasium.make(task, render_mode="rgb_array", disable_env_checker=True)
        except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv):
            raise _unknown(task) from None
        except (ImportError, gymnasium.error.Error) as error:
            raise SystemExit(f"{task} cannot be made: {error}; install what it names, or for your own "
                             "environment give 'module:Id-v0' with a module that Python can import") from None
        space, box = env.action_space, gymnasium.spaces.Box
        if not isinstance(space, box):
            raise SystemExit(f"{task} has the action space {space}; expected a continuous Box: "
                             "choose another task, for example Pendulum-v1")
        flat = gymnasium.spaces.flatten_space(env.observation_space)
        if not isinstance(flat, box):
            raise SystemExit(f"{task} has observations {env.observation_space} that do not flatten to a "
                             "vector; expected a Box or a Dict of Boxes")
        self._env = env
        self._centre, self._half = _rescale(space.low.astype(np.float64), space.high.astype(np.float64))
        limit = env.spec.max_episode_steps or 1000
        self._setup(task, seed, obs, size, Facts(flat.shape[0], int(np.prod(space.shape)), limit, 1))

    def _flat(self, obs):
        return gymnasium.spaces.flatten(self._env.observation_space, obs)

    def _restart(self, seed):
        return self._flat(self._env.reset(seed=seed)[0])

    def _advance(self, action):
        space = self._env.action_space
        action = self._centre + self._half * action.reshape(space.shape)
        action = np.clip(action, space.low, space.high).astype(space.dtype)         # rounding may overshoot
        obs, rew, terminated, truncated, info = self._env.step(action)
        return self._flat(obs), rew, terminated, truncated, info.get("success", info.get("is_success", 0.0))

    def _frame(self):
        try:
            frame = self._env.render()
        except gymnasium.error.DependencyNotInstalled as error:          # Pendulum-v1 draws with pygame
            raise SystemExit(f"{self.task} cannot be drawn: {error}; or use obs='state'") from None
        if frame is None:
            raise SystemExit(f"{self.task} draws no frames; expected render mode rgb_array: use obs='state'")
        return frame


class _Own(_Gymnasium):
    """A task of `register`."""

    def __init__(self, task, family, seed, obs, size):
        self._env = env = family.make(seed, obs)
        space = env.action_space
        self._centre, self._half = _rescale(space.low.astype(np.float64), space.high.astype(np.float64))
        self._setup(task, seed, obs, size, family.facts)


class _Atari(gymnasium.Env):
    """An Atari game: uint8 (size, size, 3), all 18 discrete actions; `legal` lists those that the game tells apart.

    An agent step is 4 frames with one action; the observation is the maximum of the last two, averaged over areas.
    sticky: probability, per frame, that the emulator repeats the previous action (0.25 is the ALE's v5 default).
    life_loss: report a lost life as info["life_lost"] (never ends the episode); noop: at most so many random idle
    frames after a reset; frame_cap: frames until truncation, 108,000 is half an hour of play."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}        # noqa: RUF012 (gymnasium's own way)
    render_mode = "rgb_array"

    def __init__(self, task, seed, obs="pixels", size=64, sticky=0.25, life_loss=True, noop=0, frame_cap=108_000):
        if obs != "pixels":
            raise SystemExit(f"{task} has no state observations: type make_env({task!r}, obs='pixels')")
        try:
            import ale_py
            from ale_py import roms
        except ImportError as error:
            raise SystemExit(f"{task} needs the Arcade Learning Environment, which cannot be imported ({error}); "
                             "pip install ale-py==0.12.1") from None
        game, _, variant = task.partition("@")
        snake = "".join("_" + c.lower() if c.isupper() else c for c in game)[1:]
        try:
            self._rom = roms.get_rom_path(snake)
        except Exception:                         # noqa: BLE001 (a broken installation may raise anything)
            self._rom = None
        if self._rom is None:
            raise SystemExit(f"{task}: ale-py has no ROM {snake}.bin: pip install --force-reinstall ale-py==0.12.1")
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._env = ale_py.ALEInterface()
        self._env.setFloat("repeat_action_probability", sticky)
        self._env.setInt("max_num_frames_per_episode", 0)
        self.task, self.t, self._first_seed, self._size = task, 0, seed, size
        self._life_loss, self._noop, self._cap = life_loss, noop, frame_cap
        self._variant = None
        self._load(seed)
        if variant:
            has = [[str(n) for n in f()] for f in (self._env.getAvailableModes, self._env.getAvailableDifficulties)]
            asked = re.fullmatch(r"m(\d+)d(\d+)", variant)
            if not asked or any(n not in known for n, known in zip(asked.groups(), has)):
                raise SystemExit(f"{task}: expected {game}@m<mode>d<difficulty> with a mode of {', '.join(has[0])} and "
                                 f"a difficulty of {', '.join(has[1])}")
            self._variant = [int(n) for n in asked.groups()]
        full = self._env.getLegalActionSet()
        self.legal = [full.index(a) for a in self._env.getMinimalActionSet()]
        self._actions, self._areas = full, [_areas(n, size) for n in (210, 160)]
        self.facts = Facts(3 * size * size, len(full), max(1, frame_cap // 4), 4)
        self.action_space = gymnasium.spaces.Discrete(len(full))
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def _load(self, seed):                        # the ALE takes a seed only while it loads a game
        self._env.setInt("random_seed", seed % 2**31)
        self._env.loadROM(self._rom)
        if self._variant:
            self._env.setMode(self._variant[0])
            self._env.setDifficulty(self._variant[1])

    def reset(self, *, seed=None, options=None):
        """Start an episode -> obs, info. The same seed and actions give the same episode."""
        if seed is None:                          # the constructor's seed counts for the first episode only
            seed = self._first_seed
        self._first_seed = None
        super().reset(seed=seed)
        if seed is not None:
            self._load(seed)
        self._env.reset_game()
        for _ in range(int(self.np_random.integers(self._noop + 1)) if self._noop else 0):
            self._env.act(self._actions[0])
        self.t, self._lives = 0, self._env.lives()
        self._screen = self._env.getScreenRGB()
        return self._shrink(self._screen), {"success": 0.0, "life_lost": False}

    def step(self, action):
        """One agent step -> obs, summed reward, terminated, truncated (frame cap), {"success", "life_lost"}."""
        rew, before = 0.0, None
        for i in range(4):
            rew += self._env.act(self._actions[int(action)])
            if i == 2:
                before = self._env.getScreenRGB()
            if self._env.game_over():
                break
        self._screen = self._env.getScreenRGB()
        if before is not None:                    # sprites flicker: many are drawn in every other frame only
            self._screen = np.maximum(self._screen, before)
        self.t += 1
        over, lives = self._env.game_over(), self._env.lives()
        lost, self._lives = self._life_loss and lives < self._lives, lives
        truncated = not over and self.t >= self.facts.episode_length
        return self._shrink(self._screen), rew, bool(over), truncated, {"success": 0.0, "life_lost": bool(lost)}

    def _shrink(self, screen):
        rows, cols = self._areas
        small = np.tensordot(rows, screen.astype(np.float32), 1)              # (size, 160, 3)
        return np.rint(np.tensordot(cols, small, (1, 1))).transpose(1, 0, 2).astype(np.uint8)

    def render(self):
        """The last frame as shown on the screen, uint8 (210, 160, 3)."""
        return self._screen


def _areas(n, m):
    """(m, n) matrix that averages n pixels over m equal areas."""
    edge = np.arange(m + 1) * n / m
    inside = np.minimum(edge[1:, None], np.arange(1, n + 1)) - np.maximum(edge[:-1, None], np.arange(n))
    return (np.clip(inside, 0, None) * m / n).astype(np.float32)


# -------------------------------------------------------------------------------- OpenGL
def _import_suite():
    """dm_control.suite. Unless MUJOCO_GL is set it is imported without OpenGL: state tasks need none, the
    import is faster, and a machine without a display prints no GLFW warning. _frame loads OpenGL later."""
    if "MUJOCO_GL" not in os.environ and "dm_control._render" not in sys.modules:
        os.environ["MUJOCO_GL"] = "disabled"
        try:
            return importlib.import_module("dm_control.suite")
        finally:
            del os.environ["MUJOCO_GL"]
    return importlib.import_module("dm_control.suite")


def choose_gl():
    """Set MUJOCO_GL to a backend that works here and return it; a value already set is kept, untested."""
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    for name in ("egl", "osmesa"):                # a failed attempt would break OpenGL in this process
        code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
        attempt = subprocess.run([sys.executable, "-c", code],
                                 env={**os.environ, "MUJOCO_GL": name}, capture_output=True, check=False)
        if attempt.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return name
    raise SystemExit("found no working OpenGL (tried EGL and OSMesa), which pixels and video need: apt-get "
                     "install libegl1 (GPU) or libosmesa6 (CPU), or set MUJOCO_GL=egl|osmesa|glfw, or use "
                     "obs='state'")


# -------------------------------------------------------------------------------- custom tasks
def _with_reward(base, reward):
    """The suite's own task `base` with another reward, reward(physics, tolerance); the rest stays."""
    def make(suite, seed):
        env = suite.load(*base, task_kwargs={"random": seed})
        tolerance = importlib.import_module("dm_control.utils.rewards").tolerance
        env.task.get_reward = lambda physics: reward(physics, tolerance)
        return env
    return make


_INF = float("inf")


def _walker_backwards(speed):
    def reward(p, tol):
        stand = (3 * tol(p.torso_height(), (1.2, _INF), 0.6) + (1 + p.torso_upright()) / 2) / 4
        move = tol(p.horizontal_velocity(), (-_INF, -speed), speed / 2, "linear", 0.5)
        return stand * (5 * move + 1) / 6
    return reward


def _cheetah_backwards(p, tol):
    return tol(p.speed(), (-_INF, -8), 8, "linear", 0)


def _cheetah_raised(foot):                        # run with one foot up in the air
    def reward(p, tol):
        z = p.named.data.xpos[[foot, "torso"], "z"]
        up = (3 * tol(z[0], (1.2, _INF), 0.6) + 2 * tol(z[1], (1.2, _INF), 0.6)) / 5
        return up * (5 * tol(p.speed(), (6, _INF), 6, "linear", 0) + 1) / 6
    return reward


def _cheetah_jump(p, tol):
    torso, *feet = p.named.data.xpos[["torso", "bfoot", "ffoot"], "z"]
    still = tol(p.speed(), (-0.5, 0.5), 0.5, "linear", 0)
    return sum((5 * tol((torso + foot) / 2, (1.2, _INF), 0.6) + still) / 6 for foot in feet) / 2


def _hopper_backwards(p, tol):
    return tol(p.height(), (0.6, 2)) * tol(p.speed(), (-_INF, -1), 0.5, "linear", 0.5)


def _pendulum_spin(p, tol):
    return tol(abs(float(p.angular_velocity()[0])), (9, _INF), 4.5, "linear", 0.5)


def _cup_spin(suite, seed):
    """Swing the ball around outside the cup; nine of ten episodes start with the ball in it."""
    def reward(p, tol):
        far = tol(np.linalg.norm(p.ball_to_target()), (0.5, _INF), 0.25, "linear", 0.5)
        speed = np.linalg.norm(p.named.data.qvel[["ball_x", "ball_z"]])
        return (1 - p.in_target()) * (far + 2 * tol(speed, (6, _INF), 3, "linear", 0.5)) / 3

    env = _with_reward(("ball_in_cup", "catch"), reward)(suite, seed)

    def initialize_episode(physics):
        rng, anywhere = env.task.random, env.task.random.uniform() < 0.1
        while True:
            physics.named.data.qpos["ball_x"] = rng.uniform(-0.2, 0.2)
            physics.named.data.qpos["ball_z"] = rng.uniform(0.2, 0.5)
            physics.after_reset()                 # recomputes positions and contacts
            if physics.data.ncon == 0 and (anywhere or physics.in_target()):
                return

    env.task.initialize_episode = initialize_episode
    return env


def _reacher_three(target_size):
    """The suite's reacher with an arm of three links instead of two."""
    def make(suite, seed):
        from dm_control.rl import control
        xml, assets = suite.reacher.get_model_and_assets()
        xml = xml.decode() if isinstance(xml, bytes) else xml
        arm, bodies = "", (("arm0", "0 0 .01", ".09", "shoulder0"), ("arm1", ".09 0 0", ".09", "shoulder1"),
                           ("hand", ".09 0 0", ".10", "wrist"))
        for name, pos, length, joint in bodies:
            limit = "" if joint == "shoulder0" else 'limited="true" range="-80 80"'
            arm += (f'<body name="{name}" pos="{pos}"><joint name="{joint}" {limit}/><geom name="{name}" '
                    f'type="capsule" fromto="0 0 0 {length} 0 0" size=".01" material="self"/>')
        arm += ('<body name="finger" pos=".09 0 0"><camera name="hand" pos="0 0 .2" mode="track"/><geom '
                'name="finger" type="sphere" size=".01" material="effector"/></body></body></body></body>')
        motors = "".join(f'<motor name="{joint}" joint="{joint}"/>' for *_, joint in bodies)
        target = xml[xml.index('<geom name="target"'):xml.index("</worldbody>")]
        physics = suite.reacher.Physics.from_xml_string(
            xml[:xml.index('<body name="arm"')] + arm + target
            + f"</worldbody><actuator>{motors}</actuator></mujoco>", assets)
        return control.Environment(physics, suite.reacher.Reacher(target_size, random=seed), time_limit=20)
    return make


_CUSTOM = {
    "walker-walk-backwards": _with_reward(("walker", "walk"), _walker_backwards(1)),
    "walker-run-backwards": _with_reward(("walker", "run"), _walker_backwards(8)),
    "cheetah-run-backwards": _with_reward(("cheetah", "run"), _cheetah_backwards),
    "cheetah-run-front": _with_reward(("cheetah", "run"), _cheetah_raised("bfoot")),
    "cheetah-run-back": _with_reward(("cheetah", "run"), _cheetah_raised("ffoot")),
    "cheetah-jump": _with_reward(("cheetah", "run"), _cheetah_jump),
    "hopper-hop-backwards": _with_reward(("hopper", "hop"), _hopper_backwards),
    "reacher-three-easy": _reacher_three(0.05),
    "reacher-three-hard": _reacher_three(0.015),
    "cup-spin": _cup_spin,
    "pendulum-spin": _with_reward(("pendulum", "swingup"), _pendulum_spin)}


# -------------------------------------------------------------------------------- locomotion (PWM Sec. 4.1, Table 2)
def _asset(package, *path):
    """Path of a model file that an installed package brings along, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} brings the model {path[-1]} and cannot be found: pip install -r requirements.txt")
    return os.path.join(spec.submodule_search_locations[0], *path)


def _anymal_xml():
    """A quadruped with ANYmal C's joint positions, link masses (53.1 kg) and contact shapes; springs pull every joint
    to 0 with 85 N m/rad, where the legs are straight."""
    legs = ""
    for name, f, s in (("LF", 1, 1), ("RF", 1, -1), ("LH", -1, 1), ("RH", -1, -1)):   # f: front/hind, s: left/right
        legs += (
            f'<body pos="{.2999 * f} {.104 * s} 0"><joint name="{name}_HAA" axis="1 0 0"/>'
            f'<geom type="sphere" size=".05" pos="{.03 * f} {.03 * s} 0" mass="2.51"/>'
            f'<body pos="{.0599 * f} {.08381 * s} 0"><joint name="{name}_HFE" axis="0 1 0"/>'
            f'<geom type="capsule" size=".03" fromto="0 0 0 0 {.1003 * s} -.285" mass="1.5"/>'
            f'<geom type="capsule" size=".06" fromto="0 {-.01 * s} -.285 0 {.11 * s} -.285" mass="1.77"/>'
            f'<body pos="0 {.1003 * s} -.285"><joint name="{name}_KFE" axis="0 1 0"/>'
            f'<geom type="capsule" size=".015" fromto="0 0 0 {.08795 * f} {.01305 * s} -.3155" mass=".4"/>'
            f'<geom type="sphere" size=".03" pos="{.08795 * f} {.01305 * s} -.3155" mass=".15"/></body></body></body>')
    joints = [f"{leg}_{j}" for leg in ("LF", "RF", "LH", "RH") for j in ("HAA", "HFE", "KFE")]
    motors = "".join(f'<motor joint="{j}" gear="200" ctrlrange="-1 1"/>' for j in joints)
    return _scene('<default><joint stiffness="85" damping="2" armature=".006"/><geom friction=".75"/></default>',
                  '<body name="torso" pos="0 0 .55"><freejoint/><geom type="capsule" size=".1" '
                  f'fromto="-.275 0 0 .275 0 0" mass="27.8"/>{legs}</body>', motors)


_MUSCLES = """gluteus_max 1853: P -.09 .04 .97; P -.09 .10 .90; F -.005 .135 .80
gluteus_med 2200: P -.03 .10 1.04; F -.01 .157 .90
gluteus_min 595: P -.01 .10 1.02; F 0 .157 .90
iliacus 622: P -.02 .10 1.05; P .03 .085 .96; F -.02 .112 .86
adductors 880: P .043 .025 .918; F 0 .105 .72
adductor_magnus 1297: P -.02 .04 .88; F -.005 .115 .70
medial_hamstrings 1465: P -.06 .075 .90; F -.045 .085 .56; T -.03 .07 .49
biceps_long 705: P -.064 .071 .90; F -.045 .12 .56; T -.036 .138 .489
biceps_short 316: F 0 .115 .68; T -.033 .138 .489
rectus_femoris 849: P .015 .106 .977; F .04 .10 .59; T .036 .095 .50
vastus_lat 2255: F 0 .155 .88; F .04 .115 .59; T .036 .10 .50
vastus_med_int 3190: F .003 .118 .87; F .04 .085 .59; T .036 .085 .50
sartorius_gracilis 251: P .031 .124 1.0; F -.02 .065 .57; T 0 .08 .455
tensor_fasciae 233: P .01 .138 1.045; F 0 .165 .88; T .01 .12 .49
gastrocnemius 1914: F -.012 .10 .565; T -.055 .10 .47; A -.097 .08 .035
soleus 3586: T -.035 .11 .47; A -.097 .08 .03
tibialis_ant_extensors 1530: T -.01 .125 .48; T .005 .085 .11; A .025 .075 .036
tibialis_post_flexors 1890: T -.025 .10 .42; T -.06 .065 .085; A .01 .07 .03
peronei 1049: T -.03 .125 .44; T -.06 .105 .085; A -.01 .115 .025"""   # name, newtons: way-points on bodies, metres


def _muscle_xml():
    """Pelvis and two legs (37 kg) pulled by 152 muscles: 19 groups x 4 fascicles per leg, each a straight tendon over
    way-points of the rest pose (x forward, outward, up) with the constant tension activation x 0.36 x F0 / 4."""
    origin = {"P": (-.031, 0, .981), "F": (-.012, .09, .934), "T": (-.01, .1, .539), "A": (-.042, .08, .078),
              "toe1": (.069, .078, .02), "toe2": (.049, .123, .014)}
    box = {"P": (.129, .208, .145, 15, -.031, 0, .981), "F": (.14, .127, .404, 7, -.023, .096, .724),
           "T": (.114, .12, .416, 3, -.034, .093, .302), "A": (.157, .076, .05, .6, -.024, .083, .04),
           "toe1": (.056, .041, .026, .2, .094, .077, .027), "toe2": (.056, .041, .026, .2, .081, .124, .027)}
    joint = {"F": 'type="ball" range="0 2"', "T": 'axis="0 1 0" range="0 2.3"', "A": 'type="ball" range="0 1"',
             "toe1": 'axis="0 1 0" range="-.6 .6"', "toe2": 'axis="0 1 0" range="-.6 .6"'}
    sites, tendons, motors = {}, "", ""
    for side, s in (("right", -1), ("left", 1)):
        for line in _MUSCLES.splitlines():
            (name, force), path = line.split(":")[0].split(), [p.split() for p in line.split(":")[1].split(";")]
            for k in range(4):
                muscle, wrap = f"{side}_{name}_{k}", ""
                for i, (part, *at) in enumerate(path):
                    via = 0 < i < len(path) - 1                        # the ends of a broad muscle lie further apart
                    x, o, z = np.array(at, float) + (k - 1.5) * np.array([.003 if via else .006, .003, 0])
                    x, o, z = np.array([x, o, z]) - origin[part]
                    body = part if part == "P" else side + part
                    sites[body] = sites.get(body, "") + f'<site name="{muscle}_{i}" pos="{x} {s * o} {z}"/>'
                    wrap += f'<site site="{muscle}_{i}"/>'
                tendons += f'<spatial name="{muscle}">{wrap}</spatial>'
                motors += (f'<general name="{muscle}" tendon="{muscle}" ctrlrange="0 1" '
                           f'gainprm="{-.36 * float(force) / 4}"/>')    # negative: a muscle only pulls

    def body(part, parent, side, s, inner):
        (ox, oo, oz), (a, b, c, mass, x, o, z) = np.subtract(origin[part], origin[parent]), box[part]
        x, o, z = np.subtract((x, o, z), origin[part])
        return (f'<body name="{side}{part}" pos="{ox} {s * oo} {oz}"><joint {joint[part]} limited="true" '
                f'armature=".05" stiffness="{5 * (mass / 15) ** .5}" damping="{2 + 10 * mass / 15}"/>'
                f'<geom type="box" size="{a / 2} {b / 2} {c / 2}" pos="{x} {s * o} {z}" mass="{mass}"/>'
                f'{sites.get(side + part, "")}{inner}</body>')

    legs = ""
    for side, s in (("right", -1), ("left", 1)):
        toes = body("toe1", "A", side, s, "") + body("toe2", "A", side, s, "")
        legs += body("F", "P", side, s, body("T", "F", side, s, body("A", "T", side, s, toes)))
    a, b, c = np.divide(box["P"][:3], 2)
    return _scene('<default><geom friction=".5"/><site size=".005"/></default>',
                  f'<body name="torso" pos="0 0 1"><freejoint/><geom type="box" size="{a} {b} {c}" mass="15"/>'
                  f'{sites["P"]}{legs}</body>', motors, tendons)


def _scene(defaults, body, actuators, tendons=""):
    return (f'<mujoco><compiler angle="radian"/>{defaults}<asset><texture name="grid" type="2d" builtin="checker" '
            'width="300" height="300" rgb1=".2 .3 .4" rgb2=".3 .4 .5"/><material name="grid" texture="grid" '
            'texrepeat="1 1" texuniform="true"/></asset><worldbody><light directional="true" castshadow="false" '
            'pos="0 0 4" dir="0.3 0.5 -1"/><geom name="floor" type="plane" size="0 0 1" material="grid"/>'
            f'{body}</worldbody>'
            f'<tendon>{tendons}</tendon><actuator>{actuators}</actuator></mujoco>')


@functools.cache
def _body_model(task):
    """The compiled MuJoCo model of a body: 1/240 s, implicitfast, only the floor is touched. All but the hopper get
    10 N m s/rad of damping in every joint on top of their own, as in PWM's simulator; the ant also has its torques
    (200 N m) and armature (0.05 kg m2), and a tenth of its weight."""
    import mujoco
    if task in ("hopper", "ant"):
        spec = mujoco.MjSpec.from_file(_asset("gymnasium", "envs", "mujoco", "assets", f"{task}.xml"))
    elif task == "humanoid":
        spec = mujoco.MjSpec.from_file(_asset("dm_control", "suite", "humanoid.xml"))
        for motor in spec.actuators:
            motor.gear = motor.gear * 1.75        # 35, 70, 140 and 210 N m as in the reference
    else:
        spec = mujoco.MjSpec.from_string(_anymal_xml() if task == "anymal" else _muscle_xml())
    spec.option.timestep, spec.option.integrator = 1 / 240, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET       # a broken row shall be seen, see advance
    for geom in spec.geoms:
        geom.contype, geom.conaffinity = int(geom.name == "floor"), 1
        if task == "ant":
            geom.density = 100                    # kg/m3: 18 kg instead of the file's 0.9
    model = spec.compile()
    if task == "ant":
        model.actuator_gear[:, 0], model.dof_armature[6:] = 200, 0.05
    if task != "hopper":
        model.dof_damping[6:] += 10
    return model


class _Body:
    """A body of LOCOMOTION: start, observation, reward and end for n rows at once, and its physics on some threads.

    Like the task of the same name in PWM's simulator (not its numbers: other physics), control at 60 Hz. Observation:
      hopper  height - 1.25, pitch, joints (3), then their rates
      others  height (1), root quaternion wxyz (4), linear and angular velocity in the world (3, 3), joints (J), their
              rates / 10 (J), upright (1), heading (1) and, but for the muscles, the previous action (J)
    The reward is that of the state before the step and the action. Action i drives joint i of the observation with
    [-1, 1] times its torque; of the muscles, activation (action + 1) / 2.
    state: (n, 1 + nq + nv) time, qpos, qvel as MuJoCo packs them."""

    SUBSTEPS = 4

    def __init__(self, task, threads=1):
        import mujoco
        from mujoco import rollout
        self.task, self.model, self.facts = task, _body_model(task), task_facts(task)
        self._pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
        self._data = [mujoco.MjData(self.model) for _ in range(threads)]
        m = self.model
        self.nq, self.muscles = m.nq, task == "muscle-humanoid"
        # Files list motors in their own order (ant.xml begins with the fourth leg): sort them by joint.
        self._action_of = np.arange(m.nu) if self.muscles else np.argsort(np.argsort(m.actuator_trnid[:, 0]))
        self._rest = np.zeros(m.nq)
        self._rest[1 if task == "hopper" else 2] = self.height = {
            "hopper": 1.25, "ant": 0.75, "anymal": 0.55, "humanoid": 1.35, "muscle-humanoid": 1.0}[task]
        self.floor = {"hopper": 0.8, "ant": 0.27, "anymal": 0.25, "humanoid": 0.74, "muscle-humanoid": 0.46}[task]
        if task != "hopper":
            self._rest[3] = 1
        if task == "ant":
            self._rest[7:] = 0, 1, 0, -1, 0, -1, 0, 1
        if task == "anymal":                      # HAA, HFE, KFE of LF, RF, LH, RH
            self._rest[7:] = .03, .4, -.8, -.03, .4, -.8, .03, -.4, .8, -.03, -.4, .8
        kinds = m.jnt_type[m.jnt_type != mujoco.mjtJoint.mjJNT_FREE]
        self._balls = [int(a) for a, kind in zip(m.jnt_qposadr[-len(kinds):], kinds)
                       if kind == mujoco.mjtJoint.mjJNT_BALL]
        for a in self._balls:
            self._rest[a] = 1

    def close(self):
        self._pool.close()

    def start(self, rng):
        """One row (1 + nq + nv) around the rest pose: u in [-.5, .5], hopper 0.1 u everywhere; others 0.2 u m, 15
        degrees x u about a random axis, 0.4 u rad per joint, 0.5 u for all velocities (reference code)."""
        q, u = self._rest.copy(), lambda n: rng.uniform(-0.5, 0.5, n)
        if self.task == "hopper":
            return np.concatenate([[0.0], q + 0.1 * u(6), 0.1 * u(6)])
        q[:3] += 0.2 * u(3)
        axis, angle = u(3), u(1)[0] * math.pi / 12
        q[3:7] = _quaternion(angle * axis / max(np.linalg.norm(axis), 1e-9))
        turn = np.ones(len(q), bool)
        turn[:7] = False
        for a in self._balls:                     # turned: noise on its numbers would not stay a rotation
            q[a:a + 4], turn[a:a + 4] = _quaternion(0.4 * u(3)), False
        q[turn] += 0.4 * u(int(turn.sum()))
        return np.concatenate([[0.0], q, 0.5 * u(self.model.nv)])

    def observe(self, state, last):
        """state (n, 1 + nq + nv), last actions (n, A) -> (n, O) float64."""
        q, v = state[:, 1:1 + self.nq], state[:, 1 + self.nq:]
        if self.task == "hopper":
            return np.concatenate([q[:, 1:2] - 1.25, q[:, 2:], v], 1)
        w, x, y, z = q[:, 3:7].T
        axis, spin = q[:, 4:7], v[:, 3:6]         # MuJoCo keeps the angular velocity in the body's frame
        side = np.cross(axis, spin)
        spin = spin + 2 * (w[:, None] * side + np.cross(axis, side))
        upright, heading = 1 - 2 * (x * x + y * y), 1 - 2 * (y * y + z * z)             # R[2, 2], R[0, 0]
        return np.concatenate([q[:, 2:7], v[:, :3], spin, q[:, 7:], 0.1 * v[:, 6:], upright[:, None],
                               heading[:, None], *([] if self.muscles else [last])], 1)

    def reward(self, obs, act):
        """Reward (n,) of observations (n, O) before the step and clipped actions (n, A): forward speed plus posture
        (Table 2, with the constants of the released code)."""
        if self.task == "hopper":                 # h - 0.95: 0.15 m above the height where it ends
            return (obs[:, 5] + _height_term(obs[:, 0] + 0.3, 0.3, 1) + 1 - (obs[:, 1] / (math.pi / 6)) ** 2
                    - 0.1 * (act * act).sum(1))
        J = len(self._action_of) if not self.muscles else 0
        upright, heading = obs[:, -2 - J], obs[:, -1 - J]
        rew = obs[:, 5] + 0.1 * upright + heading
        if self.muscles:
            return rew - 0.001 * ((act + 1) / 2).sum(1)
        if self.task == "humanoid":
            return rew + _height_term(obs[:, 0] - 0.84, 0.1, 10) - 0.002 * (act * act).sum(1)
        return rew + obs[:, 0] - self.floor - (0.005 if self.task == "anymal" else 0) * (act * act).sum(1)

    def advance(self, state, act):
        """One control step: state (n, 1 + nq + nv), act (n, A) in [-1, 1] -> next state, terminated (n,).

        A row whose numbers explode keeps its old state and ends: nothing that is not finite comes back."""
        ctrl = (act + 1) / 2 if self.muscles else act[:, self._action_of]
        out, _ = self._pool.rollout(self.model, self._data, state,
                                    np.repeat(ctrl[:, None].astype(np.float64), self.SUBSTEPS, 1))
        after = out[:, -1]
        broken = ~(np.abs(after) < 1e6).all(1)    # also true for NaN
        after[broken] = state[broken]
        return after, broken | (after[:, 2 if self.task == "hopper" else 3] < self.floor)


class _PlanarBody(_Body):
    """The hopper stepped by PlanarHopper instead of MuJoCo; everything else is the same."""

    def __init__(self, task):
        super().__init__("hopper")
        self.plant = plant(task)

    def advance(self, state, act):
        import torch
        with torch.no_grad():
            moved = self.plant.step(torch.as_tensor(state[:, 1:]), torch.as_tensor(act)).numpy()
        after = np.concatenate([state[:, :1] + self.plant.DT, moved], 1)
        broken = ~(np.abs(after) < 1e6).all(1)
        after[broken] = state[broken]
        return after, broken | (after[:, 2] < self.floor)


def _body(task, threads=1):
    return _PlanarBody(task) if plant(task) else _Body(task, threads)


def _height_term(x, top, slope):
    """-200 x^2 below 0, slope x above, for x clipped to [-1, top]."""
    x = np.clip(x, -1, top)
    return np.where(x < 0, -200 * x * x, slope * x)


def _quaternion(turn):
    """Rotation vector (3,) -> wxyz with w >= 0 (angles up to pi)."""
    angle = np.linalg.norm(turn)
    return np.concatenate([[math.cos(angle / 2)], np.asarray(turn) * (math.sin(angle / 2) / max(angle, 1e-9))])


class _Walker(_Env):
    """A single body of LOCOMOTION, equal to a row of Herd."""

    def __init__(self, task, seed, obs, size):
        self._env = _body(task)
        self._renderer = None
        self._setup(task, seed, obs, size, task_facts(task))

    def _restart(self, seed):
        self._state, self._last = self._env.start(self.np_random)[None], np.zeros((1, self.facts.act_dim))
        return self._env.observe(self._state, self._last)[0]

    def _advance(self, action):
        action = action[None].astype(np.float64)
        rew = self._env.reward(self._env.observe(self._state, self._last), action)[0]
        self._state, ended = self._env.advance(self._state, action)
        self._last = action
        return self._env.observe(self._state, action)[0], rew, ended[0], False, 0.0

    def _frame(self):
        import mujoco
        if self._renderer is None:
            self._renderer, self._drawn = mujoco.Renderer(self._env.model, 256, 256), mujoco.MjData(self._env.model)
        d, state = self._drawn, self._state[0]
        d.qpos[:], d.qvel[:] = state[1:1 + self._env.nq], state[1 + self._env.nq:]
        mujoco.mj_forward(self._env.model, d)
        camera = mujoco.MjvCamera()
        camera.lookat[:], camera.distance = d.body("torso").xpos, 3 * max(self._env.height, 1)
        camera.azimuth, camera.elevation = 90, -12
        self._renderer.update_scene(d, camera)
        return self._renderer.render()


class Herd:
    """n bodies of one LOCOMOTION task stepping together in this process on some threads (context manager).

        with Herd("ant", 64) as herd:
            obs = herd.reset()                                        # (n, O) float32
            obs, rew, terminated, truncated, last = herd.step(act)    # act (n, A)

    A row that ends restarts at once: its `obs` is the first of the next episode and `last` the one that ended it (V of
    `last` is the bootstrap of a truncated row; a terminated row has none). Episode k of row i starts from the seed
    (seed, i, k), whatever the number of threads (default: all cores)."""

    def __init__(self, task, n, seed=0, threads=None):
        threads = (os.cpu_count() or 1) if threads is None else threads
        if task not in LOCOMOTION:
            raise SystemExit(f"Herd steps {', '.join(LOCOMOTION)}, not {task!r}: use Flock for other tasks")
        if n < 1 or threads < 1:
            raise SystemExit(f"Herd got n={n}, threads={threads}; expected 1 or more of each")
        self.task, self.n, self.seed, self.facts = task, n, seed, task_facts(task)
        self._body = _body(task, threads)
        self._state = np.zeros((n, 1 + self._body.nq + self._body.model.nv))
        self._last, self.t, self._episode = np.zeros((n, self.facts.act_dim)), np.zeros(n, int), np.zeros(n, int)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stop the threads."""
        self._body.close()

    def state(self):
        """Arrays from which `load` goes on with the same steps."""
        return dict(state=self._state.copy(), last=self._last.copy(), t=self.t.copy(), episode=self._episode.copy())

    def state_dict(self):
        """As `state`."""
        return self.state()

    def load_state_dict(self, state):
        """Go on from what `state_dict` returned, arrays or tensors -> obs (n, O) float32."""
        return self.load({k: np.asarray(v) for k, v in state.items()})

    def load(self, state):
        """Go on from what `state` returned -> obs (n, O) float32."""
        self._state, self._last, self.t, self._episode = (np.array(state[k]) for k in ("state", "last", "t", "episode"))
        return self._body.observe(self._state, self._last).astype(np.float32)

    def _begin(self, rows):
        for i in rows:
            self._state[i] = self._body.start(np.random.default_rng([self.seed, i, self._episode[i]]))
        self._last[rows], self.t[rows] = 0, 0
        self._episode[rows] += 1

    def reset(self):
        """Start an episode in every row -> obs (n, O) float32."""
        self._begin(np.arange(self.n))
        return self._body.observe(self._state, self._last).astype(np.float32)

    def step(self, act):
        """act (n, A) -> obs (n, O), rew (n,) float32, terminated (n,), truncated (n,) bool, last (n, O)."""
        act = np.clip(np.asarray(act, np.float64), -1, 1)
        if act.shape != self._last.shape or not np.isfinite(act).all():
            raise _bad_actions(self.task, act, self._last.shape)
        rew = self._body.reward(self._body.observe(self._state, self._last), act)
        self._state, terminated = self._body.advance(self._state, act)
        self._last, self.t = act, self.t + 1
        truncated = ~terminated & (self.t >= self.facts.episode_length)
        last = obs = self._body.observe(self._state, act).astype(np.float32)
        if len(rows := np.flatnonzero(terminated | truncated)):
            self._begin(rows)
            obs = self._body.observe(self._state, self._last).astype(np.float32)
        return obs, rew.astype(np.float32), terminated, truncated, last


class Flock:
    """The interface of Herd for n environments of any other task, stepping one after the other in this process.

    A foreign environment does not show its state: `state` holds every row's actions since its episode began, and
    `load` does them again, which is exact where seed and actions fix an episode. Episode k of row i starts from
    the seed (seed, i, k). SystemExit: actions of another shape, or a number of the environment that is not finite."""

    def __init__(self, task, n, seed=0):
        self.task, self.n, self.seed, self.facts = task, n, seed, task_facts(task)
        self._envs = [make_env(task) for _ in range(n)]
        self.t, self._episode = np.zeros(n, int), np.zeros(n, int)
        self._acts = np.zeros((n, self.facts.episode_length, self.facts.act_dim), np.float32)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Free the simulations."""
        for env in self._envs:
            env.close()

    def state(self):
        """Arrays from which `load` goes on with the same steps."""
        return dict(t=self.t.copy(), episode=self._episode.copy(), acts=self._acts.copy())

    def state_dict(self):
        """As `state`."""
        return self.state()

    def load_state_dict(self, state):
        """Go on from what `state_dict` returned, arrays or tensors -> obs (n, O) float32."""
        return self.load({k: np.asarray(v) for k, v in state.items()})

    def load(self, state):
        """Go on from what `state` returned -> obs (n, O) float32."""
        self.t, episode, self._acts = (np.array(state[k]) for k in ("t", "episode", "acts"))
        self._episode = episode - 1
        obs = np.stack([self._begin(i) for i in range(self.n)])
        for i, env in enumerate(self._envs):
            for act in self._acts[i, :self.t[i]]:
                obs[i] = env.step(act)[0]
        return obs

    def _begin(self, i):
        (seed,) = np.random.SeedSequence([self.seed, i, self._episode[i]]).generate_state(1)
        self._episode[i] += 1
        return self._envs[i].reset(seed=int(seed))[0]

    def reset(self):
        """Start an episode in every row -> obs (n, O) float32."""
        self.t[:] = 0
        return np.stack([self._begin(i) for i in range(self.n)])

    def step(self, act):
        """As Herd.step: act (n, A) -> obs (n, O), rew (n,), terminated (n,), truncated (n,), last (n, O)."""
        act, (n, _, A) = np.asarray(act, np.float32), self._acts.shape
        if act.shape != (n, A) or not np.isfinite(act).all():
            raise _bad_actions(self.task, act, (n, A))
        self._acts[np.arange(n), self.t] = act
        last, rew, terminated, truncated, _ = (
            np.array(x) for x in zip(*(env.step(a) for env, a in zip(self._envs, act))))
        self.t += 1
        obs = last.copy()
        for i in np.flatnonzero(terminated | truncated):
            obs[i], self.t[i] = self._begin(i), 0
        return obs, rew.astype(np.float32), terminated, truncated, last


def _bad_actions(task, act, shape):
    return SystemExit(f"{task}: the policy gave actions of shape {act.shape}, "
                      f"{'' if np.isfinite(act).all() else 'not '}all finite; expected finite {shape}, one row per "
                      "observation")


def _herd_rollout(jobs, policy, progress, max_envs, threads):
    """Workers.rollout for jobs of one body of LOCOMOTION: the same episodes, in this process."""
    task, facts = jobs[0][0], task_facts(jobs[0][0])
    body, todo, results = _body(task, threads), list(range(len(jobs)))[::-1], [None] * len(jobs)
    n = min(len(jobs), max_envs)
    state, last = np.zeros((n, 1 + body.nq + body.model.nv)), np.zeros((n, facts.act_dim))
    job, t = np.full(n, -1), np.zeros(n, int)
    books = [None] * n
    done, calls = 0, 0

    def begin(i):
        job[i] = todo.pop() if todo else -1
        if job[i] >= 0:
            state[i], last[i], t[i] = body.start(np.random.default_rng(jobs[job[i]][1])), 0, 0
            books[i] = [body.observe(state[i:i + 1], last[i:i + 1])[0].astype(np.float32)], [], [], []

    try:
        for i in range(n):
            begin(i)
        while len(live := np.flatnonzero(job >= 0)):
            obs = body.observe(state[live], last[live])
            act = np.asarray(policy(obs.astype(np.float32), job[live], t[live]), np.float32)
            if act.shape != (len(live), facts.act_dim) or not np.isfinite(act).all():
                raise _bad_actions(task, act, (len(live), facts.act_dim))
            clipped = np.clip(act, -1, 1).astype(np.float64)
            rew = body.reward(obs, clipped)
            state[live], ended = body.advance(state[live], clipped)
            last[live], t[live] = clipped, t[live] + 1
            after = body.observe(state[live], last[live]).astype(np.float32)
            for k, i in enumerate(live):
                for book, x in zip(books[i], (after[k], act[k], float(rew[k]), bool(ended[k]))):
                    book.append(x)
                if ended[k] or t[i] >= facts.episode_length:
                    o, a, r, e = books[i]
                    results[job[i]] = dict(task=task, seed=jobs[job[i]][1], obs=np.stack(o), act=np.stack(a),
                                           rew=np.array(r, np.float32), term=np.array(e), success=0.0,
                                           ret=float(sum(r)))
                    done += facts.episode_length          # progress counts full lengths, as they were expected
                    begin(i)
            calls += 1
            if progress and (calls % 20 == 0 or not (job >= 0).any()):
                progress(int(done + t[job >= 0].sum()), len(jobs) * facts.episode_length)
    finally:
        body.close()
    return results


# -------------------------------------------------------------------------------- toys (PWM Sec. 3, App. A and B)
class BallWall:
    """A ball thrown at angle theta from the origin with 10 m/s, pushed forward with 1 m/s^2, flies for 2 s or sticks to
    a wall 5 m away whose top is at height 0 (Fig. 2). All in batched torch; theta in radians, any shape."""

    SPEED, PUSH, TIME, GRAVITY, WALL, TOP = 10.0, 1.0, 2.0, -9.81, 5.0, 0.0

    def distance(self, theta, k=1.0):
        """Metres flown f(theta). k=1 is the contact time of paper and code, k=2 the right one: the ball is at the wall
        at t_c = (-v cos + sqrt((v cos)^2 + k a w)) / a."""
        import torch
        vx, vy = self.SPEED * theta.cos(), self.SPEED * theta.sin()
        t = (-vx + (vx * vx + k * self.PUSH * self.WALL).sqrt()) / self.PUSH
        hit = (vy * t + self.GRAVITY * t * t / 2 < self.TOP) & (t < self.TIME)
        free = vx * self.TIME + self.PUSH * self.TIME**2 / 2
        return torch.where(hit, torch.full_like(free, self.WALL), free)

    def cost(self, theta, k=1.0):
        """J(theta) = -f(theta), to be minimised over [-pi, pi]."""
        return -self.distance(theta, k)

    def path(self, theta, n=60):
        """Positions (n, 2) of one flight in metres, stopped at the wall; for the sketch."""
        import torch
        t = torch.linspace(0, self.TIME, n)
        x = self.SPEED * math.cos(theta) * t + self.PUSH * t * t / 2
        y = self.SPEED * math.sin(theta) * t + self.GRAVITY * t * t / 2
        stop = ((x >= self.WALL) & (y < self.TOP)).long().cumsum(0) > 0
        flown = int((~stop).sum())
        return torch.stack([x, y], 1)[:flown]


class DoublePendulum:
    """Two uniform rods (1 kg, 1 m) hanging from a fixed hinge, a torque of 20 N m x action on the elbow only (App. B).

    state (.., 4): theta1 from upright, theta2 relative to the first rod (rad), and their rates (rad/s). One step is
    1/60 s by fourth-order Runge-Kutta in batched torch and differentiable. Undamped and
    unforced it keeps its energy to 0.15 J over the 240 steps of a fall from near upright, where 20 J turn over."""

    TORQUE, FRICTION, G, DT, STEPS = 20.0, 0.05, 9.81, 1 / 60, 240

    def reset(self, n, generator=None, dtype=None):
        """n start states (n, 4): angles within +-pi/2, rates within +-0.25."""
        import torch
        u = torch.rand(n, 4, generator=generator, dtype=torch.float64) - 0.5
        return (u * torch.tensor([math.pi, math.pi, 0.5, 0.5])).to(dtype or torch.get_default_dtype())

    def acceleration(self, state, torque, friction):
        """M(q) q'' = (0, torque) - C - G - friction q', solved in closed form -> (.., 2)."""
        import torch
        a1, a2, v1, v2 = state.unbind(-1)
        c2, s2, g = a2.cos(), a2.sin(), self.G
        m22 = 1 / 12 + 1 / 4                      # I + m lc^2 with lc = 1/2, I = 1/12
        m12 = m22 + c2 / 2
        m11 = 1 / 6 + 1 / 4 + 1.25 + c2           # 2 I + m lc^2 + m (l^2 + lc^2 + 2 l lc cos)
        h = s2 / 2
        swing = 0.5 * g * (a1 + a2).sin()         # gravity topples: theta = 0 is upright
        b1 = h * (2 * v1 * v2 + v2 * v2) + 1.5 * g * a1.sin() + swing - friction * v1
        b2 = torque - h * v1 * v1 + swing - friction * v2
        det = m11 * m22 - m12 * m12
        return torch.stack([m22 * b1 - m12 * b2, m11 * b2 - m12 * b1], -1) / det[..., None]

    def step(self, state, act, friction=FRICTION):
        """state (.., 4), act (.., 1) in [-1, 1] -> the state 1/60 s later."""
        import torch
        torque = self.TORQUE * act[..., 0]

        def slope(x):
            return torch.cat([x[..., 2:], self.acceleration(x, torque, friction)], -1)

        k1 = slope(state)
        k2 = slope(state + self.DT / 2 * k1)
        k3 = slope(state + self.DT / 2 * k2)
        k4 = slope(state + self.DT * k3)
        return state + self.DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def observe(self, state):
        """(.., 4) -> (.., 6): cos and sin of both angles, both rates."""
        import torch
        a = state[..., :2]
        return torch.stack([a.cos()[..., 0], a.sin()[..., 0], a.cos()[..., 1], a.sin()[..., 1],
                            state[..., 2], state[..., 3]], -1)

    def state(self, obs):
        """The inverse of observe, with angles in [-pi, pi]: (.., 6) -> (.., 4)."""
        import torch
        return torch.stack([torch.atan2(obs[..., 1], obs[..., 0]), torch.atan2(obs[..., 3], obs[..., 2]),
                            obs[..., 4], obs[..., 5]], -1)

    def reward(self, obs):
        """-wrap(theta1)^2 - wrap(theta2)^2 - 0.1 (rates squared), of the state after a step (reference code)."""
        return -(self.state(obs).square() @ obs.new_tensor([1.0, 1.0, 0.1, 0.1]))

    def step_reward(self, obs, act):
        """The reward of a step from obs (.., 6) with act (.., 1)."""
        return self.reward(self.observe(self.step(self.state(obs), act)))

    def energy(self, state):
        """Kinetic plus potential energy in joules, zero at the hinge's height: (.., 4) -> (..)."""
        a1, a2, v1, v2 = state.unbind(-1)
        m22, c2 = 1 / 3, a2.cos()
        kinetic = (5 / 3 + c2) * v1 * v1 / 2 + (m22 + c2 / 2) * v1 * v2 + m22 * v2 * v2 / 2
        return kinetic + self.G * (1.5 * a1.cos() + 0.5 * (a1 + a2).cos())


class PlanarHopper:
    """The hopper of LOCOMOTION with the contacts of PWM's simulator, in batched torch and differentiable.

    A chain of four links in the x-z plane with the masses and lengths of gymnasium's hopper.xml. state (.., 12):
    x, z (m), pitch, thigh, leg, foot (rad), then their rates, as MuJoCo orders them. One step is 1/60 s in 8 substeps
    of semi-implicit Euler; as in the reference code the mass matrix is that of the step's beginning, every joint is
    damped, and the ends of the capsules are springs of ke N/m on the floor with damping and friction. `stiffness`
    multiplies ke and kd: 5 is the stiff contact of Fig. 7a."""

    DT, SUBSTEPS, TORQUE, KF, FRICTION, LIMIT = 1 / 60, 8, 200.0, 1e3, 0.9, 1e3
    DAMPING = (10.0, 10.0, 10.0, 12.0, 12.0, 12.0)    # N s/m, N m s/rad
    FLOOR = 0.8                                       # metres of the torso, below which the episode ends

    def __init__(self, stiffness=1.0):
        m = _body_model("hopper")
        self.ke, self.kd, self.gravity = 2e4 * stiffness, 2e3 * stiffness, -float(m.opt.gravity[2])
        plane, hinge = [0, 2], m.jnt_pos[2:]          # one hinge per body, after the two slides of the torso
        self.sign = m.jnt_axis[2:, 1]                 # pitch turns about +y, the joints about -y
        parent = np.concatenate([[[0, 0, 0]], hinge[:-1]])
        self.offset = (m.body_pos[1:] + hinge - parent)[1:, plane]       # from hinge to hinge, in the parent's frame
        self.com = (m.body_ipos[1:] - hinge)[:, plane]                   # from a body's hinge to its centre
        self.mass = m.body_mass[1:]
        turn = np.stack([_rotation(q) for q in m.body_iquat[1:]])
        self.inertia = np.einsum("bi,bi->b", turn[:, 1] ** 2, m.body_inertia[1:])             # about y
        geom = np.arange(1, m.ngeom)                  # without the floor
        body = m.geom_bodyid[geom] - 1
        half = np.stack([_rotation(m.geom_quat[g])[:, 2] * m.geom_size[g, 1] for g in geom])
        ends = np.concatenate([m.geom_pos[geom] + half, m.geom_pos[geom] - half]) - hinge[np.tile(body, 2)]
        self.end, self.owner, self.radius = ends[:, plane], np.tile(body, 2), np.tile(m.geom_size[geom, 0], 2)
        self.low, self.high = m.jnt_range[3:].T
        self.armature = m.dof_armature[3]             # 1 on all six coordinates, as in the reference
        self.moves = np.tril(np.ones((4, 4)))         # [b, j]: hinge j moves body b

    def _links(self, q):
        """Places of the hinges (.., 4, 2) and a function that turns vectors (n, 2) of bodies (n,) into the world."""
        import torch
        angle = (q[..., 2:] * q.new_tensor(self.sign)).cumsum(-1)
        c, s = angle.cos(), angle.sin()

        def turned(r, body):
            r, c_, s_ = q.new_tensor(r), c[..., body], s[..., body]
            return torch.stack([c_ * r[:, 0] + s_ * r[:, 1], c_ * r[:, 1] - s_ * r[:, 0]], -1)

        rest = q[..., None, :2] + turned(self.offset, [0, 1, 2]).cumsum(-2)
        return torch.cat([q[..., None, :2], rest], -2), turned

    def _jacobian(self, points, hinges, owner):
        """How the hinges move points (.., n, 2) of bodies owner (n,): (.., n, 4, 2). Slides move all alike."""
        import torch
        lever = points[..., None, :] - hinges[..., None, :, :]
        turn = torch.stack([lever[..., 1], -lever[..., 0]], -1)
        return turn * points.new_tensor(self.moves[owner] * self.sign)[..., None]

    def mass_matrix(self, q):
        """M(q): (.., 6) -> (.., 6, 6), with armature."""
        import torch
        hinges, turned = self._links(q)
        J = self._jacobian(hinges + turned(self.com, [0, 1, 2, 3]), hinges, np.arange(4))
        mass, spin = q.new_tensor(self.mass), q.new_tensor(self.moves * self.sign)
        hinge = torch.einsum("b,...bix,...bjx->...ij", mass, J, J)
        hinge = hinge + torch.einsum("b,bi,bj->ij", q.new_tensor(self.inertia), spin, spin)
        mixed = torch.einsum("b,...bjx->...xj", mass, J)                                      # (.., 2, 4)
        slide = (mass.sum() * torch.eye(2, dtype=q.dtype, device=q.device)).expand(*q.shape[:-1], 2, 2)
        M = torch.cat([torch.cat([slide, mixed], -1), torch.cat([mixed.transpose(-1, -2), hinge], -1)], -2)
        return M + self.armature * torch.eye(6, dtype=q.dtype, device=q.device)

    def forces(self, q, v):
        """bias(q, v), i.e. Coriolis, centrifugal and weight, and contact forces, both (.., 6)."""
        import torch
        hinges, turned = self._links(q)
        rate = (v[..., 2:] * q.new_tensor(self.sign)).cumsum(-1)                              # of every body
        com = turned(self.com, [0, 1, 2, 3])
        J = self._jacobian(hinges + com, hinges, np.arange(4))
        inward = -rate.square()[..., None]                                                    # w x (w x r) = -w^2 r
        between = inward[..., :3, :] * (hinges[..., 1:, :] - hinges[..., :3, :])
        acc = torch.cat([torch.zeros_like(between[..., :1, :]), between.cumsum(-2)], -2) + inward * com
        weighed = q.new_tensor(self.mass)[:, None] * (acc + q.new_tensor([0, self.gravity]))
        bias = torch.cat([weighed.sum(-2), torch.einsum("...bjx,...bx->...j", J, weighed)], -1)

        ends = hinges[..., self.owner, :] + turned(self.end, self.owner)
        depth = (q.new_tensor(self.radius) - ends[..., 1]).relu()                             # (.., 8)
        lowest = ends - torch.stack([torch.zeros_like(depth), q.new_tensor(self.radius).expand_as(depth)], -1)
        J = self._jacobian(lowest, hinges, self.owner)
        speed = v[..., None, :2] + torch.einsum("...njx,...j->...nx", J, v[..., 2:])
        push = depth * (self.ke + self.kd * (-speed[..., 1]).relu())
        slip = speed[..., 0]
        grip = torch.minimum(self.KF * slip.abs(), self.FRICTION * self.ke * depth)
        force = torch.stack([-grip * slip.sign(), push], -1)                                  # (.., 8, 2)
        return bias, torch.cat([force.sum(-2), torch.einsum("...njx,...nx->...j", J, force)], -1)

    def step(self, state, act):
        """state (.., 12), act (.., 3) in [-1, 1] -> the state 1/60 s later."""
        import torch
        q, v = state.chunk(2, -1)
        inverse = torch.linalg.inv(self.mass_matrix(q))
        for _ in range(self.SUBSTEPS):
            q, v = self.substep(q, v, inverse, self.TORQUE * act)
        return torch.cat([q, v], -1)

    def substep(self, q, v, inverse, torque):
        """q, v (.., 6), inverse mass matrix (.., 6, 6), torque (.., 3) -> q, v one eighth of a step later."""
        import torch
        bias, contact = self.forces(q, v)
        over, under = q[..., 3:] - q.new_tensor(self.high), q.new_tensor(self.low) - q[..., 3:]
        joints = torque - self.LIMIT * (over.relu() - under.relu())
        force = contact - bias - q.new_tensor(self.DAMPING) * v + torch.cat([torch.zeros_like(joints), joints], -1)
        v = v + self.DT / self.SUBSTEPS * (inverse @ force[..., None])[..., 0]
        return q + self.DT / self.SUBSTEPS * v, v

    def observe(self, state):
        """(.., 12) -> (.., 11): height - 1.25, pitch, joints, rates."""
        import torch
        return torch.cat([state[..., 1:2] - 1.25, state[..., 2:]], -1)

    def state(self, obs):
        """The inverse of observe, at x = 0: (.., 11) -> (.., 12)."""
        import torch
        return torch.cat([torch.zeros_like(obs[..., :1]), obs[..., :1] + 1.25, obs[..., 1:]], -1)

    def step_reward(self, obs, act):
        """Reward (..) of a step from obs (.., 11) with act (.., 3), as _Body.reward has it."""
        height = (obs[..., 0] + 0.3).clamp(-1, 0.3)
        height = height - height.clamp(max=0) - 200 * height.clamp(max=0).square()
        return obs[..., 5] + height + 1 - (obs[..., 1] / (math.pi / 6)).square() - 0.1 * act.square().sum(-1)

    def ended(self, obs):
        """Whether a step into obs (.., 11) ended the episode: (..) bool."""
        return obs[..., 0] + 1.25 < self.FLOOR


def _rotation(quaternion):
    import mujoco
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def plant(task):
    """The differentiable plant of a task (BallWall, DoublePendulum, PlanarHopper), None if it has none."""
    plants = {"ball-wall": BallWall, "double-pendulum": DoublePendulum, "planar-hopper": PlanarHopper,
              "stiff-hopper": lambda: PlanarHopper(5.0)}
    return plants.get(task, lambda: None)()


class _Toy(_Env):
    """A task of TOY as an environment: ball-wall is one throw (theta = pi x action, reward the distance, then it ends);
    the pendulum is truncated after 240 steps. They are not drawn."""

    def __init__(self, task, seed, obs, size):
        if obs == "pixels":
            raise SystemExit(f"{task} draws no frames: use obs='state'")
        self.plant = plant(task)
        self._env = SimpleNamespace(close=lambda: None)
        self._setup(task, seed, obs, size, task_facts(task))

    def _restart(self, seed):
        import torch
        if self.task == "ball-wall":
            return np.zeros(1)
        g = torch.Generator().manual_seed(int(self.np_random.integers(2**31)))
        self._state = self.plant.reset(1, g, torch.float64)
        return self.plant.observe(self._state)[0].numpy()

    def _advance(self, action):
        import torch
        a = torch.as_tensor(action, dtype=torch.float64)
        if self.task == "ball-wall":
            return np.zeros(1), float(self.plant.distance(math.pi * a)[0]), True, False, 0.0
        self._state = self.plant.step(self._state, a[None])
        obs = self.plant.observe(self._state)
        return obs[0].numpy(), float(self.plant.reward(obs)[0]), False, False, 0.0

    def _frame(self):
        raise SystemExit(f"{self.task} draws no frames: use obs='state'")


# -------------------------------------------------------------------------------- roll-outs
def _spawn(function):
    """Call a function of this file with a pipe's file number in a fresh interpreter -> (process, connection)."""
    # Not multiprocessing.Process: its children import the parent's script, hence torch (seconds and
    # hundreds of MB each). A fresh interpreter that imports only this file starts in 0.3 s. It gets the
    # parent's sys.path, so that "module:Id-v0" means the same there, and its own session, so that Ctrl-C
    # reaches the parent alone.
    ours, theirs = socket.socketpair()
    path = [os.path.dirname(os.path.abspath(__file__)), *(p or os.getcwd() for p in sys.path)]
    code = f"import sys; sys.path[:] = {path!r}; import envs; envs.{function}({theirs.fileno()})"
    proc = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    theirs.close()
    return proc, multiprocessing.connection.Connection(ours.detach())


class Workers:
    """Environment worker processes for batched roll-outs (context manager; start them once per run).

    n: processes; max_envs: environments that step together, over all processes."""

    def __init__(self, n, max_envs=64):
        if n < 1 or max_envs < 1:
            raise SystemExit(f"Workers got n={n}, max_envs={max_envs}; expected 1 or more of each")
        self.n, self.max_envs = n, max_envs
        self.procs, self._conns = [None] * n, [None] * n
        for i in range(n):
            self._start(i)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stop all processes; a later rollout starts new ones."""
        for conn in filter(None, self._conns):
            conn.close()                          # a worker leaves when its pipe closes
        for proc in filter(None, self.procs):
            try:
                proc.wait(1)
            except subprocess.TimeoutExpired:     # inside a long reset
                proc.kill()
                proc.wait()
        self.procs, self._conns = [None] * self.n, [None] * self.n

    def _start(self, i):
        self.procs[i], self._conns[i] = _spawn("_worker")

    def rollout(self, jobs, policy, progress=None):
        """Play one episode per job and return them in the order of the jobs.

        jobs: list of (task, seed).
        policy: (obs (n, O) float32, job (n,) int, t (n,) int) -> act (n, A). Called once per lockstep for all
          n running environments, whatever their task or process: the result does not depend on the number of
          workers. O and A are the widest of the jobs: obs is padded with zeros, an environment reads its
          first entries of act. job indexes `jobs`; t is the agent step within the episode.
        progress: called now and then with (agent steps done, agent steps expected).
        Returns dicts: task, seed, obs (T+1, O_task), act (T, A_task), rew (T,), term (T,) bool (True only
          where the task ended by itself), success (float, of the last step), ret (float, sum of rew).
        A worker that dies is named on stderr and replaced; its unfinished episodes restart from their seeds.
        Errors: SystemExit at the third death, or with the sentence of what went wrong in an environment."""
        jobs = [(task, int(seed)) for task, seed in jobs]
        if not jobs:
            return []
        if jobs[0][0] in LOCOMOTION and len({task for task, _ in jobs}) == 1:
            return _herd_rollout(jobs, policy, progress, self.max_envs, self.n)   # in this process, on n threads
        facts = {task: task_facts(task) for task in dict.fromkeys(task for task, _ in jobs)}
        steps = np.array([facts[task].episode_length for task, _ in jobs])
        width, act_dim = (max(f[k] for f in facts.values()) for k in (0, 1))
        # Sorted by task, then cut into one run of about equal steps per slot: few environments get made.
        order = np.array(sorted(range(len(jobs)), key=lambda j: (jobs[j][0], j)))
        slots = min(len(jobs), self.max_envs)
        cost = steps[order] if slots < len(jobs) else np.ones(slots)
        slot_of = ((np.cumsum(cost) - cost / 2) / cost.sum() * slots).astype(int)
        obs, job, t = np.zeros((slots, width), np.float32), np.full(slots, -1), np.zeros(slots, int)
        results, deaths, rounds = [None] * len(jobs), 0, 0

        def opening(i):                           # slot s is worker s % n's; only unfinished jobs go out
            return width, [(s, [(int(j), *jobs[j]) for j in order[slot_of == s] if results[j] is None])
                           for s in range(i, slots, self.n)]

        try:
            messages = {i: opening(i) for i in range(min(self.n, slots))}
            while messages:
                for i, message in messages.items():
                    if self.procs[i] is None:
                        self._start(i)
                    self._send(i, message)
                for i in messages:
                    while (reply := self._receive(i)) is None:
                        deaths += 1
                        lost = sorted({jobs[j][0] for _, queue in opening(i)[1] for j, *_ in queue})
                        self._replace(i, lost, deaths)
                        self._send(i, opening(i))
                    rows, job[i::self.n] = reply[0], -1
                    job[rows], t[rows], obs[rows] = reply[1:4]
                    for j, episode in reply[4]:
                        results[j] = episode
                live = np.flatnonzero(job >= 0)
                if progress and (rounds % 20 == 0 or not len(live)):
                    done = steps[[r is not None for r in results]].sum() + t[live].sum()
                    progress(int(done), int(steps.sum()))
                rounds += 1
                messages = {}
                if len(live):
                    act = np.asarray(policy(obs[live], job[live], t[live]), np.float32)
                    if act.shape != (len(live), act_dim):
                        raise SystemExit(f"the policy returned actions of shape {act.shape}; "
                                         f"expected {(len(live), act_dim)}, one row per observation")
                    messages = {int(i): act[live % self.n == i] for i in np.unique(live % self.n)}
        except BaseException:                     # also Ctrl-C: a reply may be under way, start afresh
            self.close()
            raise
        return results

    def _send(self, i, message):
        try:
            self._conns[i].send(message)
        except OSError:                           # it died: the receive that follows will say so
            pass

    def _receive(self, i):
        """A worker's reply, None if it died; what went wrong in an environment ends this program too."""
        try:
            reply = self._conns[i].recv()
        except (EOFError, OSError):
            return None
        if isinstance(reply, str):
            raise SystemExit(reply)
        return reply

    def _replace(self, i, tasks, deaths):
        code = self.procs[i].wait()
        how = f"worker {i} (pid {self.procs[i].pid}, exit code {code}) died while playing {', '.join(tasks)}"
        if deaths == 3:
            raise SystemExit(f"{how}; it is the third death in one roll-out: exit code -9 usually means lack "
                             "of memory, so try a smaller max_envs or fewer workers")
        print(f"{how}; its unfinished episodes start again", file=sys.stderr)
        self._conns[i].close()
        self._start(i)


def _worker(fd):
    """A worker process. A tuple (width, queues) opens a roll-out, an array has one action per running slot;
    the answer to both is (slots, jobs, steps, observations, finished episodes), or a sentence on failure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    conn = multiprocessing.connection.Connection(fd)
    idle, running, queues, width, playing = {}, {}, {}, 0, ""       # idle: kept, for they are slow to make

    def begin(slot):
        nonlocal playing
        job, playing, seed = queues[slot].pop(0)
        env = idle[playing].pop() if idle.get(playing) else make_env(playing)
        obs, _ = env.reset(seed=seed)
        running[slot] = SimpleNamespace(job=job, task=playing, seed=seed, env=env, obs=[obs], act=[], rew=[],
                                        term=[])

    try:
        while True:
            message, finished = conn.recv(), []
            if isinstance(message, tuple):
                width, queues = message[0], dict(message[1])
                for slot in [s for s, queue in queues.items() if queue]:
                    begin(slot)
            else:
                for slot, act in zip(list(running), message, strict=True):
                    e = running[slot]
                    playing, act = e.task, act[:e.env.facts.act_dim]
                    obs, rew, term, trunc, info = e.env.step(act)
                    for values, x in ((e.obs, obs), (e.act, act), (e.rew, rew), (e.term, term)):
                        values.append(x)
                    if term or trunc:
                        finished.append((e.job, {
                            "task": e.task, "seed": e.seed, "obs": np.stack(e.obs), "act": np.stack(e.act),
                            "rew": np.array(e.rew, np.float32), "term": np.array(e.term),
                            "success": info["success"], "ret": float(sum(e.rew))}))
                        idle.setdefault(e.task, []).append(running.pop(slot).env)
                        if queues[slot]:
                            begin(slot)
                running = dict(sorted(running.items()))
            padded = np.zeros((len(running), width), np.float32)
            for row, e in zip(padded, running.values()):
                row[:len(e.obs[-1])] = e.obs[-1]
            conn.send((list(running), [e.job for e in running.values()],
                       [len(e.act) for e in running.values()], padded, finished))
    except (EOFError, ConnectionError):           # the parent closed the pipe or was killed
        return
    except SystemExit as error:
        conn.send(str(error))
    except Exception as error:                    # noqa: BLE001 (a user's environment may raise anything)
        traceback.print_exc()
        conn.send(f"{playing} failed in a worker process (traceback above): {type(error).__name__}: {error}")


class Fleet:
    """One process per environment, which steps while the caller does something else (context manager).

        fleet = Fleet(["Boxing", "Krull"], obs="pixels")
        obs = fleet.reset([0, 1])                 # a seed each
        fleet.send(actions, next_seeds)           # returns at once
        steps = fleet.receive()                   # [(obs, rew, terminated, truncated, info)], waits for the slowest

    One process each, because Meta-World draws wrong pictures with two renderers in one (its issue 448).
    options: {task: keyword arguments of make_env}. Attribute: legal, the action indices a game tells apart per
    environment, or None where actions are continuous. An environment that ends restarts at once with its next seed:
    `obs` is then the first of the new episode."""

    def __init__(self, tasks, options=None, obs="pixels", size=64):
        self.tasks = list(tasks)
        self._links = [_spawn("_fleet_worker") for _ in self.tasks]
        for i, task in enumerate(self.tasks):
            self._post(i, (task, obs, size, (options or {}).get(task, {})))
        try:
            self.legal = self.receive()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stop all processes."""
        for _, conn in self._links:
            conn.close()
        for proc, _ in self._links:
            try:
                proc.wait(2)
            except subprocess.TimeoutExpired:
                proc.kill()
                proc.wait()

    def _post(self, i, message):
        try:
            self._links[i][1].send(message)
        except OSError:                           # it died: receive will say so
            pass

    def receive(self):
        """What every environment answered, in order. SystemExit: an environment failed, or its process died."""
        answers = []
        for (proc, conn), task in zip(self._links, self.tasks):
            try:
                answers.append(conn.recv())
            except (EOFError, OSError):
                raise SystemExit(f"the environment process of {task} died (exit code {proc.wait()}; -9 usually means "
                                 "lack of memory): type the same command with --resume") from None
            if isinstance(answers[-1], str):
                raise SystemExit(answers[-1])
        return answers

    def reset(self, seeds, actions=None):
        """Start an episode in every environment and play `actions` (one list per environment) -> observations."""
        for i, seed in enumerate(seeds):
            self._post(i, ("reset", int(seed), actions[i] if actions else []))
        return self.receive()

    def send(self, actions, next_seeds):
        """Let every environment take one step; its next episode, if this one ends, has the seed given."""
        for i, (action, seed) in enumerate(zip(actions, next_seeds)):
            self._post(i, ("step", int(seed), action))


def _fleet_worker(fd):
    """A process of Fleet: (task, obs, size, options), then ("reset", seed, actions) or ("step", next seed, action)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    conn, task = multiprocessing.connection.Connection(fd), ""
    try:
        task, obs, size, options = conn.recv()
        env = make_env(task, 0, obs, size, **options)
        conn.send(getattr(env, "legal", None))
        while True:
            kind, seed, action = conn.recv()
            if kind == "reset":
                frame, _ = env.reset(seed=seed)
                for a in action:
                    frame = env.step(a)[0]
                conn.send(frame)
            else:
                frame, rew, terminated, truncated, info = env.step(action)
                if terminated or truncated:
                    frame, _ = env.reset(seed=seed)
                conn.send((frame, rew, terminated, truncated, info))
    except (EOFError, ConnectionError):           # the parent closed the pipe or was killed
        return
    except SystemExit as error:
        conn.send(str(error))
    except Exception as error:                    # noqa: BLE001 (an environment may raise anything)
        traceback.print_exc()
        conn.send(f"{task} failed in its process (traceback above): {type(error).__name__}: {error}")


def _throughput(tasks):
    """Print agent steps per second of random roll-outs with 1 and 2 workers, then the same as JSON."""
    rng, table = np.random.default_rng(0), {task: {} for task in tasks}
    for n in (1, 2):
        with Workers(n) as workers:
            for task in tasks:
                jobs, act_dim = [(task, seed) for seed in range(8)], task_facts(task).act_dim

                def policy(obs, job, t, act_dim=act_dim):
                    return rng.uniform(-1, 1, (len(obs), act_dim))
                workers.rollout(jobs, policy)     # makes the environments
                start = time.perf_counter()
                steps = sum(len(episode["rew"]) for episode in workers.rollout(jobs, policy))
                table[task][n] = round(steps / (time.perf_counter() - start))
    print(f"{'task':28}{'1 worker':>12}{'2 workers':>12}   agent steps/s, 8 environments")
    for task, rate in table.items():
        print(f"{task:28}{rate[1]:12,}{rate[2]:12,}")
    print(json.dumps({"agent_steps_per_second": table, "environments": 8, "cpus": os.cpu_count()}))


def _herd_throughput(tasks=LOCOMOTION, rows=64, seconds=3.0):
    """Print environment steps per second of Herd with random actions, restarts included: wall clock with 1 thread and
    with all cores, and per CPU-second of one core; then the same as JSON."""
    rng, table = np.random.default_rng(0), {}
    for task in tasks:
        table[task] = {}
        for threads in dict.fromkeys((1, os.cpu_count() or 1)):
            with Herd(task, rows, threads=threads) as herd:
                herd.reset()
                act, n = rng.uniform(-1, 1, (50, rows, herd.facts.act_dim)), 0
                wall, cpu = time.perf_counter(), time.process_time()
                while time.perf_counter() - wall < seconds:
                    herd.step(act[n % 50])
                    n += 1
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            table[task][f"{threads} thread{'s' * (threads > 1)}"] = {
                "per_second": round(rows * n / wall), "per_cpu_second": round(rows * n / cpu)}
    for task, rates in table.items():
        print(f"{task:18}" + "".join(f"{k}: {r['per_second']:8,}/s, {r['per_cpu_second']:8,}/CPU-s   "
                                     for k, r in rates.items()))
    print(json.dumps({"command": "python envs.py locomotion", "rows": rows, "cpus": os.cpu_count(),
                      "environment_steps": table}))


if __name__ == "__main__":
    if sys.argv[1:] == ["locomotion"]:
        sys.exit(_herd_throughput())
    one_per_domain = {task.split("-")[0]: task for task in ("mw-reach", *MT30[::-1])}
    _throughput(sys.argv[1:] or list(one_per_domain.values()))
