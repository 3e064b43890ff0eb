"""Options and YAML files → configs, or an error of one line."""

import dataclasses
from pathlib import Path

import pytest

from raydet.common.errors import UserError
from raydet.config import PredictConfig, PrepareVocConfig, TrainConfig, config_hash, field_names, is_required, to_yaml
from raydet.config.options import closest, load, load_file

REQUIRED = ["--train-data", "a", "--val-data", "b", "--out", "c"]


def test_options_with_hyphens_or_underscores_and_switches_without_value() -> None:
    config = load(TrainConfig, [*REQUIRED, "--batch_size=16", "--learning-rate", "1e-3", "--use-gpu"])
    assert (config.batch_size, config.learning_rate, config.use_gpu) == (16, 1e-3, True)
    assert load(TrainConfig, [*REQUIRED, "--no-use-gpu"]).use_gpu is False
    assert load(TrainConfig, REQUIRED).use_gpu is None


def test_lists_are_written_with_commas_or_brackets() -> None:
    options = ["--trackers", "mlflow,wandb", "--multi-scale", "64,96", "--num-workers", "1,4"]
    config = load(TrainConfig, [*REQUIRED, *options])
    assert (config.trackers, config.multi_scale, config.num_workers) == (["mlflow", "wandb"], [64, 96], [1, 4])
    options = ["--trackers", "[wandb]", "--multi-scale", "[64]", "--num-workers", "2"]
    config = load(TrainConfig, [*REQUIRED, *options])
    assert (config.trackers, config.multi_scale, config.num_workers) == (["wandb"], [64], 2)
    options = ["--multi-scale", "null"]
    config = load(TrainConfig, [*REQUIRED, *options])
    assert config.multi_scale is None


def test_paths_are_separated_by_blanks_and_may_contain_commas() -> None:
    model = ["--checkpoint", "c"]
    for words, data in (
        (["--data", "my,folder", *model], "my,folder"),
        (["--data", "a.jpg", "b,c.jpg", "[1].jpg", *model], ["a.jpg", "b,c.jpg", "[1].jpg"]),
        (["--data=a.jpg", "b.jpg", *model, "--top-k", "3"], ["a.jpg", "b.jpg"]),
    ):
        assert load(PredictConfig, words).data == data
    with pytest.raises(UserError, match="unexpected `d`"):
        load(PredictConfig, ["--data", "a", "--checkpoint", "c", "d"])


@pytest.mark.parametrize(
    ("config_class", "name", "meant"),
    [
        (PredictConfig, "chekpoint", "checkpoint"),
        (PredictConfig, "draw_thresh", "draw_threshold"),
        (PredictConfig, "weights", "checkpoint"),
        (PredictConfig, "source", "data"),
        (PredictConfig, "qwertz", None),
        (TrainConfig, "lr", "learning_rate"),
        (TrainConfig, "imgsz", "image_size"),
        (TrainConfig, "val", "val_data"),
        (PrepareVocConfig, "source", "images"),
    ],
)
def test_a_misspelt_shortened_or_foreign_name_is_understood(config_class: type, name: str, meant: str | None) -> None:
    assert closest(name, field_names(config_class)) == meant


def test_options_override_the_file_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 4\nepochs: 7\ntrain_data: a\nval_data: b\nout: c\n")
    config = load(TrainConfig, ["--epochs", "9", "--config", str(path)])
    assert (config.batch_size, config.epochs) == (4, 9)
    assert load_file(TrainConfig, str(path), out="elsewhere", epochs=None).out == "elsewhere"


