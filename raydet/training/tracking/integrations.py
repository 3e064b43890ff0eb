"""Reporting integrations of transformers, driven without its `Trainer`. Any call may raise any exception.

A callback reads its settings from environment variables, so they are set in the worker, which trains one run only.
"""

import importlib
import importlib.util
import os
import pkgutil
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydet.common.errors import UserError, one_line
from raydet.training.tracking.tensorboard import RgbImage

_MODULES: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml.core",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
    "kubeflow": (),
    **{name: (name,) for name in ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "neptune", "swanlab")},
    **{name: (name,) for name in ("trackio", "wandb")},
}
"""Modules that each integration imports; TensorBoard is always on."""
_REQUIREMENTS = {"azureml.core": "azureml-core", "mlflow": "raydet[mlflow]", "wandb": "raydet[wandb]"}
"""Names of the packages to install, if they differ from the module's."""
_UPLOADS = """
    CLEARML_LOG_MODEL COMET_LOG_ASSETS HF_DAGSHUB_LOG_ARTIFACTS HF_DVCLIVE_LOG_MODEL HF_MLFLOW_LOG_ARTIFACTS
    WANDB_LOG_MODEL WANDB_WATCH
"""
"""Environment variables that make callbacks upload the model, which they do not get: always set to false."""
_DEFAULTS = """
    CLEARML_PROJECT=raydet COMET_PROJECT_NAME=raydet SWANLAB_PROJECT=raydet WANDB_PROJECT=raydet
    SWANLAB_RESUME=allow WANDB_RESUME=allow
    COMET_AUTO_LOG_CLI_ARGUMENTS=false COMET_AUTO_LOG_CODE=false COMET_AUTO_LOG_GIT_PATCH=false
    COMET_AUTO_OUTPUT_LOGGING=false WANDB_CONSOLE=off WANDB_DISABLE_CODE=true WANDB_DISABLE_GIT=true
    WANDB__DISABLE_META=true WANDB_ERROR_REPORTING=false WANDB_SILENT=true MLFLOW_DISABLE_TELEMETRY=true
    WANDB_INIT_TIMEOUT=60 WANDB_FINISH_TIMEOUT=60 MLFLOW_HTTP_REQUEST_MAX_RETRIES=2 MLFLOW_HTTP_REQUEST_TIMEOUT=20
    MLFLOW_ALLOW_FILE_STORE=true
"""
"""Environment variables set unless the user has set them: the command line, console output and source code may contain
passwords, and by default an unreachable server delays the workers for minutes."""
_FINISHING = {"comet_ml": ("end",), "swanlab": ("finish",), "wandb": ("finish", "teardown")}
"""Functions that end a run and send its data, which these integrations leave to the end of the process."""
_WITH_IMAGES = ("swanlab", "trackio", "wandb")
"""Integrations that pass on values of any type, and whose module has an `Image`."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and their modules installed, and import callbacks given as `MODULE:CLASS`.

    Raises:
        UserError: A tracker is unknown or not installed, or a callback cannot be imported.
    """
    missing: dict[str, None] = {}
    for name in names:
        if ":" in name:
            try:
                is_class = isinstance(pkgutil.resolve_name(name), type)
            except Exception as error:  # of the user's module
                raise UserError(f"--trackers cannot import {name}: {one_line(str(error))}") from error
            if not is_class:
                raise UserError(f"--trackers {name} is not a class")
        elif name in _MODULES:
            missing |= dict.fromkeys(module for module in _MODULES[name] if not _is_installed(module))
        else:
            raise UserError(f"--trackers does not support {name}; use {', '.join(sorted(_MODULES))} or MODULE:CLASS")
    if missing:
        packages = [_REQUIREMENTS.get(module, module) for module in missing]
        raise UserError(f"--trackers requires {' and '.join(packages)}; run: pip install {shlex.join(packages)}")


def _is_installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of its parent
        return False
    # A plain folder of that name, such as the one that W&B creates, is also found, but without an origin.
    return spec is not None and spec.origin is not None


@dataclass
class Arguments:
    """The part of `transformers.TrainingArguments` that reporting callbacks read."""

    config: dict[str, Any]
    output_dir: str
    run_name: str
    project: str = "raydet"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: bool = False
    hub_private_repo: bool | None = None
    resume_from_checkpoint: bool = False
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "AP"
    greater_is_better: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the config."""
        return dict(self.config)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return the config as numbers and strings."""
        return {name: value if isinstance(value, int | float) else str(value) for name, value in self.config.items()}


