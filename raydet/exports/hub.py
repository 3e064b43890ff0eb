"""Shares a checkpoint on the Hugging Face Hub: the model folder and its model card, as one commit.

Everything that can be checked here is checked before the Hub is asked for anything. No message repeats a token or
what signs an address.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    validate_repo_id,
)

from raydet.common.errors import UserError, one_line
from raydet.common.redaction import without_secrets
from raydet.config import PushConfig
from raydet.exports.model_card import build_card
from raydet.models.checkpoints import Checkpoint, read_checkpoint
from raydet.tables import storage

_CARD = "README.md"
_PROCESSOR = "preprocessor_config.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_HOW_TO_LOG_IN = (
    "set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens), or run `hf auth login`"
)


@dataclass(frozen=True)
class PushResult:
    """What is on the Hub now.

    Attributes:
        repo: The repository, as owner/name.
        url: Its page, of the branch that was pushed to.
        commit: The commit that holds model and card.
        files: The names of the files that it was made of.
        num_bytes: Their size together.
        notes: What a reader of the card should know of and the pusher may have overlooked.
        already_done: The Hub held these very files before.
    """

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    num_bytes: int
    notes: tuple[str, ...] = ()
    already_done: bool = False

    def lines(self) -> list[str]:
        """What was done, for the terminal."""
        done = "nothing to do: the Hub already has these files" if self.already_done else "pushed"
        return [
            *(f"note: {note}" for note in self.notes),
            f"{done}: {len(self.files)} files, {self.num_bytes / 1e6:.1f} MB, commit {self.commit[:12]}",
            f"model: {self.url}",
        ]


def push(config: PushConfig) -> PushResult:
    """Uploads a model folder with a model card, in one commit; the repository is made if it is not there.

    Only the files that make up the model are sent: configuration, image processor and safetensors weights. What an
    earlier push left of other weights is removed in the same commit, since it could be loaded in the place of these.

    Raises:
        UserError: A name, folder or token is not what it should be, and nothing has been sent; or the Hub cannot be
            reached or refuses, and no commit has been made.
    """
    _check_names(config)
    if not storage.exists(config.checkpoint):
        raise UserError(f"no such model folder: {config.checkpoint}; push takes OUT/checkpoint of train")
    checkpoint = read_checkpoint(config.checkpoint)
    files = _model_files(checkpoint)
    card = build_card(config, checkpoint)
    api = _client()
    with tempfile.TemporaryDirectory(prefix="raydet-push-") as folder:
        # From a copy, so that a training that still goes on cannot change a file between two looks at it.
        for name in files:
            Path(folder, name).write_bytes(storage.read_bytes(storage.join(checkpoint.name, name)))
        Path(folder, _CARD).write_text(card.content, encoding="utf-8")
        with _quiet_client(), _errors_in_one_line(api, config.repo):
            commit, already_done = _upload(api, config, Path(folder), card.content)
        num_bytes = sum(path.stat().st_size for path in Path(folder).iterdir())
    url = f"{api.endpoint}/{config.repo}" + (f"/tree/{quote(config.revision)}" if config.revision else "")
    return PushResult(config.repo, url, commit, (*files, _CARD), num_bytes, card.notes, already_done)


# What is checked and read before anything is sent.


def _check_names(config: PushConfig) -> None:
    try:
        validate_repo_id(config.repo)
        is_name = config.repo.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise UserError(
            f"--repo must be owner/name, of letters, digits, `-`, `_` and `.`, got {_safe(config.repo)}; owner is your "
            "user name or organisation on the Hub"
        )
    branch = config.revision
    if branch is not None and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", branch) or ".." in branch):
        raise UserError(f"--revision must be the name of a branch, got {branch}")
    if config.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", config.license):
        raise UserError(
            f"--license must be spelled as the Hub does, in lower case, such as apache-2.0 or mit; got {config.license}"
        )


def _model_files(checkpoint: Checkpoint) -> list[str]:
    """The files that make up the model, by an allow-list: a run may have put anything else beside them."""
    present = storage.list_files(checkpoint.name)
    if _PROCESSOR not in present:
        raise UserError(
            f"the folder {checkpoint.name} holds no image processor (no {_PROCESSOR}), without which others cannot "
            "use the model; push OUT/checkpoint of train"
        )
    weights = [name for name in present if _WEIGHTS.fullmatch(name)]
    if not any(name.endswith(".safetensors") for name in weights):
        raise UserError(f"the folder {checkpoint.name} holds no weights by the name of model.safetensors")
    return ["config.json", _PROCESSOR, *weights]


# The Hub.


def _client() -> HfApi:
    try:
        token = get_token()
    except Exception as error:
        raise UserError(f"cannot get a token for the Hugging Face Hub: {_safe(str(error))}; {_HOW_TO_LOG_IN}") from None
    if token is None:
        raise UserError(f"there is no token for the Hugging Face Hub: {_HOW_TO_LOG_IN}")
    # The client reads HF_ENDPOINT only when it is first imported.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    return HfApi(endpoint=endpoint.rstrip("/"), token=token)


def _upload(api: HfApi, config: PushConfig, folder: Path, card: str) -> tuple[str, bool]:
    """Makes the commit; returns its id and whether there was nothing to do."""
    user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token may only read from the Hugging Face Hub: {_HOW_TO_LOG_IN}")
    _validate_card(api, card)
    # Without --private it is left to the Hub, where an organisation may make all its repositories private.
    api.create_repo(config.repo, private=config.private or None, exist_ok=True)
    branch = config.revision or constants.DEFAULT_REVISION
    if branch != constants.DEFAULT_REVISION:
        api.create_branch(config.repo, branch=branch, exist_ok=True)
    before = api.model_info(config.repo, revision=branch)
    if config.private and not before.private:
        raise UserError(
            f"{config.repo} is there already and public, and --private is for new repositories: make it private in "
            "its settings on the Hub, or leave --private out"
        )
    names = sorted(path.name for path in folder.iterdir())
    others = [item.rfilename for item in before.siblings or [] if item.rfilename not in names]
    with contextlib.ExitStack() as stack:
        if _offers_xet(api, config.repo, branch):
            additions = [CommitOperationAdd(name, folder / name) for name in names]
        else:
            # The client sends files by their path to xet, whether or not the server has it, and open files to LFS.
            files = [stack.enter_context((folder / name).open("rb")) for name in names]
            additions = [CommitOperationAdd(name, file) for name, file in zip(names, files, strict=True)]
        commit = api.create_commit(
            config.repo,
            [*additions, *(CommitOperationDelete(name) for name in others if _WEIGHTS.fullmatch(name))],
            commit_message="Push a detector trained with raydet",
            revision=branch,
            parent_commit=before.sha,
        )
    return commit.oid, commit.oid == before.sha


def _validate_card(api: HfApi, card: str) -> None:
    """Asks for what the Hub would find wrong with the card later, when an empty repository had been made."""
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": card, "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    hf_raise_for_status(response)


def _offers_xet(api: HfApi, repo: str, branch: str) -> bool:
    response = get_session().get(
        f"{api.endpoint}/api/models/{repo}/xet-write-token/{quote(branch, safe='')}",
        headers=build_hf_headers(token=api.token),
    )
    if response.status_code in (404, 405, 501):
        return False
    hf_raise_for_status(response)
    return constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT in response.headers


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Keeps the client's warnings off the screen, and its progress bars where there is no terminal."""
    logger = logging.getLogger("huggingface_hub")
    level, had_bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not sys.stderr.isatty():
                disable_progress_bars()
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


