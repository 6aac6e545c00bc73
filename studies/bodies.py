"""The five bodies of the PWM paper's single tasks (Sec. 4.1, Table 2), on MuJoCo.

    python pwm.py --task studies.bodies:ant           # or hopper, anymal, humanoid, muscle-humanoid
    env = envs.make_env("studies.bodies:ant")
    with Herd("ant", 64) as herd:                     # 64 of them together on all cores
        obs = herd.reset()
    python -m studies.throughput --task bodies        # how fast

Shapes: n rows (bodies side by side), O observation, A actions, J joints. Like the task of the same
name in PWM's simulator (not its numbers: other physics), control at 60 Hz. Observation:
  hopper  height - 1.25, pitch, joints (3), then their rates
  others  height (1), root quaternion wxyz (4), linear and angular velocity in the world (3, 3),
          joints (J), their rates / 10 (J), upright (1), heading (1) and, but for the muscles, the
          previous action (J)
The reward is that of the state before the step and the action. Action i drives joint i of the
observation with [-1, 1] times its torque; of the muscles, activation (action + 1) / 2. An episode
has 1000 steps of 1/60 s and ends when the torso is too low.
"""
import functools
import math
import os

import gymnasium
import numpy as np

import envs
from studies.body_models import body_model

FACTS = {name: envs.Facts(obs_dim, act_dim, 1000, 1, None, True) for name, obs_dim, act_dim in (
    ("hopper", 11, 3), ("ant", 37, 8), ("anymal", 49, 12), ("humanoid", 76, 21),
    ("muscle-humanoid", 53, 152))}
HEIGHT = {"hopper": 1.25, "ant": 0.75, "anymal": 0.55, "humanoid": 1.35, "muscle-humanoid": 1.0}
FLOOR = {"hopper": 0.8, "ant": 0.27, "anymal": 0.25, "humanoid": 0.74, "muscle-humanoid": 0.46}
JOINTS = {  # at rest, rad; 0 for the others. anymal: HAA, HFE, KFE of LF, RF, LH, RH
    "ant": (0, 1, 0, -1, 0, -1, 0, 1),
    "anymal": (.03, .4, -.8, -.03, .4, -.8, .03, -.4, .8, -.03, -.4, .8)}