class Integration:
    """One callback: the integration of a tracker's name, or a class `MODULE:CLASS`."""

    def __init__(
        self, name: str, arguments: Arguments, *, ids: dict[str, str], start_step: int, steps_per_epoch: int
    ) -> None:
        """Start the tracker, or resume the run of `ids`, and add the id that MLflow chooses to `ids`."""
        _prepare_environment(name, arguments, ids, is_resumed=start_step > 0)
        from transformers import TrainerControl, TrainerState
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        self._name, self._arguments, self._steps_per_epoch = name, arguments, steps_per_epoch
        self._state, self._control = TrainerState(), TrainerControl()
        self._state.max_steps = steps_per_epoch * arguments.config["epochs"]
        self._callback = (pkgutil.resolve_name(name) if ":" in name else INTEGRATION_TO_CALLBACK[name])()
        self._at(start_step)
        self._call("on_init_end")
        self._call("on_train_begin")
        if "mlflow" in _MODULES.get(name, ()):
            ids["mlflow"] = importlib.import_module("mlflow").active_run().info.run_id

    def _call(self, event: str, **content: Any) -> None:
        # No model: all that a tracker could do with it is upload it.
        getattr(self._callback, event)(self._arguments, self._state, self._control, model=None, **content)

    def _at(self, step: int) -> None:
        self._state.global_step, self._state.epoch = step, step / self._steps_per_epoch

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        self._at(step)
        logs = {_log_name(tag): float(value) for tag, value in values.items()}
        self._state.log_history.append({**logs, "step": step})
        self._call("on_step_end")
        self._call("on_log", logs=logs)

    def images(self, step: int, images: Mapping[str, RgbImage]) -> None:
        """Log images by tag, if the tracker accepts images from its integration."""
        if self._name in _WITH_IMAGES:
            self._at(step)
            make = importlib.import_module(self._name).Image
            self._call("on_log", logs={_log_name(tag): make(image) for tag, image in images.items()})

    def flush(self) -> None:
        """Do nothing: trackers send their data by themselves."""

    def close(self) -> None:
        """Mark the run as finished, and wait until its data are sent."""
        self._call("on_train_end")
        for name in _FINISHING.get(self._name, ()):
            getattr(importlib.import_module(self._name), name)()


def _log_name(tag: str) -> str:
    """Convert a tag to the name that transformers' `Trainer` would log: integrations show `eval_AP` as `eval/AP`."""
    group, _, name = tag.partition("/")
    if group == "train":
        return name
    if group == "validation":
        return f"eval_{name}"
    return f"eval_{tag}" if group == "AP_by_class" else tag


def _prepare_environment(name: str, arguments: Arguments, ids: Mapping[str, str], *, is_resumed: bool) -> None:
    """Set the environment variables that a callback reads; those of the user take precedence."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    defaults = dict(setting.split("=") for setting in _DEFAULTS.split()) | {
        "CLEARML_TASK": arguments.run_name,
        "COMET_EXPERIMENT_KEY": ids["id"],
        "NEPTUNE_CUSTOM_RUN_ID": ids["id"],
        "SWANLAB_RUN_ID": ids["id"][:21],  # the only length that all its versions accept
        "WANDB_RUN_ID": ids["id"],
        "SWANLAB_LOG_DIR": str(folder / "swanlab"),
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": (folder / "mlflow").absolute().as_uri(),
    }
    if is_resumed:
        defaults["DVCLIVE_RESUME"] = "true"
    if "mlflow" in ids:
        # The parameters are logged already, and MLflow refuses changed ones, such as raised `epochs`.
        defaults |= {"MLFLOW_RUN_ID": ids["mlflow"], "MLFLOW_MAX_LOG_PARAMS": "0"}
    if "MLFLOW_EXPERIMENT_ID" not in os.environ:
        defaults["MLFLOW_EXPERIMENT_NAME"] = "raydet"
    if name == "wandb" and not _has_wandb_key():
        defaults["WANDB_MODE"] = "offline"
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    os.environ |= dict.fromkeys(_UPLOADS.split(), "false")
    for meta in folder.glob("mlflow/*/*/meta.yaml"):
        # Object stores do not keep empty folders, but MLflow does not recognise a run that lacks one of these.
        for kind in ("artifacts", "metrics", "params", "tags"):
            (meta.parent / kind).mkdir(exist_ok=True)


def _has_wandb_key() -> bool:
    from requests.utils import get_netrc_auth

    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    return any(map(os.environ.get, ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))) or get_netrc_auth(url) is not None
