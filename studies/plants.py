"""Differentiable plants in batched torch, as tasks: the PWM paper's two examples and a hopper.

Sec. 3, App. A and B; the hopper is that of Fig. 7a.

    plant("planar-hopper").step(state, act)   # or ball-wall, double-pendulum, stiff-hopper
    env = envs.make_env("studies.plants:double-pendulum")

ball-wall is one throw (theta = pi x action, reward the distance, then it ends); the pendulum is
truncated after 240 steps; planar-hopper is the hopper of studies.bodies on PlanarHopper,
stiff-hopper with five times its contact stiffness. The first two are not drawn.
"""
import functools
import math

import gymnasium
import numpy as np
import torch

import envs
from studies.bodies import FACTS, Body, Herd, Walker
from studies.body_models import body_model


class BallWall:
    """A ball thrown at angle theta from the origin with 10 m/s and pushed forward with 1 m/s^2.

    It flies for 2 s or sticks to a wall 5 m away whose top is at height 0 (Fig. 2). All in batched
    torch; theta in radians, any shape."""

    SPEED, PUSH, TIME, GRAVITY, WALL, TOP = 10.0, 1.0, 2.0, -9.81, 5.0, 0.0

    def distance(self, theta, k=1.0):
        """Metres flown f(theta). k=1 is the contact time of paper and code, k=2 the right one: the
        ball is at the wall at t_c = (-v cos + sqrt((v cos)^2 + k a w)) / a."""
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
        t = torch.linspace(0, self.TIME, n)
        x = self.SPEED * math.cos(theta) * t + self.PUSH * t * t / 2
        y = self.SPEED * math.sin(theta) * t + self.GRAVITY * t * t / 2
        stop = ((x >= self.WALL) & (y < self.TOP)).long().cumsum(0) > 0
        flown = int((~stop).sum())
        return torch.stack([x, y], 1)[:flown]


