"""The launchers' shell logic, with stand-ins for Python, gcloud and nvidia-smi: no network needed.

Each test has a copy of launch/ and pyproject.toml in a folder with a space in its name, an empty
home, and a PATH that holds the few tools the scripts call and the Pythons the test puts there.
"""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOOLS = (
    "bash cat cp cut dirname flock grep ls mkdir mktemp readlink rm sed sha256sum sort tail touch"
).split()

# Answers what the launchers ask of a Python, and writes what it is told to do to $LOG.
PYTHON = """#!/usr/bin/env bash
version={version}
case "$*" in
  *"%d%03d%03d"*) printf '%d%03d%03d\\n' ${{version//./ }} ;;
  *"%d.%d"*) echo "${{version%.*}}" ;;
  -VV) echo "Python $version" ;;
  "-c import pip") ;;
  "-m venv --clear "*)
    folder="${{@: -1}}" && rm -rf "$folder" && mkdir -p "$folder/bin" && touch "$folder/pyvenv.cfg"
    cp "$0" "$folder/bin/python" ;;
  *) echo "$version:" "${{@@Q}}" >>"$LOG" ;;&
  *"pip install"*) echo "no space left" && exit "${{PIP_STATUS:-0}}" ;;
esac
"""
SHIM = "#!/usr/bin/env bash\necho 'pyenv: command not found' >&2; exit 127\n"


class Machine:
    """A folder with the project's launchers, and the machine they find themselves on."""

    def __init__(self, folder: pathlib.Path):
        self.root = folder / "the project"
        self.home = folder / "home"
        self.bin = folder / "bin"
        self.log = folder / "log"
        self.venv = self.root / ".venv"
        self.bin.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))

    def program(self, path: pathlib.Path | str, text: str) -> None:
        path = self.bin / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def python(self, path: pathlib.Path | str, version: str) -> None:
        self.program(path, PYTHON.format(version=version))

    def call(self, script: str, *args: str, cwd=None, **env) -> subprocess.CompletedProcess:
        env = dict(PATH=str(self.bin), HOME=str(self.home), LOG=str(self.log), **env)
        command = [self.bin / "bash", self.root / "launch" / script, *args]
        return subprocess.run(
            command, env=env, cwd=cwd or self.root, capture_output=True, text=True
        )

    def ran(self, script: str, *args: str, **env) -> list[str]:
        """Calls the script, which must succeed, and returns what the Python was told to do."""
        self.log.write_text("")
        result = self.call(script, *args, **env)
        assert result.returncode == 0, result.stderr
        return self.log.read_text().splitlines()

    def fails(self, script: str, *args: str, **env) -> str:
        """Calls the script, which must fail, and returns its message."""
        result = self.call(script, *args, **env)
        assert result.returncode != 0, result.stdout
        return result.stderr


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    machine.python("python3", "3.12.4")
    return machine


MAIN = "3.12.4: '-m' 'efficient_nets.main'"
PIP = "3.12.4: '-m' 'pip' 'install' '--progress-bar' 'off' '--disable-pip-version-check' '-e' '.%s'"


# Which Python


def test_newest_python_that_runs_is_chosen(machine):
    machine.python("python3.9", "3.9.1")
    machine.python("python3.11", "3.11.9")
    machine.program("python3.13", SHIM)
    assert machine.ran("local.sh")[-1] == MAIN

    shutil.rmtree(machine.venv)
    machine.python(machine.home / ".pyenv/versions/3.14.0/bin/python3.14", "3.14.0")
    assert machine.ran("local.sh")[-1].startswith("3.14.0: ")


def test_no_python_says_what_is_needed(machine):
    machine.program("python3", SHIM)
    message = machine.fails("local.sh")
    assert "no Python from 3.11" in message and "python3-venv" in message
    assert not machine.venv.exists()


def test_python_variable_is_used_or_refused(machine):
    machine.python("python3.11", "3.11.9")
    machine.program("python3.13", SHIM)
    for name in "python3.13", "python3.99":
        assert f"PYTHON={name} does not run" in machine.fails("local.sh", PYTHON=name)
    assert machine.ran("local.sh", PYTHON="python3.11")[-1].startswith("3.11.9: ")
    message = machine.fails("local.sh", PYTHON="python3")
    assert "holds Python 3.11, PYTHON=python3 is 3.12" in message


# What is installed, and when


def test_installs_once_and_passes_arguments_on(machine):
    first = machine.ran("local.sh", "--config=a b.py", "--config.x='q'", cwd="/")
    assert first == [PIP % "", MAIN + " '--config=a b.py' '--config.x='\\''q'\\'''"]
    assert machine.ran("local.sh", "--mode=eval") == [MAIN + " '--mode=eval'"]


