"""How every verb ends, and its errors about arguments."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import small

import embed
from embed import cli

ROOT = Path(__file__).parents[2]
VERBS = list(cli.verbs())


def run_program(program, *arguments, **environment):
    """Run a Python program in its own process."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/tests/training"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# --- arguments ------------------------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """The error of a refused command, one sentence."""
    assert cli.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_the_nearest_option_to_an_unknown_one_before_missing_ones(verb, capsys):
    known = {"plan": "--topology", "evaluate": "--output", "report": "--output", "serve": "--model"}.get(
        verb, "--workdir"
    )
    known = (
        "--output"
        if verb in ("encode", "index", "judge", "mine", "merge", "synthesize")
        else "--query"
        if verb in ("explain", "search")
        else known
    )
    mistyped = known[:-2] + known[:-3:-1]
    message = refused(capsys, verb, f"{mistyped}=x")
    assert message == f"embed: error: embed {verb}: unknown argument '{mistyped}'; did you mean '{known}'?"


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_accepts_abbreviated_options(verb, capsys):
    assert "unknown argument '--mod'" in refused(capsys, verb, "--mod=x")
    sentence = refused(capsys, verb, "--help=x")  # argparse's own errors are one sentence too
    assert sentence.startswith(f"embed: error: embed {verb}: argument -h/--help: ")


# The required arguments of each verb, all of which name a path or a text.
REQUIRED = {
    "ablate": ["--config=c.py", "--workdir=w"],
    "encode": ["--model=m", "--corpus=c", "--output=o"],
    "evaluate": ["--model=m", "--data=d", "--output=o"],
    "explain": ["--model=m", "--query=q", "--file=c"],
    "export": ["--model=m", "--output=o"],
    "index": ["--model=m", "--corpus=c", "--output=o"],
    "judge": ["--log=l", "--output=o"],
    "merge": ["--a=a", "--b=b", "--output=o"],
    "mine": ["--model=m", "--data=d", "--output=o"],
    "pipeline": ["--config=c.py", "--workdir=w"],
    "plan": ["--config=c.py", "--topology=t"],
    "prepare": ["--config=c.py", "--workdir=w"],
    "report": ["r", "--output=o"],
    "sample": ["--config=c.py", "--workdir=w", "--text=t", "--checkpoint=c"],
    "search": ["--model=m", "--index=i", "--query=q"],
    "serve": ["--model=m"],
    "synthesize": ["--corpus=c", "--output=o", "--base_url=http://h/v1", "--model=n"],
    "train": ["--config=c.py", "--workdir=w"],
}
assert list(REQUIRED) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_accepts_an_empty_value(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = REQUIRED[verb]
    for i, argument in enumerate(given):
        name, _, value = argument.partition("=")
        if not value:  # no option
            continue
        for empty in ("", " "):
            message = refused(capsys, verb, *given[:i], f"{name}={empty}", *given[i + 1 :])
            expected = (
                "is blank: expected a text" if (verb, name) == ("search", "--query") else "is empty: expected a value"
            )
            assert f"{name}={empty!r} {expected}" in message or f"{name}={empty} {expected}" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("plan", "sample")])
@pytest.mark.parametrize("url", ["https://huggingface.co/owner/name", "http://x/y", "file:///x", "abc://x"])
def test_a_path_that_is_a_url_outside_of_buckets_is_refused(verb, url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = small.write_model(tmp_path / "model")
    (tmp_path / "c").write_text('{"_id": "a", "text": "the"}\n')
    (tmp_path / "c.py").write_text(small.GRAPH)
    given = [a.replace("=m", f"={model}").replace("=a", f"={model}").replace("=b", f"={model}") for a in REQUIRED[verb]]
    for i, argument in enumerate(given):
        name = argument.partition("=")[0]
        is_name = name in ("--query", "--config", "--base_url") or (verb, name) == ("synthesize", "--model")
        if name == "r":  # no option
            assert f"{url} is not a path" in refused(capsys, verb, url, *given[1:])
        elif not is_name and (verb, name) != ("search", "--model"):  # which reads the index first
            message = refused(capsys, verb, *given[:i], f"{name}={url}", *given[i + 1 :])
            assert f"{url} is not a path: expected a local path, gs://BUCKET/… or s3://BUCKET/…" in message, name
            assert message.endswith("; the hub id of this model is owner/name") == ("huggingface" in url)


@pytest.mark.parametrize("verb, option", [("mine", "margin"), ("merge", "ratio"), ("plan", "mfu")])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "many"])
def test_a_number_that_is_not_finite_is_refused(verb, option, value, capsys):
    message = refused(capsys, verb, *REQUIRED[verb], f"--{option}={value}")
    assert f"argument --{option}: '{value}' is not a finite number" in message


