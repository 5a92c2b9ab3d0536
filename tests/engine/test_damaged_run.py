"""A run whose files were damaged since: each is named, with what to do."""

import pytest

from bigbag import load_model
from bigbag.config import build_config
from bigbag.engine.run import delete_run, evaluate, train
from bigbag.files import alone_in


def test_damaged_files_of_a_run_are_named(run_settings):
    config = build_config(run_settings)
    train(config)
    run_dir = config.run_dir
    (run_dir / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"other settings \(its config\.yaml, which would tell them, cannot be read\)"):
        train(build_config({**run_settings, "optim": {"lr": 0.5}}))
    (run_dir / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json: best_epoch is None, expected a number"):
        evaluate(config)
    for tags in ("{}", '{"tags": 3}'):
        (run_dir / "checkpoints/latest.json").write_text(tags)
        with pytest.raises(ValueError, match=r"latest\.json: tags is (None|3), expected the names.*--restart"):
            train(config)
    for about in ("{}", '{"model": {"name": "ABMIL"}, "task": {"type": "x"}, "in_shape": [8]}'):
        (run_dir / "checkpoints/best/model.json").write_text(about)
        with pytest.raises(ValueError, match=r"model\.json: not what a saved model says of itself \(.*Config"):
            load_model(run_dir)


def test_two_trainings_keep_out_of_each_others_way(run_settings):
    config = build_config(run_settings)
    with alone_in(config.run_dir / "checkpoints"):
        for command in (lambda: train(config), lambda: delete_run(config.run_dir)):
            with pytest.raises(ValueError, match=r"runs/run: another training is at this run: wait for it or stop it"):
                command()
        assert [path.name for path in config.run_dir.iterdir()] == ["checkpoints"]
    assert train(config)["best_epoch"] >= 1
    delete_run(config.run_dir)
    assert not config.run_dir.exists()
