"""All tests: `python -m pytest -q -n 2 test_all.py`, in two processes of one thread each. They need no data, no GPU and
no network; some draw (EGL or OSMesa)."""
import ast
import contextlib
import copy
import dataclasses
import errno
import functools
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import gymnasium
import h5py
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.utils.env_checker import check_env

import data
import ed2
import envs
import mow
import pwm
import savi
from data import Episodes, Run, bootstrap_ci, convert_tdmpc2, iqm, safe_load
from envs import choose_gl

HERE = str(Path(__file__).resolve().parent)
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side: more threads than cores are slower than one each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
with contextlib.suppress(SystemExit):  # without OpenGL only the tests that draw fail
    choose_gl()  # now, because mujoco looks at the choice once, when it is imported

def says(*words):
    """A SystemExit of one line that contains all words."""
    class Check:
        def __enter__(self):
            return self

        def __exit__(self, kind, e, tb):
            assert kind is SystemExit, f"expected SystemExit, got {kind}: {e}"
            text = str(e)
            assert "\n" not in text and len(text) > 30, text
            assert all(w in text for w in words), text
            return True
    return Check()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)