def test_a_name_that_is_too_long_for_a_file_is_one_sentence(tmp_path, capsys):
    model = small.write_model(tmp_path / "model")
    for argument in ("--model", "--corpus", "--output"):
        given = {"--model": str(model), "--corpus": str(tmp_path / "c"), "--output": str(tmp_path / "o")}
        given[argument] = str(tmp_path / ("n" * 300))
        message = refused(capsys, "index", *(f"{name}={value}" for name, value in given.items()))
        assert "Errno" not in message and ("no file " if argument == "--corpus" else "too long") in message, argument


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["encode", "--text", "--foo"], "; if it is the value of --text, write --text=--foo"),
        (["search", "--query", "--what is=it"], "; if it is the value of --query, write '--query=--what is=it'"),
        (["encode", "--overwrite", "--overwrit"], "; did you mean '--overwrite'?"),
        (["encode", "--color"], "unknown argument '--color'"),
        (["encode", "--version"], "unknown argument '--version'"),
        (["trian"], "; did you mean 'train'?"),
        (["--"], ", ".join(cli.verbs())),
        (["--frobnicate"], ", ".join(cli.verbs())),
    ],
)
def test_an_error_about_an_unknown_name_suggests_only_what_is_similar(arguments, hint, capsys):
    assert refused(capsys, *arguments).endswith(hint)


def test_the_program_prints_its_version_and_its_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"embed {embed.__version__}\n"
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["help"]) == 0 and capsys.readouterr().out == text and "embed VERB --help" in text


def test_the_program_runs_in_a_locale_without_utf8():
    done = run_program(
        "from embed.cli import entry; entry()", "--help", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"
    )
    assert done.returncode == 0 and "  train  " in done.stdout, done.stderr


def test_text_files_are_read_and_written_with_a_named_encoding():
    unnamed = []
    for file in [*ROOT.glob("embed/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            is_text = name in ("read_text", "write_text") or (name == "open" and {"r", "w", "a", "x"} & set(modes))
            if is_text and "encoding" not in [keyword.arg for keyword in node.keywords]:
                unnamed.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert unnamed == []


def test_a_bucket_without_credentials_is_one_sentence(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    clean = {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    program = "from embed.cli import entry; entry()"
    model = small.write_model(tmp_path / "model")
    done = run_program(program, "encode", f"--model={model}", "--corpus=s3://b/c", f"--output={tmp_path}/o", **clean)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line) == (1, "embed: error: the bucket cannot be used: Unable to locate credentials")


def test_arguments_that_are_not_options_are_refused(capsys):
    run = ["--config=configs/quickstart.py", "--workdir=x"]
    assert "unknown argument 'runs/a'; options are --name=value" in refused(capsys, "train", *run, "runs/a")
    assert "unknown argument '-x'" in refused(capsys, "train", *run, "-x")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["train"], "the following arguments are required: --config, --workdir"),
        (["train", "--config=nowhere.py", "--workdir=x"], "no file nowhere.py; searched in "),
        (["train", "--config=configs/quickstart.py", "--workdir=x", "--config.sead=1"], "did you mean 'seed'?"),
        (["train", "--config=configs/quickstart.py", "--workdir=x", "--config.seed", "1"], "unknown argument '1'"),
        (
            ["train", "--config=configs/quickstart.py", "--workdir=x", "--config.seed"],
            "have the form --config.key=value",
        ),
        (["search", "--model=m", "--query=q", "--corpus=c", "--config.seed=1"], "unknown argument '--config.seed'"),
        (["search", "--model=m", "--query=q", "--corpus=c", "--top=many"], "argument --top: invalid int value: 'many'"),
        (["trane"], "'trane' is not a verb: expected ablate, encode, "),
    ],
)
def test_wrong_arguments_end_in_one_sentence(arguments, sentence, capsys):
    assert sentence in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def get_config(arg=''):\n    return nothing\n", "line 2: NameError: name 'nothing' is not defined"),
        (
            "from configs import base\ndef get_config(arg=''):\n    return base.stage('pair', temprature=1)\n",
            "line 3: KeyError: ",
        ),
    ],
)
def test_an_error_about_a_config_file_names_its_line(tmp_path, text, sentence, capsys):
    (tmp_path / "mine.py").write_text(text)
    message = refused(capsys, "train", f"--config={tmp_path}/mine.py", "--workdir=x")
    assert f"config file {tmp_path}/mine.py, {sentence}" in message


# --- ~ --------------------------------------------------------------------------------------------------------------