class Body:
    """Start, observation, reward and end for n rows at once, and their physics on some threads.

    state: (n, 1 + nq + nv) time, qpos, qvel as MuJoCo packs them. kind: a name of FACTS."""

    SUBSTEPS = 4

    def __init__(self, kind, threads=1):
        import mujoco
        from mujoco import rollout
        if kind not in FACTS:
            raise SystemExit(f"unknown body {kind!r}: expected one of {', '.join(FACTS)}; for any "
                             "other task use envs.Flock")
        self.task, self.kind, self.facts = f"studies.bodies:{kind}", kind, FACTS[kind]
        self.model = m = body_model(kind)
        self._pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
        self._data = [mujoco.MjData(m) for _ in range(threads)]
        self.nq, self.nv, self.muscles = m.nq, m.nv, kind == "muscle-humanoid"
        # Files list motors in their own order (ant.xml begins with the fourth leg): by joint.
        self._action_of = np.argsort(np.argsort(m.actuator_trnid[:, 0]))
        if self.muscles:
            self._action_of = np.arange(m.nu)
        self.height, self.floor = HEIGHT[kind], FLOOR[kind]
        self.balls = [int(m.jnt_qposadr[j]) for j in range(m.njnt)
                      if m.jnt_type[j] == mujoco.mjtJoint.mjJNT_BALL]
        self.rest = np.zeros(m.nq)
        self.rest[1 if kind == "hopper" else 2] = self.height
        for a in [*self.balls, *([] if kind == "hopper" else [3])]:
            self.rest[a] = 1
        if kind in JOINTS:
            self.rest[7:] = JOINTS[kind]

    def close(self):
        """Stop the threads."""
        self._pool.close()

    def start(self, rng):
        """One row (1 + nq + nv) around the rest pose, by the generator rng (reference code).

        With u in [-.5, .5]: hopper 0.1 u everywhere; others 0.2 u m, 15 degrees x u about a random
        axis, 0.4 u rad per joint, 0.5 u for all velocities."""
        q, u = self.rest.copy(), lambda n: rng.uniform(-0.5, 0.5, n)
        if self.kind == "hopper":
            return np.concatenate([[0.0], q + 0.1 * u(6), 0.1 * u(6)])
        q[:3] += 0.2 * u(3)
        axis, angle = u(3), u(1)[0] * math.pi / 12
        q[3:7] = quaternion(angle * axis / max(np.linalg.norm(axis), 1e-9))
        turn = np.ones(len(q), bool)
        turn[:7] = False
        for a in self.balls:  # turned: noise on its numbers would not stay a rotation
            q[a:a + 4], turn[a:a + 4] = quaternion(0.4 * u(3)), False
        q[turn] += 0.4 * u(int(turn.sum()))
        return np.concatenate([[0.0], q, 0.5 * u(self.nv)])

    def observe(self, state, last):
        """state (n, 1 + nq + nv), last actions (n, A) -> (n, O) float64."""
        q, v = state[:, 1:1 + self.nq], state[:, 1 + self.nq:]
        if self.kind == "hopper":
            return np.concatenate([q[:, 1:2] - 1.25, q[:, 2:], v], 1)
        w, x, y, z = q[:, 3:7].T
        axis, spin = q[:, 4:7], v[:, 3:6]  # MuJoCo's angular velocity is in the body's frame
        side = np.cross(axis, spin)
        spin = spin + 2 * (w[:, None] * side + np.cross(axis, side))
        upright, heading = 1 - 2 * (x * x + y * y), 1 - 2 * (y * y + z * z)  # R[2, 2], R[0, 0]
        parts = [q[:, 2:7], v[:, :3], spin, q[:, 7:], 0.1 * v[:, 6:], upright[:, None],
                 heading[:, None]]
        return np.concatenate(parts if self.muscles else [*parts, last], 1)

    def reward(self, obs, act):
        """Reward (n,) of observations (n, O) before the step and clipped actions (n, A).

        Forward speed plus posture (Table 2, with the constants of the released code)."""
        if self.kind == "hopper":  # h - 0.95: 0.15 m above the height where it ends
            return (obs[:, 5] + height_term(obs[:, 0] + 0.3, 0.3, 1) + 1
                    - (obs[:, 1] / (math.pi / 6)) ** 2 - 0.1 * (act * act).sum(1))
        J = len(self._action_of) if not self.muscles else 0
        upright, heading = obs[:, -2 - J], obs[:, -1 - J]
        rew = obs[:, 5] + 0.1 * upright + heading
        if self.muscles:
            return rew - 0.001 * ((act + 1) / 2).sum(1)
        if self.kind == "humanoid":
            return rew + height_term(obs[:, 0] - 0.84, 0.1, 10) - 0.002 * (act * act).sum(1)
        cost = 0.005 if self.kind == "anymal" else 0
        return rew + obs[:, 0] - self.floor - cost * (act * act).sum(1)

    def physics(self, state, act):
        """The state (n, 1 + nq + nv) one control step later, whatever became of it."""
        ctrl = (act + 1) / 2 if self.muscles else act[:, self._action_of]
        ctrl = np.repeat(ctrl[:, None].astype(np.float64), self.SUBSTEPS, 1)
        return self._pool.rollout(self.model, self._data, state, ctrl)[0][:, -1]

    def advance(self, state, act):
        """One control step: state (n, 1 + nq + nv), act (n, A) -> state, terminated (n,).

        A row whose numbers explode keeps its old state and ends: all that comes back is finite."""
        after = self.physics(state, act)
        broken = ~(np.abs(after) < 1e6).all(1)  # also true for NaN
        after[broken] = state[broken]
        return after, broken | (after[:, 2 if self.kind == "hopper" else 3] < self.floor)

    def step(self, state, last, act):
        """One step with reward -> state, obs (n, O) float64, rew (n,), terminated (n,)."""
        rew = self.reward(self.observe(state, last), act)
        state, terminated = self.advance(state, act)
        return state, self.observe(state, act), rew, terminated


