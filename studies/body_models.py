"""MuJoCo models of the five bodies of the PWM paper (Sec. 4.1, Table 2).

studies.bodies makes tasks of them.
"""
import functools
import importlib.util
import os

import numpy as np

LEGS = (("LF", 1, 1), ("RF", 1, -1), ("LH", -1, 1), ("RH", -1, -1))  # front or hind, left or right
SIDES = (("right", -1), ("left", 1))
FASCICLES = 4  # of every muscle, side by side


def asset(package, *path):
    """Path of a model file that an installed package brings along; the package is not imported.

    SystemExit: the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"{package} brings the model {path[-1]} and cannot be found: pip install "
                         "-r requirements.txt")
    return os.path.join(spec.submodule_search_locations[0], *path)


def scene(defaults, body, actuators, tendons=""):
    """MJCF of a body above a chequered floor."""
    return (
        f'<mujoco><compiler angle="radian"/>{defaults}<asset><texture name="grid" type="2d" '
        'builtin="checker" width="300" height="300" rgb1=".2 .3 .4" rgb2=".3 .4 .5"/>'
        '<material name="grid" texture="grid" texrepeat="1 1" texuniform="true"/></asset>'
        '<worldbody><light directional="true" castshadow="false" pos="0 0 4" dir="0.3 0.5 -1"/>'
        f'<geom name="floor" type="plane" size="0 0 1" material="grid"/>{body}</worldbody>'
        f'<tendon>{tendons}</tendon><actuator>{actuators}</actuator></mujoco>')


# ------------------------------------------------------------------------------------------ anymal
def anymal_xml():
    """A quadruped with ANYmal C's joint positions, link masses (53.1 kg) and contact shapes.

    Springs pull every joint to 0 with 85 N m/rad, where the legs are straight."""
    legs = motors = ""
    for name, f, s in LEGS:
        legs += (
            f'<body pos="{.2999 * f} {.104 * s} 0"><joint name="{name}_HAA" axis="1 0 0"/>'
            f'<geom type="sphere" size=".05" pos="{.03 * f} {.03 * s} 0" mass="2.51"/>'
            f'<body pos="{.0599 * f} {.08381 * s} 0"><joint name="{name}_HFE" axis="0 1 0"/>'
            f'<geom type="capsule" size=".03" fromto="0 0 0 0 {.1003 * s} -.285" mass="1.5"/>'
            f'<geom type="capsule" size=".06" fromto="0 {-.01 * s} -.285 0 {.11 * s} -.285" '
            f'mass="1.77"/><body pos="0 {.1003 * s} -.285"><joint name="{name}_KFE" axis="0 1 0"/>'
            '<geom type="capsule" size=".015" fromto="0 0 0 '
            f'{.08795 * f} {.01305 * s} -.3155" mass=".4"/>'
            f'<geom type="sphere" size=".03" pos="{.08795 * f} {.01305 * s} -.3155" mass=".15"/>'
            '</body></body></body>')
        for joint in ("HAA", "HFE", "KFE"):
            motors += f'<motor joint="{name}_{joint}" gear="200" ctrlrange="-1 1"/>'
    return scene('<default><joint stiffness="85" damping="2" armature=".006"/>'
                 '<geom friction=".75"/></default>',
                 '<body name="torso" pos="0 0 .55"><freejoint/><geom type="capsule" size=".1" '
                 f'fromto="-.275 0 0 .275 0 0" mass="27.8"/>{legs}</body>', motors)


# --------------------------------------------------------------------------------- muscle humanoid
# name, force in newtons: way-points in metres (x forward, outward, up) on pelvis P, femur F, tibia
# T and ankle A
MUSCLES = """gluteus_max 1853: P -.09 .04 .97; P -.09 .10 .90; F -.005 .135 .80
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
peronei 1049: T -.03 .125 .44; T -.06 .105 .085; A -.01 .115 .025"""
ORIGIN = {  # of a part's frame in the rest pose, metres
    "P": (-.031, 0, .981), "F": (-.012, .09, .934), "T": (-.01, .1, .539), "A": (-.042, .08, .078),
    "toe1": (.069, .078, .02), "toe2": (.049, .123, .014)}
BOX = {  # size (m), mass (kg), centre in the rest pose (m)
    "P": (.129, .208, .145, 15, -.031, 0, .981), "F": (.14, .127, .404, 7, -.023, .096, .724),
    "T": (.114, .12, .416, 3, -.034, .093, .302), "A": (.157, .076, .05, .6, -.024, .083, .04),
    "toe1": (.056, .041, .026, .2, .094, .077, .027),
    "toe2": (.056, .041, .026, .2, .081, .124, .027)}
JOINT = {"F": 'type="ball" range="0 2"', "T": 'axis="0 1 0" range="0 2.3"',
         "A": 'type="ball" range="0 1"', "toe1": 'axis="0 1 0" range="-.6 .6"',
         "toe2": 'axis="0 1 0" range="-.6 .6"'}


def muscle_xml():
    """Pelvis and two legs (37 kg) pulled by 152 muscles: 19 groups x 4 fascicles per leg.

    Each is a straight tendon over way-points with the tension activation x 0.36 x F0 / 4."""
    sites, tendons, motors, legs = {}, "", "", ""
    for side, s in SIDES:
        for line in MUSCLES.splitlines():
            head, _, path = line.partition(":")
            name, force = head.split()
            points = [point.split() for point in path.split(";")]
            for k in range(FASCICLES):
                muscle = f"{side}_{name}_{k}"
                wrap = _fascicle(muscle, points, k, side, s, sites)
                tendons += f'<spatial name="{muscle}">{wrap}</spatial>'
                motors += (f'<general name="{muscle}" tendon="{muscle}" ctrlrange="0 1" '
                           f'gainprm="{-.36 * float(force) / 4}"/>')  # negative: it only pulls
    for side, s in SIDES:
        toes = (_part("toe1", "A", side, s, "", sites) + _part("toe2", "A", side, s, "", sites))
        shank = _part("T", "F", side, s, _part("A", "T", side, s, toes, sites), sites)
        legs += _part("F", "P", side, s, shank, sites)
    a, b, c = np.divide(BOX["P"][:3], 2)
    return scene('<default><geom friction=".5"/><site size=".005"/></default>',
                 '<body name="torso" pos="0 0 1"><freejoint/><geom type="box" '
                 f'size="{a} {b} {c}" mass="15"/>{sites["P"]}{legs}</body>', motors, tendons)


def _fascicle(muscle, points, k, side, s, sites):
    """Put the way-points of fascicle k into sites {part: xml} -> xml of the tendon's path."""
    wrap = ""
    for i, (part, *at) in enumerate(points):
        via = 0 < i < len(points) - 1  # the ends of a broad muscle lie further apart
        spread = (k - 1.5) * np.array([.003 if via else .006, .003, 0])
        x, o, z = np.array(at, float) + spread
        x, o, z = np.array([x, o, z]) - ORIGIN[part]
        body = part if part == "P" else side + part
        site = f'<site name="{muscle}_{i}" pos="{x} {s * o} {z}"/>'
        sites[body] = sites.get(body, "") + site
        wrap += f'<site site="{muscle}_{i}"/>'
    return wrap


