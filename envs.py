"""Tasks: names, constructors, facts, scores and parallel roll-outs.  Copy me next to any script.

    env = make_env("walker-walk", seed=0)     # or "mw-reach", "Pendulum-v1", "my_module:Id-v0"
    env = make_env("Boxing", obs="pixels")    # an Atari game: discrete actions, 64 x 64 RGB
    env = make_env("catch", obs="pixels")     # one of the small GAMES, which need no package
    register("my_module:task", Facts(..), make)   # in my_module.py: a task of your own
    with Workers(2) as workers:               # whole episodes, played in two processes
        episodes = workers.rollout([("walker-walk", 0), ("cup-spin", 1)], policy)
    with beside("Pendulum-v1", 64) as rows:   # 64 environments in lock step
        obs = rows.reset()

Shapes: O observation, A action, T agent steps of an episode, n environments stepping together.
An agent step is `action_repeat` control steps with the same action and the summed reward.
"""
import contextlib
import difflib
import functools
import importlib
import itertools
import math
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import traceback
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium
import numpy as np


class Facts(NamedTuple):
    """Sizes of a task, the scale of its score, and whether its episodes may end by themselves."""
    obs_dim: int                 # O, also when the environment is asked for pixels
    act_dim: int                 # A
    episode_length: int          # agent steps until truncation
    action_repeat: int           # control steps per agent step
    scale: float | None = None   # return that scores 1; 0.0: success is the score; None: the return
    ends: bool = True            # may be terminated before its time is over


# ------------------------------------------------------------------------------------- task tables
_MT30_DIMS = {  # name: (O, A); a static table, so that asking costs nothing
    "walker-stand": (24, 6), "walker-walk": (24, 6), "walker-run": (24, 6), "cheetah-run": (17, 6),
    "reacher-easy": (6, 2), "reacher-hard": (6, 2), "acrobot-swingup": (6, 1),
    "pendulum-swingup": (3, 1), "cartpole-balance": (5, 1), "cartpole-balance-sparse": (5, 1),
    "cartpole-swingup": (5, 1), "cartpole-swingup-sparse": (5, 1), "cup-catch": (8, 2),
    "finger-spin": (9, 2), "finger-turn-easy": (12, 2), "finger-turn-hard": (12, 2),
    "fish-swim": (24, 5), "hopper-stand": (15, 4), "hopper-hop": (15, 4),
    "walker-walk-backwards": (24, 6), "walker-run-backwards": (24, 6),
    "cheetah-run-backwards": (17, 6), "cheetah-run-front": (17, 6), "cheetah-run-back": (17, 6),
    "cheetah-jump": (17, 6), "hopper-hop-backwards": (15, 4), "reacher-three-easy": (8, 3),
    "reacher-three-hard": (8, 3), "cup-spin": (8, 2), "pendulum-spin": (3, 1)}
MT30 = tuple(_MT30_DIMS)  # of TD-MPC2 (Hansen et al., 2024) in its order: position is task id
METAWORLD50 = tuple("mw-" + name for name in """
    assembly basketball button-press-topdown button-press-topdown-wall button-press
    button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-open
    door-close drawer-close drawer-open faucet-open faucet-close hammer handle-press-side
    handle-press handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side
    pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back
    plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer stick-push
    stick-pull sweep-into sweep window-open window-close bin-picking box-close door-lock door-unlock
    hand-insert""".split())
MT80 = MT30 + METAWORLD50
MT10 = tuple("mw-" + name for name in """
    reach push pick-place door-open drawer-open drawer-close button-press-topdown peg-insert-side
    window-open window-close""".split())  # Meta-World's own set of ten
ATARI_SCORES = {  # of a random policy and of a human tester (Mnih et al., 2015)
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3), "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5),
    "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5), "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4), "DemonAttack": (152.1, 1971.0), "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5), "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8), "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3), "MsPacman": (307.3, 6951.6), "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455.0), "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7), "UpNDown": (533.4, 11693.2)}
ATARI26 = tuple(ATARI_SCORES)  # the 26 games of the Atari-100k benchmark
GAMES = {  # see _Game: mean return of random play, and of a player that knows the rules
    "catch": (-6.7, 10.0), "avoid": (-6.7, 10.0), "chase": (1.1, 13.9), "paint": (16.4, 35.0),
    "collect": (3.9, 32.4), "mirror-catch": (-6.7, 10.0)}  # looks like catch: left is right
SUITES = {"mt30": MT30, "mt80": MT80}  # names of task sets
MOVED_TASKS = {new.partition(":")[2]: new for new in """
    studies.bodies:hopper studies.bodies:ant studies.bodies:anymal studies.bodies:humanoid
    studies.bodies:muscle-humanoid studies.plants:ball-wall studies.plants:double-pendulum
    studies.plants:planar-hopper studies.plants:stiff-hopper""".split()}


def task_facts(task):
    """Facts of a task: from a table, from `register`, or the task is made once to be measured.

    SystemExit: an unknown task."""
    if task in _MT30_DIMS:
        return Facts(*_MT30_DIMS[task], 500, 2, 1000.0, False)
    if task in METAWORLD50:
        return Facts(39, 4, 100, 2, 0.0, False)
    if (game := task.partition("@")[0]) in ATARI_SCORES:
        random, human = ATARI_SCORES[game]
        return Facts(3 * 64 * 64, 18, 27_000, 4, human - random, True)
    if task in GAMES:
        random, best = GAMES[task]
        return Facts(3 * 64 * 64, 3 if task in _FALLING else 5, 60, 1, best - random, False)
    family = _registered(task)
    return family.facts if family else _measured_facts(task)


@functools.cache
def _measured_facts(task):
    env = make_env(task)
    env.close()
    return env.facts


def score(task, ret, success):
    """Score of an episode with return `ret`, by the scale of the task's Facts.

    As in TD-MPC2 success for `mw-` tasks and return / 1000 for dm_control; for Atari
    human-normalised (0 random, 1 a human tester), for small games 1 is the best. A task without a
    scale scores its return."""
    scale = task_facts(task).scale
    if scale is None:
        return float(ret)
    random, _ = (ATARI_SCORES | GAMES).get(task.partition("@")[0], (0.0, 0.0))
    return (float(ret) - random) / scale if scale else float(success)


def _unknown(task):
    if task in MOVED_TASKS:
        return SystemExit(f"the task {task} has moved: type --task {MOVED_TASKS[task]}")
    suite = [f"{domain}-{name.replace('_', '-')}" for domain, name in _import_suite().ALL_TASKS]
    known = [*MT80, *ATARI26, *GAMES, *_FAMILIES, *suite, *gymnasium.registry]
    known = {name.rpartition(":")[2]: name for name in known[::-1]}
    near = difflib.get_close_matches(task.rpartition(":")[2], known, 3, 0.4)
    return SystemExit(f"unknown task {task!r}: expected an MT30/MT80/ATARI26/GAMES name, a "
                      "dm_control 'domain-task' or a gymnasium id ('module:Id-v0' for your own); "
                      f"nearest: {', '.join(known[name] for name in near) or 'none'}")