@contextlib.contextmanager
def _errors_in_one_line(api: HfApi, repo: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # What the client raises is of many kinds: its own, those of its HTTP and xet libraries, RuntimeErrors.
        text = _explain(error, repo, urlsplit(api.endpoint).hostname or api.endpoint)
        raise UserError(_safe(text, secret=str(api.token))) from None


def _explain(error: BaseException, repo: str, host: str) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    refusal = next((item for item in chain if isinstance(item, HfHubHTTPError)), None)
    if refusal is None:
        reason = str(chain[-1]) or type(chain[-1]).__name__
        if any(isinstance(item, OSError) or type(item).__module__.startswith("httpx") for item in chain):
            return f"cannot reach the Hugging Face Hub at {host} ({reason}); check the connection and push again"
        return f"the push to {repo} at {host} failed: {reason}"
    return _explain_refusal(refusal, repo)


def _explain_refusal(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    said = f" (it says: {error.server_message})" if error.server_message else ""
    match status:
        case 401:
            return f"the Hugging Face Hub does not take the token{said}: {_HOW_TO_LOG_IN}"
        case 403:
            return f"the token may not write to {repo}{said}; is the owner right? {_HOW_TO_LOG_IN}"
        case 404:
            return f"the Hub knows no {repo}, or not for this token{said}; check owner and branch"
        case 409 | 412:
            return f"{repo} changed on the Hub while it was pushed to{said}; push again"
        case 429:
            return f"the Hub asks for fewer requests{said}; push again in some minutes"
    if status >= 500:
        return f"the Hub failed with status {status}{said}; push again later"
    return f"the Hub refuses the push to {repo} with status {status}{said}"


def _safe(text: str, secret: str = "") -> str:
    """One line, in which neither the token nor anything like one is left, nor what signs an address."""
    line = one_line(text)
    return str(without_secrets(line.replace(secret, "(token)") if secret else line))
