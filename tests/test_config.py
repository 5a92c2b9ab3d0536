"""Settings: strict, with errors that name the place and the nearest name."""

from pathlib import Path

import pytest

from bigbag.config import Config, ConfigError, load_config, read_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
MINIMAL = "name: run\ndata:\n  shards: data/x\nmodel: {name: ABMIL}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value)


def test_defaults_and_overrides(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["optim.lr=0.5", "data.max_instances=7", "model.gated=true"])
    assert (config.optim.lr, config.data.max_instances, config.model.arguments) == (0.5, 7, {"gated": True})
    assert config.run_dir == Path("runs/run")


def test_unknown_key_names_file_line_and_nearest(tmp_path):
    text = message(tmp_path, MINIMAL + "train:\n  epochs: 3\n  batch_bag: 4\n")
    assert text.endswith("run.yaml:7: unknown setting 'train.batch_bag'; did you mean 'batch_bags'?")


def test_bad_value_names_line_and_value(tmp_path):
    text = message(tmp_path, MINIMAL + "optim:\n  lr: fast\n")
    assert "run.yaml:6: setting 'optim.lr'" in text and "'fast'" in text


def test_all_problems_are_listed(tmp_path):
    text = message(tmp_path, "name: run\nmodel: {name: ABMIL}\ntrain: {epochs: 0}\n")
    assert "'data' is missing" in text and "expected at least 1, got 0" in text


@pytest.mark.parametrize("override", ["epochs", "=3", "name.x=3", "optim.lr=[1", "optim..lr=1", "optim.lr.=1", ".lr=1"])
def test_bad_override(tmp_path, override):
    assert repr(override) in message(tmp_path, MINIMAL, override)


def test_unknown_override(tmp_path):
    assert message(tmp_path, MINIMAL, "optim.learning_rate=1").startswith("override 'optim.learning_rate=1': unknown")


def test_missing_file_and_not_yaml(tmp_path):
    with pytest.raises(ConfigError, match="can't read"):
        load_config(tmp_path / "absent.yaml")
    assert "not valid YAML" in message(tmp_path, "a: [1")
    assert "expected a mapping" in message(tmp_path, "- 1")


def test_a_setting_twice_and_other_bytes(tmp_path):
    text = message(tmp_path, MINIMAL + "optim: {lr: 1.0}\ntrain:\n  epochs: 3\n  epochs: 4\n")
    assert text.endswith(f"run.yaml:8: setting 'train.epochs' is there twice, first at {tmp_path}/run.yaml:7: keep one "
                         "of them")  # fmt: skip
    for content in (b"name: \xff\xfe", b"name: &a [*a]", b"name: " + 3000 * b"["):
        (tmp_path / "run.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.yaml: not "):
            load_config(tmp_path / "run.yaml")
    assert "override 'optim.lr=2001-99-99'" in message(tmp_path, MINIMAL, "optim.lr=2001-99-99")


def test_a_message_names_what_set_the_value_and_no_more(tmp_path):
    text = message(tmp_path, MINIMAL + "task: {type: binary}\n", "task.num_outputs=2")
    assert text == "override 'task.num_outputs=2': setting 'task': task type 'binary' does not go with num_outputs 2"
    text = message(tmp_path, MINIMAL, "name=no")
    assert text.endswith(
        "name is False (in YAML also yes, no, on, off, unless in quotes), expected another kind of value"
    )
    assert 'as text it is "12" in a file, \'"12"\' on a command line' in message(tmp_path, MINIMAL, "name=12")
    assert message(tmp_path, MINIMAL + "optim.lr: 1.0\n").endswith("; a file has it as lr below optim")