# -------------------------------------------------------------------------------- your own families
_FAMILIES = {}  # name: facts, make, batch


def register(name, facts, make, batch=None):
    """Add a task of your own, called "module:rest" after the module whose import registers it.

    make(seed, obs) -> gymnasium.Env with a Box of actions, which make_env wraps: actions in
      [-1, 1], float32 vectors, action repeat and time limit of facts; pixels: what it renders.
    batch(n, seed, workers) -> n of them side by side, for `beside`: anything with that interface or
      a gymnasium.vector.VectorEnv (see Flock). If it has a method rollout(jobs, policy, progress),
      that plays the episodes of Workers.rollout.
    Worker processes import the module too. SystemExit: a name without a module, no Facts."""
    if not all(name.partition(":")) or not isinstance(facts, Facts):
        raise SystemExit(f"register got the name {name!r} and the facts {facts!r}; expected "
                         "'module:name' and Facts(obs_dim, act_dim, episode_length, action_repeat)")
    _FAMILIES[name] = SimpleNamespace(facts=facts, make=make, batch=batch)


def _registered(task):
    """What `register` got for "module:rest", whose module is imported; None: no such name."""
    if task not in _FAMILIES and ":" in task:
        try:
            importlib.import_module(task.partition(":")[0])
        except (ImportError, ValueError) as error:
            raise SystemExit(f"{task} cannot be made: {error}; install what it names, or give "
                             "'module:Id-v0' with a module that Python can import") from None
    return _FAMILIES.get(task)


# ------------------------------------------------------------------------------------- constructors
def make_env(task, seed=0, obs="state", size=64, **options):
    """Make one environment, a gymnasium.Env that passes gymnasium's check_env.

    task: a name of MT30, MT80, GAMES or ATARI26 (`Breakout@m4d1`: in the ALE's mode 4, difficulty
      1); a dm_control task as `domain-task` (the first '-' ends the domain, the others stand for
      '_', 'cup' is ball_in_cup); a gymnasium id with continuous actions (`module:Id-v0` imports
      `module`); or a name given to `register`.
    seed: of the first reset; `reset(seed=s)` fixes all that is random in an episode.
    obs: "state" gives float32 (O,); "pixels" uint8 (size, size, 3), by OpenGL except for games.
    options: of Atari: sticky, life_loss, noop, frame_cap; of Meta-World: camera, repeat, length.
    Actions are float32 (A,) in [-1, 1], rescaled to the task's own bounds where these are finite;
    Atari has 18 discrete ones, a small game 3 or 5. `info["success"]` is a float, 0.0 where there
    is no such notion.

    Episodes: dm_control repeats each action twice, is truncated after 500 agent steps and never
    terminated; Meta-World repeats twice, is truncated after 100, and draws a new goal at each
    reset; a gymnasium id is not repeated and keeps its own limit (1000 steps if it has none).
    SystemExit: an unknown task, a missing package, discrete actions, no OpenGL, or (while stepping)
    a number that is not finite."""
    if obs not in ("state", "pixels"):
        raise SystemExit(f"make_env got obs={obs!r}; expected 'state' or 'pixels'")
    if task.partition("@")[0] in ATARI26:
        return _Atari(task, seed, obs, size, **options)
    if task in GAMES:
        return _Game(task, seed, obs, size, **options)
    if obs == "pixels":
        choose_gl()  # an emulator draws without
    if task.startswith("mw-"):
        return _MetaWorld(task, seed, obs, size, **options)
    if options:
        raise SystemExit(f"{task} takes no options; make_env got {', '.join(options)}")
    if family := _registered(task):
        return _Gymnasium(task, family.make(seed, obs), seed, obs, size, family.facts)
    if ":" in task or task in gymnasium.registry:
        return _Gymnasium(task, _from_registry(task), seed, obs, size)
    return _Suite(task, seed, obs, size)


