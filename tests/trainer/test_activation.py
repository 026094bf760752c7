"""Each way to switch the package on, on scripts that know nothing of it, and the script's own life under the runner.

The runner's mechanics are compared with plain `python` on scripts that import nothing slow; what trains is grouped
into as few processes as possible, since each spends some ten seconds on imports.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chronicals_trl import cli

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
RANKS = ROOT / "tests" / "distributed" / "cpu_ranks"  # gloo aborts a rank now and then that ends as any process does
COMMON = [
    "--use_cpu", "--bf16", "False", "--report_to", "none", "--max_steps", "2", "--logging_steps", "1",
    "--per_device_train_batch_size", "2", "--max_length", "32", "--save_strategy", "no", "--disable_tqdm", "True",
]  # fmt: skip


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with this Python's scripts first on PATH and the checkout importable, as `pip install -e` makes it."""
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=150)


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, *arguments], cwd, **environment)


def both(cwd: Path, *arguments: str, **environment: str) -> tuple[Any, Any]:
    """The same script under plain Python and under the runner."""
    return python(*arguments, cwd=cwd, **environment), python(
        "-m", "chronicals_trl", *arguments, cwd=cwd, **environment
    )


def facts(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"facts_{rank}.json").read_text())


def check(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


# -- the script's own life --

SHOW = """
import json, pickle, sys
import sibling
main = sys.modules["__main__"]
class Mine:
    pass
print(json.dumps({
    "argv": sys.argv, "path0": sys.path[0], "name": __name__, "file": __file__, "package": __package__,
    "spec": __spec__ and __spec__.name, "loader": type(__loader__).__name__, "main": main.__dict__ is globals(),
    "pickled": type(pickle.loads(pickle.dumps(Mine()))) is Mine, "cached": __cached__, "doc": __doc__,
    "keys": sorted(k for k in globals() if k.startswith("__")),
    "torch": "torch" in sys.modules, "trl": "trl" in sys.modules,
}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a script, a package, and a link to the script from elsewhere."""
    for folder in ("app", "app/pkg", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "app/sibling.py").write_text("")
    (tmp_path / "app/show.py").write_text(SHOW)
    (tmp_path / "elsewhere/link.py").symlink_to(tmp_path / "app/show.py")
    (tmp_path / "app/pkg/__init__.py").write_text("")
    (tmp_path / "app/pkg/show.py").write_text(SHOW)
    (tmp_path / "app/pkg/__main__.py").write_text("import sys\nprint(sys.argv, __package__, __spec__.name)")
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [["app/show.py", "--x", "1", "-m"], ["elsewhere/link.py"], ["app/../app/show.py"], ["./app/show.py"]]
)
def test_script_finds_what_python_would_give_it(project: Path, arguments: list[str]) -> None:
    plain, ours = both(project, *arguments)
    expected, found = json.loads(check(plain)), json.loads(check(ours))
    # An annotations dict of a module without annotations is made by the interpreter for its own __main__ alone.
    expected["keys"] = [key for key in expected["keys"] if key != "__annotations__"]
    assert found == expected
    assert found["torch"] is False  # variables that the script sets above its imports must still count


def test_module_finds_what_python_would_give_it(project: Path) -> None:
    plain, ours = both(project / "app", "-m", "pkg.show", "--x", "1")
    expected, found = json.loads(check(plain)), json.loads(check(ours))
    assert found["spec"] == "pkg.show"
    expected["keys"] = [key for key in expected["keys"] if key != "__annotations__"]
    assert found == expected


def test_package_runs_its_main(project: Path) -> None:
    plain, ours = both(project / "app", "-m", "pkg", "a")
    assert check(ours) == check(plain)


FAILING = {
    "exception": "import sibling\ndef f():\n    raise ValueError('boom')\nf()\n",
    "chained": "def f():\n    try:\n        1 / 0\n    except Exception as e:\n        raise KeyError from e\nf()",
    "syntax": "x = 1\ny = = 2\n",
    "exit_int": "import sys\nsys.exit(7)",
    "exit_text": "raise SystemExit('went wrong')",
    "exit_none": "raise SystemExit",
    "exit_hook": "import atexit\nx = 'alive'\natexit.register(lambda: print(x))\nraise SystemExit(3)",
    "own_hook": "import sys\nsys.excepthook = lambda k, e, t: print('mine', k, t.tb_frame.f_code.co_name)\n1 / 0",
    "interrupt": "raise KeyboardInterrupt",
    "import_error": "import there_is_no_such_module",
}


