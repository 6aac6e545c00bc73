"""Do the four scripts keep CUDA's rules? An emulated GPU answers on any machine: PrivateUse1 as a
Python device "gpu" whose tensors live in RAM, refuse CPU tensors and generators of the other
device, and count what would wait for the GPU (.item(), nonzero, copies to the CPU).

    python -m studies.gpu_emulated pwm       # or ed2 mow savi plant: seconds; prints one JSON line

It renames a backend and replaces torch.Generator: only for a process of its own."""

import collections
import copy
import json
import sys
import tempfile
from dataclasses import replace

import numpy as np
import torch
from torch.utils import _pytree as tree
from torch.utils import backend_registration as registry

registry._DummyBackendModule.get_amp_supported_dtype = lambda self: [torch.bfloat16]
registry._setup_privateuseone_for_python_backend("gpu")
CPU, GPU = torch.device("cpu"), torch.device("gpu", 0)
WAITS, RealGenerator = collections.Counter(), torch.Generator
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal")


class Gpu(torch.Tensor):
    """A tensor of the emulated device around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            dtype=raw.dtype,
            device=GPU,
            storage_offset=raw.storage_offset(),
        )
        self.raw = raw
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run_op(op, *args, **(kwargs or {}))

    def __deepcopy__(self, memo):
        new = Gpu(self.raw.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            new._is_param = True
        return memo.setdefault(id(self), new)

    def __reduce_ex__(self, protocol):  # a file holds what map_location="cpu" would give
        return self.raw.detach().__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()


class Generator(RealGenerator):
    """Says that it is on the GPU and draws as the CPU's: numbers are equal on both devices."""

    device = property(lambda self: self.where)

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.where = torch.device(device)


def waits(name, args, here, gpu):
    """Whether CUDA would wait for this operation."""
    masks = [x for x in tree.tree_leaves(args[1:2]) if isinstance(x, Gpu) and x.dtype == torch.bool]
    by_mask = name in ("index", "index_put_", "_index_put_impl_") and masks
    return gpu and (name in WAITING or by_mask or name in ("_to_copy", "copy_") and not here)


def run_op(op, *args, **kwargs):
    """One operation, on the bare tensors."""
    leaves, name = tree.tree_leaves((args, kwargs)), op._schema.name.removeprefix("aten::")
    gpu = [x for x in leaves if isinstance(x, Gpu)]
    cpu = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Gpu) and x.ndim]
    to = kwargs.get("device")
    here = bool(gpu) if to is None else torch.device(to).type == "gpu"
    if name == "copy_":
        here = isinstance(args[0], Gpu)
    index = name.lstrip("_").startswith("index") and isinstance(args[0], Gpu)  # as CUDA allows
    if gpu and cpu and not index and name not in ("_to_copy", "copy_"):
        raise AssertionError(f"{op}: tensors of two devices")
    WAITS[name] += bool(waits(name, args, here, gpu))

    def bare(x):
        return x.raw if isinstance(x, Gpu) else CPU if isinstance(x, torch.device) else x

    def wrapped(x):
        if not (isinstance(x, torch.Tensor) and here):
            return x
        return known[id(x)] if id(x) in known else Gpu(x)

    a, k = tree.tree_map(bare, (args, kwargs))
    k.pop("pin_memory", None)
    known = {id(x.raw): x for x in gpu}
    return tree.tree_map(wrapped, op(*a, **k))


class SameGenerator(torch.overrides.TorchFunctionMode):
    """Refuses a generator of another device than the numbers."""

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f.__name__ == "gru_cell" and isinstance(args[0], Gpu):
            return gru_cell(*args)
        g, on = kwargs.get("generator"), [x for x in args if isinstance(x, torch.Tensor)]
        where = on[0].device if on else torch.device(kwargs.get("device") or "cpu")
        if g is not None and g.device.type != where.type:
            raise AssertionError(f"{f.__name__}: generator on {g.device}, numbers on {where}")
        return f(*args, **kwargs)


def gru_cell(x, h, w_x, w_h, b_x, b_h):  # CUDA's fused one is missing on a CPU
    (r, z, n), (r_h, z_h, n_h) = (x @ w_x.T + b_x).chunk(3, -1), (h @ w_h.T + b_h).chunk(3, -1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + r * n_h).tanh()
    return n + z * (h - n)


def on_device(real):
    def make(x, *a, device=None, **k):
        return real(x, *a, **k) if device is None else real(x, *a, **k).to(device)

    return make