def height_term(x, top, slope):
    """-200 x^2 below 0, slope x above, for x clipped to [-1, top]."""
    x = np.clip(x, -1, top)
    return np.where(x < 0, -200 * x * x, slope * x)


def quaternion(turn):
    """Rotation vector (3,) -> wxyz with w >= 0 (angles up to pi)."""
    angle = np.linalg.norm(turn)
    axis = np.asarray(turn) * (math.sin(angle / 2) / max(angle, 1e-9))
    return np.concatenate([[math.cos(angle / 2)], axis])


class Walker(gymnasium.Env):
    """A single body, equal to a row of Herd; envs.make_env adds the time limit."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}  # noqa: RUF012 (gymnasium's way)
    render_mode = "rgb_array"

    def __init__(self, body):
        self.body, facts, self._renderer = body, body.facts, None
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (facts.act_dim,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (facts.obs_dim,))

    def reset(self, *, seed=None, options=None):
        """Start an episode -> obs (O,), {}."""
        super().reset(seed=seed)
        self.state = self.body.start(self.np_random)[None]
        self.last = np.zeros((1, self.body.facts.act_dim))
        return self.body.observe(self.state, self.last)[0], {}

    def step(self, action):
        """action (A,) in [-1, 1] -> obs, reward, terminated, False, {}."""
        act = np.asarray(action, np.float64)[None]
        self.state, obs, rew, terminated = self.body.step(self.state, self.last, act)
        self.last = act
        return obs[0], float(rew[0]), bool(terminated[0]), False, {}

    def render(self):
        """One frame (256, 256, 3) from the side."""
        import mujoco
        body = self.body
        if self._renderer is None:
            self._renderer = mujoco.Renderer(body.model, 256, 256)
            self._drawn = mujoco.MjData(body.model)
        d, row = self._drawn, self.state[0]
        d.qpos[:], d.qvel[:] = row[1:1 + body.nq], row[1 + body.nq:]
        mujoco.mj_forward(body.model, d)
        camera = mujoco.MjvCamera()
        camera.lookat[:], camera.distance = d.body("torso").xpos, 3 * max(body.height, 1)
        camera.azimuth, camera.elevation = 90, -12
        self._renderer.update_scene(d, camera)
        return self._renderer.render()

    def close(self):
        """Free the simulation and the renderer."""
        self.body.close()
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class Herd:
    """n bodies stepping together in this process on some threads (context manager).

    The interface of envs.beside: what a user's fast simulator has to offer. A row that ends
    restarts at once: its `obs` is the first of the next episode and `last` the one that ended it
    (V of `last` is the bootstrap of a truncated row; a terminated row has none). Episode k of row i
    starts from the seed (seed, i, k), whatever the number of threads (None: all cores).
    body: a name of FACTS, or a class of bodies whose threads are still to be chosen."""

    def __init__(self, body, n, seed=0, threads=None):
        threads = (os.cpu_count() or 1) if threads is None else threads
        if n < 1 or threads < 1:
            raise SystemExit(f"Herd got n={n}, threads={threads}; expected 1 or more of each")
        self.body = Body(body, threads) if isinstance(body, str) else body(threads=threads)
        self.task, self.facts, self.n, self.seed = self.body.task, self.body.facts, n, seed
        self._state = np.zeros((n, 1 + self.body.nq + self.body.nv))
        self._last = np.zeros((n, self.facts.act_dim))
        self.t, self._episode = np.zeros(n, int), np.zeros(n, int)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Stop the threads."""
        self.body.close()

    def state_dict(self):
        """Arrays from which load_state_dict goes on with the same steps."""
        return dict(state=self._state.copy(), last=self._last.copy(), t=self.t.copy(),
                    episode=self._episode.copy())

    def load_state_dict(self, state):
        """Go on from what state_dict gave, as arrays or tensors -> obs (n, O) float32."""
        self._state, self._last, self.t, self._episode = (
            np.asarray(state[k]).copy() for k in ("state", "last", "t", "episode"))
        return self._observe(np.arange(self.n))

    def _observe(self, rows):
        return self.body.observe(self._state[rows], self._last[rows]).astype(np.float32)

    def _start(self, rows, seeds):
        for i, seed in zip(rows, seeds):
            self._state[i] = self.body.start(np.random.default_rng(seed))
            self._last[i], self.t[i] = 0, 0

    def _restart(self, rows):
        self._start(rows, [[self.seed, i, self._episode[i]] for i in rows])
        self._episode[rows] += 1

    def _move(self, rows, act):
        """A step of some rows -> obs (m, O) float32, rew (m,) float64, terminated, truncated."""
        envs.check_actions(self.task, act, (len(rows), self.facts.act_dim))
        act = np.clip(act, -1, 1).astype(np.float64)
        self._state[rows], obs, rew, terminated = self.body.step(
            self._state[rows], self._last[rows], act)
        self._last[rows] = act
        self.t[rows] += 1
        truncated = ~terminated & (self.t[rows] >= self.facts.episode_length)
        return obs.astype(np.float32), rew, terminated, truncated

    def reset(self):
        """Start an episode in every row -> obs (n, O) float32."""
        self._restart(np.arange(self.n))
        return self._observe(np.arange(self.n))

    def step(self, act):
        """act (n, A) -> obs (n, O), rew (n,) float32, terminated, truncated (n,), last (n, O)."""
        last, rew, terminated, truncated = self._move(np.arange(self.n), np.asarray(act))
        obs = last
        if len(rows := np.flatnonzero(terminated | truncated)):
            self._restart(rows)
            obs = self._observe(np.arange(self.n))
        return obs, rew.astype(np.float32), terminated, truncated, last

    def rollout(self, jobs, policy, progress=None):
        """envs.Workers.rollout for jobs of this body: the same episodes, n at a time."""
        length, todo = self.facts.episode_length, list(range(len(jobs)))
        results = [None] * len(jobs)
        job, records, done, calls = np.full(self.n, -1), [None] * self.n, 0, 0

        def begin(i):
            job[i] = todo.pop(0) if todo else -1
            if job[i] >= 0:
                task, seed = jobs[job[i]]
                self._start([i], [seed])
                records[i] = envs.Record(task, seed, self._observe([i])[0])

        for i in range(self.n):
            begin(i)
        while len(live := np.flatnonzero(job >= 0)):
            act = np.asarray(policy(self._observe(live), job[live], self.t[live]), np.float32)
            obs, rew, terminated, truncated = self._move(live, act)
            for k, i in enumerate(live):
                records[i].add(act[k], obs[k], float(rew[k]), bool(terminated[k]))
                if terminated[k] or truncated[k]:
                    results[job[i]] = records[i].episode(success=0.0)
                    done += length  # progress counts full lengths, as they were expected
                    begin(i)
            calls += 1
            if progress and (calls % 20 == 0 or not (job >= 0).any()):
                progress(int(done + self.t[job >= 0].sum()), len(jobs) * length)
        return results


for _kind, _facts in FACTS.items():
    envs.register(f"studies.bodies:{_kind}", _facts,
                  make=lambda seed, obs, kind=_kind: Walker(Body(kind)),
                  batch=functools.partial(Herd, _kind))