@pytest.mark.parametrize("kind", FAILING)
def test_exit_code_output_and_traceback_are_the_scripts(project: Path, kind: str) -> None:
    (project / "app/fail.py").write_text(FAILING[kind])
    plain, ours = both(project, "app/fail.py")
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert (plain.returncode == 0) == (kind == "exit_none")


@pytest.mark.parametrize("module", ["pkg.fail", "pkg.nothing", "nothing", "empty", "broken.sub"])
def test_failing_modules(project: Path, module: str) -> None:
    (project / "app/pkg/fail.py").write_text(FAILING["exception"])
    (project / "app/empty").mkdir()
    (project / "app/empty/__init__.py").write_text("")
    (project / "app/broken").mkdir()
    (project / "app/broken/__init__.py").write_text("def f():\n    import there_is_no_such_module\nf()\n")
    plain, ours = both(project / "app", "-m", module)
    assert ours.returncode == plain.returncode == 1
    if "Traceback" in plain.stderr:
        # Python shows runpy's frames for a module; ours shows the user's alone.
        assert "runpy" not in ours.stderr
        assert "chronicals_trl" not in ours.stderr
        assert ours.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]
        frames = re.findall(r'File ".*/app/.*', ours.stderr)
        assert frames
        assert frames == re.findall(r'File ".*/app/.*', plain.stderr)
    else:
        # The wording around the name differs between Python versions; the name and the verdict do not.
        assert re.search(rf"No module named '?{re.escape(module)}", ours.stderr), ours.stderr