class _Env(gymnasium.Env):
    """What all tasks share. A subclass sets _env, calls _setup, and defines _restart(seed) -> obs,
    _advance(action) -> obs, rew, terminated, truncated, info, and _frame() -> picture."""
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (gymnasium's own way)
    render_mode = "rgb_array"

    def _setup(self, task, seed, obs, size, facts, fps):
        self.task, self.facts, self.t = task, facts, 0
        self.metadata = {**self.metadata, "render_fps": fps}  # of agent steps in real time
        self._first_seed, self._size = seed, size if obs == "pixels" else None
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (facts.act_dim,), np.float32)
        self.observation_space = (
            gymnasium.spaces.Box(-np.inf, np.inf, (facts.obs_dim,), np.float32) if obs == "state"
            else gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8))

    def reset(self, *, seed=None, options=None):
        """Start an episode -> obs, info. The same seed and actions give the same episode."""
        if seed is None:  # the constructor's seed counts for the first episode only
            seed = self._first_seed
        self._first_seed = None
        super().reset(seed=seed)
        self.t = 0
        return self._observe(self._restart(seed)), {"success": 0.0}

    def step(self, action):
        """One agent step -> obs, summed reward, terminated, truncated (time limit), info."""
        obs, rew, terminated, truncated, info = self._advance(self._read(action))
        if not math.isfinite(rew):
            raise self._broken("reward")
        self.t += 1
        truncated = bool(truncated) or (self.t >= self.facts.episode_length and not terminated)
        return self._observe(obs), float(rew), bool(terminated), truncated, info

    def render(self):
        """One frame, uint8 (height, width, 3)."""
        choose_gl()
        return self._frame()

    def close(self):
        """Free the simulation."""
        self._env.close()

    def _read(self, action):
        action = np.asarray(action, np.float32)
        action = np.minimum(np.maximum(action, -1.0), 1.0)  # np.clip is 4x slower
        if not math.isfinite(action.sum()):  # one bad entry spoils the sum
            raise SystemExit(f"{self.task}: the policy gave a non-finite action {action} at agent "
                             f"step {self.t} of an episode; expected numbers in [-1, 1]")
        return action

    def _observe(self, obs):
        if self._size:  # nearest pixels: a gymnasium id fixes its own frame size
            frame = self._frame()
            rows, cols = (np.arange(self._size) * n // self._size for n in frame.shape[:2])
            return frame[rows][:, cols]
        obs = np.asarray(obs, np.float32)
        if not math.isfinite(obs.sum()):
            raise self._broken("observation")
        return obs

    def _broken(self, what):
        return SystemExit(f"{self.task}: the environment gave a non-finite {what} at agent step "
                          f"{self.t} of an episode: check its dynamics and reward")


def _to_bounds(space):
    """A function act (.., A) in [-1, 1] -> (.., *shape of the space) in its type, and in its bounds
    where these are finite."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    finite = np.isfinite(low) & np.isfinite(high)
    with np.errstate(invalid="ignore"):
        centre = np.where(finite, (low + high) / 2, 0.0)
        half = np.where(finite, (high - low) / 2, 1.0)

    def rescale(act):
        act = centre + half * act.reshape(*act.shape[:-1], *space.shape)
        act = np.minimum(np.maximum(act, space.low), space.high)  # rounding may overshoot
        return act.astype(space.dtype)
    return rescale


class _Suite(_Env):
    """A dm_control suite task, or one of the 11 that TD-MPC2 added (see _CUSTOM)."""

    def __init__(self, task, seed, obs, size):
        env = _load_suite(task, seed)
        self._env, self._plant, self._physics = env, env.task, env.physics
        self._substeps = round(env.control_timestep() / env.physics.timestep())
        self._camera = 2 if task.startswith("quadruped") else 0  # its camera 0 stands 17 m away
        self._physics_error = importlib.import_module("dm_control.rl.control").PhysicsError
        spec = env.action_spec()
        self._to_bounds = _to_bounds(gymnasium.spaces.Box(spec.minimum, spec.maximum, dtype=float))
        with env.physics.reset_context():
            env.task.initialize_episode(env.physics)
        facts = Facts(len(self._flat()), *spec.shape, 500, 2, 1000.0, False)
        self._setup(task, seed, obs, size, facts, round(0.5 / env.control_timestep()))

    def _flat(self):  # some entries are 0-d (walker height, fish upright)
        seen = self._plant.get_observation(self._physics)
        return np.concatenate([np.ravel(x) for x in seen.values()])

    def _restart(self, seed):
        if seed is not None:
            self._plant.random.seed(seed)  # in place: the task keeps no other random state
        with self._physics.reset_context():
            self._plant.initialize_episode(self._physics)
        return None if self._size else self._flat()

    def _advance(self, action):
        # What control.Environment.step does, without its time step objects and without the
        # observation after the first of the two control steps, which nobody sees (tested equal).
        action, rew = self._to_bounds(action), 0.0
        try:
            for _ in range(2):
                self._plant.before_step(action, self._physics)
                self._physics.step(self._substeps)
                self._plant.after_step(self._physics)
                rew += self._plant.get_reward(self._physics)
        except self._physics_error:  # dm_control's own check: MuJoCo met NaN or huge numbers
            raise self._broken("simulation state") from None
        return None if self._size else self._flat(), rew, False, False, {"success": 0.0}

    def _frame(self):
        renderer = importlib.import_module("dm_control._render")
        if renderer.BACKEND != os.environ["MUJOCO_GL"]:  # chosen when imported, see _import_suite
            importlib.reload(renderer)
        return self._physics.render(self._size or 256, self._size or 256, self._camera)


def _from_registry(task):
    """gymnasium.make with frames where the environment has them."""
    try:
        env = gymnasium.make(task, disable_env_checker=True)
        if "rgb_array" in env.metadata.get("render_modes", ()):  # known only now, fixed when made
            env.close()
            env = gymnasium.make(task, render_mode="rgb_array", disable_env_checker=True)
        return env
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv):
        raise _unknown(task) from None
    except (ImportError, gymnasium.error.Error) as error:
        raise SystemExit(f"{task} cannot be made: {error}; install what it names") from None


class _Gymnasium(_Env):
    """A gymnasium environment with continuous actions; observations are flattened."""

    def __init__(self, task, env, seed, obs, size, facts=None):
        space, box = env.action_space, gymnasium.spaces.Box
        flat = gymnasium.spaces.flatten_space(env.observation_space)
        if not isinstance(space, box) or not isinstance(flat, box):
            raise SystemExit(f"{task} has actions {space} and observations "
                             f"{env.observation_space}; expected a continuous Box of actions and "
                             "observations that flatten to a vector")
        self._env, self._to_bounds = env, _to_bounds(space)
        limit = getattr(env.spec, "max_episode_steps", None) or 1000
        found = Facts(flat.shape[0], math.prod(space.shape), limit, 1)
        if facts and facts[:2] != found[:2]:
            raise SystemExit(f"{task} was registered with (obs_dim, act_dim) {facts[:2]}, but its "
                             f"environment has {found[:2]}")
        facts = facts or found
        fps = round((env.metadata.get("render_fps") or 25) / facts.action_repeat)
        self._setup(task, seed, obs, size, facts, fps)

    def _flat(self, obs):
        return gymnasium.spaces.flatten(self._env.observation_space, obs)

    def _restart(self, seed):
        return self._flat(self._env.reset(seed=seed)[0])

    def _advance(self, action):
        action, rew = self._to_bounds(action), 0.0
        for _ in range(self.facts.action_repeat):
            obs, now, terminated, truncated, info = self._env.step(action)
            rew += now
            if terminated or truncated:
                break
        success = float(info.get("success", info.get("is_success", 0.0)))
        return self._flat(obs), rew, terminated, truncated, {"success": success}

    def _frame(self):
        draws = "rgb_array" in self._env.metadata.get("render_modes", ())
        try:
            frame = self._env.render() if draws else None
        except gymnasium.error.DependencyNotInstalled as error:  # Pendulum-v1 needs pygame
            raise SystemExit(f"{self.task} cannot be drawn: {error}") from None
        if frame is None:
            raise SystemExit(f"{self.task} draws no frames (rgb_array): use obs='state'")
        return frame


class _MetaWorld(_Gymnasium):
    """A Meta-World v3 task with visible goal. (TD-MPC2 used an older v2: not the same numbers.)

    camera: corner4 is the corner2 that multi-task papers moved closer; repeat, length: control
    steps per agent step, agent steps per episode (as in TD-MPC2; the benchmark's own: 1, 500)."""

    def __init__(self, task, seed, obs, size, camera="corner2", repeat=2, length=100):
        if task not in METAWORLD50:
            raise _unknown(task)
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except ImportError as error:
            raise SystemExit(f"{task} needs Meta-World, which cannot be imported ({error}); "
                             "pip install metaworld==3.1.1 mujoco==3.3.0") from None
        pixels = size if obs == "pixels" else 480
        env = ALL_V3_ENVIRONMENTS[task[3:] + "-v3"](
            render_mode="rgb_array", camera_name=camera, width=pixels, height=pixels)
        # Outside its own benchmarks Meta-World must be told: show the goal (and forget the cached
        # bounds, which would clip it to zero), draw a new one at each reset, and from the seed.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
        if obs == "pixels":  # shadow maps of 4096 x 4096 are half of the time
            env.model.vis.quality.shadowsize = 1024
        super().__init__(task, env, seed, obs, size, Facts(39, 4, length, repeat, 0.0, False))

    def _restart(self, seed):
        if seed is not None:
            self._env.seed(seed)
        obs, _ = self._env.reset()
        # One idle control step whose observation is dropped, as when TD-MPC2's published data were
        # recorded (official code: envs/metaworld.py, reset); an episode of 500 has no room for it.
        if self.facts.action_repeat * self.facts.episode_length < 500:
            self._env.step(np.zeros(4, np.float32))
        return obs

    def _frame(self):
        return self._env.render()[::-1].copy()  # the corner cameras hang upside down


class _Atari(_Env):
    """An Atari game: uint8 (size, size, 3), all 18 discrete actions; `legal`: those it tells apart.

    An agent step is 4 frames with one action, seen as the maximum of the last two, averaged over
    areas. sticky: probability, per frame, that the emulator repeats the previous action (the ALE's
    v5: 0.25). life_loss: report a lost life as info["life_lost"] (never ends the episode); noop: at
    most so many random idle frames after a reset; frame_cap: frames until truncation (half an
    hour)."""

    def __init__(self, task, seed, obs="pixels", size=64, sticky=0.25, life_loss=True, noop=0,
                 frame_cap=108_000):
        if obs != "pixels":
            raise SystemExit(f"{task} has no state: type make_env({task!r}, obs='pixels')")
        facts = task_facts(task)._replace(obs_dim=3 * size * size,
                                          episode_length=max(1, frame_cap // 4))
        self._setup(task, seed, obs, size, facts, 15)
        self._env, self._rom = _emulator(task)
        self._env.setFloat("repeat_action_probability", sticky)
        self._life_loss, self._noop = life_loss, noop
        self._load(seed)
        self._actions = self._env.getLegalActionSet()
        self.legal = [self._actions.index(a) for a in self._env.getMinimalActionSet()]
        self._areas = [_areas(n, size) for n in (210, 160)]
        self.action_space = gymnasium.spaces.Discrete(len(self._actions))

    def _load(self, seed):  # the ALE takes a seed only while it loads a game
        self._env.setInt("random_seed", seed % 2**31)
        self._env.loadROM(self._rom)
        game, at, variant = self.task.partition("@")
        if not at:
            return
        modes, difficulties = self._env.getAvailableModes(), self._env.getAvailableDifficulties()
        asked = {f"m{m}d{d}": (m, d) for m, d in itertools.product(modes, difficulties)}
        if variant not in asked:
            raise SystemExit(f"{self.task}: expected {game}@m<mode>d<difficulty> with a mode of "
                             f"{[*modes]} and a difficulty of {[*difficulties]}")
        self._env.setMode(asked[variant][0])
        self._env.setDifficulty(asked[variant][1])

    def _restart(self, seed):
        if seed is not None:
            self._load(seed)
        self._env.reset_game()
        for _ in range(int(self.np_random.integers(self._noop + 1)) if self._noop else 0):
            self._env.act(self._actions[0])
        self._lives, self._screen = self._env.lives(), self._env.getScreenRGB()

    def _read(self, action):
        return self._actions[int(action)]

    def _advance(self, action):
        rew, before = 0.0, None
        for i in range(4):
            rew += self._env.act(action)
            if i == 2:
                before = self._env.getScreenRGB()
            if self._env.game_over():
                break
        self._screen = self._env.getScreenRGB()
        if before is not None:  # sprites flicker: many are drawn in every other frame only
            self._screen = np.maximum(self._screen, before)
        lives = self._env.lives()
        lost, self._lives = self._life_loss and lives < self._lives, lives
        info = {"success": 0.0, "life_lost": bool(lost)}
        return None, rew, self._env.game_over(), False, info

    def _observe(self, obs):
        return self._shrink(self._screen)

    def _shrink(self, screen):
        rows, cols = self._areas
        small = np.tensordot(rows, screen.astype(np.float32), 1)  # (size, 160, 3)
        return np.rint(np.tensordot(cols, small, (1, 1))).transpose(1, 0, 2).astype(np.uint8)

    def render(self):
        """The last frame as shown on the screen, uint8 (210, 160, 3)."""
        return self._screen

    def close(self):
        """Nothing: the emulator goes with its last reference."""


def _emulator(task):
    """(the Arcade Learning Environment, path of the game's ROM)."""
    try:
        import ale_py
        from ale_py import roms
    except ImportError as error:
        raise SystemExit(f"{task} needs the Arcade Learning Environment, which cannot be imported "
                         f"({error}); pip install ale-py==0.12.1") from None
    game = task.partition("@")[0]
    snake = "".join("_" + c.lower() if c.isupper() else c for c in game)[1:]
    rom = None
    with contextlib.suppress(Exception):  # a broken installation may raise anything
        rom = roms.get_rom_path(snake)
    if rom is None:
        raise SystemExit(f"{task}: ale-py has no ROM {snake}.bin: pip install --force-reinstall "
                         "ale-py==0.12.1")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.setInt("max_num_frames_per_episode", 0)
    return ale, rom


def _areas(n, m):
    """(m, n) matrix that averages n pixels over m equal areas."""
    edge = np.arange(m + 1) * n / m
    right = np.minimum(edge[1:, None], np.arange(1, n + 1))
    inside = right - np.maximum(edge[:-1, None], np.arange(n))
    return (np.clip(inside, 0, None) * m / n).astype(np.float32)


# -------------------------------------------------------------------------------------- small games
_FALLING = "catch", "mirror-catch", "avoid"  # the player stands in the bottom row
_MOVES = (0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)  # (row, column): stay, left, right, up, down
_COLORS = {"player": (60, 160, 255), "catch": (255, 220, 0), "avoid": (255, 60, 60),
           "chase": (255, 80, 255), "paint": (0, 200, 120), "collect": (255, 140, 0)}


class _Game(_Env):
    """A game on 6 x 6 places that is learnt from pixels in minutes: bright blocks of size // 6
    pixels, dense rewards, 60 steps (nobody sees how many are left: truncated, not terminated).

    catch, mirror-catch, avoid: a ball (or a wall with a gap) comes down, a row per step, ten times;
    in the bottom row it is worth +1, or -1 if the player is in another column than the ball (the
    gap). chase: +1 for meeting the prey, which moves by one place in half of the steps; the next
    one appears elsewhere. paint: +1 for every place at the first visit. collect: +1 for an item,
    which then appears elsewhere. Attribute `legal`: all actions, as of an Atari game."""
    N = 6

    def __init__(self, task, seed, obs="pixels", size=64):
        if obs != "pixels" or size < self.N:
            raise SystemExit(f"{task} has no state, and 6 x 6 places: type make_env({task!r}, "
                             f"obs='pixels') with a size of 6 or more; got {obs!r}, size={size}")
        facts = task_facts(task)._replace(obs_dim=3 * size * size)
        self._setup(task, seed, obs, size, facts, 6)
        self.legal = list(range(facts.act_dim))
        self.action_space = gymnasium.spaces.Discrete(facts.act_dim)

    def _restart(self, seed):
        falls = self.task in _FALLING
        self._me, self._things = (self.N - 1 if falls else self._draw(), self._draw()), []
        if self.task == "paint":
            self._things = [self._me]
        elif falls:
            self._things = [(0, self._draw())]  # of a wall the gap
        else:
            for _ in range(6 if self.task == "collect" else 1):
                self._things.append(self._elsewhere())

    def _draw(self):
        return int(self.np_random.integers(self.N))

    def _elsewhere(self):
        while (place := (self._draw(), self._draw())) in (self._me, *self._things):
            pass
        return place

    def _moved(self, place, move):
        return tuple(min(max(x + d, 0), self.N - 1) for x, d in zip(place, move))

    def _read(self, action):
        return int(action)

    def _advance(self, action):
        row, col = _MOVES[action if action in self.legal else 0]
        self._me = self._moved(self._me, (row, -col if self.task == "mirror-catch" else col))
        play = {"paint": self._paint, "chase": self._chase, "collect": self._collect}
        return None, play.get(self.task, self._fall)(), False, False, {"success": 0.0}

    def _fall(self):
        row, col = self._things[0]
        row, col = self._things[0] = (row + 1, col) if row < self.N - 1 else (0, self._draw())
        return 0.0 if row < self.N - 1 else 1.0 if self._me[1] == col else -1.0

    def _paint(self):
        new = self._me not in self._things
        self._things += [self._me] * new
        return float(new)

    def _chase(self):
        if self._me not in self._things and self.np_random.integers(2):
            self._things = [self._moved(self._things[0], _MOVES[self.np_random.integers(1, 5)])]
        return self._collect()

    def _collect(self):
        if self._me not in self._things:
            return 0.0
        self._things[self._things.index(self._me)] = self._elsewhere()
        return 1.0

    def _observe(self, obs):
        places, things = np.zeros((self.N, self.N, 3), np.uint8), self._things
        if self.task == "avoid":
            row, gap = things[0]
            things = [(row, col) for col in range(self.N) if col != gap]
        for place in things:
            places[place] = _COLORS[self.task.removeprefix("mirror-")]
        places[self._me] = _COLORS["player"]
        block, rest = divmod(self._size, self.N)
        margin = rest // 2, rest - rest // 2
        return np.pad(places.repeat(block, 0).repeat(block, 1), (margin, margin, (0, 0)))

    def render(self):
        """What the agent sees."""
        return self._observe(None)

    def close(self):
        """Nothing: there is no simulation."""


# ------------------------------------------------------------------------------------------- OpenGL
def _import_suite():
    """dm_control.suite, without OpenGL unless MUJOCO_GL is set: state tasks need none, and a
    machine without a display prints no warning. _frame loads OpenGL later."""
    if "MUJOCO_GL" not in os.environ and "dm_control._render" not in sys.modules:
        os.environ["MUJOCO_GL"] = "disabled"
        try:
            return importlib.import_module("dm_control.suite")
        finally:
            del os.environ["MUJOCO_GL"]
    return importlib.import_module("dm_control.suite")


def choose_gl():
    """Set MUJOCO_GL to a backend that works here and return it; a set value is kept, untested.

    SystemExit: neither EGL nor OSMesa works."""
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    for name in ("egl", "osmesa"):  # a failed attempt would break OpenGL in this process
        code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
        attempt = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False,
                                 env={**os.environ, "MUJOCO_GL": name})
        if attempt.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return name
    raise SystemExit("found no working OpenGL (tried EGL and OSMesa), which pixels and video need: "
                     "apt-get install libegl1 (GPU) or libosmesa6 (CPU), or set "
                     "MUJOCO_GL=egl|osmesa|glfw, or use obs='state'")


# ------------------------------------------------------------------------------------- custom tasks
_CUSTOM = {  # the tasks that TD-MPC2 added, and the suite's tasks in which they are
    "walker-walk-backwards": "walker-walk", "walker-run-backwards": "walker-run",
    "cheetah-run-backwards": "cheetah-run", "cheetah-run-front": "cheetah-run",
    "cheetah-run-back": "cheetah-run", "cheetah-jump": "cheetah-run",
    "hopper-hop-backwards": "hopper-hop", "reacher-three-easy": "reacher-easy",
    "reacher-three-hard": "reacher-hard", "cup-spin": "cup-catch",
    "pendulum-spin": "pendulum-swingup"}


def _load_suite(task, seed):
    """The dm_control environment of a task of the suite or of _CUSTOM."""
    suite = _import_suite()
    domain, _, name = _CUSTOM.get(task, task).partition("-")
    domain, name = {"cup": "ball_in_cup"}.get(domain, domain), name.replace("-", "_")
    if (domain, name) not in suite.ALL_TASKS:
        raise _unknown(task)
    if task.startswith("reacher-three"):
        return _reacher_three(suite, 0.05 if task.endswith("easy") else 0.015, seed)
    env = suite.load(domain, name, task_kwargs={"random": seed})
    if task in _CUSTOM:
        tolerance = importlib.import_module("dm_control.utils.rewards").tolerance
        env.task.get_reward = lambda physics: _custom_reward(task, physics, tolerance)
    if task == "cup-spin":
        env.task.initialize_episode = lambda physics: _start_cup_spin(env.task.random, physics)
    return env


def _custom_reward(task, p, tol):
    """Reward of a control step of _CUSTOM; p: physics, tol: dm_control's tolerance."""
    inf = float("inf")
    if task.startswith("walker"):
        speed = 1 if task == "walker-walk-backwards" else 8
        stand = (3 * tol(p.torso_height(), (1.2, inf), 0.6) + (1 + p.torso_upright()) / 2) / 4
        move = tol(p.horizontal_velocity(), (-inf, -speed), speed / 2, "linear", 0.5)
        return stand * (5 * move + 1) / 6
    if task == "cheetah-run-backwards":
        return tol(p.speed(), (-inf, -8), 8, "linear", 0)
    if task == "cheetah-jump":
        torso, back, front = p.named.data.xpos[["torso", "bfoot", "ffoot"], "z"]
        still = tol(p.speed(), (-0.5, 0.5), 0.5, "linear", 0)
        high = [tol((torso + foot) / 2, (1.2, inf), 0.6) for foot in (back, front)]
        return sum((5 * h + still) / 6 for h in high) / 2
    if task.startswith("cheetah"):  # run with one foot up in the air
        foot = "bfoot" if task == "cheetah-run-front" else "ffoot"
        high, torso = (tol(z, (1.2, inf), 0.6) for z in p.named.data.xpos[[foot, "torso"], "z"])
        up = (3 * high + 2 * torso) / 5
        return up * (5 * tol(p.speed(), (6, inf), 6, "linear", 0) + 1) / 6
    if task == "hopper-hop-backwards":
        return tol(p.height(), (0.6, 2)) * tol(p.speed(), (-inf, -1), 0.5, "linear", 0.5)
    if task == "pendulum-spin":
        return tol(abs(float(p.angular_velocity()[0])), (9, inf), 4.5, "linear", 0.5)
    far = tol(np.linalg.norm(p.ball_to_target()), (0.5, inf), 0.25, "linear", 0.5)  # cup-spin
    speed = np.linalg.norm(p.named.data.qvel[["ball_x", "ball_z"]])
    return (1 - p.in_target()) * (far + 2 * tol(speed, (6, inf), 3, "linear", 0.5)) / 3


def _start_cup_spin(rng, physics):
    """Nine of ten episodes start with the ball in the cup, around which it shall swing."""
    anywhere = rng.uniform() < 0.1
    while True:
        physics.named.data.qpos["ball_x"] = rng.uniform(-0.2, 0.2)
        physics.named.data.qpos["ball_z"] = rng.uniform(0.2, 0.5)
        physics.after_reset()  # recomputes positions and contacts
        if physics.data.ncon == 0 and (anywhere or physics.in_target()):
            return


def _reacher_three(suite, target_size, seed):
    """The suite's reacher with an arm of three links instead of two."""
    from dm_control.rl import control
    xml, assets = suite.reacher.get_model_and_assets()
    xml = xml.decode()
    link = ('<body pos=".12 0 0"><joint name="elbow" limited="true" range="-160 160"/>'
            '<geom type="capsule" fromto="0 0 0 .12 0 0" size=".01" material="self"/>')
    for old, new in (('<body name="hand"', f'{link}<body name="hand"'),
                     ("<!-- Target -->", "</body>"),
                     ('<motor name="wrist"', '<motor joint="elbow"/><motor name="wrist"'),
                     ('.12 0 0"', '.09 0 0"'), ("-160 160", "-80 80")):
        xml = xml.replace(old, new)
    physics = suite.reacher.Physics.from_xml_string(xml, assets)
    plan = suite.reacher.Reacher(target_size, random=seed)
    return control.Environment(physics, plan, time_limit=20)


# ------------------------------------------------------------------------------------- side by side
def beside(task, n, seed=0, workers=1):
    """n environments of a task stepping together: its registered batch, otherwise a Flock.

    Whatever it is (a context manager), it has reset() -> obs (n, O) float32; close();
    step(act (n, A)) -> obs (n, O), rew (n,), terminated (n,), truncated (n,) bool, last (n, O): a
      row that ends restarts at once, `obs` is the first of its next episode and `last` what ended
      it (V of `last` is the bootstrap of a truncated row; a terminated row has none);
    state_dict() -> {name: array}; load_state_dict(state) -> obs, and on it goes with the same
      steps."""
    family = _registered(task)
    if family is None or family.batch is None:
        return Flock(task, n, seed)
    rows = family.batch(n, seed, workers)
    return Flock(task, n, seed, rows) if isinstance(rows, gymnasium.vector.VectorEnv) else rows


def check_actions(task, act, shape):
    """SystemExit unless actions of a policy have this shape (n, A) and are finite."""
    finite = np.isfinite(act).all()
    if act.shape != shape or not finite:
        raise SystemExit(f"{task}: the policy gave actions of shape {act.shape}, "
                         f"{'' if finite else 'not '}all finite; expected finite {shape}, one "
                         "row per observation")


class _Closing(contextlib.AbstractContextManager):
    def __exit__(self, *error):
        self.close()


class Flock(_Closing):
    """n environments of any task in lock step; see beside.

    vector: a gymnasium.vector.VectorEnv with Boxes of observations (here flat) and actions (here in
    [-1, 1]) and gymnasium.vector.AutoresetMode.DISABLED, because we restart its rows; None:
    environments of make_env, one after the other in this process.
    A foreign environment does not show its state: state_dict holds every row's actions since its
    episode began, and load_state_dict does them again, exact where seed and actions fix an episode.
    The seed of episode k of row i is drawn from (seed, i, k). SystemExit: another vector
    environment, actions of another shape, a number of the environment that is not finite."""

    def __init__(self, task, n, seed=0, vector=None):
        disabled, box = gymnasium.vector.AutoresetMode.DISABLED, gymnasium.spaces.Box
        if n < 1:
            raise SystemExit(f"{task}: got n={n} environments side by side; expected 1 or more")
        if vector is None:
            vector = gymnasium.vector.SyncVectorEnv([lambda: make_env(task)] * n, copy=False,
                                                    autoreset_mode=disabled)
        space, seen = vector.single_action_space, vector.single_observation_space
        mode = vector.metadata.get("autoreset_mode")
        boxes = isinstance(space, box) and isinstance(seen, box)
        if mode != disabled or vector.num_envs != n or not boxes:
            raise SystemExit(f"{task}: its vector environment has {vector.num_envs} rows, {mode}, "
                             f"actions {space} and observations {seen}; expected {n}, {disabled} "
                             "and Boxes")
        self.task, self.n, self.seed, self.facts = task, n, seed, task_facts(task)
        self._env, self._to_bounds = vector, _to_bounds(space)
        self.t, self._episode = np.zeros(n, int), np.zeros(n, int)
        self._acts = np.zeros((n, self.facts.episode_length, self.facts.act_dim), np.float32)

    def close(self):
        """Free the simulations."""
        self._env.close()

    def _begin(self, mask, obs):
        """Begin the next episode of the rows in mask (n,) -> obs (n, O) with its first ones."""
        if not mask.any():
            return obs
        seeds = [None] * self.n
        for i in np.flatnonzero(mask):
            key = np.random.SeedSequence([self.seed, i, self._episode[i]])
            seeds[i] = int(key.generate_state(1)[0])
        first, _ = self._env.reset(seed=seeds, options={"reset_mask": mask})
        self._episode[mask] += 1
        self.t[mask] = 0
        first = first.reshape(self.n, -1)
        return np.where(mask[:, None], self._finite("observation", first), obs)

    def _move(self, act):
        """act (n, A) -> obs (n, O), rew (n,), terminated, truncated."""
        obs, rew, terminated, truncated, _ = self._env.step(self._to_bounds(act))
        return (self._finite("observation", obs.reshape(self.n, -1)), self._finite("reward", rew),
                terminated.copy(), truncated.copy())

    def _finite(self, what, x):
        if not np.isfinite(x).all():
            raise SystemExit(f"{self.task}: the vector environment gave a non-finite {what}")
        return x.astype(np.float32)

    def reset(self):
        """Start an episode in every row -> obs (n, O) float32."""
        return self._begin(np.ones(self.n, bool), np.float32(0))

    def step(self, act):
        """See beside."""
        act = np.asarray(act, np.float32)
        check_actions(self.task, act, (self.n, self.facts.act_dim))
        self._acts[np.arange(self.n), self.t] = act
        last, rew, terminated, truncated = self._move(act)
        self.t += 1
        truncated |= (self.t >= self.facts.episode_length) & ~terminated
        obs = self._begin(terminated | truncated, last)
        return obs, rew, terminated, truncated, last

    def state_dict(self):
        """Arrays from which load_state_dict goes on with the same steps."""
        return dict(t=self.t.copy(), episode=self._episode.copy(), acts=self._acts.copy())

    def load_state_dict(self, state):
        """Go on from what state_dict gave, as arrays or tensors -> obs (n, O) float32."""
        t, episode, self._acts = (np.asarray(state[k]).copy() for k in ("t", "episode", "acts"))
        obs = self.reset()
        for left in range(t.max(), -1, -1):  # rows begin so that all arrive at the same time
            self._episode = np.where(t == left, episode - 1, self._episode)
            obs = self._begin(t == left, obs)
            if left:
                act = self._acts[np.arange(self.n), np.maximum(t - left, 0)]
                obs, _, terminated, truncated = self._move(act)
                self._begin((terminated | truncated) & (t < left), obs)  # it still waits
        self.t, self._episode = t, episode
        return obs


# --------------------------------------------------------------------------------------- processes
def _spawn():
    """(process, connection) of a fresh interpreter that imports only this file and runs _serve."""
    # Not multiprocessing.Process: its children import the parent's script, hence torch (seconds and
    # hundreds of MB each). This starts in 0.3 s, with the parent's sys.path, so that "module:Id-v0"
    # is the same there, and in its own session, so that Ctrl-C reaches the parent alone.
    ours, theirs = socket.socketpair()
    here = os.path.dirname(os.path.abspath(__file__))
    path = [here, *(p or os.getcwd() for p in sys.path)]
    code = f"import sys; sys.path[:] = {path!r}; import envs; envs._serve({theirs.fileno()})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    theirs.close()
    return process, multiprocessing.connection.Connection(ours.detach())


def _serve(fd):
    """A process: {slot: order} comes, {slot: result} goes, or a sentence (a str) if one fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    conn, place = multiprocessing.connection.Connection(fd), _Place()
    try:
        while True:
            orders = conn.recv()
            conn.send({slot: place.obey(slot, *order) for slot, order in orders.items()})
    except (EOFError, ConnectionError):  # the parent closed the pipe or was killed
        return
    except SystemExit as error:
        conn.send(str(error))
    except Exception as error:  # noqa: BLE001 (a user's environment may raise anything)
        traceback.print_exc()
        conn.send(f"{place.task} failed in its process (traceback above): "
                  f"{type(error).__name__}: {error}")


class _Place:
    """Environments in numbered slots of a process."""

    def __init__(self):
        self.task, self.envs, self.idle = "", {}, {}  # idle {task: [env]}: they are slow to make

    def obey(self, slot, action, following):
        """One step, or none if action is None; then, unless an episode goes on, begin `following`:
        (task, seed, ..) or None -> what env.step gave or None, what _begin gave or None."""
        step = None
        if action is not None:
            env = self.envs[slot]
            self.task = env.task
            step = env.step(action)
            if not (step[2] or step[3]):
                return step, None
            if following is None or following[0] != env.task:
                self.idle.setdefault(env.task, []).append(self.envs.pop(slot))
        return step, self._begin(slot, *following) if following else None

    def _begin(self, slot, task, seed, actions=(), options=None):
        """Play `actions` of a new episode -> obs, the actions that a game tells apart or None."""
        self.task = task
        if slot not in self.envs:
            idle = self.idle.get(task)
            self.envs[slot] = idle.pop() if idle else make_env(task, **options or {})
        env = self.envs[slot]
        obs, _ = env.reset(seed=seed)
        for action in actions:
            obs = env.step(action)[0]
        return obs, getattr(env, "legal", None)


class _Pool(_Closing):
    """n processes (context manager); slot s is in process s % n."""

    def __init__(self, n):
        self.n, self.procs, self._asked = n, [_spawn() for _ in range(n)], {}

    def close(self):
        """Stop all processes."""
        for _, conn in self.procs:
            conn.close()  # it leaves, unless it is inside a long reset
        for process, _ in self.procs:
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.procs = []

    def post(self, orders):
        """Send orders {slot: (action or None, what to begin)}; returns at once."""
        self._asked = {}
        for slot, order in orders.items():
            self._asked.setdefault(slot % self.n, {})[slot] = order
        for i, share in self._asked.items():
            with contextlib.suppress(OSError):  # it died: collect will say so
                self.procs[i][1].send(share)

    def collect(self):
        """{slot: answer} to what was posted. SystemExit: the sentence of what went wrong there."""
        answers = {}
        for i in self._asked:
            share = None
            while share is None:
                try:
                    share = self.procs[i][1].recv()
                except (EOFError, OSError):
                    self._died(i, self.procs[i][0])
            if isinstance(share, str):
                raise SystemExit(share)
            answers |= share
        return answers


class Record:
    """What happens in one episode, step by step; `episode` makes of it what roll-outs return."""

    def __init__(self, task, seed, obs):
        self.task, self.seed, self.obs, self.steps = task, seed, [obs], []

    def add(self, act, obs, rew, term):
        """act (A,), the observation after it (O,), reward, terminated."""
        self.obs.append(obs)
        self.steps.append((act, rew, term))

    def episode(self, success):
        """The dict that Workers.rollout describes."""
        act, rew, term = zip(*self.steps)
        return dict(task=self.task, seed=self.seed, obs=np.stack(self.obs), act=np.stack(act),
                    rew=np.array(rew, np.float32), term=np.array(term), success=success,
                    ret=float(sum(rew)))


class Workers(_Pool):
    """Environment worker processes for batched roll-outs (context manager; start once per run).

    n: processes; max_envs: environments that step together, over all processes."""

    def __init__(self, n, max_envs=64):
        if n < 1 or max_envs < 1:
            raise SystemExit(f"Workers got n={n}, max_envs={max_envs}; expected 1 or more of each")
        super().__init__(n)
        self.max_envs, self._batches = max_envs, {}

    def close(self):
        """Stop all processes; a later rollout starts new ones."""
        super().close()
        for batch in filter(None, self._batches.values()):
            batch.close()
        self._batches = {}

    def rollout(self, jobs, policy, progress=None):
        """Play one episode per job and return them in the order of the jobs.

        jobs: list of (task, seed).
        policy: (obs (n, O) float32, job (n,) int, t (n,) int) -> act (n, A). Called once per
          lockstep for all n running environments, whatever their task or process: the result does
          not depend on the number of workers. O and A are the widest of the jobs: obs is padded
          with zeros, an environment reads its first entries of act. job indexes `jobs`, t is the
          agent step.
        progress: called now and then with (agent steps done, agent steps expected).
        Returns dicts: task, seed, obs (T+1, O_task), act (T, A_task), rew (T,), term (T,) bool
          (True only where the task ended by itself), success (of the last step), ret (sum of rew).
        A worker that dies is named on stderr and replaced; its unfinished episodes restart from
        their seeds. SystemExit: at the third death, or what went wrong in an environment."""
        jobs = [(task, int(seed)) for task, seed in jobs]
        if not jobs:
            return []
        if batch := self._batch({task for task, _ in jobs}):  # in this process, on n threads
            return batch.rollout(jobs, policy, progress)
        self.procs = self.procs or [_spawn() for _ in range(self.n)]
        self._play = play = _Lockstep(jobs, self.max_envs, progress)
        try:
            self.post({slot: (None, play.order(slot)) for slot in range(len(play.queues))})
            while play.take(self.collect()):
                self.post(play.act(policy))
        except BaseException:  # also Ctrl-C: an answer may be under way, start afresh
            self.close()
            raise
        return play.results

    def _batch(self, tasks):
        """What plays the jobs of a single task itself (see register), None for most tasks."""
        task = min(tasks)
        family = _registered(task)
        if len(tasks) > 1 or family is None or family.batch is None:
            return None
        if task not in self._batches:
            batch = beside(task, self.max_envs, 0, self.n)
            self._batches[task] = batch
            if not hasattr(batch, "rollout"):
                batch.close()
                self._batches[task] = None
        return self._batches[task]

    def _died(self, i, process):
        """Replace worker i and let it start all that it has not finished again."""
        play = self._play
        orders = {s: play.order(s) for s in range(i, len(play.queues), self.n) if play.queues[s]}
        play.deaths += 1
        how = (f"worker {i} (pid {process.pid}, exit code {process.wait()}) died while playing "
               f"{', '.join(sorted({task for task, _ in orders.values()}))}")
        if play.deaths == 3:
            raise SystemExit(f"{how}; it is the third death in one roll-out: exit code -9 usually "
                             "means lack of memory, so try a smaller max_envs or fewer workers")
        print(f"{how}; its unfinished episodes start again", file=sys.stderr)
        self.procs[i][1].close()
        self.procs[i] = _spawn()
        self.procs[i][1].send({slot: (None, order) for slot, order in orders.items()})


class _Lockstep:
    """The jobs of a roll-out in at most max_envs slots, and what has happened so far."""

    def __init__(self, jobs, max_envs, progress):
        self.jobs, self.progress, slots = jobs, progress, min(len(jobs), max_envs)
        self.facts = {task: task_facts(task) for task in dict.fromkeys(task for task, _ in jobs)}
        self.lengths = np.array([self.facts[task].episode_length for task, _ in jobs])
        self.width, self.act_dim = (max(f[k] for f in self.facts.values()) for k in (0, 1))
        # By task, then cut into one run of about equal steps per slot: few environments get made.
        order = sorted(range(len(jobs)), key=lambda j: (jobs[j][0], j))
        cost = self.lengths[order] if slots < len(jobs) else np.ones(slots)
        slot_of = ((np.cumsum(cost) - cost / 2) / cost.sum() * slots).astype(int)
        self.queues = [[] for _ in range(slots)]  # of unfinished jobs; the first one is played
        for j, slot in zip(order, slot_of):
            self.queues[slot].append(j)
        self.records, self.acts, self.results = {}, {}, [None] * len(jobs)  # {slot: Record}
        self.deaths = self.rounds = 0

    def order(self, slot, place=0):
        """(task, seed) of the job that is played in a slot or comes next; None: there is none."""
        queue = self.queues[slot]
        return self.jobs[queue[place]] if place < len(queue) else None

    def act(self, policy):
        """Orders with the policy's actions for all that is played."""
        live = sorted(self.records)
        obs = np.zeros((len(live), self.width), np.float32)
        for row, slot in zip(obs, live):
            now = self.records[slot].obs[-1]
            row[:len(now)] = now
        job = np.array([self.queues[slot][0] for slot in live])
        act = policy(obs, job, np.array([len(self.records[slot].steps) for slot in live]))
        act = np.asarray(act, np.float32)
        if act.shape != (len(live), self.act_dim):
            raise SystemExit(f"the policy returned actions of shape {act.shape}; expected "
                             f"{(len(live), self.act_dim)}, one row per observation")
        for slot, a in zip(live, act):
            self.acts[slot] = a[:self.facts[self.order(slot)[0]].act_dim]
        return {slot: (self.acts[slot], self.order(slot, 1)) for slot in live}

    def take(self, answers):
        """Book what _Place answered and tell `progress` -> whether anything is still played."""
        for slot, (step, first) in answers.items():
            if step:
                obs, rew, terminated, truncated, info = step
                self.records[slot].add(self.acts[slot], obs, rew, terminated)
                if terminated or truncated:
                    episode = self.records.pop(slot).episode(info["success"])
                    self.results[self.queues[slot].pop(0)] = episode
            if first is not None:
                self.records[slot] = Record(*self.order(slot), first[0])
        if self.progress and (self.rounds % 20 == 0 or not self.records):
            done = self.lengths[[r is not None for r in self.results]].sum()
            done += sum(len(record.steps) for record in self.records.values())
            self.progress(int(done), int(self.lengths.sum()))
        self.rounds += 1
        return self.records


class Fleet(_Pool):
    """One process per environment, which steps while the caller does something else.

        fleet = Fleet(["Boxing", "Krull"], obs="pixels")    # a context manager
        obs = fleet.reset([0, 1])                 # a seed each
        fleet.send(actions, next_seeds)           # returns at once
        steps = fleet.receive()     # [(obs, rew, terminated, truncated, info)], waits for all

    One process each, because Meta-World draws wrong pictures with two renderers in one (its issue
    448). options: {task: keyword arguments of make_env}. Attribute: legal, the action indices that
    a game tells apart per environment, or None where actions are continuous. An environment that
    ends restarts at once with its next seed: `obs` is then the first of the new episode.
    SystemExit: an environment failed, or its process died."""

    def __init__(self, tasks, options=None, obs="pixels", size=64):
        self.tasks, options = list(tasks), options or {}
        self._options = [dict(obs=obs, size=size, **options.get(t, {})) for t in self.tasks]
        super().__init__(len(self.tasks))
        try:
            self.reset([0] * self.n)
        except BaseException:
            self.close()
            raise

    def _died(self, i, process):
        raise SystemExit(f"the environment process of {self.tasks[i]} died (exit code "
                         f"{process.wait()}; -9 usually means lack of memory): type the same "
                         "command with --resume")

    def reset(self, seeds, actions=None):
        """Start an episode in every environment and play `actions` (a list each) -> obs."""
        episodes = zip(self.tasks, map(int, seeds), actions or [()] * self.n, self._options)
        self.post({slot: (None, episode) for slot, episode in enumerate(episodes)})
        firsts = [first for _, first in self.collect().values()]
        self.legal = [legal for _, legal in firsts]
        return [obs for obs, _ in firsts]

    def send(self, actions, next_seeds):
        """One step each; if it ends an episode, the next one has the seed given."""
        following = zip(self.tasks, map(int, next_seeds))
        self.post(dict(enumerate(zip(actions, following))))

    def receive(self):
        """[(obs, rew, terminated, truncated, info)] of the step that was sent."""
        answers = self.collect().values()
        return [(step[0] if first is None else first[0], *step[1:]) for step, first in answers]


if __name__ == "__main__":
    raise SystemExit("envs.py serves the scripts; its speed: python -m studies.throughput "
                     "[--task TASK,..]")