def _part(part, parent, side, s, inner, sites):
    """xml of one part of a leg with what hangs on it."""
    ox, oo, oz = np.subtract(ORIGIN[part], ORIGIN[parent])
    a, b, c, mass, x, o, z = BOX[part]
    x, o, z = np.subtract((x, o, z), ORIGIN[part])
    return (f'<body name="{side}{part}" pos="{ox} {s * oo} {oz}"><joint {JOINT[part]} '
            f'limited="true" armature=".05" stiffness="{5 * (mass / 15) ** .5}" '
            f'damping="{2 + 10 * mass / 15}"/><geom type="box" size="{a / 2} {b / 2} {c / 2}" '
            f'pos="{x} {s * o} {z}" mass="{mass}"/>{sites.get(side + part, "")}{inner}</body>')


# ---------------------------------------------------------------------------------------- compiled
@functools.cache
def body_model(name):
    """The compiled MuJoCo model of hopper, ant, anymal, humanoid or muscle-humanoid.

    1/240 s, implicitfast, only the floor is touched. All but the hopper get 10 N m s/rad of damping
    in every joint on top of their own, as in PWM's simulator; the ant also has its torques
    (200 N m) and armature (0.05 kg m2), and a tenth of its weight."""
    import mujoco
    if name in ("hopper", "ant"):
        file = asset("gymnasium", "envs", "mujoco", "assets", f"{name}.xml")
        spec = mujoco.MjSpec.from_file(file)
    elif name == "humanoid":
        spec = mujoco.MjSpec.from_file(asset("dm_control", "suite", "humanoid.xml"))
        for motor in spec.actuators:
            motor.gear = motor.gear * 1.75  # 35, 70, 140 and 210 N m as in the reference
    else:
        spec = mujoco.MjSpec.from_string(anymal_xml() if name == "anymal" else muscle_xml())
    spec.option.timestep = 1 / 240
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # A row that breaks shall be seen, not reset: Body.advance looks for it.
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    for geom in spec.geoms:
        geom.contype, geom.conaffinity = int(geom.name == "floor"), 1
        if name == "ant":
            geom.density = 100  # kg/m3: 18 kg instead of the file's 0.9
    model = spec.compile()
    if name == "ant":
        model.actuator_gear[:, 0], model.dof_armature[6:] = 200, 0.05
    if name != "hopper":
        model.dof_damping[6:] += 10
    return model
