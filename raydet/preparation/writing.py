"""A source → its tables: images in OUT, or in OUT/train and OUT/val, with rejected images and findings beside them.

Large data is processed part by part, in local threads or in Ray tasks. This process holds the source's index, a hash
per image, and the parts being processed.
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from raydet.common.console import MOST_NAMED, Console
from raydet.common.display.progress import Progress
from raydet.common.errors import UserError
from raydet.preparation.examining import Examine
from raydet.preparation.parts import (
    SURVEY_IMAGES,
    Answer,
    Executor,
    PartOutcome,
    SourcePart,
    cut,
    part_name,
    write_part,
)
from raydet.preparation.report import (
    REPEATED_IMAGES_DROPPED,
    REPEATED_IMAGES_KEPT,
    PrepareReport,
    make_report,
)
from raydet.preparation.sources.source import ORIGIN_KEY, Finding, Source, SourceImage
from raydet.preparation.splitting import Hashes
from raydet.preparation.surveying import Survey, find_duplicates, hold_out, survey, with_outcome, without
from raydet.preparation.target import Target
from raydet.tables import storage
from raydet.tables.columns import Flags, Integers
from raydet.tables.layout import FileGroups
from raydet.tables.schema import build_schema, with_token
from raydet.tables.table import FINDINGS_FOLDER, REJECTED_FOLDER, TableWriter, write_manifest

LOST = "boxes of rejected images, dropped"
REPEATED_CONTENT = "the same content as an earlier image"
"""Reason for rejecting a duplicate, with `--duplicate-images drop`."""
_FINDINGS_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True)
class PreparationPlan:
    """Settings for writing the tables of a source.

    Attributes:
        identity: All settings that determine the result, by name.
        images_per_part: Images per file.
        images_per_survey_part: Images per task of the survey.
        num_threads: Threads per part; one per CPU by default.
        use_ray: True to run the parts as Ray tasks.
        reads: By option, what every node must see: the input as given by the user, and the URI to check; see
            `check_shared`.
        val_fraction: Fraction of the images for OUT/val; None writes all to OUT.
        seed: Seed of the choice of images for OUT/val.
        drop_duplicate_images: True to reject images with the same content as an earlier one.
    """

    config_hash: str
    identity: dict[str, Any]
    images_per_part: int
    images_per_survey_part: int = SURVEY_IMAGES
    num_threads: int | None = None
    use_ray: bool = False
    reads: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    val_fraction: float | None = None
    seed: int = 0
    drop_duplicate_images: bool = False

    @property
    def has_survey(self) -> bool:
        """True if all images must be examined before the first one is written."""
        return self.val_fraction is not None or self.drop_duplicate_images


def write_tables(
    target: Target, source: Source, examine: Examine, plan: PreparationPlan, console: Console
) -> PrepareReport:
    """Write the tables of a target, or nothing if anything fails; show the progress on a console.

    Raises:
        UserError: No image can be read, or the target cannot be written to.
        RunError: Storage or cluster failed, or an image changed in the meantime.
    """
    started = time.monotonic()
    target.begin(plan.identity)
    try:
        task = "examining" if plan.has_survey else _task("")
        with (
            _executor(target, plan) as execute,
            console.progress(task, total=source.num_images) as progress,
        ):
            run = _PreparationRun(target, source, examine, plan, execute, progress)
            report = run.write()
        counts = asdict(report)
        del counts["out"], counts["already_done"], counts["tables"]
        seconds = round(time.monotonic() - started, 3)
        # The first split last: its manifest marks all tables as complete.
        for split, uri in reversed(target.tables.items()):
            write_manifest(
                uri,
                run.files[split],
                config_hash=plan.config_hash,
                id_space=run.id_space,
                prepare=counts,
                seconds=seconds,
            )
    except BaseException:
        with contextlib.suppress(OSError, UserError):  # the next run cleans up what this one cannot
            target.clean()
        raise
    return report


@contextlib.contextmanager
def _executor(target: Target, plan: PreparationPlan) -> Iterator[Executor]:
    if plan.use_ray:
        from raydet.preparation.on_ray import tasks

        with tasks(target, plan.reads) as execute:
            yield execute
    else:
        yield _one_by_one


def _one_by_one(work: Callable[[SourcePart], Answer], parts: Iterable[SourcePart], /) -> Iterator[Answer]:
    return map(work, parts)


class _PreparationRun:
    """One run, from the survey to the report.

    Attributes:
        files: Row groups of each file, by split.
    """

    def __init__(
        self,
        target: Target,
        source: Source,
        examine: Examine,
        plan: PreparationPlan,
        execute: Executor,
        progress: Progress,
    ) -> None:
        self._target, self._source, self._examine, self._plan, self._execute = target, source, examine, plan, execute
        self._progress = progress
        self._counts: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._rejected_paths: dict[str, str] = {}
        num_classes = len(source.categories)
        self._boxes_by_class = {split: np.zeros(num_classes, np.int64) for split in target.tables}
        self.files: dict[str, dict[str, FileGroups]] = {split: {} for split in target.tables}
        self._id_digest = hashlib.sha256()

    @property
    def id_space(self) -> str:
        """Hash over the ids and paths of all images, 16 hex digits; the same for all splits."""
        return self._id_digest.hexdigest()[:16]

    def _numbered(self, images: Iterable[SourceImage]) -> Iterator[SourceImage]:
        """Yield all images of the source, adding each to the digest of the id space; call once."""
        for image in images:
            # Lengths make the digest unambiguous: a path may contain any separator.
            self._id_digest.update(f"{image.image_id} {len(image.path)} {image.path}".encode())
            yield image

    def write(self) -> PrepareReport:
        """Write everything except the manifests of the images tables."""
        out, own_hash = self._target.out, self._plan.config_hash
        with (
            TableWriter(
                storage.join(out, REJECTED_FOLDER), build_schema("rejected"), config_hash=own_hash
            ) as self._rejected,
            TableWriter(
                storage.join(out, FINDINGS_FOLDER), build_schema("findings"), config_hash=own_hash
            ) as self._findings,
        ):
            self._note(self._source.findings.rows)
            if self._plan.has_survey:
                self._write_surveyed()
            else:
                written = list(self._write_table("", self._numbered(self._source.images)))
                image_ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in written)])
                hashes = np.concatenate([np.zeros((0, 2), np.uint64), *(hashes for _, hashes in written)])
                self._find_duplicates(image_ids, hashes)
            self._refuse_nothing(self._counts["accepted"], self._counts["found"], self._reasons)
        return make_report(
            self._target,
            self._counts,
            self._kinds,
            self._reasons,
            rejected_paths=self._rejected_paths,
            class_names=[category.name for category in self._source.categories],
            thresholds=(self._source.origin or {}).get("thresholds", {}),
            boxes_by_class={split: counts.tolist() for split, counts in self._boxes_by_class.items()},
            images={
                split: sum(num_rows for groups in files.values() for num_rows, _ in groups)
                for split, files in self.files.items()
            },
        )

    def _write_surveyed(self) -> None:
        plan, source = self._plan, self._source
        images = self._progress.over(self._numbered(source.images))
        found = survey(images, self._examine, self._execute, plan.num_threads, plan.images_per_survey_part)
        self._refuse_nothing(int(found.is_accepted.sum()), len(found.is_accepted), Counter(found.reasons.values()))
        accepted = np.flatnonzero(found.is_accepted)
        repeated = accepted[self._find_duplicates(found.image_ids[accepted], found.hashes[accepted])]
        if plan.drop_duplicate_images:
            found = without(found, repeated, REPEATED_CONTENT)
        is_val = self._hold_out(found)
        for split in self._target.tables:
            # Rejected images are processed, and so listed, with the first table.
            wanted = is_val if split == "val" else ~is_val
            self._progress.begin(_task(split), total=int(wanted.sum()))
            images = with_outcome(source.images, found, wanted)
            for _ in self._write_table(split, images):
                pass

    def _hold_out(self, found: Survey) -> Flags:
        if self._plan.val_fraction is None:
            return np.zeros(len(found.is_accepted), np.bool_)
        num_classes = len(self._source.categories)
        return hold_out(found, num_classes=num_classes, val_fraction=self._plan.val_fraction, seed=self._plan.seed)

    def _write_table(self, split: str, images: Iterable[SourceImage]) -> Iterator[tuple[Integers, Hashes]]:
        """Write the files of one table; yield the ids and hashes of the rows of each file."""
        uri = self._target.tables[split]
        storage.make_folder(uri)
        origin = self._source.origin
        schema = build_schema(
            "images",
            self._source.categories,
            extra_fields=self._source.extra_fields,
            extra_metadata={ORIGIN_KEY: origin} if origin is not None else None,
            with_scores=origin is not None,
        )
        write = partial(
            write_part,
            table_uri=uri,
            schema=with_token(schema, self._plan.config_hash),
            examine=self._examine,
            num_classes=len(self._source.categories),
            num_threads=self._plan.num_threads,
        )
        use_ray = self._plan.use_ray  # then the images of a part are taken long before they are examined
        counted = images if use_ray else self._progress.over(images)
        for index, written in enumerate(self._execute(write, cut(counted, self._plan.images_per_part))):
            self._progress.advance(written.counts["found"] if use_ray else 0)
            self._take(split, part_name(index), written)
            yield written.image_ids, written.hashes

    def _take(self, split: str, name: str, written: PartOutcome) -> None:
        if written.row_groups:
            self.files[split][name] = written.row_groups
        self._counts += written.counts
        self._boxes_by_class[split] += written.boxes_by_class
        self._reasons.update(item.reason for item in written.rejected)
        for item in written.rejected[: MOST_NAMED - len(self._rejected_paths)]:
            self._rejected_paths[item.path] = item.reason
        if written.rejected:
            rows = [{"path": item.path, "image_id": item.image_id, "reason": item.reason} for item in written.rejected]
            self._rejected.write_rows(rows)
        self._note([Finding(LOST, item.path, item.image_id, count=item.num_boxes) for item in written.rejected])
        self._note(written.findings)

    def _note(self, findings: Iterable[Finding]) -> None:
        left = (vars(finding) for finding in findings if finding.count)
        while rows := list(islice(left, _FINDINGS_AT_ONCE)):
            for row in rows:
                self._kinds[row["kind"]] += row["count"]
            self._findings.write_rows(rows)

    def _find_duplicates(self, image_ids: Integers, hashes: Hashes) -> Integers:
        """List images with the same content as an earlier one; return their indices, ascending."""
        places, firsts = find_duplicates(hashes)
        if len(places):
            wanted = set(image_ids[places].tolist()) | set(image_ids[firsts].tolist())
            path_of = {image.image_id: image.path for image in self._source.images if image.image_id in wanted}
            kind = REPEATED_IMAGES_DROPPED if self._plan.drop_duplicate_images else REPEATED_IMAGES_KEPT
            pairs = zip(image_ids[places].tolist(), image_ids[firsts].tolist(), strict=True)
            self._note(
                [
                    Finding(kind, path_of[image_id], image_id, detail=f"the same as {path_of[first]}, image {first}")
                    for image_id, first in pairs
                ]
            )
        return places

    def _refuse_nothing(self, num_accepted: int, num_found: int, reasons: Counter[str]) -> None:
        if not num_accepted:
            shown = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
            raise UserError(f"none of the {num_found} images can be used ({shown})")


def _task(split: str) -> str:
    return f"preparing {split}" if split else "preparing"
