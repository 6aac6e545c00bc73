"""Tasks: names, constructors, dimensions, scores and parallel roll-outs.  Copy me next to any of the scripts.

    env = make_env("walker-walk", seed=0)          # or "mw-reach", "Pendulum-v1", "my_module:Id-v0"
    env = make_env("Boxing", obs="pixels")         # an Atari game: discrete actions, 64 x 64 RGB
    with Workers(2) as workers:                    # batched roll-outs in two processes
        episodes = workers.rollout([("walker-walk", 0), ("cup-spin", 1)], policy)

`python envs.py [TASK ...]` prints agent steps per second for one task of each domain.

Vocabulary: O observation size, A action size, T agent steps of an episode, n environments stepping together.
An agent step is `action_repeat` control steps with the same action and the summed reward.
MT30 and MT80 are the task sets of TD-MPC2 (Hansen et al., 2024) in its order: the position is the task id.
"""
import difflib
import functools
import importlib
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
    """Sizes of a task."""
    obs_dim: int                                  # O, also when the environment is asked for pixels
    act_dim: int                                  # A
    episode_length: int                           # agent steps until truncation
    action_repeat: int                            # control steps per agent step


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


def task_facts(task):
    """Facts of a task. MT30 and Meta-World come from a table; any other task is made once to be measured."""
    if task in _MT30_DIMS:
        return Facts(*_MT30_DIMS[task], 500, 2)
    return Facts(39, 4, 100, 2) if task in METAWORLD50 else _measured_facts(task)


@functools.cache
def _measured_facts(task):
    env = make_env(task)
    env.close()
    return env.facts


def score(task, ret, success):
    """Score of an episode in [0, 1] as in TD-MPC2: success for `mw-` tasks, return / 1000 for dm_control. For Atari
    the human-normalised score: 0 a random policy, 1 a human tester.

    A gymnasium id has no published scale: its return comes back as it is, and can lie outside [0, 1]."""
    if task in METAWORLD50:
        return float(success)
    if (game := task.partition("@")[0]) in ATARI_SCORES:
        random, human = ATARI_SCORES[game]
        return (float(ret) - random) / (human - random)
    return float(ret) if _is_gymnasium_id(task) else float(ret) / 1000.0


def _is_gymnasium_id(task):
    return ":" in task or task in gymnasium.registry


def _unknown(task):
    suite = (f"{domain}-{name.replace('_', '-')}" for domain, name in _import_suite().ALL_TASKS)
    near = difflib.get_close_matches(task, dict.fromkeys([*MT80, *ATARI26, *suite, *gymnasium.registry]), 3, 0.4)
    return SystemExit(f"unknown task {task!r}: expected an MT30/MT80/ATARI26 name, a dm_control 'domain-task' or "
                      f"a gymnasium id ('module:Id-v0' for your own); nearest: {', '.join(near) or 'none'}")


# -------------------------------------------------------------------------------- constructors
def make_env(task, seed=0, obs="state", size=64, **options):
    """Make one environment, a gymnasium.Env that passes gymnasium's check_env.

    task: a name of MT30 or MT80; a dm_control suite task as `domain-task` (the first '-' ends the domain, the
      others stand for '_', 'cup' is ball_in_cup: `point_mass-easy`, `finger-turn-hard`); or a registered
      gymnasium id with a continuous Box action space (`Pendulum-v1`; `module:Id-v0` imports `module`).
      Or an Atari game of ATARI26 by its bare name, with 18 discrete actions and obs="pixels" (see _Atari);
      `Breakout@m4d1` is the game in the ALE's mode 4 and difficulty 1.
    seed: of the first reset; `reset(seed=s)` fixes all that is random in an episode.
    obs: "state" gives float32 (O,); "pixels" gives uint8 (size, size, 3) and needs OpenGL.
    options: of Atari: sticky, life_loss, noop, frame_cap; of Meta-World: camera, repeat, length.
    Actions are float32 (A,) in [-1, 1], rescaled to the task's own bounds where these are finite.

    Episodes: dm_control repeats each action twice, is truncated after 500 agent steps and never terminated;
    Meta-World repeats twice, is truncated after 100, and draws a new goal at each reset; a gymnasium id is
    not repeated and keeps its own limit (1000 steps if it has none). `info["success"]` is a float, 0.0 where
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
    return (_Gymnasium if _is_gymnasium_id(task) else _Suite)(task, seed, obs, size)


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
        truncated = bool(truncated) or self.t >= self.facts.episode_length
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
        self._setup(task, seed, obs, size, Facts(len(self._flat()), *spec.shape, 500, 2))

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
        self._env = env
        self._setup(task, seed, obs, size, Facts(39, 4, length, repeat))

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


if __name__ == "__main__":
    one_per_domain = {task.split("-")[0]: task for task in ("mw-reach", *MT30[::-1])}
    _throughput(sys.argv[1:] or list(one_per_domain.values()))
