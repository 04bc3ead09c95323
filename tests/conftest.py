"""Every test runs on eight fake CPU devices, with JAX's strict modes on.

The environment is set before JAX is imported, and so reaches the processes that tests start; the
modes and the compile cache hold in this process alone.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile more than they compute.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# libtpu, which compiles for a TPU that is not there, else lets in one process at a time.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
# No test may lean on data sets that someone happens to have prepared.
os.environ["TFDS_DATA_DIR"] = os.devnull

import collections  # noqa: E402
import pathlib  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        metavar="N",
        help="At most N cases of each parametrised test, evenly spread; 0: all. Without it 2, but "
        "all of the tests that are marked every_case.",
    )
    parser.addoption(
        "--part",
        default="0/1",
        metavar="I/K",
        help="Each Kth of the tests alone, whatever its cases; I of 0, 1, 2 ... says which ones.",
    )


@pytest.hookimpl(trylast=True)  # behind -m and -k
def pytest_collection_modifyitems(config, items):
    """Leaves out what `--part` and `--cases` say, of the tests that -m and -k left."""
    most = config.getoption("--cases")
    if most is not None and most < 0:
        raise pytest.UsageError(f"--cases={most}: must be at least 0, which is all")
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for of_one in part(list(cases.values()), config.getoption("--part")):
        every = most is None and of_one[0].get_closest_marker("every_case")
        kept.update(of_one if every else spread(of_one, 2 if most is None else most))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def part(tests: list, text: str) -> list:
    """Those that 'I/K' names: each Kth, from I mod K on."""
    match = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if not match:
        raise pytest.UsageError(f"--part={text}: must be I/K, two whole numbers, K at least 1")
    index, parts = map(int, match.groups())
    return tests[index % parts :: parts]


def spread(cases: list, most: int) -> list:
    """At most so many of them, the first and the last among these; 0: all."""
    if not most or len(cases) <= most:
        return cases
    return [cases[round(i * (len(cases) - 1) / max(most - 1, 1))] for i in range(most)]


def pytest_configure(config):
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Shared by the xdist workers and by later runs. Never through the environment: a process that a
    # test kills would leave cut-off entries behind.
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def tpu(monkeypatch):
    """A TPU v5e core that is not there, to compile for."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }.items():
        monkeypatch.setenv(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1").devices[0]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python -m efficient_nets.main` in this process: `status, stdout, stderr`."""
    from absl import flags

    from efficient_nets import main as program

    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)

    def run(*arguments):
        argv = ["main", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)  # where the config flag looks for its overrides
        own = ("config", "workdir", "mode", "checkpoint", "step", "reference", "threshold", "input")
        for name in (*own, "distributed"):
            flags.FLAGS[name].unparse()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        status = 0
        try:
            program.main(program.parse(argv))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run