def test_installs_again_when_the_project_changes(machine):
    machine.ran("local.sh")
    with open(machine.root / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert machine.ran("local.sh") == [PIP % "", MAIN]
    # Moved, the environment would still import the source from the old place.
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    assert machine.ran("local.sh") == [PIP % "", MAIN]
    assert machine.ran("local.sh") == [MAIN]


def test_extras_are_added_and_kept(machine):
    machine.ran("local.sh")
    assert machine.ran("test.sh", "-k", "x")[0] == PIP % "[test]"
    assert machine.ran("local.sh") == [MAIN]
    assert machine.ran("local.sh", EXTRAS="tpu,prepare")[0] == PIP % "[prepare,test,tpu]"
    assert machine.ran("local.sh", EXTRAS="") == [MAIN]


def test_gpu_brings_the_cuda_extra(machine):
    machine.program("nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: H200'\n")
    assert machine.ran("local.sh")[0] == PIP % "[cuda]"


def test_unknown_extra_is_refused(machine):
    message = machine.fails("local.sh", EXTRAS="test,cudda")
    assert "no extra 'cudda'" in message and "cuda, tpu, prepare, test" in message


def test_failed_installation_is_shown_and_repaired(machine):
    machine.ran("local.sh")
    message = machine.fails("local.sh", EXTRAS="test", PIP_STATUS="1")
    assert "no space left" in message and "installation failed" in message
    assert machine.ran("local.sh") == [PIP % "", MAIN]


def test_broken_environment_is_made_anew(machine):
    machine.ran("local.sh")
    (machine.venv / "bin" / "python").unlink()
    assert machine.ran("local.sh") == [PIP % "", MAIN]


def test_folder_that_is_no_environment_is_left_alone(machine):
    precious = machine.home / "thesis.tex"
    precious.parent.mkdir()
    precious.touch()
    assert "is no Python environment" in machine.fails("local.sh", VENV=str(machine.home))
    assert precious.exists()


def test_checks_come_before_the_tests(machine):
    steps = machine.ran("test.sh", "-m", "slow", VENV=".venv-other")
    assert [step.split("'")[3:-1:2] for step in steps[1:]] == [
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["pytest", "-n", "2", "-m", "slow"],
    ]
    assert (machine.root / ".venv-other").exists() and not machine.venv.exists()


# The machines that the tests have not: what would be run


def test_gpu_command(machine):
    assert "lists no GPU" in machine.fails("gpu.sh")
    result = machine.call(
        "gpu.sh", "--config=a.py", DRY_RUN="1", DETERMINISTIC="1", XLA_FLAGS="--x"
    )
    for part in (
        "JAX_PLATFORMS=cuda\\,cpu",
        "--xla_gpu_deterministic_ops=true\\ --x ",
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9",
        "EXTRAS=cuda",
        "local.sh --config=a.py",
    ):
        assert part in result.stdout


def test_slurm_command(machine):
    flags = "--config=a.py", "--workdir=/shared/run"
    assert "no Slurm job" in machine.fails("slurm.sbatch", *flags)
    assert "--workdir=... is missing" in machine.fails("slurm.sbatch", flags[0], DRY_RUN="1")
    message = machine.fails("slurm.sbatch", *flags, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR="/")
    assert "no launch/env.sh in /" in message
    uneven = dict(SLURM_JOB_ID="7", SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="8")
    assert "--ntasks-per-node=1 must equal" in machine.fails("slurm.sbatch", *flags, **uneven)

    # The job: installs once, in the batch script, and starts srun on the same environment.
    machine.program("srun", '#!/usr/bin/env bash\n"${@:3}"\n')
    job = dict(uneven, SLURM_NTASKS_PER_NODE="8", SLURM_SUBMIT_DIR=str(machine.root))
    assert machine.ran("slurm.sbatch", *flags, cwd="/", **job) == [
        PIP % "",
        MAIN + " '--distributed' '--config=a.py' '--workdir=/shared/run'",
    ]


def test_tpu_pod_command(machine):
    flags = "--config=a b.py", "--workdir=/shared/run"
    slice = dict(NAME="slice", ZONE="us-west4-a")
    assert "NAME is not set; usage: NAME=" in machine.fails("tpu_pod.sh", *flags, ZONE="z")
    assert "ZONE is not set; usage: NAME=" in machine.fails("tpu_pod.sh", *flags, NAME="n")
    assert "--config=... is missing" in machine.fails("tpu_pod.sh", flags[1], **slice)
    assert "no gcloud" in machine.fails("tpu_pod.sh", *flags, **slice)

    result = machine.call("tpu_pod.sh", *flags, DRY_RUN="1", PROJECT="p", **slice)
    copy, start = result.stdout.splitlines()[1:]
    assert "tpu-vm scp" in copy and "slice:efficient_nets.tar.gz" in copy
    for part in "tpu-vm ssh slice", "--zone=us-west4-a", "--worker=all", "--project=p":
        assert part in start


def test_tpu_pod_host_trains(machine, tmp_path):
    """What every host is told to do, done here: the copied source trains with the given flags."""
    for name in "README.md", "LICENSE":
        (machine.root / name).touch()
    for name in "efficient_nets", "configs":
        (machine.root / name).mkdir()
    for tool in "tar", "gzip":
        (machine.bin / tool).symlink_to(shutil.which(tool))
    host = tmp_path / "host"
    host.mkdir()
    machine.program(
        "gcloud",
        f"""#!/usr/bin/env bash
cd "{host}" && last="${{@: -1}}"
case "$4" in
  scp) cp "$5" "${{6#*:}}" ;;
  ssh) bash -c "${{last#--command=}}" ;;
esac
""",
    )
    steps = machine.ran("tpu_pod.sh", "--config=a b.py", "--workdir=w", NAME="n", ZONE="z")
    assert steps == [PIP % "[tpu]", MAIN + " '--distributed' '--config=a b.py' '--workdir=w'"]
    assert (host / "efficient_nets" / ".venv").exists()


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("launch/*.s*"), ROOT / ".ci" / "run"]), ids=str
)
def test_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.name == "env.sh" or os.access(script, os.X_OK)
