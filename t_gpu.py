from t_head import *  # noqa: F401,F403

# ------------------------------------------- an emulated GPU (studies/gpu_emulated.py) and its rules


def gpu_run(*words):
    """What a program of one thread prints, with CUDA's rules in force."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, *words], cwd=HERE, env=env, capture_output=True,
                          text=True, timeout=120)


@pytest.mark.parametrize("script", ["pwm", "ed2", "savi"])
def test_gpu_updates_are_the_cpus_never_wait_and_resume_across_devices(script):
    done = gpu_run("-m", "studies.gpu_emulated", script)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, kinds in json.loads(done.stdout.splitlines()[-1]).items():
        for kind, counts in kinds.items():  # the last step of savi also measures
            assert len(counts) == 3 and not any(counts[:-1]), (name, kind, counts)


def test_gpu_rules_catch_planted_mistakes():
    code = """
import torch
from studies.gpu_emulated import GPU, WAITS
x = torch.ones(3, device=GPU)
def refused(f):
    try:
        f()
    except AssertionError:
        return True
assert refused(lambda: x + torch.ones(3))
assert refused(lambda: torch.rand(3, device=GPU, generator=torch.Generator()))
assert refused(lambda: torch.rand(3, generator=torch.Generator(GPU)))
assert WAITS.total() == 0
for wait in (lambda: x.sum().item(), x.cpu, x.nonzero, lambda: bool(x.sum() > 1), lambda: x[x > 0]):
    before = WAITS.total()
    wait()
    assert WAITS.total() > before
y = x.double().float() + 1
x.copy_(y)
before = WAITS.total()
torch.ones(3).to(GPU)
assert WAITS.total() == before
"""
    done = gpu_run("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_gpu_generator_states_of_another_device_go_on_from_a_seed_of_theirs():
    a, b = gen(1), gen(2)
    for g in (a, b):
        data._bring_back(g, torch.arange(16, dtype=torch.uint8))  # CUDA's: seed and offset
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
    state = gen(3).get_state()
    data._bring_back(a, state)
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=gen(3)))