def test_interrupt_from_outside_ends_as_pythons_does(project: Path) -> None:
    (project / "app/wait.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    codes = []
    for prefix in ([], ["-m", "chronicals_trl"]):
        process = subprocess.Popen(
            [sys.executable, *prefix, "app/wait.py"],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs, a CI run among them, with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert "chronicals_trl" not in errors
        assert "KeyboardInterrupt" in errors
        codes.append(process.returncode)
    assert codes[0] == codes[1] == -signal.SIGINT


def test_missing_script(project: Path) -> None:
    plain, ours = both(project, "nowhere.py")
    assert ours.returncode == plain.returncode == 2
    assert ours.stderr == plain.stderr


def test_a_command_in_the_place_of_a_script(project: Path) -> None:
    """The console script's words are not files; one that is a file is run."""
    done = python("-m", "chronicals_trl", "doctor", "--model", "my model", cwd=project)
    assert done.returncode == 2 and "can't open file" in done.stderr
    assert "chronicals-trl doctor --model 'my model'" in done.stderr
    (project / "doctor").write_text("print('a file')")
    assert check(python("-m", "chronicals_trl", "doctor", cwd=project)) == "a file\n"


def test_the_commands_are_those_of_the_console_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["nonsense"])
    _, _, known = capsys.readouterr().err.partition("choose from")  # as argparse knows them
    assert re.findall(r"\w+", known) == list(cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code", "where", "words"),
    [
        ([], 2, "stderr", "usage: python -m chronicals_trl"),
        (["--help"], 0, "stdout", "usage: python -m chronicals_trl"),
        (["--version"], 0, "stdout", "0."),
        (["-m"], 2, "stderr", "Argument expected"),
        (["--wrong"], 2, "stderr", "--wrong"),
    ],
)
def test_runner_without_a_script(tmp_path: Path, arguments: list[str], code: int, where: str, words: str) -> None:
    done = python("-m", "chronicals_trl", *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert words in getattr(done, where)


def test_a_misspelt_variable_stops_the_runner(project: Path) -> None:
    done = python("-m", "chronicals_trl", "app/show.py", cwd=project, CHRONICALS_USE_CHRONICAL="1")
    assert done.returncode == 2 and done.stdout == ""
    assert "Did you mean 'CHRONICALS_USE_CHRONICALS'?" in done.stderr and "Traceback" not in done.stderr


def test_safe_path_keeps_the_folder_out(project: Path) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("-P came with Python 3.11")
    (project / "app/path.py").write_text("import sys\nprint(sys.path)")
    plain, ours = both(project, "app/path.py", PYTHONSAFEPATH="1")
    assert check(ours) == check(plain)


def test_spawned_processes_find_the_scripts_classes(project: Path) -> None:
    (project / "app/spawn.py").write_text(
        "import multiprocessing as mp\n"
        "class Job:\n    def __call__(self, x): return x + 1\n"
        "def run(job): return job(1)\n"
        "if __name__ == '__main__':\n"
        "    with mp.get_context('spawn').Pool(1) as pool: print(pool.map(run, [Job()]))\n"
    )
    (project / "app/pkg/spawn.py").write_text((project / "app/spawn.py").read_text())
    assert check(python("-m", "chronicals_trl", "app/spawn.py", cwd=project)) == "[2]\n"
    assert check(python("-m", "chronicals_trl", "-m", "pkg.spawn", cwd=project / "app")) == "[2]\n"


# -- every import order, and training --


def test_every_import_order(tmp_path: Path) -> None:
    assert "failed: []" in check(python(str(SCRIPTS / "import_orders.py"), cwd=tmp_path))


def test_flag_off_is_stock_to_the_bit(tmp_path: Path) -> None:
    # Both write to one folder, one after the other: nothing but the runner differs between the two.
    arguments = [str(SCRIPTS / "plain.py"), *COMMON, "--output_dir", str(tmp_path / "out")]
    check(python(*arguments, cwd=tmp_path))
    stock = facts(tmp_path / "out")
    output = check(python("-m", "chronicals_trl", *arguments, cwd=tmp_path))
    off = facts(tmp_path / "out")
    assert "use_chronicals=False" in output
    assert stock["trainer"] == "trl.trainer.sft_trainer.SFTTrainer"
    assert off["trainer"] == "chronicals_trl.trainer.SFTTrainer"
    assert off["on"] == []
    assert len(off["losses"]) == 2
    assert (off["losses"], off["weights"], off["argv"]) == (stock["losses"], stock["weights"], stock["argv"])


def test_accelerate_launch_with_yaml_and_json(tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        f"output_dir: {tmp_path / 'out'}\nuse_cpu: true\nbf16: false\nreport_to: none\nmax_steps: 2\n"
        "logging_steps: 1\nper_device_train_batch_size: 1\nmax_length: 32\npacking: true\n"
        "save_strategy: 'no'\ndisable_tqdm: true\n"
        "chronicals_config: {qk_rope: off}\n"
    )
    script = str(SCRIPTS / "plain.py")
    arguments = [script, "--config", str(config), "--use_chronicals", "True"]
    done = run(["accelerate", "launch", "--cpu", "-m", "chronicals_trl", *arguments], tmp_path)
    output = check(done)
    found = facts(tmp_path / "out")
    assert found["trainer"] == "chronicals_trl.trainer.SFTTrainer"
    assert found["config"] == "chronicals_trl.config.SFTConfig"
    assert found["main_file"] == script
    assert found["argv"] == arguments
    assert found["saved_args"] is True
    assert {"packing", "rms_norm", "head"} <= set(found["on"])
    assert "qk_rope" not in found["on"]
    assert len(found["losses"]) == 2
    assert "rms_norm" in output
    report = json.loads((tmp_path / "out/chronicals_report.json").read_text())
    assert {part["name"] for part in report["parts"] if part["state"] == "on"} == set(found["on"])


def test_package_module_with_spawned_workers_and_environment_flag(tmp_path: Path) -> None:
    arguments = ["-m", "pkg.train", *COMMON, "--output_dir", str(tmp_path), "--dataloader_num_workers", "1"]
    settings = {"CHRONICALS_USE_CHRONICALS": "1", "CHRONICALS_QK_ROPE": "off"}
    check(python("-m", "chronicals_trl", *arguments, cwd=SCRIPTS, PYTHONDONTWRITEBYTECODE="1", **settings))
    found = facts(tmp_path)
    assert found["trainer"] == "__main__.MyTrainer"
    assert found["main_file"] == str(SCRIPTS / "pkg/train.py")
    assert "rms_norm" in found["on"]
    assert "qk_rope" not in found["on"]
    assert found["saved_args"] is True


def test_torchrun_with_two_processes(tmp_path: Path) -> None:
    launch = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "chronicals_trl"]
    arguments = [*COMMON, "--output_dir", str(tmp_path), "--use_chronicals", "--packing"]
    path = os.pathsep.join([str(RANKS), str(ROOT)])
    check(run([*launch, str(SCRIPTS / "plain.py"), *arguments], tmp_path, PYTHONPATH=path))
    found = [facts(tmp_path, rank) for rank in (0, 1)]
    assert [one["world_size"] for one in found] == [2, 2]
    assert found[0]["weights"] == found[1]["weights"]
    assert found[0]["on"] == found[1]["on"]
    assert "packing" in found[0]["on"]


def test_chronicals_trl_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tiny

    tokenizer = tiny.tokenizer()
    tiny.model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    tiny.dataset().to_json(tmp_path / "data/train.jsonl")
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndataset_name: {tmp_path / 'data'}\nuse_cpu: true\nbf16: false\n"
        f"report_to: none\nmax_steps: 2\nmax_length: 32\noutput_dir: {tmp_path / 'out'}\nnum_processes: 1\n"
    )
    command = [sys.executable, "-c", "import sys; from chronicals_trl.cli import main; sys.exit(main())", "sft"]
    done = run(
        [*command, "--config", str(config), "--cpu", "--packing", "True", "--learning_rate", "1e-3"],
        tmp_path,
        HF_HOME=str(tmp_path / "hub"),
    )
    check(done)
    report = json.loads((tmp_path / "out/chronicals_report.json").read_text())
    assert {"packing", "rms_norm"} <= {part["name"] for part in report["parts"] if part["state"] == "on"}
    import torch

    saved = torch.load(tmp_path / "out/training_args.bin", weights_only=False)
    assert (saved.use_chronicals, saved.packing, saved.learning_rate) == (True, True, 1e-3)