def test_every_path_with_a_leading_tilde_is_in_the_home_folder(tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "graph.py").write_text(small.GRAPH.replace("curriculum=((6,", "curriculum=((1,"))
    small.write_data("~/data")
    run = ["--config=~/graph.py:diffusion", "--workdir=~/run", "--config.data.directory=~/data"]
    model = small.write_model("~/model")
    assert cli.main(["train", *run]) == 0
    (home / "texts.jsonl").write_text('{"_id": "a", "text": "parse the file"}\n')
    assert cli.main(["export", "--model=~/run/diffusion", "--output=~/exported"]) == 0
    assert cli.main(["encode", "--model=~/exported", "--corpus=~/texts.jsonl", "--output=~/vectors.npy"]) == 0
    assert cli.main(["index", f"--model={model}", "--corpus=~/texts.jsonl", "--output=~/index"]) == 0
    assert cli.main(["search", "--model=~/model", "--index=~/index", "--query=file"]) == 0
    assert cli.main(["evaluate", "--model=~/model", "--data=~/data/evaluation/set/test", "--output=~/figures"]) == 0
    assert (
        cli.main(["merge", "--a=~/model", "--b=~/run/diffusion", "--output=~/merged"]) == 2
    )  # different model settings
    assert not list(here.iterdir())
    assert {"run", "exported", "vectors.npy", "index", "figures"} <= {entry.name for entry in home.iterdir()}
    assert "~" not in {entry.name for entry in home.iterdir()}


# --- the end of a process -------------------------------------------------------------------------------------------

HANGING = """
import sys, threading
from embed.cli.common import end, keeps_work, run

def main(argv):
    threading.Thread(target=threading.Event().wait).start()  # not a daemon: the interpreter would wait for it
    print("done")
    {ending}

end(run, main)
"""


@pytest.mark.parametrize(
    "ending, code, message",
    [
        ("return 0", 0, ""),
        ("return 1", 1, ""),
        ("raise ValueError('wrong')", 2, "embed: error: wrong\n"),
        ("raise OSError(28, 'No space left on device')", 1, "embed: error: [Errno 28] No space left on device\n"),
        ("raise KeyboardInterrupt", 130, "embed: interrupted\n"),
        (
            "with keeps_work(): raise KeyboardInterrupt",
            130,
            "embed: interrupted; completed work is kept, and the same command does the rest\n",
        ),
        ("raise SystemExit(0)", 0, ""),
        ("raise RuntimeError('a fault of ours')", 1, "RuntimeError: a fault of ours\n"),
    ],
)
def test_a_process_ends_with_its_code_even_if_a_thread_hangs(ending, code, message):
    done = run_program(HANGING.format(ending=ending))
    assert (done.returncode, done.stdout) == (code, "done\n") and done.stderr.endswith(message)


def test_exit_functions_of_libraries_run_until_one_hangs():
    program = """
import atexit, threading
from embed.cli import common
common.LAST_SECONDS = 0.1
atexit.register(threading.Event().wait)
atexit.register(print, "cleaned up")
common.end(lambda: 3)
"""
    done = run_program(program)
    assert (done.returncode, done.stdout) == (3, "cleaned up\n")


FAILING_COMMIT = """
import sys, threading
from pathlib import Path
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import atomicity
from embed.cli.common import end, run
from small_run import train

async def finalize(self, *arguments, **keywords):
    threading.Thread(target=threading.Event().wait).start()
    raise FileNotFoundError("another process removed it")
atomicity.AtomicRenameTemporaryPath.finalize = finalize
end(run, lambda argv: train(Path(sys.argv[1])) and 0)
"""


def test_a_run_whose_commit_of_a_checkpoint_fails_ends_with_code_1(tmp_path):
    done = run_program(FAILING_COMMIT, tmp_path / "run")
    assert done.returncode == 1, done.stderr[-2000:]
    assert "embed: error: cannot write a checkpoint under" in done.stderr


def test_only_verbs_that_continue_say_so_when_interrupted():
    text = {verb: (ROOT / "embed" / "cli" / f"{verb}.py").read_text() for verb in VERBS}
    assert [verb for verb in VERBS if "common.keeps_work()" in text[verb]] == [
        *("ablate", "encode", "evaluate", "pipeline", "prepare", "synthesize", "train")
    ]


def test_the_program_and_the_module_end_through_entry():
    setup = (ROOT / "setup.py").read_text()
    assert '"embed = embed.cli:entry"' in setup
    done = subprocess.run([sys.executable, "-m", "embed.cli", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout


# --- what libraries write to standard error -------------------------------------------------------------------------


def test_plan_prints_no_messages_of_libraries():
    """Without libtpu, which warns about missing chips, it names what is missing."""
    embed = "from embed.cli import entry; entry()"
    done = run_program(embed, "plan", "--help")
    assert done.returncode == 0 and not done.stderr
    if find_spec("libtpu"):
        pytest.skip("libtpu is installed: this would compile")
    done = run_program(embed, "plan", "--config=configs/quickstart.py:stage=pair", "--topology=v6e:2x2")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("embed: error: topology v6e:2x2: ")


def test_output_of_a_library_while_it_is_imported_is_dropped_unless_the_import_fails():
    program = """
import os, sys
from embed.console import quiet
with quiet():
    os.write(2, b"noise of C++\\n")
os.write(2, b"ours\\n")
try:
    with quiet():
        os.write(2, b"the reason\\n")
        raise ImportError
except ImportError:
    print("failed", file=sys.stderr)
"""
    assert run_program(program).stderr.splitlines() == ["ours", "the reason", "failed"]
