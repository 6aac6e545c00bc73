from t_head import *  # noqa: F401,F403

# ---------------------------------------------------------------------------------------- the repository as a whole
SCRIPTS = {"pwm": pwm, "ed2": ed2, "mow": mow, "savi": savi}
SHARED = (
    "symlog",
    "symexp",
    "two_hot_loss",
    "two_hot_inv",
    "unimix",
    "kl",
)  # functions that scripts repeat
OWN = {
    "Args",
    "main",
    "train",
    "evaluate",
    "report",
    "announce",
    "check_args",
    "fill_args",
    "plot",
    "check",
    "WorldModel",
    "world_model_loss",
    "imagine",
    "lambda_return",
    "Actor",
    "act",
    "Agent",
    "Stacked",
    "descend",
    "StackedMLP",
    "simnorm",
    "task_list",
}  # same word, each paper's own


def source_of(path):
    return Path(HERE, path).read_text()


def definitions(path):
    """{name: source} of the functions and classes at the top level of a file."""
    text = source_of(path)
    return {
        n.name: ast.get_source_segment(text, n)
        for n in ast.parse(text).body
        if isinstance(n, ast.FunctionDef | ast.ClassDef)
    }


def imports(path):
    found = set()
    for n in ast.walk(ast.parse(source_of(path))):
        if isinstance(n, ast.Import):
            found |= {a.name.split(".")[0] for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            found.add((n.module or "").split(".")[0])
    return found


def test_repeated_functions_are_the_same_word_for_word():
    files = {name: definitions(f"{name}.py") for name in SCRIPTS}
    names = [n for defs in files.values() for n in defs]
    for name in {n for n in names if names.count(n) > 1}:
        texts = {defs[name] for defs in files.values() if name in defs}
        assert len(texts) == 1 or name in OWN, f"{name} means different things in different scripts"
    assert all(names.count(n) >= 2 for n in SHARED)


@pytest.mark.parametrize("name", [*SCRIPTS, "envs", "data"])
def test_a_top_level_file_reads_no_script_and_no_study(name):
    assert not imports(f"{name}.py") & {*SCRIPTS, "studies"}
    assert not (name == "envs" and "data" in imports("envs.py"))
    wide = [i for i, x in enumerate(source_of(f"{name}.py").splitlines(), 1) if len(x) > 100]
    assert not wide, wide


def shell_lines(text):
    """Commands of a Markdown text: lines of bash blocks, and `python ..` in tables."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [x.split("#")[0].strip() for b in blocks for x in b.splitlines()]
    lines += re.findall(r"\| `((?:python|torchrun)[^`]*)` \|", text)
    return [part.strip() for x in lines for part in x.split("&&") if part.strip()]


def args_of(command):
    """The Args that a documented command means; SystemExit or ImportError if it does not parse."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        module, rest = words[2], words[3:]
    else:
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        module, rest = words[at][:-3], words[at + 1 :]
    args = importlib.import_module(module).Args
    return tyro.cli(args, args=rest)


def documented():
    return [
        c
        for file in ("README.md", "results/README.md")
        for c in shell_lines(source_of(file))
        if re.match(r"(python|torchrun).*(\b(pwm|ed2|mow|savi)\.py|-m studies\.)", c)
    ]


def test_documented_commands_parse_and_files_exist():
    commands = documented()
    assert len(commands) > 30
    for command in commands:
        args_of(command)
    for file, folder in (("README.md", HERE), ("results/README.md", f"{HERE}/results")):
        for link in re.findall(r"\]\(([^)#]+)\)", source_of(file)):
            assert link.startswith("http") or Path(folder, link).exists(), (file, link)
        for raw in set(re.findall(r"results/[\w./-]+\w", source_of(file))):
            assert Path(HERE, raw).exists(), (file, raw)


def test_every_raw_file_is_named_in_the_gallery():
    text = source_of("results/README.md")
    files = [
        p.name
        for p in Path(HERE, "results").iterdir()
        if p.name not in ("README.md", "golden.json")
    ]
    assert not [f for f in files if f not in text]


@pytest.mark.parametrize("name", SCRIPTS)
def test_old_commands_name_the_new_one(name, monkeypatch):
    script = SCRIPTS[name]
    assert script.MOVED
    for old, new in script.MOVED.items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *old.split()])
        with says(new):
            data.parse(script.Args, script.__doc__, script.MOVED)
        for command in re.findall(r"(?:python \w+\.py|python -m studies\.\w+)[^`;,]*", new):
            args_of(command.strip())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_doc_and_is_read(name):
    script = SCRIPTS[name]
    flags = [f.name for f in dataclasses.fields(script.Args)]
    assert len(flags) <= 35
    text = tyro.extras.get_parser(script.Args).format_help()
    assert all(data.flag(f) in text for f in flags)
    body = source_of(f"{name}.py") + source_of("data.py")
    assert not [
        f for f in flags if not re.search(rf"\.{f}\b|[\"' ]{f}[\"' ]", body.split("\nclass ", 1)[1])
    ]


def test_requirements_are_what_is_installed():
    for line in source_of("requirements.txt").splitlines():
        if match := re.match(r"([\w-]+)==([\w.]+)$", line):
            assert importlib.metadata.version(match[1]).split("+")[0] == match[2], line


def test_the_studies_are_whole():
    """Each study has a command in its docstring, Args with --fast, a main, and at most 450 lines."""
    for file in sorted(Path(HERE, "studies").glob("*.py")):
        if file.stem in ("common", "golden") or file.stem.startswith(("test_", "t_")):
            continue
        text = file.read_text()
        assert len(text.splitlines()) <= 450 and max(map(len, text.splitlines())) <= 100, file.name
        if "__main__" in text:
            assert f"python -m studies.{file.stem}" in text and "def main(" in text, file.name