def test_printed_config_is_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(TrainConfig, [*REQUIRED, "--epochs", "3", "--print-config"])
    assert stop.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load(TrainConfig, ["--config", str(path)]) == load(TrainConfig, [*REQUIRED, "--epochs", "3"])


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ([*REQUIRED, "--num-workers", "0"], ("--num-workers", "0")),
        ([*REQUIRED, "--num-worker", "2"], ("--num-worker", "--num-workers")),
        ([*REQUIRED, "--num-workers", "[4, 1]"], ("--num-workers", "[1, 4]", "[4, 1]")),
        ([*REQUIRED, "--num-workers", "few"], ("--num-workers", "few")),
        (
            [*REQUIRED, "--augmentation", "stronk"],
            ("--augmentation", "none, flip, light, detr, rfdetr, rtdetr, dfine, strong or a list; got"),
        ),
        ([*REQUIRED, "--augmentation", "[{A: {}, B: {}}]"], ("--augmentation", "`Name: {argument: value}`")),
        ([*REQUIRED, "--unfreeze-epoch", "3"], ("--unfreeze-epoch", "--freeze-backbone stem or all")),
        ([*REQUIRED, "--lora", "alpha=8"], ("--lora", "rank r from 1 to 1024, got None")),
        ([*REQUIRED, "--lora", "r=1.5"], ("--lora", "got 1.5")),
        ([*REQUIRED, "--lora", "r=8", "rank=8"], ("--lora takes r, alpha, dropout, got r, rank",)),
        ([*REQUIRED, "--lora", "r=8", "alpha=0"], ("--lora", "alpha", "got 0")),
        ([*REQUIRED, "--lora", "r=8", "dropout=1"], ("--lora", "dropout", "got 1")),
        ([*REQUIRED, "--lora", "r=8", "--freeze-backbone", "stem"], ("--lora", "omit --freeze-backbone")),
        ([*REQUIRED, "--metric-for-best-model", "mAP"], ("--metric-for-best-model", "AP, AP50")),
        ([*REQUIRED, "--validate-fraction", "0"], ("--validate-fraction", "0", "1")),
        ([*REQUIRED, "--epochs", "many"], ("--epochs", "many")),
        ([*REQUIRED, "--schedule", "cos"], ("--schedule", "linear, cosine, ")),
        ([*REQUIRED, "--batch-size", "2", "--num-workers", "4"], ("2 images", "4 workers")),
        ([*REQUIRED, "stray"], ("`stray`",)),
        ([*REQUIRED, "--epochs"], ("--epochs",)),
        (["--train-data", "a"], ("--val-data, --out",)),
        ([*REQUIRED, "--config", "absent.yaml"], ("absent.yaml",)),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], facts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        load(TrainConfig, arguments)
    assert all(fact in str(error.value) for fact in facts), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("batch_sise: 4\n", ("`batch_sise`",)),
        ("batch_size: 3.5\n", ("--batch-size", "3.5")),
        ("- a\n- b\n", ("run.yaml", "`option: value`")),
        ("a: [1\n", ("run.yaml",)),
    ],
)
def test_mistakes_in_a_file_name_the_file_or_the_key(tmp_path: Path, text: str, facts: tuple[str, ...]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load(TrainConfig, [*REQUIRED, "--config", str(path)])
    assert all(fact in str(error.value) for fact in facts), error.value
    assert "\n" not in str(error.value)


def test_identity_leaves_out_what_changes_only_the_time() -> None:
    config = PredictConfig(checkpoint="m", data="d", out="o")
    assert config_hash(config) == config_hash(dataclasses.replace(config, num_workers=3, out="p", batch_size=3))
    assert config_hash(config) != config_hash(dataclasses.replace(config, score_threshold=0.3))


def test_yaml_holds_every_field() -> None:
    config = PredictConfig(checkpoint="m", data="d", out="o")
    assert all(f"{item.name}:" in to_yaml(config) for item in dataclasses.fields(config))


@pytest.mark.parametrize("number", [2**16 + 1, 2**63])
def test_numbers_that_torch_cannot_take_are_refused(number: int) -> None:
    with pytest.raises(UserError, match=r"threads-per-worker must be (at most 65,536|below 2⁶³), got \d+"):
        PredictConfig(checkpoint="m", data="d", out="o", threads_per_worker=number)
    with pytest.raises(UserError, match="limit must be below 2⁶³"):
        PredictConfig(checkpoint="m", data="d", out="o", limit=10 * 2**63)


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_that_are_not_finite_are_refused_in_every_field(number: str, tmp_path: Path) -> None:
    from raydet.cli.commands import COMMANDS

    num_fields = 0
    for command in COMMANDS.values():
        required = {item.name: "x" for item in dataclasses.fields(command.config) if is_required(item)}
        for item in dataclasses.fields(command.config):
            if "float" not in str(item.type):
                continue
            num_fields += 1
            with pytest.raises(UserError):
                command.config(**{**required, item.name: float(number.replace(".inf", "inf").replace(".nan", "nan"))})
            (tmp_path / "c.yaml").write_text(f"{item.name}: {number}\n")
            with pytest.raises(UserError) as caught:
                load_file(command.config, str(tmp_path / "c.yaml"), **required)
            assert "\n" not in str(caught.value)
    assert num_fields > 20


def test_a_config_that_grows_without_bounds_is_refused(tmp_path: Path) -> None:
    lists = zip("abcdefgh", "bcdefghi", strict=True)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in lists)
    for text in (bomb, "[" * 10_000, "a" * 2_000_000):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match="cannot read the config file") as caught:
            load_file(TrainConfig, str(tmp_path / "c.yaml"))
        assert "\n" not in str(caught.value)


def test_a_repeated_option_of_paths_names_all_of_them() -> None:
    rest = ["--val-data", "v", "--out", "o"]
    assert load(TrainConfig, ["--train-data", "a", *rest, "--train-data", "b:0.3"]).train_data == ["a", "b:0.3"]
    assert load(TrainConfig, ["--train-data", "a", "b", *rest, "--train-data=c,d"]).train_data == ["a", "b", "c,d"]
    assert load(TrainConfig, ["--train-data", "a,b", *rest]).train_data == "a,b"