SameGenerator().__enter__()
rest = torch.library.Library("_", "IMPL")
rest.fallback(run_op, "PrivateUse1")
make = torch.library.Library("aten", "IMPL")
make.impl(
    "empty.memory_format",
    lambda size, dtype=None, **_: Gpu(torch.empty(size, dtype=dtype)),
    "PrivateUse1",
)
make.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **_: Gpu(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
torch.Generator = Generator
torch.tensor, torch.as_tensor = on_device(torch.tensor), on_device(torch.as_tensor)
torch.arange = on_device(torch.arange)  # which resizes its result: a wrapper keeps its shape

import data  # noqa: E402
import ed2  # noqa: E402
import mow  # noqa: E402
import pwm  # noqa: E402
import savi  # noqa: E402

data._check_plain = lambda *_: 0
PER_UPDATE, STEPS = collections.defaultdict(list), data.Run.steps


def steps(self, kind, *a, **k):
    for step in STEPS(self, kind, *a, **k):
        before = WAITS.total()
        yield step
        PER_UPDATE[kind].append(WAITS.total() - before)


data.Run.steps = steps


def made_episodes(folder, tasks, rng):
    facts = {t: (*pwm.task_facts(t)[:2], 50) for t in tasks}
    episodes = data.Episodes.create(folder, facts)
    for t, (O, A, T) in facts.items():
        for _ in range(4):
            arrays = (rng.uniform(0, 1, s).astype("f4") for s in ((T + 1, O), (T, A), T))
            episodes.append(t, *arrays, np.arange(T) == T - 1)
    return episodes


def weights(*modules):
    return [float(p.detach().cpu().double().abs().sum()) for m in modules for p in m.parameters()]


def pwm_case(device, folder, names):
    tasks, rng = pwm.tasks_of(names), np.random.default_rng(0)
    args = pwm.Args(
        task=names,
        fast=True,
        compile=False,
        workers=1,
        data_dir=folder,
        wm_steps=3,
        policy_steps=3,
        horizon=3,
        policy_batch=8,
        wm_batch=8,
    )
    args = pwm.fill_args(args, CPU, tasks)
    agent = pwm.Agent(replace(args, eval_every=0), tasks, device)
    episodes = made_episodes(f"{folder}/{device.type}-data", tasks, rng)
    pwm.roll_out = pwm.check_model = lambda *_: None
    run = data.Run("pwm", agent.args, inside=f"{folder}/run")
    agent.keep(run, episodes)
    pwm.train(run, agent.args, agent, episodes, None)
    run.close()
    obs = rng.uniform(size=(5, agent.wm.obs_dim)).astype("f4")
    return weights(agent.nets) + agent.policy(obs, np.arange(5) % len(tasks)).flatten().tolist()


def ed2_case(device, folder, wm):
    args = ed2.Args(wm=wm, updates=3, batch=4, lr=3e-4, compile=False)
    rng, O, A = np.random.default_rng(0), *pwm.task_facts("cartpole-swingup")[:2]
    episodes = made_episodes(f"{folder}/{device.type}-data", ["cartpole-swingup"], rng)
    sampler = episodes.sampler(["cartpole-swingup"], 12, device)
    torch.manual_seed(0)
    model = (
        ed2.DreamerV3(O, A, 32, 16, 4, 16)
        if wm == "dreamerv3"
        else ed2.TDMPC2(O, A, 16, 32, ed2.Dynamics(16, A, 32, [list(range(A))]))
    )
    run = data.Run("ed2", args, inside=f"{folder}/run")
    loss = ed2.train(run, model.to(device), sampler, args, 0)
    run.close()
    return [loss, *weights(model)]


def savi_case(device, folder, _):
    args = savi.filled(savi.Args(fast=True), CPU)
    args, rng = replace(args, updates=3, batch=2, compile=False), np.random.default_rng(0)
    shape = 3, args.frames, args.size, args.size
    arrays = dict(
        video=rng.integers(0, 255, (*shape, 3), "u1"),
        seg=rng.integers(0, 3, shape, "u1"),
        actions=rng.normal(size=(3, args.frames, 2)).astype("f4"),
        flow=rng.normal(size=(*shape, 2)).astype("f4"),
    )
    clips, model = savi.Clips(arrays, np.arange(3), args, device), savi.make_model(args).to(device)
    run = data.Run("savi", args, inside=f"{folder}/run")
    savi.train(model, clips, clips, run, args)
    run.close()
    return weights(model)


def mow_case(device, folder, _):
    args = mow.settle(
        mow.Args(task="Boxing,Pong", fast=True, compile=False), ["Boxing", "Pong"], CPU
    )
    agent, rng = mow.Agent(args, [list(range(18))] * 2, device), np.random.default_rng(0)
    for module in agent.modules():  # the devices draw dropout in different ways
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    run = data.Run("mow", args, inside=f"{folder}/run")
    run.keeps(agent=agent, opt=agent.opt, agent_opt=agent.agent_opt)
    frames = data.Frames(f"{folder}/{device.type}-frames", 2, 40, agent.A)
    act = np.eye(agent.A, dtype="f4")
    for t in range(40):
        frames.append(
            rng.integers(0, 255, (2, 64, 64, 3)),
            act[[t % 18, 3]],
            rng.normal(size=2),
            [t == 20, False],
            [t % 21 == 0] * 2,
        )
    for _ in run.steps("update", 3):
        batch = agent.sample(frames)
        loss, z, _ = agent.model_loss(batch)
        mow.descend(loss, agent.opt, 1000.0)
        loss, _ = agent.policy_loss(agent.imagine(z.detach(), batch))
        mow.descend(loss, agent.agent_opt, 100.0)
        agent.follow()
        agent.updates += 1
    run.close()
    obs = rng.integers(0, 255, (2, 1, 64, 64, 3), "u1")
    action = agent.play(obs, agent.memory(1), (0, 1))[0]
    return weights(agent) + action.flatten().tolist()


CASES = dict(
    pwm=(pwm_case, ("cartpole-swingup", "cartpole-swingup,walker-walk", "Hopper-v5")),
    ed2=(ed2_case, ("tdmpc2", "dreamerv3")),
    savi=(savi_case, ("",)),
    mow=(mow_case, ("",)),
)


def main(script):
    """Both devices give equal numbers, each resumes the other's checkpoint; waits per update."""
    case, told = CASES[script][0], {}
    for name in CASES[script][1]:
        PER_UPDATE.clear()
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            want, got = case(CPU, a, name), None
            PER_UPDATE.clear()
            got = case(GPU, b, name)
            told[name] = copy.deepcopy(PER_UPDATE)
            np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
            for device, folder in ((CPU, b), (GPU, a)):  # nothing is left to do: what was saved
                np.testing.assert_allclose(case(device, folder, name), want, rtol=2e-3, atol=2e-3)
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