def test_a_misspelt_argument_of_sft_takes_one_line(tmp_path: Path) -> None:
    """In place of Accelerate's usage, of more than a hundred lines."""
    (tmp_path / "sft.yaml").write_text("use_cronicals: true\n")
    cases = {
        "--use_cronicals (did you mean --use_chronicals?)": ["--use_cronicals", "True"],
        "--chronical-config (did you mean --chronicals_config?)": ["--chronical-config={}"],
        "--num-proceses (did you mean --num_processes?), --pakcing (did you mean --packing?)": [
            "--num_processes", "1", "--num-proceses", "2", "--pakcing",
        ],
        "--use_cronicals (did you mean --use_chronicals?)\n": ["--config", "sft.yaml"],
    }  # fmt: skip
    common = ["--output_dir", "out", "--model_name_or_path", "model", "--use_cpu", "True", "--bf16", "False"]
    program = (
        "import json, sys\nfrom chronicals_trl.cli import main\n"
        "for arguments in json.loads(sys.argv[1]): print(main(['sft', *arguments]))"
    )
    done = python("-c", program, json.dumps([[*common, *case] for case in cases.values()]), cwd=tmp_path)
    assert check(done).split()[:4] == ["2"] * 4
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    start = "chronicals-trl sft: error: neither TRL nor Accelerate knows "
    assert errors == [f"{start}{words.strip()}." for words in cases]
    assert "usage:" not in done.stderr


def test_what_is_near_to_no_argument_or_known_to_accelerate_passes() -> None:
    known = {"--use_chronicals", "--use-chronicals", "--num_processes", "--num-processes", "--main_process_port"}
    for words in (["--num_processes", "2"], ["--num-processes=2"], ["--quite_else", "use_cronicals"], ["-m", "x"]):
        assert cli._near_misses(words, known) == {}
