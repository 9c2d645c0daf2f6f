"""Gin files in, one checked job out; whatever is wrong is said in one sentence that names it and its place."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest

from lcjax import settings
from lcjax.configurables import CONFIGURABLES

sys.path.insert(0, str(Path(__file__).parent))
import toy

BASE = """
WIDTH = 64
toy.Job:
  layers = (@toy.Layer(), @small/toy.Layer())
  steps = 10
toy.Layer.width = %WIDTH
small/toy.Layer.width = 16
small/toy.Layer.kind = 'window'
"""


@pytest.fixture
def gin_file(tmp_path):
    def write(text, name="run.gin"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_builds_what_python_would_build(gin_file):
    job, _ = settings.load("toy.Job", [gin_file(BASE)], ["toy.Job.seed = 7", "toy.Layer.scale = 2"])
    assert job == toy.Job((toy.Layer(64, scale=2.0), toy.Layer(16, scale=2.0, kind="window")), steps=10, seed=7)
    assert type(job) is toy.Job
    assert isinstance(job.layers[0].scale, float)


def test_resolved_configuration_holds_the_defaults_and_builds_the_same_job(gin_file):
    job, config = settings.load("toy.Job", [gin_file(BASE)], ["toy.Job.seed = 7"])
    assert "seed = 7" in config
    assert "name = 'toy'" in config
    assert settings.load("toy.Job", [gin_file(config, "resolved.gin")]) == (job, config)


def test_a_later_line_wins_and_includes_are_followed(gin_file, tmp_path):
    gin_file(BASE, "base.gin")
    top = gin_file(f"include '{tmp_path}/base.gin'\ntoy.Job.steps = 20\n")
    assert settings.load("toy.Job", [top])[0].steps == 20
    assert settings.load("toy.Job", [top], ["toy.Job.steps = 30"])[0].steps == 30


BAD = {
    "unknown name": ("toy.Jib.seed = 1", [], "run.gin:9: 'toy.Jib' is not a configurable"),
    "unknown short name": ("ModelSpek.width = 1", [], "'ModelSpek' is not a configurable; did you mean 'ModelSpec'?"),
    "unknown parameter": (
        "toy.Job.stesp = 1",
        [],
        "run.gin:9: toy.Job has no parameter 'stesp'; did you mean 'steps'?",
    ),
    "unknown reference": ("toy.Job.layers = (@toy.Later(),)", [], "run.gin:9: 'toy.Later' is not a configurable"),
    "unknown macro": ("toy.Job.steps = %STEPS", [], "run.gin:9: no macro 'STEPS' is defined; known: WIDTH"),
    "unread binding": ("big/toy.Layer.width = 8", [], "run.gin:9: nothing reads big/toy.Layer.width"),
    "unread macro": ("STEPS = 8", [], "run.gin:9: nothing reads the macro 'STEPS'"),
    "wrong type": ("toy.Job.steps = 'many'", [], "run.gin:9: toy.Job.steps wants int, not str 'many'"),
    "a bool is no int": ("toy.Job.steps = True", [], "toy.Job.steps wants int, not bool True"),
    "wrong type in a scope": ("small/toy.Layer.window = 0.5", [], "run.gin:9: toy.Layer.window wants int or None"),
    "wrong type by reference": ("toy.Job.seed = @toy.Layer()", [], "run.gin:9: toy.Job.seed wants int, not Layer"),
    "not a choice": (
        "toy.Layer.kind = 'round'",
        [],
        "run.gin:9: toy.Layer.kind is 'round'; choose one of 'full', 'window'",
    ),
    "refused by the object": ("toy.Layer.width = 12", [], "toy.Layer: width 12 is not a multiple of 8"),
    "required": ("toy.Job.steps = %gin.REQUIRED", [], "run.gin:9: toy.Job.steps is required"),
    "bad binding": ("", ["toy.Job.steps = 'x'"], "--gin_bindings=\"toy.Job.steps = 'x'\": toy.Job.steps wants int"),
    "missing include": ("include 'no/such.gin'", [], "gin file 'no/such.gin', included from"),
    "import": ("import os", [], "run.gin:9: remove 'import os'"),
    "syntax": ("toy.Job.steps = = 3", [], "run.gin:9: not gin syntax"),
}


@pytest.mark.parametrize(("line", "bindings", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_that_names_it(gin_file, line, bindings, message):
    with pytest.raises(settings.SettingsError) as error:
        settings.load("toy.Job", [gin_file(BASE + line + "\n")], bindings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_value_names_the_parameter_and_its_type(gin_file):
    with pytest.raises(settings.SettingsError, match=r"toy.Job.steps has no value: bind it to int"):
        settings.load("toy.Job", [gin_file("toy.Job.layers = ()")])


def test_missing_file(tmp_path):
    with pytest.raises(settings.SettingsError, match=r"'nowhere\.gin' does not exist"):
        settings.load("toy.Job", ["nowhere.gin"])


def test_a_replaced_line_may_name_what_nothing_else_names(gin_file):
    job, _ = settings.load(
        "toy.Job", [gin_file("toy.Job.layers = (@toy.Layer(),)\ntoy.Job.steps = 1")], ["toy.Job.layers = ()"]
    )
    assert job.layers == ()


def test_an_error_leaves_no_trace_in_the_next_load(gin_file):
    with pytest.raises(settings.SettingsError):
        settings.load("toy.Job", [gin_file(BASE)], ["toy.Job.steps = 'x'"])
    assert settings.load("toy.Job", [gin_file(BASE)])[0].steps == 10


def test_main_exits_with_status_2_and_the_sentence(gin_file, capsys):
    with pytest.raises(SystemExit) as stop:
        settings.main("toy.Job", [f"--gin_file={gin_file(BASE)}", "--gin_bindings=toy.Job.sead=1"])
    assert stop.value.code == 2
    assert "did you mean 'seed'?" in capsys.readouterr().err


def test_main_gives_job_output_and_config(gin_file, tmp_path):
    launch = settings.main("toy.Job", [f"--gin_file={gin_file(BASE)}", f"--output={tmp_path}"])
    assert launch.output == tmp_path
    assert dataclasses.is_dataclass(launch.job)
    assert "toy.Job.steps = 10" in launch.config


@pytest.mark.parametrize("name", CONFIGURABLES)
def test_every_short_name_leads_to_something(name):
    module, _, attribute = CONFIGURABLES[name].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