@pytest.mark.parametrize(
    "text, value",
    [("012", 12), ("1_000", 1000), ("0x1f", 31), ("-3", -3), ("1:30", "1:30"), ("2024-05-01", "2024-05-01")]
    + [
        (".5", 0.5),
        ("-1.", -1.0),
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".inf", float("inf")),
        ("1e", "1e"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_numbers_are_what_they_look_like(text, value):
    """YAML 1.1, which PyYAML reads, has octal and sexagesimal numbers, and dates."""
    found, _ = read_yaml(text)
    assert found == value and type(found) is type(value)


def test_paths_are_expanded_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load_config(
        write(tmp_path, MINIMAL),
        ["out=~/runs", "data.shards=${SCRATCH}/set", "data.splits.table=$SCRATCH/f{fold}.csv", "data.cache_dir=~"]
        + ["data.source={name: plain, root: ~/features, labels: $SCRATCH/l.csv, columns: {label: $x}}"],
    )
    assert config.run_dir == Path("/home/me/runs/run") and config.data.shards == "/scratch/me/set"
    assert config.data.splits.table == "/scratch/me/f{fold}.csv" and config.data.source is not None
    assert config.data.source.arguments == {
        "root": "/home/me/features", "labels": "/scratch/me/l.csv", "columns": {"label": "$x"}
    }  # fmt: skip
    assert load_config(write(tmp_path, MINIMAL), ["data.shards=pipe:cat $x"]).data.shards == "pipe:cat $x"
    text = message(tmp_path, MINIMAL, "out=$SCRATHC/runs")
    assert "'out': the environment has no variable $SCRATHC: set it, or write the path out" in text
    assert "there is no home folder ~nobody.here" in message(tmp_path, MINIMAL, "data.shards=~nobody.here/x")


def test_a_number_with_an_exponent_is_a_number_everywhere(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["model.dropout=1e-1", "model.other=-2E3", "model.name=1e"])
    assert config.model.arguments == {"dropout": 0.1, "other": -2000.0} and config.model.name == "1e"


OUT_OF_RANGE = [
    "optim.lr=-1",
    "optim.lr=.nan",
    "optim.lr=yes",
    "optim.betas=[0.9,1]",
    "optim.warmup_epochs=-1",
    "optim.clip_norm=0",
    "optim.final_lr_fraction=2",
    "train.epochs=true",
    "seed=-1",
    "seed=100000000000000000000",
    "data.splits.seed=-1",
    "data.num_workers=-1",
    "data.cache_bytes=0",
    "engine.threads=0",
    "engine.threads=100000",
    "task={type: multiclass, num_outputs: -1}",
    "task={type: regression, num_outputs: 0}",
    "data.splits.sites=tcga",
    "data.augment.feature_noise=1e300",
    "task.pos_weight=.inf",
    "report.num_slides=-1",
    "train.loss_coefficients={a: {schedule: cyclical, cycle_len: 2, cycle_prop: 3}}",
]


@pytest.mark.parametrize("override", OUT_OF_RANGE)
def test_values_out_of_range_name_the_setting(tmp_path, override):
    section, _, name = override.partition("=")[0].rpartition(".")
    text = message(tmp_path, MINIMAL, override)
    assert text.startswith(f"override {override!r}: setting '{section}") and name in text.partition("(got")[0]


@pytest.mark.parametrize("name", ['""', ".", "..", "a/../..", "/tmp/x", '"a\\0"'])
def test_a_run_lies_below_out(tmp_path, name):
    assert "'name': expected the name of a folder below out" in message(tmp_path, MINIMAL, f"name={name}")


def test_task_must_fit_outputs(tmp_path):
    assert "num_outputs" in message(tmp_path, MINIMAL + "task: {type: multiclass}\n")


def test_yaml_round_trip(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["model.feat_ext={name: MLP, linear_sizes: [8]}", "seed=3"])
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_digest_ignores_what_cannot_change_the_result(tmp_path):
    def digest(*overrides: str) -> str:
        return load_config(write(tmp_path, MINIMAL), overrides).digest()

    assert digest() == digest("data.num_workers=3", "name=other", "train.checkpoint_every_steps=5", "engine.threads=1")
    assert len({digest(), digest("seed=1"), digest("data.max_instances=9"), digest("optim.lr=1")}) == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_say_how_to_run_them(path):
    config = load_config(path)
    header = path.read_text().split("\nname:")[0]
    assert isinstance(config, Config) and config.data.source is not None
    assert f"launch/train.py --config configs/{path.name}" in header
    assert all(line.startswith("#") for line in header.strip().splitlines())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_models_build(path):
    """For features of the width of UNI's, and the digits' own; so do all models of a comparison."""
    from bigbag.config import ModelConfig
    from bigbag.evaluation.compare import model_settings
    from bigbag.models import MODELS, build_model

    config = load_config(path)
    if config.model.name not in MODELS:
        pytest.skip(f"{config.model.name} is not among the models yet")
    width = 1024 if path.stem.startswith("camelyon16") else 64
    model = build_model(config.model, (width,), config.task)
    assert type(model).__name__ == config.model.name and any(p.requires_grad for p in model.parameters())
    assert "adj" not in model.needs or config.data.graph is not None
    if config.compare.common:
        for name in MODELS:
            build_model(ModelConfig(**model_settings(config, name)), (width,), config.task)


def test_arguments_of_another_type_name_the_argument():
    from bigbag.config import ModelConfig, TaskConfig
    from bigbag.models import build_model

    def build(**arguments):
        return build_model(ModelConfig(**{"name": "ABMIL", **arguments}), (8,), TaskConfig())

    assert build(att_dim="4", gated="no", in_shape=[8]).pool.gated is False
    for arguments, message in (
        ({"att_dim": "many"}, "model ABMIL: att_dim is 'many', expected int"),
        ({"att_dim": 0}, "model ABMIL: att_dim is 0, expected at least 1"),
        ({"name": "TransMIL", "n_heads": -1}, "model TransMIL: n_heads is -1, expected at least 1"),
        ({"in_shape": 5}, "model ABMIL: in_shape is 5, expected tuple"),
        ({"dropout": float("nan")}, "model ABMIL: dropout is nan, expected float"),
        ({"feat_ext": {"name": ["MLP"]}}, "model.feat_ext: expected"),
        ({"feat_ext": {"name": "MLP", "linear_sizes": 3}}, "model.feat_ext MLP: linear_sizes is 3, expected"),
    ):
        with pytest.raises(ConfigError) as caught:
            build(**arguments)
        assert str(caught.value).startswith(message)


def test_every_setting_is_documented():
    def walk(section):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no docstring"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                walk(field.annotation)

    walk(Config)