class DoublePendulum:
    """Two uniform rods (1 kg, 1 m) hanging from a fixed hinge, a torque of 20 N m x action on the
    elbow only (App. B).

    state (.., 4): theta1 from upright, theta2 relative to the first rod (rad), and their rates
    (rad/s). One step is 1/60 s by fourth-order Runge-Kutta in batched torch and differentiable.
    Undamped and unforced it keeps its energy to 0.15 J over the 240 steps of a fall from near
    upright, where 20 J turn over."""

    TORQUE, FRICTION, G, DT, STEPS = 20.0, 0.05, 9.81, 1 / 60, 240

    def reset(self, n, generator=None, dtype=None):
        """n start states (n, 4): angles within +-pi/2, rates within +-0.25."""
        u = torch.rand(n, 4, generator=generator, dtype=torch.float64) - 0.5
        start = u * torch.tensor([math.pi, math.pi, 0.5, 0.5])
        return start.to(dtype or torch.get_default_dtype())

    def acceleration(self, state, torque, friction):
        """M(q) q'' = (0, torque) - C - G - friction q', solved in closed form -> (.., 2)."""
        a1, a2, v1, v2 = state.unbind(-1)
        c2, s2, g = a2.cos(), a2.sin(), self.G
        m22 = 1 / 12 + 1 / 4  # I + m lc^2 with lc = 1/2, I = 1/12
        m12 = m22 + c2 / 2
        m11 = 1 / 6 + 1 / 4 + 1.25 + c2  # 2 I + m lc^2 + m (l^2 + lc^2 + 2 l lc cos)
        h = s2 / 2
        swing = 0.5 * g * (a1 + a2).sin()  # gravity topples: theta = 0 is upright
        b1 = h * (2 * v1 * v2 + v2 * v2) + 1.5 * g * a1.sin() + swing - friction * v1
        b2 = torque - h * v1 * v1 + swing - friction * v2
        det = m11 * m22 - m12 * m12
        return torch.stack([m22 * b1 - m12 * b2, m11 * b2 - m12 * b1], -1) / det[..., None]

    def step(self, state, act, friction=FRICTION):
        """state (.., 4), act (.., 1) in [-1, 1] -> the state 1/60 s later."""
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
        a = state[..., :2]
        return torch.stack([a.cos()[..., 0], a.sin()[..., 0], a.cos()[..., 1], a.sin()[..., 1],
                            state[..., 2], state[..., 3]], -1)

    def state(self, obs):
        """The inverse of observe, with angles in [-pi, pi]: (.., 6) -> (.., 4)."""
        a1 = torch.atan2(obs[..., 1], obs[..., 0])
        a2 = torch.atan2(obs[..., 3], obs[..., 2])
        return torch.stack([a1, a2, obs[..., 4], obs[..., 5]], -1)

    def reward(self, obs):
        """-wrap(theta1)^2 - wrap(theta2)^2 - 0.1 (rates squared), of the state after a step
        (reference code)."""
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
    """The hopper of studies.bodies with the contacts of PWM's simulator, differentiable.

    A chain of four links in the x-z plane with the masses and lengths of gymnasium's hopper.xml.
    state (.., 12): x, z (m), pitch, thigh, leg, foot (rad), then their rates, in MuJoCo's order.
    One step is 1/60 s in 8 substeps of semi-implicit Euler; as in the reference code the mass
    matrix is that of the step's beginning, every joint is damped, and the ends of the capsules are
    springs of ke N/m on the floor with damping and friction. `stiffness` multiplies ke and kd: 5 is
    the stiff contact of Fig. 7a."""

    DT, SUBSTEPS, TORQUE, KF, FRICTION, LIMIT = 1 / 60, 8, 200.0, 1e3, 0.9, 1e3
    DAMPING = (10.0, 10.0, 10.0, 12.0, 12.0, 12.0)  # N s/m, N m s/rad
    FLOOR = 0.8  # metres of the torso, below which the episode ends

    def __init__(self, stiffness=1.0):
        m = body_model("hopper")
        self.ke, self.kd, self.gravity = 2e4 * stiffness, 2e3 * stiffness, -float(m.opt.gravity[2])
        plane, hinge = [0, 2], m.jnt_pos[2:]  # one hinge per body, after the torso's two slides
        self.sign = m.jnt_axis[2:, 1]  # pitch turns about +y, the joints about -y
        parent = np.concatenate([[[0, 0, 0]], hinge[:-1]])
        # From hinge to hinge in the parent's frame, and from a body's hinge to its centre.
        self.offset = (m.body_pos[1:] + hinge - parent)[1:, plane]
        self.com = (m.body_ipos[1:] - hinge)[:, plane]
        self.mass = m.body_mass[1:]
        turn = np.stack([rotation(q) for q in m.body_iquat[1:]])
        self.inertia = np.einsum("bi,bi->b", turn[:, 1] ** 2, m.body_inertia[1:])  # about y
        geom = np.arange(1, m.ngeom)  # without the floor
        body = m.geom_bodyid[geom] - 1
        half = np.stack([rotation(m.geom_quat[g])[:, 2] * m.geom_size[g, 1] for g in geom])
        ends = np.concatenate([m.geom_pos[geom] + half, m.geom_pos[geom] - half])
        self.owner = np.tile(body, 2)
        self.end = (ends - hinge[self.owner])[:, plane]
        self.radius = np.tile(m.geom_size[geom, 0], 2)
        self.low, self.high = m.jnt_range[3:].T
        self.armature = m.dof_armature[3]  # 1 on all six coordinates, as in the reference
        self.moves = np.tril(np.ones((4, 4)))  # [b, j]: hinge j moves body b

    def _links(self, q):
        """Places of the hinges (.., 4, 2) and a function that turns vectors (n, 2) of bodies (n,)
        into the world."""
        angle = (q[..., 2:] * q.new_tensor(self.sign)).cumsum(-1)
        c, s = angle.cos(), angle.sin()

        def turned(r, body):
            r, c_, s_ = q.new_tensor(r), c[..., body], s[..., body]
            return torch.stack([c_ * r[:, 0] + s_ * r[:, 1], c_ * r[:, 1] - s_ * r[:, 0]], -1)

        rest = q[..., None, :2] + turned(self.offset, [0, 1, 2]).cumsum(-2)
        return torch.cat([q[..., None, :2], rest], -2), turned

    def _jacobian(self, points, hinges, owner):
        """How the hinges move points (.., n, 2) of bodies owner (n,): (.., n, 4, 2). The slides
        move all alike."""
        lever = points[..., None, :] - hinges[..., None, :, :]
        turn = torch.stack([lever[..., 1], -lever[..., 0]], -1)
        return turn * points.new_tensor(self.moves[owner] * self.sign)[..., None]

    def mass_matrix(self, q):
        """M(q): (.., 6) -> (.., 6, 6), with armature."""
        hinges, turned = self._links(q)
        J = self._jacobian(hinges + turned(self.com, [0, 1, 2, 3]), hinges, np.arange(4))
        mass, spin = q.new_tensor(self.mass), q.new_tensor(self.moves * self.sign)
        hinge = torch.einsum("b,...bix,...bjx->...ij", mass, J, J)
        hinge = hinge + torch.einsum("b,bi,bj->ij", q.new_tensor(self.inertia), spin, spin)
        mixed = torch.einsum("b,...bjx->...xj", mass, J)  # (.., 2, 4)
        slide = mass.sum() * torch.eye(2, dtype=q.dtype, device=q.device)
        slide = slide.expand(*q.shape[:-1], 2, 2)
        upper = torch.cat([slide, mixed], -1)
        M = torch.cat([upper, torch.cat([mixed.transpose(-1, -2), hinge], -1)], -2)
        return M + self.armature * torch.eye(6, dtype=q.dtype, device=q.device)

    def forces(self, q, v):
        """bias(q, v), i.e. Coriolis, centrifugal and weight, and contact forces, both (.., 6)."""
        hinges, turned = self._links(q)
        rate = (v[..., 2:] * q.new_tensor(self.sign)).cumsum(-1)  # of every body
        com = turned(self.com, [0, 1, 2, 3])
        J = self._jacobian(hinges + com, hinges, np.arange(4))
        inward = -rate.square()[..., None]  # w x (w x r) = -w^2 r
        between = inward[..., :3, :] * (hinges[..., 1:, :] - hinges[..., :3, :])
        acc = torch.cat([torch.zeros_like(between[..., :1, :]), between.cumsum(-2)], -2)
        acc = acc + inward * com
        weighed = q.new_tensor(self.mass)[:, None] * (acc + q.new_tensor([0, self.gravity]))
        bias = torch.cat([weighed.sum(-2), torch.einsum("...bjx,...bx->...j", J, weighed)], -1)

        ends = hinges[..., self.owner, :] + turned(self.end, self.owner)
        radius = q.new_tensor(self.radius)
        depth = (radius - ends[..., 1]).relu()  # (.., 8)
        lowest = ends - torch.stack([torch.zeros_like(depth), radius.expand_as(depth)], -1)
        J = self._jacobian(lowest, hinges, self.owner)
        speed = v[..., None, :2] + torch.einsum("...njx,...j->...nx", J, v[..., 2:])
        push = depth * (self.ke + self.kd * (-speed[..., 1]).relu())
        slip = speed[..., 0]
        grip = torch.minimum(self.KF * slip.abs(), self.FRICTION * self.ke * depth)
        force = torch.stack([-grip * slip.sign(), push], -1)  # (.., 8, 2)
        contact = torch.einsum("...njx,...nx->...j", J, force)
        return bias, torch.cat([force.sum(-2), contact], -1)

    def step(self, state, act):
        """state (.., 12), act (.., 3) in [-1, 1] -> the state 1/60 s later."""
        q, v = state.chunk(2, -1)
        inverse = torch.linalg.inv(self.mass_matrix(q))
        for _ in range(self.SUBSTEPS):
            q, v = self.substep(q, v, inverse, self.TORQUE * act)
        return torch.cat([q, v], -1)

    def substep(self, q, v, inverse, torque):
        """q, v (.., 6), inverse mass matrix (.., 6, 6), torque (.., 3) -> q, v an eighth of a step
        later."""
        bias, contact = self.forces(q, v)
        over, under = q[..., 3:] - q.new_tensor(self.high), q.new_tensor(self.low) - q[..., 3:]
        joints = torque - self.LIMIT * (over.relu() - under.relu())
        pull = torch.cat([torch.zeros_like(joints), joints], -1)
        force = contact - bias - q.new_tensor(self.DAMPING) * v + pull
        v = v + self.DT / self.SUBSTEPS * (inverse @ force[..., None])[..., 0]
        return q + self.DT / self.SUBSTEPS * v, v

    def observe(self, state):
        """(.., 12) -> (.., 11): height - 1.25, pitch, joints, rates."""
        return torch.cat([state[..., 1:2] - 1.25, state[..., 2:]], -1)

    def state(self, obs):
        """The inverse of observe, at x = 0: (.., 11) -> (.., 12)."""
        return torch.cat([torch.zeros_like(obs[..., :1]), obs[..., :1] + 1.25, obs[..., 1:]], -1)

    def step_reward(self, obs, act):
        """Reward (..) of a step from obs (.., 11) with act (.., 3), as Body.reward has it."""
        height = (obs[..., 0] + 0.3).clamp(-1, 0.3)
        height = height - height.clamp(max=0) - 200 * height.clamp(max=0).square()
        return (obs[..., 5] + height + 1 - (obs[..., 1] / (math.pi / 6)).square()
                - 0.1 * act.square().sum(-1))

    def ended(self, obs):
        """Whether a step into obs (.., 11) ended the episode: (..) bool."""
        return obs[..., 0] + 1.25 < self.FLOOR


