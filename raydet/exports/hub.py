"""Upload to the Hugging Face Hub: a model folder or the files of tables, and the card, as one commit.

All local checks run before the first request to the Hub. No message contains a token or the signature of a URL.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    validate_repo_id,
)

from raydet.common.console import Console, counted
from raydet.common.display.progress import Progress
from raydet.common.errors import RunError, UserError, one_line
from raydet.common.hub_client import quiet_client
from raydet.common.notebook.showing import Shown
from raydet.common.redaction import without_secrets
from raydet.config import PushConfig
from raydet.config.fields import with_options
from raydet.exports.hub_data import HubContent, RepoKind, read_dataset
from raydet.exports.model_card import build_card
from raydet.models.checkpoints import Checkpoint, read_checkpoint
from raydet.tables import storage

_CARD = "README.md"
_MESSAGES = {"model": "Push a detector trained with raydet", "dataset": "Push tables written by raydet"}
_PROCESSOR = "preprocessor_config.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_HOW_TO_LOG_IN = (
    "set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens), or run `hf auth login`"
)


@dataclass(frozen=True)
class PushResult(Shown):
    """Result of a push.

    Attributes:
        repo: The repository, as owner/name.
        kind: Kind of the repository.
        url: Page of the pushed branch.
        commit: Id of the commit with the files and the card.
        files: Names of the pushed files.
        num_bytes: Total size of the files in bytes.
        notes: Warnings about the card's content.
        already_done: True if the Hub already held identical files.
    """

    repo: str
    kind: RepoKind
    url: str
    commit: str
    files: tuple[str, ...]
    num_bytes: int
    notes: tuple[str, ...] = ()
    already_done: bool = False

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        done = "nothing to do: the Hub already has these files" if self.already_done else "pushed"
        return [
            *(f"note: {note}" for note in self.notes),
            f"{done}: {len(self.files)} files, {self.num_bytes / 1e6:.1f} MB, commit {self.commit[:12]}",
            f"{'model' if self.kind == 'model' else 'data set'}: {self.url}",
        ]


@with_options(PushConfig)
def push(config: PushConfig, *, console: Console | None = None) -> PushResult:
    """Upload a model folder or tables with a card in one commit; a missing repository is created.

    Of a model, only the configuration, the image processor and safetensors weights are sent. Other weights from an
    earlier push are deleted in the same commit, because they could be loaded instead of these.
    Tables become a data set. Only the Parquet files that their manifests list are sent, unchanged; Parquet files from
    an earlier push in the same folders of the repository are deleted.

    Raises:
        UserError: A name, the folder or the token is invalid, and nothing has been sent; or the Hub is unreachable or
            refuses, and there is no commit.
        RunError: A file cannot be copied from its store, or to this disk; there is no commit.
    """
    _check_names(config)
    content = read_dataset(config) if config.checkpoint is None else _model_content(config, config.checkpoint)
    api = _client()
    with (
        tempfile.TemporaryDirectory(prefix="raydet-push-") as folder,
        quiet_client(),
        _errors_in_one_line(api, config.repo),
        (console or Console()).progress("reading the files", total=len(content.files) + 1, unit="files") as progress,
    ):
        return _upload(api, config, content, Path(folder), progress)


def _model_content(config: PushConfig, folder: str) -> HubContent:
    if not storage.exists(folder):
        raise UserError(f"no such model folder: {folder}; push requires OUT/checkpoint of a training run")
    checkpoint = read_checkpoint(folder)
    files = {name: storage.join(checkpoint.name, name) for name in _model_files(checkpoint)}
    card, notes = build_card(config, checkpoint)
    return HubContent(
        kind="model", files=files, card=card, notes=notes, is_stale=lambda name: bool(_WEIGHTS.fullmatch(name))
    )


def _check_names(config: PushConfig) -> None:
    try:
        validate_repo_id(config.repo)
        is_name = config.repo.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise UserError(
            f"--repo must be owner/name with letters, digits, `-`, `_` and `.`, got {_safe(config.repo)}; owner is "
            "your user name or organisation on the Hub"
        )
    branch = config.revision
    if branch is not None and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", branch) or ".." in branch):
        raise UserError(f"--revision must be a branch name, got {branch}")
    if config.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", config.license):
        raise UserError(
            f"--license must be an identifier of the Hub in lower case, such as apache-2.0 or mit; got {config.license}"
        )


def _model_files(checkpoint: Checkpoint) -> list[str]:
    """List the model's files by an allow-list, because the folder may contain anything else."""
    present = storage.list_files(checkpoint.name)
    if _PROCESSOR not in present:
        raise UserError(
            f"the folder {checkpoint.name} has no {_PROCESSOR}, the image processor without which the model cannot be "
            "used; push OUT/checkpoint of a training run"
        )
    weights = [name for name in present if _WEIGHTS.fullmatch(name)]
    if not any(name.endswith(".safetensors") for name in weights):
        raise UserError(f"the folder {checkpoint.name} has no weights named model.safetensors")
    files = ["config.json", _PROCESSOR, *weights]
    for name in files:
        storage.open_input(storage.join(checkpoint.name, name)).close()  # refuses links
    return files


def _client() -> HfApi:
    try:
        token = get_token()
    except Exception as error:
        raise UserError(
            f"cannot read the token for the Hugging Face Hub: {_safe(str(error))}; {_HOW_TO_LOG_IN}"
        ) from None
    if token is None:
        raise UserError(f"no token for the Hugging Face Hub: {_HOW_TO_LOG_IN}")
    # The client reads HF_ENDPOINT only when it is first imported.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    return HfApi(endpoint=endpoint.rstrip("/"), token=token)