def rotation(quaternion):
    """wxyz (4,) -> rotation matrix (3, 3)."""
    import mujoco
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


PLANTS = {"ball-wall": BallWall, "double-pendulum": DoublePendulum, "planar-hopper": PlanarHopper,
          "stiff-hopper": functools.partial(PlanarHopper, 5.0)}


def plant(task):
    """The differentiable plant of a task, "double-pendulum" or "studies.plants:double-pendulum";
    None if it has none."""
    return PLANTS.get(task.removeprefix("studies.plants:"), lambda: None)()


class Throw(gymnasium.Env):
    """ball-wall as an environment: there is nothing to see."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    def __init__(self):
        self.plant = BallWall()

    def reset(self, *, seed=None, options=None):
        """Start -> obs (1,), {}."""
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        """action (1,) -> obs, metres, True, False, {}."""
        theta = math.pi * torch.as_tensor(action, dtype=torch.float64)
        return np.zeros(1, np.float32), float(self.plant.distance(theta)[0]), True, False, {}


class Swing(gymnasium.Env):
    """double-pendulum as an environment; envs.make_env ends it after 240 steps."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,))

    def __init__(self):
        self.plant = DoublePendulum()

    def reset(self, *, seed=None, options=None):
        """Start -> obs (6,), {}."""
        super().reset(seed=seed)
        generator = torch.Generator().manual_seed(int(self.np_random.integers(2**31)))
        self.state = self.plant.reset(1, generator, torch.float64)
        return self.plant.observe(self.state)[0].numpy(), {}

    def step(self, action):
        """action (1,) -> obs, reward, False, False, {}."""
        act = torch.as_tensor(action, dtype=torch.float64)[None]
        self.state = self.plant.step(self.state, act)
        obs = self.plant.observe(self.state)
        return obs[0].numpy(), float(self.plant.reward(obs)[0]), False, False, {}


class PlanarBody(Body):
    """The hopper stepped by PlanarHopper instead of MuJoCo; everything else is the same."""

    def __init__(self, kind, threads=1):
        super().__init__("hopper")
        self.task, self.plant = f"studies.plants:{kind}", plant(kind)

    def physics(self, state, act):
        """The state (n, 13) one control step later, whatever became of it."""
        with torch.no_grad():
            moved = self.plant.step(torch.as_tensor(state[:, 1:]), torch.as_tensor(act)).numpy()
        return np.concatenate([state[:, :1] + self.plant.DT, moved], 1)


envs.register("studies.plants:ball-wall", envs.Facts(1, 1, 1, 1, None, True),
              make=lambda seed, obs: Throw())
envs.register("studies.plants:double-pendulum", envs.Facts(6, 1, 240, 1, None, False),
              make=lambda seed, obs: Swing())
for _kind in ("planar-hopper", "stiff-hopper"):
    _body = functools.partial(PlanarBody, _kind)
    envs.register(f"studies.plants:{_kind}", FACTS["hopper"],
                  make=lambda seed, obs, body=_body: Walker(body()),
                  batch=functools.partial(Herd, _body))