def _upload(api: HfApi, config: PushConfig, content: HubContent, folder: Path, progress: Progress) -> PushResult:
    """Create the commit."""
    user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token has only read access to the Hugging Face Hub: {_HOW_TO_LOG_IN}")
    _validate_card(api, content)
    # Without --private the Hub decides: an organisation may default to private repositories.
    api.create_repo(config.repo, repo_type=content.kind, private=config.private or None, exist_ok=True)
    branch = config.revision or constants.DEFAULT_REVISION
    if branch != constants.DEFAULT_REVISION:
        api.create_branch(config.repo, repo_type=content.kind, branch=branch, exist_ok=True)
    info = api.model_info if content.kind == "model" else api.dataset_info
    before = info(config.repo, revision=branch)
    if config.private and not before.private:
        raise UserError(
            f"{config.repo} already exists and is public, and --private applies to new repositories only: make it "
            "private in its settings on the Hub, or omit --private"
        )
    names = {*content.files, _CARD}
    others = [item.rfilename for item in before.siblings or [] if item.rfilename not in names]
    sends_paths, num_bytes = _offers_xet(api, content.kind, config.repo, branch), 0
    (folder / _CARD).write_text(content.card, encoding="utf-8")
    additions: list[CommitOperationAdd] = []
    with contextlib.ExitStack() as stack:
        for name, uri in {_CARD: str(folder / _CARD), **content.files}.items():
            path = Path(storage.resolve(uri)[1])
            is_copied = content.kind == "model" or not storage.is_local(uri)
            if is_copied and name != _CARD:
                # From a copy, so that a training run in progress cannot change a file between two reads.
                path = folder / name.replace("/", "-")
                _copy(uri, path)
            num_bytes += path.stat().st_size
            # The client sends paths to xet, even if the server lacks it, and open files to LFS.
            file = None if sends_paths else stack.enter_context(path.open("rb"))
            additions.append(CommitOperationAdd(name, file or path))
            if is_copied and content.kind == "dataset":
                # One file at a time, because a data set may be larger than the disk.
                api.preupload_lfs_files(config.repo, additions[-1:], repo_type=content.kind, revision=branch)
                os.truncate(path, 0)
            progress.advance()
        progress.begin(f"uploading {counted(len(additions), 'file')}, {num_bytes / 1e6:,.1f} MB")
        commit = api.create_commit(
            config.repo,
            [*additions, *(CommitOperationDelete(name) for name in others if content.is_stale(name))],
            repo_type=content.kind,
            commit_message=_MESSAGES[content.kind],
            revision=branch,
            parent_commit=before.sha,
        )
    page = f"{api.endpoint}/{'datasets/' if content.kind == 'dataset' else ''}{config.repo}"
    return PushResult(
        repo=config.repo,
        kind=content.kind,
        url=page + (f"/tree/{quote(config.revision)}" if config.revision else ""),
        commit=commit.oid,
        files=(*content.files, _CARD),
        num_bytes=num_bytes,
        notes=content.notes,
        already_done=commit.oid == before.sha,
    )


def _copy(uri: str, path: Path) -> None:
    try:
        with storage.open_input(uri) as source, path.open("wb") as copy:  # refuses links
            shutil.copyfileobj(source, copy)
    except OSError as error:  # not of the Hub
        raise RunError(f"cannot copy {uri} to {path.parent}: {one_line(error)}") from None


def _validate_card(api: HfApi, content: HubContent) -> None:
    """Have the Hub validate the card before an empty repository is created."""
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": content.card, "repoType": content.kind},
        headers=build_hf_headers(token=api.token),
    )
    hf_raise_for_status(response)


def _offers_xet(api: HfApi, kind: RepoKind, repo: str, branch: str) -> bool:
    response = get_session().get(
        f"{api.endpoint}/api/{kind}s/{repo}/xet-write-token/{quote(branch, safe='')}",
        headers=build_hf_headers(token=api.token),
    )
    if response.status_code in (404, 405, 501):
        return False
    hf_raise_for_status(response)
    return constants.HUGGINGFACE_HEADER_X_XET_ENDPOINT in response.headers


@contextlib.contextmanager
def _errors_in_one_line(api: HfApi, repo: str) -> Iterator[None]:
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        # The client raises its own errors, those of its HTTP and xet libraries, and RuntimeErrors.
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
    detail = f" ({error.server_message})" if error.server_message else ""
    failed = f"the Hub failed with status {status}{detail}; push again later"
    refused = f"the Hub refuses the push to {repo} with status {status}{detail}"
    changed = f"{repo} changed on the Hub during the push{detail}; push again"
    known = {
        401: f"the Hugging Face Hub rejects the token{detail}: {_HOW_TO_LOG_IN}",
        403: f"the token has no write access to {repo}{detail}; check the owner, or {_HOW_TO_LOG_IN}",
        404: f"{repo} does not exist on the Hub, or this token cannot see it{detail}; check owner and branch",
        409: changed,
        412: changed,
        429: f"the Hub limits the rate of requests{detail}; push again in a few minutes",
    }
    return known.get(status, failed if status >= 500 else refused)


def _safe(text: str, secret: str = "") -> str:
    """Return one line without the token, anything like a token, or the signature of a URL."""
    line = one_line(text)
    return str(without_secrets(line.replace(secret, "(token)") if secret else line))
